"""What `isft doctor` says of one thing that it looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: `ok` is True (green), False (red) or None (for the reader to judge); `mend` says what to do when red."""

    name: str
    ok: bool | None
    detail: str
    mend: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)
