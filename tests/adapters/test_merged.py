"""`merged`: what LoRA claims, no added latency, and not a bit of the base changes for it."""

import copy

import pytest
import torch
from torch import nn

from sdlora.adapters import Lora, Target, adapters_in, find_layers, inject, merge, merged, strength


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.Flatten(2), nn.Linear(36, 5))
    model.to(dtype)
    adapters = inject(model, find_layers(model, [Target()]), lambda path, layer: Lora(layer, 2, 3.0))
    randomize(adapters)
    return model, adapters


def randomize(adapters):
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.up.copy_(0.3 * torch.randn(adapter.up.shape, generator=rng))


def x(dtype=torch.float32):
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inside_it_is_the_merged_model_and_outside_the_very_same_one(dtype):
    model, adapters = network(dtype)
    for_good = copy.deepcopy(model)
    merge(for_good)
    objects = {path: (a, a.layer, a.weight, a.weight.data_ptr()) for path, a in adapters.items()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = model(x(dtype))
    with torch.no_grad(), merged(model) as count:
        assert count == 3
        assert not adapters_in(model)
        assert torch.equal(model(x(dtype)), for_good(x(dtype)))
        assert {m.weight.dtype for m in model if hasattr(m, "weight")} == {dtype}
    assert torch.equal(model(x(dtype)), before)
    assert {path: (a, a.layer, a.weight, a.weight.data_ptr()) for path, a in adapters_in(model).items()} == objects
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_nothing_is_left_behind_by_an_error():
    model, adapters = network()
    weights = [a.weight for a in adapters.values()]
    with pytest.raises(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert adapters_in(model) == adapters
    assert all(a.weight is weight for a, weight in zip(adapters.values(), weights, strict=True))


def test_several_on_one_layer_are_added_up_and_rounded_once():
    model, first = network(torch.bfloat16)
    second = inject(model, {"4": model[4]}, lambda path, layer: Lora(layer, 1, 4.0))
    randomize(second)
    second["4"].strength = -0.5
    weight = first["4"].weight.float() + first["4"].delta_weight() - 0.5 * second["4"].delta_weight()
    with merged(model):
        torch.testing.assert_close(model[4].weight, weight.bfloat16(), rtol=0, atol=0)
    assert model[4] is second["4"]
    assert model[4].base is first["4"]


def test_strength_zero_is_the_base_without_a_second_weight():
    model, adapters = network()
    with strength(adapters, 0.0), merged(model, room=0) as count:
        assert count == 3
        assert all(model.get_submodule(path) is a.layer for path, a in adapters.items())
        assert all(model.get_submodule(path).weight is a.weight for path, a in adapters.items())


def test_a_layer_that_takes_no_change_and_one_without_room_keep_their_adapters():
    model, adapters = network()
    running = model(x())
    model[0].layer.can_merge = False
    room = 4 * adapters["2"].weight.numel()
    with torch.no_grad(), merged(model, room=room) as count:
        assert count == 1
        assert adapters_in(model).keys() == {"0", "4"}
        torch.testing.assert_close(model(x()), running)
    assert adapters_in(model) == adapters


def test_weights_that_are_no_floating_point_numbers_are_left_alone():
    model, _ = network()
    model[4].layer.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with merged(model) as count:
        assert count == 2


def test_training_goes_on_as_if_nothing_had_been():
    def train(interrupted):
        model, adapters = network()
        optimizer = torch.optim.SGD([p for a in adapters.values() for p in (a.down, a.up)], lr=0.01)
        for _ in range(3):
            model(x()).square().mean().backward()
            if interrupted:
                with torch.no_grad(), merged(model):
                    model(x())
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    once, twice = train(False), train(True)
    assert all(torch.equal(once[key], twice[key]) for key in once)
