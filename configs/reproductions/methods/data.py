"""The comparison of methods needs no data of its own: reasoning-gym makes the tasks from their seeds."""

from pathlib import Path


def prepare(out: Path) -> None:
    """Nothing to make."""
