"""perplexity: scores samples by how surprising a language model finds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from iterative_sft_cli.filters.builtin.scoring_models import (
    ScoringFilter,
    ScoringModel,
    conversation,
    in_batches,
    pad,
    scorer_spec,
)
from iterative_sft_cli.types import Sample, Verdict

SPEC = scorer_spec("one forward pass a sample in batches; runs when the engine has left the GPU")


class perplexity(ScoringFilter):
    """Keep everything and score each sample with the perplexity of its completion, given its prompt: lower is likelier.

    path: a causal language model, folder or hub id (with `revision`). given_prompt: false scores the completion alone. A sample longer
    than the model reads (or `max_length`) loses the beginning of its prompt; one whose completion alone is longer, or
    is empty, gets no score. batch_size: samples at a time; the score does not depend on it. Follow it with threshold (`max`) or top_fraction (`-perplexity`).
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        given_prompt: bool = True,
    ) -> None:
        self._given_prompt = given_prompt
        super().__init__(ScoringModel("AutoModelForCausalLM", path, revision, "perplexity"), batch_size, max_length)

    def judge_batch(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Scores in the order of `samples`."""
        model, tokenizer, torch, limit = self.load()
        rows: list[list[int]] = []
        # how many of a row's last tokens are the completion's
        own: dict[int, int] = {}
        for index, sample in enumerate(samples):
            said: list[int] = tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
            before = self._prompt_ids(tokenizer, sample)
            room = limit - len(said) if limit is not None else len(before)
            if said and room >= 1:
                own[index] = len(said)
                rows.append(before[-room:] + said)

        def run(batch: list[tuple[list[int], int]]) -> Sequence[float]:
            ids, mask = pad(torch, [row for row, _ in batch], 0, model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask).logits
            values = []
            for i, (row, count) in enumerate(batch):
                start = len(row) - count
                scores = logits[i, start - 1 : len(row) - 1].float().log_softmax(-1)
                chosen = scores.gather(-1, ids[i, start : len(row), None])
                values.append(math.exp(min(700.0, -float(chosen.mean()))))
            return values

        pairs = list(zip(rows, own.values(), strict=True))
        found = dict(zip(own, in_batches(pairs, self.batch_size, run, key=lambda pair: len(pair[0])), strict=True))
        return [Verdict(True, found.get(index)) for index in range(len(samples))]

    def _prompt_ids(self, tokenizer: Any, sample: Sample) -> list[int]:
        """Never empty: the first token of the completion needs one before it."""
        if self._given_prompt:
            text = conversation(tokenizer, sample, None)
            ids: list[int] = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
            if ids:
                return ids
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [start if start is not None else 0]
