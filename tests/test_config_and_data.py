"""Config, command line, bad input, and data: what is read, how it is cut, what is scored."""

from __future__ import annotations

import dataclasses
import http.client
import importlib.util
import math
import os
import re
import sys
import sysconfig
import threading
import time
import urllib.error
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, error_line, flags, pseudo_english, tiny_config, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

import dnc_gpt2
from dnc_gpt2 import Config

FIELDS = [field.name for field in dataclasses.fields(Config)]


def import_copy(path: Path, replacements: dict[str, str]):
    """Import a copy of dnc_gpt2.py in which each line fragment is replaced, as a user edits it."""
    source = (ROOT / "dnc_gpt2.py").read_text(encoding="utf-8")
    for old, new in replacements.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


# ── names, defaults, presets ────────────────────────────────────────────────────────────────────


def test_config_is_frozen_and_derives_rows():
    config = Config(batch_size=12, bptt_segments=4, seq_len=10, arms="dnc, baseline")
    assert (config.rows, config.step_len, config.arm_list) == (3, 40, ["dnc", "baseline"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


def presets(which: int) -> dict:
    """The fields of preset full (0) or small (1)."""
    return {name: values[which] for name, values in dnc_gpt2.PRESETS.items()}


def config_of(argv: list[str], cuda: bool, module=dnc_gpt2) -> tuple[Config, str]:
    """The Config of a command line, and the line about its preset."""
    fields, line = module.choose_preset(argv, cuda)
    return module.read_config(module.Config, argv, "", fields), line


def test_preset_full_is_what_is_shipped():
    assert dataclasses.replace(Config(), **presets(0)) == Config()


@pytest.mark.parametrize("cuda, chosen", [(True, "full"), (False, "small")])
def test_preset_auto_follows_the_device(cuda, chosen):
    wanted = presets(["full", "small"].index(chosen))
    config, line = config_of([], cuda)
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert line.startswith(chosen) and "CUDA" in line and "\n" not in line
    named, line = config_of(["--preset", chosen], not cuda)
    assert {name: getattr(named, name) for name in wanted} == wanted
    assert line == f"{chosen} (as asked)"


def test_preset_gives_way_to_the_command_line():
    """epochs too: max_steps overrides them, and a preset's would undo those that were given."""
    given = {"hidden_size": 768, "lr": 3e-4, "epochs": 3}  # two shipped values, by name
    config, _ = config_of(flags(given), cuda=False)
    assert {name: getattr(config, name) for name in given} == given
    assert config.num_layers == presets(1)["num_layers"] and config.max_steps == 0


def test_preset_gives_way_to_a_field_edited_in_the_file(tmp_path):
    edited = import_copy(tmp_path / "edited_dnc_gpt2.py", {
        "    lr: Positive = 3e-4 ": "    lr: Positive = 7e-4 ",
        "    num_layers: Count = 6 ": "    num_layers: Count = 3 ",
        '"full", "small"] = "auto" ': '"full", "small"] = "small" '})
    fields, line = edited.choose_preset([], cuda=True)
    assert not {"lr", "num_layers"} & fields.keys() and line.startswith("small")
    assert fields["hidden_size"] == presets(1)["hidden_size"]


# ── command line ────────────────────────────────────────────────────────────────────────────────


def test_command_line_takes_both_forms_and_the_declared_types():
    argv = ["--lr", "1e-3", "--hidden_size=64", "--use_links", "True", "--carry_memory=False",
            "--num_gpus", "1", "--text", "a = b --c", "--epochs", "2", "--dropout", "0"]
    wanted = {"lr": 1e-3, "hidden_size": 64, "use_links": True, "carry_memory": False,
              "num_gpus": 1, "text": "a = b --c", "epochs": 2, "dropout": 0.0}
    config, _ = config_of(argv, cuda=True)
    assert config == Config(**wanted)
    assert all(type(getattr(config, name)) is type(value) for name, value in wanted.items())
    last, _ = config_of(["--resume=x", "--resume", "auto", "--text=x=y"], cuda=True)
    assert (last.resume, last.text) == ("auto", "x=y")  # the later word counts


def test_paths_that_begin_with_a_tilde_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _ = config_of(["--dataset=~/texts", "--save_dir", "~/kept"], cuda=True)
    assert (config.dataset, config.save_dir) == (f"{tmp_path}/texts", f"{tmp_path}/kept")


# ── bad input: one line on stderr, exit code 2 ──────────────────────────────────────────────────

ABOVE_ZERO = ("hidden_size", "num_layers", "lr", "memory_lr", "grad_clip", "routing_fraction")
BAD_LINES = [
    *(([f"--{name}=0"], [name, "0", "above 0"]) for name in ABOVE_ZERO),
    (["--lr", "nan"], ["lr", "nan", "finite"]),
    (["--max_steps=-1"], ["max_steps", "-1", "0 or more"]),
    (["--dropout=1.5"], ["dropout", "1.5", "from 0 to 1"]),
    (["--seed", str(2**64)], ["seed", "2**32"]),  # more than a generator takes
    (["--eval_rows=1"], ["eval_rows", "2 or more"]),
    (["--hidden_size=100", "--num_heads=3"], ["hidden_size", "100", "num_heads", "3"]),
    (["--batch_size=4", "--bptt_segments=3"], ["bptt_segments", "3", "batch_size"]),
    (["--arms=dnc,gpt3"], ["arms", "gpt3", "baseline", "matched"]),
    (["--arms=dnc,dnc"], ["arms", "once"]),
    (["--arms="], ["arms"]),
    (["--memory=none"], ["memory", "none", "--arms baseline"]),
    (["--sharpen_links=True"], ["sharpen_links", "use_links"]),
    (["--text=  "], ["text"]),
    (["--num_gpus=2", "--use_compile=True"], ["use_compile", "num_gpus=1"]),
    (["--num_gpus=2", "--batch_size=4", "--bptt_segments=4"], ["num_gpus", "num_gpus=1"]),
    (["--inspect", "no-such-file.pt"], ["no-such-file.pt"]),
]
# What the parser itself refuses, with what helps: a suggestion, the choices, the type.
MISTYPED = [
    (["--hiden_size", "64"], ["--hiden_size", "--hidden_size"]),
    (["hidden_size=64"], ["hidden_size=64"]),
    (["--lr"], ["--lr", "Missing"]),
    (["--num_layers", "2.5"], ["--num_layers", "2.5", "transformer blocks"]),
    (["--use_links", "yes"], ["--use_links", "True", "False"]),
    (["--preset=huge"], ["--preset", "full", "small"]),
    (["--num_gpus=3"], ["--num_gpus", "auto"]),
]


@pytest.mark.parametrize("argv, said", [*MISTYPED, *BAD_LINES], ids=lambda x: " ".join(x)[:40])
def test_bad_line_is_refused_with_what_helps(argv, said, main, capfd, tmp_path, monkeypatch):
    """In one line, where it is not the parser that refuses it."""
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err and all(word in err for word in said), err
    if (argv, said) in BAD_LINES:
        assert err.count("\n") == 1 and error_line(err)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name, value, wanted", [
    ("hidden_size", "64", "a whole number"), ("hidden_size", 64.0, "a whole number"),
    ("hidden_size", True, "a whole number"), ("lr", "1e-3", "a finite number"),
    ("lr", math.inf, "a finite number"), ("use_links", 1, "True or False"), ("text", 5, "text"),
    ("num_gpus", 1.0, "one of auto, 0, 1, 2"), ("num_gpus", False, "one of auto, 0, 1, 2"),
    ("routing", "gain", "one of benefit, kl")])
