"""Arithmetic over score names, such as `exp(reward / 0.5)`: parsed by a grammar of its own, so no Python is ever evaluated.

An expression is a pure function of its names; what is not a finite number is an error, never a score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from iterative_sft_cli.config.findings import finding

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>\*\*|[-+*/(),]))"
)
_FUNCTIONS: dict[str, tuple[int, int | None, Callable[..., float]]] = {
    "min": (2, None, min),
    "max": (2, None, max),
    "exp": (1, 1, math.exp),
    "log": (1, 1, math.log),
    "abs": (1, 1, abs),
}
_MAX_LENGTH = 500
_MAX_DEPTH = 50
Evaluator = Callable[[Mapping[str, float]], float]


class ExpressionError(ValueError):
    """The text is not an expression, a name has no score, or the result is not a finite number."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression: its text, the score names it reads, in order of appearance, and how to evaluate it."""

    text: str
    names: tuple[str, ...]
    _evaluate: Evaluator

    def __call__(self, scores: Mapping[str, float | None]) -> float:
        """Evaluate over `scores`. Raises ExpressionError for a missing score or a result that is not finite."""
        values: dict[str, float] = {}
        for name in self.names:
            score = scores.get(name)
            if score is None:
                raise ExpressionError(f"{self.text}: there is no score named {name}")
            values[name] = float(score)
        try:
            result = self._evaluate(values)
        except (ArithmeticError, ValueError) as error:
            raise ExpressionError(f"{self.text}: {error}") from None
        if isinstance(result, complex) or not math.isfinite(result):
            raise ExpressionError(f"{self.text}: the result is {result}, which is not a finite number")
        return result


@lru_cache(maxsize=256)
def parse_expression(text: str) -> Expression:
    """Parse `text`: numbers, names, + - * / **, parentheses, and min, max, exp, log, abs. Raises ExpressionError."""
    if len(text) > _MAX_LENGTH:
        raise ExpressionError(f"the expression has {len(text)} characters, more than {_MAX_LENGTH}")
    parser = _Parser(text)
    evaluate = parser.sum(0)
    parser.end()
    return Expression(text, tuple(dict.fromkeys(parser.names)), evaluate)


def check_expression(text: str) -> str:
    """The text itself if it parses; else a finding."""
    try:
        parse_expression(text)
    except ExpressionError as error:
        raise finding(str(error), expected="arithmetic over score names: + - * / **, min, max, exp, log, abs") from None
    return text


class _Parser:
    """Recursive descent: sum > product > unary > power > atom. `**` binds tighter than a sign on its left, and to the right."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str, int]] = []
        self.names: list[str] = []
        self.index = 0
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                rest = text[position:].lstrip()
                raise ExpressionError(f"{rest[0]!r} at character {text.index(rest, position) + 1} is not arithmetic")
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind) + 1))
            position = match.end()
        self.tokens.append(("end", "", end + 1))

    def take(self, *signs: str) -> str | None:
        kind, text, _ = self.tokens[self.index]
        if kind == "sign" and text in signs:
            self.index += 1
            return text
        return None

    def fail(self) -> ExpressionError:
        kind, text, column = self.tokens[self.index]
        return ExpressionError(
            "the expression ends too early" if kind == "end" else f"{text!r} at character {column} does not fit"
        )

    def need(self, sign: str) -> None:
        if self.take(sign) is None:
            raise self.fail()

    def end(self) -> None:
        if self.tokens[self.index][0] != "end":
            raise self.fail()

    def sum(self, depth: int) -> Evaluator:
        if depth > _MAX_DEPTH:
            raise ExpressionError("the expression is nested too deeply")
        left = self.product(depth)
        while sign := self.take("+", "-"):
            left = _binary(sign, left, self.product(depth))
        return left

    def product(self, depth: int) -> Evaluator:
        left = self.unary(depth)
        while sign := self.take("*", "/"):
            left = _binary(sign, left, self.unary(depth))
        return left

    def unary(self, depth: int) -> Evaluator:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        inner = self.power(depth)
        return (lambda scores: -inner(scores)) if negative else inner

    def power(self, depth: int) -> Evaluator:
        base = self.atom(depth)
        if not self.take("**"):
            return base
        if depth > _MAX_DEPTH:
            raise ExpressionError("the expression is nested too deeply")
        return _binary("**", base, self.unary(depth + 1))

    def atom(self, depth: int) -> Evaluator:
        kind, text, _ = self.tokens[self.index]
        if kind == "number":
            self.index += 1
            number = float(text)
            if not math.isfinite(number):
                raise ExpressionError(f"{text} is not a finite number")
            return lambda scores: number
        if self.take("("):
            inner = self.sum(depth + 1)
            self.need(")")
            return inner
        if kind != "name":
            raise self.fail()
        self.index += 1
        return self.call(text, depth) if self.take("(") else self.name(text)

    def name(self, text: str) -> Evaluator:
        self.names.append(text)
        return lambda scores: scores[text]

    def call(self, text: str, depth: int) -> Evaluator:
        if text not in _FUNCTIONS:
            raise ExpressionError(f"there is no function named {text}")
        fewest, most, function = _FUNCTIONS[text]
        arguments = [self.sum(depth + 1)]
        while self.take(","):
            arguments.append(self.sum(depth + 1))
        self.need(")")
        if len(arguments) < fewest or (most is not None and len(arguments) > most):
            raise ExpressionError(f"{text} takes {fewest}{'' if most else ' or more'} arguments, not {len(arguments)}")
        return lambda scores: function(*(argument(scores) for argument in arguments))


def _binary(sign: str, left: Evaluator, right: Evaluator) -> Evaluator:
    if sign == "+":
        return lambda scores: left(scores) + right(scores)
    if sign == "-":
        return lambda scores: left(scores) - right(scores)
    if sign == "*":
        return lambda scores: left(scores) * right(scores)
    if sign == "/":
        return lambda scores: left(scores) / right(scores)
    return lambda scores: left(scores) ** right(scores)
