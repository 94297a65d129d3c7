"""The arms that the DNC is compared with: each memory against its equations, and every arm against
what must hold of all."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import error_line, flags, tiny_config

import dnc_gpt2
from benchmarks import neural_cache
from dnc_gpt2 import ARMS, STATS, CacheMemory, DeltaMemory, GRUMemory

CPU = torch.device("cpu")
MEMORIES = ("cache", "gru", "delta", "dnc_reset", "dnc")
TINIEST = {"hidden_size": 16, "num_heads": 2, "mem_slots": 8, "mem_width": 8, "bptt_segments": 1}


def randomise(module: torch.nn.Module, scale: float = 0.5) -> None:
    """Weights of every part as after training, none of them zero."""
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))


@pytest.fixture
def start(corpus):
    """start(arm, **fields) -> a Run on the tiny corpus whose memory, if any, says something."""

    def begin(arm: str, speaking: bool = True, **fields) -> dnc_gpt2.Run:
        config = tiny_config(**TINIEST | fields)
        run = dnc_gpt2.start_run(arm, config, corpus, CPU)
        if speaking and run.model.memory is not None:
            randomise(run.model.memory)
        run.model.eval()
        return run

    return begin


@pytest.mark.parametrize("arm", MEMORIES)
def test_a_carried_state_holds_no_more_than_it_shows(arm, start):
    """A view of one token would keep those of the whole window alive, in a checkpoint too."""
    run = start(arm)
    tokens = torch.randint(0, 30, (3, run.config.seq_len))
    with torch.no_grad():
        _, state = run.model.measure(tokens, tokens, run.model.init_state(3), brief=True)
    for name, part in state._asdict().items():
        assert part.untyped_storage().nbytes() == part.nbytes, name


def stream_of(config: dnc_gpt2.Config, vocab: int = 30, rows: int = 3) -> torch.Tensor:
    """Random tokens of few kinds, so that they come again (rows, two windows + 1)."""
    draw = torch.Generator().manual_seed(3)
    return torch.randint(vocab, (rows, 2 * config.seq_len + 1), generator=draw)


# ── each memory against its equations, in float64 and plain loops ───────────────────────────────


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean()
    weight, bias = arrays(norm.weight, norm.bias)
    return centred / np.sqrt((centred**2).mean() + norm.eps) * weight + bias


def arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def gru_oracle(memory: GRUMemory, h: np.ndarray, embedding: np.ndarray, s: np.ndarray):
    """One row: h, embedding (T, C), s (N * W,) -> h_out (T, C), s."""
    K = memory.block
    A, B, b = arrays(memory.reduce.weight, memory.expand.weight, memory.expand.bias)
    U, D, P = arrays(memory.recurrent, memory.read_reduce.weight, memory.read_proj.weight)
    out = []
    for h_t, e_t in zip(h, embedding, strict=True):
        x = B @ (A @ np.concatenate([layer_norm(h_t, memory.norm), e_t])) + b
        new = np.empty_like(s)
        for cell in range(len(s)):
            block, k = divmod(cell, K)
            mine = s[block * K : (block + 1) * K]
            r, z, n = (x[block * 3 * K + part * K + k] for part in range(3))
            from_r, from_z, from_n = (sum(mine[j] * U[block, j, part * K + k] for j in range(K))
                                      for part in range(3))
            update = sigmoid(z + from_z)
            candidate = np.tanh(n + sigmoid(r + from_r) * from_n)
            new[cell] = (1 - update) * candidate + update * s[cell]
        s = new
        out.append(h_t + P @ (D @ layer_norm(s, memory.read_norm)))
    return np.stack(out), s


def delta_oracle(memory: DeltaMemory, h, embedding, S, last):
    """One row: h, embedding (T, C), S (N, W), last (C,) -> h_out (T, C), S, last."""
    key, query, value, gate, P = arrays(
        memory.key.weight, memory.query.weight, memory.value.weight, memory.read_gate.weight,
        memory.read_proj.weight)
    G, b, A, g = arrays(memory.gates.weight, memory.gates.bias, memory.log_rate,
                        memory.read_norm.weight)
    out = []
    for h_t, e_t in zip(h, embedding, strict=True):
        normed = layer_norm(h_t, memory.norm)
        k, q, v = key @ last, query @ normed, value @ e_t
        k, q = k / max(np.linalg.norm(k), 1e-12), q / np.linalg.norm(q)
        for_a, for_b = G @ np.concatenate([last, e_t]) + b
        alpha, beta = np.exp(-np.exp(A) * np.log1p(np.exp(for_a))), sigmoid(for_b)
        S = alpha * (np.eye(len(k)) - beta * np.outer(k, k)) @ S + beta * np.outer(k, v)
        o = S.T @ q
        o = o / np.sqrt((o**2).mean() + 1e-5) * g
        x = gate @ normed
        out.append(h_t + P @ (o * x * sigmoid(x)))
        last = normed
    return np.stack(out), S, last


def double_inputs(batch: int, length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(2, batch, length, size, generator=draw, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("slots, width, block", [(8, 8, 32), (5, 7, 7), (37, 1, 1)])
def test_gru_equals_its_equations_row_by_row(slots, width, block):
    """Odd sizes too, where the blocks are the largest divisor of N * W that is not above 32."""
    memory = GRUMemory(6, slots, width).double()
    assert memory.block == (block if block > 1 else 1)
    randomise(memory)
    h, embedding = double_inputs(2, 5, 6)
    state = dnc_gpt2.GRUState(torch.tanh(torch.randn(2, slots * width, dtype=torch.float64)))
    h_out, new, trace = memory(h, state, None, embedding)
    assert trace is None and h_out.shape == (2, 5, 6)
    for row in range(2):
        want, cells = gru_oracle(memory, *arrays(h[row], embedding[row], state.cells[row]))
        np.testing.assert_allclose(h_out[row].detach().numpy(), want, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(new.cells[row].detach().numpy(), cells, rtol=1e-9, atol=1e-10)


def test_gru_with_one_block_is_torch_s():
    """The reset gate stands where torch.nn.GRU has it; its gates are named r, z, n as well."""
    memory = GRUMemory(6, 4, 5).double()  # N * W = 20: one block
    randomise(memory)
    theirs = torch.nn.GRU(6 * 2, 20, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(memory.expand.weight @ memory.reduce.weight)
        theirs.bias_ih_l0.copy_(memory.expand.bias)
        theirs.weight_hh_l0.copy_(memory.recurrent[0].T)
        theirs.bias_hh_l0.zero_()
    h, embedding = double_inputs(2, 7, 6)
    _, new, _ = memory(h, memory.init_state(2), None, embedding)
    _, last = theirs(torch.cat((memory.norm(h), embedding), dim=-1))
    torch.testing.assert_close(new.cells, last[0])


@pytest.mark.parametrize("slots, width", [(4, 3), (9, 5)])  # fewer and more keys than C
def test_delta_equals_its_equations_row_by_row(slots, width):
    memory = DeltaMemory(6, slots, width).double()
    randomise(memory)
    h, embedding = double_inputs(2, 7, 6)
    for state in (memory.init_state(2), dnc_gpt2.DeltaState(
            torch.randn(2, slots, width, dtype=torch.float64),
            torch.randn(2, 6, dtype=torch.float64))):
        h_out, new, trace = memory(h, state, None, embedding)
        assert trace is None and new.memory.shape == (2, slots, width)
        for row in range(2):
            want, S, last = delta_oracle(memory, *arrays(
                h[row], embedding[row], state.memory[row], state.last[row]))
            for found, wanted in ((h_out, want), (new.memory, S), (new.last, last)):
                np.testing.assert_allclose(found[row].detach().numpy(), wanted, rtol=1e-9,
                                           atol=1e-10)


def test_delta_recalls_a_pair_and_replaces_it():
    """b = 1, a = 1: a key reads the value last written under it, and keys at right angles do not
    disturb each other."""
    k = torch.eye(4, dtype=torch.float64)[[0, 1, 0]].unsqueeze(0)  # (1, 3, 4)
    q = torch.eye(4, dtype=torch.float64)[[0, 0, 1]].unsqueeze(0)
    v = torch.arange(6.0, dtype=torch.float64).view(1, 3, 2) + 1
    ones = torch.ones(1, 3, dtype=torch.float64)
    reads, memory = dnc_gpt2.delta_loop(q, k, v, 0 * ones, ones, k.new_zeros(1, 4, 2))
    assert reads[0].tolist() == [[1, 2], [1, 2], [3, 4]]
    assert memory[0, 0].tolist() == [5, 6]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
@pytest.mark.parametrize("length", [63, 128])
def test_delta_kernels_equal_the_loop(length):
    """Values and gradients of flash-linear-attention's kernels, to what bf16 resolves."""
    pytest.importorskip("fla.ops.gated_delta_rule")
    draw = torch.Generator("cuda").manual_seed(0)
    normal = [torch.randn(2, length, size, generator=draw, device="cuda") for size in (64, 64, 128)]
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in normal[:2])
    log_a, b = (torch.rand(2, length, generator=draw, device="cuda") for _ in range(2))
    memory = torch.randn(2, 64, 128, generator=draw, device="cuda")
    inputs = [x.requires_grad_() for x in (q, k, normal[2], -0.1 * log_a, b, memory)]
    results = []
    for recurrence in (dnc_gpt2.delta_loop, dnc_gpt2.delta_chunks):
        reads, new = recurrence(*inputs)
        loss = reads.square().sum() + new.square().sum()
        results.append((reads, new, *torch.autograd.grad(loss, inputs)))
    for exact, rough in zip(*results, strict=True):
        error = (exact - rough).norm() / exact.norm()
        assert rough.dtype == torch.float32 and error < 0.02


