"""Models whose behaviour under generate-filter-train has a closed form: least squares, a Gaussian, a table.

Each is a backend for `model: {use: closed_form_models.py:NAME, args: {...}}`: real rounds, filters, pools and steps around a model
that is fitted exactly. Completions are texts; `weights` are plain lists, so a checkpoint is a JSON file.
"""

import json
import math
import random
import re
from pathlib import Path

import numpy as np

from iterative_sft_cli.types import EOS, Completion, TrainRow

END = 0


class Encoder:
    eos_token_ids = (END,)
    pad_token_id = 1
    vocab_size = 256
    context_length = 1 << 20
    fingerprint = "closed-form"

    def encode_prompt(self, prompt):
        return list(prompt.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i > 1).decode()

    def split_thinking(self, text, prompt_ids):
        return type("Thinking", (), {"reasoning": None, "final": text, "closed": True})

    def training_row(self, sample, weight=1.0):
        ids = (*sample.prompt_ids, *sample.completion_ids)
        return TrainRow(sample.sample_id, ids, (-100,) * len(sample.prompt_ids) + tuple(sample.completion_ids), weight)

    def conversation_row(self, sample_id, conversation, weight=1.0):
        prompt, completion = conversation
        a, b = self.encode_prompt(prompt), [*completion.encode(), END]
        return TrainRow(sample_id, (*a, *b), (-100,) * len(a) + tuple(b), weight)

    def texts(self, row):
        """(prompt, completion) of a training row."""
        split = next(i for i, label in enumerate(row.labels) if label != -100)
        return self.decode(row.input_ids[:split]), self.decode(row.labels[split:])


class Model:
    """Learner and engine in one; subclasses give `base`, `answer` and `fit`."""

    deterministic = True
    base_hash = "closed-form"

    def __init__(self, config):
        self.args = config.model.args
        self.encoder = Encoder()
        self.learner = self.engine = self
        self.heartbeat = lambda num_tokens: None
        self.weights = self.base()
        self.serving = self.weights

    # what a model is

    def base(self):
        return {}

    def answer(self, prompt, seed, index, temperature):
        """(completion, logprob)."""
        raise NotImplementedError

    def fit(self, pairs, row_weights, rate):
        """Take one step on (prompt, completion) pairs."""

    # learner

    def load_weights(self, folder, *, round_index=0):
        self.weights = self.base() if folder is None else json.loads((folder / "model.json").read_text())

    def load_state(self, folder):
        self.load_weights(folder)

    def begin(self, settings, num_steps, *, seed, keep_optimizer):
        self.rate = float(settings.learning_rate)

    def step(self, rows, step_index, micro_batch_tokens):
        self.fit([self.encoder.texts(row) for row in rows], [row.weight for row in rows], self.rate)
        trained = sum(label != -100 for row in rows for label in row.labels)
        sizes = {"num_tokens": trained, "num_trained_tokens": trained, "num_samples": len(rows)}
        return {"loss": 0.0, "learning_rate": self.rate, "grad_norm": 0.0, "skipped_nonfinite": 0, **sizes}

    def save(self, folder, *, state):
        (folder / "model.json").write_text(json.dumps(self.weights))
        if state:
            (folder / "state").mkdir()
            (folder / "state" / "trainer.json").write_text("{}")

    def offload(self): ...

    def reload(self): ...

    # engine

    def plan(self, requests, decoding):
        return {"max_rows": 1}

    def generate(self, requests, decoding, plan):
        for request in requests:
            for index, seed in zip(request.sample_indices, request.seeds, strict=True):
                text, logprob = self.answer(request.prompt, seed, index, decoding.temperature)
                yield Completion(request.prompt_id, index, (*text.encode(), END), EOS, text, logprob)

    def end(self): ...


