"""Loss and metrics of a model on held-out rows, with the weights and dtype that `step()` computes with.

Guarantee: the model's mode, weights, optimizer and random state are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from iterative_sft_cli.encoding import IGNORE
from iterative_sft_cli.train import torch_ranks, torch_rows
from iterative_sft_cli.train.torch_core import TrainCore
from iterative_sft_cli.train.torch_inputs import InputReader
from iterative_sft_cli.train.torch_sharded import PieceWeights
from iterative_sft_cli.types import TrainRow


def rows_of(dataset: Any, reader: InputReader) -> list[TrainRow]:
    """Rows of a data set whose columns are `input_ids` (`attention_mask`, `labels`), `text` (`text_labels`) or `messages`."""
    records = [dict(record) for record in dataset]
    if not records:
        raise ValueError("eval_dataset is empty")
    names = set(records[0])

    def column(name: str) -> list[Any] | None:
        return [record[name] for record in records] if name in names else None

    if "input_ids" in names:
        return reader.rows(
            input_ids=column("input_ids"), attention_mask=column("attention_mask"), labels=column("labels")
        )
    for name in ("text", "texts", "messages"):
        if name in names:
            return reader.rows(texts=column(name), texts_labels=column("text_labels") or column("texts_labels"))
    raise ValueError(f"eval_dataset has the columns {', '.join(sorted(names))}, expected input_ids, text or messages")


def _widen(arrays: Sequence[Tensor]) -> Any:
    """Tensors (batch, time, ...) of different time, padded with -100 and joined, as one numpy array."""
    if arrays[0].dim() < 2:
        return torch.cat(list(arrays)).numpy()
    width = max(array.shape[1] for array in arrays)
    padded = [
        functional.pad(array, (0, 0) * (array.dim() - 2) + (0, width - array.shape[1]), value=-100) for array in arrays
    ]
    return torch.cat(padded).numpy()


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    return tuple(_to_host(item) for item in value)


def evaluate(
    core: TrainCore,
    rows: Sequence[TrainRow],
    *,
    batch_size: int,
    compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None,
    preprocess_logits: Callable[[Any, Tensor], Any] | None = None,
) -> dict[str, float]:
    """`loss`: mean nll over all trained tokens; and what `compute_metrics` says of an `EvalPrediction` over all rows."""
    form = core.row_format()
    wanted = compute_metrics is not None
    alike = wanted or isinstance(core.weights, PieceWeights)  # every rank passes over every row
    mine = (
        list(rows) if alike else torch_rows.share(rows, torch_ranks.rank(), torch_ranks.size(), form.is_encoder_decoder)
    )
    total, count = torch.zeros((), dtype=torch.float64, device=core.device), 0
    predictions: list[Any] = []
    labels: list[Tensor] = []
    with core.evaluating():
        for start in range(0, len(mine), batch_size):
            chosen = mine[start : start + batch_size]
            if not wanted:
                logprobs, targets = core.label_logprobs(torch_rows.build(chosen, range(len(chosen)), form))
            else:
                batch = torch_rows.build(chosen, range(len(chosen)), form.padded())
                logits = core.model(**batch.inputs, use_cache=False).logits
                flat = logits.flatten(0, 1)[batch.positions].float()
                targets = batch.targets
                logprobs = flat.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
                width = logits.shape[1]
                label = torch.full((len(chosen), width), IGNORE)
                for number, row in enumerate(chosen):
                    label[number, : len(row.labels)] = torch.tensor(row.labels)
                labels.append(label)
                shown: Any = logits
                if preprocess_logits is not None:
                    shown = preprocess_logits(logits, label.to(logits.device))
                predictions.append(_to_host(shown))
            total -= logprobs.double().sum()
            count += int(targets.numel())
    if not alike:
        count = torch_ranks.sum_ints([count], core.device)[0]
        torch_ranks.sum_tensor(total)
    found: dict[str, float] = {"loss": float(total) / max(1, count)}
    if compute_metrics is not None:
        from transformers import EvalPrediction

        parts: Any
        if isinstance(predictions[0], tuple):
            parts = tuple(_widen([p[place] for p in predictions]) for place in range(len(predictions[0])))
        else:
            parts = _widen(predictions)
        metrics = compute_metrics(EvalPrediction(predictions=parts, label_ids=_widen(labels)))
        for name, value in metrics.items():
            found[name] = float(value) if hasattr(value, "__float__") else value
    return found
