"""What is known of the pictures in a folder since the last look, so that a second look need not read them.

A picture counts as the same as long as its file has the same size, times and number on the disk. What was written in
the last seconds before a look is read again at the next one: another change might not show in its times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL

from sdlora.data.cache import Cache
from sdlora.data.decoding import Seen
from sdlora.file_identity import identity, is_settled

_VERSION = 2  # raise it when pictures that were found readable have to be looked at again


class PictureIndex:
    """The pictures of one folder: file -> its identity, hash, width, height, notes.

    Args:
        folder: where they lie.
        cache: where the index is kept; `None`: nowhere.
    """

    def __init__(self, folder: Path, cache: Cache | None) -> None:
        self._folder, self._cache = folder, cache
        self._key = Cache.key("pictures", _VERSION, PIL.__version__, str(folder.resolve()))
        self._before: dict[str, list[Any]] = (cache.facts(self._key) if cache else None) or {}
        self._now: dict[str, list[Any]] = {}

    def same(self, path: Path) -> Seen | None:
        """Returns what is known of a picture that was not touched since, else `None`."""
        name = self._name(path)
        row = self._before.get(name)
        if row is None or state(path) != row[0]:
            return None
        self._now[name] = row
        return _seen(row)

    def before(self, path: Path) -> Seen | None:
        """Returns what was known of a picture that may be another one by now."""
        row = self._before.get(self._name(path))
        return _seen(row) if row else None

    def note(self, path: Path, seen: Seen, before: list[int] | None) -> None:
        """Notes what was seen.

        Args:
            path: the picture.
            seen: what was seen of it.
            before: what `state` returned before it was read.
        """
        if before and is_settled(tuple(before)) and before == state(path):
            self._now[self._name(path)] = [before, seen.digest, seen.width, seen.height, list(seen.notes)]

    def save(self) -> None:
        """Keeps what was noted, if it is something new."""
        if self._cache and self._now != self._before:
            self._cache.keep_facts(self._key, self._now)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def state(path: Path) -> list[int] | None:
    """Returns a file's identity as it is kept, or `None` if there is no such file."""
    try:
        return list(identity(path))
    except OSError:
        return None


def _seen(row: list[Any]) -> Seen:
    return Seen(row[1], row[2], row[3], tuple(row[4]))
