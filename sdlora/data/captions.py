"""What a caption becomes when it is used: shuffled, dropped, given its trigger word. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sdlora.config import DataSection
    from sdlora.data.folder import Example

_CLOSING = ",.;:!?)]}"
_OPENING = "([{"


def compose(
    caption: str,
    *,
    trigger: str = "",
    trigger_place: str = "front",
    prefix: str = "",
    suffix: str = "",
    shuffle: bool = False,
    keep: int = 0,
    dropout: float = 0.0,
    rng: torch.Generator,
) -> str:
    """Returns a caption as the text encoder gets it: prefix, trigger, caption, suffix; or caption before trigger.

    The order of things: dropout; shuffling of the caption's own comma-separated parts; the trigger word at its place,
    with a comma, unless the caption has it already; prefix and suffix around it, with a space unless punctuation makes
    it wrong.

    Args:
        caption: as read from the folder; may be empty.
        trigger: word that calls the style; looked for as a whole word, upper and lower case alike.
        trigger_place: "front" or "end" of the caption.
        prefix: goes before all else.
        suffix: goes behind all else.
        shuffle: whether the comma-separated parts change places.
        keep: how many leading parts stay. A trigger word that the caption has at its place stays in any case.
        dropout: chance, in [0, 1], of an empty caption, trigger word and all: the sample teaches what the model draws
            unasked, which classifier-free guidance subtracts.
        rng: decides; the same state gives the same caption. Advanced by the same amount whether dropped or not.

    Source: the order is sd-scripts' `process_caption`; dropout as in Ho & Salimans 2022, arXiv:2207.12598.
    """
    dropped = float(torch.rand((), generator=rng, dtype=torch.float64)) < dropout
    text, trigger = caption.strip(), trigger.strip()
    if shuffle:
        text = _shuffled(text, trigger, trigger_place, keep, rng)
    if dropped:
        return ""
    if trigger and not _has_word(text, trigger):
        if trigger_place == "end":
            text = ", ".join(filter(None, (text.rstrip(" ,.;"), trigger)))
        else:
            text = ", ".join(filter(None, (trigger, text.lstrip(", "))))
    return _joined(_joined(prefix.strip(), text), suffix.strip())


def compose_for(
    data: DataSection,
    caption: str,
    *,
    shuffle: bool = False,
    keep: int = 0,
    dropout: float = 0.0,
    rng: torch.Generator,
) -> str:
    """Composes a caption with the trigger word, prefix and suffix of the settings; see `compose`."""
    return compose(
        caption,
        trigger=data.trigger,
        trigger_place=data.trigger_place,
        prefix=data.caption_prefix,
        suffix=data.caption_suffix,
        shuffle=shuffle,
        keep=keep,
        dropout=dropout,
        rng=rng,
    )


def _shuffled(caption: str, trigger: str, place: str, keep: int, rng: torch.Generator) -> str:
    parts = split_tags(caption)
    last: list[str] = []
    if parts and trigger and place == "end" and parts[-1].casefold() == trigger.casefold():
        last = [parts.pop()]
    elif parts and trigger and place == "front" and parts[0].casefold() == trigger.casefold():
        keep = max(1, keep)
    moving = parts[keep:]
    order = torch.randperm(len(moving), generator=rng).tolist()
    return ", ".join([*parts[:keep], *(moving[i] for i in order), *last])


def split_tags(caption: str) -> list[str]:
    """Splits a caption at its commas; empty parts are left out."""
    return [part for part in (part.strip() for part in caption.split(",")) if part]


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _joined(left: str, right: str) -> str:
    if not left:
        return right.lstrip(", ")
    if not right:
        return left.rstrip(", ")
    return left + ("" if right[0] in _CLOSING or left[-1] in _OPENING else " ") + right


def tag_frequency(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """Counts the comma-separated, lower-cased parts of all captions, by group.

    Source: `ss_tag_frequency` in the metadata of sd-scripts, which WebUIs show as the words that a LoRA knows.
    """
    counts: dict[str, dict[str, int]] = {}
    for example in examples:
        group = counts.setdefault(example.group, {})
        for tag in split_tags(example.caption.lower()):
            group[tag] = group.get(tag, 0) + 1
    return counts
