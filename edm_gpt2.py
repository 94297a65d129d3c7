#!/usr/bin/env python3
"""A frozen GPT-2 that recalls what has left its window: External Differentiable Memory (EDM).

Letters: B rows, T tokens, C hidden width, V vocabulary, W tokens of the window, N memory slots,
H heads, D key width, K slots read (top-k), R width of a recurrent memory.
"""

import collections
import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GenerationMixin, GPT2Config, GPT2Model, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    import dnc_gpt2
    from dnc_gpt2 import (
        LINE,
        RULE,
        check_types,
        check_values,
        evaluation_rows,
        require,
        training_rows,
    )
except ImportError:  # a saved model has this file beside it, alone: the model needs no more
    dnc_gpt2 = None

# ══ Memory: a key-value notebook, and a rolling summary ══════════════════════════════════════════
EVICTION = ("fifo", "lru", "usage")
KEY_OF = ("token", "previous")

class EDMState(NamedTuple):
    """The notebook, one row a sequence. Slots fill from the first; those in use are a prefix."""
    keys: torch.Tensor  # (B, H, N, D) of norm one
    values: torch.Tensor  # (B, H, N, D)
    position: torch.Tensor  # (B, N) place of the stored token in its row, -1 where empty
    token: torch.Tensor  # (B, N) its id
    rank: torch.Tensor  # (B, N) the lowest is evicted first; float64, to count tokens exactly
    seen: torch.Tensor  # (B,) tokens that were offered, stored or not
    last: torch.Tensor  # (B, C) h of the last of them

class EDMTrace(NamedTuple):
    """What the notebook did at each token of a segment."""
    write_gate: torch.Tensor  # (B, T) 1 where a token is stored
    write_slots: torch.Tensor  # (B, T) its slot, -1 where none
    read_slots: torch.Tensor  # (B, H, T, K)
    read_weights: torch.Tensor  # (B, H, T, K), sum 1, or 0 where nothing could be read

class Entry(NamedTuple):
    """What one write stored, with its graph: keys and values of a store carry none."""
    keys: torch.Tensor  # (B, H, M, D)
    values: torch.Tensor  # (B, H, M, D)
    slots: torch.Tensor  # (B, M), -1 where nothing was stored

def empty_notebook(batch: int, heads: int, slots: int, width: int, hidden_size: int,
                   like: torch.Tensor) -> EDMState:
    """The notebook of `batch` rows that have stored nothing, where `like` is."""
    store = like.detach().new_zeros(batch, heads, slots, width)
    empty = torch.full((batch, slots), -1, device=like.device)
    rank = torch.full(empty.shape, -math.inf, dtype=torch.float64, device=like.device)
    return EDMState(store, store.clone(), empty, empty.clone(), rank, empty.new_zeros(batch),
                    store.new_zeros(batch, hidden_size))

def newest(shape: torch.Size, recent: list[Entry], device) -> torch.Tensor:
    """(B, N): which of all recent entries, counted through, a slot holds; -1 an older one."""
    where, start = torch.full(shape, -1, device=device), 0
    for entry in recent:
        B, M = entry.slots.shape
        place = entry.slots.masked_fill(entry.slots < 0, shape[1])
        which = torch.arange(start, start + M, device=device).expand(B, M)
        where = F.pad(where, (0, 1)).scatter(1, place, which)[:, :-1]
        start += M
    return where

