"""One process writes a run's folder at a time, and leaves a sign of life there.

The lock is the system's own, so it ends with the process that holds it, however that ends. The sign of life, a small
JSON file, says how far the run is and when it was last heard of.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from sdlora.atomic import BEGUN
from sdlora.errors import ConfigError

LOCK, HEARTBEAT = ".lock", "heartbeat.json"
INTERVAL = 5.0
"""Seconds between two signs of life."""


class Lock:
    """The right to write a run's folder; let go of it with `release`, or by ending."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def take(self, root: Path) -> None:
        """Takes the folder for this process.

        Raises:
            ConfigError: if another process has it.
        """
        try:
            file = (root / LOCK).open("a", encoding="utf-8")
        except OSError:
            return  # what cannot be written there, those who write will say better
        try:
            _lock(file)
        except BlockingIOError:
            file.close()
            raise ConfigError(f"{root} is in use: {owner(root)}; wait for it to end, or stop it") from None
        except OSError:  # a shared disk that knows no locks
            file.close()
            return
        self._file = file

    def release(self) -> None:
        """Lets others write."""
        if self._file:
            self._file.close()
            self._file = None


def _lock(file: IO[str]) -> None:
    """Locks an open file, or raises `BlockingIOError` if somebody else has."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError from error
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def owner(root: Path) -> str:
    """Says who trains in a folder, as far as its last sign of life tells."""
    try:
        sign = json.loads((root / HEARTBEAT).read_text(encoding="utf-8"))
        ago = max(0.0, time.time() - sign["time"])
        who = f"process {sign['process']} on {sign['machine']}"
        return f"{who} trains there, at step {sign['step']} of {sign['total_steps']} {ago:.0f} s ago"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process trains there"


class Heartbeat:
    """Writes signs of life.

    Args:
        root: the run's folder.
        total_steps: of the run.
        clock: tells the seconds since some moment.
    """

    def __init__(self, root: Path, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = root / HEARTBEAT, clock
        self._facts: dict[str, Any] = {"total_steps": total_steps, "process": os.getpid(), "machine": platform.node()}
        self._due = -float("inf")

    def beat(self, step: int, state: str = "running") -> None:
        """Tells how far the run is, every few seconds or when its state changes: running, finished, stopped, failed."""
        if self._clock() < self._due and state == "running":
            return
        self._due = self._clock() + INTERVAL
        temporary = self._file.with_name(f"{BEGUN}{self._file.name}")
        with suppress(OSError):  # a full disk is met by what matters more
            temporary.write_text(json.dumps({"state": state, "step": step, "time": time.time(), **self._facts}))
            os.replace(temporary, self._file)  # not flushed: after a power cut nobody asks
