"""Text to token ids, loss masks and back: the only writer of token sequences, without torch.

The guarantee: the ids a completion was generated after are exactly the first ids of its training row, and the loss mask
covers exactly the completion and one end-of-sequence token. Nothing that was sampled is ever tokenised again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from iterative_sft_cli.encoding_template import ChatTemplate, read_few_shot, resolve_template
from iterative_sft_cli.encoding_thinking import Thinking, ThinkingTags
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, Message, Sample, TrainRow

IGNORE = -100
"""The label of a token that is not trained (PyTorch's cross-entropy)."""
UNBOUNDED = 1 << 20
"""`context_length` of a model that states none (relative positions)."""
_PROBES = ("What is 12 + 345?\n\n  A: x == 0.5", "naïve café, 数学 \U0001f600\t#include <a.h>")


Conversation = list[Message] | tuple[str | list[Message], str]
"""Messages, or a pair of a prompt and its completion."""


@runtime_checkable
class Encoder(Protocol):
    """What the loop needs to turn prompts into token ids and samples into training rows."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocab_size: int
    context_length: int
    fingerprint: str

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """The token ids a completion of `prompt` is generated after."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""

    def split_thinking(self, text: str, prompt_ids: Sequence[int]) -> Thinking:
        """Thinking and final part of a completion whose prompt had the ids `prompt_ids`."""

    def training_row(self, sample: Sample, weight: float = 1.0) -> TrainRow:
        """The row a sample is trained as. Raises ValueError when no token of it would be trained."""

    def conversation_row(self, sample_id: str, messages: Conversation, weight: float = 1.0) -> TrainRow:
        """The row of seed data, given as messages or as a pair (prompt, completion). Raises ValueError as above."""


class TokenizerEncoder:
    """An `Encoder` over a Hugging Face tokenizer.

    `section` is the config's `prompts` (or `eval`): its `system`, `few_shot`, `template`, `template_kwargs` and
    `thinking_tags` are applied to every prompt, None being replaced by what `inherit` says (the `prompts` of an `eval`);
    files are relative to `base_dir`. A prompt string is one user message where there is a template, raw text otherwise.
    """

    def __init__(
        self,
        tokenizer: Any,
        section: Any = None,
        base_dir: Path = Path("."),
        *,
        inherit: Any = None,
        eos_token_ids: Sequence[int] = (),
        context_length: int | None = None,
        is_encoder_decoder: bool = False,
    ) -> None:
        """Raises ConfigError for a template that is not there or does not render, and when no EOS token is known."""

        def setting(name: str) -> Any:
            value = getattr(section, name, None)
            return getattr(inherit, name, None) if value is None else value

        self.tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.system: str | None = setting("system")
        self.template: ChatTemplate | None = resolve_template(
            tokenizer, setting("template"), setting("template_kwargs"), base_dir
        )
        self.few_shot_text, self.few_shot = read_few_shot(setting("few_shot"), base_dir)
        self.tags = ThinkingTags(*(setting("thinking_tags") or ()))
        end_of_turn = self.template.end_of_turn_id if self.template else None
        found = [end_of_turn, tokenizer.eos_token_id, *eos_token_ids]
        ids = [token for token in dict.fromkeys(found) if token is not None]
        if not ids:
            raise ConfigError(
                "neither the tokenizer nor the model's generation_config names an end-of-sequence token",
                where="model",
                hint="set eos_token in tokenizer_config.json; without one no completion can finish",
            )
        self.end_id: int = ids[0]
        self.eos_token_ids: tuple[int, ...] = tuple(sorted(ids))
        self.pad_token_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        self.vocab_size: int = len(tokenizer)
        stated = tokenizer.model_max_length
        self.context_length: int = context_length or (stated if stated < UNBOUNDED else UNBOUNDED)
        self._hidden = set(tokenizer.all_special_ids) - {
            tokenizer.convert_tokens_to_ids(tag) for tag in (self.tags.open, self.tags.close)
        }
        self._hidden |= set(self.eos_token_ids)
        self.fingerprint: str = self._fingerprint()

    @classmethod
    def of(
        cls, loaded: Any, section: Any = None, base_dir: Path = Path("."), *, inherit: Any = None
    ) -> TokenizerEncoder:
        """The encoder of a `LoadedModel`, whose EOS ids and context it knows.

        Without `inherit` the model takes over what is trained: it is saved as stopping at the encoder's EOS ids, and with
        the template that the config names.
        """
        encoder = cls(
            loaded.tokenizer,
            section,
            base_dir,
            inherit=inherit,
            eos_token_ids=loaded.eos_token_ids,
            context_length=loaded.context_length,
            is_encoder_decoder=loaded.is_encoder_decoder,
        )
        if inherit is None:
            loaded.eos_token_ids = encoder.eos_token_ids
            if encoder.template is not None and getattr(section, "template", None) is not None:
                loaded.tokenizer.chat_template = encoder.template.text
        return encoder

    # -- prompts ---------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of `prompt` with system prompt, few-shot examples and generation prompt.

        Messages that end with an assistant's turn are continued. Raises ConfigError for messages without a template.
        """
        if self.template is None:
            return self._encode_start(self.prompt_text(prompt))
        return self._encode(self.prompt_text(prompt))

    def prompt_text(self, prompt: str | Sequence[Message]) -> str:
        """The text that `encode_prompt` tokenises."""
        if self.template is None:
            return self._raw_text(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if messages and messages[-1].get("role") == "assistant":
            start = self.template.render(self._conversation(messages[:-1]), generation=True)
            return start + str(messages[-1]["content"])
        return self.template.render(self._conversation(messages), generation=True)

    def messages(self, prompt: str | Sequence[Message]) -> list[Message]:
        """The conversation that `encode_prompt` writes down, for servers that apply a chat template of their own."""
        if self.template is None:
            return [{"role": "user", "content": self._raw_text(prompt)}]
        return self._conversation([{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt))

    def _raw_text(self, prompt: str | Sequence[Message]) -> str:
        if not isinstance(prompt, str):
            raise ConfigError(
                "the prompt is a list of chat messages, but there is no chat template to write them with",
                where="prompts",
                expected="a text prompt",
                hint="use an instruct model, or set prompts.template to a Jinja file",
            )
        prompt = self.few_shot_text + prompt
        blocks = [self.system] if self.system else []
        blocks += [question + seam(question, answer) + answer for question, answer in self.few_shot]
        return "\n\n".join([*blocks, prompt])

    def _conversation(self, messages: Sequence[Message]) -> list[Message]:
        """`messages` behind the system prompt (their own, if they have one) and the few-shot examples."""
        own = list(messages)
        head: list[Message] = []
        if own and own[0].get("role") == "system":
            head = [own.pop(0)]
        elif self.system:
            head = [{"role": "system", "content": self.system}]
        if self.few_shot_text and own:
            own[0] = {**own[0], "content": self.few_shot_text + str(own[0].get("content", ""))}
        for question, answer in self.few_shot:
            head += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return head + own

    # -- ids and text ----------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_start(self, text: str) -> list[int]:
        """Raw text at the start of a sequence: with bos where the model has one, without an eos behind a decoder's prompt."""
        ids = list(self.tokenizer(text)["input_ids"])
        while not self.is_encoder_decoder and ids and ids[-1] in self.eos_token_ids and len(ids) > 1:
            ids.pop()
        return ids

    def _encode_continuation(self, text: str) -> list[int]:
        """Ids of `text` behind other text: SentencePiece's leading space mark is not added."""
        ids = self._encode(text)
        if not ids or text.startswith((" ", "▁")):
            return ids
        if not str(self.tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁"):
            return ids
        anchor = self._encode("=")
        both = self._encode("=" + text)
        return both[len(anchor) :] if both[: len(anchor)] == anchor else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; thinking tags stay even where they are special."""
        shown = [token for token in ids if token not in self._hidden]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of `ids` with special tokens, for display."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def prompt_opens_thinking(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the prompt ends inside a thinking block that the template opened."""
        return self.tags.opened_by(self.decode_all(prompt_ids[-16:]))

    def split_thinking(self, text: str, prompt_ids: Sequence[int]) -> Thinking:
        """What stands inside the thinking blocks and what follows the last of them.

        `prompt_ids` tell whether the template had opened the first block already.
        """
        return self.tags.split(text, inside=self.prompt_opens_thinking(prompt_ids))

    # -- training rows ---------------------------------------------------------------------------------------------

    def training_row(self, sample: Sample, weight: float = 1.0) -> TrainRow:
        """Prompt ids (not trained), completion ids as they were sampled, and one EOS unless the sample was cut off.

        Raises ValueError when nothing would be trained.
        """
        completion = list(sample.completion_ids)
        if not completion and sample.completion:  # engines that return text only
            completion = self._encode_continuation(sample.completion)
        cut_off = sample.finish_reason in (LENGTH, PROMPT_TOO_LONG)
        if not cut_off and not (sample.finish_reason == EOS and completion and completion[-1] in self.eos_token_ids):
            completion.append(self.end_id)
        prompt = list(sample.prompt_ids) or self.encode_prompt(sample.prompt)
        return self._row(sample.sample_id, [(prompt, False), (completion, True)], weight)

    def conversation_row(self, sample_id: str, messages: Conversation, weight: float = 1.0) -> TrainRow:
        """Seed data: every assistant turn of a list of messages, or the completion of a pair (prompt, completion).

        The mask is built turn by turn from ids that are known. Where the template rewrites earlier turns (drops their
        reasoning), only the turns behind the last rewriting are trained. Raises ValueError when no token would be trained
        or a turn leaves the thinking block open that the template opened.
        """
        if not isinstance(messages, tuple):
            if self.template is None:
                self._raw_text(messages)
            return self._row(sample_id, self._turns(sample_id, messages), weight)
        prompt, completion = messages
        if self.template is not None:
            answer = {"role": "assistant", "content": completion}
            completion = self.tags.turn(sample_id, answer, self.prompt_text(prompt))
        answer_ids = self._encode_continuation(completion) + [self.end_id]
        return self._row(sample_id, [(self.encode_prompt(prompt), False), (answer_ids, True)], weight)

    def _turns(self, sample_id: str, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
        """Pieces (ids, trained) of a conversation."""
        assert self.template is not None
        conversation = self._conversation(messages)
        first_own = len(conversation) - len(messages) + (1 if messages[0].get("role") == "system" else 0)
        pieces: list[tuple[list[int], bool]] = []
        written = ""
        for index, message in enumerate(conversation):
            if message.get("role") != "assistant":
                continue
            prefix = self.template.render(conversation[:index], generation=True)
            if not prefix.startswith(written):
                pieces, written = [], ""
            pieces.append((self._encode(prefix[len(written) :]), False))
            content = self.tags.turn(sample_id, message, prefix)
            shown = self.template.render(conversation[: index + 1], generation=False)
            if not shown.startswith(prefix + content) and shown.startswith(prefix + content.strip()):
                content = content.strip()
            pieces.append((self._encode_continuation(content) + [self.end_id], index >= first_own))
            written = prefix + content + self.template.end_of_turn_text
        return pieces

    def _row(self, sample_id: str, pieces: Sequence[tuple[list[int], bool]], weight: float) -> TrainRow:
        input_ids = tuple(token for ids, _ in pieces for token in ids)
        labels = tuple(token if trained else IGNORE for ids, trained in pieces for token in ids)
        if all(label == IGNORE for label in labels):
            raise ValueError(f"{sample_id}: no token of this row would be trained")
        return TrainRow(sample_id, input_ids, labels, weight)

    # -- what was set ----------------------------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        """sha256 over everything that decides token ids; the same over library versions."""
        settings: dict[str, Any] = {
            "vocabulary": hashlib.sha256(
                "\n".join(f"{i} {t}" for t, i in sorted(self.tokenizer.get_vocab().items())).encode("utf-8", "replace")
            ).hexdigest(),
            "probes": [self._encode_start(probe) for probe in _PROBES],
            "template": self.template.text if self.template else None,
            "template_kwargs": dict(self.template.kwargs) if self.template else {},
            "system": self.system,
            "few_shot": [self.few_shot_text, self.few_shot],
            "eos_token_ids": self.eos_token_ids,
            "thinking": [self.tags.open, self.tags.close],
        }
        try:
            text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
        except TypeError as error:
            raise ConfigError(f"not plain data: {error}", where="prompts.template_kwargs") from error
        return hashlib.sha256(text.encode()).hexdigest()

    def template_roundtrip_report(
        self, prompt: str = "What is 12 + 30?", completion: str = "12 + 30 = 42"
    ) -> dict[str, Any]:
        """For `isft doctor`: what one question and answer become, and whether the guarantees hold for it. JSON-able."""
        prompt_ids = self.encode_prompt(prompt)
        opens = self.prompt_opens_thinking(prompt_ids)
        answer = f"Add.\n{self.tags.close}\n\n{completion}" if opens else completion
        row = self.conversation_row("probe", (prompt, answer))
        trained = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE]
        start = len(row.input_ids) - len(trained)
        whole = self._encode(self.prompt_text(prompt) + answer)
        body = trained[:-1]
        return {
            "template": None if self.template is None else self.template.where,
            "prompt_text": self.decode_all(prompt_ids),
            "prompt_ids": prompt_ids,
            "completion_text": self.decode_all(trained),
            "completion_ids": trained,
            "labels": list(row.labels),
            "eos_token_ids": list(self.eos_token_ids),
            "eos_tokens": [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.eos_token_ids],
            "end_token": str(self.tokenizer.convert_ids_to_tokens(self.end_id)),
            "pad_is_eos": self.pad_token_id in self.eos_token_ids,
            "prompt_is_prefix": list(row.input_ids[:start]) == prompt_ids,
            "mask_is_completion": all(label == IGNORE for label in row.labels[:start]),
            "ends_with_one_eos": trained[-1] in self.eos_token_ids and not set(body) & set(self.eos_token_ids),
            "text_survives": self.decode(trained) == answer,
            "same_ids_as_whole_text": whole == [*self._encode(self.prompt_text(prompt)), *body],
            "two_bos": len(prompt_ids) > 1 and prompt_ids[0] == prompt_ids[1] == self.tokenizer.bos_token_id,
            "opens_thinking": opens,
            "reads_clock": bool(self.template and self.template.reads_clock),
            "fingerprint": self.fingerprint,
        }


def seam(question: str, answer: str) -> str:
    """A line break between a raw few-shot question and its answer, unless the user wrote white space there."""
    return "" if not question or question[-1].isspace() or answer[:1].isspace() else "\n"
