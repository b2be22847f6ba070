"""Rules that end or skip a round: each looks at figures of the round and names the key that asked for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iterative_sft_cli.errors import DataError, GuardStop
from iterative_sft_cli.stats import RoundCounter


def check_round(counter: RoundCounter, guards: Any, *, round_index: int) -> bool:
    """Judge a round after its filters: True to train on it, False to skip training.

    Raises GuardStop (exit 3) when a limit of `guards` is not met or nothing was accepted under `on_empty: stop`, and
    DataError (exit 4) for nothing accepted under `on_empty: fail`. The round stays open: it is judged again at the next start.
    """
    row = counter.filters_row()
    generated = counter.generate_row()
    if counter.num_trainable == 0:
        if guards.on_empty == "skip":
            return False
        what, hint = explain_empty(counter, round_index)
        raise (DataError if guards.on_empty == "fail" else GuardStop)(what, hint=hint)
    limits = (
        ("min_accepted", row["filters/num_accepted"], "at least"),
        ("min_accept_rate", row["filters/accept_rate"], "at least"),
        ("max_truncated_rate", generated["generate/truncated_rate"], "at most"),
    )
    for key, value, word in limits:
        limit = getattr(guards, key)
        if limit is not None and (value < limit if word == "at least" else value > limit):
            raise GuardStop(
                f"round {round_index}: {value:.4g} where guards.{key} asks for {word} {limit:g}",
                where=f"guards.{key}",
                hint="look at the samples with `isft samples RUN`, mend the config, and run the same command again",
            )
    return True


def explain_empty(counter: RoundCounter, round_index: int) -> tuple[str, str]:
    """What to say when no sample was accepted: the filter that dropped most, or that all were cut off."""
    n = counter.num_samples
    worst = max(counter.dropped, key=lambda name: counter.dropped[name], default=None)
    detail = ""
    if worst is not None:
        reasons = ", ".join(f"{reason} {count}" for reason, count in counter.reasons[worst].most_common(3))
        detail = f"; `{worst}` dropped {counter.dropped[worst]} ({reasons})"
    what = f"round {round_index}: none of {n} samples was accepted{detail}"
    if counter.finish["length"] == n and n:
        hint = "every sample was cut off: raise generate.max_new_tokens, or look at `isft samples RUN --rejected`"
    else:
        hint = "look at `isft samples RUN --rejected`; guards.on_empty: skip goes on with unchanged weights"
    return what, hint


TOKENS = ("generate/num_tokens", "generate/trial_tokens", "rationalize/num_tokens", "eval/num_tokens")
"""The figures that count generated tokens."""


def tokens_so_far(rows: Sequence[Mapping[str, Any]]) -> int:
    """Tokens generated in all rounds that have statistics, evaluations included."""
    return sum(int(row.get(key) or 0) for row in rows for key in TOKENS)


def check_budget(guards: Any, *, num_tokens: int, hours: float) -> None:
    """Raises GuardStop when the run has used up `guards.max_tokens` (generated) or `guards.max_hours`."""
    if guards.max_tokens is not None and num_tokens >= guards.max_tokens:
        raise GuardStop(
            f"{num_tokens} tokens were generated",
            where="guards.max_tokens",
            hint="raise it and run the same command again",
        )
    check_hours(guards, hours)


class HoursUp(GuardStop):
    """The time that `guards.max_hours` gives this process is over; what is worth saving is saved first."""


def check_hours(guards: Any, hours: float) -> None:
    """Raises HoursUp when this process has worked for `guards.max_hours`."""
    if guards.max_hours is not None and hours >= guards.max_hours:
        raise HoursUp(
            f"this process worked for {hours:.2f} hours",
            where="guards.max_hours",
            hint="run the same command again to go on",
        )


def best_round(rows: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The round whose `eval/<metric>` is highest, the earliest of equals; None without evaluations."""
    key = metric if metric.startswith("eval/") else f"eval/{metric}"
    scored = [(row[key], -int(row["round"])) for row in rows if row.get(key) is not None]
    return -max(scored)[1] if scored else None
