"""Arithmetic over score names, such as `exp(reward / 0.5)`: parsed by a grammar of its own, so no Python is ever evaluated.

An expression is a pure function of its names; what is not a finite number is an error, never a score.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>\*\*|[<>=!]=|[-+*/%(),<>]))"
)
_FUNCTIONS: dict[str, tuple[int, int | None, Callable[..., float]]] = {
    "min": (2, None, min),
    "max": (2, None, max),
    "exp": (1, 1, math.exp),
    "log": (1, 1, math.log),
    "sqrt": (1, 1, math.sqrt),
    "abs": (1, 1, abs),
}
_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": operator.mod,
    "**": math.pow,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
_WORDS = frozenset({"and", "or", "not"})
MAX_CHARS = 500
MAX_DEPTH = 50
GRAMMAR = "arithmetic over score names: + - * / % **, min, max, exp, log, sqrt, abs, comparisons, and, or, not"

Evaluator = Callable[[Mapping[str, float]], float]


class ExpressionError(ValueError):
    """The text is not an expression, or it has no finite value for some scores; the message is one sentence."""


class MissingScore(ExpressionError):
    """A name of the expression has no score; `name` says which."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        super().__init__(f"`{text}`: there is no score named {name}")


class Expression:
    """A parsed expression: its `text`, the score `names` it reads in order of appearance, and whether it `is_condition`.

    Grammar: numbers, names, + - * / % **, parentheses, min, max, exp, log, sqrt, abs, comparisons (no chains), and, or, not.
    Raises ExpressionError, naming the character, for anything else.
    """

    __slots__ = ("_evaluate", "is_condition", "names", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._evaluate, self.names, self.is_condition = _parse(text)

    def __call__(self, scores: Mapping[str, float | None]) -> float:
        """The value over `scores`; a condition gives 1.0 or 0.0. Raises MissingScore, or ExpressionError when it is not finite."""
        values: dict[str, float] = {}
        for name in self.names:
            score = scores.get(name)
            if score is None:
                raise MissingScore(self.text, name)
            values[name] = float(score)
        try:
            result = float(self._evaluate(values))
        except (ArithmeticError, ValueError) as error:
            raise ExpressionError(f"`{self.text}` has no value for {values} ({error})") from None
        if not math.isfinite(result):
            raise ExpressionError(f"`{self.text}` is {result} for {values}")
        return result


@lru_cache(maxsize=256)
def _parse(text: str) -> tuple[Evaluator, tuple[str, ...], bool]:
    if len(text) > MAX_CHARS:
        raise ExpressionError(f"the expression has {len(text)} characters, more than {MAX_CHARS}")
    parser = _Parser(text)
    evaluate = parser.any_of()
    parser.end()
    return evaluate, tuple(dict.fromkeys(parser.names)), parser.is_condition


class _Parser:
    """Recursive descent: or > and > not > comparison > sum > product > unary > power > atom.

    `**` binds tighter than a sign on its left and groups to the right, as in Python.
    """

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str, int]] = []
        self.names: list[str] = []
        self.index = 0
        self.depth = 0
        self.is_condition = False
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                rest = text[position:].lstrip()
                raise ExpressionError(
                    f"{rest[0]!r} at character {len(text) - len(rest) + 1} has no meaning in an expression"
                )
            kind = str(match.lastgroup)
            word = match[kind]
            self.tokens.append(("sign" if word in _WORDS else kind, word, match.start(kind) + 1))
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
        if kind == "end":
            return ExpressionError("the expression is empty" if column == 1 else "the expression ends too early")
        return ExpressionError(f"{text!r} at character {column} does not fit there")

    def end(self) -> None:
        if self.tokens[self.index][0] != "end":
            raise self.fail()

    def any_of(self) -> Evaluator:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError("the expression is nested too deeply")
        parts = [self.all_of()]
        while self.take("or"):
            parts.append(self.all_of())
        self.depth -= 1
        return parts[0] if len(parts) == 1 else self.logic(any, parts)

    def all_of(self) -> Evaluator:
        parts = [self.negation()]
        while self.take("and"):
            parts.append(self.negation())
        return parts[0] if len(parts) == 1 else self.logic(all, parts)

    def logic(self, join: Callable[[list[bool]], bool], parts: list[Evaluator]) -> Evaluator:
        self.is_condition = True
        return lambda scores: join([bool(part(scores)) for part in parts])

    def negation(self) -> Evaluator:
        negated = some = False
        while self.take("not"):
            negated, some = not negated, True
        inner = self.comparison()
        self.is_condition |= some
        return (lambda scores: not inner(scores)) if negated else inner

    def comparison(self) -> Evaluator:
        left = self.sum()
        sign = self.take(*_COMPARISONS)
        if sign is None:
            return left
        right = self.sum()
        self.is_condition = True
        return _binary(sign, left, right)

    def sum(self) -> Evaluator:
        left = self.product()
        while sign := self.take("+", "-"):
            left = self.number(sign, left, self.product())
        return left

    def product(self) -> Evaluator:
        left = self.unary()
        while sign := self.take("*", "/", "%"):
            left = self.number(sign, left, self.unary())
        return left

    def unary(self) -> Evaluator:
        negative = some = False
        while sign := self.take("+", "-"):
            negative, some = negative ^ (sign == "-"), True
        inner = self.power()
        self.is_condition &= not some
        return (lambda scores: -inner(scores)) if negative else inner

    def power(self) -> Evaluator:
        base = self.atom()
        if not self.take("**"):
            return base
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError("the expression is nested too deeply")
        exponent = self.unary()
        self.depth -= 1
        return self.number("**", base, exponent)

    def number(self, sign: str, left: Evaluator, right: Evaluator) -> Evaluator:
        self.is_condition = False
        return _binary(sign, left, right)

    def atom(self) -> Evaluator:
        kind, text, _ = self.tokens[self.index]
        self.is_condition = False
        if kind == "number":
            self.index += 1
            number = float(text)
            if not math.isfinite(number):
                raise ExpressionError(f"{text} is not a finite number")
            return lambda scores: number
        if self.take("("):
            inner = self.any_of()
            self.close()
            return inner
        if kind != "name":
            raise self.fail()
        self.index += 1
        if self.take("("):
            return self.call(text)
        self.names.append(text)
        return lambda scores: scores[text]

    def call(self, text: str) -> Evaluator:
        if text not in _FUNCTIONS:
            raise ExpressionError(f"there is no function named {text}")
        fewest, most, function = _FUNCTIONS[text]
        arguments = [self.any_of()]
        while self.take(","):
            arguments.append(self.any_of())
        self.close()
        self.is_condition = False
        if len(arguments) < fewest or (most is not None and len(arguments) > most):
            raise ExpressionError(f"{text} takes {fewest}{'' if most else ' or more'} arguments, not {len(arguments)}")
        return lambda scores: function(*(argument(scores) for argument in arguments))

    def close(self) -> None:
        if self.take(")") is None:
            raise self.fail()


def _binary(sign: str, left: Evaluator, right: Evaluator) -> Evaluator:
    apply = _OPERATORS[sign]
    return lambda scores: apply(left(scores), right(scores))
