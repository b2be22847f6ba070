"""A command line from its words to its exit code, which is one of `errors.py`; what went wrong is told on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from iterative_sft_cli.app import app
from iterative_sft_cli.errors import EXIT_BUG, EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_STORAGE, ConfigError, IsftError


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code. A user's mistake is a message, a bug is a traceback."""
    try:
        from iterative_sft_cli import commands  # registers the commands

        assert commands
        result = app(args=list(argv), standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except IsftError as error:
        say_error(error)
        return error.exit_code
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("isft: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        complain(f"isft: {name}{error.strerror or error}")
        return EXIT_STORAGE
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the vendored click
            complain(f"isft: {error.format_message()}")
            complain("hint: `isft --help` lists the commands, `isft COMMAND --help` its options")
            return EXIT_CONFIG
        import traceback

        complain(traceback.format_exc().rstrip())
        complain(f"isft: this is a bug in isft, not in your config ({type(error).__name__})")
        return EXIT_BUG


def say_error(error: IsftError) -> None:
    """Print an error to stderr as one paragraph."""
    text = error.render()
    complain(text if isinstance(error, ConfigError) and error.problems else f"isft: {text}")


def complain(text: str) -> None:
    """A message on stderr, escaped and without secrets."""
    from iterative_sft_cli.config.secrets import hide
    from iterative_sft_cli.console import safe_text

    print(safe_text(hide(text)), file=sys.stderr)
