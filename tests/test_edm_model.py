"""Tests of edm_model.py: the model against transformers' GPT-2 and against edm_oracle's naive row,
the notebook alone, gradients against finite differences, padding, cuts, documents, generation,
saved folders, memory files and adapters.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import edm_oracle as oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edm_oracle import C, V, W, close, draw, make, read_all, same_bits, same_memory

import dnc_gpt2
import edm_gpt2 as eg
import edm_model as em

NOTEBOOK_ONLY = {"early": False, "late": False}
ARMS = [{}, NOTEBOOK_ONLY, {"edm": False}, {"edm": False, "early": False}]
every_arm = pytest.mark.parametrize("arm", ARMS, ids=["both", "edm", "recurrent", "late"])
every_read = pytest.mark.parametrize("dense", [0, 2048], ids=["nearest", "dense"])


@pytest.fixture(scope="module")
def base():
    return oracle.make_base()


# ══ The model against its references ═════════════════════════════════════════════════════════════
REFERENCE = {
    "blocks": dict(stride=16, key_of="previous"),
    "odd, sparse, lru": dict(stride=5, slots=19, write_every=3, eviction="lru", document_end=7),
    "lru in blocks": dict(stride=16, slots=16, eviction="lru", read_top_k=5, read_layer=2),
    "usage": dict(slots=20, eviction="usage", edm_heads=3, key_width=5),
    "usage, sparse": dict(stride=16, slots=17, eviction="usage", write_every=2, read_layer=0),
    "usage, ends": dict(stride=16, slots=16, eviction="usage", document_end=7, read_top_k=1),
    "ends": dict(slots=20, document_end=7, key_of="previous"),
    "ends, odd": dict(stride=5, slots=18, document_end=7, write_every=2, edm_heads=1),
    "edm": dict(stride=16, read_top_k=30, **NOTEBOOK_ONLY),
    "early": dict(edm=False, late=False),
    "late": dict(stride=5, edm=False, early=False),
}


@pytest.mark.parametrize("fields", REFERENCE.values(), ids=list(REFERENCE))
def test_model_equals_a_naive_row(base, fields):
    """Logits of every token, and all that is remembered at the end, in float64."""
    model, tokens = make(base, dtype=torch.float64, **fields), draw(2, 59, low=8)
    if "document_end" in fields:
        tokens[0, [20, 23, 47]] = 7  # two in one stride, one at the end of a window
        tokens[1, 0] = 7
    logits, state, _ = read_all(model, tokens)
    for row in range(2):
        naive = oracle.NaiveRow(model)
        close(logits[row], np.stack([naive.step(t) for t in tokens[row].tolist()]), 1e-9)
        assert (naive.start, 59 - naive.start) == (state.start[row], state.fill[row])
        if naive.notebook:
            same_notebook(state.memory, row, naive.notebook)
        if naive.early:
            close(state.early[row], naive.first, 1e-9)
        if naive.late:
            close(state.late[row], naive.second, 1e-9)


def same_notebook(state: em.EDMState, row: int, naive: oracle.NaiveNotebook) -> None:
    """A row's slots are the naive ones, and no others are in use."""
    used = (state.position[row] >= 0).nonzero().flatten().tolist()
    assert used == sorted(naive.store) == list(range(len(used)))
    assert not state.keys[row, :, len(used) :].any()
    for slot, entry in naive.store.items():
        assert state.position[row, slot] == entry.position
        assert state.token[row, slot] == entry.token
        close(state.keys[row, :, slot], entry.key, 1e-9)
        close(state.values[row, :, slot], entry.value, 1e-9)
        assert float(state.rank[row, slot]) == pytest.approx(entry.rank, abs=1e-9)


@every_arm
def test_step_zero_equals_the_base_bit_for_bit(base, arm):
    """In the window, and on each block; logits of a whole row are one product, whose last bit can
    differ from that of a block's where the blocks are of several lengths. With open gates every
    token behind the first window differs, and none in it."""
    for T in (1, 7, 16, 33, 64):
        model, tokens = make(base, 0.0, stride=W, **arm), draw(3, T)
        with torch.no_grad():
            h, _, _ = model.advance(tokens, torch.ones_like(tokens).bool(), model.init_state(3))
            blocks = tokens.split(W, 1)
            assert torch.equal(h, torch.cat([base.transformer(x)[0] for x in blocks], 1))
            if T <= W:
                assert torch.equal(model(tokens).logits, base(tokens).logits)
    with torch.no_grad():
        wide = make(base, 0.0, window=64, slots=64, **arm)(tokens).logits
        assert torch.equal(wide, base(tokens).logits)
    closed, open_ = (read_all(make(base, alpha, **arm), tokens)[0] for alpha in (0.0, 0.5))
    assert torch.equal(closed[:, :W], open_[:, :W])
    assert ((closed - open_)[:, W:].abs().amax(-1) > 1e-4).all()


