"""A search as the expert, as a plug-in engine: a beam over steps of a solution, each step sampled by the model itself.

Anthony et al. 2017 (expert iteration) and Zhang et al. 2024 (ReST-MCTS*) search with a learned value; `value` below is the place
for one, here the mean log-probability of the tokens so far.
In the config:  generate: {engine: data/tree_search.py:make, args: {width: 2, expand: 4, step_end: ", "}, keep_logprobs: true}
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from iterative_sft_cli.types import EOS, LENGTH, Completion, Decoding, Request, derive_seed


@dataclass(frozen=True)
class Path:
    """A solution so far: its tokens, their log-probability, and how its last step ended."""

    tokens: tuple[int, ...] = ()
    logprob: float = 0.0
    ended: str | None = None

    def value(self) -> float:
        """What the search maximises."""
        return self.logprob / max(1, len(self.tokens))


def make(context: Any, width: int = 2, expand: int = 4, step_end: str = "\n") -> "TreeSearch":
    """The engine: `expand` next steps of each of the `width` best paths, until a path ends; `context` is an `EngineContext`."""
    from iterative_sft_cli.generate import open_engine

    section = context.section.model_copy(update={"engine": "transformers", "args": {}})
    inner = open_engine(
        section,
        loaded=context.loaded,
        encoder=context.encoder,
        base_dir=context.base_dir,
        run_dir=context.run_dir,
        seed=context.seed,
    )
    return TreeSearch(inner, width, expand, step_end)


class TreeSearch:
    """Searches with the engine it wraps; one search a sample, with the sample's own seed."""

    def __init__(self, inner: Any, width: int, expand: int, step_end: str) -> None:
        self.inner, self.width, self.expand, self.step_end = inner, width, expand, step_end
        self.deterministic = inner.deterministic
        self.heartbeat: Any = inner.heartbeat

    def begin(self, weights: Any) -> None:
        self.inner.begin(weights)

    def end(self) -> None:
        self.inner.end()

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        return dict(self.inner.plan(requests, decoding))

    def generate(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        """The best ended path of every sample, all searches side by side."""
        self.inner.heartbeat = self.heartbeat
        roots = {
            (r.prompt_id, i): (r, seed) for r in requests for i, seed in zip(r.sample_indices, r.seeds, strict=True)
        }
        beams = {key: [Path()] for key in roots}
        while True:
            open_paths = [
                (key, place, path)
                for key, beam in beams.items()
                for place, path in enumerate(beam)
                if path.ended is None
            ]
            if not open_paths:
                break
            longest = max(len(path.tokens) for _, _, path in open_paths)
            if longest >= decoding.max_new_tokens:
                beams = {key: [replace(p, ended=p.ended or LENGTH) for p in beam] for key, beam in beams.items()}
                break
            grown = {key: [path for path in beam if path.ended] for key, beam in beams.items()}
            for key, path in self._steps(
                open_paths,
                roots,
                replace(
                    decoding, stop=(*decoding.stop, self.step_end), max_new_tokens=decoding.max_new_tokens - longest
                ),
            ):
                grown[key].append(path)
            beams = {key: sorted(paths, key=Path.value, reverse=True)[: self.width] for key, paths in grown.items()}
        for (prompt_id, index), beam in beams.items():
            best = max(beam, key=lambda path: (path.ended == EOS, path.value()))
            yield Completion(prompt_id, index, best.tokens, best.ended or LENGTH, logprob=best.logprob)

    def _steps(self, open_paths: Sequence[Any], roots: Any, decoding: Decoding) -> Iterator[Any]:
        """`expand` continuations of each open path up to the end of its next step, in a fixed order."""
        asked, owner = [], {}
        for number, (key, place, path) in enumerate(open_paths):
            request, seed = roots[key]
            seeds = tuple(derive_seed(seed, "step", len(path.tokens), place, child) for child in range(self.expand))
            name = f"{key[0]}/{key[1]}/{number}"
            owner[name] = (key, path)
            ids = (*request.prompt_ids, *path.tokens)
            asked.append(Request(name, request.prompt, ids, tuple(range(self.expand)), seeds))
        made = sorted(
            self.inner.generate(asked, decoding, self.inner.plan(asked, decoding)),
            key=lambda one: (list(owner).index(one.prompt_id), one.sample_index),
        )
        for one in made:
            key, path = owner[one.prompt_id]
            text = self.step_end if one.finish_reason == "stop" else None
            yield (
                key,
                Path(
                    (*path.tokens, *one.token_ids),
                    path.logprob + (one.logprob or 0.0),
                    None if text else one.finish_reason,
                ),
            )
