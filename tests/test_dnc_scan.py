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
import sys
import threading
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import tiny_config
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
from dnc_scan import cpu, operator

FUSED = [o for o in COMBINATIONS if o.mask_min == 1 and not o.sharpen_links]
EAGER_ONLY = [o for o in COMBINATIONS if o not in FUSED]
LINKS_WIPE = DNCOptions(use_links=True, dealloc_wipe=True)
NO_TRITON = (importlib.util.find_spec("triton") is None
             or os.environ.get("TRITON_INTERPRET") != "1")  # compiled, it takes no CPU tensors
NUMBA = pytest.param("numba", marks=pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(
    NO_TRITON, reason="triton is not installed, or is not in its interpreter"))

both_backends = pytest.mark.parametrize("backend", [NUMBA, TRITON])
numba_only = pytest.mark.parametrize("backend", [NUMBA])
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
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True,
                                materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


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


def fused_memory(options=PLAIN, scan="fused", dtype=torch.float32, sizes=(8, 6, 4, 2)):
    """A DNCMemory (C, N, W, R) whose memory matters, the same for every scan."""
    torch.manual_seed(30)
    module = DNCMemory(*sizes, options, scan=scan).to(dtype)
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


def refuse_loop(*_):
    raise AssertionError("the eager loop was called")


# ══ Values ═══════════════════════════════════════════════════════════════════════════════════════

SHAPES = [  # B, T, N, W, R: chunk borders at 16, one step, odd sizes, one of everything, large N
    (3, 7, 5, 3, 2), (1, 63, 17, 60, 3), (2, 1, 6, 4, 2), (1, 15, 5, 3, 1), (1, 16, 5, 3, 2),
    (2, 17, 5, 4, 2), (1, 33, 4, 3, 8), (1, 9, 1, 4, 2), (2, 9, 6, 1, 2), (1, 5, 1, 1, 1),
    (1, 2, 130, 5, 9),
]  # fmt: skip


def assert_matches_oracle(backend, z, start, W, R, options):
    """Every result within 1e-9 of the oracle's in float64, reads within 1e-4 in float32."""
    near = precision(backend)
    z = torch.tensor(z).to(near.dtype)
    state, x = to_torch(start, near.dtype), split_interface(z, W, R, options)
    reads, write_weights, read_weights, after = fused(backend)(x, state, options)
    orders = path_orders(z, state, write_weights, read_weights, W, R, options)
    start = {name: getattr(state, name).double().numpy() for name in start}
    want = dnc_oracle(z.double().numpy(), start, W, R, **options._asdict(), orders=orders)
    got = named((reads, write_weights, read_weights, after))
    names = ("reads", "write_weights", "read_weights")
    wanted = {name: torch.tensor(v) for name, v in zip(names, want[:3], strict=True)}
    wanted |= {f"state.{name}": torch.tensor(v) for name, v in want[3].items()}
    assert_near(got, wanted, near.values, "value of")


@numba_only
@every_fused
@pytest.mark.parametrize("start", ["zero", "carried"])
@pytest.mark.parametrize("B,T,N,W,R", SHAPES)
def test_dnc_scan_matches_oracle(B, T, N, W, R, start, options, backend):
    """Reads, both traces and every field of the state, from an empty and from a carried state."""
    rng = np.random.default_rng(T + N)
    state = first_state(start, rng, B, N, W, R, options)
    assert_matches_oracle(backend, random_z(rng, B, T, W, R, options), state, W, R, options)


@pytest.mark.parametrize("backend", [TRITON])
@every_fused
@pytest.mark.parametrize("start", ["zero", "carried"])
def test_dnc_scan_triton_matches_oracle(start, options, backend):
    """The same in Triton, sizes that are no powers of two, across two chunk borders."""
    B, T, N, W, R = {"zero": (1, 5, 5, 3, 3), "carried": (2, 3, 5, 3, 3)}[start]
    rng = np.random.default_rng(50)
    state = first_state(start, rng, B, N, W, R, options)
    assert_matches_oracle(backend, random_z(rng, B, T, W, R, options), state, W, R, options)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("B,T,N,W,R", [(1, 1, 1, 1, 1), (1, 2, 16, 16, 8), (1, 3, 17, 20, 1)])
