"""Tests of edm_gpt2.py: the base, training, the measures against naive loops and against fakes of
known results, generation, and the command.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error_line, flags
from edm_oracle import (
    RUN,
    W,
    close,
    draw,
    edm_config,
    make,
    make_base,
    one_line,
    read_all,
    same_bits,
)
from transformers import GPT2Config, OPTConfig, PreTrainedTokenizerFast

import dnc_gpt2
import edm_gpt2 as eg
import edm_model as em


@pytest.fixture(scope="module")
def base():
    return make_base()


def stirred(edm_base):
    """Both memories with open gates."""
    model = eg.build_model(edm_base, edm_config(), "both", 0).eval()
    with torch.no_grad():
        for memory in (model.edm, model.early, model.late):
            memory.alpha.fill_(0.5)
    return model


# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
def test_config_derives_arms_seeds_and_rows():
    config = eg.Config(arms=" edm, both,edm", seeds="3, 1", batch_size=12, bptt_segments=3)
    assert (config.arm_list, config.seed_list, config.rows) == (["edm", "both"], [3, 1], 4)


@pytest.mark.parametrize("fields", [
    {"window": 7}, {"slots": 15}, {"slots": 65_537}, {"top_k": 33}, {"read_layer": -2},
    {"recall_rows": 1}, {"lora_dropout": 1.0}, {"lora_targets": ""}, {"text": " "}, {"arms": ""},
    {"arms": "edm,dnc"}, {"seeds": ""}, {"seeds": "0,-1"}, {"seeds": "0,,1"}, {"seeds": "²"},
    {"seeds": "4294967296"}, {"eviction": "random"}, {"bptt_segments": 3}, {"qlora": True},
    {"lr": math.inf}, {"window": 16.0}, {"max_steps": 0}])
def test_config_refuses_a_bad_value_in_one_line(fields):
    with pytest.raises(ValueError) as error:
        edm_config(**fields)
    [(name, value)] = fields.items()
    one_line(error, f"{name} = {value!r}: must be ")


# ══ The base ═════════════════════════════════════════════════════════════════════════════════════
def test_build_model_depends_on_its_seed_alone(edm_base):
    one, same, other = (eg.build_model(edm_base, edm_config(), "both", seed).state_dict()
                        for seed in (0, 0, 1))
    assert all(torch.equal(weight, same[name]) for name, weight in one.items())
    assert not torch.equal(one["edm.key.weight"], other["edm.key.weight"])
    for name, weight in edm_base.weights.items():
        assert torch.equal(other["transformer." + name], weight)


def test_build_model_has_the_memories_of_its_arm(edm_base):
    for arm, (has_notebook, has_recurrent) in eg.FLAGS.items():
        model = eg.build_model(edm_base, edm_config(), arm, 0)
        assert (model.edm is not None) == has_notebook
        assert (model.early is not None) == (model.late is not None) == has_recurrent
        assert model.config.stride == model.config.window == W


def test_build_model_finds_the_reset_token(edm_base):
    for word, wanted in (("<end>", edm_base.tokenizer.token_to_id("<end>")), ("", -1)):
        model = eg.build_model(edm_base, edm_config(reset_token=word), "base", 0)
        assert model.config.document_end == wanted
    with pytest.raises(ValueError) as error:
        eg.build_model(edm_base, edm_config(reset_token="<fin>"), "base", 0)
    one_line(error, "reset_token = '<fin>'")


def test_load_base_takes_what_a_folder_holds(base, edm_tokenizer, tmp_path):
    with pytest.raises(ValueError) as error:
        eg.load_base(edm_config(base=str(tmp_path)))
    one_line(error, f"base = {str(tmp_path)!r}")
    base.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=edm_tokenizer).save_pretrained(tmp_path)
    loaded = eg.load_base(edm_config(base=str(tmp_path)))
    model, tokens = eg.build_model(loaded, edm_config(), "base", 0).eval(), draw(2, W)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base(tokens).logits)
    text = "the city"
    assert loaded.tokenizer.encode(text).ids == edm_tokenizer.encode(text).ids


@pytest.mark.parametrize("settings, fields, named", [
    (GPT2Config(n_positions=8), {}, "window = 16"),
    (GPT2Config(n_layer=2), {"read_layer": 2}, "read_layer = 2"),
    (GPT2Config(tie_word_embeddings=False), {}, "base = 'x'"),
    (GPT2Config(scale_attn_weights=False), {}, "base = 'x'"),
    (GPT2Config(scale_attn_by_inverse_layer_idx=True), {}, "base = 'x'"),
    (GPT2Config(add_cross_attention=True), {}, "base = 'x'"),
    (OPTConfig(), {}, "(this is opt)")])
def test_check_base_refuses_what_the_model_cannot_run(settings, fields, named):
    with pytest.raises(ValueError) as error:
        eg.check_base("x", settings, edm_config(**fields))
    one_line(error, named)


# ══ Training ═════════════════════════════════════════════════════════════════════════════════════
def test_adapters_have_an_arm_of_their_own(edm_base):
    """Beside memories with adapters stands the base with adapters alone, trained likewise."""
    config = edm_config(lora=2, arms="edm", max_steps=2)
    assert config.arm_list == ["adapters", "edm"] and edm_config(arms="edm").arm_list == ["edm"]
    corpus = SimpleNamespace(train=draw(400))
    model, _, _ = eg.train_arm(edm_base, corpus, config, "adapters", 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def test_train_arm_moves_the_memories_and_not_the_base(edm_base):
    """Two runs of three steps are the same bit for bit."""
    corpus = SimpleNamespace(train=draw(400))
    (model, history, _), (again, _, _) = (
        eg.train_arm(edm_base, corpus, edm_config(), "both", 0) for _ in range(2))
    start = eg.build_model(edm_base, edm_config(), "both", 0).state_dict()
    weights, same = model.state_dict(), again.state_dict()
    for name, weight in weights.items():
        assert torch.equal(weight, same[name])
        assert torch.equal(weight, start[name]) or not name.startswith("transformer."), name
    assert all(weights[f"{memory}.alpha"] != 0 for memory in ("edm", "early", "late"))
    assert [row["step"] for row in history] == [2, 3] and not model.training


def test_train_arm_that_diverges_says_what_to_do(edm_base):
    with pytest.raises(dnc_gpt2.Diverged) as error:
        eg.train_arm(edm_base, SimpleNamespace(train=draw(400)), edm_config(lr=1e30), "edm", 0)
    one_line(error, "lr = 1e+30", "edm")


# ══ Measures ═════════════════════════════════════════════════════════════════════════════════════
@pytest.mark.parametrize("length", [151, 149])
def test_evaluate_reads_its_own_memory_or_the_row_before_s(base, length):
    """Each row alone, block by block; with swap the memories of the row before in place of its own,
    which go on as if nothing had been. What fills up the last row counts nothing."""
    model, stream, rows = make(base, dtype=torch.float64, stride=W), draw(length), 3
    plain, swapped = (eg.evaluate(model, stream, rows, swap=swap) for swap in (False, True))
    assert int((plain > 0).sum()) == int((swapped > 0).sum()) == length - 1
    tokens = F.pad(stream, (0, 151 - length))
    states = [model.init_state(1) for _ in range(rows)]
    for begin in range(0, 50, W):
        if begin:
            states = [model.leave_rows(torch.tensor([True]), s, [], False) for s in states]
        after = []
        for row, own in enumerate(states):
            other = states[row - 1]
            mixed = own._replace(memory=other.memory, early=other.early, late=other.late)
            start, stop = row * 50 + begin, row * 50 + min(begin + W, 50)
            for nll, state in ((swapped, mixed), (plain, own)):
                logits, state, _ = read_all(model, tokens[None, start:stop], state=state)
                wanted = F.cross_entropy(logits[0], tokens[start + 1 : stop + 1], reduction="none")
                scored = nll[row, begin : begin + W] > 0
                close(nll[row, begin : begin + W][scored], wanted[scored], 1e-9)
            after.append(state)
        states = after
    assert torch.equal(swapped[:, :W], plain[:, :W]) and not torch.equal(swapped, plain)


@pytest.mark.parametrize("rows, window, length", [(1, 4, 60), (3, 7, 100), (4, 16, 203)])
def test_windows_back_equals_a_naive_loop(rows, window, length):
    stream = draw(length, high=30)
    back = eg.windows_back(stream, rows, window)
    L = -(-(length - 1) // rows)
    assert back.shape == (rows, L)
    for row, t in np.ndindex(rows, L):
        target, wanted = row * L + t + 1, -1
        if target < length:
            before = [s for s in range(t + 1) if stream[row * L + s] == stream[target]]
            wanted = t // window - before[-1] // window if before else -1
        assert back[row, t] == wanted


def test_by_distance_equals_a_naive_loop():
    rng = np.random.default_rng(0)
    back = rng.choice([-1, 0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 65, 300], (5, 60))
    nll, scored = torch.from_numpy(rng.random((5, 60))), torch.from_numpy(rng.random((5, 60)) < 0.8)
    bounds = {"in the window": (0, 0), "1": (1, 1), "2-3": (2, 3), "4-7": (4, 7), "8-15": (8, 15),
              "16-31": (16, 31), "32-63": (32, 63), "64+": (64, 10**9), "new": (-1, -1)}
    rows = eg.by_distance(nll, back, scored)
    assert [row["windows_back"] for row in rows] == list(bounds)
    for row, (low, high) in zip(rows, bounds.values(), strict=True):
        losses = nll[scored & torch.from_numpy((low <= back) & (back <= high))]
        assert row["tokens"] == len(losses) > 0
        assert row["loss"] == pytest.approx(float(losses.mean()))
    assert sum(row["tokens"] for row in rows) == int(scored.sum())
    nothing = eg.by_distance(nll, np.zeros((5, 60)), scored)[-1]
    assert nothing["tokens"] == 0 and nothing["loss"] is None


class Copier:
    """In place of a model: the next token is what followed the last three tokens when they stood
    last; with `constant` it is always that one. Its head is the identity."""

    def __init__(self, vocabulary: int, constant: int | None = None) -> None:
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.transformer = SimpleNamespace(wte=SimpleNamespace(weight=torch.eye(vocabulary)))
        self.constant, self.read = constant, []

    def init_state(self, batch: int) -> int:
        return batch

    def advance(self, tokens, mask, state):
        assert mask.all() and state == len(tokens)
        self.read.append(tokens.cpu())
        best = torch.zeros_like(tokens)
        for row, ids in enumerate(tokens.tolist()):
            followed = {}
            for t in range(2, len(ids)):
                best[row, t] = followed.get(tuple(ids[t - 2 : t + 1]), 0)
                followed[tuple(ids[t - 2 : t + 1])] = ids[t + 1] if t + 1 < len(ids) else 0
        if self.constant is not None:
            best[:] = self.constant
        return F.one_hot(best, self.config.vocab_size).float(), None, []


def recall_of(fake: Copier, window: int, length: int, **options) -> list[dict]:
    stream = draw(length, seed=6, high=fake.config.vocab_size)
    return eg.planted_recall(fake, stream, edm_config(window=window, slots=64), **options)


def test_planted_recall_of_a_copier_is_whole():
    """Of a constant, or with another row's string, it is chance: of 24 tokens of 499 one or two."""
    rows = recall_of(Copier(499), 15, 4 * 15 + 8)
    assert [(row["windows"], row["accuracy"]) for row in rows] == [(1, 1.0), (2, 1.0), (4, 1.0)]
    for row in rows:  # one logit of 1 among 498 of 0
        assert row["loss"] == pytest.approx(math.log(math.e + 498) - 1, abs=1e-4)
    other = recall_of(Copier(499, constant=3), 16, 80), recall_of(Copier(499), 16, 80, swap=True)
    for rows in other:
        assert rows and all(row["accuracy"] <= 2 / 24 for row in rows)


