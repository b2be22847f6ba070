"""Chat templates and few-shot examples as the config names them; a rendering depends on its inputs alone, never on the clock.

A template that asks for the date (`strftime_now`, as Llama 3.2's does) gets `FROZEN_DATE`, so that a run that is resumed
tomorrow asks the same questions as today. `template_kwargs` such as `date_string` still win where the template reads them.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.types import Message

FROZEN_DATE = datetime.datetime(2024, 7, 26)
_PROBE = "isft0probe0text"


class ChatTemplate:
    """A chat template bound to a tokenizer and to the config's `template_kwargs`.

    `end_of_turn_id` is the token that closes an assistant turn (None where the template writes no such token) and
    `end_of_turn_text` what stands between an assistant's content and the next turn, up to and including that token.
    """

    def __init__(self, tokenizer: Any, text: str, kwargs: Mapping[str, Any] | None = None, *, where: str) -> None:
        """Raises ConfigError when the template cannot be rendered for a plain question and answer."""
        self.text = text
        self.where = where
        self.kwargs = dict(kwargs or {})
        self.reads_clock = "strftime_now" in text
        self._tokenizer = tokenizer
        self._compiled = _freeze_clock(text) if self.reads_clock else text
        self.end_of_turn_id, self.end_of_turn_text = self._find_end_of_turn()

    def render(self, messages: Sequence[Message], *, generation: bool) -> str:
        """The text of `messages`; `generation` adds the opening of an assistant turn. Raises ConfigError."""
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=generation,
                chat_template=self._compiled,
                **self.kwargs,
            )
        except Exception as error:  # templates are data: jinja and raise_exception() raise many kinds
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ConfigError(
                f"the chat template cannot render messages with the roles {roles}: {error}",
                where=self.where,
                hint="choose another `template`, or change `system` and `few_shot`",
            ) from error
        return str(rendered)

    def _find_end_of_turn(self) -> tuple[int | None, str]:
        question = {"role": "user", "content": "?"}
        rendered = self.render([question, {"role": "assistant", "content": _PROBE}], generation=False)
        if _PROBE not in rendered:
            raise ConfigError(
                "the chat template does not show what the assistant says",
                where=self.where,
                hint="choose another `template`, or `template: none`",
            )
        tail = rendered.rsplit(_PROBE, 1)[1]
        space = len(tail) - len(tail.lstrip())
        known: Mapping[int, Any] = self._tokenizer.added_tokens_decoder
        for token_id, token in sorted(known.items(), key=lambda item: -len(str(item[1]))):
            if tail.startswith(str(token), space):
                return token_id, tail[: space + len(str(token))]
        return None, ""


def _freeze_clock(text: str) -> str:
    """The template with a macro of the name `strftime_now` in front, which shadows the function of that name."""
    formats = dict.fromkeys(match[1] for match in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", text))
    cases = "".join(
        "{%- if format == " + json.dumps(pattern) + " -%}" + FROZEN_DATE.strftime(pattern) + "{%- endif -%}"
        for pattern in formats
    )
    return "{%- macro strftime_now(format) -%}" + cases + "{%- endmacro -%}" + text


def resolve_template(
    tokenizer: Any, setting: str | None, kwargs: Mapping[str, Any] | None, base_dir: Path
) -> ChatTemplate | None:
    """The template that `setting` names: None for raw text.

    `setting` None means the tokenizer's own if it has one, "none" raw text; otherwise the name of one of the tokenizer's
    templates, an inline Jinja text, or a Jinja file relative to `base_dir`. Raises ConfigError.
    """
    where = "prompts.template"
    own = getattr(tokenizer, "chat_template", None)
    named: dict[str, str] = dict(own) if isinstance(own, Mapping) else ({"default": own} if own else {})
    if setting is None:
        if not named:
            return None
        return ChatTemplate(
            tokenizer, named.get("default") or next(iter(named.values())), kwargs, where="chat template"
        )
    if setting == "none":
        return None
    if setting in named:
        return ChatTemplate(tokenizer, named[setting], kwargs, where=where)
    if "{{" in setting or "{%" in setting:
        return ChatTemplate(tokenizer, setting, kwargs, where=where)
    path = find_file(setting, base_dir)
    if path is None:
        close = difflib.get_close_matches(setting, [*named, "none"], n=1)
        raise ConfigError(
            f"no template {setting!r}: no such file, and the tokenizer has "
            + (f"only {', '.join(sorted(named))}" if named else "no chat template"),
            where=where,
            expected="none, a Jinja file, an inline Jinja text, or the name of one of the tokenizer's templates",
            hint=f"did you mean {close[0]}?" if close else None,
        )
    return ChatTemplate(tokenizer, path.read_text(encoding="utf-8"), kwargs, where=str(path))


def find_file(name: str, base_dir: Path) -> Path | None:
    """`name` relative to `base_dir`, else to the current folder; None when neither is a file."""
    path = Path(name).expanduser()
    for candidate in (base_dir / path, path):
        if candidate.is_file():
            return candidate
    return None


def read_few_shot(
    setting: str | Sequence[Mapping[str, Any]] | None, base_dir: Path
) -> tuple[str, list[tuple[str, str]]]:
    """What is shown before every question: a text put in front of it as it is, and (prompt, completion) pairs.

    `setting` is a list of mappings with `prompt` and `completion` (or `answer`), a JSONL, JSON or YAML file of them, or a
    .txt file, relative to `base_dir`. Raises ConfigError for a wrong form and DataError for a file that is not there.
    """
    where = "prompts.few_shot"
    if setting is None:
        return "", []
    items: Any = setting
    if isinstance(setting, str):
        path = find_file(setting, base_dir)
        if path is None:
            raise DataError(f"no file {setting!r}", where=where, hint=f"paths are relative to {base_dir}")
        where = str(path)
        if path.suffix == ".txt":
            return path.read_text(encoding="utf-8-sig"), []
        items = _read_items(path)
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise ConfigError("not a list", where=where, expected="a list of {prompt, completion}")
    pairs = []
    for index, item in enumerate(items):
        completion = item.get("completion", item.get("answer")) if isinstance(item, Mapping) else None
        prompt = item.get("prompt") if isinstance(item, Mapping) else None
        if not isinstance(prompt, str) or not prompt or not isinstance(completion, str) or not completion:
            raise ConfigError(
                f"example {index} is not complete",
                where=f"{where}[{index}]",
                expected="a mapping with the texts `prompt` and `completion` (or `answer`)",
            )
        pairs.append((prompt, completion))
    return "", pairs


def _read_items(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        if path.suffix == ".json":
            return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error}", where=str(path)) from error
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"not YAML: {error}", where=str(path)) from error
