"""One experiment from config to outcome: checks, run directory, model, the loop, and what is said at the end.

Everything that can be wrong is found before the model loads; whatever happens later, the run directory can be resumed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from iterative_sft_cli import __version__
from iterative_sft_cli.build import build_stages
from iterative_sft_cli.config import LoadedConfig, load_config
from iterative_sft_cli.config.secrets import hide
from iterative_sft_cli.console import Console, safe_text
from iterative_sft_cli.errors import EXIT_OK, ConfigError, DataError, IsftError
from iterative_sft_cli.filters import ResolvedFilter, resolve_filters
from iterative_sft_cli.guards import best_round
from iterative_sft_cli.loop import run_rounds
from iterative_sft_cli.prompts import PromptSet, content_key, load_prompts, num_per_round
from iterative_sft_cli.resume import check_choice, check_drift, is_complete, is_untouched, settle
from iterative_sft_cli.rounds.thinning import check_keep
from iterative_sft_cli.rounds.weights import ResumePoint, round_key
from iterative_sft_cli.rundir import RunDir, RunView
from iterative_sft_cli.signals import StopRequests
from iterative_sft_cli.tracking import TrackedView, check_trackers
from iterative_sft_cli.types import TrainRow


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: exit code, reason in words, the run directory, and the command to try next."""

    code: int
    reason: str
    run_dir: Path
    next_command: str


def run_experiment(
    config: LoadedConfig | str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    limit: int | None = None,
    allow_change: Sequence[str] = (),
    view: Console | None = None,
    grace_s: float | None = None,
    command: str | None = None,
    ranks: Any = None,
) -> Outcome:
    """Run the experiment of a config file (or an already loaded one) to its end, or from where an earlier call stopped.

    `resume`: auto (go on when the directory holds this run), never (an existing run is an error), must (a missing one is).
    `limit`: that many prompts, one round, every phase, in a folder of its own. `ranks`: rank 0's side of several processes.
    Raises the errors of `errors.py`.
    """
    loaded = config if isinstance(config, LoadedConfig) else load_config(Path(config), list(overrides))
    if limit is not None:
        loaded = limited(loaded, limit)
    view = view or Console()
    for warning in loaded.warnings:
        view.note(f"warning: {warning}")
    path = Path(loaded.config.output_dir)
    found = RunDir.peek(path)
    if found is not None:
        loaded = loaded.continuing(found.resolved)
    command = command or f"isft train {shlex.quote(str(loaded.path))}"
    after = f"isft show {shlex.quote(str(path))}"
    check_choice(found, path, resume)
    with loaded.placing_errors():
        filters = resolve_filters(loaded.config.filters, base_dir=loaded.base_dir)
        check_keep(loaded.config, filters)
    for one in filters:
        if one.notice:
            view.note(f"warning: {one.notice}")
    if is_complete(found, loaded, allow_change):
        view.note(f"{safe_text(path)}: complete, {loaded.config.rounds} rounds; nothing to do")
        say_last_lines(view, path, loaded)
        return Outcome(EXIT_OK, "complete", path, after)
    check_trackers(loaded.config.tracking)
    if ranks is not None:
        from iterative_sft_cli.ranks.placement import check_launcher

        check_launcher(loaded.config.train.parallel.type)
    prompts, eval_prompts = read_prompts(loaded, view)
    last_code = found.outcome.get("code") if found is not None and found.outcome else None
    run, drift = open_run(path, loaded, found, allow_change)
    with StopRequests(command) as stop, run:
        try:
            stages = build_stages(loaded, run, filters, prompts, eval_prompts, view, stop.check, ranks)
            stop.check()
            stages.grace_s = grace_s
            run.shards.compress = loaded.config.samples.compress == "gzip"
            facts = describe_environment(loaded, content_hashes(stages, prompts, eval_prompts, filters))
            if ranks is not None:
                facts["processes"] = ranks.size
            kernels = [getattr(part, "kernels", None) for part in (stages.engine, stages.learner)]
            facts["kernels"] = " ".join(one for one in kernels if one) or None
            stages.changes = settle(run, loaded, facts, drift=drift, allow_change=allow_change, last_code=last_code)
            announce(stages, loaded, view)
            if loaded.config.tracking:
                stages.view = TrackedView(view, loaded.config.tracking, path)
            try:
                run_rounds(stages)
            finally:
                if isinstance(stages.view, TrackedView):
                    stages.view.finish()
                close = getattr(stages.engine, "close", None)
                if close is not None:
                    close()  # servers that were started are gone before the command ends
        except IsftError as error:
            run.outcome(error.exit_code, hide(error.render()), command)
            raise
        except BaseException as error:
            run.outcome(1, hide(f"{type(error).__name__}: {error}"), command)
            raise
        run.outcome(EXIT_OK, "complete", after)
    say_last_lines(view, path, loaded)
    return Outcome(EXIT_OK, "complete", path, after)


