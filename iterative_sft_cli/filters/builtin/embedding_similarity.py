"""embedding_similarity: scores samples by their closeness in meaning to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters.builtin.scoring_models import ScoringFilter, ScoringModel, in_batches, pad, scorer_spec
from iterative_sft_cli.types import Sample, Verdict

SPEC = scorer_spec("two short forward passes a sample in batches; runs when the engine has left the GPU")


class embedding_similarity(ScoringFilter):
    """Keep everything and score each sample with the cosine similarity, -1 to 1, of its final part and a reference.

    path: an encoder model, folder or hub id (with `revision`); a text's vector is the mean of its last hidden states over
    its first `max_length` tokens. to: `answer`,
    `prompt`, or the name of another column. batch_size: texts at a time; the score does not depend on it. Follow it with threshold.
    """

    def __init__(
        self,
        path: str,
        to: str = "answer",
        revision: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        self._to = to
        super().__init__(ScoringModel("AutoModel", path, revision, "embedding_similarity"), batch_size, max_length)

    def judge_batch(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Scores in the order of `samples`."""
        texts = [sample.final for sample in samples] + [self._reference(sample) for sample in samples]
        unique = sorted(set(texts))
        vectors = dict(zip(unique, self._embed(unique), strict=True))
        return [
            Verdict(
                True, max(-1.0, min(1.0, sum(a * b for a, b in zip(vectors[said], vectors[reference], strict=True))))
            )
            for said, reference in zip(texts[: len(samples)], texts[len(samples) :], strict=True)
        ]

    def _reference(self, sample: Sample) -> str:
        if self._to == "prompt":
            if isinstance(sample.prompt, str):
                return sample.prompt
            return "\n".join(str(message["content"]) for message in sample.prompt)
        value = sample.answer if self._to == "answer" else sample.row.get(self._to)
        if value is None:
            raise DataError(
                f"prompt {sample.prompt_id} has no `{self._to}` to compare with", hint="name a column with `to`"
            )
        return str(value)

    def _embed(self, texts: Sequence[str]) -> list[list[float]]:
        model, tokenizer, torch, limit = self.load()
        rows = [tokenizer(text)["input_ids"][:limit] or [0] for text in texts]

        def run(batch: list[list[int]]) -> Sequence[list[float]]:
            ids, mask = pad(torch, batch, 0, model.device)
            with torch.inference_mode():
                hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            weights = mask[..., None].float()
            mean: Any = (hidden * weights).sum(1) / weights.sum(1)
            vectors: list[list[float]] = torch.nn.functional.normalize(mean, dim=-1).tolist()
            return vectors

        return in_batches(rows, self.batch_size, run)
