#!/usr/bin/env python3
"""Is a trained memory worth more than a parameter-free cache of as many slots?

    python benchmarks/neural_cache.py --baseline checkpoints/GPT2_Baseline_FINAL_step1500.pt \\
        --dnc checkpoints/GPT2_+_DNC_FINAL_step1500.pt --dataset folder

The cache is the continuous neural cache (Grave et al. 2017) over the baseline's last hidden states:
p = (1 - lambda) p_lm + lambda sum_s softmax_s(theta cos(h_t, h_s)) [x_s+1 = y], s the last N states
before t, N the slots of the DNC. "of the unexpected": s the last N states after which a token came
that the baseline had not expected, by --least nats, as the DNC writes. theta and lambda are chosen
on validation, test is scored once. How to read it: perplexity, and which part of the nats saved
falls on `<unk>` and on all the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import Tokenizer
from transformers import GPT2Config

import dnc_gpt2
from dnc_gpt2 import (
    CacheMemory,
    cache_weights,
    evaluation_rows,
    folder_texts,
    load_checkpoint,
    perplexity,
    surprisal,
    tokenize,
)

ROWS = 8


def load_model(path: str) -> tuple[dnc_gpt2.GPT2WithMemory, dict]:
    """The model of a checkpoint, and the checkpoint."""
    payload = load_checkpoint(path)
    config = dnc_gpt2.Config(**payload["config"])
    model = dnc_gpt2.build_model(config, GPT2Config.from_dict(json.loads(payload["controller"])))
    model.load_state_dict(payload["model_state_dict"])
    return model.eval(), payload


@torch.no_grad()
def token_nll(model: dnc_gpt2.GPT2WithMemory, stream: Tensor) -> Tensor:
    """The nats of every token of a stream, (ROWS, length), memory carried along the rows."""
    inputs, targets = evaluation_rows(stream, ROWS)
    state, nll = model.init_state(ROWS), []
    length = model.config.seq_len
    for x, y in zip(inputs.split(length, 1), targets.split(length, 1), strict=True):
        stats, state = model.measure(x, y, state, brief=True)
        nll.append(stats[..., 0])
    return torch.cat(nll, dim=1)


@torch.no_grad()
def cache_probability(model: dnc_gpt2.GPT2WithMemory, stream: Tensor, slots: int,
                      least: float = 0.0) -> dict[float, Tensor]:
    """By theta, what the cache gives every target of a stream, (ROWS, length); 0 while empty. It
    holds tokens of at least so many nats of surprisal."""
    inputs, targets = evaluation_rows(stream, ROWS)
    windows = [model.hidden(x, None)[0] for x in inputs.split(model.config.seq_len, 1)]
    h = torch.cat(windows, dim=1)  # (ROWS, length, C)
    before = F.pad(h[:, :-1], (0, 0, 1, 0))  # the state that each token followed
    is_kept = surprisal(before, inputs, model.head_weight()) >= least
    is_kept[:, 0] = False  # the first token followed none

    by_theta = {theta: torch.zeros(targets.shape) for theta in CacheMemory.THETAS}
    unit, keys = F.normalize(h, dim=-1), F.normalize(before, dim=-1)
    for row in range(ROWS):
        places = places_held(is_kept[row], slots)  # (length, N)
        for at in torch.arange(inputs.shape[1]).split(256):
            place = places[at].clamp_min(0)  # (t, N)
            held = torch.where(places[at] >= 0, inputs[row, place], -1)
            cosine = (keys[row, place] @ unit[row, at].unsqueeze(2)).squeeze(2)  # (t, N)
            match = held == targets[row, at].unsqueeze(1)
            for theta, found in by_theta.items():
                weights = cache_weights(cosine, held, theta)
                found[row, at] = (weights * match).sum(-1)
    return by_theta


def places_held(is_kept: Tensor, slots: int) -> Tensor:
    """Of a row (length,), the last `slots` places up to each place that are kept; -1 none."""
    places = is_kept.nonzero().squeeze(1)
    places = torch.cat((places, torch.tensor([-1])))  # what index -1 finds
    newest = is_kept.cumsum(0).unsqueeze(1) - 1  # (length, 1)
    slot = newest - torch.arange(slots)  # (length, slots)
    return places[slot.clamp_min(-1)]


def mixed_nll(nll: Tensor, cache: Tensor, share: float) -> Tensor:
    """The nats of (1 - share) p_lm + share p_cache."""
    return -((1 - share) * (-nll).exp() + share * cache).log()


def best_setting(nll: Tensor, cache: dict[float, Tensor], scored: Tensor) -> tuple[float, float]:
    """theta and lambda of the least mean nats."""
    settings = itertools.product(CacheMemory.THETAS, CacheMemory.LAMBDAS)
    return min(settings, key=lambda pair: mixed_nll(
        nll, cache[pair[0]], pair[1])[scored].mean().item())


def is_unknown(stream: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Which targets of a stream, (ROWS, length), are pieces of the word `<unk>`."""
    pieces = torch.tensor(tokenizer.encode(" <unk>", add_special_tokens=False).ids)
    marked = torch.zeros(len(stream), dtype=torch.bool)
    windows = stream.unfold(0, len(pieces), 1)  # (length, pieces)
    for start in (windows == pieces).all(1).nonzero().flatten().tolist():
        marked[start : start + len(pieces)] = True
    return evaluation_rows(marked.long(), ROWS)[1] == 1


