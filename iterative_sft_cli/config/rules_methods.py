"""Rules about keys that published methods need: budgets, second tries, shares, forms, conditions; registered by being imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iterative_sft_cli.config.condition import Condition
from iterative_sft_cli.config.findings import nearest, one_of, show
from iterative_sft_cli.config.rules import Finding, at, in_round, rounds_of, rule, value_in, values_over
from iterative_sft_cli.config.rules_rounds import ROUND_WIDE
from iterative_sft_cli.config.schema import Config, FilterEntry

MIN_VOTES = 3
"""Votes below which a majority says nothing; the default of `majority`'s `min_votes`."""


def _needs_whole_group(entry: FilterEntry) -> bool:
    """Whether a built-in's verdict on a sample can change when more samples come."""
    if entry.use == "dedup":
        return bool(entry.args.get("scope", "prompt") != "prompt" or entry.args.get("tie", "first") != "first")
    return entry.use in ROUND_WIDE


@rule(
    "generate.until_total",
    "generate.until_accepted",
    "generate.budget",
    "generate.samples_per_prompt",
    "filters",
    "rounds",
)
def one_budget(config: Config, base_dir: Path) -> Iterator[Finding]:
    """A round's samples are bounded in one way, and by verdicts that stand."""
    section: Any = config.generate
    budget = section.budget
    if section.until_total is not None and (section.until_accepted is not None or budget is not None):
        other = "until_accepted" if section.until_accepted is not None else "budget"
        yield at("generate.until_total", f"{other} bounds the samples too", "exactly one of them", key=True)
        return
    if budget is not None and budget.kind == "prop_difficulty" and section.until_accepted is None:
        yield at(
            "generate.budget.kind",
            "nothing says how many accepted samples the hardest prompts are to get",
            "generate.until_accepted beside it",
        )
    if budget is not None and budget.kind == "gvm" and section.until_accepted is not None:
        yield at("generate.until_accepted", "gvm fixes the number of samples itself", "no until_accepted", key=True)
    if budget is not None and budget.kind == "prop_difficulty":
        for r in rounds_of(config, section.samples_per_prompt):
            most = value_in(section.samples_per_prompt, r)
            if budget.pilot > most:
                what = f"{budget.pilot} are more than the {most} samples of a prompt{in_round(config, r, section.samples_per_prompt)}"
                yield at("generate.budget.pilot", what, f"at most {most}")
                break
    if budget is None and section.until_total is None:
        return
    path = "generate.budget" if budget is not None else "generate.until_total"
    for entry in config.filters:
        if _needs_whole_group(entry):
            what = f"{entry.use} ({entry.key}) decides over samples that are not drawn yet"
            yield at(path, what, "only filters whose verdict later samples cannot change")
            return


@rule("generate.search", "generate.do_sample", "filters")
def search_has_a_choice(config: Config, base_dir: Path) -> Iterator[Finding]:
    """A search tries something, on filters that are there."""
    search = config.generate.search
    if search is None:
        return
    if not search.temperature and not search.min:
        yield at("generate.search", "there is nothing to try", "temperature, min or both: lists of values", key=True)
    if search.temperature and not all(values_over(config, config.generate.do_sample)):
        yield at("generate.search.temperature", "greedy decoding has no temperature", "generate.do_sample: true")
    thresholds = [entry.name for entry in config.filters if entry.use == "threshold"]
    if search.min and search.filter not in thresholds:
        what = f"there is no threshold named {show(search.filter)}"
        expected = one_of(thresholds) if thresholds else "a filter threshold: {by: ..., min: 0}"
        yield at("generate.search.filter", what, expected, nearest(search.filter, thresholds))


