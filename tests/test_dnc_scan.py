"""Tests of the fused DNC recurrence, dnc_scan, against the oracle and the readable dnc_loop.

Values and gradients are compared with the loop in float64, whatever the fused recurrence computes
in. Among near-ties of the usage rounding decides the free list, and single weightings may then
differ by half: so both references take the free list that the fused recurrence used, after a check
that it ascends. Where only the reads are compared, the loop chooses its own.

Triton runs in its interpreter on the CPU, milliseconds to tens of them a step: its shapes are tiny,
and a checkpoint every 2 steps instead of 16 gives them chunk borders all the same.

B batch, T time, C hidden width, N memory slots, W word width, R read heads, I interface width.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import subprocess
import sys
import threading
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config
from oracle import dnc_oracle
from test_dnc_memory import (
    COMBINATIONS,
    EPS,
    PLAIN,
    cut,
    hand_interface,
    option_id,
    path_orders,
    random_state,
    random_z,
    separated_case,
    start_state,
    to_torch,
)
from torch.utils._python_dispatch import TorchDispatchMode

import dnc_gpt2
import dnc_scan
from dnc_gpt2 import (
    DNCMemory,
    DNCOptions,
    DNCState,
    Interface,
    dnc_loop,
    interface_sizes,
    split_interface,
    usage_update,
    zero_state,
)
from dnc_scan import operator

FUSED = [o for o in COMBINATIONS if o.mask_min == 1 and not o.sharpen_links]
LINKS_WIPE = DNCOptions(use_links=True, dealloc_wipe=True)
MASKED = DNCOptions(mask_min=0.1)
SHARPENED = DNCOptions(use_links=True, sharpen_links=True)
NO_TRITON = (importlib.util.find_spec("triton") is None
             or os.environ.get("TRITON_INTERPRET") != "1")  # compiled, it takes no CPU tensors
NUMBA = pytest.param("numba", marks=pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(
    NO_TRITON, reason="triton is not installed, or is not in its interpreter"))

both_backends = pytest.mark.parametrize("backend", [NUMBA, TRITON])
numba_only = pytest.mark.parametrize("backend", [NUMBA])
triton_only = pytest.mark.parametrize("backend", [TRITON])
every_fused = pytest.mark.parametrize("options", FUSED, ids=option_id)
plain_and_all = pytest.mark.parametrize("options", [PLAIN, LINKS_WIPE], ids=option_id)
# Where every combination in the interpreter takes too long: there only all options together.
every_fused_on_numba = pytest.mark.parametrize("backend,options", [
    *(pytest.param(*NUMBA.values, o, marks=NUMBA.marks, id=f"numba-{option_id(o)}") for o in FUSED),
    pytest.param(*TRITON.values, LINKS_WIPE, marks=TRITON.marks, id="triton-links+wipe")])



@pytest.fixture(autouse=True)
def short_chunks(request, monkeypatch):
    """Triton's T of 3 to 5 steps spans several chunks."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "triton":
        monkeypatch.setattr(operator, "CHECKPOINT_EVERY", 2)


# ══ Helpers ══════════════════════════════════════════════════════════════════════════════════════


class Precision(NamedTuple):
    """What a backend computes in here, and how near to the float64 reference that must come."""

    dtype: torch.dtype
    values: float
    gradients: float


@functools.cache
def precision(backend) -> Precision:
    """float64 where the backend takes it on this machine, else float32."""
    if dnc_scan.refusal(zero_state(1, 2, 2, 1, PLAIN, torch.float64), PLAIN, backend):
        return Precision(torch.float32, 1e-4, 1e-3)
    return Precision(torch.float64, 1e-9, 1e-8)


def fused(backend):
    """dnc_scan with the backend chosen, called like dnc_loop."""
    return functools.partial(dnc_scan.dnc_scan, backend=backend)


def first_state(kind, rng, B, N, W, R, options):
    """start_state, also for N 1, which is one slot out of two."""
    if N > 1:
        return start_state(kind, rng, B, N, W, R, options)
    state = start_state(kind, rng, B, 2, W, R, options)
    last = ("read_weights", "link")
    state = {name: value[..., :1] if name in last else value for name, value in state.items()}
    return {name: value if name == "read_weights" else value[:, :1]
            for name, value in state.items()}


def make_case(backend, options, seed=0, start="carried", sizes=None, dtype=None):
    """(interface, state) in the backend's precision; T spans several chunks."""
    B, T, N, W, R = sizes or {"numba": (2, 20, 5, 4, 2), "triton": (1, 3, 4, 3, 2)}[backend]
    rng, dtype = np.random.default_rng(seed), dtype or precision(backend).dtype
    z = torch.tensor(random_z(rng, B, T, W, R, options))
    x = split_interface(z, W, R, options)
    state = to_torch(first_state(start, rng, B, N, W, R, options), dtype)
    return Interface(*(None if part is None else part.to(dtype) for part in x)), state


def parts_of(x, state) -> dict[str, torch.Tensor]:
    """Every tensor of an interface and a state that has elements, by name."""
    both = {**x._asdict(), **{f"state.{k}": v for k, v in state._asdict().items()}}
    return {name: part for name, part in both.items() if part is not None and part.numel()}


def with_parts(x, state, parts):
    """The interface and the state with those parts replaced."""
    inner = {k: v for k, v in parts.items() if not k.startswith("state.")}
    fields = {k.removeprefix("state."): v for k, v in parts.items() if k.startswith("state.")}
    return x._replace(**inner), state._replace(**fields)


def named(results) -> dict[str, torch.Tensor]:
    """The four results as one dict: reads, both traces, and every field of the final state."""
    reads, write_weights, read_weights, state = results
    sequences = {"reads": reads, "write_weights": write_weights, "read_weights": read_weights}
    return {**sequences, **{f"state.{k}": v for k, v in state._asdict().items() if v.numel()}}


