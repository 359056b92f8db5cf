"""AdamW with moments of 8 bits goes where AdamW goes, and changes nothing in a step that must be skipped."""

import pytest
import torch

from sdlora.training.adamw8bit import BLOCK, AdamW8bit

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.01}


def gradient(p, step, orders=2):
    noise = torch.randn(len(p), generator=torch.Generator().manual_seed(step))
    scale = torch.logspace(-orders, 0, len(p))[torch.randperm(len(p), generator=torch.Generator().manual_seed(9))]
    return scale * (p - 1 + 0.5 * noise)


@pytest.mark.parametrize("size", [100, 3 * BLOCK + 7])
@pytest.mark.parametrize(("orders", "away"), [(0, 0.02), (2, 0.035), (6, 0.17)])
def test_it_goes_where_adamw_goes(size, orders, away):
    a, b = (torch.nn.Parameter(torch.zeros(size)) for _ in range(2))
    exact, small = torch.optim.AdamW([a], **SETTINGS), AdamW8bit([b], **SETTINGS)
    for step in range(60):
        for p, optimizer in ((a, exact), (b, small)):
            p.grad = gradient(p.detach(), step, orders)
            optimizer.step()
    assert float((a - b).detach().norm() / a.detach().norm()) < away


def test_a_step_whose_gradient_is_not_finite_changes_nothing_at_all():
    p = torch.nn.Parameter(torch.ones(3 * BLOCK))
    optimizer = AdamW8bit([p], **SETTINGS)
    p.grad = gradient(p.detach(), 0)
    optimizer.step()
    before = [p.detach().clone(), *(t.clone() for t in optimizer.state[p].values())]
    p.grad[5] = torch.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, [p.detach(), *optimizer.state[p].values()], strict=True))
    optimizer.found_inf = torch.zeros(())
    p.grad[5] = 1.0
    optimizer.step()
    assert not torch.equal(before[0], p.detach())


def test_it_keeps_a_quarter_of_the_moments():
    p = torch.nn.Parameter(torch.ones(8 * BLOCK))
    optimizer = AdamW8bit([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    kept = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
    assert kept == pytest.approx(8 * BLOCK * (2 + 8 / BLOCK), abs=4)
