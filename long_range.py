#!/usr/bin/env python3
"""At which distance does each memory stop remembering?  Synthetic tasks, trained short, tested far.

    python long_range.py                       generate, train, compare, plot: a few tasks, one seed
    python long_range.py --full                every task and seed; a run that is stopped goes on
    python long_range.py generate|train|compare|plot    one part, on what the part before left
    python long_range.py --tasks mqar --arms window,dnc --seeds 0,1,2 --lengths 64,288,4128
    python long_range.py --help                every Config field, its default and its comment

Read downward: Config, tasks, data on disk, model, training, evaluation, tables and plot.
A row is a study part, filler, and a quiz part: what the quiz asks stands in the study part.
Attention, but for that of `full`, stays inside blocks of one window; the distance from a question
to its answer is counted in windows. Letters: B rows, L tokens of a row, T tokens of a segment,
C hidden width, V vocabulary, Q questions of a row, N memory slots, W word width, D width of a key,
n stored tokens, and, where rows are generated, n rows.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if __name__ == "__main__" and not hasattr(sys, "ps1"):  # until main listens: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# isort: off
import dnc_gpt2  # before torch: it says how threads wait
# isort: on
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import nn

# isort: off
from dnc_gpt2 import (
    # types of Config fields, and checks
    Bound,
    Count,
    NotNegative,
    Positive,
    Seed,
    Share,
    check_fields,
    check_memory,
    require,
    require_field,
    # command
    Diverged,
    StopSignal,
    local_device,
    print_any_character,
    read_config,
    run_command,
    split_command,
    # files
    check_folder,
    load_tensors,
    locked,
    read_json,
    reading,
    save_tensors,
    write_json,
    # what a reader is told
    LINE,
    PALETTE,
    cell,
    dark_figure,
    device_name,
    mean_and_half,
    perplexity,
    print_banner,
    print_heading,
    run_facts,
    # model
    DNCMemory,
    DNCOptions,
    Pointer,
    build_dnc,
    count_parameters,
    map_state,
    pick_scan,
    point,
)
# isort: on
from edm_model import EDM

ARMS = ("window", "knn_store", "dnc", "edm", "full", "split", "pointing")
DNC_ARMS = ("dnc", "split", "pointing")  # Graves'; that of dnc_gpt2.py, its reads added; pointing
MEMORY_ARMS = ("knn_store", "edm", *DNC_ARMS)
MOST = 32_000  # tokens of a row and symbols of a task: on disk both are int16

Symbols = Annotated[int, Bound(f"from 1 to {MOST}", lambda x: 1 <= x <= MOST)]
Kinds = Annotated[int, Bound("from 1 to 1000", lambda x: 1 <= x <= 1000)]
Window = Annotated[int, Bound("a multiple of 8, and at least 16", lambda x: x % 8 == 0 and x > 8)]
TestRows = Annotated[int, Bound("2 or more, to swap memories between rows", lambda x: x >= 2)]


# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of a run. Edit here, or override as `--name value`."""

    # what
    tasks: str = "copy,mqar"  # or associative_recall, repeat_copy, brackets, repeats, random
    arms: str = "window,knn_store,pointing,full"  # or dnc, split, edm, whose trunk is frozen
    seeds: str = "0"  # weights and order of the data, one run each
    lengths: str = "32,64,96,160,256,288,544,4128"  # tokens of a tested row, multiples of window
    # data
    window: Window = 32  # tokens of a block, which attention never leaves; a multiple of 8
    symbols: Symbols = 1024  # of copy, repeat_copy and associative_recall
    mqar_symbols: Symbols = 1024  # half of them keys, half values
    alphabet: Symbols = 64  # symbols of repeats and random
    kinds: Kinds = 8  # kinds of brackets: chance is 1 / kinds
    items: Count = 24  # symbols of copy's pattern; other tasks have what their docstrings say
    pairs: Count = 16  # key-value pairs of mqar in a long row
    train: str = "64:4,32,64,96,160,256"  # length[:at most so many items] of training groups
    mqar_train: str = "64:4,128:8,256:16"  # length:pairs of mqar's training groups
    mqar_test: str = "64:4,64:8,64:16,128:32,256:64"  # as Zoology tests, length:pairs
    train_rows: Count = 4000  # of every training group; of the first, five times as many
    valid_rows: Count = 32  # of every training group, for the choice of the learning rate
    test_rows: TestRows = 32  # of every tested length
    data_seed: Seed = 0  # of the data
    # model
    hidden_size: Count = 64  # C
    num_layers: Count = 2  # transformer blocks
    num_heads: Count = 2  # attention heads; divides hidden_size
    mlp_width: Count = 128  # of the arm with most parameters; the others are widened to match
    # memory
    mem_slots: Count = 64  # N of the DNC; where a test asks for more pairs, twice the pairs
    mem_width: Count = 64  # W of the DNC
    num_reads: Count = 1  # R of the DNC
    strength_bias: float = 16.0  # dnc: initial strength about 17; at 1.7 it learns no addresses
    free_bias: float = -4.0  # dnc: free gates start at 0.02: reading frees nothing
    write_bias: float = -2.0  # dnc: write gates start at 0.12: filler has to earn its place
    allocation_bias: float = 4.0  # dnc: allocation gates start at 0.98: writes go to free slots
    use_links: bool = False  # temporal links of the DNC
    knn_width: Count = 64  # D, of the keys of knn_store
    knn_top_k: Count = 16  # keys that a query of knn_store or of edm reads
    edm_slots: Count = 8192  # of the EDM's notebook
    edm_base_steps: Count = 2000  # of its trunk inside the window, before it is frozen
    # training
    steps: Count = 400  # of every run but those of mqar
    mqar_steps: Count = 600  # more symbols, more steps
    batch_tokens: Count = 4096  # tokens a step
    curriculum: Share = 0.35  # share of the steps on the first training group alone, few items
    lr_grid: str = "0.015,0.025"  # of Muon; that of least validation loss at the first seed
    adam_lr: Positive = 0.15  # rate of AdamW (embeddings, biases, norms), as a share of Muon's
    lr_warmup: Share = 0.05  # share of all steps with a linearly rising rate
    lr_decay: Share = 0.6  # share of the last steps, in which the rate falls linearly to zero
    lambda_gate: NotNegative = 1.0  # cost of the DNC's write gates, in the second half of training
    lambda_closing: NotNegative = 0.1  # weight in it of closing open gates; gives way to deciding
    grad_clip: Positive = 1.0  # global gradient norm
    log_every_steps: Count = 100  # a row of the history, with accuracy on validation
    # hardware
    workers: Count | Literal["auto"] = "auto"  # runs at once, a thread each; all cores, CUDA 1
    scan: Literal["auto", "eager", "fused"] = "auto"  # the DNC's recurrence
    data_dir: str = "data/"  # what generate writes
    save_dir: str = "checkpoints/"  # what train writes
    plot_dir: str = "plots/"  # what compare and plot write

    @property
    def task_list(self) -> list[str]:
        """The tasks, in the order in which they were named."""
        return words(self.tasks)

    @property
    def arm_list(self) -> list[str]:
        """The arms, in the order in which they were named."""
        return words(self.arms)

    @property
    def seed_list(self) -> list[int]:
        """The seeds; the learning rates are chosen at the first."""
        return numbers("seeds", self.seeds, int)

    @property
    def length_list(self) -> list[int]:
        """The tested lengths, rising."""
        return sorted(numbers("lengths", self.lengths, int))

    @property
    def rates(self) -> list[float]:
        """The learning rates that are tried."""
        return numbers("lr_grid", self.lr_grid, float)

    def __post_init__(self) -> None:
        check_fields(self)
        check_lists(self)
        check_sizes(self)
        check_groups(self)
        check_arms(self)


# What --full changes: every task, every seed, Zoology's 8,192 symbols and number of rows.
FULL = {
    "tasks": "copy,associative_recall,mqar,repeat_copy,brackets,repeats,random",
    "arms": "window,knn_store,dnc,split,pointing,edm,full",
    "seeds": "0,1,2,3,4",
    "mqar_symbols": 8192,
    "pairs": 32,
    "mqar_train": "64:4,128:8,256:16,256:32,256:64",
    "mqar_test": "64:4,64:8,64:16,128:32,256:64,512:128,1024:256",
    "train_rows": 20_000,
    "test_rows": 50,
    "steps": 1100,
    "mqar_steps": 2000,
    "lr_grid": "0.01,0.02",
    "data_dir": "data/full/",
    "save_dir": "checkpoints/full/",
    "plot_dir": "plots/full/",
}


def words(text: str) -> list[str]:
    """ "a, b, a" -> ["a", "b"]."""
    if not text.strip():
        return []
    return list(dict.fromkeys(text.replace(" ", "").split(",")))


def numbers(field: str, text: str, kind: type) -> list:
    """ "1,2" -> [1, 2]. Raises ValueError naming the field."""
    try:
        values = [kind(word) for word in words(text) if len(word) < 40]
    except ValueError:
        values = []
    values = values if len(values) == len(words(text)) else []
    what = "numbers" if kind is float else "whole numbers"
    holds = values != [] and all(math.isfinite(value) for value in values)
    require(holds, field, text, f"a comma-separated list of {what}")
    return values


def specs(field: str, text: str) -> list[tuple[int, int]]:
    """ "64:4,128" -> [(64, 4), (128, 0)]: lengths and items. Raises ValueError naming the field."""
    pairs = []
    try:
        for word in words(text):
            length, colon, items = word.partition(":")
            pairs.append((int(length), int(items) if colon else 0))
        if any(abs(number) > MOST for pair in pairs for number in pair):
            pairs = []
    except ValueError:
        pairs = []
    require(pairs != [], field, text, "lengths, each with :items or without, as in 64:4,128:8")
    return pairs


def check_lists(config: Config) -> None:
    """Raise ValueError unless the lists of names and numbers hold what there is."""
    choices = (("tasks", config.task_list, TASKS), ("arms", config.arm_list, ARMS))
    for field, chosen, there_are in choices:
        holds = chosen != [] and set(chosen) <= set(there_are)
        names = ", ".join(there_are)
        require_field(config, field, holds, f"a comma-separated choice of {names}")

    for seed in config.seed_list:
        require_field(config, "seeds", 0 <= seed < 2**32, "0 or more")
    for rate in config.rates:
        require_field(config, "lr_grid", rate > 0, "above 0")

    w = config.window
    for length in config.length_list:
        require_field(config, "lengths", length % w == 0 and length >= w,
                      f"multiples of window ({w}), at least {w}, the minimum of every task")
        require_field(config, "lengths", length <= MOST, f"at most {MOST}")


