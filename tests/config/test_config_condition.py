"""Conditions over the statistics."""

from __future__ import annotations

import pytest

from iterative_sft_cli.config.condition import Condition
from iterative_sft_cli.config.expression import ExpressionError


def rows(*values: float | None, key: str = "eval/pass@1") -> list[dict[str, float]]:
    return [{"round": i} if value is None else {"round": i, key: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("eval/pass@1 > 0.5", (0.2, 0.6), True),
        ("eval/pass@1 > 0.5", (0.6, 0.2), False),
        ("eval/pass@1 > 0.5", (0.6, None), None),
        ("eval/pass@1 > 0.5", (), None),
        ("eval/pass@1 < best(eval/pass@1) - 0.02", (0.5, 0.47), True),
        ("eval/pass@1 < best(eval/pass@1) - 0.02", (0.5, 0.49), False),
        ("eval/pass@1 - previous(eval/pass@1) < 0", (0.5, 0.4), True),
        ("eval/pass@1 - previous(eval/pass@1) < 0", (0.5,), None),
        ("eval/pass@1 > first(eval/pass@1)", (0.5, 0.4, 0.6), True),
        ("plateau(eval/pass@1, 2)", (0.5, 0.5, 0.4), True),
        ("plateau(eval/pass@1, 2)", (0.4, 0.5, 0.5), False),
        ("plateau(eval/pass@1, 2)", (0.4, 0.5), False),
        ("plateau(eval/pass@1, 2)", (0.5, None, 0.5, 0.4), True),
        ("falls(eval/pass@1, 2)", (0.5, 0.4, 0.3), True),
        ("falls(eval/pass@1, 2)", (0.5, 0.4, 0.4), False),
        ("rises(eval/pass@1, 1) and round >= 1", (0.5, 0.6), True),
        ("not eval/pass@1 > 0.5", (0.5,), True),
        ("eval/pass@1 / 2 > 0.2", (0.5,), True),
        ("eval/pass@1 / (eval/pass@1 - 0.5) > 0", (0.5,), None),
    ],
)
def test_it_holds(text: str, values: tuple[float | None, ...], expected: bool | None) -> None:
    assert Condition(text).holds(rows(*values)) is expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eval/pass@1",
        "eval/pass@1 + 1",
        "reward > 1",
        "1 > 0",
        "best(eval/pass@1, 2) > 1",
        "falls(eval/pass@1, 0)",
        "eval/pass@1 >",
        "tokens/x > 1",
    ],
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        Condition(text)


def test_it_names_its_figures_once() -> None:
    condition = Condition("eval/level/3/pass@1 < best(eval/pass@1) or eval/pass@1 > 0.9")
    assert set(condition.figures) == {"eval/level/3/pass@1", "eval/pass@1"}
