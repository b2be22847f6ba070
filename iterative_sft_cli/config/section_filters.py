"""The `filters` section: each entry is a name, a name with arguments, or the long form with its resources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, field_serializer, model_validator

from iterative_sft_cli.config.fields import Count, Positive, Section, Text, VariableName, one_text
from iterative_sft_cli.config.findings import finding, show
from iterative_sft_cli.config.schedule import Schedule, looks_like_schedule, parse_schedule, to_plain


class FilterEntry(Section):
    """One filter. `dedup`, `max_per_prompt: 4`, `regex: {pattern: x}` and `{use: regex, args: {pattern: x}}` are all entries."""

    use: Text
    """Built-in or installed name, pkg.mod:attr, or path/file.py:attr relative to this config."""
    name: Text = ""
    """Name of its score and of its line in the statistics; by default the filter's own, numbered when it is used twice."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments by name; numbers may be schedules."""
    bare: Any = None
    """First argument, given without its name."""
    timeout_s: Positive = 60.0
    """Seconds for one sample (per-sample filters) or one call (others) before the filter counts as hung."""
    startup_timeout_s: Positive = 600.0
    """Seconds for import and `setup()`."""
    workers: Count | None = None
    """Worker processes; null is one for each CPU core, or one where the filter has a `device`."""
    device: Text | None = None
    """Device of the filter's own model, such as cuda; it runs when the engine has left the GPU. Null for none."""
    env: Annotated[list[VariableName], BeforeValidator(one_text, json_schema_input_type=str | list[str] | None)] = (
        Field(default_factory=list)
    )
    """Names of environment variables passed on to it; their values are never stored."""
    memory_gb: Positive | None = None
    """Resident memory of one worker before it is ended; null for no limit."""
    on_error: Literal["fail", "drop", "retry"] = "fail"
    """What an error in the filter does: end the run, drop the sample with a reason, or try once more and then end the run."""

    _key: str = PrivateAttr(default="")

    @property
    def key(self) -> str:
        """Where it stands in the config, such as `filters[2]`."""
        return self._key

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _named({"use": value})
        if not isinstance(value, Mapping):
            return value if isinstance(value, FilterEntry) else _refuse(value)
        if "use" in value:
            entry = dict(value)
            if isinstance(entry.get("args"), Mapping):
                entry["args"] = _read_args(entry["args"], ("args",))
            if "bare" in entry:
                entry["bare"] = _read_argument(entry["bare"], ("bare",))
            return _named(entry)
        if len(value) != 1:
            if not value:
                _refuse(value)
            raise finding(
                f"a filter with {len(value)} keys and no `use`",
                expected="one filter for each list entry: a name, {name: arguments}, or {use: name, args: {...}}",
            )
        [(name, given)] = value.items()
        if given is None:
            return _named({"use": name})
        if isinstance(given, Mapping) and not looks_like_schedule(given):
            return _named({"use": name, "args": _read_args(given, (name,))})
        return _named({"use": name, "bare": _read_argument(given, (name,))})

    @field_serializer("args", "bare")
    def _to_plain(self, value: Any) -> Any:
        return to_plain(value)


def _refuse(value: Any) -> Any:
    raise finding(f"{show(value)} is not a filter", expected="a name, {name: arguments}, or {use: name, args: {...}}")


def default_name(use: str) -> str:
    """The score's name where the config gives none: the attribute, or the built-in's name."""
    return use.rpartition(":")[2] or use


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    if isinstance(entry.get("use"), str) and entry.get("name") is None:
        entry["name"] = default_name(entry["use"])
    return entry


def _read_args(args: Mapping[str, Any], at: tuple[str | int, ...]) -> dict[str, Any]:
    return {key: _read_argument(value, (*at, key)) for key, value in args.items()}


def _read_argument(value: Any, at: tuple[str | int, ...]) -> Any:
    if isinstance(value, Schedule) or not looks_like_schedule(value):
        return value
    return parse_schedule(value, at=at)
