"""json_schema: keeps completions that are JSON of a given form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from iterative_sft_cli.filters.builtin.keys import FENCE
from iterative_sft_cli.filters.builtin.spec import BuiltIn, decide
from iterative_sft_cli.types import Sample, Verdict

MAX_DEPTH = 64
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
_KNOWN = frozenset(
    {
        *("type", "enum", "const", "properties", "required", "additionalProperties", "items", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("anyOf", "allOf", "oneOf", "not", "uniqueItems", "title", "description", "default", "examples", "$schema"),
    }
)


def check_schema(schema: Any, path: str = "schema", depth: int = 0) -> None:
    """Raises ValueError for a keyword that would not be checked: none is silently passed over."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        raise ValueError(f"{path} is not a mapping")
    for key in schema:
        if key not in _KNOWN:
            raise ValueError(f"{path}.{key} is not supported, expected {', '.join(sorted(_KNOWN))}")
    named = schema.get("type", [])
    for one in [named] if isinstance(named, str) else named:
        if one not in _TYPES:
            raise ValueError(f"{path}.type is {one!r}, expected {', '.join(_TYPES)}")
    if "pattern" in schema:
        re.compile(schema["pattern"])
    for key, value in schema.get("properties", {}).items():
        check_schema(value, f"{path}.properties.{key}", depth + 1)
    for key in ("items", "additionalProperties", "not"):
        if key in schema:
            check_schema(schema[key], f"{path}.{key}", depth + 1)
    for key in ("anyOf", "allOf", "oneOf"):
        for index, value in enumerate(schema.get(key, ())):
            check_schema(value, f"{path}.{key}[{index}]", depth + 1)


def _check(arguments: Mapping[str, Any]) -> None:
    try:
        if arguments.get("schema") is not None:
            check_schema(arguments["schema"])
    except re.error as error:
        raise ValueError(f"a `pattern` of the schema is not a regular expression ({error})") from error


SPEC = BuiltIn(role="verifier", cost="parsing the text", check=_check)


def json_schema(
    sample: Sample,
    schema: dict[str, Any] | None = None,
    extract: Literal["whole", "fenced"] = "whole",
    drop: bool = True,
) -> Verdict:
    """Keep a completion whose final part is one JSON value, of the form `schema` when it is given.

    schema: JSON Schema with type, enum, const, properties, required, additionalProperties, items, minItems, maxItems,
    uniqueItems, minLength, maxLength, pattern, minimum, maximum, exclusive*, anyOf, allOf, oneOf, not; other keywords
    are refused, not passed over. extract: fenced = the last fenced block if there is one. NaN and repeated keys are not
    JSON here. Dropped as `not_json` or `schema_mismatch`; extra `problem` tells where.
    """
    text = sample.final
    if extract == "fenced" and (blocks := FENCE.findall(text)):
        text = blocks[-1]
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError):
        return decide(False, "not_json", drop=drop)
    problem = None if schema is None else find_problem(value, schema)
    return decide(
        problem is None, "schema_mismatch", drop=drop, extra=None if problem is None else {"problem": problem}
    )


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return math.isfinite(value) and value.is_integer()
    return isinstance(value, _TYPES[kind])


def find_problem(value: Any, schema: Any, path: str = "$", depth: int = 0) -> str | None:
    """The first place where the value does not fit, as one sentence; None when it fits."""
    if isinstance(schema, bool):
        return None if schema else f"{path} is not allowed"
    if depth > MAX_DEPTH:
        return f"{path} is nested too deeply"
    named = schema.get("type")
    if named is not None and not any(_is(value, one) for one in ([named] if isinstance(named, str) else named)):
        return f"{path} is not of type {named if isinstance(named, str) else ' or '.join(named)}"
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return f"{path} is none of the allowed values"
    if "const" in schema and not _same(value, schema["const"]):
        return f"{path} is not the constant"
    if isinstance(value, dict):
        problem = _object_problem(value, schema, path, depth)
    elif isinstance(value, list):
        problem = _array_problem(value, schema, path, depth)
    elif isinstance(value, str):
        problem = _text_problem(value, schema, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        problem = _number_problem(value, schema, path)
    else:
        problem = None
    return problem or _combined_problem(value, schema, path, depth)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _object_problem(value: dict[str, Any], schema: Mapping[str, Any], path: str, depth: int) -> str | None:
    for key in schema.get("required", ()):
        if key not in value:
            return f"{path}.{key} is missing"
    properties = schema.get("properties", {})
    for key, one in value.items():
        inner = properties[key] if key in properties else schema.get("additionalProperties", True)
        if problem := find_problem(one, inner, f"{path}.{key}"[:200], depth + 1):
            return problem
    return None


def _array_problem(value: list[Any], schema: Mapping[str, Any], path: str, depth: int) -> str | None:
    if len(value) < schema.get("minItems", 0) or len(value) > schema.get("maxItems", math.inf):
        return f"{path} has {len(value)} items"
    if schema.get("uniqueItems"):
        seen = {json.dumps(one, sort_keys=True) for one in value}
        if len(seen) < len(value):
            return f"{path} repeats an item"
    for index, one in enumerate(value):
        if problem := find_problem(one, schema.get("items", True), f"{path}[{index}]", depth + 1):
            return problem
    return None


def _text_problem(value: str, schema: Mapping[str, Any], path: str) -> str | None:
    if len(value) < schema.get("minLength", 0) or len(value) > schema.get("maxLength", math.inf):
        return f"{path} has {len(value)} characters"
    if "pattern" in schema:
        from iterative_sft_cli.filters.builtin.regex import search

        if not search(schema["pattern"], value):
            return f"{path} does not match the pattern"
    return None


def _number_problem(value: float, schema: Mapping[str, Any], path: str) -> str | None:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    in_range = low <= value <= high and (value > above or above == -math.inf) and (value < below or below == math.inf)
    return None if in_range else f"{path} is out of range"


def _combined_problem(value: Any, schema: Mapping[str, Any], path: str, depth: int) -> str | None:
    for one in schema.get("allOf", ()):
        if problem := find_problem(value, one, path, depth + 1):
            return problem
    fits = {
        key: sum(find_problem(value, one, path, depth + 1) is None for one in schema[key])
        for key in ("anyOf", "oneOf")
        if key in schema
    }
    if fits.get("anyOf", 1) < 1 or fits.get("oneOf", 1) != 1:
        return f"{path} fits none of the alternatives, or more than one"
    if "not" in schema and find_problem(value, schema["not"], path, depth + 1) is None:
        return f"{path} is what it must not be"
    return None
