"""`isft export --to inspect`: logs that Inspect's own reader takes, with the run's answers, verdicts and figures."""

from __future__ import annotations

import sys

import pytest
import report_runs
from report_runs import call, call_json
from test_report_page import hostile

from iterative_sft_cli import Run


@pytest.fixture
def inspect_log():
    pytest.importorskip("inspect_ai", reason="inspect-ai is not installed (extra: inspect)")
    from inspect_ai import log

    return log


def test_inspects_reader_finds_the_evaluation(done, tmp_path, capsys, inspect_log):
    made = call_json(capsys, "export", done, "--to", "inspect", "--out", tmp_path / "logs")
    assert made["logs"] == [f"round-{index:04d}.eval" for index in range(4)] and "inspect view" in made["next"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == made["logs"]
    run = Run.open(done)
    listed = inspect_log.list_eval_logs(str(tmp_path / "logs"))
    assert len(listed) == 4
    for index, name in enumerate(made["logs"]):
        found = inspect_log.read_eval_log(str(tmp_path / "logs" / name))
        rows, _ = run.view.shards.read(index, "eval-00000")
        assert found.status == "success" and len(found.samples) == len(rows) == found.results.total_samples
        figures = found.results.scores[0].metrics
        assert figures["pass@1"].value == run.stats[index]["eval/pass@1"]
        by_id = {sample.metadata["sample_id"]: sample for sample in found.samples}
        for row in rows:
            sample = by_id[row["sample_id"]]
            assert sample.output.completion == row["completion"] and sample.messages[-1].text == row["completion"]
            assert (sample.scores["correct"].value == "C") == row["correct"]
            assert sample.scores["correct"].answer == row["answer"]
            assert sample.id == row["prompt_id"] and sample.epoch == row["sample_index"] + 1
        assert found.eval.config.epochs == 2 and found.eval.model_generate_config.max_tokens == 64
    assert found.samples[0].target == "4" and found.samples[0].input[0].text == "4+0"


def test_one_round_and_what_is_wrong(done, tmp_path, capsys, inspect_log):
    made = call_json(capsys, "export", done, "--to", "inspect", "--round", 2, "--out", tmp_path / "logs")
    assert made["logs"] == ["round-0002.eval"]
    for options, said in (
        (("--round", "9", "--out", tmp_path / "x"), "not evaluated"),
        (("--checkpoint", "0003"), "--checkpoint says nothing"),
        (("--out", tmp_path / "logs"), "there already"),
    ):
        code, _, err = call(capsys, "export", done, "--to", "inspect", *options)
        assert code == 2 and said in err, options


def test_hostile_texts_are_texts(tmp_path, inspect_log):
    from iterative_sft_cli.report.export_inspect import log_of

    run = hostile(tmp_path, "\x1b[2J\ud800<script>\u2028")
    shards = run.view.shards
    rows = shards.read(1, "generated-00000")[0]
    said = shards.read(1, "verdicts-00000")[0]
    both = [
        {**row, "correct": one["kept"], "answer": "\ud800", "says": one["says"]}
        for row, one in zip(rows, said, strict=True)
    ]
    report_runs.write_shard(run.path, 1, "eval-00000", both, {"weights": "w"})
    inspect_log.write_eval_log(log_of(run, 1), str(tmp_path / "x.eval"))
    assert len(inspect_log.read_eval_log(str(tmp_path / "x.eval")).samples) == 16


def test_without_the_library_or_an_evaluation(done, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "inspect_ai.log", None)
        patch.setitem(sys.modules, "inspect_ai", None)
        code, _, err = call(capsys, "export", done, "--to", "inspect", "--out", tmp_path / "x")
    assert code == 2 and "iterative-sft-cli[inspect]" in err and not (tmp_path / "x").exists()
