#!/usr/bin/env python3
"""How long does the DNC recurrence alone take, and is the fast one the same function?

    python benchmarks/scan.py                          every back end at the card's shape
    python benchmarks/scan.py --sweep all --json scan.json
    python benchmarks/scan.py --memory plain           Graves' DNC
    python benchmarks/scan.py --check                  fused against eager, values and gradients

Memories: pointing, dnc_gpt2's default, where addressing compares the first half of a row, reads
return the second, usage decays and a read may choose an empty slot; plain, Graves' DNC without any
of these. Either with temporal links (--links) and a wipe (--wipe).
Back ends: eager, the readable loop dnc_gpt2.dnc_loop; compiled, torch.compile of that loop over
chunks of 8 tokens; fused, dnc_scan.dnc_scan; pytorch-dnc, the memory of the package `dnc`
(optional: `pip install dnc`; it is a plain memory, always has temporal links, and applies the
activations of the interface itself, which are outside the others' time).
What is timed: from activated interface vectors and a carried float32 state to reads and write
weightings, then the gradient of both into the interface. Forward and backward apart, the device
synchronised around each. The back ends take turns in one process; a figure is the median of
--repeats turns after two to warm up. Timings of a busy machine mean nothing.
How to read it: `first s` is the first pass of all, with compiling, or with loading what a cache
on disk holds; `us/token` is forward + backward over B x T; `saved` is what autograd keeps from
forward to backward beyond the inputs, every storage once; `peak` (CUDA) is the most that forward
and backward allocate beyond the inputs. A slope is the exponent of a power law fitted over a sweep:
1 is linear. `floor` (CUDA) is the larger of two times: T times the measured latency of the least
chain that a step depends on (four sums over the slots, one after the other, in as many warps as the
kernel has, and nothing else), and the kernel's bytes over the measured bandwidth of a copy.

Letters as in dnc_gpt2.py: B batch rows, T time, N memory slots, W word width, R read heads.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnc_gpt2 import (
    DNCOptions,
    DNCState,
    Interface,
    dnc_loop,
    dnc_step,
    interface_sizes,
    split_interface,
    zero_state,
)
from dnc_scan import dnc_scan, refusal
from dnc_scan.cuda import jit, kernel_sizes, tl
from dnc_scan.layout import STATE, value_width

CHUNK = 8  # tokens of one compiled graph: more compile for minutes
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # of gradients, whose type rounds them
READS_TOLERANCE = 1e-3  # absolute; the recurrence itself is float32 whatever the interface is
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

class Shape(NamedTuple):
    B: int
    T: int
    N: int
    W: int
    R: int

class Problem(NamedTuple):
    """What a back end is asked to do."""
    shape: Shape
    options: DNCOptions
    dtype: torch.dtype  # of the interface; the state is float32
    device: torch.device

MEMORIES = ("pointing", "plain")

def memory_options(memory: str, shape: Shape, links: bool, wipe: bool) -> DNCOptions:
    """The switches of one of MEMORIES at this shape, as dnc_gpt2.Config sets them."""
    options = DNCOptions(use_links=links, dealloc_wipe=wipe)
    if memory == "plain":
        return options
    return options._replace(key_width=shape.W // 2, usage_decay=max(0.0, 1 - 1.28 / shape.N),
                            empty_slot=True)

def memory_name(options: DNCOptions) -> str:
    return "pointing" if options.empty_slot else "plain"

SWEEPS = {"length": ("T", [2**k for k in range(7, 14)]),  # 128 .. 8192
          "slots": ("N", [2**k for k in range(4, 9)]),  # 16 .. 256
          "batch": ("B", [2**k for k in range(6)])}  # 1 .. 32

# ══ Shared with step.py: flags, median timing, versions, JSON ════════════════════════════════════
class OneLineParser(argparse.ArgumentParser):
    """A bad flag ends in one line and exit code 2, as everywhere in this repository."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")

def run_command(main: Callable[[], int | None]) -> None:
    """A bad value ends as a bad flag does: in one line and exit code 2."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks the dash still gets the table
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

def number(least: float, kind: type = int) -> Callable[[str], float]:
    """A flag's type: a number of at least `least`."""
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: must be {kind.__name__} >= {least}")
        return value
    return read

