"""Weights that wait elsewhere: the same results bit for bit, two blocks there at most, and no block late twice."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sdlora.adapters import Target, find_layers, inject
from sdlora.adapters.lora import Lora
from sdlora.frozen.offloaded import offload
from sdlora.frozen.quantized import FORMATS, quantize

CPU = torch.device("cpu")


class Body(nn.Module):
    """Parts that are called in another order than they stand in."""

    def __init__(self, checkpoints=False):
        super().__init__()
        self.entry = nn.Linear(12, 12)
        self.late = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 12)) for _ in range(3))
        self.early = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.SiLU()) for _ in range(2))
        self.checkpoints = checkpoints

    def forward(self, x):
        x = self.entry(x)
        for part in (*self.early, *self.late):
            x = x + (checkpoint(part, x, use_reentrant=False) if self.checkpoints else part(x))
        return x


def body(checkpoints, form):
    torch.manual_seed(5)
    model = Body(checkpoints)
    adapters = inject(model, find_layers(model, [Target(endings=("0",))]), lambda path, layer: Lora(layer, 2))
    for adapter in adapters.values():
        nn.init.normal_(adapter.up)
    if form:
        quantize(model, FORMATS[form], lambda path: path == "entry")
    return model.train(), adapters


def block_of(path):
    parts = path.split(".")
    return None if path == "entry" else ".".join(parts[:2])


@pytest.mark.parametrize("form", [None, "int8", "nf4"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_results_are_the_same_bit_for_bit_and_after_one_step_no_block_is_late(checkpoints, form):
    x = torch.randn(4, 12)
    results = []
    for away in (False, True):
        model, adapters = body(checkpoints, form)
        traffic = offload(model, CPU, block_of) if away else None
        for step in range(3):
            for adapter in adapters.values():
                adapter.down.grad = adapter.up.grad = None
            late = traffic.late if traffic else 0
            model(x).square().mean().backward()
            if traffic:
                assert len(traffic._there) <= 2
                assert step < 2 or traffic.late == late
        results.append([p.grad for a in adapters.values() for p in (a.down, a.up)])
        if traffic:
            assert len(traffic.blocks) == 5
            kept = {name for name, _ in model.named_parameters() if name.endswith("weight")}
            assert kept == {"entry.weight"}
            assert not dict(model.named_buffers())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