def test_dnc_scan_triton_matches_oracle_sizes(B, T, N, W, R, backend):
    """One of everything, powers of two, and sizes just above them."""
    rng = np.random.default_rng(51)
    state = first_state("carried", rng, B, N, W, R, LINKS_WIPE)
    z = random_z(rng, B, T, W, R, LINKS_WIPE)
    assert_matches_oracle(backend, z, state, W, R, LINKS_WIPE)


@numba_only
@every_fused
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


@both_backends
def test_dnc_scan_returns_state_of_given_type(backend):
    """The state comes back as the NamedTuple that went in, whoever defined it."""

    class OtherState(NamedTuple):
        memory: torch.Tensor
        usage: torch.Tensor
        write_weights: torch.Tensor
        read_weights: torch.Tensor
        link: torch.Tensor
        precedence: torch.Tensor

    for options, kind in ((PLAIN, DNCState), (LINKS_WIPE, OtherState)):
        x, state = make_case(backend, options, 53, sizes=(2, 3, 5, 3, 2))
        *_, write_weights, read_weights, after = fused(backend)(x, kind(*state), options)
        assert type(after) is kind
        assert [v.shape for v in after] == [v.shape for v in state]
        assert torch.equal(after.write_weights, write_weights[:, -1])
        assert torch.equal(after.read_weights, read_weights[:, -1])


# ══ Gradients ════════════════════════════════════════════════════════════════════════════════════


@both_backends
@every_fused
@pytest.mark.parametrize("start", ["zero", "carried"])
def test_dnc_scan_gradients_match_autograd(start, options, backend):
    """Of every part of the interface and every field of the initial state, for a loss with a
    random probe on every output and on every field of the final state, over several chunks."""
    sizes = {"zero": (1, 5, 5, 3, 2), "carried": (2, 3, 5, 3, 2)}[start]
    sizes = sizes if backend == "triton" else (2, 37, 7, 5, 3)
    x, state = make_case(backend, options, 60, start, sizes)
    slopes = assert_matches_loop(backend, x, state, options)
    assert len(slopes) == (16 if options.use_links else 13)
    for name, slope in slopes.items():  # in an empty memory nothing was read: no slope there
        if start == "carried" or not name.startswith("state."):
            assert slope.abs().max() > 1e-3, name


@numba_only
@every_fused
@pytest.mark.parametrize("B,T,N,W,R", [(1, 1, 6, 4, 2), (1, 15, 5, 3, 1), (1, 16, 5, 3, 2),
                                       (2, 17, 5, 4, 2), (1, 33, 17, 20, 8), (1, 9, 1, 4, 2),
                                       (2, 9, 6, 1, 2), (1, 5, 1, 1, 1)])
def test_dnc_scan_gradients_match_autograd_sizes(B, T, N, W, R, options, backend):
    """At chunk borders, at one step, one slot, one column, one head and eight."""
    x, state = make_case(backend, options, 61, sizes=(B, T, N, W, R))
    assert_matches_loop(backend, x, state, options)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("B,T,N,W,R", [(1, 1, 1, 1, 1), (1, 2, 16, 16, 8), (1, 4, 17, 20, 1)])
def test_dnc_scan_triton_gradients_match_autograd_sizes(B, T, N, W, R, backend):
    """One of everything, powers of two, sizes just above; T at a chunk border."""
    x, state = make_case(backend, LINKS_WIPE, 62, sizes=(B, T, N, W, R))
    assert_matches_loop(backend, x, state, LINKS_WIPE)


@numba_only
@pytest.mark.parametrize("options,output", [
    *((o, name) for o in (PLAIN, LINKS_WIPE)
      for name in ("reads", "write_weights", "read_weights", "state.memory", "state.usage")),
    (LINKS_WIPE, "state.link"), (LINKS_WIPE, "state.precedence")])