def test_forward_loss_is_that_of_the_shifted_labels(base):
    """Of the last 5 tokens alone the logits, if they are asked for."""
    model, tokens = make(base), draw(3, 37)
    labels = tokens.masked_fill(draw(3, 37, seed=5, high=3) == 0, -100)
    with torch.no_grad():
        out = model(tokens, labels=labels)
        close(model(tokens, logits_to_keep=5).logits, out.logits[:, -5:], 1e-6)
    scored = labels[:, 1:] != -100
    nll = -out.logits[:, :-1].double().log_softmax(-1)
    nll = nll.gather(2, labels[:, 1:].clamp_min(0).unsqueeze(2)).squeeze(2)
    assert float(out.loss) == pytest.approx(float(nll[scored].mean()), rel=1e-5)
    assert not model.accepts_loss_kwargs  # Trainer then divides by the batches it accumulates
    with pytest.raises(ValueError, match="position_ids"):  # it would not use them
        model(tokens, position_ids=tokens)


def test_forward_of_no_tokens_keeps_the_state(base):
    """The cache may be given by the name of transformers 5.24, or of those before."""
    model, tokens = make(base), draw(2, 21)
    with torch.no_grad():
        cache = model(tokens)[em.CACHE]
        for name in ("cache", "past_key_values"):
            out = model(tokens[:, :0], **{name: cache})
            assert out.logits.shape == (2, 0, V)
            same_bits(cache.state, out[em.CACHE].state)


@pytest.mark.parametrize("eviction", ["fifo", "usage"])
def test_bfloat16_stays_near_float32(base, eviction):
    """Eight bits: within 5 % of the logits' spread on average."""
    tokens = draw(2, 41)
    wanted = read_all(make(base, eviction=eviction), tokens)[0]
    logits = read_all(make(base, dtype=torch.bfloat16, eviction=eviction), tokens)[0].float()
    assert (logits - wanted).abs().mean() < 0.05 * wanted.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_probabilities_sum_to_one_in_any_dtype(base, alpha, dtype):
    """Also where reads point with nearly all of their weight: in bfloat16 what is left of 1 would
    be a multiple of 0.004."""
    model = make(base, dtype=dtype, pointing=True, key_of="previous")
    with torch.no_grad():
        model.edm.point_alpha.fill_(alpha)
        logits = model(draw(2, 60)).logits
    total = logits.float().logsumexp(-1)[:, 40:]  # behind what has been stored
    assert total.abs().max() < 1e-5


# ══ Gradients ════════════════════════════════════════════════════════════════════════════════════
@pytest.mark.parametrize("length, fields", [
    (34, {"stride": 16}),
    (25, {"stride": 8, "slots": 18}),
    (34, {"stride": 5, "document_end": 7, "write_every": 2, "key_of": "previous"}),
], ids=["blocks", "lengths", "ends"])
def test_gradient_equals_finite_differences(base, length, fields):
    """Central, in float64, along a random direction of each parameter; nothing is cut. Row 1 may
    end sooner: then row 0 leaves its windows alone. The base has no gradient."""
    model = make(base, 0.5, torch.float64, bptt_segments=1000, **fields)
    tokens, mask = draw(2, 34, low=8), torch.ones(2, 34, dtype=torch.long)
    tokens[0, 18], mask[1, length:] = 7, 0
    given = {"input_ids": tokens, "attention_mask": mask,
             "labels": tokens.masked_fill(mask == 0, -100)}
    oracle.check_slopes(model, oracle.memories(model), given)
    assert all(p.grad is None for p in model.transformer.parameters())


def test_gradient_moves_closed_gates_and_is_finite_where_a_row_is_empty(base):
    """A row that starts reads nothing beside one that has a memory."""
    model, tokens = make(base, 0.0).train(), draw(2, 3 * W)
    mask = torch.ones_like(tokens)
    mask[1, : 2 * W + 5] = 0
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in oracle.memories(model).values())
    assert all(memory.alpha.grad.abs() > 0 for memory in (model.edm, model.early, model.late))


@pytest.mark.parametrize("stride, segments, count", [
    (16, 1, 1), (16, 2, 1), (16, 3, 2), (16, 4, 3), (16, 9, 5),
    (8, 1, None), (8, 3, None), (5, 3, None)])
def test_bptt_segments_bound_the_entries_with_gradient(base, stride, segments, count, monkeypatch):
    """The newest ones, in blocks the segment that reads and those before it, one at the least.
    Every slot is read; no recurrent memory, whose gradient is not cut."""
    model = make(base, stride=stride, bptt_segments=segments, slots=128, read_top_k=128,
                 **NOTEBOOK_ONLY).train()
    tokens, entries, write = draw(2, 6 * W), [], model.edm.write

    def spy(*args):
        state, entry = write(*args)
        entry.keys.retain_grad(), entry.values.retain_grad()
        entries.append(entry)
        return state, entry

    monkeypatch.setattr(model.edm, "write", spy)
    h, _, _ = model.advance(tokens, torch.ones_like(tokens).bool(), model.init_state(2))
    h[:, -stride:].square().sum().backward()
    reached = [entry.keys.grad is not None and bool(entry.keys.grad.any()) for entry in entries]
    assert reached == [e.values.grad is not None and bool(e.values.grad.any()) for e in entries]
    assert len(entries) == (5 * W + stride - 1) // stride
    assert reached == sorted(reached) and 1 <= sum(reached) <= segments
    assert count is None or sum(reached) == count


