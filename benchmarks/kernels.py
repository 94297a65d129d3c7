#!/usr/bin/env python3
"""Compile the kernels of dnc_scan/cuda.py for real GPUs, no device needed, and say what came out.

    python benchmarks/kernels.py                       sm_90, the card's shape and the corners
    python benchmarks/kernels.py --arch 80,100 --shapes 64,128,4 64,128,4,plain

A shape is the pointing memory, dnc_gpt2's default (a key half of W / 2, usage decay, an empty
slot), or with `plain` Graves' DNC, of which whole rows are compared; either with `links`.
To be run after any edit of the kernels: how Triton lays a tile out over the threads is its choice,
and a harmless-looking line can make a kernel ten times longer. Read `regs` (255 at most), `stack`
(bytes a thread that did not fit its registers: 0 is best), `barriers` (bar.sync in the PTX, what a
step's latency grows with) and `sass` (machine instructions in all). T is not part of the code. A
compile time of 0 came from Triton's cache.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is first imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scan import OneLineParser, print_table

from dnc_scan import cuda
from dnc_scan.layout import CHECKPOINT_EVERY, EPS

SHAPES = ("64,128,4 32,64,4 17,60,3 128,128,4 256,64,4 256,128,4 64,128,4,links 128,128,2,links "
          "64,128,4,plain 32,64,4,plain 256,128,4,plain 64,128,4,links,plain")
DECAY = 0.98  # of usage, of the pointing memory at N 64
COLUMNS = {"arch": ("arch", "d"), "memory": ("memory", ""), "kernel": ("kernel", ""),
           "N": ("N", "d"), "W": ("W", "d"), "R": ("R", "d"), "links": ("links", "d"),
           "warps": ("warps", "d"), "regs": ("regs", "d"), "stack": ("stack", "d"),
           "shared": ("shared", ",d"), "barriers": ("barriers", "d"), "sass": ("sass", ",d"),
           "seconds": ("compile s", ".1f")}

class Shape(NamedTuple):
    N: int
    W: int
    R: int
    links: bool
    plain: bool  # Graves' DNC, not the pointing memory

def compile_kernel(kernel, constants: dict, arch: int, warps: int):
    """Compile one kernel as the launchers specialise it: float32, aligned pointers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else "i32" if name == "T" else "*fp32"
             for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if kinds[n] == "*fp32"}
    values = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, kinds, values, aligned),
                          target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})

def machine_code(cubin: bytes) -> tuple[int, int, int]:
    """Registers and stack bytes a thread, and the number of instructions."""
    import triton
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = [subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout
                for flag in ("-res-usage", "-sass")]
    used = re.search(r"REG:(\d+) STACK:(\d+)", said[0])
    return int(used[1]), int(used[2]), len(re.findall(r"/\*[0-9a-f]{4,5}\*/", said[1]))

def read_shape(text: str) -> Shape:
    """A flag's type: N,W,R with ,links and ,plain behind it."""
    match = re.fullmatch(r"(\d+),(\d+),([1-8])(,links)?(,plain)?", text)
    if not match or not 0 < int(match[1]) * int(match[2]) <= 32_768:
        raise argparse.ArgumentTypeError(f"{text!r}: must be N,W,R[,links][,plain], N x W up to "
                                         "32,768, R from 1 to 8")
    return Shape(int(match[1]), int(match[2]), int(match[3]), bool(match[4]), bool(match[5]))

def read_archs(text: str) -> list[int]:
    """A flag's type: compute capabilities without the dot."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be as in 80,90,100")
    return [int(part) for part in text.split(",")]

def inspect_kernel(name: str, shape: Shape, arch: int) -> dict:
    N, W, R, links, plain = shape
    key_width = 0 if plain else max(1, W // 2)
    sizes, warps = cuda.kernel_sizes(N, W, R, links, key_width, empty=not plain)
    constants = {**sizes, "EVERY": CHECKPOINT_EVERY, "WIPE": True, "EPS": EPS,
                 "DECAY": 1.0 if plain else DECAY}
    kernel = getattr(cuda, f"{name}_kernel")
    if name == "forward":
        constants["RECORD"] = True
    else:
        constants.pop("KP")
    start = time.perf_counter()
    compiled = compile_kernel(kernel, constants, arch, warps)
    seconds = time.perf_counter() - start
    regs, stack, sass = machine_code(compiled.asm["cubin"])
    return {"arch": arch, "memory": "plain" if plain else "pointing", "kernel": name,
            **shape._asdict(), "warps": warps, "regs": regs, "stack": stack, "sass": sass,
            "shared": compiled.metadata.shared,
            "barriers": compiled.asm["ptx"].count("bar.sync"), "seconds": seconds}

def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 2 a user's mistake or no Triton."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", type=read_archs, default="90", metavar="LIST",
                        help="compute capabilities, as in 80,90,100; default 90")
    parser.add_argument("--shapes", type=read_shape, nargs="+", metavar="SHAPE",
                        default=[read_shape(text) for text in SHAPES.split()],
                        help="N,W,R[,links][,plain]")
    args = parser.parse_args(argv)
    if cuda.triton is None:
        print("error: triton is not installed; pip install triton", file=sys.stderr)
        return 2
    rows = [inspect_kernel(name, shape, arch) for arch in args.arch for shape in args.shapes
            for name in ("forward", "backward")]
    print_table(rows, COLUMNS)
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
