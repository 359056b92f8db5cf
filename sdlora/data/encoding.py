"""Pictures that are not in the cache become latents: decoded by several processes, encoded by the VAE.

On a CPU pictures are encoded one at a time: in a batch the last bits of a latent would depend on its neighbours, and so
on what happened to be cached already, and it would take no less time. On a GPU it takes a fraction of the time, so
pictures of one size are encoded together, and a latent's last bits may depend on which of them were missing. Once
computed, a latent comes from the cache and never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdlora.data.buckets import Fit
from sdlora.data.cache import Cache, fingerprint
from sdlora.data.colour import background_colour
from sdlora.data.decoding import Cut
from sdlora.data.folder import Example
from sdlora.data.image import pixels
from sdlora.data.workers import Workers, expected_seconds
from sdlora.errors import DatasetError
from sdlora.families import Parts

BATCH_PIXELS = 2**20
"""Pixels that a GPU encodes at once: four pictures of 512 x 512, for which SD's VAE takes about 2 GB in fp32."""
MAX_BATCH = 32
"""Most pictures that are encoded at once."""
_VERSION = 1  # raise it when the same picture is to be decoded, resized or encoded differently

Latents = dict[str, Tensor]
"""`mean` and, unless the VAE is deterministic, `std`, each (C, h, w), fp32."""


@dataclass(frozen=True)
class Variant:
    """One way of cutting a picture out: the bucket's place in the resized picture, in pixels, and whether mirrored."""

    left: int
    top: int
    flip: bool


@dataclass(frozen=True)
class Wanted:
    """A picture and those of its variants whose latents are not there.

    Attributes:
        example: the picture.
        fitted: how it comes to its size.
        variants: the ways of cutting it out.
        keys: names of their latents in the cache.
    """

    example: Example
    fitted: Fit
    variants: list[Variant]
    keys: list[str]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its bucket, in pixels."""
        return self.fitted.width, self.fitted.height

    def cuts(self) -> list[Cut]:
        """Returns the variants as the decoder understands them."""
        scaled = self.fitted.scaled_width, self.fitted.scaled_height
        return [Cut(scaled, (v.left, v.top), self.size, v.flip) for v in self.variants]


class Encoder:
    """Computes latents and keeps them.

    Args:
        parts: the base.
        background: colour behind transparent pictures.
        cache: where latents are kept.

    Attributes:
        encoded: how many were computed.
    """

    def __init__(self, parts: Parts, background: str, cache: Cache) -> None:
        self.parts, self.background, self.cache = parts, background, cache
        self.encoded = 0
        dtype = str(next(parts.vae.parameters()).dtype)
        model = parts.family.name, fingerprint(parts.vae, cache), dtype
        self._model = [_VERSION, *model, background_colour(background)]

    @property
    def together(self) -> bool:
        """Whether pictures of one size are encoded together."""
        return self.parts.device.type != "cpu"

    def key(self, example: Example, fitted: Fit, variant: Variant) -> str:
        """Names the latents of a variant by everything that they depend on."""
        return Cache.key("latents", self._model, example.digest, vars(fitted), vars(variant))

    def encode(self, wanted: Sequence[Wanted], on_picture: Callable[[], None]) -> dict[str, Latents]:
        """Computes the latents of pictures, by key, and puts them into the cache.

        Args:
            wanted: the pictures.
            on_picture: called after each one.

        Raises:
            DatasetError: if a picture has changed since the scan, cannot be decoded, or its latents are not finite.
        """
        found: dict[str, Latents] = {}
        for batch in self._batches(wanted):
            mean, std = self._encode(torch.stack([pixels(part) for _, _, part in batch]))
            for place, (picture, key, _) in enumerate(batch):
                latents = {"mean": mean[place].clone()} | ({} if std is None else {"std": std[place].clone()})
                self._require_finite(latents, picture.example.path)
                self.cache.put(key, latents)
                found[key] = latents
                self.encoded += 1
                if key == picture.keys[-1]:
                    on_picture()
        return found

    def _batches(self, wanted: Sequence[Wanted]) -> Iterator[list[tuple[Wanted, str, np.ndarray]]]:
        """Yields pictures of one size, cut to it, as many as are encoded at once."""
        if self.together:
            wanted = sorted(wanted, key=lambda picture: picture.size)
        batch: list[tuple[Wanted, str, np.ndarray]] = []
        for picture, parts in self._decoded(wanted):
            room = min(MAX_BATCH, BATCH_PIXELS // (picture.size[0] * picture.size[1])) if self.together else 1
            if batch and batch[0][0].size != picture.size:
                yield batch
                batch = []
            for key, part in zip(picture.keys, parts, strict=True):
                batch.append((picture, key, part))
                if len(batch) >= room:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _decoded(self, wanted: Sequence[Wanted]) -> Iterator[tuple[Wanted, list[np.ndarray]]]:
        items = ((p.example.path, p.example.digest, self.background, p.cuts()) for p in wanted)
        with Workers(expected_seconds(picture.example.path for picture in wanted)) as workers:
            for picture, result in zip(wanted, workers.map("cut", items), strict=True):
                if isinstance(result, DatasetError):
                    raise result
                yield picture, result

    def _encode(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encodes pixels, (B, 3, H, W), into mean and deviation, (B, C, h, w), fp32, CPU; one by one if need be."""
        try:
            with torch.no_grad():
                mean, std = self.parts.family.encode_images(self.parts, batch.to(self.parts.device))
            return mean.float().cpu(), None if std is None else std.float().cpu()
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        each = [self._encode(one[None]) for one in batch]
        stds = [std for _, std in each if std is not None]
        return torch.cat([mean for mean, _ in each]), torch.cat(stds) if stds else None

    def _require_finite(self, latents: Latents, path: Path) -> None:
        if not all(bool(values.isfinite().all()) for values in latents.values()):
            raise DatasetError(
                f"the latents of {path} are not finite; the VAE of {self.parts.name} does not work in "
                f"{next(self.parts.vae.parameters()).dtype}, or the picture is damaged"
            )


class Progress:
    """Tells how many pictures are done, one at a time."""

    def __init__(self, told: Callable[[int, int], None] | None, total: int) -> None:
        self._told, self._total, self._done = told, total, 0

    def add(self, count: int = 1) -> None:
        """Counts pictures as done."""
        for _ in range(min(count, self._total - self._done)):
            self._done += 1
            if self._told:
                self._told(self._done, self._total)

    def finish(self) -> None:
        """Counts the rest as done; copies of a picture are not encoded again."""
        self.add(self._total)


def look_up(pictures: Sequence[Wanted], cache: Cache, found: dict[str, Latents]) -> list[Wanted]:
    """Takes what is there from the cache; returns what is missing, copies of the same picture once."""
    missing, asked = [], set(found)
    for picture in pictures:
        absent = []
        for variant, key in zip(picture.variants, picture.keys, strict=True):
            if key in asked:
                continue
            asked.add(key)
            latents = cache.get(key)
            if latents is None:
                absent.append((variant, key))
            else:
                found[key] = latents
        if absent:
            lacking, keys = map(list, zip(*absent, strict=True))
            missing.append(Wanted(picture.example, picture.fitted, lacking, keys))
    return missing


def share(missing: Sequence[Wanted], rank: int, world_size: int) -> list[Wanted]:
    """Returns a process's part: as many pictures of each size as any other's, give or take one."""
    return sorted(missing, key=lambda picture: (picture.size, picture.example.digest))[rank::world_size]
