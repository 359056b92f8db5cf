"""Latents are encoded once and never stale; the order of an epoch is a function of (seed, epoch)."""

import math
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.config import DataSection
from sdlora.data.buckets import Fit
from sdlora.data.cache import Cache
from sdlora.data.dataset import Dataset, bucket_counts, prepare, variants
from sdlora.data.encoding import Encoder, Variant, Wanted, share
from sdlora.data.folder import Example, scan
from sdlora.data.image import open_rgb, pixels
from sdlora.errors import DatasetError


@pytest.fixture
def ready(tiny_parts, style_dir, tmp_path):
    """Prepares the six pictures; keywords are settings."""
    cache = Cache(tmp_path / "cache")

    def make(seed: int = 0, **settings) -> Dataset:
        background = settings.get("background", "white")
        return prepare(tiny_parts, scan(style_dir, background=background), DataSection(**settings), seed, cache)

    return make


def test_latents_are_those_of_the_vae(ready, tiny_parts, style_dir):
    dataset = ready()
    assert (dataset.encoded, dataset.cached, dataset.notes) == (6, 0, [])
    assert dataset.bucket_table() == {(48, 72): 1, (64, 64): 3, (72, 48): 1, (88, 48): 1}
    batch = next(b for b in (dataset.load(b) for b in dataset.batches(0, 1)) if b.examples[0].path.stem == "picture0")
    with torch.no_grad():
        expected = tiny_parts.vae.encode(pixels(open_rgb(style_dir / "picture0.png"))[None]).latent_dist
    scale = tiny_parts.vae.config.scaling_factor
    assert batch.std is not None
    torch.testing.assert_close(batch.mean, expected.mean * scale)
    torch.testing.assert_close(batch.std, expected.std * scale)
    assert batch.mean.shape == (1, 4, 8, 8) and batch.mean.dtype == torch.float32


def test_a_second_run_encodes_nothing_and_is_equal(ready):
    first, second = ready(), ready()
    assert (second.encoded, second.cached) == (0, 6)
    for one, other in zip(first.latents, second.latents, strict=True):
        assert all(torch.equal(one[0][name], other[0][name]) for name in ("mean", "std"))


def test_an_edited_picture_is_encoded_again_and_a_new_caption_is_not(ready, style_dir):
    before = ready()
    image = Image.open(style_dir / "picture0.png").convert("RGB")
    image.putpixel((3, 3), (1, 2, 3))
    image.save(style_dir / "picture0.png")
    (style_dir / "picture1.txt").write_text("another caption")
    after = ready()
    assert (after.encoded, after.cached) == (1, 5)
    assert not torch.equal(before.latents[0][0]["mean"], after.latents[0][0]["mean"])
    assert after.examples[1].caption == "another caption"


@pytest.mark.parametrize(
    ("settings", "encoded"),
    [
        ({"resolution": 72}, 6),
        ({"buckets": False}, 3),  # the three square pictures stay as they are
        ({"background": "black"}, 6),
        ({"flip": True}, 6),  # the mirrored half only
        ({"batch_size": 2, "trigger": "x", "caption_dropout": 0.5}, 0),
    ],
)
def test_settings_miss_the_cache_where_they_matter(ready, settings, encoded):
    ready()
    assert ready(**settings).encoded == encoded


def test_another_vae_misses_the_cache(ready, tiny_parts):
    ready()
    with torch.no_grad():
        next(tiny_parts.vae.parameters()).view(-1)[0] += 0.5
    assert ready().encoded == 6


def test_what_is_cached_already_does_not_change_the_rest(ready, tiny_parts, style_dir, tmp_path):
    warm = Cache(tmp_path / "warm")
    found = scan(style_dir)
    prepare(tiny_parts, scan(style_dir), DataSection(), 0, warm)
    for path in sorted(warm.folder.rglob("*.safetensors"))[::2]:
        path.unlink()
    mixed, cold = prepare(tiny_parts, found, DataSection(), 0, warm), ready()
    assert 0 < mixed.encoded < 6
    for one, other in zip(mixed.latents, cold.latents, strict=True):
        assert torch.equal(one[0]["mean"], other[0]["mean"])


