from __future__ import annotations

from pathlib import Path

import pytest
from config_files import load, problems

HEX = "0123456789abcdef0123456789abcdef01234567"

# overrides of the short config: the path that is blamed, and a piece of what is said
IMPOSSIBLE: list[tuple[list[str], str, str]] = [
    (["train.start_from=best", "eval=null"], "train.start_from", "without `eval` no round is best"),
    (["train.start_from={by_round: [base, best, best]}", "eval=null"], "train.start_from", "no round is best"),
    (["generate.from=best", "eval=null"], "generate.from", "no round is best"),
    (["train.start_from=warmup"], "train.start_from", "there is no warm-up"),
    (["generate.from=warmup"], "generate.from", "there is no warm-up"),
    (["generate.from=[{model: warmup, share: 1}]"], "generate.from[0].model", "there is no warm-up"),
    (["generate.from=[{model: base, share: 0.5}, {model: current, share: 0.6}]"], "generate.from", "add up to 1.1"),
    (["train.start_from=base", "train.optimizer_state=keep"], "train.optimizer_state", "a start from base"),
    (
        ["train.start_from={by_round: [previous, base, previous]}", "train.optimizer_state=keep"],
        "train.optimizer_state",
        "a start from base",
    ),
    (["train.lr_schedule=continue"], "train.lr_schedule", "needs to know their steps"),
    (["train.steps=10", "train.epochs=1"], "train.steps", "steps and epochs are both set"),
    (["warmup={path: s, steps: 10, epochs: 1}"], "warmup.steps", "both set"),
    (["train.passes=[{epochs: 1, steps: 2}]"], "train.passes[0].steps", "both set"),
    (["generate.do_sample=false", "eval=null"], "generate.samples_per_prompt", "the same completion 8 times"),
    (
        ["generate.do_sample={by_round: [true, false, true]}", "eval=null"],
        "generate.samples_per_prompt",
        "8 times in round 2",
    ),
    (["generate.temperature=0", "eval=null"], "generate.temperature", "cannot be sampled with"),
    (["generate.temperature={linear: [1, 0]}"], "generate.temperature", "in round 3"),
    (["eval.do_sample=false"], "eval.samples_per_prompt", "the same completion 4 times"),
    (["eval.temperature=0"], "eval.temperature", "cannot be sampled with"),
    (["eval.k=[1, 8]"], "eval.k", "pass@8 cannot be told from 4 samples"),
    (["eval.metric=pass@5"], "eval.metric", "pass@5 cannot be told from 4 samples"),
    (["eval.metric=maj@64"], "eval.metric", "maj@64 cannot be told from 4 samples"),
    (["eval.metric=greedy"], "eval.metric", "no greedy answers"),
    (["eval.correct=numeric"], "eval.correct[0]", "no filter named"),
    (["eval.correct=[]"], "eval.correct", "no filter is named"),
    (["eval.path=prompts.jsonl"], "eval.path", "are trained on"),
    (["prompts.dataset={id: a/b}", "eval.dataset={id: a/b}"], "eval.dataset", "are trained on"),
    (
        ["prompts.reasoning_gym={task: chain_sum, size: 100}", "eval.reasoning_gym={task: chain_sum, seed: 50}"],
        "eval.reasoning_gym.seed",
        "are trained on",
    ),
    (
        ["filters[3]={threshold: {by: dedup, min: {by_round: [1]}}}"],
        "filters[3].threshold.min.by_round",
        "1 values for 3",
    ),
    (["filters[3]={use: threshold, args: {min: {by_round: [1]}}}"], "filters[3].args.min.by_round", "1 values for 3"),
    (["filters=[]"], "eval", "nothing says which answers are correct"),
    (["eval.path=null"], "eval", "no source of prompts"),
    (["prompts.path=null"], "prompts", "no source of prompts"),
    (["prompts.path=x", "prompts.dataset=y"], "prompts.dataset", "both name a source"),
    (["prompts.args={a: 1}"], "prompts.args", "no `use`"),
    (["prompts.use=nobody"], "prompts.use", "no prompt source named"),
    (["prompts.order=curriculum"], "prompts.order", "prompts.level"),
    (["prompts.skip={solved_at_least: 0.5, solved_at_most: 0.5}"], "prompts.skip.solved_at_most", "all prompts"),
    (["prompts.template=none", "prompts.template_kwargs={a: 1}"], "prompts.template_kwargs", "no template"),
    (["prompts.answer=null"], "filters[1]", "numeric_answer compares with an answer"),
    (["train.mix={share: 0.5}"], "train.mix", "no seed data"),
    (["train.mix={path: a, dataset: b, share: 0.5}"], "train.mix.dataset", "both name seed data"),
    (["train.mix={path: a, share: 1}"], "train.mix.share", "less than 1"),
    (["warmup={epochs: 1}"], "warmup", "no seed data"),
    (["train.data={window: 0}"], "train.data.window", "at least 1"),
    (["train.data={}"], "train.data.window", "missing"),
    (["train.objective=iw"], "train.objective", "generate.keep_logprobs: true"),
    (["train.objective=nlll"], "train.objective", "Did you mean nll?"),
    (["train.weight_by=reward"], "train.weight_by", "no filter gives a score named reward"),
    (["train.weight_by={by_round: ['1', numeric_answer, nope]}"], "train.weight_by", "named nope"),
    (["train.passes=[{threshold: 0.5, by: nope}]"], "train.passes[0].by", "named nope"),
    (["train.passes=[{threshold: 0.5}]"], "train.passes[0].threshold", "nothing is compared"),
    (["train.passes=[]"], "train.passes", "the list is empty"),
    (["model={revision: x}"], "model", "no model is named"),
    (["model={path: a, init: {model_type: llama}}"], "model.init", "both name a model"),
    (["model={path: a, use: 'a.b:c'}"], "model.use", "both name a model"),
    (["model.init={model_type: llama}"], "model.init", "no tokenizer of its own"),
    (["model.init={hidden_size: 8}", "model.tokenizer=t"], "model.init", "model_type is missing"),
    (["model.init={model_type: llama}", "model.tokenizer=t", "model.revision=x"], "model.revision", "no revision"),
    (["model.args={a: 1}"], "model.args", "no `use`"),
    (["model.quantization=4bit"], "model.quantization", "model.adapter"),
    (["model.trust_remote_code=true"], "model.trust_remote_code", "40 hexadecimal digits"),
    (["model.trust_remote_code=true", "model.revision=main"], "model.trust_remote_code", "40 hexadecimal digits"),
    (["generate.engine=vlm"], "generate.engine", "Did you mean vllm?"),
    (["generate.args={a: 1}"], "generate.args", "takes no args"),
    (["generate.temperature={by_round: [1, 0.5]}"], "generate.temperature.by_round", "2 values for 3 rounds"),
    (["rounds=4", "generate.top_k={by_round: [1, 2, 3]}"], "generate.top_k.by_round", "3 values for 4 rounds"),
    (
        ["filters[3]={max_per_prompt: {by_round: [1, 2]}}"],
        "filters[3].max_per_prompt.by_round",
        "2 values for 3 rounds",
    ),
    (["train.steps={start: 40, add: -30}"], "train.steps", "-20 is too small in round 3"),
    (["train.epochs={start: 1, factor: 1e300}"], "train.epochs", "in round 3"),
    (["generate.wave_size=2"], "generate.wave_size", "without until_accepted there are no waves"),
    (["generate.until_accepted=9"], "generate.until_accepted", "9 can never be accepted of 8 samples"),
    (
        ["generate.until_accepted=2", "filters[2]={dedup: {scope: run}}"],
        "generate.until_accepted",
        "dedup (filters[2])",
    ),
    (["generate.until_accepted=2", "filters[2]=majority"], "generate.until_accepted", "majority (filters[2])"),
    (["generate.until_accepted=2", "filters[2]={top_fraction: 0.5}"], "generate.until_accepted", "top_fraction"),
    (["rationalize={template: hint}"], "rationalize.template", "{answer}"),
    (["filters=[{use: dedup, name: a}, {use: finished, name: a}]"], "filters[1].name", "also the name of filters[0]"),
    (["filters[0]={use: finished, env: [A=b]}"], "filters[0].env[0]", "environment variable"),
    (["tracking=[wandbb]"], "tracking[0]", "Did you mean wandb?"),
    (["output_dir=runs/{sed}"], "output_dir", "Did you mean {seed}?"),
    (["output_dir=runs/{train}"], "output_dir", "{train} is a mapping"),
    (["output_dir=runs/{seed"], "output_dir", "a brace without its partner"),
    (["prompts.answer={column: a, pattern: '(a)(b)'}"], "prompts.answer.pattern", "2 groups"),
]


