"""Tests of the DNC recurrence in dnc_gpt2.py against the NumPy float64 oracle and its invariants.

Values and gradients come from tests/oracle.py, written from the equations without a look at the
implementation. Properties that need no oracle (sums, ranges, isolation of rows) are tested beside
it, so that a mistake made in both readings would still show. test_head.py has the pointer.

B batch, T time, C hidden width, N memory slots, W word width, K key width, R read heads,
I interface width, V vocabulary.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    central_differences,
    dnc_oracle,
    dnc_over_parts,
    layer_norm,
    row_parts,
    split_vector,
)
from oracle import tokens_held as oracle_tokens_held
from oracle import zero_state as oracle_zero_state

import dnc_gpt2
from dnc_gpt2 import (
    DNCMemory,
    DNCOptions,
    DNCState,
    Interface,
    allocation_weighting,
    content_weighting,
    dnc_loop,
    empty_some_rows,
    interface_sizes,
    link_update,
    point,
    split_interface,
    tokens_held,
    usage_update,
    zero_state,
)

EPS = 1e-6
DECAY = 0.9
PLAIN = DNCOptions()
SPLIT = DNCOptions(key_width=2, usage_decay=DECAY, empty_slot=True)  # as the model is shipped
LINKED = DNCOptions(use_links=True, mask_min=0.1, sharpen_links=True, usage_decay=DECAY)
# Six that hold every pair of switches, both on, one on and both off, where both may be: sharpening
# needs links, and masks are for rows that are not split.
COMBINATIONS = [
    PLAIN,
    SPLIT,
    LINKED,
    DNCOptions(mask_min=0.1, dealloc_wipe=True, empty_slot=True),
    DNCOptions(use_links=True, dealloc_wipe=True, sharpen_links=True, key_width=2, empty_slot=True),
    DNCOptions(use_links=True, dealloc_wipe=True, key_width=2, usage_decay=DECAY),
]


def switches(options: DNCOptions) -> dict[str, bool]:
    """Which of the seven are on, by their short names."""
    names = ("links", "mask", "wipe", "sharpen", "key", "decay", "empty")
    on = [value != off for value, off in zip(options, PLAIN, strict=True)]
    return dict(zip(names, on, strict=True))


def option_id(options: DNCOptions) -> str:
    """Readable test id: the switches that are on."""
    return "+".join(name for name, on in switches(options).items() if on) or "plain"


def over(*options: DNCOptions):
    """Run a test with each of these options."""
    return pytest.mark.parametrize("options", options, ids=option_id)


every_combination = over(*COMBINATIONS)
plain_and_further = over(PLAIN, LINKED, SPLIT)


def test_combinations_hold_every_pair_of_switches():
    seen = {pair for options in COMBINATIONS
            for pair in itertools.combinations(switches(options).items(), 2)}
    names = list(switches(PLAIN))
    for first, second in itertools.combinations(names, 2):
        for values in itertools.product((False, True), repeat=2):
            pair = tuple(zip((first, second), values, strict=True))
            lonely_sharpening = pair == (("links", False), ("sharpen", True))
            masked_halves = pair == (("mask", True), ("key", True))
            assert pair in seen or lonely_sharpening or masked_halves, pair


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads, and threads that wait for a busy core cost a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ══ Helpers ══════════════════════════════════════════════════════════════════════════════════════


def random_z(rng, B, T, W, R, options, scale=1.5):
    """Raw interface vectors (B, T, I), wide enough that gates move over most of their range. A part
    that two options share is drawn the same for both."""
    draws = interface_sizes(W, R, DNCOptions(True, 0.1, True, True, 0, DECAY, True))
    sizes = interface_sizes(W, R, options)
    parts = [rng.normal(0.0, scale, (B, T, draws[name]))[..., :size]
             for name, size in sizes.items()]
    return np.concatenate(parts, axis=-1)


def part_slices(W, R, options) -> dict[str, slice]:
    """Where each part lies in a raw interface vector."""
    sizes = interface_sizes(W, R, options)
    ends = np.cumsum(list(sizes.values()))
    return {name: slice(end - size, end)
            for (name, size), end in zip(sizes.items(), ends, strict=True)}


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


def to_torch(state, dtype=torch.float64, last=None) -> DNCState:
    """An oracle state as DNCState, in which no slot holds a token; without links the fields of the
    links are empty, without `last` (B, C) so is that."""
    B, N, _ = state["memory"].shape
    empty = {"link": np.zeros((B, 0, 0)), **dict.fromkeys(("precedence", "last", "hidden"),
                                                          np.zeros((B, 0)))}
    if last is not None:
        empty["last"] = last
    fields = {k: torch.tensor(v, dtype=dtype) for k, v in {**empty, **state}.items()}
    return DNCState(**fields, tokens=torch.full((B, N), -1))


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
        usage, _ = usage_update(usage, w, wr, free_gates[:, t], options.usage_decay)
        w64, wr64 = w.double().numpy(), wr.double().numpy()
        psi = np.prod(1 - free_gates[:, t].double().numpy()[..., None] * wr64, axis=1)  # (B, N)
        usage64 = options.usage_decay * (usage64 + w64 - usage64 * w64) * psi
        np.testing.assert_allclose(usage.double().numpy(), usage64, atol=1e-6, rtol=0)

        shifted = (EPS + (1 - EPS) * usage).numpy()
        order = np.argsort(shifted, axis=-1, kind="stable")
        ranked = np.take_along_axis(shifted, order, -1)
        assert np.all(np.diff(ranked) >= 0)
        assert np.all((np.diff(ranked) > 0) | (np.diff(order) > 0))  # exact tie: lowest slot first
        orders.append(order)
        w, wr = write_weights[:, t], read_weights[:, t]
    return np.stack(orders, axis=1)  # (B, T, N)


def assert_matches_oracle(z, start, W, R, options, dtype=torch.float64):
    """dnc_loop from an oracle state: in float64 every result within 1e-9 of the oracle's, in
    float32 the reads within 1e-4, given the free list that float32 chose."""
    state, z = to_torch(start, dtype), torch.tensor(z, dtype=dtype)
    reads, write_weights, read_weights, after = run_path(z, state, W, R, options)
    assert all(x.dtype == dtype for x in (reads, write_weights, read_weights, after.memory))
    orders = path_orders(z, state, write_weights, read_weights, W, R, options)
    start = {name: getattr(state, name).double().numpy() for name in start}  # as rounded
    want = dnc_oracle(z.double().numpy(), start, W, R, **options._asdict(), orders=orders)
    assert np.abs(want[0]).max() > 0.1  # reads that say something
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    close = {"atol": tolerance, "rtol": tolerance}
    assert reads.shape == want[0].shape
    np.testing.assert_allclose(reads.numpy(), want[0], err_msg="reads", **close)
    if dtype == torch.float64:
        np.testing.assert_allclose(write_weights, want[1], err_msg="write weights", **close)
        np.testing.assert_allclose(read_weights, want[2], err_msg="read weights", **close)
        for name, value in want[3].items():
            np.testing.assert_allclose(getattr(after, name), value, err_msg=name, **close)


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
        "read_masks": None, "sharpening": None, "empty": None,
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


class Case:
    """A DNCMemory with no parameter at its initial value, h (B, T, C), tokens (B, T) and a table
    (V, C) of their embeddings. Its writes are firm enough that slots hold tokens."""

    def __init__(self, options, dtype=torch.float32, B=2, T=9, C=8, N=5, W=4, R=2, V=11, **more):
        torch.manual_seed(4)
        self.sizes, self.options = (B, T, C, N, W, R), options
        self.module = DNCMemory(C, N, W, R, options, scan="eager", **more).to(dtype)
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
        if options.key_width:
            torch.nn.init.constant_(self.module.interface.gates.bias[:2], 3.0)
        else:
            gates = part_slices(W, R, options)
            for name in ("write_gate", "allocation_gate"):
                torch.nn.init.constant_(self.module.interface.bias[gates[name]], 3.0)
        self.h = torch.randn(B, T, C, dtype=dtype)
        self.tokens = torch.randint(V, (B, T))
        self.table = torch.randn(V, C, dtype=dtype)

    def run(self, h=None, state=None, tokens=None):
        """h_out, state and trace; what is not given is the case's own, and an empty memory."""
        h = self.h if h is None else h
        tokens = self.tokens if tokens is None else tokens
        state = self.module.init_state(len(h)) if state is None else state
        return self.module(h, state, tokens, self.table[tokens], self.table)

    def carried(self) -> DNCState:
        """The state after the case's own tokens, without its graph."""
        with torch.no_grad():
            return self.run()[1]

    def instructions(self, state) -> Interface:
        """What the memory is told, as its interface gives it on the way through the module."""
        seen = []
        hook = self.module.interface.register_forward_hook(lambda *args: seen.append(args[-1]))
        with torch.no_grad():
            self.run(state=state)
        hook.remove()
        return seen[0]

    def parts_by_hand(self, state, row_key="previous") -> list[list[dict]]:
        """The oracle's reading of the same: parts[b][t] of oracle.dnc_over_parts."""
        B, T, _, _, W, R = self.sizes
        p = {name.removeprefix("interface."): value.detach().numpy()
             for name, value in self.module.named_parameters()}
        raw = self.options._replace(usage_decay=1.0)._asdict()
        raw = {name: raw[name] for name in raw if name not in ("usage_decay", "dealloc_wipe")}
        parts = []
        for b in range(B):
            before, row = state.last[b].numpy(), []
            for t in range(T):
                normed = layer_norm(self.h[b, t].numpy(), p["norm.weight"], p["norm.bias"])
                embedding = self.table[self.tokens[b, t]].numpy()
                if self.options.key_width:
                    row.append(row_parts(p, R, normed, before, embedding, row_key))
                else:
                    row.append(split_vector(p["weight"] @ normed + p["bias"], W, R, **raw))
                before = normed
            parts.append(row)
        return parts


