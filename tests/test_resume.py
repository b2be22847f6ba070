"""What may change between two starts of a run, what may not, and what is written down about it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_loop import digest, rows, run

from iterative_sft_cli import experiment, signals
from iterative_sft_cli.console import Console
from iterative_sft_cli.errors import ConfigError, PluginError, Preempted
from iterative_sft_cli.experiment import run_experiment
from iterative_sft_cli.rundir import RunDir, fs

ROOT = Path(__file__).resolve().parent.parent

GOOD = "def right(sample):\n    return sample.completion == f'The answer is {sample.answer}.'\n"
BROKEN = "def right(sample):\n    raise RuntimeError('grader is down')\n"
LAX = "def right(sample):\n    return True\n"


def test_a_frozen_change_is_refused_with_both_ways_out(toy):
    run(toy(rounds=1))
    with pytest.raises(ConfigError, match="temperature: was 1.0, is 0.5") as caught:
        run(toy(rounds=2, generate={"temperature": 0.5}))
    assert "--output-dir" in str(caught.value) and "--allow-change generate.temperature" in str(caught.value)
    outcome, _ = run(toy(rounds=2, generate={"temperature": 0.5}), allow_change=["generate.temperature"])
    assert outcome.code == 0


def test_an_allowed_change_stands_in_the_ledger_of_the_round_from_which_it_counts(toy, tmp_path):
    run(toy(rounds=1))
    run(toy(rounds=3, generate={"temperature": 0.5}), allow_change=["generate"])
    changed = [row for row in rows(tmp_path / "run" / "ledger.jsonl") if row["event"] == "changed"]
    assert {"event": "changed", "round": 2, "key": "generate.temperature", "old": 1.0, "new": 0.5} in changed


WITH_KERNELS = """
import os

import toy_backend


def make(config):
    toy = toy_backend.make(config)
    toy.engine.kernels = os.environ["KERNELS"]
    return toy
