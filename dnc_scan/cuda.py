"""The CUDA kernels of the fused recurrence, compiled by Triton: one program a batch row.

Read downward: loads and stores, the parts of a step, `forward_kernel`, `backward_kernel`, the two
calls of the operator. Letters, equations and the order of tensors: layout.py.
"""

from __future__ import annotations

import functools
import math

import torch

from dnc_scan.layout import CHECKPOINT_EVERY, EPS, PARTS, RESULTS, empty_results, value_width

MISSING = ""  # why the kernels cannot run here
try:  # at import, because decorators need it
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError as error:
    triton, tl = None, None
    MISSING = f"triton cannot be imported ({error}); pip install triton"

    def jit(function=None, **options):
        return function or jit

# The memory tile stays on chip through all T steps, in registers up to about 64 x 128: links and
# the largest sizes spill (benchmarks/kernels.py tells). What a step costs is instructions, and the
# barriers of whatever crosses warps: sums over slots, stores, a transpose. Hence the shapes: slots
# come first, (NP, WP) and (NP, RP), so that a thread holds whole rows of heads and all heads share
# one sum; and the layout, which Triton takes from load_tile as long as no vector has as many
# elements as there are threads (see kernel_sizes).
# N, W, R are the sizes, NP, WP, RP those padded to powers of two. Padded slots hold zero memory and
# get no weight; padded columns and heads are zero.
# A key has the first K columns, and is loaded with zeros behind them: its product with a whole row
# is that with the key half. V columns from FIRST on are read.

