"""Refuses configs that hold what looks like a secret, before anything is written, and never repeats it.

Token-shaped text is found anywhere in the file, comments included, because the run directory keeps the file's bytes; a bare
hexadecimal key is only told from a commit hash by the name it stands under.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from iterative_sft_cli.config.findings import Step

_BEFORE = r"(?<![A-Za-z0-9_\-])"
_AFTER = r"(?![A-Za-z0-9_])"
_SHAPES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("a Hugging Face token", rf"{_BEFORE}(?:hf|api_org)_[A-Za-z0-9]{{30,}}{_AFTER}"),
        (
            "an API key",
            rf"{_BEFORE}sk-(?:[A-Za-z0-9]{{1,16}}-){{0,4}}(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_]{{20,}}[A-Za-z0-9_-]*",
        ),
        ("an AWS access key", rf"{_BEFORE}(?:AKIA|ASIA)[0-9A-Z]{{16}}{_AFTER}"),
        ("a GitHub token", rf"{_BEFORE}(?:gh[pousr]_[A-Za-z0-9]{{36,}}|github_pat_[A-Za-z0-9_]{{30,}})"),
        ("a GitLab token", rf"{_BEFORE}glpat-[A-Za-z0-9_-]{{20,}}"),
        ("a Slack token", rf"{_BEFORE}xox[abeoprs]-(?=[A-Za-z-]*[0-9])[A-Za-z0-9-]{{10,}}"),
        ("a Google API key", rf"{_BEFORE}AIza[A-Za-z0-9_-]{{35}}{_AFTER}"),
        ("an NVIDIA API key", rf"{_BEFORE}nvapi-[A-Za-z0-9_-]{{40,}}"),
        ("a Groq API key", rf"{_BEFORE}gsk_[A-Za-z0-9]{{40,}}"),
        ("a signed token (JWT)", rf"{_BEFORE}eyJ[A-Za-z0-9_-]{{10,}}\.eyJ[A-Za-z0-9_-]{{10,}}\.[A-Za-z0-9_-]{{10,}}"),
        ("a private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"),
        (
            "an address with a password in it",
            r"\b[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s/@:\"']{0,100}:[^\s/@\"'{}$]{1,200}@[^\s/@\"']",
        ),
        ("an address with a token in it", r"\bhttps?://[A-Za-z0-9_-]{20,}@[^\s/@\"']"),
    )
)
_SECRET_NAME = re.compile(r"(?:^|[_.\-])(?:key|apikey|token|secret|password|passwd|credential)s?$", re.IGNORECASE)
_BARE_KEY = re.compile(
    r"(?:[0-9a-f]{32,128}|(?=[^0-9]*[0-9])(?=[^A-Z]*[A-Z])(?=[^a-z]*[a-z])[A-Za-z0-9+/_\-]{32,}={0,2})"
)


def find_in_text(text: str) -> Iterator[tuple[int, str]]:
    """(offset, kind) of everything in `text` that is shaped like a secret."""
    for kind, shape in _SHAPES:
        for match in shape.finditer(text):
            yield match.start(), kind


def find_in_tree(value: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], str]]:
    """(path, kind) of bare keys under names such as `api_key`, `token` or `password`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from find_in_tree(item, (*path, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from find_in_tree(item, (*path, index))
    elif isinstance(value, str):
        name = next((step for step in reversed(path) if isinstance(step, str)), "")
        if _SECRET_NAME.search(name) and _BARE_KEY.fullmatch(value):
            yield path, "a key or token"


_SECRET_VARIABLE = re.compile(
    r"key|token|secret|pass(?:word|wd|phrase)?$|pass_|credential|cookie|auth(?!or)", re.IGNORECASE
)
_PASSWORD = re.compile(r"://[^\s/@:\"']{0,100}:([^\s/@\"'{}$]{1,200})@")
MIN_SECRET_CHARS = 8
"""Shorter values are words such as `true`, and leaving them out would garble other text."""
HIDDEN = "[hidden]"


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """What in an environment must not be shown: values under names such as HF_TOKEN, and passwords in addresses; longest first."""
    found = set()
    for name, value in environment.items():
        if _SECRET_VARIABLE.search(name) and not value.startswith(("/", "~", "./")):
            found.add(value)
        found.update(_PASSWORD.findall(value))
    return sorted((one for one in found if len(one) >= MIN_SECRET_CHARS), key=lambda one: (-len(one), one))


def hide(text: str, names: Sequence[str] = ()) -> str:
    """A message without secrets: what is shaped like one, and the values of this process's environment, those of `names` whatever they are."""
    named = [os.environ[name] for name in names if len(os.environ.get(name, "")) >= 4]
    for secret in sorted({*named, *secrets_of(os.environ)}, key=lambda one: (-len(one), one)):
        text = text.replace(secret, HIDDEN)
    return redact(text)


def redact(text: str) -> str:
    """`text` with everything that is shaped like a secret left out."""
    for kind, shape in _SHAPES:
        text = shape.sub(f"<{kind.split(' ', 1)[1]}>", text)
    return text
