#!/usr/bin/env python3
"""Score exported folders with EleutherAI's lm-evaluation-harness, beside each other.

    pip install lm-eval
    python benchmarks/harness.py --text wikitext/test.txt BASELINE_FOLDER DNC_FOLDER EDM_FOLDER

Two tasks, made of the text. `rolling`: perplexity of stretches of --chars characters, each from an
empty memory, in windows of --max_length tokens. `choice`: the true continuation of a passage among
four, three of them taken from elsewhere in the text; log-likelihoods, in batches. The folders are
what `dnc_gpt2.py --export` and edm_gpt2.py write; they are loaded through the harness's own adapter
for Hugging Face models. CPU or CUDA; a table on stdout, everything in --json.
"""

import argparse
import json
import random
import sys
import tempfile
import textwrap
from pathlib import Path

ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rolling.jsonl
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/choice.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{passage}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def write_lines(rows: list[dict], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tasks(text: str, folder: Path, chars: int, stretches: int, questions: int) -> None:
    """Write both tasks and their data. Raises ValueError for a text that is too short."""
    if len(text) < chars * stretches:
        raise ValueError(f"--text: {len(text):,} characters; {stretches} stretches of {chars:,} "
                         "need more: set a smaller --chars or --stretches")
    rolling = []
    for number in range(stretches):
        start = number * (len(text) // stretches)
        rolling.append({"text": text[start : start + chars]})
    write_lines(rolling, folder / "rolling.jsonl")

    draw = random.Random(0)
    words = text.split(" ")
    rows = []
    for number in range(questions):
        at = number * (len(words) - 120) // questions + 100
        passage = " ".join(words[at - 100 : at])
        ends = [" " + " ".join(words[at : at + 6])]
        while len(ends) < 4:
            other = draw.randrange(len(words) - 6)
            ends.append(" " + " ".join(words[other : other + 6]))
        answer = draw.randrange(4)
        ends[0], ends[answer] = ends[answer], ends[0]
        rows.append({"passage": passage, "choices": ends, "answer": answer})
    write_lines(rows, folder / "choice.jsonl")
    (folder / "rolling.yaml").write_text(ROLLING.format(folder=folder), encoding="utf-8")
    (folder / "choice.yaml").write_text(CHOICE.format(folder=folder), encoding="utf-8")


def score(model: str, tasks: Path, batch: int, max_length: int) -> dict[str, float]:
    """A folder's figures, by name."""
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    settings = {"pretrained": model, "trust_remote_code": True, "max_length": max_length}
    results = lm_eval.simple_evaluate(
        model="hf", model_args=settings, tasks=["rolling", "choice"], batch_size=batch,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0, device="cuda" if torch.cuda.is_available() else "cpu")["results"]
    return {
        "word perplexity": results["rolling"]["word_perplexity,none"],
        "bits per byte": results["rolling"]["bits_per_byte,none"],
        "choice accuracy": results["choice"]["acc,none"],
    }


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--chars", type=int, default=8000)
    parser.add_argument("--stretches", type=int, default=10)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument("--json", default="")
    args = parser.parse_args(argv)

    text = Path(args.text).read_text(encoding="utf-8")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(text, Path(folder), args.chars, args.stretches, args.questions)
        for model in args.models:
            figures[model] = score(model, Path(folder), args.batch, args.max_length)

    names = [*next(iter(figures.values()))]
    print(f"{'':<32}" + "".join(f"{name:>18}" for name in names))
    for model, values in figures.items():
        cells = "".join(f"{values[name]:>18.4f}" for name in names)
        print(f"{model[-31:]:<32}{cells}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    from scan import run_command

    run_command(lambda: main(sys.argv[1:]))
