"""Adapters: what is trained and saved, fresh ones, and those over quantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import MODELS, lora, same, scramble, section, state

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.model import (
    fresh_adapter,
    load_model,
    load_weights_into,
    reset_to_base,
    save_pretrained,
)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_adapter_is_trained_and_saved(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    loaded = load_model(section(folders[name], adapter=lora()))
    assert loaded.has_adapter
    kinds: dict[bool, set[Any]] = {True: set(), False: set()}
    for parameter in loaded.model.parameters():
        kinds[parameter.requires_grad].add(parameter.dtype)
    assert kinds == {True: {torch.float32}, False: {loaded.compute_dtype}}
    save_pretrained(loaded, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    targets = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) > 1
    before, parameters = state(loaded), list(loaded.model.parameters())
    scramble(loaded)
    load_weights_into(loaded, tmp_path / "out")
    assert same(before, state(loaded))
    assert all(a is b for a, b in zip(parameters, loaded.model.parameters(), strict=True))


def test_a_saved_adapter_loads_with_peft_and_acts_as_it_did(folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    loaded = load_model(section(folders["llama"], adapter=lora(), dtype="float32"))
    ids = torch.tensor([[10, 20, 30]])
    with torch.no_grad():
        plain = loaded.model(input_ids=ids).logits
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        expected = loaded.model(input_ids=ids).logits
    assert not torch.allclose(plain, expected)
    save_pretrained(loaded, tmp_path / "out")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)


def test_a_fresh_adapter_depends_on_its_seed_alone_and_does_nothing(folders: dict[str, Path]) -> None:
    loaded = load_model(section(folders["llama"], adapter=lora()), seed=3)
    first = state(loaded)
    fresh_adapter(loaded, 5)
    five = state(loaded)
    torch.manual_seed(99)
    fresh_adapter(loaded, 6)
    six = state(loaded)
    scramble(loaded)
    fresh_adapter(loaded, 5)
    assert same(five, state(loaded))
    assert not same(five, six) and not same(first, five)
    assert all(not tensor.any() for name, tensor in five.items() if "lora_B" in name)
    assert all(tensor.any() for name, tensor in five.items() if "lora_A" in name)
    reset_to_base(loaded)
    assert same(first, state(loaded))
    assert same(first, state(load_model(section(folders["llama"], adapter=lora()), seed=3)))
    with pytest.raises(ValueError, match="no adapter"):
        fresh_adapter(load_model(section(folders["llama"])), 1)


def test_adapter_targets_are_checked(folders: dict[str, Path]) -> None:
    some = load_model(section(folders["llama"], adapter=lora(target_modules=["q_proj"])))
    assert {name.split(".")[-4] for name, p in some.model.named_parameters() if p.requires_grad} <= {
        "q_proj",
        "self_attn",
    }
    with pytest.raises(ConfigError, match=r"model\.adapter\.target_modules"):
        load_model(section(folders["llama"], adapter=lora(target_modules=["nope"])))


def test_quantization_is_explained(folders: dict[str, Path], hide_packages: Callable[..., None]) -> None:
    with pytest.raises(ConfigError, match="expected an `adapter`"):
        load_model(section(folders["llama"], quantization="4bit"))
    hide_packages("bitsandbytes")
    with pytest.raises(ConfigError, match=r"iterative-sft-cli\[quant\]"):
        load_model(section(folders["llama"], quantization="4bit", adapter=lora()))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_over_quantized_weights_have_the_same_gradients_after_generating(
    folders: dict[str, Path], bits: str
) -> None:
    pytest.importorskip("bitsandbytes")
    loaded = load_model(section(folders["llama"], quantization=bits, adapter=lora(), device="cpu"))
    model = loaded.model
    ids = torch.arange(5, 17).view(2, 6)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for name, one in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.1)

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: one.grad.clone() for name, one in trained.items() if one.grad is not None}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert len(before) == len(trained) and all(one.abs().max() > 0 for one in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)
