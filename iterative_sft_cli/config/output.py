"""Configs and their schema written out: `resolved.yaml`, and the JSON schema that editors complete and check with."""

from __future__ import annotations

from typing import Any

import yaml

from iterative_sft_cli.config.schema import Config
from iterative_sft_cli.config.yaml_loader import has_unsafe_characters, read_scalar


class _Dumper(yaml.SafeDumper):
    """Writes what `read_yaml` reads back: texts that YAML 1.2 or 1.1 would take for something else are quoted; no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    try:
        style = None if isinstance(read_scalar(value), str) else "'"
    except ValueError:
        style = "'"
    if has_unsafe_characters(value):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def resolved_yaml(config: Config) -> str:
    """The whole config with its defaults as YAML, which loads to the same config."""
    return yaml.dump(config.to_tree(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file (draft 7), with every key's documentation, its short forms, and schedules."""
    schema = Config.model_json_schema(mode="validation", by_alias=True)
    definitions: dict[str, Any] = schema.pop("$defs")
    definitions["Schedule"] = _SCHEDULE
    for name, key in _SHORT_FORMS.items():
        section = definitions[name]
        text = {"type": "string", "description": f"Short for `{key}`."}
        definitions[name] = {"description": section.get("description", ""), "anyOf": [section, text]}
    definitions["FilterEntry"] = {
        "description": definitions["FilterEntry"]["description"],
        "anyOf": [*_FILTERS, definitions["FilterEntry"]],
    }
    for section, key in (("ModelConfig", "adapter"), (None, "rationalize"), (None, "warmup"), (None, "eval")):
        holder = definitions[section]["anyOf"][0] if section else schema
        holder["properties"][key]["anyOf"].append({"const": "none"})
    result = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "isft config", **schema}
    result["definitions"] = definitions
    tidy: dict[str, Any] = _tidy(result)
    return tidy


_SHORT_FORMS = {
    "AdapterConfig": "type",
    "ModelConfig": "path",
    "ColumnSpec": "column",
    "DatasetSource": "id",
    "ReasoningGymSource": "task",
    "ParallelConfig": "type",
    "WarmupConfig": "path",
}
_FILTERS: list[dict[str, Any]] = [
    {"type": "string", "description": "A filter without arguments."},
    {
        "type": "object",
        "description": "{name: arguments}, or {name: first argument}.",
        "minProperties": 1,
        "maxProperties": 1,
        "not": {"required": ["use"]},
    },
]
_NUMBER = {"type": "number"}
_SPAN = {"type": "integer", "minimum": 1, "description": "Rounds it was written for; after them the last value holds."}
_SCHEDULE: dict[str, Any] = {
    "description": "A value that changes over the rounds.",
    "anyOf": [
        {
            "type": "object",
            "description": "One value for each round.",
            "properties": {"by_round": {"type": "array", "minItems": 1}},
            "required": ["by_round"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "description": "From the first value in round 1 to the second in the last round.",
            "properties": {"linear": {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}, "span": _SPAN},
            "required": ["linear"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "description": "start * factor ** (round - 1), or start + add * (round - 1), within max and min.",
            "properties": {
                **dict.fromkeys(("start", "factor", "add", "max", "min"), _NUMBER),
                "span": _SPAN,
            },
            "required": ["start"],
            "oneOf": [{"required": ["factor"]}, {"required": ["add"]}],
            "additionalProperties": False,
        },
    ],
}


def _tidy(value: Any) -> Any:
    """Draft 7's words for what pydantic writes in 2020-12's, without the titles it makes up."""
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if not isinstance(value, dict):
        return value.replace("#/$defs/", "#/definitions/") if isinstance(value, str) else value
    if "x-ref" in value:
        return {"$ref": f"#/definitions/{value['x-ref']}"}
    tidy = {
        key: _tidy(item)
        for key, item in value.items()
        if not (key == "title" and isinstance(item, str) and item != "isft config")
    }
    if "$ref" in tidy and len(tidy) > 1:
        # beside $ref, draft 7 ignores every other word
        tidy["allOf"] = [{"$ref": tidy.pop("$ref")}]
    if isinstance(tidy.get("anyOf"), list) and {"type": "null"} in tidy["anyOf"]:
        tidy["anyOf"] = [*(one for one in tidy["anyOf"] if one != {"type": "null"}), {"type": "null"}]
    return tidy
