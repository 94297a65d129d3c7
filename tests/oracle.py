"""NumPy float64 oracle of the DNC recurrence and its pointer, the reference for the tests.

Written from the equations alone (Graves et al. 2016, Methods; the masks, the wipe and the link
sharpening of Csordas & Schmidhuber 2019; the mixture of Merity et al. 2016) and without a look at
the implementation: two independent readings of the same equations rarely contain the same mistake.
One row at a time, one step at a time, one slot at a time, because its only virtue is to be easy to
check against the page.

B batch, T time, N memory slots, W word width, K key width, R read heads, I interface width,
C hidden width, V vocabulary.
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


def split_vector(
    z, W, R, use_links=False, mask_min=1.0, sharpen_links=False, key_width=0, empty_slot=False
):
    """One raw interface vector (I,) as a dict of its activated parts; refuses a wrong length."""
    position = 0
    K = key_width or W  # without split rows the whole row is key and content

    def take(count):
        nonlocal position
        part = z[position : position + count]
        assert part.shape == (count,), f"interface vector of {z.size} is too short"
        position += count
        return part

    parts = {}
    parts["write_key"] = take(K)
    parts["write_strength"] = oneplus(take(1))[0]
    parts["erase"] = sigmoid(take(W))
    parts["write_vector"] = take(W)
    parts["write_gate"] = sigmoid(take(1))[0]
    parts["allocation_gate"] = sigmoid(take(1))[0]
    parts["read_keys"] = take(R * K).reshape(R, K)
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
    if empty_slot:
        parts["empty"] = take(R)
    assert position == z.size, f"interface vector of {z.size}, {position} used"
    return parts


def content(key, strength, memory, mask=None, empty=None):
    """softmax_i( strength * cos(key, memory_i) ) over the columns of the key, masked: (N,).

    eps stands inside both roots. With a logit `empty` there is one more candidate, which takes its
    share of the softmax and is not returned.
    """
    N = memory.shape[0]
    K = key.size  # columns behind are content that no key sees
    mask = np.ones(K) if mask is None else mask[:K]
    key = key * mask
    key_norm = np.sqrt(np.sum(key**2) + EPS)
    similarity = np.zeros(N)
    for i in range(N):
        row = memory[i, :K] * mask
        similarity[i] = np.dot(key, row) / (key_norm * np.sqrt(np.sum(row**2) + EPS))
    if empty is None:
        return softmax(strength * similarity)
    return softmax(np.append(strength * similarity, empty))[:N]


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


def dnc_step(
    p,
    row,
    use_links=False,
    dealloc_wipe=False,
    sharpen_links=False,
    key_width=0,
    usage_decay=1.0,
    order=None,
):
    """One step of one batch row: `row` is updated (arrays replaced, never written into).

    Returns read vectors, (R, W) or of split rows (R, W - K), and the free list (N,).
    """
    M, w_before, wr_before = row["memory"], row["write_weights"], row["read_weights"]
    N, _ = M.shape
    R = wr_before.shape[0]

    # usage, from the previous write weighting and the previous read weightings
    psi = np.ones(N)
    for r in range(R):
        psi = psi * (1.0 - p["free_gates"][r] * wr_before[r])
    u = usage_decay * (row["usage"] + w_before - row["usage"] * w_before) * psi

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
        empty = p["empty"][r] if "empty" in p else None
        c = content(p["read_keys"][r], p["read_strengths"][r], M, mask, empty)
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
    return wr @ M[:, key_width:], order  # key_width 0: the whole row


def dnc_over_parts(parts, state, W, orders=None, **options):
    """The recurrence over parts[b][t], dicts as of split_vector, from `state` (see zero_state).

    `orders` (B, T, N), if given, is the free list to use at each step, lowest usage first; options
    are those of dnc_step. Returns reads (B, T, R, W), of split rows (B, T, R, W - K), write weights
    (B, T, N), read weights (B, T, R, N), the state after the last step and the free lists used
    (B, T, N). The given state stays as it was.
    """
    B, T = len(parts), len(parts[0])
    R, N = state["read_weights"].shape[1:]
    reads = np.zeros((B, T, R, W - options.get("key_width", 0)))
    write_weights = np.zeros((B, T, N))
    read_weights = np.zeros((B, T, R, N))
    used = np.zeros((B, T, N), dtype=np.int64)
    rows = []
    for b in range(B):
        row = {name: np.array(value[b], dtype=np.float64) for name, value in state.items()}
        for t in range(T):
            given = None if orders is None else orders[b, t]
            reads[b, t], used[b, t] = dnc_step(parts[b][t], row, order=given, **options)
            write_weights[b, t] = row["write_weights"]
            read_weights[b, t] = row["read_weights"]
        rows.append(row)
    after = {name: np.stack([row[name] for row in rows]) for name in state}
    return reads, write_weights, read_weights, after, used


def dnc_oracle(
    z,
    state,
    W,
    R,
    use_links=False,
    mask_min=1.0,
    dealloc_wipe=False,
    sharpen_links=False,
    key_width=0,
    usage_decay=1.0,
    empty_slot=False,
    orders=None,
):
    """dnc_over_parts of the raw interface vectors z (B, T, I), the same results."""
    z = np.asarray(z, dtype=np.float64)
    parts = [
        [
            split_vector(vector, W, R, use_links, mask_min, sharpen_links, key_width, empty_slot)
            for vector in sequence
        ]
        for sequence in z
    ]
    return dnc_over_parts(
        parts,
        state,
        W,
        orders,
        use_links=use_links,
        dealloc_wipe=dealloc_wipe,
        sharpen_links=sharpen_links,
        key_width=key_width,
        usage_decay=usage_decay,
    )


def layer_norm(x, scale, shift, eps=1e-5):
    """LN(x) of one vector."""
    return (x - x.mean()) / np.sqrt(x.var() + eps) * scale + shift


def unit(x):
    """x at length one; a zero vector stays zero."""
    length = np.sqrt(np.sum(x**2))
    return x / length if length > 0 else x


def row_parts(p, R, normed, before, embedding, row_key="previous"):
    """The instructions of one token for a split row, as of split_vector.

    normed LN(h_t), before LN(h_t-1), embedding e(x_t), all (C,); p weights and biases by name.
    """
    key = unit(p["row_key.weight"] @ {"previous": before, "own": normed}[row_key])
    both = np.concatenate([before, embedding])
    gates = sigmoid(p["gates.weight"] @ both + p["gates.bias"])  # write, allocation, R of free
    queries = (p["read_key.weight"] @ normed).reshape(R, key.size)
    parts = {
        "write_key": key,
        "write_strength": np.exp(p["log_strength"][R]),
        "erase": sigmoid(p["erase.weight"] @ both + p["erase.bias"]),
        "write_vector": np.concatenate([key, p["value.weight"] @ embedding]),
        "write_gate": gates[0],
        "allocation_gate": gates[1],
        "read_keys": np.stack([unit(query) for query in queries]),
        "read_strengths": np.exp(p["log_strength"][:R]),
        "free_gates": gates[2:],
    }
    if "empty.weight" in p:
        parts["empty"] = p["empty.weight"] @ normed + p["empty.bias"]
    if "links.weight" in p:
        links = (p["links.weight"] @ normed + p["links.bias"]).reshape(R, -1)
        parts["read_modes"] = softmax(links[:, :3])  # backward, content, forward
        if links.shape[1] > 3:
            parts["sharpening"] = oneplus(links[:, 3:])  # backward, forward
    return parts


def tokens_held(tokens, write_weights, before):
    """id_i(t) = x_t where w_t[i] > 1/2, else id_i(t - 1): (B, T, N) from x (B, T), w (B, T, N) and
    the ids before the first step (B, N), -1 for none."""
    B, T, N = write_weights.shape
    held = np.zeros((B, T, N), dtype=np.int64)
    for b in range(B):
        for t in range(T):
            for i in range(N):
                earlier = before[b, i] if t == 0 else held[b, t - 1, i]
                held[b, t, i] = tokens[b, t] if write_weights[b, t, i] > 0.5 else earlier
    return held


def pointer_weights(read_weights, ids):
    """rho_i (N,): the mean over heads of read weights (R, N), where the slot holds a token."""
    return np.where(ids >= 0, read_weights.mean(axis=0), 0.0)


def mixture(h, embedding, rho, ids):
    """p(y) = c0 softmax(E h)[y] + sum_i rho_i [id_i = y], c0 = 1 - sum rho: (V,) at one token."""
    p = (1.0 - rho.sum()) * softmax(embedding @ h)
    for weight, token in zip(rho, ids, strict=True):
        if token >= 0:
            p[token] += weight
    return p


def mixture_nll(h, embedding, rho, ids, targets):
    """-log p(target) of every row: h (M, C), E (V, C), rho and ids (M, N), targets (M,)."""
    return np.array(
        [
            -np.log(mixture(h[m], embedding, rho[m], ids[m])[targets[m]])
            for m in range(len(targets))
        ]
    )


def central_differences(loss, arrays, step=1e-5):
    """d loss / d array for every array of the dict, one entry at a time; loss takes the dict."""
    slopes = {}
    for name, array in arrays.items():
        slopes[name] = np.zeros(array.shape)
        for i in np.ndindex(array.shape):
            moved = []
            for sign in (1, -1):
                shifted = {**arrays, name: array.copy()}
                shifted[name][i] += sign * step
                moved.append(loss(shifted))
            slopes[name][i] = (moved[0] - moved[1]) / (2 * step)
    return slopes