def make_probes(outputs, chosen=None, seed=1) -> dict[str, torch.Tensor]:
    """A random weight for every element of the chosen outputs (all): the loss is their sum."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype)
             for k, v in outputs.items()}
    return {k: v for k, v in drawn.items() if chosen is None or k in chosen}


def loss_of(outputs, probes) -> torch.Tensor:
    """sum of probe * output."""
    return sum((probe.to(outputs[name].dtype) * outputs[name]).sum()
               for name, probe in probes.items())


def gradients(loss, leaves) -> dict[str, torch.Tensor]:
    """d loss / d leaf by name; zeros where the loss does not depend on the leaf."""
    slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True,
                                 materialize_grads=True)
    return dict(zip(leaves, slopes, strict=True))


def run(function, x, state, options, probes=None, wanted=None, dtype=None):
    """Values and gradients of a recurrence, both by name. `probes` names the outputs in the loss,
    `wanted` the inputs that require a gradient (all); dtype converts every input first."""
    leaves = {name: part.detach().to(dtype or part.dtype).clone()
              for name, part in parts_of(x, state).items()}
    wanted = set(leaves) if wanted is None else wanted
    for name in wanted:
        leaves[name].requires_grad_()
    if not options.use_links:  # the empty fields in the same type
        state = state._replace(link=state.link.to(dtype), precedence=state.precedence.to(dtype))
    outputs = named(function(*with_parts(x, state, leaves), options))
    probes = make_probes(outputs) if probes is None else probes
    slopes = gradients(loss_of(outputs, probes), {name: leaves[name] for name in leaves
                                                  if name in wanted})
    return {name: value.detach() for name, value in outputs.items()}, slopes


def free_lists(x, state, values) -> list[torch.Tensor]:
    """The free list (B, N) of every step, from the weightings that a recurrence returned."""
    usage, w, wr = state.usage, state.write_weights, state.read_weights
    orders = []
    for t in range(x.write_gate.shape[1]):
        usage, _ = usage_update(usage, w, wr, x.free_gates[:, t].to(usage.dtype))
        orders.append((EPS + (1 - EPS) * usage).argsort(dim=-1, stable=True))
        w, wr = values["write_weights"][:, t], values["read_weights"][:, t]
    return orders


@contextlib.contextmanager
def given_free_lists(orders):
    """Make dnc_loop take its free lists from `orders`, one a step, if they ascend there too."""
    steps = iter(orders)

    def allocation(usage):
        order = next(steps)
        ranked = (EPS + (1 - EPS) * usage).gather(1, order)  # (B, N)
        assert (ranked.diff(dim=1) >= -1e-6).all()
        logs = ranked.log()
        ranked_weights = (1 - ranked) * (logs.cumsum(1) - logs).exp()
        return torch.zeros_like(usage).scatter(1, order, ranked_weights)

    with mock.patch.object(dnc_gpt2, "allocation_weighting", allocation):
        yield


def assert_near(got, want, tolerance, what):
    """Every tensor of a dict within tolerance of the other's, relative to its largest element."""
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].shape == value.shape, f"{what} {name}"
        assert torch.isfinite(value).all() and torch.isfinite(got[name]).all(), f"{what} {name}"
        error = (got[name].double() - value.double()).abs().max().item()
        bound = tolerance * max(1.0, value.abs().max().item())
        assert error <= bound, f"{what} {name}: off by {error:.2e}, allowed {bound:.2e}"


def assert_equal(got, want, what):
    """Every tensor of a dict bit for bit the other's."""
    assert set(got) == set(want)
    for name in want:
        assert torch.equal(got[name], want[name]), f"{what} {name}"


def assert_matches_loop(backend, x, state, options, outputs=None, wanted=None):
    """Values and gradients of the fused recurrence are the loop's in float64, for the loss over
    the named outputs (all) and the gradients of the wanted inputs (all). Returns the gradients."""
    near = precision(backend)
    with torch.no_grad():
        shapes = named(fused(backend)(x, state, options))
    probes = make_probes(shapes, outputs)
    values, slopes = run(fused(backend), x, state, options, probes, wanted)
    assert all(v.dtype == state.memory.dtype for v in values.values())
    with given_free_lists(free_lists(x, state, values)):
        true_values, true_slopes = run(dnc_loop, x, state, options, probes, wanted, torch.float64)
    assert_near(values, true_values, near.values, "value of")
    assert_near(slopes, true_slopes, near.gradients, "gradient of")
    return slopes


def fused_memory(options=PLAIN, scan="fused"):
    """A DNCMemory (C, N, W, R) whose memory matters, the same for every scan."""
    torch.manual_seed(30)
    module = DNCMemory(8, 6, 4, 2, options, scan=scan)
    torch.nn.init.normal_(module.read_proj.weight)
    return module


def train_memory(module, h, state, autocast=False):
    """One forward and backward: outputs by name, gradients of h, the memory and parameters."""
    leaves = {"h": h.clone().requires_grad_(), "memory": state.memory.clone().requires_grad_(),
              **dict(module.named_parameters())}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h_out, after, trace = module(leaves["h"], state._replace(memory=leaves["memory"]))
    values = {"h_out": h_out, **after._asdict(), **{f"trace.{k}": v
                                                    for k, v in trace._asdict().items()}}
    values = {k: v for k, v in values.items() if v.numel()}
    return values, gradients(loss_of(values, make_probes(values)), leaves)


def leaves_of(x, state) -> dict[str, torch.Tensor]:
    """parts_of, each a copy that requires a gradient."""
    return {name: part.clone().requires_grad_() for name, part in parts_of(x, state).items()}


