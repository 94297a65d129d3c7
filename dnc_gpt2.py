#!/usr/bin/env python3
"""Does an external memory make GPT-2 better?  GPT-2 against GPT-2 + DNC, on the same tokens.

    python dnc_gpt2.py                         train both arms, compare, plot, inspect
    python dnc_gpt2.py --help                  every Config field, its default and its comment
    python dnc_gpt2.py --lr 1e-3 --seed 2      override fields (or edit Config below)
    python dnc_gpt2.py --resume auto           continue an interrupted run, bit for bit
    torchrun --nproc_per_node 8 dnc_gpt2.py --batch_size 32    a process a GPU (docs/scale.md)
    python dnc_gpt2.py --inspect checkpoints/GPT2_+_DNC_FINAL_step350.pt --text "Some text"
    python dnc_gpt2.py --generate "Some text"  go on with it, by the newest checkpoint
    python dnc_gpt2.py --export FOLDER         write it for AutoModelForCausalLM

Read downward: Config, memory, model, loss, training; the mixture and the LM head, which they call;
evaluation, comparison; the other arms' memories; then what serves them: generation, data, files,
export, shell, main. It runs as the only file; dnc_scan/ beside it computes the same, faster.
Letters, everywhere: B batch rows, T time, S segments (windows) a step, L = S * T, C hidden width,
V vocabulary, N memory slots, W word width, R read heads, P sampled positions, M rows of logits.
The DNC is Graves et al. 2016, "Hybrid computing using a neural network with dynamic external
memory", Methods. Options marked (M), (D), (S) are Csordas & Schmidhuber 2019, arXiv 1904.10278.
"""

import ast
import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

# Read when torch is imported: threads that spin while they wait starve whatever runs beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and not hasattr(sys, "ps1"):  # until main listens: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # the epsilon of every equation; float32 resolves 1 - 1e-6, bfloat16 does not
ARMS = {
    "baseline": "GPT2 Baseline",  # no memory
    "matched": "GPT2 Matched",  # no memory, as many parameters as the DNC arm
    "wide": "GPT2 Wide",  # no memory, twice the window
    "cache": "GPT2 + Cache",  # the baseline and a neural cache, which has no parameters
    "gru": "GPT2 + GRU",  # a vector as large as the DNC's matrix
    "delta": "GPT2 + Delta",  # a matrix of the DNC's shape under the gated delta rule
    "dnc_reset": "GPT2 + DNC Reset",  # the DNC, emptied at every window
    "dnc": "GPT2 + DNC",
}


# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
class Bound(NamedTuple):
    """What a number in a Config has to be, besides its type: words for people, and a test."""
    words: str
    holds: Callable[[float], bool]


