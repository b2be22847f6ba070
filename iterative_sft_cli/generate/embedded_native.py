"""Tensors to and from the decoding kernels in C.

Guarantee: kernels are offered only for shapes, types and devices they are written for; `embedded_probe` compares what comes
out with the model's own forward like everything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from iterative_sft_cli.native import fingerprint, load

_VERSION = 1
_WIDEST = 256
_MOST_QUERIES = 4096
_MOST_BLOCKS = 255
"""The kernels keep a row's prompt and blocks on their stack; blocks grow with age, so a million tokens make about 150."""
_ROWS_A_THREAD = 16
_pool: ThreadPoolExecutor | None = None


class _Step(ctypes.Structure):
    """`Step` of kernels.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "width", "value_width")),
        ("prompt_keys", ctypes.c_void_p),
        ("prompt_values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("prompt_key_layer", "prompt_value_layer", "prompt_capacity")),
        *((name, ctypes.c_void_p) for name in ("slot", "prompt_length", "born")),
        *((name, ctypes.c_int64) for name in ("num_blocks", "clock")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "block_keys", "block_values", "block_key_layer", "block_value_layer", "block_start", "block_end",
            )
        ),
    ]  # fmt: skip


def offered(dtype: torch.dtype, device: torch.device, width: int, value_width: int, group: int) -> bool:
    """Whether the kernels take such attention, and are there."""
    fits = all(w % 16 == 0 and 0 < w <= _WIDEST for w in (width, value_width)) and group * width <= _MOST_QUERIES
    return dtype == torch.bfloat16 and device.type == "cpu" and fits and load("decoding", _VERSION) is not None


def kernels() -> str | None:
    """`fingerprint` of the kernels in use; None without them."""
    return fingerprint(load("decoding", _VERSION))


class NativeStep:
    """What the attention of all layers of one step has in common. `blocks` are (start, end, keys, values)."""

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        prompts: tuple[torch.Tensor, torch.Tensor],
        slot: Sequence[int],
        prompt_length: Sequence[int],
        born: Sequence[int],
        clock: int,
        blocks: Sequence[tuple[int, int, torch.Tensor, torch.Tensor]],
    ) -> None:
        library = load("decoding", _VERSION)
        assert library is not None and len(blocks) <= _MOST_BLOCKS
        self._call = library.isft_attend
        self.rows = len(slot)
        self.heads = heads
        keys, values = prompts
        lengths = np.asarray(prompt_length, dtype=np.int32)
        rows = [np.asarray(what, dtype=np.int32) for what in (slot, lengths[np.asarray(slot, dtype=np.int64)], born)]
        table = np.asarray(
            [(k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), start, end) for start, end, k, v in blocks],
            dtype=np.int64,
        ).T.copy()
        # kept, as the structure holds addresses only
        self._kept = (prompts, rows, table, blocks)
        self._step = _Step(
            self.rows, heads, kv_heads, keys.shape[4], values.shape[4],
            keys.data_ptr(), values.data_ptr(), keys.stride(0), values.stride(0), keys.shape[3],
            *(array.ctypes.data for array in rows),
            len(blocks), clock,
            *(row.ctypes.data for row in table),
        )  # fmt: skip
        longest = int(lengths.max()) + clock - int(rows[2].min()) + 16 * (len(blocks) + 1)
        self._scratch_floats = heads // kv_heads * longest
        self._ranges = _split(self.rows)
        self._scratches: list[np.ndarray] = [np.empty(self._scratch_floats, dtype=np.float32) for _ in self._ranges]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        """Fill the first rows of `out` [rows, heads, d]. query [rows, heads, d] and key, value [rows, kv_heads, d] may be
        slices of wider rows; `turn` is (cosine, sine) in float32 [rows, d] when they are not rotated yet."""
        query, key, value = (part if _packed(part) else part.contiguous() for part in (query, key, value))
        cosine, sine = (None, None) if turn is None else (turn[0].data_ptr(), turn[1].data_ptr())

        def run(index: int) -> None:
            first, last = self._ranges[index]
            self._call(
                ctypes.byref(self._step), ctypes.c_int64(layer), ctypes.c_int64(first), ctypes.c_int64(last),
                ctypes.c_void_p(query.data_ptr()), ctypes.c_int64(query.stride(0)),
                ctypes.c_void_p(key.data_ptr()), ctypes.c_int64(key.stride(0)),
                ctypes.c_void_p(value.data_ptr()), ctypes.c_int64(value.stride(0)),
                ctypes.c_void_p(cosine), ctypes.c_void_p(sine), ctypes.c_float(scaling),
                ctypes.c_void_p(self._scratches[index].ctypes.data), ctypes.c_void_p(out.data_ptr()),
            )  # fmt: skip

        _together(run, len(self._ranges))


def native_norm(width: int, dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor] | None:
    """RMS norm of bfloat16 rows [rows, width] as (x, weight, epsilon) -> tensor; None where the kernel does not serve."""
    library = load("decoding", _VERSION)
    if library is None or dtype != torch.bfloat16 or device.type != "cpu" or width % 16:
        return None
    call: Any = library.isft_rms_norm

    def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // width
        call(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(weight.data_ptr()), ctypes.c_int64(rows),
            ctypes.c_int64(width), ctypes.c_float(epsilon), ctypes.c_void_p(out.data_ptr()),
        )  # fmt: skip
        return out

    return norm


def _packed(part: torch.Tensor) -> bool:
    return part.stride(2) == 1 and part.stride(1) == part.shape[2]


def _split(rows: int) -> list[tuple[int, int]]:
    """Row ranges for this thread and its helpers."""
    parts = max(min(torch.get_num_threads(), rows // _ROWS_A_THREAD), 1)
    return [(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]


def _together(run: Callable[[int], None], count: int) -> None:
    global _pool
    if count > 1 and _pool is None:
        _pool = ThreadPoolExecutor(thread_name_prefix="isft-attend")
    helpers = [] if _pool is None else [_pool.submit(run, i) for i in range(1, count)]
    run(0)
    for helper in helpers:
        helper.result()
