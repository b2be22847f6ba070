"""Deciding again: other filters over the stored samples of a round, shard by shard, and what that changes. Nothing is generated.

The chain is the loop's own, fed in the order in which the loop feeds it, so the verdicts are those that a run with these
filters would have sealed. Rounds whose drawing looked at verdicts are refused: with other filters other samples would be there.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iterative_sft_cli.encoding_thinking import Thinking
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.filters import FilterChain, Judged, ResolvedFilter
from iterative_sft_cli.filters.cache import FOLDER
from iterative_sft_cli.loop import prompt_text, scores_read
from iterative_sft_cli.report.paging import RoundReader, open_lines
from iterative_sft_cli.report.query import check_rounds
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.sample_text import sample_row
from iterative_sft_cli.samples import (
    AcceptedEarlier,
    StoredSample,
    kept_of,
    read_eval_prompts,
    read_generated,
    read_prompts,
)


def check_possible(run: Run, index: int) -> None:
    """Raises ConfigError for a round whose samples depend on verdicts, or that has none."""
    check_rounds(run.view, [index])
    if kept_of(run.view.shards, index) != "all":
        raise ConfigError(
            f"--round {index}: only its accepted samples were kept (samples.keep: accepted)",
            expected="a round with all its samples, such as the newest",
        )
    settings = run.settings
    generate = settings.at_round(index).generate
    for key in ("until_accepted", "until_total", "budget", "search"):
        if getattr(generate, key, None) is not None:
            what = (
                f"generate.{key} drew samples by the verdicts of these filters; with others it would have drawn others"
            )
            raise ConfigError(what, hint="train a run of its own with the other filters: --output-dir DIR")
    if settings.rationalize is not None:
        what = "second tries (rationalize) were drawn where these filters kept nothing; with others they would be elsewhere"
        raise ConfigError(what, hint="train a run of its own with the other filters: --output-dir DIR")
    if isinstance(generate.from_, list):
        raise ConfigError(
            "generate.from names several models, whose samples are judged together", expected="a round of one model"
        )


class PlainSplitter:
    """Stands in for the encoder where no completion thinks: all of it is the final part."""

    def split_thinking(self, text: str, prompt_ids: Sequence[int]) -> Thinking:
        """The whole text, with no thinking."""
        return Thinking(None, text, True)


def splitter_of(run: Run, index: int, base_dir: Path) -> Any:
    """What separates thinking from answers: the run's encoder where a thinking tag occurs, else `PlainSplitter`, which needs no tokenizer."""
    section = run.settings.prompts
    tags = getattr(section, "thinking_tags", None) or ("<think>", "</think>")
    wanted = [json.dumps(tag).encode("ascii")[1:-1] for tag in tags] + [b'"thinking_unclosed"']
    reader = RoundReader(run.view, index)
    names = [*reader.names, *(name.replace("generated", "verdicts", 1) for name in reader.judged)]
    for name in names:
        lines = open_lines(run.path, index, name)
        if lines is not None and any(lines.count(text) for text in wanted):
            return encoder_of(run, base_dir)
    return PlainSplitter()


def encoder_of(run: Run, base_dir: Path) -> Any:
    """The encoder of the run's prompts; loads the tokenizer, not the model."""
    settings = run.settings
    if settings.model.use is not None:
        from iterative_sft_cli.build import open_backend

        return open_backend(settings, base_dir).encoder
    from iterative_sft_cli.encoding import TokenizerEncoder
    from iterative_sft_cli.model_load import load_tokenizer
    from iterative_sft_cli.model_source import find_model

    tokenizer = load_tokenizer(find_model(settings.model, base_dir), settings.model)
    return TokenizerEncoder(tokenizer, settings.prompts, base_dir)


@dataclass
class Again:
    """What the new filters said of a round, packed shard by shard."""

    reader: RoundReader
    packed: dict[str, bytes] = field(default_factory=dict)
    later: dict[str, list[Any]] = field(default_factory=dict)

    def put(self, name: str, judged: Sequence[Judged]) -> None:
        """Keep the verdicts of a shard."""
        rows = [[one.kept, [says.to_row() for says in one.says]] for one in judged]
        self.packed[name] = zlib.compress(json.dumps(rows).encode("ascii"), 1)

    def shard(self, name: str) -> list[tuple[bool, list[dict[str, Any]]]]:
        """(kept by the streaming filters, what was said) of every sample of a shard."""
        return [(bool(kept), says) for kept, says in json.loads(zlib.decompress(self.packed[name]))]

    def says(self, name: str) -> Iterator[tuple[list[dict[str, Any]], bool]]:
        """(everything that was said, accepted) of every sample of a shard; call it once the round is judged."""
        lines = self.reader.generated(name)
        for position, (kept, says) in enumerate(self.shard(name)):
            whole = says + [one.to_row() for one in self.later.get(lines.row(position)["sample_id"], ())]
            yield whole, kept and all(one["keep"] for one in whole)


