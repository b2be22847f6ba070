"""What can go wrong between ranks, how long each of it is waited for, and how an error of one rank reaches the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from iterative_sft_cli import errors
from iterative_sft_cli.errors import DataError

PATIENCE = "ISFT_RANK_PATIENCE_S"
"""Environment variable: the four numbers of `Patience`, for tests and for hosts that start far apart."""


@dataclass(frozen=True, slots=True)
class Patience:
    """`beat_s`: a rank says that it lives this often. `dead_after_s`: it is given up when it was silent for so long.
    `join_s`: how long ranks wait for each other at the start, before any of them loads a model. `collective_s`: the time-out of
    a collective. All but the last keep the promise that a rank which has gone ends the others within two minutes."""

    beat_s: float = 5.0
    dead_after_s: float = 60.0
    join_s: float = 110.0
    collective_s: float = 600.0

    @classmethod
    def of(cls, environ: Any = os.environ) -> Patience:
        """The defaults, or what `PATIENCE` says."""
        text = environ.get(PATIENCE, "")
        return cls(*(float(part) for part in text.split(","))) if text else cls()


class RankError(DataError):
    """A rank has died, hung or failed; the run can be resumed. Exit 4."""


class MeetingFailed(Exception):
    """A rank came to a meeting with a problem: `problem` is its record (`kind`, `text`, `rank`)."""

    def __init__(self, problem: dict[str, Any]) -> None:
        self.problem = problem
        super().__init__(problem["text"])


class Ended(Exception):
    """Rank 0 has ended the run with `code`."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(str(code))


def failure_of(said: dict[str, Any]) -> Exception:
    """What another rank failed of, as an error of the same kind."""
    kind = getattr(errors, str(said["kind"]), RankError)
    if not (isinstance(kind, type) and issubclass(kind, errors.IsftError)):
        kind = RankError
    found: Exception = kind(f"{said['name']}: {said['text']}", hint=said.get("hint"))
    return found


def is_broken_connection(error: BaseException) -> bool:
    """Whether torch says that a collective lost the other side."""
    return isinstance(error, RuntimeError) and ("gloo/" in str(error) or type(error).__name__ == "DistBackendError")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without torch's C++ trace."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
