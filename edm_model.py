"""A decoder with a memory for what has left its window: External Differentiable Memory (EDM).

EDM is a notebook of keys and values, RecurrentMemory a rolling summary, EDMForCausalLM the frozen
decoder that reads both: one of Llama's family, or, as EDMGPT2ForCausalLM, GPT-2. A saved model
carries this file, with what it uses of dnc_gpt2.py and dnc_model.py written into it, and so loads
with torch and transformers alone, with trust_remote_code. edm_gpt2.py trains and measures.

Letters: B rows, T tokens of a call, m tokens of one pass, C hidden width, V vocabulary, W tokens of
the window, S tokens that leave it at once, N memory slots, M entries of one write, H heads, D key
width, K slots read (top-k), R width of a recurrent memory, d width of the base's heads.
"""

import hashlib
import importlib
import math
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationMixin,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple

from dnc_gpt2 import Pointer, join_passes, map_state, next_tokens, put_rows, run_block
from dnc_model import (
    CACHE,
    TINY_BASE,
    StateCache,
    StatefulCausalLM,
    given_cache,
    head_logits,
    kept_columns,
    next_token_loss,
    open_from_zero,
    refuse_unused,
    token_ids,
)

Eviction = Literal["fifo", "lru", "usage"]  # what makes room when every slot is taken
KeyOf = Literal["token", "previous"]  # whose hidden state a stored token is found by
EVICTION, KEY_OF = get_args(Eviction), get_args(KeyOf)
MOST_SLOTS = 65_536  # as far as exact search goes


# ══ The notebook ═════════════════════════════════════════════════════════════════════════════════
class EDMState(NamedTuple):
    """The notebook, one row a sequence. Slots fill from the first; those in use are a prefix."""
    keys: Tensor  # (B, H, N, D) of norm one
    values: Tensor  # (B, H, N, D)
    position: Tensor  # (B, N) place of the stored token in its row, -1 where empty
    token: Tensor  # (B, N) its id
    rank: Tensor  # (B, N) the lowest is evicted first; float64, to count tokens exactly
    seen: Tensor  # (B,) tokens that were offered, stored or not
    last: Tensor  # (B, C) h of the last of them


class EDMTrace(NamedTuple):
    """What the notebook did at each token of a segment."""
    write_gate: Tensor  # (B, T) 1 where a token is stored
    write_slots: Tensor  # (B, T) its slot, -1 where none
    read_slots: Tensor  # (B, H, T, K)
    read_weights: Tensor  # (B, H, T, K), sum 1 less the empty slot's; 0 where nothing can be read


class Entry(NamedTuple):
    """What one write stored, with its graph: keys and values of a store carry none."""
    keys: Tensor  # (B, H, M, D)
    values: Tensor  # (B, H, M, D)
    slots: Tensor  # (B, M), -1 where nothing was stored


class Read(NamedTuple):
    """What a notebook gives to some tokens."""
    added: Tensor  # (B, T, C), to be added to h
    slots: Tensor  # (B, H, T, K)
    weights: Tensor  # (B, H, T, K), sum at most 1


class Candidates(NamedTuple):
    """All that a query may find, slots of the store and recent entries side by side: n of them."""
    slots: Tensor  # (B, n)
    valid: Tensor  # (B, n), False for what is empty or was overwritten
    keys: Tensor  # (B, H, n, D)
    values: Tensor  # (B, H, n, D)


def join_traces(traces: list[EDMTrace]) -> EDMTrace:
    """The trace of consecutive segments."""
    gates, write_slots, read_slots, read_weights = zip(*traces, strict=True)
    return EDMTrace(
        write_gate=torch.cat(gates, dim=1),
        write_slots=torch.cat(write_slots, dim=1),
        read_slots=torch.cat(read_slots, dim=2),
        read_weights=torch.cat(read_weights, dim=2),
    )


def empty_notebook(batch: int, heads: int, slots: int, width: int, hidden_size: int,
                   like: Tensor) -> EDMState:
    """The notebook of `batch` rows that have stored nothing, where `like` is."""
    store = like.detach().new_zeros(batch, heads, slots, width)
    empty = torch.full((batch, slots), -1, device=like.device)
    return EDMState(
        keys=store,
        values=store.clone(),
        position=empty,
        token=empty.clone(),
        rank=torch.full(empty.shape, -math.inf, dtype=torch.float64, device=like.device),
        seen=empty.new_zeros(batch),
        last=store.new_zeros(batch, hidden_size),
    )


def newest_entries(shape: torch.Size, recent: list[Entry], device: torch.device) -> Tensor:
    """Which of all recent entries, counted through, each slot holds, (B, N) = shape; -1 an older
    one."""
    newest = torch.full(shape, -1, device=device)
    start = 0
    for entry in recent:
        B, M = entry.slots.shape
        is_none = entry.slots < 0
        place = entry.slots.masked_fill(is_none, shape[1])  # a column that is cut off again
        number = torch.arange(start, start + M, device=device)
        newest = F.pad(newest, (0, 1))
        newest = newest.scatter(1, place, number.expand(B, M))[:, :-1]
        start += M
    return newest


def newest_of(recent: list[Entry], segments: int) -> list[Entry]:
    """The newest entries, as many as keep their graph beside the segment that reads them: one at
    least, since what has just left is read at once."""
    kept = max(1, segments - 1)
    return recent[-kept:]


