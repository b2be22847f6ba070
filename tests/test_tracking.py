"""Trackers get every round's numbers and samples; one that fails costs the run nothing."""

import pytest
from test_loop import run

from iterative_sft_cli.errors import ConfigError


def test_tensorboard_holds_every_rounds_numbers_and_samples(toy, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(toy(rounds=2, tracking=["tensorboard"]))
    events = EventAccumulator(str(next((tmp_path / "run" / "tracking").rglob("events*")).parent))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert "eval/pass@1" in scalars and "filters/numeric_answer/dropped" in scalars
    assert [event.step for event in events.Scalars("eval/pass@1")] == [0, 1, 2]
    texts = [name for name in events.Tags()["tensors"] if name.startswith("samples")]
    assert texts and b"accepted:" in events.Tensors(texts[0])[0].tensor_proto.string_val[0]


def test_trackio_works_without_a_network(toy, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome, screen = run(toy(rounds=1, tracking=["trackio"]))
    assert outcome.code == 0 and "warning: trackio" not in screen


def test_an_unknown_tracker_is_refused_before_anything_runs(toy, tmp_path):
    with pytest.raises(ConfigError, match="tracker"):
        run(toy(tracking=["tensorbord"]))
    assert not (tmp_path / "run").exists()
