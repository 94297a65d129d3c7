"""Tests of the DNC recurrence in dnc_gpt2.py against the NumPy float64 oracle and its invariants.

Values and gradients come from tests/oracle.py, written from the equations without a look at the
implementation. Properties that need no oracle (sums, ranges, isolation of rows) are tested beside
it, so that a mistake made in both readings would still show.

B batch, T time, C hidden width, N memory slots, W word width, R read heads, I interface width.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dnc_oracle, split_vector
from oracle import zero_state as oracle_zero_state

from dnc_gpt2 import (
    DNCMemory,
    DNCOptions,
    DNCState,
    Interface,
    allocation_weighting,
    content_weighting,
    dnc_loop,
    interface_sizes,
    link_update,
    split_interface,
    usage_update,
    zero_state,
)

EPS = 1e-6
PLAIN = DNCOptions()
FULL = DNCOptions(use_links=True, mask_min=0.1, dealloc_wipe=True, sharpen_links=True)
# Every valid combination of the four switches: sharpening needs links, which leaves 12 of 16.
COMBINATIONS = [
    DNCOptions(links, mask_min, wipe, sharpened)
    for links in (False, True)
    for mask_min in (1.0, 0.1)
    for wipe in (False, True)
    for sharpened in (False, True)
    if links or not sharpened
]


def option_id(options: DNCOptions) -> str:
    """Readable test id: the switches that are on."""
    switches = (options.use_links, options.mask_min < 1, options.dealloc_wipe,
                options.sharpen_links)
    names = ("links", "mask", "wipe", "sharpen")
    return "+".join(n for n, on in zip(names, switches, strict=True) if on) or "plain"


every_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=option_id)
plain_and_full = pytest.mark.parametrize("options", [PLAIN, FULL], ids=option_id)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads, and threads that wait for a busy core cost a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ══ Helpers ══════════════════════════════════════════════════════════════════════════════════════


def random_z(rng, B, T, W, R, options, scale=1.5):
    """Raw interface vectors (B, T, I), wide enough that gates move over most of their range."""
    return rng.normal(0.0, scale, (B, T, sum(interface_sizes(W, R, options).values())))


def random_state(rng, B, N, W, R, options):
    """A carried state that some history could have left: weightings sum to at most one, links
    have a zero diagonal and row and column sums below one, two slots are exactly as unused."""
    usage = rng.uniform(0.0, 1.0, (B, N))
    usage[:, [0, N - 1]] = usage[:, [1]]
    state = {
        "memory": rng.normal(0.0, 1.0, (B, N, W)),
        "usage": usage,
        "write_weights": rng.dirichlet(np.ones(N), B) * rng.uniform(0.0, 1.0, (B, 1)),
        "read_weights": rng.dirichlet(np.ones(N), (B, R)),
    }
    if options.use_links:
        state["link"] = rng.uniform(0.0, 1.0 / N, (B, N, N)) * (1.0 - np.eye(N))
        state["precedence"] = rng.dirichlet(np.ones(N), B) * rng.uniform(0.0, 1.0, (B, 1))
    return state


def start_state(kind, rng, B, N, W, R, options):
    """The oracle's zero state or a random carried one."""
    if kind == "zero":
        return oracle_zero_state(B, N, W, R, options.use_links)
    return random_state(rng, B, N, W, R, options)


def to_torch(state, dtype=torch.float64) -> DNCState:
    """An oracle state as DNCState; without links the last two fields are empty."""
    B = state["memory"].shape[0]
    empty = {"link": np.zeros((B, 0, 0)), "precedence": np.zeros((B, 0))}
    return DNCState(**{k: torch.tensor(v, dtype=dtype) for k, v in {**empty, **state}.items()})


def run_path(z, state, W, R, options):
    """The path under test: raw z (B, T, I) in, dnc_loop's four results out."""
    return dnc_loop(split_interface(z, W, R, options), state, options)


def path_orders(z, state, write_weights, read_weights, W, R, options):
    """The free lists (B, T, N) that the path under test used, from its own weightings.

    Among near-ties rounding decides the order, so the usage is recomputed in the path's own
    precision. It is checked against a plain float64 recomputation, and the list itself for
    ascending order and for exact ties in slot order.
    """
    free_gates = split_interface(z, W, R, options).free_gates
    usage, w, wr = state.usage, state.write_weights, state.read_weights
    usage64 = usage.double().numpy()
    orders = []
    for t in range(z.shape[1]):
        usage, _ = usage_update(usage, w, wr, free_gates[:, t])
        w64, wr64 = w.double().numpy(), wr.double().numpy()
        psi = np.prod(1 - free_gates[:, t].double().numpy()[..., None] * wr64, axis=1)  # (B, N)
        usage64 = (usage64 + w64 - usage64 * w64) * psi
        np.testing.assert_allclose(usage.double().numpy(), usage64, atol=1e-6, rtol=0)

        shifted = (EPS + (1 - EPS) * usage).numpy()
        order = np.argsort(shifted, axis=-1, kind="stable")
        ranked = np.take_along_axis(shifted, order, -1)
        assert np.all(np.diff(ranked) >= 0)
        assert np.all((np.diff(ranked) > 0) | (np.diff(order) > 0))  # exact tie: lowest slot first
        orders.append(order)
        w, wr = write_weights[:, t], read_weights[:, t]
    return np.stack(orders, axis=1)  # (B, T, N)


def assert_matches_oracle(z, start, W, R, options):
    """dnc_loop in float64 from an oracle state: every result within 1e-9 of the oracle's."""
    state, z = to_torch(start), torch.tensor(z)
    reads, write_weights, read_weights, after = run_path(z, state, W, R, options)
    orders = path_orders(z, state, write_weights, read_weights, W, R, options)
    want = dnc_oracle(z.numpy(), start, W, R, **options._asdict(), orders=orders)
    close = {"atol": 1e-9, "rtol": 1e-9}
    np.testing.assert_allclose(write_weights.numpy(), want[1], err_msg="write weights", **close)
    np.testing.assert_allclose(read_weights.numpy(), want[2], err_msg="read weights", **close)
    np.testing.assert_allclose(reads.numpy(), want[0], err_msg="reads", **close)
    for name, value in want[3].items():
        np.testing.assert_allclose(getattr(after, name).numpy(), value, err_msg=name, **close)