def stored_config(path: Path, overrides: Sequence[str]) -> LoadedConfig | None:
    """The config that a run directory was made with, to go on with it; None when `path` is no run directory."""
    found = RunDir.peek(path)
    if found is None:
        return None
    written_in = Path(str(found.environment.get("config_dir", "")))
    return LoadedConfig.from_resolved(
        found.resolved,
        source=found.config_source,
        path=path / "config.yaml",
        output_dir=str(path),
        overrides=list(overrides),
        base_dir=written_in if written_in.is_dir() else path.parent,
    )


def limited(loaded: LoadedConfig, limit: int) -> LoadedConfig:
    """The same experiment on `limit` prompts and one round, in `<output_dir>-limit<N>`."""
    if limit < 1:
        raise ConfigError(f"--limit {limit}: expected at least 1")
    overrides = [
        "rounds=1",
        f"prompts.limit={limit}",
        f"output_dir={loaded.config.output_dir.rstrip('/')}-limit{limit}",
    ]
    if loaded.config.eval is not None:
        overrides.append(f"eval.limit={min(limit, loaded.config.eval.limit or limit)}")
    return loaded.with_overrides(overrides)


def read_prompts(loaded: LoadedConfig, view: Console) -> tuple[PromptSet, PromptSet | None]:
    """Training and eval prompts, disjoint by content.

    Generated tasks can meet by chance: an eval prompt is then left out of training. In files it is a mistake: DataError.
    """
    config = loaded.config
    prompts = load_prompts(config.prompts, base_dir=loaded.base_dir)
    if config.eval is None:
        return prompts, None
    held_out = load_prompts(config.eval, base_dir=loaded.base_dir, inherit=config.prompts)
    evaluated = {content_key(prompt): prompt.prompt_id for prompt in held_out.prompts}
    shared = [prompt for prompt in prompts.prompts if content_key(prompt) in evaluated]
    if shared and config.prompts.reasoning_gym is not None:
        view.note(f"{len(shared)} of {len(prompts.prompts)} prompts are also eval prompts: they are not trained on")
        left = [prompt for prompt in prompts.prompts if content_key(prompt) not in evaluated]
        if not left:
            raise DataError("every prompt is also an eval prompt", where="eval", hint="make the tasks less alike")
        return replace(prompts, prompts=left), held_out
    if shared:
        examples = ", ".join(f"eval {evaluated[content_key(p)]} = prompt {p.prompt_id}" for p in shared[:3])
        raise DataError(
            f"{len(shared)} of {len(prompts.prompts)} prompts are also eval prompts ({safe_text(examples)})",
            where="eval",
            hint="take them out of one of the two files: a figure on trained prompts says nothing",
        )
    return prompts, held_out


def open_run(
    path: Path, loaded: LoadedConfig, found: RunView | None, allow_change: Sequence[str]
) -> tuple[RunDir, list[dict[str, Any]]]:
    """The run directory, made or opened and recovered; and the changes of the config that it takes on."""
    if found is None:
        return RunDir.create(path, config_source=loaded.source, resolved=loaded.merged, environment={}), []
    drift = [] if is_untouched(found) else check_drift(found.resolved, loaded, allow_change)
    return RunDir.open(path), drift


