"""What a built-in filter declares beside its signature, and the verdict helpers that verifiers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from iterative_sft_cli.types import Verdict

Role = Literal["verifier", "check", "scorer", "selector"]
"""verifier: judges whether an answer is right (`eval.correct`); check: judges the form; scorer: keeps all, adds a
score; selector: picks among samples."""


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """`requires` are (module, extra) pairs; `honours` the long-form keys that act (others are refused);
    `check` raises ValueError for argument values that cannot work; `variant` picks another callable by the arguments;
    `expressions` names arguments that are arithmetic over scores, `paths` those that are files beside the config (or, with `hub`, hub ids);
    `notice` is a warning for some arguments; `threads` filters run in as many threads as `workers`, `cached` ones keep
    their results; `batched` classes have `judge_batch(samples)`; `device` ones wait until the engine has left the GPU."""

    role: Role
    cost: str
    requires: tuple[tuple[str, str], ...] = ()
    requires_if: Callable[[Mapping[str, Any]], tuple[tuple[str, str], ...]] | None = None
    honours: tuple[str, ...] = ()
    isolated: bool = False
    threads: bool = False
    batched: bool = False
    device: bool = False
    default_on_error: str = "fail"
    prefix_stable: bool | Callable[[Mapping[str, Any]], bool] = False
    expressions: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    hub: bool = False
    notice: Callable[[Mapping[str, Any]], str | None] | None = None
    cached: bool = False
    check: Callable[[Mapping[str, Any]], None] | None = None
    variant: Callable[[Mapping[str, Any]], Callable[..., Any] | None] | None = None


WORKER_KEYS = ("timeout_s", "startup_timeout_s", "workers", "memory_gb", "env", "device", "on_error")
"""Long-form keys that act on every filter that runs in worker processes."""

KEPT = Verdict(True)
RIGHT = Verdict(True, 1.0)


def decide(correct: bool, reason: str, *, drop: bool, extra: Mapping[str, Any] | None = None) -> Verdict:
    """A verifier's verdict: score 1.0 or 0.0; a wrong sample is dropped with `reason` unless `drop` is false."""
    if correct:
        return Verdict(True, 1.0, None, extra) if extra else RIGHT
    return Verdict(not drop, 0.0, reason, extra or {})


def at_least(name: str, least: float) -> Callable[[Mapping[str, Any]], None]:
    """A `check` that demands `name >= least`."""

    def check(arguments: Mapping[str, Any]) -> None:
        value = arguments.get(name)
        if value is not None and value < least:
            raise ValueError(f"argument `{name}` is {value}, expected at least {least}")

    return check
