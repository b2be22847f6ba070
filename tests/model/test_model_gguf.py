"""A .gguf file as a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model_helpers import same, scramble, section, state

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.model import (
    load_model,
    reset_to_base,
    save_pretrained,
)


def test_a_gguf_file_is_a_model_that_trains_and_saves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    write_tiny_gguf(gguf, tmp_path / "tiny.gguf")
    loaded = load_model(section("tiny.gguf"), base_dir=tmp_path)
    assert loaded.base_dtype == torch.bfloat16 and loaded.context_length == 64
    before = state(loaded)
    ids = torch.tensor([[5, 6, 7]])
    loaded.model(input_ids=ids, labels=ids).loss.backward()
    save_pretrained(loaded, tmp_path / "out")
    again = load_model(section(tmp_path / "out"))
    assert same(before, state(again))
    assert again.tokenizer("a b").input_ids == loaded.tokenizer("a b").input_ids
    scramble(loaded)
    reset_to_base(loaded)
    assert same(before, state(loaded))
    assert "GGUF" not in capfd.readouterr().err
    with pytest.raises(DataError):
        (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:200])
        load_model(section("cut.gguf"), base_dir=tmp_path)


def test_a_gguf_file_without_its_package_says_how_to_get_it(tmp_path: Path, hide_packages: Callable[..., None]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    hide_packages("gguf")
    with pytest.raises(ConfigError, match=r"iterative-sft-cli\[gguf\]"):
        load_model(section("x.gguf"), base_dir=tmp_path)


def write_tiny_gguf(gguf: Any, path: Path) -> None:
    """A one-layer Llama with random float32 weights and a byte-level tokenizer, as llama.cpp writes them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = [*tiny.SPECIALS, *tiny._byte_characters(), "AB"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(tiny.SPECIALS) + [1] * 257)
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(tiny.EOS)
    writer.add_bos_token_id(tiny.BOS)
    shapes = {
        "token_embd.weight": (len(tokens), 16),
        "output_norm.weight": (16,),
        "blk.0.attn_norm.weight": (16,),
        "blk.0.ffn_norm.weight": (16,),
        "blk.0.attn_q.weight": (16, 16),
        "blk.0.attn_k.weight": (8, 16),
        "blk.0.attn_v.weight": (8, 16),
        "blk.0.attn_output.weight": (16, 16),
        "blk.0.ffn_gate.weight": (32, 16),
        "blk.0.ffn_up.weight": (32, 16),
        "blk.0.ffn_down.weight": (16, 32),
    }
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