@pytest.mark.parametrize("kind", [GRUMemory, DeltaMemory])
def test_gradients_of_the_recurrence(kind):
    """Of h, embedding, state and every parameter, against finite differences."""
    memory = kind(4, 3, 2).double()
    randomise(memory)
    h, embedding = double_inputs(2, 3, 4)
    state = dnc_gpt2.map_state(lambda x: x + torch.randn_like(x) / 2, memory.init_state(2))
    names, parameters = zip(*memory.named_parameters(), strict=True)

    def run(h, embedding, *rest):
        parts, values = rest[: len(state)], rest[len(state):]
        by_name = dict(zip(names, values, strict=True))
        inputs = (h, type(state)(*parts), None, embedding)
        h_out, new, _ = torch.func.functional_call(memory, by_name, inputs)
        return h_out, *new

    inputs = [x.detach().clone().requires_grad_() for x in (h, embedding, *state, *parameters)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["gru", "delta"])
def test_states_are_float32_under_bf16_autocast(start, name):
    run = start(name, precision="bf16")
    tokens = stream_of(run.config)
    output = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(3))
    assert all(part.dtype == torch.float32 for part in output.state)
    exact = start(name)
    wanted = exact.model(tokens[:, :-1], tokens[:, 1:], exact.model.init_state(3))
    assert not torch.equal(output.nll, wanted.nll)  # bf16 was really used
    assert abs(output.nll.mean() - wanted.nll.mean()) < 0.2


