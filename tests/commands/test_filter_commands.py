"""`isft filters`: listing, explaining and trying out, without a model."""

import json

from iterative_sft_cli.cli import run

MINE = "def short(sample, max_words: int = 3):\n    '''Keep short completions.'''\n    return len(sample.completion.split()) <= max_words\n"


def samples(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"completion": "one two", "answer": "2"}\n{"completion": "one two three four 2", "answer": "2"}\n')
    return str(path)


def test_list_names_every_builtin(capsys):
    assert run(["filters", "list", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert {"finished", "numeric_answer", "math_verify", "dedup", "majority", "code_tests", "reward_model"} <= names
    assert run(["filters", "list"]) == 0
    out = capsys.readouterr().out
    assert out.split()[:3] == ["built-in", "sees", "role"]
    assert any(line.split()[:4] == ["numeric_answer", "sample", "verifier", "Keep"] for line in out.splitlines())


def test_show_tells_arguments_and_cost(capsys):
    assert run(["filters", "show", "length"]) == 0
    out = capsys.readouterr().out
    assert "arguments:" in out and "max" in out and "cost:" in out
    assert run(["filters", "show", "lenght"]) == 2
    assert "length" in capsys.readouterr().err


def test_test_runs_a_filter_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    path = samples(tmp_path)
    assert run(["filters", "test", "mine.py:short", path]) == 0
    out = capsys.readouterr().out
    assert "2 samples: 1 kept, 1 dropped (rejected 1), 0 errors" in out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["sample", "score", "reason", "ms"]
    assert [line[1] for line in lines[2:4]] == ["keep", "drop"] and "s to start, then" in out
    assert run(["filters", "test", "mine.py:short", path, "max_words=9", "--json"]) == 0
    assert [row["keep"] for row in json.loads(capsys.readouterr().out)["rows"]] == [True, True]


def test_a_filter_that_raises_is_exit_5_and_every_row_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def bad(sample):\n    return 1 / 0\n")
    assert run(["filters", "test", "mine.py:bad", samples(tmp_path)]) == 5
    out = capsys.readouterr().out
    assert "2 errors" in out and "ZeroDivisionError" in out
