"""From samples to sealed verdicts, unit by unit, in a thread beside the generation.

Guarantee: units are judged in the order in which they are handed over, and none after one that failed; what is sealed is read
and never judged again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from iterative_sft_cli.filters import FilterChain, Judged
from iterative_sft_cli.rounds.stages import Stages
from iterative_sft_cli.rounds.waves import Passed
from iterative_sft_cli.samples import GENERATED, VERDICTS, read_generated
from iterative_sft_cli.types import Prompt, Sample


@dataclass(frozen=True, slots=True)
class Piece:
    """One shard of a unit: its name, its samples (None: to be read again), and its verdicts where they are sealed already."""

    name: str
    samples: list[Sample] | None
    verdicts: list[dict[str, Any]] | None

    @property
    def verdicts_name(self) -> str:
        """The shard of its verdicts."""
        return self.name.replace(GENERATED, VERDICTS, 1)


class Judges:
    """The judges of one round. With `remember`, group filters of a later unit see the earlier samples of its prompts; without `tells`
    nobody asks what passed, and it is not held."""

    def __init__(
        self,
        stages: Stages,
        chain: FilterChain,
        by_id: Mapping[str, Prompt],
        round_index: int,
        *,
        remember: bool,
        tells: bool,
    ) -> None:
        self.stages, self.chain, self.by_id, self.round_index = stages, chain, by_id, round_index
        self.remember, self.tells = remember, tells
        self.shards = stages.run.shards
        self._history: dict[str, list[Judged]] = {}
        self._judging: list[Future[Passed]] = []
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()

    def later(self, pieces: list[Piece], stream: Any, *, hinted: bool = False) -> Future[Passed]:
        """Judge a unit after those before it; at most two units wait. Gives which samples of each prompt passed, where they are told."""
        if len(self._judging) >= 2:
            self._judging[-2].result()
        before = self._judging[-1] if self._judging else None
        self._judging.append(self._thread.submit(self._judge_after, before, pieces, stream, hinted))
        return self._judging[-1]

    def _judge_after(self, before: Future[Passed] | None, pieces: list[Piece], stream: Any, hinted: bool) -> Passed:
        # a unit after one that failed would be judged without its verdicts
        if before is not None and before.exception() is not None:
            raise before.exception() or AssertionError
        passed = self._judge(pieces, stream, hinted)
        pieces.clear()  # their samples are sealed: a round of any size holds those of a few units
        return passed

    def _judge(self, pieces: Sequence[Piece], stream: Any, hinted: bool) -> Passed:
        """Seal the verdicts of a unit; which samples of each prompt passed."""
        if all(piece.verdicts is not None for piece in pieces):
            judged = [
                Judged.from_rows(sample, row["says"], row["kept"])
                for piece in pieces
                for sample, row in zip(self._samples_of(piece), piece.verdicts or (), strict=True)
            ]
        else:
            judged = self._judge_now(pieces, stream, hinted)
        if self.remember and not hinted:
            for one in judged:
                self._history.setdefault(one.sample.prompt_id, []).append(one)
        passed: dict[str, list[int]] = {}
        for one in judged if self.tells else ():
            if one.kept:
                passed.setdefault(one.sample.prompt_id, []).append(one.sample.sample_index)
        return passed

    def _judge_now(self, pieces: Sequence[Piece], stream: Any, hinted: bool) -> list[Judged]:
        made = {piece.name: self._samples_of(piece) for piece in pieces}
        samples = [sample for each in made.values() for sample in each]
        if len(pieces) > 1:
            place = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(s.prompt_id for s in samples))}
            samples.sort(key=lambda sample: (place[sample.prompt_id], sample.sample_index))
        if stream is None:
            earlier = () if hinted else [one for s in _prompts_of(samples) for one in self._history.get(s, ())]
            stream = self.stages.open_shard(self.chain, earlier)
        judged: list[Judged] = stream.finish(samples)
        by_id = {one.sample.sample_id: one for one in judged}
        for piece in pieces:
            if piece.verdicts is None:
                rows = [_verdict_row(by_id[sample.sample_id]) for sample in made[piece.name]]
                self.shards.seal(self.round_index, piece.verdicts_name, rows, {})
        return judged

    def _samples_of(self, piece: Piece) -> list[Sample]:
        if piece.samples is not None:
            return piece.samples
        return read_generated(self.shards, self.round_index, piece.name, self.by_id)


def _prompts_of(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(sample.prompt_id for sample in samples))


def _verdict_row(one: Judged) -> dict[str, Any]:
    return {"sample_id": one.sample.sample_id, "kept": one.kept, "says": [says.to_row() for says in one.says]}
