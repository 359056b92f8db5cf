"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path


def expanded(path: Path | str) -> Path:
    """Returns a path with the home folder for ~; as it is written where there is no such user, or it is no path."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        return Path(path)
