"""Generation runs on the weights just trained: live ones, a folder's, or an adapter's, cast once and never shared by mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers_generate import ByteEncoder, engine_of, loaded_of, requests_of, run
from test_embedded_exact import by_generate, sharper

from iterative_sft_cli.generate import embedded, embedded_probe
from iterative_sft_cli.generate.embedded import EmbeddedEngine
from iterative_sft_cli.generate.embedded_lean import LeanDecoder
from iterative_sft_cli.generate.embedded_module import ModuleDecoder
from iterative_sft_cli.types import Decoding

GREEDY = Decoding(do_sample=False, max_new_tokens=25)


def with_adapter(model: Any, *, seed: int | None = 0, **settings: Any) -> Any:
    """`model` with a LoRA adapter; trained (random) unless `seed` is None."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings))
    if seed is not None:
        train_adapter(adapted, seed)
    return adapted


def train_adapter(adapted: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def tokens_of(engine: EmbeddedEngine, length: int = 6) -> tuple[int, ...]:
    return run(engine, requests_of([length]), GREEDY)["p0", 0].token_ids


def test_live_weights_that_changed_are_seen_at_the_next_begin() -> None:
    model = sharper(tiny.tiny_llama())
    for dtype in (torch.float32, torch.bfloat16):
        engine = engine_of(model, dtype=dtype)
        before = tokens_of(engine)
        engine.end()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        engine.begin(None)
        after = tokens_of(engine)
        assert after != before
        if dtype == torch.float32:
            assert list(after) == by_generate(model, requests_of([6])[0], 25)


def test_the_bfloat16_copy_keeps_its_storage_and_leaves_the_live_model_alone() -> None:
    model = sharper(tiny.tiny_llama())
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = engine_of(model, dtype=torch.bfloat16)
    storage = [p.data_ptr() for p in engine._model.parameters()]
    run(engine, requests_of([4, 5]), GREEDY)
    engine.end()
    engine.begin(None)
    assert [p.data_ptr() for p in engine._model.parameters()] == storage
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.config._attn_implementation == "sdpa"
    assert {p.dtype for p in engine._model.parameters()} == {torch.bfloat16}


def test_float32_weights_are_shared_not_copied() -> None:
    model = tiny.tiny_llama()
    engine = engine_of(model)
    assert {p.data_ptr() for p in engine._model.parameters()} == {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2])
def test_an_adapter_is_used_and_followed(make: Any) -> None:
    model = with_adapter(sharper(make()))
    engine = engine_of(model)
    request = requests_of([6])[0]
    assert list(tokens_of(engine)) == by_generate(model, request, 25)
    with model.disable_adapter():
        assert list(tokens_of(engine)) != by_generate(model, request, 25)
    engine.end()
    train_adapter(model, seed=5)
    engine.begin(None)
    assert list(tokens_of(engine)) == by_generate(model, request, 25)


def test_merged_logits_are_those_of_the_adapted_model() -> None:
    model = with_adapter(sharper(tiny.tiny_llama()))
    request = requests_of([6])[0]
    engine = engine_of(model)
    completion = run(engine, [request], Decoding(max_new_tokens=10, keep_logprobs=True))["p0", 0]
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_ids, *completion.token_ids]])).logits[0, 5:-1]
    probe = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids).unsqueeze(1)).squeeze(1)
    assert completion.token_logprobs == pytest.approx(probe.tolist(), abs=1e-3)


def test_what_cannot_be_merged_stays_an_adapter() -> None:
    model = with_adapter(sharper(tiny.tiny_llama()), use_dora=True)
    engine = engine_of(model)
    assert list(tokens_of(engine)) == by_generate(model, requests_of([6])[0], 25)


def test_rounding_of_a_model_in_bfloat16_shows_between_two_forwards_of_its_own(monkeypatch: Any) -> None:
    """The frozen weights under an adapter: their copy is the same numbers, so that against it nothing would be granted."""
    monkeypatch.setattr(embedded_probe, "HALF", 0.0)
    model = with_adapter(sharper(tiny.tiny_llama()).bfloat16(), seed=None)
    assert isinstance(engine_of(model, dtype=torch.bfloat16)._decoder, LeanDecoder)


def test_weights_of_a_folder(tmp_path: Path) -> None:
    live, other = sharper(tiny.tiny_llama()), sharper(tiny.tiny_llama(seed=3))
    tiny.save_tiny(tmp_path / "other", model=other, dtype="float32")
    engine = EmbeddedEngine(loaded_of(live), encoder=ByteEncoder())
    engine.begin(tmp_path / "other")
    request = requests_of([6])[0]
    assert list(tokens_of(engine)) == by_generate(other, request, 25)
    engine.end()
    engine.begin(None)
    assert list(tokens_of(engine)) == by_generate(live, request, 25)


def test_adapter_of_a_folder(tmp_path: Path) -> None:
    model = with_adapter(sharper(tiny.tiny_llama()), seed=1)
    request = requests_of([6])[0]
    first = by_generate(model, request, 25)
    model.save_pretrained(tmp_path / "adapter")
    train_adapter(model, seed=2)
    second = by_generate(model, request, 25)
    assert first != second
    engine = EmbeddedEngine(loaded_of(model), encoder=ByteEncoder())
    engine.begin(tmp_path / "adapter")
    assert list(tokens_of(engine)) == first
    engine.end()
    engine.begin(None)
    assert list(tokens_of(engine)) == second


def test_a_replica_that_missed_an_update_is_refused() -> None:
    model = tiny.tiny_llama()
    engine = engine_of(model, dtype=torch.bfloat16)
    assert engine._replica is not None
    engine._replica.pairs.pop(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    engine.end()
    with pytest.raises(RuntimeError, match="old weights: model.layers"):
        engine.begin(None)


def test_a_decoder_with_other_weights_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharper(tiny.tiny_llama())
    other = sharper(tiny.tiny_llama(seed=9))
    monkeypatch.setattr(embedded, "LeanDecoder", lambda _: LeanDecoder(other))
    assert type(engine_of(model)._decoder) is ModuleDecoder
