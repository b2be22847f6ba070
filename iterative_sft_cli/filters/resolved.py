"""A filter whose name was found and whose arguments fit, with what its entry says of how it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from iterative_sft_cli.config.schedule import Schedule
from iterative_sft_cli.filters.builtin.spec import BuiltIn, Role
from iterative_sft_cli.filters.contract import Kind, Shape

if TYPE_CHECKING:
    from iterative_sft_cli.config import FilterEntry


@dataclass(frozen=True, slots=True)
class Location:
    """Where a plug-in's code is: a module (`module`) or a file (`path`), and the attribute in it."""

    attribute: str
    module: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        return f"{self.path or self.module}:{self.attribute}"


@dataclass(frozen=True)
class ResolvedFilter:
    """A filter that exists, with arguments that fit. `target` is None for one that runs in worker processes only."""

    name: str
    use: str
    key: str
    kind: Kind
    role: Role
    arguments: dict[str, Any]
    shape: Shape
    spec: BuiltIn | None
    location: Location
    target: Callable[..., Any] | None
    isolated: bool
    prefix_stable: bool
    reads: frozenset[str]
    source_hash: str
    distribution: str | None = None
    timeout_s: float = 60.0
    startup_timeout_s: float = 600.0
    workers: int | None = None
    device: str | None = None
    env: tuple[str, ...] = ()
    memory_gb: float | None = None
    on_error: str = "fail"
    reads_scores: bool = False
    notice: str | None = None

    @property
    def builtin(self) -> bool:
        """Whether it ships with isft."""
        return self.spec is not None

    @property
    def scores_only(self) -> bool:
        """Whether it keeps every sample and only adds a score."""
        return self.role == "scorer" or self.arguments.get("drop") is False

    @property
    def needs_device(self) -> bool:
        """Whether it must wait until the engine has left the accelerator."""
        if self.spec is not None and self.spec.device:
            return self.device != "cpu"
        return self.device not in (None, "cpu")

    def at_round(self, round_index: int) -> ResolvedFilter:
        """The filter with every scheduled argument replaced by its value of the round."""
        if not any(isinstance(value, Schedule) for value in self.arguments.values()):
            return self
        return replace(self, arguments=scalars(self.arguments, round_index))

    def dropping(self) -> ResolvedFilter:
        """The filter as a verifier of `eval`: with `drop: true`."""
        if self.arguments.get("drop") is False:
            return replace(self, arguments={**self.arguments, "drop": True})
        return self


def scalars(arguments: Mapping[str, Any], round_index: int) -> dict[str, Any]:
    """The arguments with schedules replaced by their values of the round."""
    return {key: v.value(round_index) if isinstance(v, Schedule) else v for key, v in arguments.items()}


def bind_scheduled(
    bind: Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]],
    integers: Sequence[str],
    arguments: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Bind arguments of which some are schedules: each round's values must fit; integer arguments get whole numbers."""
    given = {
        key: replace(value, integer=True) if isinstance(value, Schedule) and key in integers else value
        for key, value in arguments.items()
    }
    spans = [value.span or 1 for value in given.values() if isinstance(value, Schedule)]
    if not spans:
        return bind(given)
    for round_index in range(1, min(max(spans), 1000) + 1):
        _, problems = bind(scalars(given, round_index))
        if problems:
            return given, [f"{one} (in round {round_index} of its schedule)" for one in problems]
    return given, []


def long_form(entry: FilterEntry, default_on_error: str = "fail") -> dict[str, Any]:
    """The fields of the long form that a resolved filter carries."""
    return {
        "timeout_s": float(entry.timeout_s),
        "startup_timeout_s": float(entry.startup_timeout_s),
        "workers": entry.workers,
        "device": entry.device,
        "env": tuple(entry.env),
        "memory_gb": entry.memory_gb,
        "on_error": entry.on_error if "on_error" in entry.model_fields_set else default_on_error,
    }
