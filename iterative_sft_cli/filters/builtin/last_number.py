"""Reading the number a text ends with: what `numeric_answer` and `majority` mean by an answer.

Exact rational arithmetic; a text can neither take exponential time nor make a huge integer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 300
MAX_EXPONENT = 300
MAX_MARKS = 20

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"""(?<![A-Za-z0-9_.])
    (?P<sign>(?:(?<=[=:(])\ ?[-+]\ ?|[-+])?)(?P<currency>[$€£¥]?\ ?)(?P<sign2>[-+]?)
    (?:(?P<whole>[0-9]{{1,6}})[ ](?=[0-9]{{1,6}}/[0-9]))?
    (?P<digits>{_DIGITS})
    (?P<exponent>[eE][-+]?[0-9]{{1,9}}(?![0-9A-Za-z])|\ ?[*x×]\ ?10\^\{{?[-+]?[0-9]{{1,3}}\}}?)?
    (?:\ ?/\ ?(?P<under>(?:{_DIGITS})(?![0-9])))?
    (?P<percent>\ ?%)?""",
    re.VERBOSE,
)
_SIMPLE = re.compile(r"\s*(-?[0-9]{1,15})\s*\.?\s*")
_FRAC = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?[0-9.,]{1,40})\s*\}\s*\{\s*([0-9.,]{1,40})\s*\}|([0-9])\s*([0-9]))")
_MARK = re.compile(r"####|\\boxed\s*\{|\\fbox\s*\{|answer[\s*_]{0,4}(?:\bis\b(?!\s+not\b)|[:=])", re.IGNORECASE)
_ALTERNATIVE = re.compile(r"\bor\b|\|\||^\s*[,;|?]?\s*$|^\s*\?", re.IGNORECASE)
_OPERATOR = re.compile(r"^\s*(?:[-+*/×÷^–]|\\times|\\cdot|\\div)\s*$")
_OR = re.compile(r"\bor\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Found:
    """A number in a text: its exact value, the text it stood as, and whether a percent sign followed."""

    value: Fraction
    text: str
    percent: bool


class SeveralAnswers(Exception):
    """The text offers alternatives ("5 or 6") instead of one answer."""


def _plain(text: str) -> str:
    if "\\" in text or "{,}" in text:
        text = text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
        text = text.replace("\\!", "").replace("\\times", "×").replace("\\,", " ").replace("\\ ", " ")
        text = text.replace("\\left", "").replace("\\right", "")
        if "frac" in text:
            text = _FRAC.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}", text)
    return text if text.isascii() else text.replace("−", "-").replace("–", "-").replace("\u00a0", " ")


def _fraction(digits: str, exponent: str | None = None) -> Fraction | None:
    digits = digits.replace(",", "")
    if len(digits) > MAX_DIGITS:
        return None
    value = Fraction(digits) if "." in digits else Fraction(int(digits))
    if exponent:
        power = int(re.sub(r"[^0-9+-]", "", exponent.split("^")[-1] if "^" in exponent else exponent[1:]))
        if abs(power) > MAX_EXPONENT:
            return None
        value *= Fraction(10) ** power
    return value


def _read(match: re.Match[str]) -> Found | None:
    value = _fraction(match["digits"], match["exponent"])
    if value is None:
        return None
    if match["under"]:
        under = _fraction(match["under"])
        if not under:
            return None
        value /= under
        if match["whole"]:
            value += int(match["whole"])
    sign = match["sign"].strip() + match["sign2"]
    if sign.count("-") % 2 and not _is_operator(match):
        value = -value
    return Found(value, match[0].strip(), bool(match["percent"]))


def _is_operator(match: re.Match[str]) -> bool:
    """Whether the minus sign stands after a term ("5-3"), where it subtracts."""
    if not match["sign"]:
        return False
    before = match.string[: match.start()][-2:]
    term = before.rstrip(" ")[-1:]
    if term.isalpha():
        # "x-3" subtracts, "is -3" does not
        return before[-1:] != " "
    return term.isdigit() or term in (")", "%", "]", "}")


def parse_number(text: str) -> Found | None:
    """The value when the whole text is one plain integer: the fast path of most answers."""
    if simple := _SIMPLE.fullmatch(text):
        return Found(Fraction(int(simple[1])), simple[1], False)
    return None


def _boxed(text: str, start: int) -> str:
    """The content of a brace group that opens before `start`."""
    depth = 1
    for index in range(start, min(len(text), start + 2000)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return text[start:index]
    return text[start : start + 2000]


def _first_answer(text: str) -> Found | None:
    """The number a statement such as "12 + 3 = 15 apples" gives. Raises SeveralAnswers for "5 or 6" and "10-15"."""
    current: Found | None = None
    end = 0
    open_operator = False
    for match in _NUMBER.finditer(text):
        found = _read(match)
        if found is None:
            continue
        if current is None:
            current, end = found, match.end()
            continue
        gap = text[end : match.start()]
        if match["sign"].strip() and _is_operator(match):
            gap += match["sign"]
        if "\n" in gap or ". " in gap:
            break
        if "=" in gap or "≈" in gap:
            current, open_operator = found, False
        elif _OPERATOR.match(gap):
            current, open_operator = found, True
        elif _ALTERNATIVE.search(gap):
            if found.value != current.value:
                raise SeveralAnswers
            current = found
        else:
            break
        end = match.end()
    if open_operator:
        raise SeveralAnswers
    return current


def last_number(text: str) -> Found | None:
    r"""The number that a text gives as its answer, None without one. Raises SeveralAnswers.

    Where the text marks an answer (`####`, `\boxed{}`, "answer is", "answer:"), the number of the last mark that has
    one: the first number after it, carried on over `=`. Without a mark, the last number of the text.
    """
    if found := parse_number(text):
        return found
    text = _plain(text)
    for mark in reversed(list(_MARK.finditer(text))[-MAX_MARKS:]):
        inside = _boxed(text, mark.end()) if mark[0].endswith("{") else text[mark.end() : mark.end() + 2000]
        if (found := _first_answer(inside)) is not None:
            return found
    return _very_last(text[-400:], 100 if len(text) > 400 else 0) or (_very_last(text, 0) if len(text) > 400 else None)


def _very_last(text: str, not_before: int) -> Found | None:
    last: Found | None = None
    previous: Found | None = None
    gap, end, start = "", 0, -1
    for match in _NUMBER.finditer(text):
        found = _read(match)
        if found is None:
            continue
        previous, last = last, found
        gap, end, start = text[end : match.start()], match.end(), match.start()
    if last is None or start < not_before:
        return None
    if previous is not None and len(gap) <= 40 and "\n" not in gap and _OR.search(gap) and previous.value != last.value:
        raise SeveralAnswers
    return last


def equal_numbers(said: Found, gold: Found, tolerance: float) -> bool:
    """Whole numbers are compared exactly, others within `tolerance` x max(1, |gold|); 50% equals 50 and 0.5."""
    if _close(said.value, gold.value, tolerance):
        return True
    if said.percent and not gold.percent:
        return _close(said.value / 100, gold.value, tolerance)
    if gold.percent and not said.percent:
        return _close(said.value, gold.value / 100, tolerance)
    return False


def _close(a: Fraction, b: Fraction, tolerance: float) -> bool:
    if a == b:
        return True
    if a.denominator == 1 and b.denominator == 1:
        return False
    return abs(a - b) <= Fraction(tolerance) * max(Fraction(1), abs(b))
