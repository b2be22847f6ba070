"""code_tests: keeps completions whose Python code passes tests, run in a sandbox."""

from __future__ import annotations

import ast
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters.builtin.code_program import CodeFailed, SandboxLacks
from iterative_sft_cli.filters.builtin.code_sandbox import CodeSandbox
from iterative_sft_cli.filters.builtin.keys import python_source
from iterative_sft_cli.filters.builtin.spec import BuiltIn, decide
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    if arguments.get("seconds", 5.0) <= 0:
        raise ValueError(f"argument `seconds` is {arguments['seconds']}, expected above 0")
    if arguments.get("memory_mb", 256) < 16:
        raise ValueError(f"argument `memory_mb` is {arguments['memory_mb']}, expected at least 16")
    if not 0 < arguments.get("min_passed", 1.0) <= 1:
        raise ValueError(f"argument `min_passed` is {arguments['min_passed']}, expected above 0, at most 1")


def _notice(arguments: Mapping[str, Any]) -> str | None:
    if arguments.get("sandbox", "monty") != "cpython":
        return None
    return (
        "code_tests runs model-written code in CPython with limits, which is NOT a sandbox: "
        "it can read what you can read; use a container or a throw-away machine"
    )


SPEC = BuiltIn(
    role="verifier",
    cost="1 to 10 ms a sample, `workers` [all cores] at a time, in interpreter processes of its own",
    requires=(("pydantic_monty", "code"),),
    honours=("workers", "on_error"),
    threads=True,
    check=_check,
    notice=_notice,
)


class code_tests:
    """Keep a completion whose code passes all tests (or the share `min_passed`).

    The code is the last fenced block, else the whole final part. tests: the column with them [the answer], a list (or
    one text) of Python test code such as `assert add(1, 2) == 3`, or of {input, output} pairs for programs that read
    input() and print. setup: column with code that tests need before them. entry_point: column with the name of the
    function that `check(candidate)` in the tests is called with (HumanEval's form). seconds, memory_mb: what one test may
    take.

    How it cannot be cheated: the code and the tests run in two interpreters. The tests see only stand-ins for the
    functions that the code defines; arguments and results cross as plain data (numbers, texts, lists, dicts, sets,
    tuples, None). So an object that equals everything, a patched builtin, an early exit, printed words or a broken
    assert decide nothing, and code that cannot be called this way fails as `not_plain_data`.

    sandbox: monty (pydantic-monty: no files, no network, no processes, limits on time, memory and recursion; a subset of
    Python) or cpython (all of Python in a process with limits and without network where the system allows: NOT a
    sandbox). Dropped as `no_code`, `syntax_error`, `code_error`, `wrong_result`, `timeout`, `memory`, `not_plain_data`,
    or `unsupported` (no score: the sandbox lacks a feature). The score is the share of tests passed.
    """

    def __init__(
        self,
        tests: str | None = None,
        setup: str | None = None,
        entry_point: str | None = None,
        seconds: float = 5.0,
        memory_mb: int = 256,
        min_passed: float = 1.0,
        sandbox: Literal["monty", "cpython"] = "monty",
        drop: bool = True,
    ) -> None:
        self._tests = tests
        self._setup = setup
        self._entry_point = entry_point
        self._min_passed = min_passed
        self._drop = drop
        self._lock = threading.Lock()
        self._box: CodeSandbox | None = None
        self._options = (seconds, memory_mb, sandbox)
        self.workers = 1

    def __call__(self, sample: Sample) -> Verdict:
        """Called in several threads at a time."""
        tests = self._tests_of(sample)
        source = python_source(sample.final)
        if not source.strip():
            return decide(False, "no_code", drop=self._drop)
        names = _defined_names(source)
        if names is None:
            return decide(False, "syntax_error", drop=self._drop)
        with self._lock:
            if self._box is None:
                self._box = CodeSandbox(*self._options, workers=self.workers)
            box = self._box
        passed, reason, message = 0, "", ""
        setup = str(sample.row.get(self._setup) or "") if self._setup else ""
        for test in tests:
            try:
                if isinstance(test, Mapping):
                    said = box.run_program(source, str(test["input"]))
                    if not _same_output(said, str(test["output"])):
                        raise CodeFailed("wrong_result", f"printed {said[:100]!r}")
                else:
                    box.run_test(source, names, setup, self._with_entry(test, sample))
                passed += 1
            except SandboxLacks as error:
                return Verdict(False, None, "unsupported", {"problem": str(error)[:300]})
            except CodeFailed as error:
                reason, message = reason or error.reason, message or str(error)
        share = passed / len(tests)
        if share >= self._min_passed:
            return Verdict(True, share)
        return Verdict(not self._drop, share, reason, {"problem": message[:300]})

    def _tests_of(self, sample: Sample) -> Sequence[str | Mapping[str, Any]]:
        found = sample.answer if self._tests is None else sample.row.get(self._tests)
        tests = [found] if isinstance(found, str | Mapping) else found
        if not isinstance(tests, Sequence) or not tests:
            where = f"column `{self._tests}`" if self._tests else "answer"
            raise DataError(
                f"prompt {sample.prompt_id} has no tests in its {where}", hint="name the column with `tests`"
            )
        for test in tests:
            if isinstance(test, Mapping) and not {"input", "output"} <= set(test):
                raise DataError(f"prompt {sample.prompt_id} has a test without `input` and `output`")
        return tests

    def _with_entry(self, test: str, sample: Sample) -> str:
        if self._entry_point is None:
            return test
        name = str(sample.row.get(self._entry_point))
        if not name.isidentifier():
            raise DataError(f"prompt {sample.prompt_id} has no function name in column `{self._entry_point}`")
        return f"{test}\n\ncheck({name})\n"

    def close(self) -> None:
        """End the interpreter processes."""
        if self._box is not None:
            self._box.close()
            self._box = None


def _same_output(said: str, wanted: str) -> bool:
    return [line.rstrip() for line in said.rstrip().splitlines()] == [
        line.rstrip() for line in wanted.rstrip().splitlines()
    ]


def _defined_names(source: str) -> list[str] | None:
    """Names that the code defines at its top level; None when it is not Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    return names
