"""Tests of long_range.py: the answers of every task found again from the tokens alone, the data on
disk, the key-value store against a naive loop, what each arm can see, evaluation against models
whose results are known, the statistics, and the command on runs of a few steps.

B rows, L tokens of a row, T tokens of a segment, C hidden width, D width of keys, V vocabulary,
Q questions of a row, N memory slots, n stored tokens, w window.
"""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, error_line, flags

import long_range as lr

# Every field that a test relies on, so that other defaults change no test. Three steps a run,
# four of mqar.
TINY = {
    "tasks": "copy,mqar", "arms": "window,knn_store,dnc,full", "seeds": "0",
    "lengths": "32,64,96", "window": 32, "symbols": 64, "mqar_symbols": 64, "alphabet": 16,
    "kinds": 4, "items": 6, "pairs": 8, "train": "64:3,64,32", "mqar_train": "64:4,32:2",
    "mqar_test": "64:4,96:12",
    "train_rows": 32, "valid_rows": 8, "test_rows": 6, "data_seed": 0, "hidden_size": 16,
    "num_layers": 1, "num_heads": 2, "mlp_width": 32, "mem_slots": 16, "mem_width": 16,
    "num_reads": 1, "use_links": False, "knn_width": 16, "knn_top_k": 4, "steps": 3,
    "mqar_steps": 4, "batch_tokens": 256, "curriculum": 0.35, "lr_grid": "0.01",
    "log_every_steps": 2, "workers": 1, "scan": "eager",
}  # fmt: skip
ARMS = ("window", "knn_store", "dnc", "full")
KEYS = {"task", "arm", "seed", "length", "distance_windows", "accuracy", "loss", "chance",
        "parameters", "tokens_per_s"}  # fmt: skip
SHAPES = [(32, 32), (32, 64), (32, 96), (32, 160), (32, 288), (64, 64), (64, 192), (64, 320)]
every_shape = pytest.mark.parametrize("w, L", SHAPES)
few_and_all = pytest.mark.parametrize("items", [0, 3])
every_task = pytest.mark.parametrize("task", list(lr.TASKS))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def forget_data():
    """Files change under one process here, which the cache of load_data does not look for."""
    lr.load_data.cache_clear()
    yield
    lr.load_data.cache_clear()


# ══ Helpers ══════════════════════════════════════════════════════════════════════════════════════


def tiny(**fields) -> lr.Config:
    return lr.Config(**{**TINY, **fields})


def large(w: int, **fields) -> lr.Config:
    """A Config for generators: enough items, pairs and kinds to fill what a row holds."""
    sizes = {"window": w, "lengths": str(w), "train": str(w), "mqar_train": f"{w}:2",
             "mqar_test": f"{w}:2", "items": 24, "pairs": 16}  # fmt: skip
    return tiny(**{**sizes, **fields})


def made(task: str, L: int, config: lr.Config, rows: int = 24, items: int = 0) -> lr.Rows:
    """Rows as they go to disk, as int64 arrays; items 0 is as many as the task has."""
    group = lr.make_group(task, "train", L, items, rows, config)
    return lr.Rows(*(group[name].numpy().astype(int) for name in lr.Rows._fields))


def run_of(tokens, start: int) -> list[int]:
    """The symbols that stand one after the other from `start` on."""
    found = []
    for token in tokens[start:]:
        if token < lr.FIRST:
            break
        found.append(int(token))
    return found


def places(tokens, marker: int) -> list[int]:
    return np.flatnonzero(np.asarray(tokens) == marker).tolist()


def only(tokens, marker: int) -> int:
    """Where the marker stands, once."""
    found = places(tokens, marker)
    assert len(found) == 1, (marker, found)
    return found[0]


def quiz_start(w: int, L: int) -> int:
    return w // 2 if L == w else L - w


def mqar_start(w: int, L: int) -> int:
    """Where the questions of mqar without items begin: from five blocks on a block earlier."""
    return quiz_start(w, L) - (w if L > 4 * w else 0)


def close(actual, wanted, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=tolerance)


# ══ Tasks: the answers from the tokens alone ═════════════════════════════════════════════════════