def put(store: Tensor, rows: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """The store (B, N) with new (n,) at rows (n,) and slots (n,)."""
    store = store.clone()
    store[rows, slots] = new
    return store


def put_wide(store: Tensor, rows: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """As put, of a store (B, H, N, D) and new (n, H, D), without a graph."""
    store = store.clone()
    store[rows, :, slots] = new.detach()
    return store


def valid_softmax(scores: Tensor, valid: Tensor, empty: Tensor | None) -> Tensor:
    """Softmax over the valid ones of the last dimension; 0 where there is none. An empty slot of
    score (..., 1) takes part, and its weight is left out."""
    scores = scores.masked_fill(~valid, -math.inf)
    if empty is not None:
        scores = torch.cat([empty, scores], dim=-1)
        return scores.softmax(-1)[..., 1:]
    nothing = ~valid.any(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)  # a softmax of -inf alone is not a number
    return scores.softmax(-1).masked_fill(nothing, 0.0)


DENSE_SLOTS = 2048  # up to so many slots in use a read is computed as products with all of them


POINT_SLOPE = 5.0  # of the gate of pointing: one number that has far to go in few steps


class EDM(nn.Module):
    """Key-value notebook: h + tanh(alpha) * W_o read, alpha = 0 at first.

    Every head reads the softmax over its K nearest slots by cosine, at a learned temperature; with
    `pointing` an empty slot, which reads as zero, takes part, at a cosine that h asks for. What
    `point` gives then has part in the prediction, through a gate that starts at 0 like alpha.
    `forward` reads and writes by segments, of which the newest `bptt_segments` keep their graph.

    key_of token: a token is found by its own h, which holds what came before it only as far as the
    base's lower layers put that there. previous: by the h of the token before it, so that a query
    finds what followed the last time, as in kNN-LM; departs from the plain notebook.
    """

    def __init__(self, hidden_size: int, heads: int, width: int, slots: int, top_k: int,
                 eviction: Eviction = "fifo", write_every: int = 1, segment: int = 0,
                 bptt_segments: int = 4, key_of: KeyOf = "token",
                 pointing: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.width = width
        self.slots = slots
        self.top_k = top_k
        self.eviction = eviction
        self.write_every = write_every
        self.segment = segment
        self.bptt_segments = bptt_segments
        self.key_of = key_of
        self.pointing = pointing

        self.norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, heads * width)
        self.key = nn.Linear(hidden_size, heads * width)
        self.value = nn.Linear(hidden_size, heads * width)
        self.out = nn.Linear(heads * width, hidden_size, bias=False)
        self.log_strength = nn.Parameter(torch.empty(heads))
        self.alpha = nn.Parameter(torch.empty(()))
        if pointing:
            self.empty = nn.Linear(hidden_size, heads)
            self.point_alpha = nn.Parameter(torch.empty(()))
        self.reset_own()

    def reset_own(self) -> None:
        """Set the initial values that are not PyTorch's."""
        nn.init.constant_(self.log_strength, math.log(16.0))
        nn.init.zeros_(self.alpha)
        if self.pointing:
            nn.init.zeros_(self.empty.weight)
            nn.init.constant_(self.empty.bias, 0.5)
            nn.init.zeros_(self.point_alpha)

    @torch.no_grad()
    def start_from(self, block: nn.Module | None) -> None:
        """Start as the attention of the GPT-2 block that the notebook is read before.

        What that block would have looked for, had it reached so far, is what the notebook finds at
        first. Needs the block's heads and head width; nothing happens where they differ. With
        key_of previous no block is needed: the notebook starts as a nearest-neighbour store.
        """
        if self.key_of == "previous":
            self.start_as_nearest_neighbour()
            return
        C = self.out.out_features
        if self.heads != block.attn.num_heads or self.heads * self.width != C:
            return
        self.norm.load_state_dict(block.ln_1.state_dict())
        weights = block.attn.c_attn.weight.split(C, dim=1)  # three of (C, C)
        biases = block.attn.c_attn.bias.split(C)
        for part, weight, bias in zip((self.query, self.key, self.value), weights, biases,
                                      strict=True):
            part.weight.copy_(weight.T)
            part.bias.copy_(bias)
        self.out.weight.copy_(block.attn.c_proj.weight.T)

    @torch.no_grad()
    def start_as_nearest_neighbour(self) -> None:
        """Project queries and keys alike, and hand on the h that is found as it is."""
        for part in (self.query, self.value):
            nn.init.orthogonal_(part.weight)
            nn.init.zeros_(part.bias)
        self.key.load_state_dict(self.query.state_dict())
        self.out.weight.copy_(self.value.weight.T)

    @property
    def strength(self) -> Tensor:
        """The inverse temperature of each head, (H, 1, 1)."""
        return self.log_strength.exp()[:, None, None]

    def init_state(self, batch: int, slots: int = 0) -> EDMState:
        """The empty notebook of `batch` rows, of so many slots instead of the module's."""
        return empty_notebook(batch, self.heads, slots or self.slots, self.width,
                              self.out.out_features, self.query.weight)

    def split(self, x: Tensor) -> Tensor:
        """Split into heads: (B, T, H * D) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)

    # ── reading ──
    def read(self, h: Tensor, state: EDMState, recent: list[Entry]) -> Read:
        """Read for h (B, T, C); what `recent` has stored is read with its graph."""
        z = self.norm(h)
        query = self.split(self.query(z))  # (B, H, T, D)
        query = F.normalize(query, dim=-1, eps=1e-6)
        empty = None
        if self.pointing:
            cosine = self.empty(z).transpose(1, 2)  # (B, H, T)
            empty = self.strength * cosine.unsqueeze(-1)
        in_use = (state.position >= 0).any(0)  # (N,), by any row
        used = int(in_use.sum())
        if used == 0:
            nothing = h.new_zeros(*query.shape[:3], self.top_k)
            return Read(torch.zeros_like(h), nothing.long(), nothing)

        search = self.read_dense if used <= DENSE_SLOTS else self.read_top
        read, slots, weights = search(query, empty, used, state, recent)
        read = read.transpose(1, 2).flatten(2)  # (B, T, H * D)
        gate = torch.tanh(self.alpha)
        added = gate * self.out(read)
        missing = (0, self.top_k - slots.shape[-1])  # all reads are K wide
        return Read(added, F.pad(slots, missing), F.pad(weights, missing))

    def point(self, slots: Tensor, weights: Tensor, state: EDMState) -> Pointer | None:
        """What reads of slots with weights (B, H, T, K) point to: the tokens there, (B, T, H * K).
        None without pointing."""
        if not self.pointing:
            return None
        slots = slots.transpose(1, 2).flatten(2)  # (B, T, H * K)
        token = state.token.unsqueeze(1)
        token = token.expand(-1, slots.shape[1], -1)  # (B, T, N)
        weights = weights.transpose(1, 2).flatten(2)
        gate = open_from_zero(POINT_SLOPE * self.point_alpha) / self.heads
        return Pointer(token.gather(2, slots).clamp_min(0), gate * weights)

    def read_top(self, query: Tensor, empty: Tensor | None, used: int, state: EDMState,
                 recent: list[Entry]) -> tuple[Tensor, Tensor, Tensor]:
        """query (B, H, T, D), score of the empty slot (B, H, T, 1) -> read (B, H, T, D), slots and
        weights (B, H, T, K).

        The nearest slots are found without a graph; the scores of those K are computed again with
        one, from `recent` where that is where they were written: for stores too large to have a
        graph.
        """
        B, H, T, _ = query.shape
        K = min(self.top_k, used)
        with torch.no_grad():
            keys = state.keys[:, :, :used]
            is_free = state.position[:, None, None, :used] < 0
            scores = query @ keys.transpose(2, 3)  # (B, H, T, used)
            scores = scores.masked_fill(is_free, -math.inf)
            slots = scores.topk(K, dim=-1).indices  # (B, H, T, K)

        keys, values = self.gather(slots, state, recent)  # (B, H, T, K, D)
        scores = self.strength * torch.einsum("bhtd,bhtkd->bhtk", query, keys)
        position = state.position[:, None, None]
        position = position.expand(B, H, T, -1)
        position = position.gather(3, slots)  # (B, H, T, K)
        weights = valid_softmax(scores, position >= 0, empty)
        read = torch.einsum("bhtk,bhtkd->bhtd", weights, values)
        return read, slots, weights

    def gather(self, slots: Tensor, state: EDMState, recent: list[Entry]) -> tuple[Tensor, Tensor]:
        """Keys and values of slots (B, H, T, K), both (B, H, T, K, D)."""
        B, H, T, K = slots.shape
        slots = slots.reshape(B, H, T * K)
        index = self.as_index(slots)
        keys = state.keys.gather(2, index)  # (B, H, T * K, D)
        values = state.values.gather(2, index)

        if recent:
            shape = state.position.shape
            newest = newest_entries(shape, recent, slots.device)  # (B, N)
            newest = newest.unsqueeze(1)
            newest = newest.expand(-1, H, -1)
            number = newest.gather(2, slots)  # (B, H, T * K)
            is_recent = number.unsqueeze(-1) >= 0
            index = self.as_index(number.clamp_min(0))
            recent_keys = torch.cat([entry.keys for entry in recent], dim=2)
            recent_keys = recent_keys.gather(2, index)
            recent_values = torch.cat([entry.values for entry in recent], dim=2)
            recent_values = recent_values.gather(2, index)
            keys = torch.where(is_recent, recent_keys, keys)
            values = torch.where(is_recent, recent_values, values)

        shape = (B, H, T, K, self.width)
        return keys.view(shape), values.view(shape)

    def as_index(self, slots: Tensor) -> Tensor:
        """Repeat slots (B, H, n) for each number of a key: (B, H, n, D)."""
        return slots.unsqueeze(-1).expand(-1, -1, -1, self.width)

    def read_dense(self, query: Tensor, empty: Tensor | None, used: int, state: EDMState,
                   recent: list[Entry]) -> tuple[Tensor, Tensor, Tensor]:
        """As read_top, by products with every slot: faster where they are few."""
        B, H, T, _ = query.shape
        K = min(self.top_k, used)
        slots, valid, keys, values = self.candidates(used, state, recent)

        valid = valid[:, None, None]  # (B, 1, 1, n)
        scores = self.strength * (query @ keys.transpose(2, 3))  # (B, H, T, n)
        scores = scores.masked_fill(~valid, -math.inf)
        best = scores.detach().topk(K, dim=-1).indices  # (B, H, T, K)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen = chosen.scatter(3, best, True)
        weights = valid_softmax(scores, chosen & valid, empty)  # (B, H, T, n)

        slots = slots[:, None, None]
        slots = slots.expand(B, H, T, -1)
        read = weights @ values  # (B, H, T, D)
        return read, slots.gather(3, best), weights.gather(3, best)

    def candidates(self, used: int, state: EDMState, recent: list[Entry]) -> Candidates:
        """The slots in use, and the recent entries with their graph in place of their slots."""
        device = state.position.device
        shape = state.position.shape
        newest = newest_entries(shape, recent, device)
        newest = newest[:, :used]  # (B, used)
        in_use = state.position[:, :used] >= 0
        slots = [torch.arange(used, device=device).expand(len(newest), -1)]
        valid = [in_use & (newest < 0)]
        keys = [state.keys[:, :, :used]]
        values = [state.values[:, :, :used]]

        start = 0
        for entry in recent:
            number = start + torch.arange(entry.slots.shape[1], device=device)  # (M,)
            start += len(number)
            place = entry.slots.clamp(0, used - 1)
            # It counts where it is what its slot was written with last, unless emptied since.
            is_last = newest.gather(1, place) == number
            is_last = is_last & in_use.gather(1, place)
            is_stored = (entry.slots >= 0) & (entry.slots < used)
            slots.append(place)
            valid.append(is_stored & is_last)
            keys.append(entry.keys)
            values.append(entry.values)
        return Candidates(
            slots=torch.cat(slots, dim=1),
            valid=torch.cat(valid, dim=1),
            keys=torch.cat(keys, dim=2),
            values=torch.cat(values, dim=2),
        )

    # ── writing ──
    def write(self, h: Tensor, token: Tensor, position: Tensor,
              keep: Tensor, state: EDMState) -> tuple[EDMState, Entry]:
        """Store h (B, M, C) of tokens and positions (B, M) where keep (B, M) -> state, entry.

        Empty slots are taken first, then those of the lowest rank; M is at most N.
        """
        keys, values = self.keys_and_values(h, state)
        order = state.rank.argsort(dim=1, stable=True)  # (B, N), the first is evicted first
        turn = keep.cumsum(1) - 1  # (B, M)
        place = order.gather(1, turn.clamp_min(0))  # (B, M), slots to be written
        rank = position.to(state.rank.dtype)
        if self.eviction == "usage":  # one read above what it replaces, else the newest goes first
            rank = state.rank.gather(1, place).clamp_min(0) + 1


        rows, columns = keep.nonzero(as_tuple=True)
        slots = place[rows, columns]
        state = EDMState(
            keys=put_wide(state.keys, rows, slots, keys[rows, :, columns]),
            values=put_wide(state.values, rows, slots, values[rows, :, columns]),
            position=put(state.position, rows, slots, position[rows, columns]),
            token=put(state.token, rows, slots, token[rows, columns]),
            rank=put(state.rank, rows, slots, rank[rows, columns]),
            seen=position[:, -1] + 1,
            last=h[:, -1].detach(),
        )
        return state, Entry(keys, values, place.masked_fill(~keep, -1))

    def keys_and_values(self, h: Tensor, state: EDMState
                        ) -> tuple[Tensor, Tensor]:
        """What is stored of h (B, M, C): keys of norm one and values, both (B, H, M, D)."""
        z = self.norm(h)
        found_by = z
        if self.key_of == "previous":
            before = torch.cat([state.last.unsqueeze(1), h[:, :-1]], dim=1)  # (B, M, C)
            found_by = self.norm(before)
        keys = self.split(self.key(found_by))
        keys = F.normalize(keys, dim=-1, eps=1e-6)
        return keys, self.split(self.value(z))

    def touch(self, slots: Tensor, weights: Tensor, position: Tensor,
              state: EDMState) -> EDMState:
        """The state after tokens at position (B, T) have read slots with weights (B, H, T, K): what
        was read ranks higher."""
        if self.eviction == "fifo":
            return state
        index = slots.transpose(1, 2).flatten(1)  # (B, T * H * K)
        weights = weights.detach().to(state.rank.dtype)
        weights = weights.transpose(1, 2).flatten(1)
        if self.eviction == "usage":
            rank = state.rank.scatter_add(1, index, weights)
            return state._replace(rank=rank)

        reads = index.shape[1] // position.shape[1]  # of one token
        when = position.to(state.rank.dtype)
        when = when.repeat_interleave(reads, 1)  # (B, T * H * K)
        when = when.masked_fill(weights <= 0, -math.inf)
        rank = state.rank.scatter_reduce(1, index, when, "amax")
        return state._replace(rank=rank)

    def forward(self, h: Tensor, state: EDMState) -> tuple[Tensor, EDMState, EDMTrace]:
        """h (B, T, C) -> h_out (B, T, C), state, trace.

        Each segment (the whole, if `segment` is 0) reads what was stored before it, then is stored
        itself; a shorter last one too.
        """
        outputs, traces, recent = [], [], []
        segment = self.segment or max(1, h.shape[1])
        for x in h.split(segment, dim=1):
            steps = torch.arange(x.shape[1], device=x.device)
            position = state.seen.unsqueeze(1) + steps  # (B, T)
            read = self.read(x, state, recent)
            state = self.touch(read.slots, read.weights, position, state)

            keep = position % self.write_every == 0
            token = torch.zeros_like(position)  # not known here
            state, entry = self.write(x, token, position, keep, state)
            if torch.is_grad_enabled():
                recent = newest_of([*recent, entry], self.bptt_segments)

            outputs.append(x + read.added)
            traces.append(EDMTrace(
                write_gate=keep.to(x.dtype),
                write_slots=entry.slots,
                read_slots=read.slots,
                read_weights=read.weights,
            ))
        return torch.cat(outputs, dim=1), state, join_traces(traces)


# ══ A rolling summary ════════════════════════════════════════════════════════════════════════════
class RecurrentMemory(nn.Module):
    """Rolling summary: a GRU over the means of the segments that have left the window, added
    through tanh(alpha), alpha = 0 at first."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.cell = nn.GRUCell(hidden_size, width)
        self.out = nn.Linear(width, hidden_size, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))

    def reset_own(self) -> None:
        """Set the initial value of what is in no module of PyTorch's."""
        nn.init.zeros_(self.alpha)

    def init_state(self, batch: int) -> Tensor:
        """The summary (B, R) of rows that have read nothing."""
        return self.out.weight.new_zeros(batch, self.cell.hidden_size).detach()

    def forward(self, h: Tensor, visible: Tensor, state: Tensor) -> Tensor:
        """Add the summary (B, R) to h (B, T, C) where visible (B, T) -> (B, T, C)."""
        gate = torch.tanh(self.alpha)
        added = gate * self.out(state).unsqueeze(1)  # (B, 1, C)
        return h + added * visible.unsqueeze(2)

    def update(self, h: Tensor, keep: Tensor, state: Tensor) -> Tensor:
        """The summary (B, R) after h (B, M, C) of the tokens in keep (B, M), if any."""
        weights = keep.to(h.dtype)
        total = (h * weights.unsqueeze(2)).sum(1)  # (B, C)
        mean = total / weights.sum(1, keepdim=True).clamp_min(1)
        updated = self.cell(self.norm(mean), state)
        return torch.where(keep.any(1, keepdim=True), updated, state)


# ══ Configuration and state ══════════════════════════════════════════════════════════════════════
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma")  # kinds of base that RotaryDecoder runs
# What transformers builds of a configuration without any field.
TINY_ROTARY = {"model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64,
               "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}


class EDMConfig(PretrainedConfig):
    """The configuration of a base of Llama's family, and the memory's fields. Loads without this
    repository."""
    model_type = "edm"

    def __init__(self, base: dict | None = None, window: int = 0, stride: int = 0,
                 read_layer: int = -1, edm: bool = True, early: bool = True, late: bool = True,
                 edm_heads: int = 0, key_width: int = 0,
                 slots: int = 8192,
                 read_top_k: int = 32,
                 eviction: Eviction = "fifo",
                 write_every: int = 1,
                 recurrent_width: int = 128,
                 bptt_segments: int = 4,
                 key_of: KeyOf = "token",
                 pointing: bool = False,
                 document_end: int = -1,
                 lora: dict | None = None,
                 quantize: bool = False,
                 **kwargs) -> None:
        # The embedding is the head: one parameter, not two that are tied.
        super().__init__(**{"tie_word_embeddings": False} | kwargs)
        self.base = base or self.tiny_base()
        decoder = self.of_base()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(decoder, name))

        self.window = window or decoder.max_position_embeddings
        self.stride = stride or max(1, self.window // 2)  # tokens that leave a full window
        self.document_end = document_end  # behind this token memory starts anew, -1 = none

        self.edm = edm
        self.read_layer = self.num_hidden_layers // 2 if read_layer == -1 else read_layer
        self.edm_heads = edm_heads or self.num_attention_heads
        # All heads together are as wide as h, whatever width the base's own heads have.
        self.key_width = key_width or self.hidden_size // self.num_attention_heads
        self.slots = slots
        self.read_top_k = read_top_k
        self.eviction = eviction
        self.write_every = write_every
        self.key_of = key_of
        self.pointing = pointing
        self.bptt_segments = bptt_segments

        self.early = early
        self.late = late
        self.recurrent_width = recurrent_width

        self.lora = lora
        self.quantize = quantize

    @staticmethod
    def tiny_base() -> dict:
        """The base of a configuration without any field."""
        return LlamaConfig(**TINY_ROTARY).to_dict()

    def of_base(self) -> PretrainedConfig:
        """The configuration of the base. Raises ValueError for a kind of base that is not run."""
        kind = self.base.get("model_type")
        if kind not in ROTARY:
            raise ValueError(f"base: model_type = {kind!r}: must be one of {', '.join(ROTARY)}")
        return AutoConfig.for_model(**self.base)

    def check_base(self) -> None:
        """Raise ValueError where the base attends otherwise than the window does."""
        base = self.of_base()
        sliding = getattr(base, "sliding_window", None) or self.window
        self.require("window", self.window <= sliding,
                     f"at most the {sliding} tokens that a layer of the base attends to")
        rope = base.rope_parameters
        longest = rope.get("original_max_position_embeddings", self.window)
        self.require("window", rope["rope_type"] != "longrope" or self.window <= longest,
                     f"at most {longest}: in longer texts longrope turns every key anew")
        if getattr(base, "use_bidirectional_attention", None):
            raise ValueError("base: use_bidirectional_attention = True: must be False, a decoder")
        if getattr(base, "quantization_config", None):
            raise ValueError("base: quantization_config: must be none, plain weights; --qlora True "
                             "has them in 4 bits")

    def require(self, name: str, holds: bool, requirement: str) -> None:
        """Raise ValueError, naming field, value and requirement, unless the condition holds."""
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)!r}: must be {requirement}")

    def check(self) -> None:
        """Raise ValueError with field, value and requirement where a field does not fit."""
        for name in ("edm_heads", "key_width", "write_every", "recurrent_width", "bptt_segments"):
            self.require(name, getattr(self, name) >= 1, "1 or more")
        for name, choices in (("eviction", EVICTION), ("key_of", KEY_OF)):
            self.require(name, getattr(self, name) in choices, "one of " + ", ".join(choices))
        self.require("pointing", self.key_of == "previous" or not self.pointing,
                     f"False with key_of {self.key_of}: only key_of previous finds what followed")
        positions = self.of_base().max_position_embeddings
        last_layer = self.num_hidden_layers - 1
        self.require("window", 1 <= self.window <= positions,
                     f"from 1 to the base's positions ({positions})")
        self.require("stride", 1 <= self.stride <= self.window,
                     f"from 1 to window ({self.window})")
        self.require("read_layer", 0 <= self.read_layer <= last_layer,
                     f"from 0 to {last_layer}, the base's last layer")
        self.require("slots", self.window <= self.slots <= MOST_SLOTS,
                     f"from window ({self.window}) to {MOST_SLOTS}, as far as exact search goes")
        self.require("read_top_k", 1 <= self.read_top_k <= self.slots,
                     f"from 1 to slots ({self.slots})")
        self.require("document_end", -1 <= self.document_end < self.vocab_size,
                     f"-1 (none), or below the {self.vocab_size} tokens of the base")
        self.check_base()


