#!/usr/bin/env python3
"""What does a whole training step of GPT2 + DNC cost, beside the baseline's?

    python benchmarks/step.py                          card, small and (CUDA) long
    python benchmarks/step.py --sizes small --scan eager,fused --fraction 0.125,1 --json step.json
    python benchmarks/step.py --memory pointing,plain  Graves' DNC beside the default

Sizes: card, dnc_gpt2's preset `full` (B 4, T 128); small, its preset `small` (B 8, T 64); long, the
card's model at B 32, T 1024, on a CPU only where --sizes names it. Arms: the baseline, and GPT2 +
DNC for every --memory (pointing, the default of dnc_gpt2.py; plain, Graves' DNC), every --scan and
every --fraction (routing_fraction, the share of positions at which the routing loss computes logits
without memory).
What is timed: dnc_gpt2.train_step as the main job calls it, on random tokens: forward, all losses,
backward, clipping, AdamW. The arms of a size take turns in one process, the device synchronised
around each step; a figure is the median of --repeats steps after three to warm up. Timings of a
busy machine mean nothing.
How to read it: `ratio` is step ms over that of the baseline of the same size and precision, 1 is a
memory that costs nothing. `peak`, on CUDA, is the most that is allocated during a step, less what
the waiting arms hold; on a CPU it is the largest resident size of a fresh process that builds one
arm and takes three steps, with the 300 MiB or so of Python and torch in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from scan import (
    OneLineParser,
    add_common_flags,
    choose_device,
    new_report,
    number,
    print_head,
    print_table,
    some_of,
    synchronize,
    write_json,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnc_gpt2 import (
    PRESETS,
    Config,
    Diverged,
    Run,
    choose_hardware,
    peak_memory_mb,
    start_run,
    train_step,
    training_rows,
)

WARM_UP = 3  # steps: compiling, the optimizer's moments, the allocator's pools
CARD = {name: shipped for name, (shipped, _) in PRESETS.items()}
SMALL = {name: small for name, (_, small) in PRESETS.items()}
SIZES = {"card": CARD, "small": SMALL, "long": CARD | {"batch_size": 32, "seq_len": 1024}}

# Fields of Config; what is not named stays as it is shipped.
MEMORIES = {"pointing": {}, "plain": {"pointing": False, "split_rows": False, "empty_slot": False,
                                      "usage_decay": 1.0, "min_surprisal": 0.0}}

class Arm(NamedTuple):
    name: str  # baseline | dnc
    memory: str | None = None  # of dnc: key of MEMORIES
    scan: str | None = None  # of dnc: Config.scan
    fraction: float | None = None  # of dnc: Config.routing_fraction

class Job(NamedTuple):
    """What every arm of one comparison has in common."""
    size: str  # key of SIZES
    precision: str  # float32 | bf16
    vocab: int
    steps: int
    device: torch.device

class RandomTokens(NamedTuple):
    """The part of dnc_gpt2.Corpus that building an arm reads."""
    train: torch.Tensor  # (tokens,) int64
    vocab_size: int

def build(arm: Arm, job: Job) -> tuple[Run, torch.Tensor]:
    """An arm ready to train, and its token rows (B, steps * T + 1). Raises ValueError."""
    fields = SIZES[job.size] | {"precision": job.precision, "max_steps": job.steps}
    if arm.name == "dnc":
        fields = fields | MEMORIES[arm.memory]
        fields = fields | {"scan": arm.scan, "routing_fraction": arm.fraction}
    config = Config(**fields)
    tokens = torch.randint(job.vocab, (job.steps * config.batch_size * config.seq_len + 1,),
                           generator=torch.Generator().manual_seed(0))
    run = start_run(arm.name, config, RandomTokens(tokens, job.vocab), job.device)
    return run, training_rows(tokens, config.rows, config.step_len).to(job.device)

def fresh_process_peak(arm: Arm, job: Job, threads: int) -> float:
    """Peak resident MiB of a few steps; to be called in a process that did nothing else."""
    torch.set_num_threads(threads)
    run, rows = build(arm, job)
    peak_memory_mb(job.device, reset=True)
    for _ in range(WARM_UP):
        train_step(run, run.model, rows)
    return peak_memory_mb(job.device)

def cpu_peak_mb(arm: Arm, job: Job) -> float | None:
    """Peak resident MiB of one arm in its own process; None where the system cannot tell."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(fresh_process_peak, (arm, job, torch.get_num_threads()))
    return peak if peak == peak else None  # NaN is no JSON

def warm_up(arm: Arm, job: Job) -> tuple[Run, torch.Tensor, int] | None:
    """An arm after its first steps -> run, rows, and the bytes that it holds on the device between
    steps (0 on a CPU); None, with a line that says so, where it does not fit the device."""
    before = torch.cuda.memory_allocated() if job.device.type == "cuda" else 0
    try:
        run, rows = build(arm, job)
        for _ in range(WARM_UP):
            train_step(run, run.model, rows)
    except torch.cuda.OutOfMemoryError:
        print(f"  {job.size} {job.precision} {arm}: left out, more memory than the device has free")
        return None
    synchronize(job.device)
    held = torch.cuda.memory_allocated() - before if job.device.type == "cuda" else 0
    return run, rows, held

