from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from iterative_sft_cli.encoding import IGNORE, Encoder, TokenizerEncoder
from iterative_sft_cli.encoding_thinking import Thinking
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, STOP, Sample

TEMPLATES = {
    "chatml": tiny.CHATML,
    "default_system": tiny.DEFAULT_SYSTEM,
    "trimming": tiny.TRIMMING,
    "thinking": tiny.THINKING,
    "raw": None,
}


def encoder_for(name: str, **settings: object) -> TokenizerEncoder:
    template = TEMPLATES[name]
    tokenizer = tiny.tiny_tokenizer(template is not None, template=template, eos="<|im_end|>")
    return TokenizerEncoder(tokenizer, SimpleNamespace(**settings))


def sample(encoder: TokenizerEncoder, prompt: object, ids: list[int], finish: str, **fields: object) -> Sample:
    return Sample(
        prompt_id="p",
        sample_id="p-0",
        round_index=1,
        prompt=prompt,  # type: ignore[arg-type]
        completion=encoder.decode(ids),
        prompt_ids=tuple(encoder.encode_prompt(prompt)),  # type: ignore[arg-type]
        completion_ids=tuple(ids),
        finish_reason=finish,
        **fields,  # type: ignore[arg-type]
    )


def trained(row: object) -> list[int]:
    return [label for label in row.labels if label != IGNORE]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("finish", [EOS, STOP, LENGTH])
def test_generation_prompt_is_prefix_and_mask_is_completion(name: str, finish: str) -> None:
    encoder = encoder_for(name)
    ids = encoder._encode("4 + 5 = 9") + ([encoder.end_id] if finish == EOS else [])
    row = encoder.training_row(sample(encoder, "What is 4 + 5?", ids, finish), weight=-0.5)
    prompt_ids = encoder.encode_prompt("What is 4 + 5?")
    assert list(row.input_ids[: len(prompt_ids)]) == prompt_ids
    assert list(row.labels[: len(prompt_ids)]) == [IGNORE] * len(prompt_ids)
    completion = list(row.input_ids[len(prompt_ids) :])
    assert list(row.labels[len(prompt_ids) :]) == completion
    assert completion[: len(ids)] == ids
    assert completion.count(encoder.end_id) == (0 if finish == LENGTH else 1)
    assert len(completion) == len(ids) + (1 if finish == STOP else 0)
    assert row.weight == -0.5


def test_rows_train_the_sampled_ids_and_not_their_text_tokenised_again() -> None:
    tokenizer = tiny.tiny_tokenizer(merges=[("a", "b")])
    encoder = TokenizerEncoder(tokenizer)
    apart = [tokenizer.convert_tokens_to_ids("a"), tokenizer.convert_tokens_to_ids("b"), encoder.end_id]
    assert encoder._encode("ab") != apart[:2]
    row = encoder.training_row(sample(encoder, "x", apart, EOS))
    assert trained(row) == apart


def test_any_of_the_eos_ids_counts_as_the_end_that_was_sampled() -> None:
    encoder = TokenizerEncoder(tiny.tiny_tokenizer(), eos_token_ids=(tiny.EOS,))
    assert encoder.eos_token_ids == (tiny.EOS, tiny.IM_END)
    ids = [*encoder._encode("9"), tiny.EOS]
    assert trained(encoder.training_row(sample(encoder, "x", ids, EOS))) == ids


def test_the_templates_end_of_turn_is_the_end_even_where_the_tokenizers_eos_is_another() -> None:
    encoder = TokenizerEncoder(tiny.tiny_tokenizer(eos="<|eos|>"))
    assert encoder.end_id == tiny.IM_END
    assert encoder.eos_token_ids == (tiny.EOS, tiny.IM_END)
    row = encoder.training_row(sample(encoder, "x", encoder._encode("9"), STOP))
    assert row.input_ids[-1] == tiny.IM_END


def test_text_only_engines_get_their_text_tokenised_once() -> None:
    encoder = encoder_for("chatml")
    one = dataclasses.replace(sample(encoder, "x", [], EOS), completion="9")
    assert trained(encoder.training_row(one)) == [*encoder._encode("9"), encoder.end_id]


def test_prompt_ids_are_made_where_the_sample_has_none() -> None:
    encoder = encoder_for("chatml")
    one = dataclasses.replace(sample(encoder, "x", encoder._encode("9"), STOP), prompt_ids=())
    assert list(one.prompt_ids) == []
    assert list(encoder.training_row(one).input_ids[:-2]) == encoder.encode_prompt("x")


