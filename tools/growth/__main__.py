"""`python -m tools.growth`: what more pictures, a higher rank, larger pictures and more layers cost, with a figure."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdlora.errors import SdloraError
from sdlora.training.precision import choose_precision
from tools.bench.environment import environment
from tools.growth.adapters import measure_ranks, measure_resolutions, measure_targets
from tools.growth.images import Effort, measure_images
from tools.growth.report import verdict, write_json, write_markdown
from tools.growth.trainer import BATCH, DEVICE, settings

RESULT = Path("benchmarks/speed/growth.json")
TARGETS = ("attention", "attention+ff", "conv")


@dataclass(frozen=True)
class Range:
    """What is measured.

    Attributes:
        counts: of pictures.
        ranks: of the LoRA.
        sides: of square pictures, in pixels.
        effort: how thoroughly.
    """

    counts: Sequence[int]
    ranks: Sequence[int]
    sides: Sequence[int]
    effort: Effort


FULL = Range(
    (10, 100, 1000, 10_000),
    (4, 8, 16, 32, 64, 128),
    (64, 96, 128, 192, 256),
    Effort(rounds=11, seconds=20.0, reading_seconds=5.0),
)
QUICK = Range((10, 100), (4, 16), (64, 96), Effort(rounds=3, seconds=1.0, reading_seconds=1.0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; returns the exit code: 0, or 2 for what the person can fix."""
    options = _parse(arguments)
    out: Path = options.out
    try:
        facts = measure(QUICK if options.quick else FULL)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, facts)
        figure = _draw(out.with_suffix(".png"), facts)
        write_markdown(out.with_name(out.stem.upper() + ".md"), facts, figure)
    except SdloraError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"{verdict(facts)}\n{out}")
    return 0


def measure(what: Range) -> dict[str, Any]:
    """Returns all numbers, in plain values that JSON can hold; times in seconds, sizes in bytes."""
    started = time.monotonic()
    config = settings()
    with tempfile.TemporaryDirectory(prefix="sdlora-growth-") as folder:
        _say(started, f"{', '.join(map(str, what.counts))} pictures ...")
        images = measure_images(Path(folder), what.counts, what.effort)
    _say(started, "ranks ...")
    ranks = measure_ranks(what.ranks, what.effort)
    _say(started, "resolutions ...")
    resolutions = measure_resolutions(what.sides, what.effort)
    _say(started, "targets ...")
    targets = measure_targets(TARGETS, what.effort)
    _say(started, "done")
    return {
        "environment": environment(DEVICE),  # asked last, for by now torch has the run's number of threads
        "settings": {
            "batch": BATCH,
            "rank": config.lora.rank,
            "targets": config.lora.targets,
            "precision": choose_precision(config.train.precision, DEVICE).word,
        },
        **images,
        "ranks": ranks,
        "resolutions": resolutions,
        "targets": targets,
        "seconds": round(time.monotonic() - started, 1),
    }


def _say(started: float, what: str) -> None:
    print(f"{time.monotonic() - started:5.0f} s  {what}", flush=True)


def _draw(file: Path, facts: dict[str, Any]) -> str | None:
    """Draws the figure, if that is possible; returns its name."""
    if find_spec("matplotlib") is None:
        print(f"No {file}: matplotlib is missing; install it with: pip install 'sdlora[bench]'", file=sys.stderr)
        return None
    from tools.growth.plot import draw_figure

    draw_figure(file, facts)
    return file.name


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few sizes and few rounds: whether it works at all")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULT,
        help="JSON file; beside it go the figure as .png and, in capitals, the tables as .md (default: %(default)s)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
