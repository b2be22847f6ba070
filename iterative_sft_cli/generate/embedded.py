"""The engine in this process: any causal or encoder-decoder model of transformers, on CPU or GPU, sharing the trainer's weights.

Guarantee: the same plan gives the same bytes; what is sampled is the model's exact distribution under the decoding; a model
that the fast path does not reproduce to rounding is decoded by transformers' own `generate` instead, and says so once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.generate.base import EngineOutOfMemory, no_heartbeat
from iterative_sft_cli.generate.embedded_fallback import generate_with_model
from iterative_sft_cli.generate.embedded_lean import LeanDecoder, refusal
from iterative_sft_cli.generate.embedded_module import ATTENTION, Decoder, ModuleDecoder
from iterative_sft_cli.generate.embedded_native import kernels
from iterative_sft_cli.generate.embedded_plan import make_plan, num_positions, prefill_tokens
from iterative_sft_cli.generate.embedded_probe import EXACT, decoder_error, difference, expected, granted
from iterative_sft_cli.generate.embedded_prompts import KEPT_SHARE, KeptPrompts, that_fit
from iterative_sft_cli.generate.embedded_shard import Shard, schedule
from iterative_sft_cli.generate.embedded_streams import deal, run_streams
from iterative_sft_cli.generate.embedded_weights import Replica, can_merge
from iterative_sft_cli.machine import is_out_of_memory
from iterative_sft_cli.tensor_files import read_headers, weight_files
from iterative_sft_cli.types import Completion, Decoding, Request

log = logging.getLogger(__name__)

_PROBE_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError)


class EmbeddedEngine:
    """`Engine` over the live model of a `LoadedModel`; see `generate/base.py` for the contract.

    `heartbeat` is called after every step with the number of tokens it made.
    """

    def __init__(self, loaded: Any, *, encoder: Any, memory_gb: float | str = "auto") -> None:
        self.loaded = loaded
        self.encoder = encoder
        self.memory_gb = memory_gb
        self.heartbeat: Callable[[int], None] = no_heartbeat
        self.deterministic = not str(loaded.device).startswith("cuda")
        self._replica: Replica | None = None
        self._model: Any = None
        self._decoder: Decoder | None = None
        self._kept: KeptPrompts | None = None
        self._lean: bool | None = None
        self._told = False
        self._threads = torch.get_num_threads()

    @property
    def kernels(self) -> str | None:
        """What the C kernels that may take part are made from, None without any: bytes depend on it."""
        native = self._device().type == "cpu" and self._compute_dtype() == torch.bfloat16
        return kernels() if native else None

    def keep_prompts(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Read each of these prompts once for all the shards until the next call; returns those that there is memory for."""
        device = str(self.loaded.device)
        positions = num_positions(self.memory_gb, self._bytes_per_position(), device)
        fit = (prompt for prompt in prompts if 0 < len(prompt) < self.loaded.context_length)
        found = that_fit(fit, int(positions * KEPT_SHARE))
        self._kept = KeptPrompts(found, prefill_tokens(device)) if found else None
        return found

    def begin(self, weights: Path | None) -> None:
        """Serve the trainer's weights as they are now (None), or those of a Hugging Face or adapter folder."""
        self._forget_prompts()
        if weights is None:
            live = self.loaded.model
            if self._replica is None or not self._replica.is_of(live):
                self._replica = None
                self._replica = Replica(live, self._compute_dtype(), self._device(), merge=can_merge(live))
            else:
                self._replica.refresh()
            self._model = self._replica.model
            at_hand = next(live.parameters()).device == self._device()
            self._decoder = self._make_decoder(live if at_hand else self._model)
        else:
            self._model = self._load(weights)
            self._decoder = self._make_decoder(self._model)

    def end(self) -> None:
        """Free the cache and weights that were loaded from a folder; the replica's storage stays for the next phase."""
        self._forget_prompts()
        if self._decoder is not None:
            self._decoder.reset()
        self._decoder = None
        self._model = None
        if str(self.loaded.device).startswith("cuda"):
            self._replica = None
            torch.cuda.empty_cache()

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        """The batch shape of a shard; see `embedded_plan.make_plan`."""
        kept = self._kept if self._decoder is not None else None
        return make_plan(
            requests,
            decoding,
            memory_gb=self.memory_gb,
            bytes_per_position=self._bytes_per_position(),
            context_length=self.loaded.context_length,
            device=str(self.loaded.device),
            threads=self._threads,
            shareable=self._decoder is not None and self._decoder.shareable,
            kept_tokens=kept.num_tokens if kept is not None else 0,
            num_kept=sum(request.prompt_ids in kept for request in requests) if kept is not None else 0,
        )

    def generate(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        """Yield the completions of `requests`. Raises EngineOutOfMemory; DataError for a prompt without tokens."""
        if self._model is None:
            raise RuntimeError("generate() needs begin() first")
        for request in requests:
            if not request.prompt_ids:
                raise DataError(
                    f"prompt {request.prompt_id!r} has no tokens",
                    where="prompts",
                    expected="at least one token",
                    hint="give it some text, or a system prompt or template",
                )
        threads = torch.get_num_threads()
        torch.set_num_threads(int(plan.get("threads", threads)))
        try:
            yield from self._run(requests, decoding, plan)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise EngineOutOfMemory(str(error)) from error
            raise
        finally:
            torch.set_num_threads(threads)

    def _run(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        if self._decoder is None:
            yield from generate_with_model(
                self._model,
                requests,
                decoding,
                plan,
                context_length=self.loaded.context_length,
                pad_token_id=self.encoder.pad_token_id,
                decode_text=self.encoder.decode,
                heartbeat=self.heartbeat,
            )
            return
        streams = min(int(plan.get("streams", 1)), int(plan["max_rows"]))
        if self._kept is not None:
            self._kept.expect(request.prompt_ids for request in requests)
        shards = [
            Shard(
                self._decoder if number == 0 else self._decoder.twin(),
                decoding,
                plan,
                context_length=self.loaded.context_length,
                decode_text=self.encoder.decode,
                streams=streams,
                kept=self._kept,
            )
            for number in range(streams)
        ]
        pieces = schedule(requests, shards[0].max_rows)
        if streams == 1:
            shards[0].heartbeat = self.heartbeat
            yield from shards[0].run(pieces)
        else:
            threads = max(int(plan["threads"]) // streams, 1)
            yield from run_streams(shards, deal(pieces, streams), threads, self.heartbeat)

    def _forget_prompts(self) -> None:
        if self._kept is not None:
            self._kept.forget()

    def _bytes_per_position(self) -> int:
        return _bytes_per_position(self.loaded.model.config, self._compute_dtype())

    def _compute_dtype(self) -> torch.dtype:
        dtype = self.loaded.compute_dtype
        return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."))

    def _device(self) -> torch.device:
        return torch.device(self.loaded.device)

    def _load(self, folder: Path) -> Any:
        """The model in `folder`, or the live base model with the adapter in `folder`, ready to generate."""
        if (folder / "adapter_config.json").exists():
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            read_headers([folder / "adapter_model.safetensors"])
            twin = copy.deepcopy(self.loaded.model)
            set_peft_model_state_dict(twin, load_file(str(folder / "adapter_model.safetensors")))
            return Replica(twin, self._compute_dtype(), self._device(), merge=can_merge(twin)).model
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        kind = AutoModelForSeq2SeqLM if self.loaded.is_encoder_decoder else AutoModelForCausalLM
        read_headers(weight_files(folder))
        try:
            model = kind.from_pretrained(
                str(folder), dtype=self._compute_dtype(), local_files_only=True, use_safetensors=True
            )
        except OSError as error:
            raise DataError(f"no model could be loaded from {folder}: {error}", where="generate.from") from error
        return model.to(self.loaded.device).eval()

    def _make_decoder(self, reference: Any) -> Decoder | None:
        """The fastest decoder that reproduces `reference` (the model itself where there is no live one), None for `generate`."""
        model, dtype = self._model, self._compute_dtype()
        vocab = int(model.get_input_embeddings().weight.shape[0])
        why = _unsupported(model)
        if why is None:
            want = expected(reference, vocab)
            # what rounding does shows against float32, else between two forwards of the model's own
            exact = next(reference.parameters()).dtype == torch.float32
            other = model if exact else _with_attention(model, "eager")
            limit = granted(dtype, 0.0 if dtype == torch.float32 else difference(want, expected(other, vocab)))
            for make in self._candidates(reference):
                try:
                    decoder = make(model)
                    error = decoder_error(want, decoder, vocab)
                except _PROBE_ERRORS as problem:
                    why = f"{type(problem).__name__}: {problem}"
                    continue
                if error <= limit:
                    return decoder
                why = f"its logits differ by {error:.3g} nats, {limit:.3g} are granted"
        if not self._told:
            log.warning("%s generates through transformers' generate: %s", type(model).__name__, why)
            self._told = True
        return None

    def _candidates(self, reference: Any) -> list[Callable[[Any], Decoder]]:
        """Decoders to try, the fastest first. One that is not exact in float32 is out, where that can be asked."""
        makers: list[Callable[[Any], Decoder]] = [
            lambda model: ModuleDecoder(_with_attention(model, ATTENTION), self.encoder.pad_token_id)
        ]
        if self._lean is None and refusal(self._model) is not None:
            self._lean = False
        if self._lean is None and refusal(reference) is None and next(reference.parameters()).dtype == torch.float32:
            vocab = int(reference.get_input_embeddings().weight.shape[0])
            try:
                self._lean = decoder_error(expected(reference, vocab), LeanDecoder(reference), vocab) <= EXACT
            except _PROBE_ERRORS:
                self._lean = False
        if self._lean is not False:
            makers.insert(0, LeanDecoder)
        return makers


def _with_attention(model: Any, name: str) -> Any:
    """A view of `model` (same parameters and buffers) whose attention is `name`."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    twin.set_attn_implementation(name)
    return twin


def _unsupported(model: Any) -> str | None:
    """Why the model cannot use the slot cache, None when it may."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    layers = DynamicCache(config=config).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        return "its layers do not all keep a full key-value cache"
    return None


def _bytes_per_position(config: Any, dtype: torch.dtype) -> int:
    """Bytes that one token of one row takes in the cache of a plain transformer (an upper bound for others)."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * kv_heads * width * dtype.itemsize)
