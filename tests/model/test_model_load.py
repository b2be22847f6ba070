from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model_helpers import MODELS, lora, same, scramble, section, state

from iterative_sft_cli import model as models
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.model import (
    LoadedModel,
    choose_compute_dtype,
    choose_device,
    has_bfloat16,
    load_model,
    load_weights_into,
    reset_to_base,
    save_pretrained,
)

CPU = torch.device("cpu")
LLAMA = dict(
    model_type="llama",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_after_loading_is_the_folder_itself(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    loaded = load_model(section(folders[name]))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.base_dtype == torch.bfloat16
    assert loaded.is_encoder_decoder is (name == "t5")
    assert loaded.context_length == (models.UNBOUNDED if name == "t5" else 256)
    assert loaded.eos_token_ids == (tiny.EOS, tiny.IM_END)
    assert loaded.revision is None and not loaded.has_adapter and not loaded.model.training
    loaded.eos_token_ids = (tiny.EOS,)
    save_pretrained(loaded, tmp_path / "out")
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folders[name] / file).read_bytes(), file
    save_pretrained(loaded, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


def test_a_saved_tokenizer_does_not_say_how_it_was_found(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers notes HF_HUB_OFFLINE in it: a run that goes on without it is to end with the same bytes."""
    loaded = load_model(section(folders["llama"]))
    save_pretrained(loaded, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not {"local_files_only", "is_local"} & set(saved)


def test_a_saved_folder_loads_with_transformers_and_follows_the_umask(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = load_model(section(folders["llama"]))
    scramble(loaded)
    save_pretrained(loaded, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, loaded.model.lm_head.weight.to(torch.bfloat16))
    assert again.generation_config.eos_token_id == [tiny.EOS, tiny.IM_END]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.CHATML
    assert len({oct(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}) == 1
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))


def test_tensors_of_another_dtype_keep_theirs(tmp_path: Path) -> None:
    mixed = tiny.tiny_llama().to(torch.bfloat16)
    mixed.model.norm.float()
    mixed.save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    loaded = load_model(section(tmp_path / "base"))
    assert loaded.base_dtype == torch.bfloat16
    save_pretrained(loaded, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_in_place(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    loaded = load_model(section(folders[name]))
    before, parameters = state(loaded), list(loaded.model.parameters())
    scramble(loaded)
    changed = state(loaded)
    assert not same(before, changed)
    save_pretrained(loaded, tmp_path / "out")
    reset_to_base(loaded)
    assert same(before, state(loaded))
    load_weights_into(loaded, tmp_path / "out")
    rounded = {name: tensor.to(torch.bfloat16).to(tensor.dtype) for name, tensor in changed.items()}
    assert same(rounded, state(loaded))
    assert all(a is b for a, b in zip(parameters, loaded.model.parameters(), strict=True))


def test_a_base_that_changed_on_disk_is_read_again(folders: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    loaded = load_model(section(base))
    tiny.tiny_llama(seed=1).to(torch.bfloat16).save_pretrained(base)
    reset_to_base(loaded)
    assert torch.equal(loaded.model.lm_head.weight, tiny.tiny_llama(seed=1).lm_head.weight.to(torch.bfloat16).float())


def test_folders_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = load_model(section(folders["llama"]))
    before = state(loaded)
    wide = tiny.save_tiny(tmp_path / "wide", model=tiny.tiny_llama(hidden_size=16))
    with pytest.raises(DataError, match=r"has the shape .*expected"):
        load_weights_into(loaded, wide)
    assert same(before, state(loaded))
    adapted = load_model(section(folders["llama"], adapter=lora()))
    with pytest.raises(DataError, match="holds no adapter"):
        load_weights_into(adapted, folders["llama"])
    save_pretrained(adapted, tmp_path / "adapter")
    with pytest.raises(DataError, match="is an adapter, but the model has none"):
        load_weights_into(loaded, tmp_path / "adapter")
    other = load_model(section(folders["llama"], adapter=lora(r=2)))
    with pytest.raises(DataError, match="does not fit"):
        load_weights_into(other, tmp_path / "adapter")


def test_weights_under_other_names_go_through_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(folders["llama"], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor + 1 for name, tensor in tensors.items()}
    save_file(renamed, other / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(section(folders["llama"]))
    name = "model.layers.0.mlp.up_proj.weight"
    load_weights_into(loaded, other)
    assert torch.equal(loaded.model.state_dict()[name], (tensors[name] + 1).float())


def test_weights_that_are_missing_are_an_error_and_never_random(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    holed = shutil.copytree(folders["llama"], tmp_path / "holed")
    tensors = load_file(holed / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lack 1 tensors of a LlamaForCausalLM \(such as model.norm.weight\)"):
        load_model(section(holed))
    loaded = load_model(section(folders["llama"]))
    with pytest.raises(DataError, match="lack 1 tensors"):
        load_weights_into(loaded, holed)


def test_sharded_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    sharded = shutil.copytree(folders["untied"], tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    tiny.tiny_llama(tied=False).to(torch.bfloat16).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    loaded = load_model(section(sharded))
    assert same(state(loaded), state(load_model(section(folders["untied"]))))
    scramble(loaded)
    reset_to_base(loaded)
    assert same(state(loaded), state(load_model(section(folders["untied"]))))


# -- the hash of the base


def test_the_base_hash_is_of_the_content(folders: dict[str, Path], tmp_path: Path) -> None:
    one = load_model(section(folders["llama"])).base_hash
    copied = shutil.copytree(folders["llama"], tmp_path / "copy")
    (copied / "README.md").write_text("nothing that matters")
    (copied / "state.json").write_text("{}")
    assert load_model(section(copied)).base_hash == one
    hashes = {one}
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        changed = shutil.copytree(folders["llama"], tmp_path / f"changed-{name}")
        data = (changed / name).read_bytes()
        if name == "model.safetensors":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif name.endswith(".json"):
            data = json.dumps({**json.loads(data), "extra": 1}).encode()
        else:
            data += b" "
        (changed / name).write_bytes(data)
        hashes.add(models.content_hash(models.find_model(section(changed), tmp_path).files()))
    assert len(hashes) == 5


def test_chunks_of_large_files_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iterative_sft_cli import model_weights

    monkeypatch.setattr(model_weights, "_CHUNK", 4)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"aaaabbbbcc")
    one = model_weights.content_hash([path])
    path.write_bytes(b"bbbbaaaacc")
    assert model_weights.content_hash([path]) != one
    path.write_bytes(b"")
    assert model_weights.content_hash([path]) != one


# -- fresh models


def test_a_fresh_model_depends_on_config_seed_and_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    def make(seed: int = 0, **values: Any) -> LoadedModel:
        return load_model(section(init={**LLAMA, **values}, tokenizer=str(folders["llama"])), seed=seed)

    one = make()
    assert one.base_dtype == torch.float32 and one.context_length == 64 and one.folder is None
    assert same(state(one), state(make())) and one.base_hash == make().base_hash
    assert len({one.base_hash, make(1).base_hash, make(hidden_size=32).base_hash}) == 3
    before = state(one)
    scramble(one)
    reset_to_base(one)
    assert same(before, state(one))
    save_pretrained(one, tmp_path / "out")
    assert same(before, state(load_model(section(tmp_path / "out"))))
    t5 = dict(model_type="t5", d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    assert load_model(section(init=t5, tokenizer=str(folders["llama"]))).is_encoder_decoder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "lama"}, "'lama' is no model type(.|\n)*did you mean llama"),
        ({}, "model_type: missing"),
        ({**LLAMA, "hidden_sizes": 3}, "no value 'hidden_sizes'\nhint: did you mean hidden_size"),
        ({**LLAMA, "vocab_size": 10}, "at least the tokenizer's 264"),
        ({**LLAMA, "num_attention_heads": 3}, "no model can be made.*not a multiple of the number of attention heads"),
    ],
)
def test_values_of_a_fresh_model_are_checked(folders: dict[str, Path], values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(section(init=values, tokenizer=str(folders["llama"])))


# -- where and how


def test_bfloat16_is_computed_with_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def cpuinfo(text: str) -> None:
        monkeypatch.setattr(Path, "read_text", lambda self, **kwargs: text)

    cpuinfo("flags : avx2 avx512f")
    assert not has_bfloat16(CPU) and choose_compute_dtype("auto", CPU) == torch.float32
    cpuinfo("flags : avx512_bf16")
    assert has_bfloat16(CPU) and choose_compute_dtype("auto", CPU) == torch.bfloat16
    cpuinfo("flags : amx_bf16")
    assert has_bfloat16(CPU)
    assert choose_compute_dtype("float32", CPU) == torch.float32
    assert choose_compute_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match="loss scale"):
        choose_compute_dtype("float16", CPU)


def test_a_device_that_is_not_there_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(ConfigError, match="no device 'cuda:1'"):
        choose_device("cuda:1")


def test_a_large_model_needs_a_gpu_or_a_word(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "MAX_PARAMETERS_ON_CPU", 1000)
    with pytest.raises(ConfigError, match=r"billion parameters and there is no GPU.*device: cpu"):
        load_model(section(folders["llama"]))
    assert load_model(section(folders["llama"], device="cpu")).device == CPU


def test_what_cannot_be_loaded_is_a_data_error(folders: dict[str, Path], tmp_path: Path) -> None:
    own = shutil.copytree(folders["llama"], tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_type": "never_heard_of"}))
    with pytest.raises(DataError, match="cannot be loaded"):
        load_model(section(own))
    bare = shutil.copytree(folders["llama"], tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (bare / name).unlink()
    with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
        load_model(section(bare))
    assert load_model(section(bare, tokenizer=str(folders["llama"]))).tokenizer.chat_template == tiny.CHATML
    with pytest.raises(DataError, match="cannot be loaded"):
        load_model(section(folders["llama"], attention="flash_attention_2"))


def test_loading_and_saving_write_nothing_on_the_screen(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    try:
        loaded = load_model(section(folders["gpt2"], adapter=lora()))
        save_pretrained(loaded, tmp_path / "a")
        loaded = load_model(section(folders["llama"]))
        reset_to_base(loaded)
        save_pretrained(loaded, tmp_path / "b")
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")
