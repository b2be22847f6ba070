"""Tiny models and tokenizers made in-process, so that tests need no network and no weights.

The tokenizer is byte level without merges (one id a byte, so every text survives a round trip), or with the `merges` a
test asks for. Ids 0..7 are specials and never equal each other: pad is not eos.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAD, BOS, EOS, IM_START, IM_END, UNK, THINK, END_THINK = range(8)
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|unk|>", "<think>", "</think>")
VOCAB_SIZE = 264
"""8 specials and 256 bytes; a tokenizer with merges is larger."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The common shape: a role line, the content, an end-of-turn token."""

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are tiny.<|im_end|>\n' }}{% endif %}" + CHATML
)
"""As SmolLM2's: a system prompt of its own where the conversation has none."""

TRIMMING = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + '<|eos|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""As Llama 3's: writes its own bos, trims contents, ends turns with the eos token."""

THINKING = (
    "{% for m in messages %}"
    "{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in content and not loop.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
"""As Qwen 3's and R1's: the generation prompt opens the thinking block, history loses its reasoning."""


def _byte_characters() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level tokenizers use, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    spare = 0
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + spare)
            spare += 1
    return [characters[byte] for byte in range(256)]


def tiny_tokenizer(
    chat: bool = True, *, template: str | None = None, eos: str = "<|im_end|>", merges: Sequence[tuple[str, str]] = ()
) -> Any:
    """A byte-level fast tokenizer. `chat` gives it the CHATML template (or `template`); without, `eos` is best `<|eos|>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(SPECIALS)}
    for character in _byte_characters():
        vocab[character] = len(vocab)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[:6]])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in SPECIALS[6:]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token=eos,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    if chat or template is not None:
        tokenizer.chat_template = template or CHATML
    return tokenizer


def tiny_llama(vocab: int = VOCAB_SIZE, *, seed: int = 0, tied: bool = True, **config: Any) -> Any:
    """A 2-layer Llama with grouped-query heads (about 40 thousand parameters), fp32, seeded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _seeded(LlamaForCausalLM, LlamaConfig(**{**settings, **config}), seed)


def tiny_gpt2(vocab: int = VOCAB_SIZE, *, seed: int = 0, **config: Any) -> Any:
    """A 2-layer GPT-2 (learned positions, Conv1D layers, tied embeddings), fp32, seeded, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = dict(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _seeded(GPT2LMHeadModel, GPT2Config(**{**settings, **config}), seed)


def tiny_t5(vocab: int = VOCAB_SIZE, *, seed: int = 0, **config: Any) -> Any:
    """A T5 with one layer on each side, fp32, seeded, no dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = dict(
        vocab_size=vocab,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return _seeded(T5ForConditionalGeneration, T5Config(**{**settings, **config}), seed)


def _seeded(kind: Any, config: Any, seed: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def save_tiny(
    folder: Path, *, model: Any = None, tokenizer: Any = None, chat: bool = True, dtype: str = "bfloat16"
) -> Path:
    """A Hugging Face folder with a tiny model (Llama unless given) and tokenizer, weights in `dtype`; returns `folder`."""
    import torch
    from transformers.utils import logging

    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer(chat)
    model = model if model is not None else tiny_llama(len(tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
