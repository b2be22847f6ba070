"""`samples.compress` and `samples.keep`: a run learns the same, keeps what it says, and can be stopped at any moment of it."""

from __future__ import annotations

import gzip
import json

import pytest
from test_loop import digest, rows, run

from iterative_sft_cli.cli import run as isft
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.rounds import thinning
from iterative_sft_cli.rundir import verify
from iterative_sft_cli.rundir.seal import Shards

HARD = {"order": "hardest_first", "per_round": 8, "skip": {"solved_at_least": 1.0}}


def learned(folder):
    """Everything of a run that samples.* must not change: statistics, weights, what trained, decisions but for the thinning."""
    ledger = [row for row in rows(folder / "ledger.jsonl") if row["event"] != "thinned"]
    train = {str(p.parent.name): rows(p) for p in sorted(folder.glob("rounds/*/train.jsonl"))}
    weights = {name: value for name, value in digest(folder).items() if name.startswith("checkpoints/")}
    return rows(folder / "stats.jsonl"), train, weights, ledger


def names(folder, index):
    return sorted(p.name for p in (folder / "rounds" / f"{index:04d}").glob("*.jsonl*"))


@pytest.mark.parametrize("data", ["accumulate", {"window": 2}])
@pytest.mark.parametrize(
    "samples", [{"keep": "accepted"}, {"compress": "gzip"}, {"keep": "accepted", "compress": "gzip"}]
)
def test_a_run_learns_the_same(toy, tmp_path, samples, data):
    changes = {"rounds": 4, "train": {"data": data}, "prompts": HARD}
    run(toy(output_dir="plain", **changes))
    run(toy(output_dir="thin", samples=samples, **changes))
    plain, thin = learned(tmp_path / "plain"), learned(tmp_path / "thin")
    if "compress" in samples:
        assert (
            not list((tmp_path / "thin" / "rounds").glob("*/*.jsonl")) and plain[0] == thin[0] and plain[2:] == thin[2:]
        )
        packed = tmp_path / "thin/rounds/0004/generated-00000.jsonl.gz"
        assert (
            gzip.decompress(packed.read_bytes()) == (tmp_path / "plain/rounds/0004/generated-00000.jsonl").read_bytes()
        )
    else:
        assert plain == thin
    assert verify(tmp_path / "thin") == []
    old, new = Run.open(tmp_path / "plain"), Run.open(tmp_path / "thin")
    for index in (1, 2, 3, 4):
        wanted = [one for one in old.iter_samples([index]) if one.accepted or "keep" not in samples or index == 4]
        assert list(new.iter_samples([index])) == wanted and wanted


def test_dropped_rounds_leave_what_later_rounds_count_with(toy, tmp_path):
    run(toy(output_dir="plain", rounds=5, prompts=HARD))
    run(toy(output_dir="thin", rounds=5, prompts=HARD, samples={"keep": 2}))
    assert learned(tmp_path / "plain") == learned(tmp_path / "thin")
    assert names(tmp_path / "thin", 3) == ["dropped-00000.jsonl", "eval-00000.jsonl", "prompts.jsonl", "train.jsonl"]
    assert "completion" not in (tmp_path / "thin/rounds/0003/dropped-00000.jsonl").read_text()
    assert names(tmp_path / "thin", 4) == names(tmp_path / "plain", 4)
    found = Run.open(tmp_path / "thin")
    assert found.rounds == [4, 5] and verify(tmp_path / "thin") == []
    with pytest.raises(DataError, match="the samples of round 1 were dropped"):
        list(found.iter_samples([1]))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("keep", ["accepted", 1])
def test_a_kill_at_any_moment_of_it_changes_nothing(toy, tmp_path, monkeypatch, keep):
    changes = {
        "rounds": 3,
        "samples": {"keep": keep},
        "train": {"data": "accumulate" if keep == "accepted" else "replace"},
    }
    run(toy(output_dir="whole", **changes))
    whole = digest(tmp_path / "whole")
    real = {name: getattr(Shards, name) for name in ("seal", "remove")}
    moments = 0
    for after in range(100):
        count, inside = [0], [0]

        def killed(name, count=count, inside=inside, after=after):
            def act(self, *args):
                if inside[0] and count[0] == after:
                    count[0] += 1
                    raise Killed
                result = real[name](self, *args)
                count[0] += bool(inside[0])
                return result

            return act

        thin = thinning.thin

        def watched(*args, inside=inside, thin=thin):
            inside[0] = 1
            thin(*args)
            inside[0] = 0

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Shards, name, killed(name))
            patch.setattr(thinning, "thin", watched)
            config = toy(output_dir=f"killed{after}", **changes)
            try:
                run(config)
                break
            except Killed:
                moments += 1
        run(toy(output_dir=f"killed{after}", **changes))
        assert digest(tmp_path / f"killed{after}") == whole, after
        assert verify(tmp_path / f"killed{after}") == [], after
    assert moments == 6