@lru_cache(maxsize=1)
def library_versions() -> Mapping[str, str]:
    """The versions of the libraries that shape results; those that are not installed are left out."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "tokenizers", "pydantic"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_environment(loaded: LoadedConfig, hashes: dict[str, Any]) -> dict[str, Any]:
    """Versions, hardware and content hashes for `environment.json`; never secrets."""
    return {
        "isft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "versions": dict(library_versions()),
        "threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        "seed": loaded.config.seed,
        "config_dir": str(loaded.base_dir.resolve()),
        **hashes,
    }


def content_hashes(
    stages: Any, prompts: PromptSet, eval_prompts: PromptSet | None, filters: Sequence[ResolvedFilter]
) -> dict[str, Any]:
    """Content hashes of what a run depends on beside its config."""
    return {
        "model": stages.base_hash,
        "prompts": prompts.sha256,
        "eval": eval_prompts.sha256 if eval_prompts else None,
        "filters": {one.name: "built-in" if one.builtin else one.source_hash for one in filters},
        "builtins": {one.name: one.source_hash for one in filters if one.builtin},
        "seed_data": rows_hash([*stages.mix_rows, *stages.warmup_rows]),
    }


def rows_hash(rows: Sequence[TrainRow]) -> str | None:
    """Content hash of training rows; None for none."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.input_ids, row.labels)).encode("ascii"))
    return digest.hexdigest() if rows else None


def announce(stages: Any, loaded: LoadedConfig, view: Console) -> None:
    """Tell the view where the run stands and how much work is left."""
    config, run = loaded.config, stages.run
    point = ResumePoint.of(run.checkpoints.newest())
    for row in run.stats.rows():
        view.earlier_round(row)
    if point.key is not None:
        view.note(f"going on from checkpoints/{point.key}")
    at_first = config.at_round(max(1, point.round_index))
    per_prompt = config.eval.samples_per_prompt if config.eval else 0
    view.expect(
        rounds=config.rounds,
        first_round=point.round_index,
        eval_samples=len(stages.eval_prompts) * int(per_prompt),
        samples=num_per_round(at_first.prompts.per_round, len(stages.prompts))
        * int(at_first.generate.samples_per_prompt),
        max_new_tokens=int(at_first.generate.max_new_tokens),
        smaller=smaller_version(loaded.path),
    )


def smaller_version(path: Path) -> str | None:
    """The sibling `<name>-small.yaml` of a config, when there is one."""
    small = path.with_name(f"{path.stem}-small{path.suffix}")
    return str(small) if small.is_file() else None


def say_last_lines(view: Console, path: Path, loaded: LoadedConfig) -> None:
    """The end of every run: the statistics, the best checkpoint, and the commands to try next."""
    found = RunDir.peek(path)
    if found is None:
        return
    quoted = shlex.quote(str(path))
    view.note(f"statistics: {path / 'stats.jsonl'}")
    key, what = round_key(loaded.config.rounds), "last checkpoint"
    if loaded.config.eval is not None:
        best = best_round(found.stats_rows(), loaded.config.eval.metric)
        if best == 0 and not (path / "checkpoints" / round_key(0)).is_dir():
            view.note(f"best by {loaded.config.eval.metric}: the starting model")
        elif best is not None:
            key, what = round_key(best), f"best checkpoint by {loaded.config.eval.metric}"
    view.note(f"{what}: {path / 'checkpoints' / key}")
    view.note(f"next: isft samples {quoted} --rejected")
    view.note(f"      isft report {quoted}")
    view.note(f"      isft export {quoted} --to hf")


def argv_command() -> str:
    """The command line that was typed, quoted so that it can be pasted."""
    return shlex.join(["isft", *sys.argv[1:]])
