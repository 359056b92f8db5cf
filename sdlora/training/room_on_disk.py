"""A disk that is full while a run writes: room is made of old checkpoints, and then the run waits for some.

A file of the final LoRA's size is kept from the start and given up for it, so that what was learned can be written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sdlora.errors import DiskFullError
from sdlora.training.checkpoint import prune
from sdlora.training.folder import RunFolder
from sdlora.training.progress import Reporter

RESERVE = ".reserve"
PATIENCE = 1800.0
"""Seconds that a run waits for room before it gives up; less than processes wait for each other."""
POLL = 2.0
"""Seconds between two tries."""

T = TypeVar("T")


def reserve(root: Path, size: int) -> None:
    """Keeps `size` bytes of the disk for what must be written in the end; does nothing where that is impossible."""
    with suppress(OSError), (root / RESERVE).open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.write(bytes(size))


def give_up_reserve(root: Path) -> bool:
    """Frees what was kept; returns whether there was anything."""
    with suppress(OSError):
        (root / RESERVE).unlink()
        return True
    return False


def with_room(write: Callable[[], T], run: RunFolder, reporter: Reporter, stopped: Callable[[], bool]) -> T:
    """Writes something, and if the disk is full makes room, or waits for it.

    Args:
        write: leaves nothing behind when it fails.
        run: whose old checkpoints may go; the newest stays.
        reporter: told of it.
        stopped: whether the user does not want to wait any more.

    Raises:
        DiskFullError: if there is no room after `PATIENCE` seconds, or when the user stops.
    """
    try:
        return write()
    except DiskFullError as error:
        problem = error
    if prune(run.checkpoints):
        reporter.warn(f"{problem}. Older checkpoints of this run were removed")
        with suppress(DiskFullError):
            return write()
    reporter.warn(f"{problem}. Waiting for room; Ctrl-C ends the run, and the last checkpoint stays")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not stopped():
        time.sleep(POLL)
        with suppress(DiskFullError):
            result = write()
            reporter.say("There is room again; going on.")
            return result
    raise problem