def some_of(*names: str) -> Callable[[str], list[str]]:
    """A flag's type: a comma-separated choice of names, each once."""
    def read(text: str) -> list[str]:
        chosen = text.replace(" ", "").split(",")
        if not set(chosen) <= set(names) or len(set(chosen)) < len(chosen):
            raise argparse.ArgumentTypeError(f"{text!r}: must be of {', '.join(names)}, each once")
        return chosen
    return read

def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: CUDA where there is a device")
    parser.add_argument("--threads", type=number(1), help="of the CPU; default: torch's choice")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the report here as well")

def choose_device(args: argparse.Namespace) -> torch.device:
    """Apply --device and --threads. Raises ValueError for what is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is visible; use --device cpu")
    if args.json and not args.json.resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist; make it first")
    if args.threads:
        torch.set_num_threads(args.threads)
    use_cuda = args.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")

def new_report(device: torch.device) -> dict:
    """The head of a JSON report: device, versions, date, command, and no rows yet."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "numba", "transformers", "dnc"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    name = f"CPU, {cpu_name()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"device": name, "versions": versions, "date": date, "command": sys.argv[1:], "rows": []}

def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

def print_head(report: dict, what: str) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"{what}\n  device    {report['device']}\n  versions  {versions}", flush=True)

def write_json(report: dict, path: Path | None) -> None:
    """Write the report so far; called after every part, so that a time limit loses only the rest.
    Strict JSON: what could not be measured is null."""
    if path:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")

def print_table(rows: list[dict], columns: dict[str, tuple[str, str]]) -> None:
    """One line a row. columns: key of a row -> (heading, format); None is printed as a dash."""
    lines = [[heading for heading, _ in columns.values()]]
    for row in rows:
        cells = ((row.get(key), form) for key, (_, form) in columns.items())
        lines.append(["—" if x is None else format(x, form) for x, form in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  " + "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(cells)))
    print(flush=True)

def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

# ══ Inputs and back ends ═════════════════════════════════════════════════════════════════════════
def make_inputs(problem: Problem, state_gradient: bool = False) -> tuple[Interface, DNCState]:
    """Activated interface vectors, each part a leaf, and a carried state: random contents, links
    and weightings, distinct usages. The same numbers on every device."""
    (B, T, N, W, R), options, dtype, device = problem
    draw = torch.Generator().manual_seed(0)
    random = functools.partial(torch.randn, generator=draw)
    z = random(B, T, sum(interface_sizes(W, R, options).values()))  # (B, T, I)
    usage = torch.stack([torch.randperm(N, generator=draw) for _ in range(B)])  # (B, N)
    state = zero_state(B, N, W, R, options)._replace(
        memory=random(B, N, W) / 2, usage=0.05 + 0.9 * usage / N,
        write_weights=random(B, N).softmax(-1) / 2, read_weights=random(B, R, N).softmax(-1))
    if options.use_links:
        precedence = random(B, N).softmax(-1)  # (B, N)
        link = random(B, N, N).softmax(-1) * (1 - torch.eye(N))  # (B, N, N)
        state = state._replace(link=link, precedence=precedence)
    x, K = split_interface(z, W, R, options), options.key_width or W
    x = x._replace(write_key=x.write_key[..., :K], read_keys=x.read_keys[..., :K])
    x = map_parts(lambda p: p.to(device, dtype).detach().clone().requires_grad_(), x)
    return x, map_floats(lambda s: s.to(device).requires_grad_(state_gradient), state)

def map_parts(fn, x: Interface) -> Interface:
    """Apply fn to every part of an interface that is switched on."""
    return Interface(*(None if part is None else fn(part) for part in x))

def map_floats(fn, state: DNCState) -> DNCState:
    """Apply fn to the fields that the recurrence computes with: not to token ids."""
    return state._replace(**{name: fn(getattr(state, name)) for name in STATE})

def fields_of(state: DNCState) -> list[torch.Tensor]:
    return [getattr(state, name) for name in STATE]

class Arm(NamedTuple):
    """A back end with its inputs."""
    forward: Callable[[], tuple[torch.Tensor, torch.Tensor]]  # -> reads, write weights
    leaves: list[torch.Tensor]  # what the gradient is wanted of
    inputs: list[torch.Tensor]  # the leaves and the state
    gradients: list[torch.Tensor]  # of the two results

def eager(x: Interface, state: DNCState, options: DNCOptions) -> tuple:
    return dnc_loop(map_parts(torch.Tensor.float, x), state, options)

@functools.cache
def compiled_chunk() -> Callable:
    return torch.compile(dnc_loop, dynamic=False)

