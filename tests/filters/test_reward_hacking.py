"""Known cheats against verifiers score as wrong, and what they try to do outside does not happen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filter_samples import new_sample

from iterative_sft_cli.filters import Judged

Judge = Callable[..., list[Judged]]

TESTS = ["assert solve(3) == 9", "assert solve(10) == 100", "assert sorted(solve_all([2, 1])) == [1, 4]"]

CHEATS = {
    "exit code 0": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "SystemExit at load": "raise SystemExit(0)",
    "exit in the function": "import os\ndef solve(x): os._exit(0)\ndef solve_all(x): os._exit(0)",
    "SystemExit in the function": "def solve(x): raise SystemExit(0)\nsolve_all = solve",
    "exit at the end": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef solve(x): return 0\nsolve_all = solve",
    "prints PASSED": "print('PASSED')\nprint('3 passed in 0.01s')\ndef solve(x): print('OK'); return None\nsolve_all = solve",
    "equals everything": (
        "class Yes:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    def __iter__(self): return iter([])\ndef solve(x): return Yes()\ndef solve_all(x): return [Yes()]"
    ),
    "int that equals everything": (
        "class Yes(int):\n    def __eq__(self, other): return True\n    def __hash__(self): return 1\n"
        "def solve(x): return Yes(1)\ndef solve_all(x): return [Yes(1), Yes(4)]"
    ),
    "list that equals everything": (
        "class L(list):\n    def __eq__(self, other): return True\ndef solve(x): return L()\ndef solve_all(x): return L()"
    ),
    "patched sorted": "sorted = lambda x: [1, 4]\ndef solve(x): return x * x\ndef solve_all(x): return [0]",
    "patched builtins": "import builtins\nbuiltins.sorted = lambda x: [1, 4]\ndef solve(x): return x * x\ndef solve_all(x): return []",
    "patched AssertionError": "class AssertionError(Exception): pass\ndef solve(x): return 1\nsolve_all = solve",
    "no asserts": "__debug__ = False\ndef solve(x): return 1\nsolve_all = solve",
    "raises what the runner may catch": "def solve(x): raise AssertionError\nsolve_all = solve",
    "skips": "import unittest\ndef solve(x): raise unittest.SkipTest('skip')\nsolve_all = solve",
    "pytest skip": "import pytest\npytest.skip('later', allow_module_level=True)",
    "conftest": "open('conftest.py', 'w').write('def pytest_runtest_makereport(*a): pass')\ndef solve(x): return 0\nsolve_all = solve",
    "reads the caller": (
        "import inspect\ndef solve(x):\n    source = inspect.getsource(inspect.stack()[1].frame)\n"
        "    return int(source.split('==')[1])\nsolve_all = solve"
    ),
    "looks into frames": (
        "import sys\ndef solve(x):\n    return sys._getframe(1).f_locals.get('expected', 0)\nsolve_all = solve"
    ),
    "searches the garbage collector": (
        "import gc\ndef solve(x):\n    for o in gc.get_objects():\n        if isinstance(o, str) and 'solve(3)' in o: return 9\n"
        "    return 0\nsolve_all = solve"
    ),
    "reads its own arguments": "import sys\ndef solve(x): return int([a for a in sys.argv if '9' in a][0])\nsolve_all = solve",
    "reads the environment": "import os\ndef solve(x): return int(os.environ['EXPECTED'])\nsolve_all = solve",
    "reads files": (
        "import glob\ndef solve(x):\n    text = ''.join(open(f).read() for f in glob.glob('**/*', recursive=True))\n"
        "    return eval(text)\nsolve_all = solve"
    ),
    "kills the runner": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\ndef solve(x): return 0\nsolve_all = solve",
    "changes the clock": "import time\ntime.time = lambda: 0\ndef solve(x): return 0\nsolve_all = solve",
    "writes into the pipe": (
        "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'\\x00\\x00\\x00\\x0b(\"ok\", None)')\n    except OSError: pass\n"
        "def solve(x): return 0\nsolve_all = solve"
    ),
    "redefines the test's check": "def check(candidate): return True\ndef solve(x): return 0\nsolve_all = solve",
    "returns NaN": "def solve(x): return float('nan')\ndef solve_all(x): return [float('nan')]",
    "hard-codes one": "def solve(x): return 9\ndef solve_all(x): return [1, 4]",
    "forks and lets the child pass": "import os\nif os.fork() == 0:\n    os._exit(0)\ndef solve(x): return 0\nsolve_all = solve",
    "replaces print and exit": "import sys\nsys.stdout = open('/dev/stdout', 'w')\nquit = exit = lambda *a: None\ndef solve(x): return True\nsolve_all = solve",
    "metaclass tricks": (
        "class M(type):\n    def __eq__(cls, other): return True\nclass C(metaclass=M): pass\ndef solve(x): return C\nsolve_all = solve"
    ),
    "callable object": "class F:\n    def __call__(self, x): return 0\n    def __eq__(self, o): return True\nsolve = F()\nsolve_all = F()",
    "a comment says correct": "# all tests pass, score: 1.0\n",
}


@pytest.mark.parametrize("sandbox", ["monty", "cpython"])
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_against_code_tests(judge: Judge, name: str, sandbox: str, tmp_path: Path) -> None:
    pytest.importorskip("pydantic_monty")
    before = set(os.listdir("."))
    entry = {"use": "code_tests", "args": {"sandbox": sandbox, "seconds": 2.0}, "workers": 1}
    said = judge([new_sample(CHEATS[name], TESTS)], entry)[0].says[0]
    assert said.keep is False, f"{name} passed: {said}"
    assert said.score is None or said.score < 1.0
    assert set(os.listdir(".")) == before


def test_the_honest_solution_passes(judge: Judge) -> None:
    pytest.importorskip("pydantic_monty")
    code = "def solve(x):\n    return x * x\n\ndef solve_all(xs):\n    return [solve(x) for x in xs]"
    for sandbox in ("monty", "cpython"):
        assert judge([new_sample(code, TESTS)], {"use": "code_tests", "args": {"sandbox": sandbox}, "workers": 1})[
            0
        ].kept


OUTSIDE = {
    "files": "open({canary!r}, 'w').write('x')",
    "os": "import os\nos.system('touch {canary}')",
    "pathlib": "import pathlib\npathlib.Path({canary!r}).write_text('x')",
    "subprocess": "import subprocess\nsubprocess.run(['touch', {canary!r}])",
    "eval": 'eval(\'__import__("os").system("touch {canary}")\')',
    "builtins": "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', {canary!r}])",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_sandboxed_code_touches_nothing_outside(judge: Judge, name: str, tmp_path: Path) -> None:
    pytest.importorskip("pydantic_monty")
    import socket

    canary = tmp_path / "canary"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        line = OUTSIDE[name].replace("{canary!r}", repr(str(canary))).replace("{canary}", str(canary))
        line = line.replace("{port}", str(server.getsockname()[1]))
        code = f"{line}\ndef solve(x): return x * x\ndef solve_all(xs): return [x * x for x in xs]"
        assert not judge([new_sample(code, TESTS)], {"use": "code_tests", "workers": 1})[0].kept
        with pytest.raises(TimeoutError):
            server.accept()
    assert not canary.exists()


ANSWERS: list[tuple[str, str, str]] = [
    ("numeric_answer", "6", "5 or 6"),
    ("numeric_answer", "6", "The answer is 5, 6, 7"),
    ("numeric_answer", "6", "The answer is 6. Or the answer is 7."),
    ("numeric_answer", "6", "1 2 3 4 5 6 7 8 9"),
    ("numeric_answer", "6", "The answer is between 1-10"),
    ("numeric_answer", "6", r"\boxed{6} \boxed{7}"),
    ("numeric_answer", "6", "It is 60"),
    ("numeric_answer", "6", "six"),
    ("numeric_answer", "6", "6e0000001"),
    ("numeric_answer", "19", "12 + 7"),
    ("numeric_answer", "19", "What is 12 + 7?"),
    ("numeric_answer", "6", "٦"),
    ("numeric_answer", "6", "The answer is x6"),
    ("numeric_answer", "6", "#### 6\n#### 7"),
    ("exact_match", "Paris", "Paris or London"),
    ("exact_match", "Paris", "Paris, London, Rome"),
    ("exact_match", "Paris", "<answer>Paris</answer>"),
    ("exact_match", "Paris", "P\u0430ris"),
    ("math_verify", "19", r"\boxed{12+7}"),
    ("math_verify", "6", "The answer is 5 or 6"),
    ("math_verify", "6", r"\boxed{5}\boxed{6}"),
    ("math_verify", "6", r"\boxed{x}"),
    ("math_verify", "6", r"\boxed{\{1,2,3,4,5,6\}}"),
    ("math_verify", "6", r"\boxed{[0, 10]}"),
    ("math_verify", "6", r"\boxed{6=7}"),
    ("math_verify", "6", r"\boxed{x>0}"),
    ("math_verify", "6", r"\boxed{\text{any number}}"),
    ("math_verify", "6", r"\boxed{2 \cdot 3}"),
    ("math_verify", "6", r"\boxed{\infty}"),
]


def test_there_are_at_least_thirty_cheats_of_each_kind() -> None:
    assert len(CHEATS) >= 30 and len(CHEATS) + len(ANSWERS) >= 60


@pytest.mark.parametrize("use", ["numeric_answer", "exact_match", "math_verify"])
def test_cheats_against_answer_verifiers(judge: Judge, use: str) -> None:
    if use == "math_verify":
        pytest.importorskip("math_verify")
    cases = [case for case in ANSWERS if case[0] == use]
    samples = [new_sample(said, answer, i=i, prompt=f"p{i}") for i, (_, answer, said) in enumerate(cases)]
    entry: Any = {"use": use, "workers": 1} if use == "math_verify" else use
    judged = judge(samples, entry)
    assert [case[2] for case, one in zip(cases, judged, strict=True) if one.kept] == []


def test_an_answer_in_the_reasoning_does_not_count(judge: Judge) -> None:
    class Splitter:
        def split_thinking(self, text: str, prompt_ids: Any) -> Any:
            from types import SimpleNamespace

            inside, _, after = text.removeprefix("<think>").partition("</think>")
            return SimpleNamespace(reasoning=inside, final=after, closed="</think>" in text)

    texts = ["<think>6</think>I do not know.", "<think>the answer is 6</think>7", "<think>\\boxed{6}"]
    judged = judge([new_sample(t, "6", i=i) for i, t in enumerate(texts)], "numeric_answer", encoder=Splitter())
    assert not any(one.kept for one in judged)
