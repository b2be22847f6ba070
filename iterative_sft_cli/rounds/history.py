"""What earlier rounds say about prompts: how often each was asked and accepted, when last, and how far a curriculum has come.

Read from sealed shards and committed statistics only, so a resumed run sees what the first one saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iterative_sft_cli.config.condition import Condition
from iterative_sft_cli.config.expression import Expression
from iterative_sft_cli.prompts import PromptHistory, needs_history, select_round
from iterative_sft_cli.rounds.stages import Stages
from iterative_sft_cli.rounds.thinning import asked_in
from iterative_sft_cli.samples import PROMPTS, prompt_to_row, read_prompts
from iterative_sft_cli.types import Prompt


def choose_prompts(stages: Stages, config: Any, round_index: int) -> list[Prompt]:
    """The round's prompts in the order they are asked, sealed once chosen."""
    shards = stages.run.shards
    if shards.iter_rows(round_index, PROMPTS) is None:
        history = read_history(stages, round_index) if needs_history(config.prompts) else {}
        chosen = select_round(
            stages.prompts,
            config.prompts,
            round_index=round_index,
            seed=config.seed,
            history=history,
            promotions=promotions(stages, config, round_index),
        )
        shards.seal(round_index, PROMPTS, map(prompt_to_row, chosen), {})
    return list(read_prompts(shards, round_index, stages.known).values())


def promotions(stages: Stages, config: Any, round_index: int) -> int:
    """How often `prompts.curriculum` has moved up before a round: after every round, or after those that `promote_if` allows."""
    curriculum = config.prompts.curriculum
    if curriculum is None or curriculum.promote_if is None:
        return round_index - 1
    condition = Condition(curriculum.promote_if)
    rows = stages.run.stats.rows()
    ends = [i + 1 for i, row in enumerate(rows) if 0 < row["round"] < round_index]
    return sum(condition.holds(rows[:end]) is True for end in ends)


def read_history(stages: Stages, round_index: int) -> Mapping[str, PromptHistory]:
    """What became of every prompt in the rounds before this one.

    Under `prompts.advance` only the first prompts of a round, a share that depends on the round's acceptance rate, count as asked (AdaSTaR's
    slower heap update); the others keep the place in the order that they had.
    """
    counts: dict[str, list[float]] = {}
    for earlier in range(1, round_index):
        rates = round_rates(stages, earlier)
        for prompt_id in advanced(rates, stages.config.at_round(earlier).prompts):
            made, accepted = rates[prompt_id]
            samples, kept, _, _ = counts.get(prompt_id, [0, 0, 0, 0.0])
            counts[prompt_id] = [samples + made, kept + accepted, earlier, accepted / made]
    return {key: PromptHistory(int(n), int(a), int(last), rate) for key, (n, a, last, rate) in counts.items()}


def round_rates(stages: Stages, round_index: int) -> dict[str, tuple[int, int]]:
    """(samples, accepted) of each prompt asked in a finished round, in the order asked; second tries with a hint do not count."""
    known = stages.rates.get(round_index)
    if known is None:
        known = {}
        for prompt_id, num_samples, num_accepted in asked_in(stages.run.shards, round_index, stages.known):
            made, accepted = known.get(prompt_id, (0, 0))
            known[prompt_id] = (made + num_samples, accepted + num_accepted)
        stages.rates[round_index] = known
    return known


def advanced(rates: Mapping[str, tuple[int, int]], section: Any) -> list[str]:
    """The prompts of a round that count as asked: all, or the first share that `advance` gives for the round's acceptance rate."""
    asked = list(rates)
    if section.order != "adaptive" or section.advance is None or not asked:
        return asked
    made, accepted = (sum(rate[i] for rate in rates.values()) for i in (0, 1))
    share = Expression(section.advance)({"accept_rate": accepted / made})
    return asked[: max(0, min(len(asked), int(share * len(asked))))]
