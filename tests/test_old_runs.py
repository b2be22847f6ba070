"""Run directories of earlier versions: those of this format resume for ever, those of a newer one are refused without a write.

`fixtures/run-format-1` was left by `isft train` with the toy model, killed inside the training of round 2. It must never be made anew: a
change that cannot go on with it breaks the runs of users.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_loop import rows, run

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.rundir import verify
from iterative_sft_cli.rundir.integrity import parse_document, render_document

FIXTURE = Path(__file__).parent / "fixtures" / "run-format-1"


@pytest.fixture
def old(tmp_path) -> Path:
    """The config of a copy of the fixture; its run directory is `run` beside it."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    return tmp_path / "old" / "toy.yaml"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def go_on(config: Path, **options):
    return run(config, overrides=[f"output_dir={config.parent / 'run'}", *options.pop("overrides", [])], **options)


def test_a_run_of_format_1_goes_on_and_keeps_what_was_sealed(old):
    folder = old.parent / "run"
    assert [finding for finding in verify(folder) if finding.damage] == []
    before = {name: data for name, (data, _) in contents(folder / "rounds").items()}
    ledger = (folder / "ledger.jsonl").read_bytes()
    assert "0002/train.jsonl" in before and "0002-000002" in os.listdir(folder / "checkpoints")
    outcome, _ = go_on(old)
    assert outcome.code == 0
    after = contents(folder / "rounds")
    assert {name: after[name][0] for name in before} == before
    assert (folder / "ledger.jsonl").read_bytes()[: len(ledger)].splitlines()[:20] == ledger.splitlines()[:20]
    stats = rows(folder / "stats.jsonl")
    assert [row["round"] for row in stats] == [0, 1, 2, 3] and stats[2]["train/num_steps"] > 2
    assert [finding for finding in verify(folder) if finding.damage] == []
    assert json.loads((folder / "outcome.json").read_text())["code"] == 0


def test_it_may_be_given_more_rounds(old):
    assert go_on(old, overrides=["rounds=4"])[0].code == 0
    assert len(rows(old.parent / "run" / "stats.jsonl")) == 5


def test_a_newer_format_is_refused_and_nothing_is_written(old):
    folder = old.parent / "run"
    marker = folder / "isft-run.json"
    content = parse_document(marker.read_bytes(), marker)
    marker.write_bytes(render_document({**content, "format": content["format"] + 1}))
    before = contents(folder)
    with pytest.raises(DataError, match="is of format 2; this version of isft reads up to 1") as caught:
        go_on(old)
    assert caught.value.exit_code == 4 and "use the version of isft that wrote it" in caught.value.render()
    assert contents(folder) == before
