"""The fused DNC recurrence: the function of dnc_gpt2.dnc_loop, at the speed of its controller.

    reads, write_weights, read_weights, state = dnc_scan(interface, state, options)

The readable loop launches about a hundred small operators a token and saves all that they make.
Here one compiled loop a batch row runs through all T steps with the memory matrix at hand, and a
hand-derived backward recomputes the memory from states kept every CHECKPOINT_EVERY steps.
CPU: numba. CUDA: Triton. Where neither can run, `refusal` says why, and dnc_gpt2 runs its loop.

Read downward: the backward of one step in equations, what goes in and out, the CPU kernels, the
CUDA kernels, the operator that makes either differentiable. This file imports nothing of dnc_gpt2.
Letters: B batch rows, T time, N memory slots, W word width, R read heads, K checkpoint interval.

Backward of one step, for the forward in shared names (u usage, w write weighting, M memory; a
prime is the value after the step; sums run over the repeated index; d is the gradient):

    read       dwr_r += M' dread_r           dM' += sum_r wr_r dread_r^T
    links      dbackward_r = pi_b dwr_r      dL'_ij += wr_ri dbackward_rj + dforward_ri wr_rj
    softmax    g = c (dc - c.dc)             dstrength = g.cos        dcos = strength g
    cosine     dkey += sum_i dcos_i M_i / (|M_i| |key|) - key sum_i dcos_i cos_i / |key|^2
               dM_i += dcos_i key / (|M_i| |key|) - M_i dcos_i cos_i / |M_i|^2
    write      dw_i += dM'_i . (v - e M_i)   de -= sum_i w_i dM'_i M_i    dv += sum_i w_i dM'_i
               dM_i = dM'_i (1 - w_i e)
    allocation ds_i = -da_i prod(before i) + (sum of da_j a_j after i) / s_i
    usage      dq = du' psi, dpsi += du' q   du = dq (1 - w)          dw = dq (1 - u)
"""

from __future__ import annotations

import functools
import math
from threading import Thread

import numpy as np
import torch

MISSING = "{0} cannot be imported{1}; pip install {0}"
NO_NUMBA, NO_TRITON = MISSING.format("numba", ""), MISSING.format("triton", "")
try:  # both at import, because decorators need them; each path lives without the other's
    import numba
except ImportError as error:
    numba, NO_NUMBA = None, MISSING.format("numba", f" ({error})")
try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError as error:
    triton, tl, NO_TRITON = None, None, MISSING.format("triton", f" ({error})")

    def jit(function=None, **options):
        return function or jit

EPS = 1e-6
CHECKPOINT_EVERY = 16  # K: a memory of the tape for so many steps

# What goes in and comes out of both back ends, as lists of tensors in the order of these names.
PARTS = ("write_key write_strength erase write_vector write_gate allocation_gate read_keys "
         "read_strengths free_gates read_modes").split()  # of the interface
STATE = "memory usage write_weights read_weights link precedence".split()
RESULTS = "reads write_weights read_weights memory usage link precedence".split()  # dnc_loop's
TAPE = "usages cosines inverse_norms precedences memories links".split()  # beside them, to go back
TRACES = ["write_weights", "read_weights", *TAPE]  # what the backward reads of both