# ── the cache ───────────────────────────────────────────────────────────────────────────────────


def brute_force_cache(h, tokens, row, t, slots, theta) -> dict[int, float]:
    """p_cache of one position from the definition: {token: probability}, {} while empty."""
    before = range(max(0, t - slots), t)
    scores = [math.exp(theta * torch.cosine_similarity(h[row, t], h[row, s], dim=0).item())
              for s in before]
    p = {}
    for s, score in zip(before, scores, strict=True):
        token = tokens[row, s + 1].item()
        p[token] = p.get(token, 0.0) + score / sum(scores)
    return p


@pytest.mark.parametrize("slots", [5, 16, 40])  # below, at and above a window of 16
def test_cache_points_as_its_definition_does(start, slots):
    run = start("cache", mem_slots=slots)
    memory, (B, L) = run.model.memory, (2, 37)
    memory.theta.fill_(6.0)
    memory.share.fill_(0.3)
    tokens = stream_of(run.config, rows=B).repeat(1, 2)[:, :L]
    state, hs, weights, held = run.model.init_state(B), [], [], []
    with torch.no_grad():
        for x in tokens.split(run.config.seq_len, 1):
            h, h_out, state, trace = run.model.hidden(x, state)
            assert h_out is h
            hs.append(h)
            weights.append(trace.read_weights)
            held.append(trace.tokens)
    h, weights, held = (torch.cat(parts, dim=1) for parts in (hs, weights, held))
    assert weights.shape == (B, L, 1, slots) and held.shape == (B, L, slots)
    for row, t in np.ndindex(B, L):
        found = {}
        for token, weight in zip(held[row, t].tolist(), weights[row, t, 0].tolist(), strict=True):
            if token >= 0:
                found[token] = found.get(token, 0.0) + weight
            else:
                assert weight == 0
        wanted = brute_force_cache(h, tokens, row, t, slots, 6.0)
        assert found.keys() == wanted.keys()
        for token, p in wanted.items():
            assert found[token] == pytest.approx(0.3 * p, abs=1e-6)


