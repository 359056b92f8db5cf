"""Places where writing can be made to go wrong, so that tests see what survives it.

Nothing happens unless the environment variable SDLORA_FAULT is set. A file's name there notes every place that is
passed, a line each. `PLACE@N=WHAT` makes the N-th pass of a place, counted from 1, end in `kill` (SIGKILL), `term`
(SIGTERM), `enospc` (a full disk) or `eio` (a broken one); `enospc*4` also fails the next three passes of any place.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable

VARIABLE = "SDLORA_FAULT"
_WISH = re.compile(r"(?P<place>.+)@(?P<number>\d+)=(?P<what>kill|term|enospc|eio)(?:\*(?P<times>\d+))?")


def _noting(file: str) -> Callable[[str], None]:
    def note(place: str) -> None:
        with open(file, "a", encoding="utf-8") as log:
            log.write(place + "\n")

    return note


def _failing(place: str, number: int, what: str, times: int) -> Callable[[str], None]:
    def fail(passed: str) -> None:
        nonlocal number, times
        number -= passed == place
        if number <= 0 < times:
            times -= 1
            _DO[what]()

    return fail


def _raise(number: int) -> None:
    raise OSError(number, os.strerror(number))


_DO: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "enospc": lambda: _raise(errno.ENOSPC),
    "eio": lambda: _raise(errno.EIO),
}


def _wanted(wish: str) -> Callable[[str], None] | None:
    if not wish:
        return None
    found = _WISH.fullmatch(wish)
    if not found:
        return _noting(wish)
    return _failing(found["place"], int(found["number"]), found["what"], int(found["times"] or 1))


_passed = _wanted(os.environ.get(VARIABLE, ""))


def arm(wish: str) -> None:
    """Takes another wish than the environment's, for this process."""
    global _passed
    _passed = _wanted(wish)


def place(name: str) -> None:
    """Marks a place in the order of what is written; digits in its name count as `N`.

    Raises:
        OSError: if a test wants it to.
    """
    if _passed:
        _passed(re.sub(r"\d+", "N", name))
