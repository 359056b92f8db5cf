"""Draws what was measured: four diagrams in one figure. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

Rows = Sequence[Mapping[str, Any]]

LINES = (
    ("scan_cold", "scan the folder, first time", "#1b6ca8", "-"),
    ("scan_warm", "scan the folder, again", "#1b6ca8", ":"),
    ("caching_cold", "caching, cold", "#c8553d", "-"),
    ("caching_warm", "caching, warm", "#c8553d", ":"),
    ("plan", "plan an epoch", "#6a7b3c", "-"),
    ("step", "one training step", "black", "-"),
)
"""What the first diagram shows: measured quantity, its name, colour and dash."""
BLUE, RED, GREY = "#1b6ca8", "#c8553d", "#777777"


def draw_figure(file: Path, facts: Mapping[str, Any]) -> None:
    """Draws the four diagrams into a PNG file; the whiskers are quartiles."""
    figure = Figure(figsize=(12.5, 9.5), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
    _draw_images(figure.add_subplot(grid[0, 0]), facts)
    split = grid[0, 1].subgridspec(2, 1)
    steps = figure.add_subplot(split[0])
    _draw_ranks(steps, figure.add_subplot(split[1], sharex=steps), facts["ranks"])
    _draw_resolutions(figure.add_subplot(grid[1, 0]), facts["resolutions"])
    _draw_targets(figure.add_subplot(grid[1, 1]), facts["targets"])
    environment, chosen = facts["environment"], facts["settings"]
    figure.suptitle(
        f"sdlora on the embedded base nano, batches of {chosen['batch']}, {chosen['precision']}, 1 thread\n"
        f"{environment['processor']}, torch {environment['packages']['torch']}, {environment['date']}; "
        "medians, whiskers are quartiles",
        fontsize=11,
    )
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _draw_images(axes: Axes, facts: Mapping[str, Any]) -> None:
    rows, ratio = facts["images"], facts["step_ratio"]["median"]
    counts = [row["images"] for row in rows]
    for name, label, colour, dash in LINES:
        _errorbar(axes, counts, [row[name] for row in rows], 1, label=label, color=colour, linestyle=dash)
    axes.set(xscale="log", yscale="log", xlabel="number of pictures", ylabel="seconds")
    axes.set_title(f"Pictures: a step takes {ratio:.2f} times as long with {counts[-1]:,} as with {counts[0]:,}")
    _ticks(axes, counts)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.28)  # room for the legend
    _plain(axes, (1,))
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=9)


def _draw_ranks(above: Axes, below: Axes, rows: Rows) -> None:
    ranks = [row["rank"] for row in rows]
    _errorbar(above, ranks, [row["step"] for row in rows], 1e3, color="black")
    above.set(xscale="log", ylabel="step, ms", title="Rank")
    above.set_ylim(0, 1.15e3 * max(row["step"]["high"] for row in rows))
    above.tick_params(labelbottom=False)
    below.plot(ranks, [row["parameters"] / 1e6 for row in rows], "o-", color=BLUE, label="numbers that train, millions")
    below.plot(ranks, [row["file_bytes"] / 1e6 for row in rows], "s-", color=RED, label="file (fp16), MB")
    below.set(yscale="log", xlabel="rank", ylabel="millions, MB")
    below.grid(alpha=0.3)
    _plain(below, (1, 2, 5))
    below.legend(loc="upper left", frameon=False, fontsize=9)
    for axes in (above, below):
        _ticks(axes, ranks)


def _draw_resolutions(axes: Axes, rows: Rows) -> None:
    sides = [row["side"] for row in rows]
    _errorbar(axes, sides, [row["step"] for row in rows], 1e3, color="black", label="one training step")
    last = 1e3 * rows[-1]["step"]["median"]
    guide = [last * (side / sides[-1]) ** 2 for side in sides]
    axes.plot(sides, guide, "--", color=GREY, label="in proportion to the pixels")
    axes.set(xscale="log", yscale="log", xlabel="side of a square picture, pixels", ylabel="step, ms")
    axes.set_title("Resolution")
    _plain(axes, (1, 2, 5))
    _ticks(axes, sides)
    axes.legend(loc="upper left", frameon=False, fontsize=9)


def _draw_targets(axes: Axes, rows: Rows) -> None:
    spreads = [row["step"] for row in rows]
    medians, whiskers = _whiskers(spreads, 1e3)
    places = range(len(rows))
    axes.bar(places, medians, 0.6, yerr=whiskers, capsize=4, color=BLUE)
    for place, row, spread in zip(places, rows, spreads, strict=True):
        axes.annotate(
            f"{1e3 * spread['median']:.0f} ms\n{row['parameters'] / 1e6:.2f} M numbers\n"
            f"{row['file_bytes'] / 1e6:.2f} MB",
            (place, 1e3 * spread["high"]),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    names = [f"{row['targets']}\n({row['layers']} layers)" for row in rows]
    axes.set_xticks(list(places), names)
    axes.set(xlabel="layers that learn", ylabel="step, ms", title="Layers that learn")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _errorbar(axes: Axes, x: Sequence[int], spreads: Rows, unit: float, **style: Any) -> None:
    medians, whiskers = _whiskers(spreads, unit)
    axes.errorbar(x, medians, yerr=whiskers, marker="o", markersize=5, capsize=3, linewidth=1.8, **style)
    axes.grid(alpha=0.3)


def _whiskers(spreads: Rows, unit: float) -> tuple[list[float], list[list[float]]]:
    medians = [unit * spread["median"] for spread in spreads]
    down = [unit * (spread["median"] - spread["low"]) for spread in spreads]
    up = [unit * (spread["high"] - spread["median"]) for spread in spreads]
    return medians, [down, up]


def _ticks(axes: Axes, values: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _plain(axes: Axes, steps: Sequence[int]) -> None:
    """Labels a logarithmic axis of y with plain numbers, at these steps of every power of ten."""
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
