#!/usr/bin/env python3
"""Tokens a second of generate(), GPT-2 and GPT-2 with a DNC, and whether length slows them down.

    python benchmarks/generate.py --tokens 2000
    python benchmarks/generate.py --size small --tokens 200 --rounds 3

Models of random weights, built from one configuration: the baseline, the DNC with its fused
recurrence, and the DNC in the readable loop, as an exported folder has it. transformers'
generate(), greedy, one row; the models alternate, medians of the rounds. The quarters are those of
the longest round of each model. CPU or CUDA; a table on stdout, everything in --json.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import GPT2Config
from transformers.generation.streamers import BaseStreamer

from dnc_gpt2 import count_parameters
from dnc_model import DNCGPT2Config, DNCGPT2ForCausalLM

SIZES = {
    "card": {"n_embd": 768, "n_layer": 6, "n_head": 8, "n_positions": 128, "vocab_size": 50257},
    "small": {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 4096},
}
MODELS = {
    "baseline": {"memory": "none"},
    "DNC": {"memory": "dnc", "scan": "auto"},
    "DNC, loop": {"memory": "dnc", "scan": "eager"},
}


class Clock(BaseStreamer):
    """When each token came; the first call is the prompt's."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(self.now())

    def end(self) -> None:
        pass


def build(size: str, fields: dict, device: str) -> DNCGPT2ForCausalLM:
    """A model of that size."""
    torch.manual_seed(0)
    base = GPT2Config(**SIZES[size], bos_token_id=0, eos_token_id=None).to_dict()
    return DNCGPT2ForCausalLM(DNCGPT2Config(base=base, **fields)).eval().to(device)


def run(model: DNCGPT2ForCausalLM, tokens: int, now: Callable[[], float]) -> list[float]:
    """Seconds of every token but the first, which waits for the prompt."""
    prompt = torch.arange(1, 17, device=model.device).unsqueeze(0)
    clock = Clock(now)
    model.generate(prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=clock,
                   attention_mask=torch.ones_like(prompt))
    times = clock.times[1:]
    return [after - before for before, after in zip(times[:-1], times[1:], strict=True)]


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="card")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cpu_time", action="store_true",
                        help="seconds of the CPU: for one thread beside other work")
    parser.add_argument("--json", default="")
    args = parser.parse_args(argv)

    now = time.process_time if args.cpu_time else time.perf_counter
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: build(args.size, fields, device) for name, fields in MODELS.items()}
    rounds = {name: [] for name in models}
    for model in models.values():
        run(model, 8, now)  # warm-up
    for _ in range(args.rounds):
        for name, model in models.items():
            rounds[name].append(run(model, args.tokens, now))

    print(f"{args.size}, {args.tokens} tokens, {device}, {torch.get_num_threads()} threads, "
          f"float32, torch {torch.__version__}" + (", CPU time" if args.cpu_time else ""))
    print(f"{'':<12}{'parameters':>14}{'tokens/s':>10}{'of baseline':>13}   tokens/s by quarter")
    report = {}
    for name, of_model in rounds.items():
        speed = statistics.median(len(seconds) / sum(seconds) for seconds in of_model)
        quarter = len(of_model[0]) // 4
        quarters = [quarter / sum(of_model[0][i * quarter : (i + 1) * quarter]) for i in range(4)]
        report[name] = {"tokens_per_s": speed, "quarters": quarters}
        share = speed / report["baseline"]["tokens_per_s"]
        print(f"{name:<12}{count_parameters(models[name]):>14,}{speed:>10.1f}{share:>13.3f}   "
              + " ".join(f"{value:8.1f}" for value in quarters))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
