"""A problem of a config as it is printed: `file:line:col: path: what, expected what. Did you mean …?`, sorted by place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from iterative_sft_cli.config.findings import Step
from iterative_sft_cli.config.secrets import redact
from iterative_sft_cli.config.yaml_loader import Mark, Place
from iterative_sft_cli.errors import ConfigError

COMMAND_LINE = "command line"
MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding with its place. `source` is the file as the user named it, or "command line", where `mark` is None."""

    source: str
    mark: Mark | None
    path: tuple[Step, ...]
    what: str
    expected: str | None = None
    meant: str | None = None

    @property
    def where(self) -> str:
        """`file:line:col`, or the source alone."""
        return f"{self.source}:{self.mark.line}:{self.mark.column}" if self.mark else self.source

    def render(self) -> str:
        """The line that is printed; whatever looks like a secret is left out of it."""
        text = f"{self.where}: {dotted(self.path)}: " if self.path else f"{self.where}: "
        text += self.what
        if self.expected:
            text += f", expected {self.expected}"
        text += "" if text.endswith((".", "?")) else "."
        if self.meant:
            text += f" Did you mean {self.meant}?"
        return redact(text)

    def to_tree(self) -> dict[str, Any]:
        """The same as a JSON-able mapping, for `--json`."""
        return {
            "source": self.source,
            "line": self.mark.line if self.mark else None,
            "column": self.mark.column if self.mark else None,
            "path": redact(dotted(self.path)),
            "what": redact(self.what),
            "expected": redact(self.expected) if self.expected else None,
            "meant": redact(self.meant) if self.meant else None,
        }


class InvalidConfig(ConfigError):
    """A config with at least one problem; `details` are the same findings as `problems`, as objects."""

    def __init__(self, problems: Iterable[Problem], *, hint: str | None = None) -> None:
        self.details = sorted(set(problems), key=_order)
        lines = [problem.render() for problem in self.details[:MAX_SHOWN]]
        if len(self.details) > MAX_SHOWN:
            lines.append(f"{self.details[0].source}: and {len(self.details) - MAX_SHOWN:,} more problems.")
        super().__init__(lines[0], problems=lines, hint=hint)


def _order(problem: Problem) -> tuple[Any, ...]:
    mark = problem.mark or Mark(0, 0)
    return (problem.source == COMMAND_LINE, mark.line, mark.column, dotted(problem.path), problem.what)


def dotted(path: Sequence[Step]) -> str:
    """`("filters", 2, "args", "n")` as `filters[2].args.n`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def undotted(text: str) -> tuple[Step, ...]:
    """The inverse of `dotted`. Raises ValueError for what is not a path."""
    if not re.fullmatch(r"[^.\[\]\s]+(?:\.[^.\[\]\s]+|\[\d{1,6}\])*", text):
        raise ValueError(text)
    steps: list[Step] = []
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", text.replace("].", "]")):
        steps.append(int(index) if index else name)
    return tuple(steps)


class Places:
    """Where each part of a merged config comes from: a place in the file, or the command line."""

    def __init__(self, source: str, places: dict[tuple[Step, ...], Place]) -> None:
        self.source = source
        self._places = places
        self._overridden: set[tuple[Step, ...]] = set()

    def copy(self) -> Places:
        """An independent copy."""
        other = Places(self.source, dict(self._places))
        other._overridden = set(self._overridden)
        return other

    def override(self, path: tuple[Step, ...]) -> None:
        """From now on `path` and everything below it come from the command line."""
        self._places = {known: place for known, place in self._places.items() if known[: len(path)] != path}
        self._overridden.add(path)
        self.__dict__.pop("_containers", None)

    @cached_property
    def _containers(self) -> set[tuple[Step, ...]]:
        """Paths below which the file has something."""
        return {known[:length] for known in self._places for length in range(len(known))}

    def problem(
        self,
        path: tuple[Step, ...],
        what: str,
        expected: str | None = None,
        meant: str | None = None,
        *,
        key: bool = False,
    ) -> Problem:
        """A problem at `path`, blamed on the nearest part of it that has a place."""
        inside = path not in self._places and path not in self._containers
        if inside and any(known[: len(path)] == path for known in self._overridden):
            return Problem(COMMAND_LINE, None, path, what, expected, meant)
        for length in range(len(path), -1, -1):
            part = path[:length]
            if part in self._overridden:
                return Problem(COMMAND_LINE, None, path, what, expected, meant)
            if part in self._places:
                place = self._places[part]
                by_key = key or (length < len(path) and part in self._containers)
                return Problem(self.source, place.key if by_key else place.value, path, what, expected, meant)
        return Problem(self.source, None, path, what, expected, meant)
