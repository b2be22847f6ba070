"""What a person sees of a run: live bars and tables on a terminal, plain periodic lines elsewhere; all of it on stderr.

Every text that comes from a model, a prompt, a filter or a file goes through `safe_text` first.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from iterative_sft_cli.samples import StoredSample

PLAIN_EVERY_S = 30.0
"""Seconds between two lines of a phase when there is no terminal."""
TABLE_ROWS = 12
"""Newest rounds in the table that is shown after each round."""
ENOUGH_SAMPLES = 64
"""Finished samples from which on their own number is what is extrapolated."""
ETA_AFTER_S = 12.0
"""Seconds of work after which the first estimate for the whole run is given."""


def safe_text(text: object, limit: int | None = None) -> str:
    """`text` with every character that could steer a terminal made visible: C0, C1, DEL, bidi, zero-width, surrogates.

    Newlines and tabs are kept; `limit` cuts to so many characters and says how many are left out.
    """
    raw = str(text)
    cut = raw if limit is None or len(raw) <= limit else raw[:limit]
    out = "".join(c if _is_plain(c) else _visible(c) for c in cut)
    return out if len(cut) == len(raw) else f"{out} [... {len(raw) - len(cut)} more]"


def _is_plain(char: str) -> bool:
    code = ord(char)
    if char in "\n\t":
        return True
    if code < 0x20 or 0x7F <= code <= 0x9F or 0xD800 <= code <= 0xDFFF:
        return False
    hidden = (
        code in (0xAD, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180E, 0x3164, 0xFEFF, 0xFFA0)
        or 0x200B <= code <= 0x200F
        or 0x2028 <= code <= 0x202E
        or 0x2060 <= code <= 0x206F
        or 0xFFF0 <= code <= 0xFFFB
        or 0xE0000 <= code <= 0xE0FFF
    )
    return not hidden


def _visible(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: object, limit: int = 100) -> str:
    """`safe_text` on a single line, runs of white space as one blank."""
    return safe_text(" ".join(str(text).split()), limit)


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 2 m 05 s, 3 h 20 m."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as one text: a string as it is, chat messages by their last user turn."""
    if isinstance(prompt, str):
        return prompt
    turns = [message for message in prompt if message.get("role") == "user"] or list(prompt)
    return str(turns[-1].get("content", "")) if turns else ""


def verdict_text(stored: StoredSample) -> str:
    """Why a sample was kept or dropped, in a few words."""
    rejected = stored.rejected_by
    if rejected is not None:
        return f"{rejected['filter']}: {rejected.get('reason') or 'rejected'}"
    scores = [f"{says['filter']} {says['score']:.3g}" for says in stored.says if says.get("score") is not None]
    return ", ".join(scores) or "kept by all"


COLUMNS = (
    ("round", "round", "{:d}"),
    ("prompts", "generate/num_prompts", "{:d}"),
    ("samples", "generate/num_samples", "{:d}"),
    ("accepted", "filters/num_accepted", "{:d}"),
    ("rate", "filters/accept_rate", "{:.2f}"),
    ("unique", "filters/num_unique", "{:d}"),
    ("tokens", "generate/num_tokens", "{:d}"),
    ("loss", "train/loss", "{:.3f}"),
)


def short_count(count: int) -> str:
    """A count in at most five characters: 812, 24.6k, 1.3M."""
    if count < 10_000:
        return str(count)
    return f"{count / 1e3:.1f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"


def round_cells(row: Mapping[str, Any], metric: str = "eval/pass@1") -> list[str]:
    """The cells of a round's row in the table, without its time; '-' where a figure does not exist."""
    cells = []
    for name, key, form in COLUMNS:
        value = row.get(key)
        cells.append("-" if value is None else short_count(value) if name == "tokens" else form.format(value))
    if row.get(metric) is None:
        return [*cells, "-"]
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    interval = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
    return [*cells, f"{row[metric]:.2f}{interval}"]


class Estimate:
    """Predicts the wall time of the whole run from the tokens made so far; training is taken to last three times as long as generation."""

    def __init__(self, rounds: int, first_round: int, eval_samples: int, samples: int, max_new_tokens: int) -> None:
        rounds_left = rounds - max(first_round, 1) + 1
        evals_left = rounds_left + (1 if first_round == 0 else 0)
        self._samples = evals_left * eval_samples + rounds_left * samples * 4
        self._max_new_tokens = max_new_tokens
        self._start = time.monotonic()
        self._done = 0
        self._tokens = 0
        self.said = False

    def add(self, num_samples: int, num_tokens: int) -> float | None:
        """Count work done; the estimate in seconds once enough was seen, the first time only."""
        self._done += num_samples
        self._tokens += num_tokens
        elapsed = time.monotonic() - self._start
        if self.said or not (self._done or self._tokens) or elapsed < ETA_AFTER_S:
            return None
        self.said = True
        if self._done >= ENOUGH_SAMPLES or not self._tokens:
            return self._samples * elapsed / self._done
        # the first samples to finish are the short ones: until there are enough, half the limit is taken as their length
        return self._samples * self._max_new_tokens / 2 * elapsed / self._tokens


