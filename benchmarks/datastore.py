#!/usr/bin/env python3
"""What does a kNN datastore cost: building, searching, memory, and what does each index miss?

    python benchmarks/datastore.py                        100,000 keys of 768, every index
    python benchmarks/datastore.py --keys trained_models/datastore_keys.npy --json datastore.json
    python benchmarks/datastore.py --tiny                 a check of seconds, for CI

What is measured is what memory_decoder.py runs, of datastore.py: Scale, new_index, add_keys,
read_index, Datastore.search, whose candidates come from the index and whose distances are computed
again from the float16 keys.
Random keys lie around centres, one for a thousand keys, in 32 of their dimensions, with a little
noise in all: keys that are equally far from each other have no neighbours to find, and hidden
states are not so. Queries are drawn as the keys are; with --keys, the real test, they are stored
keys evenly spaced, each without itself.
How to read it: `build s` trains the index, where it is trained, and adds the keys; `MiB` is the
file, which is opened memory-mapped (flat, ivfpq) or read (hnsw), beside `keys MiB` in their own
memory-mapped file; `one ms` is a query alone, as in a chat, the median; `batch ms` a query among
256, as in evaluation; recall@k is the share of the k nearest standardised
keys, by brute force over the same float16 keys, that are found. Timings of a busy machine mean
nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scan import OneLineParser, new_report, number, print_head, print_table, some_of, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder: its datastore.py

from datastore import (
    INDEX,
    KEYS,
    NPROBE,
    RERANK,
    Datastore,
    Scale,
    add_keys,
    import_faiss,
    new_index,
    read_index,
    sample_keys,
    write_index,
)

KINDS = ("flat", "ivfpq", "hnsw")
COLUMNS = {
    "index": ("index", ""),
    "build_s": ("build s", ",.1f"),
    "index_mib": ("MiB", ",.0f"),
    "keys_mib": ("keys MiB", ",.0f"),
    "one_ms": ("one ms", ",.2f"),
    "batch_ms": ("batch ms", ",.2f"),
    "recall": ("recall@k", ".4f"),
}


def random_keys(count: int, width: int, queries: int, folder: Path
                ) -> tuple[np.ndarray, np.ndarray]:
    """Draw float16 keys (n, D) into a memory-mapped file, and float32 queries (Q, D)."""
    draw = np.random.default_rng(0)
    hidden = min(32, width)
    centres = draw.standard_normal((max(2, count // 1000), hidden), dtype=np.float32)
    turned = draw.standard_normal((hidden, width), dtype=np.float32) / hidden**0.5

    def some(many: int) -> np.ndarray:
        inner = centres[draw.integers(0, len(centres), many)]  # (many, hidden)
        inner = inner + 0.5 * draw.standard_normal(inner.shape, dtype=np.float32)
        return inner @ turned + 0.05 * draw.standard_normal((many, width), dtype=np.float32)

    keys = np.lib.format.open_memmap(folder / KEYS, "w+", "float16", (count, width))
    for start in range(0, count, 10_000):
        keys[start : start + 10_000] = some(min(10_000, count - start))
    keys.flush()
    return keys, some(queries)


def true_neighbours(keys: np.ndarray, queries: np.ndarray, k: int, own: np.ndarray | None
                    ) -> np.ndarray:
    """Find the nearest ids (Q, k) by looking at all keys, not by FAISS; without the own of each
    query (Q,), if any."""
    store = Datastore(keys, np.zeros(len(keys), np.int32), None, "flat", Scale.of(keys))
    if own is None:
        return store.exact(queries, k)
    nearest = store.exact(queries, k + 1)
    return np.stack([ids[ids != i][:k] for ids, i in zip(nearest, own, strict=True)])


def time_search(store: Datastore, queries: np.ndarray, own: np.ndarray | None, k: int
                ) -> tuple[np.ndarray, float, float]:
    """Search queries (Q, D) -> ids (Q, k), seconds a query among 256, and of one alone."""
    store.search(queries[:4], k)  # opens what is opened at the first use
    blocks = []
    began = time.perf_counter()
    for start in range(0, len(queries), 256):
        rows = slice(start, start + 256)
        exclude = None if own is None else own[rows]
        blocks.append(store.search(queries[rows], k, exclude)[1])
    batch = (time.perf_counter() - began) / len(queries)

    singles = []
    for query in queries[:100]:
        began = time.perf_counter()
        store.search(query[None], k)
        singles.append(time.perf_counter() - began)
    return np.concatenate(blocks), batch, statistics.median(singles)


def measure(kind: str, keys: np.ndarray, queries: np.ndarray, own: np.ndarray | None,
            true: np.ndarray, args: argparse.Namespace) -> dict:
    """Build an index, write it, open it again, search it -> one row."""
    began = time.perf_counter()
    scale = Scale.of(keys)
    index = new_index(kind, keys.shape[1], len(keys), sample_keys(keys, scale))
    add_keys(index, keys, scale, 0, len(keys))
    build = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / INDEX
        write_index(index, path)
        size = path.stat().st_size
        values = np.zeros(len(keys), np.int32)
        index = read_index(path, kind, args.nprobe)
        store = Datastore(keys, values, index, kind, scale, args.rerank)
        ids, batch, single = time_search(store, queries, own, args.k)
    hits = [len(np.intersect1d(a, b)) for a, b in zip(ids, true, strict=True)]
    return {
        "index": kind,
        "n": len(keys),
        "width": keys.shape[1],
        "k": args.k,
        "build_s": build,
        "index_mib": size / 2**20,
        "keys_mib": keys.nbytes / 2**20,
        "one_ms": 1e3 * single,
        "batch_ms": 1e3 * batch,
        "recall": float(np.mean(hits)) / args.k,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; --tiny overrides the sizes."""
    summary = "\n\n".join(__doc__.split("\n\n")[:2])
    parser = OneLineParser(description=summary, epilog=__doc__.split("\n\n", 2)[2],
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=some_of(*KINDS), default=list(KINDS), metavar="LIST",
                        help="of flat, ivfpq, hnsw; default: all")
    parser.add_argument("--count", type=number(1000), default=100_000, help="default: 100,000")
    parser.add_argument("--width", type=number(2), default=768, help="default: 768")
    parser.add_argument("--k", type=number(1), default=512, help="neighbours; default: 512")
    parser.add_argument("--queries", type=number(1), default=256, help="default: 256")
    parser.add_argument("--nprobe", type=number(1), default=NPROBE,
                        help=f"of ivfpq; default: {NPROBE}")
    parser.add_argument("--rerank", type=number(1), default=RERANK,
                        help=f"of ivfpq; default: {RERANK}")
    parser.add_argument("--keys", type=Path, metavar="PATH", help="a datastore_keys.npy instead")
    parser.add_argument("--tiny", action="store_true", help="2,000 keys of 64, k 10")
    parser.add_argument("--threads", type=number(1), help="of the CPU; default: torch's choice")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the report here as well")
    args = parser.parse_args(argv)
    if args.tiny:
        args.count, args.width, args.queries, args.k = 2000, 64, 32, 10
    return args


