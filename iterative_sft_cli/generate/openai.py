"""Completions from a server with OpenAI's chat interface, for teachers and remote models: text in, text out.

Guarantee: the key is read from the environment variable that the config names and stands nowhere else; every sample comes
exactly once, with retries; what was asked and paid for is counted in `usage`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.encoding_thinking import ThinkingTags
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.generate.base import no_heartbeat
from iterative_sft_cli.generate.crew import Crew
from iterative_sft_cli.generate.http_client import ServerError, request_json
from iterative_sft_cli.types import EOS, LENGTH, STOP, Completion, Decoding, Request


@dataclass(slots=True)
class Usage:
    """What the servers reported so far. `cost` is in the server's currency, where it reports one."""

    num_requests: int = 0
    num_retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class OpenAIEngine:
    """`Engine` over `POST {base_url}/chat/completions`. The served model is the server's business: `begin` ignores weights.

    `top_k`, `min_p` and `repetition_penalty` are no part of OpenAI's interface and are sent only when they are set; vLLM,
    SGLang, llama.cpp and transformers serve know them. `seed` is sent, and honoured by servers that can.
    """

    deterministic = False

    def __init__(self, section: Any, *, encoder: Any) -> None:
        """Raises ConfigError without an address or model, or when the variable with the key is not set."""
        self.section = section
        self.settings = section.openai
        self.encoder = encoder
        self.heartbeat: Callable[[int], None] = no_heartbeat
        self.usage = Usage()
        self._lock = threading.Lock()
        for name in ("base_url", "model"):
            if getattr(self.settings, name) is None:
                raise ConfigError(f"engine openai needs generate.openai.{name}", where=f"generate.openai.{name}")
        self.headers: dict[str, str] = {}
        if self.settings.api_key_env is not None:
            key = os.environ.get(self.settings.api_key_env)
            if not key:
                raise ConfigError(
                    f"the environment variable {self.settings.api_key_env} is not set",
                    where="generate.openai.api_key_env",
                    hint="export it in the shell that starts isft; a key never stands in a config",
                )
            self.headers["Authorization"] = f"Bearer {key}"

    def begin(self, weights: Path | None) -> None:
        """Nothing to load: the server serves what it serves."""

    def end(self) -> None:
        """Nothing to free."""

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        """Rows are requests in flight."""
        return {"max_rows": int(self.settings.max_concurrency), "engine": "openai", "model": self.settings.model}

    def generate(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        """One request for each sample. The completion is text; its ids are made where it is trained."""
        jobs = [
            (request, index, seed)
            for request in requests
            for index, seed in zip(request.sample_indices, request.seeds, strict=True)
        ]
        crew: Crew[tuple[Request, int, int], Completion] = Crew(
            [self.settings.base_url.rstrip("/")],
            lambda server, job, on_tokens, stopped: self._complete(server, job, decoding, on_tokens),
            concurrency=int(plan["max_rows"]),
            max_retries=int(self.settings.max_retries),
            requests_per_minute=self.settings.requests_per_minute,
        )
        try:
            yield from crew.run(jobs, lambda num_tokens: self.heartbeat(num_tokens))
        finally:
            with self._lock:
                self.usage.num_requests += crew.counters.num_requests
                self.usage.num_retries += crew.counters.num_retries

    def _complete(
        self, server: str, job: tuple[Request, int, int], decoding: Decoding, on_tokens: Callable[[int], None]
    ) -> Completion:
        request, index, seed = job
        messages = self.encoder.messages(request.prompt)
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": messages,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature if decoding.do_sample else 0,
            "top_p": decoding.top_p if decoding.do_sample else 1,
            "seed": seed % 2**31,
        }
        if decoding.stop:
            body["stop"] = list(decoding.stop)
        for name, neutral in (("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
            if getattr(decoding, name) != neutral:
                body[name] = getattr(decoding, name)
        if decoding.keep_logprobs:
            body["logprobs"] = True
        body |= self.settings.extra_body
        answer = request_json(
            "POST", f"{server}/chat/completions", body, headers=self.headers, timeout_s=self.section.timeout_s
        )
        tags: ThinkingTags = getattr(self.encoder, "tags", ThinkingTags())
        try:
            choice = answer["choices"][0]
            text = tags.written(choice["message"])
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"the answer holds no completion: {str(answer)[:300]}", status=502) from error
        finish = {"stop": EOS, "eos": EOS}.get(str(choice.get("finish_reason")), LENGTH)
        stopped_at = choice.get("stop_reason")
        if finish == EOS and isinstance(stopped_at, str) and stopped_at in decoding.stop:
            finish = STOP
            text += "" if text.endswith(stopped_at) else stopped_at
        on_tokens(self._count(answer.get("usage") or {}))
        entries = (choice.get("logprobs") or {}).get("content") or []
        logprobs = tuple(float(entry["logprob"]) for entry in entries)
        return Completion(
            prompt_id=request.prompt_id,
            sample_index=index,
            token_ids=(),
            finish_reason=finish,
            text=text,
            logprob=sum(logprobs) if logprobs else None,
        )

    def _count(self, usage: dict[str, Any]) -> int:
        made = int(usage.get("completion_tokens") or 0)
        with self._lock:
            self.usage.prompt_tokens += int(usage.get("prompt_tokens") or 0)
            self.usage.completion_tokens += made
            self.usage.cost += float(usage.get("cost") or 0.0)
        return made
