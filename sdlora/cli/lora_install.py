"""`sdlora lora install`: puts a LoRA where a program looks for it, and says how to call it there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sdlora.files.install import Installed
    from sdlora.files.kohya import LoraFile


@click.command("install")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--webui",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Folder of AUTOMATIC1111's WebUI, Forge or ComfyUI.",
)
@click.option("--force", is_flag=True, help="Replace other files of the same name.")
def command(file: Path, webui: Path, force: bool) -> None:
    """Copy a LoRA, its trigger word and its picture to where a WebUI looks for them."""
    from sdlora.files.install import call, install
    from sdlora.files.kohya import read_lora
    from sdlora.files.sidecars import activation_text
    from sdlora.files.webui import alias, printable

    lora = read_lora(file)  # a damaged file is not passed on
    trigger = activation_text(lora)
    done = install(file, webui, force)
    for verb, paths in (("Copied", done.written), ("Already there:", done.unchanged)):
        if paths:
            click.echo(f"{verb} {', '.join(printable(path.name) for path in paths)}")
    click.echo(f"  in {done.folder} ({done.program.name})")
    click.echo(printable(call(done, alias(lora.metadata, file.stem), file.stem, trigger)))
    for line in _warnings(lora, done):
        click.echo(f"Note: {printable(line, 400)}")


def _warnings(lora: LoraFile, done: Installed) -> list[str]:
    """Says what the program will not find in the file; nothing is converted."""
    from sdlora.container import open_container
    from sdlora.files.attach import looks_like
    from sdlora.files.loaders import LOADERS, contents_of, layout_for

    kind = looks_like(lora)
    if kind == "unknown":
        return [f"the file does not tell what model it is for, so it was not checked by {done.program.name}'s rules"]
    report = LOADERS[done.program.name](layout_for(kind), contents_of(open_container(lora.path)))
    return [*report.losses(), *(f"{done.program.name} {note}" for note in report.notes)]
