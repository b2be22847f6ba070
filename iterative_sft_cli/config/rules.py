"""Combinations of keys that cannot work: each rule names the keys it looks at, and blames the one to change.

A rule runs only when all keys it looks at are right by themselves, so that one mistake gives one message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.config.findings import Step, nearest, one_of, show
from iterative_sft_cli.config.problems import undotted
from iterative_sft_cli.config.schedule import Schedule
from iterative_sft_cli.config.schema import Config, PromptsConfig, SourceConfig

MAX_ROUNDS_CHECKED = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule found; `key` blames the key rather than its value."""

    path: tuple[Step, ...]
    what: str
    expected: str | None = None
    meant: str | None = None
    key: bool = False


Rule = Callable[[Config, Path], Iterator[Finding]]
RULES: list[tuple[tuple[tuple[Step, ...], ...], Rule]] = []


def rule(*reads: str) -> Callable[[Rule], Rule]:
    """Register a rule, with the paths of the keys it looks at."""

    def register(function: Rule) -> Rule:
        RULES.append((tuple(undotted(path) for path in reads), function))
        return function

    return register


def at(path: str, what: str, expected: str | None = None, meant: str | None = None, *, key: bool = False) -> Finding:
    """A finding at a dotted path."""
    return Finding(undotted(path), what, expected, meant, key)


def check(config: Config, base_dir: Path, tainted: set[tuple[Step, ...]]) -> Iterator[Finding]:
    """The findings of every rule whose keys are not `tainted` by a problem of their own."""
    for reads, function in RULES:
        if not any(bad[: len(read)] == read or read[: len(bad)] == bad for read in reads for bad in tainted):
            yield from function(config, base_dir)


def rounds_of(config: Config, *values: Any) -> list[int]:
    """The rounds in which the given values can differ."""
    return (
        list(range(1, min(config.rounds, MAX_ROUNDS_CHECKED) + 1))
        if any(isinstance(v, Schedule) for v in values)
        else [1]
    )


def value_in(value: Any, round_index: int) -> Any:
    """The value of a key in a round."""
    return value.value(round_index) if isinstance(value, Schedule) else value


def values_over(config: Config, value: Any) -> list[Any]:
    """All values that a key takes, in order of rounds."""
    return [value_in(value, round_index) for round_index in rounds_of(config, value)]


def in_round(config: Config, round_index: int, *values: Any) -> str:
    """' in round 3' where a schedule is involved."""
    return f" in round {round_index}" if any(isinstance(value, Schedule) for value in values) else ""


# --- model -----------------------------------------------------------------------------------------------------------


