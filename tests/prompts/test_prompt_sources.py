from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from iterative_sft_cli.errors import ConfigError, DataError, PluginError
from iterative_sft_cli.prompts import load_prompts


def section(**settings: Any) -> SimpleNamespace:
    blank = dict(path=None, dataset=None, reasoning_gym=None, use=None, args={}, limit=None)
    columns = dict(prompt="prompt", answer=None, id=None, level=None)
    return SimpleNamespace(**{**blank, **columns, **settings})


def gym(task: str = "chain_sum", size: int = 4, seed: int = 0, **args: Any) -> SimpleNamespace:
    return SimpleNamespace(task=task, size=size, seed=seed, args=args)


# -- reasoning-gym


def test_gym_rows_are_what_the_verifier_scores_with() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    found = load_prompts(section(reasoning_gym=gym(min_terms=2, max_terms=2)), base_dir=Path("."))
    assert [p.prompt_id for p in found.prompts] == ["0", "1", "2", "3"]
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    for prompt in found.prompts:
        assert prompt.prompt == prompt.row["question"]
        assert score(prompt.answer, json.loads(json.dumps(prompt.row))) == 1.0
        assert score("wrong", dict(prompt.row)) < 1.0
    again = load_prompts(section(reasoning_gym=gym(min_terms=2, max_terms=2)), base_dir=Path("."))
    assert again.sha256 == found.sha256
    assert len(load_prompts(section(reasoning_gym=gym(), limit=2), base_dir=Path(".")).prompts) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (gym("chain_sun"), "no task 'chain_sun'\nhint: did you mean chain_sum"),
        (gym(min_term=2), "no argument 'min_term'\nhint: did you mean min_terms"),
        (gym(min_terms=5, max_terms=2), "refuses its arguments"),
    ],
)
def test_gym_arguments_are_checked(source: Any, message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match=message):
        load_prompts(section(reasoning_gym=source), base_dir=Path("."))


def test_gym_seeds_of_prompts_and_eval_must_not_meet() -> None:
    pytest.importorskip("reasoning_gym")
    trained = section(reasoning_gym=gym(size=100, seed=0))
    with pytest.raises(DataError, match="share seeds"):
        load_prompts(section(reasoning_gym=gym(size=10, seed=99)), base_dir=Path("."), inherit=trained)
    with pytest.raises(DataError, match="share seeds"):
        load_prompts(section(reasoning_gym=gym(size=10, seed=0)), base_dir=Path("."), inherit=trained)
    assert load_prompts(section(reasoning_gym=gym(size=10, seed=100)), base_dir=Path("."), inherit=trained).prompts
    below = section(reasoning_gym=gym(size=10, seed=200))
    assert load_prompts(section(reasoning_gym=gym(size=10, seed=0)), base_dir=Path("."), inherit=below).prompts
    other = section(reasoning_gym=gym("spell_backward", size=10))
    assert load_prompts(other, base_dir=Path("."), inherit=trained).prompts


def test_a_missing_gym_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"iterative-sft-cli\[gym\]"):
        load_prompts(section(reasoning_gym=gym()), base_dir=Path("."))


# -- data sets


def dataset(name: str, config: str | None = None, split: str = "train") -> SimpleNamespace:
    return SimpleNamespace(id=name, name=config, split=split, revision=None)


def test_a_folder_that_datasets_wrote(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"dev": data}).save_to_disk(str(tmp_path / "many"))
    for source in (dataset("one"), dataset("many", split="dev")):
        found = load_prompts(section(dataset=source, limit=1), base_dir=tmp_path)
        assert [dict(p.row) for p in found.prompts] == [{"prompt": "a", "n": 1}]
    with pytest.raises(DataError, match="no split 'train', expected dev"):
        load_prompts(section(dataset=dataset("many")), base_dir=tmp_path)


