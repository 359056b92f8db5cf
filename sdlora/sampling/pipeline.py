"""Resolved prompts become pictures, through the very modules that train.

A picture depends on its prompt and seed, never on its neighbours: every one has a CPU generator of its own, so it looks
the same alone, in any batch and on any device, up to rounding, for sums are added up in another order there. Text is
encoded by the family, not by diffusers, so that training and drawing agree about clip skip, and (word:1.2), BREAK and
long prompts mean what they do in the WebUI.

Legend: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from sdlora.errors import ConfigError
from sdlora.families import Conditioning, Parts, PictureSize
from sdlora.sampling.decode import decode, require_finite
from sdlora.sampling.modes import evaluating
from sdlora.sampling.prompts import Prompt
from sdlora.sampling.room import pictures_at_once
from sdlora.sampling.samplers import make_scheduler, sampler_name
from sdlora.sampling.texts import EncodedTexts, encode_texts, prompt_chunks


def defaults_for(parts: Parts) -> tuple[int, int]:
    """Returns the width and height in pixels that a base draws best."""
    return parts.resolution, parts.resolution


def draw(
    parts: Parts,
    prompts: Sequence[Prompt],
    *,
    clip_skip: int = 1,
    batch_size: int | None = None,
    texts: EncodedTexts | None = None,
    on_image: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """Draws one picture for each prompt: `draw_latents`, then `decode`.

    Args:
        parts: the base, with whatever adapters are in it.
        prompts: with nothing left open, see `prompts.resolve`.
        clip_skip: as for `draw_latents`.
        batch_size: as for `draw_latents`.
        texts: as for `draw_latents`.
        on_image: as for `draw_latents`.

    Returns:
        Pictures in the order of the prompts.

    Raises:
        ConfigError: before anything is drawn, for a prompt that cannot be.
        ModelError: if the denoiser or the VAE returns numbers that are not finite.
    """
    latents = draw_latents(parts, prompts, clip_skip=clip_skip, batch_size=batch_size, texts=texts, on_image=on_image)
    return decode(parts, latents, prompts)


@torch.no_grad()
def draw_latents(
    parts: Parts,
    prompts: Sequence[Prompt],
    *,
    clip_skip: int = 1,
    batch_size: int | None = None,
    texts: EncodedTexts | None = None,
    on_step: Callable[[], None] | None = None,
    on_image: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Denoises one latent picture for each prompt.

    Prompts that share size, steps, CFG scale and sampler are drawn together, as many as `batch_size` says; where those
    do not fit into the memory, half as many. The modules are put into eval mode and each gets its former mode back
    afterwards, also after an error.

    Args:
        parts: the base, with whatever adapters are in it.
        prompts: with nothing left open, see `prompts.resolve`.
        clip_skip: 1 takes the text encoder's last layer, n the n-th from the end; for negative prompts too.
        batch_size: pictures drawn at once; more needs more memory. Default: what is fastest, see `room`.
        texts: texts that these very encoders have encoded before; further ones are added. Default: none.
        on_step: called before every step of every batch; what it raises ends the drawing.
        on_image: called with the number of pictures just finished; their sum is the progress.

    Returns:
        Scaled latents in the order of the prompts, each (C, h, w), on the denoiser's device.

    Raises:
        ConfigError: before anything is drawn, if a prompt leaves something open, a side is no multiple of 8, the
            sampler is not known, or there are more steps than noise levels.
        ModelError: if the denoiser returns numbers that are not finite.

    Source: Ho & Salimans 2022, arXiv:2207.12598, equation 6, for guidance; agrees with diffusers' pipelines.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    for prompt in prompts:
        _check(prompt, parts)
    texts = {} if texts is None else texts
    drawn: dict[int, Tensor] = {}
    with evaluating(parts.denoiser):
        for positions, chunks in _batches(parts, prompts, batch_size):
            batch = [prompts[i] for i in positions]
            written = [*(p.text for p in batch), *(p.negative for p in batch)]
            encoded = encode_texts(parts, written, clip_skip, chunks, texts)
            latents = _denoise_what_fits(parts, batch, encoded, on_step or _nothing)
            for i, one in zip(positions, latents, strict=True):
                require_finite(one, prompts[i], "denoiser", parts.dtype)
                drawn[i] = one
                if on_image is not None:
                    on_image(1)
    return [drawn[i] for i in range(len(prompts))]


def _nothing() -> None:
    pass


def _check(prompt: Prompt, parts: Parts) -> None:
    for name in ("width", "height", "seed", "cfg", "steps", "sampler"):
        value = getattr(prompt, name)
        if value is None:
            raise ConfigError(f"the prompt {prompt.text!r} says no {name}, and there is no default")
        if name in ("width", "height") and (value < parts.vae_factor or value % parts.vae_factor):
            wanted = f"a multiple of {parts.vae_factor}"
            raise ConfigError(f"{name} must be {wanted}, got {value} for the prompt {prompt.text!r}")
    sampler_name(prompt.sampler or "")
    levels = len(parts.schedule)
    if not 1 <= (prompt.steps or 0) < levels:  # as many steps as levels make diffusers' schedulers collide
        raise ConfigError(f"steps must be from 1 to {levels - 1}, got {prompt.steps} for the prompt {prompt.text!r}")


def _batches(parts: Parts, prompts: Sequence[Prompt], size: int | None) -> Iterator[tuple[list[int], int]]:
    """Yields positions of prompts that are drawn together, and their length in pieces of 75 tokens."""
    groups: dict[tuple[object, int], list[int]] = {}
    for i, p in enumerate(prompts):
        # Texts are padded to the longest of a batch, which shows in the picture; so only equals are drawn together.
        groups.setdefault(((p.width, p.height, p.steps, p.cfg, p.sampler), prompt_chunks(parts, p)), []).append(i)
    for (_, chunks), positions in groups.items():
        most = size or pictures_at_once(parts, prompts[positions[0]])
        for start in range(0, len(positions), most):
            yield positions[start : start + most], chunks


def _denoise_what_fits(
    parts: Parts, batch: Sequence[Prompt], encoded: Conditioning, on_step: Callable[[], None]
) -> Tensor:
    try:
        return _denoise(parts, batch, encoded, on_step)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Outside of the handler, which holds what did not fit.
    middle, whole = len(batch) // 2, len(batch)
    halves = []
    for part in (slice(0, middle), slice(middle, whole)):
        texts = {name: torch.cat([t[:whole][part], t[whole:][part]]) for name, t in encoded.items()}
        halves.append(_denoise_what_fits(parts, batch[part], texts, on_step))
    return torch.cat(halves)


def _denoise(parts: Parts, batch: Sequence[Prompt], encoded: Conditioning, on_step: Callable[[], None]) -> Tensor:
    """Returns scaled latents, (B, C, h, w), of prompts that share everything but texts and seed.

    Args:
        parts: the base.
        batch: B prompts.
        encoded: of 2 B texts, the negative ones last.
        on_step: called before every step.
    """
    first = batch[0]
    assert first.sampler and first.width and first.height and first.steps and first.cfg
    guided = first.cfg > 1
    side = (first.height, first.width)
    sizes = parts.family.condition_sizes([PictureSize(side, (0, 0), side)] * (2 * len(batch)))
    told = encoded | {name: tensor.to(parts.device) for name, tensor in sizes.items()}
    if not guided:
        told = {name: tensor[: len(batch)] for name, tensor in told.items()}
    # The seed goes straight into the generator: the WebUI does the same when its noise comes from the CPU.
    generators = [torch.Generator().manual_seed(p.seed or 0) for p in batch]
    scheduler = make_scheduler(first.sampler, parts.scheduler_config)
    scheduler.set_timesteps(first.steps, device=parts.device)
    random = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = _noise(parts, side, generators) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        on_step()
        given = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, t)
        output = parts.family.denoise(parts, given, t.expand(len(given)).to(given.device), told)
        if guided:
            positive, negative = output.chunk(2)
            output = negative + first.cfg * (positive - negative)
        latents = scheduler.step(output, t, latents, **random, return_dict=False)[0]
    return latents


def _noise(parts: Parts, side: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
    channels = int(parts.denoiser.config.in_channels)  # type: ignore[union-attr, arg-type]
    shape = (channels, side[0] // parts.vae_factor, side[1] // parts.vae_factor)
    # Drawn in fp32 and rounded then: in bf16 the same seed would give another picture.
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(parts.device, parts.dtype)
