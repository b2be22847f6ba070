"""code_tests: right code passes, wrong code has a reason, and both sandboxes agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from filter_samples import make_entries, new_sample

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.filters import Judged, resolve_filters

pytest.importorskip("pydantic_monty")
Judge = Callable[..., list[Judged]]

ADD = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def says(judge: Judge, code: str, given: Any = ADD, row: Any = None, **arguments: Any) -> Any:
    entry = {"use": "code_tests", "args": {"seconds": 1.0, **arguments}, "workers": 1}
    return judge([new_sample(code, given, row=row or {})], entry)[0].says[0]


CASES = {
    "right": ("def add(a, b):\n    return a + b", None, 1.0),
    "fenced": ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", None, 1.0),
    "last block": (
        "```python\ndef add(a, b): return 0\n```\nbetter:\n```python\ndef add(a, b): return a + b\n```",
        None,
        1.0,
    ),
    "half right": ("def add(a, b):\n    return 3", "wrong_result", 0.5),
    "wrong": ("def add(a, b):\n    return 7", "wrong_result", 0.0),
    "missing": ("def sub(a, b):\n    return a - b", "code_error", 0.0),
    "raises": ("def add(a, b):\n    raise ValueError('no')", "code_error", 0.0),
    "syntax": ("def add(a, b) return", "syntax_error", 0.0),
    "prose": ("", "no_code", 0.0),
    "loop": ("def add(a, b):\n    while True: pass", "timeout", 0.0),
    "recursion": ("def add(a, b):\n    return add(a, b)", "code_error", 0.0),
    "memory": ("def add(a, b):\n    return len([0] * 10**9)", "memory", 0.0),
    "object": ("class P: pass\ndef add(a, b):\n    return P()", "not_plain_data", 0.0),
    "lambda": ("add = lambda a, b: a + b", None, 1.0),
}


@pytest.mark.parametrize("sandbox", ["monty", "cpython"])
@pytest.mark.parametrize("name", CASES)
def test_reasons(judge: Judge, name: str, sandbox: str) -> None:
    code, reason, score = CASES[name]
    said = says(judge, code, sandbox=sandbox, seconds=0.5 if name == "loop" else 2.0)
    assert (said.keep, said.reason, said.score) == (reason is None, reason, score)


@pytest.mark.parametrize("sandbox", ["monty", "cpython"])
def test_forms_of_tests(judge: Judge, sandbox: str) -> None:
    def check(code: str, given: Any, **more: Any) -> bool:
        return bool(says(judge, code, given, sandbox=sandbox, **more).keep)

    assert check("def f(x): return {1, (2, 3)}", "assert f(0) == {1, (2, 3)}")
    assert check(
        "def f(x): raise ValueError('no')", "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False"
    )
    assert check("def f(n): return [i * i for i in range(n)]", "import math\nassert sum(f(4)) == math.comb(8, 3) - 42")
    assert check("def f(n): return (i for i in range(n))", "assert list(f(3)) == [0, 1, 2]")
    human_eval = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n"
    assert check("def twice(x): return 2 * x", None, tests="t", entry_point="e", row={"t": human_eval, "e": "twice"})
    assert not check("def twice(x): return 4", None, tests="t", entry_point="e", row={"t": human_eval, "e": "twice"})
    program = "n = int(input())\nprint(sum(int(input()) for _ in range(n)))"
    pairs = [{"input": "2\n3\n4\n", "output": "7\n"}, {"input": "1\n5", "output": "5"}]
    assert check(program, pairs)
    assert not check(program, [*pairs, {"input": "0", "output": "1"}])
    assert not check("print(input() + input())", [{"input": "one line", "output": "x"}])
    assert check("def f(): return K", "assert f() == 3", setup="s", row={"s": "import math"}) is False


def test_shares_and_scores(judge: Judge) -> None:
    code = "def add(a, b):\n    return 3"
    assert says(judge, code, min_passed=0.5).keep
    said = says(judge, code, drop=False)
    assert (said.keep, said.score, said.reason) == (True, 0.5, "wrong_result")
    assert "assert 3 == 0" in says(judge, code).extra["problem"]


def test_what_the_sandbox_lacks_is_no_verdict_on_the_code(judge: Judge) -> None:
    for code in (
        "import heapq\ndef add(a, b): return a + b",
        "def add(a, b):\n    yield a",
        "class A(dict): pass\ndef add(a, b): return a + b",
    ):
        said = says(judge, code)
        assert (said.keep, said.score, said.reason) == (False, None, "unsupported"), code
    assert says(judge, "import heapq\ndef add(a, b): return a + b", sandbox="cpython").keep
    assert says(judge, "import not_there\ndef add(a, b): return a + b").reason == "code_error"


def test_the_switch_to_cpython_warns(tmp_path: Any) -> None:
    monty, cpython = resolve_filters(
        make_entries("code_tests", {"use": "code_tests", "name": "c", "args": {"sandbox": "cpython"}}),
        base_dir=tmp_path,
    )
    assert monty.notice is None
    assert "is NOT a sandbox" in str(cpython.notice)


def test_missing_tests_are_a_data_error(judge: Judge) -> None:
    for answer in (None, [], 7):
        with pytest.raises(DataError, match="prompt p0 has no tests in its answer"):
            says(judge, "x = 1", answer)
    with pytest.raises(DataError, match="without `input` and `output`"):
        says(judge, "x = 1", [{"in": "1"}])
    for wrong in ({"seconds": 0}, {"memory_mb": 1}, {"min_passed": 0.0}, {"sandbox": "docker"}):
        with pytest.raises(ConfigError):
            judge([], {"code_tests": wrong})


def test_many_samples_at_a_time(judge: Judge) -> None:
    samples = [new_sample(f"def add(a, b):\n    return a + b + {i % 2}", ADD, i=i) for i in range(60)]
    judged = judge(samples, {"use": "code_tests", "workers": 3})
    assert [one.kept for one in judged] == [i % 2 == 0 for i in range(60)]
