"""Tests of memory_decoder.py: search and the kNN distribution against NumPy in float64, the build
killed, resumed and sharded, keys against a recomputation without hooks, scoring against a naive
loop, generation with caches against none, users at once, chat prompts, bad input, and the command.

D width of a key, V vocabulary, n stored keys, Q queries, k neighbours, M entries of a target.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, flags, write_corpus

import dnc_gpt2
import memory_decoder as md

faiss = pytest.importorskip("faiss")

TINY = {"window": 32, "stride": 16, "batch_windows": 2, "index": "flat", "knn_k": 8, "rerank": 2,
        "decoder_dim": 16, "decoder_layers": 2, "decoder_heads": 4, "decoder_reach": 12,
        "num_epochs": 1, "batch_tokens": 128, "target_width": 8, "finetune_lrs": "1e-3",
        "latency_tokens": 3, "latency_rounds": 1, "tune_tokens": 200,
        "eval_tokens": 200}  # fmt: skip
BASE = {"arms": "baseline", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "batch_size": 4,
        "seq_len": 32, "max_steps": 60, "lr": 1e-2, "save_every_steps": 100, "eval_rows": 2,
        "eval_tokens": 200, "final_eval_tokens": 200, "num_gpus": 0}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("domain") / "text", 900, 200, 200))


@pytest.fixture(scope="module")
def save_dir(tmp_path_factory, text_folder, tokenizer_folder) -> str:
    """A folder with one tiny trained GPT-2."""
    folder = tmp_path_factory.mktemp("base")
    argv = flags(BASE | {"dataset": text_folder, "tokenizer": tokenizer_folder, "save_dir":
                         str(folder), "plot_dir": str(folder / "plots")})
    assert dnc_gpt2.main(argv) == 0
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(save_dir) -> str:
    return str(next(Path(save_dir).glob("GPT2_Baseline_FINAL_*.pt")))


def argv_of(folder, checkpoint: str, text_folder: str, **fields) -> list[str]:
    return flags({**TINY, "base": checkpoint, "domain": text_folder, "model_dir": str(folder),
                  "plot_dir": str(folder), **fields})


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoint, text_folder) -> Path:
    """A folder with everything built, trained, tuned and evaluated. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    assert md.main(argv_of(folder, checkpoint, text_folder)) == 0
    return folder


@pytest.fixture(scope="module")
def config(made, checkpoint, text_folder) -> md.Config:
    return md.Config(**{**TINY, "base": checkpoint, "domain": text_folder, "model_dir": str(made),
                        "plot_dir": str(made)})


@pytest.fixture(scope="module")
def lm(config) -> md.MemoryLM:
    """The model, its alpha and lambda well inside (0, 1) whatever was tuned."""
    loaded = md.MemoryLM.load(config)
    settings = loaded.settings | {"lambda": 0.3, "both": {"alpha": 0.4, "lambda": 0.3}}
    return dataclasses.replace(loaded, settings=settings)


@pytest.fixture(scope="module")
def domain(config, lm) -> md.Domain:
    return md.load_domain(config, lm.base)


