"""How a run stands: complete, running, stopped and why, or killed; and how far it is. Read without the lock, while others write."""

from __future__ import annotations

import json
import shlex
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from iterative_sft_cli import system
from iterative_sft_cli.report.paging import read_seal
from iterative_sft_cli.rundir import RunView, layout
from iterative_sft_cli.rundir.fs import read_bytes
from iterative_sft_cli.samples import EVAL, GENERATED, PROMPTS, TRAIN, VERDICTS

COMPLETE, RUNNING, STOPPED, KILLED, NEW = "complete", "running", "stopped", "killed", "not started"


@dataclass(frozen=True, slots=True)
class Status:
    """`state` is one of complete, running, stopped, killed, not started; `phase` says what the newest round is at."""

    state: str
    reason: str
    exit_code: int | None
    next_command: str | None
    holder: str | None
    last_sign_s: float | None
    rounds_done: int
    rounds: int
    phase: str | None

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def status_of(view: RunView, config: Any) -> Status:
    """The status of a run whose config is `config`."""
    done = sum(1 for row in view.stats_rows() if row["round"] > 0)
    state, reason, holder = KILLED, "its process ended without a word", None
    code, then = None, f"isft resume {shlex.quote(str(view.path))}"
    outcome = view.outcome
    if view.finished and done < int(config.rounds):
        state, reason, then = STOPPED, f"{done} of {config.rounds} rounds are done", then
    elif view.finished:
        state, reason, code, then = COMPLETE, "complete", 0, ""
    elif outcome is not None:
        state, reason, code = STOPPED, str(outcome.get("reason")), outcome.get("code")
        then = str(outcome.get("next_command") or then)
    else:
        holder, alive = lock_holder(view)
        if alive:
            state, reason, then = RUNNING, f"by {holder}", ""
        elif holder is None:
            forked = view.environment.get("forked_from")
            state = NEW
            reason = f"forked at round {forked['round']} of another run" if forked else "nothing was made yet"
    return Status(
        state=state,
        reason=reason,
        exit_code=code,
        next_command=then or None,
        holder=holder,
        last_sign_s=last_sign(view) if state in (RUNNING, KILLED) else None,
        rounds_done=done,
        rounds=int(config.rounds),
        phase=None if state == COMPLETE else phase_of(view, config),
    )


def lock_holder(view: RunView) -> tuple[str | None, bool]:
    """(who wrote its name into the lock, whether that process lives); one on another host counts as alive, nobody here can know."""
    try:
        found = json.loads(read_bytes(view.path / layout.LOCK) or b"null")
    except ValueError:
        return None, False
    if not isinstance(found, dict):
        return None, False
    name = f"process {found.get('pid')} on {found.get('host')} since {found.get('since')}"
    pid = found.get("pid")
    if found.get("host") != socket.gethostname():
        return name, True
    return name, isinstance(pid, int) and system.process_alive(pid)


def last_sign(view: RunView) -> float | None:
    """Seconds since anything in the run changed; None when nothing did."""
    newest = 0.0
    folders = [view.path, *(layout.round_folder(view.path, index) for index in view.rounds[-1:])]
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            try:
                newest = max(newest, path.stat().st_mtime)
            except OSError:
                continue
    return max(0.0, time.time() - newest) if newest else None


def phase_of(view: RunView, config: Any) -> str | None:
    """What the newest round is at, in words, from the files that are there."""
    if not view.rounds:
        return None
    index = view.rounds[-1]
    if any(row["round"] == index for row in view.stats_rows()):
        return f"round {index} is done"
    names = set(view.shards.names(index, ""))
    if any(name.startswith(f"{EVAL}-") for name in names):
        return f"round {index}: evaluating"
    if f"{index:04d}" in view.keys:
        return f"round {index}: trained"
    if TRAIN in names:
        steps = [row for row in view.ledger_rows() if row.get("round") == index and row.get("event") == "step"]
        total = read_seal(view.path, index, TRAIN)["meta"].get("num_steps")
        return f"round {index}: training, step {len(steps)} of {total}"
    made = [name for name in names if name.startswith(GENERATED)]
    counts = sum(int(read_seal(view.path, index, name)["count"]) for name in made)
    total_text = ""
    if PROMPTS in names and config.generate.until_accepted is None:
        each = int(config.at_round(max(1, index)).generate.samples_per_prompt)
        total_text = f" of {int(read_seal(view.path, index, PROMPTS)['count']) * each}"
    judged = sum(1 for name in names if name.startswith(f"{VERDICTS}-"))
    return f"round {index}: {counts}{total_text} samples generated, {judged} of {len(made)} shards judged"
