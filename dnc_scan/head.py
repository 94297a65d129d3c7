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
    def forward(ctx, h, weight, vocabulary, match, targets, dtype, slices, pointer, alone, trains):
        """h (M, C), weight (V, C), targets (M,), dtype of products, slices of the M rows; a pointer
        of M rows with its vocabulary() (M,) and match(targets) (M,), or None; alone, the weight of
        the vocabulary's own loss beside that of the mixture; whether gradients are wanted -> loss
        (), nll (M,), top1 (M,), of float32 at least; a target of -100 counts 0 in all three."""
        low = weight.to(dtype)  # (V, C)
        kind = torch.promote_types(h.dtype, torch.float32)
        scored = (targets != -100).to(kind)  # (M,)
        nll = torch.zeros_like(scored)
        nll_alone = torch.zeros_like(scored)
        top1 = torch.zeros_like(scored)
        # Nothing that nobody asks for: none of it in an evaluation, no d_weight of a frozen head.
        d_h = torch.zeros_like(h) if trains and any(ctx.needs_input_grad) else None
        d_weight = torch.zeros_like(weight) if trains and ctx.needs_input_grad[1] else None
        d_vocabulary = torch.zeros_like(scored)
        d_match = torch.zeros_like(scored)

        for rows in slices:
            x = h[rows].to(dtype)  # (m, C)
            labels = targets[rows]  # (m,)
            target = labels.masked_fill(labels == -100, 0).unsqueeze(1)  # (m, 1)
            powers = (x @ low.T).to(kind)  # (m, V)
            chunk_nll, best, total = exponentiate(powers, target)

            share = scored[rows] / len(h)  # (m,), of the mean loss
            if pointer is not None:
                best = best_of_mixture(powers, total, best, pointer.rows(rows))
                nll_alone[rows] = chunk_nll * share
                mixed = mix(chunk_nll, vocabulary[rows], match[rows], share, alone)
                chunk_nll, share, d_vocabulary[rows], d_match[rows] = mixed
            nll[rows] = chunk_nll * scored[rows]
            top1[rows] = (best == labels).to(kind)

            if d_h is not None:
                share = share.unsqueeze(1) / total  # (m, 1)
                d_logits = powers.scatter_add_(1, target, -total)  # (m, V), but for the share
                d_h[rows] = share_gradient(d_logits.to(dtype), share, x, low, d_weight)

        ctx.grads = [d_h, d_weight]
        ctx.grads += [None, None] if pointer is None else [d_vocabulary, d_match]
        ctx.mark_non_differentiable(nll, top1)
        return nll.mean() + alone * nll_alone.sum(), nll, top1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        """Scale the gradients of the forward, in place. Raises RuntimeError the second time."""
        if ctx.grads is None:
            raise RuntimeError("HeadLoss serves one backward: run the forward again")
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.grads]
        ctx.grads = None
        return *grads, None, None, None, None, None, None


def best_of_mixture(powers: Tensor, total: Tensor, best: Tensor, pointer) -> Tensor:
    """The most likely token of a mixture (m,), from the vocabulary's powers (m, V), their sum
    (m, 1), its own best (m,), and a pointer of m rows."""
    p_best = 1 / total.squeeze(1)  # of exp(0), as the largest logit is subtracted
    p_held = powers.gather(1, pointer.tokens) / total  # (m, N)
    return pointer.top1(best, p_best, p_held)


def mix(nll: Tensor, vocabulary: Tensor, match: Tensor, share: Tensor, alone: float
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-log p(y) of p(y) = c0 p_lm(y) + match(y), from the nll of p_lm, c0 and match; then what the
    logits have of a row's share of the loss, share * (c0 p_lm(y) / p(y) + alone), and the gradients
    of c0 and of match. All (m,)."""
    by_vocabulary = vocabulary.log() - nll
    by_match = (match + 1e-30).log()
    log_p = torch.logaddexp(by_vocabulary, by_match)
    posterior = (by_vocabulary - log_p).exp()
    d_vocabulary = -(-nll - log_p).exp()
    d_match = -(-log_p).exp()
    return -log_p, share * (posterior + alone), share * d_vocabulary, share * d_match


def exponentiate(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (m, V), in place, into the powers that softmax divides by their sum.

    target (m, 1) -> its negative log-likelihood (m,), where the largest is (m,), the sum (m, 1).
    """
    top, best = logits.max(-1, keepdim=True)  # (m, 1)
    target_logit = logits.sub_(top).gather(1, target)  # (m, 1)
    total = logits.exp_().sum(-1, keepdim=True)  # (m, 1)
    nll = total.log() - target_logit
    return nll.squeeze(1), best.squeeze(1), total


def share_gradient(d_logits: Tensor, share: Tensor, x: Tensor, low: Tensor,
                   d_weight: Tensor | None) -> Tensor:
    """d_weight (V, C), if any, += (share * d_logits)^T x, for d_logits (m, V), shares (m, 1) and
    x (m, C) -> (share * d_logits) @ low (V, C). Products in the type of d_logits."""
    shared_x = x * share
    if d_weight is not None and d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, shared_x.to(d_logits.dtype))
    elif d_weight is not None:
        d_weight += d_logits.T @ shared_x.to(d_logits.dtype)
    d_x = d_logits @ low
    return d_x.to(share.dtype) * share


def head_loss(h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, slices: list[slice],
              pointer=None, lambda_vocabulary: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Call HeadLoss with the arguments and results of dnc_gpt2.chunked_head_loss."""
    vocabulary = match = None
    if pointer is not None:
        vocabulary = pointer.vocabulary()
        match = pointer.match(targets)
    return HeadLoss.apply(h, weight, vocabulary, match, targets, dtype, slices, pointer,
                          lambda_vocabulary, torch.is_grad_enabled())
