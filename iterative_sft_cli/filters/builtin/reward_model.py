"""reward_model: scores samples with a sequence-classification model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from iterative_sft_cli.errors import ConfigError
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


class reward_model(ScoringFilter):
    """Keep everything and give each sample the score of a transformers sequence-classification model.

    path: folder or hub id (with `revision`). The sample is shown in the model's own chat format, else as prompt and
    completion. part: what of the completion is shown. output: raw logit, sigmoid, or softmax over the labels; `label`
    picks one of several. max_length: longer conversations lose their beginning; extra `truncated` tells.
    batch_size: conversations at a time; the score does not depend on it.
    Follow it with threshold, top_k, best_of_n or top_fraction.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        label: int | None = None,
        output: Literal["auto", "raw", "sigmoid", "softmax"] = "auto",
        part: Literal["completion", "final"] = "completion",
    ) -> None:
        self._label = label
        self._output = output
        self._part = part
        super().__init__(
            ScoringModel("AutoModelForSequenceClassification", path, revision, "reward_model"), batch_size, max_length
        )

    def judge_batch(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Scores in the order of `samples`."""
        model, tokenizer, torch, limit = self.load()
        rows, cut = [], []
        for sample in samples:
            text = conversation(tokenizer, sample, sample.final if self._part == "final" else sample.completion)
            ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
            cut.append(limit is not None and len(ids) > limit)
            rows.append(ids[-limit:] if limit is not None else ids)
        column = self._column(model.config.num_labels)

        def run(batch: list[list[int]]) -> Sequence[float]:
            # decoder models find the last token by the pad id, so it must not be any row's last token
            pad_id = next(i for i in range(len(batch) + 1) if all(row[-1] != i for row in batch))
            model.config.pad_token_id = pad_id
            ids, mask = pad(torch, batch, pad_id, model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask).logits.float()
            values: list[float] = self._activate(logits, column).tolist()
            return values

        scores = in_batches(rows, self.batch_size, run)
        return [
            Verdict(True, score, None, {"truncated": True} if was_cut else {})
            for score, was_cut in zip(scores, cut, strict=True)
        ]

    def _column(self, num_labels: int) -> int:
        if num_labels > 1 and self._label is None:
            raise ConfigError(
                f"the model has {num_labels} labels, expected `label` to name one (0 to {num_labels - 1})"
            )
        column = self._label or 0
        if not 0 <= column < num_labels:
            raise ConfigError(f"argument `label` is {column}, expected 0 to {num_labels - 1}")
        return column

    def _activate(self, logits: Any, column: int) -> Any:
        output = self._output
        if output == "auto":
            output = "raw" if logits.shape[-1] == 1 else "softmax"
        if output == "softmax":
            return logits.softmax(-1)[:, column]
        chosen = logits[:, column]
        return chosen.sigmoid() if output == "sigmoid" else chosen
