"""`--processes N`: starts the processes of a run on this machine, hands signals on, and ends all when one fails.

The processes find each other as those of torchrun do, through the environment. This one computes nothing and does not
even import torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import click

STARTED_BY_US = "SDLORA_STARTED_BY"
"""Environment variable of the processes started here."""
GRACE = 10.0
"""Seconds that the other processes have to end by themselves after one has failed."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start(count: int, command: Sequence[str]) -> int:
    """Runs a command in several processes that train together.

    Args:
        count: how many.
        command: program and arguments, the same for all.

    Returns:
        The exit code: 0 when all ended well, else that of a process that did not.
    """
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        STARTED_BY_US: str(os.getpid()),
    }
    processes: list[subprocess.Popen[bytes]] = []
    with _signals_to(processes):
        try:
            for rank in range(count):
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A group of its own, so that Ctrl-C comes once, from here, and not from the terminal too. Its input
                # ends when this process does, whatever happened to it.
                group = 0 if os.name == "posix" else None
                processes.append(subprocess.Popen(command, env=own, stdin=subprocess.PIPE, process_group=group))
            _wait(processes)
        finally:
            ended = [process.poll() for process in processes]
            for process in processes:
                process.kill()
                process.wait()
    for rank, code in enumerate(ended):
        if code is not None and code < 0:
            click.echo(f"Error: process {rank} of {count} was killed ({signal.Signals(-code).name})", err=True)
    return max(1 if code is None or code < 0 else code for code in ended)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits until all have ended, or one has failed and the others had time to."""
    deadline = float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return
        if deadline == float("inf") and any(codes):
            deadline = time.monotonic() + GRACE
        time.sleep(0.05)


@contextmanager
def _signals_to(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hands signals on to the first process, which sees to it that all stop after the same step."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        if processes:
            processes[0].send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def this_command() -> list[str]:
    """Returns the command line of this process, for a process that does the same."""
    return [sys.executable, "-m", "sdlora", *sys.argv[1:]]


def is_one_of_several() -> bool:
    """Tells whether this process was started with others to train together, by whatever program."""
    return "WORLD_SIZE" in os.environ


def end_at_once(program: Callable[[], None]) -> NoReturn:
    """Runs a program and ends the process without winding Python up.

    Threads of torch's distributed package outlive the run by a moment, and one that lets go of a tensor while Python
    winds up aborts the process: that happened to 4 of 20 processes that had finished their work.
    """
    code: Any = 0
    try:
        program()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody may be reading any more
            stream.flush()
    os._exit(code)


def started_here() -> bool:
    """Tells whether this process is one of those that `start` started."""
    return STARTED_BY_US in os.environ


def stop_with_parent() -> None:
    """Has a process that `start` started stop, as Ctrl-C would, when the one that started it is gone."""

    def wait() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock would be held when the program ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
