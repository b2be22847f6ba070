"""Prompts that waves come back to are read once, and give what they would have given anew."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny
import torch
from helpers_generate import engine_of, requests_of, run
from test_embedded_exact import MODELS, by_generate, sharper

from iterative_sft_cli.generate import embedded_plan
from iterative_sft_cli.generate.embedded import EmbeddedEngine
from iterative_sft_cli.generate.embedded_lean import LeanDecoder
from iterative_sft_cli.generate.embedded_prompts import KeptPrompts, that_fit
from iterative_sft_cli.types import PROMPT_TOO_LONG, Decoding, Request

LENGTHS = [5, 9, 40, 12, 12, 33, 7, 21, 30, 18]


def prompts_of(requests: list[Request]) -> list[tuple[int, ...]]:
    return [request.prompt_ids for request in requests]


def reads(engine: EmbeddedEngine) -> list[list[int]]:
    """The numbers of the groups that are read from now on."""
    found: list[list[int]] = [[]]
    assert engine._kept is not None
    original = engine._kept._read_group

    def counting(number: int, decoder: Any) -> Any:
        found[-1].append(number)
        return original(number, decoder)

    engine._kept._read_group = counting  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    model = sharper(MODELS[name][0]())
    engine = engine_of(model)
    requests = requests_of(LENGTHS)
    kept = engine.keep_prompts(prompts_of(requests[:7]))
    assert kept == prompts_of(requests[:7])
    assert engine.plan(requests, Decoding())["kept_prompts"] == 7
    for some in (requests, requests[3:], requests[:2]):
        got = run(engine, some, Decoding(do_sample=False, max_new_tokens=20), max_rows=3, admit_rows=1)
        for request in some:
            assert list(got[request.prompt_id, 0].token_ids) == by_generate(model, request, 20)


def test_a_prompt_is_read_once_for_all_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_plan, "PREFILL_TOKENS_CPU", 40)
    engine = engine_of(sharper(tiny.tiny_llama()))
    requests = requests_of(LENGTHS, samples=2)
    engine.keep_prompts(prompts_of(requests))
    assert engine._kept is not None
    groups = [[len(prompt) for prompt in group] for group in engine._kept._groups]
    assert groups == [[40], [33], [30], [21, 18], [12, 12, 9, 7], [5]]
    found = reads(engine)
    for _ in range(3):
        run(engine, requests, Decoding(max_new_tokens=4))
    assert sorted(found[0]) == list(range(6))
    # other weights: what was read is of no use
    engine.begin(None)
    run(engine, requests[:1], Decoding(max_new_tokens=4))
    assert found[0][6:] == [5]


def test_a_resumed_wave_computes_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 what is read of a prompt depends on what is read beside it: the groups do not depend on who asks."""
    monkeypatch.setattr(embedded_plan, "PREFILL_TOKENS_CPU", 60)
    model = sharper(tiny.tiny_llama()).bfloat16()
    requests = requests_of([*LENGTHS, *LENGTHS], samples=8)
    later = [requests[i] for i in (15, 3, 8, 11)]
    decoding = Decoding(max_new_tokens=12, keep_logprobs=True)

    def second_wave(*, resumed: bool) -> Any:
        engine = engine_of(model, dtype=torch.bfloat16)
        engine.keep_prompts(prompts_of(requests))
        if not resumed:
            run(engine, requests, decoding)
        return run(engine, later, decoding)

    assert second_wave(resumed=True) == second_wave(resumed=False)


def test_streams_read_side_by_side_and_none_waits_for_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_of(LENGTHS)
    model = sharper(tiny.tiny_llama())
    kept = KeptPrompts(prompts_of(requests), 40)
    kept.expect(prompts_of(requests))
    inside, met, failed = threading.Barrier(2), [0], [False]
    original = kept._read_group

    def meeting(number: int, decoder: Any) -> Any:
        if number in (0, 1) and not met[0]:
            inside.wait(20)  # both threads are reading, each its own group
            met[0] = 1
        if number == 0 and not failed[0]:
            failed[0] = True
            raise RuntimeError("out of memory")
        return original(number, decoder)

    monkeypatch.setattr(kept, "_read_group", meeting)
    results: list[Any] = []

    def ask() -> None:
        decoder = LeanDecoder(model)
        for _ in range(2):
            try:
                results.append(kept.read(requests[2].prompt_ids, decoder).keys.shape[2])
                return
            except RuntimeError as error:
                results.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(map(str, results)) == ["40", "40", "out of memory"]


def test_memory_bounds_what_is_kept() -> None:
    requests = requests_of(LENGTHS)
    engine = engine_of(tiny.tiny_llama())
    position = engine._bytes_per_position()
    engine.memory_gb = 130 * position / 2**30
    # half of 130 tokens: the first three prompts
    assert engine.keep_prompts(prompts_of(requests)) == prompts_of(requests[:3])
    plan = engine.plan(requests, Decoding(max_new_tokens=4))
    assert plan["kept_prompts"] == 3
    assert plan["max_rows"] * plan["cache_tokens_per_row"] <= 130 - 54
    engine.keep_prompts(())
    assert engine.plan(requests, Decoding(max_new_tokens=4))["kept_prompts"] == 0
    assert that_fit([(1,), (1,), (2, 2)], 3) == [(1,), (2, 2)]


def test_prompts_that_cannot_be_read_are_left_out() -> None:
    engine = engine_of(tiny.tiny_llama(), context=32)
    requests = requests_of(LENGTHS)
    kept = engine.keep_prompts([(), *prompts_of(requests)])
    assert sorted(map(len, kept)) == [5, 7, 9, 12, 12, 18, 21, 30]
    got = run(engine, requests, Decoding(max_new_tokens=2))
    assert [got[f"p{i}", 0].finish_reason for i in (2, 5)] == [PROMPT_TOO_LONG] * 2
