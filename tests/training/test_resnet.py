"""Simplified residual blocks compute what diffusers' do, to the last bit."""

import copy

import torch
from diffusers.models.resnet import ResnetBlock2D

from sdlora.training.resnet import PlainResnet, is_plain, simplify_resnets


def run(denoiser, side):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, side, side, generator=rng).requires_grad_()
    states = torch.randn(2, 5, denoiser.config["cross_attention_dim"], generator=rng)
    y = denoiser(x, torch.tensor([3, 700]), encoder_hidden_states=states).sample
    return y, torch.autograd.grad(y.square().sum(), x)[0]


def test_a_simplified_denoiser_computes_the_same_bits(nano_parts):
    denoiser = nano_parts.denoiser
    simple = copy.deepcopy(denoiser)
    assert simplify_resnets(simple) == sum(type(m) is ResnetBlock2D for m in denoiser.modules()) > 20
    assert simplify_resnets(simple) == 0
    for mine, theirs in zip(run(simple, 16), run(denoiser, 16), strict=True):
        assert torch.equal(mine, theirs)
    assert simple.state_dict().keys() == denoiser.state_dict().keys()
    assert any(isinstance(m, PlainResnet) for m in copy.deepcopy(simple).modules())


def test_blocks_that_do_more_stay_as_they_are():
    plain = {"in_channels": 32, "temb_channels": 16}
    assert is_plain(ResnetBlock2D(**plain))
    others = [
        {"up": True},
        {"down": True},
        {"time_embedding_norm": "scale_shift"},
        {"output_scale_factor": 2.0},
        {"dropout": 0.1},
        {"skip_time_act": True},
        {"temb_channels": None},
    ]
    for other in others:
        assert not is_plain(ResnetBlock2D(**plain | other)), other
