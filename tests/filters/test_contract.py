"""Signatures, arguments and return values: what is a filter, and what is told to someone who wrote it wrong."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from iterative_sft_cli.filters.contract import (
    ContractBreach,
    bind_arguments,
    inspect_filter,
    matches,
    place_bare,
    to_outcome,
    to_outcomes,
)
from iterative_sft_cli.types import Verdict


def keep_short(sample, max_words: int = 40, *, unit: Literal["words", "chars"] = "words"):
    return True


class Scorer:
    def __init__(self, path: str, scale: float = 1.0) -> None:
        self.path = path

    def __call__(self, group, context) -> list[Verdict]:
        return []


def test_the_first_parameter_says_what_a_filter_looks_at() -> None:
    shape = inspect_filter(keep_short)
    assert (shape.kind, shape.positional, shape.takes_context, shape.is_class) == ("sample", "max_words", False, False)
    assert [(p.name, p.default) for p in shape.parameters] == [("max_words", "40"), ("unit", "'words'")]
    shape = inspect_filter(Scorer)
    assert (shape.kind, shape.positional, shape.takes_context, shape.is_class) == ("group", "path", True, True)
    assert [(p.name, p.default) for p in shape.parameters] == [("path", None), ("scale", "1.0")]
    assert inspect_filter(lambda samples, by: []).kind == "samples"


class NotCallable:
    pass


class CallWantsMore:
    def __call__(self, sample, threshold):
        return True


async def waits(sample):
    return True


def yields(group):
    yield True


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda s: True, "its first parameter is named `s`, expected `sample`, `group` or `samples`"),
        (lambda: True, "it takes no first parameter"),
        (lambda *samples: True, "it takes no first parameter"),
        (lambda sample, *rest: True, "it takes *rest"),
        (7, "it is a int, expected a function or a class with __call__"),
        (NotCallable, "the class has no __call__ method"),
        (CallWantsMore, "its __call__ wants `threshold`; a class takes its arguments in __init__"),
        (waits, "it is an async function"),
        (yields, "it is a generator function"),
    ],
)
def test_what_cannot_be_a_filter_is_told(target: Any, message: str) -> None:
    with pytest.raises(ContractBreach) as caught:
        inspect_filter(target)
    assert message in str(caught.value)


def test_arguments_are_checked_against_the_signature() -> None:
    shape = inspect_filter(keep_short)
    assert bind_arguments(keep_short, shape, {"max_words": 3}) == ({"max_words": 3}, [])
    assert bind_arguments(keep_short, shape, {"max_word": 3})[1] == [
        "unknown argument `max_word`, it takes max_words, unit. Did you mean `max_words`?"
    ]
    assert bind_arguments(keep_short, shape, {"max_words": "3"})[1] == ["argument `max_words` is '3', expected int"]
    assert "argument `unit` is 'lines'" in bind_arguments(keep_short, shape, {"unit": "lines"})[1][0]
    assert bind_arguments(Scorer, inspect_filter(Scorer), {})[1] == ["argument `path` (str) is required"]


def test_a_bare_scalar_is_the_first_argument() -> None:
    shape = inspect_filter(keep_short)
    assert place_bare(shape, {}, 4) == ({"max_words": 4}, [])
    assert place_bare(shape, {"max_words": 1}, 4)[1] == ["argument `max_words` is given twice"]
    assert place_bare(inspect_filter(lambda sample: True), {}, 4)[1] == ["it takes no argument, got 4"]


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [1], [1.0, True, "1", None]),
        (float, [1, 1.5], [True, "1.5"]),
        (bool, [True], [1, "true"]),
        (str, ["x"], [1]),
        (int | None, [1, None], ["x"]),
        (list[str], [["a"], []], ["a", [1]]),
        (dict[str, int], [{"a": 1}], [{"a": "b"}, []]),
        (Literal["a", 1], ["a", 1], ["b", True]),
        (Any, [1, object()], []),
    ],
)
def test_yaml_values_fit_annotations(annotation: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(matches(annotation, value) for value in good)
    assert not any(matches(annotation, value) for value in bad)


def test_what_a_filter_returns_becomes_a_verdict() -> None:
    assert to_outcome(True).verdict == Verdict(True)
    assert to_outcome(False).verdict == Verdict(False, None, "rejected")
    scored = to_outcome(0.25)
    assert (scored.verdict, scored.bare_float) == (Verdict(True, 0.25), True)
    assert to_outcome(Verdict(True, 3)).verdict.score == 3.0
    assert type(to_outcome(Verdict(True, 3)).verdict.score) is float
    assert to_outcome(Verdict(False)).verdict.reason == "rejected"
    assert [one.verdict.keep for one in to_outcomes([True, Verdict(False)], 2)] == [True, False]
    with pytest.raises(ContractBreach, match="verdict 1 of 2: it returned None"):
        to_outcomes([True, None], 2)
