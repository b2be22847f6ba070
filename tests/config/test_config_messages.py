from __future__ import annotations

from pathlib import Path

import pytest
from config_files import SHORT, load, problems, write

from iterative_sft_cli.config import Config, InvalidConfig, load_config, parse_config
from iterative_sft_cli.errors import ConfigError

BAD = """\
model: {path: HuggingFaceTB/SmolLM2-135M-Instruct, torch_dtype: bf16, device: gpu, trust_remote_code: yes}
rounds: 0
prompts: {path: prompts.jsonl, question: question, answer: {column: answer, pattern: "(a"}}
generate:
  num_samples: 8
  temperature: hot
  top_p: 1.5
  do_sample: false
  samples_per_prompt: 4
  top_k: {by_round: [1, x]}
filters:
  - finished
  - max_per_prompt: 4
    foo: 1
  - {use: dedup, timeout: 3}
  - 4
train: {start_from: last, data: {windw: 3}, lr: 2e-5, steps: 1.5, weight_by: "a +"}
eval: {path: dev.jsonl, samples_per_prompt: 4, k: [8], corect: [x]}
temperature: 4
rounds: 3
"""
SAID = """\
config.yaml:1:1: output_dir: missing, expected a folder, such as runs/first.
config.yaml:1:52: model.torch_dtype: unknown key. Did you mean dtype?
config.yaml:1:79: model.device: "gpu" is not a device, expected auto, cpu, cuda, cuda:N, mps or xpu.
config.yaml:1:103: model.trust_remote_code: "yes" is text, expected true or false. Did you mean true?
config.yaml:2:9: rounds: 0 is too small, expected at least 1.
config.yaml:3:32: prompts.question: unknown key. Did you mean prompt?
config.yaml:3:86: prompts.answer.pattern: "(a" is not a regular expression (missing ), unterminated subpattern at position 0), expected a regular expression.
config.yaml:5:3: generate.num_samples: unknown key. Did you mean samples_per_prompt?
config.yaml:6:16: generate.temperature: "hot" is text, expected a number.
config.yaml:7:10: generate.top_p: 1.5 is too large, expected at most 1.
config.yaml:10:25: generate.top_k.by_round[1]: "x" is text, expected an integer.
config.yaml:13:5: filters[1]: a filter with 2 keys and no `use`, expected one filter for each list entry: a name, {name: arguments}, or {use: name, args: {...}}.
config.yaml:15:18: filters[2].timeout: unknown key. Did you mean timeout_s?
config.yaml:16:5: filters[3]: 4 is not a filter, expected a name, {name: arguments}, or {use: name, args: {...}}.
config.yaml:17:21: train.start_from: "last" is not known here, expected previous, base, best or warmup.
config.yaml:17:34: train.data.windw: unknown key. Did you mean window?
config.yaml:17:45: train.lr: unknown key. Did you mean learning_rate?
config.yaml:17:62: train.steps: 1.5 is a fraction, expected an integer.
config.yaml:17:78: train.weight_by: the expression ends too early, expected arithmetic over score names: + - * / % **, min, max, exp, log, sqrt, abs, comparisons, and, or, not.
config.yaml:18:51: eval.k: pass@8 cannot be told from 4 samples of a prompt, expected at most eval.samples_per_prompt (4).
config.yaml:18:56: eval.corect: unknown key. Did you mean correct?
config.yaml:19:1: temperature: unknown key. Did you mean generate.temperature or eval.temperature?
config.yaml:20:1: rounds: the key stands twice, expected it once: it is already on line 2.
"""


def test_every_mistake_is_said_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert problems(tmp_path, text=BAD) == SAID.splitlines()


def test_the_error_holds_the_same_as_objects(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, text=BAD)
    assert caught.value.exit_code == 2
    assert [problem.render() for problem in caught.value.details] == caught.value.problems
    first = caught.value.details[1].to_tree()
    assert (first["line"], first["column"], first["path"], first["meant"]) == (1, 52, "model.torch_dtype", "dtype")


def test_the_command_line_is_blamed_for_what_it_brought(tmp_path: Path) -> None:
    said = problems(tmp_path, "generate.temperature=hot", "rounds", "filters[9]=x", "lr=1e-4", "train.steps.start=4")
    assert said == [
        "command line: 'rounds' is not an override, expected key.path=value, such as generate.temperature=0.7.",
        "command line: filters[9]: there is no entry 9, expected an index below 4.",
        'command line: generate.temperature: "hot" is text, expected a number.',
        "command line: lr: unknown key. Did you mean train.learning_rate?",
        "command line: train.steps: start with neither factor nor add, expected exactly one of factor and add.",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("generate.temprature", "temperature"),
        ("generate.max_tokens", "max_new_tokens"),
        ("generate.n", "samples_per_prompt"),
        ("generate.num_return_sequences", "samples_per_prompt"),
        ("train.lr", "learning_rate"),
        ("train.num_train_epochs", "epochs"),
        ("train.per_device_train_batch_size", "batch_size (samples in one optimizer step)"),
        ("train.temperature", "generate.temperature or eval.temperature"),
        ("model.lora", "adapter"),
        ("model.model_name_or_path", "path"),
        ("learning_rate", "train.learning_rate or warmup.learning_rate"),
        ("filter", "filters"),
        ("evaluate", "eval"),
        ("iterations", "rounds"),
        ("wandb", "tracking: wandb"),
        ("Rounds", "rounds"),
        ("checkpoints.save_total_limit", "keep"),
        ("prompts.gold", "answer"),
    ],
)
def test_an_unknown_key_is_guessed(tmp_path: Path, key: str, meant: str) -> None:
    said = problems(tmp_path, f"{key}=1")
    assert said == [f"command line: {key}: unknown key. Did you mean {meant}?"]


