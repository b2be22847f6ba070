"""vLLM on the shared workload: python vllm_generate.py MODEL PROMPTS SAMPLES MAX_NEW_TOKENS [DTYPE]

Start-up and a first small batch are not timed. The last line is JSON: tokens and seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
from vllm import LLM, SamplingParams
from workload import generation

if __name__ == "__main__":
    folder, (num_prompts, samples, new) = sys.argv[1], (int(a) for a in sys.argv[2:5])
    llm = LLM(folder, dtype=sys.argv[5] if len(sys.argv) > 5 else "bfloat16", max_model_len=1024)
    tokenizer = llm.get_tokenizer()
    texts = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in generation(num_prompts)
    ]
    params = SamplingParams(n=samples, max_tokens=new, temperature=1.0, seed=None)
    llm.generate(texts[:2], params, use_tqdm=False)
    start = time.perf_counter()
    out = llm.generate(texts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    useful = sum(len(completion.token_ids) for request in out for completion in request.outputs)
    print(json.dumps({"name": "vLLM", "tokens": useful, "seconds": seconds}))
