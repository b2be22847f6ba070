"""Tensors whose memory something else has for a while: their bytes wait on the host or in a file.

Guarantee: what comes back is the same bytes in the same tensors; parameters, views of them and what shares their memory stay the
objects they were.
"""

from __future__ import annotations

import ctypes
import io
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.machine import give_memory_back

_PIECE = 64 << 20
"""Bytes that are written or read at once: a tensor on a GPU passes through so much of the host's memory."""


class Away:
    """Empties the storages of `tensors`; `back` fills them again.

    With `disk` the bytes are in a nameless file of the folder that TMPDIR names, which is gone with the process, else in the host's
    memory. Raises DataError, with everything as it was, when the disk is full.
    """

    def __init__(self, tensors: Iterable[Tensor], *, disk: bool) -> None:
        self._file = _nameless() if disk else None
        self._held: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []
        seen: set[int] = set()
        devices: set[str] = set()
        try:
            for tensor in tensors:
                storage = _emptiable(tensor).untyped_storage()
                # an address of memory would not do: what was given back is handed out again
                if storage.nbytes() and storage._cdata not in seen:
                    seen.add(storage._cdata)
                    devices.add(storage.device.type)
                    self._put(storage)
        except BaseException as error:
            self.back()
            if isinstance(error, OSError):
                raise DataError(
                    f"weights or optimizer could not be put on disk: {error}",
                    where="train.offload",
                    hint=f"there must be room in {tempfile.gettempdir()}; TMPDIR names another folder",
                ) from error
            raise
        if "cuda" in devices:
            torch.cuda.empty_cache()
        give_memory_back()

    def _put(self, storage: torch.UntypedStorage) -> None:
        whole, kept = _bytes_of(storage), None
        if self._file is None:
            kept = whole.to("cpu", copy=True)
        else:
            for piece in torch.split(whole, _PIECE):
                self._write(piece)
        self._held.append((storage, storage.nbytes(), kept))
        storage.resize_(0)

    def back(self) -> None:
        """Fill the storages again; a second call does nothing."""
        held, self._held = self._held, []
        if self._file is not None:
            self._file.seek(0)
        for storage, size, kept in held:
            storage.resize_(size)
            whole = _bytes_of(storage)
            if kept is not None:
                whole.copy_(kept)
                continue
            for piece in torch.split(whole, _PIECE):
                self._read(piece)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, piece: Tensor) -> None:
        assert self._file is not None
        host = piece.cpu()
        left = _memory_of(host)
        while left:
            left = left[self._file.write(left) :]

    def _read(self, piece: Tensor) -> None:
        assert self._file is not None
        host = piece if piece.device.type == "cpu" else torch.empty(piece.numel(), dtype=torch.uint8)
        left = _memory_of(host)
        while left:
            size = self._file.readinto(left)
            if not size:
                raise DataError("weights that were put on disk are cut off there", where="train.offload")
            left = left[size:]
        if host is not piece:
            piece.copy_(host)


def _nameless() -> io.FileIO:
    """A file without a name and without a buffer, which would hold what a full disk did not take."""
    file: Any = tempfile.TemporaryFile(prefix="isft-away-", buffering=0)
    opened: io.FileIO = file
    return opened


def _memory_of(piece: Tensor) -> memoryview:
    """The memory of bytes on the host; `Tensor.numpy` would keep it from ever being given back."""
    return memoryview((ctypes.c_char * piece.numel()).from_address(piece.data_ptr())).cast("B")


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _emptiable(tensor: Tensor) -> Tensor:
    """`tensor`, with memory of its own where what it has cannot be given back (a file that is mapped)."""
    if not tensor.untyped_storage().resizable():
        tensor.data = tensor.data.clone()
    return tensor
