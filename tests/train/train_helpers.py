"""What the training tests share: trainers over tiny models, and the plain fp32 reference they are compared with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_gpt2, tiny_llama, tiny_t5
from torch.nn import functional
from transformers import TrainingArguments

from iterative_sft_cli import IterativeSFTTrainer
from iterative_sft_cli.types import TrainRow

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5}
CAUSAL = ("llama", "gpt2")
VOCAB = 64


def model(kind: str, **config: Any) -> Any:
    """A tiny model of 64 tokens."""
    return MODELS[kind](VOCAB, **config)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Plain transformers arguments on the CPU that print and report nothing."""
    return TrainingArguments(
        **{"output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no", **changes}
    )


def trainer(folder: Path, subject: Any = "llama", *, init: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A trainer over a tiny model (by kind) or a given one; `changes` go to the arguments, `init` to the constructor."""
    subject = model(subject) if isinstance(subject, str) else subject
    return IterativeSFTTrainer(subject, arguments(folder, **changes), **(init or {}))


def weights(subject: Any) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in subject.named_parameters()}


def moved(subject: Any, before: dict[str, torch.Tensor]) -> float:
    """Largest change of any parameter since `before`."""
    return max(float((parameter.detach() - before[name]).abs().max()) for name, parameter in subject.named_parameters())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of parameters are equal byte for byte."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tensors(*rows: Sequence[int]) -> list[torch.Tensor]:
    """Rows as a list of tensors."""
    return [torch.tensor(list(row)) for row in rows]


def some_rows(kind: str, count: int = 9, seed: int = 0, weighted: bool = True) -> list[TrainRow]:
    """Rows of 3 to 20 tokens with masked prompts and, unless told otherwise, weights of both signs."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        length = rng.randint(3, 20)
        ids = tuple(rng.randint(8, VOCAB - 1) for _ in range(length))
        prompt = rng.randint(1, length - 1)
        labels = tuple(-100 if place < prompt else token for place, token in enumerate(ids))
        if kind == "t5":
            labels = tuple(rng.randint(8, VOCAB - 1) for _ in range(rng.randint(1, 9)))
        weight = rng.choice([1.0, 0.5, -0.3]) if weighted else 1.0
        rows.append(TrainRow(f"s{index}", ids, labels, weight=weight))
    return rows


def reference(subject: Any, rows: Sequence[TrainRow]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the book: one row at a time, no padding, the model's own logits, fp32."""
    subject.train()
    subject.zero_grad()
    total: Any = 0
    count = 0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        if subject.config.is_encoder_decoder:
            logits = subject(input_ids=ids, labels=labels).logits
        else:
            logits, labels = subject(input_ids=ids).logits[:, :-1], labels[:, 1:]
        count += int((labels != -100).sum())
        total = total + row.weight * functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
    (total / count).backward()
    grads = {name: parameter.grad.clone() for name, parameter in subject.named_parameters()}
    subject.zero_grad()
    subject.eval()
    return float((total / count).detach()), grads


def caught_gradients(core: Any) -> dict[str, torch.Tensor]:
    """Makes the next steps of `core` leave their summed gradients here instead of stepping."""
    caught: dict[str, torch.Tensor] = {}

    def keep(grads: list[Any], *_: Any) -> None:
        caught.update({n: g.clone() for n, g in zip(core.weights.names, grads, strict=True) if g is not None})

    core._apply = keep
    return caught


def largest_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to each tensor's largest entry."""
    assert got.keys() == want.keys()
    return max(float((got[n] - want[n]).abs().max() / want[n].abs().max().clamp_min(1e-30)) for n in want)
