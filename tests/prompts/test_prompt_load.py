from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.prompts import PromptSet, content_key, load_prompts
from iterative_sft_cli.types import Prompt


def section(**settings: Any) -> SimpleNamespace:
    blank = dict(path=None, dataset=None, reasoning_gym=None, use=None, args={}, limit=None)
    columns = dict(prompt="prompt", answer=None, id=None, level=None)
    return SimpleNamespace(**{**blank, **columns, **settings})


def column(name: str, pattern: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(column=name, pattern=pattern)


def load(folder: Path, rows: list[Any], **settings: Any) -> PromptSet:
    (folder / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return load_prompts(section(path="p.jsonl", **settings), base_dir=folder)


def test_columns_become_a_prompt_and_the_row_stays_whole(tmp_path: Path) -> None:
    row = {"key": 7, "q": "1 + 1?", "a": {"final": "2"}, "hard": "easy", "more": [1]}
    found = load(tmp_path, [row], prompt="q", answer=column("a.final"), id="key", level="hard")
    assert found.prompts == [Prompt("7", "1 + 1?", "2", "easy", row)]
    assert found.source == "p.jsonl"


def test_ids_are_row_numbers_unless_a_column_names_them(tmp_path: Path) -> None:
    assert [p.prompt_id for p in load(tmp_path, [{"prompt": "a"}, {"prompt": "a"}]).prompts] == ["0", "1"]


def test_a_column_with_a_dot_in_its_name_comes_before_a_nested_one(tmp_path: Path) -> None:
    assert load(tmp_path, [{"a.b": "x", "a": {"b": "y"}}], prompt="a.b").prompts[0].prompt == "x"


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("#### (.+)", "1,000 is not it\n#### 1,234,567 ", "1234567"),
        ("#### (.+)", "#### 1\n#### 2", "2"),
        ("#### (.+)", "#### 1,2", "1,2"),
        ("#### (.+)", "#### $3,000.50", "$3000.50"),
        (r"-?\d+", "from 3 to -4", "-4"),
        ("#### (.+)", "#### x, y", "x, y"),
    ],
)
def test_the_pattern_takes_its_group_of_the_last_match(tmp_path: Path, pattern: str, text: str, expected: str) -> None:
    found = load(tmp_path, [{"prompt": "p", "answer": text}], answer=column("answer", pattern))
    assert found.prompts[0].answer == expected
    assert found.prompts[0].row["answer"] == text


def test_chat_messages_are_a_prompt(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    assert load(tmp_path, [{"prompt": messages}]).prompts[0].prompt == messages


GOOD = {"prompt": "p", "answer": "x", "id": "1"}


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [GOOD],
            {"prompt": "prmpt"},
            r"p\.jsonl: no column 'prmpt'; the columns are prompt, answer, id\nhint: did you mean prompt",
        ),
        (
            [GOOD],
            {"prompt": "question"},
            r"the columns are prompt, answer, id\nhint: set `prompts.prompt` to one of them",
        ),
        ([GOOD], {"answer": column("answr")}, "did you mean answer"),
        ([GOOD], {"level": "lvl"}, "no column 'lvl'"),
        ([GOOD, {"prompt": " \n"}], {}, r"p\.jsonl:2: the prompt in 'prompt' is empty"),
        ([GOOD, {"prompt": 3}], {}, r"p\.jsonl:2: the prompt in 'prompt' is 3, expected a text"),
        ([GOOD, {"answer": "x"}], {}, r"p\.jsonl:2: no column 'prompt' in this row"),
        ([GOOD, {"prompt": "x"}], {"answer": column("answer")}, r"p\.jsonl:2: no column 'answer' in this row"),
        ([GOOD, {"prompt": [{"role": "user"}]}], {}, r"p\.jsonl:2: message 1 in 'prompt' is"),
        ([GOOD, {"prompt": [{"role": "system", "content": "x"}]}], {}, r"p\.jsonl:2: the prompt in 'prompt' is empty"),
        ([GOOD, {"prompt": []}], {}, r"p\.jsonl:2: the prompt in 'prompt' is \[\]"),
        ([GOOD, {**GOOD, "id": 1}], {"id": "id"}, r"p\.jsonl:2: the id '1' is also that of p\.jsonl:1"),
        ([GOOD, {**GOOD, "id": None}], {"id": "id"}, r"p\.jsonl:2: the id column 'id' holds null"),
        ([GOOD], {"answer": column("answer", "#### (.+)")}, r"p\.jsonl:1: the pattern .* does not match"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, rows: list[Any], settings: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, rows, **settings)


def test_a_pattern_that_is_none_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="regular expression"):
        load(tmp_path, [GOOD], answer=column("answer", "("))
    with pytest.raises(ConfigError, match="no source"):
        load_prompts(section(), base_dir=tmp_path)


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "x": 1}, {"prompt": "b", "x": 2}]
    one = load(tmp_path, rows).sha256
    (tmp_path / "q.json").write_text(json.dumps([{"x": 1, "prompt": "a"}, {"x": 2, "prompt": "b"}], indent=4))
    assert load_prompts(section(path="q.json"), base_dir=tmp_path).sha256 == one
    changed = [
        load(tmp_path, rows[::-1]).sha256,
        load(tmp_path, rows, limit=1).sha256,
        load(tmp_path, rows, answer=column("x")).sha256,
        load(tmp_path, [{"prompt": "a", "x": 1}, {"prompt": "b", "x": 3}]).sha256,
    ]
    assert len({one, *changed}) == 5


def test_an_eval_takes_the_columns_of_the_prompts(tmp_path: Path) -> None:
    trained = section(path="p.jsonl", prompt="q", answer=column("a"), id="key", level="hard")
    (tmp_path / "dev.jsonl").write_text('{"q": "x", "a": "1", "hard": 2}')
    held_out = section(path="dev.jsonl", prompt=None)
    assert load_prompts(held_out, base_dir=tmp_path, inherit=trained).prompts[0] == Prompt(
        "0", "x", "1", 2, {"q": "x", "a": "1", "hard": 2}
    )
    with pytest.raises(DataError, match=r"set `eval.prompt`"):
        load_prompts(section(path="dev.jsonl", prompt="missing"), base_dir=tmp_path, inherit=trained)


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        ("  What is\n 2+2? ", True),
        ([{"role": "user", "content": "What is 2+2?"}], True),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "What is 2+2?"}], True),
        ("What is 2+3?", False),
        ("what is 2+2?", False),
        ("What is 22?", False),
        ([{"role": "user", "content": "What is"}, {"role": "user", "content": "2+2?"}], False),
    ],
)
def test_content_is_the_same_whatever_the_white_space_and_system(other: Any, equal: bool) -> None:
    assert (content_key(Prompt("a", "What is 2+2?")) == content_key(Prompt("b", other))) is equal


def test_content_is_the_same_whatever_the_composition_but_not_the_exponent() -> None:
    assert content_key(Prompt("a", "caf\u00e9")) == content_key(Prompt("b", "cafe\u0301"))
    assert content_key(Prompt("a", "x²")) != content_key(Prompt("b", "x2"))


def test_prompts_import_no_torch() -> None:
    code = "import sys, iterative_sft_cli.prompts; sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
