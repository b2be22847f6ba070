"""TRL 0.23.1's IterativeSFTTrainer.step() on the shared lengths: trl_step.py MODEL ROWS float32|bfloat16 (in TRL's environment).

One warm-up step is not timed; its loss is reported. The last line is JSON.
"""

import json
import random
import resource
import sys
import tempfile
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import IterativeSFTConfig, IterativeSFTTrainer
from workload import training

folder, num_rows, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
# transformers 4.56 cannot read a tokenizer_config.json of 5.x
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|im_end|>", pad_token="<|endoftext|>"
)
# nor the rotary base where a config.json of 5.x has it
config = AutoConfig.from_pretrained(folder)
config.rope_theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", config.rope_theta)
model = AutoModelForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32)
args = IterativeSFTConfig(
    output_dir=tempfile.mkdtemp(),
    max_steps=1000,
    per_device_train_batch_size=8,
    learning_rate=1e-5,
    bf16=dtype == "bfloat16",
    use_cpu=not torch.cuda.is_available(),
    report_to=[],
    gradient_checkpointing=False,
    logging_steps=10_000,
    max_length=1024,
)
trainer = IterativeSFTTrainer(model=model, args=args, processing_class=tokenizer)
rng = random.Random(1)
rows = [torch.tensor([rng.randint(300, 40_000) for _ in range(p + c)]) for p, c in training(num_rows)]
warm = [row[:32] for row in rows[:8]]
trainer.args.logging_steps = 1
trainer.step(input_ids=warm, attention_mask=[torch.ones_like(row) for row in warm], labels=warm)
trainer.args.logging_steps = 10_000
loss = trainer.state.log_history[0]["loss"]
texts = [tokenizer.decode(row) for row in rows]
num_tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
on_gpu = torch.cuda.is_available()
start = time.perf_counter()
trainer.step(texts=texts)
if on_gpu:
    torch.cuda.synchronize()
seconds = time.perf_counter() - start
peak = torch.cuda.max_memory_allocated() >> 20 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(json.dumps({"name": f"TRL {dtype}", "tokens": num_tokens, "seconds": seconds, "peak_mib": peak, "loss": loss}))
