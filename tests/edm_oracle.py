"""What the tests of EDM share: a tiny base, and the memory and the model written once more, in
NumPy, one row and one token at a time: a notebook is a dictionary, the window is encoded anew for
each token.

B rows, T tokens, C hidden width, V vocabulary, W window, S stride, N slots, M entries of a write,
H heads, D key width, R width of a recurrent memory.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import edm_gpt2
import edm_model

V, C, W, HEADS, LAYERS = 97, 32, 16, 4, 3
TINY = dict(window=W, stride=8, slots=32, read_top_k=4, edm_heads=2, key_width=8,
            recurrent_width=12, bos_token_id=None, eos_token_id=None, pad_token_id=None)
RUN = dict(window=W, slots=32, top_k=4, edm_heads=2, key_width=8, recurrent_width=12, batch_size=4,
           bptt_segments=2, max_steps=3, eval_rows=3, recall_rows=6, topic_rows=3,
           log_every_steps=2, new_tokens=9, temperature=0.0)


def edm_config(**fields) -> edm_gpt2.Config:
    """The Config of a tiny run."""
    return edm_gpt2.Config(**RUN | fields)


# ══ Models and tokens ════════════════════════════════════════════════════════════════════════════
def make_base(width: int = C) -> GPT2LMHeadModel:
    """GPT-2 with every weight away from its initial value, so that tokens and places matter."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_embd=width, n_layer=LAYERS, n_head=HEADS, n_positions=64,
                        bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def make(base: GPT2LMHeadModel, alpha: float = 0.5, dtype: torch.dtype = torch.float32,
         seed: int = 0, **fields) -> edm_model.EDMGPT2ForCausalLM:
    """The base with memories whose weights are away from their initial values."""
    torch.manual_seed(seed)
    config = edm_model.EDMGPT2Config(base=base.config.to_dict(), **TINY | fields)
    model = edm_model.EDMGPT2ForCausalLM(config)
    model.transformer.load_state_dict(base.transformer.state_dict())
    return moved(model, alpha).to(dtype)


@torch.no_grad()
def moved(model, alpha: float):
    """The model with memories away from their initial values and gates at alpha."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if name.endswith("alpha"):
            parameter.fill_(alpha)
    return model.eval()


def check_slopes(model, parameters: dict, given: dict, step: float = 1e-6, rel: float = 1e-4,
                 abs_: float = 1e-9) -> None:
    """Compare the gradient of the loss of what is given with central differences, along a random
    direction of length one in each parameter."""
    model(**given).loss.backward()
    rng = torch.Generator().manual_seed(3)
    for name, parameter in parameters.items():
        way = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        way = way / way.norm()
        ends = []
        for end in (step, -step):
            with torch.no_grad():
                parameter.add_(end * way)
                ends.append(float(model(**given).loss))
                parameter.sub_(end * way)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert parameter.grad.abs().max() > 0, name
        assert float((parameter.grad * way).sum()) == pytest.approx(slope, rel=rel, abs=abs_), name


def draw(*shape: int, seed: int = 1, low: int = 0, high: int = V) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def read_all(model, tokens, mask=None, state=None, **options):
    """logits (B, T, V), state, passes, without a graph."""
    mask = torch.ones_like(tokens) if mask is None else mask
    state = model.init_state(len(tokens)) if state is None else state
    with torch.no_grad():
        h, state, passes = model.advance(tokens, mask.bool(), state, **options)
        pointer = edm_model.pointer_of(passes, tokens.shape[1])
        return edm_model.head_logits(h, model.transformer.wte.weight, pointer), state, passes


def memories(model) -> dict[str, torch.nn.Parameter]:
    """The parameters that are not the base's."""
    named = model.named_parameters()
    return {name: p for name, p in named if not name.startswith("transformer.")}


def first_start(length: int, stride: int) -> int:
    """Where the window of so many tokens starts: strides leave until the rest fits."""
    start = 0
    while length - start > W:
        start += stride
    return start


# ══ Comparing ════════════════════════════════════════════════════════════════════════════════════
WINDOW = ("tokens", "hidden", "final", "kv", "fill", "start")  # of a state, what is not remembered


def close(actual, wanted, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(wanted), atol=tolerance,
                               rtol=tolerance, check_dtype=False)


def leaves(state) -> dict[str, torch.Tensor]:
    """Every tensor of a state by name."""
    own = {name: x for name, x in state._asdict().items() if name != "memory"}
    return state.memory._asdict() | own


def row_of(state, row: int):
    """A state of one row."""
    return edm_model.map_state(lambda x: x[row : row + 1], state)


