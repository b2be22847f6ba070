"""Completions from vLLM servers over HTTP: token ids in, token ids and log-probabilities out.

Guarantee: a server's samples are used only after its log-probabilities on fixed rows match those of the weights that are to
generate; a server that dies is started again (ours) or left out (others'), and every sample comes exactly once.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate.base import no_heartbeat
from iterative_sft_cli.generate.crew import Crew
from iterative_sft_cli.generate.http_client import ServerError, stream_json
from iterative_sft_cli.generate.vllm_host import HostServers
from iterative_sft_cli.generate.vllm_others import OtherServers
from iterative_sft_cli.generate.vllm_ours import MAX_RESTARTS, OurServers
from iterative_sft_cli.generate.vllm_proof import Proof, wanted_logprobs
from iterative_sft_cli.generate.vllm_request import completion_body
from iterative_sft_cli.generate.vllm_weights import Announced, Publisher, adapter_rank
from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, STOP, Completion, Decoding, Request

CONCURRENCY = 128
"""Requests in flight to one server: vLLM queues what is more, and a queued request makes no token."""
MAX_RETRIES = 6


class VllmEngine:
    """`Engine` over vLLM servers. `section` is a `GenerateConfig`, `loaded` the trainer's `LoadedModel`.

    With `vllm.base_urls` the servers are others' and take new weights as `vllm.reload` says; without, they are started from
    `vllm.python` on the host (and on other hosts: `ranks/servers.py` adds them to `servers.hosts`), given new weights in place, and
    leave the device to the trainer as `vllm.while_training` says. `prepare` reads all that is needed of the trainer's weights, so that
    those may leave the device before `begin`.
    """

    deterministic = False

    def __init__(self, section: Any, *, loaded: Any, encoder: Any, run_dir: Path | None, base_dir: Path) -> None:
        self.section = section
        self.settings = section.vllm
        self.loaded = loaded
        self.heartbeat: Callable[[int], None] = no_heartbeat
        self._vocab_size = encoder.vocab_size
        self._proof = Proof(encoder.vocab_size, section.timeout_s)
        shared = Path(tempfile.mkdtemp(prefix="isft-serving-")) if run_dir is None else run_dir / "serving"
        self._publisher = Publisher(shared)
        self.servers: OurServers | OtherServers
        if self.settings.base_urls:
            self.servers = OtherServers(section, proof=self._proof, base_dir=base_dir)
        else:
            self.servers = OurServers(HostServers(section, loaded=loaded, run_dir=run_dir, logs=run_dir or shared))
        self._prepared: Announced | None = None
        self._crew: Crew[Any, Completion] | None = None

    @property
    def proof(self) -> dict[str, float]:
        """How far each server's log-probabilities were from the trainer's at the last `begin`, mean absolute nats by address."""
        return self._proof.nats

    @property
    def shares_device(self) -> bool:
        """Whether the servers have weights of their own on the trainer's device."""
        return self.servers.apart

    def open(self) -> None:
        """Raises ConfigError where the GPUs cannot be shared out among servers."""
        self.servers.open()

    # -- weights ---------------------------------------------------------------------------------------------------

    def prepare(self, weights: Path | None) -> None:
        """Write the live weights (None) where servers find them, and compute what they must say. The servers must not be awake."""
        if weights is None:
            from iterative_sft_cli.model import save_pretrained

            announced = self._publisher.publish(lambda folder: save_pretrained(self.loaded, folder))
        else:
            announced = self._publisher.announce(weights)
        adapter = adapter_rank(announced.folder) is not None
        self._proof.expect(wanted_logprobs(weights, self._vocab_size, self.loaded), adapter=adapter)
        self._prepared = announced

    def begin(self, weights: Path | None) -> None:
        """Make every server serve `weights`, and prove it. Raises DataError when one does not."""
        if self._prepared is None:
            self.prepare(weights)
        announced, self._prepared = self._prepared, None
        assert announced is not None
        self.servers.begin(announced, self._tick)
        for name in self.servers.names:
            self._prove(name)
        self._publisher.forget(announced)

    def end(self) -> None:
        """Have the servers leave the device to the trainer."""
        self.servers.end(self._tick)

    def close(self) -> None:
        """End the servers that were started, and remove weights that were written for them."""
        self.servers.close()
        self._publisher.forget(None)

    def __del__(self) -> None:
        if hasattr(self, "servers"):
            with contextlib.suppress(Exception):
                self.close()

    def _tick(self) -> None:
        self.heartbeat(0)
        self.servers.pump()

    def _prove(self, name: str) -> None:
        """Raises DataError for a server on other weights; one of ours is started again on the right ones once."""
        problem: DataError | None = None
        for mended in (False, True):
            address = self.servers.address_of(name)
            try:
                problem = self._proof.of(address, self.servers.model_name)
            except ServerError as error:
                if self.servers.leave_out(address, error):
                    return
                problem = DataError(f"the weights of {address} could not be checked: {error}", where="generate.vllm")
            if problem is None:
                return
            if mended:
                break
            self._proof.nats.pop(address, None)
            self.servers.mend(name, problem, self._tick)
        assert problem is not None
        raise DataError(
            f"{problem.what}, also after a new start",
            where=problem.where,
            expected=problem.expected,
            hint="does this vLLM know the model's architecture? its log lies beside the run",
        )

    # -- generation ------------------------------------------------------------------------------------------------

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        """Rows are requests in flight; the servers make their own batches."""
        return {"max_rows": CONCURRENCY * max(len(self.servers.names), 1), "engine": "vllm"}

    def generate(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        """One streamed request for each sample, with the sample's own seed."""
        context = int(self.loaded.context_length)
        if self.settings.max_model_len is not None:
            context = min(context, int(self.settings.max_model_len))
        jobs = []
        for request in requests:
            room = context - len(request.prompt_ids)
            for index, seed in zip(request.sample_indices, request.seeds, strict=True):
                if room < 1:
                    yield Completion(request.prompt_id, index, (), PROMPT_TOO_LONG, logprob=0.0)
                else:
                    jobs.append((request, index, seed, min(decoding.max_new_tokens, room)))
        names, servers = self.servers.names, self.servers
        if not names:
            raise RuntimeError("generate() needs begin() first")
        max_retries = MAX_RETRIES
        if isinstance(servers, OurServers):
            servers.new_shard()
            # the same request may be lost with every server that dies
            max_retries += (MAX_RESTARTS + 1) * len(names)

        def ask(server: str, job: Any, on_tokens: Callable[[int], None], stopped: Callable[[], bool]) -> Completion:
            return self._complete(servers.address_of(server), job, decoding, on_tokens, stopped)

        def heartbeat(num_tokens: int) -> None:
            self.heartbeat(num_tokens)
            servers.pump()

        self._crew = Crew(
            names,
            ask,
            concurrency=max(int(plan["max_rows"]) // len(names), 1),
            max_retries=max_retries,
            recover=self._recover if isinstance(servers, OurServers) else None,
        )
        yield from self._crew.run(jobs, heartbeat)

    def _recover(self, name: str, given_up: Callable[[], bool]) -> bool:
        """Start a server of ours again when it is gone, and prove its weights; the others go on. Raises DataError."""
        assert isinstance(self.servers, OurServers)
        before = self.servers.address_of(name)
        if not self.servers.recover(name, given_up):
            return False
        address = self.servers.address_of(name)
        if address != before:
            try:
                problem = self._proof.of(address, self.servers.model_name)
            except ServerError:
                return False
            if problem is not None:
                raise problem
        return True

    def _complete(
        self,
        address: str,
        job: tuple[Request, int, int, int],
        decoding: Decoding,
        on_tokens: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> Completion:
        request, index, seed, limit = job
        body = completion_body(self.servers.model_name, request.prompt_ids, decoding, seed=seed, limit=limit)
        ids: list[int] = []
        logprobs: list[float] = []
        reason: str | None = None
        stop_reason: Any = None
        for event in stream_json(f"{address}/v1/completions", body, timeout_s=self.section.timeout_s):
            if stopped():
                raise ServerError("stopped", status=400)
            for choice in event.get("choices", ()):
                new = choice.get("token_ids") or []
                ids += new
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
                on_tokens(len(new))
                reason = choice.get("finish_reason") or reason
                stop_reason = choice.get("stop_reason") if choice.get("finish_reason") else stop_reason
        if reason not in ("stop", "length") or len(logprobs) != len(ids):
            raise ServerError(f"the completion ended with {reason!r} after {len(ids)} token ids", status=500)
        ended = bool(ids) and ids[-1] in decoding.eos_token_ids
        finish = EOS if ended else LENGTH if reason == "length" else STOP
        return Completion(
            prompt_id=request.prompt_id,
            sample_index=index,
            token_ids=tuple(ids),
            finish_reason=finish,
            logprob=sum(logprobs),
            token_logprobs=tuple(logprobs) if decoding.keep_logprobs else None,
        )