def empty_results(parts, state, every: int, record: bool) -> list[torch.Tensor]:
    """Uninitialised RESULTS and TAPE; this has no elements where nothing is to be recorded."""
    (B, T, R, W), (_, N, _) = parts[PARTS.index("read_keys")].shape, state[0].shape
    linked = state[4].shape[1]  # N with links, else 0
    C = -(-T // every)  # checkpoints
    shapes = [(B, T, R, W), (B, T, N), (B, T, R, N), (B, N, W), (B, N), (B, linked, linked),
              (B, linked)]
    tape = [(B, T, N), (B, T, R + 1, N), (B, T, N), (B, T, linked), (B, C, N, W),
            (B, C, linked, linked)]
    shapes += tape if record else [(0,) * len(shape) for shape in tape]
    return [state[0].new_empty(shape) for shape in shapes]

# ══ CPU: numba ═══════════════════════════════════════════════════════════════════════════════════
# Plain loops, which LLVM vectorises. Numbers in them are `one` and `eps`, in the arrays' type:
# a literal would turn float32 arithmetic into float64. Reassociated sums vectorise; NaN and
# infinity keep their meaning, because the training loop looks for them.
FAST = {"reassoc", "contract", "nsz", "arcp"}

def compiled(fastmath, inlined=True):
    """Decorator: numba.njit, cached on disk where a folder for it can be written.

    A callee exists twice: compiled alone, and as a copy in its caller's machine code, which LLVM
    optimised once more and which may round differently. In the process that compiles, a call
    reaches the first, as its name is known before the caller's code is loaded; in one that loads
    the caller from the cache, it reaches the copy. An inlined callee is not called: then both
    processes compute the same bits, and a run resumes in the bits in which it began."""
    def decorate(function):
        if numba is None:
            return function
        options = {"nogil": True, "fastmath": fastmath, "forceinline": inlined,
                   "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder can be written
            return numba.njit(**options)(function)
    return decorate

@compiled(FAST)
def dot(x, y, one):
    total = one - one
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total

@compiled(FAST)
def row_dots(vector, matrix, out, one):
    """out_i = matrix_i . vector, for matrix (N, W) and vector (W,)."""
    for i in range(matrix.shape[0]):
        total = one - one
        for j in range(matrix.shape[1]):
            total += matrix[i, j] * vector[j]
        out[i] = total

@compiled(FAST)
def add_product(weights, rows, out):
    """out (A, W) += weights (A, Q) @ rows (Q, W), four rows in one pass: a third of the stores."""
    whole = rows.shape[0] - rows.shape[0] % 4
    for i in range(out.shape[0]):
        for q in range(0, whole, 4):
            a, b, c, d = weights[i, q], weights[i, q + 1], weights[i, q + 2], weights[i, q + 3]
            for j in range(out.shape[1]):
                out[i, j] += (a * rows[q, j] + b * rows[q + 1, j] + c * rows[q + 2, j]
                              + d * rows[q + 3, j])
        for q in range(whole, rows.shape[0]):
            for j in range(out.shape[1]):
                out[i, j] += weights[i, q] * rows[q, j]

@compiled(FAST)
def inverse_norm(vector, one, eps):
    return one / math.sqrt(dot(vector, vector, one) + eps)

@compiled(FAST)
def softmax(strength, cosine, out):
    """out = softmax(strength * cosine), both (N,); strength >= 1."""
    top = cosine[0]
    for i in range(cosine.shape[0]):
        top = max(top, cosine[i])
    total = top - top
    for i in range(cosine.shape[0]):
        out[i] = math.exp(strength * (cosine[i] - top))
        total += out[i]
    for i in range(cosine.shape[0]):
        out[i] /= total

@compiled(False)  # rounds as the readable loop does: among near-ties rounding decides the order
def usage_step(usage, write_weights, read_weights, free_gates, new_usage, retention, one):
    """usage, write_weights (N,), read_weights (R, N), free_gates (R,) -> new_usage, retention."""
    for i in range(usage.shape[0]):
        psi = one - free_gates[0] * read_weights[0, i]
        for r in range(1, free_gates.shape[0]):
            psi = psi * (one - free_gates[r] * read_weights[r, i])
        retention[i] = psi
        new_usage[i] = (usage[i] + write_weights[i] - usage[i] * write_weights[i]) * psi

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
def content_step(key, strength, memory, norms, cosine, content, one, eps):
    """key (W,), memory (N, W), norms 1/|M_i| (N,) -> cosine and content weighting (N,)."""
    key_norm = inverse_norm(key, one, eps)
    row_dots(key, memory, cosine, one)
    for i in range(norms.shape[0]):
        cosine[i] *= norms[i] * key_norm
    softmax(strength, cosine, content)

@compiled(FAST)
def write_step(memory, kept, weights, erase, vector, norms, one, eps):
    """M_i = kept_i M_i (1 - w_i e) + w_i v, in place; norms become those of the new rows."""
    for i in range(memory.shape[0]):
        total, keep, weight = one - one, kept[i], weights[i]
        for j in range(memory.shape[1]):
            x = keep * memory[i, j] * (one - weight * erase[j]) + weight * vector[j]
            memory[i, j] = x
            total += x * x
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
    backward[:] = one - one
    add_product(weights, link, backward)
    for r in range(weights.shape[0]):
        row_dots(weights[r], link, forward[r], one)

@compiled(FAST, inlined=False)
def forward_rows(
        begin, end, every, wipe, links, record, one, eps,
        write_key, write_strength, erase, write_vector, write_gate, allocation_gate,
        read_keys, read_strengths, free_gates, read_modes,
        memory0, usage0, write_weights0, read_weights0, link0, precedence0,
        reads, write_weights, read_weights, memory, usage, link, precedence,
        usages, cosines, inverse_norms, precedences, memories, link_states):
    """Rows begin to end of the recurrence: the activated interface (B, T, ...) and the state ..0 ->
    reads to precedence, dnc_loop's results, and (record) usages to link_states, the tape."""
    T = write_key.shape[1]
    R, N = read_weights.shape[2:]
    new_usage, retention, kept, used, before = np.empty((5, N), write_key.dtype)
    content, norms = np.empty((2, N), write_key.dtype)
    forward, backward = np.empty((2, R, N), write_key.dtype)
    cosine = np.empty((R + 1, N), write_key.dtype)
    kept[:] = one
    for b in range(begin, end):
        M, L, p, u = memory[b], link[b], precedence[b], usage[b]
        M[:], L[:], p[:], u[:] = memory0[b], link0[b], precedence0[b], usage0[b]
        order = np.arange(N)
        for i in range(N):
            norms[i] = inverse_norm(M[i], one, eps)
        for t in range(T):
            if record and t % every == 0:
                memories[b, t // every], link_states[b, t // every] = M, L
            w_before = write_weights[b, t - 1] if t > 0 else write_weights0[b]
            wr_before = read_weights[b, t - 1] if t > 0 else read_weights0[b]
            w, wr = write_weights[b, t], read_weights[b, t]
            usage_step(u, w_before, wr_before, free_gates[b, t], new_usage, retention, one)
            u[:] = new_usage
            allocation_step(u, order, used, before, one, eps)
            content_step(write_key[b, t], write_strength[b, t], M, norms, cosine[0], content,
                         one, eps)
            gate, mix = write_gate[b, t], allocation_gate[b, t]
            for i in range(N):
                w[i] = gate * (mix * (one - used[i]) * before[i] + (one - mix) * content[i])
            if wipe:
                kept[:] = retention
            write_step(M, kept, w, erase[b, t], write_vector[b, t], norms, one, eps)
            if links:
                link_step(L, p, w, one)
                p *= one - w.sum()
                p += w
                follow_links(L, wr_before, forward, backward, one)
            for r in range(R):
                content_step(read_keys[b, t, r], read_strengths[b, t, r], M, norms, cosine[r + 1],
                             wr[r], one, eps)
                if links:
                    modes = read_modes[b, t, r]
                    for i in range(N):
                        wr[r, i] = (modes[0] * backward[r, i] + modes[1] * wr[r, i]
                                    + modes[2] * forward[r, i])
            reads[b, t] = one - one
            add_product(wr, M, reads[b, t])
            if record:
                usages[b, t], cosines[b, t], inverse_norms[b, t] = u, cosine, norms
                precedences[b, t] = p

@compiled(FAST, inlined=False)  # its sums, which both of its forms round alike, would change
def content_backward(strength, key_norm, norms, cosine, content, d_content, d_dots, shrink, one):
    """Backward of content_step down to the dot products of the key with every slot: sets d_dots
    (N,) and adds to shrink (N,), the share of its own row that a slot's gradient loses to its norm
    -> d_strength, and the same share of the key."""
    mean, d_strength, key_shrink = dot(content, d_content, one), one - one, one - one
    for i in range(content.shape[0]):
        d_logit = content[i] * (d_content[i] - mean)
        d_cosine = strength * d_logit
        d_strength += d_logit * cosine[i]
        key_shrink += d_cosine * cosine[i]
        d_dots[i] = d_cosine * norms[i] * key_norm
        shrink[i] += d_cosine * cosine[i] * norms[i] * norms[i]
    return d_strength, key_shrink * key_norm * key_norm

@compiled(FAST)
def shrink_rows(shrink, memory, d_memory):
    for i in range(memory.shape[0]):
        for j in range(memory.shape[1]):
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
def usage_backward(usage, write_weights, read_weights, free_gates, retention, d_retention, others,
                   d_usage, d_write_weights, d_read_weights, d_free_gates, one):
    """Backward of usage_step: d_usage goes from after it to before it, in place; d_write_weights
    (N,) and d_free_gates (R,) are set; d_read_weights (R, N) is added to; `others` is scratch."""
    for i in range(usage.shape[0]):
        w, u = write_weights[i], usage[i]
        d_retention[i] += d_usage[i] * (u + w - u * w)
        d_usage[i] *= retention[i]
        d_write_weights[i] = d_usage[i] * (one - u)
        d_usage[i] *= one - w
    for r in range(free_gates.shape[0]):
        others[:] = d_retention  # times the product over the other heads: no division by zero
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
    add_product(weights.T, d_backward, d_link)
    add_product(d_forward.T, weights, d_link)
    add_product(d_forward, link, d_weights)
    for r in range(weights.shape[0]):
        row_dots(d_backward[r], link, scratch, one)
        d_weights[r] += scratch

@compiled(FAST)
def link_backward(link, precedence, weights, d_link, d_precedence, d_weights, column, one):
    """Backward of link_step and of the precedence. link and precedence are those of before the
    step; d_link and d_precedence go from after it to before it, in place; d_weights is added to;
    `column` (N,) is scratch."""
    N = weights.shape[0]
    d_total, kept = dot(d_precedence, precedence, one), one - weights.sum()
    for i in range(N):
        d_weights[i] += d_precedence[i] - d_total
        d_precedence[i] *= kept
        d_link[i, i] = one - one
    column[:] = one - one
    for i in range(N):
        total = one - one
        for j in range(N):
            d = d_link[i, j]
            total += d * (precedence[j] - link[i, j])
            column[j] += d * link[i, j]
            d_precedence[j] += d * weights[i]
            d_link[i, j] = d * (one - weights[i] - weights[j])
        d_weights[i] += total
    d_weights -= column

@compiled(FAST)
def replay(start, end, wipe, links, one, eps, erase, write_vector, free_gates, write_weights,
           read_weights, read_weights0, precedences, precedence0, kept, norms, history,
           link_history):
    """Recompute memory and links after each step of a chunk: history[0] is given."""
    for t in range(start, end):
        now, p = t - start + 1, precedences[t - 1] if t > 0 else precedence0
        history[now] = history[now - 1]
        if wipe:
            wr_before = read_weights[t - 1] if t > 0 else read_weights0
            kept[:] = one
            for r in range(free_gates.shape[1]):
                for i in range(kept.shape[0]):
                    kept[i] *= one - free_gates[t, r] * wr_before[r, i]
        write_step(history[now], kept, write_weights[t], erase[t], write_vector[t], norms, one, eps)
        if links:
            link_history[now] = link_history[now - 1]
            link_step(link_history[now], p, write_weights[t], one)

@compiled(FAST, inlined=False)
def backward_rows(
        begin, end, every, wipe, links, one, eps,
        write_key, write_strength, erase, write_vector, write_gate, allocation_gate,
        read_keys, read_strengths, free_gates, read_modes,
        usage0, write_weights0, read_weights0, precedence0,
        write_weights, read_weights, usages, cosines, inverse_norms, precedences,
        memories, link_states,
        g_reads, g_write_weights, g_read_weights, g_memory, g_usage, g_link, g_precedence,
        d_write_key, d_write_strength, d_erase, d_write_vector, d_write_gate, d_allocation_gate,
        d_read_keys, d_read_strengths, d_free_gates, d_read_modes,
        d_memory, d_usage, d_write_weights, d_read_weights, d_link, d_precedence):
    """The gradients d_ of rows begin to end, from the gradients g_ of the forward's results. That
    of the state is carried back through time in d_memory to d_precedence, in place."""
    T, W = write_key.shape[1:]
    R, N = read_weights.shape[2:]
    linked = precedence0.shape[1]
    history = np.empty((every + 1, N, W), write_key.dtype)
    link_history = np.empty((every + 1, linked, linked), write_key.dtype)
    new_usage, retention, kept, used, before = np.empty((5, N), write_key.dtype)
    norms0, content, d_content, d_w, d_kept = np.empty((5, N), write_key.dtype)
    shrink, scratch = np.empty((2, N), write_key.dtype)
    forward, backward = np.empty((2, R, N), write_key.dtype)
    d_wr, d_dots, d_forward, d_backward = np.empty((4, R, N), write_key.dtype)
    kept[:] = one
    for b in range(begin, end):
        dM, du, dL, dp = d_memory[b], d_usage[b], d_link[b], d_precedence[b]
        dw_before, dwr_before = d_write_weights[b], d_read_weights[b]
        dM[:], du[:], dL[:], dp[:] = g_memory[b], g_usage[b], g_link[b], g_precedence[b]
        dw_before[:], dwr_before[:] = one - one, one - one
        for i in range(N):
            norms0[i] = inverse_norm(memories[b, 0, i], one, eps)
        order = np.arange(N)
        for t in range(T - 1, -1, -1):
            start, now = t - t % every, t % every + 1  # history[now] is the memory after step t
            if t == T - 1 or now == every:
                history[0], link_history[0] = memories[b, t // every], link_states[b, t // every]
                replay(start, t + 1, wipe, links, one, eps, erase[b], write_vector[b],
                       free_gates[b], write_weights[b], read_weights[b], read_weights0[b],
                       precedences[b], precedence0[b], kept, scratch, history, link_history)
            M, new_M, new_L = history[now - 1], history[now], link_history[now]
            w, wr, keys = write_weights[b, t], read_weights[b, t], read_keys[b, t]
            u_before = usages[b, t - 1] if t > 0 else usage0[b]
            w_before = write_weights[b, t - 1] if t > 0 else write_weights0[b]
            wr_before = read_weights[b, t - 1] if t > 0 else read_weights0[b]
            norms_before = inverse_norms[b, t - 1] if t > 0 else norms0

            # read vectors, read weightings
            d_w[:] = g_write_weights[b, t] + dw_before
            shrink[:] = one - one
            add_product(wr.T, g_reads[b, t], dM)
            if links:
                follow_links(new_L, wr_before, forward, backward, one)
            for r in range(R):
                strength, cosine = read_strengths[b, t, r], cosines[b, t, r + 1]
                row_dots(g_reads[b, t, r], new_M, d_wr[r], one)
                d_wr[r] += g_read_weights[b, t, r] + dwr_before[r]
                content[:], d_content[:] = wr[r], d_wr[r]
                if links:
                    softmax(strength, cosine, content)
                    mode_backward(read_modes[b, t, r], d_wr[r], content, forward[r], backward[r],
                                  d_read_modes[b, t, r], d_content, d_forward[r], d_backward[r],
                                  one)
                d_read_strengths[b, t, r], key_shrink = content_backward(
                    strength, inverse_norm(keys[r], one, eps), inverse_norms[b, t], cosine, content,
                    d_content, d_dots[r], shrink, one)
                d_read_keys[b, t, r] = -key_shrink * keys[r]
            add_product(d_dots, new_M, d_read_keys[b, t])
            add_product(d_dots.T, keys, dM)
            shrink_rows(shrink, new_M, dM)
            dwr_before[:] = one - one
            if links:
                p_before = precedences[b, t - 1] if t > 0 else precedence0[b]
                follow_backward(new_L, wr_before, d_forward, d_backward, dL, dwr_before, scratch,
                                one)
                link_backward(link_history[now - 1], p_before, w, dL, dp, d_w, scratch, one)

            # write
            usage_step(u_before, w_before, wr_before, free_gates[b, t], new_usage, retention, one)
            if wipe:
                kept[:] = retention
            d_erase[b, t], d_write_vector[b, t], d_kept[:] = one - one, one - one, one - one
            write_backward(M, kept, w, erase[b, t], write_vector[b, t], dM, d_w, d_erase[b, t],
                           d_write_vector[b, t], one)
            if wipe:
                wipe_backward(M, kept, dM, d_kept, one)

            # write weighting: gates, allocation, content
            allocation_step(usages[b, t], order, used, before, one, eps)
            strength, cosine, key = write_strength[b, t], cosines[b, t, 0], write_key[b, t]
            softmax(strength, cosine, content)
            gate, mix, d_gate, d_mix = write_gate[b, t], allocation_gate[b, t], one - one, one - one
            for i in range(N):
                allocation = (one - used[i]) * before[i]
                d_gate += d_w[i] * (mix * allocation + (one - mix) * content[i])
                d_mix += d_w[i] * gate * (allocation - content[i])
                d_content[i] = gate * (one - mix) * d_w[i]
                d_w[i] *= gate * mix  # from here on that of the allocation
            d_write_gate[b, t], d_allocation_gate[b, t] = d_gate, d_mix
            shrink[:] = one - one
            d_write_strength[b, t], key_shrink = content_backward(
                strength, inverse_norm(key, one, eps), norms_before, cosine, content, d_content,
                d_dots[0], shrink, one)
            d_write_key[b, t] = -key_shrink * key
            add_product(d_dots[:1], M, d_write_key[b, t : t + 1])
            add_product(d_dots[:1].T, write_key[b, t : t + 1], dM)
            shrink_rows(shrink, M, dM)
            allocation_backward(order, used, before, d_w, du, one, eps)
            usage_backward(u_before, w_before, wr_before, free_gates[b, t], retention, d_kept,
                           scratch, du, dw_before, dwr_before, d_free_gates[b, t], one)

def run_rows(kernel, flags: tuple, tensors: list[torch.Tensor]) -> None:
    """Run a numba kernel over all batch rows on torch's number of threads: it releases Python's
    lock. Rows are independent, so the result does not depend on that number."""
    number, rows = tensors[-1].numpy().dtype.type, len(tensors[0])
    arrays, errors = [tensor.numpy() for tensor in tensors], []
    workers = max(1, min(rows, torch.get_num_threads()))

    def work(worker: int) -> None:
        try:
            kernel(rows * worker // workers, rows * (worker + 1) // workers, *flags, number(1),
                   number(EPS), *arrays)
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

def numba_forward(parts, state, wipe: bool, every: int, record: bool) -> list[torch.Tensor]:
    results = empty_results(parts, state, every, record)
    links = state[4].shape[1] > 0
    run_rows(forward_rows, (every, wipe, links, record), [*parts, *state, *results])
    return results

def numba_backward(grads, parts, state, traces, wipe: bool, every: int) -> list[torch.Tensor]:
    _, usage, write_weights, read_weights, link, precedence = state
    gradients = [torch.empty_like(tensor) for tensor in (*parts, *state)]
    run_rows(backward_rows, (every, wipe, link.shape[1] > 0), [
        *parts, usage, write_weights, read_weights, precedence, *traces, *grads, *gradients])
    return gradients

# ══ CUDA: the recurrence as two Triton kernels, one program a batch row ══════════════════════════
# The memory tile stays on chip through all T steps, in registers up to about 64 x 128: links and
# the largest sizes spill (benchmarks/kernels.py tells). What a step costs is instructions, and the
# barriers of whatever crosses warps: sums over slots, stores, a transpose. Hence the shapes: slots
# come first, (NP, WP) and (NP, RP), so that a thread holds whole rows of heads and all heads share
# one sum; and the layout, which Triton takes from load_tile as long as no vector has as many
# elements as there are threads (see kernel_sizes).
# N, W, R are the sizes, NP, WP, RP those padded to powers of two. Padded slots hold zero memory and
# get no weight; padded columns and heads are zero.

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
    """Entry r of (K, G, WP) := products (NP, WP) summed down to the G rows that different threads
    hold; `less` (1, WP) leaves the sum. One sum over G then crosses warps once for all K."""
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
def softmax_of(cosines, strengths, inside):
    """softmax over slots of strength * cosine: (NP,) with a scalar, or (NP, RP) with (1, RP)."""
    logits = tl.where(inside, strengths * cosines, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 0, keep_dims=True))
    return powers * (1 / tl.sum(powers, 0, keep_dims=True))

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
               free_gates, at, column, head, W: tl.constexpr, R: tl.constexpr,
               dtype: tl.constexpr):
    """What a step needs to write: three vectors (WP,), three scalars, the free gates (RP,)."""
    return (load_vector(write_key + at * W, column, W, dtype),
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
        read_strengths, free_gates, read_modes, inverse_keys,
        memory_0, usage_0, write_weights_0, read_weights_0, link_0, precedence_0,
        all_reads, all_write_weights, all_read_weights, memory_T, usage_T, link_T, precedence_T,
        usages, all_cosines, all_inverse_norms, precedences, memories, links,
        T, EVERY: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
        NP: tl.constexpr, WP: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr, G: tl.constexpr,
        WIPE: tl.constexpr, LINKS: tl.constexpr, RECORD: tl.constexpr, EPS: tl.constexpr):
    dtype: tl.constexpr = memory_0.dtype.element_ty
    slot, column, head = tl.arange(0, NP), tl.arange(0, WP), tl.arange(0, RP)
    kind = tl.arange(0, KP)  # of the values per slot that a step stores
    inside = slot < N
    b = tl.program_id(0).to(tl.int64)  # 64 bits, as B*T*R*W may exceed 2^31

    memory = load_tile(memory_0 + b * N * W, N, W, NP, WP)
    usage = load_vector(usage_0 + b * N, slot, N, dtype)
    write_weights = load_vector(write_weights_0 + b * N, slot, N, dtype)
    read_weights = load_heads(read_weights_0 + b * R * N, slot, head, N, R, dtype)
    inverse_norms = tl.rsqrt(tl.sum(memory * memory, 1) + EPS)  # (NP,)
    if LINKS:
        link = load_tile(link_0 + b * N * N, N, N, NP, NP)
        precedence = load_vector(precedence_0 + b * N, slot, N, dtype)

    key_next, erase_next, vector_next, strength_next, gate_next, allocate_next, free_next = \
        load_write(write_key, write_strength, erase, write_vector, write_gate, allocation_gate,
                   free_gates, b * T, column, head, W, R, dtype)
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
                       head, W, R, dtype)

        # Write: usage, allocation, content, in Graves' order.
        retention = retention_of(free, read_weights)  # (NP,)
        usage = (usage + write_weights - usage * write_weights) * retention
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
        inverse_norms = tl.rsqrt(tl.sum(memory * memory, 1) + EPS)
        cosines = tl.zeros((NP, RP), dtype)
        for r in tl.static_range(R):
            read_key = load_vector(read_keys + (at * R + r) * W, column, W, dtype)
            inverse_key = tl.load(inverse_keys + at * (R + 1) + 1 + r)
            cosine = tl.sum(memory * read_key[None, :], 1) * inverse_norms * inverse_key
            cosines = set_head(cosines, cosine, head, r)
        strengths = load_vector(read_strengths + at * R, head, R, dtype)
        content = softmax_of(cosines, strengths[None, :], inside[:, None])  # (NP, RP)
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
        tl.store(all_reads + (at * R + head[:, None]) * W + column[None, :], tl.sum(reads, 1),
                 (head < R)[:, None] & (column < W)[None, :])

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
        read_strengths, free_gates, read_modes, inverse_keys,
        usage_0, write_weights_0, read_weights_0, precedence_0,
        all_write_weights, all_read_weights, usages, all_cosines, all_inverse_norms, precedences,
        memories, links,
        d_reads, d_all_write_weights, d_all_read_weights, d_memory_T, d_usage_T, d_link_T,
        d_precedence_T,
        d_vectors, d_write_strength, d_write_gate, d_allocation_gate, d_read_strengths,
        d_free_gates, d_read_modes,
        d_memory_0, d_usage_0, d_write_weights_0, d_read_weights_0, d_link_0, d_precedence_0,
        memory_scratch, link_scratch,
        T, EVERY: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
        NP: tl.constexpr, WP: tl.constexpr, RP: tl.constexpr, G: tl.constexpr,
        WIPE: tl.constexpr, LINKS: tl.constexpr, EPS: tl.constexpr):
    dtype: tl.constexpr = d_reads.dtype.element_ty
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

            # Reads: reads_r = sum_i wr_ri M'_i.
            read_weights = tl.zeros((NP, RP), dtype)
            for r in tl.static_range(R):
                d_read = load_vector(d_reads + (at * R + r) * W, column, W, dtype)
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
                content = softmax_of(cosines, strengths[None, :], inside[:, None])
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
            d_share, d_strengths = softmax_backward(content, d_read_weights, cosines)
            d_logits = content * (d_read_weights - d_share[None, :])  # before the share
            d_strengths *= share
            tl.store(d_read_strengths + at * R + head, d_strengths, head < R)
            if LINKS:
                tl.store(d_read_modes + (at * R + head) * 3 + 1, d_share, head < R)

            # Read keys: cosine_ri = K_r.M'_i / (|K_r| |M'_i|).
            norms = load_vector(all_inverse_norms + at * N, slot, N, dtype)
            d_cosines = d_logits * (strengths * share)[None, :]
            d_keys = tl.zeros((RP, G, WP), dtype)
            for r in tl.static_range(R):
                read_key = load_vector(read_keys + (at * R + r) * W, column, W, dtype)
                inverse_key = tl.load(inverse_keys + at * (R + 1) + 1 + r)
                d_dot = get_head(d_cosines, head, r) * norms * inverse_key
                d_memory += d_dot[:, None] * read_key[None, :]
                d_norm = tl.sum(tl.where(head == r, strengths * d_strengths, 0.0), 0)
                d_keys = set_partial(d_keys, d_dot[:, None] * memory, head, r,
                                     (d_norm * inverse_key * inverse_key * read_key)[None, :])
            d_memory -= memory * (norms * norms * tl.sum(d_cosines * cosines, 1))[:, None]
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
                free_gates, at, column, head, W, R, dtype)
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
                norms = tl.rsqrt(tl.sum(memory * memory, 1) + EPS)
            inverse_key = tl.load(inverse_keys + at * (R + 1))
            d_cosine = d_logits * (strength * share)
            d_dot = d_cosine * norms * inverse_key
            d_norm = strength * d_strength * inverse_key * inverse_key
            d_rows = set_partial(d_rows, d_dot[:, None] * memory, row, 2, (d_norm * key)[None, :])
            d_memory += d_dot[:, None] * key[None, :]
            d_memory -= memory * (norms * norms * d_cosine * cosine)[:, None]
            tl.store(d_vectors + (at * (R + 3) + R + row[:, None]) * W + column[None, :],
                     tl.sum(d_rows, 1), (row < 3)[:, None] & (column < W)[None, :])

            # Usage: a_i = (1 - s_i) prod of s_j before i; u = (u + w - u w) psi, those of t-1.
            source = previous_row(usages, usage_0, t, at, b, N)
            usage_before = load_vector(source, slot, N, dtype)
            source = previous_row(all_write_weights, write_weights_0, t, at, b, N)
            write_before = load_vector(source, slot, N, dtype)
            d_allocation = gate * allocate * d_write_weights
            d_used = (later_sum(used, d_allocation * allocation, slot) / used
                      - d_allocation * product_before)
            d_usage = tl.where(inside, d_usage + (1 - EPS) * d_used, 0.0)
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

