"""How much memory there is, what may leave it, and where on the ladder of savings a run begins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil  # comes with accelerate
import torch
from torch import nn

from sdlora.adapters import Lora
from sdlora.config import Config
from sdlora.families import Parts, PictureSize
from sdlora.training.forecast import Forecast, forecast
from sdlora.training.memory import Ladder, empty_cache, first_that_fits, recorded_rung, rungs
from sdlora.training.optimizers import MOMENT_BYTES
from sdlora.training.progress import Reporter
from sdlora.training.savings import Rung, size_in_words
from sdlora.training.texts import Texts
from sdlora.training.world import World

SHARE = 0.92
"""Of the free memory of a GPU, how much a forecast may fill."""
AT_MOST = 1200
"""A picture keeps at most so many tensors of the size of the denoiser's first activations.

Source: counted 354 for SD 1.5 at 512 pixels, 644 for SDXL at 1024, 264 for nano; more with adapters in convolutions.
"""


@dataclass(frozen=True)
class Limit:
    """Memory to stay within.

    Attributes:
        bytes: how much.
        given: whether the user said so; else it is what was found to be free.
    """

    bytes: int
    given: bool

    def words(self) -> str:
        """Names it for a person."""
        return f"{size_in_words(self.bytes)} {'allowed' if self.given else 'free'}"


def memory_limit(wanted: str, device: torch.device, free: int | None) -> Limit | None:
    """Returns the memory to stay within, or `None` where nothing is known.

    Args:
        wanted: `auto`, or a size such as 8GB; a GB has 10^9 bytes.
        device: where training runs.
        free: bytes of main memory that are free, this process's own included, for a CPU.
    """
    number = re.match(r"[\d.]+", wanted)
    if number:
        return Limit(round(float(number.group()) * (1e9 if "g" in wanted.lower() else 1e6)), True)
    if device.type == "cuda":
        mine = torch.cuda.memory_reserved(device)
        return Limit(round(SHARE * (torch.cuda.mem_get_info(device)[0] + mine)), False)
    return None if free is None else Limit(free, False)


def sentence(rung: Rung, fastest: Rung, batch: int, forecast: Forecast, limit: Limit) -> tuple[str, bool]:
    """Says what was chosen and why; also returns whether it fits."""
    needed, chosen = forecast.total(fastest), forecast.total(rung)
    fits = chosen <= limit.bytes
    if rung == fastest and fits:
        return f"Memory: about {size_in_words(needed)} of {limit.words()}, with {rung.words(batch)}.", True
    least = f"about {size_in_words(chosen)}"
    if rung == fastest:
        return f"Memory: {least} are needed with {rung.words(batch)}, and {limit.words()}.", False
    start = f"Memory: about {size_in_words(needed)} would be needed, and {limit.words()}; so with {rung.words(batch)}: "
    return (start + f"{least}." if fits else start + f"{least}, which is still too much."), fits


def leave_device(parts: Parts, trained: Iterable[str], device: torch.device) -> list[str]:
    """Moves the VAE and those text encoders that do not train to the CPU; returns the names of what was moved.

    Drawing brings the VAE back for its time; texts are encoded where the encoders are.

    Args:
        parts: the base; latents and text states are in the cache.
        trained: components that carry adapters.
        device: where training runs; on a CPU nothing is won and nothing is done.
    """
    if device.type == "cpu":
        return []
    stays = set(trained)
    leaving = {"vae": parts.vae, **{n: e for n, e in parts.text_encoders.items() if n not in stays}}
    for module in leaving.values():
        nn.Module.to(module, "cpu")  # diffusers' own `to` gives advice
    empty_cache(device)
    return list(leaving)


def taken(device: torch.device) -> int:
    """Returns the bytes that this process holds: of tensors on a GPU, of everything in main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def make_ladder(
    parts: Parts,
    config: Config,
    *,
    adapters: Mapping[str, Lora],
    numbers: int,
    batch: int,
    size: tuple[int, int],
    texts: Texts,
    recorded: Mapping[str, Any] | None,
    reporter: Reporter,
    world: World,
) -> Ladder:
    """Chooses where a run begins on its ladder, and puts those savings to work.

    On a CPU nothing is saved unless a setting asks for it; too little memory is said.

    Args:
        parts: the base, adapters in place; what can leave the device has left.
        config: the settings.
        adapters: those of the denoiser, by path.
        numbers: how many numbers train.
        batch: pictures of a batch in this process.
        size: width and height in pixels of the largest pictures.
        texts: tells the shapes of conditioning.
        recorded: the rung of a checkpoint, if a run is resumed.
        reporter: told what was chosen.
        world: the processes that train together; all take what the first one chose, and stay there.

    Raises:
        TrainingError: if a resumed run had the base in a number format that the settings do not reach.
    """
    settings, device = config.train, parts.device
    if settings.offload == "on" and device.type == "cpu":
        reporter.warn("train.offload saves nothing on a cpu and takes time; leave it out")
    ladder = rungs(settings, batch, device)
    at = recorded_rung(ladder, recorded)
    now = taken(device)
    limit = memory_limit(settings.memory, device, psutil.virtual_memory().available + now)
    future = round(numbers * (4 + MOMENT_BYTES[config.optimizer.optimizer]))
    foreseen = None
    if limit is not None and now + future + ladder[0].micro_batch * _at_most(parts, size) > limit.bytes:
        side = size[1], size[0]
        told = texts.states([""]) | parts.family.condition_sizes([PictureSize(side, (0, 0), side)])
        base = sum(p.numel() * p.element_size() for p in parts.denoiser.parameters() if not p.requires_grad)
        foreseen = forecast(parts, adapters, size, told, max(0, now - base) + future)
        if device.type == "cuda" or limit.given:
            at = max(at, first_that_fits(ladder, foreseen, limit.bytes))
    at = world.first(lambda: at)
    if limit is not None and foreseen is not None:
        said, fits = sentence(ladder[at], ladder[0], batch, foreseen, limit)
        (reporter.say if fits else reporter.warn)(said)
    return Ladder(
        ladder if world.size == 1 else ladder[: at + 1],
        at,
        parts.denoiser,
        device,
        batch=batch,
        dropout=config.lora.dropout > 0,
        reporter=reporter,
        limit=limit.bytes if limit and limit.given else None,
        forecast=foreseen,
    )


def _at_most(parts: Parts, size: tuple[int, int]) -> int:
    """Returns more bytes than a picture's activations take, without looking at the denoiser."""
    denoiser: Any = parts.denoiser
    positions = size[0] * size[1] // parts.vae_factor**2
    return AT_MOST * positions * denoiser.config.block_out_channels[0] * parts.dtype.itemsize
