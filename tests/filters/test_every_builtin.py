"""What holds for every built-in: documented, listed, scheduled where numeric, and known to the funnel."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from filter_samples import make_entries

from iterative_sft_cli.config.schedule import Schedule
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.filters import resolve_filters
from iterative_sft_cli.filters.builtin import NAMES, load_builtin
from iterative_sft_cli.filters.catalog import show_filter
from iterative_sft_cli.filters.contract import inspect_filter

DESIGN = """finished nonempty length length_vs_group regex contains exact_match numeric_answer math_verify reasoning_gym
json_schema language repetition dedup majority reward_model judge embedding_similarity perplexity code_tests threshold
top_k top_fraction random_k max_per_prompt drop_solved equations_valid not_in_eval best_of_n""".split()

# what each needs beside the argument under test
NEEDED: dict[str, dict[str, Any]] = {
    "best_of_n": {"by": "num_tokens"},
    "contains": {"text": "x"},
    "drop_solved": {"by": "num_tokens"},
    "embedding_similarity": {"path": "org/encoder"},
    "judge": {"base_url": "http://127.0.0.1:9/v1", "model": "m"},
    "json_schema": {"schema": {"type": "object"}},
    "language": {"languages": "en"},
    "length": {"min": 1},
    "length_vs_group": {"max_shorter": 9, "than": "median"},
    "perplexity": {"path": "org/model"},
    "regex": {"pattern": "x"},
    "reward_model": {"path": "org/reward"},
    "threshold": {"by": "num_tokens", "min": -1000},
    "top_k": {"by": "num_tokens"},
    "top_fraction": {"by": "num_tokens", "q": 0.5},
    "dedup": {"level": "near"},
    "balance": {},
}
# two values that are allowed, where 1 and 2 are not
VALUES: dict[tuple[str, str], tuple[float, float]] = {
    ("code_tests", "memory_mb"): (64, 128),
    ("code_tests", "min_passed"): (0.5, 1.0),
    ("dedup", "similarity"): (0.8, 0.9),
    ("majority", "min_agree"): (0.2, 0.6),
    ("top_fraction", "q"): (0.2, 0.6),
    ("language", "min_confidence"): (0.2, 0.6),
    ("not_in_eval", "overlap"): (0.2, 0.6),
    ("drop_solved", "at_least"): (0.2, 0.6),
    ("drop_solved", "at_most"): (0.2, 0.6),
    ("not_in_eval", "n"): (8, 13),
    ("repetition", "max_share"): (0.2, 0.6),
}


def numeric_arguments() -> list[tuple[str, str, bool]]:
    """(built-in, argument, whether it is whole) of every argument that takes a number."""
    found = []
    for name in NAMES:
        target, _ = load_builtin(name)
        shape = inspect_filter(target)
        for parameter in shape.parameters:
            words = parameter.annotation.split(" | ")
            if "int" in words or "float" in words:
                found.append((name, parameter.name, "int" in words and "float" not in words))
    return found


NUMERIC = numeric_arguments()


def resolve(name: str, args: dict[str, Any], tmp_path: Path) -> Any:
    return resolve_filters(make_entries({"use": name, "args": args}), base_dir=tmp_path)[0]


def test_the_built_ins_of_the_design_are_there() -> None:
    assert set(DESIGN) <= set(NAMES) and len(NAMES) >= 30
    assert len(NUMERIC) >= 35


@pytest.mark.parametrize(("name", "argument", "whole"), NUMERIC, ids=[f"{n}.{a}" for n, a, _ in NUMERIC])
def test_every_numeric_argument_takes_a_schedule(name: str, argument: str, whole: bool, tmp_path: Path) -> None:
    first, second = VALUES.get((name, argument), (1, 2))
    needed = {key: value for key, value in NEEDED.get(name, {}).items() if key != argument}
    try:
        one = resolve(name, {**needed, argument: {"by_round": [first, second]}}, tmp_path)
    except ConfigError as error:
        if any("it needs the library" in problem for problem in error.problems):
            pytest.skip("its library is not installed")
        raise
    assert isinstance(one.arguments[argument], Schedule)
    assert [one.at_round(r).arguments[argument] for r in (1, 2, 3)] == [first, second, second]
    if whole:
        ramp = resolve(name, {**needed, argument: {"linear": [first, first * 4], "span": 4}}, tmp_path)
        values = [ramp.at_round(r).arguments[argument] for r in (1, 2, 3, 4)]
        assert all(type(value) is int for value in values) and values[0] == first and values[-1] == first * 4
    with pytest.raises(ConfigError) as caught:
        resolve(name, {**needed, argument: {"by_round": [first, "high"]}}, tmp_path)
    assert argument in str(caught.value.problems)


@pytest.mark.parametrize("name", NAMES)
def test_every_built_in_is_documented(name: str, tmp_path: Path) -> None:
    target, spec = load_builtin(name)
    text = inspect.getdoc(target) or ""
    shape = inspect_filter(target)
    first = re.split(r"(?<=[.:])\s", text)[0]
    assert len(first) > 20 and re.match(r"(Keep|Drop|Score)", first), first
    # `drop` and `of` mean the same everywhere and stand in the page about filters
    common = {"drop", "of", "revision", "by"}
    undocumented = [p.name for p in shape.parameters if p.name not in common and not re.search(rf"\b{p.name}\b", text)]
    assert not undocumented, undocumented
    assert len(spec.cost) > 5
    shown = show_filter(name, base_dir=tmp_path)
    assert all(f"  {p.name}" in shown for p in shape.parameters) and f"cost: {spec.cost}" in shown
    reasons = set(re.findall(r'Verdict\(False, [^,]+, "([a-z_]+)"', inspect.getsource(inspect.getmodule(target))))
    reasons |= set(re.findall(r'decide\([^"]*"([a-z_]+)"', inspect.getsource(inspect.getmodule(target))))
    assert not [reason for reason in reasons if f"`{reason}`" not in text], (name, reasons)


def test_the_page_about_filters_names_every_built_in() -> None:
    from iterative_sft_cli.report.documents import page

    text = page("filters")
    assert not [name for name in NAMES if f"### `{name}`" not in text]
    assert "[[" not in text and "at_least" in text and "Cost: " in text
