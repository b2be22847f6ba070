"""equations_valid: keeps solutions whose calculation steps are right."""

from __future__ import annotations

import re

from iterative_sft_cli.config.expression import Expression, ExpressionError
from iterative_sft_cli.filters.builtin.keys import equations
from iterative_sft_cli.filters.builtin.spec import BuiltIn, at_least, decide
from iterative_sft_cli.types import Sample, Verdict

SPEC = BuiltIn(role="verifier", cost="about 20 us an equation", check=at_least("tolerance", 0))
_SIGNS = str.maketrans({"×": "*", "÷": "/", "x": "*", "X": "*", "^": "\u2191", "−": "-", "$": "", "[": "(", "]": ")"})
_PERCENT = re.compile(r"([0-9.]+)%(?![0-9(])")


def equations_valid(
    sample: Sample, tolerance: float = 1e-3, require: bool = False, marked_only: bool = False, drop: bool = True
) -> Verdict:
    """Keep a completion in which every calculation step comes out right (the RFT recipe).

    Steps are `<<48/2=24>>` marks where there are any, else every `numbers and operators = number` of the text
    (`marked_only: true`: only marks). tolerance: absolute. require: drop a completion without steps, as `no_equations`.
    A step that is not arithmetic counts as wrong. Dropped as `wrong_equation`; extra `equation` holds the first.
    """
    if marked_only and "<<" not in sample.completion:
        found: list[str] = []
    else:
        found = equations(sample.completion)
    if not found:
        return decide(not require, "no_equations", drop=drop)
    for equation in found:
        if not is_right(equation, tolerance):
            return decide(False, "wrong_equation", drop=drop, extra={"equation": equation[:200]})
    return decide(True, "", drop=drop)


def is_right(equation: str, tolerance: float) -> bool:
    """Whether all sides of `a=b=c` have the same value."""
    sides = equation.split("=")
    try:
        values = [_value(side) for side in sides]
    except (ExpressionError, RecursionError):
        return False
    return len(values) > 1 and all(abs(value - values[-1]) <= tolerance for value in values[:-1])


def _value(side: str) -> float:
    text = _PERCENT.sub(r"(\1/100)", side.replace(",", "").translate(_SIGNS)).replace("\u2191", "**")
    expression = Expression(text)
    if expression.names:
        raise ExpressionError(f"{text} is not arithmetic")
    return expression({})
