"""Turns the config's filter entries into callables with checked arguments, before any model loads.

Every problem of every entry is reported at once; a filter is found and right, or the run does not start.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iterative_sft_cli.errors import ConfigError, IsftError
from iterative_sft_cli.filters.builtin import NAMES, load_builtin
from iterative_sft_cli.filters.contract import bind_arguments, inspect_filter, place_bare
from iterative_sft_cli.filters.resolved import Location, ResolvedFilter, bind_scheduled, long_form
from iterative_sft_cli.filters.scores import SAMPLE_FIELDS, names_in
from iterative_sft_cli.plugin_import import did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from iterative_sft_cli.config import Config, FilterEntry

GROUP = "isft.filters"
DEVICE_KEYS = ("timeout_s", "startup_timeout_s", "workers", "device", "env", "memory_gb", "on_error")


def entry_points() -> list[EntryPoint]:
    """The installed filters of the group `isft.filters`."""
    from importlib.metadata import entry_points as installed

    return sorted(installed(group=GROUP), key=lambda point: (point.name, point.value))


def resolve_filters(
    entries: Sequence[FilterEntry], *, base_dir: Path, plugins_too: bool = True
) -> list[ResolvedFilter]:
    """The filters in list order, one for each entry; without `plugins_too` those of the package alone, and nothing is imported.

    Raises ConfigError with all problems of built-ins and names first; plug-ins are imported (in a worker) only when
    there are none. Raises PluginError when a plug-in's own import fails and nothing else is wrong.
    """
    problems: list[str] = []
    found: list[ResolvedFilter | None] = []
    plugins: list[tuple[int, FilterEntry, Location, str | None]] = []
    installed = entry_points() if entries else []
    for index, entry in enumerate(entries):
        found.append(None)
        try:
            place = locate(entry.use, base_dir=base_dir, installed=installed)
        except ConfigError as error:
            problems.append(f"{entry.key}: {error.what}")
            continue
        if place is None:
            built, wrong = _resolve_builtin(entry, base_dir)
            found[index] = built
            problems += [f"{entry.key}: {entry.use}: {one}" for one in wrong]
        else:
            location, distribution = place
            plugins.append((index, entry, location, distribution))
            problems += [f"{entry.key}: {entry.use}: {one}" for one in _check_environment(entry)]
    failure: IsftError | None = None
    if not problems and plugins_too:
        from iterative_sft_cli.filters.plugins import resolve_plugin

        for index, entry, location, distribution in plugins:
            try:
                found[index] = resolve_plugin(entry, location, distribution)
            except ConfigError as error:
                problems += [f"{entry.key}: {entry.use}: {one}" for one in error.problems or [error.what]]
            except IsftError as error:
                failure = failure or error
    named = _name_all(entries, found, problems)
    # a name may be that of a filter that could not be resolved
    problems += _check_scores(named, {entry.name for entry, one in zip(entries, found, strict=True) if one is None})
    if problems:
        raise ConfigError("the filters cannot be used", problems=problems)
    if failure is not None:
        raise failure
    return named


def check_filters(config: Config, base_dir: Path, clean: bool) -> None:
    """A check for `load_config`: names and arguments of the filters; plug-ins are imported only when the rest of the config is `clean`."""
    resolve_filters(config.filters, base_dir=base_dir, plugins_too=clean)


def locate(use: str, *, base_dir: Path, installed: Sequence[EntryPoint]) -> tuple[Location, str | None] | None:
    """Where `use` points, with the distribution that installed it; None for a built-in.

    Raises ConfigError for an unknown name, a clash of names, and a file that does not exist.
    """
    head, colon, attribute = use.rpartition(":")
    if colon and (head.endswith(".py") or "/" in head or os.sep in head):
        path = Path(head) if Path(head).is_absolute() else base_dir / head
        if not path.is_file() and not Path(head).is_absolute() and Path(head).is_file():
            path = Path(head)
        if not path.is_file():
            raise ConfigError(f"{use}: there is no file {head} beside the config ({base_dir})")
        return Location(attribute, path=str(path.resolve())), None
    if colon:
        if not all(part.isidentifier() for part in head.split(".")) or not attribute.isidentifier():
            raise ConfigError(f"`{use}` is not a place, expected pkg.mod:attr or path/file.py:attr")
        return Location(attribute, module=head), None
    claims = [point for point in installed if point.name == use]
    if (use in NAMES) + len(claims) > 1:
        owners = ["a built-in filter"] if use in NAMES else []
        owners += [f"{distribution_of(point) or 'a package'} ({point.value})" for point in claims]
        raise ConfigError(
            f"the name `{use}` clashes: it is {' and '.join(owners)}; write pkg.mod:attr for the one you mean"
        )
    if use in NAMES:
        return None
    if claims:
        module, _, attribute = claims[0].value.partition(":")
        return Location(attribute.split("[")[0].strip(), module=module.strip()), distribution_of(claims[0])
    if use.endswith(".py") or "/" in use:
        raise ConfigError(f"`{use}` does not say which function, expected path/file.py:attr")
    known = sorted({*NAMES, *(point.name for point in installed)})
    raise ConfigError(
        f"there is no filter named `{use}`.{did_you_mean(use, known)} Built in: {', '.join(NAMES)}. "
        "Others are named pkg.mod:attr or path/file.py:attr"
    )


def distribution_of(point: EntryPoint) -> str | None:
    """`name version` of the package that installed an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else None


@lru_cache(maxsize=64)
def _builtin_hash(name: str) -> str:
    import hashlib
    import sys

    target, _ = load_builtin(name)
    source = Path(str(sys.modules[target.__module__].__file__)).read_bytes()
    return hashlib.sha256(source).hexdigest()


