"""What every rank but 0 does: load the model, then do what rank 0 says until it ends the run.

Guarantee: nothing is written to the run directory here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from iterative_sft_cli.errors import EXIT_STORAGE, IsftError
from iterative_sft_cli.generate.base import EngineOutOfMemory
from iterative_sft_cli.ranks.collectives import open_collectives
from iterative_sft_cli.ranks.faults import Ended, RankError, is_broken_connection
from iterative_sft_cli.ranks.judging import RankJudge, hashes_of
from iterative_sft_cli.ranks.learner import problem_of, take_part
from iterative_sft_cli.ranks.link import Link
from iterative_sft_cli.ranks.placement import Placement
from iterative_sft_cli.ranks.servers import do_errand, tell_host
from iterative_sft_cli.ranks.wire import from_completion, pack, to_decoding, to_requests, to_rows, unpack
from iterative_sft_cli.train.base import TrainOutOfMemory
from iterative_sft_cli.watchdog import Watchdog

SAY_EVERY_S = 0.5
"""Completions are sent on this often: rank 0 sees that the shard goes on, and judges what is not judged here."""

OpenParts = Callable[..., Any]


def serve(placement: Placement, open_parts: OpenParts) -> int:
    """Work for rank 0 until the run ends; returns the exit code that rank 0 ends with.

    `open_parts(setup)` loads the model and returns an object with `learner`, `engine`, `encoder`, `filters`, `base_hash` and `model`.
    """
    try:
        link = Link(placement)
        link.on_stuck = lambda error: _last_words(error)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), link.ask_to_stop)
        link.join()
    except Ended as end:
        link.leave()
        return end.code
    except RankError as error:
        _last_words(error)
        return EXIT_STORAGE
    try:
        return Worker(link, open_parts).run()
    except Ended as end:
        return end.code
    except RankError as error:
        _last_words(error)
        return EXIT_STORAGE
    finally:
        link.leave()


def _last_words(error: BaseException) -> None:
    sys.stderr.write(f"isft: {error}\n")
    sys.stderr.flush()


class Worker:
    """The calls of one rank."""

    def __init__(self, link: Link, open_parts: OpenParts) -> None:
        self.link = link
        setup, _ = link.next_command()
        try:
            self.timeout_s = float(setup["timeout_s"])
            parts = open_parts(setup)
            self.learner, self.engine, self.servers = parts.learner, parts.engine, getattr(parts, "servers", None)
            self.judge = RankJudge(parts.encoder, parts.filters, link)
            link.put(f"ready/{link.rank}", [parts.base_hash, hashes_of(parts.filters)])
            tell_host(link, self.servers)
            open_collectives(link, parts)
        except (Ended, RankError):
            raise
        except Exception as error:
            self._fail(error)

    def run(self) -> int:
        """Do what rank 0 says; ends by Ended or RankError."""
        try:
            while True:
                command, part = self.link.next_command()
                try:
                    getattr(self, f"do_{command['do']}")(command, part)
                except (Ended, RankError):
                    raise
                except Exception as error:
                    self._fail(error)
        finally:
            self.judge.close()
            if self.servers is not None:
                self.link.leave()  # rank 0 need not wait for their end
                self.servers.close()

    def _fail(self, error: Exception) -> None:
        """Tell rank 0, whose run this ends, and wait for that end."""
        if is_broken_connection(error):
            raise self.link.blame(error) from error
        if not isinstance(error, IsftError):
            traceback.print_exc()
        self.link.fail(problem_of(error))
        while True:
            self.link.check()
            time.sleep(0.05)

    # --- training -------------------------------------------------------------------------------------------------------

    def do_load_weights(self, command: dict[str, Any], part: Any) -> None:
        """The base model's weights, or those of a folder."""
        folder = command["folder"]
        self.learner.load_weights(None if folder is None else seen(folder), round_index=command["round_index"])

    def do_load_state(self, command: dict[str, Any], part: Any) -> None:
        """Weights and optimizer of a folder."""
        self.learner.load_state(seen(command["folder"]))

    def do_spread(self, command: dict[str, Any], part: Any) -> None:
        """Rank 0's weights, with its optimizer where `state` describes one."""
        self.learner.spread(command["state"])

    def do_begin(self, command: dict[str, Any], part: Any) -> None:
        """A pass."""
        settings = SimpleNamespace(**command["settings"])
        self.learner.begin(
            settings, command["num_steps"], seed=command["seed"], keep_optimizer=command["keep_optimizer"]
        )

    def do_step(self, command: dict[str, Any], part: Any) -> None:
        """This rank's part of a step; what rank 0 makes of a failure is its own matter."""
        at, micro = command["step_index"], command["micro_batch_tokens"]
        self.learner.heartbeat = lambda _tokens: self.link.check()
        if part is None:
            try:
                self.learner.step(to_rows(command["rows"]), at, micro)
            except TrainOutOfMemory:
                return  # as on every other rank: all have the same rows
            self.link.meet()
            return
        try:
            take_part(self.link, self.learner, lambda: self.learner.step_part(to_rows(part), at, micro))
        except (Ended, RankError):
            raise
        except Exception:
            return  # rank 0 has heard of it at the meeting, or has met the same

    def do_loss(self, command: dict[str, Any], part: Any) -> None:
        """This rank's part of a loss."""
        self.learner.loss(to_rows(command["rows"]))

    def do_gather(self, command: dict[str, Any], part: Any) -> None:
        """This rank's part of what rank 0 is about to write."""
        self.learner.gather(state=command["state"])

    def do_offload(self, command: dict[str, Any], part: Any) -> None:
        """Free what generation does not need."""
        self.learner.offload()

    def do_offload_weights(self, command: dict[str, Any], part: Any) -> None:
        """Leave the device to servers, which take those of all ranks: none of them begins before all have left."""
        away = getattr(self.learner, "offload_weights", None)
        if away is not None:
            away()
        self.link.meet()

    def do_reload(self, command: dict[str, Any], part: Any) -> None:
        """Undo that."""
        self.learner.reload()

    # --- generation -----------------------------------------------------------------------------------------------------

    def do_serve(self, command: dict[str, Any], part: Any) -> None:
        """Serve the live weights or those of a folder that rank 0 named."""
        if self.engine is None:
            return
        weights = None if command["weights"] is None else seen(command["weights"], command["manifest"])
        self.engine.begin(weights)

    def do_unserve(self, command: dict[str, Any], part: Any) -> None:
        """Free what serving took."""
        if self.engine is not None:
            self.engine.end()

    def do_keep_prompts(self, command: dict[str, Any], part: Any) -> None:
        """Keep what is read of these prompts for all shards to come."""
        if self.engine is not None:
            self.engine.keep_prompts([tuple(prompt) for prompt in command["prompts"]])

    def do_servers(self, command: dict[str, Any], part: Any) -> None:
        """What rank 0 asks of this host's vLLM servers, where this rank tends them."""
        if command["rank"] == self.link.rank and self.servers is not None:
            answer = do_errand(self.link, self.servers, command["what"], command["values"])
            self.link.say("servers", number=command["number"], answer=answer)

    def do_generate(self, command: dict[str, Any], part: Any) -> None:
        """Make shards until none is left."""
        number = command["number"]
        with self.judge.of(command["judging"]):
            while self.engine is not None:
                index = self.link.count(f"cursor/{number}") - 1
                job = self.link.take(f"job/{number}/{index}")
                if job is None:
                    return
                self._make(number, index, job)

    def _make(self, number: int, index: int, job: Any) -> None:
        requests, decoding = to_requests(job["requests"]), to_decoding(job["decoding"])
        plan = unpack(pack(self.engine.plan(requests, decoding)))
        shard = self.judge.open(job["prompts"])
        made: list[Any] = []
        tokens = 0
        said = time.monotonic()

        def say(*, done: bool = False, out_of_memory: bool = False, verdicts: Any = None) -> None:
            nonlocal said, tokens
            values = {"number": number, "job": index, "plan": plan, "made": made[:], "tokens": tokens}
            judged = {"judges": shard is not None, "said": verdicts}
            self.link.say("made", done=done, out_of_memory=out_of_memory, **values, **judged)
            made.clear()
            tokens, said = 0, time.monotonic()

        def heartbeat(num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            watchdog.beat()
            self.link.check()
            if time.monotonic() - said > SAY_EVERY_S:
                say()

        def hang() -> None:
            error = RankError(f"the engine has not made a token for {self.timeout_s:g} s")
            self._hung(error)

        watchdog = Watchdog(self.timeout_s, hang)
        self.engine.heartbeat = heartbeat
        try:
            with watchdog:
                for completion in self.engine.generate(requests, decoding, plan):
                    made.append(from_completion(completion))
                    if shard is not None:
                        shard.submit(completion)
                    watchdog.beat()
                    self.link.check()
                    if time.monotonic() - said > SAY_EVERY_S:
                        say()
        except EngineOutOfMemory:
            made.clear()
            say(out_of_memory=True)
            return
        say(done=True, verdicts=None if shard is None else shard.finish(requests))

    def _hung(self, error: RankError) -> None:
        import faulthandler

        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        _last_words(RankError(f"{self.link.name}: {error}", hint="raise generate.timeout_s if it is only slow"))
        os._exit(EXIT_STORAGE)


def seen(folder: str, manifest: str | None = None) -> Path:
    """A folder that rank 0 named, as this host sees it. Raises RankError when it is not there or is another one."""
    path = Path(folder)
    if not path.is_dir():
        raise RankError(
            f"{folder} is not there",
            hint="weights of an earlier round are read from disk: every host must see the folder",
        )
    if manifest is not None and (path / "MANIFEST.json").read_text(encoding="utf-8") != manifest:
        raise RankError(f"{folder} is not what rank 0 sees there", hint="do the hosts share this file system?")
    return path
