"""The judges at work: what they say about drawn pictures, and, kept on disk, what they say about real ones.

Legend: N pictures, P concepts, D features, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.data.cache import Cache
from tools.pretrain_nano.concepts import Concept
from tools.style_bench.experiment import folder_digest
from tools.style_bench.judges import WEIGHTS, Gallery, Judges
from tools.style_bench.pictures import EmojiPictures

UNSEEN = ("prompts", "validation", "test")
"""Splits from which neither a LoRA nor the concept judge has learned."""
UNJUDGED = ("prompts", "test")
"""Splits from which the style judge has not learned either."""

Embed = Callable[[str, Sequence[str]], Tensor]
"""(style, codes) -> embeddings of real pictures, (N, E)."""


class Panel:
    """Two judges and a gallery of real pictures for each style that may be asked for.

    Args:
        judges: `tools.style_bench.judges.Judges`.
        gallery: (style to leave out, embed) -> `tools.style_bench.judges.Gallery`.
        pictures: the data set.
        digest: hash of the judges' weights and of the data set.
        kept: where answers about real pictures are kept; thousands of them take minutes.

    Attributes:
        judges: as given.
        pictures: as given.
        digest: as given.
    """

    def __init__(
        self, judges: Any, gallery: Callable[[str, Embed], Any], pictures: EmojiPictures, digest: str, kept: Cache
    ):
        self.judges, self.pictures, self.digest = judges, pictures, digest
        self._kept = kept
        self._gallery = cache(lambda style: gallery(style, self._embed))
        self.real = cache(self._real)

    @classmethod
    def open(cls, pictures: EmojiPictures, folder: Path) -> Panel:
        """Loads the judges that come with the bench; what they say about real pictures is kept in `folder`."""
        judges = Judges.load()
        digest = Cache.key(folder_digest(WEIGHTS), pictures.digest)
        return cls(
            judges,
            lambda style, embed: Gallery(judges, pictures, style, embed=embed),
            pictures,
            digest,
            Cache(folder),
        )

    @cached_property
    def styles(self) -> list[str]:
        """The styles that the style judge knows."""
        return [style for style in self.judges.styles if style != "none"]

    def ranks(self, pictures: Tensor, styles: Sequence[str], truth: Sequence[str]) -> Tensor:
        """Returns the place of the right base concept, 0 is first, among real pictures of all styles but the asked one.

        Args:
            pictures: (N, 3, H, W).
            styles: the style that each picture was asked for; its own real pictures would make it too easy.
            truth: the base concepts, N of them.

        Returns:
            (N,), int64.
        """
        embeddings = self.judges.concept_embeddings(pictures)
        ranks = torch.empty(len(truth), dtype=torch.long)
        for style in dict.fromkeys(styles):
            rows = [i for i, asked in enumerate(styles) if asked == style]
            ranks[rows] = self._gallery(style).ranks(embeddings[rows], [truth[i] for i in rows])
        return ranks

    def _real(self, style: str, concepts: tuple[Concept, ...]) -> tuple[Tensor, Tensor]:
        """Returns style features of real pictures, (P, D), zero where there is none, and which there are, (P,)."""
        there = torch.tensor([self.pictures.has(style, c.code) for c in concepts], dtype=torch.bool)
        codes = [c.code for c in concepts if self.pictures.has(style, c.code)]
        found = self._remembered("features", self.judges.style_features, style, codes)
        table = torch.zeros(len(concepts), found.shape[1])
        table[there] = found
        return table, there

    def _embed(self, style: str, codes: Sequence[str]) -> Tensor:
        return self._remembered("embeddings", self.judges.concept_embeddings, style, codes)

    def _remembered(self, name: str, judge: Callable[[Tensor], Tensor], style: str, codes: Sequence[str]) -> Tensor:
        key = Cache.key(self.digest, name, style, list(codes))
        stored = self._kept.get(key)
        if stored is None:
            stored = {name: judge(self.pictures.tensor(style, codes))}
            self._kept.put(key, stored)
        return stored[name]