def report(name: str, nll: Tensor, base: Tensor, scored: Tensor, unknown: Tensor) -> dict:
    """Print one line, and return its figures."""
    mean = nll[scored].mean().item()
    gain = (base - nll)[scored]
    on_unknown = (gain * unknown[scored]).sum() / gain.sum() if gain.any() else torch.tensor(0.0)
    ppl, ppl_base = perplexity(mean), perplexity(base[scored].mean().item())
    print(f"  {name:<34} {ppl:8.2f}  {ppl / ppl_base - 1:+7.1%}   {on_unknown.item():7.1%}")
    return {"name": name, "ppl": ppl, "change": ppl / ppl_base - 1, "unk": on_unknown.item()}


def main(argv: list[str]) -> int:
    """Print and write the comparison; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--baseline", required=True, help="checkpoint of a baseline")
    parser.add_argument("--dnc", help="checkpoint of a GPT2 + DNC of the same data")
    parser.add_argument("--dataset", required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--slots", type=int, default=64, help="of the cache, without --dnc")
    parser.add_argument("--least", type=float, default=4.0, help="nats, of the choosy cache")
    parser.add_argument("--tokens", type=int, default=100_000, help="of each split")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)

    base, payload = load_model(args.baseline)
    tokenizer = Tokenizer.from_str(payload["tokenizer"])
    texts = folder_texts(args.dataset)
    streams = {split: tokenize(tokenizer, texts[split])[: args.tokens + 1]
               for split in ("valid", "test")}
    dnc = load_model(args.dnc)[0] if args.dnc else None
    slots = dnc.config.mem_slots if dnc else args.slots

    figures, best = [], {}
    for split, stream in streams.items():
        scored = evaluation_rows(stream, ROWS)[1] != -100
        unknown = is_unknown(stream, tokenizer)
        nll = token_nll(base, stream)
        print(f"{split}, {scored.sum():,} tokens, N {slots}\n  {'':<34} {'ppl':>8}  {'change':>7}"
              "   of gain on <unk>")
        rows = {"baseline": nll}
        for name, least in (("neural cache", 0.0), ("of the unexpected", args.least)):
            cache = cache_probability(base, stream, slots, least)
            if split == "valid":
                best[name] = best_setting(nll, cache, scored)
            theta, share = best[name]
            rows[f"{name}, {theta:g}, {share:g}"] = mixed_nll(nll, cache[theta], share)
        if dnc:
            rows["DNC"] = token_nll(dnc, stream)
        for name, values in rows.items():
            figures.append({"split": split, **report(name, values, nll, scored, unknown)})
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    from scan import run_command

    run_command(lambda: main(sys.argv[1:]))
