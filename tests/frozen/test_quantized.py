"""Layers in fewer bits: the formats are what their papers say, and both ways go through the same restored weight."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdlora.adapters import Target, adapters_in, find_layers, inject, merged
from sdlora.adapters.lora import Lora
from sdlora.frozen import pull
from sdlora.frozen.quantized import BLOCK, FORMATS, NF4_LEVELS, QuantizedConv2d, QuantizedLinear, quantize

LAYERS = {
    "linear": (lambda: nn.Linear(96, 80), (2, 5, 96)),
    "no bias": (lambda: nn.Linear(33, 7, bias=False), (3, 33)),
    "conv": (lambda: nn.Conv2d(24, 40, 3, padding=1), (2, 24, 6, 5)),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (1, 8, 7, 9)),
    "point": (lambda: nn.Conv2d(48, 16, 1), (2, 48, 4, 4)),
}
# Relative error of the output. Measured for normal weights, 1280 x 1280: 0.0017, 0.0080, 0.026, 0.092.
WORST = {"bf16": 0.003, "int8": 0.015, "fp8": 0.04, "nf4": 0.13}


def make(layer, form):
    return (QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear)(layer, FORMATS[form])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_layer_is_the_plain_one_with_the_restored_weight(form, kind, dtype):
    build, shape = LAYERS[kind]
    layer = build().to(dtype).requires_grad_(False)
    layer.weight.normal_()
    small = make(layer, form)
    assert small.weight.shape == layer.weight.shape and small.weight.dtype == dtype
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    y = small(x)
    exact = layer(x.detach())
    assert float((y.detach() - exact).norm() / exact.norm()) < WORST[form] + (0.01 if dtype == torch.bfloat16 else 0)
    twin = build().to(dtype).requires_grad_(False)
    twin.load_state_dict({**layer.state_dict(), "weight": small.weight})
    assert torch.equal(y, twin(x))
    gradient = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, gradient)
    (expected,) = torch.autograd.grad(twin(x), x, gradient)
    assert torch.equal(got, expected)
    assert torch.equal(pull(small, gradient, x.shape), got)


@pytest.mark.parametrize("form", FORMATS)
def test_the_size_is_the_bytes_that_are_kept(form):
    layer = nn.Linear(100, 30)
    kept = sum(t.numel() * t.element_size() for t in make(layer, form).stored)
    assert kept == FORMATS[form].size(layer.weight.numel(), 30)


@pytest.mark.parametrize("form", ["int8", "fp8", "nf4"])
def test_zeros_stay_zeros_and_the_largest_number_is_kept(form):
    layer = nn.Linear(BLOCK, 2, bias=False)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1, 5] = -3.0
    weight = make(layer, form).weight
    assert torch.equal(weight[0], torch.zeros(BLOCK))
    assert float(weight[1, 5]) == pytest.approx(-3.0, rel=1e-6)


def test_int8_is_symmetric_absmax_per_output():
    layer = nn.Linear(50, 4)
    scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    expected = (layer.weight.detach() / scales).round().clamp(-127, 127) * scales
    torch.testing.assert_close(make(layer, "int8").weight.detach(), expected)


def test_nf4_takes_the_nearest_level_of_each_block():
    layer = nn.Linear(100, 3, bias=False)  # 300 numbers: four blocks and a part of a fifth
    flat = F.pad(layer.weight.detach().flatten(), (0, 20)).view(-1, BLOCK)
    scale, levels = flat.abs().amax(1, keepdim=True), torch.tensor(NF4_LEVELS)
    nearest = levels[((flat / scale)[..., None] - levels).abs().argmin(-1)] * scale
    torch.testing.assert_close(make(layer, "nf4").weight.detach(), nearest.flatten()[:300].view(3, 100))


def test_nf4_levels_are_quantiles_of_a_normal_distribution():
    # Source: QLoRA, equation 4, and appendix E; offset as in bitsandbytes' `create_normal_map`.
    offset, normal = 0.9677083, torch.distributions.Normal(0, 1)
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    torch.testing.assert_close(torch.tensor(NF4_LEVELS, dtype=torch.float64), levels / levels.max(), atol=1e-6, rtol=0)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_nf4_agrees_with_bitsandbytes():
    functional = importlib.import_module("bitsandbytes.functional")
    weight = torch.randn(32, 128)
    stored, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    layer = nn.Linear(128, 32, bias=False)
    layer.weight.data.copy_(weight)
    torch.testing.assert_close(make(layer, "nf4").weight.detach(), functional.dequantize_4bit(stored, state))


@pytest.mark.parametrize("form", ["int8", "fp8", "nf4"])
def test_a_cast_of_the_module_leaves_the_bits_alone(form):
    layer = make(nn.Linear(64, 8), form)
    before = layer.stored[0].clone()
    assert torch.equal(layer.to(torch.bfloat16).stored[0], before)


@pytest.mark.parametrize("form", FORMATS)
def test_lora_on_a_quantised_layer_trains_as_on_its_restored_weight(form):
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))
    twin = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))
    gradients = []
    quantize(model, FORMATS[form], lambda path: False)
    with torch.no_grad():
        for name in ("0", "2"):
            twin.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
            twin.get_submodule(name).bias.copy_(model.get_submodule(name).bias)
    x = torch.randn(5, 64)
    for one in (model, twin):
        make_lora = lambda path, layer: Lora(layer, 4, generator=torch.Generator().manual_seed(3))  # noqa: E731
        adapters = inject(one, find_layers(one, [Target()]), make_lora)
        for adapter in adapters.values():
            nn.init.normal_(adapter.up, generator=torch.Generator().manual_seed(4))
        one.train()
        one(x).square().sum().backward()
        gradients.append([p.grad for a in adapters.values() for p in (a.down, a.up)])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_quantising_reaches_inside_adapters_and_merging_leaves_them_there():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    inject(model, find_layers(model, [Target()]), lambda path, layer: Lora(layer, 2))
    done = quantize(model, FORMATS["int8"], lambda path: path.startswith("1"))
    assert done == ["0.base"]
    for adapter in adapters_in(model).values():
        nn.init.normal_(adapter.up)
    x = torch.randn(3, 16)
    expected = model(x)
    with merged(model) as out:
        assert out == 1
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x), expected)
    for strength in (0.0, 1.0):  # with nothing to add, an adapter may go or stay
        for adapter in adapters_in(model).values():
            adapter.strength = strength
        expected = model(x)
        with merged(model):
            torch.testing.assert_close(model(x), expected)
        assert torch.equal(model(x), expected)
