"""`IterativeSFTTrainer`: fine-tuning by calls of `step()`, with generation and filtering of your own in between.

Guarantee: TRL's class as its documentation promised it. Every accepted argument acts or raises; `step()` returns JSON-able
statistics; what it was given is trained exactly once.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from iterative_sft_cli.train import torch_checkpoints, torch_open, torch_ranks, torch_rows
from iterative_sft_cli.train.base import TrainOutOfMemory
from iterative_sft_cli.train.torch_arguments import IterativeSFTConfig, check_arguments, settings_from_arguments
from iterative_sft_cli.train.torch_collator import collated
from iterative_sft_cli.train.torch_core import StepResult, TrainCore, bare_model
from iterative_sft_cli.train.torch_evaluate import evaluate, rows_of
from iterative_sft_cli.train.torch_inputs import InputReader, fingerprint
from iterative_sft_cli.train.torch_settings import schedule_of_call
from iterative_sft_cli.train.torch_window import LogWindow, statistics
from iterative_sft_cli.types import TrainRow, derive_seed

__all__ = ["IterativeSFTConfig", "IterativeSFTTrainer"]


class IterativeSFTTrainer:
    """Trains a causal or encoder-decoder model on what `step()` is given.

    model: a name or folder, or a transformers or PEFT model. args: `IterativeSFTConfig` or `TrainingArguments`.
    processing_class (alias tokenizer): needed for texts; it is never changed. optimizers: an optimizer over the model's
    parameters and, optionally, its scheduler. data_collator: makes the tensors of a micro-batch from a list of
    `{input_ids, attention_mask, labels}`; every key it returns reaches the model. peft_config: train this adapter only.
    callbacks: `transformers.TrainerCallback`s. One `step()` call counts as an epoch for them.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        processing_class: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        eval_dataset: Any = None,
        max_length: int | None = None,
        truncation_mode: str | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None,
        optimize_device_cache: bool | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Raises ValueError or TypeError for what cannot be honoured, before anything is loaded where possible."""
        if processing_class is not None and tokenizer is not None and processing_class is not tokenizer:
            raise ValueError("processing_class and its alias tokenizer are two different objects")
        self.args: Any = IterativeSFTConfig() if args is None else args
        if not isinstance(self.args, TrainingArguments):
            raise TypeError(f"args must be TrainingArguments or IterativeSFTConfig, got {type(args).__name__}")
        check_arguments(self.args)
        self.max_length = self._either("max_length", max_length, None)
        self.truncation_mode = self._either("truncation_mode", truncation_mode, "keep_end")
        self.optimize_device_cache = bool(self._either("optimize_device_cache", optimize_device_cache, False))
        if self.truncation_mode not in ("keep_end", "keep_start"):
            raise ValueError(f"truncation_mode must be keep_end or keep_start, got {self.truncation_mode!r}")
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 1):
            raise ValueError(f"max_length must be a positive integer or None, got {self.max_length!r}")
        if str(getattr(self.args.eval_strategy, "value", "no")) != "no" and eval_dataset is None:
            raise ValueError(f"eval_strategy={self.args.eval_strategy.value!r} needs an eval_dataset")
        if self.args.full_determinism:
            torch.use_deterministic_algorithms(True)
        name = model if isinstance(model, str) else None
        self.model = torch_open.open_model(model, self.args, peft_config)
        self.is_encoder_decoder = bool(getattr(bare_model(self.model).config, "is_encoder_decoder", False))
        given = processing_class if processing_class is not None else tokenizer
        self.processing_class = given if given is not None else torch_open.find_tokenizer(name, self.model)
        self.data_collator = data_collator
        self.eval_dataset = eval_dataset
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        own, self.lr_scheduler = optimizers
        torch_open.check_optimizer(own, self.lr_scheduler, self.model)
        self.core = TrainCore(
            self.model,
            settings_from_arguments(self.args),
            compute_dtype=torch.bfloat16 if self.args.bf16 else torch.float32,
            device=torch.device(self.args.device),
            optimizer=own,
        )
        self._own_rates = [float(group["lr"]) for group in own.param_groups] if own is not None else None
        torch_ranks.broadcast([parameter.data for parameter in self.model.parameters()])
        self.core.weights.reread()
        self.reader = InputReader(
            self.processing_class,
            is_encoder_decoder=self.is_encoder_decoder,
            vocab_size=self.core.vocab_size,
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,
            append_eos=bool(getattr(self.args, "append_eos", True)),
        )
        self.call_index = 0
        self.window = LogWindow(self.args)
        self._inside: tuple[list[list[int]], int] | None = None
        self._budget: int | None = None
        self._begun = False
        self.control = TrainerControl()
        self.state = TrainerState(
            is_local_process_zero=torch_ranks.rank() == 0, is_world_process_zero=torch_ranks.rank() == 0
        )
        self.state.max_steps = max(0, self.args.max_steps)
        pair = (self.core.optimizer, self.lr_scheduler)
        self.callback_handler = torch_open.make_handler(
            self.args, callbacks or (), self.model, self.processing_class, pair, self.window
        )
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)
        if self.args.resume_from_checkpoint:
            self.load_state(Path(self.args.resume_from_checkpoint))

    # --- making --------------------------------------------------------------------------------------------------------

    def _either(self, name: str, given: Any, default: Any) -> Any:
        """A value that both the constructor and the arguments may hold."""
        written = getattr(self.args, name, None)
        if given is None:
            return default if written is None else written
        if written is not None and written != default and written != given:
            raise ValueError(f"{name} is {given!r} in the constructor and {written!r} in args")
        return given

    # --- training ------------------------------------------------------------------------------------------------------

    def step(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        texts: Any = None,
        texts_labels: Any = None,
    ) -> dict[str, Any]:
        """One pass over what is given, in optimizer steps of batch size x accumulation x ranks samples.

        Either `input_ids` (1-D integer tensors; `attention_mask` 0 marks padding; `labels` default to `input_ids`, -100 is
        not trained) or `texts` (strings, or lists of chat messages of which the assistant's turns are trained;
        `texts_labels` for a causal model is the end of the text that is to be learnt, for an encoder-decoder the target).
        Over several ranks equal lists are dealt out, different ones are each rank's share. An empty list trains nothing.

        Returns loss (mean over trained tokens; None when nothing was trained), num_tokens, num_trained_tokens, num_samples,
        num_steps, learning_rate and grad_norm of the last step, tokens_per_second, skipped_nonfinite. Raises ValueError or
        TypeError for bad input, with everything untouched.
        """
        try:
            rows = self._rows_everywhere(
                lambda: self.reader.rows(input_ids, attention_mask, labels, texts, texts_labels)
            )
            return self._train(rows)
        finally:
            if self.optimize_device_cache:
                self._free_device_cache()

    def _rows_everywhere(self, read: Callable[[], list[TrainRow]]) -> list[TrainRow]:
        """This rank's rows; when any rank's input is bad, all ranks raise."""
        problem: Exception | None = None
        rows: list[TrainRow] = []
        try:
            rows = read()
        except (ValueError, TypeError) as error:
            problem = error
        flags = torch_ranks.gather_ints([int(problem is not None)], self.core.device)
        if problem is not None:
            raise problem
        bad = [rank for rank, (flag,) in enumerate(flags) if flag]
        if bad:
            raise ValueError(f"rank {bad[0]} was given bad input; nothing was trained on any rank")
        return rows

    def _deal(self, rows: list[TrainRow], marks: list[list[int]]) -> list[list[TrainRow]]:
        """This rank's rows of each optimizer step of the call."""
        rank, size = torch_ranks.rank(), torch_ranks.size()
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * size
        order = list(rows)
        if str(getattr(self.args, "train_sampling_strategy", "random")) != "sequential":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            random.Random(derive_seed(seed, "order", self.call_index)).shuffle(order)
        if all(mark == marks[0] for mark in marks):
            pieces = [order[start : start + per_step] for start in range(0, len(order), per_step)]
            return [torch_rows.share(piece, rank, size, self.is_encoder_decoder) for piece in pieces]
        count = -(-sum(mark[0] for mark in marks) // per_step)
        return [order[k * len(order) // count : (k + 1) * len(order) // count] for k in range(count)]

    def _train(self, rows: list[TrainRow]) -> dict[str, Any]:
        started = time.perf_counter()
        marks = torch_ranks.gather_ints([len(rows), *fingerprint(rows)], self.core.device)
        pieces = self._deal(rows, marks)
        first = self._steps_done(marks)
        if self.args.max_steps > 0 and self.state.global_step + len(pieces) - first > self.args.max_steps:
            raise ValueError(
                f"max_steps={self.args.max_steps} is the life of this trainer: {self.state.global_step} steps are done and this "
                f"call needs {len(pieces) - first} more; raise max_steps, or leave it out for a schedule per step() call"
            )
        if self.control.should_training_stop:
            raise ValueError("a callback has stopped this trainer")
        schedule = self._schedule(len(pieces))
        self._begin(len(pieces) - first)
        results: list[StepResult] = []
        for number in range(first, len(pieces)):
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            result = self._one(pieces[number], schedule(number))
            results.append(result)
            self.state.global_step += 1
            self.state.epoch = self.call_index + (number + 1) / len(pieces)
            self.window.add(result, self.state)
            self.window.ends_call = last = number + 1 == len(pieces)
            self._inside = None if last else (marks, number + 1)
            if last:
                self.call_index += 1
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._act()
            if self.control.should_training_stop:
                break
        if results:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._act()
            if self.args.max_steps > 0 and self.state.global_step >= self.args.max_steps:
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return statistics(results, time.perf_counter() - started)

    def _one(self, rows: list[TrainRow], rate: float | None) -> StepResult:
        seed = derive_seed(self.args.seed, "step", self.state.global_step)
        if rate is not None and self._own_rates is not None:
            assert self.core.optimizer is not None
            for group, peak in zip(self.core.optimizer.param_groups, self._own_rates, strict=True):
                group["lr"] = peak * rate / self.args.learning_rate
            rate = None
        while True:
            try:
                if self.data_collator is None:
                    result = self.core.step(rows, learning_rate=rate, seed=seed, micro_batch_tokens=self._budget)
                else:
                    batches = self._collated(rows)
                    result = self.core.step_batches(batches, len(rows), learning_rate=rate, seed=seed)
                break
            except TrainOutOfMemory:
                longest = max(torch_rows.row_cost(row, self.is_encoder_decoder) for row in rows)
                now = self._budget or self.core.settings.micro_batch_tokens or self.core.auto_budget()
                if not self.args.auto_find_batch_size or now <= longest or torch_ranks.size() > 1:
                    raise
                self._budget = max(longest, min(now, sum(len(row.input_ids) for row in rows)) // 2)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        every = self.args.torch_empty_cache_steps
        if every and (self.state.global_step + 1) % every == 0:
            self._free_device_cache()
        return result

    def _collated(self, rows: list[TrainRow]) -> list[torch_rows.MicroBatch]:
        assert self.data_collator is not None
        return collated(
            rows,
            self.data_collator,
            budget=self._budget or self.core.settings.micro_batch_tokens or self.core.auto_budget(),
            form=self.core.row_format().padded(),
            shifted_right=getattr(bare_model(self.model), "prepare_decoder_input_ids_from_labels", None),
        )

    def _schedule(self, num_steps: int) -> Callable[[int], float | None]:
        """Learning rate of each step of this call; None where a caller's own scheduler sets it."""
        if self.lr_scheduler is not None:
            return lambda _number: None
        done = self.state.global_step - (self._inside[1] if self._inside else 0)
        return schedule_of_call(self.core.settings, num_steps=num_steps, done=done, max_steps=self.args.max_steps)

    def _steps_done(self, marks: list[list[int]]) -> int:
        """Steps of this call that were taken before the state was saved."""
        if self._inside is None:
            return 0
        earlier, done = self._inside
        if earlier != marks:
            raise ValueError(
                f"the loaded state was saved inside a step() call, after {done} of its steps: call step() with the same data first"
            )
        return done

    def _begin(self, num_steps: int) -> None:
        if self.args.max_steps <= 0:
            self.state.max_steps = self.state.global_step + num_steps
        if not self._begun and num_steps:
            self._begun = True
            self.core.weights.cast(frozen=True)
            self.state.train_batch_size = self.args.per_device_train_batch_size
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
            if self.args.eval_on_start:
                self.evaluate()
        if num_steps:
            self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)

    def _act(self) -> None:
        """Log, evaluate and save as the control says."""
        control = self.control
        if control.should_log and self.window.open:
            self.log(self.window.take(self.state))
        control.should_log = False
        if control.should_evaluate:
            control.should_evaluate = False
            self.evaluate()
        if control.should_save:
            control.should_save = False
            self.save_checkpoint()

    def _free_device_cache(self) -> None:
        gc.collect()
        self.core.free_scratch()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- looking -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, Any]) -> None:
        """Keep `logs` in `state.log_history` and hand them to the callbacks."""
        logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss, and what `compute_metrics` says, on `eval_dataset` (a dict of data sets: one prefix each)."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate() needs an eval_dataset")
        named = dataset.items() if isinstance(dataset, dict) else [(None, dataset)]
        metrics: dict[str, float] = {}
        for name, data in named:
            prefix = metric_key_prefix if name is None else f"{metric_key_prefix}_{name}"
            found = evaluate(
                self.core,
                rows_of(data, self.reader),
                batch_size=self.args.per_device_eval_batch_size,
                compute_metrics=None if self.args.prediction_loss_only else self.compute_metrics,
                preprocess_logits=self.preprocess_logits_for_metrics,
            )
            metrics |= {key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": found[key] for key in found}
        self.log(dict(metrics))
        torch_checkpoints.remember_best(self.args, self.state, metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def is_world_process_zero(self) -> bool:
        """Whether this is rank 0."""
        return torch_ranks.rank() == 0

    # --- keeping -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the model (or adapter) and tokenizer as a Hugging Face folder."""
        torch_checkpoints.save_model(self, Path(output_dir or self.args.output_dir))

    def save_state(self, folder: str | Path) -> None:
        """Write everything that the next `step()` depends on into `folder`, as safetensors and JSON."""
        torch_checkpoints.save_state(self, Path(folder))

    def load_state(self, folder: str | Path) -> None:
        """Put back what `save_state` (or a `checkpoint-N` folder) holds; the next step is then the same, byte for byte."""
        torch_checkpoints.load_state(self, Path(folder))

    def save_checkpoint(self) -> Path:
        """Write `output_dir/checkpoint-<global_step>` and apply `save_total_limit`."""
        folder = torch_checkpoints.save_checkpoint(self)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return folder

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Sequence[str] | None = None
    ) -> None:
        """Write `output_dir/README.md`."""
        torch_checkpoints.write_model_card(self, Path(self.args.output_dir), model_name, dataset_name, tags)

    def push_to_hub(self, commit_message: str = "End of training", **kwargs: Any) -> Any:
        """Upload model and tokenizer to `args.hub_model_id` (or the name of `output_dir`)."""
        name = self.args.hub_model_id or Path(self.args.output_dir).name
        options = {
            "commit_message": commit_message,
            "token": self.args.hub_token,
            "private": self.args.hub_private_repo,
            "revision": self.args.hub_revision,
            **kwargs,
        }
        if self.processing_class is not None:
            self.processing_class.push_to_hub(name, **options)
        return self.model.push_to_hub(name, **options)