def _resolve_builtin(entry: FilterEntry, base_dir: Path) -> tuple[ResolvedFilter | None, list[str]]:
    target, spec = load_builtin(entry.use)
    shape = inspect_filter(target)
    given, problems = place_bare(shape, entry.args, entry.bare)

    def bind(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        bound, wrong = bind_arguments(target, shape, values)
        if not wrong and spec.check is not None:
            try:
                spec.check(bound)
            except ValueError as error:
                wrong = [str(error)]
        return bound, wrong

    arguments, wrong = bind_scheduled(bind, shape.integers, given)
    problems += wrong
    fields = type(entry).model_fields
    for option in sorted(
        name for name in DEVICE_KEYS if getattr(entry, name) != fields[name].get_default(call_default_factory=True)
    ):
        if option not in spec.honours:
            problems.append(f"`{option}` has no effect on this built-in, which runs in the main process; remove it")
    problems += _check_environment(entry)
    required = spec.requires + (spec.requires_if(arguments) if spec.requires_if and not problems else ())
    for module, extra in required:
        if importlib.util.find_spec(module) is None:
            problems.append(f"it needs the library {module}: pip install 'iterative-sft-cli[{extra}]'")
    for option in spec.paths:
        if arguments.get(option) is not None:
            place = find_path(str(arguments[option]), base_dir, hub=spec.hub)
            if place is None:
                problems.append(f"there is no file {arguments[option]} (`{option}`) beside the config ({base_dir})")
            arguments = {**arguments, option: place}
    if problems:
        return None, problems
    variant = spec.variant(arguments) if spec.variant else None
    if variant is not None:
        target, shape = variant, inspect_filter(variant)
        arguments = {key: value for key, value in arguments.items() if key in {p.name for p in shape.parameters}}
    stable = spec.prefix_stable(arguments) if callable(spec.prefix_stable) else spec.prefix_stable
    reads = {name for key in spec.expressions for name in names_in(str(arguments.get(key, "")))}
    return (
        ResolvedFilter(
            name=entry.name,
            use=entry.use,
            key=entry.key,
            kind=shape.kind,
            role=spec.role,
            arguments=arguments,
            shape=shape,
            spec=spec,
            location=Location(entry.use, module=target.__module__),
            target=target,
            isolated=spec.isolated,
            prefix_stable=stable,
            reads=frozenset(reads),
            source_hash=_builtin_hash(entry.use),
            notice=spec.notice(arguments) if spec.notice else None,
            **long_form(entry, spec.default_on_error),
        ),
        [],
    )


def find_path(text: str, base_dir: Path, *, hub: bool) -> str | None:
    """An absolute path for what exists beside the config or here; a hub id stays as it is; None for a missing file."""
    for place in (base_dir / text, Path(text)):
        if place.exists():
            return str(place.resolve())
    looks_local = Path(text).is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    return text if hub and not looks_local else None


def _check_environment(entry: FilterEntry) -> list[str]:
    return [
        f"the environment variable {name} (listed in `env`) is not set" for name in entry.env if name not in os.environ
    ]


def _name_all(
    entries: Sequence[FilterEntry], found: Sequence[ResolvedFilter | None], problems: list[str]
) -> list[ResolvedFilter]:
    """Number default names that repeat (threshold, threshold_2); a repeated `name:` is a problem."""
    taken: dict[str, str] = {}
    named: list[ResolvedFilter] = []
    for entry, one in zip(entries, found, strict=True):
        default = entry.use.rpartition(":")[2] or entry.use
        name, count = entry.name, 1
        while name in taken:
            if entry.name != default:
                problems.append(f"{entry.key}: the name `{name}` is already that of {taken[name]}")
                break
            count += 1
            name = f"{default}_{count}"
        taken[name] = entry.key
        if one is not None:
            named.append(replace(one, name=name) if name != one.name else one)
    return named


def _check_scores(filters: Sequence[ResolvedFilter], unresolved: set[str]) -> list[str]:
    """A name in `by` must be an earlier filter's, or one of the sample's own numbers; names of `unresolved` filters are let pass."""
    problems: list[str] = []
    for index, one in enumerate(filters):
        before = [earlier.name for earlier in filters[:index]]
        for name in sorted(one.reads):
            if name in before or name in SAMPLE_FIELDS or name in unresolved:
                continue
            later = [other.name for other in filters[index:]]
            why = "comes from a later filter" if name in later else "is no earlier filter's score"
            known = [*before, *SAMPLE_FIELDS]
            problems.append(f"{one.key}: {one.use}: `{name}` {why}.{did_you_mean(name, known)}")
    return problems


def unread_scores(filters: Sequence[ResolvedFilter], scores_read: set[str] | frozenset[str]) -> list[str]:
    """Names of filters that only score although nothing reads the score; a plug-in whose code mentions `scores` reads all."""
    unread: list[str] = []
    for index, one in enumerate(filters):
        if one.scores_only and one.name not in scores_read and not is_read(one.name, filters[index + 1 :]):
            unread.append(one.name)
    return unread


def is_read(name: str, later: Sequence[ResolvedFilter]) -> bool:
    """Whether one of the later filters reads the score `name`."""
    return any(name in other.reads or other.reads_scores for other in later)


def describe(one: ResolvedFilter) -> Mapping[str, Any]:
    """What a run records of a filter: enough to see that it changed."""
    return {
        "name": one.name,
        "use": one.use,
        "kind": one.kind,
        "arguments": one.arguments,
        "source_hash": one.source_hash,
        "distribution": one.distribution,
    }
