"""`isft report --plots`: pictures of the figures of the run, and of nothing else."""

from __future__ import annotations

import sys

import pytest
from report_runs import call
from test_report_page import hostile

from iterative_sft_cli import Run
from iterative_sft_cli.report.plots import plain, write_plots

pytest.importorskip("matplotlib")


def test_a_picture_for_every_chart(done, tmp_path, capsys):
    code, out, err = call(capsys, "report", done, "--plots", tmp_path / "deep" / "plots")
    assert code == 0, err
    written = sorted(path.name for path in (tmp_path / "deep" / "plots").iterdir())
    names = ["accepted", "diversity", "eval", "funnel", "learning-rate", "length", "loss"]
    assert written == [f"{name}.png" for name in names] and len(out.splitlines()) == len(names)
    for path in (tmp_path / "deep" / "plots").iterdir():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5_000 and b"matplotlib" not in data


def test_the_curves_are_the_runs_figures(done, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, bands = {}, []
    plot, fill = Axes.plot, Axes.fill_between
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **o: drawn.update({o["label"]: (x, y)}) or plot(self, x, y, **o)
    )
    monkeypatch.setattr(Axes, "fill_between", lambda self, *a, **o: bands.append(a) or fill(self, *a, **o))
    write_plots(Run.open(done), tmp_path)
    stats = Run.open(done).stats
    assert drawn["pass@1"] == ([0.0, 1.0, 2.0, 3.0], [row["eval/pass@1"] for row in stats])
    assert [list(part) for part in bands[0]][1:] == [
        [row[f"eval/pass@1_{end}"] for row in stats] for end in ("low", "high")
    ]
    assert drawn["after dedup"][1] == [row["filters/num_accepted"] / 48 for row in stats[1:]]


def test_names_are_drawn_as_they_are(tmp_path):
    assert plain("$\\frac{1}{0}$") == "\\$\\frac{1}{0}\\$" and plain("_hidden") == " _hidden"
    for number, evil in enumerate(("$\\undefined{", "a\nb\x1b[2J", "x" * 500)):
        assert write_plots(hostile(tmp_path / str(number), evil), tmp_path / f"out{number}")


def test_nothing_to_draw_and_no_library(done, tmp_path, capsys, monkeypatch):
    import report_runs

    run = report_runs.write_large(tmp_path / "run", 0)
    code, _, err = call(capsys, "report", run, "--plots", tmp_path / "x")
    assert code == 4 and "nothing to draw yet" in err and not (tmp_path / "x").exists()
    assert call(capsys, "report", done, "--plots", tmp_path / "x", "--out", tmp_path / "y")[0] == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, _, err = call(capsys, "report", done, "--plots", tmp_path / "x")
    assert code == 2 and "iterative-sft-cli[plots]" in err
