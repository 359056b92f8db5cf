"""Which concepts a bench run draws, learns and validates with: fixed by names and hashes, never by chance or order.

Legend: a concept is one thing to draw; concepts that are twins (gender, colour, hour ...) share a base concept, and
everything here is chosen and parted by base concepts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tools.pretrain_nano.concepts import Concept
from tools.pretrain_nano.sources import BASE_STYLES, STYLE_OF, Style

HALVES = ("tune", "final")
"""Parts of the split "prompts": settings are chosen on the first, numbers are reported on the second."""
NUM_VALIDATION = 20
"""Pictures of the held-out style on which the denoising loss is measured; nothing ever learns from them."""

Has = Callable[[str, str], bool]
"""(style, code) -> whether the style has a picture of the concept."""


@dataclass(frozen=True)
class Task:
    """A style to be learned from one choice of pictures.

    Attributes:
        style: the held-out style.
        subset: number of the choice, from 0.
        prompts: P concepts to draw, one for each base concept.
        num_seeds: S pictures are drawn of each.
        learn: the N pictures that a LoRA learns from.
        validation: `NUM_VALIDATION` others, the same for every subset.
        everything: all pictures of the style that the oracle learns from: the split "learn" without `validation`.
    """

    style: Style
    subset: int
    prompts: tuple[Concept, ...]
    num_seeds: int
    learn: tuple[Concept, ...]
    validation: tuple[Concept, ...]
    everything: tuple[Concept, ...]


def make_task(
    concepts: Sequence[Concept], has: Has, style: str, subset: int, *, images: int, half: str, prompts: int, seeds: int
) -> Task:
    """Chooses everything that a style and a subset need.

    Args:
        concepts: all of the data set, in Unicode's order.
        has: tells which pictures there are.
        style: id of the held-out style.
        subset: number of the choice, from 0.
        images: N, pictures to learn from.
        half: which half of the prompts, see `HALVES`.
        prompts: at most so many concepts are drawn.
        seeds: pictures of each prompt.

    Raises:
        ValueError: if the style has fewer pictures than asked for.
    """
    pool = [c for c in concepts if c.split == "learn" and has(style, c.code)]
    validation = stratified(one_of_each(pool, has, style), NUM_VALIDATION, f"validation: {style}")
    held_out = {c.base for c in validation}
    everything = [c for c in pool if c.base not in held_out]
    learn = stratified(one_of_each(everything, has, style), images, f"subset {subset}: {style}")
    return Task(
        style=STYLE_OF[style],
        subset=subset,
        prompts=choose_prompts(concepts, has, style, half, prompts),
        num_seeds=seeds,
        learn=tuple(learn),
        validation=tuple(validation),
        everything=tuple(everything),
    )


def half_of(base: str) -> str:
    """Returns which half of the prompts a base concept belongs to; depends on nothing but its name."""
    return HALVES[_ticket("bench half", base) % 2]


def choose_prompts(concepts: Iterable[Concept], has: Has, style: str, half: str, count: int) -> tuple[Concept, ...]:
    """Chooses what is drawn: one concept for each base concept, the best known first.

    Preferred are those drawn in the held-out style, for only they have a real picture to be compared with, and then
    those drawn in most styles of the base, for the base shall know what it is asked for.

    Args:
        concepts: all of the data set, in Unicode's order.
        has: tells which pictures there are.
        style: id of the held-out style.
        half: "tune" or "final".
        count: at most so many; a half of a small data set may hold fewer.
    """
    known = [c for c in concepts if c.split == "prompts" and half_of(c.base) == half]
    chosen = one_of_each(known, has, style)
    chosen.sort(key=lambda c: (*(-points for points in _fame(c, has, style)), _ticket("prompt", c.base)))
    return tuple(chosen[:count])


def one_of_each(concepts: Iterable[Concept], has: Has, style: str) -> list[Concept]:
    """Returns one concept for each base concept: the one with most pictures, of equals the first in Unicode's order."""
    twins: dict[str, list[Concept]] = {}
    for concept in concepts:
        twins.setdefault(concept.base, []).append(concept)
    return [max(same, key=lambda c: _fame(c, has, style)) for same in twins.values()]


def stratified(concepts: Sequence[Concept], count: int, key: str) -> list[Concept]:
    """Chooses concepts so that every group has its share.

    Each group gets its exact share rounded down; the places left go to the largest remainders (Hamilton's method).
    Within a group the order is a hash of (key, base concept).

    Args:
        concepts: to choose from, at most one for each base concept.
        count: how many.
        key: another key, another choice.

    Raises:
        ValueError: if there are fewer concepts than wanted.
    """
    if count > len(concepts):
        raise ValueError(
            f"{count} pictures are wanted for {key!r}, and the style has {len(concepts)}; give fewer --images"
        )
    sizes = Counter(c.group for c in concepts)
    exact = {group: count * size / len(concepts) for group, size in sorted(sizes.items())}
    places = {group: int(share) for group, share in exact.items()}
    by_remainder = sorted(exact, key=lambda group: places[group] - exact[group])
    for group in by_remainder[: count - sum(places.values())]:
        places[group] += 1
    chosen: list[Concept] = []
    for group, number in places.items():
        members = sorted((c for c in concepts if c.group == group), key=lambda c: _ticket(key, c.base))
        chosen += members[:number]
    return chosen


def seed_of(base: str, k: int) -> int:
    """Returns the seed of a prompt's k-th picture, 0 to 2**32 - 1: the same for every method, style and subset."""
    return _ticket(f"seed {k}", base) % 2**32


def _fame(concept: Concept, has: Has, style: str) -> tuple[int, int]:
    return int(has(style, concept.code)), sum(has(id, concept.code) for id in BASE_STYLES)


def _ticket(key: str, base: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{key}: {base}".encode()).digest()[:8], "big")
