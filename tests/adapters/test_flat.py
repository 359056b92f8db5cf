import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdlora.adapters import FlatParameters, Lora, Target, find_layers, inject


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(4, 6, 3, padding=1)
        self.strided = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 8, 1)
        self.linear = nn.Linear(8, 10)

    def forward(self, x):
        return self.linear(self.point(self.strided(self.wide(x))).flatten(2).transpose(1, 2))


def adapted(dtype=torch.float32, dropout=0.0, alpha=3.0):
    torch.manual_seed(0)
    model = Block().to(dtype)
    adapters = inject(model, find_layers(model, [Target()]), lambda path, layer: Lora(layer, 2, alpha, dropout))
    for adapter in adapters.values():
        nn.init.normal_(adapter.up, std=0.3)
    model.train()
    return model, adapters


def plainly(adapter, x):
    """The same by autograd alone, as it stands in the paper."""
    y = adapter.base(x)
    if isinstance(adapter.base, nn.Conv2d):
        how = adapter.base.stride, adapter.base.padding
        return y + adapter.scale * F.conv2d(F.conv2d(x, adapter.down, None, *how), adapter.up)
    return y + adapter.scale * F.linear(F.linear(x, adapter.down), adapter.up)


def gradients(model, adapters, x, forward):
    for adapter in adapters.values():
        adapter.zero_grad()
        adapter.forward = forward(adapter)
    x = x.clone().requires_grad_()
    model(x).square().mean().backward()
    return [x.grad, *(p.grad for a in adapters.values() for p in (a.down, a.up))]


def test_the_change_in_one_node_has_the_gradients_of_autograd():
    model, adapters = adapted()
    x = torch.randn(2, 4, 8, 6)
    ours = gradients(model, adapters, x, lambda adapter: lambda y: Lora.forward(adapter, y))
    ours = [g.clone() for g in ours]
    theirs = gradients(model, adapters, x, lambda adapter: lambda y: plainly(adapter, y))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_flat_gradients_are_those_of_single_parameters(dropout, dtype):
    results = []
    for flattened in (False, True):
        model, adapters = adapted(dtype, dropout=dropout)
        if flattened:
            flat = FlatParameters({"model": adapters.values()}, dtype)
        for seed in (1, 2):  # two backward passes add up
            torch.manual_seed(seed)
            model(torch.randn(2, 4, 8, 6, dtype=dtype)).square().mean().backward()
            if flattened:
                flat.collect()
        results.append([p.grad.clone() for a in adapters.values() for p in (a.down, a.up)])
    rough = {"rtol": 0.03, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*results, **rough)
    total = sum(float(g.square().sum()) for g in results[0])
    assert float(flat.gradients.square().sum()) == pytest.approx(total, rel=1e-2 if rough else 1e-6)
    flat.zero_gradients()
    assert all(not p.grad.any() for a in adapters.values() for p in (a.down, a.up))


def test_parameters_are_views_so_that_a_step_on_the_buffer_moves_them():
    _, adapters = adapted()
    before = {path: adapter.down.detach().clone() for path, adapter in adapters.items()}
    flat = FlatParameters({"model": adapters.values()}, torch.float32)
    for path, adapter in adapters.items():
        assert torch.equal(adapter.down, before[path])
    with torch.no_grad():
        flat.parts["model"].add_(1)
    for path, adapter in adapters.items():
        torch.testing.assert_close(adapter.down.detach(), before[path] + 1)


def test_the_optimizer_step_over_the_buffer_is_that_over_many_tensors():
    finals = []
    for flattened in (False, True):
        model, adapters = adapted()
        parameters = [p for a in adapters.values() for p in (a.down, a.up)]
        if flattened:
            flat = FlatParameters({"model": adapters.values()}, torch.float32)
            parameters = list(flat.parts.values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=flattened)
        for seed in range(5):
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
            torch.manual_seed(seed)
            model(torch.randn(2, 4, 8, 6)).square().mean().backward()
            if not flattened:
                nn.utils.clip_grad_norm_(parameters, 0.5)
            else:
                nn.utils.clip_grad_norm_(flat.parts.values(), 0.5)
            optimizer.step()
        finals.append([p.detach().clone() for a in adapters.values() for p in (a.down, a.up)])
    torch.testing.assert_close(*finals)


def test_two_components_are_two_stretches_and_the_gaps_stay_zero():
    _, first = adapted()
    _, second = adapted()
    flat = FlatParameters({"a": first.values(), "b": second.values()}, torch.float32)
    assert flat.parts["a"].numel() + flat.parts["b"].numel() == flat.values.numel()
    used = sum(p.numel() for several in (first, second) for x in several.values() for p in (x.down, x.up))
    assert flat.values.count_nonzero() == used < flat.values.numel()


def test_in_bf16_masters_stay_fp32_and_gradients_point_where_fp32_does():
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, adapters = adapted(dtype)
        flat = FlatParameters({"model": adapters.values()}, dtype)
        torch.manual_seed(1)
        model(torch.randn(4, 4, 16, 16).to(dtype)).float().square().mean().backward()
        flat.collect()
        assert flat.values.dtype == flat.gradients.dtype == torch.float32
        results.append([p.grad.clone() for a in adapters.values() for p in (a.down, a.up)])
    for ours, exact in zip(*results[::-1], strict=True):
        assert F.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) >= 0.999


def test_copies_for_the_products_follow_the_values_when_refreshed():
    _, adapters = adapted(torch.bfloat16)
    flat = FlatParameters({"model": adapters.values()}, torch.bfloat16)
    adapter = adapters["linear"]
    with torch.no_grad():
        adapter.down.fill_(2)
    flat.refresh()
    down, _ = adapter.factors(torch.bfloat16)
    assert down.dtype == torch.bfloat16 and bool((down == 2).all())