def detached(tensors) -> dict[str, torch.Tensor]:
    """Copies by name, which nothing changes later."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def refuse_loop(*_):
    raise AssertionError("the eager loop was called")


# ══ Values ═══════════════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("start", ["zero", "carried"])
@both_backends
@every_fused
def test_values_match_the_oracle(start, options, backend):
    """Reads, both traces and every field of the state, from an empty and from a carried state,
    sizes that are no powers of two, across chunk borders."""
    near = precision(backend)
    B, T, N, W, R = {"numba": (2, 33, 17, 20, 3), "triton": (1, 3, 5, 3, 3)}[backend]
    rng = np.random.default_rng(T + N)
    start = first_state(start, rng, B, N, W, R, options)
    z = torch.tensor(random_z(rng, B, T, W, R, options)).to(near.dtype)
    state, x = to_torch(start, near.dtype), split_interface(z, W, R, options)

    reads, write_weights, read_weights, after = fused(backend)(x, state, options)
    orders = path_orders(z, state, write_weights, read_weights, W, R, options)
    start = {name: getattr(state, name).double().numpy() for name in start}
    *sequences, last, _ = dnc_oracle(z.double().numpy(), start, W, R, **options._asdict(),
                                     orders=orders)
    names = ("reads", "write_weights", "read_weights")
    want = {name: torch.tensor(value) for name, value in zip(names, sequences, strict=True)}
    want |= {f"state.{name}": torch.tensor(value) for name, value in last.items()}
    got = named((reads, write_weights, read_weights, after))
    assert_near(got, want, near.values, "value of")


@numba_only
@plain_and_all
def test_dnc_scan_float32_reads_match_loop(options, backend):
    """At the sizes of the job and from an empty memory, each with the free list it chose."""
    x, state = make_case(backend, options, 52, "zero", (3, 37, 64, 128, 4), dtype=torch.float32)
    with torch.no_grad():
        got, want = fused(backend)(x, state, options), dnc_loop(x, state, options)
    assert all(value.dtype == torch.float32 for value in named(got).values())
    assert want[0].abs().max() > 0.1
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=0)


@both_backends
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_dnc_scan_ties_break_to_lowest_slot(value, backend):
    """All usages equal, one write with both gates open: slot j gets (1 - u~) u~^j."""
    dtype = precision(backend).dtype
    N, one = 17, torch.ones(1, 1, dtype=dtype)
    x = hand_interface(1, 1, 3, 2, write_gate=one)
    x = Interface(*(None if part is None else part.to(dtype) for part in x))
    state = zero_state(1, N, 3, 2, PLAIN, dtype)._replace(
        usage=torch.full((1, N), value, dtype=dtype))
    used = EPS + (1 - EPS) * value
    _, write_weights, _, _ = fused(backend)(x, state, PLAIN)
    np.testing.assert_allclose(write_weights[0, 0].numpy(), (1 - used) * used ** np.arange(N),
                               atol=1e-12 if dtype == torch.float64 else 2e-7, rtol=0)


@numba_only
def test_dnc_scan_returns_state_of_given_type(backend):
    """The state comes back as the NamedTuple that went in, whoever defined it."""
    OtherState = NamedTuple("OtherState", [(name, torch.Tensor) for name in DNCState._fields])
    x, state = make_case(backend, LINKS_WIPE, 53, sizes=(2, 3, 5, 3, 2))
    _, write_weights, read_weights, after = fused(backend)(x, OtherState(*state), LINKS_WIPE)
    assert type(after) is OtherState
    assert torch.equal(after.write_weights, write_weights[:, -1])
    assert torch.equal(after.read_weights, read_weights[:, -1])


# ══ Gradients ════════════════════════════════════════════════════════════════════════════════════


@both_backends
@every_fused
def test_dnc_scan_gradients_match_autograd(options, backend):
    """Of every part of the interface and every field of the initial state, for a loss with a
    random probe on every output and on every field of the final state, over several chunks."""
    sizes = {"numba": (2, 37, 7, 5, 3), "triton": (1, 3, 5, 3, 2)}[backend]
    x, state = make_case(backend, options, 60, "carried", sizes)
    slopes = assert_matches_loop(backend, x, state, options)
    assert len(slopes) == (16 if options.use_links else 13)
    for name, slope in slopes.items():
        assert slope.abs().max() > 1e-3, name


# B, T, N, W, R: at chunk borders (16), one step, one slot, one column, one head, nine, many slots
SIZES = [(1, 1, 6, 4, 2), (1, 15, 5, 3, 1), (1, 16, 5, 3, 2), (2, 17, 5, 4, 2), (1, 63, 17, 60, 3),
         (1, 33, 17, 20, 8), (1, 9, 1, 4, 2), (2, 9, 6, 1, 2), (1, 5, 1, 1, 1), (1, 2, 130, 5, 9)]


@numba_only
@plain_and_all
@pytest.mark.parametrize("start", ["zero", "carried"])
@pytest.mark.parametrize("B,T,N,W,R", SIZES)
def test_dnc_scan_sizes_match_loop(B, T, N, W, R, start, options, backend):
    """Values and gradients at odd sizes."""
    x, state = make_case(backend, options, 61, start, (B, T, N, W, R))
    assert_matches_loop(backend, x, state, options)


@triton_only
@pytest.mark.parametrize("start,sizes", [("zero", (1, 1, 1, 1, 1)), ("carried", (1, 2, 16, 16, 8)),
                                         ("zero", (1, 4, 17, 20, 1))])
def test_dnc_scan_triton_sizes_match_loop(start, sizes, backend):
    """One of everything, powers of two, sizes just above; T at a chunk border."""
    x, state = make_case(backend, LINKS_WIPE, 62, start, sizes)
    assert_matches_loop(backend, x, state, LINKS_WIPE)


@numba_only
@pytest.mark.parametrize("output", ["reads", "write_weights", "read_weights", "state.memory",
                                    "state.usage", "state.link", "state.precedence"])
def test_dnc_scan_gradients_of_one_output(output, backend):
    """The other outputs stay unused and bring nothing in."""
    x, state = make_case(backend, LINKS_WIPE, 63)
    assert_matches_loop(backend, x, state, LINKS_WIPE, outputs={output})


@numba_only
@pytest.mark.parametrize("wanted", [{"write_vector"}, {"read_keys", "read_strengths"},
                                    {"state.memory"}, {"free_gates", "state.read_weights"}],
                         ids=lambda names: "+".join(sorted(names)))
def test_dnc_scan_only_some_inputs_require_grad(wanted, backend):
    """The gradients asked for are right, whichever of the others are not."""
    x, state = make_case(backend, LINKS_WIPE, 64)
    slopes = assert_matches_loop(backend, x, state, LINKS_WIPE, wanted=wanted)
    assert set(slopes) == wanted and all(slope.any() for slope in slopes.values())


@numba_only
@every_fused
def test_dnc_scan_gradcheck(options, backend):
    """The Jacobian of every output, everything in, away from ties in the usage."""
    W, R = 2, 2
    z, start = separated_case(options, B=1, T=2, N=3, W=W, R=R)
    x, state = split_interface(torch.tensor(z), W, R, options), to_torch(start)
    leaves = leaves_of(x, state)

    def outputs(*values):
        inputs = with_parts(x, state, dict(zip(leaves, values, strict=True)))
        return tuple(named(fused(backend)(*inputs, options)).values())

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), eps=1e-6, atol=1e-6,
                                    rtol=1e-5)


@numba_only
@plain_and_all
@pytest.mark.parametrize("every", [1, 3, 37, 64])
def test_dnc_scan_checkpoints_change_nothing(every, options, backend, monkeypatch):
    """However far apart the checkpoints, T short of, at and beyond a border: the same results."""
    x, state = make_case(backend, options, 65, sizes=(2, 37, 7, 5, 3))
    want = run(fused(backend), x, state, options)
    monkeypatch.setattr(operator, "CHECKPOINT_EVERY", every)
    got = run(fused(backend), x, state, options)
    assert_equal(got[0], want[0], "value of")
    assert_near(got[1], want[1], 1e-10, "gradient of")


@both_backends
def test_dnc_scan_bfloat16_interface(backend):
    """Computed in the state's float32; each gradient comes back in the type of its input."""
    x, state = make_case(backend, LINKS_WIPE, 66, dtype=torch.float32)
    short = Interface(*(None if part is None else part.bfloat16() for part in x))
    long = Interface(*(None if part is None else part.float() for part in short))
    got, got_slopes = run(fused(backend), short, state, LINKS_WIPE)
    want, want_slopes = run(fused(backend), long, state, LINKS_WIPE)
    assert_equal(got, want, "value of")
    assert all(value.dtype == torch.float32 for value in got.values())
    kinds = {name: part.dtype for name, part in parts_of(short, state).items()}
    assert {name: slope.dtype for name, slope in got_slopes.items()} == kinds
    for name, slope in got_slopes.items():  # to a unit: Triton's interpreter cuts where GPUs round
        torch.testing.assert_close(slope, want_slopes[name].to(kinds[name]), atol=1e-6, rtol=2**-7)


