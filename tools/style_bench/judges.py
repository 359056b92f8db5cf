"""The judges of the bench: which style is a picture in, and what does it show?

    judges = Judges.load()
    judges.style_logits(pictures).argmax(1)
    gallery = Gallery(judges, EmojiPictures(folder), without_style="openmoji")
    gallery.ranks(judges.concept_embeddings(pictures), ["castle", ...]) == 0

Trained by `train_judges.py`, measured by `gates.py`; README.md beside this file says how good they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sdlora.atomic import replacing
from tools.pretrain_nano.drawings import SIDE
from tools.style_bench.networks import EMBEDDING, PART, ConceptNet, StyleNet
from tools.style_bench.pictures import JUDGED_STYLES, EmojiPictures

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of `style.safetensors` and `concept.safetensors`, fp16."""
NONE = "none"
"""The last answer of the style judge: a blend, a smear, noise."""


class Judges:
    """Both networks, frozen.

    Attributes:
        styles: names of the style judge's logits; the last is "none": in no style.
        style_net: the style judge.
        concept_net: the concept judge.
    """

    def __init__(self, style_net: StyleNet, concept_net: ConceptNet, styles: Sequence[str] = (*JUDGED_STYLES, NONE)):
        self.styles = tuple(styles)
        self.style_net = style_net.eval().requires_grad_(False)
        self.concept_net = concept_net.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path = WEIGHTS) -> Judges:
        """Reads the weights; they compute in fp32.

        Raises:
            FileNotFoundError: a file of weights is missing.
        """
        folder = Path(folder)
        for file in (folder / "style.safetensors", folder / "concept.safetensors"):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; make it with `python -m tools.style_bench.train_judges`")
        with safe_open(folder / "style.safetensors", "pt") as file:
            styles = file.metadata()["styles"].split(",")
        judges = cls(StyleNet(len(styles)), ConceptNet(), styles)
        judges.style_net.load_state_dict(load_file(folder / "style.safetensors"))
        judges.concept_net.load_state_dict(load_file(folder / "concept.safetensors"))
        return judges

    def style_logits(self, pictures: Tensor) -> Tensor:
        """Maps (N, 3, 128, 128) in [0, 1] to (N, len(styles)).

        Raises:
            ValueError: the pictures have another shape.
        """
        return self.style_net.head(self.style_features(pictures))

    def style_features(self, pictures: Tensor) -> Tensor:
        """Maps (N, 3, 128, 128) in [0, 1] to (N, 256): what the style judge sees before it decides.

        Raises:
            ValueError: the pictures have another shape.
        """
        return _in_parts(self.style_net.features, pictures, self.style_net.head.in_features)

    def concept_embeddings(self, pictures: Tensor) -> Tensor:
        """Maps (N, 3, 128, 128) in [0, 1] to (N, 512), each of length one.

        Raises:
            ValueError: the pictures have another shape.
        """
        return _in_parts(self.concept_net, pictures, EMBEDDING)


class Gallery:
    """The concepts that a picture may show, each as the mean of its real pictures in all styles but one.

    Attributes:
        bases: base concept of each prototype; twins have a prototype each and the same base concept.
        prototypes: (P, E), each of length one.
    """

    def __init__(
        self,
        judges: Judges,
        pictures: EmojiPictures,
        without_style: str,
        splits: tuple[str, ...] = ("prompts", "validation", "test"),
        embed: Callable[[str, Sequence[str]], Tensor] | None = None,
    ):
        """Embeds the pictures.

        Args:
            judges: whose concept judge embeds.
            pictures: the data set.
            without_style: the style that will be judged; none of its pictures is used. "" leaves none out.
            splits: whose concepts may be the answer.
            embed: gives the embeddings of a style's pictures by code, for whoever has them already; see `Embedder`.

        Raises:
            ValueError: `without_style` is not a style.
        """
        if without_style and without_style not in JUDGED_STYLES:
            raise ValueError(f"{without_style!r} is no style of the judges; there are {', '.join(JUDGED_STYLES)}")
        embed = embed or Embedder(judges, pictures)
        sums: dict[str, Tensor] = {}
        for style in JUDGED_STYLES:
            if style == without_style:
                continue
            codes = [concept.code for concept in pictures.of(style, splits)]
            for code, embedding in zip(codes, embed(style, codes), strict=True):
                sums[code] = sums.get(code, 0) + embedding
        shown = [concept for concept in pictures.concepts if concept.code in sums]
        self.bases = tuple(concept.base for concept in shown)
        self.prototypes = F.normalize(torch.stack([sums[concept.code] for concept in shown]), dim=1)
        self._names = sorted(set(self.bases))
        self._group = torch.tensor([self._names.index(base) for base in self.bases])

    def ranks(self, embeddings: Tensor, truth: list[str]) -> Tensor:
        """Tells how many base concepts are nearer than the true one.

        Args:
            embeddings: (N, E), of length one.
            truth: base concept of each.

        Returns:
            (N,), int64; 0: the nearest prototype is of the true base concept.

        Raises:
            ValueError: a base concept has no prototype.
        """
        strangers = sorted(set(truth) - set(self._names))
        if strangers:
            raise ValueError(
                f"no prototype of {', '.join(strangers)}: not in the splits, or only in the style left out"
            )
        likeness = embeddings @ self.prototypes.T
        best = likeness.new_full((len(embeddings), len(self._names)), -2.0)
        best.scatter_reduce_(1, self._group.expand(len(embeddings), -1), likeness, "amax")
        true = torch.tensor([self._names.index(base) for base in truth])
        return (best > best.gather(1, true[:, None])).sum(1)


class Embedder:
    """Embeds real pictures and remembers them, so that the galleries of several styles share the work."""

    def __init__(self, judges: Judges, pictures: EmojiPictures):
        self._judges = judges
        self._pictures = pictures
        self._known: dict[tuple[str, str], Tensor] = {}

    def __call__(self, style: str, codes: Sequence[str]) -> Tensor:
        """Returns the embeddings of a style's pictures, (N, E)."""
        for start in range(0, len(codes), PART):
            part = [code for code in codes[start : start + PART] if (style, code) not in self._known]
            if part:
                fresh = self._judges.concept_embeddings(self._pictures.tensor(style, part))
                self._known.update(zip(((style, code) for code in part), fresh, strict=True))
        return torch.stack([self._known[style, code] for code in codes]) if codes else torch.empty(0, EMBEDDING)


def save(net: nn.Module, file: Path, metadata: dict[str, str]) -> None:
    """Writes a network's weights in fp16; the number of batches seen by each normalisation is left as it is."""
    state = net.state_dict()
    state = {key: (v.half() if v.is_floating_point() else v).contiguous() for key, v in state.items()}
    with replacing(file) as partial:
        save_file(state, partial, metadata=metadata)


def _in_parts(network: Callable[[Tensor], Tensor], pictures: Tensor, width: int) -> Tensor:
    if pictures.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(
            f"the judges look at pictures (N, 3, {SIDE}, {SIDE}), not at {tuple(pictures.shape)}; resize them"
        )
    with torch.no_grad():
        parts = [network(part.float()) for part in pictures.split(PART)] if len(pictures) else []
    return torch.cat(parts) if parts else torch.empty(0, width)