def clustered(n: int, width: int, seed: int = 0) -> np.ndarray:
    """float16 keys around some centres, so that neighbours mean something."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((40, width))
    found = centres[draw.integers(0, 40, n)] + 0.5 * draw.standard_normal((n, width))
    return found.astype(np.float16)


def store_of(keys: np.ndarray, kind: str, values=None) -> md.Datastore:
    index = md.new_index(kind, keys.shape[1], len(keys), keys.astype(np.float32))
    md.add_keys(index, keys, 0, len(keys))
    if kind == "ivfpq":
        index.nprobe = 16
    values = np.arange(len(keys), dtype=np.int32) % 11 if values is None else values
    return md.Datastore(keys, values, index, kind, 4)


def brute_force(keys: np.ndarray, queries: np.ndarray, k: int, exclude=None):
    """Distances (Q, k) and ids (Q, k) in float64, ties to the lowest id."""
    d = ((queries[:, None].astype(np.float64) - keys[None].astype(np.float64)) ** 2).sum(-1)
    if exclude is not None:
        d[np.arange(len(queries)), exclude] = np.inf
    ids = np.argsort(d, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(d, ids, 1), ids


# ── Search and the kNN distribution ───────────────────────────────────────────────────────────────
@pytest.mark.parametrize("tau", [0.3, 5.0, 200.0])
def test_knn_probabilities_equal_brute_force_in_float64(tau):
    keys = clustered(1500, 24)
    queries = np.random.default_rng(1).standard_normal((37, 24)).astype(np.float32)
    store = store_of(keys, "flat")
    distances, ids = store.search(queries, 13)
    true_distances, true_ids = brute_force(keys, queries, 13)
    assert (ids == true_ids).all()
    assert distances.dtype == np.float32
    np.testing.assert_allclose(distances, true_distances, rtol=1e-5)
    expected = np.zeros((37, 11))
    weights = np.exp(-(true_distances - true_distances[:, :1]) / tau)
    weights /= weights.sum(1, keepdims=True)
    for q in range(37):
        for i, w in zip(true_ids[q], weights[q], strict=True):
            expected[q, store.values[i]] += w
    found = md.knn_probabilities(torch.from_numpy(distances), torch.from_numpy(store.values[ids]),
                                 tau, 11)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(found.sum(1).numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("kind, least", [("flat", 1.0), ("ivfpq", 0.95), ("hnsw", 0.95)])
def test_recall_of_each_index_against_brute_force(kind, least):
    keys = clustered(4000, 32)
    queries = clustered(64, 32, seed=3).astype(np.float32)
    _, ids = store_of(keys, kind).search(queries, 10)
    _, true = brute_force(keys, queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, true, strict=True)])
    assert recall >= least


@pytest.mark.parametrize("kind", ["flat", "ivfpq", "hnsw"])
def test_own_position_is_excluded_and_a_planted_duplicate_is_not(kind):
    keys = clustered(2000, 32)
    keys[1234] = keys[77]  # the same text twice
    own = np.array([77, 1234, 5])
    distances, ids = store_of(keys, kind).search(keys[own], 6, exclude=own)
    assert not (ids == own[:, None]).any()
    assert (ids[0, 0], ids[1, 0]) == (1234, 77)
    assert distances[0, 0] == distances[1, 0] == 0
    distances, ids = store_of(keys, kind).search(keys[own], 6)
    assert ids[0, 0] == ids[1, 0] == 77  # a tie goes to the lowest id
    assert ids[2, 0] == 5 and distances[2, 0] == 0


def test_neighbours_are_sorted_whatever_order_the_index_gives_and_missing_ones_weigh_nothing():
    keys = clustered(50, 8)

    class Shuffled:
        def search(self, queries, wanted):
            ids = np.tile(np.random.default_rng(0).permutation(50)[: wanted - 4], (len(queries), 1))
            return None, np.concatenate([ids, np.full((len(queries), 4), -1)], axis=1)

    store = md.Datastore(keys, np.zeros(50, np.int32), Shuffled(), "flat")
    distances, ids = store.search(keys[:3].astype(np.float32), 50)
    assert (np.diff(distances[:, :46]) >= 0).all()
    assert (ids[:, 46:] == -1).all() and np.isinf(distances[:, 46:]).all()
    weights = md.knn_weights(torch.from_numpy(distances), 1.0)
    assert (weights[:, 46:] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_a_query_without_any_neighbour_has_no_votes_and_no_nan():
    assert md.knn_weights(torch.full((2, 3), math.inf), 1.0).eq(0).all()


@pytest.mark.parametrize("width", [3, 8, 40])
def test_sparse_kl_equals_dense_kl_in_float64(width):
    draw = torch.Generator().manual_seed(0)
    distances = torch.rand(20, 30, generator=draw).sort(1).values * 5
    values = torch.randint(0, 8, (20, 30), generator=draw)
    log_q = torch.randn(20, 12, generator=draw).log_softmax(-1)
    tokens, p = md.sparse_targets(distances, values, 1.0, width)
    dense = np.zeros((20, 12))
    weights = np.exp(-distances.double().numpy())
    weights /= weights.sum(1, keepdims=True)
    for q in range(20):
        np.add.at(dense[q], values[q].numpy(), weights[q])
    if width < 8:  # the heaviest, renormalised
        floor = np.sort(dense, axis=1)[:, -width]
        dense[dense < floor[:, None]] = 0
        dense /= dense.sum(1, keepdims=True)
    log_p = np.log(np.where(dense > 0, dense, 1))
    expected = (dense * (log_p - log_q.double().numpy())).sum(1)
    np.testing.assert_allclose(md.sparse_kl(tokens, p, log_q).numpy(), expected, atol=1e-5)


# ── Mixing ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mixing", ["probability", "logits"])
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.3, 0.999, 1.0])
def test_mixture_sums_to_one_and_its_ends_are_exact(alpha, mixing):
    a, b = torch.randn(2, 5, 300).mul(4).log_softmax(-1)
    mixed = md.mix(a, b, alpha, mixing)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(5), atol=1e-5, rtol=0)
    if alpha in (0.0, 1.0):
        assert torch.equal(mixed, (a, b)[int(alpha)])
    elif mixing == "probability":
        expected = (1 - alpha) * a.double().exp() + alpha * b.double().exp()
        torch.testing.assert_close(mixed.double().exp(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ["base", "knn", "decoder", "both"])
def test_the_distribution_of_every_mode_sums_to_one(lm, domain, mode):
    reading = md.Conversation(lm, mode).feed(domain.test[:20].tolist())
    log_p, _ = md.distribution(lm, mode, 0.4, reading)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mode", ["knn", "decoder"])
def test_alpha_0_is_the_base_bit_for_bit_and_alpha_1_the_memory(lm, domain, mode):
    ids = domain.test[:20].tolist()
    reading = md.Conversation(lm, mode).feed(ids)
    alone = md.Conversation(lm, "base").feed(ids).log_base
    assert torch.equal(md.distribution(lm, mode, 0.0, reading)[0], alone)
    log_p = md.distribution(lm, mode, 1.0, reading)[0]
    if mode == "decoder":
        assert torch.equal(log_p, reading.log_decoder)
    else:
        distances, _, values = md.nearest(lm, reading.query)
        p = md.knn_probabilities(distances[None], values[None], lm.settings["tau"], len(log_p))
        assert torch.equal(log_p, p[0].log())


# ── Reading, keys, scoring ────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("positions, window, stride", [(1, 8, 4), (8, 8, 4), (9, 8, 4), (63, 8, 3),
                                                       (100, 16, 16), (101, 16, 1)])
def test_windows_use_every_position_once_with_context_and_no_padding(positions, window, stride):
    groups = md.plan_windows(positions, window, stride, 3)
    found = [w for group in groups for w in group]
    assert [p for w in found for p in range(w.first, w.end)] == list(range(positions))
    assert all(w.end - w.start == min(window, positions) and w.start >= 0 for w in found)
    assert all(w.first - w.start >= window - stride for w in found[1:])


def test_stored_keys_equal_a_recomputation_without_hooks(lm, domain, made):
    keys = np.load(made / md.KEYS, allow_pickle=False)
    values = np.load(made / md.VALUES, allow_pickle=False)
    assert (keys.dtype, values.dtype) == (np.float16, np.int32)
    assert (values == domain.train[1:].numpy()).all()
    gpt2 = lm.base.model.transformer
    for w in (md.plan_windows(len(values), 32, 16, 1)[i][0] for i in (0, 5, -1)):
        tokens = domain.train[None, w.start : w.end]
        h = gpt2(tokens, output_hidden_states=True).hidden_states[-2]  # what the last block reads
        block = gpt2.h[-1]
        key = block.ln_2(h + block.attn(block.ln_1(h))[0])[0, w.first - w.start :]
        np.testing.assert_allclose(keys[w.first : w.end], key.numpy(), atol=4e-3, rtol=1e-3)


def small_model(kind: str, vocab: int):
    import transformers
    sizes = dict(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=24,
                 head_dim=8)
    made = {"llama": ("LlamaConfig", "LlamaForCausalLM"),
            "gemma2": ("Gemma2Config", "Gemma2ForCausalLM")}[kind]
    torch.manual_seed(0)
    return getattr(transformers, made[1])(getattr(transformers, made[0])(**sizes))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_folder_of_another_architecture_gives_keys_after_the_norm_and_no_prefix_is_scored(
        kind, tmp_path, tokenizer_folder, text_folder):
    from tokenizers import processors
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.save_pretrained(tmp_path)
    model = small_model(kind, len(tokenizer))
    model.save_pretrained(tmp_path)
    config = md.Config(**{**TINY, "base": str(tmp_path), "domain": text_folder})
    base = md.load_base(config, str(tmp_path))
    assert (base.prefix, base.window) == ((tokenizer.bos_token_id,), 23)
    assert base.end_ids() >= {tokenizer.eos_token_id}
    norm = base.model.model.layers[-1]
    norm = norm.pre_feedforward_layernorm if kind == "gemma2" else norm.post_attention_layernorm
    seen = []
    norm.register_forward_hook(lambda module, args, out: seen.append(out))
    stream = md.load_domain(config, base).train
    ids, logits, keys = md.read_group(base, stream, [md.Window(0, 0, 10), md.Window(5, 10, 15)])
    assert torch.equal(keys, seen[0][:, 1:].float()) and keys.shape == (2, 10, 16)
    assert torch.equal(ids[1], stream[5:15]) and logits.shape == (2, 10, len(tokenizer))


def test_score_equals_a_naive_loop_over_positions(config, lm, domain):
    stream, found = domain.valid[:90], {}
    scores = md.score(config, lm.base, stream, 0, {"hidden": lm.decoder}, store=lm.datastore,
                      taus=[2.0], ks=[5], alphas=[0.3])
    for [w] in md.plan_windows(89, 32, 16, 1):
        logits, keys = lm.base.forward(stream[None, w.start : w.end])
        log_q = lm.decoder(keys, None)[0].double().log_softmax(-1)
        for i in range(w.first, w.end):
            p = logits[0, i - w.start].double().softmax(-1)[stream[i + 1]]
            q = log_q[i - w.start, stream[i + 1]].exp()
            d, ids = brute_force(lm.datastore.keys, keys[0, i - w.start][None].numpy(), 5)
            weights = np.exp(-d[0] / 2) / np.exp(-d[0] / 2).sum()
            knn = weights[lm.datastore.values[ids[0]] == int(stream[i + 1])].sum()
            found[i] = math.log(p), math.log(0.7 * p + 0.3 * q), knn
    expected = np.array([found[i] for i in range(89)])
    np.testing.assert_allclose(scores.log_p["base"], expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(scores.mixed["hidden"][0], expected[:, 1], atol=1e-4)
    np.testing.assert_allclose(scores.knn[0, 0], expected[:, 2], atol=1e-4)


def test_logit_mixing_is_scored_with_whole_distributions(config, lm, domain):
    config, stream = dataclasses.replace(config, mixing="logits"), domain.valid[:31]
    scores = md.score(config, lm.base, stream, 0, {"hidden": lm.decoder}, alphas=[0.0, 0.4])
    logits, keys = lm.base.forward(stream[None, :-1])
    both = (0.6 * logits + 0.4 * lm.decoder(keys, None)).log_softmax(-1)[0]
    expected = both.gather(1, stream[1:, None])[:, 0]
    np.testing.assert_allclose(scores.mixed["hidden"][1], expected.numpy(), atol=1e-4)
    assert (scores.mixed["hidden"][0] == scores.log_p["base"]).all()


# ── Building ──────────────────────────────────────────────────────────────────────────────────────
class Killed(BaseException):
    """What no handler catches."""


def kill_at(monkeypatch, group: int) -> None:
    """The build dies in its group of that number."""
    real, calls = md.read_group, []

    def read(*args):
        calls.append(0)
        if len(calls) == group:
            raise Killed
        return real(*args)

    monkeypatch.setattr(md, "read_group", read)


SIGKILL_AT_THE_SEVENTH = """
import os, signal, sys
import memory_decoder as md
real, calls = md.read_group, []
def read(*args):
    calls.append(0)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