class PhaseView:
    """One phase on the screen or in the log; `advance` is called from the loop."""

    def __init__(self, console: Console, name: str, round_index: int, total: int, unit: str) -> None:
        self.console, self.name, self.round_index, self.total, self.unit = console, name, round_index, total, unit
        self.done = 0
        self.tokens = 0
        self.start = time.monotonic()
        self._last_line = self.start
        self._task: Any = None

    def advance(self, amount: int = 0, tokens: int = 0) -> None:
        """Count work done: `amount` of the phase's unit and `tokens` processed."""
        self.done += amount
        self.tokens += tokens
        self.console.tick(self)
        if self.name != "train":
            self.console._estimate_run(amount, tokens)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def rate(self) -> str:
        """Tokens per second so far, or nothing."""
        return f"{self.tokens / self.seconds:,.0f} tok/s" if self.tokens and self.seconds > 0.5 else ""

    def eta(self) -> str:
        """What is left of the phase, in words."""
        if not self.done or self.done >= self.total:
            return ""
        return f"{duration(self.seconds / self.done * (self.total - self.done))} left"


class Console:
    """The view of one run. On a terminal: a bar with ETA for each phase; otherwise a line every half minute."""

    def __init__(self, stream: IO[str] | None = None, *, quiet: bool = False, record: bool = False) -> None:
        from rich.console import Console as RichConsole

        self._rich = RichConsole(
            file=stream or sys.stderr, highlight=False, markup=False, soft_wrap=False, record=record, emoji=False
        )
        self._live_ok = self._rich.is_terminal and not quiet and os.environ.get("TERM") != "dumb"
        self._quiet = quiet
        self._progress: Any = None
        self._task: Any = None
        self._rows: list[tuple[dict[str, Any], float | None]] = []
        self._estimate: Estimate | None = None
        self._smaller: str | None = None
        self.metric = "eval/pass@1"

    @property
    def rich(self) -> Any:
        """The rich console underneath, for exporting a picture."""
        return self._rich

    def expect(
        self,
        *,
        rounds: int,
        first_round: int,
        eval_samples: int,
        samples: int,
        max_new_tokens: int,
        smaller: str | None = None,
    ) -> None:
        """Tell how much work the run has, for the estimate; `smaller` names a config to suggest when it takes over 10 minutes."""
        self._estimate = Estimate(rounds, first_round, eval_samples, samples, max_new_tokens)
        self._smaller = smaller

    def note(self, text: str) -> None:
        """One line to the user."""
        if not self._quiet:
            self._print(safe_text(text), wrap=False)

    def _print(self, renderable: Any, *, wrap: bool = True) -> None:
        target = self._progress.console if self._progress is not None else self._rich
        # a path or a command that is wrapped cannot be copied
        target.print(renderable, soft_wrap=not wrap)

    @contextmanager
    def phase(self, name: str, round_index: int, total: int, unit: str) -> Iterator[PhaseView]:
        """Show a phase while the block runs."""
        view = PhaseView(self, name, round_index, total, unit)
        if self._live_ok:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self._rich, transient=True, refresh_per_second=4) as progress:
                self._progress = progress
                self._task = progress.add_task(f"round {round_index} {name}", total=total, note="")
                try:
                    yield view
                finally:
                    self._progress = None
        else:
            yield view
        if view.done and not self._quiet:
            speed = f", {view.rate()}" if view.rate() else ""
            self._print(f"round {round_index} {name}: {view.done} {unit} in {duration(view.seconds)}{speed}")

    def tick(self, view: PhaseView) -> None:
        """Bring the screen up to date with a phase."""
        now = time.monotonic()
        if self._progress is not None:
            note = "  ".join(part for part in (view.unit, view.rate(), view.eta()) if part)
            self._progress.update(self._task, completed=view.done, note=note)
        elif not self._quiet and now - view._last_line >= PLAIN_EVERY_S:
            view._last_line = now
            parts = [part for part in (view.rate(), view.eta()) if part]
            tail = f" ({', '.join(parts)})" if parts else ""
            self._print(f"round {view.round_index} {view.name}: {view.done} of {view.total} {view.unit}{tail}")

    def _estimate_run(self, num_samples: int, num_tokens: int) -> None:
        seconds = self._estimate.add(num_samples, num_tokens) if self._estimate is not None else None
        if seconds is None:
            return
        self.note(f"estimate: about {duration(seconds)} for the whole run on this machine")
        if seconds > 600 and self._smaller:
            self.note(f"hint: {self._smaller} is a smaller version of this config")

    def earlier_round(self, row: Mapping[str, Any]) -> None:
        """Take in a round that an earlier call finished, so that the table is whole."""
        self._rows.append((dict(row), None))

    def samples(self, round_index: int, accepted: Sequence[StoredSample], rejected: Sequence[StoredSample]) -> None:
        """Show a few samples of the round with what was decided and why."""
        if self._quiet or not (accepted or rejected):
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for name in ("verdict", "prompt", "completion", "why"):
            table.add_column(name, overflow="fold")
        for word, style, group in (("accepted", "green", accepted), ("rejected", "red", rejected)):
            for stored in group:
                table.add_row(
                    Text(word, style=style),
                    Text(one_line(prompt_text(stored.sample.prompt), 60)),
                    Text(one_line(stored.sample.completion, 70)),
                    Text(one_line(verdict_text(stored), 40)),
                )
        self._print(table)

    def round_done(self, row: dict[str, Any], seconds: float) -> None:
        """Show the table of rounds with the new row last."""
        self._rows.append((row, seconds))
        if not self._quiet:
            self._print(self.rounds_table(self._rows[-TABLE_ROWS:]))

    def rounds_table(self, rows: Sequence[tuple[Mapping[str, Any], float | None]]) -> Any:
        """A table of rounds; the time column is left empty where it is not known."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        names = [name for name, _, _ in COLUMNS] + [self.metric.removeprefix("eval/") + " (95 %)", "time"]
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for row, seconds in rows:
            table.add_row(*round_cells(row, self.metric), "" if seconds is None else f"{seconds:.0f} s")
        return table
