"""Our IterativeSFTTrainer.step() on the shared lengths: isft_step.py MODEL ROWS float32|bfloat16 [plain|liger|compile].

Also measures what the machine's matrix products alone would allow: the model's linear layers, forward and twice backward, on
as many tokens as an average micro-batch holds. One warm-up step is not timed; its loss is reported, as TRL's is on the same
rows. `liger` puts liger-kernel's layers into the model first, `compile` torch.compile's forward. The last line is JSON.
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


def now() -> float:
    """Seconds, after whatever a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib() -> int:
    """Peak memory: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def ceiling(model: torch.nn.Module, dtype: torch.dtype, num_tokens: int = 1024) -> float:
    """Tokens per second if a training step were its matrix products and nothing else."""
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    seconds = 0.0
    device = next(model.parameters()).device
    for shape in set(shapes):
        weight, x = (torch.randn(size, dtype=dtype, device=device) for size in (shape, (num_tokens, shape[1])))
        grad = torch.randn(num_tokens, shape[0], dtype=dtype, device=device)
        best = float("inf")
        for _ in range(3):
            start = now()
            x @ weight.t()
            grad @ weight
            grad.t() @ x
            best = min(best, now() - start)
        seconds += best * shapes.count(shape)
    return num_tokens / seconds


def main() -> None:
    folder, num_rows, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    variant = sys.argv[4] if len(sys.argv) > 4 else "plain"
    if variant == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)
    elif variant == "compile":
        model.forward = torch.compile(model.forward, dynamic=True)
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
    first = trainer.step(input_ids=warm)
    start = now()
    stats = trainer.step(input_ids=rows)
    seconds = now() - start
    peak = peak_mib()
    assert stats["num_steps"] == -(-num_rows // 8), stats
    result = {
        "name": f"isft {dtype}" + f" {variant}" * (variant != "plain"),
        "tokens": stats["num_tokens"],
        "seconds": seconds,
        "peak_mib": peak,
    }
    print(json.dumps(result | {"loss": first["loss"], "ceiling": ceiling(model, getattr(torch, dtype))}))


if __name__ == "__main__":
    main()
