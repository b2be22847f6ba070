"""What is wrong at one place of a config, in words for people: the wording of every message is decided here.

A finding says what stands there, what was expected, and, where it can be guessed, what was meant.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

Step = str | int
TAGS = frozenset({"<word>", "<number>", "<scalar>", "<list>", "<mapping>"})
"""Names of a value's forms, which pydantic puts into the location of an error."""


def path_of(loc: Sequence[Step], data: Any = None) -> tuple[Step, ...]:
    """The path of an error's location in `data`: without the names of forms, unless a key is really called so."""
    path: list[Step] = []
    for step in loc:
        inside = isinstance(data, dict) and step in data
        if step in TAGS and not inside:
            continue
        path.append(step)
        data = data[step] if inside or (isinstance(data, list) and isinstance(step, int) and step < len(data)) else None
    return tuple(path)


def finding(
    what: str, *, expected: str | None = None, meant: str | None = None, at: Sequence[Step] = (), key: bool = False
) -> PydanticCustomError:
    """An error for pydantic validators. `at` is the path below the validated value; `key` blames the key instead of the value."""
    context = {"what": what, "expected": expected, "meant": meant, "at": list(at), "key": key}
    return PydanticCustomError("finding", "{what}", context)


def finding_from(error: ValidationError, *, at: Sequence[Step]) -> PydanticCustomError:
    """The first finding of a nested validation, moved below `at`."""
    details = error.errors(include_url=False)[0]
    what, expected, meant, inner, key = explain(details)
    return finding(what, expected=expected, meant=meant, at=(*at, *inner), key=key)


def show(value: Any, limit: int = 60) -> str:
    """A value as it would stand in YAML, shortened; text in quotes."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    if isinstance(value, bool | int | float | str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    elif isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    else:
        return f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= limit else text[: limit - 2] + '…"'


def one_of(words: Iterable[str]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    items = list(words)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} or {items[-1]}"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that was probably meant."""
    folded = {item.casefold(): item for item in reversed(list(known))}
    close = difflib.get_close_matches(word.casefold(), list(folded), n=1, cutoff=cutoff)
    return folded[close[0]] if close else None


def what_is(value: Any) -> str:
    """A value and its kind: `"hot" is text`, `1.5 is a fraction`, `a list`."""
    if (
        value is None
        or isinstance(value, dict | list | tuple)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        return show(value)
    kinds = ((bool, "true or false"), (int, "an integer"), (float, "a fraction"), (str, "text"))
    kind = next((word for kind, word in kinds if isinstance(value, kind)), None)
    return f"{show(value)} is {kind}" if kind and not isinstance(value, bool) else show(value)


_BOOLEAN_WORDS = {
    "yes": "true",
    "on": "true",
    "y": "true",
    "no": "false",
    "off": "false",
    "n": "false",
    "true": "true",
    "false": "false",
}


def explain(error: ErrorDetails) -> tuple[str, str | None, str | None, tuple[Step, ...], bool]:
    """(what, expected, meant, path below the error's location, blame the key) of one pydantic error."""
    kind, value, context = error["type"], error.get("input"), error.get("ctx", {})
    got = show(value)
    if kind == "finding":
        return context["what"], context["expected"], context["meant"], tuple(context["at"]), context["key"]
    if kind == "missing":
        return "missing", None, None, (), False
    if kind == "extra_forbidden":
        return "unknown key", None, None, (), True
    if kind in ("literal_error", "enum"):
        words = [word.strip().strip("'\"") for word in context["expected"].replace(" or ", ", ").split(", ")]
        words += ["a number"] if "<word>" in error["loc"] else []
        return (
            f"{got} is not known here",
            one_of(words),
            nearest(value, [word for word in words if word != "a number"]) if isinstance(value, str) else None,
            (),
            False,
        )
    if kind in ("bool_type", "bool_parsing"):
        meant = _BOOLEAN_WORDS.get(value.casefold()) if isinstance(value, str) else None
        return what_is(value), "true or false", meant, (), False
    if kind in ("int_type", "int_from_float", "int_parsing"):
        return what_is(value), "an integer", _number_meant(value, whole=True), (), False
    if kind in ("float_type", "float_parsing"):
        return what_is(value), "a number", _number_meant(value, whole=False), (), False
    if kind == "finite_number":
        return f"{got} is not a finite number", "a finite number", None, (), False
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        word, bound = {
            "greater_than": ("more than", context.get("gt")),
            "greater_than_equal": ("at least", context.get("ge")),
            "less_than": ("less than", context.get("lt")),
            "less_than_equal": ("at most", context.get("le")),
        }[kind]
        side = "too small" if kind.startswith("greater") else "too large"
        return f"{got} is {side}", f"{word} {_plain_number(bound)}", None, (), False
    if kind == "string_type":
        quoted = f'"{value}"' if isinstance(value, int | float) and not isinstance(value, bool) else None
        return what_is(value), "text", quoted, (), False
    if kind == "string_too_short":
        return "the text is empty", "text", None, (), False
    if kind == "string_pattern_mismatch":
        return f"{got} has the wrong form", f"text that matches {context.get('pattern')}", None, (), False
    if kind == "list_type":
        return what_is(value), "a list", None, (), False
    if kind == "too_short":
        return "the list is empty", "at least one entry", None, (), False
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return what_is(value), "a mapping of keys to values", None, (), False
    if kind == "union_tag_invalid":
        tags = {
            "<scalar>": "a word",
            "<mapping>": "a mapping",
            "<list>": "a list",
            "<word>": "a word",
            "<number>": "a number",
        }
        return (
            what_is(value),
            one_of(word for tag, word in tags.items() if tag in context["expected_tags"]),
            None,
            (),
            False,
        )
    return error["msg"].removeprefix("Value error, ").removeprefix("Input should be "), None, None, (), False


def _plain_number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number_meant(value: Any, *, whole: bool) -> str | None:
    """The number that a text or a fraction was probably meant to be."""
    if not isinstance(value, str):
        return None
    text = value.strip().replace("_", "").replace(",", "")
    scale = {"k": 1_000, "m": 1_000_000}.get(text[-1:].casefold(), None)
    try:
        number = float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if whole:
        return str(int(number)) if number.is_integer() else None
    return f"{number:g}"
