"""Distillation on a teacher's token probabilities as a plug-in objective: generalised Jensen-Shannon divergence a token.

Agarwal et al. 2023, "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649, equation 5.
In the config:  train: {objective: data/token_distill.py:Distill, objective_args: {teacher: FOLDER_OR_ID, beta: 0.5}}
Nothing of a sample's text is asked for but its tokens, so samples of the model itself (on-policy) and seed data do alike.
"""

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def load(teacher: str) -> Any:
    """The frozen teacher; it must have the student's tokenizer."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(teacher).eval().requires_grad_(False)


class Distill:
    """beta * KL(teacher || mix) + (1 - beta) * KL(student || mix) with mix = beta * teacher + (1 - beta) * student.

    beta 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher); `temperature` divides the teacher's
    logits. The row's weight multiplies the loss of its tokens.
    """

    needs_logits = True

    def __init__(self, teacher: str, beta: float = 0.5, temperature: float = 1.0) -> None:
        self.teacher, self.beta, self.temperature = teacher, beta, temperature

    def __call__(self, batch: Any) -> Any:
        """The loss of each token, (N,); `batch` is a `TokenBatch` with `logits`, `sequences` and `index`."""
        import torch

        student = batch.logits.float().log_softmax(-1)
        teacher = torch.empty_like(student)
        model = load(self.teacher).to(student.device)
        with torch.no_grad():
            for row, ids in enumerate(batch.sequences):
                here = batch.row == row
                logits = model(input_ids=ids[None]).logits[0, batch.index[here], : student.shape[-1]]
                teacher[here] = (logits.float() / self.temperature).log_softmax(-1)
        return batch.token_weights * divergence(student, teacher, self.beta)


def divergence(student: Any, teacher: Any, beta: float) -> Any:
    """The generalised Jensen-Shannon divergence of two log distributions over the last dimension."""
    import torch

    def kl(p: Any, q: Any) -> Any:
        return (p.exp() * (p - q)).sum(-1)

    if beta in (0.0, 1.0):
        return kl(teacher, student) if beta == 0.0 else kl(student, teacher)
    weights = torch.tensor([beta, 1.0 - beta], device=student.device).log()
    mixed = torch.logaddexp(weights[0] + teacher, weights[1] + student)
    return beta * kl(teacher, mixed) + (1.0 - beta) * kl(student, mixed)
