from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from config_files import load, problems
from hypothesis import given
from hypothesis import strategies as st

from iterative_sft_cli.config import Schedule, diff_configs
from iterative_sft_cli.config.schedule import looks_like_schedule, parse_schedule

numbers = st.integers(-1000, 1000) | st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("tree", "integer", "values"),
    [
        ({"by_round": [3, 1, 2]}, False, [3, 1, 2, 2, 2]),
        ({"linear": [1.0, 0.0]}, False, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"linear": [1, 4]}, True, [1, 2, 3, 3, 4]),
        ({"start": 40, "factor": 1.2}, True, [40, 48, 58, 69, 83]),
        ({"start": 40, "factor": 1.2, "max": 60}, True, [40, 48, 58, 60, 60]),
        ({"start": 10, "add": -4, "min": 1}, False, [10, 6, 2, 1, 1]),
        ({"start": 300, "add": 20}, True, [300, 320, 340, 360, 380]),
    ],
)
def test_values_of_five_rounds(tree: dict, integer: bool, values: list) -> None:
    schedule = parse_schedule(tree, integer=integer).bound(5)
    assert [schedule.value(r) for r in range(1, 6)] == pytest.approx(values)
    assert [schedule.value(0), schedule.value(99)] == pytest.approx([values[0], values[-1]])
    if integer:
        assert all(type(schedule.value(r)) is int for r in range(1, 6))


def test_one_round_of_a_linear_schedule_is_its_start() -> None:
    assert parse_schedule({"linear": [1.0, 0.5]}).bound(1).value(1) == 1.0


@given(first=numbers, last=numbers, rounds=st.integers(1, 50), more=st.integers(0, 50))
def test_raising_the_rounds_changes_no_earlier_round_and_holds_the_last(
    first: float, last: float, rounds: int, more: int
) -> None:
    for tree in ({"linear": [first, last]}, {"start": first, "add": last}):
        schedule = parse_schedule(tree).bound(rounds)
        longer = parse_schedule({**schedule.to_tree()}).bound(rounds + more)
        assert [longer.value(r) for r in range(1, rounds + 1)] == [schedule.value(r) for r in range(1, rounds + 1)]
        assert all(longer.value(r) == schedule.value(rounds) for r in range(rounds, rounds + more + 1))


@given(first=numbers, last=numbers, rounds=st.integers(2, 50))
def test_a_linear_schedule_meets_its_ends_and_stays_between(first: float, last: float, rounds: int) -> None:
    schedule = parse_schedule({"linear": [first, last]}).bound(rounds)
    values = [schedule.value(r) for r in range(1, rounds + 1)]
    assert (values[0], values[-1]) == (first, last)
    slack = 1e-9 * max(abs(first), abs(last), 1)
    assert all(min(first, last) - slack <= value <= max(first, last) + slack for value in values)


@given(start=numbers, step=numbers, low=numbers, high=numbers, rounds=st.integers(1, 30))
def test_bounds_hold_in_every_round(start: float, step: float, low: float, high: float, rounds: int) -> None:
    low, high = sorted((low, high))
    for kind, by in (("factor", abs(step) + 0.1), ("add", step)):
        schedule = parse_schedule({"start": start, kind: by, "min": low, "max": high}).bound(rounds)
        assert all(low <= schedule.value(r) <= high for r in range(1, rounds + 1))


@given(st.integers(1, 10**6), st.floats(1e-9, 1e9) | st.integers(1, 10**9), st.integers(-(2**62), 2**62))
def test_no_schedule_overflows_into_an_exception(round_index: int, factor: float, start: int) -> None:
    for integer in (True, False):
        for kind in ("factor", "add"):
            value = Schedule(kind, (start, factor), integer=integer).value(round_index)
            assert not math.isnan(value)


