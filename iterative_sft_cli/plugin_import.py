"""Code of others by name: an entry point, `pkg.mod:attr` or `path/file.py:attr`; each way to fail has a message of its own.

Imports nothing but the standard library and our errors: `load_target` also runs in the filters' workers, which load little.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from iterative_sft_cli.errors import ConfigError, PluginError

OURS = str(Path(__file__).resolve().parent)
FILE_MODULE = "isft_file_"
"""How the modules are called that were loaded from a file."""


class NotFound(Exception):
    """The module or the attribute does not exist: the name in the config is wrong."""


class ImportBroken(Exception):
    """The module exists and raised while it was imported."""


def find_plugin(
    use: str, *, kind: str, base_dir: Path, where: str, group: str | None = None, built_in: Sequence[str] = ()
) -> Any:
    """The object that `use` names: an entry point of `group`, `pkg.mod:attr`, or `path/file.py:attr`.

    Files and modules are looked for in `base_dir` (the config's folder), then in the current one. `kind` is the word for it in
    messages ("engine"), `built_in` the names to offer beside the entry points'.

    Raises ConfigError when it is not there, PluginError when its import raises.
    """
    target, colon, attribute = use.rpartition(":")
    if not colon:
        target, attribute = _entry_point(use, kind, group, built_in, where)
    path = None
    if target.endswith(".py"):
        path = next((str(one.resolve()) for one in (base_dir / target, Path(target)) if one.is_file()), None)
        if path is None:
            raise ConfigError(
                "no such file", where=f"{where}: {target}", hint=f"paths are relative to {base_dir.resolve()}"
            )
    with _also_on_path(base_dir):
        try:
            return load_target(target, path, attribute)
        except NotFound as error:
            raise ConfigError(str(error), where=where) from error
        except ImportBroken as error:
            raise PluginError(str(error), where=where) from error


def _entry_point(use: str, kind: str, group: str | None, built_in: Sequence[str], where: str) -> tuple[str, str]:
    """Module and attribute of the one entry point of that name. Raises ConfigError for none and for several."""
    offered = [] if group is None else list(metadata.entry_points(group=group))
    found = [point for point in offered if point.name == use]
    if len(found) > 1:
        raise ConfigError(
            f"{kind} {use!r} is offered by several packages: {', '.join(sorted(point.value for point in found))}",
            where=where,
            hint="write pkg.mod:attr",
        )
    if not found:
        names = sorted({*built_in, *(point.name for point in offered)})
        raise ConfigError(
            f"there is no {kind} {use!r}.{did_you_mean(use, names)}",
            where=where,
            expected=", ".join([*names, "pkg.mod:attr or path/file.py:attr"]),
        )
    return found[0].module, found[0].attr


@contextmanager
def _also_on_path(folder: Path) -> Iterator[None]:
    """Modules can be imported from `folder` and from the current one too; last, so that a file named like a library hides nothing."""
    before = list(sys.path)
    sys.path += [str(folder.resolve()), os.getcwd()]
    try:
        yield
    finally:
        sys.path[:] = before


def load_target(module: str | None, path: str | None, attribute: str) -> Any:
    """The function or class. Raises NotFound or ImportBroken."""
    loaded = _from_file(path) if path is not None else _from_module(str(module))
    target: Any = loaded
    for part in attribute.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            names = [name for name in dir(target) if not name.startswith("_")]
            raise NotFound(f"{path or module} has no attribute `{part}`.{did_you_mean(part, names)}") from None
    return target


def _from_file(path: str) -> ModuleType:
    name = f"{FILE_MODULE}{hashlib.sha256(path.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NotFound(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # last, so that a helper beside the file is found and a file named like a library hides nothing
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise _broken(path, error) from error
    return module


def _from_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            raise NotFound(
                f"there is no module `{missing}`; is its package installed in {sys.prefix}? "
                "A file is named path/file.py:attr"
            ) from None
        raise _broken(name, error) from error
    except BaseException as error:
        raise _broken(name, error) from error


def _broken(name: str, error: BaseException) -> ImportBroken:
    return ImportBroken(f"an error inside the import of {name}: {explain(error)}")


def explain(error: BaseException) -> str:
    """`ValueError: text (file.py:12, in f)`: the innermost line of the plug-in's own code, bounded."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be read)"
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((OURS, "<frozen importlib"))
    ]
    place = f" ({own[-1].filename}:{own[-1].lineno}, in {own[-1].name})" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({error.filename}:{error.lineno})"
    return f"{type(error).__name__}: {text[:1500]}{place}"


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """' Did you mean `x`?' or an empty string."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""
