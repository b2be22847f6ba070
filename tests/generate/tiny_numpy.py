"""A Llama in numpy: what a stand-in for a server needs to say what the trainer's model says, without torch's start.

Its weights are float32 safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


class Llama:
    """The model in a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")

    def _of(self, layer: int, name: str) -> Any:
        return self.tensors[f"model.layers.{layer}.{name}.weight"]

    def _norm(self, x: Any, weight: Any) -> Any:
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])

    def logprobs(self, ids: list[int]) -> list[float]:
        """The log-probability of every token after the first."""
        config = self.config
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
        turns = np.arange(len(ids))[:, None] / theta ** (np.arange(0, width, 2) / width)[None]
        cosine, sine = (np.tile(part(turns), 2)[:, None] for part in (np.cos, np.sin))
        embedded = self.tensors["model.embed_tokens.weight"]
        x = embedded[np.array(ids)].astype(np.float64)
        hidden = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        for layer in range(config["num_hidden_layers"]):
            y = self._norm(x, self._of(layer, "input_layernorm"))
            query, key, value = (
                (y @ self._of(layer, f"self_attn.{name}_proj").T).reshape(len(ids), -1, width) for name in "qkv"
            )
            query, key = (
                line * cosine + np.concatenate([-line[..., width // 2 :], line[..., : width // 2]], -1) * sine
                for line in (query, key)
            )
            key, value = (np.repeat(line, heads // groups, axis=1) for line in (key, value))
            scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(width) + hidden
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            seen = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), value).reshape(len(ids), -1)
            x = x + seen @ self._of(layer, "self_attn.o_proj").T
            y = self._norm(x, self._of(layer, "post_attention_layernorm"))
            gate = y @ self._of(layer, "mlp.gate_proj").T
            x = (
                x
                + (gate / (1 + np.exp(-gate)) * (y @ self._of(layer, "mlp.up_proj").T))
                @ self._of(layer, "mlp.down_proj").T
            )
        logits = self._norm(x, self.tensors["model.norm.weight"]) @ self.tensors.get("lm_head.weight", embedded).T
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return [float(logits[place, token]) for place, token in enumerate(ids[1:])]