def same_bits(one, other, rows=slice(None), but: tuple[str, ...] = ()) -> None:
    other = leaves(other)
    for name, value in leaves(one).items():
        assert name in but or torch.equal(value[rows], other[name][rows]), name


def same_memory(one, other, tolerance: float) -> None:
    """What a row remembers, and what stands in its window."""
    mine, others = leaves(one), leaves(other)
    for name in ("position", "token", "fill", "start"):
        assert torch.equal(mine[name], others[name]), name
    for row, fill in enumerate(one.fill.tolist()):
        assert torch.equal(one.tokens[row, :fill], other.tokens[row, :fill])
    for name in ("keys", "values", "early", "late", "rank"):
        close(mine[name], others[name], tolerance)


def one_line(error, *named: str) -> None:
    """An error is one line that names these."""
    text = str(error.value)
    assert len(text.splitlines()) == 1, text
    assert all(word in text for word in named), text


# ══ The naive memory ═════════════════════════════════════════════════════════════════════════════
def numbers(module: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """The parameters of a module whose names begin with prefix, which is cut off."""
    named = module.named_parameters()
    return {name.removeprefix(prefix): p.detach().double().numpy()
            for name, p in named if name.startswith(prefix)}


def layer_norm(x, p: dict, name: str):
    centred = x - x.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred / spread * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p: dict, name: str):
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def unit(x):
    """Vectors (..., D) of norm one."""
    return x / np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), 1e-6)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class NaiveNotebook:
    """One row: slot -> key (H, D), value (H, D), position, token, rank."""

    def __init__(self, module: edm_model.EDM) -> None:
        self.m, self.p = module, numbers(module)
        self.store = {}
        self.last = np.zeros(module.out.out_features)

    def rank(self, slot: int) -> float:
        return self.store[slot].rank if slot in self.store else -math.inf

    def write(self, hidden, tokens, positions, keep) -> list[int]:
        """Store hidden (M, C) of tokens and positions where keep -> their slots, -1 for none."""
        ranks = [self.rank(slot) for slot in range(self.m.slots)]
        free = iter(sorted(range(self.m.slots), key=lambda slot: (ranks[slot], slot)))
        written = []
        for i, h in enumerate(hidden):
            written.append(next(free) if keep[i] else -1)
            if keep[i]:
                slot = written[-1]
                self.store[slot] = self.entry(h, self.last)
                self.store[slot].token = int(tokens[i])
                self.store[slot].position = self.store[slot].rank = int(positions[i])
                if self.m.eviction == "usage":
                    self.store[slot].rank = max(ranks[slot], 0) + 1
            self.last = h
        return written

    def entry(self, h, before) -> SimpleNamespace:
        """Key and value (H, D) of h (C,) behind the h before it."""
        shape = (self.m.heads, self.m.width)
        found_by = before if self.m.key_of == "previous" else h
        key = linear(layer_norm(found_by, self.p, "norm"), self.p, "key")
        value = linear(layer_norm(h, self.p, "norm"), self.p, "value")
        return SimpleNamespace(key=unit(key.reshape(shape)), value=value.reshape(shape))

    def read(self, h) -> tuple[np.ndarray, list[dict[int, float]]]:
        """h (C,) -> what to add (C,), of each head the slots read and their weights."""
        slots = list(self.store)
        if not slots:
            return np.zeros_like(h), [{} for _ in range(self.m.heads)]
        query = linear(layer_norm(h, self.p, "norm"), self.p, "query")
        query = unit(query.reshape(self.m.heads, self.m.width))
        parts, weights = [], []
        for head in range(self.m.heads):
            cosine = np.array([self.store[slot].key[head] @ query[head] for slot in slots])
            nearest = np.argsort(-cosine)[: self.m.top_k]
            shares = softmax(math.exp(self.p["log_strength"][head]) * cosine[nearest])
            weights.append({slots[i]: share for i, share in zip(nearest, shares, strict=True)})
            parts.append(sum(share * self.store[slot].value[head]
                             for slot, share in weights[-1].items()))
        return math.tanh(self.p["alpha"]) * (self.p["out.weight"] @ np.concatenate(parts)), weights

    def touch(self, weights: list[dict[int, float]], position: int) -> None:
        """Slots were read with weights by a token at position."""
        for head in weights:
            for slot, weight in head.items():
                entry = self.store[slot]
                if self.m.eviction == "usage":
                    entry.rank += weight
                elif self.m.eviction == "lru" and weight > 0:
                    entry.rank = max(entry.rank, position)


