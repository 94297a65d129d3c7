"""Tests of datastore.py, memory_lm.py and memory_decoder.py: search and the kNN distribution in
NumPy float64, the build killed, resumed and sharded, keys against a recomputation without hooks,
scoring against a naive loop, generation with caches against none, users at once, chat prompts, a
full disk, what an older version wrote, bad input, and the command.

D width of a key, V vocabulary, n stored keys, Q queries, k neighbours, M entries of a target.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import math
import resource
import shutil
import signal
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, error_line, flags, write_corpus
from forkserver import Forked, forked_ranks

import datastore as ds
import dnc_gpt2
import memory_decoder as md
import memory_lm as ml

faiss = pytest.importorskip("faiss")

TINY = dict(
    window=32, stride=16, batch_windows=2, index="flat", knn_k=8, decoder_dim=16, decoder_layers=2,
    decoder_heads=4, decoder_reach=12, batch_tokens=128, target_width=8, finetune_lrs="1e-3",
    latency_tokens=3, latency_rounds=1, tune_tokens=200, eval_tokens=200, lora_rank=3, nprobe=11,
    rerank=3)
EVERY_ARM = "tokens,text,distilled,finetuned,lora"  # but a tail
BASE = dict(
    arms="baseline", hidden_size=32, num_layers=2, num_heads=2, batch_size=4, seq_len=32,
    max_steps=60, lr=1e-2, save_every_steps=100, eval_rows=2, eval_tokens=200,
    final_eval_tokens=200, num_gpus=0)
GREEDY = ml.Sampling("base", 0.5, 0.5, 0.0, 0, 20)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> str:
    """A domain of three splits."""
    return str(write_corpus(tmp_path_factory.mktemp("domain") / "text", 900, 200, 200))


@pytest.fixture(scope="module")
def save_dir(tmp_path_factory, text_folder, tokenizer_folder) -> Path:
    """A folder with one tiny trained GPT-2."""
    folder = tmp_path_factory.mktemp("base")
    fields = BASE | {"dataset": text_folder, "tokenizer": tokenizer_folder}
    argv = flags(fields | {"save_dir": folder, "plot_dir": folder / "plots"})
    assert dnc_gpt2.main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(save_dir) -> str:
    """The file of the tiny GPT-2."""
    return str(next(save_dir.glob("GPT2_Baseline_FINAL_*.pt")))


def argv_of(folder, checkpoint: str, text_folder: str, **fields) -> list[str]:
    """The command line of a tiny run in a folder."""
    named = {"base": checkpoint, "domain": text_folder, "model_dir": folder, "plot_dir": folder}
    return flags(TINY | named | fields)


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoint, text_folder) -> Path:
    """A folder with everything built, trained, tuned and evaluated. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRAW_PICTURES", "1")
        assert md.main(argv_of(folder, checkpoint, text_folder, arms=EVERY_ARM)) == 0
    return folder


@pytest.fixture(scope="module")
def config(made, checkpoint, text_folder) -> md.Config:
    """The Config of `made`."""
    folders = {"model_dir": str(made), "plot_dir": str(made), "arms": EVERY_ARM}
    return md.settled(md.Config(**TINY, base=checkpoint, domain=text_folder, **folders), checkpoint)


@pytest.fixture(scope="module")
def lm(made) -> ml.MemoryLM:
    """The model, its alpha and lambda well inside (0, 1) whatever was tuned, and two decays."""
    loaded = ml.MemoryLM.load(made)
    both = {"alpha": 0.4, "lambda": 0.3, "decay": 0.7}
    settings = loaded.settings | {"lambda": 0.3, "decay": 1.5, "both": both}
    return dataclasses.replace(loaded, settings=settings)


@pytest.fixture(scope="module")
def tail_lm(tmp_path_factory, checkpoint, text_folder) -> ml.MemoryLM:
    """As lm, its decoder the last block of the base, trained at two rates, beside its control."""
    folder = tmp_path_factory.mktemp("tail")
    fields = {"decoder_kind": "tail", "tail_blocks": 1, "arms": "text", "finetune_lrs": "1e-4,3e-3"}
    assert md.main(argv_of(folder, checkpoint, text_folder, **fields)) == 0
    return ml.MemoryLM.load(folder)


@pytest.fixture(scope="module")
def domain(config, lm) -> md.Domain:
    """The tokenized domain."""
    return md.load_domain(config, lm.base)


@pytest.fixture(scope="module")
def targets(made) -> md.Targets:
    """The sparse kNN targets on disk."""
    return md.Targets(*(np.load(made / name) for name in md.Targets.files(0, 0)))


@pytest.fixture(scope="module")
def teacher(config, made, targets) -> md.Teacher:
    """The neighbours, at the share that beta says."""
    return md.make_teacher(config, ds.read_manifest(made)["settings"], targets)


# ── Search and the kNN distribution ──────────────────────────────────────────────────────────────
def clustered(n: int, width: int, seed: int = 0) -> np.ndarray:
    """float16 keys around some centres, so that neighbours mean something."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((40, width))
    keys = centres[draw.integers(0, 40, n)] + 0.5 * draw.standard_normal((n, width))
    return keys.astype(np.float16)


def store_of(keys: np.ndarray, kind: str) -> ds.Datastore:
    """A datastore of keys; their values are of 11 kinds."""
    scale = ds.Scale.of(keys)
    index = ds.new_index(kind, keys.shape[1], len(keys), scale.unit(keys))
    ds.add_keys(index, keys, scale, 0, len(keys))
    if kind == "ivfpq":
        index.nprobe = 16
    return ds.Datastore(keys, np.arange(len(keys), dtype=np.int32) % 11, index, kind, scale, 4)


def brute_force(keys: np.ndarray, queries: np.ndarray, k: int, exclude=None):
    """Distances 2 (1 - cos) of standardised keys (Q, k), and ids (Q, k), in float64, ties to the
    lowest id."""
    keys, queries = keys.astype(np.float64), queries.astype(np.float64)
    standard = [(x - keys.mean(0)) / keys.std(0) for x in (queries, keys)]
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in standard]
    distances = 2 * (1 - np.einsum("qd,nd->qn", *units))
    if exclude is not None:
        distances[np.arange(len(queries)), exclude] = np.inf
    ids = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, ids, 1), ids


def votes(distances: np.ndarray, tau: float) -> np.ndarray:
    """softmax(-d / tau) over the last axis in float64."""
    weights = np.exp(-(distances - distances[:, :1]) / tau)
    return weights / weights.sum(1, keepdims=True)


def test_knn_probabilities_equal_brute_force_in_float64():
    keys = clustered(1500, 24)
    queries = np.random.default_rng(1).standard_normal((37, 24)).astype(np.float32)
    store = store_of(keys, "flat")
    distances, ids = store.search(queries, 13)
    true_distances, true_ids = brute_force(keys, queries, 13)
    assert (ids == true_ids).all()
    np.testing.assert_allclose(distances, true_distances, rtol=1e-5, atol=1e-6)
    for tau in (0.03, 0.5, 20.0):
        expected = np.zeros((37, 11))
        np.add.at(expected, (np.arange(37)[:, None], store.values[true_ids]),
                  votes(true_distances, tau))
        values = torch.from_numpy(store.values[ids])
        p = ds.knn_probabilities(torch.from_numpy(distances), values, tau, 11)
        np.testing.assert_allclose(p.numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(p.sum(1).numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["flat", "ivfpq", "hnsw"])
def test_keys_that_vary_in_a_few_dimensions_alone_are_found(kind):
    """As a pretrained base's do: two dimensions far from the origin, with most of the variance."""
    keys, queries = clustered(4000, 32).astype(np.float32), clustered(64, 32, seed=3)
    outlying = np.zeros(32)
    outlying[[3, 17]] = 300
    spread = np.where(outlying > 0, 100, 1)
    keys, queries = ((x * spread + outlying).astype(np.float16) for x in (keys, queries))
    store = store_of(keys, kind)
    assert store.recall(queries, 10) > 0.95
    true = brute_force(keys, queries, 10)[1]
    assert (np.sort(store.exact(queries, 10)) == np.sort(true)).all()
    assert store._replace(index=store_of(keys[::-1].copy(), kind).index).recall(queries, 10) < 0.5


def test_a_dimension_that_never_varies_and_a_key_at_the_mean_count_for_nothing():
    keys = clustered(200, 8)
    keys[:, 2] = 7
    scale = ds.Scale.of(keys)
    assert scale.factor[2] == 0 and np.isfinite(scale.unit(keys)).all()
    np.testing.assert_allclose(np.linalg.norm(scale.unit(keys), axis=1), 1, rtol=1e-6)
    assert (scale.unit(scale.mean[None]) == 0).all()
    store = ds.Datastore(keys, np.zeros(200, np.int32), None, "flat", scale)
    apart = store.distances(scale.unit(scale.mean[None]), np.array([[0, 5]]))
    np.testing.assert_allclose(apart, 2)  # no direction: as far as at right angles


@pytest.mark.parametrize("kind, least", [("flat", 1.0), ("ivfpq", 0.95), ("hnsw", 0.95)])
def test_each_index_recalls_and_leaves_out_the_query_itself_but_not_its_duplicate(kind, least):
    keys = clustered(4000, 32)
    keys[1234] = keys[77]  # the same text twice
    store = store_of(keys, kind)
    queries = clustered(64, 32, seed=3).astype(np.float32)
    ids, true = store.search(queries, 10)[1], brute_force(keys, queries, 10)[1]
    hits = [len(np.intersect1d(a, b)) for a, b in zip(ids, true, strict=True)]
    assert np.mean(hits) / 10 >= least

    own = np.array([77, 1234, 5])
    distances, ids = store.search(keys[own], 6, exclude=own)
    assert not (ids == own[:, None]).any()
    assert ids[:2, 0].tolist() == [1234, 77] and np.abs(distances[:2, 0]).max() < 1e-6
    distances, ids = store.search(keys[own], 6)
    assert ids[:, 0].tolist() == [77, 77, 5]  # a tie goes to the lowest id


