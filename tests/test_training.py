"""Model, loss, metrics, evaluation and training, each against a second, slower way to say it."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TINY, error_line, flags, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import scatter_gather
from torch.utils._python_dispatch import TorchDispatchMode

import dnc_gpt2
from dnc_gpt2 import STATS, DNCState, DNCTrace

CPU = torch.device("cpu")
VOCAB = 300


@pytest.fixture
def start(corpus):
    """start(arm, **fields) -> a Run on the tiny corpus, as run_comparison starts it."""

    def begin(arm: str = "dnc", speaking: bool = False, **fields) -> dnc_gpt2.Run:
        run = dnc_gpt2.start_run(arm, tiny_config(**fields), corpus, CPU)
        if speaking and run.model.memory is not None:
            make_memory_speak(run.model)
        return run

    return begin


def make_memory_speak(model: dnc_gpt2.GPT2WithMemory) -> None:
    """Reads that move the prediction and gates that vary, as after training."""
    draw = torch.Generator().manual_seed(11)
    memory = model.memory
    with torch.no_grad():
        memory.read_proj.weight.normal_(0, 0.7, generator=draw)
        for parameter in memory.interface.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.5, generator=draw)
        if getattr(memory.interface, "empty", None) is not None:
            memory.interface.empty.bias.fill_(10.0)


def tokens_of(config: dnc_gpt2.Config, seed: int = 3, rows: int | None = None) -> torch.Tensor:
    """Random tokens (rows, step_len + 1)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (rows or config.rows, config.step_len + 1), generator=draw)


def fill_state(model: dnc_gpt2.GPT2WithMemory, rows: int) -> DNCState | None:
    """The state after some text, different in every row."""
    if model.memory is None:
        return None
    tokens = torch.randint(VOCAB, (rows, 8), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return model.hidden(tokens, model.init_state(rows))[2]


def assert_same(first, second, **tolerance) -> None:
    """Two outputs, states or traces are equal, tensor by tensor; None only where both have it."""
    assert type(first) is type(second)
    if isinstance(first, tuple):
        for a, b in zip(first, second, strict=True):
            assert_same(a, b, **tolerance)
    elif first is not None:
        torch.testing.assert_close(first, second, **(tolerance or {"rtol": 0, "atol": 0}))


# ── the model ───────────────────────────────────────────────────────────────────────────────────


def test_arms_start_equal(start):
    """Same controller weights, same dropout: at step 0 reads add nothing to the last hidden state,
    and the DNC arm is the baseline, bit for bit, but for what its reads point at."""
    base, dnc = start("baseline", dropout=0.3), start("dnc", dropout=0.3, pointing=False)
    ours, theirs = base.model.controller.state_dict(), dnc.model.controller.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not dnc.model.memory.read_proj.weight.any() and dnc.model.memory.read_proj.bias is None
    tokens = tokens_of(dnc.config)
    outputs = []
    for run in (base, dnc):
        run.model.eval()
        state = run.model.init_state(run.config.rows)
        h, h_out, *_ = run.model.hidden(tokens[:, :-1], state)
        assert torch.equal(h, h_out)
        outputs.append(run.model.measure(tokens[:, :-1], tokens[:, 1:], state)[0])
    both = slice(0, STATS.index("nll_without"))
    assert torch.equal(outputs[0][..., both], outputs[1][..., both])
    assert (outputs[1][..., STATS.index("kl")] == 0).all()


def test_arms_draw_the_same_dropout(start):
    """Built one after the other, as the job does it, their first training steps agree."""
    losses = []
    for arm in ("baseline", "dnc"):
        run = start(arm, dropout=0.3, lambda_routing=0.0, lambda_entropy=0.0, pointing=False)
        tokens = tokens_of(run.config)
        output = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(run.config.rows))
        losses.append(output.nll)
    assert torch.equal(*losses)


def test_matched_arm_has_as_many_parameters_as_the_dnc_arm(start):
    for fields in ({}, {"num_layers": 2, "mem_width": 16, "num_reads": 4}, {"use_links": True}):
        counts = {arm: dnc_gpt2.count_parameters(start(arm, **fields).model)
                  for arm in ("baseline", "matched", "dnc")}
        assert abs(counts["matched"] / counts["dnc"] - 1) < 0.01, counts
        assert counts["baseline"] < counts["matched"]
        memory = start("dnc", **fields).model.memory
        assert counts["dnc"] - counts["baseline"] == dnc_gpt2.count_parameters(memory)
    assert start("matched").model.memory is None


def test_head_is_tied_to_the_embedding_and_attention_is_sdpa(start):
    run = start("dnc", pointing=False)
    assert type(run.model.controller) is transformers.GPT2Model
    assert run.model.controller.config._attn_implementation == "sdpa"
    vocab_sized = [n for n, p in run.model.named_parameters() if VOCAB in p.shape]
    assert vocab_sized == ["controller.wte.weight"]
    tokens = tokens_of(run.config)
    run.model.eval()
    _, h_out, *_ = run.model.hidden(tokens[:, :-1], run.model.init_state(2))
    log_p = (h_out @ run.model.controller.wte.weight.T).log_softmax(-1)
    nll = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(2)).nll
    expected = -log_p.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("carry", [True, False])
