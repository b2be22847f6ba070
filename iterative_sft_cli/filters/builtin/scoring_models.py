"""Loading and batching for the built-ins that score with a model of their own; torch is imported when one is used.

A batch holds rows of similar length; a score depends on the set of samples handed over, never on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters.builtin.spec import BuiltIn, at_least
from iterative_sft_cli.tensor_files import read_headers, weight_files
from iterative_sft_cli.types import Sample, Verdict

Row = TypeVar("Row")
Result = TypeVar("Result")


class ScoringModel:
    """A model and its tokenizer, loaded when first used, moved off the accelerator by `release`."""

    def __init__(self, auto_class: str, path: str, revision: str | None, filter_name: str) -> None:
        self._auto_class = auto_class
        self._path = path
        self._revision = revision
        self._filter_name = filter_name
        self._model: Any = None
        self._tokenizer: Any = None
        self.device: str | None = None

    def load(self) -> tuple[Any, Any, Any]:
        """(model on its device, tokenizer, torch). Raises DataError when it cannot be loaded."""
        import torch
        import transformers

        if self._model is None:
            if Path(self._path).is_dir():
                read_headers(weight_files(Path(self._path)))
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._path, revision=self._revision)
                loader = getattr(transformers, self._auto_class)
                self._model = loader.from_pretrained(
                    self._path, revision=self._revision, dtype="auto", use_safetensors=True
                ).eval()
            except Exception as error:  # many kinds, down to a bare Exception of tokenizers
                first = next(iter(str(error).splitlines()), type(error).__name__)
                raise DataError(
                    f"the model {self._path} cannot be loaded: {first}",
                    hint=f"`path` of {self._filter_name} is a local folder or a hub id; `isft fetch` brings hub models here",
                ) from error
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cpu" and self._model.dtype in (torch.float16, torch.bfloat16):
            self._model = self._model.float()
        self._model = self._model.to(device)
        return self._model, self._tokenizer, torch

    def release(self) -> None:
        """Leave the accelerator to the trainer."""
        if self._model is not None and self._model.device.type != "cpu":
            import torch

            self._model = self._model.to("cpu")
            torch.cuda.empty_cache()


class ScoringFilter:
    """A built-in that scores with a model of its own. `device` and `batch_size` may be set before it is called."""

    def __init__(self, scorer: ScoringModel, batch_size: int, max_length: int | None) -> None:
        self._scorer = scorer
        self._max_length = max_length
        self.batch_size = batch_size
        self.device: str | None = None

    def __call__(self, sample: Sample) -> Verdict:
        """One sample; the chain hands over whole shards to `judge_batch`."""
        return self.judge_batch([sample])[0]

    def judge_batch(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Scores in the order of `samples`."""
        raise NotImplementedError

    def load(self) -> tuple[Any, Any, Any, int | None]:
        """(model on its device, tokenizer, torch, tokens that the model reads at most)."""
        self._scorer.device = self.device
        model, tokenizer, torch = self._scorer.load()
        return model, tokenizer, torch, longest_input(model, self._max_length)

    def release(self) -> None:
        """Leave the accelerator."""
        self._scorer.release()


def scorer_spec(cost: str) -> BuiltIn:
    """What such a filter declares."""
    return BuiltIn(
        role="scorer",
        cost=cost,
        honours=("device",),
        batched=True,
        device=True,
        paths=("path",),
        hub=True,
        check=at_least("batch_size", 1),
    )


def conversation(tokenizer: Any, sample: Sample, completion: str | None) -> str:
    """The prompt, with the completion unless it is None, in the tokenizer's own chat format; plain text without one."""
    messages = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else list(sample.prompt)
    if not tokenizer.chat_template:
        text = "\n".join(str(message["content"]) for message in messages) + "\n"
        return text if completion is None else text + completion
    if completion is None:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return rendered
    rendered = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": completion}], tokenize=False)
    return rendered


def in_batches(
    rows: Sequence[Row],
    batch_size: int,
    run: Callable[[list[Row]], Sequence[Result]],
    key: Callable[[Row], int] = len,  # type: ignore[assignment]
) -> list[Result]:
    """`run` over batches of rows sorted by length, its results in the order of `rows`."""
    order = sorted(range(len(rows)), key=lambda index: (key(rows[index]), index))
    results: dict[int, Result] = {}
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        for index, value in zip(members, run([rows[i] for i in members]), strict=True):
            results[index] = value
    return [results[index] for index in range(len(rows))]


def pad(torch: Any, rows: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Any, Any]:
    """(ids, mask), both (rows, longest), padded on the right; the mask is made from lengths, never from the pad id."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return ids.to(device), mask.to(device)


def longest_input(model: Any, max_length: int | None) -> int | None:
    """Tokens that the model can read at most."""
    own = getattr(model.config, "max_position_embeddings", None)
    limits = [limit for limit in (own, max_length) if isinstance(limit, int) and limit > 0]
    return min(limits) if limits else None
