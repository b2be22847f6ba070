"""The plug-in contract: reads a filter's signature, checks its arguments, and turns what it returns into verdicts.

Used in the main process for built-ins and in workers for plug-ins, so it imports only the standard library and `types`.
"""

from __future__ import annotations

import inspect
import json
import math
import types as pytypes
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from iterative_sft_cli.plugin_import import did_you_mean
from iterative_sft_cli.types import Verdict

Kind = Literal["sample", "group", "samples"]
KINDS: tuple[Kind, ...] = ("sample", "group", "samples")
MAX_REASON_CHARS = 80
MAX_EXTRA_BYTES = 64 * 1024


class ContractBreach(Exception):
    """A filter's signature or return value is not what the contract says; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a filter as users see it: name, annotation as text, default as text (None = required)."""

    name: str
    annotation: str
    default: str | None


@dataclass(frozen=True, slots=True)
class Shape:
    """What a filter's signature says: its kind, its arguments, and whether it wants the context."""

    kind: Kind
    parameters: tuple[Parameter, ...]
    open_ended: bool
    takes_context: bool
    is_class: bool
    positional: str | None

    @property
    def integers(self) -> list[str]:
        """Names of arguments that are whole numbers."""
        return [p.name for p in self.parameters if "int" in p.annotation.split(" | ")]

    def to_row(self) -> dict[str, Any]:
        """JSON form, sent by workers."""
        return {
            "kind": self.kind,
            "parameters": [[p.name, p.annotation, p.default] for p in self.parameters],
            "open_ended": self.open_ended,
            "takes_context": self.takes_context,
            "is_class": self.is_class,
            "positional": self.positional,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Shape:
        """The inverse of `to_row`."""
        return cls(
            kind=row["kind"],
            parameters=tuple(Parameter(*p) for p in row["parameters"]),
            open_ended=row["open_ended"],
            takes_context=row["takes_context"],
            is_class=row["is_class"],
            positional=row["positional"],
        )


def _signature(target: Any) -> inspect.Signature:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError) as error:
        raise ContractBreach(f"its signature cannot be read ({error})") from error


def _kind_of(first: inspect.Parameter | None) -> Kind:
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise ContractBreach("it takes no first parameter; name it `sample`, `group` or `samples`")
    for kind in KINDS:
        if first.name == kind:
            return kind
    raise ContractBreach(f"its first parameter is named `{first.name}`, expected `sample`, `group` or `samples`")


