"""`isft fetch`: everything a config names is brought from a hub (one of this process), and then trains without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import report_runs
import yaml
from fake_hub import COMMIT, FakeHub
from report_runs import call


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    from tiny import save_tiny

    folder = tmp_path_factory.mktemp("hub")
    save_tiny(folder / "model", dtype="float32")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(
        "".join(json.dumps({"question": f"Say {n}", "answer": str(n)}) + "\n" for n in range(4))
    )
    made = FakeHub({"models/acme/tiny": folder / "model", "datasets/acme/questions": folder / "data"})
    yield made
    made.close()


def isft(hub, home, *argv, offline=False):
    """One command line in a process of its own; the hub's address and the caches are read when the libraries are imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": hub.address,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    env |= {"HF_HOME": str(home), **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    command = [sys.executable, "-m", "iterative_sft_cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)


def test_what_was_fetched_trains_without_a_network(hub, tmp_path):
    tree = {
        "model": "acme/tiny",
        "output_dir": str(tmp_path / "run"),
        "rounds": 1,
        "prompts": {"dataset": "acme/questions", "prompt": "question", "answer": "answer"},
        "generate": {"samples_per_prompt": 1, "max_new_tokens": 3},
        "filters": ["nonempty"],
        "train": {"start_from": "previous", "data": "replace"},
    }
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tree))
    shelf = tmp_path / "shelf"
    done = isft(hub, tmp_path / "own", "fetch", config, "--to", shelf, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    items = {one["where"]: one for one in found["items"]}
    assert items["model.path"]["commit"] == items["prompts.dataset"]["commit"] == COMMIT
    assert items["model.path"]["path"].startswith(str(shelf)) and items["prompts.dataset"]["path"].startswith(
        str(shelf)
    )
    assert found["pin"] == [f"model.revision={COMMIT}", f"prompts.dataset.revision={COMMIT}"]
    asked = len(hub.asked)
    done = isft(hub, shelf, "train", config, offline=True)
    assert done.returncode == 0, done.stderr
    assert len(hub.asked) == asked, hub.asked[asked:]
    done = isft(hub, tmp_path / "empty", "train", config, f"output_dir={tmp_path / 'other'}", offline=True)
    assert done.returncode == 4 and "isft fetch" in done.stderr and len(hub.asked) == asked


def test_local_things_are_listed_and_missing_ones_are_errors(tmp_path, capsys):
    from tiny import save_tiny

    save_tiny(tmp_path / "model", dtype="float32")
    path = report_runs.write_config(tmp_path)
    tree = yaml.safe_load(path.read_text()) | {"model": "model"}
    path.write_text(yaml.safe_dump(tree))
    code, out, err = call(capsys, "fetch", path, "--json")
    assert code == 0, err
    items = {one["where"]: one for one in json.loads(out)["items"]}
    assert set(items) == {"model.path", "prompts.path", "eval.path"} and all(
        one["commit"] is None for one in items.values()
    )
    assert items["model.path"]["bytes"] > 10_000
    code, out, err = call(capsys, "fetch", path)
    assert code == 0 and "dev.jsonl" in out and "local" in out
    (tmp_path / "dev.jsonl").unlink()
    code, _, err = call(capsys, "fetch", path)
    assert code == 4 and "eval.path: dev.jsonl" in err


def test_models_of_filters_and_other_sources_are_named(tmp_path, monkeypatch):
    from iterative_sft_cli.config import load_config
    from iterative_sft_cli.report import fetch as fetching

    monkeypatch.setattr(
        "iterative_sft_cli.model_source.find_folder", lambda name, base_dir, **options: (tmp_path, f"commit-of-{name}")
    )
    path = report_runs.write_config(
        tmp_path, filters=[{"reward_model": {"path": "acme/judge"}}, {"threshold": {"by": "reward_model", "min": 0}}]
    )
    tree = yaml.safe_load(path.read_text()) | {"model": {"path": "acme/tiny", "revision": "main"}}
    tree["generate"]["from"] = [{"model": "current", "share": 0.5}, {"model": "acme/teacher", "share": 0.5}]
    path.write_text(yaml.safe_dump(tree))
    items = {one.where: one for one in fetching.fetch(load_config(path))}
    assert items["generate.from"].name == "acme/teacher" and items["filters[0].path"].name == "acme/judge"
    assert items["filters[0].path"].kind == "filter model" and not items["model.path"].pinned
    assert fetching.pins(list(items.values())) == ["model.revision=commit-of-acme/tiny"]