@pytest.mark.parametrize("window", [8, 9, 16, 64])
def test_planted_recall_strings_are_so_many_windows_apart(window):
    """Each whole in one window; with swap the first is another row's."""
    one, other = Copier(499), Copier(499)
    rows = recall_of(one, window, 5 * window + 40)
    recall_of(other, window, 5 * window + 40, swap=True)
    for row, tokens, swapped in zip(rows, one.read, other.read, strict=True):
        last = tokens.shape[1] - 8
        first = last - row["windows"] * window
        assert torch.equal(tokens[:, first : first + 8], tokens[:, last:])
        assert first // window == (first + 7) // window == 0
        assert last // window == (last + 7) // window == row["windows"]
        assert torch.equal(swapped[:, last:], tokens[:, last:])
        assert torch.equal(swapped[:, first : first + 8], tokens[:, last:].roll(1, 0))


def test_planted_strings_are_others_for_another_seed():
    reads = []
    for seed in (0, 0, 1):
        fake = Copier(499)
        recall_of(fake, 16, 80, seed=seed)
        reads.append(fake.read[0])
    assert torch.equal(reads[0], reads[1])
    assert (reads[0][:, -8:] != reads[2][:, -8:]).any(1).all()


def test_rare_words_are_those_of_training_seldom_met():
    counts = Counter({"river": 3, "water": 1})
    text = "The River's water, and the OBELISK of 1789; a sea."
    assert eg.rare_words(text, counts, 20_000) == {"water", "obelisk"}
    assert eg.rare_words(text, counts, 40_000) == {"river", "water", "obelisk"}


