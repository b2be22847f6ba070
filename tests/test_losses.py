"""Damage to the samples of a round that is over: exit 4 where something still needs them, else quarantine and a note."""

import json

import pytest
from test_loop import digest, rows, run

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import verify

SHARDS = ["generated-00000", "verdicts-00000", "prompts"]


def harm(folder, name: str, how: str, round_index: int = 1) -> None:
    path = folder / "rounds" / f"{round_index:04d}" / f"{name}.jsonl"
    if how == "lose":
        path.unlink()
    elif how == "lose both":
        path.unlink()
        path.with_name(f"{name}.seal.json").unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])


@pytest.mark.parametrize("how", ["flip", "lose", "lose both"])
@pytest.mark.parametrize("name", SHARDS)
def test_what_nothing_needs_is_set_aside_and_noted(toy, tmp_path, name, how):
    changes = {"prompts": {"per_round": "all"}, "train": {"data": {"window": 2}}}
    run(toy(rounds=3, **changes))
    folder = tmp_path / "run"
    harm(folder, name, how)
    assert any(finding.damage for finding in verify(folder))
    outcome, screen = run(toy(rounds=4, **changes))
    assert outcome.code == 0 and f"round 1: {name} damaged or gone" in " ".join(screen.split())
    assert [finding for finding in verify(folder) if finding.damage] == []
    assert [row["round"] for row in rows(folder / "stats.jsonl")] == [0, 1, 2, 3, 4]
    if how == "flip":
        reasons = [json.loads(line) for line in (folder / "quarantine" / "reasons.jsonl").read_text().splitlines()]
        assert reasons[0]["path"] == f"rounds/0001/{name}.jsonl" and "nothing needs it any more" in reasons[0]["reason"]
    # what is left is on record once, and the next start has nothing to say about it
    _, screen = run(toy(rounds=5, **changes))
    assert "damaged or gone" not in screen


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"data": "accumulate"}},
        {"train": {"data": {"window": 3}}},
        {"filters": ["finished", "numeric_answer", {"dedup": {"scope": "run"}}]},
    ],
    ids=["accumulate", "window", "a filter that looks back"],
)
def test_what_is_still_needed_is_exit_4(toy, tmp_path, changes):
    run(toy(rounds=2, **changes))
    harm(tmp_path / "run", "generated-00000", "flip")
    for _ in range(2):
        with pytest.raises(DataError, match="0001/generated-00000.jsonl: a sealed shard is gone or damaged") as caught:
            run(toy(rounds=3, **changes))
        assert caught.value.exit_code == 4 and "backup" in caught.value.render()


def test_put_back_from_quarantine_it_goes_on_to_the_same_bytes(toy, tmp_path):
    changes = {"train": {"data": "accumulate"}}
    run(toy(output_dir="whole", rounds=3, **changes))
    run(toy(rounds=2, **changes))
    folder = tmp_path / "run"
    path = folder / "rounds" / "0001" / "generated-00000.jsonl"
    good, seal = path.read_bytes(), path.with_name("generated-00000.seal.json").read_bytes()
    harm(folder, "generated-00000", "flip")
    with pytest.raises(DataError):
        run(toy(rounds=3, **changes))
    path.write_bytes(good)
    path.with_name("generated-00000.seal.json").write_bytes(seal)
    assert run(toy(rounds=3, **changes))[0].code == 0
    assert digest(folder) == digest(tmp_path / "whole")
