"""The templates of `isft init`: which there are, which files each names, and how they are written.

What is written is a function of the template's name alone; no file that is there and differs is replaced unless asked.
"""

from __future__ import annotations

import difflib
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.recipes.data import FILES

SMALL = "-small"
FIRST = "minimal"
"""The template of `isft init` without a name."""
_FILE = re.compile(r"data/[\w./-]*\w")


def _folder() -> Traversable:
    return resources.files("iterative_sft_cli.recipes") / "templates"


def names() -> list[str]:
    """The templates, `minimal` first, then by name."""
    found = {entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml")}
    return sorted((name for name in found if not name.endswith(SMALL)), key=lambda name: (name != FIRST, name))


def text_of(name: str) -> str:
    """The text of `<name>.yaml`."""
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def title_of(name: str) -> str:
    """One line about a template: the first of its file."""
    return text_of(name).partition("\n")[0].removeprefix("# ")


def files_of(name: str) -> dict[str, str]:
    """Every file of a template by its path: the config, its small variant, and what they name. Raises ConfigError for an unknown name."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        raise ConfigError(
            f"there is no template `{name}`",
            expected=", ".join(names()),
            hint=f"did you mean {close[0]}?" if close else "isft init --list says what each is",
        )
    configs = [one for one in (name, name + SMALL) if (_folder() / f"{one}.yaml").is_file()]
    files = {f"{one}.yaml": text_of(one) for one in configs}
    wanted = {found for text in list(files.values()) for found in _FILE.findall(text)}
    for path, make in FILES.items():
        if any(path == one or path.startswith(f"{one}/") for one in wanted):
            files[path] = make()
    return files


def write_recipe(name: str, folder: Path, *, force: bool = False) -> list[tuple[Path, bool]]:
    """Write a template's files below `folder`; (path, whether it was written) of each, one that is there already with the same text is left.

    Raises ConfigError, before anything is written, when a file is there with other content and `force` is false.
    """
    files = files_of(name)
    there = {path: _read(folder / path) for path in files}
    other = [path for path, text in there.items() if text is not None and text != files[path]]
    if other and not force:
        raise ConfigError(
            f"{', '.join(other)} {'is' if len(other) == 1 else 'are'} there with other content; nothing was written",
            hint="go to another folder, or replace with --force",
        )
    done = []
    for path, text in files.items():
        target = folder / path
        done.append((target, there[path] != text))
        if there[path] == text:
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror or error}", where=str(target)) from error
    return done


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"is in the way: {error.strerror or error}", where=str(path)) from error