def test_what_is_a_schedule_and_what_only_shares_a_word() -> None:
    assert all(
        looks_like_schedule(t)
        for t in ({"by_round": []}, {"linear": 3}, {"start": 1, "add": 1}, {"start": 1, "factor": 2, "max": 3})
    )
    assert not any(
        looks_like_schedule(t)
        for t in ({}, {"max": 3}, {"min": 1, "max": 3}, {"start": 1}, {"linear": [1], "by": "x"}, [], 3)
    )


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ("{by_round: []}", ".by_round: an empty list, expected one value for each round."),
        ("{by_round: 3}", ".by_round: 3 is an integer, expected one value for each round."),
        ("{linear: [1]}", ".linear: a list, expected [value in round 1, value in the last round]."),
        ("{linear: [1, x]}", '.linear[1]: "x" is text, expected a number.'),
        ("{linear: [1, -1]}", ".linear[1]: -1 is too small, expected at least 0."),
        (
            "{linear: [1, 0.5], by_round: [1, 1, 1]}",
            ": a schedule with both by_round and linear, expected exactly one of",
        ),
        ("{linear: [1, 0.5], max: 3}", ".max: max has no meaning beside linear, expected only linear, span."),
        ("{start: 1}", ": start with neither factor nor add, expected exactly one of factor and add."),
        ("{start: 1, factor: 2, add: 1}", ": start with both factor and add, expected exactly one of factor and add."),
        ("{start: true, factor: 2}", ".start: true, expected a number."),
        (
            "{start: 1, factor: 2, maks: 3}",
            ".maks: unknown key in a schedule, expected {by_round}, {linear} or {start,",
        ),
        (
            "{span: 3}",
            ": a schedule without by_round, linear or start, expected exactly one of by_round, linear and start.",
        ),
        ("{linear: [1, 0.5], span: 0}", ".span: 0 is an integer, expected an integer of at least 1."),
        ("{by_round: [1, 1, -1]}", ".by_round[2]: -1 is too small, expected at least 0."),
        ("{value: 3}", ": a mapping, expected a number."),
    ],
)
def test_a_wrong_schedule_is_told_where_it_is_wrong(tmp_path: Path, tree: str, said: str) -> None:
    found = problems(tmp_path, f"generate.temperature={tree}")
    assert len(found) == 1 and found[0].startswith(f"command line: generate.temperature{said}"), found


def test_any_scalar_of_a_round_may_be_a_schedule(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "train.start_from={by_round: [base, previous, best]}",
        "train.data={by_round: [replace, accumulate, {window: 2}]}",
        "generate.do_sample={by_round: [true, true, true]}",
        "prompts.per_round={by_round: [16, 0.5, all]}",
        "guards.min_accepted={start: 10, add: 10}",
        "train.weight_by={by_round: ['1', numeric_answer, numeric_answer * 2]}",
    ).config
    assert [config.at_round(r).train.start_from for r in (1, 2, 3)] == ["base", "previous", "best"]
    assert config.at_round(3).train.data.window == 2
    assert [config.at_round(r).prompts.per_round for r in (1, 2, 3)] == [16, 0.5, "all"]
    assert [config.at_round(r).guards.min_accepted for r in (1, 2, 3)] == [10, 20, 30]
    assert config.at_round(3).train.weight_by == "numeric_answer * 2"


@pytest.mark.parametrize(
    "key", ["seed", "rounds", "model.path", "checkpoints.keep", "eval.temperature", "generate.memory_gb"]
)
def test_what_is_read_once_a_run_may_not(tmp_path: Path, key: str) -> None:
    assert problems(tmp_path, f"{key}={{by_round: [1, 1, 1]}}")


def test_a_run_whose_rounds_are_raised_keeps_its_schedules(tmp_path: Path) -> None:
    keys = ["generate.temperature={linear: [1, 0.5]}", "filters[3]={max_per_prompt: {linear: [2, 4]}}"]
    began = load(tmp_path, *keys)
    longer = load(tmp_path, *keys, "rounds=5")
    assert longer.config.at_round(2).generate.temperature == 0.875
    goes_on = longer.continuing(began.merged)
    assert [goes_on.config.at_round(r).generate.temperature for r in (1, 2, 3, 4, 5)] == [1.0, 0.75, 0.5, 0.5, 0.5]
    assert [goes_on.config.at_round(r).filters[3].bare for r in (1, 2, 3, 4, 5)] == [2, 3, 4, 4, 4]
    assert [drift.path for drift in diff_configs(began.merged, goes_on.merged)] == ["rounds"]


def test_a_changed_schedule_takes_the_new_span(tmp_path: Path) -> None:
    began = load(tmp_path, "generate.temperature={linear: [1, 0.5]}")
    changed = load(tmp_path, "generate.temperature={linear: [1, 0.6]}", "rounds=5").continuing(began.merged)
    assert changed.config.generate.temperature == replace(Schedule("linear", (1.0, 0.6)), span=5)
    assert {drift.path: drift.cls for drift in diff_configs(began.merged, changed.merged)} == {
        "rounds": "tunable",
        "generate.temperature": "frozen",
    }
