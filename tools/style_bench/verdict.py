"""What the style judge's logits say about a picture that was asked for in some style.

Legend: N pictures, K names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tools.pretrain_nano.sources import HELD_OUT_STYLES

ANOTHER = "another"
"""The answer that is none of the held-out styles."""
ANSWERS = (*HELD_OUT_STYLES, ANOTHER)
"""What the bench wants to know of a picture that should be in a held-out style.

Source: the protocol's style classifier, which tells four vendors and "other" apart. Which of its own styles the base
falls back to, and whether those can be told from each other, is another question.
"""


def right_answer(style: str) -> str:
    """Returns the one of `ANSWERS` that is right for a picture in a style."""
    return style if style in HELD_OUT_STYLES else ANOTHER


def answers(logits: Tensor, names: Sequence[str]) -> Tensor:
    """Pools all names that are no held-out style, and makes the five answers equally likely beforehand.

    The judge learned all of its names equally often, so that "another", which is nine of them, would be the likeliest
    answer to a picture that says nothing.

    Args:
        logits: (N, K).
        names: what they stand for.

    Returns:
        Logarithms of probabilities, (N, 5), in the order of `ANSWERS`.
    """
    kept = [names.index(style) for style in HELD_OUT_STYLES]
    rest = [n for n in range(len(names)) if n not in kept]
    logits = logits.float()
    another = logits[:, rest].logsumexp(1, keepdim=True) - math.log(len(rest))
    return torch.cat((logits[:, kept], another), 1).log_softmax(1)


def style_hits(logits: Tensor, names: Sequence[str], asked: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tells which pictures are in the style that was asked for.

    A held-out style has to win among the five `answers`; a style of the base among all names.

    Args:
        logits: (N, K).
        names: what they stand for.
        asked: the style of each picture, N of them.

    Returns:
        Whether the style is the judge's first choice, (N,), bool; its probability, (N,), in [0, 1].

    Raises:
        ValueError: a style that was asked for has no name.
    """
    five, every = answers(logits, names), logits.float().log_softmax(1)
    hits, chances = [], []
    for n, style in enumerate(asked):
        row, place = (five[n], ANSWERS.index(style)) if style in HELD_OUT_STYLES else (every[n], names.index(style))
        hits.append(int(row.argmax()) == place)
        chances.append(row[place].exp())
    return torch.tensor(hits, dtype=torch.bool), torch.stack(chances)