class Says:
    """In place of a model: goes through its row's prompt again and again, or one row further."""

    def __init__(self, vocabulary: int, roll: int) -> None:
        self.config = SimpleNamespace(vocab_size=vocabulary, window=W, stride=W)
        self.transformer = SimpleNamespace(wte=SimpleNamespace(weight=torch.eye(vocabulary)))
        self.roll, self.prompts, self.steps = roll, None, 0

    def init_state(self, batch: int) -> None:
        return None

    def advance(self, tokens, mask, state):
        assert self.config.stride == W // 2
        if self.prompts is None:
            self.prompts = tokens.roll(self.roll, 0)
        best = self.prompts[:, self.steps % self.prompts.shape[1]]
        self.steps += 1
        return 50.0 * F.one_hot(best, self.config.vocab_size).float().unsqueeze(1), None, []


@pytest.mark.parametrize("roll", [0, 1])
def test_topic_consistency_counts_the_words_of_the_own_prompt(roll):
    """Words of the vocabulary are tokens, none in the training text: all are rare."""
    words = ["".join(chr(97 + i // 26**k % 26) for k in range(4)) for i in range(200)]
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(words[i] for i in ids))
    corpus = SimpleNamespace(train=torch.zeros(9, dtype=torch.long), valid=torch.arange(200))
    fake = Says(200, roll)
    topic = eg.topic_consistency(fake, corpus, tokenizer, edm_config())
    assert topic["words"] == 48 - 1 and fake.config.stride == W  # word 0 is in training
    assert topic["own"] == (1 - roll) and topic["other"] == roll / 2


@pytest.mark.parametrize("count", [2, 3, 5, 10, 14])
def test_mean_and_half_equals_students_interval(count):
    """Against numpy's deviation and a printed table of four digits."""
    values = np.random.default_rng(count).normal(3, 2, count)
    t = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262, 14: 2.160}[count]
    mean, half = dnc_gpt2.mean_and_half(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert half == pytest.approx(t * values.std(ddof=1) / math.sqrt(count), rel=3e-4)
    assert math.isnan(dnc_gpt2.mean_and_half([2.5])[1])


# ══ Generation, memory files ═════════════════════════════════════════════════════════════════════
def test_continue_text_prints_the_greedy_continuation(edm_base, capsys):
    """Of a prompt of two lines; it gives the state of all that it printed."""
    model, tokenizer = stirred(edm_base), edm_base.tokenizer
    prompt = "the city was built\non a hill by the river"
    state = eg.continue_text(model, tokenizer, prompt, edm_config(new_tokens=30))
    ids = dnc_gpt2.tokenize(tokenizer, [prompt]).tolist()
    assert ids == tokenizer.encode(prompt).ids  # this one would put a space before either line
    for _ in range(30):
        ids.append(int(read_all(model, torch.tensor([ids]))[0][0, -1].argmax()))
    out = capsys.readouterr().out
    assert f"\n{prompt}{tokenizer.decode(ids[-30:])}\n" in out and "recalled" in out
    assert int(state.start + state.fill) == len(ids)


def test_continue_text_of_a_seed_is_the_same(edm_base, capsys):
    model, printed = stirred(edm_base), []
    for seeds in ("0", "0", "1"):
        config = edm_config(temperature=1.0, seeds=seeds)
        eg.continue_text(model, edm_base.tokenizer, "a hill", config)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    with pytest.raises(ValueError) as error:
        eg.continue_text(model, edm_base.tokenizer, "", edm_config())
    one_line(error, "text = ''")


def test_recalled_names_the_tokens_read_most(edm_base):
    """By hand: of two heads, slot 3 gets 0.9 in all, slot 1 gets 0.8, slot 0 the rest."""
    tokenizer = edm_base.tokenizer
    state = stirred(edm_base).init_state(1)
    ids = (tokenizer.encode("the city").ids * 4)[:4]
    state.memory.token[0, :4] = torch.tensor(ids)
    state.memory.position[0, :4] = torch.arange(4)
    state = state._replace(start=torch.tensor([32]), fill=torch.tensor([8]))
    slots = torch.tensor([[[[0, 1], [3, 0]], [[0, 1], [3, 1]]]])  # (B, H, m, K)
    weights = torch.tensor([[[[0.5, 0.5], [0.7, 0.3]], [[0.5, 0.5], [0.2, 0.8]]]])
    words = [repr(tokenizer.decode([ids[slot]])) for slot in (3, 1, 0)]
    assert eg.recalled(em.Pass(None, slots, weights), state, tokenizer) == (
        f"{words[0]} (2.3, 0.45)  {words[1]} (2.4, 0.40)  {words[2]} (2.5, 0.15)")
    for nothing in (None, slots[..., :0]):
        assert eg.recalled(em.Pass(None, nothing, nothing), state, tokenizer) == ""


def test_memory_file_is_whole_and_of_its_model(base, tmp_path):
    """What is none, damaged or of another model is refused in one line; so is a missing folder."""
    model, path = make(base, eviction="lru", slots=20), tmp_path / "memory.pt"
    _, state, _ = read_all(model, draw(1, 61))
    eg.save_memory(state, model, path)
    same_bits(eg.load_memory(model, path), state)
    torch.save({"model": ""}, tmp_path / "foreign.pt")
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:9999])
    for name, reader in (("memory.pt", make(base)), ("half.pt", model), ("foreign.pt", model),
                         ("missing.pt", model)):
        with pytest.raises(ValueError) as error:
            eg.load_memory(reader, tmp_path / name)
        one_line(error, "memory_file", str(tmp_path / name))
    with pytest.raises(ValueError) as error:
        eg.save_memory(state, model, tmp_path / "none" / "memory.pt")
    one_line(error, "memory_file", "none")


