"""Engines of others: found by entry point, module or file, and held to the contract of `base.Engine` while they run.

Guarantee: a plug-in that raises, forgets or repeats a sample, or returns something else than a `Completion` ends the run with
its name and exit code 5; none of that is mistaken for a bad sample.

A plug-in is a function `make(context, **args) -> Engine`, where `context` is an `EngineContext` and `args` is
`generate.args`. It is named in `generate.engine` by its entry point in the group `isft.engines`, as `pkg.mod:attr`, or as
`path/file.py:attr` relative to the config. `tests/generate/echo_engine.py` in the sources is a whole one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, IsftError, PluginError
from iterative_sft_cli.generate.base import Engine, EngineOutOfMemory, no_heartbeat
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


def resolve(use: str, base_dir: Path, *, where: str) -> Any:
    """The object that `use` names. Raises ConfigError when it is not there, PluginError when its import raises."""
    target, colon, attribute = use.rpartition(":")
    if not colon:
        found = [point for point in entry_points(group=GROUP) if point.name == use]
        if len(found) > 1:
            places = ", ".join(sorted(point.value for point in found))
            raise ConfigError(f"{use!r} is offered by more than one package: {places}", where=where)
        if not found:
            known = sorted({"transformers", "vllm", "openai"} | {p.name for p in entry_points(group=GROUP)})
            raise ConfigError(
                f"there is no engine {use!r}", where=where, expected=", ".join(known) + ", pkg.mod:attr or file.py:attr"
            )
        target, _, attribute = found[0].value.partition(":")
    try:
        module = _from_file(target, base_dir, where) if target.endswith(".py") else importlib.import_module(target)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (target == error.name or target.startswith(error.name + ".")):
            raise ConfigError(f"there is no module {error.name!r}", where=where) from error
        raise PluginError(f"{use}: {error}", where=where) from error
    except Exception as error:
        raise PluginError(f"importing {use} failed: {type(error).__name__}: {error}", where=where) from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"{target} has no attribute {attribute!r}", where=where)
        value = getattr(value, part)
    return value


def _from_file(target: str, base_dir: Path, where: str) -> Any:
    path = next((p for p in (base_dir / target, Path(target)) if p.is_file()), None)
    if path is None:
        raise ConfigError(f"there is no file {target}", where=where, hint="it is looked for beside the config")
    name = f"isft_engine_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def open_plugin(use: str, context: EngineContext) -> Engine:
    """The engine that `use` makes, behind the contract's checks. Raises ConfigError for wrong arguments."""
    where = "generate.engine"
    make = resolve(use, context.base_dir, where=where)
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
