"""A vLLM server's log-probabilities on fixed tokens, held against those of the weights that it should serve.

Guarantee: what is compared is the served model's distribution before temperature and truncation, adapter included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate.http_client import request_json

PROBE_LIMIT = 0.25
"""Mean absolute difference in log-probability that rounding may explain, nats."""
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


class Proof:
    """Whether servers have the weights that they were told to take. `vocab_size` is the encoder's, `timeout_s` for each request."""

    def __init__(self, vocab_size: int, timeout_s: float) -> None:
        self.vocab_size, self.timeout_s = vocab_size, timeout_s
        self.nats: dict[str, float] = {}
        """How far each server was from the trainer since the last `expect`, mean absolute nats by address."""
        self._adapter = False
        self._want: list[list[float]] = []
        self._earlier: list[list[float]] | None = None
        self._answers: dict[str, list[list[float]]] = {}

    def expect(self, want: list[list[float]], *, adapter: bool) -> None:
        """What `torch_probe` finds under the weights that are served next."""
        self._earlier, self._want = self._want or None, want
        self._adapter = adapter
        self.nats = {}

    def knows(self, url: str) -> bool:
        """Whether the server has answered before."""
        return url in self._answers

    def answers_of(self, url: str) -> list[list[float]] | None:
        """What a server said last."""
        return self._answers.get(url)

    def ask(self, url: str, model: str) -> list[list[float]]:
        """What a server says now. Raises ServerError."""
        return served_logprobs(
            url, vocab_size=self.vocab_size, model=model, adapter=self._adapter, timeout_s=self.timeout_s
        )

    def of(self, url: str, model: str) -> DataError | None:
        """What is wrong with a server's weights; None when they are those that are expected. Raises ServerError."""
        answers = self.ask(url, model)
        apart = None if self._earlier is None else mean_difference(self._want, self._earlier)
        before, self._answers[url] = self._answers.get(url), answers
        new = self.nats[url] = mean_difference(compared(self._want, self._adapter), answers)
        # the same server rounds alike each time: when the trainer's weights moved and its answers did not, it has the old ones
        moved = None if before is None else mean_difference(before, answers)
        stale = moved is not None and apart is not None and apart > 0.02 and moved < apart / 10
        if new <= PROBE_LIMIT and not stale:
            return None
        return DataError(
            f"the server at {url} serves other weights: its log-probabilities differ by {new:.3g} nats"
            + (f" from the new ones, and by {moved:.3g} from what it said of the old ones" if stale else ""),
            where="generate.vllm",
            expected=f"at most {PROBE_LIMIT} nats",
            hint="set generate.vllm.reload, or start the server on the checkpoint",
        )


def wanted_logprobs(weights: Path | None, vocab_size: int, loaded: Any) -> list[list[float]]:
    """What `Proof.expect` takes, for the live weights of `loaded` or those in a folder."""
    from iterative_sft_cli.generate.torch_probe import folder_logprobs, probe_rows, token_logprobs

    rows = probe_rows(vocab_size)
    return token_logprobs(loaded.model, rows) if weights is None else folder_logprobs(weights, rows, loaded)
