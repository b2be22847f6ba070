from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from config_files import load

from iterative_sft_cli.config import class_of, diff_configs
from iterative_sft_cli.config.drift import CLASSES
from iterative_sft_cli.config.walk import leaves


def test_every_key_has_a_class_and_no_class_is_left_over() -> None:
    known = {leaf.path for leaf in leaves()}
    assert known - set(CLASSES) == set(), "decide in drift.py what a change of these means for a run that is resumed"
    assert set(CLASSES) - known == set(), "these keys are gone"


def test_what_the_design_says_may_change(tmp_path: Path) -> None:
    frozen = [
        "seed",
        "prompts.system",
        "prompts.template",
        "filters",
        "filters[0].args",
        "model.adapter",
        "train.start_from",
    ]
    tunable = [
        "model.path",
        "prompts.path",
        "model.device",
        "generate.engine",
        "filters[2].timeout_s",
        "guards.max_hours",
    ]
    assert {class_of(path) for path in frozen} == {"frozen"}
    assert {class_of(path) for path in tunable} == {"tunable"}
    assert class_of("output_dir") == "cosmetic"
    assert class_of("filters[3].args.min.linear[0]") == "frozen"
    assert class_of("nobody.knows") == "frozen"
    assert class_of("guards") == "tunable" and class_of("eval") == "frozen"


@pytest.mark.parametrize(
    ("overrides", "drifts"),
    [
        ([], {}),
        (["rounds=5"], {"rounds": "tunable"}),
        (["rounds=2"], {"rounds": "frozen"}),
        (["output_dir=elsewhere"], {"output_dir": "cosmetic"}),
        (["model=elsewhere"], {"model.path": "tunable"}),
        (["model.adapter=lora"], {"model.adapter": "frozen"}),
        (["generate.temperature=0.9"], {"generate.temperature": "frozen"}),
        (["generate.temperature={by_round: [1, 1, 1]}"], {"generate.temperature": "frozen"}),
        (["prompts.answer=other"], {"prompts.answer.column": "frozen"}),
        (["filters[3]={max_per_prompt: 5}"], {"filters[3].bare": "frozen"}),
        (["filters[1]={use: numeric_answer, timeout_s: 5}"], {"filters[1].timeout_s": "tunable"}),
        (["filters=[finished, dedup]"], {"filters": "frozen"}),
        (["filters=[finished, dedup, numeric_answer, {max_per_prompt: 4}]"], {"filters": "frozen"}),
        (["eval=null"], {"eval": "frozen"}),
        (["eval.every=2", "checkpoints.keep=9"], {"eval.every": "tunable", "checkpoints.keep": "tunable"}),
        (["train.data={window: 2}"], {"train.data": "frozen"}),
        (["train.steps=3"], {"train.epochs": "frozen", "train.steps": "frozen"}),
        (["warmup=seed.jsonl"], {"warmup": "frozen"}),
    ],
)
def test_a_change_is_found_and_classed(tmp_path: Path, overrides: list[str], drifts: dict[str, str]) -> None:
    before, after = load(tmp_path).merged, load(tmp_path, *overrides).merged
    found = diff_configs(before, after)
    assert {drift.path: drift.cls for drift in found} == drifts
    assert all(drift.old != drift.new for drift in found)


def test_naming_further_rounds_changes_no_earlier_one(tmp_path: Path) -> None:
    before = load(tmp_path, "generate.temperature={by_round: [1, 0.9, 0.8]}").merged
    longer = load(tmp_path, "rounds=4", "generate.temperature={by_round: [1, 0.9, 0.8, 0.7]}").merged
    other = load(tmp_path, "rounds=4", "generate.temperature={by_round: [1, 0.9, 0.7, 0.7]}").merged
    assert {d.path: d.cls for d in diff_configs(before, longer)} == {
        "rounds": "tunable",
        "generate.temperature": "tunable",
    }
    assert {d.path: d.cls for d in diff_configs(before, other)} == {
        "rounds": "tunable",
        "generate.temperature": "frozen",
    }


def test_a_key_that_an_older_version_did_not_know_counts_as_its_default(tmp_path: Path) -> None:
    new = load(tmp_path).merged
    old = copy.deepcopy(new)
    del old["generate"]["min_p"], old["train"]["mix"], old["filters"][0]["on_error"], old["checkpoints"]["keep_best"]
    assert diff_configs(old, new) == []
    changed = load(tmp_path, "generate.min_p=0.1").merged
    assert [(d.path, d.old, d.new) for d in diff_configs(old, changed)] == [("generate.min_p", 0.0, 0.1)]


def test_each_key_alone_is_noticed(tmp_path: Path) -> None:
    base = load(tmp_path, "model.adapter=lora", "warmup=s", "train.mix={path: s, share: 0.5}").merged
    checked = 0
    for leaf in leaves():
        steps = re.sub(r"\[\]", ".0", leaf.path).split(".")
        changed = copy.deepcopy(base)
        here: object = changed
        for step in steps[:-1]:
            here = (
                here.get(step)
                if isinstance(here, dict)
                else here[int(step)]
                if isinstance(here, list) and here
                else None
            )
        if not isinstance(here, dict) or isinstance(here.get(steps[-1]), dict | list) and here[steps[-1]]:
            continue
        here[steps[-1]] = "something else"
        found = diff_configs(base, changed)
        assert len(found) == 1 and found[0].cls == CLASSES[leaf.path], (leaf.path, found)
        checked += 1
    assert checked > 100
