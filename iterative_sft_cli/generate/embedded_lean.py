"""A forward of our own for Llama-shaped models: fused and prepared weights, no padding in prefill, few small operations.

Covers models that are embedding, layers of (norm, rotary grouped-query attention, norm, gated MLP), norm, head: Llama,
Mistral, Qwen 2 and 3, SmolLM, and whatever else has exactly these parts. Guarantee: a model with any other part is refused
by `refusal`, and `embedded_probe` compares the numbers with the model's own forward before this one is used.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from iterative_sft_cli.generate.embedded_cache import BlockCache
from iterative_sft_cli.generate.embedded_linear import Linear
from iterative_sft_cli.generate.embedded_native import native_norm

_MODEL_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def refusal(model: Any) -> str | None:
    """Why this forward cannot stand in for the model's, None when it may be tried."""
    if set(model._modules) != {"model", "lm_head"} or set(model.model._modules) != _MODEL_PARTS:
        return "its parts are not those of a Llama"
    if getattr(model.config, "rope_parameters", {}).get("rope_type", "default") not in _ROPE_TYPES:
        return "its rotary embedding depends on the length"
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = set(attention._modules) - {"q_norm", "k_norm"}
        if set(layer._modules) != _LAYER_PARTS or parts != _ATTENTION_PARTS or set(mlp._modules) != _MLP_PARTS:
            return "a layer has other parts than a Llama's"
        linears = [getattr(attention, name) for name in _ATTENTION_PARTS]
        linears += [getattr(mlp, name) for name in _MLP_PARTS - {"act_fn"}]
        if any(type(part) is not torch.nn.Linear for part in linears):
            return "a projection is not a plain linear layer"
        if getattr(attention, "sliding_window", None) is not None:
            return "it attends within a window"
        if not getattr(attention, "use_rope", True):
            # where most tokens were never trained the probe alone cannot tell
            return "a layer has no rotary embedding"
    norms = [
        model.model.norm,
        *(n for la in model.model.layers for n in (la.input_layernorm, la.post_attention_layernorm)),
    ]
    norms += [n for la in model.model.layers for n in _head_norms(la.self_attn) if n is not None]
    if any(not hasattr(norm, "variance_epsilon") or set(norm._parameters) != {"weight"} for norm in norms):
        return "a norm is not an RMSNorm"
    if type(model.lm_head) is not torch.nn.Linear:
        return "its head is not a plain linear layer"
    return None


def _head_norms(attention: Any) -> tuple[Any, Any]:
    return getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)