def check_sizes(config: Config) -> None:
    """Raise ValueError unless patterns, pairs and heads fit into what holds them."""
    w, pairs, heads = config.window, config.pairs, config.num_heads
    fewest = max(config.items, w)

    require_field(config, "hidden_size", config.hidden_size % heads == 0,
                  f"divisible by num_heads ({heads})")
    require_field(config, "mqar_symbols",
                  config.mqar_symbols % 2 == 0 and config.mqar_symbols >= 2 * pairs,
                  f"even, and at least twice pairs ({pairs})")
    require_field(config, "symbols", config.symbols >= fewest,
                  f"at least {fewest}: those of a pattern differ")
    require_field(config, "pairs", pairs <= w,
                  f"at most window ({w}): that many fit its quiz part")
    require_field(config, "items", config.items <= w * 3 // 4,
                  f"at most three quarters of window ({w})")


def check_groups(config: Config) -> None:
    """Raise ValueError unless rows of every training and test group can be made."""
    w = config.window
    for length, items in specs("train", config.train):
        holds = length % w == 0 and w <= length <= MOST and items >= 0
        require_field(config, "train", holds,
                      f"multiples of window ({w}), from {w} to {MOST}, each with :items or without")

    for field in ("mqar_train", "mqar_test"):
        for length, pairs in specs(field, getattr(config, field)):
            has_room = length % w == 0 and 0 < 4 * pairs <= length <= MOST
            has_symbols = 2 * pairs <= config.mqar_symbols
            require(has_room and has_symbols, field, f"{length}:{pairs}",
                    f"a multiple of window ({w}) with room for the pairs (two tokens each) and the "
                    "questions, length >= 4 * pairs, and mqar_symbols >= 2 * pairs")


def check_arms(config: Config) -> None:
    """Raise ValueError unless the arms have rows that they can read and be trained on."""
    w = config.window
    for task in config.task_list:
        reach = longest(config, task)
        holds = "full" not in config.arm_list or config.length_list[0] <= reach
        require_field(config, "lengths", holds,
                      f"with one of at most {reach}, where the positions of full end in {task}; or "
                      "leave full out of --arms")

        shortest = min(length for length, _ in train_groups(config, task))
        holds = "edm" not in config.arm_list or shortest <= 2 * w
        require(holds, "mqar_train" if task == "mqar" else "train", shortest,
                f"at most {2 * w} in one group, two windows, to train the trunk of edm on; or "
                "leave edm out of --arms")


# ══ Tasks ════════════════════════════════════════════════════════════════════════════════════════
# Tokens below FIRST are the same in every task. Filler is random, so that it is no blank: a memory
# that stores it fills up.
FILLERS = 16
START, RECALL, ITEM, QUERY, END, LAST, COUNT, CLOSE = range(16, 24)
ONCE = 24  # the answer "once" of repeats; then twice, three and four times
FIRST = 32  # the first symbol


class Rows(NamedTuple):
    """Rows of one task and one length."""

    inputs: np.ndarray  # (n, L) tokens
    at: np.ndarray  # (n, Q) scored positions, rising
    answers: np.ndarray  # (n, Q) what should be predicted there
    source: np.ndarray  # (n, Q) where the last token stands that the answer needs; -1 nowhere


def vocabulary(task: str, config: Config) -> int:
    """V of a task: fillers and markers, then its symbols."""
    symbols = {"mqar": config.mqar_symbols, "brackets": 2 * config.kinds,
               "repeats": config.alphabet, "random": config.alphabet}
    return FIRST + symbols.get(task, config.symbols)


def spans(length: int, config: Config) -> tuple[int, int]:
    """Start of the quiz part, and the size of the study part and of the quiz part. In rows of one
    block they are its halves, else the first block and the last."""
    w = config.window
    if length == w:
        return w // 2, w // 2
    return length - w, w


def blank(rng: Generator, n: int, length: int) -> np.ndarray:
    """Rows (n, L) of filler."""
    return rng.integers(0, FILLERS, (n, length))


def distinct(rng: Generator, n: int, count: int, high: int) -> np.ndarray:
    """(n, count) numbers below high, none twice in a row."""
    return np.stack([rng.choice(high, count, replace=False) for _ in range(n)])


def run(start: np.ndarray, size: int) -> np.ndarray:
    """Columns of runs of so many tokens that begin at start, (n,) or (n, k) -> (n, k * size)."""
    columns = start[..., None] + np.arange(size)
    return columns.reshape(len(start), -1)


def put(inputs: np.ndarray, columns: np.ndarray, tokens: np.ndarray | int) -> None:
    """Write tokens (n, k) into inputs (n, L) at columns (n, k)."""
    np.put_along_axis(inputs, columns, tokens, axis=1)


def mark(inputs: np.ndarray, column: np.ndarray, marker: int) -> None:
    """Write a marker into inputs (n, L) at column (n,)."""
    put(inputs, column[:, None], marker)


def take(inputs: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The tokens (n, k) that stand in inputs (n, L) at columns (n, k)."""
    return np.take_along_axis(inputs, columns, axis=1)


def copy(rng: Generator, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """A pattern, filler, the pattern again; each symbol is predicted from the one before it. It has
    `items` symbols, at most three quarters of what its part of the row holds, none twice: the
    symbol before decides what follows.

        inputs   START a b c . . . . . RECALL a b c . .
        answers                        a      b c        scored at RECALL, a, b
    """
    quiz, size = spans(length, config)
    count = min(items or config.items, size * 3 // 4)
    inputs = blank(rng, n, length)
    pattern = FIRST + distinct(rng, n, count, config.symbols)  # (n, count)
    first = rng.integers(0, size - count, n)  # the block holds marker and pattern whole
    again = quiz + rng.integers(0, size - count, n)

    mark(inputs, first, START)
    source = run(first + 1, count)
    put(inputs, source, pattern)

    mark(inputs, again, RECALL)
    copied = run(again + 1, count)
    put(inputs, copied, pattern)
    return Rows(inputs, at=copied - 1, answers=pattern, source=source)


def repeat_copy(rng: Generator, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """A pattern of items / 2 symbols and up to three copies, each in a block of its own, so that
    not even the copy before is within the window. departs from NTM: the number of copies is shown
    by the markers, not asked for; within a window it could be counted.

        inputs   START a b . . RECALL a b . . RECALL a b . .
        answers                a      b       a      b       scored at RECALL, a of each copy
    """
    w, blocks = config.window, length // config.window
    quiz, size = spans(length, config)
    count = min(items or config.items // 2 or 1, size * 3 // 8)
    copies = max(1, min(3, blocks - 1))
    inputs = blank(rng, n, length)
    pattern = FIRST + distinct(rng, n, count, config.symbols)  # (n, count)
    first = rng.integers(0, size - count, n)
    mark(inputs, first, START)
    places = [run(first + 1, count)]  # of the pattern and of every copy
    put(inputs, places[0], pattern)

    for i in range(1, copies + 1):
        begin = quiz
        if i < copies:
            begin = w * round((blocks - 1) * i / copies)
        again = begin + rng.integers(0, size - count, n)
        mark(inputs, again, RECALL)
        places.append(run(again + 1, count))
        put(inputs, places[i], pattern)

    at = np.hstack(places[1:]) - 1  # (n, copies * count)
    source = np.hstack(places[:-1])
    return Rows(inputs, at, answers=np.tile(pattern, copies), source=source)


def associative_recall(rng: Generator, n: int, length: int, config: Config,
                       items: int = 0) -> Rows:
    """Items of three symbols, none twice; each question is an item, its answer the item that
    followed it. Three questions a row (one in rows of one block), about pairs of items that do not
    overlap, so that no answer has been shown before in the quiz part.

        inputs   ITEM a b c ITEM d e f . . . QUERY a b c d e f .
        answers                                        d e f     scored at c, d, e
    """
    quiz, size = spans(length, config)
    count = min(max(3, items or size), size // 4)
    questions = min((count - 1) // 2, size // 7)
    require(questions > 0, "window", config.window, "at least 32 for associative_recall")
    inputs = blank(rng, n, length)
    put_items(inputs, FIRST + distinct(rng, n, 3 * count, config.symbols))

    pairs = distinct(rng, n, questions, (count - 1) // 2)
    asked = 2 * pairs + rng.integers(0, 2, (n, 1))  # (n, questions) items: 0 and 1, or 1 and 2, …
    start = quiz + rng.integers(0, size - 7 * questions + 1, n)
    begin = start[:, None] + 7 * np.arange(questions)  # (n, questions) columns
    item = run(4 * asked + 1, 3)  # (n, questions * 3) columns
    source = run(4 * asked + 5, 3)
    answers = take(inputs, source)
    put(inputs, begin, QUERY)
    put(inputs, run(begin + 1, 3), take(inputs, item))
    put(inputs, run(begin + 4, 3), answers)
    return Rows(inputs, at=run(begin + 3, 3), answers=answers, source=source)


def put_items(inputs: np.ndarray, symbols: np.ndarray) -> None:
    """Write items of three symbols (n, 3 * count), a marker before each, from the first column."""
    n, size = symbols.shape
    markers = 4 * np.tile(np.arange(size // 3), (n, 1))  # (n, count) columns
    put(inputs, markers, ITEM)
    put(inputs, run(markers + 1, 3), symbols)


def mqar(rng: Generator, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """Multi-query associative recall (Zoology, Arora et al. 2023, arXiv 2312.04927): key-value
    pairs, then every key once; keys and values are halves of the symbols. With `items` the
    questions lie anywhere behind the pairs, uniformly; without, in the last block (from five blocks
    on in the last two), and there are `config.pairs`, fewer in shorter rows. A pair starts at an
    even position: no block divides it. departs from Zoology: uniform distances, not a power law;
    what is neither pair nor question is filler of 16 tokens, not one blank token.

        inputs   k v l w m x . . l . k . . m        answers at l: w, at k: v, at m: x
    """
    w = config.window
    if items:
        count = items
        start = 2 * count
    else:
        count = min(config.pairs, mqar_room(length // w, w), w)
        quiz, _ = spans(length, config)
        start = quiz - w if length > 4 * w else quiz
    inputs = blank(rng, n, length)
    half = config.mqar_symbols // 2
    keys = FIRST + distinct(rng, n, count, half)  # (n, count)
    values = FIRST + half + distinct(rng, n, count, half)
    inputs[:, 0 : 2 * count : 2] = keys
    inputs[:, 1 : 2 * count : 2] = values

    in_order = np.tile(np.arange(count), (n, 1))
    order = rng.permuted(in_order, axis=1)  # (n, count), the pair that each question asks for
    at = distinct(rng, n, count, length - start)
    at = start + np.sort(at, axis=1)
    put(inputs, at, take(keys, order))
    return Rows(inputs, at, answers=take(values, order), source=2 * order + 1)


def mqar_room(blocks: int, w: int) -> int:
    """Pairs for which a row of so many blocks has room before its questions."""
    if blocks == 1:
        return w // 8
    if blocks == 2:
        return w // 4
    return w // 2 * ((blocks - 1) // 2)


def repeats(rng: Generator, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """Some elements, each one to four times, in any order; which came last, how often was each?
    LAST is asked first, when no element has been shown again; answers are never shown.

        inputs   a b a c a b END . . . LAST b COUNT c COUNT a COUNT
        answers                        b      2       1       3
    """
    quiz, size = spans(length, config)
    count = min(items or 6, 6, (size - 1) // 4, config.alphabet)
    inputs = blank(rng, n, length)
    elements = FIRST + distinct(rng, n, count, config.alphabet)  # (n, count)
    often = rng.integers(1, 5, (n, count))
    start = quiz + rng.integers(0, size - 2 * count, n)
    order = np.zeros((n, count), int)
    source = np.zeros((n, count + 1), int)
    for row in range(n):
        order[row], source[row] = study_repeats(
            rng, tokens=inputs[row], elements=elements[row], often=often[row], size=size)

    at = start[:, None] + 2 * np.arange(count + 1)  # (n, count + 1)
    counted = at[:, 1:]
    mark(inputs, start, LAST)
    put(inputs, counted - 1, take(elements, order))
    put(inputs, counted, COUNT)
    came_last = take(inputs, source[:, :1])
    counts = ONCE - 1 + take(often, order)
    return Rows(inputs, at, np.hstack([came_last, counts]), source)


def study_repeats(rng: Generator, tokens: np.ndarray, elements: np.ndarray, often: np.ndarray,
                  size: int) -> tuple[np.ndarray, list[int]]:
    """Write elements, each as often as it is wanted, and END into the study part of a row of
    tokens, and draw the order in which they are asked -> order, source of each answer."""
    shown = rng.permutation(np.repeat(elements, often))
    begin = rng.integers(0, size - len(shown))
    end = begin + len(shown)
    tokens[begin:end] = shown
    tokens[end] = END

    order = rng.permutation(len(elements))
    last_place = {token: place for place, token in enumerate(shown, begin)}
    source = [end - 1]  # which came last?
    source += [last_place[token] for token in elements[order]]
    return order, source


def brackets(rng: Generator, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """Dyck-k: a word that leaves eight brackets open (at most two pairs closed on the way, depth at
    most ten, length at most half a block), filler, and the eight closing brackets, innermost first.

        inputs   START ( [ ] { . . . . CLOSE } ) .
        answers                        }     )       scored at CLOSE, }
    """
    quiz, size = spans(length, config)
    count = min(items or 8, 8, size // 2)
    pairs = min(2, (size - 1 - count) // 2)
    inputs = blank(rng, n, length)
    start = quiz + rng.integers(0, size - count, n)

    answers, source = [], []
    for row in range(n):
        walk = bracket_walk(rng, count, pairs)
        begin = rng.integers(0, size - len(walk))
        word, left_open = bracket_word(rng, walk, config.kinds)
        end = begin + 1 + len(word)
        inputs[row, begin:end] = [START, *word]
        innermost_first = left_open[::-1]
        answers.append([FIRST + config.kinds + kind for kind, _ in innermost_first])
        source.append([begin + 1 + place for _, place in innermost_first])

    answers = np.array(answers)  # (n, count)
    mark(inputs, start, CLOSE)
    closers = run(start + 1, count)
    put(inputs, closers, answers)
    return Rows(inputs, at=closers - 1, answers=answers, source=np.array(source))


def bracket_walk(rng: Generator, count: int, pairs: int) -> list[int]:
    """A word without its kinds, +1 opens, -1 closes: `count` stay open, so many pairs do not."""
    walk = [1] * count
    for _ in range(pairs):
        where = rng.integers(0, len(walk) + 1)
        walk[where:where] = [1, -1]
    return walk


def bracket_word(rng: Generator, walk: list[int],
                 kinds: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Draw the kinds of a walk's brackets -> its symbols, and (kind, place) of those left open."""
    word, left_open = [], []
    for place, step in enumerate(walk):
        if step > 0:
            kind = int(rng.integers(kinds))
            left_open.append((kind, place))
            word.append(FIRST + kind)
        else:
            kind, _ = left_open.pop()
            word.append(FIRST + kinds + kind)
    return word, left_open