def everything(results) -> list[torch.Tensor]:
    """All tensors with an element of a module's h_out, state and trace, without their graph."""
    h_out, state, trace = results
    return [x.detach() for x in (h_out, *state, *trace) if x.numel()]


# ══ Interface ════════════════════════════════════════════════════════════════════════════════════


@every_combination
def test_split_interface_matches_oracle(options):
    """Order of the parts, their activations and shapes; absent parts are None."""
    B, T, W, R = 2, 3, 5, 3
    z = random_z(np.random.default_rng(1), B, T, W, R, options, scale=4.0)
    raw = {k: v for k, v in options._asdict().items() if k not in ("usage_decay", "dealloc_wipe")}
    got = split_interface(torch.tensor(z), W, R, options)
    want = [[split_vector(z[b, t], W, R, **raw) for t in range(T)] for b in range(B)]
    assert_same_instructions(got, want)


def assert_same_instructions(got: Interface, want: list[list[dict]]) -> None:
    """Every part of every token within 1e-12 of the oracle's."""
    got = {name: part for name, part in got._asdict().items() if part is not None}
    assert set(got) == set(want[0][0])
    for name, part in got.items():
        page = np.array([[step[name] for step in row] for row in want])
        assert part.shape == page.shape, name
        np.testing.assert_allclose(part.numpy(), page, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("row_key", ["previous", "own"])
@over(SPLIT, *(o for o in COMBINATIONS if o.key_width and o.use_links))
def test_row_interface_matches_page(options, row_key):
    """Key of LN(h_t-1), the carried one at the first token, value of e(x_t), gates and erase of
    both, read keys and empty slot of LN(h_t), unit length, strengths apart from the token."""
    case = Case(options, torch.float64, row_key=row_key)
    for state in (case.module.init_state(2), case.carried()):
        x = case.instructions(state)
        assert_same_instructions(x, case.parts_by_hand(state, row_key))
        np.testing.assert_allclose(x.read_keys.norm(dim=-1), 1.0, atol=1e-12)
    other = case.parts_by_hand(state, "own" if row_key == "previous" else "previous")
    other = np.array([[step["write_key"] for step in row] for row in other])
    assert np.abs(x.write_key.numpy() - other).max() > 0.5


def test_row_interface_starts_at_measured_values():
    """Gates and erase do not depend on the token yet; every head asks in the code of the rows."""
    torch.manual_seed(0)
    K, N, R = 4, 64, 3
    module = DNCMemory(8, N, 10, R, DNCOptions(key_width=K, empty_slot=True))
    x = module.interface(*torch.randn(3, 2, 5, 8))
    for part, value in ((x.write_gate, 0.88), (x.allocation_gate, 0.98), (x.free_gates, 0.02),
                        (x.erase, 0.98), (x.read_strengths, 16.0), (x.write_strength, 16.0),
                        (x.empty, 1.4 * 16.0)):
        torch.testing.assert_close(part, torch.full_like(part, value), atol=5e-3, rtol=0)
    row_key = module.interface.row_key.weight
    torch.testing.assert_close(row_key @ row_key.T, torch.eye(K), atol=1e-6, rtol=0)
    for head in module.interface.read_key.weight.split(K):
        assert torch.equal(head, row_key)


def test_untrained_pointer_finds_what_followed_the_same_state():
    """The state of token 3 comes back at token 8: reads then point at what followed it, token 4."""
    torch.manual_seed(1)
    module = DNCMemory(16, 12, 16, 2, DNCOptions(key_width=8, empty_slot=True), scan="eager")
    h, tokens, table = torch.randn(1, 9, 16), torch.arange(9).unsqueeze(0), torch.randn(9, 16)
    h[0, 8] = h[0, 3]
    _, _, trace = module(h, module.init_state(1), tokens, table[tokens])
    pointer = point(trace).rows(8)
    assert pointer.tokens[pointer.weights.argmax()] == 4
    with torch.no_grad():
        module.interface.empty.bias.fill_(-100.0)  # the same without the empty slot: it is sure
    _, _, trace = module(h, module.init_state(1), tokens, table[tokens])
    assert point(trace).rows(8).weights.max() > 0.9


# ══ Values against the oracle ════════════════════════════════════════════════════════════════════


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start,B,T,N,W,R", [("zero", 3, 7, 5, 3, 2), ("carried", 1, 13, 17, 6, 3)])
def test_dnc_loop_matches_oracle(start, B, T, N, W, R, dtype, options):
    """Reads, both weightings and every field of the state to 1e-9; in float32 reads to 1e-4."""
    rng = np.random.default_rng(B + T)
    state = start_state(start, rng, B, N, W, R, options)
    assert_matches_oracle(random_z(rng, B, T, W, R, options), state, W, R, options, dtype)


@plain_and_further
def test_dnc_loop_strength_fifty_matches_oracle(options):
    """Sharp addressing (strengths near 50) is still the oracle's, values to 1e-9."""
    B, T, N, W, R = 2, 6, 5, 3, 2
    rng = np.random.default_rng(24)
    z, at = random_z(rng, B, T, W, R, options), part_slices(W, R, options)
    for name in ("write_strength", "read_strengths", "sharpening"):
        z[..., at[name]] = 49.0
    x = split_interface(torch.tensor(z), W, R, options)
    assert x.write_strength.min() > 49.9 and x.read_strengths.min() > 49.9
    assert_matches_oracle(z, random_state(rng, B, N, W, R, options), W, R, options)


@pytest.mark.parametrize("switch", PLAIN._fields)
def test_oracle_switch_changes_reads(switch):
    """Guards the comparison above: a switch that both sides ignored would pass it."""
    off = DNCOptions(use_links=True) if switch == "sharpen_links" else PLAIN
    value = {"mask_min": 0.1, "key_width": 2, "usage_decay": DECAY}.get(switch, True)
    results = []
    for options in (off, off._replace(**{switch: value})):
        rng = np.random.default_rng(2)  # the same parts and state for both
        z, state = random_z(rng, 1, 6, 4, 2, options), random_state(rng, 1, 4, 4, 2, options)
        results.append(dnc_oracle(z, state, 4, 2, **options._asdict())[2])
    assert np.abs(results[0] - results[1]).max() > 1e-3


@every_combination
def test_dnc_memory_matches_oracle(options):
    """The module is LayerNorm, interface, recurrence and h + read_proj(reads), heads in order; its
    trace and its state say what each slot holds and what came last."""
    case = Case(options, torch.float64)
    B, T, C, N, W, R = case.sizes
    rng = np.random.default_rng(4)
    start = random_state(rng, B, N, W, R, options)
    state = to_torch(start, last=rng.normal(size=(B, C)) if options.key_width else None)
    state = state._replace(tokens=torch.randint(-1, 11, (B, N)))
    with torch.no_grad():
        h_out, after, trace = case.run(state=state)

    parts = case.parts_by_hand(state)
    used = {k: v for k, v in options._asdict().items() if k not in ("mask_min", "empty_slot")}
    reads, write_weights, read_weights, end, _ = dnc_over_parts(parts, start, W, **used)
    held = oracle_tokens_held(case.tokens.numpy(), write_weights, state.tokens.numpy())
    proj = case.module.read_proj.weight.detach().numpy()  # (C, R * (W - K))
    close = {"atol": 1e-9, "rtol": 0}
    np.testing.assert_allclose(h_out, case.h.numpy() + reads.reshape(B, T, -1) @ proj.T, **close)
    np.testing.assert_allclose(trace.write_weights, write_weights, **close)
    np.testing.assert_allclose(trace.read_weights, read_weights, **close)
    gates = [[step["write_gate"] for step in row] for row in parts]
    np.testing.assert_allclose(trace.write_gate, gates, **close)
    np.testing.assert_array_equal(trace.tokens, held)
    np.testing.assert_array_equal(after.tokens, held[:, -1])
    assert len(set(held[:, -1].flatten())) > 3 and (held[:, 0] != held[:, -1]).any()
    for name, value in end.items():
        np.testing.assert_allclose(getattr(after, name), value, err_msg=name, **close)
    if options.key_width:
        p = case.module.norm
        last = [layer_norm(x, p.weight.detach().numpy(), p.bias.detach().numpy())
                for x in case.h[:, -1].numpy()]
        np.testing.assert_allclose(after.last, last, **close)


def surprisal_by_hand(h, token, table, common) -> float:
    """-log of a token's share of softmax(table h), over the first `common` and the token itself."""
    logits = table @ h
    counted = {*range(min(common, len(table))), int(token)}
    total = np.log(sum(np.exp(logits[entry]) for entry in counted))
    return total - logits[token]


def test_a_vocabulary_that_is_not_numbered_by_frequency_is_said(corpus, capsys, monkeypatch):
    say, config = dnc_gpt2.say_where_ids_are_not_by_frequency, tiny_config()
    say(config, corpus)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(dnc_gpt2, "COMMON", 10)
    rare = torch.tensor([3] + 9 * [200])
    say(config, corpus._replace(train=rare))
    printed = capsys.readouterr().out
    assert "10.0% of the training tokens" in printed and "2.3 nats low" in printed
    assert f"--min_surprisal {5.7 - np.log(10):.1f}" in printed
    say(tiny_config(min_surprisal=0.0), corpus._replace(train=rare))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("common", [1, 5, 1024])
def test_surprisal_is_minus_log_of_the_share_of_the_common_entries(common, monkeypatch):
    monkeypatch.setattr(dnc_gpt2, "COMMON", common)
    case = Case(PLAIN, torch.float64)
    found = dnc_gpt2.surprisal(case.h, case.tokens, case.table)
    wanted = [[surprisal_by_hand(h, token, case.table.numpy(), common)
               for h, token in zip(*row, strict=True)]
              for row in zip(case.h.numpy(), case.tokens.tolist(), strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [PLAIN, DNCOptions(key_width=2, empty_slot=True)],
                         ids=["plain", "key+empty"])
def test_dnc_memory_writes_only_what_was_not_expected(options):
    """The gate is the interface's where the token before left the surprisal, across segments too,
    and nothing else; what comes later changes no gate."""
    case = Case(options, torch.float64, min_surprisal=3.0)
    B, T, C, *_ = case.sizes
    case.h *= 0.5  # of less sure a controller
    state = case.carried()
    np.testing.assert_array_equal(state.hidden, case.h[:, -1])
    with torch.no_grad():
        _, _, trace = case.run(state=state)
    preceding = np.concatenate((state.hidden[:, None].numpy(), case.h[:, :-1].numpy()), axis=1)
    surprisal = np.array([[surprisal_by_hand(preceding[b, t], case.tokens[b, t],
                                             case.table.numpy(), 1024)
                           for t in range(T)] for b in range(B)])
    is_written = surprisal >= 3.0
    assert 0.2 < is_written.mean() < 0.9
    gates = case.instructions(state).write_gate.numpy()
    np.testing.assert_allclose(trace.write_gate, gates * is_written, atol=1e-12, rtol=0)
    assert (trace.write_weights.sum(-1).numpy() > 0).tolist() == is_written.tolist()

    parts, carried = [], state
    with torch.no_grad():
        for at in (slice(0, 4), slice(4, 5), slice(5, T)):
            _, carried, part = case.run(case.h[:, at], carried, case.tokens[:, at])
            parts.append(part.write_gate)
    np.testing.assert_allclose(torch.cat(parts, 1), trace.write_gate, atol=1e-12, rtol=0)


def test_tokens_held_is_last_write_above_half():
    """Against the loop of the oracle: exactly 1/2 is not a write, ids at the start are carried."""
    draw = torch.Generator().manual_seed(5)
    levels = torch.tensor([0.0, 0.25, 0.5, 0.5000001, 0.75, 1.0])
    write_weights = levels[torch.randint(6, (3, 8, 5), generator=draw)]
    write_weights[0, :, 0] = 0.5  # never written
    write_weights[0, :, 1] = torch.tensor([1.0] + [0.5] * 7)  # written once
    tokens = torch.randint(50, (3, 8), generator=draw)
    before = torch.randint(-1, 3, (3, 5), generator=draw)
    held = tokens_held(tokens, write_weights, before)
    want = oracle_tokens_held(tokens.numpy(), write_weights.numpy(), before.numpy())
    np.testing.assert_array_equal(held, want)
    assert (held[0, :, 0] == before[0, 0]).all() and (held[0, :, 1] == tokens[0, 0]).all()


# ══ Gradients ════════════════════════════════════════════════════════════════════════════════════


@every_combination
def test_dnc_loop_gradient_matches_oracle_differences(options):
    """Autograd of z and of every field of the state, against central differences of the oracle."""
    B, T, N, W, R = 1, 3, 4, 3, 2
    z, state = separated_case(options, B, T, N, W, R)
    rng = np.random.default_rng(5)
    shapes = [(B, T, R, W - options.key_width), (B, T, N), (B, T, R, N)]
    probes = [rng.normal(size=shape) for shape in shapes]
    state_probes = {name: rng.normal(size=value.shape) for name, value in state.items()}

    def oracle_loss(arrays):
        start = {name: arrays[name] for name in state}
        *outputs, after, _ = dnc_oracle(arrays["z"], start, W, R, **options._asdict())
        loss = sum((p * x).sum() for p, x in zip(probes, outputs, strict=True))
        return loss + sum((state_probes[name] * after[name]).sum() for name in state)

    leaf, start = torch.tensor(z, requires_grad=True), to_torch(state)
    leaves = {"z": leaf, **{name: getattr(start, name).requires_grad_() for name in state}}
    *outputs, after = run_path(leaf, start, W, R, options)
    loss = sum((torch.tensor(p) * x).sum() for p, x in zip(probes, outputs, strict=True))
    loss = loss + sum((torch.tensor(state_probes[n]) * getattr(after, n)).sum() for n in state)
    assert abs(loss.item() - oracle_loss({"z": z, **state})) < 1e-9
    loss.backward()
    for name, want in central_differences(oracle_loss, {"z": z, **state}).items():
        assert np.abs(want).max() > 1e-2, name
        np.testing.assert_allclose(leaves[name].grad, want, atol=1e-6, rtol=1e-6, err_msg=name)


def mixture_nll(case, h_out, trace, targets):
    """-log p(target) of the mixture (M,), the table being the head as well."""
    by_vocabulary = -(h_out.flatten(0, 1) @ case.table.T).log_softmax(-1)
    nll = by_vocabulary.gather(1, targets.flatten().unsqueeze(1)).squeeze(1)
    return point(trace).nll(nll, targets.flatten())


@over(PLAIN, SPLIT)
def test_dnc_memory_gradcheck(options):
    """From h, the memory at the start and all parameters to h_out, the memory and the nll of the
    mixture. read_proj is zero, as at step 0."""
    case = Case(options, torch.float64, B=1, T=2, C=3, N=3, W=3, R=2, V=5)
    torch.nn.init.zeros_(case.module.read_proj.weight)
    start = random_state(np.random.default_rng(6), 1, 3, 3, 2, options)
    start["usage"] = np.array([[0.7, 0.1, 0.4]])
    last = np.random.default_rng(6).normal(size=(1, 3)) if options.key_width else None
    start = to_torch(start, last=last)
    h, memory = case.h.requires_grad_(), start.memory.requires_grad_()
    parameters = dict(case.module.named_parameters())

    def outputs(h, memory, *values):
        state = start._replace(memory=memory)
        h_out, after, trace = torch.func.functional_call(
            case.module, dict(zip(parameters, values, strict=True)),
            (h, state, case.tokens, case.table[case.tokens]))
        assert (trace.tokens == case.tokens.unsqueeze(2)).any(2).all()  # every target is held
        return h_out, after.memory, mixture_nll(case, h_out, trace, case.tokens)

    assert torch.autograd.gradcheck(outputs, (h, memory, *parameters.values()), atol=1e-6)


def test_pointer_alone_teaches_the_addressing():
    """With read_proj zero the vocabulary learns nothing of the memory: the pointer does, and its
    gradient reaches keys, strengths, gates and the empty slot."""
    case = Case(SPLIT, torch.float64)
    torch.nn.init.zeros_(case.module.read_proj.weight)
    h_out, _, trace = case.run()
    targets = trace.tokens[..., 1].clamp_min(0)
    by_pointer = mixture_nll(case, h_out, trace, targets).sum()
    by_vocabulary = -(h_out @ case.table.T).log_softmax(-1).gather(2, targets.unsqueeze(2)).sum()
    inner = dict(case.module.interface.named_parameters())
    del inner["value.weight"]  # what is read, not where
    taught, untaught = (
        torch.autograd.grad(loss, list(inner.values()), retain_graph=True)
        for loss in (by_pointer, by_vocabulary))
    for name, slope, none in zip(inner, taught, untaught, strict=True):
        assert slope.abs().max() > 1e-4, name
        assert not none.any(), name
    assert (taught[list(inner).index("log_strength")].abs() > 1e-6).all()


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
def test_dnc_loop_gradient_into_zero_state_is_bounded(options):
    """The first step of every training run: all slots empty, all usages tied."""
    B, T, N, W, R = 2, 3, 6, 3, 2
    rng = np.random.default_rng(8)
    z = torch.tensor(random_z(rng, B, T, W, R, options), dtype=torch.float32, requires_grad=True)
    state = zero_state(B, N, W, R, options)
    memory = state.memory.requires_grad_()
    reads, write_weights, _, _ = run_path(z, state, W, R, options)
    probe = torch.tensor(rng.normal(size=write_weights.shape), dtype=torch.float32)
    (reads.sum() + (write_weights * probe).sum()).backward()
    assert torch.isfinite(z.grad).all() and z.grad.abs().max() > 1e-2
    assert torch.isfinite(memory.grad).all()
    assert 10 < memory.grad.abs().max() < 1e4  # steep, as an empty slot is, and bounded


def test_dnc_memory_gradient_is_finite_at_first_token():
    """Before the first token there is no LN(h_t-1): its row's key is zero, and has no direction."""
    case = Case(SPLIT)
    h_out, _, trace = case.run(h=case.h.requires_grad_())
    (h_out.square().sum() + mixture_nll(case, h_out, trace, case.tokens).sum()).backward()
    slopes = [case.h.grad, *(p.grad for p in case.module.parameters())]
    assert all(torch.isfinite(x).all() and x.abs().max() < 1e4 for x in slopes)


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
def test_allocation_weighting_takes_freest_lowest_slot(values):
    """Against the free list spelled out: by usage, then by slot. The sum is 1 - prod u~, whatever
    the ties: nothing is renormalised, and a full memory allocates nothing."""
    used = [EPS + (1 - EPS) * u for u in values]
    want, product = [0.0] * len(values), 1.0
    for slot in sorted(range(len(values)), key=lambda i: (used[i], i)):
        want[slot] = (1 - used[slot]) * product
        product *= used[slot]
    a = allocation_weighting(torch.tensor([values], dtype=torch.float64))[0]
    np.testing.assert_allclose(a.numpy(), want, atol=1e-12)
    assert (a >= 0).all() and (a <= 1).all()
    assert abs(a.sum().item() - (1 - np.prod(used))) < 1e-12


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_allocation_weighting_ties_break_to_lowest_slot(value):
    """Equal usages: the weight of slot j is (1 - u~) u~^j, also where a sort might be unstable."""
    N = 257
    a = allocation_weighting(torch.full((3, N), value, dtype=torch.float64))
    used = EPS + (1 - EPS) * value
    np.testing.assert_allclose(a.numpy(), np.tile((1 - used) * used ** np.arange(N), (3, 1)),
                               atol=1e-12)


def test_dnc_loop_usage_decay_replaces_oldest_write():
    """One write more than slots and no free gate: it takes the slot of the first write. Without
    decay it takes none."""
    N = 4
    x = hand_interface(1, N + 1, 3, 1, write_gate=torch.ones(1, N + 1))
    for decay in (0.7, 1.0):
        options = DNCOptions(usage_decay=decay)
        _, write_weights, _, _ = dnc_loop(x, zero_state(1, N, 3, 1, options), options)
        early, late = write_weights[0, :N], write_weights[0, N]
        assert set(early.argmax(-1).tolist()) == set(range(N)) and early.amax(-1).min() > 0.9
        if decay < 1:
            assert late.argmax() == early[0].argmax() and late.max() > 0.7
        else:
            assert late.max() < 1e-3


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
    """(D) A freed slot loses its content with the wipe, keeps it without; others are untouched.
    Decay frees a slot, but clears none."""
    B, N, W, R = 1, 3, 2, 1
    start = zero_state(B, N, W, R, PLAIN)._replace(
        memory=torch.arange(1.0, 7.0).view(B, N, W), usage=torch.ones(B, N),
        read_weights=one_hot(1, N, B, R))
    x = hand_interface(B, 1, W, R, free_gates=torch.ones(B, 1, R))
    *_, kept = dnc_loop(x, start, PLAIN)
    *_, wiped = dnc_loop(x, start, DNCOptions(dealloc_wipe=True, usage_decay=DECAY))
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


@pytest.mark.parametrize("by", ["mask", "key width"])
def test_content_weighting_hides_memory_columns(by):
    """What a mask (M) hides, or what stands behind the key half of a row, cannot matter, neither
    in the key nor in the memory's norm."""
    torch.manual_seed(12)
    B, K, N, W = 1, 2, 4, 5
    keys, memory = torch.randn(B, K, W).double(), torch.randn(B, N, W).double()
    strengths = torch.full((B, K), 4.0).double()
    masks = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).double().expand(B, K, W)
    want = content_weighting(keys[..., :3], strengths, memory[..., :3], None)
    memory[..., 3:] *= 10
    hidden = (keys, strengths, memory, masks)
    if by == "key width":
        hidden = (keys[..., :3], strengths, memory, None)
    np.testing.assert_allclose(content_weighting(*hidden).numpy(), want.numpy(), atol=1e-12)
    unmasked = content_weighting(keys, strengths, memory, None)
    assert (unmasked - want).abs().max() > 1e-2


def test_dnc_loop_reads_columns_behind_key():
    """A sure read of a split row returns its value half, one of the empty slot returns zero."""
    options = DNCOptions(key_width=2, empty_slot=True)
    start = zero_state(1, 3, 4, 2, options)
    start.memory[0, 1:] = torch.tensor([[0.0, 1.0, 5.0, 6.0], [1.0, 0.0, 7.0, 8.0]])
    x = hand_interface(
        1, 1, 4, 2, write_key=torch.zeros(1, 1, 2), read_keys=torch.tensor([[[[0.0, 1.0]] * 2]]),
        read_strengths=torch.full((1, 1, 2), 500.0), empty=torch.tensor([[[-1e3, 1e3]]]))
    reads, _, read_weights, _ = dnc_loop(x, start, options)
    torch.testing.assert_close(reads, torch.tensor([[[[5.0, 6.0], [0.0, 0.0]]]]))
    assert not read_weights[0, 0, 1].any()


# ══ Links ════════════════════════════════════════════════════════════════════════════════════════


@pytest.mark.parametrize("dtype,slack", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_link_update_keeps_invariants(dtype, slack):
    """L in [0, 1], zero diagonal, row and column sums at most one; precedence a sub-weighting."""
    rng = np.random.default_rng(0)
    B, N = 12, 5
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
def test_dnc_memory_segments_equal_one_sequence(options):
    """Passes with the carried state are one pass over all tokens: h_out, trace, every field of the
    state. The same pass twice is the same bit for bit; from an empty memory it is another one."""
    case = Case(options)
    with torch.no_grad():
        h_out, end, trace = case.run()
        assert all(map(torch.equal, everything(case.run()), everything((h_out, end, trace))))
        state, parts = None, []
        for begin, stop in ((0, 1), (1, 5), (5, 9)):
            out, state, part = case.run(case.h[:, begin:stop], state, case.tokens[:, begin:stop])
            parts.append((out, *part))
        alone, *_ = case.run(case.h[:, 5:], None, case.tokens[:, 5:])
    for got, want in zip(zip(*parts, strict=True), (h_out, *trace), strict=True):
        torch.testing.assert_close(torch.cat(got, dim=1), want, atol=1e-5, rtol=0)
    for name, want in end._asdict().items():
        torch.testing.assert_close(getattr(state, name), want, atol=1e-5, rtol=0, msg=name)
    assert (alone - h_out[:, 5:]).abs().max() > 1e-2


@plain_and_further
def test_later_token_changes_nothing_earlier(options):
    """Another state and token at t: h_out, trace and the mixture before t keep every bit."""
    case, t = Case(options), 6
    h, tokens = case.h.clone(), case.tokens.clone()
    h[:, t] = torch.randn_like(h[:, t])
    tokens[:, t] = (tokens[:, t] + 1) % 11
    results = []
    for inputs in ((case.h, case.tokens), (h, tokens)):
        with torch.no_grad():
            h_out, _, trace = case.run(inputs[0], None, inputs[1])
            log_p = (h_out @ case.table.T).log_softmax(-1)
            log_p = point(trace).mix(log_p.flatten(0, 1)).view_as(log_p)
        results.append((h_out, *trace, log_p))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine[:, :t], theirs[:, :t])
        assert not torch.equal(mine[:, t:], theirs[:, t:])
    assert (results[0][-2][:, :t] >= 0).any()  # slots held tokens


@plain_and_further
def test_dnc_loop_gradient_reaches_first_segment(options):
    """The loss of the fourth segment teaches what the first one wrote, unless it is cut off."""
    B, T, N, W, R = 1, 32, 8, 3, 2
    rng = np.random.default_rng(16)
    options = options._replace(usage_decay=1.0)  # which would write over the first segment
    segments = [torch.tensor(random_z(rng, B, T, W, R, options)) for _ in range(4)]
    at = part_slices(W, R, options)
    for segment in segments[1:]:  # the later segments mostly read, and free nothing
        segment[..., at["write_gate"]] -= 4.0
        segment[..., at["free_gates"]] -= 4.0
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
        slopes[detach] = grad[..., at["write_vector"]].abs().max().item()
    assert slopes[False] > 1e-3 and slopes[True] == 0.0


@every_combination
def test_dnc_memory_rows_are_isolated(options):
    """Another text and another memory in row 1 change nothing in row 0, bit for bit: h_out, state,
    trace and gradients."""
    case = Case(options)
    mine = case.carried()
    theirs = DNCState(*(torch.cat((field[:1], field.flip(1)[1:])) for field in mine))
    h, tokens = case.h.clone(), case.tokens.clone()
    h[1] = torch.randn_like(h[1])
    tokens[1] = (tokens[1] + 1) % 11
    results = []
    for *inputs, state in ((case.h, case.tokens, mine), (h, tokens, theirs)):
        leaf, memory = inputs[0].clone().requires_grad_(), state.memory.clone().requires_grad_()
        h_out, after, trace = case.run(leaf, state._replace(memory=memory), inputs[1])
        loss = h_out[0].square().sum() + trace.write_weights[0].square().sum()
        slopes = torch.autograd.grad(loss, (leaf, memory))
        assert all(slope[0].any() and not slope[1].any() for slope in slopes)  # none into row 1
        results.append((*everything((h_out, after, trace)), *slopes))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[0], other[0])
    assert not torch.equal(results[0][0][1], results[1][0][1])