def valid_softmax(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Softmax over the valid ones of the last dimension; 0 where there is none."""
    nothing = ~valid.any(-1, keepdim=True)
    scores = scores.masked_fill(~valid, -math.inf).masked_fill(nothing, 0.0)
    return scores.softmax(-1).masked_fill(nothing, 0.0)

DENSE_SLOTS = 2048  # up to so many slots in use a read is computed as products with all of them

class EDM(nn.Module):
    """Key-value notebook: h + tanh(alpha) * W_o read, alpha = 0 at first. Every head reads the
    softmax over its K nearest slots by cosine, at a learned temperature. `forward` reads and writes
    by segments, of which the newest `bptt_segments` keep their graph.

    key_of token: a token is found by its own h, which holds what came before it only as far as the
    base's lower layers put that there. previous: by the h of the token before it, so that a query
    finds what followed the last time, as in kNN-LM; departs from the plain notebook."""

    def __init__(self, hidden_size: int, heads: int, width: int, slots: int, top_k: int,
                 eviction: str = "fifo", write_every: int = 1, segment: int = 0,
                 bptt_segments: int = 4, key_of: str = "token"):
        super().__init__()
        self.key_of = key_of
        self.heads, self.width, self.slots, self.top_k = heads, width, slots, top_k
        self.eviction, self.write_every = eviction, write_every
        self.segment, self.bptt_segments = segment, bptt_segments
        self.norm = nn.LayerNorm(hidden_size)
        self.query, self.key, self.value = (nn.Linear(hidden_size, heads * width) for _ in range(3))
        self.out = nn.Linear(heads * width, hidden_size, bias=False)
        self.log_strength, self.alpha = (nn.Parameter(torch.empty(x)) for x in ((heads,), ()))
        self.reset_own()

    def reset_own(self) -> None:
        """Initial values of what is in no module of PyTorch's."""
        nn.init.constant_(self.log_strength, math.log(16.0))
        nn.init.zeros_(self.alpha)

    @torch.no_grad()
    def start_from(self, block: nn.Module) -> None:
        """Start as the attention of the GPT-2 block that the notebook is read before: what that
        would have looked for, had it reached so far, is what the notebook finds at first. Needs the
        block's heads and head width; nothing happens where they differ. With key_of previous:
        start as a nearest-neighbour store, equal projections for query and key, and h handed on."""
        C = self.out.out_features
        if self.key_of == "previous":
            for part in (self.query, self.value):
                nn.init.orthogonal_(part.weight)
                nn.init.zeros_(part.bias)
            self.key.load_state_dict(self.query.state_dict())
            self.out.weight.copy_(self.value.weight.T)
            return
        if (self.heads, self.heads * self.width) != (block.attn.num_heads, C):
            return
        self.norm.load_state_dict(block.ln_1.state_dict())
        weights, biases = block.attn.c_attn.weight.split(C, 1), block.attn.c_attn.bias.split(C)
        mine = (self.query, self.key, self.value)
        for part, weight, bias in zip(mine, weights, biases, strict=True):
            part.weight.copy_(weight.T)
            part.bias.copy_(bias)
        self.out.weight.copy_(block.attn.c_proj.weight.T)

    def init_state(self, batch: int, slots: int = 0) -> EDMState:
        """The empty notebook of `batch` rows, of so many slots instead of the module's."""
        return empty_notebook(batch, self.heads, slots or self.slots, self.width,
                              self.out.out_features, self.query.weight)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H * D) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)

    def read(self, h: torch.Tensor, state: EDMState, recent: list[Entry]):
        """h (B, T, C) -> what to add to it (B, T, C), slots and weights, both (B, H, T, K)."""
        query = F.normalize(self.split(self.query(self.norm(h))), dim=-1, eps=1e-6)  # (B, H, T, D)
        used = int((state.position >= 0).any(0).sum())
        if used == 0:
            none = torch.empty(*query.shape[:3], 0, device=h.device)
            return torch.zeros_like(h), none.long(), none
        found = self.read_dense if used <= DENSE_SLOTS else self.read_top
        read, slots, weights = found(query, used, state, recent)
        read = read.transpose(1, 2).flatten(2)  # (B, T, H * D)
        return torch.tanh(self.alpha) * self.out(read), slots, weights

    def read_top(self, query, used: int, state: EDMState, recent: list[Entry]):
        """query (B, H, T, D) -> read (B, H, T, D), slots, weights. The nearest slots are found
        without a graph; the scores of those K are computed again with one, from `recent` where that
        is where they were written: for stores too large to have a graph."""
        B, H, T, _ = query.shape
        K = min(self.top_k, used)
        with torch.no_grad():
            scores = query @ state.keys[:, :, :used].transpose(2, 3)  # (B, H, T, used)
            empty = state.position[:, None, None, :used] < 0
            slots = scores.masked_fill(empty, -math.inf).topk(K, dim=-1).indices  # (B, H, T, K)
        keys, values = self.gather(slots, state, recent)  # (B, H, T, K, D)
        scores = self.strength * torch.einsum("bhtd,bhtkd->bhtk", query, keys)
        position = state.position[:, None, None].expand(B, H, T, -1).gather(3, slots)
        weights = valid_softmax(scores, position >= 0)  # (B, H, T, K)
        return torch.einsum("bhtk,bhtkd->bhtd", weights, values), slots, weights

    def read_dense(self, query, used: int, state: EDMState, recent: list[Entry]):
        """As read_top, by products with every slot: faster where they are few."""
        B, H, T, D = query.shape
        K = min(self.top_k, used)
        where = newest(state.position.shape, recent, query.device)[:, :used]  # (B, used)
        slots = [torch.arange(used, device=query.device).expand(B, -1)]
        valid = [(state.position[:, :used] >= 0) & (where < 0)]
        keys, values, start = [state.keys[:, :, :used]], [state.values[:, :, :used]], 0
        for entry in recent:  # a slot counts where it was written last, unless emptied since
            own = start + torch.arange(entry.slots.shape[1], device=query.device)
            start += len(own)
            place = entry.slots.clamp(0, used - 1)
            last = (where.gather(1, place) == own) & (state.position.gather(1, place) >= 0)
            slots.append(place)
            valid.append((entry.slots >= 0) & (entry.slots < used) & last)
            keys.append(entry.keys)
            values.append(entry.values)
        slots, valid = torch.cat(slots, 1), torch.cat(valid, 1)  # (B, n)
        scores = self.strength * (query @ torch.cat(keys, 2).transpose(2, 3))  # (B, H, T, n)
        scores = scores.masked_fill(~valid[:, None, None], -math.inf)
        best = scores.detach().topk(K, dim=-1).indices  # (B, H, T, K)
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter(3, best, True)
        weights = valid_softmax(scores, taken & valid[:, None, None])  # (B, H, T, n)
        slots = slots[:, None, None].expand(B, H, T, -1).gather(3, best)
        return weights @ torch.cat(values, 2), slots, weights.gather(3, best)

    @property
    def strength(self) -> torch.Tensor:
        return self.log_strength.exp()[:, None, None]  # (H, 1, 1)

    def gather(self, slots: torch.Tensor, state: EDMState, recent: list[Entry]):
        """Keys and values of slots (B, H, T, K), both (B, H, T, K, D)."""
        B, H, T, K = slots.shape
        index = slots.reshape(B, H, T * K, 1).expand(-1, -1, -1, self.width)
        found = [store.gather(2, index) for store in (state.keys, state.values)]  # (B, H, TK, D)
        if recent:
            where = newest(state.position.shape, recent, slots.device)  # (B, N)
            which = where[:, None].expand(-1, H, -1).gather(2, slots.reshape(B, H, T * K))
            index = which.clamp_min(0).unsqueeze(-1).expand(-1, -1, -1, self.width)
            fresh = [torch.cat(parts, dim=2).gather(2, index)
                     for parts in ([e.keys for e in recent], [e.values for e in recent])]
            found = [torch.where(which.unsqueeze(-1) >= 0, new, old)
                     for new, old in zip(fresh, found, strict=True)]
        return [x.view(B, H, T, K, self.width) for x in found]

    def write(self, h: torch.Tensor, token: torch.Tensor, position: torch.Tensor,
              keep: torch.Tensor, state: EDMState) -> tuple[EDMState, Entry]:
        """Store h (B, M, C) of tokens and positions (B, M) where keep (B, M) -> state, entry. Empty
        slots first, then those of the lowest rank; M is at most N."""
        z, M = self.norm(h), token.shape[1]
        found_by = z if self.key_of == "token" else self.norm(
            torch.cat([state.last.unsqueeze(1), h[:, :-1]], dim=1))  # (B, M, C)
        entry = Entry(F.normalize(self.split(self.key(found_by)), dim=-1, eps=1e-6),
                      self.split(self.value(z)), token)
        order = state.rank.argsort(dim=1, stable=True)[:, :M]  # (B, M), slots to be overwritten
        place = order.gather(1, (keep.cumsum(1) - 1).clamp_min(0))  # (B, M)
        rows, columns = keep.nonzero(as_tuple=True)
        at = place[rows, columns]

        def put(store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:  # (B, N), (B, M)
            store = store.clone()
            store[rows, at] = new[rows, columns]
            return store

        def put_wide(store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:  # (B, H, N, D)
            store = store.clone()
            store[rows, :, at] = new.detach()[rows, :, columns]
            return store

        first = position.to(state.rank.dtype)
        if self.eviction == "usage":  # one read above what it replaces, else the newest goes first
            first = state.rank.gather(1, place).clamp_min(0) + 1
        state = EDMState(put_wide(state.keys, entry.keys), put_wide(state.values, entry.values),
                         put(state.position, position), put(state.token, token),
                         put(state.rank, first), position[:, -1] + 1, h[:, -1].detach())
        return state, entry._replace(slots=place.masked_fill(~keep, -1))

    def touch(self, slots: torch.Tensor, weights: torch.Tensor, position: torch.Tensor,
              state: EDMState) -> EDMState:
        """The ranks after tokens at position (B, T) have read slots with weights (B, H, T, K)."""
        if self.eviction == "fifo" or not slots.shape[-1]:
            return state
        rank, index = state.rank, slots.transpose(1, 2).flatten(1)  # (B, T * H * K)
        weights = weights.detach().to(rank.dtype).transpose(1, 2).flatten(1)
        if self.eviction == "usage":
            return state._replace(rank=rank.scatter_add(1, index, weights))
        when = position.to(rank.dtype).repeat_interleave(index.shape[1] // position.shape[1], 1)
        when = when.masked_fill(weights <= 0, -math.inf)
        return state._replace(rank=rank.scatter_reduce(1, index, when, "amax"))

    def forward(self, h: torch.Tensor, state: EDMState) -> tuple[torch.Tensor, EDMState, EDMTrace]:
        """h (B, T, C) -> h_out, state, trace. Each segment (the whole, if `segment` is 0) reads
        what was stored before it, then is stored itself; a shorter last one too."""
        outputs, traces, recent = [], [], []
        for x in h.split(self.segment or max(1, h.shape[1]), dim=1):
            B, T, _ = x.shape
            position = state.seen.unsqueeze(1) + torch.arange(T, device=x.device)  # (B, T)
            added, slots, weights = self.read(x, state, recent)
            state = self.touch(slots, weights, position, state)
            keep = position % self.write_every == 0
            state, entry = self.write(x, torch.zeros_like(position), position, keep, state)
            if torch.is_grad_enabled():
                recent = [*recent, entry][1 - max(2, self.bptt_segments) :]
            outputs.append(x + added)
            wide = (0, self.top_k - slots.shape[-1])
            traces.append(EDMTrace(keep.to(x.dtype), entry.slots, F.pad(slots, wide),
                                   F.pad(weights, wide)))
        gates, written, *reads = zip(*traces, strict=True)
        trace = EDMTrace(torch.cat(gates, 1), torch.cat(written, 1),
                         *(torch.cat(parts, 2) for parts in reads))
        return torch.cat(outputs, 1), state, trace

class RecurrentMemory(nn.Module):
    """Rolling summary: a GRU over the means of the segments that have left the window, added
    through tanh(alpha), alpha = 0 at first."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.cell = nn.GRUCell(hidden_size, width)
        self.out = nn.Linear(width, hidden_size, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))

    def reset_own(self) -> None:
        nn.init.zeros_(self.alpha)

    def init_state(self, batch: int) -> torch.Tensor:
        return self.out.weight.new_zeros(batch, self.cell.hidden_size).detach()  # (B, R)

    def forward(self, h: torch.Tensor, visible: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """h (B, T, C), visible (B, T), state (B, R) -> h (B, T, C)."""
        added = torch.tanh(self.alpha) * self.out(state).unsqueeze(1)  # (B, 1, C)
        return h + added * visible.unsqueeze(2)

    def update(self, h: torch.Tensor, keep: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The state (B, R) after h (B, M, C) of the tokens in keep (B, M), if any."""
        weights = keep.to(h.dtype)
        mean = (h * weights.unsqueeze(2)).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)
        return torch.where(keep.any(1, keepdim=True), self.cell(self.norm(mean), state), state)

# ══ Model ════════════════════════════════════════════════════════════════════════════════════════
class EDMGPT2Config(PretrainedConfig):
    """The base's configuration and the memory's fields. Loads without this repository."""
    model_type = "edm_gpt2"

    def __init__(self, base: dict | None = None, window: int = 0, stride: int = 0,
                 read_layer: int = -1, edm: bool = True, early: bool = True, late: bool = True,
                 edm_heads: int = 0, key_width: int = 0, slots: int = 8192, read_top_k: int = 32,
                 eviction: str = "fifo", write_every: int = 1, recurrent_width: int = 128,
                 bptt_segments: int = 4, key_of: str = "token", document_end: int = -1,
                 lora: dict | None = None, quantize: bool = False, **kwargs):
        kwargs.setdefault("tie_word_embeddings", False)  # the embedding is the head: one parameter
        super().__init__(**kwargs)
        self.base = base or GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2,
                                       n_positions=64).to_dict()
        gpt2 = GPT2Config(**self.base)
        self.vocab_size, self.hidden_size = gpt2.vocab_size, gpt2.n_embd
        self.num_hidden_layers, self.num_attention_heads = gpt2.n_layer, gpt2.n_head
        self.window = window or gpt2.n_positions
        self.stride = stride or max(1, self.window // 2)  # tokens that leave a full window
        self.read_layer = gpt2.n_layer // 2 if read_layer == -1 else read_layer
        self.edm, self.early, self.late = edm, early, late
        self.edm_heads = edm_heads or gpt2.n_head
        self.key_width = key_width or gpt2.n_embd // gpt2.n_head
        self.slots, self.read_top_k = slots, read_top_k
        self.eviction, self.write_every, self.key_of = eviction, write_every, key_of
        self.recurrent_width, self.bptt_segments = recurrent_width, bptt_segments
        self.document_end, self.lora, self.quantize = document_end, lora, quantize

    def check(self) -> None:
        """Raises ValueError with field, value and requirement."""
        positions = GPT2Config(**self.base).n_positions
        rules = (
            ("window", 1 <= self.window <= positions,
             f"from 1 to the base's positions ({positions})"),
            ("stride", 1 <= self.stride <= self.window, f"from 1 to window ({self.window})"),
            ("read_layer", 0 <= self.read_layer < self.num_hidden_layers,
             f"from 0 to {self.num_hidden_layers - 1}, the base's last layer"),
            ("slots", self.window <= self.slots <= 65_536,
             f"from window ({self.window}) to 65536, as far as exact search goes"),
            ("read_top_k", 1 <= self.read_top_k <= self.slots, f"from 1 to slots ({self.slots})"),
            ("eviction", self.eviction in EVICTION, "one of " + ", ".join(EVICTION)),
            ("key_of", self.key_of in KEY_OF, "one of " + ", ".join(KEY_OF)),
            ("document_end", -1 <= self.document_end < self.vocab_size,
             f"-1 (none), or below the {self.vocab_size} tokens of the base"),
            *((name, getattr(self, name) >= 1, "1 or more") for name in (
                "edm_heads", "key_width", "write_every", "recurrent_width", "bptt_segments")))
        for name, holds, requirement in rules:
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {requirement}")

class EDMGPT2State(NamedTuple):
    """Everything that a row remembers. Index W of the buffers is for what is masked."""
    memory: EDMState
    early: torch.Tensor  # (B, R)
    late: torch.Tensor  # (B, R)
    tokens: torch.Tensor  # (B, W + 1) in the window
    hidden: torch.Tensor  # (B, W + 1, C) before the read, as when they were first encoded
    final: torch.Tensor  # (B, W + 1, C) the base's output, likewise
    kv: torch.Tensor  # (B, layers, 2, heads, W + 1, d) of attention
    fill: torch.Tensor  # (B,) tokens in the window
    start: torch.Tensor  # (B,) place of the window's first token in its row

def map_state(fn, state):
    """fn of every tensor of a state."""
    return type(state)(*(map_state(fn, x) if isinstance(x, tuple) else fn(x) for x in state))

def put_rows(index: torch.Tensor, new, old):
    """The old state with its rows at index replaced by new."""
    return type(old)(*(put_rows(index, a, b) if isinstance(a, tuple) else b.index_copy(0, index, a)
                       for a, b in zip(new, old, strict=True)))

class EDMCache:
    """What generate() hands from step to step: the state, and how many columns it has seen."""
    is_compileable = False

    def __init__(self, state: EDMGPT2State, seen: int = 0):
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        index = beam_idx.to(self.state.fill.device)
        if not torch.equal(index, torch.arange(len(index), device=index.device)):
            self.state = map_state(lambda x: x.index_select(0, index), self.state)

def needed(package: str, why: str):
    """Import a package that only some runs need. Raises ValueError naming what to install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{why}: needs {package}; run: pip install {package}") from None

def add_lora(transformer: nn.Module, settings: dict) -> None:
    """Put peft's LoRA adapters of settings (r, lora_alpha, lora_dropout, target_modules) on the
    base's projections, in place. Raises ValueError for a target that does not exist."""
    peft = needed("peft", "lora")
    from transformers.pytorch_utils import Conv1D
    takes = {name.split(".")[-1] for name, module in transformer.named_modules()
             if isinstance(module, (nn.Linear, Conv1D))}
    for target in settings["target_modules"]:
        if target not in takes:
            raise ValueError(f"lora_targets = {target!r}: must be projections of the base, of "
                             + ", ".join(sorted(takes)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that Conv1D is stored transposed, and is right
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), transformer)

def projections(transformer: nn.Module):
    """(parent, name) of every projection of the base, those inside LoRA layers too."""
    for block in transformer.h:
        for parent, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"),
                             (block.mlp, "c_proj")):
            layer = getattr(parent, name)
            yield (layer, "base_layer") if hasattr(layer, "base_layer") else (parent, name)

def quantize(transformer: nn.Module) -> None:
    """Turn the projections into bitsandbytes' 4-bit NF4 layers, in place. Raises ValueError for a
    width that is no multiple of 64, a block of NF4: bitsandbytes takes wrong scales there."""
    bnb = needed("bitsandbytes", "qlora")
    if width := transformer.config.n_embd % 64:
        raise ValueError(f"qlora: the base is {transformer.config.n_embd} wide: must be a multiple "
                         f"of 64, a block of NF4, not {width} over; use --lora alone")
    for parent, name in projections(transformer):
        conv = getattr(parent, name)  # Conv1D: weight (in, out)
        linear = bnb.nn.Linear4bit(*conv.weight.shape, compute_dtype=torch.float32,
                                   quant_type="nf4")
        linear.weight = bnb.nn.Params4bit(conv.weight.data.T.contiguous(), requires_grad=False,
                                          compress_statistics=False, quant_type="nf4")
        linear.bias = conv.bias
        linear.support_avx512bf16_for_cpu = False  # its packing rounds, for good
        setattr(parent, name, linear.to(conv.weight.device))  # which quantizes

def dequantize(transformer: nn.Module) -> None:
    """Turn 4-bit layers back into the layers of plain weights that they stand for, in place."""
    bnb = needed("bitsandbytes", "qlora")
    from transformers.pytorch_utils import Conv1D
    for parent, name in projections(transformer):
        linear = getattr(parent, name)
        conv = Conv1D(linear.out_features, linear.in_features).to(linear.weight.device)
        weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        conv.weight.data, conv.bias = weight.T.contiguous().float(), linear.bias
        conv.requires_grad_(False)
        setattr(parent, name, conv)

class EDMGPT2ForCausalLM(PreTrainedModel, GenerationMixin):
    """tokens, embeddings, early memory, GPT-2 up to read_layer, notebook, GPT-2, late memory, head.

    When the window is full its first `stride` tokens leave it, into the memories, and the rest is
    encoded again from position 0: the state of a row is a function of its tokens alone, however
    they are cut into calls. What a token stores is its hidden state when it was first encoded."""
    config_class = EDMGPT2Config
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # Trainer then divides by the batches that it accumulates

    def __init__(self, config: EDMGPT2Config):
        super().__init__(config)
        config.check()
        base = GPT2Config(**config.base)
        C = base.n_embd
        self.transformer = GPT2Model(base)
        self.edm = EDM(C, config.edm_heads, config.key_width, config.slots, config.read_top_k,
                       config.eviction, config.write_every,
                       key_of=config.key_of) if config.edm else None
        self.early = RecurrentMemory(C, config.recurrent_width) if config.early else None
        self.late = RecurrentMemory(C, config.recurrent_width) if config.late else None
        if config.lora:
            add_lora(self.transformer, config.lora)
        self.freeze()
        self.post_init()

    def freeze(self) -> None:
        """Only memories and adapters are trained."""
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def train(self, mode: bool = True):
        """As nn.Module's, but the base stays as it is evaluated: frozen, no dropout but LoRA's."""
        super().train(mode)
        for name, module in self.transformer.named_modules():
            if not name.endswith("lora_dropout.default"):
                module.training = False
        return self

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As PreTrainedModel's; a base that was in 4 bits is so again."""
        model = super().from_pretrained(*args, **kwargs)
        loaded = model[0] if isinstance(model, tuple) else model
        if loaded.config.quantize:
            quantize(loaded.transformer)
        loaded.freeze()
        return model

    def save_pretrained(self, *args, **kwargs) -> None:
        """As PreTrainedModel's: base, adapters and memories. Of 4-bit layers the weights that they
        stand for are saved, which come back as the same 4 bits."""
        if not self.config.quantize:
            return super().save_pretrained(*args, **kwargs)
        dequantize(self.transformer)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            quantize(self.transformer)

    def merge_lora(self) -> None:
        """Fold the adapters into the base's weights, out of 4 bits if it was in them: a model
        without adapters."""
        if self.config.quantize:
            dequantize(self.transformer)
            self.config.quantize = False
        for name, module in [*self.transformer.named_modules()]:
            if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                module.merge()
                parent, _, last = name.rpartition(".")
                setattr(self.transformer.get_submodule(parent), last, module.base_layer)
        self.config.lora = None
        self.freeze()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's initialisation, for what a file does not hold."""
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding, nn.GRUCell)):
            module.reset_parameters()
        elif isinstance(module, (EDM, RecurrentMemory)):
            module.reset_own()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    # ── state ──
    def init_state(self, batch: int) -> EDMGPT2State:
        """The state of `batch` rows that have read nothing."""
        base, W = self.transformer.config, self.config.window
        like = self.transformer.wte.weight.detach()
        memory = self.edm.init_state(batch) if self.edm else empty_notebook(
            batch, 1, 1, 1, 1, like)
        zero = torch.zeros(batch, dtype=torch.long, device=like.device)
        recurrent = [like.new_zeros(batch, 0) if memory is None else memory.init_state(batch)
                     for memory in (self.early, self.late)]
        wide = like.new_zeros(batch, W + 1, base.n_embd)
        kv = like.new_zeros(batch, base.n_layer, 2, base.n_head, W + 1, base.n_embd // base.n_head)
        return EDMGPT2State(memory, *recurrent, zero.new_zeros(batch, W + 1), wide,
                            wide.clone(), kv, zero, zero.clone())

    def reset_memory(self, state: EDMGPT2State, rows: torch.Tensor | None = None) -> EDMGPT2State:
        """The state with these rows (B,) bool, or all, as if nothing had been read."""
        index = torch.arange(len(state.fill)) if rows is None else rows.nonzero().squeeze(1)
        return put_rows(index.to(state.fill.device), self.init_state(len(index)), state)

    # ── one pass over a window ──
    def visible(self, tokens: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        """(B, W + 1) whether a token may read memory: not behind a document's end in its window."""
        if self.config.document_end < 0:
            return torch.ones_like(tokens, dtype=torch.bool)
        inside = torch.arange(tokens.shape[1], device=tokens.device) < fill.unsqueeze(1)
        return ((tokens == self.config.document_end) & inside).cumsum(1) == 0

    def encode(self, tokens: torch.Tensor, take: torch.Tensor, state: EDMGPT2State,
               recent: list[Entry], first: bool, read_only: bool = False):
        """Put the next take (B,) of tokens (B, m) in the window -> outputs (B, m, C), state, reads
        (slots and weights). first: they are new, not encoded again."""
        W, base, gpt2 = self.config.window, self.transformer.config, self.transformer
        m, device = tokens.shape[1], tokens.device
        steps = torch.arange(m, device=device)
        place = state.fill.unsqueeze(1) + steps  # (B, m)
        place = place.masked_fill(steps >= take.unsqueeze(1), W).clamp_max(W)
        whole = bool((state.fill == 0).all() and (take == m).all())
        row = state.tokens.scatter(1, place, tokens)
        fill = state.fill + take
        visible = self.visible(row, fill).gather(1, place)  # (B, m)
        h = gpt2.wte(tokens) + gpt2.wpe(place.clamp_max(W - 1))  # (B, m, C)
        if self.early is not None:
            h = self.early(h, visible, state.early)
        keep_kv = not (whole and m == W)  # a window that came whole is not attended to again
        mask = None if whole else (
            torch.arange(W + 1, device=device) <= place.unsqueeze(2)).unsqueeze(1)  # (B, 1, m, W+1)
        kv, reads = [], (None, None)
        for i, block in enumerate(gpt2.h):
            if i == self.config.read_layer:
                before = h
                if self.edm is not None:
                    added, slots, weights = self.edm.read(h, state.memory, recent)
                    h = h + added * visible.unsqueeze(2)
                    reads = (slots, weights * visible[:, None, :, None])
            q, k, v = (x.unflatten(-1, (base.n_head, -1)).transpose(1, 2)
                       for x in block.attn.c_attn(block.ln_1(h)).split(base.n_embd, dim=2))
            if keep_kv:
                index = place[:, None, :, None].expand_as(k)
                stored = [state.kv[:, i, j].scatter(2, index, x) for j, x in enumerate((k, v))]
                kv.append(torch.stack(stored, dim=1))  # (B, 2, heads, W + 1, d)
                k, v = (k, v) if whole else stored
            mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and m > 1)
            h = h + block.attn.c_proj(mixed.transpose(1, 2).flatten(2))
            h = h + block.mlp(block.ln_2(h))
        out = final = gpt2.ln_f(h)
        if self.late is not None:
            out = self.late(out, visible, state.late)
        state = state._replace(tokens=row, fill=fill,
                               kv=torch.stack(kv, dim=1) if keep_kv else state.kv)
        if first:
            index = place.unsqueeze(2).expand_as(h)
            state = state._replace(hidden=state.hidden.scatter(1, index, before),
                                   final=state.final.scatter(1, index, final))
            if self.edm is not None and not read_only:
                real = (steps < take.unsqueeze(1)) & visible
                state = state._replace(memory=self.edm.touch(
                    reads[0], reads[1] * real[:, None, :, None],
                    state.start.unsqueeze(1) + place, state.memory))
        return out, state, reads

    def leave(self, state: EDMGPT2State, recent: list[Entry], read_only: bool):
        """The full windows of all rows give their first `stride` tokens to the memories; what stays
        is encoded again -> state, what was stored or None."""
        S, W, entry = self.config.stride, self.config.window, None
        tokens = state.tokens[:, :S]  # (B, S)
        position = state.start.unsqueeze(1) + torch.arange(S, device=tokens.device)
        ended = tokens == self.config.document_end
        keep = ended.flip(1).cumsum(1).flip(1) == 0  # behind the last end of a document
        if bool(ended.any()) and not read_only:
            fresh = self.reset_memory(state, ended.any(1))
            state = state._replace(memory=fresh.memory, early=fresh.early, late=fresh.late)
        if self.edm is not None and not read_only:
            memory, entry = self.edm.write(
                state.hidden[:, :S], tokens, position,
                keep & (position % self.config.write_every == 0), state.memory)
            state = state._replace(memory=memory)
        if self.early is not None and not read_only:
            state = state._replace(early=self.early.update(
                self.transformer.wte(tokens), keep, state.early))
        if self.late is not None and not read_only:
            state = state._replace(late=self.late.update(state.final[:, :S], keep, state.late))

        def moved(x: torch.Tensor) -> torch.Tensor:  # (B, W + 1, ...), the kept ones to the front
            return torch.cat([x[:, S:W], x[:, :S], x[:, W:]], dim=1)

        state = state._replace(tokens=moved(state.tokens), hidden=moved(state.hidden),
                               final=moved(state.final), fill=torch.zeros_like(state.fill),
                               start=state.start + S)
        if W > S:
            stay = torch.full_like(state.fill, W - S)
            recent = recent if entry is None else self.bounded([*recent, entry])
            _, state, _ = self.encode(state.tokens[:, : W - S], stay, state, recent, first=False)
        return state, entry

    def leave_rows(self, rows: torch.Tensor, state: EDMGPT2State, recent: list[Entry],
                   read_only: bool) -> EDMGPT2State:
        """`leave` for some rows (B,) bool alone; adds what they stored to recent."""
        index = rows.nonzero().squeeze(1)
        if len(index) == len(rows):
            state, entry = self.leave(state, recent, read_only)
        else:
            some = map_state(lambda x: x[index], state)
            some, entry = self.leave(some, [Entry(*(x[index] for x in e)) for e in recent],
                                     read_only)
            state = put_rows(index, some, state)
            if entry is not None:
                entry = Entry(*(new.new_full((len(rows), *new.shape[1:]), -1).index_copy(
                    0, index, new) for new in entry))
        if entry is not None and torch.is_grad_enabled():
            recent[:] = self.bounded([*recent, entry])
        return state

    def bounded(self, recent: list[Entry]) -> list[Entry]:
        """The newest entries, as many as keep their graph beside the segment that reads them."""
        return recent[1 - max(2, self.config.bptt_segments) :]

    def advance(self, tokens: torch.Tensor, mask: torch.Tensor, state: EDMGPT2State,
                read_only: bool = False):
        """Read tokens (B, T) where mask (B, T) -> outputs (B, T, C), state, reads: for each pass a
        tuple of places (B, m), slots (B, H, m, K) and weights."""
        W, (B, T) = self.config.window, tokens.shape
        order = (~mask).int().argsort(dim=1, stable=True)  # real tokens first
        tokens, count = tokens.gather(1, order), mask.sum(1)
        out = self.transformer.wte.weight.new_zeros(B, T + 1, self.config.hidden_size)
        done, recent, passes = torch.zeros_like(count), [], []
        while bool((done < count).any()):
            full = (state.fill == W) & (done < count)
            if bool(full.any()):
                state = self.leave_rows(full, state, recent, read_only)
            take = torch.minimum(W - state.fill, count - done)  # (B,)
            steps = torch.arange(int(take.max()), device=tokens.device)
            place = (done.unsqueeze(1) + steps).masked_fill(steps >= take.unsqueeze(1), T)  # (B, m)
            chunk = F.pad(tokens, (0, 1)).gather(1, place)
            h, state, reads = self.encode(chunk, take, state, recent, True, read_only)
            out = out.scatter(1, place.unsqueeze(2).expand_as(h), h)
            passes.append((place, *reads))
            done = done + take
        back = order.argsort(dim=1)
        return out[:, :T].gather(1, back.unsqueeze(2).expand(-1, -1, out.shape[2])), state, passes

    # ── Hugging Face ──
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                past_key_values: EDMCache | None = None, labels: torch.Tensor | None = None,
                logits_to_keep: int = 0, use_cache: bool | None = None, read_only: bool = False,
                return_dict: bool | None = None, **kwargs) -> CausalLMOutputWithPast:
        """input_ids (B, T), attention_mask (B, T) or of all columns so far, 0 = padding -> logits
        (B, T, V), loss (labels shifted here, -100 not scored), past_key_values. Raises ValueError
        for an argument that it would not use, such as position_ids."""
        for name, value in kwargs.items():
            if value is not None and value is not False:
                raise ValueError(f"{name}: not used by EDMGPT2ForCausalLM; leave it out")
        B, T = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -T:]
        cache = past_key_values or EDMCache(self.init_state(B))
        h, state, passes = self.advance(input_ids, mask.bool(), cache.state, read_only)
        cache = EDMCache(map_state(torch.Tensor.detach, state), cache.seen + T)
        logits = h[:, -logits_to_keep:] @ self.transformer.wte.weight.T  # (B, T or fewer, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None,
                                      **kwargs):
        """The columns that the cache has not seen. generate() hands over all of them."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask,
                "past_key_values": past_key_values, "use_cache": True,
                "logits_to_keep": 1}

# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
ARMS = ("recurrent", "edm", "both")
FLAGS = {"base": (False, False), "recurrent": (False, True), "edm": (True, False),
         "both": (True, True)}  # the notebook, the recurrent memories

@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of a run. Edit here, or override as `--name value`."""

    # base and data
    base: str = "auto"  # hub name, folder, checkpoint of dnc_gpt2.py; auto = gpt2, else the newest
    base_dir: str = "checkpoints/"  # where auto looks for a baseline, and trains one
    base_steps: int = 600  # of the base that auto trains
    base_positions: int = 512  # its window
    dataset: str = "auto"  # as in dnc_gpt2.py: auto, hub id, folder with train, valid and test.txt
    # memory
    arms: str = "recurrent,edm,both"  # of these; the base is always there
    window: int = 64  # W, tokens that attention sees
    read_layer: int = -1  # before this block the notebook is read; -1 = the middle one
    edm_heads: int = 0  # H of the notebook; 0 = those of the base, and it starts as its attention
    key_width: int = 0  # D of its keys and values; 0 = that of the base
    slots: int = 8192  # N
    top_k: int = 32  # slots that a head reads
    eviction: str = "fifo"  # fifo | lru | usage: what makes room when every slot is taken
    key_of: str = "previous"  # token | previous: whose hidden state a stored token is found by
    write_every: int = 1  # every so many tokens one is stored
    recurrent_width: int = 128  # R of the early and of the late memory
    reset_token: str = ""  # behind this token memory starts anew, such as <|endoftext|>
    # adapters
    lora: int = 0  # rank of LoRA adapters on the base, 0 = none
    lora_alpha: int = 16  # their scale times the rank
    lora_dropout: float = 0.05
    lora_targets: str = "c_attn,c_proj"  # modules of the base that get one
    qlora: bool = False  # the base in 4 bits (bitsandbytes), with adapters
    # training
    seeds: str = "0"  # of the memories' weights, one run each
    max_steps: int = 200  # of every arm
    batch_size: int = 16  # windows a step
    bptt_segments: int = 4  # consecutive windows of a row in one step, through which gradient runs
    lr: float = 2e-3  # peak of AdamW
    lr_warmup: float = 0.05  # share of the steps with a linearly rising rate; then cosine to 0
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # global gradient norm
    # evaluation
    eval_rows: int = 8  # parallel rows of validation and test
    eval_tokens: int = 0  # of each split, 0 = all
    recall_rows: int = 32  # planted strings of each distance
    topic_rows: int = 8  # prompts whose rare words should return
    log_every_steps: int = 50
    save_dir: str = "checkpoints/edm_gpt2/"  # the last arm of the first seed
    plot_dir: str = "plots/"
    # generation
    text: str = "The city was built on"  # continued when training is done
    generate: str = ""  # continue this with the model in save_dir; no training
    new_tokens: int = 60
    temperature: float = 0.8  # 0 = the most likely token
    memory_file: str = ""  # with generate: go on with this memory if it is there, and write it

    # derived
    arm_list = property(lambda self: list(dict.fromkeys(self.arms.replace(" ", "").split(","))))
    rows = property(lambda self: self.batch_size // self.bptt_segments)

    def __post_init__(self) -> None:
        check_types(self)
        batch = self.batch_size
        check_values(self, (
            ("base_steps base_positions window slots top_k write_every "
             "recurrent_width lora_alpha max_steps batch_size bptt_segments lr grad_clip "
             "log_every_steps new_tokens", lambda x: x > 0, "above 0"),
            ("edm_heads key_width lora weight_decay eval_tokens temperature",
             lambda x: x >= 0, "0 or more"),
            ("eval_rows recall_rows topic_rows", lambda x: x >= 2, "2 or more, to swap memories"),
            ("lora_dropout lr_warmup", lambda x: 0 <= x < 1, "from 0 to below 1"),
            ("arms", lambda _: set(self.arm_list) <= set(ARMS),
             "a comma-separated choice of " + ", ".join(ARMS)),
            ("seeds", lambda x: all(s.strip().isdecimal() and int(s) < 2**32 for s in x.split(",")),
             "a comma-separated list of whole numbers from 0"),
            ("eviction", EVICTION.__contains__, "one of " + ", ".join(EVICTION)),
            ("key_of", KEY_OF.__contains__, "one of " + ", ".join(KEY_OF)),
            ("window", lambda x: x >= 8, "8 or more, the length of a planted string"),
            ("read_layer", lambda x: x >= -1, "-1 (the middle block), or a block's number from 0"),
            ("lora_targets", lambda x: x.strip() != "", "names of the base's projections"),
            ("bptt_segments", lambda x: batch % x == 0, f"a divisor of batch_size ({batch})"),
            ("slots", lambda x: self.window <= x <= 65_536,
             f"from window ({self.window}) to 65536, as far as exact search goes"),
            ("top_k", lambda x: x <= self.slots, f"at most slots ({self.slots})"),
            ("qlora", lambda x: not x or self.lora > 0, "False without adapters; set --lora 8"),
            ("text", lambda x: x.strip() != "", "a prompt")))

# ══ The base ═════════════════════════════════════════════════════════════════════════════════════
class Base(NamedTuple):
    """A GPT-2 to be frozen."""
    name: str
    config: dict  # of GPT2Config
    weights: dict  # of GPT2Model
    tokenizer: object  # tokenizers.Tokenizer
    origin: str  # the data set that it was trained on, "" if not known

def load_base(config: Config) -> Base:
    """The base that Config names. auto: gpt2 from the hub, else the newest baseline in base_dir
    with room for the window, else one trained now; says which."""
    if config.base != "auto":
        if config.base.endswith(".pt"):
            return base_of_checkpoint(Path(config.base), config)
        return base_of_model(config.base, config)
    try:
        return base_of_model("gpt2", config)
    except ValueError as error:
        print(f"base auto: {error}")
    folder = Path(config.base_dir)
    pattern = "GPT2_Baseline_FINAL_step*.pt"
    for path in sorted(folder.glob(pattern), key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            base = base_of_checkpoint(path, config)
            print(f"base auto: the newest baseline, {path}")
            return base
        except ValueError as error:
            print(f"base auto: passed over {error}")
    print(f"base auto: no baseline in {folder} has a window of {config.window}; training one: "
          f"{config.base_steps} steps at a window of {config.base_positions}")
    require(config.window <= config.base_positions, "window", config.window,
            f"at most base_positions ({config.base_positions}), the window of the base")
    words = {"arms": "baseline", "preset": "small", "seq_len": config.base_positions,
             "batch_size": 2, "max_steps": config.base_steps, "dataset": config.dataset,
             "save_every_steps": config.base_steps + 1, "save_dir": config.base_dir,
             "plot_dir": str(Path(config.plot_dir) / "base"), "log_every_steps": 50,
             "eval_tokens": 16_384}
    settings, preset = dnc_gpt2.make_config(
        dnc_gpt2.Config, words, dnc_gpt2.PRESETS, torch.cuda.is_available())
    stop = dnc_gpt2.StopSignal()
    dnc_gpt2.run_comparison(settings, preset, stop)
    newest = max(folder.glob(pattern), key=lambda p: p.stat().st_mtime_ns)
    return base_of_checkpoint(newest, config)

def base_of_model(name: str, config: Config) -> Base:
    """A GPT-2 of the hub or of a folder written by save_pretrained."""
    from transformers import AutoConfig
    with dnc_gpt2.had_or_refused("base", name, "a folder written by a GPT-2's save_pretrained, or "
                                 "a checkpoint of dnc_gpt2.py"):
        found = AutoConfig.from_pretrained(name)
    check_base(name, found, config)
    with dnc_gpt2.had_or_refused("base", name, "a folder with the weights of a GPT-2"):
        weights = GPT2Model.from_pretrained(name).float().state_dict()
    return Base(Path(name).name, found.to_dict(), weights, dnc_gpt2.load_tokenizer(name), "")

def base_of_checkpoint(path: Path, config: Config) -> Base:
    """The controller of a checkpoint of dnc_gpt2.py."""
    from tokenizers import Tokenizer
    payload = dnc_gpt2.load_checkpoint(path)
    found = GPT2Config(**json.loads(payload["controller"]))
    check_base(str(path), found, config)
    require(payload["arm"] == dnc_gpt2.ARMS["baseline"], "base", str(path),
            f"a baseline (this is {payload['arm']}, whose memory would be left out)")
    weights = {name.removeprefix("controller."): weight
               for name, weight in payload["model_state_dict"].items()
               if name.startswith("controller.")}
    settings = found.to_dict() | {"bos_token_id": None, "eos_token_id": None}
    return Base(path.name, settings, weights, Tokenizer.from_str(payload["tokenizer"]),
                payload["corpus"])

def check_base(name: str, found, config: Config) -> None:
    """Raises ValueError unless it is the configuration of a plain GPT-2 with enough positions."""
    require(found.model_type == "gpt2", "base", name, f"a GPT-2 (this is {found.model_type})")
    plain = (found.scale_attn_weights and not found.scale_attn_by_inverse_layer_idx
             and found.tie_word_embeddings and not found.add_cross_attention)
    require(plain, "base", name, "a GPT-2 with plain attention and a tied head")
    require(config.window <= found.n_positions, "window", config.window,
            f"at most the {found.n_positions} positions of {name}; set --window")
    require(config.read_layer < found.n_layer, "read_layer", config.read_layer,
            f"below the {found.n_layer} blocks of {name}")

def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

def build_model(base: Base, config: Config, arm: str, seed: int) -> EDMGPT2ForCausalLM:
    """The base with the memories of an arm, whose weights are of the seed; evaluated by blocks: a
    full window leaves whole (generation has it leave by halves)."""
    edm, recurrent = FLAGS[arm]
    lora = dict(r=config.lora, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                target_modules=config.lora_targets.replace(" ", "").split(","),
                fan_in_fan_out=True) if config.lora and arm != "base" else None
    ends = base.tokenizer.token_to_id(config.reset_token) if config.reset_token else -1
    require(ends is not None, "reset_token", config.reset_token, "a token of the base's tokenizer")
    torch.manual_seed(seed)
    settings = EDMGPT2Config(
        base=base.config, window=config.window, stride=config.window, read_layer=config.read_layer,
        edm=edm, early=recurrent, late=recurrent, edm_heads=config.edm_heads,
        key_width=config.key_width, slots=config.slots, read_top_k=config.top_k,
        eviction=config.eviction, write_every=config.write_every, key_of=config.key_of,
        document_end=ends,
        recurrent_width=config.recurrent_width, bptt_segments=config.bptt_segments, lora=None,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = EDMGPT2ForCausalLM(settings)
    model.transformer.load_state_dict(base.weights)
    if edm:
        model.edm.start_from(model.transformer.h[settings.read_layer])
    if lora:
        add_lora(model.transformer, lora)
        settings.lora, settings.quantize = lora, config.qlora
    if settings.quantize:
        quantize(model.transformer)
    model.freeze()
    return model.to(device())

# ══ Training and evaluation ══════════════════════════════════════════════════════════════════════
def head_loss(model: EDMGPT2ForCausalLM, h: torch.Tensor, targets: torch.Tensor):
    """h (B, T, C), targets (B, T) -> mean loss (), nll (B, T), top1 (B, T)."""
    weight = model.transformer.wte.weight.detach()
    loss, nll, top1 = dnc_gpt2.HeadLoss.apply(h.flatten(0, 1), weight, targets.flatten(), h.dtype)
    return loss, nll.view(targets.shape), top1.view(targets.shape)

GATE_RATE = 5.0  # rate of gates and strengths, as a multiple of lr

def train_arm(base: Base, corpus, config: Config, arm: str, seed: int):
    """Train the memories (and adapters) of an arm -> model, history rows, tokens a second."""
    from tqdm import tqdm
    model = build_model(base, config, arm, seed).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    # Gates and strengths are single numbers that have far to go: gates open from zero.
    scalars = [p for p in trained if p.dim() < 2 and p.numel() <= model.config.edm_heads]
    matrices = [p for p in trained if all(p is not x for x in scalars)]
    peaks = (config.lr, GATE_RATE * config.lr)
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": scalars}], lr=config.lr,
                                  betas=(0.9, 0.95), weight_decay=config.weight_decay)
    step_len = config.bptt_segments * config.window
    rows = training_rows(corpus.train, config.rows, step_len)  # (rows, steps * step_len + 1)
    per_epoch, state, history, losses = (rows.shape[1] - 1) // step_len, None, [], []
    warmup = max(1, round(config.lr_warmup * config.max_steps))
    began = time.perf_counter()
    with tqdm(total=config.max_steps, desc=f"{arm}, seed {seed}", dynamic_ncols=True) as bar:
        for step in range(config.max_steps):
            at = step % per_epoch * step_len
            if at == 0:
                state = model.init_state(config.rows)
            share = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(
                math.pi * max(0, step - warmup) / max(1, config.max_steps - warmup)))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            chunk = rows[:, at : at + step_len + 1].to(device())
            x, y = chunk[:, :-1], chunk[:, 1:]
            h, state, _ = model.advance(x, torch.ones_like(x, dtype=torch.bool), state)
            state = map_state(torch.Tensor.detach, state)
            loss, _, _ = head_loss(model, h, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, config.grad_clip)
            optimizer.step()
            losses.append(loss.item())
            bar.update()
            if (step + 1) % config.log_every_steps == 0 or step + 1 == config.max_steps:
                mean = sum(losses) / len(losses)
                if not math.isfinite(mean):
                    raise ValueError(f"lr = {config.lr}: the loss of {arm} is not finite; lower it")
                history.append({"arm": arm, "seed": seed, "step": step + 1, "loss": mean})
                bar.set_postfix_str(f"loss {mean:.3f}")
                losses.clear()
    speed = config.max_steps * config.rows * step_len / (time.perf_counter() - began)
    return model.eval(), history, speed

@torch.no_grad()
def evaluate(model: EDMGPT2ForCausalLM, stream: torch.Tensor, rows: int, swap: bool = False):
    """Negative log-likelihood (rows, L) in nats of every token of a stream but the first; 0 where a
    row is filled up. With `swap` a row is scored with the memory that the row before it has at that
    place, and goes on with its own."""
    inputs, targets = evaluation_rows(stream, rows)
    state, found, W = model.init_state(rows), [], model.config.window
    for x, y in zip(inputs.split(W, 1), targets.split(W, 1), strict=True):
        x, y = x.to(device()), y.to(device())
        every = torch.ones_like(x, dtype=torch.bool)
        if swap:
            full = state.fill == W
            state = model.leave_rows(full, state, [], False) if bool(full.any()) else state
            others = state._replace(**{
                name: map_state(lambda z: z.roll(1, 0), value) if isinstance(value, tuple)
                else value.roll(1, 0) for name, value in state._asdict().items()
                if name in ("memory", "early", "late")})
            h, _, _ = model.advance(x, every, others, read_only=True)
            _, state, _ = model.advance(x, every, state)
        else:
            h, state, _ = model.advance(x, every, state)
        found.append(head_loss(model, h, y)[1].double().cpu())
    return torch.cat(found, 1)

def windows_back(stream: torch.Tensor, rows: int, window: int) -> np.ndarray:
    """(rows, L): how many windows before the window of a prediction its target stood last; 0 in the
    same window, -1 never before in its row."""
    inputs, targets = (x.numpy() for x in evaluation_rows(stream, rows))
    found = np.full(inputs.shape, -1)
    for row, (x, y) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        last = {}
        for t, (token, target) in enumerate(zip(x, y, strict=True)):
            last[token] = t
            if target in last:
                found[row, t] = t // window - last[target] // window
    return found

# Lower ends of the buckets of windows_back.
BACK = (0, 1, 2, 4, 8, 16, 32, 64)
RECALL_WINDOWS = (1, 2, 4, 8, 16, 32, 64)

def bucket_names() -> list[str]:
    names = ["in the window", *(f"{a}" if b == a + 1 else f"{a}-{b - 1}"
                                for a, b in zip(BACK[1:], BACK[2:], strict=False))]
    return [*names, f"{BACK[-1]}+", "new"]

def by_distance(nll: torch.Tensor, back: np.ndarray, scored: torch.Tensor) -> list[dict]:
    """Count and mean loss of the scored tokens of each bucket."""
    bucket = np.where(back < 0, len(BACK), np.searchsorted(BACK, back, side="right") - 1)
    rows = []
    for i, name in enumerate(bucket_names()):
        mine = torch.from_numpy(bucket == i) & scored
        count = int(mine.sum())
        rows.append({"windows_back": name, "tokens": count,
                     "loss": float(nll[mine].sum()) / count if count else None})
    return rows

@torch.no_grad()
def planted_recall(model: EDMGPT2ForCausalLM, stream: torch.Tensor, config: Config,
                   swap: bool = False) -> list[dict]:
    """A string of eight random tokens, text, and the string again, so many windows later: the share
    of its last four tokens that are the most likely ones, and their mean loss (nats). With `swap`
    the text is another row's."""
    W, n, found = config.window, config.recall_rows, []
    size = model.config.vocab_size
    for windows in RECALL_WINDOWS:
        length = windows * W
        if len(stream) < length + 8:
            break
        rng = np.random.default_rng([windows, 17])
        planted = torch.from_numpy(rng.integers(0, size, (n, 8)))
        starts = rng.integers(0, len(stream) - length, n)
        text = torch.stack([stream[s : s + length] for s in starts])  # (n, length)
        first = planted.roll(1, 0) if swap else planted
        # The first string stands whole in the first window, the second whole in the last.
        tokens = torch.cat([text[:, : W // 2 - 4], first, text[:, W // 2 + 4 : ],
                            stream[: W // 2 - 4].expand(n, -1), planted], 1).to(device())
        right, loss = 0, 0.0
        for part in tokens.split(max(1, 65_536 // tokens.shape[1])):
            h, _, _ = model.advance(part, torch.ones_like(part, dtype=torch.bool),
                                    model.init_state(len(part)))
            logits = h[:, -5:-1] @ model.transformer.wte.weight.T  # (n, 4, V)
            right += int((logits.argmax(-1) == part[:, -4:]).sum())
            loss += F.cross_entropy(logits.flatten(0, 1), part[:, -4:].flatten(),
                                    reduction="sum").item()
        found.append({"windows": windows, "accuracy": right / (4 * n), "loss": loss / (4 * n)})
    return found

RARE = 1e-4  # a rare word is less than that share of the words of training

def rare_words(text: str, counts: collections.Counter, total: int) -> set[str]:
    return {word for word in re.findall(r"[^\W\d_]{4,}", text.lower())
            if counts[word] < RARE * total}

@torch.no_grad()
def topic_consistency(model: EDMGPT2ForCausalLM, corpus, tokenizer, config: Config) -> dict:
    """The share of a prompt's rare words that return in a sampled continuation, once the prompt has
    left the window; and of another prompt's, which is what chance gives. Prompts of one window from
    validation, four windows of continuation, the same random numbers for every arm."""
    W, n, size = config.window, config.topic_rows, model.config.vocab_size
    text = tokenizer.decode(corpus.train[:300_000].tolist())
    counts = collections.Counter(re.findall(r"[^\W\d_]{4,}", text.lower()))
    starts = torch.linspace(0, len(corpus.valid) - W - 1, n).long()
    prompts = torch.stack([corpus.valid[s : s + W] for s in starts])  # (n, W)
    stride, model.config.stride = model.config.stride, max(1, W // 2)  # as in generation
    draw, state, tokens, made = torch.Generator().manual_seed(11), model.init_state(n), prompts, []
    for _ in range(4 * W):
        tokens = tokens.to(device())
        h, state, _ = model.advance(tokens, torch.ones_like(tokens, dtype=torch.bool), state)
        logits = (h[:, -1] @ model.transformer.wte.weight.T).cpu()[:, :size]  # (n, V)
        tokens = torch.multinomial((logits / 0.8).softmax(-1), 1, generator=draw)  # (n, 1)
        made.append(tokens)
    model.config.stride = stride
    total = sum(counts.values())
    rare = [rare_words(tokenizer.decode(row.tolist()), counts, total) for row in prompts]
    said = [rare_words(tokenizer.decode(row[W:].tolist()), counts, total)
            for row in torch.cat(made, 1)]
    pairs = [(i, j) for i in range(n) for j in range(n) if rare[i]]
    share = {(i, j): len(rare[i] & said[j]) / len(rare[i]) for i, j in pairs}
    own, other = ([x for (i, j), x in share.items() if (i == j) == same] for same in (True, False))
    return {"own": sum(own) / max(1, len(own)), "other": sum(other) / max(1, len(other)),
            "words": sum(map(len, rare))}

# ══ Comparison ═══════════════════════════════════════════════════════════════════════════════════
# 97.5 % points of Student's t for 1 to 9 degrees of freedom; beyond, the last, which is too wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval over seeds; NaN where there is one seed."""
    mean, free = sum(values) / len(values), len(values) - 1
    if not free:
        return mean, math.nan
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / free / len(values))
    return mean, spread * STUDENT[min(free, len(STUDENT)) - 1]

def measure(model: EDMGPT2ForCausalLM, corpus, tokenizer, config: Config, arm: str,
            seed: int) -> dict:
    """Everything that is reported of one arm and seed."""
    found = {"arm": arm, "seed": seed, "window": model.config.window,
             "parameters": sum(p.numel() for p in model.parameters()),
             "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    memory = arm != "base"
    for split, stream in (("valid", corpus.valid), ("test", corpus.test)):
        stream = stream[: config.eval_tokens + 1] if config.eval_tokens else stream
        began = time.perf_counter()
        nll = evaluate(model, stream, config.eval_rows)
        seconds = time.perf_counter() - began
        scored = evaluation_rows(stream, config.eval_rows)[1] != -100
        found[f"{split}_loss"] = float(nll.sum()) / int(scored.sum())
        found[f"{split}_tokens"] = int(scored.sum())
        if split == "valid":
            found["tokens_per_s"] = int(scored.sum()) / seconds
            back = windows_back(stream, config.eval_rows, config.window)
            found["by_distance"] = by_distance(nll, back, scored)
            found["recall"] = planted_recall(model, stream, config)
            found["topic"] = topic_consistency(model, corpus, tokenizer, config)
            if memory:
                swapped = evaluate(model, stream, config.eval_rows, swap=True)
                found["swapped_loss"] = float(swapped.sum()) / int(scored.sum())
                found["recall_swapped"] = planted_recall(model, stream, config, swap=True)
    return found

def print_tables(runs: list[dict], base: Base, corpus, config: Config) -> None:
    """Print what was measured: perplexity, by distance, recall."""
    def of(arm: str) -> list[dict]:
        return [run for run in runs if run["arm"] == arm]

    def cell(values: list[float | None], form: str, share: float = 1.0, width: int = 15) -> str:
        values = [share * x for x in values if x is not None]
        if not values:
            return f"{'—':>{width}}"
        mean, half = mean_and_half(values)
        text = format(mean, form) + ("" if math.isnan(half) else f" ± {half:{form}}")
        return f"{text:>{width}}"

    [short], [full] = of("base"), of("full")
    seeds = len(config.seeds.split(","))
    gap = short["valid_loss"] - full["valid_loss"]
    print(f"\n{RULE}\n  {base.name}, frozen, window {config.window}: what do memories add?\n"
          f"{RULE}\n  {corpus.name}; {short['valid_tokens']:,} tokens of validation, "
          f"{short['test_tokens']:,} of test\n\n"
          f"  {'Perplexity ↓':<22}{'validation':>15}{'swapped':>15}{'test':>15}{'of the gap':>15}"
          f"{'tokens/s':>10}\n{LINE}")
    names = {"base": f"base, window {config.window}", "full": f"base, window {full['window']}"}
    for arm in ("base", *config.arm_list, "full"):
        found = of(arm)
        closed = [(short["valid_loss"] - run["valid_loss"]) / gap for run in found]
        print(f"  {names.get(arm, arm):<22}"
              + cell([math.exp(run["valid_loss"]) for run in found], ",.2f")
              + cell([math.exp(run["swapped_loss"]) if "swapped_loss" in run else None
                      for run in found], ",.2f")
              + cell([math.exp(run["test_loss"]) for run in found], ",.2f")
              + (cell(closed, ".0f", 100, 13) + " %" if arm not in names and gap > 0 else
                 f"{'—':>15}")
              + cell([run["tokens_per_s"] for run in found[:1]], ",.0f", 1, 10))
    print(f"{LINE}\n  swapped: every row is scored with the memory of the row before it. Of the\n"
          f"  gap: the share of the difference to the base at a window of {full['window']}.")
    heads = ["base", *config.arm_list, "full"]
    print(f"\n{RULE}\n  Validation perplexity by distance to the last use of the same token\n"
          f"{RULE}\n  {'windows back':<15}{'tokens':>9}" + "".join(f"{h:>15}" for h in heads))
    for i, name in enumerate(bucket_names()):
        cells = {arm: [run["by_distance"][i] for run in of(arm)] for arm in heads}
        if cells["base"][0]["tokens"]:
            print(f"  {name:<15}{cells['base'][0]['tokens']:>9,}" + "".join(
                cell([math.exp(c["loss"]) for c in cells[arm]], ",.1f") for arm in heads))
    print(f"\n{RULE}\n  Recall of a planted random string: its last four tokens\n"
          f"{RULE}\n  {'windows back':<24}" + "".join(f"{h:>15}" for h in heads))
    for key, share, form, unit in (("accuracy", 100, ".1f", "% right"), ("loss", 1, ".2f", "nats")):
        for i, row in enumerate(short["recall"]):
            print(f"  {row['windows']:<15}{unit:<9}" + "".join(
                cell([run["recall"][i][key] for run in of(arm)], form, share) for arm in heads))
    print(f"\n{RULE}\n  Topic: % of a prompt's rare words that return when it has left the window\n"
          f"{RULE}\n  {'':<24}" + "".join(f"{h:>15}" for h in heads))
    for name, key in (("its own prompt's", "own"), ("another prompt's", "other")):
        print(f"  {name:<24}" + "".join(
            cell([run["topic"][key] for run in of(arm)], ".1f", 100) for arm in heads))
    print(f"{LINE}\n  " + (f"±: half of the 95 % interval over {seeds} seeds." if seeds > 1 else
                          "One seed: no interval. --seeds 0,1,2 gives one."))

def plot_runs(runs: list[dict], base: Base, config: Config) -> None:
    """Draw plots/edm_gpt2.png: perplexity and recall against distance."""
    colors = {"base": "#4fc3f7", "recurrent": "#aed581", "edm": "#ff8a65", "both": "#fff176",
              "full": "#ce93d8"}
    names = [row["windows_back"] for row in runs[0]["by_distance"] if row["tokens"]]
    with dnc_gpt2.dark_figure(Path(config.plot_dir) / "edm_gpt2.png", 1, 2, (12, 4.8)) as (_, axes):
        for arm in ("base", *config.arm_list, "full"):
            found = [run for run in runs if run["arm"] == arm]
            label = {"base": f"base, window {config.window}",
                     "full": f"base, window {found[0]['window']}"}.get(arm, arm)
            losses = np.array([[row["loss"] for row in run["by_distance"] if row["tokens"]]
                               for run in found])
            axes[0].plot(range(len(names)), np.exp(losses).mean(0), marker="o", ms=4,
                         color=colors[arm], label=label)
            recall = np.array([[row["loss"] for row in run["recall"]] for run in found])
            axes[1].plot([row["windows"] for row in found[0]["recall"]], recall.mean(0),
                         marker="o", ms=4, color=colors[arm], label=label)
        axes[0].set(yscale="log", ylabel="perplexity", title="Perplexity by last use of a token",
                    xlabel="windows back")
        axes[0].set_xticks(range(len(names)), names, rotation=30, fontsize=8)
        axes[1].set_xscale("log", base=2)
        axes[1].set_xticks(RECALL_WINDOWS, [str(x) for x in RECALL_WINDOWS])
        axes[1].set(ylabel="loss (nats / token)", xlabel="windows back",
                    title="Recall of a planted random string")
        axes[0].legend(fontsize=8)
        for axis in axes:
            axis.grid(alpha=0.2)

# ══ Saving, generating ═══════════════════════════════════════════════════════════════════════════
def save_model(model: EDMGPT2ForCausalLM, base: Base, folder: Path) -> None:
    """Write a folder that from_pretrained and AutoModelForCausalLM load, without this repository:
    weights, configuration, tokenizer and this file. In generation the window leaves by halves."""
    from transformers import PreTrainedTokenizerFast
    blocks = model.config.stride
    model.config.stride = max(1, model.config.window // 2)
    model.config.auto_map = {"AutoConfig": "edm_gpt2.EDMGPT2Config",
                             "AutoModelForCausalLM": "edm_gpt2.EDMGPT2ForCausalLM"}
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=base.tokenizer).save_pretrained(folder)
    shutil.copyfile(__file__, folder / "edm_gpt2.py")
    model.config.stride = blocks

def fingerprint(model: EDMGPT2ForCausalLM) -> str:
    """sha256 of the weights and of what shapes a memory: whose memory a file is."""
    digest = hashlib.sha256(repr([getattr(model.config, name) for name in (
        "window", "stride", "read_layer", "slots", "write_every", "eviction", "key_of")]).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(-1).view(
            torch.uint8).numpy().tobytes())
    return digest.hexdigest()

def state_hash(state: EDMGPT2State) -> str:
    """sha256 of every tensor of a state."""
    digest = hashlib.sha256()
    for x in (*state.memory, *(x for x in state if isinstance(x, torch.Tensor))):
        digest.update(repr((x.dtype, x.shape)).encode() + x.detach().cpu().contiguous().view(
            -1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

def save_memory(state: EDMGPT2State, model: EDMGPT2ForCausalLM, path: str | Path) -> None:
    """Write a state, whole or not at all: a notebook outlives the process. Raises ValueError where
    there is no such folder, OSError where it cannot be written."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"memory_file = {str(path)!r}: must be in a folder that exists; make it")
    flat = {name: list(value) if isinstance(value, tuple) else value
            for name, value in state._asdict().items()}
    temporary = Path(f"{path}.tmp")
    payload = {"model": fingerprint(model), "sha256": state_hash(state), "state": flat}
    try:
        torch.save(payload, temporary)
    except RuntimeError as error:  # how torch.save reports a full disk
        raise OSError(f"memory_file = {str(path)!r}: cannot be written ({error})") from None
    os.replace(temporary, path)

def load_memory(model: EDMGPT2ForCausalLM, path: str | Path) -> EDMGPT2State:
    """Read what save_memory wrote. Raises ValueError for a file that is damaged or of another
    model."""
    if not Path(path).is_file():
        raise ValueError(f"memory_file = {str(path)!r}: must be a file written by save_memory")
    try:
        found = torch.load(path, map_location=device(), weights_only=True)
        theirs, flat = found["model"], found["state"]
        state = EDMGPT2State(**flat | {"memory": EDMState(*flat["memory"])})
        whole = state_hash(state) == found["sha256"]
    except Exception:  # torch.load raises a dozen kinds on what it did not write
        whole = False
    if not whole:
        raise ValueError(f"memory_file = {str(path)!r}: truncated, altered or no memory; delete it,"
                         " or name another")
    if theirs != fingerprint(model):
        raise ValueError(f"memory_file = {str(path)!r}: must be of this model (it was written by "
                         "another); name another, or load that model")
    return state

@torch.no_grad()
def continue_text(model: EDMGPT2ForCausalLM, tokenizer, prompt: str, config: Config,
                  state: EDMGPT2State | None = None) -> EDMGPT2State:
    """Print a continuation, and for each of its tokens the earlier tokens that it recalled most."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    require(len(ids) > 0, "generate" if config.generate else "text", prompt,
            "text that the tokenizer knows")
    state = state or model.init_state(1)
    draw = torch.Generator().manual_seed(int(config.seeds.split(",")[0]))
    made, lines, tokens = [], [], torch.tensor([ids], device=device())
    for _ in range(config.new_tokens):
        h, state, passes = model.advance(tokens, torch.ones_like(tokens, dtype=torch.bool), state)
        logits = (h[0, -1] @ model.transformer.wte.weight.T).cpu()  # (V,)
        if config.temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / config.temperature).softmax(0), 1,
                                          generator=draw))
        lines.append((token, recalled(passes[-1], state, tokenizer)))
        made.append(token)
        tokens = torch.tensor([[token]], device=device())
    _, state, _ = model.advance(tokens, torch.ones_like(tokens, dtype=torch.bool), state)
    print(f"\n{RULE}\n  {prompt!r} goes on\n{RULE}\n{prompt}{tokenizer.decode(made)}\n")
    if any(found for _, found in lines):
        print("  token         recalled (windows back, weight)")
        for token, found in lines:
            print(f"  {tokenizer.decode([token])!r:<14}{found}")
    return state

def recalled(last: tuple, state: EDMGPT2State, tokenizer, count: int = 3) -> str:
    """The tokens that the last token of a pass read most, over all heads; "" where it read none."""
    _, slots, weights = last
    if slots is None or not slots.shape[-1]:
        return ""
    total = torch.zeros(state.memory.token.shape[1], device=slots.device)
    total.scatter_add_(0, slots[0, :, -1].flatten(), weights[0, :, -1].flatten() / len(slots[0]))
    now, W, parts = int(state.start[0] + state.fill[0]), state.tokens.shape[1] - 1, []
    for weight, slot in zip(*(x.tolist() for x in total.topk(min(count, len(total)))), strict=True):
        if weight > 0:
            word = tokenizer.decode([int(state.memory.token[0, slot])])
            back = (now - int(state.memory.position[0, slot])) / W
            parts.append(f"{word!r} ({back:.1f}, {weight:.2f})")
    return "  ".join(parts)

# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
def run_generation(config: Config) -> None:
    """--generate: continue a prompt with the model in save_dir."""
    folder = Path(config.save_dir)
    require((folder / "config.json").is_file(), "save_dir", config.save_dir,
            "a folder that a run of edm_gpt2.py wrote; train one first")
    model = EDMGPT2ForCausalLM.from_pretrained(folder).eval().to(device())
    tokenizer = dnc_gpt2.load_tokenizer(str(folder))
    state = None
    if config.memory_file and Path(config.memory_file).exists():
        state = load_memory(model, config.memory_file)
    state = continue_text(model, tokenizer, config.generate, config, state)
    if config.memory_file:
        save_memory(state, model, config.memory_file)
        print(f"\nwrote {config.memory_file}")

def run_comparison(config: Config) -> None:
    """The main job: base, corpus, every arm and seed; then tables, plot, continuation."""
    folder = Path(config.save_dir)
    for name in ("save_dir", "plot_dir"):
        dnc_gpt2.check_folder(config, name, 64 if name == "save_dir" else 1)
    if not dnc_gpt2.hub_reachable():  # what it sets is read at import, which is over: no retries
        import huggingface_hub
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    base = load_base(config)
    gpt2 = GPT2Config(**base.config)
    from transformers import PreTrainedTokenizerFast
    PreTrainedTokenizerFast(tokenizer_object=base.tokenizer).save_pretrained(folder)
    corpus = dnc_gpt2.load_corpus(dnc_gpt2.Config(
        dataset=config.dataset, tokenizer=str(folder), batch_size=config.batch_size,
        bptt_segments=config.bptt_segments, seq_len=config.window, eval_rows=config.eval_rows))
    corpus = corpus._replace(name=corpus.name.replace(f"{folder.name} tokenizer",
                                                      "the base's tokenizer"))
    print(f"{RULE}\n  base      {base.name}: {gpt2.n_layer} blocks of width {gpt2.n_embd}, "
          f"{gpt2.n_positions} positions, vocabulary {gpt2.vocab_size:,}; frozen\n"
          f"  corpus    {corpus.name}\n"
          f"  versions  Python {platform.python_version()}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}; {device()}\n"
          + textwrap.fill(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()), 96,
                          initial_indent="  config    ", subsequent_indent=" " * 12,
                          break_long_words=False), flush=True)
    if base.origin and base.origin.split(",")[0] != corpus.name.split(",")[0]:
        print(f"  note      the base was trained on {base.origin}")
    wide = dataclasses.replace(config, window=gpt2.n_positions, slots=max(
        config.slots, gpt2.n_positions))
    runs = [measure(build_model(base, sizes, "base", 0).eval(), corpus, base.tokenizer, config,
                    "base", 0) for sizes in (config, wide)]
    runs[1]["arm"] = "full"
    kept, history = None, []
    for seed in map(int, config.seeds.split(",")):
        for arm in config.arm_list:
            model, rows, speed = train_arm(base, corpus, config, arm, seed)
            runs.append(measure(model, corpus, base.tokenizer, config, arm, seed))
            runs[-1]["training_tokens_per_s"] = speed
            history += rows
            ppl, before = (math.exp(run["valid_loss"]) for run in (runs[-1], runs[0]))
            print(f"  {arm}, seed {seed}: validation perplexity {ppl:.2f}, base {before:.2f}",
                  flush=True)
            if kept is None and arm == config.arm_list[-1]:
                kept = model
                save_model(model, base, folder)
    about = {"base": base.name, "corpus": corpus.name, "config": dataclasses.asdict(config),
             "torch": torch.__version__, "device": str(device())}
    path = Path(config.plot_dir) / "edm_gpt2.json"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"about": about, "runs": runs, "history": history}, indent=1),
                         encoding="utf-8")
    os.replace(temporary, path)
    print_tables(runs, base, corpus, config)
    plot_runs(runs, base, config)
    kept.config.stride = max(1, config.window // 2)
    continue_text(kept, base.tokenizer, config.text, config)
    print(f"\nwrote {path}, {path.with_suffix('.png')}, {folder}/")

def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 2 a user's mistake, 130 or 143 stopped by a signal."""
    if dnc_gpt2 is None:
        print("error: dnc_gpt2.py is missing beside this file; run it from the repository",
              file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(argv):
        dnc_gpt2.print_help(Config, __doc__, {}, "default")
        return 0

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        config = Config(**dnc_gpt2.parse_overrides(Config, argv))
        (run_generation if config.generate else run_comparison)(config)
    except KeyboardInterrupt as stopped:
        number = int(str(stopped) or signal.SIGINT)
        print("\nstopped; nothing was saved but a base that was trained whole", file=sys.stderr)
        return 128 + number
    except (ValueError, OSError, dnc_gpt2.Diverged, torch.cuda.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))
