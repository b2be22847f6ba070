"""The faults of TRL 0.23.1's IterativeSFTTrainer, one test each under its row's number: none of them is ours."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IM_END, PAD, save_tiny, tiny_llama, tiny_tokenizer
from torch.nn.functional import pad
from train_helpers import (
    CAUSAL,
    arguments,
    caught_gradients,
    largest_error,
    model,
    moved,
    reference,
    same,
    some_rows,
    tensors,
    trainer,
    weights,
)
from transformers import TrainerCallback

from iterative_sft_cli import IterativeSFTTrainer
from iterative_sft_cli.train.torch_core import TrainCore
from iterative_sft_cli.train.torch_settings import StepSettings
from iterative_sft_cli.train.trainer import IterativeSFTConfig
from iterative_sft_cli.types import TrainRow

KINDS = ("llama", "gpt2", "t5")
IDS = tensors(range(10, 16), range(20, 23), range(30, 40), range(41, 45))


def data_of(kind: str) -> dict[str, Any]:
    """What a caller passes for this kind of model."""
    return {"input_ids": IDS, "labels": IDS} if kind == "t5" else {"input_ids": IDS}


def watch(subject: Any) -> list[TrainRow]:
    """The rows that reach the core from now on."""
    seen: list[TrainRow] = []
    original = subject.core.step

    def step(rows: Any, **options: Any) -> Any:
        seen.extend(rows)
        return original(rows, **options)

    subject.core.step = step
    return seen


def text_trainer(folder: Path, kind: str = "llama", **init: Any) -> tuple[Any, Any]:
    """A trainer over a byte tokenizer, and the tokenizer."""
    from train_helpers import MODELS

    tokenizer = init.pop("tokenizer", None) or tiny_tokenizer()
    changes = {name: init.pop(name) for name in ("seed", "learning_rate") if name in init}
    made = trainer(folder, MODELS[kind](len(tokenizer)), init={"processing_class": tokenizer, **init}, **changes)
    return made, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_b01_the_quick_start_trains(tmp_path: Path, kind: str) -> None:
    for args in (arguments(tmp_path), IterativeSFTConfig(str(tmp_path), report_to="none", save_strategy="no")):
        subject = model(kind)
        before = weights(subject)
        stats = IterativeSFTTrainer(subject, args).step(**data_of(kind))
        assert stats["learning_rate"] > 0
        assert moved(subject, before) > 1e-6


def test_b02_the_schedule_has_an_end_and_says_so(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=2, disable_tqdm=True)
    rates = [one.step(input_ids=IDS)["learning_rate"] for _ in range(2)]
    assert rates[0] > rates[1] > 0
    before = weights(one.model)
    with pytest.raises(ValueError, match="max_steps=2.*2 steps are done"):
        one.step(input_ids=IDS)
    assert same(weights(one.model), before)
    spans = trainer(tmp_path, per_device_train_batch_size=1)
    assert [spans.step(input_ids=IDS)["learning_rate"] for _ in range(2)] == [pytest.approx(5e-5 / 4)] * 2


def test_b03_text_labels_are_the_targets(tmp_path: Path) -> None:
    one, tokenizer = text_trainer(tmp_path, "t5")
    seen = watch(one)
    one.step(texts=["ab"], texts_labels=["xyz"])
    assert list(seen[0].labels) == [*tokenizer("xyz")["input_ids"], tokenizer.eos_token_id]
    assert list(seen[0].input_ids)[:2] == tokenizer("ab")["input_ids"]


@pytest.mark.parametrize("kind", CAUSAL)
def test_b04_causal_labels_and_prompt_masks_count(tmp_path: Path, kind: str) -> None:
    one = trainer(tmp_path, kind)
    labels = [ids.clone() for ids in IDS]
    for row in labels:
        row[:2] = -100
    loss, _ = reference(
        model(kind),
        [
            TrainRow(str(n), tuple(i.tolist()), tuple(x.tolist()))
            for n, (i, x) in enumerate(zip(IDS, labels, strict=True))
        ],
    )
    before = weights(one.model)
    with pytest.raises(ValueError, match="element 2 has no trained token"):
        one.step(input_ids=IDS, labels=[*labels[:2], torch.full((10,), -100), labels[3]])
    assert same(weights(one.model), before)
    stats = one.step(input_ids=IDS, labels=labels)
    assert stats["loss"] == pytest.approx(loss, rel=1e-5)
    assert stats["num_trained_tokens"] == 4 + 1 + 8 + 2
    texts, _ = text_trainer(tmp_path, kind)
    seen = watch(texts)
    texts.step(texts=["2+2=4"], texts_labels=["=4"])
    assert list(seen[0].labels)[:3] == [-100] * 3
    assert list(seen[0].labels)[3:] == list(seen[0].input_ids)[3:]
    with pytest.raises(ValueError, match="texts_labels"):
        texts.step(texts=["2+2=4"], texts_labels=["5"])


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_b05_max_length_cuts_tokens_not_samples(tmp_path: Path, mode: str) -> None:
    one = trainer(tmp_path, init={"max_length": 3, "truncation_mode": mode})
    seen = watch(one)
    assert one.step(input_ids=tensors(*[range(10, 20)] * 6))["num_samples"] == 6
    wanted = (10, 11, 12) if mode == "keep_start" else (17, 18, 19)
    assert [row.input_ids for row in seen] == [wanted] * 6


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_b06_nor_texts(tmp_path: Path, mode: str) -> None:
    one, _ = text_trainer(tmp_path, max_length=4, truncation_mode=mode)
    seen = watch(one)
    assert one.step(texts=[f"text number {n}" for n in range(6)])["num_samples"] == 6
    assert [len(row.input_ids) for row in seen] == [4] * 6


@pytest.mark.parametrize("kind", CAUSAL)
def test_b07_documented_calls_work(tmp_path: Path, kind: str) -> None:
    masks = [torch.ones_like(ids) for ids in IDS]
    results = []
    for call in (
        {"input_ids": IDS},
        {"input_ids": IDS, "attention_mask": masks},
        {"input_ids": IDS, "labels": IDS},
        {"input_ids": IDS, "attention_mask": masks, "labels": IDS},
    ):
        one = trainer(tmp_path, kind)
        results.append((one.step(**call)["loss"], weights(one.model)))
    assert all(loss == results[0][0] and same(found, results[0][1]) for loss, found in results)
    one, _ = text_trainer(tmp_path, kind)
    texts = ["one", "and two"]
    assert one.step(texts=texts)["num_samples"] == one.step(texts=texts, texts_labels=texts)["num_samples"] == 2


def test_b08_accumulation_makes_fewer_steps_with_the_same_numbers(tmp_path: Path) -> None:
    data = tensors(*(row.input_ids for row in some_rows("llama", 24)))
    one = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    other = trainer(tmp_path, per_device_train_batch_size=8)
    first, second = one.step(input_ids=data), other.step(input_ids=data)
    assert first["num_steps"] == second["num_steps"] == one.state.global_step == 3
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    assert same(weights(one.model), weights(other.model))


def test_b09_a_rest_is_a_step_of_its_own(tmp_path: Path) -> None:
    data = tensors(*(row.input_ids for row in some_rows("llama", 5)))
    one = trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert one.step(input_ids=data)["num_steps"] == one.state.global_step == math.ceil(5 / 4)
    assert all(parameter.grad is None for parameter in one.model.parameters())
    other = trainer(tmp_path, one.model)
    again = trainer(tmp_path, model("llama"))
    again.model.load_state_dict(one.model.state_dict())
    assert other.step(input_ids=data)["loss"] == again.step(input_ids=data)["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_b10_the_loss_is_the_mean_over_tokens(tmp_path: Path, kind: str) -> None:
    rows = some_rows(kind, weighted=False)
    loss, grads = reference(model(kind), rows)
    for packing in (None, False):
        for budget in (1, 40, 1000):
            args = IterativeSFTConfig(
                str(tmp_path),
                report_to="none",
                bf16=False,
                per_device_train_batch_size=9,
                micro_batch_tokens=budget,
                packing=packing,
            )
            one = IterativeSFTTrainer(model(kind), args)
            caught = caught_gradients(one.core)
            ids, labels = tensors(*(r.input_ids for r in rows)), tensors(*(r.labels for r in rows))
            assert one.step(input_ids=ids, labels=labels)["loss"] == pytest.approx(loss, rel=1e-5)
            assert largest_error(caught, grads) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_b11_checkpointing_is_switched_on(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = trainer(tmp_path, kind, **changes)
        assert one.model.is_gradient_checkpointing
        assert not trainer(tmp_path, kind).model.is_gradient_checkpointing
    other = trainer(tmp_path, kind)
    assert one.step(**data_of(kind))["loss"] == pytest.approx(other.step(**data_of(kind))["loss"], rel=1e-6)


def test_b12_every_argument_acts_or_raises(tmp_path: Path) -> None:
    quiet = trainer(tmp_path).step(input_ids=IDS)["loss"]
    assert trainer(tmp_path, neftune_noise_alpha=5.0).step(input_ids=IDS)["loss"] != quiet
    still, noisy = (trainer(tmp_path, "t5", neftune_noise_alpha=alpha).step(**data_of("t5")) for alpha in (None, 5.0))
    assert still["loss"] != noisy["loss"]
    assert trainer(tmp_path, label_smoothing_factor=0.2).step(input_ids=IDS)["loss"] != quiet
    refused: dict[str, Any] = {
        "num_train_epochs": 2,
        "fp16": True,
        "dataloader_drop_last": True,
        "dataloader_num_workers": 2,
        "train_sampling_strategy": "group_by_length",
        "torch_compile": True,
        "push_to_hub": True,
        "fp16_full_eval": True,
        "average_tokens_across_devices": False,
        "optim": "sgd",
        "optim_args": "a=1",
        "save_strategy": "best",
        "logging_steps": 0.5,
        "include_for_metrics": ["loss"],
        "ddp_bucket_cap_mb": 3,
        "eval_do_concat_batches": False,
        "use_liger_kernel": True,
        "ignore_data_skip": True,
        "hub_always_push": True,
        "label_names": ["x"],
        "length_column_name": "n",
        "debug": "underflow_overflow",
        "accelerator_config": {"split_batches": True},
        "skip_memory_metrics": False,
        "optim_target_modules": "all-linear",
    }
    for name, value in refused.items():
        args = arguments(tmp_path)
        setattr(args, name, value)
        with pytest.raises(ValueError, match=name):
            IterativeSFTTrainer(model("llama"), args)
    args = arguments(tmp_path, save_strategy="epoch", eval_strategy="epoch")
    args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        IterativeSFTTrainer(model("llama"), args, eval_dataset=[{"input_ids": [9, 10]}])
    for name, value in (("max_length", 0), ("truncation_mode", "middle")):
        with pytest.raises(ValueError, match=name):
            trainer(tmp_path, init={name: value})
    with pytest.raises(ValueError, match="max_length is 4 in the constructor and 8 in args"):
        config = IterativeSFTConfig(str(tmp_path), max_length=8, report_to="none")
        IterativeSFTTrainer(model("llama"), config, max_length=4)


def test_b13_checkpoints_are_written_and_limited(tmp_path: Path) -> None:
    one = trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2, per_device_train_batch_size=2)
    one.step(input_ids=IDS)
    one.step(input_ids=IDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert same(weights(again), weights(one.model))
    by_call = trainer(tmp_path / "calls", save_strategy="epoch", save_only_model=True, per_device_train_batch_size=1)
    by_call.step(input_ids=IDS)
    assert [path.name for path in (tmp_path / "calls").iterdir()] == ["checkpoint-4"]
    assert not (tmp_path / "calls" / "checkpoint-4" / "state").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [False, True])
def test_b14_resuming_gives_the_same_bytes(tmp_path: Path, kind: str, inside: bool) -> None:
    def fresh(folder: str) -> Any:
        return trainer(
            tmp_path / folder,
            model(kind, **({"resid_pdrop": 0.2} if kind == "gpt2" else {})),
            per_device_train_batch_size=2,
            max_steps=8,
            save_strategy="steps",
            save_steps=1,
            disable_tqdm=True,
        )

    whole = fresh("whole")
    logs = [whole.step(**data_of(kind)) for _ in range(4)]
    resumed = fresh("resumed")
    resumed.load_state(tmp_path / "whole" / ("checkpoint-3" if inside else "checkpoint-4"))
    torch.rand(7)
    if inside:
        with pytest.raises(ValueError, match="same data first"):
            resumed.step(input_ids=IDS[:1], labels=IDS[:1])
        resumed.step(**data_of(kind))
    again = [resumed.step(**data_of(kind)) for _ in range(2)]
    assert same(weights(whole.model), weights(resumed.model))
    for one, other in zip(logs[2:], again, strict=True):
        assert {**one, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}
    assert whole.state.log_history[-2:] == resumed.state.log_history[-2:]


def test_b15_what_is_documented_works_or_is_absent(tmp_path: Path) -> None:
    one, tokenizer = text_trainer(tmp_path)
    assert not hasattr(one, "train")
    one.save_model(tmp_path / "saved")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), weights(one.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("ab")["input_ids"] == tokenizer("ab")["input_ids"]


def test_b16_step_returns_statistics(tmp_path: Path) -> None:
    stats = trainer(tmp_path, per_device_train_batch_size=3).step(input_ids=IDS)
    assert list(stats) == [
        "loss",
        "num_tokens",
        "num_trained_tokens",
        "num_samples",
        "num_steps",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "skipped_nonfinite",
    ]
    assert json.loads(json.dumps(stats, allow_nan=False)) == stats
    assert (stats["num_tokens"], stats["num_trained_tokens"], stats["num_samples"], stats["num_steps"]) == (
        23,
        19,
        4,
        2,
    )


def test_b17_an_empty_round_trains_nothing_and_says_so(tmp_path: Path) -> None:
    one, _ = text_trainer(tmp_path)
    before = weights(one.model)
    for call in ({"texts": []}, {"input_ids": []}):
        stats = one.step(**call)
        assert stats["num_steps"] == stats["num_samples"] == 0
        assert stats["loss"] is None
    assert same(weights(one.model), before)
    assert one.state.global_step == 0
    for bad in ({}, {"texts": None}):
        with pytest.raises(ValueError, match="either input_ids or texts"):
            one.step(**bad)


@pytest.mark.parametrize("kind", KINDS)
def test_b18_eos_is_learnt_where_pad_is_eos(tmp_path: Path, kind: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    one, _ = text_trainer(tmp_path, kind, tokenizer=tokenizer)
    seen = watch(one)
    one.step(texts=["abc", "d"], texts_labels=["abc", "d"])
    for row in seen:
        assert row.labels[-1] == IM_END
        assert row.labels.count(IM_END) == 1


@pytest.mark.parametrize("append", [True, False])
def test_b19_texts_end_with_one_eos(tmp_path: Path, append: bool) -> None:
    tokenizer = tiny_tokenizer()
    args = IterativeSFTConfig(str(tmp_path), append_eos=append, report_to="none")
    one = IterativeSFTTrainer(tiny_llama(len(tokenizer)), args, tokenizer)
    seen = watch(one)
    one.step(texts=["ab", "ab" + tokenizer.eos_token])
    assert [row.input_ids.count(IM_END) for row in sorted(seen, key=lambda row: row.sample_id)] == [int(append), 1]


def test_b20_no_pad_token_is_needed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    one, _ = text_trainer(tmp_path, tokenizer=tokenizer)
    other, _ = text_trainer(tmp_path)
    texts = ["short", "and a longer one"]
    assert one.step(texts=texts)["loss"] == other.step(texts=texts)["loss"]


@pytest.mark.parametrize("limit", [0, None])
def test_b21_max_grad_norm_zero_is_off(tmp_path: Path, limit: float | None) -> None:
    args = arguments(tmp_path)
    args.max_grad_norm = limit  # type: ignore[assignment]
    one = IterativeSFTTrainer(model("llama"), args)
    before = weights(one.model)
    assert one.step(input_ids=IDS)["grad_norm"] > 0
    assert moved(one.model, before) > 1e-6


def test_b22_evaluation_inside_a_step_keeps_the_mode(tmp_path: Path) -> None:
    modes: list[tuple[str, bool]] = []
    subject = model("gpt2", resid_pdrop=0.2)
    subject.transformer.h[0].register_forward_pre_hook(
        lambda module, _: modes.append(("grad" if torch.is_grad_enabled() else "eval", module.training))
    )
    for training in (False, True):
        subject.train(training)
        one = trainer(
            tmp_path,
            subject,
            eval_strategy="steps",
            eval_steps=1,
            per_device_train_batch_size=1,
            init={"eval_dataset": [{"input_ids": [9, 10, 11]}]},
        )
        one.step(input_ids=IDS)
        assert subject.training == training
    assert {mode for mode in modes if mode[0] == "grad"} == {("grad", True)}
    assert sum(mode == ("eval", False) for mode in modes) >= 4


def test_b23_evaluation_is_what_eval_strategy_says(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    data = {"eval_dataset": [{"input_ids": [9, 10, 11]}, {"input_ids": [12, 13]}]}
    silent = trainer(tmp_path, eval_steps=1, init=data)
    silent.step(input_ids=IDS)
    assert not any("eval_loss" in row for row in silent.state.log_history)

    def metrics(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == prediction.label_ids.shape == (2, 3)
        return {"ones": float((prediction.label_ids == -100).sum())}

    one = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=1,
        metric_for_best_model="loss",
        init={
            **data,
            "compute_metrics": metrics,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        },
    )
    one.step(input_ids=IDS)
    found = [row for row in one.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in found] == [2, 4]
    assert found[0]["eval_ones"] == 1.0
    loss, _ = reference(one.model, [TrainRow("a", (9, 10, 11), (9, 10, 11)), TrainRow("b", (12, 13), (12, 13))])
    assert found[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert one.evaluate()["eval_loss"] == pytest.approx(found[-1]["eval_loss"])
    assert one.state.best_metric == min(row["eval_loss"] for row in found)


def test_b24_every_step_is_in_a_log_row(tmp_path: Path) -> None:
    nine = tensors(*(row.input_ids for row in some_rows("llama", 9)))
    one = trainer(tmp_path, logging_steps=10, per_device_train_batch_size=1)
    stats = one.step(input_ids=nine)
    assert [row["num_steps"] for row in one.state.log_history] == [9]
    assert one.state.log_history[0]["loss"] == pytest.approx(stats["loss"])
    other = trainer(tmp_path, logging_steps=0.25, max_steps=9, per_device_train_batch_size=1, disable_tqdm=True)
    other.step(input_ids=nine)
    assert [row["num_steps"] for row in other.state.log_history] == [3, 3, 3]


def test_b25_callbacks_hear_everything(tmp_path: Path) -> None:
    heard: list[str] = []
    epochs: list[float] = []

    class Listener(TrainerCallback):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                heard.append(name)
                if name == "on_step_end":
                    return lambda args, state, control, **_: epochs.append(state.epoch)
            return super().__getattribute__(name)

    class StopAtThree(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = state.global_step == 3
            return control

    one = trainer(
        tmp_path,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        disable_tqdm=True,
        per_device_train_batch_size=2,
        init={"callbacks": [Listener()], "eval_dataset": [{"input_ids": [9, 10]}]},
    )
    assert one.state.max_steps == 2
    one.step(input_ids=IDS)
    wanted = "on_init_end on_train_begin on_epoch_begin on_step_begin on_step_end on_log on_evaluate on_save on_epoch_end on_train_end"
    assert set(wanted.split()) <= set(heard)
    assert heard.index("on_train_begin") < heard.index("on_step_begin") < heard.index("on_step_end")
    assert epochs == [0.5, 1.0]
    other = trainer(tmp_path, per_device_train_batch_size=1, init={"callbacks": [StopAtThree]})
    assert other.step(input_ids=IDS)["num_steps"] == 3
    with pytest.raises(ValueError, match="callback has stopped"):
        other.step(input_ids=IDS)


# --- two processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes found; one start for all the rows below."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    processes = []
    for rank in range(2):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path]),
        }
        command = [sys.executable, str(here / "two_ranks.py"), str(folder), str(rank)]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in processes:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return [{**one, "folder": str(folder)} for one in found]


def test_b26_the_learning_rate_does_not_depend_on_world_size(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = trainer(tmp_path, per_device_train_batch_size=4, max_steps=10, disable_tqdm=True)
    alone.step(input_ids=tensors(*(row.input_ids for row in some_rows("llama", 12))))
    for rank in ranks:
        assert rank["world"] == 2
        assert rank["shared"]["lr"] == [row["learning_rate"] for row in alone.state.log_history]
        assert rank["shared"]["stats"]["num_steps"] == 3


def test_b27_each_sample_once_over_all_ranks(ranks: list[dict[str, Any]]) -> None:
    seen = [tuple(row) for rank in ranks for row in rank["shared"]["seen"]]
    assert sorted(seen) == sorted(row.input_ids for row in some_rows("llama", 12))
    assert all(rank["shared"]["seen"] for rank in ranks)
    learners = [rank["learner"] for rank in ranks]
    assert learners[0] == learners[1]
    assert learners[0][0]["num_samples"] == 12
    assert ranks[0]["learner_digest"] == ranks[1]["learner_digest"]


def test_b28_uneven_ranks_stay_in_step_and_equal(ranks: list[dict[str, Any]]) -> None:
    one, other = (rank["uneven"] for rank in ranks)
    assert [one["samples"], other["samples"]] == [7, 2]
    assert one["digest"] == other["digest"]
    for mine, theirs in zip(one["stats"], other["stats"], strict=True):
        assert {**mine, "tokens_per_second": 0} == {**theirs, "tokens_per_second": 0}
    assert [stats["num_samples"] for stats in one["stats"]] == [9, 7]
    assert [stats["num_steps"] for stats in one["stats"]] == [3, 2]
    assert "texts need a tokenizer" in ranks[0]["refused"]
    assert "rank 0 was given bad input" in ranks[1]["refused"]


def test_b29_the_model_card_is_written_under_ddp(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["unwrapped"] == "LlamaForCausalLM" for rank in ranks)
    assert "# card" in (Path(ranks[0]["folder"]) / "README.md").read_text()


def test_b30_the_loss_is_over_all_ranks_whatever_n_gpu_says(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    rows = some_rows("llama", 12)
    loss, grads = reference(model("llama"), rows)
    assert [rank["loss"] for rank in ranks] == [pytest.approx(loss, rel=1e-5)] * 2
    assert largest_error(load_file(Path(ranks[0]["folder"]) / "grads.safetensors"), grads) <= 1e-5
    with pytest.raises(ValueError, match="DataParallel"):
        trainer(tmp_path, torch.nn.DataParallel(model("llama")))
    one = trainer(tmp_path)
    one.args._n_gpu = 2
    assert one.step(input_ids=IDS)["loss"] == trainer(tmp_path).step(input_ids=IDS)["loss"]


def test_b31_all_ranks_start_alike_and_sharding_is_refused(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    assert ranks[0]["start"] == ranks[1]["start"]
    for name, value in (("fsdp", "full_shard"), ("deepspeed", {"zero": 1})):
        args = arguments(tmp_path)
        setattr(args, name, value)
        with pytest.raises(ValueError, match=name):
            IterativeSFTTrainer(model("llama"), args)


# --- one process again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_b32_every_key_of_a_collator_reaches_the_model(tmp_path: Path, kind: str) -> None:
    seen: list[set[str]] = []

    def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        width = max(len(feature["input_ids"]) for feature in features)
        out = {}
        for name, fill in (("input_ids", PAD), ("attention_mask", 0), ("labels", -100)):
            rest = [width - len(feature[name]) for feature in features]
            sides = [(0, n) if kind == "t5" and name == "labels" else (n, 0) for n in rest]
            padded = [pad(f[name], side, value=fill) for f, side in zip(features, sides, strict=True)]
            out[name] = torch.stack(padded)
        if kind == "gpt2":
            out["token_type_ids"] = torch.zeros_like(out["input_ids"])
        elif kind == "llama":
            out["position_ids"] = (out["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return out

    subject = model(kind)
    if kind == "gpt2":  # a token type adds the embedding of its number, so this one adds nothing
        with torch.no_grad():
            subject.transformer.wte.weight[0].zero_()
    rows = [TrainRow(str(n), tuple(ids.tolist()), tuple(ids.tolist())) for n, ids in enumerate(IDS)]
    loss, _ = reference(subject, rows)
    one = trainer(tmp_path, subject, init={"data_collator": collate})
    subject.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    one.core.row_format()
    seen.clear()
    assert one.step(**data_of(kind))["loss"] == pytest.approx(loss, rel=1e-5)
    wanted = {"gpt2": "token_type_ids", "llama": "position_ids", "t5": "attention_mask"}[kind]
    assert seen and all(wanted in keys for keys in seen)
    if kind == "gpt2":
        assert all("position_ids" in keys for keys in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_b33_padding_is_per_micro_batch(tmp_path: Path, kind: str) -> None:
    args = IterativeSFTConfig(
        str(tmp_path), report_to="none", per_device_train_batch_size=8, micro_batch_tokens=20, packing=False
    )
    one = IterativeSFTTrainer(model(kind), args)
    shapes: list[tuple[int, ...]] = []
    one.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rows = tensors([9, 10], range(9, 29), [11, 12], [13, 14])
    one.core.row_format()
    shapes.clear()
    one.step(input_ids=rows, labels=tensors([9, 10], [9, 10, 11], [11, 12], [13, 14]) if kind == "t5" else rows)
    assert shapes == [(1, 20), (3, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_b34_the_side_of_padding_does_not_matter(tmp_path: Path, kind: str) -> None:
    width = max(len(ids) for ids in IDS)
    found = []
    for left in (True, False):
        sides = [((width - len(ids), 0) if left else (0, width - len(ids))) for ids in IDS]
        ids = [pad(row, side, value=PAD) for row, side in zip(IDS, sides, strict=True)]
        mask = [pad(torch.ones_like(row), side) for row, side in zip(IDS, sides, strict=True)]
        one = trainer(tmp_path, kind)
        more = {"labels": IDS} if kind == "t5" else {}
        found.append((one.step(input_ids=ids, attention_mask=mask, **more)["loss"], weights(one.model)))
    plain = trainer(tmp_path, kind)
    loss = plain.step(**data_of(kind))["loss"]
    assert all(one == loss and same(after, weights(plain.model)) for one, after in found)
    losses = []
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        one, _ = text_trainer(tmp_path, kind, tokenizer=tokenizer)
        losses.append(one.step(texts=["a", "longer text"], texts_labels=["a", "longer text"])["loss"])
    assert losses[0] == losses[1]


def test_b35_the_callers_tokenizer_is_untouched(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = {k: repr(v) for k, v in vars(tokenizer).items()} | {"backend": tokenizer.backend_tokenizer.to_str()}
    one, _ = text_trainer(tmp_path, tokenizer=tokenizer, max_length=4, truncation_mode="keep_end")
    one.step(texts=["a longer text than four tokens"])
    one.step(texts=[[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]])
    after = {k: repr(v) for k, v in vars(tokenizer).items()} | {"backend": tokenizer.backend_tokenizer.to_str()}
    assert before == after


def test_b36_the_device_cache_belongs_to_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(tmp_path, init={"optimize_device_cache": True})
    other = trainer(tmp_path, init={"optimize_device_cache": False})
    freed: list[Any] = []
    for subject in (one, other):
        monkeypatch.setattr(subject, "_free_device_cache", lambda subject=subject: freed.append(subject))
        subject.step(input_ids=IDS)
        with pytest.raises(ValueError, match="outside"):
            subject.step(input_ids=tensors([9, 10_000]))
    assert freed == [one, one]


def test_b37_lists_of_different_length_are_an_error(tmp_path: Path) -> None:
    one, _ = text_trainer(tmp_path)
    before = weights(one.model)
    with pytest.raises(ValueError, match="input_ids 4, attention_mask 1"):
        one.step(input_ids=IDS, attention_mask=[torch.ones(6, dtype=torch.long)])
    with pytest.raises(ValueError, match="input_ids 4, labels 3"):
        one.step(input_ids=IDS, labels=IDS[:3])
    with pytest.raises(ValueError, match="texts 2, texts_labels 1"):
        one.step(texts=["a", "b"], texts_labels=["a"])
    with pytest.raises(ValueError, match=r"labels\[1\] has 2 entries, input_ids\[1\] has 3"):
        one.step(input_ids=IDS, labels=[IDS[0], IDS[1][:2], *IDS[2:]])
    with pytest.raises(ValueError, match=r"attention_mask\[1\] has 2"):
        one.step(input_ids=IDS[:2], attention_mask=[torch.ones_like(IDS[0]), torch.ones(2, dtype=torch.long)])
    assert same(weights(one.model), before)


def test_b38_every_element_is_checked(tmp_path: Path) -> None:
    one, _ = text_trainer(tmp_path)
    before = weights(one.model)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"texts": ["a", 3]}, TypeError, r"texts\[1\].*int '3'"),
        ({"texts": "one string"}, TypeError, "texts must be a list of strings, got str"),
        ({"texts": ["a"], "texts_labels": [None]}, TypeError, r"texts_labels\[0\]"),
        ({"input_ids": [IDS[0], "x"]}, TypeError, r"input_ids\[1\].*str"),
        ({"input_ids": [IDS[0], torch.ones(3)]}, TypeError, r"input_ids\[1\].*torch.float32"),
        ({"input_ids": [IDS[0], torch.ones(2, 2, dtype=torch.long)]}, ValueError, r"input_ids\[1\].*one dimension"),
        ({"input_ids": [IDS[0], torch.tensor([9, 5000])]}, ValueError, r"input_ids\[1\] holds token id 5000"),
        ({"input_ids": [IDS[0], torch.tensor([9, -1])]}, ValueError, r"input_ids\[1\] holds token id -1"),
        ({"input_ids": IDS[:1], "labels": [torch.full((6,), 5000)]}, ValueError, r"labels\[0\] holds token id 5000"),
        ({"input_ids": [IDS[0], torch.tensor([], dtype=torch.long)]}, ValueError, "element 1 has no token"),
        ({"input_ids": IDS, "texts": ["a"]}, ValueError, "got both"),
        ({"texts": ["a"], "labels": IDS[:1]}, ValueError, "texts_labels"),
        ({"input_ids": IDS[:1], "attention_mask": [torch.tensor([1, 0, 1, 1, 1, 1])]}, ValueError, "gap"),
        ({"input_ids": IDS[:1], "attention_mask": [torch.tensor([1, 2, 1, 1, 1, 1])]}, ValueError, "holds 2"),
        ({"texts": ["a", ""]}, ValueError, "element 1 has no trained token"),
    ]
    for call, kind, text in cases:
        with pytest.raises(kind, match=text):
            one.step(**call)
    assert same(weights(one.model), before)
    assert one.step(texts=("a tuple", "works"))["num_samples"] == 2
    assert (
        one.step(input_ids=tuple(IDS))["num_samples"]
        == one.step(input_ids=[r.tolist() for r in IDS])["num_samples"]
        == 4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_b39_what_is_not_finite_never_reaches_the_weights(tmp_path: Path, kind: str) -> None:
    for policy in ("skip", "stop"):
        subject = model(kind)
        args = IterativeSFTConfig(str(tmp_path), report_to="none", bf16=False, on_nonfinite=policy)
        one = IterativeSFTTrainer(subject, args)
        one.step(**data_of(kind))
        before = weights(subject)
        embeds = subject.encoder.embed_tokens if kind == "t5" else subject.get_input_embeddings()
        handle = embeds.register_forward_hook(lambda _m, _a, out: out * float("nan"))
        if policy == "skip":
            stats = one.step(**data_of(kind))
            assert (stats["skipped_nonfinite"], stats["loss"]) == (1, None)
            json.dumps(stats, allow_nan=False)
        else:
            with pytest.raises(Exception, match="not finite"):
                one.step(**data_of(kind))
        handle.remove()
        assert same(weights(subject), before)
        assert one.step(**data_of(kind))["skipped_nonfinite"] == 0


def test_b40_order_is_a_function_of_seed_and_call(tmp_path: Path) -> None:
    data = tensors(*(row.input_ids for row in some_rows("llama", 12)))

    def orders(seed: int, disturb: bool, **changes: Any) -> list[list[str]]:
        one = trainer(tmp_path, per_device_train_batch_size=1, seed=seed, **changes)
        seen = watch(one)
        for _ in range(2):
            if disturb:
                torch.rand(9)
                random.random()
            state = torch.get_rng_state()
            one.step(input_ids=data)
            assert torch.equal(state, torch.get_rng_state())
        names = [row.sample_id for row in seen]
        return [names[:12], names[12:]]

    first = orders(1, False)
    assert first == orders(1, True) == orders(2, False, data_seed=1)
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1])
    assert first != orders(2, False)
    assert orders(1, False, train_sampling_strategy="sequential") == [[str(n) for n in range(12)]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_b41_a_model_by_name_gets_its_own_class(tmp_path: Path, kind: str) -> None:
    tokenizer = tiny_tokenizer()
    from train_helpers import MODELS

    folder = save_tiny(tmp_path / "model", model=MODELS[kind](len(tokenizer)), tokenizer=tokenizer)
    one = IterativeSFTTrainer(str(folder), arguments(tmp_path))
    assert type(one.model) is type(model(kind))
    assert {parameter.dtype for parameter in one.model.parameters()} == {torch.float32}
    assert one.step(texts=["ab", "cd"], texts_labels=["ab", "cd"])["num_samples"] == 2
    config = IterativeSFTConfig(str(tmp_path), model_init_kwargs={"dtype": torch.bfloat16}, report_to="none")
    half = IterativeSFTTrainer(str(folder), config)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="model_init_kwargs"):
        IterativeSFTTrainer(model(kind), config)


@pytest.mark.parametrize("kind", KINDS)
def test_b42_lora_by_config_trains_only_the_adapter(tmp_path: Path, kind: str) -> None:
    from peft import LoraConfig, PeftModel

    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    lora = LoraConfig(r=4, target_modules="all-linear", task_type=task, init_lora_weights=False)
    subject = model(kind)
    one = trainer(tmp_path, subject, learning_rate=1e-2, init={"peft_config": lora})
    before = weights(one.model)
    stats = one.step(**data_of(kind))
    assert stats["loss"] > 0
    changed = {name for name, p in one.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    one.save_model(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "adapter").iterdir()}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    one.save_state(tmp_path / "state")
    sizes = (tmp_path / "state" / "masters.safetensors").stat().st_size
    assert sizes < 3 * sum(p.numel() * 4 for n, p in one.model.named_parameters() if "lora_" in n)
    again = PeftModel.from_pretrained(model(kind), tmp_path / "adapter", is_trainable=True)
    two = trainer(tmp_path, again, learning_rate=1e-2)
    two.load_state(tmp_path / "state")
    one.step(**data_of(kind))
    two.step(**data_of(kind))
    assert same(weights(one.model), weights(two.model))


def test_b43_conversations_are_learnt_on_their_assistant_turns(tmp_path: Path) -> None:
    one, tokenizer = text_trainer(tmp_path)
    seen = watch(one)
    talk = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    one.step(texts=[talk])
    row = seen[0]
    learnt = [token for token in row.labels if token != -100]
    assert tokenizer.decode(learnt) == "2<|im_end|>yes<|im_end|>"
    assert (
        list(row.input_ids)
        == tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)[: len(row.input_ids)]
    )
    one.step(texts=[talk[:1]], texts_labels=["two"])
    assert tokenizer.decode([token for token in seen[1].labels if token != -100]) == "two<|im_end|>"


def test_bf16_and_fp32_arguments_compute_in_what_they_say(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        subject = model("llama")
        subject.model.layers[0].register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
        one = trainer(tmp_path, subject, bf16=bf16)
        one.core.row_format()
        seen.clear()
        one.step(input_ids=IDS)
        assert set(seen) == {dtype}
        assert {parameter.dtype for parameter in subject.parameters()} == {torch.float32}


def test_a_callers_optimizer_and_scheduler_are_used(tmp_path: Path) -> None:
    subject = model("llama")
    optimizer = torch.optim.SGD(subject.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    one = trainer(tmp_path, subject, per_device_train_batch_size=2, init={"optimizers": (optimizer, scheduler)})
    before = weights(subject)
    assert one.step(input_ids=IDS)["learning_rate"] == pytest.approx(0.25)
    assert moved(subject, before) > 1e-3
    alone = trainer(tmp_path, subject, per_device_train_batch_size=2, init={"optimizers": (optimizer, None)})
    assert alone.step(input_ids=IDS)["num_steps"] == 2
    with pytest.raises(ValueError, match="none of the model's"):
        trainer(tmp_path, model("llama"), init={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="scheduler without"):
        trainer(tmp_path, subject, init={"optimizers": (None, scheduler)})


def test_a_core_shared_by_both_doors_gives_the_same_step(tmp_path: Path) -> None:
    rows = [TrainRow(str(n), tuple(i.tolist()), tuple(i.tolist())) for n, i in enumerate(IDS)]
    core = TrainCore(model("llama"), StepSettings(learning_rate=5e-5))
    result = core.step(rows, learning_rate=5e-5, seed=1)
    one = trainer(tmp_path)
    assert one.step(input_ids=IDS)["loss"] == pytest.approx(result.loss, rel=1e-6)
    assert largest_error(weights(one.model), weights(core.model)) < 1e-5