# ══ Extremes ═════════════════════════════════════════════════════════════════════════════════════


def extreme_case(kind, x, state):
    """One corner of the input space; what is not named stays random."""
    if kind == "saturated":  # exact zeros and ones, of each some
        gates = ("erase", "write_gate", "allocation_gate", "free_gates")
        x = x._replace(**{name: getattr(x, name).round() for name in gates})
        if x.read_modes is not None:
            one_hot = torch.nn.functional.one_hot(x.read_modes.argmax(-1), 3)
            x = x._replace(read_modes=one_hot.to(x.read_modes.dtype))
        assert all({0.0, 1.0} == set(getattr(x, name).flatten().tolist()) for name in gates[:1])
    if kind == "shut":
        x = x._replace(write_gate=torch.zeros_like(x.write_gate))
    if kind == "open":  # every write goes to one slot in full, and frees what was read
        x = x._replace(write_gate=torch.ones_like(x.write_gate), erase=torch.ones_like(x.erase),
                       allocation_gate=torch.ones_like(x.allocation_gate),
                       free_gates=torch.ones_like(x.free_gates))
    if kind == "empty memory":
        state = state._replace(memory=torch.zeros_like(state.memory))
    if kind == "full memory":
        state = state._replace(usage=torch.ones_like(state.usage))
    if kind == "equal usages":
        state = state._replace(usage=torch.full_like(state.usage, 0.5),
                               write_weights=torch.zeros_like(state.write_weights),
                               read_weights=torch.zeros_like(state.read_weights))
    if kind == "strengths of 50":
        x = x._replace(write_strength=torch.full_like(x.write_strength, 50.0),
                       read_strengths=torch.full_like(x.read_strengths, 50.0))
    if kind == "zero keys":
        x = x._replace(write_key=torch.zeros_like(x.write_key),
                       read_keys=torch.zeros_like(x.read_keys))
    if kind == "large contents":
        x = x._replace(write_vector=x.write_vector * 1e3, write_key=x.write_key * 1e3)
    return x, state


EXTREMES = ["saturated", "shut", "open", "empty memory", "full memory", "equal usages",
            "strengths of 50", "zero keys", "large contents"]


@every_fused_on_numba
@pytest.mark.parametrize("kind", EXTREMES)
def test_dnc_scan_extremes_match_loop(kind, options, backend):
    """Values and gradients are finite there, and the loop's."""
    sizes = {"numba": (2, 20, 6, 4, 2), "triton": None}[backend]
    case = make_case(backend, options, 70, sizes=sizes)
    assert_matches_loop(backend, *extreme_case(kind, *case), options)


@both_backends
@pytest.mark.parametrize("sign", [-50.0, 50.0])
def test_dnc_scan_float32_raw_fifty_stays_finite(sign, backend):
    """Every raw interface value at +50 or -50 from an empty memory, as after a burst of lr."""
    B, T, N, W, R = 1, 3 if backend == "triton" else 40, 4, 3, 2
    I = sum(interface_sizes(W, R, LINKS_WIPE).values())  # noqa: E741, the interface width
    z = torch.full((B, T, I), sign, requires_grad=True)
    x, state = split_interface(z, W, R, LINKS_WIPE), zero_state(B, N, W, R, LINKS_WIPE)
    outputs = named(fused(backend)(x, state, LINKS_WIPE))
    (slope,) = torch.autograd.grad(loss_of(outputs, make_probes(outputs)), z)
    for value in (*outputs.values(), slope):
        assert torch.isfinite(value).all()
    w = outputs["write_weights"]
    assert w.max() > 0.9 if sign > 0 else w.max() < 1e-6


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
@both_backends
@pytest.mark.parametrize("part", ["write_key", "write_vector", "erase", "write_gate",
                                  "allocation_gate", "read_keys", "free_gates", "state.memory"])
def test_dnc_scan_nan_stays_visible_in_its_row(part, backend):
    """The training loop stops at a loss that is not finite: a NaN that comes in shows in the reads
    of its row, as in the loop, and changes no bit of the other."""
    x, state = make_case(backend, LINKS_WIPE, 73, sizes=(2, 2, 4, 3, 2), dtype=torch.float32)
    parts = {name: value.clone() for name, value in parts_of(x, state).items()}
    clean, *_ = fused(backend)(*with_parts(x, state, parts), LINKS_WIPE)
    parts[part][0] = math.nan
    reads, *_ = fused(backend)(*with_parts(x, state, parts), LINKS_WIPE)
    assert dnc_loop(*with_parts(x, state, parts), LINKS_WIPE)[0][0, -1].isnan().all()
    assert reads[0, -1].isnan().all() and torch.equal(reads[1], clean[1])