@pytest.mark.parametrize("slots, theta, share", [(5, 2.0, 0.2), (40, 12.0, 0.05)])
def test_cache_scores_as_the_benchmark_does(start, corpus, slots, theta, share):
    base = start("baseline", eval_rows=neural_cache.ROWS)
    run = start("cache", mem_slots=slots, eval_rows=neural_cache.ROWS)
    run.model.memory.theta.fill_(theta)
    run.model.memory.share.fill_(share)
    stream = corpus.train[: neural_cache.ROWS * 37 - 4]
    alone = neural_cache.token_nll(base.model, stream)
    cache = neural_cache.cache_probability(base.model, stream, slots)[theta]
    wanted = neural_cache.mixed_nll(alone, cache, share)
    wanted[:, 0] = alone[:, 0]  # the benchmark's (1 - lambda) p while the cache is empty
    scored = dnc_gpt2.evaluation_rows(stream, neural_cache.ROWS)[1] != -100
    found = neural_cache.token_nll(run.model, stream)
    torch.testing.assert_close(found[scored], wanted[scored], rtol=1e-5, atol=1e-5)
    assert (alone - found)[scored].abs().max() > 0.01


def test_tune_cache_finds_the_setting_of_the_lowest_loss(start, corpus):
    """All settings in one pass equal an evaluation of each."""
    run = start("cache", eval_rows=2, mem_slots=20)
    stream, stop = corpus.valid[:98], dnc_gpt2.StopSignal()
    loss = dnc_gpt2.tune_cache(run.model, stream, run.config, stop)
    memory = run.model.memory
    best = round(memory.theta.item(), 4), round(memory.share.item(), 4)
    losses = {}
    for theta in CacheMemory.THETAS:
        for share in CacheMemory.LAMBDAS:
            memory.theta.fill_(theta)
            memory.share.fill_(share)
            result = dnc_gpt2.evaluate(run.model, stream, run.config, stop, brief=True)
            losses[theta, share] = result["metrics"]["loss"]
    assert min(losses, key=losses.get) == best
    assert losses[best] == pytest.approx(loss, abs=1e-5)