def kernel_sizes(slots: int, width: int, heads: int, links: bool):
    """The constants of both kernels for a memory of this size, and the number of warps."""
    padded = [max(16, triton.next_power_of_2(x)) for x in (slots, width)]
    # More threads than a vector has elements, or Triton lays the tile out as suits that vector. Not
    # more: instructions per slot repeat in 16 threads. Links of 128 slots need the registers.
    num_warps = max(*padded, 64, 256 * (links and slots > 64)) // 16
    # The rows of a tile that lie in different threads: see load_tile and set_partial.
    rows = 32 // min(16, padded[1] // math.gcd(width, 4)) * num_warps
    sizes = {"N": slots, "W": width, "R": heads, "NP": padded[0], "WP": padded[1],
             "RP": triton.next_power_of_2(heads), "KP": triton.next_power_of_2(2 * heads + 5),
             "G": min(rows, padded[0]), "LINKS": links}
    return sizes, num_warps

def inverse_key_norms(parts, dtype: torch.dtype) -> torch.Tensor:
    """(|k|^2 + eps)^-1/2 of the write key and the R read keys of every step: (B, T, R + 1)."""
    write_key, read_keys = parts[PARTS.index("write_key")], parts[PARTS.index("read_keys")]
    keys = write_key.unsqueeze(2), read_keys  # (B, T, 1, W), (B, T, R, W)
    norms = [torch.linalg.vector_norm(key, dim=-1, dtype=dtype) for key in keys]
    return (torch.cat(norms, dim=2).square() + EPS).rsqrt()

