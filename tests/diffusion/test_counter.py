"""Counter-based random numbers: the published answers, the right distribution, no dependence on the batch."""

import math

import pytest
import torch

from sdlora.diffusion.counter import Philox, below, normal

F = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((F, F, F, F), (F, F), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    even, odd = torch.tensor(counter[0::2])[:, None, None], torch.tensor(counter[1::2])[:, None, None]
    words = Philox(key, "cpu").blocks(even, odd).flatten().tolist()
    assert " ".join(f"{word:08x}" for word in words) == answer


def test_words_are_those_of_the_counters_that_the_places_name():
    philox = Philox.of(7, "sample", "cpu")
    words = philox.words(torch.tensor([[5, 2]]), 3).view(3, 4)
    for index in range(3):
        even, odd = torch.tensor([index, 2])[:, None, None], torch.tensor([5, 0])[:, None, None]
        assert torch.equal(words[index], philox.blocks(even, odd).flatten())


def test_a_sample_has_its_numbers_whatever_stands_beside_it():
    philox = Philox.of(7, "sample", "cpu")
    places = torch.tensor([[5, 0], [5, 1], [5, 2], [6, 0]])
    together = philox.words(places, 9)
    alone = torch.cat([philox.words(place[None], 9) for place in places])
    assert torch.equal(together, alone)
    assert torch.equal(philox.words(places, 4), together[:, :16])  # a longer stream begins as a shorter one
    assert len({tuple(row) for row in together.tolist()}) == 4


def test_seed_and_purpose_give_other_numbers():
    place = torch.tensor([[0, 0]])
    streams = [Philox.of(*key, "cpu").words(place, 4) for key in ((1, "a"), (2, "a"), (1, "b"))]
    assert not any(torch.equal(streams[i], streams[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(streams[0], Philox.of(1, "a", "cpu").words(place, 4))


def test_normal_numbers_have_the_moments_of_a_normal_distribution():
    numbers = normal(Philox.of(3, "moments", "cpu").words(torch.tensor([[0, 0], [0, 1]]), 100_000))
    count = numbers.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = float(numbers.double().pow(power).mean()) - moment
        assert abs(error) < 4 * math.sqrt(variance / count), power
    below_one = float((numbers < 1).double().mean())
    assert abs(below_one - 0.8413447) < 4 * math.sqrt(0.84 * 0.16 / count)
    pairs = numbers[:, 0::2] * numbers[:, 1::2]
    assert abs(float(pairs.mean())) < 4 / math.sqrt(pairs.numel())  # the two of a pair do not hang together
    assert abs(float((numbers[0] * numbers[1]).mean())) < 4 / math.sqrt(numbers.shape[1])


def test_extreme_words_give_finite_numbers():
    numbers = normal(torch.tensor([[0, 0, F, F, 0, F, F, 0]]))
    assert bool(numbers.isfinite().all())
    assert float(numbers.abs().max()) < 6.8


def test_integers_stay_below_the_limit_and_come_equally_often():
    words = Philox.of(3, "integers", "cpu").words(torch.tensor([[0, 0]]), 25_000)
    drawn = below(words, 10)
    counts = torch.bincount(drawn.flatten(), minlength=10).double()
    chi_square = float(((counts - 10_000).square() / 10_000).sum())
    assert len(counts) == 10 and chi_square < 27.9  # 9 degrees of freedom: exceeded once in a thousand
    assert below(torch.tensor([0, F]), 1000).tolist() == [0, 999]
