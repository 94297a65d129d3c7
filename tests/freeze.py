#!/usr/bin/env python3
"""Run every command tiny on the CPU, and print what it computed as sha256 digests.

    python tests/freeze.py                      every command, in the order of their needs
    python tests/freeze.py --keep FOLDER        keep what they wrote, and their masked stdout
    python tests/freeze.py --repo OTHER         the commands of another checkout
    python tests/freeze.py --only dnc_gpt2      stop behind one of them

Two checkouts that print the same lines compute the same, bit for bit, on this machine. A line is:
command, digest of the weights it wrote, of its measurements (JSON), of its stdout with times,
speeds, sizes and paths masked. What depends on the machine or the hour is left out of the JSON.

A command runs in a fork of this process, which has imported torch and transformers once for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

# No hub and one thread: sums are then added in one order. Read when torch is first imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
               "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}

import matplotlib.figure  # noqa: F401, as transformers' classes: for the commands
import numpy as np
import torch
from pictures import draw_on_demand
from transformers import AutoTokenizer, GPT2LMHeadModel  # noqa: F401

draw_on_demand()

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("dnc_gpt2", "inspect", "edm_gpt2", "edm_lora", "edm_generate", "long_range",
         "memory_decoder")

# Fields of JSON that tell of the machine, of the hour or of settings, not of what was computed.
VOLATILE = {
    "seconds", "tokens_per_s", "peak_mb", "ms_per_token", "train_seconds", "memory_bytes",
    "training_tokens_per_s", "about", "config", "id", "device", "torch", "versions", "command",
    "source", "run", "index_sha256",
    "sha256", "keys_sha256", "values_sha256",  # of a file, or of bytes whose digest stands here
}


def text_of_python(topics_from: int, topics_to: int) -> str:
    """Some of Python's own documentation, the same on every machine with this Python."""
    from pydoc_data.topics import topics

    names = sorted(topics)[topics_from:topics_to]
    return "\n".join(topics[name] for name in names)


def make_dataset(folder: Path) -> None:
    """Write a folder of train.txt, valid.txt and test.txt."""
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text(text_of_python(0, 25), encoding="utf-8")
    (folder / "valid.txt").write_text(text_of_python(25, 28), encoding="utf-8")
    (folder / "test.txt").write_text(text_of_python(28, 31), encoding="utf-8")


def flags(**fields: object) -> list[str]:
    """{"lr": 0.1} -> ["--lr", "0.1"]."""
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def command_lines(work: Path) -> dict[str, list[str]]:
    """The words of every command."""
    base = work / "checkpoints" / "GPT2_Baseline_FINAL_step6.pt"
    memory = work / "checkpoints" / "GPT2_+_DNC_FINAL_step6.pt"
    common = flags(dataset=work / "text", plot_dir=work / "plots")
    edm = flags(base=base, window=32, max_steps=2, eval_tokens=600, recall_rows=2, topic_rows=2,
                slots=256, top_k=8, batch_size=8, new_tokens=8, save_dir=work / "edm")
    decoder = flags(base=base, window=32, domain=work / "text", max_keys=2000, train_tokens=512,
                    tune_tokens=300, eval_tokens=300, decoder_dim=32, decoder_layers=1,
                    decoder_heads=4, knn_k=16, latency_tokens=2, latency_rounds=1,
                    model_dir=work / "trained", plot_dir=work / "plots")
    return {
        "dnc_gpt2": ["dnc_gpt2.py", *common, *flags(
            arms="baseline,matched,dnc", max_steps=6, save_every_steps=3, log_every_steps=2,
            hidden_size=64, num_layers=2, num_heads=2, mem_slots=16, mem_width=16, batch_size=4,
            seq_len=64, eval_tokens=500, final_eval_tokens=2000, save_dir=work / "checkpoints")],
        "inspect": ["dnc_gpt2.py", *flags(inspect=memory, text="Ada wrote the first program.",
                                          plot_dir=work / "plots")],
        "edm_gpt2": ["edm_gpt2.py", *common, *edm],
        "edm_lora": ["edm_gpt2.py", *common, *edm, *flags(
            lora=4, qlora=True, arms="both", save_dir=work / "edm_lora",
            plot_dir=work / "plots_lora")],
        "edm_generate": ["edm_gpt2.py", *flags(
            generate="The old bridge", new_tokens=40, save_dir=work / "edm",
            memory_file=work / "notebook.pt")],
        "long_range": ["long_range.py", "--full", *flags(
            tasks="copy,mqar", seeds=0, lr_grid=0.01, mqar_symbols=256,
            train_rows=16, valid_rows=4, test_rows=4, steps=2, mqar_steps=2, edm_base_steps=2,
            batch_tokens=512, train="64:4,32,64", mqar_train="64:4", lengths="32,64,160",
            mqar_test="64:4", edm_slots=256, workers=1,
            data_dir=work / "data", save_dir=work / "long_range", plot_dir=work / "plots")],
        "memory_decoder": ["memory_decoder.py", *decoder],
    }


