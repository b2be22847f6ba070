"""Log-probabilities of fixed token rows under the trainer's weights: what a server must match before its samples are used.

Guarantee: computed by the live model's own forward (or that of a folder), adapters included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PROBE_ROWS = 4
PROBE_LENGTH = 24


def probe_rows(vocab_size: int) -> list[list[int]]:
    """Fixed rows of token ids, spread over the first ids of the vocabulary."""
    span = max(min(vocab_size, 20_000) - 11, 1)
    return [[(i * i * 37 + i * 101 + row * 7919) % span + 5 for i in range(PROBE_LENGTH)] for row in range(PROBE_ROWS)]


@torch.inference_mode()
def token_logprobs(model: Any, rows: list[list[int]]) -> list[list[float]]:
    """For each row the log-probability of every token after the first, nats."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        ids = torch.tensor(rows, device=next(model.parameters()).device)
        logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    finally:
        for module, flag in training.items():
            module.training = flag
    found: list[list[float]] = logprobs.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2).tolist()
    return found


def folder_logprobs(folder: Path, rows: list[list[int]], loaded: Any) -> list[list[float]]:
    """`token_logprobs` of the model (or the adapter) in `folder`, in the compute dtype, loaded for this and dropped."""
    from transformers import AutoModelForCausalLM

    adapter = (folder / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(
        str(loaded.folder if adapter else folder),
        dtype=loaded.compute_dtype,
        local_files_only=True,
        use_safetensors=True,
    )
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    return token_logprobs(model.to(loaded.device), rows)
