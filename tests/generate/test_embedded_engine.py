"""The embedded engine as the loop uses it: bad input by name, plans, heartbeat, stop strings, memory, fall-back."""

from __future__ import annotations

import itertools
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers_generate import ByteEncoder, engine_of, loaded_of, requests_of, run
from test_embedded_exact import MODELS, by_generate, sharper

from iterative_sft_cli.config import GenerateConfig
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.generate import Engine, EngineOutOfMemory, embedded_plan, open_engine
from iterative_sft_cli.generate.embedded import EmbeddedEngine
from iterative_sft_cli.types import LENGTH, PROMPT_TOO_LONG, STOP, Decoding, Request


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    return engine_of(sharper(tiny.tiny_llama()))


def test_open_engine_gives_an_engine() -> None:
    loaded = loaded_of(tiny.tiny_llama())
    opened = open_engine(GenerateConfig(), loaded=loaded, encoder=ByteEncoder(), base_dir=Path(), run_dir=None, seed=0)
    assert isinstance(opened, Engine) and opened.deterministic
    with pytest.raises(ConfigError, match="needs a model"):
        open_engine(GenerateConfig(), loaded=None, encoder=None, base_dir=Path(), run_dir=None, seed=0)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "t5"])
def test_lengths_at_the_context(name: str) -> None:
    engine = engine_of(sharper(MODELS[name][0]()), context=20)
    requests = requests_of([25, 20, 19, 12, 3])
    got = run(engine, requests, Decoding(do_sample=False, max_new_tokens=10))
    reasons = [got[f"p{i}", 0].finish_reason for i in range(5)]
    lengths = [len(got[f"p{i}", 0].token_ids) for i in range(5)]
    if name == "t5":
        assert reasons == [PROMPT_TOO_LONG, LENGTH, LENGTH, LENGTH, LENGTH]
        assert lengths == [0, 10, 10, 10, 10]
    else:
        assert reasons == [PROMPT_TOO_LONG, PROMPT_TOO_LONG, LENGTH, LENGTH, LENGTH]
        assert lengths == [0, 0, 1, 8, 10]
    assert got["p0", 0].logprob == 0.0


def test_an_empty_prompt_is_named(engine: EmbeddedEngine) -> None:
    request = Request("question 7", "", (), (0,), (1,))
    with pytest.raises(DataError, match="'question 7' has no tokens"):
        run(engine, [request], Decoding())


def test_greedy_samples_of_one_prompt_are_equal(engine: EmbeddedEngine) -> None:
    got = run(engine, requests_of([5], samples=4), Decoding(do_sample=False, max_new_tokens=12))
    assert len({c.token_ids for c in got.values()}) == 1


def test_no_requests(engine: EmbeddedEngine) -> None:
    assert run(engine, [], Decoding()) == {}


def test_generate_needs_begin() -> None:
    engine = EmbeddedEngine(loaded_of(tiny.tiny_llama()), encoder=ByteEncoder())
    with pytest.raises(RuntimeError, match="begin"):
        run(engine, requests_of([3]), Decoding())


@pytest.mark.parametrize("name", ["llama", "mistral_window", "t5"])
def test_stop_strings_end_a_row_at_the_token_that_completes_them(name: str) -> None:
    model = sharper(MODELS[name][0]())
    engine = engine_of(model)
    request = next(r for r in requests_of(range(3, 30)) if len(set(by_generate(model, r, 30)[:8])) > 2)
    free = by_generate(model, request, 30)
    decode = engine.encoder.decode
    stop = decode(free[2:8]).strip("\ufffd")[:3]
    assert stop
    first = next(n for n in range(1, 31) if stop in decode(free[:n]))
    got = run(engine, [request], Decoding(do_sample=False, max_new_tokens=30, stop=(stop,)))[request.prompt_id, 0]
    assert got.token_ids == tuple(free[:first])
    assert got.finish_reason == STOP and stop in decode(got.token_ids)


