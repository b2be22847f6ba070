from __future__ import annotations

from pathlib import Path

import pytest
from config_files import SHORT, load, problems, read
from pydantic import ValidationError

from iterative_sft_cli.config import Config, FilterEntry, WindowConfig, resolved_yaml
from iterative_sft_cli.config.walk import leaves

FULL = """\
model:
  path: models/base
  revision: main
  dtype: bfloat16
  device: cuda:1
  attention: eager
  adapter: {type: lora, r: 8, alpha: 16, dropout: 0.1, target_modules: [q_proj, v_proj]}
output_dir: runs/{seed}
seed: 7
rounds: 4
deterministic: true
prompts:
  dataset: {id: openai/gsm8k, name: main, split: train}
  prompt: question
  answer: {column: answer, pattern: '#### (.+)'}
  id: qid
  level: hardness
  limit: 100
  system: Be brief.
  few_shot: shots.jsonl
  template_kwargs: {enable_thinking: false}
  per_round: 0.5
  order: curriculum
  skip: {solved_at_least: 0.9, solved_at_most: 0}
generate:
  engine: transformers
  samples_per_prompt: {start: 4, add: 2, max: 8}
  from: [{model: current, share: 0.75}, {model: base, share: 0.25}]
  temperature: {linear: [1.0, 0.7]}
  top_p: 0.9
  top_k: 40
  min_p: 0.05
  repetition_penalty: 1.1
  stop: ["###", "Q:"]
  keep_logprobs: true
  memory_gb: 2.5
filters:
  - finished
  - regex: {pattern: '\\d+$'}
  - regex: {pattern: '^A'}
  - math_verify: {drop: false}
  - threshold: {by: math_verify, min: {by_round: [0, 0.5, 1, 1]}}
  - {use: 'graders/mine.py:grade', name: grade, args: {strict: true}, timeout_s: 5, workers: 2, env: MY_KEY, on_error: retry}
  - my_package.graders:Judge
train:
  start_from: base
  data: {window: 2}
  mix: {path: seed.jsonl, share: 0.25}
  objective: rwr
  weight_by: exp(math_verify / 0.5) * grade
  steps: {start: 40, factor: 1.2, max: 60}
  learning_rate: 1e-4
  lr_schedule: continue
  max_grad_norm: null
  batch_size: 1e1
warmup: {path: seed.jsonl, epochs: 2, learning_rate: 5e-5}
eval:
  dataset: {id: openai/gsm8k, name: main, split: test}
  samples_per_prompt: 8
  k: [1, 8]
  greedy: true
  correct: [math_verify, grade]
  metric: maj@8
  temperature: 0.7
guards: {min_accepted: 10, max_truncated_rate: 0.3, on_empty: skip, max_hours: 5}
checkpoints: {keep: 3, every_steps: 100, every_s: null}
"""


def test_the_short_form_of_the_design_loads_without_a_warning(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    config = loaded.config
    assert config.model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config.prompts.prompt, config.prompts.answer.column) == ("question", "answer")
    assert config.train.learning_rate == 2e-5 and config.train.optimizer_state == "keep"
    assert [entry.use for entry in config.filters] == ["finished", "numeric_answer", "dedup", "max_per_prompt"]
    assert (config.filters[3].bare, config.filters[3].key) == (4, "filters[3]")
    assert config.eval.prompt is None and config.eval.answer is None
    assert loaded.warnings == []
    assert (loaded.source, loaded.base_dir) == (SHORT.encode(), tmp_path)


def test_the_full_form_loads_and_every_value_arrives(tmp_path: Path) -> None:
    config = load(tmp_path, text=FULL).config
    assert config.model.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.output_dir == "runs/7"
    assert (config.prompts.dataset.id, config.prompts.dataset.name) == ("openai/gsm8k", "main")
    assert config.prompts.answer.pattern == "#### (.+)"
    assert [one.model for one in config.generate.from_] == ["current", "base"]
    assert [entry.name for entry in config.filters] == [
        "finished",
        "regex",
        "regex_2",
        "math_verify",
        "threshold",
        "grade",
        "Judge",
    ]
    assert config.filters[5].args == {"strict": True} and config.filters[5].env == ["MY_KEY"]
    assert config.train.data == WindowConfig(window=2)
    assert config.train.batch_size == 10 and config.train.max_grad_norm is None
    assert config.checkpoints.every_s is None


def test_at_round_leaves_scalars_only_and_rounds_outside_hold_the_ends(tmp_path: Path) -> None:
    config = load(tmp_path, text=FULL).config
    rounds = [config.at_round(r) for r in range(7)]
    assert [one.generate.temperature for one in rounds] == pytest.approx([1.0, 1.0, 0.9, 0.8, 0.7, 0.7, 0.7])
    assert [one.generate.samples_per_prompt for one in rounds] == [4, 4, 6, 8, 8, 8, 8]
    assert [one.train.steps for one in rounds] == [40, 40, 48, 58, 60, 60, 60]
    assert [one.filters[4].args["min"] for one in rounds] == [0, 0, 0.5, 1, 1, 1, 1]
    assert [one.filters[4].key for one in rounds] == ["filters[4]"] * 7
    assert config.at_round(2).at_round(4) == config.at_round(2)


