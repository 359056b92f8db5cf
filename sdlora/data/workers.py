"""Pictures are decoded in several processes at once, so that neither one core nor one bad file holds up the rest.

A file that makes the decoder crash or hang costs one process, and is named. A process runs `wire.serve` and is led
by a thread here; it knows nothing of the program that started it, so that needs no `if __name__ == "__main__"`. Few
pictures are decoded by the threads themselves.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sdlora
from sdlora.data.decoding import TASKS
from sdlora.data.wire import receive, send
from sdlora.errors import DatasetError

MAX_WORKERS = 16
"""Most processes; each may hold a decoded picture of several hundred megabytes."""
MAX_THREADS = 4
"""Most threads where there are no processes; Python runs one at a time between the loops of the decoder."""
TIMEOUT = 120.0
"""Seconds after which a picture counts as one that hangs; the largest that are read take a few."""
WORTH_SECONDS = 1.0
"""Work for one core that is worth starting processes for; one takes 0.15 s of a core to start."""

_PROGRAM = "from sdlora.data.wire import serve; serve()"


def cores() -> int:
    """Returns how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # in a container, fewer than the machine has
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def expected_seconds(files: Iterable[Path]) -> float:
    """Estimates how long one core takes to decode pictures, from the sizes of their files.

    Source: measured, photographs of 1 to 12 megapixels as JPEG and PNG: 20 to 40 ms a megabyte, and 1 ms for any file.
    """
    return sum(0.001 + 0.03e-6 * _size(file) for file in files)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # whoever reads it will say what is wrong


class Workers:
    """Does tasks of `decoding.TASKS`, several at a time; use it in a `with` block.

    Args:
        seconds: expected work for one core, which decides whether there are processes.
        count: how many there are at most; `None` takes the number of cores.
    """

    def __init__(self, seconds: float, count: int | None = None) -> None:
        most = min(count or cores(), max(1, round(2 * seconds)))
        self._processes = seconds >= WORTH_SECONDS and bool(sys.executable)
        self._width = min(MAX_WORKERS if self._processes else MAX_THREADS, most)
        self._pool = ThreadPoolExecutor(self._width)
        self._workers = [_Worker() for _ in range(self._width if self._processes else 0)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._over = threading.Event()

    def __enter__(self) -> Workers:
        if self._processes:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.end()
        self._pool.shutdown()
        for worker in self._workers:
            worker.close()

    def map(self, task: str, items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yields what the task makes of each item, or the `DatasetError` that it raised, in the order of the items.

        Only a few results wait to be fetched, however many items there are.

        Args:
            task: name of the function.
            items: its arguments; the first is the file.
        """
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(self._pool.submit(self._do, task, item))
            if len(waiting) > 2 * self._width:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _do(self, task: str, item: tuple[Any, ...]) -> Any:
        try:
            return self._in_process(task, item) if self._processes else TASKS[task](*item)
        except DatasetError as error:
            return error

    def _in_process(self, task: str, item: tuple[Any, ...]) -> Any:
        worker = self._idle.get()
        try:
            try:
                return worker.do(task, item)
            except _Lost as lost:
                if lost.hung:
                    raise
                return worker.do(task, item)  # the system may have ended it for want of memory, by no fault of its own
        except _Lost as lost:
            raise DatasetError(f"{item[0]}: {lost}; convert or remove the file") from lost
        except _NotStarted:
            self._processes = False
            return TASKS[task](*item)
        finally:
            self._idle.put(worker)

    def _watch(self) -> None:
        """Ends processes whose picture takes too long; their threads then find them gone."""
        while not self._over.wait(min(1.0, TIMEOUT / 4)):
            for worker in self._workers:
                worker.end_if_hung()


class _Lost(Exception):
    """A process ended before it had answered.

    Attributes:
        hung: whether it was ended for taking too long.
    """

    def __init__(self, reason: str, hung: bool) -> None:
        super().__init__(reason)
        self.hung = hung


class _NotStarted(Exception):
    """This machine starts no such process."""


class _Worker:
    """A process that is started when it is needed, and again after it was lost."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._since: float | None = None
        self._hung = self._ended = False

    def do(self, task: str, item: tuple[Any, ...]) -> Any:
        """Lets the process do a task.

        Raises:
            DatasetError: what the task raises.
            _Lost: if the process ends meanwhile.
            _NotStarted: if it cannot be started.
        """
        if self._ended:
            raise _Lost("is not wanted any more", hung=True)
        process = self._process = self._process or _started()
        assert process.stdin and process.stdout
        self._since = time.monotonic()
        try:
            send(process.stdin, (task, item))
            answer = receive(process.stdout)
        except (OSError, EOFError) as error:
            raise self._lost(process) from error
        finally:
            self._since = None
        if isinstance(answer, DatasetError):
            raise answer
        return answer

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._ended = True
        if self._process:
            self._process.kill()

    def close(self) -> None:
        """Ends the process and waits until it is gone."""
        self.end()
        if self._process:
            with self._process:
                pass

    def end_if_hung(self) -> None:
        """Ends the process if its task takes too long."""
        process, since = self._process, self._since
        if process and since is not None and time.monotonic() - since > TIMEOUT:
            self._hung = True
            process.kill()

    def _lost(self, process: subprocess.Popen[bytes]) -> _Lost:
        process.kill()
        with process:  # closes the pipes
            code = process.wait()
        hung, self._hung, self._process = self._hung, False, None
        if hung:
            return _Lost(f"is not decoded within {TIMEOUT:g} s", hung=True)
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _Lost(f"makes the decoder crash ({cause})", hung=self._ended)


def _started() -> subprocess.Popen[bytes]:
    package = str(Path(sdlora.__file__).parent.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # so that Ctrl-C reaches this process alone, which knows what to do
        )
    except OSError as error:
        raise _NotStarted from error
    try:
        assert process.stdout
        receive(process.stdout)  # that it is ready
    except (OSError, EOFError) as error:
        process.kill()
        with process:
            raise _NotStarted from error
    return process