def test_the_heartbeat_counts_every_token_and_its_stop_comes_through(engine: EmbeddedEngine) -> None:
    class Stop(Exception):
        pass

    beats: list[int] = []
    engine.heartbeat = beats.append
    requests = requests_of([4, 6, 8], samples=3)
    decoding = Decoding(max_new_tokens=15)
    got = run(engine, requests, decoding, max_rows=4)
    assert sum(beats) == sum(len(c.token_ids) for c in got.values())

    def stop(num_tokens: int) -> None:
        raise Stop

    engine.heartbeat = stop
    with pytest.raises(Stop):
        run(engine, requests, decoding)
    engine.heartbeat = lambda num_tokens: None
    assert run(engine, requests, decoding, max_rows=4) == got


def test_a_shard_that_is_left_early_leaves_nothing_behind(engine: EmbeddedEngine) -> None:
    requests = requests_of([4, 6, 8], samples=3)
    decoding = Decoding(max_new_tokens=15)
    plan = engine.plan(requests, decoding)
    whole = list(engine.generate(requests, decoding, plan))
    part = list(itertools.islice(engine.generate(requests, decoding, plan), 2))
    assert part == whole[:2]
    assert list(engine.generate(requests, decoding, plan)) == whole


def test_the_first_sample_comes_before_the_last_prompt_is_read(engine: EmbeddedEngine) -> None:
    requests = requests_of([5] * 40, samples=2)
    decoding = Decoding(max_new_tokens=3)
    plan = {**engine.plan(requests, decoding), "max_rows": 8}
    seen: list[int] = []
    assert engine._decoder is not None
    admit = engine._decoder.admit

    def counting(prompts: Any, copies: Any) -> Any:
        seen.append(len(prompts))
        return admit(prompts, copies)

    engine._decoder.admit = counting  # type: ignore[method-assign]
    try:
        next(engine.generate(requests, decoding, plan))
    finally:
        del engine._decoder.admit
    assert sum(seen) <= 8


def test_plans_are_of_config_model_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_plan, "total_memory", lambda device: 2 << 30)
    loaded = loaded_of(tiny.tiny_llama())
    requests, decoding = requests_of([8] * 200, samples=2), Decoding(max_new_tokens=100)
    plan = EmbeddedEngine(loaded, encoder=ByteEncoder()).plan(requests, decoding)
    assert plan == EmbeddedEngine(loaded, encoder=ByteEncoder()).plan(requests, decoding)
    per_position = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    assert plan["max_rows"] * plan["cache_tokens_per_row"] * per_position == pytest.approx(2**30 / 2, rel=0.01)
    small = EmbeddedEngine(loaded, encoder=ByteEncoder(), memory_gb=per_position * 1000 / 2**30).plan(
        requests, decoding
    )
    assert small["max_rows"] < plan["max_rows"]
    assert small["max_rows"] * small["cache_tokens_per_row"] <= 1000
    assert EmbeddedEngine(loaded, encoder=ByteEncoder()).plan(requests[:3], decoding)["max_rows"] == 6


def test_held_memory_stays_within_the_plan() -> None:
    engine = engine_of(sharper(tiny.tiny_llama()))
    requests = requests_of([20, 10, 30, 5] * 3, samples=6)
    decoding = Decoding(max_new_tokens=100)
    plan = {**engine.plan(requests, decoding), "max_rows": 48, "cache_tokens_per_row": 70}
    held: list[int] = []
    assert engine._decoder is not None
    decode = engine._decoder.decode

    def watching(tokens: Any) -> Any:
        features = decode(tokens)
        held.append(engine._decoder.cache.held())  # type: ignore[union-attr]
        return features

    engine._decoder.decode = watching  # type: ignore[method-assign]
    assert len(list(engine.generate(requests, decoding, plan))) == 72
    assert 48 * 35 < max(held) <= 48 * 70


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("x"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("[enforce fail] not enough memory"),
    ],
)
def test_out_of_memory_is_said_so_that_the_loop_can_halve(error: Exception) -> None:
    engine = engine_of(tiny.tiny_llama())
    requests, decoding = requests_of([5] * 6), Decoding(max_new_tokens=8)
    assert engine._decoder is not None
    decode = engine._decoder.decode

    def limited(tokens: Any) -> Any:
        if len(tokens) > 3:
            raise error
        return decode(tokens)

    engine._decoder.decode = limited  # type: ignore[method-assign]
    with pytest.raises(EngineOutOfMemory):
        run(engine, requests, decoding)
    assert len(run(engine, requests, decoding, max_rows=3)) == 6


