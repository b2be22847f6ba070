"""YAML as people expect it: YAML 1.2's scalars, a position for every key and value, and nothing that can run code or explode.

Every problem of a file is collected, not only the first; what cannot be read at all ends with one problem that says where.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from iterative_sft_cli.config.findings import Step, show

MAX_BYTES = 1_000_000
MAX_ALIASES = 50
MAX_DEPTH = 64
MAX_NODES = 100_000
MAX_FAULTS = 500

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"[-+]?[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_UNSAFE = "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
# What the parser says, whether its cause is where the surrounding thing began, what that means, and what to write instead.
_ADVICE = (
    (
        "mapping values are not allowed",
        False,
        "a colon that does not fit here",
        "even indentation, and text with ': ' in quotes",
    ),
    ("could not find expected ':'", False, "a key without a colon", "key: value"),
    (
        "did not find expected key",
        False,
        "a line that fits neither the mapping nor the list around it",
        "even indentation",
    ),
    (
        "did not find expected '-'",
        False,
        "a line that is no entry of the list around it",
        "'- ' before it, or even indentation",
    ),
    (
        "did not find expected ',' or ']'",
        True,
        "a [list] that is not closed",
        "commas between its entries and ] at its end",
    ),
    (
        "did not find expected ',' or '}'",
        True,
        "a {mapping} that is not closed",
        "commas between its entries and } at its end",
    ),
    ("unexpected end of stream", True, "a quoted text that is not closed", "a closing quote"),
    (
        "unknown escape character",
        False,
        "an unknown escape in a double-quoted text",
        "\\\\ for a backslash, or single quotes",
    ),
    ("Unicode character escape", False, "an escape that stands for no character", "another one"),
)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file, both numbers counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands, and its key (the entry itself in a list)."""

    key: Mark
    value: Mark


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that the reader refuses, at a place and, where known, a path."""

    mark: Mark
    path: tuple[Step, ...]
    what: str
    expected: str | None = None


@dataclass(slots=True)
class Document:
    """A file as plain data (str, int, float, bool, None, list, dict with text keys), with the place of each part, and its faults."""

    data: Any = None
    places: dict[tuple[Step, ...], Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def add(self, fault: Fault) -> None:
        """Note a fault; reading stops when there are too many."""
        self.faults.append(fault)
        if len(self.faults) >= MAX_FAULTS:
            raise _Stop


@dataclass(slots=True)
class _Node:
    mark: Mark
    value: Any
    """A scalar, a list of nodes, or a list of (key node, value node)."""
    kind: str


class _Stop(Exception):
    """Reading cannot go on; the fault is already noted."""


def read_yaml(source: bytes) -> Document:
    """Read one YAML document. Never raises for what the bytes hold: look at `faults`."""
    document = Document()
    try:
        text = _decode(source, document)
        node = _Composer(text, document).compose()
        if node is None:
            if not document.faults:
                document.add(Fault(Mark(1, 1), (), "the file is empty", "a mapping of keys to values"))
        else:
            document.data = _Builder(document).build(node, ())
    except _Stop:
        pass
    return document


def read_scalar(text: str) -> Any:
    """A plain scalar by the rules of YAML 1.2's core schema: `2e-5` is a number, `yes` and `1:30` are text, `010` is ten.

    Raises ValueError for an integer beyond 64 bits.
    """
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INTEGER.fullmatch(text) or _OTHER_BASE.fullmatch(text):
        if len(text) > 25:
            raise ValueError("integer too large")
        number = int(text, 10 if _INTEGER.fullmatch(text) else 0)
        if abs(number) >= 2**63:
            raise ValueError("integer too large")
        return number
    return float(text) if _FLOAT.fullmatch(text) else text


def has_unsafe_characters(text: str) -> bool:
    """Whether `text` holds control or invisible characters that must be escaped."""
    return re.search(_UNSAFE, text) is not None


def _decode(source: bytes, document: Document) -> str:
    def stop(offset: int, what: str, expected: str) -> _Stop:
        before = source[:offset].decode("utf-8", "replace")
        document.add(Fault(_mark_at(before), (), what, expected))
        return _Stop()

    if len(source) > MAX_BYTES:
        raise stop(0, f"the file has {len(source):,} bytes", f"at most {MAX_BYTES:,}")
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise stop(
            error.start, f"the byte 0x{source[error.start]:02x} is not UTF-8 text", "a file saved as UTF-8"
        ) from None
    unsafe = re.search(_UNSAFE, text)
    if unsafe:
        number = ord(unsafe[0])
        escape = f'"\\u{number:04x}", in double quotes, if it is wanted' if number else "text without it"
        mark = _mark_at(text[: unsafe.start()])
        document.add(Fault(mark, (), f"the invisible character U+{number:04X}", escape))
        raise _Stop
    return text


def _mark_at(before: str) -> Mark:
    lines = re.split("\r\n|\r|\n", before)
    return Mark(len(lines), len(lines[-1]) + 1)


class _Composer:
    """Turns the parser's events into nodes, with limits on depth and aliases."""

    def __init__(self, text: str, document: Document) -> None:
        self.document = document
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=_LOADER))
        self.anchors: dict[str, _Node | None] = {}
        self.aliases = 0
        self.lines = re.split("\r\n|\r|\n", text)

    def stop(self, mark: Mark, what: str, expected: str | None = None) -> _Stop:
        self.document.add(Fault(mark, (), what, expected))
        return _Stop()

    def next(self) -> Any:
        try:
            return next(self.events)
        except yaml.MarkedYAMLError as error:
            raise self.syntax(error) from None
        except yaml.YAMLError:
            raise self.stop(Mark(1, 1), "not valid YAML") from None

    def syntax(self, error: yaml.MarkedYAMLError) -> _Stop:
        """What the parser stumbled over, in words for people."""
        there = error.problem_mark or error.context_mark
        problem = str(error.problem or error.context or "no reason given")
        if there is None:
            return self.stop(Mark(1, 1), f"not valid YAML ({problem})")
        if "cannot start any token" in problem:
            character = (self.lines[there.line : there.line + 1] or [""])[0][there.column : there.column + 1]
            if character == "\t":
                return self.stop(_mark(there), "a tab", "spaces for indentation")
            return self.stop(_mark(there), f"a text that starts with {character}", "it in quotes")
        for piece, at_start, what, expected in _ADVICE:
            if piece in problem:
                place = error.context_mark if at_start and error.context_mark is not None else there
                return self.stop(_mark(place), what, expected)
        return self.stop(_mark(there), f"not valid YAML ({problem})")

    def compose(self) -> _Node | None:
        self.next()
        event = self.next()
        if isinstance(event, yaml.StreamEndEvent):
            return None
        if event.tags:
            raise self.stop(_mark(event.start_mark), "a %TAG directive", "a config without tags")
        node = self.node(self.next(), 0)
        self.next()
        event = self.next()
        if not isinstance(event, yaml.StreamEndEvent):
            raise self.stop(_mark(event.start_mark), "a second document", "one document in a file")
        return None if node.kind == "scalar" and node.value is None else node

    def node(self, event: Any, depth: int) -> _Node:
        mark = _mark(event.start_mark)
        if depth > MAX_DEPTH:
            raise self.stop(mark, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(str(event.anchor), mark)
        if event.tag is not None:
            tag = show(event.tag.replace("tag:yaml.org,2002:", "!!")).strip('"')
            self.document.add(Fault(mark, (), f"the tag {tag}", "a plain value: tags are never read"))
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        node = self.content(event, mark, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def alias(self, name: str, mark: Mark) -> _Node:
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise self.stop(mark, f"more than {MAX_ALIASES} aliases")
        if name not in self.anchors:
            raise self.stop(mark, f"the alias *{name} has no anchor &{name} before it")
        node = self.anchors[name]
        if node is None:
            raise self.stop(mark, f"the alias *{name} stands inside its own anchor")
        return _Node(mark, node.value, node.kind)

    def content(self, event: Any, mark: Mark, depth: int) -> _Node:
        if isinstance(event, yaml.ScalarEvent):
            return _Node(mark, self.scalar(event, mark), "scalar")
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := self.next(), yaml.SequenceEndEvent):
                items.append(self.node(event, depth + 1))
            return _Node(mark, items, "list")
        entries = []
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            entries.append((key, self.node(self.next(), depth + 1)))
        return _Node(mark, entries, "mapping")

    def scalar(self, event: Any, mark: Mark) -> Any:
        if event.style is None or event.style == "":
            try:
                return read_scalar(event.value)
            except ValueError:
                self.document.add(Fault(mark, (), "an integer beyond 64 bits", "a smaller number, or text in quotes"))
                return event.value
        if re.search("[\x00\ud800-\udfff]", event.value):
            self.document.add(Fault(mark, (), "a text with a NUL or half a surrogate pair", "text without it"))
        return event.value


class _Builder:
    """Turns nodes into plain data and remembers where everything stands."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0

    def fault(self, mark: Mark, path: tuple[Step, ...], what: str, expected: str | None = None) -> None:
        self.document.add(Fault(mark, path, what, expected))

    def build(self, node: _Node, path: tuple[Step, ...], key: Mark | None = None) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self.fault(node.mark, (), f"more than {MAX_NODES:,} values once the aliases are written out")
            raise _Stop
        self.document.places[path] = Place(key or node.mark, node.mark)
        if node.kind == "list":
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if node.kind == "scalar":
            if isinstance(node.value, float) and not math.isfinite(node.value):
                self.fault(node.mark, path, f"{show(node.value)} is not a finite number", "a finite number")
            return node.value
        return self.mapping(node, path)

    def mapping(self, node: _Node, path: tuple[Step, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: list[_Node] = []
        for key, value in node.value:
            if key.kind != "scalar":
                self.fault(key.mark, path, f"a {key.kind} as a key", "text")
            elif not isinstance(key.value, str):
                self.fault(key.mark, path, f"the key {show(key.value)} is not text", f'"{show(key.value)}" in quotes')
            elif key.value == "<<":
                merged += value.value if value.kind == "list" else [value]
            elif key.value in result:
                below = (*path, key.value)
                self.fault(
                    key.mark, below, "the key stands twice", f"it once: it is already on line {lines[key.value]}"
                )
            else:
                lines[key.value] = key.mark.line
                result[key.value] = self.build(value, (*path, key.value), key.mark)
        for source in merged:
            if source.kind != "mapping":
                self.fault(source.mark, path, "<< takes in something that is not a mapping", "the alias of a mapping")
                continue
            inherited = _Builder(self.document)
            inherited.nodes = self.nodes
            wanted = [(k, v) for k, v in source.value if not (k.kind == "scalar" and k.value in result)]
            result |= inherited.mapping(_Node(source.mark, wanted, "mapping"), path)
            self.nodes = inherited.nodes
        return result


def _mark(mark: Any) -> Mark:
    return Mark(mark.line + 1, mark.column + 1)