def test_flips_and_random_crops(ready, tiny_parts, style_dir):
    dataset = ready(flip=True, crop="random", num_crops=3, buckets=False)
    wide = dataset.examples[1]
    assert [len(latents) for latents in dataset.latents] == [2, 6, 6, 2, 2, 6]
    chosen = variants(wide, dataset.fits[1], DataSection(crop="random", num_crops=3, flip=True), 0)
    assert len(set(chosen)) == 6 and len({v.left for v in chosen}) == 3
    image = pixels(open_rgb(wide.path))[:, :, chosen[1].left : chosen[1].left + 64].flip(-1)
    with torch.no_grad():
        expected = tiny_parts.family.encode_images(tiny_parts, image[None])[0][0]
    assert chosen[1].flip
    torch.testing.assert_close(dataset.latents[1][1]["mean"], expected)
    assert variants(wide, dataset.fits[1], DataSection(crop="random"), 1) != variants(
        wide, dataset.fits[1], DataSection(crop="random"), 2
    )


def made(counts: list[tuple[int, int, int]], seed: int = 0, num_variants: int = 4) -> Dataset:
    """A dataset of (width, repeats) pictures with numbers instead of latents."""
    examples, fits = [], []
    for width, repeats, how_many in counts:
        for _ in range(how_many):
            name = f"{len(examples)}.png"
            examples.append(Example(Path(name), "", repeats, "g", width, 64, name))
            fits.append(Fit(width, 64, width, 64))
    latents = [
        [{"mean": torch.full((1, 8, fitted.width // 8), i + k / 10)} for k in range(num_variants)]
        for i, fitted in enumerate(fits)
    ]
    cuts = [[Variant(0, 0, False)] * num_variants] * len(fits)
    return Dataset(examples, fits, cuts, latents, seed)


MIXED = [(64, 1, 7), (128, 3, 2), (192, 2, 1)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_epoch_has_every_picture_as_often_as_it_repeats(batch_size, accumulation):
    dataset = made(MIXED)
    for epoch in range(3):
        batches = dataset.batches(epoch, batch_size)
        seen = Counter(sample.example for batch in batches for sample in batch)
        assert seen == {i: e.repeats for i, e in enumerate(dataset.examples)}
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        assert all(len({dataset.fits[s.example].width for s in batch}) == 1 for batch in batches)
        assert math.ceil(len(batches) / accumulation) == dataset.steps_per_epoch(batch_size, accumulation)
    assert dataset.num_samples == 15 == sum(dataset.bucket_table().values())


def test_the_order_is_a_function_of_seed_and_epoch():
    one, other = made(MIXED), made(MIXED)
    expected = [one.batches(epoch, 2) for epoch in range(4)]
    assert [other.batches(epoch, 2) for epoch in (3, 1, 0, 2)] == [expected[k] for k in (3, 1, 0, 2)]
    assert len({repr(batches) for batches in expected}) == 4
    assert made(MIXED, seed=1).batches(0, 2) != expected[0]


def test_all_variants_come_and_load_gives_the_right_ones():
    dataset = made(MIXED)
    seen = {sample.variant for epoch in range(8) for batch in dataset.batches(epoch, 3) for sample in batch}
    assert seen == {0, 1, 2, 3}
    for samples in dataset.batches(0, 3):
        batch = dataset.load(samples)
        assert batch.std is None
        assert batch.mean.shape == (len(samples), 1, 8, dataset.fits[samples[0].example].width // 8)
        for row, sample, example in zip(batch.mean, samples, batch.examples, strict=True):
            assert example is dataset.examples[sample.example]
            assert torch.all(row == sample.example + torch.tensor(sample.variant / 10))


def test_small_pictures_are_left_out_and_named(tiny_parts, style_dir, tmp_path):
    Image.new("RGB", (5, 9)).save(style_dir / "tiny.png")
    told = []
    found = scan(style_dir)
    dataset = prepare(
        tiny_parts, found, DataSection(), 0, Cache(tmp_path), lambda done, total: told.append((done, total))
    )
    assert len(dataset.examples) == 6
    assert dataset.notes == [
        "1 picture skipped, smaller than 16 pixels a side, even enlarged 2 times: tiny.png (5 x 9)"
    ]
    assert told == [(k, 7) for k in range(1, 8)]
    counts = bucket_counts(found.examples, DataSection(), tiny_parts.resolution)
    assert counts == (len(dataset.examples), dataset.bucket_table())
    for path in style_dir.glob("picture*"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"all pictures \(1\) are smaller than 16 pixels .* tiny\.png \(5 x 9\)"):
        prepare(tiny_parts, scan(style_dir), DataSection(), 0, Cache(tmp_path))


def test_latents_that_are_not_finite_name_the_picture(tiny_parts, style_dir, tmp_path):
    with torch.no_grad():
        next(tiny_parts.vae.parameters()).fill_(math.inf)
    with pytest.raises(DatasetError, match=r"latents of .*picture0\.png are not finite"):
        prepare(tiny_parts, scan(style_dir), DataSection(), 0, Cache(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_picture_that_changes_meanwhile_is_not_kept_under_a_wrong_name(tiny_parts, style_dir, tmp_path):
    found = scan(style_dir)
    Image.new("RGB", (64, 64)).save(style_dir / "picture0.png")
    with pytest.raises(DatasetError, match=r"picture0\.png has changed while it was being read"):
        prepare(tiny_parts, found, DataSection(), 0, Cache(tmp_path / "cache"))


def test_a_cache_that_cannot_be_written_is_a_note(tiny_parts, style_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    dataset = prepare(tiny_parts, scan(style_dir), DataSection(), 0, Cache(tmp_path / "file"))
    assert dataset.encoded == 6 and len(dataset.notes) == 1 and "not kept" in dataset.notes[0]


@pytest.mark.parametrize("budget", [math.inf, 1000])
def test_in_one_tensor_a_size_the_latents_are_the_same_bit_by_bit(ready, budget):
    settings = {"flip": True, "crop": "random", "num_crops": 3, "buckets": False}
    plain, stacked = ready(**settings), ready(**settings)
    assert plain.num_bytes == 24 * 2 * 4 * 8 * 8 * 4  # variants, mean and deviation, channels, sides, fp32
    assert stacked.to_device("cpu", budget) is (budget == math.inf)
    assert stacked.num_bytes == plain.num_bytes
    for batch_size in (1, 3):
        for samples in plain.batches(0, batch_size):
            one, other = plain.load(samples), stacked.load(samples)
            assert torch.equal(one.mean, other.mean)
            assert one.std is not None and other.std is not None and torch.equal(one.std, other.std)
            assert (one.examples, one.sizes) == (other.examples, other.sizes)


def test_copies_of_a_picture_are_encoded_once_and_take_memory_once(tiny_parts, style_dir, tmp_path):
    (style_dir / "copy.png").write_bytes((style_dir / "picture0.png").read_bytes())
    told = []
    dataset = prepare(
        tiny_parts, scan(style_dir), DataSection(), 0, Cache(tmp_path / "cache"), lambda *now: told.append(now)
    )
    assert (dataset.encoded, dataset.cached) == (6, 1)
    assert dataset.latents[0][0] is dataset.latents[1][0]
    assert told == [(k, 7) for k in range(1, 8)]


class Ranks:
    """Processes of a run, as threads that share a cache folder."""

    def __init__(self, parts, folder, cache, count):
        self.parts, self.folder, self.cache, self.count = parts, folder, cache, count
        self.barrier = threading.Barrier(count, timeout=60)

    def run(self):
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(self.one, range(self.count)))

    def one(self, rank):
        cache = Cache(self.cache)
        try:
            return prepare(
                self.parts,
                scan(self.folder),
                DataSection(flip=True),
                0,
                cache,
                rank=rank,
                world_size=self.count,
                barrier=self.barrier.wait,
            )
        except DatasetError as error:
            return error


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_work_and_end_with_the_same(tiny_parts, style_dir, tmp_path, count):
    found = Ranks(tiny_parts, style_dir, tmp_path / "cache", count).run()
    alone = prepare(tiny_parts, scan(style_dir), DataSection(flip=True), 0, Cache(tmp_path / "alone"))
    assert sum(dataset.encoded for dataset in found) == 12
    assert max(dataset.encoded for dataset in found) - min(dataset.encoded for dataset in found) <= 2  # one picture
    for dataset in found:
        assert dataset.cached + dataset.encoded == 12
        for one, other in zip(dataset.latents, alone.latents, strict=True):
            assert all(torch.equal(a["mean"], b["mean"]) for a, b in zip(one, other, strict=True))


def test_processes_without_a_cache_encode_everything_each(tiny_parts, style_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for dataset in Ranks(tiny_parts, style_dir, tmp_path / "file", 2).run():
        assert dataset.encoded == 12 and "not kept" in dataset.notes[0]


def test_a_bad_picture_is_an_error_in_all_processes(tiny_parts, style_dir, tmp_path, monkeypatch):
    def scanned(folder, real=scan):
        found = real(folder)
        return replace(found, examples=[replace(e, digest="0" * 64) for e in found.examples[:1]] + found.examples[1:])

    monkeypatch.setattr(sys.modules[__name__], "scan", scanned)
    errors = Ranks(tiny_parts, style_dir, tmp_path / "cache", 2).run()
    assert ["picture0.png has changed" in str(error) for error in errors] == [True, True]


def test_shares_are_balanced_in_every_size():
    made_of = [(64, i) for i in range(11)] + [(96, i) for i in range(6)]
    wanted = [Wanted(Example(Path("x"), "", 1, "g", w, 64, f"{i:064x}"), Fit(w, 64, w, 64), [], []) for w, i in made_of]
    shares = [share(wanted, rank, 4) for rank in range(4)]
    assert sorted(id(w) for part in shares for w in part) == sorted(map(id, wanted))
    for width in (64, 96):
        counts = [sum(w.size[0] == width for w in part) for part in shares]
        assert max(counts) - min(counts) <= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert share(wanted[::-1], 1, 4) == shares[1]


def test_in_a_batch_latents_are_the_same_up_to_rounding(ready, tiny_parts, style_dir, tmp_path, monkeypatch):
    alone = ready(flip=True)
    sizes, encode = [], tiny_parts.family.encode_images

    def encode_images(parts, pixels):
        sizes.append(tuple(pixels.shape))
        if len(pixels) == 3:
            raise torch.OutOfMemoryError("too many at once")
        return encode(parts, pixels)

    monkeypatch.setattr(Encoder, "together", property(lambda self: True))
    monkeypatch.setattr("sdlora.data.encoding.MAX_BATCH", 3)
    family = replace(tiny_parts.family, encode_images=encode_images)
    together = prepare(
        replace(tiny_parts, family=family), scan(style_dir), DataSection(flip=True), 0, Cache(tmp_path / "other")
    )
    assert {shape for shape in sizes if shape[0] == 2} == {(2, 3, 72, 48), (2, 3, 48, 72), (2, 3, 48, 88)}
    assert sum(shape[0] == 3 for shape in sizes) == 2 and sum(shape[0] == 1 for shape in sizes) == 6
    for one, other in zip(alone.latents, together.latents, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a["mean"], b["mean"])


def test_a_step_costs_the_same_with_ten_thousand_pictures():
    def ready_with(pictures: int) -> Dataset:
        dataset = made([(64, 1, pictures)], num_variants=1)
        dataset.to_device("cpu")
        return dataset

    def seconds(dataset: Dataset) -> float:
        steps = len(dataset.batches(0, 4))
        times = []
        for step in range(200):
            started = time.perf_counter()
            dataset.load(dataset.batches(0, 4)[step % steps])
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    small, large = ready_with(10), ready_with(10_000)
    few, many = (min(seconds(dataset) for _ in range(3)) for dataset in (small, large))
    assert many < 4 * few  # of some 30 microseconds; caches of the processor make a difference


def test_transparent_pictures_are_encoded_on_their_background(tiny_parts, tmp_path):
    folder = tmp_path / "clear"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64, 4), np.uint8)).save(folder / "a.png")
    got = prepare(tiny_parts, scan(folder, background="#804020"), DataSection(), 0, Cache(tmp_path / "cache"))
    with torch.no_grad():
        flat = pixels(Image.new("RGB", (64, 64), "#804020"))[None]
        expected = tiny_parts.family.encode_images(tiny_parts, flat)[0][0]
    torch.testing.assert_close(got.latents[0][0]["mean"], expected)


def test_a_vae_without_deviation(nano_parts, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    Image.new("RGB", (128, 128), "teal").save(folder / "a.png")
    for encoded in (1, 0):
        dataset = prepare(nano_parts, scan(folder), DataSection(), 0, Cache(tmp_path / "cache"))
        assert dataset.encoded == encoded
        batch = dataset.load(dataset.batches(0, 4)[0])
        assert batch.std is None and batch.mean.shape == (1, 4, 16, 16)
