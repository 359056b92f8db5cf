"""Files that are either complete or absent: written under a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdlora.errors import TrainingError


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
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise TrainingError(explain(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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


def _flush(path: Path) -> None:
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
