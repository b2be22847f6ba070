"""Our IterativeSFTTrainer.step() on the shared lengths: isft_step.py MODEL ROWS float32|bfloat16.

Also measures what the machine's matrix products alone would allow: the model's linear layers, forward and twice backward, on
as many tokens as an average micro-batch holds. One warm-up step is not timed. The last line is JSON.
"""

import json
import random
import resource
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from workload import training

from iterative_sft_cli import IterativeSFTTrainer


def ceiling(model: torch.nn.Module, dtype: torch.dtype, num_tokens: int = 1024) -> float:
    """Tokens per second if a training step were its matrix products and nothing else."""
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    best = 0.0
    seconds = 0.0
    for shape in set(shapes):
        weight, x = torch.randn(shape, dtype=dtype), torch.randn(num_tokens, shape[1], dtype=dtype)
        grad = torch.randn(num_tokens, shape[0], dtype=dtype)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            x @ weight.t()
            grad @ weight
            grad.t() @ x
            best = min(best, time.perf_counter() - start)
        seconds += best * shapes.count(shape)
    return num_tokens / seconds


def main() -> None:
    folder, num_rows, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=1000,
        per_device_train_batch_size=8,
        learning_rate=1e-5,
        bf16=dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    trainer = IterativeSFTTrainer(model=model, args=args, processing_class=tokenizer, max_length=1024)
    rng = random.Random(1)
    rows = [torch.tensor([rng.randint(300, 40_000) for _ in range(p + c)]) for p, c in training(num_rows)]
    warm = [row[:32] for row in rows[:8]]
    trainer.step(input_ids=warm)
    start = time.perf_counter()
    stats = trainer.step(input_ids=rows)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    assert stats["num_steps"] == -(-num_rows // 8), stats
    result = {"name": f"isft {dtype}", "tokens": stats["num_tokens"], "seconds": seconds, "peak_mib": peak}
    print(json.dumps(result | {"loss": stats["loss"], "ceiling": ceiling(model, getattr(torch, dtype))}))


if __name__ == "__main__":
    main()
