"""Third-party filters: imported, inspected and their arguments checked before a run starts."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iterative_sft_cli.errors import ConfigError, PluginError
from iterative_sft_cli.filters.contract import ContractBreach, bind_arguments, did_you_mean, inspect_filter, place_bare
from iterative_sft_cli.filters.resolve import Location, ResolvedFilter, bind_scheduled, long_form

if TYPE_CHECKING:
    from iterative_sft_cli.config import FilterEntry


def load_target(location: Location) -> Any:
    """Import what a location names.

    Raises ConfigError for a missing module or attribute and PluginError for an error inside the import.
    """
    module = _load_module(location)
    try:
        return getattr(module, location.attribute)
    except AttributeError:
        names = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigError(
            f"{location.path or location.module} has no attribute `{location.attribute}`."
            f"{did_you_mean(location.attribute, names)}"
        ) from None


def _load_module(location: Location) -> Any:
    if location.path is not None:
        path = Path(location.path)
        name = f"isft_filter_{hashlib.sha256(location.path.encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        # last, so that a helper beside the file is found and a file named like a library hides nothing
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise _inside(location, error) from error
        return module
    name = str(location.module)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            raise ConfigError(
                f"there is no module `{missing}`; is its package installed in {sys.prefix}? A file is named path/file.py:attr"
            ) from None
        raise _inside(location, error) from error
    except Exception as error:
        raise _inside(location, error) from error


def _inside(location: Location, error: Exception) -> PluginError:
    return PluginError(f"importing {location.path or location.module} failed: {type(error).__name__}: {error}")


def resolve_plugin(
    entry: FilterEntry, location: Location, distribution: str | None, *, base_dir: Path
) -> ResolvedFilter:
    """The resolved filter of an entry that names third-party code. Raises ConfigError or PluginError."""
    target = load_target(location)
    try:
        shape = inspect_filter(target)
    except ContractBreach as error:
        raise ConfigError(f"it cannot be a filter: {error}") from error
    given, problems = place_bare(shape, entry.args, entry.bare)

    def bind(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        return bind_arguments(target, shape, values)

    arguments, wrong = bind_scheduled(bind, [p.name for p in shape.parameters if "int" in p.annotation], given)
    if problems or wrong:
        raise ConfigError("wrong arguments", problems=problems + wrong)
    source = Path(str(sys.modules[target.__module__].__file__)).read_bytes()
    return ResolvedFilter(
        name=entry.name,
        use=entry.use,
        key=entry.key,
        kind=shape.kind,
        role=getattr(target, "role", "verifier") if shape.kind == "sample" else "selector",
        arguments=arguments,
        shape=shape,
        spec=None,
        location=location,
        target=target,
        isolated=not getattr(target, "in_process", False),
        prefix_stable=bool(getattr(target, "prefix_stable", False)),
        reads=frozenset(),
        source_hash=hashlib.sha256(source).hexdigest(),
        distribution=distribution,
        **long_form(entry),
    )
