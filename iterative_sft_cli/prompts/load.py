"""Rows to prompts: the columns the config names, checked row by row.

The guarantee: every prompt has text, an id of its own and a row of plain JSON values, or the run ends with the place of the
first one that has not; `PromptSet.sha256` is a hash of that content and of nothing else.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.prompts.files import Located, located_rows
from iterative_sft_cli.prompts.sources import check_gym_overlap, from_dataset, from_factory, from_gym
from iterative_sft_cli.types import Message, Prompt

_THOUSANDS = re.compile(r"[+-]?\$?\d{1,3}(,\d{3})+(\.\d+)?%?")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in the data's order, the sha256 of their content, and a word for where they came from."""

    prompts: list[Prompt]
    sha256: str
    source: str


def load_prompts(section: Any, *, base_dir: Path, inherit: Any = None) -> PromptSet:
    """The prompts of the config's `prompts`, or of its `eval` with the columns it leaves out taken from `inherit`.

    Raises DataError for missing files, columns, texts and answers, equal ids and seeds that overlap with those of
    `inherit`, and ConfigError for a task, factory or argument that does not exist.
    """
    key = "prompts" if inherit is None else "eval"
    if inherit is not None:
        check_gym_overlap(inherit.reasoning_gym, section.reasoning_gym)
    rows, source = read_source(section, base_dir, key)
    prompts = _to_prompts(rows, _Columns(section, inherit, rows, key))
    digest = hashlib.sha256()
    for prompt in prompts:
        fields = [prompt.prompt_id, prompt.prompt, prompt.answer, prompt.level, dict(prompt.row)]
        digest.update(json.dumps(fields, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return PromptSet(prompts, digest.hexdigest(), source)


def content_key(prompt: Prompt) -> str:
    """A hash of what is asked: equal for prompts that differ only in white space, in Unicode composition, in the system
    message, or in being a text rather than one user message."""
    texts = (
        [prompt.prompt]
        if isinstance(prompt.prompt, str)
        else [str(message.get("content", "")) for message in prompt.prompt if message.get("role") != "system"]
    )
    parts = [" ".join(unicodedata.normalize("NFC", text).split()) for text in texts]
    return hashlib.sha256("\x1e".join(parts).encode("utf-8", "replace")).hexdigest()


def read_source(section: Any, base_dir: Path, key: str) -> tuple[list[Located], str]:
    """The located rows of a section's one source, and its name. Raises DataError, ConfigError when there is no source."""
    limit = section.limit
    if section.path is not None:
        return located_rows(section.path, base_dir=base_dir, limit=limit), str(section.path)
    if section.dataset is not None:
        return from_dataset(section.dataset, base_dir, limit, key)
    if getattr(section, "reasoning_gym", None) is not None:
        return from_gym(section.reasoning_gym, limit, key)
    if getattr(section, "use", None) is not None:
        return from_factory(section.use, section.args, base_dir, limit, key)
    raise ConfigError("no source of prompts", where=key, expected="path, dataset, reasoning_gym or use")


class _Columns:
    """Which column holds what, after inheritance; raises DataError for a column that no row has."""

    def __init__(self, section: Any, inherit: Any, rows: Sequence[Located], key: str) -> None:
        self.there = list(dict.fromkeys(column for _, row in rows for column in row))
        self.key = key
        gym = section.reasoning_gym is not None
        prompt = section.prompt or getattr(inherit, "prompt", None) or "prompt"
        answer = section.answer or getattr(inherit, "answer", None)
        if gym:  # its rows always have these two
            prompt = prompt if prompt in self.there else "question"
        self.prompt: str = self._need(prompt, "prompt", rows)
        self.answer: str | None = None
        self.pattern: re.Pattern[str] | None = None
        if answer is not None or gym:
            column = "answer" if answer is None or (gym and answer.column not in self.there) else answer.column
            self.answer = self._need(column, "answer", rows)
            if answer is not None and answer.pattern:
                self.pattern = _compile(answer.pattern, f"{key}.answer.pattern")
        self.id = self._optional(section, inherit, "id", rows)
        self.level = self._optional(section, inherit, "level", rows)

    def _optional(self, section: Any, inherit: Any, name: str, rows: Sequence[Located]) -> str | None:
        own = getattr(section, name)
        if own is not None:
            return self._need(own, name, rows)
        column: str | None = getattr(inherit, name, None)
        return column if column is not None and any(_has(row, column) for _, row in rows) else None

    def _need(self, column: str, name: str, rows: Sequence[Located]) -> str:
        if any(_has(row, column) for _, row in rows):
            return column
        close = difflib.get_close_matches(column, self.there, n=1)
        raise DataError(
            f"no column {column!r}; the columns are {', '.join(self.there)}",
            where=rows[0][0].partition(": ")[0].rpartition(":")[0] or rows[0][0],
            hint=f"did you mean {close[0]}?" if close else f"set `{self.key}.{name}` to one of them",
        )


def _compile(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}", where=where) from error


def _has(row: Any, column: str) -> bool:
    return _get(row, column, _ABSENT) is not _ABSENT


_ABSENT = object()


def _get(row: Any, column: str, default: Any) -> Any:
    """The value of a column; a dot goes into a nested object where no column has the whole name."""
    if column in row:
        return row[column]
    value = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def _to_prompts(rows: Sequence[Located], columns: _Columns) -> list[Prompt]:
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for index, (where, row) in enumerate(rows):
        text = _prompt_text(_get(row, columns.prompt, _ABSENT), columns.prompt, where)
        prompt_id = str(index)
        if columns.id is not None:
            value = _get(row, columns.id, None)
            if value is None or value == "" or isinstance(value, dict | list):
                raise DataError(
                    f"the id column {columns.id!r} holds {_show(value)}", where=where, expected="a text or number"
                )
            prompt_id = str(value)
        if prompt_id in places:
            raise DataError(
                f"the id {prompt_id!r} is also that of {places[prompt_id]}", where=where, expected="an id of its own"
            )
        places[prompt_id] = where
        answer = None
        if columns.answer is not None:
            answer = _get(row, columns.answer, _ABSENT)
            if answer is _ABSENT:
                raise DataError(
                    f"no column {columns.answer!r} in this row", where=where, expected="an answer in every row"
                )
            if columns.pattern is not None:
                answer = _extract(columns.pattern, answer, columns.answer, where)
        level = _get(row, columns.level, None) if columns.level is not None else None
        prompts.append(Prompt(prompt_id=prompt_id, prompt=text, answer=answer, level=level, row=row))
    return prompts


def _prompt_text(value: Any, column: str, where: str) -> str | list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"the prompt in {column!r} is empty", where=where)
        return value
    if isinstance(value, list) and value:
        for number, message in enumerate(value, start=1):
            ok = (
                isinstance(message, dict)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
            )
            if not ok:
                raise DataError(
                    f"message {number} in {column!r} is {_show(message)}",
                    where=where,
                    expected="a role and a content, both text",
                )
        if not any(message["content"].strip() for message in value if message["role"] != "system"):
            raise DataError(f"the prompt in {column!r} is empty", where=where)
        return value
    if value is _ABSENT:
        raise DataError(f"no column {column!r} in this row", where=where, expected="a prompt in every row")
    raise DataError(
        f"the prompt in {column!r} is {_show(value)}", where=where, expected="a text or a list of chat messages"
    )


def _extract(pattern: re.Pattern[str], value: Any, column: str, where: str) -> str:
    """The group (or the whole) of the last match, without white space around it or commas between thousands."""
    matches = list(pattern.finditer(str(value)))
    if not matches:
        raise DataError(
            f"the pattern {pattern.pattern!r} does not match the answer in {column!r}, which ends {_show(str(value)[-40:])}",
            where=where,
        )
    text = matches[-1].group(1 if pattern.groups else 0) or ""
    text = text.strip()
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