def test_neighbours_are_sorted_whatever_the_index_gives_and_missing_ones_weigh_nothing():
    keys = clustered(50, 8)

    class Shuffled:
        def search(self, queries, wanted):
            some = np.random.default_rng(0).permutation(50)[: wanted - 4]
            missing = np.full(4, -1)
            return None, np.tile(np.concatenate([some, missing]), (len(queries), 1))

    store = ds.Datastore(keys, np.zeros(50, np.int32), Shuffled(), "flat", ds.Scale.of(keys))
    distances, ids = store.search(keys[:3].astype(np.float32), 50)
    assert (np.diff(distances[:, :46]) >= 0).all()
    assert (ids[:, 46:] == -1).all() and np.isinf(distances[:, 46:]).all()
    weights = ds.knn_weights(torch.from_numpy(distances), 1.0)
    assert (weights[:, 46:] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert ds.knn_weights(torch.full((2, 3), math.inf), 1.0).eq(0).all()  # and no NaN


@pytest.mark.parametrize("width", [3, 8, 40])
def test_sparse_kl_equals_dense_kl_in_float64(width):
    draw = torch.Generator().manual_seed(0)
    distances = torch.rand(20, 30, generator=draw).sort(1).values * 5
    values = torch.randint(0, 8, (20, 30), generator=draw)
    log_q = torch.randn(20, 12, generator=draw).log_softmax(-1)
    tokens, p = md.sparse_targets(distances, values, 1.0, width)

    dense = np.zeros((20, 12))
    np.add.at(dense, (np.arange(20)[:, None], values.numpy()), votes(distances.double().numpy(), 1))
    if width < 8:  # the heaviest, renormalised
        floor = np.sort(dense, axis=1)[:, -width]
        dense[dense < floor[:, None]] = 0
        dense /= dense.sum(1, keepdims=True)
    log_p = np.log(np.where(dense > 0, dense, 1))
    expected = (dense * (log_p - log_q.double().numpy())).sum(1)
    np.testing.assert_allclose(md.sparse_kl(tokens, p, log_q).numpy(), expected, atol=1e-5)


def test_targets_on_disk_are_the_knn_distribution_without_the_own_position(targets, lm):
    at = np.array([3, 200, 511])
    store, k = lm.datastore, lm.settings["k"]
    distances, ids = brute_force(store.keys, store.keys[at], k, exclude=at)
    weights = votes(distances, lm.settings["tau"])
    tokens, p, near = targets
    np.testing.assert_allclose(near[at], distances[:, 0], atol=1e-5)
    for row, position in enumerate(at):
        expected = np.bincount(store.values[ids[row]], weights[row], lm.base.vocab)
        dense = np.bincount(tokens[position], p[position].astype(float), lm.base.vocab)
        np.testing.assert_allclose(dense, expected, atol=2e-3)


# ── Mixing ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mixing", ["probability", "logits"])
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.3, 0.999, 1.0])
def test_mixture_sums_to_one_and_its_ends_are_exact(alpha, mixing):
    draw = torch.Generator().manual_seed(0)
    base, memory = torch.randn(2, 5, 300, generator=draw).mul(4).log_softmax(-1)
    mixed = ml.mix(base, memory, alpha, mixing)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(5), atol=1e-5, rtol=0)
    if alpha in (0.0, 1.0):
        assert torch.equal(mixed, memory if alpha else base)
    elif mixing == "probability":
        expected = (1 - alpha) * base.double().exp() + alpha * memory.double().exp()
        torch.testing.assert_close(mixed.double().exp(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ml.MODES)
def test_every_mode_sums_to_one_and_shares_of_0_are_the_base_bit_for_bit(lm, domain, mode):
    reading = ml.Conversation(lm, mode).feed(domain.test[:20].tolist())
    mixed, _ = ml.distribution(lm, mode, 0.4, 0.4, 0.5, reading)
    assert mixed.exp().sum().item() == pytest.approx(1, abs=1e-5)
    alone = ml.Conversation(lm, "base").feed(domain.test[:20].tolist()).log_base
    assert torch.equal(ml.distribution(lm, mode, 0.0, 0.0, 0.5, reading)[0], alone)


# ── Reading, keys, scoring ───────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("positions, window, stride", [(1, 8, 4), (8, 8, 4), (9, 8, 4), (63, 8, 3),
                                                       (100, 16, 16), (101, 16, 1)])
def test_windows_use_every_position_once_with_context_and_no_padding(positions, window, stride):
    windows = [w for group in ds.plan_windows(positions, window, stride, 3) for w in group]
    assert [p for w in windows for p in range(w.first, w.end)] == list(range(positions))
    assert all(w.end - w.start == min(window, positions) and w.start >= 0 for w in windows)
    assert all(w.first - w.start >= window - stride for w in windows[1:])


def test_stored_keys_equal_a_recomputation_without_hooks(lm, domain, made):
    keys = np.load(made / ds.KEYS, allow_pickle=False)
    values = np.load(made / ds.VALUES, allow_pickle=False)
    assert (keys.dtype, values.dtype) == (np.float16, np.int32)
    assert (values == domain.train[1:].numpy()).all()
    gpt2 = lm.base.model.transformer
    block = gpt2.h[-1]
    windows = ds.plan_windows(len(values), 32, 16, 1)
    for [window] in (windows[0], windows[5], windows[-1]):
        ids = domain.train[None, window.start : window.end]
        h = gpt2(ids, output_hidden_states=True).hidden_states[-2]  # what the last block reads
        key = block.ln_2(h + block.attn(block.ln_1(h))[0])[0, window.first - window.start :]
        np.testing.assert_allclose(keys[window.first : window.end], key.numpy(), atol=4e-3,
                                   rtol=1e-3)


def test_a_base_of_ones_own_is_prompted_by_line_and_a_foreign_one_in_one_piece(lm):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = "hul:\n\n\n    ka\n"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([text] * 9, trainers.BpeTrainer(show_progress=False))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    own = dataclasses.replace(lm.base, tokenizer=wrapped)
    whole = tokenizer.encode(text).ids
    assert own.encode(text) == dnc_gpt2.tokenize(tokenizer, [text]).tolist() != whole
    assert dataclasses.replace(own, own=False).encode(text) == whole and own.encode("") == []


def save_foreign_base(kind: str, tokenizer_folder: str, folder: Path) -> int:
    """Save a tiny model of another architecture, and a tokenizer that puts <bos> before a text ->
    the token <bos>."""
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=24, head_dim=8)
    getattr(transformers, f"{kind}ForCausalLM")(sizes).save_pretrained(folder)
    return tokenizer.bos_token_id


@pytest.mark.parametrize("kind, norm", [("Llama", "post_attention_layernorm"),
                                        ("Gemma2", "pre_feedforward_layernorm")])
def test_a_folder_of_another_architecture_gives_keys_after_the_norm_and_no_prefix_is_scored(
        kind, norm, tmp_path, tokenizer_folder, text_folder):
    begin = save_foreign_base(kind, tokenizer_folder, tmp_path)
    base = ds.load_base(str(tmp_path), 32, "feed_forward")
    assert (base.prefix, base.window) == ((begin,), 23)
    assert base.tokenizer.eos_token_id in base.end_ids()
    seen = []
    module = getattr(base.model.model.layers[-1], norm)
    module.register_forward_hook(lambda module, args, out: seen.append(out))
    stream = md.load_domain(md.Config(domain=text_folder), base).train
    windows = [ds.Window(0, 0, 10), ds.Window(5, 10, 15)]
    ids, keys, logits = ds.read_group(base, stream, windows)
    assert torch.equal(keys, seen[0][:, 1:].float()) and keys.shape == (2, 10, 16)
    assert torch.equal(ids[1], stream[5:15]) and logits.shape == (15, base.vocab)


def test_a_base_is_float32_on_every_device_whatever_its_file_holds(tmp_path, tokenizer_folder):
    """What it gives to a tail is."""
    save_foreign_base("Llama", tokenizer_folder, tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    model, _ = ds.foreign_base(str(tmp_path))  # as it is before it is moved to a device
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, half.lm_head.weight.float())


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.parametrize("batch", [1, 4])
def test_final_keys_are_the_state_before_the_head_of_every_token(
        kind, batch, tmp_path, tokenizer_folder, monkeypatch):
    """Built, and read as queries with some of the logits; what an older version built is refused
    and built anew."""
    identity, described = ds.identity_hash, {}
    monkeypatch.setattr(ds, "identity_hash", lambda x: described.update(x) or identity(x))
    save_foreign_base(kind, tokenizer_folder, tmp_path)
    base = ds.load_base(str(tmp_path), 16, "final", tail=1)
    stream = torch.randint(0, base.vocab, (90,), generator=torch.Generator().manual_seed(0))
    config = md.Config(model_dir=str(tmp_path), knn_k=8, stride=7, batch_windows=batch)
    md.build(config, base, md.Domain("", stream, stream, stream, fingerprint="", sources=[]))
    keys = np.load(tmp_path / ds.KEYS)
    for group in ds.plan_windows(len(keys), base.window, 7, batch):
        ids = ds.stack_group(base, stream, group)
        normed = base.model.model(ids).last_hidden_state  # (B, P + T, D)
        expected = ds.used(normed, group).half().numpy()
        assert (keys[group[0].first : group[-1].end] == expected).all()
        assert torch.equal(ds.read_group(base, stream, group)[1], normed[:, 1:])

    ml.make_tail(base, 1, 16)
    assert torch.equal(base.forward(ids, kept=1)[1], normed), "no pass of a tail is the tap's"
    manifest = ds.read_manifest(tmp_path)
    ds.check_manifest(tmp_path, base, manifest)
    del manifest["final"]
    with pytest.raises(ValueError, match="key = 'final'.*every token.*build again"):
        ds.check_manifest(tmp_path, base, manifest)
    assert "final" in described, "of another identity than the older one, so that it is built"


def test_keys_that_are_not_one_a_token_are_refused(lm):
    tap = copy.copy(lm.base.tap)
    tap.here = SimpleNamespace(keys=torch.zeros(4, 32))
    base = dataclasses.replace(lm.base, tap=tap)
    with pytest.raises(ValueError, match="key = 'feed_forward'.*for each of .1, 4. tokens"):
        base.forward(torch.arange(4)[None])


def naive_scores(lm, stream: torch.Tensor, mixing: str) -> np.ndarray:
    """base, base + decoder at alpha 0.3, p_knn of 5 neighbours at tau 0.2, and the distance of the
    nearest, of every token (n, 4), position after position in float64."""
    rows = []
    for [window] in ds.plan_windows(len(stream) - 1, 32, 16, 1):
        logits, keys = lm.base.forward(stream[None, window.start : window.end])
        log_p = logits[0].double().log_softmax(-1)
        log_q = lm.decoder(keys, None)[0].double().log_softmax(-1)
        for position in range(window.first, window.end):
            at, target = position - window.start, stream[position + 1]
            mixed = torch.log(0.7 * log_p[at].exp() + 0.3 * log_q[at].exp())
            if mixing == "logits":
                mixed = (0.7 * log_p[at] + 0.3 * log_q[at]).log_softmax(-1)
            distances, near = brute_force(lm.datastore.keys, keys[0, at, None].numpy(), 5)
            p_knn = votes(distances, 0.2)[lm.datastore.values[near] == int(target)].sum()
            rows.append([float(log_p[at, target]), float(mixed[target]), p_knn, distances[0, 0]])
    return np.array(rows)