@every_read
def test_graph_changes_nothing(base, dense, monkeypatch):
    """Reading what was just written with its graph gives what the store holds, also where a newer
    entry has taken an older one's slot."""
    monkeypatch.setattr(em, "DENSE_SLOTS", dense)
    model, tokens = make(base, dtype=torch.float64, slots=17, stride=5, eviction="lru"), draw(2, 61)
    logits, state, _ = read_all(model, tokens)
    out = model(tokens)
    close(out.logits, logits, 1e-10)
    same_memory(out[em.CACHE].state, state, 1e-10)
    assert not any(x.requires_grad for x in oracle.leaves(out[em.CACHE].state).values())


@pytest.mark.parametrize("fields", [
    {"slots": 18, "eviction": "usage", "read_top_k": 3},
    {"stride": 5, "document_end": 7, "write_every": 2}], ids=["evictions", "ends"])
def test_dense_read_equals_the_read_of_the_nearest(base, fields, monkeypatch):
    """Outputs, states and every gradient, float64."""
    tokens, results = draw(2, 70, low=8), []
    tokens[0, 18] = 7
    for slots in (0, 2048):
        monkeypatch.setattr(em, "DENSE_SLOTS", slots)
        model = make(base, 0.5, torch.float64, bptt_segments=3, **fields)
        out = model(tokens, labels=tokens)
        out.loss.backward()
        results.append((out, {name: p.grad for name, p in oracle.memories(model).items()}))
    (one, grads), (other, others) = results
    close(one.logits, other.logits, 1e-10)
    same_memory(one[em.CACHE].state, other[em.CACHE].state, 1e-10)
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        close(grad, others[name], 1e-10)


def test_train_mode_has_no_dropout_of_the_base(base):
    assert base.config.resid_pdrop > 0
    model, tokens = make(base), draw(2, 40)
    logits = read_all(model, tokens)[0]
    assert torch.equal(read_all(model.train(), tokens)[0], logits)
    assert model.training and model.edm.training
    assert not any(module.training for module in model.transformer.modules())


# ══ Rows and padding ═════════════════════════════════════════════════════════════════════════════
@pytest.mark.parametrize("fields", [
    {"stride": 16}, {"stride": 5, "write_every": 2}, {"eviction": "usage", "slots": 20},
    {"eviction": "lru", "slots": 20, "document_end": 7}])
def test_rows_change_no_bit_of_another(base, fields):
    """Not by other tokens, nor by the end of a document."""
    model, tokens = make(base, **fields), draw(3, 70, low=8)
    one = read_all(model, tokens)
    tokens[1] = draw(70, seed=99)
    tokens[1, [22, 60]] = 7
    other = read_all(model, tokens)
    for row in (0, 2):
        assert torch.equal(one[0][row], other[0][row])
        same_bits(one[1], other[1], row)
    assert not torch.equal(one[0][1], other[0][1])


def test_empty_row_reads_exactly_zero_beside_a_full_one(base):
    model = make(base, 2.0)
    full = read_all(model, draw(2, 60))[1]
    state = model.reset_memory(full, torch.tensor([True, False])).memory
    added, _, weights = model.edm.read(torch.randn(2, 5, C), state, [])
    assert not added[0].any() and not weights[0].any()
    assert added[1].abs().min() > 0
    close(weights[1].sum(-1), torch.ones(2, 5), 1e-6)


@pytest.mark.parametrize("seed, fields", [
    (0, {"stride": 16}), (1, {"stride": 8, "eviction": "lru", "slots": 20}),
    (2, {"stride": 5, "write_every": 2, "document_end": 7}),
    (3, {"stride": 7, "key_of": "previous"})])
def test_mask_gives_the_row_of_what_it_shows(base, seed, fields):
    """Any mask; a row of nothing but pads, one with more of them than a window at its left, one
    that ends; in two calls, with the mask of all columns so far."""
    model = make(base, dtype=torch.float64, **fields)
    tokens, mask = draw(5, 77, seed=seed), draw(5, 77, seed=seed + 50, high=4).clamp_max(1)
    mask[1], mask[2], mask[3], mask[4] = 0, 1, 1, 1
    mask[2, :33], mask[4, 40:] = 0, 0
    with torch.no_grad():
        first = model(tokens[:, :29], attention_mask=mask[:, :29])
        second = model(tokens[:, 29:], attention_mask=mask, cache=first[em.CACHE])
    logits, cache = torch.cat([first.logits, second.logits], 1), second[em.CACHE]
    assert cache.get_seq_length() == 77
    for row in (0, 2, 3, 4):
        shown = mask[row].bool()
        alone, own, _ = read_all(model, tokens[row : row + 1, shown])
        close(logits[row, shown], alone[0], 1e-10)
        same_memory(own, oracle.row_of(cache.state, row), 1e-10)
    nothing = oracle.row_of(cache.state, 1)  # but index W of the buffers, where masked tokens go
    same_memory(nothing, model.init_state(1), 0.0)
    assert not nothing.hidden[:, :W].any() and not nothing.final[:, :W].any()


# ══ The notebook alone ═══════════════════════════════════════════════════════════════════════════
def notebook(slots: int = 9, top_k: int = 3, heads: int = 2, width: int = 5, **fields) -> em.EDM:
    torch.manual_seed(0)
    edm = em.EDM(C, heads, width, slots, top_k, **fields).double()
    with torch.no_grad():
        for parameter in edm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        edm.alpha.fill_(0.7)
    return edm


