"""How strongly each part of a prompt counts: brackets and numbers are read as AUTOMATIC1111's WebUI reads them.

`a (red:1.3) [old] castle` are five parts with the weights 1, 1.3, 1, 1/1.1 and 1. Pictures carry their prompts along
from program to program, so what the WebUI makes of a stray bracket is reproduced here too.
"""

from __future__ import annotations

import re
from itertools import groupby

BREAK = ("BREAK", -1.0)
"""The part that stands where the prompt says BREAK; what follows begins a new chunk."""

LARGEST_WEIGHT = 1e6
"""No part weighs more than this, or less than its negative, so that every weight is a finite number."""

_ROUND = 1.1
_FACTORS = {"(": _ROUND, "[": 1 / 1.1}
_OPENING = {")": "(", "]": "["}
_PIECE = re.compile(r"\\[()\[\]\\]?|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]:]|[^\\()\[\]:]+")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse_emphasis(text: str) -> list[tuple[str, float]]:
    r"""Splits a prompt into parts and their weights.

    `(word)` weighs 1.1 times as much, `[word]` 1/1.1 times, `(word:1.2)` 1.2 times; nested brackets multiply. A
    backslash makes the bracket or backslash after it a plain character, and vanishes before anything else. A bracket
    that is never closed reaches to the end; one that was never opened is text, and so is a number behind it. BREAK
    outside brackets becomes the part `BREAK`; within them its weight is multiplied like any other's, and it is then
    an ordinary word.

    Args:
        text: one prompt.

    Returns:
        At least one part; neighbours of the same weight are one. Joined, the parts are the text without the marks.

    Source: `parse_prompt_attention` in `modules/prompt_parser.py` of AUTOMATIC1111's WebUI 1.10.1. Where that fails,
        this goes on: `(word:1.2.3)` is `(word\:1.2.3)`, and weights end at `LARGEST_WEIGHT`.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def add(part: str, weight: float = 1.0) -> None:
        texts.append(part)
        weights.append(weight)

    def close(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] = _held(weights[i] * factor)

    for match in _PIECE.finditer(text):
        piece, number = match[0], match[1]
        if piece.startswith("\\"):
            add(piece[1:])
        elif piece in opened:
            opened[piece].append(len(weights))
        elif number is not None and opened["("]:
            factor = _number(number)
            if factor is None:
                add(piece[:-1])
            close("(", _ROUND if factor is None else factor)
        elif piece in _OPENING and opened[_OPENING[piece]]:
            close(_OPENING[piece], _FACTORS[_OPENING[piece]])
        else:
            for i, part in enumerate(_BREAK.split(piece)):
                if i:
                    add(*BREAK)
                add(part)
    for bracket, starts in opened.items():
        while starts:
            close(bracket, _FACTORS[bracket])
    parts = groupby(zip(weights, texts, strict=True), key=lambda part: part[0])
    return [("".join(text for _, text in group), weight) for weight, group in parts] or [("", 1.0)]


def _number(digits: str) -> float | None:
    try:
        return _held(float(digits))
    except ValueError:  # two points, or nothing else
        return None


def _held(weight: float) -> float:
    return max(-LARGEST_WEIGHT, min(LARGEST_WEIGHT, weight))
