"""Rules about a round: generation, filters' scores, training, evaluation, and schedules over rounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iterative_sft_cli.config.expression import Expression
from iterative_sft_cli.config.fields import Section
from iterative_sft_cli.config.findings import Step, explain, nearest, one_of, path_of, show
from iterative_sft_cli.config.problems import dotted
from iterative_sft_cli.config.rules import Finding, at, has_answers, in_round, rounds_of, rule, value_in, values_over
from iterative_sft_cli.config.schedule import Schedule
from iterative_sft_cli.config.schema import Config

ENGINES = ("transformers", "vllm", "openai")
OBJECTIVES = ("nll", "dft", "iw", "rwr")
TRACKERS = ("trackio", "tensorboard", "wandb", "mlflow")
ROUND_WIDE = frozenset({"majority", "best_of_n", "random_k", "top_fraction", "top_k", "length_vs_group", "dedup"})
"""Built-ins whose verdict on a sample can change when more samples come, in at least one of their forms."""
ANSWER_FILTERS = frozenset({"exact_match", "numeric_answer", "math_verify"})
"""Built-ins that compare with the reference answer."""


def installed_names(group: str) -> list[str]:
    """Names that installed packages offer in an entry-point group; nothing is imported."""
    from importlib.metadata import entry_points

    return [point.name for point in entry_points(group=group)]


def _known(path: str, name: str, kind: str, built_in: tuple[str, ...], group: str) -> Iterator[Finding]:
    if name in built_in or ":" in name:
        return
    known = [*built_in, *installed_names(group)]
    if name not in known:
        expected = f"{one_of(known)}, or pkg.mod:attr"
        yield at(path, f"there is no {kind} named {show(name)}", expected, nearest(name, known))


# --- generation ------------------------------------------------------------------------------------------------------


@rule("generate.engine", "generate.args")
def known_engine(config: Config, base_dir: Path) -> Iterator[Finding]:
    """The engine is built in, installed, or a place in a module."""
    engine = config.generate.engine
    yield from _known("generate.engine", engine, "engine", ENGINES, "isft.engines")
    if config.generate.args and engine in ENGINES:
        where = f"generate.{engine}" if engine != "transformers" else "the keys of generate"
        yield at("generate.args", f"{engine} is no plug-in and takes no args", where, key=True)


@rule("prompts.use", "eval.use")
def known_sources(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Prompt sources by name are installed."""
    for name, use in (("prompts", config.prompts.use), ("eval", config.eval.use if config.eval else None)):
        if use is not None and ":" not in use:
            known = installed_names("isft.prompts")
            expected = f"{one_of(known)}, or pkg.mod:factory" if known else "pkg.mod:factory"
            if use not in known:
                yield at(f"{name}.use", f"there is no prompt source named {show(use)}", expected, nearest(use, known))


