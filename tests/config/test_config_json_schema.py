from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import SHORT, load
from test_config_schema import FULL

from iterative_sft_cli.config import json_schema
from iterative_sft_cli.config.walk import leaves
from iterative_sft_cli.config.yaml_loader import read_yaml

SCHEMA = json_schema()
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
WORDS = {
    "$ref", "$schema", "additionalProperties", "allOf", "anyOf", "const", "default", "definitions", "description", "enum",
    "exclusiveMaximum", "exclusiveMinimum", "items", "maxItems", "maxProperties", "maximum", "minItems", "minLength",
    "minProperties", "minimum", "not", "oneOf", "pattern", "properties", "required", "title", "type",
}  # fmt: skip


def valid(value: Any, schema: Any) -> bool:
    """A validator of the words of draft 7 that the schema uses."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and not valid(value, SCHEMA["definitions"][schema["$ref"].removeprefix("#/definitions/")]):
        return False
    kind = schema.get("type")
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        return False
    tests = [
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"],
        all(valid(value, one) for one in schema.get("allOf", [])),
        "anyOf" not in schema or any(valid(value, one) for one in schema["anyOf"]),
        "oneOf" not in schema or sum(valid(value, one) for one in schema["oneOf"]) == 1,
        "not" not in schema or not valid(value, schema["not"]),
    ]
    if isinstance(value, int | float) and not isinstance(value, bool):
        tests += [
            value >= schema.get("minimum", value),
            value <= schema.get("maximum", value),
            "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"],
            "exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"],
        ]
    if isinstance(value, str):
        tests += [len(value) >= schema.get("minLength", 0), re.search(schema.get("pattern", ""), value) is not None]
    if isinstance(value, list):
        tests += [
            schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)),
            all(valid(item, schema.get("items", True)) for item in value),
        ]
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema.get("additionalProperties", True)
        tests += [
            set(schema.get("required", [])) <= set(value),
            schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)),
            all(valid(item, known.get(key, other)) for key, item in value.items()),
        ]
    return all(tests)


def parts(value: Any) -> Any:
    if isinstance(value, dict):
        yield value
        for key, item in value.items():
            if key in ("properties", "definitions"):
                for one in item.values():
                    yield from parts(one)
            elif key not in ("default", "const", "enum"):
                yield from parts(item)
    elif isinstance(value, list):
        for item in value:
            yield from parts(item)


def test_only_words_of_draft_7_are_used_and_references_lead_somewhere() -> None:
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    for part in parts(SCHEMA):
        assert set(part) <= WORDS, part
        if "$ref" in part:
            assert part["$ref"].removeprefix("#/definitions/") in SCHEMA["definitions"] and len(part) == 1


def test_every_key_is_there_with_its_documentation() -> None:
    text = json.dumps(SCHEMA, ensure_ascii=False)
    for leaf in leaves():
        assert json.dumps(leaf.field.description, ensure_ascii=False)[1:-1] in text, leaf.path


def good() -> dict[str, Any]:
    data: dict[str, Any] = read_yaml(SHORT.encode()).data
    return data


def test_good_configs_are_valid(tmp_path: Path) -> None:
    assert valid(good(), SCHEMA)
    assert valid(read_yaml(FULL.encode()).data, SCHEMA)
    for text in (SHORT, FULL):
        assert valid(load(tmp_path, text=text).merged, SCHEMA)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model", {"path": "x", "adapter": "lora"}, True),
        ("model", {"path": "x", "adapter": "none"}, True),
        ("model", {"pth": "x"}, False),
        ("model", 3, False),
        ("rounds", 0, False),
        ("rounds", "3", False),
        ("eval", "none", True),
        ("eval", None, True),
        ("eval", "dev.jsonl", False),
        ("warmup", "seed.jsonl", True),
        ("generate", {"temperature": {"linear": [1, 0.5]}}, True),
        ("generate", {"temperature": {"linear": [1]}}, False),
        ("generate", {"temperature": {"start": 1, "factor": 2, "max": 3}}, True),
        ("generate", {"temperature": {"start": 1}}, False),
        ("generate", {"temperature": -1}, False),
        ("generate", {"stop": "a"}, True),
        ("generate", {"stop": ["a", 3]}, False),
        ("generate", {"memory_gb": "auto"}, True),
        ("generate", {"memory_gb": "big"}, False),
        ("generate", {"from": "base"}, True),
        ("generate", {"from_": "base"}, False),
        ("filters", ["a", {"b": 3}, {"c": {"x": 1}}, {"use": "d", "timeout_s": 3}], True),
        ("filters", [{"use": "d", "timeout": 3}], False),
        ("filters", [{"a": 1, "b": 2}], False),
        ("filters", "a", False),
        ("train", {"start_from": "base", "data": {"window": 2}}, True),
        ("train", {"start_from": "base", "data": {"window": 0}}, False),
        ("train", {"start_from": "base", "data": "append"}, False),
        ("train", {"data": "replace"}, False),
        ("tracking", "wandb", True),
        ("surprise", 1, False),
    ],
)
def test_the_schema_draws_the_line_where_the_reader_does(key: str, value: Any, expected: bool) -> None:
    assert valid({**good(), key: value}, SCHEMA) is expected


def test_the_validator_of_this_file_can_say_no() -> None:
    assert not valid(yaml.safe_load("model: x"), SCHEMA)
    assert not valid([], SCHEMA)
