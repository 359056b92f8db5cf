"""One measurement in a process of its own, so that running out of memory is one cell of the table and not its end.

`python -m tools.bench.worker JOB --result FILE`; the bench itself starts it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sdlora.errors import SdloraError
from sdlora.training.device import DTYPES
from tools.bench.contest import Contest
from tools.bench.environment import environment
from tools.bench.floor import gemm_rate
from tools.bench.rows import ROWS, Row

PRECISIONS = ("bf16", "fp32")


class WorkerError(SdloraError):
    """A measurement ended without a result."""


def machine(device: torch.device, **_: Any) -> dict[str, Any]:
    """Returns the environment and the rate of the best product in each precision, flop a second."""
    rates = {name: gemm_rate(device, DTYPES[name]) for name in PRECISIONS}
    return {"environment": environment(device), "flop_per_second": rates}


def speed(
    device: torch.device, row: Row, rounds: int, limit: float, threads: int | None = None, **_: Any
) -> dict[str, Any]:
    """Returns all that is measured of a row."""
    apart = (threads or 0) if device.type == "cpu" else None
    contest = Contest(row, device, apart=apart)
    try:
        return asdict(contest.run(rounds=rounds, limit=limit))
    finally:
        contest.release()


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {"machine": machine, "speed": speed}


def run_job(job: str, *, timeout: float | None = None, **options: object) -> dict[str, Any]:
    """Does a job in a fresh process and returns its result.

    Args:
        job: a name of `JOBS`.
        timeout: seconds after which the process is stopped.
        **options: flags of this program, without their dashes.

    Raises:
        WorkerError: if it was stopped, killed for memory, or failed.
    """
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", __name__, job, "--result", str(file), *flags]
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise WorkerError(f"stopped after {timeout:.0f} s") from None
        if done.returncode or not file.is_file():
            lines = done.stderr.strip().splitlines()
            killed = "killed by the system, probably for memory" if done.returncode == -9 else "failed"
            raise WorkerError(lines[-1] if lines and done.returncode != -9 else killed)
        return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.worker", description=__doc__)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--row", type=ROWS.__getitem__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--threads", type=int)
    options = vars(parser.parse_args())
    job, result = (options.pop(name) for name in ("job", "result"))
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    result.write_text(json.dumps(JOBS[job](**options)), encoding="utf-8")


if __name__ == "__main__":
    main()