@pytest.mark.parametrize(("overrides", "path", "piece"), IMPOSSIBLE, ids=[" ".join(case[0]) for case in IMPOSSIBLE])
def test_impossible_combinations_are_refused_where_they_stand(
    tmp_path: Path, overrides: list[str], path: str, piece: str
) -> None:
    said = problems(tmp_path, *overrides)
    hits = [text for text in said if piece in text and f": {path}: " in text]
    assert hits, said


POSSIBLE: list[list[str]] = [
    ["train.start_from=best"],
    ["train.start_from=base", "train.optimizer_state=fresh"],
    ["warmup=seed.jsonl", "train.start_from=warmup"],
    ["warmup={dataset: a/b, steps: 3}", "generate.from=warmup"],
    ["train.start_from={by_round: [base, previous, previous]}"],
    ["train.steps=10", "train.lr_schedule=continue"],
    ["generate.do_sample=false", "generate.samples_per_prompt=1", "eval.do_sample=true"],
    ["generate.do_sample=false", "generate.samples_per_prompt=2", "eval=null"]
    + ["generate.from=[{model: a, share: 0.5}, {model: b, share: 0.5}]"],
    ["generate.temperature={linear: [1, 0.1]}"],
    ["generate.temperature=0", "generate.do_sample=false", "generate.samples_per_prompt=1", "eval=null"],
    ["eval.k=[1, 4]", "eval.metric=maj@4"],
    ["eval.k=[4]", "eval.metric=pass@2"],
    ["eval.greedy=true", "eval.metric=greedy"],
    ["eval.correct=[finished, numeric_answer]"],
    ["prompts.dataset={id: a/b}", "eval.dataset={id: a/b, split: test}"],
    ["prompts.reasoning_gym=chain_sum", "eval.reasoning_gym={task: chain_sum, seed: 1000}", "prompts.answer=null"],
    ["prompts.level=hardness", "prompts.order=curriculum"],
    ["prompts.use=my.source:rows", "prompts.args={a: 1}"],
    ["train.mix={path: a, share: {linear: [0.5, 0.1]}}"],
    ["train.data={window: 100}"],
    ["train.objective=iw", "generate.keep_logprobs=true"],
    ["train.objective=my.losses:best"],
    ["train.weight_by=max(0, numeric_answer - 0.5)"],
    ["train.passes=[{threshold: 0.5, by: numeric_answer, learning_rate: 1e-4}, {threshold: 0.9, by: numeric_answer}]"],
    ["model={init: {model_type: llama}, tokenizer: t}"],
    ["model={use: 'a.b:c', args: {x: 1}}"],
    ["model.trust_remote_code=true", f"model.revision={HEX}"],
    ["generate.top_k={by_round: [1, 2, 3, 4]}"],
    ["filters=[]", "eval=null"],
    ["tracking=none"],
    ["rationalize=none"],
    ["eval=none"],
    ["output_dir=runs/{seed}-{model.path}-{train.learning_rate}"],
]


