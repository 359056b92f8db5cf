"""The `sdlora` command. Each subcommand lives in a file of its own and is imported only when it is called."""

from __future__ import annotations

import io
import os
import sys

import click

from sdlora import __version__
from sdlora.allocator import keep_freed_memory
from sdlora.cli.lazy import LazyGroup
from sdlora.errors import SdloraError

COMMANDS = {
    "train": "Learn a style from a folder of pictures.",
    "sample": "Draw pictures with one or several LoRAs.",
    "demo": "Train on the pictures that come with sdlora and draw a before/after grid.",
    "inspect": "Show what a LoRA file holds and what other programs will make of it.",
    "lora": "Check, convert, merge, resize, extract and install LoRA files.",
    "defaults": "Print every setting with its default, as a TOML file to start from.",
    "doctor": "Show versions and devices, and try out what this machine can do.",
    "report": "Pack the environment, and a run's settings and log, into a zip to show to somebody.",
}


@click.command(
    cls=LazyGroup,
    table={name: (name, text) for name, text in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__)
def cli() -> None:
    """Teach Stable Diffusion a style: a folder of pictures becomes a LoRA file that every program loads.

    \b
    sdlora demo                                        try it, without a GPU or a download
    sdlora train --images ./style_dir --rank 16        learn a style
    sdlora sample --lora style.safetensors "a castle"  draw with it

    --debug behind any command shows the whole traceback of an error.
    """  # noqa: D301 (click wants the character itself, which keeps the lines below it as they are)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; exits with 0, with 2 for an error the user can fix, with 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    keep_freed_memory()
    _quiet_libraries()
    _print_anything()
    try:
        code = cli.main(arguments, prog_name="sdlora", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except SdloraError as error:
        if debug:
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    if isinstance(code, int):  # click returns what `ctx.exit` was given
        sys.exit(code)


def _print_anything() -> None:
    """Lets the terminal show as an escape what it has no letter for, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    """Keeps progress bars and advice of the libraries off the terminal; their errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
