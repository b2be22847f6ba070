"""The loop on a toy model: what a run leaves behind, and that stopping after any phase changes nothing."""

import hashlib
import io
import json
from pathlib import Path

import pytest

from iterative_sft_cli import rounds as phases
from iterative_sft_cli.console import Console
from iterative_sft_cli.errors import ConfigError, DataError, GuardStop
from iterative_sft_cli.experiment import run_experiment
from iterative_sft_cli.rounds import evaluation, judge, search, training, verdicts
from iterative_sft_cli.rundir import RunDir, verify
from iterative_sft_cli.samples import iter_round

assert phases


def run(config: Path, **options):
    stream = io.StringIO()
    options.setdefault("view", Console(stream))
    outcome = run_experiment(config, **options)
    return outcome, stream.getvalue()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def digest(run_dir: Path) -> dict[str, str]:
    """The content of everything that resuming promises to leave the same."""
    files = [p for p in run_dir.rglob("*") if p.is_file()]
    volatile = {  # clocks, the lock, and copies of them
        "telemetry.jsonl",
        "LOCK",
        "outcome.json",
        "isft-run.json",
        "environment.json",
        "config.yaml",
        "resolved.yaml",
        "run.json",
    }
    wanted = [
        p
        for p in files
        if p.name not in volatile
        and "quarantine" not in p.parts
        and p.parent.name != "run"
        and p.name != "MANIFEST.json"
    ]
    wanted += [p for p in (run_dir / "ledger.jsonl", run_dir / "stats.jsonl") if p not in wanted]
    return {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in wanted}


def test_a_run_leaves_what_the_contract_says(toy, tmp_path):
    outcome, screen = run(toy())
    folder = tmp_path / "run"
    assert outcome.code == 0 and outcome.run_dir == folder
    stats = rows(folder / "stats.jsonl")
    assert [row["round"] for row in stats] == [0, 1, 2, 3]
    assert stats[0].keys() >= {"eval/pass@1", "eval/pass@1_low", "eval/pass@1_high"}
    for row in stats[1:]:
        assert row["generate/num_samples"] == 48
        assert row["filters/num_accepted"] == round(row["filters/accept_rate"] * 48)
        assert row["train/num_rows"] == row["filters/num_accepted"]
    assert stats[-1]["eval/pass@1"] > stats[0]["eval/pass@1"]
    for name in (
        "rounds/0001/generated-00000.jsonl",
        "rounds/0001/verdicts-00000.jsonl",
        "rounds/0001/train.jsonl",
        "rounds/0000/eval-00000.jsonl",
    ):
        assert (folder / name).is_file() and (folder / name.replace(".jsonl", ".seal.json")).is_file()
    assert json.loads((folder / "outcome.json").read_text())["code"] == 0
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) >= ["0002", "0003"]
    assert verify(folder) == []
    assert "statistics:" in screen and "best checkpoint" in screen and "next: isft" in screen
    assert not any("time" in key or key.endswith("_s") for row in stats for key in row)


def test_accepted_samples_are_those_that_every_filter_kept(toy, tmp_path):
    run(toy(rounds=1))
    view = RunDir.peek(tmp_path / "run")
    stored = list(iter_round(view.shards, 1))
    accepted = [one for one in stored if one.accepted]
    trained = rows(tmp_path / "run" / "rounds" / "0001" / "train.jsonl")
    assert [one.sample.sample_id for one in accepted] == [row["sample_id"] for row in trained]
    assert all(row["times"] == 2 for row in trained)
    for one in stored:
        right = f"The answer is {one.sample.answer}." == one.sample.completion
        if not right:
            assert one.rejected_by["filter"] == "numeric_answer"
    texts = [(one.sample.prompt_id, one.sample.completion) for one in accepted]
    assert len(set(texts)) == len(texts)


def test_the_same_config_gives_the_same_bytes(toy, tmp_path):
    run(toy(output_dir="run"))
    run(toy(output_dir="other"))
    assert digest(tmp_path / "run") == digest(tmp_path / "other")


