"""Tasks of lm-evaluation-harness on the live model, between rounds (`eval.lm_eval`); needs the extra `lm-eval`.

Guarantee: weights, tokenizer, training mode and the global random generators are afterwards what they were before.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import inspect
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError, IsftError

WHERE = "eval.lm_eval"
OURS = frozenset(
    "model model_args tasks device use_cache task_manager verbosity log_samples evaluation_tracker predict_only write_out check_integrity".split()
)
"""Parameters of `lm_eval.simple_evaluate` that isft sets itself."""
MODEL_ARGUMENTS = frozenset({"batch_size", "max_length", "add_bos_token", "prefix_token_id"})
"""Arguments that the harness takes where it wraps a model."""


class Harness:
    """The tasks of `eval.lm_eval`, found and checked once; `measure` runs them on a model."""

    def __init__(self, section: Any, base_dir: Path) -> None:
        """Raises ConfigError when the extra is missing, a task is unknown, or an argument is none of the harness's."""
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(
                "lm-evaluation-harness is not installed", where=WHERE, hint="pip install 'iterative-sft-cli[lm-eval]'"
            )
        import lm_eval
        from lm_eval.tasks import TaskManager

        arguments = dict(section.args)
        folders = arguments.pop("include_path", None) or []
        folders = [folders] if isinstance(folders, str) else list(folders)
        found = [next((p for p in (base_dir / one, Path(one)) if p.is_dir()), None) for one in folders]
        for folder, place in zip(folders, found, strict=True):
            if place is None:
                raise ConfigError(f"{folder}: no such folder", where=f"{WHERE}.args.include_path")
        defaults = arguments.pop("include_defaults", True)
        known = set(inspect.signature(lm_eval.simple_evaluate).parameters) - OURS | MODEL_ARGUMENTS
        for name in arguments:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"`{name}` is no argument of the harness that can be set here",
                    where=f"{WHERE}.args",
                    expected=", ".join(sorted({*known, "include_path", "include_defaults"})),
                    hint=f"did you mean {close[0]}?" if close else None,
                )
        self.model_arguments = {name: arguments.pop(name) for name in MODEL_ARGUMENTS & arguments.keys()}
        self.arguments = arguments
        self.manager = TaskManager(
            include_path=[str(place) for place in found] or None, include_defaults=bool(defaults)
        )
        self.tasks = [section.tasks] if isinstance(section.tasks, str) else list(section.tasks)
        for task in self.tasks:
            if not self.manager.match_tasks([task]):
                close = difflib.get_close_matches(task, self.manager.all_tasks, n=1)
                raise ConfigError(
                    f"the harness has no task `{task}`",
                    where=f"{WHERE}.tasks",
                    hint=f"did you mean {close[0]}?"
                    if close
                    else "your own: args: {include_path: a folder of task files}",
                )
        self.names = self.manager.match_tasks(self.tasks)

    def measure(
        self, model: Any, tokenizer: Any, *, compute_dtype: Any, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """One row {task, metric, filter, value, stderr} for each figure, in a fixed order.

        `check` is called before every batch and may raise. Raises DataError when the harness fails, a data set that cannot be
        had among it.
        """
        import lm_eval
        import torch
        from lm_eval.models.huggingface import HFLM

        class Live(HFLM):  # type: ignore[misc]
            def _model_call(self, *args: Any, **kwargs: Any) -> Any:
                check()
                return super()._model_call(*args, **kwargs)

            def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
                check()
                return super()._model_generate(*args, **kwargs)

        half = compute_dtype in (torch.bfloat16, torch.float16) and model.dtype != compute_dtype
        with _undisturbed(model), torch.no_grad():
            try:
                wrapped = Live(
                    pretrained=model,
                    # it may be given a pad token
                    tokenizer=copy.deepcopy(tokenizer),
                    mixed_precision_dtype=str(compute_dtype).removeprefix("torch.") if half else None,
                    **{"batch_size": 8, **self.model_arguments},
                )
                said = lm_eval.simple_evaluate(
                    model=wrapped, tasks=self.names, task_manager=self.manager, log_samples=False, **self.arguments
                )
            except (IsftError, KeyboardInterrupt):
                raise
            except Exception as error:
                raise DataError(
                    f"lm-evaluation-harness failed: {type(error).__name__}: {error}",
                    where=WHERE,
                    hint="offline, a task's data must be in the cache or beside the task (dataset_path: json)",
                ) from error
        return list(_rows(said["results"]))


def _rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The harness keys its figures `metric,filter` and their standard errors `metric_stderr,filter`."""
    for task in sorted(results):
        for key in sorted(results[task]):
            metric, comma, name = key.partition(",")
            value = results[task][key]
            if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = results[task].get(f"{metric}_stderr,{name}")
            yield {
                "task": task,
                "metric": metric,
                "filter": name,
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
            }


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`eval/lm_eval/<task>/<metric>` and `..._stderr` of the rows of `measure`; a filter other than `none` is named behind the metric."""
    out: dict[str, float] = {}
    for row in rows:
        key = f"eval/lm_eval/{row['task']}/{row['metric']}" + ("" if row["filter"] == "none" else f"/{row['filter']}")
        out[key] = row["value"]
        if row["stderr"] is not None:
            out[f"{key}_stderr"] = row["stderr"]
    return out


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """The harness seeds every generator, sets the model to eval and speaks through the root logger."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    training, logger = model.training, logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        model.train(training)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