# ══ The command ══════════════════════════════════════════════════════════════════════════════════
def test_command_refuses_a_mistake_in_one_line(tmp_path, capsys):
    for argv, named in ((["--top_k", "9000"], "top_k"), (["--base", str(tmp_path)], "base"),
                        (["--generate", "The sea", "--save_dir", str(tmp_path)], "save_dir")):
        assert eg.main(argv) == 2
        assert named in error_line(capsys.readouterr().err)


@pytest.fixture(scope="module")
def finished(base, edm_tokenizer, tmp_path_factory) -> SimpleNamespace:
    """The whole command on a folder of text: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("edm")
    base.save_pretrained(folder / "base")
    PreTrainedTokenizerFast(tokenizer_object=edm_tokenizer).save_pretrained(folder / "base")
    (folder / "te$xt").mkdir()
    for name, times in (("train", 90), ("valid", 30), ("test", 30)):
        text = "the city was built on a hill by the river and the sea\n" * times
        (folder / "te$xt" / f"{name}.txt").write_text(text)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setenv("DRAW_PICTURES", "1")
        fields = {"base": "base", "dataset": "~/te$xt", "max_steps": 2, "eval_rows": 2,
                  "recall_rows": 2, "topic_rows": 2, "new_tokens": 5}
        assert eg.main(flags(RUN | fields)) == 0
    return SimpleNamespace(folder=folder, out=printed.getvalue())


def test_command_trains_measures_and_saves(finished):
    """Tables before the picture, whatever the folder's name; the JSON says where it comes from."""
    order = ["what do memories add?", "swapped", "by distance", "lost with the memory of another",
             "Recall", "Topic", "edm_gpt2.png", "goes on"]
    places = [finished.out.index(words) for words in order]
    assert places == sorted(places)
    content = json.loads((finished.folder / "plots" / "edm_gpt2.json").read_text())
    assert [run["arm"] for run in content["runs"]] == ["base", "full", "recurrent", "edm", "both"]
    for run in content["runs"][2:]:  # the buckets of both make up the whole
        for name, whole in (("by_distance", "valid_loss"), ("swapped_by_distance", "swapped_loss")):
            total = sum(row["tokens"] * (row["loss"] or 0) for row in run[name])
            assert total / run["valid_tokens"] == pytest.approx(run[whole])
    assert {"versions", "device", "command", "config"} <= set(content["about"])
    assert (finished.folder / "plots" / "edm_gpt2.png").stat().st_size > 10_000