def test_dnc_scan_gradients_of_one_output(output, options, backend):
    """The other outputs stay unused and bring nothing in."""
    x, state = make_case(backend, options, 63)
    assert_matches_loop(backend, x, state, options, outputs={output})


@numba_only
@pytest.mark.parametrize("wanted", [
    {"write_vector"}, {"read_keys", "read_strengths"}, {"state.memory"}, {"state.usage"},
    {"state.link"}, {"free_gates", "state.read_weights"}],
    ids=lambda names: "+".join(sorted(names)))  # fmt: skip
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
    leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}

    def outputs(*values):
        inputs = with_parts(x, state, dict(zip(leaves, values, strict=True)))
        return tuple(named(fused(backend)(*inputs, options)).values())

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), eps=1e-6, atol=1e-6,
                                    rtol=1e-5)


@both_backends
@plain_and_all
def test_dnc_scan_gradient_matches_oracle_differences(options, backend):
    """Into z and every field of the initial state, against central differences of the oracle."""
    near = precision(backend)
    B, T, N, W, R = 1, 3, 4, 3, 2
    z, start = separated_case(options, B, T, N, W, R)
    leaf = torch.tensor(z, dtype=near.dtype, requires_grad=True)
    state = to_torch(start, near.dtype)
    for name in start:
        getattr(state, name).requires_grad_()
    outputs = named(fused(backend)(split_interface(leaf, W, R, options), state, options))
    probes = make_probes(outputs)
    loss_of(outputs, probes).backward()

    def oracle_loss(arrays):
        fields = {k: v for k, v in arrays.items() if k != "z"}
        *sequences, after, _ = dnc_oracle(arrays["z"], fields, W, R, **options._asdict())
        values = [*sequences, *(after[name] for name in start)]
        return sum((p.double().numpy() * v).sum()
                   for p, v in zip(probes.values(), values, strict=True))

    assert list(probes)[3:] == [f"state.{name}" for name in start]
    arrays = {"z": z, **start}
    for name, array in arrays.items():
        difference = np.zeros(array.shape)
        for i in np.ndindex(array.shape):
            moved = []
            for step in (1e-5, -1e-5):
                shifted = {**arrays, name: array.copy()}
                shifted[name][i] += step
                moved.append(oracle_loss(shifted))
            difference[i] = (moved[0] - moved[1]) / 2e-5
        slope = (leaf if name == "z" else getattr(state, name)).grad
        assert np.abs(difference).max() > 1e-2, name
        assert_near({name: slope}, {name: torch.tensor(difference)},
                    max(1e-6, near.gradients), "gradient of")


@numba_only
@every_fused
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


@numba_only
@every_fused
@pytest.mark.parametrize("kind", EXTREMES)
def test_dnc_scan_extremes_match_loop(kind, options, backend):
    """Values and gradients are finite there, and the loop's."""
    case = make_case(backend, options, 70, sizes=(2, 20, 6, 4, 2))
    assert_matches_loop(backend, *extreme_case(kind, *case), options)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("kind", EXTREMES)
def test_dnc_scan_triton_extremes_match_loop(kind, backend):
    """The same in Triton, with everything switched on."""
    case = make_case(backend, LINKS_WIPE, 71)
    assert_matches_loop(backend, *extreme_case(kind, *case), LINKS_WIPE)


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


