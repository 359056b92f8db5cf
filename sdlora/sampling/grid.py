"""A contact sheet: pictures in rows and columns with labels, laid out so that a person can compare them at a glance.

Every length follows from the size of a cell, so that sheets of 128 px and of 1024 px pictures look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SMALLEST_CELL = 192
_PAPER, _INK, _GREY = "white", "#1a1a1a", "#dddddd"


@dataclass(frozen=True)
class _Layout:
    """Lengths in pixels, and the two fonts: a cell's picture area, gap, margin, label column, heading, title."""

    width: int
    height: int
    gap: int
    margin: int
    label: int
    heading: int
    title: int
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    title_font: ImageFont.FreeTypeFont | ImageFont.ImageFont

    @property
    def left(self) -> int:
        """Where the first picture begins."""
        return self.margin + (self.label + self.gap if self.label else 0)

    @property
    def top(self) -> int:
        """Where the first picture begins, from above."""
        return self.margin + self.title + self.heading


def grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str | None = None,
    cell: int | None = None,
) -> Image.Image:
    """Lays pictures out on a white sheet.

    All pictures are scaled by one factor, so that larger ones stay larger, and centred in their cells.

    Args:
        rows: pictures, all rows of the same length.
        row_labels: one text for each row, wrapped in a column on the left; all empty: no such column.
        column_labels: one text for each column, centred above it; all empty: no such line.
        title: one line above everything.
        cell: the longest side of the largest picture, in pixels; default: as it is, but at least 192.

    Raises:
        ValueError: if there is no picture, or rows and labels differ in number.
    """
    if not rows or not rows[0]:
        raise ValueError("a grid needs at least one picture")
    if any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"all rows of a grid need the same length, got {[len(row) for row in rows]}")
    if len(row_labels) != len(rows) or len(column_labels) != len(rows[0]):
        raise ValueError(
            f"a grid of {len(rows)} x {len(rows[0])} got {len(row_labels)} row and {len(column_labels)} column labels"
        )
    pictures = [image for row in rows for image in row]
    longest = max(max(image.size) for image in pictures)
    scale = max(cell or max(longest, _SMALLEST_CELL), 1) / longest
    layout = _plan(pictures, scale, row_labels, column_labels, bool(title))

    width = layout.left + len(rows[0]) * (layout.width + layout.gap) - layout.gap + layout.margin
    height = layout.top + len(rows) * (layout.height + layout.gap) - layout.gap + layout.margin
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        line = _fit([title], pen, layout.title_font, width - 2 * layout.margin, 1)[0]
        pen.text((layout.margin, layout.margin), line, _INK, layout.title_font)
    _label_columns(pen, layout, column_labels)
    for r, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = layout.top + r * (layout.height + layout.gap)
        _label_row(pen, layout, y, label)
        for c, image in enumerate(row):
            x = layout.left + c * (layout.width + layout.gap)
            _place(sheet, image, scale, (x, y, layout.width, layout.height))
    return sheet


def _plan(
    pictures: Sequence[Image.Image], scale: float, rows: Sequence[str], columns: Sequence[str], title: bool
) -> _Layout:
    width = max(1, round(max(image.width for image in pictures) * scale))
    height = max(1, round(max(image.height for image in pictures) * scale))
    unit = max(width, height)
    size = min(max(14, unit // 20), 32)
    font = ImageFont.load_default(size)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    tallest = max(len(_fit(label.splitlines(), pen, font, width, 2)) for label in columns) if any(columns) else 0
    return _Layout(
        width=width,
        height=height,
        gap=max(6, unit // 32),
        margin=max(12, unit // 16),
        label=min(max(130, unit * 3 // 4), 400) if any(rows) else 0,
        heading=round(tallest * _line_height(pen, font) + size * 0.5) if tallest else 0,
        title=round(size * 2.4) if title else 0,
        font=font,
        title_font=ImageFont.load_default(round(size * 1.3)),
    )


def _label_columns(pen: ImageDraw.ImageDraw, layout: _Layout, labels: Sequence[str]) -> None:
    for c, label in enumerate(labels):
        x = layout.left + c * (layout.width + layout.gap) + layout.width // 2
        lines = _fit(label.splitlines(), pen, layout.font, layout.width, 2)
        text = "\n".join(lines)
        pen.multiline_text((x, layout.top - layout.gap), text, _INK, layout.font, anchor="md", align="center")


def _label_row(pen: ImageDraw.ImageDraw, layout: _Layout, y: int, label: str) -> None:
    if not label:
        return
    line_height = _line_height(pen, layout.font)
    lines = _fit(label.splitlines(), pen, layout.font, layout.label, max(1, int(layout.height // line_height)))
    middle = (layout.margin, y + layout.height // 2)
    pen.multiline_text(middle, "\n".join(lines), _INK, layout.font, anchor="lm")


def _place(sheet: Image.Image, image: Image.Image, scale: float, box: tuple[int, int, int, int]) -> None:
    x, y, width, height = box
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    flat = image.convert("RGB")
    if size != flat.size:
        flat = flat.resize(size, Image.Resampling.LANCZOS)
    corner = x + (width - size[0]) // 2, y + (height - size[1]) // 2
    sheet.paste(flat, corner)
    # A hairline, for the edge of a white picture would be lost on the paper.
    edge = (corner[0] - 1, corner[1] - 1, corner[0] + size[0], corner[1] + size[1])
    ImageDraw.Draw(sheet).rectangle(edge, outline=_GREY)


def _line_height(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    one, two = (pen.multiline_textbbox((0, 0), text, font) for text in ("Ag", "Ag\nAg"))
    return two[3] - one[3]


def _fit(
    paragraphs: Sequence[str],
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
    most: int,
) -> list[str]:
    """Wraps texts into at most `most` lines of `width` pixels; what does not fit becomes an ellipsis."""
    lines: list[str] = []
    for paragraph in paragraphs:
        line = ""
        for word in _pieces(paragraph, pen, font, width):
            longer = f"{line} {word}" if line else word
            if line and pen.textlength(longer, font) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and pen.textlength(last + "...", font) > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "..."]


def _pieces(
    paragraph: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Splits a text into words, and words wider than a line into pieces that are not."""
    pieces = []
    for word in paragraph.split():
        while pen.textlength(word, font) > width and len(word) > 1:
            fits = next((n for n in range(len(word) - 1, 0, -1) if pen.textlength(word[:n], font) <= width), 1)
            pieces.append(word[:fits])
            word = word[fits:]
        pieces.append(word)
    return pieces