def naive_gru(p: dict, x, state):
    """x (C,), state (R,) -> state (R,), after PyTorch's documentation."""
    x = layer_norm(x, p, "norm")
    r_x, z_x, n_x = np.split(p["cell.weight_ih"] @ x + p["cell.bias_ih"], 3)
    r_s, z_s, n_s = np.split(p["cell.weight_hh"] @ state + p["cell.bias_hh"], 3)
    r = 1 / (1 + np.exp(-(r_x + r_s)))
    z = 1 / (1 + np.exp(-(z_x + z_s)))
    return (1 - z) * np.tanh(n_x + r * n_s) + z * state


# ══ The naive model ══════════════════════════════════════════════════════════════════════════════
def naive_block(p: dict, h):
    """One block of GPT-2: h (T, C) -> (T, C)."""
    T = len(h)
    qkv = layer_norm(h, p, "ln_1") @ p["attn.c_attn.weight"] + p["attn.c_attn.bias"]
    q, k, v = qkv.reshape(T, 3, HEADS, -1).transpose(1, 2, 0, 3)  # (HEADS, T, d)
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    scores[:, np.triu(np.ones((T, T), dtype=bool), 1)] = -math.inf
    mixed = (softmax(scores) @ v).transpose(1, 0, 2).reshape(T, -1)
    h = h + mixed @ p["attn.c_proj.weight"] + p["attn.c_proj.bias"]

    z = layer_norm(h, p, "ln_2") @ p["mlp.c_fc.weight"] + p["mlp.c_fc.bias"]
    z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return h + z @ p["mlp.c_proj.weight"] + p["mlp.c_proj.bias"]


class NaiveRow:
    """One row, a token at a time."""

    def __init__(self, model) -> None:
        self.model, self.c = model, model.config
        self.p = numbers(model.transformer)
        self.blocks = [numbers(model.transformer, f"h.{i}.") for i in range(LAYERS)]
        self.early = model.early and numbers(model.early)
        self.late = model.late and numbers(model.late)
        self.tokens, self.hidden, self.final, self.start = [], [], [], 0
        self.forget()

    def forget(self) -> None:
        """Empty the memories."""
        self.notebook = self.model.edm and NaiveNotebook(self.model.edm)
        self.first, self.second = np.zeros((2, self.c.recurrent_width))

    def leave(self) -> None:
        """The first tokens of the window go into the memories, but nothing of a document that has
        ended."""
        going = range(self.start, self.start + self.c.stride)
        self.start = going.stop
        ends = [i for i in going if self.tokens[i] == self.c.document_end]
        if ends:
            self.forget()
        kept = [i for i in going if not ends or i > ends[-1]]
        if self.notebook:
            due = [i in kept and i % self.c.write_every == 0 for i in going]
            self.notebook.write(self.hidden[going.start : going.stop],
                                self.tokens[going.start : going.stop], going, due)
        if self.early and kept:
            mean = np.mean([self.p["wte.weight"][self.tokens[i]] for i in kept], axis=0)
            self.first = naive_gru(self.early, mean, self.first)
        if self.late and kept:
            mean = np.mean([self.final[i] for i in kept], axis=0)
            self.second = naive_gru(self.late, mean, self.second)

    def step(self, token: int) -> np.ndarray:
        """The next token -> logits (V,)."""
        if len(self.tokens) - self.start == self.c.window:
            self.leave()
        self.tokens.append(token)
        window = self.tokens[self.start :]
        sees = np.array([self.c.document_end not in window[: i + 1] for i in range(len(window))])
        h = self.p["wte.weight"][window] + self.p["wpe.weight"][: len(window)]
        if self.early:
            h[sees] += math.tanh(self.early["alpha"]) * (self.early["out.weight"] @ self.first)
        for layer, block in enumerate(self.blocks):
            if layer == self.c.read_layer:
                self.hidden.append(h[-1].copy())
                h = self.read(h, sees)
            h = naive_block(block, h)
        final = layer_norm(h[-1], self.p, "ln_f")
        self.final.append(final)
        if self.late and sees[-1]:
            final = final + math.tanh(self.late["alpha"]) * (self.late["out.weight"] @ self.second)
        return self.p["wte.weight"] @ final

    def read(self, h, sees):
        """Read the notebook for the window h (T, C); only its last token is new, and counts."""
        if not self.notebook:
            return h
        reads = [self.notebook.read(x) for x in h]
        if sees[-1]:
            self.notebook.touch(reads[-1][1], len(self.tokens) - 1)
        return h + np.stack([added for added, _ in reads]) * sees[:, None]