SEARCH = {
    "generate": {"search": {"temperature": [0.5, 1.0], "min": [0, 0.5, 1], "prompts": 4, "enough": 2}},
    "filters": [
        "finished",
        {"numeric_answer": {"drop": False}},
        {"threshold": {"by": "numeric_answer", "min": 0}},
        "dedup",
    ],
}
PROMOTED = {"start": 0, "width": 2, "promote_if": "filters/accept_rate >= 0.3"}
FORMATS = [{}, {"prompt": "{prompt} =", "completion": "{answer}"}]
STOPS = [
    (search, "balance"),
    (judge, "generate_shard"),
    (verdicts.Judges, "_judge"),
    (training, "_step"),
    (training, "seal_training_rows"),
    (evaluation, "summarize"),
]


CASES = {
    "previous": {},
    "base": {"train": {"start_from": "base", "data": "accumulate"}},
    "best": {"train": {"start_from": "best"}},
    "saves": {"checkpoints": {"every_steps": 2}},
}
METHODS = {
    "until_accepted": {"generate": {"until_accepted": 1, "samples_per_prompt": 6}},
    "until_total": {"generate": {"until_total": 9}},
    "prop_difficulty": {
        "generate": {"until_accepted": 2, "samples_per_prompt": 8, "budget": {"kind": "prop_difficulty", "pilot": 2}}
    },
    "gvm": {"generate": {"budget": {"kind": "gvm", "pilot": 2}}, "filters": ["finished", "numeric_answer"]},
    "two_models": {"generate": {"from": [{"model": "current", "share": 0.5}, {"model": "base", "share": 0.5}]}},
    "rationalize": {"rationalize": {"template": "{prompt} hint {answer}"}, "generate": {"samples_per_prompt": 1}},
    "search": SEARCH,
    "roll_back": {"guards": {"rollback_if": "round == 1 or round == 2"}, "train": {"data": "accumulate"}},
    "adaptive": {"prompts": {"order": "adaptive", "advance": "accept_rate ** 2", "per_round": 6}},
    "curriculum": {"prompts": {"order": "curriculum", "level": "level", "per_round": "all", "curriculum": PROMOTED}},
    "shares": {
        "train": {"data": "accumulate", "new_share": 0.5, "max_rows": 20, "evict": "random", "formats": FORMATS}
    },
}


@pytest.mark.parametrize("case", [*CASES, *METHODS])
def test_stopped_in_any_phase_of_any_round_it_ends_with_the_same_bytes(toy, tmp_path, monkeypatch, case):
    changes = CASES.get(case) or METHODS.get(case, {})
    # what is shown is no part of what is compared, and costs as much as the run
    unseen = {"view": Console(io.StringIO(), quiet=True)}
    run(toy(output_dir="whole", **changes), **unseen)
    expected = digest(tmp_path / "whole")
    stopped = 0
    for number in (1, 2, 4) if case in CASES else (4,) if case == "until_accepted" else (3,):
        for module, name in STOPS:
            original = getattr(module, name)
            left = [number * 3 - 2]

            def crash(*args, original=original, left=left, **options):
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return original(*args, **options)

            folder = f"run-{number}-{name}"
            with monkeypatch.context() as patch:
                patch.setattr(module, name, crash)
                if module is training and name == "seal_training_rows":
                    patch.setattr("iterative_sft_cli.loop.seal_training_rows", crash)
                if name == "generate_shard":
                    patch.setattr(evaluation, name, crash)
                    patch.setattr(search, name, crash)
                try:
                    run(toy(output_dir=folder, **changes), **unseen)
                    continue
                except KeyboardInterrupt:
                    stopped += 1
            run(toy(output_dir=folder, **changes), **unseen)
            assert digest(tmp_path / folder) == expected, (number, name)
    assert stopped >= (8 if case in CASES else 2)


def test_a_finished_run_is_left_alone(toy, tmp_path):
    config = toy()
    run(config)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "run").rglob("*")}
    outcome, screen = run(config)
    assert outcome.code == 0 and "nothing to do" in screen
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "run").rglob("*")}


def test_more_rounds_go_on_where_fewer_ended(toy, tmp_path):
    run(toy(output_dir="long", rounds=3))
    run(toy(output_dir="run", rounds=2))
    outcome, _ = run(toy(output_dir="run", rounds=3))
    assert digest(tmp_path / "run") == digest(tmp_path / "long") and outcome.code == 0


def test_resume_never_and_must(toy):
    config = toy()
    with pytest.raises(ConfigError, match="no run to resume"):
        run(config, resume="must")
    run(config)
    with pytest.raises(ConfigError, match="a run is there already"):
        run(config, resume="never")


