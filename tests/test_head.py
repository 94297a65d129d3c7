"""Tests of the LM head of dnc_scan, which turns logits into their gradient in place."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dnc_gpt2
from dnc_gpt2 import chunked_head_loss
from dnc_scan.head import head_loss

M, V, C = 13, 31, 6  # rows, vocabulary, hidden width


def head_case(dtype=torch.float64, scale=1.0):
    """h (M, C), weight (V, C), targets (M,), of which two are not scored."""
    draw = torch.Generator().manual_seed(0)
    h = scale * torch.randn(M, C, generator=draw, dtype=torch.float64)
    weight = torch.randn(V, C, generator=draw, dtype=torch.float64)
    targets = torch.randint(V, (M,), generator=draw)
    targets[:5] = (h @ weight.T)[:5].argmax(-1)  # for top-1
    targets[[2, M - 1]] = -100
    return h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def slices_of(rows: int) -> list[slice]:
    """All M rows, so many at a time."""
    return [slice(start, start + rows) for start in range(0, M, rows)]


def values_and_gradients(head, case, dtype, rows):
    """loss, nll, top1, and the gradients of 0.7 * loss into h and weight."""
    h, weight, targets = case
    loss, nll, top1 = head(h, weight, targets, dtype, slices_of(rows))
    assert not nll.requires_grad and not top1.requires_grad
    return (loss.detach(), nll, top1, *torch.autograd.grad(0.7 * loss, (h, weight)))


@pytest.mark.parametrize("rows", [1, 5, 13, 100])  # of a chunk: uneven, whole, more than there are
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_head_loss_equals_the_readable_one(dtype, tolerance, rows):
    """Values and gradients are those of a chunked F.cross_entropy, and of one over all logits."""
    case = head_case(dtype)
    got = values_and_gradients(head_loss, case, dtype, rows)
    want = values_and_gradients(chunked_head_loss, case, dtype, rows)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    h, weight, targets = case
    nll = F.cross_entropy(h @ weight.T, targets, ignore_index=-100, reduction="none")
    slopes = torch.autograd.grad(0.7 * nll.mean(), (h, weight))
    torch.testing.assert_close((got[1], *got[3:]), (nll.detach(), *slopes), rtol=tolerance,
                               atol=tolerance)
    assert got[2].any()
    for values in got[1:3]:
        assert not values[targets == -100].any()


def test_head_loss_in_bf16_products_stays_near_float32():
    """Products in bfloat16 are used, and come near; results stay in float32."""
    case = head_case(torch.float32)
    exact = values_and_gradients(head_loss, case, torch.float32, 5)
    rough = values_and_gradients(head_loss, case, torch.bfloat16, 5)
    readable = values_and_gradients(chunked_head_loss, case, torch.bfloat16, 5)
    assert not torch.equal(exact[0], rough[0])
    for values in zip(exact, rough, readable, strict=True):
        assert values[1].dtype == torch.float32
        for other in (values[0], values[2]):
            assert (values[1] - other).abs().max() <= 0.02 * other.abs().max()


def test_head_loss_survives_logits_that_overflow_exp():
    h, weight, targets = head_case(scale=1e3)
    loss, *_, d_h, d_weight = values_and_gradients(head_loss, (h, weight, targets), h.dtype, 5)
    torch.testing.assert_close(loss, F.cross_entropy(h @ weight.T, targets, reduction="sum") / M)
    assert d_h.isfinite().all() and d_weight.isfinite().all()


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


@pytest.mark.parametrize("rows", [4, 13])
def test_head_loss_holds_one_chunk_of_logits(rows):
    """Forward and backward make one tensor (m, V) a chunk: two (M, V) never exist."""
    h, weight, targets = head_case()
    with VocabularyWide() as seen:
        loss, _, _ = head_loss(h, weight, targets, torch.float64, slices_of(rows))
        loss.backward()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 8
                for x in seen.tensors}
    chunk_logits = [size for size in storages.values() if size != weight.numel()]
    assert len(chunk_logits) == math.ceil(M / rows)  # made in place
    assert max(chunk_logits) == rows * V


def test_head_loss_in_bf16_products_takes_half_of_the_rows_at_once(monkeypatch):
    """There a chunk exists twice, in bf16 and in float32: together no more than all rows once."""
    monkeypatch.setattr(dnc_gpt2, "LOGITS_AT_ONCE", M * V)
    case = head_case(torch.float32)
    with VocabularyWide() as seen:
        dnc_gpt2.head_loss(*case, torch.bfloat16)
    rows = [x.shape[0] for x in seen.tensors if x.shape[0] != C]  # not weight.T
    assert rows and max(rows) <= M // 2


def test_head_loss_serves_one_backward():
    h, weight, targets = head_case()
    loss, _, _ = head_loss(h, weight, targets, torch.float64, slices_of(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        loss.backward()


def test_head_loss_without_gradients_has_the_same_values():
    h, weight, targets = head_case()
    loss, nll, top1 = head_loss(h, weight, targets, torch.float64, slices_of(5))
    with torch.no_grad():
        without = head_loss(h, weight, targets, torch.float64, slices_of(5))
    for value, want in zip(without, (loss, nll, top1), strict=True):
        assert not value.requires_grad and torch.equal(value, want)