def random_h(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, C, dtype=torch.float64)


def test_eviction_fifo_is_of_the_oldest_after_sixteen_million_tokens():
    edm = notebook(slots=4)
    state, start = edm.init_state(1), 2**24 + 1
    for i in range(7):
        at = torch.tensor([[start + i]])
        state, _ = edm.write(random_h(1, 1), at * 0, at, torch.ones(1, 1).bool(), state)
    assert sorted((state.position[0] - start).tolist()) == [3, 4, 5, 6]


def test_edm_starts_as_the_attention_of_its_block(base):
    """What it reads is a naive attention over the store by cosine. Other heads leave it as it was.
    """
    block, h = base.transformer.h[1], torch.randn(1, 9, C)
    torch.manual_seed(0)
    edm, other = em.EDM(C, 4, C // 4, 20, 20), em.EDM(C, 2, C // 2, 20, 20)
    before = other.query.weight.clone()
    edm.start_from(block), other.start_from(block)
    assert torch.equal(other.query.weight, before)
    edm.alpha.data.fill_(50.0)  # an open gate
    with torch.no_grad():
        _, state, _ = edm(h[:, :8], edm.init_state(1))
        added = edm.read(h[:, 8:], state, []).added
        qkv = block.attn.c_attn(block.ln_1(h)).split(C, dim=2)
        q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in qkv)  # (1, 4, 9, D)
        scores = 16 * F.cosine_similarity(q[:, :, 8:], k[:, :, :8], dim=-1)  # (1, 4, 8)
        mixed = (scores.softmax(-1).unsqueeze(-1) * v[:, :, :8]).sum(2).flatten(1)  # (1, C)
        close(added[:, 0], mixed @ block.attn.c_proj.weight, 1e-4)