def random(rng: Generator, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """Random tokens, the control on which nothing may help: the next token in the last half block.

        inputs   d a c c b a d b        answers at the third last: a, d, b
    """
    tokens = rng.integers(FIRST, FIRST + config.alphabet, (n, length + 1))
    scored = np.arange(length - config.window // 2, length)
    at = np.tile(scored, (n, 1))
    answers = take(tokens, at + 1)
    nowhere = np.full_like(at, -1)
    return Rows(tokens[:, :-1], at, answers, source=nowhere)


# The order is that of the seeds of the data: a new task goes to the end.
TASKS: dict[str, Callable[..., Rows]] = {
    "copy": copy,
    "associative_recall": associative_recall,
    "mqar": mqar,
    "repeat_copy": repeat_copy,
    "brackets": brackets,
    "repeats": repeats,
    "random": random,
}


def train_groups(config: Config, task: str) -> list[tuple[int, int]]:
    """(length, items) of the training groups of a task; items 0 is as many as the task has."""
    field = "mqar_train" if task == "mqar" else "train"
    return specs(field, getattr(config, field))


def longest(config: Config, task: str) -> int:
    """Tokens of the longest training row of a task."""
    return max(length for length, _ in train_groups(config, task))


def kinds_of_question(group: dict) -> torch.Tensor:
    """(n, Q): the marker at which each question is asked; those at symbols are one kind, FIRST."""
    asked = group["inputs"].gather(1, group["at"].long())
    return asked.clamp_max(FIRST)


def context_free(train: list[dict], test: dict, symbols: int) -> tuple[float, float]:
    """Accuracy and loss (nats) on a test group of the best predictor that knows no context: the
    frequencies of the answers in training to each kind of question. One is added to the count of
    each of V symbols."""
    counts: dict[int, torch.Tensor] = {}
    for group in train:
        kinds = kinds_of_question(group)
        for kind in kinds.unique().tolist():
            answers = group["answers"][kinds == kind].long()
            of_group = torch.bincount(answers, minlength=symbols)  # (V,)
            counts[kind] = counts.get(kind, 0) + of_group

    kinds = kinds_of_question(test)
    unseen = torch.zeros(symbols, dtype=torch.long)
    right, loss = 0, 0.0
    for kind in kinds.unique().tolist():
        answers = test["answers"][kinds == kind].long()
        seen = counts.get(kind, unseen)  # (V,)
        is_right = answers == seen.argmax()
        right += is_right.sum().item()
        p = (seen + 1) / (seen.sum() + symbols)  # (V,)
        loss -= p[answers].log().sum().item()
    return right / kinds.numel(), loss / kinds.numel()


# ══ Data on disk ═════════════════════════════════════════════════════════════════════════════════
# The fields that shape every row.
SHAPING = ("window", "symbols", "mqar_symbols", "alphabet", "kinds", "items", "pairs", "data_seed")
# The fields that the two files of a task depend on. What chance is in a test depends on training.
TRAIN_FIELDS = (*SHAPING, "train", "mqar_train", "train_rows", "valid_rows")
TEST_FIELDS = (*SHAPING, "train", "mqar_train", "train_rows", "lengths", "mqar_test", "test_rows")
SPLITS = ("train", "valid", "test")


class OtherFields(ValueError):
    """Data on disk are of another configuration."""


def data_fields(config: Config, part: str) -> dict:
    """The fields that the data of a part, train (with validation) or test, depend on."""
    names = TRAIN_FIELDS if part == "train" else TEST_FIELDS
    return {name: getattr(config, name) for name in names}


def data_path(config: Config, task: str, part: str) -> Path:
    """The file of a part, train or test, of a task's data."""
    return Path(config.data_dir) / f"long_range_{task}_{part}.pt"


def content_hash(groups: list[dict]) -> str:
    """sha256 over lengths and tokens of groups, whatever the container."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(repr((group["split"], group["length"], group["items"])).encode())
        for name in Rows._fields:
            digest.update(group[name].numpy().tobytes())
        for name in sorted(group.keys() - {"split", "length", "items", *Rows._fields}):
            digest.update(f"{name}={group[name]!r}".encode())
    return digest.hexdigest()


def make_group(*, task: str, split: str, length: int, items: int, rows: int,
               config: Config) -> dict:
    """One group of rows as tensors; its seed is of data_seed, task, split, length and items."""
    place = [config.data_seed, [*TASKS].index(task), SPLITS.index(split), length, items]
    generate_rows = TASKS[task]
    rng = np.random.default_rng(place)
    arrays = generate_rows(rng=rng, n=rows, length=length, config=config, items=items)
    group = {"split": split, "length": length, "items": items}
    for name, array in arrays._asdict().items():
        group[name] = torch.from_numpy(array.astype(np.int16))
    return group


def train_part(config: Config, task: str) -> list[dict]:
    """Training groups of a task, then those of validation."""
    groups = []
    for split in ("train", "valid"):
        for i, (length, items) in enumerate(train_groups(config, task)):
            rows = config.valid_rows
            if split == "train":
                rows = 5 * config.train_rows if i == 0 else config.train_rows
            groups.append(make_group(task=task, split=split, length=length, items=items, rows=rows,
                                     config=config))
    return groups


def test_part(config: Config, task: str) -> list[dict]:
    """Test groups of a task, with the accuracy and loss of chance, the distance to the answers
    (mean and least, in windows) and the share of questions in the block of their answer."""
    groups, _ = load_data(config, task, "train")
    train = [group for group in groups if group["split"] == "train"]
    cells = [(length, 0) for length in config.length_list]
    if task == "mqar":
        cells += specs("mqar_test", config.mqar_test)
    w = config.window
    tested = []
    for length, items in cells:
        group = make_group(task=task, split="test", length=length, items=items,
                           rows=config.test_rows, config=config)
        chance, chance_loss = context_free(train, group, vocabulary(task, config))
        distance = (group["at"] - group["source"]).double() / w  # (n, Q)
        if task == "random":  # nothing is asked for: that of the other tasks
            distance = torch.full_like(distance, max(0.5, length / w - 1))
        within = group["at"] // w == group["source"] // w
        tested.append(group | {
            "chance": chance,
            "chance_loss": chance_loss,
            "distance": distance.mean().item(),
            "least": distance.min().item(),
            "within": within.double().mean().item()})
    return tested


@functools.lru_cache(maxsize=4)
def load_data(config: Config, task: str, part: str) -> tuple[list[dict], str]:
    """Read the groups of one part of a task's data, and their sha256. Raises ValueError when they
    are missing, damaged or not what their hash says, OtherFields when of another configuration."""
    path = data_path(config, task, part)
    command = f"python long_range.py generate --tasks {task}"
    require(path.is_file(), "file", str(path), f"there; run: {command}")
    payload = load_tensors(path, ("fields", "sha256", "groups"), f"delete it, then run: {command}")

    with reading(path, f"delete it, then run: {command}"):
        actual = content_hash(payload["groups"])
        saved_fields = dict(payload["fields"])
    for name, value in data_fields(config, part).items():
        saved = saved_fields.get(name)
        if saved != value:
            raise OtherFields(f"{path}: was generated with {name} = {saved!r}, this run has "
                              f"{value!r}; set --{name} {saved}, or generate again")
    if actual != payload["sha256"]:
        raise ValueError(f"{path}: its rows have sha256 {actual[:16]}…, generated were "
                         f"{payload['sha256'][:16]}…: altered; delete it and generate again")
    return payload["groups"], actual


def generate(config: Config) -> None:
    """Write the data of every task that is not on disk yet as this configuration wants it."""
    check_folder(config.data_dir, "data_dir", 200)
    for task in config.task_list:
        for part in ("train", "test"):
            path = data_path(config, task, part)
            verb = "wrote"
            if path.exists():
                try:
                    _, digest = load_data(config, task, part)
                    print(f"  kept     {path}, sha256 {digest[:12]}")
                    continue
                except OtherFields:
                    verb = "replaced"

            groups = train_part(config, task) if part == "train" else test_part(config, task)
            digest = content_hash(groups)
            fields = data_fields(config, part)
            save_tensors({"fields": fields, "sha256": digest, "groups": groups}, path)
            rows = sum(len(group["inputs"]) for group in groups)
            print(f"  {verb:<8} {path}, {rows:,} rows, sha256 {digest[:12]}", flush=True)


# ══ Model: one trunk, and behind it nothing, a key-value store, a notebook or a DNC ══════════════
class KNNState(NamedTuple):
    """What knn_store keeps of every token so far; it grows. One row a sequence."""

    keys: torch.Tensor  # (B, n, D) of norm one
    values: torch.Tensor  # (B, n, C) hidden states, normalised


class KNNTrace(NamedTuple):
    """What was stored at each token."""

    write_gate: torch.Tensor  # (B, T), one: every token is stored
    write_slots: torch.Tensor  # (B, T), the place of each


class KNNStore(nn.Module):
    """Every token's representation (key) and hidden state, normalised (value); a query reads the
    softmax over its nearest `top_k` keys by cosine, of the tokens before it. Soft, because choosing
    the nearest has no gradient into the keys. Adds h + read_proj(read); it starts at zero."""

    def __init__(self, hidden_size: int, width: int, top_k: int):
        super().__init__()
        self.width = width
        self.top_k = top_k
        self.norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, width)
        self.key = nn.Linear(hidden_size, width)
        self.log_strength = nn.Parameter(torch.tensor(math.log(8.0)))
        self.read_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.read_proj.weight)

    def init_state(self, batch_size: int) -> KNNState:
        """The store of so many rows that have stored nothing."""
        weight = self.read_proj.weight
        keys = weight.new_zeros(batch_size, 0, self.width)
        return KNNState(keys, weight.new_zeros(batch_size, 0, len(weight)))

    def read_weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, T, n+T) of all tokens -> softmax over the top_k highest of those before each
        of the T new ones; 0 where there is none."""
        T, total = scores.shape[1:]
        n = total - T
        every = torch.ones(T, total, dtype=torch.bool, device=scores.device)
        earlier = every.tril(n - 1)
        scores = scores.masked_fill(~earlier, -torch.inf)
        highest = scores.topk(min(self.top_k, total), dim=-1).values  # (B, T, top_k)
        scores = scores.masked_fill(scores < highest[..., -1:], -torch.inf)

        nothing = ~earlier.any(1, keepdim=True)  # (T, 1)
        weights = scores.masked_fill(nothing, 0.0).softmax(-1)
        return weights.masked_fill(nothing, 0.0)

    def forward(self, h: torch.Tensor, state: KNNState) -> tuple[torch.Tensor, KNNState, KNNTrace]:
        """h (B, T, C), state of n tokens -> h_out (B, T, C), state of n + T tokens, trace."""
        B, T, _ = h.shape
        n = state.keys.shape[1]
        z = self.norm(h)
        query = F.normalize(self.query(z), dim=-1, eps=1e-6)  # (B, T, D)
        own_keys = F.normalize(self.key(z), dim=-1, eps=1e-6)
        keys = torch.cat([state.keys, own_keys], dim=1)  # (B, n+T, D)
        values = torch.cat([state.values, z], dim=1)  # (B, n+T, C)

        cosine = query @ keys.transpose(1, 2)
        scores = self.log_strength.exp() * cosine  # (B, T, n+T)
        read = self.read_weights(scores) @ values  # (B, T, C)
        h_out = h + self.read_proj(read)

        slots = torch.arange(n, n + T, device=h.device)
        slots = slots.expand(B, T)
        trace = KNNTrace(torch.ones_like(slots, dtype=h.dtype), slots)
        return h_out, KNNState(keys, values), trace


def make_trunk(config: Config, symbols: int, positions: int, mlp_width: int) -> nn.Module:
    """A GPT2Model without dropout."""
    from transformers import GPT2Config, GPT2Model

    settings = GPT2Config(
        vocab_size=symbols,
        n_positions=positions,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=mlp_width,
        activation_function="gelu_pytorch_tanh",  # GPT-2's function in one fused call
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None, eos_token_id=None)
    return GPT2Model(settings)


def make_memory(config: Config, arm: str, segment: int) -> nn.Module | None:
    """The memory of an arm, None where it has none. segment: tokens of a training row, over which
    the gradient of a notebook reaches."""
    C = config.hidden_size
    if arm == "knn_store":
        return KNNStore(C, config.knn_width, config.knn_top_k)
    if arm == "edm":
        return EDM(hidden_size=C, heads=config.num_heads, width=C // config.num_heads,
                   slots=config.edm_slots, top_k=config.knn_top_k, segment=config.window,
                   bptt_segments=segment // config.window)
    if arm in DNC_ARMS:
        return make_dnc(config, arm)
    return None


def make_dnc(config: Config, arm: str) -> DNCMemory:
    """Graves' DNC, or the memory of dnc_gpt2.py with all that it starts with there."""
    if arm != "dnc":
        return build_dnc(dnc_gpt2.Config(
            hidden_size=config.hidden_size, num_heads=1, mem_slots=config.mem_slots,
            mem_width=config.mem_width, num_reads=config.num_reads, use_links=config.use_links,
            min_surprisal=0.0, scan=config.scan))  # of symbols that nothing predicts
    biases = {
        "write_strength": config.strength_bias,
        "read_strengths": config.strength_bias,
        "write_gate": config.write_bias,
        "free_gates": config.free_bias,
        "allocation_gate": config.allocation_bias}
    return DNCMemory(hidden_size=config.hidden_size, slots=config.mem_slots,
                     width=config.mem_width, reads=config.num_reads,
                     options=DNCOptions(config.use_links), scan=config.scan, biases=biases)


def waves(positions: int, width: int) -> torch.Tensor:
    """Sines and cosines of each position (Vaswani et al. 2017): (positions, width)."""
    even = torch.arange(0, width, 2)
    rates = torch.exp(-math.log(10_000.0) * even / width)
    angles = torch.arange(positions).unsqueeze(1) * rates  # (positions, width / 2, rounded up)
    sines_and_cosines = torch.stack([angles.sin(), angles.cos()], dim=-1)
    return sines_and_cosines.flatten(1)[:, :width]


class LongRangeModel(nn.Module):
    """GPT2Model over blocks, then a memory or none, then an output map and the head tied to the
    embedding. Every arm is this class, built from the same seed."""

    def __init__(self, config: Config, task: str, arm: str, seed: int, mlp_width: int):
        super().__init__()
        self.arm = arm
        self.segment = longest(config, task)  # tokens between which a memory is carried
        self.block = self.segment if arm == "full" else config.window
        positions = 2 * self.block if arm == "edm" else self.block
        self.controller = make_trunk(config, vocabulary(task, config), positions, mlp_width)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.start_weights(seed, config.num_layers)
        torch.manual_seed(seed)
        self.memory = make_memory(config, arm, self.segment)

    def start_weights(self, seed: int, layers: int) -> None:
        """Draw the matrices. The symbols get random codes of about norm 4, the positions waves:
        "the token before" is then a linear map, where from GPT-2's 0.02 both codes would first have
        to be learned."""
        for i, (name, weight) in enumerate(self.named_parameters()):
            if weight.dim() == 2:
                std = 0.02
                if "wte" in name:
                    std = 0.5
                elif "c_proj" in name:
                    std = 0.02 / math.sqrt(2 * layers)
                # Its own generator: other widths must not shift the weights that arms share.
                generator = torch.Generator().manual_seed(1000 * seed + i)
                weight.data.normal_(0, std, generator=generator)
        positions = self.controller.wpe.weight
        positions.data = 0.5 * waves(*positions.shape)

    def init_state(self, rows: int, slots: int = 0) -> tuple | None:
        """The empty memory of so many rows; of a DNC with at least so many slots. In training a
        notebook has as many slots as its rows have tokens: none is ever evicted."""
        if self.memory is None:
            return None
        if self.arm == "edm":
            return self.memory.init_state(rows, self.segment if self.training else 0)
        state = self.memory.init_state(rows)
        if self.arm in DNC_ARMS and slots > self.memory.slots:
            return add_slots(state, slots - self.memory.slots)
        return state

    def hidden(self, tokens: torch.Tensor, state: tuple | None):
        """tokens (B, L), L at most one block or a multiple of it -> (B, L, C), state, trace. With
        no state, as its trunk is trained, an EDM's attention reaches over two blocks."""
        B, L = tokens.shape
        if self.arm == "edm" and state is not None:
            return self.hidden_with_notebook(tokens, state)
        block = 2 * self.block if self.arm == "edm" else self.block
        blocks = tokens.reshape(-1, min(block, L))  # (B * blocks, block)
        h = self.controller(input_ids=blocks).last_hidden_state
        h = h.reshape(B, L, -1)  # (B, L, C)
        if state is None:
            return h, None, None
        if self.arm in DNC_ARMS:
            return self.memory(h, state, tokens, self.controller.wte(tokens))
        return self.memory(h, state)

    def hidden_with_notebook(self, tokens: torch.Tensor, state: tuple):
        """`hidden` of the EDM, which reads before the last transformer block. Attention is cut to a
        window; the positions of all but a row's first are those of the trunk's second."""
        B, L = tokens.shape
        trunk = self.controller
        *layers, last = trunk.h
        blocks = tokens.reshape(-1, min(self.block, L))  # (B * blocks, block)
        place = state.seen.unsqueeze(1) + torch.arange(L, device=tokens.device)  # (B, L)
        is_later = place >= self.block
        place = place % self.block + self.block * is_later
        positions = trunk.wpe(place.reshape(blocks.shape))
        h = trunk.wte(blocks) + positions  # (B * blocks, block, C)
        for layer in layers:
            h = layer(h)
        h, state, trace = self.memory(h.reshape(B, L, -1), state)
        h = last(h.reshape(*blocks.shape, -1))
        h = trunk.ln_f(h)
        return h.reshape(B, L, -1), state, trace

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """h (M, C) of the scored positions -> (M, V)."""
        return self.output(h) @ self.controller.wte.weight.T

    def pointer(self, trace: tuple | None, row: torch.Tensor, column: torch.Tensor
                ) -> Pointer | None:
        """What reads point at, at M scored positions; None where the arm's reads do not point."""
        if self.arm != "pointing":
            return None
        length = trace.read_weights.shape[1]
        return point(trace).rows(row * length + column)

    def log_p(self, h: torch.Tensor, trace: tuple | None, row: torch.Tensor, column: torch.Tensor
              ) -> torch.Tensor:
        """Log-probabilities (M, V) at M scored positions of h (B, L, C), given by row and column
        (M,); trace as of `hidden`."""
        log_p = self.logits(h[row, column]).log_softmax(-1)
        pointer = self.pointer(trace, row, column)
        return log_p if pointer is None else pointer.mix(log_p)


def add_slots(state: tuple, more: int) -> tuple:
    """A DNC's state with so many empty slots more."""
    pads = {"memory": (0, 0, 0, more), "link": (0, more, 0, more)}
    padded = {}
    for name, tensor in state._asdict().items():
        padded[name] = tensor
        is_used = 0 not in tensor.shape  # the links are not, where the DNC has none
        if is_used and name not in ("last", "hidden"):
            empty = -1 if name == "tokens" else 0
            padded[name] = F.pad(tensor, pads.get(name, (0, more)), value=empty)
    return type(state)(**padded)


@functools.lru_cache(maxsize=64)
def mlp_widths(config: Config, task: str) -> dict[str, int]:
    """Feed-forward width of every arm: all have about as many parameters as the largest."""
    sizes = {}
    for arm in ARMS:
        model = LongRangeModel(config, task, arm, seed=0, mlp_width=config.mlp_width)
        sizes[arm] = count_parameters(model)
    most = max(sizes.values())
    unit = config.num_layers * (2 * config.hidden_size + 1)  # parameters of one more
    return {arm: config.mlp_width + round((most - size) / unit) for arm, size in sizes.items()}


def build_model(config: Config, task: str, arm: str, seed: int) -> LongRangeModel:
    """The model of an arm, with as many parameters as those of the other arms, on the device."""
    width = mlp_widths(config, task)[arm]
    return LongRangeModel(config, task, arm, seed=seed, mlp_width=width).to(device())


def device() -> torch.device:
    """The GPU, where there is one; under torchrun that of LOCAL_RANK."""
    return local_device()


def hardware() -> str:
    """The device, as it stands beside what was measured on it: every run has one thread."""
    if device().type == "cuda":
        return device_name(device())
    return f"{platform.processor() or platform.machine()}, one thread a run"


# ══ Training ═════════════════════════════════════════════════════════════════════════════════════
class Job(NamedTuple):
    """One run: its checkpoint's name says all of it."""

    task: str
    arm: str
    seed: int
    lr: float

    def path(self, config: Config) -> Path:
        """Its checkpoint."""
        name = f"long_range_{self.task}_{self.arm}_seed{self.seed}_lr{self.lr:g}.pt"
        return Path(config.save_dir) / name

    def steps(self, config: Config) -> int:
        """How many steps it trains."""
        return config.mqar_steps if self.task == "mqar" else config.steps


# Fields that may differ between a checkpoint and the run that reads it. They choose the runs.
CHOICE_FIELDS = ("tasks", "arms", "seeds", "lr_grid")
# They shape the test data, which training does not meet.
TESTED_FIELDS = ("lengths", "mqar_test", "test_rows")
# They say where and how a run is computed.
HARDWARE_FIELDS = ("workers", "scan", "data_dir", "save_dir", "plot_dir", "log_every_steps")
# Fields of no other arm, and without influence on the number of parameters.
EDM_FIELDS = ("edm_slots", "edm_base_steps")
DNC_FIELDS = ("mem_slots", "lambda_gate", "lambda_closing")
BIAS_FIELDS = ("strength_bias", "free_bias", "write_bias", "allocation_bias")  # of Graves' alone


# What a checkpoint has to hold to be compared.
CHECKPOINT_KEYS = ("job", "config", "data", "model_state_dict", "val_accuracy", "val_loss",
                   "seconds")


def free_fields(job: Job) -> set[str]:
    """The fields that may differ between a checkpoint of the job and the run that reads it."""
    free = {*CHOICE_FIELDS, *TESTED_FIELDS, *HARDWARE_FIELDS}
    free.add("steps" if job.task == "mqar" else "mqar_steps")
    if job.arm != "edm":
        free.update(EDM_FIELDS)
    if job.arm not in DNC_ARMS:
        free.update(DNC_FIELDS)
    if job.arm != "dnc":
        free.update(BIAS_FIELDS)
    return free


def trained_path(config: Config, job: Job) -> Path:
    """The checkpoint of a job. Raises ValueError when it is not there."""
    path = job.path(config)
    require(path.is_file(), "checkpoint", str(path),
            "there; run: python long_range.py train, with the same fields")
    return path


def load_checkpoint(config: Config, job: Job) -> dict:
    """Read a finished run. Raises ValueError when it is missing, damaged, renamed, or of other
    fields or data."""
    path = trained_path(config, job)
    payload = load_tensors(path, CHECKPOINT_KEYS, "delete it, or set another save_dir")
    free = free_fields(job)
    with reading(path, "delete it, or set another save_dir"):
        saved_config = dict(payload["config"])
        for name in ("val_loss", "val_accuracy", "seconds"):
            float(payload[name])
    for name, value in dataclasses.asdict(config).items():
        saved = saved_config.get(name)
        if name not in free and saved != value:
            raise ValueError(f"checkpoint {path}: was trained with {name} = {saved!r}, this run "
                             f"has {value!r}; set --{name} {saved}, or another --save_dir")
    require(payload["job"] == job._asdict(), "checkpoint", str(path), f"of {job}; it was renamed")
    digest = load_data(config, job.task, "train")[1]
    require(payload["data"] == digest, "checkpoint", str(path),
            f"trained on these data (sha256 {digest[:12]}, not {payload['data'][:12]}); delete it, "
            "or set another save_dir")
    return payload


def optimizers(model: LongRangeModel, config: Config, lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices, AdamW on embeddings, biases and norms. AdamW alone is at
    4.2 nats or more after 400 steps, Muon at 0.13 after 300: docs/lab-notes.md, 1."""
    trunk = model.controller
    tables = {id(trunk.wte.weight), id(trunk.wpe.weight)}
    matrices, others = [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() == 2 and id(parameter) not in tables:
            matrices.append(parameter)
        else:
            others.append(parameter)

    # Of an EDM alone gate, strengths and norm are left: its gate has to open from zero.
    share = config.adam_lr if trunk.wte.weight.requires_grad else 0.5
    muon = torch.optim.Muon(matrices, lr=lr, momentum=0.9, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=lr * share, betas=(0.9, 0.99), weight_decay=0.0)
    return [muon, adam]


def trapezoid(step: int, steps: int, config: Config) -> float:
    """Share of the peak rate at a step: up, level, and down to zero, all in straight lines. Not the
    cosine of dnc_gpt2: the size of Muon's steps does not shrink with the gradient, so that what is
    left of the rate is left as noise."""
    rising = (step + 1) / max(config.lr_warmup * steps, 1e-9)
    falling = (1 - step / steps) / max(config.lr_decay, 1e-9)
    return min(1.0, rising, falling)


def batches(groups: list[dict], config: Config, steps: int,
            seed: int) -> Iterator[tuple[dict, torch.Tensor]]:
    """For each step a group and the rows of it: the same for every arm. The first group alone for
    the first share of the steps, then all in equal parts; each group's rows in a random order."""
    rng = np.random.default_rng(seed)
    queues = [np.empty(0, dtype=int) for _ in groups]
    for step in range(steps):
        is_early = step < config.curriculum * steps
        i = 0 if is_early else rng.integers(len(groups))
        group, queue = groups[i], queues[i]
        count = max(1, config.batch_tokens // group["length"])
        while len(queue) < count:
            order = rng.permutation(len(group["inputs"]))
            queue = np.concatenate([queue, order])
        rows, queues[i] = np.split(queue, [count])
        yield group, torch.from_numpy(rows)


def on_device(group: dict, rows: torch.Tensor | slice) -> list[torch.Tensor]:
    """Tokens (B, L), scored positions (B, Q) and answers (B, Q) of these rows of a group."""
    names = ("inputs", "at", "answers")
    return [group[name][rows].long().to(device()) for name in names]


def gate_cost(g: torch.Tensor, late: float, closing: float) -> torch.Tensor:
    """Mean cost of write gates g, late (0 to 1) in training; docs/lab-notes.md, 5. Short rows never
    punish what writing a little at each filler does to long ones. First -log(1 - g), times closing:
    its slope in the gate's input is g, so that it closes gates which stand wide open, too, unless
    recall needs them. In the end g (1 - g), of being undecided: small gates with large vectors
    evade a cost of the gate, and the slots so written count as free. The one gives way to the
    other, which holds up whatever is above a half."""
    early = -closing * torch.log((1 - g).clamp_min(1e-7))
    in_the_end = late * g * (1 - g)
    return (in_the_end + (1 - late) * early).mean()


def recall_losses(model: LongRangeModel, h: torch.Tensor, trace: tuple | None, at: torch.Tensor,
                  answers: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Answers (B, Q) at positions (B, Q) of h (B, L, C) -> the loss to train on, and the mean loss
    of the answers. Where reads point the first is that of the mixture and that of the vocabulary
    alone, as in dnc_gpt2.py."""
    rows = torch.arange(len(at), device=at.device)
    row, column = rows.unsqueeze(1).expand_as(at).flatten(), at.flatten()  # (B * Q,)
    answers = answers.flatten()
    nll = F.cross_entropy(model.logits(h[row, column]), answers, reduction="none")
    loss = nll.mean()
    pointer = model.pointer(trace, row, column)
    if pointer is None:
        return loss, loss.item()
    mixed = pointer.nll(nll, answers).mean()
    return loss + mixed, mixed.item()


def train_step(model: LongRangeModel, both: list[torch.optim.Optimizer], group: dict,
               rows: torch.Tensor | slice, *, rate: float, config: Config, carried: bool = False,
               late: float = 0.0) -> float:
    """Take one step on these rows of a group, at a share `rate` of the peak rate, with memory if
    `carried`; returns the loss of the scored tokens. late, 0 to 1: see gate_cost."""
    for optimizer in both:
        for param_group in optimizer.param_groups:
            peak = param_group.setdefault("peak", param_group["lr"])
            param_group["lr"] = peak * rate

    tokens, at, answers = on_device(group, rows)
    state = model.init_state(len(tokens)) if carried else None
    h, _, trace = model.hidden(tokens, state)
    loss, recall_loss = recall_losses(model, h, trace, at, answers)
    if not loss.requires_grad:  # of a frozen trunk, in a row of one block: nothing could be read
        return recall_loss
    if carried and model.arm in DNC_ARMS:  # late: before recall is learned it closes gates for good
        cost = gate_cost(trace.write_gate, late, config.lambda_closing)
        loss = loss + config.lambda_gate * late * cost

    for optimizer in both:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    nn.utils.clip_grad_norm_(trained, config.grad_clip)
    for optimizer in both:
        optimizer.step()
    return recall_loss


def train_trunk(model: LongRangeModel, train: list[dict], config: Config, job: Job) -> None:
    """Train the base of an EDM without memory, on rows of at most two windows with attention over
    both, then freeze it. Late, every second step has the study part of another row: where the base
    finds nothing it then says so, and not because the row looks longer, which would go on when a
    memory has the answer."""
    w = config.window
    steps = config.edm_base_steps
    inside = [group for group in train if group["length"] <= 2 * w]
    both = optimizers(model, config, job.lr)
    for step, (group, rows) in enumerate(batches(inside, config, steps, job.seed)):
        study = min(w, group["length"] // 2)
        is_swapped = step % 2 and step > steps // 2
        if is_swapped and group["at"].min() >= study:
            group = {name: group[name][rows] for name in ("inputs", "at", "answers")}
            own = group["inputs"][:, :study]
            group["inputs"][:, :study] = own.roll(1, 0)
            rows = slice(None)
        rate = trapezoid(step, steps, config)
        train_step(model, both, group, rows, rate=rate, config=config)
    model.controller.requires_grad_(False)
    model.output.requires_grad_(False)
    model.memory.start_from(model.controller.h[-1])


def train_model(model: LongRangeModel, train: list[dict], valid: list[dict], config: Config,
                job: Job) -> list[dict]:
    """Train a model with its memory -> its history, a row every log_every_steps. Raises Diverged
    where its loss is not finite."""
    both = optimizers(model, config, job.lr)
    steps = job.steps(config)
    history, losses = [], []
    for step, (group, rows) in enumerate(batches(train, config, steps, job.seed)):
        rate = trapezoid(step, steps, config)
        late = max(0.0, 2 * step / steps - 1)
        loss = train_step(model, both, group, rows, rate=rate, config=config, carried=True,
                          late=late)
        losses.append(loss)
        done = step + 1
        if done % config.log_every_steps == 0 or done == steps:
            row = {"step": done, "loss": sum(losses) / len(losses)}
            row |= validate(model, valid, config)
            if not math.isfinite(row["val_loss"]):
                raise Diverged(f"{job}: its loss is not finite; lower rates in --lr_grid help")
            history.append(row)
            losses.clear()
    return history


def validate(model: LongRangeModel, valid: list[dict], config: Config) -> dict:
    """Accuracy and val_loss, each the mean over the groups of validation."""
    scores = [score(model, group, config) for group in valid]
    means = {}
    for name in ("accuracy", "val_loss"):
        means[name] = sum(of_group[name] for of_group in scores) / len(scores)
    return means


def train_run(config: Config, job: Job) -> str:
    """Train one arm on one task from one seed and save it; returns a line about it."""
    groups, digest = load_data(config, job.task, "train")
    train = [group for group in groups if group["split"] == "train"]
    valid = [group for group in groups if group["split"] == "valid"]
    model = build_model(config, job.task, job.arm, job.seed)
    began = time.time()
    if job.arm == "edm":
        train_trunk(model, train, config, job)
    history = train_model(model, train, valid, config, job)
    seconds = time.time() - began

    steps, last = job.steps(config), history[-1]
    tokens = sum(group["inputs"].numel() for group in train)
    payload = {
        "job": job._asdict(),
        "config": dataclasses.asdict(config),
        "data": digest,
        "model_state_dict": model.state_dict(),
        "global_step": steps,
        "epoch": steps * config.batch_tokens / tokens,
        "val_accuracy": last["accuracy"],
        "val_loss": last["val_loss"],
        "val_ppl": perplexity(last["val_loss"]),
        "history": history,
        "seconds": seconds,
        "rows": sum(len(group["inputs"]) for group in train)}
    save_tensors(payload, job.path(config))
    return (f"{job.task:<18} {job.arm:<9} seed {job.seed} lr {job.lr:<5g} {seconds:5.0f} s, "
            f"validation: accuracy {last['accuracy']:7.2%}, loss {last['val_loss']:.3f}")


# ── Many runs at once ────────────────────────────────────────────────────────────────────────────
def set_up_worker() -> None:
    """One thread a run: the result does not depend on how many run at once. A worker dies with its
    parent: one that was left would write into the folder of the next run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        parent_death = 1
        ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL)
    torch.set_num_threads(1)


def worker_count(config: Config) -> int:
    """How many runs go at once: with CUDA they share one device."""
    if config.workers != "auto":
        return config.workers
    if torch.cuda.is_available():
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def new_processes() -> BaseContext:
    """How workers start: as forks of a process that has imported the libraries, once for all that
    the command does; where there is none (Windows), each imports them. None has used CUDA before.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Libraries by name: Python 3.11 passes over a script, and does not know its folder.
    context.set_forkserver_preload(
        ["torch._dynamo", "transformers.models.gpt2.modeling_gpt2", "numba"])
    return context


def run_all(function: Callable, config: Config, jobs: list[Job], what: str) -> list:
    """function(config, job) of every job, several at once; prints the lines that come back. What
    stops this process ends the workers at once; the runs that they are in are lost."""
    from tqdm import tqdm

    workers = max(1, min(worker_count(config), len(jobs)))
    pool = concurrent.futures.ProcessPoolExecutor(workers, new_processes(),
                                                  initializer=set_up_worker)
    results = {}
    with tqdm(total=len(jobs), desc=what, dynamic_ncols=True, disable=not jobs) as bar:
        try:
            running = {pool.submit(function, config, job): job for job in jobs}
            for done in concurrent.futures.as_completed(running):
                result = results[running[done]] = done.result()
                bar.update()
                if isinstance(result, str):
                    bar.write(f"  {result}", file=sys.stdout)
        except BaseException:
            for process in (pool._processes or {}).values():  # else they finish their runs first
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return [results[job] for job in jobs]


def slowest_first(jobs: list[Job]) -> list[Job]:
    """The order of jobs in which no core waits for a last long run."""
    return sorted(jobs, key=lambda job: (job.arm not in DNC_ARMS, job.arm != "knn_store"))


def first_jobs(config: Config) -> list[Job]:
    """The runs that choose the learning rates: every rate, at the first seed."""
    seed = config.seed_list[0]
    choices = itertools.product(config.task_list, config.arm_list, config.rates)
    return [Job(task, arm, seed, lr) for task, arm, lr in choices]


def chosen_jobs(config: Config) -> list[Job]:
    """The runs that are compared: of each task and arm the rate of least validation loss. Not of
    best accuracy, which two rates that have learned a task share but for a question or two."""
    tried: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for job in first_jobs(config):
        val_loss = load_checkpoint(config, job)["val_loss"]
        tried.setdefault((job.task, job.arm), []).append((val_loss, job.lr))

    chosen = []
    for (task, arm), losses_and_rates in tried.items():
        _, lr = min(losses_and_rates)
        chosen += [Job(task, arm, seed, lr) for seed in config.seed_list]
    return chosen


def check_scan(config: Config, task: str) -> None:
    """Raise ValueError where the recurrence asked for cannot run, in training or in a test."""
    most_slots = 0
    if task == "mqar":
        most_slots = max(2 * pairs for _, pairs in specs("mqar_test", config.mqar_test))
    for arm in {*DNC_ARMS} & {*config.arm_list}:
        model = build_model(config, task, arm, 0)
        for slots in (0, most_slots):
            state = model.init_state(1, slots)
            pick_scan(config.scan, state, model.memory.options)


def train(config: Config) -> None:
    """Train what is not on disk yet: first every rate at the first seed, then the other seeds."""
    check_folder(config.save_dir, "save_dir", 64)
    require(hasattr(torch.optim, "Muon"), "torch", torch.__version__,
            "2.9 or newer for its Muon optimizer: pip install 'torch>=2.9,<=2.13.0'")
    for task in config.task_list:  # what cannot run is said before hours of training
        load_data(config, task, "train")
        check_scan(config, task)

    for jobs_of in (first_jobs, chosen_jobs):
        jobs = jobs_of(config)
        missing = [job for job in jobs if not job.path(config).exists()]
        finished = [job for job in jobs if job not in missing]
        for job in finished:
            load_checkpoint(config, job)
        if finished:
            print(f"  {len(finished)} of {len(jobs)} runs are finished in {config.save_dir}")
        run_all(train_run, config, slowest_first(missing), "train")


# ══ Evaluation ═══════════════════════════════════════════════════════════════════════════════════
EVAL_TOKENS = 4096  # at once


@dataclasses.dataclass
class Tally:
    """What the scored tokens add up to."""

    right: int = 0
    loss: float = 0.0
    count: int = 0

    def add(self, log_p: torch.Tensor, answers: torch.Tensor) -> None:
        """Count log-probabilities (M, V) of M scored tokens, whose answers are (M,)."""
        loss = F.nll_loss(log_p, answers, reduction="sum")
        is_right = log_p.argmax(-1) == answers
        self.loss += loss.item()
        self.right += is_right.sum().item()
        self.count += len(answers)


def segment_cuts(model: LongRangeModel, length: int, window: int) -> list[int]:
    """Where the segments of a row begin, and its end. They are as long as training had them, and
    the last window is one of its own; the full arm sees the row whole."""
    if model.block != window:
        return [0, length]
    begins = {*range(0, length - window, model.segment), max(0, length - window)}
    return [*sorted(begins), length]


def row_batches(rows: int, tokens: int) -> list[torch.Tensor]:
    """The rows of a group in batches of about EVAL_TOKENS, where each holds so many tokens at once.
    A batch has two rows or more: a row alone could not be given another's memory."""
    at_once = max(2, EVAL_TOKENS // tokens)
    split = list(torch.arange(rows).split(at_once))
    if len(split) > 1 and len(split[-1]) == 1:
        alone = split.pop()
        split[-1] = torch.cat([split[-1], alone])
    return split


@torch.no_grad()
def score(model: LongRangeModel, group: dict, config: Config, swap: bool = False) -> dict:
    """Accuracy and val_loss of a group of rows (NaN where nothing is asked), memory carried from
    segment to segment, with tokens_per_s. With `swap` each row meets the last window with the
    memory of the row before it; only that window is scored then."""
    length = group["length"]
    cuts = segment_cuts(model, length, config.window)
    slots = 2 * group["items"] if group["split"] == "test" else 0
    tally = Tally()
    began = time.perf_counter()
    for rows in row_batches(len(group["inputs"]), min(length, model.segment)):
        state = model.init_state(len(rows), slots)
        state = score_rows(model, state, on_device(group, rows), cuts=cuts, swap=swap, tally=tally)
    seconds = time.perf_counter() - began

    count = tally.count or math.nan
    carried = sum(x.numel() * x.element_size() for x in state or ())  # of the last batch
    return {
        "accuracy": tally.right / count,
        "val_loss": tally.loss / count,
        "memory_bytes": carried // len(rows),
        "tokens_per_s": group["inputs"].numel() / seconds}


def score_rows(model: LongRangeModel, state: tuple | None, batch: list[torch.Tensor], *,
               cuts: list[int], swap: bool, tally: Tally) -> tuple | None:
    """Read the rows of `on_device` segment by segment and tally the scored tokens; returns the
    state behind the last."""
    tokens, at, answers = batch
    for start, end in itertools.pairwise(cuts):
        is_last = end == cuts[-1]
        if swap and is_last:
            state = map_state(lambda tensor: tensor.roll(1, 0), state)
        h, state, trace = model.hidden(tokens[:, start:end], state)
        is_here = (at >= start) & (at < end)
        row, question = is_here.nonzero(as_tuple=True)  # (M,), (M,)
        if len(row) and (is_last or not swap):
            column = at[row, question] - start
            log_p = model.log_p(h, trace, row, column)  # (M, V)
            tally.add(log_p, answers[row, question])
    return state


def measure_run(config: Config, job: Job) -> list[dict]:
    """The rows of plots/long_range.json of one run: every test group that its arm can read."""
    payload = load_checkpoint(config, job)
    model = build_model(config, job.task, job.arm, job.seed)
    with reading(job.path(config), "delete it, or set another save_dir"):
        model.load_state_dict(payload["model_state_dict"])
    model.eval()
    groups = load_data(config, job.task, "test")[0]
    if job.arm == "full":  # its positions end there
        groups = [group for group in groups if group["length"] <= model.block]
    if groups:
        score(model, groups[0], config)  # compiles what is compiled: not to be timed

    of_run = {"parameters": count_parameters(model), "val_accuracy": payload["val_accuracy"],
              "train_seconds": round(payload["seconds"], 1)}
    return [job._asdict() | measure_group(model, group, config) | of_run for group in groups]


def measure_group(model: LongRangeModel, group: dict, config: Config) -> dict:
    """What a row of plots/long_range.json says of one test group, about it and of the model."""
    length = group["length"]
    own = score(model, group, config)
    swapped = math.nan
    if model.memory is not None and length > config.window:
        of_swapped = score(model, group, config, swap=True)
        swapped = of_swapped["accuracy"]
    attended = min(length, model.block)  # tokens whose keys and values, float32, each layer keeps
    return {
        "length": length,
        "items": group["items"],
        "questions": group["at"].shape[1],
        "distance_windows": round(group["distance"], 3),
        "least_distance_windows": round(group["least"], 3),
        "within_block": group["within"],
        "accuracy": own["accuracy"],
        "loss": own["val_loss"],
        "swapped_accuracy": None if math.isnan(swapped) else swapped,
        "chance": group["chance"],
        "chance_loss": group["chance_loss"],
        "tokens_per_s": round(own["tokens_per_s"]),
        "memory_bytes": own["memory_bytes"],
        "attention_bytes": 2 * config.num_layers * config.hidden_size * 4 * attended}


def results_path(config: Config) -> Path:
    """The file of what was measured."""
    return Path(config.plot_dir) / "long_range.json"


def read_results(config: Config) -> dict[str, list[dict]]:
    """Rows of every run that was measured before, by its identity; of a damaged file none, so that
    they are measured again."""
    try:
        runs = read_json(results_path(config), remedy="delete it")["runs"]
        return {run["id"]: run["rows"] for run in runs}
    except (ValueError, KeyError, TypeError):
        return {}


def identity(config: Config, job: Job) -> str:
    """sha256 of all that the measurements of a run depend on. Raises ValueError where it has not
    been trained."""
    digest = hashlib.sha256(trained_path(config, job).read_bytes())
    _, of_data = load_data(config, job.task, "test")
    digest.update(of_data.encode())
    computed_with = f"{hardware()} {torch.__version__} {config.scan}"
    digest.update(computed_with.encode())
    return digest.hexdigest()


def measure(config: Config) -> list[dict]:
    """Rows of every compared run: those of plots/long_range.json that are of these very weights and
    test data, the others evaluated now. The file then holds them all; it is written after every
    task, so that a run which is stopped goes on."""
    check_folder(config.plot_dir, "plot_dir")
    measured, path = read_results(config), results_path(config)
    jobs = chosen_jobs(config)
    ids = {job: identity(config, job) for job in jobs}
    about = run_facts(hardware()) | {"config": dataclasses.asdict(config),
                                     "confidence": "95 %, Student's t over seeds"}
    for task in config.task_list:
        missing = [job for job in jobs if job.task == task and ids[job] not in measured]
        missing = slowest_first(missing)
        results = run_all(measure_run, config, missing, f"evaluate {task}")
        for job, rows in zip(missing, results, strict=True):
            measured[ids[job]] = rows

        known = [ids[job] for job in jobs if ids[job] in measured]
        runs = [{"id": run_id, "rows": measured[run_id]} for run_id in known]
        rows = [row for of_run in runs for row in of_run["rows"]]
        write_json({"about": about, "rows": rows, "runs": runs}, path)
    print(f"wrote {path}")
    return rows


# ══ Tables and plot ══════════════════════════════════════════════════════════════════════════════
CELL = 9  # of a table, with a space before it
LINE_WIDTHS = (1.5, 5.5, 3.5, 2.0, 1.0, 2.5, 1.5)  # of ARMS: curves that coincide lie in each other


def select(rows: list[dict], **fields) -> list[dict]:
    """Those of rows that have these values."""
    selected = []
    for row in rows:
        if all(row[name] == value for name, value in fields.items()):
            selected.append(row)
    return selected


def lengths_of(rows: list[dict]) -> list[int]:
    """The lengths of rows, rising."""
    return sorted({row["length"] for row in rows})


def kept(row: dict) -> float:
    """KiB that a row of that length keeps: keys and values of attention, and the memory."""
    return (row["attention_bytes"] + row["memory_bytes"]) / 1024


def percent(values: list[float | None]) -> str:
    """One cell of a table in per cent: the mean over seeds ± half of its interval."""
    known = [100 * value for value in values if value is not None]
    return " " + cell(known, ".1f", CELL)


def effective_context(cells: list[tuple[float, float, float]]) -> str:
    """The distance (windows) at which accuracy falls half-way from 100 % to chance, interpolated in
    its logarithm, from (distance, accuracy, chance) of rising distance; "< d" or "> d" where it has
    fallen at the least or never falls; "—" where nothing is known."""
    if not cells:
        return "—"
    share_before = place_before = 0.0
    for i, (distance, accuracy, chance) in enumerate(cells):
        share = (accuracy - chance) / max(1e-9, 1 - chance)
        place = math.log(distance)
        if share <= 0.5 and i == 0:
            return f"< {distance:.3g}"
        if share <= 0.5:
            way = (share_before - 0.5) / (share_before - share)
            crossing = place_before + way * (place - place_before)
            return f"{math.exp(crossing):.3g}"
        share_before, place_before = share, place
    return f"> {distance:.3g}"


def print_rows(rows: list[dict], config: Config) -> None:
    """Print accuracy by length, one column an arm, and for a memory one with another row's."""
    columns = []  # (arm, key of a row)
    heads = f"  {'length':>6}{'dist.':>7}{'asked':>6}"
    for arm in config.arm_list:
        columns.append((arm, "accuracy"))
        heads += f" {arm:>{CELL}}"
        if arm in MEMORY_ARMS:
            columns.append((arm, "swapped_accuracy"))
            heads += f" {'swapped':>{CELL}}"
    print(heads + f" {'chance':>{CELL}}")

    cells = {(row["length"], row["items"]) for row in rows}
    for length, items in sorted(cells):
        at_length = select(rows, length=length, items=items)
        any_row = at_length[0]
        text = f"  {length:>6}{any_row['distance_windows']:>7.1f}{any_row['questions']:>6}"
        for arm, key in columns:
            of_arm = select(at_length, arm=arm)
            text += percent([row[key] for row in of_arm])
        print(text + percent([any_row["chance"]]))


def reach_of(rows: list[dict]) -> str:
    """The effective context of one arm's rows: of the means over seeds at every length."""
    cells = []
    for length in lengths_of(rows):
        of_seeds = select(rows, length=length)
        mean, _ = mean_and_half([row["accuracy"] for row in of_seeds])
        cells.append((of_seeds[0]["distance_windows"], mean, of_seeds[0]["chance"]))
    return effective_context(cells)


def print_task(task: str, rows: list[dict], config: Config) -> None:
    """Print one task: accuracy by length and distance, every arm, chance, memory swapped."""
    print()
    print_heading(f"{task} — accuracy on scored tokens in %, by length and distance")
    rows = select(rows, task=task)
    main_rows = select(rows, items=0)
    print_rows(main_rows, config)

    most = max(row["questions"] for row in main_rows)  # distances are compared at equal load
    tried = ", ".join(f"{rate:g}" for rate in config.rates)
    for arm in config.arm_list:
        of_arm = select(main_rows, arm=arm)
        reach = reach_of(select(of_arm, questions=most))
        print(f"  {arm:<10} effective context {reach:>6} windows; learning rate "
              f"{of_arm[0]['lr']:g} of {tried}")

    zoology = [row for row in rows if row["items"]]
    if zoology:
        cells = {(row["length"], row["items"], row["within_block"]) for row in zoology}
        near = [f"{length}:{items} {share:.0%}" for length, items, share in sorted(cells) if share]
        print("\n  As Zoology tests: as many questions as pairs, anywhere behind the pairs; the\n"
              "  DNC has at least twice as many slots. Questions in the block of their answer: "
              + ", ".join(near))
        print_rows(zoology, config)


def print_costs(rows: list[dict], config: Config) -> None:
    """Print what each arm costs by length: tokens a second, and what a row has to keep."""
    rows = select(rows, items=0)
    print()
    print_heading("Cost by length: evaluation tokens/s; KiB that a row keeps")
    print(f"  {'length':>6}" + "".join(f"{arm:>14}{'KiB':>9}" for arm in config.arm_list))
    for length in lengths_of(rows):
        text = f"  {length:>6}"
        for arm in config.arm_list:
            at_length = select(rows, arm=arm, length=length)
            speeds = [row["tokens_per_s"] for row in at_length]
            text += cell(float(np.median(speeds)) if speeds else None, ",.0f", 14)
            text += cell(kept(at_length[0]) if at_length else None, ",.1f", 9)
        print(text)


def compare(config: Config) -> None:
    """Print every table."""
    rows = measure(config)
    for task in config.task_list:
        print_task(task, rows, config)
    print_costs(rows, config)
    print(f"\n{LINE}\n  dist.: windows from a question back to its answer, the mean. chance: the\n"
          "  best predictor without context, its frequencies counted in the training data.\n"
          "  swapped: the memory of another row in the last window. effective context: the\n"
          "  distance at which accuracy is half-way down to chance.")
    if len(config.seed_list) > 1:
        print(f"  ±: half of the 95 % interval over {len(config.seed_list)} seeds.")
    else:
        print("  One seed: no interval. --seeds 0,1,2 gives one.")


def plot(config: Config) -> None:
    """Draw plots/long_range.png: accuracy above, loss below, a column a task; costs at the end."""
    rows, path = measure(config), Path(config.plot_dir) / "long_range.png"
    columns = len(config.task_list) + 1
    inches = (3.6 * columns, 7)
    with dark_figure(path, 2, columns, inches, squeeze=False) as (figure, axes):
        for task, (above, below) in zip(config.task_list, axes.T, strict=False):
            of_task = select(rows, task=task, items=0)
            draw_panel(above, of_task, "accuracy", "chance", longest(config, task), config)
            draw_panel(below, of_task, "loss", "chance_loss", longest(config, task), config)
            above.set(title=task, ylim=(-0.03, 1.03))
            below.set(ylim=(0, 1.05 * below.get_ylim()[1]))
        axes[0, 0].set(ylabel="accuracy on scored tokens")
        axes[1, 0].set(ylabel="loss (nats / scored token)")
        axes[0, 0].legend(fontsize=8)

        of_task = select(rows, task=config.task_list[0], items=0)
        costs = [row | {"kept": kept(row)} for row in of_task]
        above, below = axes[:, -1]
        draw_arms(above, costs, "tokens_per_s", config)
        draw_arms(below, costs, "kept", config)
        above.set(yscale="log", title="evaluation tokens/s")
        below.set(yscale="log", title="KiB that a row keeps")
        label_lengths(above, lengths_of(costs))
        label_lengths(below, lengths_of(costs))
        figure.suptitle(f"Trained up to the dashed line, window {config.window}, "
                        f"{len(config.seed_list)} seed(s); band: 95 % over seeds", fontsize=11)


def draw_panel(axis, rows: list[dict], key: str, chance: str, trained: int,
               config: Config) -> None:
    """Draw one quantity of a task against length, with chance and the longest training row."""
    draw_arms(axis, rows, key, config)
    lengths = lengths_of(rows)
    flat = [select(rows, length=length)[0][chance] for length in lengths]
    axis.plot(lengths, flat, color="white", ls=":", lw=1, label="chance")
    axis.axvline(trained, color="gray", lw=0.8, ls="--")
    label_lengths(axis, lengths)


def draw_arms(axis, rows: list[dict], key: str, config: Config) -> None:
    """Draw the mean over seeds against length, a line an arm, with its interval if there is one."""
    for arm in config.arm_list:
        color, width = PALETTE[ARMS.index(arm)], LINE_WIDTHS[ARMS.index(arm)]
        of_arm = select(rows, arm=arm)
        lengths = lengths_of(of_arm)
        stats = []
        for length in lengths:
            of_seeds = [row[key] for row in select(of_arm, length=length)]
            stats.append(mean_and_half(of_seeds))
        means, halves = np.array(stats).reshape(-1, 2).T
        halves = np.nan_to_num(halves)  # of one seed: none
        axis.plot(lengths, means, color=color, marker="o", ms=width + 2, lw=width, label=arm)
        axis.fill_between(lengths, means - halves, means + halves, color=color, alpha=0.2, lw=0)


def label_lengths(axis, lengths: list[int]) -> None:
    """Give an axis of lengths a logarithmic scale, with the lengths themselves as its ticks."""
    axis.set_xscale("log", base=2)
    axis.set_xticks([], minor=True)
    names = []
    for shorter, length in zip([1, *lengths], lengths, strict=False):
        is_crowded = length < 1.2 * shorter
        names.append("" if is_crowded else str(length))
    axis.set_xticks(lengths, names, fontsize=7, rotation=45)
    axis.set_xlabel("length, tokens")
    axis.grid(alpha=0.2)


# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
PARTS = {"generate": generate, "train": train, "compare": compare, "plot": plot}
WRITES = {"generate": "data_dir", "train": "save_dir", "compare": "plot_dir", "plot": "plot_dir"}


@contextlib.contextmanager
def writing(config: Config, command: str) -> Iterator[None]:
    """Lock the folder that a command writes into. Raises ValueError where another one does."""
    field = WRITES[command]
    folder = getattr(config, field)
    check_folder(folder, field)
    with locked(folder, field, ".long_range.lock"):
        yield


def print_plan(config: Config, full: bool) -> None:
    """Print what is run, and what is left out of it."""
    lines = {
        "tasks": ", ".join(config.task_list),
        "arms": f"{', '.join(config.arm_list)}; seeds {config.seeds}; "
                f"learning rates {config.lr_grid}",
        "lengths": f"tested at {config.lengths}; window {config.window}",
        "device": f"{hardware()}, float32"}
    if not full:
        left_out = [task for task in TASKS if task not in config.task_list]
        without = ", ".join(left_out) or "nothing"
        lines["reduced"] = (
            f"{config.steps} steps a run, mqar {config.mqar_steps}; {config.pairs} pairs of "
            f"{config.mqar_symbols:,} symbols;\nwithout {without}\n"
            f"--full: all tasks, five seeds, {FULL['steps']:,} steps, mqar "
            f"{FULL['mqar_steps']:,} with {FULL['pairs']} of {FULL['mqar_symbols']:,}")
    print_banner("long_range: at which distance does each memory stop remembering?", lines, config)


def print_parameters(config: Config) -> None:
    """Print how many parameters the arms have. Raises ValueError where they do not match."""
    for task in config.task_list:
        widths = mlp_widths(config, task)
        sizes, texts = [], []
        for arm in config.arm_list:
            size = count_parameters(build_model(config, task, arm, 0))
            sizes.append(size)
            texts.append(f"{arm} {size:,} ({widths[arm]})")
        print(f"  {task:<18} parameters (feed-forward width): {', '.join(texts)}")
        require_field(config, "mlp_width", max(sizes) <= 1.02 * min(sizes),
                      "such that the arms' parameters match within 2 %; a larger one does")


SIZES = ("hidden_size, num_layers, mlp_width, mem_slots, mem_width, num_reads, knn_width, "
         "edm_slots, batch_tokens, train_rows, valid_rows or test_rows")


def least_bytes(config: Config) -> float:
    """The least bytes that the data and the largest model of a run take."""
    width = config.hidden_size
    weights = width * config.knn_width
    weights += config.num_reads * config.mem_width
    weights += config.num_layers * 4 * width**2
    weights += config.num_layers * 2 * width * config.mlp_width

    held = config.mem_slots * config.mem_width
    held += config.mem_slots * config.num_reads
    if "edm" in config.arm_list:
        held += 2 * config.edm_slots * width

    tokens = config.batch_tokens * width
    tokens += 2 * max(config.length_list) * config.test_rows
    tokens += 10 * config.window * config.train_rows
    tokens += 2 * config.window * config.valid_rows
    objects = 50_000 * config.num_layers
    return objects + 4 * (4 * weights + held + tokens)


def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 1 diverged, 2 a user's mistake, 128 + signal stopped."""

    def job(stop: StopSignal) -> None:
        commands, options = split_command(argv, tuple(PARTS))
        full = "--full" in options
        options = [word for word in options if word != "--full"]
        config = read_config(Config, options, __doc__, preset=FULL if full else {})
        torch.set_num_threads(1)
        check_memory(least_bytes(config), SIZES)
        print_plan(config, full)
        print_parameters(config)
        for command in commands:
            if command in ("generate", "train"):
                print(f"\n{command}", flush=True)
            with writing(config, command):
                PARTS[command](config)

    return run_command(job, again=["long_range.py", *argv], saved="finished runs are kept",
                       sizes=SIZES)


if __name__ == "__main__":
    print_any_character()
    sys.exit(main(sys.argv[1:]))
