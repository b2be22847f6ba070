"""not_in_eval: drops samples that repeat the evaluation's prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.filters.builtin.keys import normalized
from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn, at_least
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.types import Sample, Verdict

SPEC = BuiltIn(
    role="check",
    cost="about 1 us a word; the evaluation's n-grams are held in memory",
    check=at_least("n", 3),
    paths=("path",),
)


class not_in_eval:
    """Keep a sample that shares no run of `n` words with a prompt of the evaluation.

    path: a JSONL file with the evaluation's prompts in `column`; without it those of the `eval` section. Looked at are
    the sample's prompt and its completion; case and punctuation do not count. An evaluation prompt of fewer than `n`
    words must be repeated as a whole: as the prompt, or inside the completion when it has at least 6 words. Dropped as
    `in_eval_prompt` or `in_eval_completion`.
    """

    def __init__(self, path: str | None = None, column: str = "prompt", n: int = 13) -> None:
        self._n = n
        self._grams: set[int] = set()
        self._short: dict[int, set[str]] = {}
        self._ready = False
        self._path = path
        self._column = column

    def setup(self) -> None:
        """Read the file once."""
        if self._path is not None:
            self._learn(read_column(Path(self._path), self._column))

    def __call__(self, sample: Sample, context: Context) -> Verdict:
        """Both parts of the sample are looked at."""
        if not self._ready:
            if not context.eval_texts:
                raise ConfigError(
                    "not_in_eval has nothing to compare with", hint="give it `path`, or add an `eval` section"
                )
            self._learn(context.eval_texts)
        for text in prompt_texts(sample.prompt):
            words = normalized(text).split()
            if self._meets(words) or " ".join(words) in self._short.get(len(words), ()):
                return Verdict(False, None, "in_eval_prompt")
        words = normalized(sample.completion).split()
        if self._meets(words) or self._repeats_short(words):
            return Verdict(False, None, "in_eval_completion")
        return KEPT

    def _learn(self, texts: Iterable[str]) -> None:
        for text in texts:
            words = normalized(text).split()
            if len(words) < self._n:
                self._short.setdefault(len(words), set()).add(" ".join(words))
            self._grams.update(_grams(words, self._n))
        self._ready = True

    def _meets(self, words: Sequence[str]) -> bool:
        return any(gram in self._grams for gram in _grams(words, self._n))

    def _repeats_short(self, words: Sequence[str]) -> bool:
        return any(
            " ".join(words[start : start + size]) in known
            for size, known in self._short.items()
            if size >= 6
            for start in range(len(words) - size + 1)
        )


def _grams(words: Sequence[str], n: int) -> Iterable[int]:
    return (hash(tuple(words[start : start + n])) for start in range(len(words) - n + 1))


def prompt_texts(prompt: str | Sequence[Mapping[str, Any]]) -> list[str]:
    """The user's texts of a prompt."""
    if isinstance(prompt, str):
        return [prompt]
    return [
        message["content"]
        for message in prompt
        if message.get("role") == "user" and isinstance(message.get("content"), str)
    ]


def read_column(path: Path, column: str) -> list[str]:
    """The texts of one column of a JSONL file. Raises DataError."""
    texts: list[str] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="check not_in_eval's `path`") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[column]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: no column `{column}` ({error!r})", hint="name it with `column:`"
            ) from error
        texts += prompt_texts(value) if isinstance(value, str | list) else [str(value)]
    return texts
