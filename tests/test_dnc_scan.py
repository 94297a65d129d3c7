"""Tests of the fused DNC recurrence, dnc_scan, against the readable dnc_loop.

Values and gradients are compared with the loop in float64; the loop itself, what its switches mean
and what a carried state is, are tested in test_dnc_memory.py, against an oracle. Among near-ties of
the usage rounding decides the free list, and single weightings may then differ by half: so the loop
takes the free list that the fused recurrence used, after a check that it ascends. Where only the
reads are compared, the loop chooses its own.

Triton runs in its interpreter on the CPU, milliseconds to tens of them a step: its shapes are tiny,
and a checkpoint every 2 steps instead of 16 gives them chunk borders all the same.

B batch, T time, C hidden width, N memory slots, W word width, R read heads, K key width.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import ROOT, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

import dnc_gpt2
import dnc_scan
from dnc_gpt2 import (
    EPS,
    DNCMemory,
    DNCOptions,
    DNCState,
    Interface,
    dnc_loop,
    interface_sizes,
    map_state,
    split_interface,
    usage_update,
    zero_state,
)
from dnc_scan import cpu, cuda, operator
from dnc_scan.layout import STATE

PLAIN = DNCOptions()
LINKS_WIPE = DNCOptions(use_links=True, dealloc_wipe=True)
POINTING = DNCOptions(key_width=2, usage_decay=0.9, empty_slot=True)
ALL = DNCOptions(use_links=True, dealloc_wipe=True, key_width=2, usage_decay=0.9, empty_slot=True)
# Each of the five switches alone or beside one other, and with all.
FUSED = {
    "plain": PLAIN,
    "links+wipe": LINKS_WIPE,
    "wipe+keys": DNCOptions(dealloc_wipe=True, key_width=2),
    "links+decay": DNCOptions(use_links=True, usage_decay=0.9),
    "empty": DNCOptions(empty_slot=True),
    "pointing": POINTING,
    "all": ALL,
}
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
every_fused = pytest.mark.parametrize("options", FUSED.values(), ids=FUSED.keys())
plain_and_all = pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
# Where both in the interpreter take too long: there only all options together.
plain_and_all_on_numba = pytest.mark.parametrize("backend,options", [
    pytest.param(*NUMBA.values, PLAIN, marks=NUMBA.marks, id="numba-plain"),
    pytest.param(*NUMBA.values, ALL, marks=NUMBA.marks, id="numba-all"),
    pytest.param(*TRITON.values, ALL, marks=TRITON.marks, id="triton-all")])


@pytest.fixture(autouse=True)
def short_chunks(request, monkeypatch):
    """Triton's T of 3 to 5 steps spans several chunks."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "triton":
        monkeypatch.setattr(operator, "CHECKPOINT_EVERY", 2)


# ══ Helpers ══════════════════════════════════════════════════════════════════════════════════════


def fused(backend):
    """dnc_scan with the backend chosen, called like dnc_loop."""
    return functools.partial(dnc_scan.dnc_scan, backend=backend)


def map_parts(function, x) -> Interface:
    """Apply a function to every part of an interface that is switched on."""
    return Interface(*(None if part is None else function(part) for part in x))


def random_interface(draw, B, T, W, R, options, scale=1.5) -> Interface:
    """float64, of raw values so wide that gates move over most of their range."""
    I = sum(interface_sizes(W, R, options).values())  # noqa: E741, the interface width
    z = scale * torch.randn(B, T, I, generator=draw, dtype=torch.float64)
    return halved(split_interface(z, W, R, options), options)


def halved(x, options) -> Interface:
    """The interface with keys of key_width columns."""
    K = options.key_width or None
    return x._replace(write_key=x.write_key[..., :K], read_keys=x.read_keys[..., :K])


def random_state(draw, B, N, W, R, options) -> DNCState:
    """A carried state that some history could have left: weightings sum to at most one, links
    have a zero diagonal and row and column sums below one, two slots are exactly as unused."""
    like = {"generator": draw, "dtype": torch.float64}
    state = zero_state(B, N, W, R, options, torch.float64)
    usage = torch.rand(B, N, **like)
    usage[:, 0] = usage[:, -1]
    state = state._replace(
        memory=torch.randn(B, N, W, **like),
        usage=usage,
        write_weights=torch.randn(B, N, **like).softmax(-1) * torch.rand(B, 1, **like),
        read_weights=torch.randn(B, R, N, **like).softmax(-1),
    )
    if options.use_links:
        link = torch.rand(B, N, N, **like) / N * (1 - torch.eye(N))
        precedence = torch.randn(B, N, **like).softmax(-1) * torch.rand(B, 1, **like)
        state = state._replace(link=link, precedence=precedence)
    return state