def separated_case(options, B=1, T=3, N=4, W=3, R=2, margin=1e-3):
    """z and a carried state whose usages differ by more than `margin` at every step, so that no
    small change moves the free list: the gradient is undefined where it does move."""
    for seed in range(500):
        rng = np.random.default_rng(seed)
        z = random_z(rng, B, T, W, R, options, scale=1.0)
        state = random_state(rng, B, N, W, R, options)
        state["usage"] = np.sort(rng.uniform(0.05, 0.95, (B, N)))[:, rng.permutation(N)]
        usages, now = [], state
        for t in range(T):
            now = dnc_oracle(z[:, t : t + 1], now, W, R, **options._asdict())[3]
            usages.append(np.sort(now["usage"]))
        if np.diff(usages).min() > margin:
            return z, state
    raise AssertionError("no seed keeps the usages apart")


def hand_interface(B, T, W, R, **parts) -> Interface:
    """An interface with every gate shut and nothing written, except for the parts given."""
    zeros = torch.zeros
    fields = {
        "write_key": zeros(B, T, W), "write_strength": torch.ones(B, T),
        "erase": zeros(B, T, W), "write_vector": zeros(B, T, W),
        "write_gate": zeros(B, T), "allocation_gate": torch.ones(B, T),
        "read_keys": zeros(B, T, R, W), "read_strengths": torch.ones(B, T, R),
        "free_gates": zeros(B, T, R), "read_modes": None, "write_mask": None,
        "read_masks": None, "sharpening": None,
    }
    assert set(parts) <= set(fields)
    return Interface(**{**fields, **parts})


def cut(interface: Interface, begin: int, end: int) -> Interface:
    """Steps begin to end of an interface."""
    return Interface(*(None if part is None else part[:, begin:end] for part in interface))


def one_hot(slot, N, *shape):
    """(*shape, N), one at `slot`."""
    weights = torch.zeros(*shape, N)
    weights[..., slot] = 1.0
    return weights


# ══ Interface ════════════════════════════════════════════════════════════════════════════════════


@every_combination
def test_split_interface_matches_oracle(options):
    """Order of the parts, their activations and documented shapes; absent parts are None."""
    B, T, W, R = 2, 3, 5, 3
    z = random_z(np.random.default_rng(1), B, T, W, R, options, scale=4.0)
    parts = split_interface(torch.tensor(z), W, R, options)._asdict()
    shapes = {
        "write_key": (W,), "write_strength": (), "erase": (W,), "write_vector": (W,),
        "write_gate": (), "allocation_gate": (), "read_keys": (R, W), "read_strengths": (R,),
        "free_gates": (R,), "read_modes": (R, 3), "write_mask": (W,), "read_masks": (R, W),
        "sharpening": (R, 2),
    }
    for b in range(B):
        for t in range(T):
            want = split_vector(
                z[b, t], W, R, options.use_links, options.mask_min, options.sharpen_links
            )
            assert {name for name, part in parts.items() if part is not None} == set(want)
            for name, value in want.items():
                assert parts[name].shape == (B, T, *shapes[name]), name
                np.testing.assert_allclose(parts[name][b, t], value, atol=1e-12, err_msg=name)


@every_combination
def test_zero_state_shapes(options):
    """Every field zero, of its documented shape; links cost nothing when they are off."""
    B, N, W, R = 3, 5, 2, 4
    state = zero_state(B, N, W, R, options, dtype=torch.float64)
    linked = N if options.use_links else 0
    shapes = [(B, N, W), (B, N), (B, N), (B, R, N), (B, linked, linked), (B, linked)]
    assert [tuple(x.shape) for x in state] == shapes
    assert all(x.dtype == torch.float64 and not x.any() for x in state)


# ══ Values against the oracle ════════════════════════════════════════════════════════════════════


@every_combination
@pytest.mark.parametrize("start", ["zero", "carried"])
@pytest.mark.parametrize("B,T,N,W,R", [(3, 7, 5, 3, 2), (1, 13, 17, 6, 3)])
def test_dnc_loop_matches_oracle(B, T, N, W, R, start, options):
    """Reads, both weightings and every field of the state, to 1e-9 in float64."""
    rng = np.random.default_rng(B + T)
    state = start_state(start, rng, B, N, W, R, options)
    assert_matches_oracle(random_z(rng, B, T, W, R, options), state, W, R, options)


@pytest.mark.parametrize("switch", ["use_links", "mask_min", "dealloc_wipe", "sharpen_links"])
def test_oracle_switch_changes_reads(switch):
    """Guards the comparison above: a switch that both sides ignored would pass it."""
    rng = np.random.default_rng(2)
    B, T, N, W, R = 1, 6, 4, 3, 2
    z, state = random_z(rng, B, T, W, R, FULL), random_state(rng, B, N, W, R, FULL)
    off = FULL._replace(**{switch: PLAIN._asdict()[switch]})
    if switch == "use_links":
        off = off._replace(sharpen_links=False)
    parts = dict(zip(interface_sizes(W, R, FULL), np.split(
        z, np.cumsum(list(interface_sizes(W, R, FULL).values()))[:-1], axis=-1), strict=True))
    kept_parts = [parts[name] for name, size in interface_sizes(W, R, off).items() if size]
    shorter = np.concatenate(kept_parts, axis=-1)
    if not off.use_links:
        kept = {k: v for k, v in state.items() if k not in ("link", "precedence")}
    else:
        kept = state
    with_switch = dnc_oracle(z, state, W, R, **FULL._asdict())[0]
    without = dnc_oracle(shorter, kept, W, R, **off._asdict())[0]
    assert np.abs(with_switch - without).max() > 1e-3


@every_combination
@pytest.mark.parametrize("start", ["zero", "carried"])
def test_dnc_loop_float32_matches_oracle_reads(start, options):
    """Float32 costs at most 1e-4 in the reads, given the free list that float32 chose."""
    B, T, N, W, R = 2, 9, 7, 5, 2
    rng = np.random.default_rng(3)
    z = torch.tensor(random_z(rng, B, T, W, R, options), dtype=torch.float32)
    start = start_state(start, rng, B, N, W, R, options)
    state = to_torch(start, torch.float32)
    reads, write_weights, read_weights, after = run_path(z, state, W, R, options)
    assert all(x.dtype == torch.float32 for x in (reads, write_weights, read_weights, *after))
    orders = path_orders(z, state, write_weights, read_weights, W, R, options)
    same_start = {name: getattr(state, name).double().numpy() for name in start}
    want = dnc_oracle(z.double().numpy(), same_start, W, R, **options._asdict(), orders=orders)
    assert np.abs(want[0]).max() > 0.1  # reads that say something
    np.testing.assert_allclose(reads.numpy(), want[0], atol=1e-4, rtol=0)