def triton_forward(parts, state, wipe: bool, every: int, record: bool) -> list[torch.Tensor]:
    memory, _, _, _, link, _ = state
    _, T, R, _ = parts[PARTS.index("read_keys")].shape
    results = empty_results(parts, state, every, record)
    sizes, num_warps = kernel_sizes(*memory.shape[1:], R, link.shape[1] > 0)
    with torch.cuda.device_of(memory):
        forward_kernel[(len(memory),)](
            *parts, inverse_key_norms(parts, memory.dtype), *state, *results, T, every, **sizes,
            WIPE=wipe, RECORD=record, EPS=EPS, num_warps=num_warps)
    return results

def triton_backward(grads, parts, state, traces, wipe: bool, every: int) -> list[torch.Tensor]:
    memory, usage, write_weights, read_weights, link, precedence = state
    (B, N, W), new, linked = memory.shape, memory.new_empty, link.shape[1]
    _, T, R, _ = parts[PARTS.index("read_keys")].shape
    small = "write_strength write_gate allocation_gate read_strengths free_gates read_modes".split()
    d_vectors = new(B, T, R + 3, W)  # one store for read keys, erase, write vector, write key
    d_small = [new(parts[PARTS.index(name)].shape) for name in small]
    d_state = [torch.empty_like(x) for x in state]
    scratch = new(B, every, N, W), new(B, every, linked, linked)
    sizes, num_warps = kernel_sizes(N, W, R, linked > 0)
    sizes.pop("KP")
    with torch.cuda.device_of(memory):
        backward_kernel[(B,)](
            *parts, inverse_key_norms(parts, memory.dtype), usage, write_weights, read_weights,
            precedence, *traces, *grads, d_vectors, *d_small, *d_state, *scratch, T, every, **sizes,
            WIPE=wipe, EPS=EPS, num_warps=num_warps)
    d_erase, d_write_vector, d_write_key = d_vectors[:, :, R:].unbind(2)
    d_write_strength, d_write_gate, d_allocation_gate, *d_heads = d_small
    d_parts = (d_write_key, d_write_strength, d_erase, d_write_vector, d_write_gate,
               d_allocation_gate, d_vectors[:, :, :R], *d_heads)
    return [*(torch.empty_like(x).copy_(d) for d, x in zip(d_parts, parts, strict=True)), *d_state]

