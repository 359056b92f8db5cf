"""Every sampler in the table draws, keeps what the checkpoint was trained with, and ignores how it was last sampled."""

from dataclasses import replace

import diffusers
import pytest
import torch

from sdlora.diffusion.schedule import Schedule
from sdlora.errors import ConfigError
from sdlora.families import Base, Parts, load_parts
from sdlora.sampling.pipeline import draw
from sdlora.sampling.prompts import Prompt
from sdlora.sampling.samplers import SAMPLERS, make_scheduler, sampler_name, split_schedule

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def denoise_perfectly(name: str, config: dict, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a sampler with a denoiser that knows the picture; returns the picture and what came out."""
    schedule = Schedule.from_config(config)
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(steps)
    picture = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.5
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        # At fractional timesteps (second-order and Karras steps) alpha-bar lies between two entries.
        low = schedule.alphas_cumprod[int(t)].double()
        high = schedule.alphas_cumprod[min(int(t) + 1, 999)].double()
        bar = torch.exp(torch.lerp(low.clamp(1e-9).log(), high.clamp(1e-9).log(), float(t) - int(t)))
        epsilon = (given - bar.sqrt() * picture) / (1 - bar).sqrt()
        v = bar.sqrt() * epsilon - (1 - bar).sqrt() * picture
        output = (epsilon if schedule.prediction == "epsilon" else v).float()
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return picture, x


@pytest.fixture(scope="module")
def parts(tiny_base) -> Parts:
    """The tiny base, loaded once: drawing leaves it as it was."""
    return load_parts(Base("tiny", tiny_base, "test"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_with_either_prediction(parts, name, prediction):
    config = {**parts.scheduler_config, "prediction_type": prediction}
    prompt = Prompt("a cat", "", 32, 32, 1, 3.0, 3, name)
    [image] = draw(replace(parts, scheduler_config=config), [prompt])  # which refuses what is not finite
    assert image.size == (32, 32)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_gives_the_picture(name, prediction):
    picture, drawn = denoise_perfectly(name, {**SD15, "prediction_type": prediction}, 12)
    # DDIM and PLMS stop at the first noise level instead of at none; ancestral noise ends as small.
    torch.testing.assert_close(drawn, picture, atol=0.12, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_begins_at_the_last_timestep_and_stays_finite(name):
    config = {**SD15, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(5)
    assert float(scheduler.timesteps[0]) >= 998
    assert scheduler.alphas_cumprod[-1] < 1e-6
    picture, drawn = denoise_perfectly(name, config, 6)
    assert torch.isfinite(drawn).all()
    assert (drawn - picture).abs().max() < 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_levels_are_those_the_checkpoint_was_trained_with(name):
    scheduler = make_scheduler(name, {**SD15, "prediction_type": "v_prediction"})
    torch.testing.assert_close(scheduler.alphas_cumprod, Schedule.from_config(SD15).alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["DDIM", "Euler", "DPM++ 2M", "UniPC"])
def test_how_the_checkpoint_was_sampled_does_not_matter(name):
    odd = {**SD15, "use_karras_sigmas": True, "timestep_spacing": "leading", "solver_order": 3, "clip_sample": True}
    plain, other = make_scheduler(name, SD15), make_scheduler(name, odd)
    plain.set_timesteps(7)
    other.set_timesteps(7)
    assert torch.equal(plain.timesteps, other.timesteps)
    assert {k: v for k, v in plain.config.items() if k[0] != "_"} == {
        k: v for k, v in other.config.items() if k[0] != "_"
    }


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy's, at diffusers' own scheduler
def test_the_table_agrees_with_diffusers_own_defaults_for_sd15():
    for name, cls in (("Euler", "EulerDiscreteScheduler"), ("DDIM", "DDIMScheduler")):
        ours, theirs = make_scheduler(name, SD15), getattr(diffusers, cls).from_config(SD15)
        ours.set_timesteps(10)
        theirs.set_timesteps(10)
        assert torch.equal(ours.timesteps, theirs.timesteps)


def test_trailing_spacing_of_the_checkpoint_is_kept():
    assert make_scheduler("DPM++ 2M", {**SD15, "timestep_spacing": "trailing"}).config.timestep_spacing == "trailing"


def test_steps_that_round_to_one_timestep_do_not_run_off_the_end():
    _, drawn = denoise_perfectly("DPM++ 2M Karras", {**SD15, "beta_schedule": "squaredcos_cap_v2"}, 7)
    assert torch.isfinite(drawn).all()


@pytest.mark.parametrize(
    ("given", "name"),
    [("dpm++ 2m karras", "DPM++ 2M Karras"), ("EULER A", "Euler a"), ("k_euler_a", "Euler a"), (" ddim ", "DDIM")],
)
def test_case_and_kohyas_spellings_are_forgiven(given, name):
    assert sampler_name(given) == name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Euler b", r"unknown sampler 'Euler b'; did you mean Euler a\?"),
        ("xyzzy", r"unknown sampler 'xyzzy'; known: Euler a"),
        ("LMS", "LMS .*needs the package scipy; try DPM"),
        ("DPM++ SDE Karras", "needs the package torchsde; try DPM\\+\\+ 2M SDE"),
    ],
)
def test_unknown_samplers_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        make_scheduler(given, SD15)


def test_names_split_into_sampler_and_schedule():
    assert split_schedule("DPM++ 2M Karras") == ("DPM++ 2M", "Karras")
    assert split_schedule("Euler a") == ("Euler a", "Uniform")