@every_combination
def test_dnc_memory_matches_oracle(options):
    """The module is LayerNorm, interface, recurrence and h + read_proj(reads), heads in order."""
    torch.manual_seed(4)
    B, T, C, N, W, R = 2, 5, 8, 6, 3, 2
    module = DNCMemory(C, N, W, R, options).double()
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    torch.nn.init.normal_(module.read_proj.weight)
    h = torch.randn(B, T, C, dtype=torch.float64)
    start = random_state(np.random.default_rng(4), B, N, W, R, options)
    with torch.no_grad():
        h_out, after, trace = module(h, to_torch(start))
        normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False)
                                                   + module.norm.eps).sqrt()
        normed = normed * module.norm.weight + module.norm.bias
        z = normed @ module.interface.weight.T + module.interface.bias
    want = dnc_oracle(z.numpy(), start, W, R, **options._asdict())
    proj = module.read_proj.weight.detach().numpy()  # (C, R*W)
    want_h = h.numpy() + want[0].reshape(B, T, R * W) @ proj.T
    np.testing.assert_allclose(h_out.numpy(), want_h, atol=1e-9)
    np.testing.assert_allclose(trace.write_weights.numpy(), want[1], atol=1e-9)
    np.testing.assert_allclose(trace.read_weights.numpy(), want[2], atol=1e-9)
    np.testing.assert_allclose(after.memory.numpy(), want[3]["memory"], atol=1e-9)
    gate = split_interface(z, W, R, options).write_gate
    np.testing.assert_allclose(trace.write_gate.numpy(), gate.numpy(), atol=1e-12)


# ══ Gradients ════════════════════════════════════════════════════════════════════════════════════


@every_combination
def test_dnc_loop_gradient_matches_oracle_differences(options):
    """Autograd of z and of every field of the state, against central differences of the oracle."""
    B, T, N, W, R = 1, 3, 4, 3, 2
    z, state = separated_case(options, B, T, N, W, R)
    rng = np.random.default_rng(5)
    probes = [rng.normal(size=s) for s in [(B, T, R, W), (B, T, N), (B, T, R, N)]]
    state_probes = {name: rng.normal(size=value.shape) for name, value in state.items()}

    def oracle_loss(z, state):
        *outputs, after, _ = dnc_oracle(z, state, W, R, **options._asdict())
        loss = sum((p * x).sum() for p, x in zip(probes, outputs, strict=True))
        return loss + sum((state_probes[name] * after[name]).sum() for name in state)

    leaf = torch.tensor(z, requires_grad=True)
    start = to_torch(state)
    for name in state:
        getattr(start, name).requires_grad_()
    *outputs, after = run_path(leaf, start, W, R, options)
    loss = sum((torch.tensor(p) * x).sum() for p, x in zip(probes, outputs, strict=True))
    loss = loss + sum((torch.tensor(state_probes[n]) * getattr(after, n)).sum() for n in state)
    assert abs(loss.item() - oracle_loss(z, state)) < 1e-9
    loss.backward()

    arrays = {"z": z, **state}
    for name, array in arrays.items():
        difference = np.zeros(array.size)
        for i in range(array.size):
            moved = []
            for sign in (1, -1):
                shifted = {k: v.copy() for k, v in arrays.items()}
                shifted[name].reshape(-1)[i] += sign * 1e-5
                moved.append(oracle_loss(shifted.pop("z"), shifted))
            difference[i] = (moved[0] - moved[1]) / 2e-5
        got = (leaf if name == "z" else getattr(start, name)).grad.numpy().reshape(-1)
        assert np.abs(difference).max() > 1e-2, name
        np.testing.assert_allclose(got, difference, atol=1e-6, rtol=1e-6, err_msg=name)