class EDMGPT2Config(EDMConfig):
    """As EDMConfig, of a GPT-2."""
    model_type = "edm_gpt2"

    def __init__(self, **fields) -> None:  # without it transformers would write one of its own
        super().__init__(**fields)

    @staticmethod
    def tiny_base() -> dict:
        """As EDMConfig's."""
        return GPT2Config(**TINY_BASE).to_dict()

    def of_base(self) -> GPT2Config:
        """The configuration of the base."""
        return GPT2Config(**self.base)

    def check_base(self) -> None:
        """Every GPT-2 attends to all of its window."""


class EDMGPT2State(NamedTuple):
    """Everything that a row remembers. Index W of the buffers is for what is masked."""
    memory: EDMState
    early: Tensor  # (B, R)
    late: Tensor  # (B, R)
    tokens: Tensor  # (B, W + 1) in the window
    hidden: Tensor  # (B, W + 1, C) before the read, as when they were first encoded
    final: Tensor  # (B, W + 1, C) the base's output, likewise
    kv: Tensor  # (B, layers, 2, heads, W + 1, d) of attention
    fill: Tensor  # (B,) tokens in the window
    start: Tensor  # (B,) place of the window's first token in its row


class Chunk(NamedTuple):
    """The tokens of one pass, and where in the window they go."""
    place: Tensor  # (B, m), W for what is masked
    real: Tensor  # (B, m), False for what is masked
    visible: Tensor  # (B, m) whether they may read memory
    window: Tensor  # (B, W + 1) the tokens of the window with them
    fill: Tensor  # (B,) how many those are
    mask: Tensor | None  # (B, 1, m, W + 1) what attention sees; None where the chunk alone is all
    keeps_kv: bool  # False for a window that came whole: it is not attended to again


