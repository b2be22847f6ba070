"""Training over ranks: rank 0's calls are repeated on every other rank, each with its own part of a step's rows.

Guarantee: after every call all ranks hold the same weights; a step that fails on one rank is taken on none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import IsftError
from iterative_sft_cli.ranks.faults import MeetingFailed, RankError, failure_of, first_line, is_broken_connection
from iterative_sft_cli.ranks.link import Link
from iterative_sft_cli.ranks.wire import from_rows
from iterative_sft_cli.train.base import Learner, TrainOutOfMemory
from iterative_sft_cli.types import TrainRow

OUT_OF_MEMORY = "out of memory"


class RankedLearner:
    """Rank 0's `Learner` over its own and those of the others; see `train/base.py` for the contract.

    A learner that cannot share a step's rows (no `shares`) is given all of them on every rank.
    """

    def __init__(self, local: Learner, link: Link) -> None:
        self._local, self._link = local, link
        self.deterministic = local.deterministic

    def __getattr__(self, name: str) -> Any:
        return getattr(self._local, name)

    @property
    def heartbeat(self) -> Callable[[int], None]:
        """Called by this rank's part of a step."""
        return self._local.heartbeat

    @heartbeat.setter
    def heartbeat(self, call: Callable[[int], None]) -> None:
        self._local.heartbeat = call

    def load_weights(self, folder: Path | None, *, round_index: int = 0) -> None:
        """Take the weights of a folder (None: the base model's) on every rank; only this one reads them."""
        spread: Any = getattr(self._local, "spread", None)
        if spread is None:
            place = None if folder is None else str(folder.resolve())
            self._link.command("load_weights", folder=place, round_index=round_index)
            self._local.load_weights(folder, round_index=round_index)
            return
        self._local.load_weights(folder, round_index=round_index)
        self._link.command("spread", state=None)
        self._together(lambda: spread(None))

    def load_state(self, folder: Path) -> None:
        """Take full-precision weights and optimizer on every rank; only this one reads them."""
        spread: Any = getattr(self._local, "spread", None)
        if spread is None:
            self._link.command("load_state", folder=str(folder.resolve()))
            self._local.load_state(folder)
            return
        self._local.load_state(folder)
        state = self._local.describe_state()  # type: ignore[attr-defined]
        self._link.command("spread", state=state)
        self._together(lambda: spread(state))

    def begin(self, settings: Any, num_steps: int, *, seed: int, keep_optimizer: bool) -> None:
        """Start a pass on every rank."""
        values = settings.model_dump(mode="json")
        self._link.command("begin", settings=values, num_steps=num_steps, seed=seed, keep_optimizer=keep_optimizer)
        self._local.begin(settings, num_steps, seed=seed, keep_optimizer=keep_optimizer)

    def step(self, rows: Sequence[TrainRow], step_index: int, micro_batch_tokens: int | None) -> dict[str, Any]:
        """One optimizer step over `rows`, each on one rank. Raises TrainOutOfMemory when any rank ran out."""
        shares: Any = getattr(self._local, "shares", None)
        parts = None if shares is None else shares(rows, self._link.size)
        self._link.command(
            "step",
            parts=None if parts is None else [from_rows(part) for part in parts],
            rows=from_rows(rows) if parts is None else None,
            step_index=step_index,
            micro_batch_tokens=micro_batch_tokens,
        )
        if parts is None:
            stats = self._local.step(rows, step_index, micro_batch_tokens)
            self._link.meet()
        else:
            part: Any = self._local
            stats = take_part(self._link, part, lambda: part.step_part(parts[0], step_index, micro_batch_tokens))
        self._link.sweep()
        return stats

    def loss(self, rows: Sequence[TrainRow]) -> float:
        """Mean nll a trained token of `rows`, shared out like a step's."""
        local: Any = self._local
        if getattr(local, "shares", None) is None:
            return float(local.loss(rows))
        self._link.command("loss", rows=from_rows(rows))
        return float(self._together(lambda: local.loss(rows)))

    def save(self, folder: Path, *, state: bool) -> None:
        """Write the folder; what lies on other ranks is gathered first."""
        if getattr(self._local, "gathers", False):
            gather: Any = self._local.gather  # type: ignore[attr-defined]
            self._link.command("gather", state=state)
            self._together(lambda: gather(state=state))
        self._local.save(folder, state=state)

    def offload(self) -> None:
        """Free what generation does not need, on every rank."""
        self._link.command("offload")
        self._together(self._local.offload)

    def offload_weights(self) -> None:
        """Move the weights away too, on every rank; returns when all have."""
        self._link.command("offload_weights")
        away = getattr(self._local, "offload_weights", None)
        if away is not None:
            away()
        self._link.meet()

    def reload(self) -> None:
        """Undo `offload`."""
        self._link.command("reload")
        self._local.reload()

    def _together(self, call: Callable[[], Any]) -> Any:
        """A call that meets the other ranks; a connection that breaks in it is put down to the rank that died."""
        try:
            return call()
        except MeetingFailed as met:
            raise failed_meeting(met) from None
        except RuntimeError as error:
            raise self._link.blame(error) from error


def take_part(link: Link, learner: Any, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """This rank's part of a step, which meets the others `learner.doors` times.

    A problem before the last meeting is brought to the next one, so that no rank takes the step.
    """
    before = link.meetings
    try:
        return call()
    except MeetingFailed as met:
        raise failed_meeting(met) from None
    except RankError:
        raise
    except Exception as error:
        if link.meetings - before < learner.doors:
            with contextlib.suppress(MeetingFailed):
                # where a collective broke because a rank has died, nobody comes: that rank is named here
                link.meet(problem_of(error))
        elif not isinstance(error, IsftError | TrainOutOfMemory):
            raise link.blame(error) from error
        if is_broken_connection(error):
            # both are there, and one was too late for the other
            raise RankError(f"{link.name}: {first_line(error)}", hint="run the same command again to go on") from error
        raise


def problem_of(error: Exception) -> dict[str, Any]:
    """An error as a meeting and `failed` carry it."""
    if isinstance(error, TrainOutOfMemory):
        return {"kind": OUT_OF_MEMORY, "text": str(error)}
    if isinstance(error, IsftError):
        where = f"{error.where}: " if error.where else ""
        return {"kind": type(error).__name__, "text": f"{where}{error.what}", "hint": error.hint}
    return {"kind": "RankError", "text": f"{type(error).__name__}: {error}"}


def failed_meeting(met: MeetingFailed) -> Exception:
    """What a rank's problem is to the others."""
    if met.problem["kind"] == OUT_OF_MEMORY:
        return TrainOutOfMemory(f"{met.problem['name']}: {met.problem['text']}")
    return failure_of(met.problem)
