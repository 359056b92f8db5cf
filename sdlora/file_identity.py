"""Whether a file is still the one that it was, told without reading it: what was computed from it can be kept."""

from __future__ import annotations

import os
import time
from pathlib import Path

SETTLED_SECONDS = 2.0
"""A file written less than this before it is read may be written again within the same tick of the clock (FAT: 2 s)."""

Identity = tuple[int, ...]
"""Size in bytes, times of the last change of content and of properties in nanoseconds, number on the disk."""


def identity(path: Path) -> Identity:
    """Returns what changes whenever a file is written, replaced or exchanged for another.

    Raises:
        OSError: if there is no such file.
    """
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def is_settled(known: Identity) -> bool:
    """Tells whether a file is so old that a change from now on would show in its identity.

    Source: the same rule for entries of Git's index, `Documentation/technical/racy-git`.
    """
    return time.time() - max(known[1], known[2]) / 1e9 > SETTLED_SECONDS