class Outputs(NamedTuple):
    """What the base makes of a chunk."""
    before: Tensor  # (B, m, C) before the notebook is read
    final: Tensor  # (B, m, C)
    kv: list[Tensor]  # of each layer (B, 2, heads, W + 1, d); empty where it is not needed
    slots: Tensor | None  # (B, H, m, K) that were read, None without a notebook
    weights: Tensor | None  # (B, H, m, K), 0 where no memory may be read
    pointer: Pointer | None  # of (B, m, H * K) weights


class Pass(NamedTuple):
    """What the tokens of one pass have read."""
    place: Tensor  # (B, m) among the tokens of the call; behind them what is masked
    slots: Tensor | None  # (B, H, m, K)
    weights: Tensor | None  # (B, H, m, K)
    pointer: Pointer | None = None  # of (B, m, H * K) weights


def pointer_of(passes: list[Pass], T: int) -> Pointer | None:
    """What the T tokens of a call point to, of (B, T, H * K) weights; None where nothing does."""
    if not passes or passes[0].pointer is None:
        return None

    places = [seen.place for seen in passes]
    tokens, weights = zip(*(seen.pointer for seen in passes), strict=True)
    return Pointer(join_passes(tokens, places, T), join_passes(weights, places, T))


# ══ What the decoders differ in ══════════════════════════════════════════════════════════════════
class GPT2Decoder:
    """How a GPT2Model is run, block by block: learned places, LayerNorm, fused projections."""
    projection = Conv1D  # its weights are stored transposed, (in, out)

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.embedding = base.wte

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks in order."""
        return self.base.h

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Heads of keys and values, and their width d."""
        base = self.base.config
        return base.n_head, base.n_embd // base.n_head

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens and their places, both (B, m) -> h (B, m, C)."""
        return self.base.wte(tokens) + self.base.wpe(positions)

    def arguments(self, h: Tensor, positions: Tensor, mask: Tensor | None) -> dict:
        """What every block is called with besides, in a pass over h (B, m, C)."""
        return {}

    def run(self, layer: int, h: Tensor, chunk: Chunk, kv: Tensor | None, arguments: dict
            ) -> tuple[Tensor, Tensor | None]:
        """One block over h (B, m, C) of a chunk -> h, kv (B, 2, heads, W + 1, d) with those of h.
        kv None: the window is not attended to again."""
        return run_block(self.base.h[layer], h, chunk.place, chunk.mask, kv)

    def final(self, h: Tensor) -> Tensor:
        """h (B, m, C) behind the last norm."""
        return self.base.ln_f(h)

    def start(self, edm: EDM, layer: int) -> None:
        """Give the notebook that is read before a block its first weights."""
        edm.start_from(self.base.h[layer])


class RotaryDecoder:
    """How a decoder of Llama's family is run: each layer by transformers' own code, which rotates
    queries and keys by their places, groups heads, and normalises by the RMS."""
    projection = nn.Linear

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.embedding = base.embed_tokens

    @property
    def layers(self) -> nn.ModuleList:
        """The layers in order."""
        return self.base.layers

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Heads of keys and values, fewer than those of queries, and their width d."""
        return self.base.config.num_key_value_heads, self.base.layers[0].self_attn.head_dim

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens (B, m) -> h (B, m, C); scaled where the base scales it."""
        return self.base.embed_tokens(tokens)

    def arguments(self, h: Tensor, positions: Tensor, mask: Tensor | None) -> dict:
        """As GPT2Decoder's; mask (B, 1, m, W + 1) or None as in Chunk."""
        return {
            "attention_mask": self.seen(h, mask),
            "position_ids": positions,
            "position_embeddings": self.base.rotary_emb(h, positions),  # two of (B, m, d)
        }

    def seen(self, h: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask (B, 1, m, W + 1) in the form that the base's attention takes."""
        kind = self.base.config._attn_implementation
        if kind == "sdpa":
            return mask  # None: each token sees those before it
        if kind != "eager":
            raise ValueError(f"attn_implementation = {kind!r}: must be sdpa or eager")
        if mask is None:
            m = h.shape[1]
            mask = torch.ones(1, 1, m, m, dtype=torch.bool, device=h.device).tril()
        hidden = torch.zeros(mask.shape, dtype=h.dtype, device=h.device)
        return hidden.masked_fill(~mask, torch.finfo(h.dtype).min)  # added to the scores

    def run(self, layer: int, h: Tensor, chunk: Chunk, kv: Tensor | None, arguments: dict
            ) -> tuple[Tensor, Tensor | None]:
        """As GPT2Decoder's."""
        cache = WindowCache(chunk.place, kv, is_alone=chunk.mask is None)
        h = self.base.layers[layer](h, **arguments, **{CACHE: cache})
        return h, cache.kv

    def final(self, h: Tensor) -> Tensor:
        """h (B, m, C) behind the last norm."""
        return self.base.norm(h)

    def start(self, edm: EDM, layer: int) -> None:
        """The notebook starts as a nearest-neighbour store whatever key_of is: attention that
        rotates by places and groups heads is no cosine.

        Its norm starts as a LayerNorm of ones, not with the weights of the layer's own norm: those
        tell tokens apart less well (SmolLM2-135M, docs/edm.md).
        """
        edm.start_as_nearest_neighbour()


class WindowCache:
    """What a layer of transformers takes for its cache: keys and values (B, 2, heads, W + 1, d) of
    a window, None where it is not attended to again."""

    def __init__(self, place: Tensor, kv: Tensor | None, is_alone: bool) -> None:
        self.place = place
        self.kv = kv
        self.is_alone = is_alone

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object
               ) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, heads, m, d) at place (B, m) -> what is attended to."""
        if self.kv is None:
            return keys, values
        new = torch.stack([keys, values], dim=1)  # (B, 2, heads, m, d)
        index = self.place[:, None, None, :, None].expand_as(new)
        self.kv = self.kv.scatter(3, index, new)
        if self.is_alone:
            return keys, values
        return self.kv[:, 0], self.kv[:, 1]


def decoder_of(base: nn.Module) -> GPT2Decoder | RotaryDecoder:
    """How a base is run."""
    return RotaryDecoder(base) if hasattr(base, "embed_tokens") else GPT2Decoder(base)


def head_weight(model: "EDMForCausalLM") -> Tensor:
    """The base's head (V, C): its own, or the embedding where they are tied."""
    head = getattr(model, "lm_head", None)
    return decoder_of(model.transformer).embedding.weight if head is None else head.weight


