"""The safetensors container as strangers send it and as we write it: every byte checked going in, decided going out.

The library's own reader gives one line for a dozen causes, and its writer lays the metadata out in a random order. Here
a damaged file is told by its cause, and equal content makes an equal file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sdlora.container_header import DTYPES, Entry, read_header
from sdlora.errors import LoraFileError, SdloraError
from sdlora.file_identity import Identity, identity

_LAYOUT = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
"""The order in which the library lays tensors out, those of one format by name."""


@dataclass(frozen=True)
class Container:
    """A file whose header has been checked against its size.

    Attributes:
        path: the file.
        entries: what it holds, by key.
        metadata: the header's flat map of texts.
        header_bytes: length of the JSON header.
        error: what is raised when the file turns out to be bad.
        identity: of the file when its header was read.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    header_bytes: int
    error: type[SdloraError] = LoraFileError
    identity: Identity = ()

    def data(self) -> bytearray:
        """Reads everything behind the header.

        Raises:
            SdloraError: of the kind `error`, if the file cannot be read, or was changed meanwhile.
        """
        data = bytearray(max((e.end for e in self.entries.values()), default=0))
        self._read_into(memoryview(data), 0)
        return data

    def read(self, key: str) -> Tensor:
        """Reads one tensor and nothing else of the file, straight into memory of its own.

        Raises:
            SdloraError: of the kind `error`, if the file cannot be read, or was changed meanwhile.
        """
        entry = self.entries[key]
        # Memory from torch begins at a multiple of 64 bytes. Kernels are faster there, and round in one way only.
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if tensor.numel():
            self._read_into(tensor.view(-1).view(torch.uint8).numpy().data, entry.start)
        return tensor

    def view(self, key: str) -> Tensor:
        """Returns one tensor as it lies in the file, mapped into memory: nothing is read before it is used.

        Use it for a copy into another number format or onto a device. It must not be kept: who writes into the file
        changes it, and who cuts the file off ends the program.

        Raises:
            SdloraError: of the kind `error`, if the file cannot be read, or was changed meanwhile.
        """
        entry = self.entries[key]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        start = 8 + self.header_bytes + entry.start
        piece = self._mapped[start : start + entry.end - entry.start]
        if start % entry.dtype.itemsize:  # no library writes such a file, but it is allowed
            piece = piece.clone()
        return piece.view(entry.dtype).view(entry.shape)

    def unmap(self) -> None:
        """Lets go of the file, once no view of it is used any more; the next view maps it again."""
        vars(self).pop("_mapped", None)

    @cached_property
    def _mapped(self) -> Tensor:
        try:
            storage: Any = torch.UntypedStorage.from_file(str(self.path), False, self._size)
        except (RuntimeError, OSError) as error:
            raise self.error(f"cannot read {self.path}: {str(error).splitlines()[0]}") from error
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    @cached_property
    def _size(self) -> int:
        """Length of the whole file, in bytes, as its header has it."""
        return 8 + self.header_bytes + max((e.end for e in self.entries.values()), default=0)

    def _read_into(self, data: memoryview, start: int) -> None:
        """Reads as many bytes as there is room for, from a place that is counted from the end of the header."""
        try:
            with self.path.open("rb", buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size >= self._size
                file.seek(8 + self.header_bytes + start)
                done = 0
                while done < len(data) and (count := file.readinto(data[done:])):  # 2 GiB at most at a time
                    done += count
        except OSError as error:
            raise self.error(f"cannot read {self.path}: {error.strerror or error}") from error
        if done != len(data) or not whole:
            raise self.error(f"{self.path} was changed while it was read; try again")

    def tensors(self, data: bytearray) -> dict[str, Tensor]:
        """Cuts the bytes that `data` returned into tensors, each a copy of its own."""
        return {key: _tensor(e, data[e.start : e.end]) for key, e in self.entries.items()}


def _tensor(entry: Entry, piece: bytearray) -> Tensor:
    if not piece:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(piece, dtype=entry.dtype).reshape(entry.shape)


def open_container(path: Path, what: str = "LoRA file", error: type[SdloraError] = LoraFileError) -> Container:
    """Reads and checks a header; touches no tensor.

    Args:
        path: the file.
        what: it should be, for the message that there is none.
        error: the kind of error to raise.

    Raises:
        SdloraError: of the kind `error`, if there is no such file, or it is no whole, well-formed safetensors file.
    """
    try:
        known = identity(path)  # before the header, so that a change in between shows
    except (OSError, ValueError):
        known = ()  # what is wrong, the reader of the header says better
    try:
        return Container(path, *read_header(path, what), error, known)
    except LoraFileError as problem:
        raise error(str(problem)) from problem.__cause__


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a file: the library's layout of the tensors, the metadata sorted.

    Equal tensors and metadata give equal bytes.

    Args:
        tensors: by key, on the CPU.
        metadata: texts by key.
    """
    raw = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
    (length,) = struct.unpack("<Q", raw[:8])
    return _header(json.loads(raw[8 : 8 + length]), metadata) + raw[8 + length :]


def _header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Returns the beginning of a file, up to the first tensor."""
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    header = json.dumps({**table, **tensors}, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8, as in the library's own files
    return struct.pack("<Q", len(header)) + header


def model_hash(content: bytes) -> str:
    """Returns `sshs_model_hash` of a file's bytes: sha256 of what lies behind the header, so metadata may change.

    Source: sd-scripts' `addnet_hash_safetensors`.
    """
    (length,) = struct.unpack("<Q", content[:8])
    return hashlib.sha256(memoryview(content)[8 + length :]).hexdigest()


def legacy_hash(content: bytes) -> str:
    """Returns `sshs_legacy_hash` of a file's bytes: 8 letters, of 64 KiB from the second megabyte.

    Source: sd-scripts' `addnet_hash_legacy`.
    """
    return hashlib.sha256(memoryview(content)[0x100000:0x110000]).hexdigest()[:8]


def write_stream(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    tensor: Callable[[str], Tensor],
) -> None:
    """Writes a file tensor by tensor, so that no more than one of them need be in memory.

    The layout is `serialize`'s: equal tensors and metadata give equal bytes.

    Args:
        path: the file; write it under a temporary name, see `sdlora.atomic.replacing`.
        shapes: number format and shape by key.
        metadata: texts by key.
        tensor: asked once for each key, in the order of the file; returns it in that format and shape, on the CPU.

    Raises:
        ValueError: if a tensor has another format or shape than was announced.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    order = sorted(shapes, key=lambda key: (_LAYOUT.index(words[shapes[key][0]]), key))
    table: dict[str, Any] = {}
    position = 0
    for key in order:
        dtype, shape = shapes[key]
        size = math.prod(shape) * dtype.itemsize
        table[key] = {"dtype": words[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    with path.open("wb") as file:
        file.write(_header(table, metadata))
        for key in order:
            value = tensor(key)
            if (value.dtype, tuple(value.shape)) != shapes[key]:
                raise ValueError(f"{key} was announced as {shapes[key]} and is {value.dtype}, {tuple(value.shape)}")
            file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