def test_windows_are_independent_for_the_controller_and_linked_by_carried_memory(start, carry):
    run = start("dnc", speaking=True, carry_memory=carry)
    T, model = run.config.seq_len, run.model.eval()
    tokens = tokens_of(run.config)[:1, :-1]
    changed = tokens.clone()
    changed[0, : T // 2] = (changed[0, : T // 2] + 1) % VOCAB
    with torch.no_grad():
        h, h_out, *_ = model.hidden(tokens, model.init_state(1))
        other, other_out, *_ = model.hidden(changed, model.init_state(1))
    assert not torch.equal(h[:, :T], other[:, :T])
    assert torch.equal(h[:, T:], other[:, T:])  # attention never crosses windows
    assert torch.equal(h_out[:, T:], other_out[:, T:]) != carry


def test_windows_in_one_call_equal_windows_one_by_one(start):
    """The memory runs over the whole length as it does over its windows, state handed on."""
    run = start("dnc", speaking=True, bptt_segments=4)
    T, model, tokens = run.config.seq_len, run.model.eval(), tokens_of(run.config)
    x, y = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        whole = model(x, y, model.init_state(1))
        state, parts = model.init_state(1), []
        for at in range(0, x.shape[1], T):
            parts.append(model(x[:, at : at + T], y[:, at : at + T], state))
            state = parts[-1].state
    close = {"rtol": 1e-5, "atol": 1e-6}
    assert_same(whole.state, state, **close)
    torch.testing.assert_close(whole.nll, torch.cat([p.nll for p in parts], 1), **close)
    gates = torch.cat([p.trace.write_gate for p in parts], 1)
    torch.testing.assert_close(whole.trace.write_gate, gates, **close)


@pytest.mark.parametrize("carry", [True, False])
def test_gradient_of_the_fourth_window_reaches_what_the_first_one_wrote(start, carry):
    run = start("dnc", speaking=True, bptt_segments=4, carry_memory=carry)
    T, tokens, seen = run.config.seq_len, tokens_of(run.config), []

    def keep(module, inputs, parts):
        parts.write_vector.retain_grad()
        seen.append(parts.write_vector)

    run.model.memory.interface.register_forward_hook(keep)
    targets = tokens[:, 1:].clone()
    targets[:, : 3 * T] = -100  # the loss of the fourth window alone
    run.model(tokens[:, :-1], targets, run.model.init_state(1)).loss.mean().backward()
    grad = seen[0].grad.view(4, T, -1)  # rows = 1: windows by tokens
    assert grad[3].abs().max() > 0
    assert (grad[0].abs().max() > 1e-8) if carry else (grad[:3] == 0).all()


def test_rows_are_isolated_through_the_whole_model(start):
    run = start("dnc", speaking=True, bptt_segments=2, batch_size=6)
    model, tokens = run.model.eval(), tokens_of(run.config)
    state, positions = fill_state(model, 3), dnc_gpt2.routing_positions(run.config, 0)
    changed = tokens.clone()
    changed[0] = (changed[0] + 7) % VOCAB
    other_state = dnc_gpt2.map_state(lambda x: torch.cat([x[:1] // 2, x[1:]]), state)
    with torch.no_grad():
        first = model(tokens[:, :-1], tokens[:, 1:], state, positions)
        second = model(changed[:, :-1], changed[:, 1:], other_state, positions)
    assert not torch.equal(first.nll[0], second.nll[0])
    for name in ("nll", "top1", "effect"):
        assert torch.equal(getattr(first, name)[1:], getattr(second, name)[1:]), name
    for a, b in zip((*first.state, *first.trace), (*second.state, *second.trace), strict=True):
        assert torch.equal(a[1:], b[1:])


def test_model_leaves_the_state_that_it_is_given(start):
    run = start("dnc", speaking=True)
    state = fill_state(run.model, 2)
    before = [part.clone() for part in state]
    tokens = tokens_of(run.config)
    after = run.model(tokens[:, :-1], tokens[:, 1:], state).state
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert not torch.equal(after.memory, state.memory)


def test_autocast_bf16_runs_and_keeps_the_memory_in_float32(start):
    exact, rough = (start("dnc", speaking=True, precision=p) for p in ("float32", "bf16"))
    tokens, positions = tokens_of(exact.config), dnc_gpt2.routing_positions(exact.config, 0)
    outputs = [run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(2), positions)
               for run in (exact, rough)]
    for output in outputs:
        floats = [part for part in (output.nll, *output.state, *output.trace)
                  if part.dtype != torch.int64]
        assert len(floats) == 1 + len(output.state) - 1 + len(output.trace) - 1
        assert all(part.dtype == torch.float32 for part in floats)
    assert not torch.equal(outputs[0].nll, outputs[1].nll)  # bf16 was really used
    assert abs(outputs[0].nll.mean() - outputs[1].nll.mean()) < 0.3
    rows = dnc_gpt2.training_rows(torch.arange(200) % VOCAB, 2, 32)
    dnc_gpt2.train_step(rough, rough.model, rows)
    assert all(p.dtype == torch.float32 for p in rough.model.parameters())
    floats = [part for part in rough.state if part is not rough.state.tokens]
    assert all(part.dtype == torch.float32 for part in floats)


def test_autocast_bf16_leaves_the_addressing_in_float32(start):
    """From the interface vectors on, the memory computes what it computes without autocast."""
    run, seen = start("dnc", speaking=True, precision="bf16", scan="eager"), []
    memory, tokens = run.model.memory, tokens_of(run.config)
    memory.interface.register_forward_hook(lambda module, inputs, parts: seen.append(parts))
    memory.interface.gates.register_forward_hook(lambda module, inputs, z: seen.append(z))
    output = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(2))
    gates, parts = seen
    assert gates.dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in parts if part is not None)
    parts = parts._replace(write_gate=parts.write_gate * (output.trace.write_gate > 0))
    _, writes, reads, state = dnc_gpt2.dnc_loop(parts, run.model.init_state(2), memory.options)
    assert_same(output.trace[:3], (parts.write_gate, writes, reads))
    assert_same(output.state[:6], state[:6])


# ── the LM head ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows", [5, 13])  # of a chunk
def test_head_loss_equals_the_readable_one(rows, monkeypatch):
    """dnc_scan.head beside a chunked F.cross_entropy: values and gradients, in float64."""
    draw = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, 6, generator=draw, dtype=torch.float64) for n in (13, 31))
    targets = torch.randint(31, (13,), generator=draw)
    targets[[2, 12]] = -100
    monkeypatch.setattr(dnc_gpt2, "LOGITS_AT_ONCE", rows * len(weight))
    results = []
    for head in (dnc_gpt2.head_loss, dnc_gpt2.chunked_head_loss):
        leaves = h.clone().requires_grad_(), weight.clone().requires_grad_()
        slices = [] if head is dnc_gpt2.head_loss else [dnc_gpt2.logit_chunks(13, weight)]
        loss, nll, top1 = head(*leaves, targets, torch.float64, *slices)
        assert not nll.requires_grad and not top1.requires_grad
        results.append((loss.detach(), nll, top1, *torch.autograd.grad(0.7 * loss, leaves)))
    assert_same(*results, rtol=1e-12, atol=1e-12)