@both_backends
def test_dnc_scan_takes_any_layout(backend):
    """Transposed storage, slices of one tensor, and rows expanded without a copy."""
    sizes = (2, 2, 4, 3, 2) if backend == "triton" else (3, 18, 5, 4, 2)
    x, state = make_case(backend, LINKS_WIPE, 80, sizes=sizes)
    parts = parts_of(x, state)
    probes = make_probes(named(fused(backend)(x, state, LINKS_WIPE)))

    def through(layout, parts):
        leaves = {name: part.clone().requires_grad_() for name, part in parts.items()}
        inputs = with_parts(x, state, {name: layout(leaf) for name, leaf in leaves.items()})
        outputs = named(fused(backend)(*inputs, LINKS_WIPE))
        slopes = gradients(loss_of(outputs, probes), leaves)
        return {name: value.detach() for name, value in outputs.items()}, slopes

    def transposed(part):
        """The same values, the last axis slowest in memory and the batch axis fastest."""
        backwards = part.permute(*reversed(range(part.dim()))).contiguous()
        return backwards.permute(*reversed(range(part.dim())))

    def sliced(part):
        """The same values out of a larger tensor."""
        return torch.cat([part + 1, part, part - 1], -1)[..., part.shape[-1]:-part.shape[-1]]

    want = through(torch.clone, parts)
    for layout in (transposed, sliced):
        layout_parts = {name: layout(part) for name, part in parts.items()}
        if layout is transposed:
            assert not layout_parts["read_keys"].is_contiguous()
        got = through(layout, parts)
        assert_equal(got[0], want[0], f"{layout.__name__} value of")
        assert_near(got[1], want[1], 1e-12, f"{layout.__name__} gradient of")

    first = {name: part[:1] for name, part in parts.items()}
    copied = through(lambda part: part.repeat(sizes[0], *[1] * (part.dim() - 1)), first)
    expanded = through(lambda part: part.expand(sizes[0], *part.shape[1:]), first)
    assert_equal(expanded[0], copied[0], "expanded value of")
    assert_near(expanded[1], copied[1], 1e-12, "expanded gradient of")


@numba_only
@every_fused
def test_dnc_scan_takes_gradients_of_expanded_outputs(options, backend):
    """sum() hands the backward a gradient of stride zero, and transposing one of odd strides."""
    x, state = make_case(backend, options, 81)
    leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}
    outputs = named(fused(backend)(*with_parts(x, state, leaves), options))
    plain = {name: torch.ones_like(value) for name, value in outputs.items()}
    plain["reads"] = torch.randn_like(outputs["reads"])
    want = gradients(loss_of(outputs, plain), leaves)
    outputs = named(fused(backend)(*with_parts(x, state, leaves), options))
    total = sum(value.sum() for name, value in outputs.items() if name != "reads")
    odd = plain["reads"].mT.contiguous()
    got = gradients(total + (outputs["reads"].mT * odd).sum(), leaves)
    assert_near(got, want, 1e-5 if precision(backend).dtype == torch.float32 else 1e-12,
                "gradient of")


@both_backends
def test_dnc_scan_without_gradient_has_no_graph(backend):
    """no_grad and inference_mode, and inputs of which none requires one: the same values."""
    x, state = make_case(backend, LINKS_WIPE, 82)
    leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}
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


