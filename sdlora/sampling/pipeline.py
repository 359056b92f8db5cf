"""Resolved prompts become pictures, through the family's diffusers pipeline and the very modules that train.

A picture depends on its prompt and seed, never on its neighbours: every one has a CPU generator of its own, so it looks
the same alone, in any batch and on any device, up to rounding. Text is encoded by the family, not by diffusers, so that
training and drawing agree about clip skip, and (word:1.2), BREAK and long prompts mean what they do in the WebUI.
Latents are decoded one by one in the VAE's own fp32.

Legend: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor, nn

from sdlora.errors import ConfigError, ModelError
from sdlora.families import Parts
from sdlora.families.text import count_chunks
from sdlora.sampling.prompts import Prompt
from sdlora.sampling.samplers import make_scheduler, sampler_name

_BATCH = 4


def defaults_for(parts: Parts) -> tuple[int, int]:
    """Returns the width and height in pixels that a base draws best."""
    return parts.resolution, parts.resolution


def draw(
    parts: Parts,
    prompts: Sequence[Prompt],
    *,
    clip_skip: int = 1,
    batch_size: int | None = None,
    on_image: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """Draws one picture for each prompt.

    Prompts that share size, steps, CFG scale and sampler are drawn together. The modules are put into eval mode and
    each gets its former mode back afterwards, also after an error.

    Args:
        parts: the base, with whatever adapters are in it.
        prompts: with nothing left open, see `prompts.resolve`.
        clip_skip: 1 takes the text encoder's last layer, n the n-th from the end; for negative prompts too.
        batch_size: pictures drawn at once; more is faster and needs more memory. Default 4.
        on_image: called with the number of pictures just finished, which is 1, after each; their sum is the progress.

    Returns:
        Pictures in the order of the prompts.

    Raises:
        ConfigError: before anything is drawn, if a prompt leaves something open, a side is no multiple of 8, the
            sampler is not known, or there are more steps than noise levels.
        ModelError: if the denoiser or the VAE returns numbers that are not finite.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    for prompt in prompts:
        _check(prompt, parts)
    pictures: dict[int, Image.Image] = {}
    with torch.no_grad(), _evaluating(*parts.components.values(), parts.vae):
        for positions in _batches(parts, prompts, batch_size or _BATCH):
            batch = [prompts[i] for i in positions]
            for i, latents in zip(positions, _draw_latents(parts, batch, clip_skip), strict=True):
                pictures[i] = _decode(parts, latents, prompts[i])
                if on_image is not None:
                    on_image(1)
    return [pictures[i] for i in range(len(prompts))]


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


def _batches(parts: Parts, prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, p in enumerate(prompts):
        # Texts are padded to the longest of a batch, which shows in the picture; so only equals are drawn together.
        chunks = max(count_chunks(parts, p.text), count_chunks(parts, p.negative))
        groups.setdefault((p.width, p.height, p.steps, p.cfg, p.sampler, chunks), []).append(i)
    for positions in groups.values():
        for start in range(0, len(positions), size):
            yield positions[start : start + size]


def _draw_latents(parts: Parts, batch: Sequence[Prompt], clip_skip: int) -> Tensor:
    """Returns scaled latents, (B, C, h, w), of prompts that share everything but texts and seed."""
    first = batch[0]
    assert first.sampler and first.width and first.height
    texts = [*(p.text for p in batch), *(p.negative for p in batch)]  # together, so that all get the same length
    encoded = parts.family.encode_prompts(parts, texts, clip_skip, num_chunks=None, emphasis=True)
    positive = {name: tensor[: len(batch)].to(parts.dtype) for name, tensor in encoded.items()}
    negative = {name: tensor[len(batch) :].to(parts.dtype) for name, tensor in encoded.items()}
    # The seed goes straight into the generator: the WebUI does the same when its noise comes from the CPU.
    generators = [torch.Generator().manual_seed(p.seed or 0) for p in batch]
    channels = int(parts.denoiser.config.in_channels)  # type: ignore[union-attr, arg-type]
    shape = (channels, first.height // parts.vae_factor, first.width // parts.vae_factor)
    # Drawn in fp32 and rounded then: in bf16 the same seed would give another picture.
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(parts.device, parts.dtype)
    pipe = parts.family.pipeline(parts, make_scheduler(first.sampler, parts.scheduler_config))
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        **parts.family.pipeline_inputs(positive, negative),
        latents=noise,
        generator=generators,
        width=first.width,
        height=first.height,
        num_inference_steps=first.steps,
        guidance_scale=first.cfg,
        output_type="latent",
    ).images
    for prompt, one in zip(batch, latents, strict=True):
        _require_finite(one, prompt, "denoiser", parts.dtype)
    return latents


def _decode(parts: Parts, latents: Tensor, prompt: Prompt) -> Image.Image:
    pixels = parts.family.decode_latents(parts, latents[None])[0].float()
    _require_finite(pixels, prompt, "VAE", next(parts.vae.parameters()).dtype)
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.cpu().numpy())


def _require_finite(values: Tensor, prompt: Prompt, who: str, dtype: torch.dtype) -> None:
    if torch.isfinite(values).all():
        return
    word = str(dtype).removeprefix("torch.")
    hint = "use --precision fp32" if dtype == torch.float16 else "check the base and the strengths of the LoRAs"
    raise ModelError(
        f"the {who} returned numbers that are not finite ({word}, prompt {prompt.text!r}, seed {prompt.seed}); {hint}"
    )


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    # Each submodule's own mode is kept: an adapter may train inside a network that does not.
    before = {m: m.training for module in modules for m in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for m, training in before.items():
            m.training = training
