"""The pictures of the emoji data set as the judges see them: as drawn, and after the base's VAE encoded and decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from sdlora.atomic import replacing
from sdlora.families.loading import NANO
from tools.pretrain_nano.concepts import Concept, load_concepts
from tools.pretrain_nano.drawings import SIDE
from tools.pretrain_nano.sources import STYLES

JUDGED_STYLES = tuple(style.id for style in STYLES if style.role != "twin")
"""The styles that the style judge tells apart, in the order of its logits. To a judge a twin is no style of its own."""
VAE = NANO / "vae"
"""Folder of the base's autoencoder."""
PART = 16
"""Pictures that pass through the autoencoder at once."""


class EmojiPictures:
    """A built data set, as `python -m tools.pretrain_nano.build` writes it.

    Attributes:
        folder: where it lies.
        concepts: all concepts, in Unicode's order.
    """

    def __init__(self, folder: Path):
        """Reads the list of concepts; pictures are read when asked for.

        Raises:
            FileNotFoundError: the folder holds no data set.
        """
        self.folder = Path(folder).expanduser()
        words = self.folder / "concepts.json"
        if not words.is_file():
            raise FileNotFoundError(
                f"{words} is missing; build the data set with `python -m tools.pretrain_nano.build --out {folder}`"
            )
        self.concepts = load_concepts(self.folder)
        self._there = {style.id: self._codes(style.id) for style in STYLES}

    @cached_property
    def digest(self) -> str:
        """Hash of the data set's manifest, which holds the hashes of its pictures."""
        return hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()

    def _codes(self, style: str) -> frozenset[str]:
        return frozenset(file.stem for file in (self.folder / "pictures" / style).glob("*.png"))

    def of(self, style: str, splits: Iterable[str]) -> list[Concept]:
        """Lists the concepts of some splits that a style has a picture of, in Unicode's order."""
        wanted = frozenset(splits)
        return [concept for concept in self.concepts if concept.split in wanted and self.has(style, concept.code)]

    def has(self, style: str, code: str) -> bool:
        """Tells whether a style has a picture of a concept."""
        return code in self._there[style]

    def read(self, style: str, code: str) -> np.ndarray:
        """Returns one picture, uint8, (128, 128, 3), RGB on white.

        Raises:
            FileNotFoundError: the style has no such picture; ask `has` first.
        """
        with Image.open(self.folder / "pictures" / style / f"{code}.png") as picture:
            return np.asarray(picture.convert("RGB"))

    def tensor(self, style: str, codes: Sequence[str]) -> Tensor:
        """Returns pictures as (N, 3, 128, 128), fp32, in [0, 1]."""
        return as_floats(self.bytes(style, codes))

    def bytes(self, style: str, codes: Sequence[str]) -> Tensor:
        """Returns pictures as (N, 3, 128, 128), uint8."""
        if not codes:
            return torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8)
        stack = np.stack([self.read(style, code) for code in codes])
        return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


class Reconstructions:
    """Pictures after a round trip through the base's VAE, kept in a folder because each costs a seventh of a second.

    The round trip runs in bf16; the rounding is below a step of the 256 that are kept.
    """

    def __init__(self, pictures: EmojiPictures, cache: Path):
        """Prepares the cache; nothing is computed yet.

        Args:
            pictures: the data set.
            cache: folder for one safetensors file per style, pictures by code, (3, 128, 128), uint8.
        """
        manifest = json.loads((pictures.folder / "manifest.json").read_text(encoding="utf-8"))
        weights = hashlib.sha256((VAE / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
        self._pictures = pictures
        self._folder = Path(cache).expanduser() / f"round-trip-{manifest['sha256'][:8]}-{weights[:8]}"
        self._vae: AutoencoderTiny | None = None

    def bytes(self, style: str, codes: Sequence[str]) -> Tensor:
        """Returns the pictures of a style after the round trip, (N, 3, 128, 128), uint8; computes what is missing."""
        file = self._folder / f"{style}.safetensors"
        known = load_file(file) if file.is_file() else {}
        missing = [code for code in dict.fromkeys(codes) if code not in known]
        if missing:
            print(f"VAE round trip of {len(missing)} pictures of {style}", flush=True)
            for start in range(0, len(missing), PART):
                part = missing[start : start + PART]
                known.update(zip(part, self._round_trip(self._pictures.tensor(style, part)), strict=True))
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                save_file({code: picture.contiguous() for code, picture in known.items()}, partial)
        return torch.stack([known[code] for code in codes]) if codes else self._pictures.bytes(style, [])

    @torch.inference_mode()
    def _round_trip(self, pictures: Tensor) -> Tensor:
        if self._vae is None:
            vae = AutoencoderTiny.from_pretrained(VAE, torch_dtype=torch.bfloat16)
            self._vae = vae.eval().to(memory_format=torch.channels_last)
        values = (pictures * 2 - 1).to(torch.bfloat16, memory_format=torch.channels_last)
        decoded = self._vae.decode(self._vae.encode(values).latents).sample.float()
        return ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous()


def as_floats(pictures: Tensor) -> Tensor:
    """Turns uint8 pictures into fp32 in [0, 1]."""
    return pictures.float() / 255


def lookalikes(pictures: EmojiPictures, splits: Iterable[str], distance: float = 0.04) -> set[tuple[str, str]]:
    """Finds pictures that nobody could assign to a style, because another style has nearly the same picture.

    Args:
        pictures: the data set.
        splits: whose concepts to look at.
        distance: two pictures of a concept are the same if the root mean square of their difference at 64x64 is
            smaller, white being 1.

    Returns:
        (style, code) of every such picture; always at least two per concept.
    """
    found = set()
    for concept in (concept for concept in pictures.concepts if concept.split in frozenset(splits)):
        styles = [style for style in JUDGED_STYLES if pictures.has(style, concept.code)]
        if len(styles) < 2:
            continue
        stack = torch.cat([pictures.tensor(style, [concept.code]) for style in styles])
        flat = F.avg_pool2d(stack, 2).flatten(1)
        near = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") < distance * flat.shape[1] ** 0.5
        near.fill_diagonal_(False)
        found.update((style, concept.code) for style, alike in zip(styles, near.any(1), strict=True) if alike)
    return found
