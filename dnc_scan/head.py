"""The LM head that turns logits into their gradient in place: dnc_gpt2.chunked_head_loss, in less
memory and time. It imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HeadLoss(torch.autograd.Function):
    """Mean next-token cross-entropy of the tied LM head, a chunk of logits at a time, mixed with
    what a pointer adds: its rows' gradients shrink by the posterior of the vocabulary.

    A chunk turns into its own gradient in place: two (M, V) tensors never exist, and the backward
    only scales. F.linear_cross_entropy (torch 2.13) does as much, but more slowly here, and gives
    no top-1.
    """

    @staticmethod
    def forward(ctx, h, weight, vocabulary, match, targets, dtype, slices, pointer):
        """h (M, C), weight (V, C), targets (M,), dtype of products, slices of the M rows; a pointer
        of M rows with its vocabulary() (M,) and match(targets) (M,), or None -> mean loss (), nll
        (M,), top1 (M,); a target of -100 counts 0 in all three."""
        low = weight.to(dtype)  # (V, C)
        scored = (targets != -100).to(h.dtype)  # (M,)
        nll = torch.zeros_like(scored)
        top1 = torch.zeros_like(scored)
        d_h = torch.zeros_like(h)
        d_weight = torch.zeros_like(weight)
        d_vocabulary = d_match = None
        if pointer is not None:
            d_vocabulary = torch.zeros_like(vocabulary)
            d_match = torch.zeros_like(match)

        for rows in slices:
            x = h[rows].to(dtype)  # (m, C)
            logits = (x @ low.T).to(h.dtype)  # (m, V)
            labels = targets[rows]  # (m,)
            target = labels.clamp_min(0).unsqueeze(1)  # (m, 1)

            chunk_nll, best, total = exponentiate(logits, target)
            part = scored[rows] / len(h)  # (m,), of the mean loss
            if pointer is not None:
                held = pointer.rows(rows)
                p_held = logits.gather(1, held.tokens) / total  # (m, N)
                best = held.top1(best, 1 / total.squeeze(1), p_held)
                by_vocabulary = vocabulary[rows].log() - chunk_nll
                log_p = torch.logaddexp(by_vocabulary, (match[rows] + 1e-30).log())
                d_vocabulary[rows] = -part * (-chunk_nll - log_p).exp()
                d_match[rows] = -part * (-log_p).exp()
                part = part * (by_vocabulary - log_p).exp()  # the posterior of the vocabulary
                chunk_nll = -log_p
            nll[rows] = chunk_nll * scored[rows]
            top1[rows] = (best == labels).to(h.dtype)

            if any(ctx.needs_input_grad):
                d_logits = logits.scatter_add_(1, target, -total)  # (m, V), but for the share
                d_logits = d_logits.to(dtype)
                share = part.unsqueeze(1) / total  # (m, 1)
                d_x = d_logits @ low  # (m, C)
                d_h[rows] = d_x.to(h.dtype) * share
                add_weight_gradient(d_weight, d_logits, x * share)

        ctx.grads = d_h, d_weight, d_vocabulary, d_match
        ctx.mark_non_differentiable(nll, top1)
        return nll.mean(), nll, top1

    @staticmethod
    def backward(ctx, grad_loss, *_):
        """Scale the gradients of the forward, in place. Raises RuntimeError the second time."""
        if ctx.grads is None:
            raise RuntimeError("HeadLoss serves one backward: run the forward again")
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.grads]
        ctx.grads = None
        return *grads, None, None, None, None


def exponentiate(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (m, V), in place, into the powers that softmax divides by their sum.

    target (m, 1) -> its negative log-likelihood (m,), where the largest is (m,), the sum (m, 1).
    """
    top, best = logits.max(-1, keepdim=True)  # (m, 1)
    target_logit = logits.sub_(top).gather(1, target)  # (m, 1)
    total = logits.exp_().sum(-1, keepdim=True)  # (m, 1)
    nll = total.log() - target_logit
    return nll.squeeze(1), best.squeeze(1), total


def add_weight_gradient(d_weight: Tensor, d_logits: Tensor, x: Tensor) -> None:
    """d_weight (V, C) += d_logits^T (m, V) x (m, C), the product in the type of d_logits."""
    if d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, x)
    else:
        d_weight += d_logits.T @ x.to(d_logits.dtype)


def head_loss(h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, slices: list[slice],
              pointer=None) -> tuple[Tensor, Tensor, Tensor]:
    """Call HeadLoss with the arguments and results of dnc_gpt2.chunked_head_loss."""
    if pointer is None:
        return HeadLoss.apply(h, weight, None, None, targets, dtype, slices, None)
    vocabulary, match = pointer.vocabulary(), pointer.match(targets)
    return HeadLoss.apply(h, weight, vocabulary, match, targets, dtype, slices, pointer)
