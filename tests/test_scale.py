"""Beyond one process and one pass: ranks, parts of a step, longer runs, large texts.

Ranks are real processes on gloo; where it matters who starts them, by torch.distributed.run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, error_line, flags, pseudo_english, tiny_config, write_corpus
from forkserver import forked_ranks
from test_resume import load, metric_rows, same

import dnc_gpt2

EXACT = ("model_state_dict", "optimizer_state_dict", "memory_state", "rng", "global_step",
         "stream_position")
# Rows for two ranks, emptied often, so that every draw by row matters.
RANKS = {**TINY, "bptt_segments": 1, "empty_share": 0.2, "max_steps": 12, "save_every_steps": 4,
         "log_every_steps": 2, "arms": "dnc"}


def outputs(folder: Path) -> dict:
    return {"save_dir": folder / "c", "plot_dir": folder / "p"}


@pytest.fixture(scope="module")
def texts(data_folder, tokenizer_folder) -> dict:
    return {"dataset": data_folder, "tokenizer": tokenizer_folder}


def start_ranks(fields: dict, ranks: int = 2, *options: str) -> subprocess.Popen:
    """Start the command under torch.distributed.run."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *launcher, *options, str(ROOT / "dnc_gpt2.py"), *flags(fields)], env=env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")


def launch(fields: dict) -> tuple[int, str]:
    """Exit code and output of the command under torch.distributed.run."""
    process = start_ranks(fields)
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out


