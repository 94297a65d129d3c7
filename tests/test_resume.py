"""Checkpoints, exact resume, and what a finished run leaves behind.

Two runs are "the same" when weights, optimizer, memory and random state are equal bit for bit, and
metrics.jsonl and everything that is printed from the table on are equal but for speed and memory.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Finished, error_line, flags, start_cli, tiny_config

import dnc_gpt2

STEPS, EVERY = TINY["max_steps"], TINY["save_every_steps"]
STEMS = {"baseline": "GPT2_Baseline", "dnc": "GPT2_+_DNC"}
FINALS = {arm: f"{stem}_FINAL_step{STEPS}.pt" for arm, stem in STEMS.items()}
LAST_STEP = STEPS // EVERY * EVERY  # of the newest step checkpoint


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    """Equality of nested plain values and tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def metric_rows(plot_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl behind the one that tells of the run."""
    first, *rows = map(json.loads, (plot_dir / "metrics.jsonl").read_text().splitlines())
    assert {"versions", "device", "command"} <= first["run"].keys()
    return rows


def report(stdout: str) -> list[str]:
    """What is printed from the table on, without the two rows that measure the machine."""
    lines = stdout[stdout.index("FINAL COMPARISON") :].splitlines()
    return [line for line in lines
            if not re.match(r"  (Training tokens/s|Peak memory|At equal time)|wrote ", line)]


def assert_same_run(finished: Finished, folder: Path, stdout: str) -> None:
    """The run in `folder` ended as the one that was never interrupted."""
    for name in FINALS.values():
        ours, theirs = load(folder / "checkpoints" / name), load(finished.save_dir / name)
        for key in ("model_state_dict", "optimizer_state_dict", "memory_state", "rng", "history",
                    "global_step", "epoch", "stream_position", "val_ppl"):
            assert same(ours[key], theirs[key]), (name, key)
        for split in ("valid", "test"):
            assert same(ours["results"][split], theirs["results"][split])
    assert report(stdout) == report(finished.stdout)
    assert metric_rows(folder / "plots") == metric_rows(finished.plot_dir)
    assert not list((folder / "checkpoints").glob("*.tmp*"))


def outputs(folder: Path) -> list[str]:
    return flags({"save_dir": folder / "checkpoints", "plot_dir": folder / "plots"})


@pytest.fixture
def partial(finished, tmp_path):
    """partial(arm, step) -> a folder as the finished run had left it when `arm` stood at `step`."""

    def leave(arm: str, newest: int) -> Path:
        for folder in (finished.save_dir, finished.plot_dir):
            shutil.copytree(folder, tmp_path / folder.name)
        for name in ("baseline", "dnc"):
            behind = arm == "baseline" and name == "dnc"  # this arm had not begun
            for path in (tmp_path / "checkpoints").glob(f"{STEMS[name]}_*step*.pt"):
                step = int(re.search(r"step(\d+)", path.name)[1])
                if behind or (name == arm and (step > newest or "FINAL" in path.name)):
                    path.unlink()
        return tmp_path

    return leave


# ── what a finished run leaves ──────────────────────────────────────────────────────────────────


def test_finished_run_leaves_its_checkpoints_measurements_and_pictures(finished):
    steps = range(EVERY, STEPS, EVERY)
    expected = {f"{stem}_step{step}.pt" for stem in STEMS.values() for step in steps}
    assert {path.name for path in finished.save_dir.glob("*.pt")} == expected | set(FINALS.values())
    pictures = "training_curves.png", "memory_trace.png", "where_memory_helps.png"
    assert {path.name for path in finished.plot_dir.iterdir()} == {
        *pictures, ".dnc_gpt2.lock", "metrics.jsonl", "report.md", "results.json"}
    for name in pictures:
        content = (finished.plot_dir / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000


@pytest.mark.parametrize("arm", ["baseline", "dnc"])
def test_checkpoint_holds_what_contract_4_asks_for(finished, arm, corpus):
    for name, step in ((f"{STEMS[arm]}_step{EVERY}.pt", EVERY), (FINALS[arm], STEPS)):
        payload = load(finished.save_dir / name)  # weights_only
        assert {"model_state_dict", "optimizer_state_dict", "global_step", "epoch", "val_ppl",
                "config", "rng", "stream_position", "memory_state", "history"} <= payload.keys()
        per_epoch = (len(corpus.train) - 1) // 64
        assert (payload["global_step"], payload["epoch"]) == (step, step // per_epoch)
        assert payload["stream_position"] == step % per_epoch * 32
        assert payload["val_ppl"] > 1
        assert payload["fingerprint"] == corpus.fingerprint and payload["corpus"] == corpus.name
        assert {key: payload["config"][key] for key in TINY} == TINY
        assert (payload["memory_state"] is None) == (arm == "baseline")
        assert payload["history"][-1]["step"] <= step
        json.dumps([payload["config"], payload["history"], payload["meter"]])  # plain values
    assert payload["results"]["valid"]["metrics"]["ppl"] == payload["val_ppl"]


def test_metrics_file_holds_every_point_of_both_arms(finished):
    rows = metric_rows(finished.plot_dir)
    logged = [*range(4, STEPS, 4), STEPS]
    validated = [*range(EVERY, STEPS, EVERY), STEPS]
    for arm in ("GPT2 Baseline", "GPT2 + DNC"):
        for split, steps in (("train", logged), ("validation", validated)):
            found = [row for row in rows if row["arm"] == arm and row["split"] == split]
            assert [row["step"] for row in found] == steps
            assert all({"loss", "ppl", "top1_acc"} <= row.keys() for row in found)
        assert ("avg_gate" in found[-1]) == (arm == "GPT2 + DNC")
    history = [row for name in FINALS.values() for row in load(finished.save_dir / name)["history"]]
    assert rows == history


def test_table_prints_what_was_measured_and_counted(finished):
    tokens = STEPS * TINY["batch_size"] * TINY["seq_len"]
    assert f"{tokens:,} training tokens in {STEPS} steps, seed 0" in finished.stdout
    lines = reversed(finished.stdout.splitlines())  # the table stands behind the progress
    rows = {line[2:23].strip(): line for line in lines}
    assert {metric.label for metric in dnc_gpt2.METRICS if metric.label} <= rows.keys()
    assert {"reads zeroed", "memory swapped"} <= rows.keys()
    for name in FINALS.values():
        payload = load(finished.save_dir / name)
        for metric in dnc_gpt2.METRICS[:2]:
            value = payload["results"]["valid"]["metrics"][metric.key]
            assert f" {value:{metric.form}} " in rows[metric.label]
        count = sum(value.numel() for value in payload["model_state_dict"].values())
        assert f" {count:,} " in rows["Parameters"]


def test_table_marks_what_is_really_better_and_turns_round_with_the_arms(finished, corpus, capfd):
    runs = {}
    for arm, name in FINALS.items():
        config = tiny_config(memory="none" if arm == "baseline" else "dnc")
        runs[arm] = dnc_gpt2.start_run(arm, config, corpus, torch.device("cpu"))
        runs[arm].results = load(finished.save_dir / name)["results"]

    def marks(reference: str, other: str) -> dict[str, str]:
        dnc_gpt2.print_comparison([runs[reference]], [runs[other]], corpus)
        rows = capfd.readouterr().out.splitlines()
        return {row[2:22].strip(): row[-1] for row in rows if row[-1:] in tuple("✓✗≈")}

    old, new = (runs[arm].results for arm in ("baseline", "dnc"))
    shifts = {"nll": -0.2, "top5": 0.1, "confidence": -0.1, "rank": 2.0}  # at every token
    for split in ("valid", "test"):
        sums = old[split]["sums"].clone()
        for name, shift in shifts.items():
            sums[..., dnc_gpt2.STATS.index(name)] += shift * old[split]["counts"]
        new[split]["sums"] = sums
    there, back = marks("baseline", "dnc"), marks("dnc", "baseline")
    assert there == {
        "Perplexity ↓": "✓", "Top-1 accuracy ↑": "≈", "Loss (nats) ↓": "✓",
        "Bits per token ↓": "✓", "Top-5 accuracy ↑": "✓", "Confidence ↑": "✗",
        "Mean rank ↓": "✗", "Test perplexity ↓": "✓", "Word perplexity ↓": "✓",
        "Bits per byte ↓": "✓"}
    turned = {"✓": "✗", "✗": "✓", "≈": "≈"}
    assert back == {label: turned[mark] for label, mark in there.items()}
    ppl = [runs[arm].results["valid"]["metrics"]["ppl"] for arm in ("baseline", "dnc")]
    row = next(line for line in finished.stdout.splitlines() if "Perplexity ↓" in line)
    assert f"{'▲' if ppl[1] > ppl[0] else '▼'}{abs(ppl[1] / ppl[0] - 1):.1%} " in row


def test_arms_may_be_chosen(finished, tmp_path, main, capfd):
    for arms, said in (("matched, dnc", ["GPT2 Matched vs GPT2 + DNC", "memory swapped"]),
                       ("dnc", ["reads zeroed", "Token"]), ("baseline", ["training_curves.png"])):
        short = flags({"max_steps": 1, "arms": arms, "final_eval_tokens": 99})
        assert main([*finished.argv, *outputs(tmp_path), *short]) == 0
        out = capfd.readouterr().out
        assert all(word in out for word in said)
        assert ("FINAL COMPARISON" in out) == ("," in arms)
        if "," in arms:
            assert "scored on 99 of the 266 of validation" in out


# ── inspection ──────────────────────────────────────────────────────────────────────────────────


def test_inspect_prints_a_gate_for_every_token_and_draws_the_trace(finished, main, capfd, tmp_path):
    text = "Fi lem or ba.\nStost"
    path = finished.save_dir / FINALS["dnc"]
    assert main(flags({"inspect": path, "plot_dir": tmp_path / "p", "text": text})) == 0
    out = capfd.readouterr().out
    lines = out[out.index("Token") :].splitlines()
    assert lines[0].split() == ["Token", "Gate", "bar"]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(load(path)["tokenizer"])
    rows = [re.fullmatch(r"  (\S.*?) +(\d\.\d{3})(?:  (█*))?", line)
            for line in lines[1 : 1 + len(tokenizer.encode(text).ids)]]
    assert all(rows)
    assert "".join(row[1] for row in rows).replace("␣", "").replace("\\n", "") == re.sub(
        r"\s", "", text)
    assert all(abs(len(row[3] or "") / 30 - float(row[2])) < 0.02 for row in rows)
    assert (tmp_path / "p" / "memory_trace.png").read_bytes().startswith(b"\x89PNG")
    # the gates are those of the trained model, as the job printed them for its own sample
    assert main(flags({"inspect": path, "plot_dir": tmp_path / "p"})) == 0
    again = capfd.readouterr().out
    assert again.split("Write inspection")[1].split("wrote")[0] == (
        finished.stdout.split("Write inspection")[1].split("wrote")[0])


def test_inspect_refuses_a_checkpoint_that_is_broken_or_without_memory(finished, main, capfd,
                                                                       tmp_path):
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    without = finished.save_dir / FINALS["baseline"]
    for path, said in ((broken, "not written by this script"), (without, "no memory")):
        assert main(flags({"inspect": path, "plot_dir": tmp_path})) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        assert path.name in (line := error_line(err)) and said in line


# ── kill -9 ─────────────────────────────────────────────────────────────────────────────────────

# Ends its own process as kill -9 does, at a chosen call of a chosen function of one arm: no
# handler, no flush, no clean-up. {where} is one of the names below.
SELF_KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import dnc_gpt2
arm, calls = {arm!r}, 0
def dying(function):
    def wrapped(*args, **kwargs):
        global calls
        frame, run = sys._getframe(), None
        while frame and run is None:
            run, frame = frame.f_locals.get("run"), frame.f_back
        calls += run is not None and run.arm == arm
        if calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
if {where!r} == "mid-step":
    dnc_gpt2.nn.utils.clip_grad_norm_ = dying(dnc_gpt2.nn.utils.clip_grad_norm_)
if {where!r} == "mid-write":
    os.fsync = dying(os.fsync)
sys.exit(dnc_gpt2.main(sys.argv[1:]))
"""


def rows_logged(folder: Path, arm: str) -> int:
    """The newest step of an arm in metrics.jsonl, 0 where there is none."""
    try:
        lines = (folder / "plots" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines[1:]]
    except (OSError, ValueError):  # not there yet, or half a line
        return 0
    return max((row["step"] for row in rows if row["arm"] == arm), default=0)


def interrupt(argv: list[str], folder: Path, arm: str, step: int, number: int) -> tuple:
    """Start the command, and send a signal once `arm` has logged `step`."""
    process = start_cli(argv)
    try:
        deadline = time.monotonic() + 120
        while rows_logged(folder, arm) < step and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def test_killed_run_resumes_to_the_same_weights_and_table(finished, tmp_path, main, capfd, run_cli):
    """Killed three times on the way: from outside in the first arm; in the second one while half a
    checkpoint is written; and there again in the middle of a step."""
    argv = [*finished.argv, *outputs(tmp_path)]
    resume = [*argv, "--resume", "auto"]
    draw = random.Random(17)
    at = draw.randrange(4, 24)
    print("killed from outside after step", at)
    code, _, err = interrupt(argv, tmp_path, "GPT2 Baseline", at, signal.SIGKILL)
    assert code == -signal.SIGKILL, err

    def die(where: str, call: int) -> str:
        driver = SELF_KILL.format(root=str(ROOT), arm="GPT2 + DNC", where=where, call=call)
        process = start_cli(resume, code=driver)
        out, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, err
        return out

    saves = draw.randrange(2, STEPS // EVERY)
    print("killed while writing checkpoint number", saves)
    out = die("mid-write", saves)
    assert re.search(r"GPT2 Baseline: (resumed from|no valid checkpoint)", out)
    folder = tmp_path / "checkpoints"
    assert (folder / f"GPT2_+_DNC_step{saves * EVERY}.pt.tmp").exists()
    assert not (folder / f"GPT2_+_DNC_step{saves * EVERY}.pt").exists()

    step = draw.randrange(1, STEPS - (saves - 1) * EVERY)
    print("killed in the middle of step", step, "after that")
    out = die("mid-step", step)
    assert f"GPT2 Baseline: finished in {folder / FINALS['baseline']}" in out
    assert f"GPT2 + DNC: resumed from {folder / f'GPT2_+_DNC_step{(saves - 1) * EVERY}.pt'}" in out

    assert main(resume) == 0
    out = capfd.readouterr().out
    assert "GPT2 + DNC: resumed from" in out
    assert_same_run(finished, tmp_path, out)


# ── signals ─────────────────────────────────────────────────────────────────────────────────────


def printed_command(stderr: str) -> list[str]:
    line = stderr.strip().splitlines()[-1].strip()
    words = shlex.split(line)
    assert words[:2] == ["python", "dnc_gpt2.py"] and words[-2:] == ["--resume", "auto"], line
    return words[2:]


def test_sigterm_saves_and_prints_the_command_that_resumes(finished, tmp_path, run_cli):
    argv = [*finished.argv, *outputs(tmp_path), "--text", "it's $5 or less"]  # has to be quoted
    code, out, err = interrupt(argv, tmp_path, "GPT2 Baseline", 4, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "Traceback" not in err, err
    saved = max((tmp_path / "checkpoints").glob("*.pt"), key=os.path.getmtime)
    assert 4 <= load(saved)["global_step"] < STEPS
    words = printed_command(err)
    done = run_cli(words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {saved}" in done.stdout
    stdout = done.stdout.split("Write inspection")[0]
    expected = finished._replace(stdout=finished.stdout.split("Write inspection")[0])
    assert_same_run(expected, tmp_path, stdout)


def test_signal_saves_at_the_next_step(finished, tmp_path, main, capfd, monkeypatch):
    """In the middle of step 15 of the second arm, which falls on no checkpoint: that step is
    finished and saved."""
    seen, optimizer_step = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append(self)
        if len(seen) == STEPS + 15:
            os.kill(os.getpid(), signal.SIGINT)
        return optimizer_step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    argv = [*finished.argv, *outputs(tmp_path)]
    assert main(argv) == 128 + signal.SIGINT
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert load(tmp_path / "checkpoints" / "GPT2_+_DNC_step15.pt")["global_step"] == 15
    assert main(printed_command(err)) == 0
    assert_same_run(finished, tmp_path, capfd.readouterr().out)


@pytest.mark.parametrize("newest, is_final, saved", [(EVERY, False, 2 * EVERY),
                                                     (LAST_STEP, True, STEPS)])
def test_signal_in_an_evaluation_is_obeyed_and_resumed(newest, is_final, saved, finished, partial,
                                                       main, capfd, monkeypatch):
    """In the validation of a step that is due a checkpoint, which is done on resuming, and in the
    final evaluation."""
    folder, evaluate = partial("dnc", newest), dnc_gpt2.evaluate

    def signal_then_evaluate(model, stream, config, stop, **options):
        is_whole = len(stream) > config.eval_tokens + 1  # all of validation, not the slice
        if is_whole or not is_final:
            stop.signum = signal.SIGTERM
        return evaluate(model, stream, config, stop, **options)

    resume = [*finished.argv, *outputs(folder), "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(dnc_gpt2, "evaluate", signal_then_evaluate)
        assert main(resume) == 128 + signal.SIGTERM
    capfd.readouterr()
    assert load(folder / "checkpoints" / f"GPT2_+_DNC_step{saved}.pt")["global_step"] == saved
    assert main(resume) == 0
    assert_same_run(finished, folder, capfd.readouterr().out)


# ── which checkpoint is taken ───────────────────────────────────────────────────────────────────


def test_resume_auto_trains_no_finished_arm_again(finished, partial, main, capfd, monkeypatch):
    folder = partial("dnc", STEPS)
    shutil.copy(finished.save_dir / FINALS["dnc"], folder / "checkpoints")

    def refuse(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(dnc_gpt2, "train_step", refuse)
    assert main([*finished.argv, *outputs(folder), "--resume", "auto"]) == 0
    out = capfd.readouterr().out
    assert_same_run(finished, folder, out)
    table = [text.split("Metric")[1].split("wrote")[0] for text in (out, finished.stdout)]
    assert table[0] == table[1]  # speed and memory too: they are those of the training


def test_resume_auto_without_a_checkpoint_starts_and_says_so(finished, main, capfd, tmp_path):
    argv = [*finished.argv, *outputs(tmp_path), "--resume=auto", "--arms=baseline", "--max_steps=1"]
    assert main(argv) == 0
    assert "GPT2 Baseline: no valid checkpoint" in capfd.readouterr().out


def test_resume_takes_the_named_checkpoint_and_not_the_newest(finished, partial, main, capfd):
    folder = partial("dnc", LAST_STEP)
    path = folder / "checkpoints" / f"GPT2_+_DNC_step{2 * EVERY}.pt"
    assert main([*finished.argv, *outputs(folder), f"--resume={path}"]) == 0
    out = capfd.readouterr().out
    assert f"GPT2 + DNC: resumed from {path}" in out and "GPT2 Baseline: finished in" in out
    assert_same_run(finished, folder, out)


SPOILT = {  # what the refusal says besides the name
    "truncated": "truncated", "a tensor": "not written by this script",
    "parts missing": "not written by this script", "another script's": "checkpoint",
    "another version's": "checkpoint", "corpus": "another corpus", "shape": "shapes"}


def spoil(path: Path, how: str) -> None:
    """Make a checkpoint unusable."""
    payload, config = load(path), load(path)["config"]
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif how == "a tensor":
        torch.save(torch.ones(3), path)
    elif how == "parts missing":
        del payload["optimizer_state_dict"]
        torch.save(payload, path)
    elif how == "shape":
        weights = payload["model_state_dict"]
        weights["controller.wte.weight"] = weights["controller.wte.weight"][:-1].clone()
        torch.save(payload, path)
    else:
        changed = {
            "another script's": {"arm": "GPT2 + EDM", "config": {"rank": 8}},  # shares contract 4
            "another version's": {"config": config | {"a_field_of_tomorrow": 1}},
            "corpus": {"fingerprint": "0" * 64, "corpus": "another corpus"}}
        torch.save(payload | changed[how], path)


@pytest.mark.parametrize("how", SPOILT)
def test_resume_refuses_a_spoilt_checkpoint_by_name(how, finished, partial, main, capfd):
    folder = partial("dnc", LAST_STEP)
    path = folder / "checkpoints" / f"GPT2_+_DNC_step{LAST_STEP}.pt"
    spoil(path, how)
    kept = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    assert main([*finished.argv, *outputs(folder), f"--resume={path}"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    line = error_line(err)
    assert path.name in line and SPOILT[how] in line
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == kept


@pytest.mark.parametrize("how", ["truncated", "corpus"])  # while it is read, and compared
def test_resume_auto_passes_over_a_spoilt_checkpoint_and_says_so(how, finished, partial, main,
                                                                 capfd):
    folder = partial("dnc", LAST_STEP)
    path = folder / "checkpoints" / f"GPT2_+_DNC_step{LAST_STEP}.pt"
    spoil(path, how)
    assert main([*finished.argv, *outputs(folder), "--resume=auto"]) == 0
    out = capfd.readouterr().out
    [passed] = [line for line in out.splitlines() if line.startswith("resume: passed over")]
    assert path.name in passed and SPOILT[how] in passed
    before = path.with_name(f"GPT2_+_DNC_step{LAST_STEP - EVERY}.pt")
    assert f"GPT2 + DNC: resumed from {before}" in out
    assert_same_run(finished, folder, out)


def test_resume_takes_a_checkpoint_from_before_a_field_of_speed(finished, partial, main, capfd):
    """`scan` came later than the first checkpoints, and says only how fast a run computes."""
    folder = partial("dnc", LAST_STEP)
    path = folder / "checkpoints" / f"GPT2_+_DNC_step{LAST_STEP}.pt"
    payload = torch.load(path, weights_only=True)
    del payload["config"]["scan"]
    torch.save(payload, path)
    assert main([*finished.argv, *outputs(folder), f"--resume={path}"]) == 0
    assert f"resumed from {path}" in capfd.readouterr().out


def test_resume_refuses_a_changed_field_by_name(finished, partial, main, capfd):
    folder = partial("baseline", LAST_STEP)
    argv = [*finished.argv, *outputs(folder), "--lr=0.5", "--arms=baseline"]
    path = folder / "checkpoints" / f"GPT2_Baseline_step{EVERY}.pt"
    assert main([*argv, f"--resume={path}"]) == 2
    line = error_line(capfd.readouterr().err)
    assert path.name in line and "lr = 0.003" in line and "0.5" in line and "--lr 0.003" in line
    before = {path: path.read_bytes() for path in path.parent.glob("*.pt")}
    assert main([*argv, "--resume=auto"]) == 2  # it would write files of the same names
    line = error_line(capfd.readouterr().err)
    assert f"GPT2_Baseline_step{LAST_STEP}.pt" in line and "--lr 0.003" in line
    assert before == {path: path.read_bytes() for path in path.parent.glob("*.pt")}


def test_resume_of_an_arm_that_is_not_trained_is_refused(finished, partial, main, capfd):
    """A checkpoint that was named and is of no use must not be passed over in silence."""
    folder = partial("dnc", LAST_STEP)
    path = folder / "checkpoints" / f"GPT2_+_DNC_step{EVERY}.pt"
    argv = [*finished.argv, *outputs(folder), "--arms=baseline", f"--resume={path}"]
    assert main(argv) == 2
    assert path.name in error_line(capfd.readouterr().err)


def test_resume_does_not_take_a_temporary_file(finished, partial, main, capfd):
    folder = partial("dnc", LAST_STEP)
    leftover = folder / "checkpoints" / f"GPT2_+_DNC_step{STEPS - 1}.pt.tmp"
    shutil.copy(folder / "checkpoints" / f"GPT2_+_DNC_step{EVERY}.pt", leftover)
    assert main([*finished.argv, *outputs(folder), "--resume=auto"]) == 0
    out = capfd.readouterr().out
    assert f"step{LAST_STEP}.pt" in out and "passed over" not in out
    leftover.unlink()
    assert_same_run(finished, folder, out)


def test_restore_brings_back_everything_a_step_depends_on(finished, corpus):
    path = finished.save_dir / f"GPT2_+_DNC_step{EVERY}.pt"
    config = tiny_config(dropout=TINY["dropout"], arms="baseline,dnc")
    run = dnc_gpt2.start_run("dnc", config, corpus, torch.device("cpu"))
    torch.manual_seed(1234)
    dnc_gpt2.restore(run, dnc_gpt2.load_checkpoint(path), path, corpus)
    ours, theirs = dnc_gpt2.checkpoint_payload(run, corpus), load(path)
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"config", "run"}:
        assert same(ours[key], theirs[key]), key
    assert run.last_saved == str(path)


# ── full disk ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_run(corpus, tmp_path):
    config = tiny_config(save_dir=str(tmp_path), plot_dir=str(tmp_path))
    run = dnc_gpt2.start_run("dnc", config, corpus, torch.device("cpu"))
    dnc_gpt2.save_checkpoint(run, corpus)
    run.step = 1
    return run


def test_full_disk_keeps_the_last_checkpoint_and_leaves_no_half_one(small_run, corpus, tmp_path):
    """A real limit on what the process may write: a third of a checkpoint."""
    path = tmp_path / "GPT2_+_DNC_step0.pt"
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 3, hard))
    try:
        with pytest.raises(ValueError) as caught:
            dnc_gpt2.save_checkpoint(small_run, corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = str(caught.value)
    assert all(word in said for word in ("step1.pt", path.name, "--resume auto"))
    assert "\n" not in said
    assert [p.name for p in tmp_path.glob("*.pt*")] == [path.name]
    assert path.read_bytes() == before and small_run.last_saved == str(path)
    dnc_gpt2.save_checkpoint(small_run, corpus)  # with space again, all is well
    assert load(tmp_path / "GPT2_+_DNC_step1.pt")["global_step"] == 1


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_full_disk_ends_the_command_with_one_line(where, finished, tmp_path, main, capfd,
                                                  monkeypatch):
    saved, save, fsync = [], torch.save, os.fsync

    def full_save(payload, file, *args, **kwargs):
        saved.append(file)
        if where == "write" and len(saved) == 2:
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        return save(payload, file, *args, **kwargs)

    def full_fsync(descriptor):
        if where == "fsync" and len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(descriptor)

    monkeypatch.setattr(torch, "save", full_save)
    monkeypatch.setattr(os, "fsync", full_fsync)
    assert main([*finished.argv, *outputs(tmp_path)]) == 2
    err = capfd.readouterr().err
    line = error_line(err)
    first = f"GPT2_Baseline_step{EVERY}.pt"
    assert str(tmp_path) in line and first in line and "--resume auto" in line
    assert [path.name for path in (tmp_path / "checkpoints").glob("GPT2*")] == [first]
    theirs = load(finished.save_dir / first)
    ours = load(tmp_path / "checkpoints" / first)
    assert same(ours["model_state_dict"], theirs["model_state_dict"])


@pytest.mark.parametrize("fault", ["no memory for validation", "full disk of metrics.jsonl"])
def test_a_fault_between_two_steps_loses_no_step(fault, finished, tmp_path, main, capfd,
                                                 monkeypatch):
    evaluate, append, step = dnc_gpt2.evaluate, dnc_gpt2.append_metrics, 2 * EVERY

    def failing_evaluate(model, *args, **kwargs):
        if len(calls) == 1 and fault.startswith("no memory"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        calls.append(model)
        return evaluate(model, *args, **kwargs)

    def failing_append(row, config):
        if row["step"] == step and row["split"] == "train" and fault.startswith("full disk"):
            raise ValueError("metrics.jsonl: cannot be written")
        append(row, config)

    calls = []
    monkeypatch.setattr(dnc_gpt2, "evaluate", failing_evaluate)
    monkeypatch.setattr(dnc_gpt2, "append_metrics", failing_append)
    argv = [*finished.argv, *outputs(tmp_path)]
    assert main(argv) == 2
    error_line(capfd.readouterr().err)
    assert (tmp_path / "checkpoints" / f"GPT2_Baseline_step{step}.pt").is_file()
    monkeypatch.undo()
    assert main([*argv, "--resume=auto"]) == 0
    out = capfd.readouterr().out
    assert f"step{step}.pt" in out
    if fault.startswith("no memory"):  # else a row of metrics.jsonl is lost
        assert_same_run(finished, tmp_path, out)


@pytest.mark.parametrize("command", ["generate", "export", "inspect", "resume"])
def test_a_command_with_nothing_starts_no_training(command, finished, tmp_path, main, capfd):
    """As `--generate "$TEXT"` gives it where TEXT is not set."""
    assert main([*finished.argv, *outputs(tmp_path), f"--{command}="]) == 2
    assert f"{command} = ''" in error_line(capfd.readouterr().err)
    assert not (tmp_path / "checkpoints").exists()


def test_full_disk_is_seen_before_training(finished, tmp_path, main, capfd, monkeypatch):
    nearly_full = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 2**21, 2**21)  # 2 MiB left
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
    assert main([*finished.argv, *outputs(tmp_path)]) == 2
    assert "save_dir" in (line := error_line(capfd.readouterr().err)) and "MiB free" in line
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def test_two_commands_at_once_are_refused(finished, tmp_path, main, capfd):
    for given in (["--generate", "x", "--export", "y"], ["--inspect", "x", "--resume", "auto"]):
        assert main([*finished.argv, *outputs(tmp_path), *given]) == 2
        assert "one command at a time" in error_line(capfd.readouterr().err)


# ── what another run has left in a folder ────────────────────────────────────────────────────────


def test_training_over_another_run_says_so(finished, partial, main, capfd):
    folder = partial("dnc", LAST_STEP)
    assert main([*finished.argv, *outputs(folder), "--arms", "baseline", "--max_steps", "0",
                 "--epochs", "1", "--lr", "1e-3"]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("save_dir: ")]
    assert len(said) == 1 and "files of the same names are replaced" in said[0]


@pytest.mark.parametrize("arm, fields, other, said", [
    ("wide", {}, {"seq_len": 8}, "was trained with seq_len = 16, this run has 8; set --seq_len 16"),
    ("matched", {}, {"mem_width": 16}, "was trained with mem_width = 8, this run has 16"),
    ("matched", {}, {"hidden_size": 48}, "was trained with hidden_size = 32, this run has 48"),
    ("baseline", {}, {"eval_tokens": 100}, "was trained with eval_tokens = 200"),
])
def test_refusal_names_what_the_user_gave(corpus, tmp_path, arm, fields, other, said):
    config = tiny_config(save_dir=str(tmp_path), **fields)
    run = dnc_gpt2.start_run(arm, config, corpus, torch.device("cpu"))
    payload = dnc_gpt2.checkpoint_payload(run, corpus)
    dnc_gpt2.check_same_run(run, payload, "a.pt", corpus)
    changed = dnc_gpt2.plan_run(arm, tiny_config(save_dir=str(tmp_path), **other), corpus)
    with pytest.raises(dnc_gpt2.OtherRun, match=re.escape(said)):
        dnc_gpt2.check_same_run(changed, payload, "a.pt", corpus)


def test_a_matched_arm_of_other_fields_and_as_many_parameters_is_the_same(corpus, tmp_path):
    config = tiny_config(save_dir=str(tmp_path))
    run = dnc_gpt2.start_run("matched", config, corpus, torch.device("cpu"))
    payload = dnc_gpt2.checkpoint_payload(run, corpus)
    other = dnc_gpt2.plan_run("matched", tiny_config(empty_share=0.5), corpus)
    dnc_gpt2.check_same_run(other, payload, "a.pt", corpus)


def test_chosen_checkpoint_is_a_finished_one_however_files_were_copied(finished, tmp_path):
    for number, name in enumerate((FINALS["dnc"], f"{STEMS['baseline']}_step{EVERY}.pt")):
        shutil.copy(finished.save_dir / name, tmp_path / name)
        os.utime(tmp_path / name, (1e9 + number, 1e9 + number))
    chosen = dnc_gpt2.load_chosen(tiny_config(save_dir=str(tmp_path)))
    assert chosen.payload["arm"] == "GPT2 + DNC" and chosen.payload["results"]


def test_a_baseline_generates_whether_a_memory_would_be_carried_or_not():
    payload = {"arm": "x", "config": {"carry_memory": False, "memory": "none"}}
    dnc_gpt2.check_carried(payload, "generate")
    payload["config"]["memory"] = "dnc"
    with pytest.raises(ValueError, match="of a model that carries its memory"):
        dnc_gpt2.check_carried(payload, "generate")


# ── an export replaces nothing but an export ─────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "dnc_model.py"])
def test_export_over_other_files_is_refused(name, finished, tmp_path, main, capfd):
    (tmp_path / name).write_text('{"model_type": "gpt2"}')
    argv = [f"--save_dir={finished.save_dir}", f"--export={tmp_path}"]
    assert main(argv) == 2
    line = error_line(capfd.readouterr().err)
    assert f"another {name}" in line and "name a new one" in line
    assert (tmp_path / name).read_text() == '{"model_type": "gpt2"}'


def test_export_that_was_cut_off_does_not_load_and_can_be_done_again(finished, tmp_path, main,
                                                                     monkeypatch):
    argv = [f"--save_dir={finished.save_dir}", f"--export={tmp_path}"]
    assert main(argv) == 0
    with monkeypatch.context() as patch:
        patch.setattr(dnc_gpt2, "model_card", lambda *_: 1 / 0)
        assert main(argv) != 0
    assert not (tmp_path / "config.json").exists()
    assert main(argv) == 0
    assert (tmp_path / "config.json").exists() and not (tmp_path / dnc_gpt2.EXPORTING).exists()