def with_dtype(state, dtype) -> DNCState:
    """The state with its floating-point fields in that type."""
    return map_state(lambda field: field.to(dtype) if field.is_floating_point() else field, state)


def make_case(backend, options, seed=0, start="carried", sizes=None, dtype=torch.float64):
    """(interface, state); T spans several chunks."""
    B, T, N, W, R = sizes or {"numba": (2, 20, 5, 4, 2), "triton": (1, 3, 4, 3, 2)}[backend]
    draw = torch.Generator().manual_seed(seed)
    x = random_interface(draw, B, T, W, R, options)
    state = zero_state(B, N, W, R, options)
    if start == "carried":
        state = random_state(draw, B, N, W, R, options)
    return map_parts(lambda part: part.to(dtype), x), with_dtype(state, dtype)


def parts_of(x, state) -> dict[str, torch.Tensor]:
    """Every tensor of an interface, and of what of a state the recurrence computes with, that has
    elements, by name."""
    both = {**x._asdict(), **{f"state.{name}": getattr(state, name) for name in STATE}}
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
    fields = {f"state.{name}": getattr(state, name) for name in STATE}
    return {**sequences, **{name: field for name, field in fields.items() if field.numel()}}


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


def run(function, x, state, options, probes=None, wanted=None):
    """Values and gradients of a recurrence, both by name. `probes` names the outputs in the loss,
    `wanted` the inputs that require a gradient (all)."""
    leaves = {name: leaf for name, leaf in leaves_of(x, state).items()
              if wanted is None or name in wanted}
    outputs = named(function(*with_parts(x, state, leaves), options))
    probes = make_probes(outputs) if probes is None else probes
    slopes = gradients(loss_of(outputs, probes), leaves)
    return detached(outputs), slopes