@numba_only
@every_fused
def test_dnc_scan_outputs_used_twice(options, backend):
    """Gradients of several uses add up; the last write weighting counts as trace and as state."""
    x, state = make_case(backend, options, 83)
    leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}

    def slopes(*weights):
        """Of a loss with weights on reads, reads again, and both traces and both last of them."""
        reads, w, wr, after = fused(backend)(*with_parts(x, state, leaves), options)
        uses = (reads.sin().sum(), reads.square().sum(), w.square().sum(),
                after.write_weights.sin().sum(), wr.square().sum(),
                after.read_weights.sin().sum())
        return gradients(sum(a * use for a, use in zip(weights, uses, strict=True)), leaves)

    together = slopes(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    apart = [slopes(*row) for row in np.diag([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).tolist()]
    total = {name: sum(part[name] for part in apart) for name in leaves}
    assert_near(together, total, precision(backend).gradients, "gradient of")
    assert all(any(slope.any() for slope in part.values()) for part in apart)


@every_fused_on_numba
def test_dnc_scan_two_backwards_are_equal(options, backend):
    """retain_graph: the first backward uses nothing up."""
    x, state = make_case(backend, options, 84)
    leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}
    outputs = named(fused(backend)(*with_parts(x, state, leaves), options))
    loss = loss_of(outputs, make_probes(outputs))
    loss.backward(retain_graph=True)
    first = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    loss.backward()
    assert_equal({name: leaf.grad for name, leaf in leaves.items()}, first, "gradient of")


@numba_only
def test_dnc_scan_second_derivative_is_not_silently_wrong(backend):
    """The loop has one. The fused recurrence has the same or says that it has none."""
    x, state = make_case(backend, PLAIN, 85, sizes=(1, 2, 4, 3, 2))

    def second(function):
        vector = x.write_vector.clone().requires_grad_()
        reads, *_ = function(x._replace(write_vector=vector), state, PLAIN)
        (slope,) = torch.autograd.grad(reads.square().sum(), vector, create_graph=True)
        return torch.autograd.grad((slope.square() + vector.square()).sum(), vector)[0]

    want = second(dnc_loop)
    try:
        got = second(fused(backend))
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@every_fused_on_numba
@pytest.mark.parametrize("border", [16, 7])
def test_dnc_scan_segments_equal_one_sequence(border, options, backend):
    """Cut at a chunk border or not, with the state carried: the same values, and the same
    gradients through the carry."""
    length = 48
    if backend == "triton":
        border, length = {16: 2, 7: 1}[border], 3
    x, state = make_case(backend, options, 86, sizes=(1, length, 6, 4, 2))

    def whole(x, state, options):
        return fused(backend)(x, state, options)

    def in_two(x, state, options):
        *first, state = fused(backend)(cut(x, 0, border), state, options)
        *second, state = fused(backend)(cut(x, border, length), state, options)
        return (*(torch.cat(pair, 1) for pair in zip(first, second, strict=True)), state)

    want, got = (run(function, x, state, options) for function in (whole, in_two))
    assert_near(got[0], want[0], 1e-6, "value of")
    near = precision(backend)
    assert_near(got[1], want[1], near.gradients, "gradient of")


@every_fused_on_numba
def test_dnc_scan_rows_are_isolated(options, backend):
    """Another text in row 0 changes no bit of row 1, whose loss has no gradient in row 0."""
    sizes = (2, 3, 4, 3, 2) if backend == "triton" else (3, 20, 5, 4, 2)
    x, state = make_case(backend, options, 87, sizes=sizes)
    other, _ = make_case(backend, options, 88, sizes=sizes)
    mixed = Interface(*(None if mine is None else torch.cat([theirs[:1], mine[1:]])
                        for mine, theirs in zip(x, other, strict=True)))
    probes = make_probes(named(fused(backend)(x, state, options)))
    for probe in probes.values():
        probe[0] = 0.0
        probe[2:] = 0.0
    mine, theirs = (run(fused(backend), source, state, options, probes) for source in (x, mixed))
    for got, want in zip(mine, theirs, strict=True):
        for name, value in got.items():
            assert torch.equal(value[1:], want[name][1:]), name
    for _, slopes in (mine, theirs):
        for name, slope in slopes.items():
            assert not slope[0].any() and not slope[2:].any(), name
        assert slopes["write_vector"][1].any() and slopes["state.memory"][1].any()
    assert (mine[0]["reads"][0] - theirs[0]["reads"][0]).abs().max() > 1e-2


@every_fused_on_numba
def test_dnc_scan_leaves_inputs_untouched(options, backend):
    """Neither forward nor backward writes into an input, a result or an incoming gradient."""
    x, state = make_case(backend, options, 89)
    leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}
    outputs = named(fused(backend)(*with_parts(x, state, leaves), options))
    probes = make_probes(outputs)
    before = [{k: v.detach().clone() for k, v in group.items()}
              for group in (leaves, outputs, probes)]
    torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(probes.values()))
    for group, was, what in zip((leaves, outputs, probes), before, ("input", "output", "gradient"),
                                strict=True):
        assert_equal({k: v.detach() for k, v in group.items()}, was, what)
    assert all(leaf.grad is None for leaf in leaves.values())


@numba_only
@every_fused
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
    for mine, theirs in zip(got, want, strict=True):
        assert len(mine) == 10
        for values, slopes in mine:
            assert_equal(values, theirs[0], "value of")
            assert_equal(slopes, theirs[1], "gradient of")


