"""Tests of the LM head of dnc_scan, which turns logits into their gradient in place, and of the
pointer, the mixture of the vocabulary's prediction and the tokens that slots hold.

M rows, V vocabulary, C hidden width, N slots.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import central_differences, mixture, mixture_nll, pointer_weights
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dnc_gpt2
from dnc_gpt2 import DNCTrace, Pointer, chunked_head_loss, point
from dnc_scan.head import head_loss

M, V, C, N = 13, 31, 6, 7  # rows, vocabulary, hidden width, slots

pointed_or_not = pytest.mark.parametrize("pointed", [False, True], ids=["plain", "pointed"])


def head_case(dtype=torch.float64, scale=1.0, pointed=False):
    """h (M, C), weight (V, C), targets (M,), of which two are not scored, and the leaf of a
    pointer's weights (M, N), or None. Some targets are held, some are the vocabulary's best."""
    draw = torch.Generator().manual_seed(0)
    h = scale * torch.randn(M, C, generator=draw, dtype=torch.float64)
    weight = torch.randn(V, C, generator=draw, dtype=torch.float64)
    targets = torch.randint(V, (M,), generator=draw)
    targets[:5] = (h @ weight.T)[:5].argmax(-1)  # for top-1
    if pointed:
        targets[5:10] = IDS[5:10, 1]
    targets[[2, M - 1]] = -100
    rho = WEIGHTS.to(dtype).requires_grad_() if pointed else None
    return h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, rho


def slots_of_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (M, N), -1 for none, and read weights (M, N): a memory without tokens, one without a
    read, one token in every slot, two tokens in turn, a sum of 0.95, then random ones."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (M, N), generator=draw)
    ids[torch.rand(M, N, generator=draw) < 0.3] = -1
    weights = torch.rand(M, N + 2, generator=draw, dtype=torch.float64).mul(3).softmax(-1)[:, :N]
    ids[0] = -1
    weights[1] = 0.0
    ids[3] = 4
    ids[4] = torch.tensor([9, 5]).repeat(N)[:N]
    weights[4] *= 0.95 / weights[4].sum()
    ids[5:10, 1] = torch.randint(V, (5,), generator=draw)  # held, to be targets
    return ids, weights


IDS, WEIGHTS = slots_of_rows()


def pointer_of(rho) -> Pointer | None:
    """The pointer of IDS with these read weights, as `point` masks them."""
    return None if rho is None else Pointer(IDS.clamp_min(0), rho * (IDS >= 0))


def slices_of(rows: int) -> list[slice]:
    """All M rows, so many at a time."""
    return [slice(start, start + rows) for start in range(0, M, rows)]


def values_and_gradients(head, case, dtype, rows, alone=0.0):
    """loss, nll, top1, and the gradients of 0.7 * loss into h, weight and the pointer's weights;
    alone is lambda_vocabulary."""
    h, weight, targets, rho = case
    loss, nll, top1 = head(h, weight, targets, dtype, slices_of(rows), pointer_of(rho), alone)
    assert not nll.requires_grad and not top1.requires_grad
    leaves = [leaf for leaf in (h, weight, rho) if leaf is not None]
    return (loss.detach(), nll, top1, *torch.autograd.grad(0.7 * loss, leaves))


# ══ Pointer ══════════════════════════════════════════════════════════════════════════════════════


def log_vocabulary(case) -> torch.Tensor:
    """log softmax(E h) (M, V)."""
    return (case[0] @ case[1].T).log_softmax(-1).detach()


def full_rows(dtype) -> Pointer:
    """Pointers that leave almost nothing to the vocabulary, exactly nothing, or rounding's less."""
    weights = torch.full((M, N), 1 / N, dtype=dtype)
    weights[:5] *= 1 - 1e-7
    weights[5:9] = 0.0
    weights[5:9, 2] = 1.0
    return Pointer(IDS.clamp_min(0), weights)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_pointer_mixture_sums_to_one(dtype, tolerance):
    """Over the vocabulary, whatever the slots hold, and it is the page's at every token."""
    case = head_case(dtype, pointed=True)
    p = pointer_of(case[3].detach()).mix(log_vocabulary(case)).exp()
    assert p.dtype == dtype
    torch.testing.assert_close(p.sum(-1), torch.ones(M, dtype=dtype), atol=tolerance, rtol=0)
    h, weight, _, rho = (leaf.detach().numpy() for leaf in case)
    want = [mixture(h[m], weight, np.where(IDS[m] >= 0, rho[m], 0.0), IDS[m].numpy())
            for m in range(M)]
    np.testing.assert_allclose(p, want, atol=tolerance)
    full = full_rows(dtype).mix(log_vocabulary(case)).exp()
    torch.testing.assert_close(full.sum(-1), torch.ones(M, dtype=dtype), atol=1e-6, rtol=0)