@few_and_all
@every_shape
@every_task
def test_task_rows_are_well_formed(task, w, L, items):
    config = large(w)
    rows = made(task, L, config, items=items)
    Q = rows.at.shape[1]
    assert rows.inputs.shape == (24, L) and Q > 0
    assert rows.at.shape == rows.answers.shape == rows.source.shape == (24, Q)
    assert (np.diff(rows.at, axis=1) > 0).all() and rows.at.min() >= 0 and rows.at.max() < L
    assert (rows.source < rows.at).all()
    V = lr.vocabulary(task, config)
    for tokens in (rows.inputs, rows.answers):
        assert tokens.min() >= 0 and tokens.max() < V
    if task != "random":
        assert (rows.source >= 0).all()
        if L > w and not (task == "mqar" and items):
            assert (rows.source // w < rows.at // w).all()
    if task != "repeat_copy" and not (task == "mqar" and items):  # their quiz is longer
        assert (rows.at >= (mqar_start if task == "mqar" else quiz_start)(w, L)).all()
    if task in ("copy", "brackets", "repeats", "associative_recall"):  # studied in the first block
        assert (rows.source < (w // 2 if L == w else w)).all()


@every_task
def test_task_depends_on_its_seed_alone(task):
    config = large(32)
    once, again = (made(task, 96, config) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    other = made(task, 96, dataclasses.replace(config, data_seed=1))
    assert not np.array_equal(once.inputs, other.inputs)
    assert len({row.tobytes() for row in once.inputs}) == len(once.inputs)


@every_task
def test_task_largest_vocabulary_fits_int16(task):
    """Values as they go to disk are those that were drawn: nothing wraps around."""
    config = large(32, symbols=32_000, mqar_symbols=32_000, kinds=1000, alphabet=32_000)
    V = lr.vocabulary(task, config)
    assert V <= 2**15
    group = lr.make_group(task, "train", 64, 0, 200, config)
    assert all(group[name].dtype == torch.int16 for name in lr.Rows._fields)
    drawn = lr.TASKS[task](np.random.default_rng(0), 200, 64, config)
    for name in ("inputs", "answers"):
        assert 0 <= group[name].min() and group[name].max() < V
        found = getattr(drawn, name)
        assert np.array_equal(found.astype(np.int16), found)


@few_and_all
@every_shape
def test_copy_answers_are_the_pattern(w, L, items):
    config = large(w)
    rows = made("copy", L, config, items=items)
    count = min(items or config.items, (w // 2 if L == w else w) * 3 // 4)
    for tokens, at, answers, source in zip(*rows, strict=True):
        start, recall = only(tokens, lr.START), only(tokens, lr.RECALL)
        pattern = run_of(tokens, start + 1)
        assert len(pattern) == count
        assert run_of(tokens, recall + 1) == pattern == answers.tolist()
        assert at.tolist() == list(range(recall, recall + count))
        assert source.tolist() == list(range(start + 1, start + 1 + count))
        assert tokens[source].tolist() == answers.tolist()
        assert start // w == (start + count) // w == 0 and recall // w == (L - 1) // w
        rest = np.delete(tokens, np.r_[start : start + count + 1, recall : recall + count + 1])
        assert rest.max() < lr.FILLERS


@few_and_all
@every_shape
def test_repeat_copy_answers_are_the_pattern_in_every_copy(w, L, items):
    config = large(w)
    rows = made("repeat_copy", L, config, items=items)
    copies = max(1, min(3, L // w - 1))
    count = min(items or config.items // 2, (w // 2 if L == w else w) * 3 // 8)
    for tokens, at, answers, source in zip(*rows, strict=True):
        begins = [only(tokens, lr.START), *places(tokens, lr.RECALL)]
        patterns = [run_of(tokens, begin + 1) for begin in begins]
        assert len(begins) == 1 + copies and len(patterns[0]) == count
        assert all(pattern == patterns[0] for pattern in patterns)
        assert answers.tolist() == patterns[0] * copies
        assert at.tolist() == [b + i for b in begins[1:] for i in range(count)]
        assert source.tolist() == [b + 1 + i for b in begins[:-1] for i in range(count)]
        assert tokens[source].tolist() == answers.tolist()
        blocks = [b // w for b in begins]
        assert blocks == [(b + count) // w for b in begins]  # none is divided
        assert blocks[-1] == (L - 1) // w
        assert L == w or len(set(blocks)) == len(blocks)


@few_and_all
@every_shape
def test_associative_recall_answers_are_the_next_item(w, L, items):
    rows = made("associative_recall", L, large(w), items=items)
    quiz, studied = quiz_start(w, L), items or (w // 2 if L == w else w) // 4
    for tokens, at, answers, source in zip(*rows, strict=True):
        where = [i + 1 for i in places(tokens, lr.ITEM)]
        shown = [tuple(tokens[i : i + 3]) for i in where]
        assert len(set(shown)) == len(shown) == studied
        queries, asked = places(tokens, lr.QUERY), []
        assert len(queries) == min((studied - 1) // 2, (L - quiz) // 7) > 0
        for i, query in enumerate(queries):
            k = shown.index(tuple(tokens[query + 1 : query + 4]))
            asked += [k, k + 1]
            mine = slice(3 * i, 3 * i + 3)
            assert at[mine].tolist() == [query + 3, query + 4, query + 5]
            assert tuple(answers[mine]) == shown[k + 1] == tuple(tokens[query + 4 : query + 7])
            assert source[mine].tolist() == [where[k + 1] + j for j in range(3)]
            quizzed = [tuple(tokens[j : j + 3]) for j in range(quiz, query + 2)]
            assert shown[k + 1] not in quizzed  # not before it is asked
        assert len(set(asked)) == len(asked) and tokens[source].tolist() == answers.tolist()


@pytest.mark.parametrize("w, L, pairs", [
    *((w, L, 0) for w, L in SHAPES), (32, 32, 8), (32, 64, 4), (32, 64, 16), (32, 160, 20),
    (64, 64, 16), (64, 320, 32)])
def test_mqar_answers_are_in_the_dictionary(w, L, pairs):
    config = large(w)
    rows = made("mqar", L, config, items=pairs)
    half = config.mqar_symbols // 2
    for tokens, at, answers, source in zip(*rows, strict=True):
        store, i = {}, 0
        while tokens[i] >= lr.FIRST and tokens[i + 1] >= lr.FIRST + half:
            store[tokens[i]] = (tokens[i + 1], i + 1)
            i += 2
        assert 2 * len(store) == i and all(key < lr.FIRST + half for key in store)
        assert len({value for value, _ in store.values()}) == len(store)
        if pairs or L > 3 * w:
            assert len(store) == (pairs or config.pairs)
        assert 1 <= len(store) <= (pairs or config.pairs)
        assert i <= (i if pairs else mqar_start(w, L)) <= at.min()
        questions = [int(p) for p in range(i, L) if tokens[p] >= lr.FIRST]
        assert at.tolist() == questions
        assert sorted(tokens[at]) == sorted(store)  # every key once; no value is shown again
        assert answers.tolist() == [store[key][0] for key in tokens[at]]
        assert source.tolist() == [store[key][1] for key in tokens[at]]
        assert tokens[source].tolist() == answers.tolist()
        assert ((source - 1) // w == source // w).all()  # no block divides a pair


@pytest.mark.parametrize("w, L, blocks", [
    (32, 64, {1}), (32, 128, {3}), (32, 160, {3, 4}), (32, 288, {7, 8}), (64, 320, {3, 4})])
def test_mqar_without_pairs_asks_in_the_last_blocks(w, L, blocks):
    """Uniformly: of the 3200 questions about half are in each of two blocks, give or take six
    standard deviations."""
    rows = made("mqar", L, large(w), rows=200)
    counts = Counter((rows.at // w).ravel().tolist())
    assert set(counts) == blocks
    assert len(blocks) == 1 or all(abs(count - 1600) < 170 for count in counts.values())


def test_mqar_with_pairs_asks_uniformly_behind_them():
    """Chi-square over the 56 positions, and over eighths of them for the first pair alone; the
    bounds are passed by chance less than once in 10,000 seeds."""
    rows = made("mqar", 64, large(32), rows=2500, items=4)
    positions = np.bincount(rows.at.ravel(), minlength=64)
    assert not positions[:8].any() and positions[8:].sum() == 10_000
    wanted = 10_000 / 56
    assert ((positions[8:] - wanted) ** 2 / wanted).sum() < 105
    for pair in range(4):
        where = rows.at[rows.source == 2 * pair + 1]  # (2500,)
        eighths = np.bincount((where - 8) // 7, minlength=8)
        assert eighths.sum() == 2500
        assert ((eighths - 312.5) ** 2 / 312.5).sum() < 30


@few_and_all
@every_shape
def test_repeats_answers_are_counts_and_the_last(w, L, items):
    rows = made("repeats", L, large(w), items=items)
    wanted = min(items or 6, ((w // 2 if L == w else w) - 1) // 4)
    quiz, often = quiz_start(w, L), set()
    for tokens, at, answers, source in zip(*rows, strict=True):
        end, last = only(tokens, lr.END), only(tokens, lr.LAST)
        begin = end
        while begin and tokens[begin - 1] >= lr.FIRST:
            begin -= 1
        shown = tokens[begin:end].tolist()
        counted, asked = Counter(shown), run_of(tokens[last + 1 :: 2], 0)
        assert max(counted.values()) <= 4 and len(counted) == wanted
        often |= set(counted.values())
        assert sorted(asked) == sorted(counted)  # each once
        assert at.tolist() == [last + 2 * i for i in range(len(asked) + 1)]
        assert set(tokens[at[1:]]) == {lr.COUNT}
        assert answers.tolist() == [shown[-1], *(lr.ONCE - 1 + counted[x] for x in asked)]
        final = {token: begin + i for i, token in enumerate(shown)}
        assert source.tolist() == [end - 1, *(final[x] for x in asked)]
        assert run_of(tokens, quiz) == [] or quiz > last
        assert not set(tokens[quiz : last + 1]) & set(shown)  # when LAST is asked
        assert not ((tokens >= lr.ONCE) & (tokens < lr.FIRST)).any()  # counts are never shown
    assert often == {1, 2, 3, 4}


@few_and_all
@every_shape
def test_brackets_word_with_its_closers_is_balanced(w, L, items):
    config = large(w)
    kinds = config.kinds
    rows, count = made("brackets", L, config, rows=40, items=items), items or 8
    deepest = 0
    for tokens, at, answers, source in zip(*rows, strict=True):
        start, close_at = only(tokens, lr.START), only(tokens, lr.CLOSE)
        word, stack = run_of(tokens, start + 1), []
        for place, token in enumerate(word, start + 1):
            kind = token - lr.FIRST
            if kind < kinds:
                stack.append((kind, place))
            else:
                assert stack.pop()[0] == kind - kinds  # never a wrong one
            deepest = max(deepest, len(stack))
        assert len(stack) == count and len(word) <= min(w // 2, count + 4)
        left = stack[::-1]
        assert answers.tolist() == [lr.FIRST + kinds + kind for kind, _ in left]
        assert source.tolist() == [place for _, place in left]
        assert (tokens[source] + kinds).tolist() == answers.tolist()
        assert at.tolist() == list(range(close_at, close_at + count))
        assert run_of(tokens, close_at + 1) == answers.tolist()
        symbols = [token - lr.FIRST for token in tokens if token >= lr.FIRST]
        depth = np.cumsum([1 if kind < kinds else -1 for kind in symbols])
        assert depth[-1] == 0 and depth.min() == 0
    assert count < deepest <= count + 2


@every_shape
def test_random_answers_are_the_next_tokens(w, L):
    config = large(w)
    rows = made("random", L, config)
    assert (rows.at == np.arange(L - w // 2, L)).all() and (rows.source == -1).all()
    assert np.array_equal(rows.answers[:, :-1], rows.inputs[:, L - w // 2 + 1 :])
    assert rows.answers.min() >= lr.FIRST
    assert len(np.unique(rows.inputs)) == config.alphabet  # no filler, every symbol


def test_config_takes_as_many_pairs_and_items_as_a_block_holds():
    """One more of either is a mistake, among those of the command below."""
    config = tiny(items=24, pairs=32)
    assert made("copy", 64, config).at.shape[1] == 24
    assert made("mqar", 160, config).at.shape[1] == 32


def test_config_full_has_folders_of_its_own():
    """Else a run of --full would be refused for what a reduced one has left, or replace it."""
    full, reduced = lr.Config(**lr.FULL), lr.Config()
    for name in ("data_dir", "save_dir", "plot_dir"):
        assert getattr(full, name) != getattr(reduced, name)


# ══ Data on disk ═════════════════════════════════════════════════════════════════════════════════


@pytest.fixture
def copy_data(tmp_path, capsys) -> lr.Config:
    """The Config of copy's data, generated in tmp_path."""
    config = tiny(tasks="copy", data_dir=str(tmp_path))
    lr.generate(config)
    capsys.readouterr()
    return config


def test_data_hash_is_of_the_seed(copy_data, tmp_path):
    digest = lr.load_data(copy_data, "copy", "train")[1]
    assert digest == lr.content_hash(lr.train_part(copy_data, "copy"))
    other = lr.train_part(dataclasses.replace(copy_data, data_seed=1), "copy")
    assert digest != lr.content_hash(other)


@pytest.mark.parametrize("name", lr.Rows._fields)
def test_data_hash_covers_every_field(copy_data, name):
    groups, digest = lr.load_data(copy_data, "copy", "test")
    groups[-1][name][-1, -1] += 1
    assert lr.content_hash(groups) != digest


@pytest.mark.parametrize("name", ["chance", "chance_loss", "distance", "least", "within"])
def test_data_hash_covers_every_number(copy_data, name):
    groups, digest = lr.load_data(copy_data, "copy", "test")
    groups[-1][name] += 0.001
    assert lr.content_hash(groups) != digest


def test_data_hash_is_that_of_another_process(copy_data):
    """Whatever the order of a group's keys; that of a set of words differs between processes."""
    groups, digest = lr.load_data(copy_data, "copy", "test")
    assert lr.content_hash([dict(reversed(group.items())) for group in groups]) == digest
    code = ("import sys, torch, long_range as lr\n"
            "print(lr.content_hash(torch.load(sys.argv[1], weights_only=True)['groups']))")
    path = lr.data_path(copy_data, "copy", "test")
    for seed in ("1", "2"):  # words of this process may be in the order of one of them
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], text=True, timeout=120, capture_output=True,
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed})
        assert done.stdout.strip() == digest, done.stderr


def test_data_groups_have_the_rows_asked_for(copy_data):
    groups = lr.load_data(copy_data, "copy", "train")[0]
    found = [(g["split"], g["length"], g["at"].shape[1], *g["inputs"].shape) for g in groups]
    assert found == [  # split, length, items of the pattern, rows
        ("train", 64, 3, 160, 64), ("train", 64, 6, 32, 64), ("train", 32, 6, 32, 32),
        ("valid", 64, 3, 8, 64), ("valid", 64, 6, 8, 64), ("valid", 32, 6, 8, 32)]
    tested = lr.load_data(copy_data, "copy", "test")[0]
    assert [tuple(g["inputs"].shape) for g in tested] == [(6, 32), (6, 64), (6, 96)]
    assert all(g["split"] == "test" for g in tested)


def test_data_mqar_groups_have_their_pairs():
    config = tiny()
    found = [(g["split"], g["length"], g["items"], g["at"].shape[1])
             for g in lr.train_part(config, "mqar")]
    assert found == [("train", 64, 4, 4), ("train", 32, 2, 2), ("valid", 64, 4, 4),
                     ("valid", 32, 2, 2)]  # fmt: skip


def test_data_distance_is_from_the_source(copy_data):
    for group in lr.load_data(copy_data, "copy", "test")[0]:
        gaps = [(a - s) / 32 for at, source in zip(group["at"].tolist(), group["source"].tolist(),
                                                   strict=True)
                for a, s in zip(at, source, strict=True)]  # fmt: skip
        assert group["distance"] == pytest.approx(sum(gaps) / len(gaps))
        assert group["least"] == pytest.approx(min(gaps))


def test_data_within_is_the_share_asked_in_the_block_of_its_answer(tmp_path):
    config, found = tiny(tasks="mqar", data_dir=str(tmp_path)), {}
    lr.generate(config)
    for group in lr.load_data(config, "mqar", "test")[0]:
        blocks = [(a // 32, s // 32) for a, s in zip(
            group["at"].flatten().tolist(), group["source"].flatten().tolist(), strict=True)]
        found[group["length"], group["items"]] = group["within"]
        assert group["within"] == pytest.approx(sum(a == s for a, s in blocks) / len(blocks))
    assert found[32, 0] == 1 and found[64, 0] == found[96, 0] == 0
    assert 0 < found[64, 4] < 1 and 0 < found[96, 12] < 1


@every_task
def test_data_splits_share_no_row(task, tmp_path):
    config = tiny(lengths="64,32", mqar_test="64:4,32:2", test_rows=20, tasks=task)
    groups = lr.train_part(config, task)
    groups += [lr.make_group(task, "test", length, items, 20, config)
               for length, items in lr.train_groups(config, task)]
    seen = {}
    for group in groups:
        for row in group["inputs"].numpy():
            assert seen.setdefault(row.tobytes(), group["split"]) == group["split"]
    assert set(seen.values()) == {"train", "valid", "test"}


def test_generate_twice_keeps_the_files(copy_data, tmp_path, capsys):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert len(before) == 2
    lr.load_data.cache_clear()
    lr.generate(copy_data)
    out = capsys.readouterr().out
    assert out.count("kept") == 2 and "wrote" not in out
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns)
                      for path in tmp_path.iterdir()}  # fmt: skip


def test_generate_replaces_data_of_other_fields(copy_data, tmp_path, capsys):
    other = dataclasses.replace(copy_data, items=5)
    lr.generate(other)
    out = capsys.readouterr().out
    assert out.count("replaced") == 2 and "wrote" not in out and "kept" not in out
    assert lr.load_data(other, "copy", "train")[0][1]["at"].shape[1] == 5


def test_load_data_names_the_hash_of_altered_rows(copy_data, tmp_path):
    path = lr.data_path(copy_data, "copy", "train")
    payload = torch.load(path, weights_only=True)
    payload["groups"][1]["inputs"][3, 7] += 1
    torch.save(payload, path)
    before = path.read_bytes()
    lr.load_data.cache_clear()
    with pytest.raises(ValueError, match="sha256.*altered") as error:
        lr.load_data(copy_data, "copy", "train")
    assert payload["sha256"][:12] in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ValueError, match="sha256.*altered"):
        lr.generate(copy_data)  # it is not replaced unasked
    assert path.read_bytes() == before


def test_load_data_names_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="long_range_copy_train.*generate --tasks copy"):
        lr.load_data(tiny(data_dir=str(tmp_path)), "copy", "train")


@pytest.mark.parametrize("content", ["half", "empty", "text", "other"])
def test_load_data_names_a_damaged_file(copy_data, content):
    path = lr.data_path(copy_data, "copy", "test")
    whole = path.read_bytes()
    if content == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"hi"}[content])
    lr.load_data.cache_clear()
    with pytest.raises(ValueError, match="long_range_copy_test.*delete it"):
        lr.load_data(copy_data, "copy", "test")


@pytest.mark.parametrize("name, value, part", [
    ("data_seed", 5, "train"), ("items", 5, "train"), ("train_rows", 33, "test"),
    ("lengths", "32", "test"), ("train", "64", "train"), ("symbols", 66, "test")])
def test_load_data_names_the_field_that_differs(copy_data, name, value, part):
    other = dataclasses.replace(copy_data, **{name: value})
    with pytest.raises(ValueError, match=f"generated with {name} = .*--{name}"):
        lr.load_data(other, "copy", part)


@pytest.mark.parametrize("task", ["repeats", "brackets", "copy", "mqar", "random"])
def test_context_free_equals_a_naive_count(task):
    config = tiny(alphabet=4, symbols=32, mqar_symbols=24)
    V = lr.vocabulary(task, config)
    train = [lr.make_group(task, "train", L, 0, 60, config) for L in (64, 32)]
    test = lr.make_group(task, "test", 96, 0, 30, config)
    counts: dict[int, Counter] = {}
    for group in train:
        for tokens, at, answers in zip(
                group["inputs"].tolist(), group["at"].tolist(), group["answers"].tolist(),
                strict=True):
            for place, answer in zip(at, answers, strict=True):
                counts.setdefault(min(tokens[place], lr.FIRST), Counter())[answer] += 1
    fewest = most = loss = total = 0
    for tokens, at, answers in zip(
            test["inputs"].tolist(), test["at"].tolist(), test["answers"].tolist(), strict=True):
        for place, answer in zip(at, answers, strict=True):
            seen = counts[min(tokens[place], lr.FIRST)]
            best = [k for k, count in seen.items() if count == max(seen.values())]
            fewest, most = fewest + (best == [answer]), most + (answer in best)
            loss -= math.log((seen[answer] + 1) / (sum(seen.values()) + V))
            total += 1
    accuracy, found = lr.context_free(train, test, V)
    assert fewest / total <= accuracy <= most / total  # the same unless two are as frequent
    assert most - fewest < 0.1 * total
    assert found == pytest.approx(loss / total, rel=1e-5)


def test_context_free_of_brackets_is_one_of_the_kinds():
    config = tiny(kinds=4)
    train = [lr.make_group("brackets", "train", 64, 0, 300, config)]
    test = lr.make_group("brackets", "test", 96, 0, 300, config)
    accuracy, loss = lr.context_free(train, test, lr.vocabulary("brackets", config))
    assert abs(accuracy - 1 / 4) < 4 * math.sqrt(0.25 * 0.75 / test["answers"].numel())
    assert abs(loss - math.log(4)) < 0.05  # the smoothing costs 40 / 2400 of it


def test_context_free_counts_each_kind_of_question_apart():
    """By hand, with 64 symbols: three questions at one marker, one at another, two at symbols,
    which are one kind; then an answer and a kind of question that training has not seen."""

    def one_row(*asked) -> dict:
        tokens, answers = zip(*asked, strict=True)
        return {"inputs": torch.tensor([tokens], dtype=torch.int16),
                "at": torch.arange(len(tokens), dtype=torch.int16)[None],
                "answers": torch.tensor([answers], dtype=torch.int16)}

    a, b = lr.RECALL, lr.CLOSE
    train = [one_row((a, 40), (a, 40), (b, 41)), one_row((a, 42), (33, 43), (34, 43))]
    for asked, right, p in (((a, 40), 1, 3 / 67), ((a, 42), 0, 2 / 67), ((a, 41), 0, 1 / 67),
                            ((b, 41), 1, 2 / 65), ((63, 43), 1, 3 / 66), ((33, 40), 0, 1 / 66),
                            ((lr.QUERY, 40), 0, 1 / 64)):  # fmt: skip
        accuracy, loss = lr.context_free(train, one_row(asked), 64)
        assert accuracy == right and loss == pytest.approx(-math.log(p), rel=1e-5), asked
    accuracy, loss = lr.context_free(train, one_row((a, 40), (a, 41), (b, 41), (b, 40)), 64)
    assert accuracy == 0.5
    assert loss == pytest.approx(-math.log(3 / 67 / 67 * 2 / 65 / 65) / 4, rel=1e-5)


# ══ KNNStore ═════════════════════════════════════════════════════════════════════════════════════


def random_store(C: int, D: int, top_k: int, seed: int = 0) -> lr.KNNStore:
    """A float64 store with every parameter away from its initial value."""
    torch.manual_seed(seed)
    store = lr.KNNStore(C, D, top_k).double()
    with torch.no_grad():
        for parameter in store.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        store.log_strength.fill_(1.3)
    return store


def naive_knn(store: lr.KNNStore, h, state):
    """h (B, T, C), state of n tokens -> h_out: a loop over rows and tokens, the tokens before each
    in a list, the nearest chosen by sorting."""
    out = []
    for row in range(h.shape[0]):
        stored = list(zip(state.keys[row], state.values[row], strict=True))
        for x in h[row]:
            spread = ((x - x.mean()) ** 2).mean() + store.norm.eps
            z = (x - x.mean()) / spread.sqrt() * store.norm.weight + store.norm.bias  # (C,)
            query = store.query.weight @ z + store.query.bias  # (D,)
            key = store.key.weight @ z + store.key.bias
            query, key = query / query.norm(), key / key.norm()
            cosine = [(query @ k, value) for k, value in stored]
            nearest = sorted(cosine, key=lambda pair: -pair[0].item())[: store.top_k]
            powers = [(store.log_strength.exp() * c).exp() for c, _ in nearest]
            read = sum((p * value for p, (_, value) in zip(powers, nearest, strict=True)),
                       torch.zeros_like(x))
            out.append(x + store.read_proj.weight @ (read / (sum(powers) if powers else 1.0)))
            stored.append((key, z))
    return torch.stack(out).view_as(h)


@pytest.mark.parametrize("top_k", [1, 3, 50])
@pytest.mark.parametrize("B, T, n, C, D", [(2, 7, 0, 5, 3), (3, 4, 6, 3, 5), (1, 1, 0, 4, 2)])
def test_knn_store_equals_a_naive_loop(B, T, n, C, D, top_k):
    store = random_store(C, D, top_k)
    h = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    keys = F.normalize(torch.randn(B, n, D, dtype=torch.float64), dim=-1).requires_grad_()
    values = torch.randn(B, n, C, dtype=torch.float64, requires_grad=True)
    state = lr.KNNState(keys, values)
    found, wanted = store(h, state)[0], naive_knn(store, h, state)
    close(found, wanted, 1e-12)
    inputs = [h, keys, values, *store.parameters()]
    weight = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True,
                                          materialize_grads=True) for y in (found, wanted)),
                    strict=True):  # fmt: skip
        assert torch.isfinite(a).all()
        close(a, b, 1e-10)


def test_knn_store_gradient_equals_finite_differences():
    store = random_store(4, 3, top_k=3, seed=3)
    h = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: store(x, store.init_state(2))[0], (h,))


def test_knn_store_first_token_of_an_empty_store_reads_nothing():
    store = random_store(5, 3, top_k=4)
    h = torch.randn(3, 6, 5, dtype=torch.float64)
    out = store(h, store.init_state(3))[0]
    assert torch.equal(out[:, 0], h[:, 0])
    assert (out[:, 1:] != h[:, 1:]).any(-1).all()


def test_knn_store_starts_as_the_identity():
    torch.manual_seed(0)
    store = lr.KNNStore(6, 4, 3)
    h = torch.randn(2, 9, 6)
    assert torch.equal(store(h, store.init_state(2))[0], h)


@pytest.mark.parametrize("cuts", [(0, 1, 4, 11), (0, 7, 11)])
def test_knn_store_by_segments_equals_at_once(cuts):
    store = random_store(5, 3, top_k=3)
    h = torch.randn(2, 11, 5, dtype=torch.float64)
    whole, after, trace = store(h, store.init_state(2))
    parts, state, slots = [], store.init_state(2), []
    for start, end in zip(cuts, cuts[1:], strict=False):
        out, state, part = store(h[:, start:end], state)
        parts.append(out)
        slots.append(part.write_slots)
    close(torch.cat(parts, 1), whole, 1e-12)
    close(state.keys, after.keys, 1e-12)
    close(state.values, after.values, 1e-12)
    assert torch.equal(torch.cat(slots, 1), trace.write_slots)


def test_knn_store_isolates_rows():
    store = random_store(5, 3, top_k=3)
    h = torch.randn(3, 8, 5, dtype=torch.float64)
    changed = h.clone()
    changed[1] += torch.randn(8, 5)
    (out, after, _), (other, later, _) = (store(x, store.init_state(3)) for x in (h, changed))
    for row in (0, 2):
        close(other[row], out[row], 1e-13)
        close(later.keys[row], after.keys[row], 1e-13)
    assert (other[1] - out[1]).abs().max() > 0.1


def test_knn_store_keeps_the_contract_of_a_memory():
    B, T, n, C, D = 3, 4, 5, 6, 2
    store = lr.KNNStore(C, D, top_k=3)
    state = store.init_state(B)
    assert [tuple(x.shape) for x in state] == [(B, 0, D), (B, 0, C)]
    _, state, _ = store(torch.randn(B, n, C), state)
    out, state, trace = store(torch.randn(B, T, C), state)
    assert type(state) is lr.KNNState and out.shape == (B, T, C)
    assert [tuple(x.shape) for x in state] == [(B, n + T, D), (B, n + T, C)]
    close(state.keys.norm(dim=-1), torch.ones(B, n + T))
    assert trace.write_gate.shape == (B, T) and (trace.write_gate == 1).all()
    assert (trace.write_slots == torch.arange(n, n + T).expand(B, T)).all()
    rolled = lr.map_state(lambda x: x.roll(1, 0), state)
    assert type(rolled) is lr.KNNState and torch.equal(rolled.keys[0], state.keys[-1])


# ══ LongRangeModel ═══════════════════════════════════════════════════════════════════════════════

# Trained to 96 tokens, so that the full arm sees three blocks of the others.
WIDE = {"train": "96,32", "mqar_train": "96:4", "knn_top_k": 200}


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


def random_tokens(B: int, L: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 96, (B, L), generator=draw).to(lr.device())


@torch.no_grad()
def hidden_change(model: lr.LongRangeModel, place: int, L: int = 96) -> torch.Tensor:
    """How much one other token at `place` changes the hidden state of each token: (L,)."""
    tokens = random_tokens(2, L)
    other = tokens.clone()
    other[:, place] = (other[:, place] + 7) % 96
    out, changed = (model.hidden(x, model.init_state(2))[0] for x in (tokens, other))
    return (out - changed).abs().amax((0, 2))


@pytest.mark.parametrize("arm", ["window", "knn_store", "dnc", "edm"])
@pytest.mark.parametrize("place", [0, 40, 95])
def test_model_trunk_sees_its_block_alone(arm, place):
    change = hidden_change(tiny_model(arm, read=False), place)
    end = place // 32 * 32 + 32
    assert change[place] > 1e-3 and (change[place:end] > 1e-5).all()
    outside = torch.cat([change[:place], change[end:]])
    assert outside.numel() == 0 or outside.max() < 1e-6


@pytest.mark.parametrize("arm", ["knn_store", "dnc", "edm"])
def test_model_memory_reaches_later_blocks_alone(arm):
    change = hidden_change(tiny_model(arm), 40)
    assert change[:40].max() < 1e-6 and change[64:].max() > 1e-4


def test_model_full_arm_sees_all_that_is_earlier():
    change = hidden_change(tiny_model("full"), 40)
    assert change[:40].max() < 1e-6 and (change[40:] > 1e-6).all()


@pytest.mark.parametrize("task, L", [("copy", 96), ("mqar", 64)])
def test_longest_is_that_of_the_task(task, L):
    assert lr.longest(tiny(train="64,96:3,32", mqar_train="32:2,64:4"), task) == L


@pytest.mark.parametrize("task, L", [("copy", 96), ("mqar", 64)])
@pytest.mark.parametrize("arm", lr.ARMS)
def test_model_segment_is_the_longest_row_of_its_task(arm, task, L):
    """The full arm's block too: else a training row would be cut, or its positions untrained."""
    model = lr.build_model(tiny(train="64,96:3,32", mqar_train="32:2,64:4"), task, arm, 0)
    assert model.segment == L and model.block == (L if arm == "full" else 32)
    assert len(model.controller.wpe.weight) == model.block * (2 if arm == "edm" else 1)


@pytest.mark.parametrize("L", [32, 96])
def test_model_full_arm_equals_the_trunk_at_once(L):
    """Rows up to the longest trained on are one block of the full arm, and short rows too."""
    model, tokens = tiny_model("full"), random_tokens(2, L)
    with torch.no_grad():
        wanted = model.controller(input_ids=tokens).last_hidden_state
        close(model.hidden(tokens, None)[0], wanted)


@pytest.mark.parametrize("arm", ["window", "knn_store", "dnc", "edm"])
@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize("cuts", [(0, 32, 64, 96), (0, 64, 96)])
@torch.no_grad()
def test_model_by_segments_equals_at_once(arm, links, cuts):
    model, tokens = tiny_model(arm, use_links=links), random_tokens(2, 96)
    whole, after, *_ = model.hidden(tokens, model.init_state(2))
    state, parts = model.init_state(2), []
    for start, end in zip(cuts, cuts[1:], strict=False):
        h, state, *_ = model.hidden(tokens[:, start:end], state)
        parts.append(h)
    close(torch.cat(parts, 1), whole, 1e-4)
    assert (state is None) == (after is None) == (arm == "window")
    for a, b in zip(state or (), after or (), strict=True):
        close(a, b, 1e-4)


@every_task
def test_model_arms_have_as_many_parameters(task):
    config = tiny(train="256,32", mqar_train="256:4")
    sizes = {arm: lr.count_parameters(lr.build_model(config, task, arm, 0))
             for arm in lr.ARMS}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes


@pytest.mark.parametrize("arm", lr.ARMS)
def test_model_is_of_its_seed(arm):
    config = tiny(**WIDE)
    one, same, other = (lr.build_model(config, "copy", arm, seed).state_dict()
                        for seed in (3, 3, 4))  # fmt: skip
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["controller.wte.weight"], other["controller.wte.weight"])


def test_model_arms_start_from_the_same_weights():
    """Where shapes agree, the controllers of the arms with blocks start the same."""
    config = tiny(**WIDE)
    first, *others = (lr.build_model(config, "copy", arm, 0).controller.state_dict()
                      for arm in ("window", "knn_store", "dnc", "edm"))  # fmt: skip
    for other in others:
        for name, weight in first.items():
            if weight.shape == other[name].shape:
                assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize("reads", [1, 2])
@torch.no_grad()
def test_init_state_gives_more_slots(links, reads):
    """As a model of so many slots has them: zeros, and the same results from the same weights."""
    few = tiny_model("dnc", use_links=links, num_reads=reads, mem_slots=5)
    many = tiny_model("dnc", use_links=links, num_reads=reads, mem_slots=9)
    many.load_state_dict(few.state_dict())
    state, wanted = few.init_state(3, 9), many.init_state(3)
    assert type(state) is type(wanted)
    for name, x in state._asdict().items():
        assert x.shape == getattr(wanted, name).shape, name
        assert not x.any(), name
    tokens = random_tokens(3, 32)
    close(few.hidden(tokens, state)[0], many.hidden(tokens, wanted)[0])
    for slots in (0, 4, 5):  # never fewer than its own
        assert few.init_state(3, slots).memory.shape[1] == 5


@pytest.mark.parametrize("width", [6, 7])
def test_waves_are_those_of_vaswani(width):
    found = lr.waves(9, width)
    for place in range(9):
        for i in range(width):
            angle = place / 10_000 ** (i // 2 * 2 / width)
            wanted = math.cos(angle) if i % 2 else math.sin(angle)
            assert found[place, i].item() == pytest.approx(wanted, abs=1e-5)


# ══ Training ═════════════════════════════════════════════════════════════════════════════════════


def fake_groups() -> list[dict]:
    return [{"length": length, "inputs": torch.zeros(rows, length)}
            for length, rows in ((64, 10), (32, 9), (512, 3))]


def test_batches_are_the_same_for_every_arm():
    config = tiny(curriculum=0.25)
    one, same, other = ([(group["length"], rows.tolist())
                         for group, rows in lr.batches(fake_groups(), config, 40, seed)]
                        for seed in (5, 5, 6))  # fmt: skip
    assert len(one) == 40 and one == same != other


def test_batches_begin_with_the_first_group_alone():
    config = tiny(curriculum=0.25)
    lengths = [group["length"] for group, _ in lr.batches(fake_groups(), config, 400, 0)]
    assert set(lengths[:100]) == {64}
    counts = Counter(lengths[100:])
    assert set(counts) == {64, 32, 512} and all(70 < n < 130 for n in counts.values())


def test_batches_have_the_tokens_asked_for_and_no_row_twice():
    """As many whole rows as batch_tokens hold, at least one; each group's rows are used up in a
    random order before one comes again."""
    config, drawn = tiny(curriculum=0.1, batch_tokens=200), {}
    for group, rows in lr.batches(fake_groups(), config, 300, 0):
        length = group["length"]
        assert len(rows) == {64: 3, 32: 6, 512: 1}[length]
        drawn.setdefault(length, []).extend(rows.tolist())
    for group in fake_groups():
        n, rows = len(group["inputs"]), drawn[group["length"]]
        rounds = [rows[i : i + n] for i in range(0, len(rows) - n + 1, n)]
        assert len(rounds) > 5 and all(sorted(r) == list(range(n)) for r in rounds)
        assert len({tuple(r) for r in rounds}) > 1


@pytest.mark.parametrize("step, share", [
    (0, 0.1), (4, 0.5), (9, 1.0), (30, 1.0), (60, 1.0), (80, 0.5), (99, 0.025)])
def test_rate_share_rises_and_falls_linearly(step, share):
    """Of 100 steps over the first ten, and over the last forty to almost zero."""
    config = tiny(lr_warmup=0.1, lr_decay=0.4)
    assert lr.rate_share(step, 100, config) == pytest.approx(share)
    assert lr.rate_share(10 * step + 9, 1000, config) == pytest.approx(share, abs=0.03)


def test_rate_share_is_one_without_warmup_and_decay():
    config = tiny(lr_warmup=0.0, lr_decay=0.0)
    assert [lr.rate_share(step, 3, config) for step in range(3)] == [1.0, 1.0, 1.0]


def test_chosen_jobs_take_the_rate_that_validates_best(monkeypatch):
    """By loss, whatever the accuracy. The other seeds get the rate of the first."""
    config = tiny(tasks="copy", arms="window,dnc", seeds="3,4", lr_grid="0.01,0.02,0.03")
    results = {("window", 0.01): (0.5, 1.0), ("window", 0.02): (0.4, 0.1),
               ("window", 0.03): (0.6, 2.0), ("dnc", 0.01): (0.9, 0.5),
               ("dnc", 0.02): (0.9, 0.6), ("dnc", 0.03): (0.9, 0.4)}  # fmt: skip

    def found(_, job):
        assert job.seed == 3
        accuracy, loss = results[job.arm, job.lr]
        return {"val_accuracy": accuracy, "val_loss": loss}

    monkeypatch.setattr(lr, "load_checkpoint", found)
    assert lr.chosen_jobs(config) == [
        lr.Job("copy", "window", 3, 0.02), lr.Job("copy", "window", 4, 0.02),
        lr.Job("copy", "dnc", 3, 0.03), lr.Job("copy", "dnc", 4, 0.03)]
    assert len(lr.first_jobs(config)) == 6


@pytest.mark.parametrize("arm", lr.ARMS)
def test_optimizers_cover_every_parameter_once(arm):
    model = tiny_model(arm)
    both = lr.optimizers(model, tiny(adam_lr=0.5), 0.02)
    found = [id(p) for o in both for group in o.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert [group["lr"] for o in both for group in o.param_groups] == [0.02, 0.01]


@pytest.mark.parametrize("fields", [
    {"train": "96"}, {"tasks": "mqar", "mqar_train": "96:4"}], ids=["train", "mqar_train"])
def test_config_refuses_an_edm_without_rows_for_its_trunk(fields):
    with pytest.raises(ValueError, match=f"^{[*fields][-1]} = 96: must be at most 64"):
        tiny(arms="edm", **{"tasks": "copy"} | fields)


def test_cost_of_gates_closes_wide_open_gates_at_first_and_leaves_decided_ones_in_the_end():
    logits = torch.tensor([9.0, 3.0, -9.0], dtype=torch.float64, requires_grad=True)

    def slope(late: float, closing: float) -> torch.Tensor:
        cost = 3 * lr.gate_cost(logits.sigmoid(), late, closing)  # the mean is over three
        return torch.autograd.grad(cost, logits)[0]

    g = logits.detach().sigmoid()
    undecided = g * (1 - g) * (1 - 2 * g)
    torch.testing.assert_close(slope(0.25, 0.1), 0.25 * undecided + 0.075 * g)
    torch.testing.assert_close(slope(1.0, 0.1), undecided)
    assert slope(0.25, 0.1)[0] > 0.07 > 1e-3 > slope(0.25, 0.0)[0].abs()
    assert (slope(0.25, 0.1) > 0).all()  # what the second cost would hold up falls nevertheless
    saturated = torch.ones(2, requires_grad=True)
    assert lr.gate_cost(saturated, 0.5, 0.1).isfinite()


def test_edm_arm_trains_its_trunk_inside_the_window_and_then_freezes_it(tmp_path, monkeypatch):
    """First without memory, on rows of two windows; then the notebook alone, on all."""
    config = tiny(tasks="copy", arms="edm", train="64:4,32,64,96", edm_base_steps=6, steps=4,
                  edm_slots=64, data_dir=str(tmp_path), save_dir=str(tmp_path))
    lr.generate(config)
    calls, step = [], lr.train_step

    def spy(model, both, group, rows, rate, config, carried=False, late=0.0):
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        found = step(model, both, group, rows, rate, config, carried, late)
        changed = {name.split(".")[0] for name, weight in model.named_parameters()
                   if not torch.equal(weight, before[name])}
        calls.append((carried, group["length"], group["items"], changed))
        return found

    monkeypatch.setattr(lr, "train_step", spy)
    lr.train_run(config, lr.Job("copy", "edm", 0, 0.02))
    base, memory = calls[:6], calls[6:]
    assert len(memory) == 4 and [call[0] for call in calls] == [False] * 6 + [True] * 4
    assert base[0][1:3] == base[1][1:3] == (64, 4) and all(call[1] <= 64 for call in base)
    assert set.union(*(call[3] for call in base)) == {"controller", "output"}
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
        self.block, self.segment, self.segments, self.asked = block, segment, [], []

    def init_state(self, rows: int, slots: int = 0) -> First:
        self.asked.append((rows, slots))
        return First(torch.zeros(rows, 1, device=lr.device()))

    def hidden(self, tokens, state):
        self.segments.append(tokens.shape[1])
        first = torch.where(state.token == 0, tokens[:, :1].float(), state.token)
        return first.unsqueeze(1).expand(*tokens.shape, 1), First(first), None

    def logits(self, h):
        return 5.0 * F.one_hot(h[:, 0].long(), 64)


class Echo(FirstToken):
    """Answers a question with the token at which it is asked."""

    def hidden(self, tokens, state):
        self.segments.append(tokens.shape[1])
        return tokens.unsqueeze(2).float(), state, None


def hand_group(rows: int, L: int, at: list[int], answers) -> dict:
    """Random rows that begin with 1, 2, 3, …; every row is asked at the same places."""
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.integers(1, 64, (rows, L)).astype(np.int16))
    inputs[:, 0] = 1 + torch.arange(rows)
    places = torch.tensor(at, dtype=torch.int16).expand(rows, -1)
    return {"split": "test", "length": L, "items": 0, "inputs": inputs, "at": places,
            "answers": answers(inputs).to(torch.int16)}  # fmt: skip


def loss_of(right: float) -> float:
    """Mean cross-entropy of a stub's logits of which this share is right."""
    return math.log(math.exp(5) + 63) - 5 * right


@pytest.mark.parametrize("rows", [2, 6, 17, 35])
def test_score_counts_what_is_right(rows, monkeypatch):
    """The token at the question is the answer to three of the four, over several segments and
    batches."""
    monkeypatch.setattr(lr, "EVAL_TOKENS", 64 * 8)

    def answers(inputs):
        found = inputs[:, [5, 40, 70, 159]].clone()
        found[:, 2] = found[:, 2] % 63 + 1
        return found

    model, group = Echo(32), hand_group(rows, 160, [5, 40, 70, 159], answers)
    found = lr.score(model, group, tiny())
    assert found["accuracy"] == 0.75
    assert found["val_loss"] == pytest.approx(loss_of(0.75), rel=1e-5)
    assert found["tokens_per_s"] > 0
    assert sum(n for n, _ in model.asked) == rows


@pytest.mark.parametrize("rows, L, segment, batches", [
    (11, 64, 64, [4, 4, 3]), (9, 64, 64, [4, 5]),  # a row alone would be its own neighbour
    (9, 32, 64, [9]), (8, 96, 32, [8]), (7, 96, 64, [4, 3]), (4, 512, 512, [2, 2]),
    (5, 512, 512, [2, 3])])  # two at least, however long they are
def test_score_reads_so_many_tokens_at_once(rows, L, segment, batches, monkeypatch):
    monkeypatch.setattr(lr, "EVAL_TOKENS", 256)
    model = FirstToken(32, segment)
    group = hand_group(rows, L, [L - 1], lambda inputs: inputs[:, [0]])
    assert lr.score(model, group, tiny())["accuracy"] == 1.0
    assert [n for n, _ in model.asked] == batches


def test_score_of_no_question_is_nan():
    """Swapped, the questions before the last window are not asked."""
    group = hand_group(4, 96, [10, 63], lambda inputs: inputs[:, [0, 0]])
    found = lr.score(FirstToken(32), group, tiny(), swap=True)
    assert math.isnan(found["accuracy"]) and math.isnan(found["val_loss"])
    assert lr.score(FirstToken(32), group, tiny())["accuracy"] == 1.0


@pytest.mark.parametrize("L, segments", [
    (32, [32]), (64, [32, 32]), (96, [64, 32]), (160, [64, 64, 32]), (192, [64, 64, 32, 32])])
def test_score_carries_the_memory_and_ends_with_one_window(L, segments):
    """Segments as long as training had them, the last window apart. All rows remember."""
    model = FirstToken(32)
    group = hand_group(4, L, [L // 2, L - 1], lambda inputs: inputs[:, [0, 0]])
    assert lr.score(model, group, tiny())["accuracy"] == 1.0
    assert model.segments == segments


def test_score_full_arm_sees_the_row_whole():
    model = FirstToken(96, 96)
    group = hand_group(4, 96, [50, 95], lambda inputs: inputs[:, [0, 0]])
    assert lr.score(model, group, tiny())["accuracy"] == 1.0 and model.segments == [96]


@pytest.mark.parametrize("rows", [2, 6, 17])
def test_score_swapped_gives_the_memory_of_the_row_before(rows):
    """In one batch. Only the last window is scored: the two wrong answers lie before it."""

    def answers(inputs):
        before = inputs[:, 0].roll(1)
        wrong = inputs[:, 0] % 63 + 2
        return torch.stack([wrong, wrong, before, before], dim=1)

    group = hand_group(rows, 160, [10, 127, 128, 159], answers)
    found = lr.score(FirstToken(32), group, tiny(), swap=True)
    assert found["accuracy"] == 1.0 and found["val_loss"] == pytest.approx(loss_of(1), rel=1e-4)
    assert lr.score(FirstToken(32), group, tiny())["accuracy"] == 0.0


def test_score_swapped_leaves_no_row_its_own_memory(monkeypatch):
    monkeypatch.setattr(lr, "EVAL_TOKENS", 256)  # four rows a batch, and one more
    group = hand_group(33, 64, [63], lambda inputs: inputs[:, [0]])
    assert lr.score(FirstToken(32), group, tiny())["accuracy"] == 1.0
    assert lr.score(FirstToken(32), group, tiny(), swap=True)["accuracy"] == 0.0


@pytest.mark.parametrize("split, slots", [("train", 0), ("valid", 0), ("test", 18)])
def test_score_asks_for_two_slots_a_pair_of_a_test(split, slots):
    """In training and validation the memory is as large as the model says."""
    model = FirstToken(32)
    group = hand_group(3, 64, [63], lambda inputs: inputs[:, [0]]) | {"items": 9, "split": split}
    lr.score(model, group, tiny())
    assert model.asked == [(3, slots)]


# ══ Statistics ═══════════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("values, mean, half", [
    ([0.4, 0.6], 0.5, 1.2706),  # 12.706 * 0.1
    ([1.0, 2.0, 3.0], 2.0, 2.4843),  # 4.303 / sqrt(3)
    ([1.0, 2.0, 3.0, 4.0, 5.0], 3.0, 1.9629),  # 2.776 * sqrt(2.5 / 5)
    (list(range(1, 11)), 5.5, 2.1656),  # 2.262 * sqrt(9.1667 / 10)
    ([7.0, 7.0, 7.0], 7.0, 0.0)])  # fmt: skip
def test_mean_and_half_equals_students_interval(values, mean, half):
    found = lr.mean_and_half(values)
    assert found == pytest.approx((mean, half), abs=2e-4)


def test_mean_and_half_of_one_seed_has_no_interval():
    mean, half = lr.mean_and_half([0.25])
    assert mean == 0.25 and math.isnan(half)


@pytest.mark.parametrize("accuracy, chance, wanted", [
    ([1.0, 1.0, 1.0, 1.0], 0.0, "> 8"),  # never falls
    ([1.0, 0.9, 0.7, 0.6], 0.0, "> 8"),  # not half-way
    ([1.0, 0.0, 0.0, 0.0], 0.0, "1.41"),  # half-way between 1 and 2, in the logarithm
    ([1.0, 1.0, 0.0, 0.0], 0.0, "2.83"),
    ([1.0, 0.5, 0.0, 0.0], 0.0, "2"),  # exactly there
    ([0.8, 0.8, 0.6, 0.2], 0.0, "4.76"),  # 4 * 2 ** 0.25: half of 100 %, not of its own start
    ([0.45, 0.9, 0.9, 0.9], 0.0, "< 1"),  # has fallen at the least distance
    ([0.5, 0.5, 0.5, 0.5], 0.0, "< 1"),
    ([1.0, 0.75, 0.5, 0.5], 0.5, "2"),  # half-way to chance, not to zero
    ([0.7, 0.7, 0.7, 0.7], 0.5, "< 1"),
    ([1.0, 0.4, 1.0, 1.0], 0.0, "1.78"),  # 2 ** (5 / 6): the first fall counts
    ([0.02, 0.02, 0.02, 0.02], 0.02, "< 1"),  # nothing was learned
    ([1.0, 1.0, 1.0, 1.0], 1.0, "< 1")])  # nothing was asked that chance does not know
def test_effective_context_is_half_way_to_chance(accuracy, chance, wanted):
    rows = [(d, a, chance) for d, a in zip((1.0, 2.0, 4.0, 8.0), accuracy, strict=True)]
    assert lr.effective_context(rows) == wanted


@pytest.mark.parametrize("rows, wanted", [
    ([], "—"), ([(3.5, 0.9, 0.0)], "> 3.5"), ([(3.5, 0.1, 0.0)], "< 3.5"),
    ([(1.0, 0.6, 0.0), (2.0, 0.6, 0.5)], "1.19"),  # shares 0.6 and 0.2: 2 ** 0.25
    ([(0.53, 1.0, 0.0), (127.83, 1.0, 0.0)], "> 128")])  # fmt: skip
def test_effective_context_is_of_the_rows_there_are(rows, wanted):
    assert lr.effective_context(rows) == wanted


@pytest.mark.parametrize("values, text", [
    ([0.5], "50.0"), ([1.0], "100.0"), ([0.5, 0.52, 0.54], "52.0±5.0"),
    ([0.25, 0.25], "25.0±0.0"), ([0.0, 1.0], "50.0±99.9"), ([], "—"), ([None], "—"),
    ([math.nan], "—"), ([0.5, None, math.nan], "50.0")])  # fmt: skip
def test_percent_formats_seeds(values, text):
    cell = lr.percent(values)
    assert cell.strip() == text and len(cell) == lr.CELL


def made_row(arm: str = "window", length: int = 64, accuracy: float = 0.5, **fields) -> dict:
    """A row of the results, as far as tables need it."""
    return {"task": "copy", "arm": arm, "seed": 0, "length": length, "items": 0, "chance": 0.03,
            "distance_windows": length / 32 - 1, "questions": 6, "accuracy": accuracy,
            "swapped_accuracy": 0.07 if arm in lr.MEMORY_ARMS else None, "lr": 0.01,
            "within_block": 0.0, "tokens_per_s": 1000, "attention_bytes": 1024,
            "memory_bytes": 0} | fields  # fmt: skip


def tables(text: str) -> list[list[list[str]]]:
    """The words of every line of the tables in what was printed: the heads, then the lengths."""
    found = []
    for words in map(str.split, text.splitlines()):
        if words[:1] == ["length"]:
            found.append([words])
        elif words and words[0].isdigit():
            found[-1].append(words)
    return found


def reaches(text: str) -> dict[str, str]:
    """What is said of each arm below a table."""
    return {line.split()[0]: line.split("effective context")[1].strip()
            for line in text.splitlines() if " windows; " in line}  # fmt: skip


def test_cells_of_has_rows_of_all_these_values():
    rows = [made_row(arm, length) for arm in ARMS for length in (32, 64)]
    assert lr.cells_of(rows, arm="dnc", length=64) == [rows[5]]
    assert lr.cells_of(rows, length=32) == rows[::2]
    assert lr.cells_of(rows, arm="dnc", length=96) == [] and lr.cells_of(rows) == rows


def test_kept_is_attention_and_memory_in_kib():
    assert lr.kept(made_row(attention_bytes=2048, memory_bytes=512)) == 2.5


def test_print_rows_has_lengths_downward_and_arms_across(capsys):
    """Each cell the mean over seeds; a memory arm has a second column, of another row's memory."""
    rows = [made_row(arm, length, base + length / 1000 + 0.02 * seed, seed=seed)
            for seed in (2, 0, 1) for length in (96, 64) for arm, base in (
                ("window", 0.1), ("dnc", 0.5))]  # fmt: skip
    lr.print_rows(rows, tiny(arms="dnc,window", seeds="0,1,2"))
    out = capsys.readouterr().out
    assert tables(out) == [[
        ["length", "dist.", "asked", "dnc", "swapped", "window", "chance"],
        ["64", "1.0", "6", "58.4±5.0", "7.0±0.0", "18.4±5.0", "3.0"],
        ["96", "2.0", "6", "61.6±5.0", "7.0±0.0", "21.6±5.0", "3.0"]]]
    assert len({len(line) for line in out.splitlines()}) == 1  # columns are aligned


def test_print_rows_has_a_dash_where_nothing_is_known(capsys):
    """A length that an arm does not read, and a memory that is not swapped."""
    rows = [made_row("dnc", 64, swapped_accuracy=None), made_row("full", 64),
            made_row("dnc", 96)]  # fmt: skip
    lr.print_rows(rows, tiny(arms="dnc,full"))
    table, = tables(capsys.readouterr().out)
    assert [line[3:6] for line in table[1:]] == [["50.0", "—", "50.0"], ["50.0", "7.0", "—"]]


def test_print_rows_keeps_the_pairs_of_one_length_apart(capsys):
    rows = [made_row(length=64, items=items, questions=items, accuracy=items / 100)
            for items in (16, 4, 8)]  # fmt: skip
    lr.print_rows(rows, tiny(arms="window"))
    table, = tables(capsys.readouterr().out)
    assert [line[2:4] for line in table[1:]] == [["4", "4.0"], ["8", "8.0"], ["16", "16.0"]]


def test_print_task_takes_rows_of_its_task_alone(capsys):
    rows = [made_row(length=64), made_row(length=96, task="mqar"),
            made_row(length=128, task="mqar", items=4)]  # fmt: skip
    lr.print_task("copy", rows, tiny(arms="window"))
    table, = tables(capsys.readouterr().out)
    assert [line[0] for line in table[1:]] == ["64"]


def test_print_task_says_the_effective_context_of_each_arm(capsys):
    """Of the mean over seeds: 0.6 and 0.4, half-way between distances 1 and 3 (sqrt(3))."""
    rows = [made_row(arm, length, accuracy, seed=seed, chance=0.0) for arm, cells in (
        ("dnc", ((64, 0.4, 0.8), (128, 0.2, 0.6))), ("window", ((64, 0.1, 0.1), (128, 0.1, 0.1))))
        for length, *found in cells for seed, accuracy in enumerate(found)]  # fmt: skip
    lr.print_task("copy", rows, tiny(arms="window,dnc", seeds="0,1"))
    found = reaches(capsys.readouterr().out)
    assert list(found) == ["window", "dnc"]
    assert found["window"].startswith("< 1 windows")
    assert found["dnc"].startswith("1.73 windows")


def test_print_task_compares_distances_at_equal_load(capsys):
    """The short row, of fewer questions, is in the table, but its distance does not count."""
    rows = [made_row(length=64, accuracy=0.1, questions=2), made_row(length=96, accuracy=0.9),
            made_row(length=160, accuracy=0.9)]  # fmt: skip
    lr.print_task("copy", rows, tiny(arms="window"))
    out = capsys.readouterr().out
    assert len(tables(out)[0]) == 4 and reaches(out)["window"].startswith("> 4 windows")


def test_print_task_says_the_rate_and_what_it_was_chosen_from(capsys):
    lr.print_task("copy", [made_row(lr=0.02)], tiny(arms="window", lr_grid="0.01,0.02"))
    assert reaches(capsys.readouterr().out)["window"].endswith("learning rate 0.02 of 0.01, 0.02")


def test_print_task_says_how_much_a_window_answers_of_zoologys_test(capsys):
    """A second table, and the cells in which some questions are in the block of their answer."""
    rows = [made_row(task="mqar"), made_row(task="mqar", items=4, within_block=0.25),
            made_row(task="mqar", length=256, items=32, within_block=0.0)]  # fmt: skip
    lr.print_task("mqar", rows, tiny(arms="window"))
    out = capsys.readouterr().out
    assert [[line[0] for line in table[1:]] for table in tables(out)] == [["64"], ["64", "256"]]
    assert "64:4 25%" in out and "256:32" not in out


def test_print_costs_has_the_median_speed_and_what_a_row_keeps(capsys):
    """Of rows without items, over tasks and seeds; a dash where an arm reads no such row."""
    rows = [made_row("window", length, tokens_per_s=speed, seed=seed, attention_bytes=2048)
            for length in (128, 64) for seed, speed in enumerate((10_000, 20_000, 90_000))]
    rows += [made_row("dnc", 64, tokens_per_s=3000, attention_bytes=1024, memory_bytes=512),
             made_row("dnc", 256, items=8)]  # fmt: skip
    lr.print_costs(rows, tiny(arms="window,dnc"))
    out = capsys.readouterr().out
    assert tables(out) == [[
        ["length", "window", "KiB", "dnc", "KiB"], ["64", "20,000", "2.0", "3,000", "1.5"],
        ["128", "20,000", "2.0", "—", "—"]]]
    assert len({len(line) for line in out.splitlines()[-3:]}) == 1


def test_plot_marks_the_longest_training_row_of_each_task(tmp_path, monkeypatch):
    """With a line downward; the costs, in the last column, have none."""
    from matplotlib.figure import Figure
    drawn = []

    @contextlib.contextmanager
    def unsaved(path, rows, columns, size, **grid):
        figure = Figure(size)
        drawn.append(figure.subplots(rows, columns, **grid))
        yield figure, drawn[0]

    rows = [made_row(length=length, task=task, loss=1.0, chance_loss=2.0)
            for length in (32, 64, 96) for task in ("copy", "mqar")]  # fmt: skip
    monkeypatch.setattr(lr, "measure", lambda config: rows)
    monkeypatch.setattr(lr, "dark_figure", unsaved)
    lr.plot(tiny(arms="window", train="64,96:3,32", mqar_train="32:2,64:4",
                 plot_dir=str(tmp_path)))
    marks = [[x[0] for line in axis.lines if len(x := list(line.get_xdata())) == 2
              and x[0] == x[1]] for axis in drawn[0].flat]
    assert marks == [[96], [64], [], [96], [64], []]


# ══ The command ══════════════════════════════════════════════════════════════════════════════════


class Trained(NamedTuple):
    """One folder that every part of the command has worked in; it is not to be changed."""

    folder: Path
    out: dict[str, str]  # what each part printed
    config: lr.Config


def argv_of(folder: Path, **fields) -> list[str]:
    folders = {f"{name}_dir": str(folder / name) for name in ("data", "save", "plot")}
    return flags({**TINY, **folders, **fields})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """generate, train, compare and plot, one after the other, in this process."""
    folder, out = tmp_path_factory.mktemp("long_range"), {}
    for part in lr.COMMANDS:
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = lr.main([part, *argv_of(folder)])
        assert code == 0, errors.getvalue()
        out[part] = printed.getvalue()
    folders = {f"{name}_dir": str(folder / name) for name in ("data", "save", "plot")}
    return Trained(folder, out, tiny(**folders))


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of the trained folder, to be changed."""
    shutil.copytree(trained.folder, tmp_path / "copied")
    return tmp_path / "copied"


@pytest.fixture
def jobs_run(monkeypatch) -> list:
    """The jobs that a command runs; they run in this process."""
    jobs = []

    def here(function, config, missing, what):
        jobs.extend(missing)
        return [function(config, job) for job in missing]

    monkeypatch.setattr(lr, "run_all", here)
    return jobs


def files(folder: Path) -> dict[str, tuple]:
    """Every file below a folder, with its content and time."""
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "plot" / "long_range.json").read_text(encoding="utf-8"))["rows"]


def test_command_writes_data_checkpoints_and_plots(trained):
    wanted = {f"data/long_range_{task}_{part}.pt" for task in ("copy", "mqar")
              for part in ("train", "test")}
    wanted |= {f"save/long_range_{task}_{arm}_seed0_lr0.01.pt" for task in ("copy", "mqar")
               for arm in ARMS}
    wanted |= {"plot/long_range.json", "plot/long_range.png"}
    assert set(files(trained.folder)) == wanted
    assert (trained.folder / "plot/long_range.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (trained.folder / "plot/long_range.png").stat().st_size > 10_000


def test_command_says_what_it_runs(trained):
    for printed in trained.out.values():
        assert torch.__version__ in printed and "steps=3" in printed
        assert all(arm in printed for arm in ARMS)
    assert trained.out["train"].count("validation") == 8


def test_compare_prints_the_accuracy_of_every_arm_and_length(trained):
    copy, mqar, zoology, costs = tables(trained.out["compare"])
    assert copy[0] == mqar[0] == zoology[0] == [
        "length", "dist.", "asked", "window", "knn_store", "swapped", "dnc", "swapped", "full",
        "chance"]
    rows, keys = rows_of(trained.folder), ("accuracy", "swapped_accuracy")
    columns = [("window", "accuracy"), *((arm, key) for arm in ("knn_store", "dnc")
                                          for key in keys),
               ("full", "accuracy"), ("window", "chance")]
    for task, table, cells in (("copy", copy, [(32, 0), (64, 0), (96, 0)]),
                               ("mqar", mqar, [(32, 0), (64, 0), (96, 0)]),
                               ("mqar", zoology, [(64, 4), (96, 12)])):  # fmt: skip
        for line, (length, items) in zip(table[1:], cells, strict=True):
            mine = {row["arm"]: row for row in lr.cells_of(
                rows, task=task, length=length, items=items)}
            wanted = [mine.get(arm, {}).get(key) for arm, key in columns]
            distance, asked = (mine["dnc"][key] for key in ("distance_windows", "questions"))
            assert line == [str(length), f"{distance:.1f}", str(asked), *(
                "—" if x is None else f"{100 * x:.1f}" for x in wanted)]
            assert (line[8] == "—") == (length > 64)  # the full arm
    assert costs[0][1::2] == list(ARMS) and [line[0] for line in costs[1:]] == ["32", "64", "96"]
    assert list(reaches(trained.out["compare"])) == list(ARMS)


def test_compare_writes_a_row_of_every_run_and_length(trained):
    rows = rows_of(trained.folder)
    cells = {"copy": [(32, 0), (64, 0), (96, 0)],
             "mqar": [(32, 0), (64, 0), (96, 0), (64, 4), (96, 12)]}  # fmt: skip
    found = sorted((r["task"], r["arm"], r["length"], r["items"]) for r in rows)
    assert found == sorted(  # the full arm reads no more than it was trained on
        (task, arm, length, pairs) for task in cells for arm in ARMS
        for length, pairs in cells[task] if arm != "full" or length <= 64)
    for row in rows:
        assert row.keys() >= KEYS
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["chance"] <= 1 and row["loss"] > 0
        assert row["tokens_per_s"] > 0 and row["seed"] == 0
        assert row["least_distance_windows"] <= row["distance_windows"] < row["length"] / 32
        assert 0 <= row["within_block"] <= 1
        swapped = row["arm"] in ("knn_store", "dnc") and row["length"] > 32
        assert (row["swapped_accuracy"] is not None) == swapped
    sizes = {r["parameters"] for r in rows if r["task"] == "copy"}
    assert max(sizes) <= 1.02 * min(sizes)


@pytest.mark.parametrize("task, arm, length, items", [
    ("copy", "window", 96, 0), ("copy", "full", 64, 0), ("mqar", "knn_store", 96, 0),
    ("mqar", "dnc", 96, 12)])
@torch.no_grad()
def test_compare_measures_what_the_checkpoint_predicts(trained, task, arm, length, items):
    """Accuracy and loss of the row, from the weights and the raw data, all at once."""
    row, = lr.cells_of(rows_of(trained.folder), task=task, arm=arm, length=length, items=items)
    saved = torch.load(trained.folder / f"save/long_range_{task}_{arm}_seed0_lr0.01.pt",
                       weights_only=True)
    data = torch.load(trained.folder / f"data/long_range_{task}_test.pt", weights_only=True)
    group, = (g for g in data["groups"] if (g["length"], g["items"]) == (length, items))
    model = lr.build_model(trained.config, task, arm, 0)
    model.load_state_dict(saved["model_state_dict"])
    tokens, at, answers = (group[name].long().to(lr.device())
                           for name in ("inputs", "at", "answers"))  # fmt: skip
    h = model.hidden(tokens, model.init_state(len(tokens), 2 * items))[0]
    log_p = torch.stack([model.logits(h[i, at[i]]) for i in range(len(at))]).log_softmax(-1)
    loss = -log_p.gather(2, answers.unsqueeze(2)).mean().item()
    right = (log_p.argmax(-1) == answers).double().mean().item()
    assert row["loss"] == pytest.approx(loss, rel=1e-4)
    assert abs(row["accuracy"] - right) <= 1.01 / answers.numel()  # a near-tie may go either way
    assert row["questions"] == answers.shape[1]
    within = (group["at"] // 32 == group["source"] // 32).double().mean().item()
    assert row["within_block"] == pytest.approx(within)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_measure_run_has_no_swapped_accuracy_where_nothing_is_asked(trained):
    """The questions of one group are moved before the last window; the others stay. In a file of
    JSON there is no NaN."""
    groups = lr.load_data(trained.config, "mqar", "test")[0]
    groups[-1]["at"][:] = torch.arange(30, 42)
    rows = lr.measure_run(trained.config, lr.Job("mqar", "knn_store", 0, 0.01))
    json.dumps(rows, allow_nan=False)
    found = {(row["length"], row["items"]): row["swapped_accuracy"] for row in rows}
    assert {cell for cell, swapped in found.items() if swapped is None} == {(32, 0), (96, 12)}


@pytest.mark.parametrize("arm, lengths", [("full", []), ("window", [96])])
def test_measure_run_of_the_full_arm_reads_no_longer_rows(trained, arm, lengths):
    """Not even to warm up, where there are only such."""
    groups = lr.load_data(trained.config, "copy", "test")[0]
    groups[:] = [group for group in groups if group["length"] == 96]
    rows = lr.measure_run(trained.config, lr.Job("copy", arm, 0, 0.01))
    assert [row["length"] for row in rows] == lengths


def test_train_twice_trains_nothing(trained, jobs_run, capsys):
    before = files(trained.folder)
    assert lr.main(["train", *argv_of(trained.folder)]) == 0
    assert jobs_run == [] and files(trained.folder) == before
    assert "8 of 8" in capsys.readouterr().out


def test_compare_twice_evaluates_nothing(trained, copied, jobs_run, capsys):
    assert lr.main(["compare", *argv_of(copied)]) == 0
    assert jobs_run == [] and rows_of(copied) == rows_of(trained.folder)
    before = trained.out["compare"].split("compare")[-1].splitlines()[-20:]
    assert capsys.readouterr().out.splitlines()[-20:] == before


def test_compare_evaluates_what_is_missing_alone(copied, jobs_run):
    """The rows of the others are those of the file."""
    path = copied / "plot/long_range.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    for run in found["runs"]:
        for row in run["rows"]:
            row["val_accuracy"] = 7
    found["runs"] = [run for run in found["runs"] if (
        run["rows"][0]["task"], run["rows"][0]["arm"]) != ("copy", "dnc")]
    path.write_text(json.dumps(found), encoding="utf-8")
    assert lr.main(["compare", *argv_of(copied)]) == 0
    assert jobs_run == [lr.Job("copy", "dnc", 0, 0.01)]
    for row in rows_of(copied):
        assert (row["val_accuracy"] == 7) == ((row["task"], row["arm"]) != ("copy", "dnc"))


@pytest.mark.parametrize("change, runs", [
    ("weights", 1), ("data", 8), ("device", 8), ("torch", 8), ("scan", 8)])
def test_measure_evaluates_again_what_has_changed(trained, copied, change, runs, monkeypatch):
    jobs = []
    monkeypatch.setattr(lr, "run_all", lambda function, config, missing, what: (
        jobs.extend(missing) or [[] for _ in missing]))
    folders = {f"{name}_dir": str(copied / name) for name in ("data", "save", "plot")}
    config = dataclasses.replace(trained.config, **folders)
    lr.measure(config)
    assert jobs == []
    if change == "weights":
        path = copied / "save/long_range_copy_dnc_seed0_lr0.01.pt"
        payload = torch.load(path, weights_only=True)
        payload["model_state_dict"]["output.weight"][0, 0] += 1
        torch.save(payload, path)
    elif change == "data":
        config = dataclasses.replace(config, test_rows=7)
        lr.generate(config)
    elif change == "device":
        monkeypatch.setattr(lr, "device_name", lambda: "another card")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        config = dataclasses.replace(config, scan="auto")
    lr.measure(config)
    assert len(jobs) == runs and (runs > 1 or jobs == [lr.Job("copy", "dnc", 0, 0.01)])


@pytest.mark.parametrize("content", ["", "[]", '{"runs": [{"id": 3}]}', "{"])
def test_compare_evaluates_again_where_the_results_are_damaged(
        trained, copied, jobs_run, content, capsys):
    (copied / "plot/long_range.json").write_text(content, encoding="utf-8")
    assert lr.main(["compare", *argv_of(copied)]) == 0
    assert len(jobs_run) == 8
    for old, new in zip(rows_of(trained.folder), rows_of(copied), strict=True):
        assert old.keys() == new.keys()
        assert all(old[k] == new[k] for k in old if k not in ("tokens_per_s", "train_seconds"))


def test_train_goes_on_with_the_same_weights(trained, copied, jobs_run, capsys):
    """A run that is missing is trained again, alone, to the very same weights; its old row in the
    results is taken when the checkpoint is the same, else it is evaluated again."""
    name = "save/long_range_copy_dnc_seed0_lr0.01.pt"
    (copied / name).unlink()
    others = {k: v for k, v in files(copied).items() if k.startswith("save/")}
    assert lr.main(["train", *argv_of(copied)]) == 0
    assert jobs_run == [lr.Job("copy", "dnc", 0, 0.01)]
    assert others.items() <= files(copied).items()
    old, new = (torch.load(folder / name, weights_only=True) for folder in (trained.folder, copied))
    assert old["model_state_dict"].keys() == new["model_state_dict"].keys()
    assert all(torch.equal(old["model_state_dict"][k], new["model_state_dict"][k])
               for k in old["model_state_dict"])
    assert old["history"] == new["history"]


@pytest.mark.parametrize("task, steps, rows", [("copy", 3, [2, 3]), ("mqar", 4, [2, 4])])
def test_train_takes_the_steps_of_the_task(trained, task, steps, rows):
    for arm in ARMS:
        saved = torch.load(trained.folder / f"save/long_range_{task}_{arm}_seed0_lr0.01.pt",
                           weights_only=True)
        assert saved["global_step"] == steps
        assert [row["step"] for row in saved["history"]] == rows


@pytest.mark.parametrize("task, steps", [("copy", 3), ("mqar", 4)])
def test_train_asks_for_the_rate_of_every_step(trained, tmp_path, task, steps, monkeypatch):
    asked, share = [], lr.rate_share
    monkeypatch.setattr(lr, "rate_share", lambda step, of, config: (
        asked.append((step, of)) or share(step, of, config)))
    config = dataclasses.replace(trained.config, save_dir=str(tmp_path))
    lr.train_run(config, lr.Job(task, "window", 0, 0.01))
    assert sorted(set(asked)) == [(step, steps) for step in range(steps)]


def test_train_history_has_the_mean_loss_since_the_last_row(trained, copied, jobs_run):
    """Three steps, a row every two: of two steps, then of one."""
    name = "long_range_copy_window_seed0_lr0.01.pt"
    (copied / "save" / name).unlink()
    words = argv_of(copied, tasks="copy", arms="window", log_every_steps=1)
    assert lr.main(["train", *words]) == 0
    each, two = (torch.load(folder / "save" / name, weights_only=True)["history"]
                 for folder in (copied, trained.folder))
    assert [row["step"] for row in each] == [1, 2, 3] and [row["step"] for row in two] == [2, 3]
    first, second, third = (row["loss"] for row in each)
    assert first != second
    assert [row["loss"] for row in two] == pytest.approx([(first + second) / 2, third])


def test_train_asks_first_whether_the_scan_takes_the_slots(trained, monkeypatch):
    """Those of the model, and for mqar those of its largest test: twice 12 pairs."""
    asked = []
    monkeypatch.setattr(lr, "pick_scan",
                        lambda scan, state, options: asked.append(state.memory.shape[1]))
    for arms, slots in (("window,dnc", {"copy": {16}, "mqar": {16, 24}}), ("window", {})):
        for task in ("copy", "mqar"):
            asked.clear()
            lr.train(dataclasses.replace(trained.config, tasks=task, arms=arms))
            assert set(asked) == slots.get(task, set())


def test_train_trains_nothing_where_the_scan_takes_too_few_slots(
        copied, jobs_run, monkeypatch, capsys):
    """Not even the arms and tasks that could be."""

    def at_most_16(scan, state, options):
        lr.require(state.memory.shape[1] <= 16, "scan", scan, "auto or eager here")

    shutil.rmtree(copied / "save")
    monkeypatch.setattr(lr, "pick_scan", at_most_16)
    assert_mistake(["train", *argv_of(copied)], "scan = 'eager'", capsys, copied)
    assert jobs_run == []


def test_train_without_muon_says_so(copied, jobs_run, monkeypatch, capsys):
    shutil.rmtree(copied / "save")
    monkeypatch.delattr(torch.optim, "Muon")
    assert_mistake(["train", *argv_of(copied)], "Muon", capsys, copied)
    assert jobs_run == []


def test_train_names_the_rates_where_the_loss_is_not_finite(copied, jobs_run, capsys):
    words = argv_of(copied, tasks="copy", arms="window", lr_grid="1e30")
    assert_mistake(["train", *words], "--lr_grid", capsys, copied)
    assert jobs_run == [lr.Job("copy", "window", 0, 1e30)]


def test_command_trains_the_same_weights_with_two_workers(trained, tmp_path):
    """The real command in a process of its own, on the same data: bit for bit what one worker
    trained; and the weights have moved."""
    words = argv_of(trained.folder, tasks="copy", arms="window,dnc", workers=2,
                    save_dir=str(tmp_path / "save"))  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "long_range.py"), "train", *words], text=True, timeout=240,
        capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["save"]
    for arm in ("window", "dnc"):
        name = f"save/long_range_copy_{arm}_seed0_lr0.01.pt"
        one, two = (torch.load(folder / name, weights_only=True)["model_state_dict"]
                    for folder in (trained.folder, tmp_path))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
        start = lr.build_model(trained.config, "copy", arm, 0).state_dict()
        moved = [k for k in start if not torch.equal(start[k].cpu(), one[k])]
        assert "controller.wte.weight" in moved and "output.weight" in moved
        assert arm == "window" or "memory.read_proj.weight" in moved


def test_help_lists_every_field_and_task(capsys):
    assert lr.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--{field.name}" in out for field in dataclasses.fields(lr.Config))
    assert all(task in out for task in lr.TASKS)


# Words after the tiny run's, and what the error has to name.
MISTAKES = {
    "task": (["--tasks", "copy,sort"], "tasks = 'copy,sort'"),
    "no task": (["--tasks", ""], "tasks"),
    "arm": (["--arms", "lstm"], "arms = 'lstm'"),
    "field": (["--slots", "3"], "--slots"),
    "no value": (["--steps"], "steps"),
    "type": (["--steps", "many"], "steps = 'many'"),
    "zero": (["--steps", "0"], "steps = 0"),
    "zero of mqar": (["--mqar_steps", "0"], "mqar_steps = 0"),
    "heads": (["--hidden_size", "15"], "hidden_size = 15"),
    "window": (["--window", "12"], "window = 12"),
    "length not a multiple": (["--lengths", "64,48"], "lengths = '64,48'"),
    "length below the window": (["--lengths", "16"], "lengths = '16'"),
    "length zero": (["--lengths", "0"], "lengths = '0'"),
    "length word": (["--lengths", "long"], "lengths = 'long'"),
    "no length": (["--lengths", ""], "lengths"),
    "lengths beyond full": (["--lengths", "96"], "lengths = '96'"),
    "train length": (["--train", "64:4,48"], "train = '64:4,48'"),
    "train items": (["--train", "64:-1"], "train = '64:-1'"),
    "train word": (["--train", "64:few"], "train = '64:few'"),
    "pairs above symbols": (["--pairs", "40"], "pairs"),
    "pairs above the window": (["--pairs", "33", "--mqar_symbols", "66"], "pairs = 33"),
    "items above the window": (["--items", "25"], "items = 25"),
    "training pairs": (["--mqar_train", "64:17"], "mqar_train = '64:17'"),
    "training pairs above symbols": (["--mqar_train", "160:40"], "mqar_train = '160:40'"),
    "test pairs": (["--mqar_test", "64:4,64:17"], "mqar_test = '64:17'"),
    "no pairs": (["--mqar_train", "64"], "mqar_train = '64"),
    "pairs word": (["--mqar_test", "64:few"], "mqar_test = '64:few'"),
    "seed": (["--seeds", "-1"], "seeds = '-1'"),
    "rate": (["--lr_grid", "0.01,0"], "lr_grid"),
    "rate nan": (["--lr_grid", "nan"], "lr_grid"),
    "workers": (["--workers", "0"], "workers = 0"),
    "scan": (["--scan", "gpu"], "scan = 'gpu'"),
    "one test row": (["--test_rows", "1"], "test_rows = 1"),
    "schedule": (["--lr_decay", "2"], "lr_decay = 2"),
}  # fmt: skip


def assert_mistake(words: list[str], named: str, capsys, folder: Path) -> None:
    """The command exits with 2 and one line that names the mistake, and no file has changed."""
    before = files(folder)
    assert lr.main(words) == 2
    err = capsys.readouterr().err
    assert named in error_line(err) and len(err.strip().splitlines()) == 1, err
    assert files(folder) == before


@pytest.mark.parametrize("words, named", MISTAKES.values(), ids=list(MISTAKES))
def test_command_names_a_mistaken_value(words, named, tmp_path, capsys):
    assert_mistake([*argv_of(tmp_path), *words], named, capsys, tmp_path)


def test_command_names_an_alphabet_too_large_for_int16(tmp_path, capsys):
    words = argv_of(tmp_path, tasks="random", alphabet=40_000)
    assert_mistake(["generate", *words], "alphabet = 40000", capsys, tmp_path)


def test_command_names_a_window_too_small_for_repeats(tmp_path, capsys):
    sizes = {"window": 8, "lengths": "8", "train": "8", "mqar_train": "8:1", "mqar_test": "8:1"}
    words = argv_of(tmp_path, tasks="repeats", **sizes)
    assert_mistake(["generate", *words], "window = 8", capsys, tmp_path)


def test_command_names_an_unknown_command(tmp_path, capsys):
    assert_mistake(["dance", *argv_of(tmp_path)], "'dance'", capsys, tmp_path)


@pytest.mark.parametrize("error, named", [
    (concurrent.futures.process.BrokenProcessPool("a worker ended"), "a worker ended"),
    (torch.cuda.OutOfMemoryError("CUDA has too little"), "CUDA has too little"),
    (MemoryError("640 GiB are too many"), "640 GiB")], ids=["worker", "cuda", "memory"])
def test_command_names_what_the_machine_lacks(error, named, tmp_path, monkeypatch, capsys):
    def fail(config):
        raise error

    monkeypatch.setattr(lr, "generate", fail)
    assert_mistake(["generate", *argv_of(tmp_path)], named, capsys, tmp_path)


@pytest.mark.parametrize("part", ["train", "compare", "plot"])
def test_command_names_data_that_are_missing(part, tmp_path, capsys):
    named = "generate" if part == "train" else "train"
    assert_mistake([part, *argv_of(tmp_path)], named, capsys, tmp_path)


def test_compare_before_train_says_so(copied, capsys):
    shutil.rmtree(copied / "save")
    assert_mistake(["compare", *argv_of(copied)], "long_range.py train", capsys, copied)


@pytest.mark.parametrize("part", ["train", "compare"])
@pytest.mark.parametrize("name, value", [("hidden_size", 32), ("steps", 4), ("mem_slots", 8)])
def test_command_refuses_a_checkpoint_of_other_fields(trained, part, name, value, capsys):
    words = [part, *argv_of(trained.folder, **{name: value})]
    assert_mistake(words, f"trained with {name} = {TINY[name]}", capsys, trained.folder)


@pytest.mark.parametrize("task, free, fixed", [
    ("copy", "mqar_steps", "steps"), ("mqar", "steps", "mqar_steps")])
def test_load_checkpoint_minds_the_steps_of_its_task(task, free, fixed, trained):
    job = lr.Job(task, "window", 0, 0.01)
    lr.load_checkpoint(dataclasses.replace(trained.config, **{free: 9}), job)
    with pytest.raises(ValueError, match=f"trained with {fixed} = "):
        lr.load_checkpoint(dataclasses.replace(trained.config, **{fixed: 9}), job)


@pytest.mark.parametrize("name, value", [("mem_slots", 9), ("lambda_closing", 0.5)])
def test_load_checkpoint_minds_a_field_of_the_dnc_in_the_dnc_alone(name, value, trained):
    other = dataclasses.replace(trained.config, **{name: value})
    lr.load_checkpoint(other, lr.Job("copy", "window", 0, 0.01))
    with pytest.raises(ValueError, match=f"trained with {name} = "):
        lr.load_checkpoint(other, lr.Job("copy", "dnc", 0, 0.01))


@pytest.mark.parametrize("part", ["generate", "train", "compare"])
def test_command_refuses_altered_data(part, copied, capsys):
    path = copied / "data/long_range_copy_train.pt"
    payload = torch.load(path, weights_only=True)
    payload["groups"][0]["answers"][0, 0] += 1
    torch.save(payload, path)
    assert_mistake([part, *argv_of(copied)], "sha256", capsys, copied)


def test_command_refuses_a_checkpoint_of_other_data(copied, capsys):
    """Data that are whole, but not those that the checkpoint was trained on."""
    path = copied / "data/long_range_copy_train.pt"
    payload = torch.load(path, weights_only=True)
    payload["groups"][0]["answers"][0, 0] += 1
    payload["sha256"] = lr.content_hash(payload["groups"])
    torch.save(payload, path)
    assert_mistake(["compare", *argv_of(copied)], "long_range_copy_window", capsys, copied)


@pytest.mark.parametrize("part", ["train", "compare"])
@pytest.mark.parametrize("task, arm, seed, rate", [
    ("copy", "knn_store", 0, 0.01), ("copy", "window", 1, 0.01), ("copy", "window", 0, 0.02)])
def test_command_refuses_a_renamed_checkpoint(copied, part, task, arm, seed, rate, capsys):
    """Of the same data and fields, but of another arm, seed or rate than its name says."""
    job = lr.Job(task, arm, seed, rate)
    path = job.path(tiny(save_dir=str(copied / "save")))
    shutil.copyfile(copied / "save/long_range_copy_window_seed0_lr0.01.pt", path)
    words = argv_of(copied, tasks=task, arms=arm, seeds=seed, lr_grid=rate)
    assert_mistake([part, *words], f"{path.name}': must be of {job}", capsys, copied)


@pytest.mark.parametrize("content", ["half", "other", "no job"])
def test_command_refuses_a_damaged_checkpoint(copied, content, capsys):
    path = copied / "save/long_range_copy_window_seed0_lr0.01.pt"
    if content == "half":
        path.write_bytes(path.read_bytes()[:1000])
    elif content == "other":
        torch.save({"step": 1}, path)
    else:
        payload = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in payload.items() if key != "job"}, path)
    assert_mistake(["compare", *argv_of(copied)], str(path), capsys, copied)
