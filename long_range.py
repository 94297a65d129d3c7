#!/usr/bin/env python3
"""At which distance does each memory stop remembering?  Synthetic tasks, trained short, tested far.

    python long_range.py                       generate, train, compare, plot: a few tasks, one seed
    python long_range.py --full                every task and seed; a run that is stopped goes on
    python long_range.py generate|train|compare|plot    one part, on what the part before left
    python long_range.py --tasks mqar --arms window,dnc --seeds 0,1,2 --lengths 64,288,4128
    python long_range.py --help                every Config field, its default and its comment

Read downward; each section uses only what stands above it.
A row is a study part, filler, and a quiz part: what the quiz asks stands in the study part.
Attention, but for that of `full`, stays inside blocks of one window; the distance from a question
to its answer is counted in windows. Letters: B rows, L tokens of a row, T tokens of a segment,
C hidden width, V vocabulary, Q questions of a row, N memory slots, W word width, n stored tokens.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dnc_gpt2 import (
    LINE,
    RULE,
    DNCMemory,
    DNCOptions,
    check_folder,
    check_types,
    check_values,
    count_parameters,
    dark_figure,
    map_state,
    parse_overrides,
    pick_scan,
    print_help,
    require,
)
from edm_gpt2 import EDM, mean_and_half

ARMS = ("window", "knn_store", "dnc", "edm", "full")
MEMORY_ARMS = ("knn_store", "dnc", "edm")
COMMANDS = ("generate", "train", "compare", "plot")

# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of a run. Edit here, or override as `--name value`."""

    # what
    tasks: str = "copy,mqar"  # of those that --help lists
    arms: str = "window,knn_store,dnc,full"  # of these and edm, whose trunk is frozen
    seeds: str = "0"  # weights and order of the data, one run each
    lengths: str = "32,64,96,160,256,288,544,4128"  # tokens of a tested row, multiples of window
    # data
    window: int = 32  # tokens of a block, which attention never leaves; a multiple of 8
    symbols: int = 1024  # of copy, repeat_copy and associative_recall
    mqar_symbols: int = 1024  # half of them keys, half values
    alphabet: int = 64  # symbols of repeats and random
    kinds: int = 8  # kinds of brackets: chance is 1 / kinds
    items: int = 24  # symbols of copy's pattern; other tasks have what their docstrings say
    pairs: int = 16  # key-value pairs of mqar in a long row
    train: str = "64:4,32,64,96,160,256"  # length[:at most so many items] of training groups
    mqar_train: str = "64:4,128:8,256:16"  # length:pairs of mqar's training groups
    mqar_test: str = "64:4,64:8,64:16,128:32,256:64"  # as Zoology tests, length:pairs
    train_rows: int = 4000  # of every training group; of the first, five times as many
    valid_rows: int = 32  # of every training group, for the choice of the learning rate
    test_rows: int = 32  # of every tested length
    data_seed: int = 0  # of the data
    # model
    hidden_size: int = 64  # C
    num_layers: int = 2  # transformer blocks
    num_heads: int = 2  # attention heads; divides hidden_size
    mlp_width: int = 128  # of the arm with most parameters; the others are widened to match
    # memory
    mem_slots: int = 64  # N of the DNC; where a test asks for more pairs, twice the pairs
    mem_width: int = 64  # W of the DNC
    num_reads: int = 1  # R of the DNC
    strength_bias: float = 16.0  # initial strength about 17; at 1.7 addressing is not learned
    free_bias: float = -4.0  # free gates start at 0.02: reading does not free what was written
    write_bias: float = -2.0  # write gates start at 0.12: filler has to earn its place
    allocation_bias: float = 4.0  # allocation gates start at 0.98: writes go to free slots
    use_links: bool = False  # temporal links of the DNC
    knn_width: int = 64  # of the keys of knn_store
    knn_top_k: int = 16  # keys that a query of knn_store or of edm reads
    edm_slots: int = 8192  # of the EDM's notebook
    edm_base_steps: int = 2000  # of its trunk inside the window, before it is frozen
    # training
    steps: int = 400  # of every run but those of mqar
    mqar_steps: int = 600  # more symbols, more steps
    batch_tokens: int = 4096  # tokens a step
    curriculum: float = 0.35  # share of the steps on the first training group alone, few items
    lr_grid: str = "0.015,0.025"  # of Muon; that of least validation loss at the first seed
    adam_lr: float = 0.15  # rate of AdamW (embeddings, biases, norms), as a share of Muon's
    lr_warmup: float = 0.05  # share of all steps with a linearly rising rate
    lr_decay: float = 0.6  # share of the last steps, in which the rate falls linearly to zero
    lambda_gate: float = 1.0  # cost of the DNC's write gates, in the second half of training
    lambda_closing: float = 0.1  # weight in it of closing open gates; gives way to deciding them
    grad_clip: float = 1.0  # global gradient norm
    log_every_steps: int = 100  # a row of the history, with accuracy on validation
    # hardware
    workers: int | str = "auto"  # runs at once, a thread each; auto = all cores, with CUDA 1
    scan: str = "auto"  # the DNC's recurrence: auto | eager | fused
    data_dir: str = "data/"  # what generate writes
    save_dir: str = "checkpoints/"  # what train writes
    plot_dir: str = "plots/"  # what compare and plot write

    # derived
    task_list = property(lambda self: words(self.tasks))
    arm_list = property(lambda self: words(self.arms))
    seed_list = property(lambda self: numbers("seeds", self.seeds, int))
    length_list = property(lambda self: sorted(numbers("lengths", self.lengths, int)))
    rates = property(lambda self: numbers("lr_grid", self.lr_grid, float))

    def __post_init__(self) -> None:
        check_types(self)
        w, lengths, heads = self.window, self.length_list, self.num_heads
        trained = specs("train", self.train)
        check_values(self, (
            ("window symbols mqar_symbols alphabet kinds items pairs train_rows valid_rows "
             "hidden_size num_layers num_heads mlp_width mem_slots mem_width num_reads knn_width "
             "knn_top_k edm_slots edm_base_steps steps mqar_steps batch_tokens "
             "adam_lr grad_clip log_every_steps",
             lambda x: x > 0, "above 0"),
            ("lambda_gate lambda_closing", lambda x: x >= 0, "0 or more"),
            ("test_rows", lambda x: x >= 2, "2 or more, to swap memories between rows"),
            ("data_seed", lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
            ("curriculum lr_warmup lr_decay", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("tasks", lambda _: set(self.task_list) <= set(TASKS) and self.task_list,
             "a comma-separated choice of " + ", ".join(TASKS)),
            ("arms", lambda _: set(self.arm_list) <= set(ARMS) and self.arm_list,
             "a comma-separated choice of " + ", ".join(ARMS)),
            ("seeds", lambda _: all(0 <= s < 2**32 for s in self.seed_list), "0 or more"),
            ("lr_grid", lambda _: all(rate > 0 for rate in self.rates), "above 0"),
            ("window", lambda x: x % 8 == 0 and x > 8, "a multiple of 8, and at least 16"),
            ("alphabet", lambda x: x <= 32_000, "at most 32000"),
            ("hidden_size", lambda x: x % heads == 0, f"divisible by num_heads ({heads})"),
            ("lengths", lambda _: all(x % w == 0 and x >= w for x in lengths),
             f"multiples of window ({w}), at least {w}, the minimum of every task"),
            ("lengths", lambda _: max(lengths) <= 32_000, "at most 32000"),
            ("train", lambda _: all(x % w == 0 and w <= x <= 32_000 and items >= 0
                                    for x, items in trained),
             f"multiples of window ({w}), from {w} to 32000, each with :items or without"),
            ("mqar_symbols", lambda x: 2 * self.pairs <= x <= 32_000 and x % 2 == 0,
             f"even, at least twice pairs ({self.pairs}), at most 32000"),
            ("symbols", lambda x: max(self.items, w) <= x <= 32_000,
             f"from {max(self.items, w)} to 32000: those of a pattern differ"),
            ("kinds", lambda x: x <= 1000, "at most 1000"),
            ("pairs", lambda x: x <= w, f"at most window ({w}): that many fit its quiz part"),
            ("items", lambda x: x <= w * 3 // 4, f"at most three quarters of window ({w})"),
            ("scan", ("auto", "eager", "fused").__contains__, "auto, eager or fused"),
            ("workers", lambda x: x == "auto" or type(x) is int and x > 0, "auto, or above 0")))
        for name in ("mqar_train", "mqar_test"):
            for length, count in specs(name, getattr(self, name)):
                require(length % w == 0 and 0 < 4 * count <= length <= 32_000
                        and 2 * count <= self.mqar_symbols, name, f"{length}:{count}",
                        f"a multiple of window ({w}) with room for the pairs (two tokens each) and "
                        "the questions, length >= 4 * pairs, and mqar_symbols >= 2 * pairs")
        for task in self.task_list if "full" in self.arm_list else ():
            require(lengths[0] <= longest(self, task), "lengths", self.lengths, "with one of at "
                    f"most {longest(self, task)}, where the positions of full end in {task}; or "
                    "leave full out of --arms")

        for task in self.task_list if "edm" in self.arm_list else ():
            shortest = min(length for length, _ in train_groups(self, task))
            require(shortest <= 2 * w, "mqar_train" if task == "mqar" else "train", shortest,
                    f"at most {2 * w} in one group, two windows, to train the trunk of edm on; or "
                    "leave edm out of --arms")

# What --full changes: every task, every seed, Zoology's 8,192 symbols and number of rows.
FULL = dict(
    tasks="copy,associative_recall,mqar,repeat_copy,brackets,repeats,random", seeds="0,1,2,3,4",
    arms="window,knn_store,dnc,edm,full",
    mqar_symbols=8192, pairs=32, mqar_train="64:4,128:8,256:16,256:32,256:64", train_rows=20_000,
    mqar_test="64:4,64:8,64:16,128:32,256:64,512:128,1024:256", test_rows=50, steps=1100,
    mqar_steps=2000, lr_grid="0.01,0.02", data_dir="data/full/", save_dir="checkpoints/full/",
    plot_dir="plots/full/")

def words(text: str) -> list[str]:
    """ "a, b" -> ["a", "b"]."""
    return list(dict.fromkeys(text.replace(" ", "").split(","))) if text.strip() else []

def numbers(field: str, text: str, kind: type) -> list:
    """ "1,2" -> [1, 2]. Raises ValueError naming the field."""
    try:
        found = [kind(word) for word in words(text)]
    except ValueError:
        found = []
    require(bool(found) and all(map(math.isfinite, found)), field, text,
            "a comma-separated list of " + ("numbers" if kind is float else "whole numbers"))
    return found

def specs(field: str, text: str) -> list[tuple[int, int]]:
    """ "64:4,128" -> [(64, 4), (128, 0)]: lengths and items. Raises ValueError naming the field."""
    try:
        pairs = [(word if ":" in word else word + ":0").split(":") for word in words(text)]
        found = [(int(length), int(items)) for length, items in pairs]
    except ValueError:
        found = []
    require(bool(found), field, text, "lengths, each with :items or without, as in 64:4,128:8")
    return found

# ══ Tasks ════════════════════════════════════════════════════════════════════════════════════════
# Tokens below FIRST are the same in every task. Filler is random, so that it is no blank: a memory
# that stores it fills up.
FILLERS = 16
START, RECALL, ITEM, QUERY, END, LAST, COUNT, CLOSE = range(16, 24)
ONCE = 24  # the answer "once" of repeats; then twice, three and four times
FIRST = 32  # the first symbol

class Rows(NamedTuple):
    """Rows of one task and one length; int16, as they are on disk."""
    inputs: np.ndarray  # (n, L) tokens
    at: np.ndarray  # (n, Q) scored positions, rising
    answers: np.ndarray  # (n, Q) what should be predicted there
    source: np.ndarray  # (n, Q) where the last token stands that the answer needs; -1 nowhere

def vocabulary(task: str, config: Config) -> int:
    """V of a task: fillers and markers, then its symbols."""
    sizes = {"mqar": config.mqar_symbols, "brackets": 2 * config.kinds, "repeats": config.alphabet,
             "random": config.alphabet}
    return FIRST + sizes.get(task, config.symbols)

def spans(length: int, config: Config) -> tuple[int, int, int]:
    """Start of the quiz part, size of the study part, size of the quiz part. In rows of one block
    they are its halves, else the first block and the last."""
    w = config.window
    return (w // 2, w // 2, w // 2) if length == w else (length - w, w, w)

def put(inputs, start, tokens) -> np.ndarray:
    """Write tokens (n, k) into inputs (n, L) from column start (n,) on; returns the columns."""
    columns = start[:, None] + np.arange(tokens.shape[1])  # (n, k)
    np.put_along_axis(inputs, columns, tokens, axis=1)
    return columns

def blank(rng, n: int, length: int) -> np.ndarray:
    return rng.integers(0, FILLERS, (n, length))  # (n, L)

def distinct(rng, n: int, count: int, high: int) -> np.ndarray:
    """(n, count) numbers below high, none twice in a row."""
    return np.stack([rng.choice(high, count, replace=False) for _ in range(n)])

def copy(rng, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """A pattern, filler, the pattern again; each symbol is predicted from the one before it. It has
    `items` symbols, at most three quarters of what its part of the row holds, none twice: the
    symbol before decides what follows.

        inputs   START a b c . . . . . RECALL a b c . .
        answers                        a      b c        scored at RECALL, a, b
    """
    quiz, study_size, quiz_size = spans(length, config)
    count = min(items or config.items, study_size * 3 // 4)
    inputs = blank(rng, n, length)
    pattern = FIRST + distinct(rng, n, count, config.symbols)
    first = rng.integers(0, study_size - count, n)  # the block holds marker and pattern whole
    again = quiz + rng.integers(0, quiz_size - count, n)
    put(inputs, first, np.full((n, 1), START))
    source = put(inputs, first + 1, pattern)
    put(inputs, again, np.full((n, 1), RECALL))
    return Rows(inputs, put(inputs, again + 1, pattern) - 1, pattern, source)

def repeat_copy(rng, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """A pattern of items / 2 symbols and up to three copies, each in a block of its own, so that
    not even the copy before is within the window. departs from NTM: the number of copies is shown
    by the markers, not asked for; within a window it could be counted.

        inputs   START a b . . RECALL a b . . RECALL a b . .
        answers                a      b       a      b       scored at RECALL, a of each copy
    """
    quiz, study_size, quiz_size = spans(length, config)
    blocks = length // config.window
    count = min(items or config.items // 2 or 1, study_size * 3 // 8)
    copies = max(1, min(3, blocks - 1))
    inputs = blank(rng, n, length)
    pattern = FIRST + distinct(rng, n, count, config.symbols)
    first = rng.integers(0, study_size - count, n)
    put(inputs, first, np.full((n, 1), START))
    source, at, before = put(inputs, first + 1, pattern), [], []
    for i in range(1, copies + 1):
        block = quiz if i == copies else round((blocks - 1) * i / copies) * config.window
        again = block + rng.integers(0, quiz_size - count, n)
        put(inputs, again, np.full((n, 1), RECALL))
        before.append(source)
        source = put(inputs, again + 1, pattern)
        at.append(source - 1)
    at, before = np.concatenate(at, axis=1), np.concatenate(before, axis=1)  # (n, copies * count)
    return Rows(inputs, at, np.tile(pattern, copies), before)

def associative_recall(rng, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """Items of three symbols, none twice; each question is an item, its answer the item that
    followed it. Three questions a row (one in rows of one block), about pairs of items that do not
    overlap, so that no answer has been shown before in the quiz part.

        inputs   ITEM a b c ITEM d e f . . . QUERY a b c d e f .
        answers                                        d e f     scored at c, d, e
    """
    quiz, study_size, quiz_size = spans(length, config)
    count = min(max(3, items or study_size), study_size // 4)
    questions = min((count - 1) // 2, quiz_size // 7)
    require(questions > 0, "window", config.window, "at least 32 for associative_recall")
    inputs = blank(rng, n, length)
    drawn = FIRST + distinct(rng, n, 3 * count, config.symbols).reshape(n, count, 3)
    shown = np.concatenate([np.full((n, count, 1), ITEM), drawn], axis=2)  # (n, count, 4)
    inputs[:, : 4 * count] = shown.reshape(n, -1)
    pairs_of = distinct(rng, n, questions, (count - 1) // 2)
    asked = 2 * pairs_of + rng.integers(0, 2, (n, 1))  # (n, questions) items; (0, 1) or (1, 2), …
    rows, steps, at, source = np.arange(n)[:, None], np.arange(3), [], []
    start = quiz + rng.integers(0, quiz_size - 7 * questions + 1, n)
    for i in range(questions):
        question, answer = drawn[rows[:, 0], asked[:, i]], drawn[rows[:, 0], asked[:, i] + 1]
        marker = np.full((n, 1), QUERY)
        columns = put(inputs, start + 7 * i, np.concatenate([marker, question, answer], axis=1))
        at.append(columns[:, 3:6])
        source.append(4 * (asked[:, i : i + 1] + 1) + 1 + steps)  # (n, 3)
    at, source = np.concatenate(at, axis=1), np.concatenate(source, axis=1)  # (n, 3 * questions)
    return Rows(inputs, at, inputs[rows, source], source)

def mqar(rng, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """Multi-query associative recall (Zoology, Arora et al. 2023, arXiv 2312.04927): key-value
    pairs, then every key once; keys and values are halves of the symbols. With `items` the
    questions lie anywhere behind the pairs, uniformly; without, in the last block (from five blocks
    on in the last two), and there are `config.pairs`, fewer in shorter rows. A pair starts at an
    even position: no block divides it. departs from Zoology: uniform distances, not a power law;
    what is neither pair nor question is filler of 16 tokens, not one blank token.

        inputs   k v l w m x . . l . k . . m        answers at l: w, at k: v, at m: x
    """
    w, blocks = config.window, length // config.window
    room = w // 8 if blocks == 1 else w // 4 if blocks == 2 else w // 2 * ((blocks - 1) // 2)
    count = items or min(config.pairs, room, w)
    start = 2 * count if items else spans(length, config)[0] - w * (blocks > 4)
    half = config.mqar_symbols // 2
    inputs = blank(rng, n, length)
    keys, values = distinct(rng, n, count, half), distinct(rng, n, count, half) + half
    inputs[:, : 2 * count] = np.stack([keys, values], axis=2).reshape(n, -1) + FIRST
    order = rng.permuted(np.tile(np.arange(count), (n, 1)), axis=1)
    at = start + np.sort(distinct(rng, n, count, length - start), axis=1)
    np.put_along_axis(inputs, at, np.take_along_axis(keys, order, axis=1) + FIRST, axis=1)
    return Rows(inputs, at, np.take_along_axis(values, order, axis=1) + FIRST, 2 * order + 1)

def repeats(rng, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """Some elements, each one to four times, in any order; which came last, how often was each?
    LAST is asked first, when no element has been shown again; answers are never shown.

        inputs   a b a c a b END . . . LAST b COUNT c COUNT a COUNT
        answers                        b      2       1       3
    """
    quiz, study_size, quiz_size = spans(length, config)
    count = min((study_size - 1) // 4, (quiz_size - 1) // 2, items or 6, 6, config.alphabet)
    inputs = blank(rng, n, length)
    elements = distinct(rng, n, count, config.alphabet) + FIRST
    often = rng.integers(1, 5, (n, count))
    at, answers, source = (np.zeros((n, count + 1), dtype=int) for _ in range(3))
    start = quiz + rng.integers(0, quiz_size - 2 * count, n)
    for row in range(n):
        shown = rng.permutation(np.repeat(elements[row], often[row]))
        begin = rng.integers(0, study_size - len(shown))
        inputs[row, begin : begin + len(shown)] = shown
        inputs[row, begin + len(shown)] = END
        order = rng.permutation(count)
        last = {token: begin + i for i, token in enumerate(shown)}
        inputs[row, start[row]] = LAST
        inputs[row, start[row] + 1 :][: 2 * count] = np.stack(
            [elements[row, order], np.full(count, COUNT)], axis=1).ravel()
        at[row] = start[row] + 2 * np.arange(count + 1)
        answers[row] = [shown[-1], *(ONCE - 1 + often[row, order])]
        source[row] = [begin + len(shown) - 1, *(last[token] for token in elements[row, order])]
    return Rows(inputs, at, answers, source)

def brackets(rng, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """Dyck-k: a word that leaves eight brackets open (at most two pairs closed on the way, depth at
    most ten, length at most half a block), filler, and the eight closing brackets, innermost first.

        inputs   START ( [ ] { . . . . CLOSE } ) .
        answers                        }     )       scored at CLOSE, }
    """
    quiz, study_size, quiz_size = spans(length, config)
    count = min(items or 8, 8, study_size // 2, quiz_size - 1)
    inner = min(2, (study_size - 1 - count) // 2)
    inputs = blank(rng, n, length)
    at, answers, source = (np.zeros((n, count), dtype=int) for _ in range(3))
    start = quiz + rng.integers(0, quiz_size - count, n)
    for row in range(n):
        walk = [1] * count  # +1 opens, -1 closes
        for _ in range(inner):
            where = rng.integers(0, len(walk) + 1)
            walk[where:where] = [1, -1]
        begin, stack = rng.integers(0, study_size - len(walk)), []
        inputs[row, begin] = START
        for place, step in enumerate(walk, begin + 1):
            if step > 0:
                stack.append((int(rng.integers(config.kinds)), place))
            kind = stack[-1][0] if step > 0 else stack.pop()[0] + config.kinds
            inputs[row, place] = FIRST + kind
        answers[row] = [FIRST + config.kinds + kind for kind, _ in reversed(stack)]
        source[row] = [place for _, place in reversed(stack)]
        inputs[row, start[row] :][: count + 1] = [CLOSE, *answers[row]]
        at[row] = start[row] + np.arange(count)
    return Rows(inputs, at, answers, source)

def random(rng, n: int, length: int, config: Config, items: int = 0) -> Rows:
    """Random tokens, the control on which nothing may help: the next token in the last half block.

        inputs   d a c c b a d b        answers at the third last: a, d, b
    """
    inputs = rng.integers(FIRST, FIRST + config.alphabet, (n, length + 1))
    at = np.tile(np.arange(length - config.window // 2, length), (n, 1))
    return Rows(inputs[:, :-1], at, np.take_along_axis(inputs, at + 1, axis=1), at * 0 - 1)

TASKS = {task.__name__: task for task in (
    copy, associative_recall, mqar, repeat_copy, brackets, repeats, random)}

def train_groups(config: Config, task: str) -> list[tuple[int, int]]:
    """(length, items) of the training groups of a task; items 0 is as many as the task has."""
    return specs("mqar_train", config.mqar_train) if task == "mqar" else specs(
        "train", config.train)

def longest(config: Config, task: str) -> int:
    """Tokens of the longest training row of a task."""
    return max(length for length, _ in train_groups(config, task))

def context_free(train: list[dict], test: dict, symbols: int) -> tuple[float, float]:
    """Accuracy and loss (nats) on a test group of the best predictor that knows no context: the
    frequencies of the answers in training to each kind of question, that is by the marker at which
    it is asked, if one, else in common. One is added to the count of each of V symbols."""
    counts = {}
    for group in train:
        asked = group["inputs"].gather(1, group["at"].long()).clamp_max(FIRST)
        for kind in asked.unique().tolist():
            found = torch.bincount(group["answers"][asked == kind].long(), minlength=symbols)
            counts[kind] = counts.get(kind, 0) + found
    asked = test["inputs"].gather(1, test["at"].long()).clamp_max(FIRST)
    right = loss = 0.0
    for kind in asked.unique().tolist():
        answers = test["answers"][asked == kind].long()
        seen = counts.get(kind, torch.zeros(symbols, dtype=torch.long))
        right += (answers == seen.argmax()).sum().item()
        p = (seen + 1) / (seen.sum() + symbols)
        loss -= p[answers].log().sum().item()
    return right / asked.numel(), loss / asked.numel()

# ══ Data on disk ═════════════════════════════════════════════════════════════════════════════════
SHAPING = ("window", "symbols", "mqar_symbols", "alphabet", "kinds", "items", "pairs", "data_seed")
FIELDS = {"train": (*SHAPING, "train", "mqar_train", "train_rows", "valid_rows"),
          "test": (*SHAPING, "train", "mqar_train", "train_rows", "lengths", "mqar_test",
                   "test_rows")}

def data_fields(config: Config, part: str) -> dict:
    """The fields that the data of a part, train (with validation) or test, depend on."""
    return {name: getattr(config, name) for name in FIELDS[part]}

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

def make_group(task: str, split: str, length: int, items: int, rows: int, config: Config) -> dict:
    """One group of rows as tensors; its seed is of data_seed, task, split, length and items."""
    place = [config.data_seed, [*TASKS].index(task), ("train", "valid", "test").index(split)]
    rng = np.random.default_rng([*place, length, items])
    made = TASKS[task](rng, rows, length, config, items)
    tensors = {name: torch.from_numpy(x.astype(np.int16)) for name, x in made._asdict().items()}
    return {"split": split, "length": length, "items": items} | tensors

def save(payload: dict, path: Path) -> None:
    """torch.save under a temporary name, then renamed. Raises ValueError when it cannot be."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({error}); free some space, then run the same "
                         "command again: what is finished is kept") from None

def load(path: Path, missing: str) -> dict:
    """torch.load of plain values. Raises ValueError for a file that is missing or damaged."""
    require(path.is_file(), "file", str(path), f"there; {missing}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises a dozen kinds on what it did not write
        raise ValueError(f"{path}: truncated or not written by long_range.py; delete it, then "
                         f"{missing}") from None

def data_path(config: Config, task: str, part: str) -> Path:
    return Path(config.data_dir) / f"long_range_{task}_{part}.pt"

@functools.lru_cache(maxsize=4)
def load_data(config: Config, task: str, part: str) -> tuple[list[dict], str]:
    """Groups of one part of a task's data, and their sha256. Raises ValueError when they are
    missing, of another configuration, or not what their hash says."""
    path = data_path(config, task, part)
    found = load(path, f"run: python long_range.py generate --tasks {task}")
    require(isinstance(found, dict) and {"fields", "sha256", "groups"} <= found.keys(), "file",
            str(path), "data of long_range.py; delete it and generate again")
    for name, value in data_fields(config, part).items():
        if (saved := found["fields"].get(name)) != value:
            raise ValueError(f"{path}: was generated with {name} = {saved!r}, this run has "
                             f"{value!r}; set --{name} {saved}, or generate again")
    actual = content_hash(found["groups"])
    if actual != found["sha256"]:
        raise ValueError(f"{path}: its rows have sha256 {actual[:16]}…, generated were "
                         f"{found['sha256'][:16]}…: altered; delete it and generate again")
    return found["groups"], actual

def generate(config: Config) -> None:
    """Write the data of every task that is not on disk yet as this configuration wants it."""
    check_folder(config, "data_dir", 200)
    for task in config.task_list:
        for part in FIELDS:
            path = data_path(config, task, part)
            try:
                groups, digest = load_data(config, task, part)
                print(f"  kept     {path}, sha256 {digest[:12]}")
                continue
            except ValueError as error:
                if path.exists() and "was generated with" not in str(error):
                    raise
            verb = "replaced" if path.exists() else "wrote"
            groups = train_part(config, task) if part == "train" else test_part(config, task)
            fields, digest = data_fields(config, part), content_hash(groups)
            save({"fields": fields, "sha256": digest, "groups": groups}, path)
            rows = sum(len(group["inputs"]) for group in groups)
            print(f"  {verb:<8} {path}, {rows:,} rows, sha256 {digest[:12]}", flush=True)

def train_part(config: Config, task: str) -> list[dict]:
    """Training and validation groups of a task."""
    rows = config.train_rows
    return [make_group(task, split, length, items, count, config)
            for split in ("train", "valid") for i, (length, items) in
            enumerate(train_groups(config, task))
            for count in [config.valid_rows if split == "valid" else rows if i else 5 * rows]]

def test_part(config: Config, task: str) -> list[dict]:
    """Test groups of a task, with the distance to the answers (mean and least, in windows) and the
    accuracy and loss of chance, and the share of questions in the block of their answer."""
    train = [group for group in load_data(config, task, "train")[0] if group["split"] == "train"]
    cells = [(length, 0) for length in config.length_list]
    cells += specs("mqar_test", config.mqar_test) if task == "mqar" else []
    groups = []
    for length, items in cells:
        group = make_group(task, "test", length, items, config.test_rows, config)
        chance, chance_loss = context_free(train, group, vocabulary(task, config))
        gap = (group["at"] - group["source"]).double() / config.window  # (n, Q)
        gap = gap * 0 + max(0.5, length / config.window - 1) if task == "random" else gap
        within = group["at"] // config.window == group["source"] // config.window
        groups.append(group | {"chance": chance, "chance_loss": chance_loss,
                               "distance": gap.mean().item(), "least": gap.min().item(),
                               "within": within.double().mean().item()})
    return groups

# ══ Model: one trunk, and behind it nothing, a key-value store or a DNC ══════════════════════════
class KNNState(NamedTuple):
    """What knn_store keeps of every token so far; it grows. One row a sequence."""
    keys: torch.Tensor  # (B, n, D) of norm one
    values: torch.Tensor  # (B, n, C) hidden states

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
        self.top_k, self.width = top_k, width
        self.norm = nn.LayerNorm(hidden_size)
        self.query, self.key = nn.Linear(hidden_size, width), nn.Linear(hidden_size, width)
        self.log_strength = nn.Parameter(torch.tensor(math.log(8.0)))
        self.read_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.read_proj.weight)

    def init_state(self, batch_size: int) -> KNNState:
        weight = self.read_proj.weight
        return KNNState(weight.new_zeros(batch_size, 0, self.width),
                        weight.new_zeros(batch_size, 0, len(weight)))

    def forward(self, h: torch.Tensor, state: KNNState) -> tuple[torch.Tensor, KNNState, KNNTrace]:
        """h (B, T, C), state of n tokens -> h_out (B, T, C), state of n + T tokens, trace."""
        z, (B, T, _), n = self.norm(h), h.shape, state.keys.shape[1]
        query = F.normalize(self.query(z), dim=-1, eps=1e-6)  # (B, T, D)
        keys = torch.cat([state.keys, F.normalize(self.key(z), dim=-1, eps=1e-6)], 1)
        values = torch.cat([state.values, z], dim=1)  # (B, n+T, C)
        scores = self.log_strength.exp() * (query @ keys.transpose(1, 2))  # (B, T, n+T)
        earlier = torch.ones(T, n + T, dtype=torch.bool, device=h.device).tril(n - 1)
        scores = scores.masked_fill(~earlier, -torch.inf)
        kth = scores.topk(min(self.top_k, n + T), dim=-1).values[..., -1:]  # (B, T, 1)
        scores = scores.masked_fill(scores < kth, -torch.inf)
        first = torch.arange(T, device=h.device).unsqueeze(1) + n == 0  # (T, 1), nothing is stored
        weights = scores.masked_fill(first, 0.0).softmax(-1).masked_fill(first, 0.0)
        slots = torch.arange(n, n + T, device=h.device).expand(B, T)
        trace = KNNTrace(torch.ones_like(slots, dtype=h.dtype), slots)
        return h + self.read_proj(weights @ values), KNNState(keys, values), trace

class LongRangeModel(nn.Module):
    """GPT2Model over blocks, then a memory or none, then an output map and the head tied to the
    embedding. Every arm is this class, built from the same seed."""

    def __init__(self, config: Config, task: str, arm: str, seed: int, mlp_width: int):
        from transformers import GPT2Config, GPT2Model
        super().__init__()
        self.arm, C = arm, config.hidden_size
        self.block = longest(config, task) if arm == "full" else config.window
        self.segment = longest(config, task)  # tokens between which a memory is carried
        positions = 2 * self.block if arm == "edm" else self.block
        self.controller = GPT2Model(GPT2Config(
            vocab_size=vocabulary(task, config), n_positions=positions, n_embd=C,
            n_layer=config.num_layers, n_head=config.num_heads, n_inner=mlp_width, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None,
            activation_function="gelu_pytorch_tanh"))  # GPT-2's function in one fused call
        self.output = nn.Linear(C, C, bias=False)
        # Random codes of about norm 4 for the symbols, waves for the positions: "the token before"
        # is then a linear map, where from GPT-2's 0.02 both codes would first have to be learned.
        # A generator for each parameter: other widths must not shift the weights that arms share.
        for i, (name, weight) in enumerate(self.named_parameters()):
            if weight.dim() == 2:
                std = 0.5 if "wte" in name else 0.02 / math.sqrt(
                    2 * config.num_layers if "c_proj" in name else 1)
                own = torch.Generator().manual_seed(1000 * seed + i)
                weight.data.normal_(0, std, generator=own)
        self.controller.wpe.weight.data = 0.5 * waves(positions, C)
        torch.manual_seed(seed)
        self.memory = None
        if arm == "knn_store":
            self.memory = KNNStore(C, config.knn_width, config.knn_top_k)
        elif arm == "edm":
            self.memory = EDM(C, config.num_heads, C // config.num_heads, config.edm_slots,
                              config.knn_top_k, segment=config.window,
                              bptt_segments=self.segment // config.window)
        elif arm == "dnc":
            strength = config.strength_bias
            biases = {"write_strength": strength, "read_strengths": strength,
                      "write_gate": config.write_bias, "free_gates": config.free_bias,
                      "allocation_gate": config.allocation_bias}
            self.memory = DNCMemory(C, config.mem_slots, config.mem_width, config.num_reads,
                                    DNCOptions(config.use_links), config.scan, biases)

    def init_state(self, rows: int, slots: int = 0):
        """The empty memory of so many rows; of a DNC with at least so many slots. In training a
        notebook has as many slots as its rows have tokens: none is ever evicted."""
        if self.arm == "edm":
            return self.memory.init_state(rows, self.segment if self.training else 0)
        if self.arm == "dnc":
            state = self.memory.init_state(rows)
            more = max(0, slots - self.memory.slots)
            pads = {"memory": (0, 0, 0, more), "link": (0, more, 0, more)}
            return state if not more else type(state)(*(
                x if 0 in x.shape else F.pad(x, pads.get(name, (0, more)))
                for name, x in state._asdict().items()))
        return None if self.memory is None else self.memory.init_state(rows)

    def hidden(self, tokens: torch.Tensor, state):
        """tokens (B, L), L at most one block or a multiple of it -> (B, L, C), state, trace."""
        B, L = tokens.shape
        blocks = tokens.reshape(-1, min(self.block, L))  # (B * blocks, block)
        if self.arm == "edm" and state is None:  # the trunk sees two windows at once
            blocks = tokens.reshape(-1, min(2 * self.block, L))
        elif self.arm == "edm":
            # Read before the last transformer block. Attention is cut to a window; the positions of
            # all but a row's first are those of the trunk's second.
            trunk, *layers = self.controller, *self.controller.h
            place = state.seen.unsqueeze(1) + torch.arange(L, device=tokens.device)  # (B, L)
            place = place % self.block + self.block * (place >= self.block)
            h = trunk.wte(blocks) + trunk.wpe(place.reshape(blocks.shape))
            for layer in layers[:-1]:
                h = layer(h)
            h, state, trace = self.memory(h.reshape(B, L, -1), state)
            h = layers[-1](h.reshape(*blocks.shape, -1))
            return trunk.ln_f(h).reshape(B, L, -1), state, trace
        h = self.controller(input_ids=blocks).last_hidden_state.reshape(B, L, -1)  # (B, L, C)
        return (h, None, None) if state is None else self.memory(h, state)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """h (M, C) of the scored positions -> (M, V)."""
        return self.output(h) @ self.controller.wte.weight.T

def waves(positions: int, width: int) -> torch.Tensor:
    """Sines and cosines of each position (Vaswani et al. 2017): (positions, width)."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angles = torch.arange(positions).unsqueeze(1) * rates  # (positions, width / 2, rounded up)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]

@functools.lru_cache(maxsize=64)
def mlp_widths(config: Config, task: str) -> dict[str, int]:
    """Feed-forward width of every arm: all have about as many parameters as the largest."""
    sizes = {arm: count_parameters(LongRangeModel(config, task, arm, 0, config.mlp_width))
             for arm in ARMS}
    unit = config.num_layers * (2 * config.hidden_size + 1)  # parameters of one more
    return {arm: config.mlp_width + round((max(sizes.values()) - size) / unit)
            for arm, size in sizes.items()}

def build_model(config: Config, task: str, arm: str, seed: int) -> LongRangeModel:
    return LongRangeModel(config, task, arm, seed, mlp_widths(config, task)[arm]).to(device())

def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ══ Training ═════════════════════════════════════════════════════════════════════════════════════
class Job(NamedTuple):
    """One run: its checkpoint's name says all of it."""
    task: str
    arm: str
    seed: int
    lr: float

    def path(self, config: Config) -> Path:
        name = f"long_range_{self.task}_{self.arm}_seed{self.seed}_lr{self.lr:g}.pt"
        return Path(config.save_dir) / name

# May differ between a checkpoint and the run that reads it.
FREE_FIELDS = {"tasks", "arms", "seeds", "lengths", "mqar_test", "test_rows", "lr_grid", "workers",
               "scan", "data_dir", "save_dir", "plot_dir", "log_every_steps"}

OWN_FIELDS = {  # of no other arm, and without influence on the number of parameters
    "edm": {"edm_slots", "edm_base_steps"},
    "dnc": {"mem_slots", "strength_bias", "free_bias", "write_bias", "allocation_bias",
            "lambda_gate", "lambda_closing"}}

def load_checkpoint(config: Config, job: Job) -> dict:
    """A finished run. Raises ValueError when it is missing, damaged, or of other fields or data."""
    path = job.path(config)
    found = load(path, "run: python long_range.py train, with the same fields")
    require(isinstance(found, dict)
            and {"job", "config", "data", "model_state_dict"} <= found.keys(),
            "checkpoint", str(path), "of long_range.py; delete it, or set another save_dir")
    free = FREE_FIELDS | {"steps" if job.task == "mqar" else "mqar_steps"}
    free |= set().union(*(names for arm, names in OWN_FIELDS.items() if arm != job.arm))
    for name, value in dataclasses.asdict(config).items():
        if name not in free and (saved := found["config"].get(name)) != value:
            raise ValueError(f"checkpoint {path}: was trained with {name} = {saved!r}, this run "
                             f"has {value!r}; set --{name} {saved}, or another --save_dir")
    digest = load_data(config, job.task, "train")[1]
    require(found["job"] == job._asdict(), "checkpoint", str(path), f"of {job}; it was renamed")
    require(found["data"] == digest, "checkpoint", str(path), f"trained on these data (sha256 "
            f"{digest[:12]}, not {found['data'][:12]}); delete it, or set another --save_dir")
    return found

def optimizers(model: LongRangeModel, config: Config, lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices, AdamW on embeddings, biases and norms. With AdamW alone nothing was
    learned in ten times the steps: docs/lab-notes.md."""
    tables = {id(model.controller.wte.weight), id(model.controller.wpe.weight)}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() == 2 and id(p) not in tables]
    others = [p for p in trained if p.dim() != 2 or id(p) in tables]
    # Of an EDM alone gate, strengths and norm are left: its gate has to open from zero.
    share = config.adam_lr if model.controller.wte.weight.requires_grad else 0.5
    return [torch.optim.Muon(matrices, lr=lr, momentum=0.9, weight_decay=0.0),
            torch.optim.AdamW(others, lr=lr * share, betas=(0.9, 0.99), weight_decay=0.0)]

def rate_share(step: int, steps: int, config: Config) -> float:
    """Share of the peak rate at a step. Down to zero: the size of Muon's steps does not shrink with
    the gradient, so that what is left of the rate is left as noise."""
    return min(1.0, (step + 1) / max(config.lr_warmup * steps, 1e-9),
               (1 - step / steps) / max(config.lr_decay, 1e-9))

def batches(groups: list[dict], config: Config, steps: int, seed: int):
    """For each step a group and the rows of it: the same for every arm. The first group alone for
    the first share of the steps, then all in equal parts; each group's rows in a random order."""
    rng = np.random.default_rng(seed)
    queues = [np.empty(0, dtype=int) for _ in groups]
    for step in range(steps):
        i = 0 if step < config.curriculum * steps else rng.integers(len(groups))
        count = max(1, config.batch_tokens // groups[i]["length"])
        while len(queues[i]) < count:
            queues[i] = np.concatenate([queues[i], rng.permutation(len(groups[i]["inputs"]))])
        rows, queues[i] = np.split(queues[i], [count])
        yield groups[i], torch.from_numpy(rows)

def train_trunk(model: LongRangeModel, train: list[dict], config: Config, job: Job) -> None:
    """The base of an EDM, trained without memory and then frozen: on rows of at most two windows,
    with attention over both. Every second step has the study part of another row: where the base
    finds nothing it then says so, and not because the row looks longer, which would go on when a
    memory has the answer."""
    w, steps = config.window, config.edm_base_steps
    inside = [group for group in train if group["length"] <= 2 * w]
    both = optimizers(model, config, job.lr)
    for step, (group, rows) in enumerate(batches(inside, config, steps, job.seed)):
        study = min(w, group["length"] // 2)
        if step % 2 and step > steps // 2 and group["at"].min() >= study:
            tokens = group["inputs"][rows]
            tokens[:, :study] = tokens[:, :study].roll(1, 0)
            taken = {name: group[name][rows] for name in ("at", "answers")}
            group, rows = group | taken | {"inputs": tokens}, slice(None)
        train_step(model, both, group, rows, rate_share(step, steps, config), config)
    model.controller.requires_grad_(False)
    model.output.requires_grad_(False)
    model.memory.start_from(model.controller.h[-1])

def gate_cost(g: torch.Tensor, late: float, closing: float) -> torch.Tensor:
    """Mean cost of write gates g, late (0 to 1) in training; docs/lab-notes.md, 5. Short rows never
    punish what writing a little at each filler does to long ones. First -log(1 - g), times closing:
    its slope in the gate's input is g, so that it closes gates which stand wide open, too, unless
    recall needs them. In the end g (1 - g), of being undecided: small gates with large vectors
    evade a cost of the gate, and the slots so written count as free. The one gives way to the
    other, which holds up whatever is above a half."""
    early = -closing * torch.log((1 - g).clamp_min(1e-7))
    return (late * g * (1 - g) + (1 - late) * early).mean()

def train_step(model: LongRangeModel, both: list, group: dict, rows: torch.Tensor, rate: float,
               config: Config, carried: bool = False, late: float = 0.0) -> float:
    """One step on these rows of a group, at a share of the peak rate, with memory if `carried`;
    returns the loss of the scored tokens. late: 0 to 1, for the cost of the DNC's gates."""
    for optimizer in both:
        for param_group in optimizer.param_groups:
            param_group["lr"] = param_group.setdefault("peak", param_group["lr"]) * rate
    tokens, at, answers = (group[name][rows].long().to(device())
                           for name in ("inputs", "at", "answers"))  # (B, L), (B, Q), (B, Q)
    h, _, trace = model.hidden(tokens, model.init_state(len(tokens)) if carried else None)
    picked = h.gather(1, at.unsqueeze(2).expand(-1, -1, h.shape[2]))  # (B, Q, C)
    loss = F.cross_entropy(model.logits(picked.flatten(0, 1)), answers.flatten())
    found = loss.item()
    if not loss.requires_grad:  # of a frozen trunk, in a row of one block: nothing could be read
        return found
    if carried and model.arm == "dnc":  # late: before recall is learned it closes gates for good
        cost = gate_cost(trace.write_gate, late, config.lambda_closing)
        loss = loss + config.lambda_gate * late * cost
    for optimizer in both:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), config.grad_clip)
    for optimizer in both:
        optimizer.step()
    return found

def train_run(config: Config, job: Job) -> str:
    """Train one arm on one task from one seed and save it; returns a line about it."""
    groups, digest = load_data(config, job.task, "train")
    train = [group for group in groups if group["split"] == "train"]
    valid = [group for group in groups if group["split"] == "valid"]
    model = build_model(config, job.task, job.arm, job.seed)
    history, losses, began = [], [], time.time()
    if job.arm == "edm":
        train_trunk(model, train, config, job)
    both = optimizers(model, config, job.lr)
    steps = config.mqar_steps if job.task == "mqar" else config.steps
    for step, (group, rows) in enumerate(batches(train, config, steps, job.seed)):
        losses.append(train_step(
            model, both, group, rows, rate_share(step, steps, config), config, True,
            max(0.0, 2 * step / steps - 1)))
        if (step + 1) % config.log_every_steps == 0 or step + 1 == steps:
            found = [score(model, group, config) for group in valid]
            history.append({"step": step + 1, "loss": sum(losses) / len(losses)} | {
                k: sum(f[k] for f in found) / len(found) for k in ("accuracy", "val_loss")})
            losses.clear()
    seconds, last = time.time() - began, history[-1]
    if not math.isfinite(last["val_loss"]):
        raise ValueError(f"{job}: its loss is not finite; lower rates in --lr_grid help")
    rows = sum(len(group["inputs"]) for group in train)
    seen = steps * config.batch_tokens / sum(group["inputs"].numel() for group in train)
    save({"job": job._asdict(), "config": dataclasses.asdict(config), "data": digest,
          "model_state_dict": model.state_dict(), "global_step": steps, "epoch": seen,
          "val_accuracy": last["accuracy"], "val_loss": last["val_loss"],
          "val_ppl": math.exp(min(700, last["val_loss"])), "history": history, "seconds": seconds,
          "rows": rows}, job.path(config))
    return (f"{job.task:<18} {job.arm:<9} seed {job.seed} lr {job.lr:<5g} {seconds:5.0f} s, "
            f"validation: accuracy {last['accuracy']:7.2%}, loss {last['val_loss']:.3f}")

def set_up_worker() -> None:
    """One thread a run: the result does not depend on how many run at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)

def run_all(function, config: Config, jobs: list, what: str) -> list:
    """function(config, job) of every job, several at once; prints the lines that come back."""
    from tqdm import tqdm
    workers = config.workers if config.workers != "auto" else (
        1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)) if hasattr(
            os, "sched_getaffinity") else os.cpu_count() or 1)
    results = {}
    pool = concurrent.futures.ProcessPoolExecutor(
        max(1, min(workers, len(jobs))), multiprocessing.get_context("spawn"), set_up_worker)
    with tqdm(total=len(jobs), desc=what, dynamic_ncols=True, disable=not jobs) as bar:
        try:
            running = {pool.submit(function, config, job): job for job in jobs}
            for done in concurrent.futures.as_completed(running):
                results[running[done]] = done.result()
                bar.update()
                if isinstance(results[running[done]], str):
                    bar.write(f"  {results[running[done]]}", file=sys.stdout)
        except BaseException:
            for process in (pool._processes or {}).values():  # else they finish their runs first
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return [results[job] for job in jobs]

def first_jobs(config: Config) -> list[Job]:
    """The runs that choose the learning rates: every rate, at the first seed."""
    return [Job(task, arm, config.seed_list[0], lr) for task in config.task_list
            for arm in config.arm_list for lr in config.rates]

def chosen_jobs(config: Config) -> list[Job]:
    """The runs that are compared: of each task and arm the rate of least validation loss. Not of
    best accuracy, which two rates that have learned a task share but for a question or two."""
    chosen = []
    for task in config.task_list:
        for arm in config.arm_list:
            found = {}
            for job in first_jobs(config):
                if (job.task, job.arm) == (task, arm):
                    payload = load_checkpoint(config, job)
                    found[payload["val_loss"], job.lr] = job.lr
            chosen += [Job(task, arm, seed, found[min(found)]) for seed in config.seed_list]
    return chosen

def train(config: Config) -> None:
    """Train what is not on disk yet: first every rate at the first seed, then the other seeds."""
    check_folder(config, "save_dir", 64)
    require(hasattr(torch.optim, "Muon"), "torch", torch.__version__, "2.9 or newer for its Muon "
            "optimizer: pip install 'torch>=2.9,<=2.13.0'")
    for task in config.task_list:  # what cannot run is said before hours of training
        load_data(config, task, "train")
        model = build_model(config, task, "dnc", 0)
        if "dnc" in config.arm_list:
            most = max([0, *(pairs for _, pairs in specs("mqar_test", config.mqar_test))])
            for slots in (0, 2 * most if task == "mqar" else 0):
                pick_scan(config.scan, model.init_state(1, slots), model.memory.options)
    for what in (first_jobs, chosen_jobs):
        jobs = what(config)
        missing = [job for job in jobs if not job.path(config).exists()]
        for job in set(jobs) - set(missing):
            load_checkpoint(config, job)
        if len(missing) < len(jobs):
            print(f"  {len(jobs) - len(missing)} of {len(jobs)} runs are finished in "
                  f"{config.save_dir}")
        # The slowest first, so that no core waits for a last long run.
        missing.sort(key=lambda job: (job.arm != "dnc", job.arm != "knn_store"))
        run_all(train_run, config, missing, "train")

# ══ Evaluation ═══════════════════════════════════════════════════════════════════════════════════
EVAL_TOKENS = 4096  # at once

@torch.no_grad()
def score(model: LongRangeModel, group: dict, config: Config, swap: bool = False) -> dict:
    """Accuracy and val_loss of a group of rows (NaN where nothing is asked), memory carried from
    segment to segment, with tokens_per_s. With `swap` each row meets the last window with the
    memory of the row before it; only that window is scored then."""
    L, w = group["length"], config.window
    # The full arm sees the row whole.
    cuts = sorted({*range(0, L - w, model.segment), max(0, L - w), L}) if model.block == w else [
        0, L]
    slots = 2 * group["items"] if group["split"] == "test" else 0
    right = loss = count = 0
    began = time.perf_counter()
    rows_at_once = torch.arange(len(group["inputs"])).split(
        max(2, EVAL_TOKENS // min(L, model.segment)))
    if len(rows_at_once) > 1 and len(rows_at_once[-1]) == 1:  # a row alone cannot be swapped
        rows_at_once = (*rows_at_once[:-2], torch.cat(rows_at_once[-2:]))
    for rows in rows_at_once:
        tokens, at, answers = (group[name][rows].long().to(device())
                               for name in ("inputs", "at", "answers"))
        state = model.init_state(len(rows), slots)
        for start, end in zip(cuts, cuts[1:], strict=False):
            if swap and end == L:
                state = map_state(lambda tensor: tensor.roll(1, 0), state)
            h, state, _ = model.hidden(tokens[:, start:end], state)
            row, question = ((at >= start) & (at < end)).nonzero(as_tuple=True)
            if len(row) and (end == L or not swap):
                logits = model.logits(h[row, at[row, question] - start])  # (M, V)
                target = answers[row, question]
                loss += F.cross_entropy(logits, target, reduction="sum").item()
                right += (logits.argmax(-1) == target).sum().item()
                count += len(row)
    seconds = time.perf_counter() - began
    carried = 0 if state is None else sum(x.numel() * x.element_size() for x in state) // len(rows)
    count = count or math.nan
    return {"accuracy": right / count, "val_loss": loss / count, "memory_bytes": carried,
            "tokens_per_s": group["inputs"].numel() / seconds}

def measure_run(config: Config, job: Job) -> list[dict]:
    """The rows of plots/long_range.json of one run: every test group that its arm can read."""
    payload = load_checkpoint(config, job)
    model = build_model(config, job.task, job.arm, job.seed)
    model.load_state_dict(payload["model_state_dict"])
    model.eval()
    rows, parameters = [], count_parameters(model)
    groups = [group for group in load_data(config, job.task, "test")[0]
              if job.arm != "full" or group["length"] <= model.block]  # its positions end there
    for group in groups[:1]:
        score(model, group, config)  # compiles what is compiled: not to be timed
    for group in groups:
        L, swapped = group["length"], math.nan
        found = score(model, group, config)
        if model.memory is not None and L > config.window:
            swapped = score(model, group, config, swap=True)["accuracy"]
        context = 2 * config.num_layers * config.hidden_size * 4 * min(L, model.block)
        rows.append({
            "task": job.task, "arm": job.arm, "seed": job.seed, "length": L, "distance_windows":
            round(group["distance"], 3), "accuracy": found["accuracy"], "loss": found["val_loss"],
            "chance": group["chance"], "parameters": parameters,
            "tokens_per_s": round(found["tokens_per_s"]), "chance_loss": group["chance_loss"],
            "least_distance_windows": round(group["least"], 3), "items": group["items"],
            "questions": group["at"].shape[1], "within_block": group["within"], "lr": job.lr,
            "swapped_accuracy": None if math.isnan(swapped) else swapped,
            "val_accuracy": payload["val_accuracy"], "memory_bytes": found["memory_bytes"],
            "attention_bytes": context, "train_seconds": round(payload["seconds"], 1)})
    return rows

def measure(config: Config) -> list[dict]:
    """Rows of every compared run: those of plots/long_range.json that are of these very weights and
    test data, the others evaluated now. The file then holds them all; it is written after every
    task, so that a run which is stopped goes on."""
    check_folder(config, "plot_dir")
    path, found = Path(config.plot_dir) / "long_range.json", {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        found = {run["id"]: run["rows"] for run in runs}
    ids, jobs = {}, chosen_jobs(config)
    for job in jobs:
        stamp = hashlib.sha256(job.path(config).read_bytes())
        stamp.update(load_data(config, job.task, "test")[1].encode())
        stamp.update(f"{device_name()} {torch.__version__} {config.scan}".encode())
        ids[job] = stamp.hexdigest()
    about = {"config": dataclasses.asdict(config), "torch": torch.__version__,
             "device": device_name(), "confidence": "95 %, Student's t over seeds"}
    for task in config.task_list:
        missing = [job for job in jobs if job.task == task and ids[job] not in found]
        missing.sort(key=lambda job: (job.arm != "dnc", job.arm != "knn_store"))
        measured = run_all(measure_run, config, missing, f"evaluate {task}")
        found |= {ids[job]: rows for job, rows in zip(missing, measured, strict=True)}
        kept = [{"id": ids[job], "rows": found[ids[job]]} for job in jobs if ids[job] in found]
        rows = [row for run in kept for row in run["rows"]]
        text = json.dumps({"about": about, "rows": rows, "runs": kept}, indent=1)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    print(f"wrote {path}")
    return rows

def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, one thread a run"

# ══ Comparison and plot ══════════════════════════════════════════════════════════════════════════
CELL = 10

def effective_context(rows: list[tuple[float, float, float]]) -> str:
    """The distance (windows) at which accuracy falls half-way from 100 % to chance, interpolated in
    its logarithm, from (distance, accuracy, chance) of rising distance; "< d" or "> d" where it has
    fallen at the least or never falls; "—" where nothing is known."""
    share = [(accuracy - chance) / max(1e-9, 1 - chance) for _, accuracy, chance in rows]
    if not share:
        return "—"
    if share[0] <= 0.5:
        return f"< {rows[0][0]:.3g}"
    for i in range(1, len(share)):
        if share[i] <= 0.5:
            way = (share[i - 1] - 0.5) / (share[i - 1] - share[i])
            near, far = math.log(rows[i - 1][0]), math.log(rows[i][0])
            return f"{math.exp(near + way * (far - near)):.3g}"
    return f"> {rows[-1][0]:.3g}"

def percent(values: list[float | None]) -> str:
    """One cell: mean ± half of the interval, in per cent; an em dash where nothing is known."""
    values = [x for x in values if x is not None and math.isfinite(x)]
    if not values:
        return f"{'—':>{CELL}}"
    mean, half = mean_and_half(values)
    text = f"{100 * mean:.1f}" + ("" if math.isnan(half) else f"±{min(99.9, 100 * half):.1f}")
    return f"{text:>{CELL}}"

def cells_of(rows: list[dict], **fields) -> list[dict]:
    """Those of rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]

def print_rows(rows: list[dict], config: Config) -> None:
    """Accuracy by length, one column an arm, and for a memory one with another row's."""
    columns = [(arm, key) for arm in config.arm_list for key in ("accuracy", "swapped_accuracy")
               if key == "accuracy" or arm in MEMORY_ARMS]
    heads = [arm if key == "accuracy" else "swapped" for arm, key in columns]
    print(f"  {'length':>6}{'dist.':>7}{'asked':>6}" + "".join(
        f"{head:>{CELL}}" for head in (*heads, "chance")))
    for length, items in sorted({(row["length"], row["items"]) for row in rows}):
        cell = cells_of(rows, length=length, items=items)
        values = [percent([row[key] for row in cells_of(cell, arm=arm)]) for arm, key in columns]
        print(f"  {length:>6}{cell[0]['distance_windows']:>7.1f}{cell[0]['questions']:>6}"
              + "".join(values) + percent([cell[0]["chance"]]))

def print_task(task: str, rows: list[dict], config: Config) -> None:
    """One task: accuracy by length and distance, every arm, chance, memory swapped."""
    print(f"\n{RULE}\n  {task} — accuracy on scored tokens in %, by length and distance\n{RULE}")
    mine = cells_of(rows, task=task, items=0)
    print_rows(mine, config)
    most = max(row["questions"] for row in mine)  # distances are compared at equal load
    for arm in config.arm_list:
        found = cells_of(mine, arm=arm)
        cells = [cells_of(found, length=x)
                 for x in sorted({row["length"] for row in found if row["questions"] == most})]
        reach = effective_context([
            (cell[0]["distance_windows"], mean_and_half([row["accuracy"] for row in cell])[0],
             cell[0]["chance"]) for cell in cells])
        print(f"  {arm:<10} effective context {reach:>6} windows; learning rate "
              f"{found[0]['lr']:g} of {', '.join(f'{rate:g}' for rate in config.rates)}")
    if zoology := [row for row in cells_of(rows, task=task) if row["items"]]:
        print("\n  As Zoology tests: as many questions as pairs, anywhere behind the pairs; the\n"
              "  DNC has at least twice as many slots. Questions in the block of their answer: "
              + ", ".join(f"{a}:{b} {share:.0%}" for a, b, share in sorted(
                  {(r["length"], r["items"], r["within_block"]) for r in zoology}) if share))
        print_rows(zoology, config)

def print_costs(rows: list[dict], config: Config) -> None:
    """What each arm costs by length: tokens a second, and what a row has to keep."""
    rows = cells_of(rows, items=0)
    print(f"\n{RULE}\n  Cost by length: evaluation tokens/s; KiB that a row keeps\n{RULE}")
    print(f"  {'length':>6}" + "".join(f"{arm:>14}" + f"{'KiB':>9}" for arm in config.arm_list))
    for length in sorted({row["length"] for row in rows}):
        cells = [cells_of(rows, arm=arm, length=length) for arm in config.arm_list]
        print(f"  {length:>6}" + "".join(
            f"{np.median([row['tokens_per_s'] for row in cell]):>14,.0f}{kept(cell[0]):>9,.1f}"
            if cell else f"{'—':>14}{'—':>9}" for cell in cells))

def kept(row: dict) -> float:
    """KiB that a row of that length keeps: keys and values of attention, and the memory."""
    return (row["attention_bytes"] + row["memory_bytes"]) / 1024

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
    colors = ("#4fc3f7", "#aed581", "#ff8a65", "#fff176", "#ce93d8")
    widths = (1.5, 5.5, 3.5, 2.0, 1.0)  # what lies below stays visible where curves coincide
    styles = dict(zip(ARMS, zip(colors, widths, strict=True), strict=True))
    tasks = config.task_list
    size = (3.6 * (len(tasks) + 1), 7)
    with dark_figure(path, 2, len(tasks) + 1, size, squeeze=False) as (figure, axes):
        for column, task in enumerate(tasks):
            mine = cells_of(rows, task=task, items=0)
            for axis, key in zip(axes[:, column], ("accuracy", "loss"), strict=True):
                for arm in config.arm_list:
                    draw(axis, cells_of(mine, arm=arm), key, styles[arm], arm)
                flat = sorted({(row["length"], row["chance" if key == "accuracy" else
                                                    "chance_loss"]) for row in mine})
                axis.plot(*zip(*flat, strict=True), color="white", ls=":", lw=1, label="chance")
                axis.axvline(longest(config, task), color="gray", lw=0.8, ls="--")
                label_lengths(axis, [length for length, _ in flat])
            axes[0, column].set(title=task, ylim=(-0.03, 1.03))
            axes[1, column].set(ylim=(0, 1.05 * axes[1, column].get_ylim()[1]))
        axes[0, 0].set(ylabel="accuracy on scored tokens")
        axes[1, 0].set(ylabel="loss (nats / scored token)")
        axes[0, 0].legend(fontsize=8)
        costs = [row | {"kept": kept(row)} for row in cells_of(rows, task=tasks[0], items=0)]
        for axis, key, label in ((axes[0, -1], "tokens_per_s", "evaluation tokens/s"),
                                 (axes[1, -1], "kept", "KiB that a row keeps")):
            for arm in config.arm_list:
                draw(axis, cells_of(costs, arm=arm), key, styles[arm], arm)
            axis.set(yscale="log", title=label)
            label_lengths(axis, sorted({row["length"] for row in costs}))
        figure.suptitle(f"Trained up to the dashed line, window {config.window}, "
                        f"{len(config.seed_list)} seed(s); band: 95 % over seeds", fontsize=11)

def label_lengths(axis, lengths: list[int]) -> None:
    """A logarithmic axis of lengths, with the lengths themselves as its ticks."""
    axis.set_xscale("log", base=2)
    axis.set_xticks([], minor=True)
    crowded = [b < 1.2 * a for a, b in zip([1, *lengths], lengths, strict=False)]
    names = ["" if near else str(length) for near, length in zip(crowded, lengths, strict=True)]
    axis.set_xticks(lengths, names, fontsize=7, rotation=45)
    axis.set_xlabel("length, tokens")
    axis.grid(alpha=0.2)

def draw(axis, rows: list[dict], key: str, style: tuple[str, float], label: str) -> None:
    """Mean over seeds against length, with its interval where there is one."""
    color, width = style
    lengths = sorted({row["length"] for row in rows})
    stats = [mean_and_half([row[key] for row in cells_of(rows, length=x)]) for x in lengths]
    means = np.array([mean for mean, _ in stats])
    halves = np.nan_to_num(np.array([half for _, half in stats]))
    axis.plot(lengths, means, color=color, marker="o", ms=width + 2, lw=width, label=label)
    axis.fill_between(lengths, means - halves, means + halves, color=color, alpha=0.2, lw=0)

# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
def print_banner(config: Config, full: bool) -> None:
    """Print what is run, and what is left out of it."""
    import transformers
    left_out = [task for task in TASKS if task not in config.task_list]
    print(f"{RULE}\n  long_range: at which distance does each memory stop remembering?\n{RULE}\n"
          f"  tasks     {', '.join(config.task_list)}\n"
          f"  arms      {', '.join(config.arm_list)}; seeds {config.seeds}; "
          f"learning rates {config.lr_grid}\n"
          f"  lengths   tested at {config.lengths}; window {config.window}\n"
          f"  device    {device_name()}, float32\n"
          f"  versions  Python {platform.python_version()}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    if not full:
        print(f"  reduced   {config.steps} steps a run, mqar {config.mqar_steps}; {config.pairs} "
              f"pairs of {config.mqar_symbols:,} symbols;\n"
              f"            without {', '.join(left_out) or 'nothing'}\n"
              f"            --full: all tasks, five seeds, {FULL['steps']:,} steps, mqar "
              f"{FULL['mqar_steps']:,} with {FULL['pairs']} of {FULL['mqar_symbols']:,}")
    fields = [f"{key}={value}" for key, value in dataclasses.asdict(config).items()]
    print(textwrap.fill(" ".join(fields), 96, initial_indent="  config    ",
                        subsequent_indent=" " * 12, break_long_words=False))
    for task in config.task_list:
        sizes = {arm: count_parameters(build_model(config, task, arm, 0))
                 for arm in config.arm_list}
        print(f"  {task:<18} parameters (feed-forward width): " + ", ".join(
            f"{arm} {size:,} ({mlp_widths(config, task)[arm]})" for arm, size in sizes.items()))
        require(max(sizes.values()) <= 1.02 * min(sizes.values()), "mlp_width", config.mlp_width,
                "such that the arms' parameters match within 2 %; a larger one does")

def run(config: Config, commands: tuple[str, ...], full: bool) -> None:
    """The parts asked for, in order."""
    print_banner(config, full)
    for command in commands:
        if command in ("generate", "train"):
            print(f"\n{command}", flush=True)
        {"generate": generate, "train": train, "compare": compare, "plot": plot}[command](config)

def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 2 a user's mistake, 130 or 143 stopped by a signal."""
    if {"-h", "--help"} & set(argv):
        print_help(Config, __doc__, FULL, "default and (--full)")
        print("\n  tasks: " + ", ".join(TASKS))
        return 0

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        commands = (argv[0],) if argv[:1] and not argv[0].startswith("-") else COMMANDS
        require(set(commands) <= set(COMMANDS), "command", commands[0],
                "one of " + ", ".join(COMMANDS))
        rest = argv[len(commands) == 1:]
        full = "--full" in rest
        overrides = parse_overrides(Config, [word for word in rest if word != "--full"])
        torch.set_num_threads(1)
        run(Config(**{**(FULL if full else {}), **overrides}), commands, full)
    except KeyboardInterrupt as stopped:
        number = int(str(stopped) or signal.SIGINT)
        print("\nstopped; finished runs are kept. The same command goes on:\n"
              "  python long_range.py " + shlex.join(argv), file=sys.stderr)
        return 128 + number
    except (ValueError, OSError, MemoryError, concurrent.futures.BrokenExecutor,
            torch.cuda.OutOfMemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))