def stored_keys(path: Path, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Map the keys (n, D) of a datastore, and choose which of them (Q,) are looked for. Raises
    ValueError."""
    try:
        keys = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise ValueError(f"--keys {path}: must be a datastore_keys.npy") from None
    if keys.ndim != 2 or keys.dtype != np.float16 or len(keys) < 1000:
        raise ValueError(f"--keys {path}: must be float16 (n, D), 1,000 keys or more")
    return keys, np.linspace(0, len(keys) - 1, queries).astype(np.int64)


def run_benchmark(args: argparse.Namespace, report: dict, folder: Path) -> None:
    """Measure every index on the same keys; print the table, write the report after each."""
    own = None
    if args.keys:
        keys, own = stored_keys(args.keys, args.queries)
        queries = keys[own].astype(np.float32)
    else:
        keys, queries = random_keys(args.count, args.width, args.queries, folder)
    if args.k >= len(keys):
        raise ValueError(f"--k {args.k}: must be below the {len(keys):,} keys")
    true = true_neighbours(keys, queries, args.k, own)
    for kind in args.index:
        report["rows"].append(measure(kind, keys, queries, own, true, args))
        write_json(report, args.json)
    print(f"  {len(keys):,} keys of {keys.shape[1]}, k = {args.k}, {len(queries)} queries, nprobe "
          f"{args.nprobe}, rerank {args.rerank}\n")
    print_table(report["rows"], COLUMNS)


def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 2 a user's mistake."""
    args = parse(argv)
    try:
        if args.json and not args.json.resolve().parent.is_dir():
            raise ValueError(f"--json {args.json}: its folder does not exist; make it first")
        if args.threads:
            torch.set_num_threads(args.threads)
        report = new_report(torch.device("cpu"))
        report["versions"]["faiss"] = import_faiss().__version__
        print_head(report, "A kNN datastore")
        with tempfile.TemporaryDirectory() as folder:
            run_benchmark(args, report, Path(folder))
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks the dash still gets the table
    sys.exit(main(sys.argv[1:]))
