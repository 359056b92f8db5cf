"""Our schedule, noise and losses are those of diffusers and of the papers."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdlora.diffusion.losses import min_snr_weight, squared_error
from sdlora.diffusion.noise import gaussian_noise, generator
from sdlora.diffusion.schedule import Schedule
from sdlora.diffusion.timesteps import uniform_timestep

CONFIGS = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "v_prediction"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_schedule_is_that_of_diffusers(config):
    theirs = DDPMScheduler(**config)
    ours = Schedule.from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=1e-8)
    assert ours.prediction == theirs.config.prediction_type
    t = torch.tensor([0, len(ours) // 2, len(ours) - 2])
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    torch.testing.assert_close(ours.add_noise(latents, noise, t), theirs.add_noise(latents, noise, t))
    torch.testing.assert_close(ours.snr(t), compute_snr(theirs, t), rtol=1e-4, atol=1e-6)


def test_targets_are_noise_and_velocity():
    theirs = DDPMScheduler()
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    assert torch.equal(Schedule.from_config(theirs.config).target(latents, noise, t), noise)
    v = Schedule.from_config(theirs.config, "v_prediction").target(latents, noise, t)
    torch.testing.assert_close(v, theirs.get_velocity(latents, noise, t))


@pytest.mark.parametrize("config", [{"beta_schedule": "spiral"}, {"prediction_type": "sample"}])
def test_unknown_schedules_are_refused(config):
    with pytest.raises(ValueError, match="unknown"):
        Schedule.from_config(config)


def test_min_snr_is_the_papers_formula():
    snr = torch.tensor([0.0, 0.01, 1.0, 5.0, 50.0, 1000.0])
    epsilon = min_snr_weight(snr, "epsilon", gamma=5.0)
    torch.testing.assert_close(epsilon, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1, 0.005]))
    v = min_snr_weight(snr, "v_prediction", gamma=5.0)
    torch.testing.assert_close(v, snr.clamp(max=5) / (snr + 1))
    assert torch.equal(min_snr_weight(snr, "epsilon", gamma=0.0), torch.ones(6))


def test_the_two_predictions_weigh_the_same_error_of_the_picture_alike():
    # An error d in x0 is an error sqrt(snr) d in epsilon and sqrt(snr + 1) d in v: the weighted losses must agree.
    snr = torch.tensor([0.1, 1.0, 7.0, 100.0])
    epsilon = min_snr_weight(snr, "epsilon") * snr
    v = min_snr_weight(snr, "v_prediction") * (snr + 1)
    torch.testing.assert_close(epsilon, v)


def test_error_is_the_mean_over_each_sample():
    a, b = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(squared_error(a, b).mean(), torch.nn.functional.mse_loss(a, b))
    assert squared_error(a.half(), b.half()).dtype == torch.float32


def test_random_numbers_are_a_function_of_the_key():
    shape = (4, 8, 8)
    assert torch.equal(gaussian_noise(shape, generator(1, "a", 2)), gaussian_noise(shape, generator(1, "a", 2)))
    for other in [(2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a2")]:
        assert not torch.equal(gaussian_noise(shape, generator(1, "a", 2)), gaussian_noise(shape, generator(*other)))


def test_noise_offset_adds_a_constant_per_channel():
    plain = gaussian_noise((4, 8, 8), generator(1))
    shifted = gaussian_noise((4, 8, 8), generator(1), offset=0.1)
    difference = shifted - plain
    assert difference.flatten(1).std(1).max() < 1e-6
    assert difference.abs().max() > 0.001


def test_timesteps_cover_the_schedule_evenly():
    rng = generator(0)
    drawn = torch.tensor([uniform_timestep(10, rng) for _ in range(5000)])
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert (counts - 500).abs().max() < 100
