"""transformers `generate` on the shared workload: python hf_generate.py MODEL PROMPTS SAMPLES MAX_NEW_TOKENS BATCH [DTYPE]

Loading is not timed. The last line is JSON: useful tokens (up to and with EOS) and seconds.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workload import generation

folder, (num_prompts, samples, new, batch) = sys.argv[1], (int(a) for a in sys.argv[2:6])
dtype = getattr(torch, sys.argv[6] if len(sys.argv) > 6 else "bfloat16")
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in generation(num_prompts)]
torch.manual_seed(0)
useful, start = 0, time.perf_counter()
for i in range(0, num_prompts, batch):
    x = tokenizer(texts[i : i + batch], return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(
        **x, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=new, num_return_sequences=samples
    )
    for row in out[:, x["input_ids"].shape[1] :].tolist():
        useful += row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
seconds = time.perf_counter() - start
print(json.dumps({"name": f"generate, batch {batch} prompts", "tokens": useful, "seconds": seconds}))
