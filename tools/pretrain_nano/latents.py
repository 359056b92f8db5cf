"""Encodes the pictures that the base learns from, once, and keeps the latents."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sdlora.atomic import replacing
from sdlora.diffusion.noise import generator
from sdlora.families.folders import quiet
from tools.pretrain_nano.concepts import Concept, load_concepts
from tools.pretrain_nano.drawings import SIDE
from tools.pretrain_nano.sources import BASE_STYLES

BASE_SPLITS = ("learn", "prompts")
"""The splits that the base may see; the others stay unknown to it."""
PART = 16
"""Pictures encoded at once."""
CELL, MARGIN = 8, 2
"""Side of a latent cell in pixels, and how far around it a fill has to reach."""
EVEN, WHITE = 0.03, 0.985
"""Greatest difference within a fill, and the least mean of red, green and blue that is no fill but paper."""


@dataclass(frozen=True)
class Latents:
    """The training set of the base.

    Attributes:
        values: (N, V, 4, 16, 16), fp16: V views of each picture.
        fills: (N, V, 16, 16), bool: cells in the midst of one colour, see `even_fills`.
        concepts: what each of the N pictures shows.
        styles: id of each picture's style.
    """

    values: Tensor
    fills: Tensor
    concepts: list[Concept]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.concepts)


def base_pictures(data: Path, splits: tuple[str, ...] = BASE_SPLITS) -> list[tuple[str, Concept]]:
    """Lists (style, concept) of every picture of the base's styles in some splits."""
    concepts = [concept for concept in load_concepts(data) if concept.split in splits]
    folders = {style: data / "pictures" / style for style in BASE_STYLES}
    return [
        (style, concept)
        for style, folder in folders.items()
        for concept in concepts
        if (folder / f"{concept.code}.png").is_file()
    ]


def load_latents(
    data: Path, vae: AutoencoderTiny, cache: Path, *, splits: tuple[str, ...] = BASE_SPLITS, views: int = 1
) -> Latents:
    """Returns the latents, encoding them unless `cache` holds those of this very data set.

    Args:
        data: folder of the data set.
        vae: the base's autoencoder.
        cache: safetensors file to read or write.
        splits: which concepts.
        views: latents per picture; the first is the picture as it is, the others are smaller and at another place,
            so that size and place are no constants of the base.
    """
    pictures = base_pictures(data, splits)
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    key = f"{manifest['sha256']} {splits} {views} latents, fills"
    found = None
    if cache.is_file():
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                found = {name: file.get_tensor(name) for name in ("latents", "fills")}
    if found is None:
        found = _encode(data, pictures, vae, views)
        with replacing(cache) as temporary:
            save_file(found, temporary, metadata={"key": key})
    concepts, styles = [concept for _, concept in pictures], [style for style, _ in pictures]
    return Latents(found["latents"], found["fills"], concepts, styles)


@torch.no_grad()
def _encode(data: Path, pictures: list[tuple[str, Concept]], vae: AutoencoderTiny, views: int) -> dict[str, Tensor]:
    """Returns latents and fills. In bf16 an encoding takes a third of the time on a CPU and differs by 0.005."""
    device = next(vae.parameters()).device
    with quiet():  # diffusers warns of modules to be kept in fp32, and then names none
        twin = copy.deepcopy(vae).to(device, torch.bfloat16, memory_format=torch.channels_last)
    values, fills = [], []
    for start in range(0, len(pictures), PART):
        stack = [
            view for style, concept in pictures[start : start + PART] for view in _views(data, style, concept, views)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(view) for view in stack])).to(device).permute(0, 3, 1, 2)
        fills.append(even_fills(pixels.float() / 255).cpu())
        pixels = (pixels.bfloat16() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        values.append(twin.encode(pixels).latents.half().cpu())
        if start % (64 * PART) == 0:
            print(f"encoding pictures: {start} of {len(pictures)}", flush=True)
    found = {"latents": torch.cat(values), "fills": torch.cat(fills)}
    return {name: tensor.unflatten(0, (len(pictures), views)).contiguous() for name, tensor in found.items()}


def even_fills(pixels: Tensor) -> Tensor:
    """Finds the latent cells that lie in the midst of one colour other than white.

    Args:
        pixels: (B, 3, H, W), in [0, 1].

    Returns:
        (B, H / 8, W / 8), bool.
    """
    side = CELL + 2 * MARGIN
    around = F.pad(pixels, (MARGIN,) * 4, mode="replicate")
    spread = F.max_pool2d(around, side, CELL) + F.max_pool2d(-around, side, CELL)
    return (spread.amax(1) < EVEN) & (F.avg_pool2d(pixels, CELL).amin(1) < WHITE)


def read_picture(data: Path, style: str, concept: Concept) -> Image.Image:
    """Returns a picture of the data set, in RGB on white."""
    with Image.open(data / "pictures" / style / f"{concept.code}.png") as file:
        return file.convert("RGB")


def _views(data: Path, style: str, concept: Concept, views: int) -> list[Image.Image]:
    picture = read_picture(data, style, concept)
    return [picture, *(_moved(picture, generator("view", style, concept.code, n)) for n in range(1, views))]


def _moved(picture: Image.Image, rng: torch.Generator) -> Image.Image:
    """Returns the picture at 70 to 100 % of its size, somewhere on white."""
    size, left, top = torch.rand(3, generator=rng).tolist()
    side = round(SIDE * (0.7 + 0.3 * size))
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    small = picture.resize((side, side), Image.Resampling.LANCZOS)
    canvas.paste(small, (round(left * (SIDE - side)), round(top * (SIDE - side))))
    return canvas