@numba_only
@plain_and_all
def test_dnc_scan_float32_stays_finite_over_4096_steps(options, backend):
    """64 segments of 64 steps, memory carried, each with its backward; and the reads of the first
    are the loop's."""
    B, T, N, W, R = 1, 64, 16, 12, 2
    rng, state = np.random.default_rng(72), zero_state(B, N, W, R, options)
    largest = 0.0
    for segment in range(64):
        z = torch.tensor(random_z(rng, B, T, W, R, options, scale=3.0), dtype=torch.float32)
        z.requires_grad_()
        state = DNCState(*(field.detach().requires_grad_() for field in state))
        x = split_interface(z, W, R, options)
        *sequences, after = fused(backend)(x, state, options)
        if segment == 0:
            with torch.no_grad():
                want, *_ = dnc_loop(x, state, options)
            assert want.abs().max() > 0.1
            torch.testing.assert_close(sequences[0], want, atol=1e-4, rtol=0)
        loss = sum(value.square().sum() for value in (*sequences, *after))
        slopes = torch.autograd.grad(loss, (z, state.memory, state.usage))
        for value in (*sequences, *after, *slopes):
            assert torch.isfinite(value).all(), segment
        w = sequences[1]
        assert w.min() >= 0 and w.sum(-1).max() <= 1 + 1e-5
        assert 0 <= after.usage.min() and after.usage.max() <= 1 + 1e-5
        largest, state = max(largest, w.max().item()), after
    assert largest > 0.8  # it never stopped writing


# ══ Layouts, modes and uses ══════════════════════════════════════════════════════════════════════


def transposed(part):
    """The same values, the last axis slowest in memory and the batch axis fastest."""
    axes = range(part.dim() - 1, -1, -1)
    return part.permute(*axes).contiguous().permute(*axes)


def sliced(part):
    """The same values out of a larger tensor."""
    width = part.shape[-1]
    return torch.cat([part + 1, part, part - 1], -1)[..., width:-width]


def expanded(part):
    """The first row in every row's place, without a copy."""
    return part[:1].expand(part.shape)


def repeated(part):
    """The same with copies."""
    return part[:1].repeat(part.shape[0], *[1] * (part.dim() - 1))


@both_backends
@pytest.mark.parametrize("layout,plain", [(transposed, torch.clone), (sliced, torch.clone),
                                          (expanded, repeated)])
def test_dnc_scan_takes_any_layout(layout, plain, backend):
    """Transposed storage, slices of one tensor, and rows expanded without a copy."""
    sizes = {"numba": (3, 18, 5, 4, 2), "triton": (2, 2, 4, 3, 2)}[backend]
    x, state = make_case(backend, LINKS_WIPE, 80, sizes=sizes)
    results = []
    for function in (layout, plain):
        leaves = leaves_of(x, state)
        inputs = with_parts(x, state, {name: function(leaf) for name, leaf in leaves.items()})
        outputs = named(fused(backend)(*inputs, LINKS_WIPE))
        slopes = gradients(loss_of(outputs, make_probes(outputs)), leaves)
        results.append((detached(outputs), slopes))
    assert_equal(results[0][0], results[1][0], "value of")
    assert_near(results[0][1], results[1][1], 1e-12, "gradient of")


@numba_only
def test_dnc_scan_takes_gradients_of_expanded_outputs(backend):
    """sum() hands the backward a gradient of stride zero, and transposing one of odd strides."""
    x, state = make_case(backend, LINKS_WIPE, 81)
    leaves = leaves_of(x, state)
    outputs = named(fused(backend)(*with_parts(x, state, leaves), LINKS_WIPE))
    plain = {name: torch.ones_like(value) for name, value in outputs.items()}
    plain["reads"] = make_probes(outputs)["reads"]
    want = gradients(loss_of(outputs, plain), leaves)

    outputs = named(fused(backend)(*with_parts(x, state, leaves), LINKS_WIPE))
    total = sum(value.sum() for name, value in outputs.items() if name != "reads")
    transposed = plain["reads"].mT.contiguous()
    got = gradients(total + (outputs["reads"].mT * transposed).sum(), leaves)
    assert_near(got, want, 1e-12, "gradient of")


@numba_only
def test_dnc_scan_without_gradient_has_no_graph(backend):
    """no_grad and inference_mode, and inputs of which none requires one: the same values."""
    x, state = make_case(backend, LINKS_WIPE, 82)
    leaves = leaves_of(x, state)
    with_graph = named(fused(backend)(*with_parts(x, state, leaves), LINKS_WIPE))
    assert all(value.requires_grad for value in with_graph.values())
    none_required = named(fused(backend)(x, state, LINKS_WIPE))
    with torch.no_grad():
        no_grad = named(fused(backend)(*with_parts(x, state, leaves), LINKS_WIPE))
    with torch.inference_mode():
        inference = named(fused(backend)(*with_parts(x, state, leaves), LINKS_WIPE))
        carried = named(fused(backend)(x, state._replace(memory=inference["state.memory"]),
                                       LINKS_WIPE))
    for values in (none_required, no_grad, inference):
        assert not any(value.requires_grad for value in values.values())
        assert_equal(values, with_graph, "value of")
    assert not torch.equal(carried["reads"], inference["reads"])


@every_fused_on_numba
def test_dnc_scan_backward_changes_nothing_and_can_be_repeated(options, backend):
    """retain_graph: the first backward uses nothing up, and writes into no input, no result and no
    incoming gradient."""
    x, state = make_case(backend, options, 84)
    leaves = leaves_of(x, state)
    inputs = detached(leaves)
    outputs = named(fused(backend)(*with_parts(x, state, leaves), options))
    probes = make_probes(outputs)
    before = [inputs, detached(outputs), detached(probes)]

    slopes = []
    for _ in range(2):
        slopes.append(torch.autograd.grad(list(outputs.values()), list(leaves.values()),
                                          list(probes.values()), retain_graph=True))
        for group, was in zip((leaves, outputs, probes), before, strict=True):
            assert_equal(detached(group), was, "backward changed")
    for first, second in zip(*slopes, strict=True):
        assert torch.equal(first, second)


