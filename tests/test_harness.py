"""`eval.lm_eval`: tasks of lm-evaluation-harness on the live model, offline, with tasks and data of the test's own."""

import json
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")
import torch
from tiny import tiny_llama, tiny_tokenizer

from iterative_sft_cli.console import Console
from iterative_sft_cli.errors import ConfigError, DataError, Preempted
from iterative_sft_cli.experiment import run_experiment
from iterative_sft_cli.harness import Harness, figures
from iterative_sft_cli.recipes.tiny_tokenizer import tokenizer_files

QUESTIONS = {"one:": "b", "two:": "a", "three:": "b", "four:": "b"}
CHOICE = """
task: letters_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{data}'}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [a, b]
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITTEN = """
task: letters_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{data}'}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
CONFIG = """
model:
  init: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
         num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
  tokenizer: char-tokenizer
  device: cpu
output_dir: run
rounds: 1
warmup: {path: seed.jsonl, steps: 60, learning_rate: 1e-2, batch_size: 4}
prompts: {path: prompts.jsonl, prompt: question, answer: answer}
generate: {max_new_tokens: 4}
filters: [exact_match]
train: {start_from: previous, data: replace, steps: 1, learning_rate: 1e-5}
guards: {on_empty: skip}
eval:
  path: dev.jsonl
  lm_eval: {tasks: [letters_choice, letters_written], args: {include_path: tasks, include_defaults: false, num_fewshot: 0}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rows = [{"question": question, "answer": answer} for question, answer in QUESTIONS.items()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, text in {"choice": CHOICE, "written": WRITTEN}.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(data=tmp_path / "data.jsonl"))
    return tmp_path


def section(tasks=("letters_choice",), **args):
    return SimpleNamespace(tasks=list(tasks), args={"include_path": "tasks", "include_defaults": False, **args})


def test_the_figures_are_those_of_the_live_model_and_nothing_else_changes(folder):
    tokenizer = tiny_tokenizer(chat=False)
    model = tiny_llama(len(tokenizer)).train()
    scores = {}
    with torch.no_grad():
        for question in QUESTIONS:
            logits = model(torch.tensor([tokenizer(question)["input_ids"]])).logits[0, -1]
            a, b = (tokenizer(letter)["input_ids"][0] for letter in "ab")
            scores[question] = "a" if logits[a] > logits[b] else "b"
    right = sum(scores[question] == answer for question, answer in QUESTIONS.items()) / len(QUESTIONS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), torch.get_rng_state()
    calls = []
    measure = Harness(section(batch_size=1), folder).measure
    rows = measure(model, tokenizer, compute_dtype=torch.float32, check=lambda: calls.append(1))
    assert figures(rows)["eval/lm_eval/letters_choice/acc"] == right and len(calls) >= len(QUESTIONS)
    assert rows == measure(model, tokenizer, compute_dtype=torch.float32, check=lambda: None)
    assert model.training and random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_signal_ends_it_and_a_failure_is_named(folder):
    tokenizer = tiny_tokenizer(chat=False)
    model = tiny_llama(len(tokenizer))

    def stop():
        raise Preempted("SIGTERM")

    with pytest.raises(Preempted):
        Harness(section(), folder).measure(model, tokenizer, compute_dtype=torch.float32, check=stop)
    (folder / "data.jsonl").unlink()
    with pytest.raises(DataError, match="lm-evaluation-harness failed: FileNotFoundError"):
        Harness(section(), folder).measure(model, tokenizer, compute_dtype=torch.float32, check=lambda: None)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (section(["letters_choise"]), "no task `letters_choise`.*did you mean letters_choice"),
        (section(num_fewshots=1), "`num_fewshots` is no argument.*did you mean num_fewshot"),
        (section(device="cuda"), "`device` is no argument"),
        (SimpleNamespace(tasks=["x"], args={"include_path": "none"}), "none: no such folder"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(folder, wanted, said):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        try:
            Harness(wanted, folder)
        except ConfigError as error:
            raise ConfigError(error.render()) from None


def test_its_figures_stand_in_the_statistics_of_every_evaluated_round(folder):
    (folder / "char-tokenizer").mkdir()
    for name, text in tokenizer_files().items():
        (folder / "char-tokenizer" / name).write_text(text)
    seed = [{"prompt": question, "completion": f"{answer}."} for question, answer in QUESTIONS.items()]
    (folder / "seed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seed))
    for name in ("prompts", "dev"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "a"}) + "\n")
    (folder / "config.yaml").write_text(CONFIG)
    run_experiment(folder / "config.yaml", view=Console(quiet=True))
    stats = [json.loads(line) for line in (folder / "run" / "stats.jsonl").read_text().splitlines()]
    for row in stats:
        assert row["eval/lm_eval/letters_choice/acc"] == row["eval/lm_eval/letters_written/exact_match"] == 1.0
        assert row["eval/lm_eval/letters_choice/acc_stderr"] == 0.0
    assert [row["round"] for row in stats] == [0, 1]
    sealed = [
        json.loads(line) for line in (folder / "run" / "rounds" / "0001" / "lm-eval.jsonl").read_text().splitlines()
    ]
    assert {row["task"] for row in sealed} == {"letters_choice", "letters_written"}
