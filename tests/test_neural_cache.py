"""The bar that the pointing memory is held against: the cache of benchmarks/neural_cache.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

import dnc_gpt2
from benchmarks import neural_cache


@pytest.mark.parametrize("slots, least", [(5, 0.0), (16, 0.0), (40, 0.0), (5, 5.7), (16, 5.7)])
def test_cache_probability_is_that_of_the_definition(corpus, slots, least):
    """One token after the other: the last N states that stand before it, in its own row alone,
    below, at and above a window of 16; those alone after which something unexpected came."""
    config = tiny_config(memory="none")
    model = dnc_gpt2.start_run("baseline", config, corpus, torch.device("cpu")).model.eval()
    stream = corpus.train[: neural_cache.ROWS * 37 + 1]
    found = neural_cache.cache_probability(model, stream, slots, least)
    inputs, targets = dnc_gpt2.evaluation_rows(stream, neural_cache.ROWS)
    with torch.no_grad():
        windows = [model.hidden(x, None)[0] for x in inputs.split(config.seq_len, 1)]
    h = torch.cat(windows, dim=1)
    log_p = (h @ model.head_weight().T).log_softmax(-1)
    nats = -log_p[:, :-1].gather(2, inputs[:, 1:, None]).squeeze(2)  # of x_s+1 after h_s
    assert least == 0 or 0.1 < (nats >= least).float().mean() < 0.9
    assert any((values > 0).any() for values in found.values())
    for theta in (1.0, 8.0):
        for row in (0, 5):
            for t in range(37):
                before = [s for s in range(t) if nats[row, s] >= least][-slots:]
                scores = [theta * F.cosine_similarity(h[row, t], h[row, s], dim=0).item()
                          for s in before]
                weights = torch.tensor(scores).softmax(0)
                want = sum(weight.item() for weight, s in zip(weights, before, strict=True)
                           if inputs[row, s + 1] == targets[row, t])
                assert found[theta][row, t].item() == pytest.approx(want, abs=1e-5)


def test_unknown_pieces_are_marked_whole_and_nothing_else():
    class Pieces:
        ids = (4, 9)

        def encode(self, text, add_special_tokens):
            return self

    stream = torch.tensor([4, 9, 1, 9, 4, 4, 9, 2, 3])
    targets = neural_cache.is_unknown(stream, Pieces()).flatten()
    assert targets.tolist() == [True, False, False, False, True, True, False, False]
