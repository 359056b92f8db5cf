"""Writes what was measured as JSON for programs and as Markdown tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.atomic import write_text
from tools.bench.report import sentence

Facts = Mapping[str, Any]

COLUMNS = {
    "scan_cold": "first scan",
    "scan_warm": "second scan",
    "latents_cold": "latents cold",
    "latents_warm": "latents warm",
    "texts_cold": "texts cold",
    "texts_warm": "texts warm",
    "plan": "plan an epoch",
}
"""What is measured of a folder besides the step -> its head."""


def write_json(file: Path, facts: Facts) -> None:
    """Writes all numbers; times in seconds, sizes in bytes."""
    write_text(file, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def write_markdown(file: Path, facts: Facts, figure: str | None) -> None:
    """Writes the tables.

    Args:
        file: ends with `.md`.
        facts: as in the JSON file.
        figure: name of the picture beside it, or `None` if there is none.
    """
    batch, rank, targets, precision = (facts["settings"][name] for name in ("batch", "rank", "targets", "precision"))
    parts = [
        "# What it costs to grow",
        sentence(facts["environment"]),
        f"The embedded base nano, batches of {batch}, {precision}, rank {rank} in {targets} if nothing else is said. "
        "What is compared took turns; times are medians, brackets hold the quartiles.",
        *([f"![Four diagrams of the tables below]({figure})"] if figure else []),
        *_images(facts),
        "## Rank",
        _sizes("rank", facts["ranks"]),
        "## Resolution",
        _table(
            ("pixels a side", "step, ms", "ms for 1000 pixels"),
            (
                (str(row["side"]), _ms(row["step"]), f"{1e6 * row['step']['median'] / batch / row['side'] ** 2:.2f}")
                for row in facts["resolutions"]
            ),
        ),
        "## Layers that learn",
        _sizes("targets", facts["targets"]),
    ]
    write_text(file, "\n\n".join(parts) + "\n")


def verdict(facts: Facts) -> str:
    """Says in one sentence whether the step's time depends on the number of pictures."""
    few, many, ratio = facts["images"][0]["images"], facts["images"][-1]["images"], facts["step_ratio"]
    return (
        f"From {few:,} to {many:,} pictures a step takes {ratio['median']:.3f} times as long "
        f"(95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}, {facts['step_rounds']} rounds)."
    )


def _images(facts: Facts) -> list[str]:
    rows = facts["images"]
    cells = ([f"{row['images']:,}", *(_short(row[name]) for name in COLUMNS), _ms(row["step"])] for row in rows)
    readings = ", ".join(f"{row['readings']} at {row['images']:,}" for row in rows)
    last = rows[-1]
    each = ", ".join(f"{head} {1e3 * last[name]['median'] / last['images']:.3g}" for name, head in COLUMNS.items())
    return [
        "## Pictures",
        verdict(facts),
        _table(("pictures", *(f"{head}, s" for head in COLUMNS.values()), "step, ms"), cells),
        f"Milliseconds for each of {last['images']:,} pictures: {each}.",
        "The pictures are about 32 pixels a side, so that ten thousand are encoded soon; larger ones take "
        "longer. Each has a caption of its own. Cold: nothing is cached; warm: all is. A step reads "
        "its batch, its captions' states, draws noise, and updates the LoRA; each round had one batch of each of five "
        f"shapes. Readings of a folder: {readings}.",
    ]


def _sizes(name: str, rows: Sequence[Facts]) -> str:
    return _table(
        (name, "step, ms", "layers", "numbers that train", "file, MB"),
        (
            (
                str(row[name]),
                _ms(row["step"]),
                str(row["layers"]),
                f"{row['parameters']:,}",
                f"{row['file_bytes'] / 1e6:.2f}",
            )
            for row in rows
        ),
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(spread: Facts) -> str:
    return f"{spread['median']:.3g}"


def _ms(spread: Facts) -> str:
    return f"{1e3 * spread['median']:.1f} [{1e3 * spread['low']:.1f}, {1e3 * spread['high']:.1f}]"