class _Norm:
    """RMS norm over the last dimension."""

    def __init__(self, module: Any) -> None:
        self.weight, self.epsilon = module.weight.detach(), float(module.variance_epsilon)
        self.shape = tuple(self.weight.shape)
        self.native = native_norm(self.shape[0], self.weight.dtype, self.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.native is not None:
            return self.native(x, self.weight, self.epsilon)
        return rms_norm(x, self.shape, self.weight, self.epsilon)


@dataclass(slots=True)
class _Layer:
    before_attention: _Norm
    qkv: list[Linear]
    head_norms: tuple[_Norm, _Norm] | None
    output: Linear
    before_mlp: _Norm
    gate: Linear
    up: Linear
    down: Linear
    activation: Any


class LeanDecoder:
    """`Decoder` over the weights of a Llama-shaped model."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        attention = model.model.layers[0].self_attn
        self.embedding = model.model.embed_tokens.weight.detach()
        self.rotary = model.model.rotary_emb
        self.width = int(attention.head_dim)
        self.heads = attention.q_proj.out_features // self.width
        self.kv_heads = attention.k_proj.out_features // self.width
        self.scaling = float(attention.scaling)
        self.norm = _Norm(model.model.norm)
        self.head = _linear(model.lm_head)
        self.layers = [_layer(layer) for layer in model.model.layers]
        self.device = self.embedding.device
        self.dtype = self.embedding.dtype
        self._cache: BlockCache | None = None
        self._prefix: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def cache(self) -> BlockCache:
        """See `Decoder.cache`."""
        assert self._cache is not None
        return self._cache

    @torch.inference_mode()
    def share(self, prefix: Sequence[int]) -> None:
        """See `Decoder.share`. Keeps the prefix's keys and values [kv_heads, length, d] of every layer."""
        self._prefix = []
        table = _Table([len(prefix)], 0, self.device)
        made: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            made.append((key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()))
            return table.attend(query, key, value, None, self.scaling)

        self._prefill(prefix, table, attend)
        self._prefix = made

    @torch.inference_mode()
    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> torch.Tensor:
        """See `Decoder.admit`. The prompts' tokens are one flat batch; only attention sees them as a padded table."""
        self._open()
        shared = self._prefix[0][0].shape[1] if self._prefix else 0
        slots = self.cache.admit([len(p) for p in prompts], copies)
        lengths = [len(p) - shared for p in prompts]
        table = _Table(lengths, shared, self.device)

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            prefix = self._prefix[index] if shared else None
            start = 0
            for slot, length in zip(slots, lengths, strict=True):
                part = slice(start, start + length)
                if prefix is not None:
                    self.cache.put_prompt(index, slot, 0, *prefix)
                self.cache.put_prompt(index, slot, shared, key[part].transpose(0, 1), value[part].transpose(0, 1))
                start += length
            return table.attend(query, key, value, prefix, self.scaling)

        return self._prefill([t for p in prompts for t in p[shared:]], table, attend)

    @torch.inference_mode()
    def admit_read(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], copies: Sequence[int]) -> None:
        """See `Decoder.admit_read`."""
        self._open()
        self.cache.admit_read(keys, values, copies)

    def _open(self) -> None:
        if self._cache is None:
            shape = len(self.layers), self.heads, self.kv_heads, self.width, self.width
            self._cache = BlockCache(*shape, self.dtype, self.device)

    def _prefill(self, tokens: Sequence[int], table: _Table, attend: Any) -> torch.Tensor:
        """Features of the last token of every row of `table`."""
        x = self.embedding[torch.tensor(tokens, device=self.device)]
        turn = self._turn(table.positions)
        for index, layer in enumerate(self.layers):
            x = self._through(layer, index, x, turn, attend)
        return self.norm(x[table.last])

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoder.decode`."""
        cache = self.cache
        cache.start_step()
        extra = [0] * (cache.padded_rows - cache.num_rows)
        x = self.embedding[torch.tensor([*tokens, *extra], device=self.device)]
        positions = torch.tensor([*cache.positions(), *extra], device=self.device)
        late = self._late_turn(positions) if cache.native else None
        turn = None if cache.native else self._turn(positions)

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return cache.attend(index, query, key, value, self.scaling, late)

        for index, layer in enumerate(self.layers):
            x = self._through(layer, index, x, turn, attend)
        return self.norm(x)

    def _turn(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines, and sines with the sign of rotate_half's first half, [tokens, 1, d]."""
        cosine, sine = self.rotary(self.embedding[:1], positions.unsqueeze(0))
        half = self.width // 2
        signed = torch.cat((-sine[0, :, :half], sine[0, :, half:]), -1)
        return cosine[0].unsqueeze(1), signed.unsqueeze(1)

    def _late_turn(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines in float32 [tokens, d], for attention that turns queries and keys itself."""
        cosine, sine = self.rotary(self.embedding[:1].float(), positions.unsqueeze(0))
        return cosine[0].contiguous(), sine[0].contiguous()

    def _through(
        self, layer: _Layer, index: int, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor] | None, attend: Any
    ) -> torch.Tensor:
        """One layer for tokens x [tokens, hidden]. Without `turn` queries and keys go to `attend` unturned."""
        normed = layer.before_attention(x)
        both = self.heads + self.kv_heads
        if len(layer.qkv) == 1:
            made = layer.qkv[0](normed)
        else:
            made = torch.cat([linear(normed) for linear in layer.qkv], -1)
        made = made.view(len(x), both + self.kv_heads, self.width)
        turning, value = made[:, :both], made[:, both:]
        if layer.head_norms is not None:
            norm_query, norm_key = layer.head_norms
            parts = norm_query(turning[:, : self.heads]), norm_key(turning[:, self.heads :])
            turning = torch.cat(parts, 1)
        if turn is not None:
            half = self.width // 2
            swapped = torch.cat((turning[..., half:], turning[..., :half]), -1)
            turning = torch.addcmul(turning * turn[0], swapped, turn[1])
        mixed = attend(index, turning[:, : self.heads], turning[:, self.heads :], value)
        x = layer.output.add(mixed.reshape(len(x), -1), x)
        normed = layer.before_mlp(x)
        gate = layer.gate.silu(normed) if layer.activation is None else layer.activation(layer.gate(normed))
        return layer.down.add(layer.up.times(normed, gate), x)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """See `Decoder.logits`."""
        return self.head(features)

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self._cache = None
        self._prefix = []

    shareable = True
    """Its code keeps nothing between calls but what is a decoder's own."""

    def twin(self) -> LeanDecoder:
        """See `Decoder.twin`."""
        other = copy.copy(self)
        other.reset()
        return other


class _Table:
    """Prompts of different lengths behind a shared prefix: flat tokens to a padded [prompts, longest] table and back."""

    def __init__(self, lengths: Sequence[int], shared: int, device: torch.device) -> None:
        longest = max(lengths)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self.positions = torch.tensor([shared + t for n in lengths for t in range(n)], device=device)
        self.last = torch.tensor([s + n - 1 for s, n in zip(starts, lengths, strict=True)], device=device)
        cells = [[s + min(t, n - 1) for t in range(longest)] for s, n in zip(starts, lengths, strict=True)]
        self.padded = None if all(n == longest for n in lengths) else torch.tensor(cells, device=device)
        flat = [i * longest + t for i, n in enumerate(lengths) for t in range(n)]
        self.flat = torch.tensor(flat, device=device)
        self.shape = len(lengths), longest
        self.mask: torch.Tensor | None = None
        if shared:
            seen = torch.ones(longest, longest, dtype=torch.bool, device=device).tril_()
            self.mask = torch.cat((torch.ones(longest, shared, dtype=torch.bool, device=device), seen), 1)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prefix: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
    ) -> torch.Tensor:
        """Causal attention within each prompt and to the prefix: query [tokens, heads, d] -> alike.

        Padding lies to the right, unseen.
        """
        group = query.shape[1] // key.shape[1]
        query, key, value = (self._pad(part).transpose(1, 2) for part in (query, key, value))
        if prefix is not None:
            key, value = (
                torch.cat((before.expand(self.shape[0], -1, -1, -1), part), 2)
                for before, part in zip(prefix, (key, value), strict=True)
            )
        if group > 1:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        mixed = scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, is_causal=self.mask is None, scale=scaling
        ).transpose(1, 2)
        return mixed.reshape(self.shape[0] * self.shape[1], *mixed.shape[2:])[self.flat]

    def _pad(self, part: torch.Tensor) -> torch.Tensor:
        return part.reshape(*self.shape, *part.shape[1:]) if self.padded is None else part[self.padded]


def _linear(module: Any) -> Linear:
    return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    weight = torch.cat([p.weight for p in projections]) if attention.q_proj.weight.dtype == torch.bfloat16 else None
    if weight is None:
        qkv = [_linear(p) for p in projections]
    else:
        biases = [p.bias for p in projections]
        bias = None if any(b is None for b in biases) else torch.cat(biases)
        qkv = [Linear(weight, bias)]
    query_norm, key_norm = _head_norms(attention)
    return _Layer(
        before_attention=_Norm(layer.input_layernorm),
        qkv=qkv,
        head_norms=None if query_norm is None or key_norm is None else (_Norm(query_norm), _Norm(key_norm)),
        output=_linear(attention.o_proj),
        before_mlp=_Norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        activation=None if type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") else mlp.act_fn,
    )
