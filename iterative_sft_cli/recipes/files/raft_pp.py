"""RAFT++ as a plug-in objective: PPO's clipped ratio on accepted samples (Xiong et al. 2025, arXiv 2504.11343).

In the config:  train: {objective: data/raft_pp.py:RaftPP, objective_args: {clip_high: 0.28}}  with generate.keep_logprobs: true
"""

from typing import Any


class RaftPP:
    """-min(ratio * A, clip(ratio) * A) a token, with A the row's weight and ratio the probability now over that when it was sampled."""

    needs_ref_logprobs = True

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2) -> None:
        self.low, self.high = 1.0 - clip_low, 1.0 + clip_high

    def __call__(self, batch: Any) -> Any:
        """The loss of each token, (N,); `batch` is a `TokenBatch`."""
        import torch

        ratio = (batch.logprobs - batch.ref_logprobs).exp()
        advantage = batch.token_weights
        return -torch.minimum(ratio * advantage, ratio.clamp(self.low, self.high) * advantage)
