"""A change is cut where the exact singular value decomposition would cut it, without decomposing it whole."""

import pytest
import torch
from files.random_lora import delta, random_module, relative

from sdlora.files import svd
from sdlora.files.svd import by_energy, by_rank, by_ratio, of_change, of_product


def falling(shape: tuple[int, int], power: float) -> torch.Tensor:
    """Returns a matrix whose singular values are 1, 2^-power, 3^-power, ..."""
    u, s, vt = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    return (u * torch.arange(1, len(s) + 1) ** -power) @ vt


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (4, 40), (16, 8, 3, 3), (5, 2)])
def test_a_products_decomposition_is_that_of_the_product(shape):
    weights = random_module("a", shape, 6, 2.0, 0.3, 0)
    spectrum = of_product(weights.down, weights.up, weights.scale)
    exact = torch.linalg.svdvals(delta(weights))
    assert len(spectrum.s) == min(6, shape[0], delta(weights).shape[1])
    torch.testing.assert_close(spectrum.s, exact[: len(spectrum.s)], rtol=1e-9, atol=1e-12)
    assert spectrum.total == pytest.approx(exact.square().sum().item(), rel=1e-9)
    down, up = spectrum.factors(len(spectrum.s))
    assert relative(up @ down, delta(weights)) < 1e-9


@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
@pytest.mark.parametrize("rank", [1, 8, 90, 150])  # by random directions, and exactly
def test_a_cut_change_is_as_near_as_the_best(shape, rank):
    change = falling(shape, 1.0)
    exact = torch.linalg.svdvals(change.double()).square()
    spectrum = of_change(change, by_rank(rank), rank, "a")
    down, up = spectrum.factors(rank)
    best = exact[rank:].sum().sqrt().item()
    assert torch.linalg.vector_norm(change - up @ down).item() == pytest.approx(best, rel=2e-3)
    assert spectrum.carried(rank) == pytest.approx(exact[:rank].sum().item(), rel=1e-4)
    assert spectrum.total == pytest.approx(exact.sum().item(), rel=1e-5)


@pytest.mark.parametrize("rank", [4, 100])
def test_a_change_of_low_rank_is_found_whole(rank):
    rng = torch.Generator().manual_seed(1)
    change = torch.randn(300, 4, generator=rng) @ torch.randn(4, 250, generator=rng)
    down, up = of_change(change, by_rank(rank), rank, "a").factors(rank)
    assert relative(up @ down, change) < 1e-5
    assert down.isfinite().all() and up.isfinite().all()


def test_the_same_change_gives_the_same_bits_whatever_the_global_seed():
    change = falling((200, 300), 0.5)
    first = of_change(change, by_rank(8), 8, "a")
    torch.manual_seed(5)
    second = of_change(change, by_rank(8), 8, "a")
    assert torch.equal(first.u, second.u) and torch.equal(first.s, second.s) and torch.equal(first.v, second.v)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99, 1.0])
def test_energy_looks_for_more_directions_until_they_carry_the_share(share, monkeypatch):
    change = falling((400, 300), 0.7)
    exact = torch.linalg.svdvals(change.double()).square().cumsum(0)
    needed = int((exact < share * exact[-1] * (1 - 1e-9)).sum()) + 1
    widths = []
    whole = svd._randomised
    monkeypatch.setattr(svd, "_randomised", lambda c, width, *rest: widths.append(width) or whole(c, width, *rest))
    spectrum = of_change(change, by_energy(share), 4, "a")
    rank = by_energy(share)(spectrum.s, spectrum.total)
    assert needed <= rank <= 1.05 * needed + 1
    assert spectrum.carried(rank) >= share * spectrum.total * (1 - 1e-6)
    assert widths == sorted(widths) and widths[0] == 4 + svd.OVERSAMPLING


def test_rules():
    s = torch.tensor([4.0, 2.0, 1.0, 0.0])
    total = 21.0
    assert [by_rank(n)(s, total) for n in (1, 3, 9)] == [1, 3, 4]
    assert [by_energy(e)(s, total) for e in (0.5, 16 / 21, 0.77, 20 / 21, 0.96, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert by_energy(0.99)(s, 22.0) == 4  # the rest lies beyond what is known
    assert [by_ratio(r)(s, total) for r in (1, 2, 2.1, 5, 1e9)] == [1, 1, 2, 3, 3]
    assert [rule(torch.zeros(3), 0.0) for rule in (by_rank(2), by_energy(0.5), by_ratio(10))] == [2, 1, 1]
