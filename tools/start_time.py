"""Seconds from the command to the first step, and per step, of one or more versions of sdlora, in turns.

    python -m tools.start_time [FOLDER ...] [--rounds 5] [--steps 60]

A folder holds the source of a version; left out, this one. Each version has a cache folder of its own, which is empty
in its first run: that run counts apart, for it also computes latents and text states.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
POLL = 0.005
"""Seconds between two looks whether a step is done."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[HERE])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], help="a setting for all, as sdlora train takes it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        times: dict[Path, list[tuple[float, float]]] = {folder: [] for folder in options.folders}
        for number in range(options.rounds + 1):
            for i, folder in enumerate(options.folders):
                seen = run(folder.resolve(), Path(place) / f"{i}", number, options.steps, options.set)
                times[folder].append(seen)
        for folder, seen in times.items():
            report(folder, seen)


def run(folder: Path, place: Path, number: int, steps: int, settings: list[str]) -> tuple[float, float]:
    """Trains on the example pictures; returns seconds until the first step was done, and the median of a step."""
    output = place / f"run{number}"
    command = [sys.executable, "-m", "sdlora", "train", "--base", "nano", "--images", str(HERE / "datasets_example")]
    command += ["--steps", str(steps), "--output", str(output), "--set", "samples.sample_every=0"]
    command += [word for setting in settings for word in ("--set", setting)]
    own = {"PYTHONPATH": str(folder), "SDLORA_CACHE": str(place / "cache"), "PYTHONDONTWRITEBYTECODE": ""}
    log, stamps = output / "metrics.jsonl", []
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            done = log.read_bytes().count(b"\n") if log.exists() else 0
            stamps += [time.perf_counter()] * (done - len(stamps))
            time.sleep(POLL)
    if process.returncode or len(stamps) < steps - 1:
        sys.exit(f"{' '.join(command)} ended with {process.returncode} after {len(stamps)} of {steps} steps")
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    return stamps[0] - started, statistics.median(gaps[len(gaps) // 4 :])


def report(folder: Path, seen: list[tuple[float, float]]) -> None:
    (cold, _), *warm = seen
    starts, steps = zip(*warm, strict=True)
    facts = {
        "folder": folder.resolve().name,
        "first_step_cold_s": round(cold, 2),
        "first_step_s": round(statistics.median(starts), 2),
        "first_step_range_s": [round(min(starts), 2), round(max(starts), 2)],
        "step_ms": round(1e3 * statistics.median(steps), 1),
        "step_range_ms": [round(1e3 * min(steps), 1), round(1e3 * max(steps), 1)],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
