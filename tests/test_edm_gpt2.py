"""Tests of edm_gpt2.py: the model against transformers' GPT-2 and against a naive row of NumPy
loops, the notebook's slots against dictionaries, gradients against finite differences, padding,
cuts, documents, files, generation, adapters, and the measures against fakes of known results.

B rows, T tokens, C hidden width, V vocabulary, W window, S stride, N slots, H heads, D key width,
K slots read, R width of a recurrent memory.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's libraries are first imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import dnc_gpt2
import edm_gpt2 as eg
import edm_model as em

V, C, W = 97, 32, 16
TINY = {"window": W, "stride": 8, "slots": 32, "read_top_k": 4, "edm_heads": 2, "key_width": 8,
        "recurrent_width": 12, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None}  # fmt: skip
RUN = {"window": W, "slots": 32, "top_k": 4, "edm_heads": 2, "key_width": 8, "recurrent_width": 12,
       "batch_size": 4, "bptt_segments": 2, "max_steps": 3, "eval_rows": 3, "recall_rows": 6,
       "topic_rows": 3,
       "log_every_steps": 2, "new_tokens": 9, "temperature": 0.0}  # fmt: skip
ARMS = [{}, {"early": False, "late": False}, {"edm": False}, {"edm": False, "early": False}]
LORA = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.3, "target_modules": ["c_attn", "c_proj"],
        "fan_in_fan_out": True}  # fmt: skip
every_arm = pytest.mark.parametrize("arm", ARMS, ids=["both", "edm", "recurrent", "late"])
every_read = pytest.mark.parametrize("dense", [0, 2048], ids=["nearest", "dense"])
every_stride = pytest.mark.parametrize("stride", [16, 8, 5])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ══ Helpers ══════════════════════════════════════════════════════════════════════════════════════


def make_base(width: int) -> GPT2LMHeadModel:
    """GPT-2 with every weight away from its initial value, so that tokens and places matter."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_embd=width, n_layer=3, n_head=4, n_positions=64, bos_token_id=None,
        eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture(scope="module")
def base() -> GPT2LMHeadModel:
    return make_base(C)


def make(base, alpha: float = 0.5, dtype=torch.float32, seed: int = 0, **fields):
    """The base with memories whose weights are away from their initial values."""
    torch.manual_seed(seed)
    model = eg.EDMGPT2ForCausalLM(eg.EDMGPT2Config(
        base=base.config.to_dict(), **{**TINY, **fields}))
    if not fields.get("lora"):
        model.transformer.load_state_dict(base.transformer.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("alpha"):
                parameter.fill_(alpha)
    return model.eval().to(dtype)


def memories(model) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if not n.startswith("transformer.")}


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


def draw(*shape: int, seed: int = 1, low: int = 0, high: int = V) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def read_all(model, tokens, mask=None, state=None, **options):
    """logits (B, T, V), state, passes, without a graph."""
    with torch.no_grad():
        mask = torch.ones_like(tokens) if mask is None else mask
        state = model.init_state(len(tokens)) if state is None else state
        h, state, passes = model.advance(tokens, mask.bool(), state, **options)
        return h @ model.transformer.wte.weight.T, state, passes


def leaves(state) -> dict[str, torch.Tensor]:
    """Every tensor of a state by name."""
    return {**state.memory._asdict(), **{n: x for n, x in state._asdict().items() if n != "memory"}}


def same_bits(one, other, rows=slice(None), but: tuple[str, ...] = ()) -> None:
    other = leaves(other)
    for name, value in leaves(one).items():
        assert name in but or torch.equal(value[rows], other[name][rows]), name


def same_memory(one, other, tolerance: float) -> None:
    """What a row remembers, and what stands in its window."""
    for name in ("position", "token", "fill", "start"):
        assert torch.equal(leaves(one)[name], leaves(other)[name]), name
    for row, fill in enumerate(one.fill.tolist()):
        assert torch.equal(one.tokens[row, :fill], other.tokens[row, :fill])
    for name in ("keys", "values", "early", "late", "rank"):
        close(leaves(one)[name], leaves(other)[name], tolerance)


def close(actual, wanted, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(wanted), atol=tolerance,
                               rtol=tolerance, check_dtype=False)


def one_line(error: pytest.ExceptionInfo, *named: str) -> None:
    text = str(error.value)
    assert len(text.splitlines()) == 1, text
    assert all(word in text for word in named), text


def first_start(length: int, stride: int) -> int:
    """Where the window of so many tokens starts: strides leave until the rest fits."""
    start = 0
    while length - start > W:
        start += stride
    return start


# ══ The naive row ════════════════════════════════════════════════════════════════════════════════


def numbers(module) -> dict[str, np.ndarray]:
    return {n: p.detach().double().numpy() for n, p in module.named_parameters()}


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def unit(x):
    return x / max(float(np.sqrt((x**2).sum())), 1e-6)


def naive_read(p, heads: int, width: int, top_k: int, h, store):
    """h (C,), store {slot: (key (H, D), value (H, D))} -> what to add (C,), {slot: weight} of each
    head: a loop over heads and slots, the nearest chosen by sorting."""
    z, read, found = layer_norm(h, p["norm.weight"], p["norm.bias"]), [], []
    for k in range(heads):
        mine = slice(k * width, (k + 1) * width)
        query = unit(p["query.weight"][mine] @ z + p["query.bias"][mine])
        total = np.zeros(width)
        cosine = {slot: float(query @ key[k]) for slot, (key, _) in store.items()}
        nearest = sorted(cosine, key=cosine.get, reverse=True)[:top_k]
        weights = {slot: math.exp(math.exp(p["log_strength"][k]) * (cosine[slot] - 1))
                   for slot in nearest}
        found.append({slot: weight / sum(weights.values()) for slot, weight in weights.items()})
        for slot, weight in found[-1].items():
            total += weight * store[slot][1][k]
        read.append(total)
    return math.tanh(p["alpha"]) * (p["out.weight"] @ np.concatenate(read)), found


def naive_gru(p, x, state):
    """x (C,), state (R,) -> state (R,), after PyTorch's documentation."""
    x = layer_norm(x, p["norm.weight"], p["norm.bias"])
    i = np.split(p["cell.weight_ih"] @ x + p["cell.bias_ih"], 3)
    s = np.split(p["cell.weight_hh"] @ state + p["cell.bias_hh"], 3)
    r, z = (1 / (1 + np.exp(-(a + b))) for a, b in zip(i[:2], s[:2], strict=True))
    return (1 - z) * np.tanh(i[2] + r * s[2]) + z * state