def test_config_edited_in_the_file_refuses_a_wrong_type(name, value, wanted):
    with pytest.raises(ValueError, match=f"{name} = .*must be {wanted}"):
        Config(**{name: value})


def bad_folders(folder: Path) -> dict[str, tuple[dict, list[str]]]:
    """Overrides that are wrong in what they name, and what the refusal must say."""
    blocked = folder / "a-file"
    blocked.write_text("not a folder")
    for name in ("missing", "none", "latin", "short-train", "short-valid", "short-test"):
        write_corpus(folder / name)
    (folder / "missing" / "test.txt").unlink()
    (folder / "none" / "valid.txt").write_text("\n \n")
    (folder / "latin" / "train.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 99)
    for split in ("train", "valid", "test"):
        (folder / f"short-{split}" / f"{split}.txt").write_text("A few words.\n")
    for name in ("empty", "empty-tokenizer", "broken-tokenizer"):
        (folder / name).mkdir()
    (folder / "broken-tokenizer" / "tokenizer.json").write_text("{")
    way_out = "train.txt, valid.txt"
    data = {
        "no such folder": ("./no-such-folder", ["no-such-folder", way_out]),
        "no such absolute folder": (folder / "nowhere", ["nowhere", way_out]),
        "empty folder": (folder / "empty", ["empty", "train.txt", "missing"]),
        "a split missing": (folder / "missing", ["test.txt is missing"]),
        "a split empty": (folder / "none", ["valid.txt has none"]),
        "not UTF-8": (folder / "latin", ["train.txt", "UTF-8", "byte 3"]),
        "hub id that cannot be had": ("no-one/no-such-data", ["no-one/no-such-data", way_out]),
        **{f"{split} short": (folder / f"short-{split}", [split, "tokens", f"a smaller {field}"])
           for split, field in (("train", "batch_size"), ("valid", "eval_rows"),
                                ("test", "eval_rows"))}}
    found = {case: ({"dataset": path}, ["dataset", *said]) for case, (path, said) in data.items()}
    for case, path in {"no such tokenizer": "./no-such-tokenizer", "hub tokenizer": "no-one/no-tok",
                       "empty tokenizer folder": folder / "empty-tokenizer",
                       "broken tokenizer": folder / "broken-tokenizer"}.items():
        found[case] = {"tokenizer": path}, ["tokenizer", str(path), "folder"]
    for field in ("save_dir", "plot_dir"):
        found[f"{field} under a file"] = {field: blocked / "out"}, [field, "a-file", "another"]
    found["init_from that cannot be had"] = {"init_from": "no-one/no-gpt2"}, ["init_from", "folder"]
    return found


def test_bad_folder_is_refused_in_one_line(main, capfd, tmp_path, tiny_argv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = {"save_dir": tmp_path / "checkpoints", "plot_dir": tmp_path / "plots"}
    for case, (overrides, said) in bad_folders(tmp_path).items():
        assert main([*tiny_argv, *flags(outputs | overrides)]) == 2, case
        out, err = capfd.readouterr()
        assert err.count("\n") == 1, (case, err)
        line = error_line(err)
        assert all(word in line for word in said), (case, line)
        assert "parameters" not in out  # no arm was built


def test_bad_input_of_the_real_command_prints_one_line(run_cli, tiny_argv, tmp_path):
    """What the process prints, the hub's libraries included: nothing but the one line."""
    outputs = flags({"save_dir": tmp_path / "c", "plot_dir": tmp_path / "p"})
    for argv, said in ((["--lr_warmup", "2"], "lr_warmup"),
                       ([*tiny_argv, *outputs, "--tokenizer=no-one/no-tok"], "no-one/no-tok"),
                       ([*tiny_argv, *outputs, "--dataset=no-one/no-data"], "no-one/no-data")):
        done = run_cli(argv)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and said in error_line(done.stderr), done.stderr


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


@given(extra=st.integers(1, 400), rows=st.integers(1, 5), seq_len=st.integers(1, 9),
       segments=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_training_rows_are_contiguous_disjoint_and_shifted(extra, rows, seq_len, segments):
    step_len = seq_len * segments
    stream = torch.arange(rows * step_len + extra)  # position = token: every overlap would show
    cut = dnc_gpt2.training_rows(stream, rows, step_len)
    steps = (len(stream) - 1) // (rows * step_len)
    assert cut.shape == (rows, steps * step_len + 1)
    assert (cut[:, 1:] == cut[:, :-1] + 1).all()  # contiguous: the target is the next token
    inputs = cut[:, :-1].flatten()
    assert len(inputs.unique()) == len(inputs)  # rows are disjoint
    assert cut[0, 0] == 0 and (cut[1:, 0] == cut[:-1, -1]).all()  # and follow each other
    assert len(stream) - 1 - len(inputs) < rows * step_len  # less than one step is left out


@given(length=st.integers(2, 300), rows=st.integers(1, 9))
@settings(max_examples=120, deadline=None)
def test_evaluation_rows_score_every_token_but_the_first_once(length, rows):
    stream = torch.arange(1000, 1000 + length)
    inputs, targets = dnc_gpt2.evaluation_rows(stream, rows)
    assert inputs.shape == targets.shape == (rows, math.ceil((length - 1) / rows))
    scored = targets != -100
    assert torch.equal(targets[scored], stream[1:])  # each once, in order, and nothing else
    assert torch.equal(inputs[scored], stream[:-1])  # each predicted from the token before it
    flat = scored.flatten()
    assert not (flat[1:] & ~flat[:-1]).any()  # what fills up stands at the end alone


def test_load_corpus_reads_the_folder_without_losing_or_padding_a_token(data_folder, corpus):
    for split in ("train", "valid", "test"):
        stream = getattr(corpus, split)
        text = (Path(data_folder) / f"{split}.txt").read_text(encoding="utf-8")
        assert stream.dtype == torch.int64 and stream.dim() == 1
        assert corpus.tokenizer.decode(stream.tolist()) == text
    assert "tiny-corpus" in corpus.name and "tiny-bpe" in corpus.name and "300" in corpus.name


def test_load_corpus_ignores_padding_and_truncation_saved_with_a_tokenizer(
        tokenizer_folder, data_folder, corpus, tmp_path):
    """tokenizer.json keeps both if they were on when it was saved: pads would be scored."""
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(tokenizer_folder) / "tokenizer.json"))
    tokenizer.enable_padding(length=64, pad_id=0)
    tokenizer.enable_truncation(max_length=5)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    again = dnc_gpt2.load_corpus(tiny_config(dataset=data_folder, tokenizer=str(tmp_path)))
    assert torch.equal(again.train, corpus.train)


def test_load_corpus_fingerprint_depends_on_the_text(tmp_path, corpus, tokenizer_folder):
    def load(folder: Path) -> dnc_gpt2.Corpus:
        config = tiny_config(dataset=str(folder), tokenizer=tokenizer_folder)
        return dnc_gpt2.load_corpus(config)

    folder = write_corpus(tmp_path / "other-name")
    assert load(folder).fingerprint == corpus.fingerprint
    with open(folder / "test.txt", "a", encoding="utf-8") as file:
        file.write("x")
    assert load(folder).fingerprint != corpus.fingerprint


# ── own tokenizer, embedded corpus ──────────────────────────────────────────────────────────────


def test_train_tokenizer_is_deterministic_and_loses_nothing():
    texts = [pseudo_english(3000, 5)]
    first, second = (dnc_gpt2.train_tokenizer(texts, vocab_size=400) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 400
    strange = "Łódź\t 1879 — 😀\r\n  two  spaces\n\n"  # bytes that training has not seen
    for text in (strange, texts[0][:500]):
        assert first.decode(dnc_gpt2.tokenize(first, [text]).tolist()) == text


def test_own_tokenizer_has_the_same_tokens_of_a_text_as_of_its_lines():
    """So that a prompt, and an exported folder, read a text as training did."""
    indented = "def f():\n\n    return 1\n\n\n  end  \n" * 30
    tokenizer = dnc_gpt2.train_tokenizer([indented], vocab_size=400)
    assert any("Ċ" in entry[:-1] for entry in tokenizer.get_vocab())  # it learnt several lines
    whole = tokenizer.encode(indented, add_special_tokens=False).ids
    assert whole == dnc_gpt2.encode_text(tokenizer, indented)


def test_vocabulary_that_is_too_small_for_the_threshold_is_said(corpus, capsys):
    config = tiny_config(min_surprisal=6.0)
    dnc_gpt2.say_where_ids_are_not_by_frequency(config, corpus)
    assert "min_surprisal: 6 nats are above log 300, 5.7" in capsys.readouterr().out
    dnc_gpt2.say_where_ids_are_not_by_frequency(tiny_config(), corpus)
    assert capsys.readouterr().out == ""


@pytest.fixture
def small_library(tmp_path, monkeypatch) -> Path:
    """A standard library of a few files, where the real one takes seconds to read."""
    library = tmp_path / "lib"
    for name in ("a/__init__", "a/one", "a/two", "test/test_a", "a/tests/x", "site-packages/dep"):
        path = library / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""About {name}."""\n\ndef f():\n    "F in {name}."\n')
    shared = '"""A docstring that many modules of this library repeat."""'
    for i in range(30):
        method = f"    def m(self):\n        {shared}\n"
        source = f'{shared}\n\nclass C:\n    """C number {i}."""\n{method}'
        (library / f"module_{i}.py").write_text(source)
    (library / "template.py").write_text("def {{name}}(:\n")
    paths = sysconfig.get_paths() | {"stdlib": str(library)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda *args, **kwargs: paths)
    return library


def test_embedded_texts_leave_out_tests_and_repetitions(small_library):
    texts = dnc_gpt2.embedded_texts()
    everything = "".join(sum(texts.values(), []))
    assert everything.count("A docstring that many modules") == 1
    assert all(everything.count(f"C number {i}.") == 1 for i in range(30))
    assert "About a/one." in everything and "F in a/two." in everything
    assert not re.search("About (test|a/tests|site-packages)", everything)


def test_embedded_texts_do_not_depend_on_the_order_of_files(small_library, monkeypatch):
    first, rglob = dnc_gpt2.embedded_texts(), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, *a: reversed(sorted(rglob(self, *a))))
    assert dnc_gpt2.embedded_texts() == first


def test_embedded_texts_share_no_document_and_no_paragraph():
    """Of the real library: text seen in training must not come back in what is scored."""
    texts = dnc_gpt2.embedded_texts()
    sizes = {split: sum(map(len, documents)) for split, documents in texts.items()}
    assert sizes["train"] > 1_000_000 and min(sizes.values()) > 50_000
    for split, other in (("valid", "train"), ("test", "train"), ("test", "valid")):
        assert not set(texts[split]) & set(texts[other])
        mine, theirs = ({part.strip() for document in texts[s] for part in document.split("\n\n")
                         if len(part.strip()) >= 80} for s in (split, other))
        shared = mine & theirs
        share = sum(map(len, shared)) / sizes[split]
        assert share < 0.002, (split, other, share, sorted(shared, key=len)[-1][:200])


# ── hub and fallback ────────────────────────────────────────────────────────────────────────────


class Hub:
    """A stand-in for the hub: what is asked of it, and whether it has it."""

    def __init__(self, tokenizer_folder: str):
        self.asked, self.has_data, self.has_tokenizer = [], True, True
        self.splits, self.column = ("train", "validation", "test"), "text"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)

    def load_dataset(self, *names, **kwargs):
        self.asked.append(names)
        if not self.has_data:
            raise ConnectionError("Couldn't reach the hub\nsecond line")
        words = {"train": 260, "validation": 150, "test": 110}
        return datasets.DatasetDict({
            split: datasets.Dataset.from_dict(
                {self.column: pseudo_english(words[split], seed).splitlines(keepends=True)})
            for seed, split in enumerate(words) if split in self.splits})

    def from_pretrained(self, name, *args, **kwargs):
        self.asked.append(name)
        if not self.has_tokenizer:
            raise OSError(f"{name} is not there\nsecond line")
        return self.tokenizer


@pytest.fixture
def hub(monkeypatch, tokenizer_folder) -> Hub:
    stand_in = Hub(tokenizer_folder)
    monkeypatch.setattr(dnc_gpt2, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", stand_in.from_pretrained)
    return stand_in


def small_embedded() -> dict[str, list[str]]:
    return {split: [pseudo_english(words, 9)]
            for split, words in (("train", 800), ("valid", 300), ("test", 200))}


def test_hub_auto_takes_wikitext_and_the_gpt2_tokenizer(hub, capsys):
    corpus = dnc_gpt2.load_corpus(tiny_config(dataset="auto", tokenizer="auto"))
    assert hub.asked == [("Salesforce/wikitext", "wikitext-2-raw-v1"), "gpt2"]
    assert "wikitext-2-raw-v1" in corpus.name and "gpt2" in corpus.name
    assert corpus.tokenizer.decode(corpus.train.tolist()) == pseudo_english(260, 0)
    assert corpus.tokenizer.decode(corpus.valid.tolist()) == pseudo_english(150, 1)
    assert capsys.readouterr().out == ""  # no downgrade


@pytest.mark.parametrize("dataset, asked", [("some-one/data", ("some-one/data", None)),
                                            ("some-one/data:de", ("some-one/data", "de"))])
def test_hub_dataset_is_asked_for_by_name_and_its_only_column_is_the_text(hub, dataset, asked):
    hub.column = "sentence"
    corpus = dnc_gpt2.load_corpus(tiny_config(dataset=dataset, tokenizer="some-one/tok"))
    assert hub.asked == [asked, "some-one/tok"]
    assert "some-one/data" in corpus.name and "tok" in corpus.name
    assert corpus.tokenizer.decode(corpus.train.tolist()) == pseudo_english(260, 0)


def test_hub_dataset_without_a_split_says_what_takes_its_place(hub, capsys):
    hub.splits = ("train", "validation")
    corpus = dnc_gpt2.load_corpus(tiny_config(dataset="some-one/data", tokenizer="some/tok"))
    assert torch.equal(corpus.test, corpus.valid)
    assert "no test split" in capsys.readouterr().out
    hub.splits = ("train",)
    texts = dnc_gpt2.hub_texts("some-one/data")
    assert "no validation split; the last" in capsys.readouterr().out
    assert texts["train"][0] + texts["valid"][0] == pseudo_english(260, 0)


def test_rows_of_a_hub_dataset_are_lines():
    rows = ["The end.", "", " = A = \n"]
    assert [dnc_gpt2.line_of(row) for row in rows] == ["The end.\n", "", " = A = \n"]


def test_hub_auto_falls_back_to_the_embedded_corpus_and_says_so(hub, capsys, monkeypatch):
    hub.has_data = False
    monkeypatch.setattr(dnc_gpt2, "embedded_texts", small_embedded)
    corpus = dnc_gpt2.load_corpus(tiny_config(dataset="auto", tokenizer="auto"))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "Salesforce/wikitext" in out and "embedded" in out
    assert "train.txt" in out  # how to get the real thing without a hub
    assert "embedded" in corpus.name and "Python" in corpus.name and "own BPE" in corpus.name
    assert "gpt2" not in hub.asked  # its tokenizer is trained on the corpus
    texts = small_embedded()
    assert corpus.tokenizer.decode(corpus.valid.tolist()) == "".join(texts["valid"])
    of_train = dnc_gpt2.train_tokenizer(texts["train"])  # valid and test are not looked at
    assert corpus.tokenizer.to_str() == of_train.to_str()


def test_hub_auto_tokenizer_falls_back_to_its_own_and_says_so(hub, capsys, data_folder):
    hub.has_tokenizer = False
    corpus = dnc_gpt2.load_corpus(tiny_config(dataset=data_folder, tokenizer="auto"))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "gpt2" in out and "training split" in out
    assert "own BPE" in corpus.name and "tiny-corpus" in corpus.name


def test_own_tokenizer_asks_no_hub_and_serves_no_pretrained_model(hub, data_folder):
    """Whatever a hub or its cache has: so is a figure of the own BPE run again elsewhere."""
    corpus = dnc_gpt2.load_corpus(tiny_config(dataset=data_folder, tokenizer="own"))
    assert "own BPE" in corpus.name and hub.asked == []
    with pytest.raises(ValueError, match="tokenizer = 'own': must be that of the model"):
        tiny_config(tokenizer="own", init_from="gpt2", arms="baseline,dnc")


@pytest.fixture
def fresh_hub_state(monkeypatch):
    """hub_reachable asks anew, and what it sets in the environment is taken back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    dnc_gpt2.hub_reachable.cache_clear()
    yield monkeypatch
    dnc_gpt2.hub_reachable.cache_clear()


def test_hub_that_never_answers_is_given_up_within_the_bound(fresh_hub_state):
    """A name server or a proxy that swallows packets: no socket timeout covers it."""
    monkeypatch, release = fresh_hub_state, threading.Event()

    def urlopen(*args, **kwargs):
        release.wait(60)
        raise OSError("no answer")

    monkeypatch.setattr(dnc_gpt2.urllib.request, "urlopen", urlopen)
    bound = dnc_gpt2.HUB_SECONDS
    monkeypatch.setattr(dnc_gpt2, "HUB_SECONDS", 0.4)
    monkeypatch.setattr(dnc_gpt2, "embedded_texts", small_embedded)
    started = time.monotonic()
    try:
        corpus = dnc_gpt2.load_corpus(tiny_config(dataset="auto", tokenizer="auto"))
        took = time.monotonic() - started
    finally:
        release.set()
    assert "embedded" in corpus.name
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # so that no library waits for it again
    assert took - 0.4 + bound < 10  # "where it cannot be reached within 10 s in all"


def test_hub_that_answers_nonsense_is_given_up_without_a_word(fresh_hub_state, capfd):
    """A proxy's log-in page, a port of another service: neither OSError nor ValueError."""
    def urlopen(*args, **kwargs):
        raise http.client.BadStatusLine("SSH-2.0-OpenSSH")

    shown = []
    fresh_hub_state.setattr(threading, "excepthook", shown.append)
    fresh_hub_state.setattr(dnc_gpt2.urllib.request, "urlopen", urlopen)
    assert not dnc_gpt2.hub_reachable()
    assert not shown and capfd.readouterr().err == ""


@pytest.mark.parametrize("mirror", [True, False])
def test_an_error_at_the_root_is_an_answer_of_a_mirror_alone(mirror, fresh_hub_state):
    """A mirror may have nothing there; of the hub itself it is a firewall's word."""
    def urlopen(url, **kwargs):
        raise urllib.error.HTTPError(url, 404, "Not Found", {}, None)

    fresh_hub_state.delenv("HF_ENDPOINT", raising=False)
    if mirror:
        fresh_hub_state.setenv("HF_ENDPOINT", "https://mirror.example")
    fresh_hub_state.setattr(dnc_gpt2.urllib.request, "urlopen", urlopen)
    assert dnc_gpt2.hub_reachable() == mirror
    assert os.environ["HF_HUB_OFFLINE"] == ("0" if mirror else "1")


def test_lines_of_a_tokenizer_that_puts_a_space_before_a_text_stay_as_they_are():
    """SentencePiece's kind: line by line every line would begin with a space."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = "▁ \nabcdefghijklmnopqrstuvwxyz"
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    text = "a line\nanother line\nthird\n"
    assert not dnc_gpt2.cuts_at_lines(tokenizer)
    ids = torch.cat([*dnc_gpt2.encode_lines(tokenizer, [text])]).tolist()
    assert tokenizer.decode(ids) == text


def test_whole_lines_are_the_text_in_bounded_parts(monkeypatch):
    monkeypatch.setattr(dnc_gpt2, "LONGEST", 10)
    text = "ab\ncd\nefgh\n" + 25 * "x" + "\n\nend"
    parts = [*dnc_gpt2.whole_lines(text)]
    assert parts == ["ab\ncd\n", "efgh\n", 25 * "x" + "\n", "\nend"]


def test_hub_that_answers_leaves_the_libraries_online(fresh_hub_state):
    class Answer:
        def close(self):
            pass

    asked = []
    fresh_hub_state.setattr(dnc_gpt2.urllib.request, "urlopen",
                            lambda url, **k: asked.append((url, k)) or Answer())
    assert dnc_gpt2.hub_reachable() and dnc_gpt2.hub_reachable()
    assert len(asked) == 1 and asked[0][1]["timeout"] <= 10
    assert os.environ["HF_HUB_OFFLINE"] == "0"
