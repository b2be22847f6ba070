"""A problem of a config as it is printed: `file:line:col: path: what, expected what. Did you mean …?`, sorted by place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from iterative_sft_cli.config.findings import Step
from iterative_sft_cli.config.secrets import redact
from iterative_sft_cli.config.yaml_loader import Mark, Place
from iterative_sft_cli.errors import ConfigError

COMMAND_LINE = "command line"


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
            "path": dotted(self.path),
            "what": redact(self.what),
            "expected": self.expected,
            "meant": self.meant,
        }


class InvalidConfig(ConfigError):
    """A config with at least one problem; `details` are the same findings as `problems`, as objects."""

    def __init__(self, problems: Iterable[Problem], *, hint: str | None = None) -> None:
        self.details = sorted(set(problems), key=_order)
        lines = [problem.render() for problem in self.details]
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
        self._places: dict[tuple[Step, ...], Place | None] = dict(places)

    def copy(self) -> Places:
        """An independent copy."""
        other = Places(self.source, {})
        other._places = dict(self._places)
        return other

    def override(self, path: tuple[Step, ...]) -> None:
        """From now on `path` and everything below it come from the command line."""
        for below in [known for known in self._places if known[: len(path)] == path]:
            del self._places[below]
        self._places[path] = None

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
        if self._from_command_line(path):
            return Problem(COMMAND_LINE, None, path, what, expected, meant)
        for length in range(len(path), -1, -1):
            if path[:length] in self._places:
                place = self._places[path[:length]]
                if place is None:
                    return Problem(COMMAND_LINE, None, path, what, expected, meant)
                by_key = key or (length < len(path) and self._holds_more(path[:length]))
                return Problem(self.source, place.key if by_key else place.value, path, what, expected, meant)
        return Problem(self.source, Mark(1, 1) if self._places else None, path, what, expected, meant)

    def _from_command_line(self, path: tuple[Step, ...]) -> bool:
        """Whether nothing but overrides gave something below `path`."""
        below = [
            place for known, place in self._places.items() if len(known) > len(path) and known[: len(path)] == path
        ]
        return path not in self._places and bool(below) and all(place is None for place in below)

    def _holds_more(self, path: tuple[Step, ...]) -> bool:
        return any(len(known) > len(path) and known[: len(path)] == path for known in self._places)
