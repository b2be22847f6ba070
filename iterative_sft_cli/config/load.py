"""From a YAML file and overrides to a checked config: every problem at once, each with its place.

Nothing is written, nothing is imported by name, and torch is not needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iterative_sft_cli.config import rules_methods, rules_rounds  # noqa: F401  (register their rules)
from iterative_sft_cli.config.advice import warnings as advice
from iterative_sft_cli.config.availability import unavailable
from iterative_sft_cli.config.findings import Step, explain, nearest, path_of
from iterative_sft_cli.config.meant import REQUIRED, key_meant, keys_expected
from iterative_sft_cli.config.overrides import apply_override
from iterative_sft_cli.config.problems import COMMAND_LINE, InvalidConfig, Places, Problem, undotted
from iterative_sft_cli.config.rules import check, fill_placeholders
from iterative_sft_cli.config.schedule import looks_like_schedule
from iterative_sft_cli.config.schema import Config
from iterative_sft_cli.config.secrets import find_in_text, find_in_tree
from iterative_sft_cli.config.yaml_loader import Mark, read_yaml
from iterative_sft_cli.errors import ConfigError

MAX_PROBLEMS = 200
SECRET_ADVICE = "no secret in a config: name an environment variable instead"
# Stands in for required keys that are missing or wrong, so that the rest can still be checked.
_PLACEHOLDERS: dict[tuple[Step, ...], Any] = {
    ("model",): {"path": "-"},
    ("output_dir",): "-",
    ("rounds",): 1,
    ("prompts",): {"path": "-"},
    ("train",): {"start_from": "previous", "data": "replace"},
    ("train", "start_from"): "previous",
    ("train", "data"): "replace",
}

Check = Callable[[Config, Path, bool], object]
"""A further check over (config, base_dir, whether nothing else is wrong), such as that of the filters' names and arguments: it raises
ConfigError with problems that begin with the path of a key, and imports third-party modules only when nothing else is wrong."""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked config, with what it was read from.

    `source` are the user's bytes, `merged` the whole tree with defaults (what `resolved.yaml` holds), `base_dir` the folder that data
    paths are relative to, `warnings` sentences for the user.
    """

    config: Config
    source: bytes
    merged: dict[str, Any]
    base_dir: Path
    path: Path
    warnings: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict, repr=False)
    places: Places = field(default_factory=lambda: Places("config", {}), repr=False)

    @classmethod
    def from_resolved(
        cls,
        resolved: Mapping[str, Any],
        *,
        source: bytes,
        path: Path,
        output_dir: str | None = None,
        overrides: Sequence[str] = (),
        base_dir: Path | None = None,
    ) -> LoadedConfig:
        """The config of a run directory, from its merged tree. Raises InvalidConfig."""
        data = copy.deepcopy(dict(resolved))
        if output_dir is not None:
            data["output_dir"] = output_dir
        places = Places(str(path), {})
        problems = list(_overridden(data, overrides, places))
        return _resolve(data, places, problems, source, path, base_dir or path.parent, as_it_is=True)

    def with_overrides(self, overrides: Sequence[str]) -> LoadedConfig:
        """The same config with further overrides. Raises InvalidConfig."""
        data, places = copy.deepcopy(self.data), self.places.copy()
        problems = list(_overridden(data, overrides, places))
        return _resolve(data, places, problems, self.source, self.path, self.base_dir)

    def continuing(self, resolved: Mapping[str, Any]) -> LoadedConfig:
        """The same config for a run that began with `resolved`: schedules that did not change keep the span they had then."""
        before = dict(_spans(resolved, ()))

        def walk(value: Any, path: tuple[Step, ...]) -> Any:
            if isinstance(value, Mapping):
                known = before.get(path)
                if known is not None and looks_like_schedule(value) and _without_span(value) == _without_span(known):
                    return dict(known)
                return {key: walk(item, (*path, key)) for key, item in value.items()}
            return [walk(item, (*path, i)) for i, item in enumerate(value)] if isinstance(value, list) else value

        merged = walk(self.merged, ())
        config = Config.model_validate(merged)
        return LoadedConfig(
            config, self.source, config.to_tree(), self.base_dir, self.path, self.warnings, self.data, self.places
        )

    def problem(self, path: str, what: str, expected: str | None = None, meant: str | None = None) -> Problem:
        """A problem at a key such as `filters[2]`, with its place in the file."""
        return self.places.problem(undotted(path), what, expected, meant)

    def placed(self, error: ConfigError) -> ConfigError:
        """The same error with file:line:col before every finding that names a key; other errors are returned as they are."""
        found = list(_placed(error, self.places))
        return InvalidConfig(found, hint=error.hint) if found else error

    @contextmanager
    def placing_errors(self) -> Iterator[None]:
        """Inside, a ConfigError that names a key gets the key's place."""
        try:
            yield
        except ConfigError as error:
            raise self.placed(error) from error.__cause__