def test_the_resolved_yaml_loads_to_the_same_config(tmp_path: Path) -> None:
    for text in (SHORT, FULL):
        loaded = load(tmp_path, text=text)
        again = tmp_path / "resolved.yaml"
        again.write_text(resolved_yaml(loaded.config))
        second = read(again)
        assert second.config == loaded.config and second.merged == loaded.merged


def test_texts_that_look_like_other_things_survive_the_resolved_yaml(tmp_path: Path) -> None:
    for value in (
        "yes",
        "1:30",
        "010",
        "2e-5",
        "null",
        "~",
        "1_000",
        "0x1F",
        "2024-01-01",
        "=",
        "a: b",
        "#x",
        "é\u2028x",
        " x",
    ):
        loaded = load(tmp_path, "generate.stop=null")
        config = loaded.config.model_copy(
            update={"generate": loaded.config.generate.model_copy(update={"stop": [value], "args": {}})}
        )
        again = tmp_path / "resolved.yaml"
        again.write_text(resolved_yaml(config))
        assert read(again).config.generate.stop == [value]


def test_decoding_of_eval_is_its_own_where_given_and_else_that_of_round_1(tmp_path: Path) -> None:
    config = load(tmp_path, text=FULL).config
    decoding = config.eval_decoding(eos_token_ids=(2,))
    assert (decoding.temperature, decoding.top_k, decoding.stop) == (0.7, 40, ("###", "Q:"))
    assert decoding.eos_token_ids == (2,) and decoding.keep_logprobs is False
    assert config.at_round(4).generate.decoding().temperature == pytest.approx(0.7)
    plain = load(tmp_path, "generate.temperature={linear: [1, 0.5]}").config
    assert plain.eval_decoding().temperature == 1.0


def test_warm_up_trains_with_its_own_keys_and_those_of_train(tmp_path: Path) -> None:
    config = load(tmp_path, text=FULL).config
    settings = config.warmup.training(config.at_round(1).train)
    assert (settings.learning_rate, settings.epochs, settings.steps) == (5e-5, 2, None)
    assert (settings.objective, settings.weight_by, settings.batch_size) == ("nll", None, 10)


def test_greedy_decoding_draws_one_sample_by_default() -> None:
    base = {"model": "m", "output_dir": "o", "rounds": 1, "prompts": {"path": "p"}}
    train = {"start_from": "base", "data": "replace"}
    config = Config.model_validate({**base, "train": train, "generate": {"do_sample": False}})
    assert config.generate.samples_per_prompt == 1


@pytest.mark.parametrize(
    ("start_from", "expected"),
    [("previous", "keep"), ("base", "fresh"), ({"by_round": ["base", "previous", "previous"]}, "fresh")],
)
def test_the_optimizer_state_follows_the_start(tmp_path: Path, start_from: object, expected: str) -> None:
    import json

    config = load(tmp_path, f"train.start_from={json.dumps(start_from)}").config
    assert config.train.optimizer_state == expected


def test_one_epoch_is_trained_unless_told_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path, "train.epochs=null").config.train.epochs == 1
    assert load(tmp_path, "train.steps=7").config.train.epochs is None


@pytest.mark.parametrize(
    ("entry", "use", "name", "args", "bare"),
    [
        ("dedup", "dedup", "dedup", {}, None),
        ({"max_per_prompt": 4}, "max_per_prompt", "max_per_prompt", {}, 4),
        ({"max_per_prompt": None}, "max_per_prompt", "max_per_prompt", {}, None),
        ({"regex": {"pattern": "x"}}, "regex", "regex", {"pattern": "x"}, None),
        ({"use": "regex", "args": {"pattern": "x"}, "name": "form"}, "regex", "form", {"pattern": "x"}, None),
        ("a/b.py:Grade", "a/b.py:Grade", "Grade", {}, None),
        ({"pkg.mod:fn": ["a", "b"]}, "pkg.mod:fn", "fn", {}, ["a", "b"]),
    ],
)
def test_every_short_form_of_a_filter(entry: object, use: str, name: str, args: dict, bare: object) -> None:
    filter_entry = FilterEntry.model_validate(entry)
    assert (filter_entry.use, filter_entry.name, filter_entry.args, filter_entry.bare) == (use, name, args, bare)


@pytest.mark.parametrize("entry", [None, 4, [], {}, {"a": 1, "b": 2}, {"use": "a", "foo": 1}, {"use": ""}])
def test_what_is_no_filter_is_refused(entry: object) -> None:
    with pytest.raises(ValidationError):
        FilterEntry.model_validate(entry)


def test_sections_are_frozen(tmp_path: Path) -> None:
    config = load(tmp_path).config
    with pytest.raises(ValidationError):
        config.train.epochs = 3


def test_every_key_and_section_is_documented() -> None:
    undocumented = [leaf.path for leaf in leaves() if not (leaf.field.description or "").endswith(".")]
    assert undocumented == []
    assert [s.__name__ for s in {leaf.section for leaf in leaves()} if not s.__doc__] == []


def test_no_key_and_no_word_of_the_schema_is_a_boolean_in_other_yaml_readers() -> None:
    words = {"on", "off", "yes", "no", "y", "n"}
    assert [leaf.path for leaf in leaves() if set(leaf.path.replace("[]", "").split(".")) & words] == []
    assert problems  # imported for the other files' sake
