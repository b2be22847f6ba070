"""`isft docs`: the pages inside the package, on the terminal or as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from iterative_sft_cli.app import AsJson, app, print_json

HELP_WIDTH = 100


@app.command()
def docs(
    topic: Annotated[
        str | None, typer.Argument(metavar="[TOPIC]", help="A topic; without one they are listed.", show_default=False)
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="DIR", help="Write all pages as Markdown files into DIR.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Print a page of the documentation, or list the topics."""
    from iterative_sft_cli.report.documents import TOPICS, page, title_of
    from iterative_sft_cli.report.screen import say, screen, table

    if write is not None:
        write.mkdir(parents=True, exist_ok=True)
        for name in TOPICS:
            (write / f"{name}.md").write_text(page(name, help_texts()), encoding="utf-8")
        say(f"{write}: {len(TOPICS)} pages")
        return 0
    if topic is None:
        if as_json:
            print_json([{"topic": name, "title": title_of(name)} for name in TOPICS])
        else:
            screen().print(table((("topic", "left"), ("", "left")), [(name, title_of(name)) for name in TOPICS]))
        return 0
    text = page(topic, help_texts() if topic == "cli" else None)
    if as_json:
        print_json({"topic": topic, "markdown": text})
        return 0
    rich = screen()
    if rich.is_terminal:
        from rich.markdown import Markdown

        rich.print(Markdown(text))
    else:
        print(text, end="")
    return 0


def help_texts() -> dict[str, str]:
    """The help of every command, by its name; a group's commands one by one."""
    return dict(_walk(command_tree(), []))


def command_tree() -> Any:
    """The commands as the parser knows them."""
    return typer.main.get_command(app)


def _walk(command: Any, path: list[str]) -> Iterator[tuple[str, str]]:
    inner = getattr(command, "commands", None)
    if inner:
        for name, one in inner.items():
            yield from _walk(one, [*path, name])
        return
    name = " ".join(path)
    context = command.context_class(
        command, info_name=f"isft {name}", terminal_width=HELP_WIDTH, max_content_width=HELP_WIDTH
    )
    yield name, command.get_help(context)