class Serving(Model):
    """`begin` means two things: a pass of training, and serving weights."""

    def __init__(self, config):
        super().__init__(config)
        engine = type("Engine", (), {})()
        engine.deterministic, engine.heartbeat = True, lambda num_tokens: None
        engine.begin = self.serve
        engine.plan, engine.generate, engine.end = self.plan, self.generate, self.end
        self.engine = engine

    def serve(self, weights: Path | None):
        self.serving = self.weights if weights is None else json.loads((weights / "model.json").read_text())


def numbers(values):
    return " ".join(f"{value:.17g}" for value in values)


class OLS(Serving):
    """Least squares on a fixed design, `replicates` times at once: prompt i asks for y = x_i . w + noise."""

    def __init__(self, config):
        rng = np.random.default_rng(config.seed)
        self.d, self.t = config.model.args["d"], config.model.args["t"]
        self.replicates = config.model.args["replicates"]
        self.x = rng.standard_normal((self.t, self.d))
        self.true = rng.standard_normal((self.d, self.replicates))
        super().__init__(config)

    def base(self):
        return {"w": self.true.tolist()}

    def answer(self, prompt, seed, index, temperature):
        mean = self.x[int(prompt)] @ np.asarray(self.serving["w"])
        return numbers(mean + np.random.default_rng(seed).standard_normal(self.replicates)), None

    def fit(self, pairs, row_weights, rate):
        x = np.stack([self.x[int(prompt)] for prompt, _ in pairs])
        y = np.stack([np.array(text.split(), float) for _, text in pairs])
        self.weights = {"w": np.linalg.lstsq(x, y, rcond=None)[0].tolist()}


class Gaussian(Serving):
    """N(mu, s^2) fitted by maximum likelihood to its own samples, `replicates` times at once."""

    def base(self):
        return {"mu": [0.0] * self.args["replicates"], "s": [1.0] * self.args["replicates"]}

    def answer(self, prompt, seed, index, temperature):
        noise = np.random.default_rng(seed).standard_normal(self.args["replicates"])
        return numbers(np.asarray(self.serving["mu"]) + np.asarray(self.serving["s"]) * noise), None

    def fit(self, pairs, row_weights, rate):
        x = np.stack([np.array(text.split(), float) for _, text in pairs])
        self.weights = {"mu": x.mean(0).tolist(), "s": x.std(0).tolist()}


class Uniform(Serving):
    """A reward that is uniform on [0, 1], told as the sample's log probability so that any filter can rank by it."""

    def answer(self, prompt, seed, index, temperature):
        value = random.Random(seed).random()
        return f"{value:.17g}", value


class Table(Serving):
    """A softmax over a few words. Fitting is maximum likelihood, or with `rate` below 1 one gradient step on the logits."""

    def base(self):
        return {"logits": [math.log(p) for p in self.args["p"]]}

    def answer(self, prompt, seed, index, temperature):
        p = softmax(self.serving["logits"], temperature)
        return str(random.Random(seed).choices(range(len(p)), p)[0]), None

    def fit(self, pairs, row_weights, rate):
        size = len(self.weights["logits"])
        counts = np.zeros(size)
        for (_, text), weight in zip(pairs, row_weights, strict=True):
            counts[int(text)] += weight
        if rate >= 1.0:
            self.weights = {"logits": np.log(np.maximum(counts, 1e-9) / counts.sum()).tolist()}
        else:
            gradient = counts / len(pairs) - counts.sum() / len(pairs) * softmax(self.weights["logits"], 1.0)
            self.weights = {"logits": (np.asarray(self.weights["logits"]) + rate * gradient).tolist()}


class Solver(Serving):
    """Right with the chance that stands in the prompt; wrong answers are `other`. With `exact` the share of every prefix is right to one."""

    def answer(self, prompt, seed, index, temperature):
        p = float(re.search(r"p=([\d.]+)", prompt)[1])
        if self.args.get("exact"):
            right = math.floor((index + 1) * p + 1e-9) > math.floor(index * p + 1e-9)
        else:
            right = random.Random(seed).random() < p
        return "right 1" if right else "other 0", None


def softmax(logits, temperature):
    z = np.asarray(logits) / temperature
    z = np.exp(z - z.max())
    return z / z.sum()
