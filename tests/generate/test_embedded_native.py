"""The C kernels: their numbers beside float64, and which libraries are ever loaded."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers_generate import engine_of, loaded_of

import iterative_sft_cli.generate.native as native
from iterative_sft_cli.generate.embedded import EmbeddedEngine
from iterative_sft_cli.generate.embedded_cache import BlockCache
from iterative_sft_cli.generate.embedded_native import native_norm

needs_compiler = pytest.mark.skipif(native.load_kernels() is None, reason="no C compiler here")


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
    native.load_kernels.cache_clear()
    try:
        assert engine.kernels is None
        assert not BlockCache(1, 2, 1, 64, 64, torch.bfloat16, torch.device("cpu")).native
    finally:
        native.load_kernels.cache_clear()


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this user, and how often the compiler was called in `compiled`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ["-O0", "-fPIC", "-shared"])
    native.load_kernels.cache_clear()
    yield tmp_path
    native.load_kernels.cache_clear()


@needs_compiler
def test_the_library_is_compiled_once_and_for_this_user_only(cache_home: Path) -> None:
    assert native.load_kernels() is not None
    (made,) = (cache_home / "isft").glob("*.so")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700 and stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    before = made.stat().st_mtime_ns
    native.load_kernels.cache_clear()
    assert native.load_kernels() is not None and made.stat().st_mtime_ns == before
    assert native.kernels_fingerprint() == made.stem.removeprefix("kernels-")


@needs_compiler
@pytest.mark.parametrize("how", ["writable", "link"])
def test_a_library_that_others_could_have_made_is_made_again(cache_home: Path, how: str) -> None:
    native.load_kernels()
    (made,) = (cache_home / "isft").glob("*.so")
    inode = made.stat().st_ino
    if how == "writable":
        made.chmod(0o777)
    else:
        made.rename(cache_home / "elsewhere.so")
        made.symlink_to(cache_home / "elsewhere.so")
    native.load_kernels.cache_clear()
    assert native.load_kernels() is not None
    assert not made.is_symlink() and made.stat().st_ino != inode and stat.S_IMODE(made.stat().st_mode) == 0o700


@needs_compiler
def test_a_folder_that_others_may_write_to_is_not_used(cache_home: Path) -> None:
    (cache_home / "isft").mkdir()
    (cache_home / "isft").chmod(0o777)
    assert native.load_kernels() is not None
    assert not list((cache_home / "isft").iterdir())


@pytest.mark.parametrize("broken", ["exit 1", ":", "false --version"])
def test_without_a_working_compiler_torch_computes(
    cache_home: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = cache_home / "cc"
    compiler.write_text(f"#!/bin/sh\n{broken}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert native.load_kernels() is None and native.kernels_fingerprint() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    native.load_kernels.cache_clear()
    assert native.load_kernels() is None


@needs_compiler
def test_a_compiler_with_arguments(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{shutil.which('cc') or shutil.which('gcc')} -g0")
    assert native.load_kernels() is not None


def test_the_wheel_holds_the_source() -> None:
    builder = pytest.importorskip("hatchling.builders.wheel")
    root = Path(native.__file__).parents[3]
    files = {f.distribution_path for f in builder.WheelBuilder(str(root)).recurse_included_files()}
    assert "iterative_sft_cli/generate/native/kernels.c" in files


@needs_compiler
@pytest.mark.skipif(sys.platform == "win32" or os.name != "posix", reason="asks the C compiler")
def test_the_source_has_no_warnings() -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    command = [str(compiler), "-O2", "-march=native", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-fsyntax-only"]
    done = subprocess.run([*command, str(native.SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
