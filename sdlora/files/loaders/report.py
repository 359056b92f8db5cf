"""What one program makes of one file, in one form for all programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sdlora.files.loaders.contents import Contents
from sdlora.files.loaders.layout import Layout, Place, Shape

Fits = Callable[[Shape, Shape, Shape], bool]
"""(shape of the layer's weight, of down, of up) -> whether the program can apply it."""


@dataclass(frozen=True)
class Factors:
    """Two factors that found their layer: name in the file, place in the base, shapes."""

    name: str
    place: Place
    down: Shape
    up: Shape


@dataclass(frozen=True)
class Report:
    """What a program makes of a file.

    Attributes:
        program: its name.
        version: that whose rules these are.
        consumed: number of keys for which it has a place.
        left: the other keys; most programs pass over them in silence.
        misfits: modules whose factors do not fit their layer, with the shapes.
        misscaled: modules that it applies at another strength than the file says.
        kind: what it takes the file for: SD1, SD2, SDXL, Unknown; `None` if it does not ask.
        refusal: why it will not use the file at all, or `None`.
        has_base: whether it can load such a base; else names and shapes are checked as if it could.
        notes: what the user may wonder at, in sentences.
    """

    program: str
    version: str
    consumed: int
    left: tuple[str, ...]
    misfits: tuple[str, ...]
    misscaled: tuple[str, ...]
    kind: str | None
    refusal: str | None
    has_base: bool
    notes: tuple[str, ...]

    @property
    def loads(self) -> bool:
        """Whether the program applies anything of the file."""
        return self.refusal is None and self.has_base and self.consumed > 0

    def losses(self) -> Iterator[str]:
        """Yields, in sentences, what of the file would have no effect, or a wrong one."""
        total = self.consumed + len(self.left)
        if self.refusal:
            yield f"{self.program} refuses the file: {self.refusal}"
        for what, items in (
            (f"leaves {len(self.left)} of its {total} keys unused", self.left),
            (f"cannot fit {len(self.misfits)} of its modules", self.misfits),
            (f"applies {len(self.misscaled)} of its modules at another strength", self.misscaled),
        ):
            if items:
                yield f"{self.program} {what}; the first is {items[0]}"

    @property
    def verdict(self) -> str:
        """All of it in a few words."""
        if self.refusal:
            return "refuses the file"
        if not self.consumed:
            return "uses nothing of it"
        counts = (
            (self.left, "keys lost"),
            (self.misfits, "modules do not fit"),
            (self.misscaled, "at a wrong strength"),
        )
        bad = ", ".join(f"{len(items)} {what}" for items, what in counts if items)
        return bad or ("loads whole" if self.has_base else "names fit, no such base")


def make_report(
    program: str,
    version: str,
    layout: Layout,
    contents: Contents,
    *,
    left: Iterable[str],
    factors: Iterable[Factors],
    fits: Fits,
    misfit: str,
    stops: bool = False,
    misscaled: Iterable[str] = (),
    kind: str | None = None,
    refusal: str | None = None,
    has_base: bool | None = None,
    notes: Iterable[str] = (),
) -> Report:
    """Puts a program's findings together.

    Args:
        program: its name.
        version: that whose rules these are.
        layout: the base.
        contents: the file.
        left: keys without a place.
        factors: modules with a place, whose shapes are checked here.
        fits: the program's rule for shapes.
        misfit: what the program does with a module that does not fit, a sentence.
        stops: whether that is the end of it.
        misscaled: modules that act at another strength.
        kind: the class it gives the file.
        refusal: why it will not use the file.
        has_base: whether it can load such a base; default: if it is one of the three that all know.
        notes: sentences.
    """
    lost = tuple(dict.fromkeys(left))
    bad = tuple(_misfits(layout, factors, fits))
    has_base = layout.kind is not None if has_base is None else has_base
    sentences = [*notes]
    if bad and stops:
        refusal = refusal or misfit
    elif bad:
        sentences.append(misfit)
    if not has_base:
        sentences.append(f"has no base of text width {layout.text_width}; names and shapes are checked as if it had")
    return Report(
        program,
        version,
        consumed=len(contents.shapes) - len(lost),
        left=lost,
        misfits=bad,
        misscaled=tuple(misscaled),
        kind=kind,
        refusal=refusal,
        has_base=has_base,
        notes=tuple(sentences),
    )


def _misfits(layout: Layout, factors: Iterable[Factors], fits: Fits) -> Iterator[str]:
    for found in factors:
        layer = layout.shape(found.place)
        if layer is not None and not fits(layer, found.down, found.up):
            yield f"{found.name}: down {list(found.down)}, up {list(found.up)}, and the layer has {list(layer)}"
