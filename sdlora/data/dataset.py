"""Pictures become latents once, and epochs become lists of batches by a pure function of (seed, epoch).

All latents lie in memory, fp32: ten thousand pictures at 512 pixels take little more than a gigabyte. Where they fit
they lie on the device, those of one size in one tensor, and a batch is a choice of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdlora.config import DataSection
from sdlora.data.buckets import Fit, crop_offset, fit, step_for
from sdlora.data.cache import Cache
from sdlora.data.encoding import Encoder, Latents, Progress, Variant, Wanted, look_up, share
from sdlora.data.folder import Example, Scan
from sdlora.data.stacks import Stacks
from sdlora.data.tree import printable, shortened
from sdlora.diffusion.noise import generator
from sdlora.errors import DatasetError
from sdlora.families import Parts, PictureSize


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
        mean: centre of the VAE's distribution, (B, C, h, w), fp32, where the data set's latents lie.
        std: its deviation, the same shape, or `None` where the VAE is deterministic.
        examples: the pictures, B of them.
        sizes: how each came to its size.
    """

    mean: Tensor
    std: Tensor | None
    examples: list[Example]
    sizes: list[PictureSize]


@dataclass
class Dataset:
    """Pictures ready for training.

    Attributes:
        examples: those that train.
        fits: their sizes.
        variants: per example: the ways in which it is cut out.
        latents: per example and variant; see `encoding.Latents`.
        seed: decides the order.
        notes: what the user should know, a sentence each.
        cached: how many latents came from the cache.
        encoded: how many were computed.
    """

    examples: list[Example]
    fits: list[Fit]
    variants: list[list[Variant]]
    latents: list[list[Latents]]
    seed: int
    notes: list[str] = field(default_factory=list)
    cached: int = 0
    encoded: int = 0
    _stacks: Stacks | None = field(default=None, repr=False, compare=False)
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
        places = [(sample.example, sample.variant) for sample in batch]
        if self._stacks:
            latents = self._stacks.rows(places)
        else:
            chosen = [self.latents[example][variant] for example, variant in places]
            latents = {name: torch.stack([one[name] for one in chosen]) for name in chosen[0]}
        sizes = [self._size(sample) for sample in batch]
        examples = [self.examples[sample.example] for sample in batch]
        return Batch(latents["mean"], latents.get("std"), examples, sizes)

    def to_device(self, device: torch.device | str, budget_bytes: float = math.inf) -> bool:
        """Puts the latents of each size into one tensor, so that a batch is a choice of rows; the values stay the same.

        Args:
            device: where they shall lie.
            budget_bytes: what they may take there. If they need more they stay in the processor's memory, pinned if
                they are for a CUDA device, so that a copy of a batch need not be waited for.

        Returns:
            Whether they lie on that device now.
        """
        device = torch.device(device)
        fits = self.num_bytes <= budget_bytes
        self._stacks = Stacks(
            self.latents, device if fits else torch.device("cpu"), pin=device.type == "cuda" and not fits
        )
        self.latents = self._stacks.views()
        return fits

    @property
    def num_bytes(self) -> int:
        """Memory that the latents take."""
        unique = {id(tensor): tensor for each in self.latents for one in each for tensor in one.values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())

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
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Dataset:
    """Encodes the pictures of a folder, those that are not cached yet.

    Several processes share the work: each encodes its part of what is missing, and then all read it. What a process
    cannot read, because the cache cannot be written or is not shared, it encodes itself.

    Args:
        parts: the base.
        scan: the folder; transparent pictures get its background.
        config: resolution, buckets, crops and flips.
        seed: decides random crops and the order of epochs.
        cache: latents of earlier runs.
        on_progress: told (pictures done, pictures in all) after each one.
        rank: number of this process.
        world_size: number of processes; all must see the same pictures.
        barrier: waits until all processes have called it; called twice in each.

    Raises:
        DatasetError: if a picture has changed since the scan, its latents are not finite, or all are too small.
    """
    examples, fits, notes = _fitting(scan.examples, config, config.resolution or parts.resolution)
    cuts = [variants(example, fitted, config, seed) for example, fitted in zip(examples, fits, strict=True)]
    encoder = Encoder(parts, scan.background, cache)
    pictures = [
        Wanted(example, fitted, cut, [encoder.key(example, fitted, variant) for variant in cut])
        for example, fitted, cut in zip(examples, fits, cuts, strict=True)
    ]
    progress = Progress(on_progress, len(scan.examples))
    progress.add(len(scan.examples) - len(examples))
    found: dict[str, Latents] = {}
    missing = look_up(pictures, cache, found)
    progress.add(len(pictures) - len(missing))
    if world_size > 1:
        barrier()  # nobody writes before all know what is missing, so that they share the same list
        try:
            found |= encoder.encode(share(missing, rank, world_size), progress.add)
        except Exception:
            barrier()  # the others find it missing, and the same mistake
            raise
        barrier()
        missing = look_up(missing, cache, found)
    found |= encoder.encode(missing, progress.add)
    progress.finish()
    if cache.problem:
        notes.append(cache.problem)
    latents = [[found[key] for key in picture.keys] for picture in pictures]
    places = sum(map(len, latents))
    return Dataset(examples, fits, cuts, latents, seed, notes, places - encoder.encoded, encoder.encoded)


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
