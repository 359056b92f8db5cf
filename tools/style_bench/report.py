"""Writes what was found: JSON for programs, Markdown for people, a sheet of pictures for the eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.atomic import replacing, write_text
from sdlora.sampling.grid import grid
from tools.style_bench.bootstrap import Estimate
from tools.style_bench.cells import Cell
from tools.style_bench.draw import to_image
from tools.style_bench.experiment import Experiment, write_json
from tools.style_bench.measure import Scores
from tools.style_bench.methods import METHODS
from tools.style_bench.summary import GOALS, MEASURES, Goal, Measure, Table, subset_spread, summarise

SHEET_ROWS = 10
SHEET_METHODS = ("base", "words", "lora", "full", "oracle")
REAL = "real"
TITLES = {REAL: "real pictures", **{id: method.title for id, method in METHODS.items()}}
AllScores = Mapping[str, Mapping[str, Sequence[Scores]]]
"""Style -> method -> the scores of its subsets."""


def write_report(
    folder: Path, name: str, experiment: Experiment, scores: AllScores, judges: str, failure: str = ""
) -> Path:
    """Writes `NAME.json` and `NAME.md` into a folder; returns the latter.

    Args:
        folder: is made.
        name: stem of the files.
        experiment: the settings.
        scores: style -> method -> scores; "real" stands for the real pictures.
        judges: hash of the judges and the data set.
        failure: how the judges failed their gates; "" if they passed.
    """
    tables, mean = summarise(scores)
    counts = {style: _counts(by_method) for style, by_method in scores.items()}
    spread = {style: subset_spread(by_method.get("lora", ())) for style, by_method in scores.items()}
    facts = {
        "settings": {**settings(experiment), "judges": judges, "judges_passed": not failure},
        "goals": [asdict(goal) | {"seen": _seen(goal, mean)} for goal in GOALS],
        "mean": plain(mean),
        "styles": {
            style: {**counts[style], "style_sd_over_subsets": spread[style], "methods": plain(table)}
            for style, table in tables.items()
        },
        "definitions": {measure.id: measure.meaning for measure in MEASURES},
    }
    write_json(folder / f"{name}.json", facts)
    lines = ["# Style bench", "", *warning(failure), _sentence(experiment), ""]
    lines += ["## Goals", "", *_goal_lines(mean), ""]
    lines += [f"## Mean over {_count(len(tables), 'style')}: {', '.join(tables)}", "", *_table_lines(mean), ""]
    for style, table in tables.items():
        prompts, choices = counts[style]["prompts"], counts[style]["subsets"]
        note = f"{_count(prompts, 'prompt')}, {_count(choices, 'choice')} of the pictures"
        sd = spread[style]
        note += f"; style accuracy varies by {100 * sd:.1f} points (SD) between choices" if sd is not None else ""
        lines += [f"## {style}", "", f"{note}.", "", *_table_lines(table), "", f"![]({name}-{style}.png)", ""]
    lines += ["## What the columns mean", "", *[f"- **{m.title}**: {m.meaning}." for m in MEASURES], ""]
    lines += ["Numbers in brackets: 95 % intervals, prompts drawn anew 2000 times.", ""]
    target = folder / f"{name}.md"
    write_text(target, "\n".join(lines))
    return target


def write_sheet(folder: Path, name: str, cells: Mapping[str, Cell]) -> Path:
    """Writes `NAME-STYLE.png`: prompts down, methods across, the real picture first.

    Args:
        folder: is made.
        name: stem of the file.
        cells: method -> a drawn cell, all of one task; at least one.
    """
    task = next(iter(cells.values())).task
    pictures = next(iter(cells.values())).experiment.pictures
    shown = [m for m in SHEET_METHODS if m in cells]
    drawn = {method: cells[method].read()["pictures"] for method in shown}
    rows, labels = [], []
    for i, concept in enumerate(task.prompts[:SHEET_ROWS]):
        there = pictures.has(task.style.id, concept.code)
        real = Image.fromarray(pictures.read(task.style.id, concept.code)) if there else Image.new("RGB", (128, 128))
        rows.append([real, *(to_image(drawn[method][i, 0]) for method in shown)])
        labels.append(concept.label)
    sheet = grid(
        rows, row_labels=labels, column_labels=[f"real {task.style.id}", *(TITLES[m] for m in shown)], cell=128
    )
    target = folder / f"{name}-{task.style.id}.png"
    with replacing(target) as temporary:
        sheet.save(temporary)
    return target


def settings(experiment: Experiment) -> dict[str, Any]:
    """Returns what a report must say about how it came about."""
    return {
        "base": experiment.base.name,
        "digest": experiment.digest,
        "images": experiment.images,
        "prompts": experiment.half,
        "seeds": experiment.num_seeds,
        "lora": experiment.learning_settings(),
        "full": asdict(experiment.full),
        "oracle": asdict(experiment.oracle),
    }


def _counts(by_method: Mapping[str, Sequence[Scores]]) -> dict[str, int]:
    longest = max((len(s["style"]) for several in by_method.values() for s in several), default=0)
    return {"prompts": longest, "subsets": max((len(several) for several in by_method.values()), default=0)}


def plain(table: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, dict[str, float]]]:
    """Turns a table of numbers into what JSON can hold."""
    return {method: {name: asdict(number) for name, number in row.items()} for method, row in table.items()}


def _sentence(experiment: Experiment) -> str:
    return (
        f'A LoRA learns a style from {experiment.images} pictures; then the half "{experiment.half}" of the prompts is '
        f"drawn, {experiment.num_seeds} pictures each. Base: {experiment.base.name}. How to read it: "
        "tools/style_bench/BENCH.md."
    )


def warning(failure: str) -> list[str]:
    """Returns the lines that a report begins with if the judges failed; none if `failure` is empty."""
    if not failure:
        return []
    words = "**The judges failed their gates: what follows is a hint and no result.** They are right this often:"
    return [words, "", "```", *failure.splitlines(), "```", ""]


def _goal_lines(mean: Table) -> list[str]:
    measures = {measure.id: measure for measure in MEASURES}
    lines = ["| | goal | LoRA | |", "|---|---|---|---|"]
    for goal in GOALS:
        measure, seen = measures[goal.measure], _seen(goal, mean)
        sign, number = "≥" if goal.at_least else "≤", mean.get("lora", {}).get(goal.measure)
        verdict = "not measured" if seen is None else "met" if goal.met_by(seen) else "missed"
        bar = _number(goal.bar, measure)
        lines.append(f"| {measure.title} | {sign} {bar} | {number_cell(number, measure)} | {verdict} |")
    return lines


def _seen(goal: Goal, mean: Table) -> float | None:
    number = mean.get("lora", {}).get(goal.measure)
    return None if number is None else number.value


def _table_lines(table: Table) -> list[str]:
    measures = [m for m in MEASURES if any(m.id in row for row in table.values())]
    heads = [head(measure) for measure in measures]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method in [m for m in TITLES if m in table and m != REAL] + [m for m in (REAL,) if m in table]:
        cells = [number_cell(table[method].get(m.id), m) for m in measures]
        lines.append(f"| {TITLES[method]} | " + " | ".join(cells) + " |")
    return lines


def head(measure: Measure) -> str:
    """Writes what stands above a column."""
    return f"{measure.title}, {measure.unit}" if measure.unit else measure.title


def number_cell(number: Estimate | None, measure: Measure, interval: bool = True) -> str:
    """Writes a number as it stands in a table, "–" if there is none."""
    if number is None:
        return "–"
    text = _number(number.value, measure)
    if number.low == number.high or not interval:
        return text
    return f"{text} ({_number(number.low, measure)}–{_number(number.high, measure)})"


def _number(value: float, measure: Measure) -> str:
    if measure.unit == "%":
        return f"{100 * value:.1f}"
    return f"{value:.0f}" if measure.unit == "s" else f"{value:.3f}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