# ══ torch.compile and torch.library ══════════════════════════════════════════════════════════════


@both_backends
def test_dnc_scan_compiles_without_graph_break(backend):
    """fullgraph, and again at another T: the values and gradients of the uncompiled call."""
    torch._dynamo.reset()

    def loss(x, state):
        outputs = named(dnc_scan.dnc_scan(x, state, LINKS_WIPE, backend=backend))
        return sum((value * (1 + value)).sum() for value in outputs.values()), outputs

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for length in (3,) if backend == "triton" else (18, 33):
        x, state = make_case(backend, LINKS_WIPE, 100, sizes=(1, length, 4, 3, 2))
        results = []
        for function in (loss, compiled):
            leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}
            total, outputs = function(*with_parts(x, state, leaves))
            results.append((outputs, gradients(total, leaves)))
        near = 1e-5 if precision(backend).dtype == torch.float32 else 1e-10
        assert_near(results[1][0], results[0][0], near, "value of")
        assert_near(results[1][1], results[0][1], near, "gradient of")
    torch._dynamo.reset()


@numba_only
def test_dnc_memory_compiles_without_graph_break(backend):
    """The module as the model calls it, its projections and its trace included."""
    torch._dynamo.reset()
    module = fused_memory(LINKS_WIPE)
    h, state = torch.randn(2, 18, 8), module.init_state(2)
    want, want_slopes = train_memory(module, h, state)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    values = {}

    def call(h, state):
        values["called"] = True
        return compiled(h, state)

    call.named_parameters = module.named_parameters
    got, got_slopes = train_memory(call, h, state)
    assert values["called"]
    assert_near(got, want, 1e-5, "value of")
    assert_near(got_slopes, want_slopes, 1e-4, "gradient of")
    torch._dynamo.reset()


@every_fused_on_numba
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
    leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}
    with Recorder():
        outputs = named(fused(backend)(*with_parts(x, state, leaves), options))
        backward = True  # what a first derivative calls need not have one itself
        gradients(loss_of(outputs, make_probes(outputs)), leaves)
    if not calls:
        pytest.skip("no custom operator is visible to the dispatcher")
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

    leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = named(function(*with_parts(x, state, leaves), options))
    nodes, held = [results["reads"].grad_fn], 0
    seen = set()
    while nodes:  # what a node keeps as an attribute passes by the hooks
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        kept = torch.utils._pytree.tree_leaves(list(getattr(node, "__dict__", {}).values()))
        for tensor in (value for value in kept if isinstance(value, torch.Tensor)):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held += 1
    return sum(storages.values())


@numba_only
@plain_and_all
@pytest.mark.parametrize("length", [64, 256])
def test_dnc_scan_saves_a_third_of_the_loop(length, options, backend):
    """Checkpoints and weightings in place of every step's memory (and links)."""
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
@every_fused
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
        leaves = {k: v.clone().requires_grad_() for k, v in parts_of(x, state).items()}
        outputs = named(fused(backend)(*with_parts(x, state, leaves), LINKS_WIPE))
        loss = loss_of(outputs, make_probes(outputs))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            slopes.append(gradients(loss, leaves))
    assert_equal(slopes[1], slopes[0], "gradient of")


def test_dnc_memory_eager_is_the_loop():
    """scan="eager" calls dnc_loop, and nothing else."""
    module = fused_memory(scan="eager")
    with mock.patch.object(dnc_gpt2, "dnc_loop", refuse_loop), \
            pytest.raises(AssertionError, match="eager loop"):
        module(torch.randn(1, 3, 8), module.init_state(1))
    with mock.patch.object(dnc_scan, "dnc_scan", refuse_loop):
        module(torch.randn(1, 3, 8), module.init_state(1))


def test_config_scan_is_free_to_change():
    """How fast a run computes is not what it computes: --resume may change it."""
    assert "scan" in dnc_gpt2.FREE_FIELDS
    assert dnc_gpt2.Config().scan == "auto"
    for scan in ("auto", "eager", "fused"):
        assert tiny_config(scan=scan).scan == scan
    with pytest.raises(ValueError, match="scan"):
        tiny_config(scan="faster")


