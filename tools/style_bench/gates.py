"""Measures the judges on real pictures that they never learned from; the bench reports nothing unless they pass.

    python -m tools.style_bench.gates --data build/emoji

Prints, for the splits "prompts" and "test", how often the judges are right, per style, on the pictures as drawn and
after the VAE's round trip. "style" is the answer to the bench's question, which of the held-out styles or another one;
"own" is the answer to the other one: which of the styles that the base was taught, or another. Means count each answer
once. Ends with exit code 1 if a mean of "prompts" is below its threshold.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from tools.pretrain_nano.concepts import Concept
from tools.style_bench.judges import WEIGHTS, Embedder, Gallery, Judges
from tools.style_bench.pictures import JUDGED_STYLES, EmojiPictures, Reconstructions, as_floats, lookalikes
from tools.style_bench.verdict import QUESTIONS, answers, right_answer

THRESHOLDS = {"style": 0.97, "top-1": 0.85, "top-5": 0.95}
"""Least means."""
OWN = "own"
"""The one of `verdict.QUESTIONS` that has no threshold, as the bench's table does not ask it of a LoRA."""
GATED = "prompts"
"""The split that decides; "test" is for information."""


@dataclass(frozen=True)
class Row:
    """How the judges did on one style.

    Attributes:
        style: its id.
        pictures: how many the concept judge saw.
        judged: how many the style judge saw: lookalikes are left out.
        shares: share of right answers by the keys of `THRESHOLDS`, and `OWN`.
        mistaken: styles that the style judge named instead of the very style, most frequent first, and how often.
    """

    style: str
    pictures: int
    judged: int
    shares: dict[str, float]
    mistaken: tuple[tuple[str, int], ...]


def measure(
    judges: Judges, style: str, concepts: list[Concept], views: Tensor, gallery: Gallery, alike: set[tuple[str, str]]
) -> Row:
    """Judges the pictures of one style.

    Args:
        judges: the judges.
        style: the true style.
        concepts: what the pictures show.
        views: the pictures, (N, 3, 128, 128) in [0, 1].
        gallery: without the style.
        alike: (style, code) of pictures that the style judge need not know.
    """
    ranks = gallery.ranks(judges.concept_embeddings(views), [concept.base for concept in concepts])
    fair = torch.tensor([(style, concept.code) not in alike for concept in concepts])
    logits = judges.style_logits(views[fair])
    named = [judges.styles[n] for n in logits.argmax(1).tolist()]
    wrong = Counter(name for name in named if name != style)
    shares = {
        "top-1": (ranks < 1).float().mean().item(),
        "top-5": (ranks < 5).float().mean().item(),
    }
    for key, among in QUESTIONS.items():
        right = answers(logits, judges.styles, among).argmax(1) == right_answer(style, among)
        shares[key] = right.float().mean().item()
    return Row(style, len(concepts), len(named), shares, tuple(wrong.most_common(3)))


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the mean of each share over the styles; of a question, over its answers: "another" is several styles."""
    found = {key: mean(row.shares[key] for row in rows) for key in ("top-1", "top-5")}
    for key, among in QUESTIONS.items():
        by_answer: dict[int, list[float]] = {}
        for row in rows:
            by_answer.setdefault(right_answer(row.style, among), []).append(row.shares[key])
        found[key] = mean(mean(shares) for shares in by_answer.values())
    return found


def table(title: str, rows: Sequence[Row]) -> tuple[str, bool]:
    """Returns the rows as text with their mean, and whether it passes."""
    columns, average = (*THRESHOLDS, OWN), means(rows)
    lines = [title, f"{'':22}" + "".join(f"{key:>8}" for key in columns) + "  pictures  taken for"]
    for row in rows:
        wrong = ", ".join(f"{name} {count}" for name, count in row.mistaken)
        shares = "".join(f"{row.shares[key]:8.1%}" for key in columns)
        lines.append(f"{row.style:22}{shares}  {row.judged:4}/{row.pictures:<4}  {wrong}".rstrip())
    lines.append(f"{'mean':22}" + "".join(f"{average[key]:8.1%}" for key in columns))
    verdicts = {key: average[key] >= least for key, least in THRESHOLDS.items()}
    marks = "".join(f"{'pass' if passed else 'FAIL':>8}" for passed in verdicts.values())
    lines.append(f"{'threshold':22}" + "".join(f"{least:8.0%}" for least in THRESHOLDS.values()))
    lines.append(f"{'':22}{marks}")
    return "\n".join(lines), all(verdicts.values())


@dataclass(frozen=True)
class Gates:
    """What came out.

    Attributes:
        passed: whether the judges may judge.
        text: the tables.
    """

    passed: bool
    text: str

    def __str__(self) -> str:
        return self.text


def check(judges: Judges, pictures: EmojiPictures, cache: Path | None = None, travel: bool = True) -> Gates:
    """Measures everything.

    Args:
        judges: the judges.
        pictures: the data set.
        cache: folder for round trips; None: "judges" in the data set's folder.
        travel: whether the pictures are judged after the VAE's round trip too.
    """
    reconstructions = Reconstructions(pictures, cache or pictures.folder / "judges")
    embedder = Embedder(judges, pictures)
    galleries = {style: Gallery(judges, pictures, style, embed=embedder) for style in JUDGED_STYLES}
    passed, texts = True, []
    for split in (GATED, "test"):
        alike = lookalikes(pictures, [split])
        drawn, decoded = [], []
        for style, gallery in galleries.items():
            concepts = [concept for concept in pictures.of(style, [split]) if concept.base in gallery.bases]
            codes = [concept.code for concept in concepts]
            drawn.append(measure(judges, style, concepts, pictures.tensor(style, codes), gallery, alike))
            if travel:
                views = as_floats(reconstructions.bytes(style, codes))
                decoded.append(measure(judges, style, concepts, views, gallery, alike))
        for kind, rows in (("as drawn", drawn), ("after the VAE's round trip", decoded)):
            if rows:
                text, good = table(f"split {split}, {kind}", rows)
                texts.append(text)
                passed &= good or split != GATED
        counts = Counter(style for style, _ in alike).most_common()
        texts.append(f"not shown to the style judge, as another style has the same: {dict(counts)}")
    return Gates(passed, "\n\n".join(texts))


def main() -> None:
    """Measures and says whether the judges may judge."""
    parser = argparse.ArgumentParser(prog="python -m tools.style_bench.gates", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the judges' weights")
    parser.add_argument("--cache", type=Path, help="folder for round trips; default: DATA/judges")
    parser.add_argument("--as-drawn", action="store_true", help="no round trips, for a quick look")
    given = parser.parse_args()
    torch.set_num_threads(1)
    gates = check(Judges.load(given.weights), EmojiPictures(given.data), given.cache, travel=not given.as_drawn)
    print(gates)
    print("the judges pass" if gates.passed else "the judges fail; train them anew with tools.style_bench.train_judges")
    sys.exit(0 if gates.passed else 1)


if __name__ == "__main__":
    main()
