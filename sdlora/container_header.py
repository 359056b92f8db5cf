"""The header of a safetensors file: what a stranger claims that the file holds, believed only where it can be checked.

It is a JSON table of tensors with shapes and places. Each claim is held against the file's size before anything is
read, and a table that would fill the memory is refused before it is taken apart.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from sdlora.errors import LoraFileError

MAX_HEADER = 16 * 1024 * 1024
"""Longest header in bytes that is read; those of real LoRA files are below 1 MB."""

MAX_KEYS = 20_000
"""Most tensors that are read; a Stable Diffusion XL checkpoint with EMA weights has about 4200."""

MAX_SIDES = 8
"""Most sides of a tensor; a convolution's weight has 4."""

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


def read_header(path: Path, what: str) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Reads and checks a header; touches no tensor.

    Args:
        path: the file.
        what: it should be, for the message that there is none.

    Returns:
        The tensors' places by key, the metadata, and the length of the JSON header in bytes.

    Raises:
        LoraFileError: if there is no such file, or it is no whole, well-formed safetensors file.
    """
    if os.path.isdir(path):  # Path's own methods raise errors for names that are too long
        raise LoraFileError(f"{path} is a folder; give the .safetensors file in it")
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise LoraFileError(f"{path} is a pipe or a device; give the path of a .safetensors file")
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
    if len(header) > MAX_KEYS:
        raise LoraFileError(f"{path} lists {len(header)} tensors, and {MAX_KEYS} are the most that is read")
    entries = {key: _entry(path, key, value) for key, value in header.items()}
    _require_seamless(path, entries, size - 8 - length)
    return entries, metadata, length


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


def _require_few(path: Path, raw: bytes) -> None:
    """Refuses a header with far more values than that of any model, before each becomes an object in memory.

    A tensor has ten quotation marks and three brackets. Texts of metadata have others, escaped or single ones.
    """
    quotes = raw.count(b'"') - raw.count(b'\\"')
    brackets = raw.count(b"{") + raw.count(b"[")
    if quotes > 20 * MAX_KEYS or brackets > 10 * MAX_KEYS:
        raise LoraFileError(f"{path} lists more than any model has, and {MAX_KEYS} tensors are the most that is read")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key occurs twice")
        return table

    def refuse(number: str) -> None:
        raise ValueError(f"{number[:20]} is no whole number")

    _require_few(path, raw)
    ints = itertools.count()

    def whole(number: str) -> int:
        if next(ints) > 10 * MAX_KEYS:
            raise ValueError("it has too many numbers")
        return int(number)

    hooks: dict[str, Any] = {"parse_int": whole, "parse_float": refuse, "parse_constant": refuse}
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, **hooks)
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
        raise LoraFileError(f"{path}: {key[:200]!r} is stored as {word[:20]!r}; read are {', '.join(DTYPES)}")
    if len(shape) > MAX_SIDES or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
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