@pytest.mark.parametrize("overrides", POSSIBLE, ids=[" ".join(case) for case in POSSIBLE])
def test_possible_combinations_load(tmp_path: Path, overrides: list[str]) -> None:
    load(tmp_path, *overrides)


def test_code_of_a_local_folder_needs_no_revision(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    load(tmp_path, "model={path: mine, trust_remote_code: true}")


def test_placeholders_are_filled_with_names_that_are_safe(tmp_path: Path) -> None:
    loaded = load(tmp_path, "output_dir=runs/{seed}-{model.path}-{train.learning_rate}", "seed=3")
    assert loaded.config.output_dir == "runs/3-HuggingFaceTB-SmolLM2-135M-Instruct-2e-05"
    assert loaded.merged["output_dir"] == loaded.config.output_dir
    up = load(tmp_path, "output_dir=runs/{model.path}", "model=../../etc")
    assert up.config.output_dir == "runs/etc"


@pytest.mark.parametrize(
    ("overrides", "piece"),
    [
        (["filters=[]", "eval=null"], "every sample is trained on"),
        (["train.data=replace", "rounds=3"], "often collapses"),
        (
            ["generate={do_sample: false, temperature: 0.5, samples_per_prompt: 1}", "eval=null"],
            "generate.temperature has no effect",
        ),
        (["generate.from=base"], "do not come from the weights"),
        (["filters=[reasoning_gym, {threshold: {by: reasoning_gym, min: 0.5}}]"], "part of the score"),
    ],
)
def test_what_will_probably_disappoint_is_said(tmp_path: Path, overrides: list[str], piece: str) -> None:
    assert any(piece in text for text in load(tmp_path, *overrides).warnings)


@pytest.mark.parametrize(
    "overrides", [["train.data=replace", "rounds=2"], ["train.data=replace", "train.start_from=base"]]
)
def test_and_what_will_not_is_not(tmp_path: Path, overrides: list[str]) -> None:
    assert load(tmp_path, *overrides).warnings == []


def test_the_names_that_rules_know_are_those_of_the_package() -> None:
    import ast

    from iterative_sft_cli.config import advice, rules_rounds
    from iterative_sft_cli.filters.builtin import NAMES

    assert set(NAMES) >= rules_rounds.ROUND_WIDE | rules_rounds.ANSWER_FILTERS | advice.PARTIAL_CREDIT
    source = Path(rules_rounds.__file__).parent.parent / "train" / "objectives.py"
    built_in = next(
        node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "BUILTIN"
    )
    assert isinstance(built_in, ast.Dict)
    assert {key.value for key in built_in.keys if isinstance(key, ast.Constant)} == set(rules_rounds.OBJECTIVES)
