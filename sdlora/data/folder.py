"""A folder of pictures, as people have it, becomes a list of examples, and every file in it is accounted for.

Flat or nested, with or without captions, with kohya's `10_name` folders or not. Each picture is decoded once before
anything else happens, so that a broken one is named now and not after an hour.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sdlora.data.cache import Cache
from sdlora.data.colour import BAD_PROFILE, background_colour
from sdlora.data.decoding import Seen
from sdlora.data.image import BAD_EXIF, FIRST_FRAME, sniff
from sdlora.data.index import PictureIndex, state
from sdlora.data.sidecars import Sidecars, is_sidecar
from sdlora.data.tree import Tree, printable, shortened, walk
from sdlora.data.workers import Workers, expected_seconds
from sdlora.errors import DatasetError
from sdlora.paths import expanded

PICTURE_ENDINGS = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".gif", ".avif", ".heic", ".heif", ".jxl", ".svg", ".psd"),
}
"""Files that are meant to be pictures; the second row cannot be read, and is named as such."""
MAX_REPEATS = 1000
"""A larger number in front of a folder's name is a date or a year."""
_REPEATS = re.compile(r"(\d+)_(.+)")
MAX_REASONS = 20
"""How many files an error lists."""


@dataclass(frozen=True)
class Example:
    """A picture to learn from.

    Attributes:
        path: the file.
        caption: its caption in one line as it was read, else the trigger word, else its folder's words, else empty.
        repeats: how often it is seen in an epoch.
        group: its `10_style` folder, else the folder directly below the one that was given, else that one itself.
        width: in pixels, upright.
        height: in pixels, upright.
        digest: SHA-256 of the file's bytes, in hex.
        notes: what is left out or ignored of the picture.
    """

    path: Path
    caption: str
    repeats: int
    group: str
    width: int
    height: int
    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    """What a folder holds.

    Attributes:
        folder: where.
        examples: the usable pictures, sorted by path.
        background: colour behind transparent ones.
        files: how many files there are, all kinds.
        captions: how many caption files were read.
        unreadable: pictures that cannot be used, and why.
        unread_captions: caption files that belong to no picture or were overruled by another.
        others: files that are neither.
        switched_off: files in folders with 0 repeats.
        hidden: how many hidden files and files of the system there are.
        remarks: what else is worth a clause.
    """

    folder: Path
    examples: list[Example]
    background: str
    files: int
    captions: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    unread_captions: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    switched_off: list[str] = field(default_factory=list)
    hidden: int = 0
    remarks: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Accounts for all files in one line: first every file once, then what is special about some."""
        counts = [
            f"{len(self.examples)} usable",
            *_counted(self.captions, "caption", "captions"),
            *_named("unreadable", list(self.unreadable)),
            *_named("unused caption file" + "s" * (len(self.unread_captions) > 1), self.unread_captions),
            *_named("switched off (0 repeats)", self.switched_off),
            *_named("other", self.others),
            *_counted(self.hidden, "hidden", "hidden"),
        ]
        return f"found {self.files} file{'s' * (self.files != 1)}: " + ", ".join([*counts, *self._special()])

    def _special(self) -> list[str]:
        animated = [e for e in self.examples if FIRST_FRAME in e.notes]
        seen: dict[str, str] = {}
        copies = [self._name(e) for e in self.examples if seen.setdefault(e.digest, self._name(e)) != self._name(e)]
        parts = _counted(len(animated), "animated (first frame)", "animated (first frame)")
        for note in (BAD_PROFILE, BAD_EXIF):
            parts += _named(note, [self._name(e) for e in self.examples if note in e.notes])
        bare = sum(not e.caption for e in self.examples)
        return [
            *parts,
            *_counted(bare, "without caption", "without caption"),
            *_named("duplicate" + "s" * (len(copies) > 1), copies),
            *self.remarks,
        ]

    def _name(self, example: Example) -> str:
        return printable(example.path.relative_to(self.folder).as_posix())


def scan(folder: Path, trigger: str = "", background: str = "white", cache: Cache | None = None) -> Scan:
    """Reads a folder of pictures and their captions.

    Args:
        folder: searched to the bottom; hidden files are left alone.
        trigger: caption of pictures without one.
        background: colour behind transparent pictures.
        cache: remembers which pictures were found readable, so that a second look is quick.

    Raises:
        DatasetError: if there is no usable picture, with the reason for every file; or if a caption is empty or is not
            UTF-8, naming it.
        ConfigError: if the background is no colour.
    """
    background_colour(background)
    folder = expanded(folder)
    if not folder.is_dir():
        raise DatasetError(
            f"{folder} is a file; give --images the folder it lies in"
            if folder.exists()
            else f"there is no folder {folder}; give --images a folder of pictures"
        )
    tree = walk(folder)
    groups = _groups(tree)
    off = [path for path in tree.files if groups[path.parent].repeats == 0]
    files = [path for path in tree.files if groups[path.parent].repeats > 0]
    sidecars = Sidecars(tree, [path for path in files if is_sidecar(path)])
    rest = [path for path in files if not is_sidecar(path)]
    candidates = [path for path in rest if _meant_as_picture(path)]

    # Captions first, for they are read in no time.
    captions = {path: sidecars.caption(path) for path in candidates}
    stray_lines = sidecars.lines_without_picture(candidates)
    sidecars.raise_problems()
    looked = _look_at_all(candidates, background, PictureIndex(folder, cache))
    examples, fallbacks = _examples(groups, looked, captions, trigger.strip())

    unreadable = {tree.name(path): str(seen) for path, seen in looked.items() if isinstance(seen, DatasetError)}
    result = Scan(
        folder=folder,
        examples=examples,
        background=background,
        files=len(tree.files) + len(tree.hidden),
        captions=len(sidecars.used),
        unreadable=unreadable,
        unread_captions=[tree.name(path) for path in sidecars.unread()],
        others=[tree.name(path) for path in rest if path not in looked],
        switched_off=[tree.name(path) for path in off],
        hidden=len(tree.hidden),
        remarks=[*fallbacks, *_remarks(tree, examples, stray_lines)],
    )
    if not examples:
        raise DatasetError(_why_nothing(result))
    return result


def _look_at_all(paths: Sequence[Path], background: str, index: PictureIndex) -> dict[Path, Seen | DatasetError]:
    """Looks at those pictures that were not looked at before; returns what was seen of all, in their order."""
    looked: dict[Path, Seen | DatasetError] = {}
    states: dict[Path, list[int] | None] = {}
    for path in paths:
        if seen := index.same(path):
            looked[path] = seen
        else:
            states[path] = state(path)
    with Workers(expected_seconds(states)) as workers:
        items = ((path, background, index.before(path)) for path in states)
        for path, result in zip(states, workers.map("look", items), strict=True):
            if isinstance(result, Seen):
                index.note(path, result, states[path])
                looked[path] = result
            else:
                looked[path] = DatasetError(str(result).removeprefix(f"{path}: "))
    index.save()
    return {path: looked[path] for path in paths}


def _meant_as_picture(path: Path) -> bool:
    if path.suffix.lower() in PICTURE_ENDINGS:
        return True
    try:
        with path.open("rb") as file:
            return sniff(file.read(32)) is not None
    except OSError:
        return False


class _Group(NamedTuple):
    """What a folder says of the pictures in it: the group's name, its repeats, and the words of its name."""

    name: str
    repeats: int
    words: str