# ══ Adapters, four bits ══════════════════════════════════════════════════════════════════════════
def import_optional(package: str, field: str) -> ModuleType:
    """Import a package that only some runs need. Raises ValueError naming what to install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{field}: needs {package}; run: pip install {package}") from None


def add_lora(transformer: nn.Module, settings: dict) -> None:
    """Put peft's LoRA adapters on the base's projections, in place.

    settings: r, lora_alpha, lora_dropout, target_modules, fan_in_fan_out. Raises ValueError for a
    target that does not exist.
    """
    peft = import_optional("peft", "lora")
    names = {name.split(".")[-1] for name, module in transformer.named_modules()
             if isinstance(module, (nn.Linear, Conv1D))}
    for target in settings["target_modules"]:
        if target not in names:
            raise ValueError(f"lora_targets = {target!r}: must be projections of the base, of "
                             + ", ".join(sorted(names)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that Conv1D is stored transposed, and is right
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), transformer)


def projections(transformer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of every projection of the base, those inside LoRA layers too."""
    for block in decoder_of(transformer).layers:
        for parent in block.modules():
            if isinstance(parent, nn.ModuleDict):
                continue  # the adapters' own
            for name, layer in parent.named_children():
                if isinstance(layer, (Conv1D, nn.Linear)):
                    yield parent, name


