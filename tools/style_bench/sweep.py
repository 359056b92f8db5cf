"""Compares settings: each value is tried alone, and its LoRA is measured against the LoRA with nothing changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdlora.atomic import write_text
from sdlora.errors import ConfigError
from tools.style_bench.bootstrap import Estimate, estimate
from tools.style_bench.experiment import Experiment, write_json
from tools.style_bench.measure import Scores
from tools.style_bench.report import TITLES, head, number_cell, plain, settings, warning
from tools.style_bench.summary import MEASURES, Means, summarise

UNCHANGED = "unchanged"
SHOWN = ("style", "top1", "retention", "joint", "win", "copy", "diversity", "leak", "loss", "seconds")
"""Columns of the table, by their names in `summary.MEASURES`."""
COMPARED = ("style", "top1", "joint")
"""Columns whose difference to the unchanged LoRA is given."""

VariantScores = Mapping[str, Mapping[str, Sequence[Scores]]]
"""Style -> variant, or "base" and "own" -> the scores of its subsets."""


def variants(vary: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Reads what is to be tried.

    Args:
        vary: texts "section.key=value,value,...".

    Returns:
        Name -> assignments as `--set` takes them; the first one changes nothing.

    Raises:
        ConfigError: a text is not of that form, or says the same twice.
    """
    found: dict[str, tuple[str, ...]] = {UNCHANGED: ()}
    for text in vary:
        path, _, values = (part.strip() for part in text.partition("="))
        names = [f"{path}={value.strip()}" for value in values.split(",") if value.strip()]
        if not path or not names:
            raise ConfigError(f"--vary {text}: write it as section.key=value,value, e.g. --vary lora.rank=4,64")
        for name in names:
            if name in found:
                raise ConfigError(f"--vary {name} is given twice")
            found[name] = (name,)
    return found


def differences(scores: VariantScores, column: str) -> dict[str, Estimate]:
    """Returns how much more each variant has of a column than the unchanged LoRA, the mean over the styles.

    The same prompts and seeds are drawn by all variants, so a difference is paired: its interval is narrower than the
    intervals of the two numbers suggest.
    """
    means = [Means(by_variant, key) for key, by_variant in enumerate(scores.values())]
    names = next(iter(scores.values()))
    found = {}
    for name in [name for name in names if name not in TITLES and name != UNCHANGED]:
        found[name] = estimate(np.mean([of(name, column) - of(UNCHANGED, column) for of in means], axis=0))
    return found


def write_sweep(
    folder: Path, name: str, experiment: Experiment, scores: VariantScores, judges: str, failure: str = ""
) -> Path:
    """Writes `NAME.json` and `NAME.md` into a folder; returns the latter.

    Args:
        folder: is made.
        name: stem of the files.
        experiment: the unchanged one.
        scores: see `VariantScores`; every style has the same variants.
        judges: hash of the judges and the data set.
        failure: how the judges failed their gates; "" if they passed.
    """
    _, mean = summarise(scores)
    changes = {column: differences(scores, column) for column in COMPARED}
    facts = {
        "settings": {**settings(experiment), "judges": judges, "judges_passed": not failure},
        "styles": list(scores),
        "variants": plain(mean),
        "differences": plain(changes),
    }
    write_json(folder / f"{name}.json", facts)
    lines = ["# Settings compared", "", *warning(failure), _sentence(experiment, scores), ""]
    lines += [*_table(mean, changes), "", f'Δ: what a row has more than the row "{UNCHANGED}", with the 95 % interval']
    lines += ["(the same prompts drawn anew 2000 times for both rows). The other columns are as in the report.", ""]
    target = folder / f"{name}.md"
    write_text(target, "\n".join(lines))
    return target


def _sentence(experiment: Experiment, scores: VariantScores) -> str:
    size = f'{experiment.num_prompts} prompts of the half "{experiment.half}" x {experiment.num_seeds}'
    return f"Mean over {', '.join(scores)}; {experiment.images} pictures to learn from; {size}."


def _table(mean: Mapping[str, Mapping[str, Estimate]], changes: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    measures = {measure.id: measure for measure in MEASURES}
    shown = [measures[id] for id in SHOWN if any(id in row for row in mean.values())]
    heads = [*map(head, shown), *(f"Δ {measures[column].title}" for column in COMPARED)]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in [*[name for name in mean if name != "own"], "own"]:
        cells = [number_cell(mean[name].get(m.id), m, interval=False) for m in shown]
        cells += [number_cell(changes[column].get(name), measures[column]) for column in COMPARED]
        lines.append(f"| {TITLES.get(name, name)} | " + " | ".join(cells) + " |")
    return lines
