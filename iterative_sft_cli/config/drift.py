"""What may change between a run and its resumption: every key of the schema is frozen, tunable or cosmetic.

frozen: shapes samples, verdicts or weights; a change is refused unless `--allow-change` names it. tunable: changes how or how long the
work is done; a change is taken on and recorded. cosmetic: changes nothing that is stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from iterative_sft_cli.config.availability import default_of
from iterative_sft_cli.config.findings import Step
from iterative_sft_cli.config.problems import dotted
from iterative_sft_cli.config.schedule import looks_like_schedule, to_plain
from iterative_sft_cli.config.walk import attribute_of, section_at

DriftClass = Literal["frozen", "tunable", "cosmetic"]

_FROZEN = """
    seed model.dtype model.adapter.type model.adapter.r model.adapter.alpha model.adapter.dropout model.adapter.target_modules
    model.quantization model.init model.tokenizer model.use model.args
    prompts.dataset.id prompts.dataset.name prompts.dataset.split prompts.dataset.revision prompts.reasoning_gym.task
    prompts.reasoning_gym.size prompts.reasoning_gym.seed prompts.reasoning_gym.args prompts.use prompts.args prompts.limit
    prompts.prompt prompts.answer.column prompts.answer.pattern prompts.id prompts.level prompts.system prompts.few_shot
    prompts.template prompts.template_kwargs prompts.thinking_tags prompts.per_round prompts.order prompts.skip.solved_at_least prompts.skip.solved_at_most
    prompts.curriculum.start prompts.curriculum.step prompts.curriculum.width prompts.curriculum.promote_if prompts.advance
    generate.until_total generate.budget.kind generate.budget.pilot generate.budget.alpha generate.budget.beta
    generate.search.temperature generate.search.filter generate.search.min generate.search.prompts generate.search.samples_per_prompt
    generate.search.enough
    rationalize.share rationalize.few_shot
    train.mix.weight train.new_share train.max_rows train.evict train.formats[].prompt train.formats[].completion train.formats[].few_shot
    eval.rank_by
    generate.args generate.samples_per_prompt generate.until_accepted generate.wave_size generate.from generate.from[].model generate.from[].share
    generate.temperature generate.top_p generate.top_k generate.min_p generate.repetition_penalty generate.do_sample
    generate.max_new_tokens generate.stop generate.keep_logprobs generate.openai.model generate.openai.extra_body
    rationalize.template rationalize.samples_per_prompt rationalize.max_share
    filters[].use filters[].name filters[].args filters[].bare
    train.start_from train.data train.data.window train.mix.dataset.id train.mix.dataset.name train.mix.dataset.split
    train.mix.dataset.revision train.mix.path train.mix.prompt train.mix.completion train.mix.messages train.mix.limit train.mix.share
    train.objective train.objective_args train.weight_by train.epochs train.steps train.passes[].threshold train.passes[].by
    train.passes[].learning_rate train.passes[].epochs train.passes[].steps train.learning_rate train.lr_scheduler_type
    train.lr_schedule train.packing train.warmup_ratio train.weight_decay train.max_grad_norm train.batch_size train.optimizer
    train.optimizer_state train.max_length train.truncation_mode
    warmup.path warmup.dataset.id warmup.dataset.name warmup.dataset.split warmup.dataset.revision warmup.prompt warmup.completion
    warmup.messages warmup.limit warmup.epochs warmup.steps warmup.learning_rate warmup.lr_scheduler_type warmup.warmup_ratio
    warmup.batch_size
    eval.dataset.id eval.dataset.name eval.dataset.split eval.dataset.revision eval.reasoning_gym.task eval.reasoning_gym.size
    eval.reasoning_gym.seed eval.reasoning_gym.args eval.use eval.args eval.limit eval.prompt eval.answer.column eval.answer.pattern
    eval.id eval.level eval.system eval.few_shot eval.template eval.template_kwargs eval.samples_per_prompt eval.k eval.greedy
    eval.correct eval.metric eval.temperature eval.top_p eval.top_k eval.min_p eval.repetition_penalty eval.do_sample
    eval.max_new_tokens eval.stop