md.read_group = read
sys.exit(md.main(sys.argv[1:]))
"""


def test_a_killed_build_resumes_with_the_same_bytes(
        made, checkpoint, text_folder, tmp_path, monkeypatch, capsys):
    argv = ["build", *argv_of(tmp_path, checkpoint, text_folder)]
    done = subprocess.run([sys.executable, "-c", SIGKILL_AT_THE_SEVENTH, *argv], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / md.MANIFEST).exists() and not (tmp_path / md.KEYS).exists()
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            md.main(argv)
    assert not (tmp_path / md.MANIFEST).exists() and not (tmp_path / md.KEYS).exists()
    # What was written after the last flush is not trusted.
    part = np.load(tmp_path / f"{md.KEYS}.part", mmap_mode="r+")
    part[-50:] = 7
    part.flush()
    capsys.readouterr()
    calls = []
    real = md.read_group
    monkeypatch.setattr(md, "read_group", lambda *args: calls.append(0) or real(*args))
    assert md.main(argv) == 0
    assert "resumed at position" in capsys.readouterr().out
    keys = len(np.load(made / md.VALUES))
    assert len(calls) == len(md.plan_windows(keys, 32, 16, 2)) - 10
    for name in (md.KEYS, md.VALUES, md.INDEX):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [".lock", md.KEYS, md.VALUES, md.INDEX, md.MANIFEST])
    assert md.main(argv) == 0  # a second time: there is nothing to do
    assert "holds these" in capsys.readouterr().out


def test_a_build_of_another_text_does_not_resume_but_starts_anew(
        made, checkpoint, text_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            md.main(["build", *argv_of(tmp_path, checkpoint, text_folder, max_keys=700)])
    assert md.main(["build", *argv_of(tmp_path, checkpoint, text_folder)]) == 0
    assert (tmp_path / md.KEYS).read_bytes() == (made / md.KEYS).read_bytes()


@pytest.mark.parametrize("kind", ["ivfpq"])
def test_shards_built_by_two_processes_and_merged_equal_one_build(
        made, checkpoint, text_folder, tmp_path, kind):
    argv = argv_of(tmp_path, checkpoint, text_folder, index=kind)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "memory_decoder.py"), "build", *argv], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in (md.KEYS, md.VALUES, *([md.INDEX] if kind == "flat" else [])):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
    if kind == "ivfpq":
        keys = np.load(tmp_path / md.KEYS)
        whole, merged = store_of(keys, "ivfpq"), faiss.read_index(str(tmp_path / md.INDEX))
        assert merged.ntotal == len(keys)
        whole.index.nprobe = merged.nprobe = 4
        found = [md.Datastore(keys, keys[:, 0], index, "ivfpq", 2).search(keys[::40], 5)[1]
                 for index in (whole.index, merged)]
        assert np.mean(found[0] == found[1]) > 0.97
    assert not [p for p in tmp_path.iterdir() if "of2" in p.name]


def test_two_writers_in_one_folder_are_refused_and_a_dead_one_is_not_waited_for(
        checkpoint, text_folder, tmp_path, capsys):
    argv = ["build", *argv_of(tmp_path, checkpoint, text_folder)]
    with md.folder_lock(tmp_path):
        assert md.main(argv) == 2
    assert f"process {os.getpid()} is writing there" in error_line(capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    (tmp_path / ".lock").write_text("999999999")  # of a process that was killed
    assert md.main(argv) == 0


def test_auto_names_the_newest_base_and_says_which_index_it_chose(
        made, save_dir, text_folder, tmp_path, capsys):
    fields = {"base": "auto", "save_dir": save_dir, "index": "auto", "max_keys": 500}
    assert md.main(["build", *argv_of(tmp_path, "", text_folder, **fields)]) == 0
    out = capsys.readouterr().out
    assert "index auto: flat for 500 keys" in out and "GPT2_Baseline_FINAL" in out
    assert md.choose_index(md.Config(), 10**6) == "ivfpq"


# ── Generation ────────────────────────────────────────────────────────────────────────────────────
def naive_log_p(lm: md.MemoryLM, mode: str, ids: list[int], alpha: float) -> torch.Tensor:
    """The distribution after ids, everything computed anew, without caches."""
    logits, keys = lm.base.forward(torch.tensor([ids]))
    log_q = lm.decoder(keys, torch.tensor([ids]))[0, -1].log_softmax(-1)
    reading = md.Reading(logits[0, -1].log_softmax(-1), keys[0, -1], log_q)
    return md.distribution(lm, mode, alpha, reading)[0]


@pytest.mark.parametrize("mode", ["base", "knn", "decoder", "both"])
def test_generation_with_caches_equals_greedy_without_also_beyond_the_window(lm, domain, mode):
    ids = domain.test[:25].tolist()
    close = 1e-4 if mode in ("base", "knn") else 1e-3  # the decoder's head in half precision
    steps = list(md.generate(lm, ids, md.Sampling(mode, 0.6, 0.0, 0, 30)))
    assert len(steps) == 30
    seen = list(ids)
    for step in steps:
        log_p = naive_log_p(lm, mode, seen, 0.6)
        assert step.token == int(log_p.argmax())
        assert step.probability == pytest.approx(float(log_p.max().exp()), abs=close)
        seen.append(step.token)
        if len(seen) > lm.window:
            seen = seen[-(lm.window // 2) :]  # the older half is dropped
    assert "".join(step.text for step in steps) == lm.base.decode([s.token for s in steps])


def test_steps_tell_what_memory_changed_and_where_it_comes_from(lm, domain):
    ids = domain.test[:25].tolist()
    plain = [s.token for s in md.generate(lm, ids, md.Sampling("base", 0.5, 0.0, 0, 1))]
    for mode in ("knn", "both", "decoder"):
        for step in md.generate(lm, ids, md.Sampling(mode, 1.0, 1.0, 0, 12, seed=3)):
            assert step.changed or step.base_token == lm.base.decode([step.token])
            assert bool(step.neighbours) == (mode != "decoder" or step.changed)
            said = lm.base.decode([step.token])
            order = [(n.token != said, -n.weight) for n in step.neighbours]
            assert len(order) <= 5 and order == sorted(order)  # those that voted for it first
    step = next(md.generate(lm, ids, md.Sampling("knn", 1.0, 0.0, 0, 1)))
    assert step.changed == (step.token != plain[0])
    reading = md.Conversation(lm, "base").feed(ids)
    _, true = brute_force(lm.datastore.keys, reading.query[None].numpy(), 1)
    at = int(true[0, 0])
    nearest = max(step.neighbours, key=lambda n: -n.distance)
    assert nearest.token == lm.base.decode([int(domain.train[at + 1])])
    assert nearest.context == lm.base.decode(domain.train[max(1, at - 7) : at + 1].tolist())
    base_steps = list(md.generate(lm, ids, md.Sampling("base", 0.5, 1.0, 5, 9)))
    assert not any(s.changed or s.neighbours for s in base_steps)


def test_sampling_follows_seed_top_k_and_temperature(lm, domain):
    ids = domain.test[:9].tolist()

    def tokens(**fields) -> list[int]:
        sampling = md.Sampling("decoder", 0.5, 1.0, 0, 20)._replace(**fields)
        return [step.token for step in md.generate(lm, ids, sampling)]

    assert tokens(seed=1) == tokens(seed=1) != tokens(seed=2)
    assert tokens(top_k=1) == tokens(temperature=0.0) == tokens(temperature=1e-4)
    log_p = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = torch.Generator().manual_seed(0)
    sampling = md.Sampling("base", 0, 1.0, 3)
    noise = -torch.empty(4000, 4).exponential_(generator=draw).log()
    counts = np.bincount([md.choose(log_p, row, sampling) for row in noise], minlength=4) / 4000
    np.testing.assert_allclose(counts, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_an_answer_stops_at_the_end_of_text(lm, domain, monkeypatch):
    ids, sampling = domain.test[:9].tolist(), md.Sampling("both", 0.5, 0.0, 0, 20)
    tokens = [step.token for step in md.generate(lm, ids, sampling)]
    end = tokens[6]
    monkeypatch.setattr(md.Base, "end_ids", lambda self: {end})
    assert [s.token for s in md.generate(lm, ids, sampling)] == tokens[: tokens.index(end)]


def test_incomplete_characters_wait_until_they_are_whole(lm, monkeypatch):
    ids = lm.base.encode("né € 日")
    wanted = iter(ids)
    monkeypatch.setattr(md, "choose", lambda *args: current[0])
    current, texts = [0], []
    steps = md.generate(lm, ids[:1], md.Sampling("base", 0, 0.0, 0, len(ids)))
    for token in wanted:
        current[0] = token
        texts.append(next(steps).text)
    assert "".join(texts) == "né € 日" and "" in texts
    assert not any("\ufffd" in text for text in texts)


def test_twenty_users_at_once_get_what_each_gets_alone(lm, domain):
    jobs = []
    for user in range(20):
        sampling = md.Sampling(md.MODES[user % 4], 0.5, 0.9, 20, 12, seed=user)
        jobs.append((domain.test[3 * user : 3 * user + 8 + user % 3].tolist(), sampling))

    def answer(job) -> list[md.Step]:
        return list(md.generate(lm, *job))

    alone = [answer(job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert list(pool.map(answer, jobs)) == alone
    # One thread that takes turns between conversations does not mix them either.
    turns = [md.generate(lm, *job) for job in jobs[:4]]
    mixed = [list(steps) for steps in zip(*(zip(*turns, strict=False)), strict=True)]
    assert mixed == [steps[: len(mixed[0])] for steps in alone[:4]]


# ── Chat prompts ──────────────────────────────────────────────────────────────────────────────────
def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def test_chat_prompt_drops_whole_oldest_turns(lm):
    messages = [turn("user" if i % 2 == 0 else "assistant", f"ba den {i}") for i in range(9)]
    ids, dropped = md.chat_ids(lm, messages[:1], 4)
    assert (lm.base.decode(ids), dropped) == ("ba den 0", 0)
    ids, dropped = md.chat_ids(lm, messages, 4)
    assert dropped > 0 and messages[dropped]["role"] == "user"
    assert lm.base.decode(ids) == "\n".join(m["content"] for m in messages[dropped:])
    assert len(ids) <= lm.window - 4
    more = "\n".join(m["content"] for m in messages[dropped - 2 :])
    assert len(lm.base.encode(more)) > lm.window - 4


def test_chat_template_is_used_keeps_the_system_message_and_its_errors_are_one_line(lm):
    template = ("{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no') }}"
                "{% endif %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
                "{% if add_generation_prompt %}[a]{% endif %}")
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=lm.base.tokenizer.backend_tokenizer)
    tokenizer.chat_template = template
    chat = dataclasses.replace(lm, base=dataclasses.replace(lm.base, tokenizer=tokenizer))
    ids, _ = md.chat_ids(chat, [turn("user", "ba")], 0)
    assert lm.base.decode(ids) == "[u]ba[a]"
    messages = [turn("system", "den"), turn("user", "gor " * 20), turn("assistant", "fi"),
                turn("user", "ba")]
    ids, dropped = md.chat_ids(chat, messages, 0)
    assert (lm.base.decode(ids), dropped) == ("[s]den[u]ba[a]", 2)
    with pytest.raises(ValueError, match="chat template .* refuses"):
        md.chat_ids(chat, [turn("user", "bad")], 0)


@pytest.mark.parametrize("content, wanted", [
    ("", "empty"), (" \n", "empty"), ("x" * 20_001, "20,000"), ("ba den " * 200, "room for"),
    ("\ud800", "UTF-8")])
def test_chat_messages_that_cannot_be_are_one_line(lm, content, wanted):
    with pytest.raises(ValueError, match=wanted):
        md.chat_ids(lm, [turn("user", content)], 0)
    with pytest.raises(ValueError, match="empty"):
        md.chat_ids(lm, [], 0)


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("argv, wanted", [
    (["bild"], "command"), (["--alpha", "1.5"], "alpha"), (["--alpha", "-0.1"], "alpha"),
    (["--alpha", "much"], "alpha"), (["--temperature", "-1"], "temperature"),
    (["--knn_k", "0"], "knn_k"), (["--decoder_heads", "3"], "decoder_dim"),
    (["--base", "missing.pt"], "missing.pt"), (["--domain", "./nowhere"], "./nowhere"),
    (["--index", "tree"], "index"), (["--arms", "hidden,other"], "arms"),
    (["--finetune_lrs", "fast"], "finetune_lrs"), (["--no_such", "1"], "no such field"),
    (["--stride", "64"], "stride"), (["--model_dir", "/dev/null/x"], "model_dir"),
    (["--knn_k", "100000"], "knn_k"), (["--index", "ivfpq", "--max_keys", "500"], "ivfpq")])
def test_bad_options_are_one_line_and_nothing_is_written(
        argv, wanted, checkpoint, text_folder, tmp_path, capsys):
    words = argv[:1] if argv[0] == "bild" else ["build"]
    words += argv_of(tmp_path, checkpoint, text_folder) + (argv if words == ["build"] else [])
    assert md.main(words) == 2
    assert wanted in error_line(capsys.readouterr().err)
    assert not (tmp_path / md.MANIFEST).exists() and not (tmp_path / md.KEYS).exists()


def spoil(folder: Path, what: str) -> None:
    """Make one artefact wrong."""
    name, _, how = what.partition(" ")
    path = folder / name
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    elif how == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif how == "foreign":
        torch.save({"identity": object}, path)
    elif how == "garbage":
        path.write_bytes(b"garbage")
    else:  # a field of the manifest
        manifest = json.loads(path.read_text())
        field, value = how.split("=")
        manifest[field] = json.loads(value)
        path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("what", [
    f"{md.MANIFEST} missing", f"{md.MANIFEST} garbage", f"{md.MANIFEST} count=7",
    f"{md.MANIFEST} width=31", f"{md.MANIFEST} vocab=1", f'{md.MANIFEST} base_fingerprint="x"',
    f'{md.MANIFEST} index_sha256="x"', f'{md.MANIFEST} identity="x"',
    f"{md.MANIFEST} settings={{}}",
    f"{md.KEYS} missing", f"{md.KEYS} truncated", f"{md.KEYS} pickle", f"{md.KEYS} garbage",
    f"{md.VALUES} missing", f"{md.VALUES} truncated", f"{md.INDEX} missing",
    f"{md.INDEX} truncated", f"{md.INDEX} flipped", "memory_decoder.pt missing",
    "memory_decoder.pt truncated", "memory_decoder.pt foreign"])
def test_spoilt_artefacts_are_one_line(what, made, config, tmp_path, capsys):
    folder = tmp_path / "models"
    shutil.copytree(made, folder)
    spoil(folder, what)
    mine = dataclasses.replace(config, model_dir=str(folder))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        md.MemoryLM.load(mine)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    argv = flags({k: v for k, v in dataclasses.asdict(mine).items() if v != ""})
    assert md.main(["evaluate", *argv]) == 2
    error_line(capsys.readouterr().err)


@pytest.mark.parametrize("fields, wanted", [
    ({"mode": "magic"}, "mode"), ({"alpha": 1.01}, "alpha"), ({"alpha": math.nan}, "alpha"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": math.inf}, "temperature"),
    ({"top_k": -1}, "top_k")])
def test_sampling_that_cannot_be_is_refused_at_once(lm, fields, wanted):
    sampling = md.Sampling("base", 0.5, 1.0, 0)._replace(**fields)
    with pytest.raises(ValueError, match=wanted):
        md.generate(lm, [1], sampling)
    with pytest.raises(ValueError, match="prompt"):
        md.generate(lm, [], md.Sampling("base", 0.5, 1.0, 0))


def test_a_gated_model_says_how_to_log_in(monkeypatch, tmp_path, text_folder, capsys):
    from transformers import AutoTokenizer

    def refuse(name, **options):
        raise OSError("You are trying to access a gated repo.\n401 Client Error")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    argv = argv_of(tmp_path, "google/gemma-2b", text_folder)
    assert md.main(["build", *argv]) == 2
    assert "huggingface-cli login" in error_line(capsys.readouterr().err)


def test_a_checkpoint_with_a_memory_is_no_base(tmp_path, checkpoint):
    payload = torch.load(checkpoint, weights_only=True)
    payload["model_state_dict"]["memory.x"] = torch.zeros(1)
    torch.save(payload, tmp_path / "dnc.pt")
    with pytest.raises(ValueError, match="without a memory"):
        md.load_base(md.Config(), str(tmp_path / "dnc.pt"))


# ── Domain ────────────────────────────────────────────────────────────────────────────────────────
def test_hub_rows_pass_the_template_and_are_split_by_text_each_once(monkeypatch):
    import datasets
    rows = {"Title": [f"t{i % 50}" for i in range(60)], "Answer": [None, *["a"] * 59]}
    found = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: found)
    monkeypatch.setattr(md, "had_or_refused", lambda *args: contextlib.nullcontext())
    texts = md.hub_domain(md.Config(domain="a/b", text_template="{Title}: {Answer}"))
    assert texts["train"][:2] == ["t0: \n", "t1: a\n"]
    everything = [text for split in texts.values() for text in split]
    assert len(everything) == len(set(everything)) == 51  # t0 without an answer, then with one
    assert [len(texts[s]) for s in ("valid", "test")] == [2, 2]
    with pytest.raises(ValueError, match="text_template .* Title, Answer"):
        md.hub_domain(md.Config(domain="a/b", text_template="{Titel}"))


def test_a_folder_of_any_text_files_is_split_and_bad_ones_are_one_line(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}\n", encoding="utf-8")
    texts = md.folder_domain(str(tmp_path))
    assert [len(texts[s]) for s in ("train", "valid", "test")] == [36, 2, 2]
    (tmp_path / "40.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="40.txt is not UTF-8"):
        md.folder_domain(str(tmp_path))
    one = tmp_path / "one"
    one.mkdir()
    with pytest.raises(ValueError, match="there is none"):
        md.folder_domain(str(one))
    (one / "a.txt").write_text("\n\n".join(f"paragraph {i}" for i in range(30)), encoding="utf-8")
    assert len(md.folder_domain(str(one))["train"]) == 28


# ── Decoder, and the command ──────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["hidden", "tokens"])
def test_one_token_through_the_half_precision_head_is_close_to_the_whole_one(kind):
    torch.manual_seed(0)
    decoder = md.Decoder(kind, 64, 2, 4, 16, 500, 48)
    decoder.head.weight.data.normal_()
    keys, ids = torch.randn(1, 1, 48), torch.tensor([[7]])
    with torch.no_grad():
        whole = decoder(keys, ids)
        assert decoder.head_half is None and "head_half" not in decoder.state_dict()
        decoder.ready()
        single, pair = decoder(keys, ids), decoder(keys.expand(2, 1, 48), ids.expand(2, 1))
    assert single.dtype == torch.float32 and not torch.equal(single, whole)
    torch.testing.assert_close(single, whole, atol=2e-3 * whole.abs().max().item(), rtol=0)
    torch.testing.assert_close(pair[:1], whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hidden", "tokens"])
@pytest.mark.parametrize("reach", [4, 32])
def test_decoder_attends_back_as_far_as_its_reach_and_its_cache_is_exact(kind, reach):
    torch.manual_seed(0)
    decoder = md.Decoder(kind, 16, 1, 4, reach, 30, 10).eval()
    for weight in decoder.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    keys, ids = torch.randn(2, 11, 10), torch.randint(0, 30, (2, 11))
    out = decoder(keys, ids)
    assert out.shape == (2, 11, 30)
    changed_keys, changed_ids = keys.clone(), ids.clone()
    changed_keys[:, 3] = torch.randn(10)
    changed_ids[:, 3] = (ids[:, 3] + 1) % 30
    moved = (decoder(changed_keys, changed_ids) - out).abs().amax(-1)
    seen = torch.arange(11).sub(3)
    assert ((moved > 1e-4) == ((seen >= 0) & (seen < reach))).all()
    cache: list = []
    parts = [decoder(keys[:, :5], ids[:, :5], cache)]
    parts += [decoder(keys[:, t : t + 1], ids[:, t : t + 1], cache) for t in range(5, 9)]
    parts += [decoder(keys[:, 9:], ids[:, 9:], cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), out, atol=1e-5, rtol=1e-4)


def test_distance_bias_falls_with_distance_and_masks_what_is_ahead_or_too_far():
    bias = md.distance_bias(4, 3)
    assert bias.shape == (4, 3, 6)
    for h, slope in enumerate((1 / 4, 1 / 16, 1 / 64, 1 / 256)):
        for t in range(3):
            for j in range(6):
                distance = 3 + t - j
                expected = -slope * distance if 0 <= distance < 3 else -math.inf
                assert bias[h, t, j] == expected


def test_a_decoder_as_wide_as_the_base_starts_with_the_head_of_the_base(lm):
    decoder = md.new_decoder(md.Config(decoder_dim=32, decoder_heads=4), lm.base, "hidden")
    embedding = lm.base.model.get_output_embeddings().weight
    torch.testing.assert_close(decoder.head.weight @ decoder.enter.weight, embedding, atol=1e-5,
                               rtol=1e-4)
    for width in (8, 48):
        assert md.new_decoder(md.Config(decoder_dim=width, decoder_heads=4), lm.base,
                              "tokens").head.weight.shape == (lm.base.vocab, width)


def test_a_decoder_of_tokens_serves_another_base_with_its_tokenizer_and_one_of_states_does_not(
        config, lm, made):
    other = md.read_manifest(config) | {"identity": "of another base"}
    assert md.load_decoder(config, "tokens", lm.base, other).kind == "tokens"
    for manifest in (other, other | {"tokenizer_sha256": "x"}):
        with pytest.raises(ValueError, match="train again"):
            arm = "hidden" if manifest is other else "tokens"
            md.load_decoder(config, arm, lm.base, manifest)


def test_another_domain_than_the_one_built_is_refused(config, made, tmp_path, capsys):
    other = write_corpus(tmp_path / "other", 300, 60, 60)
    for command in ("train", "tune", "evaluate"):
        argv = flags(dataclasses.asdict(config) | {"domain": str(other), "text_template": "x"})
        assert md.main([command, *argv]) == 2
        assert "domain" in error_line(capsys.readouterr().err)


def test_the_benchmark_of_the_datastore_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import datastore
    assert datastore.main(["--tiny", "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["index"] for row in rows] == ["flat", "ivfpq", "hnsw"]
    assert all(row["recall"] > 0.9 for row in rows) and rows[0]["recall"] == 1
    assert datastore.main(["--tiny", "--keys", str(tmp_path / "none.npy")]) == 2
    assert "datastore_keys.npy" in error_line(capsys.readouterr().err)


def test_the_benchmark_of_a_generated_token_times_every_system(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import decoder
    monkeypatch.setattr(sys, "argv", [
        "decoder.py", "--size", "small", "--dim", "32", "--keys", "1000", "--prompt", "4",
        "--tokens", "2", "--rounds", "2", "--device", "cpu", "--json", str(tmp_path / "d.json")])
    decoder.main()
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert [row["system"] for row in rows] == ["base", "knn", "hidden", "tokens", "both"]
    assert rows[0]["ratio"] == 1 and all(len(row["ms_by_turn"]) == 2 for row in rows)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dim", "40"])
    with pytest.raises(SystemExit, match="2"):
        decoder.run_command(decoder.main)
    assert "decoder_dim = 40" in error_line(capsys.readouterr().err)


def test_targets_on_disk_are_the_knn_distribution_without_the_own_position(made, lm):
    tokens, weights = (np.load(made / f"targets_{x}.npy") for x in ("tokens", "weights"))
    at = np.array([3, 200, 511])
    k, tau = lm.settings["k"], lm.settings["tau"]
    d, ids = brute_force(lm.datastore.keys, lm.datastore.keys[at], k, exclude=at)
    w = np.exp(-(d - d[:, :1]) / tau)
    w /= w.sum(1, keepdims=True)
    for row in range(3):
        expected = np.bincount(lm.datastore.values[ids[row]], w[row], lm.base.vocab)
        found = np.bincount(tokens[at[row]], weights[at[row]].astype(float), lm.base.vocab)
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_training_lowers_the_loss_of_every_arm(config, lm, domain, made):
    targets = [np.load(made / f"targets_{x}.npy") for x in ("tokens", "weights")]
    config = dataclasses.replace(config, num_epochs=6, decoder_lr=3e-3)
    for arm in ("hidden", "tokens", "text", "distilled"):
        start = md.new_decoder(config, lm.base, arm if arm in ("hidden", "tokens") else "hidden")
        end = md.train_decoder(config, lm.base, domain, lm.datastore, arm, targets)
        scores = md.score(config, lm.base, domain.train, 300, {"a": start, "b": end}, alphas=[1.0])
        before, after = (md.perplexity(scores.mixed[name]) for name in "ab")
        assert after < 0.9 * before, arm


def test_the_datastore_has_no_part_in_the_controls_and_has_one_in_the_decoder(
        config, lm, domain, made):
    targets = [np.load(made / f"targets_{x}.npy") for x in ("tokens", "weights")]
    others = [targets[0][::-1].copy(), targets[1][::-1].copy()]
    for arm in ("text", "distilled", "hidden"):
        one, two = (md.train_decoder(config, lm.base, domain, lm.datastore, arm, x).state_dict()
                    for x in (targets, others))
        assert all(torch.equal(one[name], two[name]) for name in one) == (arm != "hidden"), arm


def test_what_is_written_holds_tensors_and_plain_values_alone(made):
    for name in ("memory_decoder", "decoder_tokens", "decoder_text", "decoder_distilled",
                 "base_finetuned"):
        payload = torch.load(made / f"{name}.pt", weights_only=True)
        assert all(isinstance(x, torch.Tensor) for x in payload["model_state_dict"].values())
    for name in (md.KEYS, md.VALUES, "targets_tokens.npy", "targets_weights.npy"):
        np.load(made / name, allow_pickle=False)
    assert not [p for p in made.iterdir() if p.name.endswith((".part", ".tmp", ".empty"))]


def test_evaluation_has_a_row_a_system_with_settings_from_validation(made):
    found = json.loads((made / "evaluation.json").read_text())
    rows = {row["system"]: row for row in found["rows"]}
    assert list(rows) == list(md.NAMES.values())
    assert set(rows["base"]) == {"system", "alpha", "lambda", "tau", "k", "valid_ppl", "test_ppl",
                                 "ms_per_token"}
    for row in rows.values():
        assert row["valid_ppl"] <= rows["base"]["valid_ppl"] or row["system"] == "fine-tuned base"
        assert 1 < row["test_ppl"] < 1000 and row["ms_per_token"] > 0
    manifest = json.loads((made / md.MANIFEST).read_text())
    assert rows["kNN-LM"]["tau"] == manifest["settings"]["tau"]
    surface = np.array(manifest["tuning"]["surface"])
    assert rows["kNN-LM"]["valid_ppl"] == pytest.approx(surface.min(), rel=1e-6)
    assert {"base", "layer", "key", "tokenizer_sha256", "key_dtype", "count", "text_sha256"} <= set(
        manifest)
    assert (made / "memory_decoder.png").stat().st_size > 10_000


def test_the_real_command_does_everything(tmp_path, save_dir, text_folder):
    argv = argv_of(tmp_path, "auto", text_folder, save_dir=save_dir, arms="", max_keys=600,
                   decoder_kind="tokens", mixing="logits", alpha=0.25)
    command = [sys.executable, str(ROOT / "memory_decoder.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("What does memory add?", "chosen: lambda", "memory decoder (tokens)"):
        assert words in done.stdout
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [r["alpha"] for r in rows if r["system"] == "memory decoder (tokens)"] == [0.25]