def test_a_row_without_a_trained_token_is_an_error_that_names_it() -> None:
    encoder = encoder_for("chatml")
    with pytest.raises(ValueError, match="p-0"):
        encoder.training_row(sample(encoder, "x", [], PROMPT_TOO_LONG))
    with pytest.raises(ValueError, match="seed-3"):
        encoder.conversation_row("seed-3", [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_of_seed_data_has_the_prompt_of_generation(name: str) -> None:
    encoder = encoder_for(name)
    completion = "so\n</think>\n\n9" if name == "thinking" else "9"
    row = encoder.conversation_row("s", ("What is 4 + 5?", completion), weight=2.0)
    prompt_ids = encoder.encode_prompt("What is 4 + 5?")
    assert list(row.input_ids[: len(prompt_ids)]) == prompt_ids
    assert trained(row) == [*encoder._encode(completion), encoder.end_id]
    assert row.labels[: len(prompt_ids)] == (IGNORE,) * len(prompt_ids)
    assert row.weight == 2.0


@pytest.mark.parametrize("name", ["chatml", "default_system", "trimming"])
def test_every_assistant_turn_is_trained_and_nothing_else(name: str) -> None:
    encoder = encoder_for(name)
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "never answered"},
    ]
    row = encoder.conversation_row("s", messages)
    end = encoder.end_id
    assert trained(row) == [*encoder._encode("1"), end, *encoder._encode("2"), end]
    assert encoder.template is not None
    whole = encoder.template.render(messages[:4], generation=False)
    assert whole.startswith(encoder.decode_all(row.input_ids))
    assert list(row.input_ids) == encoder._encode(encoder.decode_all(row.input_ids))


def test_contents_are_trimmed_where_the_template_trims_them() -> None:
    encoder = encoder_for("trimming")
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": " 1\n"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
    ]
    assert encoder.decode(trained(encoder.conversation_row("s", messages))) == "12"


def test_history_that_the_template_rewrites_is_context_and_not_trained() -> None:
    encoder = encoder_for("thinking")
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "so\n</think>\n\n2"},
    ]
    row = encoder.conversation_row("s", messages)
    assert encoder.decode(trained(row)) == "so\n</think>\n\n2"
    assert "hm" not in encoder.decode_all(row.input_ids)
    start = len(row.input_ids) - len(trained(row))
    assert list(row.input_ids[:start]) == encoder.encode_prompt(messages[:3])


def test_reasoning_of_its_own_field_goes_inside_the_tags() -> None:
    encoder = encoder_for("thinking")
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "reasoning_content": "hm", "content": "1"}]
    assert encoder.decode(trained(encoder.conversation_row("s", messages))) == "hm\n</think>\n\n1"
    plain = encoder_for("chatml")
    assert plain.decode(trained(plain.conversation_row("s", messages))) == "<think>\nhm\n</think>\n\n1"


def test_an_answer_that_leaves_the_templates_thinking_open_is_refused() -> None:
    encoder = encoder_for("thinking")
    with pytest.raises(ValueError, match="seed-7.*never closes"):
        encoder.conversation_row("seed-7", ("?", "1"))
    off = encoder_for("thinking", template_kwargs={"enable_thinking": False})
    assert off.decode(trained(off.conversation_row("seed-7", ("?", "1")))) == "1"


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("thinking", "hm\n</think>\n\n9", Thinking("hm", "9", True)),
        ("thinking", "<think>\nhm</think>9", Thinking("hm", "9", True)),
        ("thinking", "hm and no end", Thinking("hm and no end", "", False)),
        ("thinking", "</think>9", Thinking("", "9", True)),
        ("chatml", "9", Thinking(None, "9", True)),
        ("chatml", " 9", Thinking(None, " 9", True)),
        ("chatml", "<think>hm</think>\n9", Thinking("hm", "9", True)),
        ("chatml", "<think>hm", Thinking("hm", "", False)),
        ("chatml", "<think>a</think>x<think>b</think>9", Thinking("a\nb", "9", True)),
        ("chatml", "<think>a</think>x<think>b", Thinking("a\nb", "", False)),
        ("raw", "", Thinking(None, "", True)),
    ],
)
def test_thinking_is_split_from_what_follows(template: str, text: str, expected: Thinking) -> None:
    encoder = encoder_for(template)
    assert encoder.split_thinking(text, encoder.encode_prompt("?")) == expected


def test_thinking_tags_can_be_others_and_stay_in_the_text_though_special() -> None:
    encoder = encoder_for("chatml", thinking_tags=["<|bos|>", "<|eos|>"])
    ids = [tiny.BOS, *encoder._encode("hm"), tiny.UNK, tiny.IM_START, *encoder._encode("9"), tiny.IM_END]
    assert encoder.decode(ids) == "<|bos|>hm9"
    assert encoder.split_thinking("<|bos|>hm<|eos|>9", encoder.encode_prompt("?")) == Thinking("hm", "9", True)


def test_a_template_that_switches_thinking_off_opens_nothing() -> None:
    encoder = encoder_for("thinking", template_kwargs={"enable_thinking": False})
    assert encoder.split_thinking("9", encoder.encode_prompt("?")) == Thinking(None, "9", True)


def test_a_text_is_one_user_message_where_there_is_a_template() -> None:
    encoder = encoder_for("chatml", system="Be brief.")
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert encoder.prompt_text("hi") == expected
    assert encoder.prompt_text([{"role": "user", "content": "hi"}]) == expected
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "hi"}]
    assert encoder.prompt_text(own) == expected.replace("Be brief.", "Mine.")


