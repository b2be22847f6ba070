"""Sends each round's statistics and a few samples to the trackers that the config names, through accelerate's tracker classes.

A tracker sees what `stats.jsonl` holds, once a round, after it is written; a tracker that fails costs the run nothing but a line.
"""

from __future__ import annotations

import atexit
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any

from iterative_sft_cli.console import PhaseView, one_line, prompt_text, verdict_text
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.samples import StoredSample


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know or whose library is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for index, name in enumerate(names):
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"there is no tracker `{name}`", where=f"tracking[{index}]", expected=f"one of {known}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"the library {name} is not installed", where=f"tracking[{index}]", hint=f"pip install {name}"
            )


class TrackedView:
    """A view that also tells trackers; everything else goes to the view it wraps."""

    def __init__(self, view: Any, names: Sequence[str], run_dir: Path) -> None:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers ask it whether this is the main process
        self._view = view
        self._samples = ""
        self._trackers: list[tuple[str, Any]] = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            options = {"logging_dir": str(run_dir / "tracking")} if kind.requires_logging_directory else {}
            try:
                with redirect_stdout(sys.stderr):  # stdout is for data
                    tracker = kind(run_dir.name, **options)
                    if hasattr(tracker, "start"):
                        tracker.start()
            except Exception as error:  # no account, no server: the run goes on without it
                view.note(f"warning: {name} did not start: {one_line(error, 200)}")
                continue
            self._trackers.append((name, tracker))
        # a tracker's own exit hook was registered before this one, so it runs after it and finds stdout turned away
        atexit.register(_stdout_is_for_data)

    def phase(self, name: str, round_index: int, total: int, unit: str) -> AbstractContextManager[PhaseView]:
        """Shown by the wrapped view."""
        shown: AbstractContextManager[PhaseView] = self._view.phase(name, round_index, total, unit)
        return shown

    def note(self, text: str) -> None:
        """Shown by the wrapped view."""
        self._view.note(text)

    def samples(self, round_index: int, accepted: Sequence[StoredSample], rejected: Sequence[StoredSample]) -> None:
        """Shown by the wrapped view, and kept for the round's entry."""
        self._view.samples(round_index, accepted, rejected)
        lines = [
            f"{word}: {one_line(prompt_text(one.sample.prompt), 200)} -> {one_line(one.sample.completion, 400)} "
            f"({one_line(verdict_text(one), 100)})"
            for word, group in (("accepted", accepted), ("rejected", rejected))
            for one in group
        ]
        self._samples = "\n\n".join(lines)

    def round_done(self, row: dict[str, Any], seconds: float) -> None:
        """Shown by the wrapped view; numbers and samples go to every tracker under the round's index."""
        self._view.round_done(row, seconds)
        values: dict[str, Any] = {
            key: value for key, value in row.items() if isinstance(value, int | float) and key != "round"
        }
        if self._samples:
            values["samples"] = self._samples
        for name, tracker in self._trackers:
            try:
                with redirect_stdout(sys.stderr):
                    tracker.log(values, step=row["round"])
            except Exception as error:  # a tracker's trouble is not the run's
                self._view.note(f"warning: {name} did not take round {row['round']}: {one_line(error, 200)}")

    def finish(self) -> None:
        """End every tracker's run."""
        for name, tracker in self._trackers:
            try:
                with redirect_stdout(sys.stderr):
                    tracker.finish()
            except Exception as error:
                self._view.note(f"warning: {name} did not end well: {one_line(error, 200)}")


def _stdout_is_for_data() -> None:
    sys.stdout.flush()
    sys.stdout = sys.stderr