# ══ The operator ═════════════════════════════════════════════════════════════════════════════════
BACKENDS = {"numba": (numba_forward, numba_backward), "triton": (triton_forward, triton_backward)}

@torch.library.custom_op("dnc_gpt2::scan", mutates_args=(), schema=(
    "(Tensor[] parts, Tensor[] state, bool wipe, bool record, int every, str backend) -> Tensor[]"))
def scan_op(parts, state, wipe, record, every, backend):
    return list(BACKENDS[backend][0](parts, state, wipe, every, record))

@scan_op.register_fake
def _(parts, state, wipe, record, every, backend):
    return empty_results(parts, state, every, record)

@torch.library.custom_op("dnc_gpt2::scan_backward", mutates_args=(), schema=(
    "(Tensor[] grads, Tensor[] parts, Tensor[] state, Tensor[] traces, bool wipe, int every, "
    "str backend) -> Tensor[]"))
def scan_backward_op(grads, parts, state, traces, wipe, every, backend):
    return list(BACKENDS[backend][1](grads, parts, state, traces, wipe, every))

@scan_backward_op.register_fake
def _(grads, parts, state, traces, wipe, every, backend):
    return [torch.empty_like(tensor) for tensor in (*parts, *state)]

def save_for_backward(ctx, inputs, output) -> None:
    parts, state, ctx.wipe, _, ctx.every, ctx.backend = inputs
    results, tape = output[: len(RESULTS)], output[len(RESULTS) :]
    ctx.set_materialize_grads(False)  # or the whole tape would get gradients of zero
    ctx.mark_non_differentiable(*tape)
    # The memory that the state began with is the first checkpoint of the tape.
    ctx.save_for_backward(*parts, *state[1:], *results[1:3], *tape)
    ctx.shapes = [tensor.shape for tensor in results]

