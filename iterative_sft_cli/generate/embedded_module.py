"""Decoding through a model's own Hugging Face forward, with a cache and an attention of ours.

Guarantee: the logits are those of the model's own modules; only where keys and values are kept and how one query attends
to them differ, and `embedded_probe` compares the result with the untouched forward before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from iterative_sft_cli.generate.embedded_cache import BlockCache

ATTENTION = "isft_blocks"
"""Name of our attention in transformers' registry; no mask function is registered under it, so models make no masks."""
_MARK = "isft_layer"
"""Attribute by which new keys lead the attention function to their cache."""


class Decoder(Protocol):
    """Rows of tokens being continued, numbered from 0 with the oldest first."""

    @property
    def cache(self) -> BlockCache:
        """Where the rows' keys and values are."""

    def share(self, prefix: Sequence[int]) -> None:
        """All prompts admitted until `reset` begin with `prefix` and are longer: it may be run once for all."""

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> torch.Tensor:
        """Run the prompts and append `copies[i]` rows that continue prompt i; features of each last token [prompts, ...]."""

    def admit_read(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], copies: Sequence[int]) -> None:
        """Append `copies[i]` rows that continue a prompt that was run before, with its keys and values [layers, kv_heads, length, d]."""

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to every row; returns features [at least num_rows, ...]."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Raw logits [n, vocabulary] of features [n, ...]."""

    def reset(self) -> None:
        """Forget every row and free the cache."""

    @property
    def shareable(self) -> bool:
        """Whether twins may be used by several threads at a time."""

    def twin(self) -> Decoder:
        """Another decoder over the same weights, with rows of its own."""


class _BlockLayer(CacheLayerMixin):  # type: ignore[misc]
    """Hands new keys and values on as they are: `blocks_attention` stores them."""

    is_sliding = False

    def __init__(self, cache: BlockCache, index: int) -> None:
        super().__init__()
        self.blocks = cache
        self.index = index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keys that know where they are to be stored, and the values."""
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Only whether it is 0 matters: positions are given to the model."""
        return max(self.blocks.clock, 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Never asked, as models make no masks for our attention."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1


def blocks_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One new token a row over a `BlockCache`; prefill, whose keys carry no mark, goes to transformers' causal SDPA.

    query [rows, heads, 1, d]; key, value [rows, kv_heads, 1, d].
    """
    layer: _BlockLayer | None = getattr(key, _MARK, None)
    for name in ("softcap", "position_bias", "s_aux", "sliding_window"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    if layer is None:
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, None, scaling=scaling, **kwargs
        )
        return out
    if query.shape[1] != layer.blocks.heads:
        raise NotImplementedError("layers with different numbers of heads")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = layer.blocks.attend(layer.index, query[:, :, 0], key[:, :, 0], value[:, :, 0], scale)
    return mixed.unsqueeze(1), None


AttentionInterface.register(ATTENTION, blocks_attention)


class ModuleDecoder:
    """`Decoder` over a causal language model of transformers whose layers all keep a plain, full key-value cache."""

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.device = next(model.parameters()).device
        self._cache: BlockCache | None = None
        self._adapter: Any = None

    @property
    def cache(self) -> BlockCache:
        """See `Decoder.cache`."""
        assert self._cache is not None
        return self._cache

    def share(self, prefix: Sequence[int]) -> None:
        """See `Decoder.share`: not made use of."""

    @torch.inference_mode()
    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> torch.Tensor:
        """See `Decoder.admit`. Prompts are padded on the right, where causal attention never looks."""
        lengths = [len(p) for p in prompts]
        width = max(lengths)
        ids = torch.tensor([[*p, *([self.pad_token_id] * (width - len(p)))] for p in prompts], device=self.device)
        made = DynamicCache(config=self.model.config)
        last = torch.tensor(lengths, device=self.device) - 1
        keep = torch.tensor(sorted({n - 1 for n in lengths}), device=self.device)
        out = self.model(
            input_ids=ids,
            position_ids=torch.arange(width, device=self.device).unsqueeze(0),
            past_key_values=made,
            use_cache=True,
            logits_to_keep=keep,
        )
        self._open(len(made.layers), made.layers[0].keys[0], made.layers[0].values[0])
        slots = self.cache.admit(lengths, copies)
        for index, layer in enumerate(made.layers):
            for slot, length, keys, values in zip(slots, lengths, layer.keys, layer.values, strict=True):
                self.cache.put_prompt(index, slot, 0, keys[:, :length], values[:, :length])
        logits: torch.Tensor = out.logits[
            torch.arange(len(prompts), device=self.device), torch.searchsorted(keep, last)
        ]
        return logits

    @torch.inference_mode()
    def admit_read(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], copies: Sequence[int]) -> None:
        """See `Decoder.admit_read`."""
        self._open(keys[0].shape[0], keys[0][0], values[0][0])
        self.cache.admit_read(keys, values, copies)

    def _open(self, layers: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Have a cache for keys and values like these [kv_heads, length, d]."""
        if self._cache is None:
            heads = int(self.model.config.get_text_config().num_attention_heads)
            widths = keys.shape[2], values.shape[2]
            self._cache = BlockCache(layers, heads, keys.shape[0], *widths, keys.dtype, keys.device)
            self._adapter = Cache(layers=[_BlockLayer(self._cache, i) for i in range(layers)])

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoder.decode`."""
        cache = self.cache
        cache.start_step()
        extra = cache.padded_rows - cache.num_rows
        out = self.model(
            input_ids=torch.tensor([*tokens, *([0] * extra)], device=self.device).unsqueeze(1),
            position_ids=torch.tensor([*cache.positions(), *([0] * extra)], device=self.device).unsqueeze(1),
            past_key_values=self._adapter,
            use_cache=True,
        )
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """See `Decoder.logits`: the model's forward already made them."""
        return features

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self._cache = None
        self._adapter = None

    shareable = False
    """Nobody promises that a model's own forward may run twice at a time."""

    def twin(self) -> ModuleDecoder:
        """See `Decoder.twin`."""
        return ModuleDecoder(self.model, self.pad_token_id)
