"""Every family computes what its diffusers pipeline does: texts, sizes, the denoiser, a whole picture."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from pipelines import their_pipeline

from sdlora.diffusion.schedule import Schedule
from sdlora.errors import ModelError
from sdlora.families import FAMILIES, Base, PictureSize, identify, load_parts
from sdlora.families.text import clip_skip_notes
from sdlora.sampling.pipeline import draw
from sdlora.sampling.prompts import Prompt
from sdlora.sampling.samplers import make_scheduler


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def folder(request):
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def parts(folder):
    return load_parts(Base("tiny", folder, "test"))


def theirs_of(parts):
    return their_pipeline(parts, make_scheduler("DDIM", parts.scheduler_config))


def test_prompts_are_encoded_as_the_pipeline_does(parts):
    ours = parts.family.encode_prompts(parts, ["a castle on a hill", "a cat"])
    theirs = theirs_of(parts).encode_prompt(
        ["a castle on a hill", "a cat"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(ours["states"], theirs[0], rtol=0, atol=1e-6)
    if "pooled" in ours:
        torch.testing.assert_close(ours["pooled"], theirs[2], rtol=0, atol=1e-6)
    assert ours["states"].shape[-1] == parts.denoiser.config.cross_attention_dim


def test_a_picture_is_the_pipelines(parts):
    prompt = Prompt("a castle", "blurry", 64, 64, 7, 4.0, 3, "DDIM")
    [ours] = draw(parts, [prompt])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    [theirs] = theirs_of(parts)(
        "a castle",
        negative_prompt="blurry",
        latents=noise,
        width=64,
        height=64,
        guidance_scale=4.0,
        num_inference_steps=3,
    ).images
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_sizes_reach_the_denoiser_in_the_pipelines_order(tiny_sdxl):
    parts = load_parts(Base("tiny", tiny_sdxl, "test"))
    size = PictureSize((600, 800), (0, 12), (64, 96))
    sizes = parts.family.condition_sizes([size])
    theirs = theirs_of(parts)._get_add_time_ids(
        (600, 800), (0, 12), (64, 96), torch.float32, parts.text_encoders["text_encoder_2"].config.projection_dim
    )
    torch.testing.assert_close(sizes["sizes"], theirs)
    noisy, t = torch.randn(1, 4, 8, 12), torch.tensor([500])
    texts = parts.family.encode_prompts(parts, ["a cat"])
    with torch.no_grad():
        told = parts.family.denoise(parts, noisy, t, texts | sizes)
        silent = parts.family.denoise(parts, noisy, t, texts)
        uncropped = parts.family.condition_sizes([PictureSize((64, 96), (0, 0), (64, 96))])
        torch.testing.assert_close(silent, parts.family.denoise(parts, noisy, t, texts | uncropped))
    assert (told - silent).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_other_families_are_told_nothing_of_sizes(name):
    assert FAMILIES[name].condition_sizes([PictureSize((1, 1), (0, 0), (1, 1))]) == {}


def test_xls_clip_skip_never_takes_a_later_layer_than_it_learned_with(tiny_sdxl):
    parts = load_parts(Base("tiny", tiny_sdxl, "test"))
    one, two = (parts.family.encode_prompts(parts, ["a cat"], skip)["states"] for skip in (1, 2))
    assert torch.equal(one, two)
    with pytest.raises(ModelError, match="clip skip 9 is too deep"):
        parts.family.encode_prompts(parts, ["a cat"], 9)


def test_v_and_zero_snr_can_be_forced(folder):
    base = Base("tiny", folder, "test")
    parts = load_parts(base, prediction="v_prediction", zero_snr="on")
    assert parts.schedule.prediction == "v_prediction"
    assert parts.schedule.alphas_cumprod[-1] == 0
    assert load_parts(base, zero_snr="off").schedule.alphas_cumprod[-1] > 0
    same = Schedule.from_config(DDIMScheduler.from_config(parts.scheduler_config).config)
    torch.testing.assert_close(same.alphas_cumprod, parts.schedule.alphas_cumprod)


def test_epsilon_and_zero_snr_are_told_not_to_go_together(folder):
    base = Base("tiny", folder, "test")
    notes = load_parts(base, prediction="epsilon", zero_snr="on").notes
    assert any("predicts the noise (epsilon)" in note and "--prediction v_prediction" in note for note in notes)
    for prediction, zero_snr in (("epsilon", "off"), ("v_prediction", "on")):
        assert not load_parts(base, prediction=prediction, zero_snr=zero_snr).notes


def test_a_clip_skip_without_effect_is_told(folder):
    parts = load_parts(Base("tiny", folder, "test"))
    states = [parts.family.encode_prompts(parts, ["a cat"], skip)["states"] for skip in (1, 2)]
    assert bool(clip_skip_notes(parts, 2)) == torch.equal(*states)
    assert not clip_skip_notes(parts, 1)


def test_the_family_is_told_from_the_folder_and_a_wrong_word_is_an_error(folder):
    family = identify(folder)
    assert identify(folder, family.name) is family
    wrong = next(name for name in FAMILIES if name != family.name)
    with pytest.raises(ModelError, match=f"is {family.title} .*, not {wrong}"):
        load_parts(Base("tiny", folder, "test"), family=wrong)


def test_long_prompts_are_read_whole_and_pad_the_negative_one(parts):
    text = ", ".join(["a castle on a hill"] * 30)
    states = parts.family.encode_prompts(parts, [text, ""], num_chunks=None, emphasis=True)["states"]
    assert states.shape[1] > 77 and states.shape[1] % 77 == 0
    first = parts.family.encode_prompts(parts, [text])["states"]
    assert first.shape[1] == 77
    two = parts.family.encode_prompts(parts, ["a cat"], num_chunks=2)["states"]
    assert two.shape[1] == 154
    torch.testing.assert_close(two[:, :77], parts.family.encode_prompts(parts, ["a cat"])["states"])
    torch.testing.assert_close(two[:, 77:], parts.family.encode_prompts(parts, [""])["states"])