def test_going_back_behind_a_thinned_round_makes_it_again(toy, tmp_path):
    changes = {"rounds": 4, "samples": {"keep": "accepted"}, "checkpoints": {"keep": 4}}
    run(toy(output_dir="whole", **changes))
    run(toy(**changes))
    folder = tmp_path / "run"
    for key in ("0004", "0003", "0002"):
        (folder / "checkpoints" / key / "model.json").write_text("{}")
    (folder / "outcome.json").unlink()
    run(toy(**changes))
    assert digest(folder) == digest(tmp_path / "whole")
    assert names(folder, 2) == names(tmp_path / "whole", 2)
    assert all(not one.damage for one in verify(folder))


def test_more_rounds_thin_the_one_that_was_newest(toy, tmp_path):
    run(toy(rounds=2, samples={"keep": "accepted"}))
    assert "generated-00000.jsonl" in names(tmp_path / "run", 2)
    run(toy(rounds=3, samples={"keep": "accepted"}))
    assert "generated-00000.jsonl" not in names(tmp_path / "run", 2) and "accepted-00000.jsonl" in names(
        tmp_path / "run", 2
    )


def call(capsys, *argv):
    capsys.readouterr()
    code = isft([str(one) for one in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_readers_say_what_is_gone(toy, tmp_path, capsys):
    run(toy(output_dir="accepted", samples={"keep": "accepted"}))
    run(toy(output_dir="newest", samples={"keep": 1}))
    thin, newest = tmp_path / "accepted", tmp_path / "newest"
    code, out, err = call(capsys, "samples", thin, "--round", 1, "--limit", 0, "--json")
    accepted = json.loads(out)
    assert code == 0 and "only the accepted samples were kept" in err and all(one["accepted"] for one in accepted)
    first = accepted[0]["sample_id"]
    assert json.loads(call(capsys, "why", thin, first, "--json")[1])["weights"] == "toy-base"
    told = {
        ("samples", thin, "--round", 1, "--rejected"): (0, "only the accepted samples were kept"),
        ("refilter", thin, "--round", 1): (2, "only its accepted samples were kept"),
        ("why", thin, "1-0-99"): (2, "only these were kept"),
        ("export", thin, "--to", "dpo-jsonl", "--round", 1, "--out", tmp_path / "x"): (2, "no worse side"),
        ("samples", newest, "--round", 1): (2, "were dropped (samples.keep)"),
        ("refilter", newest, "--round", 1): (2, "were dropped (samples.keep)"),
        ("why", newest, "1-0-0"): (2, "were dropped (samples.keep)"),
        ("export", newest, "--to", "sft-jsonl", "--round", 2): (2, "were dropped (samples.keep)"),
    }
    for argv, (code, said) in told.items():
        got, _, err = call(capsys, *argv)
        assert got == code and said in err, (argv, err)
    for folder in (thin, newest):
        for argv in (
            ("show", folder),
            ("report", folder),
            ("list", tmp_path),
            ("samples", folder),
            ("refilter", folder),
        ):
            assert call(capsys, *argv)[0] == 0, argv
        rows_of = json.loads(call(capsys, "show", folder, "--json")[1])["lineage"]
        assert [row["weights"] != [] for row in rows_of] == [False, True, True, True]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"data": "accumulate"}}, "reads the samples of all rounds"),
        ({"train": {"data": {"window": 3}}}, "reads the samples of the newest 3 rounds"),
        ({"filters": ["finished", {"dedup": {"scope": "run"}}]}, "`dedup` may read"),
        ({"filters": ["mine.py:new"]}, "`new` may read"),
    ],
)
def test_what_would_be_missed_is_refused_before_anything_runs(toy, tmp_path, changes, said):
    (tmp_path / "mine.py").write_text("def new(sample, context):\n    return True\n")
    with pytest.raises(ConfigError) as caught:
        run(toy(samples={"keep": 2}, **changes))
    assert said in str(caught.value) and not (tmp_path / "run").exists()
    if "train" in changes:
        run(toy(rounds=2, samples={"keep": 2}, **changes))
