"""Pictures decoded in processes are those decoded here, and a file that ends or stops a process is named."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlora.data import workers as module
from sdlora.data.decoding import Cut, Seen, cut, look
from sdlora.data.workers import Workers, expected_seconds
from sdlora.errors import DatasetError

MANY = 1e6
"""Expected seconds for which processes are started."""

_BAD_PROGRAM = """
import os, time
from sdlora.data import decoding, wire

def look(path, background, before, real=decoding.look):
    if path.stem == "crash":
        os.abort()
    if path.stem == "hang":
        time.sleep(60)
    return real(path, background, before)

decoding.TASKS["look"] = look
wire.serve()
"""


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i:02d}.png")
    return sorted(tmp_path.glob("*.png"))


def looked(files, seconds, count=2):
    with Workers(seconds, count) as workers:
        return list(workers.map("look", ((file, "white", None) for file in files)))


@pytest.mark.parametrize("seconds", [0.0, MANY], ids=["threads", "processes"])
def test_results_come_in_order_and_are_those_of_this_process(pictures, seconds):
    bad = pictures[0].with_name("bad.png")
    bad.write_bytes(b"\x89PNG\r\n\x1a\njunk")
    results = looked([*pictures, bad, bad.with_name("none.png")], seconds)
    assert results[:12] == [look(file, "white", None) for file in pictures]
    assert [(r.width, r.height) for r in results[:12]] == [(30, 20 + i) for i in range(12)]
    assert isinstance(results[12], DatasetError) and "damaged PNG" in str(results[12])
    assert isinstance(results[13], DatasetError) and "none.png" in str(results[13])


@pytest.mark.parametrize("seconds", [0.0, MANY], ids=["threads", "processes"])
def test_cuts_are_equal_byte_by_byte(pictures, seconds):
    digest = look(pictures[3], "white", None).digest
    cuts = [Cut((15, 12), (2, 1), (8, 8), False), Cut((15, 12), (2, 1), (8, 8), True)]
    with Workers(seconds, 1) as workers:
        [found] = workers.map("cut", [(pictures[3], digest, "white", cuts)])
    expected = cut(pictures[3], digest, "white", cuts)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert np.array_equal(found[1], found[0][:, ::-1]) and found[0].shape == (8, 8, 3)


def test_a_picture_that_changed_is_refused_by_name(pictures):
    with pytest.raises(DatasetError, match=r"00\.png has changed while it was being read"):
        cut(pictures[0], "0" * 64, "white", [])


def test_bytes_that_were_decoded_before_are_not_decoded_again(pictures, monkeypatch):
    seen = look(pictures[0], "white", None)
    monkeypatch.setattr("sdlora.data.decoding.decode", lambda *_: pytest.fail("decoded again"))
    assert look(pictures[0], "white", seen) is seen


def test_only_a_few_results_wait(pictures):
    asked = []

    def items():
        for file in pictures * 10:
            asked.append(file)
            yield file, "white", None

    with Workers(0.0) as workers:
        results = workers.map("look", items())
        next(results)
        assert len(asked) <= 2 * module.MAX_THREADS + 1


@pytest.mark.skipif(os.name == "nt", reason="processes end otherwise there")
def test_a_file_that_crashes_or_hangs_the_decoder_is_named_and_the_rest_goes_on(pictures, monkeypatch):
    monkeypatch.setattr(module, "_PROGRAM", _BAD_PROGRAM)
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    crash, hang = (pictures[0].with_name(f"{name}.png") for name in ("crash", "hang"))
    started = time.monotonic()
    results = looked([*pictures[:3], crash, *pictures[3:6], hang, *pictures[6:]], MANY)
    assert time.monotonic() - started < 20
    assert sum(isinstance(result, Seen) for result in results) == 12
    assert str(results[3]) == f"{crash}: makes the decoder crash (SIGABRT); convert or remove the file"
    assert str(results[7]) == f"{hang}: is not decoded within 0.5 s; convert or remove the file"


def test_leaving_early_ends_the_processes(pictures, monkeypatch):
    started = []

    def start(real=module._started):
        started.append(real())
        return started[-1]

    monkeypatch.setattr(module, "_started", start)
    with Workers(MANY, 2) as workers:
        next(workers.map("look", ((file, "white", None) for file in pictures * 20)))
    assert started and all(process.poll() is not None for process in started)


@pytest.mark.parametrize("executable", ["", "/no/such/python", sys.executable], ids=["none", "missing", "failing"])
def test_where_no_process_can_be_started_pictures_are_decoded_here(pictures, monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(module, "_PROGRAM", "raise SystemExit(1)")
    assert looked(pictures, MANY) == [look(file, "white", None) for file in pictures]


def test_few_pictures_start_no_process_and_missing_files_cost_nothing(pictures):
    assert 0 < expected_seconds(pictures) < module.WORTH_SECONDS
    assert expected_seconds([pictures[0].with_name("none.png")]) < 0.01
