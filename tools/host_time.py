"""Measures how long Python is busy with a training step on CUDA, while the GPU computes on its own.

`python -m tools.host_time` trains a few dozen steps on the example pictures and prints, in milliseconds, the median of
what the loop's own calls take before they return: rates, batch and captions, the engine. The GPU is let finish before
each step, outside the measured time, so that a full queue does not count. Goal with recorded steps: 1 ms at most.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdlora.config_io import load_config
from sdlora.training import train as loop
from sdlora.training.graph import GraphedSteps
from sdlora.training.progress import PlainReporter
from sdlora.training.session import Session
from sdlora.training.setup import set_up

WARM_UP = 8
"""Steps before the measured ones; they record the graphs."""


class Clock:
    """Sums up the seconds that wrapped functions take, by name, inner ones not taken off."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str) -> None:
        """Times a method of an object from now on."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)


def measure(session: Session, steps: int) -> dict[str, float]:
    """Returns the median milliseconds of a step and of its parts."""
    clock = Clock()
    for name in ("begin", "add", "update"):
        clock.wrap(session.engine, name)
    clock.wrap(session.dataset, "load")
    rows: list[dict[str, float]] = []
    for step in range(WARM_UP + steps):
        torch.cuda.synchronize()
        clock.seconds.clear()
        start = time.perf_counter()
        loop.set_learning_rates(session, step)
        session.engine.begin()
        loss, *_ = loop.step_gradients(session, step, False)
        session.engine.update(loss)
        whole = time.perf_counter() - start
        rows.append({"whole step": whole, **clock.seconds})
    measured = rows[WARM_UP:]
    return {name: 1000 * statistics.median(row[name] for row in measured) for name in measured[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="How long Python is busy with a training step on CUDA.")
    parser.add_argument("--base", default="nano")
    parser.add_argument("--images", type=Path, default=Path(__file__).parent.parent / "datasets_example")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cuda-graph", choices=("auto", "on", "off"), default="auto")
    wanted = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "base.model": wanted.base,
            "data.images": wanted.images,
            "data.batch_size": wanted.batch_size,
            "train.steps": WARM_UP + wanted.steps,
            "train.cuda_graph": wanted.cuda_graph,
            "samples.sample_every": 0,
            "output.output": Path(folder) / "run",
        }
        session = set_up(load_config(None, flags), None, PlainReporter())
        times = measure(session, wanted.steps)
        graphs = session.engine.graphs
        kinds = graphs.kinds if isinstance(graphs, GraphedSteps) else 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {wanted.base}, batch {wanted.batch_size}")
    print(f"{kinds} kinds of batches recorded")
    for name, milliseconds in times.items():
        print(f"{name:>12}: {milliseconds:.3f} ms")


if __name__ == "__main__":
    main()
