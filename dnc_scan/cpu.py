"""The CPU kernels of the fused recurrence, compiled by numba: rows of a batch in plain loops.

Read downward: the steps of the forward and `forward_rows`, their backward and `backward_rows`, the
two calls of the operator. Letters, equations and the order of tensors: layout.py.
"""

from __future__ import annotations

import math
from threading import Thread

import numpy as np
import torch

from dnc_scan.layout import EPS, empty_results

MISSING = ""  # why the kernels cannot run here
try:  # at import, because decorators need it
    import numba
except ImportError as error:
    numba = None
    MISSING = f"numba cannot be imported ({error}); pip install numba"

# Plain loops, which LLVM vectorises. Numbers in them are `one` and `eps`, in the arrays' type: a
# literal would turn float32 arithmetic into float64. Reassociated sums vectorise; NaN and infinity
# keep their meaning, because the training loop looks for them. A column that begins at an offset is
# unsigned: of a signed sum numba asks at every element whether it is negative, and such a loop does
# not vectorise. The kernels allocate nothing, and so need none of numba's reference counts (_nrt):
# with counts they take twice as long to compile.
FAST = {"reassoc", "contract", "nsz", "arcp"}

def compiled(fastmath, inlined=True):
    """Decorator: numba.njit, cached on disk where a folder for it can be written.

    A callee exists twice: compiled alone, and as a copy in its caller's machine code, which LLVM
    optimised once more and which may round differently. In the process that compiles, a call
    reaches the first, as its name is known before the caller's code is loaded; in one that loads
    the caller from the cache, it reaches the copy. An inlined callee is not called: then both
    processes compute the same bits, and a run resumes in the bits in which it began. So all are
    inlined but the two that no other function of this file calls."""
    def decorate(function):
        if numba is None:
            return function
        options = {"nogil": True, "fastmath": fastmath, "forceinline": inlined,
                   "error_model": "numpy", "_nrt": False}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder can be written
            return numba.njit(**options)(function)
    return decorate

@compiled(FAST)
def fill(out, value):
    """Set all elements of a vector."""
    for i in range(out.shape[0]):
        out[i] = value