@every_combination
def test_dnc_memory_leaves_inputs_untouched(options):
    """No in-place write: state, h and instructions passed in, and views of them, stay."""
    case = Case(options)
    state = case.carried()
    x = case.instructions(state)
    given = [case.h, case.tokens, *state, *(part for part in x if part is not None)]
    before = [tensor.clone() for tensor in given]
    with torch.no_grad():
        _, after, _ = case.run(state=state)
        dnc_loop(x, state, options)
    assert all(map(torch.equal, given, before))
    assert not torch.equal(after.memory, state.memory)


@plain_and_further
def test_dnc_memory_permuted_rows_permute_outputs(options):
    """Reordering beams is indexing the state: permuted rows in, permuted rows out. Beams that share
    a history and continue with the same token are the same beam."""
    case = Case(options, torch.float64, B=4)
    state = case.carried()
    with torch.no_grad():
        straight = everything(case.run(state=state))
        for order in ([2, 0, 3, 1], [1, 1, 1, 1]):
            moved = DNCState(*(field[order] for field in state))
            permuted = everything(case.run(case.h[order], moved, case.tokens[order]))
            for got, want in zip(permuted, straight, strict=True):
                torch.testing.assert_close(got, want[order], atol=1e-12, rtol=0)


@over(SPLIT, LINKED)
def test_empty_some_rows_empties_whole_rows(options):
    """An emptied row is that of init_state in every field, the others keep every bit."""
    case, config = Case(options, B=8), tiny_config(batch_size=8, bptt_segments=1, empty_share=0.4)
    state, fresh = case.carried(), case.module.init_state(8)
    before = [field.clone() for field in state]
    new = empty_some_rows(state, config, 3)
    emptied = (new.memory == 0).flatten(1).all(1)
    assert 0 < emptied.sum() < 8
    for got, kept, none in zip(new, state, fresh, strict=True):
        assert torch.equal(got[~emptied], kept[~emptied])
        assert torch.equal(got[emptied], none[emptied])
    assert all(map(torch.equal, state, before))


