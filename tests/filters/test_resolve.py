"""Names, places and arguments of the config: every mistake has a message of its own, all are told at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filter_samples import make_entries

from iterative_sft_cli.config import Schedule
from iterative_sft_cli.errors import ConfigError, PluginError
from iterative_sft_cli.filters import resolve, resolve_filters


def problems(tmp_path: Path, *forms: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve_filters(make_entries(*forms), base_dir=tmp_path)
    return caught.value.problems


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(
        "from iterative_sft_cli.types import Verdict\n"
        "def keep_short(sample, max_words: int = 40):\n    return len(sample.completion.split()) <= max_words\n"
        "def first(group, n: int = 1):\n    return [i < n for i, _ in enumerate(group)]\n"
        "first.prefix_stable = True\n"
        "def near(sample):\n    return 0.5\n"
        "near.in_process = True\nnear.role = 'scorer'\n"
        "def wide(samples):\n    return [True] * len(samples)\n"
        "number = 7\n"
        "def wrong(text):\n    return True\n"
    )
    return tmp_path


def test_a_file_beside_the_config_is_a_filter(code: Path) -> None:
    short, first, near = resolve_filters(
        make_entries({"mine.py:keep_short": 5}, {"mine.py:first": {"n": 2}}, "mine.py:near"), base_dir=code
    )
    assert (short.name, short.kind, short.arguments, short.isolated) == ("keep_short", "sample", {"max_words": 5}, True)
    assert (short.role, first.kind, first.prefix_stable, first.role) == ("verifier", "group", True, "selector")
    assert (near.isolated, near.role, near.scores_only) == (False, "scorer", True)
    assert short.source_hash == first.source_hash
    before = short.source_hash
    (code / "mine.py").write_text((code / "mine.py").read_text() + "\n")
    assert resolve_filters(make_entries("mine.py:keep_short"), base_dir=code)[0].source_hash != before


def test_a_helper_beside_the_file_is_found_and_hides_no_library(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')")
    (tmp_path / "helper_words.py").write_text("LIMIT = 3\n")
    (tmp_path / "uses.py").write_text(
        "import json, helper_words\ndef f(sample):\n    return bool(json.dumps(helper_words.LIMIT))\n"
    )
    one = resolve_filters(make_entries("uses.py:f"), base_dir=tmp_path)[0]
    (tmp_path / "helper_words.py").write_text("LIMIT = 4\n")
    (tmp_path / "uses.py").touch()
    assert resolve_filters(make_entries("uses.py:f"), base_dir=tmp_path)[0].source_hash != one.source_hash


def test_the_four_ways_not_to_find_a_filter_differ(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "mine.py has no attribute `keep_shrt`. Did you mean `keep_short`?" in problems(code, "mine.py:keep_shrt")[0]
    assert "there is no module `nowhere`" in problems(code, "nowhere.at_all:f")[0]
    (code / "broken.py").write_text("import math\nmath.sqrt(-1)\n")
    with pytest.raises(PluginError) as caught:
        resolve_filters(make_entries("broken.py:f"), base_dir=code)
    assert "an error inside the import of" in caught.value.what
    assert "ValueError" in caught.value.what and "broken.py:2" in caught.value.what

    class Claim:
        name, value, group = "dedup", "other_package.filters:dedup", "isft.filters"

        class dist:
            name, version = "other-package", "1.2"

    monkeypatch.setattr(resolve, "entry_points", lambda: [Claim])
    assert problems(code, "dedup") == [
        "filters[0]: the name `dedup` clashes: it is a built-in filter and other-package 1.2 (other_package.filters:dedup); "
        "write pkg.mod:attr for the one you mean"
    ]


def test_a_missing_import_inside_a_plugin_is_not_a_missing_plugin(tmp_path: Path) -> None:
    (tmp_path / "needs.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(PluginError, match="an error inside the import .*not_installed_anywhere"):
        resolve_filters(make_entries("needs.py:f"), base_dir=tmp_path)


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("import os; os._exit(3)", "exit code 3"),
        ("raise SystemExit(4)", "SystemExit: 4"),
        ("import time; time.sleep(100)", "startup_timeout_s"),
        ("def f(sample) return 1", "SyntaxError"),
    ],
)
def test_an_import_that_misbehaves_is_a_named_error(tmp_path: Path, body: str, cause: str) -> None:
    (tmp_path / "bad.py").write_text(body + "\n")
    with pytest.raises(PluginError) as caught:
        resolve_filters(make_entries({"use": "bad.py:f", "startup_timeout_s": 0.5}), base_dir=tmp_path)
    assert cause in caught.value.what


def test_a_plugin_is_never_imported_into_the_main_process(tmp_path: Path) -> None:
    import sys

    canary = tmp_path / "canary"
    (tmp_path / "canary_filter.py").write_text(
        f"import os\nopen({str(canary)!r}, 'w').write(str(os.getpid()))\ndef f(sample):\n    return True\n"
    )
    resolve_filters(make_entries("canary_filter.py:f"), base_dir=tmp_path)
    import os

    assert int(canary.read_text()) != os.getpid()
    assert not [name for name in sys.modules if "canary_filter" in name]


def test_plugins_are_not_touched_while_the_config_is_wrong(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "touch.py").write_text(f"open({str(canary)!r}, 'w')\ndef f(sample):\n    return True\n")
    problems(tmp_path, "touch.py:f", "no_such_filter")
    assert not canary.exists()


def test_all_problems_are_told_at_once(code: Path) -> None:
    found = problems(
        code,
        "numeric_anwser",
        {"max_per_prompt": {"m": 3}},
        {"regex": "(("},
        {"top_k": {"by": "reward"}},
        {"use": "finished", "timeout_s": 3},
        "mine.py",
        {"length": {"min": 5, "max": 2}},
        "gone.py:f",
    )
    text = "\n".join(found)
    assert "filters[0]: there is no filter named `numeric_anwser`. Did you mean `numeric_answer`?" in text
    assert "filters[1]: max_per_prompt: unknown argument `m`, it takes n." in text
    assert "filters[1]: max_per_prompt: argument `n` (int) is required" in text
    assert "filters[2]: regex: argument `pattern` is not a regular expression" in text
    assert "filters[3]: top_k: `reward` is no earlier filter's score." in text
    assert "filters[4]: finished: `timeout_s` has no effect on this built-in" in text
    assert "filters[5]: `mine.py` does not say which function" in text
    assert "filters[6]: length: `min` is 5, greater than `max`, which is 2" in text
    assert "filters[7]: gone.py:f: there is no file gone.py beside the config" in text


def test_wrong_plugins_are_config_errors(code: Path) -> None:
    assert "it cannot be a filter: its first parameter is named `text`" in problems(code, "mine.py:wrong")[0]
    assert "it cannot be a filter: it is a int" in problems(code, "mine.py:number")[0]
    assert "unknown argument `words`" in problems(code, {"mine.py:keep_short": {"words": 3}})[0]
    assert "argument `max_words` is 'many', expected int" in problems(code, {"mine.py:keep_short": "many"})[0]
    assert "would drop the whole round" in problems(code, {"use": "mine.py:wide", "on_error": "drop"})[0]
    assert (
        "NOT_SET_ANYWHERE (listed in `env`) is not set"
        in problems(code, {"use": "mine.py:wide", "env": ["NOT_SET_ANYWHERE"]})[0]
    )


@pytest.mark.parametrize("use", ["os:system", "os:_exit", "../up.py:f", "a b:c", "mod:a.b", ":f", "x:"])
def test_odd_places_are_refused_without_a_side_effect(use: str, tmp_path: Path) -> None:
    assert problems(tmp_path, use)


def test_scores_must_come_from_earlier_filters(tmp_path: Path) -> None:
    assert (
        "`numeric_anser` is no earlier filter's score. Did you mean `numeric_answer`?"
        in problems(tmp_path, "numeric_answer", {"threshold": {"by": "numeric_anser + 1", "min": 0}})[0]
    )
    assert (
        "`numeric_answer` comes from a later filter"
        in problems(tmp_path, {"threshold": {"by": "numeric_answer", "min": 0}}, "numeric_answer")[0]
    )
    resolve_filters(
        make_entries("numeric_answer", {"threshold": {"by": "numeric_answer - logprob_per_token", "min": 0}}),
        base_dir=tmp_path,
    )


def test_names_repeat_with_numbers_unless_given(tmp_path: Path) -> None:
    found = resolve_filters(make_entries("nonempty", {"length": 3}, {"length": {"min": 1}}), base_dir=tmp_path)
    assert [one.name for one in found] == ["nonempty", "length", "length_2"]
    again = problems(tmp_path, {"use": "nonempty", "name": "a"}, {"use": "finished", "name": "a"})
    assert again == ["filters[1]: the name `a` is already that of filters[0]"]


def test_scheduled_arguments_are_checked_in_every_round(tmp_path: Path) -> None:
    found = resolve_filters(make_entries({"max_per_prompt": {"linear": [2, 8], "span": 4}}), base_dir=tmp_path)[0]
    assert isinstance(found.arguments["n"], Schedule)
    assert [found.at_round(r).arguments["n"] for r in (1, 2, 3, 4, 9)] == [2, 4, 6, 8, 8]
    wrong = problems(tmp_path, {"top_fraction": {"by": "num_tokens", "q": {"by_round": [0.5, 1.5]}}})
    assert wrong == [
        "filters[0]: top_fraction: argument `q` is 1.5, expected above 0, at most 1 (in round 2 of its schedule)"
    ]


def test_a_missing_library_names_the_extra(tmp_path: Path, hide_packages: Callable[..., None]) -> None:
    hide_packages("math_verify", "reasoning_gym", "rapidfuzz", "datasketch", "py3langid", "pydantic_monty")
    found = "\n".join(
        problems(
            tmp_path,
            "math_verify",
            "reasoning_gym",
            {"dedup": "near"},
            {"use": "dedup", "name": "d2", "args": {"level": "near", "scope": "round"}},
            {"language": "en"},
            "code_tests",
        )
    )
    for index, (library, extra) in enumerate(
        [
            ("math_verify", "math"),
            ("reasoning_gym", "gym"),
            ("rapidfuzz", "dedup"),
            ("datasketch", "dedup"),
            ("py3langid", "language"),
            ("pydantic_monty", "code"),
        ]
    ):
        assert f"filters[{index}]: " in found
        assert f"it needs the library {library}: pip install 'iterative-sft-cli[{extra}]'" in found
    resolve_filters(make_entries("dedup"), base_dir=tmp_path)


def test_resolving_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys; from pathlib import Path; from iterative_sft_cli.config import FilterEntry\n"
        "from iterative_sft_cli.filters import resolve_filters\n"
        "from iterative_sft_cli.filters.builtin import NAMES, load_builtin\n"
        "for name in NAMES: load_builtin(name)\n"
        "resolve_filters([FilterEntry.model_validate('dedup')], base_dir=Path('.'))\n"
        "print({'torch', 'transformers', 'datasets', 'math_verify', 'numpy', 'scipy'} & set(sys.modules))"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "set()"
