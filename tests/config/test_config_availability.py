from __future__ import annotations

from pathlib import Path

import pytest
from config_files import write

from iterative_sft_cli.config import InvalidConfig, availability, load_config
from iterative_sft_cli.config.availability import NOT_YET


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        availability,
        "NOT_YET",
        {
            "rationalize": "a second try",
            "generate.vllm": "servers",
            ("generate.engine", "vllm"): "servers",
            ("generate.from", list): "several models",
            ("train.start_from", "best"): "the best",
            "eval.lm_eval": "a harness",
            "generate.top_k": "top k",
        },
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rationalize={template: '{answer}'}", "rationalize: this key is not available yet (a second try)."),
        ("generate.vllm.max_model_len=3", "generate.vllm: this key is not available yet (servers)."),
        ("generate.engine=vllm", 'generate.engine: "vllm" is not available yet (servers).'),
        ("generate.from=[{model: base, share: 1}]", "generate.from: a list is not available yet (several models)."),
        (
            "train.start_from={by_round: [base, best, base]}",
            'train.start_from: "best" is not available yet (the best).',
        ),
        ("eval.lm_eval={tasks: x}", "eval.lm_eval: this key is not available yet (a harness)."),
        ("generate.top_k={linear: [1, 5]}", "generate.top_k: this key is not available yet (top k)."),
    ],
)
def test_what_is_not_available_is_refused_where_it_stands(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_config(write(tmp_path), [override])
    assert caught.value.problems == [f"command line: {said}"]


@pytest.mark.parametrize(
    "override", ["rationalize=none", "generate.vllm={}", "generate.top_k=0", "eval.lm_eval=null", "generate.from=base"]
)
def test_its_default_is_not(tmp_path: Path, override: str) -> None:
    load_config(write(tmp_path), [override])


def test_a_key_that_is_wrong_anyway_is_told_only_that(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_config(write(tmp_path), ["rationalize={template: hint}"])
    assert len(caught.value.problems) == 1 and "{answer}" in caught.value.problems[0]


def test_the_short_form_of_the_design_needs_nothing_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(availability, "NOT_YET", NOT_YET)
    load_config(write(tmp_path))
