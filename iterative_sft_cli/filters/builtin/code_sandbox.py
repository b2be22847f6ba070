"""Two interpreters for model-written code: one holds the code, the other the tests; only plain data crosses between.

What the code does to its own interpreter cannot reach the comparison, which happens in the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from iterative_sft_cli.filters.builtin.code_program import (
    MAX_OUTPUT_CHARS,
    CodeFailed,
    Program,
    SandboxLacks,
    plain,
    raised,
)


class CodeSandbox:
    """Runs tests against code. Thread-safe; at most `workers` tests at a time."""

    def __init__(self, seconds: float, memory_mb: int, sandbox: str, *, workers: int) -> None:
        import pydantic_monty

        self._monty = pydantic_monty
        self._seconds = seconds
        self._memory_mb = memory_mb
        self._cpython = sandbox == "cpython"
        self._limits = {
            "max_feed_duration_secs": seconds,
            "max_memory": memory_mb * 2**20,
            "max_recursion_depth": 500,
        }
        # each test holds two interpreters
        self._pool = pydantic_monty.Monty(max_processes=2 * workers, request_timeout=seconds * 2 + 5)
        self._pool.__enter__()

    def close(self) -> None:
        """End the interpreter processes."""
        self._pool.__exit__(None, None, None)

    def run_test(self, source: str, names: list[str], setup: str, test: str) -> None:
        """Returns when the test passes. Raises CodeFailed or SandboxLacks."""
        failure: list[CodeFailed | SandboxLacks] = []
        with self._load(source) as program, self._session() as tests:
            stand_ins = {name: _stand_in(program, name, failure) for name in names}
            try:
                if setup:
                    tests.feed_run(setup, external_lookup=stand_ins, print_callback=_discard)
                tests.feed_run(test, external_lookup=stand_ins, print_callback=_discard)
            except self._monty.MontyError as error:
                # what the code did first explains the test's own error
                raise failure[0] if failure else self._read_error(error, wrong="wrong_result") from error
            if failure:
                raise failure[0]

    def run_program(self, source: str, stdin: str) -> str:
        """What the program prints, given `stdin`. Raises CodeFailed or SandboxLacks."""
        if self._cpython:
            from iterative_sft_cli.filters.builtin.code_cpython import run_script

            return run_script(source, stdin, self._seconds, self._memory_mb)
        lines = iter(stdin.split("\n"))
        printed: list[str] = []

        def read_line(prompt: str = "") -> str:
            try:
                return next(lines)
            except StopIteration:
                raise EOFError("EOF when reading a line") from None

        def collect(stream: str, text: str) -> None:
            if stream == "stdout" and sum(map(len, printed)) < MAX_OUTPUT_CHARS:
                printed.append(text)

        with self._session() as session:
            try:
                session.feed_run(source, external_lookup={"input": read_line}, print_callback=collect)
            except self._monty.MontyError as error:
                raise self._read_error(error, wrong="code_error") from error
        return "".join(printed)

    def _session(self) -> Any:
        return self._pool.checkout(limits=self._limits)

    def _load(self, source: str) -> AbstractContextManager[Program]:
        if self._cpython:
            from iterative_sft_cli.filters.builtin.code_cpython import CPythonProgram

            return CPythonProgram(source, self._seconds, self._memory_mb)
        return _MontyProgram(self, source)

    def _read_error(self, error: Exception, *, wrong: str) -> CodeFailed | SandboxLacks:
        text = str(error)
        if isinstance(error, self._monty.MontyCrashedError):
            timed_out = bool(getattr(error, "timed_out", False))
            return CodeFailed("timeout" if timed_out else "memory", text)
        if isinstance(error, self._monty.MontySyntaxError):
            # Python itself parsed it
            return SandboxLacks(text)
        kind, _, message = text.rpartition("\n")[2].partition(":")
        if kind == "Exception" and message.strip().partition(":")[0] in ("TimeoutError", "MemoryError"):
            kind, _, message = message.strip().partition(":")
        if "NotImplementedError" in text or "Internal error in monty" in text:
            return SandboxLacks(text)
        if kind == "ModuleNotFoundError" and message.strip().rpartition(" ")[2].strip("'\"") in sys.stdlib_module_names:
            return SandboxLacks(text)
        if kind == "TimeoutError" and "limit exceeded" in text:
            return CodeFailed("timeout", text)
        if kind == "MemoryError" and "limit exceeded" in text:
            return CodeFailed("memory", text)
        return CodeFailed(wrong if kind == "AssertionError" or wrong == "code_error" else "code_error", text)


def _stand_in(program: Program, name: str, failure: list[CodeFailed | SandboxLacks]) -> Callable[..., Any]:
    """A function for the tests' interpreter that calls `name` in the code's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = program.call(name, list(args), kwargs)
        except (CodeFailed, SandboxLacks) as error:
            failure.append(error)
            raise RuntimeError("the code under test failed") from None
        if not plain(result):
            failure.append(CodeFailed("not_plain_data", f"{name}() gave a {type(result).__name__}"))
            raise RuntimeError("the code under test gave an object")
        return result

    return call


class _MontyProgram:
    """Code in a Monty session of its own."""

    def __init__(self, box: CodeSandbox, source: str) -> None:
        self._box = box
        self._source = source
        self._session = box._session()

    def __enter__(self) -> _MontyProgram:
        self._session.__enter__()
        try:
            self._session.feed_run(self._source, print_callback=_discard)
        except self._box._monty.MontyError as error:
            self._session.__exit__(None, None, None)
            raise self._box._read_error(error, wrong="code_error") from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._session.__exit__(None, None, None)

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Arguments are bound as globals whose names no sensible code uses."""
        try:
            return self._session.feed_run(
                f"{name}(*__isft_args, **__isft_kwargs)",
                inputs={"__isft_args": args, "__isft_kwargs": kwargs},
                print_callback=_discard,
            )
        except self._box._monty.MontyError as error:
            read = self._box._read_error(error, wrong="code_error")
            if isinstance(read, SandboxLacks) or read.reason != "code_error":
                raise read from error
            raise raised(str(error)) from error


def _discard(stream: str, text: str) -> None:
    """What the code prints decides nothing."""