# ── loss ────────────────────────────────────────────────────────────────────────────────────────


class VocabularyProducts(TorchDispatchMode):
    """Counts the rows of every matrix product with a vocabulary-wide result."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm") and result.shape[-1] == VOCAB:
            self.rows += result.numel() // VOCAB
        return result


@pytest.mark.parametrize("arm, fields, without", [
    ("baseline", {}, 0), ("dnc", {"lambda_routing": 0.0}, 0),
    ("dnc", {"routing_fraction": 0.25}, 8), ("dnc", {"routing_fraction": 1.0}, 32)])
def test_step_computes_logits_without_memory_only_where_routing_needs_them(
        start, arm, fields, without):
    run = start(arm, min_surprisal=0.0, **fields)  # which takes the logits of common tokens
    tokens, positions = tokens_of(run.config), dnc_gpt2.routing_positions(run.config, 0)
    with VocabularyProducts() as products:
        output = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(2), positions)
    assert products.rows == tokens[:, 1:].numel() + 2 * without
    assert (0 if positions is None else positions.shape[1]) == without
    assert output.effect.shape == (2, without)


def test_routing_positions_come_from_seed_and_step_alone():
    config = tiny_config(routing_fraction=0.25, batch_size=6, bptt_segments=2)
    first = dnc_gpt2.routing_positions(config, 5)
    torch.manual_seed(99)
    assert torch.equal(first, dnc_gpt2.routing_positions(config, 5))
    assert first.shape == (3, 8)
    assert all(len(set(row.tolist())) == 8 and max(row) < config.step_len for row in first)
    others = (dnc_gpt2.routing_positions(config, 6),
              dnc_gpt2.routing_positions(dataclasses.replace(config, seed=1), 5))
    assert not any(torch.equal(first, other) for other in others)
    every = dnc_gpt2.routing_positions(dataclasses.replace(config, routing_fraction=1.0), 0)
    assert torch.equal(every.sort(1).values, torch.arange(32).repeat(3, 1))
    one = dnc_gpt2.routing_positions(dataclasses.replace(config, routing_fraction=1e-6), 0)
    assert one.shape == (3, 1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_probabilities(model, tokens, state) -> tuple[np.ndarray, np.ndarray, DNCTrace, DNCState]:
    """float64 log-probabilities (B, L, V) with and without memory, of a model in float64."""
    with torch.no_grad():
        h, h_out, state, trace = model.hidden(tokens, state)
    head = model.controller.wte.weight.detach().numpy().T
    log_q = log_softmax(h.numpy() @ head)
    if trace is None:
        return log_q, log_q, trace, state
    p = np.exp(log_softmax(h_out.numpy() @ head))
    for b, t in np.ndindex(*tokens.shape):  # the mixture, spelled out
        weights = trace.read_weights[b, t].mean(0).numpy() * (trace.tokens[b, t] >= 0).numpy()
        p[b, t] *= 1 - weights.sum()
        for slot, weight in enumerate(weights):
            p[b, t, trace.tokens[b, t, slot]] += weight
    return np.log(p), log_q, trace, state


@pytest.mark.parametrize("routing", ["kl", "benefit"])
@pytest.mark.parametrize("chunk", [2**25, 7 * VOCAB])  # in one piece, and in uneven pieces
def test_routing_effect_equals_a_second_computation(start, routing, chunk, monkeypatch):
    monkeypatch.setattr(dnc_gpt2, "LOGITS_AT_ONCE", chunk)
    run = start("dnc", speaking=True, routing=routing, routing_fraction=1.0)
    model, tokens = run.model.double().eval(), tokens_of(run.config)
    x, y, positions = tokens[:, :-1], tokens[:, 1:], dnc_gpt2.routing_positions(run.config, 3)
    log_p, log_q, _, _ = log_probabilities(model, x, model.init_state(2))
    if routing == "kl":
        effect = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        assert effect.min() > 0
    else:
        effect = np.take_along_axis(log_p - log_q, y.numpy()[..., None], -1)[..., 0]
        assert effect.min() < 0 < effect.max()
    expected = np.take_along_axis(effect, positions.numpy(), 1)
    found = model(x, y, model.init_state(2), positions).effect
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=2e-6)


def numpy_entropy(weights: np.ndarray) -> np.ndarray:
    p = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)  # nothing written: 0
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    return -terms.sum(-1) / math.log(weights.shape[-1])


@pytest.mark.parametrize("arm", ["baseline", "dnc"])
@pytest.mark.parametrize("lambdas", [(0.0, 0.2), (0.3, 0.2)])
def test_loss_is_the_sum_of_its_three_parts(start, arm, lambdas):
    names = dict(zip(("lambda_routing", "lambda_entropy"), lambdas, strict=True))
    run = start(arm, speaking=True, lambda_vocabulary=0.0, **names)
    tokens, positions = tokens_of(run.config), dnc_gpt2.routing_positions(run.config, 0)
    output = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(2), positions)
    expected = output.nll.detach().double().mean().item()
    if arm == "dnc":
        trace = DNCTrace(*(part.detach().double().numpy() for part in output.trace))
        if lambdas[0]:
            gates = np.take_along_axis(trace.write_gate, positions.numpy(), 1)
            expected -= lambdas[0] * (gates * output.effect.double().numpy()).mean()
        expected += lambdas[1] * numpy_entropy(trace.write_weights).mean()
    loss = dnc_gpt2.total_loss(output, positions, run.config)
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-5)


def test_loss_sends_the_routing_gradient_through_the_gate_alone(start):
    run = start("dnc", speaking=True, lambda_routing=0.7, lambda_entropy=0.0, routing_fraction=1.0)
    tokens, positions = tokens_of(run.config), dnc_gpt2.routing_positions(run.config, 0)
    output = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(2), positions)
    assert not output.effect.requires_grad and output.trace.write_gate.requires_grad
    parameters = list(run.model.parameters())
    loss = dnc_gpt2.total_loss(output, positions, run.config)
    found = torch.autograd.grad(loss, parameters)
    constant = output.effect.clone()
    output = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(2))
    gates = output.trace.write_gate.gather(1, positions)
    by_hand = output.loss.mean() - 0.7 * (gates * constant).mean()
    wanted = torch.autograd.grad(by_hand, parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_weight_entropy_is_normalised_bounded_and_blind_to_the_gate():
    assert dnc_gpt2.weight_entropy(torch.full((2, 7), 0.01)).tolist() == pytest.approx([1.0, 1.0])
    assert dnc_gpt2.weight_entropy(torch.eye(5) * 1e-3).tolist() == pytest.approx([0.0] * 5)
    closed = torch.zeros(1, 4, requires_grad=True)  # a gate that is shut: finite, as its gradient
    dnc_gpt2.weight_entropy(closed).sum().backward()
    assert closed.grad.isfinite().all()


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(1e-4, 1.0))
@settings(max_examples=100, deadline=None)
def test_weight_entropy_does_not_depend_on_the_scale(weights, scale):
    w = torch.tensor(weights, dtype=torch.float64) + 1e-3
    entropy = dnc_gpt2.weight_entropy(w)
    assert -1e-9 <= entropy <= 1 + 1e-9
    assert entropy.item() == pytest.approx(numpy_entropy(w.numpy()).item(), abs=1e-6)
    assert dnc_gpt2.weight_entropy(w * scale).item() == pytest.approx(entropy.item(), abs=1e-6)


# ── metrics and evaluation ──────────────────────────────────────────────────────────────────────


def slow_evaluation(model, stream: list[int], config, memory: str) -> dict[str, float]:
    """Every metric in float64, one token at a time, from the definition: a stream of n tokens has
    n - 1 targets, cut into rows of equal length, the last one shorter."""
    length = -(-(len(stream) - 1) // config.eval_rows)
    starts = [row * length for row in range(config.eval_rows)]
    states = [model.init_state(1) for _ in starts]
    found: dict[str, list[float]] = {name: [] for name in STATS}
    for window in range(0, length, config.seq_len):
        if memory == "swapped" and states[0] is not None:
            states = [states[row - 1] for row in range(len(starts))]
        if memory == "emptied":
            states = [model.init_state(1) for _ in starts]
        width = min(config.seq_len, length - window)
        for row, first in enumerate(starts):
            at = [first + window + j for j in range(width)]
            inputs = [stream[i] if i < len(stream) - 1 else 0 for i in at]
            log_p, log_q, trace, states[row] = log_probabilities(
                model, torch.tensor([inputs]), states[row])
            for j, i in enumerate(at):
                if i + 1 >= len(stream):
                    continue
                p, q, target = log_p[0, j], log_q[0, j], stream[i + 1]
                found["nll"].append(-p[target])
                found["top1"].append(all(p[v] < p[target] for v in range(VOCAB) if v != target))
                found["top5"].append(sum(p >= p[target]) <= 5)
                found["confidence"].append(math.exp(p[target]))
                found["rank"].append(1 + sum(p > p[target]))
                found["pred_entropy"].append(-(np.exp(p) * p).sum())
                if trace is not None:
                    gate, w = trace.write_gate[0, j].item(), trace.write_weights[0, j].numpy()
                    found["nll_without"].append(-q[target])
                    found["kl"].append((np.exp(p) * (p - q)).sum())
                    found["gate"].append(gate)
                    found["write_rate"].append(gate > 0.7)
                    if gate > 0:  # what is not written is no focus
                        found["sparsity"].append(1 - numpy_entropy(w))
    assert len(found["nll"]) == len(stream) - 1
    mean = {name: float(np.mean(values)) for name, values in found.items() if values}
    metrics = {"loss": mean["nll"], "ppl": math.exp(mean["nll"]), "bpt": mean["nll"] / math.log(2),
               "top1_acc": mean["top1"], "top5_acc": mean["top5"], "mean_rank": mean["rank"],
               "confidence": mean["confidence"], "pred_entropy": mean["pred_entropy"]}
    if "gate" in mean:
        metrics |= {"avg_gate": mean["gate"], "gate_std": float(np.std(found["gate"])),
                    "write_rate": mean["write_rate"], "write_sparsity": mean["sparsity"],
                    "mem_kl": mean["kl"], "loss_without": mean["nll_without"]}
    return metrics


def evaluate(run: dnc_gpt2.Run, stream: torch.Tensor, **options) -> dict:
    return dnc_gpt2.evaluate(run.model, stream, run.config, dnc_gpt2.StopSignal(), **options)


@pytest.mark.parametrize("arm, fields, options", [
    ("baseline", {}, {}), ("dnc", {}, {}), ("dnc", {"carry_memory": False}, {}),
    ("dnc", {"eval_rows": 2}, {}), ("dnc", {}, {"memory": "swapped"}),
    ("dnc", {}, {"memory": "emptied"}), ("dnc", {}, {"brief": True})])
@pytest.mark.parametrize("length", [151, 198])
def test_evaluate_equals_a_slow_second_computation(start, corpus, arm, fields, options, length):
    run = start(arm, speaking=True, **{"eval_rows": 3} | fields)
    stream = corpus.valid[:length]
    found = evaluate(run, stream, **options)
    exact = copy.deepcopy(run.model).double()
    slow = slow_evaluation(exact, stream.tolist(), run.config,
                           options.get("memory", "carried"))
    wanted = {"loss", "ppl", "bpt"} if "brief" in options else slow.keys()
    assert found["metrics"].keys() == wanted
    assert found["sums"][..., 1:].any() != ("brief" in options)  # nothing else was computed
    assert found["counts"].sum() == length - 1
    for name in wanted:
        assert found["metrics"][name] == pytest.approx(slow[name], rel=2e-4, abs=2e-5), name
    if arm == "dnc":
        assert 0.05 < slow["write_rate"] < 0.95 and slow["mem_kl"] > 0.01  # they had to be measured


def test_evaluate_is_repeatable_and_leaves_training_as_it_was(start, corpus):
    run = start("dnc", speaking=True, dropout=0.4)
    rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
    dnc_gpt2.train_step(run, run.model, rows)
    weights = copy.deepcopy(run.model.state_dict())
    kept, state, generator = copy.deepcopy(run.state), run.state, torch.get_rng_state()
    first = evaluate(run, corpus.valid)
    assert run.model.training and run.state is state
    assert_same(run.state, kept)
    assert torch.equal(torch.get_rng_state(), generator)
    dnc_gpt2.train_step(run, run.model, rows)  # training's memory moves on; evaluation starts empty
    run.model.load_state_dict(weights)
    second = evaluate(run, corpus.valid)
    assert first["metrics"] == second["metrics"]
    assert torch.equal(first["sums"], second["sums"])


def test_token_statistics_count_ties_against_the_model():
    weight = torch.eye(8)
    h = torch.tensor([[0.0] * 8,  # all equal
                      [2.0, 2.0, 0, 0, 0, 0, 0, 0],  # tied for the first place
                      [3.0, 2.0, 1.0, 1.0, 1.0, 0, 0, 0],  # tied for the third to fifth
                      [3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0, 0],  # tied for the third to sixth
                      [5.0, 0, 0, 0, 0, 0, 0, 0]])[None]
    targets = torch.tensor([[0, 0, 2, 2, 0]])
    stats = dnc_gpt2.token_statistics(h, h, targets, weight, None, brief=False)[0]
    column = {name: stats[:, STATS.index(name)].tolist() for name in ("top1", "top5", "rank")}
    assert column == {"top1": [0, 0, 0, 0, 1], "top5": [0, 1, 1, 0, 1], "rank": [1, 1, 3, 3, 1]}


def evaluation_of(nll: np.ndarray, counts: np.ndarray) -> dict:
    """An evaluation with these mean losses and token counts, both (windows, rows)."""
    sums = torch.zeros(*nll.shape, len(STATS), dtype=torch.float64)
    sums[..., 0] = torch.tensor(nll * counts)
    return {"sums": sums, "counts": torch.tensor(counts)}


def sign_of(reference: dict, other: dict) -> int:
    """What one seed says of two evaluations."""
    return dnc_gpt2.paired([reference], [other], "nll").sign


def test_paired_sign_needs_the_interval_to_exclude_zero():
    draw, shape = np.random.default_rng(0), (50, 4)
    counts = draw.integers(3, 17, shape)
    level = draw.normal(5, 2, shape)  # windows differ far more than arms do; pairs see it
    reference = evaluation_of(level, counts)
    for shift, sign in ((-0.05, -1), (0.05, 1)):
        other = evaluation_of(level + shift + draw.normal(0, 0.1, shape), counts)
        assert sign_of(reference, other) == sign
    assert sign_of(reference, reference) == 0


def test_paired_sign_weighs_windows_by_their_tokens():
    """The same gain at every token is certain, however unequal the windows are."""
    counts = np.array([[1, 1], [2, 90]])
    level = np.array([[4.0, 9.0], [6.0, 5.0]])
    reference, other = (evaluation_of(level + shift, counts) for shift in (0, -0.01))
    assert sign_of(reference, other) == -1
    only_one = evaluation_of(level - np.array([[3.0, 0], [0, 0]]), counts)
    assert sign_of(reference, only_one) == 0


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_paired_sign_is_right_about_noise_in_95_of_100_cases(correlation):
    """Also where a window is like its neighbour, as text is; independent windows would call 3 to 5
    times too often at 0.8."""
    draw, called, shape = np.random.default_rng(1), 0, (160, 8)
    for _ in range(400):
        noise = draw.normal(0, 0.5, shape)
        for t in range(1, shape[0]):
            noise[t] += correlation * noise[t - 1]
        counts = draw.integers(3, 17, shape)
        level = draw.normal(5, 2, shape)
        reference, other = evaluation_of(level, counts), evaluation_of(level + noise, counts)
        called += sign_of(reference, other) != 0
    assert 6 <= called <= 40  # 20 expected


# ── training ────────────────────────────────────────────────────────────────────────────────────


def test_rate_share_warms_up_then_follows_its_schedule():
    shares = [dnc_gpt2.rate_share(step, 100, warmup=0.1, floor=0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(shares) == pytest.approx(1) and shares[10] == pytest.approx(1)
    assert all(a > b for a, b in zip(shares[10:], shares[11:], strict=False))
    assert shares[55] == pytest.approx(0.55) and shares[-1] == pytest.approx(0.1, rel=0.02)
    flat = [dnc_gpt2.rate_share(step, 100, warmup=0.1, floor=1.0) for step in range(100)]
    assert flat[:10] == shares[:10] and set(flat[10:]) == {1.0}
    assert dnc_gpt2.rate_share(0, 1, warmup=0.0, floor=1.0) == 1


def test_training_feeds_the_stream_in_order_and_every_arm_the_same(start, corpus):
    """Each step's tokens follow the last step's; targets are the next tokens; the memory is carried
    detached from step to step and emptied at every new epoch."""
    fed = {}
    for arm in ("baseline", "dnc", "matched"):
        run, calls = start(arm, max_steps=0, epochs=2, empty_share=0.0), []

        def forward(tokens, targets, state, positions, run=run, calls=calls):
            calls.append((tokens, targets, state))
            return run.model(tokens, targets, state, positions)

        rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
        assert run.total_steps == 2 * run.steps_per_epoch > 8
        for _ in range(run.steps_per_epoch + 2):
            before = run.state
            dnc_gpt2.train_step(run, forward, rows)
            tokens, targets, state = calls[-1]
            if (run.step - 1) % run.steps_per_epoch == 0:
                if arm == "dnc":
                    assert_same(state, run.model.init_state(run.config.rows))
            else:
                assert state is before
            if arm == "dnc":
                assert run.state.memory.any()
                assert not any(part.requires_grad for part in run.state)
        fed[arm] = calls
        epoch = calls[: run.steps_per_epoch]
        inputs = torch.cat([tokens for tokens, _, _ in epoch], dim=1).flatten()
        targets = torch.cat([targets for _, targets, _ in epoch], dim=1).flatten()
        assert torch.equal(inputs, corpus.train[: len(inputs)])  # no token left out between steps
        assert torch.equal(targets, corpus.train[1 : len(inputs) + 1])
        assert torch.equal(calls[run.steps_per_epoch][0], calls[0][0])
    for arm in ("dnc", "matched"):
        for ours, theirs in zip(fed["baseline"], fed[arm], strict=True):
            assert_same(ours[:2], theirs[:2])


def test_training_lowers_the_loss_of_every_arm(start, corpus):
    for arm in ("baseline", "dnc"):
        run = start(arm, max_steps=30, lr=1e-2)
        rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
        before = evaluate(run, corpus.valid)["metrics"]["loss"]
        for _ in range(30):
            dnc_gpt2.train_step(run, run.model, rows)
        assert evaluate(run, corpus.valid)["metrics"]["loss"] < before - 0.5
        assert run.step == run.meter.steps == 30
        if arm == "dnc":
            assert run.model.memory.read_proj.weight.abs().max() > 1e-3


def test_optimizer_decays_matrices_alone_and_holds_every_parameter_once(start, corpus):
    run = start("dnc", weight_decay=0.2, lr=0.01, memory_lr=0.3, lr_warmup=0.0, max_steps=1)
    rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
    dnc_gpt2.train_step(run, run.model, rows)
    of_memory = {id(p) for p in run.model.memory.parameters()}
    held = []
    for group in run.optimizer.param_groups:
        held += map(id, group["params"])
        assert group["fused"] and group["betas"] == (0.9, 0.95)
        for p in group["params"]:
            assert group["weight_decay"] == (0.2 if p.dim() >= 2 else 0)
            assert group["lr"] == pytest.approx(0.003 if id(p) in of_memory else 0.01)
    assert sorted(held) == sorted(id(p) for p in run.model.parameters())


def test_gradients_are_clipped_to_their_global_norm(start, corpus):
    run, norms = start("dnc", grad_clip=0.05), []
    rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
    for _ in range(2):
        dnc_gpt2.train_step(run, run.model, rows)
        grads = [p.grad.norm() for p in run.model.parameters()]
        norms.append(torch.stack(grads).norm().item())
    assert norms == pytest.approx([0.05, 0.05], rel=1e-3)


@pytest.mark.parametrize("links", [False, True])
def test_fused_and_eager_scan_train_alike(start, corpus, links):
    """20 steps: losses within 1e-4 relative, whichever recurrence runs."""
    pytest.importorskip("numba")
    losses = []
    for scan in ("eager", "fused"):
        run = start("dnc", scan=scan, use_links=links, lambda_routing=0.5, lambda_entropy=0.1)
        rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
        losses.append([])
        for _ in range(20):
            before = run.meter.loss
            dnc_gpt2.train_step(run, run.model, rows)
            losses[-1].append(run.meter.loss - before)
    assert losses[0][-1] < losses[0][0] - 0.1  # something was learnt
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_training_stops_before_a_non_finite_step_changes_anything(start, corpus, broken):
    run = start("dnc")
    rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
    for _ in range(2):
        dnc_gpt2.train_step(run, run.model, rows)
    run.last_saved = "checkpoints/GPT2_+_DNC_step2.pt"
    weights, moments = (copy.deepcopy(part.state_dict()) for part in (run.model, run.optimizer))

    def forward(*args):
        output = run.model(*args)
        if broken == "loss":
            return output._replace(loss=output.loss + math.inf)
        output.loss.register_hook(lambda grad: grad * math.nan)  # the loss itself stays finite
        return output

    with pytest.raises(dnc_gpt2.Diverged) as caught:
        dnc_gpt2.train_step(run, forward, rows)
    said = str(caught.value)
    assert all(word in said for word in ("GPT2 + DNC", "step 2", run.last_saved, "--lr"))
    assert run.step == 2
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())
    for index, held in run.optimizer.state_dict()["state"].items():
        for key, value in held.items():
            assert torch.equal(value, moments["state"][index][key])


def test_command_that_diverges_says_where_and_exits_1(main, capfd, tiny_argv, tmp_path):
    argv = [*tiny_argv, *flags({
        "save_dir": tmp_path, "plot_dir": tmp_path, "lr": 1e25, "grad_clip": 1e30,
        "lr_warmup": 0.0, "arms": "baseline", "save_every_steps": 1})]
    assert main(argv) == 1
    line = error_line(capfd.readouterr().err)
    saved = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert "GPT2 Baseline" in line and "--lr" in line
    step = len(saved)  # a checkpoint a step until it stopped
    assert f"step {step}" in line and f"GPT2_Baseline_step{step}.pt" in line
    assert all((tmp_path / f"GPT2_Baseline_step{i + 1}.pt").exists() for i in range(step))


# ── hardware ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fields, visible, gpus", [
    ({}, 0, 0), ({}, 1, 1), ({}, 8, 2), ({"num_gpus": 0}, 2, 0), ({"num_gpus": 1}, 2, 1),
    ({"bptt_segments": 4}, 2, 1),  # one row: one GPU
    ({"use_compile": True}, 1, 1), ({"use_compile": True, "bptt_segments": 4}, 2, 1)])
def test_choose_hardware_takes_up_to_two_gpus_and_one_a_row(fields, visible, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a, **k: (9, 0))
    config = tiny_config(**{"num_gpus": "auto", "precision": "auto", **fields})
    chosen, found = dnc_gpt2.choose_hardware(config, visible)
    assert found == gpus
    assert chosen.precision == ("bf16" if gpus else "float32")
    assert dataclasses.replace(chosen, precision="auto") == config


def test_choose_hardware_keeps_a_precision_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a, **k: (7, 5))
    for asked, visible, expected in (("auto", 1, "float32"), ("bf16", 0, "bf16"),
                                     ("float32", 1, "float32")):
        config = tiny_config(num_gpus="auto", precision=asked)
        assert dnc_gpt2.choose_hardware(config, visible)[0].precision == expected


@pytest.mark.parametrize("fields, visible, said", [
    ({"num_gpus": 1}, 0, "num_gpus"), ({"num_gpus": 2}, 1, "num_gpus"),
    ({"num_gpus": "auto", "use_compile": True}, 2, "num_gpus=1")])
def test_choose_hardware_refuses_what_is_not_there(fields, visible, said):
    with pytest.raises(ValueError, match=said):
        dnc_gpt2.choose_hardware(tiny_config(**fields), visible)


@pytest.fixture
def two_devices(monkeypatch):
    """DataParallel's own scatter and gather, with the copy between devices replaced by a cut and a
    join of rows: what they do with namedtuples, None and empty parts stays theirs."""

    class Scatter:
        @staticmethod
        def apply(devices, sizes, dim, tensor):
            return tensor.chunk(len(devices), dim)

    class Gather:
        @staticmethod
        def apply(device, dim, *tensors):
            return torch.cat(tensors, dim)

    monkeypatch.setattr(scatter_gather, "Scatter", Scatter)
    monkeypatch.setattr(scatter_gather, "Gather", Gather)

    def split(model):
        def forward(*inputs):
            scattered, _ = scatter_gather.scatter_kwargs(inputs, {}, [0, 1])
            assert len(scattered) == 2 and not torch.equal(scattered[0][0], scattered[1][0])
            return scatter_gather.gather([model(*part) for part in scattered], "cpu")

        return forward

    return split


@pytest.mark.parametrize("arm, fields", [
    ("baseline", {}), ("dnc", {"use_links": True}), ("dnc", {"lambda_routing": 0.0}),
    ("dnc", {"carry_memory": False}), ("dnc", {"batch_size": 6})])  # 6 / 2 = 3 rows on two devices
def test_data_parallel_scatters_and_gathers_by_row(start, two_devices, arm, fields):
    run = start(arm, speaking=True, **fields)
    model, rows, tokens = run.model.eval(), run.config.rows, tokens_of(run.config)
    state, positions = fill_state(model, rows), dnc_gpt2.routing_positions(run.config, 0)
    inputs = (tokens[:, :-1], tokens[:, 1:], state, positions)
    whole, parts = model(*inputs), two_devices(model)(*inputs)
    joined = whole._replace(loss=parts.loss)  # each device has the mean over its own rows
    assert_same(joined, parts, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(whole.loss.mean(), parts.loss.mean())
    assert parts.nll.shape == (rows, run.config.step_len)
    if arm == "dnc":
        assert parts.state.memory.shape[0] == rows and parts.trace.write_gate.shape[0] == rows
        loss, other = (dnc_gpt2.total_loss(o, positions, run.config) for o in (whole, parts))
        torch.testing.assert_close(loss, other)


@pytest.mark.parametrize("arm", ["baseline", "dnc"])
def test_data_parallel_trains_to_the_same_weights(start, corpus, two_devices, arm):
    runs = [start(arm, lr=1e-3, lambda_routing=0.5) for _ in range(2)]
    for run, wrap in zip(runs, (lambda model: model, two_devices), strict=True):
        rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
        forward = wrap(run.model)
        for _ in range(3):
            dnc_gpt2.train_step(run, forward, rows)
    assert_same(runs[0].state, runs[1].state, rtol=1e-3, atol=1e-5)
    ours, theirs = (run.model.state_dict() for run in runs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_use_compile_trains_on_the_cpu_and_saves_a_plain_checkpoint(start, corpus, tmp_path):
    fields = {"use_compile": True, "save_dir": str(tmp_path), "lr": 1e-3}
    compiled, plain = start("dnc", **fields), start("dnc", **fields | {"use_compile": False})
    rows = dnc_gpt2.training_rows(corpus.train, plain.config.rows, plain.config.step_len)
    for run in (compiled, plain):
        for _ in range(2):
            dnc_gpt2.train_step(run, run.model, rows)
    torch.testing.assert_close(compiled.meter.loss, plain.meter.loss, rtol=1e-4, atol=1e-4)
    stream = corpus.valid[:129]  # windows of one shape, each of which would be compiled
    found = evaluate(compiled, stream)["metrics"]["loss"]
    dnc_gpt2.save_checkpoint(compiled, corpus)
    fresh = start("dnc", **fields | {"use_compile": False})
    path = tmp_path / "GPT2_+_DNC_step2.pt"
    dnc_gpt2.restore(fresh, dnc_gpt2.load_checkpoint(path), path, corpus)
    assert fresh.step == 2
    again = evaluate(fresh, stream)["metrics"]["loss"]
    assert again == pytest.approx(found, rel=1e-5)
    assert not any("_orig_mod" in name for name in compiled.model.state_dict())


# ── a pretrained controller ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def pretrained(tmp_path):
    """A GPT-2 of other sizes than Config's, saved as a language model, with its folder."""
    torch.manual_seed(5)
    settings = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=24, n_layer=2, n_head=3, n_inner=40,
        bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(settings).eval()
    model.save_pretrained(tmp_path / "gpt2")
    return model, str(tmp_path / "gpt2")