def by_outputs(weight: Tensor, projection: type[nn.Module]) -> Tensor:
    """The weight (in, out) of a Conv1D as (out, in), or the other way round; a Linear's as it is.
    """
    return weight.T.contiguous() if projection is Conv1D else weight


def quantize(transformer: nn.Module) -> None:
    """Turn the projections into bitsandbytes' 4-bit NF4 layers, in place. Raises ValueError for a
    width that is no multiple of 64, a block of NF4: bitsandbytes takes wrong scales there."""
    bnb = import_optional("bitsandbytes", "qlora")
    kind = decoder_of(transformer).projection
    found = list(projections(transformer))
    for parent, name in found:
        inputs = by_outputs(getattr(parent, name).weight, kind).shape[1]
        if inputs % 64:
            raise ValueError(f"qlora: {name} of the base is {inputs} wide: must be a multiple of "
                             f"64, a block of NF4, not {inputs % 64} over; use --lora alone")
    for parent, name in found:
        plain = getattr(parent, name)
        weight = by_outputs(plain.weight.data, kind)  # (out, in)
        outputs, inputs = weight.shape
        linear = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=torch.float32, quant_type="nf4")
        linear.weight = bnb.nn.Params4bit(weight, requires_grad=False,
                                          compress_statistics=False, quant_type="nf4")
        linear.bias = plain.bias
        linear.support_avx512bf16_for_cpu = False  # its packing rounds, for good
        setattr(parent, name, linear.to(plain.weight.device))  # which quantizes


def dequantize(transformer: nn.Module) -> None:
    """Turn 4-bit layers back into the layers of plain weights that they stand for, in place."""
    bnb = import_optional("bitsandbytes", "qlora")
    kind = decoder_of(transformer).projection
    for parent, name in list(projections(transformer)):
        linear = getattr(parent, name)
        sizes = (linear.in_features, linear.out_features)
        plain = kind(*reversed(sizes)) if kind is Conv1D else kind(*sizes)
        weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        plain.weight.data = by_outputs(weight, kind).float()
        plain.bias = linear.bias
        plain.requires_grad_(False)
        setattr(parent, name, plain)


