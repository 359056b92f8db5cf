"""Turns a concept and a style into the sentence that the base learns it by."""

from __future__ import annotations

import random

from tools.pretrain_nano.concepts import Concept
from tools.pretrain_nano.sources import Style
from tools.pretrain_nano.tokenizer import TRIGGERS

NO_CAPTION = 0.10
"""Share of pictures shown without any words: what classifier-free guidance subtracts."""
NO_STYLE = 0.10
"""Share shown without the style's name: a LoRA must not find that nothing happens without one of the known names."""
WITH_TAGS = 0.25
"""Share with one or two related words, in any order."""
WITH_TRIGGER = 0.03
"""Share with a trigger word that means nothing, so that the words kept for LoRAs start out neutral."""


def prompt(concept: Concept, style: Style) -> str:
    """Returns the plain sentence: "castle, noto style"."""
    return f"{concept.label}, {style.words} style"


def caption(concept: Concept, style: Style, chance: random.Random) -> str:
    """Returns a training caption.

    Args:
        concept: what the picture shows.
        style: how it is drawn.
        chance: decides what is left out or added.
    """
    if chance.random() < NO_CAPTION:
        return ""
    parts = [concept.label]
    if concept.tags and chance.random() < WITH_TAGS:
        parts += chance.sample(concept.tags, min(len(concept.tags), chance.choice((1, 2))))
    if chance.random() >= NO_STYLE:
        parts.append(f"{style.words} style")
    if chance.random() < WITH_TRIGGER:
        parts.insert(chance.choice((0, len(parts))), chance.choice(TRIGGERS))
    return ", ".join(parts)
