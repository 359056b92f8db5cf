"""The decoder learns from what the base draws, and nothing else of the autoencoder changes."""

import json
from dataclasses import asdict

import diffusers
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sdlora.families import Base, Parts, load_parts
from sdlora.families.loading import NANO
from tools.pretrain_nano.concepts import Concept
from tools.pretrain_nano.decoder import School, redrawn, save, teach
from tools.pretrain_nano.model import load_taesd
from tools.style_bench.draw import CFG, STEPS

COLOURS = ("gold", "crimson", "teal", "navy", "black", "orange", "olive", "purple")


@pytest.fixture
def school(tmp_path, nano_parts) -> School:
    """Eight pictures in one flat colour each."""
    concepts = [Concept(f"{n:04x}", f"thing {n}", (), "objects", f"thing {n}", "learn") for n in range(8)]
    (tmp_path / "concepts.json").write_text(json.dumps([asdict(concept) for concept in concepts]))
    (tmp_path / "pictures/noto").mkdir(parents=True)
    for concept, colour in zip(concepts, COLOURS, strict=True):
        Image.new("RGB", (128, 128), colour).save(tmp_path / f"pictures/noto/{concept.code}.png")
    return School(tmp_path, nano_parts)


def pipeline_of(parts: Parts) -> diffusers.StableDiffusionImg2ImgPipeline:
    return diffusers.StableDiffusionImg2ImgPipeline(
        parts.vae,
        parts.text_encoders["text_encoder"],
        parts.tokenizers["text_encoder"],
        parts.denoiser,
        diffusers.DPMSolverMultistepScheduler.from_config(parts.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy's, at diffusers' own scheduler
def test_drawing_back_is_image_to_image_of_diffusers(nano_parts):
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    captions = ["castle, noto style", "dog face, twemoji style"]
    pipeline = pipeline_of(nano_parts)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        captions,
        pictures,
        strength=5 / STEPS,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    with torch.no_grad():
        clean = nano_parts.vae.encode(pictures * 2 - 1).latents
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    assert_close(redrawn(nano_parts, clean, noise, captions, 5), theirs, atol=1e-4, rtol=1e-4)


def test_a_lesson_is_a_function_of_the_step_and_fits_its_pictures(school, nano_parts):
    one, again, other = school.lesson(3, 4), school.lesson(3, 4), school.lesson(4, 4)
    assert torch.equal(one.latents, again.latents) and torch.equal(one.pictures, again.pictures)
    assert not torch.equal(one.latents, other.latents)
    for step in range(8):  # some of them in strange colours
        lesson = school.lesson(step, 4)
        with torch.no_grad():
            theirs = nano_parts.vae.encode(lesson.pictures).latents
        distances = torch.cdist(lesson.latents.flatten(1), theirs.flatten(1))  # shuffled, two of them may be alike
        assert torch.equal(distances.diagonal(), distances.amin(1))


def test_only_the_decoder_learns_and_the_folder_is_an_autoencoder(school, tmp_path):
    vae = load_taesd()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    lesson = school.lesson(0)

    def error() -> float:
        with torch.no_grad():
            return (vae.decode(lesson.latents).sample - lesson.pictures).abs().mean().item()

    untaught = error()
    teach(vae, school, 12)
    assert error() < 0.8 * untaught
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}
    save(vae, tmp_path / "vae")
    parts = load_parts(Base("nano", NANO, "test"), vae=str(tmp_path / "vae"))
    assert_close(parts.vae.decoder.layers[0].weight, vae.decoder.layers[0].weight.detach(), atol=1e-3, rtol=1e-3)


def test_the_embedded_base_decodes_the_latents_of_taesd():
    """Its encoder is TAESD's own, so latents, LoRAs and previews go together."""
    taesd, nano = load_taesd(), load_parts(Base("nano", NANO, "test")).vae
    for name, value in taesd.encoder.state_dict().items():
        assert torch.equal(value, nano.encoder.state_dict()[name])
    ramp = torch.linspace(-0.9, 0.9, 64).expand(1, 3, 64, 64)
    with torch.no_grad():
        latents = taesd.encode(ramp).latents
        assert (taesd.decode(latents).sample - ramp).abs().mean() < 0.1
        assert (nano.decode(latents).sample - ramp).abs().mean() < 0.1
