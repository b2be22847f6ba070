"""The documentation inside the package: pages by topic; what can be generated from the code is generated when it is read.

The config reference comes from the schema, the command reference from `--help`, what is not available yet from the list that
refuses it, so none of them can be out of date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from iterative_sft_cli.config import class_of, json_schema
from iterative_sft_cli.config.availability import NOT_YET
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.recipes.catalog import names as recipe_names
from iterative_sft_cli.recipes.catalog import title_of as about

FOLDER = Path(__file__).parent.parent / "docs"
TOPICS = (
    "quickstart",
    "concepts",
    "config",
    "cli",
    "filters",
    "engines",
    "recipes",
    "resuming",
    "gpus",
    "several-gpus",
    "on-disk",
    "statistics",
    "migrating",
    "python",
    "faq",
    "limits",
)
GENERATED = {
    "config": "Config reference: every key, its default, and what it does",
    "cli": "Commands: what each prints with --help",
}
NOTES = {"frozen": "", "tunable": "may change on resume", "cosmetic": "may change on resume"}


def title_of(topic: str) -> str:
    """The first line of a page."""
    if topic in GENERATED:
        return GENERATED[topic]
    return (FOLDER / f"{topic}.md").read_text("utf-8").splitlines()[0].removeprefix("# ")


def page(topic: str, commands: Mapping[str, str] | None = None) -> str:
    """A page as Markdown; `commands` (name to help text) is what the command reference is made of. Raises ConfigError for an unknown topic."""
    if topic not in TOPICS:
        import difflib

        near = difflib.get_close_matches(topic, TOPICS, n=1)
        raise ConfigError(
            f"docs {topic}: no such topic",
            expected=f"one of {', '.join(TOPICS)}",
            hint=f"did you mean {near[0]}?" if near else None,
        )
    if topic == "config":
        return "\n".join(config_reference()) + "\n"
    if topic == "cli":
        return "\n".join(command_reference(commands or {})) + "\n"
    return fill((FOLDER / f"{topic}.md").read_text("utf-8"))


def fill(text: str) -> str:
    """The page with its marks replaced: `[[not-yet KEY]]`, `[[recipes]]`, and `[[available KEY]]` to `[[end]]`, which is left out
    as long as the key is refused."""
    text = re.sub(
        r"\[\[available ([\w.]+)\]\]\n(.*?)\[\[end\]\]\n",
        lambda found: "" if not_yet(found.group(1)) else found.group(2),
        text,
        flags=re.DOTALL,
    )
    if "[[filters]]" in text:
        from iterative_sft_cli.filters.catalog import builtin_reference

        text = text.replace("[[filters]]\n", "\n".join(builtin_reference()))
    text = re.sub(r"\[\[recipes\]\]\n", lambda _: "".join(f"- `{n}`: {about(n)}\n" for n in recipe_names()), text)
    return re.sub(r"\[\[not-yet(?: ([\w.]+))?\]\]\n*", lambda found: not_yet(found.group(1)), text)


def not_yet(path: str | None) -> str:
    """A list of what is not available, or a line about one key; nothing when the key is."""
    if path is None:
        words: dict[str, list[str]] = {}
        for entry, what in NOT_YET.items():
            name = (
                entry
                if isinstance(entry, str)
                else f"{entry[0]}: {entry[1]}"
                if isinstance(entry[1], str)
                else entry[0]
            )
            words.setdefault(what, []).append(f"`{name}`")
        if not words:
            return "- nothing: every key of the schema is honoured.\n"
        return "".join(f"- {what} ({', '.join(names)})\n" for what, names in words.items())
    found = [what for entry, what in NOT_YET.items() if path == (entry if isinstance(entry, str) else entry[0])]
    return (
        f"Not available in this version: {found[0]} (`{path}`). A config that asks for it is refused.\n\n"
        if found
        else ""
    )


def config_reference() -> Iterator[str]:
    """Every key of the config with its type, default and documentation, section by section."""
    schema = json_schema()
    yield f"# {GENERATED['config']}"
    yield ""
    yield "Keys marked *may change on resume* can differ when a run goes on; all others are frozen by its first start."
    yield "A value marked *schedule* may be `{by_round: [...]}`, `{linear: [a, b]}` or `{start, add | factor, max, min}`."
    top = schema["properties"]
    plain = {key: node for key, node in top.items() if section_of(node, schema) is None}
    yield from _section("top level", "", {"properties": plain, "required": schema.get("required", [])}, schema, level=2)
    for key, node in top.items():
        name = section_of(node, schema)
        if name is not None:
            yield from _described(key, name, node, schema, level=2, seen=frozenset())


def section_of(node: Any, schema: Mapping[str, Any]) -> str | None:
    """The definition that a property's mapping form has, None for a scalar."""
    for reference in _references(node):
        name = reference.rpartition("/")[2]
        if name != "Schedule" and _mapping(schema["definitions"][name]) is not None:
            return name
    return None


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for key, value in node.items():
            if key in ("anyOf", "allOf", "oneOf", "items"):
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _mapping(definition: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The form of a definition that has keys."""
    if "properties" in definition and "use" not in definition.get("not", {}).get("required", []):
        return definition
    for one in definition.get("anyOf", []):
        if "properties" in one:
            return dict(one)
    return None


def _described(
    path: str, name: str, node: Any, schema: Mapping[str, Any], *, level: int, seen: frozenset[str]
) -> Iterator[str]:
    definition = schema["definitions"][name]
    form = _mapping(definition) or {}
    text = node.get("description") or definition.get("description") or ""
    yield from _section(path, text, form, schema, level=level)
    for key, child in form.get("properties", {}).items():
        inner = section_of(child, schema)
        if inner is not None and inner not in seen | {name}:
            yield from _described(f"{path}.{key}", inner, child, schema, level=min(level + 1, 4), seen=seen | {name})


def _section(path: str, text: str, form: Mapping[str, Any], schema: Mapping[str, Any], *, level: int) -> Iterator[str]:
    yield ""
    yield f"{'#' * level} {path}"
    if text:
        yield ""
        yield text
    yield ""
    needed = form.get("required", [])
    for key, node in form.get("properties", {}).items():
        whole = key if path == "top level" else f"{path}.{key}"
        default = "required" if key in needed else f"default {_default(node)}"
        notes = [_type(node, schema), default]
        general = "filters[]." + key if path == "filters" else whole
        notes += [note for note in (NOTES[class_of(general)],) if note]
        waiting = [what for entry, what in NOT_YET.items() if entry == whole]
        notes += [f"not available yet: {waiting[0]}"] if waiting else []
        yield f"- `{key}` ({'; '.join(notes)}): {node.get('description', '')}"


def _default(node: Mapping[str, Any]) -> str:
    import json

    return f"`{json.dumps(node['default'])}`" if "default" in node else "none"


def _type(node: Any, schema: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        if name == "Schedule":
            return "schedule"
        definition = schema["definitions"][name]
        return "mapping" if _mapping(definition) is not None else _type(definition, schema)
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{one}`" for one in node["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in node:
            return " or ".join(dict.fromkeys(_type(one, schema) for one in node[key]))
    kind = node.get("type")
    if kind == "array":
        return f"list of {_type(node['items'], schema)}" if isinstance(node.get("items"), dict) else "list"
    words = {"string": "text", "object": "mapping", "boolean": "true or false", "null": "null", None: "any value"}
    limits = [f"{word} {node[key]:g}" for key, word in _LIMITS.items() if key in node]
    name = words.get(kind, str(kind))
    return f"{name} {' and '.join(limits)}" if limits else name


_LIMITS = {"minimum": "at least", "exclusiveMinimum": "over", "maximum": "at most", "exclusiveMaximum": "under"}


def command_reference(commands: Mapping[str, str]) -> Iterator[str]:
    """Every command with its help."""
    yield f"# {GENERATED['cli']}"
    yield ""
    yield "stdout is data, stderr everything else; `--json` prints one JSON document. NO_COLOR is honoured."
    for name, text in commands.items():
        yield ""
        yield f"## isft {name}"
        yield ""
        yield "```"
        yield text.strip()
        yield "```"
