"""Latents become the same pictures whatever decodes them, wherever the VAE lies, and however little memory there is."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from sdlora.errors import ModelError
from sdlora.sampling.decode import decode, quick_vae
from sdlora.sampling.pipeline import draw, draw_latents
from sdlora.sampling.prompts import Prompt

PROMPTS = [Prompt(text, "", 64, 64, 1, 4.0, 2, "Euler") for text in ("a cat", "a dog", "a hill")]


@pytest.fixture
def latents():
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(4, 8, 8, generator=rng) for _ in PROMPTS]


def test_drawing_is_denoising_and_decoding(tiny_parts):
    apart = decode(tiny_parts, draw_latents(tiny_parts, PROMPTS), PROMPTS)
    assert [image.tobytes() for image in apart] == [image.tobytes() for image in draw(tiny_parts, PROMPTS)]


def test_it_agrees_with_diffusers_vae(tiny_parts, latents):
    pictures = decode(tiny_parts, latents, PROMPTS)
    with torch.no_grad():
        theirs = tiny_parts.vae.decode(torch.stack(latents) / 0.18215).sample
    theirs = ((theirs.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    for ours, their in zip(pictures, theirs, strict=True):
        assert np.abs(np.asarray(ours, np.float32) - their).max() <= 0.51


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_sdxl"])
def test_there_is_a_taesd_for_every_family(request, name, latents):
    from sdlora.families import Base, load_parts

    parts = load_parts(Base("tiny", request.getfixturevalue(name), "test"))
    vae = quick_vae(parts)
    assert isinstance(vae, AutoencoderTiny)
    own = parts.vae
    pictures = decode(parts, latents, PROMPTS, vae)
    assert [image.size for image in pictures] == [(64, 64)] * 3
    assert parts.vae is own


def test_a_base_with_taesd_has_nothing_quicker(nano_parts):
    assert quick_vae(nano_parts) is None


def test_taesd_draws_what_the_vae_it_stands_for_would(nano_parts):
    """A picture that TAESD encodes comes back: its latents need no scaling."""
    from dataclasses import replace

    ramp = torch.linspace(-0.9, 0.9, 64).expand(3, 64, 64)
    with torch.no_grad():
        latents = nano_parts.vae.encode(ramp[None]).latents[0]
    other = torch.nn.Linear(1, 1)  # takes no part
    [picture] = decode(replace(nano_parts, vae=other), [latents], PROMPTS[:1], nano_parts.vae)
    expected = ((ramp + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(picture, np.float32) - expected).mean() < 10


def test_what_does_not_fit_is_decoded_on_the_cpu(tiny_parts, latents, monkeypatch):
    expected = decode(tiny_parts, latents, PROMPTS)
    own, calls = tiny_parts.vae.decode, []

    def decode_some(z):
        calls.append(z)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return own(z)

    monkeypatch.setattr(tiny_parts.vae, "decode", decode_some)
    tiny_parts.vae.train()
    pictures = decode(tiny_parts, latents, PROMPTS)
    assert [image.tobytes() for image in pictures] == [image.tobytes() for image in expected]
    assert len(calls) == 4
    assert tiny_parts.vae.training


def test_numbers_that_are_not_finite_are_refused(tiny_parts, latents):
    latents[1][0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"the VAE returned .*not finite \(float32, prompt 'a dog', seed 1\)"):
        decode(tiny_parts, latents, PROMPTS)
