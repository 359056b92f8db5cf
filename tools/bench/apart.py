"""A contender in a process of its own, as people run it: neither side's memory and allocator are the other's.

The process is this module; it reads calls from a pipe and answers them. sdlora's is set up as `sdlora train` sets up
its own, and the reference's is left as it comes.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sdlora.allocator import keep_freed_memory
from sdlora.errors import SdloraError

if TYPE_CHECKING:  # torch is imported after the process is set up
    from torch import Tensor

    from tools.bench.check import Gradients
    from tools.bench.results import SideResult
    from tools.bench.rows import Row


class Apart:
    """Hands on what is asked of a contender.

    Args:
        name: of the side.
        row: what is measured.
        found: is told the memory.
        threads: of the CPU; 0: torch's number.

    Attributes:
        gradients: what it computed for the first batch, before any update.

    Raises:
        SdloraError: if the side cannot be built, or its process was killed.
    """

    def __init__(self, name: str, row: Row, found: SideResult, threads: int = 0) -> None:
        self._name = name
        ours, its = socket.socketpair()
        with ours, its:
            command = [sys.executable, "-m", __name__, name, str(its.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[its.fileno()])
            self._pipe = Connection(ours.detach())
        self.gradients: Gradients
        try:
            memory, self.gradients = self._ask((row, threads))
        except Exception:
            self.end()
            raise
        found.peak_bytes, found.building_bytes = memory["peak_bytes"], memory["building_bytes"]

    @property
    def notes(self) -> list[str]:
        """What the side says of how it computes."""
        return self._ask("notes")

    def operations(self) -> int:
        """Returns how many operations an optimizer step dispatches."""
        return self._ask("operations")

    def step(self) -> None:
        """Does an optimizer step on the next batch."""
        self._ask("step")

    def frozen_weights(self) -> dict[str, Tensor]:
        """Returns the weights that the side computes with where they are not the base's own, by layer."""
        return self._ask("frozen_weights")

    def end(self) -> None:
        """Ends the process; there can be no calls after that."""
        self._pipe.close()
        self._process.wait()

    def _ask(self, what: Any) -> Any:
        try:
            _send(self._pipe, what)
            answer = _receive(self._pipe)
        except (EOFError, OSError):
            code = self._process.wait()
            why = "was killed by the system, probably for memory" if code == -9 else f"ended with code {code}"
            raise SdloraError(f"the process of {self._name} {why}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def serve(pipe: Connection, name: str) -> None:
    """Builds a contender for the row that it is sent, and answers calls until the pipe is closed."""
    import torch

    from tools.bench.contest import BUILDERS, prepare
    from tools.bench.results import SideResult

    row, threads = _receive(pipe)
    if threads:
        torch.set_num_threads(threads)
    found = SideResult()
    try:
        contender = prepare(BUILDERS[name], row, torch.device("cpu"), found)
    except (SdloraError, torch.OutOfMemoryError) as error:
        return _send(pipe, error)
    _send(pipe, (asdict(found), contender.gradients))
    answers: dict[str, Callable[[], Any]] = {
        "step": contender.step,
        "notes": lambda: contender.notes,
        "operations": contender.operations,
        "frozen_weights": contender.frozen_weights,
    }
    with suppress(EOFError):
        while True:
            _send(pipe, answers[_receive(pipe)]())


def _send(pipe: Connection, what: Any) -> None:
    pipe.send_bytes(pickle.dumps(what))  # `send` would have torch share tensors' memory instead of copying them


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


if __name__ == "__main__":
    side, fd = sys.argv[1:]
    if side == "sdlora":
        keep_freed_memory()
    serve(Connection(int(fd)), side)
    os._exit(0)  # gigabytes are given back faster by the system than by Python
