"""What the style judge's logits say about a picture that was asked for in some style.

Legend: N pictures, K names, A answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tools.pretrain_nano.sources import BASE_STYLES, HELD_OUT_STYLES

QUESTIONS = {"style": HELD_OUT_STYLES, "own": BASE_STYLES}
"""What there is to know: which of the held-out styles is it, or another? Which of those that the base was taught?

Source: the protocol's style classifier, which tells four vendors and "other" apart. Which of its own styles a base
falls back to when it misses a held-out one, and whether those can be told from each other, is no part of the first
question.
"""


def question(style: str) -> tuple[str, ...]:
    """Returns the styles among which a picture that was asked for in a style must be recognised.

    Raises:
        ValueError: neither held out nor taught; nothing asks for such a picture.
    """
    for among in QUESTIONS.values():
        if style in among:
            return among
    raise ValueError(
        f"{style!r} is neither held out nor a style of the base; there are {(*HELD_OUT_STYLES, *BASE_STYLES)}"
    )


def right_answer(style: str, among: Sequence[str]) -> int:
    """Returns the place of the answer that is right for a picture in a style, in [0, A)."""
    return among.index(style) if style in among else len(among)


def answers(logits: Tensor, names: Sequence[str], among: Sequence[str]) -> Tensor:
    """Pools all names that a question does not name, and makes all answers to it equally likely beforehand.

    The judge learned all of its names equally often, so that "another", which is nine of them, would be the likeliest
    answer to a picture that says nothing.

    Args:
        logits: (N, K).
        names: what they stand for.
        among: the styles of the question.

    Returns:
        Logarithms of probabilities, (N, A), in the order of `among`, then "another".
    """
    kept = [names.index(style) for style in among]
    rest = [n for n in range(len(names)) if n not in kept]
    logits = logits.float()
    another = logits[:, rest].logsumexp(1, keepdim=True) - math.log(len(rest))
    return torch.cat((logits[:, kept], another), 1).log_softmax(1)


def style_hits(logits: Tensor, names: Sequence[str], asked: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tells which pictures are in the style that was asked for: it has to win among the answers to its `question`.

    Args:
        logits: (N, K).
        names: what they stand for.
        asked: the style of each picture, N of them.

    Returns:
        Whether the style is the judge's first choice, (N,), bool; its probability, (N,), in [0, 1].

    Raises:
        ValueError: a style that was asked for belongs to no question.
    """
    found = {among: answers(logits, names, among) for among in set(map(question, asked))}
    hits, chances = [], []
    for n, style in enumerate(asked):
        among = question(style)
        row, place = found[among][n], among.index(style)
        hits.append(int(row.argmax()) == place)
        chances.append(row[place].exp())
    return torch.tensor(hits, dtype=torch.bool), torch.stack(chances)
