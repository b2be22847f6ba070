"""Every block of the README does what it says: its config trains, its commands run in their order, its files are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from iterative_sft_cli.cli import run as isft
from iterative_sft_cli.console import COLUMNS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
TOY = ROOT / "tests" / "toy_backend.py"


def fenced(language):
    """The fenced blocks of a language, in order; '' for those of none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [text for name, text in blocks if name == language]


def indented():
    """The blocks of code that are moved to the right."""
    outside = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    return re.findall(r"(?:^    .*\n)(?:^    .*\n|^\n(?=    ))*", outside, re.MULTILINE)


def commands():
    """Every `isft` command of the blocks, in order."""
    lines = [line.strip().split("  #")[0].strip() for block in indented() for line in block.splitlines()]
    return [line for line in lines if line.startswith("isft ")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the README's config (on the toy model), its filter, and data."""
    [config] = [block for block in fenced("yaml") if "output_dir" in block]
    assert yaml.safe_load(config)["model"]
    (tmp_path / "addition.yaml").write_text(
        re.sub(r"^model: .*$", f"model: {{use: '{TOY}:make'}}", config, flags=re.MULTILINE)
    )
    for name, numbers in {"prompts.jsonl": range(12), "dev.jsonl": range(20, 26)}.items():
        rows = [{"question": f"{n}+1", "answer": str(n + 1)} for n in numbers]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_in_their_order(place, capsys):
    mine = [line for line in commands() if "addition.yaml" in line]
    assert [line.split()[1] for line in mine] == ["validate", "plan", "train", "train"]
    for line in mine:
        assert isft(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert (place / "runs" / "addition" / "checkpoints" / "0003").is_dir()
    assert (place / "runs" / "addition-limit8" / "outcome.json").is_file()
    [tree] = [block for block in fenced("") if block.startswith("runs/addition/")]
    for line in tree.splitlines()[1:]:
        for name in re.findall(r"^  (\S+)(?:  (\S+\.\w+))?", line)[0]:
            assert (
                not name
                or (place / "runs" / "addition" / name.replace("checkpoints/0001", "checkpoints/0003")).exists()
            ), name
    for line in re.findall(r"`(isft [^`]+)`", TEXT):
        words = shlex.split(line)[1:]
        if words[0] in ("init", "docs") or words[:2] == ["filters", "list"]:
            assert isft(words) == 0, line


def test_the_filter_does_what_it_says(place, capsys):
    [code] = [block for block in fenced("python") if "def short_answer" in block]
    (place / "mine.py").write_text(code)
    rows = [{"completion": "four"}, {"completion": "word " * 13}]
    (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert isft(["filters", "test", "mine.py:short_answer", "samples.jsonl", "--json"]) == 0
    assert [row["keep"] for row in json.loads(capsys.readouterr().out)["rows"]] == [True, False]
    assert isft(["train", "addition.yaml", "filters=[mine.py:short_answer, numeric_answer]", "rounds=1"]) == 0


def test_the_python_runs(place, capsys):
    [code] = [block for block in fenced("python") if "run_experiment" in block]
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  (the README itself)
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_scripts_and_extras_exist_and_the_table_is_the_consoles():
    for name in re.findall(r"\bscripts/([\w-]+)", TEXT):
        assert (ROOT / "scripts" / name).is_file(), name
    known = (ROOT / "pyproject.toml").read_text()
    for group in re.findall(r"\[([a-z]+(?:,[a-z]+)+)\]'", TEXT):
        for extra in group.split(","):
            assert re.search(rf"^{extra} = \[", known, re.MULTILINE), extra
    [table] = [block for block in indented() if "best checkpoint" in block]
    names = [name for name, _, _ in COLUMNS]
    assert table.split("\n")[0].split()[: len(names)] == names
