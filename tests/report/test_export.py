"""`isft export`: what comes out loads where it is meant to, and says the same as the run."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import report_runs
from report_runs import call, call_json

from iterative_sft_cli import Run

PROMPTS = [{"question": f"Say {n}", "answer": str(n)} for n in range(4)]


def real_run(folder: Path, base: Path, **model):
    """A run of one round on a tiny Llama; returns its directory."""
    from iterative_sft_cli.config import parse_config

    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    config = {
        "model": {"path": str(base), "device": "cpu", "dtype": "float32", **model},
        "output_dir": str(folder / "run"),
        "rounds": 1,
        "prompts": {"path": "prompts.jsonl", "prompt": "question", "answer": "answer", "system": "Be short."},
        "generate": {"samples_per_prompt": 2, "max_new_tokens": 6},
        "filters": ["nonempty"],
        "train": {"start_from": "previous", "data": "replace", "learning_rate": 0.01, "batch_size": 4},
    }
    import io

    from iterative_sft_cli.console import Console
    from iterative_sft_cli.experiment import run_experiment

    assert run_experiment(parse_config(config, base_dir=folder), view=Console(io.StringIO())).code == 0
    return folder / "run"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("base") / "model", dtype="float32")


@pytest.fixture(scope="session")
def full(tmp_path_factory, base):
    return real_run(tmp_path_factory.mktemp("full"), base)


@pytest.fixture(scope="session")
def lora(tmp_path_factory, base):
    return real_run(tmp_path_factory.mktemp("lora"), base, adapter={"type": "lora", "r": 4, "alpha": 64})


def logits(folder, adapter=None):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.arange(40, 60)[None]).logits


def test_a_whole_model_loads_with_tokenizer_template_and_stop_tokens(full, tmp_path, capsys):
    import torch
    from transformers import AutoTokenizer

    for form in ("hf", "vllm"):
        out = tmp_path / form
        made = call_json(capsys, "export", full, "--to", form, "--out", out)
        assert made["checkpoint"] == "0001" and made["architecture"] == "LlamaForCausalLM" and made["bytes"] > 10_000
        assert torch.equal(logits(out), logits(full / "checkpoints" / "0001"))
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (stops if isinstance(stops, list) else [stops])
        assert not {"state", "state.json", "MANIFEST.json", "run.json"} & {p.name for p in out.iterdir()}
        assert (form == "vllm") == bool(made["next"])
    assert not list(tmp_path.glob(".*"))


def test_older_readers_find_rope_dtype_and_tokenizer(full, tmp_path, capsys):
    from transformers import AutoConfig, AutoTokenizer

    call_json(capsys, "export", full, "--to", "hf", "--out", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["torch_dtype"] == config["dtype"]
    before, after = (AutoConfig.from_pretrained(f) for f in (full / "checkpoints" / "0001", tmp_path / "hf"))
    assert before.rope_parameters == after.rope_parameters and before.dtype == after.dtype
    old, new = (AutoTokenizer.from_pretrained(f) for f in (full / "checkpoints" / "0001", tmp_path / "hf"))
    assert old("What is <|im_end|>?").input_ids == new("What is <|im_end|>?").input_ids
    assert old.chat_template == new.chat_template and old.eos_token == new.eos_token
    assert set(old.all_special_tokens) == set(new.all_special_tokens)
    told = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] != "TokenizersBackend" and "local_files_only" not in told
    assert not isinstance(told.get("extra_special_tokens"), list)


def test_a_scaled_rope_is_told_in_both_words(tmp_path):
    from iterative_sft_cli.report.export_model import write_for_older_readers

    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope, "dtype": "bfloat16"}))
    write_for_older_readers(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0} and found["rope_theta"] == 500000.0
    assert found["rope_parameters"] == rope
    layers = {"rope_parameters": {"sliding": rope, "full": rope}}
    (tmp_path / "config.json").write_text(json.dumps(layers))
    write_for_older_readers(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == layers


def test_an_adapter_is_merged_into_what_it_computes(lora, base, tmp_path, capsys):
    import torch

    call_json(capsys, "export", lora, "--to", "adapter", "--out", tmp_path / "adapter")
    call_json(capsys, "export", lora, "--to", "hf", "--out", tmp_path / "hf")
    plain, merged = logits(base), logits(tmp_path / "hf")
    both = logits(base, tmp_path / "adapter")
    assert torch.allclose(merged, both, atol=1e-4) and not torch.allclose(merged, plain, atol=1e-2)
    assert (tmp_path / "hf" / "tokenizer.json").is_file() and not (tmp_path / "hf" / "adapter_config.json").exists()
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_base_model_that_changed_is_not_merged_into(lora, base, tmp_path, capsys):
    weights = base / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b"\x00\x00\x00@")
        code, _, err = call(capsys, "export", lora, "--to", "hf", "--out", tmp_path / "hf")
    finally:
        weights.write_bytes(before)
    assert code == 4 and "its files changed" in err and not (tmp_path / "hf").exists()


def test_the_modelfile_renders_as_the_run_does(full, tmp_path, capsys):
    made = call_json(capsys, "export", full, "--to", "ollama", "--out", tmp_path / "o")
    text = (tmp_path / "o" / "Modelfile").read_text()
    assert "FROM .\n" in text and "<|im_start|>{{ .Role }}" in text and 'SYSTEM """Be short."""' in text
    assert 'PARAMETER stop """<|im_end|>"""' in text and made["next"].startswith("ollama create")
    # the run's own decoding: Ollama's defaults are top_k 40, top_p 0.9 and, in older versions, repeat_penalty 1.1
    said = dict(line.split()[1:] for line in text.splitlines() if line.startswith("PARAMETER") and "stop" not in line)
    assert {name: said[name] for name in ("top_p", "top_k", "repeat_penalty")} == {
        "top_p": "1",
        "top_k": "0",
        "repeat_penalty": "1",
    }
    assert float(said["temperature"]) == Run.open(full).settings.at_round(1).generate.temperature


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"])
def test_what_ollama_does_not_convert_is_refused(architecture, tmp_path):
    from iterative_sft_cli.errors import DataError
    from iterative_sft_cli.report.ollama import modelfile
    from iterative_sft_cli.types import Decoding

    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    with pytest.raises(DataError, match="does not import") as caught:
        modelfile(tmp_path, system=None, raw=False, decoding=Decoding())
    assert "--to gguf" in caught.value.hint


def test_greedy_decoding_and_stop_strings_stand_in_the_modelfile(full, tmp_path, capsys):
    from iterative_sft_cli.report.ollama import modelfile
    from iterative_sft_cli.types import Decoding

    call_json(capsys, "export", full, "--to", "hf", "--out", tmp_path / "o")
    text = modelfile(tmp_path / "o", system=None, raw=True, decoding=Decoding(do_sample=False, stop=("\n\n",)))
    assert "PARAMETER temperature 0\n" in text and 'PARAMETER stop """\n\n"""' in text


@pytest.mark.parametrize(
    ("template", "shape", "system"),
    [("CHATML", "<|im_start|>", None), ("DEFAULT_SYSTEM", "<|im_start|>", "You are tiny."), ("TRIMMING", None, None)],
)
def test_chat_templates_are_recognised_by_what_they_render(template, shape, system):
    import tiny

    from iterative_sft_cli.errors import DataError
    from iterative_sft_cli.report.ollama import find_template

    tokenizer = tiny.tiny_tokenizer(template=getattr(tiny, template))
    if shape is None:
        with pytest.raises(DataError, match="no template in Ollama's language"):
            find_template(tokenizer)
    else:
        text, found = find_template(tokenizer)
        assert shape in text and found == system


def test_a_bos_token_that_opens_every_turn_is_not_taken_away():
    from tiny import CHATML, tiny_tokenizer

    from iterative_sft_cli.report.ollama import find_template

    tokenizer = tiny_tokenizer(template=CHATML)
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2's
    assert find_template(tokenizer)[1] is None and "<|im_start|>" in find_template(tokenizer)[0]
    tokenizer = tiny_tokenizer(template="{{ '<|bos|>' }}" + CHATML)
    assert "<|bos|>" not in find_template(tokenizer)[0]


def test_gguf_is_left_to_its_converter(full, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    code, _, err = call(capsys, "export", full, "--to", "gguf", "--out", tmp_path / "m.gguf")
    assert code == 4 and "convert_hf_to_gguf.py" in err and "LLAMA_CPP" in err
    script = tmp_path / "llama" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    good = "import sys, pathlib\nassert (pathlib.Path(sys.argv[1]) / 'config.json').is_file()\n"
    script.write_text(good + "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_bytes(b'GGUF')\n")
    monkeypatch.setenv("LLAMA_CPP", str(script.parent))
    assert call(capsys, "export", full, "--to", "gguf", "--out", tmp_path / "m.gguf")[0] == 0
    assert (tmp_path / "m.gguf").read_bytes() == b"GGUF"
    script.write_text("raise SystemExit('cannot convert this')")
    code, _, err = call(capsys, "export", full, "--to", "gguf", "--out", tmp_path / "n.gguf")
    assert code == 4 and "cannot convert this" in err and not (tmp_path / "n.gguf").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "m.gguf"]


def test_accepted_samples_load_as_chat_rows(done, tmp_path, capsys):
    from datasets import load_dataset
    from tiny import tiny_tokenizer

    out = tmp_path / "sft.jsonl"
    made = call_json(capsys, "export", done, "--to", "sft-jsonl", "--out", out, "--round", 2)
    accepted = [one for one in Run.open(done).iter_samples([2]) if one.accepted]
    rows = load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert made["rows"] == len(rows) == len(accepted)
    for row, one in zip(rows, accepted, strict=True):
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert row["messages"][1]["content"] == one.sample.completion and row["sample_id"] == one.sample.sample_id
        assert one.sample.completion in tiny_tokenizer().apply_chat_template(row["messages"], tokenize=False)


def test_the_system_message_and_examples_are_part_of_the_rows(full, tmp_path, capsys):
    call_json(capsys, "export", full, "--to", "sft-jsonl", "--out", tmp_path / "x.jsonl")
    first = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])
    assert first["messages"][0] == {"role": "system", "content": "Be short."} and len(first["messages"]) == 3


def test_raw_prompts_become_plain_text(tmp_path):
    from iterative_sft_cli.report.export_rows import Conversation

    few_shot = [{"prompt": "Q: 1", "completion": "A: 1"}]
    run = report_runs.train(tmp_path, rounds=1, prompts={"template": "none", "system": "S", "few_shot": few_shot})
    assert Conversation(Run.open(run)).text("Q: 2") == "S\n\nQ: 1\nA: 1\n\nQ: 2"


def test_pairs_are_of_one_prompt_and_only_of_what_is_worse(done, tmp_path, capsys):
    out = tmp_path / "dpo.jsonl"
    made = call_json(capsys, "export", done, "--to", "dpo-jsonl", "--out", out)
    stored = {one.sample.sample_id: one for one in Run.open(done).iter_samples()}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert made["rows"] == len(rows) > 10
    for row in rows:
        good, bad = stored[row["chosen_id"]], stored[row["rejected_id"]]
        assert good.accepted and bad.rejected_by["filter"] == "numeric_answer"
        assert (good.sample.prompt_id, good.sample.round_index) == (bad.sample.prompt_id, bad.sample.round_index)
        assert row["chosen"][0]["content"] != row["rejected"][0]["content"] and row["prompt"][0]["role"] == "user"
    assert {row["reason"] for row in rows} == {"wrong_answer"}


def test_the_card_tells_lineage_and_evaluation(done):
    from iterative_sft_cli.report.card import model_card

    card = model_card(Run.open(done), "0003", adapter=False)
    last = Run.open(done).stats[-1]
    assert f"| 3 | {last['eval/pass@1']:.3f} [" in card and "trained from checkpoint 0002" in card
    assert "`numeric_answer`" in card and "toy-base" in card and "12 held-out prompts" in card


def test_the_card_cannot_be_broken_by_names(done, monkeypatch):
    from iterative_sft_cli.report.card import model_card

    evil = 'x"\n---\n# evil | <script> `code`\x1b[2J'
    monkeypatch.setattr(Run, "model_name", property(lambda self: evil))
    card = model_card(Run.open(done), "0003", adapter=False)
    assert card.splitlines()[:2][0] == "---" and card.splitlines().count("---") == 2
    assert "<script>" not in card.partition("---\n\n")[2] and "\x1b" not in card


def test_the_card_names_a_hub_model_and_no_local_path(full):
    from iterative_sft_cli.report.card import model_card

    run = Run.open(full)
    card = model_card(run, "0001", adapter=False)
    assert str(Path(run.model_name).parent) not in card and "base_model" not in card and "model, trained in 1" in card
    section = run.settings.model.model_copy(update={"path": "acme/tiny"})
    run.__dict__["settings"] = run.settings.model_copy(update={"model": section})
    assert 'base_model: "acme/tiny"' in model_card(run, "0001", adapter=False)
    # a folder that is gone looks like a hub id, but for its first character
    section = run.settings.model.model_copy(update={"path": ".model-cache/tiny"})
    run.__dict__["settings"] = run.settings.model_copy(update={"model": section})
    assert "model-cache" not in model_card(run, "0001", adapter=False)


def test_which_checkpoint(done, tmp_path, capsys):
    from iterative_sft_cli.report.export_model import choose_checkpoint

    run = Run.open(done)
    assert choose_checkpoint(run, None).key == choose_checkpoint(run, "best").key == "0003"
    assert choose_checkpoint(run, "0002").key == "0002" and choose_checkpoint(run, "last").key == "0003"
    code, _, err = call(capsys, "export", done, "--to", "hf", "--checkpoint", "0001")
    assert code == 2 and "best, last, or one of 0002, 0003" in err


def test_a_damaged_checkpoint_is_not_exported(full, tmp_path, capsys):
    weights = full / "checkpoints" / "0001" / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        code, _, err = call(capsys, "export", full, "--to", "hf", "--out", tmp_path / "hf")
    finally:
        weights.write_bytes(before)
    assert code == 4 and "SHA-256" in err and not (tmp_path / "hf").exists()


def test_hub_is_a_rehearsal_until_push(full, capsys, monkeypatch):
    uploads = []
    monkeypatch.setattr("iterative_sft_cli.report.export.upload", lambda *parts: uploads.append(parts[1:]))
    made = call_json(capsys, "export", full, "--to", "hub", "--repo", "me/tiny")
    assert not uploads and {"model.safetensors", "README.md", "tokenizer.json"} <= made["files"].keys()
    code, out, err = call(capsys, "export", full, "--to", "hub", "--repo", "me/tiny")
    assert code == 0 and "model.safetensors" in out and "nothing was uploaded" in err and "--push" in err
    assert call(capsys, "export", full, "--to", "hub", "--repo", "me/tiny", "--push")[0] == 0
    assert uploads == [("me/tiny", "0001")]
    for repo in ("tiny", "a/b/c", "/x"):
        assert call(capsys, "export", full, "--to", "hub", "--repo", repo)[0] == 2


def test_a_refusing_hub_is_said_in_its_words(full, capsys, monkeypatch):
    from huggingface_hub import HfApi

    def refuse(self, *args, **options):
        raise OSError("401 no token")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    code, _, err = call(capsys, "export", full, "--to", "hub", "--repo", "me/tiny", "--push")
    assert code == 4 and "401 no token" in err and "HF_TOKEN" in err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--to", "nope"), 2, "hf, vllm, adapter"),
        (("--to", "adapter"), 2, "no adapter"),
        (("--to", "hf", "--round", "1"), 2, "--checkpoint"),
        (("--to", "sft-jsonl", "--checkpoint", "0001"), 2, "--round"),
        (("--to", "sft-jsonl", "--round", "9"), 2, "no samples of that round"),
        (("--to", "hub"), 2, "--repo USER/NAME"),
    ],
)
def test_wrong_options(full, capsys, options, code, said):
    got, out, err = call(capsys, "export", full, *options)
    assert got == code and said in err and out == ""


def test_nothing_there_is_written_over(full, done, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    code, _, err = call(capsys, "export", full, "--to", "hf", "--out", tmp_path / "mine")
    assert code == 2 and "there already" in err and (tmp_path / "mine" / "x").read_text() == "x"
    code, _, err = call(capsys, "export", done, "--to", "hf", "--out", tmp_path / "toy")
    assert code == 4 and "not a Hugging Face model" in err and sorted(os.listdir(tmp_path)) == ["mine"]


def test_files_follow_the_umask(full, tmp_path, capsys):
    call_json(capsys, "export", full, "--to", "hf", "--out", tmp_path / "hf")
    umask = os.umask(0)
    os.umask(umask)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "hf").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_sample_that_was_cut_off_or_is_a_duplicate_is_not_the_worse_one():
    from iterative_sft_cli.report.export_rows import is_worse
    from iterative_sft_cli.samples import StoredSample
    from iterative_sft_cli.types import Sample

    def stored(filter_name, finish="eos"):
        says = ({"filter": filter_name, "keep": False, "reason": "x"},)
        return StoredSample(Sample("p", "1-p-0", 1, "x", "y", finish_reason=finish), 1, says, False)

    worse = {"numeric_answer", "finished"}
    assert is_worse(stored("numeric_answer"), worse) and not is_worse(stored("dedup"), worse)
    assert not is_worse(stored("finished", "length"), worse) and not is_worse(stored("numeric_answer", "length"), worse)
