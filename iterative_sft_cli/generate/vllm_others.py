"""vLLM servers that somebody else started (`generate.vllm.base_urls`): told to take new weights, left out when they are gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate.http_client import ServerError, request_json
from iterative_sft_cli.generate.vllm_host import adapter_name, load_adapter, reload_weights
from iterative_sft_cli.generate.vllm_proof import Proof, mean_difference
from iterative_sft_cli.generate.vllm_server import SERVED_NAME
from iterative_sft_cli.generate.vllm_weights import Announced, Stage, adapter_rank
from iterative_sft_cli.plugin_import import find_plugin

log = logging.getLogger(__name__)


class OtherServers:
    """The servers of `section.vllm.base_urls`; one that has served and is gone is left out of a phase while there is another."""

    apart = False

    def __init__(self, section: Any, *, proof: Proof, base_dir: Path) -> None:
        self.section, self.settings = section, section.vllm
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in self.settings.base_urls]
        self.model_name = SERVED_NAME
        self._proof = proof
        self._base_dir = base_dir
        self._stage = Stage(Path(self.settings.stage_to) if self.settings.stage_to else None)
        self._weights: Announced | None = None
        self._adapters: dict[str, str] = {}
        self._gone: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Servers that take part in this phase: what `address_of` and `recover` take."""
        return [url for url in self.urls if url not in self._gone]

    def address_of(self, name: str) -> str:
        """A server's address is its name."""
        return name

    def open(self) -> None:
        """Nothing to share out."""

    def pump(self) -> None:
        """Nothing comes from elsewhere."""

    def begin(self, weights: Announced, tick: Callable[[], None]) -> None:
        """New weights on every server. Raises DataError for one that does not answer."""
        folder = self._stage.take(weights, tick)
        reload = self.settings.reload
        self._weights = weights
        self._gone.clear()
        for url in self.urls:
            try:
                if reload == "http":
                    self._load(url, folder)
                elif reload is not None and reload != "restart":
                    reloads = find_plugin(
                        reload, kind="function", base_dir=self._base_dir, where="generate.vllm.reload"
                    )
                    reloads(url, folder)
                if reload == "restart":
                    self._wait_for_restart(url, tick)
                if self.model_name == SERVED_NAME:
                    models = request_json("GET", f"{url}/v1/models", timeout_s=30)
                    self.model_name = str(models["data"][0]["id"])
            except ServerError as error:
                if self.leave_out(url, error):
                    continue
                raise DataError(str(error), where="generate.vllm.base_urls", hint="start the server first") from error
        self._stage.forget(weights, keep=True)

    def _load(self, url: str, folder: Path) -> None:
        assert self._weights is not None
        timeout_s = self.section.startup_timeout_s
        if adapter_rank(folder) is None:
            reload_weights(url, folder, timeout_s)
            return
        load_adapter(url, self._weights.name, folder, self._adapters.get(url), timeout_s)
        self._adapters[url] = self._weights.name
        self.model_name = adapter_name(self._weights.name)

    def leave_out(self, url: str, error: ServerError) -> bool:
        """Go on without a server that has served and does not answer any more, while there is another."""
        if error.status is not None or not self._proof.knows(url) or len(self._gone) + 1 >= len(self.urls):
            return False
        log.warning("%s does not answer any more: this phase goes on without it", url)
        self._gone.add(url)
        return True

    def _wait_for_restart(self, url: str, tick: Callable[[], None]) -> None:
        """Whoever runs the server restarts it on what lies in `stage_to`; until then it is away or serves the old weights."""
        start, away = time.monotonic(), False
        while time.monotonic() - start < self.section.startup_timeout_s:
            tick()
            try:
                request_json("GET", f"{url}/health", timeout_s=5)
                before = self._proof.answers_of(url)
                if away or before is None or mean_difference(before, self._proof.ask(url, self.model_name)) > 1e-3:
                    return
            except ServerError:
                away = True
            time.sleep(1.0)
        raise DataError(f"{url} was not restarted on new weights", where="generate.vllm.reload")

    def mend(self, name: str, problem: DataError, tick: Callable[[], None]) -> None:
        """A server on other weights is not ours to start again: raises `problem`."""
        raise problem

    def end(self, tick: Callable[[], None]) -> None:
        """They keep what they have."""

    def close(self) -> None:
        """Remove copies of weights."""
        if self._weights is not None:
            self._stage.forget(self._weights, keep=False)
