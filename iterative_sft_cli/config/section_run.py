"""The `guards`, `checkpoints` and `samples` sections: when a run ends early, and what it keeps on disk."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from iterative_sft_cli.config.condition import GRAMMAR, Condition
from iterative_sft_cli.config.expression import ExpressionError
from iterative_sft_cli.config.fields import (
    Count,
    CountFromZero,
    NumberTag,
    Positive,
    Section,
    Share,
    Text,
    WordOrNumber,
    WordTag,
)
from iterative_sft_cli.config.findings import finding
from iterative_sft_cli.config.schedule import Scheduled


def condition(value: Any) -> Any:
    """A condition over the statistics, checked for its grammar."""
    if isinstance(value, str):
        try:
            Condition(value)
        except ExpressionError as error:
            raise finding(str(error), expected=GRAMMAR) from None
    return value


ConditionText = Annotated[Text, BeforeValidator(condition)]
"""A condition over the statistics, kept as text."""


class GuardsConfig(Section):
    """Conditions under which a run stops at a safe point, with exit code 3, to be resumed."""

    min_accepted: Scheduled[CountFromZero | None] = None
    """Stop when a round accepted fewer samples; null never stops."""
    min_accept_rate: Scheduled[Share | None] = None
    """Stop when a smaller share of a round's samples was accepted; null never stops."""
    max_truncated_rate: Scheduled[Share | None] = None
    """Stop when a larger share of a round's completions was cut off at `max_new_tokens`; null never stops."""
    on_empty: Literal["stop", "skip", "fail"] = "stop"
    """A round without accepted samples: stop (exit 3, judged again at the next start), skip (weights untouched) or fail (exit 4)."""
    stop_if: ConditionText | None = None
    """Condition over the statistics under which the run stops after a round, such as `plateau(eval/pass@1, 2)`; null never stops."""
    rollback_if: ConditionText | None = None
    """Condition over the statistics under which a round's weights are dropped for the best ones, such as `eval/pass@1 < best(eval/pass@1) - 0.02`; null never does."""
    max_tokens: Count | None = None
    """Stop once so many tokens were generated, over the whole run; null for no limit."""
    max_hours: Positive | None = None
    """Stop after so many hours of this process; null for no limit."""


class CheckpointsConfig(Section):
    """When weights are saved, and how many are kept."""

    keep: Count = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Also keep the best checkpoint by `eval.metric`."""
    every_steps: Count | None = None
    """Save within a round after so many optimizer steps; null never does."""
    every_s: Positive | None = 1800.0
    """Save within a round after so many seconds; null never does."""


class SamplesConfig(Section):
    """How stored samples are kept."""

    compress: Literal["none", "gzip"] = "none"
    """Compression of shards as they are sealed; readers take both forms."""
    keep: Annotated[Annotated[Literal["all", "accepted"], WordTag] | Annotated[Count, NumberTag], WordOrNumber] = "all"
    """Samples that stay on disk: all; of rounds before the newest the accepted ones only; or those of the newest n rounds only."""