def test_a_frozen_key_cannot_change(toy):
    run(toy())
    with pytest.raises(ConfigError, match="seed: was 7, is 8") as caught:
        run(toy(seed=8))
    assert caught.value.exit_code == 2 and "--output-dir" in str(caught.value)


def test_nothing_accepted_stops_with_the_reason_and_goes_on_when_mended(toy, tmp_path):
    broken = {"filters": ["finished", {"length": {"max": 1}}]}
    with pytest.raises(GuardStop, match="none of 48 samples was accepted") as caught:
        run(toy(rounds=1, **broken))
    assert caught.value.exit_code == 3 and "length" in str(caught.value)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["code"] == 3
    outcome, _ = run(toy(rounds=1, guards={"on_empty": "skip"}, **broken))
    assert outcome.code == 0
    assert rows(tmp_path / "run" / "stats.jsonl")[-1]["filters/num_accepted"] == 0
    assert "loss" not in rows(tmp_path / "run" / "stats.jsonl")[-1]


@pytest.mark.parametrize("start_from", ["previous", "base"])
def test_a_skipped_round_touches_neither_weights_nor_optimizer_nor_schedule(toy, tmp_path, start_from):
    train = {"start_from": start_from, "steps": 4, "epochs": None, "lr_schedule": "continue"}
    filters = ["finished", {"length": {"max": {"by_round": [100, 1, 100]}}}]

    def files(key: str) -> dict[str, bytes]:
        """The checkpoint but for its place in the run."""
        folder = tmp_path / "run" / "checkpoints" / key
        own = {"MANIFEST.json", "run.json", "state.json"}
        return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in own}

    def until(last_round: int) -> dict[str, bytes]:
        """Run on to the end of that round, before an older checkpoint loses its optimizer."""
        guards = {"on_empty": "skip", "stop_if": f"round == {last_round}"}
        with pytest.raises(GuardStop):
            run(toy(train=train, filters=filters, guards=guards))
        return files(f"{last_round:04d}")

    first = until(1)
    assert len(first) == (2 if start_from == "previous" else 1)
    assert until(2) == first
    run(toy(train=train, filters=filters, guards={"on_empty": "skip"}))
    assert files("0003") != first
    ledger = rows(tmp_path / "run" / "ledger.jsonl")
    rates = [(row["round"], row["learning_rate"]) for row in ledger if row["event"] == "step"]
    assert rates == [(r, pytest.approx(0.1 * (1 - (4 * (r - 1) + i) / 12))) for r in (1, 3) for i in range(4)]
    skipped = [row for row in rows(tmp_path / "run" / "stats.jsonl") if row["round"] == 2]
    assert [row["filters/num_accepted"] for row in skipped] == [0]


def test_on_empty_fail_is_exit_4(toy):
    with pytest.raises(DataError) as caught:
        run(toy(rounds=1, filters=[{"length": {"max": 1}}], guards={"on_empty": "fail"}))
    assert caught.value.exit_code == 4


def test_every_sample_cut_off_is_said(toy):
    with pytest.raises(GuardStop) as caught:
        run(toy(generate={"max_new_tokens": 3}))
    assert "raise generate.max_new_tokens" in str(caught.value)


def test_an_eval_prompt_that_is_trained_on_is_refused(toy, tmp_path):
    config = toy()
    with open(tmp_path / "dev.jsonl", "a") as file:
        file.write('{"question": "0+0", "answer": "0"}\n')
    with pytest.raises(DataError, match="also eval prompts"):
        run(config)


def test_limit_runs_every_phase_in_a_folder_of_its_own(toy, tmp_path):
    outcome, _ = run(toy(), limit=2)
    assert outcome.run_dir == tmp_path / "run-limit2"
    stats = rows(outcome.run_dir / "stats.jsonl")
    assert [row["round"] for row in stats] == [0, 1] and stats[1]["generate/num_prompts"] == 2
    assert not (tmp_path / "run").exists()


def test_mid_round_saves_leave_no_trace_in_the_result(toy, tmp_path):
    run(toy(output_dir="plain"))
    run(toy(output_dir="saved", checkpoints={"every_steps": 1}))
    plain, saved = digest(tmp_path / "plain"), digest(tmp_path / "saved")
    assert plain == saved
