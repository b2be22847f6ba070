"""Combinations of method keys that cannot work are refused where they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import load, problems

ONE = ["generate.samples_per_prompt=1", "eval=none"]


@pytest.mark.parametrize(
    ("overrides", "where", "said"),
    [
        (["generate.until_total=5", "generate.until_accepted=1"], "generate.until_total", "exactly one of them"),
        (["generate.budget=prop_difficulty"], "generate.budget.kind", "until_accepted beside it"),
        (["generate.budget=gvm", "generate.until_accepted=1"], "generate.until_accepted", "gvm fixes"),
        (
            ["generate.budget={kind: prop_difficulty, pilot: 9}", "generate.until_accepted=1"],
            "generate.budget.pilot",
            "at most 8",
        ),
        (["generate.until_total=5", "filters=[majority]"], "generate.until_total", "not drawn yet"),
        (["generate.budget=gvm", "filters=[{dedup: {tie: shortest}}]"], "generate.budget", "not drawn yet"),
        (["generate.search={}"], "generate.search", "nothing to try"),
        (["generate.search={min: [0]}"], "generate.search.filter", "no threshold named"),
        (
            ["generate.search={temperature: [1.0]}", "generate.do_sample=false", *ONE],
            "generate.search.temperature",
            "greedy",
        ),
        (
            ["rationalize={template: '{answer}', samples_per_prompt: 2}", "generate.do_sample=false", *ONE],
            "rationalize.samples_per_prompt",
            "same completion",
        ),
        (["prompts.curriculum={start: 1}"], "prompts.curriculum", "order: curriculum"),
        (["prompts.advance=accept_rate"], "prompts.advance", "order: adaptive"),
        (["prompts.advance=foo", "prompts.order=adaptive"], "prompts.advance", "accept_rate"),
        (["prompts.advance='1 +'", "prompts.order=adaptive"], "prompts.advance", "ends too early"),
        (["train.new_share=0.5", "train.mix={path: x, share: 0.5}"], "train.mix.share", "expected all"),
        (["train.mix={path: x, share: 0.5, weight: 3}"], "train.mix.weight", "new_share"),
        (
            ["train.objective=iw", "generate.keep_logprobs=true", "train.mix={path: x, share: 0.5}"],
            "train.mix",
            "log probabilities",
        ),
        (["train.objective=iw", "generate.keep_logprobs=true", "generate.stop=x"], "generate.stop", "not sampled"),
        (["train.formats=[]"], "train.formats", "at least one form"),
        (["filters=[majority]", "generate.samples_per_prompt=2"], "filters[0]", "3 votes"),
        (["guards.rollback_if=round > 1", "eval=none"], "guards.rollback_if", "an eval section"),
        (["guards.rollback_if=round > 1", "checkpoints.keep_best=false"], "guards.rollback_if", "keep_best"),
        (["guards.stop_if=eval/pass@1 > 1", "eval=none"], "guards.stop_if", "no eval/pass@1"),
        (["guards.stop_if=rationalize/num_accepted < 1"], "guards.stop_if", "without `rationalize`"),
        (["guards.stop_if=pass > 1"], "guards.stop_if", "no figure"),
        (["guards.stop_if=eval/pass@1"], "guards.stop_if", "no condition"),
        (["guards.stop_if=plateau(eval/pass@1)"], "guards.stop_if", "plateau(eval/pass@1, n)"),
        (["eval.rank_by=foo"], "eval.rank_by", "no filter named"),
        (["eval.metric=best@1", "eval.k=[1]"], "eval.metric", "rank_by"),
    ],
)
def test_it_is_refused(tmp_path: Path, overrides: list[str], where: str, said: str) -> None:
    found = problems(tmp_path, *overrides)
    assert len(found) == 1 and f"{where}:" in found[0] and said in found[0], found


@pytest.mark.parametrize(
    "overrides",
    [
        ["generate.until_total=5"],
        ["generate.budget={kind: prop_difficulty, pilot: 8}", "generate.until_accepted=4"],
        ["generate.budget=gvm"],
        ["generate.search={temperature: [0.5]}"],
        ["train.new_share=0.5", "train.mix={path: x, share: all, weight: 3}"],
        ["guards.stop_if=plateau(eval/pass@1, 2) or falls(filters/accept_rate, 3) and round > 2"],
        ["guards.rollback_if=eval/pass@1 < best(eval/pass@1) - 0.02"],
        ["train.formats=[{few_shot: none}]"],
        ["rationalize={template: '{prompt} ({answer})', share: 0.5}"],
    ],
)
def test_it_is_allowed(tmp_path: Path, overrides: list[str]) -> None:
    load(tmp_path, *overrides)
