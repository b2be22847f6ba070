"""json_schema: what is no JSON, what does not fit the schema, and schemas that it would not check."""

from __future__ import annotations

from typing import Any

import pytest
from filter_samples import Judge, new_sample, reasons

from iterative_sft_cli.errors import ConfigError


def test_json_schema(judge: Judge) -> None:
    assert reasons(judge, ['{"a": 1}', "{a: 1}", "NaN", '{"a": 1, "a": 2}', "[" * 100_000], "json_schema") == [
        None,
        *["not_json"] * 4,
    ]
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0}, "t": {"enum": ["a", "b"]}, "x": {"pattern": "^v"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    texts = [
        '{"n": 1}',
        '{"n": -1}',
        '{"n": 1.5}',
        '{"n": true}',
        "{}",
        '{"n": 1, "z": 1}',
        '{"n": 1, "t": "c"}',
        '{"n": 1, "x": "w"}',
    ]
    entry = {"json_schema": {"schema": schema}}
    assert reasons(judge, texts, entry) == [None, *["schema_mismatch"] * 7]
    problems = [
        one.says[0].extra["problem"] for one in judge([new_sample(t, i=i) for i, t in enumerate(texts[1:])], entry)
    ]
    assert problems == [
        "$.n is out of range",
        "$.n is not of type integer",
        "$.n is not of type integer",
        "$.n is missing",
        "$.z is not allowed",
        "$.t is none of the allowed values",
        "$.x does not match the pattern",
    ]
    fenced = {
        "json_schema": {
            "schema": {"type": "array", "items": {"type": "number"}, "uniqueItems": True, "maxItems": 2},
            "extract": "fenced",
        }
    }
    assert reasons(judge, ["so\n```json\n[1, 2]\n```", "```\n[1, 1]\n```", "[1,2,3]"], fenced) == [
        None,
        *["schema_mismatch"] * 2,
    ]
    either = {
        "json_schema": {
            "schema": {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "null"}], "not": {"const": "no"}}
        }
    }
    assert reasons(judge, ['"ab"', "null", '"abc"', '"no"', "1"], either) == [None, None, *["schema_mismatch"] * 3]


@pytest.mark.parametrize(
    "schema",
    [{"format": "date"}, {"type": "float"}, {"properties": {"a": {"$ref": "#"}}}, {"pattern": "(("}, {"items": 3}],
)
def test_json_schema_refuses_what_it_would_not_check(judge: Judge, schema: Any) -> None:
    with pytest.raises(ConfigError):
        judge([], {"json_schema": {"schema": schema}})
