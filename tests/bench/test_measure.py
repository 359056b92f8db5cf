import time

import pytest
import torch

from tools.bench.measure import MIN_ROUNDS, SHORTEST_TURN, Rounds, one_after_the_other, quartiles, ratio, take_turns
from tools.bench.memory import Peak
from tools.bench.operations import OperationCounter, count_operations

LONG = SHORTEST_TURN * 2


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `sleep` moves, so that times are exact."""

    class Clock:
        now = 0.0

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_the_order_is_reversed_each_round(clock):
    calls = []

    def contender(name):
        return lambda: (calls.append(name), clock.sleep(LONG))

    rounds = take_turns({"a": contender("a"), "b": contender("b")}, rounds=3, warm_up=0)
    assert calls == ["a", "b", *"ab", *"ba", *"ab"]  # first a trial each, which tells how often to repeat
    assert rounds.count == 3


def test_a_ratio_is_that_of_the_times(clock):
    rounds = take_turns({"slow": lambda: clock.sleep(3 * LONG), "fast": lambda: clock.sleep(LONG)}, rounds=5)
    assert quartiles(rounds.seconds["slow"]).median == pytest.approx(3 * LONG)
    found = ratio(rounds.seconds["slow"], rounds.seconds["fast"])
    assert (found.low, found.median, found.high) == pytest.approx((3, 3, 3))


def test_short_steps_are_repeated_within_a_turn_and_counted_once(clock):
    steps = []
    rounds = take_turns({"a": lambda: (steps.append(0), clock.sleep(SHORTEST_TURN / 10))}, rounds=2, warm_up=0)
    assert len(steps) == 1 + 2 * 10
    assert rounds.seconds["a"] == pytest.approx([SHORTEST_TURN / 10] * 2)


def test_no_round_begins_after_the_limit_but_there_are_always_enough_for_a_spread(clock):
    assert take_turns({"a": lambda: clock.sleep(1)}, rounds=50, limit=0).count == MIN_ROUNDS
    assert take_turns({"a": lambda: clock.sleep(1)}, rounds=50, limit=10).count == 9


def test_what_slows_a_whole_round_down_does_not_widen_the_interval():
    found = ratio([2, 20, 4, 200], [1, 10, 2, 100])
    assert (found.low, found.median, found.high) == (2, 2, 2)


def test_the_interval_holds_the_ratio_and_is_the_same_each_time():
    slow, fast = [2.0, 2.2, 1.9, 2.5, 2.1], [1.0, 1.0, 1.0, 1.0, 1.0]
    found = ratio(slow, fast)
    assert 1.9 <= found.low < found.median == 2.1 < found.high <= 2.5
    assert found == ratio(slow, fast)


@pytest.mark.parametrize(("slow", "fast"), [([1.0], [1.0, 2.0]), ([], [])])
def test_a_ratio_of_different_rounds_is_refused(slow, fast):
    with pytest.raises(ValueError, match="the same rounds"):
        ratio(slow, fast)


def test_rounds_that_were_not_together_are_cut_to_the_same_number():
    a, b = Rounds({"a": [1, 2, 3]}, {"a": [0, 0, 0]}), Rounds({"b": [4, 5]}, {"b": [1, 1]})
    assert one_after_the_other([a, b]) == Rounds({"a": [1, 2], "b": [4, 5]}, {"a": [0, 0], "b": [1, 1]})


def test_views_are_free_and_everything_else_counts_once():
    x = torch.ones(4, 4)
    with OperationCounter() as counter:
        x.view(2, 8).t().detach()[0].expand(3, 2).unsqueeze(0).split(1)
        (x.t() @ x).reshape(16)  # a view of what the product made
        x.add_(1)
        x.t().contiguous().reshape(2, 8)
    assert counter.counts == {"aten::mm": 1, "aten::add_": 1, "aten::clone": 1}


def test_backward_and_custom_functions_are_counted_as_they_run():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + x

        @staticmethod
        def backward(ctx, gradient):
            return gradient + gradient

    x, gradient = torch.ones(3, requires_grad=True), torch.ones(3)
    with OperationCounter() as counter:
        y = Double.apply(x)
    assert counter.counts == {"aten::add": 1}
    with OperationCounter() as counter:
        torch.autograd.backward([y], [gradient])
    assert counter.counts == {"aten::add": 1}


def test_an_optimizer_is_counted_by_its_calls():
    def optimizer(count, fused):
        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        found = torch.optim.AdamW(parameters, fused=fused)
        found.step()
        return found.step

    assert count_operations(optimizer(20, False)) == 20 * count_operations(optimizer(1, False))
    assert count_operations(optimizer(20, True)) <= 2


def test_the_peak_counts_what_was_freed_again_and_can_be_reset():
    peak = Peak(torch.device("cpu"))
    size = 64 * 2**20
    block = torch.ones(size // 4)
    del block
    assert size * 0.9 < peak.bytes < size * 1.5
    peak.reset()
    assert peak.bytes < size * 0.5
