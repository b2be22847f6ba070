"""`isft samples`: the right samples, page by page, from a run of any size, and nothing that steers a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from itertools import islice

import pytest
import report_runs
from report_runs import call, call_json

from iterative_sft_cli import Run
from iterative_sft_cli.report.query import SampleQuery, ScoreCondition, find_samples


def test_samples_are_those_of_the_shards_joined_with_their_verdicts(done, capsys):
    rows = call_json(capsys, "samples", done, "--limit", 0)
    stored = list(Run.open(done).iter_samples([3]))
    assert [row["sample_id"] for row in rows] == [one.sample.sample_id for one in stored] and len(rows) == 48
    for row, one in zip(rows, stored, strict=True):
        assert row["completion"] == one.sample.completion and row["accepted"] == one.accepted
        assert row["says"] == [dict(says) for says in one.says] and row["round"] == 3
        assert (row["reason"] is None) == row["accepted"]


def test_filters_of_the_command_agree_with_a_scan(done, capsys):
    stored = list(Run.open(done).iter_samples([1]))
    wanted = {
        ("--accepted",): lambda one: one.accepted,
        ("--rejected",): lambda one: not one.accepted,
        ("--filter", "dedup"): lambda one: not one.accepted and one.rejected_by["filter"] == "dedup",
        ("--reason", "wrong_answer"): lambda one: not one.accepted and one.rejected_by["reason"] == "wrong_answer",
        ("--score", "numeric_answer>=1"): lambda one: any(s.get("score") == 1 for s in one.says),
        ("--prompt", "3"): lambda one: one.sample.prompt_id == "3",
        ("--rejected", "--prompt", "3"): lambda one: not one.accepted and one.sample.prompt_id == "3",
    }
    for options, keep in wanted.items():
        rows = call_json(capsys, "samples", done, "--round", 1, "--limit", 0, *options)
        expected = [one.sample.sample_id for one in stored if keep(one)]
        assert [row["sample_id"] for row in rows] == expected and expected, options


def test_one_prompt_over_all_rounds(done, capsys):
    rows = call_json(capsys, "samples", done, "--prompt", "0", "--limit", 0)
    assert [row["round"] for row in rows] == [1] * 4 + [3] * 4 and {row["prompt_id"] for row in rows} == {"0"}
    code, out, _ = call(capsys, "samples", done, "--prompt", "0", "--limit", 0)
    assert code == 0 and out.count("prompt 0") == 1 and "--- round 1" in out and "--- round 3" in out


def test_pages_follow_one_another(done, capsys):
    whole = [row["sample_id"] for row in call_json(capsys, "samples", done, "--limit", 0)]
    pages = [call_json(capsys, "samples", done, "--limit", 20, "--skip", skip) for skip in (0, 20, 40)]
    assert [row["sample_id"] for page in pages for row in page] == whole
    _, out, err = call(capsys, "samples", done, "--limit", 2, "--rejected")
    assert "--skip 2" in err and "--skip" not in out


def test_the_samples_of_the_evaluation(done, capsys):
    rows = call_json(capsys, "samples", done, "--eval", "--round", 0, "--limit", 0)
    assert len(rows) == 24 and rows[0]["prompt"] == "4+0"
    assert all(row["accepted"] == (row["completion"] == f"The answer is {row['answer']}.") for row in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--accepted", "--rejected"), "exclude each other"),
        (("--round", "9"), "expected one of 1, 2, 3"),
        (("--filter", "nope"), "expected one of generate, finished, numeric_answer, dedup"),
        (("--score", "high"), "numeric_answer>=0.5"),
        (("--limit", "-1"), "0 or more"),
    ],
)
def test_a_wrong_option_is_exit_2_with_what_is_right(done, capsys, options, said):
    code, out, err = call(capsys, "samples", done, *options)
    assert code == 2 and said in err and out == ""


def test_no_run_and_no_samples(tmp_path, capsys):
    code, _, err = call(capsys, "samples", tmp_path)
    assert code == 4 and "no run here" in err
    run = report_runs.write_large(tmp_path / "run", 0)
    code, out, err = call(capsys, "samples", run, "--json")
    assert code == 0 and json.loads(out) == [] and "no samples yet" in err


def test_what_is_not_judged_yet_is_said(tmp_path, capsys):
    run = report_runs.write_large(tmp_path / "run", 64, per_shard=64)
    for file in (run / "rounds" / "0001").glob("verdicts-*"):
        file.unlink()
    code, out, err = call(capsys, "samples", run)
    assert code == 0 and out == "" and "64 are not judged yet" in err


def test_texts_cannot_steer_the_terminal(tmp_path, capsys):
    run = report_runs.write_large(tmp_path / "run", 8)
    folder = run / "rounds" / "0001"
    row = json.loads((folder / "generated-00000.jsonl").read_text().splitlines()[0])
    evil = "\x1b]0;owned\x07\x1b[2J\u202eabc\r[bold red]x[/bold red]\u2028"
    row |= {"completion": evil}
    report_runs.write_shard(run, 1, "generated-00000", [row], {})
    says = {"filter": "f\x1b[31m", "keep": False, "reason": "bad\x1b[0m", "extra": {"why\x07": "\x1b[2J"}}
    report_runs.write_shard(
        run, 1, "verdicts-00000", [{"sample_id": row["sample_id"], "kept": False, "says": [says]}], {}
    )
    for options in ((), ("--json",)):
        _, out, err = call(capsys, "samples", run, *options)
        assert not any(c in out + err for c in "\x1b\x07\r\u202e\u2028"), options
    _, out, _ = call(capsys, "samples", run)
    assert "[bold red]x[/bold red]" in out and "\\x1b]0;owned" in out


def test_a_damaged_shard_is_an_error_and_not_a_wrong_page(tmp_path, capsys):
    run = report_runs.write_large(tmp_path / "run", 32)
    path = run / "rounds" / "0001" / "generated-00000.jsonl"
    path.write_bytes(path.read_bytes().replace(b"It is 1.", b"It is 2."))
    code, out, err = call(capsys, "samples", run)
    assert code == 4 and "isft verify" in err and "It is" not in out


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return report_runs.write_large(tmp_path_factory.mktemp("large") / "run", 100_000)


def test_the_first_page_of_a_large_run_is_quick_and_small(large):
    view = Run.open(large).view
    queries = [
        SampleQuery((1,)),
        SampleQuery((1,), accepted=False),
        SampleQuery((1,), prompt_id="p12000"),
    ]
    for query in queries:
        tracemalloc.start()
        start = time.process_time()
        page = list(islice(find_samples(view, query), 20))
        seconds = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # 0.5 s are the promise for a million samples; tracing slows down about threefold
        assert page and seconds < 0.5, query
        assert peak < 12_000_000, query
    assert [one.sample.sample_id for one in page] == [f"1-p12000-{i}" for i in range(8)]


def test_a_late_page_and_a_rare_reason_are_found(large):
    view = Run.open(large).view
    page = list(islice(find_samples(view, SampleQuery((1,)), skip=99_992), 20))
    assert [one.sample.sample_id for one in page] == [f"1-p12499-{i}" for i in range(8)]
    rare = list(find_samples(view, SampleQuery((1,), reason="rare")))
    assert [one.sample.sample_id for one in rare] == [f"1-p12499-{i}" for i in (1, 2, 3, 5, 6, 7)]
    assert not list(find_samples(view, SampleQuery((1,), prompt_id="p99999")))


def test_score_conditions():
    says = [{"filter": "a", "score": 0.5}, {"filter": "b", "score": None}]
    for text, holds in {"a>=0.5": True, "a>0.5": False, "a<1": True, "a=.5": True, "b<9": False, "c>0": False}.items():
        assert ScoreCondition.parse(text).holds(says) is holds, text


def test_commands_that_need_no_model_import_no_torch(done, tmp_path):
    runs = [
        ["samples", done],
        ["samples", done, "--eval", "--json"],
        ["show", done],
        ["why", done, "1-0-2"],
        ["list", done.parent],
        ["compare", done],
        ["compare", done, done, done],
        ["verify", done],
        ["refilter", done, "--round", "1", "--fork", tmp_path / "fork"],
        ["report", done, "--out", tmp_path / "page.html"],
        ["export", done, "--to", "sft-jsonl", "--out", tmp_path / "rows.jsonl"],
        ["export", done, "--to", "dpo-jsonl", "--out", tmp_path / "pairs.jsonl"],
        ["docs"],
        ["docs", "config"],
        ["docs", "cli"],
    ]
    code = f"""
import sys
from iterative_sft_cli.cli import run
for argv in {[[str(word) for word in argv] for argv in runs]!r}:
    assert run(argv) == 0, argv
    heavy = [m for m in ("torch", "transformers", "datasets", "numpy", "pandas", "peft") if m in sys.modules]
    assert not heavy, (argv, heavy)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_greedy_samples_of_the_evaluation_belong_to_their_prompt(tmp_path, capsys):
    from iterative_sft_cli.report.paging import prompt_of

    assert [prompt_of(one, 1) for one in ("1-a-0", "1-a--1", "1-a-5-3", "1-a-1000000")] == ["a", "a", "a-5", "a"]
    run = report_runs.train(tmp_path, rounds=1, eval={"greedy": True})
    rows = call_json(capsys, "samples", run, "--eval", "--prompt", "3", "--limit", 0)
    assert [row["sample_index"] for row in rows] == [0, 1, -1] * 2