def inspect_filter(target: Any) -> Shape:
    """Read the shape of a function or class. A class takes its arguments in `__init__`; its `__call__` has the kind.

    Raises ContractBreach for anything that cannot be a filter.
    """
    is_class = inspect.isclass(target)
    if not callable(target):
        raise ContractBreach(f"it is a {type(target).__name__}, expected a function or a class with __call__")
    call, is_static = target, False
    if is_class:
        # not getattr: every class is callable by its metaclass
        own = next((vars(one)["__call__"] for one in target.__mro__ if "__call__" in vars(one)), None)
        if own is None:
            raise ContractBreach("the class has no __call__ method")
        is_static = isinstance(own, staticmethod)
        call = own.__func__ if isinstance(own, staticmethod | classmethod) else own
    if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
        raise ContractBreach("it is an async function; filters are plain functions")
    if inspect.isgeneratorfunction(call):
        raise ContractBreach("it is a generator function (it contains `yield`); filters return their verdicts")
    parameters = list(_signature(call).parameters.values())
    if is_class and not is_static:
        parameters = parameters[1:]
    kind = _kind_of(parameters[0] if parameters else None)
    rest = parameters[1:]
    takes_context = any(p.name == "context" for p in rest)
    if is_class:
        extra = [
            p.name
            for p in rest
            if p.name != "context" and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if extra:
            raise ContractBreach(f"its __call__ wants `{extra[0]}`; a class takes its arguments in __init__")
        rest = [p for p in _signature(target).parameters.values()] if target.__init__ is not object.__init__ else []
    hints = _type_hints(target)
    arguments, open_ended, positional = [], False, None
    for p in rest:
        if p.name == "context" and not is_class:
            continue
        if p.kind is p.VAR_KEYWORD:
            open_ended = True
        elif p.kind is p.VAR_POSITIONAL:
            raise ContractBreach(f"it takes *{p.name}; filters take named arguments")
        elif p.kind is p.POSITIONAL_ONLY:
            raise ContractBreach(f"its argument `{p.name}` is positional-only; filters take named arguments")
        else:
            positional = positional or p.name
            annotation = "" if p.annotation is p.empty else type_name(hints.get(p.name, p.annotation))
            arguments.append(Parameter(p.name, annotation, None if p.default is p.empty else repr(p.default)[:200]))
    return Shape(kind, tuple(arguments), open_ended, takes_context, is_class, positional)


def type_name(annotation: Any) -> str:
    """An annotation as users read it: `int | None`, `'exact' | 'near'`, `list[str]`."""
    if isinstance(annotation, str):
        return annotation
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(repr(one) for one in inner)
    if origin in (typing.Union, pytypes.UnionType):
        return " | ".join(type_name(one) for one in inner)
    if annotation is type(None):
        return "None"
    if origin is not None and inner:
        return f"{getattr(origin, '__name__', origin)}[{', '.join(type_name(one) for one in inner)}]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).removeprefix("typing.")


def place_bare(shape: Shape, args: Mapping[str, Any], bare: Any) -> tuple[dict[str, Any], list[str]]:
    """The arguments by name: `bare`, the scalar of `name: scalar` in the YAML, is the first after sample/group/samples."""
    given = dict(args)
    if bare is None:
        return given, []
    if shape.positional is None:
        return given, [f"it takes no argument, got {bare!r}"]
    if shape.positional in given:
        return given, [f"argument `{shape.positional}` is given twice"]
    return {**given, shape.positional: bare}, []


def bind_arguments(target: Any, shape: Shape, args: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments to call with (defaults left out), and every problem as one sentence each."""
    given = dict(args)
    problems: list[str] = []
    names = [p.name for p in shape.parameters]
    for name in given:
        if name not in names and not shape.open_ended:
            takes = f"it takes {', '.join(names)}." if names else "it takes no arguments."
            problems.append(f"unknown argument `{name}`, {takes}{did_you_mean(name, names)}")
    for parameter in shape.parameters:
        if parameter.default is None and parameter.name not in given:
            kind = f" ({parameter.annotation})" if parameter.annotation else ""
            problems.append(f"argument `{parameter.name}`{kind} is required")
    hints = _type_hints(target)
    for name, value in given.items():
        if name in names and name in hints and not matches(hints[name], value):
            problems.append(f"argument `{name}` is {value!r}, expected {type_name(hints[name])}")
    return given, problems


def _type_hints(target: Any) -> dict[str, Any]:
    holder = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(holder)
    except Exception:
        # an annotation that cannot be evaluated (a TYPE_CHECKING import) checks nothing
        return {}


def matches(annotation: Any, value: Any) -> bool:
    """Whether a YAML value fits an annotation; annotations that YAML cannot express fit everything. int fits float."""
    origin = typing.get_origin(annotation)
    if annotation is Any or annotation is inspect.Parameter.empty:
        return True
    if annotation is None or annotation is type(None):
        return value is None
    if origin in (typing.Union, pytypes.UnionType):
        return any(matches(a, value) for a in typing.get_args(annotation))
    if origin is Literal:
        return any(type(a) is type(value) and a == value for a in typing.get_args(annotation))
    if annotation is bool:
        return type(value) is bool
    if annotation is int:
        return type(value) is int
    if annotation is float:
        return type(value) in (int, float)
    if annotation is str:
        return type(value) is str
    if origin in (list, tuple, Sequence) or annotation in (list, tuple):
        inner = [a for a in typing.get_args(annotation) if a is not Ellipsis]
        return isinstance(value, list | tuple) and (not inner or all(matches(inner[0], v) for v in value))
    if origin in (dict, Mapping) or annotation is dict:
        inner = list(typing.get_args(annotation))
        return isinstance(value, Mapping) and (len(inner) < 2 or all(matches(inner[1], v) for v in value.values()))
    return True


_REJECTED = Verdict(False, None, "rejected")
_KEPT = Verdict(True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A checked verdict; `bare_float` tells that the filter returned a plain score, which somebody must read."""

    verdict: Verdict
    bare_float: bool = False


def to_outcome(value: Any) -> Outcome:
    """Check one returned value. Raises ContractBreach for everything but bool, a finite float and Verdict."""
    kind = type(value)
    if kind is Verdict:
        return Outcome(check_verdict(value))
    if kind is bool:
        return Outcome(_KEPT if value else _REJECTED)
    if kind is float:
        if not math.isfinite(value):
            raise ContractBreach(f"it returned {value}, expected a finite score")
        return Outcome(Verdict(True, value), True)
    if value is None:
        raise ContractBreach("it returned None (is a `return` missing?), expected a bool, a float or a Verdict")
    if kind is int:
        raise ContractBreach(
            f"it returned the int {value}, expected a bool, a float or a Verdict (a score is float(x), a decision bool(x))"
        )
    raise ContractBreach(f"it returned {_describe(value)}, expected a bool, a float or a Verdict")


def to_outcomes(value: Any, count: int) -> list[Outcome]:
    """Check what a `group` or `samples` filter returned: a list of `count` results, in the order of its input."""
    if type(value) not in (list, tuple):
        if value is None:
            raise ContractBreach(
                "it returned None (is a `return` missing?), expected a list of verdicts, one per sample"
            )
        raise ContractBreach(f"it returned {_describe(value)}, expected a list of verdicts, one per sample in order")
    if len(value) != count:
        raise ContractBreach(f"it returned {len(value)} verdicts for {count} samples, expected one per sample in order")
    outcomes = []
    for index, one in enumerate(value):
        try:
            outcomes.append(to_outcome(one))
        except ContractBreach as error:
            raise ContractBreach(f"verdict {index} of {count}: {error}") from error
    return outcomes


def check_verdict(verdict: Verdict) -> Verdict:
    """The verdict with plain types only. Raises ContractBreach for a reason or extra that cannot be stored."""
    score, reason, extra = verdict.score, verdict.reason, verdict.extra
    if type(verdict.keep) is not bool:
        raise ContractBreach(f"Verdict.keep is {_describe(verdict.keep)}, expected a bool")
    if score is not None:
        if type(score) not in (int, float):
            raise ContractBreach(f"Verdict.score is {_describe(score)}, expected a float or None (wrap it in float())")
        if not math.isfinite(score):
            raise ContractBreach(f"Verdict.score is {score}, expected a finite number")
    if reason is not None:
        if type(reason) is not str:
            raise ContractBreach(f"Verdict.reason is {_describe(reason)}, expected a short word")
        if len(reason) > MAX_REASON_CHARS or not reason.isprintable() or not reason:
            raise ContractBreach(
                f"Verdict.reason has {len(reason)} characters or unprintable ones, expected a short word such as "
                "`too_short`; longer text belongs into extra"
            )
    elif not verdict.keep:
        reason = "rejected"
    if extra:
        if not isinstance(extra, Mapping):
            raise ContractBreach(f"Verdict.extra is {_describe(extra)}, expected a mapping")
        try:
            text = json.dumps(dict(extra), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ContractBreach(f"Verdict.extra cannot be stored as JSON ({error})") from error
        if len(text) > MAX_EXTRA_BYTES:
            raise ContractBreach(f"Verdict.extra takes {len(text)} bytes, expected at most {MAX_EXTRA_BYTES}")
        extra = json.loads(text)
    if score is verdict.score and reason is verdict.reason and extra is verdict.extra and type(score) is not int:
        return verdict
    return Verdict(verdict.keep, None if score is None else float(score), reason, extra)


def _describe(value: Any) -> str:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"a {name}"


def make_callable(
    target: Callable[..., Any], shape: Shape, arguments: Mapping[str, Any]
) -> tuple[Callable[[Any, Any], Any], Any]:
    """(`target` as f(first, context), the instance of a class or None). A class is built and its `setup()` run, once."""
    if shape.is_class:
        instance = target(**arguments)
        setup = getattr(instance, "setup", None)
        if callable(setup):
            setup()
        if shape.takes_context:
            return lambda first, context: instance(first, context=context), instance
        return lambda first, context: instance(first), instance
    keywords = dict(arguments)
    if shape.takes_context:
        return lambda first, context: target(first, context=context, **keywords), None
    if keywords:
        return lambda first, context: target(first, **keywords), None
    return lambda first, context: target(first), None
