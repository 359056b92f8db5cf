"""Buckets hold what they promise for every size of picture."""

import math
import random

import pytest

from sdlora.data.buckets import MAX_AREA_EXCESS, MAX_ASPECT, Fit, crop_offset, fit, step_for


def sizes(count: int):
    rng = random.Random(0)
    return [(int(2 ** rng.uniform(0, 14)), int(2 ** rng.uniform(0, 14))) for _ in range(count)]


@pytest.mark.parametrize("resolution", [64, 128, 200, 500, 512, 768, 1024])
@pytest.mark.parametrize("max_upscale", [1, 2, 3.5])
@pytest.mark.parametrize("square", [False, True])
def test_every_bucket_covers_fits_the_step_and_stays_in_bounds(resolution, max_upscale, square):
    step = step_for(resolution)
    for width, height in sizes(400):
        got = fit(width, height, resolution=resolution, step=step, max_upscale=max_upscale, square=square)
        if got is None:
            assert min(width, height) * max_upscale < 2 * step
            continue
        assert got.width % step == got.height % step == 0
        assert got.scaled_width >= got.width and got.scaled_height >= got.height
        assert got.scaled_width == got.width or got.scaled_height == got.height
        assert 2 * step <= min(got.width, got.height)
        assert max(got.width, got.height) <= 4 * resolution
        assert got.width * got.height <= resolution**2 * MAX_AREA_EXCESS
        assert got.width <= width * max_upscale * 1.0001 and got.height <= height * max_upscale * 1.0001
        if square:
            assert got.width == got.height


@pytest.mark.parametrize("resolution", [128, 512, 768, 1024])
def test_large_pictures_keep_their_shape_and_their_share_of_the_area(resolution):
    step = step_for(resolution)
    for width, height in sizes(4000):
        if min(width, height) < 2 * resolution:
            continue
        got = fit(width, height, resolution=resolution, step=step, max_upscale=1)
        assert got
        shape = min(MAX_ASPECT, max(1 / MAX_ASPECT, width / height))
        assert abs(math.log(got.width / got.height / shape)) < 0.16
        assert 0.75 < got.width * got.height / resolution**2 <= MAX_AREA_EXCESS


def test_known_shapes():
    def size(width, height, resolution=512, **options):
        step = step_for(resolution)
        got = fit(width, height, resolution=resolution, step=step, **({"max_upscale": 2} | options))
        return got and (got.width, got.height)

    assert size(2000, 2000) == (512, 512)
    assert size(1200, 1600) == (448, 576)
    assert size(1600, 1200) == (576, 448)
    assert size(1920, 1080, 1024) == (1344, 768)
    assert size(3000, 2000, square=True) == (512, 512)
    assert size(256, 256) == (512, 512)
    assert size(200, 200) == (384, 384)  # twice 200, rounded down
    assert size(64, 64) == (128, 128)
    assert size(63, 64) is None
    assert size(0, 10) is None


def test_a_banner_gives_a_part_of_itself_and_a_thread_nothing():
    assert fit(800, 100_000, resolution=512, step=64, max_upscale=2) == Fit(256, 1024, 256, 32_000)
    assert fit(1, 10_000, resolution=512, step=64, max_upscale=2) is None


def test_turning_the_picture_turns_the_bucket():
    for width, height in sizes(300):
        one = fit(width, height, resolution=512, step=64, max_upscale=2)
        other = fit(height, width, resolution=512, step=64, max_upscale=2)
        if one is None or other is None:
            assert one is other
        else:
            assert (one.width, one.height) == (other.height, other.width)


@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (128, 16), (256, 32), (500, 64), (512, 64), (1024, 64)])
def test_the_step_follows_the_base(resolution, step):
    assert step_for(resolution) == step


def test_crops_lie_inside_and_reach_every_place():
    fitted = Fit(64, 64, 67, 64)
    assert crop_offset(fitted, "center") == (1, 0)
    seen = {crop_offset(fitted, "random", (k / 100, 0.999999)) for k in range(100)}
    assert seen == {(0, 0), (1, 0), (2, 0), (3, 0)}
