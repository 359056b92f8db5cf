"""What more pictures cost: looking at the folder, caching, planning an epoch, and the step, which should not notice."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdlora.config import Config
from sdlora.data.cache import Cache
from sdlora.data.dataset import Dataset, Sample, prepare
from sdlora.data.folder import Scan, scan
from sdlora.families import Parts
from sdlora.file_identity import SETTLED_SECONDS
from sdlora.training.step import Microbatch
from sdlora.training.texts import Texts
from tools.bench.measure import quartiles, ratio, take_turns
from tools.bench.ours import Ours
from tools.growth.pictures import SHAPES, write_pictures
from tools.growth.trainer import BATCH, build, load_base, settings, take_step

SIDE = 64
"""Resolution in pixels, the least there is; the pictures are smaller and are not enlarged."""

Lap = Sequence[Sequence[Sample]]
"""A batch of each size."""


@dataclass(frozen=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        rounds: of everything that is repeated.
        seconds: of steps, for each thing that is compared, after which no new round begins.
        reading_seconds: after which a folder is not read once more.
    """

    rounds: int
    seconds: float
    reading_seconds: float


class Folder:
    """Pictures in a folder, and what it took to make a data set of them.

    Args:
        root: an empty folder for pictures and caches.
        count: of pictures.

    Attributes:
        seconds: what was measured -> a number for each round.
        dataset: of the last round.
        texts: likewise.
    """

    dataset: Dataset
    texts: Texts

    def __init__(self, root: Path, count: int) -> None:
        self.root, self.count = root, count
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.spent = 0.0
        write_pictures(root / "pictures", count)
        self._written = time.monotonic()

    @property
    def config(self) -> Config:
        """Settings of a run on these pictures."""
        return settings(data__images=self.root / "pictures", data__resolution=SIDE, data__max_upscale=1.0)

    def read(self, parts: Parts, number: int) -> None:
        """Goes from the folder to a data set twice: with an empty cache, and with what that left in it."""
        time.sleep(max(0.0, self._written + SETTLED_SECONDS + 0.1 - time.monotonic()))  # younger files are read again
        started = time.perf_counter()
        for kind in ("cold", "warm"):
            self._read_once(parts, Cache(self.root / f"cache-{number}"), kind)
        self.spent += time.perf_counter() - started

    def _read_once(self, parts: Parts, cache: Cache, kind: str) -> None:
        config = self.config
        assert config.data.images
        found: Scan = self._timed(f"scan_{kind}", lambda: scan(self.root / "pictures", cache=cache))
        self.dataset = self._timed(
            f"latents_{kind}", lambda: prepare(parts, found, config.data, config.train.seed, cache)
        )
        self.texts = Texts(parts, config, cache, 1)
        captions = ["", *(example.caption for example in self.dataset.examples)]
        self._timed(f"texts_{kind}", lambda: self.texts.states.preload(captions))
        self.seconds[f"caching_{kind}"].append(self.seconds[f"latents_{kind}"][-1] + self.seconds[f"texts_{kind}"][-1])
        self._timed("plan", lambda: self.dataset.batches(len(self.seconds["plan"]), BATCH))

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        done = work()
        self.seconds[name].append(time.perf_counter() - started)
        return done


def laps(dataset: Dataset) -> list[Lap]:
    """Returns the batches of an epoch, so that each lap has one of every size: the same work whatever the folder."""
    sizes: defaultdict[tuple[int, int], list[Sequence[Sample]]] = defaultdict(list)
    for batch in dataset.batches(0, BATCH):
        fitted = dataset.fits[batch[0].example]
        sizes[fitted.width, fitted.height].append(batch)
    return list(zip(*(sizes[size] for size in sorted(sizes)), strict=True))


def steps_of(trainer: Ours, folder: Folder) -> Callable[[], None]:
    """Returns what does the steps of one lap after the other, from the batch's pictures to the update."""
    numbers: Iterator[int] = itertools.count()
    endless = itertools.cycle(laps(folder.dataset))

    def steps() -> None:
        for samples in next(endless):
            number, positions = next(numbers), range(len(samples))
            batch = folder.dataset.load(samples)
            texts = folder.texts(batch.examples, number, positions)
            conditioning = texts | trainer.parts.family.condition_sizes(batch.sizes)
            take_step(trainer, Microbatch(batch.mean, batch.std, conditioning, number, positions))

    return steps


def measure_images(root: Path, counts: Sequence[int], effort: Effort) -> dict[str, Any]:
    """Measures folders of different sizes.

    Args:
        root: a folder for pictures and caches, 60 kB a picture.
        counts: how many pictures, from few to many.
        effort: how thoroughly; large folders are read once.

    Returns:
        `images`: a row for each count; all times in seconds. `step_ratio`: how many times as long a step takes with the
        most pictures as with the fewest.
    """
    folders = [Folder(root / str(count), count) for count in counts]
    parts = load_base(settings())
    _wake(root / "wake", parts)
    for number in range(effort.rounds):
        for folder in folders if number % 2 == 0 else reversed(folders):
            if number == 0 or folder.spent < effort.reading_seconds:
                folder.read(parts, number)
    trainer = build(settings(), parts)
    contenders = {str(folder.count): steps_of(trainer, folder) for folder in folders}
    turns = take_turns(contenders, rounds=effort.rounds, limit=effort.seconds)
    rows = []
    for folder in folders:
        folder.seconds["step"] = [seconds / len(SHAPES) for seconds in turns.seconds[str(folder.count)]]
        spreads = {name: asdict(quartiles(values)) for name, values in folder.seconds.items()}
        rows.append({"images": folder.count, "readings": len(folder.seconds["scan_cold"]), **spreads})
    most, fewest = folders[-1].seconds["step"], folders[0].seconds["step"]
    return {"images": rows, "step_ratio": asdict(ratio(most, fewest)), "step_rounds": turns.count}


def _wake(root: Path, parts: Parts) -> None:
    """Reads a few pictures uncounted: what is imported and compiled at the first use is no cost of growth."""
    Folder(root, len(SHAPES)).read(parts, 0)
