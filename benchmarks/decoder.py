#!/usr/bin/env python3
"""What does a memory cost at every generated token: kNN-LM, the two memory decoders, both?

    python benchmarks/decoder.py                       a base of the card's size: 6 layers of 768
    python benchmarks/decoder.py --size gpt2 --dim 256 --keys 100000 --json decoder.json

Base, decoders and keys are random: only the time is looked at. What is timed is what the chat runs,
memory_decoder.py's Conversation and distribution with their caches, by its function `latency`: one
user, greedy, behind a prompt of --prompt tokens; the systems take turns of --tokens tokens in one
process, medians over --rounds turns count.
How to read it: `of base` is ms/token over that of the base alone, the median over turns. kNN and
`both` search an ivfpq index of --keys keys, with exact re-ranking, 128 neighbours, 32 lists.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from datastore import random_keys
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

import memory_decoder as md


def random_base(args: argparse.Namespace, device: torch.device) -> md.Base:
    """A GPT-2 of random weights with the keys of its forward pass."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=1024, bos_token_id=None, eos_token_id=None,
                                       **SIZES[args.size])).eval().requires_grad_(False).to(device)
    return md.Base(args.size, model, None, 1024, (), True, md.KeyTap(model, "feed_forward"), "")

def random_store(args: argparse.Namespace, width: int, vocab: int, folder: Path) -> md.Datastore:
    """An ivfpq datastore of random keys."""
    keys, _ = random_keys(args.keys, width, 1, folder)
    index = md.new_index("ivfpq", width, len(keys), md.sample_keys(keys))
    md.add_keys(index, keys, 0, len(keys))
    index.nprobe = min(md.Config.nprobe, index.nlist)
    values = torch.randint(0, vocab, (len(keys),), dtype=torch.int32).numpy()
    return md.Datastore(keys, values, index, "ivfpq", md.Config.rerank)

def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> list[dict]:
    """A row a system: parameters, ms/token, and its ratio to the base's."""
    base = random_base(args, device)
    config = md.Config(decoder_dim=args.dim, latency_tokens=args.tokens,
                       latency_rounds=args.rounds)
    decoders = {kind: md.new_decoder(config, base, kind).ready()
                for kind in ("hidden", "tokens")}
    tuned = {"lambda": 0.3, "tau": 10.0, "k": min(md.Config.knn_k, args.keys // 2),
             "both": {"alpha": 0.9, "lambda": 0.3}, "alphas": {"hidden": 0.9, "tokens": 0.9}}
    store = random_store(args, base.width, base.vocab, folder)
    found = md.Systems({"settings": tuned}, store, decoders, finetuned=None)
    prompt = torch.randint(0, base.vocab, (args.prompt,)).tolist()
    times = md.latency(config, base, found, prompt)
    sizes = {"base": base.model} | decoders
    return [{"system": name, "ms": statistics.median(spent), "ms_by_turn": spent,
             "parameters": md.count_parameters(sizes[name]) if name in sizes else None,
             "ratio": statistics.median(a / b for a, b in zip(spent, times["base"], strict=True))}
            for name, spent in times.items()]

def main() -> None:
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
