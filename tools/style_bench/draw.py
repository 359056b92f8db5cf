"""Draws every prompt with every seed, the same way for all methods."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlora.families import Parts
from sdlora.families.loading import MINIATURE_CFG
from sdlora.sampling import pipeline
from sdlora.sampling.prompts import Prompt
from sdlora.training.progress import Reporter
from tools.pretrain_nano.drawings import SIDE

SAMPLER = "DPM++ 2M"
STEPS = 20
CFG = MINIATURE_CFG
"""Settled on the half "tune", see docs/defaults.md."""
BATCH = 16


def settings(cfg: float = CFG) -> list[object]:
    """Returns what decides a picture besides its prompt, seed and model."""
    return [SAMPLER, STEPS, cfg, SIDE]


def draw(
    parts: Parts,
    texts: Sequence[str],
    seeds: Sequence[Sequence[int]],
    clip_skip: int,
    reporter: Reporter,
    cfg: float = CFG,
) -> Tensor:
    """Draws pictures.

    Args:
        parts: the base, with whatever was learned in it.
        texts: P prompts.
        seeds: S seeds for each prompt.
        clip_skip: as in training.
        reporter: told about the progress.
        cfg: how strictly a text is followed.

    Returns:
        uint8, (P, S, 128, 128, 3).
    """
    side = parts.resolution
    wanted = [
        Prompt(text, "", side, side, seed, cfg, STEPS, SAMPLER)
        for text, several in zip(texts, seeds, strict=True)
        for seed in several
    ]
    reporter.begin("drawing", len(wanted))
    images = pipeline.draw(
        parts, wanted, clip_skip=clip_skip, batch_size=BATCH, on_image=lambda count: reporter.advance(units=count)
    )
    reporter.end()
    pictures = torch.stack([_as_tensor(image) for image in images])
    return pictures.unflatten(0, (len(texts), -1))


def _as_tensor(image: Image.Image) -> Tensor:
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image.convert("RGB")))


def to_floats(pictures: Tensor) -> Tensor:
    """Turns uint8 pictures (..., H, W, 3) into fp32 (N, 3, H, W) in [0, 1]; the leading dimensions become one."""
    return pictures.flatten(0, -4).permute(0, 3, 1, 2).float() / 255


def to_image(picture: Tensor) -> Image.Image:
    """Turns one uint8 picture (H, W, 3) into a PIL image."""
    return Image.fromarray(picture.numpy())
