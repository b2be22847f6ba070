"""Decoding through a model's own Hugging Face forward, with a cache and an attention of ours.

Guarantee: the logits are those of the model's own modules; only where keys and values are kept and how one query attends
to them differ, and `embedded_probe` compares the result with the untouched forward before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "isft_folded"
GROWTH = 64
"""The cache grows by so many positions at a time."""


class Decoder(Protocol):
    """Rows of tokens being continued. Rows are numbered 0..num_rows-1; `admit` appends, `move` and `shrink` compact."""

    @property
    def num_rows(self) -> int:
        """Rows being continued."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, torch.Tensor]:
        """Run the prompts; returns a state for `admit` and the features of each last token [prompts, ...]."""

    def admit(self, state: Any, prompt_of_row: Sequence[int]) -> None:
        """Append one row for each entry, continuing prompt `prompt_of_row[i]` of the prefilled state."""

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to every row; returns features [num_rows, ...]."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Raw logits [n, vocabulary] of features [n, ...]."""

    def compact(self, targets: Sequence[int], sources: Sequence[int], num_rows: int) -> None:
        """Copy row `sources[i]` over row `targets[i]`, then keep the first `num_rows` rows."""

    def reset(self) -> None:
        """Forget every row and free the cache."""


def folded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for one new token a row with grouped-query heads folded into rows: two batched products a layer.

    Prefill (more than one query) goes to transformers' SDPA. query [rows, heads, 1, d]; key, value [rows, kv_heads, t, d];
    attention_mask additive [rows, 1, 1, t].
    """
    if query.shape[2] > 1 or attention_mask is None:
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with softcap, position bias or sinks")
    rows, heads, _, width = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    folded = query.reshape(rows * kv_heads, heads // kv_heads, width)
    folded = folded * (width**-0.5 if scaling is None else scaling)
    scores = torch.bmm(folded, key.reshape(rows * kv_heads, length, width).transpose(1, 2))
    scores = scores.view(rows, heads, length).add_(attention_mask[:, 0])
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    mixed = torch.bmm(
        weights.view(rows * kv_heads, -1, length), value.reshape(rows * kv_heads, length, value.shape[-1])
    )
    return mixed.view(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(ATTENTION, folded_attention)


class _SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values in preallocated [rows, heads, positions, d] storage, filled from the left."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner
        self.store: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new token of every row at its own length; returns what is filled, [rows, heads, longest, d]."""
        assert self.store is not None
        keys, values = self.store
        owner = self.owner
        rows, at, longest = owner.rows_index, owner.lengths, owner.longest
        keys[rows, :, at] = key_states[:, :, 0]
        values[rows, :, at] = value_states[:, :, 0]
        return keys[: owner.num_rows, :, :longest], values[: owner.num_rows, :, :longest]

    def get_seq_length(self) -> int:
        """Longest row before this step."""
        return self.owner.longest - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset, for masks made by the model (ours is given ready-made)."""
        return self.owner.longest, 0


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of all rows, each row at positions 0..length-1 of its slot."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.num_rows = 0
        self.longest = 0
        self.capacity_rows = 0
        self.capacity = 0
        self.device = device
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self.rows_index = torch.zeros(0, dtype=torch.long, device=device)
        self.slots = [_SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.slots))

    def reserve(self, num_rows: int, positions: int) -> None:
        """Make room for so many rows and positions, keeping what is there."""
        if num_rows <= self.capacity_rows and positions <= self.capacity:
            return
        rows = max(num_rows, self.capacity_rows)
        capacity = max(-(-positions // GROWTH) * GROWTH, self.capacity)
        for slot in self.slots:
            if slot.store is not None:
                slot.store = _grown(slot.store[0], rows, capacity), _grown(slot.store[1], rows, capacity)
        self.capacity_rows, self.capacity = rows, capacity

    def append(self, prefilled: DynamicCache, prompt_of_row: Sequence[int], prompt_lengths: Sequence[int]) -> None:
        """New rows that continue prefilled prompts (right-padded)."""
        start, count = self.num_rows, len(prompt_of_row)
        self.reserve(start + count, max(prompt_lengths) + 1)
        pick = torch.tensor(prompt_of_row, device=self.device)
        for slot, layer in zip(self.slots, prefilled.layers, strict=True):
            width = layer.keys.shape[2]
            if slot.store is None:
                slot.store = (self._empty(layer.keys), self._empty(layer.values))
            for store, new in zip(slot.store or (), (layer.keys, layer.values), strict=True):
                store[start : start + count, :, :width] = new[pick]
        new_lengths = torch.tensor([prompt_lengths[i] for i in prompt_of_row], device=self.device)
        self.lengths = torch.cat([self.lengths, new_lengths])
        self._resize(start + count)

    def compact(self, targets: Sequence[int], sources: Sequence[int], num_rows: int) -> None:
        """See `Decoder.compact`."""
        if targets:
            to, of = torch.tensor(targets, device=self.device), torch.tensor(sources, device=self.device)
            self.lengths[to] = self.lengths[of]
            for slot in self.slots:
                for store in slot.store or ():
                    view = store[:, :, : self.longest]
                    view[to] = view[of]
        self.lengths = self.lengths[:num_rows].clone()
        self._resize(num_rows)

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        # zeros, as masked positions are multiplied by a weight of 0 and must be finite
        return like.new_zeros((self.capacity_rows, like.shape[1], self.capacity, like.shape[3]))

    def _resize(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.rows_index = torch.arange(num_rows, device=self.device)
        self.longest = int(self.lengths.max()) if num_rows else 0


def _grown(old: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
    new = old.new_zeros((rows, old.shape[1], capacity, old.shape[3]))
    new[: old.shape[0], :, : old.shape[2]] = old
    return new


class ModuleDecoder:
    """`Decoder` over a causal language model of transformers whose layers all keep a plain, full key-value cache."""

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.cache: SlotCache | None = None

    @property
    def num_rows(self) -> int:
        """Rows being continued."""
        return 0 if self.cache is None else self.cache.num_rows

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, torch.Tensor]:
        """See `Decoder.prefill`. Prompts are padded on the right, where causal attention never looks."""
        lengths = [len(p) for p in prompts]
        width = max(lengths)
        ids = torch.tensor([[*p, *([self.pad_token_id] * (width - len(p)))] for p in prompts], device=self.device)
        cache = DynamicCache(config=self.model.config)
        positions = torch.arange(width, device=self.device).unsqueeze(0)
        last = torch.tensor(lengths, device=self.device) - 1
        keep = torch.tensor(sorted({n - 1 for n in lengths}), device=self.device)
        out = self.model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep
        )
        column = torch.searchsorted(keep, last)
        return (cache, lengths), out.logits[torch.arange(len(prompts), device=self.device), column]

    @torch.inference_mode()
    def admit(self, state: Any, prompt_of_row: Sequence[int]) -> None:
        """See `Decoder.admit`."""
        prefilled, lengths = state
        if self.cache is None:
            self.cache = SlotCache(len(prefilled.layers), self.device)
        self.cache.append(prefilled, prompt_of_row, lengths)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoder.decode`."""
        cache = self.cache
        assert cache is not None
        cache.longest = int(cache.lengths.max()) + 1
        cache.reserve(cache.num_rows, cache.longest)
        beyond = torch.arange(cache.longest, device=self.device) > cache.lengths.unsqueeze(1)
        mask = torch.zeros(beyond.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(beyond, torch.finfo(self.dtype).min)[:, None, None]
        out = self.model(
            input_ids=torch.tensor(tokens, device=self.device).unsqueeze(1),
            position_ids=cache.lengths.unsqueeze(1),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        cache.lengths = cache.lengths + 1
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """See `Decoder.logits`: the model's forward already made them."""
        return features

    @torch.inference_mode()
    def compact(self, targets: Sequence[int], sources: Sequence[int], num_rows: int) -> None:
        """See `Decoder.compact`."""
        assert self.cache is not None
        self.cache.compact(targets, sources, num_rows)

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self.cache = None