@rule("model.path", "model.init", "model.use", "model.tokenizer", "model.args", "model.revision")
def one_model(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Exactly one of path, init and use."""
    given = [name for name in ("path", "init", "use") if getattr(config.model, name) is not None]
    if not given:
        yield at("model", "no model is named", "path (or init, or use)")
    for name in given[1:]:
        yield at(
            f"model.{name}", f"{name} and {given[0]} both name a model", "exactly one of path, init and use", key=True
        )
    if given == ["init"] and config.model.init is not None:
        if config.model.tokenizer is None:
            yield at(
                "model.init",
                "a fresh model has no tokenizer of its own",
                "model.tokenizer: a hub id or a folder",
                key=True,
            )
        if not isinstance(config.model.init.get("model_type"), str):
            yield at(
                "model.init", "model_type is missing", "model_type: llama, or another architecture of transformers"
            )
    if config.model.args and config.model.use is None:
        yield at("model.args", "there is no `use` that these arguments are for", "model.use beside them", key=True)
    if config.model.init is not None and config.model.revision is not None:
        yield at("model.revision", "a fresh model has no revision", "no revision beside init", key=True)


@rule("model.trust_remote_code", "model.revision", "model.path")
def pinned_code(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Code from a hub runs only from a fixed commit."""
    model = config.model
    local = model.path is not None and any((root / model.path).is_dir() for root in (base_dir, Path()))
    if model.trust_remote_code and not local and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        yield at(
            "model.trust_remote_code",
            "it runs the model's own code",
            "model.revision: a full commit hash of 40 hexadecimal digits",
        )


@rule("model.quantization", "model.adapter")
def quantized_needs_adapter(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Quantized weights cannot be trained themselves."""
    if config.model.quantization != "none" and config.model.adapter is None:
        yield at("model.quantization", "quantized weights cannot be trained", "model.adapter: {type: lora} beside it")


# --- sources of rows -------------------------------------------------------------------------------------------------


def _one_source(section: SourceConfig, name: str) -> Iterator[Finding]:
    kinds = ("path", "dataset", "reasoning_gym", "use")
    given = [kind for kind in kinds if getattr(section, kind) is not None]
    if not given:
        yield at(name, "no source of prompts is named", f"one of {one_of(kinds)}")
    for kind in given[1:]:
        yield at(
            f"{name}.{kind}", f"{kind} and {given[0]} both name a source", f"exactly one of {one_of(kinds)}", key=True
        )
    if section.args and section.use is None:
        yield at(f"{name}.args", "there is no `use` that these arguments are for", f"{name}.use beside them", key=True)


@rule("prompts.path", "prompts.dataset", "prompts.reasoning_gym", "prompts.use", "prompts.args")
def one_prompt_source(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Exactly one source of prompts."""
    yield from _one_source(config.prompts, "prompts")


@rule("eval.path", "eval.dataset", "eval.reasoning_gym", "eval.use", "eval.args")
def one_eval_source(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Exactly one source of held-out prompts."""
    if config.eval is not None:
        yield from _one_source(config.eval, "eval")


@rule("train.mix.path", "train.mix.dataset", "warmup.path", "warmup.dataset")
def one_seed_source(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Seed data comes from one place."""
    for name, section in (("train.mix", config.train.mix), ("warmup", config.warmup)):
        if section is None:
            continue
        if section.path is None and section.dataset is None:
            yield at(name, "no seed data is named", "path or dataset", key=True)
        elif section.path is not None and section.dataset is not None:
            yield at(
                f"{name}.dataset", "dataset and path both name seed data", "exactly one of path and dataset", key=True
            )


@rule("prompts.path", "prompts.dataset", "prompts.reasoning_gym", "eval.path", "eval.dataset", "eval.reasoning_gym")
def eval_is_held_out(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Evaluation asks what is never trained on; the content is compared later, the obvious is said now."""
    if config.eval is None:
        return
    ours, theirs = config.eval, config.prompts
    if ours.path is not None and ours.path == theirs.path:
        yield at("eval.path", "these are the prompts that are trained on", "another file than prompts.path")
    if ours.dataset is not None and ours.dataset == theirs.dataset:
        yield at(
            "eval.dataset", "these are the prompts that are trained on", "another split than that of prompts.dataset"
        )
    mine, trained = ours.reasoning_gym, theirs.reasoning_gym
    if mine is None or trained is None or (mine.task, mine.args) != (trained.task, trained.args):
        return
    if mine.seed < trained.seed + trained.size and trained.seed < mine.seed + mine.size:
        expected = f"a seed of at least {trained.seed + trained.size}, so that the {mine.size} prompts differ"
        yield at("eval.reasoning_gym.seed", f"seeds {mine.seed} and following are trained on", expected)


@rule("prompts.order", "prompts.level", "rounds")
def curriculum_needs_level(config: Config, base_dir: Path) -> Iterator[Finding]:
    """A curriculum goes by level."""
    if "curriculum" in values_over(config, config.prompts.order) and config.prompts.level is None:
        yield at(
            "prompts.order", "a curriculum goes from low levels to high", "prompts.level: the column with the level"
        )


@rule("prompts.skip")
def skip_leaves_something(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Skipping both ends must leave a middle."""
    skip: Any = config.prompts.skip
    for r in rounds_of(config, skip.solved_at_least, skip.solved_at_most):
        least, most = value_in(skip.solved_at_least, r), value_in(skip.solved_at_most, r)
        if least is not None and most is not None and most >= least:
            what = f"prompts solved at least {least:g} or at most {most:g} are all prompts{in_round(config, r, *vars(skip).values())}"
            yield at("prompts.skip.solved_at_most", what, f"less than {least:g}")
            return


@rule("prompts.template", "prompts.template_kwargs")
def kwargs_need_template(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Values for a template need a template."""
    if config.prompts.template == "none" and config.prompts.template_kwargs:
        yield at(
            "prompts.template_kwargs",
            "there is no template that would use them (template: none)",
            "a template",
            key=True,
        )


# --- output_dir ------------------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def fill_placeholders(text: str, tree: dict[str, Any]) -> tuple[str, list[Finding]]:
    """`text` with {seed} and {key.path} replaced by values of `tree`, made safe for a file name; and what cannot be replaced."""
    findings: list[Finding] = []

    def fill(match: re.Match[str]) -> str:
        key = match[1]
        value: Any = tree
        try:
            for step in undotted(key):
                value = value[step]
        except (KeyError, IndexError, TypeError, ValueError):
            from iterative_sft_cli.config.walk import leaves

            meant = nearest(key, [leaf.path for leaf in leaves()])
            findings.append(
                at("output_dir", f"{match[0]} names no key", "{seed} or {key.path}", f"{{{meant}}}" if meant else None)
            )
            return ""
        if not isinstance(value, str | int | float):
            findings.append(at("output_dir", f"{match[0]} is {show(value)}", "a key with one text or number"))
            return ""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-.") or "-"

    filled = _PLACEHOLDER.sub(fill, text)
    if not findings and ("{" in filled or "}" in filled):
        findings.append(at("output_dir", "a brace without its partner", "{seed} or {key.path}"))
    return filled, findings


def has_answers(section: PromptsConfig) -> bool:
    """Whether the prompts come with reference answers, as far as the config tells."""
    return section.answer is not None or section.path is None and section.dataset is None