@pytest.mark.parametrize("mixing", ["probability", "logits"])
def test_score_equals_a_naive_loop_over_positions(config, lm, domain, mixing):
    """Also of a base that was trained on, which looks up with its own states."""
    config, stream = dataclasses.replace(config, mixing=mixing), domain.valid[:90]
    path = md.arm_path(config, "finetuned")
    payload = ml.load_trained(path, ds.read_manifest(config.folder), "finetuned")
    for weight in payload["model_state_dict"].values():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    tuned = md.tuned_of(payload, path, lm.base, "finetuned")
    systems = md.Systems({"hidden": lm.decoder}, {"finetuned": tuned}, lm.datastore)
    grid = md.Grid(taus=[0.2], ks=[5], alphas=[0.0, 0.3])
    scores = md.score(config, lm.base, stream, 0, systems, grid)
    expected = naive_scores(lm, stream, mixing)
    np.testing.assert_allclose(scores.log_p["base"], expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(scores.mixed["hidden"][1], expected[:, 1], atol=1e-4)
    np.testing.assert_allclose(scores.knn["base"][0, 0], expected[:, 2], atol=1e-4)
    np.testing.assert_allclose(scores.near["base"], expected[:, 3], atol=1e-4)
    of_tuned = naive_scores(dataclasses.replace(lm, base=tuned), stream, mixing)
    np.testing.assert_allclose(scores.log_p["finetuned"], of_tuned[:, 0], atol=1e-4)
    np.testing.assert_allclose(scores.knn["finetuned"][0, 0], of_tuned[:, 2], atol=1e-4)
    np.testing.assert_allclose(scores.near["finetuned"], of_tuned[:, 3], atol=1e-4)
    assert np.abs(of_tuned - expected).max() > 0.1
    assert (scores.mixed["hidden"][0] == scores.log_p["base"]).all()


# ── Building ─────────────────────────────────────────────────────────────────────────────────────
SIGKILL_AT = """
import os, signal, sys
import datastore, memory_decoder
read, groups = datastore.read_keys, []
def read_keys(*args):
    groups.append(0)
    if len(groups) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*args)
datastore.read_keys = read_keys
sys.exit(memory_decoder.main(sys.argv[2:]))
"""


def kill_build(group: int, argv: list[str]) -> str:
    """Run the command until it kills itself in that group of windows -> its stdout."""
    process = Forked(["-c", SIGKILL_AT, str(group), *argv], cwd=ROOT)
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err[-2000:]
    return out


def test_a_killed_build_resumes_with_the_same_bytes_and_not_that_of_another_text(
        made, checkpoint, text_folder, tmp_path, monkeypatch, capsys):
    argv = ["build", *argv_of(tmp_path, checkpoint, text_folder)]
    kill_build(4, [*argv, "--max_keys=700"])
    assert "resumed" not in kill_build(7, argv) and not (tmp_path / ds.KEYS).exists()

    # What was written after the last flush is not trusted.
    part = np.load(tmp_path / f"{ds.KEYS}.part", mmap_mode="r+")
    part[-50:] = 7
    part.flush()
    read, calls = ds.read_keys, []
    monkeypatch.setattr(ds, "read_keys", lambda *args: calls.append(0) or read(*args))
    assert md.main(argv) == md.main(argv) == 0
    out = capsys.readouterr().out
    assert "resumed at position" in out and "holds these" in out  # the second time
    groups = ds.plan_windows(len(part), 32, 16, 2)
    assert len(calls) == len(groups) - 6
    built = {path.name: path for path in tmp_path.iterdir()}
    assert built.keys() - {".lock"} == {ds.KEYS, ds.VALUES, ds.INDEX, ds.SCALE, ds.MANIFEST,
                                        ds.SOURCES}
    for name in (ds.KEYS, ds.VALUES, ds.INDEX, ds.SCALE):
        assert built[name].read_bytes() == (made / name).read_bytes()


def test_a_refused_rebuild_leaves_the_sources_of_the_datastore_that_is_there(
        made, checkpoint, text_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    before = ds.read_sources(folder)
    (tmp_path / "other").mkdir()
    for i in range(40):
        (tmp_path / "other" / f"{i:02}.txt").write_text(f"ba den {i} hul ka\n", encoding="utf-8")

    def refuse(*args):
        raise ValueError("refused")

    other = ["build", *argv_of(folder, checkpoint, str(tmp_path / "other"))]
    with monkeypatch.context() as patch:
        patch.setattr(md, "check_not_replaced", lambda *args: None)
        patch.setattr(ds, "read_keys", refuse)
        assert md.main(other) == 2
    error_line(capsys.readouterr().err)
    assert ds.read_manifest(folder) == ds.read_manifest(made)
    assert ds.read_sources(folder) == before

    (folder / ds.SOURCES).unlink()  # as of a version that kept none; its keys are not built again
    assert md.main(["build", *argv_of(folder, checkpoint, text_folder)]) == 0
    assert "holds these" in capsys.readouterr().out and ds.read_sources(folder) == before
    (folder / ds.MANIFEST).unlink()
    assert md.main(other) == 0
    assert ds.read_sources(folder)[1].name == "01.txt"


@pytest.fixture(scope="module")
def other_text(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("elsewhere") / "other", 300, 60, 60))


@pytest.mark.parametrize("fields, named", [
    ({"max_keys": 500}, "max_keys = 200000, this run has 500; set --max_keys 200000, or another"),
    ({"key": "final"}, "key = 'feed_forward', this run has 'final'; set --key feed_forward"),
    ({"window": 24}, "window = 32, this run has 24; set --window 32"),
    ({"stride": 8}, "stride = 16, this run has 8; set --stride 16"),
    ({"batch_windows": 3}, "batch_windows = 2, this run has 3; set --batch_windows 2"),
    ({"decoder_kind": "tail"}, "decoder_kind = 'hidden', this run has 'tail'"),
    ({"domain": "other"}, "/text', this run has '{}'; set --domain "), ({}, "held something else")])
@pytest.mark.parametrize("command", [["build"], []])
def test_a_whole_datastore_of_something_else_is_not_replaced(
        command, fields, named, made, checkpoint, text_folder, other_text, tmp_path, monkeypatch,
        capsys):
    """Before a key is computed, in one line; what was trained on it stays of use."""
    if fields.get("domain"):
        fields = {"domain": other_text}
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    if not fields:
        there = shutil.copytree(text_folder, tmp_path / "text")
        (there / "train.txt").write_text("ba den hul ka " * 300)
        fields = {"domain": there}
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    argv = argv_of(folder, checkpoint, text_folder, **{"arms": EVERY_ARM} | fields)
    assert md.main([*command, *argv]) == 2
    line = error_line(capsys.readouterr().err)
    assert named.format(fields.get("domain")) in line and str(folder / ds.MANIFEST) in line
    assert "another --model_dir, or delete that folder" in line
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert ml.MemoryLM.load(folder).modes() == list(ml.MODES)


def test_another_base_does_not_replace_the_datastore_of_the_one_that_is_there(
        made, checkpoint, text_folder, tmp_path, capsys):
    payload = torch.load(checkpoint, weights_only=True)
    payload["model_state_dict"]["controller.wte.weight"][0] += 1
    dnc_gpt2.save_tensors(payload, tmp_path / "other.pt", "")
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    assert md.main(["build", *argv_of(folder, tmp_path / "other.pt", text_folder)]) == 2
    line = error_line(capsys.readouterr().err)
    assert f"base = {checkpoint!r}, this run has " in line and f"set --base {checkpoint}" in line


def test_another_kind_of_index_is_made_of_the_keys_that_are_there(
        made, checkpoint, text_folder, tmp_path, monkeypatch, capsys):
    """And once more after a kill between the index and the manifest. What was trained still fits;
    what was tuned with the other index is tuned again."""
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    monkeypatch.setattr(ds, "read_keys", None)
    argv = ["build", *argv_of(folder, checkpoint, text_folder, index="hnsw")]

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ds, "write_json", killed)
        patch.setattr(ds, "write_sources", lambda job: None)
        with pytest.raises(KeyboardInterrupt):
            md.main(argv)
    assert md.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("build: index hnsw of them") == 2 and "holds these" in out
    manifest, before = ds.read_manifest(folder), ds.read_manifest(made)
    assert (manifest["index"], manifest["settings"]) == ("hnsw", {})
    assert manifest["identity"] == before["identity"] and "tuning" not in manifest
    assert ds.open_datastore(folder, manifest).kind == "hnsw"
    assert ml.load_trained(folder / ml.DECODER_FILE, manifest)
    assert (folder / ds.KEYS).read_bytes() == (made / ds.KEYS).read_bytes()
    built = {path.name for path in folder.iterdir()}
    assert built == {path.name for path in made.iterdir()}
    assert md.main(argv) == 0 and "of them" not in capsys.readouterr().out