def _groups(tree: Tree) -> dict[Path, _Group]:
    """Returns the group of each folder that files lie in."""
    return {folder: _group(tree, folder) for folder in dict.fromkeys(path.parent for path in tree.files)}


def _group(tree: Tree, folder: Path) -> _Group:
    """Returns the group of a folder, by kohya's names if they are used."""
    inside = folder.relative_to(tree.root).parts
    if not inside:
        return _Group(tree.label, 1, "")
    for name in inside:
        match = _REPEATS.fullmatch(name)
        if match and int(match[1]) <= MAX_REPEATS:
            return _Group(name, int(match[1]), match[2].replace("_", " ").strip())
    return _Group(inside[0], 1, "")


def _examples(
    groups: dict[Path, _Group],
    looked: dict[Path, Seen | DatasetError],
    captions: dict[Path, str | None],
    trigger: str,
) -> tuple[list[Example], list[str]]:
    """Puts the usable pictures together, and says how many got a caption of last resort."""
    examples, by_trigger, by_folder = [], 0, 0
    for path, seen in looked.items():
        if isinstance(seen, DatasetError):
            continue
        group, repeats, words = groups[path.parent]
        caption = captions[path]
        if caption is None:
            by_trigger += bool(trigger)
            by_folder += bool(words and not trigger)
            caption = trigger or words
        examples.append(Example(path, caption, repeats, group, seen.width, seen.height, seen.digest, seen.notes))
    return examples, [
        *_counted(by_trigger, "captioned by the trigger word alone", "captioned by the trigger word alone"),
        *_counted(by_folder, "captioned by the folder's name", "captioned by the folder's name"),
    ]


def _remarks(tree: Tree, examples: Sequence[Example], stray_lines: int) -> list[str]:
    repeated = {example.group: example.repeats for example in examples if example.repeats > 1}
    tops = dict.fromkeys(path.relative_to(tree.root).parts[0] for path in tree.files if path.parent != tree.root)
    dates = [printable(top) for top in tops if (m := _REPEATS.fullmatch(top)) and int(m[1]) > MAX_REPEATS]
    return [
        *(f"{count} repeats in {printable(group)}" for group, count in repeated.items()),
        *([f"{shortened(dates)}: no repeats, the number is above {MAX_REPEATS}"] if dates else []),
        *_counted(stray_lines, "line of metadata.jsonl without a picture", "lines of metadata.jsonl without a picture"),
        *(f"{len(paths)} skipped, {reason} ({tree.names(paths)})" for reason, paths in tree.skipped.items()),
    ]


def _why_nothing(result: Scan) -> str:
    if not result.files:
        return f"the folder {result.folder} is empty; put pictures there, or give --images another folder"
    reasons = [
        *(f"{name}: {reason}" for name, reason in result.unreadable.items()),
        *(f"{name}: in a folder with 0 repeats" for name in result.switched_off),
        *(f"{name}: a caption without a picture" for name in result.unread_captions),
        *(f"{name}: not a picture" for name in result.others),
    ]
    more = [f"and {len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
    lines = "".join(f"\n  {line}" for line in [*reasons[:MAX_REASONS], *more, *result.remarks])
    return f"no usable picture among the {result.files} files in {result.folder}:{lines}"


def _counted(number: int, one: str, many: str) -> list[str]:
    return [f"{number} {one if number == 1 else many}"] if number else []


def _named(what: str, names: Sequence[str]) -> list[str]:
    return [f"{len(names)} {what} ({shortened(names)})"] if names else []