def test_edm_of_the_token_before_finds_what_followed():
    """At first it finds the nearest h and hands on the one that followed, across calls too."""
    edm, h = em.EDM(C, 2, C // 2, 20, 1, key_of="previous"), torch.randn(2, 12, C)
    edm.start_from(None)
    edm.alpha.data.fill_(50.0)
    with torch.no_grad():
        _, state, _ = edm(h[:, :5], edm.init_state(2))
        _, state, _ = edm(h[:, 5:], state)
        added, slots, _ = edm.read(h[:, 3:7], state, [])
        assert (slots[..., 0] == torch.arange(4, 8)).all()
        close(added, edm.norm(h[:, 4:8]), 1e-5)


def test_edm_forward_by_segments_equals_calls_by_segments():
    """Outputs, state and trace, where tokens that are not stored count too: each reads what was
    before it, the first nothing, and then is stored. The last give the first ones gradient."""
    edm, h = notebook(slots=20, top_k=3, segment=3, write_every=2), random_h(2, 10)
    whole, last, trace = edm(h, edm.init_state(2))
    state, parts = edm.init_state(2), []
    for x in h.split(3, 1):
        out, state, own = edm(x, state)
        parts.append((out, own))
    close(whole, torch.cat([out for out, _ in parts], 1), 1e-12)
    for field, wanted in zip(trace, zip(*(own for _, own in parts), strict=True), strict=True):
        close(field, torch.cat(wanted, field.dim() // 2), 1e-12)
    for a, b in zip(last, state, strict=True):
        close(a, b, 1e-12)
    assert torch.equal(whole[:, :3], h[:, :3]) and (whole[:, 3:] != h[:, 3:]).all()
    assert trace.write_slots.tolist() == [[0, -1, 1, -1, 2, -1, 3, -1, 4, -1]] * 2
    assert last.position[:, :6].tolist() == [[0, 2, 4, 6, 8, -1]] * 2
    (whole[:, 9:] - h[:, 9:]).square().sum().backward()
    assert edm.key.weight.grad.abs().max() > 0


# ══ Cuts, reading only, documents ════════════════════════════════════════════════════════════════
@pytest.mark.parametrize("cut", [(1, 7, 30, 2, 1, 23), (1,) * 64], ids=["uneven", "by one"])
@pytest.mark.parametrize("fields", [
    {"stride": 16, "key_of": "previous"}, {"stride": 8, "eviction": "lru", "slots": 20},
    {"stride": 5, "document_end": 7, "write_every": 2}, {"eviction": "usage", "slots": 20}])
def test_segments_equal_all_at_once(base, fields, cut):
    model, tokens = make(base, dtype=torch.float64, **fields), draw(2, 64, low=7, high=40)
    whole, last, _ = read_all(model, tokens)
    state, parts = model.init_state(2), []
    for part in tokens.split(cut, 1):
        logits, state, _ = read_all(model, part, state=state)
        parts.append(logits)
    close(torch.cat(parts, 1), whole, 1e-10)
    same_memory(state, last, 1e-6)


@pytest.mark.parametrize("fields", [
    {"stride": 16}, {"eviction": "lru", "slots": 20, "document_end": 7},
    {"stride": 5, "eviction": "usage"}])
def test_read_only_leaves_the_memories_unchanged(base, fields):
    """Also at the end of a document; the window goes on as ever."""
    model, tokens = make(base, **fields), draw(2, 90, low=8)
    tokens[0, 50] = 7
    _, before, _ = read_all(model, tokens[:, :41])
    _, after, _ = read_all(model, tokens[:, 41:], state=before, read_only=True)
    same_bits(before, after, but=oracle.WINDOW)
    _, both, _ = read_all(model, tokens[:, 41:], state=before)
    for name in ("tokens", "fill", "start"):
        assert torch.equal(getattr(after, name), getattr(both, name))


def test_read_only_reads_the_memory_as_it_was(base):
    """A naive row whose memory is held gives the same logits."""
    model, tokens = make(base, dtype=torch.float64, stride=5), draw(1, 70)
    _, state, _ = read_all(model, tokens[:, :35])
    logits, _, _ = read_all(model, tokens[:, 35:], state=state, read_only=True)
    naive = oracle.NaiveRow(model)
    for token in tokens[0, :35].tolist():
        naive.step(token)

    def hold():
        naive.start += naive.c.stride

    naive.leave = hold
    close(logits[0], np.stack([naive.step(t) for t in tokens[0, 35:].tolist()]), 1e-9)


def forgotten(model, end: int, upto: int) -> em.EDMGPT2State:
    """Of two runs of 90 tokens with the end of a document at `end`, which differ before `upto`, no
    bit differs once the end has left. The state at last."""
    one = draw(2, 90, low=8)
    one[0, end] = 7
    other = one.clone()
    other[0, :upto] = draw(upto, seed=77, low=8)
    start = (oracle.first_start(t + 1, model.config.stride) for t in range(90))
    left = next(t for t, first in enumerate(start) if first > end)
    (logits, state, _), (others, another, _) = (read_all(model, tokens) for tokens in (one, other))
    assert not torch.equal(logits[0, upto - 1], others[0, upto - 1])
    assert torch.equal(logits[0, left:], others[0, left:])
    same_bits(state, another, 0, but=("hidden", "final", "kv"))  # what no place holds any more
    return state


@pytest.mark.parametrize("stride, end", [(16, 21), (8, 32), (8, 47), (5, 16), (5, 47)])
def test_reset_forgets_what_stood_before_the_window_of_the_end(base, stride, end):
    """Once the end has left no bit depends on it, and the entries are those behind the end."""
    model = make(base, stride=stride, document_end=7, slots=64, **NOTEBOOK_ONLY)
    state = forgotten(model, end, oracle.first_start(end + 1, stride))
    wanted = list(range(end + 1, oracle.first_start(90, stride)))
    assert state.memory.position[0].tolist() == wanted + [-1] * (64 - len(wanted))


@pytest.mark.parametrize("end", [31, 47])
def test_reset_at_the_end_of_a_block_forgets_the_document(base, end):
    """Nothing of the new document has shared a window with the old one: every memory forgets."""
    forgotten(make(base, stride=W, document_end=7), end, end)


@pytest.mark.parametrize("name", ["keys", "values", "early", "late"])
def test_reset_token_in_the_window_hides_the_memories(base, name):
    """The end stands first in the window: whatever the memories hold, no bit changes."""
    model, tokens = make(base, stride=W, document_end=7), draw(1, 60, low=8)
    tokens[0, 48] = 7
    _, state, _ = read_all(model, tokens[:, :48])
    state = model.leave_rows(torch.ones(1, dtype=torch.bool), state, [], False)
    noise = torch.randn_like(oracle.leaves(state)[name])
    if name in ("keys", "values"):
        other = state._replace(memory=state.memory._replace(**{name: F.normalize(noise, dim=-1)}))
    else:
        other = state._replace(**{name: noise})
    for last, is_hidden in ((tokens[:, 48:], True), (tokens[:, 49:], False)):
        one, another = (read_all(model, last, state=x)[0] for x in (state, other))
        assert torch.equal(one, another) == is_hidden


def test_reset_token_in_the_window_leaves_no_weights(base):
    model, tokens = make(base, stride=W, document_end=7), draw(1, 60, low=8)
    tokens[0, 50] = 7
    weights = read_all(model, tokens)[2][-1].weights  # (B, H, m, K)
    assert weights[:, :, :2].any() and not weights[:, :, 2:].any()


def test_reset_memory_is_of_the_rows_named(base):
    """An empty state draws no random number."""
    model, random = make(base), torch.get_rng_state()
    _, state, _ = read_all(model, draw(3, 60))
    fresh = model.init_state(3)
    some = model.reset_memory(state, torch.tensor([False, True, False]))
    same_bits(some, fresh, 1)
    same_bits(some, state, [0, 2])
    same_bits(model.reset_memory(state), fresh)
    same_bits(model.reset_memory(state, torch.zeros(3, dtype=torch.bool)), state)
    assert torch.equal(torch.get_rng_state(), random)


# ══ generate ═════════════════════════════════════════════════════════════════════════════════════
def generate(model, tokens, count: int, **options):
    return model.generate(tokens, max_new_tokens=count, pad_token_id=0,
                          **{"do_sample": False, **options})


def greedy(model, tokens, prompt: int) -> bool:
    """Whether the tokens behind the prompt are the likeliest ones, read in one pass."""
    best = read_all(model, tokens[:, :-1])[0].argmax(-1)
    return torch.equal(tokens[:, prompt:], best[:, prompt - 1 :])


@pytest.mark.parametrize("fields", [
    {"stride": 8}, {"stride": 16, "eviction": "lru", "slots": 20},
    {"stride": 5, "document_end": 7}])
def test_generate_equals_a_pass_without_cache(base, fields):
    """Two windows past the first; without cache it generates the same."""
    model, prompt = make(base, dtype=torch.float64, **fields), draw(2, 7)
    tokens = generate(model, prompt, 40)
    assert tokens.shape == (2, 47) and greedy(model, tokens, 7)
    assert len(set(tokens[0, 7:].tolist())) > 3  # not the same token for ever
    assert torch.equal(generate(model, prompt, 12, use_cache=False), tokens[:, :19])


def test_generate_reads_each_token_once(base, monkeypatch):
    model, prompt, seen = make(base), draw(2, 21), []
    advance = model.advance

    def spy(tokens, *args):
        seen.append(tokens.shape[1])
        return advance(tokens, *args)

    monkeypatch.setattr(model, "advance", spy)
    generate(model, prompt, 12)
    assert seen == [21] + [1] * 11


def test_generate_beams_equal_a_naive_search(base):
    """Three beams of two prompts, across two strides; every one is returned."""
    model, prompts = make(base, dtype=torch.float64), draw(2, 11)
    wanted = []
    for prompt in prompts.tolist():
        alive = [(0.0, prompt)]
        for _ in range(15):
            p = read_all(model, torch.tensor([ids for _, ids in alive]))[0][:, -1].log_softmax(-1)
            grown = [(score + float(p[i, token]), [*ids, token])
                     for i, (score, ids) in enumerate(alive) for token in range(V)]
            alive = sorted(grown, reverse=True)[:3]
        wanted += [ids for _, ids in alive]
    beams = generate(model, prompts, 15, num_beams=3, num_return_sequences=3)
    assert beams.tolist() == wanted
    assert not greedy(model, beams[:1], 11)  # beams matter


def test_generate_samples_of_a_seed_are_the_same(base):
    """Of one candidate they are greedy."""
    model, prompt, samples = make(base, dtype=torch.float64), draw(2, 9), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(generate(model, prompt, 12, do_sample=True, num_return_sequences=3))
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    assert len({tuple(row) for row in samples[0].tolist()}) == 6
    assert torch.equal(samples[0][:, :9], prompt.repeat_interleave(3, 0))
    only = generate(model, prompt, 12, do_sample=True, top_k=1, num_return_sequences=2)
    assert greedy(model, only, 9)


def test_generate_second_turn_equals_one_pass(base):
    """The cache of the first turn, which has not read the last token, and its mask."""
    model, prompt, more = make(base, dtype=torch.float64), draw(2, 20), draw(2, 9, seed=5)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    first = generate(model, prompt, 15, attention_mask=mask, return_dict_in_generate=True)
    cache = first[em.CACHE]
    assert cache.get_seq_length() == 34
    both, mask = torch.cat([first.sequences, more], 1), F.pad(mask, (0, 24), value=1)
    wanted = generate(model, both, 12, attention_mask=mask)
    before = em.map_state(torch.clone, cache.state)
    for _ in range(2):  # the cache may be used again: a turn takes nothing from it
        again = generate(model, both, 12, attention_mask=mask, **{em.CACHE: cache})
        assert torch.equal(again, wanted)
        same_bits(cache.state, before)


def test_generate_of_a_padded_batch_equals_its_rows(base):
    """It stops at an end token."""
    model, lengths = make(base, dtype=torch.float64, stride=5), (3, 30)
    tokens, mask = draw(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :27] = 0
    padded = generate(model, tokens, 20, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = generate(model, tokens[row : row + 1, 30 - length :], 20)
        assert torch.equal(padded[row, 30:], alone[0, length:])
    end = int(alone[0, 40])
    stopped = generate(model, tokens[1:], 20, eos_token_id=end)
    assert torch.equal(stopped[0], alone[0, : 31 + alone[0, 30:].tolist().index(end)])


# ══ Saved folders, memory files ══════════════════════════════════════════════════════════════════
def aligned(model):
    """Its weights copied to where PyTorch puts tensors. Those of a file lie where the file has
    them, which can change the last bit of a product."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def same_weights(one, other) -> None:
    other = other.state_dict()
    assert set(other) == set(one.state_dict())
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other[name]), name


ELSEWHERE = """
import importlib.util, pickle, sys
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("dnc_gpt2") is None
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/model", trust_remote_code=True)
for parameter in model.parameters():  # to aligned memory, as in the process that saved it
    parameter.data = parameter.data.clone()
module = sys.modules[type(model).__module__]
tokens, prompt = torch.load(folder + "/tokens.pt")
state = module.unpack_memory(torch.load(folder + "/memory.pt", weights_only=True), model)
assert type(pickle.loads(pickle.dumps(model))) is type(model)  # as to another process
with torch.no_grad():
    results = {
        "logits": model(tokens).logits,
        "later": model(tokens[:, :40], past_key_values=module.StateCache(state)).logits,
        "sampled": model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0),
        "trained": sorted(n for n, p in model.named_parameters() if p.requires_grad)}
AutoTokenizer.from_pretrained(folder + "/model", trust_remote_code=True)("the city")["input_ids"]
torch.save(results, folder + "/results.pt")
"""


def test_saved_model_and_memory_go_on_elsewhere_bit_for_bit(edm_base, tmp_path):
    """In a process in another folder, without this repository. Saving leaves the model as it was;
    memories alone are trained there."""
    model = eg.build_model(edm_base, oracle.edm_config(), "both", 0).eval()
    with torch.no_grad():
        for memory in (model.edm, model.early, model.late):
            memory.alpha.fill_(0.5)
    tokens, prompt = draw(2, 70), draw(1, 30, seed=3)
    before = read_all(model, tokens)[0]
    eg.save_model(model, edm_base, tmp_path / "model")
    assert model.config.stride == W and torch.equal(read_all(model, tokens)[0], before)
    carried = tmp_path / "model" / "edm_model.py"
    assert carried.read_text(encoding="utf-8") == dnc_gpt2.standalone_source(Path(em.__file__))

    model.config.stride = W // 2  # as generation has it
    logits, state, _ = read_all(model, tokens)
    eg.save_memory(state, model, tmp_path / "memory.pt")
    torch.save((tokens, prompt), tmp_path / "tokens.pt")
    (tmp_path / "cwd").mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1",
           "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], cwd=tmp_path / "cwd",
                          env=env, text=True, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    assert torch.equal(results["logits"], logits)
    assert torch.equal(results["later"], read_all(model, tokens[:, :40], state=state)[0])
    assert torch.equal(results["sampled"], generate(model, prompt, 12))
    assert results["trained"] == sorted(oracle.memories(model)) and len(results["trained"]) > 20


@pytest.mark.parametrize("fields", [
    {}, {"edm": False, "early": False},
    {"stride": 5, "eviction": "lru", "slots": 17, "write_every": 2, "document_end": 7,
     "read_layer": 0, "key_of": "previous"}])
def test_save_pretrained_comes_back_bit_for_bit(base, tmp_path, fields):
    """Weights, configuration, what is trained."""
    model, tokens = make(base, **fields), draw(2, 50)
    model.save_pretrained(tmp_path)
    loaded, info = em.EDMGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    same_weights(loaded, model)
    assert torch.equal(read_all(aligned(loaded), tokens)[0], read_all(model, tokens)[0])
    wanted, config = model.config.to_dict(), loaded.config.to_dict()
    assert all(config[name] == wanted[name] for name in (*oracle.TINY, *fields))
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == set(oracle.memories(loaded))


def test_from_pretrained_starts_memories_that_the_file_lacks(base, tmp_path):
    make(base, **NOTEBOOK_ONLY).save_pretrained(tmp_path)
    model = em.EDMGPT2ForCausalLM.from_pretrained(tmp_path, early=True)
    assert model.early.alpha == 0 and torch.equal(model.early.norm.weight, torch.ones(C))
    assert 0.05 < model.early.cell.weight_ih.std() < 0.5


def test_memory_that_is_altered_or_of_another_model_is_refused(base):
    model = make(base, eviction="lru", slots=20)
    _, state, _ = read_all(model, draw(1, 61))
    payload = em.pack_memory(state, model)
    for fields in ({"seed": 1}, {"stride": 5}, {"slots": 21}, {"eviction": "fifo"}, {"late": False},
                   {"write_every": 2}, {"read_layer": 2}, {"key_of": "previous"}):
        other = make(base, **{"eviction": "lru", "slots": 20} | fields)
        with pytest.raises(ValueError, match="another"):
            em.unpack_memory(payload, other)

    values = state.memory.values.clone()
    values.view(-1)[5] += 1e-6
    bent = [*state.memory._replace(values=values)]
    for memory in (bent, bent[:-1], 3):
        with pytest.raises(ValueError, match="altered"):
            em.unpack_memory(payload | {"state": payload["state"] | {"memory": memory}}, model)


# ══ Adapters ═════════════════════════════════════════════════════════════════════════════════════
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
both_widths = pytest.mark.parametrize("low", [False, True], ids=["lora", "qlora"])


@pytest.fixture(scope="module")
def wide_base(edm_tokenizer) -> eg.Base:
    """Of width 64, a block of NF4; see test_qlora_refuses_a_width_that_is_no_block."""
    base = oracle.make_base(64)
    return eg.Base("wide", base.config.to_dict(), base.transformer.state_dict(),
                   edm_tokenizer, origin="")


@pytest.fixture
def adapted(wide_base):
    """adapted(low): a model with open gates and adapters that do something, the base in 4 bits."""

    def build(low: bool = False, **fields):
        config = oracle.edm_config(**{"lora": 3, "lora_dropout": 0.3, "qlora": low} | fields)
        model = eg.build_model(wide_base, config, "both", 0).eval()
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("alpha"):
                    parameter.fill_(0.5)
                elif "lora_B" in name:
                    parameter.normal_(std=0.1)
        return model

    return build


def naive_nf4(weights: dict) -> dict:
    """The projections rounded to NF4, of the transposed weight 64 numbers a block: the nearest of
    16 values times the block's largest."""
    rounded = dict(weights)
    for name, weight in weights.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            blocks = weight.T.contiguous().view(-1, 64)
            largest = blocks.abs().amax(1, keepdim=True)
            nearest = ((blocks / largest).unsqueeze(2) - torch.tensor(NF4)).abs().argmin(2)
            rounded[name] = (torch.tensor(NF4)[nearest] * largest).view(weight.T.shape).T
    return rounded


@both_widths
def test_lora_starts_as_the_base_and_then_changes_it(wide_base, adapted, low):
    model, tokens = adapted(low), draw(2, W)
    logits = read_all(model, tokens)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    bare = read_all(model, tokens)[0]
    assert (logits - bare).abs().max() > 0.01
    weights = naive_nf4(wide_base.weights) if low else wide_base.weights
    frozen = wide_base._replace(weights=weights)
    plain = eg.build_model(frozen, oracle.edm_config(), "both", 0).eval()
    close(bare, read_all(plain, tokens)[0], 1e-4)


@both_widths
def test_lora_comes_back_bit_for_bit(adapted, tmp_path, low):
    """Saving twice writes the same, and leaves the model and whose its memories are."""
    model, tokens = adapted(low), draw(2, 50)
    before, whose = read_all(model, tokens)[0], em.fingerprint(model)
    for name in "ab":
        model.save_pretrained(tmp_path / name)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other and em.fingerprint(model) == whose
    assert torch.equal(read_all(model, tokens)[0], before)

    loaded = aligned(em.EDMGPT2ForCausalLM.from_pretrained(tmp_path / "a"))
    same_weights(loaded, model)
    assert torch.equal(read_all(loaded, tokens)[0], before)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    adapters = {name for name, _ in loaded.named_parameters() if "lora_" in name}
    assert trained == set(oracle.memories(loaded)) | adapters
    assert len(adapters) == 2 * 3 * 3  # A and B, three modules a block


@both_widths
def test_lora_merged_equals_unmerged(adapted, tmp_path, low):
    model, tokens = adapted(low), draw(2, 50)
    before = read_all(model, tokens)[0]
    model.merge_lora()
    close(read_all(model, tokens)[0], before, 1e-5)
    assert not any("lora" in name for name, _ in model.named_modules())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(oracle.memories(model))
    model.save_pretrained(tmp_path)
    loaded = aligned(em.EDMGPT2ForCausalLM.from_pretrained(tmp_path))
    assert loaded.config.lora is None and not loaded.config.quantize
    assert torch.equal(read_all(loaded, tokens)[0], read_all(model, tokens)[0])


def test_qlora_refuses_a_width_that_is_no_block(base):
    """bitsandbytes 0.50 on the CPU takes the wrong block's scale there."""
    with pytest.raises(ValueError) as error:
        em.quantize(base.transformer)
    oracle.one_line(error, "qlora", "64")


@both_widths
def test_lora_trains_adapters_and_leaves_the_base(adapted, low):
    """Its dropout is on in training alone."""
    model, tokens = adapted(low), draw(2, 40)
    calm = [read_all(model, tokens)[0] for _ in range(2)]
    wild = [read_all(model.train(), tokens)[0] for _ in range(2)]
    assert torch.equal(*calm) and not torch.equal(*wild)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(tokens, labels=tokens).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith("transformer.") and "lora_" not in name
        assert torch.equal(parameter, before[name]) == is_frozen, name
        assert (parameter.grad is None) == is_frozen, name


@pytest.mark.parametrize("target", ["c_ttn", "ln_1", "attn", "h"])
def test_lora_refuses_a_target_that_takes_no_adapter(adapted, target):
    with pytest.raises(ValueError) as error:
        adapted(lora_targets=f"c_attn,{target}")
    oracle.one_line(error, f"lora_targets = {target!r}")


@pytest.mark.parametrize("package, low", [("peft", False), ("bitsandbytes", True)])
def test_adapters_without_their_package_name_what_to_install(adapted, package, low, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # import raises ImportError
    with pytest.raises(ValueError) as error:
        adapted(low)
    oracle.one_line(error, "lora", f"pip install {package}")


def test_qlora_stays_in_four_bits_when_saving_fails(adapted, tmp_path, monkeypatch):
    model = adapted(True)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(em.StatefulCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path)
    assert type(model.transformer.h[0].attn.c_attn.base_layer).__name__ == "Linear4bit"


# ══ Configuration ════════════════════════════════════════════════════════════════════════════════
@pytest.mark.parametrize("name, value", [
    ("window", 65), ("window", -1), ("stride", 17), ("read_layer", 3), ("read_layer", -2),
    ("slots", 15), ("slots", 65_537), ("read_top_k", 0), ("read_top_k", 33), ("edm_heads", -1),
    ("eviction", "random"), ("key_of", "next"), ("document_end", -5), ("document_end", V)])
def test_config_refuses_a_bad_value_in_one_line(base, name, value):
    with pytest.raises(ValueError) as error:
        make(base, **{name: value})
    oracle.one_line(error, f"{name} = {value!r}: must be ")


def test_config_takes_its_defaults_from_the_base(base):
    config = em.EDMGPT2Config(base=base.config.to_dict())
    assert (config.window, config.stride, config.read_layer) == (64, 32, 1)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (V, C, 3)
    assert (config.edm_heads, config.key_width) == (4, C // 4)
    assert math.isclose(em.EDM(C, 4, 8, 9, 3).strength.mean().item(), 16.0, rel_tol=1e-6)
