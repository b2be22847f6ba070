"""A Modelfile for Ollama: only for architectures that it imports, and only with a template that renders as the run's own does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.config import GenerateConfig
from iterative_sft_cli.errors import DataError
from iterative_sft_cli.types import Decoding, Message

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Olmo3ForCausalLM",
    "Lfm2ForCausalLM",
)
"""Text models that `ollama create` converts from safetensors (convert/convert.go of Ollama 0.33; MistralForCausalLM and
Qwen3ForCausalLM are not among them)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A family of chat templates: how a turn is written, and the same in Ollama's language."""

    name: str
    turn: Callable[[str, str], str]
    opening: str
    go: str

    def render(self, messages: Sequence[Message]) -> str:
        """The text of messages with the opening of an answer."""
        return "".join(self.turn(str(m["role"]), str(m["content"])) for m in messages) + self.opening


SHAPES = (
    Shape(
        "chatml",
        lambda role, text: f"<|im_start|>{role}\n{text}<|im_end|>\n",
        "<|im_start|>assistant\n",
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
    ),
    Shape(
        "llama3",
        lambda role, text: f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    Shape(
        "zephyr",
        lambda role, text: f"<|{role}|>\n{text}</s>\n",
        "<|assistant|>\n",
        "{{- range .Messages }}<|{{ .Role }}|>\n{{ .Content }}</s>\n{{ end }}<|assistant|>\n",
    ),
    Shape(
        "phi3",
        lambda role, text: f"<|{role}|>\n{text}<|end|>\n",
        "<|assistant|>\n",
        "{{- range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n",
    ),
    Shape(
        "gemma",
        lambda role, text: f"<start_of_turn>{'model' if role == 'assistant' else role}\n{text}<end_of_turn>\n",
        "<start_of_turn>model\n",
        '{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}\n'
        "{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n",
    ),
)
_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is 2 + 3?"}],
    [
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And 4 + 4?"},
    ],
)


def modelfile(folder: Path, *, system: str | None, raw: bool, decoding: Decoding | GenerateConfig) -> str:
    """The Modelfile of the exported model in `folder`, with the decoding that the run evaluates with: Ollama's own defaults cut
    the distribution. Raises DataError for what Ollama cannot take."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in ARCHITECTURES:
        raise DataError(
            f"Ollama does not import {architecture}",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            hint="--to gguf, and a Modelfile with FROM ./model.gguf, for what llama.cpp converts; --to hf exports a folder",
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    template, own_system = ("{{ .Prompt }}", None) if raw else find_template(tokenizer)
    lines = ["FROM .", f"TEMPLATE {quote(template)}"]
    spoken = system or own_system
    if spoken:
        lines.append(f"SYSTEM {quote(spoken)}")
    stops = dict.fromkeys([*stop_texts(folder, tokenizer), *decoding.stop])
    lines += [f"PARAMETER stop {quote(text)}" for text in stops]
    values = {
        "temperature": decoding.temperature if decoding.do_sample else 0,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "min_p": decoding.min_p,
        "repeat_penalty": decoding.repetition_penalty,
    }
    lines += [f"PARAMETER {name} {value:g}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def find_template(tokenizer: Any) -> tuple[str, str | None]:
    """(template in Ollama's language, system message that the chat template puts in by itself). Raises DataError when none renders alike."""
    try:
        shown = [_shown(tokenizer, messages) for messages in _PROBES]
    except Exception as error:  # templates are data: they raise what they like
        raise DataError(f"the chat template cannot be rendered: {error}", hint="--to hf exports it as it is") from error
    # where the tokenizer puts a bos token in front by itself, so does Ollama, and its template must not
    bos = tokenizer.bos_token or ""
    for texts in (shown, [text.removeprefix(bos) for text in shown]):
        for shape in SHAPES:
            plain = [shape.render(messages) for messages in _PROBES]
            if texts == plain:
                return shape.go, None
            if all(text.endswith(rest) for text, rest in zip(texts, plain, strict=True)):
                system = _system_in(shape, texts[0].removesuffix(plain[0]))
                if system is not None:
                    return shape.go, system
    raise DataError(
        "no template in Ollama's language is known that renders as this model's chat template does",
        expected=f"one of the shapes {', '.join(shape.name for shape in SHAPES)}",
        hint="--to hf exports the model; write a Modelfile with a TEMPLATE of your own beside it",
    )


def _shown(tokenizer: Any, messages: Sequence[Message]) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def _system_in(shape: Shape, head: str) -> str | None:
    """The system message that a chat template writes when the conversation has none."""
    before, after = shape.turn("system", "\x00").split("\x00")
    if head.startswith(before) and head.endswith(after) and len(head) >= len(before) + len(after):
        return head[len(before) : len(head) - len(after)]
    return None


def stop_texts(folder: Path, tokenizer: Any) -> list[str]:
    """The texts of the stop tokens in generation_config.json."""
    path = folder / "generation_config.json"
    found = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else tokenizer.eos_token_id
    ids = found if isinstance(found, list) else [found]
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids if token is not None]


def quote(text: str) -> str:
    """A text in a Modelfile: in three quotes, which it must not contain. Raises DataError."""
    if '"""' in text:
        raise DataError('a text with """ cannot stand in a Modelfile')
    return f'"""{text}"""'
