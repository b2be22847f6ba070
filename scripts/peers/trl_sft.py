#!/usr/bin/env python3
"""Train TRL's SFTTrainer (or, for preference pairs, DPOTrainer) on an exported file: trl_sft.py MODEL_FOLDER ROWS.jsonl OUT [dpo]

Runs in TRL's environment; prints the number of rows and the losses of two steps as JSON.
"""

import json
import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

model, rows, out, *kind = sys.argv[1:]
data = load_dataset("json", data_files=rows, split="train", cache_dir=f"{out}/cache")
common = dict(
    output_dir=out,
    max_steps=2,
    per_device_train_batch_size=2,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    save_strategy="no",
    bf16=False,
    disable_tqdm=True,
)
tokenizer = AutoTokenizer.from_pretrained(model)
weights = AutoModelForCausalLM.from_pretrained(model)
if kind == ["dpo"]:
    trainer = DPOTrainer(weights, args=DPOConfig(**common), train_dataset=data, processing_class=tokenizer)
else:
    trainer = SFTTrainer(weights, args=SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
first = tokenizer.decode(trainer.train_dataset[0]["input_ids"]) if kind != ["dpo"] else ""
print(json.dumps({"rows": len(data), "losses": losses, "first": first}))
