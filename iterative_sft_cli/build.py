"""Builds the stages of a run from its config: model, encoder, learner, engine, seed data. The one place where torch comes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iterative_sft_cli.config import LoadedConfig
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.harness import Harness
from iterative_sft_cli.plugin_import import find_plugin
from iterative_sft_cli.rounds.stages import Stages, View
from iterative_sft_cli.types import TrainRow


@dataclass(frozen=True, slots=True)
class Parts:
    """What comes of loading the model. `spreads` says whether an engine of its own on every rank makes the same samples; `filters`
    are those of a rank that judges what it makes, `servers` the host's vLLM servers where it may have to tend them."""

    encoder: Any
    eval_encoder: Any
    hint_encoder: Callable[[Any], Any]
    learner: Any
    engine: Any
    base_hash: str
    base_folder: Path | None = None
    model: Any = None
    spreads: bool = True
    filters: Sequence[Any] = ()
    servers: Any = None


def open_parts(loaded: LoadedConfig, run_path: Path, *, serves: bool = True) -> Parts:
    """Load the model, and what encodes, trains and generates with it; without `serves` no engine that starts servers.

    Raises DataError when the model cannot be loaded.
    """
    config = loaded.config
    if config.model.use is not None:
        backend = open_backend(config, loaded.base_dir)
        return Parts(
            encoder=backend.encoder,
            eval_encoder=backend.encoder,
            hint_encoder=lambda few_shot: backend.encoder,
            learner=backend.learner,
            engine=backend.engine,
            base_hash=str(getattr(backend, "base_hash", "plug-in")),
        )
    from iterative_sft_cli.encoding import TokenizerEncoder
    from iterative_sft_cli.generate import await_earlier_servers, open_engine, open_host
    from iterative_sft_cli.model import load_model
    from iterative_sft_cli.model_source import find_model
    from iterative_sft_cli.train import open_learner

    await_earlier_servers(config.generate, run_path)
    model = load_model(config.model, seed=config.seed, base_dir=loaded.base_dir)
    encoder = TokenizerEncoder.of(model, config.prompts, loaded.base_dir)
    eval_encoder = (
        TokenizerEncoder.of(model, config.eval, loaded.base_dir, inherit=config.prompts) if config.eval else encoder
    )

    def with_few_shot(few_shot: Any) -> Any:
        if few_shot is None:
            return encoder
        section = config.prompts.model_copy(update={"few_shot": [] if few_shot == "none" else few_shot})
        return TokenizerEncoder.of(model, section, loaded.base_dir, inherit=config.prompts)

    spreads = config.generate.engine == "transformers"
    learner = open_learner(config.train, loaded=model, encoder=encoder, config=config)
    engine = (
        open_engine(
            config.generate, loaded=model, encoder=encoder, base_dir=loaded.base_dir, run_dir=run_path, seed=config.seed
        )
        if serves or spreads
        else None
    )
    return Parts(
        encoder=encoder,
        eval_encoder=eval_encoder,
        hint_encoder=with_few_shot,
        learner=learner,
        engine=engine,
        base_hash=model.base_hash,
        base_folder=find_model(config.model, loaded.base_dir).folder,
        model=model,
        spreads=spreads,
        servers=None if serves else open_host(config.generate, loaded=model, run_dir=run_path),
    )


def build_stages(
    loaded: LoadedConfig,
    run: Any,
    filters: Sequence[Any],
    prompts: Any,
    eval_prompts: Any,
    view: View,
    stop: Callable[[], None],
    ranks: Any = None,
) -> Stages:
    """Load the model and open everything that a round works with; raises DataError when the model cannot be loaded.

    With `ranks` (rank 0's side of several processes) learner and engine are those of all of them.
    """
    config = loaded.config
    harness = open_harness(config, loaded.base_dir)
    if ranks is not None:
        ranks.start(loaded, run)
        stop = both(stop, ranks.check)
    if config.model.use is None:
        view.note(f"loading {config.model.path or 'a fresh model'}")
    parts = open_parts(loaded, run.path)
    encoder, learner, engine = parts.encoder, parts.learner, parts.engine
    with_few_shot, base_folder, model = parts.hint_encoder, parts.base_folder, parts.model
    measure = None
    if harness is not None:

        def measure() -> list[dict[str, Any]]:
            return harness.measure(model.model, model.tokenizer, compute_dtype=model.compute_dtype, check=stop)

    if ranks is not None:
        learner, engine = ranks.lead(parts, filters)
        view.note(f"training and generating on {ranks.size} processes")
    share_out = getattr(engine, "open", None) if config.generate.engine == "vllm" else None
    if share_out is not None:
        share_out()
    others = find_other_models(config, encoder, loaded.base_dir)
    if base_folder is None and reads_base(config):
        base_folder = write_base(learner, run.path)
    return Stages(
        config=config,
        run=run,
        encoder=encoder,
        eval_encoder=parts.eval_encoder,
        learner=learner,
        engine=engine,
        prompts=prompts.prompts,
        eval_prompts=eval_prompts.prompts if eval_prompts else (),
        filters=filters,
        view=view,
        stop=stop,
        base_hash=parts.base_hash,
        mix_rows=seed_rows(config.train.mix, config.train, encoder, loaded.base_dir)
        if config.train.mix is not None
        else (),
        warmup_rows=seed_rows(config.warmup, config.train, encoder, loaded.base_dir)
        if config.warmup is not None
        else (),
        base_folder=base_folder,
        other_models=others,
        hint_encoder=with_few_shot(config.rationalize.few_shot) if config.rationalize is not None else None,
        format_encoders=[with_few_shot(one.few_shot) for one in config.train.formats or ()],
        harness=measure,
    )