@compiled(FAST)
def fill_rows(out, value):
    """Set all elements of a matrix."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = value

@compiled(FAST)
def copy(source, out):
    for i in range(out.shape[0]):
        out[i] = source[i]

@compiled(FAST)
def copy_rows(source, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = source[i, j]

@compiled(FAST)
def dot(x, y, one):
    total = one - one
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total

@compiled(FAST)
def row_dots(vector, matrix, first, out, one):
    """out_i = matrix_i . vector, over the columns of matrix (N, W) from `first`, as many as the
    vector has."""
    column = np.uint64(first)
    for i in range(matrix.shape[0]):
        total = one - one
        for j in range(np.uint64(vector.shape[0])):
            total += matrix[i, column + j] * vector[j]
        out[i] = total

@compiled(FAST)
def add_product(weights, rows, rows_from, out, out_from):
    """out (A, ...) += weights (A, Q) @ rows (Q, ...), four rows in one pass: a third of the stores.
    Columns begin at rows_from and out_from, and end with the narrower of the two."""
    width = np.uint64(min(rows.shape[1] - rows_from, out.shape[1] - out_from))
    x, y = np.uint64(rows_from), np.uint64(out_from)
    whole = rows.shape[0] - rows.shape[0] % 4
    for i in range(out.shape[0]):
        for q in range(0, whole, 4):
            a, b, c, d = weights[i, q], weights[i, q + 1], weights[i, q + 2], weights[i, q + 3]
            for j in range(width):
                out[i, y + j] += (
                    a * rows[q, x + j] + b * rows[q + 1, x + j]
                    + c * rows[q + 2, x + j] + d * rows[q + 3, x + j])
        for q in range(whole, rows.shape[0]):
            for j in range(width):
                out[i, y + j] += weights[i, q] * rows[q, x + j]

@compiled(FAST)
def inverse_norm(vector, one, eps):
    return one / math.sqrt(dot(vector, vector, one) + eps)

@compiled(FAST)
def softmax(strength, cosine, empty, out):
    """out = softmax(strength * cosine), both (N,), beside one more logit, `empty`, whose share is
    left out; -inf where there is none. strength > 0."""
    top = cosine[0]
    for i in range(cosine.shape[0]):
        top = max(top, cosine[i])
    top = max(strength * top, empty)
    total = math.exp(empty - top)
    for i in range(cosine.shape[0]):
        out[i] = math.exp(strength * cosine[i] - top)
        total += out[i]
    for i in range(cosine.shape[0]):
        out[i] /= total

@compiled(False)  # rounds as the readable loop does: among near-ties rounding decides the order
def usage_step(usage, write_weights, read_weights, free_gates, decay, new_usage, retention, one):
    """usage, write_weights (N,), read_weights (R, N), free_gates (R,) -> new_usage, retention."""
    for i in range(usage.shape[0]):
        psi = one - free_gates[0] * read_weights[0, i]
        for r in range(1, free_gates.shape[0]):
            psi = psi * (one - free_gates[r] * read_weights[r, i])
        retention[i] = psi
        new_usage[i] = (usage[i] + write_weights[i] - usage[i] * write_weights[i]) * psi * decay

@compiled(False)
def allocation_step(usage, order, used, before, one, eps):
    """usage (N,) -> used, shifted to [eps, 1], and before_i, the product of used over the slots
    freer than i. `order` (N,), the free list, ascending with ties to the lowest slot, is sorted by
    insertion: a step moves few slots, so that the list of the step before is nearly right."""
    for i in range(usage.shape[0]):
        used[i] = eps + (one - eps) * usage[i]
    for place in range(1, usage.shape[0]):
        slot = order[place]
        mine, free = used[slot], place
        while free > 0 and (used[order[free - 1]] > mine
                            or (used[order[free - 1]] == mine and order[free - 1] > slot)):
            order[free] = order[free - 1]
            free -= 1
        order[free] = slot
    product = one
    for place in range(order.shape[0]):
        before[order[place]] = product
        product *= used[order[place]]

@compiled(FAST)
def content_step(key, strength, empty, memory, norms, cosine, content, one, eps):
    """key (K,), memory (N, W), whose first K columns are compared, norms of those, 1/|M_i| (N,) ->
    cosine and content weighting (N,)."""
    key_norm = inverse_norm(key, one, eps)
    row_dots(key, memory, 0, cosine, one)
    for i in range(norms.shape[0]):
        cosine[i] *= norms[i] * key_norm
    softmax(strength, cosine, empty, content)

@compiled(FAST)
def write_step(memory, kept, weights, erase, vector, key_width, norms, one, eps):
    """M_i = kept_i M_i (1 - w_i e) + w_i v, in place; norms become those of the new rows, of their
    first key_width columns."""
    for i in range(memory.shape[0]):
        total, keep, weight = one - one, kept[i], weights[i]
        for j in range(memory.shape[1]):
            memory[i, j] = keep * memory[i, j] * (one - weight * erase[j]) + weight * vector[j]
        for j in range(key_width):
            total += memory[i, j] * memory[i, j]
        norms[i] = one / math.sqrt(total + eps)

@compiled(FAST)
def link_step(link, precedence, weights, one):
    """link (N, N) after the write weights (N,), in place; `precedence` is still that of before."""
    for i in range(link.shape[0]):
        for j in range(link.shape[1]):
            link[i, j] = ((one - weights[i] - weights[j]) * link[i, j]
                          + weights[i] * precedence[j])
        link[i, i] = one - one

@compiled(FAST)
def follow_links(link, weights, forward, backward, one):
    """forward_r = L wr_r and backward_r = L^T wr_r, all (R, N)."""
    fill_rows(backward, one - one)
    add_product(weights, link, 0, backward, 0)
    for r in range(weights.shape[0]):
        row_dots(weights[r], link, 0, forward[r], one)

@compiled(FAST, inlined=False)
def forward_rows(
        begin, end, every, wipe, links, record, decay, one, eps, nothing, order, slots, heads,
        write_key, write_strength, erase, write_vector, write_gate, allocation_gate,
        read_keys, read_strengths, free_gates, read_modes, empty,
        memory0, usage0, write_weights0, read_weights0, link0, precedence0,
        reads, write_weights, read_weights, memory, usage, link, precedence,
        usages, cosines, inverse_norms, precedences, memories, link_states):
    """Rows begin to end of the recurrence: the activated interface (B, T, ...) and the state ..0 ->
    reads to precedence, dnc_loop's results, and (record) usages to link_states, the tape.
    links: True, or None, for which numba compiles none of their code. `nothing` is -inf, the logit
    of a slot that is not there; order, slots and heads are scratch, as are backward_rows' own."""
    T, K = write_key.shape[1:]
    R, N = read_weights.shape[2:]
    first = memory.shape[2] - reads.shape[3]  # column of what reads return
    new_usage, retention, kept, used, before, content, norms = slots
    forward, backward, cosine = heads[0, :R], heads[1, :R], heads[2]
    fill(kept, one)
    for b in range(begin, end):
        M, L, p, u = memory[b], link[b], precedence[b], usage[b]
        copy_rows(memory0[b], M)
        if links is not None:
            copy_rows(link0[b], L)
            copy(precedence0[b], p)
        copy(usage0[b], u)
        for i in range(N):
            order[i] = i
            norms[i] = inverse_norm(M[i][:K], one, eps)
        for t in range(T):
            if record and t % every == 0:
                copy_rows(M, memories[b, t // every])
                if links is not None:
                    copy_rows(L, link_states[b, t // every])
            w_before = write_weights[b, t - 1] if t > 0 else write_weights0[b]
            wr_before = read_weights[b, t - 1] if t > 0 else read_weights0[b]
            w, wr = write_weights[b, t], read_weights[b, t]
            usage_step(u, w_before, wr_before, free_gates[b, t], decay, new_usage, retention, one)
            copy(new_usage, u)
            allocation_step(u, order, used, before, one, eps)
            content_step(write_key[b, t], write_strength[b, t], nothing, M, norms, cosine[0],
                         content, one, eps)
            gate, mix = write_gate[b, t], allocation_gate[b, t]
            for i in range(N):
                w[i] = gate * (mix * (one - used[i]) * before[i] + (one - mix) * content[i])
            if wipe:
                copy(retention, kept)
            write_step(M, kept, w, erase[b, t], write_vector[b, t], K, norms, one, eps)
            if links is not None:
                link_step(L, p, w, one)
                total = one - one
                for i in range(N):
                    total += w[i]
                for i in range(N):
                    p[i] = p[i] * (one - total) + w[i]
                follow_links(L, wr_before, forward, backward, one)
            for r in range(R):
                no_slot = empty[b, t, r] if empty.shape[2] > 0 else nothing
                content_step(read_keys[b, t, r], read_strengths[b, t, r], no_slot, M, norms,
                             cosine[r + 1], wr[r], one, eps)
                if links is not None:
                    modes = read_modes[b, t, r]
                    for i in range(N):
                        wr[r, i] = (modes[0] * backward[r, i] + modes[1] * wr[r, i]
                                    + modes[2] * forward[r, i])
            fill_rows(reads[b, t], one - one)
            add_product(wr, M, first, reads[b, t], 0)
            if record:
                copy(u, usages[b, t])
                copy(norms, inverse_norms[b, t])
                if links is not None:
                    copy(p, precedences[b, t])
                copy_rows(cosine, cosines[b, t])

@compiled(FAST)
def content_backward(strength, key_norm, norms, cosine, content, d_content, d_dots, shrink, one):
    """Backward of content_step down to the dot products of the key with every slot: sets d_dots
    (N,) and adds to shrink (N,), the share of its own row that a slot's gradient loses to its norm
    -> d_strength, the same share of the key, and the gradient of the empty slot's logit."""
    mean, d_strength, key_shrink = dot(content, d_content, one), one - one, one - one
    nothing = one  # the share of the empty slot
    for i in range(content.shape[0]):
        nothing -= content[i]
        d_logit = content[i] * (d_content[i] - mean)
        d_cosine = strength * d_logit
        d_strength += d_logit * cosine[i]
        key_shrink += d_cosine * cosine[i]
        d_dots[i] = d_cosine * norms[i] * key_norm
        shrink[i] += d_cosine * cosine[i] * norms[i] * norms[i]
    return d_strength, key_shrink * key_norm * key_norm, -nothing * mean

@compiled(FAST)
def shrink_rows(shrink, memory, key_width, d_memory):
    for i in range(memory.shape[0]):
        for j in range(key_width):
            d_memory[i, j] -= shrink[i] * memory[i, j]

@compiled(FAST)
def write_backward(memory, kept, weights, erase, vector, d_memory, d_weights, d_erase, d_vector,
                   one):
    """Backward of write_step; d_memory (N, W) goes from after the write to before it, in place, but
    for the factor `kept`; d_weights (N,), d_erase and d_vector (W,) are added to."""
    for i in range(memory.shape[0]):
        total, keep, weight = one - one, kept[i], weights[i]
        for j in range(memory.shape[1]):
            x, d = keep * memory[i, j], d_memory[i, j]
            total += d * (vector[j] - x * erase[j])
            d_vector[j] += weight * d
            d_erase[j] -= weight * x * d
            d_memory[i, j] = d - weight * erase[j] * d
        d_weights[i] += total

@compiled(FAST)
def wipe_backward(memory, kept, d_memory, d_kept, one):
    """The factor `kept` (N,) of write_step: d_memory in place, d_kept is set."""
    for i in range(memory.shape[0]):
        total = one - one
        for j in range(memory.shape[1]):
            total += d_memory[i, j] * memory[i, j]
            d_memory[i, j] *= kept[i]
        d_kept[i] = total

@compiled(FAST)
def allocation_backward(order, used, before, d_allocation, d_usage, one, eps):
    """Adds to d_usage (N,); a used slot shrinks the share of every slot that comes after it."""
    after = one - one
    for place in range(order.shape[0] - 1, -1, -1):
        slot = order[place]
        d_used = after / used[slot] - d_allocation[slot] * before[slot]
        d_usage[slot] += (one - eps) * d_used
        after += d_allocation[slot] * (one - used[slot]) * before[slot]

@compiled(FAST)
def usage_backward(usage, write_weights, read_weights, free_gates, decay, retention, d_retention,
                   others, d_usage, d_write_weights, d_read_weights, d_free_gates, one):
    """Backward of usage_step: d_usage goes from after it to before it, in place; d_write_weights
    (N,) and d_free_gates (R,) are set; d_read_weights (R, N) is added to; `others` is scratch."""
    for i in range(usage.shape[0]):
        w, u = write_weights[i], usage[i]
        d_usage[i] *= decay
        d_retention[i] += d_usage[i] * (u + w - u * w)
        d_usage[i] *= retention[i]
        d_write_weights[i] = d_usage[i] * (one - u)
        d_usage[i] *= one - w
    for r in range(free_gates.shape[0]):
        copy(d_retention, others)  # times the product over the other heads: no division by zero
        for q in range(free_gates.shape[0]):
            if q != r:
                for i in range(usage.shape[0]):
                    others[i] *= one - free_gates[q] * read_weights[q, i]
        d_free_gates[r] = -dot(others, read_weights[r], one)
        for i in range(usage.shape[0]):
            d_read_weights[r, i] -= others[i] * free_gates[r]

@compiled(FAST)
def mode_backward(modes, d_wr, content, forward, backward, d_modes, d_content, d_forward,
                  d_backward, one):
    """Backward of one head's mixture of backward, content and forward weightings; d_* are set."""
    d_modes[0] = dot(d_wr, backward, one)
    d_modes[1] = dot(d_wr, content, one)
    d_modes[2] = dot(d_wr, forward, one)
    for i in range(d_wr.shape[0]):
        d_backward[i] = modes[0] * d_wr[i]
        d_content[i] = modes[1] * d_wr[i]
        d_forward[i] = modes[2] * d_wr[i]

@compiled(FAST)
def follow_backward(link, weights, d_forward, d_backward, d_link, d_weights, scratch, one):
    """Backward of follow_links: d_link (N, N) and d_weights (R, N) are added to."""
    add_product(weights.T, d_backward, 0, d_link, 0)
    add_product(d_forward.T, weights, 0, d_link, 0)
    add_product(d_forward, link, 0, d_weights, 0)
    for r in range(weights.shape[0]):
        row_dots(d_backward[r], link, 0, scratch, one)
        for i in range(link.shape[0]):
            d_weights[r, i] += scratch[i]

@compiled(FAST)
def link_backward(link, precedence, weights, d_link, d_precedence, d_weights, column, one):
    """Backward of link_step and of the precedence. link and precedence are those of before the
    step; d_link and d_precedence go from after it to before it, in place; d_weights is added to;
    `column` (N,) is scratch."""
    N = weights.shape[0]
    d_total, kept = dot(d_precedence, precedence, one), one
    for i in range(N):
        kept -= weights[i]
    for i in range(N):
        d_weights[i] += d_precedence[i] - d_total
        d_precedence[i] *= kept
        d_link[i, i] = one - one
    fill(column, one - one)
    for i in range(N):
        total = one - one
        for j in range(N):
            d = d_link[i, j]
            total += d * (precedence[j] - link[i, j])
            column[j] += d * link[i, j]
            d_precedence[j] += d * weights[i]
            d_link[i, j] = d * (one - weights[i] - weights[j])
        d_weights[i] += total
    for i in range(N):
        d_weights[i] -= column[i]

@compiled(FAST)
def replay(start, end, wipe, links, one, eps, erase, write_vector, free_gates, write_weights,
           read_weights, read_weights0, precedences, precedence0, kept, norms, history,
           link_history):
    """Recompute memory and links after each step of a chunk: history[0] is given."""
    for t in range(start, end):
        now, p = t - start + 1, precedences[t - 1] if t > 0 else precedence0
        copy_rows(history[now - 1], history[now])
        if wipe:
            wr_before = read_weights[t - 1] if t > 0 else read_weights0
            fill(kept, one)
            for r in range(free_gates.shape[1]):
                for i in range(kept.shape[0]):
                    kept[i] *= one - free_gates[t, r] * wr_before[r, i]
        write_step(history[now], kept, write_weights[t], erase[t], write_vector[t], 0, norms, one,
                   eps)
        if links is not None:
            copy_rows(link_history[now - 1], link_history[now])
            link_step(link_history[now], p, write_weights[t], one)

@compiled(FAST, inlined=False)
def backward_rows(
        begin, end, every, wipe, links, decay, one, eps, nothing, order, slots, heads, history,
        link_history,
        write_key, write_strength, erase, write_vector, write_gate, allocation_gate,
        read_keys, read_strengths, free_gates, read_modes, empty,
        usage0, write_weights0, read_weights0, precedence0,
        write_weights, read_weights, usages, cosines, inverse_norms, precedences,
        memories, link_states,
        g_reads, g_write_weights, g_read_weights, g_memory, g_usage, g_link, g_precedence,
        d_write_key, d_write_strength, d_erase, d_write_vector, d_write_gate, d_allocation_gate,
        d_read_keys, d_read_strengths, d_free_gates, d_read_modes, d_empty,
        d_memory, d_usage, d_write_weights, d_read_weights, d_link, d_precedence):
    """The gradients d_ of rows begin to end, from the gradients g_ of the forward's results. That
    of the state is carried back through time in d_memory to d_precedence, in place."""
    T, K = write_key.shape[1:]
    R, N = read_weights.shape[2:]
    W = memories.shape[3]
    first = W - g_reads.shape[3]
    (new_usage, retention, kept, used, before, norms0,
     content, d_content, d_w, d_kept, shrink, spare) = slots
    forward, backward, d_wr, d_dots, d_forward, d_backward = heads
    fill(kept, one)
    for b in range(begin, end):
        dM, du, dL, dp = d_memory[b], d_usage[b], d_link[b], d_precedence[b]
        dw_before, dwr_before = d_write_weights[b], d_read_weights[b]
        copy_rows(g_memory[b], dM)
        if links is not None:
            copy_rows(g_link[b], dL)
            copy(g_precedence[b], dp)
        copy(g_usage[b], du)
        fill(dw_before, one - one)
        fill_rows(dwr_before, one - one)
        for i in range(N):
            order[i] = i
            norms0[i] = inverse_norm(memories[b, 0, i][:K], one, eps)
        for t in range(T - 1, -1, -1):
            start, now = t - t % every, t % every + 1  # history[now] is the memory after step t
            if t == T - 1 or now == every:
                copy_rows(memories[b, t // every], history[0])
                if links is not None:
                    copy_rows(link_states[b, t // every], link_history[0])
                replay(start, t + 1, wipe, links, one, eps, erase[b], write_vector[b],
                       free_gates[b], write_weights[b], read_weights[b], read_weights0[b],
                       precedences[b], precedence0[b], kept, spare, history, link_history)
            M, new_M, new_L = history[now - 1], history[now], link_history[now]
            w, wr, keys = write_weights[b, t], read_weights[b, t], read_keys[b, t]
            u_before = usages[b, t - 1] if t > 0 else usage0[b]
            w_before = write_weights[b, t - 1] if t > 0 else write_weights0[b]
            wr_before = read_weights[b, t - 1] if t > 0 else read_weights0[b]
            norms_before = inverse_norms[b, t - 1] if t > 0 else norms0

            # read vectors, read weightings
            for i in range(N):
                d_w[i] = g_write_weights[b, t, i] + dw_before[i]
            fill(shrink, one - one)
            add_product(wr.T, g_reads[b, t], 0, dM, first)
            if links is not None:
                follow_links(new_L, wr_before, forward, backward, one)
            for r in range(R):
                strength, cosine = read_strengths[b, t, r], cosines[b, t, r + 1]
                no_slot = empty[b, t, r] if empty.shape[2] > 0 else nothing
                row_dots(g_reads[b, t, r], new_M, first, d_wr[r], one)
                for i in range(N):
                    d_wr[r, i] += g_read_weights[b, t, r, i] + dwr_before[r, i]
                copy(wr[r], content)
                copy(d_wr[r], d_content)
                if links is not None:
                    softmax(strength, cosine, no_slot, content)
                    mode_backward(read_modes[b, t, r], d_wr[r], content, forward[r], backward[r],
                                  d_read_modes[b, t, r], d_content, d_forward[r], d_backward[r],
                                  one)
                d_read_strengths[b, t, r], key_shrink, d_no_slot = content_backward(
                    strength, inverse_norm(keys[r], one, eps), inverse_norms[b, t], cosine, content,
                    d_content, d_dots[r], shrink, one)
                for j in range(K):
                    d_read_keys[b, t, r, j] = -key_shrink * keys[r, j]
                if empty.shape[2] > 0:
                    d_empty[b, t, r] = d_no_slot
            add_product(d_dots, new_M, 0, d_read_keys[b, t], 0)
            add_product(d_dots.T, keys, 0, dM, 0)
            shrink_rows(shrink, new_M, K, dM)
            fill_rows(dwr_before, one - one)
            if links is not None:
                p_before = precedences[b, t - 1] if t > 0 else precedence0[b]
                follow_backward(new_L, wr_before, d_forward, d_backward, dL, dwr_before, spare,
                                one)
                link_backward(link_history[now - 1], p_before, w, dL, dp, d_w, spare, one)

            # write
            usage_step(u_before, w_before, wr_before, free_gates[b, t], decay, new_usage, retention,
                       one)
            if wipe:
                copy(retention, kept)
            fill(d_erase[b, t], one - one)
            fill(d_write_vector[b, t], one - one)
            fill(d_kept, one - one)
            write_backward(M, kept, w, erase[b, t], write_vector[b, t], dM, d_w, d_erase[b, t],
                           d_write_vector[b, t], one)
            if wipe:
                wipe_backward(M, kept, dM, d_kept, one)

            # write weighting: gates, allocation, content
            allocation_step(usages[b, t], order, used, before, one, eps)
            strength, cosine, key = write_strength[b, t], cosines[b, t, 0], write_key[b, t]
            softmax(strength, cosine, nothing, content)
            gate, mix, d_gate, d_mix = write_gate[b, t], allocation_gate[b, t], one - one, one - one
            for i in range(N):
                allocation = (one - used[i]) * before[i]
                d_gate += d_w[i] * (mix * allocation + (one - mix) * content[i])
                d_mix += d_w[i] * gate * (allocation - content[i])
                d_content[i] = gate * (one - mix) * d_w[i]
                d_w[i] *= gate * mix  # from here on that of the allocation
            d_write_gate[b, t], d_allocation_gate[b, t] = d_gate, d_mix
            fill(shrink, one - one)
            d_write_strength[b, t], key_shrink, _ = content_backward(
                strength, inverse_norm(key, one, eps), norms_before, cosine, content, d_content,
                d_dots[0], shrink, one)
            for j in range(K):
                d_write_key[b, t, j] = -key_shrink * key[j]
            add_product(d_dots[:1], M, 0, d_write_key[b, t : t + 1], 0)
            add_product(d_dots[:1].T, write_key[b, t : t + 1], 0, dM, 0)
            shrink_rows(shrink, M, K, dM)
            allocation_backward(order, used, before, d_w, du, one, eps)
            usage_backward(u_before, w_before, wr_before, free_gates[b, t], decay, retention,
                           d_kept, spare, du, dw_before, dwr_before, d_free_gates[b, t], one)

def run_rows(kernel, flags: tuple, decay: float, scratch: list[tuple],
             tensors: list[torch.Tensor]) -> None:
    """Run a numba kernel over all batch rows on torch's number of threads: it releases Python's
    lock. Rows are independent, so the result does not depend on that number. Every thread gets
    arrays of the shapes in `scratch` for itself, the free list's (N,) first, of whole numbers."""
    number, rows = tensors[-1].numpy().dtype.type, len(tensors[0])
    arrays, errors = [tensor.numpy() for tensor in tensors], []
    numbers = [number(decay), number(1), number(EPS), number(-math.inf)]
    workers = max(1, min(rows, torch.get_num_threads()))

    def work(worker: int) -> None:
        own = [np.empty(shape, number if i else np.int64) for i, shape in enumerate(scratch)]
        try:
            kernel(rows * worker // workers, rows * (worker + 1) // workers, *flags, *numbers,
                   *own, *arrays)
        except BaseException as error:  # raised again below: a thread's own would be lost
            errors.append(error)

    threads = [Thread(target=work, args=(worker,)) for worker in range(1, workers)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]

def numba_forward(parts, state, wipe: bool, decay: float, every: int, record: bool
                  ) -> list[torch.Tensor]:
    results = empty_results(parts, state, every, record)
    R, N = state[3].shape[1:]
    links = True if state[4].shape[1] else None
    run_rows(forward_rows, (every, wipe, links, record), decay,
             [(N,), (7, N), (3, R + 1, N)], [*parts, *state, *results])
    return results

def numba_backward(grads, parts, state, traces, wipe: bool, decay: float, every: int
                   ) -> list[torch.Tensor]:
    memory, usage, write_weights, read_weights, link, precedence = state
    R, N = read_weights.shape[1:]
    W, linked = memory.shape[2], link.shape[1]
    gradients = [torch.empty_like(tensor) for tensor in (*parts, *state)]
    run_rows(backward_rows, (every, wipe, True if linked else None), decay,
             [(N,), (12, N), (6, R, N), (every + 1, N, W), (every + 1, linked, linked)],
             [*parts, usage, write_weights, read_weights, precedence, *traces, *grads, *gradients])
    return gradients
