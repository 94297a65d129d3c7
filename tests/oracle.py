"""NumPy float64 oracle of the DNC recurrence, the reference for the tests.

Written from the equations alone (Graves et al. 2016, Methods; the masks, the wipe and the link
sharpening of Csordas & Schmidhuber 2019) and without a look at the implementation: two independent
readings of the same equations rarely contain the same mistake. One row at a time, one step at a
time, one slot at a time, because its only virtue is to be easy to check against the page.

B batch, T time, N memory slots, W word width, R read heads, I interface width.
"""

from __future__ import annotations

import numpy as np

EPS = 1e-6
NEAR_TIE = 1e-6  # how far from ascending a given free list may be, in shifted usage


def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow at either end."""
    return np.exp(-np.logaddexp(0.0, -x))


def oneplus(x):
    """1 + softplus(x), so that a strength is never below 1."""
    return 1.0 + np.logaddexp(0.0, x)


def softmax(x):
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def zero_state(B, N, W, R, use_links=False):
    """The initial state: everything zero, links and precedence only where they are used."""
    state = {
        "memory": np.zeros((B, N, W)),
        "usage": np.zeros((B, N)),
        "write_weights": np.zeros((B, N)),
        "read_weights": np.zeros((B, R, N)),
    }
    if use_links:
        state["link"] = np.zeros((B, N, N))
        state["precedence"] = np.zeros((B, N))
    return state


def split_vector(z, W, R, use_links=False, mask_min=1.0, sharpen_links=False):
    """One raw interface vector (I,) as a dict of its activated parts; refuses a wrong length."""
    position = 0

    def take(count):
        nonlocal position
        part = z[position : position + count]
        assert part.shape == (count,), f"interface vector of {z.size} is too short"
        position += count
        return part

    parts = {}
    parts["write_key"] = take(W)
    parts["write_strength"] = oneplus(take(1))[0]
    parts["erase"] = sigmoid(take(W))
    parts["write_vector"] = take(W)
    parts["write_gate"] = sigmoid(take(1))[0]
    parts["allocation_gate"] = sigmoid(take(1))[0]
    parts["read_keys"] = take(R * W).reshape(R, W)
    parts["read_strengths"] = oneplus(take(R))
    parts["free_gates"] = sigmoid(take(R))
    if use_links:
        parts["read_modes"] = softmax(take(R * 3).reshape(R, 3))  # backward, content, forward
    if mask_min < 1:
        mu = sigmoid(take((R + 1) * W)).reshape(R + 1, W)
        mu = mu * (1.0 - mask_min) + mask_min
        parts["write_mask"] = mu[0]
        parts["read_masks"] = mu[1:]
    if sharpen_links:
        parts["sharpening"] = oneplus(take(2 * R)).reshape(R, 2)  # backward, forward
    assert position == z.size, f"interface vector of {z.size}, {position} used"
    return parts


def content(key, strength, memory, mask=None):
    """softmax_i( strength * cos(key, memory_i) ), both masked, eps inside both roots: (N,)."""
    N, W = memory.shape
    mask = np.ones(W) if mask is None else mask
    key = key * mask
    key_norm = np.sqrt(np.sum(key**2) + EPS)
    similarity = np.zeros(N)
    for i in range(N):
        row = memory[i] * mask
        similarity[i] = np.dot(key, row) / (key_norm * np.sqrt(np.sum(row**2) + EPS))
    return softmax(strength * similarity)


def allocation(usage, order=None):
    """Allocation weighting (N,) from usage (N,), and the free list it used.

    A given order replaces the sort, because among near-ties only rounding decides: it must be
    a permutation and ascending within NEAR_TIE.
    """
    shifted = EPS + (1.0 - EPS) * usage
    if order is None:
        order = np.argsort(shifted, kind="stable")
    else:
        assert sorted(order) == list(range(usage.size)), f"not a permutation: {order}"
        steps = np.diff(shifted[order])
        assert np.all(steps >= -NEAR_TIE), f"free list descends by {-steps.min():.2e}"
    weighting = np.zeros(usage.size)
    product = 1.0
    for slot in order:
        weighting[slot] = (1.0 - shifted[slot]) * product
        product *= shifted[slot]
    return weighting, order


def sharpen(direction, power):
    """((d + eps) / max(d + eps))^power, divided by its sum."""
    d = direction + EPS
    d = (d / d.max()) ** power
    return d / d.sum()


def dnc_step(p, row, use_links, dealloc_wipe, sharpen_links, order=None):
    """One step of one batch row: `row` is updated (arrays replaced, never written into).

    Returns read vectors (R, W) and the free list (N,).
    """
    M, w_before, wr_before = row["memory"], row["write_weights"], row["read_weights"]
    N, _ = M.shape
    R = wr_before.shape[0]

    # usage, from the previous write weighting and the previous read weightings
    psi = np.ones(N)
    for r in range(R):
        psi = psi * (1.0 - p["free_gates"][r] * wr_before[r])
    u = (row["usage"] + w_before - row["usage"] * w_before) * psi

    # allocation, and the write's content addressing on the memory before wipe and write
    a, order = allocation(u, order)
    c = content(p["write_key"], p["write_strength"], M, p.get("write_mask"))
    g_a = p["allocation_gate"]
    w = p["write_gate"] * (g_a * a + (1.0 - g_a) * c)

    # write
    kept = M * psi[:, None] if dealloc_wipe else M
    M = kept * (1.0 - np.outer(w, p["erase"])) + np.outer(w, p["write_vector"])

    # links: the precedence of the step before enters, and only then is it updated
    if use_links:
        L_before, p_before = row["link"], row["precedence"]
        L = np.zeros((N, N))
        for i in range(N):
            for j in range(N):
                if i != j:
                    L[i, j] = (1.0 - w[i] - w[j]) * L_before[i, j] + w[i] * p_before[j]
        row["link"] = L
        row["precedence"] = (1.0 - w.sum()) * p_before + w

    # read
    wr = np.zeros((R, N))
    for r in range(R):
        mask = p["read_masks"][r] if "read_masks" in p else None
        c = content(p["read_keys"][r], p["read_strengths"][r], M, mask)
        if use_links:
            backward = L.T @ wr_before[r]
            forward = L @ wr_before[r]
            if sharpen_links:
                backward = sharpen(backward, p["sharpening"][r, 0])
                forward = sharpen(forward, p["sharpening"][r, 1])
            pi = p["read_modes"][r]
            wr[r] = pi[0] * backward + pi[1] * c + pi[2] * forward
        else:
            wr[r] = c

    row.update(memory=M, usage=u, write_weights=w, read_weights=wr)
    return wr @ M, order


def dnc_oracle(
    z,
    state,
    W,
    R,
    use_links=False,
    mask_min=1.0,
    dealloc_wipe=False,
    sharpen_links=False,
    orders=None,
):
    """The whole recurrence over raw interface vectors z (B, T, I) from `state` (see zero_state).

    `orders` (B, T, N), if given, is the free list to use at each step, lowest usage first.
    Returns reads (B, T, R, W), write weights (B, T, N), read weights (B, T, R, N), the state
    after the last step and the free lists used (B, T, N). The given state stays as it was.
    """
    z = np.asarray(z, dtype=np.float64)
    B, T, _ = z.shape
    N = state["memory"].shape[1]
    reads = np.zeros((B, T, R, W))
    write_weights = np.zeros((B, T, N))
    read_weights = np.zeros((B, T, R, N))
    used = np.zeros((B, T, N), dtype=np.int64)
    rows = []
    for b in range(B):
        row = {name: np.array(value[b], dtype=np.float64) for name, value in state.items()}
        for t in range(T):
            parts = split_vector(z[b, t], W, R, use_links, mask_min, sharpen_links)
            given = None if orders is None else orders[b, t]
            reads[b, t], used[b, t] = dnc_step(
                parts, row, use_links, dealloc_wipe, sharpen_links, given
            )
            write_weights[b, t] = row["write_weights"]
            read_weights[b, t] = row["read_weights"]
        rows.append(row)
    after = {name: np.stack([row[name] for row in rows]) for name in state}
    return reads, write_weights, read_weights, after, used