def test_empty_some_rows_draws_from_seed_and_step_alone():
    """Every row is emptied in about empty_share of the steps; another seed empties others."""
    rows, steps, share = 32, 150, 0.2
    state = zero_state(rows, 2, 2, 1, PLAIN)
    state = state._replace(memory=state.memory + 1)

    def drawn(seed, steps):
        config = tiny_config(batch_size=rows, bptt_segments=1, empty_share=share, seed=seed)
        new = (empty_some_rows(state, config, step) for step in range(steps))
        return torch.stack([one.memory[:, 0, 0] == 0 for one in new])

    torch.manual_seed(1)
    first = drawn(3, steps)
    torch.manual_seed(2)  # has no say
    assert torch.equal(drawn(3, 20), first[:20]) and not torch.equal(drawn(4, 20), first[:20])
    assert abs(first.float().mean() - share) < 0.02
    assert (first.float().mean(0) - share).abs().max() < 0.15
    assert len(set(map(tuple, first.tolist()))) > steps - 10  # steps differ
    off = tiny_config(batch_size=rows, bptt_segments=1, empty_share=0.0)
    assert empty_some_rows(state, off, 0) is state
    assert empty_some_rows(None, tiny_config(empty_share=share), 0) is None


# ══ Module ═══════════════════════════════════════════════════════════════════════════════════════


