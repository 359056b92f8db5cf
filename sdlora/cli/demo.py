"""`sdlora demo`: the whole line on the pictures that come with sdlora, and a before/after grid of other subjects."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import click

from sdlora.config import Config, load_config

HELD_OUT = ("dog face", "panda", "koala", "mushroom", "cookie", "monkey face", "pear", "wolf")
"""Prompts of the grid: subjects that the miniature base knows and that are not among the example pictures."""


def examples_folder() -> Path:
    """Returns where the example pictures lie: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "datasets_example", package.parent / "datasets_example"):
        if folder.is_dir():
            return folder
    raise click.ClickException("the example pictures are missing from this installation; install sdlora again")


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--output", type=click.Path(path_type=Path), help="folder of the run; default: runs/demo-<time>")
@click.option("--steps", type=click.IntRange(1), default=600, show_default=True, help="training steps")
def command(output: Path | None, steps: int) -> None:
    """Train on the 30 pictures that come with sdlora and draw a before/after grid.

    Needs no GPU and no download: the embedded miniature base is used. Takes a few minutes.
    """
    from sdlora.cli.train import describe
    from sdlora.training.progress import duration, terminal_reporter
    from sdlora.training.train import train

    result = train(demo_config(output, steps), reporter=terminal_reporter())
    click.echo(describe(result))
    if result.samples:
        sheet = result.folder / "grid.png"
        shutil.copyfile(result.samples, sheet)
        click.echo(f"\nSubjects that were not in the pictures, without and with the LoRA: {sheet}")
        click.echo(f"The pictures it learned from: {examples_folder()}")
        click.echo(f"Done in {duration(result.seconds)}.")


def demo_config(output: Path | None, steps: int) -> Config:
    """Returns the settings of the demo."""
    output = output or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    flags = {
        "base.model": "nano",
        "data.images": examples_folder(),
        "output.output": output,
        "output.name": "demo",
        "train.steps": steps,
        "samples.sample_prompts": list(HELD_OUT),
        "samples.sample_every": 10**6,  # at the end only
    }
    return load_config(None, flags)