def open_harness(config: Any, base_dir: Path) -> Harness | None:
    """The tasks of `eval.lm_eval`, checked before the model loads; None where there are none.

    Raises ConfigError for a task or argument that the harness has not, and for a plug-in backend, which it cannot ask.
    """
    section = config.eval.lm_eval if config.eval is not None else None
    if section is None:
        return None
    if config.model.use is not None:
        raise ConfigError("the harness asks a torch model, and `model.use` may be anything", where="eval.lm_eval")
    return Harness(section, base_dir)


def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """One call that makes both."""

    def call() -> None:
        first()
        second()

    return call


def sources_named(config: Any) -> set[str]:
    """Every model that `generate.from` names in some round."""
    named: set[str] = set()
    for round_index in range(1, config.rounds + 1):
        wanted = config.at_round(round_index).generate.from_
        named |= {wanted} if isinstance(wanted, str) else {one.model for one in wanted}
    return named


def reads_base(config: Any) -> bool:
    """Whether a round may generate with the starting model although something else was trained."""
    return bool(sources_named(config) & {"base", "best"})


def write_base(learner: Any, run: Path) -> Path:
    """The starting model as a folder of the run, for models that come from no folder; written anew at each start."""
    import shutil

    folder = run / "base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    learner.save(folder, state=False)
    return folder


def find_other_models(config: Any, encoder: Any, base_dir: Path) -> dict[str, Path]:
    """Folders of the other models that generate. Raises DataError when one is missing and ConfigError when its token ids mean other texts."""
    names = sorted(sources_named(config) - {"current", "base", "best", "warmup"})
    if config.generate.engine != "transformers":
        return {name: Path(name) for name in names}
    found = {}
    for name in names:
        if config.model.use is not None:
            found[name] = base_dir / name
            continue
        from transformers import AutoTokenizer

        from iterative_sft_cli.model_source import find_folder

        found[name] = find_folder(name, base_dir, where="generate.from")[0]
        tokenizer = AutoTokenizer.from_pretrained(found[name], local_files_only=True)
        if tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
            raise ConfigError(
                f"{name} has another tokenizer than the model that is trained",
                where="generate.from",
                hint="serve it and use generate.engine: openai or vllm, whose completions come as text",
            )
    return found


def open_backend(config: Any, base_dir: Path) -> Any:
    """The plug-in backend `model.use: pkg.mod:factory` or `file.py:factory`: an object with `encoder`, `learner`, `engine`."""
    factory = find_plugin(str(config.model.use), kind="backend", base_dir=base_dir, where="model.use")
    return factory(config)


def seed_rows(section: Any, train: Any, encoder: Any, base_dir: Path) -> list[TrainRow]:
    """The rows of a seed-data section (`mix` or `warmup`), masked to what an assistant wrote.

    Raises DataError when there is none, or when a row has not the columns that the section names.
    """
    from iterative_sft_cli.prompts import read_source

    rows = []
    for index, (where, row) in enumerate(read_source(section, base_dir, "seed data")[0]):
        by_messages = section.messages is not None
        names = [section.messages] if by_messages else [section.prompt, section.completion]
        missing = [name for name in names if name not in row]
        if missing:
            raise DataError(f"no column `{missing[0]}`", where=where, hint=f"the columns are {', '.join(sorted(row))}")
        conversation = row[section.messages] if by_messages else (row[section.prompt], row[section.completion])
        try:
            whole = encoder.conversation_row(f"seed-{index}", conversation, weight=1.0)
        except ValueError as error:
            raise DataError(str(error), where=where) from error
        rows.append(cut_row(whole, train.max_length, train.truncation_mode, where))
    if not rows:
        raise DataError(f"{section.path or section.dataset.id}: no rows", expected="at least one seed example")
    return rows


def cut_row(row: TrainRow, max_length: int | None, mode: str, where: str) -> TrainRow:
    """A seed row of at most `max_length` tokens, its end or its start kept. Raises DataError when nothing trained is left."""
    from iterative_sft_cli.encoding import IGNORE

    if max_length is None or len(row.input_ids) <= max_length:
        return row
    part = slice(-max_length, None) if mode == "keep_end" else slice(max_length)
    cut = replace(row, input_ids=row.input_ids[part], labels=row.labels[part])
    if all(label == IGNORE for label in cut.labels):
        raise DataError(
            f"{len(row.input_ids)} tokens, cut to {max_length} with {mode}, leave nothing to train on",
            where=where,
            hint="raise train.max_length or take the row out",
        )
    return cut