@numba_only
def test_build_memory_passes_scan(backend):
    """Config.scan reaches the recurrence."""
    for scan, refused in (("eager", True), ("fused", False)):
        module = dnc_gpt2.build_memory(tiny_config(scan=scan))
        h = torch.randn(1, 3, tiny_config().hidden_size)
        with mock.patch.object(dnc_gpt2, "dnc_loop", refuse_loop), \
                pytest.raises(AssertionError, match="eager loop") if refused \
                else contextlib.nullcontext():
            module(h, module.init_state(1))


# ══ Refusals ═════════════════════════════════════════════════════════════════════════════════════


def one_line(reason, *words):
    """A refusal is one line that names every word."""
    assert reason and "\n" not in reason.strip()
    for word in words:
        assert word in reason.replace(",", ""), f"{word!r} is not in: {reason}"


@both_backends
@pytest.mark.parametrize("options", EAGER_ONLY, ids=option_id)
def test_refusal_names_the_option(options, backend):
    """Masks and sharpening stay eager: refusal says which field, and dnc_scan raises it."""
    x, state = make_case(backend, options, 130, sizes=(1, 2, 4, 3, 2), dtype=torch.float32)
    for chosen in (backend, "auto"):
        reason = dnc_scan.refusal(state, options, chosen)
        one_line(reason)
        assert ("mask_min" in reason and options.mask_min < 1
                or "sharpen_links" in reason and options.sharpen_links), reason
        with pytest.raises(ValueError) as error:
            dnc_scan.dnc_scan(x, state, options, backend=chosen)
        assert str(error.value) == reason


@both_backends
@every_fused
def test_refusal_is_empty_where_the_scan_runs(options, backend):
    """Float32 at the sizes of both presets and at the limits."""
    for N, W, R in ((64, 128, 4), (32, 64, 4), (1, 1, 1), (128, 128, 8)):
        assert dnc_scan.refusal(zero_state(1, N, W, R, options), options, backend) == ""
    if not options.use_links:
        for N, W in ((256, 64), (64, 256)):
            assert dnc_scan.refusal(zero_state(1, N, W, 1, options), options, backend) == ""


@numba_only
def test_refusal_numba_has_no_size_limits(backend):
    """On the CPU the sizes are free, and float64 is welcome."""
    for dtype in (torch.float32, torch.float64):
        state = zero_state(1, 300, 300, 9, LINKS_WIPE, dtype)
        for chosen in ("auto", backend):
            assert dnc_scan.refusal(state, LINKS_WIPE, chosen) == ""


@pytest.mark.parametrize("backend", [TRITON])
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


@pytest.mark.parametrize("backend", [TRITON])
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


def test_refusal_without_numba_says_what_to_install(monkeypatch):
    """numba is optional: without it the CPU has the eager loop, and the command to get more."""
    monkeypatch.setattr(cpu, "MISSING", "pip install numba")
    state = zero_state(1, 4, 3, 2, PLAIN)
    for chosen in ("auto", "numba"):
        one_line(dnc_scan.refusal(state, PLAIN, chosen), "pip install numba")


@numba_only
@pytest.mark.parametrize("kind", ["one row of state", "one row of interface", "other width",
                                  "other heads", "links not in options", "links not in state",
                                  "masks not in options"])
