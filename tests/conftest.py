"""What the tests of dnc_gpt2.py share: a tiny corpus and tokenizer, a tiny run, and the command.

Everything is offline and on one thread, in this process and in those that it starts, so that two
runs of one command can be compared bit for bit.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's libraries are first imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from forkserver import Forked
from pictures import draw_on_demand

import dnc_gpt2

torch.set_num_threads(1)
draw_on_demand()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: kernels on the CPU

ROOT = Path(__file__).resolve().parent.parent

# A two-arm run of seconds: dropout, so that the random state matters; more steps than an epoch has,
# so that the memory is emptied on the way; logging that does not fall on the checkpoints.
TINY = {
    "hidden_size": 32, "num_layers": 1, "num_heads": 2, "mem_slots": 8, "mem_width": 8,
    "num_reads": 2, "batch_size": 4, "seq_len": 16, "bptt_segments": 2, "dropout": 0.1,
    "max_steps": 40, "lr": 3e-3, "routing_fraction": 0.25, "log_every_steps": 4,
    "save_every_steps": 6, "eval_tokens": 200, "eval_rows": 4, "num_gpus": 0,
    "min_surprisal": 5.7,  # log of its vocabulary: before training some tokens are written
}  # fmt: skip


def flags(fields: dict) -> list[str]:
    """{"lr": 0.1} -> ["--lr=0.1"]."""
    return [f"--{name}={value}" for name, value in fields.items()]


def tiny_config(**fields) -> dnc_gpt2.Config:
    """A Config of tiny sizes, dropout off unless asked for, as train and evaluate take it."""
    return dnc_gpt2.Config(**{**TINY, "dropout": 0.0, "precision": "float32", **fields})


def pseudo_english(words: int, seed: int) -> str:
    """Deterministic text with some structure: a Zipf vocabulary, sentences, lines, capitals."""
    draw = random.Random(seed)
    syllables = "ba den fi gor hul ka lem ni or pe ras sto tu vel wim".split()
    lexicon_draw = random.Random(0)  # the same words in every split
    lexicon = ["".join(lexicon_draw.choices(syllables, k=lexicon_draw.randint(1, 3)))
               for _ in range(60)]
    weights = [1 / (rank + 1) for rank in range(len(lexicon))]
    lines, left = [], words
    while left > 0:
        length = min(left, draw.randint(4, 11))
        line = " ".join(draw.choices(lexicon, weights, k=length))
        lines.append(line.capitalize() + draw.choice(".,?") + "\n")
        left -= length
    return "".join(lines)


def write_corpus(folder: Path, train: int = 260, valid: int = 150, test: int = 110) -> Path:
    """Write a data folder of so many pseudo-English words a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, words) in enumerate({"train": train, "valid": valid, "test": test}.items()):
        (folder / f"{split}.txt").write_text(pseudo_english(words, seed + 1), encoding="utf-8")
    return folder


class Finished(NamedTuple):
    """One uninterrupted run of the command."""

    argv: list[str]  # without save_dir and plot_dir
    save_dir: Path
    plot_dir: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("data") / "tiny-corpus"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    """A byte-level BPE of 300 entries, saved as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False)
    tokenizer.train_from_iterator([pseudo_english(2000, 1)], trainer)
    folder = tmp_path_factory.mktemp("tokenizers") / "tiny-bpe"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def corpus(data_folder, tokenizer_folder) -> dnc_gpt2.Corpus:
    """The tiny corpus, tokenized."""
    return dnc_gpt2.load_corpus(tiny_config(dataset=data_folder, tokenizer=tokenizer_folder))


def start_cli(argv: list[str], code: str = "", **options) -> Forked:
    """Start the real command, or a driver's `code` in its place, offline and on one thread."""
    script = ["-c", code] if code else [str(ROOT / "dnc_gpt2.py")]
    return Forked([*script, *argv], **options)


@pytest.fixture(scope="session")
def run_cli():
    """run_cli(argv) -> the finished process: returncode, stdout, stderr."""

    def run(argv: list[str], timeout: float = 180, **options) -> subprocess.CompletedProcess:
        process = start_cli(argv, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def tiny_argv(data_folder, tokenizer_folder) -> list[str]:
    """The command line of the tiny two-arm run, without its output folders."""
    return flags({"dataset": data_folder, "tokenizer": tokenizer_folder, **TINY})


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_argv, run_cli) -> Finished:
    """The tiny two-arm run, never interrupted. Its folders are not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    save_dir, plot_dir = folder / "checkpoints", folder / "plots"
    done = run_cli([*tiny_argv, f"--save_dir={save_dir}", f"--plot_dir={plot_dir}"],
                   env=os.environ | {"DRAW_PICTURES": "1"})
    assert done.returncode == 0, done.stderr
    return Finished(tiny_argv, save_dir, plot_dir, done.stdout, done.stderr)


@pytest.fixture
def drawn(monkeypatch) -> None:
    """Pictures are drawn in this test."""
    monkeypatch.setenv("DRAW_PICTURES", "1")


@pytest.fixture
def main():
    """dnc_gpt2.main in this process; the signal handlers that it installs are taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield dnc_gpt2.main
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def edm_tokenizer():
    """A BPE of at most 97 entries over lower-case text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=97, special_tokens=["?", "<end>"], show_progress=False)
    text = "the city was built on a hill by the river and the sea"
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def edm_base(edm_tokenizer):
    """The base of edm_oracle, as edm_gpt2 freezes it."""
    from edm_oracle import make_base

    import edm_gpt2

    base = make_base()
    return edm_gpt2.Base("tiny", base.config.to_dict(), base.transformer.state_dict(),
                         edm_tokenizer, origin="")


def error_line(captured_err: str) -> str:
    """The one line that a user's mistake prints, after progress bars if any; no traceback."""
    assert "Traceback" not in captured_err, captured_err
    lines = captured_err.replace("\r", "\n").strip().splitlines()
    assert lines and lines[-1].startswith("error: "), captured_err
    assert sum(line.startswith("error: ") for line in lines) == 1, captured_err
    return lines[-1]


def pytest_collection_modifyitems(items) -> None:
    """The kernels' tests first: then one process compiles them, and the other finds them compiled
    when it takes over what is left."""
    items.sort(key=lambda item: item.path.name != "test_dnc_scan.py")


# ── counts of the fault suite ────────────────────────────────────────────────────────────────────
@pytest.fixture
def fault(request):
    """fault(kind, survived) counts a try; the counts are printed when all tests are done."""

    def count(kind: str, survived: bool) -> None:
        request.node.user_properties.append(("fault", [kind, bool(survived)]))
        assert survived, kind

    return count


def pytest_terminal_summary(terminalreporter) -> None:
    """Print tried and survived of every kind of fault, from whatever worker."""
    counts: dict[str, list[int]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") != "call":
                continue
            for name, value in report.user_properties:
                if name == "fault":
                    row = counts.setdefault(value[0], [0, 0])
                    row[0] += 1
                    row[1] += value[1]
    if counts:
        terminalreporter.section("faults: tried, survived")
        for kind, (tried, survived) in sorted(counts.items()):
            terminalreporter.write_line(f"{kind:<44} {tried:>6,} {survived:>6,}")
