"""What outlives a chain: worker processes, loaded models, threads, caches; every filter gets its runner here."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import IsftError, PluginError, StorageError
from iterative_sft_cli.filters import processes
from iterative_sft_cli.filters.batches import BatchSizes
from iterative_sft_cli.filters.cache import ResultCache
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.filters.contract import make_callable
from iterative_sft_cli.filters.link import Watchdog
from iterative_sft_cli.filters.pool import WorkerPool
from iterative_sft_cli.filters.resolved import ResolvedFilter
from iterative_sft_cli.filters.runners import DirectRunner, History, Runner, ThreadRunner, WorkerRunner, blame
from iterative_sft_cli.filters.wire import encode, sample_to_wire, to_json
from iterative_sft_cli.plugin_import import explain
from iterative_sft_cli.temporary import TemporaryFolder
from iterative_sft_cli.types import Sample


def num_threads(one: ResolvedFilter) -> int:
    """Threads of a built-in that waits: `workers`, else 8 for servers and one a core for interpreters."""
    return one.workers or (8 if one.spec is not None and one.spec.cached else processes.cores())


class Runtime:
    """Workers, loaded models and caches of a run's filters; they serve every chain. Close it at the end.

    A filter whose arguments a schedule changed gets new ones; the old are ended once a later round is under way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[bytes, tuple[ResolvedFilter, Callable[..., Any], Any]] = {}
        self._executors: dict[bytes, ThreadPoolExecutor] = {}
        self._pools: dict[bytes, WorkerPool] = {}
        self._caches: dict[tuple[Path, bytes], ResultCache] = {}
        self._used: dict[bytes, tuple[str, str, int]] = {}
        self._watchdog = Watchdog()
        self._folder: TemporaryFolder | None = None
        self._num_files = 0

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def runner(
        self,
        one: ResolvedFilter,
        *,
        seed: int,
        round_index: int,
        cache_dir: Path | None,
        accepted_earlier: History,
        eval_texts: Sequence[str] = (),
        batch_sizes: BatchSizes | None = None,
    ) -> Runner:
        """The runner of a filter for one round."""
        key = to_json([str(one.location), one.source_hash, one.kind, one.arguments, one.name, one.device, one.env])
        self._retire(key, one, round_index)
        if one.isolated:
            head: dict[str, Any] = {"seed": seed, "round_index": round_index, "filter": one.name}
            cache = None
            if one.shape.takes_context:
                # what the context gives is not part of the sample, so nothing is cached
                head["cache_dir"] = str(cache_dir.resolve()) if cache_dir is not None else None
                history = self._store_history(accepted_earlier)
                head["history"] = str(history)
                return WorkerRunner(one, self._pool(key, one), head, None, self._store_round, history)
            if cache_dir is not None:
                cache = self._cache(cache_dir, key, one)
            return WorkerRunner(one, self._pool(key, one), head, cache, self._store_round)

        def make_context(subject: str) -> Context:
            return Context(
                round_index=round_index,
                seed=seed,
                filter_name=one.name,
                subject=subject,
                cache_dir=cache_dir,
                accepted_earlier=accepted_earlier,
                eval_texts=eval_texts,
            )

        call, batch = self._call(key, one)
        if one.spec is not None and one.spec.threads:
            kept = self._cache(cache_dir, key, one) if cache_dir is not None and one.spec.cached else None
            return ThreadRunner(one, call, self._executor(key, one), kept)
        return DirectRunner(one, call, make_context, batch, batch_sizes)

    def _call(self, key: bytes, one: ResolvedFilter) -> tuple[Callable[..., Any], Any]:
        """The callable of an in-process filter; a class is built once, and again when its arguments change."""
        with self._lock:
            if key not in self._calls:
                assert one.target is not None
                try:
                    call, instance = make_callable(one.target, one.shape, one.arguments)
                except IsftError as error:
                    raise blame(one, error) from error
                except Exception as error:
                    cause = f"its set-up raised {explain(error)}"
                    raise PluginError(
                        f"the filter `{one.name}` cannot be used: {cause}", where=f"{one.key}: {one.use}"
                    ) from error
                for name in ("device", "timeout_s"):
                    if one.spec is not None and hasattr(instance, name):
                        setattr(instance, name, getattr(one, name))
                if hasattr(instance, "workers"):
                    instance.workers = num_threads(one)
                self._calls[key] = (one, call, instance)
            _, call, instance = self._calls[key]
        batched = one.spec is not None and one.spec.batched
        return call, instance.judge_batch if batched else None

    def _executor(self, key: bytes, one: ResolvedFilter) -> ThreadPoolExecutor:
        with self._lock:
            if key not in self._executors:
                self._executors[key] = ThreadPoolExecutor(num_threads(one), f"isft-filter-{one.name}")
            return self._executors[key]

    def _pool(self, key: bytes, one: ResolvedFilter) -> WorkerPool:
        with self._lock:
            if key not in self._pools:
                self._pools[key] = WorkerPool(one, self._watchdog)
            return self._pools[key]

    def _retire(self, key: bytes, one: ResolvedFilter, round_index: int) -> None:
        """Note that `one` serves this round; end what served the same filter, with other arguments, in an earlier round only."""
        with self._lock:
            self._used[key] = (one.key, one.name, round_index)
            gone = [
                old
                for old, (place, name, last) in self._used.items()
                if old != key and (place, name) == (one.key, one.name) and last < round_index
            ]
            pools = [self._pools.pop(old) for old in gone if old in self._pools]
            executors = [self._executors.pop(old) for old in gone if old in self._executors]
            calls = [self._calls.pop(old) for old in gone if old in self._calls]
            caches = [self._caches.pop(place) for place in list(self._caches) if place[1] in gone]
            for old in gone:
                del self._used[old]
        _end(pools, executors, calls, caches)

    def _cache(self, folder: Path, key: bytes, one: ResolvedFilter) -> ResultCache:
        with self._lock:
            if (folder, key) not in self._caches:
                self._caches[folder, key] = ResultCache(folder, one)
            return self._caches[folder, key]

    def _store(self, frames: Iterable[bytes]) -> Path:
        """Write frames or lines to a temporary file that a worker reads."""
        try:
            with self._lock:
                if self._folder is None:
                    self._folder = TemporaryFolder("round")
                self._num_files += 1
                path = Path(self._folder.name) / f"{self._num_files}"
            with open(path, "wb") as file:
                file.writelines(frames)
        except OSError as error:
            raise StorageError(
                f"cannot write what a filter is to read: {error.strerror}",
                where=tempfile.gettempdir(),
                hint="free space there, or set TMPDIR to a folder with more",
            ) from error
        return path

    def _store_round(self, samples: Sequence[Sample]) -> Path:
        return self._store(encode(sample_to_wire(sample)) for sample in samples)

    def _store_history(self, accepted_earlier: History) -> Path:
        return self._store(to_json(record) + b"\n" for record in accepted_earlier)

    def cancel(self) -> None:
        """Give up all calls to workers: a sample failed and the run is about to stop."""
        with self._lock:
            pools = list(self._pools.values())
            executors, self._executors = list(self._executors.values()), {}
        for executor in executors:
            executor.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.cancel()

    def release_device(self) -> None:
        """Move models off the accelerator and end the workers that hold one."""
        with self._lock:
            for key, pool in list(self._pools.items()):
                if pool.one.needs_device:
                    del self._pools[key]
                    pool.close()
            instances = [(one, instance) for one, _, instance in self._calls.values() if one.needs_device]
        for _, instance in instances:
            release = getattr(instance, "release", None)
            if callable(release):
                release()

    def close(self) -> None:
        """End all workers, close the caches, remove the temporary files."""
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
            caches, self._caches = list(self._caches.values()), {}
            executors, self._executors = list(self._executors.values()), {}
            calls, self._calls = list(self._calls.values()), {}
            folder, self._folder = self._folder, None
        _end(pools, executors, calls, caches)
        self._watchdog.close()
        if folder is not None:
            folder.cleanup()


def _end(
    pools: Sequence[WorkerPool],
    executors: Sequence[ThreadPoolExecutor],
    calls: Sequence[tuple[ResolvedFilter, Callable[..., Any], Any]],
    caches: Sequence[ResultCache],
) -> None:
    """End workers and threads, let instances close what they opened, close files."""
    for executor in executors:
        executor.shutdown(wait=True, cancel_futures=True)
    for _, _, instance in calls:
        end = getattr(instance, "close", None)
        if callable(end):
            end()
    for pool in pools:
        pool.close()
    for cache in caches:
        cache.close()
