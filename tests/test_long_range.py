"""Tests of long_range.py: the answers of every task found again from the tokens alone, the data on
disk, the key-value store against a naive loop, what each arm can see, evaluation against models
whose results are known, the statistics, and the command on runs of a few steps.

B rows, L tokens of a row, T tokens of a segment, C hidden width, D width of keys, V vocabulary,
Q questions of a row, N memory slots, n stored tokens, w window.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, error_line, flags
from torch.testing import assert_close

import long_range as lr

# Every field that a test relies on, so that other defaults change no test. Three steps a run,
# four of mqar.
TINY = {
    "tasks": "copy,mqar", "arms": "window,knn_store,dnc,full", "seeds": "0",
    "lengths": "32,64,96", "window": 32, "symbols": 64, "mqar_symbols": 64, "alphabet": 16,
    "kinds": 4, "items": 6, "pairs": 8, "train": "64:3,64,32", "mqar_train": "64:4,32:2",
    "mqar_test": "64:4,96:12", "train_rows": 32, "valid_rows": 8, "test_rows": 6, "data_seed": 0,
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 32, "mem_slots": 16,
    "mem_width": 16, "num_reads": 1, "use_links": False, "knn_width": 16, "knn_top_k": 4,
    "steps": 3, "mqar_steps": 4, "batch_tokens": 256, "curriculum": 0.35, "lr_grid": "0.01",
    "log_every_steps": 2, "workers": 1, "scan": "eager"}
ARMS = ("window", "knn_store", "dnc", "full")
SHAPES = [(32, 32), (32, 64), (32, 96), (32, 160), (32, 288), (64, 64), (64, 192), (64, 320)]
every_shape = pytest.mark.parametrize("w, L", SHAPES)
few_and_all = pytest.mark.parametrize("items", [0, 3])
every_task = pytest.mark.parametrize("task", list(lr.TASKS))


@pytest.fixture(autouse=True)
def forget_data():
    """Files change under one process here, which the cache of load_data does not look for."""
    lr.load_data.cache_clear()
    yield
    lr.load_data.cache_clear()


def tiny(**fields) -> lr.Config:
    return lr.Config(**{**TINY, **fields})


def folders_in(folder: Path) -> dict[str, str]:
    """The three folders of a run, as fields."""
    return {f"{name}_dir": str(folder / name) for name in ("data", "save", "plot")}


# ══ Tasks: the answers from the tokens alone ═════════════════════════════════════════════════════
def large(w: int, **fields) -> lr.Config:
    """A Config for generators: enough items, pairs and kinds to fill what a row holds."""
    sizes = {"window": w, "lengths": str(w), "train": str(w), "mqar_train": f"{w}:2",
             "mqar_test": f"{w}:2", "items": 24, "pairs": 16}
    return tiny(**{**sizes, **fields})


def group_of(task: str, split: str, L: int, items: int, rows: int, config: lr.Config) -> dict:
    return lr.make_group(task=task, split=split, length=L, items=items, rows=rows, config=config)


def rows_of_task(task: str, L: int, config: lr.Config, rows: int = 24, items: int = 0) -> lr.Rows:
    """Rows as they go to disk, as int64 arrays; items 0 is as many as the task has."""
    group = group_of(task, "train", L, items, rows, config)
    return lr.Rows(*(group[name].numpy().astype(int) for name in lr.Rows._fields))


def symbols_from(tokens, start: int) -> list[int]:
    """The symbols that stand one after the other from `start` on."""
    return list(itertools.takewhile(lambda token: token >= lr.FIRST, tokens[start:].tolist()))


def places(tokens, marker: int) -> list[int]:
    return np.flatnonzero(tokens == marker).tolist()


def only(tokens, marker: int) -> int:
    """Where the marker stands, once."""
    place, = places(tokens, marker)
    return place


def study_size(w: int, L: int) -> int:
    return w // 2 if L == w else w


def quiz_start(w: int, L: int) -> int:
    return w // 2 if L == w else L - w


def mqar_start(w: int, L: int) -> int:
    """Where the questions of mqar without items begin: from five blocks on a block earlier."""
    return quiz_start(w, L) - (w if L > 4 * w else 0)


@few_and_all
@every_shape
@every_task
def test_task_rows_are_well_formed(task, w, L, items):
    config = large(w)
    rows = rows_of_task(task, L, config, items=items)
    assert rows.inputs.shape == (24, L) and rows.at.shape == rows.source.shape
    assert (np.diff(rows.at, axis=1) > 0).all() and (rows.source < rows.at).all()
    for tokens in (rows.inputs, rows.answers):
        assert tokens.min() >= 0 and tokens.max() < lr.vocabulary(task, config)

    is_zoology = task == "mqar" and items > 0
    if task != "random":
        assert (rows.source >= 0).all()
        if L > w and not is_zoology:
            assert (rows.source // w < rows.at // w).all()
    if task != "repeat_copy" and not is_zoology:  # their quiz is longer
        quiz = mqar_start(w, L) if task == "mqar" else quiz_start(w, L)
        assert (rows.at >= quiz).all()
    if task in ("copy", "brackets", "repeats", "associative_recall"):  # studied in the first block
        assert (rows.source < study_size(w, L)).all()


# sha256 of the training data of TINY, as every version has generated them.
DIGESTS = {"copy": "fda14b939342", "associative_recall": "57f58cdc609f", "mqar": "d1264260e04d",
           "repeat_copy": "70a2623f03c9", "brackets": "3700f4fe9d14", "repeats": "42a510e4ffbb",
           "random": "a1d952d4a719"}


@every_task
def test_task_rows_are_of_their_seed_in_every_version(task):
    """And their hash is the same in every process, whatever the order of a group's keys."""
    groups = lr.train_part(tiny(), task)
    for same in (groups, [dict(reversed(group.items())) for group in groups]):
        assert lr.content_hash(same).startswith(DIGESTS[task])
    assert lr.content_hash(lr.train_part(tiny(data_seed=1), task)) != lr.content_hash(groups)
    rows = groups[0]["inputs"].numpy()
    assert len({row.tobytes() for row in rows}) == len(rows)


@every_task
def test_task_largest_vocabulary_fits_int16(task):
    largest = large(32, symbols=lr.MOST, mqar_symbols=lr.MOST, kinds=1000, alphabet=lr.MOST)
    assert lr.vocabulary(task, largest) <= 2**15
    rows = rows_of_task(task, 64, largest, rows=200)
    assert 0 <= rows.inputs.min() and 0 <= rows.answers.min()  # nothing has wrapped around