def test_what_cannot_be_guessed_lists_what_there_is(tmp_path: Path) -> None:
    said = problems(tmp_path, "checkpoints.zzz=1")
    assert said == ["command line: checkpoints.zzz: unknown key, expected keep, keep_best, every_steps or every_s."]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("generate.samples_per_prompt=8.5", "8.5 is a fraction, expected an integer."),
        ("generate.samples_per_prompt='8'", '"8" is text, expected an integer. Did you mean 8?'),
        ("generate.samples_per_prompt=1_000", '"1_000" is text, expected an integer. Did you mean 1000?'),
        ("generate.max_new_tokens=4k", '"4k" is text, expected an integer. Did you mean 4000?'),
        ("generate.max_new_tokens=null", "null, expected an integer."),
        ("generate.temperature=true", "true, expected a number."),
        ("generate.keep_logprobs=off", '"off" is text, expected true or false. Did you mean false?'),
        ("generate.keep_logprobs=1", "1 is an integer, expected true or false."),
        ("generate.stop=[a, 3]", '3 is an integer, expected text. Did you mean "3"?'),
        ("generate.memory_gb=big", '"big" is not known here, expected auto or a number.'),
        ("model.revision=12345678", '12345678 is an integer, expected text. Did you mean "12345678"?'),
        (
            "model=[]",
            "an empty list is not a model, expected a hub id, a folder, a .gguf file, or a mapping with path.",
        ),
        ("model.path=''", "the text is empty, expected text."),
        ("train=3", "3 is an integer, expected a mapping of keys to values."),
        ("train.data=[1]", "a list, expected a word or a mapping."),
        ("train.lr_scheduler_type=cosin", '"cosin" is not known here, expected linear, cosine, '),
        ("filters=finished", '"finished" is text, expected a list.'),
        ("filters={dedup: 1}", "a mapping, expected a list."),
        ("eval.k=[]", "the list is empty, expected at least one entry."),
        ("train.mix={path: x}", "missing, expected a share between 0 and 1."),
    ],
)
def test_wrong_values_say_what_they_are_and_what_is_wanted(tmp_path: Path, override: str, said: str) -> None:
    found = problems(tmp_path, override)
    assert len(found) == 1 and said in found[0], found


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    write(tmp_path, name="quickstart.yaml")
    with pytest.raises(ConfigError, match="no such file") as caught:
        load_config(tmp_path / "quikstart.yaml")
    assert caught.value.exit_code == 2 and "quickstart.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match="folder"):
        load_config(tmp_path)
    with pytest.raises(ConfigError):
        load_config(Path("\0"))


def test_one_mistake_gives_one_message(tmp_path: Path) -> None:
    text = "model: m\noutput_dir: o\nrounds: x\nprompts: {path: p}\ntrain: {start_from: best, data: {by_round: [replace]}}\n"
    said = problems(tmp_path, text=text)
    assert said == ['config.yaml:3:9: rounds: "x" is text, expected an integer.']


def test_further_checks_are_placed_in_the_file_beside_the_rest(tmp_path: Path) -> None:
    seen = []

    def check(config: Config, base_dir: Path, clean: bool) -> None:
        seen.append((len(config.filters), base_dir, clean))
        raise ConfigError("x", problems=["filters[2]: dedup: no argument `foo`", "something else"])

    found = ["config.yaml:1:1: something else.", "config.yaml:9:5: filters[2]: dedup: no argument `foo`."]
    for text, more in (
        (SHORT, []),
        (SHORT.replace("rounds: 3", "rounds: x"), ['config.yaml:3:9: rounds: "x" is text, expected an integer.']),
    ):
        with pytest.raises(InvalidConfig) as caught:
            load_config(write(tmp_path, text), checks=[check])
        said = [line.replace(f"{tmp_path}/", "") for line in caught.value.problems]
        assert said == [found[0], *more, found[1]]
    assert seen == [(4, tmp_path, True), (4, tmp_path, False)]


def test_filters_that_cannot_be_read_are_not_checked_further(tmp_path: Path) -> None:
    def check(config: Config, base_dir: Path, clean: bool) -> None:
        raise AssertionError

    with pytest.raises(InvalidConfig):
        load_config(write(tmp_path), ["filters[0]=3"], checks=[check])


def test_a_later_error_gets_its_place_too(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    placed = loaded.placed(ConfigError("no such model", where="model.path", expected="a folder", hint="look again"))
    assert str(placed).replace(f"{tmp_path}/", "") == (
        "config.yaml:1:8: model.path: no such model, expected a folder.\nhint: look again"
    )
    with pytest.raises(InvalidConfig, match=r"config.yaml:9:5: filters\[2\]: odd"), loaded.placing_errors():
        raise ConfigError("odd", where="filters[2]")
    other = ConfigError("no such thing", where="somewhere else")
    assert loaded.placed(other) is other


def test_a_config_from_a_program_is_checked_in_the_same_words() -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_config(
            {"model": "m", "rounds": 0, "output_dir": "o", "prompts": {"path": "p"}, "train": {"data": "replace"}}
        )
    assert caught.value.problems == [
        "config: rounds: 0 is too small, expected at least 1.",
        "config: train.start_from: missing, expected previous, base, best or warmup (published methods disagree, so there is no "
        "default).",
    ]


def test_thousands_of_mistakes_are_counted_not_printed(tmp_path: Path) -> None:
    text = "filters:\n" + "- {use: 3, foo: 4}\n" * 1000
    said = problems(tmp_path, text=text)
    assert len(said) == 101 and "more problems" in said[-1]
