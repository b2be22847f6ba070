from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterative_sft_cli.config import Expression, ExpressionError, MissingScore

SCORES = {"reward": 0.5, "judge": 4.0, "n": 2.0}


@pytest.mark.parametrize(
    ("text", "value", "names"),
    [
        ("1 + 2 * 3", 7, ()),
        ("-2 ** 2", -4, ()),
        ("2 ** -1", 0.5, ()),
        ("2 ** 3 ** 2", 512, ()),
        ("--reward", 0.5, ("reward",)),
        ("7 % 4", 3, ()),
        ("1e-3 + .5", 0.501, ()),
        ("exp(reward / 0.5)", math.e, ("reward",)),
        ("log(judge) / log(n)", 2, ("judge", "n")),
        ("sqrt(judge) + abs(-3)", 5, ("judge",)),
        ("max(0, reward - judge, 3)", 3, ("reward", "judge")),
        ("min(reward, 1) * reward", 0.25, ("reward",)),
        ("reward >= 0.5", 1, ("reward",)),
        ("reward > 0.5 or judge == 4", 1, ("reward", "judge")),
        ("not (reward < 1 and n != 2)", 1, ("reward", "n")),
        ("(judge > 3) * 2 + (n > 3)", 2, ("judge", "n")),
    ],
)
def test_expressions_have_the_values_of_arithmetic(text: str, value: float, names: tuple) -> None:
    expression = Expression(text)
    assert expression(SCORES) == pytest.approx(value)
    assert expression.names == names


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("a > 1", True),
        ("(a > 1)", True),
        ("not a", True),
        ("(a or b)", True),
        ("a > 1 and b > 1", True),
        ("a", False),
        ("(a)", False),
        ("(a > 1) * 2", False),
        ("-(a > 1)", False),
        ("min(a > 1, 2)", False),
        ("2 ** (a > 1)", False),
        ("a + 1 > b", True),
    ],
)
def test_a_condition_is_told_from_a_number(text: str, condition: bool) -> None:
    assert Expression(text).is_condition is condition


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1 +",
        "a b",
        "a..b",
        "a.b",
        "a[0]",
        "foo(1)",
        "exp()",
        "exp(1, 2)",
        "min(1)",
        "__import__('os')",
        '"x"',
        "lambda: 1",
        "a if b else c",
        "a = 1",
        "a < b < c",
        "1_000",
        "1e999",
        "a; b",
        "a\\b",
        "(" * 60 + "1" + ")" * 60,
        "2**" * 100 + "2",
        "not " * 1000 + "1",
        "1" * 501,
        "()",
        "(1",
        "1)",
        "and",
        "a and",
        "é*",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        Expression(text)


def test_what_has_no_finite_value_is_an_error_and_never_a_score() -> None:
    for text in (
        "1 / 0",
        "1 % 0",
        "exp(1000)",
        "log(0)",
        "sqrt(-1)",
        "(-1) ** 0.5",
        "10 ** 400",
        "0 ** -1",
        "1e300 * 1e300",
    ):
        with pytest.raises(ExpressionError):
            Expression(text)({})


def test_a_missing_score_is_named() -> None:
    with pytest.raises(MissingScore, match="no score named judge") as caught:
        Expression("reward + judge")({"reward": 1.0, "judge": None})
    assert caught.value.name == "judge"


leaf = st.integers(0, 99).map(str) | st.floats(0.01, 99).map(repr) | st.sampled_from(["reward", "judge", "n"])
trees = st.recursive(
    leaf,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "<", ">="]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        )
        | inner.map(lambda t: f"-{t}")
        | st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(trees)
def test_values_agree_with_python(text: str) -> None:
    try:
        expected = float(eval(text, {"__builtins__": {}, "min": min, "max": max}, SCORES))  # noqa: S307
    except (ArithmeticError, SyntaxError):
        return
    if math.isfinite(expected):
        assert Expression(text)(SCORES) == pytest.approx(expected)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_does_anything_but_parse_or_be_refused(text: str) -> None:
    try:
        Expression(text)(SCORES)
    except ExpressionError:
        pass