class _Survivors(Sequence[Judged]):
    """The samples that passed the streaming filters, read again as a round-wide filter asks for them."""

    def __init__(self, run: Run, again: Again, prompts: dict[str, Any]) -> None:
        self._run, self._again, self._prompts = run, again, prompts
        self._open: tuple[str, list[Judged]] | None = None
        self._index = [(name, i) for name in again.packed for i, (kept, _) in enumerate(again.shard(name)) if kept]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        name, position = self._index[at]
        if self._open is None or self._open[0] != name:
            samples = read_generated(self._run.view.shards, self._again.reader.round_index, name, self._prompts)
            said = self._again.shard(name)
            judged = [Judged.from_rows(s, says, kept) for s, (kept, says) in zip(samples, said, strict=True)]
            self._open = (name, judged)
        return self._open[1][position]


def judge_again(run: Run, index: int, filters: Sequence[ResolvedFilter], config: Any, base_dir: Path) -> Again:
    """Run `filters` over the stored samples of a round; `config` is the one they come from.

    Raises ConfigError where that is not possible, PluginError when a filter fails.
    """
    check_possible(run, index)
    at = config.at_round(index)
    shards = run.view.shards
    prompts = read_prompts(shards, index)
    again = Again(RoundReader(run.view, index))
    chain = FilterChain(
        filters,
        seed=config.seed,
        round_index=index,
        accepted_earlier=AcceptedEarlier(shards, index),
        cache_dir=run.path / FOLDER,
        encoder=splitter_of(run, index, base_dir),
        max_length=at.train.max_length,
        scores_read=scores_read(at),
        eval_texts=[prompt_text(prompt.prompt) for prompt in read_eval_prompts(shards).values()],
    )
    with chain:
        for name in again.reader.names:
            stream = chain.open_shard()
            samples = read_generated(shards, index, name, prompts)
            for sample in samples:
                stream.submit(sample)
            again.put(name, stream.finish(samples))
        if chain.has_round_part:
            again.later = dict(chain.finish_round(_Survivors(run, again, prompts)))
    return again


@dataclass
class Counts:
    """The funnel of one set of verdicts."""

    num_samples: int = 0
    accepted: int = 0
    entered: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    solved: set[str] = field(default_factory=set)

    def add(self, prompt_id: str, says: Sequence[dict[str, Any]], accepted: bool) -> None:
        """Count one sample."""
        self.num_samples += 1
        self.accepted += accepted
        if accepted:
            self.solved.add(prompt_id)
        for one in says:
            self.entered[one["filter"]] += 1
            if not one["keep"]:
                self.dropped[one["filter"]] += 1
                self.reasons.setdefault(one["filter"], Counter())[one.get("reason") or "rejected"] += 1

    def to_json(self) -> dict[str, Any]:
        """As plain data, in the order of the filters."""
        return {
            "num_samples": self.num_samples,
            "accepted": self.accepted,
            "solved": len(self.solved),
            "filters": [
                {
                    "filter": name,
                    "entered": entered,
                    "dropped": self.dropped[name],
                    "reasons": dict(self.reasons.get(name, Counter()).most_common()),
                }
                for name, entered in self.entered.items()
            ],
        }


def difference(run: Run, again: Again, *, num_examples: int) -> dict[str, Any]:
    """What the new verdicts change: both funnels, how many samples were gained and lost, and examples of each."""
    reader = again.reader
    before, after = Counts(), Counts()
    numbers: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = {"gained": [], "lost": []}
    for name in reader.names:
        judged = name in reader.judged
        lines = reader.generated(name)
        old = reader.says(name) if judged else ((i, "", [], False) for i in range(len(lines)))
        for (position, _, old_says, was), (new_says, now) in zip(old, again.says(name), strict=True):
            stored: StoredSample | None = None
            prompt_id = str(lines.row(position)["prompt_id"])
            if judged:
                before.add(prompt_id, old_says, was)
            after.add(prompt_id, new_says, now)
            word = "gained" if now and not was else "lost" if was and not now else ""
            if not word or not judged:
                continue
            numbers[word] += 1
            if len(examples[word]) < num_examples:
                stored = reader.stored(lines, position, new_says, now)
                examples[word].append({**sample_row(stored), "said_before": old_says})
    return {
        "round": reader.round_index,
        "before": before.to_json(),
        "after": after.to_json(),
        "gained": numbers["gained"],
        "lost": numbers["lost"],
        "examples": examples,
    }
