"""Running out of memory halves the batch, is recorded and replayed; a hung engine is ended, tried again once, then named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import digest, rows, run

from iterative_sft_cli import build
from iterative_sft_cli.errors import OutOfMemoryError
from iterative_sft_cli.rounds import training, verdicts

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def memory(monkeypatch):
    """Sets what fits into the toy's memory: `memory(rows=2, tokens=40)`."""
    limits = {"rows": 10**9, "tokens": 10**9}
    original = build.open_backend

    def open_backend(config, base_dir):
        backend = original(config, base_dir)
        type(backend.learner).step.__globals__["FITS"].update(limits)
        return backend

    monkeypatch.setattr(build, "open_backend", open_backend)
    return limits.update


@pytest.mark.parametrize("fits", [1, 2, 3, 5, 8])
def test_generation_halves_its_rows_until_they_fit_and_changes_no_sample(toy, tmp_path, memory, fits):
    run(toy(output_dir="whole", rounds=1))
    memory(rows=fits)
    run(toy(output_dir="run", rounds=1))
    plans = [
        json.loads(p.read_text())["meta"]["plan"] for p in (tmp_path / "run/rounds/0001").glob("generated-*.seal.json")
    ]
    assert plans and all(plan["max_rows"] <= fits for plan in plans)
    name = "rounds/0001/generated-00000.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_out_of_memory_at_one_row_is_an_error_with_advice(toy, memory):
    memory(rows=0)
    with pytest.raises(OutOfMemoryError, match="hint: lower generate.max_new_tokens") as caught:
        run(toy(rounds=1))
    assert caught.value.exit_code == 4


def test_training_halves_the_micro_batch_and_keeps_the_step(toy, tmp_path, memory):
    run(toy(output_dir="whole", rounds=1))
    memory(tokens=40)
    run(toy(output_dir="run", rounds=1))
    steps = [[r for r in rows(tmp_path / d / "ledger.jsonl") if r["event"] == "step"] for d in ("run", "whole")]
    assert steps[0] == steps[1]
    splits = sorted((tmp_path / "run/rounds/0001").glob("split-train-*.jsonl"))
    assert splits and all(rows(path)[0]["micro_batch_tokens"] <= 60 for path in splits[-1:])


def test_a_split_is_replayed_after_a_crash(toy, tmp_path, memory, monkeypatch):
    memory(tokens=40, rows=2)
    run(toy(output_dir="whole"))
    calls = 0
    original = training._step

    def crash(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", crash)
        with pytest.raises(KeyboardInterrupt):
            run(toy(output_dir="run"))
    run(toy(output_dir="run"))
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_training_on_a_row_that_never_fits_is_an_error_with_advice(toy, memory):
    memory(tokens=5)
    with pytest.raises(OutOfMemoryError, match="gradient_checkpointing"):
        run(toy(rounds=1))


@pytest.fixture
def scoring(tmp_path, monkeypatch):
    """A config part that scores with a tiny model, and `scoring.fits`: samples of a batch that fit into memory."""
    from tiny import save_tiny

    from iterative_sft_cli.filters.builtin import perplexity

    save_tiny(tmp_path / "model")
    original = perplexity.in_batches

    class Scoring:
        fits = 10**9
        batches = []
        filters = [{"perplexity": {"path": str(tmp_path / "model")}}, {"threshold": {"by": "-perplexity", "min": -1e9}}]

    def in_batches(rows, batch_size, run, key=len):
        def limited(batch):
            Scoring.batches.append(len(batch))
            if len(batch) > Scoring.fits:
                raise MemoryError
            return run(batch)

        return original(rows, batch_size, limited, key)

    monkeypatch.setattr(perplexity, "in_batches", in_batches)
    return Scoring


def test_a_scoring_filter_halves_its_batch_and_a_crash_replays_it(toy, tmp_path, monkeypatch, scoring):
    changes = {"rounds": 1, "filters": scoring.filters, "eval": None}
    run(toy(output_dir="roomy", **changes))
    scoring.fits = 3
    run(toy(output_dir="whole", **changes))
    splits = sorted((tmp_path / "whole/rounds/0001").glob("split-filter-*.jsonl"))
    assert [rows(path)[0] for path in splits] == [
        {"filter": "filters[0]", "batch_size": 4},
        {"filter": "filters[0]", "batch_size": 2},
    ]
    sizes = [rows(tmp_path / d / "rounds/0001/train.jsonl") for d in ("roomy", "whole")]
    assert sizes[0] == sizes[1]

    # killed after the halving was recorded, before any verdict is: what is tried first now is what fitted then
    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "_verdict_row", crash)
        with pytest.raises(KeyboardInterrupt):
            run(toy(output_dir="run", **changes))
    scoring.batches.clear()
    run(toy(output_dir="run", **changes))
    assert max(scoring.batches) == 2
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_a_scoring_filter_that_cannot_take_one_sample_is_an_error_with_advice(toy, scoring):
    scoring.fits = 0
    with pytest.raises(OutOfMemoryError, match="the filter `perplexity` looked at a single sample") as caught:
        run(toy(rounds=1, filters=scoring.filters))
    assert caught.value.exit_code == 4 and "device: cpu" in caught.value.render()


def train_hanging(config: Path, flag: Path) -> subprocess.CompletedProcess[str]:
    flag.write_text("")
    return subprocess.run(
        [sys.executable, "-m", "iterative_sft_cli", "train", str(config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=40,
        env={**os.environ, "TOY_HANG": str(flag)},
    )


def test_an_engine_that_hangs_once_is_started_again(toy, tmp_path):
    done = train_hanging(toy(rounds=1, generate={"timeout_s": 0.5}), tmp_path / "hang-once")
    assert done.returncode == 0, done.stderr
    assert "has not made a token for 0.5 s" in done.stderr and "starting again" in done.stderr
    assert "generate" in (tmp_path / "run" / "hang.txt").read_text()


def test_an_engine_that_hangs_twice_is_a_named_error(toy, tmp_path):
    done = train_hanging(toy(rounds=1, generate={"timeout_s": 0.5}), tmp_path / "hang-always")
    assert done.returncode == 4 and "the engine hung twice" in done.stderr and "generate.timeout_s" in done.stderr
    assert run(toy(rounds=1, generate={"timeout_s": 5}))[0].code == 0
