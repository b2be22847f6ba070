"""Which checkpoints go after a commit: a pure rule over their keys that always keeps the newest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iterative_sft_cli.rundir.layout import is_partial, parse_key

NUM_WITH_STATE = 2
"""So many of the newest checkpoints keep `state/`: one to go on from, one to fall back to."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the config asks: `keep` rounds, `best`, a key or None, and `also`, keys that later rounds start from."""

    keep: int = 2
    best: str | None = None
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for a `keep` under 1."""
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")


def kept_keys(keys: Sequence[str], policy: Policy) -> list[str]:
    """The keys that stay, oldest first: the newest `keep` whole rounds, the best, those in `also`, and saves inside the round in progress.

    Of those saves the newest stays, and the one before it as long as no whole round is there to fall back to.
    """
    ordered = sorted(keys, key=parse_key)
    rounds = [key for key in ordered if not is_partial(key)]
    keep = set(rounds[-policy.keep :])
    last = parse_key(rounds[-1]) if rounds else (-1, 0)
    partial = [key for key in ordered if is_partial(key) and parse_key(key) > last]
    keep.update(partial[-1:] if rounds else partial[-2:])
    return [key for key in ordered if key in keep or key == policy.best or key in policy.also]


def stateless_keys(kept: Sequence[str]) -> list[str]:
    """The kept keys whose `state/` goes."""
    return sorted(kept, key=parse_key)[:-NUM_WITH_STATE]
