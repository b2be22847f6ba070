"""Conditions over the statistics of a run, such as `eval/pass@1 < best(eval/pass@1) - 0.02`, for guards and curricula.

An expression in which a figure of `stats.jsonl` stands under its own name; a pure function of the committed rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iterative_sft_cli.config.expression import Expression, ExpressionError

SECTIONS = ("generate", "filters", "rationalize", "train", "eval")
_FIGURE = rf"(?:(?:{'|'.join(SECTIONS)})(?:/[A-Za-z0-9_@]+)+|round)"
_CALL = re.compile(rf"\b(best|first|previous|plateau|falls|rises)\(\s*({_FIGURE})\s*(?:,\s*(\d+)\s*)?\)")
_BARE = re.compile(rf"(?<![\w/@.])({_FIGURE})(?![\w/@(])")
_COUNTED = frozenset({"plateau", "falls", "rises"})
GRAMMAR = (
    "a condition over figures of stats.jsonl, such as `filters/accept_rate < 0.05`, with best(x), first(x), previous(x), "
    "plateau(x, n), falls(x, n) and rises(x, n)"
)


@dataclass(frozen=True, slots=True)
class _Term:
    """A figure, or a function over its history."""

    figure: str
    function: str | None = None
    count: int = 0


class Condition:
    """A parsed condition. `figures` are the statistics it reads.

    best: the highest value so far. first, previous: the value of the first row that has it, and of the one before the last.
    plateau(x, n): the best of the last n values is not above the best before them. falls, rises: each of the last n values is below (above) the one
    before it. Raises ExpressionError for what cannot be read, for unknown figures' sections and for arithmetic without a comparison.
    """

    __slots__ = ("_expression", "_terms", "figures", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        terms: dict[_Term, str] = {}

        def name(term: _Term) -> str:
            return terms.setdefault(term, f"term_{len(terms)}_")

        def call(match: re.Match[str]) -> str:
            function, figure, number = match.groups()
            if (function in _COUNTED) != (number is not None):
                wanted = f"{function}({figure}, n)" if function in _COUNTED else f"{function}({figure})"
                raise ExpressionError(f"`{match[0]}`: expected {wanted}")
            if number is not None and int(number) < 1:
                raise ExpressionError(f"`{match[0]}`: n is {number}, expected at least 1")
            return name(_Term(figure, function, int(number or 0)))

        rest = _CALL.sub(call, text)
        rest = _BARE.sub(lambda match: name(_Term(match[1])), rest)
        try:
            self._expression = Expression(rest)
        except ExpressionError as error:
            raise ExpressionError(f"`{text}` cannot be read: {error}") from None
        unknown = [one for one in self._expression.names if one not in terms.values()]
        if unknown:
            raise ExpressionError(
                f"`{unknown[0]}` is no figure; figures begin with {', '.join(SECTIONS[:-1])} or {SECTIONS[-1]}, then a slash"
            )
        if not terms or not self._expression.is_condition and not all(t.function in _COUNTED for t in terms):
            raise ExpressionError(f"`{text}` is no condition: compare a figure with something")
        self._terms = {value: term for term, value in terms.items()}
        self.figures = tuple(dict.fromkeys(term.figure for term in terms))

    def holds(self, rows: Sequence[Mapping[str, Any]]) -> bool | None:
        """Whether it holds after the last of `rows`; None while one of its figures has no value there yet."""
        values: dict[str, float] = {}
        for name, term in self._terms.items():
            found = _value(term, rows)
            if found is None:
                return None
            values[name] = found
        try:
            return bool(self._expression(values))
        except ExpressionError:
            return None


def _value(term: _Term, rows: Sequence[Mapping[str, Any]]) -> float | None:
    history = [float(row[term.figure]) for row in rows if isinstance(row.get(term.figure), int | float)]
    current = bool(rows) and isinstance(rows[-1].get(term.figure), int | float)
    if not current:
        return None
    if term.function is None:
        return history[-1]
    if term.function == "best":
        return max(history)
    if term.function == "first":
        return history[0]
    if term.function == "previous":
        return history[-2] if len(history) > 1 else None
    if len(history) <= term.count:
        return 0.0
    if term.function == "plateau":
        return float(max(history[-term.count :]) <= max(history[: -term.count]))
    last = history[-term.count - 1 :]
    down = term.function == "falls"
    return float(all((b < a) if down else (b > a) for a, b in zip(last, last[1:], strict=False)))