# ── what must hold of every arm ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arm", ARMS)
def test_probabilities_sum_to_one_and_score_as_measure_does(start, arm):
    run = start(arm)
    tokens = stream_of(run.config)[:, : run.config.seq_len + 1]
    x, y = tokens[:, :-1], tokens[:, 1:]
    model = run.model
    with torch.no_grad():
        state = model.hidden(x, model.init_state(3))[2]  # not empty
        log_p = dnc_gpt2.log_probabilities(model, x, state)
        trained = model(x, y, state).nll
    assert log_p.shape == (*x.shape, 300)
    assert (log_p.double().exp().sum(-1) - 1).abs().max() < 1e-5
    nll = -log_p.gather(2, y.unsqueeze(2)).squeeze(2)
    stats, _ = model.measure(x, y, state)
    torch.testing.assert_close(stats[..., 0], nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained, nll, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_later_tokens_and_other_rows_change_nothing(start, arm):
    run = start(arm)
    tokens, at = stream_of(run.config), run.config.seq_len + 5
    state = run.model.init_state(3)
    changed = tokens.clone()
    changed[:, at:] = (changed[:, at:] + 7) % 300
    changed[0] = (changed[0] + 11) % 300
    first, second = (run.model.measure(x[:, :-1], x[:, 1:], state)[0] for x in (tokens, changed))
    assert torch.equal(first[1:, : at - 1], second[1:, : at - 1])
    assert not torch.equal(first[1:, at:], second[1:, at:])
    assert not torch.equal(first[0, : at - 1], second[0, : at - 1])
    swapped = tokens[[1, 0, 2]]
    third = run.model.measure(swapped[:, :-1], swapped[:, 1:], state)[0]
    torch.testing.assert_close(third[[1, 0, 2]], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", MEMORIES)
def test_two_windows_in_one_call_equal_one_after_the_other(start, arm):
    run = start(arm)
    model, tokens = run.model, stream_of(run.config)
    x, y = tokens[:, :-1], tokens[:, 1:]
    whole, after = model.measure(x, y, model.init_state(3))
    state, parts = model.init_state(3), []
    for window, targets in zip(*(z.split(run.config.seq_len, 1) for z in (x, y)), strict=True):
        stats, state = model.measure(window, targets, state)
        parts.append(stats)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(state, after, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    empty, _ = model.measure(x[:, run.config.seq_len:], y[:, run.config.seq_len:],
                             model.init_state(3))
    same = torch.allclose(empty, parts[1], rtol=1e-4, atol=1e-5)
    assert same == (arm == "dnc_reset")  # which forgets between windows, the others do not


@pytest.mark.parametrize("arm", ["gru", "delta", "dnc_reset", "dnc"])
def test_step_0_is_the_baseline(start, arm):
    base = start("baseline", dropout=0.3)
    run = start(arm, speaking=False, pointing=False, dropout=0.3)
    tokens = stream_of(run.config)
    results = [each.model.measure(tokens[:, :-1], tokens[:, 1:], each.model.init_state(3))[0]
               for each in (base, run)]
    both = slice(0, STATS.index("nll_without"))
    assert torch.equal(results[0][..., both], results[1][..., both])
    assert (results[1][..., STATS.index("kl")].abs() < 1e-6).all()
    losses = []
    for each in (base, run):  # the same dropout, where arms are built one after the other
        torch.manual_seed(each.config.seed + 2)
        each.model.train()
        output = each.model(tokens[:, :-1], tokens[:, 1:], each.model.init_state(3))
        losses.append(output.nll)
    assert torch.equal(*losses)


@pytest.mark.parametrize("arm", MEMORIES)
def test_an_emptied_row_starts_anew_and_the_others_go_on(start, arm):
    run = start(arm, empty_share=0.5, batch_size=6)
    model = run.model
    tokens = torch.randint(30, (6, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        empty = model.init_state(6)
        _, _, _ = model.hidden(tokens, empty)[:3]
        table = model.head_weight()
        _, state, _ = model.memory(torch.randn(6, 16, 16), empty, tokens, table[tokens], table)
    emptied = dnc_gpt2.empty_some_rows(state, run.config, 0)
    assert type(emptied) is type(state)
    kinds = set()
    for row in range(6):
        rows = [tuple(part[row] for part in s) for s in (emptied, state, empty)]
        new, old, none = rows
        is_empty = all(map(torch.equal, new, none))
        assert is_empty or all(map(torch.equal, new, old))
        kinds.add(is_empty)
    assert kinds == {True, False}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_has_the_statistics_of_its_kind(start, corpus, arm):
    run = start(arm)
    result = dnc_gpt2.evaluate(run.model, corpus.valid[:120], run.config, dnc_gpt2.StopSignal())
    metrics = result["metrics"].keys()
    gates = {"avg_gate", "gate_std", "write_rate", "write_sparsity"}
    assert gates <= metrics if arm.startswith("dnc") else not gates & metrics
    assert ({"mem_kl", "loss_without"} <= metrics) == (arm in MEMORIES)
    if arm in MEMORIES:
        assert result["metrics"]["mem_kl"] > 0
        assert result["metrics"]["loss_without"] != result["metrics"]["loss"]


@pytest.mark.parametrize("arm", ["gru", "delta"])
def test_memory_trains(start, corpus, arm):
    """20 steps: the loss falls, every parameter of the memory moves, the state is detached."""
    run = start(arm, speaking=False, max_steps=20, lr=3e-3)
    before = {name: p.clone() for name, p in run.model.memory.named_parameters()}
    rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
    losses = []
    for _ in range(20):
        total = run.meter.loss
        dnc_gpt2.train_step(run, run.model, rows)
        losses.append(run.meter.loss - total)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2
    assert not any(part.requires_grad for part in run.state)
    for name, p in run.model.memory.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("arm", ["gru", "delta"])
def test_losses_of_the_gates_do_nothing_without_gates(start, arm):
    run = start(arm, lambda_routing=0.7, lambda_entropy=0.5)
    assert dnc_gpt2.routing_positions(run.config, 0) is None
    tokens = stream_of(run.config)
    output = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(3))
    loss = dnc_gpt2.total_loss(output, None, run.config)
    assert loss.item() == pytest.approx(output.nll.mean().item(), abs=1e-5)


# ── the arms of a run ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("segments, batch, rows", [(1, 4, 2), (2, 4, 2), (3, 6, 1), (4, 12, 3)])
def test_wide_has_the_tokens_of_a_step_in_windows_twice_as_long(segments, batch, rows):
    config = tiny_config(bptt_segments=segments, batch_size=batch)
    wide = dnc_gpt2.arm_config("wide", config)
    assert wide.seq_len == 2 * config.seq_len and wide.memory == "none"
    assert wide.rows == rows and wide.rows * wide.step_len == config.rows * config.step_len
    if segments % 2 == 0:  # the very same tokens in the same rows
        assert wide.rows == config.rows


@pytest.mark.parametrize("segments, batch", [(1, 4), (2, 4), (3, 12)])
def test_wide_reads_what_the_baseline_reads(start, corpus, monkeypatch, segments, batch):
    """Of every two steps the same windows as targets."""
    plain = dnc_gpt2.add_gradients
    seen = []

    def note_windows(run, forward, tokens):
        seen.extend(tuple(window) for window in tokens[:, 1:].reshape(-1, 4).tolist())
        return plain(run, forward, tokens)

    monkeypatch.setattr(dnc_gpt2, "add_gradients", note_windows)
    windows = {}
    for arm in ("baseline", "wide"):
        seen.clear()
        run = start(arm, seq_len=4, bptt_segments=segments, batch_size=batch)
        run.total_steps = run.steps_per_epoch // 2 * 2
        dnc_gpt2.train(run, corpus, run.model, dnc_gpt2.StopSignal())
        windows[arm] = [sorted(seen[at : at + 2 * batch])
                        for at in range(0, len(seen), 2 * batch)]
    assert windows["wide"] == windows["baseline"] and len(windows["wide"]) >= 4


def test_arms_differ_by_what_their_names_say():
    config = tiny_config(**TINIEST)
    base = vars(dnc_gpt2.arm_config("baseline", config))
    changed = {}
    for arm in ARMS:
        fields = vars(dnc_gpt2.arm_config(arm, config))
        changed[arm] = {name: value for name, value in fields.items() if value != base[name]}
    assert changed.pop("matched").keys() == {"mlp_width"}
    assert changed.pop("wide") == {"seq_len": 32, "batch_size": 2}
    assert changed.pop("dnc_reset") == {"memory": "dnc", "carry_memory": False}
    assert changed == {"baseline": {}} | {m: {"memory": m} for m in ("cache", "gru", "delta",
                                                                     "dnc")}
    off = dnc_gpt2.arm_config("cache", dataclasses.replace(config, pointing=False))
    assert off.pointing


def test_an_arm_of_longer_windows_is_paired_with_the_others(start, corpus):
    """The sums of an evaluation are of the same tokens, whatever the window of an arm."""
    results = {}
    for arm in ("baseline", "wide"):
        run = start(arm, eval_rows=2)
        results[arm] = dnc_gpt2.evaluate(run.model, corpus.valid, run.config, dnc_gpt2.StopSignal())
    assert torch.equal(results["baseline"]["counts"], results["wide"]["counts"])
    assert len(results["wide"]["counts"]) == math.ceil((len(corpus.valid) - 1) / 2 / dnc_gpt2.BIN)
    raised = {**results["wide"], "sums": results["wide"]["sums"] + 1000}
    assert dnc_gpt2.paired([results["baseline"]], [raised], "nll").sign == 1
    assert dnc_gpt2.paired([raised], [results["baseline"]], "nll").sign == -1


@pytest.mark.parametrize("fields, said", [
    ({"arms": "cache"}, "arms"), ({"arms": "cache,baseline"}, "baseline before cache"),
    ({"arms": "wide,dnc", "batch_size": 3, "bptt_segments": 1}, "batch_size.*even")])
def test_what_cannot_be_is_refused_in_one_line(main, capfd, tiny_argv, tmp_path, fields, said):
    outputs = {"save_dir": tmp_path / "c", "plot_dir": tmp_path / "p"}
    assert main([*tiny_argv, *flags(fields | outputs)]) == 2
    line = error_line(capfd.readouterr().err)
    assert all(part in line for part in said.split(".*"))
    assert not list(tmp_path.glob("c/*.pt"))


def test_all_arms_run_and_resume_as_finished(main, capfd, tiny_argv, tmp_path):
    """The command trains them, makes the cache of the trained baseline, prints one table, and has
    nothing left to do the second time."""
    names = "baseline,matched,wide,cache,gru,delta,dnc_reset,dnc"
    assert names == ",".join(ARMS)
    sizes = TINIEST | {"max_steps": 3, "final_eval_tokens": 150, "eval_tokens": 100, "arms": names,
                       "save_dir": tmp_path / "c", "plot_dir": tmp_path / "p"}
    assert main([*tiny_argv, *flags(sizes)]) == 0
    out = capfd.readouterr().out
    for label in ARMS.values():
        assert (tmp_path / "c" / f"{label.replace(' ', '_')}_FINAL_step3.pt").exists()
    assert out.count("ALL ARMS — 8 arms") == 1 and "SEES AHEAD" not in out
    for label in ARMS.values():
        assert re.search(rf"^  {re.escape(label)} +\d", out, re.MULTILINE)
    kept = json.loads((tmp_path / "p" / "results.json").read_text())
    assert list(kept["arms"]) == list(ARMS)
    assert all("swapped" in kept["arms"][arm][0] for arm in ("cache", "gru", "delta", "dnc"))
    assert not any("swapped" in kept["arms"][arm][0] for arm in ("baseline", "wide", "dnc_reset"))
    assert "GPT2 + Cache: theta" in out and "nan" not in out

    base, cache = (dnc_gpt2.load_checkpoint(tmp_path / "c" / f"GPT2_{arm}_FINAL_step3.pt")
                   for arm in ("Baseline", "+_Cache"))
    weights = cache["model_state_dict"]
    assert weights["memory.theta"].item() in CacheMemory.THETAS
    assert any(math.isclose(weights["memory.share"].item(), x, rel_tol=1e-6)
               for x in CacheMemory.LAMBDAS)
    for name, value in base["model_state_dict"].items():
        assert torch.equal(weights[name], value)
    assert cache["results"]["parameters"] == base["results"]["parameters"]
    assert cache["results"]["valid"]["metrics"]["loss_without"] == pytest.approx(
        base["results"]["valid"]["metrics"]["loss"], abs=1e-6)

    rows = [json.loads(line) for line in (tmp_path / "p" / "metrics.jsonl").open()]
    assert {row["arm"] for row in rows if "arm" in row} == set(ARMS.values())
    assert main([*tiny_argv, *flags(sizes | {"resume": "auto"})]) == 0
    again = capfd.readouterr().out
    assert again.count(": finished in ") == len(ARMS)
    tables = [text[text.index("  ALL ARMS") : text.index("wrote ")]
              for text in (out, again)]
    assert tables[0] == tables[1]


def test_a_state_of_another_memory_resumes(start, corpus, tmp_path):
    """What a checkpoint holds of a memory comes back as the memory's own kind of state."""
    fields = {"save_dir": str(tmp_path), "max_steps": 4, "empty_share": 0.0}
    for arm in ("gru", "delta", "dnc_reset"):
        run = start(arm, **fields)
        rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
        dnc_gpt2.train_step(run, run.model, rows)
        dnc_gpt2.save_checkpoint(run, corpus)
        fresh = start(arm, resume="auto", **fields)
        assert fresh.step == 1 and type(fresh.state) is type(run.state)
        assert all(map(torch.equal, fresh.state, run.state))
