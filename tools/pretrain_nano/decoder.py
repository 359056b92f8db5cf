"""Teaches the embedded base's decoder to decode what the base draws.

    python -m tools.pretrain_nano.decoder --data build/emoji --base build/nano/base

TAESD learned from photographs to decode clean latents. Here its decoder learns flat colours and hard edges, and to find
those of the base's styles again in latents that are off by what the denoiser leaves. The encoder, and so the latents,
stay.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor

from sdlora.atomic import replacing
from sdlora.diffusion.noise import generator
from sdlora.families import Base, Parts, load_parts
from sdlora.families.loading import NANO
from sdlora.sampling.samplers import make_scheduler
from tools.pretrain_nano import model
from tools.pretrain_nano.captions import prompt
from tools.pretrain_nano.concepts import Concept
from tools.pretrain_nano.latents import base_pictures, read_picture
from tools.pretrain_nano.sources import STYLE_OF
from tools.style_bench.draw import CFG, SAMPLER, STEPS

BATCH = 8
STRANGE = 0.5
"""Share of the batches whose pictures change their colours, so that styles of other colours are not drawn in these."""
REDRAWN = 5
"""Other batches are drawn back through 1 to so many of the base's last steps."""
RATE = 3e-4
WARM_UP = 0.05
"""Share of the steps over which the rate rises; then it falls to zero along a half cosine."""
REPORT = 100
"""Steps between two lines on the terminal."""


@dataclass(frozen=True)
class Lesson:
    """One step's material.

    Attributes:
        latents: (B, 4, 16, 16), what is to be decoded.
        pictures: (B, 3, 128, 128), in [-1, 1], what it should become.
    """

    latents: Tensor
    pictures: Tensor


class School:
    """The base's pictures and the base itself, whose drawings are decoded."""

    def __init__(self, data: Path, parts: Parts, seed: int = 0) -> None:
        self._data, self._parts, self._seed = data, parts, seed
        self._listed = base_pictures(data)

    @torch.no_grad()
    def lesson(self, step: int, size: int = BATCH) -> Lesson:
        """Returns what is learned in a step, a function of the seed and the step."""
        chance = random.Random(f"decoder {self._seed} {step}")
        chosen = chance.sample(self._listed, size)
        strange = chance.random() < STRANGE
        pictures = torch.stack([self._picture(style, concept) for style, concept in chosen])
        if strange:
            pictures = torch.stack([picture[chance.sample(range(3), 3)] for picture in pictures])
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        latents = self._parts.vae.encode(pictures).latents
        if not strange:
            captions = [prompt(concept, STYLE_OF[style]) for style, concept in chosen]
            noise = torch.randn(latents.shape, generator=generator(self._seed, "decoder", step))
            latents = redrawn(self._parts, latents, noise, captions, chance.randint(1, REDRAWN))
        return Lesson(latents, pictures)

    def _picture(self, style: str, concept: Concept) -> Tensor:
        values = torch.from_numpy(np.array(read_picture(self._data, style, concept)))
        return values.permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def redrawn(parts: Parts, clean: Tensor, noise: Tensor, captions: list[str], steps: int) -> Tensor:
    """Returns latents noised and drawn back through the last steps of the course in which the base draws.

    Args:
        parts: the base.
        clean: (B, 4, 16, 16).
        noise: (B, 4, 16, 16).
        captions: B prompts.
        steps: how many of the last steps, at least 1.

    Source: image to image in diffusers' `StableDiffusionImg2ImgPipeline`.
    """
    ids = model.token_ids(parts.tokenizers["text_encoder"], [*captions, *[""] * len(captions)])
    words = parts.text_encoders["text_encoder"](ids).last_hidden_state
    scheduler = make_scheduler(SAMPLER, parts.scheduler_config)
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(STEPS - steps)
    course = scheduler.timesteps[-steps:]
    latents = scheduler.add_noise(clean, noise, course[:1].expand(len(clean)))
    for t in course:
        given = torch.cat([latents, latents])
        output = parts.denoiser(given, t.expand(len(given)), words, return_dict=False)[0]
        positive, negative = output.chunk(2)
        latents = scheduler.step(negative + CFG * (positive - negative), t, latents, return_dict=False)[0]
    return latents


def teach(vae: AutoencoderTiny, school: School, steps: int) -> None:
    """Trains the decoder, in place, by the mean absolute error of the pictures.

    The absolute error wants the middle one of the colours that a place may have, the square their mean, which nobody
    has ever painted there.
    """
    vae.requires_grad_(False)
    decoder = vae.decoder.requires_grad_(True).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    course = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
    )
    began, losses = time.monotonic(), []
    for step in range(steps):
        lesson = school.lesson(step)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(lesson.latents.contiguous(memory_format=torch.channels_last)).sample
        loss = (decoded.float() - lesson.pictures).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        course.step()
        losses.append(loss.item())
        if (step + 1) % REPORT == 0:
            mean = sum(losses) / len(losses)
            print(f"step {step + 1} of {steps}: error {mean:.4f}, {time.monotonic() - began:.0f} s", flush=True)
            losses.clear()
    vae.eval()


def save(vae: AutoencoderTiny, folder: Path) -> None:
    """Writes the whole autoencoder in fp16; `config.json` and the licence are copied beside it if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "LICENSE"):
        if not (folder / name).is_file():
            shutil.copy(NANO / "vae" / name, folder / name)
    weights = {key: value.detach().half().contiguous() for key, value in vae.state_dict().items()}
    with replacing(folder / "diffusion_pytorch_model.safetensors") as partial:
        save_file(weights, partial, metadata={"format": "pt"})


def main() -> None:
    """Parses the arguments, trains, and writes the autoencoder."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_nano.decoder", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="data set, made by tools.pretrain_nano.build")
    parser.add_argument("--base", type=Path, default=NANO, help="diffusers folder; default: the embedded base")
    parser.add_argument("--pictures", type=float, default=14_400, help="how many are learned from")
    parser.add_argument("--out", type=Path, help="folder of the autoencoder; default: BASE/vae")
    arguments = parser.parse_args()
    vae = model.load_taesd()
    parts = load_parts(Base(str(arguments.base), arguments.base, "given"))
    teach(vae, School(arguments.data, parts), int(arguments.pictures) // BATCH)
    save(vae, arguments.out or arguments.base / "vae")


if __name__ == "__main__":
    main()