@every_combination
def test_dnc_loop_gradcheck(options):
    """The full Jacobian of every output, z and initial state in, away from ties in the usage."""
    W, R = 2, 2
    z, state = separated_case(options, B=1, T=2, N=3, W=W, R=R)
    names = list(state)
    inputs = [torch.tensor(x, requires_grad=True) for x in (z, *state.values())]
    blank = to_torch(state)

    def outputs(z, *fields):
        start = blank._replace(**dict(zip(names, fields, strict=True)))
        *sequences, after = run_path(z, start, W, R, options)
        return (*sequences, *(getattr(after, name) for name in names))

    assert torch.autograd.gradcheck(outputs, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


@plain_and_full
def test_dnc_memory_gradcheck(options):
    """Through the module: h, the memory it starts with and its parameters."""
    torch.manual_seed(6)
    B, T, C, N, W, R = 1, 2, 4, 3, 2, 1
    module = DNCMemory(C, N, W, R, options).double()
    torch.nn.init.normal_(module.read_proj.weight)
    state = random_state(np.random.default_rng(6), B, N, W, R, options)
    state["usage"] = np.array([[0.7, 0.1, 0.4]])
    start = to_torch(state)
    h = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    memory = start.memory.requires_grad_()
    parameters = dict(module.named_parameters())

    def outputs(h, memory, *values):
        replaced = dict(zip(parameters, values, strict=True))
        h_out, after, trace = torch.func.functional_call(
            module, replaced, (h, start._replace(memory=memory)))
        return (h_out, trace.write_weights, after.memory)

    assert torch.autograd.gradcheck(outputs, (h, memory, *parameters.values()), atol=1e-6)
    sum(x.square().sum() for x in outputs(h, memory, *parameters.values())).backward()
    for name, parameter in parameters.items():
        assert parameter.grad.abs().max() > 1e-4, name


def test_content_weighting_gradient_into_empty_row_is_bounded():
    """eps inside the root bounds the slope at an empty slot by 1 / sqrt(eps) = 1,000. Beside it
    stands the usual form, eps outside, which at the same point is thousands of times steeper."""
    torch.manual_seed(7)
    memory = torch.randn(1, 5, 3, dtype=torch.float64)
    memory[:, 2:] = 0.0
    keys, strengths = torch.randn(1, 1, 3, dtype=torch.float64), torch.full((1, 1), 2.0).double()
    probe = torch.randn(1, 1, 5, dtype=torch.float64)

    def outside(keys, strengths, memory, masks):
        norms = keys.norm(dim=-1).unsqueeze(-1) * memory.norm(dim=-1).unsqueeze(1)  # (1, 1, N)
        return (strengths.unsqueeze(-1) * keys @ memory.mT / (norms + EPS)).softmax(-1)

    slopes = []
    for weighting in (content_weighting, outside):
        leaf = memory.clone().requires_grad_()
        (weighting(keys, strengths, leaf, None) * probe).sum().backward()
        slopes.append(leaf.grad[:, 2:].abs().max().item())
    assert 10 < slopes[0] < 1e4  # steep, so the empty slot is really the point being tested
    assert slopes[1] > 1e5


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dnc_loop_gradient_into_zero_state_is_bounded(dtype, options):
    """The first step of every training run: all slots empty, all usages tied."""
    B, T, N, W, R = 2, 3, 6, 3, 2
    rng = np.random.default_rng(8)
    z = torch.tensor(random_z(rng, B, T, W, R, options), dtype=dtype, requires_grad=True)
    state = zero_state(B, N, W, R, options, dtype=dtype)
    memory = state.memory.requires_grad_()
    reads, write_weights, _, _ = run_path(z, state, W, R, options)
    probe = torch.tensor(rng.normal(size=write_weights.shape), dtype=dtype)
    (reads.sum() + (write_weights * probe).sum()).backward()
    assert torch.isfinite(z.grad).all() and z.grad.abs().max() > 1e-2
    assert torch.isfinite(memory.grad).all()
    assert 10 < memory.grad.abs().max() < 1e4  # steep, as an empty slot is, and bounded


@pytest.mark.parametrize("N", [3, 9])
def test_allocation_weighting_gradcheck(N):
    """Usages apart, a nearly free and a nearly full slot included."""
    rng = np.random.default_rng(9)
    usage = np.stack([rng.permutation(np.linspace(2e-3, 1 - 2e-3, N)) for _ in range(2)])
    leaf = torch.tensor(usage, requires_grad=True)
    assert torch.autograd.gradcheck(allocation_weighting, (leaf,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_allocation_weighting_gradient_finite_at_ties(value):
    """Ties are the usual case (empty, full): no gradient there may be infinite or NaN."""
    leaf = torch.full((1, 64), value, requires_grad=True)
    (allocation_weighting(leaf) * torch.arange(64)).sum().backward()
    assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() < 1e4


# ══ Usage and allocation ═════════════════════════════════════════════════════════════════════════

usages = st.lists(
    st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0.0, 1.0)),
    min_size=1, max_size=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(usages)
def test_allocation_weighting_sums_to_one_minus_product(values):
    """sum a = 1 - prod u~, whatever the ties: nothing is renormalised."""
    usage = torch.tensor([values], dtype=torch.float64)
    a = allocation_weighting(usage)
    assert a.shape == usage.shape
    assert (a >= 0).all() and (a <= 1).all()
    used = EPS + (1 - EPS) * np.array(values)
    assert abs(a.sum().item() - (1 - np.prod(used))) < 1e-12


@settings(max_examples=100, deadline=None, derandomize=True)
@given(usages)
def test_allocation_weighting_takes_freest_lowest_slot(values):
    """Against the free list spelled out: by usage, then by slot."""
    used = [EPS + (1 - EPS) * u for u in values]
    want, product = [0.0] * len(values), 1.0
    for slot in sorted(range(len(values)), key=lambda i: (used[i], i)):
        want[slot] = (1 - used[slot]) * product
        product *= used[slot]
    got = allocation_weighting(torch.tensor([values], dtype=torch.float64))[0]
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


@pytest.mark.parametrize("N", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_allocation_weighting_full_memory_allocates_nothing(dtype, N):
    """No free slot, no weight; one slot freed takes all of it."""
    usage = torch.ones(2, N, dtype=dtype)
    assert allocation_weighting(usage).abs().max() < 1e-6
    usage[1, N // 2] = 0.0
    a = allocation_weighting(usage)
    assert a[0].abs().max() < 1e-6
    np.testing.assert_allclose(a[1].numpy(), one_hot(N // 2, N).numpy(), atol=1e-4)


@pytest.mark.parametrize("N", [2, 7, 64, 257])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_allocation_weighting_ties_break_to_lowest_slot(N, value):
    """Equal usages: the weight of slot j is (1 - u~) u~^j, also where a sort might be unstable."""
    a = allocation_weighting(torch.full((3, N), value, dtype=torch.float64))
    used = EPS + (1 - EPS) * value
    np.testing.assert_allclose(a.numpy(), np.tile((1 - used) * used ** np.arange(N), (3, 1)),
                               atol=1e-12)


def test_allocation_weighting_empty_memory_leaves_epsilon():
    """1 - 1e-6 in float32 is not 1: the shift must not vanish."""
    a = allocation_weighting(torch.zeros(1, 4))
    assert a.dtype == torch.float32
    assert a[0, 0] < 1.0 and abs(a[0, 0].item() - (1 - 1e-6)) < 1e-7
    assert abs(a[0, 1].item() - 1e-6) < 1e-8


@pytest.mark.parametrize("seed", range(10))
def test_usage_update_stays_in_unit_interval(seed):
    """Usage and retention in [0, 1], and both equal to the page."""
    rng = np.random.default_rng(seed)
    B, N, R = 3, 5, int(rng.integers(1, 4))
    usage, w = rng.uniform(size=(B, N)).round(), rng.dirichlet(np.ones(N), B)
    wr, free = rng.dirichlet(np.full(N, 0.3), (B, R)), rng.uniform(size=(B, R)).round(1)
    got, retention = usage_update(*map(torch.tensor, (usage, w, wr, free)))
    psi = np.prod([1 - free[:, r, None] * wr[:, r] for r in range(R)], axis=0)  # (B, N)
    np.testing.assert_allclose(retention.numpy(), psi, atol=1e-14)
    np.testing.assert_allclose(got.numpy(), (usage + w - usage * w) * psi, atol=1e-14)
    for x in (got, retention):
        assert (x >= 0).all() and (x <= 1).all()


@plain_and_full
def test_dnc_loop_usage_follows_previous_write(options):
    """The write of step t shows in the usage of step t + 1, not in that of step t."""
    B, N, W, R = 1, 4, 3, 2
    parts = {"write_gate": torch.tensor([[1.0, 0.0]])}
    if options.use_links:
        parts |= {"read_modes": torch.full((B, 2, R, 3), 1 / 3),
                  "sharpening": torch.ones(B, 2, R, 2)}
    if options.mask_min < 1:
        parts |= {"write_mask": torch.ones(B, 2, W), "read_masks": torch.ones(B, 2, R, W)}
    x = hand_interface(B, 2, W, R, **parts)
    start = zero_state(B, N, W, R, options)
    *_, first = dnc_loop(cut(x, 0, 1), start, options)
    *_, second = dnc_loop(cut(x, 1, 2), first, options)
    assert first.write_weights[0, 0] > 0.99 and not first.usage.any()
    np.testing.assert_allclose(second.usage, one_hot(0, N, B), atol=1e-5)


def test_usage_update_free_gate_frees_slot():
    """A slot read in full through an open free gate is free again, the others keep their usage."""
    B, N = 1, 4
    read = torch.stack([one_hot(2, N), one_hot(3, N)]).unsqueeze(0)  # (B, R, N)
    usage, retention = usage_update(torch.ones(B, N), torch.zeros(B, N), read,
                                    torch.tensor([[1.0, 0.0]]))
    assert usage.tolist() == [[1.0, 1.0, 0.0, 1.0]]
    assert retention.tolist() == [[1.0, 1.0, 0.0, 1.0]]


def test_dnc_loop_free_gates_keep_allocation_alive():
    """After five times as many writes as slots, freed memory still allocates; unfreed is full."""
    B, N, W, R = 1, 4, 3, 1
    T = 5 * N
    words = torch.nn.functional.normalize(
        torch.randn(B, T, W, generator=torch.Generator().manual_seed(10)), dim=-1)
    totals = {}
    for free in (0.0, 1.0):
        x = hand_interface(
            B, T, W, R, write_gate=torch.ones(B, T), erase=torch.ones(B, T, W),
            write_vector=words, read_keys=words.unsqueeze(2),
            read_strengths=torch.full((B, T, R), 500.0), free_gates=torch.full((B, T, R), free))
        _, write_weights, read_weights, _ = dnc_loop(x, zero_state(B, N, W, R, PLAIN), PLAIN)
        totals[free] = write_weights.sum(-1)[0]  # (T,)
        if free:
            assert read_weights.amax(-1).min() > 0.9  # each read finds what was just written
    assert totals[1.0].min() > 0.9
    assert totals[0.0][: N - 1].min() > 0.9 and totals[0.0][2 * N :].max() < 0.01


def test_dnc_loop_wipe_clears_freed_slot():
    """(D) A freed slot loses its content with the wipe, keeps it without; others are untouched."""
    B, N, W, R = 1, 3, 2, 1
    start = zero_state(B, N, W, R, PLAIN)._replace(
        memory=torch.arange(1.0, 7.0).view(B, N, W), usage=torch.ones(B, N),
        read_weights=one_hot(1, N, B, R))
    x = hand_interface(B, 1, W, R, free_gates=torch.ones(B, 1, R))
    *_, kept = dnc_loop(x, start, PLAIN)
    *_, wiped = dnc_loop(x, start, DNCOptions(dealloc_wipe=True))
    assert torch.equal(kept.memory, start.memory)
    assert wiped.memory.tolist() == [[[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]]]


def test_dnc_loop_write_content_sees_memory_before_wipe():
    """(D) The write finds by content the slot that the same step wipes, and rewrites that one."""
    B, N, W, R = 1, 3, 2, 1
    memory = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    start = zero_state(B, N, W, R, PLAIN)._replace(
        memory=memory, usage=torch.ones(B, N), read_weights=one_hot(1, N, B, R))
    x = hand_interface(
        B, 1, W, R, free_gates=torch.ones(B, 1, R), write_gate=torch.ones(B, 1),
        allocation_gate=torch.zeros(B, 1), write_key=memory[:, 1:2],
        write_strength=torch.full((B, 1), 100.0), write_vector=torch.tensor([[[3.0, 4.0]]]))
    _, write_weights, _, after = dnc_loop(x, start, DNCOptions(dealloc_wipe=True))
    np.testing.assert_allclose(write_weights[0, 0], one_hot(1, N), atol=1e-6)
    np.testing.assert_allclose(after.memory[0, 1], [3.0, 4.0], atol=1e-5)  # not 3.0, 5.0


# ══ Content addressing ═══════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("masked", [False, True])
def test_content_weighting_is_softmax_of_cosine(masked):
    """Shape, sum one, and the value at every key against the definition."""
    torch.manual_seed(11)
    B, K, N, W = 2, 3, 5, 4
    keys, memory = torch.randn(B, K, W).double(), torch.randn(B, N, W).double()
    strengths = 1 + torch.rand(B, K).double() * 5
    masks = torch.rand(B, K, W).double() if masked else None
    got = content_weighting(keys, strengths, memory, masks)
    assert got.shape == (B, K, N)
    m = torch.ones(B, K, 1, W).double() if masks is None else masks.unsqueeze(2)
    key, rows = keys.unsqueeze(2) * m, memory.unsqueeze(1) * m  # (B, K, 1, W), (B, K, N, W)
    cosine = (key * rows).sum(-1) / (key.square().sum(-1) + EPS).sqrt() / (
        rows.square().sum(-1) + EPS).sqrt()
    want = torch.softmax(strengths.unsqueeze(-1) * cosine, -1)
    np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-12)
    np.testing.assert_allclose(got.sum(-1).numpy(), 1.0, atol=1e-12)


def test_content_weighting_mask_hides_memory_columns():
    """(M) What the mask hides cannot matter, neither in the key nor in the memory's norm."""
    torch.manual_seed(12)
    B, K, N, W = 1, 2, 4, 5
    keys, memory = torch.randn(B, K, W).double(), torch.randn(B, N, W).double()
    strengths = torch.full((B, K), 4.0).double()
    masks = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).double().expand(B, K, W)
    want = content_weighting(keys[..., :3], strengths, memory[..., :3], None)
    memory[..., 3:] *= 10
    np.testing.assert_allclose(
        content_weighting(keys, strengths, memory, masks).numpy(), want.numpy(), atol=1e-12)
    unmasked = content_weighting(keys, strengths, memory, None)
    assert (unmasked - want).abs().max() > 1e-2


# ══ Links ════════════════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype,slack", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_link_update_keeps_invariants(dtype, slack, seed):
    """L in [0, 1], zero diagonal, row and column sums at most one; precedence a sub-weighting."""
    rng = np.random.default_rng(seed)
    B, N = 2, 5
    link, precedence = torch.zeros(B, N, N, dtype=dtype), torch.zeros(B, N, dtype=dtype)
    largest = 0.0
    for step in range(40):
        w = rng.dirichlet(np.full(N, 0.1), B) * (1.0 if step % 3 else rng.uniform(size=(B, 1)))
        link, precedence = link_update(link, precedence, torch.tensor(w, dtype=dtype))
        assert link.min() >= -slack and link.max() <= 1 + slack
        assert not link.diagonal(dim1=1, dim2=2).any()
        assert link.sum(1).max() <= 1 + slack and link.sum(2).max() <= 1 + slack
        assert precedence.min() >= -slack and precedence.sum(-1).max() <= 1 + slack
        largest = max(largest, link.sum(2).max().item())
    assert largest > 0.8  # sharp writes came close to the bound


def test_link_update_row_is_later_slot():
    """L[i, j] = 1: slot i was written right after slot j. The precedence is the last write's."""
    N = 4
    link, precedence = torch.zeros(1, N, N), torch.zeros(1, N)
    for slot in (1, 3, 0):
        link, precedence = link_update(link, precedence, one_hot(slot, N, 1))
    want = torch.zeros(1, N, N)
    want[0, 3, 1] = want[0, 0, 3] = 1.0
    assert torch.equal(link, want)
    assert torch.equal(precedence, one_hot(0, N, 1))


def test_link_update_clears_given_diagonal():
    """A slot does not follow itself, whatever came in."""
    link, _ = link_update(torch.full((1, 3, 3), 0.2), torch.full((1, 3), 0.3),
                          torch.full((1, 3), 0.3))
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    assert not link[0].diagonal().any() and (link[0][off_diagonal] > 0.1).all()


@pytest.mark.parametrize("sharpen_links", [False, True])
def test_dnc_loop_links_follow_order_of_writing(sharpen_links):
    """Three words written; forward modes then read the one after, backward modes the one before."""
    options = DNCOptions(use_links=True, sharpen_links=sharpen_links)
    B, N, W, R, T = 1, 4, 3, 2, 4
    modes = torch.zeros(B, T, R, 3)
    modes[:, :3, :, 1] = 1.0  # content, until both heads stand on the middle word
    modes[:, 3, 0, 2] = 1.0  # head 0 forward
    modes[:, 3, 1, 0] = 1.0  # head 1 backward
    words = torch.eye(W).unsqueeze(0)  # (B, 3, W)
    keys = words[:, 1].view(B, 1, 1, W).expand(B, T, R, W)
    x = hand_interface(
        B, T, W, R, write_gate=torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
        write_vector=torch.cat([words, torch.zeros(B, 1, W)], 1), read_keys=keys,
        read_strengths=torch.full((B, T, R), 100.0), read_modes=modes,
        sharpening=torch.full((B, T, R, 2), 2.0) if sharpen_links else None)
    reads, *_ = dnc_loop(x, zero_state(B, N, W, R, options), options)
    np.testing.assert_allclose(reads[0, 2], words[0, [1, 1]], atol=1e-3)
    np.testing.assert_allclose(reads[0, 3], words[0, [2, 0]], atol=1e-3)


@every_combination
def test_dnc_loop_weightings_stay_valid(options):
    """At every step: weightings in [0, 1] with sum at most one, usage in [0, 1], valid links."""
    B, T, N, W, R = 3, 25, 5, 3, 2
    rng = np.random.default_rng(13)
    z = torch.tensor(random_z(rng, B, T, W, R, options, scale=4.0))
    state = to_torch(random_state(rng, B, N, W, R, options))
    sharpest = 0.0
    for t in range(T):
        _, w, wr, state = run_path(z[:, t : t + 1], state, W, R, options)
        for x in (w, wr):
            assert (x >= 0).all() and (x.sum(-1) <= 1 + 1e-12).all()
        assert (state.usage >= 0).all() and (state.usage <= 1).all()
        if options.use_links:
            link = state.link
            assert (link >= 0).all() and not link.diagonal(dim1=1, dim2=2).any()
            assert (link.sum(1) <= 1 + 1e-12).all() and (link.sum(2) <= 1 + 1e-12).all()
        sharpest = max(sharpest, w.sum(-1).max().item())
    assert sharpest > 0.9  # some write came close to the bound


# ══ Carried state and isolation ══════════════════════════════════════════════════════════════════


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dnc_loop_segments_equal_one_sequence(dtype, options):
    """Four segments of 32 with the state carried are one sequence of 128."""
    B, N, W, R = 2, 6, 3, 2
    z = torch.tensor(random_z(np.random.default_rng(14), B, 128, W, R, options), dtype=dtype)
    x = split_interface(z, W, R, options)
    *whole, end = dnc_loop(x, zero_state(B, N, W, R, options, dtype=dtype), options)
    state, segments = zero_state(B, N, W, R, options, dtype=dtype), []
    for begin in range(0, 128, 32):
        *outputs, state = dnc_loop(cut(x, begin, begin + 32), state, options)
        segments.append(outputs)
    for got, want in zip(zip(*segments, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(got, dim=1), want, atol=1e-6, rtol=0)
    for got, want in zip(state, end, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    # and the state matters: the last segment alone, from nothing, reads something else
    alone, *_ = dnc_loop(cut(x, 96, 128), zero_state(B, N, W, R, options, dtype=dtype), options)
    assert (alone - whole[0][:, 96:]).abs().max() > 1e-2


@plain_and_full
def test_dnc_memory_segments_equal_one_sequence(options):
    """The module carries its state between calls; two passes of the same are the same."""
    torch.manual_seed(15)
    module = DNCMemory(8, 5, 3, 2, options)
    torch.nn.init.normal_(module.read_proj.weight)
    h = torch.randn(2, 12, 8)
    with torch.no_grad():
        whole, end, _ = module(h, module.init_state(2))
        again, _, _ = module(h, module.init_state(2))
        state, parts = module.init_state(2), []
        for part in h.split([1, 6, 5], dim=1):
            out, state, _ = module(part, state)
            parts.append(out)
    assert torch.equal(whole, again)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.memory, end.memory, atol=1e-5, rtol=0)


@plain_and_full
def test_dnc_loop_gradient_reaches_first_segment(options):
    """The loss of the fourth segment teaches what the first one wrote, unless it is cut off."""
    B, T, N, W, R = 1, 32, 8, 3, 2
    rng = np.random.default_rng(16)
    segments = [torch.tensor(random_z(rng, B, T, W, R, options)) for _ in range(4)]
    sizes = interface_sizes(W, R, options)
    names = list(sizes)
    vector, gate, free = (sum(sizes[n] for n in names[: names.index(part)])
                          for part in ("write_vector", "write_gate", "free_gates"))
    for segment in segments[1:]:  # the later segments mostly read, and free nothing
        segment[..., gate] -= 4.0
        segment[..., free : free + R] -= 4.0
    slopes = {}
    for detach in (False, True):
        first = segments[0].clone().requires_grad_()
        state = zero_state(B, N, W, R, options, dtype=torch.float64)
        for z in (first, *segments[1:]):
            reads, _, _, state = run_path(z, state, W, R, options)
            if detach:
                state = DNCState(*(x.detach() for x in state))
        reads.square().sum().requires_grad_(True).backward()
        grad = torch.zeros_like(first) if first.grad is None else first.grad
        assert torch.isfinite(grad).all()
        slopes[detach] = grad[..., vector : vector + W].abs().max().item()
    assert slopes[False] > 1e-3 and slopes[True] == 0.0


@every_combination
def test_dnc_loop_rows_are_isolated(options):
    """Another text in row 0 changes nothing in row 1, bit for bit, in values and gradients."""
    B, T, N, W, R = 2, 6, 5, 3, 2
    rng = np.random.default_rng(17)
    z = torch.tensor(random_z(rng, B, T, W, R, options), dtype=torch.float32)
    other = z.clone()
    other[0] = torch.tensor(rng.normal(size=other[0].shape))
    start = random_state(rng, B, N, W, R, options)
    results = []
    for source in (z, other):
        leaf, state = source.clone().requires_grad_(), to_torch(start, torch.float32)
        memory = state.memory.requires_grad_()
        *outputs, after = run_path(leaf, state, W, R, options)
        outputs = [*outputs, *after]
        loss = outputs[0][1].square().sum() + outputs[1][1].square().sum()
        leaf_grad, memory_grad = torch.autograd.grad(loss, (leaf, memory))
        assert not leaf_grad[0].any() and not memory_grad[0].any()  # none into the other row
        assert leaf_grad[1].any() and memory_grad[1].any()
        results.append((*outputs, leaf_grad, memory_grad))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine[1], theirs[1])
    assert (results[0][0][0] - results[1][0][0]).abs().max() > 1e-2


def test_dnc_memory_rows_are_isolated():
    """The same through the module, its LayerNorm and its projections."""
    torch.manual_seed(18)
    module = DNCMemory(8, 5, 3, 2, FULL)
    torch.nn.init.normal_(module.read_proj.weight)
    h = torch.randn(2, 7, 8)
    other = torch.cat([torch.randn(1, 7, 8), h[1:]])
    results = []
    for source in (h, other):
        leaf = source.clone().requires_grad_()
        h_out, _, _ = module(leaf, module.init_state(2))
        (grad,) = torch.autograd.grad(h_out[1].square().sum(), leaf)
        results.append((h_out, grad))
    assert torch.equal(results[0][0][1], results[1][0][1])
    assert torch.equal(results[0][1][1], results[1][1][1])
    assert not results[0][1][0].any() and not results[1][1][0].any()
    assert not torch.equal(results[0][0][0], results[1][0][0])


@every_combination
def test_dnc_loop_leaves_state_untouched(options):
    """No in-place write: the state passed in, and views of it, stay as they were."""
    B, T, N, W, R = 2, 4, 5, 3, 2
    rng = np.random.default_rng(19)
    z = torch.tensor(random_z(rng, B, T, W, R, options))
    state = to_torch(random_state(rng, B, N, W, R, options))
    x = split_interface(z, W, R, options)
    state_before = [field.clone() for field in state]
    x_before = [None if part is None else part.clone() for part in x]
    *_, after = dnc_loop(x, state, options)
    assert all(map(torch.equal, state, state_before))
    for part, before in zip(x, x_before, strict=True):
        assert part is None if before is None else torch.equal(part, before)
    assert not torch.equal(after.memory, state.memory)


@plain_and_full
def test_dnc_loop_permuted_rows_permute_outputs(options):
    """Reordering beams is indexing the state: permuted rows in, permuted rows out."""
    B, T, N, W, R = 4, 5, 6, 3, 2
    rng = np.random.default_rng(20)
    z = torch.tensor(random_z(rng, B, T, W, R, options))
    state = to_torch(random_state(rng, B, N, W, R, options))
    order = torch.tensor([2, 0, 3, 1])
    *straight, end = run_path(z, state, W, R, options)
    moved = DNCState(*(field[order] for field in state))
    *permuted, moved_end = run_path(z[order], moved, W, R, options)
    for got, want in zip((*permuted, *moved_end), (*straight, *end), strict=True):
        torch.testing.assert_close(got, want[order], atol=1e-12, rtol=0)
    # beams that share a history and continue with the same token are the same beam
    twin = torch.tensor([1, 1, 1, 1])
    reads, *_ = run_path(z[twin], DNCState(*(field[twin] for field in state)), W, R, options)
    torch.testing.assert_close(reads, straight[0][twin], atol=1e-12, rtol=0)


# ══ Module ═══════════════════════════════════════════════════════════════════════════════════════


@every_combination
def test_dnc_memory_step_zero_returns_input(options):
    """read_proj starts at zero, so that the untrained model is the baseline, bit for bit."""
    torch.manual_seed(21)
    module = DNCMemory(8, 5, 3, 2, options)
    h = torch.randn(2, 6, 8)
    h_out, state, _ = module(h, module.init_state(2))
    assert torch.equal(h_out, h)
    h_out, _, _ = module(h, state)
    assert torch.equal(h_out, h)
    torch.nn.init.normal_(module.read_proj.weight)
    h_out, _, _ = module(h, state)
    assert (h_out - h).abs().max() > 1e-2


@every_combination
def test_dnc_memory_shapes(options):
    """Every documented shape, with all letters different."""
    B, T, C, N, W, R = 2, 3, 8, 7, 5, 4
    module = DNCMemory(C, N, W, R, options)
    I = sum(interface_sizes(W, R, options).values())  # noqa: E741, the interface width
    assert module.interface.weight.shape == (I, C)
    assert module.read_proj.weight.shape == (C, R * W) and module.read_proj.bias is None
    h_out, state, trace = module(torch.randn(B, T, C), module.init_state(B))
    linked = N if options.use_links else 0
    assert h_out.shape == (B, T, C)
    assert [tuple(x.shape) for x in state] == [
        (B, N, W), (B, N), (B, N), (B, R, N), (B, linked, linked), (B, linked)]
    assert trace.write_gate.shape == (B, T)
    assert trace.write_weights.shape == (B, T, N)
    assert trace.read_weights.shape == (B, T, R, N)
    assert torch.equal(trace.write_weights[:, -1], state.write_weights)
    assert torch.equal(trace.read_weights[:, -1], state.read_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dnc_memory_init_state_is_empty(dtype):
    """Zero, of the module's dtype; nothing random that would make two evaluations differ."""
    module = DNCMemory(8, 5, 3, 2, FULL).to(dtype)
    state = module.init_state(3)
    assert all(x.dtype == dtype and not x.any() for x in state)
    assert state.memory.shape == (3, 5, 3) and state.link.shape == (3, 5, 5)


@every_combination
def test_dnc_memory_autocast_addresses_in_float32(options):
    """Under bfloat16 autocast the linear layers may be bfloat16, the recurrence may not: from the
    same interface vectors it gives what it gives without autocast."""
    torch.manual_seed(22)
    B, T, C, N, W, R = 2, 8, 16, 6, 4, 2
    module = DNCMemory(C, N, W, R, options)
    torch.nn.init.normal_(module.read_proj.weight)
    seen = []
    handle = module.interface.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        h_out, state, trace = module(torch.randn(B, T, C), module.init_state(B))
    handle.remove()
    assert seen[0].dtype == torch.bfloat16  # autocast was really on
    assert all(x.dtype == torch.float32 for x in (*state, *trace))
    want = run_path(seen[0].float(), module.init_state(B), W, R, options)
    torch.testing.assert_close(trace.write_weights, want[1].detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(trace.read_weights, want[2].detach(), atol=1e-6, rtol=0)
    for got, field in zip(state, want[3], strict=True):
        torch.testing.assert_close(got, field.detach(), atol=1e-6, rtol=0)
    assert torch.isfinite(h_out).all()
    # gates between the bfloat16 grid points: the activations too were taken in float32
    assert (trace.write_gate != trace.write_gate.bfloat16().float()).any()


@every_combination
def test_dnc_memory_autocast_keeps_epsilon(options):
    """In bfloat16 1 - 1e-6 is 1. With both gates open the first write must leave that millionth."""
    module = DNCMemory(8, 4, 3, 1, options)
    sizes = interface_sizes(3, 1, options)
    names = list(sizes)
    with torch.no_grad():
        module.interface.weight.zero_()
        module.interface.bias.zero_()
        for gate in ("write_gate", "allocation_gate"):
            module.interface.bias[sum(sizes[n] for n in names[: names.index(gate)])] = 60.0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, _, trace = module(torch.randn(1, 1, 8), module.init_state(1))
    first = trace.write_weights[0, 0]
    assert first[0] < 1.0
    assert abs(first[0].item() - (1 - 1e-6)) < 1.5e-7 and abs(first[1].item() - 1e-6) < 1e-8


# ══ Extremes ═════════════════════════════════════════════════════════════════════════════════════


@plain_and_full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dnc_loop_saturated_gates_stay_finite(dtype, options):
    """1,000 steps with every gate, mask, mode and strength at z = +-50: finite values in range,
    and a finite gradient over the last 100."""
    B, T, N, W, R = 2, 1000, 5, 3, 2
    rng = np.random.default_rng(23)
    z = torch.tensor(random_z(rng, B, T, W, R, options).clip(-1, 1), dtype=dtype).sign() * 50
    sizes = interface_sizes(W, R, options)
    vectors = [n for n in sizes if n in ("write_key", "write_vector", "read_keys")]
    begins = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    for name in vectors:  # contents, not gates: they need no saturation, but some exact zeros
        part = slice(begins[name], begins[name] + sizes[name])
        z[..., part] = torch.tensor(rng.integers(-1, 2, z[..., part].shape), dtype=dtype)
    with torch.no_grad():
        state = zero_state(B, N, W, R, options, dtype=dtype)
        *early, state = run_path(z[:, :900], state, W, R, options)
    tail = z[:, 900:].clone().requires_grad_()
    *late, state = run_path(tail, state, W, R, options)
    late[0].square().sum().backward()
    for x in (*early, *late, *state, tail.grad):
        assert torch.isfinite(x).all()
    for reads, w, wr in (early, late):
        for weights in (w, wr):
            assert weights.min() >= 0 and weights.sum(-1).max() <= 1 + 1e-5
        assert reads.abs().max() < 1e3
    assert late[1].max() > 0.9 and late[1].sum(-1).min() < 1e-6  # gates really open and shut
    assert 0 <= state.usage.min() and state.usage.max() <= 1 + 1e-6


@pytest.mark.parametrize("sign", [-50.0, 50.0])
@plain_and_full
def test_dnc_loop_all_one_side_stays_finite(options, sign):
    """Every raw interface value at +50 or at -50, from the zero state, values and gradient."""
    B, T, N, W, R = 1, 20, 4, 3, 2
    I = sum(interface_sizes(W, R, options).values())  # noqa: E741, the interface width
    z = torch.full((B, T, I), sign, requires_grad=True)
    reads, w, wr, state = run_path(z, zero_state(B, N, W, R, options), W, R, options)
    (reads.square().sum() + w.square().sum()).backward()
    for x in (reads, w, wr, *state, z.grad):
        assert torch.isfinite(x).all()
    if sign > 0:
        assert w.max() > 0.9
    else:
        assert w.max() < 1e-6


@plain_and_full
def test_dnc_loop_strength_fifty_matches_oracle(options):
    """Sharp addressing (strengths near 50) is still the oracle's, values to 1e-9."""
    B, T, N, W, R = 2, 6, 5, 3, 2
    rng = np.random.default_rng(24)
    z = random_z(rng, B, T, W, R, options)
    sizes = interface_sizes(W, R, options)
    begins = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    for name in {"write_strength", "read_strengths", "sharpening"} & set(sizes):
        z[..., begins[name] : begins[name] + sizes[name]] = 49.0
    x = split_interface(torch.tensor(z), W, R, options)
    assert x.write_strength.min() > 49.9 and x.read_strengths.min() > 49.9
    assert_matches_oracle(z, random_state(rng, B, N, W, R, options), W, R, options)
