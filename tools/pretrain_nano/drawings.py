"""Finds the drawing of every concept in every style, and renders it."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tools.pretrain_nano.concepts import Concept, normal_code
from tools.pretrain_nano.sources import UNICODE_NAMES, WORDS, Style

SIDE = 128
"""Side of a picture in pixels."""


class Names:
    """Under which names a concept may be filed: by its label, Unicode's names of two versions, and shortcodes."""

    def __init__(self, packages: dict[str, Path]) -> None:
        unicode_names = json.loads((packages[UNICODE_NAMES] / "data-by-emoji.json").read_text(encoding="utf-8"))
        self._unicode = {_code(emoji): entry["name"] for emoji, entry in unicode_names.items()}
        data = json.loads((packages[WORDS] / "en" / "data.json").read_text(encoding="utf-8"))
        self._labels = {normal_code(entry["hexcode"]): entry["label"] for entry in data}

    def of(self, concept: Concept) -> list[str]:
        """Returns slugs, the most trustworthy first."""
        texts = [self._labels[concept.code], self._unicode.get(concept.code, "")]
        if "-" not in concept.code:
            texts.append(unicodedata.name(chr(int(concept.code, 16)), ""))
        return list(dict.fromkeys(slug for slug in map(slugify, texts) if slug))


def _code(emoji: str) -> str:
    return normal_code("-".join(f"{ord(c):x}" for c in emoji))


def slugify(text: str) -> str:
    """Turns "Woman’s hat" into "womans-hat", as Iconify names its icons."""
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def drawings(
    style: Style, package: Path, concepts: list[Concept], names: Names
) -> Iterator[tuple[Concept, Image.Image]]:
    """Yields every concept that a style draws with its picture, RGB on white, 128 x 128.

    No two concepts share a drawing: the first in Unicode's order keeps it.
    """
    if style.folder is not None:
        files = {normal_code(file.stem): file for file in sorted((package / style.folder).iterdir())}
        for concept in concepts:
            if concept.code in files:
                yield concept, on_white(_read(files[concept.code]))
        return
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    by_code = {normal_code(code): name for code, name in json.loads((package / "chars.json").read_text()).items()}
    taken: set[str] = set()
    for concept in concepts:
        name = _icon(concept, icons, by_code, names)
        if name is not None and name not in taken:
            taken.add(name)
            yield concept, on_white(render(_svg(icons, name)))


def _icon(concept: Concept, icons: dict, by_code: dict[str, str], names: Names) -> str | None:
    """Returns the name of a concept's icon: by code point where the set has them, else by name."""
    if by_code:
        found = by_code.get(concept.code)
        return _resolve(found, icons) if found else None
    slugs = names.of(concept)
    for slug in (*slugs, *(slug.replace("-", "") for slug in slugs)):
        found = _resolve(slug, icons)
        if found is not None:
            return found
    return None


def _resolve(name: str, icons: dict) -> str | None:
    """Follows aliases; None where there is no such icon, or only a turned or mirrored one."""
    while name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name)
        if alias is None or alias.keys() - {"parent", "hidden"}:
            return None
        name = alias["parent"]
    return name


def _svg(icons: dict, name: str) -> str:
    icon = icons["icons"][name]
    box = [
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    body = icon["body"].replace("currentColor", "#000")
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box[0]} {box[1]} {box[2]} {box[3]}">{body}</svg>'


def _read(file: Path) -> Image.Image:
    if file.suffix == ".svg":
        return render(file.read_text(encoding="utf-8"))
    with Image.open(file) as picture:
        return picture.convert("RGBA")


def render(svg: str) -> Image.Image:
    """Renders an SVG with its longer side at 256 pixels, without the fonts of the machine."""
    import resvg_py

    box = re.search(r'viewBox="([^"]+)"', svg)
    width, height = [float(part) for part in box[1].split()[2:]] if box else (1.0, 1.0)
    side = {"width": 2 * SIDE} if width >= height else {"height": 2 * SIDE}
    data = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **side)
    with Image.open(io.BytesIO(bytes(data))) as picture:
        return picture.convert("RGBA")


def on_white(picture: Image.Image) -> Image.Image:
    """Returns a transparent picture centred on white, RGB, 128 x 128, its proportions kept."""
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    white = Image.new("RGBA", picture.size, "white")
    small = Image.alpha_composite(white, picture).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(small, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return canvas
