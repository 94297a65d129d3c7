"""What the CPU and the CUDA kernels share: letters, equations, and the order of their tensors.

Letters: B batch rows, T time, N memory slots, W word width, R read heads, K key width: the first K
columns of a row are its key half, which addressing compares, and reads return the W - K behind it.
K = W is the plain DNC: all columns are compared, and all are read.

Backward of one step, for the forward in shared names (u usage, w write weighting, M memory; a
prime is the value after the step; sums run over the repeated index; d is the gradient; M^K and M^V
are the key half and the rest, both M where K = W):

    read       dwr_r += M'^V dread_r         dM'^V += sum_r wr_r dread_r^T
    links      dbackward_r = pi_b dwr_r      dL'_ij += wr_ri dbackward_rj + dforward_ri wr_rj
    softmax    g = c (dc - c.dc)             dstrength = g.cos        dcos = strength g
    empty slot dempty = -c_0 c.dc            c_0 = 1 - sum c, the share of the empty slot, whose
               value is zero: so its own dc is zero, and the line above holds as it stands
    cosine     dkey += sum_i dcos_i M^K_i / (|M^K_i| |key|) - key sum_i dcos_i cos_i / |key|^2
               dM^K_i += dcos_i key / (|M^K_i| |key|) - M^K_i dcos_i cos_i / |M^K_i|^2
    write      dw_i += dM'_i . (v - e M_i)   de -= sum_i w_i dM'_i M_i    dv += sum_i w_i dM'_i
               dM_i = dM'_i (1 - w_i e)      of all W columns
    allocation ds_i = -da_i prod(before i) + (sum of da_j a_j after i) / s_i
    usage      u' = gamma q psi with q = u + w - u w, gamma the decay of usage
               dq = gamma du' psi            dpsi += gamma du' q
               du = dq (1 - w)               dw = dq (1 - u)
    wipe       M_i is psi_i times the memory before, without gamma: dpsi_i += dM_i . (that memory)
"""

from __future__ import annotations

import torch

EPS = 1e-6
CHECKPOINT_EVERY = 16  # steps: of so many the tape keeps one memory

# What goes in and comes out of both back ends, as lists of tensors in the order of these names.
# Of the interface and of the state:
PARTS = ("write_key", "write_strength", "erase", "write_vector", "write_gate", "allocation_gate",
         "read_keys", "read_strengths", "free_gates", "read_modes", "empty")
STATE = ("memory", "usage", "write_weights", "read_weights", "link", "precedence")
# What dnc_loop returns:
RESULTS = ("reads", "write_weights", "read_weights", "memory", "usage", "link", "precedence")
# What is recorded beside it, to go back:
TAPE = ("usages", "cosines", "inverse_norms", "precedences", "memories", "links")
# What the backward reads of both:
TRACES = ("write_weights", "read_weights", *TAPE)


def value_width(key_width: int, width: int) -> int:
    """Columns of a row that a read returns: those behind the key half, all where keys are whole."""
    return width - key_width if key_width < width else width


def empty_results(parts, state, every: int, record: bool) -> list[torch.Tensor]:
    """Allocate RESULTS and TAPE; this has no elements where nothing is to be recorded."""
    memory, _, _, _, link, _ = state
    B, T, R, K = parts[PARTS.index("read_keys")].shape
    N, W = memory.shape[1:]
    linked = link.shape[1]  # N with links, else 0
    checkpoints = -(-T // every)

    results = {
        "reads": (B, T, R, value_width(K, W)),
        "write_weights": (B, T, N),
        "read_weights": (B, T, R, N),
        "memory": (B, N, W),
        "usage": (B, N),
        "link": (B, linked, linked),
        "precedence": (B, linked),
    }
    tape = {
        "usages": (B, T, N),
        "cosines": (B, T, R + 1, N),
        "inverse_norms": (B, T, N),
        "precedences": (B, T, linked),
        "memories": (B, checkpoints, N, W),
        "links": (B, checkpoints, linked, linked),
    }
    if not record:
        tape = {name: (0,) * len(shape) for name, shape in tape.items()}
    shapes = [*results.values(), *tape.values()]
    return [memory.new_empty(shape) for shape in shapes]