# ══ Model ════════════════════════════════════════════════════════════════════════════════════════
class EDMForCausalLM(StatefulCausalLM, GenerationMixin):  # a direct base, as of the DNC's class
    """tokens, embeddings, early memory, base up to read_layer, notebook, base, late memory, head.

    When the window is full its first `stride` tokens leave it, into the memories, and the rest is
    encoded again from position 0: the state of a row is a function of its tokens alone, however
    they are cut into calls. What a token stores is its hidden state when it was first encoded.
    """
    config_class = EDMConfig
    base_model_prefix = "transformer"

    def __init__(self, config: EDMConfig) -> None:
        super().__init__(config)
        config.check()
        C = config.hidden_size
        base = config.of_base()
        # The base's own dtype is what its folder has it in.
        self.transformer = AutoModel.from_config(
            base, dtype=torch.get_default_dtype(),
            attn_implementation=self.config._attn_implementation)
        self.lm_head = None
        if not base.tie_word_embeddings:
            self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.edm = None
        self.early = None
        self.late = None
        if config.edm:
            self.edm = EDM(C, config.edm_heads, config.key_width, config.slots, config.read_top_k,
                           eviction=config.eviction, write_every=config.write_every,
                           key_of=config.key_of, pointing=config.pointing)
        if config.early:
            self.early = RecurrentMemory(C, config.recurrent_width)
        if config.late:
            self.late = RecurrentMemory(C, config.recurrent_width)
        if config.lora:
            add_lora(self.transformer, config.lora)
        self.freeze()
        self.post_init()

    @property
    def decoder(self) -> GPT2Decoder | RotaryDecoder:
        """How the base is run."""
        return decoder_of(self.transformer)

    def freeze(self) -> None:
        """Let only memories and adapters be trained."""
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_("lora_" in name)
        if self.lm_head is not None:
            self.lm_head.requires_grad_(False)

    def train(self, mode: bool = True) -> "EDMForCausalLM":
        """As nn.Module's, but the base stays as it is evaluated: frozen, no dropout but LoRA's."""
        super().train(mode)
        for name, module in self.transformer.named_modules():
            if not name.endswith("lora_dropout.default"):
                module.training = False
        return self

    @classmethod
    def from_pretrained(cls, *args: object, **kwargs: object) -> "EDMForCausalLM":
        """As PreTrainedModel's; a base that was in 4 bits is so again."""
        result = super().from_pretrained(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result  # with output_loading_info
        if model.config.quantize:
            quantize(model.transformer)
        model.freeze()
        return result

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
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
        for name, module in list(self.transformer.named_modules()):
            if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                module.merge()
                parent, _, last = name.rpartition(".")
                setattr(self.transformer.get_submodule(parent), last, module.base_layer)
        self.config.lora = None
        self.freeze()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as PyTorch does what a file does not hold."""
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding, nn.GRUCell)):
            module.reset_parameters()
        elif isinstance(module, (EDM, RecurrentMemory)):
            module.reset_own()

    # ── state ──
    def init_state(self, batch: int) -> EDMGPT2State:
        """The state of `batch` rows that have read nothing."""
        W = self.config.window
        heads, width = self.decoder.kv_shape
        like = self.decoder.embedding.weight.detach()
        hidden = like.new_zeros(batch, W + 1, self.config.hidden_size)
        fill = torch.zeros(batch, dtype=torch.long, device=like.device)
        if self.edm is None:
            memory = empty_notebook(batch, heads=1, slots=1, width=1, hidden_size=1, like=like)
        else:
            memory = self.edm.init_state(batch)
        nothing = like.new_zeros(batch, 0)
        return EDMGPT2State(
            memory=memory,
            early=nothing if self.early is None else self.early.init_state(batch),
            late=nothing if self.late is None else self.late.init_state(batch),
            tokens=fill.new_zeros(batch, W + 1),
            hidden=hidden,
            final=hidden.clone(),
            kv=like.new_zeros(batch, self.config.num_hidden_layers, 2, heads, W + 1, width),
            fill=fill,
            start=fill.clone(),
        )

    def reset_memory(self, state: EDMGPT2State, rows: Tensor | None = None) -> EDMGPT2State:
        """The state with these rows (B,) bool, or all, as if nothing had been read."""
        if rows is None:
            rows = torch.ones_like(state.fill, dtype=torch.bool)
        index = rows.nonzero().squeeze(1).to(state.fill.device)
        return put_rows(index, self.init_state(len(index)), state)

    # ── one pass over tokens that fit the window ──
    def encode(self, tokens: Tensor, take: Tensor, state: EDMGPT2State,
               recent: list[Entry], first: bool, read_only: bool = False
               ) -> tuple[Tensor, EDMGPT2State, Outputs]:
        """Put the next take (B,) of tokens (B, m) in the window -> out (B, m, C), state, outputs.

        first: they are new, not encoded again.
        """
        chunk = self.place(tokens, take, state)
        outputs = self.run_base(tokens, chunk, state, recent)
        out = outputs.final
        if self.late is not None:
            out = self.late(out, chunk.visible, state.late)
        state = state._replace(tokens=chunk.window, fill=chunk.fill)
        if outputs.kv:
            state = state._replace(kv=torch.stack(outputs.kv, dim=1))
        if first:
            state = self.note(chunk, outputs, state, read_only)
        return out, state, outputs

    def place(self, tokens: Tensor, take: Tensor, state: EDMGPT2State) -> Chunk:
        """Where in the window the next take (B,) of tokens (B, m) go."""
        W, m = self.config.window, tokens.shape[1]
        steps = torch.arange(m, device=tokens.device)
        real = steps < take.unsqueeze(1)  # (B, m)
        place = state.fill.unsqueeze(1) + steps
        place = place.masked_fill(~real, W).clamp_max(W)  # (B, m)
        window = state.tokens.scatter(1, place, tokens)
        fill = state.fill + take
        columns = torch.arange(W + 1, device=tokens.device)
        is_alone = bool((state.fill == 0).all() and (take == m).all())
        return Chunk(
            place=place,
            real=real,
            visible=self.may_read(window, fill).gather(1, place),
            window=window,
            fill=fill,
            mask=None if is_alone else (columns <= place.unsqueeze(2)).unsqueeze(1),
            keeps_kv=not (is_alone and m == W),
        )

    def may_read(self, window: Tensor, fill: Tensor) -> Tensor:
        """Whether a token of a window (B, W + 1) may read memory, (B, W + 1): not behind a
        document's end in its window."""
        if self.config.document_end < 0:
            return torch.ones_like(window, dtype=torch.bool)
        columns = torch.arange(window.shape[1], device=window.device)
        is_inside = columns < fill.unsqueeze(1)
        is_end = (window == self.config.document_end) & is_inside
        return is_end.cumsum(1) == 0

    def run_base(self, tokens: Tensor, chunk: Chunk, state: EDMGPT2State,
                 recent: list[Entry]) -> Outputs:
        """Run the base over tokens (B, m), with early memory and notebook."""
        W = self.config.window
        decoder = self.decoder
        positions = chunk.place.clamp_max(W - 1)
        h = decoder.embed(tokens, positions)  # (B, m, C)
        if self.early is not None:
            h = self.early(h, chunk.visible, state.early)

        arguments = decoder.arguments(h, positions, chunk.mask)
        before, slots, weights, pointer, kv = h, None, None, None, []
        for layer in range(len(decoder.layers)):
            if layer == self.config.read_layer:
                before = h
                if self.edm is not None:
                    added, slots, weights = self.edm.read(h, state.memory, recent)
                    h = h + added * chunk.visible.unsqueeze(2)
                    weights = weights * chunk.visible[:, None, :, None]
                    pointer = self.edm.point(slots, weights, state.memory)
            old = state.kv[:, layer] if chunk.keeps_kv else None
            h, new = decoder.run(layer, h, chunk, old, arguments)
            if new is not None:
                kv.append(new)
        return Outputs(before, decoder.final(h), kv, slots, weights, pointer)

    def note(self, chunk: Chunk, outputs: Outputs, state: EDMGPT2State, read_only: bool
             ) -> EDMGPT2State:
        """The state with what new tokens will store when they leave, and with what they read
        touched."""
        index = chunk.place.unsqueeze(2).expand_as(outputs.before)
        state = state._replace(hidden=state.hidden.scatter(1, index, outputs.before),
                               final=state.final.scatter(1, index, outputs.final))
        if self.edm is None or read_only:
            return state
        counts = chunk.real & chunk.visible  # (B, m)
        weights = outputs.weights * counts[:, None, :, None]
        position = state.start.unsqueeze(1) + chunk.place
        memory = self.edm.touch(outputs.slots, weights, position, state.memory)
        return state._replace(memory=memory)

    # ── a full window gives its first tokens away ──
    def leave(self, state: EDMGPT2State, recent: list[Entry], read_only: bool
              ) -> tuple[EDMGPT2State, Entry | None]:
        """The full windows of all rows give their first `stride` tokens to the memories; what stays
        is encoded again -> state, what was stored or None."""
        S, W = self.config.stride, self.config.window
        entry = None
        if not read_only:
            state, entry = self.store(state)
        state = self.shift(state)

        if W > S:
            if entry is not None:
                recent = newest_of([*recent, entry], self.config.bptt_segments)
            tokens = state.tokens[:, : W - S]
            stay = torch.full_like(state.fill, W - S)
            _, state, _ = self.encode(tokens, stay, state, recent, first=False)
        return state, entry

    def shift(self, state: EDMGPT2State) -> EDMGPT2State:
        """The state whose windows start `stride` tokens later, and are to be encoded again."""
        S, W = self.config.stride, self.config.window

        def to_front(x: Tensor) -> Tensor:
            """Move what stays, of a buffer (B, W + 1, ...), to the front."""
            leaving, rest = x[:, :S], x[:, W:]
            return torch.cat([x[:, S:W], leaving, rest], dim=1)

        return state._replace(
            tokens=to_front(state.tokens),
            hidden=to_front(state.hidden),
            final=to_front(state.final),
            fill=torch.zeros_like(state.fill),
            start=state.start + S,
        )

    def store(self, state: EDMGPT2State) -> tuple[EDMGPT2State, Entry | None]:
        """Store the first `stride` tokens of the windows in the memories, but nothing of a document
        that has ended -> state, what the notebook has stored or None."""
        S = self.config.stride
        tokens = state.tokens[:, :S]  # (B, S)
        ended = tokens == self.config.document_end
        ends_ahead = ended.flip(1).cumsum(1).flip(1)  # (B, S), from each token on
        keep = ends_ahead == 0
        if bool(ended.any()):
            fresh = self.reset_memory(state, ended.any(1))
            state = state._replace(memory=fresh.memory, early=fresh.early, late=fresh.late)

        entry = None
        if self.edm is not None:
            steps = torch.arange(S, device=tokens.device)
            position = state.start.unsqueeze(1) + steps  # (B, S)
            is_due = position % self.config.write_every == 0
            hidden = state.hidden[:, :S]
            memory, entry = self.edm.write(hidden, tokens, position, keep & is_due,
                                           state.memory)
            state = state._replace(memory=memory)
        if self.early is not None:
            early = self.early.update(self.decoder.embedding(tokens), keep, state.early)
            state = state._replace(early=early)
        if self.late is not None:
            late = self.late.update(state.final[:, :S], keep, state.late)
            state = state._replace(late=late)
        return state, entry

    def leave_rows(self, rows: Tensor, state: EDMGPT2State, recent: list[Entry],
                   read_only: bool) -> EDMGPT2State:
        """`leave` for some rows (B,) bool alone. The caller's list `recent` then ends with what
        they stored; of the other rows that has slots of -1, which are none."""
        index = rows.nonzero().squeeze(1)
        if len(index) == len(rows):
            state, entry = self.leave(state, recent, read_only)
        else:
            some = map_state(lambda x: x[index], state)
            some_recent = [map_state(lambda x: x[index], entry) for entry in recent]
            some, entry = self.leave(some, some_recent, read_only)
            state = put_rows(index, some, state)
            if entry is not None:
                nothing = map_state(lambda x: x.new_full((len(rows), *x.shape[1:]), -1), entry)
                entry = put_rows(index, entry, nothing)
        if entry is not None and torch.is_grad_enabled():
            recent[:] = newest_of([*recent, entry], self.config.bptt_segments)
        return state

    # ── any number of tokens ──
    def advance(self, tokens: Tensor, mask: Tensor, state: EDMGPT2State,
                read_only: bool = False) -> tuple[Tensor, EDMGPT2State, list[Pass]]:
        """Read tokens (B, T) where mask (B, T) -> outputs (B, T, C), state, passes."""
        order = (~mask).int().argsort(dim=1, stable=True)  # real tokens first
        packed = tokens.gather(1, order)
        out, state, passes = self.advance_packed(packed, mask.sum(1), state, read_only)
        back = order.argsort(dim=1).unsqueeze(2)
        place = F.pad(order, (0, 1), value=tokens.shape[1])
        passes = [seen._replace(place=place.gather(1, seen.place)) for seen in passes]
        return out.gather(1, back.expand_as(out)), state, passes

    def advance_packed(self, tokens: Tensor, count: Tensor, state: EDMGPT2State, read_only: bool
                       ) -> tuple[Tensor, EDMGPT2State, list[Pass]]:
        """As advance, for tokens (B, T) of which the first count (B,) of a row are real."""
        W = self.config.window
        B, T = tokens.shape
        out = self.decoder.embedding.weight.new_zeros(B, T + 1, self.config.hidden_size)
        unread = count
        recent, passes = [], []

        while bool(unread.any()):
            full = (state.fill == W) & (unread > 0)
            if bool(full.any()):
                state = self.leave_rows(full, state, recent, read_only)
            free = W - state.fill
            take = torch.minimum(free, unread)  # (B,)
            place, part = next_tokens(tokens, count - unread, take)
            h, state, outputs = self.encode(part, take, state, recent, first=True,
                                            read_only=read_only)
            index = place.unsqueeze(2).expand_as(h)
            out = out.scatter(1, index, h)
            passes.append(Pass(place, outputs.slots, outputs.weights, outputs.pointer))
            unread = unread - take
        return out[:, :T], state, passes

    # ── Hugging Face ──
    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                cache: StateCache | None = None, labels: Tensor | None = None,
                logits_to_keep: int | Tensor = 0, use_cache: bool | None = None,
                read_only: bool = False, past_key_values: StateCache | None = None,
                **kwargs: object) -> CausalLMOutputWithPast:
        """input_ids (B, T), attention_mask (B, T) or of all columns so far, 0 = padding -> logits
        (B, T, V) of the mixture, loss (labels shifted here, -100 not scored), cache.

        The cache is called past_key_values before transformers 5.24. Raises ValueError for an
        argument that it would not use, such as position_ids.
        """
        refuse_unused(kwargs, type(self).__name__)
        tokens = token_ids(input_ids, "input_ids")
        cache = given_cache(cache, past_key_values)
        if cache is None:
            cache = StateCache(self.init_state(len(tokens)))
        mask = cache.mask_of(tokens, attention_mask)

        h, state, passes = self.advance(tokens, mask, cache.state, read_only)
        pointer = pointer_of(passes, tokens.shape[1])
        state = map_state(Tensor.detach, state)
        cache = cache.behind(state, mask)
        kept = kept_columns(logits_to_keep)
        pointer = pointer and pointer.rows(kept)
        logits = head_logits(h[kept], head_weight(self), pointer)
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


