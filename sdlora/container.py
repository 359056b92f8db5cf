"""The safetensors container as strangers send it and as we write it: every byte checked going in, decided going out.

The library's own reader gives one line for a dozen causes, and its writer lays the metadata out in a random order. Here
a damaged file is told by its cause, and equal content makes an equal file.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from torch import Tensor

from sdlora.errors import LoraFileError, SdloraError

MAX_HEADER = 16 * 1024 * 1024
"""Longest header in bytes that is read; those of real LoRA files are below 1 MB."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The container's number formats that are read."""

_LAYOUT = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
"""The order in which the library lays tensors out, those of one format by name."""

_IMPOSTORS = (  # what a file that is called .safetensors often is instead: first bytes, what it is, what to do
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself", "run `git lfs pull`, or download it"),
    (b"<!doctype html", "is a web page, not a model", "the download went wrong; a login may be needed"),
    (b"<html", "is a web page, not a model", "the download went wrong; a login may be needed"),
    (b"pk\x03\x04", "is a pickle or zip archive (.pt, .ckpt)", "such files can run code, so they are never opened"),
    (b"gguf", "is a GGUF file", "only safetensors are read"),
)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its dtype, its shape, and its bytes counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Container:
    """A file whose header has been checked against its size.

    Attributes:
        path: the file.
        entries: what it holds, by key.
        metadata: the header's flat map of texts.
        header_bytes: length of the JSON header.
        error: what is raised when the file turns out to be bad.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    header_bytes: int
    error: type[SdloraError] = LoraFileError

    def data(self) -> bytearray:
        """Reads everything behind the header.

        Raises:
            SdloraError: of the kind `error`, if the file cannot be read, or was changed meanwhile.
        """
        return self._read(0, max((e.end for e in self.entries.values()), default=0))

    def read(self, key: str) -> Tensor:
        """Reads one tensor and nothing else of the file.

        Raises:
            SdloraError: of the kind `error`, if the file cannot be read, or was changed meanwhile.
        """
        entry = self.entries[key]
        return _tensor(entry, self._read(entry.start, entry.end))

    def _read(self, start: int, end: int) -> bytearray:
        data = bytearray(end - start)  # which a tensor can have for its memory, without a copy
        try:
            with self.path.open("rb") as file:
                file.seek(8 + self.header_bytes + start)
                count = file.readinto(data)
        except OSError as error:
            raise self.error(f"cannot read {self.path}: {error.strerror or error}") from error
        if count != end - start:
            raise self.error(f"{self.path} was changed while it was read; try again")
        return data

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
        return replace(_open(path, what), error=error)
    except LoraFileError as problem:
        raise error(str(problem)) from problem.__cause__


def _open(path: Path, what: str) -> Container:
    if path.is_dir():
        raise LoraFileError(f"{path} is a folder; give the .safetensors file in it")
    if not path.is_file():
        raise LoraFileError(f"no {what} {path}; check the path")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            length = _header_length(path, start, size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise LoraFileError(f"cannot read {path}: {error.strerror or error}") from error
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise LoraFileError(f"{path} is damaged: its metadata is not a map of texts; download it again")
    entries = {key: _entry(path, key, value) for key, value in header.items()}
    _require_seamless(path, entries, size - 8 - length)
    return Container(path, entries, metadata, length)


def _header_length(path: Path, start: bytes, size: int) -> int:
    if size == 0:
        raise LoraFileError(f"{path} is empty (0 bytes); download or export it again")
    for magic, what, advice in _IMPOSTORS:
        if start.lower().lstrip(b"\xef\xbb\xbf \t\r\n").startswith(magic):
            raise LoraFileError(f"{path} {what}; {advice}")
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[8:9] != b"{":
        raise LoraFileError(f"{path} is a pickle; such files can run code, so they are never opened")
    if size < 10:
        raise LoraFileError(f"{path} is cut off after {size} bytes; download or export it again")
    (length,) = struct.unpack("<Q", start[:8])
    if start[8:9] != b"{":
        raise LoraFileError(f"{path} is not a safetensors file (it begins with {start[:8]!r}); only those are read")
    if length > MAX_HEADER:
        raise LoraFileError(f"{path} claims a header of {length} bytes, and {MAX_HEADER} is the most that is read")
    if length > size - 8:
        raise LoraFileError(f"{path} is cut off: its header needs {length} bytes, {size - 8} are there; download again")
    return length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key occurs twice")
        return table

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{path} is damaged: its header cannot be read ({error}); download it again") from error
    if not isinstance(header, dict):
        raise LoraFileError(f"{path} is damaged: its header is no table; download it again")
    return header


def _entry(path: Path, key: str, value: Any) -> Entry:
    damaged = LoraFileError(f"{path} is damaged: its header says nothing sensible of {key[:200]!r}; download it again")
    if not isinstance(value, dict):
        raise damaged
    shape, offsets, word = value.get("shape"), value.get("data_offsets"), value.get("dtype")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2 and isinstance(word, str)):
        raise damaged
    dtype = DTYPES.get(word)
    if dtype is None:
        raise LoraFileError(f"{path}: {key[:200]} is stored as {word[:20]!r}; read are {', '.join(DTYPES)}")
    numel = 1
    for side in shape:
        numel *= side
    if offsets[1] - offsets[0] != numel * dtype.itemsize:
        raise damaged
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)


def _require_seamless(path: Path, entries: Mapping[str, Entry], available: int) -> None:
    """Refuses gaps, overlaps and leftovers: bytes that belong to no tensor could be anything."""
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise LoraFileError(f"{path} is damaged: {key[:200]!r} does not begin where the one before it ends")
        position = entry.end
    if position > available:
        raise LoraFileError(f"{path} is cut off: its tensors need {position} bytes, {available} are there")
    if position < available:
        raise LoraFileError(f"{path} is damaged: {available - position} bytes behind the last tensor belong to nothing")


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a file: the library's layout of the tensors, the metadata sorted.

    Equal tensors and metadata give equal bytes.

    Args:
        tensors: by key, on the CPU.
        metadata: texts by key.
    """
    raw = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
    (length,) = struct.unpack("<Q", raw[:8])
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    table |= json.loads(raw[8 : 8 + length])
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8, as in the library's own files
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


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
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for key in order:
        dtype, shape = shapes[key]
        size = math.prod(shape) * dtype.itemsize
        table[key] = {"dtype": words[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for key in order:
            value = tensor(key)
            if (value.dtype, tuple(value.shape)) != shapes[key]:
                raise ValueError(f"{key} was announced as {shapes[key]} and is {value.dtype}, {tuple(value.shape)}")
            file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
