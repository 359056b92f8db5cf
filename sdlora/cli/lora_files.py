"""What the commands on LoRA files share: reading with the reader's remarks said aloud, options, sizes in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdlora.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sdlora.files.kohya import LoraFile
    from sdlora.files.merge import Weighed
    from sdlora.files.svd import Keep

FORMATS = ("fp16", "bf16", "fp32")


def dtype_option(default: str) -> Callable[..., Any]:
    """Returns the option `--dtype`.

    Args:
        default: what holds without it, for the help.
    """
    return click.option("--dtype", type=click.Choice(FORMATS), help=f"Number format of the file. Default: {default}.")


def chosen_dtype(word: str) -> torch.dtype:
    """Returns a number format by its word in `FORMATS`."""
    from sdlora.files.places import DTYPE_WORDS

    return {name: dtype for dtype, name in DTYPE_WORDS.items()}[word]


def read_aloud(path: Path) -> LoraFile:
    """Reads a LoRA file and prints what is unusual about it."""
    from sdlora.files.kohya import read_lora
    from sdlora.files.webui import printable

    lora = read_lora(path)
    for note in lora.notes:
        click.echo(f"Note: {printable(path.name)}: {printable(note)}")
    return lora


def read_weighed(specs: Sequence[str]) -> list[Weighed]:
    """Reads LoRAs given as FILE or FILE:STRENGTH, and prints what is unusual about each."""
    from sdlora.files.merge import Weighed
    from sdlora.sampling.prompts import parse_lora_spec

    return [Weighed(read_aloud(path), strength) for path, strength in map(parse_lora_spec, specs)]


def the_rule(given: Mapping[str, float | None]) -> tuple[Keep, str]:
    """Returns the rule that finds ranks, and its words, e.g. energy 0.95.

    Args:
        given: what the user gave, by name of a rule; exactly one must be there.

    Raises:
        ConfigError: if none is, or several.
    """
    from sdlora.files.svd import RULES

    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        choice = " or ".join(f"--{name}" for name in given)
        raise ConfigError(f"give {choice}" + (f", one of them; got {' and '.join(chosen)}" if chosen else ""))
    ((name, value),) = chosen.items()
    return RULES[name](value), f"{name} {value:g}"


def megabytes(path: Path) -> str:
    """Returns a file's size in words."""
    return f"{path.stat().st_size / 1e6:.2f} MB"
