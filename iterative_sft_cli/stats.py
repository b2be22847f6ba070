"""The figures of one round: what `stats.jsonl` holds, as flat keys named after the stages; no clock, no path, no tensor.

Definitions are in the docstring of each figure's function; every figure is a function of the sealed shards.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from iterative_sft_cli.samples import StoredSample
from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, STOP

DIVERSITY_TOKENS = 20_000
"""distinct-n and the compression ratio look at this many tokens at most: both fall with the amount of text."""


def percentile(counts: Mapping[int, int], q: float) -> float:
    """The q-quantile (0..1) by the nearest rank of values of which each is there so often; 0.0 for no values."""
    left = max(1, math.ceil(q * sum(counts.values())))
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return float(value)
    return 0.0


class RoundCounter:
    """Adds up a round sample by sample; holds counts, lengths and a bounded amount of text, never the samples."""

    def __init__(self, known: Sequence[int] = ()) -> None:
        self.known = known
        self.num_known = 0
        self.hinted_prompts: set[str] = set()
        self.num_hinted = 0
        self.num_hinted_tokens = 0
        self.num_hinted_accepted = 0
        self.num_samples = 0
        self.num_tokens = 0
        self.finish: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.num_accepted_tokens = 0
        self.empty = 0
        self.made: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.entered: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)
        self.scores: dict[str, tuple[int, float]] = {}
        self.num_accepted = 0
        self.unique: set[int] = set()
        self.logprob = 0.0
        self.logprob_tokens = 0
        self.tokens: list[int] = []
        self.ngrams: dict[int, set[tuple[int, ...]]] = {1: set(), 2: set(), 4: set()}
        self.ngram_counts: Counter[int] = Counter()

    @staticmethod
    def key_of(prompt_id: str, completion: str) -> int:
        """What makes two accepted samples the same: the prompt and the text, as a number that is the same in every process."""
        text = f"{prompt_id}\0{completion.strip()}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")

    @property
    def num_trainable(self) -> int:
        """Samples to train on: those accepted, second tries with a hint included."""
        return self.num_accepted + self.num_hinted_accepted

    def add(self, stored: StoredSample) -> None:
        """Count one judged sample; second tries are counted apart, the yield of the filters is that of plain samples."""
        sample = stored.sample
        if stored.hinted:
            self.hinted_prompts.add(sample.prompt_id)
            self.num_hinted += 1
            self.num_hinted_tokens += len(sample.completion_ids)
            self.num_hinted_accepted += stored.accepted
            return
        length = len(sample.completion_ids)
        self.num_samples += 1
        self.num_tokens += length
        self.finish[sample.finish_reason] += 1
        self.lengths[length] += 1
        self.empty += not sample.completion.strip()
        self.made[sample.prompt_id] += 1
        for says in stored.says:
            name = says["filter"]
            self.entered[name] = self.entered.get(name, 0) + 1
            if not says["keep"]:
                self.dropped[name] = self.dropped.get(name, 0) + 1
                self.reasons[name][says.get("reason") or "rejected"] += 1
            if says.get("score") is not None:
                count, total = self.scores.get(name, (0, 0.0))
                self.scores[name] = (count + 1, total + float(says["score"]))
        if sample.logprob is not None and length:
            self.logprob += sample.logprob
            self.logprob_tokens += length
        if not stored.accepted:
            return
        self.num_accepted += 1
        self.num_accepted_tokens += length
        self.accepted[sample.prompt_id] += 1
        key = self.key_of(sample.prompt_id, sample.completion)
        self.unique.add(key)
        at = bisect_left(self.known, key)
        self.num_known += at < len(self.known) and self.known[at] == key
        if len(self.tokens) < DIVERSITY_TOKENS:
            ids = sample.completion_ids
            self.tokens += ids
            for n, seen in self.ngrams.items():
                grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
                seen.update(grams)
                self.ngram_counts[n] += len(grams)

    def generate_row(self) -> dict[str, Any]:
        """`generate/...`: counts, lengths in tokens, the shares of each way to end, and token_nll, the mean negative log-likelihood of a
        sampled token: at temperature 1 without truncation an unbiased estimate of the model's entropy a token."""
        n = max(1, self.num_samples)
        row: dict[str, Any] = {
            "generate/num_prompts": len(self.made),
            "generate/num_samples": self.num_samples,
            "generate/num_tokens": self.num_tokens,
            "generate/mean_tokens": self.num_tokens / n,
            "generate/p50_tokens": percentile(self.lengths, 0.5),
            "generate/p95_tokens": percentile(self.lengths, 0.95),
            "generate/eos_rate": (self.finish[EOS] + self.finish[STOP]) / n,
            "generate/truncated_rate": self.finish[LENGTH] / n,
            "generate/prompt_too_long": self.finish[PROMPT_TOO_LONG],
            "generate/empty_rate": self.empty / n,
        }
        if self.logprob_tokens:
            row["generate/token_nll"] = -self.logprob / self.logprob_tokens
        return row

    def rationalize_row(self) -> dict[str, Any]:
        """`rationalize/...`: second tries: prompts asked again, samples, tokens, and those accepted; nothing without any."""
        if not self.num_hinted:
            return {}
        return {
            "rationalize/num_prompts": len(self.hinted_prompts),
            "rationalize/num_samples": self.num_hinted,
            "rationalize/num_tokens": self.num_hinted_tokens,
            "rationalize/num_accepted": self.num_hinted_accepted,
        }

    def filters_row(self) -> dict[str, Any]:
        """`filters/...`: yield, coverage, difficulty, diversity of what was accepted, and the funnel of each filter.

        unique_rate: distinct (prompt, text) pairs a accepted sample. known_rate: share of the accepted whose pair was accepted in an earlier
        round. easy_share: share of the accepted that come from prompts of which over three quarters were accepted. effective_prompts:
        A^2 / sum of a_i^2 over the a_i accepted of each prompt. length_bias: mean tokens of the accepted over those of all. distinct_n: distinct
        n-grams of tokens over all n-grams, in the first tokens accepted (DIVERSITY_TOKENS).
        """
        n, accepted = max(1, self.num_samples), self.num_accepted
        prompts = max(1, len(self.made))
        rates = Counter(self.accepted[key] / made for key, made in self.made.items())
        squares = sum(a * a for a in self.accepted.values())
        easy = sum(a for key, a in self.accepted.items() if a / self.made[key] > 0.75)
        row: dict[str, Any] = {
            "filters/num_accepted": accepted,
            "filters/accept_rate": accepted / n,
            "filters/num_unique": len(self.unique),
            "filters/num_solved": len(self.accepted),
            "filters/solved_rate": len(self.accepted) / prompts,
            "filters/all_accepted_rate": rates[1.0] / prompts,
            "filters/none_accepted_rate": rates[0.0] / prompts,
            "filters/difficulty": difficulty_histogram(rates),
        }
        if accepted:
            mean_accepted = self.num_accepted_tokens / accepted
            row |= {
                "filters/unique_rate": len(self.unique) / accepted,
                "filters/known_rate": self.num_known / accepted,
                "filters/mean_accepted_tokens": mean_accepted,
                "filters/length_bias": mean_accepted / max(1e-9, self.num_tokens / n),
                "filters/easy_share": easy / accepted,
                "filters/effective_prompts": accepted * accepted / squares,
                "filters/compression_ratio": compression_ratio(self.tokens),
            }
            for size, seen in self.ngrams.items():
                if self.ngram_counts[size]:
                    row[f"filters/distinct_{size}"] = len(seen) / self.ngram_counts[size]
        for name, entered in self.entered.items():
            row[f"filters/{name}/entered"] = entered
            row[f"filters/{name}/dropped"] = self.dropped.get(name, 0)
            for reason, count in sorted(self.reasons[name].items()):
                row[f"filters/{name}/reason/{reason}"] = count
            if name in self.scores:
                count, total = self.scores[name]
                row[f"filters/{name}/mean_score"] = total / count
        return row


