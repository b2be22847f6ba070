"""Early signs of collapse, read from the rows of `stats.jsonl`: one sentence each, said once after the round in which they appear.

The figures behind them are in the statistics whether or not anything is said; the limits are customs, not laws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from iterative_sft_cli.config.condition import Condition

Rows = Sequence[Mapping[str, Any]]

CONDITIONS: tuple[tuple[str, str], ...] = (
    (
        "filters/accept_rate < 0.01",
        "fewer than 1 % of the samples were accepted: the filters may be too strict, or the task too hard",
    ),
    (
        "filters/accept_rate > 0.98",
        "over 98 % of the samples were accepted: the round teaches little; take harder prompts or stricter filters",
    ),
    (
        "filters/unique_rate < 0.5 and falls(filters/unique_rate, 1)",
        "more than half of the accepted samples repeat another one of their prompt, and the share grows; dedup removes them",
    ),
    (
        "generate/token_nll < 0.5 * first(generate/token_nll)",
        "the model's uncertainty a token is below half of round 1's (entropy collapse): raise the temperature, or go on from base",
    ),
    (
        "filters/distinct_2 < 0.5 * first(filters/distinct_2)",
        "the accepted samples have less than half as many distinct token pairs as in round 1",
    ),
    (
        "filters/easy_share > 0.8 and generate/num_samples > 2 * generate/num_prompts",
        "over 80 % of the accepted samples come from prompts solved more than 3 times in 4: max_per_prompt or prompts.skip share better",
    ),
    (
        "generate/length_drift > 0.3 or generate/length_drift < -0.3",
        "completions are over 30 % longer or shorter than in round 1",
    ),
    ("generate/truncated_rate > 0.05", "over 5 % of the completions were cut off: raise generate.max_new_tokens"),
    ("filters/known_rate > 0.9", "over 90 % of the accepted samples were accepted in an earlier round already"),
    (
        "train/seed_loss > first(train/seed_loss) + 0.1",
        "the loss on seed data rose by over 0.1 nats a token (forgetting): mix some in, or start from base",
    ),
)
"""(condition over the statistics, what it means)."""


def alarms(rows: Rows) -> list[str]:
    """The signs that appeared in the last row and were not there in the row before it."""
    now, before = set(_signs(rows)), set(_signs(rows[:-1]))
    return [text for text in _signs(rows) if text in now - before]


def _signs(rows: Rows) -> list[str]:
    if not rows:
        return []
    found = [text for condition, text in CONDITIONS if Condition(condition).holds(rows)]
    return [*found, *_coverage(rows), *_below_best(rows)]


def _coverage(rows: Rows) -> Iterator[str]:
    """pass@k falls while pass@1 rises, two evaluations in a row: the model sharpens what it knew and loses the rest."""
    ks = [
        int(key.removeprefix("eval/pass@")) for key in rows[-1] if key.startswith("eval/pass@") and key[10:].isdigit()
    ]
    k = max(ks, default=1)
    if k > 1 and Condition(f"falls(eval/pass@{k}, 2) and rises(eval/pass@1, 2)").holds(rows):
        yield f"pass@{k} fell twice while pass@1 rose: samples become alike, coverage is lost"


def _below_best(rows: Rows) -> Iterator[str]:
    """pass@1 is more than two standard errors below its best; the standard error is a quarter of the 95 % interval's width."""
    row = rows[-1]
    value, low, high = (row.get(f"eval/pass@1{end}") for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return
    best = max(float(one["eval/pass@1"]) for one in rows if one.get("eval/pass@1") is not None)
    if best - value > max(1e-9, (high - low) / 2):
        yield f"pass@1 is {value:.3f}, clearly below its best, {best:.3f}: guards.rollback_if or stop_if can act on it"


Note = Callable[[str], None]


def say_alarms(rows: Rows, note: Note) -> None:
    """Tell the view."""
    for text in alarms(rows):
        note(f"warning: round {rows[-1]['round']}: {text}")