def run_ranks(fields: dict) -> tuple[int, str]:
    """The highest exit code of two ranks of the command, and their output."""
    ranks = forked_ranks([str(ROOT / "dnc_gpt2.py"), *flags(fields)])
    try:
        out = "".join(rank.communicate()[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    return max(abs(rank.returncode) for rank in ranks), out


def final(folder: Path) -> dict:
    [path] = (folder / "c").glob("*FINAL*.pt")
    return load(path)


@pytest.fixture(scope="module")
def two_ranks(texts, tmp_path_factory) -> Path:
    """Folder of a run of two ranks, with dropout, never interrupted."""
    folder = tmp_path_factory.mktemp("ranks")
    code, out = run_ranks(RANKS | texts | outputs(folder))
    assert code == 0, out
    return folder


# ── ranks ───────────────────────────────────────────────────────────────────────────────────────


def test_two_ranks_give_the_curve_the_memory_and_the_results_of_one_process(texts, tmp_path, main,
                                                                            capfd):
    fields = RANKS | texts | {"dropout": 0.0, "seq_len": 15, "eval_rows": 5}  # rows 2 and 3
    assert run_ranks(fields | outputs(tmp_path / "two"))[0] == 0
    assert main(flags(fields | outputs(tmp_path / "one"))) == 0
    printed = capfd.readouterr().out
    assert printed.count("wrote ") == 3
    one, two = (metric_rows(tmp_path / name / "p") for name in ("one", "two"))
    assert len(one) == len(two) == 6 + 3
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        for key in ("loss", "top1_acc"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    for a, b in zip(one["memory_state"], two["memory_state"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for split in ("valid", "test", "swapped"):
        ours, theirs = one["results"][split], two["results"][split]
        assert torch.equal(ours["counts"], theirs["counts"])
        torch.testing.assert_close(ours["nll"], theirs["nll"], rtol=1e-3, atol=1e-4)


def test_ranks_drop_different_units_and_only_the_first_one_writes(two_ranks):
    states = final(two_ranks)["rng"]["ranks"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])
    steps = [row["step"] for row in metric_rows(two_ranks / "p") if row["split"] == "train"]
    assert steps == [2, 4, 6, 8, 10, 12]  # each once
    assert len(final(two_ranks)["memory_state"][0]) == RANKS["batch_size"]


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """The process ids of the ranks that it started, by rank."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True,
                            check=False).stdout.split()
    found = {}
    for pid in map(int, listed):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = [word.partition(b"=")[2] for word in environment if word.startswith(b"RANK=")]
        found |= {int(word): pid for word in words}
    return found


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_stops_the_other_and_a_restart_goes_on(killed, texts, two_ranks, tmp_path):
    """In a folder that has an older finished run: the restart takes none of its checkpoints."""
    shutil.copytree(two_ranks, tmp_path, dirs_exist_ok=True)
    (tmp_path / "p" / "metrics.jsonl").unlink()
    process = start_ranks(RANKS | texts | outputs(tmp_path), 2, "--max_restarts=1")
    try:
        deadline, rows = time.monotonic() + 90, []
        while not any(row["split"] == "validation" for row in rows):  # step 4 is being saved
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
            path = tmp_path / "p" / "metrics.jsonl"
            if path.exists():
                rows = [json.loads(line) for line in path.read_text().splitlines()[1:]
                        if line.endswith("}")]
        os.kill(ranks_of(process)[killed], signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, out
    assert "another is gone" in out and "Traceback" not in out
    assert re.search(r"resumed from .*_step4\.pt|no valid checkpoint", out), out
    assert "finished in" not in out
    expected, got = final(two_ranks), final(tmp_path)
    assert all(same(got[key], expected[key]) for key in EXACT)
    assert metric_rows(tmp_path / "p") == metric_rows(two_ranks / "p")


def test_two_ranks_resume_bit_for_bit_and_one_process_says_that_they_were_two(
        texts, two_ranks, tmp_path, main, capfd):
    for name in ("two", "one"):
        (tmp_path / name / "c").mkdir(parents=True)
        shutil.copy(two_ranks / "c" / "GPT2_+_DNC_step4.pt", tmp_path / name / "c")
    fields = RANKS | texts | {"resume": "auto"}
    code, out = run_ranks(fields | outputs(tmp_path / "two"))
    assert code == 0 and "resumed from" in out, out
    expected, got = final(two_ranks), final(tmp_path / "two")
    assert all(same(got[key], expected[key]) for key in EXACT)

    assert main(flags(fields | outputs(tmp_path / "one"))) == 0
    assert "saved by 2 processes, resumed by 1" in capfd.readouterr().out
    assert final(tmp_path / "one")["global_step"] == RANKS["max_steps"]


def test_rows_that_do_not_split_over_the_ranks_are_one_line(texts, tmp_path):
    code, out = launch(RANKS | texts | outputs(tmp_path) | {"batch_size": 5})
    assert code != 0 and "exitcode  : 2" in out
    [line] = [line for line in out.splitlines() if "error: " in line]
    assert "batch_size = 5" in line and "2 processes" in line


@pytest.mark.parametrize("environment, said", [
    ({"WORLD_SIZE": ""}, "WORLD_SIZE = ''"), ({"WORLD_SIZE": "2"}, "RANK = ''"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR = ''"),
    ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2"), ({"RANK": "0"}, "WORLD_SIZE = ''")])
def test_half_an_environment_of_torchrun_is_one_line(environment, said, texts, tmp_path, main,
                                                     capfd, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(flags(RANKS | texts | outputs(tmp_path))) == 2
    assert said in error_line(capfd.readouterr().err.replace("rank 2: ", ""))


def test_local_rank_chooses_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert dnc_gpt2.local_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dnc_gpt2.local_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK = '2': must be below the 2 CUDA devices"):
        dnc_gpt2.local_device()


# ── parts of a step, and blocks that are computed again ─────────────────────────────────────────


def trained(corpus, steps: int = 4, **fields) -> dnc_gpt2.Run:
    run = dnc_gpt2.start_run("dnc", tiny_config(**fields), corpus, torch.device("cpu"))
    rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
    for _ in range(steps):
        dnc_gpt2.train_step(run, run.model, rows)
    return run


def test_accumulated_parts_are_one_step_and_keep_the_memory_of_all_rows(corpus):
    fields = {"bptt_segments": 1, "empty_share": 0.3}
    whole, parts = (trained(corpus, **fields, accumulate=n) for n in (1, 4))
    assert whole.meter.loss == pytest.approx(parts.meter.loss, rel=1e-6)
    assert whole.meter.gate == pytest.approx(parts.meter.gate, rel=1e-6)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    assert len(parts.state.memory) == 4
    for ours, theirs in zip(whole.state, parts.state, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_first_backward_of_ranks_takes_no_more_rows_than_a_part(corpus, monkeypatch):
    """What fits only because of accumulate must fit there too."""
    seen = []

    def forward(tokens, targets, state, positions):
        seen.append((len(tokens), len(state.memory), None if positions is None else len(positions)))
        return run.model(tokens, targets, state, positions)

    config = tiny_config(bptt_segments=1, accumulate=2)
    run = dnc_gpt2.start_run("dnc", config, corpus, torch.device("cpu"))
    monkeypatch.setattr(dnc_gpt2, "rank_and_size", lambda: dnc_gpt2.Ranks(0, 2, 0))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: forward)
    dnc_gpt2.data_parallel(run, dnc_gpt2.Hardware(torch.device("cpu"), 0, "cpu"))
    rows = config.rows // 2 // 2
    assert seen == [(rows, rows, rows)]


def test_accumulate_has_to_divide_the_rows():
    with pytest.raises(ValueError, match="accumulate = 3: must be a divisor of the rows"):
        tiny_config(accumulate=3)


def test_checkpointed_activations_give_the_same_weights(corpus):
    plain, again = (trained(corpus, dropout=0.1, checkpoint_activations=flag)
                    for flag in (False, True))
    assert all(block.gradient_checkpointing for block in again.model.controller.h)
    assert same(again.model.state_dict(), plain.model.state_dict())
    assert same(again.optimizer.state_dict(), plain.optimizer.state_dict())


# ── a finished run goes on ──────────────────────────────────────────────────────────────────────


def test_lengthened_run_at_a_constant_rate_is_the_longer_run_bit_for_bit(texts, tmp_path, main,
                                                                          capfd):
    fields = RANKS | texts | {"lr_schedule": "constant", "lr_warmup": 0.0, "arms": "baseline,dnc"}
    short, long = outputs(tmp_path / "a"), outputs(tmp_path / "b")
    assert main(flags(fields | short | {"max_steps": 8})) == 0
    assert main(flags(fields | short | {"resume": "auto"})) == 0
    out = capfd.readouterr().out
    assert "GPT2 + DNC: finished at step 8, lengthened to 12: at its constant rate, as if" in out
    assert "GPT2 + DNC, seed 0: finished before at step 8; from there on the constant rate" in out
    assert main(flags(fields | long)) == 0
    for name in ("GPT2_Baseline_FINAL_step12.pt", "GPT2_+_DNC_FINAL_step12.pt"):
        ours, theirs = (load(tmp_path / folder / "c" / name) for folder in "ab")
        assert all(same(ours[key], theirs[key]) for key in (*EXACT, "history"))
        assert same(ours["results"]["test"], theirs["results"]["test"])
        assert ours["lengthened"] == [8] and theirs["lengthened"] == []


def test_lengthened_cosine_is_a_new_one_and_survives_an_interruption(corpus, texts, tmp_path, main,
                                                                     capfd):
    fields = RANKS | texts | outputs(tmp_path)
    assert main(flags(fields | {"max_steps": 8})) == 0
    assert main(flags(fields | {"resume": "auto"})) == 0
    first = capfd.readouterr().out
    assert "lengthened to 12: a new cosine over the steps that are new" in first
    rates = {row["step"]: row["lr"] for row in metric_rows(tmp_path / "p") if "lr" in row}
    assert rates[8] < 0.3 * rates[2] and rates[10] > 0.4 * rates[2] and rates[12] < rates[10]
    weights = final_of(tmp_path, 12)["model_state_dict"]
    for path in (tmp_path / "c").glob("*step12.pt"):  # as if killed after the lengthening
        path.unlink()
    config = dnc_gpt2.Config(**{key: str(value) if isinstance(value, Path) else value
                                for key, value in fields.items()}, precision="float32")
    run = dnc_gpt2.start_run("dnc", config, corpus, torch.device("cpu"))
    dnc_gpt2.resume_newest(run, corpus)
    assert dnc_gpt2.schedule(run) == (8, 12) and run.results == {}
    assert main(flags(fields | {"resume": "auto"})) == 0
    assert same(final_of(tmp_path, 12)["model_state_dict"], weights)


def final_of(folder: Path, step: int) -> dict:
    return load(folder / "c" / f"GPT2_+_DNC_FINAL_step{step}.pt")


def test_warm_up_that_differs_is_said(corpus, capfd):
    config = tiny_config(lr_schedule="constant", lr_warmup=0.5, max_steps=8)
    run = dnc_gpt2.start_run("dnc", config, corpus, torch.device("cpu"))
    run.step, run.total_steps = 4, 8
    dnc_gpt2.lengthen(run)
    assert "its warm-up had 2 steps, that of a run of 8 has 4" in capfd.readouterr().out


def test_fewer_steps_than_were_finished_are_refused(corpus, two_ranks):
    payload = final(two_ranks)
    config = dnc_gpt2.Config(**payload["config"] | {"max_steps": 8})
    run = dnc_gpt2.start_run("dnc", config, corpus, torch.device("cpu"))
    with pytest.raises(ValueError, match="max_steps = 12, this run has 8"):
        dnc_gpt2.check_match(run, payload, "x.pt", corpus)


# ── TensorBoard ─────────────────────────────────────────────────────────────────────────────────


def test_tensorboard_is_asked_for_before_training_where_it_is_missing(texts, tmp_path, main, capfd,
                                                                      monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    dnc_gpt2.tensorboard_writer.cache_clear()
    assert main(flags(RANKS | texts | outputs(tmp_path) | {"tensorboard": True})) == 2
    assert "pip install tensorboard" in error_line(capfd.readouterr().err)


def test_tensorboard_gets_every_figure_of_a_logged_row(tmp_path, monkeypatch):
    kept = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder = Path(folder)

        def add_scalar(self, name, value, step):
            kept.append((self.folder.name, name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("fake"))
    monkeypatch.setattr(sys.modules["torch.utils.tensorboard"], "SummaryWriter", Writer,
                        raising=False)
    dnc_gpt2.tensorboard_writer.cache_clear()
    config = tiny_config(tensorboard=True, plot_dir=str(tmp_path))
    row = {"arm": "GPT2 + DNC", "seed": 0, "step": 3, "split": "train", "loss": 1.5}
    dnc_gpt2.append_metrics(row, config)
    dnc_gpt2.tensorboard_writer.cache_clear()
    assert kept == [("GPT2 + DNC, seed 0, rate 0.003", "loss/train", 1.5, 3)]


# ── large texts ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_limits(monkeypatch, tmp_path) -> Path:
    """Every text is large, and its tokens are kept below tmp_path -> that folder."""
    for name, value in {"WHOLE": 500, "CHUNK": 400, "LONGEST": 90, "KEPT_FROM": 100}.items():
        monkeypatch.setattr(dnc_gpt2, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dnc_gpt2.say_once.cache_clear()
    return tmp_path / "cache" / "dnc_gpt2" / "tokens"


def encoded(tokenizer, text: str) -> list[int]:
    """Tokens by line, in one piece."""
    lines = text.splitlines(keepends=True)
    return [i for one in tokenizer.encode_batch(lines, add_special_tokens=False) for i in one.ids]


def test_text_in_pieces_and_from_the_file_is_the_text_in_one(small_limits, corpus, tmp_path, capfd):
    """Line ends of every kind, characters of several bytes, lines that are empty."""
    text = pseudo_english(400, 3) + "Łódź\r\n\r\nzwei\rdrei \u2028 vier 😀\n\n" * 9 + "no end"
    assert max(map(len, text.splitlines())) <= 90  # none is cut
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in dnc_gpt2.SPLITS:
        (folder / f"{split}.txt").write_bytes(text.encode())
    expected = encoded(corpus.tokenizer, (folder / "train.txt").read_text(encoding="utf-8"))
    [document] = dnc_gpt2.folder_texts(str(folder))["train"]
    pieces = [*dnc_gpt2.pieces_of(document)]
    assert len(pieces) > 5 and "".join(pieces) == document.text()
    first = dnc_gpt2.tokenize(corpus.tokenizer, [document])
    assert first.tolist() == expected and first.dtype == torch.int64
    assert "tokenizing a large text, once" in capfd.readouterr().out
    assert len([*small_limits.glob("*.int64")]) == 1 and not [*small_limits.glob("*.tmp")]


def test_second_start_maps_the_file_and_a_damaged_one_is_made_again(small_limits, corpus,
                                                                    monkeypatch, capfd):
    text = pseudo_english(300, 4)
    first = dnc_gpt2.tokenize(corpus.tokenizer, [text]).clone()
    [path] = small_limits.glob("*.int64")
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(dnc_gpt2, "encode_batch", None)  # nothing is tokenized
        assert torch.equal(dnc_gpt2.tokenize(corpus.tokenizer, [text]), first)
    for damaged in (whole[:-40], whole[:8] + b"\1" + whole[9:], b"", whole + b"\0" * 8):
        path.write_bytes(damaged)
        capfd.readouterr()
        assert torch.equal(dnc_gpt2.tokenize(corpus.tokenizer, [text]), first)
        assert "damaged" in capfd.readouterr().out and path.read_bytes() == whole
    dnc_gpt2.tokenize(corpus.tokenizer, [text + "x"])  # another text, another file
    dnc_gpt2.tokenize(dnc_gpt2.train_tokenizer([text], 300), [text])  # and tokenizer
    assert len([*small_limits.glob("*.int64")]) == 3


def test_cache_that_cannot_be_written_is_said_and_not_needed(small_limits, corpus, capfd):
    small_limits.parent.parent.mkdir()
    small_limits.parent.write_text("a file where the folder would be")
    text = pseudo_english(100, 4)
    assert dnc_gpt2.tokenize(corpus.tokenizer, [text]).tolist() == encoded(corpus.tokenizer, text)
    assert "tokens are not kept for the next start" in capfd.readouterr().out


@pytest.mark.parametrize("word", ["lem tor ", "x", "😀"])
def test_one_long_line_is_tokenized_in_bounded_pieces(word, small_limits, corpus, tmp_path, capfd,
                                                      monkeypatch):
    """With spaces: at them, without loss; without: at a fixed length, never within a character."""
    path = tmp_path / "line.txt"
    path.write_text(word * 2000, encoding="utf-8")
    sizes, encode = [], dnc_gpt2.encode_batch
    monkeypatch.setattr(dnc_gpt2, "encode_batch", lambda tokenizer, lines: (
        sizes.append((max(map(len, lines), default=0), sum(map(len, lines))))
        or encode(tokenizer, lines)))
    stream = dnc_gpt2.tokenize(corpus.tokenizer, [dnc_gpt2.TextFile(path, "x")])
    longest, batch = (max(column) for column in zip(*sizes, strict=True))
    assert longest <= 90 and batch <= 1300 and len(sizes) > 2
    assert corpus.tokenizer.decode(stream.tolist()) == word * 2000
    if " " in word:
        assert stream.tolist() == encoded(corpus.tokenizer, word * 2000)
    out = capfd.readouterr().out
    assert out.count("lines of more than 90 characters are cut at a space") == 1


def test_large_file_that_is_not_utf8_names_the_byte(small_limits, tmp_path):
    folder = write_corpus(tmp_path / "texts")
    content = (folder / "train.txt").read_bytes()
    (folder / "train.txt").write_bytes(content[:900] + b"\xff" + content[900:])
    config = tiny_config(dataset=str(folder), tokenizer="auto")
    with pytest.raises(ValueError, match=r"train\.txt is not UTF-8 \(at byte 900\)"):
        [*dnc_gpt2.TextFile(folder / "train.txt", config.dataset).pieces()]
    assert dataclasses.is_dataclass(dnc_gpt2.TextFile)
