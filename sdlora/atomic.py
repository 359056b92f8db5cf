"""Files that are either complete or absent: written under a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdlora.errors import DiskFullError, TrainingError
from sdlora.faults import place

BEGUN = ".sdlora-"
"""How the names of files begin that are not complete yet."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on leaving without an error it becomes `path`.

    The folder is made if need be. A crash or a power cut leaves either the old file or the new one.

    Raises:
        TrainingError: if the disk is full, the folder cannot be written, or the like; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{BEGUN}{path.stem[:40]}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        place(f"{_plain(path.name)} begun")
        yield temporary
        place(f"{_plain(path.name)} written")
        flush(temporary)
        temporary.chmod(0o666 & ~_UMASK)
        place(f"{_plain(path.name)} flushed")
        os.replace(temporary, path)
        place(f"{_plain(path.name)} in place")
        flush(path.parent)
    except OSError as error:
        raise explained(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _plain(name: str) -> str:
    """Returns the name that a file will have in the end; what is begun may itself be written in this way."""
    return re.sub(rf"^{re.escape(BEGUN)}(.+)-\w{{8}}(\.\w+)?$", r"\1\2", name)


def sweep(folder: Path) -> None:
    """Removes what a process that was killed had begun to write; nobody may be writing there."""
    for path in folder.rglob(f"{BEGUN}*"):
        path.unlink(missing_ok=True)


def free_space(path: Path) -> tuple[Path, int]:
    """Returns the nearest folder that is there, `path` itself or one above it, and the free bytes on its disk."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    return there, shutil.disk_usage(there).free


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one piece; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes a UTF-8 file in one piece; see `replacing`."""
    write_bytes(path, content.encode("utf-8"))


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _current_umask()  # mkstemp makes files private; ours get the usual permissions


def flush(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain(path: Path, error: OSError) -> str:
    """Says why a file could not be written, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk for {path}; free some and run again, nothing written before was lost"
    return f"cannot write {path}: {error.strerror or error}"


def explained(path: Path, error: OSError) -> TrainingError:
    """Returns the error to raise for a file that could not be written."""
    kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else TrainingError
    return kind(explain(path, error))
