"""A vLLM server's log-probabilities on fixed tokens, to be held against those of the weights that it should serve.

Guarantee: what is compared is the served model's distribution before temperature and truncation, adapter included.
"""

from __future__ import annotations

from collections.abc import Sequence

from iterative_sft_cli.generate.http_client import request_json

PLACES = (1, 6, 12, 18, 23)
"""Places in a probe row whose token is asked for under an adapter."""


def served_logprobs(url: str, *, vocab_size: int, model: str, adapter: bool, timeout_s: float) -> list[list[float]]:
    """What `compared` is to be held against. Raises ServerError."""
    from iterative_sft_cli.generate.torch_probe import probe_rows

    rows = probe_rows(vocab_size)
    if adapter:
        return [[_logprob(url, model, row, place, timeout_s) for place in PLACES] for row in rows]
    body = {"model": model, "prompt": rows, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = request_json("POST", f"{url}/v1/completions", body, timeout_s=timeout_s)
    got = []
    for row, choice in zip(rows, answer["choices"], strict=True):
        entries = choice["prompt_logprobs"][1:]
        got.append([float(e[str(t)]["logprob"]) for e, t in zip(entries, row[1:], strict=True)])
    return got


def compared(want: list[list[float]], adapter: bool) -> list[list[float]]:
    """The part of the log-probabilities that `torch_probe` finds which a server is asked for."""
    return [[logprobs[place - 1] for place in PLACES] for logprobs in want] if adapter else want


def _logprob(url: str, model: str, row: Sequence[int], place: int, timeout_s: float) -> float:
    # one token after those before it, without another choice: vLLM 0.32 ends when it is asked for a prompt's log-probabilities
    # under an adapter
    body = {
        "model": model,
        "prompt": list(row[:place]),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 0,
        "allowed_token_ids": [row[place]],
    }
    answer = request_json("POST", f"{url}/v1/completions", body, timeout_s=timeout_s)
    return float(answer["choices"][0]["logprobs"]["token_logprobs"][0])


def mean_difference(want: list[list[float]], got: list[list[float]]) -> float:
    """Mean absolute difference of all entries."""
    pairs = [(a, b) for x, y in zip(want, got, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
