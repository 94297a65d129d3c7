#!/usr/bin/env python3
"""Ten questions whose answers stand in Python's documentation, asked with and without a memory.

    python memory_decoder.py --base smollm2
    python benchmarks/questions.py --model_dir trained_models/

The questions, and the patterns that a right answer holds, were written before anything was tuned.
Answers are greedy, at most 40 tokens, under the base's chat template, at the shares that were tuned
on validation. A pattern is no judge of prose: --show True prints the answers, to be read.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnc_gpt2 import write_json
from memory_lm import MemoryLM, Sampling, chat_ids, generate

# (question, what a right answer says as a regular expression, topic of pydoc that holds it)
QUESTIONS = (
    ("What does the pass statement do in Python?",
     r"null operation|nothing|no.?op\b", "pass"),
    ("Which built-in variable decides whether Python's assert statement is executed?",
     r"__debug__", "assert"),
    ("Which exception is raised when raise is used in Python and there is no active exception?",
     r"RuntimeError", "raise"),
    ("Where may the break statement occur in Python?",
     r"(for|while)\b.{0,40}\bloop|(in|inside|within) (a|the) loop", "break"),
    ("Which exception is raised in Python when del is used on an unbound name?",
     r"NameError", "del"),
    ("What can functions created with lambda expressions in Python not contain?",
     r"statement|annotation", "lambda"),
    ("What value does a return statement without an expression give in Python?",
     r"\bNone\b", "return"),
    ("What does the continue statement do in Python?",
     r"next (cycle|iteration)", "continue"),
    ("Which class must everything that is raised in Python be an instance or a subclass of?",
     r"BaseException", "raise"),
    ("In Python, what happens to the loop control target when a for loop ends by break?",
     r"(keeps?|retains?|holds?) (its|the) (current|last)? ?value", "break"),
)


def answer(lm: MemoryLM, question: str, mode: str, tokens: int) -> str:
    """The greedy answer of a mode at its tuned shares."""
    ids, _ = chat_ids(lm, [{"role": "user", "content": question}], tokens)
    alpha, lambda_ = lm.tuned(mode)
    sampling = Sampling(mode, alpha, lambda_, temperature=0.0, top_k=0, max_new_tokens=tokens)
    return "".join(step.text for step in generate(lm, ids, sampling))


def ask(lm: MemoryLM, mode: str, tokens: int) -> list[dict]:
    """Ask everything in one mode."""
    rows = []
    for question, pattern, topic in QUESTIONS:
        text = answer(lm, question, mode, tokens)
        is_right = re.search(pattern, text, re.IGNORECASE | re.DOTALL) is not None
        rows.append({"question": question, "topic": topic, "answer": text, "right": is_right})
    return rows


def main() -> None:
    """Ask in every mode, print who was right, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", default="trained_models/")
    parser.add_argument("--tokens", type=int, default=40, help="longest answer")
    parser.add_argument("--show", default="False", choices=("False", "True"), help="the answers")
    parser.add_argument("--json", type=Path, help="where to write all of it")
    args = parser.parse_args()
    lm = MemoryLM.load(args.model_dir)
    results = {mode: ask(lm, mode, args.tokens) for mode in lm.modes()}

    print(f"{lm.name}\n" + "".join(f"{mode:>9}" for mode in results))
    for number, (question, _, _) in enumerate(QUESTIONS):
        marks = ["right" if rows[number]["right"] else "-" for rows in results.values()]
        print("".join(f"{mark:>9}" for mark in marks) + f"   {question}")
        if args.show == "True":
            for mode, rows in results.items():
                print(f"      {mode}: {rows[number]['answer']!r}")
    print("".join(f"{sum(row['right'] for row in rows):>9}" for rows in results.values())
          + f"   of {len(QUESTIONS)}")
    if args.json:
        write_json({"model": lm.name, "answers": results}, args.json)


if __name__ == "__main__":
    from scan import run_command

    run_command(main)
