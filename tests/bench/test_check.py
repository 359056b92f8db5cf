import math

import pytest
import torch

from tools.bench.check import Agreement, Gradients, compare, cosine, length_error, objection


def test_no_gradient_is_as_long_as_no_gradient():
    a = torch.tensor([3.0, 4.0])
    assert length_error(1.5 * a, a) == pytest.approx(0.5)
    assert length_error(0 * a, 0 * a) == 0
    assert length_error(a, 0 * a) == math.inf
    assert math.isnan(length_error(a * math.nan, a))


def agreement(worst, loss_error=0.0, length=0.0):
    return Agreement(loss_error, {"a.down": 1.0, "a.up": worst}, {"a.down": 0.0, "a.up": length})


def test_the_cosine_is_that_of_the_angle_whatever_the_lengths():
    a = torch.tensor([[1.0, 0.0]])
    assert cosine(a, 5 * a) == pytest.approx(1)
    assert cosine(a, torch.tensor([[3.0, 3.0]])) == pytest.approx(math.sqrt(0.5))
    assert cosine(a, torch.zeros(1, 2)) == 0
    assert cosine(0 * a, 0 * a) == 1
    assert cosine(a * 1e-30, a * 1e-30) == pytest.approx(1)


def test_gradients_are_compared_tensor_by_tensor():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    found = compare(Gradients(1.1, {"a": (x, 2 * y), "b": (x, x)}), Gradients(1.0, {"a": (x, y), "b": (x, y)}))
    assert found.cosines == {"a.down": 1, "a.up": 1, "b.down": 1, "b.up": 0}
    assert found.worst == ("b.up", 0)
    assert found.mean == 0.75
    assert found.lengths == {"a.down": 0, "a.up": 1, "b.down": 0, "b.up": 0}
    assert found.worst_length == ("a.up", 1)
    assert found.loss_error == pytest.approx(0.1)


def test_gradients_of_other_layers_cannot_be_compared():
    x = torch.ones(1)
    with pytest.raises(ValueError, match="1 layers"):
        compare(Gradients(1.0, {"a": (x, x)}), Gradients(1.0, {"b": (x, x)}))


@pytest.mark.parametrize(
    ("ours", "reference", "said"),
    [
        (agreement(0.9995), agreement(0.9999), ""),
        (agreement(0.9985), agreement(0.9999), "a.up has cosine 0.99850"),
        (agreement(0.993), agreement(0.995), ""),
        (agreement(0.94), agreement(0.995), "a.up has cosine 0.94000"),
        (agreement(0.97), agreement(0.995), "cosine 0.98500 with those of the fp32 run on average"),
        (agreement(0.9985), None, "a.up has cosine 0.99850"),
        (agreement(math.nan), agreement(0.9999), "a.up has cosine nan"),
        (agreement(1.0, length=0.01), agreement(1.0), ""),
        (agreement(1.0, length=0.05), agreement(1.0), "a.up is 5.0% longer or shorter"),
        (agreement(1.0, length=0.05), agreement(1.0, length=0.02), ""),
        (agreement(1.0, length=math.nan), agreement(1.0), "a.up is nan% longer"),
        (agreement(1.0, 0.02), agreement(1.0), "the loss is 2.00% off"),
        (agreement(1.0, math.nan), agreement(1.0), "the loss is nan% off"),
    ],
)
def test_objections(ours, reference, said):
    found = objection(ours, reference)
    assert said in found and bool(found) == bool(said)
