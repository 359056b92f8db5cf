"""Trains a LoRA as a user would: from a folder of pictures with captions, through `sdlora.training.train`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from sdlora.config import Config
from sdlora.training.progress import Reporter
from sdlora.training.train import train
from tools.pretrain_nano.concepts import Concept
from tools.style_bench.pictures import EmojiPictures

NEVER = 1_000_000
"""Epochs between saved files: the bench wants the last one only."""


def write_folder(folder: Path, pictures: EmojiPictures, style: str, concepts: Sequence[Concept]) -> Path:
    """Writes pictures of a style with their captions, `CODE.png` and `CODE.txt`, into a new folder; returns it.

    The caption is the concept's label: what the picture shows, not how it is drawn.
    """
    folder.mkdir(parents=True)
    for concept in concepts:
        Image.fromarray(pictures.read(style, concept.code)).save(folder / f"{concept.code}.png")
        (folder / f"{concept.code}.txt").write_text(concept.label, encoding="utf-8")
    return folder


def train_lora(
    config: Config, pictures: EmojiPictures, style: str, concepts: Sequence[Concept], target: Path, reporter: Reporter
) -> dict[str, Any]:
    """Trains a LoRA on some pictures of a style.

    Args:
        config: the settings; where pictures come from and files go to is decided here.
        pictures: the data set.
        style: the held-out style.
        concepts: which of its pictures to learn from.
        target: where the LoRA file goes.
        reporter: told what happens.

    Returns:
        Facts for the report: seconds of the whole run (loading and caching too), steps, loss at start and end.

    Raises:
        KeyboardInterrupt: if the person stopped it; nothing is kept, the next bench run begins this LoRA anew.
        SdloraError: as `train` does.
    """
    with TemporaryDirectory(dir=target.parent) as scratch:
        images = write_folder(Path(scratch) / "images", pictures, style, concepts)
        result = train(_placed(config, images, Path(scratch) / "run"), reporter=reporter)
        if result.interrupted:
            raise KeyboardInterrupt
        shutil.copyfile(result.lora, target)
    return {
        "seconds": round(result.seconds, 1),
        "steps": result.steps,
        "loss_start": result.loss_start,
        "loss_end": result.loss_end,
    }


def _placed(config: Config, images: Path, output: Path) -> Config:
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"images": images}),
            "samples": config.samples.model_copy(update={"sample_every": 0}),
            "output": config.output.model_copy(update={"output": output, "name": "lora", "save_every": NEVER}),
        }
    )
