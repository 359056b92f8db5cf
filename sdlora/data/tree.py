"""Which files lie under a folder: each once, in an order that does not depend on the machine, nothing hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}
NAMED = 5
"""How many names a line shows before it says how many more there are."""


@dataclass
class Tree:
    """What a walk has found.

    Attributes:
        root: where it began.
        files: regular files, sorted by their path below the root.
        hidden: files of the system and hidden ones; not looked into.
        skipped: what else was not looked into: the reason and the names.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    skipped: dict[str, list[Path]] = field(default_factory=dict)

    @cached_property
    def label(self) -> str:
        """The root's own name, also where it was given as `.`."""
        return self.root.resolve().name or "images"

    def name(self, path: Path) -> str:
        """Names a file below the root in one printable line."""
        return printable(path.relative_to(self.root).as_posix())

    def names(self, paths: Sequence[Path]) -> str:
        """Names the first few of many files."""
        return shortened([self.name(path) for path in paths])


def walk(root: Path) -> Tree:
    """Lists the files under a folder. Links are followed, each folder is entered once, so loops end."""
    tree = Tree(root)
    _enter(root, tree, {root.resolve()})
    for paths in (tree.files, *tree.skipped.values()):
        paths.sort(key=lambda path: path.relative_to(root).as_posix())
    return tree


def _enter(folder: Path, tree: Tree, seen: set[Path]) -> None:
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: (entry.is_symlink(), entry.name))  # real folders first
    except OSError:
        tree.skipped.setdefault("folder not readable", []).append(folder)
        return
    for entry in entries:
        hidden = entry.name.startswith(".") or entry.name.casefold() in _SYSTEM
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:
            is_folder = is_file = False
        if hidden and is_folder:
            tree.skipped.setdefault("hidden folder", []).append(entry)
        elif hidden:
            tree.hidden.append(entry)
        elif is_file:
            tree.files.append(entry)
        elif not is_folder:
            tree.skipped.setdefault("broken link or no regular file", []).append(entry)
        elif (entry / "config.toml").is_file() and (entry / "checkpoints").is_dir():
            tree.skipped.setdefault("a run of sdlora", []).append(entry)  # its samples are no pictures to learn from
        elif (real := entry.resolve()) in seen:
            tree.skipped.setdefault("link to a folder that is read anyway", []).append(entry)
        else:
            seen.add(real)
            _enter(entry, tree, seen)


def printable(name: str) -> str:
    """Escapes what would break a line or cannot be printed; file names may hold line breaks."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def shortened(names: Sequence[str]) -> str:
    """Joins names; of many, the first few."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
