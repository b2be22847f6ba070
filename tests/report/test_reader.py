"""`Run.open`: what a program sees of a run directory."""

from __future__ import annotations

from iterative_sft_cli import Run
from iterative_sft_cli.samples import read_eval_prompts


def test_the_prompts_of_the_evaluation_are_kept_with_the_run(done):
    run = Run.open(done)
    prompts = read_eval_prompts(run.view.shards)
    asked = {row["prompt_id"] for row in run.view.shards.read(0, "eval-00000")[0]}
    assert asked == set(prompts) and prompts["0"].prompt == "4+0" and prompts["0"].answer == "4"
