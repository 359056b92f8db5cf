"""Pictures become latents once, and epochs become lists of batches by a pure function of (seed, epoch).

All latents lie in memory, fp32, on the CPU: ten thousand pictures at 512 pixels take little more than a gigabyte.
Pictures are encoded one at a time: in a batch the last bits of a latent would depend on its neighbours, and so on what
happened to be cached already.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from sdlora.config import DataSection
from sdlora.data.buckets import Fit, crop_offset, fit, step_for
from sdlora.data.cache import Cache, fingerprint
from sdlora.data.colour import background_colour
from sdlora.data.folder import Example, Scan
from sdlora.data.image import decode, pixels, read_bytes, resize_crop
from sdlora.data.tree import printable, shortened
from sdlora.diffusion.noise import generator
from sdlora.errors import DatasetError
from sdlora.families import Parts, PictureSize

_VERSION = 1  # raise it when the same picture is to be decoded, resized or encoded differently


@dataclass(frozen=True)
class Sample:
    """One place in a batch.

    Attributes:
        example: index of the picture in `Dataset.examples`.
        variant: index of its crop and flip.
    """

    example: int
    variant: int


@dataclass(frozen=True)
class Batch:
    """Latents of B pictures of one size.

    Attributes:
        mean: centre of the VAE's distribution, (B, C, h, w), fp32, CPU.
        std: its deviation, the same shape, or `None` where the VAE is deterministic.
        examples: the pictures, B of them.
        sizes: how each came to its size.
    """

    mean: Tensor
    std: Tensor | None
    examples: list[Example]
    sizes: list[PictureSize]


@dataclass(frozen=True)
class Variant:
    """One way of cutting a picture out: the bucket's place in the resized picture, in pixels, and whether mirrored."""

    left: int
    top: int
    flip: bool


