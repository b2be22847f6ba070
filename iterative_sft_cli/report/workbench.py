"""The model of a config opened for a look at it: encoder, learner and engine as the loop would have them, without a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.types import Completion, Decoding, Message, Request, derive_seed


@dataclass
class Bench:
    """What is on the bench. `model` is None for a plug-in backend."""

    config: Any
    encoder: Any
    eval_encoder: Any
    learner: Any
    engine: Any
    model: Any = None

    def complete(
        self,
        prompts: Sequence[str | list[Message]],
        decoding: Decoding,
        *,
        weights: Path | None,
        num_samples: int = 1,
        purpose: str = "bench",
        encoder: Any = None,
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt from the weights in `weights`, or from the live ones when None."""
        encode = (encoder or self.encoder).encode_prompt
        requests = [
            Request(
                prompt_id=str(place),
                prompt=prompt,
                prompt_ids=tuple(encode(prompt)),
                sample_indices=tuple(range(num_samples)),
                seeds=tuple(derive_seed(self.config.seed, purpose, place, i) for i in range(num_samples)),
            )
            for place, prompt in enumerate(prompts)
        ]
        self.engine.heartbeat = _nothing
        self.learner.heartbeat = _nothing
        self.learner.offload()
        with quiet() if self.model is not None else nullcontext():
            self.engine.begin(weights)
        try:
            plan = self.engine.plan(requests, decoding)
            made: list[list[Any]] = [[None] * num_samples for _ in prompts]
            for one in self.engine.generate(requests, decoding, plan):
                made[int(one.prompt_id)][one.sample_index] = one
        finally:
            self.engine.end()
            self.learner.reload()
        return made

    def text(self, completion: Completion) -> str:
        """The text of a completion without special tokens."""
        return str(self.encoder.decode(completion.token_ids)) if completion.text is None else completion.text


def open_bench(config: Any, base_dir: Path) -> Bench:
    """Load the model of a config, with the embedded engine whatever `generate.engine` says. Raises ConfigError and DataError as `isft train` does."""
    if config.model.use is not None:
        from iterative_sft_cli.build import open_backend

        backend = open_backend(config, base_dir)
        return Bench(config, backend.encoder, backend.encoder, backend.learner, backend.engine)
    from iterative_sft_cli.encoding import TokenizerEncoder
    from iterative_sft_cli.generate import open_engine
    from iterative_sft_cli.model import load_model
    from iterative_sft_cli.train import open_learner

    model = load_model(config.model, seed=config.seed, base_dir=base_dir)
    encoder = TokenizerEncoder.of(model, config.prompts, base_dir)
    eval_encoder = TokenizerEncoder.of(model, config.eval, base_dir, inherit=config.prompts) if config.eval else encoder
    learner = open_learner(config.train, loaded=model, encoder=encoder, config=config)
    # for a look at the model no server is started, and no teacher is asked in its place
    section = config.generate.model_copy(update={"engine": "transformers", "memory_gb": "auto"})
    engine = open_engine(section, loaded=model, encoder=encoder, base_dir=base_dir, run_dir=None, seed=config.seed)
    return Bench(config, encoder, eval_encoder, learner, engine, model)


def quiet() -> AbstractContextManager[None]:
    """Without the progress bars of loading."""
    from iterative_sft_cli.model_load import quiet as without_bars

    return without_bars()


def _nothing(num_tokens: int) -> None:
    """Takes a heartbeat."""
