"""The embedded engine on the shared workload: python isft_generate.py MODEL PROMPTS SAMPLES MAX_NEW_TOKENS [MAX_ROWS]

Timed from the loaded model: the cast to bfloat16 and the engine's probe count. The last line is JSON: tokens, seconds,
seconds until the first finished sample, and the tokens per second that the model's matrix products alone would allow.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from workload import generation

from iterative_sft_cli.config import ModelConfig
from iterative_sft_cli.encoding import TokenizerEncoder
from iterative_sft_cli.generate.embedded import EmbeddedEngine
from iterative_sft_cli.generate.embedded_linear import Linear
from iterative_sft_cli.model import load_model
from iterative_sft_cli.types import Decoding, Request, derive_seed


def ceiling(model: torch.nn.Module) -> float:
    """Tokens per second of the model's matrix products alone, with prepared weights, at the best of several row counts."""
    best = 0.0
    dtype = torch.bfloat16
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = [Linear(torch.randn(shape).to(dtype)) for shape in shapes]
    for rows in (128, 256, 512):
        inputs = {width: torch.randn(rows, width).to(dtype) for _, width in shapes}
        for _ in range(3):
            start = time.perf_counter()
            for weight, (_, width) in zip(weights, shapes, strict=True):
                weight(inputs[width])
            best = max(best, rows / (time.perf_counter() - start))
    return best


def main() -> None:
    folder, (num_prompts, samples, new) = sys.argv[1], (int(a) for a in sys.argv[2:5])
    loaded = load_model(ModelConfig(path=folder), seed=0, base_dir=Path("."))
    encoder = TokenizerEncoder.of(loaded, SimpleNamespace(system=None, few_shot=None, template=None))
    requests = [
        Request(str(i), p, tuple(encoder.encode_prompt(p)), tuple(range(samples)),
                tuple(derive_seed(0, i, k) for k in range(samples)))
        for i, p in enumerate(generation(num_prompts))
    ]  # fmt: skip
    decoding = Decoding(max_new_tokens=new, eos_token_ids=encoder.eos_token_ids)
    engine = EmbeddedEngine(loaded, encoder=encoder)
    start = time.perf_counter()
    engine.begin(None)
    plan = engine.plan(requests, decoding)
    if len(sys.argv) > 5:
        plan["max_rows"] = int(sys.argv[5])
    tokens, first = 0, 0.0
    for completion in engine.generate(requests, decoding, plan):
        first = first or time.perf_counter() - start
        tokens += len(completion.token_ids)
    seconds = time.perf_counter() - start
    engine.end()
    with torch.no_grad():
        limit = ceiling(loaded.model)
    result = {"name": "isft", "tokens": tokens, "seconds": seconds, "first_s": first, "ceiling": limit, "plan": plan}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
