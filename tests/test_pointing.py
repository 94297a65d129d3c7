"""What the pointing memory is for, and what it must not break, through the whole model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import error_line, flags, tiny_config

import dnc_gpt2
from dnc_gpt2 import STATS, DNCTrace

CPU = torch.device("cpu")
GRAVES = {**dnc_gpt2.OLDER_FIELDS, "memory_lr": 0.1}


def begin(corpus, **fields) -> dnc_gpt2.Run:
    """A DNC run on the tiny corpus, as run_comparison starts it."""
    return dnc_gpt2.start_run("dnc", tiny_config(**fields), corpus, CPU)


def train(run: dnc_gpt2.Run, rows: torch.Tensor, steps: int) -> None:
    """So many training steps."""
    for _ in range(steps):
        dnc_gpt2.train_step(run, run.model, rows)


# ── it points ───────────────────────────────────────────────────────────────────────────────────


def test_pointing_memory_copies_what_has_left_the_window(corpus):
    """Random text that repeats itself after more than a window: nothing but the memory can know
    the second half of it."""
    draw = torch.Generator().manual_seed(1)
    period, losses = 24, {}
    texts = torch.randint(300, (40, 4, period), generator=draw)
    stream = texts.repeat_interleave(2, dim=0)  # (80, 4, period), each twice
    rows = stream.permute(1, 0, 2).reshape(4, -1)
    fields = dict(batch_size=4, bptt_segments=1, seq_len=16, mem_slots=32, mem_width=32, lr=1e-2,
                  max_steps=120, lambda_routing=0.0, lambda_entropy=0.0, lambda_vocabulary=0.0)
    for pointing in (True, False):
        run = begin(corpus, pointing=pointing, **fields)
        run = dataclasses.replace(run, steps_per_epoch=119, total_steps=120)
        train(run, rows, 118)
        state, nll = run.model.init_state(4), []
        for at in range(0, rows.shape[1] - 16, 16):
            x, y = rows[:, at : at + 16], rows[:, at + 1 : at + 17]
            stats, state = run.model.measure(x, y, state, brief=True)
            nll.append(stats[..., 0])
        nll = torch.cat(nll, dim=1)
        again = (torch.arange(nll.shape[1]) + 1) % (2 * period) > period + 1
        losses[pointing] = nll[:, again].mean().item()
    assert losses[True] < losses[False] - 0.5


def test_probabilities_of_a_trained_model_sum_to_one_and_know_no_later_token(corpus):
    """The whole distribution of every position, from the model's own parts."""
    run = begin(corpus)
    rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
    train(run, rows, 3)
    run.model.memory.interface.empty.bias.data.fill_(8.0)
    x = rows[:, :16].clone()

    def distribution(tokens):
        with torch.no_grad():
            _, h_out, _, trace = run.model.hidden(tokens, run.state)
            log_p = (h_out.flatten(0, 1) @ run.model.head_weight().T).log_softmax(-1)
            return run.model.pointer(trace).mix(log_p).exp().view(*tokens.shape, -1)

    p = distribution(x)
    torch.testing.assert_close(p.sum(-1), torch.ones(x.shape), atol=1e-5, rtol=0)
    for t in (1, 7, 15):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 300
        q = distribution(changed)
        assert torch.equal(p[:, :t], q[:, :t])
        assert not torch.equal(p[:, t:], q[:, t:])


# ── the inspection says where from ──────────────────────────────────────────────────────────────


def test_raised_tokens_name_the_earlier_token_its_slot_and_the_empty_share():
    ids = [5, 7, 9, 5, 7]
    T, N, R = len(ids), 3, 2
    trace = DNCTrace(
        write_gate=torch.ones(T),
        write_weights=torch.eye(T)[:, :N] * 0.9,  # token t is written to slot t
        read_weights=torch.zeros(T, R, N),
        tokens=torch.tensor([[5, -1, -1], [5, 7, -1], [5, 7, 9], [5, 7, 9], [5, 7, 9]]),
    )
    trace.read_weights[3, :, 1] = torch.tensor([0.2, 0.4])  # before the second 7
    trace.read_weights[1, :, 0] = 0.5  # points at 5, and 9 follows: no reason for what was gained
    stats = torch.zeros(T - 1, len(STATS))
    stats[:, STATS.index("nll_without")] = torch.tensor([1.0, 3.0, 1.0, 2.0])
    stats[:, STATS.index("nll")] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    found, = dnc_gpt2.raised_tokens(ids, trace, stats)
    assert (found.at, found.source, found.slot) == (4, 1, 1)
    assert found.without == pytest.approx(0.1353, abs=1e-4)
    assert found.probability == pytest.approx(0.3679, abs=1e-4)
    assert found.empty == pytest.approx(0.7)


# ── what was there before ───────────────────────────────────────────────────────────────────────


def older(path) -> None:
    """Turn a checkpoint of the plain DNC into one from before the memory pointed."""
    payload = torch.load(path, weights_only=True)
    for name in dnc_gpt2.OLDER_FIELDS:
        del payload["config"][name]
    payload["memory_state"] = payload["memory_state"][:6]
    torch.save(payload, path)


def test_checkpoint_from_before_the_memory_pointed_goes_on_in_the_same_bits(corpus, tmp_path):
    fields = GRAVES | {"save_dir": str(tmp_path)}
    run = begin(corpus, **fields)
    rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
    train(run, rows, 2)
    dnc_gpt2.save_checkpoint(run, corpus)
    older(run.last_saved)
    again = begin(corpus, **fields)
    dnc_gpt2.restore(again, dnc_gpt2.load_checkpoint(run.last_saved), run.last_saved, corpus)
    for each in (run, again):
        train(each, rows, 2)
    for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(map(torch.equal, run.state, again.state))

    pointing = begin(corpus, save_dir=str(tmp_path))
    with pytest.raises(ValueError, match="memory_lr = 0.1|pointing = False"):
        dnc_gpt2.restore(pointing, dnc_gpt2.load_checkpoint(run.last_saved), "it", corpus)


def test_second_run_in_a_folder_is_refused_in_one_line(main, capfd, tiny_argv, tmp_path):
    outputs = {"save_dir": tmp_path / "c", "plot_dir": tmp_path / "p"}
    (tmp_path / "c").mkdir()
    with dnc_gpt2.locked(tmp_path / "c", "save_dir"):
        assert main([*tiny_argv, *flags(outputs)]) == 2
    assert "another run" in error_line(capfd.readouterr().err)
    assert not list((tmp_path / "c").glob("*.pt"))
