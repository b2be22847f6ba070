"""`isft samples --tui`: what the keys do, on a screen that textual's pilot drives."""

from __future__ import annotations

import asyncio
import sys

import pytest
import report_runs
from report_runs import call

from iterative_sft_cli import Run
from iterative_sft_cli.report.query import SampleQuery, sampled_rounds

pytest.importorskip("textual")


def drive(run, query, steps):
    """Run `steps(app, pilot)` in a browser of 100 x 40."""
    from iterative_sft_cli.report.browse import Browser

    view = Run.open(run).view

    async def main():
        app = Browser(view, query, sampled_rounds(view))
        async with app.run_test(size=(100, 40)) as pilot:
            await pilot.pause()
            await steps(app, pilot)

    asyncio.run(main())


def table_of(app):
    """(ids of the rows, text of the detail, heading)."""
    from textual.widgets import DataTable, Static

    table = app.query_one(DataTable)
    ids = [str(table.get_row_at(i)[0]) for i in range(table.row_count)]
    return ids, str(app.query_one("#text", Static).render()), app.heading()


def test_keys_choose_round_verdict_and_prompt(done):
    stored = {index: list(Run.open(done).iter_samples([index])) for index in (1, 2, 3)}

    def ids(index, accepted=None):
        return [one.sample.sample_id for one in stored[index] if accepted in (None, one.accepted)]

    async def steps(app, pilot):
        assert table_of(app)[0] == ids(3) and "round 3, 1 to 48" in table_of(app)[2]
        await pilot.press("r")
        assert table_of(app)[0] == ids(3, False) and "round 3: rejected" in table_of(app)[2]
        await pilot.press("left_square_bracket")
        assert table_of(app)[0] == ids(2, False)
        await pilot.press("r", "a")
        assert table_of(app)[0] == ids(2, True)
        await pilot.press("escape", "right_square_bracket")
        assert table_of(app)[0] == ids(3)
        await pilot.press("down", "down")
        await pilot.pause()
        third = stored[3][2]
        shown = table_of(app)[1]
        assert third.sample.sample_id in shown and third.sample.completion in shown and "numeric_answer: " in shown
        await pilot.press("p")
        mine = [
            one.sample.sample_id
            for index in (1, 2, 3)
            for one in stored[index]
            if one.sample.prompt_id == third.sample.prompt_id
        ]
        assert table_of(app)[0] == mine and f"prompt {third.sample.prompt_id}" in table_of(app)[2]
        await pilot.press("q")

    drive(done, SampleQuery((3,)), steps)


def test_pages_of_a_large_run(tmp_path):
    run = report_runs.write_large(tmp_path / "run", 1_000)

    async def steps(app, pilot):
        first = table_of(app)[0]
        await pilot.press("n")
        second = table_of(app)
        assert len(first) == len(second[0]) == 100 and second[0][0] == "1-p12-4" and "101 to 200, more" in second[2]
        await pilot.press("b", "b")
        assert table_of(app)[0] == first
        await pilot.press(*("n" for _ in range(12)))
        assert table_of(app)[0][-1] == "1-p124-7" and "more" not in table_of(app)[2]

    drive(run, SampleQuery((1,)), steps)


def test_no_text_of_the_run_is_markup_or_steers_the_terminal(tmp_path):
    from test_report_page import hostile

    evil = "[red]x[/red][@click=app.quit]y[/] \x1b]0;owned\x07"
    run = hostile(tmp_path, evil)

    async def steps(app, pilot):
        ids, shown, _ = table_of(app)
        assert len(ids) == 16 and "[@click=app.quit]y[/]" in shown and "\x1b" not in shown and "\\x1b]0;owned" in shown

    drive(run.path, SampleQuery((1,)), steps)


def test_nothing_is_as_asked(done):
    async def steps(app, pilot):
        assert table_of(app)[0] == [] and "nothing is as asked" in table_of(app)[2]
        await pilot.press("p", "n", "down")

    drive(done, SampleQuery((1,), reason="none_such"), steps)


def test_without_a_terminal_or_the_library_it_is_refused(done, capsys, monkeypatch):
    code, out, err = call(capsys, "samples", done, "--tui")
    assert code == 2 and "needs a terminal" in err and out == ""
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "textual", None)
    monkeypatch.setitem(sys.modules, "textual.app", None)
    monkeypatch.delitem(sys.modules, "iterative_sft_cli.report.browse", raising=False)
    code, out, err = call(capsys, "samples", done, "--tui")
    assert code == 2 and "pip install 'iterative-sft-cli[tui]'" in err and out == ""
