"""Schedules: a scalar that changes from round to round, whose value is a pure function of the round.

A schedule keeps the span it was written for: when `rounds` is raised later, earlier rounds keep their values and the added rounds hold
the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from iterative_sft_cli.config.findings import finding, finding_from, show, what_is

SCHEDULE_KEYS = frozenset({"by_round", "linear", "start", "factor", "add", "max", "min", "span"})
_HEADS = ("by_round", "linear", "start")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A value for every round, counted from 1.

    `kind` is "by_round" (`values[r - 1]`), "linear" (from `values[0]` in round 1 to `values[1]` in round `span`), "factor"
    (`values[0] * values[1] ** (r - 1)`) or "add" (`values[0] + values[1] * (r - 1)`); `max` and `min` bound the last two. `span` is the
    number of rounds it was written for (None until the config is bound); after it the last value holds. `integer` rounds half up.
    """

    kind: str
    values: tuple[Any, ...]
    max: float | None = None
    min: float | None = None
    span: int | None = None
    integer: bool = False

    def value(self, round_index: int) -> Any:
        """The scalar of a round; rounds before 1 behave like 1, rounds after the span like its last."""
        position = max(round_index, 1) - 1
        if self.span is not None:
            position = min(position, self.span - 1)
        if self.kind == "by_round":
            return self.values[min(position, len(self.values) - 1)]
        first, second = self.values
        if self.kind == "linear":
            whole = (self.span or 1) - 1
            share = position / whole if whole else 0.0
            number = second if share == 1.0 else first + (second - first) * share
        elif self.kind == "factor":
            try:
                number = first * float(second) ** position
            except OverflowError:
                number = math.copysign(math.inf, first)
        else:
            number = first + second * position
        if self.max is not None:
            number = min(number, self.max)
        if self.min is not None:
            number = max(number, self.min)
        if not math.isfinite(number):
            return number
        if self.integer:
            return math.floor(number + 0.5)
        if isinstance(number, float) and number.is_integer() and self._only_integers():
            return int(number)
        return number

    def _only_integers(self) -> bool:
        return all(isinstance(value, int) for value in self.values)

    def bound(self, rounds: int) -> Schedule:
        """The same schedule with its span fixed to `rounds`, unless it already has one."""
        if self.span is not None:
            return self
        return replace(self, span=len(self.values) if self.kind == "by_round" else rounds)

    def to_tree(self) -> dict[str, Any]:
        """The YAML form, with the span: what `resolved.yaml` holds."""
        if self.kind == "by_round":
            return {"by_round": list(self.values)}
        tree: dict[str, Any]
        if self.kind == "linear":
            tree = {"linear": list(self.values)}
        else:
            tree = {"start": self.values[0], self.kind: self.values[1]}
            if self.max is not None:
                tree["max"] = self.max
            if self.min is not None:
                tree["min"] = self.min
        if self.span is not None:
            tree["span"] = self.span
        return tree


def looks_like_schedule(value: Any) -> bool:
    """Whether a mapping is meant as a schedule: only schedule keys, and at least one of by_round, linear, or start with a partner."""
    if not isinstance(value, Mapping) or not value or not set(value) <= SCHEDULE_KEYS:
        return False
    return "by_round" in value or "linear" in value or ("start" in value and ("factor" in value or "add" in value))


