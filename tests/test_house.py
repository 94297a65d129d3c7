"""The shell of a command, which every script shares, and the rules of the house."""

from __future__ import annotations

import ast
import concurrent.futures.process
import dataclasses
import importlib
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, error_line, flags, start_cli, write_corpus

import dnc_gpt2

SCRIPTS = ("dnc_gpt2", "edm_gpt2", "long_range", "memory_decoder", "app")
CODE = [*sorted(path.name for path in ROOT.glob("*.py")), "dnc_scan/operator.py",
        "dnc_scan/layout.py", "dnc_scan/__init__.py"]  # the others are kernels


# ── the house ───────────────────────────────────────────────────────────────────────────────────


def test_code_is_no_denser_than_the_limits():
    """At most 12 AST nodes a line, 60 lines and 350 nodes a function; the story first."""
    done = subprocess.run([sys.executable, "tests/density.py", *CODE], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = (ROOT / "dnc_gpt2.py").read_text(encoding="utf-8").splitlines()
    first_backward = next(i for i, line in enumerate(lines) if "loss.backward()" in line)
    assert first_backward < 699  # Config, the memory that points, the model and the loss before it
    assert (ROOT / "README.md").stat().st_size <= 15_000


def imports_of(path) -> set[str]:
    """The names of the modules that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_imports_go_one_direction():
    """Each file imports of the repository what stands before it, and the kernels nothing."""
    order = ("dnc_scan", "dnc_gpt2", "dnc_model", "edm_model", "edm_gpt2", "long_range",
             "datastore", "memory_lm", "memory_decoder", "app")
    for at, name in enumerate(order[1:], start=1):
        ours = imports_of(ROOT / f"{name}.py") & set(order)
        assert ours <= set(order[:at]), name
    # Saved folders carry these two alone, with what they import of the others written out.
    assert imports_of(ROOT / "dnc_model.py") & set(order) == {"dnc_gpt2"}
    assert imports_of(ROOT / "edm_model.py") & set(order) == {"dnc_gpt2", "dnc_model"}
    for path in (ROOT / "dnc_scan").glob("*.py"):
        assert not imports_of(path) & set(order[1:]), path


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_field_with_its_comment(script, capsys, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setenv("COLUMNS", "200")
    assert module.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    config = next(node for node in tree.body
                  if isinstance(node, ast.ClassDef) and node.name == "Config")
    ends = {node.target.id: node.end_lineno for node in config.body
            if isinstance(node, ast.AnnAssign)}
    for field in dataclasses.fields(module.Config):
        comment = source.splitlines()[ends[field.name] - 1].partition("  # ")[2]
        assert f"--{field.name} " in shown, field.name
        assert comment and " ".join(comment.split())[:40] in shown, field.name


def test_help_in_a_notebook_whose_stdout_cannot_be_reconfigured(monkeypatch):
    """%run dnc_gpt2.py --help in Jupyter."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    dnc_gpt2.print_any_character()
    assert dnc_gpt2.main(["--help"]) == 0 and "--mem_slots" in stream.getvalue()


# ── files ───────────────────────────────────────────────────────────────────────────────────────


def test_whole_file_keeps_what_was_there_when_writing_fails(tmp_path):
    path = tmp_path / "kept.json"
    dnc_gpt2.write_json({"a": 1}, path)
    with pytest.raises(ValueError, match=r"kept\.json: cannot be written .*No space.*free some"):
        with dnc_gpt2.whole_file(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")
    assert dnc_gpt2.read_json(path, "") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_locked_refuses_a_second_writer_and_outlives_none(tmp_path):
    code = ("import dnc_gpt2, sys, time\n"
            "with dnc_gpt2.locked(sys.argv[1], 'save_dir'):\n"
            "    print('in', flush=True); time.sleep(60)")
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT,
                             stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="save_dir = .*another run is writing"):
            with dnc_gpt2.locked(tmp_path, "save_dir"):
                pass
    finally:
        first.kill()
        first.wait()
    with dnc_gpt2.locked(tmp_path, "save_dir"):  # the system let go of a dead process's lock
        pass


def test_out_of_memory_names_the_fields_to_shrink(capsys):
    def job(stop):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert dnc_gpt2.run_command(job, ["x"], "saved") == 2
    line = error_line(capsys.readouterr().err)
    assert "CUDA out of memory" in line and "batch_size or seq_len" in line


@pytest.mark.parametrize("error, said, code", [
    (MemoryError(), "out of memory", 2),
    (concurrent.futures.process.BrokenProcessPool("a worker died"), "a worker died", 2),
    (OSError(28, "No space left on device"), "No space left", 2),
    (dnc_gpt2.Diverged("loss nan"), "loss nan", 1)])
def test_errors_of_the_machine_end_in_one_line(error, said, code, capsys):
    def job(stop):
        raise error

    assert dnc_gpt2.run_command(job, ["x"], "saved") == code
    assert said in error_line(capsys.readouterr().err)


# ── a baseline for those who need one ───────────────────────────────────────────────────────────

TRAINER = """
import sys
import dnc_gpt2
def job(stop):
    print(dnc_gpt2.train_baseline(**dict(word.split("=", 1) for word in sys.argv[1:])))
sys.exit(dnc_gpt2.run_command(job, ["x.py"], "kept"))
"""


def test_train_baseline_that_is_stopped_has_saved_and_goes_on(data_folder, tokenizer_folder,
                                                              tmp_path):
    fields = dict(dataset=data_folder, tokenizer=tokenizer_folder, save_dir=tmp_path / "c",
                  plot_dir=tmp_path / "p", hidden_size=32, num_layers=1, num_heads=2, seq_len=16,
                  batch_size=4, max_steps=3000, save_every_steps=5000, log_every_steps=1)
    words = [f"{name}={value}" for name, value in fields.items()]
    process = start_cli(words, code=TRAINER, cwd=ROOT)
    try:
        metrics, deadline = tmp_path / "p" / "metrics.jsonl", time.monotonic() + 90
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err, err
    [saved] = (tmp_path / "c").glob("base_*/GPT2_Baseline_step*.pt")
    assert 0 < dnc_gpt2.load_checkpoint(saved)["global_step"] < 3000
    assert dnc_gpt2.newest_baselines(tmp_path / "c") == []  # an unfinished one is no base


# ── the command as a person meets it ────────────────────────────────────────────────────────────


def test_folder_with_a_dollar_in_its_name_and_the_whole_banner(main, drawn, capfd,
                                                               tokenizer_folder, tmp_path):
    """Its name is in every title; the table stands before the pictures are drawn."""
    folder = write_corpus(tmp_path / "a$b$c^{")
    argv = flags(dict(
        dataset=folder, tokenizer=tokenizer_folder, hidden_size=32, num_layers=1, num_heads=2,
        mem_slots=8, mem_width=8, seq_len=16, max_steps=2, eval_tokens=60, final_eval_tokens=90,
        save_dir=tmp_path / "c", plot_dir=tmp_path / "p", text="Fi $5 lem."))
    assert main(argv) == 0
    out = capfd.readouterr().out
    assert out.index("FINAL COMPARISON") < out.index("wrote ")
    assert "text=Fi $5 lem." in " ".join(out.split())
    assert (tmp_path / "p" / "training_curves.png").stat().st_size > 10_000
    payload = dnc_gpt2.load_checkpoint(tmp_path / "c" / "GPT2_+_DNC_FINAL_step2.pt")
    assert {"versions", "device", "command", "source"} == payload["run"].keys()


def test_dnc_gpt2_alone_in_an_empty_folder_runs_to_the_table(data_folder, tokenizer_folder,
                                                             tmp_path):
    (tmp_path / "dnc_gpt2.py").write_bytes((ROOT / "dnc_gpt2.py").read_bytes())
    argv = flags(dict(dataset=data_folder, tokenizer=tokenizer_folder, hidden_size=32,
                      num_layers=1, num_heads=2, mem_slots=8, mem_width=8, seq_len=16, max_steps=2,
                      eval_tokens=60, final_eval_tokens=90))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "dnc_gpt2.py", *argv], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "FINAL COMPARISON" in done.stdout and "GPT2 + DNC" in done.stdout
    assert "scan auto: the recurrence runs in the eager loop" in done.stdout
    assert "head: runs as a chunked F.cross_entropy" in done.stdout


@pytest.mark.slow
def test_every_command_runs_tiny_and_computes_the_same_twice(tmp_path):
    """tests/freeze.py: all commands once, the first once more, its digests equal."""
    def freeze(*words: str) -> list[str]:
        done = subprocess.run([sys.executable, str(ROOT / "tests" / "freeze.py"), *words],
                              capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
        return done.stdout.splitlines()

    every, again = freeze(), freeze("--only", "dnc_gpt2")
    assert len(every) == 7
    assert again[0] == every[0]