Count = Annotated[int, Bound("above 0", lambda x: x > 0)]
Whole = Annotated[int, Bound("0 or more", lambda x: x >= 0)]
Seed = Annotated[int, Bound("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)]
Positive = Annotated[float, Bound("above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Bound("0 or more", lambda x: x >= 0)]
Share = Annotated[float, Bound("from 0 to 1", lambda x: 0 <= x <= 1)]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of a run. Edit here, or override as `--name value`."""

    # model
    hidden_size: Count = 768  # C, width of the controller
    num_layers: Count = 6  # transformer blocks
    num_heads: Count = 8  # attention heads; divides hidden_size
    dropout: Share = 0.0  # of the controller; one epoch from scratch underfits, so none
    mlp_width: Whole = 0  # feed-forward width, 0 = 4 * hidden_size
    init_from: str = "scratch"  # or hub name or folder of a pretrained GPT-2: its sizes are used
    # memory
    memory: Literal["dnc", "gru", "delta", "cache", "none"] = "dnc"  # set by every arm, see arms
    mem_slots: Count = 64  # N, rows of the memory matrix
    mem_width: Count = 128  # W, width of one row
    num_reads: Count = 4  # R, read heads
    carry_memory: bool = True  # memory crosses windows; False: empty at every window
    bptt_segments: Count = 1  # S, windows of a row in a step: the gradient's reach in the memory
    pointing: bool = True  # reads point at the tokens that slots hold: p(y) is a mixture
    split_rows: bool = True  # a row is a key of what came before and a value of the token (not h)
    row_key: Literal["previous", "own"] = "previous"  # of split rows: made of h_t-1 | of h_t
    empty_slot: bool = True  # a read may choose a slot that is always empty
    min_surprisal: NotNegative = 4.0  # nats; what GPT-2 expects more surely is not written, 0: all
    usage_decay: Share | Literal["auto"] = "auto"  # of usage at each token; auto = 1 - 1.28 / N
    use_links: bool = False  # temporal links and read modes (Graves)
    mask_min: Share = 1.0  # (M) lowest key mask, 1 = no masks; 0.1, with split_rows False
    dealloc_wipe: bool = False  # (D) de-allocation also wipes the freed content
    sharpen_links: bool = False  # (S) sharpen what is read along links; needs use_links
    # training
    epochs: Count = 1  # passes over the training split
    max_steps: Whole = 0  # above 0 it overrides epochs
    batch_size: Count = 4  # windows a step; rows of the stream = batch_size / bptt_segments
    seq_len: Count = 128  # tokens a window; attention never crosses windows
    accumulate: Count = 1  # parts of a step's rows, one after the other: less memory, same step
    lr: Positive = 3e-4  # peak learning rate
    memory_lr: Positive = 1.0  # of the memory's parameters, as a share of lr
    empty_share: Share = 0.02  # of a step's rows whose memory is emptied, drawn at random
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # cosine ends at a tenth of the peak
    lr_warmup: Share = 0.05  # share of all steps with a linearly rising rate
    weight_decay: NotNegative = 0.01  # AdamW, on matrices only
    grad_clip: Positive = 1.0  # global gradient norm
    lambda_vocabulary: NotNegative = 1.0  # weight of the vocabulary's own CE beside the mixture's
    lambda_routing: NotNegative = 0.1  # weight of L_routing
    lambda_entropy: NotNegative = 0.05  # weight of L_entropy
    routing: Literal["benefit", "kl"] = "benefit"  # reward the gate where memory helps | changes
    routing_fraction: Share = 0.125  # share of positions at which routing is computed, 1 = all
    seed: Seed = 0  # weights, dropout, emptied rows, routing positions, what is drawn
    seeds: str = "1"  # how often every arm is trained, from seed on; or a list of seeds: 0,1,2
    lr_grid: str = ""  # peak rates such as 3e-4,1e-3: every arm takes its best on validation
    arms: str = "baseline,dnc"  # of baseline matched wide cache gru delta dnc_reset dnc; in order
    # data
    dataset: str = "auto"  # auto | hub id, id:configuration | folder with train, valid, test.txt
    tokenizer: str = "auto"  # auto (gpt2, else own) | own, trained on the text | hub name | folder
    preset: Literal["auto", "full", "small"] = "auto"  # full (as shipped) with CUDA, else small
    eval_tokens: Count = 20_000  # of the validation split, at every save_every_steps
    final_eval_tokens: Whole = 0  # of validation and test for the final figures, 0 = all
    eval_rows: Count = 8  # parallel rows in evaluation, at least 2 for the swapped-memory control
    # logging
    log_every_steps: Count = 50  # a metrics.jsonl row
    save_every_steps: Count = 3000  # validation and a checkpoint
    save_dir: str = "checkpoints/"  # checkpoints
    plot_dir: str = "plots/"  # pictures, metrics.jsonl, results.json, report.md
    tensorboard: bool = False  # curves in plot_dir/tensorboard as well; needs that package
    # hardware
    checkpoint_activations: bool = False  # backward computes the blocks again: less memory
    use_compile: bool = False  # torch.compile of the controller; needs num_gpus 1 or 0
    compile_mode: CompileMode = "reduce-overhead"  # of torch.compile
    scan: Literal["auto", "eager", "fused"] = "auto"  # the recurrence: eager is the readable loop
    num_gpus: Literal["auto", 0, 1, 2] = "auto"  # auto: up to 2, by nn.DataParallel; 0: the CPU
    precision: Literal["auto", "bf16", "float32"] = "auto"  # auto: bf16 autocast on GPUs with it
    # commands
    resume: str = ""  # auto: newest valid state | anew: auto, or over another run's files | path
    inspect: str = ""  # path of a GPT2 + DNC checkpoint: print its gates on text, no training
    text: str = "Albert Einstein was born in Ulm in 1879. Albert Einstein died in 1955."  # a sample
    generate: str = ""  # a text: a trained model goes on with it, no training
    export: str = ""  # folder: write a trained model for transformers, no training
    checkpoint: str = "auto"  # of generate, export: auto = the newest finished, else newest | path
    new_tokens: Count = 200  # how many to generate
    temperature: NotNegative = 0.8  # 0 = always the most likely token
    top_k: Whole = 0  # draw from so many most likely tokens, 0 = from all
    top_p: Share = 0.95  # draw from the fewest tokens with this share, 1 = from all
    show_gates: bool = False  # generate: colour by write gate, mark what memory raised

    @property
    def rows(self) -> int:
        """Parallel rows of the training stream."""
        return self.batch_size // self.bptt_segments

    @property
    def step_len(self) -> int:
        """Tokens of one row in a training step."""
        return self.bptt_segments * self.seq_len

    @property
    def arm_list(self) -> list[str]:
        """The arms in order."""
        return self.arms.replace(" ", "").split(",")

    @property
    def seed_list(self) -> list[int]:
        """The seeds of every arm, in order."""
        if "," in self.seeds:
            return [int(word) for word in self.seeds.split(",")]
        return [*range(self.seed, self.seed + int(self.seeds))]

    @property
    def rates(self) -> list[float]:
        """The peak learning rates that every arm tries."""
        return [float(word) for word in self.lr_grid.split(",")] if self.lr_grid else [self.lr]

    def __post_init__(self) -> None:
        check_fields(self)
        check_config(self)


# ══ Memory: the DNC, addressing as pure functions in the paper's order ═══════════════════════════
class DNCOptions(NamedTuple):
    """Switches of the recurrence; the defaults are Graves' DNC without temporal links."""
    use_links: bool = False
    mask_min: float = 1.0  # (M), 1 = no masks
    dealloc_wipe: bool = False  # (D)
    sharpen_links: bool = False  # (S)
    key_width: int = 0  # K, the first columns of a row, which addressing sees alone; 0 = all
    usage_decay: float = 1.0  # what usage is multiplied with at each token
    empty_slot: bool = False  # one more candidate of a read, which holds nothing


class DNCState(NamedTuple):
    """What one step hands to the next, one row a sequence. Parts that are switched off are empty:
    without links link and precedence, without split rows last, without min_surprisal hidden."""
    memory: Tensor  # (B, N, W)
    usage: Tensor  # (B, N) in [0, 1]
    write_weights: Tensor  # (B, N) >= 0, sum <= 1
    read_weights: Tensor  # (B, R, N) >= 0, sum <= 1
    link: Tensor  # (B, N, N) in [0, 1], or (B, 0, 0)
    precedence: Tensor  # (B, N), or (B, 0)
    tokens: Tensor  # (B, N) id of the token last written with a weight above 1/2, -1 none; int64
    last: Tensor  # (B, C) LN(h) of the last token, or (B, 0)
    hidden: Tensor  # (B, C) its h, which says how surely the next token was expected, or (B, 0)


class DNCTrace(NamedTuple):
    """What the memory did at each token, for losses, metrics and plots."""
    write_gate: Tensor  # (B, T) in [0, 1), 0 where nothing is written
    write_weights: Tensor  # (B, T, N)
    read_weights: Tensor  # (B, T, R, N), of sum below 1 where the empty slot has the rest
    tokens: Tensor  # (B, T, N) id of the token that a slot holds when it is read, -1 none


class Interface(NamedTuple):
    """The controller's instructions to the memory, activations applied; optional parts None."""
    write_key: Tensor  # (B, T, K), K = W but for split rows
    write_strength: Tensor  # (B, T) > 0, of HiddenInterface >= 1
    erase: Tensor  # (B, T, W) in (0, 1)
    write_vector: Tensor  # (B, T, W)
    write_gate: Tensor  # (B, T) in [0, 1)
    allocation_gate: Tensor  # (B, T) in (0, 1)
    read_keys: Tensor  # (B, T, R, K)
    read_strengths: Tensor  # (B, T, R) > 0, of HiddenInterface >= 1
    free_gates: Tensor  # (B, T, R) in (0, 1)
    read_modes: Tensor | None  # (B, T, R, 3), softmax over backward, content, forward
    write_mask: Tensor | None  # (B, T, W) in (mask_min, 1)
    read_masks: Tensor | None  # (B, T, R, W) in (mask_min, 1)
    sharpening: Tensor | None  # (B, T, R, 2) >= 1, backward and forward
    empty: Tensor | None  # (B, T, R) logit of the empty slot


def zero_state(batch: int, slots: int, width: int, reads: int, options: DNCOptions,
               dtype: torch.dtype = torch.float32, device: torch.device | None = None,
               last_size: int = 0, hidden_size: int = 0) -> DNCState:
    """An empty memory: contents, usage, weightings and links are zero, no slot holds a token."""
    zeros = functools.partial(torch.zeros, dtype=dtype, device=device)
    linked = slots if options.use_links else 0
    return DNCState(
        memory=zeros(batch, slots, width),
        usage=zeros(batch, slots),
        write_weights=zeros(batch, slots),
        read_weights=zeros(batch, reads, slots),
        link=zeros(batch, linked, linked),
        precedence=zeros(batch, linked),
        tokens=torch.full((batch, slots), -1, device=device),
        last=zeros(batch, last_size),
        hidden=zeros(batch, hidden_size),
    )


def usage_update(usage: Tensor, write_weights: Tensor, read_weights: Tensor,
                 free_gates: Tensor, decay: float = 1.0) -> tuple[Tensor, Tensor]:
    """u = gamma (u + w - u*w) * psi, psi = prod_r (1 - f_r * wr_r), w and wr of the step before.
    departs from Graves: gamma below 1 frees what was used least recently (Santoro et al. 2016).

    usage, write_weights (B, N), read_weights (B, R, N), free_gates (B, R) -> usage, psi (B, N).
    """
    retained = 1 - free_gates.unsqueeze(-1) * read_weights  # (B, R, N)
    # A chain of products: the backward of torch.prod synchronises a GPU with the host.
    retention = functools.reduce(torch.mul, retained.unbind(1))  # (B, N)
    usage = (usage + write_weights - usage * write_weights) * retention
    return usage * decay if decay < 1 else usage, retention


def allocation_weighting(usage: Tensor) -> Tensor:
    """a_i = (1 - u~_i) * prod of u~_j over the slots j freer than i, with u~ = eps + (1 - eps) u.

    usage (B, N) -> (B, N), sum <= 1. Ties break to the lowest slot; the order is constant for the
    gradient. Not renormalised: a full memory allocates nothing. A comparison matrix stands in for
    Graves' sort: same order, and the product becomes a sum of logarithms (u~ >= eps).
    """
    used = EPS + (1 - EPS) * usage
    mine, other = used.unsqueeze(2), used.unsqueeze(1)  # (B, N, 1), (B, 1, N)
    slot = torch.arange(usage.shape[1], device=usage.device)
    lower = slot < slot.unsqueeze(1)  # (N, N), j < i
    freer = (other < mine) | ((other == mine) & lower)  # (B, N, N), slot j comes before slot i
    before = (freer.to(used.dtype) @ used.log().unsqueeze(2)).squeeze(2)  # (B, N)
    return (1 - used) * before.exp()


def content_weighting(keys: Tensor, strengths: Tensor, memory: Tensor,
                      masks: Tensor | None = None, empty: Tensor | None = None) -> Tensor:
    """softmax over slots of strength * cos(key, slot); a mask (M) multiplies both.

    keys (B, H, K), strengths (B, H), memory (B, N, W), of which the first K columns are compared,
    masks (B, H, K) or None, empty (B, H), the logit of a slot that holds nothing, or None ->
    (B, H, N), of sum 1 less the share of the empty slot. The eps stands INSIDE the root of each
    norm, or the gradient into an empty row is thousands of times larger.
    """
    memory = memory[..., : keys.shape[-1]]
    if masks is None:
        dots = keys @ memory.transpose(1, 2)  # (B, H, N)
        slot_norms = (memory * memory).sum(-1).unsqueeze(1)  # (B, 1, N)
    else:
        keys = keys * masks
        dots = (keys * masks) @ memory.transpose(1, 2)  # (B, H, N)
        slot_norms = (masks * masks) @ (memory * memory).transpose(1, 2)  # (B, H, N)
    key_norms = (keys * keys).sum(-1, keepdim=True)  # (B, H, 1)
    cosine = dots * (slot_norms + EPS).rsqrt() * (key_norms + EPS).rsqrt()
    logits = strengths.unsqueeze(-1) * cosine  # (B, H, N)
    if empty is None:
        return logits.softmax(-1)
    return torch.cat((empty.unsqueeze(-1), logits), dim=-1).softmax(-1)[..., 1:]


def write_weighting(x: Interface, usage: Tensor, memory: Tensor) -> Tensor:
    """w = g_w * (g_a * a + (1 - g_a) * c): one step's interface, usage (B, N) -> (B, N)."""
    mask = None if x.write_mask is None else x.write_mask.unsqueeze(1)  # (B, 1, W)
    content = content_weighting(x.write_key.unsqueeze(1), x.write_strength.unsqueeze(1), memory,
                                mask).squeeze(1)  # (B, N)
    allocation = allocation_weighting(usage)  # (B, N)
    gate = x.allocation_gate.unsqueeze(1)  # (B, 1)
    return x.write_gate.unsqueeze(1) * (gate * allocation + (1 - gate) * content)


def dnc_step(x: Interface, state: DNCState, options: DNCOptions) -> tuple[Tensor, DNCState]:
    """One token: usage, allocation and content, write, links, read. x holds one step's (B, ...).
    Returns the read vectors (B, R, W - K), K the key width, and the new state."""
    usage, retention = usage_update(state.usage, state.write_weights, state.read_weights,
                                    x.free_gates, options.usage_decay)
    write_weights = write_weighting(x, usage, state.memory)  # (B, N)

    memory = state.memory
    if options.dealloc_wipe:
        memory = memory * retention.unsqueeze(2)
    slots = write_weights.unsqueeze(2)  # (B, N, 1)
    memory = memory * (1 - slots * x.erase.unsqueeze(1)) + slots * x.write_vector.unsqueeze(1)

    link, precedence = state.link, state.precedence
    read_weights = content_weighting(x.read_keys, x.read_strengths, memory, x.read_masks, x.empty)
    if options.use_links:
        link, precedence = link_update(link, precedence, write_weights)
        read_weights = follow_links(x, read_weights, state.read_weights, link, options)

    state = DNCState(memory, usage, write_weights, read_weights, link, precedence, state.tokens,
                     state.last, state.hidden)
    return read_weights @ memory[..., options.key_width :], state  # (B, R, W - K)


def dnc_loop(interface: Interface, state: DNCState, options: DNCOptions
             ) -> tuple[Tensor, Tensor, Tensor, DNCState]:
    """The readable recurrence over T tokens; a faster one must return the same: reads (B, T, R,
    W - K), write_weights (B, T, N), read_weights (B, T, R, N), the state after the last token."""
    length = interface.write_gate.shape[1]
    parts = [[None] * length if part is None else part.unbind(1) for part in interface]
    reads, write_weights, read_weights = [], [], []
    for step in zip(*parts, strict=True):
        read, state = dnc_step(Interface(*step), state, options)
        reads.append(read)
        write_weights.append(state.write_weights)
        read_weights.append(state.read_weights)
    traces = (torch.stack(rows, dim=1) for rows in (reads, write_weights, read_weights))
    return *traces, state


class RowInterface(nn.Module):
    """Instructions for rows that say what followed what: a key of LN(h_t-1), the state that had to
    predict token t, and a value of that token's embedding; a read asks with LN(h_t).

    departs from Graves: key and value are two parts of a row, of which addressing sees the first;
    keys have unit length; strengths do not depend on the token; gates and erase see LN(h_t-1) and
    token t. row_key "own" makes the key of LN(h_t) instead.
    """
    STRENGTH = 16.0  # of reads and writes, at the start

    def __init__(self, hidden_size: int, slots: int, width: int, reads: int, options: DNCOptions,
                 row_key: str = "previous") -> None:
        super().__init__()
        self.reads, self.options, self.row_key_of = reads, options, row_key
        key_width = options.key_width
        self.row_key = nn.Linear(hidden_size, key_width, bias=False)
        self.value = nn.Linear(hidden_size, width - key_width, bias=False)
        self.read_key = nn.Linear(hidden_size, reads * key_width, bias=False)
        self.gates = nn.Linear(2 * hidden_size, 2 + reads)  # write, allocation, free
        self.erase = nn.Linear(2 * hidden_size, width)
        self.log_strength = nn.Parameter(torch.empty(reads + 1))  # of the reads, of the write
        self.empty = nn.Linear(hidden_size, reads) if options.empty_slot else None
        self.links = None
        if options.use_links:
            self.links = nn.Linear(hidden_size, (5 if options.sharpen_links else 3) * reads)
        self.set_initial_values(slots)

    @torch.no_grad()
    def set_initial_values(self, slots: int) -> None:
        """Reads ask in the code in which rows are kept; a row is written whole; most of a read
        falls on the empty slot, or pointing would drown the vocabulary before it knows anything.
        Chosen on validation: docs/results.md, "who was tuned how"."""
        nn.init.orthogonal_(self.row_key.weight)
        nn.init.orthogonal_(self.value.weight)
        self.read_key.weight.copy_(self.row_key.weight.repeat(self.reads, 1))
        self.log_strength.fill_(math.log(self.STRENGTH))

        nn.init.zeros_(self.gates.weight)
        biases = [2.0, 4.0] + [-4.0] * self.reads  # write 0.88, allocation 0.98, free 0.02
        self.gates.bias.copy_(torch.tensor(biases))
        nn.init.zeros_(self.erase.weight)
        self.erase.bias.fill_(4.0)  # 0.98

        if self.empty is not None:
            nn.init.zeros_(self.empty.weight)
            share = 1.4 + 0.05 * math.log2(slots / 64)  # of the strength: 1.4 at N 64, 1.5 at 256
            self.empty.bias.fill_(share * self.STRENGTH)

    def forward(self, normed: Tensor, before: Tensor, embedding: Tensor) -> Interface:
        """normed = LN(h_t), before = LN(h_t-1), embedding of token t, all (B, T, C)."""
        B, T, _ = normed.shape
        both = torch.cat((before, embedding), dim=-1)  # (B, T, 2C)
        row_key = self.row_key(before if self.row_key_of == "previous" else normed)
        row_key = F.normalize(at_least_float32(row_key), dim=-1)  # (B, T, K)
        value = at_least_float32(self.value(embedding))  # (B, T, W - K)
        read_keys = at_least_float32(self.read_key(normed)).view(B, T, self.reads, -1)
        gates = at_least_float32(self.gates(both)).sigmoid()  # (B, T, 2 + R)
        strengths = self.log_strength.exp().to(gates.dtype).expand(B, T, -1)  # (B, T, R + 1)
        empty = None
        if self.empty is not None:
            empty = at_least_float32(self.empty(normed))
        read_modes = sharpening = None
        if self.links is not None:
            read_modes, sharpening = link_instructions(self.links(normed), self.reads, self.options)

        return Interface(
            write_key=row_key,
            write_strength=strengths[..., -1],
            erase=at_least_float32(self.erase(both)).sigmoid(),
            write_vector=torch.cat((row_key, value), dim=-1),  # (B, T, W)
            write_gate=gates[..., 0],
            allocation_gate=gates[..., 1],
            read_keys=F.normalize(read_keys, dim=-1),
            read_strengths=strengths[..., :-1],
            free_gates=gates[..., 2:],
            read_modes=read_modes,
            write_mask=None,
            read_masks=None,
            sharpening=sharpening,
            empty=empty,
        )


def tokens_held(tokens: Tensor, write_weights: Tensor, before: Tensor) -> Tensor:
    """id_i(t) = x_t where w_t[i] > 1/2, else id_i(t-1): tokens (B, T), write_weights (B, T, N),
    before (B, N), the ids at the start -> (B, T, N). No gradient."""
    T = tokens.shape[1]
    step = torch.arange(T, device=tokens.device).view(1, T, 1)
    written = torch.where(write_weights > 0.5, step, -1)  # (B, T, N)
    last_write = written.cummax(dim=1).values
    by_slot = tokens.unsqueeze(2).expand_as(last_write)
    held = by_slot.gather(1, last_write.clamp_min(0))
    return torch.where(last_write < 0, before.unsqueeze(1), held)


def one_earlier(x: Tensor, last: Tensor) -> Tensor:
    """x_t-1 at every t (B, T, C), of x (B, T, C) and what came before its first (B, C)."""
    return torch.cat((last.unsqueeze(1).to(x.dtype), x[:, :-1]), dim=1)


class DNCMemory(nn.Module):
    """DNC over hidden states, a pure function of (h, state): h + read_proj(reads).

    departs from Graves: the controller never sees its reads (there those of step t-1 enter at step
    t), so the instructions of all T tokens are a few matrix products. `read_proj` has no bias and
    starts at zero: step 0 is the baseline, zeroed reads are the model without memory.
    With options.key_width rows are split (RowInterface), else Graves' (HiddenInterface).
    """

    def __init__(self, hidden_size: int, slots: int, width: int, reads: int,
                 options: DNCOptions = DNCOptions(), scan: str = "auto",
                 biases: dict[str, float] | None = None, row_key: str = "previous",
                 min_surprisal: float = 0.0) -> None:
        super().__init__()
        self.slots, self.width, self.reads = slots, width, reads
        self.options, self.scan, self.min_surprisal = options, scan, min_surprisal
        self.norm = nn.LayerNorm(hidden_size)
        self.value_width = width - options.key_width
        if options.key_width:
            self.interface = RowInterface(hidden_size, slots, width, reads, options, row_key)
        else:
            self.interface = HiddenInterface(hidden_size, width, reads, options, biases)
        self.read_proj = nn.Linear(reads * self.value_width, hidden_size, bias=False)
        nn.init.zeros_(self.read_proj.weight)

    def init_state(self, batch_size: int) -> DNCState:
        weight = self.read_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        last = len(weight) if self.options.key_width else 0
        hidden = len(weight) if self.min_surprisal else 0
        return zero_state(batch_size, self.slots, self.width, self.reads, self.options, dtype,
                          weight.device, last, hidden)

    def forward(self, h: Tensor, state: DNCState, tokens: Tensor | None = None,
                embedding: Tensor | None = None, vocabulary: Tensor | None = None
                ) -> tuple[Tensor, DNCState, DNCTrace]:
        """h (B, T, C), state of B rows; for split rows tokens (B, T) and their embedding (B, T, C);
        for min_surprisal tokens and the embedding of the vocabulary (V, C) -> h_out (B, T, C),
        state after the last token, trace."""
        normed = self.norm(h)
        before = one_earlier(normed, state.last) if self.options.key_width else None
        x = self.interface(normed, before, embedding)
        if self.min_surprisal:
            x, state = skip_expected(x, state, h, tokens, vocabulary, least=self.min_surprisal)
        with torch.autocast(h.device.type, enabled=False):  # 1 - 1e-6 is 1 in bfloat16
            reads, write_weights, read_weights, new = pick_scan(
                self.scan, state, self.options)(x, state, self.options)
        held = state.tokens.unsqueeze(1)[:, :0]  # (B, 0, N)
        if tokens is not None:
            held = tokens_held(tokens, write_weights, state.tokens)  # (B, T, N)
            new = new._replace(tokens=held[:, -1].clone())  # a view would keep all T alive
        if self.options.key_width:
            new = new._replace(last=normed[:, -1].to(state.last.dtype, copy=True))
        reads = reads.flatten(2).to(self.read_proj.weight.dtype)  # (B, T, R * (W - K))
        trace = DNCTrace(x.write_gate, write_weights, read_weights, held)
        return h + self.read_proj(reads), new, trace


# ══ Model: GPT2Model, memory, tied LM head ═══════════════════════════════════════════════════════
class Output(NamedTuple):
    """A training step's forward pass, batch first, so that nn.DataParallel can gather it."""
    loss: Tensor  # (B,) L_LM, the same in every row; it alone has a gradient
    nll: Tensor  # (B, L) next-token cross-entropy in nats; 0 where the target is -100
    top1: Tensor  # (B, L) 1 where the most likely token is the target
    effect: Tensor  # (B, P) KL or benefit at the sampled positions, no gradient
    trace: DNCTrace | None  # None as well of a memory without write gates
    state: tuple | None


class GPT2WithMemory(nn.Module):
    """GPT2Model, then the memory of `build_memory`, if any, then the LM head tied to the embedding.
    Every arm is this class, built from the same seed: controllers of one shape start equal."""

    def __init__(self, config: Config, controller: nn.Module) -> None:
        super().__init__()
        self.config, self.controller = config, controller
        torch.manual_seed(config.seed + 1)
        self.memory = build_memory(config)
        torch.manual_seed(config.seed + 2)  # dropout: the same stream in every arm

    def init_state(self, rows: int) -> tuple | None:
        return None if self.memory is None else self.memory.init_state(rows)

    def head_weight(self) -> Tensor:
        """The embedding, which is the head as well: (V, C)."""
        return self.controller.get_input_embeddings().weight

    def autocast(self, device: torch.device) -> torch.autocast:
        # Entered inside a forward because nn.DataParallel's threads inherit no autocast dtype.
        enabled = self.config.precision == "bf16"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)

    def hidden(self, tokens: Tensor, state: tuple | None):
        """tokens (B, L) -> h without and with memory (B, L, C), state, trace. The controller sees
        L / seq_len independent windows in one call, the memory the whole length if carried."""
        if self.config.use_compile:
            torch.compiler.cudagraph_mark_step_begin()
        B, L = tokens.shape
        windows = tokens.reshape(-1, min(self.config.seq_len, L))  # (B*S, T)
        h = self.controller(input_ids=windows, use_cache=False).last_hidden_state  # (B*S, T, C)
        embed = self.controller.get_input_embeddings()
        if self.memory is None:
            h = h.reshape(B, L, -1)
            return h, h, None, None
        if self.config.carry_memory:
            h = h.reshape(B, L, -1)
            return h, *self.memory(h, state, tokens, embed(tokens), embed.weight)
        empty = self.memory.init_state(len(windows))
        h_out, _, trace = self.memory(h, empty, windows, embed(windows), embed.weight)
        if trace is not None:
            trace = type(trace)(*(part.reshape(B, L, *part.shape[2:]) for part in trace))
        return h.reshape(B, L, -1), h_out.reshape(B, L, -1), state, trace

    def forward(self, tokens: Tensor, targets: Tensor, state: tuple | None,
                positions: Tensor | None = None) -> Output:
        """One training pass. tokens, targets (B, L), one window or a multiple of seq_len (target
        -100 = not scored), state of B rows, positions (B, P) of the routing effect or None."""
        B, L = tokens.shape
        with self.autocast(tokens.device):
            h, h_out, state, trace = self.hidden(tokens, state)
            weight = self.head_weight()
            dtype = torch.bfloat16 if self.config.precision == "bf16" else h_out.dtype
            pointer = self.pointer(trace)
            loss, nll, top1 = head_loss(h_out.flatten(0, 1), weight, targets.flatten(), dtype,
                                        pointer, self.config.lambda_vocabulary)
            nll, top1 = nll.view(B, L), top1.view(B, L)
            effect = h.new_zeros(B, 0)
            if positions is not None:
                effect = routing_effect(self.config.routing, weight, h=h, h_out=h_out, nll=nll,
                                        targets=targets, positions=positions, pointer=pointer)
        return Output(loss.expand(B), nll, top1, effect, trace, state)

    def pointer(self, trace: "DNCTrace | CacheTrace | None") -> "Pointer | None":
        """What a trace points at: p(y) = c0 softmax(E h_out)[y] + sum_i rho_i [token_i = y] (class
        Pointer). None where there is no memory or it does not point."""
        return point(trace) if self.config.pointing and trace is not None else None

    @torch.no_grad()
    def measure(self, tokens: Tensor, targets: Tensor, state: tuple | None,
                brief: bool = False) -> tuple[Tensor, tuple | None]:
        """STATS of every token (B, L, K) (brief: the nll, the rest 0) and the state behind them;
        arguments as of `forward`. Logits are float32, without autocast."""
        with self.autocast(tokens.device):
            h, h_out, state, trace = self.hidden(tokens, state)
        pointer = self.pointer(trace)
        stats = token_statistics(h, h_out, targets, self.head_weight(), trace, brief, pointer)
        return stats, state


# ══ Loss ═════════════════════════════════════════════════════════════════════════════════════════
def total_loss(output: Output, positions: Tensor | None, config: Config) -> Tensor:
    """L = L_LM + lambda_r L_routing + lambda_e L_entropy, a scalar. L_routing, -mean(g sg(effect))
    over positions (B, P), rewards a gate that is open where memory improves the prediction, or,
    with routing "kl", where it changes it."""
    loss = output.loss.mean()
    if positions is not None:
        gates = output.trace.write_gate.gather(1, positions)  # (B, P)
        loss = loss - config.lambda_routing * (gates * output.effect).mean()
    if isinstance(output.trace, DNCTrace) and config.lambda_entropy > 0:
        loss = loss + config.lambda_entropy * weight_entropy(output.trace.write_weights).mean()
    return loss


# ══ Training: one loop for every arm ═════════════════════════════════════════════════════════════
@dataclasses.dataclass
class Run:
    """One arm in training: all that a checkpoint holds. It changes in place."""
    arm: str  # its name in tables and file names
    config: Config
    model: GPT2WithMemory | None  # None: planned, or finished and given up
    optimizer: torch.optim.Optimizer | None
    total_steps: int
    steps_per_epoch: int
    tag: str = ""  # in file names, what tells it from other runs of its arm: seed, rate
    turns: int = 1  # steps in which `wide`, of half the rows, twice as long, reads a column of all
    step: int = 0
    state: tuple | None = None  # of the memory
    history: list[dict] = dataclasses.field(default_factory=list)  # rows of metrics.jsonl
    meter: "Meter" = dataclasses.field(default_factory=lambda: Meter())
    results: dict = dataclasses.field(default_factory=dict)  # of the finished arm
    last_saved: str = ""
    lengthened: list[int] = dataclasses.field(default_factory=list)  # steps where it had been done

    @property
    def stem(self) -> str:
        """How the names of its checkpoints begin."""
        return self.arm.replace(" ", "_") + self.tag

    @property
    def tokens_per_s(self) -> float:
        """Training tokens a second, warm-up and evaluation left out; NaN before any."""
        return self.meter.tokens / self.meter.seconds if self.meter.tokens else math.nan

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head_weight().device


def add_gradients(run: Run, forward: nn.Module, tokens: Tensor) -> tuple[Tensor, tuple | None]:
    """Forward and backward of tokens (B, L + 1), `accumulate` parts of the rows after each other ->
    means over the rows of loss, nll, top1 and gate (4,), and the state after the last token."""
    parts = run.config.accumulate
    positions = routing_positions(run.config, run.step, tokens.device)
    means, states = [], []
    for number, some in enumerate(tokens.chunk(parts)):
        at = slice(number * len(some), (number + 1) * len(some))
        sampled = None if positions is None else positions[at]
        with gradients_stay(forward, number < parts - 1):
            before = run.state if parts == 1 else rows_of(run.state, at)
            output = forward(some[:, :-1], some[:, 1:], before, sampled)
            loss = total_loss(output, sampled, run.config) / parts
            loss.backward()
        means.append(step_means(output, loss * parts))
        states.append(map_state(Tensor.detach, output.state))
    return torch.stack(means).mean(0), join_rows(states)


def rows_of_run(run: Run, corpus: "Corpus") -> Tensor:
    """The rows of the training stream that this rank reads, (B * turns, length): those of every arm
    are the same, of 2T tokens at a time to `wide` (2 turns), T to the others."""
    config, turns = run.config, run.turns
    rows = training_rows(corpus.train, config.rows * turns, config.step_len // turns)
    share = share_of(config.rows)
    return rows[share.start * turns : share.stop * turns]


def step_tokens(run: Run, rows: Tensor) -> Tensor:
    """The tokens of a step, and the next one (B, L + 1), of `rows_of_run`. In steps 0 and 1 `wide`
    reads the columns 0..2T of the even, then of the odd rows; the others 0..T, then T..2T of all:
    after either two every arm has read the same tokens. Of an epoch of odd steps it has no last."""
    within, length = run.step % run.steps_per_epoch, run.config.step_len
    turn = within % run.turns
    start = within // run.turns * length
    return rows[turn :: run.turns, start : start + length + 1]


def train_step(run: Run, forward: nn.Module, rows: Tensor) -> None:
    """One step on the next step_len tokens of every row. Raises Diverged, the weights untouched."""
    config = run.config
    tokens = step_tokens(run, rows).to(run.device, non_blocking=True)  # (B, L + 1)
    if run.step % run.steps_per_epoch == 0:  # a new pass over the stream: an empty memory
        run.state = run.model.init_state(len(tokens))
    run.state = empty_some_rows(run.state, config, run.step)
    set_rates(run)

    run.optimizer.zero_grad(set_to_none=True)
    means, state = add_gradients(run, forward, tokens)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)

    check_and_count(run, means, norm)
    run.optimizer.step()
    run.state = state
    run.step += 1


def map_state(fn: Callable, state: tuple | None) -> tuple | None:
    """Apply fn to every tensor of a state: detach, move, roll or select rows. None stays None."""
    if state is None:
        return None
    parts = []
    for part in state:
        parts.append(fn(part) if isinstance(part, Tensor) else map_state(fn, part))
    return type(state)(*parts)


def rows_of(state: tuple | None, at: slice) -> tuple | None:
    """Some rows of a state."""
    return map_state(lambda tensor: tensor[at], state)


def join_rows(states: list[tuple | None]) -> tuple | None:
    """The states of parts of the rows -> of all rows."""
    first = states[0]
    if len(states) == 1 or first is None:
        return first
    return type(first)(*map(torch.cat, zip(*states, strict=True)))


def gradients_stay(forward: nn.Module, stay: bool) -> contextlib.AbstractContextManager:
    """Whether gradients are not yet averaged over the ranks, since more will be added."""
    if stay and isinstance(forward, nn.parallel.DistributedDataParallel):
        return forward.no_sync()
    return contextlib.nullcontext()


def step_means(output: Output, loss: Tensor) -> Tensor:
    """Loss, nll, top1 and gate of a forward pass, means over its rows (4,)."""
    gate = loss.new_zeros(())
    if isinstance(output.trace, DNCTrace):
        gate = output.trace.write_gate.mean()
    return torch.stack([loss, output.nll.mean(), output.top1.mean(), gate]).detach()


def empty_some_rows(state: tuple | None, config: Config, step: int) -> tuple | None:
    """Empty the memory of a random empty_share of the rows, drawn from seed and step alone: an
    evaluation and a generation start from an empty memory, so training has to meet one often."""
    if state is None or config.empty_share == 0:
        return state
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step + 500_009)
    emptied = torch.rand(config.rows, generator=generator) < config.empty_share
    emptied = emptied[share_of(config.rows)]
    if not emptied.any():
        return state
    new = []
    for name, tensor in state._asdict().items():
        fill = -1 if name == "tokens" else 0
        mask = emptied.to(tensor.device)
        while mask.dim() < tensor.dim():
            mask = mask.unsqueeze(-1)
        new.append(tensor.masked_fill(mask, fill))
    return type(state)(*new)


@dataclasses.dataclass
class Meter:
    """What a run measures of itself: of the whole of it, and since the last logged row."""
    seconds: float = 0.0  # in training steps, the first ones and evaluation left out
    tokens: int = 0  # that were read in them
    peak_mb: float = 0.0
    validated: list[list[float]] = dataclasses.field(default_factory=list)  # [seconds, loss] each
    # since the last logged row: steps, and what they add up to
    steps: int = 0
    loss: float = 0.0
    top1: float = 0.0
    gate: float = 0.0

    def add(self, nll: float, top1: float, gate: float) -> None:
        """Count a step of these means over its tokens."""
        self.steps += 1
        self.loss += nll
        self.top1 += top1
        self.gate += gate

    def take_means(self) -> tuple[float, float, float]:
        """Means of loss, top1 and gate since the last row, which this one is."""
        means = self.loss / self.steps, self.top1 / self.steps, self.gate / self.steps
        self.steps, self.loss, self.top1, self.gate = 0, 0.0, 0.0, 0.0
        return means


def check_and_count(run: Run, means: Tensor, norm: Tensor) -> None:
    """Add a step, of means as of step_means, to the meter. Raises Diverged where its loss or
    gradient norm is not finite."""
    # One transfer a step: the loss must be looked at before the weights change.
    scalars = mean_over_ranks(torch.cat((means, norm.detach().view(1))))
    loss_value, nll, top1, gate_value, norm_value = scalars.tolist()
    if not math.isfinite(loss_value + norm_value):
        raise Diverged(f"{run.arm} at step {run.step}: loss {loss_value}, gradient norm "
                       f"{norm_value}; the last good checkpoint is {run.last_saved or 'none yet'}; "
                       "try a smaller --lr, a smaller --grad_clip, or --precision float32")
    run.meter.add(nll, top1, gate_value)


def make_optimizer(model: GPT2WithMemory, config: Config) -> torch.optim.Optimizer:
    """AdamW, fused; weight decay on matrices only; the memory's rate is lr * memory_lr. The plain
    DNC (empty_slot False) wants 0.1: reads that cannot be empty share a large common part, and one
    Adam step of read_proj at the controller's rate moves every logit at once."""
    parts = [(model.controller, 1.0)]
    if model.memory is not None:
        parts.append((model.memory, config.memory_lr))
    groups = []
    for matrices in (True, False):
        for part, scale in parts:
            chosen = [p for p in part.parameters() if (p.dim() >= 2) == matrices]
            decay = config.weight_decay if matrices else 0.0
            groups.append({"params": chosen, "scale": scale, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def set_rates(run: Run) -> None:
    """Give every parameter group its rate of this step."""
    config = run.config
    floor = 0.1 if config.lr_schedule == "cosine" else 1.0
    start, end = schedule(run)
    rate = config.lr * rate_share(run.step - start, end - start, config.lr_warmup, floor)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def schedule(run: Run) -> tuple[int, int]:
    """Between which steps the rate runs through its schedule. That of a finished run which was
    lengthened is a new cosine over the steps that are new, or the constant rate that it had."""
    if not run.lengthened:
        return 0, run.total_steps
    if run.config.lr_schedule == "constant":
        return 0, run.lengthened[0]
    return run.lengthened[-1], run.total_steps


METRICS_FILE = "metrics.jsonl"


def log_row(run: Run, split: str, metrics: dict) -> None:
    """Append one row to the history and to metrics.jsonl."""
    row = {"arm": run.arm, "seed": run.config.seed, "step": run.step, "split": split, **metrics}
    append_metrics(row, run.config)
    run.history.append(row)


def append_metrics(row: dict, config: Config) -> None:
    """Append one row to metrics.jsonl, and its figures to TensorBoard's. Raises ValueError where
    the disk is full."""
    if rank_and_size().rank > 0:
        return
    path = Path(config.plot_dir) / METRICS_FILE
    with growing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if config.tensorboard:
        name = f"{row['arm']}, seed {config.seed}, rate {config.lr:g}"
        writer = tensorboard_writer(Path(config.plot_dir) / "tensorboard" / name)
        for key, value in row.items():
            if isinstance(value, float):
                writer.add_scalar(f"{key}/{row['split']}", value, row["step"])
        writer.flush()


@functools.cache
def tensorboard_writer(folder: Path | None):
    """A torch SummaryWriter of a folder, in which earlier curves are hidden; None only looks
    whether there can be one. Raises ValueError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard = True: needs a package; pip install tensorboard") from None
    return SummaryWriter(folder, purge_step=0) if folder else None


def log_train(run: Run) -> str:
    """Log the means since the last logged step; returns what the bar shows."""
    loss, top1, gate = run.meter.take_means()
    row = {"loss": loss, "ppl": perplexity(loss), "top1_acc": top1,
           "lr": run.optimizer.param_groups[0]["lr"]}
    if run.config.memory == "dnc":
        row["avg_gate"] = gate
    log_row(run, "train", row)
    return f"loss {loss:.3f} ppl {row['ppl']:.1f} gate {gate:.2f} tok/s {run.tokens_per_s:,.0f}"


def validation_due(run: Run) -> bool:
    """Whether this step ends with a validation that a resumed run has not done already."""
    at_end = run.step >= run.total_steps
    if run.step == 0 or not (at_end or run.step % run.config.save_every_steps == 0):
        return False
    done = {row["step"] for row in run.history if row["split"] == "validation"}
    return run.step not in done


def validate(run: Run, corpus: "Corpus", stop: "StopSignal") -> None:
    """Log the metrics of the first eval_tokens of validation; save, unless the arm is about to be
    saved as finished."""
    stream = corpus.valid[: run.config.eval_tokens + 1]
    with nothing_lost(run, corpus):
        metrics = evaluate(run.model, stream, run.config, stop)["metrics"]
        log_row(run, "validation", metrics)
    run.meter.validated.append([run.meter.seconds, metrics["loss"]])
    if run.step < run.total_steps:
        save_checkpoint(run, corpus)


def finish(run: Run, corpus: "Corpus", stop: "StopSignal") -> None:
    """Score validation and test, and save the finished arm."""
    run.meter.peak_mb = max(peak_memory_mb(run.device), run.meter.peak_mb)
    print(f"{run.arm}: evaluating on validation and test", flush=True)
    if rank_and_size().size > 1:  # nothing_lost saves for one process alone
        save_checkpoint(run, corpus)
    with nothing_lost(run, corpus):
        run.results = final_results(run, corpus, stop)
    save_checkpoint(run, corpus, final=True)


@contextlib.contextmanager
def nothing_lost(run: Run, corpus: "Corpus") -> Iterator[None]:
    """Save what was trained where a block between two steps fails: no memory left to evaluate, a
    full disk. Of several ranks the others may have gone on, so that none saves alone."""
    try:
        yield
    except Exception:  # a StopSignal is none
        if rank_and_size().size == 1:
            save_checkpoint(run, corpus)
        raise


def final_results(run: Run, corpus: "Corpus", stop: "StopSignal") -> dict:
    """The evaluations of validation and test, of validation with memory swapped and emptied as
    well, and what the run cost."""
    config = run.config
    end = config.final_eval_tokens + 1 if config.final_eval_tokens else None
    valid, test = corpus.valid[:end], corpus.test[:end]
    results = {
        "valid": evaluate(run.model, valid, config, stop) | text_size(corpus.tokenizer, valid),
        "test": evaluate(run.model, test, config, stop, brief=True)
        | text_size(corpus.tokenizer, test),
        "sees_ahead": sees_ahead(run.model, corpus.valid, config),
        "steps": run.step,
        "seconds": run.meter.seconds,
        "parameters": count_parameters(run.model),
        "peak_mb": run.meter.peak_mb,
        "tokens_per_s": run.tokens_per_s,
    }
    if run.model.memory is not None and config.carry_memory:
        for memory in ("swapped", "emptied"):
            results[memory] = evaluate(run.model, valid, config, stop, brief=True, memory=memory)
    return results


def timed_step(run: Run, forward: nn.Module, rows: Tensor, warm: bool) -> None:
    """A training step, on the clock once the first ones have warmed up."""
    clock = time.perf_counter()
    train_step(run, forward, rows)  # its transfer to the host has synchronised
    if warm:
        run.meter.seconds += time.perf_counter() - clock
        run.meter.tokens += run.config.batch_size * run.config.seq_len


def train(run: Run, corpus: "Corpus", forward: nn.Module, stop: "StopSignal") -> None:
    """Train, evaluate on validation and test, and save one arm. Raises StopSignal, once saved."""
    from tqdm import tqdm

    config, started = run.config, run.step
    rows = rows_of_run(run, corpus)
    peak_memory_mb(run.device, reset=True)
    bar = tqdm(total=run.total_steps, initial=run.step, desc=run.arm, unit="step",
               disable=rank_and_size().rank > 0)
    with stop.held(), contextlib.closing(bar):
        try:
            while True:
                if validation_due(run):
                    validate(run, corpus, stop)
                if run.step >= run.total_steps:
                    break
                stop.check_together()
                timed_step(run, forward, rows, warm=run.step >= started + 3)
                bar.update()
                if run.step % config.log_every_steps == 0 or run.step == run.total_steps:
                    with nothing_lost(run, corpus):
                        bar.set_postfix_str(log_train(run))
            bar.close()
            finish(run, corpus, stop)
        except StopSignal:
            save_checkpoint(run, corpus)
            raise


def peak_memory_mb(device: torch.device, reset: bool = False) -> float:
    """Peak MiB since the reset, of the device or (CPU) of the process; NaN where none can tell."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        peak_kb = re.search(r"VmHWM:\s+(\d+)", status)[1]
        return int(peak_kb) / 1024
    except (OSError, TypeError):
        return math.nan


def count_parameters(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(parameter.numel() for parameter in module.parameters())


# ══ Head and loss, further: the mixture, logits a chunk at a time, what memory changes ═══════════
class Pointer(NamedTuple):
    """The part of a prediction that reads point to: p(y) = c0 softmax(E h_out)[y] + match(y), with
    match(y) = sum_i weights_i [tokens_i = y] and c0 = 1 - sum_i weights_i. It sums to one over the
    vocabulary. Shared by every memory whose reads point. Sources: pointer sentinel mixture (Merity
    et al. 2016), continuous cache (Grave et al. 2017)."""
    tokens: Tensor  # (M, N) ids; any id where the weight is 0
    weights: Tensor  # (M, N) >= 0, sum <= 1: mean of the heads' reads of slots that hold a token

    def rows(self, at) -> "Pointer":
        """The pointer of some of the M rows: a slice, or indices."""
        return Pointer(self.tokens[at], self.weights[at])

    def vocabulary(self) -> Tensor:
        """c0 (M,), the share that is left to the vocabulary."""
        # In bfloat16 the difference from 1 would be rounded to multiples of 0.004.
        return (1 - at_least_float32(self.weights).sum(-1)).clamp_min(1e-9)

    def match(self, targets: Tensor) -> Tensor:
        """match(y) of targets (M,)."""
        return (self.weights * (self.tokens == targets.unsqueeze(-1))).sum(-1)

    def nll(self, nll: Tensor, targets: Tensor) -> Tensor:
        """-log p(y) of targets (M,), from the vocabulary's own -log softmax(E h_out)[y] (M,)."""
        by_vocabulary = self.vocabulary().log() - nll
        return -torch.logaddexp(by_vocabulary, (self.match(targets) + 1e-30).log())

    def mix(self, log_p: Tensor) -> Tensor:
        """Log-probabilities (..., V) of the vocabulary -> log p."""
        p = log_p.exp() * self.vocabulary().unsqueeze(-1)
        return p.scatter_add_(-1, self.tokens, self.weights.to(p.dtype)).clamp_min_(1e-38).log_()

    def top1(self, best: Tensor, p_best: Tensor, p_held: Tensor) -> Tensor:
        """The token of the largest p (M,): the vocabulary's best, of probability p_best there, both
        (M,), or a token that is held, of probability p_held there (M, N). Without gradient."""
        tokens, order = self.tokens.sort(1)  # (M, N), equal tokens side by side
        weights = self.weights.detach().gather(1, order)
        differs = tokens[:, 1:] != tokens[:, :-1]
        group = F.pad(differs, (1, 0), value=False).cumsum(1)  # (M, N), one number a token
        sums = torch.zeros_like(weights).scatter_add_(1, group, weights)
        match = sums.gather(1, group)  # (M, N)

        share = self.vocabulary().detach()  # (M,)
        p = share.unsqueeze(1) * p_held.gather(1, order) + match
        p, at = p.max(1)
        held = tokens.gather(1, at.unsqueeze(1)).squeeze(1)
        return torch.where(p > share * p_best, held, best)


def point(trace: "DNCTrace | CacheTrace") -> Pointer:
    """The pointer of a trace, its B * T rows in one."""
    tokens = trace.tokens.flatten(0, 1)  # (B*T, N)
    weights = trace.read_weights.mean(2)
    weights = weights.flatten(0, 1) * (tokens >= 0)
    return Pointer(tokens.clamp_min(0), weights)


def head_loss(h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype,
              pointer: Pointer | None = None, lambda_vocabulary: float = 0.0
              ) -> tuple[Tensor, Tensor, Tensor]:
    """`chunked_head_loss`, or dnc_scan.head, the same function in less memory and time."""
    slices = logit_chunks(len(h), weight, tensors=1 if dtype == h.dtype else 2)
    try:
        from dnc_scan.head import head_loss as fast
    except ImportError:
        say_once("head: runs as a chunked F.cross_entropy, slower: put the folder dnc_scan beside "
                 "dnc_gpt2.py")
        fast = chunked_head_loss
    return fast(h, weight, targets, dtype, slices, pointer, lambda_vocabulary)


def chunked_head_loss(h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype,
                      slices: list[slice], pointer: Pointer | None = None,
                      lambda_vocabulary: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The readable LM head: a chunk of logits at a time, computed again in the backward.

    h (M, C), weight (V, C), targets (M,), dtype of the products, slices of the M rows, pointer of
    the M rows or None -> loss (), nll (M,), top1 (M,); a target of -100 counts 0 in all three. The
    loss is the mean nll; with a pointer, that of the mixture and lambda_vocabulary times that of
    the vocabulary alone: a token that memory knows would else teach the vocabulary nothing.
    """
    from torch.utils.checkpoint import checkpoint

    def score(x, target, held):  # (m, C), (m,), a pointer of m rows or None
        logits = F.linear(x.to(dtype), weight.to(dtype)).to(h.dtype)  # (m, V)
        alone = F.cross_entropy(logits, target, ignore_index=-100, reduction="none")
        p = logits.detach().softmax(-1)
        p_best, best = p.max(-1)
        if held is None:
            return alone, alone, best
        best = held.top1(best, p_best, p.gather(1, held.tokens))
        mixed = held.nll(alone, target) * (target != -100)
        return mixed, alone, best

    parts = []
    for rows in slices:
        held = None if pointer is None else pointer.rows(rows)
        parts.append(checkpoint(score, h[rows], targets[rows], held, use_reentrant=False))
    nll, alone, best = (torch.cat(part) for part in zip(*parts, strict=True))
    loss = nll.mean()
    if pointer is not None:
        loss = loss + lambda_vocabulary * alone.mean()
    return loss, nll.detach(), (best == targets).to(h.dtype)


LOGITS_AT_ONCE = 2**25  # elements of one chunk of logits (128 MiB in float32)


def logit_chunks(rows: int, weight: Tensor, tensors: int = 1) -> list[slice]:
    """Slices of rows of which that many tensors of logits, weight (V, C), fit LOGITS_AT_ONCE."""
    vocabulary = weight.shape[0]
    size = max(1, LOGITS_AT_ONCE // tensors // vocabulary)
    slices = []
    for start in range(0, rows, size):
        end = min(start + size, rows)
        slices.append(slice(start, end))
    return slices


@torch.no_grad()
def routing_effect(kind: str, weight: Tensor, *, h: Tensor, h_out: Tensor, nll: Tensor,
                   targets: Tensor, positions: Tensor, pointer: Pointer | None) -> Tensor:
    """What memory does at positions (B, P): the benefit NLL without - NLL with, or KL(with ||
    without), both (B, P) in nats. Logits without memory exist here alone, a chunk at a time."""
    first = torch.arange(len(h), device=h.device).unsqueeze(1) * h.shape[1]  # (B, 1)
    at = (first + positions).flatten()  # (B*P,)
    h, h_out, nll, targets = (x.flatten(0, 1)[at] for x in (h, h_out, nll, targets))
    effect = torch.zeros_like(nll)
    for rows in logit_chunks(len(h), weight, tensors=4):
        without = F.linear(h[rows], weight).float()  # (m, V)
        if kind == "kl":
            log_p = F.linear(h_out[rows], weight).float().log_softmax(-1)  # (m, V)
            if pointer is not None:
                log_p = pointer.rows(at[rows]).mix(log_p)
            log_q = without.log_softmax(-1)
            effect[rows] = (log_p.exp() * (log_p - log_q)).sum(-1)
        else:
            nll_without = F.cross_entropy(without, targets[rows], reduction="none")
            effect[rows] = nll_without - nll[rows]
    return effect.view(positions.shape)


def routing_positions(config: Config, step: int, device: torch.device | str = "cpu"
                      ) -> Tensor | None:
    """Positions (rows, P) at which L_routing is computed, drawn from seed and step alone, of this
    rank's rows; None where there is no such loss: then no logits without memory are computed."""
    if config.memory != "dnc" or config.lambda_routing == 0:
        return None
    count = max(1, round(config.routing_fraction * config.step_len))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    order = torch.rand(config.rows, config.step_len, generator=generator).argsort(1)
    return order[share_of(config.rows), :count].to(device)  # (rows, P)


def weight_entropy(weights: Tensor) -> Tensor:
    """H(w / sum w) / log N of weightings (..., N), in [0, 1]; a gate that is nearly closed is no
    focus. Where nothing at all is written it is 0."""
    total = weights.sum(-1, keepdim=True)
    p = weights / total.clamp_min(1e-12)
    log_p = p.clamp_min(1e-12).log()
    entropy = -(p * log_p).sum(-1)
    slots = weights.shape[-1]
    return entropy / math.log(max(2, slots))


# ══ Evaluation: statistics of every token, and their means ═══════════════════════════════════════
# Columns of the statistics that evaluation takes of every token: of a prediction, of what a memory
# does to it, and of the gates with which a DNC writes.
MEMORY_STATS = ("nll_without", "kl")
GATE_STATS = ("gate", "gate_squared", "write_rate", "sparsity", "written")
STATS = ("nll", "top1", "top5", "confidence", "rank", "pred_entropy", *MEMORY_STATS, *GATE_STATS)
BIN = 64  # tokens of a row whose statistics are kept as one sum: finer than the units of `paired`


class Metric(NamedTuple):
    """One figure of the comparison: the mean of a STATS column, or a function of those means."""
    key: str
    label: str  # in the table; "" = not shown there
    form: str
    better: int  # +1 higher, -1 lower, 0 neither
    column: str  # of STATS, on which the paired test rests
    value: Callable[[dict[str, float]], float] | None = None  # of the means, by column


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; the argument is bounded, since exp(710) is no float."""
    return math.exp(min(700, loss))


def gate_std(mean: dict[str, float]) -> float:
    """Standard deviation of the write gates, from the means of gate and gate_squared."""
    return math.sqrt(max(0.0, mean["gate_squared"] - mean["gate"] ** 2))


def write_sparsity(mean: dict[str, float]) -> float:
    """Mean sparsity of the tokens that are written, which are all that have one; 0 without any."""
    return mean["sparsity"] / max(mean["written"], 1e-12)


METRICS = (
    Metric("ppl", "Perplexity ↓", ",.2f", -1, "nll", lambda mean: perplexity(mean["nll"])),
    Metric("top1_acc", "Top-1 accuracy ↑", ".4f", 1, "top1"),
    Metric("avg_gate", "Avg write gate", ".4f", 0, "gate"),
    Metric("write_sparsity", "Write sparsity ↑", ".4f", 0, "sparsity", write_sparsity),
    Metric("mem_kl", "Memory KL ↑", ".4f", 1, "kl"),
    Metric("loss", "Loss (nats) ↓", ".4f", -1, "nll"),
    Metric("bpt", "Bits per token ↓", ".4f", -1, "nll", lambda mean: mean["nll"] / math.log(2)),
    Metric("top5_acc", "Top-5 accuracy ↑", ".4f", 1, "top5"),
    Metric("confidence", "Confidence ↑", ".4f", 1, "confidence"),
    Metric("mean_rank", "Mean rank ↓", ",.1f", -1, "rank"),
    Metric("pred_entropy", "Prediction entropy", ".4f", 0, "pred_entropy"),
    Metric("gate_std", "Gate std", ".4f", 0, "gate_squared", gate_std),
    Metric("write_rate", "Write rate", ".4f", 0, "write_rate"),
    Metric("loss_without", "", ".4f", -1, "nll_without"),
)


def next_token_log_p(h: Tensor, weight: Tensor, pointer: Pointer | None) -> Tensor:
    """log p of every token of the vocabulary (M, V): h (M, C), weight (V, C), pointer of M rows."""
    log_p = (h @ weight.T).log_softmax(-1)
    return log_p if pointer is None else pointer.mix(log_p)


def next_token_nll(h: Tensor, weight: Tensor, target: Tensor, pointer: Pointer | None) -> Tensor:
    """-log p of one token a row, target (M, 1) -> (M, 1): of `next_token_log_p` this column alone,
    without the mixture over the whole vocabulary. Of a mixture it is at most 69 nats (there 87)."""
    target = target.squeeze(1)
    nll = F.cross_entropy(h @ weight.T, target, reduction="none")  # (M,)
    if pointer is not None:
        nll = pointer.nll(nll, target)
    return nll.unsqueeze(1)


@torch.no_grad()
def log_probabilities(model: GPT2WithMemory, tokens: Tensor, state: tuple | None) -> Tensor:
    """log p of every token of the vocabulary after each of tokens (B, L) -> (B, L, V), all of it at
    once; logits as of `measure`."""
    with model.autocast(tokens.device):
        _, h_out, _, trace = model.hidden(tokens, state)
    h_out = h_out.flatten(0, 1).float()
    weight = model.head_weight().float()
    log_p = next_token_log_p(h_out, weight, model.pointer(trace))  # (B * L, V)
    return log_p.view(*tokens.shape, -1)


def prediction_columns(log_p: Tensor, p: Tensor, target: Tensor) -> list[Tensor]:
    """The first six STATS of log-probabilities (M, V), their exponentials p and targets (M, 1),
    each (M, 1). Ties count against the model in top-k, and for it in rank."""
    log_p_target = log_p.gather(1, target)  # (M, 1)
    count = functools.partial(torch.sum, dim=-1, keepdim=True, dtype=torch.int32)
    larger = count(log_p > log_p_target)
    no_smaller = count(log_p >= log_p_target)  # the target among them
    minus_entropy = (p.unsqueeze(1) @ log_p.unsqueeze(2))[:, 0]  # (M, 1)
    return [
        -log_p_target,
        no_smaller <= 1,
        no_smaller <= 5,
        log_p_target.exp(),
        1 + larger,
        -minus_entropy,
    ]


def memory_columns(p: Tensor, log_q: Tensor, target: Tensor, minus_entropy: Tensor
                   ) -> list[Tensor]:
    """MEMORY_STATS of probabilities p with memory and log-probabilities without (M, V), targets
    and -H(p) (M, 1); each (M, 1)."""
    cross = (p.unsqueeze(1) @ log_q.unsqueeze(2))[:, 0]  # (M, 1)
    return [
        -log_q.gather(1, target),
        minus_entropy - cross,
    ]


def gate_columns(trace: tuple | None, rows: slice) -> list[Tensor]:
    """GATE_STATS of M of the B * T rows of a trace, each (M, 1); [] where it has no gates."""
    if not isinstance(trace, DNCTrace):
        return []
    gate = trace.write_gate.reshape(-1, 1)[rows]  # (M, 1)
    write_weights = trace.write_weights.flatten(0, 1)[rows]  # (M, N)
    spread = weight_entropy(write_weights).unsqueeze(1)  # (M, 1)
    written = gate > 0
    return [
        gate,
        gate * gate,
        gate > 0.7,
        (1 - spread) * written,
        written,
    ]


def token_statistics(h: Tensor, h_out: Tensor, targets: Tensor,
                     weight: Tensor, trace: DNCTrace | None, brief: bool,
                     pointer: Pointer | None = None) -> Tensor:
    """The STATS of every token (brief: the nll, the rest 0): h, h_out (B, L, C), targets (B, L),
    weight (V, C) -> (B, L, K). Logits in float32 and in chunks: ties among bfloat16 logits would
    flatter rank and accuracy."""
    out = torch.zeros(targets.numel(), len(STATS), device=h.device)  # (B*L, K)
    has_memory = trace is not None or h_out is not h  # without one they are the same tensor
    h, h_out = h.flatten(0, 1).float(), h_out.flatten(0, 1).float()  # (B*L, C)
    at, weight = targets.reshape(-1, 1), weight.float()
    for rows in logit_chunks(len(out), weight):
        target = at[rows].clamp_min(0)  # (M, 1)
        held = None if pointer is None else pointer.rows(rows)
        if brief:
            columns = [next_token_nll(h_out[rows], weight, target, held)]
        else:
            log_p = next_token_log_p(h_out[rows], weight, held)  # (M, V)
            p = log_p.exp()
            columns = prediction_columns(log_p, p, target)
            if has_memory:
                log_q = next_token_log_p(h[rows], weight, None)  # (M, V)
                columns += memory_columns(p, log_q, target, -columns[-1])
                columns += gate_columns(trace, rows)
        taken = torch.cat([column.float() for column in columns], dim=1)
        out[rows, : taken.shape[1]] = taken
    out = out * (at != -100)
    return out.view(*targets.shape, len(STATS))


@torch.no_grad()
def evaluate(model: GPT2WithMemory, stream: Tensor, config: Config, stop: "StopSignal",
             brief: bool = False, memory: Literal["carried", "swapped", "emptied"] = "carried"
             ) -> dict:
    """Score every token of a stream but the first, memory carried along each row from an empty
    state. Swapped: at each window start every row goes on from the state of the row before it;
    after eval_rows windows that is its own again, which a memory of that reach finds. Emptied: at
    each window start every row goes on from an empty state.

    Returns `metrics` (means over tokens; brief: of the loss alone), `nll` (rows, length) of every
    token, and `sums` (bins, rows, K) of STATS and `counts` (bins, rows) of scored tokens: a bin is
    BIN tokens of a row, so that other units of text can be tried without scoring it again.
    """
    inputs, targets = evaluation_rows(stream, config.eval_rows)
    mine = share_of(config.eval_rows)  # no rows where there are more ranks than rows
    model.eval()
    taken = measure_rows(model, inputs[mine], targets[mine], stop, brief, memory)
    model.train()
    stats = torch.cat([part for part in of_every_rank(taken) if len(part)])  # (rows, length, K)
    sums = [part.double().sum(1) for part in stats.split(BIN, 1)]
    counts = [part.sum(1) for part in (targets != -100).split(BIN, 1)]
    sums, counts = torch.stack(sums), torch.stack(counts)
    metrics = means(sums, counts, lacking_stats(config), brief=brief)
    return {"metrics": metrics, "sums": sums, "counts": counts, "nll": stats[..., 0].clone()}


def measure_rows(model: GPT2WithMemory, inputs: Tensor, targets: Tensor, stop: "StopSignal",
                 brief: bool, memory: str) -> Tensor:
    """The STATS of `evaluate` of every token of rows of inputs and targets, (rows, length) -> on
    the CPU (rows, length, K)."""
    device, length = model.head_weight().device, model.config.seq_len
    state = model.init_state(len(inputs))
    taken = []
    for x, y in zip(inputs.split(length, 1), targets.split(length, 1), strict=True):  # (rows, T)
        stop.check_together()
        if memory == "swapped":
            state = roll_rows(state)
        if memory == "emptied":
            state = model.init_state(len(inputs))
        if len(x):
            stats, state = model.measure(x.to(device), y.to(device), state, brief)
            taken.append(stats.cpu())
    return torch.cat(taken, dim=1) if taken else torch.zeros(0)


def text_size(tokenizer: object, stream: Tensor) -> dict[str, int]:
    """Words, between white space, and bytes, in UTF-8, of what a stream scores: all but its first
    token. With them figures are comparable across tokenizers."""
    text = tokenizer.decode(stream[1:].tolist(), skip_special_tokens=False)
    return {"words": len(text.split()), "bytes": len(text.encode(errors="replace"))}


@torch.no_grad()
def sees_ahead(model: GPT2WithMemory, stream: Tensor, config: Config) -> float:
    """By how many nats predictions of a stream's first windows move when tokens that come later are
    exchanged: 0 but for rounding, or the arm sees what it is to predict."""
    device = model.head_weight().device
    length = min(2 * config.seq_len, len(stream) - 1)
    at = max(1, length - max(1, config.seq_len // 2))
    tokens = stream[:length].to(device)
    targets = stream[1 : length + 1].to(device)
    exchanged = (targets[at:] + 1) % model.head_weight().shape[0]
    changed = torch.cat((tokens[:at], exchanged))

    scores = []
    model.eval()
    for version in (tokens, changed):
        inputs = version.unsqueeze(0).split(config.seq_len, 1)
        wanted = targets.unsqueeze(0).split(config.seq_len, 1)
        state = model.init_state(1)
        nll = []
        for x, y in zip(inputs, wanted, strict=True):
            stats, state = model.measure(x, y, state, brief=True)
            nll.append(stats[0, :, 0])
        before = torch.cat(nll)[:at]  # of the inputs before those that were exchanged
        scores.append(before)
    model.train()
    moved = scores[1] - scores[0]
    return moved.abs().max().item()


def lacking_stats(config: Config) -> tuple[str, ...]:
    """The STATS that an arm does not have: without a memory, or with one that has no gates."""
    if config.memory == "dnc":
        return ()
    return GATE_STATS if config.memory != "none" else MEMORY_STATS + GATE_STATS


def means(sums: Tensor, counts: Tensor, lacking: tuple[str, ...], brief: bool
          ) -> dict[str, float]:
    """METRICS of evaluate's sums and counts; of the loss alone if brief, without those of the STATS
    that are lacking."""
    mean_of_columns = sums.sum((0, 1)) / counts.sum()  # (K,)
    mean = dict(zip(STATS, mean_of_columns.tolist(), strict=True))
    metrics = {}
    for metric in METRICS:
        if brief and metric.column != "nll":
            continue
        if metric.column in lacking:
            continue
        metrics[metric.key] = metric.value(mean) if metric.value else mean[metric.column]
    return metrics


# ══ Comparison: table, memory controls, write inspection, plots ══════════════════════════════════
class Paired(NamedTuple):
    """By how much the mean of a STATS column is higher in one arm than in another, of the same
    seeds and text."""
    mean: float
    half: float  # of the 95 % interval
    p: float  # of no difference, two-sided

    @property
    def sign(self) -> int:
        """+1 / -1 where the interval lies above / below zero; else 0."""
        if abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def paired(reference: list[dict], other: list[dict], column: str) -> Paired:
    """Compare evaluations of the same text, one a seed, `other` minus `reference`.

    The units of text are the whole rows of the evaluation: articles are longer than windows, so
    that eighths of a row are still alike, and call two identical arms different 20 times in 100.
    The variance is that between rows (of the mean over seeds) plus that between seeds (of the mean
    over text): together no less than that of two crossed random effects, text and seed. Student's
    t has the degrees of freedom of the seeds where there are several: those of both variances
    together (Satterthwaite) call two identical arms different 11 times in 100.
    """
    at = STATS.index(column)
    differences = []
    for old, new in zip(reference, other, strict=True):
        differences.append(new["sums"][..., at] - old["sums"][..., at])
    differences = torch.stack(differences)  # (seeds, bins, rows)
    counts = reference[0]["counts"].double()  # (bins, rows), as of every seed
    by_seed = differences.sum((1, 2)) / counts.sum()  # (seeds,)
    mean = by_seed.mean().item()

    residual = differences.mean(0) - mean * counts  # (bins, rows): a ratio estimator
    of_rows = residual.sum(0) / counts.sum()  # (rows,)
    units, seeds = len(of_rows), len(by_seed)
    variance = (of_rows.square().sum() * units / (units - 1)).item()
    if seeds == 1:
        return student_interval(mean, variance, units - 1)
    return student_interval(mean, variance + by_seed.var().item() / seeds, seeds - 1)


def student_interval(mean: float, variance: float, freedom: int) -> Paired:
    """A mean of that variance, estimated with so many degrees of freedom."""
    from scipy.special import stdtr, stdtrit

    if variance == 0:
        return Paired(mean, 0.0, float(mean == 0))
    error = math.sqrt(variance)
    p = 2 * stdtr(freedom, -abs(mean) / error)
    return Paired(mean, float(stdtrit(freedom, 0.975)) * error, float(p))


def print_row(label: str, old: list[float], new: list[float], form: str, mark: str = "") -> None:
    """One line of a table: two arms' values, one a seed, and the relative change of their means; an
    em dash for what is not known, or not of every seed."""
    before, after = cell(old, form, 15), cell(new, form, 15)
    delta = "—"
    if None not in [*old, *new] and "—" not in before + after and sum(old):
        ratio = sum(new) / sum(old) - 1
        arrow = "="
        if ratio:
            arrow = "▲" if ratio > 0 else "▼"
        delta = f"{arrow}{abs(ratio):.1%} {mark}"
    print(f"  {label:<21} {before} {after}     {delta}".rstrip())


def print_metric(metric: Metric, old: list[dict], new: list[dict]) -> None:
    """The row of a metric, marked where both arms have it and `new` is really better or worse."""
    values = [[result["metrics"].get(metric.key) for result in arm] for arm in (old, new)]
    mark = ""
    if metric.better and None not in values[0] + values[1]:
        mark = MARKS[metric.better * paired(old, new, metric.column).sign]
    print_row(metric.label, *values, metric.form, mark)


def per_word(result: dict) -> float:
    """Perplexity per word: the same nats, over the words that they are of."""
    return perplexity(total_nats(result) / max(1, result["words"]))


def bits_per_byte(result: dict) -> float:
    """The same nats in bits, over the bytes of the text."""
    return total_nats(result) / math.log(2) / max(1, result["bytes"])


def total_nats(result: dict) -> float:
    """The nats of a whole evaluation."""
    return result["sums"][..., STATS.index("nll")].sum().item()


def split_of(runs: list[Run], split: str) -> list[dict]:
    """The evaluations of an arm on a split, one a seed."""
    return [run.results[split] for run in runs]


def values_of(runs: list[Run], key: str) -> list[float]:
    """A figure of an arm's results, one a seed."""
    return [run.results[key] for run in runs]


# Rows of the comparison besides METRICS: label, value of a validation result, format.
TEXT_ROWS = (("Word perplexity ↓", per_word, ",.2f"), ("Bits per byte ↓", bits_per_byte, ".4f"))
# Label, key of an arm's results, format.
COST_ROWS = (("Parameters", "parameters", ",.0f"), ("Training tokens/s ↑", "tokens_per_s", ",.0f"),
             ("Peak memory MiB ↓", "peak_mb", ",.0f"))


def print_comparison(reference: list[Run], other: list[Run], corpus: "Corpus") -> None:
    """Print the table of two arms; ✓ and ✗ stand only where `other` is really better or worse."""
    config = other[0].config
    old, new = split_of(reference, "valid"), split_of(other, "valid")
    left, right = reference[0].arm, other[0].arm
    print()
    print_heading(f"FINAL COMPARISON — {left} vs {right}")
    print(f"  {corpus.name}\n  {what_was_run(other, corpus)}")
    print_other_steps(other, [reference, other])
    print(f"\n  {'Metric':<21} {left:>15} {right:>15}     Δ\n{LINE}")
    for metric in METRICS:
        if metric.label:
            print_metric(metric, old, new)

    print_text_rows(old, new)
    test_perplexity = METRICS[0]._replace(label="Test perplexity ↓")
    print_metric(test_perplexity, split_of(reference, "test"), split_of(other, "test"))
    before, after = at_equal_time([reference, other])
    print_row("At equal time ↓", before, after, ",.2f")
    for label, key, form in COST_ROWS:
        print_row(label, values_of(reference, key), values_of(other, key), form)
    print(f"{LINE}\n{explanation(config)}")
    print_equal_time(config)


def print_text_rows(old: list[dict], new: list[dict]) -> None:
    """The rows of TEXT_ROWS, marked as the loss is."""
    mark = MARKS[-paired(old, new, "nll").sign]
    for label, value, form in TEXT_ROWS:
        before = [value(result) for result in old]
        after = [value(result) for result in new]
        print_row(label, before, after, form, mark)


def print_equal_time(config: Config) -> None:
    """Print what the figure at equal time is of."""
    print(f"  At equal time: perplexity of the first {config.eval_tokens:,} tokens of validation "
          "when the\n  fastest arm of this table had ended.")


def what_was_run(runs: list[Run], corpus: "Corpus") -> str:
    """Training and scored tokens and the seeds of an arm, in one line."""
    run = runs[0]
    scored = int(run.results["valid"]["counts"].sum())
    steps = run.results["steps"]
    tokens = steps * run.config.batch_size * run.config.seq_len
    seeds = [str(run.config.seed) for run in runs]
    word = "seed" if len(seeds) == 1 else "seeds"
    return (f"{tokens:,} training tokens in {steps:,} steps, {word} {', '.join(seeds)}; scored on "
            f"{scored:,} of the {len(corpus.valid) - 1:,} of validation")


def print_other_steps(named: list[Run], arms: list[list[Run]]) -> None:
    """Print which runs of a table were not trained in one go, or in other steps than those that it
    names."""
    usual = named[0].results["steps"]
    for run in itertools.chain.from_iterable(arms):
        which = f"  {run.arm}, seed {run.config.seed}"
        if run.results["steps"] != usual:
            print(f"{which}: {run.results['steps']:,} steps")
        if run.lengthened:
            ends = ", ".join(f"{step:,}" for step in run.lengthened)
            constant = run.config.lr_schedule == "constant"
            rates = "the constant rate" if constant else "a new cosine"
            print(f"{which}: finished before at step {ends}; from there on {rates}")


def explanation(config: Config) -> str:
    """What the marks of a table mean."""
    if len(config.seed_list) == 1:
        return ("  ✓ better, ✗ worse: the paired 95 % interval over rows of text excludes zero;\n"
                "  ≈ it does not. One seed: it covers the choice of text, not of initial weights.")
    return ("  ± is half the 95 % interval of the mean over seeds. ✓ better, ✗ worse: the 95 %\n"
            "  interval of the difference, paired over seeds and rows of text, excludes zero;\n"
            "  ≈ it does not.")


def at_equal_time(arms: list[list[Run]]) -> list[list[float | None]]:
    """Validation perplexity of every arm, one a seed, at the moment at which the fastest of them
    ended, by seconds in training steps; between two validations, on the straight line of the loss.
    None where nothing was validated until then."""
    table = [[] for _ in arms]
    for of_seed in zip(*arms, strict=True):
        ends = [run.results["seconds"] for run in of_seed if run.results["seconds"]]
        for values, run in zip(table, of_seed, strict=True):
            values.append(perplexity_after(run, min(ends, default=math.nan)))
    return table


def perplexity_after(run: Run, seconds: float) -> float | None:
    """Validation perplexity of a run after so many seconds of training."""
    before = [point for point in run.meter.validated if point[0] <= seconds]
    after = [point for point in run.meter.validated if point[0] > seconds]
    if not before:
        return None
    clock, loss = before[-1]
    if after:
        later, next_loss = after[0]
        loss += (next_loss - loss) * (seconds - clock) / (later - clock)
    return perplexity(loss)


# ── Many arms: one table, whatever their number ──────────────────────────────────────────────────
LEAK = 1e-3  # nats, far above what rounding moves


def reference_of(runs: dict[str, list[Run]]) -> str:
    """The arm that the others are compared with: the baseline where there is one."""
    return "baseline" if "baseline" in runs else next(iter(runs))


def print_tables(runs: dict[str, list[Run]], config: Config, corpus: "Corpus") -> None:
    """Print the comparison of all arms, of the DNC with its baseline, and the memory controls."""
    first = reference_of(runs)
    if len(runs) > 2 or len(config.seed_list) > 1 or config.lr_grid:
        print_arms(runs, config, corpus)
    if "dnc" in runs and first != "dnc":
        print_comparison(runs[first], runs["dnc"], corpus)
    if "dnc" in runs:
        print_controls(runs["dnc"], runs.get("baseline"))
    for of_arm in runs.values():
        leak = max(values_of(of_arm, "sees_ahead"))
        if not leak < LEAK:
            print(f"\n  ✗ {of_arm[0].arm} SEES AHEAD: other tokens later on moved its earlier "
                  f"predictions by up to\n  {leak:.3g} nats. It is no language model, and its "
                  "figures mean nothing.")


def print_arms(runs: dict[str, list[Run]], config: Config, corpus: "Corpus") -> None:
    """Print every arm's perplexities, then the differences with their intervals, then costs."""
    seeds = ", ".join(str(seed) for seed in config.seed_list)
    print()
    print_heading(f"ALL ARMS — {len(runs)} arms, seeds {seeds}")
    print(f"  {corpus.name}")
    reference = runs[reference_of(runs)]
    print(f"  {what_was_run(reference, corpus)}")
    print_other_steps(reference, [*runs.values()])
    print()
    print_perplexities(runs)
    print_changes(runs)
    print_costs(runs)
    print(LINE)
    print(explanation(config))
    print_equal_time(config)


def print_line(label: str, cells: list[str], label_width: int = 18, width: int = 17) -> None:
    """One line of a table: a label, and cells aligned right, at least a blank before each."""
    row = f"  {label:<{label_width}}"
    for text in cells:
        row += " " + text.rjust(width - 1)
    print(row)


def print_perplexities(runs: dict[str, list[Run]]) -> None:
    """Print an arm a row: its perplexities, one a seed or their mean and interval."""
    print_line("Arm", ["Validation ↓", "Test ↓", "Test, a word ↓", "Test, bits/byte ↓"])
    print(LINE)
    for of_arm in runs.values():
        test = split_of(of_arm, "test")
        cells = []
        for results in (split_of(of_arm, "valid"), test):
            perplexities = [result["metrics"]["ppl"] for result in results]
            cells.append(cell(perplexities, ",.2f"))
        cells.append(cell([per_word(result) for result in test], ",.2f"))
        cells.append(cell([bits_per_byte(result) for result in test], ".4f"))
        print_line(of_arm[0].arm, cells)
    print()


def print_changes(runs: dict[str, list[Run]]) -> None:
    """Print how perplexity changes from the reference to every arm, and from each to the DNC."""
    first = reference_of(runs)
    pairs = [(first, name) for name in runs if name != first]
    if "dnc" in runs and first != "dnc":
        pairs += [(name, "dnc") for name in runs if name not in (first, "dnc")]
    print_line("Change of perplexity", ["Validation", "Test"], 32, 36)
    print(LINE)
    for old, new in pairs:
        cells = []
        for split in ("valid", "test"):
            cells.append(change(split_of(runs[old], split), split_of(runs[new], split)))
        label = f"{runs[old][0].arm} → {runs[new][0].arm}"
        print_line(label, cells, 32, 36)
    print("  In brackets the 95 % interval; p of no difference.\n")


def change(old: list[dict], new: list[dict]) -> str:
    """The relative change of perplexity, its interval, p and mark."""
    difference = paired(old, new, "nll")
    ends = [difference.mean - difference.half, difference.mean + difference.half]
    low, high = (math.expm1(min(700, nats)) for nats in ends)
    middle = math.expm1(min(700, difference.mean))
    p = "p<.001"
    if difference.p >= 0.001:
        p = f"p={difference.p:.3f}"
    mark = MARKS[-difference.sign]
    return f"{middle:+.1%} [{low:+.1%}, {high:+.1%}] {p} {mark}"


def print_costs(runs: dict[str, list[Run]]) -> None:
    """Print an arm a row: parameters, its rate, speed, memory, what it is worth at equal time."""
    names = ["Parameters", "Peak rate", "Tokens/s ↑", "MiB ↓", "At equal time ↓"]
    print_line("Arm", names, width=16)
    print(LINE)
    equal_times = at_equal_time([*runs.values()])
    for of_arm, equal in zip(runs.values(), equal_times, strict=True):
        cells = [
            format(of_arm[0].results["parameters"], ","),
            format(of_arm[0].config.lr, "g"),
            cell(values_of(of_arm, "tokens_per_s"), ",.0f"),
            cell(values_of(of_arm, "peak_mb"), ",.0f"),
            cell(equal, ",.2f"),
        ]
        print_line(of_arm[0].arm, cells, width=16)


def print_controls(dnc: list[Run], baseline: list[Run] | None) -> None:
    """Print validation perplexity as it is, with reads zeroed, with memory swapped or emptied."""
    as_is = split_of(dnc, "valid")
    # read_proj has no bias: zeroed reads give the logits without memory, which are measured too.
    nll, nll_without = STATS.index("nll"), STATS.index("nll_without")
    zeroed = []
    for result in as_is:
        sums = result["sums"].clone()
        sums[..., nll] = sums[..., nll_without]
        zeroed.append({**result, "sums": sums})
    controls = {"reads zeroed": zeroed}
    for name in ("swapped", "emptied"):
        if all(name in run.results for run in dnc):
            controls[f"memory {name}"] = values_of(dnc, name)
    if baseline is not None:
        controls[baseline[0].arm] = split_of(baseline, "valid")

    print()
    print_heading(f"Does the gain come from memory?   {dnc[0].arm}, validation")
    print(f"  {'Perplexity ↓':<21} {'as it is':>15} {'changed':>15}     Δ\n{LINE}")
    for label, changed in controls.items():
        old, new = ([perplexity(total_nats(result) / int(result["counts"].sum()))
                     for result in results] for results in (as_is, changed))
        mark = MARKS[-paired(as_is, changed, "nll").sign]
        print_row(label, old, new, ",.2f", mark)
    print("  Zeroed: h + 0 into the head. At each window start a row gets the state of the row\n"
          "  before it (swapped) or an empty one (emptied). Emptied loses what was carried over\n"
          "  from the row's own text; swapped that, and what another text's memory misleads.")


# ── Where the gain is ────────────────────────────────────────────────────────────────────────────
# Classes of tokens: the least value of each, and its name.
SINCE_USE = ((-1, "never before"), (0, "in the window"), (1, "1 window back"),
             (2, "2-3 windows back"), (4, "4-7 windows back"), (8, "8-15 windows back"),
             (16, "16 or more windows back"))
IN_TRAINING = ((0, "below 10 times"), (10, "10 to 99"), (100, "100 to 999"),
               (1_000, "1,000 to 9,999"), (10_000, "10,000 and more"))
# Label, field of Gains, format.
GAIN_ROWS = (("All", "total", "+.4f"), ("Tokens helped", "helped", ".1%"),
             ("Tokens hurt", "hurt", ".1%"))
HELPED = 0.01  # nats that a token has to change by to count as helped or hurt


class Gain(NamedTuple):
    """What an arm saves on one class of tokens, against the reference."""
    label: str
    share: float  # of all scored tokens
    nats: float  # saved on them, over all scored tokens: the classes add up to the whole gain


class Gains(NamedTuple):
    """Where an arm's gain over the reference is, on validation; the mean over seeds."""
    total: float  # nats a token
    since_use: list[Gain]  # by how long ago the token was last used in its row
    in_training: list[Gain]  # by how often it stands in the training split
    helped: float  # share of tokens
    hurt: float


def windows_since_use(inputs: Tensor, targets: Tensor, length: int) -> Tensor:
    """Of every target, how many windows of that length ago its token was last an input of its row,
    the current one at the latest; -1 where it never was. All (rows, L)."""
    since = torch.full_like(targets, -1)
    for row, (given, wanted) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        last = {}
        for place, (token, target) in enumerate(zip(given, wanted, strict=True)):
            last[token] = place
            if target in last:
                since[row, place] = place // length - last[target] // length
    return since


def by_class(value: Tensor, saved: Tensor, classes: tuple) -> list[Gain]:
    """Sum what was saved (tokens,) by the class that a value (tokens,) falls into."""
    edges = torch.tensor([least for least, _ in classes[1:]])
    which = torch.bucketize(value, edges, right=True)
    gains = []
    for number, (_, label) in enumerate(classes):
        chosen = which == number
        gains.append(Gain(label, chosen.double().mean().item(),
                          (saved * chosen).mean().item()))
    return gains


def gains_of(reference: list[Run], other: list[Run], corpus: "Corpus", config: Config) -> Gains:
    """Where an arm's gain over the reference is."""
    nll = []
    for runs in (reference, other):
        of_seeds = torch.stack([result["nll"] for result in split_of(runs, "valid")])
        nll.append(of_seeds.double().mean(0))  # (rows, L)
    scored_tokens = int(reference[0].results["valid"]["counts"].sum())
    inputs, targets = evaluation_rows(corpus.valid[: scored_tokens + 1], config.eval_rows)
    scored = targets != -100
    saved = (nll[0] - nll[1])[scored]  # (tokens,)
    since = windows_since_use(inputs, targets, config.seq_len)[scored]
    times = torch.bincount(corpus.train, minlength=corpus.vocab_size)[targets[scored]]
    return Gains(
        total=saved.mean().item(),
        since_use=by_class(since, saved, SINCE_USE),
        in_training=by_class(times, saved, IN_TRAINING),
        helped=(saved > HELPED).double().mean().item(),
        hurt=(saved < -HELPED).double().mean().item(),
    )


def print_gains(runs: dict[str, list[Run]], config: Config, corpus: "Corpus") -> dict[str, Gains]:
    """Print where every arm's gain over the reference is -> the gains by arm."""
    first = reference_of(runs)
    gains = {}
    for name, of_arm in runs.items():
        if name != first:
            gains[name] = gains_of(runs[first], of_arm, corpus, config)
    print()
    print_heading(f"Where the gain over {runs[first][0].arm} is: nats saved a token, validation")
    names = []
    for name in gains:
        short = runs[name][0].arm.removeprefix("GPT2 ")
        names.append(short.removeprefix("+ "))
    print_line("The token was last used", ["of tokens", *names], 24, 11)
    print(LINE)
    print_classes([of_arm.since_use for of_arm in gains.values()])
    print(f"{LINE}\n  The token stands in the training split")
    print_classes([of_arm.in_training for of_arm in gains.values()])
    print(LINE)
    for label, key, form in GAIN_ROWS:
        cells = [format(getattr(of_arm, key), form) for of_arm in gains.values()]
        print_line(label, ["", *cells], 24, 11)
    print(f"  Either block adds up to all. Helped, hurt: by more than {HELPED} nats.")
    return gains


def print_classes(arms: list[list[Gain]]) -> None:
    """Print one block: a class of tokens a row, an arm a column."""
    for of_class in zip(*arms, strict=True):
        share = format(of_class[0].share, ".1%")
        cells = [format(gain.nats, "+.4f") for gain in of_class]
        print_line(of_class[0].label, [share, *cells], 24, 11)


def plot_gains(gains: dict[str, Gains], runs: dict[str, list[Run]], path: Path, corpus: str
               ) -> None:
    """Bars from zero: what the DNC (else the last arm) saves by class; they add up to its gain."""
    name = "dnc" if "dnc" in gains else [*gains][-1]
    gain, first = gains[name], runs[reference_of(runs)][0].arm
    panels = {"the token was last used": gain.since_use,
              "times the token stands in training": gain.in_training}
    with dark_figure(path, 1, 2, (13, 4.6)) as (figure, axes):
        for axis, (title, rows) in zip(axes, panels.items(), strict=True):
            nats = [row.nats for row in rows]
            colors = [PALETTE[1] if value >= 0 else PALETTE[2] for value in nats]
            names = [f"{row.label}\n{row.share:.0%} of tokens" for row in rows]
            bars = axis.barh(names, nats, color=colors)
            values = [f" {value:+.3f} " for value in nats]
            axis.bar_label(bars, values, fontsize=9)
            axis.axvline(0, color="white", lw=0.8)
            axis.invert_yaxis()
            axis.margins(x=0.18)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("nats saved, over all tokens")
        figure.suptitle(
            f"Where {runs[name][0].arm} helps: the bars of a panel add up to {gain.total:+.3f} "
            f"nats a token over {first}\n({gain.helped:.0%} of tokens helped, {gain.hurt:.0%} "
            f"hurt)   {plain(corpus)}", fontsize=11)


# ── What is kept of a comparison ─────────────────────────────────────────────────────────────────
class Echo(io.StringIO):
    """Keeps what is printed, and prints it."""

    def __init__(self, screen) -> None:
        super().__init__()
        self.screen = screen

    def write(self, text: str) -> int:
        self.screen.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.screen.flush()


@contextlib.contextmanager
def recorded() -> Iterator[io.StringIO]:
    """Keep what is printed inside the block, besides printing it."""
    echo = Echo(sys.stdout)
    with contextlib.redirect_stdout(echo):
        yield echo


def kept_of(result: dict) -> dict:
    """What results.json has of an evaluation: figures, not the tensors they come from."""
    kept = {key: result[key] for key in ("metrics", "words", "bytes") if key in result}
    return kept | {"tokens": int(result["counts"].sum())}


def kept_of_run(run: Run) -> dict:
    """What results.json has of a run."""
    figures = {key: value for key, value in run.results.items() if not isinstance(value, dict)}
    for name, value in figures.items():
        if not math.isfinite(value):  # JSON has no NaN
            figures[name] = None
    splits = {key: kept_of(value) for key, value in run.results.items() if isinstance(value, dict)}
    history = [row for row in run.history if row["split"] == "validation"]
    return {"seed": run.config.seed, "lr": run.config.lr, "lengthened": run.lengthened,
            **figures, **splits, "validations": history}


def differences_of(runs: dict[str, list[Run]]) -> list[dict]:
    """Every pair of arms on both splits: the difference of their mean nats, paired."""
    rows = []
    for split in ("valid", "test"):
        results = {name: split_of(of_arm, split) for name, of_arm in runs.items()}
        for old, new in itertools.combinations(runs, 2):
            difference = paired(results[old], results[new], "nll")
            row = {"split": split, "from": old, "to": new}
            rows.append(row | difference._asdict())
    return rows


def write_results(runs: dict[str, list[Run]], gains: dict[str, Gains], config: Config,
                  corpus: "Corpus", hardware: "Hardware") -> dict:
    """Write results.json, for programs -> the facts of the run."""
    facts = run_facts(hardware.named)
    write_json({
        "run": facts,
        "corpus": corpus.name,
        "fingerprint": corpus.fingerprint,
        "config": dataclasses.asdict(config),
        "arms": {name: [kept_of_run(run) for run in of_arm] for name, of_arm in runs.items()},
        "differences": differences_of(runs),
        "gains": {name: kept_of_gains(of_arm) for name, of_arm in gains.items()},
    }, Path(config.plot_dir) / "results.json")
    return facts


def write_report(runs: dict[str, list[Run]], gains: dict[str, Gains], printed: str,
                 config: Config, corpus: "Corpus", hardware: "Hardware") -> None:
    """Write report.md, for people, and results.json, beside the pictures."""
    facts = write_results(runs, gains, config, corpus, hardware)
    path = Path(config.plot_dir) / "report.md"
    write_text(report_text(runs, facts, printed, config, corpus), path)
    print(f"wrote {path} and results.json")


def report_text(runs: dict[str, list[Run]], facts: dict, printed: str, config: Config,
                corpus: "Corpus") -> str:
    """report.md: what was run, on what and by what, the tables as printed, pictures, Config."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    fields = [f"{name} = {value!r}" for name, value in vars(config).items()]
    lines = [
        "# " + " vs ".join(of_arm[0].arm for of_arm in runs.values()),
        "",
        f"- command: `{facts['command']}`",
        f"- corpus: {corpus.name}, sha256 of its tokens {corpus.fingerprint}",
        f"- device: {facts['device']}, {config.precision}; {versions}",
        f"- source: dnc_gpt2.py, sha256 {facts['source']}",
        f"- every figure again, for programs: results.json; every logged step: {METRICS_FILE}",
        "", "```text", printed.strip("\n"), "```", "",
        "![training curves](training_curves.png)",
    ]
    if len(runs) > 1:
        lines.append("![where memory helps](where_memory_helps.png)")
    lines += ["", "## Config", "", "```text", *fields, "```", ""]
    return "\n".join(lines)


def kept_of_gains(gains: Gains) -> dict:
    """What results.json has of where an arm's gain is."""
    kept = gains._asdict()
    for name in ("since_use", "in_training"):
        kept[name] = [gain._asdict() for gain in kept[name]]
    return kept


@torch.no_grad()
def trace_text(model: GPT2WithMemory, ids: list[int]) -> tuple[DNCTrace, Tensor]:
    """Run T tokens through a model from an empty memory -> the trace without its batch, (T, …), and
    the STATS of what it says of every next token (T - 1, K)."""
    tokens = torch.tensor([ids], device=model.head_weight().device)  # (1, T)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    length = model.config.seq_len
    windows = zip(tokens.split(length, 1), targets.split(length, 1), strict=True)
    model.eval()
    state = model.init_state(1)
    traces, stats = [], []
    for window, target in windows:
        h, h_out, state, trace = model.hidden(window, state)
        pointer = model.pointer(trace)
        weight = model.head_weight()
        traces.append(trace)
        stats.append(token_statistics(h, h_out, target, weight, trace, False, pointer))
    whole = [torch.cat(parts, dim=1)[0].cpu() for parts in zip(*traces, strict=True)]
    return DNCTrace(*whole), torch.cat(stats, dim=1)[0, :-1].cpu()


class Raised(NamedTuple):
    """A token that the memory made more likely by pointing at an earlier one."""
    at: int  # its position
    source: int  # the position of the earlier token
    slot: int  # where that one was kept
    without: float  # probability of the token by GPT-2 alone, h + 0
    probability: float  # and with memory
    empty: float  # share of the read that fell on the empty slot, mean of the heads


def raised_tokens(ids: list[int], trace: DNCTrace, stats: Tensor, most: int = 5) -> list[Raised]:
    """The tokens whose log-probability a pointing memory raised most, the most first; arguments as
    `trace_text` returns them. The earlier token is that of the slot with the largest weight."""
    positions = torch.arange(len(ids)).unsqueeze(0)
    nowhere = torch.full((1, trace.tokens.shape[1]), -1)
    written_at = tokens_held(positions, trace.write_weights.unsqueeze(0), nowhere)[0]  # (T, N)
    nll = stats[:, STATS.index("nll")]  # (T - 1,)
    nll_without = stats[:, STATS.index("nll_without")]
    gains = nll_without - nll

    raised = []
    for t in gains.argsort(descending=True).tolist():
        if len(raised) == most or gains[t] <= 0:
            break
        weights = trace.read_weights[t].mean(0)  # (N,)
        match = weights * (trace.tokens[t] == ids[t + 1])
        slot = match.argmax().item()
        if match[slot] == 0:  # raised by what reads add to h
            continue
        raised.append(Raised(
            at=t + 1,
            source=written_at[t, slot].item(),
            slot=slot,
            without=math.exp(-nll_without[t]),
            probability=math.exp(-nll[t]),
            empty=1 - weights.sum().item(),
        ))
    return raised


def inspect_writes(model: GPT2WithMemory, tokenizer: object, text: str, folder: str, corpus: str
                   ) -> None:
    """Run a text from an empty memory: print each token's write gate and which tokens the memory
    raised most and from where, draw memory_trace.png."""
    ids = encode_text(tokenizer, text)
    require(len(ids) > 0, "text", text, "text that the tokenizer knows")
    trace, stats = trace_text(model, ids)
    words = []
    for token in ids:
        word = tokenizer.decode([token]).strip(" ")
        words.append(word.replace("\n", "\\n") or "␣")
    width = max(5, *map(len, words))
    print()
    print_heading("Write inspection — the gate at every token of the sample")
    print("  Token  Gate  bar")
    for word, gate in zip(words, trace.write_gate.tolist(), strict=True):
        print(f"  {word:<{width}}   {gate:.3f}  {'█' * round(gate * 30)}".rstrip())
    raised = raised_tokens(ids, trace, stats) if model.config.pointing else []
    if raised:
        print_raised(raised, words)
    plot_trace(words, trace, raised, Path(folder) / "memory_trace.png", corpus)


def print_raised(raised: list[Raised], words: list[str]) -> None:
    """Print the tokens that memory raised most, each with the earlier token that it points at."""
    width = max(len("Token"), *(len(words[row.at]) for row in raised))
    print()
    print_heading("Where memory raised a token most, and the earlier token it points at")
    print(f"  {'Token':<{width}}     GPT-2  with memory   points at")
    for row in raised:
        token = words[row.at]
        source = words[row.source]
        before = ""
        if row.source > 0:
            before = words[row.source - 1] + " "
        print(f"  {token:<{width}}   {row.without:7.2%}      {row.probability:7.2%}   "
              f"{before}[{source}] {row.at - row.source} back, slot {row.slot}, "
              f"{row.empty:.0%} of the read on the empty slot")


def plot_trace(words: list[str], trace: DNCTrace, raised: list[Raised], path: Path, corpus: str
               ) -> None:
    """Gate above, then write weights and read weights (mean of the heads), slots by tokens, and the
    share of the empty slot below. A ring marks a read that raised the next token: what it held."""
    T = len(words)
    step = max(1, T // 120)
    wide = max(8, min(40, 0.32 * T + 2))
    size = (wide, 11)
    read_weights = trace.read_weights.mean(1)  # (T, N)
    with dark_figure(path, 4, 1, size, sharex=True, height_ratios=[1, 2, 2, 1]) as (figure, axes):
        axes[0].bar(range(T), trace.write_gate.numpy(), color=PALETTE[5], width=0.8)
        axes[0].set(ylim=(0, 1), ylabel="write gate")
        axes[0].set_title(f"GPT2 + DNC, memory by token\n{plain(corpus)}", fontsize=10)
        panels = {"write": trace.write_weights, "read": read_weights}  # (T, N)
        for axis, (label, weights) in zip(axes[1:3], panels.items(), strict=True):
            image = axis.imshow(weights.T.numpy(), aspect="auto", cmap="magma")
            axis.set_ylabel(f"slot ({label} weights)")
            figure.colorbar(image, ax=axis, pad=0.01)
        ring = {"ms": 9, "mfc": "none", "mec": PALETTE[1], "mew": 1.5}
        for row in raised:
            place = (row.at - 1, row.slot)
            axes[2].plot(*place, "o", **ring)
            axes[2].annotate(plain(words[row.source]), place, (8, 6), color=PALETTE[1],
                             textcoords="offset points", fontsize=9)
        empty = 1 - read_weights.sum(1)  # (T,)
        axes[3].bar(range(T), empty.numpy(), color=PALETTE[0], width=0.8)
        axes[3].set(ylim=(0, 1), ylabel="read: empty slot")
        places = range(0, T, step)
        labels = [plain(word) for word in words[::step]]
        axes[3].set_xticks(places, labels, rotation=90, fontsize=8)


def plot_curves(runs: list[Run], path: Path, corpus: str) -> None:
    """Loss and top-1 accuracy over steps: train thin, validation dashed with markers."""
    colors = dict(zip(ARMS.values(), PALETTE, strict=False))
    styles = {"train": dict(lw=0.9, alpha=0.8),
              "validation": dict(lw=1.8, ls="--", marker="o", ms=5)}
    panels = {"loss": "CE loss (nats/token)", "top1_acc": "top-1 accuracy"}
    first = {run.arm: run for run in reversed(runs)}
    with dark_figure(path, 1, 2, (13, 5)) as (figure, axes):
        for axis, (key, label) in zip(axes, panels.items(), strict=True):
            for run in runs:
                for split, style in styles.items():
                    rows = [row for row in run.history if row["split"] == split]
                    steps = [row["step"] for row in rows]
                    values = [row[key] for row in rows]
                    line, = axis.plot(steps, values, color=colors[run.arm], **style)
                    if run is first[run.arm]:  # other seeds have the same colour
                        line.set_label(f"{run.arm}, {split}")
            axis.set(xlabel="step", ylabel=label)
            axis.grid(alpha=0.2)
            axis.legend(fontsize=9)
        title = " vs ".join(reversed(first))
        figure.suptitle(f"{title}\n{plain(corpus)}", fontsize=11)


# ══ Memory, further: Graves' own interface, temporal links, the other options ════════════════════
def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


COMMON = 1024  # first entries of a vocabulary; byte pairs are numbered by frequency


@torch.no_grad()
def surprisal(preceding: Tensor, tokens: Tensor, vocabulary: Tensor) -> Tensor:
    """How little GPT-2 alone expected each token, in nats: -log of x_t's share of softmax(E h_t-1)
    over x_t itself and the COMMON first entries. These hold half to three quarters of the whole sum
    where ids go by frequency: it reads about half a nat low, at a fraction of the cost.

    preceding (B, T, C) = h_t-1, tokens (B, T), vocabulary (V, C) -> (B, T), in float32 at least.
    """
    common = at_least_float32(vocabulary[:COMMON])
    embedding = at_least_float32(F.embedding(tokens, vocabulary))  # (B, T, C)
    with torch.autocast(preceding.device.type, enabled=False):
        h = at_least_float32(preceding)
        own = (h * embedding).sum(-1)  # (B, T), the logit of x_t
        total = (h @ common.T).logsumexp(-1)
    total = torch.where(tokens < COMMON, total, torch.logaddexp(total, own))
    return (total - own).clamp_min(0)


def skip_expected(x: Interface, state: DNCState, h: Tensor, tokens: Tensor, vocabulary: Tensor, *,
                  least: float) -> tuple[Interface, DNCState]:
    """Shut the write gates of x at tokens (B, T) of less surprisal than `least` nats -> x, and the
    state that knows the last of h (B, T, C). departs from Graves: memory is for what GPT-2 would
    not say anyway, and N slots reach further back when they hold that alone."""
    preceding = torch.cat((state.hidden.unsqueeze(1).to(h.dtype), h[:, :-1]), dim=1)
    is_written = surprisal(preceding, tokens, vocabulary) >= least
    x = x._replace(write_gate=x.write_gate * is_written)
    last = h[:, -1].detach().to(state.hidden.dtype, copy=True)  # a view would keep all of h
    return x, state._replace(hidden=last)


def pick_scan(scan: str, state: DNCState, options: DNCOptions) -> Callable:
    """The recurrence for such a state: dnc_loop, or dnc_scan, the same function fused, where it can
    run. Says once why it cannot; raises ValueError then if `scan` is "fused"."""
    if scan == "eager":
        return dnc_loop
    try:
        from dnc_scan import dnc_scan, refusal

        reason = refusal(state, options)
    except ImportError as error:
        reason = f"{error}; put the folder dnc_scan beside dnc_gpt2.py"
    require(scan == "auto" or not reason, "scan", scan, f"auto or eager here: {reason}")
    if reason:
        say_once(f"scan auto: the recurrence runs in the eager loop, slower: {reason}")
    return dnc_loop if reason else dnc_scan


class HiddenInterface(nn.Linear):
    """Graves' interface: all instructions from LN(h_t) by one matrix. `biases` are added to the
    initial biases of its parts, by their names."""

    def __init__(self, hidden_size: int, width: int, reads: int, options: DNCOptions,
                 biases: dict[str, float] | None = None) -> None:
        self.layout = (width, reads, options)
        sizes = interface_sizes(*self.layout)
        super().__init__(hidden_size, sum(sizes.values()))
        biases = biases or {}
        added = []
        for part, size in sizes.items():
            bias = biases.get(part, 0.0)
            added.append(torch.full((size,), bias))
        self.bias.data += torch.cat(added)

    def forward(self, normed: Tensor, before: Tensor | None, embedding: Tensor | None) -> Interface:
        """normed (B, T, C) = LN(h_t); the others are not looked at."""
        return split_interface(at_least_float32(super().forward(normed)), *self.layout)


def interface_sizes(width: int, reads: int, options: DNCOptions) -> dict[str, int]:
    """Sizes of the parts of one interface vector, in order; 0 for what is switched off."""
    key_width = options.key_width or width
    return {
        "write_key": key_width,
        "write_strength": 1,
        "erase": width,
        "write_vector": width,
        "write_gate": 1,
        "allocation_gate": 1,
        "read_keys": reads * key_width,
        "read_strengths": reads,
        "free_gates": reads,
        "read_modes": 3 * reads if options.use_links else 0,
        "masks": (reads + 1) * width if options.mask_min < 1 else 0,
        "sharpening": 2 * reads if options.sharpen_links else 0,
        "empty": reads if options.empty_slot else 0,
    }


def split_interface(z: Tensor, width: int, reads: int, options: DNCOptions) -> Interface:
    """Split interface vectors z (B, T, I) and apply the activations (Graves, "interface")."""
    B, T, _ = z.shape
    sizes = interface_sizes(width, reads, options)
    part = dict(zip(sizes, z.split([*sizes.values()], dim=-1), strict=True))

    read_modes = write_mask = read_masks = sharpening = None
    if options.use_links:
        read_modes = part["read_modes"].view(B, T, reads, 3).softmax(-1)
    if options.mask_min < 1:
        masks = part["masks"].sigmoid() * (1 - options.mask_min) + options.mask_min
        masks = masks.view(B, T, reads + 1, width)
        write_mask, read_masks = masks[:, :, 0], masks[:, :, 1:]  # (B, T, W), (B, T, R, W)
    if options.sharpen_links:
        sharpening = oneplus(part["sharpening"].view(B, T, reads, 2))

    return Interface(
        write_key=part["write_key"],
        write_strength=oneplus(part["write_strength"].squeeze(-1)),
        erase=part["erase"].sigmoid(),
        write_vector=part["write_vector"],
        write_gate=part["write_gate"].squeeze(-1).sigmoid(),
        allocation_gate=part["allocation_gate"].squeeze(-1).sigmoid(),
        read_keys=part["read_keys"].view(B, T, reads, -1),
        read_strengths=oneplus(part["read_strengths"]),
        free_gates=part["free_gates"].sigmoid(),
        read_modes=read_modes,
        write_mask=write_mask,
        read_masks=read_masks,
        sharpening=sharpening,
        empty=part["empty"] if options.empty_slot else None,
    )


def oneplus(x: Tensor) -> Tensor:
    """1 + log(1 + exp(x)), Graves' name for what strengths go through."""
    return 1 + F.softplus(x)


def link_instructions(z: Tensor, reads: int, options: DNCOptions
                      ) -> tuple[Tensor, Tensor | None]:
    """read_modes and sharpening of an Interface, from z (B, T, R * (3 or 5))."""
    parts = at_least_float32(z).unflatten(-1, (reads, -1))  # (B, T, R, 3 or 5)
    sharpening = oneplus(parts[..., 3:]) if options.sharpen_links else None
    return parts[..., :3].softmax(-1), sharpening


def link_update(link: Tensor, precedence: Tensor, write_weights: Tensor
                ) -> tuple[Tensor, Tensor]:
    """L_ij = (1 - w_i - w_j) L_ij + w_i p_j with zero diagonal, then p = (1 - sum w) p + w.

    link (B, N, N), precedence and write_weights (B, N) -> link, precedence.
    """
    w_i, w_j = write_weights.unsqueeze(2), write_weights.unsqueeze(1)  # (B, N, 1), (B, 1, N)
    link = (1 - w_i - w_j) * link + w_i * precedence.unsqueeze(1)  # (B, N, N)
    link = link.tril(-1) + link.triu(1)
    return link, (1 - write_weights.sum(-1, keepdim=True)) * precedence + write_weights


def follow_links(x: Interface, content: Tensor, previous: Tensor, link: Tensor,
                 options: DNCOptions) -> Tensor:
    """wr = pi_b L^T wr + pi_c c + pi_f L wr, wr the previous read weights. All but link (B, N, N)
    are (B, R, N), as is the result."""
    backward = previous @ link  # L^T wr: (B, R, N)
    forward = previous @ link.transpose(1, 2)  # L wr: (B, R, N)
    if options.sharpen_links:
        backward = sharpen(backward, x.sharpening[..., 0])
        forward = sharpen(forward, x.sharpening[..., 1])
    by_mode = torch.stack((backward, content, forward), dim=-1)  # (B, R, N, 3)
    return (by_mode @ x.read_modes.unsqueeze(-1)).squeeze(-1)  # (B, R, N)


def sharpen(weights: Tensor, strengths: Tensor) -> Tensor:
    """(S): ((d + eps) / max(d + eps))^s over its sum. weights (B, R, N), strengths (B, R)."""
    weights = weights + EPS
    powered = (weights / weights.amax(-1, keepdim=True)).pow(strengths.unsqueeze(-1))
    return powered / powered.sum(-1, keepdim=True)


# ══ Other memories: what a DNC has to be better than ═════════════════════════════════════════════
def build_memory(config: Config) -> nn.Module | None:
    """The memory that Config describes, None for "none". Each has init_state(batch) -> a NamedTuple
    of tensors, batch first, and forward(h, state, tokens, embedding, vocabulary) -> h_out, state,
    trace or None; h, h_out and the tokens' embedding are (B, T, C), tokens (B, T), the embedding of
    the whole vocabulary is (V, C)."""
    C, N, W = config.hidden_size, config.mem_slots, config.mem_width
    build = {
        "none": lambda: None,
        "dnc": lambda: build_dnc(config),
        "gru": lambda: GRUMemory(C, N, W),
        "delta": lambda: DeltaMemory(C, N, W, config.scan),
        "cache": lambda: CacheMemory(C, N),
    }
    return build[config.memory]()


def build_dnc(config: Config) -> DNCMemory:
    """The DNC that Config describes."""
    decay = config.usage_decay
    if decay == "auto":
        decay = max(0.0, 1 - 1.28 / config.mem_slots)
    options = DNCOptions(
        use_links=config.use_links,
        mask_min=config.mask_min,
        dealloc_wipe=config.dealloc_wipe,
        sharpen_links=config.sharpen_links,
        key_width=config.mem_width // 2 if config.split_rows else 0,
        usage_decay=decay,
        empty_slot=config.empty_slot,
    )
    return DNCMemory(config.hidden_size, config.mem_slots, config.mem_width, config.num_reads,
                     options, config.scan, row_key=config.row_key,
                     min_surprisal=config.min_surprisal)


def zeros_beside(parameter: Tensor, *shape: int) -> Tensor:
    """Zeros for a state on a parameter's device, of float32 at least."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.new_zeros(shape, dtype=dtype)


class GRUState(NamedTuple):
    """What one step of a GRUMemory hands to the next."""
    cells: Tensor  # (B, N * W) in (-1, 1)


class GRUMemory(nn.Module):
    """A GRU whose state has as many numbers as the DNC's matrix, N * W: is it the matrix that
    helps, or any state that crosses windows? Cho et al. 2014, arXiv 1406.1078, the reset gate
    inside as in torch.nn.GRU:

    r, z = sigmoid(x_rz + U_rz s), n = tanh(x_n + r * (U_n s)), s = (1 - z) n + z s,
    x = A B [LN(h_t), embedding of token t] + b of rank RANK, h_out = h + read_proj(D LN(s)).

    U is block-diagonal, as in the heads of sLSTM (Beck et al. 2024, arXiv 2405.04517): a full one
    would have 200 M numbers at the shipped sizes. There it has 1.95 M parameters, the DNC 0.70 M:
    so large a state needs them, and an arm to be beaten is given more rather than fewer.
    """
    RANK, BLOCK = 32, 32  # at most
    SPAN = 512  # tokens: at the start cells forget over 2 to 1 + SPAN tokens, evenly in the log

    def __init__(self, hidden_size: int, slots: int, width: int) -> None:
        super().__init__()
        self.size = size = slots * width
        rank = min(self.RANK, hidden_size)
        divisors = [k for k in range(1, self.BLOCK + 1) if size % k == 0]
        self.block = block = divisors[-1]  # K; G = N * W / K
        self.norm = nn.LayerNorm(hidden_size)
        self.reduce = nn.Linear(2 * hidden_size, rank, bias=False)
        self.expand = nn.Linear(rank, 3 * size)  # by block: r, z, n
        self.recurrent = nn.Parameter(torch.empty(size // block, block, 3 * block))
        self.read_norm = nn.LayerNorm(size)
        self.read_reduce = nn.Linear(size, rank, bias=False)
        self.read_proj = nn.Linear(rank, hidden_size, bias=False)
        self.set_initial_values()

    @torch.no_grad()
    def set_initial_values(self) -> None:
        """U as torch.nn.GRU has it; biases of z by Tallec & Ollivier 2018, arXiv 1804.11188, whose
        cells forget at different speeds; reads that add nothing."""
        bound = self.block ** -0.5
        nn.init.uniform_(self.recurrent, -bound, bound)
        nn.init.zeros_(self.expand.bias)
        log_spans = torch.linspace(0, math.log(self.SPAN), self.size)
        of_update = self.expand.bias.view(-1, 3, self.block)[:, 1]  # (G, K)
        of_update.copy_(log_spans.view(self.block, -1).T)  # every block has all speeds
        nn.init.zeros_(self.read_proj.weight)

    def init_state(self, batch: int) -> GRUState:
        return GRUState(zeros_beside(self.recurrent, batch, self.size))

    def forward(self, h: Tensor, state: GRUState, tokens: Tensor | None, embedding: Tensor,
                vocabulary: Tensor | None = None) -> tuple[Tensor, GRUState, None]:
        """h, embedding (B, T, C), state of B rows -> h_out (B, T, C), state after the last token.
        tokens and vocabulary are not looked at."""
        both = torch.cat((self.norm(h), embedding), dim=-1)  # (B, T, 2C)
        x = at_least_float32(self.expand(self.reduce(both)))  # (B, T, 3 N W)
        with torch.autocast(h.device.type, enabled=False):  # states are kept in float32
            cells = gru_loop(x, state.cells, self.recurrent)  # (B, T, N W)
        reads = self.read_reduce(self.read_norm(cells))  # (B, T, RANK)
        h_out = h + self.read_proj(reads)
        new = GRUState(cells[:, -1].clone())  # a view would keep all T alive
        return h_out, new, None


def gru_loop(x: Tensor, cells: Tensor, recurrent: Tensor) -> Tensor:
    """The readable recurrence of a GRU in G blocks of K: x (B, T, G * 3K), by block for r, z, n,
    cells (B, G * K), recurrent (G, K, 3K) -> the cells after each token (B, T, G * K)."""
    G, K, _ = recurrent.shape
    blocks = x.unflatten(-1, (G, 3 * K))  # (B, T, G, 3K)
    steps = blocks.permute(1, 2, 0, 3)  # (T, G, B, 3K)
    s = cells.unflatten(-1, (G, K)).transpose(0, 1)  # (G, B, K)
    states = []
    for step in steps:
        x_r, x_z, x_n = step.chunk(3, dim=-1)  # (G, B, K) each
        from_state = s @ recurrent  # (G, B, 3K)
        s_r, s_z, s_n = from_state.chunk(3, dim=-1)
        reset = (x_r + s_r).sigmoid()
        update = (x_z + s_z).sigmoid()
        new = (x_n + reset * s_n).tanh()
        s = (1 - update) * new + update * s
        states.append(s)
    by_row = torch.stack(states).permute(2, 0, 1, 3)  # (B, T, G, K)
    return by_row.flatten(2)


class DeltaState(NamedTuple):
    """What one step of a DeltaMemory hands to the next."""
    memory: Tensor  # (B, N, W)
    last: Tensor  # (B, C) LN(h) of the last token


class DeltaMemory(nn.Module):
    """The gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464) with one matrix of
    the DNC's shape, keys of N numbers and values of W:

    S_t = a_t (I - b_t k_t k_t^T) S_t-1 + b_t k_t v_t^T, o_t = S_t^T q_t,
    a_t = exp(-exp(A) softplus(.)), b_t = sigmoid(.), h_out = h + read_proj(RMSNorm(o) * SiLU(G)).

    Only the memory differs from the DNC's arm, not what it sees (RowInterface): a key of LN(h_t-1),
    a value of the embedding of token t, a_t and b_t of both, a query and G of LN(h_t). departs from
    Yang: no short convolutions, whose work the shift by one token does.
    """

    def __init__(self, hidden_size: int, slots: int, width: int, scan: str = "auto") -> None:
        super().__init__()
        self.scan = scan
        self.norm = nn.LayerNorm(hidden_size)
        self.key = nn.Linear(hidden_size, slots, bias=False)
        self.query = nn.Linear(hidden_size, slots, bias=False)
        self.value = nn.Linear(hidden_size, width, bias=False)
        self.gates = nn.Linear(2 * hidden_size, 2)  # of a, of b
        self.log_rate = nn.Parameter(torch.zeros(1))  # A
        self.read_norm = nn.RMSNorm(width, eps=1e-5)
        self.read_gate = nn.Linear(hidden_size, width, bias=False)
        self.read_proj = nn.Linear(width, hidden_size, bias=False)
        self.set_initial_values(slots)

    @torch.no_grad()
    def set_initial_values(self, slots: int) -> None:
        """Queries ask in the code of the keys; b is 1/2; a forgets over N tokens, as many as there
        are keys that do not disturb each other; reads add nothing."""
        nn.init.orthogonal_(self.key.weight)
        nn.init.orthogonal_(self.value.weight)
        self.query.weight.copy_(self.key.weight)
        nn.init.zeros_(self.gates.weight)
        forget = math.log(math.expm1(1 / slots))  # softplus of it is 1 / N
        self.gates.bias.copy_(torch.tensor([forget, 0.0]))
        nn.init.zeros_(self.read_proj.weight)

    def init_state(self, batch: int) -> DeltaState:
        hidden_size, width = self.read_proj.weight.shape
        slots = len(self.key.weight)
        return DeltaState(
            memory=zeros_beside(self.log_rate, batch, slots, width),
            last=zeros_beside(self.log_rate, batch, hidden_size),
        )

    def forward(self, h: Tensor, state: DeltaState, tokens: Tensor | None, embedding: Tensor,
                vocabulary: Tensor | None = None) -> tuple[Tensor, DeltaState, None]:
        """h, embedding (B, T, C), state of B rows -> h_out (B, T, C), state after the last token.
        tokens and vocabulary are not looked at."""
        normed = self.norm(h)
        before = one_earlier(normed, state.last)  # LN(h_t-1)
        instructions = self.instructions(normed, before, embedding)
        read_gate = at_least_float32(self.read_gate(normed))  # (B, T, W)
        recurrence = pick_delta(self.scan, state.memory)
        with torch.autocast(h.device.type, enabled=False):  # the matrix is kept in float32
            reads, memory = recurrence(*instructions, state.memory)
            reads = self.read_norm(reads) * F.silu(read_gate)  # (B, T, W)
        last = normed[:, -1].to(state.last.dtype, copy=True)
        new = DeltaState(memory, last)
        h_out = h + self.read_proj(reads)
        return h_out, new, None

    def instructions(self, normed: Tensor, before: Tensor, embedding: Tensor
                     ) -> tuple[Tensor, ...]:
        """LN(h_t), LN(h_t-1), embedding of token t (B, T, C) -> the first five of delta_loop."""
        both = torch.cat((before, embedding), dim=-1)  # (B, T, 2C)
        query = at_least_float32(self.query(normed))
        key = at_least_float32(self.key(before))
        value = at_least_float32(self.value(embedding))
        for_a, for_b = at_least_float32(self.gates(both)).unbind(-1)  # (B, T) each
        return (
            F.normalize(query, dim=-1),
            F.normalize(key, dim=-1),
            value,
            -self.log_rate.exp() * F.softplus(for_a),
            for_b.sigmoid(),
        )


def delta_loop(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, memory: Tensor
               ) -> tuple[Tensor, Tensor]:
    """The readable gated delta rule: queries, keys (B, T, N), values (B, T, W), log a_t and b_t
    (B, T), memory S (B, N, W) -> reads (B, T, W), memory after the last token."""
    q, k, v = (x.unsqueeze(2) for x in (q, k, v))  # (B, T, 1, N or W)
    a = log_a.exp()[..., None, None]  # (B, T, 1, 1)
    b = b[..., None, None]
    reads = []
    for q_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in (q, k, v, a, b)), strict=True):
        memory = a_t * memory  # (B, N, W)
        held = k_t @ memory  # (B, 1, W), what the key reads so far
        change = b_t * (v_t - held)
        memory = memory + k_t.transpose(1, 2) @ change
        read = q_t @ memory  # (B, 1, W)
        reads.append(read)
    reads = torch.cat(reads, dim=1)
    return reads, memory


def delta_chunks(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor,
                 memory: Tensor) -> tuple[Tensor, Tensor]:
    """`delta_loop` by flash-linear-attention's chunk_gated_delta_rule, the kernel, with one head;
    products in bf16."""
    q, k, v = (x.bfloat16().unsqueeze(2) for x in (q, k, v))  # (B, T, 1, N or W)
    reads, memory = kernel(
        q=q,
        k=k,
        v=v,
        g=log_a.unsqueeze(2),  # (B, T, 1)
        beta=b.unsqueeze(2),
        scale=1.0,
        initial_state=memory.unsqueeze(1),  # (B, 1, N, W)
        output_final_state=True,
    )
    return reads.squeeze(2).float(), memory.squeeze(1)


def pick_delta(scan: str, memory: Tensor) -> Callable:
    """The recurrence of a DeltaMemory: delta_loop, or delta_chunks where a GPU is under autocast
    and keys have at most 256 numbers. Says once where its kernels are not installed."""
    able = memory.is_cuda and torch.is_autocast_enabled("cuda") and memory.shape[1] <= 256
    if scan == "eager" or not able:
        return delta_loop
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        say_once("GPT2 + Delta: runs in the readable loop, slower: pip install "
                 "flash-linear-attention")
        return delta_loop
    return functools.partial(delta_chunks, chunk_gated_delta_rule)


class CacheState(NamedTuple):
    """The last N hidden states and what followed them, the newest last."""
    keys: Tensor  # (B, N, C) hidden states of unit length
    tokens: Tensor  # (B, N) id of the token that followed, -1 none; int64
    last: Tensor  # (B, C) the newest hidden state, whose next token is yet to come; zeros: none


class CacheTrace(NamedTuple):
    """Where a CacheMemory points at each token, for `point`."""
    read_weights: Tensor  # (B, T, 1, N), of sum lambda, or 0 while the cache is empty
    tokens: Tensor  # (B, T, N) id of the token that followed the state in a slot, -1 none


class CacheMemory(nn.Module):
    """The continuous neural cache (Grave et al. 2017, arXiv 1612.04426): nothing is learnt, theta
    and lambda are chosen on validation (`tune_cache`). With s over the last N states of which the
    next token is known at t,

    p(y) = (1 - lambda) softmax(E h_t)[y] + lambda sum_s softmax_s(theta cos(h_t, h_s)) [x_s+1 = y].
    """
    THETAS = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
    LAMBDAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)

    def __init__(self, hidden_size: int, slots: int) -> None:
        super().__init__()
        self.hidden_size, self.slots = hidden_size, slots
        self.register_buffer("theta", torch.tensor(8.0))
        self.register_buffer("share", torch.tensor(0.1))  # lambda

    def init_state(self, batch: int) -> CacheState:
        return CacheState(
            keys=zeros_beside(self.theta, batch, self.slots, self.hidden_size),
            tokens=torch.full((batch, self.slots), -1, device=self.theta.device),
            last=zeros_beside(self.theta, batch, self.hidden_size),
        )

    def forward(self, h: Tensor, state: CacheState, tokens: Tensor,
                embedding: Tensor | None = None, vocabulary: Tensor | None = None
                ) -> tuple[Tensor, CacheState, CacheTrace]:
        """h (B, T, C), state of B rows, tokens (B, T) -> h itself, state after the last token,
        trace. The others are not looked at."""
        cosine, held, new = self.look_up(h, state, tokens)
        weights = self.share * cache_weights(cosine, held, self.theta)  # (B, T, N)
        return h, new, CacheTrace(weights.unsqueeze(2), held)

    def look_up(self, h: Tensor, state: CacheState, tokens: Tensor
                ) -> tuple[Tensor, Tensor, CacheState]:
        """Arguments as of forward -> cosine of h_t with each of the last N states and the tokens
        that followed them, both (B, T, N), and the state after the last token."""
        B, T, _ = h.shape
        unit = F.normalize(at_least_float32(h), dim=-1)
        before = one_earlier(unit, state.last)  # h_t-1
        followed = torch.where(before.any(-1), tokens, -1)  # the first token follows no state
        keys = torch.cat((state.keys, before), dim=1)  # (B, N + T, C)
        followed = torch.cat((state.tokens, followed), dim=1)  # (B, N + T)

        step = torch.arange(T, device=h.device).unsqueeze(1)
        slot = torch.arange(self.slots, device=h.device)
        places = step + slot + 1  # (T, N): at t the newest is that of token t, at N + t
        with torch.autocast(h.device.type, enabled=False):
            cosine = unit @ keys.transpose(1, 2)  # (B, T, N + T)
        cosine = cosine.gather(2, places.expand(B, -1, -1))  # (B, T, N)
        held = followed[:, places]  # (B, T, N)
        new = CacheState(
            keys=keys[:, T:].clone(),  # views would keep all T alive
            tokens=followed[:, T:].clone(),
            last=unit[:, -1].clone(),
        )
        return cosine, held, new


def cache_weights(cosine: Tensor, held: Tensor, theta: Tensor | float) -> Tensor:
    """softmax over the slots that hold a token of theta * cosine, both (B, T, N); 0 without any."""
    logits = theta * cosine
    logits = logits.masked_fill(held < 0, -torch.inf)
    weights = logits.softmax(-1)
    return weights.nan_to_num(0.0)


@torch.no_grad()
def tune_cache(model: GPT2WithMemory, stream: Tensor, config: Config, stop: "StopSignal") -> float:
    """Give a model's CacheMemory the theta and lambda of the lowest loss on a stream, all settings
    in one pass over it -> that loss in nats."""
    weight, memory = model.head_weight(), model.memory
    device = weight.device
    inputs, targets = evaluation_rows(stream, config.eval_rows)  # (B, length)
    state = model.init_state(config.eval_rows)
    losses = 0.0
    model.eval()
    for start in range(0, inputs.shape[1], config.seq_len):
        stop.check_together()
        window = slice(start, start + config.seq_len)
        x = inputs[:, window].to(device)  # (B, T)
        y = targets[:, window].to(device)
        with model.autocast(device):
            h, _, after, _ = model.hidden(x, state)
        cosine, held, _ = memory.look_up(h, state, x)
        stats = token_statistics(h, h, y, weight, None, brief=True)
        losses = losses + cache_losses(memory, stats[..., 0], cosine, held, y)
        state = after
    model.train()

    i, j = divmod(of_first_rank(losses.argmin().item()), len(memory.LAMBDAS))
    memory.theta.fill_(memory.THETAS[i])
    memory.share.fill_(memory.LAMBDAS[j])
    return losses[i, j].item() / (len(stream) - 1)


def cache_losses(memory: CacheMemory, alone: Tensor, cosine: Tensor, held: Tensor, targets: Tensor
                 ) -> Tensor:
    """Summed nats of targets (B, T) by theta and lambda (THETAS, LAMBDAS), float64: alone (B, T),
    the vocabulary's own nats, cosine and held (B, T, N) as of look_up."""
    lambdas = torch.tensor(memory.LAMBDAS, device=alone.device).view(-1, 1, 1)
    p = (-alone).exp()  # (B, T)
    filled = (held >= 0).any(-1)  # (B, T)
    match = held == targets.unsqueeze(2)  # (B, T, N)
    scored = targets != -100
    losses = []
    for theta in memory.THETAS:
        weights = cache_weights(cosine, held, theta)
        p_cache = (weights * match).sum(-1)  # (B, T)
        mixed = p + lambdas * filled * (p_cache - p)  # (LAMBDAS, B, T)
        nll = -mixed.clamp_min(1e-38).log()
        losses.append((nll * scored).cpu().double().sum((1, 2)))  # an Apple GPU has no float64
    return torch.stack(losses)


def tune_on(baseline: Run, run: Run, corpus: "Corpus", stop: "StopSignal") -> None:
    """Make the arm cache, which is not trained, of the trained baseline: its weights, then theta
    and lambda by the first eval_tokens of validation. Scores and saves it as every arm is."""
    trained = baseline.model.controller.state_dict()
    run.model.controller.load_state_dict(trained)
    run.step = baseline.step
    run.meter.seconds = baseline.meter.seconds  # what it took to be what it is
    peak_memory_mb(run.device, reset=True)
    stream = corpus.valid[: run.config.eval_tokens + 1]
    with stop.held():
        tune_cache(run.model, stream, run.config, stop)
        memory = run.model.memory
        print(f"{run.arm}: theta {memory.theta:g}, lambda {memory.share:.2f}, chosen on the first "
              f"{len(stream) - 1:,} tokens of validation")
        validate(run, corpus, stop)
        finish(run, corpus, stop)


# ══ Generation: a window that moves on, and a memory that goes with it ═══════════════════════════
class Reading(NamedTuple):
    """All that B rows remember of what they have read, the same size however long that was. Index W
    of the window's buffers is for what fills up a row. W is here the tokens of the window."""
    tokens: Tensor  # (B, W + 1) in the window
    kv: Tensor  # (B, layers, 2, heads, W + 1, d) keys and values of attention in the window
    fill: Tensor  # (B,) tokens in the window
    memory: tuple | None  # the memory's state behind the last token


def start_reading(model: nn.Module, rows: int) -> Reading:
    """The state of rows that have read nothing."""
    base = model.controller.config
    weight = model.controller.wte.weight.detach()
    width = base.n_embd // base.n_head
    places = model.config.seq_len + 1
    return Reading(
        tokens=torch.zeros(rows, places, dtype=torch.long, device=weight.device),
        kv=weight.new_zeros(rows, base.n_layer, 2, base.n_head, places, width),
        fill=torch.zeros(rows, dtype=torch.long, device=weight.device),
        memory=model.init_state(rows),
    )


def read_on(model: nn.Module, tokens: Tensor, counts: Tensor, state: Reading, stride: int = 0
            ) -> tuple[Tensor, Tensor, Reading, tuple | None]:
    """Read the first counts (B,) of tokens (B, T) -> h without and with memory, both (B, T, C), the
    state behind them, and the memory's trace of (B, T, ...) or None.

    The model is one with a GPT2Model `controller`, a `memory`, `init_state` and `config.seq_len`.
    When the window is full its first `stride` tokens (0: half of it) leave, and the rest is encoded
    again from position 0: the state of a row is a function of its tokens alone, however they are
    cut into calls. The memory reads every token once, as it was first encoded.
    """
    W = model.config.seq_len
    unread = counts
    parts, places = [], []
    while bool((unread > 0).any()):
        full = (state.fill == W) & (unread > 0)
        if bool(full.any()):
            state = leave_rows(model, full, state, stride or max(1, W // 2))
        take = torch.minimum(W - state.fill, unread)  # (B,)
        place, part = next_tokens(tokens, counts - unread, take)  # (B, m)
        h, state = encode(model, part, take, state)
        h_out, trace, memory = remember(model, h, part, take, state.memory)
        state = state._replace(memory=memory)
        parts.append((h, h_out) if trace is None else (h, h_out, *trace))
        places.append(place)
        unread = unread - take

    if not parts:
        raise ValueError("no token to read: every one is padding")
    h, h_out, *fields = join_all(parts, places, counts, tokens.shape[1])
    return h, h_out, state, type(trace)(*fields) if fields else None


def next_tokens(tokens: Tensor, done: Tensor, take: Tensor) -> tuple[Tensor, Tensor]:
    """The next take (B,) of tokens (B, T), of which done (B,) are read -> their places, T for what
    is none, and the tokens, both (B, m)."""
    most = int(take.max())
    steps = torch.arange(most, device=tokens.device)
    is_none = steps >= take.unsqueeze(1)
    place = done.unsqueeze(1) + steps
    place = place.masked_fill(is_none, tokens.shape[1])
    padded = F.pad(tokens, (0, 1))
    return place, padded.gather(1, place)


def join_all(parts: list[tuple], places: list[Tensor], counts: Tensor, length: int
             ) -> list[Tensor] | tuple:
    """`join_passes` of each kind of part; one pass over rows that are full is its own result."""
    if len(parts) == 1 and bool((counts == length).all()):
        return parts[0]
    joined = []
    for of_all in zip(*parts, strict=True):
        joined.append(join_passes(of_all, places, length))
    return joined


def join_passes(parts: Iterable[Tensor], places: list[Tensor], length: int) -> Tensor:
    """Put parts (B, m, ...) of several passes where their tokens stand, places (B, m) -> (B,
    length, ...)."""
    whole = None
    for part, place in zip(parts, places, strict=True):
        if whole is None:
            whole = part.new_zeros(len(part), length + 1, *part.shape[2:])
        index = place.view(*place.shape, *[1] * (part.dim() - 2)).expand_as(part)
        whole = whole.scatter(1, index, part)
    return whole[:, :length]


def put_rows(index: Tensor, new: tuple | None, old: tuple | None) -> tuple | None:
    """The old state with its rows at index replaced by new."""
    if old is None:
        return None
    parts = []
    for ours, other in zip(new, old, strict=True):
        if isinstance(other, Tensor):
            parts.append(other.index_copy(0, index, ours))
        else:
            parts.append(put_rows(index, ours, other))
    return type(old)(*parts)


def encode(model: nn.Module, tokens: Tensor, take: Tensor, state: Reading
           ) -> tuple[Tensor, Reading]:
    """Put the next take (B,) of tokens (B, m) in the window -> the controller's h (B, m, C), the
    state with them. W is here, and in what follows, the tokens of the window; its column W, one too
    many, takes what is padding, and no mask shows it."""
    gpt2 = model.controller
    W, m = model.config.seq_len, tokens.shape[1]
    steps = torch.arange(m, device=tokens.device)
    place = state.fill.unsqueeze(1) + steps
    place = place.masked_fill(steps >= take.unsqueeze(1), W)  # (B, m)
    columns = torch.arange(W + 1, device=tokens.device)
    mask = (columns <= place.unsqueeze(2)).unsqueeze(1)  # (B, 1, m, W + 1)
    if bool((state.fill == 0).all() and (take == m).all()):
        mask = None  # they see each other alone

    h = gpt2.wte(tokens) + gpt2.wpe(place.clamp_max(W - 1))
    h = gpt2.drop(h)  # (B, m, C)
    kv = []
    for layer, block in enumerate(gpt2.h):
        h, new = run_block(block, h, place, mask, state.kv[:, layer])
        kv.append(new)
    state = state._replace(
        tokens=state.tokens.scatter(1, place, tokens),
        kv=torch.stack(kv, dim=1),
        fill=state.fill + take,
    )
    return gpt2.ln_f(h), state


def run_block(block: nn.Module, h: Tensor, place: Tensor, mask: Tensor | None, kv: Tensor | None
              ) -> tuple[Tensor, Tensor | None]:
    """One block of GPT-2 over h (B, m, C), which stands at place (B, m) of a window that has left
    keys and values in kv (B, 2, heads, W + 1, d) -> h, and kv with those of h.

    mask (B, 1, m, W + 1): what attention sees; None: h alone, each token those before it. kv None:
    the window is not attended to again.
    """
    attention = block.attn
    qkv = attention.c_attn(block.ln_1(h))  # (B, m, 3 * C)
    qkv = qkv.unflatten(-1, (3, attention.num_heads, -1))  # (B, m, 3, heads, d)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, heads, m, d)
    if kv is not None:
        index = place[:, None, :, None].expand_as(k)
        old_keys, old_values = kv.unbind(1)  # (B, heads, W + 1, d)
        keys = old_keys.scatter(2, index, k)
        values = old_values.scatter(2, index, v)
        kv = torch.stack([keys, values], dim=1)
        if mask is not None:
            k, v = keys, values

    dropout = attention.attn_dropout.p if block.training else 0.0
    is_causal = mask is None and h.shape[1] > 1
    mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=is_causal,
                                           scale=attention.scaling)
    mixed = mixed.transpose(1, 2).flatten(2)  # (B, m, C)
    h = h + attention.resid_dropout(attention.c_proj(mixed))
    return h + block.mlp(block.ln_2(h)), kv


def leave_rows(model: nn.Module, rows: Tensor, state: Reading, stride: int) -> Reading:
    """The state in which the full windows of some rows (B,) bool have given their first `stride`
    tokens away, and hold the rest from position 0 on."""
    W = model.config.seq_len
    index = rows.nonzero().squeeze(1)
    some = select_rows(state, index)
    rest = some.tokens[:, stride:W]
    some = some._replace(fill=torch.zeros_like(some.fill))
    if rest.shape[1]:
        stay = torch.full_like(some.fill, rest.shape[1])
        _, some = encode(model, rest, stay, some)
    return put_rows(index, some, state)


def remember(model: nn.Module, h: Tensor, tokens: Tensor, take: Tensor, state: tuple | None
             ) -> tuple[Tensor, tuple | None, tuple | None]:
    """The memory over the first take (B,) of h (B, m, C) and tokens (B, m) -> h_out (B, m, C), its
    trace and its state. A memory knows no padding: rows of one length go through it together."""
    if model.memory is None:
        return h, None, None
    lengths = take.unique().tolist()
    if lengths == [h.shape[1]]:
        h_out, state, trace = ask_memory(model, h, state, tokens)
        return h_out, trace, state

    whole, trace = [], None
    for length in filter(bool, lengths):
        index = (take == length).nonzero().squeeze(1)
        some = select_rows(state, index)
        h_out, new, trace = ask_memory(model, h[index, :length], some, tokens[index, :length])
        state = put_rows(index, new, state)
        parts = [h_out, *(trace or ())]
        whole = whole or [x.new_zeros(*h.shape[:2], *x.shape[2:]) for x in parts]
        for of_all, part in zip(whole, parts, strict=True):
            of_all[index, :length] = part
    h_out, *fields = whole
    return h_out, type(trace)(*fields) if fields else None, state


def ask_memory(model: nn.Module, h: Tensor, state: tuple, tokens: Tensor) -> tuple:
    """What a model's memory returns for h (B, m, C) and tokens (B, m)."""
    vocabulary = model.controller.wte.weight
    return model.memory(h, state, tokens, F.embedding(tokens, vocabulary), vocabulary)


def select_rows(state: tuple | None, index: Tensor) -> tuple | None:
    """The rows of a state at index."""
    return map_state(lambda x: x.index_select(0, index), state)


def pick_token(logits: Tensor, temperature: float, draw: torch.Generator, top_k: int = 0,
               top_p: float = 1.0) -> int:
    """Draw a token by logits (V,), the most likely one at temperature 0: of the top_k most likely
    (0: of all), and of the fewest that have a share of top_p among those. Source of the latter:
    Holtzman et al. 2020, arXiv 1904.09751."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / max(temperature, 1e-6)  # below, no two logits are near enough for a draw
    if 0 < top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    shares = logits.softmax(0)
    if top_p < 1:
        ordered, order = shares.sort(descending=True)
        ahead = ordered.cumsum(0) - ordered  # what the more likely ones have together
        ahead[0] = -1.0  # the most likely one stays, also at a share of 0
        shares[order[ahead >= top_p]] = 0
    return int(torch.multinomial(shares, 1, generator=draw))


class Said(NamedTuple):
    """A token that has been read."""
    token: int
    gate: float  # with which it was written; 0 of a memory without write gates
    source: int  # position of the earlier token at which memory pointed to raise it, -1 none


RAISED = 2.0  # how many times likelier a token is with memory where it is marked as raised


@torch.no_grad()
def generate_tokens(model: GPT2WithMemory, ids: list[int], config: Config) -> Iterator[Said]:
    """Read ids and go on with new_tokens tokens; each is yielded when it has been read. A token
    takes the same time and memory however long the text has become."""
    draw = torch.Generator().manual_seed(config.seed)
    model.eval()
    state, written_at = start_reading(model, 1), None
    unread, sources, seen = ids, [-1] * len(ids), 0
    for left in range(config.new_tokens, -1, -1):
        h, h_out, state, trace = read_ids(model, unread, state)
        gates = [0.0] * len(unread)
        if isinstance(trace, DNCTrace):
            gates = trace.write_gate[0].tolist()
            written_at = positions_held(trace.write_weights, seen, written_at)
        yield from map(Said, unread, gates, sources)
        if left == 0:
            return
        seen += len(unread)

        last = map_state(lambda part: part[:, -1:], trace)
        token, source = draw_next(model, h[0, -1:], h_out[0, -1:], last, written_at, config, draw)
        unread, sources = [token], [source]


def draw_next(model: GPT2WithMemory, h: Tensor, h_out: Tensor, trace: tuple | None,
              written_at: Tensor | None, config: Config, draw: torch.Generator) -> tuple[int, int]:
    """The next token and its source, as of Said: h without and with memory, both (1, C), the trace
    of that token, and the positions (1, N) of what the slots hold."""
    weight = model.head_weight()
    pointer = model.pointer(trace)
    log_p = next_token_log_p(h_out, weight, pointer)[0]  # (V,)
    token = pick_token(log_p.cpu(), config.temperature, draw, config.top_k, config.top_p)
    if not config.show_gates or pointer is None:
        return token, -1
    without = next_token_log_p(h, weight, None)[0]
    is_raised = log_p[token] - without[token] > math.log(RAISED)
    return token, source_of(token, pointer, written_at) if is_raised else -1


def read_ids(model: GPT2WithMemory, ids: list[int], state: Reading
             ) -> tuple[Tensor, Tensor, Reading, tuple | None]:
    """`read_on` for one row."""
    device = model.head_weight().device
    tokens = torch.tensor([ids], device=device)
    counts = torch.tensor([len(ids)], device=device)
    return read_on(model, tokens, counts, state)


def positions_held(write_weights: Tensor, start: int, before: Tensor | None) -> Tensor:
    """The position in the text of the token that each slot holds, (1, N), -1 none: behind T tokens
    from position start on, of write_weights (1, T, N); before: the same ahead of them."""
    _, T, N = write_weights.shape
    positions = torch.arange(start, start + T, device=write_weights.device).unsqueeze(0)
    if before is None:
        before = positions.new_full((1, N), -1)
    return tokens_held(positions, write_weights, before)[:, -1]


def source_of(token: int, pointer: Pointer, written_at: Tensor) -> int:
    """The position of the earlier token at which a pointer of one row points most for a token; -1
    where it does not point to it."""
    match = pointer.weights[0] * (pointer.tokens[0] == token)  # (N,)
    slot = match.argmax()
    return written_at[0, slot].item() if match[slot] > 0 else -1


GATE_COLORS = (232, 17, 18, 19, 20, 21, 27)  # of 256: a closed gate black, an open one blue


def print_generation(model: GPT2WithMemory, tokenizer: object, config: Config) -> None:
    """--generate: stream the text and its continuation. With show_gates a token's background is its
    write gate, and one that memory raised is followed by the earlier token that it came from."""
    from tokenizers.decoders import DecodeStream

    ids = encode_text(tokenizer, config.generate)
    require(len(ids) > 0, "generate", config.generate, "text that the tokenizer knows")
    decoder, said = DecodeStream(skip_special_tokens=False), []
    began = first = time.perf_counter()
    for token, gate, source in generate_tokens(model, ids, config):
        said.append(token)
        if len(said) == len(ids):
            first = time.perf_counter()
        piece = decoder.step(tokenizer, token) or ""  # None within a character of several tokens
        if config.show_gates and piece:
            color = GATE_COLORS[round(gate * (len(GATE_COLORS) - 1))]
            piece = f"\x1b[97;48;5;{color}m{piece}\x1b[0m"
        if source >= 0:
            word = tokenizer.decode([said[source]]).strip()
            piece += f"\x1b[33m[{word} {len(said) - 1 - source} back]\x1b[0m"
        print(piece, end="", flush=True)
    ended = time.perf_counter()

    print(f"\n\n  {config.new_tokens} tokens, {config.new_tokens / (ended - first):,.1f} tokens/s, "
          f"behind {len(ids)} of the text in {first - began:.2f} s")
    if config.show_gates:
        print("  background: the write gate, black closed, blue open\n"
              f"  [word K back]: memory made the token before it more than {RAISED:g} times as "
              "likely,\n  by pointing at that word, K tokens earlier")


# ══ Data: one token stream a split ═══════════════════════════════════════════════════════════════
SPLITS = ("train", "valid", "test")
HUB_WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
HUB_SECONDS = 8.0  # to decide whether the hub answers; 10 s in all with what follows


class Corpus(NamedTuple):
    """Three splits as 1-D int64 token streams, and the tokenizers.Tokenizer that made them."""
    name: str
    tokenizer: object
    train: Tensor
    valid: Tensor
    test: Tensor
    fingerprint: str  # sha256 of the three streams

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return vocabulary_size(self.tokenizer)


def vocabulary_size(tokenizer: object) -> int:
    """One more than the largest token id. Raises ValueError where ids lie far apart: each takes a
    row of the embedding."""
    ids = tokenizer.get_vocab().values()
    size = max(ids) + 1
    require(size <= 2 * len(ids) + 1000, "tokenizer", f"{len(ids):,} tokens",
            f"with ids that follow each other (the largest is {size - 1:,}); repair tokenizer.json")
    return size


@functools.lru_cache(maxsize=1)
def hub_reachable() -> bool:
    """Whether the hub answers within HUB_SECONDS; if not, its libraries use their cache alone."""
    answered = threading.Event()

    def probe() -> None:
        with contextlib.suppress(Exception):  # a proxy may answer nonsense
            url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            try:
                urllib.request.urlopen(url, timeout=HUB_SECONDS).close()
            except urllib.error.HTTPError:
                if "HF_ENDPOINT" not in os.environ:
                    return  # what answers is a firewall; a mirror may have nothing at its root
            answered.set()

    if os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""):
        thread = threading.Thread(target=probe, daemon=True)
        thread.start()
        thread.join(HUB_SECONDS)  # bounds name resolution too, which no socket timeout covers
        if not answered.is_set():
            os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's libraries are first imported
    return answered.is_set()


@contextlib.contextmanager
def asking_hub(field: str, name: str, folder: str) -> Iterator[None]:
    """Turn the dozen kinds of error of the hub's libraries into one ValueError: both ways out."""
    reachable = Path(name).is_dir() or hub_reachable()
    try:
        yield
    except Exception as error:
        why = "the hub does not answer"
        if reachable:
            why = " ".join(str(error).split())[:240]
        if Path(name).is_file():
            why = "it is a file"
        if "trust_remote_code" in str(error):
            why = "it wants code of its own to be run, which is never done"
        if isinstance(error, RecursionError | UnicodeDecodeError):
            why = "a file of it is damaged"
        raise ValueError(f"{field} = {name!r}: cannot be had ({why}); connect to the hub, or give "
                         f"{folder}") from None


def module_docstrings(path: Path) -> str:
    """The docstrings of a Python file, read as source text: nothing is imported."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings, level = [], [ast.parse(path.read_bytes())]
    while level:
        docstrings += [ast.get_docstring(node) for node in level if isinstance(node, kinds)]
        # Only statements hold definitions; most of a tree is expressions.
        level = [child for node in level for child in ast.iter_child_nodes(node)
                 if not isinstance(child, ast.expr)]
    return "\n\n".join(filter(None, docstrings))


def embedded_texts() -> dict[str, list[str]]:
    """English documentation that every CPython carries, by split: see embedded_documents."""
    return {split: [text for _, text in documents]
            for split, documents in embedded_documents().items()}


def embedded_documents() -> dict[str, list[tuple[str, str]]]:
    """Language topics, then docstrings by module, each with the name of its topic or file, split
    8 : 1 : 1 by document. A paragraph seen before is left out: modules that share text (posixpath,
    ntpath) leak none from split to split."""
    from pydoc_data.topics import topics

    gc.freeze()  # else every tree below has the collector walk through all of torch
    documents = [(f"topic {name}", topics[name]) for name in sorted(topics)]
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data"}
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if skip.isdisjoint(name.parts):
            with contextlib.suppress(SyntaxError, ValueError, OSError):  # templates, not Python
                documents.append((name.as_posix(), module_docstrings(path)))

    splits, seen = {split: [] for split in SPLITS}, set()
    split_of = ["train"] * 8 + ["valid", "test"]
    for i, (name, document) in enumerate(filter(lambda named: named[1], documents)):
        parts = dict.fromkeys(document.split("\n\n"))
        new = [part for part in parts if part.strip() not in seen]
        seen.update(map(str.strip, new))
        if new:
            split = split_of[i % 10]
            splits[split].append((name, "\n\n".join(new) + "\n\n"))
    return splits


def folder_texts(folder: str, field: str = "dataset") -> dict[str, list]:
    """Read train.txt, valid.txt and test.txt (UTF-8), each one document, a TextFile if it is large.
    Raises ValueError naming file and remedy, and the field that the folder is the value of."""
    texts = {}
    for split in SPLITS:
        path = Path(folder) / f"{split}.txt"
        require(path.is_file(), field, folder, "a folder with train.txt, valid.txt and "
                f"test.txt ({path.name} is missing), or a hub id")
        document = TextFile(path, folder, field)
        if path.stat().st_size <= WHOLE:
            document = document.text()
        texts[split] = [document]
        some = any(piece.strip() for piece in pieces_of(document))
        require(some, field, folder, f"text ({path.name} has none)")
    return texts


def text_column(name: str, columns: list[str]) -> str:
    """The column of a hub data set that holds the text: `text`, or the only one."""
    if "text" in columns:
        return "text"
    require(len(columns) == 1, "dataset", name, "with a column named text (its columns are "
            f"{', '.join(columns)}); write the texts into a folder instead")
    return columns[0]


def hub_splits(name: str) -> dict:
    """The splits of a data set of the hub or its cache, `id` or `id:configuration`."""
    from datasets import load_dataset

    hub_id, _, configuration = name.partition(":")
    return load_dataset(hub_id, configuration or None)


def hub_texts(name: str) -> dict[str, list[str]]:
    """Load a text data set, `id` or `id:configuration`, from the hub or its cache.

    A test split that is missing is the validation split once more, a validation split that is
    missing the last tenth of train; both are printed. Raises ValueError naming both ways out.
    """
    with asking_hub("dataset", name, "a folder with train.txt, valid.txt and test.txt"):
        splits = hub_splits(name)
        column = text_column(name, next(iter(splits.values())).column_names)
        texts = {split: [line_of(row) for row in rows[column]] for split, rows in splits.items()}
    require("train" in texts, "dataset", name, f"with a train split (it has {', '.join(texts)})")
    return {split: ["".join(parts)] for split, parts in three_splits(name, texts).items()}


def line_of(row: str) -> str:
    """A row of a data set with the line end that keeps its last word from the next row's first."""
    return row if row == "" or row.endswith("\n") else row + "\n"


def three_splits(name: str, texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Texts by a hub's split names -> by ours; prints how a missing split is made up for."""
    train = texts["train"]
    valid = next((texts[key] for key in ("validation", "valid", "dev") if key in texts), None)
    if valid is None:
        count = len(train)
        tenth = max(1, count // 10)
        train, valid = train[:-tenth], train[-tenth:]
        print(f"dataset {name}: no validation split; the last {tenth:,} of {count:,} texts of "
              "train are it instead")
    test = texts.get("test")
    if test is None:
        test = valid
        print(f"dataset {name}: no test split; test figures are of validation once more")
    return {"train": train, "valid": valid, "test": test}


def load_tokenizer(name: str) -> object:
    """Load a tokenizers.Tokenizer by hub name or folder. Raises ValueError naming both ways out."""
    with asking_hub("tokenizer", name, "a folder written by a tokenizer's save_pretrained"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer
        tokenizer.no_padding()  # tokenizer.json keeps what was on when it was saved
        tokenizer.no_truncation()
    # An unreachable or incomplete name can come back as a tokenizer without a vocabulary.
    require(len(tokenizer.encode("word", add_special_tokens=False).ids) > 0, "tokenizer", name,
            "one that encodes text (this one is empty); give a folder with tokenizer.json")
    return tokenizer


def train_tokenizer(texts: list[str], vocab_size: int = 4096) -> object:
    """Train a byte-level BPE (GPT-2's kind) on the training split alone -> tokenizers.Tokenizer. It
    cuts behind every line end, as `encode_lines` does. Not while it trains, so that a few entries,
    of several lines, are never used: of 4,096 two on WikiText-2, thirty on documentation.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=alphabet)
    pieces = itertools.chain.from_iterable(map(pieces_of, texts))
    tokenizer.train_from_iterator(pieces, trainer)
    lines = pre_tokenizers.Split("\n", "merged_with_previous")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, tokenizer.pre_tokenizer])
    return tokenizer


def tokenize(tokenizer: object, documents: list) -> Tensor:
    """Encode documents into one stream (tokens,), by line: 7 times faster than in one piece. Those
    of a large text are kept in a file for the next start, and mapped into memory."""
    if sum(map(size_of, documents)) >= KEPT_FROM:
        return kept_tokens(tokenizer, documents)
    return torch.cat([*encode_lines(tokenizer, documents)])


# ── Large texts: read and tokenized in pieces, tokens kept in a file ─────────────────────────────
WHOLE = 2**24  # bytes of a file that is read at once
CHUNK = 2**21  # bytes, of a larger one, that are read at once; characters that are tokenized so
LONGEST = 2**16  # characters of a line that are tokenized in one piece
KEPT_FROM = 2**22  # bytes of text whose tokens are kept in a file


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of text in UTF-8, whose lines may end in any way."""
    path: Path
    dataset: str  # that it is of, for errors
    field: str = "dataset"  # which names that one

    def text(self) -> str:
        """All of it. Raises ValueError, as pieces does, where it is not UTF-8."""
        return self.decode(self.path.read_bytes(), 0)

    def pieces(self) -> Iterator[str]:
        """Its text in pieces of about CHUNK bytes."""
        rest, at = b"", 0
        with open(self.path, "rb") as file:
            while block := file.read(CHUNK):
                rest += block
                end = piece_end(rest)
                yield self.decode(rest[:end], at)
                rest, at = rest[end:], at + end
        if rest:
            yield self.decode(rest, at)

    def decode(self, data: bytes, at: int) -> str:
        """The text of bytes that begin at that place in the file."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.field} = {self.dataset!r}: {self.path.name} is not UTF-8 (at "
                             f"byte {at + error.start}); convert it, for example with iconv"
                             ) from None
        return text.replace("\r\n", "\n").replace("\r", "\n")


def piece_end(data: bytes) -> int:
    """Where a piece of UTF-8 text ends: behind its last line, else before the spaces before its
    last word, else before its last character, of which bytes may be missing."""
    end = data.rfind(b"\n") + 1
    if not end:
        words = data[: data.rfind(b" ") + 1]
        end = len(words.rstrip(b" "))
    if not end:
        end = len(data) - 1
        while end > 1 and data[end] & 0b1100_0000 == 0b1000_0000:
            end -= 1
    return max(1, end)


def pieces_of(document: str | TextFile) -> Iterable[str]:
    """A document in pieces that fit in memory."""
    return document.pieces() if isinstance(document, TextFile) else [document]


def size_of(document: str | TextFile) -> int:
    """The size of a document, in bytes of a file or characters."""
    return document.path.stat().st_size if isinstance(document, TextFile) else len(document)


def cut_line(line: str) -> Iterator[str]:
    """A line in parts of at most LONGEST characters, cut before spaces where there are any: there
    GPT-2's tokenizer cuts anyway."""
    if len(line) > LONGEST:
        say_once(f"tokenizer: lines of more than {LONGEST:,} characters are cut at a space, or, "
                 "without one, there")
    start = 0
    while len(line) - start > LONGEST:
        space = line.rfind(" ", start, start + LONGEST)
        words = line[start : max(start, space)].rstrip(" ")
        end = start + (len(words) or LONGEST)
        yield line[start:end]
        start = end
    yield line[start:]


def whole_lines(piece: str) -> Iterator[str]:
    """A piece of text in parts of whole lines, of at most LONGEST characters but where one line has
    more."""
    start = 0
    while start < len(piece):
        end = start + LONGEST
        if end < len(piece):
            end = piece.rfind("\n", start, end) + 1 or piece.find("\n", start) + 1
        yield piece[start : end or len(piece)]
        start = end or len(piece)


def cuts_at_lines(tokenizer: object) -> bool:
    """Whether a tokenizer gives lines no other text than they have. One of SentencePiece's kind
    puts a space before whatever it is given, and would put one before every line. GPT-2's gives
    runs of empty or indented lines other tokens of the same text."""
    first, second = tokenizer.encode_batch(["a\n", "b"], add_special_tokens=False)
    whole = tokenizer.encode("a\nb", add_special_tokens=False)
    return tokenizer.decode(first.ids + second.ids) == tokenizer.decode(whole.ids)


def encode_lines(tokenizer: object, documents: list) -> Iterator[Tensor]:
    """The token ids of documents, line by line (of some tokenizers in large parts), of about CHUNK
    characters at a time."""
    parts_of = whole_lines
    if cuts_at_lines(tokenizer):
        parts_of = functools.partial(str.splitlines, keepends=True)
    lines, size = [], 0
    for document in documents:
        for piece in pieces_of(document):
            for line in parts_of(piece):
                lines += cut_line(line)
                size += len(line)
                if size >= CHUNK:
                    yield encode_batch(tokenizer, lines)
                    lines, size = [], 0
    yield encode_batch(tokenizer, lines)


def encode_text(tokenizer: object, text: str) -> list[int]:
    """The token ids of a text, as those of the texts of training are made."""
    return torch.cat([*encode_lines(tokenizer, [text])]).tolist()


def encode_batch(tokenizer: object, lines: list[str]) -> Tensor:
    """The token ids of lines, one after the other (tokens,)."""
    ids = []
    for encoding in tokenizer.encode_batch(lines, add_special_tokens=False):
        ids += encoding.ids
    return torch.tensor(ids, dtype=torch.int64)


def cache_folder() -> Path:
    """Where what can be made again is kept, beside the hub's own cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "dnc_gpt2"


def text_key(tokenizer: object, documents: list) -> str:
    """sha256 of all that tokens depend on: texts, tokenizer, and how lines are cut."""
    digest = hashlib.sha256(f"{CHUNK} {LONGEST} {tokenizer.to_str()}".encode())
    if not cuts_at_lines(tokenizer):
        digest.update(b"in large parts")
    for document in documents:
        digest.update(f"{size_of(document)} {type(document).__name__}".encode())
        if isinstance(document, TextFile):
            with open(document.path, "rb") as file:
                while block := file.read(CHUNK):
                    digest.update(block)
        else:
            digest.update(document.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def kept_tokens(tokenizer: object, documents: list) -> Tensor:
    """`tokenize` by way of a file of the tokens, which is made where it is not there or is damaged;
    in memory, said in one line, where none can be made."""
    from filelock import FileLock

    path = cache_folder() / "tokens" / f"{text_key(tokenizer, documents)}.int64"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # one of several processes tokenizes
            if not holds_tokens(path):
                write_tokens(encode_lines(tokenizer, documents), path)
    except (ValueError, OSError) as error:
        stream = torch.cat([*encode_lines(tokenizer, documents)])
        print(f"tokens are not kept for the next start: {error}")
        return stream
    count = path.stat().st_size // 8 - 1
    return torch.from_file(str(path), size=count, dtype=torch.int64)


def write_tokens(chunks: Iterable[Tensor], path: Path) -> None:
    """Write int64 token ids, then their CRC-32 in 8 bytes, whole or not at all."""
    print(f"tokenizing a large text, once: its tokens are kept in {path}", flush=True)
    check = 0
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        for ids in chunks:
            data = ids.numpy().tobytes()
            check = zlib.crc32(data, check)
            file.write(data)
        file.write(check.to_bytes(8, "little"))


def holds_tokens(path: Path) -> bool:
    """Whether a file is what write_tokens wrote; says where it is not."""
    if not path.is_file():
        return False
    left, check = path.stat().st_size - 8, 0
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, CHUNK))):
            check = zlib.crc32(block, check)
            left -= len(block)
        whole = left == 0 and file.read() == check.to_bytes(8, "little")
    if not whole:
        print(f"{path}: damaged; the text is tokenized again")
    return whole


def load_texts(dataset: str) -> tuple[str, dict[str, list[str]], bool]:
    """The name of a data set, its texts by split, and whether it is the embedded one. Prints the
    downgrade of `auto`. Raises ValueError."""
    if dataset == "auto":
        try:
            return "WikiText-2 (wikitext-2-raw-v1)", hub_texts(HUB_WIKITEXT), False
        except ValueError as error:
            name = f"Python {platform.python_version()} documentation (embedded)"
            print(f"{error}. Running on {name} instead")
            return name, embedded_texts(), True
    if Path(dataset).is_dir() or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        return Path(dataset).resolve().name, folder_texts(dataset), False
    return dataset, hub_texts(dataset), False


def choose_tokenizer(config: Config, train_texts: list[str], embedded: bool) -> tuple[object, str]:
    """The tokenizer that Config names, and what it is called in tables. `auto` is that of
    init_from, else gpt2, else (and for the embedded corpus) own: trained on the training split."""
    if config.tokenizer == "own":
        return train_tokenizer(train_texts), "own BPE"
    wanted = config.init_from if config.tokenizer == "auto" else config.tokenizer
    if wanted != "scratch":
        return load_tokenizer(wanted), Path(wanted).name
    if not embedded:
        try:
            return load_tokenizer("gpt2"), "gpt2"
        except ValueError as error:
            print(f"tokenizer auto: {error}. Training one on the training split instead")
    return train_tokenizer(train_texts), "own BPE"


def load_corpus(config: Config) -> Corpus:
    """Load the texts and the tokenizer that Config names, and tokenize. Prints each downgrade."""
    name, texts, embedded = load_texts(config.dataset)
    tokenizer, kind = choose_tokenizer(config, texts["train"], embedded)
    streams, digest = {}, hashlib.sha256()
    for split, documents in texts.items():
        stream = streams[split] = tokenize(tokenizer, documents)
        digest.update(stream.numpy())
        field = "batch_size" if split == "train" else "eval_rows"
        least = getattr(config, field) * config.seq_len + 1
        require_field(config, "dataset", len(stream) >= least, f"longer: {split} has "
                      f"{len(stream):,} tokens, {field} windows have {least:,}; give more, or a "
                      f"smaller {field}")
    label = f"{name}, {kind} tokenizer of {tokenizer.get_vocab_size():,}"
    return Corpus(label, tokenizer, **streams, fingerprint=digest.hexdigest())


def training_rows(stream: Tensor, rows: int, step_len: int) -> Tensor:
    """Cut a stream into contiguous rows, (rows, steps * step_len + 1), the end that fills no step
    left out. Position j of a row is input, j + 1 its target: every one scored is a real token."""
    steps = (len(stream) - 1) // (rows * step_len)
    length = steps * step_len
    return stream.as_strided((rows, length + 1), (length, 1))  # a view: the text may be large


def evaluation_rows(stream: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Cut a whole stream into rows of inputs and targets, both (rows, length). Every token but the
    first is a target exactly once; what fills up the last row has target -100, never scored."""
    padding = (0, -(len(stream) - 1) % rows)
    inputs = F.pad(stream[:-1], padding)
    targets = F.pad(stream[1:], padding, value=-100)
    return inputs.view(rows, -1), targets.view(rows, -1)


# ══ Checkpoints: one format, exact resume ════════════════════════════════════════════════════════
PAYLOAD = {
    "arm": str,
    "config": dict,
    "corpus": str,
    "controller": str,
    "fingerprint": str,
    "tokenizer": str,
    "model_state_dict": dict,
    "global_step": int,
    "epoch": int,
    "optimizer_state_dict": dict,
    "stream_position": int,
    "val_ppl": float,
    "memory_state": list | None,
    "rng": dict,
    "history": list,
    "meter": dict,
    "results": dict,
}
# Fields that may differ between the run that saved and the run that resumes.
FREE_FIELDS = {
    "dataset", "tokenizer", "preset", "log_every_steps", "save_every_steps", "save_dir", "plot_dir",
    "arms", "seeds", "lr_grid", "use_compile", "compile_mode", "num_gpus", "resume", "inspect",
    "text", "scan", "accumulate", "checkpoint_activations", "tensorboard",
    "generate", "export", "checkpoint", "new_tokens", "temperature", "top_k", "top_p", "show_gates",
}
# Fields that an arm without memory does not use: its checkpoints serve whatever they are.
MEMORY_FIELDS = {
    "mem_slots", "mem_width", "num_reads", "carry_memory", "pointing", "split_rows", "row_key",
    "empty_slot", "usage_decay", "min_surprisal", "use_links", "mask_min", "dealloc_wipe",
    "sharpen_links", "memory_lr", "empty_share", "lambda_vocabulary", "lambda_routing",
    "lambda_entropy", "routing", "routing_fraction",
}
# What checkpoints say that are older than these fields: the plain DNC.
OLDER_FIELDS = {
    "pointing": False,
    "split_rows": False,
    "row_key": "previous",
    "empty_slot": False,
    "usage_decay": 1.0,
    "min_surprisal": 0.0,
    "empty_share": 0.0,
    "lambda_vocabulary": 0.0,
}


def last_perplexity(run: Run) -> float:
    """Validation perplexity of the finished arm, else of the last validation; NaN before any."""
    if run.results:  # of the whole split
        return run.results["valid"]["metrics"]["ppl"]
    validations = [row["ppl"] for row in run.history if row["split"] == "validation"]
    return validations[-1] if validations else math.nan


def checkpoint_payload(run: Run, corpus: Corpus) -> dict:
    """Everything an exact resume needs, as tensors and plain values, and where it comes from."""
    return {
        "arm": run.arm,
        "config": dataclasses.asdict(run.config),
        "corpus": corpus.name,
        "controller": run.model.controller.config.to_json_string(use_diff=False),
        "fingerprint": corpus.fingerprint,
        "tokenizer": corpus.tokenizer.to_str(),
        "model_state_dict": run.model.state_dict(),
        "optimizer_state_dict": run.optimizer.state_dict(),
        "global_step": run.step,
        "epoch": run.step // run.steps_per_epoch,
        "stream_position": run.step % run.steps_per_epoch // run.turns * run.config.step_len,
        "val_ppl": last_perplexity(run),
        "memory_state": state_of_all_rows(run.state),
        "rng": random_states(),
        "history": run.history,
        "meter": dataclasses.asdict(run.meter),
        "results": run.results,
        "lengthened": run.lengthened,
        "run": run_facts(device_name(run.device)),
    }


def save_checkpoint(run: Run, corpus: Corpus, final: bool = False) -> None:
    """Write `{arm}_[FINAL_]step{N}.pt`, whole or not at all. Raises ValueError, saying what the
    last good checkpoint is."""
    name = f"{run.stem}_{'FINAL_' if final else ''}step{run.step}.pt"
    path = Path(run.config.save_dir) / name
    remedy = (f"the last good checkpoint is {run.last_saved or 'none yet'}; free some space, then "
              "continue with --resume auto")
    payload = checkpoint_payload(run, corpus)
    if rank_and_size().rank == 0:
        save_tensors(payload, path, remedy)
    run.last_saved = str(path)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint. Raises ValueError naming a file that is missing, truncated or foreign."""
    remedy = "name another checkpoint; see what save_dir holds"
    payload = load_tensors(Path(path), PAYLOAD, remedy)
    with reading(path, remedy):
        if not all(isinstance(payload[name], kind) for name, kind in PAYLOAD.items()):
            raise ValueError("of other types")
    payload["config"] = OLDER_FIELDS | payload["config"]
    fields, saved = {field.name for field in dataclasses.fields(Config)}, payload["config"].keys()
    # A field that may differ may also be newer than the checkpoint.
    fits = saved <= fields <= saved | FREE_FIELDS
    require(fits, "checkpoint", str(path), "of this version of dnc_gpt2.py; name another")
    return payload


def shapes_of(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of every tensor of a state_dict."""
    return {name: tensor.shape for name, tensor in weights.items()}


class OtherRun(ValueError):
    """A checkpoint is whole, and not of this run."""


def check_same_run(run: Run, payload: dict, path: str | Path, corpus: Corpus) -> None:
    """Raise OtherRun, naming the file and what differs, where a checkpoint is of another arm,
    corpus or configuration than the run, whose model is not looked at."""
    if payload["arm"] != run.arm or payload["fingerprint"] != corpus.fingerprint:
        raise OtherRun(f"checkpoint {path}: of {payload['arm']} on {payload['corpus']}, this is "
                       f"{run.arm} on {corpus.name}; name another, or another save_dir")
    free = FREE_FIELDS
    if run.arm == ARMS["matched"]:  # a DNC of other fields may have as many parameters
        same = payload["config"].get("mlp_width") == run.config.mlp_width
        free = FREE_FIELDS | (MEMORY_FIELDS if same else {"mlp_width"})
    elif run.config.memory == "none":
        free = FREE_FIELDS | MEMORY_FIELDS
    if can_be_lengthened(run, payload):
        free = free | {"max_steps", "epochs"}
    old, new = as_given(run.arm, payload["config"]), as_given(run.arm, vars(run.config))
    for name, value in new.items():
        if name not in free and old.get(name) != value:
            saved = old.get(name)
            raise OtherRun(f"checkpoint {path}: was trained with {name} = {saved!r}, this run "
                           f"has {value!r}; set --{name} {saved}, or another save_dir")


def as_given(arm: str, config: dict) -> dict:
    """The fields of an arm's Config as the user gave them, where `arm_config` made others."""
    if arm == ARMS["wide"]:
        return config | {"seq_len": config["seq_len"] // 2, "batch_size": 2 * config["batch_size"]}
    return config


def check_match(run: Run, payload: dict, path: str | Path, corpus: Corpus) -> None:
    """Raise OtherRun, or ValueError where a checkpoint is of other shapes than the run."""
    check_same_run(run, payload, path, corpus)
    shapes = shapes_of(run.model.state_dict())
    require(shapes == shapes_of(payload["model_state_dict"]), "checkpoint", str(path),
            "of this model's shapes; name another")


def check_optimizer(run: Run, saved: dict) -> None:
    """Raise ValueError where moments of a checkpoint are not of the shapes of the weights."""
    weights = [weight for group in run.optimizer.param_groups for weight in group["params"]]
    for number, moments in saved["state"].items():
        shape = weights[number].shape
        if not moments["exp_avg"].shape == moments["exp_avg_sq"].shape == shape:
            raise ValueError("moments of other shapes")


def saved_state(run: Run, parts: list[Tensor] | None) -> tuple | None:
    """The memory's state of a checkpoint, on the run's device; its own where there is none. Raises
    ValueError where it is of another shape."""
    if parts is None:
        return run.state
    fresh = run.model.init_state(run.config.rows)
    state = type(fresh)(*parts, *fresh[len(parts):])  # parts that came later are empty
    if any(part.shape != new.shape for part, new in zip(state, fresh, strict=True)):
        raise ValueError("a memory of another shape")
    mine = share_of(run.config.rows)
    return map_state(lambda tensor: tensor[mine].to(run.device), state)


def restore(run: Run, payload: dict, path: str | Path, corpus: Corpus) -> None:
    """Put a checkpoint's state into a run. Raises ValueError when it is of something else, or says
    what no checkpoint says; the run is then as it was."""
    check_match(run, payload, path, corpus)
    with reading(path, "name another"):
        check_optimizer(run, payload["optimizer_state_dict"])
        state = saved_state(run, payload["memory_state"])
        meter = Meter(**payload["meter"])
        results = payload["results"]
        if results and "nll" not in results["valid"]:
            results = {}  # of an older version, which kept less: it is scored again
        check_random_states(payload["rng"])
        run.optimizer.load_state_dict(payload["optimizer_state_dict"])  # raises before any change
    run.model.load_state_dict(payload["model_state_dict"])
    run.step, run.state = payload["global_step"], state
    run.history, run.meter, run.results = payload["history"], meter, results
    run.lengthened = payload.get("lengthened", [])
    if can_be_lengthened(run, payload):
        lengthen(run)
    run.last_saved = str(path)
    restore_random_states(payload["rng"], run)


def check_random_states(saved: dict) -> None:
    """Raise RuntimeError or KeyError where no generator could take what a checkpoint says of it."""
    kept = torch.get_rng_state()
    try:
        for of_rank in saved.get("ranks", [saved]):
            torch.set_rng_state(of_rank["torch"])
    finally:
        torch.set_rng_state(kept)


def can_be_lengthened(run: Run, payload: dict) -> bool:
    """Whether a checkpoint is of a finished run, and more steps are asked for."""
    return bool(payload["results"]) and run.total_steps > payload["global_step"]


def lengthen(run: Run) -> None:
    """Let a finished run go on to its new number of steps; one line says at which rates."""
    config, done = run.config, run.step
    run.results, run.lengthened = {}, [*run.lengthened, done]
    rates = "a new cosine over the steps that are new"
    if config.lr_schedule == "constant":
        first, whole = (warmup_steps(config.lr_warmup, end)
                        for end in (run.lengthened[0], run.total_steps))
        rates = "at its constant rate, as if asked for from the start"
        if first != whole:
            rates = (f"at its constant rate; its warm-up had {first} steps, that of a run of "
                     f"{run.total_steps:,} has {whole}")
    print(f"{run.arm}: finished at step {done:,}, lengthened to {run.total_steps:,}: {rates}")


def newest_checkpoints(run: Run) -> list[Path]:
    """The checkpoints of an arm in save_dir, the newest first, of one moment the furthest first; of
    a job that torchrun has restarted, its own alone."""
    pattern = re.compile(re.escape(run.stem) + r"_(FINAL_)?step(\d+)\.pt")
    since = job_started(run.config.save_dir)
    dated = []
    for path in Path(run.config.save_dir).iterdir():
        match = pattern.fullmatch(path.name)
        if match:
            step, written = int(match[2]), path.stat().st_mtime_ns
            if written >= since:
                dated.append((written, step, path))
    dated.sort(reverse=True)
    return [path for _, _, path in dated]


def resume_run(run: Run, corpus: Corpus) -> None:
    """Continue from the checkpoint named, if of this arm, else the newest valid one in save_dir."""
    if run.config.resume not in ("auto", "anew"):
        payload = load_checkpoint(run.config.resume)
        arms = [ARMS[name] for name in run.config.arm_list]
        require_field(run.config, "resume", payload["arm"] in arms,
                      f"of an arm of this run ({payload['arm']} is not); set --arms")
        same_rate = not run.config.lr_grid or payload["config"]["lr"] == run.config.lr
        same_seed = payload["config"]["seed"] == run.config.seed
        if payload["arm"] == run.arm and same_seed and same_rate:
            restore(run, payload, run.config.resume, corpus)
            print(f"{run.arm}: resumed from {run.config.resume}")
            return
    path = None
    if rank_and_size().rank == 0:
        path = resume_newest(run, corpus)
    path = of_first_rank(path)
    if path and rank_and_size().rank > 0:
        restore(run, load_checkpoint(path), path, corpus)


def check_nothing_replaced(config: Config, corpus: Corpus) -> None:
    """Raise OtherRun, before the first arm trains, where what save_dir has of an arm is whole and
    of another run alone: this one would start at step 0 and replace its files."""
    for seed, name, rate in itertools.product(config.seed_list, config.arm_list, config.rates):
        variant, tag = variant_of(config, seed, rate)
        run, others = plan_run(name, variant, corpus, tag), []
        for path in newest_checkpoints(run):
            try:
                check_same_run(run, load_checkpoint(path), path, corpus)
                others = []
                break
            except OtherRun as error:
                others.append(error)
            except ValueError:  # damaged: said when it is passed over
                continue
        if others:
            raise OtherRun(f"{others[0]}, or --resume anew to train over it")


def resume_newest(run: Run, corpus: Corpus) -> str | None:
    """Continue from the newest valid checkpoint in save_dir -> its path, None without any."""
    for path in newest_checkpoints(run):
        try:
            restore(run, load_checkpoint(path), path, corpus)
            print(f"{run.arm}: {'finished in' if run.results else 'resumed from'} {path}")
            return str(path)
        except ValueError as error:
            print(f"resume: passed over {error}")
    print(f"{run.arm}: no valid checkpoint in {run.config.save_dir}, starting at step 0")
    return None


# ══ Export: a folder that transformers loads without this repository ═════════════════════════════
END = "<|endoftext|>"  # begins, ends and pads a text
EXPORTING = ".exporting"  # in a folder that an export has begun to write, and not finished
# Fields of Config that say how a memory is built: DNCGPT2Config has them under the same names.
CARRIED_FIELDS = (
    "seq_len", "memory", "mem_slots", "mem_width", "num_reads", "pointing", "split_rows", "row_key",
    "empty_slot", "usage_decay", "min_surprisal", "use_links", "mask_min", "dealloc_wipe",
    "sharpen_links", "lambda_vocabulary",
)


class Trained(NamedTuple):
    """A model from a checkpoint, on the CPU, and what it was trained with."""
    model: GPT2WithMemory
    tokenizer: object
    payload: dict  # of the checkpoint


def with_end_token(tokenizer: object, embedding: Tensor, end: str = END
                   ) -> tuple[object, Tensor]:
    """A tokenizers.Tokenizer for transformers, with the token `end`, and the embedding (V, C) with
    a row for it. Where the vocabulary lacks it the row is the mean of all: its probability is then
    at most 1 / (V + 1), as the mean of exp is no less than exp of the mean, and it can be trained.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    with_begin, without = (tokenizer.encode("a", add_special_tokens=add).ids
                           for add in (True, False))
    if with_begin != without:  # training and evaluation read texts without
        tokenizer.post_processor = processors.Sequence([])
    tokenizer.add_special_tokens([end])  # one that is known keeps its number
    missing = tokenizer.token_to_id(end) + 1 - len(embedding)
    if missing > 0:
        row = embedding.float().mean(0, keepdim=True).to(embedding.dtype)
        embedding = torch.cat((embedding, row.expand(missing, -1)))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end,
        padding_side="left", clean_up_tokenization_spaces=False)
    return fast, embedding


def names_used(node: ast.AST) -> set[str]:
    """The names that a definition reads when it runs and does not bind itself: annotations are not
    evaluated."""
    read, bound, open_nodes = set(), set(), [node]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name):
            names = read if isinstance(node.ctx, ast.Load) else bound
            names.add(node.id)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            children = value if isinstance(value, list) else [value]
            open_nodes += [child for child in children if isinstance(child, ast.AST)]
    return read - bound


def names_defined(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module gives a meaning."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    names = set()
    for target in targets:
        if isinstance(target, ast.Name):
            names.add(target.id)
    return names


def statements_for(body: list[ast.stmt], wanted: set[str]) -> list[ast.stmt]:
    """The statements of a module that define the wanted names, and all that those use, in order."""
    taken, names = set(), wanted
    while names:  # what these use, what that uses, ...
        used = set()
        for node in body:
            if node not in taken and names & names_defined(node):
                taken.add(node)
                used |= names_used(node)
        names = used
    return [node for node in body if node in taken]


def definitions(path: Path, wanted: set[str], written: set[tuple[str, int]]) -> str:
    """The source of those definitions of a module and of all that they use, in its order, each but
    those that are written already (file, line); what it imports from modules beside it comes first,
    written out likewise."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    statements = statements_for(ast.parse(text).body, wanted)
    used = set().union(wanted, *map(names_used, statements))
    parts = []
    for node in statements:
        place = (path.name, node.lineno)
        if place in written:
            continue
        if isinstance(node, ast.ImportFrom):
            parts.append(imported(path, node, used, written))
            continue
        written.add(place)
        decorators = getattr(node, "decorator_list", [])
        first = min(part.lineno for part in (node, *decorators))
        source = "".join(lines[first - 1 : node.end_lineno])
        parts.append(f"\n{source}\n")
    return "".join(parts)


def imported(path: Path, node: ast.ImportFrom, used: set[str], written: set[tuple[str, int]]
             ) -> str:
    """The used names of an import: as an import, or, of a module beside path, written out."""
    needed = [alias for alias in node.names if (alias.asname or alias.name) in used]
    beside = path.with_name(f"{node.module}.py")
    if beside.exists():
        return definitions(beside, {alias.name for alias in needed}, written)
    return ast.unparse(ast.ImportFrom(node.module, needed, node.level)) + "\n"


def standalone_source(path: Path) -> str:
    """The source of a module with everything that it uses of the modules beside it written out: it
    then runs without them. Annotations are left unevaluated, as they name what is not there."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    parts, written, start = [], set(), 0
    docstring, *body = ast.parse(text).body
    future = "\nfrom __future__ import annotations\n"
    if future not in text:
        start = docstring.end_lineno
        parts += [*lines[:start], future]
    for node in body:
        beside = path.with_name(f"{getattr(node, 'module', None)}.py")
        if isinstance(node, ast.ImportFrom) and beside.exists():
            parts += lines[start : node.lineno - 1]
            parts.append(definitions(beside, {alias.name for alias in node.names}, written))
            start = node.end_lineno
    return "".join(parts + lines[start:])


def model_card(trained: Trained, config: Config) -> str:
    """README.md of an exported folder: what it is, how it is loaded, and what was measured."""
    payload = trained.payload
    arm, results = payload["arm"], payload["results"]
    columns = {arm: results}
    for path in newest_baselines(config.save_dir):
        try:
            other = load_checkpoint(path)
        except ValueError:
            continue
        if is_comparable(payload, other):
            columns = {other["arm"]: other["results"], arm: results}
            break
    fields = model_fields(trained.model.config)
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation",
        "tags: [dnc_gpt2, memory-augmented]", "---",
        f"# {arm}", "",
        f"GPT-2 with a memory, trained from scratch or on from a checkpoint: {payload['corpus']}, "
        f"{payload['global_step']:,} steps. One file of code, dnc_model.py, comes with it.", "",
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)',
        'prompt = tokenizer("Some text", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))", "```", "",
        f"Its window of attention has {trained.model.config.seq_len} tokens; when it is full the "
        "older half leaves, and the memory goes on. A token takes the same time and memory however "
        "long the text is.", "",
        *card_table(columns), "", "Settings: " + ", ".join(fields) + ".", ""])


def is_comparable(payload: dict, other: dict) -> bool:
    """Whether a checkpoint is of a finished run as another, of another arm: the same data, fields
    and steps."""
    for name in ("fingerprint", "global_step"):
        if payload[name] != other[name]:
            return False
    of_arm = FREE_FIELDS | MEMORY_FIELDS | {"memory", "mlp_width"}
    if payload["config"].get("lr_grid"):  # every arm has a rate of its own
        of_arm |= {"lr"}
    for name, value in payload["config"].items():
        if name not in of_arm and other["config"].get(name, value) != value:
            return False
    return payload["arm"] != other["arm"] and bool(other["results"])


def model_fields(config: object) -> list[str]:
    """`name value` of what sizes a model and says how it was trained."""
    names = ("hidden_size", "num_layers", "num_heads", *CARRIED_FIELDS, "batch_size", "lr", "seed")
    return [f"{name} {getattr(config, name)}" for name in names]


def card_table(columns: dict[str, dict]) -> list[str]:
    """The lines of a table of METRICS, one column a model; that they were not measured where a
    model has no results."""
    if not all(columns.values()):
        return ["Not evaluated: the run was not finished."]
    scored = next(iter(columns.values()))["valid"]["counts"].sum()
    head = ["validation", *columns]
    lines = [f"Measured by dnc_gpt2.py on {int(scored):,} tokens of validation, in windows that do "
             "not overlap:", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for metric in METRICS:
        values = [results["valid"]["metrics"].get(metric.key) for results in columns.values()]
        if metric.label and None not in values:
            cells = [f"{value:{metric.form}}" for value in values]
            lines.append(f"| {metric.label} | " + " | ".join(cells) + " |")
    cells = []
    for results in columns.values():
        value = results["test"]["metrics"]["ppl"]
        cells.append(f"{value:,.2f}")
    return [*lines, "| Test perplexity ↓ | " + " | ".join(cells) + " |"]


def exported_settings(model: GPT2WithMemory, controller: dict, vocabulary: int) -> dict:
    """What config.json of an exported folder says, but for the tokens that end a text."""
    settings = {
        "architectures": ["DNCGPT2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "dnc_model.DNCGPT2Config",
            "AutoModel": "dnc_model.DNCGPT2ForCausalLM",  # with its head: there is none without
            "AutoModelForCausalLM": "dnc_model.DNCGPT2ForCausalLM",
        },
        "model_type": "dnc_gpt2",
        "base": controller | {"vocab_size": vocabulary},
        "dtype": "float32",
        "scan": "eager",  # the folder carries no kernels
    }
    return settings | {name: getattr(model.config, name) for name in CARRIED_FIELDS}


def export_model(trained: Trained, folder: Path, config: Config) -> None:
    """Write weights, configuration, tokenizer, code and model card into a folder. Raises ValueError
    where it cannot be written."""
    from safetensors.torch import save_file

    code = Path(__file__).with_name("dnc_model.py")
    require(code.exists(), "export", str(folder), "run with dnc_model.py, which the folder is to "
            "carry, beside dnc_gpt2.py")
    model, payload = trained.model, trained.payload
    weights = model.state_dict()
    embedding = "controller.wte.weight"
    tokenizer, weights[embedding] = with_end_token(trained.tokenizer, weights[embedding])
    vocabulary = len(weights[embedding])
    settings = exported_settings(model, json.loads(payload["controller"]), vocabulary)
    ends = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}

    # Until all of it is written there is no config.json, without which nothing loads the folder.
    write_text("", folder / EXPORTING)
    (folder / "config.json").unlink(missing_ok=True)
    with whole_file(folder / "model.safetensors") as temporary:
        whole = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(whole, temporary, metadata={"format": "pt"})
    write_text(json.dumps(ends, indent=1), folder / "generation_config.json")
    with growing(folder):
        tokenizer.save_pretrained(folder)
    write_text(standalone_source(code), folder / "dnc_model.py")
    write_text(model_card(trained, config), folder / "README.md")
    write_text(json.dumps(settings | ends, indent=1), folder / "config.json")
    (folder / EXPORTING).unlink()
    print(f"wrote {folder}/: load it with AutoModelForCausalLM.from_pretrained({str(folder)!r}, "
          "trust_remote_code=True)")


# ══ The shell of a command: what every script of this repository shares ══════════════════════════
class Diverged(RuntimeError):
    """Loss or gradient is not finite; the weights are still those of the step before."""


class Refused(ValueError):
    """A user's mistake, told as it is: nothing has to be said about the file it was read from."""


def require(holds: bool, field: str, value: object, requirement: str) -> None:
    """Raise ValueError, naming field, value and requirement, unless the condition holds."""
    if not holds:
        raise Refused(f"{field} = {cut(repr(value))}: must be {requirement}")


def cut(text: str, most: int = 200) -> str:
    """A text, or its beginning where it is long."""
    return text if len(text) <= most else text[:most] + " …"


def require_field(config: object, field: str, holds: bool, requirement: str) -> None:
    """`require` for a field of a Config, whose value it looks up."""
    require(holds, field, getattr(config, field), requirement)


TOO_LARGE = "below 2**63"


def misfit(value: object, hint: object) -> str:
    """What a value of the annotated type `hint` has to be; "" where it fits."""
    if get_origin(hint) is Annotated:
        kind, bound = get_args(hint)
        reason = misfit(value, kind)
        fits_bound = reason not in ("", TOO_LARGE) or bound.holds(value)
        return reason if fits_bound else bound.words
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        fits = any(type(value) is type(choice) and value == choice for choice in choices)
        return "" if fits else "one of " + ", ".join(map(str, choices))
    if get_origin(hint) is not None:  # A | B
        reasons = [misfit(value, option) for option in get_args(hint)]
        return "" if "" in reasons else ", or ".join(reasons)
    fits = type(value) is hint  # a bool is no int here
    if hint is int and fits and abs(value) >= 2**63:
        return TOO_LARGE
    if hint is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max  # NaN is not
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}
    return "" if fits else words[hint]


def check_fields(config: object, hints: dict[str, object] | None = None) -> None:
    """Raise ValueError unless every field of a Config is what its annotation says; or of other
    fields, whose types are given by name."""
    hints = hints or get_type_hints(type(config), include_extras=True)
    for name, hint in hints.items():
        value = getattr(config, name)
        reason = misfit(value, hint)
        require(not reason, name, value, reason)


def check_config(config: Config) -> None:
    """Raise ValueError where fields do not go together."""
    arms, heads = config.arm_list, config.num_heads
    rule = functools.partial(require_field, config)
    check_repeats(config, rule)
    rule("arms", set(arms) <= set(ARMS) and len(set(arms)) == len(arms),
         "a comma-separated choice of " + ", ".join(ARMS) + ", each once")
    rule("arms", "matched" not in arms or config.init_from == "scratch",
         "without matched where init_from names a model, whose sizes are given")
    rule("arms", "cache" not in arms or "baseline" in arms[: arms.index("cache")],
         "with baseline before cache, which takes the weights of the trained baseline")
    rule("tokenizer", config.tokenizer != "own" or config.init_from == "scratch",
         "that of the model which init_from names")
    rule("hidden_size", config.hidden_size % heads == 0, f"divisible by num_heads ({heads})")
    check_rows(config, rule)
    rule("routing_fraction", config.routing_fraction > 0, "above 0; without it: lambda_routing 0")
    rule("eval_rows", config.eval_rows >= 2, "2 or more")
    check_rows_and_links(config)
    rule("text", config.text.strip() and not re.search("[\ud800-\udfff]", config.text),
         "words in UTF-8")
    rule("use_compile", not config.use_compile or config.num_gpus != 2,
         "False on two GPUs; set num_gpus=1")


def check_rows_and_links(config: object) -> None:
    """Raise ValueError where the fields of a DNC do not go together."""
    rule = functools.partial(require_field, config)
    rule("mem_width", not config.split_rows or config.mem_width >= 2, "2 or more to be split")
    rule("mask_min", not config.split_rows or config.mask_min == 1,
         "1 with split rows, whose key half takes the place of masks; set split_rows False")
    rule("sharpen_links", config.use_links or not config.sharpen_links,
         "False without links; set use_links True as well")


def check_rows(config: Config, rule: Callable) -> None:
    """Raise ValueError where the rows of a step cannot be split as asked for."""
    batch, rows = config.batch_size, config.rows
    rule("bptt_segments", batch % config.bptt_segments == 0, f"a divisor of batch_size ({batch})")
    rule("accumulate", rows % config.accumulate == 0,
         f"a divisor of the rows, batch_size / bptt_segments ({rows})")
    rule("num_gpus", config.num_gpus != 2 or rows >= 2,
         f"at most the rows, batch_size ({batch}) / bptt_segments; set num_gpus=1")


def check_repeats(config: Config, rule: Callable) -> None:
    """Raise ValueError where seeds or lr_grid cannot be read."""
    counted = re.fullmatch(r"[1-9]\d?", config.seeds)
    listed = re.fullmatch(r"\d{1,9}(, ?\d{1,9})+", config.seeds)
    rule("seeds", counted or listed, "1 to 99, or a list of whole numbers such as 0,1,2")
    rule("seeds", len(set(config.seed_list)) == len(config.seed_list), "a list with each once")
    rule("seeds", max(config.seed_list) < 2**32, "of seeds below 2**32; set a smaller seed")
    rule("lr_grid", rates_of(config.lr_grid), "empty, or a list of different numbers above 0, "
         "such as 3e-4,1e-3")


def rates_of(text: str) -> bool:
    """Whether a text is empty or a comma-separated list of different numbers above 0."""
    if not text:
        return True
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        return False
    named = {f"{rate:g}" for rate in rates}  # as in the names of files
    return len(named) == len(rates) and all(0 < rate < math.inf for rate in rates)


@functools.cache
def without_rules(cls: type) -> type:
    """A Config class whose rules do not run inside tyro, so that what they say stays one line. One
    for each: tyro reads the comments of the fields anew for every class."""
    # It says it is of the class's own file, where tyro looks for those comments.
    members = {"__doc__": cls.__doc__, "__module__": cls.__module__,
               "__post_init__": lambda self: None}
    return type(cls.__name__, (cls,), members)


def read_config(cls: type, argv: list[str], description: str, preset: dict | None = None):
    """Read `--name value` words over `preset` over the defaults of the Config class `cls`.

    description: the module docstring, of which the part before "Read downward" is shown by --help.
    A path that begins with ~/ is expanded. Raises ValueError where a value breaks a rule of the
    class, a name is unknown or a value mistyped, SystemExit 0 after --help, as tyro does.
    """
    import tyro

    unchecked = without_rules(cls)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            options = tyro.cli(
                unchecked, args=argv, default=unchecked(**(preset or {})),
                description=description.partition("\nRead downward")[0],
                prog=f"python {Path(sys.argv[0]).name}", use_underscores=True,
                config=(tyro.conf.FlagConversionOff,))
    except SystemExit as done:
        if not done.code:
            raise
        lines = [line.strip("│ ") for line in box.getvalue().splitlines() if line[:1] == "│"]
        raise Refused("; ".join(line for line in lines if line.strip("─"))) from None
    values = vars(options)
    for name, value in values.items():
        if isinstance(value, str) and value.startswith("~/"):
            values[name] = str(Path(value).expanduser())
    return cls(**values)


def split_command(argv: list[str], commands: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Split `[command] --name value ...` into the commands asked for (all by default) and the rest.
    Raises ValueError for an unknown command."""
    if not argv or argv[0].startswith("-"):
        return commands, argv
    command, *rest = argv
    require(command in commands, "command", command, "one of " + ", ".join(commands))
    return (command,), rest


class StopSignal(KeyboardInterrupt):
    """SIGINT or SIGTERM. Raised at once, or, inside `held`, by the next `check`. Where nothing
    meets it, as a library computes or a destructor swallowed it, `watch` ends the process."""

    def __init__(self) -> None:
        super().__init__()
        self.signum = 0
        self.is_held = False
        self.is_met = threading.Event()

    def receive(self, number: int, frame: object) -> None:
        """Handle a signal; a second one ends the process."""
        self.signum = number
        signal.signal(number, signal.SIG_DFL)
        if not self.is_held:
            raise self

    def check(self) -> None:
        """Raise this where a signal has come."""
        if self.signum:
            raise self

    def check_together(self) -> None:
        """`check` at one place of every rank: a signal to one of them stops all."""
        if rank_and_size().size > 1:
            self.signum = max(of_every_rank(self.signum))
        self.check()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait for `check`: what runs inside can then be saved as a whole."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        self.check()

    def watch(self, wake: socket.socket, farewell: str) -> None:
        """Wait, in a thread of its own, for the number of a signal, which the system writes into
        wake at once, and then until the signal is met: GRACE seconds while nothing holds it."""
        numbers = wake.recv(1)
        left = GRACE
        while numbers and left > 0:
            if self.is_met.wait(0.1):
                return
            passed_on = signal.getsignal(numbers[0]) not in (self.receive, signal.SIG_DFL)
            if not self.is_held and not passed_on:
                left -= 0.1
        if numbers:
            end_process(farewell, 128 + numbers[0])

    @contextlib.contextmanager
    def listening(self, farewell: str) -> Iterator[None]:
        """Handle both signals inside the block; farewell is what `watch` says."""
        caught = (signal.SIGINT, signal.SIGTERM)
        wake, told = socket.socketpair()
        told.setblocking(False)
        shown = sys.unraisablehook

        def show_other(lost: object) -> None:
            if lost.exc_value is not self:
                shown(lost)

        before = {number: signal.signal(number, self.receive) for number in caught}
        woken = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        sys.unraisablehook = show_other
        threading.Thread(target=self.watch, args=(wake, farewell), daemon=True).start()
        try:
            yield
        finally:
            self.is_held = True  # a signal that comes now has nothing left to stop
            self.is_met.set()
            signal.set_wakeup_fd(woken)
            sys.unraisablehook = shown
            for number, handler in before.items():
                signal.signal(number, handler)
            told.close()


GRACE = 3.0  # seconds that a signal may wait for the line of Python that meets it


def end_process(farewell: str, code: int) -> None:
    """End this process and its workers at once, whatever the main thread is doing."""
    if "multiprocessing" in sys.modules:
        import multiprocessing

        for worker in multiprocessing.active_children():
            worker.kill()
    with contextlib.suppress(OSError):
        os.write(2, farewell.encode(errors="replace"))
    os._exit(code)


USER_ERRORS = (ValueError, OSError, MemoryError, concurrent.futures.BrokenExecutor)
# What the allocators of torch and of the system say where there is not enough memory.
NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory|overflow|"
                       r"Unable to allocate|invalid stride|too large", re.IGNORECASE)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    is_torchs = isinstance(error, RuntimeError | TypeError | OverflowError)
    return is_torchs and NO_MEMORY.search(str(error)) is not None


def one_line(text: object, most: int = 600) -> str:
    """A text on one line, cut where it is long."""
    words = " ".join(str(text).split())
    return cut("".join(char if char.isprintable() else "?" for char in words), most)


def ending(error: BaseException, sizes: str) -> tuple[str, int]:
    """What a command says of the error that ended it, and its exit code."""
    said = one_line(error)
    if isinstance(error, (Diverged, RankLost)):
        return said, 1
    if lacks_memory(error):
        reason = said.partition(". ")[0] or "out of memory"
        return f"{reason}; set a smaller {sizes}", 2
    if isinstance(error, USER_ERRORS):
        return said, 2
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
    kind = type(error).__name__
    return (f"a fault of this program: {kind} at {where}: {said}; please report it (with "
            "TRACEBACK=1 in the environment the whole trace is shown)"), 1


def run_command(job: Callable[[StopSignal], None], again: list[str], saved: str,
                sizes: str = "batch_size or seq_len", go_on: str = "continue with") -> int:
    """Run the job of a command -> exit code: 0, 1 diverged, 2 a user's mistake, 128 + signal.

    again: the command line that goes on where this one was stopped; saved: what is then on disk;
    sizes: the fields to make smaller where memory is short; go_on: what is said before again.
    Errors are one line on stderr.
    """
    stop = StopSignal()
    farewell = f"\nstopped; {saved}; {go_on}:\n  {launcher()} {shlex.join(again)}\n"
    try:
        with stop.listening(farewell):
            job(stop)
        return 0
    except StopSignal:
        print(farewell, end="", file=sys.stderr)
        return 128 + stop.signum
    except SystemExit as done:  # tyro has printed the help
        return done.code or 0
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        said, code = ending(error, sizes)
        print(f"error: {said}", file=sys.stderr)
        return code


class Screen(io.TextIOWrapper):
    """stdout or stderr that outlives its reader: where nobody takes the text any more, or a disk is
    full, the rest goes nowhere, and the run, whose results are in files, goes on."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        """Point the stream to nowhere."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.name == "<stdout>" and error.errno != errno.EPIPE:  # of head, which has enough
            print(f"stdout: {error.strerror}; the run goes on, its results are in files",
                  file=sys.stderr)


def lasting(stream: io.TextIOBase | None, name: str) -> io.TextIOBase:
    """A stream of the interpreter as a Screen, a notebook's as it is."""
    if stream is None:  # closed by the shell, as in `>&-`
        while (number := os.open(os.devnull, os.O_RDWR)) < 2:  # or a file would be taken for it
            pass
        return open(number, "w", encoding="utf-8")
    is_own = stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper)
    if is_own and not isinstance(stream, Screen):
        encoding = stream.encoding
        by_line = stream.line_buffering
        screen = Screen(stream.detach(), encoding, errors="replace", line_buffering=by_line)
        setattr(sys, f"__{name}__", screen)
        return screen
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream


def print_any_character() -> None:
    """Let a terminal that lacks ▲ and █ still get the table, and let the run outlive it."""
    sys.stdout = lasting(sys.stdout, "stdout")
    sys.stderr = lasting(sys.stderr, "stderr")


# ── Files ────────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def whole_file(path: Path, remedy: str = "free some space, or name another folder"
               ) -> Iterator[Path]:
    """Write a file whole or not at all: yields a temporary path, which is synced and renamed when
    the block ends. Raises ValueError, one line with the remedy, where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # each library reports a full disk in a class of its own
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({error}); {remedy}") from None


@contextlib.contextmanager
def growing(path: Path) -> Iterator[Path]:
    """Write to a file that grows, or let a library write to a folder: a full disk becomes one line,
    and what is there stays."""
    try:
        yield path
    except Refused:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be written ({reason}); free some space, then run the "
                         "same command again, dnc_gpt2.py with --resume auto") from None


def write_text(text: str, path: Path) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


SEALED = "sha256"  # the key of a JSON file under which the digest of all the others stands


def write_json(content: dict, path: Path) -> None:
    """Write a JSON file whole or not at all, with a digest of what it says."""
    content = {name: value for name, value in content.items() if name != SEALED}  # an older one's
    digest = content_digest(json.loads(json.dumps(content)))
    write_text(json.dumps(content | {SEALED: digest}, indent=1), path)


def content_digest(content: dict) -> str:
    """The sha256 of what a JSON file says, however it is laid out."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_file(path: Path, remedy: str) -> None:
    """Raise ValueError unless there is a regular file: what else could be opened may never end (a
    device), or keep the reader waiting (a pipe)."""
    if not path.is_file():
        problem = "is no regular file" if path.exists() else "is not there"
        raise Refused(f"{path}: {problem}; {remedy}")


@contextlib.contextmanager
def reading(path: str | Path, remedy: str) -> Iterator[None]:
    """Turn whatever goes wrong with what a file says into one ValueError with file and remedy. What
    is refused by name, and a lack of memory, are passed on."""
    try:
        yield
    except Exception as error:
        names_it = isinstance(error, ValueError | OSError) and str(path) in str(error)
        if names_it or lacks_memory(error) or isinstance(error, Refused):
            raise
        raise ValueError(f"{path}: truncated, altered or not written by this script; {remedy}"
                         ) from None


def read_json(path: Path, remedy: str) -> dict:
    """Read a JSON object; {} where there is no such file. Raises ValueError for anything else, and
    where its digest is not of what it says."""
    if not os.path.lexists(path):
        return {}
    check_file(path, remedy)
    with reading(path, remedy):
        content = json.loads(path.read_bytes())
        *others, last = content or [None]
        sealed = SEALED in content
        if not sealed:  # an older file, or one whose seal has lost its name
            sealed = content_digest({name: content[name] for name in others}) == content.get(last)
        said = content.pop(SEALED, None)
        if sealed and said != content_digest(content):
            raise ValueError(f"{path}: altered, its sha256 is another; {remedy}")
    return content


SEAL = b"sha256:"  # and the digest in hexadecimal, at the very end of a file of tensors
SEAL_BYTES = len(SEAL) + 64
ZIP_END = b"PK\5\6"  # begins the last 22 bytes of a zip file without a comment


def file_sha(path: Path, end: int | None = None) -> str:
    """Return the sha256 of a file, or of its first bytes; it may be larger than memory."""
    digest = hashlib.sha256()
    left = path.stat().st_size if end is None else end
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 2**22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def seal(path: Path) -> None:
    """Append the sha256 of a zip file as its comment, which torch.load passes over."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, 0 as torch.save leaves it
        file.write(SEAL_BYTES.to_bytes(2, "little"))
    digest = file_sha(path)
    with open(path, "ab") as file:
        file.write(SEAL + digest.encode())


def check_seal(path: Path, remedy: str) -> None:
    """Raise ValueError unless a file of tensors ends with the sha256 of all before; an older one
    ends without. Also where what it unpacks to is larger than the file: torch packs nothing."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - SEAL_BYTES))
        tail = file.read()
    is_older = tail[-22:-18] == ZIP_END and tail[-2:] == b"\0\0"
    if not is_older:
        said = tail.removeprefix(SEAL).decode("ascii", "replace")
        is_whole = tail.startswith(SEAL) and said == file_sha(path, size - SEAL_BYTES)
        if not is_whole:
            raise ValueError(f"{path}: truncated, altered or not written by this script, its "
                             f"sha256 is another; {remedy}")
    with reading(path, remedy), zipfile.ZipFile(path) as parts:
        if sum(part.file_size for part in parts.infolist()) > size:
            raise ValueError("a bomb")


def save_tensors(payload: dict, path: Path,
                 remedy: str = "free some space, then run the same command again") -> None:
    """torch.save, whole or not at all, sealed. Raises ValueError with the remedy."""
    with whole_file(path, remedy) as temporary:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
        seal(temporary)


def load_tensors(path: Path, keys: Iterable[str], remedy: str, device: str = "cpu") -> dict:
    """Read what save_tensors wrote: tensors and plain values, never a pickle. Raises ValueError,
    naming file and remedy, where it is missing, truncated, altered, foreign or lacks a key."""
    check_file(path, remedy)
    check_seal(path, remedy)
    with reading(path, remedy):
        payload = torch.load(path, map_location=device, weights_only=True)
        if not (isinstance(payload, dict) and set(keys) <= payload.keys()):
            raise ValueError("of another kind")
    return payload


def check_folder(folder: str | Path, field: str, needed_mb: float = 1.0) -> None:
    """Make an output folder, named by a field, and prove that it can be written with so many MiB
    free. Raises ValueError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write_test").write_bytes(b"x" * 4096)
        (folder / ".write_test").unlink()
        free = shutil.disk_usage(folder).free / 2**20
    except OSError as error:
        raise ValueError(f"{field} = {str(folder)!r}: cannot be written ({error.strerror}); name "
                         "another folder") from None
    require(free >= needed_mb, field, str(folder), f"on a disk with {needed_mb:,.0f} MiB free "
            f"({free:,.0f} are); free some, or name another folder")


@contextlib.contextmanager
def locked(folder: str | Path, field: str, name: str = ".lock") -> Iterator[None]:
    """One writer a folder, named by a field, or several who lock files of different names in it;
    the system lets go of the lock of a process that died. Raises ValueError where another is at
    work."""
    from filelock import FileLock, Timeout

    lock = FileLock(Path(folder) / name, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{field} = {str(folder)!r}: another run is writing there; wait for it, "
                         f"or name another --{field}") from None
    try:
        yield
    finally:
        lock.release()


# ── Memory, before anything is built ─────────────────────────────────────────────────────────────
SIZES = "hidden_size, num_layers, mem_slots, mem_width, num_reads, batch_size or seq_len"


def free_memory(device: torch.device | str = "cpu") -> float:
    """Bytes that can still be had: of a GPU; or of the machine, of this process's control group and
    of its limit of addresses, whichever is least."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    least = math.inf
    with contextlib.suppress(OSError, TypeError):
        told = Path("/proc/meminfo").read_text()
        least = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", told)[1])
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # "max"
            group = Path("/sys/fs/cgroup")
            left = int((group / limit).read_text()) - int((group / used).read_text())
            least = min(least, left)
    with contextlib.suppress(OSError, ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if limit != resource.RLIM_INFINITY:
            least = min(least, limit - pages * resource.getpagesize())
    return least


def check_memory(needed: float, fields: str, device: torch.device | str = "cpu") -> None:
    """Raise ValueError, naming the fields to make smaller, where more bytes are needed than are
    free. What is needed is counted low: what it refuses could not have run."""
    free = free_memory(device)
    if needed > free:
        raise Refused(f"not enough memory: at least {needed / 2**30:,.1f} GiB are needed, "
                      f"{max(0, free) / 2**30:,.1f} are free; set a smaller {fields}")


def controller_parameters(settings: object) -> int:
    """The parameters of a GPT2Model of a GPT2Config."""
    width = settings.n_embd
    inner = settings.n_inner or 4 * width
    block = 4 * width * (width + 1) + 2 * width * inner + inner + 5 * width
    tables = (settings.vocab_size + settings.n_positions) * width
    return tables + settings.n_layer * block + 2 * width


def arm_bytes(config: Config, settings: object, training: bool = True) -> float:
    """The least bytes that an arm takes: weights, in training gradients and two moments as well,
    the state of the memory, and what it reads and writes at each token of a step."""
    objects = 50_000 * settings.n_layer  # a block's modules, in Python
    weights = controller_parameters(settings)
    rows, length = (config.rows, config.step_len) if training else (1, 1)
    held = 0
    if config.memory != "none":
        held += rows * config.mem_slots
    if config.memory == "dnc":
        held += rows * config.mem_slots * config.mem_width
        held += rows * length * config.mem_slots * (1 + config.num_reads)
        objects += 100 * config.num_reads
    least = objects + 4 * (weights + held)
    if config.memory == "none" or least > free_memory():
        return least + (12 * weights if training else 0)

    with torch.device("meta"):  # has shapes and no numbers
        memory = build_memory(config)
    weights += count_parameters(memory)
    return objects + 4 * (weights * (4 if training else 1) + held)


# ── A baseline for those who need one ────────────────────────────────────────────────────────────
def newest_baselines(folder: str | Path) -> list[Path]:
    """The finished baselines of a folder, and of those that train_baseline makes in it, the newest
    first."""
    name = "GPT2_Baseline_FINAL_step*.pt"
    paths = [*Path(folder).glob(name), *Path(folder).glob(f"base_*/{name}")]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def train_baseline(**fields: object) -> Path:
    """Train a baseline as a process of dnc_gpt2.py, with fields over the preset small, in a folder
    of its own below save_dir -> its checkpoint. Stopped by a signal, that process saves its state,
    and the next call of the same fields goes on from there. Raises StopSignal's kind then,
    ValueError where the process fails."""
    told = {name: str(value) for name, value in fields.items() if not name.endswith("_dir")}
    name = hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:8]
    folder = Path(str(fields["save_dir"])) / f"base_{name}"
    options = {"arms": "baseline", "preset": "small", "resume": "anew"} | fields
    options["save_dir"] = folder
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    # Of a session of its own: Ctrl-C would reach it twice, and a second signal ends it unsaved.
    alone = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    process = subprocess.Popen(command, start_new_session=True, env=alone)
    came = []

    def pass_on(number: int, frame: object) -> None:
        came.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:  # what it had is saved
        signal.raise_signal(came[0])
    require(code == 0, "base", "auto", f"trained, and this ended with exit code {code}; see above")
    return newest_baselines(folder)[0]


# ── What a reader is told: facts of a run, tables, figures ───────────────────────────────────────
RULE, LINE = "═" * 78, "  " + "─" * 74
MARKS = {1: "✓", -1: "✗", 0: "≈"}  # better, worse, undecided
PALETTE = (
    "#4fc3f7",  # sky
    "#aed581",  # lime
    "#ff8a65",  # coral
    "#fff176",  # lemon
    "#ce93d8",  # lilac
    "#ffb347",  # amber
    "#80cbc4",  # teal
    "#f06292",  # rose
)
say_once = functools.cache(functools.partial(print, flush=True))


def device_name(device: torch.device | str) -> str:
    """A device for people: the GPU's name, or the CPU with its threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "mps":
        return "Apple GPU (mps)"
    spins = os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive"
    return f"CPU, {torch.get_num_threads()} threads, which {'spin' if spins else 'sleep'} to wait"


def run_facts(device: str) -> dict:
    """What tells a reader of a file where it comes from: versions, device, command line."""
    import transformers

    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "transformers": transformers.__version__}
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"versions": versions, "device": device, "command": shlex.join(sys.argv),
            "source": source}


def print_heading(title: str) -> None:
    """Print a title between two rules."""
    print(f"{RULE}\n  {title}\n{RULE}")


def print_banner(title: str, lines: dict[str, str], config: object) -> None:
    """Print all that a reader needs to judge the figures: named lines, versions, every field."""
    versions = run_facts("")["versions"]
    lines |= {"versions": f"Python {versions['python']}, torch {versions['torch']}, "
                          f"transformers {versions['transformers']}"}
    print_heading(title)
    for name, text in lines.items():
        print(f"  {name:<9} {text}".replace("\n", "\n" + " " * 12))
    fields = [f"{name}={value}" for name, value in vars(config).items() if value != ""]
    print(textwrap.fill(" ".join(fields), 96, initial_indent="  config    ",
                        subsequent_indent=" " * 12, break_long_words=False), flush=True)


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval over seeds; NaN where there is one seed."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, math.nan
    variance = sum((x - mean) ** 2 for x in values) / (count - 1)
    return mean, student_interval(mean, variance / count, count - 1).half


def cell(values: float | None | list[float | None], form: str, width: int = 0) -> str:
    """A cell of a table, aligned right: a value, or of several the mean ± half of its interval; an
    em dash for what is not known."""
    if not isinstance(values, list):
        values = [values]
    known = [value for value in values if value is not None and math.isfinite(value)]
    text = "—"
    if len(known) == 1:
        text = format(known[0], form)
    elif known:
        mean, half = mean_and_half(known)
        text = f"{mean:{form}}±{half:{form}}"
    return text.rjust(width)


def plain(text: str) -> str:
    """Text for a figure, where matplotlib would take what stands between dollars for a formula."""
    return text.replace("$", r"\$")


@contextlib.contextmanager
def dark_figure(path: Path, rows: int, columns: int, figsize: tuple[float, float], **grid: object):
    """A dark matplotlib figure and its axes, written whole or not at all when the block ends."""
    from matplotlib import figure, style

    with style.context("dark_background"):
        drawing = figure.Figure(figsize=figsize, layout="constrained")
        yield drawing, drawing.subplots(rows, columns, **grid)
        with whole_file(path) as temporary:
            drawing.savefig(temporary, dpi=130, format="png")
    print(f"wrote {path}")


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of a warm-up over that share of all."""
    return max(1, round(warmup * total))


def rate_share(step: int, total: int, warmup: float, floor: float) -> float:
    """Share of the peak learning rate at `step` of `total`: a linear warm-up over that share of the
    steps, then a cosine down to `floor`; a floor of 1 is a constant rate."""
    rising = warmup_steps(warmup, total)
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, total - rising)
    return (1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * progress)


# ══ Many processes: torchrun, each with its rows ═════════════════════════════════════════════════
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK",
                  "GROUP_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
WAIT = datetime.timedelta(hours=2)  # of one rank for the others: a checkpoint, a first compilation


class RankLost(RuntimeError):
    """Another of the processes that torchrun started is gone."""


class Ranks(NamedTuple):
    """Which of how many processes this is."""
    rank: int = 0
    size: int = 1
    local: int = 0  # number on its machine: that of its GPU


def launched() -> Ranks:
    """What torchrun says of this process in its environment. Raises ValueError."""
    size, rank = os.environ.get("WORLD_SIZE"), os.environ.get("RANK")
    if size is None and rank is None:
        return Ranks()
    remedy = "as torchrun sets it; start with torchrun, or unset RANK and WORLD_SIZE"
    for name in ("WORLD_SIZE", "RANK"):
        value = os.environ.get(name, "")
        require(value.isdecimal(), name, value, f"a whole number, {remedy}")
    ranks = Ranks(int(rank), int(size), int(os.environ.get("LOCAL_RANK") or 0))
    require(ranks.rank < ranks.size, "RANK", ranks.rank, f"below WORLD_SIZE = {size}, {remedy}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        require(value or ranks.size == 1, name, value, f"an address, {remedy}")
    return ranks


def rank_and_size() -> Ranks:
    """This process among those that train together; one alone is rank 0 of 1."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


def share_of(count: int) -> slice:
    """Which of `count` rows are this rank's."""
    rank, size, _ = rank_and_size()
    return slice(rank * count // size, (rank + 1) * count // size)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, which have equally many rows each."""
    size = rank_and_size().size
    if size == 1:
        return values
    torch.distributed.all_reduce(values)
    return values / size


def of_every_rank(value: object) -> list:
    """A plain value or CPU tensors of every rank, in their order."""
    size = rank_and_size().size
    if size == 1:
        return [value]
    values = [None] * size
    torch.distributed.all_gather_object(values, value)
    return values


def of_first_rank(value: object) -> object:
    """The value that rank 0 has."""
    return of_every_rank(value)[0]


def roll_rows(state: tuple | None) -> tuple | None:
    """Give every row the state of the row before it, across the ranks."""
    if state is None or rank_and_size().size == 1:
        return map_state(lambda tensor: tensor.roll(1, 0), state)
    last = map_state(lambda tensor: tensor[-1:].cpu(), state)
    every = of_every_rank([*last])
    rank = rank_and_size().rank
    before = every[rank:] + every[:rank]  # this rank, ..., the one before it
    [*_, nearest] = [rows for rows in before if len(rows[0])]
    rolled = []
    for tensor, row in zip(state, nearest, strict=True):
        shifted = torch.cat((row.to(tensor.device), tensor))
        rolled.append(shifted[: len(tensor)])
    return type(state)(*rolled)


def state_of_all_rows(state: tuple | None) -> list[Tensor] | None:
    """The memory of the rows of every rank, as a checkpoint keeps it; a call of all ranks."""
    if state is None or rank_and_size().size == 1:
        return None if state is None else [*state]
    mine = [tensor.cpu() for tensor in state]
    return [torch.cat(parts) for parts in zip(*of_every_rank(mine), strict=True)]


def random_states() -> dict:
    """The states of the random generators, those of every rank under "ranks"; a call of all."""
    if rank_and_size().size == 1:
        return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    on_gpu = torch.cuda.is_initialized()
    mine = {"torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()] if on_gpu else []}
    every = of_every_rank(mine)
    return {**every[0], "ranks": every}


def restore_random_states(saved: dict, run: Run) -> None:
    """Put back what random_states returned. On another number of ranks each but the first draws
    anew, of seed, step and rank, which one line says."""
    rank, size, _ = rank_and_size()
    every = saved.get("ranks", [saved])
    if len(every) != size:
        print(f"{run.arm}: saved by {len(every)} processes, resumed by {size}: the same rows, "
              "memory and rates; sums round, and dropout draws, differently")
    if rank > 0 and len(every) != size:
        torch.manual_seed(run.config.seed * 1_000_003 + run.step + rank * 7_919)
        return
    mine = every[rank]
    torch.set_rng_state(mine["torch"])
    if size == 1:
        torch.cuda.set_rng_state_all(mine["cuda"][: torch.cuda.device_count()])
    elif mine["cuda"]:
        torch.cuda.set_rng_state(mine["cuda"][0])


def check_ranks(config: Config, size: int) -> None:
    """Raise ValueError where the rows of an arm do not split evenly over the ranks."""
    for name in config.arm_list:
        arm = arm_config(name, config)
        rows = f"{ARMS[name]} has {arm.rows} rows, batch_size / bptt_segments"
        require_field(arm, "batch_size", arm.rows % size == 0,
                      f"so that its rows split over {size} processes ({rows}); set --batch_size, "
                      "or --nproc_per_node")
        require_field(arm, "accumulate", arm.rows // size % arm.accumulate == 0,
                      f"a divisor of the {arm.rows // size} rows of a process")


def launcher() -> str:
    """How this process was started: python, or torchrun with its options."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    if processes is None:
        return "python"
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    nodes = "" if machines == "1" else f" --nnodes {machines}"
    return f"torchrun{nodes} --nproc_per_node {processes}"


def was_restarted() -> bool:
    """Whether torchrun --max_restarts has started these processes again; a call of all ranks, of
    which those of another machine are not told."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    return max(of_every_rank(restarts)) > 0


STARTED_FILE = ".started"  # in save_dir while a job that torchrun may restart is at work


def mark_start(config: Config) -> None:
    """Let a restart by torchrun tell the checkpoints of its own job from older ones."""
    started = Path(config.save_dir) / STARTED_FILE
    started.unlink(missing_ok=True)
    if launcher() != "python" and not config.resume:
        started.touch()


def job_started(folder: str) -> int:
    """When the job that torchrun has restarted began, in ns; 0 of any other job."""
    path = Path(folder) / STARTED_FILE
    return path.stat().st_mtime_ns if path.exists() else 0


def meeting_place(ranks: Ranks) -> "torch.distributed.Store":
    """Where the ranks find each other: torchrun's store, under a name that rank 0 makes up and all
    agree on. After a restart the store still has the addresses of processes that are gone."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", timeout=WAIT))
    mine = uuid.uuid4().hex
    if ranks.rank == 0:
        store.set("start", mine)
        present = [store.get(f"{mine}/{rank}").decode() for rank in range(1, ranks.size)]
        store.set(f"{mine}/present", " ".join(present))
        return dist.PrefixStore(mine, store)
    while True:
        start = store.get("start").decode()  # or that of a start before this one
        store.set(f"{start}/{ranks.rank}", mine)
        if store.check([f"{start}/present"]):
            if mine in store.get(f"{start}/present").decode():
                return dist.PrefixStore(start, store)
        time.sleep(0.05)


@contextlib.contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Work as one of the processes that torchrun started. Raises RankLost where another is gone."""
    import torch.distributed as dist

    if ranks.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        # While it waits for the others no handler of Python runs: a signal ends it at once.
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store = meeting_place(ranks)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size,
                                timeout=WAIT)
        dist.barrier()
        signal.signal(signal.SIGTERM, handler)
        yield
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0]
        raise RankLost(f"rank {ranks.rank} of {ranks.size} stops: another is gone ({reason[:80]}); "
                       "start again with --resume auto, or give torchrun --max_restarts") from None
    dist.destroy_process_group()


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether an error says that another process could not be reached."""
    import torch.distributed as dist

    words = ("Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe",
             "Socket closed", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


class QuietRank(io.TextIOBase):
    """The stderr of every rank but the first: errors alone, with the rank's number. Before the
    ranks have joined all find the same mistakes: then rank 0 is given time to say it, after which
    torchrun ends the others."""
    PATIENCE = 60.0  # seconds

    def __init__(self, screen, rank: int) -> None:
        self.screen, self.rank = screen, rank

    def write(self, text: str) -> int:
        if text.startswith("error: "):
            if rank_and_size().size == 1 and "TORCHELASTIC_RUN_ID" in os.environ:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(self.PATIENCE)
            self.screen.write(f"\nrank {self.rank}: {text.strip()}\n")
            self.screen.flush()
        return len(text)


@contextlib.contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Only rank 0 prints; of the others, errors."""
    rank = os.environ.get("RANK", "")
    if not (rank.isdecimal() and int(rank) > 0):
        yield
        return
    quiet = QuietRank(sys.stderr, int(rank))
    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(quiet)):
        yield


def local_device() -> torch.device:
    """The GPU where there is one, under torchrun that of LOCAL_RANK; else the CPU. Raises
    ValueError where torchrun started more processes than there are GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK", "")
    if not local.isdecimal():
        return torch.device("cuda")
    visible = torch.cuda.device_count()
    require(int(local) < visible, "LOCAL_RANK", local, f"below the {visible} CUDA devices that are "
            "visible; set a smaller --nproc_per_node")
    return torch.device("cuda", int(local))


# ══ Starting a run: preset, controller, hardware ═════════════════════════════════════════════════
# Fields of the two presets: as shipped above, and small, which a CPU trains in minutes.
PRESETS: dict[str, tuple] = {
    "hidden_size": (768, 256),
    "num_layers": (6, 4),
    "num_heads": (8, 4),
    "max_steps": (0, 350),
    "batch_size": (4, 8),
    "seq_len": (128, 64),
    "lr": (3e-4, 1e-3),
    "log_every_steps": (50, 10),
    "save_every_steps": (3000, 175),
}


def choose_preset(argv: list[str], cuda: bool) -> tuple[dict, str]:
    """The fields that a preset changes, and which one it is and why. A field that was edited in
    this file, away from what was shipped, wins over the preset."""
    asked = Config.preset
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, _, value = word.partition("=")
        if name == "--preset":
            asked = value or following
    why = "as asked"
    chosen = asked
    if asked == "auto" and cuda:
        chosen, why = "full", "auto: a CUDA device is visible"
    elif asked == "auto":
        chosen, why = "small", ("auto: no CUDA device is visible; --preset full is the real size, "
                                "about 2 s a step on two CPU cores")
    fields = {}
    if chosen == "small":
        fields = {name: small for name, (shipped, small) in PRESETS.items()
                  if getattr(Config, name) == shipped}
    asks_for_epochs = any(word.partition("=")[0] == "--epochs" for word in argv)
    if asks_for_epochs or Config.epochs != 1:  # or max_steps would override them
        fields.pop("max_steps", None)
    return fields, f"{chosen} ({why})"


def controller_config(config: Config, vocab_size: int):
    """The controller's transformers.GPT2Config, from Config or from the pretrained GPT-2 it names.
    Raises ValueError when that is no GPT-2, has no room for the window, or another vocabulary."""
    from transformers import AutoConfig, GPT2Config

    name = config.init_from
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    if name == "scratch":
        return GPT2Config(
            vocab_size=vocab_size, n_positions=config.seq_len, n_embd=config.hidden_size,
            n_layer=config.num_layers, n_head=config.num_heads, n_inner=config.mlp_width or None,
            bos_token_id=None, eos_token_id=None, **dropout)
    with asking_hub("init_from", name, "a folder written by a GPT-2's save_pretrained"):
        settings = AutoConfig.from_pretrained(name, trust_remote_code=False, **dropout)
    kind = settings.model_type
    positions = getattr(settings, "n_positions", 0)
    require(kind == "gpt2", "init_from", name, f"a GPT-2 (this is {kind})")
    require_field(config, "seq_len", config.seq_len <= positions,
                  f"at most the {positions} positions of {name}")
    require(vocab_size <= settings.vocab_size, "tokenizer", f"{vocab_size} entries",
            f"that of {name}, with {settings.vocab_size} entries; set --tokenizer")
    return settings


def build_model(config: Config, settings: object) -> GPT2WithMemory:
    """Build an arm's model on the CPU from the run's seed, and settings, its GPT2Config."""
    from transformers import GPT2Model

    torch.manual_seed(config.seed)
    if config.init_from == "scratch":
        settings._attn_implementation = "sdpa"
        controller = GPT2Model(settings)
        return GPT2WithMemory(config, controller)
    with asking_hub("init_from", config.init_from, "a folder with the weights of a GPT-2"):
        controller = GPT2Model.from_pretrained(config.init_from, config=settings,
                                               attn_implementation="sdpa").float()
    return GPT2WithMemory(config, controller)


def matched_width(config: Config) -> int:
    """The feed-forward width at which a baseline has as many parameters as the DNC."""
    with torch.device("meta"):
        memory = build_dnc(config)
    extra = count_parameters(memory) / config.num_layers
    wider = round(extra / (2 * config.hidden_size + 1))  # two matrices and one bias
    width = config.mlp_width or 4 * config.hidden_size
    return width + wider


def arm_config(name: str, config: Config) -> Config:
    """The Config of an arm, which says all that sets it apart: no memory, and as many parameters as
    the DNC (matched) or twice the window (wide); a memory; the DNC emptied at every window. Raises
    ValueError where the arm cannot be."""
    replace = functools.partial(dataclasses.replace, config)
    if name == "matched":
        return replace(memory="none", mlp_width=matched_width(config))
    if name == "wide":  # half as many windows a step: the same rows, or in two turns
        require_field(config, "batch_size", config.batch_size % 2 == 0,
                      "even for the arm wide, which has half as many windows, twice as long")
        segments = config.bptt_segments
        return replace(
            memory="none",
            seq_len=2 * config.seq_len,
            batch_size=config.batch_size // 2,
            bptt_segments=segments if segments % 2 else segments // 2,
        )
    if name == "dnc_reset":
        return replace(memory="dnc", carry_memory=False)
    if name == "cache":  # pointing is all that it does
        return replace(memory="cache", pointing=True)
    return replace(memory="none" if name == "baseline" else name)


def plan_run(name: str, config: Config, corpus: Corpus, tag: str = "") -> Run:
    """One arm, as `arm_config` has it, and its steps; no model yet."""
    rows, config = config.rows, arm_config(name, config)
    steps = (len(corpus.train) - 1) // (config.rows * config.step_len)
    turns = min(steps, rows // config.rows)
    per_epoch = steps // turns * turns
    total = config.max_steps or config.epochs * per_epoch
    return Run(ARMS[name], config, None, None, total, per_epoch, tag, turns)


def start_run(name: str, config: Config, corpus: Corpus, device: torch.device, tag: str = ""
              ) -> Run:
    """Build one arm, as `arm_config` has it, ready to train, resumed if Config says so."""
    run = plan_run(name, config, corpus, tag)
    config = run.config
    model = build_model(config, controller_config(config, corpus.vocab_size)).to(device)
    if config.checkpoint_activations:
        model.controller.activation_checkpointing_enable({"use_reentrant": False})
    if config.use_compile:
        model.controller.compile(mode=config.compile_mode)
    run.model, run.optimizer = model, make_optimizer(model, config)
    rank = rank_and_size().rank
    if rank > 0:  # its rows drop other units than those of rank 0
        torch.manual_seed(config.seed * 1_000_003 + rank * 7_919)
    if config.resume:
        resume_run(run, corpus)
    return run


class Hardware(NamedTuple):
    """Where a job runs."""
    device: torch.device
    gpus: int  # of which 2 share a step's rows, by nn.DataParallel
    named: str  # for people


def choose_hardware(config: Config, visible: int, ranks: Ranks = Ranks()) -> tuple[Config, int]:
    """Fill in precision and choose how many of the visible GPUs to use: at most 2, at most 1 a row,
    under torchrun 1 a rank. Raises ValueError when those asked for are not there, or torch.compile
    would meet two."""
    gpus = config.num_gpus
    if ranks.size > 1:
        require(gpus != 2, "num_gpus", gpus, "auto, 0 or 1 under torchrun, with a process a GPU")
        gpus = int(gpus != 0 and (visible > 0 or gpus == 1))
    if gpus == "auto":
        gpus = min(2, visible, config.rows)
        if gpus == 1 < visible:
            print(f"num_gpus auto: 1 of {visible}; batch_size / bptt_segments = 1 row does not "
                  "split")
    require(gpus <= visible, "num_gpus", gpus, f"at most {visible}, the CUDA devices that are "
            "visible; set num_gpus=auto")
    require(gpus < 2 or not config.use_compile, "use_compile", True,
            "False on two GPUs; set num_gpus=1")
    precision = config.precision
    if precision == "auto":
        bf16 = gpus > 0 and torch.cuda.get_device_capability()[0] >= 8  # older ones emulate it
        precision = "bf16" if bf16 else "float32"
    return dataclasses.replace(config, precision=precision), gpus


# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
def announce(config: Config, corpus: Corpus, device: str, preset: str) -> None:
    """Print what is about to be compared."""
    print_banner("DNC-GPT2: " + " vs ".join(ARMS[arm] for arm in config.arm_list), {
        "preset": preset,
        "device": f"{device}, {config.precision}",
        "corpus": f"{corpus.name}, sha256 {corpus.fingerprint[:12]}\n"
                  f"train {len(corpus.train):,}, validation {len(corpus.valid):,}, test "
                  f"{len(corpus.test):,} tokens",
    }, config)


def load_trained(path: str | Path, scan: str) -> Trained:
    """The model of a checkpoint. Raises ValueError for a file that is damaged or foreign."""
    from tokenizers import Tokenizer
    from transformers import GPT2Config

    payload = load_checkpoint(path)
    with reading(path, "name another checkpoint"):
        trained = Config(**payload["config"] | {"init_from": "scratch", "scan": scan})
        settings = GPT2Config.from_dict(json.loads(payload["controller"]))
        check_memory(arm_bytes(trained, settings, training=False), SIZES)
        model = build_model(trained, settings)
        model.load_state_dict(payload["model_state_dict"])
        tokenizer = Tokenizer.from_str(payload["tokenizer"])
    print(f"{path}: {payload['arm']}, step {payload['global_step']}, {payload['corpus']}")
    return Trained(model.eval(), tokenizer, payload)


def load_chosen(config: Config) -> Trained:
    """The model that --checkpoint names: auto is the newest valid one in save_dir, a finished one
    where there is any: files that were copied are as old as the copy."""
    if config.checkpoint != "auto":
        return load_trained(config.checkpoint, config.scan)
    folder = Path(config.save_dir)
    dated = []
    for path in folder.glob("*_step*.pt"):
        dated.append(("_FINAL_" in path.name, path.stat().st_mtime_ns, path))
    for *_, path in sorted(dated, reverse=True):
        try:
            return load_trained(path, config.scan)
        except ValueError as error:
            print(f"checkpoint auto: passed over {error}")
    raise ValueError(f"checkpoint = 'auto': no checkpoint in {folder}; train a model first, with "
                     "python dnc_gpt2.py, or name one with --checkpoint")


def run_inspection(config: Config) -> None:
    """--inspect: print the gates of a trained GPT2 + DNC on a text. Raises ValueError."""
    model, tokenizer, payload = load_trained(config.inspect, config.scan)
    require_field(config, "inspect", payload["arm"] == ARMS["dnc"], f"a checkpoint of "
                  f"{ARMS['dnc']} (this is of {payload['arm']}, which has no memory)")
    check_folder(config.plot_dir, "plot_dir")
    inspect_writes(model, tokenizer, config.text, config.plot_dir, payload["corpus"])


def run_generation(config: Config) -> None:
    """--generate: go on with a text. Raises ValueError."""
    model, tokenizer, payload = load_chosen(config)
    check_carried(payload, "generate")
    require_field(config, "show_gates", model.config.memory == "dnc" or not config.show_gates,
                  f"False: {payload['arm']} has no write gates")
    model.to("cuda" if torch.cuda.is_available() and config.num_gpus != 0 else "cpu")
    print()
    print_generation(model, tokenizer, config)


def run_export(config: Config) -> None:
    """--export: write a trained model for transformers. Raises ValueError."""
    check_exported_over(Path(config.export))
    trained = load_chosen(config)
    check_carried(trained.payload, "export")
    check_folder(config.export, "export", 64)
    export_model(trained, Path(config.export), config)


def check_exported_over(folder: Path) -> None:
    """Raise ValueError where an export would replace files that no export has written."""
    config, unfinished = folder / "config.json", folder / EXPORTING
    ours = unfinished.exists()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ours |= json.loads(config.read_text()).get("model_type") == "dnc_gpt2"
    names = ("README.md", "config.json", "dnc_model.py", "model.safetensors")
    there = [name for name in names if os.path.lexists(folder / name)]
    require(ours or not there, "export", str(folder), "a folder of its own: this one has another "
            f"{' and '.join(there[:2])}; name a new one")


def check_carried(payload: dict, field: str) -> None:
    """Raise ValueError where a model's memory is emptied at every window: it has none to carry."""
    carried = payload["config"]["carry_memory"] or payload["config"]["memory"] == "none"
    require(carried, field, payload["arm"],
            "of a model that carries its memory; name another --checkpoint")


def data_parallel(run: Run, hardware: "Hardware") -> nn.Module:
    """What a training step calls: the model, split over two GPUs or over the ranks."""
    if hardware.gpus == 2:
        return nn.DataParallel(run.model, device_ids=[0, 1])
    if rank_and_size().size == 1:
        return run.model
    forward = nn.parallel.DistributedDataParallel(run.model)
    # Its first backward fixes the order in which gradients are added up over ranks. One on nothing,
    # thrown away, gives a resumed run the order of an uninterrupted one.
    share = share_of(run.config.rows)
    rows = (share.stop - share.start) // run.config.accumulate
    tokens = torch.zeros(rows, run.config.step_len, dtype=torch.int64, device=run.device)
    positions = routing_positions(run.config, 0, run.device)
    positions = None if positions is None else positions[:rows]
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        output = forward(tokens, tokens, run.model.init_state(len(tokens)), positions)
        total_loss(output, positions, run.config).backward()
    run.model.zero_grad(set_to_none=True)
    return forward


def train_arm(name: str, config: Config, corpus: Corpus, hardware: "Hardware", tag: str,
              stop: StopSignal, base: Run | None = None) -> Run:
    """Train one arm, or what is left of it, or make it of a finished base -> the finished run,
    without its optimizer."""
    run = start_run(name, config, corpus, hardware.device, tag)
    total, memory = count_parameters(run.model), count_parameters(run.model.memory)
    which = f", seed {config.seed}, peak rate {config.lr:g}" if tag else ""
    of_memory = f", {memory:,} of memory" if memory else ""
    print(f"\n{run.arm}{which}: {total:,} parameters{of_memory}")
    for row in run.history:  # a resumed arm brings the rows that it has
        append_metrics(row, run.config)
    if not run.results:
        checkpoint_mb = 12 * total / 2**20 + 16  # weights and two moments
        if rank_and_size().rank == 0:
            check_folder(config.save_dir, "save_dir", checkpoint_mb)
        if base is None:
            train(run, corpus, data_parallel(run, hardware), stop)
        else:
            tune_on(base, run, corpus, stop)
    run.optimizer = None  # frees memory
    run.model = run.model.cpu()
    return run


def best_of(candidates: list[Run]) -> Run:
    """The run of the lowest validation loss; the others give their models up."""
    best = min(candidates, key=lambda run: run.results["valid"]["metrics"]["loss"])
    for run in candidates:
        if run is not best:
            run.model = None
    if len(candidates) > 1:
        print(f"{best.arm}: of {len(candidates)} rates {best.config.lr:g} is best on validation")
    return best


def variant_of(config: Config, seed: int, rate: float) -> tuple[Config, str]:
    """The Config of a seed and a peak rate, and what tells its files from those of others."""
    tag = "" if seed == config.seed else f"_seed{seed}"  # wherever it stands in a list
    if config.lr_grid:
        tag += f"_lr{rate:g}"
    return dataclasses.replace(config, seed=seed, lr=rate), tag


def try_rates(name: str, config: Config, seed: int, rates: list[float], corpus: Corpus,
              hardware: "Hardware", stop: StopSignal, base: Run | None) -> Run:
    """Train an arm of a seed at every rate -> the best on validation. Raises Diverged if all do.
    The cache is made of the base, a finished baseline, and has no rate to choose."""
    candidates = []
    for number, rate in enumerate(rates):
        variant, tag = variant_of(config, seed, rate)
        try:
            run = train_arm(name, variant, corpus, hardware, tag, stop, base)
            candidates.append(run)
        except Diverged as error:
            if not candidates and number + 1 == len(rates):
                raise
            print(f"left out: {error}")
    return best_of(candidates)


def train_arms(config: Config, corpus: Corpus, hardware: "Hardware", stop: StopSignal
               ) -> dict[str, list[Run]]:
    """Train every arm of every seed in turn -> the finished runs by name, one a seed. The first
    seed chooses an arm's rate where there are several. In the end the first DNC alone keeps its
    model; a seed's baseline has it until the cache is made of it."""
    runs, rates = {name: [] for name in config.arm_list}, {}
    for seed in config.seed_list:
        for name in config.arm_list:
            base = runs["baseline"][-1] if name == "cache" else None
            tried = [base.config.lr] if base else rates.get(name, config.rates)
            run = try_rates(name, config, seed, tried, corpus, hardware, stop, base)
            rates[name] = [run.config.lr]
            runs[name].append(run)
            waited_for = name == "baseline" and "cache" in config.arm_list
            if not waited_for and (name != "dnc" or len(runs[name]) > 1):
                run.model = None
        if "baseline" in runs:
            runs["baseline"][-1].model = None
    return runs


def report(runs: dict[str, list[Run]], config: Config, corpus: Corpus, hardware: "Hardware",
           stop: StopSignal) -> None:
    """Print the tables and the gates of the sample, draw the pictures, and write both down."""
    folder, dnc = Path(config.plot_dir), runs.get("dnc")
    write_results(runs, {}, config, corpus, hardware)  # before anything can fail that prints them
    with recorded() as printed:
        print_tables(runs, config, corpus)
        gains = print_gains(runs, config, corpus) if len(runs) > 1 else {}
    curves = [run for of_arm in runs.values() for run in of_arm]
    plot_curves(curves, folder / "training_curves.png", corpus.name)
    if gains:
        plot_gains(gains, runs, folder / "where_memory_helps.png", corpus.name)
    write_report(runs, gains, printed.getvalue(), config, corpus, hardware)
    if dnc is not None:
        dnc[0].model.to(hardware.device)
        inspect_writes(dnc[0].model, corpus.tokenizer, config.text, config.plot_dir, corpus.name)


def run_comparison(config: Config, preset: str, stop: StopSignal) -> None:
    """The main job: every arm trained and evaluated in turn, then table, controls, inspection."""
    if config.tensorboard:
        tensorboard_writer(None)
    require_field(config, "memory", config.memory == "dnc",
                  "left as it is: every arm sets its own; for a model without use --arms baseline")
    ranks = launched()
    check_ranks(config, ranks.size)
    config, gpus = choose_hardware(config, torch.cuda.device_count(), ranks)
    device = torch.device("cpu")
    if gpus:
        device = local_device()
    elif config.num_gpus == "auto" and ranks.size == 1 and torch.backends.mps.is_available():
        device = torch.device("mps")

    with contextlib.ExitStack() as stack:
        if ranks.rank == 0:  # it alone writes
            check_folder(config.save_dir, "save_dir")
            check_folder(config.plot_dir, "plot_dir")
            stack.enter_context(locked(config.save_dir, "save_dir"))
            stack.enter_context(locked(config.plot_dir, "plot_dir", ".dnc_gpt2.lock"))
        corpus = load_corpus(config)
        stack.enter_context(joined(ranks, device))
        compare_arms(config, corpus, device, gpus, preset, stop)


def say_where_ids_are_not_by_frequency(config: Config, corpus: Corpus) -> None:
    """Say what that does to `surprisal`, which sums over the first entries of the vocabulary."""
    count = torch.count_nonzero(corpus.train < COMMON).item()
    share = count / len(corpus.train)
    entries = math.log(corpus.vocab_size)
    if config.min_surprisal > entries:
        print(f"min_surprisal: {config.min_surprisal:g} nats are above log {corpus.vocab_size}, "
              f"{entries:.1f}, of this vocabulary: nearly nothing is written (--min_surprisal "
              f"{entries / 2:.1f} is half of that, 0 writes every token)")
    if config.min_surprisal == 0 or share > 0.3:
        return
    low = -math.log(max(share, 1e-6))
    print(f"min_surprisal: only {share:.1%} of the training tokens are among the first {COMMON:,} "
          f"entries of this vocabulary, which are not its most frequent: surprisal reads about "
          f"{low:.1f} nats low, and fewer tokens are written (--min_surprisal "
          f"{max(0.0, config.min_surprisal - low):.1f} makes up for it)")


def say_where_the_recurrence_is_slow(config: Config, device: torch.device) -> None:
    memory = build_memory(config).to(device)
    pick_scan(config.scan, memory.init_state(1), memory.options)


def check_arms(config: Config, corpus: Corpus, device: torch.device) -> None:
    """Raise ValueError, before the first arm trains, where one cannot run: where it takes too much
    memory, or --resume auto would replace another run's files."""
    for name in config.arm_list:
        of_arm = arm_config(name, config)
        settings = controller_config(of_arm, corpus.vocab_size)
        check_memory(arm_bytes(of_arm, settings), SIZES, device)
    try:
        check_nothing_replaced(config, corpus)
    except OtherRun as other:
        if config.resume == "auto":
            raise
        which = str(other).split(";")[0]
        print(f"save_dir: files of the same names are replaced. There is another run: {which}")


def compare_arms(config: Config, corpus: Corpus, device: torch.device, gpus: int, preset: str,
                 stop: StopSignal) -> None:
    """`run_comparison` on a device (that of a rank), in folders that can be written."""
    if config.init_from != "scratch":
        settings = controller_config(config, corpus.vocab_size)
        config = dataclasses.replace(
            config, hidden_size=settings.n_embd, num_layers=settings.n_layer,
            num_heads=settings.n_head, mlp_width=settings.n_inner or 0)

    named = device_name(device) + (" x 2, DataParallel" if gpus == 2 else "")
    ranks = rank_and_size()
    if ranks.size > 1:
        named += f" x {ranks.size} processes, DDP"
    hardware = Hardware(device, gpus, named)
    announce(config, corpus, named, preset)
    check_arms(config, corpus, device)
    if {"dnc", "dnc_reset"} & set(config.arm_list):
        say_where_ids_are_not_by_frequency(config, corpus)
        say_where_the_recurrence_is_slow(config, device)
    if was_restarted():
        config = dataclasses.replace(config, resume="auto")
    elif ranks.rank == 0:
        mark_start(config)
    if ranks.rank == 0:
        facts = json.dumps({"run": run_facts(named)}) + "\n"
        write_text(facts, Path(config.plot_dir) / METRICS_FILE)
    runs = train_arms(config, corpus, hardware, stop)
    if ranks.rank > 0:
        return
    report(runs, config, corpus, hardware, stop)


WITHOUT_TRAINING = ("inspect", "export", "generate")  # the fields that ask for something else


def asks_for(argv: list[str], *names: str) -> bool:
    """Whether a command line sets one of these fields."""
    return not {f"--{name}" for name in names}.isdisjoint(word.partition("=")[0] for word in argv)


def check_commands(config: object, argv: list[str],
                   names: tuple[str, ...] = (*WITHOUT_TRAINING, "resume")) -> None:
    """Raise ValueError where two commands are given, or one with nothing, as an unset variable of a
    shell gives it: it would start a training. names: the fields of a Config that hold commands."""
    for name in names:
        is_given = getattr(config, name).strip() != "" or not asks_for(argv, name)
        require_field(config, name, is_given, "not empty; leave it out to train")
    given = [name for name in names if getattr(config, name)]
    require(len(given) < 2, given[-1] if given else "", "also given", "alone: one command at a "
            f"time; leave out all but one of {', '.join(given)}")


def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 1 diverged, 2 a user's mistake, 128 + signal stopped."""

    def job(stop: StopSignal) -> None:
        fields, preset = choose_preset(argv, torch.cuda.is_available())
        usage = __doc__.replace("\nRead downward", f"\nPreset: {preset}\nRead downward", 1)
        config = read_config(Config, argv, usage, fields)
        check_commands(config, argv)
        if config.inspect:
            run_inspection(config)
        elif config.export:
            run_export(config)
        elif config.generate:
            run_generation(config)
        else:
            run_comparison(config, preset, stop)

    again, said = ["dnc_gpt2.py", *argv], {"saved": "nothing to save", "go_on": "run it again with"}
    if not asks_for(argv, *WITHOUT_TRAINING):
        again, said = [*again, "--resume", "auto"], {"saved": "training is saved"}
    with first_rank_speaks():
        return run_command(job, again, sizes=SIZES, **said)


if __name__ == "__main__":
    print_any_character()
    sys.exit(main(sys.argv[1:]))
