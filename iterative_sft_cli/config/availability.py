"""Keys and values that this version reads but cannot honour yet: using one is refused, never ignored.

Whoever implements one removes its entry here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from iterative_sft_cli.config.fields import Section
from iterative_sft_cli.config.findings import Step, show
from iterative_sft_cli.config.schedule import Schedule, to_plain
from iterative_sft_cli.config.schema import Config

NOT_YET: dict[str | tuple[str, Any], str] = {
    ("train.parallel.type", "deepspeed"): "DeepSpeed, whose checkpoints are pickles; fsdp2 cuts what its ZeRO-3 cuts",
    "train.parallel.options": "options of a strategy",
}
"""A path (any value but the default), (path, value) or (path, kind of value), and what is missing, in words."""


def unavailable(config: Config) -> Iterator[tuple[tuple[Step, ...], str, str]]:
    """(path, what is used, what is missing) of everything in `config` that is not available yet."""
    for entry, words in NOT_YET.items():
        dotted, only = entry if isinstance(entry, tuple) else (entry, None)
        path = tuple(dotted.split("."))
        value, default = _value_and_default(config, path)
        values = value.values if isinstance(value, Schedule) and value.kind == "by_round" else (value,)
        if only is None and value != default:
            yield path, "this key", words
        elif only is not None and any(
            isinstance(one, only) if isinstance(only, type) else one == only for one in values
        ):
            yield path, "a list" if only is list else show(to_plain(only)), words


def _value_and_default(config: Config, path: tuple[str, ...]) -> tuple[Any, Any]:
    section: Any = config
    for step in path[:-1]:
        section = getattr(section, step)
        if section is None:
            return None, None
    attribute = next(name for name, field in type(section).model_fields.items() if (field.alias or name) == path[-1])
    return getattr(section, attribute), default_of(type(section), attribute)


def default_of(section: type[Section], attribute: str) -> Any:
    """The value of a key that is not written; None where it is required."""
    field = section.model_fields[attribute]
    return None if field.is_required() else field.get_default(call_default_factory=True)