def test_init_from_starts_from_the_pretrained_model(start, pretrained):
    theirs, folder = pretrained
    run = start("dnc", init_from=folder, hidden_size=24, num_layers=2, num_heads=3, dropout=0.2,
                pointing=False)
    tokens = tokens_of(run.config)[:, :16]
    assert run.model.controller.config.resid_pdrop == run.model.controller.config.attn_pdrop == 0.2
    run.model.eval()
    with torch.no_grad():
        expected = theirs.transformer(tokens).last_hidden_state
        h, h_out, *_ = run.model.hidden(tokens, run.model.init_state(2))
        logits = theirs(tokens).logits
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(h, h_out)  # memory does not perturb it at step 0
    nll = run.model(tokens[:, :-1], tokens[:, 1:], run.model.init_state(2)).nll
    wanted = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(nll, wanted, rtol=1e-5, atol=1e-5)


def test_init_from_is_run_with_the_sizes_of_the_pretrained_model(
        main, drawn, capfd, pretrained, tiny_argv, tmp_path):
    outputs = {"save_dir": tmp_path / "c", "plot_dir": tmp_path / "p", "max_steps": 1}
    argv = [*tiny_argv, *flags(outputs | {"init_from": pretrained[1], "arms": "dnc"})]
    assert main(argv) == 0
    path = tmp_path / "c" / "GPT2_+_DNC_FINAL_step1.pt"
    payload = dnc_gpt2.load_checkpoint(path)
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_width": 40}
    assert {name: payload["config"][name] for name in sizes} == sizes
    assert payload["model_state_dict"]["controller.wpe.weight"].shape == (32, 24)
    out = capfd.readouterr().out
    assert "hidden_size=24" in out and "num_layers=2" in out
    shutil.rmtree(pretrained[1])  # the checkpoint is enough to look inside
    argv = flags({"inspect": path, "plot_dir": tmp_path / "p", "text": "Fi lem or."})
    assert main(argv) == 0
    assert (tmp_path / "p" / "memory_trace.png").stat().st_size > 1000


