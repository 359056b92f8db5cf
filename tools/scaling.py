"""How much several processes get done: pictures per second for 1, 2, … processes with the same batch in each.

    python -m tools.scaling --processes 1 2 --rounds 3

Rounds go through all numbers of processes by turns, so that what else the machine does meets all of them. As many runs
that know nothing of each other are measured too: what those lose is the machine's doing, the rest is the exchange's.
Efficiency is the rate of N processes over N times the rate of one, its median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.bench.environment import environment

ROOT = Path(__file__).parents[1]
PICTURES = 24
"""Pictures of an epoch, all square: whole batches for up to 6 processes of 4 pictures, so that nobody waits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers to try")
    parser.add_argument("--batch", type=int, default=4, help="pictures per batch of each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of each run; the first warms up and is not counted")
    parser.add_argument("--base", default="nano")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "speed" / "scaling.json")
    options = parser.parse_args()
    several = [count for count in options.processes if count > 1]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        copy_pictures(work / "pictures")
        rounds = [measure(work, options, several) for _ in range(options.rounds)]
    rows = [summary(count, rounds) for count in several]
    one = statistics.median(each["1"] for each in rounds)
    print(f"1 process: {one:.2f} images/s")
    for row in rows:
        print(
            f"{row['processes']} processes: {row['images_per_second']:.2f} images/s, "
            f"efficiency {row['efficiency']:.0%} "
            f"(the same number of runs without exchange: {row['without_exchange']:.0%})"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    facts = environment(device) | {"threads": 1}
    report = {"environment": facts, "settings": settings, "one": one, "rows": rows, "rounds": rounds}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def copy_pictures(folder: Path) -> None:
    """Puts some of the example pictures and their captions into a folder."""
    folder.mkdir()
    for picture in sorted((ROOT / "datasets_example").glob("*.png"))[:PICTURES]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, folder)


def measure(work: Path, options: argparse.Namespace, several: Sequence[int]) -> dict[str, float]:
    """Returns pictures per second: `N` for N processes, `Nx` for N runs at once."""
    rates = {"1": rate_of(work, options, [1])}
    for count in several:
        rates[str(count)] = rate_of(work, options, [count])
        rates[f"{count}x"] = rate_of(work, options, [1] * count)
    return rates


def rate_of(work: Path, options: argparse.Namespace, runs: Sequence[int]) -> float:
    """Trains, in as many processes as each of the runs asks for, all at once; returns pictures per second together."""
    started = []
    for number, processes in enumerate(runs):
        folder = work / f"run{number}"
        shutil.rmtree(folder, ignore_errors=True)
        arguments: dict[str, Any] = {
            "base": options.base,
            "images": work / "pictures",
            "batch-size": options.batch,
            "precision": options.precision,
            "epochs": options.epochs,
            "processes": processes,
            "threads": 1,
            "sample-every": 0,
            "save-every": 1000,
            "cache-dir": work / "cache",
            "output": folder,
        }
        flags = [f"--{name}={value}" for name, value in arguments.items()]
        command = [sys.executable, "-m", "sdlora", "train", "--no-buckets", *flags]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ)
        started.append((process, folder))
    for process, folder in started:
        if process.wait():
            raise SystemExit(f"the run in {folder} ended with {process.returncode}")
    return sum(steady_rate(folder, options.epochs) for _, folder in started)


def steady_rate(run: Path, epochs: int) -> float:
    """Returns pictures per second from the end of the first epoch to the end of the run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first = max(line["step"] for line in lines if line["epoch"] == 1)
    seconds = PICTURES * epochs / lines[-1]["images_per_second"] - PICTURES / lines[first - 1]["images_per_second"]
    return PICTURES * (epochs - 1) / seconds


def summary(count: int, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Returns a row of the report."""
    return {
        "processes": count,
        "images_per_second": statistics.median(each[str(count)] for each in rounds),
        "efficiency": statistics.median(each[str(count)] / (count * each["1"]) for each in rounds),
        "without_exchange": statistics.median(each[f"{count}x"] / (count * each["1"]) for each in rounds),
    }


if __name__ == "__main__":
    main()