def scan_backward(ctx, grads):
    saved = list(ctx.saved_tensors)
    parts, traces = saved[: len(PARTS)], saved[-len(TRACES) :]
    memory = traces[TRACES.index("memories")][:, 0].contiguous()
    state = [memory, *saved[len(PARTS) : -len(TRACES)]]
    grads = [memory.new_zeros(shape) if grad is None else grad.contiguous()
             for grad, shape in zip(grads, ctx.shapes, strict=False)]
    found = scan_backward_op(grads, parts, state, traces, ctx.wipe, ctx.every, ctx.backend)
    return found[: len(PARTS)], found[len(PARTS) :], None, None, None, None

scan_op.register_autograd(scan_backward, setup_context=save_for_backward)

def backend_for(state, backend: str = "auto") -> str:
    """Raises ValueError for a name that is none."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r}: must be one of auto, {', '.join(BACKENDS)}")
    return backend if backend != "auto" else "triton" if state.memory.is_cuda else "numba"

def refusal(state, options, backend: str = "auto") -> str:
    """Why the fused recurrence cannot run on this state, and what to do; "" where it can."""
    (_, N, W), R, memory = state.memory.shape, state.read_weights.shape[1], state.memory
    backend = backend_for(state, backend)
    if options.mask_min < 1:
        return f"mask_min {options.mask_min} runs in the eager loop alone; set mask_min=1.0"
    if options.sharpen_links:
        return "sharpen_links runs in the eager loop alone; set sharpen_links=False"
    if backend == "numba" and memory.device.type != "cpu":
        return f"there is no fused recurrence for {memory.device.type}; use cuda or the cpu"
    exact = not memory.is_cuda and memory.dtype == torch.float64
    if memory.dtype != torch.float32 and not exact:
        return f"the state is {memory.dtype}; keep it in float32"
    if backend == "numba":
        return "" if numba else NO_NUMBA
    if triton is None:
        return NO_TRITON
    most_slots = 128 if options.use_links else 256
    for name, value, most in (("mem_slots", N, most_slots), ("mem_width", W, 256),
                              ("mem_slots * mem_width", N * W, 16_384), ("num_reads", R, 8)):
        if value > most:
            links = " beside links" if name == "mem_slots" and options.use_links else ""
            return f"{name} {value}: at most {most} are supported{links}; lower it"
    if memory.is_cuda and not torch.compiler.is_compiling():
        return trial(memory.device, N, W, R, options.use_links, options.dealloc_wipe)
    return ""

@functools.cache
def trial(device: torch.device, N: int, W: int, R: int, links: bool, wipe: bool) -> str:
    """Compile and run both CUDA kernels for one step -> why they cannot run on this machine: a card
    with too little shared memory, no C compiler for Triton's launcher; "" where they can."""
    L = N if links else 0
    sizes = [(1, 1, W), (1, 1), (1, 1, W), (1, 1, W), (1, 1), (1, 1), (1, 1, R, W), (1, 1, R),
             (1, 1, R), (1, 1, R, 3 if links else 0)]
    parts = [torch.zeros(size, device=device) for size in sizes]
    state = [torch.zeros(size, device=device)
             for size in ((1, N, W), (1, N), (1, N), (1, R, N), (1, L, L), (1, L))]
    try:
        results = triton_forward(parts, state, wipe, CHECKPOINT_EVERY, record=True)
        triton_backward(results[: len(RESULTS)], parts, state,
                        results[1:3] + results[len(RESULTS) :], wipe, CHECKPOINT_EVERY)
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton raises many kinds; the caller prints this line
        return f"the CUDA kernels do not run here ({type(error).__name__}: {error})".split("\n")[0]
    return ""

