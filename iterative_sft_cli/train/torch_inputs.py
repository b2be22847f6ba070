"""What a caller hands to `step()`, checked element by element and turned into rows.

Guarantee: nothing is dropped, shortened or guessed in silence; a mistake raises ValueError or TypeError that names the
argument, the index and the value. The caller's tokenizer is never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iterative_sft_cli.encoding import IGNORE
from iterative_sft_cli.types import TrainRow


class InputReader:
    """Turns lists of tensors, texts or conversations into rows for one model."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        is_encoder_decoder: bool,
        vocab_size: int,
        max_length: int | None,
        truncation_mode: str,
        append_eos: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.truncation_mode = truncation_mode
        self.append_eos = append_eos
        self._encoder: Any = None

    # --- public -----------------------------------------------------------------------------------------------------------

    def rows(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        texts: Any = None,
        texts_labels: Any = None,
    ) -> list[TrainRow]:
        """Rows named by their index. Exactly one of `input_ids` and `texts` is given."""
        if (input_ids is None) == (texts is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"step() takes either input_ids or texts, got {got}")
        if texts is not None:
            if attention_mask is not None or labels is not None:
                raise ValueError("texts go with texts_labels; attention_mask and labels go with input_ids")
            pairs = self._from_texts(texts, texts_labels)
        else:
            if texts_labels is not None:
                raise ValueError("input_ids go with labels; texts_labels go with texts")
            pairs = self._from_tensors(input_ids, attention_mask, labels)
        rows = []
        for index, (ids, targets) in enumerate(pairs):
            ids, targets = self._cut(ids, targets)
            self._check(index, ids, targets)
            rows.append(TrainRow(str(index), tuple(ids), tuple(targets)))
        return rows

    # --- tensors ----------------------------------------------------------------------------------------------------------

    def _from_tensors(self, input_ids: Any, attention_mask: Any, labels: Any) -> list[tuple[list[int], list[int]]]:
        ids = self._integers("input_ids", input_ids)
        masks = None if attention_mask is None else self._integers("attention_mask", attention_mask)
        targets = None if labels is None else self._integers("labels", labels)
        if targets is None and self.is_encoder_decoder and ids:
            raise ValueError("an encoder-decoder model needs labels (or texts_labels with texts)")
        _same_length(input_ids=ids, attention_mask=masks, labels=targets)
        pairs = []
        for index, row in enumerate(ids):
            mask = [1] * len(row) if masks is None else masks[index]
            if len(mask) != len(row):
                raise ValueError(f"attention_mask[{index}] has {len(mask)} entries, input_ids[{index}] has {len(row)}")
            odd = next((value for value in mask if value not in (0, 1)), None)
            if odd is not None:
                raise ValueError(f"attention_mask[{index}] holds {odd}, expected 0 or 1")
            wanted = row if targets is None else targets[index]
            if not self.is_encoder_decoder and len(wanted) != len(row):
                raise ValueError(f"labels[{index}] has {len(wanted)} entries, input_ids[{index}] has {len(row)}")
            kept = [place for place, value in enumerate(mask) if value]
            if kept and kept[-1] - kept[0] + 1 != len(kept):
                raise ValueError(f"attention_mask[{index}] has a gap; only padding at the ends can be masked")
            if not self.is_encoder_decoder:
                wanted = [wanted[place] for place in kept]
            pairs.append(([row[place] for place in kept], list(wanted)))
        return pairs

    def _integers(self, name: str, values: Any) -> list[list[int]]:
        if isinstance(values, Tensor):
            if values.dim() != 2:
                raise ValueError(f"{name} as one tensor must have two dimensions, got {tuple(values.shape)}")
            values = list(values)
        if isinstance(values, str | bytes) or not isinstance(values, Sequence) and not hasattr(values, "__getitem__"):
            raise TypeError(f"{name} must be a list of 1-D tensors of integers, got {type(values).__name__}")
        found = []
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                if value.dim() != 1:
                    raise ValueError(f"{name}[{index}] must have one dimension, got {tuple(value.shape)}")
                if value.is_floating_point() or value.is_complex():
                    raise TypeError(f"{name}[{index}] must hold integers, got {value.dtype}")
                found.append([int(number) for number in value.tolist()])
            elif isinstance(value, list | tuple) and all(type(number) is int for number in value):
                found.append(list(value))
            else:
                raise TypeError(f"{name}[{index}] must be a 1-D tensor of integers, got {_kind(value)}")
        return found

    # --- texts ------------------------------------------------------------------------------------------------------------

    def _from_texts(self, texts: Any, texts_labels: Any) -> list[tuple[list[int], list[int]]]:
        if self.tokenizer is None:
            raise ValueError("texts need a tokenizer: pass processing_class to the trainer")
        items = self._listed("texts", texts)
        targets = None if texts_labels is None else self._listed("texts_labels", texts_labels)
        if targets is None and self.is_encoder_decoder and items:
            raise ValueError("an encoder-decoder model needs texts_labels")
        _same_length(texts=items, texts_labels=targets)
        pairs = []
        for index, item in enumerate(items):
            target = None if targets is None else targets[index]
            if targets is not None and not isinstance(target, str):
                raise TypeError(f"texts_labels[{index}] must be a string, got {_kind(target)}")
            if isinstance(item, str):
                pairs.append(self._from_text(index, item, target))
            elif isinstance(item, list | tuple) and item and all(isinstance(turn, dict) for turn in item):
                pairs.append(self._from_messages(index, list(item), target))
            else:
                raise TypeError(f"texts[{index}] must be a string or a list of chat messages, got {_kind(item)}")
        return pairs

    def _listed(self, name: str, values: Any) -> list[Any]:
        if isinstance(values, str | bytes | dict) or not hasattr(values, "__iter__"):
            raise TypeError(f"{name} must be a list of strings, got {type(values).__name__}")
        return list(values)

    def _from_text(self, index: int, text: str, target: str | None) -> tuple[list[int], list[int]]:
        if self.is_encoder_decoder:
            return self._ids(text), self._ids("" if target is None else target, as_target=True)
        if target is None or target == text:
            ids = self._ids(text)
            return ids, list(ids)
        if not text.endswith(target):
            raise ValueError(
                f"texts_labels[{index}] {target[:40]!r} is not the end of texts[{index}]: a causal model learns the last part "
                "of a text, so give the whole text and the part of it to learn"
            )
        start = len(text) - len(target)
        if not getattr(self.tokenizer, "is_fast", False):
            head = self._ids(text[:start], end=False)
            tail = self._end(list(self.tokenizer(target, add_special_tokens=False)["input_ids"]))
            return head + tail, [IGNORE] * len(head) + tail
        encoded = self.tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        spans = list(encoded["offset_mapping"])
        learnt = next((place for place, span in enumerate(spans) if span[1] > start), len(spans))
        ids = self._end(list(encoded["input_ids"]))
        return ids, [IGNORE] * learnt + ids[learnt:]

    def _ids(self, text: str, *, end: bool = True, as_target: bool = False) -> list[int]:
        if as_target:
            ids = self.tokenizer(text_target=text, truncation=False, verbose=False)["input_ids"]
        else:
            ids = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return self._end(list(ids)) if end else list(ids)

    def _end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        if self.append_eos and end is not None and (not ids or ids[-1] != end):
            ids.append(int(end))
        return ids

    def _from_messages(self, index: int, messages: list[Any], target: str | None) -> tuple[list[int], list[int]]:
        from iterative_sft_cli.encoding import TokenizerEncoder

        if self.is_encoder_decoder:
            raise ValueError(f"texts[{index}] is a conversation; encoder-decoder models take texts")
        if self._encoder is None:
            self._encoder = TokenizerEncoder(self.tokenizer, None, Path("."))
        if target is None:
            row = self._encoder.conversation_row(f"texts[{index}]", messages)
        else:
            row = self._encoder.conversation_row(f"texts[{index}]", (messages, target))
        return list(row.input_ids), list(row.labels)

    # --- both -------------------------------------------------------------------------------------------------------------

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        limit = self.max_length
        if limit is None:
            return ids, labels
        if self.truncation_mode == "keep_start":
            return ids[:limit], labels[:limit]
        return ids[-limit:], labels[-limit:]

    def _check(self, index: int, ids: list[int], labels: list[int]) -> None:
        if not ids:
            raise ValueError(f"element {index} has no token")
        for name, values in (("input_ids", ids), ("labels", labels)):
            for token in values:
                if not 0 <= token < self.vocab_size and not (name == "labels" and token == IGNORE):
                    raise ValueError(
                        f"{name}[{index}] holds token id {token}, outside the model's embedding of {self.vocab_size} rows"
                    )
        learnt = labels if self.is_encoder_decoder else labels[1:]
        if all(label == IGNORE for label in learnt):
            cut = " (after truncation to max_length)" if self.max_length is not None else ""
            only = "; the first token of a sequence cannot be predicted" if len(labels) and labels[0] != IGNORE else ""
            raise ValueError(f"element {index} has no trained token: all its labels are -100{cut}{only}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _same_length(**lists: Sequence[Any] | None) -> None:
    lengths = {name: len(values) for name, values in lists.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "lists of different length: " + ", ".join(f"{name} {count}" for name, count in lengths.items())
        )


def fingerprint(rows: Sequence[TrainRow]) -> list[int]:
    """Four 62-bit integers that differ when the rows do."""
    import hashlib

    digest = hashlib.sha256()
    for row in rows:
        for values in (row.input_ids, row.labels):
            digest.update(torch.tensor(values, dtype=torch.int64).numpy().tobytes())
            digest.update(b"|")
    raw = digest.digest()
    return [int.from_bytes(raw[place : place + 8], "big") >> 2 for place in range(0, 32, 8)]