def test_other_errors_are_not_taken_for_memory() -> None:
    engine = engine_of(tiny.tiny_llama())
    assert engine._decoder is not None

    def broken(tokens: Any) -> Any:
        raise RuntimeError("shape mismatch")

    engine._decoder.decode = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(engine, requests_of([5]), Decoding(max_new_tokens=8))


def test_falling_back_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = engine_of(MODELS["mamba"][0]())
        engine.end()
        engine.begin(None)
    assert [r.getMessage() for r in caplog.records if "transformers' generate" in r.getMessage()] == [
        "MambaForCausalLM generates through transformers' generate: its attention cannot be replaced"
    ]


def test_the_models_generation_config_gives_nothing_but_eos() -> None:
    model = sharper(MODELS["mistral_window"][0]())
    plain = run(engine_of(model), requests_of([5]), Decoding(do_sample=False, max_new_tokens=20))
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.suppress_tokens = [plain["p0", 0].token_ids[0]]
    model.generation_config.max_length = 7
    assert run(engine_of(model), requests_of([5]), Decoding(do_sample=False, max_new_tokens=20)) == plain


def test_the_number_of_threads_is_the_plans_and_is_put_back(engine: EmbeddedEngine) -> None:
    before = torch.get_num_threads()
    plan = {**engine.plan(requests_of([5]), Decoding(max_new_tokens=4)), "threads": before + 1}
    iterator = engine.generate(requests_of([5]), Decoding(max_new_tokens=4), plan)
    next(iterator)
    assert torch.get_num_threads() == before + 1
    list(iterator)
    assert torch.get_num_threads() == before


def test_streams_make_the_same_samples(engine: EmbeddedEngine) -> None:
    requests = requests_of([5, 9, 4, 7, 12, 6, 3], samples=5)
    decoding = Decoding(max_new_tokens=25, eos_token_ids=(9, 30), keep_logprobs=True)
    alone = run(engine, requests, decoding, streams=1, max_rows=12)
    beats: list[int] = []
    engine.heartbeat = beats.append
    side_by_side = run(engine, requests, decoding, streams=3, max_rows=12)
    engine.heartbeat = lambda num_tokens: None
    assert {k: c.token_ids for k, c in side_by_side.items()} == {k: c.token_ids for k, c in alone.items()}
    assert sum(beats) == sum(len(c.token_ids) for c in alone.values())
    assert run(engine, requests, decoding, streams=3, max_rows=12) == side_by_side
    assert run(engine, requests, decoding, streams=3, max_rows=2).keys() == alone.keys()


def test_an_error_in_one_stream_ends_all(engine: EmbeddedEngine) -> None:
    requests = requests_of([5, 9, 4, 7], samples=5)
    assert engine._decoder is not None
    twin = engine._decoder.twin

    def broken() -> Any:
        decoder = twin()
        decoder.decode = lambda tokens: (_ for _ in ()).throw(MemoryError("x"))  # type: ignore[union-attr]
        return decoder

    engine._decoder.twin = broken  # type: ignore[method-assign]
    threads = threading.active_count()
    with pytest.raises(EngineOutOfMemory):
        run(engine, requests, Decoding(max_new_tokens=25), streams=2, max_rows=20)
    del engine._decoder.twin
    assert threading.active_count() == threads


def test_the_loops_stop_ends_all_streams(engine: EmbeddedEngine) -> None:
    class Stop(Exception):
        pass

    def stop(num_tokens: int) -> None:
        raise Stop

    threads = threading.active_count()
    engine.heartbeat = stop
    with pytest.raises(Stop):
        run(engine, requests_of([5, 9, 4, 7], samples=5), Decoding(max_new_tokens=25), streams=2, max_rows=20)
    engine.heartbeat = lambda num_tokens: None
    assert threading.active_count() == threads
