import pytest
import torch
from torch import nn

from sdlora.adapters import FlatParameters, Lora, find_layers, inject
from sdlora.adapters.inject import Target
from sdlora.frozen import freeze_layers, product, pull
from sdlora.frozen.packed import PackedConv2d, PackedLinear

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (2, 7, 24)),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), (7, 24)),
    "3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 10)),
    "1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 6, 10)),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 6, 10)),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2), (2, 8, 9, 9)),
    "more padding than kernel": (lambda: nn.Conv2d(8, 12, 1, padding=1), (2, 8, 6, 6)),
}


def packed(layer):
    return PackedLinear(layer) if isinstance(layer, nn.Linear) else PackedConv2d(layer)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_packed_layer_computes_what_the_layer_does_forward_and_backward(kind, dtype, channels_last):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().to(dtype).requires_grad_(False)
    x = torch.randn(shape).to(dtype)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = layer(x)
    weights = torch.randn(expected.shape).to(dtype)
    (gradient,) = torch.autograd.grad(expected, x, weights)
    ours = packed(layer)
    got = ours(x)
    (got_gradient,) = torch.autograd.grad(got, x, weights)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(got_gradient, gradient, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(product(layer, x), expected, **tolerance)
        torch.testing.assert_close(pull(layer, weights, x.shape), gradient, **tolerance)


def test_a_packed_convolution_takes_other_sizes_than_its_first():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    ours = packed(layer)
    for size in ((8, 8), (4, 12), (16, 8)):
        x = torch.randn(1, 4, *size)
        torch.testing.assert_close(ours(x), layer(x), rtol=1e-4, atol=1e-5)


def test_packing_reaches_the_layers_inside_adapters_and_they_are_still_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Conv2d(1, 2, 3)))
    adapters = inject(model, find_layers(model, [Target(layers=("Linear",))]), lambda path, layer: Lora(layer, 2))
    x = torch.randn(3, 8)
    before = model[0](x)
    assert freeze_layers(model, lambda path, layer: packed(layer)) == ["0.base", "1.0"]
    assert isinstance(adapters["0"].layer, PackedLinear)
    assert set(find_layers(model, [Target()])) == {"0", "1.0"}
    torch.testing.assert_close(model[0](x), before)
    assert adapters["0"].weight.shape == (8, 8)


def test_lora_on_a_packed_layer_learns_what_it_learns_on_the_layer():
    gradients = []
    for packs in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        adapters = inject(model, find_layers(model, [Target()]), lambda path, layer: Lora(layer, 2, alpha=3))
        for adapter in adapters.values():
            nn.init.normal_(adapter.up)
        flat = FlatParameters({"model": adapters.values()}, torch.float32)
        if packs:
            freeze_layers(model, lambda path, layer: packed(layer))
        model.train()
        model(torch.randn(5, 8)).square().mean().backward()
        gradients.append(flat.gradients.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].count_nonzero() > 60
