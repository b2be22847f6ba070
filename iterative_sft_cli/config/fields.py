"""Building blocks of the schema: the frozen section and the scalar types with their short forms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StringConstraints, Tag

from iterative_sft_cli.config.findings import finding, show


class Section(BaseModel):
    """A mapping of the config: frozen, and with no key that the schema does not know."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        defer_build=True,
        use_attribute_docstrings=True,
        validate_by_name=True,
        validate_by_alias=True,
    )


def _whole(value: Any) -> Any:
    """Accept 1e3 where an integer is wanted."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _none_word(value: Any) -> Any:
    """`none` as a word means the same as null."""
    return None if value == "none" else value


def one_text(value: Any) -> Any:
    """A single text is a list of one; `none` and null are no entries."""
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str) else value


def _reference(value: Any) -> Any:
    """`pkg.mod:attr` or `path/file.py:attr`."""
    if isinstance(value, str) and not re.fullmatch(r"[^:\s]+(?:/[^:]*)?:[A-Za-z_][\w.]*", value):
        raise finding(f"{show(value)} does not name an attribute", expected="pkg.mod:attr or path/file.py:attr")
    return value


def _variable_name(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise finding(
            "this is not the name of an environment variable",
            expected="a name such as OPENAI_API_KEY, without its value",
        )
    return value


def word_or_number(value: Any) -> str:
    """Discriminates a word from a number."""
    return "<word>" if isinstance(value, str) else "<number>"


def shape(value: Any) -> str:
    """Discriminates a scalar, a list and a mapping."""
    if isinstance(value, Mapping | BaseModel):
        return "<mapping>"
    return "<list>" if isinstance(value, list) else "<scalar>"


WordTag, NumberTag = Tag("<word>"), Tag("<number>")
ScalarTag, ListTag, MappingTag = Tag("<scalar>"), Tag("<list>"), Tag("<mapping>")
WordOrNumber, ByShape = Discriminator(word_or_number), Discriminator(shape)

Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
"""An integer of at least 1; 1e3 is one."""
CountFromZero = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
"""An integer of at least 0."""
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Text = Annotated[str, StringConstraints(min_length=1)]
"""Text with at least one character."""
Texts = Annotated[list[Text], BeforeValidator(one_text, json_schema_input_type=str | list[str] | None)]
"""A list of texts; a single text is a list of one."""
Reference = Annotated[Text, BeforeValidator(_reference)]
"""`pkg.mod:attr` or `path/file.py:attr`."""
VariableName = Annotated[Text, BeforeValidator(_variable_name)]
"""The name of an environment variable."""
NoneWord = BeforeValidator(_none_word)
"""Reads the word `none` as null."""