@dataclass
class Dataset:
    """Pictures ready for training.

    Attributes:
        examples: those that train.
        fits: their sizes.
        variants: per example: the ways in which it is cut out.
        latents: per example and variant: `mean` and, unless the VAE is deterministic, `std`, each (C, h, w).
        seed: decides the order.
        notes: what the user should know, a sentence each.
        cached: how many latents came from the cache.
        encoded: how many were computed.
    """

    examples: list[Example]
    fits: list[Fit]
    variants: list[list[Variant]]
    latents: list[list[dict[str, Tensor]]]
    seed: int
    notes: list[str] = field(default_factory=list)
    cached: int = 0
    encoded: int = 0
    _last: tuple[tuple[int, int], list[list[Sample]]] | None = field(default=None, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, repeats counted."""
        return sum(example.repeats for example in self.examples)

    def bucket_table(self) -> dict[tuple[int, int], int]:
        """Returns how many samples an epoch has of each size (width, height) in pixels."""
        return _table(self.examples, self.fits)

    def aspect_error(self) -> float:
        """Returns the mean |bucket's width / height - picture's width / height| over the samples of an epoch."""
        errors = [
            (abs(f.width / f.height - e.width / e.height), e.repeats)
            for e, f in zip(self.examples, self.fits, strict=True)
        ]
        return sum(error * repeats for error, repeats in errors) / self.num_samples

    def steps_per_epoch(self, batch_size: int, accumulation: int = 1) -> int:
        """Returns the optimizer steps in an epoch; each takes `accumulation` batches, the last what is left."""
        batches = sum(math.ceil(count / batch_size) for count in self.bucket_table().values())
        return math.ceil(batches / accumulation)

    def batches(self, epoch: int, batch_size: int) -> list[list[Sample]]:
        """Returns the batches of an epoch, a function of (seed, epoch, batch_size) alone.

        Every picture comes exactly `repeats` times. All pictures of a batch have one size; where a size does not fill
        its last batch, that one is short.
        """
        if self._last is None or self._last[0] != (epoch, batch_size):  # the loop asks at every step
            self._last = (epoch, batch_size), self._batches(epoch, batch_size)
        return self._last[1]

    def _batches(self, epoch: int, batch_size: int) -> list[list[Sample]]:
        repeated = [index for index, example in enumerate(self.examples) for _ in range(example.repeats)]
        order = torch.randperm(len(repeated), generator=generator(self.seed, "order", epoch)).tolist()
        rng = generator(self.seed, "variant", epoch)
        draws = torch.rand(len(repeated), generator=rng, dtype=torch.float64).tolist()
        open_batches: dict[tuple[int, int], list[Sample]] = {}
        batches: list[list[Sample]] = []
        for place, draw in zip(order, draws, strict=True):
            index = repeated[place]
            size = self.fits[index].width, self.fits[index].height
            batch = open_batches.setdefault(size, [])
            batch.append(Sample(index, int(draw * len(self.latents[index]))))
            if len(batch) == batch_size:
                batches.append(open_batches.pop(size))
        batches += open_batches.values()
        order = torch.randperm(len(batches), generator=generator(self.seed, "batches", epoch)).tolist()
        return [batches[place] for place in order]

    def load(self, batch: Sequence[Sample]) -> Batch:
        """Puts the latents of a batch together."""
        chosen = [self.latents[sample.example][sample.variant] for sample in batch]
        std = torch.stack([latents["std"] for latents in chosen]) if "std" in chosen[0] else None
        mean = torch.stack([latents["mean"] for latents in chosen])
        sizes = [self._size(sample) for sample in batch]
        return Batch(mean, std, [self.examples[sample.example] for sample in batch], sizes)

    def _size(self, sample: Sample) -> PictureSize:
        example, fitted = self.examples[sample.example], self.fits[sample.example]
        variant = self.variants[sample.example][sample.variant]
        # Mirrored, what was cut off at the right is missing at the left.
        left = fitted.scaled_width - fitted.width - variant.left if variant.flip else variant.left
        return PictureSize((example.height, example.width), (variant.top, left), (fitted.height, fitted.width))


def prepare(
    parts: Parts,
    scan: Scan,
    config: DataSection,
    seed: int,
    cache: Cache,
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Encodes the pictures of a folder, those that are not cached yet.

    Args:
        parts: the base.
        scan: the folder; transparent pictures get its background.
        config: resolution, buckets, crops and flips.
        seed: decides random crops and the order of epochs.
        cache: latents of earlier runs.
        on_progress: told (pictures done, pictures in all) after each one.

    Raises:
        DatasetError: if a picture has changed since the scan, its latents are not finite, or all are too small.
    """
    examples, fits, notes = _fitting(scan.examples, config, config.resolution or parts.resolution)
    cuts = [variants(example, fitted, config, seed) for example, fitted in zip(examples, fits, strict=True)]
    dataset = Dataset(examples, fits, cuts, [], seed, notes)
    total, skipped = len(scan.examples), len(scan.examples) - len(examples)
    told = on_progress or (lambda done, total: None)
    for done in range(1, skipped + 1):
        told(done, total)
    encoder = _Encoder(parts, scan.background, cache)
    for done, (example, fitted, cut) in enumerate(zip(examples, fits, cuts, strict=True), skipped + 1):
        dataset.latents.append(encoder(example, fitted, cut))
        told(done, total)
    dataset.cached, dataset.encoded = encoder.cached, encoder.encoded
    if cache.problem:
        notes.append(cache.problem)
    return dataset


def bucket_counts(
    examples: Sequence[Example], config: DataSection, resolution: int
) -> tuple[int, dict[tuple[int, int], int]]:
    """Tells before anything is loaded how many pictures will train, and the samples in an epoch by (width, height).

    Raises:
        DatasetError: if all pictures are too small.
    """
    fitting, fits, _ = _fitting(examples, config, resolution)
    return len(fitting), _table(fitting, fits)


def variants(example: Example, fitted: Fit, config: DataSection, seed: int) -> list[Variant]:
    """Returns the crops and flips of a picture, each once; where nothing is cut off there is one crop only."""
    count = config.num_crops if config.crop == "random" else 1
    offsets: dict[tuple[int, int], None] = {}
    for k in range(count):
        across, down = torch.rand(2, generator=generator(seed, "crop", example.digest, k), dtype=torch.float64).tolist()
        offsets[crop_offset(fitted, config.crop, (across, down))] = None
    flips = (False, True) if config.flip else (False,)
    return [Variant(left, top, flip) for left, top in offsets for flip in flips]


def _fitting(
    examples: Sequence[Example], config: DataSection, resolution: int
) -> tuple[list[Example], list[Fit], list[str]]:
    """Sorts out the pictures that are too small; the last of the three says which."""
    step = step_for(resolution)
    chosen, fits, small = [], [], []
    for example in examples:
        fitted = fit(
            example.width,
            example.height,
            resolution=resolution,
            step=step,
            max_upscale=config.max_upscale,
            square=not config.buckets,
        )
        if fitted is None:
            small.append(f"{printable(example.path.name)} ({example.width} x {example.height})")
        else:
            chosen.append(example)
            fits.append(fitted)
    if not small:
        return chosen, fits, []
    least = f"{2 * step} pixels a side, even enlarged {config.max_upscale:g} times"
    if not chosen:
        raise DatasetError(
            f"all pictures ({len(small)}) are smaller than {least}: {shortened(small)}; give larger ones, or raise "
            f"--max-upscale, or lower the resolution ({resolution})"
        )
    return (
        chosen,
        fits,
        [f"{len(small)} picture{'s' * (len(small) > 1)} skipped, smaller than {least}: {shortened(small)}"],
    )


def _table(examples: Sequence[Example], fits: Sequence[Fit]) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for example, fitted in zip(examples, fits, strict=True):
        size = fitted.width, fitted.height
        counts[size] = counts.get(size, 0) + example.repeats
    return dict(sorted(counts.items()))


class _Encoder:
    """Gets latents from the cache, or from the VAE; decodes a picture only if one of its variants is missing."""

    def __init__(self, parts: Parts, background: str, cache: Cache) -> None:
        self.parts, self.background, self.cache = parts, background, cache
        self.cached = self.encoded = 0
        dtype = next(parts.vae.parameters()).dtype
        model = parts.family.name, fingerprint(parts.vae), str(dtype)
        self._model = [_VERSION, *model, background_colour(background)]

    def __call__(self, example: Example, fitted: Fit, wanted: Sequence[Variant]) -> list[dict[str, Tensor]]:
        image: Image.Image | None = None
        found = []
        for variant in wanted:
            key = Cache.key("latents", self._model, example.digest, vars(fitted), vars(variant))
            latents = self.cache.get(key)
            if latents is None:
                image = image or self._read(example)
                latents = self._encode(image, example, fitted, variant)
                self.cache.put(key, latents)
                self.encoded += 1
            else:
                self.cached += 1
            found.append(latents)
        return found

    def _read(self, example: Example) -> Image.Image:
        content = read_bytes(example.path)
        if hashlib.sha256(content).hexdigest() != example.digest:  # or its latents would be kept under a wrong name
            raise DatasetError(f"{example.path} has changed while it was being read; run again")
        return decode(content, self.background).image

    def _encode(self, image: Image.Image, example: Example, fitted: Fit, variant: Variant) -> dict[str, Tensor]:
        scaled, size = (fitted.scaled_width, fitted.scaled_height), (fitted.width, fitted.height)
        cut = pixels(resize_crop(image, scaled, (variant.left, variant.top), size))
        if variant.flip:
            cut = cut.flip(-1)
        with torch.no_grad():
            mean, std = self.parts.family.encode_images(self.parts, cut[None].to(self.parts.device))
        latents = {"mean": mean[0].float().cpu()} | ({} if std is None else {"std": std[0].float().cpu()})
        if not all(bool(values.isfinite().all()) for values in latents.values()):
            raise DatasetError(
                f"the latents of {example.path} are not finite; the VAE of {self.parts.name} does not work in "
                f"{next(self.parts.vae.parameters()).dtype}, or the picture is damaged"
            )
        return latents