def test_messages_that_end_with_an_assistant_are_continued() -> None:
    encoder = encoder_for("chatml")
    start = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]
    assert encoder.prompt_text(start).endswith("<|im_start|>assistant\nThe answer is")


def test_messages_without_a_template_are_an_error_with_the_way_out() -> None:
    encoder = encoder_for("raw")
    with pytest.raises(ConfigError, match="no chat template.*\n?.*hint"):
        encoder.encode_prompt([{"role": "user", "content": "hi"}])
    with pytest.raises(ConfigError):
        encoder.conversation_row("s", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "1"}])


def test_raw_text_has_bos_where_the_tokenizer_writes_one_and_no_eos() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tiny_tokenizer(False, eos="<|eos|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", tiny.BOS), ("<|eos|>", tiny.EOS)]
    )
    encoder = TokenizerEncoder(tokenizer)
    assert encoder.encode_prompt("a") == [tiny.BOS, *encoder._encode("a")]
    both = TokenizerEncoder(tokenizer, is_encoder_decoder=True)
    assert both.encode_prompt("a") == [tiny.BOS, *encoder._encode("a"), tiny.EOS]
    assert list(encoder.conversation_row("s", ("a", "b")).input_ids) == [
        tiny.BOS,
        *encoder._encode("ab"),
        tiny.EOS,
    ]


def test_sentencepiece_marks_are_not_put_before_a_completion() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<u>", "<s>", "</s>", "▁", "=", "5", "a"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>", eos_token="</s>")
    encoder = TokenizerEncoder(tokenizer)
    assert encoder._encode("5") == [3, 5]
    assert encoder._encode_continuation("5") == [5]
    assert encoder._encode_continuation(" 5") == encoder._encode(" 5")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(min_size=1, max_size=40))
def test_any_text_survives_and_any_prompt_is_a_prefix(prompt: str, completion: str) -> None:
    encoder = SHARED
    ids = encoder._encode(completion)
    row = encoder.training_row(sample(encoder, prompt, ids, STOP))
    prompt_ids = encoder.encode_prompt(prompt)
    assert list(row.input_ids) == [*prompt_ids, *ids, encoder.end_id]
    if not any(token in completion for token in tiny.SPECIALS):
        assert encoder.decode(ids) == completion


SHARED = encoder_for("chatml")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_report_for_doctor_says_that_all_is_well(name: str) -> None:
    report = encoder_for(name).template_roundtrip_report()
    holds = ["prompt_is_prefix", "mask_is_completion", "ends_with_one_eos", "text_survives", "same_ids_as_whole_text"]
    assert [key for key in holds if report[key] is not True] == []
    assert report["two_bos"] is False
    assert report["opens_thinking"] is (name == "thinking")


def test_the_fingerprint_tells_settings_apart_and_nothing_else() -> None:
    def of(name: str = "chatml", **settings: object) -> str:
        return encoder_for(name, **settings).fingerprint

    assert of() == of() == of(system=None)
    different = [
        of(),
        of("trimming"),
        of("raw"),
        of(system="x"),
        of(template_kwargs={"enable_thinking": False}),
        of(few_shot=[{"prompt": "a", "completion": "b"}]),
        of(thinking_tags=["<a>", "</a>"]),
        TokenizerEncoder(tiny.tiny_tokenizer(merges=[("a", "b")])).fingerprint,
    ]
    assert len(set(different)) == len(different)


def test_an_eval_inherits_what_it_does_not_say() -> None:
    prompts = SimpleNamespace(system="Be brief.", template=None, template_kwargs={}, few_shot=None)
    section = SimpleNamespace(system=None, template=None, template_kwargs=None, few_shot=None)
    tokenizer = tiny.tiny_tokenizer()
    inherited = TokenizerEncoder(tokenizer, section, inherit=prompts)
    assert inherited.fingerprint == TokenizerEncoder(tokenizer, prompts).fingerprint
    assert inherited.fingerprint != TokenizerEncoder(tokenizer, section).fingerprint


def test_of_a_loaded_model_hands_over_eos_and_template() -> None:
    loaded = SimpleNamespace(
        tokenizer=tiny.tiny_tokenizer(eos="<|eos|>"), eos_token_ids=(2,), context_length=256, is_encoder_decoder=False
    )
    encoder = TokenizerEncoder.of(loaded, SimpleNamespace(template=tiny.CHATML))
    assert isinstance(encoder, Encoder)
    assert loaded.eos_token_ids == (tiny.EOS, tiny.IM_END)
    assert loaded.tokenizer.chat_template == tiny.CHATML
    assert encoder.context_length == 256
    TokenizerEncoder.of(loaded, SimpleNamespace(template=tiny.TRIMMING), inherit=SimpleNamespace())
    assert loaded.tokenizer.chat_template == tiny.CHATML


def test_a_tokenizer_without_any_eos_is_refused() -> None:
    tokenizer = tiny.tiny_tokenizer(False)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        TokenizerEncoder(tokenizer)


def test_encoding_imports_no_torch() -> None:
    code = (
        "import sys, iterative_sft_cli.encoding as e; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
