"""Damages LoRA files and checkpoints at random, and proves that reading them ends well: in time, in little memory.

    python -m tools.fuzz_files --rounds 10000

Every file is a sound one that was cut, flipped, spliced, or whose header tells lies. Reading it may succeed or end with
an error for the user; anything else is a fault, and so is more than 2 seconds or a gigabyte of memory more.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdlora.cli.inspect import describe, plain
from sdlora.container import serialize
from sdlora.errors import LoraFileError, ModelError
from sdlora.families import FAMILIES, identify, native_resolution
from sdlora.families.places import places
from sdlora.files.kohya import read_lora
from sdlora.files.layers import layers_of

SECONDS = 2.0
"""The longest that one file may take, of the processor's time: what else runs on the machine is no fault of a file."""
MEMORY = 2**30
"""The most memory in bytes that reading may add to the process."""

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

_NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63, 2**80, 1.5, True, None, "4", [], {}, [[1]])


@dataclass
class Outcome:
    """What came of all files.

    Attributes:
        files: how many were read.
        results: how many were read, and how many refused with which kind of error.
        faults: what should not have happened, a line each.
        slowest: seconds of the slowest.
        memory: bytes by which the process grew at most.
    """

    files: int = 0
    results: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    memory: int = 0


def sound_files() -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """Returns sound small files of each kind by name: bytes, and how such a file is read."""
    rng = torch.Generator().manual_seed(0)

    def of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
        return {key: torch.randn(shape, generator=rng).to(dtype) for key, shape in shapes.items()}

    kohya, peft, processors = {}, {}, {}
    for n in range(4):
        block = f"down_blocks_{n % 3}_attentions_0_transformer_blocks_0_attn{1 + n % 2}_to_k"
        dotted = f"down_blocks.{n % 3}.attentions.0.transformer_blocks.0.attn{1 + n % 2}"
        kohya |= {
            f"lora_unet_{block}.lora_down.weight": (4, 768),
            f"lora_unet_{block}.lora_up.weight": (320, 4),
            f"lora_unet_{block}.alpha": (),
        }
        peft |= {f"unet.{dotted}.to_k.lora_A.weight": (4, 768), f"unet.{dotted}.to_k.lora_B.weight": (320, 4)}
        processors |= {
            f"{dotted}.processor.to_k_lora.down.weight": (4, 768),
            f"{dotted}.processor.to_k_lora.up.weight": (320, 4),
        }
    adapter = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {}})}
    training = {"ss_base_model_version": "sd_v1", "ss_tag_frequency": '{"a": {"b": 1}}', "ss_output_name": "style"}
    checkpoint = {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (8, 8, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.norm1.weight": (8,),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    }
    sides = {"up": (768, 1), "down": (1, 768)}
    numbered = {f"text_encoder:{n}:{side}": shape for n in range(48) for side, shape in sides.items()}
    return {
        "kohya": (serialize(of(kohya), training), _read_lora),
        "peft": (serialize(of(peft), adapter), _read_lora),
        "attention processors": (serialize(of(processors, torch.float32), {}), _read_lora),
        "cloneofsimo": (serialize(of(numbered), {"text_encoder": '["CLIPAttention"]'}), _read_lora),
        "checkpoint": (serialize(of(checkpoint), {"modelspec.prediction_type": "v"}), _read_checkpoint),
    }


def _read_lora(path: Path) -> None:
    shown = plain(describe(read_lora(path)))
    odd = [c for c in shown if not (c.isprintable() or c == "\n")]
    if odd:
        raise AssertionError(f"a terminal would be sent {odd[0]!r}")


def _read_checkpoint(path: Path) -> None:
    identify(path)
    native_resolution(path)
    places(path)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns a file damaged in one of many ways."""
    way = rng.choice((_cut, _flip, _splice, _lie, _lie, _lie, _rename, _metadata, _metadata, _replace))
    return way(content, rng)


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
                entry[what][rng.randrange(len(entry[what]))] = rng.choice(_NUMBERS)
            else:
                entry[what] = rng.choice(_NUMBERS)

    return _header(content, change)


def _rename(content: bytes, rng: random.Random) -> bytes:
    def change(header: dict[str, Any]) -> None:
        keys = [key for key in header if key != "__metadata__"]
        old = rng.choice(keys)
        other = rng.choice(keys)
        names = (
            other,
            old[: rng.randrange(len(old))],
            old + ".x",
            old.replace("_", "."),
            "\x1b[2J" + old,
            "é" * 70_000,
        )
        header[rng.choice(names)] = header.pop(old)

    return _header(content, change)


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


def run(rounds: int, seed: int, folder: Path) -> Outcome:
    """Reads damaged files.

    Args:
        rounds: how many.
        seed: of the damage; equal seeds give equal files.
        folder: where each lies while it is read.
    """
    rng, outcome, files = random.Random(seed), Outcome(), sound_files()
    path = folder / "file.safetensors"
    for family in FAMILIES:  # kept from then on
        layers_of(family)
    for content, read in files.values():
        path.write_bytes(content)
        read(path) if read is _read_lora else identify(path)
    before = _peak()
    for number in range(rounds):
        name = rng.choice(list(files))
        content, read = files[name]
        path.write_bytes(damaged(content, rng))
        began = time.process_time()
        try:
            read(path)
            outcome.results[f"{name}: read"] += 1
        except (LoraFileError, ModelError) as error:
            outcome.results[f"{name}: {type(error).__name__}"] += 1
            if "\x1b" in str(error):
                outcome.faults.append(f"file {number} ({name}): the message would reach the terminal as it is")
        except Exception as error:  # whatever else it is, is what is looked for
            outcome.faults.append(f"file {number} ({name}): {type(error).__name__}: {str(error)[:200]}")
        took = time.process_time() - began
        outcome.slowest = max(outcome.slowest, took)
        if took > SECONDS:
            outcome.faults.append(f"file {number} ({name}): took {took:.1f} s")
    outcome.files, outcome.memory = rounds, _peak() - before
    if outcome.memory > MEMORY:
        outcome.faults.append(f"memory grew by {outcome.memory / 2**20:.0f} MiB")
    return outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Runs from the command line; returns 1 if something went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_files", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # for matrices this small, several wait for each other longer than they compute
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(options.rounds, options.seed, Path(folder))
    for result, count in sorted(outcome.results.items()):
        print(f"{count:7d}  {result}")
    print(f"{outcome.files} files, slowest {outcome.slowest:.3f} s, memory grew by {outcome.memory / 2**20:.0f} MiB")
    print("\n".join(outcome.faults[:20]) or "no faults")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
