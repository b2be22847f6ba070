"""Sealed shards: whole and verified, or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import RunDir, verify

ROWS = [{"id": n, "text": f"é\u2028{n}", "ids": [1, 2, n]} for n in range(5)]
META = {"weights": "abc", "plan": {"max_rows": 4, "by_length": {"10": 1}}}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with RunDir.create(tmp_path / "run", config_source=b"", resolved={}, environment={}) as run:
        yield run


def quarantined(run: RunDir) -> list[str]:
    return [moved for moved, _ in run.quarantined]


def test_a_shard_is_read_back_with_its_meta(run: RunDir) -> None:
    run.shards.seal(1, "generated-00000", ROWS, META)
    assert run.shards.read(1, "generated-00000") == (ROWS, META)
    assert run.shards.read(1, "generated-00001") is None
    assert sorted(os.listdir(run.path / "rounds" / "0001")) == ["generated-00000.jsonl", "generated-00000.seal.json"]


def test_keys_that_are_numbers_come_back_as_json_has_them(run: RunDir) -> None:
    run.shards.seal(1, "generated-00000", [], {"plan": {2: "b", 10: "a"}})
    assert run.shards.read(1, "generated-00000") == ([], {"plan": {"2": "b", "10": "a"}})


def test_names_are_sorted_and_only_of_whole_shards(run: RunDir) -> None:
    for name in ("verdicts-00000", "generated-00001", "generated-00000"):
        run.shards.seal(1, name, ROWS, {})
    assert run.shards.names(1) == ["generated-00000", "generated-00001", "verdicts-00000"]
    assert run.shards.names(1, "generated") == ["generated-00000", "generated-00001"]
    assert run.shards.names(7) == []
    (run.path / "rounds" / "0001" / "generated-00000.jsonl").unlink()
    assert run.shards.names(1, "verdicts") == ["verdicts-00000"]
    with pytest.raises(DataError, match="0001/generated-00000.jsonl: a sealed shard is gone"):
        run.shards.names(1, "generated")


def test_a_sealed_shard_never_changes(run: RunDir) -> None:
    run.shards.seal(1, "train", ROWS, META)
    with pytest.raises(DataError, match="never changes"):
        run.shards.seal(1, "train", [], META)
    assert run.shards.read(1, "train") == (ROWS, META)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "X", "a" * 200, "a.jsonl", "-rf"])
def test_a_name_cannot_lead_out_of_the_folder(run: RunDir, name: str) -> None:
    with pytest.raises(ValueError, match="not a shard name"):
        run.shards.seal(1, name, ROWS, {})
    with pytest.raises(ValueError, match="not a shard name"):
        run.shards.read(1, name)


def test_rows_that_are_no_json_are_refused_and_nothing_is_written(run: RunDir) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.shards.seal(1, "train", [{"loss": float("nan")}], {})
    assert not (run.path / "rounds" / "0001").exists()


def test_compressed_shards_are_the_same_to_a_reader(run: RunDir) -> None:
    run.shards.compress = True
    run.shards.seal(1, "generated-00000", ROWS, META)
    run.shards.compress = False
    assert (run.path / "rounds" / "0001" / "generated-00000.jsonl.gz").exists()
    assert run.shards.read(1, "generated-00000") == (ROWS, META)
    assert run.shards.names(1) == ["generated-00000"]
    assert verify(run.path) == []


def test_what_is_torn_or_damaged_in_the_open_round_is_gone_after_opening(run: RunDir) -> None:
    for name in ("a", "b", "c"):
        run.shards.seal(1, name, ROWS, META)
    path = run.path
    run.close()
    (path / "rounds" / "0001" / "a.seal.json").unlink()
    (path / "rounds" / "0001" / "b.jsonl").write_text("{}\n")
    with RunDir.open(path) as again:
        assert again.shards.names(1) == ["c"]
        assert quarantined(again) == [f"rounds/0001/{file}" for file in ("a.jsonl", "b.jsonl", "b.seal.json")]
        for name in ("a", "b"):
            assert again.shards.read(1, name) is None
            again.shards.seal(1, name, ROWS, META)
        assert again.shards.names(1) == ["a", "b", "c"]


@pytest.mark.parametrize("harm", ["flip", "lose"])
def test_a_shard_of_a_round_that_is_over_is_never_silently_left_out(run: RunDir, harm: str) -> None:
    run.shards.seal(1, "verdicts-round", ROWS, META)
    run.checkpoints.commit("0001", lambda folder: None, {})
    path = run.path
    run.close()
    shard = path / "rounds" / "0001" / "verdicts-round.jsonl"
    shard.unlink() if harm == "lose" else shard.write_bytes(shard.read_bytes().replace(b"1", b"3"))
    for _ in range(2):
        with RunDir.open(path) as again:
            with pytest.raises(DataError, match="verdicts-round.jsonl: a sealed shard is gone or damaged"):
                again.shards.read(1, "verdicts-round")
            with pytest.raises(DataError, match="verdicts-round.jsonl"):
                again.shards.names(1)


@pytest.mark.parametrize("harm", ["flip", "lose"])
def test_with_a_shard_of_the_round_lost_its_training_begins_again(run: RunDir, harm: str) -> None:
    run.checkpoints.commit("0001", lambda folder: None, {})
    run.shards.seal(2, "generated-00000", ROWS, META)
    run.checkpoints.commit("0002-000010", lambda folder: None, {})
    path = run.path
    run.close()
    shard = path / "rounds" / "0002" / "generated-00000.jsonl"
    shard.unlink() if harm == "lose" else shard.write_bytes(shard.read_bytes().replace(b"1", b"3"))
    with RunDir.open(path) as again:
        newest = again.checkpoints.newest()
        assert newest is not None and newest.key == "0001"
        assert "checkpoints/0002-000010" in quarantined(again)
        assert again.shards.names(2) == []
        assert again.shards.read(2, "generated-00000") is None


def test_a_shard_without_its_seal_is_torn(run: RunDir) -> None:
    run.shards.seal(1, "train", ROWS, META)
    (run.path / "rounds" / "0001" / "train.seal.json").unlink()
    assert run.shards.read(1, "train") is None
    assert quarantined(run) == ["rounds/0001/train.jsonl"]
    run.shards.seal(1, "train", ROWS, META)
    assert run.shards.read(1, "train") == (ROWS, META)


def test_a_seal_without_its_shard_means_make_it_again(run: RunDir) -> None:
    run.shards.seal(1, "train", ROWS, META)
    (run.path / "rounds" / "0001" / "train.jsonl").unlink()
    assert run.shards.read(1, "train") is None
    assert quarantined(run) == []
    run.shards.seal(1, "train", ROWS[:2], {})
    assert run.shards.read(1, "train") == (ROWS[:2], {})


def test_a_shard_cut_at_any_byte_is_never_read(run: RunDir) -> None:
    path = run.path / "rounds" / "0001" / "train.jsonl"
    run.shards.seal(1, "train", ROWS, META)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert run.shards.read(1, "train") is None
        run.shards.seal(1, "train", ROWS, META)
    assert path.read_bytes() == whole


def test_the_seal_of_another_shard_is_noticed(run: RunDir) -> None:
    for name in ("generated-00000", "generated-00001"):
        run.shards.seal(1, name, [{"name": name}], {})
    folder = run.path / "rounds" / "0001"
    for end in (".jsonl", ".seal.json"):
        a, b = folder / f"generated-00000{end}", folder / f"generated-00001{end}"
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
    assert len([finding for finding in verify(run.path) if finding.damage]) == 2
    assert run.shards.read(1, "generated-00000") is None
    assert run.shards.read(1, "generated-00001") is None


def test_a_discarded_shard_is_in_quarantine_and_may_be_made_anew(run: RunDir) -> None:
    run.shards.seal(1, "verdicts-00000", ROWS, META)
    run.shards.discard(1, "verdicts-00000", "judged again")
    assert run.shards.read(1, "verdicts-00000") is None
    assert quarantined(run) == ["rounds/0001/verdicts-00000.jsonl", "rounds/0001/verdicts-00000.seal.json"]
    run.shards.seal(1, "verdicts-00000", [], {})
    assert run.shards.read(1, "verdicts-00000") == ([], {})


def test_a_shard_given_up_is_not_missed(run: RunDir) -> None:
    run.shards.seal(1, "generated-00000", ROWS, META)
    run.checkpoints.commit("0001", lambda folder: None, {})
    run.shards.remove(1, "generated-00000")
    assert run.shards.read(1, "generated-00000") is None
    assert verify(run.path) == []
    run.checkpoints.commit("0002", lambda folder: None, {})
    assert verify(run.path) == []


def test_a_lost_shard_is_missed_for_good(run: RunDir) -> None:
    run.shards.seal(1, "generated-00000", ROWS, META)
    run.checkpoints.commit("0001", lambda folder: None, {})
    for end in (".jsonl", ".seal.json"):
        (run.path / "rounds" / "0001" / f"generated-00000{end}").unlink()
    path = run.path
    run.close()
    for key in ("0002", "0003"):
        with RunDir.open(path) as again:
            again.checkpoints.commit(key, lambda folder: None, {})
        assert [finding.path for finding in verify(path)] == ["rounds/0001/generated-00000"]


@pytest.mark.parametrize("key", ["0001", "0001-000010"])
def test_a_shard_that_is_lost_after_a_commit_of_the_same_process_is_told(run: RunDir, key: str) -> None:
    run.shards.seal(1, "verdicts-round", ROWS, META)
    run.checkpoints.commit(key, lambda folder: None, {})
    (run.path / "rounds" / "0001" / "verdicts-round.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="gone or damaged"):
        run.shards.read(1, "verdicts-round")


def test_a_shard_sealed_after_a_save_inside_the_round_and_torn_is_made_again(run: RunDir) -> None:
    run.checkpoints.commit("0001-000010", lambda folder: None, {})
    run.shards.seal(1, "split-train", ROWS, META)
    path = run.path
    run.close()
    (path / "rounds" / "0001" / "split-train.jsonl").write_text("{}\n")
    with RunDir.open(path) as again:
        assert again.shards.names(1) == []
        assert again.shards.read(1, "split-train") is None


def test_rows_one_at_a_time_are_those_of_read(run: RunDir) -> None:
    run.shards.seal(1, "prompts", iter(ROWS), META)
    assert list(run.shards.iter_rows(1, "prompts") or ()) == ROWS
    assert run.shards.iter_rows(1, "train") is None


def test_a_damaged_shard_is_set_aside_before_its_first_row(run: RunDir) -> None:
    run.shards.seal(1, "prompts", ROWS, META)
    path = run.path / "rounds" / "0001" / "prompts.jsonl"
    path.write_bytes(path.read_bytes()[:-2] + b"\n\n")
    assert run.shards.iter_rows(1, "prompts") is None and not path.exists()