def timed_step(run: Run, rows: torch.Tensor, held: int, device: torch.device
               ) -> tuple[float, float | None]:
    """Seconds of one step; on CUDA also its peak MiB, less what the other arms hold."""
    synchronize(device)
    others = 0
    if device.type == "cuda":
        others = torch.cuda.memory_allocated() - held
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    train_step(run, run.model, rows)
    synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - others if device.type == "cuda" else None
    return seconds, peak and peak / 2**20

def measure(arms: list[Arm], job: Job) -> list[dict]:
    """Time the arms of one size and precision in turns -> a row each."""
    on_cpu = job.device.type == "cpu"
    # Before this process builds its own arms, so that the machine's memory holds one at a time.
    peaks = {arm: cpu_peak_mb(arm, job) if on_cpu else 0.0 for arm in arms}
    found = {arm: warm for arm in arms if (warm := warm_up(arm, job))}
    seconds = {arm: [] for arm in found}
    for _ in range(job.steps - WARM_UP):
        for arm, (run, rows, held) in found.items():
            duration, peak = timed_step(run, rows, held, job.device)
            seconds[arm].append(duration)
            peaks[arm] = peaks[arm] if peak is None else max(peaks[arm], peak)
    rows = []
    for arm, (run, _, _) in found.items():
        step_ms, config = 1e3 * statistics.median(seconds[arm]), run.config
        tokens = config.batch_size * config.seq_len
        rows.append({
            "arm": arm.name, "memory": arm.memory, "scan": arm.scan,
            "routing_fraction": arm.fraction, "size": job.size, "dtype": job.precision,
            "B": config.batch_size, "T": config.seq_len,
            "step_ms": step_ms, "tokens_per_s": 1e3 * tokens / step_ms, "peak_mb": peaks[arm]})
    baseline_ms = next((row["step_ms"] for row in rows if row["arm"] == "baseline"), None)
    return [row | {"ratio": baseline_ms and row["step_ms"] / baseline_ms} for row in rows]

STEP_COLUMNS = {
    "size": ("size", ""), "dtype": ("precision", ""), "B": ("B", "d"), "T": ("T", "d"),
    "arm": ("arm", ""), "memory": ("memory", ""), "scan": ("scan", ""),
    "routing_fraction": ("fraction", "g"),
    "step_ms": ("step ms", ",.1f"), "ratio": ("ratio", ".3f"),
    "tokens_per_s": ("tokens/s", ",.0f"), "peak_mb": ("peak MiB", ",.0f")}

# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
def fractions(text: str) -> list[float]:
    read = number(0, float)
    values = [read(part) for part in text.split(",")]
    if not all(0 < value <= 1 for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r}: must be above 0, at most 1, each once")
    return values

def parse(argv: list[str]) -> argparse.Namespace:
    summary = "\n\n".join(__doc__.split("\n\n")[:2])
    parser = OneLineParser(description=summary, epilog=__doc__.split("\n\n", 2)[2],
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=some_of(*SIZES), metavar="LIST",
                        help="of card, small, long; default: all, on a CPU card and small")
    parser.add_argument("--memory", type=some_of(*MEMORIES), default=["pointing"], metavar="LIST",
                        help="of pointing, plain; default pointing")
    parser.add_argument("--scan", type=some_of("auto", "eager", "fused"), default=["auto"],
                        metavar="LIST", help="of auto, eager, fused; default auto")
    parser.add_argument("--fraction", type=fractions, default=[0.125, 1.0], metavar="LIST",
                        help="of routing_fraction; default 0.125,1")
    parser.add_argument("--precision", type=some_of("auto", "float32", "bf16"), default=["auto"],
                        metavar="LIST", help="auto: bf16 on GPUs that have it, else float32")
    parser.add_argument("--repeats", "--steps", type=number(5), default=7, dest="repeats",
                        help="timed steps of each arm, at least 5; default 7")
    parser.add_argument("--vocab", type=number(2), default=50_257, help="default: GPT-2's 50,257")
    add_common_flags(parser)
    return parser.parse_args(argv)

def run_benchmark(args: argparse.Namespace, device: torch.device, report: dict) -> None:
    """Measure every size in every precision; print each as it is done, and all at the end."""
    sizes, gpus = args.sizes, int(device.type == "cuda")
    if sizes is None:
        sizes = list(SIZES) if gpus else ["card", "small"]
        if not gpus:
            print("size long left out: too large for most CPUs; ask for it with --sizes long")
    arms = [Arm("baseline"), *(Arm("dnc", memory, scan, fraction) for memory in args.memory
                               for scan in args.scan for fraction in args.fraction)]
    chosen = (choose_hardware(Config(precision=precision, num_gpus=gpus), gpus)[0].precision
              for precision in args.precision)
    precisions = list(dict.fromkeys(chosen))  # auto may be one that is named as well
    for size in sizes:
        for precision in precisions:
            job = Job(size, precision, args.vocab, WARM_UP + args.repeats, device)
            rows = measure(arms, job)
            print_table(rows, STEP_COLUMNS)
            report["rows"] += rows
            write_json(report, args.json)

def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 1 diverged, 2 a user's mistake."""
    args = parse(argv)
    try:
        device = choose_device(args)
        report = new_report(device)
        print_head(report, "A whole training step")
        run_benchmark(args, device, report)
    except (ValueError, OSError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks the dash still gets the table
    sys.exit(main(sys.argv[1:]))
