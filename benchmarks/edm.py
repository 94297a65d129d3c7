#!/usr/bin/env python3
"""What does a generated token of GPT-2 + EDM cost, and does it stay so?

    python benchmarks/edm.py                           GPT-2 (124M), window 128, 2,000 tokens
    python benchmarks/edm.py --size small --tokens 500 --window 64 --slots 8192 --json edm.json

Arms: the base alone, with the notebook, with the recurrent memories, with both; random weights, and
the same schedule for all: a full window gives up its older half, the rest is encoded again. Each
arm generates greedily, one row, with its state; the arms take turns, a stretch of half a window at
a time (each contains one such shift), in one process.
How to read it: ms/token of a stretch includes its share of the shift. `first` is the first full
window, `last` the last quarter of the tokens: constant time is a ratio near 1. `of base` is the
tokens/s of the arm over that of the base, the median over stretches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from scan import (
    OneLineParser,
    add_common_flags,
    choose_device,
    new_report,
    number,
    print_head,
    print_table,
    run_command,
    synchronize,
    write_json,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import GPT2Config

from edm_gpt2 import FLAGS, read_logits
from edm_model import EDMGPT2Config, EDMGPT2ForCausalLM, EDMGPT2State

SIZES = {
    "card": {"n_embd": 768, "n_layer": 6, "n_head": 8, "vocab_size": 50257},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
    "small": {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 4096},
}


def make_model(args: argparse.Namespace, arm: str, device: torch.device) -> EDMGPT2ForCausalLM:
    """An arm with random weights and open gates."""
    has_notebook, has_recurrent = FLAGS[arm]
    torch.manual_seed(0)
    base = GPT2Config(n_positions=max(1024, args.window), bos_token_id=None, eos_token_id=None,
                      **SIZES[args.size])
    model = EDMGPT2ForCausalLM(EDMGPT2Config(
        base=base.to_dict(),
        window=args.window,
        edm=has_notebook,
        early=has_recurrent,
        late=has_recurrent,
        slots=args.slots,
        key_of="previous",
        pointing=True,
        bos_token_id=None,
        eos_token_id=None,
    ))
    for memory in (model.edm, model.early, model.late):
        if memory is not None:
            memory.alpha.data.fill_(0.1)
    if model.edm is not None:
        model.edm.point_alpha.data.fill_(0.1)
    return model.eval().to(device)


def generate(model: EDMGPT2ForCausalLM, tokens: torch.Tensor, state: EDMGPT2State, count: int
             ) -> tuple[torch.Tensor, EDMGPT2State]:
    """Go on greedily behind tokens (1, T) -> the last of so many tokens (1, 1), state."""
    for _ in range(count):
        logits, state, _ = read_logits(model, tokens, state, slice(-1, None))  # (1, 1, V)
        tokens = logits.argmax(-1)
    return tokens, state


def time_arms(models: dict[str, EDMGPT2ForCausalLM], args: argparse.Namespace,
              device: torch.device) -> dict[str, list[float]]:
    """ms/token of each arm in each stretch."""
    stretch = args.window // 2
    vocabulary = models["base"].config.vocab_size
    prompt = torch.randint(0, vocabulary, (1, args.window), device=device)
    tokens = dict.fromkeys(models, prompt)
    states = {arm: model.init_state(1) for arm, model in models.items()}
    times = {arm: [] for arm in models}
    for _ in range(args.tokens // stretch):
        for arm, model in models.items():
            synchronize(device)
            began = time.perf_counter()
            tokens[arm], states[arm] = generate(model, tokens[arm], states[arm], stretch)
            synchronize(device)
            times[arm].append(1000 * (time.perf_counter() - began) / stretch)
    return times


def summary(arm: str, times: dict[str, list[float]], stretch: int) -> dict:
    """What is reported of an arm."""
    full = times[arm][2:]  # the first window and the compiling of anything are over
    quarter = max(1, len(full) // 4)
    first, last = statistics.median(full[:quarter]), statistics.median(full[-quarter:])
    ratios = [of_base / own for of_base, own in zip(times["base"][2:], full, strict=True)]
    return {
        "arm": arm,
        "ms": statistics.median(full),
        "first": first,
        "last": last,
        "constant": last / first,
        "ratio": statistics.median(ratios),
        "ms_by_stretch": [round(x, 3) for x in times[arm]],
        "stretch": stretch,
    }


@torch.no_grad()
def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--tokens", type=number(256), default=2000)
    parser.add_argument("--window", type=number(16), default=128)
    parser.add_argument("--slots", type=number(128), default=8192)
    add_common_flags(parser)
    args = parser.parse_args()
    device = choose_device(args)
    report = new_report(device)
    print_head(report, f"Generation, {args.size}, window {args.window}, {args.slots} slots")

    models = {arm: make_model(args, arm, device) for arm in FLAGS}
    times = time_arms(models, args, device)
    report["rows"] = [summary(arm, times, args.window // 2) for arm in models]
    write_json(report, args.json)
    print_table(report["rows"], {
        "arm": ("arm", ""),
        "ms": ("ms/token", ".2f"),
        "first": ("first quarter", ".2f"),
        "last": ("last quarter", ".2f"),
        "constant": ("last / first", ".2f"),
        "ratio": ("of base", ".2f"),
    })


if __name__ == "__main__":
    run_command(main)