def test_pointer_nll_and_top1_are_those_of_the_mixture():
    """At every token of the vocabulary, and for the most likely one."""
    case = head_case(pointed=True)
    log_p = log_vocabulary(case)
    p_best, best = log_p.exp().max(-1)
    for pointer in (pointer_of(case[3].detach()), full_rows(torch.float64)):
        mixed = pointer.mix(log_p.clone())
        for token in range(V):
            targets = torch.full((M,), token)
            nll = pointer.nll(-log_p[:, token], targets)
            torch.testing.assert_close(nll, -mixed[:, token], atol=1e-9, rtol=0)
        top1 = pointer.top1(best, p_best, log_p.exp().gather(1, pointer.tokens))
        assert torch.equal(top1, mixed.argmax(-1)) and (top1 != best).any()
        some = pointer.rows(torch.tensor([4, 2]))
        assert torch.equal(some.mix(log_p[[4, 2]]), mixed[[4, 2]])


def test_pointer_counts_a_token_in_several_slots_once_each():
    """Two slots of 0.3 that hold one token are ahead of another slot's 0.4."""
    pointer = Pointer(torch.tensor([[7, 3, 7]]), torch.tensor([[0.3, 0.4, 0.3]]))
    log_p = torch.full((1, V), 1 / V).log()
    assert pointer.mix(log_p)[0].exp()[[7, 3]].tolist() == pytest.approx([0.6, 0.4], abs=1e-6)
    assert pointer.match(torch.tensor([7])).item() == pytest.approx(0.6)
    assert pointer.top1(torch.tensor([0]), torch.tensor([1 / V]), torch.full((1, 3), 1 / V)) == 7


def test_pointer_of_empty_memory_is_the_vocabulary_exactly():
    """No slot holds a token, however it is read: the same bits with and without the pointer."""
    reads = torch.rand(1, M, 2, N).softmax(-1)  # sum 1 over slots that hold nothing
    trace = DNCTrace(torch.ones(1, M), torch.ones(1, M, N), reads, torch.full((1, M, N), -1))
    pointer, (h, weight, targets, _) = point(trace), head_case(torch.float32)
    log_p = log_vocabulary((h, weight))
    assert torch.equal(pointer.mix(log_p), log_p.exp().log())
    for head in (chunked_head_loss, head_loss):
        with_pointer, without = (head(h, weight, targets, h.dtype, slices_of(5), held)
                                 for held in (pointer, None))
        assert all(map(torch.equal, with_pointer, without))


def test_point_is_mean_of_heads_where_tokens_are():
    """rho of the page, the rows of a batch one after the other."""
    reads = torch.rand(2, 3, 4, N, dtype=torch.float64).softmax(-1)
    tokens = IDS[:6].view(2, 3, N)
    pointer = point(DNCTrace(torch.ones(2, 3), torch.ones(2, 3, N), reads, tokens))
    want = [pointer_weights(reads[b, t].numpy(), tokens[b, t].numpy())
            for b in range(2) for t in range(3)]
    np.testing.assert_allclose(pointer.weights, want, atol=1e-15)
    assert torch.equal(pointer.tokens, IDS[:6].clamp_min(0))


# ══ Head ═════════════════════════════════════════════════════════════════════════════════════════


