"""`isft init`: writes a config to start from, with every file it names, or a filter to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iterative_sft_cli.app import AsJson, app, echo, print_json
from iterative_sft_cli.errors import ConfigError


@app.command()
def init(
    template: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEMPLATE]",
            help="A method, such as star or rest-em; minimal by default. With --filter: the file to write.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the templates, a line each.")] = False,
    filter_: Annotated[bool, typer.Option("--filter", help="Write a filter to change, with its test.")] = False,
    into: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Write here instead of the current folder.")
    ] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there with other content.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write a config to start from: a published method at the paper's settings and at a size for a CPU, with every file they name."""
    from iterative_sft_cli.recipes import names, title_of

    if list_:
        return _list({name: title_of(name) for name in names()}, as_json)
    if filter_:
        return _write_filter(into / (template or "my_filter.py"), force, as_json)
    return _write(template or names()[0], into, force, as_json)


def _list(titles: dict[str, str], as_json: bool) -> int:
    if as_json:
        print_json(titles)
        return 0
    width = max(map(len, titles))
    for name, title in titles.items():
        echo(f"{name:<{width}}  {title}")
    return 0


def _write_filter(path: Path, force: bool, as_json: bool) -> int:
    from iterative_sft_cli.filters.starter import write_starter

    if force:
        raise ConfigError("--force has no effect with --filter: a filter that is there may hold work")
    write_starter(path)
    if as_json:
        print_json({"files": [str(path)], "next": f"isft filters show {path}:keep_short"})
    else:
        echo(str(path))
        _say(f"next: pytest {path}")
        _say(f"      then name it in a config: filters: [{path.name}:keep_short]")
    return 0


def _write(name: str, folder: Path, force: bool, as_json: bool) -> int:
    from iterative_sft_cli.recipes import write_recipe

    done = write_recipe(name, folder, force=force)
    config, small = folder / f"{name}.yaml", folder / f"{name}-small.yaml"
    first = small if any(path == small for path, _ in done) else config
    if as_json:
        files = [str(path) for path, _ in done]
        print_json({"template": name, "files": files, "next": f"isft train {first}"})
        return 0
    for path, written in done:
        echo(str(path) if written else f"{path} (there already)")
    _say(
        f"next: isft train {first}      (offline, minutes on a CPU)" if first == small else f"next: isft train {first}"
    )
    if first == small:
        _say(f"      isft plan {config}")
    return 0


def _say(text: str) -> None:
    import sys

    print(text, file=sys.stderr)
