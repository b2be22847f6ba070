"""What `isft plan` says of memory: the parts, what cuts them, what is refused; and that a real run needs what was said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from iterative_sft_cli.cli import run as isft
from iterative_sft_cli.config import load_config
from iterative_sft_cli.plan_memory import GB, estimate, shape_of

SMALL = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
"""A model of 1.5 B parameters."""
LARGE = {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "vocab_size": 152064,
}
"""A model of 32 B parameters."""


def write(folder: Path, model: dict, **train: object) -> Path:
    (folder / "prompts.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    tree = {
        "model": model,
        "output_dir": str(folder / "run"),
        "rounds": 2,
        "prompts": {"path": "prompts.jsonl", "prompt": "question", "answer": "answer"},
        "generate": {"samples_per_prompt": 2, "max_new_tokens": 512},
        "filters": ["nonempty"],
        "train": {"start_from": "previous", "data": "replace", **train},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def init(shape: dict, **more: object) -> dict:
    return {"init": {"model_type": "llama", **shape}, "tokenizer": "none", **more}


def of(path: Path, **options: object):
    loaded = load_config(path, [])
    shape = shape_of(loaded.config.model, loaded.base_dir)
    settings = {"processes": 1, "device_bytes": 80 * GB, "gpu": True, **options}
    return shape, estimate(loaded.config.at_round(1), shape, **settings)


def test_parameters_are_counted_from_the_shape(tmp_path):
    assert 1.5e9 < of(write(tmp_path, init(SMALL)))[0].parameters < 1.6e9
    assert 32e9 < of(write(tmp_path, init(LARGE)))[0].parameters < 33.5e9


def test_a_whole_copy_needs_sixteen_bytes_a_parameter_and_pieces_a_share_of_it(tmp_path):
    shape, alone = of(write(tmp_path, init(SMALL)))
    fixed = alone.train["weights"] + alone.train["optimizer"] + alone.train["gradients"]
    assert 15 * shape.parameters < fixed < 19 * shape.parameters
    _, copies = of(write(tmp_path, init(SMALL), parallel="ddp"), processes=8)
    assert copies.train["optimizer"] == alone.train["optimizer"]
    _, pieces = of(write(tmp_path, init(SMALL), parallel="fsdp2"), processes=8)
    assert pieces.train["optimizer"] == alone.train["optimizer"] / 8
    assert pieces.peak < copies.peak


def test_an_adapter_trains_little(tmp_path):
    lora = {"adapter": {"type": "lora", "r": 16, "alpha": 32}}
    shape, found = of(write(tmp_path, init(SMALL, **lora)), device_bytes=24 * GB)
    assert found.train["optimizer"] < 0.02 * 8 * shape.parameters
    assert found.peak < 24 * GB and found.checkpoint < 0.1 * GB


def test_plan_prints_both_phases_and_refuses_with_three_ways_out(tmp_path, capsys):
    config = write(tmp_path, init(SMALL))
    assert isft(["plan", str(config), "--gpus", "1", "--gpu-gb", "80"]) == 0
    said = capsys.readouterr().out
    assert "memory of the process (1.5" in said and "  train " in said and "  generate " in said
    assert "a round writes a checkpoint of 3.09 GB and 18." in said and "reads no weights" in said
    assert isft(["plan", str(config), "--gpus", "1", "--gpu-gb", "24"]) == 2
    said = capsys.readouterr().err
    assert "train needs" in said and "there are 24.0 GB" in said
    assert all(way in said for way in ("(1) train an adapter", "(2) cut the model", "(3) take a smaller"))


def test_servers_and_trainer_never_have_a_gpu_together(tmp_path):
    config = write(tmp_path, init(LARGE), parallel="fsdp2")
    serve = {"engine": "vllm", "vllm": {"tensor_parallel_size": 8, "gpu_memory_utilization": 0.8}}
    tree = yaml.safe_load(config.read_text())
    tree["generate"] |= serve
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
    _, found = of(config, processes=32)
    assert found.generate["weights"] == found.generate["optimizer"] == 0.0
    assert found.generate["servers"] == 0.8 * 80 * GB and "servers" not in found.train
    tree["train"]["offload"] = "none"
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
    stays = of(config, processes=32)[1].generate
    assert stays["weights"] + stays["optimizer"] > 10 * GB


def test_servers_on_a_cpu_keep_their_memory_unless_they_stop(tmp_path):
    config = write(tmp_path, init(SMALL))
    tree = yaml.safe_load(config.read_text())
    tree["generate"] |= {"engine": "vllm", "memory_gb": 4, "vllm": {"servers": 2}}
    options = {"gpu": False, "device_bytes": 64 * GB}

    def planned(**vllm):
        tree["generate"]["vllm"] |= vllm
        config.write_text(yaml.safe_dump(tree, sort_keys=False))
        return of(config, **options)

    shape, found = planned()
    assert found.train["servers"] == found.generate["servers"] > 2 * (2 * shape.parameters + 4 * 2**30)
    assert found.generate["weights"] > 0
    tree["train"]["offload"] = "disk"
    _, found = planned(while_training="stop")
    assert "servers" not in found.train and found.generate["weights"] == found.generate["optimizer"] == 0.0


def test_without_a_shape_at_hand_nothing_is_said(tmp_path, capsys):
    assert isft(["plan", str(write(tmp_path, {"path": "some/model"})), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] is None


PEAK = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"


@pytest.mark.slow
@pytest.mark.skipif("ISFT_TEST_MODEL" not in os.environ, reason="ISFT_TEST_MODEL names no model folder")
@pytest.mark.parametrize("setting", ["full", "lora"])
def test_a_real_run_needs_what_was_said(tmp_path, setting):
    model = {"path": os.environ["ISFT_TEST_MODEL"], "device": "cpu"}
    if setting == "lora":
        model["adapter"] = {"type": "lora", "r": 16, "alpha": 32}
    config = write(tmp_path, model, steps=2, batch_size=32 if setting == "full" else 16)
    lines = [{"question": f"What is {n} + 5? Answer in one short line.", "answer": str(n + 5)} for n in range(32)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["rounds=1", "generate.samples_per_prompt=4", "generate.max_new_tokens=32"]
    if setting == "lora":
        more += ["train.micro_batch_tokens=512", "generate.max_new_tokens=64"]
    done = subprocess.run(
        [sys.executable, "-m", "iterative_sft_cli", "plan", str(config), *more, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    memory = json.loads(done.stdout)["memory"]
    said = max(sum(memory["train"].values()), sum(memory["generate"].values()))
    run = [sys.executable, "-m", "iterative_sft_cli", "train", str(config), *more]
    measured = subprocess.run([sys.executable, "-c", PEAK, *run], capture_output=True, text=True, check=True).stdout
    peak = float(measured.split()[-1]) * 1024
    assert 0.75 < said / peak < 1.25, f"{said / GB:.2f} GB said, {peak / GB:.2f} GB measured"