def check_shapes(interface, state, options) -> None:
    """Raise ValueError for what the kernels would read beyond its end, or not read at all."""
    (B, N, W), (T, R), links = state.memory.shape, interface.free_gates.shape[1:], options.use_links
    L, heads = N * links, (B, T, R)
    wanted = {
        "write_key": (B, T, W), "write_strength": (B, T), "erase": (B, T, W),
        "write_vector": (B, T, W), "write_gate": (B, T), "allocation_gate": (B, T),
        "read_keys": (*heads, W), "read_strengths": heads, "free_gates": heads,
        "read_modes": (*heads, 3) if links else None, "write_mask": None, "read_masks": None,
        "sharpening": None, "memory": (B, N, W), "usage": (B, N), "write_weights": (B, N),
        "read_weights": (B, R, N), "link": (B, L, L), "precedence": (B, L)}
    if T == 0:
        raise ValueError("the interface has no step: T = 0")
    for name, part in {**interface._asdict(), **state._asdict()}.items():
        shape = None if part is None else tuple(part.shape)
        if shape != wanted[name]:
            raise ValueError(f"{name} {shape}: must be {wanted[name]}, as memory {(B, N, W)}, "
                             f"{T} steps, {R} read heads and use_links {links} have it")

def dnc_scan(interface, state, options, backend: str = "auto"):
    """The same as dnc_gpt2.dnc_loop: interface (B, T, ...), activated, and a state of B rows ->
    reads (B, T, R, W), write_weights (B, T, N), read_weights (B, T, R, N) and the state after the
    last token. Computes in the state's type. backend: auto, numba (CPU) or triton (CUDA). Raises
    ValueError for shapes that do not fit, and, with what `refusal` says, where it cannot run."""
    if reason := refusal(state, options, backend):
        raise ValueError(reason)
    check_shapes(interface, state, options)
    backend, dtype = backend_for(state, backend), state.memory.dtype
    if interface.read_modes is None:
        interface = interface._replace(read_modes=interface.read_keys[..., :0])  # (B, T, R, 0)
    parts = [getattr(interface, name).contiguous() for name in PARTS]
    if backend == "numba" or any(part.dtype != torch.bfloat16 for part in parts):
        parts = [part.to(dtype) for part in parts]
    inputs = [getattr(state, name).to(dtype).contiguous() for name in STATE]
    record = torch.is_grad_enabled() and any(x.requires_grad for x in (*parts, *inputs))
    reads, write_weights, read_weights, memory, usage, link, precedence = scan_op(
        parts, inputs, options.dealloc_wipe, record, CHECKPOINT_EVERY, backend)[: len(RESULTS)]
    # Clones: a view would keep the whole trace alive in a carried or saved state.
    after = type(state)(memory, usage, write_weights[:, -1].clone(), read_weights[:, -1].clone(),
                        link, precedence)
    return reads, write_weights, read_weights, after
