"""The schema as a tree of keys: every leaf with its path, and the keys that may stand beside one another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

from pydantic.fields import FieldInfo

from iterative_sft_cli.config.fields import Section
from iterative_sft_cli.config.findings import Step
from iterative_sft_cli.config.schema import Config


@dataclass(frozen=True, slots=True)
class Leaf:
    """A key that holds a value (not only further keys). `path` has `[]` for any index; `attribute` is its Python name."""

    path: str
    section: type[Section]
    attribute: str

    @property
    def field(self) -> FieldInfo:
        """Its definition."""
        return self.section.model_fields[self.attribute]


@lru_cache(maxsize=1)
def leaves() -> tuple[Leaf, ...]:
    """Every leaf of the schema in the order of the documentation."""
    return tuple(_leaves(Config, ""))


def _leaves(section: type[Section], prefix: str) -> Iterator[Leaf]:
    for attribute, field in section.model_fields.items():
        path = f"{prefix}{field.alias or attribute}"
        inner, others, in_list = _parts(field)
        if not inner or others:
            yield Leaf(path, section, attribute)
        for sub in inner:
            yield from _leaves(sub, f"{path}[]." if in_list else f"{path}.")


def _parts(field: FieldInfo) -> tuple[list[type[Section]], bool, bool]:
    """(sections that the field may hold, whether it may hold plain values too, whether the sections stand in a list)."""
    sections: list[type[Section]] = []
    plain = in_list = False

    def look(annotation: Any, listed: bool) -> None:
        nonlocal plain, in_list
        if isinstance(annotation, type) and issubclass(annotation, Section):
            sections.append(annotation)
            in_list |= listed
            return
        arguments = [a for a in get_args(annotation) if a is not type(None)]
        if getattr(annotation, "__metadata__", None) is not None:
            arguments = arguments[:1]
        if annotation is not type(None) and (not arguments or getattr(annotation, "__origin__", None) is dict):
            plain = True
            return
        for argument in arguments:
            look(argument, listed or getattr(annotation, "__origin__", None) is list)

    look(field.annotation, False)
    return sections, plain, in_list


def section_at(path: tuple[Step, ...]) -> type[Section] | None:
    """The section that stands at a path of the config; None where there is none, or only a value."""
    section: type[Section] = Config
    for step in path:
        if isinstance(step, int):
            continue
        found = next((f for name, f in section.model_fields.items() if (f.alias or name) == step), None)
        inner = _parts(found)[0] if found is not None else []
        if not inner:
            return None
        section = inner[0]
    return section


def keys_of(section: type[Section]) -> list[str]:
    """The keys of a section, as they are written."""
    return [field.alias or name for name, field in section.model_fields.items()]


def attribute_of(section: type[Section], key: str) -> str | None:
    """The Python name of a key."""
    return next((name for name, field in section.model_fields.items() if (field.alias or name) == key), None)