def test_command_with_adapters_prints_and_draws_their_arm(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished.folder)
    monkeypatch.setenv("HOME", str(finished.folder))
    monkeypatch.setenv("DRAW_PICTURES", "1")
    fields = RUN | {"base": "base", "dataset": "~/te$xt", "max_steps": 1, "eval_rows": 2, "lora": 2,
                    "arms": "edm", "recall_rows": 2, "topic_rows": 0, "new_tokens": 2,
                    "save_dir": tmp_path / "c", "plot_dir": tmp_path / "p"}
    assert eg.main(flags(fields)) == 0
    out = capsys.readouterr().out
    assert "  adapters  " in out and out.index("  adapters  ") < out.index("edm_gpt2.png")
    runs = json.loads((tmp_path / "p" / "edm_gpt2.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == ["base", "full", "adapters", "edm"]
    assert "swapped_loss" not in runs[2] and "swapped_loss" in runs[3]


@pytest.fixture
def copied(finished, tmp_path, monkeypatch) -> dict:
    """The fields of that run, in a copy of its folder, which may be changed."""
    shutil.copytree(finished.folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path / "run"))
    return RUN | {"base": "base", "dataset": "~/te$xt", "max_steps": 2, "eval_rows": 2,
                  "recall_rows": 2, "topic_rows": 2, "new_tokens": 5}


def test_a_stopped_comparison_goes_on_from_what_it_measured(copied, capsys):
    """Without its last two arms, as a kill would leave it, the same figures come out; of a run
    whose model save_dir does not hold, that is trained again."""
    path = Path("plots/edm_gpt2.json")
    whole = eg.read_json(path, "")
    eg.write_json(whole | {"runs": whole["runs"][:3], "saved": None}, path)
    fields = copied | {"resume": "auto"}
    assert eg.main(flags(fields)) == 0
    assert "resume: 3 runs" in (out := capsys.readouterr().out)
    assert "recurrent, seed 0: measured before" in out

    def figures(content: dict) -> list[dict]:
        return [{name: value for name, value in run.items() if "_per_s" not in name}
                for run in content["runs"]]

    again = eg.read_json(path, "")
    assert figures(again) == figures(whole)
    assert again["history"] == whole["history"]
    assert eg.main(flags(fields)) == 0
    assert "resume: 5 runs" in capsys.readouterr().out
    assert eg.main(flags(fields | {"seeds": "0,3", "arms": "recurrent"})) == 0
    out = capsys.readouterr().out  # what save_dir holds is of another arm
    assert "resume: 4 runs" in out and "replaced when recurrent, seed 0, is trained" in out
    runs = eg.read_json(path, "")["runs"]
    assert len({(run["arm"], run["seed"]) for run in runs}) == len(runs) == 6

    for content in ({"about": whole["about"]}, whole | {"runs": [{}]}):
        eg.write_json(content, path)
        assert eg.main(flags(fields)) == 2
        assert str(path) in (line := error_line(capsys.readouterr().err)) and "--resume" in line
    path.write_bytes(path.read_bytes()[:-40])
    assert eg.main(flags(fields)) == 2
    assert str(path) in error_line(capsys.readouterr().err)
    assert eg.main(flags(copied | {"arms": "recurrent"})) == 0
    out = capsys.readouterr().out
    assert f"plot_dir: {path}: truncated, altered" in out and "; it is replaced\n" in out


def written() -> dict[Path, bytes]:
    """What a comparison writes, but for its locks."""
    paths = [Path("plots/edm_gpt2.json"), *Path("checkpoints/edm_gpt2").iterdir()]
    return {path: path.read_bytes() for path in paths if path.name[0] != "."}


@pytest.mark.parametrize("changed, said", [
    ({"max_steps": 3}, ["max_steps = 2", "this run has 3", "set --max_steps 2, or another"]),
    ({"lr": 1e-4}, ["lr = 0.002", "set --lr 0.002"]),
    ({"reset_token": "<end>"}, ["reset_token = ''", "set --reset_token ''"]),
    ({"dataset": "other"}, ["te$xt", "this is base on other", "name those, or another save_dir"]),
    ({"plot_dir": "elsewhere"}, ["model.safetensors", "elsewhere", "name its plot_dir"])])
def test_resume_refuses_another_run_and_leaves_what_it_measured(changed, said, copied, capsys):
    """By the name of the field that differs, before anything is measured; going back keeps all."""
    shutil.copytree("te$xt", "other")
    Path("other/train.txt").write_text("the sea and the river\n" * 200)
    before = written()
    assert eg.main(flags(copied | changed | {"resume": "auto"})) == 2
    line = error_line(capsys.readouterr().err)
    assert all(words in line for words in [*said, "plot_dir", "--resume anew"]), line
    assert written() == before
    assert eg.main(flags(copied | {"resume": "auto"})) == 0
    assert "resume: 5 runs" in capsys.readouterr().out


@pytest.mark.parametrize("resume", ["", "anew"])
def test_what_another_run_measured_stays_until_an_arm_is_measured(resume, copied, capsys,
                                                                  monkeypatch):
    """One line says that it will be replaced. Then `anew` goes on as auto does."""
    words = flags(copied | {"max_steps": 3, "arms": "recurrent"})
    words += ["--resume", resume] if resume else []
    before = written()

    def stopped(*args):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(eg, "train_arm", stopped)
        assert eg.main(words) == 128 + signal.SIGINT
    out, err = capsys.readouterr()
    assert "files of the same names are replaced. There is another run: " in out
    assert "max_steps = 2, this run has 3\n" in out and "--resume" in err
    assert written() == before

    assert eg.main(words) == 0
    content = eg.read_json(Path("plots/edm_gpt2.json"), "")
    assert [run["arm"] for run in content["runs"]] == ["base", "full", "recurrent"]
    capsys.readouterr()
    assert eg.main([*words, "--resume", "anew"]) == 0
    assert "resume: 3 runs" in (out := capsys.readouterr().out) and "another run" not in out


def test_the_same_run_once_more_says_how_to_keep_what_is_measured(copied, capsys, monkeypatch):
    before = written()
    monkeypatch.setattr(eg, "train_arm", lambda *args: signal.raise_signal(signal.SIGTERM))
    assert eg.main(flags(copied)) == 128 + signal.SIGTERM
    assert "has 5 runs of these settings, which are replaced (--resume auto keeps them)" in (
        capsys.readouterr().out)
    assert written() == before


def test_a_model_to_be_trained_again_is_measured_until_then(copied, capsys, monkeypatch):
    """save_dir lacks it, the measurements do not."""
    shutil.rmtree("checkpoints/edm_gpt2")
    monkeypatch.setattr(eg, "train_arm", lambda *args: signal.raise_signal(signal.SIGTERM))
    assert eg.main(flags(copied | {"resume": "auto"})) == 128 + signal.SIGTERM
    assert "resume: 4 runs" in capsys.readouterr().out
    assert len(eg.read_json(Path("plots/edm_gpt2.json"), "")["runs"]) == 5


@pytest.mark.parametrize("words", [["--generate", ""], ["--generate= "], ["--resume="]])
def test_command_with_nothing_is_refused_and_does_not_train(words, copied, capsys):
    """As `--generate "$TEXT"` gives it where TEXT is not set."""
    before = written()
    assert eg.main([*flags(copied), *words]) == 2
    assert "must be not empty; leave it out to train" in error_line(capsys.readouterr().err)
    assert eg.main(["--generate", "the sea", "--memory_file", ""]) == 2
    assert "memory_file = ''" in error_line(capsys.readouterr().err)
    assert written() == before


def test_stream_says_what_decode_says_and_no_half_characters(edm_tokenizer):
    from tokenizers import Tokenizer, decoders, models

    text = "né € 日 🂡 a"
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    fallback = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    every = np.random.default_rng(0).permutation(np.repeat(np.arange(97), 5)).tolist()
    for tokenizer, ids in ((edm_tokenizer, every), (fallback, [*text.encode()])):
        stream = eg.Stream(tokenizer)
        pieces = [stream.piece(token) for token in ids]
        assert "".join(pieces) + stream.rest() == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(pieces)
    stream = eg.Stream(fallback)  # of bytes that are no character something is said too
    assert all("".join(stream.piece(255) for _ in range(8)) for _ in range(9))


def test_a_stopped_generation_has_printed_and_kept_what_it_said(copied, edm_tokenizer, capsys,
                                                                monkeypatch):
    """Behind the token at which the signal comes; the next turn goes on there."""
    prompt = len(edm_tokenizer.encode("the sea", add_special_tokens=False).ids)
    argv = ["--generate", "the sea", "--new_tokens", "3000000"]
    recalled, said = eg.recalled, []

    def watched(*args):
        said.append(capsys.readouterr().out)
        if len(said) % 7 == 0:
            signal.raise_signal(signal.SIGINT)
        return recalled(*args)

    monkeypatch.setattr(eg, "recalled", watched)
    for turn in (1, 2):
        assert eg.main([*argv, "--memory_file", "notebook.pt"]) == 128 + signal.SIGINT
        err = capsys.readouterr().err
        assert "stopped; memory_file holds the text until here; go on behind it with:" in err
        assert "--memory_file notebook.pt" in err and "--resume" not in err
        model = em.EDMGPT2ForCausalLM.from_pretrained("checkpoints/edm_gpt2")
        state = eg.load_memory(model, "notebook.pt")
        assert int(state.start + state.fill) == turn * (prompt + 7)
    assert said[0].endswith("the sea") and any(said[1:7])  # as it comes
    assert eg.main(argv) == 128 + signal.SIGINT
    err = capsys.readouterr().err
    assert "stopped; nothing to save; run it again with:" in err and "--resume" not in err


def test_generate_goes_on_with_its_notebook(finished, edm_tokenizer, monkeypatch, capsys):
    """Two turns; then with a folder of an older version, which carries an edm_gpt2.py."""
    monkeypatch.chdir(finished.folder)
    argv = ["--generate", "the sea", "--new_tokens", "20", "--memory_file", "notebook.pt"]
    for _ in range(2):
        assert eg.main(argv) == 0
        assert "goes on" in capsys.readouterr().out
    saved = Path("checkpoints/edm_gpt2")
    model = em.EDMGPT2ForCausalLM.from_pretrained(saved)
    state = eg.load_memory(model, "notebook.pt")
    prompt = len(edm_tokenizer.encode("the sea", add_special_tokens=False).ids)
    assert int(state.start + state.fill) == 2 * (prompt + 20)

    config = (saved / "config.json").read_text()
    assert config.count("edm_model.EDM") == 3
    (saved / "config.json").write_text(config.replace("edm_model.EDM", "edm_gpt2.EDM"))
    (saved / "edm_model.py").rename(saved / "edm_gpt2.py")
    (saved / eg.SUMS).unlink()
    assert eg.main(argv) == 0


# ══ What a conclusion hangs on: splits, signs, controls ══════════════════════════════════════════
def test_measure_reads_both_splits_its_own_memory_and_that_of_another(edm_base):
    """Distances in windows of Config, of a model whose window is another too."""
    config = edm_config(topic_rows=0, window=W // 2)
    model = eg.build_model(edm_base, edm_config(), "both", 0).eval()
    with torch.no_grad():
        for memory in (model.edm, model.early, model.late):
            memory.alpha.fill_(0.5)
    corpus = SimpleNamespace(valid=draw(200, high=40), test=draw(151, seed=2, high=40))
    run = eg.measure(model, corpus, None, config, "both", 0)
    rows = config.eval_rows
    for split, stream in (("valid", corpus.valid), ("test", corpus.test)):
        nll = eg.evaluate(model, stream, rows)
        assert run[f"{split}_loss"] == pytest.approx(float(nll.sum()) / (len(stream) - 1))
        assert run[f"{split}_tokens"] == len(stream) - 1
    scored = dnc_gpt2.evaluation_rows(corpus.valid, rows)[1] != -100
    back = eg.windows_back(corpus.valid, rows, W // 2)
    for swap, name in ((False, ""), (True, "swapped_")):
        nll = eg.evaluate(model, corpus.valid, rows, swap=swap)
        assert run[f"{name}by_distance"] == eg.by_distance(nll, back, scored)
    assert run["swapped_loss"] == pytest.approx(float(nll.sum()) / 199)
    assert run["swapped_loss"] != run["valid_loss"]
    for name, swap in (("recall", False), ("recall_swapped", True)):
        assert run[name] == eg.planted_recall(model, corpus.valid, config, 0, swap)
    assert run["recall"] != run["recall_swapped"]


def test_share_of_the_gap_is_what_an_arm_gains_on_the_base(capsys):
    arms = {}
    for arm, valid in (("base", 3.0), ("edm", 2.9), ("full", 2.6)):
        arms[arm] = [{"window": 16, "valid_loss": valid, "test_loss": valid + 1,
                      "tokens_per_s": 7.0}]
    arms["edm"][0]["swapped_loss"] = 3.2
    eg.print_perplexity(arms, "gap")
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if "edm" in line]
    wanted = [f"{math.exp(nats):.2f}" for nats in (2.9, 3.2, 3.9)]
    assert row == ["edm", *wanted, "25", "%", "7"]


def test_what_another_row_s_memory_costs_is_above_zero():
    run = {"by_distance": [{"loss": 2.0}], "swapped_by_distance": [{"loss": 2.5}]}
    assert eg.lost_nats(run, 0) == 0.5


def test_memories_are_emptied_where_the_rows_begin_again(edm_base, monkeypatch):
    step, empty = eg.train_step, []

    def watched(model, optimizer, chunk, state, config):
        empty.append(not bool((state.start + state.fill).any()))
        return step(model, optimizer, chunk, state, config)

    monkeypatch.setattr(eg, "train_step", watched)
    config = edm_config(max_steps=5)  # an epoch has two steps
    stream = draw(2 * config.rows * config.bptt_segments * W + 1)
    eg.train_arm(edm_base, SimpleNamespace(train=stream), config, "both", 0)
    assert empty == [True, False, True, False, True]