def difficulty_histogram(rates: Mapping[float, int]) -> list[int]:
    """Prompts by their share of accepted samples: 0, (0, .25], (.25, .5], (.5, .75], (.75, 1), 1. `rates`: how many have each share."""
    bins = [0] * 6
    for rate, count in rates.items():
        bins[0 if rate == 0 else 5 if rate == 1 else 1 + min(3, math.ceil(rate * 4) - 1)] += count
    return bins


def compression_ratio(tokens: Sequence[int]) -> float:
    """zlib's compressed share of the token bytes: low means repetitive; a cheap sign of collapse."""
    raw = b"".join(int(t).to_bytes(4, "little") for t in tokens[:DIVERSITY_TOKENS])
    return len(zlib.compress(raw, 6)) / len(raw) if raw else 0.0


class TrainCounter:
    """Adds up the optimizer steps of a round."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[int] = []
        self.grad_norms: list[float] = []
        self.learning_rate = 0.0
        self.num_steps = 0
        self.num_tokens = 0
        self.num_trained_tokens = 0
        self.skipped_nonfinite = 0
        self.undone = False

    def undo(self) -> None:
        """Forget the steps so far, which were taken back; how many were not finite stays."""
        skipped = self.skipped_nonfinite
        self.__init__()  # type: ignore[misc]
        self.skipped_nonfinite, self.undone = skipped, True

    def add(self, step: Mapping[str, Any]) -> None:
        """Count one optimizer step's statistics."""
        self.num_steps += 1
        self.num_tokens += step.get("num_tokens", 0)
        self.num_trained_tokens += step.get("num_trained_tokens", 0)
        self.skipped_nonfinite += step.get("skipped_nonfinite", 0)
        self.learning_rate = max(self.learning_rate, step.get("learning_rate") or 0.0)
        if step.get("loss") is not None:
            self.losses.append(step["loss"])
            self.weights.append(max(1, step.get("num_trained_tokens", 1)))
        if step.get("grad_norm") is not None:
            self.grad_norms.append(step["grad_norm"])

    def row(self, num_rows: int) -> dict[str, Any]:
        """`train/...`: token-weighted mean loss, first and last step's loss, largest gradient norm and learning rate."""
        row: dict[str, Any] = {
            "train/num_rows": num_rows,
            "train/num_steps": self.num_steps,
            "train/num_tokens": self.num_tokens,
            "train/num_trained_tokens": self.num_trained_tokens,
            "train/learning_rate": self.learning_rate,
            "train/skipped_nonfinite": self.skipped_nonfinite,
        }
        if self.undone:
            row["train/undone"] = 1
        if self.losses:
            row["train/loss"] = sum(x * w for x, w in zip(self.losses, self.weights, strict=True)) / sum(self.weights)
            row["train/loss_first"], row["train/loss_last"] = self.losses[0], self.losses[-1]
        if self.grad_norms:
            row["train/grad_norm"] = max(self.grad_norms)
        return row
