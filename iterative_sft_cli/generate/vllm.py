"""Completions from vLLM servers over HTTP: token ids in, token ids and log-probabilities out.

Guarantee: a server's samples are used only after its log-probabilities on fixed rows match those of the weights that are to
generate; a server that dies is started again (ours) or left out (others'), and every sample comes exactly once.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.generate.base import no_heartbeat
from iterative_sft_cli.generate.crew import Crew
from iterative_sft_cli.generate.http_client import ServerError, request_json, stream_json, tell
from iterative_sft_cli.generate.vllm_proof import compared, mean_difference, served_logprobs
from iterative_sft_cli.generate.vllm_request import completion_body
from iterative_sft_cli.generate.vllm_server import SERVED_NAME, Server, free_port, serve_command
from iterative_sft_cli.plugin_import import find_plugin
from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, STOP, Completion, Decoding, Request

log = logging.getLogger(__name__)

CONCURRENCY = 128
"""Requests in flight to one server: vLLM queues what is more, and a queued request makes no token."""
MAX_RETRIES = 6
MAX_RESTARTS = 3
"""How often a server of ours is started again within one shard."""
PROBE_LIMIT = 0.25
"""Mean absolute difference in log-probability that rounding may explain, nats."""


class VllmEngine:
    """`Engine` over vLLM servers. `section` is a `GenerateConfig`, `loaded` the trainer's `LoadedModel`.

    With `vllm.base_urls` the servers are others' and take new weights as `vllm.reload` says; without, one server is started
    from `vllm.python`, given new weights in place, put to sleep (GPU) or left idle (CPU) while training.
    """

    deterministic = False

    def __init__(self, section: Any, *, loaded: Any, encoder: Any, run_dir: Path | None, base_dir: Path) -> None:
        self.section = section
        self.settings = section.vllm
        self.loaded = loaded
        self.encoder = encoder
        self.base_dir = base_dir
        self.heartbeat: Callable[[int], None] = no_heartbeat
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in self.settings.base_urls]
        self._stage = Path(self.settings.stage_to) if self.settings.stage_to else (run_dir or Path()) / "serving"
        if run_dir is None and not self.settings.stage_to:
            self._stage = Path(tempfile.mkdtemp(prefix="isft-serving-"))
        self._numbers = itertools.count(1)
        self._server: Server | None = None
        self._serving: Path | None = None
        self._model_name = SERVED_NAME
        self._asleep = False
        self._adapter = False
        self._earlier: list[list[float]] | None = None
        self._answers: dict[str, list[list[float]]] = {}
        self._gone: set[str] = set()
        self._crew: Crew[Any, Completion] | None = None
        self.proof: dict[str, float] = {}
        """How far each server's log-probabilities were from the trainer's at the last `begin`, mean absolute nats by address."""

    # -- weights ---------------------------------------------------------------------------------------------------

    def begin(self, weights: Path | None) -> None:
        """Make every server serve `weights`, and prove it. Raises DataError when one does not."""
        folder = self._staged(weights)
        adapter = self._adapter = (folder / "adapter_config.json").exists()
        if self.urls:
            self._reload_others(folder, adapter)
        else:
            self._serve(folder, adapter)
        self._prove(weights, folder)
        for old in self._stage.glob("weights-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def end(self) -> None:
        """Free the device: sleep on a GPU. On a CPU the idle server only holds memory and stays for the next phase."""
        if self._server is None or not self._on_gpu() or self._asleep:
            return
        try:
            tell(f"{self._server.address}/sleep?level=2", timeout_s=120)
            self._asleep = True
        except ServerError:
            self.close()

    def close(self) -> None:
        """End the server that was started, and remove staged weights."""
        if self._server is not None:
            self._server.stop()
        self._server, self._serving, self._asleep = None, None, False
        shutil.rmtree(self._stage, ignore_errors=True)

    def __del__(self) -> None:
        if getattr(self, "_server", None) is not None:
            self._server.stop()  # type: ignore[union-attr]

    def _on_gpu(self) -> bool:
        return str(self.loaded.device).startswith("cuda")

    def _staged(self, weights: Path | None) -> Path:
        """A folder of its own for these weights: servers may have read the last one halfway."""
        folder = self._stage.resolve() / f"weights-{time.time_ns():x}-{next(self._numbers)}"
        if weights is None:
            from iterative_sft_cli.model import save_pretrained

            save_pretrained(self.loaded, folder)
        elif self.settings.stage_to:
            shutil.copytree(weights, folder, ignore=shutil.ignore_patterns("state"))
        else:
            return weights.resolve()
        return folder

    def _serve(self, folder: Path, adapter: bool) -> None:
        """Our server: started on first use, new weights in place after that, restarted where that does not work."""
        if self._server is not None and self._server.running():
            try:
                self._wake()
                self._load(self._server.address, folder, adapter)
                self._serving = folder
                return
            except ServerError:
                self._server.stop()
        self._start(folder, adapter)

    def _start(self, folder: Path, adapter: bool) -> None:
        model, rank = folder, None
        if adapter:
            rank = int(json.loads((folder / "adapter_config.json").read_text("utf-8"))["r"])
            if self.loaded.folder is None:
                raise ConfigError("vLLM serves an adapter only over a base model in a folder", where="generate.engine")
            model = self.loaded.folder
        port = free_port()
        dtype = str(self.loaded.compute_dtype).removeprefix("torch.")
        command = serve_command(
            self.settings.python, model, port=port, settings=self.settings, adapter_rank=rank, dtype=dtype
        )
        if self._on_gpu():
            command.append("--enable-sleep-mode")
        elif not any(
            str(name).lstrip("-").replace("_", "-") == "enable-chunked-prefill" for name in self.settings.args
        ):
            # vLLM 0.32 on a CPU ends at the first prompt that is cut between two steps when requests have seeds of their own
            command.append("--no-enable-chunked-prefill")
        environment = {"VLLM_SERVER_DEV_MODE": "1"}
        if adapter:
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if not self._on_gpu():
            memory = self.section.memory_gb
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(2 if memory == "auto" else max(int(memory), 1))
        log = self._stage.parent / "vllm-server.log"
        self._server = Server(command, port=port, log=log, environment=environment)
        self._asleep = False
        self._server.wait(self.section.startup_timeout_s, lambda: self.heartbeat(0))
        self._serving, self._model_name = folder, SERVED_NAME
        if adapter:
            try:
                self._load(self._server.address, folder, adapter)
            except ServerError as error:
                raise DataError(
                    f"vLLM did not take the adapter: {error}",
                    where="generate.vllm",
                    hint=f"its whole output is in {log}; model.adapter: none trains and serves all weights",
                ) from error

    def _wake(self) -> None:
        if self._asleep and self._server is not None:
            tell(f"{self._server.address}/wake_up", timeout_s=600)
            self._asleep = False

    def _load(self, address: str, folder: Path, adapter: bool) -> None:
        """Tell a server to take the weights in `folder`; nothing else about it changes."""
        if adapter:
            name = f"{SERVED_NAME}-{folder.name}"
            body = {"lora_name": name, "lora_path": str(folder)}
            self._ask("/v1/load_lora_adapter", body, address)
            if self._model_name not in (SERVED_NAME, name):
                self._ask("/v1/unload_lora_adapter", {"lora_name": self._model_name}, address)
            self._model_name = name
            return
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}, address)
        try:
            tell(f"{address}/reset_prefix_cache", timeout_s=60)
        except ServerError as error:
            if error.status != 404:
                raise

    def _ask(self, path: str, body: dict[str, Any], address: str) -> None:
        tell(address + path, body, timeout_s=self.section.startup_timeout_s)

    def _reload_others(self, folder: Path, adapter: bool) -> None:
        """New weights on the servers that others started; one that has served and is gone is left out of this phase."""
        reload = self.settings.reload
        self._gone.clear()
        for url in self.urls:
            try:
                if reload == "http":
                    self._load(url, folder, adapter)
                elif reload is not None and reload != "restart":
                    reloads = find_plugin(reload, kind="function", base_dir=self.base_dir, where="generate.vllm.reload")
                    reloads(url, folder)
                if reload == "restart":
                    self._wait_for_restart(url)
                if self._model_name == SERVED_NAME:
                    models = request_json("GET", f"{url}/v1/models", timeout_s=30)
                    self._model_name = str(models["data"][0]["id"])
            except ServerError as error:
                if self._leave_out(url, error):
                    continue
                raise DataError(str(error), where="generate.vllm.base_urls", hint="start the server first") from error

    def _leave_out(self, url: str, error: ServerError) -> bool:
        """Go on without a server that has served and does not answer any more, while there is another."""
        if error.status is not None or url not in self._answers or len(self._gone) + 1 >= len(self.urls):
            return False
        log.warning("%s does not answer any more: this phase goes on without it", url)
        self._gone.add(url)
        return True

    def _wait_for_restart(self, url: str) -> None:
        """Whoever runs the server restarts it on what lies in `stage_to`; until then it is away or serves the old weights."""
        start, away = time.monotonic(), False
        while time.monotonic() - start < self.section.startup_timeout_s:
            self.heartbeat(0)
            try:
                request_json("GET", f"{url}/health", timeout_s=5)
                before = self._answers.get(url)
                if away or before is None or mean_difference(before, self._asked(url)) > 1e-3:
                    return
            except ServerError:
                away = True
            time.sleep(1.0)
        raise DataError(f"{url} was not restarted on new weights", where="generate.vllm.reload")

    # -- proof -----------------------------------------------------------------------------------------------------

    def _prove(self, weights: Path | None, folder: Path) -> None:
        """Compare each server's log-probabilities with the trainer's. Raises DataError for a server on other weights."""
        from iterative_sft_cli.generate.torch_probe import folder_logprobs, probe_rows, token_logprobs

        rows = probe_rows(self.encoder.vocab_size)
        if weights is None or (folder / "adapter_config.json").exists():
            want = token_logprobs(self.loaded.model, rows)
        else:
            want = folder_logprobs(weights, rows, self.loaded)
        self.proof = {}
        for url in self._addresses():
            try:
                answers = self._asked(url)
            except ServerError as error:
                if self._leave_out(url, error):
                    continue
                raise DataError(f"the weights of {url} could not be checked: {error}", where="generate.vllm") from error
            apart = None if self._earlier is None else mean_difference(want, self._earlier)
            before, self._answers[url] = self._answers.get(url), answers
            new = self.proof[url] = mean_difference(compared(want, self._adapter), answers)
            # the same server rounds alike each time: when the trainer's weights moved and its answers did not, it has the old ones
            moved = None if before is None else mean_difference(before, answers)
            stale = moved is not None and apart is not None and apart > 0.02 and moved < apart / 10
            if new > PROBE_LIMIT or stale:
                raise DataError(
                    f"the server at {url} serves other weights: its log-probabilities differ by {new:.3g} nats"
                    + (f" from the new ones, and by {moved:.3g} from what it said of the old ones" if stale else ""),
                    where="generate.vllm",
                    expected=f"at most {PROBE_LIMIT} nats",
                    hint="set generate.vllm.reload, or start the server on the checkpoint",
                )
        self._earlier = want

    def _asked(self, url: str) -> list[list[float]]:
        return served_logprobs(
            url,
            vocab_size=self.encoder.vocab_size,
            model=self._model_name,
            adapter=self._adapter,
            timeout_s=self.section.timeout_s,
        )

    # -- generation ------------------------------------------------------------------------------------------------

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        """Rows are requests in flight; the servers make their own batches."""
        return {"max_rows": CONCURRENCY * max(len(self.urls), 1), "engine": "vllm"}

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
        addresses = self._addresses()
        restarts = itertools.count(1)

        def ask(server: str, job: Any, on_tokens: Callable[[int], None], stopped: Callable[[], bool]) -> Completion:
            # a server of ours that was started again has a new address
            address = server if self._server is None else self._server.address
            return self._complete(address, job, decoding, on_tokens, stopped)

        self._crew = Crew(
            addresses,
            ask,
            concurrency=max(int(plan["max_rows"]) // len(addresses), 1),
            max_retries=MAX_RETRIES,
            recover=None if self._server is None else lambda server: self._recover(restarts),
        )
        yield from self._crew.run(jobs, lambda num_tokens: self.heartbeat(num_tokens))

    def _addresses(self) -> list[str]:
        if self.urls:
            return [url for url in self.urls if url not in self._gone]
        if self._server is None:
            raise RuntimeError("generate() needs begin() first")
        return [self._server.address]

    def _recover(self, restarts: Iterator[int]) -> bool:
        """Start our server again when it is gone."""
        server = self._server
        if server is None or self._serving is None or (server.running() and server.healthy()):
            return server is not None
        if next(restarts) > MAX_RESTARTS:
            raise DataError(
                f"vLLM ended {MAX_RESTARTS + 1} times in one shard:\n{server.log_tail()}",
                where="generate.vllm",
                hint=f"its whole output is in {server.log}",
            )
        server.stop()
        heartbeat, self.heartbeat = self.heartbeat, no_heartbeat
        try:
            self._start(self._serving, (self._serving / "adapter_config.json").exists())
        finally:
            self.heartbeat = heartbeat
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
        body = completion_body(self._model_name, request.prompt_ids, decoding, seed=seed, limit=limit)
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
