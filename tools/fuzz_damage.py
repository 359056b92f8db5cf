"""Ways to damage a safetensors file or a JSON text, as downloads, other programs and malice do."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

HOSTILE = (
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\u202egnp.exe",
    "[" * 5000,
    '{"a":' * 2000,
    '{"r": 1e999, "alpha": NaN}',
    '{"unet.lora_alpha": "x", "unet.r": [1], "unet.rank_pattern": 5}',
    "None",
    "-1",
    "9" * 400,
    "",
    "x" * 200_000,
)
"""Values of metadata that somebody may have written to harm."""

PREFIXES = ("unet.", "text_encoder.", "base_model.model.", "lora_unet_", "lora_te1_", "diffusion_model.", "bundle_emb.")
"""What begins the keys in one dialect or another."""

_VALUES = (-1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63, 2**80, 1.5, True, None, "4", [], {}, [[1]])


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns a file damaged in one of many ways."""
    ways = (_cut, _flip, _splice, _lie, _lie, _lie, _rename, _rename, _metadata, _metadata, _replace, _grow, _poison)
    return rng.choice(ways)(content, rng)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    end = len(content) if rng.random() < 0.3 else 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _splice(content: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(content)), rng.choice((1, 8, 64, 4096))
    if rng.random() < 0.5:
        return content[:at] + rng.randbytes(length) + content[at:]
    return content[:at] + content[at + length :]


def _replace(content: bytes, rng: random.Random) -> bytes:
    starts = (
        b"",
        b"PK\x03\x04",
        b"\x80\x04\x95",
        b"<!DOCTYPE html>",
        b"version https://git-lfs",
        struct.pack("<Q", 2**63),
    )
    return rng.choice(starts) + rng.randbytes(rng.choice((0, 1, 7, 9, 500)))


def _header(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    raw = json.dumps(header).replace("NaN", "1").encode()
    return struct.pack("<Q", len(raw)) + raw + content[8 + length :]


def _lie(content: bytes, rng: random.Random) -> bytes:
    def change(header: dict[str, Any]) -> None:
        for _ in range(rng.choice((1, 1, 2, 5))):
            entry = header[rng.choice([key for key in header if key != "__metadata__"])]
            what = rng.choice(("shape", "shape", "data_offsets", "data_offsets", "dtype", "all"))
            if what == "dtype":
                entry["dtype"] = rng.choice(("F64", "F32", "BF16", "I8", "BOOL", "F8_E4M3", "C64", 5, None))
            elif what == "all":
                entry.clear()
            elif isinstance(entry.get(what), list) and entry[what]:
                entry[what][rng.randrange(len(entry[what]))] = rng.choice(_VALUES)
            else:
                entry[what] = rng.choice(_VALUES)

    return _header(content, change)


def _rename(content: bytes, rng: random.Random) -> bytes:
    def change(header: dict[str, Any]) -> None:
        keys = [key for key in header if key != "__metadata__"]
        old = rng.choice(keys)
        other = rng.choice(keys)
        names = (
            other,
            re.sub(r"\d+", str(rng.choice((3, 99, 2**31, 10**30))), old),
            other.rpartition(".")[0] + "." + old.rpartition(".")[2],
            rng.choice(PREFIXES) + old,
            old.removeprefix(rng.choice(PREFIXES)),
            old[: rng.randrange(len(old))],
            old + ".x",
            old.replace("_", "."),
            "\x1b[2J" + old,
            "é" * 70_000,
        )
        header[rng.choice(names)] = header.pop(old)

    return _header(content, change)


def _grow(content: bytes, rng: random.Random) -> bytes:
    """Adds more than anybody has: tensors without values, texts, sides, lists."""
    number = rng.choice((10, 1000, 30_000))

    def change(header: dict[str, Any]) -> None:
        old = rng.choice([key for key in header if key != "__metadata__"])
        what = rng.choice(("tensors", "texts", "sides", "lists"))
        if what == "tensors":
            empty = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
            header.update({re.sub(r"\d+", str(n), old, count=1): empty for n in range(number)})
        elif what == "texts":
            header["__metadata__"] = {str(n): "" for n in range(number)}
        elif what == "sides":
            header[old]["shape"] = [rng.choice((0, 1, 2**61))] * number
        else:
            header[old]["shape"] = [[]] * number

    return _header(content, change)


def _poison(content: bytes, rng: random.Random) -> bytes:
    """Makes values infinite or no numbers: all bits set are that in every floating format."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    at = rng.randrange(start, len(content)) & ~7
    word = rng.choice((b"\xff" * 8, b"\x00\x7c" * 4, b"\x80\x7f" * 4, b"\x00\x00\x80\x7f" * 2))
    return content[:at] + word + content[at + 8 :]


def damaged_json(text: str, rng: random.Random) -> str:
    """Returns a JSON table damaged in one of many ways."""
    if rng.random() < 0.2:
        return text[: rng.randrange(len(text))] + rng.choice(("", "}", "\x00", "[" * 100_000, '{"r":' * 100_000))
    table = json.loads(text)
    for _ in range(rng.choice((1, 1, 3))):
        key = rng.choice(list(table))
        values = (*_VALUES, *HOSTILE, 1e400, float("nan"), {rng.choice(HOSTILE): 1}, {"to_k": rng.choice(_VALUES)})
        table[key] = rng.choice(values)
    return json.dumps(table)


def _metadata(content: bytes, rng: random.Random) -> bytes:
    def change(header: dict[str, Any]) -> None:
        table = header.setdefault("__metadata__", {})
        known = (
            "ss_base_model_version",
            "ss_output_name",
            "ss_sd_model_name",
            "ss_clip_skip",
            "sdlora_base",
            "ss_steps",
        )
        more = (
            "modelspec.trigger_phrase",
            "modelspec.resolution",
            "modelspec.prediction_type",
            "lora_adapter_metadata",
        )
        for _ in range(rng.choice((1, 3, 8))):
            table[rng.choice((*table, *known, *more, "unet", "\x1b[5m"))] = rng.choice(HOSTILE)

    return _header(content, change)
