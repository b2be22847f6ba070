"""math_verify: keeps completions whose mathematical expression is equivalent to the answer."""

from __future__ import annotations

from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters.builtin.last_number import SeveralAnswers, last_number
from iterative_sft_cli.filters.builtin.spec import WORKER_KEYS, BuiltIn, decide
from iterative_sft_cli.types import Sample, Verdict

SPEC = BuiltIn(
    role="verifier",
    cost="2 to 20 ms, in worker processes; 5 s at most (`timeout_s`), then dropped as `timeout`",
    requires=(("math_verify", "math"),),
    honours=WORKER_KEYS,
    isolated=True,
    default_on_error="drop",
)


class math_verify:
    r"""Keep a completion whose answer math-verify finds equivalent to `answer`: 1/2 = 0.5 = \frac{1}{2}, sets, intervals, equations.

    The answer is read from the final part as math-verify does: the last \boxed{}, else the last expression. A plain
    `answer` is read as LaTeX and as an expression. Runs in worker processes of its own, killed after `timeout_s`.
    precision: decimals that must agree. strict: whether variables and set kinds must match.
    Where the answer is a plain number, a sum, product or power that still has to be worked out ("12+7", the question
    itself) is no answer. Dropped as `wrong_answer`, `no_expression`, `several_answers` ("5 or 6"), `not_evaluated`, or
    `timeout` (no score: it is not a wrong answer).
    """

    def __init__(self, precision: int = 6, strict: bool = True, drop: bool = True) -> None:
        self.precision = precision
        self.strict = strict
        self.drop = drop
        self._gold: dict[str, list[Any]] = {}

    def setup(self) -> None:
        """Import the library once a worker (0.2 s)."""
        import logging

        import math_verify as library

        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self._library = library

    def __call__(self, sample: Sample) -> Verdict:
        """Time limits are the parent's: the library's own use signals."""
        gold = self._gold_of(sample)
        said = self._library.parse(sample.final, parsing_timeout=None)
        if not said:
            return decide(False, "no_expression", drop=self.drop)
        if is_plain_number(gold[0]):
            if to_be_worked_out(said[0]):
                return decide(False, "not_evaluated", drop=self.drop, extra={"answer": str(said[-1])[:200]})
            if offers_several(sample.final):
                return decide(False, "several_answers", drop=self.drop)
        right = self._library.verify(
            gold, said, float_rounding=self.precision, strict=self.strict, timeout_seconds=None
        )
        return decide(bool(right), "wrong_answer", drop=self.drop, extra={"answer": str(said[-1])[:200]})

    def _gold_of(self, sample: Sample) -> list[Any]:
        text = "" if sample.answer is None else str(sample.answer)
        if text not in self._gold:
            parsed = self._library.parse(text, parsing_timeout=None)
            if not any(not isinstance(one, str) for one in parsed) and text.strip():
                parsed = self._library.parse(f"${text}$", parsing_timeout=None) or parsed
            if not parsed:
                raise DataError(
                    f"prompt {sample.prompt_id} has the answer {sample.answer!r}, in which math_verify finds no expression",
                    hint="set `prompts.answer` to the column with the expression, or give it a pattern",
                )
            if len(self._gold) > 1000:
                self._gold.clear()
            self._gold[text] = parsed
        return self._gold[text]


def is_plain_number(expression: Any) -> bool:
    """Whether the gold answer is one number."""
    return bool(getattr(expression, "is_Number", False))


def offers_several(text: str) -> bool:
    """Whether the text names alternatives instead of one answer."""
    try:
        last_number(text)
    except SeveralAnswers:
        return True
    return False


def to_be_worked_out(expression: Any) -> bool:
    """Whether a sympy expression is a sum, product or power of numbers, other than a fraction, a root or a multiple of one."""
    if getattr(expression, "is_Add", False):
        return not expression.free_symbols and sum(bool(part.is_Number) for part in expression.args) > 1
    if getattr(expression, "is_Pow", False):
        base, exponent = expression.args
        # 3 x 10^4 is a number as it stands
        return bool(base.is_Integer and base != 10 and exponent.is_Integer and exponent > 1)
    if getattr(expression, "is_Mul", False):
        factors = [part for part in expression.args if part.is_Integer and abs(part) != 1]
        return len(factors) > 1 or any(to_be_worked_out(part) for part in expression.args)
    return False
