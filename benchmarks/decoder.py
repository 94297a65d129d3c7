#!/usr/bin/env python3
"""What does a memory cost at every generated token: kNN-LM, the two memory decoders, both?

    python benchmarks/decoder.py                       a base of the card's size: 6 layers of 768
    python benchmarks/decoder.py --size gpt2 --dim 256 --keys 100000 --json decoder.json

Base, decoders and keys are random: only the time is looked at. What is timed is what the chat runs:
Conversation and distribution of memory_lm.py with their caches, by `latency` of memory_decoder.py.
One user, greedy, behind a prompt of --prompt tokens; the systems take turns of --tokens tokens in
one process, medians over --rounds turns count.
How to read it: `of base` is ms/token over that of the base alone, the median over turns. kNN and
`both` search an ivfpq index of --keys keys, with exact re-ranking, as shipped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from edm import SIZES
from scan import (
    OneLineParser,
    add_common_flags,
    choose_device,
    new_report,
    number,
    print_head,
    print_table,
    run_command,
    write_json,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.datastore import random_keys
from datastore import (
    NPROBE,
    Base,
    Datastore,
    KeyTap,
    Scale,
    add_keys,
    new_index,
    sample_keys,
)
from dnc_gpt2 import count_parameters
from memory_decoder import Config, Systems, latency, new_decoder


def random_base(args: argparse.Namespace, device: torch.device) -> Base:
    """Make a GPT-2 of random weights with the keys of its forward pass."""
    torch.manual_seed(0)
    sizes = GPT2Config(n_positions=1024, bos_token_id=None, eos_token_id=None, **SIZES[args.size])
    model = GPT2LMHeadModel(sizes).eval().requires_grad_(False).to(device)
    return Base(name=args.size, model=model, tokenizer=None, window=1024, prefix=(), own=True,
                tap=KeyTap(model, "feed_forward"), fingerprint="")


def random_store(args: argparse.Namespace, base: Base, folder: Path) -> Datastore:
    """Make an ivfpq datastore of random keys."""
    keys, _ = random_keys(args.keys, base.width, 1, folder)
    scale = Scale.of(keys)
    index = new_index("ivfpq", base.width, len(keys), sample_keys(keys, scale))
    add_keys(index, keys, scale, 0, len(keys))
    index.nprobe = min(NPROBE, index.nlist)
    values = torch.randint(0, base.vocab, (len(keys),), dtype=torch.int32).numpy()
    return Datastore(keys, values, index, "ivfpq", scale)


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> list[dict]:
    """Time every system -> a row each: parameters, ms/token, and its ratio to the base's."""
    base = random_base(args, device)
    config = Config(decoder_kind="hidden", decoder_dim=args.dim, latency_tokens=args.tokens,
                    latency_rounds=args.rounds)
    decoders = {kind: new_decoder(config, base, kind).ready() for kind in ("hidden", "tokens")}
    tuned = {
        "lambda": 0.3,
        "decay": 0.0,
        "tau": 0.1,
        "k": min(Config.knn_k, args.keys // 2),
        "both": {"alpha": 0.9, "lambda": 0.3, "decay": 0.0},
        "alphas": {"hidden": 0.9, "tokens": 0.9},
    }
    systems = Systems(decoders=decoders, store=random_store(args, base, folder))
    prompt = torch.randint(0, base.vocab, (args.prompt,)).tolist()
    times = latency(config, base, systems, tuned, prompt)

    models = {"base": base.model} | decoders
    rows = []
    for system, spent in times.items():
        ratios = [ours / bases for ours, bases in zip(spent, times["base"], strict=True)]
        model = models.get(system)
        rows.append({
            "system": system,
            "ms": statistics.median(spent),
            "ms_by_turn": spent,
            "parameters": count_parameters(model) if model is not None else None,
            "ratio": statistics.median(ratios),
        })
    return rows


def main() -> None:
    """Read the command line, measure, print the table."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="card")
    parser.add_argument("--dim", type=number(32), default=256, help="decoder_dim, a multiple of 32")
    parser.add_argument("--keys", type=number(1000), default=100_000)
    parser.add_argument("--prompt", type=number(1), default=128)
    parser.add_argument("--tokens", type=number(1), default=48)
    parser.add_argument("--rounds", type=number(1), default=7)
    add_common_flags(parser)
    args = parser.parse_args()
    device = choose_device(args)
    report = new_report(device)
    print_head(report, f"A generated token, {args.size} base, decoders of width {args.dim}, "
               f"{args.keys:,} keys")
    with tempfile.TemporaryDirectory() as folder:
        report["rows"] = measure(args, device, Path(folder))
    write_json(report, args.json)
    print_table(report["rows"], {"system": ("system", ""), "parameters": ("parameters", ","),
                                 "ms": ("ms/token", ".2f"), "ratio": ("of base", ".2f")})


if __name__ == "__main__":
    run_command(main)
