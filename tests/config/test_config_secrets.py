from __future__ import annotations

from pathlib import Path

import pytest
from config_files import SHORT, load, problems, write

from iterative_sft_cli.config import InvalidConfig, load_config
from iterative_sft_cli.config.secrets import find_in_text, find_in_tree, redact

# put together here, so that no scanner of repositories takes this file for a leak
TOKENS = {
    "hugging face": "hf" + "_" + "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh",
    "openai": "sk" + "-" + "T3BlbkFJ0123456789abcdefGHIJKL",
    "openai project": "sk" + "-proj-" + "Ab12Cd34Ef56Gh78Ij90Kl12Mn34Op56",
    "anthropic": "sk" + "-ant-api03-" + "Ab12Cd34Ef56Gh78Ij90Kl12Mn34Op56-xyz",
    "openrouter": "sk" + "-or-v1-" + "0123456789abcdef" * 4,
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "aws session": "ASIA" + "IOSFODNN7EXAMPLE",
    "github": "ghp" + "_" + "0123456789abcdefghijABCDEFGHIJ012345",
    "github server": "ghs" + "_" + "0123456789abcdefghijABCDEFGHIJ012345",
    "github fine-grained": "github" + "_pat_" + "11ABCDEFG0123456789_abcdefghijklmnop",
    "gitlab": "glpat" + "-" + "0123456789abcdefghij",
    "slack": "xoxb" + "-1234567890-abcdefghij",
    "google": "AIza" + "SyA0123456789abcdefghijklmnopqrstuv",
    "nvidia": "nvapi" + "-" + "Ab12" * 12,
    "groq": "gsk" + "_" + "Ab12" * 13,
    "jwt": "ey" + "JhbGciOiJIUzI1NiJ9.ey" + "JzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "pem": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "pem of pkcs8": "-----BEGIN " + "PRIVATE KEY-----",
    "password in an address": "https://user:" + "s3cret@example.com/x",
    "password in a database address": "postgres://me:" + "pw@db:5432/x",
    "token in an address": "https://" + "0123456789abcdef01234567" + "@example.com/x.git",
}
BENIGN = [
    "use_cls_token",
    "hf_transformer_backend_for_generation_x",
    "hf-internal-testing/tiny-random-LlamaForCausalLM",
    "sk-learn-contrib/a-very-long-name-of-a-model-repository",
    "org/sk-bert-base-uncased-finetuned-squad-v2",
    "task-mathematical-reasoning-with-many-words-2024",
    "risk-0123456789abcdefghijklmnop",
    "AKIA",
    "ghp_",
    "0123456789abcdef0123456789abcdef01234567",
    "https://example.com/a@b",
    "https://example.com:8000/v1",
    "http://localhost:8000/v1",
    "s3://bucket/key",
    "git@github.com:org/name.git",
    "ssh://git@github.com/org/name",
    "mail me at someone@example.com",
    "What is {a} : {b} @ {c}?",
    "-----BEGIN CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----",
    "#### (.+)",
    "<|im_start|>assistant",
    "eyJ",
    "xoxo-love-and-kisses",
    "max_new_tokens",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "tokenizer_config.json",
    "d41d8cd98f00b204e9800998ecf8427e",
    "3f786850e387550fdab836ed7e6dc881de23001b",
    "model-00001-of-00002.safetensors",
]


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("place", ["value", "comment", "key", "override", "wrong value", "unknown key", "expression"])
def test_a_secret_is_refused_and_never_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    token, overrides, text = TOKENS[name], [], SHORT
    if place == "value":
        text += f"guards: {{stop_if: '{token}'}}\n"
    elif place == "comment":
        text += f"# export TOKEN='{token}'\n"
    elif place == "key":
        text += f"guards: {{'{token}': 1}}\n"
    elif place == "override":
        overrides = [f"prompts.system={token}"]
    elif place == "wrong value":
        overrides = [f"generate.temperature={token}"]
    elif place == "unknown key":
        overrides = [f"generate.api_key={token}"]
    else:
        overrides = [f"train.weight_by={token}"]
    path = write(tmp_path, text)
    with pytest.raises(InvalidConfig) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    said = f"{caught.value} {caught.value.problems} {[problem.to_tree() for problem in caught.value.details]}"
    assert "this looks like" in said or "looks like" in said
    assert token not in said
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_the_place_of_a_secret_is_told(tmp_path: Path) -> None:
    text = SHORT + f"# note\n# {TOKENS['hugging face']}\n"
    assert problems(tmp_path, text=text) == [
        "config.yaml:14:3: this looks like a Hugging Face token, expected no secret in a config: name an environment variable instead."
    ]


def test_bare_keys_are_told_by_the_name_they_stand_under(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    for path in (
        "filters[0].args.api_key",
        "filters[0].args.wandb_token",
        "generate.args.password",
        "generate.args.HF_TOKEN",
    ):
        said = problems(tmp_path, f"{path}={key}")
        assert any(f"{path}: this looks like a key or token" in text for text in said), said
        assert key not in "".join(said)
    assert load(tmp_path, f"model.revision={key}").config.model.revision == key
    assert load(tmp_path, f"filters[0].args.commit={key}").config.filters[0].args["commit"] == key


@pytest.mark.parametrize("text", BENIGN)
def test_what_only_looks_a_little_like_one_is_let_through(tmp_path: Path, text: str) -> None:
    assert list(find_in_text(text)) == []
    assert redact(text) == text
    assert (
        load(
            tmp_path, f"prompts.system={text!r}" if "'" not in text else f'prompts.system="{text}"'
        ).config.prompts.system
        == text
    )


def test_benign_values_under_secret_names_are_let_through() -> None:
    tree = {
        "api_key_env": "OPENAI_API_KEY",
        "token": "<eos>",
        "pad_token": "[PAD]",
        "key": "answer",
        "keys": ["a", "b"],
        "password": "",
    }
    assert list(find_in_tree(tree)) == []
    assert (
        list(find_in_tree({"stop_token": "<|endoftext|>", "sort_key": "level_of_difficulty_and_length_of_text"})) == []
    )


def test_a_secret_in_a_file_that_is_no_yaml_is_not_repeated_either(tmp_path: Path) -> None:
    said = problems(tmp_path, text=f"a: [{TOKENS['github']}\nb: {TOKENS['openai']}: x\n")
    assert any("looks like" in text for text in said)
    assert not any(token in "".join(said) for token in TOKENS.values())
