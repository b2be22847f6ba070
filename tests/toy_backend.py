"""A stdlib-only model, trainer and engine for tests of the loop: it adds two numbers, and training raises its skill.

Named in a config as `model: {use: "toy_backend.py:make"}`. Everything is a pure function of weights and seeds, and the
weights hold a hash over every row they were trained on, so that a lost, repeated or reordered row shows.
"""

import hashlib
import json
import os
import re
import time
from pathlib import Path

from iterative_sft_cli.generate.base import EngineOutOfMemory
from iterative_sft_cli.train.base import TrainOutOfMemory
from iterative_sft_cli.types import EOS, LENGTH, Completion, TrainRow

BASE = {"skill": 0.3, "steps": 0, "digest": ""}
DELAY_S = float(os.environ.get("TOY_DELAY_S", "0"))
HANG = os.environ.get("TOY_HANG", "")
"""A file: the engine hangs while it is there, and removes it first when its name ends in `once`."""
FITS = {"rows": 10**9, "tokens": 10**9}
"""Batch rows and micro-batch tokens that fit into the pretended memory."""

NONFINITE: dict[tuple[str, int], float] = {}
"""The loss of a step that goes wrong, by (round of its first row, step of the round)."""


def pause() -> None:
    # a sleep of no seconds still gives up the processor
    if DELAY_S:
        time.sleep(DELAY_S)


def uniform(*parts: object) -> float:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


class Thinking:
    def __init__(self, text: str) -> None:
        self.reasoning, self.final, self.closed = None, text, True


class ToyEncoder:
    eos_token_ids = (0,)
    pad_token_id = 1
    vocab_size = 256
    context_length = 512
    fingerprint = "toy"

    def encode_prompt(self, prompt: object) -> list[int]:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return list(text.encode("ascii"))

    def decode(self, ids: object) -> str:
        return bytes(i for i in ids if i > 1).decode("ascii")

    def split_thinking(self, text: str, prompt_ids: object) -> Thinking:
        return Thinking(text)

    def training_row(self, sample: object, weight: float = 1.0) -> TrainRow:
        ids = (*sample.prompt_ids, *sample.completion_ids)
        return TrainRow(sample.sample_id, ids, (-100,) * len(sample.prompt_ids) + tuple(sample.completion_ids), weight)

    def conversation_row(self, sample_id: str, conversation: object, weight: float = 1.0) -> TrainRow:
        prompt, completion = conversation
        a, b = self.encode_prompt(prompt), [*completion.encode("ascii"), 0]
        return TrainRow(sample_id, (*a, *b), (-100,) * len(a) + tuple(b), weight)


class ToyLearner:
    deterministic = True

    def __init__(self) -> None:
        self.weights = dict(BASE)
        self.moment = 0.0
        self.rate = 0.0
        self.heartbeat = lambda num_tokens: None

    def load_weights(self, folder: Path | None, *, round_index: int = 0) -> None:
        self.weights = dict(BASE) if folder is None else json.loads((folder / "model.json").read_text())
        self.moment = 0.0

    def load_state(self, folder: Path) -> None:
        state = json.loads((folder / "state" / "trainer.json").read_text())
        self.weights, self.moment = state["weights"], state["moment"]

    def begin(self, settings: object, num_steps: int, *, seed: int, keep_optimizer: bool) -> None:
        self.rate, self.num_steps = float(settings.learning_rate), num_steps
        if not keep_optimizer:
            self.moment = 0.0

    def step(self, rows: object, step_index: int, micro_batch_tokens: int | None) -> dict:
        longest = max(len(row.input_ids) for row in rows)
        at_once = max(longest, micro_batch_tokens or sum(len(row.input_ids) for row in rows))
        if at_once > FITS["tokens"]:
            raise TrainOutOfMemory
        for row in rows:
            self.heartbeat(len(row.input_ids))
            pause()
        wrong = NONFINITE.get((rows[0].sample_id.partition("-")[0], step_index))
        if wrong is not None:
            return {
                "loss": wrong,
                "num_tokens": 0,
                "num_trained_tokens": 0,
                "num_samples": len(rows),
                "skipped_nonfinite": 1,
            }
        text = json.dumps([[r.sample_id, r.input_ids, r.weight] for r in rows])
        self.moment = 0.5 * self.moment + 0.5
        self.weights = {
            "skill": self.weights["skill"] + 0.05 * self.moment * (1 - self.weights["skill"]),
            "steps": self.weights["steps"] + 1,
            "digest": hashlib.sha256((self.weights["digest"] + text + str(step_index)).encode()).hexdigest(),
        }
        trained = sum(label != -100 for row in rows for label in row.labels)
        return {
            "loss": 1.0 - self.weights["skill"],
            "num_tokens": sum(len(row.input_ids) for row in rows),
            "num_trained_tokens": trained,
            "num_samples": len(rows),
            "learning_rate": self.rate * (1 - step_index / self.num_steps),
            "grad_norm": self.moment,
            "skipped_nonfinite": 0,
        }

    def save(self, folder: Path, *, state: bool) -> None:
        (folder / "model.json").write_text(json.dumps(self.weights))
        if state:
            (folder / "state").mkdir()
            text = json.dumps({"weights": self.weights, "moment": self.moment})
            (folder / "state" / "trainer.json").write_text(text)

    def loss(self, rows: object) -> float:
        return 2.0 - self.weights["skill"]

    def offload(self) -> None: ...

    def reload(self) -> None: ...


class ToyEngine:
    deterministic = True

    def __init__(self, learner: ToyLearner) -> None:
        self.learner = learner
        self.heartbeat = lambda num_tokens: None

    def begin(self, weights: Path | None) -> None:
        self.weights = (
            dict(self.learner.weights) if weights is None else json.loads((weights / "model.json").read_text())
        )

    def plan(self, requests: object, decoding: object) -> dict:
        return {"max_rows": 8}

    def generate(self, requests: object, decoding: object, plan: dict) -> object:
        if HANG and os.path.exists(HANG):
            if HANG.endswith("once"):
                os.unlink(HANG)
            time.sleep(60)
        for number, request in enumerate(requests):
            if number == 1 and plan["max_rows"] > FITS["rows"]:
                raise EngineOutOfMemory
            text = request.prompt if isinstance(request.prompt, str) else request.prompt[-1]["content"]
            hint = re.search(r"hint (\d+)", text)
            total = int(hint[1]) if hint else sum(int(n) for n in re.findall(r"\d+", text))
            for index, seed in zip(request.sample_indices, request.seeds, strict=True):
                skill = self.weights["skill"] / decoding.temperature**0.5
                right = not decoding.do_sample or uniform(seed, 0) < (0.9 if hint else skill)
                answer = total if right else total + 1 + int(uniform(seed, 1) * 5)
                ids = [*f"The answer is {answer}.".encode("ascii"), 0]
                reason = EOS
                if len(ids) > decoding.max_new_tokens:
                    ids, reason = ids[: decoding.max_new_tokens], LENGTH
                pause()
                self.heartbeat(len(ids))
                logprob = -uniform(seed, 2) * len(ids)
                each = (logprob / len(ids),) * len(ids) if decoding.keep_logprobs else None
                yield Completion(request.prompt_id, index, tuple(ids), reason, None, logprob, each)

    def end(self) -> None: ...


class Toy:
    base_hash = "toy-base"

    def __init__(self) -> None:
        self.encoder = ToyEncoder()
        self.learner = ToyLearner()
        self.engine = ToyEngine(self.learner)


def make(config: object) -> Toy:
    return Toy()
