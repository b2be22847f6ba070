"""`isft samples --tui`: samples page by page on the whole screen. Needs the extra `tui` (textual); nothing else imports this module.

Only the page that is shown is in memory, every text is escaped, and the run is only read.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.widgets import DataTable, Footer, Static

from iterative_sft_cli.console import one_line, prompt_text, safe_text, verdict_text
from iterative_sft_cli.report.query import SampleQuery, find_samples
from iterative_sft_cli.report.sample_text import indented, says_text, whole_prompt
from iterative_sft_cli.rundir import RunView
from iterative_sft_cli.samples import StoredSample

PAGE = 100
"""Samples of a page."""
COLUMNS = ("sample", "verdict", "why", "tokens", "completion", "prompt")


class Browser(App[None]):
    """A table of samples above, everything about the chosen one below."""

    CSS = "DataTable { height: 1fr; } #detail { height: 1fr; border-top: solid $accent; padding: 0 1; } #head { height: 1; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("n", "page(1)", "next page"),
        ("b", "page(-1)", "back"),
        ("a", "keep('accepted')", "accepted"),
        ("r", "keep('rejected')", "rejected"),
        ("left_square_bracket", "round(-1)", "round -"),
        ("right_square_bracket", "round(1)", "round +"),
        ("p", "prompt", "this prompt"),
        ("escape", "whole", "all"),
        ("q", "quit", "quit"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, view: RunView, query: SampleQuery, there: list[int]) -> None:
        super().__init__()
        self._view, self._first, self._query, self._there = view, query, query, there
        self._page = 0
        self._shown: list[StoredSample] = []
        self._more = False

    def compose(self) -> ComposeResult:
        """The widgets."""
        yield Static(id="head", markup=False)
        yield DataTable(cursor_type="row", zebra_stripes=True)
        with VerticalScroll(id="detail"):
            yield Static(id="text", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Fill the first page."""
        self.query_one(DataTable).add_columns(*COLUMNS)
        self._load()

    def _load(self) -> None:
        found = list(islice(find_samples(self._view, self._query, skip=self._page * PAGE), PAGE + 1))
        self._shown, self._more = found[:PAGE], len(found) > PAGE
        table: DataTable[Text] = self.query_one(DataTable)
        table.clear()
        for one in self._shown:
            word, style = ("accepted", "green") if one.accepted else ("rejected", "red")
            table.add_row(
                Text(safe_text(one.sample.sample_id)),
                Text(word, style=style),
                Text(one_line(verdict_text(one), 40)),
                Text(str(len(one.sample.completion_ids)), justify="right"),
                Text(clipped(one.sample.completion, 44)),
                Text(clipped(prompt_text(one.sample.prompt), 60)),
            )
        self.query_one("#head", Static).update(Text(self.heading()))
        self._tell(0)
        table.focus()

    def heading(self) -> str:
        """What is shown, in a line."""
        query = self._query
        rounds = f"round {query.rounds[0]}" if len(query.rounds) == 1 else "rounds " + ", ".join(map(str, query.rounds))
        asked = {None: [], True: ["accepted"], False: ["rejected"]}[query.accepted]
        asked = [*asked, *(f"{name} {value}" for name, value in _named(query))]
        first = self._page * PAGE + 1
        numbers = f"{first} to {first + len(self._shown) - 1}" if self._shown else "nothing is as asked"
        return safe_text(
            f"{rounds}{': ' + ', '.join(asked) if asked else ''}, {numbers}{', more' if self._more else ''}"
        )

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Show the sample under the cursor."""
        self._tell(event.cursor_row)

    def _tell(self, row: int) -> None:
        text = describe(self._shown[row]) if row < len(self._shown) else Text("")
        self.query_one("#text", Static).update(text)
        self.query_one("#detail", VerticalScroll).scroll_home(animate=False)

    def action_page(self, by: int) -> None:
        """Turn the page."""
        if (by > 0 and self._more) or (by < 0 and self._page > 0):
            self._page += by
            self._load()

    def _ask(self, query: SampleQuery) -> None:
        self._query, self._page = query, 0
        self._load()

    def action_keep(self, word: str) -> None:
        """Accepted or rejected ones only; again: both."""
        wanted = word == "accepted"
        self._ask(replace(self._query, accepted=None if self._query.accepted is wanted else wanted))

    def action_round(self, by: int) -> None:
        """The same question to the round before or after."""
        at = self._there.index(self._query.rounds[-1]) + by
        if 0 <= at < len(self._there):
            self._ask(replace(self._query, rounds=(self._there[at],)))

    def action_prompt(self) -> None:
        """All samples of the chosen one's prompt, over all rounds."""
        row = self.query_one(DataTable).cursor_row
        if row < len(self._shown):
            prompt_id = self._shown[row].sample.prompt_id
            self._ask(SampleQuery(tuple(self._there), prompt_id=prompt_id, evaluation=self._query.evaluation))

    def action_whole(self) -> None:
        """Back to what the command asked for."""
        self._ask(self._first)


def _named(query: SampleQuery) -> list[tuple[str, object]]:
    parts = [("filter", query.filter_name), ("reason", query.reason), ("prompt", query.prompt_id)]
    scores = [("score", f"{one.name}{one.sign}{one.bound:g}") for one in query.scores]
    return [*((name, value) for name, value in parts if value is not None), *scores]


def clipped(text: str, limit: int) -> str:
    """A text on one line of at most `limit` characters."""
    line = one_line(text[: limit * 8], limit * 8)
    return line if len(line) <= limit and len(text) <= limit * 8 else f"{line[: limit - 1]}…"


def describe(stored: StoredSample) -> Text:
    """Everything that is stored of a sample, whole."""
    sample = stored.sample
    text = Text()

    def line(words: str, style: str = "") -> None:
        text.append(safe_text(words) + "\n", style=style)

    line(f"{sample.sample_id}  {'accepted' if stored.accepted else 'rejected'}", "bold")
    line(
        f"prompt {sample.prompt_id}" + ("" if sample.answer is None else f"  (answer: {one_line(sample.answer, 200)})")
    )
    text.append(indented(whole_prompt(sample.prompt), None) + "\n")
    line("completion" + ("  (second try, with a hint)" if stored.hinted else ""), "bold")
    text.append(indented(sample.completion, None) + "\n")
    line(f"{len(sample.completion_ids)} tokens, {sample.finish_reason}, seed {stored.seed}")
    for says in stored.says:
        line(f"{one_line(says['filter'])}: {says_text(says)}", "" if says["keep"] else "red")
    return text
