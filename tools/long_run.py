"""Trains for a long time and watches how much memory the process holds: it must stay as it was after the first steps.

    python -m tools.long_run [--steps 2000]

The embedded base learns from the example pictures, with samples and a checkpoint every 90 steps. The exit code is 1 if
the process grew by more than one per cent after the first 200 steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import psutil

from sdlora.config_io import load_config
from sdlora.training.progress import Reporter
from sdlora.training.train import train

ROOT = Path(__file__).parent.parent
SETTLED = 200
"""Steps after which everything that is needed has been loaded, sampled and saved once."""
WINDOW = 50
"""Steps whose median counts as the size at a time."""
ALLOWED = 0.01


class Watch(Reporter):
    """Notes the resident size after every step, in bytes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._process, self._stage = psutil.Process(), ""

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Remembers what is going on."""
        self._stage = stage

    def advance(self, note: str = "", units: int = 1) -> None:
        """Notes the size."""
        if self._stage == "training":
            self.sizes.append(self._process.memory_info().rss)


def growth(sizes: list[int]) -> float:
    """Returns by which share the process grew after `SETTLED` steps."""
    before = statistics.median(sizes[SETTLED : SETTLED + WINDOW])
    return statistics.median(sizes[-WINDOW:]) / before - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "base.model": "nano",
            "data.images": ROOT / "datasets_example",
            "data.batch_size": 1,
            "train.steps": steps,
            "samples.sample_steps": 4,
            "samples.sample_every": 3,
            "output.save_every": 3,
            "output.output": Path(folder) / "run",
        }
        train(load_config(None, flags), reporter=watch)
    sizes = watch.sizes
    grown = growth(sizes)
    print(f"{len(sizes)} steps; {sizes[SETTLED] / 1e6:.0f} MB after {SETTLED}, {sizes[-1] / 1e6:.0f} MB at the end")
    print(f"grown by {grown:.2%}, largest {max(sizes[SETTLED:]) / sizes[SETTLED] - 1:.2%} above that of step {SETTLED}")
    sys.exit(grown > ALLOWED)


if __name__ == "__main__":
    main()
