from dataclasses import replace

import pytest

from tools.bench.floor import count_flop
from tools.bench.rows import ROWS

WIDTHS = (320, 640, 1280, 1280)
WORDS, TEXT_WIDTH = 77, 768


def test_flop_of_sd15_is_what_was_counted_by_hand():
    """1344.3 GFLOP of products with a LoRA of rank 16, and 378.2 of attention, were counted elsewhere: `perf.md`."""
    assert count_flop(ROWS["cpu-sd15-512-b1"]) == pytest.approx(1722e9, rel=0.01)


def test_attention_is_in_it_by_its_formula():
    """Four times the tokens: attention of the picture to itself grows sixteenfold, all else that sees it fourfold.

    Such a layer needs 12 B N M (heads x width) forward and backward, and keys and values of the text do not grow. SD
    1.5 has 5 layers at each of the first 3 sizes, and one at the fourth.
    """
    small, large = (count_flop(ROWS[name]) for name in ("cpu-sd15-256-b1", "cpu-sd15-512-b1"))
    tokens = [(512 // 8 // 2**i) ** 2 for i in range(4)]
    layers = list(zip((5, 5, 5, 1), tokens, WIDTHS, strict=True))
    quadratic = sum(12 * n * t**2 * w for n, t, w in layers)
    constant = sum(4 * n * WORDS * TEXT_WIDTH * w for n, _, w in layers)
    # large = linear + quadratic + constant, small = linear / 4 + quadratic / 16 + constant
    assert (large - 4 * small + 3 * constant) * 4 / 3 == pytest.approx(quadratic, rel=2e-3)


def test_flop_grow_with_the_batch_alone():
    row = ROWS["cpu-nano-b1"]
    assert count_flop(replace(row, batch=4, checkpointing=True, base_dtype="nf4")) == 4 * count_flop(row)
