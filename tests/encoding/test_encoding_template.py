from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from iterative_sft_cli.encoding import TokenizerEncoder
from iterative_sft_cli.encoding_template import FROZEN_DATE, read_few_shot, resolve_template
from iterative_sft_cli.errors import ConfigError, DataError

DATED = (
    "{% set today = strftime_now('%Y-%m-%d') %}{{ 'It is ' + today + ' or ' + strftime_now(\"%d %b %Y\") + '. ' }}"
    + tiny.CHATML
)


def test_none_as_a_word_is_raw_text_and_null_is_the_tokenizers_own() -> None:
    tokenizer = tiny.tiny_tokenizer()
    assert resolve_template(tokenizer, "none", {}, Path(".")) is None
    own = resolve_template(tokenizer, None, {}, Path("."))
    assert own is not None and own.text == tiny.CHATML
    assert resolve_template(tiny.tiny_tokenizer(False), None, {}, Path(".")) is None


def test_a_template_is_a_file_beside_the_config_an_inline_text_or_a_name(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    (tmp_path / "chat.jinja").write_text(tiny.TRIMMING)
    for setting in ("chat.jinja", tiny.TRIMMING):
        found = resolve_template(tokenizer, setting, {}, tmp_path)
        assert found is not None and found.text == tiny.TRIMMING
    tokenizer.chat_template = {"default": tiny.CHATML, "other": tiny.TRIMMING}
    found = resolve_template(tokenizer, "other", {}, tmp_path)
    assert found is not None and found.text == tiny.TRIMMING
    with pytest.raises(ConfigError, match="did you mean other"):
        resolve_template(tokenizer, "othr", {}, tmp_path)


@pytest.mark.parametrize(
    ("template", "end", "text"),
    [
        (tiny.CHATML, tiny.IM_END, "<|im_end|>"),
        (tiny.TRIMMING, tiny.EOS, "<|eos|>"),
        ("{% for m in messages %}{{ m['content'] + ' <|eos|>' }}{% endfor %}", tiny.EOS, " <|eos|>"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", None, ""),
    ],
)
def test_the_end_of_turn_is_found(template: str, end: int | None, text: str) -> None:
    found = resolve_template(tiny.tiny_tokenizer(), template, {}, Path("."))
    assert found is not None
    assert (found.end_of_turn_id, found.end_of_turn_text) == (end, text)


def test_a_template_with_a_plain_text_end_of_turn_ends_with_the_tokenizers_eos() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = tiny.tiny_tokenizer(template=template, eos="<|eos|>")
    encoder = TokenizerEncoder(tokenizer)
    row = encoder.conversation_row(
        "s",
        [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "??"},
            {"role": "assistant", "content": "2"},
        ],
    )
    assert encoder.decode_all(row.input_ids) == "user: ?\nassistant: 1<|eos|>\nuser: ??\nassistant: 2<|eos|>"
    assert encoder.decode_all([t for t in row.labels if t != -100]) == "1<|eos|>2<|eos|>"


def test_the_date_never_changes() -> None:
    found = resolve_template(tiny.tiny_tokenizer(), DATED, {}, Path("."))
    assert found is not None and found.reads_clock
    text = found.render([{"role": "user", "content": "?"}], generation=True)
    assert text.startswith(f"It is {FROZEN_DATE:%Y-%m-%d} or {FROZEN_DATE:%d %b %Y}. <|im_start|>user")


def test_a_template_that_fails_is_named() -> None:
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + tiny.CHATML
    )
    encoder = TokenizerEncoder(tiny.tiny_tokenizer(template=refusing), SimpleNamespace(system="x"))
    with pytest.raises(ConfigError, match="no system here"):
        encoder.encode_prompt("hi")
    with pytest.raises(ConfigError, match="cannot render"):
        TokenizerEncoder(tiny.tiny_tokenizer(template="{% for %}"))
    with pytest.raises(ConfigError, match="does not show what the assistant says"):
        TokenizerEncoder(tiny.tiny_tokenizer(template="{{ 'fixed' }}"))


def test_few_shot_examples_are_turns_or_text(tmp_path: Path) -> None:
    pairs = [{"prompt": "1 + 1?", "completion": "2"}]
    chat = TokenizerEncoder(tiny.tiny_tokenizer(), SimpleNamespace(few_shot=pairs))
    assert chat.prompt_text("2 + 2?") == (
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    raw = TokenizerEncoder(tiny.tiny_tokenizer(False), SimpleNamespace(few_shot=pairs, system="Add."))
    assert raw.prompt_text("2 + 2?") == "Add.\n\n1 + 1?\n2\n\n2 + 2?"
    spaced = TokenizerEncoder(
        tiny.tiny_tokenizer(False), SimpleNamespace(few_shot=[{"prompt": "Q: 1 + 1? A:", "completion": " 2"}])
    )
    assert spaced.prompt_text("Q: 2 + 2? A:") == "Q: 1 + 1? A: 2\n\nQ: 2 + 2? A:"
    (tmp_path / "shots.txt").write_text("Q: 1 + 1? A: 2\n")
    text = SimpleNamespace(few_shot="shots.txt")
    assert TokenizerEncoder(tiny.tiny_tokenizer(False), text, tmp_path).prompt_text("Q:") == "Q: 1 + 1? A: 2\nQ:"
    shown = TokenizerEncoder(tiny.tiny_tokenizer(), text, tmp_path).prompt_text("Q:")
    assert shown.startswith("<|im_start|>user\nQ: 1 + 1? A: 2\nQ:<|im_end|>")


def test_few_shot_turns_are_context_and_not_trained() -> None:
    encoder = TokenizerEncoder(tiny.tiny_tokenizer(), SimpleNamespace(few_shot=[{"prompt": "a", "answer": "bbb"}]))
    pair = encoder.conversation_row("s", ("q", "z"))
    messages = encoder.conversation_row("s", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "z"}])
    assert pair == messages
    assert encoder.decode([t for t in pair.labels if t != -100]) == "z"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "answer": "d"}\n'),
        ("a.json", '[{"prompt": "a", "completion": "b"}, {"prompt": "c", "answer": "d"}]'),
        ("a.yaml", "- {prompt: a, completion: b}\n- {prompt: c, answer: d}\n"),
    ],
)
def test_few_shot_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_few_shot(name, tmp_path) == ("", [("a", "b"), ("c", "d")])


def test_few_shot_that_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_few_shot("none.jsonl", tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_few_shot("a.json", tmp_path)
    with pytest.raises(ConfigError, match=r"few_shot\[1\]"):
        read_few_shot([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], tmp_path)