def parse_schedule(value: Mapping[str, Any], *, integer: bool = False, at: tuple[str | int, ...] = ()) -> Schedule:
    """Read the YAML form; raises a finding that names the faulty key."""
    unknown = sorted(str(key) for key in value if key not in SCHEDULE_KEYS)
    if unknown:
        raise finding(
            "unknown key in a schedule",
            expected="{by_round}, {linear} or {start, factor | add, max}",
            at=(*at, unknown[0]),
            key=True,
        )
    heads = [key for key in _HEADS if key in value]
    if len(heads) != 1:
        what = (
            f"a schedule with both {' and '.join(heads)}" if heads else "a schedule without by_round, linear or start"
        )
        raise finding(what, expected="exactly one of by_round, linear and start", at=at)
    head = heads[0]
    allowed = {
        "by_round": {"by_round"},
        "linear": {"linear", "span"},
        "start": {"start", "factor", "add", "max", "min", "span"},
    }[head]
    for key in value:
        if key not in allowed:
            raise finding(
                f"{key} has no meaning beside {head}",
                expected=f"only {', '.join(sorted(allowed))}",
                at=(*at, key),
                key=True,
            )
    span = value.get("span")
    if span is not None and (type(span) is not int or span < 1):
        raise finding(what_is(span), expected="an integer of at least 1", at=(*at, "span"))
    if head == "by_round":
        items = value["by_round"]
        if not isinstance(items, list) or not items:
            raise finding(what_is(items), expected="one value for each round", at=(*at, "by_round"))
        return Schedule("by_round", tuple(items), span=len(items), integer=integer)
    if head == "linear":
        ends = value["linear"]
        if not isinstance(ends, list) or len(ends) != 2:
            raise finding(
                what_is(ends),
                expected="[value in round 1, value in the last round]",
                at=(*at, "linear"),
            )
        first, last = (_number(end, (*at, "linear", index)) for index, end in enumerate(ends))
        return Schedule("linear", (first, last), span=span, integer=integer)
    steps = [key for key in ("factor", "add") if key in value]
    if len(steps) != 1:
        raise finding(
            f"start with {'both factor and add' if steps else 'neither factor nor add'}",
            expected="exactly one of factor and add",
            at=at,
        )
    if steps == ["factor"] and isinstance(value["factor"], int | float) and not value["factor"] > 0:
        raise finding(f"{show(value['factor'])} is too small", expected="more than 0", at=(*at, "factor"))
    start, step = _number(value["start"], (*at, "start")), _number(value[steps[0]], (*at, steps[0]))
    bounds = {key: None if value.get(key) is None else _number(value[key], (*at, key)) for key in ("max", "min")}
    return Schedule(steps[0], (start, step), max=bounds["max"], min=bounds["min"], span=span, integer=integer)


def _number(value: Any, at: tuple[str | int, ...]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise finding(what_is(value), expected="a number", at=at)
    return value


def _is_integer_schema(schema: Any) -> bool:
    """Whether a core schema accepts integers and no other number."""
    while isinstance(schema, dict):
        if schema.get("type") == "int":
            return True
        schema = schema.get("schema")
    return False


class OverRounds:
    """Annotation that lets a field hold a `Schedule`; type checkers see the scalar, which is what `Config.at_round` leaves there."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner = handler(source)
        integer = _is_integer_schema(inner)

        def validate(value: Any, scalar: Callable[[Any], Any]) -> Any:
            if isinstance(value, Schedule):
                return value
            if not isinstance(value, Mapping) or not set(value) & SCHEDULE_KEYS:
                return scalar(value)
            return _checked(parse_schedule(value, integer=integer), scalar)

        return core_schema.no_info_wrap_validator_function(
            validate, inner, serialization=core_schema.plain_serializer_function_ser_schema(to_plain)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        scalar: dict[str, Any] = handler(schema)
        outside: dict[str, Any] = {key: scalar.pop(key) for key in ("default", "title") if key in scalar}
        return {**outside, "anyOf": [scalar, {"x-ref": "Schedule"}]}


def _checked(schedule: Schedule, scalar: Callable[[Any], Any]) -> Schedule:
    """Check every value that a schedule gives with the field's own rules; the other kinds are monotone, so their ends suffice."""
    if schedule.kind == "by_round":
        values = []
        for index, value in enumerate(schedule.values):
            try:
                values.append(scalar(value))
            except ValidationError as error:
                raise finding_from(error, at=("by_round", index)) from None
        return replace(schedule, values=tuple(values))
    ends: list[tuple[Any, tuple[str | int, ...]]] = [
        (schedule.value(1), (("linear", 0) if schedule.kind == "linear" else ("start",)))
    ]
    if schedule.kind == "linear":
        ends.append((replace(schedule, span=2).value(2), ("linear", 1)))
    checked = []
    for value, at in ends:
        try:
            checked.append(scalar(value))
        except ValidationError as error:
            raise finding_from(error, at=at) from None
    if schedule.integer or schedule.max is not None or schedule.min is not None:
        return schedule
    return replace(schedule, values=(*checked, *schedule.values[len(checked) :]))


def to_plain(value: Any) -> Any:
    """JSON-able form of a field's value."""
    if isinstance(value, Schedule):
        return value.to_tree()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


T = TypeVar("T")
Scheduled = Annotated[T, OverRounds()]
"""A scalar of type T, or a schedule of such scalars over the rounds."""
