from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.prompts import PromptHistory, needs_history, num_per_round, select_round
from iterative_sft_cli.types import Prompt

PROMPTS = [Prompt(str(i), f"p{i}", level=f"Level {10 - i}") for i in range(10)]


def section(**settings: Any) -> SimpleNamespace:
    skip = SimpleNamespace(solved_at_least=None, solved_at_most=None)
    return SimpleNamespace(**{**dict(per_round="all", order="shuffle", skip=skip), **settings})


def pick(
    round_index: int, history: dict[str, PromptHistory] | None = None, seed: int = 0, **settings: Any
) -> list[int]:
    chosen = select_round(PROMPTS, section(**settings), round_index=round_index, seed=seed, history=history or {})
    return [int(prompt.prompt_id) for prompt in chosen]


def walk(rounds: int, **settings: Any) -> list[list[int]]:
    """Rounds after one another, each knowing of those before."""
    history: dict[str, PromptHistory] = {}
    taken = []
    for round_index in range(1, rounds + 1):
        taken.append(pick(round_index, history, **settings))
        for number in taken[-1]:
            history[str(number)] = PromptHistory(4, 2, round_index, 0.5)
    return taken


@pytest.mark.parametrize(
    ("setting", "count"), [("all", 10), (3, 3), (1, 1), (1.0, 10), (0.25, 2), (0.01, 1), (50, 10), (16.0, 10)]
)
def test_per_round(setting: Any, count: int) -> None:
    assert num_per_round(setting, 10) == count
    assert len(pick(1, per_round=setting)) == count


def test_shuffle_depends_on_seed_and_round_alone() -> None:
    assert pick(1) == pick(1)
    assert sorted(pick(1)) == list(range(10))
    assert len({tuple(pick(r, seed=s)) for r in (1, 2) for s in (0, 1)}) == 4


def test_shuffle_asks_every_prompt_once_before_any_twice() -> None:
    first, second, third = walk(3, per_round=4)
    assert len({*first, *second}) == 8
    assert {*range(10)} - {*first, *second} <= {*third}
    assert walk(3, per_round=4) == [first, second, third]


def test_sequential_walks_through_the_data_and_wraps() -> None:
    assert walk(4, per_round=4, order="sequential") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5]]
    assert pick(2, per_round=4, order="sequential") == [4, 5, 6, 7]
    assert pick(3, per_round=4, order="sequential") == [8, 9, 0, 1]


def test_curriculum_is_easiest_first_and_grows() -> None:
    assert pick(1, per_round=3, order="curriculum") == [9, 8, 7]
    assert pick(5, per_round=5, order="curriculum") == [9, 8, 7, 6, 5]


def test_curriculum_sorts_numbers_and_texts_and_needs_a_level() -> None:
    def order(levels: list[Any]) -> list[Any]:
        prompts = [Prompt(str(i), "p", level=level) for i, level in enumerate(levels)]
        settings = section(order="curriculum")
        return [p.level for p in select_round(prompts, settings, round_index=1, seed=0, history={})]

    assert order([10, 9.5, "2"]) == ["2", 9.5, 10]
    assert order(["Level 10", "Level 2", "Level 1"]) == ["Level 1", "Level 2", "Level 10"]
    assert order(["hard", 1]) == [1, "hard"]
    with pytest.raises(DataError, match="has no level"):
        order([1, None])


def test_a_curriculum_can_be_a_window_that_moves_up() -> None:
    prompts = [Prompt(str(i), "p", level=i % 5) for i in range(10)]

    def levels(round_index: int, **window: Any) -> list[Any]:
        curriculum = SimpleNamespace(**{**dict(start=1, step=1.0, width=None, promote_if=None), **window})
        settings = section(order="curriculum", curriculum=curriculum)
        return [p.level for p in select_round(prompts, settings, round_index=round_index, seed=0, history={})]

    assert levels(1) == [0, 0, 1, 1]
    assert levels(2) == [0, 0, 1, 1, 2, 2]
    assert levels(2, width=1) == [2, 2]
    assert levels(3, width=2, step=0.5) == [1, 1, 2, 2]
    assert levels(9, width=1) == []
    texts = [Prompt("0", "p", level="easy")]
    with pytest.raises(DataError, match="expected a number"):
        settings = section(order="curriculum", curriculum=SimpleNamespace(start=1, step=1.0, width=None))
        select_round(texts, settings, round_index=1, seed=0, history={})


def test_adaptive_is_least_recent_then_hardest() -> None:
    history = {str(i): PromptHistory(4, 0, 1 if i > 6 else 2, i / 10) for i in range(1, 10)}
    assert pick(3, history, order="adaptive") == [0, 7, 8, 9, 1, 2, 3, 4, 5, 6]
    assert needs_history(section(order="adaptive"))


def test_hardest_first_takes_the_lowest_rate_and_unasked_ones_before() -> None:
    history = {str(i): PromptHistory(4, i, 1, i / 10) for i in range(2, 10)}
    assert sorted(pick(2, history, per_round=2, order="hardest_first")) == [0, 1]
    assert pick(2, history, order="hardest_first")[2:] == [2, 3, 4, 5, 6, 7, 8, 9]


def test_skip_leaves_out_what_is_solved_or_hopeless() -> None:
    history = {"0": PromptHistory(4, 4, 1, 1.0), "1": PromptHistory(4, 0, 1, 0.0), "2": PromptHistory(8, 4, 2, 0.5)}
    solved = SimpleNamespace(solved_at_least=1.0, solved_at_most=None)
    hopeless = SimpleNamespace(solved_at_least=None, solved_at_most=0.0)
    assert sorted(pick(2, history, skip=solved)) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert sorted(pick(2, history, skip=hopeless)) == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    everything = {p.prompt_id: PromptHistory(4, 4, 1, 1.0) for p in PROMPTS}
    assert pick(2, everything, skip=solved) == []
    assert pick(2, everything, skip=solved, order="sequential") == []


def test_the_rate_that_counts_is_the_last_one() -> None:
    history = {"0": PromptHistory(100, 0, 3, 1.0)}
    assert 0 not in pick(4, history, skip=SimpleNamespace(solved_at_least=1.0, solved_at_most=None))


def test_history_is_asked_for_only_where_it_is_read() -> None:
    skip = SimpleNamespace(solved_at_least=0.9, solved_at_most=None)
    assert not needs_history(section())
    assert not needs_history(section(order="curriculum", per_round=3))
    assert needs_history(section(skip=skip))
    assert needs_history(section(order="hardest_first"))
    assert needs_history(section(per_round=3))
    assert not needs_history(section(skip=None))