def become(repo: Path, words: list[str], cwd: Path) -> int:
    """Run a script in this process as Python runs a file -> its exit code."""
    os.chdir(cwd)
    sys.argv = [str(repo / words[0]), *words[1:]]
    sys.path[0] = str(repo)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_command(repo: Path, words: list[str], cwd: Path) -> str:
    """Run one command to its end -> stdout. Raises SystemExit where it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = become(repo, words, cwd)
            sys.stdout.flush()
            os._exit(code)

        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        printed, complained = out.read(), err.read()
    if code:
        raise SystemExit(f"{' '.join(words)}\nexit code {code}\n{printed[-2000:]}\n"
                         f"{complained[-4000:]}")
    return printed


def mask(text: str, work: Path) -> str:
    """Mask paths, times, speeds and sizes in memory."""
    text = text.replace(str(work), "WORK")
    text = re.sub(r"(  config    ).*\n( {12}.*\n)*", r"\1#\n", text)  # wraps with the paths' length
    text = re.sub(r"\d[\d.,]*(?= *(s\b|s,|MiB|tok/s|ms|it/s))", "#", text)
    tokens_per_s = r"(?m)^(  (?:base|full|recurrent|edm|both)\b.* )[\d,]+$"  # the last column
    text = re.sub(tokens_per_s, r"\1#", text)
    costs = r"(?m)^(  GPT2 .*? +[\d,]+ +[\d.e-]+)( +\S+){3}$"  # behind parameters and rate
    text = re.sub(costs, r"\1 #", text)
    lines = []
    for line in text.splitlines():
        if re.search(r"tokens/s|Peak memory|At equal time|config  |times the base's latency", line):
            line = re.sub(r"[\d.,]+|[▲▼=]|%|—", "#", line)
        lines.append(re.sub(r" +", " ", line.rstrip()) if "#" in line else line.rstrip())
    return "\n".join(lines) + "\n"


def measured(content: object) -> object:
    """JSON without its volatile fields."""
    if isinstance(content, dict):
        return {k: measured(v) for k, v in sorted(content.items()) if k not in VOLATILE}
    if isinstance(content, list):
        return [measured(item) for item in content]
    return content


def read_rows(path: Path) -> list:
    """A JSON file as a list; of a .jsonl file those rows that hold a step."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return [json.loads(text)]
    rows = [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if "step" in row]


def tensors_of(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dicts and lists, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {}
    return {k: v for key, item in items for k, v in tensors_of(item, f"{name}.{key}").items()}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, the arrays of a datastore, the tensors of a saved folder."""
    if path.suffix == ".npy":
        return {"array": torch.from_numpy(np.load(path))}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    payload = torch.load(path, map_location="cpu", weights_only=True)
    kept = ("model_state_dict", "optimizer_state_dict", "memory_state", "state", "groups")
    parts = {name: payload[name] for name in kept if name in payload}
    return tensors_of(parts)


def digest_of_weights(files: list[Path], work: Path) -> str:
    """sha256 over names and bytes of all tensors of all files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(work)).encode())
        for name, tensor in sorted(weights_of(path).items()):
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + raw)
    return digest.hexdigest()


def digest_of_json(files: list[Path], work: Path) -> str:
    """sha256 of what JSON files measured, wherever they lie."""
    rows = {path.name: measured(read_rows(path)) for path in files if path.name != "config.json"}
    text = json.dumps(rows, sort_keys=True).replace(str(work), "WORK")
    return hashlib.sha256(text.encode()).hexdigest()


def run_one(name: str, repo: Path, work: Path) -> str:
    """Run one command and return its line; the masked stdout goes into WORK/stdout."""
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    stdout = run_command(repo, command_lines(work)[name], work)
    written = [path for path in sorted(work.rglob("*")) if path.is_file()
               and before.get(path) != path.stat().st_mtime_ns]
    weights = [path for path in written if path.suffix in (".pt", ".npy", ".safetensors")]
    numbers = [path for path in written if path.suffix in (".json", ".jsonl")
               and "tokenizer" not in path.name]
    text = mask(stdout, work)
    (work / "stdout").mkdir(exist_ok=True)
    (work / "stdout" / f"{name}.txt").write_text(text, encoding="utf-8")
    parts = (digest_of_weights(weights, work), digest_of_json(numbers, work),
             hashlib.sha256(text.encode()).hexdigest())
    return f"{name:<16}" + " ".join(
        f"{label} {part[:16]}" for label, part in zip(("weights", "json", "stdout"), parts,
                                                      strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repo", type=Path, default=ROOT)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", choices=ORDER)
    args = parser.parse_args()
    work = (args.keep or Path(tempfile.mkdtemp())).resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_dataset(work / "text")
    last = ORDER.index(args.only) if args.only else len(ORDER) - 1
    try:
        for name in ORDER[: last + 1]:
            print(run_one(name, args.repo.resolve(), work), flush=True)
    finally:
        if args.keep is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
