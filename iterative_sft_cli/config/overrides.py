"""`key.path=value` from the command line, laid over a file: the last one wins, and its value is read as the file's would be."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from iterative_sft_cli.config.findings import Step
from iterative_sft_cli.config.problems import COMMAND_LINE, Places, Problem, dotted, undotted
from iterative_sft_cli.config.schedule import looks_like_schedule
from iterative_sft_cli.config.section_filters import FilterEntry
from iterative_sft_cli.config.yaml_loader import read_scalar, read_yaml

# A text there stands for a mapping with this one key.
SHORT_FORMS: dict[tuple[str, ...], str] = {
    ("model",): "path",
    ("model", "adapter"): "type",
    ("warmup",): "path",
    ("prompts", "answer"): "column",
    ("prompts", "dataset"): "id",
    ("prompts", "reasoning_gym"): "task",
    ("eval", "answer"): "column",
    ("eval", "dataset"): "id",
    ("eval", "reasoning_gym"): "task",
    ("train", "mix", "dataset"): "id",
    ("warmup", "dataset"): "id",
    ("train", "parallel"): "type",
}
# Naming one of these on the command line takes the place of the others in the file.
ALTERNATIVES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("model",), ("path", "init", "use")),
    (("prompts",), ("path", "dataset", "reasoning_gym", "use")),
    (("eval",), ("path", "dataset", "reasoning_gym", "use")),
    (("train", "mix"), ("path", "dataset")),
    (("warmup",), ("path", "dataset")),
    (("train",), ("epochs", "steps")),
    (("warmup",), ("epochs", "steps")),
)


def apply_override(data: dict[str, Any], text: str, places: Places, named: set[tuple[Step, ...]]) -> Problem | None:
    """Lay one override over `data`, in place. `named` collects the paths that were overridden; returns what is wrong with it."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals:
        return Problem(
            COMMAND_LINE, None, (), f"{text!r} is not an override", "key.path=value, such as generate.temperature=0.7"
        )
    try:
        path = undotted(key)
    except ValueError:
        return Problem(
            COMMAND_LINE,
            None,
            (),
            f"{key!r} is not the path of a key",
            "key.path=value, such as filters[0].timeout_s=5",
        )
    value, problem = read_value(raw, path)
    if problem is not None:
        return problem
    path = _filter_argument(data, path)
    if isinstance(value, str) and path in SHORT_FORMS and isinstance(_find(data, path), dict):
        path = (*path, SHORT_FORMS[path])  # type: ignore[index]
    changed = _put(data, path, value)
    if isinstance(changed, Problem):
        return changed
    places.override(changed)
    named.add(path)
    for parent, names in ALTERNATIVES:
        if (
            path[: len(parent)] == parent
            and len(path) > len(parent)
            and path[len(parent)] in names
            and value is not None
        ):
            section = _find(data, parent)
            for name in names:
                if name != path[len(parent)] and not any(
                    other[: len(parent) + 1] == (*parent, name) for other in named
                ):
                    section.pop(name, None)
    return None


def read_value(text: str, path: tuple[Step, ...]) -> tuple[Any, Problem | None]:
    """A value: a [list], {mapping} or quoted text as in YAML, anything else as one plain scalar."""
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        try:
            return read_scalar(text), None
        except ValueError:
            return None, Problem(COMMAND_LINE, None, path, "an integer beyond 64 bits", "a smaller number")
    document = read_yaml(text.encode("utf-8", "surrogatepass"))
    if document.faults:
        fault = document.faults[0]
        what = f"{fault.what} (character {fault.mark.column})"
        return None, Problem(COMMAND_LINE, None, (*path, *fault.path), what, fault.expected)
    return document.data, None


def _filter_argument(data: dict[str, Any], path: tuple[Step, ...]) -> tuple[Step, ...]:
    """`filters[1].min` and `filters[1].threshold.min` mean the argument `min` of entry 1, in whichever form that entry stands."""
    if len(path) < 3 or path[0] != "filters" or not isinstance(path[1], int):
        return path
    entry, key = _find(data, path[:2]), path[2]
    if not isinstance(key, str) or key in FilterEntry.model_fields:
        return path
    use = entry if isinstance(entry, str) else entry.get("use") if isinstance(entry, dict) else None
    if use is None and isinstance(entry, dict) and len(entry) == 1:
        use = next(iter(entry))
    # a name that is nearly one of the long form's is told as that, not as an argument
    if use is None or get_close_matches(key, FilterEntry.model_fields, n=1, cutoff=0.75):
        return path
    in_short_form = isinstance(entry, dict) and "use" not in entry
    if path[2:] == (use,):
        return path if in_short_form or isinstance(entry, str) else (*path[:2], "bare")
    inner = path[3:] if key == use else path[2:]
    return (*path[:2], use if in_short_form and isinstance(entry[use], dict) else "args", *inner)


def _find(data: Any, path: tuple[Step, ...]) -> Any:
    for step in path:
        if isinstance(data, dict) and isinstance(step, str):
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            return None
    return data


def _put(data: dict[str, Any], path: tuple[Step, ...], value: Any) -> Problem | tuple[Step, ...]:
    """Write a value; returns the path of what came to be new, or what is wrong."""
    here: Any = data
    new: tuple[Step, ...] | None = None
    for index, step in enumerate(path):
        last = index == len(path) - 1
        if isinstance(step, int):
            if not isinstance(here, list) or step >= len(here):
                what = f"there is no entry {step}" if isinstance(here, list) else "this is not a list"
                expected = f"an index below {len(here)}" if isinstance(here, list) and here else None
                return Problem(COMMAND_LINE, None, path[: index + 1], what, expected)
            if last:
                here[step] = value
            else:
                here, new = _enter(here, step, path, index, new)
        else:
            if not isinstance(here, dict):
                return Problem(
                    COMMAND_LINE, None, path[: index + 1], f"{dotted(path[:index])} is a list", "an index, such as [0]"
                )
            if last:
                here[step] = value
            else:
                here, new = _enter(here, step, path, index, new)
    return new or path


def _enter(
    here: Any, step: Any, path: tuple[Step, ...], index: int, new: tuple[Step, ...] | None
) -> tuple[Any, tuple[Step, ...] | None]:
    """The part below `step`, made if need be; and the path from which on everything is new."""
    before = here[step] if isinstance(here, list) else here.get(step)
    here[step] = inside = _section(before, path[: index + 1], path[index + 1])
    kept = before is inside or (isinstance(inside, dict) and before in inside.values())
    return inside, new if new is not None or kept else path[: index + 1]


def _section(value: Any, path: tuple[Step, ...], below: Step) -> Any:
    """What an override goes into: the mapping or list that is there, the mapping a short form stands for, or a new one."""
    if len(path) == 2 and path[0] == "filters":
        return _filter_section(value, below)
    if isinstance(value, dict | list):
        return value
    if isinstance(value, str) and path in SHORT_FORMS:
        return {SHORT_FORMS[path]: value}  # type: ignore[index]
    return {} if isinstance(below, str) else []


def _filter_section(value: Any, below: Step) -> Any:
    """A filter entry that `below` can be written into: its short form where that names the filter, else its long form."""
    if isinstance(value, str):
        return {} if below == value else {"use": value}
    if not isinstance(value, dict) or "use" in value or len(value) != 1 or below in value:
        return value if isinstance(value, dict) else {}
    [(use, given)] = value.items()
    if given is None:
        return {"use": use}
    plain = isinstance(given, dict) and not looks_like_schedule(given)
    return {"use": use, "args": given} if plain else {"use": use, "bare": given}