@rule("generate.do_sample", "generate.samples_per_prompt", "generate.temperature", "generate.from", "rounds")
def greedy_draws_once(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Greedy decoding gives the same completion each time."""
    g: Any = config.generate
    models = len(g.from_) if isinstance(g.from_, list) else 1
    for r in rounds_of(config, g.do_sample, g.samples_per_prompt, g.temperature):
        sampled, wanted, heat = (value_in(v, r) for v in (g.do_sample, g.samples_per_prompt, g.temperature))
        when = in_round(config, r, g.do_sample, g.samples_per_prompt, g.temperature)
        if not sampled and wanted > models:
            written = "samples_per_prompt" if "samples_per_prompt" in g.model_fields_set else "do_sample"
            what = f"greedy decoding gives the same completion {wanted} times{when}"
            yield at(f"generate.{written}", what, "samples_per_prompt: 1, or do_sample: true")
            return
        if sampled and heat == 0:
            yield at(
                "generate.temperature",
                f"0 cannot be sampled with{when}",
                "more than 0, or do_sample: false for greedy decoding",
            )
            return


@rule("generate.from", "rounds")
def generate_from(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Weights to generate with exist, and shares add up."""
    for value in values_over(config, config.generate.from_):
        names: list[tuple[tuple[Step, ...], str]] = [(("generate", "from"), value)] if isinstance(value, str) else []
        if isinstance(value, list):
            names = [(("generate", "from", i, "model"), one.model) for i, one in enumerate(value)]
            total = sum(one.share for one in value)
            if abs(total - 1) > 1e-6:
                yield at("generate.from", f"the shares add up to {total:g}", "1")
        for path, name in names:
            if name == "best" and config.eval is None:
                yield Finding(path, "without `eval` no round is best", "an eval section, or current or base")
            if name == "warmup" and config.warmup is None:
                yield Finding(path, "there is no warm-up", "a warmup section, or current or base")


@rule("generate.until_accepted", "generate.wave_size", "generate.samples_per_prompt", "filters", "rounds")
def until_accepted(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Stopping early needs verdicts that later samples do not change."""
    until: Any = config.generate.until_accepted
    wanted: Any = config.generate.samples_per_prompt
    if until is None:
        if config.generate.wave_size is not None:
            yield at(
                "generate.wave_size", "without until_accepted there are no waves", "generate.until_accepted beside it"
            )
        return
    for r in rounds_of(config, until, wanted):
        least, most = value_in(until, r), value_in(wanted, r)
        if least is not None and least > most:
            what = f"{least} can never be accepted of {most} samples{in_round(config, r, until, wanted)}"
            yield at("generate.until_accepted", what, "at most generate.samples_per_prompt")
            break
    for entry in config.filters:
        scope = entry.args.get("scope", "prompt" if entry.use == "dedup" else None)
        if entry.use in ROUND_WIDE and not (entry.use == "dedup" and scope == "prompt"):
            what = f"{entry.use} ({entry.key}) decides over samples that are not drawn yet"
            yield at("generate.until_accepted", what, "only filters whose verdict later samples cannot change")
            return


@rule("rationalize", "prompts.answer")
def hint_has_answer(config: Config, base_dir: Path) -> Iterator[Finding]:
    """A hint shows the answer."""
    if config.rationalize is None:
        return
    if "{answer}" not in config.rationalize.template:
        yield at("rationalize.template", "the hint does not show the answer", "a text with {answer} in it")
    elif not has_answers(config.prompts):
        yield at(
            "rationalize.template", "the prompts have no answer to show", "prompts.answer: the column with the answer"
        )


# --- filters ---------------------------------------------------------------------------------------------------------


@rule("filters")
def distinct_names(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Scores go by name."""
    seen: dict[str, str] = {}
    for index, entry in enumerate(config.filters):
        if entry.name in seen:
            yield Finding(
                ("filters", index, "name"), f"{show(entry.name)} is also the name of {seen[entry.name]}", "another name"
            )
        seen.setdefault(entry.name, entry.key)


@rule("filters", "prompts.answer")
def answers_for_filters(config: Config, base_dir: Path) -> Iterator[Finding]:
    """What compares with the answer needs one."""
    for index, entry in enumerate(config.filters):
        if entry.use in ANSWER_FILTERS and not has_answers(config.prompts):
            expected = "prompts.answer: the column with the reference answer"
            yield Finding(
                ("filters", index), f"{entry.use} compares with an answer, and the prompts have none", expected
            )


@rule("filters", "train.weight_by", "train.passes", "rounds")
def scores_exist(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Expressions read scores that a filter gives."""
    names = [entry.name for entry in config.filters]
    places: list[tuple[tuple[Step, ...], Any]] = [(("train", "weight_by"), config.train.weight_by)]
    places += [(("train", "passes", i, "by"), one.by) for i, one in enumerate(config.train.passes or [])]
    for path, value in places:
        for text in dict.fromkeys(values_over(config, value)):
            for name in Expression(text).names if text is not None else ():
                if name not in names:
                    expected = f"the name of a filter: {one_of(names)}" if names else "a filter that gives it"
                    yield Finding(path, f"no filter gives a score named {name}", expected, nearest(name, names))


# --- training --------------------------------------------------------------------------------------------------------


@rule("train.start_from", "train.optimizer_state", "rounds")
def start_exists(config: Config, base_dir: Path) -> Iterator[Finding]:
    """The weights that training starts from exist, and the optimizer's state fits them."""
    starts = values_over(config, config.train.start_from)
    if "best" in starts and config.eval is None:
        yield at("train.start_from", "without `eval` no round is best", "an eval section, or previous or base")
    if "warmup" in starts and config.warmup is None:
        yield at("train.start_from", "there is no warm-up to start from", "a warmup section, or base")
    if config.train.optimizer_state == "keep" and any(start != "previous" for start in starts):
        other = next(start for start in starts if start != "previous")
        yield at(
            "train.optimizer_state",
            f"moments of other weights do not fit a start from {other}",
            "fresh, or start_from: previous",
        )


@rule("train.epochs", "train.steps", "train.lr_schedule", "train.passes", "warmup.epochs", "warmup.steps")
def one_length(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Training is measured in epochs or in steps."""
    sections: list[tuple[str, Any]] = [("train", config.train), ("warmup", config.warmup)]
    sections += [(f"train.passes[{i}]", one) for i, one in enumerate(config.train.passes or [])]
    for name, section in sections:
        if section is not None and section.epochs is not None and section.steps is not None:
            yield at(f"{name}.steps", "steps and epochs are both set", "exactly one of them", key=True)
    if config.train.lr_schedule == "continue" and config.train.steps is None:
        yield at(
            "train.lr_schedule", "one shape over all rounds needs to know their steps", "train.steps instead of epochs"
        )


@rule("train.objective", "generate.keep_logprobs")
def objective_fits(config: Config, base_dir: Path) -> Iterator[Finding]:
    """The objective is known and gets what it reads."""
    yield from _known("train.objective", config.train.objective, "objective", OBJECTIVES, "isft.objectives")
    if config.train.objective == "iw" and not config.generate.keep_logprobs:
        yield at(
            "train.objective", "iw compares with the log probabilities at generation", "generate.keep_logprobs: true"
        )


@rule("train.passes")
def passes_have_thresholds(config: Config, base_dir: Path) -> Iterator[Finding]:
    """A threshold is compared with something."""
    for i, one in enumerate(config.train.passes or []):
        if one.threshold is not None and one.by is None:
            yield at(f"train.passes[{i}].threshold", "nothing is compared with it", "by: the name of a score", key=True)
    if config.train.passes == []:
        yield at("train.passes", "the list is empty", "at least one pass, or null")


# --- evaluation and the rest -----------------------------------------------------------------------------------------


@rule("eval.correct", "filters")
def eval_can_judge(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Evaluation knows what is correct."""
    if config.eval is None:
        return
    names = [entry.name for entry in config.filters]
    if config.eval.correct is None:
        if not names:
            yield at(
                "eval",
                "nothing says which answers are correct: there are no filters",
                "a filter such as numeric_answer",
                key=True,
            )
        return
    if not config.eval.correct:
        yield at("eval.correct", "no filter is named", "the names of filters, or null for all verifiers")
    for index, name in enumerate(config.eval.correct):
        if name not in names:
            expected = one_of(names) if names else "the name of a filter"
            yield Finding(
                ("eval", "correct", index), f"there is no filter named {show(name)}", expected, nearest(name, names)
            )


@rule("eval.samples_per_prompt", "eval.k", "eval.metric", "eval.greedy")
def eval_draws_enough(config: Config, base_dir: Path) -> Iterator[Finding]:
    """k samples are needed for pass@k."""
    if config.eval is None:
        return
    section = config.eval
    needed = int(section.metric.partition("@")[2] or 0)
    for name, largest in (("k", max(k for k in section.k)), ("metric", needed)):
        if largest > section.samples_per_prompt and (name == "metric" or largest != needed):
            what = f"pass@{largest}" if name == "k" else section.metric
            what += f" cannot be told from {section.samples_per_prompt} samples of a prompt"
            yield at(f"eval.{name}", what, f"at most eval.samples_per_prompt ({section.samples_per_prompt})")
    if section.metric == "greedy" and not section.greedy:
        yield at("eval.metric", "no greedy answers are made", "eval.greedy: true beside it")


@rule("eval.samples_per_prompt", "eval.do_sample", "eval.temperature", "generate.do_sample", "generate.temperature")
def eval_can_sample(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Several answers to a prompt need sampling."""
    if config.eval is None:
        return
    section, decoding = config.eval, config.eval_decoding()
    if not decoding.do_sample and section.samples_per_prompt > 1:
        what = f"greedy decoding gives the same completion {section.samples_per_prompt} times"
        yield at("eval.samples_per_prompt", what, "1, or eval.do_sample: true")
    elif decoding.do_sample and decoding.temperature == 0:
        yield at(
            "eval.temperature", "0 cannot be sampled with", "more than 0, or eval.do_sample: false for greedy decoding"
        )


@rule("tracking")
def known_trackers(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Trackers are those of accelerate."""
    for index, name in enumerate(config.tracking):
        if name not in TRACKERS:
            yield Finding(
                ("tracking", index),
                f"there is no tracker named {show(name)}",
                one_of(TRACKERS),
                nearest(name, TRACKERS),
            )


@rule("rounds")
def schedules_reach(config: Config, base_dir: Path) -> Iterator[Finding]:
    """A list by rounds names a value for each, and every value that a schedule reaches is allowed."""
    found = list(_schedules(config, ()))
    for path, schedule in found:
        if schedule.kind == "by_round" and len(schedule.values) < config.rounds:
            what = f"{len(schedule.values)} values for {config.rounds} rounds"
            yield Finding((*path, "by_round"), what, f"at least {config.rounds}; repeat the last one to hold it")
    if not found:
        return
    last = min(config.rounds, 10**6)
    try:
        Config.model_validate(config.at_round(last).model_dump(by_alias=True))
    except ValidationError as error:
        for one in error.errors(include_url=False):
            loc = path_of(one["loc"])
            what, expected, _, inner, _ = explain(one)
            yield Finding((*loc, *inner), f"{what} in round {last}", expected)


def _schedules(value: Any, path: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], Schedule]]:
    if isinstance(value, Schedule):
        yield path, value
    elif isinstance(value, Section):
        for name, field in type(value).model_fields.items():
            yield from _schedules(getattr(value, name), (*path, field.alias or name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _schedules(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _schedules(item, (*path, index))


def schedules(config: Config) -> list[tuple[str, Schedule]]:
    """Every schedule of a config with its dotted path, for plans and reports."""
    return [(dotted(path), schedule) for path, schedule in _schedules(config, ())]


@rule("samples.keep", "train.data", "rounds")
def dropped_samples_are_not_trained_on(config: Config, base_dir: Path) -> Iterator[Finding]:
    """`samples.keep: n` leaves what training still reads, also when a start falls back by one checkpoint."""
    keep = config.samples.keep
    if isinstance(keep, str):
        return
    for index, data in enumerate(values_over(config, config.train.data), start=1):
        window = 1 if data == "replace" else config.rounds if data == "accumulate" else int(data.window)
        if min(window, config.rounds) > keep:
            reads = "all rounds" if data == "accumulate" else f"the newest {window} rounds"
            what = f"train.data reads the samples of {reads}{in_round(config, index, config.train.data)}, {keep} stay"
            yield at("samples.keep", what, "accepted, or at least as many rounds as train.data reads")
            return
