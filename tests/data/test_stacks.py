"""Rows of a stack are the tensors that were put in, bit for bit."""

import pytest
import torch

from sdlora.data.stacks import Stacks


def sample(width: int, seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"mean": torch.randn(4, 8, width, generator=rng), "std": torch.rand(4, 8, width, generator=rng)}


def test_rows_and_views_are_what_was_given():
    samples = [[sample(8, 0), sample(8, 1)], [sample(12, 2)], [sample(8, 3)]]
    stacks = Stacks(samples, torch.device("cpu"))
    for chosen in ([(0, 1)], [(3 - 1, 0), (0, 0), (0, 1), (0, 0)], [(1, 0)]):
        rows = stacks.rows(chosen)
        for row, (example, variant) in enumerate(chosen):
            assert all(torch.equal(rows[name][row], samples[example][variant][name]) for name in ("mean", "std"))
    for one, other in zip(samples, stacks.views(), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
            assert b["mean"]._is_view()


def test_what_several_examples_share_is_there_once():
    one = sample(8, 0)
    stacks = Stacks([[one], [sample(8, 1)], [one]], torch.device("cpu"))
    assert torch.equal(*(stacks.rows([(example, 0)])["mean"] for example in (0, 2)))
    assert stacks.views()[0][0]["mean"].data_ptr() == stacks.views()[2][0]["mean"].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_values_are_the_same():
    samples = [[sample(8, 0)], [sample(8, 1)]]
    rows = Stacks(samples, torch.device("cuda")).rows([(1, 0), (0, 0)])
    assert rows["mean"].is_cuda and torch.equal(rows["mean"].cpu()[0], samples[1][0]["mean"])
