"""`sdlora defaults`."""

from __future__ import annotations

import click

from sdlora.config import Config
from sdlora.config_io import to_toml


@click.command("defaults")
def command() -> None:
    """Print every setting with its default, as a TOML file to start from."""
    click.echo("# Settings of sdlora. Use: sdlora train --config THIS_FILE --images FOLDER\n")
    click.echo(to_toml(Config(), comments=True), nl=False)