def load_config(path: Path, overrides: Sequence[str] = (), *, checks: Sequence[Check] = ()) -> LoadedConfig:
    """Read and check the config at `path` with `key.path=value` overrides laid over it.

    `checks` see the config unless its filters cannot be read. Raises InvalidConfig (a ConfigError) with all problems, sorted by place.
    """
    path = Path(path)
    source = _read(path)
    document = read_yaml(source)
    text = source.decode("utf-8", "replace")
    places = Places(str(path), document.places)
    problems = [
        Problem(str(path), _mark_at(text, offset), (), f"this looks like {kind}", SECRET_ADVICE)
        for offset, kind in find_in_text(text)
    ]
    problems += [Problem(str(path), fault.mark, fault.path, fault.what, fault.expected) for fault in document.faults]
    if document.data is None:
        raise InvalidConfig(problems)
    if not isinstance(document.data, dict):
        problems.append(places.problem((), "the file holds no keys", "a mapping such as `model: …`"))
        raise InvalidConfig(problems)
    data = document.data
    problems += _overridden(data, overrides, places)
    return _resolve(data, places, problems, source, path, path.parent, checks)


def parse_config(data: Mapping[str, Any], *, base_dir: Path = Path(), overrides: Sequence[str] = ()) -> LoadedConfig:
    """The same checks for a config that a program made. Raises InvalidConfig."""
    places = Places("config", {})
    tree = copy.deepcopy(dict(data))
    problems = list(_overridden(tree, overrides, places))
    return _resolve(tree, places, problems, b"", base_dir / "config", base_dir)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if path.is_dir():
            raise ConfigError("this is a folder", where=str(path), expected="a YAML file") from None
        reason = (
            "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        )
        near = nearest(path.name, [f.name for f in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else None
        hint = f"did you mean {path.parent / near}?" if near else None
        raise ConfigError(reason, where=str(path), hint=hint) from None
    except ValueError:
        raise ConfigError("this is not the path of a file", where=repr(str(path))) from None


def _mark_at(text: str, offset: int) -> Mark:
    before = text[:offset].replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    return Mark(before.count("\n") + 1, len(before) - before.rfind("\n"))


def _overridden(data: dict[str, Any], overrides: Sequence[str], places: Places) -> Iterator[Problem]:
    named: set[tuple[Step, ...]] = set()
    for text in overrides:
        for kind in {kind for _, kind in find_in_text(text)}:
            yield Problem(
                COMMAND_LINE, None, (), f"the override of {text.partition('=')[0]} looks like {kind}", SECRET_ADVICE
            )
        problem = apply_override(data, text, places, named)
        if problem is not None:
            yield problem


def _resolve(
    data: dict[str, Any],
    places: Places,
    problems: list[Problem],
    source: bytes,
    path: Path,
    base_dir: Path,
    checks: Sequence[Check] = (),
    as_it_is: bool = False,
) -> LoadedConfig:
    tainted = {problem.path for problem in problems if problem.path}
    problems += [places.problem(at, f"this looks like {kind}", SECRET_ADVICE) for at, kind in find_in_tree(data)]
    config, found = _validated(data, places, tainted)
    problems += found
    if config is None:
        raise InvalidConfig(problems)
    rules = [
        places.problem(_as_written(f.path, data), f.what, f.expected, f.meant, key=f.key)
        for f in check(config, base_dir, tainted)
    ]
    problems += rules
    said = tainted | {problem.path for problem in rules}
    for at, what, words in unavailable(config):
        if not any(path[: len(at)] == at for path in said):
            problems.append(places.problem(at, f"{what} is not available yet ({words})"))
    filled, findings = (config.output_dir, []) if as_it_is else fill_placeholders(config.output_dir, config.to_tree())
    if ("output_dir",) not in tainted:
        problems += [places.problem(f.path, f.what, f.expected, f.meant) for f in findings]
    config = config.model_copy(update={"output_dir": str(Path(filled).expanduser())})
    clean = not problems
    for one in () if any(path[0] == "filters" for path in tainted) else checks:
        try:
            one(config, base_dir, clean)
        except ConfigError as error:
            found = list(_placed(error, places))
            if not found:
                raise
            problems += found
    if problems:
        raise InvalidConfig(problems)
    return LoadedConfig(config, source, config.to_tree(), base_dir, path, list(advice(config)), data, places)


def _validated(
    data: dict[str, Any], places: Places, tainted: set[tuple[Step, ...]]
) -> tuple[Config | None, list[Problem]]:
    """The config, with what is wrong in it left out, and the problems; no config when too much is wrong."""
    problems: list[Problem] = []
    reported: set[tuple[Step, ...]] = set()
    tree = data
    for _ in range(6):
        try:
            return Config.model_validate(tree), problems
        except ValidationError as error:
            if tree is data:
                tree = copy.deepcopy(data)
            details = error.errors(include_url=False)[:MAX_PROBLEMS]
            # unknown keys first: the missing key that one was meant to be is not missing as well
            for one in sorted(details, key=lambda one: one["type"] != "extra_forbidden"):
                path = path_of(one["loc"], data)
                what, expected, meant, inner, key = explain(one)
                full = (*path, *inner)
                if one["type"] == "missing":
                    expected = REQUIRED.get(str(path[-1]))
                if one["type"] == "extra_forbidden":
                    meant = key_meant(path)
                    expected = None if meant else keys_expected(path)
                new = (
                    not any(_related(full, bad) for bad in tainted)
                    if one["type"] == "missing"
                    else full not in reported
                )
                if new and not (one["type"] == "finite_number" and full in tainted):
                    problems.append(places.problem(full, what, expected, meant, key=key))
                reported.add(full)
                # an unknown key is right in itself; the key it was meant to be is not
                tainted.add((*path[:-1], meant) if one["type"] == "extra_forbidden" and meant else full)
                _prune(tree, path, one["type"])
    return None, problems


def _related(one: tuple[Step, ...], other: tuple[Step, ...]) -> bool:
    return one[: len(other)] == other or other[: len(one)] == one


def _prune(tree: dict[str, Any], path: tuple[Step, ...], kind: str) -> None:
    """Take what is wrong out of the tree, or put something harmless in its place."""
    if path in _PLACEHOLDERS:
        steps, replacement = path, copy.deepcopy(_PLACEHOLDERS[path])
    elif len(path) >= 2 and path[0] == "filters" and isinstance(path[1], int) and kind != "extra_forbidden":
        steps, replacement = path[:2], {"use": "-", "name": f"-{path[1]}"}
    else:
        index = next((i for i, step in enumerate(path) if isinstance(step, int) and path[0] != "filters"), len(path))
        steps, replacement = path[:index], None
        if kind == "missing":
            steps = path[:-1]
    here: Any = tree
    for step in steps[:-1]:
        here = here[step] if not isinstance(here, dict) else here.get(step)
        if not isinstance(here, dict | list):
            return
    if replacement is not None:
        here[steps[-1]] = replacement
    elif isinstance(here, dict):
        here.pop(steps[-1], None)


def _as_written(path: tuple[Step, ...], data: Mapping[str, Any]) -> tuple[Step, ...]:
    """The path of a filter's argument as the file has it: below the filter's name in the short form."""
    if path[:1] == ("filters",) and len(path) > 2 and path[2] in ("args", "bare"):
        entry = data["filters"][path[1]]
        if isinstance(entry, dict) and "use" not in entry and len(entry) == 1:
            return (*path[:2], *entry, *path[3:])
    return path


def _placed(error: ConfigError, places: Places) -> Iterator[Problem]:
    """The findings of a check that knows keys but no lines."""
    if not error.problems and error.where is not None:
        try:
            yield places.problem(undotted(error.where), error.what, error.expected)
        except ValueError:
            return
    for text in error.problems:
        key, colon, what = text.partition(": ")
        try:
            yield places.problem(undotted(key) if colon else (), what if colon else text)
        except ValueError:
            yield places.problem((), text)


def _spans(value: Any, path: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if looks_like_schedule(value):
            yield path, value
        for key, item in value.items():
            yield from _spans(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _spans(item, (*path, index))


def _without_span(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != "span"}
