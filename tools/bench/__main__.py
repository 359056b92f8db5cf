"""`python -m tools.bench`: sdlora's step against diffusers' example, side by side. JSON and a table come out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdlora.errors import ConfigError, SdloraError
from tools.bench.floor import count_flop
from tools.bench.report import table, write_readme, write_report
from tools.bench.results import complete
from tools.bench.rows import Row, choose_rows
from tools.bench.worker import WorkerError, run_job

RESULTS = Path("benchmarks/speed")
LONGEST_JOB = 300.0
"""Seconds after which a measurement is given up."""
GRACE = 30.0
"""Seconds that a measurement which has begun may take beyond `--seconds`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit code: 0, or 2 for what the person can fix."""
    options = _parse(arguments)
    try:
        if options.readme:
            write_readme(options.readme, _tables())
        else:
            _run(options)
    except SdloraError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _tables() -> str:
    """Returns the tables of all results there are; other tools keep theirs in the same folder."""
    results = [_read(file) for file in sorted(RESULTS.glob("*.json")) if "flop_per_second" in _read(file)]
    return "\n\n".join(map(table, results))


def _run(options: argparse.Namespace) -> None:
    started = time.monotonic()
    rows = choose_rows(options.rows)
    device = _device(rows)
    out: Path = options.out or RESULTS / f"{rows[0].group}.json"
    common: dict[str, Any] = {"device": device} | ({"threads": options.threads} if options.threads else {})
    machine = run_job("machine", **common)
    found: dict[str, Any] = {}
    left = [row.name for row in rows]
    write_report(out, machine, found, left)
    for row in rows:
        spent = time.monotonic() - started
        if spent > options.seconds:
            print(f"The {options.seconds:.0f} s are used up; left out: {', '.join(left)}")
            break
        left.remove(row.name)
        print(f"{spent:5.0f} s  {row.title} ...", flush=True)
        job = {"row": row.name, "timeout": min(LONGEST_JOB, options.seconds - spent + GRACE), **common}
        try:
            found[row.name] = _measure(row, machine["flop_per_second"][row.precision], options, job)
        except WorkerError as error:
            found[row.name] = {"error": str(error)}
        write_report(out, machine, found, left)
    print(f"\n{out.with_suffix('.md').read_text(encoding='utf-8')}\n{out}")


def _measure(row: Row, rate: float, options: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    found = run_job("speed", **job, rounds=options.pairs, limit=options.row_seconds)
    return complete(found, count_flop(row), rate)


def _device(rows: Sequence[Row]) -> str:
    groups = {row.group for row in rows}
    if len(groups) > 1:
        raise ConfigError("rows of the CPU and rows of the GPU go into separate reports; ask for one kind at a time")
    if groups == {"cpu"}:
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(f"{rows[0].name} needs a CUDA device, and torch {torch.__version__} finds none")
    return "cuda"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    add = parser.add_argument
    add("--rows", default="cpu", help="cpu, gpu, or names of rows with commas between (default: cpu)")
    add("--pairs", type=int, default=9, help="rounds in which both sides step (default: 9)")
    add("--seconds", type=float, default=1800.0, help="no new row begins after this time (default: 1800)")
    add("--row-seconds", type=float, default=90.0, help="no new round of a row begins after this time (default: 90)")
    add("--threads", type=int, help="CPU threads of both sides (default: torch's)")
    add("--out", type=Path, help=f"JSON file; the table goes beside it (default: {RESULTS}/cpu.json or gpu.json)")
    add("--readme", type=Path, help=f"measure nothing, but put the tables of {RESULTS} between the marks of this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