def test_dnc_scan_reads_nothing_beyond_its_inputs(kind, backend):
    """Inputs that do not fit together, for which compiled code has no bounds: an error, or the
    loop's values where the loop takes them. Not numbers from whatever lies behind an array."""
    options = PLAIN if kind.endswith("not in options") else LINKS_WIPE
    made_for = {"links not in state": PLAIN, "masks not in options": DNCOptions(mask_min=0.1)}.get(
        kind, LINKS_WIPE)
    x, state = make_case(backend, made_for, 132, sizes=(2, 3, 4, 3, 2))
    if kind == "one row of state":
        state = DNCState(*(field[:1].clone() for field in state))
    if kind == "one row of interface":
        x = Interface(*(None if part is None else part[:1].clone() for part in x))
    if kind == "other width":
        state = state._replace(memory=state.memory[:, :, :2].clone())
    if kind == "other heads":
        state = state._replace(read_weights=state.read_weights[:, :1].clone())

    def outcome(function):
        try:
            return named(function(x, state, options))
        except Exception as error:  # noqa: BLE001, any error is better than wrong numbers
            return error

    want, got = outcome(dnc_loop), outcome(fused(backend))
    if isinstance(got, Exception):
        assert isinstance(got, ValueError | RuntimeError), repr(got)
        return
    assert not isinstance(want, Exception), f"the loop refuses: {want!r}"
    assert_near(got, want, 1e-9, "value of")


@pytest.fixture
def fresh_gpt2(monkeypatch):
    """A second copy of dnc_gpt2 that has not said yet what it says once."""
    spec = importlib.util.spec_from_file_location("fresh_dnc_gpt2", dnc_gpt2.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_dnc_memory_auto_falls_back_with_one_line(fresh_gpt2, capsys):
    """Options that only the loop has: its results, and one line over many calls."""
    module = fresh_gpt2.DNCMemory(8, 4, 3, 2, fresh_gpt2.DNCOptions(mask_min=0.1), scan="auto")
    eager = fresh_gpt2.DNCMemory(8, 4, 3, 2, fresh_gpt2.DNCOptions(mask_min=0.1), scan="eager")
    eager.load_state_dict(module.state_dict())
    h = torch.randn(2, 5, 8)
    eager_results = eager(h, eager.init_state(2))
    assert capsys.readouterr() == ("", "")  # asked for, so not worth a line
    for _ in range(3):
        results = module(h, module.init_state(2))
        assert torch.equal(results[1].memory, eager_results[1].memory)
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).splitlines()
    assert len(lines) == 1 and "mask_min" in lines[0] and "scan" in lines[0], lines


@numba_only
def test_dnc_memory_auto_says_nothing_where_fused(fresh_gpt2, capsys, backend):
    """No line without a downgrade."""
    module = fresh_gpt2.DNCMemory(8, 4, 3, 2, scan="auto")
    module(torch.randn(2, 5, 8), module.init_state(2))
    assert capsys.readouterr() == ("", "")


def test_dnc_memory_auto_falls_back_without_numba(fresh_gpt2, capsys, monkeypatch):
    """One line with the command that installs it."""
    monkeypatch.setattr(cpu, "MISSING", "pip install numba")
    module = fresh_gpt2.DNCMemory(8, 4, 3, 2, scan="auto")
    torch.nn.init.normal_(module.read_proj.weight)
    h = torch.randn(2, 5, 8)
    for _ in range(3):
        h_out, _, _ = module(h, module.init_state(2))
    assert not torch.equal(h_out, h)
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).splitlines()
    assert len(lines) == 1 and "pip install numba" in lines[0], lines


@pytest.mark.parametrize("options", EAGER_ONLY, ids=option_id)
def test_dnc_memory_fused_raises_where_refused(options):
    """Asked for by name, the fused recurrence is not replaced in silence."""
    module = DNCMemory(8, 4, 3, 2, options, scan="fused")
    with pytest.raises(ValueError, match="scan") as error:
        module(torch.randn(2, 5, 8), module.init_state(2))
    assert "\n" not in str(error.value).strip()
    assert "mask_min" in str(error.value) or "sharpen_links" in str(error.value)


def test_dnc_memory_fused_raises_without_numba(monkeypatch):
    """The same where what is missing is numba."""
    monkeypatch.setattr(cpu, "MISSING", "pip install numba")
    module = DNCMemory(8, 4, 3, 2, scan="fused")
    with pytest.raises(ValueError, match="scan") as error:
        module(torch.randn(2, 5, 8), module.init_state(2))
    assert "pip install numba" in str(error.value)