def test_a_damaged_index_alone_is_made_again_and_what_was_tuned_stays(
        made, checkpoint, text_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    spoil(folder / ds.INDEX, "flipped")
    monkeypatch.setattr(ds, "read_keys", None)
    assert md.main(["build", *argv_of(folder, checkpoint, text_folder, index="auto")]) == 0
    assert f"{ds.INDEX}" in capsys.readouterr().out
    assert (folder / ds.INDEX).read_bytes() == (made / ds.INDEX).read_bytes()
    assert ds.read_manifest(folder) == ds.read_manifest(made)


def test_shards_built_by_two_processes_and_merged_equal_one_build(
        made, checkpoint, text_folder, tmp_path):
    argv = argv_of(tmp_path, checkpoint, text_folder, index="ivfpq")
    for rank in forked_ranks([str(ROOT / "memory_decoder.py"), "build", *argv]):
        out, _ = rank.communicate()
        assert rank.returncode == 0, out[-2000:]
    for name in (ds.KEYS, ds.VALUES):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
    assert not [path for path in tmp_path.iterdir() if "of2" in path.name]

    keys = np.load(tmp_path / ds.KEYS)
    whole = store_of(keys, "ivfpq").index
    merged = ds.read_index(tmp_path / ds.INDEX, "ivfpq")
    assert merged.ntotal == len(keys)
    whole.nprobe = merged.nprobe = 4
    scale = ds.Scale(*np.load(tmp_path / ds.SCALE))
    one, two = (ds.Datastore(keys, keys[:, 0], index, "ivfpq", scale).search(keys[::40], 5)[1]
                for index in (whole, merged))
    assert np.mean(one == two) > 0.97


def test_a_build_by_one_process_does_not_go_on_with_what_a_merge_has_begun(
        made, checkpoint, text_folder, tmp_path, monkeypatch):
    """Killed alone, then killed while the shards of two are copied: the file of that name is
    another, and the first one's progress does not tell of it."""
    argv = ["build", *argv_of(tmp_path, checkpoint, text_folder)]
    kill_build(7, argv)
    files = {name: (np.load(made / name).shape, kind)
             for name, kind in ((ds.KEYS, "float16"), (ds.VALUES, "int32"))}
    with monkeypatch.context() as patch:
        patch.setattr(ds, "rank_and_size", lambda: (0, 2))
        with pytest.raises(FileNotFoundError):  # no shards: the copy ends behind its first file
            ds.merge_shards(tmp_path, files)
    assert md.main(argv) == 0
    for name in files:
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.parametrize("name, how", [(ds.KEYS, "flipped"), (ds.VALUES, "truncated"),
                                       (ds.INDEX, "missing")])
def test_what_is_damaged_is_built_again(name, how, made, checkpoint, text_folder, tmp_path, capsys):
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    spoil(folder / name, how)
    assert md.main(["build", *argv_of(folder, checkpoint, text_folder)]) == 0
    assert f"{name}: " in capsys.readouterr().out
    assert (folder / name).read_bytes() == (made / name).read_bytes()


def test_auto_takes_the_newest_finished_base_and_says_which_index_it_chose(
        save_dir, checkpoint, text_folder, tmp_path, capsys):
    bases = tmp_path / "bases"
    shutil.copytree(save_dir, bases)
    shutil.copy(checkpoint, bases / "GPT2_Baseline_step300.pt")  # newer, and of a run that goes on
    fields = {"save_dir": bases, "index": "auto", "max_keys": 500}
    assert md.main(["build", *argv_of(tmp_path, "auto", text_folder, **fields)]) == 0
    assert "index auto: flat for 500 keys" in capsys.readouterr().out
    assert ds.read_manifest(tmp_path)["base"] == str(bases / Path(checkpoint).name)
    assert ds.choose_index("auto", 10**6) == "ivfpq"


@pytest.mark.parametrize("command, mib", [("build", 0.05), ("train", 0.04)])
def test_a_disk_that_is_full_is_one_line_and_leaves_no_file_of_half(
        command, mib, made, checkpoint, text_folder, tmp_path, capsys):
    """A limit on the size of a file stands for the disk: the system refuses both alike."""
    folder = tmp_path / "models"
    if command != "build":
        shutil.copytree(made, folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(mib * 2**20), hard))
    try:
        assert md.main([command, *argv_of(folder, checkpoint, text_folder, arms="")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = error_line(capsys.readouterr().err)
    assert "cannot be written" in line and str(folder) in line and "free some space" in line
    assert not list(folder.glob("*.tmp"))
    decoder = folder / md.DECODER_FILE
    assert command == "build" or decoder.read_bytes() == (made / md.DECODER_FILE).read_bytes()


def test_what_an_older_version_wrote_still_opens(made, lm, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    manifest = json.loads((folder / ds.MANIFEST).read_text())
    for newer in ("about", "sha256", "keys_sha256", "values_sha256"):
        del manifest[newer]
    manifest["torch"] = "2.4.0"
    manifest["config"] |= {"temperature": 0.8, "top_k": 50}  # are no fields any more
    (folder / ds.MANIFEST).write_text(json.dumps(manifest))
    (folder / ".lock").write_text("4711")
    old = ml.MemoryLM.load(folder, lm.base.name)
    assert old.modes() == list(ml.MODES)
    ids = lm.base.encode("ba den fi")
    new = ml.MemoryLM.load(made)
    sampling = GREEDY._replace(mode="both")
    assert list(ml.generate(old, ids, sampling)) == list(ml.generate(new, ids, sampling))


# ── Generation ───────────────────────────────────────────────────────────────────────────────────
def naive_log_p(lm: ml.MemoryLM, mode: str, ids: list[int], alpha: float, lambda_: float
                ) -> torch.Tensor:
    """The distribution after ids, everything computed anew, without caches."""
    logits, keys = lm.base.forward(torch.tensor([ids]))
    inputs = ml.inputs_of(lm.decoder, keys, lm.base.states)
    log_q = lm.decoder(inputs, torch.tensor([ids]))[0, -1].log_softmax(-1)
    reading = ml.Reading(logits[0, -1].log_softmax(-1), keys[0, -1], log_q)
    return ml.distribution(lm, mode, alpha, lambda_, lm.decay(mode), reading)[0]


@pytest.mark.parametrize("kind", ["hidden", "tail"])
@pytest.mark.parametrize("mode", ml.MODES)
def test_generation_with_caches_equals_greedy_without_also_beyond_the_window(
        request, domain, mode, kind):
    lm = request.getfixturevalue("lm" if kind == "hidden" else "tail_lm")
    seen = domain.test[:25].tolist()
    close = 1e-4 if mode in ("base", "knn") else 1e-3  # the decoder's head in half precision
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a renamed argument
        steps = list(ml.generate(lm, seen, ml.Sampling(mode, 0.6, 0.3, 0.0, 0, 30)))
    assert len(steps) == 30
    for step in steps:
        log_p = naive_log_p(lm, mode, seen, 0.6, 0.3)
        assert step.token == int(log_p.argmax())
        assert step.probability == pytest.approx(float(log_p.max().exp()), abs=close)
        seen.append(step.token)
        if len(seen) > lm.window:
            seen = seen[-(lm.window // 2) :]  # the older half is dropped
    text = "".join(step.text for step in steps)
    assert text == lm.base.decode([step.token for step in steps])


def test_steps_tell_what_memory_changed_and_name_the_heaviest_neighbours(lm, domain):
    ids = domain.test[:25].tolist()
    for mode in ml.MODES:
        for step in ml.generate(lm, ids, ml.Sampling(mode, 1.0, 1.0, 1.0, 0, 12, seed=3)):
            said = lm.base.decode([step.token])
            assert step.changed or step.base_token == said
            searched = mode in ("knn", "both") or step.changed
            assert bool(step.neighbours) == searched and not (mode == "base" and step.changed)
            order = [(n.token != said, -n.weight) for n in step.neighbours]
            assert len(order) <= 5 and order == sorted(order)  # those that voted for it first


def test_a_neighbour_is_a_stored_position_with_the_text_before_it(lm, domain):
    ids = domain.test[:25].tolist()
    [alone] = ml.generate(lm, ids, GREEDY._replace(max_new_tokens=1))
    [step] = ml.generate(lm, ids, ml.Sampling("knn", 1.0, 1.0, 0.0, 0, 1))
    assert step.changed == (step.token != alone.token)
    reading = ml.Conversation(lm, "base").feed(ids)
    at = brute_force(lm.datastore.keys, reading.query[None].numpy(), 1)[1].item()
    nearest = min(step.neighbours, key=lambda neighbour: neighbour.distance)
    assert nearest.token == lm.base.decode([int(domain.train[at + 1])])
    assert nearest.context == lm.base.decode(domain.train[max(1, at - 7) : at + 1].tolist())


def test_sampling_follows_seed_top_k_and_temperature(lm, domain):
    ids = domain.test[:9].tolist()

    def tokens(**fields) -> list[int]:
        sampling = ml.Sampling("decoder", 0.5, 0.5, 1.0, 0, 20)._replace(**fields)
        return [step.token for step in ml.generate(lm, ids, sampling)]

    assert tokens(seed=1) == tokens(seed=1) != tokens(seed=2)
    assert tokens(top_k=1) == tokens(temperature=0.0) == tokens(temperature=1e-4)
    log_p = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = torch.Generator().manual_seed(0)
    noise = -torch.empty(4000, 4).exponential_(generator=draw).log()
    sampling = ml.Sampling("base", 0, 0, 1.0, 3)
    counts = np.bincount([ml.choose(log_p, row, sampling) for row in noise], minlength=4)
    expected = np.array([0.5, 0.3, 0.15, 0]) / 0.95
    np.testing.assert_allclose(counts / 4000, expected, atol=0.03)


def test_an_answer_stops_at_the_end_of_text(lm, domain, monkeypatch):
    ids, sampling = domain.test[:9].tolist(), GREEDY._replace(mode="both")
    tokens = [step.token for step in ml.generate(lm, ids, sampling)]
    end = tokens[6]
    monkeypatch.setattr(ds.Base, "end_ids", lambda self: {end})
    stopped = [step.token for step in ml.generate(lm, ids, sampling)]
    assert stopped == tokens[: tokens.index(end)]


def test_incomplete_characters_wait_until_they_are_whole(lm, monkeypatch):
    ids = lm.base.encode("né € 日")
    drawn = [token for token in ids for _ in range(2)]  # for the mixture, and for the base alone
    monkeypatch.setattr(ml, "choose", lambda *args: drawn.pop(0))
    steps = ml.generate(lm, ids[:1], GREEDY._replace(max_new_tokens=len(ids)))
    texts = [step.text for step in steps]
    assert "".join(texts) == "né € 日" and "" in texts
    assert not any("\ufffd" in text for text in texts)


def test_twenty_users_at_once_get_what_each_gets_alone(lm, domain):
    jobs = []
    for user in range(20):
        sampling = ml.Sampling(ml.MODES[user % 4], 0.5, 0.5, 0.9, 20, 12, seed=user)
        jobs.append((domain.test[3 * user : 3 * user + 8 + user % 3].tolist(), sampling))

    def answer(job) -> list[ml.Step]:
        return list(ml.generate(lm, *job))

    alone = [answer(job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert list(pool.map(answer, jobs)) == alone
@pytest.mark.parametrize("fields, named", [
    ({"mode": "magic"}, "mode"), ({"alpha": 1.01}, "alpha"), ({"alpha": math.nan}, "alpha"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": math.inf}, "temperature"),
    ({"top_k": -1}, "top_k"), ({}, "prompt")])
def test_sampling_that_cannot_be_is_refused_at_once(lm, fields, named):
    with pytest.raises(ValueError, match=named):
        ml.generate(lm, [1] if fields else [], GREEDY._replace(**fields))


# ── Chat prompts ─────────────────────────────────────────────────────────────────────────────────
def conversation(*texts: str) -> list[dict]:
    """Messages of a user and an assistant in turn, the user's first."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_chat_prompt_drops_whole_oldest_turns(lm):
    messages = conversation(*(f"ba den {i}" for i in range(9)))
    ids, dropped = ml.chat_ids(lm, messages[:1], 4)
    assert (lm.base.decode(ids), dropped) == ("ba den 0", 0)
    ids, dropped = ml.chat_ids(lm, messages, 4)
    assert dropped > 0 and messages[dropped]["role"] == "user"
    assert lm.base.decode(ids) == ml.chat_text(lm, messages[dropped:])
    assert len(ids) <= lm.window - 4
    assert len(lm.base.encode(ml.chat_text(lm, messages[dropped - 2 :]))) > lm.window - 4


def prompt_of_most_turns(lm, messages: list[dict], reserve: int) -> tuple[list[int], int]:
    """The prompt with the fewest turns dropped that fits, found by trying one after the other."""
    for dropped in [0, *range(2, len(messages), 2)]:
        ids = lm.base.encode(ml.chat_text(lm, messages[dropped:]))
        if len(ids) <= lm.window - reserve:
            return ids, dropped
    raise AssertionError("the last turn alone is too long")


def test_a_long_conversation_is_read_no_further_back_than_the_window(lm, monkeypatch):
    draw, encode, read = np.random.default_rng(0), ds.Base.encode, []
    for count in (*range(1, 30, 2), 199):
        words = draw.integers(1, 4 if count < 20 else 9, count)
        messages = conversation(*(" ".join(["gor"] * n) for n in words))
        assert ml.chat_ids(lm, messages, 4) == prompt_of_most_turns(lm, messages, 4)

    def counted(self, text: str) -> list[int]:
        ids = encode(self, text)
        read.append(len(ids))
        return ids

    monkeypatch.setattr(ds.Base, "encode", counted)
    _, dropped = ml.chat_ids(lm, messages, 4)
    assert dropped > 0 and sum(read) < 12 * lm.window
    assert len(encode(lm.base, ml.chat_text(lm, messages))) > 20 * lm.window


def test_chat_template_is_used_keeps_the_system_message_and_its_errors_are_one_line(lm):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=lm.base.tokenizer.backend_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no') }}"
        "{% endif %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}")
    chat = dataclasses.replace(lm, base=dataclasses.replace(lm.base, tokenizer=tokenizer))
    system = [{"role": "system", "content": "den"}]
    ids, dropped = ml.chat_ids(chat, system + conversation("gor " * 20, "fi", "ba"), 0)
    assert (lm.base.decode(ids), dropped) == ("[s]den[u]ba[a]", 2)
    with pytest.raises(ValueError, match="chat template .* refuses"):
        ml.chat_ids(chat, conversation("bad"), 0)


@pytest.mark.parametrize("texts, said", [
    ([], "empty"), ([" \n"], "empty"), (["x" * 20_001], "20,000"), (["ba den " * 200], "room for"),
    (["\ud800"], "UTF-8")])
def test_chat_messages_that_cannot_be_are_one_line(lm, texts, said):
    with pytest.raises(ValueError, match=said):
        ml.chat_ids(lm, conversation(*texts), 0)


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("command, option, said", [
    ("bild", "", "command = 'bild'"), ("build", "--alpha=1.5", "alpha = 1.5"),
    ("build", "--window=7", "8 or more"), ("build", "--decoder_heads=3", "decoder_dim = 16"),
    ("build", "--arms=hidden,other", "arms"), ("build", "--finetune_lrs=fast", "finetune_lrs"),
    ("build", "--stride=64", "stride = 64"), ("build", "--model_dir=/dev/null/x", "model_dir"),
    ("build", "--base=missing.pt", "missing.pt"), ("build", "--domain=./nowhere", "./nowhere"),
    ("build", "--knn_k=100000", "knn_k"), ("build", "--index=ivfpq --max_keys=500", "ivfpq")])
def test_bad_options_are_one_line_and_nothing_is_written(
        command, option, said, checkpoint, text_folder, tmp_path, capsys):
    argv = argv_of(tmp_path, checkpoint, text_folder)
    assert md.main([command, *argv, *option.split()]) == 2
    assert said in error_line(capsys.readouterr().err)
    assert not (tmp_path / ds.MANIFEST).exists() and not (tmp_path / ds.KEYS).exists()


def spoil(path: Path, how: str) -> None:
    """Make a file wrong."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif how == "foreign":
        torch.save({"identity": object}, path)
    elif how.startswith("{"):  # fields of the manifest
        path.write_text(json.dumps(json.loads(content) | json.loads(how)))
    else:
        flipped = content[:99] + bytes([content[99] ^ 255]) + content[100:]
        wrong = {"truncated": content[:-100], "flipped": flipped, "garbage": b"garbage"}
        path.write_bytes(wrong[how])


SPOILT = [
    (ds.MANIFEST, ("missing", "garbage", '{"count": 7}', '{"width": 31}', '{"vocab": 1}',
                   '{"base_fingerprint": "x"}', '{"identity": "x"}', '{"settings": {}}')),
    (ds.KEYS, ("missing", "truncated", "pickle")),
    (ds.VALUES, ("truncated",)),
    (ds.INDEX, ("missing", "flipped")),
    ("memory_decoder.pt", ("missing", "foreign"))]


@pytest.mark.parametrize("name, how", [(name, how) for name, hows in SPOILT for how in hows])
def test_spoilt_artefacts_are_one_line(name, how, made, config, tmp_path, capsys):
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    spoil(folder / name, how)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ml.MemoryLM.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    fields = dataclasses.asdict(config) | {"model_dir": folder}
    assert md.main(["evaluate", *flags(fields)]) == 2
    error_line(capsys.readouterr().err)


def test_a_gated_model_says_how_to_log_in(monkeypatch, tmp_path, text_folder, capsys):
    from transformers import AutoTokenizer

    def refuse(name, **options):
        raise OSError("You are trying to access a gated repo.\n401 Client Error")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    assert md.main(["build", *argv_of(tmp_path, "google/gemma-2b", text_folder)]) == 2
    assert "hf auth login" in error_line(capsys.readouterr().err)


def test_a_checkpoint_with_a_memory_is_no_base(tmp_path, checkpoint):
    payload = torch.load(checkpoint, weights_only=True)
    payload["model_state_dict"]["memory.x"] = torch.zeros(1)
    torch.save(payload, tmp_path / "dnc.pt")
    with pytest.raises(ValueError, match="without a memory"):
        ds.load_base(str(tmp_path / "dnc.pt"), 32, "final")


# ── Domain ───────────────────────────────────────────────────────────────────────────────────────
def texts_of(splits: dict[str, list[md.Document]]) -> dict[str, list[str]]:
    """The texts of documents."""
    return {split: [document.text for document in documents]
            for split, documents in splits.items()}


def test_hub_rows_pass_the_template_and_are_split_by_text_each_once(monkeypatch):
    import datasets

    rows = {"Title": [f"t{i % 50}" for i in range(60)], "Answer": [None, *["a"] * 59]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or splits)
    monkeypatch.setattr(md, "asking_hub", lambda *args: contextlib.nullcontext())
    texts = texts_of(md.hub_domain("a/b:c", "{Title}: {Answer}"))
    assert asked == [("a/b", "c")]
    assert texts["train"][:2] == ["t0: \n", "t1: a\n"]
    everything = [text for split in texts.values() for text in split]
    assert len(everything) == len(set(everything)) == 51  # t0 without an answer, then with one
    assert len(texts["valid"]) == len(texts["test"]) == 2
    for template in ("{Titel}", "{Title[foo]}", "{Title.foo}", "{", "{}"):
        with pytest.raises(ValueError, match="text_template .* Title, Answer"):
            md.hub_domain("a/b", template)
    splits |= {"validation": splits["train"].select([1]), "test": splits["train"].select([2])}
    texts = texts_of(md.hub_domain("a/b", "{Title}"))  # its own splits
    assert (len(texts["train"]), texts["valid"], texts["test"]) == (60, ["t1\n"], ["t2\n"])
    assert asked[-1] == ("a/b", None)
    lines = {"text": ["", " = Title = \n", " ", "A line .\n"]}  # as WikiText-2 has them
    splits |= {name: datasets.Dataset.from_dict(lines) for name in splits}
    texts = texts_of(md.hub_domain("a/b", ""))
    assert texts["train"] == texts["test"] == [" = Title = \n", "A line .\n"]


def test_a_folder_of_any_text_files_is_split_and_bad_ones_are_one_line(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}\n", encoding="utf-8")
    texts = md.folder_domain(str(tmp_path))
    assert [len(texts[split]) for split in ("train", "valid", "test")] == [36, 2, 2]
    (tmp_path / "40.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="40.txt is not UTF-8"):
        md.folder_domain(str(tmp_path))
    one = tmp_path / "one"
    one.mkdir()
    with pytest.raises(ValueError, match="there is none"):
        md.folder_domain(str(one))
    paragraphs = "\n\n".join(f"paragraph {i}" for i in range(30))
    (one / "a.txt").write_text(paragraphs, encoding="utf-8")
    assert len(md.folder_domain(str(one))["train"]) == 28


@pytest.mark.parametrize("content, said", [(b"a\xff", "test.txt is not UTF-8 (at byte 1)"),
                                           (b" \n", "text (test.txt has none)")])
def test_a_bad_split_of_a_folder_is_named_by_its_field(content, said, checkpoint, text_folder,
                                                       tmp_path, capsys, monkeypatch):
    """Also where a file is so large that it is read in pieces."""
    folder = shutil.copytree(text_folder, tmp_path / "text")
    (folder / "test.txt").write_bytes(content)
    for whole in (dnc_gpt2.WHOLE, 0):
        monkeypatch.setattr(dnc_gpt2, "WHOLE", whole)
        assert md.main(["build", *argv_of(tmp_path, checkpoint, str(folder))]) == 2
        line = error_line(capsys.readouterr().err)
        assert line.startswith(f"error: domain = {str(folder)!r}: ") and said in line


# ── Decoder and training ─────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["hidden", "tokens"])
def test_one_token_through_the_half_precision_head_is_close_to_the_whole_one(kind):
    torch.manual_seed(0)
    decoder = ml.Decoder(kind, 64, 2, 4, 16, 500, 48)
    decoder.head.weight.data.normal_()
    keys, ids = torch.randn(1, 1, 48), torch.tensor([[7]])
    with torch.no_grad():
        whole = decoder(keys, ids)
        assert "head_half" not in decoder.state_dict()
        decoder.ready()
        single, pair = decoder(keys, ids), decoder(keys.expand(2, 1, 48), ids.expand(2, 1))
    assert single.dtype == torch.float32 and not torch.equal(single, whole)
    torch.testing.assert_close(single, whole, atol=2e-3 * whole.abs().max().item(), rtol=0)
    torch.testing.assert_close(pair[:1], whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hidden", "tokens"])
@pytest.mark.parametrize("reach", [4, 32])
def test_decoder_attends_back_as_far_as_its_reach_and_its_cache_is_exact(kind, reach):
    torch.manual_seed(0)
    decoder = ml.Decoder(kind, 16, 1, 4, reach, 30, 10).eval()
    for weight in decoder.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    keys, ids = torch.randn(2, 11, 10), torch.randint(0, 30, (2, 11))
    out = decoder(keys, ids)

    changed_keys, changed_ids = keys.clone(), ids.clone()
    changed_keys[:, 3] = torch.randn(10)
    changed_ids[:, 3] = (ids[:, 3] + 1) % 30
    moved = (decoder(changed_keys, changed_ids) - out).abs().amax(-1) > 1e-4  # (B, T)
    behind = torch.arange(11) - 3
    assert (moved == ((behind >= 0) & (behind < reach))).all()

    cache: list = []
    parts = [decoder(keys[:, at], ids[:, at], cache)
             for at in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 11))]
    torch.testing.assert_close(torch.cat(parts, dim=1), out, atol=1e-5, rtol=1e-4)


def test_distance_bias_falls_with_distance_and_masks_what_is_ahead_or_too_far():
    distance = 3 + np.arange(3)[:, None] - np.arange(6)  # reach + t - j
    allowed = (distance >= 0) & (distance < 3)
    slopes = np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256])
    expected = np.where(allowed, -slopes[:, None, None] * distance, -np.inf)
    assert (ml.distance_bias(4, 3).numpy() == expected).all()


def test_a_decoder_as_wide_as_the_base_starts_with_the_head_of_the_base(lm):
    decoder = md.new_decoder(md.Config(decoder_dim=32, decoder_heads=4), lm.base, "hidden")
    embedding = lm.base.model.get_output_embeddings().weight
    torch.testing.assert_close(decoder.head.weight @ decoder.enter.weight, embedding, atol=1e-5,
                               rtol=1e-4)
    for width in (8, 48):  # narrower and wider than the base
        md.new_decoder(md.Config(decoder_dim=width, decoder_heads=4), lm.base, "tokens")


def test_a_decoder_of_tokens_serves_another_base_with_its_tokenizer_and_one_of_states_does_not(
        lm, made):
    other = ds.read_manifest(made) | {"identity": "of another base"}
    assert ml.load_decoder(made / "decoder_tokens.pt", lm.base, other).kind == "tokens"
    with pytest.raises(ValueError, match="train again"):
        ml.load_decoder(made / "memory_decoder.pt", lm.base, other)
    with pytest.raises(ValueError, match="train again"):
        ml.load_decoder(made / "decoder_tokens.pt", lm.base, other | {"tokenizer_sha256": "x"})


def test_beta_is_one_share_or_that_of_the_neighbours_at_their_distance(config, made, targets):
    chosen = {"lambda": 0.8, "decay": 1.5}
    fixed = md.make_teacher(dataclasses.replace(config, beta=0.25), chosen, targets)
    assert (fixed.share == 0.25).all() and len(fixed.share) == len(targets.near)
    falling = md.make_teacher(dataclasses.replace(config, beta="auto"), chosen, targets)
    np.testing.assert_allclose(falling.share, 0.8 * np.exp(-1.5 * targets.near), rtol=1e-6)


def test_training_lowers_the_loss_of_every_arm(config, lm, domain, teacher):
    config = dataclasses.replace(config, num_epochs=6)
    for arm in ("hidden", "tokens", "text", "distilled"):
        start = md.new_decoder(config, lm.base, "tokens" if arm == "tokens" else "hidden")
        end = md.train_decoder(config, lm.base, domain, lm.datastore, arm, teacher, 3e-3)
        systems = md.Systems({"start": start, "end": end})
        scores = md.score(config, lm.base, domain.train, 300, systems, md.Grid(alphas=[1.0]))
        before, after = (md.perplexity(scores.mixed[name]) for name in ("start", "end"))
        assert after < 0.9 * before, arm


def test_the_datastore_has_no_part_in_the_controls_and_has_one_in_the_decoder(
        config, lm, domain, teacher):
    turned = md.Targets(*(array[::-1].copy() for array in teacher.targets))
    others = teacher._replace(targets=turned)
    for arm in ("text", "distilled", "hidden"):
        one, two = (
            md.train_decoder(config, lm.base, domain, lm.datastore, arm, x, 4e-3).state_dict()
            for x in (teacher, others))
        assert all(torch.equal(one[name], two[name]) for name in one) == (arm != "hidden"), arm


def test_the_base_as_a_teacher_reads_behind_its_prefix(tmp_path, tokenizer_folder):
    """As it is scored: from itself it diverges by nothing."""
    save_foreign_base("Gemma2", tokenizer_folder, tmp_path)
    base = ds.load_base(str(tmp_path), 16, "feed_forward")
    stream = torch.randint(0, 200, (24,), generator=torch.Generator().manual_seed(0))
    group = [ds.Window(0, 0, 12), ds.Window(12, 12, 24)]
    ids, _, logits = ds.read_group(base, stream, group)
    assert md.base_divergence(base, ids, logits.log_softmax(-1)).abs().max() < 1e-6


def test_training_that_diverges_names_the_rate(config, lm, domain, teacher):
    with pytest.raises(dnc_gpt2.Diverged, match="decoder hidden diverged .* decoder_lr below"):
        md.train_decoder(config, lm.base, domain, lm.datastore, "hidden", teacher, 1e30)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Gemma2", "GPT2"])
def test_a_tail_begins_as_the_base_and_caches_give_the_same(kind, tmp_path, tokenizer_folder):
    prefix = ()
    if kind == "GPT2":
        sizes = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=24)
        model = transformers.GPT2LMHeadModel(sizes)
    else:
        prefix = (save_foreign_base(kind, tokenizer_folder, tmp_path),)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tap = ds.KeyTap(model.eval().requires_grad_(False), "feed_forward", tail=1)
    base = ds.Base("", model, None, 23, prefix, False, tap, "")
    tail = ml.make_tail(base, 1, 23)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert tail.tail.get_output_embeddings().weight is head, "shared, not held twice"
    assert tail.tail.get_input_embeddings().weight is embedding, "also where the head is its own"
    assert len(ds.blocks_of(model)) > 1 and not head.requires_grad
    ids = torch.randint(0, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    _, keys, _ = ds.read_group(base, ids.flatten(), [ds.Window(0, 0, 20), ds.Window(20, 20, 40)])
    begins = torch.tensor(prefix, dtype=torch.int64).expand(2, -1)
    logits = model(torch.cat([begins, ids], dim=1)).logits[:, len(prefix) :]
    states = base.states[:, len(prefix) :]
    torch.testing.assert_close(tail(states, None), logits, atol=1e-5, rtol=1e-4)
    last = base.tap.here.keys[:, len(prefix) :]
    assert torch.equal(last, keys), "the tail's own pass is none of the tap's"
    cache, parts = [], []
    for part in states.split([7, 1, 12], dim=1):
        parts.append(tail(part, None, cache, kept=1))
    expected = logits[:, [6, 7, 19]]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)


def test_an_untrained_tail_is_scored_and_answers_as_the_base_behind_its_prefix(
        tmp_path, tokenizer_folder):
    """A file of an older version, which was trained without the prefix, goes on without it."""
    save_foreign_base("Llama", tokenizer_folder, tmp_path)
    base = ds.load_base(str(tmp_path), 16, "feed_forward", tail=1)
    tail = ml.make_tail(base, 1, 15)
    stream = torch.randint(0, 200, (50,), generator=torch.Generator().manual_seed(0))
    scores = md.score(md.Config(stride=7), base, stream, 0, md.Systems({"tail": tail}),
                      md.Grid(alphas=[1.0]))
    np.testing.assert_allclose(scores.mixed["tail"][0], scores.log_p["base"], atol=1e-5)

    chat = ml.Conversation(ml.MemoryLM("", base, tail, None, {}), "decoder")
    for new in stream[:24].split([6, 1, 5, 6, 6]):  # the last two are beyond the window
        reading = chat.feed(new.tolist())
        torch.testing.assert_close(reading.log_decoder, reading.log_base, atol=1e-5, rtol=1e-4)

    payload = {"arm": "tail", "identity": "i", "model_state_dict": tail.state_dict()}
    older = {name: size for name, size in tail.sizes.items() if name != "prefix"}
    for sizes, begins in ((tail.sizes, True), (older, False)):
        dnc_gpt2.save_tensors(payload | {"sizes": sizes}, tmp_path / md.DECODER_FILE)
        loaded = ml.load_decoder(tmp_path / md.DECODER_FILE, base, {"identity": "i"})
        assert (loaded.begin is not None) == begins


def test_a_copy_of_the_base_is_freed_after_use(lm):
    """As each rate of fine-tuning makes one."""
    copied = dataclasses.replace(lm.base, model=copy.deepcopy(lm.base.model))
    copied.forward(torch.arange(4)[None])
    kept = weakref.ref(copied.model)
    del copied
    gc.collect()
    assert kept() is None


def test_a_tail_that_does_not_begin_as_the_base_is_refused(tmp_path, tokenizer_folder):
    save_foreign_base("Llama", tokenizer_folder, tmp_path)
    base = ds.load_base(str(tmp_path), 24, "feed_forward", tail=1)
    with pytest.raises(ValueError, match="decoder_kind = 'tail': must be hidden or tokens"):
        ml.make_tail(base, 2, 24)  # which the states of another block enter
    assert ds.load_base(str(tmp_path), 24, "feed_forward", tail=9).tap.tail == 2, "all there are"


def test_auto_trains_a_tail_of_a_pretrained_base_and_everything_beside_ones_own():
    of_folder = md.settled(md.Config(), "smollm2")
    assert of_folder.arm_list == ["tail", "text"] and of_folder.tail == 4
    assert (of_folder.beta, md.settled(md.Config(beta=0.3), "smollm2").beta) == ("auto", 0.3)
    assert of_folder.rates() == [3e-4]
    own = md.settled(md.Config(), "checkpoints/GPT2_Baseline_FINAL_step600.pt")
    assert own.arm_list == ["hidden", "tokens", "text", "distilled", "finetuned"] and own.tail == 0
    assert own.beta == "auto" and own.rates() == [1e-4, 3e-4]
    assert md.settled(md.Config(finetune_lrs="1e-3"), "smollm2").rates() == [1e-3]
    asked = md.settled(md.Config(decoder_kind="tokens", arms=""), "smollm2")
    assert asked.arm_list == ["tokens"]


def test_adapters_start_as_the_base_and_are_saved_alone(made, config, lm):
    """On every projection and nowhere else; merged from the file they are what was trained."""
    manifest = ds.read_manifest(made)
    domain = md.load_domain(config, lm.base)
    ids = domain.valid[None, :20]
    saved = dnc_gpt2.load_tensors(md.arm_path(config, "lora"), ("lr", "model_state_dict"), "")
    untrained = md.add_adapters(copy.deepcopy(lm.base.model), 3)
    tuned, payload = md.finetune(config, lm.base, domain, "lora", saved["lr"])
    path = md.arm_path(config, "lora")
    loaded = md.tuned_of(ml.load_trained(path, manifest, "lora"), path, lm.base, "lora")
    with torch.no_grad():
        assert torch.equal(untrained(input_ids=ids).logits, lm.base.model(input_ids=ids).logits)
        logits = [base.model(input_ids=ids).logits for base in (lm.base, tuned, loaded)]
    assert torch.equal(logits[1], logits[2]) and not torch.equal(logits[0], logits[1])

    width, layers = 32, 2
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    expected = layers * sum(3 * (inputs + outputs) for inputs, outputs in sizes)
    assert sum(weight.numel() for weight in saved["model_state_dict"].values()) == expected
    assert payload["model_state_dict"].keys() == saved["model_state_dict"].keys()


def test_adapters_of_another_base_are_refused_in_one_line(config, lm):
    path = md.arm_path(config, "lora")
    payload = torch.load(path, weights_only=True)
    payload["model_state_dict"].popitem()
    with pytest.raises(ValueError, match="base_lora.pt.*adapters of every projection"):
        md.tuned_of(payload, path, lm.base, "lora")


def test_a_tail_keeps_its_blocks_alone_and_learns(tail_lm):
    weights = tail_lm.decoder.state_dict()
    block = ds.blocks_of(tail_lm.base.model)[-1].state_dict()
    assert {f"0.{name}" for name in block} == weights.keys()
    assert any(not torch.equal(block[name], weights[f"0.{name}"]) for name in block)
    settings = tail_lm.settings["valid_ppl"]
    assert settings["tail"] < settings["base"]


def test_the_decoder_of_text_alone_is_tuned_with_the_search_too(config):
    """Its share and that of the neighbours are the best of the grid, as the imitating decoder's."""
    config = dataclasses.replace(config, decoder_kind="hidden", arms="text,lora")
    draw, shares, n = np.random.default_rng(0), [0.0, 0.5, 1.0], 60
    mixed = {arm: np.log(draw.random((3, n))) for arm in ("hidden", "text")}
    log_p = {name: np.log(draw.random(n)) for name in ("base", "lora")}
    knn, near = ({name: most * draw.random(shape) for name in log_p}
                 for most, shape in ((1, (1, 1, n)), (4, n)))
    scores = md.Scores(log_p, mixed, knn, near)
    alone = {"lambda": 0.1, "decay": 0.5, "tau": 1, "k": 2}
    settings = md.tuned_settings(config, scores, shares, alone)
    for system, arm in (("both", "hidden"), ("both_text", "text")):
        ppl = {}
        for i, alpha in enumerate(shares):
            for share, decay in itertools.product(md.SHARES, md.DECAYS):
                added = md.add_knn(mixed[arm][i], knn["base"][0, 0], near["base"], share, decay)
                ppl[alpha, share, decay] = md.perplexity(added)
        best = min(ppl, key=ppl.get)
        names = ("alpha", "lambda", "decay")
        assert tuple(settings[system][name] for name in names) == best
        assert settings["valid_ppl"][system] == pytest.approx(ppl[best])
        of_row = md.settings_of(system, settings | alone)
        assert tuple(of_row[name] for name in names) == best
    ppl = {(share, decay): md.perplexity(md.add_knn(log_p["lora"], knn["lora"][0, 0], near["lora"],
                                                    share, decay))
           for share, decay in itertools.product(md.SHARES, md.DECAYS)}
    best = min(ppl, key=ppl.get)
    assert settings["valid_ppl"]["both_lora"] == pytest.approx(ppl[best])
    assert tuple(settings["both_lora"].values()) == (None, *best), "no share beside itself"
    alone = md.searching(dataclasses.replace(config, arms="distilled"))
    assert alone == {"both": "hidden"}


# ── Sources ──────────────────────────────────────────────────────────────────────────────────────
def test_every_neighbour_names_its_file_and_line(tmp_path, checkpoint):
    folder = tmp_path / "text"
    (folder / "part").mkdir(parents=True)
    for i in range(40):
        lines = [f"file {i} line {n} says hul ka {i * n}" for n in range(1, 9)]
        (folder / "part" / f"{i:02}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    argv = argv_of(tmp_path / "out", checkpoint, str(folder), arms="text", max_keys=900)
    assert md.main([*argv]) == 0
    lm = ml.MemoryLM.load(tmp_path / "out")
    for at in range(0, len(lm.datastore.values), 97):
        place, (before, behind) = ml.source_of(lm, at)
        name, line = place.rsplit(":", 1)
        whole = before + lm.base.decode([int(lm.datastore.values[at])]) + behind
        text = (folder / name).read_text(encoding="utf-8")
        assert whole.strip() in text
        written = text.splitlines()[int(line) - 1]
        assert before.rpartition("\n")[2] in written


def test_words_of_passages_do_not_run_together_whatever_the_tokenizer_strips(lm):
    """A decoder of Llama 2 takes the space off what it is given; é is of two tokens."""
    from tokenizers import Tokenizer, decoders, models

    words = ["?", *"▁the ▁old ▁bridge ▁over ▁river <0xC3> <0xA9> .".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    base = dataclasses.replace(lm.base, tokenizer=SimpleNamespace(backend_tokenizer=tokenizer))
    values = np.array([1, 2, 3, 4, 1, 5, 6, 7, 8], dtype=np.int32)
    store = ds.Datastore(np.zeros((9, 2), np.float16), values, None, "flat", None)
    old = ml.MemoryLM("", base, None, store, {"tau": 1}, sources=(ds.Source(0, "none.txt", 0),))
    whole = "the old bridge over the riveré."
    for at, word in enumerate("the| old| bridge| over| the| river||é|.".split("|")):
        near = ml.Near(torch.zeros(1), np.array([at]), torch.from_numpy(values[[at]]))
        [shown] = ml.show_neighbours(old, near, 0)
        before, behind = shown.passage
        if at == 6:  # half of a character, which is whole behind it
            assert (before, shown.token, behind) == (whole[:-2], "\ufffd", "é.")
            continue
        assert shown.token == word
        assert before + word + behind == whole and shown.context + word in whole
    reading = ml.Reading(torch.zeros(9), torch.zeros(2), None)
    step = ml.describe(old, reading, torch.zeros(9), token=3, base_token=2, before=[1],
                       text=" bridge", near=near)
    assert step.base_token == " old"


def test_paragraphs_keep_the_line_that_they_begin_with():
    text = "one\ntwo\n\n\nthree\n\nfour\n"
    parts = md.paragraphs_of(md.Document(text, "a.txt"))
    assert [(part.text.strip(), part.line) for part in parts] == [
        ("one\ntwo", 1), ("three", 5), ("four", 7)]


def test_a_line_of_pythons_library_is_the_only_one_that_a_passage_stands_on_or_none(
        tmp_path, monkeypatch):
    lines = ["def one():", '    """Return the key.', "", "    The key is", "    The value is new.",
             '    """', "def two():", "    The value is new."]
    (tmp_path / "a.py").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(ml.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    text = "Return the key.\n\nThe key is\nThe value is new.\n"
    for at in range(len(text)):
        expected = [2, 0, 4, 5, 0][text.count("\n", 0, at)]  # 0: an empty line is everywhere
        assert ml.line_in_library("a.py", text[:at], text[at:]) == expected, text[:at]
    assert ml.line_in_library("a.py", "The val", "ue is new.") == 0, "two such lines"
    assert ml.line_in_library("a.py", "The key", " was") == 0
    assert ml.line_in_library("a.py", "", "Thekeyis") == 4, "spaces that a tokenizer lost"


def test_nothing_outside_pythons_library_is_read():
    assert ml.library_lines("abc.py")[0].startswith("#") and ml.library_lines("no.py") == ()
    assert ml.library_lines("../../../etc/passwd") == ()


# ── The command ──────────────────────────────────────────────────────────────────────────────────
def test_evaluation_has_a_row_a_system_with_settings_from_validation(made):
    evaluation = json.loads((made / "evaluation.json").read_text())
    manifest = ds.read_manifest(made)
    rows = {row["system"]: row for row in evaluation["rows"]}
    assert list(rows) == [name for name in md.NAMES.values() if name in rows]
    assert len(rows) == len(md.NAMES) - 1  # no tail here
    for row in rows.values():
        is_tuned = row["system"] in [name for _, name in md.TUNED.values()]
        assert row["valid_ppl"] <= rows["base"]["valid_ppl"] or is_tuned
        assert 1 < row["test_ppl"] < 1000 and row["ms_per_token"] > 0
    knn, surface = rows["kNN-LM"], np.array(manifest["tuning"]["surface"])
    assert knn["tau"] == manifest["settings"]["tau"]
    assert knn["valid_ppl"] == pytest.approx(surface.min(), rel=1e-6)
    for about in (evaluation["about"], manifest["about"]):
        assert about["versions"]["torch"] and about["device"] and about["command"]
    assert (made / "memory_decoder.png").stat().st_size > 10_000
    assert not [path for path in made.iterdir() if path.suffix in (".part", ".tmp", ".empty")]


def test_an_arm_is_not_scored_under_the_name_of_another(made, config, lm, domain, tmp_path, capsys):
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    config = dataclasses.replace(config, model_dir=str(folder), arms="text")
    decoder, text = folder / md.DECODER_FILE, folder / "decoder_text.pt"
    shutil.copy(folder / "decoder_tokens.pt", decoder)
    assert md.main(["evaluate", *flags(dataclasses.asdict(config))]) == 2
    said = error_line(capsys.readouterr().err)
    assert "memory_decoder.pt" in said and "arm hidden" in said and "--decoder_kind tokens" in said

    payload = torch.load(text, weights_only=True)
    del payload["arm"]  # a file may not say; its kind is seen
    dnc_gpt2.save_tensors(payload, text)
    config = dataclasses.replace(config, decoder_kind="tokens")
    with pytest.raises(ValueError, match="decoder_text.pt.* kind tokens .it is of hidden"):
        md.load_systems(config, lm.base, domain)


def test_arms_of_two_trainings_are_not_compared(made, config, lm, domain, tmp_path):
    """As a training with other settings leaves them that was stopped behind its first arm."""
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    config = dataclasses.replace(config, model_dir=str(folder), arms="text")
    path = folder / "decoder_text.pt"
    payload = torch.load(path, weights_only=True)
    fields = payload["trained_with"]

    def load(**changed) -> md.Systems:
        dnc_gpt2.save_tensors(payload | changed, path)
        return md.load_systems(config, lm.base, domain)[1]

    assert load(trained_with=fields).trained_with["text"]["batch_tokens"] == 128
    with pytest.raises(ValueError, match="decoder_text.pt.*num_epochs 1, .* with 2.*train again"):
        load(trained_with=fields | {"num_epochs": 2})
    with pytest.raises(ValueError, match="decoder_text.pt.*older version.*train again"):
        load(trained_with={})
    with pytest.raises(ValueError, match="decoder_text.pt"):
        load(trained_with="no fields")
    wider = ml.Decoder(**payload["sizes"] | {"width": 64})
    with pytest.raises(ValueError, match="decoder_text.pt.*decoder_dim 16, .* with 64.*again"):
        load(sizes=wider.sizes, model_state_dict=wider.state_dict())
    decoder = torch.load(folder / md.DECODER_FILE, weights_only=True)
    del decoder["trained_with"], payload["trained_with"]  # both as of an older version
    dnc_gpt2.save_tensors(decoder, folder / md.DECODER_FILE)
    with pytest.raises(ValueError, match=f"{md.DECODER_FILE}.*neighbours .* found now.*again"):
        load()
    dnc_gpt2.save_tensors(decoder | {"trained_with": fields | {"distance": "L2"}},
                          folder / md.DECODER_FILE)
    with pytest.raises(ValueError, match=f"{md.DECODER_FILE}.*neighbours .* found now.*again"):
        load()


def test_settings_of_a_base_that_was_trained_on_since_are_refused(made, config, lm, domain):
    config = dataclasses.replace(config, arms="lora")
    manifest, systems = md.load_systems(config, lm.base, domain)
    md.check_tuned(config, manifest, systems, domain)
    del manifest["settings"]["valid_ppl"]["lora"]  # tuned without it; both_lora is of before
    assert "both_lora" in manifest["settings"]
    with pytest.raises(ValueError, match="settings .* memory_decoder.py tune"):
        md.check_tuned(config, manifest, systems, domain)


@pytest.mark.parametrize("command", ["train", "tune", "evaluate"])
def test_an_index_of_keys_as_they_are_is_refused_and_built_again(
        command, made, checkpoint, text_folder, tmp_path, capsys):
    """As versions before 2026-11-29 left it."""
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    manifest = json.loads((folder / ds.MANIFEST).read_text())
    del manifest["scale_sha256"], manifest["sha256"], manifest["settings"]["decay"]
    (folder / ds.MANIFEST).write_text(json.dumps(manifest))
    (folder / ds.SCALE).unlink()
    argv = argv_of(folder, checkpoint, text_folder, arms="")
    assert md.main([command, *argv]) == 2
    line = error_line(capsys.readouterr().err)
    with pytest.raises(ValueError) as caught:
        ml.MemoryLM.load(folder)
    for said in (line, str(caught.value)):
        assert "--stride 16: the keys are kept" in said and ds.INDEX in said
    keys = (folder / ds.KEYS).stat().st_mtime_ns
    assert md.main(["build", *argv]) == 0 and (folder / ds.KEYS).stat().st_mtime_ns == keys
    assert "train and tune again" in capsys.readouterr().out
    assert (folder / ds.SCALE).read_bytes() == (made / ds.SCALE).read_bytes()
    assert md.main([command, *argv]) == {"train": 0, "tune": 0, "evaluate": 2}[command]


def test_evaluation_reports_what_the_arms_were_trained_with(made, config, lm, domain):
    other = dataclasses.replace(config, beta=0.9, train_tokens=77, eval_tokens=55)
    _, systems = md.load_systems(other, lm.base, domain)
    about = md.evaluation_facts(other, lm.base, domain, systems, recall=0.97)
    assert about["config"]["beta"] == config.beta == "auto"
    assert about["config"]["train_tokens"] == config.train_tokens
    assert about["config"]["eval_tokens"] == 55
    chosen = ds.read_manifest(made)["settings"]
    hidden, text = (about["trained_with"][arm] for arm in ("hidden", "text"))
    assert (hidden["tau"], hidden["k"]) == (chosen["tau"], chosen["k"]) and "beta" not in text
    assert about["trained_with"]["lora"]["lora_rank"] == 3


def test_settings_are_of_the_validation_text_that_they_were_tuned_on(
        made, config, lm, domain, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    config = dataclasses.replace(config, model_dir=str(folder), arms="")
    manifest, systems = md.load_systems(config, lm.base, domain)
    md.check_tuned(config, manifest, systems, domain)
    behind = domain.valid.clone()
    behind[201] += 1  # what is not read may be another
    md.check_tuned(config, manifest, systems, domain._replace(valid=behind))
    other = domain._replace(valid=domain.valid.flip(0))
    with pytest.raises(ValueError, match="settings .* validation text .* memory_decoder.py tune"):
        md.check_tuned(config, manifest, systems, other)

    md.tune_knn(config, lm.base, domain, systems.store, manifest)
    assert "chosen" not in capsys.readouterr().out, "of the same text, is not tuned again"
    md.tune_knn(config, lm.base, other, systems.store, manifest)
    assert "chosen" in capsys.readouterr().out
    older = ds.read_manifest(made)
    del older["settings"]["valid_sha256"]
    md.check_tuned(config, older, systems, other)


def test_the_page_searches_as_was_tuned(made, tmp_path, monkeypatch):
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    manifest = ds.read_manifest(made)
    opened = []
    read_index = ds.read_index
    monkeypatch.setattr(ds, "read_index", lambda path, kind, nprobe: (
        opened.append(nprobe) or read_index(path, kind, nprobe)))

    def rerank(**settings) -> int:
        dnc_gpt2.write_json(manifest | {"settings": settings}, folder / ds.MANIFEST)
        return ml.MemoryLM.load(folder).datastore.rerank

    tuned = manifest["settings"]
    assert (tuned.pop("nprobe"), tuned.pop("rerank")) == (TINY["nprobe"], TINY["rerank"])
    assert ml.MemoryLM.load(made).datastore.most == tuned["knn_k"] == TINY["knn_k"]
    opened.clear()
    assert rerank(**tuned, nprobe=5, rerank=7) == 7
    assert rerank(**tuned) == ds.RERANK  # of an older version
    assert opened == [5, ds.NPROBE]
    with pytest.raises(ValueError, match="manifest.json.* tune again"):
        rerank(**tuned, nprobe="many")


def test_test_is_scored_as_was_tuned(made, config, tmp_path, capsys):
    """Whatever search and windows the command of evaluate names; another alpha is refused."""
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    fields = dataclasses.asdict(config) | {"model_dir": folder, "latency_tokens": 0}
    others = {"nprobe": 1, "rerank": 1, "stride": 7, "knn_k": 9, "tune_tokens": 99}
    assert md.main(["evaluate", *flags(fields | others)]) == 0
    out = capsys.readouterr().out
    chosen = ds.read_manifest(made)["settings"]
    for name in ("nprobe", "rerank", "stride", "knn_k"):
        assert f"evaluate: {name} {chosen[name]}, as tuned (not {others[name]};" in out
    new, old = (json.loads((path / "evaluation.json").read_text()) for path in (folder, made))
    for row, other in zip(new["rows"], old["rows"], strict=True):
        assert row["test_ppl"] == other["test_ppl"]
    said = new["about"]["config"]
    assert (said["nprobe"], said["tune_tokens"]) == (chosen["nprobe"], chosen["valid_tokens"])
    assert md.main(["evaluate", *flags(fields | {"alpha": 0.123})]) == 2
    assert "alpha = 0.123" in error_line(capsys.readouterr().err)


def test_fewer_neighbours_are_the_nearest_of_the_candidates_of_more():
    keys = clustered(20_000, 32)
    store = store_of(keys, "ivfpq")._replace(most=128, rerank=1)
    queries = clustered(50, 32, seed=1).astype(np.float32)
    for k in (1, 8, 32):
        fewer = store.search(queries, k)
        for few, many in zip(fewer, store.search(queries, 128), strict=True):
            assert (few == many[:, :k]).all()
    assert (store._replace(most=0).search(queries, 8)[1] != fewer[1][:, :8]).any()


def test_another_domain_than_the_one_built_is_refused(config, tmp_path, capsys):
    other = write_corpus(tmp_path / "other", 300, 60, 60)
    assert md.main(["train", *flags(dataclasses.asdict(config) | {"domain": other})]) == 2
    assert "domain" in error_line(capsys.readouterr().err)


def test_command_prints_its_table_before_it_draws(tmp_path, save_dir, capsys):
    domain = write_corpus(tmp_path / "5$ and $6", 900, 200, 200)  # would be a formula in a title
    argv = argv_of(tmp_path, "auto", domain, save_dir=save_dir, arms="", max_keys=600,
                   decoder_kind="tokens", mixing="logits", alpha=0.25)
    assert md.main(argv) == 0
    out = capsys.readouterr().out
    assert out.index("chosen: lambda") < out.index("What does memory add?") < out.index(".png")
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    alphas = [row["alpha"] for row in rows if row["system"] == "memory decoder (tokens)"]
    assert alphas == [0.25]


# ── What a conclusion hangs on: splits, signs, settings ──────────────────────────────────────────
CHOSEN = {"alphas": {"hidden": 0.2, "text": 0.6}, "alpha": 0.2, "lambda": 0.1, "decay": 0.0,
          "tau": 2.0, "k": 5, "both": {"alpha": 0.4, "lambda": 0.3, "decay": 2.0},
          "both_text": {"alpha": 0.8, "lambda": 0.5, "decay": 1.0},
          "both_lora": {"alpha": None, "lambda": 0.7, "decay": 0.5}}


def test_test_is_scored_once_each_system_with_the_settings_chosen_for_it(monkeypatch):
    """Mixtures of probabilities, in plain arithmetic."""
    config = md.Config(decoder_kind="hidden", arms="text,lora", eval_tokens=7)
    valid, test = torch.arange(9), torch.arange(9) + 100
    domain = md.Domain("", valid, valid, test, fingerprint="", sources=[])
    draw, seen = np.random.default_rng(0), []
    base, knn, near = draw.random(7), draw.random(7), 4 * draw.random(7)
    memory = dict(hidden=draw.random(7), text=draw.random(7))
    lora, knn_of_lora, near_of_lora = draw.random(7), draw.random(7), 4 * draw.random(7)

    def score(config, model, stream, limit, systems, grid, label):
        seen.append((stream, limit, grid.taus, grid.ks))
        mixed = {arm: np.log([(1 - alpha) * base + alpha * p for alpha in grid.alphas])
                 for arm, p in memory.items()}
        return md.Scores({"base": np.log(base), "lora": np.log(lora)}, mixed,
                         {"base": knn[None, None], "lora": knn_of_lora[None, None]},
                         {"base": near, "lora": near_of_lora})

    monkeypatch.setattr(md, "score", score)
    found = md.score_test(config, None, domain, md.Systems(), CHOSEN)
    assert seen == [(test, 7, [2.0], [5])] and seen[0][0] is test
    share = 0.7 * np.exp(-0.5 * near_of_lora)
    wanted = {"base": base, "knn": 0.9 * base + 0.1 * knn, "lora": lora,
              "both_lora": (1 - share) * lora + share * knn_of_lora}
    for arm, alpha in CHOSEN["alphas"].items():
        wanted[arm] = (1 - alpha) * base + alpha * memory[arm]
    for system, arm in (("both", "hidden"), ("both_text", "text")):
        alpha, share, decay = CHOSEN[system].values()
        share = share * np.exp(-decay * near)
        wanted[system] = (1 - share) * ((1 - alpha) * base + alpha * memory[arm]) + share * knn
    assert found.keys() == wanted.keys()
    for system, p in wanted.items():
        np.testing.assert_allclose(np.exp(found[system]), p, err_msg=system)


@pytest.mark.parametrize("decay", [0.0, 0.5, 6.0])
@pytest.mark.parametrize("lambda_", [0.0, 0.25, 0.95])
def test_a_mixture_with_neighbours_is_one_of_probabilities_by_their_distance(lambda_, decay):
    p, knn, near = np.array([0.5, 1e-9, 0.2]), np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.3, 4.0])
    mixed = md.add_knn(np.log(p), knn, near, lambda_, decay)
    share = lambda_ * np.exp(-decay * near)
    np.testing.assert_allclose(np.exp(mixed), (1 - share) * p + share * knn)
    assert np.isfinite(md.add_knn(np.float32([-110]), np.zeros(1), near[:1], lambda_, decay))
    nowhere = ds.knn_share(np.array([np.inf]), lambda_, decay)
    assert nowhere == 0, "where no neighbour is found the base says all"


def test_the_page_gives_neighbours_the_share_that_was_tuned_for_its_mode(lm, domain):
    """As the table does, from the same reading."""
    ids = domain.test[:20].tolist()
    for mode in ("knn", "both"):
        reading = ml.Conversation(lm, mode).feed(ids)
        alpha, lambda_ = lm.tuned(mode)
        mixed, near = ml.distribution(lm, mode, alpha, lambda_, lm.decay(mode), reading)
        log_p = reading.log_base
        if mode == "both":
            log_p = ml.mix(log_p, reading.log_decoder, alpha)
        p_knn = np.zeros(lm.base.vocab)
        votes_of = ds.knn_weights(near.distances, lm.settings["tau"]).numpy()
        np.add.at(p_knn, near.values.numpy(), votes_of)
        nearest = np.full(lm.base.vocab, float(near.distances[0]))
        decay = {"knn": 1.5, "both": 0.7}[mode]
        expected = md.add_knn(log_p.numpy(), p_knn, nearest, lambda_, decay)
        np.testing.assert_allclose(mixed.numpy(), expected, atol=1e-4)
        other = ml.distribution(lm, mode, alpha, lambda_, 0.0, reading)[0]
        assert (other - mixed).abs().max() > 1e-3


def test_search_says_what_it_finds_and_what_to_raise(config, lm, domain, monkeypatch, capsys):
    assert md.measure_recall(config, lm.base, domain, lm.datastore) == 1
    assert capsys.readouterr().out == f"search (flat): finds 100.0% of the {config.knn_k} nearest "\
        "keys\n"
    asked = []
    monkeypatch.setattr(ds.Datastore, "recall",
                        lambda self, queries, k: asked.append(queries) or 0.8)
    for kind, says in (("flat", "keys; build with --index flat"), ("ivfpq", "raise --nprobe or")):
        md.measure_recall(config, lm.base, domain, lm.datastore._replace(kind=kind))
        assert says in capsys.readouterr().out
    assert 0 < len(asked[0]) <= 256


def test_a_change_has_an_interval_that_holds_and_knows_a_difference():
    """Two systems that differ by chance alone, in stretches that are alike inside, are told apart
    as rarely as 95 % promises, and a true difference of 5 % is found; in plain arithmetic once."""
    draw = np.random.default_rng(0)
    told, found = 0, 0
    for _ in range(400):
        base = draw.normal(-3, 1, 1600)
        apart = np.repeat(draw.normal(0, 0.05, 16), 100) + draw.normal(0, 0.2, 1600)
        log_p = {"base": base, "same": base + apart, "better": base + apart + 0.15}
        same = md.change_of(log_p, "same", "base")
        told += not same.low <= 0 <= same.high
        found += md.change_of(log_p, "better", "base").high < 0
    assert told <= 32 and found >= 380  # 20 expected, with two standard deviations and a half

    change = md.change_of({"a": np.log([0.5] * 8), "b": np.log([0.4] * 8)}, "a", "b")
    assert change.ratio == change.low == change.high == pytest.approx(0.4 / 0.5 - 1)
    pairs = {(change.system, change.against) for change in md.changes_of(
        md.Config(decoder_kind="tail", arms="text,lora"),
        dict.fromkeys(("base", "knn", "tail", "text", "lora", "both", "both_text", "both_lora"),
                      np.log(draw.random(16))))}
    assert {("tail", "text"), ("lora", "knn"), ("both_lora", "lora"), ("both", "tail")} <= pairs


def test_repeated_tokens_are_those_of_passages_that_the_stored_text_has():
    draw = np.random.default_rng(0)
    stored, tokens = draw.integers(0, 9, 400), draw.integers(0, 9, 300)
    tokens[50:60] = stored[100:110]  # 10 in a row
    tokens[80:87] = stored[200:207]  # 7
    tokens[292:] = stored[:8]  # at both ends
    expected = np.zeros(300, dtype=bool)
    passages = {tuple(stored[i : i + md.PASSAGE]) for i in range(400 - md.PASSAGE + 1)}
    for i in range(300 - md.PASSAGE + 1):
        if tuple(tokens[i : i + md.PASSAGE]) in passages:
            expected[i : i + md.PASSAGE] = True
    assert expected[50:60].all() and expected[292:].all() and not expected[80:87].all()
    assert (md.repeated_tokens(tokens, stored) == expected).all()
    assert not md.repeated_tokens(tokens[:5], stored).any()  # shorter than a passage


def test_an_arm_says_all_that_its_training_depends_on():
    config = md.Config(decoder_kind="hidden", arms="text,distilled,finetuned,lora", seed=3)
    common = {"seed", "num_epochs", "train_tokens", "batch_tokens"}
    beside = {"decoder_lr", "decoder_reach"}
    wanted = {
        "hidden": common | beside | {"beta", "target_width", "tau", "k", "distance"},
        "text": common | beside,
        "distilled": common | beside | {"beta"},
        "finetuned": common | {"finetune_lrs"},
        "lora": common | {"lora_lrs", "lora_rank"},
    }
    for arm, names in wanted.items():
        chosen = {"tau": 1.5, "k": 4, "lambda": 0.5, "decay": 2.0}
        fields = md.training_of(dataclasses.replace(config, beta=0.5), arm, chosen)
        assert fields.keys() == names and fields["seed"] == 3, arm
        shared = {"lambda", "decay"} if "beta" in names else set()  # which auto takes them from
        assert md.training_of(config, arm, chosen).keys() == names | shared, arm


def system_row(name: str, ppl: float) -> dict:
    return {"system": name, "alpha": None, "lambda": None, "decay": None, "tau": None, "k": None,
            "valid_ppl": ppl, "test_ppl": ppl, "new_ppl": ppl, "ms_per_token": None}


def test_table_says_the_change_from_the_base_and_the_share_of_the_gain(capsys):
    rows = {name: system_row(md.NAMES[name], ppl)
            for name, ppl in (("base", 20.0), ("knn", 16.0), ("hidden", 17.0))}
    about = {"domain": "d", "base": "b", "keys": 1, "index": "flat", "recall": 1.0,
             "test_tokens": 9, "new_tokens": 3}
    md.print_table(rows, about)
    out = capsys.readouterr().out
    changes = {line[2:26].strip(): line.split()[-3] for line in out.splitlines()
               if line.endswith("—")}
    assert changes == {"base": "+0.0%", "kNN-LM": "-20.0%", "memory decoder (hidden)": "-15.0%"}
    assert "memory decoder (hidden): 75% of the gain of kNN-LM\n" in out


def test_temperatures_are_parts_of_the_mean_distance_of_another_key():
    import faiss

    import datastore as ds

    keys = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float16)
    index, measured = faiss.IndexFlatL2(4), ds.Scale.of(keys)
    index.add(measured.unit(keys))
    store = ds.Datastore(keys, np.zeros(40, dtype=np.int32), index, "flat", measured)
    unit = measured.unit(keys).astype(float)
    apart = ((unit[:, None] - unit[None]) ** 2).sum(-1)
    np.fill_diagonal(apart, np.inf)
    scale = np.sort(apart, axis=1)[:, :4].mean()
    grid = md.knn_grid(store, 4)
    assert grid.taus == pytest.approx([part * scale for part in md.TAUS], rel=0.01)
    assert grid.ks == [1, 4]