@few_and_all
@every_shape
def test_copy_answers_are_the_pattern(w, L, items):
    config = large(w)
    rows = rows_of_task("copy", L, config, items=items)
    count = min(items or config.items, study_size(w, L) * 3 // 4)
    for tokens, at, answers, source in zip(*rows, strict=True):
        start, recall = only(tokens, lr.START), only(tokens, lr.RECALL)
        pattern = symbols_from(tokens, start + 1)
        assert len(pattern) == count
        assert symbols_from(tokens, recall + 1) == pattern == answers.tolist()
        assert at.tolist() == list(range(recall, recall + count))
        assert source.tolist() == list(range(start + 1, start + 1 + count))
        assert start // w == (start + count) // w == 0 and recall // w == (L - 1) // w
        rest = np.delete(tokens, np.r_[start : start + count + 1, recall : recall + count + 1])
        assert rest.max() < lr.FILLERS


@few_and_all
@every_shape
def test_repeat_copy_answers_are_the_pattern_in_every_copy(w, L, items):
    config = large(w)
    rows = rows_of_task("repeat_copy", L, config, items=items)
    copies = max(1, min(3, L // w - 1))
    count = min(items or config.items // 2, study_size(w, L) * 3 // 8)
    for tokens, at, answers, source in zip(*rows, strict=True):
        begins = [only(tokens, lr.START), *places(tokens, lr.RECALL)]
        pattern = symbols_from(tokens, begins[0] + 1)
        assert len(begins) == 1 + copies and len(pattern) == count
        assert [symbols_from(tokens, begin + 1) for begin in begins] == [pattern] * len(begins)
        assert answers.tolist() == pattern * copies
        assert at.tolist() == [begin + i for begin in begins[1:] for i in range(count)]
        assert source.tolist() == [begin + 1 + i for begin in begins[:-1] for i in range(count)]

        blocks = [begin // w for begin in begins]
        assert blocks == [(begin + count) // w for begin in begins]  # none is divided
        assert blocks[-1] == (L - 1) // w
        assert L == w or len(set(blocks)) == len(blocks)


@few_and_all
@every_shape
def test_associative_recall_answers_are_the_next_item(w, L, items):
    rows = rows_of_task("associative_recall", L, large(w), items=items)
    quiz, studied = quiz_start(w, L), items or study_size(w, L) // 4
    for tokens, at, answers, source in zip(*rows, strict=True):
        begins = [place + 1 for place in places(tokens, lr.ITEM)]
        shown = [tokens[begin : begin + 3].tolist() for begin in begins]
        assert len({tuple(item) for item in shown}) == len(shown) == studied
        queries = places(tokens, lr.QUERY)
        assert len(queries) == min((studied - 1) // 2, (L - quiz) // 7) > 0

        asked = []
        for i, query in enumerate(queries):
            k = shown.index(tokens[query + 1 : query + 4].tolist())
            asked += [k, k + 1]
            of_query = slice(3 * i, 3 * i + 3)
            assert at[of_query].tolist() == [query + 3, query + 4, query + 5]
            assert source[of_query].tolist() == [begins[k + 1] + j for j in range(3)]
            assert answers[of_query].tolist() == shown[k + 1]
            assert tokens[query + 4 : query + 7].tolist() == shown[k + 1]
            before = [tokens[j : j + 3].tolist() for j in range(quiz, query + 2)]
            assert shown[k + 1] not in before  # not before it is asked
        assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("w, L, pairs", [
    *((w, L, 0) for w, L in SHAPES), (32, 32, 8), (32, 64, 4), (32, 64, 16), (32, 160, 20),
    (64, 64, 16), (64, 320, 32)])
def test_mqar_answers_are_in_the_dictionary(w, L, pairs):
    config = large(w)
    rows = rows_of_task("mqar", L, config, items=pairs)
    values_from = lr.FIRST + config.mqar_symbols // 2
    for tokens, at, answers, source in zip(*rows, strict=True):
        value_of, place_of, i = {}, {}, 0
        while tokens[i] >= lr.FIRST and tokens[i + 1] >= values_from:
            value_of[tokens[i]] = tokens[i + 1]
            place_of[tokens[i]] = i + 1
            i += 2
        count = len(value_of)
        assert 2 * count == i and max(value_of) < values_from
        assert len(set(value_of.values())) == count
        if pairs or L > 3 * w:
            assert count == (pairs or config.pairs)
        assert 1 <= count <= (pairs or config.pairs)
        assert i <= (i if pairs else mqar_start(w, L)) <= at.min()

        asked = tokens[at]
        assert at.tolist() == [place for place in range(i, L) if tokens[place] >= lr.FIRST]
        assert sorted(asked) == sorted(value_of)  # every key once; no value is shown again
        assert answers.tolist() == [value_of[key] for key in asked]
        assert source.tolist() == [place_of[key] for key in asked]
        assert ((source - 1) // w == source // w).all()  # no block divides a pair


@pytest.mark.parametrize("w, L, blocks", [
    (32, 64, {1}), (32, 128, {3}), (32, 160, {3, 4}), (32, 288, {7, 8}), (64, 320, {3, 4})])
def test_mqar_without_pairs_asks_in_the_last_blocks(w, L, blocks):
    """Uniformly: of the 3200 questions about half are in each of two blocks, give or take six
    standard deviations."""
    rows = rows_of_task("mqar", L, large(w), rows=200)
    counts = Counter((rows.at // w).ravel().tolist())
    assert set(counts) == blocks
    assert len(blocks) == 1 or all(abs(count - 1600) < 170 for count in counts.values())


def test_mqar_with_pairs_asks_uniformly_behind_them():
    """Chi-square over the 56 positions, and over eighths of them for each pair alone; the bounds
    are passed by chance less than once in 10,000 seeds."""
    rows = rows_of_task("mqar", 64, large(32), rows=2500, items=4)
    counts = np.bincount(rows.at.ravel(), minlength=64)
    assert not counts[:8].any() and counts.sum() == 10_000
    expected = 10_000 / 56
    assert ((counts[8:] - expected) ** 2 / expected).sum() < 105
    for pair in range(4):
        at = rows.at[rows.source == 2 * pair + 1]  # (2500,)
        counts = np.bincount((at - 8) // 7, minlength=8)
        assert counts.sum() == 2500
        assert ((counts - 312.5) ** 2 / 312.5).sum() < 30


@few_and_all
@every_shape
def test_repeats_answers_are_counts_and_the_last(w, L, items):
    rows = rows_of_task("repeats", L, large(w), items=items)
    elements = min(items or 6, (study_size(w, L) - 1) // 4)
    quiz, often = quiz_start(w, L), set()
    for tokens, at, answers, source in zip(*rows, strict=True):
        end, last = only(tokens, lr.END), only(tokens, lr.LAST)
        begin = 1 + max(np.flatnonzero(tokens[:end] < lr.FIRST), default=-1)
        shown = tokens[begin:end].tolist()
        counts, asked = Counter(shown), symbols_from(tokens[last + 1 :: 2], 0)
        assert max(counts.values()) <= 4 and len(counts) == elements
        often |= set(counts.values())
        assert sorted(asked) == sorted(counts)  # each once
        assert at.tolist() == [last + 2 * i for i in range(len(asked) + 1)]
        assert set(tokens[at[1:]]) == {lr.COUNT}
        assert answers.tolist() == [shown[-1], *(lr.ONCE - 1 + counts[x] for x in asked)]

        place_of = {token: place for place, token in enumerate(shown, begin)}
        assert source.tolist() == [end - 1, *(place_of[x] for x in asked)]
        assert not set(tokens[quiz : last + 1]) & set(shown)  # when LAST is asked
        assert not ((tokens >= lr.ONCE) & (tokens < lr.FIRST)).any()  # counts are never shown
    assert often == {1, 2, 3, 4}


@few_and_all
@every_shape
def test_brackets_word_with_its_closers_is_balanced(w, L, items):
    config = large(w)
    kinds, count, deepest = config.kinds, items or 8, 0
    rows = rows_of_task("brackets", L, config, rows=40, items=items)
    for tokens, at, answers, source in zip(*rows, strict=True):
        start, close_at = only(tokens, lr.START), only(tokens, lr.CLOSE)
        word, left_open = symbols_from(tokens, start + 1), []
        for place, token in enumerate(word, start + 1):
            kind = token - lr.FIRST
            if kind < kinds:
                left_open.append((kind, place))
            else:
                assert left_open.pop()[0] == kind - kinds  # never a wrong one
            deepest = max(deepest, len(left_open))
        assert len(left_open) == count and len(word) <= min(w // 2, count + 4)

        innermost_first = left_open[::-1]
        assert answers.tolist() == [lr.FIRST + kinds + kind for kind, _ in innermost_first]
        assert source.tolist() == [place for _, place in innermost_first]
        assert at.tolist() == list(range(close_at, close_at + count))
        assert symbols_from(tokens, close_at + 1) == answers.tolist()
        assert (tokens >= lr.FIRST).sum() == len(word) + count
    assert count < deepest <= count + 2


@every_shape
def test_random_answers_are_the_next_tokens(w, L):
    config = large(w)
    rows = rows_of_task("random", L, config)
    assert (rows.at == np.arange(L - w // 2, L)).all() and (rows.source == -1).all()
    assert np.array_equal(rows.answers[:, :-1], rows.inputs[:, L - w // 2 + 1 :])
    assert rows.answers.min() >= lr.FIRST
    assert len(np.unique(rows.inputs)) == config.alphabet  # no filler, every symbol


def test_config_full_has_folders_of_its_own():
    """Else a run of --full would be refused for what a reduced one has left, or replace it."""
    full, reduced = lr.Config(**lr.FULL), lr.Config()
    for name in ("data_dir", "save_dir", "plot_dir"):
        assert getattr(full, name) != getattr(reduced, name)


# ══ Data on disk ═════════════════════════════════════════════════════════════════════════════════
@pytest.fixture
def copy_data(tmp_path) -> lr.Config:
    """The Config of copy's data, generated in tmp_path."""
    config = tiny(tasks="copy", data_dir=str(tmp_path))
    lr.generate(config)
    return config


def alter(path: Path, change: Callable[[dict], object], rehash: bool = False) -> None:
    """Change what a saved file holds, and if asked its hash with it."""
    payload = torch.load(path, weights_only=True)
    change(payload)
    if rehash:
        payload["sha256"] = lr.content_hash(payload["groups"])
    torch.save(payload, path)
    lr.load_data.cache_clear()


def test_data_hash_covers_every_row_and_number(copy_data):
    groups, digest = lr.load_data(copy_data, "copy", "test")
    assert lr.content_hash(lr.test_part(copy_data, "copy")) == digest
    for name in lr.Rows._fields:
        groups[-1][name][-1, -1] += 1
        assert lr.content_hash(groups) != digest
        groups[-1][name][-1, -1] -= 1
    for name in ("chance", "chance_loss", "distance", "least", "within"):
        changed = groups[-1] | {name: groups[-1][name] + 0.001}
        assert lr.content_hash([*groups[:-1], changed]) != digest
    assert lr.content_hash(groups) == digest


def test_data_distances_are_from_question_to_source(tmp_path):
    """In windows, the mean and the least; and the share asked in the block of its answer."""
    config, within = tiny(tasks="mqar", data_dir=str(tmp_path)), {}
    lr.generate(config)
    for group in lr.load_data(config, "mqar", "test")[0]:
        at, source = (group[name].flatten().tolist() for name in ("at", "source"))
        distances = [(a - s) / 32 for a, s in zip(at, source, strict=True)]
        together = [a // 32 == s // 32 for a, s in zip(at, source, strict=True)]
        assert group["distance"] == pytest.approx(sum(distances) / len(distances))
        assert group["least"] == pytest.approx(min(distances))
        assert group["within"] == pytest.approx(sum(together) / len(together))
        within[group["length"], group["items"]] = group["within"]
    assert within[32, 0] == 1 and within[64, 0] == within[96, 0] == 0
    assert 0 < within[64, 4] < 1 and 0 < within[96, 12] < 1


@every_task
def test_data_splits_share_no_row(task):
    config = tiny()
    groups = lr.train_part(config, task)
    for length, items in lr.train_groups(config, task):
        groups.append(group_of(task, "test", length, items, 20, config))
    split_of = {}
    for group in groups:
        for row in group["inputs"].numpy():
            assert split_of.setdefault(row.tobytes(), group["split"]) == group["split"]
    assert set(split_of.values()) == {"train", "valid", "test"}


def test_generate_keeps_data_of_these_fields_and_replaces_others(copy_data, tmp_path, capsys):
    before = files(tmp_path)
    capsys.readouterr()
    lr.load_data.cache_clear()
    lr.generate(copy_data)
    printed = capsys.readouterr().out
    assert printed.count("kept") == 2 and "wrote" not in printed
    assert files(tmp_path) == before and len(before) == 2

    other = dataclasses.replace(copy_data, items=5)
    lr.generate(other)
    printed = capsys.readouterr().out
    assert printed.count("replaced") == 2 and "wrote" not in printed and "kept" not in printed
    assert lr.load_data(other, "copy", "train")[0][1]["at"].shape[1] == 5


def test_data_altered_are_named_and_not_replaced_unasked(copy_data):
    path = lr.data_path(copy_data, "copy", "train")
    digest = lr.load_data(copy_data, "copy", "train")[1]
    alter(path, lambda payload: payload["groups"][1]["inputs"][3, 7].add_(1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"copy_train.* sha256 .*{digest[:12]}.*: altered"):
        lr.generate(copy_data)
    assert path.read_bytes() == before


def test_load_data_names_a_file_that_it_cannot_read(copy_data):
    path = lr.data_path(copy_data, "copy", "test")
    torch.save({"weights": torch.zeros(3)}, path)
    for _ in ("foreign", "missing"):
        lr.load_data.cache_clear()
        with pytest.raises(ValueError, match="long_range_copy_test.*generate --tasks copy"):
            lr.load_data(copy_data, "copy", "test")
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("name, value, part", [
    ("data_seed", 5, "train"), ("lengths", "32", "test"), ("train_rows", 33, "test")])
def test_load_data_names_the_field_that_differs(copy_data, name, value, part):
    other = dataclasses.replace(copy_data, **{name: value})
    with pytest.raises(ValueError, match=f"generated with {name} = .*--{name}"):
        lr.load_data(other, "copy", part)


def questions(group: dict) -> list[tuple[int, int]]:
    """(kind of question, answer) of every question: its marker, or FIRST at a symbol."""
    asked = []
    for tokens, at, answers in zip(group["inputs"].tolist(), group["at"].tolist(),
                                   group["answers"].tolist(), strict=True):
        asked += [(min(tokens[place], lr.FIRST), answer)
                  for place, answer in zip(at, answers, strict=True)]
    return asked


@pytest.mark.parametrize("task", ["repeats", "brackets", "copy", "mqar", "random"])
def test_context_free_equals_a_naive_count(task):
    config = tiny(alphabet=4, symbols=32, mqar_symbols=24)
    V = lr.vocabulary(task, config)
    train = [group_of(task, "train", L, 0, 60, config) for L in (64, 32)]
    test = group_of(task, "test", 96, 0, 30, config)
    counts: dict[int, Counter] = {}
    for group in train:
        for kind, answer in questions(group):
            counts.setdefault(kind, Counter())[answer] += 1

    fewest, most, losses = 0, 0, []
    for kind, answer in questions(test):
        seen = counts[kind]
        best = [symbol for symbol, count in seen.items() if count == max(seen.values())]
        fewest += best == [answer]
        most += answer in best
        losses.append(-math.log((seen[answer] + 1) / (sum(seen.values()) + V)))
    accuracy, loss = lr.context_free(train, test, V)
    total = len(losses)
    assert fewest / total <= accuracy <= most / total  # the same unless two are as frequent
    assert most - fewest < 0.1 * total
    assert loss == pytest.approx(sum(losses) / total, rel=1e-5)
    without_training = lr.context_free([], test, V)[1]
    assert without_training == pytest.approx(math.log(V), rel=1e-5)


# ══ KNNStore ═════════════════════════════════════════════════════════════════════════════════════
def random_store(C: int, D: int, top_k: int) -> lr.KNNStore:
    """A float64 store with every parameter away from its initial value."""
    torch.manual_seed(0)
    store = lr.KNNStore(C, D, top_k).double()
    with torch.no_grad():
        for parameter in store.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        store.log_strength.fill_(1.3)
    return store


def naive_read(store: lr.KNNStore, query, stored: list[tuple]):
    """What a query (D,) reads of stored (key, value) pairs; the nearest are found by sorting."""
    cosines = [(query @ key, value) for key, value in stored]
    nearest = sorted(cosines, key=lambda pair: -pair[0].item())[: store.top_k]
    total, read = 0.0, torch.zeros(len(store.norm.weight), dtype=query.dtype)
    for cosine, value in nearest:
        power = (store.log_strength.exp() * cosine).exp()
        total, read = total + power, read + power * value
    return read / total if stored else read


def naive_knn(store: lr.KNNStore, h, state):
    """h (B, T, C), state of n tokens -> h_out: a loop over rows and tokens, the tokens before each
    in a list."""
    outputs = []
    for row in range(len(h)):
        stored = list(zip(state.keys[row], state.values[row], strict=True))
        for x in h[row]:
            spread = ((x - x.mean()) ** 2).mean() + store.norm.eps
            z = (x - x.mean()) / spread.sqrt() * store.norm.weight + store.norm.bias  # (C,)
            query = store.query.weight @ z + store.query.bias  # (D,)
            key = store.key.weight @ z + store.key.bias
            read = naive_read(store, query / query.norm(), stored)
            outputs.append(x + store.read_proj.weight @ read)
            stored.append((key / key.norm(), z))
    return torch.stack(outputs).view_as(h)


@pytest.mark.parametrize("top_k", [1, 3, 50])
@pytest.mark.parametrize("B, T, n, C, D", [(2, 7, 0, 5, 3), (3, 4, 6, 3, 5), (1, 1, 0, 4, 2)])
def test_knn_store_equals_a_naive_loop(B, T, n, C, D, top_k):
    """Values, and the gradients of all that goes in, whatever stands in the other rows; the first
    token of an empty store reads nothing."""
    store = random_store(C, D, top_k)
    h = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    keys = F.normalize(torch.randn(B, n, D, dtype=torch.float64), dim=-1).requires_grad_()
    values = torch.randn(B, n, C, dtype=torch.float64, requires_grad=True)
    state = lr.KNNState(keys, values)
    actual, wanted = store(h, state)[0], naive_knn(store, h, state)
    assert_close(actual, wanted, atol=1e-12, rtol=1e-12)

    inputs = [h, keys, values, *store.parameters()]
    weight = torch.randn_like(actual)
    slopes = [torch.autograd.grad(output, inputs, weight, materialize_grads=True,
                                  allow_unused=True) for output in (actual, wanted)]
    for a, b in zip(*slopes, strict=True):
        assert torch.isfinite(a).all()
        assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("cuts", [(0, 1, 4, 11), (0, 7, 11)])
def test_knn_store_by_segments_equals_at_once(cuts):
    """And before it is trained it adds nothing."""
    store = random_store(5, 3, top_k=3)
    h = torch.randn(2, 11, 5, dtype=torch.float64)
    whole, after, trace = store(h, store.init_state(2))
    parts, state, slots = [], store.init_state(2), []
    for start, end in itertools.pairwise(cuts):
        out, state, part = store(h[:, start:end], state)
        parts.append(out)
        slots.append(part.write_slots)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, after)
    assert_close(state.keys.norm(dim=-1), torch.ones(2, 11, dtype=torch.float64))
    assert torch.equal(torch.cat(slots, 1), trace.write_slots)
    assert (trace.write_slots == torch.arange(11)).all() and (trace.write_gate == 1).all()
    untrained = lr.KNNStore(5, 3, 3).double()
    assert torch.equal(untrained(h, untrained.init_state(2))[0], h)


def test_knn_store_gradient_equals_finite_differences():
    store = random_store(4, 3, top_k=3)
    h = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: store(x, store.init_state(2))[0], (h,))


# ══ LongRangeModel ═══════════════════════════════════════════════════════════════════════════════
# Trained to 96 tokens, so that the full arm sees three blocks of the others.
WIDE = {"train": "96,32", "mqar_train": "96:4", "knn_top_k": 200}
TRAINED_TO = {"train": "64,96:3,32", "mqar_train": "32:2,64:4"}  # 96 tokens of copy, 64 of mqar


def tiny_model(arm: str, read: bool = True, **fields) -> lr.LongRangeModel:
    """A model whose memory, if `read`, adds what it reads: at first it adds nothing."""
    model = lr.build_model(tiny(**WIDE, **fields), "copy", arm, 0).eval()
    if read and model.memory is not None:
        torch.manual_seed(1)
        if arm == "edm":
            torch.nn.init.constant_(model.memory.alpha, 0.5)
        else:
            torch.nn.init.normal_(model.memory.read_proj.weight)
    return model


def random_tokens(B: int, L: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 96, (B, L), generator=draw).to(lr.device())


@torch.no_grad()
def hidden_change(model: lr.LongRangeModel, place: int) -> torch.Tensor:
    """How much one other token at `place` changes the hidden state of each of 96 tokens."""
    tokens = random_tokens(2, 96)
    other = tokens.clone()
    other[:, place] = (other[:, place] + 7) % 96
    out, changed = (model.hidden(x, model.init_state(2))[0] for x in (tokens, other))
    return (out - changed).abs().amax((0, 2))


@pytest.mark.parametrize("arm", ["window", "knn_store", "dnc", "pointing", "edm"])
def test_model_trunk_sees_its_block_alone(arm):
    model = tiny_model(arm, read=False)
    for place in (0, 40, 95):
        change = hidden_change(model, place)
        end = place // 32 * 32 + 32
        assert change[place] > 1e-3 and (change[place:end] > 1e-5).all()
        outside = torch.cat([change[:place], change[end:]])
        assert (outside < 1e-6).all()


@pytest.mark.parametrize("arm", ["knn_store", "dnc", "pointing", "edm", "full"])
def test_model_memory_or_long_attention_reaches_all_that_is_later_alone(arm):
    change = hidden_change(tiny_model(arm), 40)
    assert change[:40].max() < 1e-6 and change[64:].max() > 1e-4
    assert arm != "full" or (change[40:] > 1e-6).all()


@pytest.mark.parametrize("task, L", [("copy", 96), ("mqar", 64)])
@pytest.mark.parametrize("arm", lr.ARMS)
def test_model_segment_is_the_longest_row_of_its_task(arm, task, L):
    """The full arm's block too: else a training row would be cut, or its positions untrained."""
    model = lr.build_model(tiny(**TRAINED_TO), task, arm, 0)
    assert model.segment == L and model.block == (L if arm == "full" else 32)
    assert len(model.controller.wpe.weight) == model.block * (2 if arm == "edm" else 1)


@pytest.mark.parametrize("arm, links", [
    ("window", False), ("knn_store", False), ("dnc", False), ("dnc", True), ("split", True),
    ("pointing", False), ("edm", False)])
@torch.no_grad()
def test_model_by_segments_equals_at_once(arm, links):
    model, tokens = tiny_model(arm, use_links=links), random_tokens(2, 96)
    whole, after, _ = model.hidden(tokens, model.init_state(2))
    assert (after is None) == (arm == "window")
    for cuts in ((0, 32, 64, 96), (0, 64, 96)):
        state, parts = model.init_state(2), []
        for start, end in itertools.pairwise(cuts):
            h, state, _ = model.hidden(tokens[:, start:end], state)
            parts.append(h)
        assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
        for a, b in zip(state or (), after or (), strict=True):
            assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arm", ["dnc", "split", "pointing"])
@torch.no_grad()
def test_prediction_of_pointing_is_the_mixture_and_sums_to_one(arm):
    """And that of the others is the vocabulary's alone."""
    model, tokens = tiny_model(arm, num_reads=2), random_tokens(2, 64)
    if arm != "dnc":
        torch.nn.init.constant_(model.memory.interface.empty.bias, -9.0)  # reads of some weight
    h, _, trace = model.hidden(tokens, model.init_state(2))
    row, column = torch.tensor([0, 1, 1]), torch.tensor([0, 40, 63])
    p = model.log_p(h, trace, row, column).exp()
    assert_close(p.sum(1), torch.ones(3), atol=1e-5, rtol=0)
    for b, t, of_token in zip(row.tolist(), column.tolist(), p, strict=True):
        wanted = model.logits(h[b, t]).softmax(-1)
        if arm == "pointing":
            weights = trace.read_weights[b, t].mean(0)  # (N,)
            held = trace.tokens[b, t]
            is_held = held >= 0
            assert weights[is_held].sum() > 0.05
            wanted = wanted * (1 - weights[is_held].sum())
            wanted.index_add_(0, held[is_held], weights[is_held])
        assert_close(of_token, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("arm", ["split", "pointing"])
def test_only_pointing_teaches_keys_before_reads_are_added(arm):
    """read_proj starts at zero: until it has moved, no gradient of an added read reaches a key."""
    config = tiny(**WIDE)
    group = lr.make_group(task="copy", split="train", length=96, items=3, rows=8, config=config)
    model = lr.build_model(config, "copy", arm, 0)
    both = lr.optimizers(model, config, 0.01)
    lr.train_step(model, both, group, slice(None), rate=1.0, config=config, carried=True)
    slope = model.memory.interface.read_key.weight.grad.abs().max()
    assert (slope > 0) == (arm == "pointing")


@every_task
def test_model_arms_have_as_many_parameters(task):
    config = tiny(train="256,32", mqar_train="256:4")
    sizes = [lr.count_parameters(lr.build_model(config, task, arm, 0)) for arm in lr.ARMS]
    assert max(sizes) <= 1.02 * min(sizes), sizes


@pytest.mark.parametrize("arm", ["window", "knn_store", "dnc", "pointing", "edm"])
def test_model_starts_from_the_weights_of_its_seed(arm):
    """The controllers of the arms with blocks start the same, where shapes agree."""
    one, same, other = (lr.build_model(tiny(**WIDE), "copy", arm, seed).state_dict()
                        for seed in (3, 3, 4))
    assert_close(one, same, atol=0, rtol=0)
    assert not torch.equal(one["controller.wte.weight"], other["controller.wte.weight"])
    window = lr.build_model(tiny(**WIDE), "copy", "window", 3).controller.state_dict()
    for name, weight in window.items():
        weight_here = one[f"controller.{name}"]
        assert weight.shape != weight_here.shape or torch.equal(weight, weight_here), name


@pytest.mark.parametrize("arm, links", [("dnc", False), ("dnc", True), ("pointing", True)])
@torch.no_grad()
def test_init_state_gives_more_slots(arm, links):
    """As a model of so many slots has them: empty, and the same results from the same weights."""
    few, many = (tiny_model(arm, use_links=links, num_reads=2, mem_slots=N) for N in (5, 9))
    many.load_state_dict(few.state_dict())
    many.memory.options = few.memory.options  # usage decays as the model was trained
    state, wanted = few.init_state(3, 9), many.init_state(3)
    assert type(state) is type(wanted)
    for padded, empty in zip(state, wanted, strict=True):
        assert torch.equal(padded, empty)
    tokens = random_tokens(3, 32)
    assert_close(few.hidden(tokens, state)[0], many.hidden(tokens, wanted)[0])
    for slots in (0, 4, 5):  # never fewer than its own
        assert few.init_state(3, slots).memory.shape[1] == 5


@pytest.mark.parametrize("width", [6, 7])
def test_waves_are_those_of_vaswani(width):
    waves = lr.waves(9, width)
    for place, i in itertools.product(range(9), range(width)):
        angle = place / 10_000 ** (i // 2 * 2 / width)
        wanted = math.cos(angle) if i % 2 else math.sin(angle)
        assert waves[place, i].item() == pytest.approx(wanted, abs=1e-5)


# ══ Training ═════════════════════════════════════════════════════════════════════════════════════
def fake_groups() -> list[dict]:
    return [{"length": length, "inputs": torch.zeros(rows, length)}
            for length, rows in ((64, 10), (32, 9), (512, 3))]


def test_batches_are_of_their_seed_and_begin_with_the_first_group_alone():
    one, same, other = ([(group["length"], rows.tolist()) for group, rows in lr.batches(
        fake_groups(), tiny(curriculum=0.25), 400, seed)] for seed in (5, 5, 6))
    assert one == same != other
    lengths = [length for length, _ in one]
    assert len(lengths) == 400 and set(lengths[:100]) == {64}
    counts = Counter(lengths[100:])
    assert set(counts) == {64, 32, 512} and all(70 < n < 130 for n in counts.values())


def test_batches_have_the_tokens_asked_for_and_no_row_twice():
    """As many whole rows as batch_tokens hold, at least one; each group's rows are used up in a
    random order before one comes again."""
    drawn = {64: [], 32: [], 512: []}
    for group, rows in lr.batches(fake_groups(), tiny(batch_tokens=200), 300, 0):
        assert len(rows) == {64: 3, 32: 6, 512: 1}[group["length"]]
        drawn[group["length"]] += rows.tolist()
    for group in fake_groups():
        n, rows = len(group["inputs"]), drawn[group["length"]]
        rounds = [rows[i : i + n] for i in range(0, len(rows) - n + 1, n)]
        assert len(rounds) > 5 and all(sorted(of_round) == list(range(n)) for of_round in rounds)
        assert any(of_round != rounds[0] for of_round in rounds)


@pytest.mark.parametrize("step, share", [
    (0, 0.1), (4, 0.5), (9, 1.0), (30, 1.0), (60, 1.0), (80, 0.5), (99, 0.025)])
def test_trapezoid_rises_and_falls_linearly(step, share):
    """Of 100 steps over the first ten, and over the last forty to almost zero."""
    config = tiny(lr_warmup=0.1, lr_decay=0.4)
    assert lr.trapezoid(step, 100, config) == pytest.approx(share)
    assert lr.trapezoid(10 * step + 9, 1000, config) == pytest.approx(share, abs=0.03)
    assert lr.trapezoid(step, 100, tiny(lr_warmup=0.0, lr_decay=0.0)) == 1.0


def test_chosen_jobs_take_the_rate_that_validates_best(monkeypatch):
    """By loss, whatever the accuracy. The other seeds get the rate of the first."""
    config = tiny(tasks="copy", arms="window,dnc", seeds="3,4", lr_grid="0.01,0.02,0.03")
    losses = {"window": {0.01: 1.0, 0.02: 0.1, 0.03: 2.0}, "dnc": {0.01: 0.5, 0.02: 0.6, 0.03: 0.4}}
    accuracies = {0.01: 0.9, 0.02: 0.4, 0.03: 0.6}

    def finished_run(_, job: lr.Job) -> dict:
        assert job.seed == 3
        return {"val_accuracy": accuracies[job.lr], "val_loss": losses[job.arm][job.lr]}

    monkeypatch.setattr(lr, "load_checkpoint", finished_run)
    assert lr.chosen_jobs(config) == [
        lr.Job("copy", "window", 3, 0.02), lr.Job("copy", "window", 4, 0.02),
        lr.Job("copy", "dnc", 3, 0.03), lr.Job("copy", "dnc", 4, 0.03)]
    assert len(lr.first_jobs(config)) == 6


@pytest.mark.parametrize("arm", lr.ARMS)
def test_optimizers_cover_every_parameter_once(arm):
    model = tiny_model(arm)
    groups = [group for optimizer in lr.optimizers(model, tiny(adam_lr=0.5), 0.02)
              for group in optimizer.param_groups]
    covered = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(covered) == sorted(id(parameter) for parameter in model.parameters())
    assert [group["lr"] for group in groups] == [0.02, 0.01]


def test_cost_of_gates_closes_wide_open_gates_at_first_and_leaves_decided_ones_in_the_end():
    logits = torch.tensor([9.0, 3.0, -9.0], dtype=torch.float64, requires_grad=True)

    def slope(late: float, closing: float) -> torch.Tensor:
        cost = 3 * lr.gate_cost(logits.sigmoid(), late, closing)  # the mean is over three
        return torch.autograd.grad(cost, logits)[0]

    g = logits.detach().sigmoid()
    undecided = g * (1 - g) * (1 - 2 * g)
    assert_close(slope(0.25, 0.1), 0.25 * undecided + 0.075 * g)
    assert_close(slope(1.0, 0.1), undecided)
    assert slope(0.25, 0.1)[0] > 0.07 > 1e-3 > slope(0.25, 0.0)[0].abs()
    assert (slope(0.25, 0.1) > 0).all()  # what the second cost would hold up falls nevertheless
    assert lr.gate_cost(torch.ones(2), 0.5, 0.1).isfinite()


def test_edm_arm_trains_its_trunk_inside_the_window_and_then_freezes_it(tmp_path, monkeypatch):
    """First without memory, on rows of two windows, late every second step with the study part of
    another row; then the notebook alone, on all."""
    config = tiny(tasks="copy", arms="edm", train="64:4,32,64,96", edm_base_steps=6, steps=4,
                  edm_slots=64, data_dir=str(tmp_path), save_dir=str(tmp_path))
    lr.generate(config)
    calls, read, train_step = [], [], lr.train_step

    def watched_step(model, both, group, rows, **options) -> float:
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        size = group["inputs"].shape[1], group["at"].shape[1]
        read.append(group["inputs"][rows].clone())
        loss = train_step(model, both, group, rows, **options)
        changed = {name.split(".")[0] for name, weight in model.named_parameters()
                   if not torch.equal(weight, before[name])}
        calls.append((options.get("carried", False), *size, changed))
        return loss

    monkeypatch.setattr(lr, "train_step", watched_step)
    lr.train_run(config, lr.Job("copy", "edm", 0, 0.02))
    base, memory = calls[:6], calls[6:]
    assert [carried for carried, *_ in calls] == [False] * 6 + [True] * 4
    assert base[0][1:3] == base[1][1:3] == (64, 4)
    assert all(length <= 64 for _, length, _, _ in base)
    known = {tuple(row) for group in lr.load_data(config, "copy", "train")[0]
             for row in group["inputs"].tolist()}
    for step, rows in enumerate(read):
        study = rows.shape[1] // 2
        own = torch.cat([rows[:, :study].roll(-1, 0), rows[:, study:]], 1)
        assert known.issuperset(map(tuple, (own if step == 5 else rows).tolist())), step
    assert set.union(*(changed for *_, changed in base)) == {"controller", "output"}
    for _, length, _, changed in memory:
        assert changed <= {"memory"} and (length == 32 or changed)


# ══ Evaluation ═══════════════════════════════════════════════════════════════════════════════════
class First(NamedTuple):
    """What FirstToken keeps of a row: its first token."""

    token: torch.Tensor  # (B, 1)


class FirstToken:
    """Answers every question with the row's first token, which it keeps in its state."""

    memory = "first token"

    def __init__(self, block: int, segment: int = 64):
        self.block, self.segment = block, segment
        self.segments, self.asked = [], []

    def init_state(self, rows: int, slots: int = 0) -> First:
        self.asked.append((rows, slots))
        return First(torch.zeros(rows, 1, device=lr.device()))

    def hidden(self, tokens, state):
        self.segments.append(tokens.shape[1])
        first = torch.where(state.token == 0, tokens[:, :1].float(), state.token)
        return first.unsqueeze(1).expand(*tokens.shape, 1), First(first), None

    def log_p(self, h, trace, row, column):
        return (5.0 * F.one_hot(h[row, column, 0].long(), 64)).log_softmax(-1)


def hand_group(rows: int, L: int, at: list[int], answers: Callable) -> dict:
    """Random rows that begin with 1, 2, 3, …; every row is asked at the same places."""
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.integers(1, 64, (rows, L)).astype(np.int16))
    inputs[:, 0] = 1 + torch.arange(rows)
    places = torch.tensor(at, dtype=torch.int16).expand(rows, -1)
    return {"split": "test", "length": L, "items": 0, "inputs": inputs, "at": places,
            "answers": answers(inputs).to(torch.int16)}


def first_group(rows: int, L: int, at: list[int]) -> dict:
    """Rows whose answers are their first token."""
    return hand_group(rows, L, at, lambda inputs: inputs[:, :1].expand(rows, len(at)))


@pytest.mark.parametrize("rows, L, segment, batches", [
    (11, 64, 64, [4, 4, 3]), (9, 64, 64, [4, 5]),  # a row alone would be its own neighbour
    (9, 32, 64, [9]), (8, 96, 32, [8]), (7, 96, 64, [4, 3]), (4, 512, 512, [2, 2]),
    (5, 512, 512, [2, 3])])  # two at least, however long they are
def test_score_reads_so_many_tokens_at_once(rows, L, segment, batches, monkeypatch):
    """Of two questions a row the second is answered; swapped leaves no row its own memory."""
    monkeypatch.setattr(lr, "EVAL_TOKENS", 256)
    model = FirstToken(32, segment)
    group = hand_group(rows, L, [L - 2, L - 1], lambda inputs: inputs[:, :1] * torch.arange(2))
    result = lr.score(model, group, tiny())
    assert [n for n, _ in model.asked] == batches
    assert result["accuracy"] == 0.5
    assert result["val_loss"] == pytest.approx(math.log(math.exp(5) + 63) - 2.5, rel=1e-5)
    if L > 32:
        assert lr.score(model, group, tiny(), swap=True)["accuracy"] == 0.0


@pytest.mark.parametrize("block, L, segments", [
    (32, 32, [32]), (32, 64, [32, 32]), (32, 96, [64, 32]), (32, 160, [64, 64, 32]),
    (32, 192, [64, 64, 32, 32]), (96, 96, [96])])
def test_score_carries_the_memory_and_ends_with_one_window(block, L, segments):
    """Segments as long as training had them, the last window apart; the full arm, whose block is
    no window, sees the row whole. All rows remember."""
    model, group = FirstToken(block), first_group(4, L, [L // 2, L - 1])
    assert lr.score(model, group, tiny())["accuracy"] == 1.0
    assert model.segments == segments


def test_score_swapped_gives_the_memory_of_the_row_before():
    """Only the last window is scored: the two wrong answers lie before it."""

    def answers(inputs):
        before = inputs[:, 0].roll(1)
        wrong = inputs[:, 0] % 63 + 2
        return torch.stack([wrong, wrong, before, before], dim=1)

    group = hand_group(17, 160, [10, 127, 128, 159], answers)
    assert lr.score(FirstToken(32), group, tiny(), swap=True)["accuracy"] == 1.0
    assert lr.score(FirstToken(32), group, tiny())["accuracy"] == 0.0


@pytest.mark.parametrize("split, slots", [("train", 0), ("valid", 0), ("test", 18)])
def test_score_asks_for_two_slots_a_pair_of_a_test(split, slots):
    """In training and validation the memory is as large as the model says."""
    model = FirstToken(32)
    lr.score(model, first_group(3, 64, [63]) | {"items": 9, "split": split}, tiny())
    assert model.asked == [(3, slots)]


# ══ Statistics and tables ════════════════════════════════════════════════════════════════════════
@pytest.mark.parametrize("accuracy, chance, wanted", [
    ([1.0, 0.9, 0.7, 0.6], 0.0, "> 8"),  # not half-way
    ([1.0, 0.0, 0.0, 0.0], 0.0, "1.41"),  # half-way between 1 and 2, in the logarithm
    ([1.0, 0.5, 0.0, 0.0], 0.0, "2"),  # exactly there
    ([0.8, 0.8, 0.6, 0.2], 0.0, "4.76"),  # 4 * 2 ** 0.25: half of 100 %, not of its own start
    ([1.0, 0.75, 0.5, 0.5], 0.5, "2"),  # half-way to chance, not to zero
    ([1.0, 0.4, 1.0, 1.0], 0.0, "1.78"),  # 2 ** (5 / 6): the first fall counts
    ([1.0, 1.0, 1.0, 1.0], 1.0, "< 1"),  # nothing was asked that chance does not know
    ([0.45], 0.0, "< 1"), ([], 0.0, "—")])
def test_effective_context_is_half_way_to_chance(accuracy, chance, wanted):
    distances = (1.0, 2.0, 4.0, 8.0)
    cells = [(d, a, chance) for d, a in zip(distances, accuracy, strict=False)]
    assert lr.effective_context(cells) == wanted
    of_two_chances = [(1.0, 0.6, 0.0), (2.0, 0.6, 0.5)]
    assert lr.effective_context(of_two_chances) == "1.19"  # 2 ** 0.25


def result_row(arm: str = "window", length: int = 64, accuracy: float = 0.5, **fields) -> dict:
    """A row of the results, as far as tables need it."""
    swapped = 0.07 if arm in lr.MEMORY_ARMS else None
    row = {"task": "copy", "arm": arm, "seed": 0, "length": length, "items": 0, "questions": 6,
           "distance_windows": length / 32 - 1, "within_block": 0.0, "accuracy": accuracy,
           "swapped_accuracy": swapped, "chance": 0.03, "lr": 0.01, "tokens_per_s": 1000,
           "attention_bytes": 1024, "memory_bytes": 0}
    return row | fields


def test_table_says_the_effective_context_of_the_mean_at_equal_load(capsys):
    """0.6 and 0.4, half-way between distances 1 and 3 (sqrt(3)). The row of fewer questions is in
    the table, but its distance does not count; rows of other tasks are not even there."""
    rows = [result_row(arm="dnc", length=length, accuracy=accuracy, seed=seed, chance=0.0)
            for length, accuracies in ((64, (0.4, 0.8)), (128, (0.2, 0.6)))
            for seed, accuracy in enumerate(accuracies)]
    rows += [result_row(length=length, accuracy=0.1, chance=0.0) for length in (64, 128)]
    rows += [result_row(arm, 32, 0.1, questions=2) for arm in ("window", "dnc")]
    rows += [result_row(task="mqar", length=96)]
    lr.print_task("copy", rows, tiny(arms="window,dnc", seeds="0,1", lr_grid="0.01,0.02"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [words[0] for words in lines if words and words[0].isdigit()] == ["32", "64", "128"]
    reach = {words[0]: " ".join(words[1:]) for words in lines if "windows;" in words}
    assert reach == {
        "window": "effective context < 1 windows; learning rate 0.01 of 0.01, 0.02",
        "dnc": "effective context 1.73 windows; learning rate 0.01 of 0.01, 0.02"}


def test_plot_marks_the_longest_training_row_of_each_task(tmp_path, monkeypatch):
    marked, draw_panel = [], lr.draw_panel
    monkeypatch.setattr(lr, "draw_panel", lambda axis, *rest: (
        draw_panel(axis, *rest), marked.append(axis.lines[-1].get_xdata())))
    monkeypatch.setattr(lr, "measure", lambda config: [
        result_row(task=task, loss=1.0, chance_loss=2.0) for task in ("copy", "mqar")])
    lr.plot(tiny(arms="window", plot_dir=str(tmp_path), **TRAINED_TO))
    assert [list(x) for x in marked] == [[96, 96], [96, 96], [64, 64], [64, 64]]


# ══ The command ══════════════════════════════════════════════════════════════════════════════════
def folder_of(config: lr.Config) -> Path:
    return Path(config.save_dir).parent


def argv_of(folder: Path, **fields) -> list[str]:
    return flags({**TINY, **folders_in(folder), **fields})


def run_here(function, config, jobs, what) -> list:
    """`run_all` in this process."""
    return [function(config, job) for job in jobs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> lr.Config:
    """The Config of a run of generate, train, compare and plot; its folders are not to be changed.
    Its jobs run in this process."""
    folder = tmp_path_factory.mktemp("long_range")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lr, "run_all", run_here)
        patch.setenv("DRAW_PICTURES", "1")
        assert lr.main(argv_of(folder)) == 0
    return tiny(**folders_in(folder))


@pytest.fixture
def copied(trained, tmp_path) -> lr.Config:
    """The Config of a copy of that run, which may be changed."""
    shutil.copytree(folder_of(trained), tmp_path / "copied")
    return dataclasses.replace(trained, **folders_in(tmp_path / "copied"))


@pytest.fixture
def jobs_run(monkeypatch) -> list:
    """The jobs that a command runs; they run in this process."""
    jobs = []

    def watched_run(function, config, missing, what):
        jobs.extend(missing)
        return run_here(function, config, missing, what)

    monkeypatch.setattr(lr, "run_all", watched_run)
    return jobs


def files(folder: Path) -> dict[str, tuple]:
    """Every file below a folder but locks, with its content and time."""
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def results_of(config: lr.Config) -> dict:
    return json.loads(lr.results_path(config).read_text(encoding="utf-8"))


def checkpoint(config: lr.Config, task: str, arm: str) -> dict:
    return torch.load(lr.Job(task, arm, 0, 0.01).path(config), weights_only=True)


def test_command_writes_data_checkpoints_and_plots(trained):
    wanted = {"plot/long_range.json", "plot/long_range.png"}
    for task in ("copy", "mqar"):
        wanted |= {f"data/long_range_{task}_{part}.pt" for part in ("train", "test")}
        wanted |= {f"save/long_range_{task}_{arm}_seed0_lr0.01.pt" for arm in ARMS}
    assert set(files(folder_of(trained))) == wanted
    picture = (folder_of(trained) / "plot/long_range.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    about = results_of(trained)["about"]
    assert about["config"] == dataclasses.asdict(trained)
    assert about["versions"]["torch"] == torch.__version__ and about["device"] == lr.hardware()


@pytest.mark.parametrize("task, arm, length, items", [
    ("copy", "window", 96, 0), ("copy", "full", 64, 0), ("mqar", "knn_store", 96, 0),
    ("mqar", "dnc", 96, 12)])
@torch.no_grad()
def test_compare_measures_what_the_checkpoint_predicts(trained, task, arm, length, items):
    """Accuracy and loss of the row, from the weights and the raw data, all at once."""
    rows = results_of(trained)["rows"]
    row, = lr.select(rows, task=task, arm=arm, length=length, items=items)
    data = torch.load(lr.data_path(trained, task, "test"), weights_only=True)
    group, = lr.select(data["groups"], length=length, items=items)
    model = lr.build_model(trained, task, arm, 0)
    model.load_state_dict(checkpoint(trained, task, arm)["model_state_dict"])

    tokens, at, answers = (group[name].long().to(lr.device())
                           for name in ("inputs", "at", "answers"))
    h = model.hidden(tokens, model.init_state(len(tokens), 2 * items))[0]
    log_p = torch.stack([model.logits(h[i, at[i]]) for i in range(len(at))]).log_softmax(-1)
    loss = -log_p.gather(2, answers.unsqueeze(2)).mean().item()
    right = (log_p.argmax(-1) == answers).double().mean().item()
    assert row["loss"] == pytest.approx(loss, rel=1e-4)
    assert abs(row["accuracy"] - right) <= 1.01 / answers.numel()  # a near-tie may go either way
    assert row["questions"] == answers.shape[1] and row["within_block"] == group["within"]
    assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_measure_run_has_no_swapped_accuracy_where_nothing_is_asked(trained):
    """The questions of one group are moved before the last window; the others stay. In a file of
    JSON there is no NaN."""
    groups = lr.load_data(trained, "mqar", "test")[0]
    groups[-1]["at"][:] = torch.arange(30, 42)
    rows = lr.measure_run(trained, lr.Job("mqar", "knn_store", 0, 0.01))
    json.dumps(rows, allow_nan=False)
    unasked = [(row["length"], row["items"]) for row in rows if row["swapped_accuracy"] is None]
    assert unasked == [(32, 0), (96, 12)]


@pytest.mark.parametrize("arm, lengths", [("full", []), ("window", [96])])
def test_measure_run_of_the_full_arm_reads_no_longer_rows(trained, arm, lengths):
    """Not even to warm up, where there are only such."""
    groups = lr.load_data(trained, "copy", "test")[0]
    del groups[:-1]
    rows = lr.measure_run(trained, lr.Job("copy", arm, 0, 0.01))
    assert [row["length"] for row in rows] == lengths


def test_compare_evaluates_what_is_missing_alone(copied, jobs_run):
    """The rows of the others are those of the file; a second time, all are."""
    results = results_of(copied)
    for run in results["runs"]:
        for row in run["rows"]:
            row["val_accuracy"] = 7
    del results["runs"][0]
    lr.write_json(results, lr.results_path(copied))
    for _ in range(2):
        lr.measure(copied)
        assert jobs_run == [lr.Job("copy", "window", 0, 0.01)]
    for row in results_of(copied)["rows"]:
        is_new = (row["task"], row["arm"]) == ("copy", "window")
        assert (row["val_accuracy"] == 7) == (not is_new)


def test_measure_evaluates_again_what_has_changed(copied, monkeypatch):
    """Weights, test data, scan, version or device; not what is the same."""
    job = lr.Job("copy", "dnc", 0, 0.01)
    other_scan = dataclasses.replace(copied, scan="auto")
    identities = [lr.identity(copied, job), lr.identity(other_scan, job)]
    assert lr.identity(copied, job) == identities[0]
    alter(job.path(copied), lambda payload: payload["model_state_dict"]["output.weight"].add_(1))
    identities.append(lr.identity(copied, job))
    other_data = dataclasses.replace(copied, test_rows=7)
    lr.generate(other_data)
    identities.append(lr.identity(other_data, job))
    monkeypatch.setattr(torch, "__version__", "9.9")
    identities.append(lr.identity(other_data, job))
    monkeypatch.setattr(lr, "hardware", lambda: "another card")
    identities.append(lr.identity(other_data, job))
    assert len(set(identities)) == 6


def test_train_and_compare_go_on_to_the_same_weights_and_results(trained, copied, jobs_run):
    """A run that is missing is trained again, alone, to the very same weights; what is not in the
    results is evaluated again, to the same rows but for times."""
    before = files(folder_of(trained))
    lr.train(trained)
    assert jobs_run == [] and files(folder_of(trained)) == before

    job = lr.Job("copy", "dnc", 0, 0.01)
    job.path(copied).unlink()
    others = files(Path(copied.save_dir))
    lr.train(copied)
    assert jobs_run == [job] and others.items() <= files(Path(copied.save_dir)).items()
    old, new = (checkpoint(config, "copy", "dnc") for config in (trained, copied))
    assert_close(new["model_state_dict"], old["model_state_dict"], atol=0, rtol=0)
    assert old["history"] == new["history"]

    for damaged in ("", "[]", "{", '{"runs": [{"id": 3}]}'):
        lr.results_path(copied).write_text(damaged, encoding="utf-8")
        assert lr.read_results(copied) == {}
    lr.measure(copied)
    assert len(jobs_run) == 1 + 8
    without = {"tokens_per_s": 0, "train_seconds": 0}
    old, new = ([row | without for row in results_of(config)["rows"]]
                for config in (trained, copied))
    assert new == old


def test_train_history_has_the_mean_loss_since_the_last_row(trained, tmp_path):
    """Three steps, a row every two: of two steps, then of one."""
    config = dataclasses.replace(trained, save_dir=str(tmp_path), log_every_steps=1)
    lr.train_run(config, lr.Job("copy", "window", 0, 0.01))
    each, two = ([row["loss"] for row in checkpoint(c, "copy", "window")["history"]]
                 for c in (config, trained))
    assert len(each) == 3 and each[0] != each[1]
    assert two == pytest.approx([(each[0] + each[1]) / 2, each[2]])
    of_mqar = checkpoint(trained, "mqar", "window")["history"]  # which has steps of its own
    assert [row["step"] for row in of_mqar] == [2, 4]


def test_train_trains_nothing_where_something_cannot_run(trained, tmp_path, jobs_run, monkeypatch):
    """Not even the arms and tasks that could be. The scan is asked whether it takes the slots of
    the model, and for mqar those of its largest test: twice 12 pairs."""
    asked = []

    def at_most_16(scan, state, options):
        asked.append(state.memory.shape[1])
        lr.require(asked[-1] <= 16, "scan", scan, "auto or eager here")

    monkeypatch.setattr(lr, "pick_scan", at_most_16)
    lr.train(dataclasses.replace(trained, tasks="mqar", arms="window"))
    assert asked == []
    lr.train(dataclasses.replace(trained, tasks="copy"))
    assert set(asked) == {16}
    config = dataclasses.replace(trained, save_dir=str(tmp_path))
    with pytest.raises(ValueError, match="scan = 'eager'"):
        lr.train(config)
    assert set(asked) == {16, 24}
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="Muon"):
        lr.train(config)
    assert jobs_run == []


def test_train_ends_where_the_loss_is_not_finite(trained, tmp_path, jobs_run, capsys):
    words = argv_of(folder_of(trained), tasks="copy", arms="window", lr_grid="1e30",
                    save_dir=tmp_path)
    assert lr.main(["train", *words]) == 1
    assert "--lr_grid" in error_line(capsys.readouterr().err)
    assert jobs_run == [lr.Job("copy", "window", 0, 1e30)] and not files(tmp_path)


@pytest.mark.slow
def test_command_trains_the_same_weights_with_two_workers(trained, tmp_path):
    """The real command in a process of its own, on the same data: bit for bit what was trained in
    this one; and the weights have moved."""
    words = argv_of(folder_of(trained), tasks="copy", arms="window,dnc", workers=2,
                    save_dir=tmp_path / "save")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "long_range.py"), "train", *words], text=True, timeout=240,
        capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation: accuracy") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["save"]
    there = dataclasses.replace(trained, save_dir=str(tmp_path / "save"))
    for arm in ("window", "dnc"):
        here, weights = (checkpoint(config, "copy", arm)["model_state_dict"]
                         for config in (trained, there))
        assert_close(weights, here, atol=0, rtol=0)
        start = lr.build_model(trained, "copy", arm, 0).state_dict()
        assert not any(torch.equal(start[name].cpu(), weights[name])
                       for name in ("controller.wte.weight", "output.weight"))


def test_run_all_that_is_stopped_ends_its_workers(monkeypatch, capsys):
    """At once, whatever they do: here they would wait for a minute."""
    monkeypatch.setattr(lr, "worker_count", lambda config: 2)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    code = lr.run_command(lambda stop: lr.run_all(signal.sigtimedwait, (), [60, 61], "wait"),
                          again=["long_range.py"], saved="finished runs are kept")
    assert code == 128 + signal.SIGTERM and "finished runs are kept" in capsys.readouterr().err
    assert multiprocessing.active_children() == [] and time.monotonic() - began < 30


# Fields beside those of TINY, the last of which the error names with this value.
MISTAKES = [
    ({"tasks": "copy,sort"}, "'copy,sort'"), ({"tasks": ""}, "''"), ({"arms": "lstm"}, "'lstm'"),
    ({"seeds": "-1"}, "'-1'"), ({"lr_grid": "0.01,0"}, "'0.01,0'"), ({"lr_grid": "nan"}, "'nan'"),
    ({"window": 12}, "12"), ({"alphabet": 40_000}, "40000"), ({"hidden_size": 15}, "15"),
    ({"items": 25}, "25"), ({"workers": 0}, "0"), ({"test_rows": 1}, "1"), ({"lr_decay": 2}, "2"),
    ({"lengths": "64,48"}, "'64,48'"),  # no multiple of the window
    ({"lengths": "long"}, "'long'"),
    ({"lengths": "96"}, "'96'"),  # the full arm reads none
    ({"mqar_symbols": 66, "pairs": 33}, "33"),  # more than a window
    ({"pairs": 40, "mqar_symbols": 64}, "64"),
    ({"train": "64:4,48"}, "'64:4,48'"), ({"train": "64:-1"}, "'64:-1'"),
    ({"mqar_train": "64:17"}, "'64:17'"),  # no room
    ({"mqar_train": "160:40"}, "'160:40'"),  # more than symbols
    ({"mqar_train": "64"}, "'64:0'"), ({"mqar_test": "64:4,64:17"}, "'64:17'"),
    ({"arms": "edm", "tasks": "copy", "train": "96"}, "96: must be at most 64"),
    ({"arms": "edm", "tasks": "mqar", "mqar_train": "96:4"}, "96: must be at most 64")]


@pytest.mark.parametrize("fields, value", MISTAKES, ids=[str(fields) for fields, _ in MISTAKES])
def test_config_names_a_mistaken_value(fields, value):
    with pytest.raises(ValueError) as error:
        tiny(**fields)
    assert str(error.value).startswith(f"{[*fields][-1]} = {value}")


@pytest.mark.parametrize("words, named", [
    (["generate", "--items", "25"], "error: items = 25: must be"), (["dance"], "error: command"),
    (["train"], "generate --tasks copy"), (["compare"], "long_range.py train"),
    (["plot"], "long_range.py train")])
def test_command_says_a_mistake_in_one_line(words, named, tmp_path, capsys):
    """And writes nothing; without data it says how to get them."""
    command, *options = words
    assert lr.main([command, *argv_of(tmp_path), *options]) == 2
    printed = capsys.readouterr().err
    assert named in error_line(printed) and len(printed.strip().splitlines()) == 1
    assert not files(tmp_path)


# ══ Checkpoints that do not belong to a run ══════════════════════════════════════════════════════
COPY_WINDOW = lr.Job("copy", "window", 0, 0.01)


@pytest.mark.parametrize("use", [lr.train, lr.compare])
def test_checkpoint_of_other_fields_is_refused(trained, use):
    before = files(folder_of(trained))
    with pytest.raises(ValueError, match="trained with hidden_size = 16,.*--hidden_size"):
        use(dataclasses.replace(trained, hidden_size=32))
    assert files(folder_of(trained)) == before


@pytest.mark.parametrize("name, free, bound", [
    ("mqar_steps", ("copy", "window"), ("mqar", "window")),
    ("steps", ("mqar", "window"), ("copy", "window")),
    ("lambda_closing", ("copy", "window"), ("copy", "dnc"))])
def test_checkpoint_minds_the_fields_of_its_task_and_arm_alone(trained, name, free, bound):
    other = dataclasses.replace(trained, **{name: 9})
    lr.load_checkpoint(other, lr.Job(*free, 0, 0.01))
    with pytest.raises(ValueError, match=f"trained with {name} = "):
        lr.load_checkpoint(other, lr.Job(*bound, 0, 0.01))


def test_checkpoint_of_other_data_is_refused(copied):
    """The data are whole, but not what the checkpoint was trained on."""
    alter(lr.data_path(copied, "copy", "train"),
          lambda payload: payload["groups"][0]["answers"][0, 0].add_(1), rehash=True)
    for use in (lr.train, lr.compare):
        with pytest.raises(ValueError, match="copy_window.*: must be trained on these"):
            use(copied)


@pytest.mark.parametrize("job", [
    lr.Job("copy", "knn_store", 0, 0.01), lr.Job("copy", "window", 1, 0.01),
    lr.Job("copy", "window", 0, 0.02)])
def test_checkpoint_renamed_is_refused(copied, job):
    """Of the same data and fields, but of another arm, seed or rate than its name says."""
    shutil.copyfile(COPY_WINDOW.path(copied), job.path(copied))
    with pytest.raises(ValueError) as error:
        lr.load_checkpoint(copied, job)
    assert f"{job.path(copied).name}': must be of {job}" in str(error.value)


def test_checkpoint_damaged_or_missing_is_refused(copied):
    path = COPY_WINDOW.path(copied)
    alter(path, lambda payload: payload.pop("job"))
    for reason in (f"{path}: truncated", "must be there; run: python long_range.py train"):
        with pytest.raises(ValueError, match=reason):
            lr.load_checkpoint(copied, COPY_WINDOW)
        path.unlink(missing_ok=True)


def test_compare_says_which_further_seed_is_not_trained_and_how_to_train_it(trained, capsys):
    """As a seed that stands alone does, and nothing is written."""
    before = files(folder_of(trained))
    lines = []
    for seeds in ("7", "0,7"):
        assert lr.main(["compare", *argv_of(folder_of(trained), seeds=seeds)]) == 2
        lines.append(error_line(capsys.readouterr().err))
    assert lines[0] == lines[1] and "_seed7_" in lines[0] and "long_range.py train" in lines[0]
    assert files(folder_of(trained)) == before


# ── What a conclusion hangs on ───────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("task", ["repeats", "mqar"])
def test_chance_is_counted_in_training_alone(task, tmp_path):
    """Neither in validation nor in the rows that it is the chance of."""
    config = tiny(tasks=task, data_dir=str(tmp_path))
    lr.generate(config)
    groups, _ = lr.load_data(config, task, "train")
    train = lr.select(groups, split="train")
    assert 0 < len(train) < len(groups)
    for test in lr.load_data(config, task, "test")[0]:
        of_training, of_both, of_itself = (
            lr.context_free(counted, test, lr.vocabulary(task, config))
            for counted in (train, groups, [test]))
        assert (test["chance"], test["chance_loss"]) == of_training
        assert of_training[1] not in (of_both[1], of_itself[1])


def test_validation_is_the_mean_over_all_groups(monkeypatch):
    monkeypatch.setattr(lr, "score", lambda model, group, config: group)
    groups = [{"accuracy": 1.0, "val_loss": 0.5}, {"accuracy": 0.5, "val_loss": 2.0},
              {"accuracy": 0.0, "val_loss": 2.0}]
    assert lr.validate(None, groups, tiny()) == {"accuracy": 0.5, "val_loss": 1.5}
