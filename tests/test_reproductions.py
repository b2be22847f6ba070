"""The reproductions: every arm's config loads, the kept results are those of the study, and the script's figures are right."""

import importlib.machinery
import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from iterative_sft_cli.config import load_config

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted((ROOT / "configs" / "reproductions").glob("*/study.yaml"))
ARMS = [(path, arm) for path in STUDIES for arm in yaml.safe_load(path.read_text())["arms"]]


@pytest.fixture(scope="module")
def script():
    loader = importlib.machinery.SourceFileLoader("reproduce", str(ROOT / "scripts" / "reproduce"))
    spec = importlib.util.spec_from_loader("reproduce", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(("path", "arm"), ARMS, ids=[f"{path.parent.name}-{arm}" for path, arm in ARMS])
def test_every_arm_loads(path, arm):
    study = yaml.safe_load(path.read_text())
    loaded = load_config(path.parent / study["config"], list(study["arms"][arm] or []))
    assert loaded.config.rounds >= 1
    assert (loaded.config.model.init is None) == bool(study.get("needs_model"))


KEPT = [path for path in STUDIES if (path.parent / "results.json").is_file()]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_what_is_kept_is_what_the_study_says(path, script):
    study, folder = yaml.safe_load(path.read_text()), path.parent
    results = json.loads((folder / "results.json").read_text())
    assert set(results["arms"]) <= set(study["arms"]) and set(results["seeds"]) <= set(study["seeds"])
    assert sum(results["seconds"].values()) < 3600
    text = (folder / "RESULTS.md").read_text()
    assert study["reading"].strip() in text and "To be written" not in text
    for figure in study["figures"]:
        assert f"## {figure['name']}" in text
        for arm in results["arms"]:
            assert script.points(results, arm, figure) or not figure.get("plot", True), (arm, figure)
        if figure.get("plot", True):
            ElementTree.parse(folder / f"{figure['name'].replace(' ', '-')}.svg")


def test_figures_are_means_over_seeds_with_students_interval(script):
    rows = {str(seed): [{"round": 0, "x": 0.0}, {"round": 1, "x": value}] for seed, value in enumerate((1.0, 2.0, 3.0))}
    results = {"arms": {"a": rows, "b": {"0": [{"round": 1, "y/3/z": 0.5, "y/10/z": 0.25}]}}}
    assert script.curve(results, "a", "x") == [(0, 0.0), (1, 2.0)]
    assert script.by_level(results, "b", {"key": "y/*/z"}) == [(3.0, 0.5), (10.0, 0.25)]
    # 4.303 / sqrt(3) = 2.484
    assert script.spread(results, "a", "x") == "2.000 [-0.484, 4.484] (1, 2, 3)"
    assert script.keep({"round": 1, "y/3/z": 1, "other": 2}, [{"key": "y/*/z"}]) == {"round": 1, "y/3/z": 1}


def test_figures_are_drawn_the_same_every_time(script, tmp_path):
    pytest.importorskip("matplotlib")
    results = {"arms": {"one": {"0": [{"round": 0, "x": 0.5}, {"round": 1, "x": 0.7}]}, "two": {"0": [{"round": 0}]}}}
    for name in ("a", "b"):
        script.plot(results, {"name": "share of it", "key": "x"}, tmp_path / f"{name}.svg")
    drawn = [ElementTree.parse(tmp_path / f"{name}.svg").getroot() for name in ("a", "b")]
    texts = [text.strip() for text in drawn[0].itertext()]
    assert {"one", "share of it", "round"} <= set(texts)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
