"""Says how well a base draws what it was taught: the judges' score, and a contact sheet for a person.

    python -m tools.pretrain_nano.score --data build/emoji --base build/nano/base --sheet sheet.png

Concepts are those of the split `prompts`, which the base was trained on and the judges were not, in the base's own
styles: one picture each, one seed, DPM++ 2M, 20 steps, CFG 1.5 unless `--cfg` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from sdlora.families import Base, Parts, load_parts
from sdlora.families.loading import NANO
from sdlora.training.device import choose_threads
from sdlora.training.progress import Reporter
from tools.pretrain_nano.captions import prompt
from tools.pretrain_nano.concepts import Concept
from tools.pretrain_nano.drawings import SIDE
from tools.pretrain_nano.sources import BASE_STYLES, STYLE_OF
from tools.style_bench.draw import CFG, draw, to_floats, to_image
from tools.style_bench.panel import Panel
from tools.style_bench.pictures import EmojiPictures
from tools.style_bench.verdict import style_hits

SHEET = 64
LETTERS = 24
"""Longest label that is written out below a picture."""


def choose(pictures: EmojiPictures, count: int) -> list[tuple[str, Concept]]:
    """Returns (style, concept) pairs, the styles in turn, concepts shuffled once and for all."""
    chance = random.Random("score")
    decks = {style: pictures.of(style, ["prompts"]) for style in BASE_STYLES}
    for deck in decks.values():
        chance.shuffle(deck)
    order = [
        (style, deck[n]) for n in range(max(map(len, decks.values()))) for style, deck in decks.items() if n < len(deck)
    ]
    return order[:count]


def score(
    parts: Parts, panel: Panel, pairs: Sequence[tuple[str, Concept]], cfg: float = CFG
) -> tuple[dict, torch.Tensor]:
    """Draws the pairs and has them judged.

    Returns:
        Shares in [0, 1]: `style` (called the style that was asked for), `top1` and `top5` (the concept is the
        nearest, or among the five nearest, of all that the judges do not know), each over all pairs and by style;
        and the pictures, uint8, (N, 128, 128, 3).
    """
    styles = [style for style, _ in pairs]
    texts = [prompt(concept, STYLE_OF[style]) for style, concept in pairs]
    drawn = draw(parts, texts, [[1]] * len(texts), 1, Reporter(), cfg)[:, 0]
    values = to_floats(drawn)
    ranks = panel.ranks(values, styles, [concept.base for _, concept in pairs])
    right, _ = style_hits(panel.judges.style_logits(values), panel.judges.styles, styles)
    hits: dict[str, list[tuple[bool, bool, bool]]] = defaultdict(list)
    for style, called, rank in zip(styles, right.tolist(), ranks.tolist(), strict=True):
        hits[style].append((called, rank < 1, rank < 5))
    everything = [row for rows in hits.values() for row in rows]
    return {"all": _shares(everything), **{style: _shares(rows) for style, rows in hits.items()}}, drawn


def _shares(rows: Sequence[tuple[bool, bool, bool]]) -> dict[str, float]:
    columns = zip(("style", "top1", "top5"), zip(*rows, strict=True), strict=True)
    return {"pictures": len(rows), **{name: round(sum(column) / len(rows), 3) for name, column in columns}}


def sheet(drawn: torch.Tensor, pairs: Sequence[tuple[str, Concept]]) -> Image.Image:
    """Lays pictures out in rows of eight, each with the thing and the style that were asked for below it.

    Args:
        drawn: uint8, (N, 128, 128, 3).
        pairs: N (style, concept) pairs.
    """
    font = ImageFont.load_default(11)
    width, height = SIDE + 12, SIDE + 40
    page = Image.new("RGB", (8 * width, math.ceil(len(pairs) / 8) * height), "white")
    pen = ImageDraw.Draw(page)
    for n, (picture, (style, concept)) in enumerate(zip(drawn, pairs, strict=True)):
        x, y = n % 8 * width + 6, n // 8 * height + 4
        page.paste(to_image(picture), (x, y))
        pen.text((x, y + SIDE + 2), f"{_cut(concept.label)}\n{STYLE_OF[style].words}", "black", font)
    return page


def _cut(label: str) -> str:
    return label if len(label) <= LETTERS else label[: LETTERS - 1] + "…"


def main() -> None:
    """Parses the arguments, draws, judges, and prints."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_nano.score", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="data set, made by tools.pretrain_nano.build")
    parser.add_argument("--base", type=Path, default=NANO, help="diffusers folder; default: the embedded base")
    parser.add_argument("--pictures", type=int, default=256, help="how many are drawn")
    parser.add_argument("--cfg", type=float, default=CFG, help="CFG scale, at least 1")
    parser.add_argument("--sheet", type=Path, help="PNG for a contact sheet of the first 64")
    arguments = parser.parse_args()
    parts = load_parts(Base(str(arguments.base), arguments.base, "given"))
    choose_threads(parts, None)
    pictures = EmojiPictures(arguments.data)
    pairs = choose(pictures, arguments.pictures)
    shares, drawn = score(parts, Panel.open(pictures, pictures.folder / "judges" / "real"), pairs, arguments.cfg)
    print(json.dumps(shares, indent=1))
    if arguments.sheet:
        sheet(drawn[:SHEET], pairs[:SHEET]).save(arguments.sheet)


if __name__ == "__main__":
    main()