def test_a_hub_data_set_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise errors.pop()

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    errors: list[Exception] = [datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub.")]
    with pytest.raises(DataError, match=r"accept its terms at https://huggingface.co/datasets/a/b, then run"):
        load_prompts(section(dataset=dataset("a/b")), base_dir=tmp_path)
    errors = [ConnectionError("Couldn't reach 'a/b' on the Hub")]
    with pytest.raises(DataError, match="isft fetch"):
        load_prompts(section(dataset=dataset("a/b")), base_dir=tmp_path)
    errors = [ValueError("Unknown split \"trian\". Should be one of ['train', 'test'].")]
    with pytest.raises(DataError, match="Should be one of"):
        load_prompts(section(dataset=dataset("a/b")), base_dir=tmp_path)


# -- plug-ins

SOURCE = """
from iterative_sft_cli import errors
from iterative_sft_cli.types import Prompt

def rows(n=2):
    for i in range(n):
        yield {"prompt": f"p{i}", "pair": (1, 2)}

def texts():
    return ["a", "b"]

def prompts():
    return [Prompt("x", "a", answer="1", row={"more": 2})]

def broken():
    yield {"prompt": "a"}
    raise RuntimeError("no more")

def numbers():
    return [1]

constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "isft_test_prompts_pkg.py").write_text(SOURCE)
    (tmp_path / "halfway.py").write_text("import there_is_no_such_thing\n")
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    return tmp_path


@pytest.mark.parametrize("target", ["mine.py", "isft_test_prompts_pkg"])
def test_factories_yield_rows_texts_or_prompts(folder: Path, target: str) -> None:
    def load(attr: str, **settings: Any) -> list[Any]:
        return load_prompts(section(use=f"{target}:{attr}", **settings), base_dir=folder).prompts

    before = list(sys.path)
    assert [p.prompt for p in load("rows", args={"n": 3})] == ["p0", "p1", "p2"]
    assert load("rows")[0].row == {"prompt": "p0", "pair": [1, 2]}
    assert [p.prompt for p in load("texts", limit=1)] == ["a"]
    one = load("prompts", id="prompt_id", answer=SimpleNamespace(column="answer", pattern=None))[0]
    assert (one.prompt_id, one.prompt, one.answer, one.row["more"]) == ("x", "a", "1", 2)
    assert sys.path == before


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        ("mine.py:row", ConfigError, "no attribute `row`. Did you mean `rows`"),
        ("none.py:rows", ConfigError, "no such file"),
        ("isft_no_such_module:rows", ConfigError, "there is no module `isft_no_such_module`"),
        (
            "halfway.py:rows",
            PluginError,
            "inside the import of .*halfway.py: .* No module named 'there_is_no_such_thing'",
        ),
        ("halfway:rows", PluginError, "inside the import of halfway: .* No module named 'there_is_no_such_thing'"),
        ("wrong.py:rows", PluginError, "inside the import of .*wrong.py: ZeroDivisionError"),
        ("mine.py:constant", ConfigError, "is a int, expected something to call"),
        ("mine.py:broken", PluginError, "raised RuntimeError: no more"),
        ("mine.py:numbers", PluginError, "yielded a int"),
        ("no_such_name", ConfigError, "there is no prompt source 'no_such_name'"),
    ],
)
def test_what_is_wrong_with_a_factory_is_said(folder: Path, use: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_prompts(section(use=use), base_dir=folder)


def test_wrong_arguments_are_the_plug_ins_own_error(folder: Path) -> None:
    with pytest.raises(PluginError, match="are its `args` right"):
        load_prompts(section(use="mine.py:rows", args={"m": 3}), base_dir=folder)


def test_entry_points_have_short_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[Any]:
        assert group == "isft.prompts"
        return [
            metadata.EntryPoint("texts", "isft_test_prompts_pkg:texts", group),
            metadata.EntryPoint("twice", "a:b", group),
            metadata.EntryPoint("twice", "c:d", group),
        ]

    monkeypatch.setattr(metadata, "entry_points", points)
    assert [p.prompt for p in load_prompts(section(use="texts"), base_dir=folder).prompts] == ["a", "b"]
    with pytest.raises(ConfigError, match="several packages: a:b, c:d"):
        load_prompts(section(use="twice"), base_dir=folder)
    with pytest.raises(ConfigError, match="Did you mean `texts`"):
        load_prompts(section(use="text"), base_dir=folder)