@jit
def tile_blocks(pointer, N: tl.constexpr, W: tl.constexpr, NP: tl.constexpr,
                BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers and mask of a matrix (N, W) in blocks of columns: (BLOCKS, NP, BLOCK)."""
    slot = tl.arange(0, NP)[None, :, None]
    column = tl.arange(0, BLOCKS)[:, None, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    return pointer + slot * W + column, (slot < N) & (column < W)

@jit
def load_tile(pointer, N: tl.constexpr, W: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr):
    """A matrix (N, W) as (NP, WP). It is loaded in blocks of 16 times what one load instruction
    takes, as Triton then gives a row to 16 threads, not 32: fewer shuffles in a sum over a row."""
    BLOCKS: tl.constexpr = (WP - 1) // (16 + 16 * (W % 2 == 0) + 32 * (W % 4 == 0)) + 1
    pointers, mask = tile_blocks(pointer, N, W, NP, BLOCKS, WP // BLOCKS)
    return tl.reshape(tl.permute(tl.load(pointers, mask, 0.0), (1, 0, 2)), (NP, WP))

@jit
def store_tile(pointer, tile, N: tl.constexpr, W: tl.constexpr, NP: tl.constexpr,
               WP: tl.constexpr):
    """The inverse of load_tile."""
    BLOCKS: tl.constexpr = (WP - 1) // (16 + 16 * (W % 2 == 0) + 32 * (W % 4 == 0)) + 1
    pointers, mask = tile_blocks(pointer, N, W, NP, BLOCKS, WP // BLOCKS)
    blocks = tl.permute(tl.reshape(tile, (NP, BLOCKS, WP // BLOCKS)), (1, 0, 2))
    tl.store(pointers, blocks, mask)

@jit
def load_vector(pointer, index, size: tl.constexpr, dtype: tl.constexpr):
    return tl.load(pointer + index, index < size, 0.0).to(dtype)

@jit
def get_head(stacked, head, r: tl.constexpr):
    """Column r of (NP, RP) -> (NP,). A thread holds whole rows of heads, so this moves nothing."""
    return tl.sum(tl.where(head[None, :] == r, stacked, 0.0), 1)

@jit
def set_head(stacked, values, head, r: tl.constexpr):
    return tl.where(head[None, :] == r, values[:, None], stacked)

@jit
def load_heads(pointer, slot, head, N: tl.constexpr, R: tl.constexpr, dtype: tl.constexpr):
    """Weightings of all heads, stored (R, N), as (NP, RP)."""
    stacked = tl.zeros((slot.shape[0], head.shape[0]), dtype)
    for r in tl.static_range(R):
        stacked = set_head(stacked, load_vector(pointer + r * N, slot, N, dtype), head, r)
    return stacked

@jit
def set_partial(stacked, products, head, r: tl.constexpr, less=0.0):
    """Entry r of (RP, G, WP) := products (NP, WP) summed down to the G rows that different threads
    hold; `less` (1, WP) leaves the sum. One sum over G then crosses warps once for all entries."""
    G: tl.constexpr = stacked.shape[1]
    rows = tl.reshape(products, (products.shape[0] // G, G, products.shape[1]))
    partial = tl.sum(rows, 0) - less / G  # (G, WP)
    return tl.where(head[:, None, None] == r, partial[None, :, :], stacked)

@jit
def multiply(a, b):
    return a * b

@jit
def retention_of(free_gates, read_weights):
    """psi_i = prod_r (1 - f_r wr_ri): (RP,), (NP, RP) -> (NP,)."""
    return tl.reduce(1 - free_gates[None, :] * read_weights, 1, multiply)

@jit
def allocation_of(usage, slot, N: tl.constexpr, EPS: tl.constexpr):
    """usage (NP,) -> s = eps + (1 - eps) u, and the product of s over the slots that come before,
    both (NP,): allocation = (1 - s) * product. Freest first, ties to the lowest slot."""
    used = EPS + (1 - EPS) * usage
    mine, other = used[:, None], used[None, :]
    lower = slot[None, :] < slot[:, None]
    before = ((other < mine) | ((other == mine) & lower)) & (slot < N)[None, :]  # (NP, NP)
    return used, tl.exp(tl.sum(tl.where(before, tl.log(other), 0.0), 1))

@jit
def later_sum(used, values, slot):
    """For each slot, the sum of values over the slots that come after it in that order: (NP,)."""
    mine, other = used[:, None], used[None, :]
    higher = slot[None, :] > slot[:, None]
    later = (other > mine) | ((other == mine) & higher)  # (NP, NP)
    return tl.sum(tl.where(later, values[None, :], 0.0), 1)

@jit
def compared(memory, column, K: tl.constexpr, W: tl.constexpr):
    """The memory (NP, WP) with zeros in the columns that addressing does not see."""
    return tl.where((column < K)[None, :], memory, 0.0) if K < W else memory

@jit
def inverse_norms_of(memory, column, K: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr):
    """1 / |M_i| over the key columns of every slot: (NP,)."""
    seen = compared(memory, column, K, W)
    return tl.rsqrt(tl.sum(seen * seen, 1) + EPS)

@jit
def softmax_of(cosines, strengths, inside):
    """softmax over slots of strength * cosine: (NP,) with a scalar, or (NP, RP) with (1, RP)."""
    logits = tl.where(inside, strengths * cosines, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 0, keep_dims=True))
    return powers * (1 / tl.sum(powers, 0, keep_dims=True))

@jit
def softmax_of_reads(cosines, strengths, inside, empty, at, head, R: tl.constexpr,
                     EMPTY: tl.constexpr):
    """Content weightings (NP, RP) of all heads, from cosines (NP, RP) and strengths (RP,); with
    EMPTY beside the step's logits of the empty slot, whose share is left out."""
    if EMPTY:
        nothing = load_vector(empty + at * R, head, R, cosines.dtype)[None, :]  # (1, RP)
        logits = tl.where(inside[:, None], strengths[None, :] * cosines, float("-inf"))
        top = tl.maximum(tl.max(logits, 0, keep_dims=True), nothing)
        powers = tl.exp(logits - top)
        total = tl.sum(powers, 0, keep_dims=True) + tl.exp(nothing - top)
        content = powers * (1 / total)
    else:
        content = softmax_of(cosines, strengths[None, :], inside[:, None])
    return content

@jit
def add_three(a1, a2, a3, b1, b2, b3):
    return a1 + b1, a2 + b2, a3 + b3

@jit
def softmax_backward(content, gradient, cosines):
    """Of content = softmax_of(cosines, strengths), from one sum over slots: its mean gradient m,
    with which that of the logits is content * (gradient - m), and the strengths' gradient."""
    mean, product, cosine = tl.reduce(
        (content * gradient, content * gradient * cosines, content * cosines), 0, add_three)
    return mean, product - mean * cosine

@jit
def add_four(a1, a2, a3, a4, b1, b2, b3, b4):
    return a1 + b1, a2 + b2, a3 + b3, a4 + b4

@jit
def softmax_backward_of_reads(content, gradient, cosines, EMPTY: tl.constexpr):
    """softmax_backward, and the gradient of the empty slot's logit: three (RP,)."""
    if EMPTY:
        mean, product, cosine, held = tl.reduce(
            (content * gradient, content * gradient * cosines, content * cosines, content), 0,
            add_four)
        d_strengths = product - mean * cosine
        d_empty = (held - 1) * mean
    else:
        mean, d_strengths = softmax_backward(content, gradient, cosines)
        d_empty = mean  # unused
    return mean, d_strengths, d_empty

@jit
def written(memory, retention, weights, erase, vector, WIPE: tl.constexpr):
    """M' = M (1 - w e^T) + w v^T, of psi M with WIPE: (NP, WP)."""
    kept = memory * retention[:, None] if WIPE else memory
    return kept + weights[:, None] * (vector[None, :] - kept * erase[None, :])

@jit
def linked(link, weights, precedence, slot):
    """L'_ij = (1 - w_i - w_j) L_ij + w_i p_j, zero diagonal: (NP, NP)."""
    updated = ((1 - weights[:, None] - weights[None, :]) * link
               + weights[:, None] * precedence[None, :])
    return tl.where(slot[:, None] == slot[None, :], 0.0, updated)

@jit
def load_write(write_key, write_strength, erase, write_vector, write_gate, allocation_gate,
               free_gates, at, column, head, K: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
               dtype: tl.constexpr):
    """What a step needs to write: three vectors (WP,), three scalars, the free gates (RP,)."""
    return (load_vector(write_key + at * K, column, K, dtype),
            load_vector(erase + at * W, column, W, dtype),
            load_vector(write_vector + at * W, column, W, dtype),
            tl.load(write_strength + at).to(dtype), tl.load(write_gate + at).to(dtype),
            tl.load(allocation_gate + at).to(dtype),
            load_vector(free_gates + at * R, head, R, dtype))

@jit
def load_modes(read_modes, at, head, R: tl.constexpr, dtype: tl.constexpr):
    """The shares of backward, content and forward in the read weights: three (RP,)."""
    mode = read_modes + (at * R + head) * 3
    return (tl.load(mode, head < R, 0.0).to(dtype), tl.load(mode + 1, head < R, 0.0).to(dtype),
            tl.load(mode + 2, head < R, 0.0).to(dtype))

@jit
def previous_row(rows, initial, t, at, b, SIZE: tl.constexpr):
    """Where the step before left its row: in rows (B*T, SIZE), or in initial (B, SIZE)."""
    return tl.where(t > 0, rows + (at - 1) * SIZE, initial + b * SIZE)

@jit(do_not_specialize=["T"])
def forward_kernel(
        write_key, write_strength, erase, write_vector, write_gate, allocation_gate, read_keys,
        read_strengths, free_gates, read_modes, empty, inverse_keys,
        memory_0, usage_0, write_weights_0, read_weights_0, link_0, precedence_0,
        all_reads, all_write_weights, all_read_weights, memory_T, usage_T, link_T, precedence_T,
        usages, all_cosines, all_inverse_norms, precedences, memories, links,
        T, EVERY: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
        K: tl.constexpr, V: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, RP: tl.constexpr,
        KP: tl.constexpr, G: tl.constexpr, WIPE: tl.constexpr, LINKS: tl.constexpr,
        EMPTY: tl.constexpr, DECAY: tl.constexpr, RECORD: tl.constexpr, EPS: tl.constexpr):
    dtype: tl.constexpr = memory_0.dtype.element_ty
    FIRST: tl.constexpr = W - V  # column of what reads return
    slot, column, head = tl.arange(0, NP), tl.arange(0, WP), tl.arange(0, RP)
    kind = tl.arange(0, KP)  # of the values per slot that a step stores
    inside = slot < N
    b = tl.program_id(0).to(tl.int64)  # 64 bits, as B*T*R*W may exceed 2^31

    memory = load_tile(memory_0 + b * N * W, N, W, NP, WP)
    usage = load_vector(usage_0 + b * N, slot, N, dtype)
    write_weights = load_vector(write_weights_0 + b * N, slot, N, dtype)
    read_weights = load_heads(read_weights_0 + b * R * N, slot, head, N, R, dtype)
    inverse_norms = inverse_norms_of(memory, column, K, W, EPS)  # (NP,)
    if LINKS:
        link = load_tile(link_0 + b * N * N, N, N, NP, NP)
        precedence = load_vector(precedence_0 + b * N, slot, N, dtype)

    key_next, erase_next, vector_next, strength_next, gate_next, allocate_next, free_next = \
        load_write(write_key, write_strength, erase, write_vector, write_gate, allocation_gate,
                   free_gates, b * T, column, head, K, W, R, dtype)
    for t in range(T):
        at = b * T + t  # the step's row in every (B*T, ...)
        if RECORD:
            if t % EVERY == 0:
                chunk = b * tl.cdiv(T, EVERY) + t // EVERY
                store_tile(memories + chunk * N * W, memory, N, W, NP, WP)
                if LINKS:
                    store_tile(links + chunk * N * N, link, N, N, NP, NP)
        # The next step's parts are loaded a step early: nothing of a step runs before they arrive.
        key, erase_t, vector, strength = key_next, erase_next, vector_next, strength_next
        gate, allocate, free = gate_next, allocate_next, free_next
        key_next, erase_next, vector_next, strength_next, gate_next, allocate_next, free_next = \
            load_write(write_key, write_strength, erase, write_vector, write_gate,
                       allocation_gate, free_gates, b * T + tl.minimum(t + 1, T - 1), column,
                       head, K, W, R, dtype)

        # Write: usage, allocation, content, in Graves' order.
        retention = retention_of(free, read_weights)  # (NP,)
        usage = (usage + write_weights - usage * write_weights) * retention * DECAY
        used, product_before = allocation_of(usage, slot, N, EPS)
        inverse_key = tl.load(inverse_keys + at * (R + 1))
        write_cosines = tl.sum(memory * key[None, :], 1) * inverse_norms * inverse_key  # (NP,)
        content = softmax_of(write_cosines, strength, inside)
        write_weights = gate * (allocate * (1 - used) * product_before + (1 - allocate) * content)
        write_weights = tl.where(inside, write_weights, 0.0)
        memory = written(memory, retention, write_weights, erase_t, vector, WIPE)
        if LINKS:
            link = linked(link, write_weights, precedence, slot)
            precedence = (1 - tl.sum(write_weights, 0)) * precedence + write_weights

        # Read: every head looks its key up in the new memory.
        inverse_norms = inverse_norms_of(memory, column, K, W, EPS)
        cosines = tl.zeros((NP, RP), dtype)
        for r in tl.static_range(R):
            read_key = load_vector(read_keys + (at * R + r) * K, column, K, dtype)
            inverse_key = tl.load(inverse_keys + at * (R + 1) + 1 + r)
            cosine = tl.sum(memory * read_key[None, :], 1) * inverse_norms * inverse_key
            cosines = set_head(cosines, cosine, head, r)
        strengths = load_vector(read_strengths + at * R, head, R, dtype)
        content = softmax_of_reads(cosines, strengths, inside, empty, at, head, R, EMPTY)
        if LINKS:
            backward, forward = tl.zeros((NP, RP), dtype), tl.zeros((NP, RP), dtype)
            for r in tl.static_range(R):
                previous = get_head(read_weights, head, r)  # (NP,)
                backward = set_head(backward, tl.sum(link * previous[:, None], 0), head, r)
                forward = set_head(forward, tl.sum(link * previous[None, :], 1), head, r)
            back, share, forth = load_modes(read_modes, at, head, R, dtype)
            read_weights = (back[None, :] * backward + share[None, :] * content
                            + forth[None, :] * forward)
        else:
            read_weights = tl.where((head < R)[None, :], content, 0.0)
        reads = tl.zeros((RP, G, WP), dtype)
        for r in tl.static_range(R):
            reads = set_partial(reads, get_head(read_weights, head, r)[:, None] * memory, head, r)
        tl.store(all_reads + (at * R + head[:, None]) * V + (column - FIRST)[None, :],
                 tl.sum(reads, 1),
                 (head < R)[:, None] & ((column >= FIRST) & (column < W))[None, :])

        # All values per slot leave in one store, as each store costs barriers: the R read weights,
        # the write weights, the 1 + R cosines, usage, inverse norms, precedence.
        values = tl.zeros((NP, KP), dtype)
        for r in tl.static_range(R):
            values = set_head(values, get_head(read_weights, head, r), kind, r)
            values = set_head(values, get_head(cosines, head, r), kind, R + 2 + r)
        values = set_head(values, write_weights, kind, R)
        values = set_head(values, write_cosines, kind, R + 1)
        values = set_head(values, usage, kind, 2 * R + 2)
        values = set_head(values, inverse_norms, kind, 2 * R + 3)
        target = tl.where(kind < R, all_read_weights + (at * R + kind) * N,
                          all_write_weights + at * N)
        stored: tl.constexpr = 2 * R + 4 + LINKS if RECORD else R + 1
        if RECORD:
            target = tl.where(kind > R, all_cosines + (at * (R + 1) + kind - R - 1) * N, target)
            target = tl.where(kind == 2 * R + 2, usages + at * N, target)
            target = tl.where(kind == 2 * R + 3, all_inverse_norms + at * N, target)
            if LINKS:
                values = set_head(values, precedence, kind, 2 * R + 4)
                target = tl.where(kind == 2 * R + 4, precedences + at * N, target)
        tl.store(target[None, :] + slot[:, None], values,
                 inside[:, None] & (kind < stored)[None, :])

    store_tile(memory_T + b * N * W, memory, N, W, NP, WP)
    tl.store(usage_T + b * N + slot, usage, inside)
    if LINKS:
        store_tile(link_T + b * N * N, link, N, N, NP, NP)
        tl.store(precedence_T + b * N + slot, precedence, inside)

@jit(do_not_specialize=["T"])
def backward_kernel(
        write_key, write_strength, erase, write_vector, write_gate, allocation_gate, read_keys,
        read_strengths, free_gates, read_modes, empty, inverse_keys,
        usage_0, write_weights_0, read_weights_0, precedence_0,
        all_write_weights, all_read_weights, usages, all_cosines, all_inverse_norms, precedences,
        memories, links,
        d_reads, d_all_write_weights, d_all_read_weights, d_memory_T, d_usage_T, d_link_T,
        d_precedence_T,
        d_vectors, d_write_strength, d_write_gate, d_allocation_gate, d_read_strengths,
        d_free_gates, d_read_modes, d_empty,
        d_memory_0, d_usage_0, d_write_weights_0, d_read_weights_0, d_link_0, d_precedence_0,
        memory_scratch, link_scratch,
        T, EVERY: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
        K: tl.constexpr, V: tl.constexpr, NP: tl.constexpr, WP: tl.constexpr, RP: tl.constexpr,
        G: tl.constexpr, WIPE: tl.constexpr, LINKS: tl.constexpr, EMPTY: tl.constexpr,
        DECAY: tl.constexpr, EPS: tl.constexpr):
    dtype: tl.constexpr = d_reads.dtype.element_ty
    FIRST: tl.constexpr = W - V  # column of what reads return
    slot, column, head = tl.arange(0, NP), tl.arange(0, WP), tl.arange(0, RP)
    inside = slot < N
    b = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(T, EVERY)

    d_memory = load_tile(d_memory_T + b * N * W, N, W, NP, WP)
    d_usage = load_vector(d_usage_T + b * N, slot, N, dtype)
    d_write_weights = tl.zeros((NP,), dtype)
    d_read_weights = tl.zeros((NP, RP), dtype)
    if LINKS:
        d_link = load_tile(d_link_T + b * N * N, N, N, NP, NP)
        d_precedence = load_vector(d_precedence_T + b * N, slot, N, dtype)

    for chunk_back in range(chunks):
        chunk = chunks - 1 - chunk_back
        steps = tl.minimum(EVERY, T - chunk * EVERY)
        # Forward through the chunk from its checkpoint: keep the memory before every step.
        memory = load_tile(memories + (b * chunks + chunk) * N * W, N, W, NP, WP)
        if LINKS:
            link = load_tile(links + (b * chunks + chunk) * N * N, N, N, NP, NP)
        for k in range(steps):
            t = chunk * EVERY + k
            at = b * T + t
            store_tile(memory_scratch + (b * EVERY + k) * N * W, memory, N, W, NP, WP)
            weights = load_vector(all_write_weights + at * N, slot, N, dtype)
            retention = weights  # unused, unless
            if WIPE:
                source = previous_row(all_read_weights, read_weights_0, t, at, b, R * N)
                retention = retention_of(load_vector(free_gates + at * R, head, R, dtype),
                                         load_heads(source, slot, head, N, R, dtype))
            memory = written(memory, retention, weights,
                             load_vector(erase + at * W, column, W, dtype),
                             load_vector(write_vector + at * W, column, W, dtype), WIPE)
            if LINKS:
                store_tile(link_scratch + (b * EVERY + k) * N * N, link, N, N, NP, NP)
                source = previous_row(precedences, precedence_0, t, at, b, N)
                link = linked(link, weights, load_vector(source, slot, N, dtype), slot)
        tl.debug_barrier()  # other threads may load what this one stored

        for k_back in range(steps):  # `memory` is the one after the step
            k = steps - 1 - k_back
            t = chunk * EVERY + k
            at = b * T + t

            # Reads: reads_r = sum_i wr_ri M'_i, without the key half.
            read_weights = tl.zeros((NP, RP), dtype)
            for r in tl.static_range(R):
                d_read = tl.load(d_reads + (at * R + r) * V + column - FIRST,
                                 (column >= FIRST) & (column < W), 0.0).to(dtype)
                weight = load_vector(all_read_weights + (at * R + r) * N, slot, N, dtype)
                d_weight = load_vector(d_all_read_weights + (at * R + r) * N, slot, N, dtype)
                d_weight += get_head(d_read_weights, head, r)
                d_weight += tl.sum(memory * d_read[None, :], 1)
                d_memory += weight[:, None] * d_read[None, :]
                read_weights = set_head(read_weights, weight, head, r)
                d_read_weights = set_head(d_read_weights, d_weight, head, r)

            # Read modes, links: wr_r = pi_r0 L'^T wr_r(t-1) + pi_r1 content_r + pi_r2 L' wr_r(t-1).
            source = previous_row(all_read_weights, read_weights_0, t, at, b, R * N)
            read_before = load_heads(source, slot, head, N, R, dtype)
            cosines = load_heads(all_cosines + (at * (R + 1) + 1) * N, slot, head, N, R, dtype)
            strengths = load_vector(read_strengths + at * R, head, R, dtype)
            d_read_before = tl.zeros((NP, RP), dtype)
            content = read_weights
            share = (head < R).to(dtype)  # of content in the read weights
            if LINKS:
                content = softmax_of_reads(cosines, strengths, inside, empty, at, head, R, EMPTY)
                back, share, forth = load_modes(read_modes, at, head, R, dtype)
                d_back, d_forth = tl.zeros((NP, RP), dtype), tl.zeros((RP, G, NP), dtype)
                for r in tl.static_range(R):
                    previous = get_head(read_before, head, r)
                    d_weight = get_head(d_read_weights, head, r)
                    d_back = set_head(d_back, tl.sum(link * d_weight[None, :], 1), head, r)
                    d_forth = set_partial(d_forth, link * d_weight[:, None], head, r)
                    d_back_r = get_head(d_read_weights * back[None, :], head, r)
                    d_forth_r = get_head(d_read_weights * forth[None, :], head, r)
                    d_link += previous[:, None] * d_back_r[None, :]
                    d_link += d_forth_r[:, None] * previous[None, :]
                # The gradients of a weighting through either mode, before its share: (NP, RP).
                d_forward = tl.trans(tl.sum(d_forth, 1))
                d_read_before = back[None, :] * d_back + forth[None, :] * d_forward
                d_mode = d_read_modes + (at * R + head) * 3
                tl.store(d_mode, tl.sum(read_before * d_back, 0), head < R)
                tl.store(d_mode + 2, tl.sum(read_before * d_forward, 0), head < R)
            d_share, d_strengths, d_nothing = softmax_backward_of_reads(
                content, d_read_weights, cosines, EMPTY)
            d_logits = content * (d_read_weights - d_share[None, :])  # before the share
            d_strengths *= share
            tl.store(d_read_strengths + at * R + head, d_strengths, head < R)
            if EMPTY:
                tl.store(d_empty + at * R + head, d_nothing * share, head < R)
            if LINKS:
                tl.store(d_read_modes + (at * R + head) * 3 + 1, d_share, head < R)

            # Read keys: cosine_ri = K_r.M'_i / (|K_r| |M'_i|).
            norms = load_vector(all_inverse_norms + at * N, slot, N, dtype)
            d_cosines = d_logits * (strengths * share)[None, :]
            d_keys = tl.zeros((RP, G, WP), dtype)
            for r in tl.static_range(R):
                read_key = load_vector(read_keys + (at * R + r) * K, column, K, dtype)
                inverse_key = tl.load(inverse_keys + at * (R + 1) + 1 + r)
                d_dot = get_head(d_cosines, head, r) * norms * inverse_key
                d_memory += d_dot[:, None] * read_key[None, :]
                d_norm = tl.sum(tl.where(head == r, strengths * d_strengths, 0.0), 0)
                d_keys = set_partial(d_keys, d_dot[:, None] * memory, head, r,
                                     (d_norm * inverse_key * inverse_key * read_key)[None, :])
            shrink = norms * norms * tl.sum(d_cosines * cosines, 1)
            d_memory -= compared(memory, column, K, W) * shrink[:, None]
            tl.store(d_vectors + (at * (R + 3) + head[:, None]) * W + column[None, :],
                     tl.sum(d_keys, 1), (head < R)[:, None] & (column < W)[None, :])

            weights = load_vector(all_write_weights + at * N, slot, N, dtype)
            d_write_weights += load_vector(d_all_write_weights + at * N, slot, N, dtype)
            if LINKS:  # L'_ij = (1 - w_i - w_j) L_ij + w_i p_j; p' = (1 - sum w) p + w
                link = load_tile(link_scratch + (b * EVERY + k) * N * N, N, N, NP, NP)
                source = previous_row(precedences, precedence_0, t, at, b, N)
                precedence = load_vector(source, slot, N, dtype)
                d_link = tl.where(slot[:, None] == slot[None, :], 0.0, d_link)
                d_write_weights += tl.sum(d_link * (precedence[None, :] - link), 1)
                d_write_weights += d_precedence - tl.sum(d_link * link, 0)
                d_write_weights -= tl.sum(d_precedence * precedence, 0)
                d_precedence = (tl.sum(d_link * weights[:, None], 0)
                                + (1 - tl.sum(weights, 0)) * d_precedence)
                d_link *= 1 - weights[:, None] - weights[None, :]

            # Write: M' = psi M (1 - w e^T) + w v^T.
            key, erase_t, vector, strength, gate, allocate, free = load_write(
                write_key, write_strength, erase, write_vector, write_gate, allocation_gate,
                free_gates, at, column, head, K, W, R, dtype)
            memory = load_tile(memory_scratch + (b * EVERY + k) * N * W, N, W, NP, WP)
            retention = retention_of(free, read_before)
            kept = memory * retention[:, None] if WIPE else memory
            d_write_weights += tl.sum(d_memory * (vector[None, :] - kept * erase_t[None, :]), 1)
            d_write_weights = tl.where(inside, d_write_weights, 0.0)
            d_rows = tl.zeros((4, G, WP), dtype)  # erase, write vector, write key, nothing
            row = tl.arange(0, 4)
            weighted = d_memory * weights[:, None]
            d_rows = set_partial(d_rows, -weighted * kept, row, 0)
            d_rows = set_partial(d_rows, weighted, row, 1)
            d_memory *= 1 - weights[:, None] * erase_t[None, :]
            d_retention = tl.zeros((NP,), dtype)
            if WIPE:
                d_retention = tl.sum(d_memory * memory, 1)
                d_memory *= retention[:, None]

            # Gates, allocation, content: w = gw (ga a + (1 - ga) c).
            usage = load_vector(usages + at * N, slot, N, dtype)
            used, product_before = allocation_of(usage, slot, N, EPS)
            allocation = (1 - used) * product_before
            cosine = load_vector(all_cosines + at * (R + 1) * N, slot, N, dtype)
            content = softmax_of(cosine, strength, inside)
            mean, d_strength = softmax_backward(content, d_write_weights, cosine)
            d_logits = content * (d_write_weights - mean)  # before the share
            allocated = tl.sum(d_write_weights * allocation, 0)
            share = gate * (1 - allocate)
            d_strength *= share
            tl.store(d_write_strength + at, d_strength)
            tl.store(d_write_gate + at, allocate * allocated + (1 - allocate) * mean)
            tl.store(d_allocation_gate + at, gate * (allocated - mean))

            # Write key: cosine_i = k.M_i / (|k| |M_i|), of the memory before the write.
            if t > 0:
                norms = load_vector(all_inverse_norms + (at - 1) * N, slot, N, dtype)
            else:
                norms = inverse_norms_of(memory, column, K, W, EPS)
            inverse_key = tl.load(inverse_keys + at * (R + 1))
            d_cosine = d_logits * (strength * share)
            d_dot = d_cosine * norms * inverse_key
            d_norm = strength * d_strength * inverse_key * inverse_key
            d_rows = set_partial(d_rows, d_dot[:, None] * memory, row, 2, (d_norm * key)[None, :])
            d_memory += d_dot[:, None] * key[None, :]
            shrink = norms * norms * d_cosine * cosine
            d_memory -= compared(memory, column, K, W) * shrink[:, None]
            tl.store(d_vectors + (at * (R + 3) + R + row[:, None]) * W + column[None, :],
                     tl.sum(d_rows, 1), (row < 3)[:, None] & (column < W)[None, :])

            # Usage: a_i = (1 - s_i) prod of s_j before i; u = g (u + w - u w) psi, those of t-1.
            source = previous_row(usages, usage_0, t, at, b, N)
            usage_before = load_vector(source, slot, N, dtype)
            source = previous_row(all_write_weights, write_weights_0, t, at, b, N)
            write_before = load_vector(source, slot, N, dtype)
            d_allocation = gate * allocate * d_write_weights
            d_used = (later_sum(used, d_allocation * allocation, slot) / used
                      - d_allocation * product_before)
            d_usage = tl.where(inside, d_usage + (1 - EPS) * d_used, 0.0) * DECAY
            d_retention += d_usage * (usage_before + write_before - usage_before * write_before)
            d_union = d_usage * retention
            d_usage = d_union * (1 - write_before)
            d_write_weights = d_union * (1 - usage_before)

            # Retention: psi_i = prod_r (1 - f_r wr_ri).
            kept_by = 1 - free[None, :] * read_before  # (NP, RP)
            others = tl.zeros((NP, RP), dtype)
            for r in tl.static_range(R):
                rest = tl.where(head[None, :] == r, 1.0, kept_by)
                others = set_head(others, tl.reduce(rest, 1, multiply), head, r)
            d_freed = -d_retention[:, None] * others  # of f_r wr_ri
            tl.store(d_free_gates + at * R + head, tl.sum(d_freed * read_before, 0), head < R)
            d_read_weights = d_read_before + d_freed * free[None, :]
        tl.debug_barrier()  # all have loaded before the next chunk is stored

    store_tile(d_memory_0 + b * N * W, d_memory, N, W, NP, WP)
    tl.store(d_usage_0 + b * N + slot, d_usage, inside)
    tl.store(d_write_weights_0 + b * N + slot, d_write_weights, inside)
    for r in tl.static_range(R):
        tl.store(d_read_weights_0 + (b * R + r) * N + slot, get_head(d_read_weights, head, r),
                 inside)
    if LINKS:
        store_tile(d_link_0 + b * N * N, d_link, N, N, NP, NP)
        tl.store(d_precedence_0 + b * N + slot, d_precedence, inside)

def kernel_sizes(slots: int, width: int, heads: int, links: bool, key_width: int = 0,
                 empty: bool = False):
    """The constants of both kernels for a memory of this size, and the number of warps."""
    padded = [max(16, triton.next_power_of_2(x)) for x in (slots, width)]
    # More threads than a vector has elements, or Triton lays the tile out as suits that vector. Not
    # more: instructions per slot repeat in 16 threads. Links of 128 slots need the registers.
    num_warps = max(*padded, 64, 256 * (links and slots > 64)) // 16
    # The rows of a tile that lie in different threads: see load_tile and set_partial.
    rows = 32 // min(16, padded[1] // math.gcd(width, 4)) * num_warps
    key_width = key_width or width
    sizes = {"N": slots, "W": width, "R": heads, "K": key_width,
             "V": value_width(key_width, width), "NP": padded[0], "WP": padded[1],
             "RP": triton.next_power_of_2(heads), "KP": triton.next_power_of_2(2 * heads + 5),
             "G": min(rows, padded[0]), "LINKS": links, "EMPTY": empty}
    return sizes, num_warps

def sizes_of(parts, state):
    """kernel_sizes of the tensors of a call."""
    memory, _, _, _, link, _ = state
    _, _, R, K = parts[PARTS.index("read_keys")].shape
    empty = parts[PARTS.index("empty")].shape[2] > 0
    return kernel_sizes(*memory.shape[1:], R, link.shape[1] > 0, K, empty)

def inverse_key_norms(parts, dtype: torch.dtype) -> torch.Tensor:
    """(|k|^2 + eps)^-1/2 of the write key and the R read keys of every step: (B, T, R + 1)."""
    write_key, read_keys = parts[PARTS.index("write_key")], parts[PARTS.index("read_keys")]
    keys = write_key.unsqueeze(2), read_keys  # (B, T, 1, K), (B, T, R, K)
    norms = [torch.linalg.vector_norm(key, dim=-1, dtype=dtype) for key in keys]
    return (torch.cat(norms, dim=2).square() + EPS).rsqrt()

def triton_forward(parts, state, wipe: bool, decay: float, every: int, record: bool
                   ) -> list[torch.Tensor]:
    memory, T = state[0], parts[0].shape[1]
    results = empty_results(parts, state, every, record)
    sizes, num_warps = sizes_of(parts, state)
    with torch.cuda.device_of(memory):
        forward_kernel[(len(memory),)](
            *parts, inverse_key_norms(parts, memory.dtype), *state, *results, T, every, **sizes,
            WIPE=wipe, DECAY=decay, RECORD=record, EPS=EPS, num_warps=num_warps)
    return results

def triton_backward(grads, parts, state, traces, wipe: bool, decay: float, every: int
                    ) -> list[torch.Tensor]:
    memory, usage, write_weights, read_weights, link, precedence = state
    (B, N, W), new, linked = memory.shape, memory.new_empty, link.shape[1]
    _, T, R, K = parts[PARTS.index("read_keys")].shape
    small = ("write_strength", "write_gate", "allocation_gate", "read_strengths", "free_gates",
             "read_modes", "empty")
    d_vectors = new(B, T, R + 3, W)  # one store for read keys, erase, write vector, write key
    d_small = [new(parts[PARTS.index(name)].shape) for name in small]
    d_state = [torch.empty_like(x) for x in state]
    scratch = new(B, every, N, W), new(B, every, linked, linked)
    sizes, num_warps = sizes_of(parts, state)
    sizes.pop("KP")
    with torch.cuda.device_of(memory):
        backward_kernel[(B,)](
            *parts, inverse_key_norms(parts, memory.dtype), usage, write_weights, read_weights,
            precedence, *traces, *grads, d_vectors, *d_small, *d_state, *scratch, T, every, **sizes,
            WIPE=wipe, DECAY=decay, EPS=EPS, num_warps=num_warps)
    d_erase, d_write_vector, d_write_key = d_vectors[:, :, R:].unbind(2)
    d_write_strength, d_write_gate, d_allocation_gate, *d_heads = d_small
    d_parts = (d_write_key[..., :K], d_write_strength, d_erase, d_write_vector, d_write_gate,
               d_allocation_gate, d_vectors[:, :, :R, :K], *d_heads)
    return [*(torch.empty_like(x).copy_(d) for d, x in zip(d_parts, parts, strict=True)), *d_state]

@functools.cache
def trial(device: torch.device, N: int, W: int, R: int, options) -> str:
    """Compile and run both CUDA kernels for one step -> why they cannot run on this machine: a card
    with too little shared memory, no C compiler for Triton's launcher; "" where they can. Raises
    torch.OutOfMemoryError, which a later call may not meet."""
    K, L = options.key_width or W, N if options.use_links else 0
    modes, empty = 3 if options.use_links else 0, R if options.empty_slot else 0
    part_sizes = [(1, 1, K), (1, 1), (1, 1, W), (1, 1, W), (1, 1), (1, 1), (1, 1, R, K), (1, 1, R),
                  (1, 1, R), (1, 1, R, modes), (1, 1, empty)]
    state_sizes = [(1, N, W), (1, N), (1, N), (1, R, N), (1, L, L), (1, L)]
    parts = [torch.zeros(size, device=device) for size in part_sizes]
    state = [torch.zeros(size, device=device) for size in state_sizes]
    how = options.dealloc_wipe, options.usage_decay, CHECKPOINT_EVERY
    try:
        results = triton_forward(parts, state, *how, record=True)
        triton_backward(results[: len(RESULTS)], parts, state,
                        results[1:3] + results[len(RESULTS) :], *how)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton raises many kinds; the caller prints this line
        return f"the CUDA kernels do not run here ({type(error).__name__}: {error})".split("\n")[0]
    return ""
