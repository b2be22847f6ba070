"""`isft train` and `isft resume`: run an experiment, or go on with one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from iterative_sft_cli.app import Config, Overrides, app
from iterative_sft_cli.errors import ConfigError

Limit = Annotated[
    int | None, typer.Option(help="A first look: N prompts, one round, every phase, in a folder of its own.")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option("--allow-change", metavar="KEY", help="Accept that this frozen key changed since the run began."),
]
GraceS = Annotated[
    float | None,
    typer.Option(
        "--grace-s", help="Seconds between a stop signal and the kill; a save that would not fit is not begun."
    ),
]


Gpus = Annotated[
    str | None,
    typer.Option(metavar="N|all", help="One process a GPU, on this machine; without a GPU, N processes on the CPU."),
]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto: go on if the run is there; never; must.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, like `isft plan`.")] = False,
    limit: Limit = None,
    output_dir: Annotated[str | None, typer.Option(help="Write the run here instead of output_dir.")] = None,
    allow_change: AllowChange = None,
    grace_s: GraceS = None,
    gpus: Gpus = None,
) -> int:
    """Run the experiment of CONFIG, or go on with it where it was stopped."""
    from iterative_sft_cli.experiment import argv_command, run_experiment
    from iterative_sft_cli.ranks.start import as_rank

    extra = list(overrides or [])
    if output_dir is not None:
        extra.append(f"output_dir={output_dir}")
    if dry_run:
        from iterative_sft_cli.commands.config_commands import plan

        return plan(config, extra, as_json=False) or 0

    def begin(ranks: Any) -> int:
        return run_experiment(
            config,
            overrides=extra,
            resume=resume,
            limit=limit,
            allow_change=allow_change or [],
            grace_s=grace_s,
            command=argv_command(),
            ranks=ranks,
        ).code

    return as_rank(gpus, begin)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    overrides: Overrides = None,
    allow_change: AllowChange = None,
    grace_s: GraceS = None,
    gpus: Gpus = None,
) -> int:
    """Go on with the run in RUN, with the config that is stored there."""
    from iterative_sft_cli.experiment import argv_command, run_experiment, stored_config
    from iterative_sft_cli.ranks.start import as_rank

    loaded = stored_config(run, list(overrides or []))
    if loaded is None:
        raise ConfigError(f"{run}: not a run directory", expected="a folder that `isft train` made")

    def begin(ranks: Any) -> int:
        command = argv_command()
        return run_experiment(
            loaded, resume="must", allow_change=allow_change or [], grace_s=grace_s, command=command, ranks=ranks
        ).code

    return as_rank(gpus, begin)