class NaiveRow:
    """One row, a token at a time: for each the whole window is encoded anew. What is in a slot is a
    dictionary of key, value, position, token and rank."""

    def __init__(self, model):
        self.c, self.p = model.config, numbers(model.transformer)
        self.edm, self.early, self.late = (
            None if m is None else numbers(m) for m in (model.edm, model.early, model.late))
        self.tokens, self.hidden, self.final, self.start = [], [], [], 0
        self.forget()

    def forget(self) -> None:
        self.store, self.first, self.second = {}, *np.zeros((2, self.c.recurrent_width))

    def leave(self) -> None:
        c, going = self.c, range(self.start, self.start + self.c.stride)
        ends = [i for i in going if self.tokens[i] == c.document_end]
        if ends:
            self.forget()
            going = range(ends[-1] + 1, going.stop)
        if self.edm:
            rank = {s: self.store[s]["rank"] if s in self.store else -math.inf
                    for s in range(c.slots)}
            order = sorted(rank, key=lambda s: (rank[s], s))
            for i in (i for i in going if i % c.write_every == 0):
                z, slot = self.hidden[i], order.pop(0)
                z = layer_norm(z, self.edm["norm.weight"], self.edm["norm.bias"])
                key, value = (self.edm[f"{part}.weight"] @ z + self.edm[f"{part}.bias"]
                              for part in ("key", "value"))
                key, value = key.reshape(c.edm_heads, -1), value.reshape(c.edm_heads, -1)
                self.store[slot] = {
                    "key": np.stack([unit(k) for k in key]), "position": i,
                    "value": value,
                    "token": self.tokens[i],
                    "rank": max(rank[slot], 0) + 1 if c.eviction == "usage" else i}
        if self.early and len(going):
            mean = np.mean([self.p["wte.weight"][self.tokens[i]] for i in going], axis=0)
            self.first = naive_gru(self.early, mean, self.first)
        if self.late and len(going):
            self.second = naive_gru(self.late, np.mean([self.final[i] for i in going], axis=0),
                                    self.second)
        self.start += c.stride

    def step(self, token: int) -> np.ndarray:
        """The next token -> logits (V,)."""
        c, p, heads = self.c, self.p, 4
        if len(self.tokens) - self.start == c.window:
            self.leave()
        self.tokens.append(token)
        window = self.tokens[self.start :]
        sees = [c.document_end not in window[: i + 1] for i in range(len(window))]
        h = np.stack([p["wte.weight"][t] + p["wpe.weight"][i] for i, t in enumerate(window)])
        if self.early:
            h[sees] += math.tanh(self.early["alpha"]) * (self.early["out.weight"] @ self.first)
        for layer in range(3):
            q = {n.removeprefix(f"h.{layer}."): x for n, x in p.items()
                 if n.startswith(f"h.{layer}.")}
            if layer == c.read_layer:
                before = h[-1].copy()
                if self.edm:
                    store = {s: (x["key"], x["value"]) for s, x in self.store.items()}
                    reads = [naive_read(self.edm, c.edm_heads, c.key_width, c.read_top_k, x, store)
                             for x in h]
                    h = h + np.stack([a for a, _ in reads]) * np.array(sees)[:, None]
            z = layer_norm(h, q["ln_1.weight"], q["ln_1.bias"])
            z = z @ q["attn.c_attn.weight"] + q["attn.c_attn.bias"]
            query, key, value = z.reshape(len(h), 3, heads, -1).transpose(1, 2, 0, 3)
            mixed = np.zeros((len(h), heads, C // heads))
            for head in range(heads):
                for t in range(len(h)):
                    score = key[head, : t + 1] @ query[head, t] / math.sqrt(C // heads)
                    score = np.exp(score - score.max())
                    mixed[t, head] = score / score.sum() @ value[head, : t + 1]
            h = h + mixed.reshape(len(h), C) @ q["attn.c_proj.weight"] + q["attn.c_proj.bias"]
            z = layer_norm(h, q["ln_2.weight"], q["ln_2.bias"])
            z = z @ q["mlp.c_fc.weight"] + q["mlp.c_fc.bias"]
            z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            h = h + z @ q["mlp.c_proj.weight"] + q["mlp.c_proj.bias"]
        final = layer_norm(h, p["ln_f.weight"], p["ln_f.bias"])[-1]
        self.hidden.append(before)
        self.final.append(final)
        if self.edm and sees[-1] and c.eviction != "fifo":
            for weights in reads[-1][1]:
                for slot, weight in weights.items():
                    if c.eviction == "usage":
                        self.store[slot]["rank"] += weight
                    else:
                        self.store[slot]["rank"] = max(self.store[slot]["rank"],
                                                       len(self.tokens) - 1)
        if self.late and sees[-1]:
            final = final + math.tanh(self.late["alpha"]) * (self.late["out.weight"] @ self.second)
        return p["wte.weight"] @ final


REFERENCE = {
    "blocks": dict(stride=16),
    "halves": dict(stride=8, slots=64, read_top_k=8),
    "odd": dict(stride=5, slots=17, read_top_k=3),
    "sparse": dict(stride=5, slots=19, write_every=3, eviction="lru"),
    "lru": dict(stride=8, slots=20, eviction="lru"),
    "lru in blocks": dict(stride=16, slots=16, eviction="lru", read_top_k=5, read_layer=2),
    "usage": dict(stride=8, slots=20, eviction="usage"),
    "usage, sparse": dict(stride=16, slots=17, eviction="usage", write_every=2, read_layer=0),
    "ends": dict(stride=8, slots=20, document_end=7),
    "ends in blocks": dict(stride=16, slots=20, document_end=7, eviction="lru"),
    "ends, odd": dict(stride=5, slots=18, document_end=7, write_every=2, edm_heads=1),
    "edm": dict(stride=16, early=False, late=False, edm_heads=3, key_width=5, read_layer=0),
    "early": dict(stride=8, edm=False, late=False),
    "late": dict(stride=5, edm=False, early=False),
}


@pytest.mark.parametrize("fields", REFERENCE.values(), ids=list(REFERENCE))
def test_model_equals_a_naive_row_in_loops(base, fields):
    """Logits of every token, and all that is remembered at the end. In float64; usage in float32,
    with which alone it runs."""
    low = fields.get("eviction") == "usage"
    dtype, tolerance = (torch.float32, 5e-4) if low else (torch.float64, 1e-9)
    model, tokens = make(base, dtype=dtype, **fields), draw(2, 59, low=8)
    if "document_end" in fields:
        tokens[0, [20, 23, 47]] = 7  # two in one stride, one at the end of a window
        tokens[1, 0] = 7
    logits, state, _ = read_all(model, tokens)
    memory = state.memory
    for row in range(2):
        naive = NaiveRow(model)
        close(logits[row], np.stack([naive.step(t) for t in tokens[row].tolist()]), tolerance)
        assert naive.start == state.start[row]
        if model.edm is not None:
            used = (memory.position[row] >= 0).nonzero().flatten().tolist()
            assert used == sorted(naive.store) == list(range(len(used)))
            for slot, entry in naive.store.items():
                assert memory.position[row, slot] == entry["position"]
                assert memory.token[row, slot] == entry["token"]
                close(memory.keys[row, :, slot], entry["key"], tolerance)
                close(memory.values[row, :, slot], entry["value"], tolerance)
                close(memory.rank[row, slot], float(entry["rank"]), max(tolerance, 1e-6))
        if model.early is not None:
            close(state.early[row], naive.first, tolerance)
        if model.late is not None:
            close(state.late[row], naive.second, tolerance)


# ══ Step 0 ═══════════════════════════════════════════════════════════════════════════════════════


@every_arm
@pytest.mark.parametrize("window, T", [(16, 1), (16, 7), (16, 16), (64, 37), (64, 64)])
def test_step_zero_equals_the_base_bit_for_bit(base, arm, window, T):
    model, tokens = make(base, 0.0, window=window, slots=64, **arm), draw(3, T)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base(tokens).logits)


@every_arm
@pytest.mark.parametrize("T", [17, 33, 61, 64])
def test_step_zero_equals_the_base_on_each_block(base, arm, T):
    """Hidden states bit for bit; logits of a whole row are one product, whose last bit can differ
    from that of a block's where the blocks are of several lengths."""
    model, tokens = make(base, 0.0, stride=W, **arm), draw(3, T)
    with torch.no_grad():
        h, _, _ = model.advance(tokens, torch.ones_like(tokens).bool(), model.init_state(3))
        blocks = tokens.split(W, 1)
        assert torch.equal(h, torch.cat([base.transformer(x)[0] for x in blocks], 1))
        logits, wanted = model(tokens).logits, torch.cat([base(x).logits for x in blocks], 1)
    assert torch.equal(logits, wanted) if T % W == 0 else True
    close(logits, wanted, 1e-5)


@every_stride
def test_step_zero_equals_the_base_on_the_window_of_each_token(base, stride):
    model, tokens = make(base, 0.0, torch.float64, stride=stride), draw(2, 61)
    double = GPT2LMHeadModel(base.config).eval().double()
    double.load_state_dict(base.state_dict())
    logits, _, _ = read_all(model, tokens)
    with torch.no_grad():
        for t in range(61):
            window = tokens[:, first_start(t + 1, stride) : t + 1]
            close(logits[:, t], double(window).logits[:, -1], 1e-10)


def test_memory_changes_the_logits_from_the_second_window_on(base):
    """At alpha 0.5 the first window is the base's bit for bit; no later token is."""
    tokens = draw(2, 49)
    for arm in ARMS:
        one, other = (read_all(make(base, a, **arm), tokens)[0] for a in (0.0, 0.5))
        assert torch.equal(one[:, :W], other[:, :W])
        assert ((one - other)[:, W:].abs().amax(-1) > 1e-4).all()


def test_forward_loss_is_that_of_the_shifted_labels(base):
    model, tokens = make(base), draw(3, 37)
    labels = tokens.masked_fill(draw(3, 37, seed=5, high=3) == 0, -100)
    with torch.no_grad():
        out = model(tokens, labels=labels)
    p, total, count = out.logits.double().log_softmax(-1), 0.0, 0
    for row in range(3):
        for t in range(36):
            if labels[row, t + 1] != -100:
                total, count = total - float(p[row, t, labels[row, t + 1]]), count + 1
    assert float(out.loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("keep", [1, 5, 37])
def test_forward_keeps_the_last_logits(base, keep):
    model, tokens = make(base), draw(3, 37)
    with torch.no_grad():
        kept = model(tokens, logits_to_keep=keep).logits
        assert kept.shape == (3, keep, V)
        close(kept, model(tokens).logits[:, -keep:], 1e-6)


def test_forward_loss_is_shared_among_accumulated_batches(base):
    """Trainer asks accepts_loss_kwargs, or else whether forward has **kwargs."""
    model, tokens = make(base), draw(3, 20)
    if getattr(model, "accepts_loss_kwargs", True):
        with torch.no_grad():
            whole, half = model(tokens, labels=tokens), model(tokens, labels=tokens,
                                                              num_items_in_batch=2 * 3 * 19)
        assert float(half.loss) == pytest.approx(float(whole.loss) / 2)


def test_forward_refuses_positions_that_it_would_not_use(base):
    model, tokens = make(base), draw(1, 9)
    with pytest.raises((TypeError, ValueError)):
        model(tokens, position_ids=torch.zeros_like(tokens))


def test_forward_of_no_tokens_keeps_the_state(base):
    model, tokens = make(base), draw(2, 21)
    with torch.no_grad():
        cache = model(tokens)[em.CACHE]
        out = model(tokens[:, :0], **{em.CACHE: cache})
    assert out.logits.shape == (2, 0, V)
    same_bits(cache.state, out[em.CACHE].state)


def test_bfloat16_stays_near_float32(base):
    """Eight bits: within 5 % of the logits' spread on average."""
    tokens, wanted = draw(2, 41), read_all(make(base), draw(2, 41))[0]
    logits = read_all(make(base, dtype=torch.bfloat16), tokens)[0].float()
    assert (logits - wanted).abs().mean() < 0.05 * wanted.std()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_usage_eviction_runs_in_other_dtypes(base, dtype):
    read_all(make(base, dtype=dtype, eviction="usage"), draw(1, 41))


# ══ Gradients ════════════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("stride", [16, 8])
def test_gradient_reaches_every_memory_parameter_alone(base, stride):
    model, tokens = make(base, 0.1, stride=stride).train(), draw(2, 3 * W)
    model(tokens, labels=tokens).loss.backward()
    found = memories(model)
    for part in ("edm.query", "edm.key", "edm.value", "edm.out", "edm.log_strength", "edm.norm",
                 "edm.alpha", "early.cell", "early.norm", "early.out", "late.cell", "late.norm",
                 "late.out"):  # fmt: skip
        assert any(name.startswith(part) for name in found)
    for name, parameter in found.items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.transformer.parameters())


def test_gradient_at_step_zero_moves_every_alpha(base):
    model, tokens = make(base, 0.0).train(), draw(2, 3 * W)
    model(tokens, labels=tokens).loss.backward()
    for memory in (model.edm, model.early, model.late):
        assert memory.alpha.grad.abs() > 0


def test_gradient_is_finite_where_a_row_is_empty(base):
    """A row that starts reads nothing beside one that has a memory."""
    model, tokens = make(base, 0.1).train(), draw(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :15] = 0
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    for name, parameter in memories(model).items():
        assert torch.isfinite(parameter.grad).all(), name


def test_training_leaves_the_base_bitwise(base):
    model, tokens = make(base, 0.1).train(), draw(2, 3 * W)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, before[name]) == name.startswith("transformer."), name


def entries_with_gradient(model, tokens, monkeypatch) -> list[bool]:
    """For every write of a pass whether the outputs of the last window give it gradient."""
    stored, write = [], model.edm.write

    def spy(*args):
        state, entry = write(*args)
        for x in (entry.keys, entry.values):
            x.retain_grad()
        stored.append(entry)
        return state, entry

    monkeypatch.setattr(model.edm, "write", spy)
    h, _, _ = model.advance(tokens, torch.ones_like(tokens, dtype=torch.bool),
                            model.init_state(len(tokens)))
    h[:, -model.config.stride :].square().sum().backward()
    found = [[x.grad is not None and bool(x.grad.abs().max() > 0) for x in (e.keys, e.values)]
             for e in stored]
    assert all(key == value for key, value in found)
    return [key for key, _ in found]


@pytest.mark.parametrize("stride, segments", [
    (16, 1), (16, 2), (16, 3), (16, 4), (8, 2), (8, 3), (5, 3),
    (8, 1)])  # fmt: skip
def test_bptt_segments_bound_the_entries_with_gradient(base, stride, segments, monkeypatch):
    """The newest ones. Every slot is read; no recurrent memory, whose gradient is not cut."""
    model = make(base, stride=stride, bptt_segments=segments, early=False, late=False, slots=128,
                 read_top_k=128).train()  # fmt: skip
    found = entries_with_gradient(model, draw(2, 6 * W), monkeypatch)
    count = sum(found)
    assert len(found) == (6 * W - W + stride - 1) // stride > segments
    assert found == [False] * (len(found) - count) + [True] * count
    assert 1 <= count <= segments


def test_bptt_segments_count_the_segment_that_reads(base, monkeypatch):
    """In blocks: bptt_segments 4 are the one that reads and three before it. One at the least."""
    counts = []
    for segments in (1, 2, 3, 4, 9):
        model = make(base, stride=W, bptt_segments=segments, early=False, late=False, slots=128,
                     read_top_k=128).train()  # fmt: skip
        counts.append(sum(entries_with_gradient(model, draw(2, 6 * W), monkeypatch)))
    assert counts == [1, 1, 2, 3, 5]


@pytest.mark.parametrize("length, fields", [
    (38, dict(stride=16)), (25, dict(stride=8, slots=18)),
    (38, dict(stride=5, document_end=7, write_every=2))], ids=["blocks", "lengths", "ends"])
def test_gradient_equals_finite_differences(base, length, fields):
    """Central, in float64, along a random direction of each parameter; nothing is cut. Row 1 may
    end sooner: then row 0 leaves its windows alone."""
    model = make(base, 0.5, torch.float64, bptt_segments=1000, **fields)
    tokens, mask = draw(2, 38, low=8), torch.ones(2, 38, dtype=torch.long)
    tokens[0, 18], mask[1, length:] = 7, 0
    given = {"attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    model(tokens, **given).loss.backward()
    rng = torch.Generator().manual_seed(3)
    for name, parameter in memories(model).items():
        way = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(step * way)
                ends.append(float(model(tokens, **given).loss))
                parameter.sub_(step * way)
        slope = (ends[0] - ends[1]) / 2e-6
        assert float((parameter.grad * way).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("fields", [dict(), dict(slots=17, stride=5, eviction="lru")])
def test_graph_changes_nothing(base, fields):
    """Reading what was just written with its graph gives what the store holds."""
    model, tokens = make(base, **fields), draw(2, 61)
    logits, state, _ = read_all(model, tokens)
    out = model(tokens)
    close(out.logits, logits, 1e-5)
    same_memory(out[em.CACHE].state, state, 1e-5)
    assert not any(x.requires_grad for x in leaves(out[em.CACHE].state).values())


@pytest.mark.parametrize("fields", [
    dict(stride=16), dict(stride=8, slots=18, eviction="usage", read_top_k=3),
    dict(stride=5, document_end=7, write_every=2)], ids=["blocks", "evictions", "ends"])
def test_dense_read_equals_the_read_of_the_nearest(base, fields, monkeypatch):
    """Outputs, states and every gradient, float64."""
    tokens, found = draw(2, 70, low=8), []
    tokens[0, 18] = 7
    for slots in (0, 2048):
        monkeypatch.setattr(em, "DENSE_SLOTS", slots)
        model = make(base, 0.5, torch.float64, bptt_segments=3, **fields)
        out = model(tokens, labels=tokens)
        out.loss.backward()
        found.append((out, {name: p.grad for name, p in memories(model).items()}))
    (one, grads), (other, others) = found
    close(one.logits, other.logits, 1e-10)
    same_memory(one[em.CACHE].state, other[em.CACHE].state, 1e-10)
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        close(grad, others[name], 1e-10)


def test_gradient_of_a_row_is_its_own(base):
    """That of a row alone, and beside one whose window is in another place."""
    model, tokens = make(base, 0.5, torch.float64, stride=5, bptt_segments=3).train(), draw(2, 48)
    found = []
    for rows in (slice(0, 1), slice(0, 2)):
        model.zero_grad()
        _, state, _ = read_all(model, draw(2, 16, seed=9), draw(2, 16, seed=8, high=2))
        h, _, _ = model.advance(tokens[rows], torch.ones_like(tokens[rows], dtype=torch.bool),
                                eg.map_state(lambda x, rows=rows: x[rows], state))
        h[0].square().sum().backward()
        found.append({n: p.grad.clone() for n, p in memories(model).items()})
    for name, grad in found[0].items():
        close(found[1][name], grad, 1e-8)


def test_train_mode_has_no_dropout_of_the_base(base):
    assert base.config.resid_pdrop > 0
    model, tokens = make(base), draw(2, 40)
    logits = read_all(model, tokens)[0]
    assert torch.equal(read_all(model.train(), tokens)[0], logits)
    assert model.training and model.edm.training
    assert not any(module.training for module in model.transformer.modules())


# ══ Rows ═════════════════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("fields", [
    dict(stride=16), dict(stride=8, eviction="lru", slots=20), dict(stride=5, write_every=2),
    dict(stride=8, eviction="usage", slots=20)])
def test_rows_change_no_bit_of_another(base, fields):
    model, tokens = make(base, **fields), draw(3, 70)
    one = read_all(model, tokens)
    tokens[1] = draw(70, seed=99)
    other = read_all(model, tokens)
    for row in (0, 2):
        assert torch.equal(one[0][row], other[0][row])
        same_bits(one[1], other[1], row)
    assert not torch.equal(one[0][1], other[0][1])


@every_stride
def test_rows_of_other_lengths_change_nothing(base, stride):
    """Row 0 alone is row 0 beside others that end sooner or have an end of a document."""
    model = make(base, dtype=torch.float64, stride=stride, document_end=7)
    tokens = draw(3, 70, low=8)
    tokens[2, 30] = 7
    mask = torch.ones_like(tokens)
    mask[1, 23:] = 0
    alone, beside = read_all(model, tokens[:1]), read_all(model, tokens, mask)
    close(beside[0][:1], alone[0], 1e-10)
    same_memory(alone[1], eg.map_state(lambda x: x[:1], beside[1]), 1e-10)


def test_empty_memory_reads_exactly_zero(base):
    model = make(base, 2.0)
    h = torch.randn(2, 5, C)
    state = model.init_state(2)
    added, slots, weights = model.edm.read(h, state.memory, [])
    assert added.shape == h.shape and not added.any()
    assert slots.shape == weights.shape == (2, 2, 5, 0)
    for memory, summary in ((model.early, state.early), (model.late, state.late)):
        assert torch.equal(memory(h, torch.ones(2, 5), summary), h)


def test_empty_row_reads_exactly_zero_beside_a_full_one(base):
    model = make(base, 2.0)
    full = read_all(model, draw(2, 60))[1]
    state = model.reset_memory(full, torch.tensor([True, False])).memory
    added, _, weights = model.edm.read(torch.randn(2, 5, C), state, [])
    assert not added[0].any() and not weights[0].any()
    assert added[1].abs().min() > 0
    close(weights[1].sum(-1), torch.ones(2, 5), 1e-6)


# ══ What is in memory ════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("every", [1, 2, 3])
@every_stride
def test_memory_holds_what_has_left_the_window(base, stride, every):
    model, tokens = make(base, stride=stride, write_every=every, slots=64), draw(2, 70)
    for T in (1, 16, 17, 21, 24, 25, 33, 48, 70):
        _, state, _ = read_all(model, tokens[:, :T])
        start = first_start(T, stride)
        wanted = [t for t in range(start) if t % every == 0]
        assert state.start.tolist() == [start] * 2 and state.fill.tolist() == [T - start] * 2
        for row in range(2):
            memory = em.EDMState(*(x[row] for x in state.memory))
            assert memory.position[: len(wanted)].tolist() == wanted
            assert memory.token[: len(wanted)].tolist() == tokens[row, wanted].tolist()
            for x in (memory.position, memory.token):
                assert (x[len(wanted) :] == -1).all()
            assert not memory.keys[:, len(wanted) :].any()
            close(memory.keys[:, : len(wanted)].norm(dim=-1), torch.ones(2, len(wanted)))
            assert torch.equal(state.tokens[row, : T - start], tokens[row, start:T])


@pytest.mark.parametrize("slots", [16, 21, 33])
@every_stride
def test_memory_fifo_holds_the_newest(base, stride, slots):
    model, tokens = make(base, stride=stride, slots=slots), draw(2, 90)
    position = read_all(model, tokens)[1].memory.position
    start = first_start(90, stride)
    for row in position:
        assert sorted(row.tolist()) == list(range(start - slots, start))


@pytest.mark.parametrize("eviction", ["fifo", "lru"])
@every_stride
def test_padding_left_gives_the_unpadded_row(base, stride, eviction):
    """Pads of less than a window and of several."""
    model = make(base, dtype=torch.float64, stride=stride, eviction=eviction, slots=20)
    tokens, mask = draw(4, 77), torch.ones(4, 77, dtype=torch.long)
    for row, pads in enumerate((0, 3, 16, 52)):
        mask[row, :pads] = 0
    logits, state, _ = read_all(model, tokens, mask)
    for row, pads in enumerate((0, 3, 16, 52)):
        alone, own, _ = read_all(model, tokens[row : row + 1, pads:])
        close(logits[row, pads:], alone[0], 1e-10)
        same_memory(own, eg.map_state(lambda x, row=row: x[row : row + 1], state), 1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_mask_gives_the_row_of_what_it_shows(base, seed):
    """Any mask; one row of nothing but pads; in two calls, with the mask of all columns so far."""
    model = make(base, dtype=torch.float64, stride=(16, 8, 5, 7)[seed], write_every=1 + seed % 2)
    tokens, mask = draw(4, 63, seed=seed), draw(4, 63, seed=seed + 50, high=4).clamp_max(1)
    mask[1], mask[3] = 0, 1
    with torch.no_grad():
        first = model(tokens[:, :29], attention_mask=mask[:, :29])
        second = model(tokens[:, 29:], attention_mask=mask, cache=first[em.CACHE])
    logits = torch.cat([first.logits, second.logits], 1)
    for row in range(4):
        shown = mask[row].bool()
        state = eg.map_state(lambda x, row=row: x[row : row + 1], second[em.CACHE].state)
        if row == 1:  # but index W of the buffers, where masked tokens go
            same_memory(state, model.init_state(1), 0.0)
            for name in ("hidden", "final"):
                assert not getattr(state, name)[:, :W].any()
            continue
        alone, own, _ = read_all(model, tokens[row : row + 1, shown])
        close(logits[row, shown], alone[0], 1e-10)
        same_memory(own, state, 1e-10)
    assert second[em.CACHE].get_seq_length() == 63


def test_mask_hides_what_the_pads_are(base):
    model, tokens, mask = make(base), draw(2, 63), draw(2, 63, seed=50, high=2)
    one = read_all(model, tokens, mask)
    other = read_all(model, torch.where(mask.bool(), tokens, (tokens + 1) % V), mask)
    assert torch.equal(one[0], other[0])
    same_bits(one[1], other[1])


# ══ The notebook alone ═══════════════════════════════════════════════════════════════════════════


def notebook(slots: int = 9, top_k: int = 3, eviction: str = "fifo", dtype=torch.float32,
             heads: int = 2, width: int = 5, write_every: int = 1) -> em.EDM:
    torch.manual_seed(0)
    edm = em.EDM(C, heads, width, slots, top_k, eviction, write_every).to(dtype)
    with torch.no_grad():
        for parameter in edm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        edm.alpha.fill_(0.7)
    return edm


@pytest.mark.parametrize("eviction", em.EVICTION)
@pytest.mark.parametrize("slots, M", [(9, 4), (9, 9), (16, 5)])
def test_eviction_equals_a_simulation_in_dictionaries(eviction, slots, M):
    """Some of each M tokens are kept, then slots are read with weights in eighths, exact sums."""
    edm, B, H, T, K = notebook(slots, 3, eviction), 3, 2, 4, 3
    state, rng = edm.init_state(B), np.random.default_rng(slots + M)
    naive = [{} for _ in range(B)]  # slot -> [position, token, rank]
    for step in range(14):
        keep = rng.random((B, M)) < (0.7 if step else 1)
        token = rng.integers(0, V, (B, M))
        position = np.arange(step * M, step * M + M)
        state, entry = edm.write(torch.randn(B, M, C), torch.from_numpy(token),
                                 torch.from_numpy(position).expand(B, M), torch.from_numpy(keep),
                                 state)
        for row, held in enumerate(naive):
            rank = {s: held[s][2] if s in held else -math.inf for s in range(slots)}
            order = sorted(rank, key=lambda s, rank=rank: (rank[s], s))
            places = iter(order)
            for i in range(M):
                slot = next(places) if keep[row, i] else -1
                assert entry.slots[row, i] == slot
                if slot >= 0:
                    new = max(rank[slot], 0) + 1 if eviction == "usage" else position[i]
                    held[slot] = [position[i], token[row, i], new]
        read = np.stack([np.stack([[rng.permutation(max(K, len(held)))[:K] for _ in range(T)]
                                   for _ in range(H)]) for held in naive])  # (B, H, T, K)
        weights = rng.integers(0, 9, (B, H, T, K)) / 8
        weights[np.array([[[[s not in held for s in x] for x in y] for y in z]
                          for z, held in zip(read, naive, strict=True)])] = 0
        when = np.arange(step * M + M, step * M + M + T)
        state = edm.touch(torch.from_numpy(read), torch.from_numpy(weights).float(),
                          torch.from_numpy(when).expand(B, T), state)
        for row, held in enumerate(naive):
            for h, t, k in np.ndindex(H, T, K):
                slot, weight = read[row, h, t, k], weights[row, h, t, k]
                if weight > 0 and eviction == "usage":
                    held[slot][2] += weight
                elif weight > 0 and eviction == "lru":
                    held[slot][2] = max(held[slot][2], when[t])
            for slot in range(slots):
                wanted = held.get(slot, [-1, -1, -math.inf])
                assert [state.position[row, slot], state.token[row, slot],
                        state.rank[row, slot]] == wanted
    assert all(len(held) == slots for held in naive)


def test_eviction_fifo_is_of_the_oldest_after_sixteen_million_tokens():
    edm = notebook(slots=4)
    state, start = edm.init_state(1), 2**24 + 1
    for i in (0, 1, 2, 3, 4, 5, 6):
        at = torch.tensor([[start + i]])
        state, _ = edm.write(torch.randn(1, 1, C), at * 0, at, torch.ones(1, 1).bool(), state)
    assert sorted((state.position[0] - start).tolist()) == [3, 4, 5, 6]


def test_eviction_lru_spares_what_was_just_read():
    edm = notebook(slots=4, eviction="lru")
    state = edm.init_state(1)
    at = torch.arange(4).unsqueeze(0)
    state, _ = edm.write(torch.randn(1, 4, C), at, at, torch.ones(1, 4).bool(), state)
    state = edm.touch(torch.tensor([[[[0]]]]), torch.ones(1, 1, 1, 1), torch.tensor([[9]]), state)
    state, entry = edm.write(torch.randn(1, 3, C), at[:, :3], at[:, :3] + 10,
                             torch.ones(1, 3).bool(), state)
    assert entry.slots.tolist() == [[1, 2, 3]] and state.position[0].tolist() == [0, 10, 11, 12]


@pytest.mark.parametrize("top_k", [1, 3, 9, 30])
@pytest.mark.parametrize("heads, width, slots", [(1, 7, 13), (3, 5, 9), (2, 8, 31)])
@every_read
def test_read_equals_a_naive_loop_over_slots(top_k, heads, width, slots, dense, monkeypatch):
    """Rows of no, some and all slots, in float64 within 1e-12."""
    monkeypatch.setattr(em, "DENSE_SLOTS", dense)
    edm = notebook(slots, top_k, dtype=torch.float64, heads=heads, width=width)
    state, p = edm.init_state(4), numbers(edm)
    for count, rows in ((slots // 2, [1, 2, 3]), (slots // 3, [2, 3]), (slots, [3])):
        keep = torch.zeros(4, count, dtype=torch.bool)
        keep[rows] = True
        at = torch.arange(count).expand(4, count)
        state, _ = edm.write(torch.randn(4, count, C, dtype=torch.float64), at, at, keep, state)
    h = torch.randn(4, 6, C, dtype=torch.float64) * 3 + 1
    with torch.no_grad():
        added, at, weights = edm.read(h, state, [])
    assert at.shape[-1] == min(top_k, slots)
    for row in range(4):
        used = [s for s in range(slots) if state.position[row, s] >= 0]
        assert len(used) == (0, slots // 2, slots // 2 + slots // 3, slots)[row]
        store = {s: (state.keys[row, :, s].numpy(), state.values[row, :, s].numpy()) for s in used}
        for t in range(6):
            wanted, found = naive_read(p, heads, width, top_k, h[row, t].numpy(), store)
            close(added[row, t], wanted if used else np.zeros(C), 1e-12)
            for k in range(heads):
                mine = {int(s): float(w) for s, w in
                        zip(at[row, k, t], weights[row, k, t], strict=True) if w > 0}
                assert mine == pytest.approx(found[k], abs=1e-12)


@every_read
def test_read_of_recent_entries_equals_that_of_the_store(dense, monkeypatch):
    """Also where a newer entry has taken an older one's slot."""
    monkeypatch.setattr(em, "DENSE_SLOTS", dense)
    edm = notebook(slots=7, top_k=5, dtype=torch.float64)
    state, recent = edm.init_state(2), []
    for step in range(4):
        at = torch.arange(3).expand(2, 3) + 3 * step
        keep = torch.tensor([[True, step != 1, True], [step != 2, True, False]])
        state, entry = edm.write(torch.randn(2, 3, C, dtype=torch.float64), at, at, keep, state)
        recent.append(entry)
    h = torch.randn(2, 5, C, dtype=torch.float64)
    wanted = edm.read(h, state, [])
    for last in (1, 2, 4):
        for a, b in zip(edm.read(h, state, recent[-last:]), wanted, strict=True):
            close(a, b, 1e-12)
    assert all(not x.requires_grad for x in state)


def test_edm_starts_as_the_attention_of_its_block(base):
    """Its queries, keys, values and output are the block's; what it reads, a naive attention over
    the store by cosine. Other heads leave it as it was."""
    block, h = base.transformer.h[1], torch.randn(1, 9, C)
    torch.manual_seed(0)
    edm, other = em.EDM(C, 4, C // 4, 20, 20), em.EDM(C, 2, C // 2, 20, 20)
    before = other.query.weight.clone()
    for x in (edm, other):
        x.start_from(block)
    assert torch.equal(other.query.weight, before)
    edm.alpha.data.fill_(50.0)  # an open gate
    with torch.no_grad():
        _, state, _ = edm(h[:, :8], edm.init_state(1))
        added = edm.read(h[:, 8:], state, [])[0]
        q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2)
                   for x in block.attn.c_attn(block.ln_1(h)).split(C, dim=2))  # (1, 4, 9, D)
        scores = 16 * F.cosine_similarity(q[:, :, 8:], k[:, :, :8], dim=-1)  # (1, 4, 8)
        mixed = (scores.softmax(-1).unsqueeze(-1) * v[:, :, :8]).sum(2).flatten(1)  # (1, C)
        close(added[:, 0], mixed @ block.attn.c_proj.weight, 1e-4)


def test_edm_of_the_token_before_finds_what_followed():
    """Each token is stored under the h of the one before it, across calls too; at first it finds
    the nearest h and hands on the one that followed."""
    edm = em.EDM(C, 2, C // 2, 20, 1, key_of="previous")
    edm.start_from(None)
    edm.alpha.data.fill_(50.0)
    h = torch.randn(2, 12, C)
    with torch.no_grad():
        _, state, _ = edm(h[:, :5], edm.init_state(2))
        _, state, _ = edm(h[:, 5:], state)
        before = torch.cat([torch.zeros(2, 1, C), h[:, :-1]], 1)
        keys = F.normalize(edm.split(edm.key(edm.norm(before))), dim=-1)
        close(state.keys[:, :, :12], keys, 1e-6)
        added, slots, _ = edm.read(h[:, 3:7], state, [])
        assert (slots[..., 0] == torch.arange(4, 8)).all()
        close(added, edm.norm(h[:, 4:8]), 1e-5)


def test_edm_forward_reads_what_was_before_and_then_stores():
    edm = notebook(slots=20, top_k=4)
    h, state = torch.randn(2, 10, C), edm.init_state(2)
    with torch.no_grad():
        out, state, trace = edm(h[:, :5], state)
        assert torch.equal(out, h[:, :5]) and trace.read_weights.shape == (2, 2, 5, 4)
        assert not trace.read_weights.any()
        assert trace.write_slots.tolist() == [[0, 1, 2, 3, 4]] * 2 and trace.write_gate.all()
        again, later, trace = edm(h[:, 5:], state)
        close(again, h[:, 5:] + edm.read(h[:, 5:], state, [])[0], 1e-6)
    assert trace.read_slots.max() < 5 and trace.write_slots.tolist() == [[5, 6, 7, 8, 9]] * 2
    assert later.position[:, :10].tolist() == [list(range(10))] * 2


def test_edm_forward_counts_what_it_did_not_store():
    edm = notebook(slots=20, write_every=2)
    state, h = edm.init_state(1), torch.randn(1, 8, C)
    whole = edm(h, state)[1]
    parts = edm(h[:, 4:], edm(h[:, :4], state)[1])[1]
    assert torch.equal(parts.position, whole.position)
    close(parts.keys, whole.keys, 1e-6)


def test_edm_forward_by_segments_equals_calls_by_segments():
    """Outputs, state and trace; and the last segments give the first ones gradient."""
    edm = notebook(slots=20, top_k=3)
    edm.segment = 4
    state, h = edm.init_state(2), torch.randn(2, 10, C)
    out, last, trace = edm(h, state)
    parts, traces = [], []
    for x in h.split(4, 1):
        part, state, seen = edm(x, state)
        parts.append(part), traces.append(seen)
    close(out, torch.cat(parts, 1), 1e-6)
    close(trace.read_weights, torch.cat([t.read_weights for t in traces], 2), 1e-6)
    assert torch.equal(trace.read_slots, torch.cat([t.read_slots for t in traces], 2))
    assert torch.equal(trace.write_slots, torch.cat([t.write_slots for t in traces], 1))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(last, state, strict=True))
    (out[:, 8:] - h[:, 8:]).square().sum().backward()
    assert edm.key.weight.grad.abs().max() > 0


# ══ Cuts, read-only ══════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("cut", [(16,) * 4, (8,) * 8, (1, 7, 30, 2, 1, 23), (33, 31), (1,) * 64])
@pytest.mark.parametrize("fields", [
    dict(stride=16, key_of="previous"), dict(stride=8, eviction="lru", slots=20),
    dict(stride=5, document_end=7, write_every=2)], ids=["16", "8", "5"])
def test_segments_equal_all_at_once(base, fields, cut):
    model, tokens = make(base, dtype=torch.float64, **fields), draw(2, 64, low=7, high=40)
    whole, last, _ = read_all(model, tokens)
    state, parts = model.init_state(2), []
    for part in tokens.split(cut, 1):
        logits, state, _ = read_all(model, part, state=state)
        parts.append(logits)
    close(torch.cat(parts, 1), whole, 1e-10)
    same_memory(state, last, 1e-6)


@pytest.mark.parametrize("cut", [(16,) * 4, (1,) * 64])
def test_segments_of_usage_equal_all_at_once(base, cut):
    """In float32, with which alone it runs."""
    model, tokens = make(base, eviction="usage", slots=20), draw(2, 64)
    whole, last, _ = read_all(model, tokens)
    state, parts = model.init_state(2), []
    for part in tokens.split(cut, 1):
        logits, state, _ = read_all(model, part, state=state)
        parts.append(logits)
    close(torch.cat(parts, 1), whole, 1e-4)
    same_memory(state, last, 1e-4)


@pytest.mark.parametrize("fields", [
    dict(stride=16), dict(stride=8, eviction="lru", slots=20), dict(stride=5, eviction="usage")])
def test_read_only_leaves_the_memories_unchanged(base, fields):
    model, tokens = make(base, **fields), draw(2, 90)
    _, before, _ = read_all(model, tokens[:, :41])
    _, after, _ = read_all(model, tokens[:, 41:], state=before, read_only=True)
    same_bits(before, after, but=("tokens", "hidden", "final", "kv", "fill", "start"))
    _, both, _ = read_all(model, tokens[:, 41:], state=before)
    for name in ("tokens", "fill", "start"):
        assert torch.equal(getattr(after, name), getattr(both, name))


@every_stride
def test_read_only_attends_as_ever(base, stride):
    """At alpha 0 the logits are the same, whether or not anything is written."""
    model, tokens = make(base, 0.0, stride=stride), draw(2, 90)
    _, state, _ = read_all(model, tokens[:, :41])
    one, other = (read_all(model, tokens[:, 41:], state=state, read_only=x)[0]
                  for x in (False, True))
    assert torch.equal(one, other)


def test_read_only_reads_the_memory_as_it_was(base):
    """A naive row whose memory is held gives the same logits."""
    model, tokens = make(base, dtype=torch.float64), draw(1, 70)
    _, state, _ = read_all(model, tokens[:, :35])
    logits, _, _ = read_all(model, tokens[:, 35:], state=state, read_only=True)
    naive = NaiveRow(model)
    for token in tokens[0, :35].tolist():
        naive.step(token)

    def hold():
        naive.start += naive.c.stride

    naive.leave = hold
    close(logits[0], np.stack([naive.step(t) for t in tokens[0, 35:].tolist()]), 1e-9)


def test_read_only_leaves_the_memories_at_the_end_of_a_document(base):
    model, tokens = make(base, document_end=7), draw(2, 90, low=8)
    tokens[0, 50] = 7
    _, before, _ = read_all(model, tokens[:, :41])
    _, after, _ = read_all(model, tokens[:, 41:], state=before, read_only=True)
    same_bits(before, after, but=("tokens", "hidden", "final", "kv", "fill", "start"))


# ══ The end of a document ════════════════════════════════════════════════════════════════════════


def documents(model, end: int, upto: int):
    """Two runs of 90 tokens with the end of a document at `end`, which differ before `upto`: what
    read_all gives, and the first token that is read when the end has left."""
    one = draw(2, 90, low=8)
    one[0, end] = 7
    other = one.clone()
    other[0, :upto] = draw(upto, seed=77, low=8)
    left = next(t for t in range(90) if first_start(t + 1, model.config.stride) > end)
    runs = [read_all(model, tokens) for tokens in (one, other)]
    assert not torch.equal(runs[0][0][0, upto - 1], runs[1][0][0, upto - 1])
    return *runs, left


@pytest.mark.parametrize("end", [16, 21, 32, 47])
@every_stride
def test_reset_forgets_what_stood_before_the_window_of_the_end(base, stride, end):
    """Once the end has left no bit depends on it, and the entries are those behind the end."""
    model = make(base, stride=stride, document_end=7, slots=64, early=False, late=False)
    one, other, left = documents(model, end, first_start(end + 1, stride))
    assert torch.equal(one[0][0, left:], other[0][0, left:])
    state = one[1]
    same_bits(state, other[1], 0, but=("hidden", "final", "kv"))  # what no place holds any more
    wanted = list(range(end + 1, first_start(90, stride)))
    assert state.memory.position[0, : len(wanted)].tolist() == wanted
    assert (state.memory.position[0, len(wanted) :] == -1).all()
    assert 7 not in state.memory.token


@pytest.mark.parametrize("end", [31, 47])
def test_reset_at_the_end_of_a_block_forgets_the_document(base, end):
    """Nothing of the new document has shared a window with the old one."""
    one, other, left = documents(make(base, stride=W, document_end=7), end, end)
    assert torch.equal(one[0][0, left:], other[0][0, left:])
    same_bits(one[1], other[1], 0, but=("hidden", "final", "kv"))


def test_reset_is_of_that_row_alone(base):
    model, tokens = make(base, document_end=7), draw(3, 90, low=8)
    one = read_all(model, tokens)
    tokens[1, [22, 60]] = 7
    other = read_all(model, tokens)
    for row in (0, 2):
        assert torch.equal(one[0][row], other[0][row])
        same_bits(one[1], other[1], row)


@pytest.mark.parametrize("name", ["keys", "values", "early", "late"])
def test_reset_token_in_the_window_hides_the_memories(base, name):
    """The end stands first in the window: whatever the memories hold, no bit changes."""
    model, tokens = make(base, stride=W, document_end=7), draw(1, 60, low=8)
    tokens[0, 48] = 7
    _, state, _ = read_all(model, tokens[:, :48])
    state = model.leave_rows(torch.ones(1, dtype=torch.bool), state, [], False)
    noise = torch.randn_like(leaves(state)[name])
    if name in ("keys", "values"):
        other = state._replace(memory=state.memory._replace(**{name: F.normalize(noise, dim=-1)}))
    else:
        other = state._replace(**{name: noise})
    for last, same in ((tokens[:, 48:], True), (tokens[:, 49:], False)):
        found = [read_all(model, last, state=x)[0] for x in (state, other)]
        assert torch.equal(*found) == same


def test_reset_token_in_the_window_leaves_no_weights(base):
    model, tokens = make(base, stride=W, document_end=7), draw(1, 60, low=8)
    tokens[0, 50] = 7
    _, _, passes = read_all(model, tokens)
    weights = passes[-1][2]  # (B, H, m, K)
    assert weights[:, :, :2].any() and not weights[:, :, 2:].any()


def test_reset_memory_is_of_the_rows_named(base):
    model, tokens = make(base), draw(3, 60)
    _, state, _ = read_all(model, tokens)
    fresh = model.init_state(3)
    some = model.reset_memory(state, torch.tensor([False, True, False]))
    same_bits(some, fresh, 1)
    for row in (0, 2):
        same_bits(some, state, row)
    same_bits(model.reset_memory(state), fresh)
    same_bits(model.reset_memory(state, torch.zeros(3, dtype=torch.bool)), state)
    again, alone = (read_all(make(base, dtype=torch.float32), tokens, state=s)[0]
                    for s in (some, fresh))
    close(again[1], alone[1], 1e-5)


def test_init_state_draws_no_random_number(base):
    model = make(base, edm=False)
    before = torch.get_rng_state()
    model.init_state(2)
    assert torch.equal(torch.get_rng_state(), before)


# ══ A memory on disk ═════════════════════════════════════════════════════════════════════════════


@pytest.fixture
def written(base, tmp_path) -> SimpleNamespace:
    """A model, a memory of two windows and more, and its file."""
    model, path = make(base, eviction="lru", slots=20), tmp_path / "memory.pt"
    _, state, _ = read_all(model, draw(1, 61))
    eg.save_memory(state, model, path)
    return SimpleNamespace(model=model, path=path, state=state)


def test_memory_file_goes_on_bit_for_bit(written, tmp_path):
    written.model.save_pretrained(tmp_path / "model")
    model = aligned(eg.EDMGPT2ForCausalLM.from_pretrained(tmp_path / "model"))
    state, tokens = eg.load_memory(model, written.path), draw(1, 50, seed=4)
    same_bits(state, written.state)
    one = read_all(written.model, tokens, state=written.state)
    other = read_all(model, tokens, state=state)
    assert torch.equal(one[0], other[0])
    same_bits(one[1], other[1])
    assert not torch.equal(one[0], read_all(model, tokens)[0])


@pytest.mark.parametrize("fields", [
    {"seed": 1}, {"stride": 5}, {"slots": 21}, {"eviction": "fifo"}, {"write_every": 2},
    {"read_layer": 2}, {"alpha": 0.4}, {"edm_heads": 4, "key_width": 4}, {"late": False}])
def test_memory_file_is_refused_by_another_model(base, written, fields):
    other = make(base, **{"eviction": "lru", "slots": 20, **fields})
    with pytest.raises(ValueError) as error:
        eg.load_memory(other, written.path)
    one_line(error, "memory_file", str(written.path), "another")


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of a tensor in place of a dict
@pytest.mark.parametrize("content", ["empty", "one byte", "half", "all but one", "text", "tensor",
                                     "no state", "fewer"])  # fmt: skip
def test_memory_file_that_is_damaged_is_refused(written, content):
    whole = written.path.read_bytes()
    cut = {"empty": b"", "one byte": whole[:1], "half": whole[: len(whole) // 2],
           "all but one": whole[:-1], "text": b"a memory\nof two lines"}
    if content in cut:
        written.path.write_bytes(cut[content])
    elif content == "tensor":
        torch.save(torch.zeros(3), written.path)
    else:
        payload = torch.load(written.path, weights_only=True)
        payload["state"].pop("fill")
        torch.save(payload if content == "fewer" else {"model": payload["model"]}, written.path)
    with pytest.raises(ValueError) as error:
        eg.load_memory(written.model, written.path)
    one_line(error, "memory_file", str(written.path))


def test_memory_file_with_an_altered_byte_is_refused(written):
    whole = bytearray(written.path.read_bytes())
    values = written.state.memory.values.numpy().tobytes()
    place = bytes(whole).find(values[:64])
    assert place > 0
    whole[place + 6] ^= 0x40
    written.path.write_bytes(whole)
    with pytest.raises(ValueError, match="memory_file"):
        eg.load_memory(written.model, written.path)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_memory_file_that_is_none_is_refused(base, tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "none.pt"
    with pytest.raises(ValueError) as error:
        eg.load_memory(make(base), path)
    one_line(error, "memory_file", str(path))


def test_memory_file_stays_whole_when_writing_fails(written, monkeypatch):
    def half(payload, file):
        file.write(b"PK")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(ValueError, match="no space.*memory_file"):
        eg.save_memory(written.model.init_state(1), written.model, written.path)
    monkeypatch.undo()
    same_bits(eg.load_memory(written.model, written.path), written.state)


def test_memory_file_in_a_missing_folder_is_a_mistake_of_the_user(written, tmp_path):
    with pytest.raises((ValueError, OSError)):
        eg.save_memory(written.state, written.model, tmp_path / "none" / "memory.pt")


# ══ Saving ═══════════════════════════════════════════════════════════════════════════════════════


@pytest.fixture(scope="module")
def tokenizer():
    """A BPE of at most 97 entries over lower-case text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=V, special_tokens=["?", "<end>"], show_progress=False)
    made.train_from_iterator(["the city was built on a hill by the river and the sea"] * 3, trainer)
    assert 40 < made.get_vocab_size() <= V
    return made


@pytest.fixture(scope="module")
def tiny_base(base, tokenizer) -> eg.Base:
    weights = {n: x.clone() for n, x in base.transformer.state_dict().items()}
    return eg.Base("tiny", base.config.to_dict(), weights, tokenizer, "")


def run_config(**fields) -> eg.Config:
    return eg.Config(**{**RUN, **fields})


def stirred(model):
    """With alpha 0.5 and adapters that do something."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.5)
            elif "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def elsewhere(tiny_base, tmp_path_factory) -> SimpleNamespace:
    """What a process in another folder, without this repository, finds in a folder of save_model:
    logits, memory, generated tokens and the names of what is trained; and what they must be."""
    folder = tmp_path_factory.mktemp("elsewhere")
    model = stirred(eg.build_model(tiny_base, run_config(), "both", 0))
    eg.save_model(model, tiny_base, folder / "model")
    model.config.stride = W // 2  # as generation has it
    tokens, prompt = draw(2, 70), draw(1, 30, seed=3)
    logits, state, _ = read_all(model, tokens)
    eg.save_memory(state, model, folder / "memory.pt")
    wanted = {
        "logits": logits, "later": read_all(model, tokens[:, :40], state=state)[0],
        "made": model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0),
        "trained": sorted(n for n, p in model.named_parameters() if p.requires_grad)}
    torch.save((tokens, prompt), folder / "tokens.pt")
    code = """
import importlib.util, sys
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("dnc_gpt2") is None
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/model", trust_remote_code=True)
for parameter in model.parameters():  # to aligned memory, as in the process that saved it
    parameter.data = parameter.data.clone()
tokens, prompt = torch.load(folder + "/tokens.pt")
with torch.no_grad():
    logits = model(tokens).logits
made = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
found = {"logits": logits, "made": made, "type": type(model).__name__,
         "words": len(AutoTokenizer.from_pretrained(folder + "/model")("the city")["input_ids"]),
         "trained": sorted(n for n, p in model.named_parameters() if p.requires_grad)}
try:
    module = sys.modules[type(model).__module__]
    payload = torch.load(folder + "/memory.pt", weights_only=True)
    state = module.unpack_memory(payload, model)
    with torch.no_grad():
        found["later"] = model(tokens[:, :40], past_key_values=module.EDMCache(state)).logits
except Exception as error:
    found["later"] = f"{type(error).__name__}: {error}"
torch.save(found, folder + "/found.pt")
"""
    (folder / "cwd").mkdir()
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": "", "HOME": str(folder), "HF_HUB_OFFLINE": "1",
           "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=folder / "cwd", env=env,
                          text=True, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(wanted=wanted, found=torch.load(folder / "found.pt"), folder=folder)


def test_save_model_loads_elsewhere_bit_for_bit(elsewhere):
    assert elsewhere.found["type"] == "EDMGPT2ForCausalLM" and elsewhere.found["words"] > 1
    for name in ("logits", "made"):
        assert torch.equal(elsewhere.found[name], elsewhere.wanted[name]), name


def test_save_model_trains_the_memories_alone_elsewhere(elsewhere):
    found = elsewhere.found["trained"]
    assert found == elsewhere.wanted["trained"] and len(found) > 20
    assert not any(name.startswith("transformer.") for name in found)


def test_memory_file_goes_on_elsewhere(elsewhere):
    later = elsewhere.found["later"]
    assert not isinstance(later, str), later
    assert torch.equal(later, elsewhere.wanted["later"])


def test_save_model_leaves_the_model_as_it_was(tiny_base, tmp_path):
    model = stirred(eg.build_model(tiny_base, run_config(), "both", 0))
    tokens = draw(2, 50)
    before = read_all(model, tokens)[0]
    eg.save_model(model, tiny_base, tmp_path)
    assert model.config.stride == W and torch.equal(read_all(model, tokens)[0], before)
    assert eg.EDMGPT2Config.from_pretrained(tmp_path).stride == W // 2


@pytest.mark.parametrize("fields", [
    *ARMS, dict(stride=5, eviction="lru", slots=17, write_every=2, document_end=7, read_layer=0)])
def test_save_pretrained_comes_back_bit_for_bit(base, tmp_path, fields):
    model, tokens = make(base, **fields), draw(2, 50)
    model.save_pretrained(tmp_path)
    loaded, info = eg.EDMGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    same_weights(loaded, model)
    close(read_all(loaded, tokens)[0], read_all(model, tokens)[0], 1e-4)
    assert torch.equal(read_all(aligned(loaded), tokens)[0], read_all(model, tokens)[0])
    wanted, found = model.config.to_dict(), loaded.config.to_dict()
    assert all(found[name] == wanted[name] for name in TINY)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(memories(loaded))


def test_from_pretrained_starts_memories_that_the_file_lacks(base, tmp_path):
    make(base, early=False, late=False).save_pretrained(tmp_path)
    model = eg.EDMGPT2ForCausalLM.from_pretrained(tmp_path, early=True)
    assert model.early.alpha == 0 and torch.equal(model.early.norm.weight, torch.ones(C))
    assert 0.05 < model.early.cell.weight_ih.std() < 0.5


# ══ generate ═════════════════════════════════════════════════════════════════════════════════════


def uncached(model, tokens, count: int) -> torch.Tensor:
    """Greedy, everything read anew for each token."""
    with torch.no_grad():
        for _ in range(count):
            best = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], 1)
    return tokens


def generate(model, tokens, count: int, **options):
    return model.generate(tokens, max_new_tokens=count, pad_token_id=0,
                          **{"do_sample": False, **options})


@pytest.mark.parametrize("past, fields", [
    (60, dict(stride=8)), (30, dict(stride=16, eviction="lru", slots=20)),
    (30, dict(stride=5, document_end=7))])
def test_generate_equals_uncached_recomputation(base, past, fields):
    """So many tokens past the window."""
    model, prompt = make(base, dtype=torch.float64, **fields), draw(2, 7)
    made = generate(model, prompt, W - 7 + past)
    assert made.shape == (2, W + past)
    assert torch.equal(made, uncached(model, prompt, W - 7 + past))
    assert len(set(made[0, 7:].tolist())) > 3  # not the same token for ever


def test_generate_without_cache_gives_the_same(base):
    model, prompt = make(base, dtype=torch.float64), draw(2, 21)
    assert torch.equal(generate(model, prompt, 20, use_cache=False), generate(model, prompt, 20))


def test_generate_reads_each_token_once(base, monkeypatch):
    model, prompt, seen = make(base), draw(2, 21), []
    advance = model.advance

    def spy(tokens, *args):
        seen.append(tokens.shape[1])
        return advance(tokens, *args)

    monkeypatch.setattr(model, "advance", spy)
    generate(model, prompt, 12)
    assert seen == [21] + [1] * 11


def naive_beams(model, prompt, beams: int, count: int) -> list[list[int]]:
    """Beam search without cache: the likeliest continuations of a prompt (1, T), best first."""
    alive = [(0.0, prompt[0].tolist())]
    with torch.no_grad():
        for _ in range(count):
            p = model(torch.tensor([ids for _, ids in alive])).logits[:, -1].log_softmax(-1)
            grown = [(score + float(p[i, token]), [*ids, token])
                     for i, (score, ids) in enumerate(alive) for token in range(V)]
            alive = sorted(grown, reverse=True)[:beams]
    return [ids for _, ids in alive]


def test_generate_beams_equal_a_naive_search(base):
    """Three beams of two prompts, across two strides; every one is returned."""
    model, prompts = make(base, dtype=torch.float64), draw(2, 11)
    made = generate(model, prompts, 22, num_beams=3, num_return_sequences=3)
    wanted = [ids for row in prompts for ids in naive_beams(model, row[None], 3, 22)]
    assert made.tolist() == wanted
    assert made[0].tolist() != uncached(model, prompts, 22)[0].tolist()  # beams matter


@pytest.mark.parametrize("index", [[2, 0, 0], [0, 1, 2], [1, 1, 1]])
def test_cache_reorder_selects_rows(base, index):
    model = make(base)
    with torch.no_grad():
        cache = model(draw(3, 50))[em.CACHE]
    before = cache.state
    cache.reorder_cache(torch.tensor(index))
    for name, value in leaves(cache.state).items():
        assert torch.equal(value, leaves(before)[name][index]), name
    assert cache.get_seq_length() == 50


def test_generate_samples_of_a_seed_are_the_same(base):
    model, prompt, found = make(base), draw(2, 9), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(generate(model, prompt, 30, do_sample=True, num_return_sequences=3))
    assert found[0].shape == (6, 39) and torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert len({tuple(row) for row in found[0].tolist()}) == 6
    assert torch.equal(found[0][:, :9], prompt.repeat_interleave(3, 0))


def test_generate_samples_of_one_candidate_are_greedy(base):
    model, prompt = make(base, dtype=torch.float64), draw(2, 9)
    made = generate(model, prompt, 30, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(made, generate(model, prompt, 30).repeat_interleave(2, 0))


@pytest.mark.parametrize("pads", [0, 4])
def test_generate_second_turn_equals_one_pass(base, pads):
    """The cache of the first turn, which has not read the last token, and its mask."""
    model, prompt, more = make(base, dtype=torch.float64), draw(2, 20), draw(2, 9, seed=5)
    mask = torch.ones_like(prompt)
    mask[0, :pads] = 0
    first = generate(model, prompt, 15, attention_mask=mask, return_dict_in_generate=True)
    cache = first[em.CACHE]
    assert cache.get_seq_length() == 34
    both = torch.cat([first.sequences, more], 1)
    mask = F.pad(mask, (0, 24), value=1)
    wanted = generate(model, both, 20, attention_mask=mask)
    before = eg.map_state(torch.clone, cache.state)
    for _ in range(2):  # the cache may be used again: a turn takes nothing from it
        made = generate(model, both, 20, attention_mask=mask, **{em.CACHE: cache})
        assert torch.equal(made, wanted)
        same_bits(cache.state, before)


def test_generate_of_a_padded_batch_equals_its_rows(base):
    model, lengths = make(base, dtype=torch.float64, stride=5), (3, 14, 41)
    tokens, mask = draw(3, 41), torch.zeros(3, 41, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 41 - length :] = 1
    made = generate(model, tokens, 40, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = generate(model, tokens[row : row + 1, 41 - length :], 40)
        assert torch.equal(made[row, 41:], alone[0, length:])


def test_generate_stops_at_the_end_token(base):
    model, prompt = make(base), draw(1, 9)
    made = generate(model, prompt, 30)
    end = int(made[0, 20])
    stopped = generate(model, prompt, 30, eos_token_id=end)
    length = made[0, 9:].tolist().index(end) + 10
    assert torch.equal(stopped, made[:, :length])


def test_continue_text_prints_the_greedy_continuation(tiny_base, tokenizer, capsys):
    model = stirred(eg.build_model(tiny_base, run_config(), "both", 0))
    prompt = "the city was built on a hill by the river"
    eg.continue_text(model, tokenizer, prompt, run_config(new_tokens=30))
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    made = uncached(model, ids, 30)[0, ids.shape[1] :].tolist()
    out = capsys.readouterr().out
    assert f"\n{prompt}{tokenizer.decode(made)}\n" in out and "recalled" in out


def test_continue_text_of_a_seed_is_the_same(tiny_base, tokenizer, capsys):
    model, found = stirred(eg.build_model(tiny_base, run_config(), "both", 0)), []
    for seeds in ("0", "0", "1"):
        eg.continue_text(model, tokenizer, "a hill", run_config(temperature=1.0, seeds=seeds))
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_continue_text_refuses_an_empty_prompt(tiny_base, tokenizer):
    model = eg.build_model(tiny_base, run_config(), "both", 0)
    with pytest.raises(ValueError) as error:
        eg.continue_text(model, tokenizer, "", run_config())
    one_line(error, "text = ''")


def test_continue_text_gives_the_state_of_all_that_it_printed(tiny_base, tokenizer, capsys):
    model = stirred(eg.build_model(tiny_base, run_config(), "both", 0))
    state = eg.continue_text(model, tokenizer, "a hill", run_config())
    assert int(state.start + state.fill) == len(tokenizer.encode("a hill").ids) + RUN["new_tokens"]


def test_recalled_names_the_tokens_read_most(tiny_base, tokenizer):
    """By hand: of two heads, slot 3 gets 0.9 in all, slot 1 gets 0.8, slot 0 the rest."""
    state = eg.build_model(tiny_base, run_config(), "both", 0).init_state(1)
    ids = tokenizer.encode("the city").ids
    state.memory.token[0, :4] = torch.tensor((ids * 4)[:4])
    state.memory.position[0, :4] = torch.arange(4)
    state = state._replace(start=torch.tensor([32]), fill=torch.tensor([8]))
    slots = torch.tensor([[[[0, 1], [3, 0]], [[0, 1], [3, 1]]]])  # (B, H, m, K)
    weights = torch.tensor([[[[0.5, 0.5], [0.7, 0.3]], [[0.5, 0.5], [0.2, 0.8]]]])
    words = [repr(tokenizer.decode([int(state.memory.token[0, s])])) for s in (3, 1, 0)]
    assert eg.recalled(em.Pass(None, slots, weights), state, tokenizer) == (
        f"{words[0]} (2.3, 0.45)  {words[1]} (2.4, 0.40)  {words[2]} (2.5, 0.15)")
    assert eg.recalled(em.Pass(None, None, None), state, tokenizer) == ""
    assert eg.recalled(em.Pass(None, slots[..., :0], weights[..., :0]), state, tokenizer) == ""


# ══ Adapters ═════════════════════════════════════════════════════════════════════════════════════


@pytest.fixture(scope="module")
def wide_base(tokenizer) -> eg.Base:
    """Of width 64, a block of NF4; see test_qlora_of_a_width_that_is_no_block."""
    base = make_base(64)
    return eg.Base("wide", base.config.to_dict(), base.transformer.state_dict(), tokenizer, "")


def adapted(tiny_base, low: bool = False, **fields):
    """A model with adapters that do something, on a base in 4 bits if `low`."""
    pytest.importorskip("peft")
    if low:
        pytest.importorskip("bitsandbytes")
    config = run_config(**{"lora": 3, "lora_dropout": 0.3, "qlora": low, **fields})
    return stirred(eg.build_model(tiny_base, config, "both", 0))


both_widths = pytest.mark.parametrize("low", [False, True], ids=["lora", "qlora"])


NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip


def naive_nf4(weights: dict) -> dict:
    """The projections rounded to NF4, of the transposed weight 64 numbers a block: the nearest of
    16 values times the block's largest."""
    found = dict(weights)
    for name, weight in weights.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            blocks = weight.T.contiguous().view(-1, 64)
            largest = blocks.abs().amax(1, keepdim=True)
            nearest = ((blocks / largest).unsqueeze(2) - torch.tensor(NF4)).abs().argmin(2)
            found[name] = (torch.tensor(NF4)[nearest] * largest).view(weight.T.shape).T
    return found


@both_widths
def test_lora_starts_as_the_base_and_then_changes_it(wide_base, low):
    model, tokens = adapted(wide_base, low), draw(2, W)
    logits = read_all(model, tokens)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    bare = read_all(model, tokens)[0]
    assert (logits - bare).abs().max() > 0.01
    weights = naive_nf4(wide_base.weights) if low else wide_base.weights
    plain = eg.build_model(wide_base._replace(weights=weights), run_config(), "both", 0).eval()
    close(bare, read_all(plain, tokens)[0], 1e-4)


@both_widths
def test_lora_comes_back_bit_for_bit(wide_base, tmp_path, low):
    model, tokens = adapted(wide_base, low), draw(2, 50)
    before = read_all(model, tokens)[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(read_all(model, tokens)[0], before)
    loaded = aligned(eg.EDMGPT2ForCausalLM.from_pretrained(tmp_path))
    same_weights(loaded, model)
    assert torch.equal(read_all(loaded, tokens)[0], before)
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == set(memories(loaded)) | {n for n, _ in loaded.named_parameters()
                                               if "lora_" in n}
    assert sum("lora_" in n for n in trained) == 2 * 3 * 3  # A and B, three modules a block


@both_widths
def test_lora_second_save_writes_the_same(wide_base, tmp_path, low):
    model, tokens = adapted(wide_base, low), draw(2, 50)
    before, whose = read_all(model, tokens)[0], em.fingerprint(model)
    for name in "ab":
        model.save_pretrained(tmp_path / name)
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert one == other and torch.equal(read_all(model, tokens)[0], before)
    assert em.fingerprint(model) == whose  # a memory is still its own


@both_widths
def test_lora_merged_equals_unmerged(wide_base, tmp_path, low):
    model, tokens = adapted(wide_base, low), draw(2, 50)
    before = read_all(model, tokens)[0]
    model.merge_lora()
    close(read_all(model, tokens)[0], before, 1e-5)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert model.config.lora is None and not model.config.quantize
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(memories(model))
    model.save_pretrained(tmp_path)
    loaded = aligned(eg.EDMGPT2ForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(read_all(loaded, tokens)[0], read_all(model, tokens)[0])


@both_widths
def test_lora_dropout_is_on_in_training_alone(wide_base, low):
    model, tokens = adapted(wide_base, low), draw(2, W)
    calm = [read_all(model, tokens)[0] for _ in range(2)]
    wild = [read_all(model.train(), tokens)[0] for _ in range(2)]
    assert torch.equal(*calm) and not torch.equal(*wild)
    assert torch.equal(read_all(model.eval(), tokens)[0], calm[0])


@both_widths
def test_lora_trains_adapters_and_leaves_the_base(wide_base, low):
    model, tokens = adapted(wide_base, low).train(), draw(2, 40)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    model(tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(trained, lr=0.01).step()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("transformer.") and "lora_" not in name
        assert torch.equal(parameter, before[name]) == frozen, name
        assert (parameter.grad is None) == frozen, name


def test_qlora_refuses_a_width_that_is_no_block(tiny_base):
    """bitsandbytes 0.50 on the CPU takes the wrong block's scale there."""
    with pytest.raises(ValueError) as error:
        adapted(tiny_base, True)
    one_line(error, "qlora", "64")


def test_lora_refuses_an_unknown_target(wide_base):
    with pytest.raises(ValueError) as error:
        adapted(wide_base, lora_targets="c_attn,c_ttn")
    one_line(error, "lora_targets = 'c_ttn'")


@pytest.mark.parametrize("target", [
    "", pytest.param("ln_1"), "attn", "h"], ids=["empty", "ln_1", "attn", "h"])
def test_lora_refuses_a_target_that_takes_no_adapter(wide_base, target):
    with pytest.raises(ValueError) as error:
        adapted(wide_base, lora_targets=target)
    one_line(error, f"lora_targets = {target!r}")


def test_lora_without_peft_names_what_to_install(wide_base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # import raises ImportError
    with pytest.raises(ValueError) as error:
        eg.build_model(wide_base, run_config(lora=3), "both", 0)
    one_line(error, "lora", "pip install peft")


def test_qlora_without_bitsandbytes_names_what_to_install(wide_base, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError) as error:
        eg.build_model(wide_base, run_config(lora=3, qlora=True), "both", 0)
    one_line(error, "qlora", "pip install bitsandbytes")


def test_qlora_stays_in_four_bits_when_saving_fails(wide_base, tmp_path, monkeypatch):
    model = adapted(wide_base, True)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(em.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path)
    layer = model.transformer.h[0].attn.c_attn.base_layer
    assert type(layer).__name__ == "Linear4bit"


# ══ The base ═════════════════════════════════════════════════════════════════════════════════════


def test_build_model_depends_on_its_seed_alone(tiny_base):
    built = [eg.build_model(tiny_base, run_config(), "both", seed).state_dict()
             for seed in (0, 0, 1)]
    assert all(torch.equal(x, built[1][n]) for n, x in built[0].items())
    assert not torch.equal(built[0]["edm.key.weight"], built[2]["edm.key.weight"])
    for name, weight in tiny_base.weights.items():
        assert torch.equal(built[2]["transformer." + name], weight)


@pytest.mark.parametrize("arm", list(eg.FLAGS))
def test_build_model_has_the_memories_of_its_arm(tiny_base, base, arm):
    model, tokens = eg.build_model(tiny_base, run_config(), arm, 0).eval(), draw(2, W)
    notebook, recurrent = eg.FLAGS[arm]
    assert (model.edm is not None) == notebook
    assert (model.early is not None) == (model.late is not None) == recurrent
    assert model.config.stride == model.config.window == W
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base(tokens).logits)
        assert not any(p for n, p in model.named_parameters() if n.endswith("alpha"))


def test_build_model_finds_the_reset_token(tiny_base, tokenizer):
    model = eg.build_model(tiny_base, run_config(reset_token="<end>"), "both", 0)
    assert model.config.document_end == tokenizer.token_to_id("<end>")
    assert eg.build_model(tiny_base, run_config(), "both", 0).config.document_end == -1
    with pytest.raises(ValueError) as error:
        eg.build_model(tiny_base, run_config(reset_token="<fin>"), "both", 0)
    one_line(error, "reset_token = '<fin>'")


def test_base_of_model_is_what_a_folder_holds(base, tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    base.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    found = eg.load_base(run_config(base=str(tmp_path)))
    model, tokens = eg.build_model(found, run_config(), "both", 0).eval(), draw(2, W)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base(tokens).logits)
    assert found.tokenizer.encode("the city").ids == tokenizer.encode("the city").ids


def test_base_of_model_refuses_a_folder_without_one(tmp_path):
    with pytest.raises(ValueError) as error:
        eg.load_base(run_config(base=str(tmp_path)))
    one_line(error, f"base = {str(tmp_path)!r}")


@pytest.mark.parametrize("base_fields, fields, named", [
    ({"n_positions": 8}, {}, "window = 16"),
    ({"n_layer": 2}, {"read_layer": 2}, "read_layer = 2"),
    ({"tie_word_embeddings": False}, {}, "base = 'x'"),
    ({"scale_attn_weights": False}, {}, "base = 'x'"),
    ({"scale_attn_by_inverse_layer_idx": True}, {}, "base = 'x'"),
    ({"add_cross_attention": True}, {}, "base = 'x'")])
def test_check_base_refuses_what_the_model_cannot_run(base_fields, fields, named):
    with pytest.raises(ValueError) as error:
        eg.check_base("x", GPT2Config(**base_fields), run_config(**fields))
    one_line(error, named)


def test_check_base_refuses_another_architecture():
    from transformers import OPTConfig

    with pytest.raises(ValueError) as error:
        eg.check_base("x", OPTConfig(), run_config())
    one_line(error, "base = 'x'", "opt")


# ══ Training and measures ════════════════════════════════════════════════════════════════════════


def test_train_arm_moves_the_memories_and_not_the_base(tiny_base, capsys):
    """Two runs of three steps are the same bit for bit."""
    corpus = SimpleNamespace(train=draw(400))
    runs = [eg.train_arm(tiny_base, corpus, run_config(), "both", 0) for _ in range(2)]
    start = eg.build_model(tiny_base, run_config(), "both", 0).state_dict()
    model, history, _ = runs[0]
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, runs[1][0].state_dict()[name])
        assert torch.equal(parameter, start[name]) or not name.startswith("transformer."), name
    for name in ("edm.alpha", "early.alpha", "late.alpha"):
        assert model.state_dict()[name] != 0
    assert [row["step"] for row in history] == [2, 3] and not model.training


@pytest.mark.parametrize("length", [101, 97, 150])
def test_evaluate_at_step_zero_scores_the_base_on_each_block(base, length):
    model, stream = make(base, 0.0, stride=W), draw(length)
    found = eg.evaluate(model, stream, 3)
    L, wanted = -(-(length - 1) // 3), 0.0
    assert found.shape == (3, L)
    for row in range(3):
        for begin in range(0, L, W):
            ids = stream[:-1][row * L : (row + 1) * L][begin : begin + W]
            after = stream[1:][row * L : (row + 1) * L][begin : begin + W]
            if not len(ids):
                continue
            with torch.no_grad():
                p = base(ids[None]).logits[0].double().log_softmax(-1)
            for t, token in enumerate(after.tolist()):
                wanted += float(-p[t, token])
                assert float(found[row, begin + t]) == pytest.approx(float(-p[t, token]), rel=1e-4)
    assert float(found.sum()) == pytest.approx(wanted, rel=1e-5)  # what fills up counts nothing
    assert torch.equal(eg.evaluate(model, stream, 3, swap=True), found)


def test_evaluate_with_swap_reads_the_row_before(base):
    """Each row alone, block by block; at each the memories of the row before in place of its own,
    which go on as if nothing had been."""
    model, stream, rows = make(base, dtype=torch.float64, stride=W), draw(151), 3
    found, plain = eg.evaluate(model, stream, rows, swap=True), eg.evaluate(model, stream, rows)
    inputs, targets = stream[:-1].view(rows, 50), stream[1:].view(rows, 50)
    states = [model.init_state(1) for _ in range(rows)]
    for begin in range(0, 50, W):
        ids, after = (x[:, begin : begin + W] for x in (inputs, targets))
        if begin:
            states = [model.leave_rows(torch.tensor([True]), s, [], False) for s in states]
        for row in range(rows):
            one = states[row - 1]
            other = states[row]._replace(memory=one.memory, early=one.early, late=one.late)
            p = read_all(model, ids[row : row + 1], state=other)[0][0].log_softmax(-1)
            close(found[row, begin : begin + W],
                  -p.gather(1, after[row].unsqueeze(1)).squeeze(1), 1e-9)
        states = [read_all(model, ids[row : row + 1], state=states[row])[1]
                  for row in range(rows)]
    assert torch.equal(found[:, :W], plain[:, :W]) and not torch.equal(found, plain)


@pytest.mark.parametrize("rows, window, length", [(1, 4, 60), (3, 7, 100), (4, 16, 203)])
def test_windows_back_equals_a_naive_loop(rows, window, length):
    stream = draw(length, high=30)
    found = eg.windows_back(stream, rows, window)
    L = -(-(length - 1) // rows)
    assert found.shape == (rows, L)
    for row, t in np.ndindex(rows, L):
        target = row * L + t + 1
        if target < length:
            before = [s for s in range(t + 1) if stream[row * L + s] == stream[target]]
            assert found[row, t] == (t // window - before[-1] // window if before else -1)
        else:
            assert found[row, t] == -1


def test_by_distance_equals_a_naive_loop():
    rng = np.random.default_rng(0)
    back = rng.choice([-1, 0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 65, 300], (5, 60))
    nll, scored = torch.from_numpy(rng.random((5, 60))), torch.from_numpy(rng.random((5, 60)) < 0.8)
    lower = {"in the window": (0, 0), "1": (1, 1), "2-3": (2, 3), "4-7": (4, 7), "8-15": (8, 15),
             "16-31": (16, 31), "32-63": (32, 63), "64+": (64, 10**9), "new": (-1, -1)}
    found = eg.by_distance(nll, back, scored)
    assert [row["windows_back"] for row in found] == list(lower) == eg.bucket_names()
    for row, (low, high) in zip(found, lower.values(), strict=True):
        mine = [float(nll[i]) for i in np.ndindex(5, 60) if scored[i] and low <= back[i] <= high]
        assert row["tokens"] == len(mine) > 0
        assert row["loss"] == pytest.approx(sum(mine) / len(mine))
    assert sum(row["tokens"] for row in found) == int(scored.sum())
    none = eg.by_distance(nll, np.zeros((5, 60)), scored)[-1]
    assert none["tokens"] == 0 and none["loss"] is None


class Fake:
    """In place of a model: the next token is what followed the last three tokens when they stood
    last; with `constant` it is always that one. Its head is the identity."""

    def __init__(self, vocabulary: int, constant: int | None = None):
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.transformer = SimpleNamespace(wte=SimpleNamespace(weight=torch.eye(vocabulary)))
        self.constant, self.read = constant, []

    def init_state(self, batch: int) -> int:
        return batch

    def advance(self, tokens, mask, state):
        assert mask.all() and state == len(tokens)
        self.read.append(tokens.cpu())
        best = torch.zeros_like(tokens)
        for row, ids in enumerate(tokens.tolist()):
            last = {}
            for t in range(2, len(ids)):
                best[row, t] = last.get(tuple(ids[t - 2 : t + 1]), 0)
                if t + 1 < len(ids):
                    last[tuple(ids[t - 2 : t + 1])] = ids[t + 1]
        if self.constant is not None:
            best[:] = self.constant
        return F.one_hot(best, self.config.vocab_size).float(), None, []


def recall_of(fake: Fake, window: int, length: int, **options) -> list[dict]:
    stream = draw(length, seed=6, high=fake.config.vocab_size)
    return eg.planted_recall(fake, stream, run_config(window=window, slots=64), **options)


@pytest.mark.parametrize("window", [8, 15, 16])
def test_planted_recall_of_a_copier_is_whole(window):
    found = recall_of(Fake(499), window, 4 * window + 8)
    assert [(row["windows"], row["accuracy"]) for row in found] == [(1, 1.0), (2, 1.0), (4, 1.0)]
    for row in found:  # one logit of 1 among 498 of 0
        assert row["loss"] == pytest.approx(math.log(math.e + 498) - 1, abs=1e-4)


def test_planted_recall_of_a_constant_is_none():
    """At most by chance: of 24 random tokens of 499 one or two."""
    assert all(row["accuracy"] <= 2 / 24 for row in recall_of(Fake(499, constant=3), 16, 80))


def test_planted_recall_with_swap_is_none():
    assert all(row["accuracy"] <= 2 / 24 for row in recall_of(Fake(499), 16, 80, swap=True))


LAYOUTS = [8, 9, 16, 64]


@pytest.mark.parametrize("window", LAYOUTS)
def test_planted_recall_strings_are_so_many_windows_apart(window):
    """Each whole in one window; with swap the first is another row's."""
    one, other = Fake(499), Fake(499)
    found = recall_of(one, window, 5 * window + 40)
    recall_of(other, window, 5 * window + 40, swap=True)
    assert [row["windows"] for row in found][:3] == [1, 2, 4]
    for row, tokens, swapped in zip(found, one.read, other.read, strict=True):
        last = tokens.shape[1] - 8
        first = last - row["windows"] * window
        assert torch.equal(tokens[:, first : first + 8], tokens[:, last:])
        assert first // window == (first + 7) // window == 0
        assert last // window == (last + 7) // window == row["windows"]
        assert torch.equal(swapped[:, last:], tokens[:, last:])
        assert torch.equal(swapped[:, first : first + 8], tokens[:, last:].roll(1, 0))


@pytest.mark.parametrize("count", [2, 3, 5, 10, 14])
def test_mean_and_half_equals_students_interval(count):
    """Against numpy's deviation and a printed table; beyond ten seeds it is a little too wide."""
    values = np.random.default_rng(count).normal(3, 2, count)
    t = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262, 14: 2.262}[count]
    mean, half = dnc_gpt2.mean_and_half(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert half == pytest.approx(t * values.std(ddof=1) / math.sqrt(count))


def test_mean_and_half_of_one_seed_has_no_interval():
    mean, half = dnc_gpt2.mean_and_half([2.5])
    assert mean == 2.5 and math.isnan(half)


# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════


def test_config_derives_arms_and_rows():
    config = eg.Config(arms=" edm, both,edm", batch_size=12, bptt_segments=3)
    assert config.arm_list == ["edm", "both"] and config.rows == 4


@pytest.mark.parametrize("fields", [
    *({name: 0} for name in ("base_steps", "base_positions", "top_k",
                             "write_every", "recurrent_width", "lora_alpha", "max_steps",
                             "batch_size", "bptt_segments", "log_every_steps", "new_tokens")),
    {"window": 0}, {"slots": 15}, {"slots": 65_537}, {"slots": 0}, {"top_k": 33}, {"lr": 0.0},
    {"lr": math.nan}, {"lr": math.inf}, {"lr": "1"}, {"window": 16.0}, {"window": True},
    {"grad_clip": -1.0}, {"lora": -1}, {"weight_decay": -0.1}, {"eval_tokens": -1},
    {"temperature": -0.5}, {"eval_rows": 1}, {"recall_rows": 1}, {"lora_dropout": 1.0},
    {"lora_dropout": -0.1}, {"lr_warmup": 1.0}, {"arms": "edm,dnc"}, {"arms": ""}, {"seeds": ""},
    {"seeds": "0,-1"}, {"seeds": "0,,1"}, {"seeds": "4294967296"}, {"eviction": "random"},
    {"bptt_segments": 3}, {"qlora": True}, {"text": " "}, {"base": 3}])
def test_config_refuses_a_bad_value_in_one_line(fields):
    with pytest.raises(ValueError) as error:
        run_config(**fields)
    [(name, value)] = fields.items()
    one_line(error, f"{name} = {value!r}: must be ")


@pytest.mark.parametrize("fields", [{"seeds": "²"}, {"read_layer": -2}, {"lora_targets": ""}])
def test_config_refuses_a_value_that_has_no_meaning(fields):
    with pytest.raises(ValueError) as error:
        run_config(**fields)
    [(name, value)] = fields.items()
    one_line(error, f"{name} = {value!r}: must be ")


@pytest.mark.parametrize("name, value", [
    ("window", 65), ("window", -1), ("stride", 17), ("stride", -1), ("read_layer", 3),
    ("slots", 15), ("slots", 65_537), ("read_top_k", 0), ("read_top_k", 33),
    ("eviction", "random"), ("edm_heads", -1), ("key_width", -1), ("write_every", 0),
    ("recurrent_width", 0), ("bptt_segments", 0),
    ("read_layer", -2), ("document_end", -5), ("document_end", V)])
def test_model_config_refuses_a_bad_value_in_one_line(base, name, value):
    with pytest.raises(ValueError) as error:
        make(base, **{name: value})
    one_line(error, f"{name} = {value!r}: must be ")


def test_model_config_takes_its_defaults_from_the_base(base):
    config = eg.EDMGPT2Config(base=base.config.to_dict())
    assert (config.window, config.stride, config.read_layer) == (64, 32, 1)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (V, C, 3)
    assert dataclasses.asdict(eg.Config())["read_layer"] == -1


def test_model_config_comes_back_from_disk(base, tmp_path):
    config = eg.EDMGPT2Config(base=base.config.to_dict(), **{
        **TINY, "lora": LORA, "document_end": 7, "eviction": "usage", "late": False})
    config.save_pretrained(tmp_path)
    found, wanted = eg.EDMGPT2Config.from_pretrained(tmp_path).to_dict(), config.to_dict()
    one, other = (GPT2Config(**x.pop("base")).to_dict() for x in (found, wanted))
    assert one == other
    for ignored in ("transformers_version", "_name_or_path"):
        found.pop(ignored, None), wanted.pop(ignored, None)
    assert found == wanted


# ══ Topic, command ═══════════════════════════════════════════════════════════════════════════════


def test_rare_words_are_those_of_training_seldom_met():
    counts = eg.collections.Counter({"river": 3, "water": 1})
    text = "The River's water, and the OBELISK of 1789; a sea."
    assert eg.rare_words(text, counts, 20_000) == {"water", "obelisk"}
    assert eg.rare_words(text, counts, 40_000) == {"river", "water", "obelisk"}


class Says:
    """In place of a model: goes through its row's prompt again and again, or one row further."""

    def __init__(self, vocabulary: int, roll: int):
        self.config = SimpleNamespace(vocab_size=vocabulary, window=16, stride=16)
        self.transformer = SimpleNamespace(wte=SimpleNamespace(weight=torch.eye(vocabulary)))
        self.roll, self.prompts, self.steps = roll, None, 0

    def init_state(self, batch: int) -> None:
        return None

    def advance(self, tokens, mask, state):
        if self.prompts is None:
            self.prompts = tokens.roll(self.roll, 0)
        best = self.prompts[:, self.steps % self.prompts.shape[1]]
        self.steps += 1
        return 50.0 * F.one_hot(best, self.config.vocab_size).float().unsqueeze(1), None, []


@pytest.mark.parametrize("roll", [0, 1])
def test_topic_consistency_counts_the_words_of_the_own_prompt(roll):
    """Words of the vocabulary are tokens, none in the training text: all are rare."""
    words = ["".join(chr(97 + i // 26**k % 26) for k in range(4)) for i in range(200)]
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(words[i] for i in ids))
    corpus = SimpleNamespace(train=torch.zeros(9, dtype=torch.long), valid=torch.arange(200))
    fake = Says(200, roll)
    found = eg.topic_consistency(fake, corpus, tokenizer, run_config(topic_rows=3))
    assert found["words"] == 48 - 1 and fake.config.stride == 16  # word 0 is in training
    assert found["own"] == (1 - roll) and found["other"] == roll / 2


def test_command_refuses_a_mistake_in_one_line(tmp_path, capsys):
    for argv, named in ((["--window", "4"], "window"), (["--top_k", "9000"], "top_k"),
                        (["--base", str(tmp_path)], "base"),
                        (["--generate", "The sea", "--save_dir", str(tmp_path)], "save_dir")):
        assert eg.main(argv) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and named in line


def test_command_trains_saves_and_goes_on_with_its_notebook(base, tokenizer, tmp_path, monkeypatch,
                                                            capsys):
    """The whole command on a folder of text; then two turns of --generate with a memory file."""
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    base.save_pretrained("base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained("base")
    Path("text").mkdir()
    for name, times in (("train", 90), ("valid", 30), ("test", 30)):
        text = "the city was built on a hill by the river and the sea\n" * times
        Path("text", f"{name}.txt").write_text(text)
    assert eg.main([
        "--base", "base", "--dataset", "text", "--window", "16", "--slots", "64", "--top_k", "4",
        "--max_steps", "2", "--batch_size", "4", "--bptt_segments", "2", "--eval_rows", "2",
        "--recall_rows", "2", "--topic_rows", "2", "--new_tokens", "5"]) == 0
    printed = capsys.readouterr().out
    for words in ("what do memories add?", "swapped", "Recall", "Topic", "goes on"):
        assert words in printed
    found = eg.json.loads(Path("plots/edm_gpt2.json").read_text())
    assert [run["arm"] for run in found["runs"]] == ["base", "full", "recurrent", "edm", "both"]
    assert Path("plots/edm_gpt2.png").stat().st_size > 10_000
    for _ in range(2):
        assert eg.main(["--generate", "the sea", "--new_tokens", "20",
                        "--memory_file", "notebook.pt"]) == 0
        assert "goes on" in capsys.readouterr().out
    model = eg.EDMGPT2ForCausalLM.from_pretrained("checkpoints/edm_gpt2")
    state = eg.load_memory(model, "notebook.pt")
    prompt = len(tokenizer.encode("the sea", add_special_tokens=False).ids)
    assert int(state.start + state.fill) == 2 * (prompt + 20)
