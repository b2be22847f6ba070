"""No key of the config is ignored: each is read somewhere in the package, or refused as not available yet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import get_args

import pytest

import iterative_sft_cli
from iterative_sft_cli.config.availability import NOT_YET, default_of
from iterative_sft_cli.config.walk import attribute_of, leaves, section_at

PACKAGE = Path(iterative_sft_cli.__file__).parent

# Keys that are neither read nor refused yet. Empty this set: read the key, or put it into NOT_YET.
UNREAD: set[str] = set()


def names_read(source: str) -> Iterator[str]:
    """Attributes that a module reads, and names that it hands to a getattr with a computed name."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    getattrs = [
        call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) > 1
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
    for call in getattrs:
        if isinstance(call.args[1], ast.Constant):
            yield str(call.args[1].value)
    if any(not isinstance(call.args[1], ast.Constant) for call in getattrs):
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@lru_cache(maxsize=1)
def all_names() -> set[str]:
    """What the package reads outside of `config`, and what `config` itself hands on as settings."""
    modules = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "config"]
    names = {name for path in modules for name in names_read(path.read_text())}
    return names


def is_read(path: str) -> bool:
    """Whether every step on the way to a key is read."""
    steps = path.replace("[]", "").split(".")
    for length in range(1, len(steps) + 1):
        section = section_at(tuple(steps[: length - 1]))
        attribute = attribute_of(section, steps[length - 1]) if section is not None else None
        if attribute is None or attribute not in all_names():
            return False
    return True


def refused(path: str) -> bool:
    """Whether any use of the key is refused: the key, or every word but its default."""
    whole = [entry for entry in NOT_YET if isinstance(entry, str)]
    if any(path == entry or path.startswith((f"{entry}.", f"{entry}[")) for entry in whole):
        return True
    leaf = next(leaf for leaf in leaves() if leaf.path == path)
    words = {entry[1] for entry in NOT_YET if not isinstance(entry, str) and entry[0] == path}
    return bool(words) and {*words, default_of(leaf.section, leaf.attribute)} == set(get_args(leaf.field.annotation))


@pytest.mark.parametrize("path", [leaf.path for leaf in leaves()])
def test_a_key_is_read_or_refused(path: str) -> None:
    if path in UNREAD:
        pytest.xfail("neither read nor refused yet")
    assert is_read(path) or refused(path)


def test_the_list_of_exceptions_holds_nothing_that_is_done() -> None:
    assert {path for path in UNREAD if is_read(path) or refused(path)} == set()
    assert {leaf.path for leaf in leaves()} >= UNREAD


def test_what_is_refused_exists_and_has_a_default_to_fall_back_to() -> None:
    for entry in NOT_YET:
        steps = tuple((entry if isinstance(entry, str) else entry[0]).split("."))
        section = section_at(steps[:-1])
        assert section is not None, entry
        attribute = attribute_of(section, steps[-1])
        assert attribute is not None, entry
        if not isinstance(entry, str):
            assert default_of(section, attribute) != entry[1]


def test_the_test_can_tell_what_is_read() -> None:
    source = "def f(c, names):\n  c.a.b = 1\n  for n in ('x', 'y'):\n    getattr(c, n)\n  return getattr(c, 'z')\n"
    assert set(names_read(source)) >= {"a", "x", "y", "z"} and "b" not in set(names_read(source))
    assert not is_read("train.no_such_key") and is_read("train.batch_size")
