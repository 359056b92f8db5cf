import json
from importlib.util import find_spec

import pytest

from sdlora.data.cache import Cache
from sdlora.data.dataset import prepare
from sdlora.data.folder import scan
from tools.bench import measure
from tools.growth import __main__ as growth
from tools.growth.adapters import measure_ranks
from tools.growth.images import SIDE, Effort, laps
from tools.growth.pictures import SHAPES, write_pictures
from tools.growth.report import verdict
from tools.growth.trainer import BATCH, build, load_base, settings, square_batch, take_step

TINY = growth.Range((10, 20), (2, 4), (32, 64), Effort(rounds=2, seconds=0.0, reading_seconds=0.0))


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    """One step a turn, and no wait until files count as settled."""
    monkeypatch.setattr(measure, "SHORTEST_TURN", 0.0)
    monkeypatch.setattr("tools.growth.images.SETTLED_SECONDS", -0.1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("growth")
    write_pictures(root / "pictures", 20)
    cache = Cache(root / "cache")
    config = settings(data__resolution=SIDE, data__max_upscale=1.0)
    return prepare(load_base(config), scan(root / "pictures", cache=cache), config.data, 0, cache)


def test_pictures_are_the_same_every_time_and_no_two_alike(tmp_path):
    write_pictures(tmp_path / "first", 10)
    write_pictures(tmp_path / "second", 10)
    first, second = (scan(tmp_path / name).examples for name in ("first", "second"))
    assert [(e.digest, e.caption) for e in first] == [(e.digest, e.caption) for e in second]
    assert len({e.digest for e in first}) == len({e.caption for e in first}) == 10


def test_pictures_that_do_not_fill_all_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="12 pictures are not equally many of 5 shapes"):
        write_pictures(tmp_path / "pictures", 12)


def test_every_shape_trains_at_its_own_size(dataset):
    assert dataset.bucket_table() == dict.fromkeys(sorted(SHAPES), 4)


def test_a_lap_has_a_full_batch_of_every_size_and_laps_are_the_epoch(dataset):
    found = laps(dataset)
    for lap in found:
        assert {(dataset.fits[batch[0].example].width, dataset.fits[batch[0].example].height) for batch in lap} == set(
            SHAPES
        )
        assert all(len(batch) == BATCH for batch in lap)
    assert sorted(sample.example for lap in found for batch in lap for sample in batch) == list(range(20))


def test_a_step_changes_what_trains_and_nothing_else():
    trainer = build(settings(lora__rank=2))
    before, frozen = trainer.flat.values.clone(), trainer.parts.denoiser.get_parameter("conv_in.weight").clone()
    take_step(trainer, square_batch(trainer.parts, 32))
    assert not trainer.flat.values.equal(before)
    assert trainer.flat.gradients.norm() > 0
    assert trainer.parts.denoiser.get_parameter("conv_in.weight").equal(frozen)


def test_numbers_that_train_grow_with_the_rank():
    low, high = measure_ranks((2, 4), Effort(rounds=1, seconds=0.0, reading_seconds=0.0))
    assert high["parameters"] == 2 * low["parameters"]
    assert high["layers"] == low["layers"]
    assert high["file_bytes"] - low["file_bytes"] >= 2 * (high["parameters"] - low["parameters"])  # fp16
    assert 0 < low["step"]["low"] <= low["step"]["median"] <= low["step"]["high"]


def test_the_whole_is_measured_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "QUICK", TINY)
    monkeypatch.setattr(growth, "find_spec", lambda name: None)
    assert growth.main(["--quick", "--out", str(tmp_path / "new" / "growth.json")]) == 0
    facts = json.loads((tmp_path / "new" / "growth.json").read_text())
    assert [row["images"] for row in facts["images"]] == [10, 20]
    assert [row["rank"] for row in facts["ranks"]] == [2, 4]
    assert [row["side"] for row in facts["resolutions"]] == [32, 64]
    assert [row["targets"] for row in facts["targets"]] == ["attention", "attention+ff", "conv"]
    assert facts["targets"][0]["parameters"] < facts["targets"][1]["parameters"] < facts["targets"][2]["parameters"]
    table = (tmp_path / "new" / "GROWTH.md").read_text()
    assert verdict(facts) in table
    assert "growth.png" not in table
    assert "pip install 'sdlora[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "new" / "growth.png").exists()


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="draws with matplotlib")
def test_the_figure_is_a_picture(tmp_path):
    from PIL import Image

    from tools.growth.plot import LINES, draw_figure

    spread = {"median": 0.02, "low": 0.01, "high": 0.04}
    sizes = {"step": spread, "layers": 1, "parameters": 1000, "file_bytes": 2000}
    facts = {
        "environment": {"processor": "a processor", "packages": {"torch": "2"}, "date": "today"},
        "settings": {"batch": 2, "precision": "fp32"},
        "images": [{"images": n, **{name: spread for name, *_ in LINES}} for n in (10, 100)],
        "step_ratio": {"median": 1.0},
        "ranks": [{"rank": rank, **sizes} for rank in (4, 8)],
        "resolutions": [{"side": side, "step": spread} for side in (64, 128)],
        "targets": [{"targets": name, **sizes} for name in ("attention", "conv")],
    }
    draw_figure(tmp_path / "figure.png", facts)
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > 1000
