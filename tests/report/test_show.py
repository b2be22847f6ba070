"""`isft show`: how a run stands, whatever it is doing and however it ended."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time

import pytest
import report_runs
from report_runs import call, call_json

from iterative_sft_cli import Run
from iterative_sft_cli.console import Console
from iterative_sft_cli.errors import GuardStop
from iterative_sft_cli.experiment import run_experiment
from iterative_sft_cli.report.screen import sparkline
from iterative_sft_cli.report.show import funnel_of, funnel_table


def test_a_finished_run(done, capsys):
    found = call_json(capsys, "show", done)
    assert found["status"]["state"] == "complete" and found["status"]["rounds_done"] == 3
    assert found["rounds"] == Run.open(done).stats and found["best_round"] == 3
    assert [one["round"] for one in found["funnels"]] == [1, 2, 3]
    for one, row in zip(found["funnels"], Run.open(done).stats[1:], strict=True):
        assert [each["filter"] for each in one["filters"]] == ["finished", "numeric_answer", "dedup"]
        assert one["filters"] == funnel_of(row)
    code, out, err = call(capsys, "show", done)
    assert code == 0 and err == "" and "complete, 3 of 3 rounds" in out
    for word in ("pass@1", "wrong_answer", "accepted share", "trained from checkpoint 0002", "best by pass@1: round 3"):
        assert word in out, word


def test_the_funnel_adds_up(done):
    last = Run.open(done).stats[-1]
    funnel = funnel_of(last)
    for before, after in zip(funnel, funnel[1:], strict=False):
        assert before["entered"] - before["dropped"] == after["entered"]
    assert all(sum(one["reasons"].values()) == one["dropped"] for one in funnel)
    assert funnel[-1]["entered"] - funnel[-1]["dropped"] == last["filters/num_accepted"]


def test_every_rounds_funnel_stands_in_the_table(done, capsys, monkeypatch):
    stats = Run.open(done).stats[1:]
    _, out, _ = call(capsys, "show", done)
    lines = {" ".join(line.split()[:-3]): line.split()[-3:] for line in out.splitlines() if len(line.split()) > 3}
    assert lines["generated"] == ["48"] * 3
    assert lines["wrong_answer"] == [f"-{row['filters/numeric_answer/reason/wrong_answer']}" for row in stats]
    assert lines["dedup"] == [str(row["filters/num_accepted"]) for row in stats]
    narrow = funnel_table([{"round": n, "filters": funnel_of(stats[0])} for n in range(1, 13)], 80)
    assert len(narrow.columns) == 6 and "newest 5 of 12 rounds" in narrow.title


def test_the_lineage_is_what_happened(done, tmp_path, capsys):
    rows = call_json(capsys, "show", done)["lineage"]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["started_from"] is None and rows[1]["started_from"] == "the starting model"
    assert rows[1]["weights"] == ["toy-base"] and rows[1]["pruned"] and rows[1]["checkpoint"] is None
    assert rows[3]["generated_with"] == rows[3]["started_from"] == "checkpoint 0002"
    assert rows[3]["data_rounds"] == [3] and rows[3]["num_rows"] == 12 and rows[3]["num_steps"] == 6
    other = report_runs.train(tmp_path, train={"start_from": "base", "data": "accumulate"}, rounds=2)
    rows = call_json(capsys, "show", other)["lineage"]
    assert rows[2]["started_from"] == "the starting model" and rows[2]["data_rounds"] == [1, 2]
    assert rows[2]["generated_with"] == "checkpoint 0001"


def test_a_run_stopped_by_a_guard_says_why_and_what_next(tmp_path, capsys):
    config = report_runs.write_config(tmp_path, filters=["finished", {"length": {"max": 1}}])
    with pytest.raises(GuardStop):
        run_experiment(config, view=Console(io.StringIO()))
    status = call_json(capsys, "show", tmp_path / "run")["status"]
    assert status["state"] == "stopped" and status["exit_code"] == 3 and "none of 48" in status["reason"]
    assert status["next_command"].startswith("isft train")
    code, out, _ = call(capsys, "show", tmp_path / "run")
    assert code == 0 and "stopped: " in out and "next: isft train" in out and "48 of 48 samples generated" in out


def test_a_run_is_shown_while_it_goes_on_and_after_it_was_killed(tmp_path, capsys):
    config = report_runs.write_config(tmp_path, rounds=2)
    code = f"from iterative_sft_cli.cli import run; run(['train', {str(config)!r}])"
    env = {**os.environ, "TOY_DELAY_S": "0.05"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "rounds" / "0001").is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        status = call_json(capsys, "show", tmp_path / "run")["status"]
        assert status["state"] == "running" and str(process.pid) in status["holder"]
        assert status["phase"].startswith("round 1")
        assert process.poll() is None, "reading must not disturb the writer"
    finally:
        process.kill()
        process.wait()
    status = call_json(capsys, "show", tmp_path / "run")["status"]
    assert status["state"] == "killed" and status["next_command"] == f"isft resume {tmp_path / 'run'}"


def test_show_changes_nothing(done, capsys):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in done.rglob("*")}
    for options in ((), ("--json",), ("--watch", "0.1")):
        assert call(capsys, "show", done, *options)[0] == 0
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in done.rglob("*")}


def test_sparklines():
    assert sparkline([0.0, 0.5, None, 1.0], plain=False) == "▁▅ █"
    assert sparkline([2.0, 2.0, 2.0], plain=False) == "▄▄▄"
    assert sparkline([None]) == "" and sparkline([0, 1], plain=True) == "_@"


def test_a_run_that_was_only_created(tmp_path, capsys):
    from iterative_sft_cli.rundir import RunDir

    report_runs.train(tmp_path, rounds=1)
    resolved = Run.open(tmp_path / "run").config
    RunDir.create(tmp_path / "new", config_source=b"", resolved=resolved, environment={}).close()
    (tmp_path / "new" / "LOCK").unlink()
    found = call_json(capsys, "show", tmp_path / "new")
    assert found["status"]["state"] == "not started" and found["rounds"] == [] and found["funnels"] == []
    assert json.dumps(found)