@every_combination
def test_dnc_memory_step_zero_returns_input(options):
    """read_proj starts at zero, so that the untrained model is the baseline, bit for bit; the state
    it starts from is empty, of the module's dtype."""
    torch.manual_seed(21)
    for dtype in (torch.float32, torch.float64):
        case = Case(options, dtype)
        case.module = DNCMemory(8, 5, 4, 2, options, scan="eager").to(dtype)
        state = case.module.init_state(2)
        for name, field in state._asdict().items():
            assert field.dtype == (torch.int64 if name == "tokens" else dtype)
            assert (field == (-1 if name == "tokens" else 0)).all()
        for start in (state, case.carried()):
            assert torch.equal(case.run(state=start)[0], case.h)
        torch.nn.init.normal_(case.module.read_proj.weight)
        assert (case.run()[0] - case.h).abs().max() > 1e-4


@every_combination
def test_dnc_memory_autocast_addresses_in_float32(options):
    """Under bfloat16 autocast the linear layers may be bfloat16, the recurrence may not: from the
    same instructions it gives what it gives without autocast."""
    case = Case(options)
    projected = []
    case.module.read_proj.register_forward_hook(lambda *args: projected.append(args[-1]))
    state = case.carried()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = case.instructions(state)
        h_out, after, trace = case.run(state=state)
    assert projected[-1].dtype == torch.bfloat16  # autocast was really on
    assert all(part is None or part.dtype == torch.float32 for part in x)
    _, write_weights, read_weights, want = dnc_loop(x, state, options)
    torch.testing.assert_close(trace.write_weights, write_weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(trace.read_weights, read_weights, atol=1e-6, rtol=0)
    for got, field in zip(after[:6], want[:6], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, field, atol=1e-6, rtol=0)
    assert torch.isfinite(h_out).all() and after.last.dtype == torch.float32
    # gates between the bfloat16 grid points: the activations too were taken in float32
    assert (trace.write_gate != trace.write_gate.bfloat16().float()).any()


@over(PLAIN, SPLIT)
def test_dnc_memory_autocast_keeps_epsilon(options):
    """In bfloat16 1 - 1e-6 is 1. With both gates open the first write must leave that millionth."""
    case = Case(options, N=4)
    interface = case.module.interface
    layer = interface.gates if options.key_width else interface
    at = {"write_gate": 0, "allocation_gate": 1}
    if not options.key_width:
        at = part_slices(4, 2, options)
    torch.nn.init.zeros_(layer.weight)
    for gate in ("write_gate", "allocation_gate"):
        layer.bias.data[at[gate]] = 60.0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, trace = case.run()
    first = trace.write_weights[0, 0]
    assert first[0] < 1.0
    assert abs(first[0].item() - (1 - 1e-6)) < 1.5e-7 and abs(first[1].item() - 1e-6) < 1e-8


# ══ Extremes ═════════════════════════════════════════════════════════════════════════════════════


@plain_and_further
def test_dnc_loop_saturated_gates_stay_finite(options):
    """1,000 steps with every gate, mask, mode and strength at z = +-50: finite values in range,
    and a finite gradient over the last 100."""
    B, T, N, W, R = 2, 1000, 5, 3, 2
    rng = np.random.default_rng(23)
    z = torch.tensor(random_z(rng, B, T, W, R, options)).float().sign() * 50
    at = part_slices(W, R, options)
    for name in ("write_key", "write_vector", "read_keys"):  # contents need no saturation,
        shape = z[..., at[name]].shape  # but some exact zeros
        z[..., at[name]] = torch.tensor(rng.integers(-1, 2, shape)).float()
    with torch.no_grad():
        *early, state = run_path(z[:, :900], zero_state(B, N, W, R, options), W, R, options)
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
