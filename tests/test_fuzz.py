"""Whatever stands on a command line or in a Config: exit 0, 1 or 2, one line, no traceback.

    python -m pytest tests/test_fuzz.py                 some hundred cases
    python -m pytest tests/test_fuzz.py -m faults       ten thousand
"""

from __future__ import annotations

import dataclasses
import importlib
import resource
import string

import pytest
from conftest import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dnc_gpt2

SCRIPTS = ("dnc_gpt2", "edm_gpt2", "long_range", "memory_decoder", "app")
MOST_GROWTH = 400_000  # KiB that the whole may add to the process

NUMBERS = st.one_of(
    st.integers(-3, 300).map(str), st.integers(-2**70, 2**70).map(str),
    st.sampled_from(["0", "-0", "1e999", "-1e999", "nan", "inf", "1e-400", "0x10", "1_000", "٣",
                     "9" * 400, "9" * 5000, "1" + "0" * 30, "1e400000000", "0.1", "1e-3", "+5"]))
WORDS = st.one_of(
    st.sampled_from(["", " ", "auto", "None", "True", "False", "true", "dnc", "baseline,dnc",
                     "0,1,2", "1,1", ",", ",,", "64:4,32", "64:", ":", "64:4:4", "../x", "a\nb",
                     "--", "-", "--help", "a" * 3000, "\udc80", "ä😀\u202e", "{x}", "%s", "$(x)"]),
    st.text(st.characters(exclude_characters="\0/~"), max_size=30))
VALUES = st.one_of(NUMBERS, WORDS)


def fields_of(module) -> list[str]:
    return [field.name for field in dataclasses.fields(module.Config)]


def names_of(module):
    """Names of fields, some with a mistake."""
    known = st.sampled_from(fields_of(module))
    wrong = st.tuples(known, st.sampled_from(string.printable)).map(lambda pair: pair[0] + pair[1])
    return st.one_of(known, known, known, wrong, WORDS)


def lines_of(module):
    """Command lines: names with values, joined or apart, and now and then a stray word."""
    joined = st.tuples(names_of(module), VALUES).map(lambda pair: [f"--{pair[0]}={pair[1]}"])
    apart = st.tuples(names_of(module), VALUES).map(lambda pair: [f"--{pair[0]}", pair[1]])
    word = VALUES.map(lambda value: [value])
    parts = st.lists(st.one_of(joined, apart, joined, apart, word), max_size=4)
    return parts.map(lambda lists: [word for part in lists for word in part])


@pytest.fixture
def up_to_work(monkeypatch, tmp_path, corpus):
    """Every command up to where it would load or train something; files go into tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(dnc_gpt2, "load_corpus", lambda config: corpus)
    monkeypatch.setattr(dnc_gpt2, "train_arms", lambda *_: {})
    monkeypatch.setattr(dnc_gpt2, "report", lambda *_: None)
    for name, stops in (("edm_gpt2", ("run_generation", "run_comparison")), ("app", ("run",)),
                        ("memory_decoder", ("run",)), ("long_range", ("print_parameters",))):
        module = importlib.import_module(name)
        for stop in stops:
            monkeypatch.setattr(module, stop, lambda *_: None)
        if name == "long_range":
            for part in module.PARTS:
                monkeypatch.setitem(module.PARTS, part, lambda config: None)
    return tmp_path


def cases(short: int, whole: int):
    return pytest.mark.parametrize(
        "count", [short, pytest.param(whole, marks=pytest.mark.faults)], ids=["short", "whole"])


def hold(count: int):
    """How many cases, the same every time."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


# The parser reads the source of dnc_gpt2.py a dozen times for a line: a second each.
@pytest.mark.parametrize("script, count", [
    ("app", 6), ("memory_decoder", 6),
    *(pytest.param(script, count, marks=pytest.mark.faults, id=f"{script}-whole") for script, count
      in zip(SCRIPTS, (100, 100, 100, 400, 400), strict=True))])
def test_any_command_line_is_taken_or_refused_in_one_line(script, count, up_to_work, capfd, fault):
    module = importlib.import_module(script)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @hold(count)
    @given(lines_of(module))
    def run(argv):
        code = module.main(argv)
        out, err = capfd.readouterr()
        assert code in (0, 1, 2), (argv, code, err)
        assert "Traceback" not in err and "a fault of this program" not in err, (argv, err)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code != 0) and len(err) < 5000, (argv, err)
        assert code == 0 or err.endswith(errors[0] + "\n"), (argv, err)
        fault("fuzz: command lines", True)

    run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH


ANYTHING = st.one_of(
    st.integers(-2**80, 2**80), st.floats(), st.booleans(), st.none(), st.text(max_size=20),
    st.sampled_from(["9" * 5000, 10**400, -10**400, 1e308, "auto", b"x", [], {}]), NUMBERS, WORDS)


@cases(60, 1800)
@pytest.mark.parametrize("script", SCRIPTS)
def test_any_config_is_taken_or_refused_with_one_line(script, count, fault):
    module = importlib.import_module(script)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @hold(count)
    @given(st.dictionaries(st.sampled_from(fields_of(module)), ANYTHING, max_size=4))
    def build(fields):
        try:
            module.Config(**fields)
        except ValueError as error:
            said, code = dnc_gpt2.ending(error, "size")
            assert code == 2 and "\n" not in said and len(said) < 1000, (fields, said)
        fault("fuzz: Config", True)

    build()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH


def test_config_of_whole_numbers_is_what_it_was():
    """The fuzz does not refuse what is right."""
    assert tiny_config(mem_slots=2**62 // 2**60).mem_slots == 4
