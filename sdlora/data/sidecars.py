"""Captions that lie beside pictures, in the four ways that people keep them.

For `a.png`: `a.txt`, else `a.caption`, else `a.json`, else its line in a `metadata.jsonl` of the same folder or one
above. What is there must be readable: a caption that is empty or not UTF-8 is a mistake to be told, not a picture
without one.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdlora.data.tree import NAMED, Tree
from sdlora.errors import DatasetError

ENDINGS = (".txt", ".caption", ".json")
"""Of caption files, in the order in which they are preferred."""
METADATA = "metadata.jsonl"
MAX_BYTES = 2**20
"""A longer text is no caption."""


def is_sidecar(path: Path) -> bool:
    """Tells from its name whether a file can hold captions."""
    return path.suffix.lower() in (*ENDINGS, ".jsonl")


class Sidecars:
    """All caption files of a folder.

    Args:
        tree: for names and the root.
        files: the caption files.

    Attributes:
        used: files from which a caption was taken.
        problems: what is wrong with captions that were asked for, a clause each.
    """

    def __init__(self, tree: Tree, files: Sequence[Path]) -> None:
        self.tree, self.files = tree, files
        self.used: set[Path] = set()
        self.problems: list[str] = []
        self._beside = {(path.parent, _plain(path.stem), path.suffix.lower()): path for path in files}
        self._tables = {path.parent: path for path in files if path.name == METADATA}
        self._lines: dict[Path, dict[str, Any]] = {}

    def caption(self, picture: Path) -> str | None:
        """Returns the caption of a picture in one line, or `None` if it has none or a bad one, see `problems`."""
        for ending in ENDINGS:
            path = self._beside.get((picture.parent, _plain(picture.stem), ending))
            if path:
                self.used.add(path)
                try:
                    text = _read(path)
                    return _filled(_from_json(json.loads(text)) if ending == ".json" else text)
                except (DatasetError, ValueError, RecursionError) as error:
                    reason = str(error) if isinstance(error, DatasetError) else f"is not JSON ({error})"
                    self.problems.append(f"{self.tree.name(path)} {reason}")
                    return None
        return self._from_metadata(picture)

    def unread(self) -> list[Path]:
        """Returns the files from which no caption was taken: without a picture, or another file was preferred."""
        return [path for path in self.files if path not in self.used]

    def lines_without_picture(self, pictures: Sequence[Path]) -> int:
        """Returns how many lines of metadata.jsonl name none of the pictures."""
        known = {_place(Path(), path.absolute().as_posix()) for path in pictures}
        return sum(place not in known for table in self._tables.values() for place in self._table(table))

    def raise_problems(self) -> None:
        """Raises what has gone wrong so far.

        Raises:
            DatasetError: if there are problems; names the first few.
        """
        if not self.problems:
            return
        count = len(self.problems)
        more = f"\n  and {count - NAMED} more" if count > NAMED else ""
        raise DatasetError(
            f"{count} caption{'s' * (count > 1)} in {self.tree.root} cannot be used:\n  "
            + "\n  ".join(self.problems[:NAMED])
            + more
            + "\nPut it right, as UTF-8 and not empty, or delete it; a picture without a caption gets the trigger word"
        )

    def _from_metadata(self, picture: Path) -> str | None:
        wanted = _place(Path(), picture.absolute().as_posix())
        for folder in picture.parents:
            path = self._tables.get(folder)
            if path and wanted in (table := self._table(path)):
                self.used.add(path)
                try:
                    return _filled(_from_json(table[wanted]))
                except DatasetError as error:
                    self.problems.append(f"{picture.name} in {self.tree.name(path)} {error}")
                    return None
            if folder == self.tree.root:
                break
        return None

    def _table(self, path: Path) -> dict[str, Any]:
        if path not in self._lines:
            self._lines[path] = {}
            try:
                self._lines[path] = dict(_table(path))
            except DatasetError as error:
                self.problems.append(f"{self.tree.name(path)} {error}")
                self.used.add(path)
        return self._lines[path]


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read(path, limit=None).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"is not JSON in line {number} ({error})") from error
        name = row.get("file_name", row.get("image_path")) if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise DatasetError(f"has no file_name in line {number}")
        yield _place(path.parent.absolute(), name), row


def _read(path: Path, limit: int | None = MAX_BYTES) -> str:
    try:
        if limit is not None and path.stat().st_size > limit:
            raise DatasetError(f"is larger than {limit // 2**20} MiB, too long for a caption")
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        return content.decode("utf-8")
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        seen = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise DatasetError(f"is not UTF-8 ({seen})") from error


def _from_json(value: Any) -> str:
    """Takes the words out of a JSON caption; tags follow the caption, as in sd-scripts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not {"caption", "text", "tags"} & value.keys():
        raise DatasetError("has none of caption, text and tags")
    caption, tags = value.get("caption", value.get("text", "")), value.get("tags", [])
    tags = [tags] if isinstance(tags, str) else tags
    if not isinstance(caption, str) or not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DatasetError("should have a text as caption, and a text or a list of texts as tags")
    return ", ".join(part for part in (caption.strip(), *(tag.strip() for tag in tags)) if part)


def _filled(text: str) -> str:
    joined = " ".join(line.strip() for line in text.splitlines() if line.strip())
    if not joined:
        raise DatasetError("is empty")
    return joined


def _plain(name: str) -> str:
    # The same name can be spelled in two ways in Unicode; archives made on a Mac often mix them.
    return unicodedata.normalize("NFC", name)


def _place(folder: Path, name: str) -> str:
    """Returns the absolute place that a name in a metadata.jsonl means, as text that can be compared."""
    parts: list[str] = []
    for part in (folder / name.replace("\\", "/")).parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return _plain("/".join(parts))
