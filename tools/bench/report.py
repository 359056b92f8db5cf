"""Writes what was measured: JSON for programs, a Markdown table for people, and that table into the README."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.atomic import write_text
from sdlora.errors import ConfigError
from tools.bench.results import OURS, REFERENCE
from tools.bench.rows import ROWS

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
HEADS = (
    "",
    "steps/s",
    "reference",
    "times as fast",
    "of the peak",
    "memory",
    "reference",
    "operations a step",
    "reference",
    "worst cosine",
    "reference",
)
NOTHING = "–"
LEGEND = """\
LoRA of rank 16 in the attention layers; cached latents and text on both sides. The reference is diffusers and peft
under bf16 autocast with torch's AdamW, as diffusers' example trains. Both took turns in one run, on a CPU each in a
process of its own, sdlora's set up as `sdlora train` sets up its own; brackets hold a 95 % interval of the rounds'
ratios. Of the peak: the FLOP of forward, backward-data and attention, over what the best product of that machine
reaches. Memory: the peak of a step, weights included. Operations: dispatched, views left out. Cosine: of a tensor's
gradient with that of an fp32 run."""
Found = Mapping[str, Any]


def write_report(file: Path, machine: Found, rows: Mapping[str, Found], left_out: Sequence[str]) -> None:
    """Writes the JSON file, and the table beside it with the ending `.md`.

    Args:
        file: ends with `.json`.
        machine: environment and rates.
        rows: by name, as `results.complete` leaves them, or `{"error": why}`.
        left_out: rows that were not begun.
    """
    facts = {**machine, "rows": rows, "left_out": list(left_out)}
    write_text(file, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_text(file.with_suffix(".md"), "# Speed and memory of a training step\n\n" + table(facts) + "\n")


def table(facts: Found) -> str:
    """Returns the Markdown table of a report, with a sentence on the machine above and the row names in words."""
    lines = [
        sentence(facts["environment"]),
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---" + "|---:" * (len(HEADS) - 1) + "|",
    ]
    for name, found in facts["rows"].items():
        title = ROWS[name].title if name in ROWS else name
        lines.append("| " + " | ".join([title, *_cells(found)]) + " |")
    lines += ["", LEGEND]
    if facts["left_out"]:
        lines += ["", f"Left out, for the time was used up: {', '.join(facts['left_out'])}."]
    return "\n".join(lines)


def sentence(environment: Found) -> str:
    """Says in one sentence where the numbers come from."""
    versions = environment["packages"]
    programs = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers", "peft") if name in versions)
    where = f"{environment['processor']}, {environment['threads']} threads"
    if "gpu" in environment:
        where = f"{environment['gpu']}, driver {environment['driver']}"
    extensions = [name for name in environment["instructions"] if name.startswith(("amx", "avx512_bf16"))]
    more = f" ({', '.join(extensions) or 'no bf16 instructions'})" if "gpu" not in environment else ""
    return f"{where}{more}; {programs}; {environment['date']}."


def _cells(found: Found) -> list[str]:
    if "error" in found:
        return [found["error"], *[NOTHING] * (len(HEADS) - 2)]
    ours, reference = found["sides"][OURS], found["sides"][REFERENCE]
    if found["objection"]:
        return [f"not timed: {found['objection']}", *[NOTHING] * (len(HEADS) - 2)]
    ratio = found["ratio"]
    faster = f"**{ratio['median']:.2f}** [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else NOTHING
    faster += "" if found["together"] else ", one after the other"
    return [
        _speed(ours),
        _speed(reference),
        faster,
        _number(ours.get("share_of_peak"), "{:.0%}"),
        _memory(ours, found["memory_ratio"]),
        _memory(reference, None),
        _number(ours["operations"], "{:,}") + _number(found["operations_ratio"], " ({:.2f}×)", ""),
        _number(reference["operations"], "{:,}"),
        _number(ours["worst_cosine"], "{:.5f}"),
        _number(reference["worst_cosine"], "{:.5f}"),
    ]


def _speed(side: Found) -> str:
    return side["problem"] or _number(side.get("steps_per_second"), "{:.3g}")


def _memory(side: Found, relative: float | None) -> str:
    peak = side["peak_bytes"]
    return _number(peak and peak / 1e9, "{:.2f} GB") + _number(relative, " ({:.2f}×)", "")


def _number(value: float | None, pattern: str, nothing: str = NOTHING) -> str:
    return nothing if value is None else pattern.format(value)


def write_readme(readme: Path, table: str) -> None:
    """Puts a table between the two marks in a README, in place of what stands there.

    Raises:
        ConfigError: if the marks are not there, once each and in order.
    """
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or not pattern.search(text):
        raise ConfigError(f"{readme} needs one {BEGIN} and, further down, one {END}; the table goes between them")
    write_text(readme, pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text))
