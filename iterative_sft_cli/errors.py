"""Every error a user can meet: what happened, where, what was expected, how to mend it; one exit code a class."""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_GUARD = 3
EXIT_STORAGE = 4
EXIT_PLUGIN = 5
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class IsftError(Exception):
    """A failure that is explained to the user without a traceback.

    `what` is one sentence; `where` a config key, file or `file:line:col`; `expected` what would have been right;
    `hint` the mend, printed after `hint:`.
    """

    exit_code = EXIT_BUG

    def __init__(
        self, what: str, *, where: str | None = None, expected: str | None = None, hint: str | None = None
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.hint = hint
        super().__init__(self.render())

    def render(self) -> str:
        """The message as plain text, one paragraph."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected:
            text += f", expected {self.expected}"
        if self.hint:
            text += f"\nhint: {self.hint}"
        return text


class ConfigError(IsftError):
    """Usage or configuration is wrong; nothing was started. Exit 2.

    `problems` holds every finding, already sorted and rendered as `file:line:col: path: what, expected what.`
    """

    exit_code = EXIT_CONFIG

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        hint: str | None = None,
        problems: list[str] | None = None,
    ) -> None:
        self.problems = problems or []
        super().__init__(what, where=where, expected=expected, hint=hint)

    def render(self) -> str:
        """All problems, a line each, or the single message."""
        if not self.problems:
            return super().render()
        lines = list(self.problems)
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class GuardStop(IsftError):
    """A guard of the config ended the run at a safe point; it can be resumed. Exit 3."""

    exit_code = EXIT_GUARD


class DataError(IsftError):
    """Data, a model, the run directory or the disk cannot be used. Exit 4."""

    exit_code = EXIT_STORAGE


class StorageError(DataError):
    """The disk refused an operation (full, read-only, broken). Exit 4."""


class OutOfMemoryError(DataError):
    """Memory ran out although only one row was in the batch. Exit 4."""


class PluginError(IsftError):
    """A plug-in was found but failed: it raised, hung, exited or broke its contract. Exit 5."""

    exit_code = EXIT_PLUGIN


class Preempted(IsftError):
    """SIGTERM or SIGUSR1: saved, run the same command again. Exit 75."""

    exit_code = EXIT_PREEMPTED


class Interrupted(IsftError):
    """Ctrl-C: saved. Exit 130."""

    exit_code = EXIT_INTERRUPTED