@pointed_or_not
@pytest.mark.parametrize("rows", [1, 5, 13, 100])  # of a chunk: uneven, whole, more than there are
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_head_loss_equals_the_readable_one(dtype, tolerance, rows, pointed):
    """Values and gradients are those of a chunked F.cross_entropy, and of all logits at once."""
    case = head_case(dtype, pointed=pointed)
    got = values_and_gradients(head_loss, case, dtype, rows, alone=0.6)
    want = values_and_gradients(chunked_head_loss, case, dtype, rows, alone=0.6)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    h, weight, targets, rho = case
    unscored = targets == -100
    log_p = (h @ weight.T).log_softmax(-1)
    alone = torch.zeros(())
    if pointed:
        alone = 0.6 * F.nll_loss(log_p, targets, ignore_index=-100, reduction="none").mean()
        log_p = pointer_of(rho).mix(log_p)
    nll = F.nll_loss(log_p, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(got[0], (nll.mean() + alone).detach(), rtol=tolerance, atol=0)
    leaves = [h, weight, rho] if pointed else [h, weight]
    slopes = torch.autograd.grad(0.7 * (nll.mean() + alone), leaves)
    torch.testing.assert_close((got[1], *got[3:]), (nll.detach(), *slopes), rtol=tolerance,
                               atol=tolerance)
    assert torch.equal(got[2].bool(), log_p.argmax(-1) == targets) and got[2].any()
    for values in (*got[1:4], *got[5:]):  # all but d_weight have a row of each target
        assert not values[unscored].any()


def test_pointed_losses_match_oracle_and_its_differences():
    """Both heads: -log p of the page at every target, and its slopes by central differences."""
    h, weight, targets, rho = case = head_case(pointed=True)
    scored = (targets != -100).nonzero().squeeze(1)
    rows, ids = scored.numpy(), IDS[scored].numpy()

    def page_nll(arrays):
        shares = np.where(ids >= 0, arrays["rho"][rows], 0.0)
        return mixture_nll(arrays["h"][rows], arrays["weight"], shares, ids,
                           targets[scored].numpy())

    arrays = {"h": h.detach().numpy(), "weight": weight.detach().numpy(),
              "rho": rho.detach().numpy()}
    want = central_differences(lambda moved: 0.7 * page_nll(moved).sum() / M, arrays, step=1e-6)
    for head in (head_loss, chunked_head_loss):
        loss, nll, _, *slopes = values_and_gradients(head, case, h.dtype, 5)
        np.testing.assert_allclose(nll[scored], page_nll(arrays), atol=1e-12)
        assert loss.item() == pytest.approx(page_nll(arrays).sum() / M, abs=1e-12)
        for name, slope in zip(arrays, slopes, strict=True):
            np.testing.assert_allclose(slope, want[name], atol=1e-8, err_msg=name)


@pointed_or_not
def test_head_loss_in_bf16_products_stays_near_float32(pointed):
    """Products in bfloat16 are used, and come near; results stay in float32."""
    case = head_case(torch.float32, pointed=pointed)
    exact = values_and_gradients(head_loss, case, torch.float32, 5)
    rough = values_and_gradients(head_loss, case, torch.bfloat16, 5)
    readable = values_and_gradients(chunked_head_loss, case, torch.bfloat16, 5)
    assert not torch.equal(exact[0], rough[0])
    for values in zip(exact, rough, readable, strict=True):
        assert values[1].dtype == torch.float32
        for other in (values[0], values[2]):
            assert (values[1] - other).abs().max() <= 0.02 * other.abs().max()


@pointed_or_not
def test_head_loss_survives_logits_that_overflow_exp(pointed):
    """Also where the vocabulary gives the target a probability that is 0 in floating point."""
    case = head_case(scale=1e3, pointed=pointed)
    h, weight, targets, _ = case
    loss, nll, _, *slopes = values_and_gradients(head_loss, case, h.dtype, 5)
    vocabulary = F.cross_entropy(h @ weight.T, targets, reduction="none")
    if pointed:
        assert (nll[5:10] < 10).all() and vocabulary[5:10].max() > 800
    else:
        torch.testing.assert_close(loss, vocabulary.sum() / M)
    assert all(slope.isfinite().all() for slope in slopes)


class VocabularyWide(TorchDispatchMode):
    """Keeps every tensor as wide as the vocabulary, so that no storage is counted for another."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (V,):
            self.tensors.append(result)
        return result


@pointed_or_not
@pytest.mark.parametrize("rows", [4, 13])
def test_head_loss_holds_one_chunk_of_logits(rows, pointed):
    """Forward and backward make one tensor (m, V) a chunk: two (M, V) never exist."""
    h, weight, targets, rho = head_case(pointed=pointed)
    with VocabularyWide() as seen:
        loss, _, _ = head_loss(h, weight, targets, torch.float64, slices_of(rows), pointer_of(rho))
        loss.backward()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 8
                for x in seen.tensors}
    chunk_logits = [size for size in storages.values() if size != weight.numel()]
    assert len(chunk_logits) == math.ceil(M / rows)  # made in place
    assert max(chunk_logits) == rows * V


def test_head_loss_in_bf16_products_takes_half_of_the_rows_at_once(monkeypatch):
    """There a chunk exists twice, in bf16 and in float32: together no more than all rows once."""
    monkeypatch.setattr(dnc_gpt2, "LOGITS_AT_ONCE", M * V)
    h, weight, targets, _ = head_case(torch.float32)
    with VocabularyWide() as seen:
        dnc_gpt2.head_loss(h, weight, targets, torch.bfloat16)
    rows = [x.shape[0] for x in seen.tensors if x.shape[0] != C]  # not weight.T
    assert rows and max(rows) <= M // 2


def test_head_loss_serves_one_backward():
    h, weight, targets, _ = head_case()
    loss, _, _ = head_loss(h, weight, targets, torch.float64, slices_of(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        loss.backward()


def test_head_loss_refuses_a_second_derivative():
    """Its gradients are made in the forward: what depends on them would be left out."""
    h, weight, targets, _ = head_case()
    loss, _, _ = head_loss(h, weight, targets, torch.float64, slices_of(5))
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(factor * loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


@pointed_or_not
def test_head_loss_of_a_model_in_bfloat16(pointed):
    """Weights and h in bfloat16, the pointer as its recurrence has it, in float32."""
    h, weight, targets, rho = head_case(torch.float32, pointed=pointed)
    low = [x.detach().bfloat16().requires_grad_() for x in (h, weight)]
    losses = []
    for head in (head_loss, chunked_head_loss):
        loss, nll, _ = head(*low, targets, torch.bfloat16, slices_of(5), pointer_of(rho), 1.0)
        grads = torch.autograd.grad(loss, low)
        losses.append((loss.float(), nll.float(), *(grad.float() for grad in grads)))
        assert all(grad.dtype == torch.bfloat16 for grad in grads)
    assert head_loss(*low, targets, torch.bfloat16, slices_of(5))[0].dtype == torch.float32
    for fast, readable in zip(*losses, strict=True):
        torch.testing.assert_close(fast, readable, rtol=0.05, atol=0.02)


def test_head_loss_refuses_a_target_below_the_vocabulary():
    h, weight, targets, _ = head_case()
    targets[3] = -1
    for head in (head_loss, chunked_head_loss):
        with pytest.raises((IndexError, RuntimeError)):
            head(h, weight, targets, torch.float64, slices_of(5))


@pointed_or_not
def test_head_loss_without_gradients_has_the_same_values(pointed):
    h, weight, targets, rho = head_case(pointed=pointed)
    inputs = (h, weight, targets, torch.float64, slices_of(5), pointer_of(rho))
    loss, nll, top1 = head_loss(*inputs)
    with torch.no_grad():
        without = head_loss(*inputs)
    for value, want in zip(without, (loss, nll, top1), strict=True):
        assert not value.requires_grad and torch.equal(value, want)


@pointed_or_not
def test_head_loss_of_a_frozen_head_gives_the_rest_the_same_gradient(pointed):
    """A head that is not trained has no gradient, and none as large as it is made on the way; an
    evaluation of it makes none at all."""
    h, weight, targets, rho = head_case(pointed=pointed)
    leaves = (h,) if rho is None else (h, rho)

    def run(head: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = (h, head, targets, torch.float64, slices_of(5), pointer_of(rho))
        return torch.autograd.grad(head_loss(*inputs)[0], leaves)

    class WeightWide(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.made += isinstance(result, torch.Tensor) and result.shape == (V, C) \
                and result.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
            return result

    with WeightWide() as trained:
        wanted = run(weight)
    with WeightWide() as frozen:
        got = run(weight.detach())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert trained.made and not frozen.made
    with torch.no_grad(), WeightWide() as evaluated:
        head_loss(h, weight, targets, torch.float64, slices_of(5), pointer_of(rho))
    assert not evaluated.made