class EDMGPT2ForCausalLM(EDMForCausalLM, GenerationMixin):
    """As EDMForCausalLM, of a GPT-2."""
    config_class = EDMGPT2Config


# ══ A memory in a file ═══════════════════════════════════════════════════════════════════════════
SHAPES_MEMORY = ("window", "stride", "read_layer", "slots", "write_every", "eviction", "key_of")


def raw_bytes(x: Tensor) -> bytes:
    """The bytes of a tensor, in order."""
    flat = x.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def fingerprint(model: EDMForCausalLM) -> str:
    """sha256 of the weights and of what shapes a memory: whose memory a file is."""
    fields = [getattr(model.config, name) for name in SHAPES_MEMORY]
    digest = hashlib.sha256(repr(fields).encode())
    weights = model.state_dict()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + raw_bytes(weight))
    return digest.hexdigest()


def state_hash(state: EDMGPT2State) -> str:
    """sha256 of every tensor of a state."""
    own = [x for x in state if isinstance(x, Tensor)]
    digest = hashlib.sha256()
    for x in (*state.memory, *own):
        digest.update(repr((x.dtype, x.shape)).encode() + raw_bytes(x))
    return digest.hexdigest()


def pack_memory(state: EDMGPT2State, model: EDMForCausalLM) -> dict:
    """What torch.save is to write of a state, so that torch.load(weights_only=True) reads it."""
    flat = state._asdict() | {"memory": list(state.memory)}
    return {"model": fingerprint(model), "sha256": state_hash(state), "state": flat}


def unpack_memory(payload: dict, model: EDMForCausalLM) -> EDMGPT2State:
    """The state of what pack_memory gave. Raises ValueError where it is damaged, or of another
    model."""
    try:
        flat = payload["state"]
        state = EDMGPT2State(**flat | {"memory": EDMState(*flat["memory"])})
        is_whole = state_hash(state) == payload["sha256"]
    except (KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError("truncated, altered or no memory")
    if payload["model"] != fingerprint(model):
        raise ValueError("must be of this model (it was written by another)")
    return state
