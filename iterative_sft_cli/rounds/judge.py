"""Generate and filter, shard by shard: a sealed shard is never made again, the filters of one overlap the making of the next.

What is drawn in which wave is `waves.py`'s decision; it depends on sealed verdicts only, so a resumed round draws the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.filters import FilterChain, share
from iterative_sft_cli.guards import check_budget, tokens_so_far
from iterative_sft_cli.rounds.hints import FIRST_HINTED, hinted_prompt, second_tries
from iterative_sft_cli.rounds.sampling import generate_shard, make_request, seeds_of
from iterative_sft_cli.rounds.stages import RoundLog, Stages
from iterative_sft_cli.rounds.verdicts import Judges, Piece
from iterative_sft_cli.rounds.waves import Draw, Passed, Waves, into_units, owners_of, plan_waves
from iterative_sft_cli.rounds.weights import Source
from iterative_sft_cli.rounds.whole import JudgedRound, find_surplus
from iterative_sft_cli.samples import (
    GENERATED,
    HINTED,
    ROUND_VERDICTS,
    TRAIN,
    VERDICTS,
    read_generated,
    sample_to_row,
)
from iterative_sft_cli.types import Decoding, Prompt, Request, Sample


def judge_round(
    stages: Stages,
    config: Any,
    prompts: Sequence[Prompt],
    *,
    round_index: int,
    sources: Sequence[Source],
    chain: FilterChain,
    log: RoundLog,
) -> None:
    """Leave every sample of the round sealed with its verdicts; `sources` serve only when something is to be generated."""
    RoundJudge(stages, config, prompts, round_index, sources, chain, log).run()


class RoundJudge:
    """One round's way from prompts to sealed verdicts."""

    def __init__(
        self,
        stages: Stages,
        config: Any,
        prompts: Sequence[Prompt],
        round_index: int,
        sources: Sequence[Source],
        chain: FilterChain,
        log: RoundLog,
    ) -> None:
        self.stages, self.config, self.prompts = stages, config, prompts
        self.round_index, self.sources, self.chain, self.log = round_index, sources, chain, log
        self.shards = stages.run.shards
        self.by_id = {prompt.prompt_id: prompt for prompt in prompts}
        self.decoding = config.generate.decoding(eos_token_ids=stages.encoder.eos_token_ids)
        self.waves: Waves = plan_waves(config.generate, prompts, pairs=chain.at_once)
        self._number = 0
        self._tokens = tokens_so_far(stages.run.stats.rows())
        unfit = [one.name for one in chain.filters if one.kind == "samples"] + chain.not_prefix_stable()
        if self.waves.adaptive and unfit:
            raise ConfigError(
                f"`{unfit[0]}` decides over samples that are not drawn yet when a prompt's samples stop early",
                where="generate",
                expected="only filters whose verdict later samples cannot change",
            )
        # group filters of a later wave see the earlier samples of the prompt
        grouped = any(one.kind == "group" for one in chain.filters[: chain.streaming_end])
        self.judges = Judges(
            stages,
            chain,
            self.by_id,
            round_index,
            remember=self.waves.adaptive and grouped,
            tells=self.waves.adaptive or config.rationalize is not None,
        )

    def run(self) -> None:
        """All waves, the second tries, then what looks at the whole round."""
        stages, start = self.stages, time.monotonic()
        total = len(self.prompts) * int(self.config.generate.samples_per_prompt)
        with (
            self.judges,
            stages.view.phase("generate", self.round_index, total, "samples") as self._phase,
        ):
            self._keep_prompts()
            accepted = self._draw_waves()
            self.stages.keep_prompts(())
            if self.config.rationalize is not None:
                self._draw_second_tries(accepted)
        stages.run.telemetry.append(
            {"event": "generate", "round": self.round_index, "seconds": time.monotonic() - start}
        )
        start = time.monotonic()
        self._judge_whole()
        for name in self.shards.names(self.round_index, VERDICTS):
            found = self.shards.read(self.round_index, name)
            self.log("judged", shard=name, num_samples=len(found[0]) if found else 0)
        stages.run.telemetry.append(
            {"event": "filters", "round": self.round_index, "seconds": time.monotonic() - start}
        )

    def _keep_prompts(self) -> None:
        """Prompts that waves come back to are read once, unless the weights change hands in between."""
        stays = len(self.sources) == 1 and not self.chain.needs_device
        kept = self.prompts if self.waves.returns and stays else ()
        self.stages.keep_prompts([self._prompt_ids(prompt) for prompt in kept])

    # --- drawing ------------------------------------------------------------------------------------------------------

    def _draw_waves(self) -> dict[str, int]:
        """How many samples passed, by prompt id; prompts that were asked stand in it with 0."""
        judged: list[list[Future[Passed]]] = []
        asked: dict[str, int] = {}
        for wave in count():
            known = _joined(judged[: self.waves.waits_for(wave)])
            draws = self.waves.plan(wave, known)
            if draws is None:
                break
            asked |= {draw.prompt.prompt_id: 0 for draw in draws}
            judged.append(self._draw(draws))
        return {**asked, **{key: len(indices) for key, indices in _joined(judged).items()}}

    def _draw(self, draws: Sequence[Draw]) -> list[Future[Passed]]:
        """Generate a wave, source by source so that weights change hands seldom; judge each unit when its last source is through."""
        units = list(into_units(draws))
        pieces: list[list[Piece]] = [[] for _ in units]
        judging: list[Future[Passed]] = []
        for place, source in enumerate(self.sources):
            last = place == len(self.sources) - 1
            asked = self._left(self._asked(units, place), f"{GENERATED}-", self._number)
            alone = len(self.sources) == 1 and not self.judges.remember
            self.stages.announce(asked, share(self.chain, self.by_id, groups=alone))
            for unit, made in zip(units, pieces, strict=True):
                requests = [self._request(draw, place) for draw in unit]
                requests = [request for request in requests if request.sample_indices]
                early = last and not made and not self.judges.remember
                stream = self.stages.open_shard(self.chain) if early and not self.chain.needs_device else None
                if requests:
                    made.append(self._generate(f"{GENERATED}-{self._number:05d}", source, requests, stream))
                    self._number += 1
                if last and made and not self.chain.needs_device:
                    judging.append(self.judges.later(made, stream))
        if self.chain.needs_device:
            self.stages.session.close()
            judging = [self.judges.later(made, None) for made in pieces if made]
        return judging

    def _asked(self, units: Sequence[Sequence[Draw]], place: int) -> Iterator[list[Request]]:
        """The requests of each unit that has any for a source."""
        for unit in units:
            requests = [self._request(draw, place) for draw in unit]
            if any(request.sample_indices for request in requests):
                yield [request for request in requests if request.sample_indices]

    def _left(
        self, asked: Iterable[Sequence[Request]], prefix: str, first: int
    ) -> Iterator[tuple[Sequence[Request], Decoding]]:
        """The shards that are not sealed, of those numbered from `first`; one that memory has split is left to this process."""
        sealed = set(self.shards.names(self.round_index, prefix))
        split = {name.rpartition("-")[0] for name in self.shards.names(self.round_index, f"split-{GENERATED}")}
        for number, requests in enumerate(asked, start=first):
            name = f"{prefix}{number:05d}"
            if name not in sealed and f"split-{name}" not in split:
                yield requests, self.decoding

    def _request(self, draw: Draw, place: int) -> Request:
        prompt = draw.prompt
        drawn = range(draw.first, draw.first + draw.count)
        owners = owners_of([source.share for source in self.sources], drawn.stop)
        return make_request(
            prompt,
            self._prompt_ids(prompt),
            [index for index in drawn if owners[index] == place],
            seed=self.config.seed,
            purpose="generate",
            round_index=self.round_index,
        )

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        # not kept: to encode a prompt again costs less than any sample of it, the ids of a round would outgrow its prompts
        return tuple(self.stages.encoder.encode_prompt(prompt.prompt))

    def _generate(
        self,
        name: str,
        source: Source,
        requests: Sequence[Request],
        stream: Any,
        *,
        trained_after: Mapping[str, Sequence[int]] | None = None,
    ) -> Piece:
        """A shard: read where it is sealed, made and sealed where it is not."""
        found = self.shards.read(self.round_index, name)
        verdicts = self.shards.read(self.round_index, name.replace(GENERATED, VERDICTS, 1))
        if found is None or verdicts is None:
            self._forget_what_followed(name, made_again=found is None)
        submit: Callable[[Sample], None] = stream.submit if stream is not None else _nothing
        logprobs: dict[str, list[float]] = {}
        if found is None:
            samples, plan = generate_shard(
                self.stages,
                source.serve(),
                requests,
                self.decoding,
                round_index=self.round_index,
                name=name,
                prompts=self.by_id,
                phase=self._phase,
                on_sample=submit,
                trained_after=trained_after,
                logprobs=logprobs,
            )
            seeds = seeds_of(requests)
            rows = [sample_to_row(s, seeds[s.prompt_id, s.sample_index]) for s in samples]
            if self.decoding.keep_logprobs:
                rows = [{**row, "token_logprobs": logprobs.get(row["sample_id"])} for row in rows]
            if trained_after is not None:
                hinted = {request.prompt_id: list(request.prompt_ids) for request in requests}
                rows = [{**row, HINTED: hinted[row["prompt_id"]]} for row in rows]
            meta: dict[str, Any] = {"weights": source.weights(), "plan": plan}
            if len(self.sources) > 1:
                meta["source"] = source.name
            self.shards.seal(self.round_index, name, rows, meta)
        else:
            samples = read_generated(self.shards, self.round_index, name, self.by_id)
            if verdicts is None:
                for sample in samples:
                    submit(sample)
            self._phase.advance(len(samples))
        self.log("generated", shard=name, num_samples=len(samples))
        self._tokens += sum(len(sample.completion_ids) for sample in samples)
        check_budget(self.config.guards, num_tokens=self._tokens, hours=self.stages.hours())
        sealed = None if found is None or verdicts is None else verdicts[0]
        return Piece(name, None if self.chain.needs_device else samples, sealed)

    def _forget_what_followed(self, name: str, *, made_again: bool) -> None:
        """Set aside what was sealed on the ground of a shard that was lost: an engine or a filter need not repeat itself."""
        stale = [ROUND_VERDICTS, TRAIN]
        if made_again:
            stale.insert(0, name.replace(GENERATED, VERDICTS, 1))
        for other in stale:
            if self.shards.read(self.round_index, other) is not None:
                reason = f"what it was made from ({name}) was lost and is made again"
                self.shards.discard(self.round_index, other, reason)

    def _draw_second_tries(self, accepted: Mapping[str, int]) -> None:
        """Ask again, with a hint, the prompts of which nothing passed; what is trained is the answer without the hint."""
        section = self.config.rationalize
        failed = [p for p in self.prompts if accepted.get(p.prompt_id) == 0]
        chosen = second_tries(failed, float(section.share), seed=self.config.seed, round_index=self.round_index)
        requests = []
        for prompt in chosen:
            asked = hinted_prompt(section.template, prompt)
            requests.append(
                make_request(
                    Prompt(prompt.prompt_id, asked, prompt.answer, prompt.level, prompt.row),
                    self.stages.hint_encoder.encode_prompt(asked),
                    range(FIRST_HINTED, FIRST_HINTED + int(section.samples_per_prompt)),
                    seed=self.config.seed,
                    purpose="rationalize",
                    round_index=self.round_index,
                )
            )
        plain = {p.prompt_id: self._prompt_ids(p) for p in chosen}
        draws = [Draw(self.by_id[r.prompt_id], 0, len(r.sample_indices)) for r in requests]
        by_id = {request.prompt_id: request for request in requests}
        source = self.sources[0]
        judging = []
        units = list(into_units(draws))
        asked_for = ([by_id[draw.prompt.prompt_id] for draw in unit] for unit in units)
        self.stages.announce(
            self._left(asked_for, f"{GENERATED}-{HINTED}-", 0),
            share(self.chain, self.by_id, groups=True, trained_after=plain),
        )
        for number, unit in enumerate(units):
            stream = None if self.chain.needs_device else self.stages.open_shard(self.chain)
            asked_now = [by_id[draw.prompt.prompt_id] for draw in unit]
            name = f"{GENERATED}-{HINTED}-{number:05d}"
            piece = self._generate(name, source, asked_now, stream, trained_after=plain)
            if self.chain.needs_device:
                self.stages.session.close()
            judging.append(self.judges.later([piece], stream, hinted=True))
        for done in judging:
            done.result()

    def _judge_whole(self) -> None:
        """What needs the whole round: the filters from the first `samples` filter on, or what is more than was asked for."""
        if self.shards.read(self.round_index, ROUND_VERDICTS) is not None:
            return
        each, total = self.waves.limits()
        if self.chain.has_round_part:
            said = self.chain.finish_round(JudgedRound(self.stages, self.by_id, self.round_index))
        elif each is not None or total is not None:
            said = find_surplus(JudgedRound(self.stages, self.by_id, self.round_index), each or {}, total)
        else:
            return
        rows = [{"sample_id": key, "says": [one.to_row() for one in says]} for key, says in said.items()]
        self.shards.seal(self.round_index, ROUND_VERDICTS, rows, {})


def _nothing(sample: Sample) -> None:
    """Takes a sample that is judged later."""


def _joined(waves: Sequence[Sequence[Future[Passed]]]) -> dict[str, list[int]]:
    """What passed over all waves."""
    total: dict[str, list[int]] = {}
    for wave in waves:
        for done in wave:
            for prompt_id, indices in done.result().items():
                total.setdefault(prompt_id, []).extend(indices)
    return total
