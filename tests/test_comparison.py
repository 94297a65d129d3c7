"""The instrument: several seeds, paired intervals, where the gain is, a leak, rates, the report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY, flags, tiny_config

import dnc_gpt2
from dnc_gpt2 import BIN, STATS, Gain, StopSignal, paired

NLL = STATS.index("nll")


def evaluation_of(nll: np.ndarray) -> dict:
    """An evaluation with these nats, (bins, rows), of bins of BIN tokens each."""
    sums = torch.zeros(*nll.shape, len(STATS), dtype=torch.float64)
    sums[..., NLL] = torch.tensor(nll * BIN)
    return {"sums": sums, "counts": torch.full(nll.shape, BIN)}


def random_arm(draw: np.random.Generator, level: np.ndarray, seeds: int, spread: float = 0.05
               ) -> list[dict]:
    """An arm's evaluations, one a seed: the text's level, an effect of the seed of that standard
    deviation, and noise that is alike in neighbouring bins, and, as in articles, in neighbouring
    eighths of a row (0.4)."""
    arm = []
    for _ in range(seeds):
        noise = draw.normal(0, 0.3, level.shape)
        for t in range(1, len(noise)):
            noise[t] += 0.6 * noise[t - 1]
        article = draw.normal(0, 0.3, (9, level.shape[1]))
        eighth = np.arange(len(noise)) * 8 // len(noise)
        noise += (0.8 * article[1:] + 0.6 * article[:-1])[eighth]
        arm.append(evaluation_of(level + draw.normal(0, spread) + noise))
    return arm


# ── intervals ───────────────────────────────────────────────────────────────────────────────────


def stretches_as_units(reference: list[dict], other: list[dict], column: str) -> dnc_gpt2.Paired:
    """`paired` of one seed with eighths of a row for units, as it had them."""
    at = STATS.index(column)
    difference = other[0]["sums"][..., at] - reference[0]["sums"][..., at]
    counts = reference[0]["counts"].double()
    mean = (difference.sum() / counts.sum()).item()
    parts = (difference - mean * counts).tensor_split(8)
    units = torch.cat([part.sum(0) for part in parts]) / counts.sum()
    variance = units.square().sum().item() * len(units) / (len(units) - 1)
    return dnc_gpt2.student_interval(mean, variance, len(units) - 1)


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_two_identical_arms_differ_by_nothing_in_95_of_100_resamplings(seeds):
    """Two arms of one distribution: text, initial weights and noise are drawn anew each time. With
    one seed the effect of the seed is left out, as the table says. 5 of 100 are called different
    where the interval is exact, so that 500 resamplings may have 25 and twice the standard
    deviation of that. Shorter units have far more."""
    draw, called, called_by_stretches = np.random.default_rng(seeds), 0, 0
    spread = 0 if seeds == 1 else 0.05
    for _ in range(500):
        level = draw.normal(5, 1, (96, 8))
        arms = [random_arm(draw, level, seeds, spread) for _ in range(2)]
        called += paired(*arms, "nll").sign != 0
        called_by_stretches += stretches_as_units(*arms, "nll").sign != 0
    assert called <= 25 + 2 * math.sqrt(25 * 0.95)
    assert called_by_stretches > 60


def test_an_arm_that_is_better_by_more_than_its_noise_is_called_better():
    draw = np.random.default_rng(0)
    level = draw.normal(5, 1, (96, 8))
    plain, better = (random_arm(draw, level - gain, 3) for gain in (0, 0.4))
    difference = paired(plain, better, "nll")
    assert difference.sign == -1 and difference.p < 0.05
    assert difference.mean == pytest.approx(-0.4, abs=0.15)
    assert paired(better, plain, "nll").mean == pytest.approx(-difference.mean)


def test_an_arm_beside_itself_has_no_difference_and_no_interval():
    arm = random_arm(np.random.default_rng(0), np.full((20, 4), 5.0), 3)
    assert paired(arm, arm, "nll") == (0, 0, 1)


def test_one_lucky_seed_of_three_is_no_proof():
    """A gain of one seed alone: the interval over text would exclude zero, that over seeds not."""
    draw = np.random.default_rng(0)
    level = draw.normal(5, 1, (96, 8))
    plain = [evaluation_of(level) for _ in range(3)]
    lucky = [evaluation_of(level - gain + draw.normal(0, 0.01, level.shape))
             for gain in (0.3, 0.0, 0.0)]
    assert paired(plain[:1], lucky[:1], "nll").sign == -1
    assert paired(plain, lucky, "nll").sign == 0


def test_interval_of_seeds_alone_is_students():
    """Where text adds nothing, the interval is that of a paired t test over seeds."""
    gains = np.array([0.10, 0.13, 0.09, 0.16])
    level = np.full((16, 4), 5.0)
    plain = [evaluation_of(level) for _ in gains]
    other = [evaluation_of(level - gain) for gain in gains]
    mean, half, p = paired(plain, other, "nll")
    error = gains.std(ddof=1) / 2
    assert mean == pytest.approx(-gains.mean())
    assert half == pytest.approx(3.182446 * error, rel=1e-5)  # t of 3 degrees of freedom
    assert p == pytest.approx(0.00448, rel=0.1)  # t = 7.42


# ── a leak ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def start(corpus, tmp_path):
    """start(arm, **fields) -> a tiny run that has not trained."""
    def begin(arm: str, **fields) -> dnc_gpt2.Run:
        config = tiny_config(save_dir=str(tmp_path), plot_dir=str(tmp_path), **fields)
        return dnc_gpt2.start_run(arm, config, corpus, torch.device("cpu"))
    return begin


@pytest.mark.parametrize("arm", ["baseline", "dnc"])
def test_an_arm_that_sees_the_next_token_is_flagged(start, corpus, arm):
    run = start(arm)
    assert dnc_gpt2.sees_ahead(run.model, corpus.valid, run.config) < 1e-5
    hidden = run.model.hidden

    def peeking(tokens, state):
        h, h_out, *rest = hidden(tokens, state)
        return h, h_out + 0.1 * h_out.roll(-1, 1), *rest

    run.model.hidden = peeking
    assert dnc_gpt2.sees_ahead(run.model, corpus.valid, run.config) > dnc_gpt2.LEAK


def test_a_flagged_arm_is_named_below_the_table(finished_arms, corpus, capfd):
    runs, config = finished_arms
    dnc_gpt2.print_tables(runs, config, corpus)
    assert "SEES AHEAD" not in capfd.readouterr().out
    runs["dnc"][0].results["sees_ahead"] = 0.3
    dnc_gpt2.print_tables(runs, config, corpus)
    assert "GPT2 + DNC SEES AHEAD" in capfd.readouterr().out


# ── where the gain is ───────────────────────────────────────────────────────────────────────────


def test_windows_since_use_equals_a_slow_search():
    draw = np.random.default_rng(0)
    stream = torch.tensor(draw.integers(0, 9, 200))
    inputs, targets = dnc_gpt2.evaluation_rows(stream, 3)
    found = dnc_gpt2.windows_since_use(inputs, targets, 7)
    for row in range(3):
        for at in range(targets.shape[1]):
            uses = [i for i in range(at + 1) if inputs[row, i] == targets[row, at]]
            want = at // 7 - uses[-1] // 7 if uses else -1
            assert found[row, at] == want


def test_classes_of_tokens_share_out_the_whole_gain():
    value = torch.tensor([-1, 0, 1, 2, 3, 4, 15, 16, 900])
    saved = torch.arange(9.0).double()
    gains = dnc_gpt2.by_class(value, saved, dnc_gpt2.SINCE_USE)
    assert gains[0] == Gain("never before", pytest.approx(1 / 9), 0)
    assert gains[3] == Gain("2-3 windows back", pytest.approx(2 / 9), pytest.approx((3 + 4) / 9))
    assert gains[-1].nats == pytest.approx((7 + 8) / 9)
    assert sum(gain.share for gain in gains) == pytest.approx(1)
    assert sum(gain.nats for gain in gains) == pytest.approx(saved.mean().item())


# ── figures ─────────────────────────────────────────────────────────────────────────────────────


def test_figures_of_words_and_bytes_are_of_the_same_nats():
    result = evaluation_of(np.full((4, 2), 2.0)) | {"words": 128, "bytes": 1024}
    nats = 4 * 2 * BIN * 2.0
    assert dnc_gpt2.per_word(result) == pytest.approx(math.exp(nats / 128))
    assert dnc_gpt2.bits_per_byte(result) == pytest.approx(nats / math.log(2) / 1024)


def test_text_size_counts_what_is_scored(corpus):
    text = corpus.tokenizer.decode(corpus.valid[1:].tolist())
    assert dnc_gpt2.text_size(corpus.tokenizer, corpus.valid) == {
        "words": len(text.split()), "bytes": len(text.encode())}


def test_equal_time_reads_every_curve_where_the_fastest_arm_ended(start, corpus):
    fast, slow = start("baseline"), start("dnc")
    fast.meter.seconds = 10.0
    fast.meter.validated = [[5.0, 4.0], [10.0, 3.0]]
    slow.meter.validated = [[8.0, 3.5], [16.0, 2.5]]
    fast.results, slow.results = {"seconds": 10.0}, {"seconds": 16.0}
    table = dnc_gpt2.at_equal_time([[fast], [slow]])
    assert table == [[pytest.approx(math.exp(3.0))], [pytest.approx(math.exp(3.25))]]
    # A cache took as long as the baseline that it is made of.
    cache = start("cache")
    dnc_gpt2.tune_on(fast, cache, corpus, dnc_gpt2.StopSignal())
    assert cache.meter.validated[0][0] == fast.meter.seconds == 10.0
    assert dnc_gpt2.kept_of_run(cache)["tokens_per_s"] is None  # JSON has no NaN
    cache.results["peak_mb"] = math.nan  # of a device that cannot tell
    json.dumps(dnc_gpt2.kept_of_run(cache), allow_nan=False)
    slow.meter.validated = [[16.0, 2.5]]
    assert dnc_gpt2.at_equal_time([[fast], [slow]])[1] == [None]


def test_a_row_that_lacks_a_seed_has_no_change(capfd):
    """Say, an arm that had not been validated when the fastest one of that seed had ended."""
    dnc_gpt2.print_row("At equal time ↓", [10.0, 12.0], [9.0, None], ",.2f")
    dnc_gpt2.print_row("At equal time ↓", [None, None], [9.0, 8.0], ",.2f")
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["—", "—"] and "9.00" in lines[0]


# ── seeds and rates, as a user runs them ────────────────────────────────────────────────────────


SHORT = {**TINY, "max_steps": 6, "save_every_steps": 3, "dropout": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("seeds")


@pytest.fixture(scope="module")
def argv(data_folder, tokenizer_folder, folder) -> list[str]:
    return flags({**SHORT, "dataset": data_folder, "tokenizer": tokenizer_folder, "seeds": 2,
                  "lr_grid": "1e-3,3e-3,1e30", "save_dir": folder / "c", "plot_dir": folder / "p"})


@pytest.fixture(scope="module")
def printed(argv) -> str:
    """What a job of two arms, two seeds and three rates prints; one of the rates diverges."""
    with dnc_gpt2.recorded() as echo:
        assert dnc_gpt2.main(argv) == 0
    return echo.getvalue()


@pytest.fixture
def finished_arms(printed, argv, corpus):
    """The finished runs of that job, as `report` takes them, and its Config."""
    config = dnc_gpt2.read_config(dnc_gpt2.Config, [*argv, "--resume=auto"], "", {})
    hardware = dnc_gpt2.Hardware(torch.device("cpu"), 0, "CPU")
    config, _ = dnc_gpt2.choose_hardware(config, 0)
    return dnc_gpt2.train_arms(config, corpus, hardware, dnc_gpt2.StopSignal()), config


def test_every_seed_of_every_arm_is_trained_and_the_first_chooses_the_rate(printed, folder):
    names = {path.name for path in (folder / "c").glob("*FINAL*.pt")}
    for stem in ("GPT2_Baseline", "GPT2_+_DNC"):
        first = {f"{stem}_lr{rate}_FINAL_step6.pt" for rate in ("0.001", "0.003")}
        assert first <= names
        assert len([name for name in names if name.startswith(f"{stem}_seed1_lr")]) == 1
    assert len(names) == 6
    assert printed.count("left out: ") == 2  # the rate of 1e30, of either arm
    kept = json.loads((folder / "p" / "results.json").read_text())
    for arm in kept["arms"].values():
        assert [run["seed"] for run in arm] == [0, 1]
        assert arm[0]["lr"] == arm[1]["lr"]  # what the first seed chose
    for stem, arm in (("GPT2_Baseline", "baseline"), ("GPT2_+_DNC", "dnc")):
        losses = {}
        for rate in (0.001, 0.003):
            path = folder / "c" / f"{stem}_lr{rate:g}_FINAL_step6.pt"
            results = torch.load(path, weights_only=True)["results"]
            losses[rate] = results["valid"]["metrics"]["loss"]
        assert kept["arms"][arm][0]["lr"] == min(losses, key=losses.get)


def test_table_of_seeds_shows_intervals_and_what_the_report_keeps(printed, folder):
    assert "ALL ARMS — 2 arms, seeds 0, 1" in printed
    assert "GPT2 Baseline → GPT2 + DNC" in printed and "±" in printed
    report = (folder / "p" / "report.md").read_text()
    table = printed[printed.index("  ALL ARMS") : printed.index("  Either block adds up")]
    assert table in report
    for said in ("sha256", "torch", "where_memory_helps.png", "lr_grid = '1e-3,3e-3,1e30'"):
        assert said in report
    kept = json.loads((folder / "p" / "results.json").read_text())
    gains = kept["gains"]["dnc"]
    nats = [run["valid"]["metrics"]["loss"] for arm in kept["arms"].values() for run in arm]
    assert gains["total"] == pytest.approx(sum(nats[:2]) / 2 - sum(nats[2:]) / 2, abs=1e-5)
    for block in ("since_use", "in_training"):
        assert sum(row["nats"] for row in gains[block]) == pytest.approx(gains["total"])


def test_finished_job_of_seeds_is_told_again_without_training(printed, argv, capfd, monkeypatch):
    monkeypatch.setattr(dnc_gpt2, "train", None)
    # what diverged is tried again, as no checkpoint of it is finished
    again = [word.replace("1e-3,3e-3,1e30", "1e-3,3e-3") for word in argv]
    assert dnc_gpt2.main([*again, "--resume=auto"]) == 0
    out = capfd.readouterr().out
    assert out.count("finished in") == 6
    tables = [text[text.index("  ALL ARMS") : text.index("  Either block adds up")]
              for text in (printed, out)]
    assert tables[0] == tables[1]


def test_a_named_checkpoint_resumes_the_run_of_its_rate(printed, argv, folder, capfd, tmp_path):
    for path in (folder / "c").glob("*lr0.003_step3.pt"):
        shutil.copy(path, tmp_path / path.name)
    named = next(tmp_path.glob("GPT2_Baseline_lr0.003*"))
    words = [word for word in argv if not word.startswith(("--seeds", "--lr_grid", "--save_dir"))]
    assert dnc_gpt2.main([*words, "--arms=baseline", "--lr_grid=1e-3,3e-3",
                          f"--save_dir={tmp_path}", f"--resume={named}"]) == 0
    out = capfd.readouterr().out
    assert out.count(f"resumed from {named}") == 1


def test_a_seed_has_its_own_files_wherever_it_stands_in_a_list(argv, tmp_path, capfd):
    words = [*(word for word in argv if not word.startswith(("--seeds", "--lr_grid"))),
             "--arms=baseline", f"--save_dir={tmp_path}"]
    assert dnc_gpt2.main([*words, "--seeds=0,1"]) == 0
    first = (tmp_path / "GPT2_Baseline_FINAL_step6.pt").read_bytes()
    capfd.readouterr()
    assert dnc_gpt2.main([*words, "--seeds=1,2", "--resume=auto"]) == 0
    out = capfd.readouterr().out
    assert "finished in" in out and "GPT2_Baseline_seed1_FINAL_step6.pt" in out
    assert (tmp_path / "GPT2_Baseline_FINAL_step6.pt").read_bytes() == first


def test_a_final_evaluation_of_few_tokens_ends_and_one_that_fails_loses_nothing(
        start, corpus, monkeypatch):
    run = start("wide", max_steps=2, final_eval_tokens=3)
    monkeypatch.setattr(dnc_gpt2, "text_size", None)  # called in the final evaluation alone
    with pytest.raises(TypeError):
        dnc_gpt2.train(run, corpus, run.model, dnc_gpt2.StopSignal())
    monkeypatch.undo()
    again = start("wide", max_steps=2, final_eval_tokens=3, resume="auto")
    assert again.step == 2 and not again.results
    dnc_gpt2.train(again, corpus, again.model, dnc_gpt2.StopSignal())
    assert again.results["sees_ahead"] < dnc_gpt2.LEAK
    assert int(again.results["valid"]["counts"].sum()) == 3


def test_a_finished_baseline_serves_another_memory(start, corpus):
    """What a model without memory does not use may differ; what it is made of may not."""
    run = start("baseline", max_steps=1)
    rows = dnc_gpt2.training_rows(corpus.train, run.config.rows, run.config.step_len)
    dnc_gpt2.train_step(run, run.model, rows)
    dnc_gpt2.save_checkpoint(run, corpus)
    again = {"max_steps": 1, "resume": "auto"}
    assert start("baseline", mem_slots=16, lambda_routing=0.0, **again).step == 1
    assert start("baseline", mlp_width=48, **again).step == 0  # passed over

    def check(**fields) -> None:
        config = dataclasses.replace(run.config, memory="dnc", resume="auto", **fields)
        dnc_gpt2.check_nothing_replaced(config, corpus)

    check(arms="baseline", mem_slots=16)
    check(arms="gru", mlp_width=48)
    with pytest.raises(dnc_gpt2.OtherRun, match="--mlp_width 0, or another save_dir"):
        check(arms="gru,baseline", mlp_width=48)
    other = start("dnc", max_steps=1)
    dnc_gpt2.train_step(other, other.model, rows)
    dnc_gpt2.save_checkpoint(other, corpus)
    with pytest.raises(dnc_gpt2.OtherRun, match="--mem_slots"):
        check(arms="baseline,dnc", mem_slots=16)


@pytest.mark.parametrize("fields, said", [
    ({"seeds": "0"}, "seeds"), ({"seeds": "three"}, "seeds"), ({"seeds": "1,1"}, "seeds"),
    ({"seeds": "9" * 300}, "seeds"), ({"lr_grid": "1e-3,fast"}, "lr_grid"),
    ({"seed": 2**32 - 1, "seeds": "2"}, "seeds"), ({"lr_grid": "1e-3,1e-3"}, "lr_grid"),
    ({"lr_grid": "-1,1"}, "lr_grid"), ({"lr_grid": "1e-3,1.0000001e-3"}, "lr_grid")])
def test_seeds_and_rates_that_cannot_be_read_are_refused_in_one_line(fields, said, capfd):
    assert dnc_gpt2.main(flags(fields)) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and said in err


# ── What a conclusion hangs on: splits, signs, marks, the start of the rivals ─────────────────────


def test_final_results_are_of_their_split_and_of_the_memory_that_they_name(start, corpus):
    run, stop = start("cache"), StopSignal()  # whose memory says something untrained
    found = dnc_gpt2.final_results(run, corpus, stop)
    for split, stream in (("valid", corpus.valid), ("test", corpus.test)):
        again = dnc_gpt2.evaluate(run.model, stream, run.config, stop)
        size = dnc_gpt2.text_size(corpus.tokenizer, stream)
        assert torch.allclose(found[split]["nll"], again["nll"], atol=1e-4)
        assert {name: found[split][name] for name in size} == size
    for memory in ("swapped", "emptied"):
        again = dnc_gpt2.evaluate(run.model, corpus.valid, run.config, stop, True, memory)
        assert torch.equal(found[memory]["nll"], again["nll"])
        assert not torch.allclose(found[memory]["nll"], found["valid"]["nll"], atol=1e-4)
    assert not torch.allclose(found["swapped"]["nll"], found["emptied"]["nll"], atol=1e-4)


def test_the_rate_is_chosen_on_validation_alone(start):
    runs = [start("baseline", lr=rate) for rate in (1e-3, 2e-3)]
    for run, valid, test in zip(runs, (2.0, 3.0), (3.0, 2.0), strict=True):
        run.results = {"valid": {"metrics": {"loss": valid}}, "test": {"metrics": {"loss": test}}}
    assert dnc_gpt2.best_of(runs) is runs[0]


def test_the_cache_is_tuned_on_validation_alone(start, corpus, monkeypatch):
    streams = []
    monkeypatch.setattr(dnc_gpt2, "tune_cache", lambda model, stream, *rest: streams.append(stream))
    dnc_gpt2.tune_on(start("baseline"), start("cache"), corpus, StopSignal())
    [stream] = streams
    assert torch.equal(stream, corpus.valid[: len(stream)]) and len(stream) == 201


def test_gains_are_of_the_token_that_is_predicted_and_helped_is_not_hurt(start, corpus):
    """Against a plain count over a stream of which the last row is not full."""
    draw, runs = np.random.default_rng(0), [start("baseline"), start("dnc")]
    length = len(corpus.valid) - 1
    for run, mean in zip(runs, (5.0, 4.99), strict=True):
        nll = torch.tensor(draw.normal(mean, 0.02, (4, -(-length // 4))))
        run.results = {"valid": {"nll": nll, "counts": torch.tensor([length])}}
    gains = dnc_gpt2.gains_of([runs[0]], [runs[1]], corpus, runs[0].config)
    old, new = (run.results["valid"]["nll"].flatten()[:length].tolist() for run in runs)
    saved = [a - b for a, b in zip(old, new, strict=True)]
    assert gains.total == pytest.approx(sum(saved) / length)
    assert gains.helped == pytest.approx(sum(x > 0.01 for x in saved) / length)
    assert gains.hurt == pytest.approx(sum(x < -0.01 for x in saved) / length)
    times, nats = Counter(corpus.train.tolist()), Counter()
    for token, x in zip(corpus.valid[1:].tolist(), saved, strict=True):
        nats[sum(times[token] >= least for least, _ in dnc_gpt2.IN_TRAINING[1:])] += x / length
    assert [gain.nats for gain in gains.in_training] == pytest.approx([nats[i] for i in range(5)])


def lines_of(text: str) -> dict[str, str]:
    """Lines of a table by their label, which ends where two blanks begin."""
    return {line.strip().split("  ")[0]: line for line in text.splitlines() if line.strip()}


def test_controls_say_what_is_lost_without_the_own_memory(start, capfd):
    dnc, base = start("dnc"), start("baseline")
    level = np.full((16, 4), 2.0) + np.random.default_rng(0).normal(0, 0.001, (16, 4))
    valid = evaluation_of(level)
    valid["sums"][..., STATS.index("nll_without")] = torch.tensor((level + 0.5) * BIN)
    dnc.results = {"valid": valid, "swapped": evaluation_of(level + 0.2),
                   "emptied": evaluation_of(level + 0.15)}
    base.results = {"valid": evaluation_of(level - 0.1)}
    dnc_gpt2.print_controls([dnc], [base])
    rows = lines_of(capfd.readouterr().out)
    mean = level.mean()
    for label, shift, mark in (("reads zeroed", 0.5, "✗"), ("memory swapped", 0.2, "✗"),
                               ("memory emptied", 0.15, "✗"), ("GPT2 Baseline", -0.1, "✓")):
        words = rows[label].split()[2:]
        assert words[:2] == [f"{math.exp(mean):.2f}", f"{math.exp(mean + shift):.2f}"]
        assert words[2][0] == ("▲" if shift > 0 else "▼") and words[3] == mark


def test_two_arms_of_chosen_rates_have_them_in_a_table(finished_arms, corpus, capfd):
    runs, config = finished_arms
    two = {name: runs[name] for name in ("baseline", "dnc")}
    dnc_gpt2.print_tables(two, dataclasses.replace(config, seeds="1", lr_grid="1e-3,3e-3"), corpus)
    assert "Peak rate" in capfd.readouterr().out


def test_every_run_of_a_table_that_was_lengthened_or_has_other_steps_is_named(start, capfd):
    runs = {arm: start(arm) for arm in ("baseline", "wide", "dnc")}
    for arm, run in runs.items():
        run.results = {"steps": 19 if arm == "wide" else 20}
    runs["baseline"].lengthened = [8, 12]
    dnc_gpt2.print_other_steps([runs["dnc"]], [[run] for run in runs.values()])
    assert capfd.readouterr().out.splitlines() == [
        "  GPT2 Baseline, seed 0: finished before at step 8, 12; from there on a new cosine",
        "  GPT2 Wide, seed 0: 19 steps"]


def test_what_is_not_written_is_no_sparsity(start, corpus):
    run = start("dnc", min_surprisal=50.0)
    found = dnc_gpt2.evaluate(run.model, corpus.valid, run.config, StopSignal())["metrics"]
    assert found["avg_gate"] == 0 and found["write_sparsity"] == 0


def test_changes_go_from_the_reference_to_the_arm_and_from_each_to_the_dnc(start, capfd):
    draw, runs = np.random.default_rng(0), {}
    for arm, nats in (("baseline", 5.0), ("gru", 4.9), ("dnc", 4.7)):
        run = start(arm)
        valid, test = (evaluation_of(nats + shift + draw.normal(0, 0.001, (16, 4)))
                       for shift in (0, 0.3 * (arm == "dnc")))
        run.results, runs[arm] = {"valid": valid, "test": test}, [run]
    dnc_gpt2.print_changes(runs)
    out = capfd.readouterr().out
    rows = [line for line in out.splitlines() if "→" in line]
    found = [(row[:34].strip(), row.split("%")[0].split()[-1], row[-1]) for row in rows]
    assert found == [("GPT2 Baseline → GPT2 + GRU", "-9.5", "✓"),
                     ("GPT2 Baseline → GPT2 + DNC", "-25.9", "≈"),  # the mark is of test
                     ("GPT2 + GRU → GPT2 + DNC", "-18.1", "✗")], out
    assert "p<.001 ✓" in out


def test_perplexities_stand_under_their_split(start, capfd):
    run = start("baseline")
    run.results = {
        split: evaluation_of(np.full((4, 2), nats)) | {"metrics": {"ppl": math.exp(nats)},
                                                       "words": words, "bytes": size}
        for split, nats, words, size in (("valid", 2.0, 400, 2000), ("test", 3.0, 500, 3000))}
    dnc_gpt2.print_perplexities({"baseline": [run]})
    row = lines_of(capfd.readouterr().out)["GPT2 Baseline"]
    nats = 3.0 * 8 * BIN
    assert row.split()[2:] == [f"{math.exp(2):.2f}", f"{math.exp(3):.2f}",
                               f"{math.exp(nats / 500):,.2f}",
                               f"{nats / math.log(2) / 3000:.4f}"]


def test_rate_ends_at_a_tenth_and_of_a_run_lengthened_twice_begins_anew_or_stays(start):
    run = start("baseline", max_steps=40, lr_warmup=0.1)
    rates = {}
    for schedule in ("cosine", "constant"):
        run.config = dataclasses.replace(run.config, lr_schedule=schedule)
        for lengthened in ([], [8, 24]):
            run.lengthened, found = lengthened, []
            for run.step in (24, 40):
                dnc_gpt2.set_rates(run)
                found.append(run.optimizer.param_groups[0]["lr"] / run.config.lr)
            rates[schedule, len(lengthened)] = found
        run.lengthened = [8, 24]
        assert dnc_gpt2.schedule(run) == ((24, 40) if schedule == "cosine" else (0, 8))
    assert rates["cosine", 0] == pytest.approx([0.4718583, 0.1])
    assert rates["cosine", 2] == pytest.approx([0.5, 0.1])  # the first of two steps of warm-up
    assert rates["constant", 0] == rates["constant", 2] == [1.0, 1.0]


def test_matched_arm_widens_the_width_that_is_given(start):
    for width in (0, 48):
        counts = {arm: dnc_gpt2.count_parameters(start(arm, mlp_width=width).model)
                  for arm in ("matched", "dnc")}
        assert abs(counts["matched"] / counts["dnc"] - 1) < 0.01, counts


def test_untrained_cells_of_a_gru_forget_over_2_to_513_tokens_in_every_block():
    memory = dnc_gpt2.GRUMemory(6, 16, 8)  # four blocks
    reset, update, new = memory.expand.bias.detach().view(-1, 3, memory.block).unbind(1)
    assert not reset.any() and not new.any() and not memory.read_proj.weight.any()
    spans = 1 / (1 - update.sigmoid())  # of the share 1 - z that is new at each token
    assert [spans.min().item(), spans.max().item()] == pytest.approx([2, 513], rel=1e-4)
    for of_block in spans:
        assert of_block.min() < 3 and of_block.max() > 400
    logs = (spans - 1).log().flatten().sort().values
    torch.testing.assert_close(logs, torch.linspace(0, math.log(512), 128), atol=1e-3, rtol=1e-3)


def test_untrained_delta_memory_asks_in_the_code_of_its_keys_and_forgets_over_n_tokens():
    memory = dnc_gpt2.DeltaMemory(6, 4, 5)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    query, key, _, log_a, b = memory.instructions(x, x, x)
    torch.testing.assert_close(query, key)
    torch.testing.assert_close(log_a, torch.full((2, 3), -1 / 4))
    torch.testing.assert_close(b, torch.full((2, 3), 0.5))
    assert not memory.read_proj.weight.any()


def test_another_seed_s_files_are_refused_before_the_first_arm_trains(start, corpus):
    config = start("baseline", max_steps=1, mlp_width=48).config
    variant, tag = dnc_gpt2.variant_of(config, 1, config.lr)
    other = dnc_gpt2.start_run("baseline", variant, corpus, torch.device("cpu"), tag)
    dnc_gpt2.save_checkpoint(other, corpus)
    mine = dataclasses.replace(config, mlp_width=0, arms="baseline", resume="auto")
    dnc_gpt2.check_nothing_replaced(mine, corpus)
    with pytest.raises(dnc_gpt2.OtherRun, match="--mlp_width 48"):
        dnc_gpt2.check_nothing_replaced(dataclasses.replace(mine, seeds="2"), corpus)


def test_the_newest_checkpoint_is_the_one_written_last_and_of_one_moment_the_furthest(
        start, tmp_path):
    run = start("baseline")
    for step, moment in ((30, 100), (6, 200), (12, 200)):
        path = tmp_path / f"GPT2_Baseline_step{step}.pt"
        path.write_bytes(b"")
        os.utime(path, (moment, moment))
    assert [path.stem for path in dnc_gpt2.newest_checkpoints(run)] == [
        "GPT2_Baseline_step12", "GPT2_Baseline_step6", "GPT2_Baseline_step30"]


def test_a_difference_without_variance_is_certain():
    level = np.full((16, 4), 5.0)
    assert dnc_gpt2.paired([evaluation_of(level)], [evaluation_of(level - 0.5)],
                           "nll") == (-0.5, 0, 0)


def test_speed_is_of_the_steps_behind_the_first_three(start, corpus):
    run = start("baseline", max_steps=8)
    dnc_gpt2.train(run, corpus, run.model, StopSignal())
    assert run.meter.tokens == (8 - 3) * run.config.batch_size * run.config.seq_len
    assert run.tokens_per_s == run.meter.tokens / run.meter.seconds


def test_gradients_of_accumulated_parts_are_those_of_all_rows(start, corpus):
    """Adam and the clipping of one norm hide a factor, that is compared before either."""
    found = []
    for parts in (1, 2):
        run = start("dnc", accumulate=parts, batch_size=8)
        rows = dnc_gpt2.rows_of_run(run, corpus)
        run.state = run.model.init_state(run.config.rows)
        means, _ = dnc_gpt2.add_gradients(run, run.model, dnc_gpt2.step_tokens(run, rows))
        found.append([means, *(p.grad for p in run.model.parameters())])
    for whole, summed in zip(*found, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-3, atol=1e-5)
