"""Engines of others: found by entry point, module or file, and held to the contract of `base.Engine` while they run.

Guarantee: a plug-in that raises, forgets or repeats a sample, or returns something else than a `Completion` ends the run with
its name and exit code 5; none of that is mistaken for a bad sample.

A plug-in is a function `make(context, **args) -> Engine`, where `context` is an `EngineContext` and `args` is
`generate.args`. It is named in `generate.engine` by its entry point in the group `isft.engines`, as `pkg.mod:attr`, or as
`path/file.py:attr` relative to the config. `tests/generate/echo_engine.py` in the sources is a whole one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, IsftError, PluginError
from iterative_sft_cli.generate.base import Engine, EngineOutOfMemory, no_heartbeat
from iterative_sft_cli.plugin_import import find_plugin
from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, STOP, Completion, Decoding, Request

GROUP = "isft.engines"
_REASONS = (EOS, LENGTH, PROMPT_TOO_LONG, STOP)


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What a plug-in engine may use. `loaded` is the trainer's `LoadedModel`; `section` the `GenerateConfig`."""

    section: Any
    loaded: Any
    encoder: Any
    base_dir: Path
    run_dir: Path | None
    seed: int


def open_plugin(use: str, context: EngineContext) -> Engine:
    """The engine that `use` makes, behind the contract's checks. Raises ConfigError for wrong arguments."""
    where = "generate.engine"
    make = find_plugin(
        use,
        kind="engine",
        base_dir=context.base_dir,
        where=where,
        group=GROUP,
        built_in=("transformers", "vllm", "openai"),
    )
    if not callable(make):
        raise ConfigError(f"{use} is not a function or class", where=where, expected="make(context, **args) -> Engine")
    args = dict(context.section.args)
    try:
        inspect.signature(make).bind(context, **args)
    except TypeError as error:
        raise ConfigError(f"{use} does not take these arguments: {error}", where="generate.args") from error
    except ValueError:
        pass
    try:
        engine = make(context, **args)
    except IsftError:
        raise
    except Exception as error:
        raise PluginError(f"{use} raised {type(error).__name__}: {error}", where=where) from error
    missing = [n for n in ("begin", "plan", "generate", "end") if not callable(getattr(engine, n, None))]
    if missing:
        raise PluginError(f"{use} made {type(engine).__name__}, which has no {', '.join(missing)}", where=where)
    return CheckedEngine(use, engine)


class CheckedEngine:
    """A plug-in's engine behind the contract's checks."""

    def __init__(self, name: str, engine: Any) -> None:
        self.name = name
        self.engine = engine
        self.deterministic = bool(getattr(engine, "deterministic", False))
        self._raised_by_us: BaseException | None = None
        self.heartbeat: Callable[[int], None] = no_heartbeat
        engine.heartbeat = self._beat

    def _beat(self, num_tokens: int) -> None:
        try:
            self.heartbeat(num_tokens)
        except BaseException as error:
            self._raised_by_us = error
            raise

    def _guarded(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (IsftError, EngineOutOfMemory, MemoryError):
            raise
        except Exception as error:
            if error is self._raised_by_us:
                raise
            raise self._broken(f"{what} raised {type(error).__name__}: {error}") from error

    def _broken(self, what: str) -> PluginError:
        return PluginError(f"engine {self.name}: {what}", where="generate.engine")

    def begin(self, weights: Path | None) -> None:
        """See `Engine.begin`."""
        self._guarded("begin", lambda: self.engine.begin(weights))

    def end(self) -> None:
        """See `Engine.end`."""
        self._guarded("end", self.engine.end)

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        """See `Engine.plan`."""
        plan = self._guarded("plan", lambda: self.engine.plan(requests, decoding))
        if not isinstance(plan, dict) or type(plan.get("max_rows")) is not int or plan["max_rows"] < 1:
            raise self._broken(f"plan returned {plan!r}, expected a mapping with a positive int `max_rows`")
        return plan

    def generate(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        """See `Engine.generate`. Raises PluginError for a completion that was not asked for, comes twice or not at all."""
        wanted = {(r.prompt_id, index) for r in requests for index in r.sample_indices}
        source = self._guarded("generate", lambda: iter(self.engine.generate(requests, decoding, plan)))
        end = object()
        while (completion := self._guarded("generate", lambda: next(source, end))) is not end:
            if not isinstance(completion, Completion):
                raise self._broken(f"generate yielded {type(completion).__name__}, expected Completion")
            key = completion.prompt_id, completion.sample_index
            if key not in wanted:
                raise self._broken(f"sample {key[1]} of prompt {key[0]!r} was not asked for, or came twice")
            wanted.remove(key)
            if completion.finish_reason not in _REASONS:
                raise self._broken(f"{key}: finish_reason {completion.finish_reason!r}, expected one of {_REASONS}")
            if not completion.token_ids and completion.text is None and completion.finish_reason != PROMPT_TOO_LONG:
                raise self._broken(f"{key}: neither token ids nor text")
            if any(type(token) is not int or token < 0 for token in completion.token_ids):
                raise self._broken(f"{key}: token_ids must be a tuple of non-negative ints")
            yield completion
        if wanted:
            first = sorted(wanted)[0]
            raise self._broken(f"{len(wanted)} samples never came, first sample {first[1]} of prompt {first[0]!r}")