"""


def test_other_decoding_kernels_end_the_promise_of_the_same_bytes(toy, tmp_path, monkeypatch):
    (tmp_path / "backend.py").write_text(WITH_KERNELS)
    for rounds, kernels in ((1, "old"), (2, "new")):
        monkeypatch.setenv("KERNELS", kernels)
        run(toy(rounds=rounds, model={"use": f"{tmp_path / 'backend.py'}:make"}))
    assert RunDir.peek(tmp_path / "run").environment["kernels"] == "new"
    changed = [row for row in rows(tmp_path / "run" / "ledger.jsonl") if row["event"] == "changed"]
    assert changed == [{"event": "changed", "round": 2, "key": "kernels", "old": "old", "new": "new"}]


def test_changed_prompts_are_refused(toy, tmp_path):
    run(toy(rounds=1))
    config = toy(rounds=2)
    with open(tmp_path / "prompts.jsonl", "a") as file:
        file.write('{"question": "5+9", "answer": "14"}\n')
    with pytest.raises(ConfigError, match="the prompt file changed"):
        run(config)


def test_an_edited_filter_is_refused_unless_it_is_allowed(toy, tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    run(toy(rounds=1, filters=["mine.py:right"]))
    (tmp_path / "mine.py").write_text(GOOD + "\n# tidier\n")
    with pytest.raises(ConfigError, match="a filter's source changed"):
        run(toy(rounds=2, filters=["mine.py:right"]))
    outcome, _ = run(toy(rounds=2, filters=["mine.py:right"]), allow_change=["filters"])
    assert outcome.code == 0


def test_a_filter_that_failed_is_mended_without_a_flag(toy, tmp_path):
    (tmp_path / "mine.py").write_text(BROKEN)
    with pytest.raises(PluginError, match="grader is down") as caught:
        run(toy(rounds=1, filters=["mine.py:right"]))
    assert caught.value.exit_code == 5
    (tmp_path / "mine.py").write_text(GOOD)
    outcome, _ = run(toy(rounds=1, filters=["mine.py:right"]))
    assert outcome.code == 0 and rows(tmp_path / "run" / "stats.jsonl")[-1]["filters/num_accepted"] > 0


def test_allowed_filters_judge_the_open_round_again_from_its_stored_samples(toy, tmp_path):
    (tmp_path / "mine.py").write_text("def right(sample):\n    return False\n")
    with pytest.raises(Exception, match="none of 48 samples"):
        run(toy(rounds=1, filters=["mine.py:right"]))
    generated = (tmp_path / "run/rounds/0001/generated-00000.jsonl").read_bytes()
    (tmp_path / "mine.py").write_text(LAX)
    outcome, _ = run(toy(rounds=1, filters=["mine.py:right"]), allow_change=["filters"])
    assert outcome.code == 0
    assert (tmp_path / "run/rounds/0001/generated-00000.jsonl").read_bytes() == generated
    assert rows(tmp_path / "run" / "stats.jsonl")[-1]["filters/num_accepted"] == 48
    assert any("judged again" in line for line in (tmp_path / "run/quarantine/reasons.jsonl").read_text().splitlines())


def start(config: Path, delay: float = 0.004) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "iterative_sft_cli", "train", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TOY_DELAY_S": str(delay)},
    )


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize(
    "number,code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=["TERM", "USR1", "INT"]
)
@pytest.mark.parametrize("after", ["rounds/0001/prompts.jsonl", "rounds/0001/train.jsonl", "checkpoints/0001"])
def test_a_signal_saves_says_how_to_go_on_and_changes_nothing(toy, tmp_path, number, code, after):
    run(toy(output_dir="whole"))
    config = toy(output_dir="run")
    process = start(config)
    wait_for(lambda: (tmp_path / "run" / after).exists())
    time.sleep(0.05)
    process.send_signal(number)
    began = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and time.monotonic() - began < 5
    assert f"isft train {config}" in err and "Traceback" not in err
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["code"] == code
    run(toy(output_dir="run"))
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_signal_in_training_saves_the_last_whole_step(toy, tmp_path):
    config = toy(output_dir="run", train={"batch_size": 1})
    process = start(config, 0.02)
    wait_for(lambda: (tmp_path / "run" / "rounds/0001/train.jsonl").exists())
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    saves = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saves) == 1 and saves[0].startswith("0001-0000"), saves


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_kill_9_loses_nothing_that_was_sealed(toy, tmp_path):
    run(toy(output_dir="whole"))
    for wait in ("rounds/0001/generated-00000.jsonl", "rounds/0002/train.jsonl", "rounds/0002/eval-00000.jsonl"):
        process = start(toy(output_dir="run"), 0.002)
        wait_for(lambda wait=wait: (tmp_path / "run" / wait).exists())
        process.kill()
        process.communicate()
    run(toy(output_dir="run"))
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_second_start_says_who_holds_the_run(toy, tmp_path):
    config = toy()
    first = start(config, 0.02)
    try:
        wait_for(lambda: (tmp_path / "run" / "rounds/0000").exists())
        began = time.monotonic()
        second = subprocess.run(
            [sys.executable, "-m", "iterative_sft_cli", "train", str(config)], capture_output=True, text=True, cwd=ROOT
        )
        assert second.returncode == 4 and str(first.pid) in second.stderr and time.monotonic() - began < 3
    finally:
        first.kill()
        first.communicate()
    assert run(config)[0].code == 0


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    monkeypatch.setattr(signals.os, "write", lambda fd, text: None)
    stop = signals.StopRequests("isft train x")
    stop._on_signal(signal.SIGTERM, None)
    stop._on_signal(signal.SIGTERM, None)
    assert ended == [75]


SLURM = ROOT / "iterative_sft_cli" / "docs" / "resuming.md"


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
@pytest.mark.parametrize("code,requeued", [(75, True), (0, False), (3, False)])
def test_the_slurm_script_of_the_docs_waits_for_the_save_and_requeues_on_75_only(tmp_path, code, requeued):
    script = SLURM.read_text().split("```sh\n")[1].split("```")[0]
    (tmp_path / "job.sh").write_text(script)
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    # isft takes a moment to save after the signal; scontrol leaves a note
    (bin_dir / "isft").write_text(
        f"#!/bin/sh\necho \"$@\" > {tmp_path}/argv\ntrap 'sleep 0.4; echo saved > {tmp_path}/saved; exit {code}' TERM\n"
        "touch started; while :; do sleep 0.05; done\n"
    )
    (bin_dir / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    for name in ("isft", "scontrol"):
        (bin_dir / name).chmod(0o755)
    env = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "SLURM_JOB_ID": "417"}
    job = subprocess.Popen(["sh", "job.sh"], cwd=tmp_path, env=env)
    wait_for(lambda: (tmp_path / "started").exists())
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == code and (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").exists() is requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 417\n"
    words = (tmp_path / "argv").read_text().split()
    assert words[:1] == ["train"] and "--grace-s" in words
    for line in ("--signal=B:TERM@600", "--open-mode=append", "--requeue"):
        assert line in script


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_signal_is_obeyed_within_one_micro_step(toy, tmp_path):
    class View(Console):
        """Counts signs of work (a token batch, a sample, a micro-batch, a step) and sends the signal at one of them."""

        signs = at = 0

        def tick(self, view):
            self.signs += 1
            if self.signs == self.at:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = View(io.StringIO())
    run_experiment(toy(output_dir="whole"), view=whole)
    assert whole.signs > 300
    for at in range(1, whole.signs, whole.signs // 9):
        view = View(io.StringIO())
        view.at = at
        with pytest.raises(Preempted):
            run_experiment(toy(output_dir=f"run-{at}"), view=view)
        assert view.signs - at <= 1, at
        run(toy(output_dir=f"run-{at}"))
        assert digest(tmp_path / f"run-{at}") == digest(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_second_signal_to_the_real_process_ends_it_at_once_and_is_safe(toy, tmp_path, number, code):
    run(toy(output_dir="whole"))
    for after in ("rounds/0001/prompts.jsonl", "rounds/0001/train.jsonl"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        config = toy(output_dir="run")
        process = start(config, 0.004)
        wait_for(lambda after=after: (tmp_path / "run" / after).exists(), 60)
        process.send_signal(number)
        time.sleep(0.002)
        process.send_signal(number)
        began = time.monotonic()
        _, err = process.communicate(timeout=20)
        assert process.returncode == code and time.monotonic() - began < 5
        assert f"go on with: isft train {config}" in err and "Traceback" not in err
    run(toy(output_dir="run"))
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_before_anything_is_under_way_says_the_same(number, code):
    code_text = (
        "import sys, os, signal, iterative_sft_cli.__main__ as door, iterative_sft_cli.cli as cli;"
        "number = int(sys.argv.pop());"
        "cli.run = lambda argv: os.kill(os.getpid(), number);"
        "door.main()"
    )
    words = [sys.executable, "-c", code_text, "train", "my config.yaml", str(int(number))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == code and "go on with: isft train 'my config.yaml'" in done.stderr
    assert "Traceback" not in done.stderr


def test_from_every_checkpoint_it_goes_on_to_the_same_bytes(toy, tmp_path):
    changes = {"checkpoints": {"every_steps": 2}, "train": {"data": "accumulate"}}
    run(toy(output_dir="whole", **changes))
    kept = {}

    def keep(op):
        if op.kind == "ack" and op.label.startswith("checkpoint "):
            key = op.label.removeprefix("checkpoint ")
            kept[key] = tmp_path / f"at-{key}"
            shutil.copytree(tmp_path / "source", kept[key])

    fs.hook = keep
    try:
        run(toy(output_dir="source", **changes))
    finally:
        fs.hook = None
    assert len(kept) >= 9 and {"0001", "0002", "0003", "0001-000002", "0003-000004"} <= kept.keys()
    for folder in kept.values():
        run(toy(output_dir=folder.name, **changes))
        assert digest(folder) == digest(tmp_path / "whole"), folder.name


def test_a_changed_base_model_or_eval_set_is_refused_and_libraries_become_a_ledger_row(toy, tmp_path, monkeypatch):
    run(toy(rounds=1))
    config = toy(rounds=2)
    original = experiment.describe_environment
    for key, what in (
        ("model", "the base model's files"),
        ("eval", "the eval prompt file"),
        ("seed_data", "seed data"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                experiment, "describe_environment", lambda *parts, key=key: {**original(*parts), key: "another"}
            )
            with pytest.raises(ConfigError, match=f"{what} changed since this run began") as caught:
                run(config)
            text = caught.value.render()
            assert caught.value.exit_code == 2 and "--output-dir" in text and f"--allow-change {key}" in text
    monkeypatch.setattr(
        experiment, "describe_environment", lambda *parts: {**original(*parts), "versions": {"torch": "9.9"}}
    )
    assert run(config)[0].code == 0
    changed = [row for row in rows(tmp_path / "run" / "ledger.jsonl") if row["event"] == "changed"]
    assert [(row["round"], row["key"], row["new"]) for row in changed] == [(2, "versions", {"torch": "9.9"})]


def test_a_tunable_change_becomes_a_ledger_row(toy, tmp_path):
    run(toy(rounds=1))
    run(toy(rounds=2, checkpoints={"keep": 5}))
    changed = [row for row in rows(tmp_path / "run" / "ledger.jsonl") if row["event"] == "changed"]
    assert changed == [{"event": "changed", "round": 2, "key": "checkpoints.keep", "old": 2, "new": 5}]


def test_ten_resumes_in_a_row(toy, tmp_path):
    run(toy(output_dir="whole", rounds=4, checkpoints={"every_steps": 1}))
    config = toy(output_dir="run", rounds=4, checkpoints={"every_steps": 1})
    count = 0

    class Stop(Exception): ...

    class View(Console):
        left = 0

        def tick(self, view):
            self.left -= 1
            if self.left < 0:
                raise Stop

    for limit in [30, 40, 60, 80, 80, 80, 80, 80, 80, 80, 5000]:
        view = View(io.StringIO())
        view.left = limit
        try:
            run_experiment(config, view=view)
        except Stop:
            count += 1
    assert count == 10 and digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert RunDir.peek(tmp_path / "run").finished