def test_init_from_refuses_what_does_not_fit(pretrained, tmp_path, start):
    other = tmp_path / "bert"
    transformers.BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                            vocab_size=VOCAB).save_pretrained(other)
    for fields, said in (({"init_from": str(other)}, "GPT-2 .*bert"),
                         ({"init_from": pretrained[1], "seq_len": 64}, "seq_len.*32 positions"),
                         ({"init_from": str(tmp_path / "none")}, "init_from.*folder")):
        with pytest.raises(ValueError, match=said):
            start("dnc", **fields)
    with pytest.raises(ValueError, match="tokenizer"):
        dnc_gpt2.controller_config(tiny_config(init_from=pretrained[1]), VOCAB + 1)
    with pytest.raises(ValueError, match="arms.*matched"):
        tiny_config(arms="baseline,matched", init_from=pretrained[1])


def test_tiny_memory_writes_some_tokens_and_skips_others(start):
    """So that what these tests hold is held of both."""
    run = start("dnc")
    _, _, _, trace = run.model.hidden(tokens_of(run.config)[:, :-1], run.model.init_state(2))
    assert 0.1 < (trace.write_gate > 0).double().mean() < 0.9


def test_tiny_sizes_hold_for_every_switch(start, corpus):
    """The switches of the memory pass through Config into a step that trains."""
    graves = {"pointing": False, "split_rows": False, "empty_slot": False, "usage_decay": 1.0,
              "min_surprisal": 0.0, "empty_share": 0.0}
    for fields in ({"use_links": True}, {"mask_min": 0.1, "split_rows": False}, graves,
                   {"dealloc_wipe": True}, {"use_links": True, "sharpen_links": True},
                   {"routing": "kl"}, {"row_key": "own"}, {"usage_decay": 0.5}):
        run = start("dnc", **fields)
        rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
        for _ in range(2):
            dnc_gpt2.train_step(run, run.model, rows)
        options = run.model.memory.options
        assert all(getattr(options, name, value) == value for name, value in fields.items())
        assert math.isfinite(run.meter.loss) and TINY["mem_slots"] == run.state.memory.shape[1]
        assert run.state.link.shape[1] == (8 if options.use_links else 0)
