"""A picture depends on its prompt and seed alone, and drawing leaves the modules as they were."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pipelines import their_pipeline

from sdlora.errors import ConfigError, ModelError
from sdlora.sampling import pipeline
from sdlora.sampling.pipeline import defaults_for, draw, draw_latents
from sdlora.sampling.prompts import Prompt
from sdlora.sampling.samplers import make_scheduler

CAT = Prompt("a cat", "a dog", 64, 64, 1, 4.0, 2, "Euler a")


@pytest.fixture
def latents(monkeypatch):
    """Collects what is decoded: latents in fp32, in which differences of 1e-4 are visible."""
    seen = []
    decode = pipeline.decode

    def record(parts, latents, prompts):
        seen.extend(one.clone() for one in latents)
        return decode(parts, latents, prompts)

    monkeypatch.setattr(pipeline, "decode", record)
    return seen


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler a", "DPM++ 2M SDE Karras", "DDPM"])
def test_a_batch_equals_one_by_one(tiny_parts, latents, sampler):
    prompts = [replace(CAT, seed=s, text=t, sampler=sampler) for s, t in [(1, "a cat"), (2, "a hill"), (1, "x")]]
    together = draw(tiny_parts, prompts, batch_size=3)
    alone = [draw(tiny_parts, [p])[0] for p in reversed(prompts)][::-1]
    for a, b in zip(latents[:3], latents[3:][::-1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


@pytest.mark.parametrize("sampler", ["Euler a", "DPM2 a", "DPM++ 2M SDE", "DDPM"])
def test_what_a_batch_changes_is_rounding_only(tiny_parts, latents, sampler):
    """In float64 the difference all but vanishes, also where noise is added on the way."""
    for component in tiny_parts.components.values():
        component.double()
    prompts = [replace(CAT, seed=s, text=t, sampler=sampler) for s, t in [(1, "a cat"), (2, "a hill")]]
    draw(tiny_parts, prompts)
    draw(tiny_parts, prompts, batch_size=1)
    for a, b in zip(latents[:2], latents[2:], strict=True):
        # Some schedulers compute in fp32 inside, equally for both.
        assert (a - b).abs().max() <= 1e-7 * b.abs().max()


def test_pictures_come_in_the_order_of_the_prompts_whatever_is_drawn_together(tiny_parts):
    prompts = [CAT, replace(CAT, width=96), replace(CAT, steps=1), replace(CAT, seed=9), replace(CAT, height=72)]
    done = []
    images = draw(tiny_parts, prompts, on_image=done.append)
    assert [image.size for image in images] == [(64, 64), (96, 64), (64, 64), (64, 64), (64, 72)]
    assert sum(done) == len(prompts)
    for prompt, image in zip(prompts, images, strict=True):
        difference = np.asarray(image, np.int16) - np.asarray(draw(tiny_parts, [prompt])[0], np.int16)
        assert np.abs(difference).max() <= 1


def test_a_batch_that_does_not_fit_is_cut_in_halves(tiny_parts, latents, monkeypatch):
    denoise, sizes = pipeline._denoise, []

    def small_only(parts, batch, encoded, on_step):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return denoise(parts, batch, encoded, on_step)

    prompts = [replace(CAT, seed=s, text=t) for s, t in enumerate(["a cat", "a hill", "a dog", "x", "y"])]
    draw(tiny_parts, prompts, batch_size=5)
    monkeypatch.setattr(pipeline, "_denoise", small_only)
    draw(tiny_parts, prompts, batch_size=5)
    assert sizes == [5, 2, 3, 1, 2]
    for whole, cut in zip(latents[:5], latents[5:], strict=True):
        torch.testing.assert_close(whole, cut, atol=1e-4, rtol=0)


def test_a_single_picture_that_does_not_fit_is_an_error(tiny_parts, monkeypatch):
    def never(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pipeline, "_denoise", never)
    with pytest.raises(torch.OutOfMemoryError):
        draw(tiny_parts, [CAT, CAT])


def test_what_a_step_raises_ends_the_drawing(tiny_parts):
    tiny_parts.denoiser.train()
    steps, done = [], []

    def step():
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_latents(tiny_parts, [CAT] * 3, batch_size=1, on_step=step, on_image=done.append)
    assert done == [1]  # two steps a picture
    assert tiny_parts.denoiser.training


def test_without_guidance_the_denoiser_sees_each_picture_once(tiny_parts, latents):
    seen = []
    tiny_parts.denoiser.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    prompt = replace(CAT, sampler="DDIM", cfg=1.0, steps=3)
    draw(tiny_parts, [prompt, replace(prompt, seed=2)])
    assert seen == [2, 2, 2]
    pipe = their_pipeline(tiny_parts, make_scheduler("DDIM", tiny_parts.scheduler_config))
    generator = torch.Generator().manual_seed(1)
    size = {"width": 64, "height": 64, "num_inference_steps": 3, "output_type": "latent"}
    theirs = pipe("a cat", guidance_scale=1.0, generator=generator, **size).images[0]
    torch.testing.assert_close(latents[0], theirs, atol=1e-4, rtol=0)


def test_seed_text_and_negative_each_matter(tiny_parts, latents):
    draw(tiny_parts, [CAT, replace(CAT, seed=2), replace(CAT, text="a hill"), replace(CAT, negative="")])
    assert all(not torch.allclose(latents[0], other, atol=1e-4) for other in latents[1:])


def test_it_agrees_with_diffusers_own_pipeline(tiny_parts, latents):
    """Texts, guidance, noise and steps are those of StableDiffusionPipeline called by itself."""
    draw(tiny_parts, [replace(CAT, sampler="DDIM", steps=3)])
    pipe = their_pipeline(tiny_parts, make_scheduler("DDIM", tiny_parts.scheduler_config))
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    theirs = pipe(
        "a cat",
        negative_prompt="a dog",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images[0]
    torch.testing.assert_close(latents[0], theirs, atol=1e-4, rtol=0)


def test_clip_skip_is_the_familys(tiny_parts, latents):
    """Ours counts from 1, the last layer; both prompts are encoded so, as in the WebUI."""
    prompt = replace(CAT, sampler="DDIM")
    for skip in (1, 2):
        draw(tiny_parts, [prompt], clip_skip=skip)
        states = tiny_parts.family.encode_prompts(tiny_parts, ["a cat", "a dog"], skip)["states"]
        theirs = their_pipeline(tiny_parts, make_scheduler("DDIM", tiny_parts.scheduler_config))(
            prompt_embeds=states[:1],
            negative_prompt_embeds=states[1:],
            width=64,
            height=64,
            num_inference_steps=2,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images[0]
        torch.testing.assert_close(latents[-1], theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(latents[0], latents[1], atol=1e-4)


def test_each_modules_mode_is_restored(tiny_parts):
    tiny_parts.denoiser.train()
    tiny_parts.denoiser.mid_block.eval()
    modules = [m for c in (*tiny_parts.components.values(), tiny_parts.vae) for m in c.modules()]
    before = [m.training for m in modules]
    assert len(set(before)) == 2
    during = []
    tiny_parts.denoiser.conv_in.register_forward_hook(
        lambda m, i, o: during.append((m.training, torch.is_grad_enabled()))
    )
    draw(tiny_parts, [CAT])
    assert set(during) == {(False, False)}
    assert [m.training for m in modules] == before


def test_numbers_that_are_not_finite_are_refused_and_modes_restored(tiny_parts):
    tiny_parts.denoiser.train()
    with torch.no_grad():
        tiny_parts.denoiser.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"denoiser .*not finite .*'a cat', seed 1"):
        draw(tiny_parts, [CAT])
    assert tiny_parts.denoiser.training


def test_a_vae_that_overflows_is_named(tiny_parts):
    with torch.no_grad():
        tiny_parts.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match="the VAE returned"):
        draw(tiny_parts, [CAT])


def test_a_bf16_denoiser_draws_from_the_same_noise(tiny_parts, latents):
    draw(tiny_parts, [replace(CAT, steps=1)])
    tiny_parts.denoiser.to(torch.bfloat16)
    tiny_parts.text_encoders["text_encoder"].to(torch.bfloat16)
    draw(tiny_parts, [replace(CAT, steps=1)])
    full, half = (one.float().flatten() for one in latents)
    assert torch.corrcoef(torch.stack([full, half]))[0, 1] > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 60}, "width must be a multiple of 8, got 60"),
        ({"height": 0}, "height must be a multiple of 8, got 0"),
        ({"seed": None}, "says no seed"),
        ({"sampler": "nothing"}, "unknown sampler"),
        ({"steps": 1000}, "steps must be from 1 to 999, got 1000"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_drawn(tiny_parts, change, message):
    done = []
    with pytest.raises(ConfigError, match=message):
        draw(tiny_parts, [CAT, replace(CAT, **change)], on_image=done.append)
    assert not done


def test_the_default_size_is_the_bases_own(tiny_parts):
    assert defaults_for(tiny_parts) == (64, 64)
