"""The decoding kernels in C: their numbers beside float64."""

from __future__ import annotations

import pytest
import tiny
import torch
from helpers_generate import engine_of, loaded_of

from iterative_sft_cli import native
from iterative_sft_cli.generate.embedded import EmbeddedEngine
from iterative_sft_cli.generate.embedded_cache import BlockCache
from iterative_sft_cli.generate.embedded_native import native_norm

needs_compiler = pytest.mark.skipif(native.load("decoding", 1) is None, reason="no C compiler here")


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def turned(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of [rows, heads, d] in float64."""
    first, second = x.double().chunk(2, -1)
    return x.double() * cosine.double().unsqueeze(1) + torch.cat((-second, first), -1) * sine.double().unsqueeze(1)


@needs_compiler
@pytest.mark.parametrize(("width", "kv_heads", "group"), [(64, 3, 3), (64, 1, 5), (128, 2, 4), (16, 2, 1), (96, 1, 2)])
def test_attention_over_rows_that_come_and_go(width: int, kv_heads: int, group: int) -> None:
    torch.manual_seed(0)
    heads, scaling = kv_heads * group, width**-0.5
    cache = BlockCache(1, heads, kv_heads, width, width, torch.bfloat16, torch.device("cpu"))
    assert cache.native
    kept: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def admit(lengths: list[int], copies: list[int]) -> None:
        for slot, length, count in zip(cache.admit(lengths, copies), lengths, copies, strict=True):
            keys, values = half(kv_heads, length, width), half(kv_heads, length, width)
            cache.put_prompt(0, slot, 0, keys, values)
            kept.extend(([keys], [values]) for _ in range(count))

    admit([5, 17, 1], [2, 3, 1])
    for step in range(70):
        if step == 20:
            admit([33], [3])
        if step in (30, 50):
            kept[:] = [kept[i] for i in cache.remove([0, 2])]
        cache.start_step()
        rows, padded = cache.num_rows, cache.padded_rows
        made = half(padded, heads + 2 * kv_heads, width)
        query, key, value = made[:, :heads], made[:, heads : heads + kv_heads], made[:, heads + kv_heads :]
        angle = torch.rand(padded, width // 2).repeat(1, 2) * 6
        turn = (angle.cos(), angle.sin()) if step % 2 else None
        got = cache.attend(0, query, key, value, scaling, turn)
        for row in range(rows):
            one = slice(row, row + 1)
            both = torch.cat((query[one], key[one]), 1).double()
            both = both if turn is None else turned(both, turn[0][one], turn[1][one])
            kept[row][0].append(both[:, heads:].bfloat16().transpose(0, 1))
            kept[row][1].append(value[one].transpose(0, 1))
            keys, values = (torch.cat(part, 1).double().repeat_interleave(group, 0) for part in kept[row])
            weights = torch.softmax(both[0, :heads].bfloat16().double().unsqueeze(1) @ keys.mT * scaling, -1)
            want = (weights @ values)[:, 0]
            assert torch.allclose(got[row].double(), want, atol=0.02, rtol=0.01), (step, row)


@needs_compiler
@pytest.mark.parametrize("width", [16, 576])
def test_norm(width: int) -> None:
    torch.manual_seed(0)
    norm = native_norm(width, torch.bfloat16, torch.device("cpu"))
    assert norm is not None
    x, weight = half(7, width) * 3, half(width)
    want = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert torch.allclose(norm(x, weight, 1e-5).double(), want, rtol=0.005, atol=1e-6)
    x[3, 1] = torch.nan
    assert bool(norm(x, weight, 1e-5)[3].isnan().all())


@needs_compiler
def test_the_engine_says_whether_kernels_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_of(tiny.tiny_llama()).kernels is None, "float32 is computed by torch alone"
    engine = EmbeddedEngine(loaded_of(tiny.tiny_llama(), dtype=torch.bfloat16), encoder=None)
    assert engine.kernels
    monkeypatch.setenv("ISFT_NATIVE", "0")
    native.load.cache_clear()
    try:
        assert engine.kernels is None
        assert not BlockCache(1, 2, 1, 64, 64, torch.bfloat16, torch.device("cpu")).native
    finally:
        native.load.cache_clear()