def compiled(x: Interface, state: DNCState, options: DNCOptions) -> tuple:
    """T / CHUNK calls of one graph; the tokens that fill no chunk go through the eager loop."""
    chunks, rest = divmod(x.write_gate.shape[1], CHUNK)
    whole, parts, outputs = chunks * CHUNK, [], []
    for part in x:
        if part is None:
            parts.append([None] * (chunks + 1))
            continue
        part = part.float()
        # Contiguous chunks: the strides of a slice tell T, and every T would compile anew.
        cut = part[:, :whole].unflatten(1, (chunks, CHUNK)).transpose(0, 1).contiguous()
        parts.append([*cut, part[:, whole:]])  # (B, CHUNK, ...) each, and what is left
    # The state of later chunks needs a gradient: if the first one's did not, two graphs were made.
    state = map_floats(lambda s: s.detach().requires_grad_(), state)
    for i, piece in enumerate(zip(*parts, strict=True)):
        if i < chunks or rest:
            run = compiled_chunk() if i < chunks else dnc_loop
            *results, state = run(Interface(*piece), state, options)
            outputs.append(results)
    return (*(torch.cat(part, dim=1) for part in zip(*outputs, strict=True)), state)

def pytorch_dnc(problem: Problem, state: DNCState) -> tuple[Callable, torch.Tensor]:
    """The package's memory alone, its linear layer taken out -> forward, interface vectors."""
    from dnc import Memory
    B, T, N, W, R = problem.shape
    memory = Memory(1, mem_size=N, cell_size=W, read_heads=R, independent_linears=False)
    memory.interface_weights = nn.Identity()
    memory.I = memory.I.to(problem.device)
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(B, T, memory.interface_size, generator=draw)  # (B, T, I), before activations
    z = z.to(problem.device, problem.dtype).requires_grad_()
    linked = problem.options.use_links
    carried = {"memory": state.memory, "usage_vector": state.usage,
               "read_weights": state.read_weights, "write_weights": state.write_weights[:, None],
               "link_matrix": state.link[:, None] if linked else z.new_zeros(B, 1, N, N).float(),
               "precedence": state.precedence[:, None] if linked else z.new_zeros(B, 1, N).float()}

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        hidden, reads, write_weights = dict(carried), [], []
        for token in z.float().unbind(1):
            read, hidden = memory(token, hidden)
            reads.append(read)
            write_weights.append(hidden["write_weights"][:, 0])
        return torch.stack(reads, dim=1), torch.stack(write_weights, dim=1)
    return forward, z

BACKENDS = {"eager": eager, "compiled": compiled, "fused": dnc_scan, "pytorch-dnc": pytorch_dnc}

def make_arm(backend: str, problem: Problem) -> Arm:
    """A back end ready to be timed, with random gradients for its two results."""
    x, state = make_inputs(problem)
    B, T, N, W, R = problem.shape
    draw = torch.Generator().manual_seed(1)
    V = value_width(problem.options.key_width or W, W)
    gradients = [torch.randn(*size, generator=draw).to(problem.device)
                 for size in ((B, T, R, V), (B, T, N))]
    if backend == "pytorch-dnc":
        forward, z = pytorch_dnc(problem, state)
        return Arm(forward, [z], [z, *fields_of(state)], gradients)
    leaves, run = [part for part in x if part is not None], BACKENDS[backend]
    return Arm(lambda: run(x, state, problem.options)[:2], leaves, [*leaves, *fields_of(state)],
               gradients)

def why_not(backend: str, problem: Problem) -> str:
    """Why a back end cannot run a problem; "" where it can."""
    if backend == "fused":
        (B, _, N, W, R), options, _, device = problem
        return refusal(zero_state(B, N, W, R, options, device=device), options)
    if backend == "pytorch-dnc" and problem.options.key_width:
        return "it is a plain memory: --memory plain"
    if backend == "pytorch-dnc" and importlib.util.find_spec("dnc") is None:
        return "not installed (optional: pip install dnc)"
    if backend == "compiled" and problem.shape.T < CHUNK:
        return f"compiles chunks of {CHUNK} tokens"
    return ""