def free_lists(x, state, values, options) -> list[torch.Tensor]:
    """The free list (B, N) of every step, from the weightings that a recurrence returned."""
    usage, w, wr = state.usage, state.write_weights, state.read_weights
    orders = []
    for t in range(x.write_gate.shape[1]):
        free_gates = x.free_gates[:, t].to(usage.dtype)
        usage, _ = usage_update(usage, w, wr, free_gates, options.usage_decay)
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
    with torch.no_grad():
        shapes = named(fused(backend)(x, state, options))
    probes = make_probes(shapes, outputs)
    values, slopes = run(fused(backend), x, state, options, probes, wanted)
    assert all(v.dtype == state.memory.dtype for v in values.values())
    with given_free_lists(free_lists(x, state, values, options)):
        true_values, true_slopes = run(dnc_loop, x, state, options, probes, wanted)
    assert_near(values, true_values, 1e-9, "value of")
    assert_near(slopes, true_slopes, 1e-8, "gradient of")
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
    ids = torch.zeros(h.shape[:2], dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h_out, after, trace = module(leaves["h"], state._replace(memory=leaves["memory"]), ids, h)
    values = {"h_out": h_out, **after._asdict(), **{f"trace.{k}": v
                                                    for k, v in trace._asdict().items()}}
    values = {k: v for k, v in values.items() if v.numel() and v.is_floating_point()}
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


@every_fused
@pytest.mark.parametrize("backend,start", [
    pytest.param(*NUMBA.values, "zero", marks=NUMBA.marks),
    pytest.param(*NUMBA.values, "carried", marks=NUMBA.marks),
    pytest.param(*TRITON.values, "carried", marks=TRITON.marks)])
def test_dnc_scan_matches_loop(backend, start, options):
    """Reads, both traces and every field of the state, and the gradients of every part of the
    interface and of the initial state, for a loss with a random probe on all of the first: sizes
    that are no powers of two, T that ends within a chunk."""
    sizes = {"numba": (2, 37, 7, 6, 3), "triton": (1, 3, 5, 6, 3)}[backend]
    x, state = make_case(backend, options, 60, start, sizes)
    slopes = assert_matches_loop(backend, x, state, options)
    assert len(slopes) == 13 + 3 * options.use_links + options.empty_slot
    for name, slope in slopes.items():
        assert slope.abs().max() > 1e-3 or start == "zero", name


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


@numba_only
def test_dnc_scan_returns_state_of_given_type(backend):
    """The state comes back as the NamedTuple that went in, whoever defined it, with the fields that
    the recurrence does not know."""
    OtherState = NamedTuple("OtherState", [(name, torch.Tensor) for name in DNCState._fields])
    x, state = make_case(backend, LINKS_WIPE, 53, sizes=(2, 3, 5, 3, 2))
    _, write_weights, read_weights, after = fused(backend)(x, OtherState(*state), LINKS_WIPE)
    assert type(after) is OtherState
    assert after.tokens is state.tokens and after.last is state.last
    assert torch.equal(after.write_weights, write_weights[:, -1])
    assert torch.equal(after.read_weights, read_weights[:, -1])


# ══ Gradients ════════════════════════════════════════════════════════════════════════════════════


# B, T, N, W, R: at chunk borders (16), one step, one slot, one column, one head, nine, many slots
SIZES = [(1, 1, 6, 4, 2), (1, 15, 5, 3, 1), (1, 16, 5, 3, 2), (2, 17, 5, 4, 2), (1, 63, 17, 60, 3),
         (1, 33, 17, 20, 8), (1, 9, 1, 4, 2), (2, 9, 6, 1, 2), (1, 5, 1, 1, 1), (1, 2, 130, 5, 9)]


@numba_only
@plain_and_all
@pytest.mark.parametrize("B,T,N,W,R", SIZES)
def test_dnc_scan_sizes_match_loop(B, T, N, W, R, options, backend):
    """Values and gradients at odd sizes; a memory of one column is all key."""
    options = options._replace(key_width=options.key_width if W > 2 else 0)
    x, state = make_case(backend, options, 61, "carried", (B, T, N, W, R))
    assert_matches_loop(backend, x, state, options)


@triton_only
@pytest.mark.parametrize("options,start,sizes", [
    (LINKS_WIPE, "zero", (1, 1, 1, 1, 1)), (ALL, "carried", (1, 2, 16, 16, 8)),
    (ALL, "zero", (1, 4, 17, 20, 1)), (ALL._replace(key_width=16), "carried", (1, 1, 16, 17, 1))])
def test_dnc_scan_triton_sizes_match_loop(options, start, sizes, backend):
    """One of everything, powers of two, sizes just above, one value column; T at a chunk border."""
    x, state = make_case(backend, options, 62, start, sizes)
    assert_matches_loop(backend, x, state, options)


@numba_only
@pytest.mark.parametrize("outputs", [
    "reads", "reads write_weights", "write_weights", "read_weights", "state.memory", "state.usage",
    "state.link", "state.precedence"])
def test_dnc_scan_gradients_of_some_outputs(outputs, backend):
    """The other outputs stay unused, their gradient None, and bring nothing in."""
    x, state = make_case(backend, ALL, 63)
    assert_matches_loop(backend, x, state, ALL, outputs=outputs.split())


@numba_only
@pytest.mark.parametrize("wanted", [{"write_vector"}, {"read_keys", "read_strengths"}, {"empty"},
                                    {"state.memory"}, {"free_gates", "state.read_weights"}],
                         ids=lambda names: "+".join(sorted(names)))
def test_dnc_scan_only_some_inputs_require_grad(wanted, backend):
    """The gradients asked for are right, whichever of the others are not."""
    x, state = make_case(backend, ALL, 64)
    slopes = assert_matches_loop(backend, x, state, ALL, wanted=wanted)
    assert set(slopes) == wanted and all(slope.any() for slope in slopes.values())


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
    x, state = make_case(backend, ALL, 66, dtype=torch.float32)
    short = map_parts(torch.Tensor.bfloat16, x)
    got, got_slopes = run(fused(backend), short, state, ALL)
    want, want_slopes = run(fused(backend), map_parts(torch.Tensor.float, short), state, ALL)
    assert_equal(got, want, "value of")
    assert all(value.dtype == torch.float32 for value in got.values())
    for name, part in parts_of(short, state).items():
        assert got_slopes[name].dtype == part.dtype
        # To a unit: Triton's interpreter cuts where GPUs round.
        torch.testing.assert_close(got_slopes[name], want_slopes[name].to(part.dtype), atol=1e-6,
                                   rtol=2**-7)


# ══ Extremes ═════════════════════════════════════════════════════════════════════════════════════


def extreme_case(kind, x, state, options):
    """One corner of the input space; what is not named stays random."""
    def filled(group, **values):
        present = {name: getattr(group, name) for name in values}
        return group._replace(**{name: torch.full_like(part, values[name])
                                 for name, part in present.items() if part is not None})

    if kind == "saturated":  # exact zeros and ones, of each some
        gates = ("erase", "write_gate", "allocation_gate", "free_gates")
        x = x._replace(**{name: getattr(x, name).round() for name in gates})
        if x.read_modes is not None:
            one_hot = torch.nn.functional.one_hot(x.read_modes.argmax(-1), 3)
            x = x._replace(read_modes=one_hot.to(x.read_modes.dtype))
        assert {0.0, 1.0} == set(x.erase.flatten().tolist())
    if kind.startswith("raw"):  # every raw value of the interface, as after a burst of lr
        (B, T, R), W = x.free_gates.shape, x.erase.shape[2]
        z = torch.full((B, T, sum(interface_sizes(W, R, options).values())), float(kind[4:]))
        x = halved(split_interface(z.to(x.erase.dtype), W, R, options), options)
    if kind == "shut":
        x = filled(x, write_gate=0.0)
    if kind == "open":  # every write goes to one slot in full, and frees what was read
        x = filled(x, write_gate=1.0, erase=1.0, allocation_gate=1.0, free_gates=1.0)
    if kind == "empty memory":
        state = filled(state, memory=0.0)
    if kind == "full memory":
        state = filled(state, usage=1.0)
    if kind == "equal usages":
        state = filled(state, usage=0.5, write_weights=0.0, read_weights=0.0)
    if kind == "strengths of 50":
        x = filled(x, write_strength=50.0, read_strengths=50.0)
    if kind == "zero keys":
        x = filled(x, write_key=0.0, read_keys=0.0)
    if kind == "large contents":
        x = x._replace(write_vector=x.write_vector * 1e3, write_key=x.write_key * 1e3)
    if kind == "all reads empty":
        x = filled(x, empty=200.0)
    return x, state


EXTREMES = ["saturated", "raw 50", "raw -50", "shut", "open", "empty memory", "full memory",
            "equal usages", "strengths of 50", "zero keys", "large contents", "all reads empty"]


@plain_and_all_on_numba
@pytest.mark.parametrize("kind", EXTREMES)
def test_dnc_scan_extremes_match_loop(kind, options, backend):
    """Values and gradients are finite there, and the loop's."""
    sizes = {"numba": (2, 20, 6, 4, 2), "triton": None}[backend]
    case = make_case(backend, options, 70, sizes=sizes)
    assert_matches_loop(backend, *extreme_case(kind, *case, options), options)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
@both_backends
@pytest.mark.parametrize("part", [
    "write_key", "write_vector", "erase", "write_gate", "allocation_gate", "read_keys",
    "free_gates", "empty", "state.memory"])
def test_dnc_scan_nan_stays_visible_in_its_row(part, backend):
    """The training loop stops at a loss that is not finite: a NaN that comes in shows in the reads
    of its row, as in the loop, and changes no bit of the other."""
    x, state = make_case(backend, ALL, 73, sizes=(2, 2, 4, 3, 2), dtype=torch.float32)
    clean, *_ = fused(backend)(x, state, ALL)
    parts = {name: value.clone() for name, value in parts_of(x, state).items()}
    parts[part][0] = math.nan
    reads, *_ = fused(backend)(*with_parts(x, state, parts), ALL)
    assert dnc_loop(*with_parts(x, state, parts), ALL)[0][0, -1].isnan().all()
    assert reads[0, -1].isnan().all() and torch.equal(reads[1], clean[1])


@numba_only
@plain_and_all
def test_dnc_scan_float32_stays_finite_over_4096_steps(options, backend):
    """64 segments of 64 steps, memory carried, each with its backward."""
    B, T, N, W, R = 1, 64, 16, 12, 2
    draw, state = torch.Generator().manual_seed(72), zero_state(B, N, W, R, options)
    largest = 0.0
    for segment in range(64):
        x = map_parts(lambda part: part.float().requires_grad_(),
                      random_interface(draw, B, T, W, R, options, scale=3.0))
        state = map_state(lambda field: field.detach(), state)
        state.memory.requires_grad_(), state.usage.requires_grad_()
        *sequences, after = fused(backend)(x, state, options)
        values = [*sequences, *(getattr(after, name) for name in STATE)]
        leaves = [part for part in x if part is not None] + [state.memory, state.usage]
        slopes = torch.autograd.grad(sum(value.square().sum() for value in values), leaves)
        assert all(torch.isfinite(value).all() for value in (*values, *slopes)), segment
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
    return torch.cat([part + 1, part, part - 1], -1)[..., part.shape[-1] : -part.shape[-1]]


def expanded(part):
    """The first row in every row's place, without a copy."""
    return part[:1].expand(part.shape)


@both_backends
@pytest.mark.parametrize("layout,plain", [(transposed, torch.clone), (sliced, torch.clone),
                                          (expanded, lambda part: expanded(part).clone())])
def test_dnc_scan_takes_any_layout(layout, plain, backend):
    """Transposed storage, slices of one tensor, and rows expanded without a copy."""
    sizes = {"numba": (3, 18, 5, 4, 2), "triton": (2, 2, 4, 3, 2)}[backend]
    x, state = make_case(backend, ALL, 80, sizes=sizes)
    results = []
    for function in (layout, plain):
        leaves = leaves_of(x, state)
        inputs = with_parts(x, state, {name: function(leaf) for name, leaf in leaves.items()})
        outputs = named(fused(backend)(*inputs, ALL))
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


@plain_and_all_on_numba
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


@numba_only
@pytest.mark.parametrize("part", ["write_vector", "memory"])
def test_dnc_scan_forward_mode_is_not_silently_zero(part, backend):
    """The loop has a derivative along a tangent. The fused recurrence says that it has none."""
    x, state = make_case(backend, PLAIN, 86, sizes=(1, 3, 4, 3, 2))
    point = getattr(x if part in x._fields else state, part)

    def reads_by(scan, value):
        where = x._replace(**{part: value}) if part in x._fields else x
        start = state if part in x._fields else state._replace(**{part: value})
        return scan(where, start, PLAIN)[0]

    along = (torch.ones_like(point),)
    _, slope = torch.func.jvp(functools.partial(reads_by, dnc_loop), (point,), along)
    assert slope.abs().max() > 1e-3
    with pytest.raises(ValueError, match="forward-mode.*eager"):
        torch.func.jvp(functools.partial(reads_by, fused(backend)), (point,), along)


@plain_and_all_on_numba
def test_dnc_scan_rows_are_isolated(options, backend):
    """Another text in row 0 changes no bit of row 1, whose loss has no gradient in row 0."""
    sizes = {"numba": (3, 20, 5, 4, 2), "triton": (2, 3, 4, 3, 2)}[backend]
    x, state = make_case(backend, options, 87, sizes=sizes)
    other, _ = make_case(backend, options, 88, sizes=sizes)
    others = iter(part for part in other if part is not None)
    mixed = map_parts(lambda part: torch.cat([next(others)[:1], part[1:]]), x)
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
    cases = [(*make_case(backend, options, 91, sizes=(3, 33, 9, 8, 2), dtype=torch.float32),
              options) for options in (PLAIN, LINKS_WIPE, POINTING, ALL)]
    with ThreadPoolExecutor(len(cases)) as pool:
        waiting = [pool.submit(lambda case=case: [run(fused(backend), *case) for _ in range(10)])
                   for case in cases]
    for case, results in zip(cases, waiting, strict=True):
        alone = run(fused(backend), *case)
        for values, slopes in results.result():
            assert_equal(values, alone[0], "value of")
            assert_equal(slopes, alone[1], "gradient of")


# ══ The bits of a fresh machine ══════════════════════════════════════════════════════════════════

PRINT_BITS = """
import hashlib, torch
from dnc_gpt2 import DNCOptions, interface_sizes, split_interface, zero_state
from dnc_scan import dnc_scan
torch.set_num_threads(1)
for B, T, N, W, R, K in SIZES:
    options = DNCOptions(key_width=K, usage_decay=0.96, empty_slot=True)
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(B, T, sum(interface_sizes(W, R, options).values()), generator=draw)
    x = split_interface(z.requires_grad_(), W, R, options)
    x = x._replace(write_key=x.write_key[..., :K], read_keys=x.read_keys[..., :K])
    memory = torch.randn(B, N, W, generator=draw, requires_grad=True)
    state = zero_state(B, N, W, R, options)._replace(memory=memory)
    reads, w, wr, after = dnc_scan(x, state, options, "numba")
    loss = sum(value.square().sum() for value in (reads, w, wr, *after[:6]))
    for tensor in (reads, *torch.autograd.grad(loss, (z, memory))):
        print(hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest())
""".replace("SIZES", "((8, 64, 32, 64, 4, 32), (8, 64, 16, 16, 4, 8), (3, 17, 11, 7, 3, 3))")


@numba_only
def test_every_kernel_that_another_calls_is_inlined(backend):
    """Or the process that compiles rounds otherwise than those that load what it compiled."""
    kernels = {name for name, value in vars(cpu).items() if hasattr(value, "targetoptions")}
    inlined = {name for name in kernels if getattr(cpu, name).targetoptions["forceinline"]}
    assert kernels - inlined == {"forward_rows", "backward_rows"}
    assert {"content_backward", "dot"} <= inlined


@pytest.mark.slow
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
    assert len(set(printed[0])) == 9
    assert printed[1] == printed[0]


# ══ torch.compile and torch.library ══════════════════════════════════════════════════════════════


@numba_only
def test_dnc_memory_compiles_without_graph_break(backend):
    """The module as the model calls it, its projections and its trace included, at two lengths."""
    torch._dynamo.reset()
    module = fused_memory(ALL)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled.named_parameters = module.named_parameters  # the same names
    for length in (18, 33):
        h, state = torch.randn(2, length, 8), module.init_state(2)
        want, want_slopes = train_memory(module, h, state)
        got, got_slopes = train_memory(compiled, h, state)
        assert_near(got, want, 1e-5, "value of")
        assert_near(got_slopes, want_slopes, 1e-4, "gradient of")
    torch._dynamo.reset()


@plain_and_all_on_numba
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
def test_dnc_scan_saves_a_third_of_the_loop(options, backend, monkeypatch):
    """Checkpoints and weightings in place of every step's memory (and links); and twice the
    distance, half of the checkpoints: CHECKPOINT_EVERY is what the backward uses."""
    length = 64
    x, state = make_case(backend, options, 110, "zero", (2, length, 32, 64, 4),
                         dtype=torch.float32)
    loop = saved_bytes(dnc_loop, x, state, options)
    scan = saved_bytes(fused(backend), x, state, options)
    assert loop > length * state.memory.nbytes  # the loop keeps at least each step's memory
    assert 0 < scan < loop / 3

    monkeypatch.setattr(operator, "CHECKPOINT_EVERY", 2 * operator.CHECKPOINT_EVERY)
    checkpoint = state.memory.nbytes + state.link.nbytes
    spared = length / operator.CHECKPOINT_EVERY * checkpoint
    gained = scan - saved_bytes(fused(backend), x, state, options)
    assert math.isclose(gained, spared, rel_tol=0.3)


# ══ The module and its setting ═══════════════════════════════════════════════════════════════════


@numba_only
@plain_and_all
@pytest.mark.parametrize("autocast", [False, True])
def test_dnc_memory_fused_matches_eager(autocast, options, backend):
    """Outputs, trace, state and the gradients of h, of the carried memory and of every parameter,
    also under bfloat16 autocast, where the recurrence stays in float32."""
    draw = torch.Generator().manual_seed(120)
    h = torch.randn(2, 18, 8, generator=draw)
    state = with_dtype(random_state(draw, 2, 6, 4, 2, options), torch.float32)
    eager = fused_memory(options, "eager")
    state = state._replace(last=eager.init_state(2).last)
    want, want_slopes = train_memory(eager, h, state, autocast)
    with mock.patch.object(dnc_gpt2, "dnc_loop", refuse_loop):
        for scan in ("fused", "auto"):
            got, slopes = train_memory(fused_memory(options, scan), h, state, autocast)
            assert all(got[name].dtype == torch.float32 for name in STATE if name in got)
            assert_near(got, want, 1e-4 if not autocast else 2e-2, "value of")
            assert_near(slopes, want_slopes, 1e-3 if not autocast else 2e-2, "gradient of")
            for name in ("read_proj.weight", "h", "memory"):
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

    h, ids = torch.randn(1, 3, tiny_config().hidden_size), torch.zeros(1, 3, dtype=torch.int64)
    for scan, forbidden in (("eager", "dnc_scan"), ("fused", "loop"), ("auto", "loop")):
        module = dnc_gpt2.build_memory(tiny_config(scan=scan))
        where = (dnc_scan, "dnc_scan") if forbidden == "dnc_scan" else (dnc_gpt2, "dnc_loop")
        with mock.patch.object(*where, refuse_loop):
            module(h, module.init_state(1), ids, h, vocabulary=h[0])


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
@plain_and_all
def test_refusal_is_empty_where_the_scan_runs(options, backend):
    """Float32 at the sizes of both presets and at the limits; on the CPU beyond, in float64."""
    sizes = [(64, 128, 4), (32, 64, 4), (1, 1, 1), (128, 128, 8), (64, 256, 1)]
    if not options.use_links:
        sizes += [(256, 128, 8), (128, 256, 1)]
    for N, W, R in sizes:
        assert dnc_scan.refusal(zero_state(1, N, W, R, options), options, backend) == ""
    if backend == "numba":
        for chosen in ("auto", backend):
            state = zero_state(1, 300, 300, 9, options, torch.float64)
            assert dnc_scan.refusal(state, options, chosen) == ""


@triton_only
@pytest.mark.parametrize("N,W,R,options,limit", [
    (257, 4, 1, PLAIN, "256"), (1024, 128, 4, POINTING, "256"), (4, 257, 1, PLAIN, "256"),
    (129, 256, 1, POINTING, "32768"), (4, 4, 9, PLAIN, "8"), (129, 4, 1, LINKS_WIPE, "128"),
    (128, 129, 1, LINKS_WIPE, "16384")])
def test_refusal_names_the_limit(N, W, R, options, limit, backend):
    """Each size beyond what the kernels hold, and dnc_scan raises the same line."""
    state = zero_state(1, N, W, R, options)
    reason = dnc_scan.refusal(state, options, backend)
    one_line(reason, limit)
    x, _ = make_case("numba", options, 131, sizes=(1, 1, N, W, R), dtype=torch.float32)
    with pytest.raises(ValueError) as error:
        dnc_scan.dnc_scan(x, state, options, backend=backend)
    assert str(error.value) == reason


@triton_only
@plain_and_all
def test_trial_runs_both_kernels_once(options, backend, monkeypatch):
    """What asks a GPU whether it can: nothing to say where the kernels run, else one line."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert cuda.trial(torch.device("cpu"), 5, 6, 3, options) == ""
    monkeypatch.setattr(cuda, "triton_backward", refuse_loop)
    cuda.trial.cache_clear()
    one_line(cuda.trial(torch.device("cpu"), 5, 6, 3, options), "AssertionError", "CUDA kernels")
    cuda.trial.cache_clear()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "triton_forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            cuda.trial(torch.device("cpu"), 5, 6, 3, options)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert cuda.trial(torch.device("cpu"), 5, 6, 3, options) == ""  # a card is full for a moment
    cuda.trial.cache_clear()


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


def first_row(part):
    return part[:1].clone()


MISFITS = {
    "one row of state": lambda x, state: (x, map_state(first_row, state)),
    "one row of interface": lambda x, state: (map_parts(first_row, x), state),
    "other width": lambda x, state: (x, state._replace(memory=state.memory[:, :, :2].clone())),
    "other heads": lambda x, state: (x, state._replace(read_weights=state.read_weights[:, :1])),
}


@numba_only
@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS.keys())
def test_dnc_scan_reads_nothing_beyond_its_inputs(misfit, backend):
    """Inputs that do not fit together, for which compiled code has no bounds, are refused."""
    case = make_case(backend, ALL, 132, sizes=(2, 3, 4, 3, 2))
    with pytest.raises(ValueError, match="must be"):
        fused(backend)(*misfit(*case), ALL)


@numba_only
@pytest.mark.parametrize("made_for,given", [
    (PLAIN, LINKS_WIPE), (LINKS_WIPE, PLAIN), (MASKED, PLAIN), (FUSED["empty"], PLAIN),
    (PLAIN, FUSED["empty"]), (PLAIN, FUSED["wipe+keys"]), (FUSED["wipe+keys"], PLAIN),
    (PLAIN, DNCOptions(key_width=3))])
def test_dnc_scan_refuses_parts_of_other_options(made_for, given, backend):
    """A part that the options do not have, one that they miss, keys of another width, and keys as
    wide as a row, which leave nothing to read."""
    x, state = make_case(backend, made_for, 133, sizes=(2, 3, 4, 3, 2))
    with pytest.raises(ValueError, match="must be"):
        fused(backend)(x, state, given)


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
