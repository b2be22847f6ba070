"""Third-party filters: a worker imports one, tells its shape and source, and checks its arguments before a run starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from iterative_sft_cli.config.schedule import Schedule
from iterative_sft_cli.config.secrets import hide
from iterative_sft_cli.errors import ConfigError, PluginError
from iterative_sft_cli.filters.builtin.spec import Role
from iterative_sft_cli.filters.contract import Shape, place_bare
from iterative_sft_cli.filters.link import Died, Link, Watchdog
from iterative_sft_cli.filters.pool import start_message
from iterative_sft_cli.filters.resolved import Location, ResolvedFilter, bind_scheduled, long_form, scalars
from iterative_sft_cli.filters.wire import encode
from iterative_sft_cli.plugin_import import ImportBroken, NotFound, load_target

if TYPE_CHECKING:
    from iterative_sft_cli.config import FilterEntry


def describe_plugin(
    location: Location,
    candidates: list[dict[str, Any]],
    *,
    env: tuple[str, ...],
    timeout_s: float,
    distribution: str | None,
) -> dict[str, Any]:
    """What a worker tells of a plug-in: `shape`, `problems` of the first bad candidate, `doc`, `declares`, `source_hash`.

    Raises ConfigError when the module or attribute does not exist or cannot be a filter, PluginError when its import
    fails, hangs or ends the process.
    """
    text = _describe(location, json.dumps(candidates, default=str), env, timeout_s, distribution, _stamp(location))
    reply: dict[str, Any] = json.loads(text)
    return reply


def _stamp(location: Location) -> tuple[int, int]:
    """What changes when a file is edited, so that an answer is asked for again."""
    if location.path is None:
        return (0, 0)
    status = Path(location.path).stat()
    return (status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _describe(
    location: Location,
    candidates: str,
    env: tuple[str, ...],
    timeout_s: float,
    distribution: str | None,
    stamp: tuple[int, int],
) -> str:
    watchdog = Watchdog()
    link = Link(watchdog, env=env, threads=1)
    try:
        link.watch(timeout_s, "startup_timeout_s")
        message = start_message(location, link.scratch, env)
        link.write(
            encode(message | {"describe": True, "candidates": json.loads(candidates), "distribution": distribution})
        )
        reply = link.receive()
        tail = link.take_tail() if "failed" in reply else ""
    except Died as death:
        tail = link.take_tail()
        raise PluginError(hide(f"importing {location} failed: {death}{_output(tail)}", env)) from None
    finally:
        link.close()
        watchdog.close()
    if "failed" not in reply:
        return json.dumps(reply)
    if reply["failed"] == "import":
        raise PluginError(hide(reply["message"] + _output(tail), env))
    if reply["failed"] == "shape":
        raise ConfigError(f"it cannot be a filter: {hide(reply['message'], env)}")
    raise ConfigError(hide(reply["message"], env))


def _output(tail: str) -> str:
    return f"\nits last output:\n{tail}" if tail else ""


def resolve_plugin(entry: FilterEntry, location: Location, distribution: str | None) -> ResolvedFilter:
    """The resolved filter of an entry that names third-party code. Raises ConfigError or PluginError."""
    arguments = dict(entry.args)
    rounds = _rounds(entry)
    candidates = [
        {"args": scalars(arguments, r), "bare": entry.bare.value(r) if isinstance(entry.bare, Schedule) else entry.bare}
        for r in rounds
    ]
    try:
        json.dumps([{key: v for key, v in one.items()} for one in candidates], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"its arguments must be numbers, texts, lists and mappings ({error})") from error
    told = describe_plugin(
        location, candidates, env=tuple(entry.env), timeout_s=float(entry.startup_timeout_s), distribution=distribution
    )
    shape = Shape.from_row(told["shape"])
    problems = list(told["problems"])
    if shape.kind == "samples" and entry.on_error == "drop":
        problems.append("`on_error: drop` would drop the whole round for a `samples` filter, expected fail or retry")
    if problems:
        raise ConfigError("wrong arguments", problems=problems)
    given, _ = place_bare(shape, arguments, entry.bare)
    integers = shape.integers
    bound, _ = bind_scheduled(lambda values: (dict(values), []), integers, given)
    declares: Mapping[str, Any] = told["declares"]
    role: Role = "verifier" if shape.kind == "sample" else "selector"
    if declares["role"] in get_args(Role):
        role = declares["role"]
    return ResolvedFilter(
        name=entry.name,
        use=entry.use,
        key=entry.key,
        kind=shape.kind,
        role=role,
        arguments=bound,
        shape=shape,
        spec=None,
        location=location,
        target=_load_here(location) if declares["in_process"] else None,
        isolated=not declares["in_process"],
        prefix_stable=bool(declares["prefix_stable"]),
        reads=frozenset(),
        reads_scores=bool(told["reads_scores"]),
        source_hash=told["source_hash"],
        distribution=distribution,
        **long_form(entry),
    )


def _rounds(entry: FilterEntry) -> list[int]:
    """The rounds for which scheduled arguments are checked; one without schedules."""
    values = [*entry.args.values(), entry.bare]
    spans = [value.span or 1 for value in values if isinstance(value, Schedule)]
    return list(range(1, min(max(spans, default=1), 1000) + 1))


def _load_here(location: Location) -> Any:
    """Import a plug-in that declares `in_process` into this process."""
    try:
        return load_target(location.module, location.path, location.attribute)
    except NotFound as error:
        raise ConfigError(str(error)) from error
    except ImportBroken as error:
        raise PluginError(str(error)) from error
