"""A module of a LoRA file before it is read: where its numbers lie, and whether they fit together.

All of this is known from the header, so a file that is unsound is refused before any of its tensors costs memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sdlora.container import Container, Entry
from sdlora.errors import LoraFileError
from sdlora.files.formats import ALPHA, DOWN, UP
from sdlora.files.webui import printable

DTYPE_WORDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
"""Number formats that LoRA tensors are read from, and their names in `output.save_dtype`."""


@dataclass(frozen=True)
class Place:
    """One tensor of one file."""

    container: Container
    key: str

    @property
    def entry(self) -> Entry:
        """Its format, shape and bytes."""
        return self.container.entries[self.key]

    def __str__(self) -> str:
        return printable(self.key)


@dataclass
class Module:
    """The places of one module.

    Attributes:
        path: of its layer in the model, with dots; "" where the format does not tell.
        places: by `DOWN`, `UP` and `ALPHA`; the last may be missing.
        alpha: as the file's configuration says it, or `None`.
    """

    path: str = ""
    places: dict[str, Place] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the down factor; its first side is the rank."""
        return self.places[DOWN].entry.shape


def require_complete(path: Path, modules: Mapping[str, Module]) -> None:
    """Checks that every module has both factors, of floating point, that fit together.

    Args:
        path: for messages.
        modules: by name.

    Raises:
        LoraFileError: naming the first module that is not sound.
    """
    for name, module in modules.items():
        places, shown = module.places, printable(name)
        for have, lack in ((UP, DOWN), (DOWN, UP)):
            if lack not in places:
                raise LoraFileError(f"{path}: {_lacks(name, places, have, lack)}; the file is incomplete")
        for role in (DOWN, UP):
            if places[role].entry.dtype not in DTYPE_WORDS:
                raise LoraFileError(
                    f"{path}: {places[role]} is stored as {str(places[role].entry.dtype).removeprefix('torch.')}; "
                    f"LoRA factors are read as {', '.join(DTYPE_WORDS.values())}"
                )
        down, up = places[DOWN].entry.shape, places[UP].entry.shape
        fits = len(down) == len(up) and len(down) in (2, 4) and down[0] == up[1]
        if not fits or 0 in down or 0 in up or any(side != 1 for side in up[2:]):
            raise LoraFileError(
                f"{path}: the factors of {shown} do not fit together: down {list(down)}, up {list(up)}; "
                "expected are [r, in] with [out, r], or [r, in, kh, kw] with [out, r, 1, 1]"
            )
        if ALPHA in places and places[ALPHA].entry.shape not in ((), (1,)):
            shape = list(places[ALPHA].entry.shape)
            raise LoraFileError(f"{path}: alpha of {shown} has shape {shape}; it must be one number")


def _lacks(name: str, places: Mapping[str, Place], have: str, lack: str) -> str:
    """Says what a module has and what it lacks, in the words of its own format."""
    if have not in places:
        return f"{printable(name)} has {printable(places[ALPHA].key.removeprefix(f'{name}.'))} but no {lack[1:]}"
    key, missing = places[have].key, lack
    for word, partner in (("lora_A", "lora_B"), ("down", "up")):
        old, new = (word, partner) if have == DOWN else (partner, word)
        if old in key:
            missing = new.join(key.rsplit(old, 1))
            break
    has, lost = (printable(text.removeprefix(f"{name}.")) for text in (key, missing))
    return f"{printable(name)} has {has} but no {lost}"
