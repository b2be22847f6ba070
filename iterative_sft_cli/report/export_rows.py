"""Samples as training data for other tools: accepted ones as chat rows, and pairs of an accepted and a rejected one of the same prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.encoding import seam
from iterative_sft_cli.encoding_template import read_few_shot
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.filters import resolve_filters
from iterative_sft_cli.report.query import check_rounds
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.samples import StoredSample, kept_of
from iterative_sft_cli.types import LENGTH, Message

WRONG = ("verifier", "check")
"""Roles of filters whose rejection says that a sample is worse; a selector's (a duplicate, one too many) does not."""


class Conversation:
    """Puts a sample's prompt into messages as training saw them: system message, few-shot examples, the prompt's own turns."""

    def __init__(self, run: Run) -> None:
        section = run.settings.prompts
        self.raw = section.template == "none"
        self.system = section.system
        self.few_shot_text, self.few_shot = read_few_shot(section.few_shot, run.base_dir)

    def messages(self, prompt: str | Sequence[Message]) -> list[Message]:
        """The conversation before the completion."""
        own = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]
        head: list[Message] = []
        if own and own[0].get("role") == "system":
            head.append(own.pop(0))
        elif self.system:
            head.append({"role": "system", "content": self.system})
        if self.few_shot_text and own:
            own[0] = {**own[0], "content": self.few_shot_text + str(own[0].get("content", ""))}
        for question, answer in self.few_shot:
            head += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return head + own

    def text(self, prompt: str | Sequence[Message]) -> str:
        """The raw text before the completion, where no chat template is used."""
        blocks = [self.system] if self.system else []
        blocks += [question + seam(question, answer) + answer for question, answer in self.few_shot]
        return "\n\n".join([*blocks, self.few_shot_text + (prompt if isinstance(prompt, str) else str(prompt))])


def sft_rows(run: Run, rounds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each accepted sample: `messages`, or `prompt` and `completion` where no chat template is used; then where it comes from."""
    talk = Conversation(run)
    for stored in run.iter_samples(rounds):
        if not stored.accepted:
            continue
        sample = stored.sample
        origin = {"sample_id": sample.sample_id, "round": sample.round_index}
        if talk.raw:
            yield {"prompt": talk.text(sample.prompt), "completion": sample.completion, **origin}
        else:
            answer = {"role": "assistant", "content": sample.completion}
            yield {"messages": [*talk.messages(sample.prompt), answer], **origin}


def dpo_rows(run: Run, rounds: Sequence[int], chosen_column: str | None = None) -> Iterator[dict[str, Any]]:
    """Preference pairs of one prompt and round: the i-th accepted with the i-th that a verifier or a check rejected, texts that differ.

    With `chosen_column` the prompts' own column is the better side and every other completion the worse one (SPIN). Raises DataError for a
    prompt without it.
    """
    if chosen_column is not None:
        yield from self_play_rows(run, rounds, chosen_column)
        return
    talk = Conversation(run)
    worse = worse_filters(run)
    for group in by_prompt(run, rounds):
        good = distinct([one for one in group if one.accepted])
        bad = distinct([one for one in group if is_worse(one, worse)])
        known = {one.sample.completion for one in good}
        pairs = zip(good, [one for one in bad if one.sample.completion not in known], strict=False)
        for chosen, rejected in pairs:
            sample = chosen.sample
            origin = {
                "chosen_id": sample.sample_id,
                "rejected_id": rejected.sample.sample_id,
                "reason": (rejected.rejected_by or {}).get("reason"),
                "round": sample.round_index,
            }
            texts = (sample.completion, rejected.sample.completion)
            if talk.raw:
                yield {"prompt": talk.text(sample.prompt), "chosen": texts[0], "rejected": texts[1], **origin}
            else:
                sides = ([{"role": "assistant", "content": text}] for text in texts)
                yield {"prompt": talk.messages(sample.prompt), "chosen": next(sides), "rejected": next(sides), **origin}


def self_play_rows(run: Run, rounds: Sequence[int], column: str) -> Iterator[dict[str, Any]]:
    """A pair for each distinct completion of the model that differs from the text in the prompt's column."""
    talk = Conversation(run)
    for group in by_prompt(run, rounds):
        for rejected in distinct(group):
            sample = rejected.sample
            gold = sample.row.get(column)
            if not isinstance(gold, str):
                raise DataError(f"prompt {sample.prompt_id} has no text in the column `{column}`", where="--chosen")
            if gold.strip() == sample.completion.strip():
                continue
            origin = {"rejected_id": sample.sample_id, "round": sample.round_index}
            if talk.raw:
                yield {"prompt": talk.text(sample.prompt), "chosen": gold, "rejected": sample.completion, **origin}
            else:
                sides = [[{"role": "assistant", "content": text}] for text in (gold, sample.completion)]
                yield {"prompt": talk.messages(sample.prompt), "chosen": sides[0], "rejected": sides[1], **origin}


def worse_filters(run: Run) -> set[str]:
    """The filters whose rejection makes a sample the worse one of a pair. Raises ConfigError when a filter is gone."""
    resolved = resolve_filters(run.settings.filters, base_dir=run.base_dir)
    return {one.name for one in resolved if one.kind == "sample" and one.role in WRONG}


def is_worse(stored: StoredSample, worse: set[str]) -> bool:
    """Whether a sample was rejected for what it says. One that was cut off is left out: it may have been right."""
    rejected = stored.rejected_by
    return rejected is not None and rejected["filter"] in worse and stored.sample.finish_reason != LENGTH


def by_prompt(run: Run, rounds: Sequence[int]) -> Iterator[list[StoredSample]]:
    """The samples of each prompt and round together, in the order in which the last of a prompt was drawn; one round in memory at most."""
    for index in rounds:
        groups: dict[str, list[StoredSample]] = {}
        for stored in run.iter_samples([index]):
            groups.setdefault(stored.sample.prompt_id, []).append(stored)
        yield from groups.values()


def distinct(group: Iterable[StoredSample]) -> list[StoredSample]:
    """The first sample of every text."""
    return list({one.sample.completion: one for one in reversed(list(group))}.values())[::-1]


def choose_rounds(run: Run, rounds: Sequence[int] | None) -> list[int]:
    """The rounds that were asked for, all by default. Raises ConfigError for one without samples."""
    check_rounds(run.view, rounds or ())
    return list(rounds) if rounds else run.rounds


def with_rejected(run: Run, rounds: Sequence[int]) -> list[int]:
    """Those of the rounds whose rejected samples are still there. Raises ConfigError when none is."""
    whole = [index for index in rounds if kept_of(run.view.shards, index) == "all"]
    if rounds and not whole:
        raise ConfigError(
            "only the accepted samples of these rounds were kept (samples.keep: accepted): there is no worse side",
            expected="--round with a round that has all its samples, such as the newest",
        )
    return whole


def write_rows(rows: Iterable[dict[str, Any]], out: Path) -> int:
    """Write rows as JSON lines, whole or not at all; returns how many. Raises DataError when there is none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(f".{out.name}.part")
    count = 0
    try:
        with temp.open("w", encoding="ascii") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n")
                count += 1
        if not count:
            raise DataError(
                "there is nothing to export", hint="isft samples RUN shows what was accepted and what was not"
            )
        temp.replace(out)
    finally:
        temp.unlink(missing_ok=True)
    return count
