"""Where a result may go: not over what it is made from, not over something else, and only where there is room."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sdlora.atomic import free_space
from sdlora.errors import ConfigError, TrainingError


def require_file_target(out: Path, inputs: Iterable[Path]) -> None:
    """Checks the name of a .safetensors file that is to be written; an older one there will be replaced.

    Args:
        out: the file.
        inputs: files and folders that it is made from.

    Raises:
        ConfigError: if it is a folder, has another ending, or is one of the inputs.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; give the name of the file to write, e.g. {out / 'merged.safetensors'}")
    if out.suffix.lower() != ".safetensors":
        raise ConfigError(f"{out} must end in .safetensors, or no program will find it; write {out}.safetensors")
    _require_apart(out, inputs)


def require_folder_target(out: Path, inputs: Iterable[Path]) -> None:
    """Checks a folder that is to be written.

    Args:
        out: the folder.
        inputs: files and folders that it is made from.

    Raises:
        ConfigError: if it is a file, holds something, or lies in one of the inputs.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; the base is a folder, so give a folder")
    _require_apart(out, inputs)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new folder, so that nothing in it can be overwritten")


def _require_apart(out: Path, inputs: Iterable[Path]) -> None:
    place = Path(os.path.realpath(out))  # Path.resolve raises an error for links in a circle
    for path in inputs:
        if Path(os.path.realpath(path)) in (place, *place.parents):
            raise ConfigError(f"{out} would be written over {path}, which it is made from; give another name")


def require_space(out: Path, needed: int) -> None:
    """Checks the free disk space before minutes of work.

    Args:
        out: file or folder to be.
        needed: bytes.

    Raises:
        TrainingError: if fewer are free where `out` will lie.
    """
    there, free = free_space(out.absolute().parent)
    if free < needed:
        raise TrainingError(
            f"{there} has {free / 1e6:.0f} MB free, and {out.name} takes {needed / 1e6:.0f} MB; free some, or write it "
            "to another disk"
        )
