"""`sdlora doctor`: shows what this machine has, what of it really works, and what to install.

`sdlora.training.survey` finds it all out; this file only shows it: as tables on a terminal, as plain lines in a pipe,
as JSON for programs and bug reports.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

Report = dict[str, Any]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(as_json: bool) -> None:
    """Show versions and devices, and try out what this machine can do.

    Every number format and every attention kernel runs forward and backward once. Nothing is downloaded or changed.
    Exits with 0 if training can run, else with 1.
    """
    from sdlora.training.survey import survey

    if not as_json and sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        with console.status("trying out this machine ..."):
            report = survey()
        show_tables(report, console)
    else:
        report = survey()
        click.echo(json.dumps(report, indent=2) if as_json else plain(report))
    if not report["can_train"]:
        sys.exit(1)


def lay_out(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """Lays the report out as (title, headings, rows of text), the same for the terminal and for a pipe."""
    machine = report["machine"]
    memory = _gigabytes(machine["memory_gb"])
    works = {True: "works", False: "does not work"}
    return [
        (
            "Versions",
            ["library", "version", "wanted"],
            [[v["name"], v["version"] or "none", v["wants"] + ("" if v["ok"] else "  !")] for v in report["versions"]],
        ),
        (
            "Machine",
            ["system", "processor", "cores", "memory"],
            [[machine["system"], machine["processor"], str(machine["cores"]), memory]],
        ),
        (
            "Devices",
            ["device", "name", "memory", "compute capability"],
            [[d["device"], d["name"], _gigabytes(d["memory_gb"]), d["capability"] or "-"] for d in report["devices"]],
        ),
        (
            "Number formats, tried forward and backward",
            ["format", "device", "result", "time or reason"],
            [
                [p["format"], p["device"], works[p["ok"]], f"{p['ms']} ms" if p["ok"] else p["error"]]
                for p in report["precision"]
            ],
        ),
        (
            "Attention, tried forward and backward",
            ["kernel", "result", "time or reason"],
            [[a["name"], works[a["ok"]], a["reason"]] for a in report["attention"]],
        ),
        (
            "Base models",
            ["base", "here", "where"],
            [[m["base"], "yes" if m["here"] else "no", m["where"]] for m in report["models"]],
        ),
        (
            "Folders",
            ["for", "folder", "free"],
            [[f["what"], f["folder"], _gigabytes(f["free_gb"])] for f in report["folders"]],
        ),
        ("What auto chooses", ["", "choice", "because"], [[a["what"], a["choice"], a["why"]] for a in report["auto"]]),
    ]


def _gigabytes(value: float | None) -> str:
    return "-" if value is None else f"{value} GB"


def _verdict(report: Report) -> str:
    return "Training can run here." if report["can_train"] else "Training cannot run here yet."


def plain(report: Report) -> str:
    """Returns the report as aligned lines without colour."""
    lines = []
    for title, _, rows in lay_out(report):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += [title, *("  " + line.rstrip() for line in aligned), ""] if rows else []
    lines += ["Advice", *("  " + advice for advice in report["advice"]), ""] if report["advice"] else []
    return "\n".join([*lines, _verdict(report)])


def show_tables(report: Report, console: Any) -> None:
    """Prints the report as tables on a rich console."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    for title, headings, rows in lay_out(report):
        if not rows:
            continue
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    for advice in report["advice"]:
        console.print(f"[yellow]*[/yellow] {escape(advice)}")
    colour = "green" if report["can_train"] else "red"
    console.print(f"\n[bold {colour}]{_verdict(report)}[/bold {colour}]")