@numba_only
def test_dnc_scan_second_derivative_is_not_silently_wrong(backend):
    """The loop has one. The fused recurrence says that it has none."""
    x, state = make_case(backend, PLAIN, 85, sizes=(1, 2, 4, 3, 2))
    vector = x.write_vector.clone().requires_grad_()
    reads, *_ = fused(backend)(x._replace(write_vector=vector), state, PLAIN)
    (slope,) = torch.autograd.grad(reads.square().sum(), vector, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd|differentiable|grad_fn"):
        torch.autograd.grad(slope.square().sum(), vector)


@every_fused_on_numba
@pytest.mark.parametrize("at_border", [True, False])
def test_dnc_scan_segments_equal_one_sequence(at_border, options, backend):
    """Cut at a chunk border or not, with the state carried: the same values, and the same
    gradients through the carry."""
    length = {"numba": 48, "triton": 3}[backend]
    border = operator.CHECKPOINT_EVERY if at_border else operator.CHECKPOINT_EVERY // 2
    x, state = make_case(backend, options, 86, sizes=(1, length, 6, 4, 2))

    def in_two(x, state, options):
        *first, state = fused(backend)(cut(x, 0, border), state, options)
        *second, state = fused(backend)(cut(x, border, length), state, options)
        return (*(torch.cat(pair, 1) for pair in zip(first, second, strict=True)), state)

    want = run(fused(backend), x, state, options)
    got = run(in_two, x, state, options)
    assert_near(got[0], want[0], 1e-6, "value of")
    assert_near(got[1], want[1], precision(backend).gradients, "gradient of")


@every_fused_on_numba
def test_dnc_scan_rows_are_isolated(options, backend):
    """Another text in row 0 changes no bit of row 1, whose loss has no gradient in row 0."""
    sizes = {"numba": (3, 20, 5, 4, 2), "triton": (2, 3, 4, 3, 2)}[backend]
    x, state = make_case(backend, options, 87, sizes=sizes)
    other, _ = make_case(backend, options, 88, sizes=sizes)
    mixed = Interface(*(None if part is None else torch.cat([other_part[:1], part[1:]])
                        for part, other_part in zip(x, other, strict=True)))
    probes = make_probes(named(fused(backend)(x, state, options)))
    for probe in probes.values():
        probe[0] = 0.0
        probe[2:] = 0.0

    values, slopes = run(fused(backend), x, state, options, probes)
    mixed_values, mixed_slopes = run(fused(backend), mixed, state, options, probes)
    for got, want in ((mixed_values, values), (mixed_slopes, slopes)):
        for name in want:
            assert torch.equal(got[name][1:], want[name][1:]), name
    for name, slope in (*slopes.items(), *mixed_slopes.items()):
        assert not slope[0].any() and not slope[2:].any(), name
    assert slopes["write_vector"][1].any() and slopes["state.memory"][1].any()
    assert (values["reads"][0] - mixed_values["reads"][0]).abs().max() > 1e-2


@numba_only
@plain_and_all
def test_dnc_scan_is_the_same_on_any_number_of_threads(options, backend):
    """Bit for bit, values and gradients, as many rows as not to divide evenly."""
    x, state = make_case(backend, options, 90, sizes=(5, 20, 6, 4, 2), dtype=torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(fused(backend), x, state, options))
    finally:
        torch.set_num_threads(before)
    for values, slopes in results[1:]:
        assert_equal(values, results[0][0], "value of")
        assert_equal(slopes, results[0][1], "gradient of")


@numba_only
def test_dnc_scan_threads_at_once_do_not_disturb_each_other(backend):
    """Forward and backward in four threads, as nn.DataParallel runs them: each its own results."""
    cases = [(*make_case(backend, options, 91 + i, sizes=(3, 33, 9, 8, 2), dtype=torch.float32),
              options) for i, options in enumerate((*FUSED, *FUSED)[:4])]
    want = [run(fused(backend), *case) for case in cases]
    got, errors, start = [[] for _ in cases], [], threading.Barrier(len(cases))

    def work(i):
        try:
            start.wait(timeout=30)
            for _ in range(10):
                got[i].append(run(fused(backend), *cases[i]))
        except Exception as error:  # noqa: BLE001, shown below, where pytest sees it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    for results, alone in zip(got, want, strict=True):
        assert len(results) == 10
        for values, slopes in results:
            assert_equal(values, alone[0], "value of")
            assert_equal(slopes, alone[1], "gradient of")


# ══ The bits of a fresh machine ══════════════════════════════════════════════════════════════════

PRINT_BITS = """
import hashlib, torch
from dnc_gpt2 import DNCOptions, interface_sizes, split_interface, zero_state
from dnc_scan import dnc_scan
torch.set_num_threads(1)
cases = [(False, (8, 64, 32, 64, 4)), (True, (2, 20, 6, 5, 2))]
for links, (B, T, N, W, R) in cases:
    options = DNCOptions(use_links=links, dealloc_wipe=links)
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(B, T, sum(interface_sizes(W, R, options).values()), generator=draw)
    z.requires_grad_()
    memory = torch.randn(B, N, W, generator=draw, requires_grad=True)
    state = zero_state(B, N, W, R, options)._replace(memory=memory)
    reads, w, wr, after = dnc_scan(split_interface(z, W, R, options), state, options, "numba")
    loss = sum(value.square().sum() for value in (reads, w, wr, *after))
    for tensor in (reads, *torch.autograd.grad(loss, (z, memory))):
        print(hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest())
"""


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_compiled_and_cached_kernels_give_the_same_bits(tmp_path):
    """A process that compiles the CPU kernels and one that loads them: reads, and the gradients of
    every part of the interface and of the memory."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    printed = []
    for _ in ("compiles", "loads"):
        done = subprocess.run([sys.executable, "-c", PRINT_BITS], cwd=ROOT, env=environment,
                              capture_output=True, text=True, timeout=500, check=True)
        printed.append(done.stdout.split())
    for kernel in ("forward_rows", "backward_rows"):
        assert list(tmp_path.rglob(f"*{kernel}*.nbc"))
    assert len(set(printed[0])) == 6
    assert printed[1] == printed[0]


# ══ torch.compile and torch.library ══════════════════════════════════════════════════════════════


@numba_only
def test_dnc_memory_compiles_without_graph_break(backend):
    """The module as the model calls it, its projections and its trace included, at two lengths."""
    torch._dynamo.reset()
    module = fused_memory(LINKS_WIPE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled.named_parameters = module.named_parameters  # the same names
    for length in (18, 33):
        h, state = torch.randn(2, length, 8), module.init_state(2)
        want, want_slopes = train_memory(module, h, state)
        got, got_slopes = train_memory(compiled, h, state)
        assert_near(got, want, 1e-5, "value of")
        assert_near(got_slopes, want_slopes, 1e-4, "gradient of")
    torch._dynamo.reset()


@pytest.mark.parametrize("backend,options", [
    pytest.param(*NUMBA.values, PLAIN, marks=NUMBA.marks, id="numba-plain"),
    pytest.param(*NUMBA.values, LINKS_WIPE, marks=NUMBA.marks, id="numba-links+wipe"),
    pytest.param(*TRITON.values, LINKS_WIPE, marks=TRITON.marks, id="triton-links+wipe")])
def test_dnc_scan_operators_pass_opcheck(options, backend):
    """torch.library's own checks of every custom operator that a forward and backward calls:
    schema, no hidden mutation or aliasing, shapes without data, autograd, tracing."""
    calls, backward = {}, False

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace not in ("aten", "prim", "prims"):
                calls.setdefault(func, (args, kwargs or {}, backward))
            return func(*args, **(kwargs or {}))

    sizes = (1, 1, 4, 3, 2) if backend == "triton" else (2, 3, 4, 3, 2)
    x, state = make_case(backend, options, 101, sizes=sizes)
    leaves = leaves_of(x, state)
    with Recorder():
        outputs = named(fused(backend)(*with_parts(x, state, leaves), options))
        backward = True  # what a first derivative calls need not have one itself
        gradients(loss_of(outputs, make_probes(outputs)), leaves)
    assert len(calls) == 2
    for func, (args, kwargs, in_backward) in calls.items():
        def leaf(value, frozen=in_backward):
            if not isinstance(value, torch.Tensor):
                return value
            return value.detach().clone().requires_grad_(value.requires_grad and not frozen)

        args, kwargs = torch.utils._pytree.tree_map(leaf, (args, kwargs))
        torch.library.opcheck(func, args, kwargs)


# ══ Memory kept for the backward ═════════════════════════════════════════════════════════════════


def saved_bytes(function, x, state, options) -> int:
    """Bytes of the distinct storages that a forward keeps for its backward."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = leaves_of(x, state)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = named(function(*with_parts(x, state, leaves), options))
    nodes, seen = [results["reads"].grad_fn], set()
    while nodes:  # what a node keeps as an attribute passes by the hooks
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            attributes = list(getattr(node, "__dict__", {}).values())
            for value in torch.utils._pytree.tree_leaves(attributes):
                if isinstance(value, torch.Tensor):
                    pack(value)
    return sum(storages.values())


@numba_only
@plain_and_all
def test_dnc_scan_saves_a_third_of_the_loop(options, backend):
    """Checkpoints and weightings in place of every step's memory (and links)."""
    length = 64
    x, state = make_case(backend, options, 110, "zero", (2, length, 32, 64, 4),
                         dtype=torch.float32)
    loop = saved_bytes(dnc_loop, x, state, options)
    scan = saved_bytes(fused(backend), x, state, options)
    assert loop > length * state.memory.nbytes  # the loop keeps at least each step's memory
    assert 0 < scan < loop / 3


@numba_only
def test_dnc_scan_saves_a_memory_a_checkpoint(backend, monkeypatch):
    """Twice the distance, half of the checkpoints: CHECKPOINT_EVERY is what the backward uses."""
    sizes = (2, 64, 32, 64, 2)
    x, state = make_case(backend, PLAIN, 111, "zero", sizes, dtype=torch.float32)
    saved = {}
    for every in (2, 4, 8):
        monkeypatch.setattr(operator, "CHECKPOINT_EVERY", every)
        saved[every] = saved_bytes(fused(backend), x, state, PLAIN)
    memories = {every: sizes[1] // every * state.memory.nbytes for every in saved}
    for every in (2, 4):
        gained = saved[every] - saved[2 * every]
        assert math.isclose(gained, memories[every] - memories[2 * every], rel_tol=0.3), saved


# ══ The module and its setting ═══════════════════════════════════════════════════════════════════


@numba_only
@plain_and_all
@pytest.mark.parametrize("autocast", [False, True])
def test_dnc_memory_fused_matches_eager(autocast, options, backend):
    """Outputs, trace, state and the gradients of h, of the carried memory and of every parameter,
    also under bfloat16 autocast, where the recurrence stays in float32."""
    rng = np.random.default_rng(120)
    h = torch.tensor(rng.normal(size=(2, 18, 8)), dtype=torch.float32)
    state = to_torch(random_state(rng, 2, 6, 4, 2, options), torch.float32)
    want, want_slopes = train_memory(fused_memory(options, "eager"), h, state, autocast)
    with mock.patch.object(dnc_gpt2, "dnc_loop", refuse_loop):
        for scan in ("fused", "auto"):
            got, slopes = train_memory(fused_memory(options, scan), h, state, autocast)
            assert all(got[name].dtype == torch.float32 for name in state._fields if name in got)
            assert_near(got, want, 1e-4 if not autocast else 2e-2, "value of")
            assert_near(slopes, want_slopes, 1e-3 if not autocast else 2e-2, "gradient of")
            for name in ("interface.weight", "read_proj.weight", "h", "memory"):
                assert slopes[name].abs().max() > 1e-3, name


@numba_only
def test_dnc_scan_backward_ignores_autocast(backend):
    """A backward inside the autocast region computes what it computes outside."""
    x, state = make_case(backend, LINKS_WIPE, 121, dtype=torch.float32)
    slopes = []
    for autocast in (False, True):
        leaves = leaves_of(x, state)
        outputs = named(fused(backend)(*with_parts(x, state, leaves), LINKS_WIPE))
        loss = loss_of(outputs, make_probes(outputs))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            slopes.append(gradients(loss, leaves))
    assert_equal(slopes[1], slopes[0], "gradient of")


@numba_only
def test_config_scan_chooses_the_recurrence(backend):
    """eager calls the loop and nothing else, fused and auto do not; --resume may change it, as how
    fast a run computes is not what it computes."""
    assert "scan" in dnc_gpt2.FREE_FIELDS and dnc_gpt2.Config().scan == "auto"
    with pytest.raises(ValueError, match="scan"):
        tiny_config(scan="faster")

    h = torch.randn(1, 3, tiny_config().hidden_size)
    for scan, forbidden in (("eager", "dnc_scan"), ("fused", "loop"), ("auto", "loop")):
        module = dnc_gpt2.build_memory(tiny_config(scan=scan))
        where = (dnc_scan, "dnc_scan") if forbidden == "dnc_scan" else (dnc_gpt2, "dnc_loop")
        with mock.patch.object(*where, refuse_loop):
            module(h, module.init_state(1))


# ══ Refusals ═════════════════════════════════════════════════════════════════════════════════════


def one_line(reason, *words):
    """A refusal is one line that names every word."""
    assert reason and "\n" not in reason.strip()
    for word in words:
        assert word in reason.replace(",", ""), f"{word!r} is not in: {reason}"


@both_backends
@pytest.mark.parametrize("options,field", [(MASKED, "mask_min"), (SHARPENED, "sharpen_links")])
def test_refusal_names_the_option(options, field, backend):
    """Masks and sharpening stay eager: refusal says which field, and dnc_scan and a module that
    asks for fused raise it."""
    x, state = make_case(backend, options, 130, sizes=(1, 2, 4, 3, 2), dtype=torch.float32)
    for chosen in (backend, "auto"):
        reason = dnc_scan.refusal(state, options, chosen)
        one_line(reason, field)
        with pytest.raises(ValueError) as error:
            dnc_scan.dnc_scan(x, state, options, backend=chosen)
        assert str(error.value) == reason
    module = fused_memory(options, "fused")
    with pytest.raises(ValueError, match="scan") as error:
        module(torch.randn(2, 5, 8), module.init_state(2))
    one_line(str(error.value), field)


@both_backends
@every_fused
def test_refusal_is_empty_where_the_scan_runs(options, backend):
    """Float32 at the sizes of both presets and at the limits; on the CPU beyond, in float64."""
    sizes = [(64, 128, 4), (32, 64, 4), (1, 1, 1), (128, 128, 8)]
    if not options.use_links:
        sizes += [(256, 64, 1), (64, 256, 1)]
    for N, W, R in sizes:
        assert dnc_scan.refusal(zero_state(1, N, W, R, options), options, backend) == ""
    if backend == "numba":
        for chosen in ("auto", backend):
            state = zero_state(1, 300, 300, 9, options, torch.float64)
            assert dnc_scan.refusal(state, options, chosen) == ""


@triton_only
@pytest.mark.parametrize("N,W,R,options,limit", [
    (257, 4, 1, PLAIN, "256"), (4, 257, 1, PLAIN, "256"), (129, 128, 1, PLAIN, "16384"),
    (256, 128, 1, PLAIN, "16384"), (4, 4, 9, PLAIN, "8"), (129, 4, 1, LINKS_WIPE, "128")])
def test_refusal_names_the_limit(N, W, R, options, limit, backend):
    """Each size beyond what the kernels hold, and dnc_scan raises the same line."""
    state = zero_state(1, N, W, R, options)
    reason = dnc_scan.refusal(state, options, backend)
    one_line(reason, limit)
    x, _ = make_case("numba", options, 131, sizes=(1, 1, N, W, R), dtype=torch.float32)
    with pytest.raises(ValueError) as error:
        dnc_scan.dnc_scan(x, state, options, backend=backend)
    assert str(error.value) == reason


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_refusal_names_the_type(dtype, backend):
    """1 - 1e-6 is 1 in either: a state of half precision is refused."""
    for chosen in (backend, "auto"):
        state = zero_state(1, 4, 3, 2, PLAIN, dtype)
        one_line(dnc_scan.refusal(state, PLAIN, chosen), "float32")


@triton_only
def test_refusal_of_float64_on_cuda(backend):
    """A state that claims to be on a GPU, which needs none: float32 there, float64 refused."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        try:
            states = [DNCState(*(torch.empty_like(field, device="cuda") for field in
                                 zero_state(1, 4, 3, 2, PLAIN, dtype)))
                      for dtype in (torch.float32, torch.float64)]
        except (AssertionError, RuntimeError) as error:
            pytest.skip(f"no fake CUDA tensors here: {error}")
        one_line(dnc_scan.refusal(states[1], PLAIN, "auto"), "float32")
        one_line(dnc_scan.refusal(states[1], PLAIN, backend), "float32")


def test_without_numba_and_triton_one_line_says_what_to_install():
    """In a process that cannot import them: the loop runs, after one line; what asks for fused is
    refused with it; the LM head, which needs neither, is there."""
    code = """if True:
        import sys
        import torch
        sys.modules["numba"] = sys.modules["triton"] = None  # importing either is an ImportError
        from dnc_scan.head import HeadLoss
        assert "dnc_scan.operator" not in sys.modules
        from dnc_gpt2 import DNCMemory, DNCOptions, zero_state
        from dnc_scan import refusal
        for backend in ("auto", "numba", "triton"):
            print(refusal(zero_state(1, 4, 3, 2, DNCOptions()), DNCOptions(), backend))
        print("auto")
        module = DNCMemory(8, 4, 3, 2, scan="auto")
        torch.nn.init.normal_(module.read_proj.weight)
        h = torch.randn(2, 5, 8)
        for _ in range(3):
            assert not torch.equal(module(h, module.init_state(2))[0], h)
        print("fused")
        try:
            DNCMemory(8, 4, 3, 2, scan="fused")(h, module.init_state(2))
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line for line in lines if "install" not in line] == ["auto", "fused"]
    assert len(lines) == 7
    for line, package in zip(lines[:3], ("numba", "numba", "triton"), strict=True):
        one_line(line, f"pip install {package}")
    one_line(lines[4], "scan", "eager", "pip install numba")
    one_line(lines[6], "scan", "eager", "pip install numba")


@numba_only
@pytest.mark.parametrize("kind", ["one row of state", "one row of interface", "other width",
                                  "other heads", "links not in options", "links not in state",
                                  "masks not in options"])
def test_dnc_scan_reads_nothing_beyond_its_inputs(kind, backend):
    """Inputs that do not fit together, for which compiled code has no bounds, are refused."""
    options = PLAIN if kind.endswith("not in options") else LINKS_WIPE
    made_for = {"links not in state": PLAIN, "masks not in options": MASKED}.get(kind, LINKS_WIPE)
    x, state = make_case(backend, made_for, 132, sizes=(2, 3, 4, 3, 2))
    if kind == "one row of state":
        state = DNCState(*(field[:1].clone() for field in state))
    if kind == "one row of interface":
        x = Interface(*(None if part is None else part[:1].clone() for part in x))
    if kind == "other width":
        state = state._replace(memory=state.memory[:, :, :2].clone())
    if kind == "other heads":
        state = state._replace(read_weights=state.read_weights[:, :1].clone())
    with pytest.raises(ValueError, match="must be"):
        fused(backend)(x, state, options)


@numba_only
def test_dnc_memory_auto_says_once_that_it_falls_back(capsys, backend):
    """Options that only the loop has: its results, and one line over many calls. None where the
    loop was asked for, and none where the fused recurrence runs."""
    dnc_gpt2.say_once.cache_clear()
    h = torch.randn(2, 5, 8)
    eager = fused_memory(MASKED, "eager")
    _, want, _ = eager(h, eager.init_state(2))
    runs_fused = fused_memory(PLAIN, "auto")
    runs_fused(h, runs_fused.init_state(2))
    assert capsys.readouterr() == ("", "")

    module = fused_memory(MASKED, "auto")
    for _ in range(3):
        _, state, _ = module(h, module.init_state(2))
        assert torch.equal(state.memory, want.memory)
    printed = capsys.readouterr()
    one_line(printed.out + printed.err, "mask_min", "scan")
