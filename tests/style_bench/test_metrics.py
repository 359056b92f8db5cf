import numpy as np
import pytest
import torch

from tools.style_bench import bootstrap, metrics
from tools.style_bench.summary import Means, summarise


def pictures(count, key=0):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(key))


def test_an_interval_holds_the_mean_and_shrinks_with_more_prompts():
    widths = []
    for count in (20, 2000):
        column = np.random.default_rng(1).random(count)
        found = bootstrap.estimate(bootstrap.means(column, bootstrap.choices(count)))
        assert found.low < found.value < found.high
        assert found.value == pytest.approx(column.mean())
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 5


def test_an_interval_is_as_wide_as_the_theory_says():
    column = np.random.default_rng(2).normal(size=400)
    found = bootstrap.estimate(bootstrap.means(column, bootstrap.choices(400)))
    assert found.high - found.low == pytest.approx(2 * 1.96 * column.std() / 20, rel=0.1)


def test_missing_prompts_are_left_out():
    found = bootstrap.estimate(bootstrap.means(np.array([1.0, np.nan, 1.0]), bootstrap.choices(3)))
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_training_pictures_are_copies_and_unrelated_ones_are_not():
    training, unrelated, others = (metrics.thumbnails(pictures(n, key)) for key, n in enumerate((30, 500, 400)))
    threshold = metrics.copy_threshold(unrelated, training)
    assert metrics.copies(training, training, threshold).all()
    assert metrics.copies(unrelated, training, threshold).float().mean() == pytest.approx(0.01, abs=0.002)
    assert metrics.copies(others, training, threshold).float().mean() < 0.05


def test_a_pale_picture_is_no_copy_of_everything_and_a_pale_copy_is_one():
    training = pictures(4)
    pale = 1 - (1 - training) * 0.3
    near = metrics.nearest(metrics.thumbnails(pale), metrics.thumbnails(training))
    assert near.max() < 1e-3
    assert metrics.nearest(metrics.thumbnails(torch.ones(1, 3, 64, 64)), metrics.thumbnails(training)) == pytest.approx(
        1
    )


def test_a_copy_that_was_moved_a_little_is_found():
    white = torch.ones(2, 3, 128, 128)
    white[:, :, 32:96, 32:96] = pictures(2)
    training = metrics.moved_thumbnails(white)
    assert len(training) == 18
    assert metrics.nearest(metrics.thumbnails(white.roll((4, -4), (2, 3))), training).max() < 1e-3
    assert metrics.nearest(metrics.thumbnails(white.roll((20, 0), (2, 3))), training).min() > 0.1


def test_pictures_that_are_the_same_have_no_diversity():
    same = metrics.thumbnails(pictures(1)).repeat(4, 1)[None]
    assert metrics.diversity(same).item() == 0
    apart = torch.eye(3)[None]  # three pictures, each at right angles to the others
    assert metrics.diversity(apart).item() == pytest.approx(2**0.5)


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    scale = y.square().mean().sqrt()

    def kernel(a, b):
        return ((a / scale) @ (b / scale) / 3 + 1) ** 3

    xx = np.mean([kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    yy = np.mean([kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    assert metrics.kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy)


def test_kernel_distance_of_one_source_is_nothing_on_average_and_of_two_is_not():
    rng = torch.Generator().manual_seed(3)
    draws = [torch.randn(60, 8, generator=rng) for _ in range(40)]
    same = [metrics.kernel_distance(a, b) for a, b in zip(draws[::2], draws[1::2], strict=True)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 20**0.5
    assert metrics.kernel_distance(draws[0] + 1, draws[1]) > 10 * max(map(abs, same))


def test_the_target_itself_wins_its_pair_and_another_style_loses():
    target, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    there = torch.tensor([[True], [True]])
    others = torch.stack([other, torch.tensor([[-1.0, 0.0]])])
    assert metrics.paired_win(5 * target, target, others, there).tolist() == [True]
    assert metrics.paired_win(other, target, others, there).tolist() == [False]
    between = torch.tensor([[0.1, 1.0]])  # nearer to the other, unless that has no picture
    assert metrics.paired_win(between, target, others, there).tolist() == [False]
    assert metrics.paired_win(between, target, others, torch.tensor([[False], [True]])).tolist() == [True]


def scores(style, top1=0.5, kernel=1.0):
    return {"style": style, "top1": [top1] * len(style), "joint": style, "kernel": [kernel], "diversity": [1.0]}


def test_the_base_closes_nothing_the_oracle_all_and_the_means_need_every_style():
    methods = {
        "base": [scores([0.0, 0.1, 0.2, 0.1], kernel=3.0)],
        "own": [scores([1.0] * 4)],
        "lora": [scores([0.4, 0.5, 0.6, 0.5], top1=0.25, kernel=2.0), scores([0.6, 0.7, 0.8, 0.7], top1=0.25)],
    }
    oracle = {"oracle": [scores([0.9, 1.0, 0.9, 1.0], kernel=1.0)]}
    tables, mean = summarise({"one": methods | oracle, "two": methods})
    one = tables["one"]
    assert one["base"]["style_closure"].value == 0
    assert one["oracle"]["style_closure"].value == one["oracle"]["kernel_closure"].value == 1
    assert one["lora"]["style"].value == pytest.approx(0.6)
    assert one["lora"]["kernel_closure"].value == pytest.approx(0.75)
    assert one["lora"]["retention"].value == one["lora"]["retention"].low == 0.5
    assert "style" in mean["lora"] and "style_closure" not in mean["lora"] and "oracle" not in mean


def test_ratios_are_paired_by_prompt():
    column = [0.1, 0.9, 0.5, 0.3]
    means = Means({"lora": [scores(column)], "base": [scores(column)]}, 0)
    assert np.array_equal(means("lora", "style"), means("base", "style"))


def test_an_oracle_that_is_no_better_than_the_base_is_no_measure():
    methods = {"base": [scores([0.5] * 4)], "oracle": [scores([0.5] * 4, kernel=2.0)], "lora": [scores([0.9] * 4)]}
    tables, _ = summarise({"one": methods})
    assert not {"style_closure", "kernel_closure"} & set(tables["one"]["lora"])
