"""`isft ask` and `isft doctor`: both look at the model that the config names, with the parts that training uses."""

from __future__ import annotations

import io
import json

import pytest
import report_runs
import yaml
from report_runs import call, call_json


def test_ask_answers_with_both_models(done, capsys, monkeypatch):
    found = call_json(capsys, "ask", done, "4+0", "--samples", 40)
    right = {name: sum(one["text"] == "The answer is 4." for one in found[name]) for name in ("base", "trained")}
    assert found["checkpoint"] == "0003" and len(found["base"]) == len(found["trained"]) == 40
    assert right["trained"] > right["base"] > 0
    assert found == call_json(capsys, "ask", done, "4+0", "--samples", 40)
    code, out, _ = call(capsys, "ask", done, "4+0", "--greedy")
    assert code == 0 and "base: " in out and "checkpoint 0003" in out and out.count("The answer is 4.") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1"))
    assert call_json(capsys, "ask", done, "-", "--checkpoint", "0002")["prompt"] == "1+1"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((" ",), 2, "nothing to ask"),
        (("1+1", "--samples", "0"), 2, "at least 1"),
        (("1+1", "--checkpoint", "0009"), 2, "0002, 0003"),
    ],
)
def test_ask_with_wrong_options(done, capsys, options, code, said):
    got, out, err = call(capsys, "ask", done, *options)
    assert got == code and said in err and out == ""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config on a tiny Llama whose answers end by themselves: its end-of-turn token is made likely."""
    import torch
    from tiny import IM_END, save_tiny, tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("doctor")
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.lm_head.weight[IM_END] = 3 * model.lm_head.weight[50:200].mean(0) + 0.02
    save_tiny(folder / "model", model=model, tokenizer=tiny_tokenizer(), dtype="float32")
    (folder / "p.jsonl").write_text("".join(json.dumps({"q": f"Say {n}", "a": str(n)}) + "\n" for n in range(4)))
    tree = {
        "model": {"path": str(folder / "model"), "device": "cpu", "dtype": "float32"},
        "output_dir": str(folder / "run"),
        "rounds": 2,
        "prompts": {"path": "p.jsonl", "prompt": "q", "answer": "a"},
        "generate": {"samples_per_prompt": 2, "max_new_tokens": 150},
        "filters": ["nonempty"],
        "train": {"start_from": "previous", "data": "replace", "learning_rate": 0.01, "batch_size": 2, "epochs": 2},
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def checks_of(capsys, *argv):
    """Exit code, and the checks by name."""
    code, out, err = call(capsys, "doctor", *argv, "--json")
    assert out, err
    found = json.loads(out)
    return code, {one["name"]: one for one in found["checks"]}, found


@pytest.mark.parametrize("change", [(), ("model.adapter={type: lora, r: 4}",)], ids=["full", "lora"])
def test_a_healthy_config_is_green_and_generation_uses_what_was_trained(config, capsys, change):
    _, checks, found = checks_of(capsys, config, *change)
    for name in (
        "prompt_is_prefix",
        "mask_is_completion",
        "ends_with_one_eos",
        "text_survives",
        "two_bos",
        "context",
        "learning rate",
    ):
        assert checks[name]["ok"] is True, checks[name]
    assert checks["weights"]["ok"] is True and ("adapter" if change else "weights") in checks["weights"]["detail"]
    assert [one["steps"] for one in found["learning_rates"]] == [8, 8]
    rates = found["learning_rates"][0]["rates"]
    assert rates[0] == 0.01 and rates == sorted(rates, reverse=True) and rates[-1] > 0


def test_the_rows_show_ids_pieces_and_the_mask(config, capsys):
    from transformers import AutoTokenizer

    _, _, found = checks_of(capsys, config, "--rows", 3)
    tokenizer = AutoTokenizer.from_pretrained(config.parent / "model")
    assert len(found["rows"]) == 3
    for row in found["rows"]:
        ids = [token["id"] for token in row["tokens"]]
        trained = [token["trained"] for token in row["tokens"]]
        start = trained.index(True)
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Say {row['sample_id'].split('-')[1]}"}],
            add_generation_prompt=True,
            tokenize=False,
        )
        assert tokenizer.decode(ids[:start]) == asked and all(trained[start:])
        assert "".join(token["piece"] for token in row["tokens"][:start]) == asked
    code, out, err = call(capsys, "doctor", config)
    assert "[3] " in out and "*[" in out and "round 1: at most 8 steps, learning rate 1.00e-02" in out


def test_an_engine_with_stale_weights_is_caught(config, capsys, monkeypatch):
    from iterative_sft_cli.generate import embedded

    begin = embedded.EmbeddedEngine.begin
    stale = config.parent / "model"
    monkeypatch.setattr(embedded.EmbeddedEngine, "begin", lambda self, weights: begin(self, stale))
    code, checks, _ = checks_of(capsys, config)
    assert code == 2 and checks["weights"]["ok"] is False and "does not use" in checks["weights"]["detail"]
    assert checks["weights"]["mend"]


def test_a_teacher_or_server_is_not_asked(config, capsys):
    options = ("generate.engine=openai", "generate.openai={base_url: 'http://127.0.0.1:9/v1', model: teacher}")
    _, checks, found = checks_of(capsys, config, *options)
    assert (
        checks["weights"]["ok"] is None
        and "engine openai" in checks["weights"]["detail"]
        and found["rows"][0]["tokens"]
    )


def test_what_does_not_fit_is_red_with_the_mend(config, capsys):
    code, checks, _ = checks_of(capsys, config, "generate.max_new_tokens=3", "train.max_length=5")
    assert code == 2 and checks["cut off"]["ok"] is False and "max_new_tokens" in checks["cut off"]["mend"]
    assert checks["max_length"]["ok"] is False and "raise train.max_length to" in checks["max_length"]["mend"]
    code, checks, _ = checks_of(capsys, config, "generate.max_new_tokens=250")
    assert code == 2 and checks["context"]["ok"] is False and "of 256" in checks["context"]["detail"]
    code, out, err = call(capsys, "doctor", config, "generate.max_new_tokens=3")
    assert code == 2 and "BAD cut off" in out and "mend: raise generate.max_new_tokens" in out and "1 bad" in err


def test_a_template_that_rewrites_answers_is_red(config, capsys, tmp_path):
    rewriting = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim | upper }}<|im_end|>{% endfor %}[assistant]"
    )
    (tmp_path / "t.jinja").write_text(rewriting)
    code, out, err = call(capsys, "doctor", config, f"prompts.template={tmp_path / 't.jinja'}", "--json")
    assert code == 2, err
    assert "template" in out + err


def test_a_plug_in_backend_is_looked_at_as_far_as_it_goes(tmp_path, capsys):
    path = report_runs.write_config(tmp_path)
    code, checks, found = checks_of(capsys, path, "--rows", 1)
    assert code == 0 and checks["weights"]["ok"] is None and checks["row 1-0-0"]["ok"] is True
    assert not (tmp_path / "run").exists() and len(found["rows"]) == 1


def test_a_wrong_config_is_said_before_the_model_loads(tmp_path, capsys):
    path = report_runs.write_config(tmp_path, filters=["no_such_filter"])
    code, out, err = call(capsys, "doctor", path)
    assert code == 2 and "no_such_filter" in err and out == ""