# ══ Measuring ════════════════════════════════════════════════════════════════════════════════════
def timed_pass(arm: Arm, device: torch.device) -> tuple[float, float]:
    """Seconds of one forward and of one backward."""
    synchronize(device)
    start = time.perf_counter()
    outputs = arm.forward()
    synchronize(device)
    middle = time.perf_counter()
    torch.autograd.grad(outputs, arm.leaves, arm.gradients, allow_unused=True)
    synchronize(device)
    return middle - start, time.perf_counter() - middle

def storages(tensors: list[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Storages by address; holding them keeps an address from being used twice."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}

def bytes_kept(arm: Arm) -> tuple[int, int]:
    """Bytes that autograd keeps for the backward beyond the inputs, each storage once; and the
    same with the results, kept or not: all that a forward has to write."""
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.detach())
        return saved[-1]

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        results = list(arm.forward())
    inputs = storages(arm.inputs)
    sizes = ({k: s.nbytes() for k, s in storages(tensors).items() if k not in inputs}
             for tensors in (saved, saved + results))
    saved_bytes, written_bytes = (sum(size.values()) for size in sizes)
    return saved_bytes, written_bytes

def peak_mb(arm: Arm, device: torch.device) -> float | None:
    """MiB of CUDA memory that one forward and backward allocate at most beyond the inputs."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    timed_pass(arm, device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20

class CallCounter(TorchDispatchMode):
    """Counts the ATen operators that are dispatched within it."""
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))

def calls_a_step(backend: str, problem: Problem) -> float:
    """ATen operators that the forward dispatches for one step of all rows, views included. Those
    of one step more, so that what is done once a call is left out."""
    counts = []
    for length in (2, 3):
        arm = make_arm(backend, problem._replace(shape=problem.shape._replace(T=length)))
        with CallCounter() as counter:
            arm.forward()
        counts.append(counter.calls)
    return counts[1] - counts[0]

def warm_up(backend: str, problem: Problem, limit: float) -> tuple[Arm, float] | None:
    """Two passes -> the arm and the seconds of the first; None, with a line that says why, where
    the back end cannot run this or the second pass exceeds the limit."""
    why = why_not(backend, problem)
    if not why:
        try:
            arm = make_arm(backend, problem)
            first, second = (sum(timed_pass(arm, problem.device)) for _ in range(2))
            if second <= limit:
                return arm, first
            why = f"one pass took {second:.1f} s, above the limit of {limit:g} s"
        except RuntimeError as error:  # out of memory; for `compiled` also a missing compiler
            if backend != "compiled" and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            why = str(error).strip().splitlines()[0]
    print(f"  {backend} left out at {problem.shape}: {why}".replace("Shape", ""), flush=True)
    return None

def measure(backends: list[str], problem: Problem, repeats: int, limit: float = math.inf
            ) -> list[dict]:
    """Time the back ends that can run, in turns -> a row each."""
    device, found = problem.device, {}
    for backend in backends:
        if warm := warm_up(backend, problem, limit):
            found[backend] = warm
    times = {backend: [] for backend in found}
    for _ in range(repeats):
        for backend, (arm, _) in found.items():
            times[backend].append(timed_pass(arm, device))
    rows = []
    for backend, (arm, first) in found.items():
        forward, backward = (1e3 * statistics.median(t) for t in zip(*times[backend], strict=True))
        linked = problem.options.use_links or backend == "pytorch-dnc"
        tokens = problem.shape.B * problem.shape.T
        rows.append({
            "backend": backend, "memory": memory_name(problem.options),
            "dtype": str(problem.dtype).removeprefix("torch."),
            **problem.shape._asdict(), "links": linked, "wipe": problem.options.dealloc_wipe,
            "forward_ms": forward, "backward_ms": backward, "total_ms": forward + backward,
            "ms_per_token": (forward + backward) / tokens, "saved_mb": bytes_kept(arm)[0] / 2**20,
            "peak_mb": peak_mb(arm, device), "first_s": first})
    return rows

SCAN_COLUMNS = {
    "backend": ("back end", ""), "memory": ("memory", ""), "dtype": ("interface", ""),
    **{k: (k, "d") for k in Shape._fields},
    "forward_ms": ("forward ms", ",.2f"), "backward_ms": ("backward ms", ",.2f"),
    "total_ms": ("both ms", ",.2f"), "speedup": ("eager/this", ",.1f"),
    "us_per_token": ("us/token", ",.1f"), "saved_mb": ("saved MiB", ",.1f"),
    "peak_mb": ("peak MiB", ",.1f"), "first_s": ("first s", ",.1f")}

def print_rows(rows: list[dict]) -> None:
    """The rows with two derived columns: how many times faster than eager, and us a token."""
    eager_ms = {tuple(r[k] for k in Shape._fields): r["total_ms"]
                for r in rows if r["backend"] == "eager"}
    shown = []
    for row in rows:
        reference = eager_ms.get(tuple(row[k] for k in Shape._fields))
        shown.append(row | {"us_per_token": 1e3 * row["ms_per_token"],
                            "speedup": reference and reference / row["total_ms"]})
    print_table(shown, SCAN_COLUMNS)

# ══ Sweeps ═══════════════════════════════════════════════════════════════════════════════════════
def slope(xs: list[float], ys: list[float]) -> float | None:
    """Exponent of the power law through the points, by least squares of the logarithms."""
    if len(xs) < 2 or min(ys) <= 0:
        return None
    return statistics.linear_regression([*map(math.log, xs)], [*map(math.log, ys)]).slope

def sweep(name: str, backends: list[str], problem: Problem, args: argparse.Namespace
          ) -> tuple[list[dict], dict]:
    """Measure along one dimension -> rows, slopes by back end. A back end that cannot run a point
    is not tried at the larger ones. Prints both."""
    letter, values = SWEEPS[name]
    print(f"Sweep over {letter}, {values[0]} to {values[-1]}", flush=True)
    left = list(backends)
    if name != "length" and "compiled" in left:
        left.remove("compiled")
        print("  compiled left out: every point would compile anew")
    rows = []
    for value in values:
        at = problem._replace(shape=problem.shape._replace(**{letter: value}))
        found = measure(left, at, args.repeats, args.limit_seconds)
        left = [row["backend"] for row in found]
        rows += [row | {"sweep": name} for row in found]
    print_rows(rows)
    slopes = {}
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == backend]
        keys = ("forward_ms", "backward_ms", "total_ms", "saved_mb")
        fitted = {key: slope([r[letter] for r in mine], [r[key] for r in mine]) for key in keys}
        slopes[backend] = fitted | {"from": mine[0][letter], "to": mine[-1][letter]}
    print_table([{"backend": backend} | fitted for backend, fitted in slopes.items()], {
        "backend": (f"slope in {letter}", ""), "from": ("from", "d"), "to": ("to", "d"),
        "forward_ms": ("forward", ".2f"), "backward_ms": ("backward", ".2f"),
        "total_ms": ("both", ".2f"), "saved_mb": ("saved", ".2f")})
    return rows, slopes

# ══ The floor of a kernel on a GPU ═══════════════════════════════════════════════════════════════
def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second of a copy within the device, counting bytes read plus bytes written."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds)

@jit
def chain_kernel(out, T, SIZE: tl.constexpr, SUMS: tl.constexpr):
    """T times SUMS dependent sums over a vector (SIZE,), which cross warps."""
    index = tl.arange(0, SIZE)
    x = (index + 1).to(tl.float32)
    for _ in range(T):
        for _ in tl.static_range(SUMS):
            x = x / (tl.sum(x, 0) + 1.0)
    tl.store(out + index, x)

def chain_latency_us(problem: Problem, lengths: tuple[int, int] = (1024, 9216)) -> float:
    """Microseconds of one step's chain: maximum and sum of the write's softmax, then of the read's,
    each a sum over slots. The difference of two lengths, which has no launch in it."""
    _, _, N, W, R = problem.shape
    sizes, num_warps = kernel_sizes(N, W, R, problem.options.use_links)
    out, best = torch.empty(sizes["NP"], device=problem.device), []
    for length in lengths:
        seconds = []
        for _ in range(8):
            synchronize(problem.device)
            start = time.perf_counter()
            chain_kernel[(1,)](out, length, SIZE=sizes["NP"], SUMS=4, num_warps=num_warps)
            synchronize(problem.device)
            seconds.append(time.perf_counter() - start)
        best.append(min(seconds))
    return 1e6 * (best[1] - best[0]) / (lengths[1] - lengths[0])

def floors(problem: Problem, repeats: int, lengths: tuple[int, int] = (512, 1024)) -> list[dict]:
    """For the fused forward and backward: the time of the whole call, what one more step costs, and
    the floor of its T dependent steps and of its bytes."""
    device, short, long = problem.device, *lengths
    at = {length: problem._replace(shape=problem.shape._replace(T=length)) for length in lengths}
    by_length = {length: measure(["fused"], at[length], repeats)[0] for length in lengths}
    row, arm = measure(["fused"], problem, repeats)[0], make_arm("fused", problem)
    bandwidth, chain_us = copy_bandwidth(device), chain_latency_us(problem)
    saved, written = bytes_kept(arm)
    given, interface, gradients = (sum(t.nbytes for t in tensors)
                                   for tensors in (arm.inputs, arm.leaves, arm.gradients))
    moved = {"forward": given + written, "backward": given + saved + gradients + interface}
    rows = []
    for kernel, size in moved.items():
        step_ms = by_length[long][f"{kernel}_ms"] - by_length[short][f"{kernel}_ms"]
        chain_ms, bytes_ms = problem.shape.T * chain_us / 1e3, 1e3 * size / bandwidth
        rows.append({"kernel": kernel, "fused_ms": row[f"{kernel}_ms"],
                     "step_us": 1e3 * step_ms / (long - short), "chain_us": chain_us,
                     "moved_mb": size / 2**20, "bytes_ms": bytes_ms,
                     "bandwidth_gb_s": bandwidth / 1e9, "floor_ms": max(chain_ms, bytes_ms)})
    print(f"Floor of the fused kernels; a copy moves {bandwidth / 1e12:.2f} TB/s")
    print_table(rows, {
        "kernel": ("kernel", ""), "fused_ms": ("fused ms", ",.3f"),
        "floor_ms": ("floor ms", ",.3f"), "step_us": ("us one more step", ",.2f"),
        "chain_us": ("us of its chain", ",.2f"), "moved_mb": ("MiB moved", ",.1f"),
        "bytes_ms": ("bytes ms", ",.4f")})
    return rows

# ══ Agreement with the eager loop ════════════════════════════════════════════════════════════════
@torch.no_grad()
def steps_before_near_tie(x: Interface, state: DNCState, options: DNCOptions) -> torch.Tensor:
    """Steps of each row (B,) before the first whose free list rounding could reorder: two
    neighbours in it less than 5e-7 apart, and an allocation that would move by more than 1e-5. From
    there on two correct float32 programs may differ, so that comparing them would prove nothing."""
    double = map_parts(torch.Tensor.double, x)
    state = map_floats(torch.Tensor.double, state)
    B, T = x.write_gate.shape
    steps, tied = torch.full((B,), T), torch.zeros(B, dtype=torch.bool)
    for t in range(T):
        step = map_parts(lambda part, t=t: part[:, t], double)
        _, state = dnc_step(step, state, options)
        used = state.usage.sort(-1).values  # (B, N), the order of the free list
        before = used.cumprod(-1) / used.clamp_min(1e-300)  # (B, N)
        moved = (before * (1 - used))[:, :-1] * (1 - used[:, 1:])  # (B, N-1), by a swap
        moved = moved * (step.write_gate * step.allocation_gate).unsqueeze(1)
        tied |= ((used.diff(dim=-1) < 5e-7) & (moved > 1e-5)).any(-1)
        steps = torch.where(tied, steps.clamp_max(t), steps)
    return steps

def differentiate(run: Callable, x: Interface, state: DNCState, options: DNCOptions,
                  gradients: list[torch.Tensor]) -> tuple[list, list]:
    """Everything that `run` returns, and the gradient of all of it into interface and state."""
    *results, last = run(x, state, options)
    outputs = [*results, *fields_of(last)]
    leaves = [part for part in x if part is not None] + fields_of(state)
    gradients = [g.to(o.device) for o, g in zip(outputs, gradients, strict=True)]
    found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
    return [o.detach().cpu() for o in outputs], [g.float().cpu() for g in found]

def agreement(problem: Problem) -> dict:
    """Compare fused on the device with eager on the CPU in float32, over the steps that no near-tie
    precedes: largest differences, and the worst relative error of a gradient, ||a - b|| / ||b||."""
    (B, T, N, W, R), options, dtype, device = problem
    row = {"memory": memory_name(options), "dtype": str(dtype).removeprefix("torch."),
           **problem.shape._asdict(), "links": options.use_links, "wipe": options.dealloc_wipe}
    if why := why_not("fused", problem):
        return row | {"ok": False, "verdict": f"REFUSED: {why}"}
    start = time.perf_counter()
    here = make_inputs(problem._replace(device=torch.device("cpu")), state_gradient=True)
    there = make_inputs(problem, state_gradient=True)
    steps = steps_before_near_tie(*here, options)  # (B,)
    in_time = (torch.arange(T) < steps.unsqueeze(1)).float()  # (B, T)
    in_rows = (steps == T).float()  # (B,), for the state after the last step
    draw, masks, gradients = torch.Generator().manual_seed(2), [], []
    V = value_width(options.key_width or W, W)
    like = [torch.empty(B, T, R, V), torch.empty(B, T, N), torch.empty(B, T, R, N),
            *fields_of(here[1])]
    for i, tensor in enumerate(like):
        mask = in_time if i < 3 else in_rows
        masks.append(mask.reshape(mask.shape + (1,) * (tensor.dim() - mask.dim())))
        gradients.append(torch.randn(tensor.shape, generator=draw) * masks[-1])
    expected, expected_gradients = differentiate(eager, *here, options, gradients)
    outputs, found_gradients = differentiate(dnc_scan, *there, options, gradients)
    # As max and sum treat them, a NaN anywhere makes the difference NaN, which is no agreement.
    apart = [((a - b) * m).abs().max().item() if a.numel() else 0.0
             for a, b, m in zip(outputs, expected, masks, strict=True)]
    errors, largest = [], []
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        errors.append(((a - b).norm() / b.norm().clamp_min(1e-6)).item())
        largest.append((a - b).abs().max().item() if a.numel() else 0.0)
    ok = all(d <= READS_TOLERANCE for d in apart) and all(e <= TOLERANCE[dtype] for e in errors)
    return row | {
        "compared": in_time.mean().item(), "reads": worst(apart[:1]),
        "other_results": worst(apart[1:]),
        "gradients": worst(largest), "gradient_error": worst(errors), "ok": ok,
        "verdict": "ok" if ok else "DIFFERS", "seconds": time.perf_counter() - start}

def worst(values: list[float]) -> float | None:
    """The largest value; None, which JSON can hold, where one is not finite."""
    return max(values) if all(map(math.isfinite, values)) else None

AGREEMENT_COLUMNS = {
    "verdict": ("agreement", ""), "memory": ("memory", ""), "dtype": ("interface", ""),
    **{key: (key, "d") for key in Shape._fields}, "links": ("links", "d"), "wipe": ("wipe", "d"),
    "compared": ("compared", ".0%"), "reads": ("reads", ".1e"), "other_results": ("others", ".1e"),
    "gradients": ("gradients", ".1e"), "gradient_error": ("relative", ".1e"),
    "seconds": ("s", ".1f")}

CASES = (  # B T N W R, links, wipe, interface, memories: the card's shape, odd sizes, corners
    ((4, 128, 64, 128, 4), 0, 0, "float32", MEMORIES),
    ((4, 128, 64, 128, 4), 0, 0, "bfloat16", ("pointing",)),
    ((3, 63, 17, 60, 3), 0, 0, "float32", MEMORIES),
    ((3, 63, 17, 60, 3), 1, 0, "float32", ("pointing",)),
    ((3, 63, 17, 60, 3), 0, 1, "float32", ("plain",)),
    ((3, 63, 17, 60, 3), 1, 1, "bfloat16", MEMORIES),
    ((2, 33, 256, 128, 4), 0, 0, "float32", ("pointing",)),
    ((2, 33, 256, 64, 4), 0, 0, "float32", ("plain",)),
    ((2, 33, 128, 128, 4), 1, 0, "float32", ("plain",)),
    ((1, 17, 64, 256, 8), 0, 1, "float32", ("plain",)),
    ((1, 130, 16, 16, 1), 1, 1, "float32", ("pointing",)),
    ((1, 1, 16, 16, 1), 0, 0, "float32", ("plain",)))
TINY_CASES = (((2, 19, 17, 20, 2), 0, 0, "float32", MEMORIES),
              ((2, 19, 17, 20, 2), 1, 1, "bfloat16", ("pointing",)))

def check(cases: tuple, device: torch.device, report: dict, path: Path | None) -> int:
    """Compare every case -> exit code: 0, or 1 where one differs or is refused."""
    rows = report["agreement"] = []
    for sizes, links, wipe, dtype, memories in cases:
        shape = Shape(*sizes)
        for memory in memories:
            options = memory_options(memory, shape, bool(links), bool(wipe))
            rows.append(agreement(Problem(shape, options, DTYPES[dtype], device)))
            print(f"  {memory} {sizes} links {links} wipe {wipe} {dtype}: {rows[-1]['verdict']}",
                  flush=True)
            write_json(report, path)
    print()
    print_table(rows, AGREEMENT_COLUMNS)
    print("fused against eager (CPU, float32): largest differences of reads, other results and\n"
          "gradients; relative is the worst ||a - b|| / ||b|| of a gradient's part; compared is\n"
          "the share of tokens that no near-tie of usages precedes.")
    return 0 if all(row["ok"] for row in rows) else 1

# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
def parse(argv: list[str]) -> argparse.Namespace:
    summary = "\n\n".join(__doc__.split("\n\n")[:2])
    parser = OneLineParser(description=summary, epilog=__doc__.split("\n\n", 2)[2],
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    card = Shape(B=4, T=128, N=64, W=128, R=4)
    for name, default in zip(("batch", "length", "slots", "width", "reads"), card, strict=True):
        parser.add_argument(f"--{name}", type=number(1), default=default, help=f"default {default}")
    parser.add_argument("--memory", choices=MEMORIES, default="pointing",
                        help="pointing, dnc_gpt2's default, or plain, Graves' DNC")
    parser.add_argument("--links", action="store_true", help="temporal links and read modes")
    parser.add_argument("--wipe", action="store_true", help="de-allocation wipes what it frees")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32",
                        help="of the interface; the state is always float32")
    parser.add_argument("--backends", type=some_of(*BACKENDS), default=list(BACKENDS),
                        metavar="LIST", help="of eager, compiled, fused, pytorch-dnc (this needs "
                        "`pip install dnc`); default: all that can run")
    parser.add_argument("--repeats", type=number(5), default=7, help="turns, at least 5; default 7")
    parser.add_argument("--sweep", choices=("none", *SWEEPS, "all"), default="none",
                        help="length: T 128 to 8192; slots: N 16 to 256; batch: B 1 to 32")
    parser.add_argument("--limit-seconds", type=number(0, float), default=10.0, metavar="S",
                        help="a sweep goes on without a back end whose pass takes longer; 10")
    parser.add_argument("--check", action="store_true",
                        help="no timing: compare fused with eager at many shapes and options")
    parser.add_argument("--tiny", action="store_true", help="with --check: three tiny cases, for "
                        "compute-sanitizer")
    add_common_flags(parser)
    return parser.parse_args(argv)

def run_benchmark(args: argparse.Namespace, device: torch.device, report: dict) -> int:
    """Measure the shape of the flags, then the sweeps -> exit code 1 where fused differs."""
    shape = Shape(args.batch, args.length, args.slots, args.width, args.reads)
    options = memory_options(args.memory, shape, args.links, args.wipe)
    problem, failed = Problem(shape, options, DTYPES[args.dtype], device), False
    rows = measure(args.backends, problem, args.repeats)
    print_rows(rows)
    report["rows"] += [row | {"sweep": "none"} for row in rows]
    ran = [row["backend"] for row in rows]
    report["calls_per_step"] = {backend: calls_a_step(backend, problem)
                                for backend in ran if backend in ("eager", "pytorch-dnc")}
    for backend, calls in report["calls_per_step"].items():
        print(f"  {backend}: {calls:,.0f} ATen calls forward for one token of every row")
    write_json(report, args.json)
    if {"eager", "fused"} <= set(ran):
        found = report["agreement"] = agreement(problem)
        print()
        print_table([found], AGREEMENT_COLUMNS)
        failed = not found["ok"]
    if "fused" in ran and device.type == "cuda":
        report["floor"] = floors(problem, args.repeats)
    write_json(report, args.json)
    report["slopes"] = {}
    for name in SWEEPS if args.sweep == "all" else () if args.sweep == "none" else (args.sweep,):
        rows, report["slopes"][name] = sweep(name, ran, problem, args)
        report["rows"] += rows
        write_json(report, args.json)
    return 1 if failed else 0

def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 1 fused differs from eager, 2 a user's mistake."""
    args = parse(argv)
    try:
        device = choose_device(args)
        if args.tiny and not args.check:
            raise ValueError("--tiny: only together with --check")
        report = new_report(device)
        print_head(report, "The DNC recurrence alone")
        if args.check:
            code = check(TINY_CASES if args.tiny else CASES, device, report, args.json)
        else:
            code = run_benchmark(args, device, report)
        write_json(report, args.json)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks the dash still gets the table
    sys.exit(main(sys.argv[1:]))