@rule("rationalize", "generate.do_sample", "rounds")
def second_try_differs(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Greedy second tries of one prompt are all the same."""
    section: Any = config.rationalize
    if section is None:
        return
    for r in rounds_of(config, section.samples_per_prompt, config.generate.do_sample):
        if not value_in(config.generate.do_sample, r) and value_in(section.samples_per_prompt, r) > 1:
            yield at("rationalize.samples_per_prompt", "greedy decoding gives the same completion each time", "1")
            return


@rule("prompts.curriculum", "prompts.advance", "prompts.order", "rounds")
def order_has_its_keys(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Keys of one order do nothing under another."""
    orders = values_over(config, config.prompts.order)
    if config.prompts.curriculum is not None and "curriculum" not in orders:
        yield at("prompts.curriculum", f"order: {orders[0]} has no levels", "prompts.order: curriculum", key=True)
    if config.prompts.advance is not None and "adaptive" not in orders:
        yield at("prompts.advance", f"order: {orders[0]} keeps no places", "prompts.order: adaptive", key=True)
    if config.prompts.advance is not None:
        from iterative_sft_cli.config.expression import Expression

        names = [name for name in Expression(config.prompts.advance).names if name != "accept_rate"]
        if names:
            yield at("prompts.advance", f"{names[0]} is not known there", "accept_rate")


@rule("train.mix", "train.new_share", "rounds")
def shares_are_said_once(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Seed data has a share of its own, or a weight beside earlier rounds."""
    mix: Any = config.train.mix
    shared = any(value is not None for value in values_over(config, config.train.new_share))
    if shared and mix is not None and any(value != "all" for value in values_over(config, mix.share)):
        yield at("train.mix.share", "new_share shares the rows out already, by mix.weight", "all")
    if not shared and mix is not None and mix.weight != 1.0:
        yield at("train.mix.weight", "nothing reads it without train.new_share", "train.mix.share instead", key=True)


@rule("train.objective", "train.mix", "train.formats", "generate.stop")
def iw_knows_every_token(config: Config, base_dir: Path) -> Iterator[Finding]:
    """Importance weights need the log probability of each trained token when it was made."""
    if config.train.objective != "iw":
        return
    for path, used, what in (
        ("train.mix", config.train.mix, "seed data was not made by the model, so it has no log probabilities"),
        ("train.formats", config.train.formats, "a rewritten sample has other tokens than those that were made"),
        ("generate.stop", config.generate.stop, "the end token that is trained behind a stop text was not sampled"),
    ):
        if used:
            yield at(path, f"objective iw: {what}", "another objective", key=True)


@rule("train.formats")
def forms_have_a_list(config: Config, base_dir: Path) -> Iterator[Finding]:
    """An empty list of forms would train on nothing."""
    if config.train.formats == []:
        yield at("train.formats", "the list is empty", "at least one form, or null")


@rule("filters", "generate.samples_per_prompt", "rounds")
def votes_are_enough(config: Config, base_dir: Path) -> Iterator[Finding]:
    """A majority needs voters."""
    for index, entry in enumerate(config.filters):
        if entry.use != "majority":
            continue
        wanted = entry.args.get("min_votes", MIN_VOTES)
        fewest = min(values_over(config, config.generate.samples_per_prompt))
        if isinstance(wanted, int) and fewest < wanted:
            what = f"{fewest} samples a prompt can never give {wanted} votes"
            yield Finding(
                ("filters", index), what, f"generate.samples_per_prompt of at least {wanted}, or a smaller min_votes"
            )


@rule("guards.rollback_if", "guards.stop_if", "eval", "checkpoints.keep_best", "prompts.curriculum")
def conditions_can_be_told(config: Config, base_dir: Path) -> Iterator[Finding]:
    """A condition reads figures that this config makes, and a roll-back has somewhere to go."""
    if config.guards.rollback_if is not None and config.eval is None:
        yield at("guards.rollback_if", "without `eval` no round is best", "an eval section", key=True)
    elif config.guards.rollback_if is not None and not config.checkpoints.keep_best:
        yield at("guards.rollback_if", "the best checkpoint is not kept", "checkpoints.keep_best: true", key=True)
    conditions = [("guards.stop_if", config.guards.stop_if), ("guards.rollback_if", config.guards.rollback_if)]
    if config.prompts.curriculum is not None:
        conditions.append(("prompts.curriculum.promote_if", config.prompts.curriculum.promote_if))
    for path, text in conditions:
        for figure in Condition(text).figures if text is not None else ():
            if figure.startswith("eval/") and config.eval is None and path != "guards.rollback_if":
                yield at(path, f"without `eval` there is no {figure}", "an eval section, or another figure")
            elif figure.startswith("rationalize/") and config.rationalize is None:
                yield at(path, f"without `rationalize` there is no {figure}", "another figure")


@rule("eval.rank_by", "filters")
def rank_by_is_a_score(config: Config, base_dir: Path) -> Iterator[Finding]:
    """best@k ranks by a score of the list."""
    if config.eval is None or config.eval.rank_by is None:
        return
    names = [entry.name for entry in config.filters]
    if config.eval.rank_by not in names:
        expected = one_of(names) if names else "the name of a filter"
        what = f"there is no filter named {show(config.eval.rank_by)}"
        yield at("eval.rank_by", what, expected, nearest(config.eval.rank_by, names))


@rule("eval.metric", "eval.rank_by")
def best_needs_a_rank(config: Config, base_dir: Path) -> Iterator[Finding]:
    """best@k without a score cannot be told."""
    if config.eval is not None and config.eval.metric.startswith("best@") and config.eval.rank_by is None:
        yield at("eval.metric", "nothing ranks the answers", "eval.rank_by: the name of a scorer, or pass@K")
