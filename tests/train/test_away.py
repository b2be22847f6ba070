"""Tensors that wait elsewhere come back as the same bytes in the same objects, with all that shares their memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from iterative_sft_cli.train import torch_away
from iterative_sft_cli.train.torch_away import Away


@pytest.mark.parametrize("disk", [False, True])
def test_memory_is_given_back_and_filled_again(disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_away, "_PIECE", 1000)
    whole = torch.randn(50, 40)
    first, second = torch.split(whole, 25)  # as joined compute copies are
    other = torch.randn(7).to(torch.bfloat16)
    nothing = torch.empty(0)
    before = [one.clone() for one in (whole, first, second, other)]
    away = Away([first, second, whole, other, nothing], disk=disk)
    assert [one.untyped_storage().nbytes() for one in (whole, first, second, other)] == [0] * 4
    away.back()
    assert all(torch.equal(one, kept) for one, kept in zip((whole, first, second, other), before, strict=True))
    second.fill_(1.0)
    assert bool((whole[25:] == 1).all()), "a view does not share the memory any more"
    away.back()
    assert bool((whole[25:] == 1).all())


@pytest.mark.parametrize("disk", [False, True])
def test_weights_that_are_mapped_from_a_file(tmp_path: Path, disk: bool) -> None:
    tensors = {f"t{n}": torch.randn(64, 64) for n in range(8)}
    save_file(tensors, tmp_path / "m.safetensors")
    held = {name: torch.nn.Parameter(value) for name, value in load_file(tmp_path / "m.safetensors").items()}
    away = Away(held.values(), disk=disk)
    assert sum(one.untyped_storage().nbytes() for one in held.values()) == 0
    away.back()
    assert all(torch.equal(held[name], value) for name, value in tensors.items())