"""
# model.path, prompts.path and eval.path may move: their content is compared by hash when the run is opened.
_TUNABLE = """
    rounds deterministic model.path model.revision model.device model.attention model.trust_remote_code prompts.path eval.path
    generate.engine generate.memory_gb generate.timeout_s generate.startup_timeout_s
    generate.vllm.python generate.vllm.tensor_parallel_size generate.vllm.gpu_memory_utilization generate.vllm.max_model_len
    generate.vllm.args generate.vllm.base_urls generate.vllm.stage_to generate.vllm.reload generate.vllm.servers
    generate.vllm.while_training
    generate.openai.base_url generate.openai.api_key_env generate.openai.max_concurrency generate.openai.max_retries
    generate.openai.requests_per_minute
    filters[].timeout_s filters[].startup_timeout_s filters[].workers filters[].device filters[].env filters[].memory_gb
    filters[].on_error
    train.on_nonfinite train.micro_batch_tokens train.gradient_checkpointing train.offload train.parallel.type train.parallel.options
    eval.every eval.lm_eval.tasks eval.lm_eval.args
    guards.min_accepted guards.min_accept_rate guards.max_truncated_rate guards.on_empty guards.stop_if guards.rollback_if
    guards.max_tokens guards.max_hours
    checkpoints.keep checkpoints.keep_best checkpoints.every_steps checkpoints.every_s samples.compress samples.keep
"""
_COSMETIC = "output_dir tracking"

CLASSES: dict[str, DriftClass] = {
    **dict.fromkeys(_FROZEN.split(), "frozen"),
    **dict.fromkeys(_TUNABLE.split(), "tunable"),
    **dict.fromkeys(_COSMETIC.split(), "cosmetic"),
}
"""The class of every leaf; `[]` stands for any index."""


@dataclass(frozen=True, slots=True)
class Drift:
    """One key whose value changed: its dotted path, both values, and its class."""

    path: str
    old: Any
    new: Any
    cls: DriftClass


def class_of(path: str) -> DriftClass:
    """The class of a dotted path. What is not a leaf has the strictest class below it; what is unknown is frozen."""
    general = re.sub(r"\[\d+\]", "[]", path)
    if general in CLASSES:
        return CLASSES[general]
    below = {cls for known, cls in CLASSES.items() if known.startswith((f"{general}.", f"{general}["))}
    if not below:
        parent = re.sub(r"(?:\.[^.\[\]]+|\[\])$", "", general)
        return CLASSES.get(parent, "frozen")
    return "frozen" if "frozen" in below else "tunable" if "tunable" in below else "cosmetic"


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Drift]:
    """What changed from one merged tree (`LoadedConfig.merged`) to another.

    A key that an older version did not know counts as its default. Raising `rounds` and lengthening a `by_round` list are tunable;
    lowering `rounds` is frozen. Filters are compared one by one while their names and order stay, else as a whole.
    """
    return list(_differences(old, new, ()))


def _differences(old: Any, new: Any, path: tuple[Step, ...]) -> Iterator[Drift]:
    if old == new:
        return
    if (
        isinstance(old, Mapping)
        and isinstance(new, Mapping)
        and section_at(path) is not None
        and not _has_schedule(old, new)
    ):
        for key in dict.fromkeys((*old, *new)):
            below = (*path, key)
            yield from _differences(_value(old, key, path), _value(new, key, path), below)
    elif _same_entries(old, new):
        for index, (was, now) in enumerate(zip(old, new, strict=True)):
            yield from _differences(was, now, (*path, index))
    else:
        text = dotted(path)
        yield Drift(text, old, new, _class_of_change(text, old, new))


def _value(tree: Mapping[str, Any], key: str, path: tuple[Step, ...]) -> Any:
    """The value of a key; the schema's default where the tree comes from a version that did not know it."""
    section = section_at(path)
    if key in tree or section is None:
        return tree.get(key)
    attribute = attribute_of(section, key)
    return None if attribute is None else to_plain(default_of(section, attribute))


def _has_schedule(old: Any, new: Any) -> bool:
    return looks_like_schedule(old) or looks_like_schedule(new)


def _same_entries(old: Any, new: Any) -> bool:
    """Whether two lists of mappings can be compared entry by entry."""
    if not (isinstance(old, list) and isinstance(new, list) and len(old) == len(new)):
        return False
    if not all(isinstance(one, Mapping) for one in (*old, *new)):
        return False
    return [one.get("use") for one in old] == [one.get("use") for one in new]


def _class_of_change(path: str, old: Any, new: Any) -> DriftClass:
    if path == "rounds" and isinstance(old, int) and isinstance(new, int):
        return "tunable" if new > old else "frozen"
    return "tunable" if _is_longer_list(old, new) else class_of(path)


def _is_longer_list(old: Any, new: Any) -> bool:
    """Whether a `by_round` list only names further rounds."""
    if not (looks_like_schedule(old) and looks_like_schedule(new) and set(old) == set(new) == {"by_round"}):
        return False
    earlier, later = old["by_round"], new["by_round"]
    return len(later) > len(earlier) and bool(later[: len(earlier)] == earlier)
