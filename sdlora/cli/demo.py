"""`sdlora demo`: the whole line on the pictures that come with sdlora, and a before/after grid of other subjects."""

from __future__ import annotations

import time
from pathlib import Path

import click

from sdlora.cli.startup import import_models
from sdlora.config import Config
from sdlora.config_io import load_config

HELD_OUT = ("dog face", "pig face", "alien", "police officer", "ambulance", "cherry blossom", "umbrella", "melon")
"""Subjects of the grid: the miniature base knows them, and they are not among the example pictures."""
TRIGGER = "sks style"
"""Called at a caption's end, for there the miniature base has learned to look for a style; see docs/defaults.md."""


def examples_folder() -> Path:
    """Returns where the example pictures lie: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "datasets_example", package.parent / "datasets_example"):
        if folder.is_dir():
            return folder
    raise click.ClickException("the example pictures are missing from this installation; install sdlora again")


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--output", type=click.Path(path_type=Path), help="folder of the run; default: runs/demo")
@click.option("--steps", type=click.IntRange(1), default=600, show_default=True, help="training steps")
def command(output: Path | None, steps: int) -> None:
    """Train on the 30 pictures that come with sdlora and draw a before/after grid.

    Needs no GPU and no download: the embedded miniature base is used. Takes a few minutes.
    """
    import_models()
    from sdlora.cli.train import describe
    from sdlora.training.progress import duration, terminal_reporter
    from sdlora.training.train import train

    config = demo_config(output, steps)
    result = train(config, reporter=terminal_reporter())
    click.echo(describe(result, config))
    if result.samples:
        sheet = save_grid(result.folder, result.samples.with_suffix(""))
        click.echo(f"\nOther subjects, without and with the LoRA, beside some of the pictures it learned from: {sheet}")
        click.echo(f"Done in {duration(result.seconds)}.")


def save_grid(folder: Path, drawn: Path) -> Path:
    """Writes `grid.png`: the held-out subjects without and with the LoRA, and examples of the style to compare with.

    Args:
        folder: the run's folder.
        drawn: folder of the samples with the LoRA.
    """
    from PIL import Image

    from sdlora.atomic import replacing
    from sdlora.sampling.grid import grid

    def opened(path: Path) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    examples = sorted(examples_folder().glob("*.png"))
    rows = []
    for i in range(len(HELD_OUT)):
        base, lora = (opened(place / f"{i:02d}.png") for place in (folder / "samples" / "base", drawn))
        example = opened(examples[i * len(examples) // len(HELD_OUT)])
        rows.append([base, lora, example.resize(base.size, Image.Resampling.LANCZOS)])  # as large as it was learned
    target = folder / "grid.png"
    with replacing(target) as path:
        grid(rows, row_labels=HELD_OUT, column_labels=["base", "LoRA", "learned from"]).save(path)
    return target


def prompt(subject: str, seed: int) -> str:
    """Returns a prompt as the demo's LoRA was taught, with kohya's option for the seed."""
    return f"{subject}, {TRIGGER} --d {seed}"


def demo_config(output: Path | None, steps: int) -> Config:
    """Returns the settings of the demo."""
    if output is None:
        output = Path("runs") / "demo"
        if output.exists():
            output = output.with_name(f"demo-{time.strftime('%Y%m%d-%H%M%S')}")
    flags = {
        "base.model": "nano",
        "data.images": examples_folder(),
        "data.trigger": TRIGGER,
        "data.trigger_place": "end",
        "output.output": output,
        "output.name": "demo",
        "train.steps": steps,
        "samples.sample_prompts": [prompt(subject, 5) for subject in HELD_OUT],
        "samples.sample_every": 10**6,  # at the end only
    }
    return load_config(None, flags)
