"""`sdlora lora check`: what five programs will make of a LoRA file, before any of them is asked.

Their rules see the file's raw keys. The file is also read as sdlora reads it, so that damage is found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sdlora.container import Container

SHOWN = 3
"""How many keys, or modules, of a kind are named."""


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--base", help="The base it is for: an alias, a folder, a file or a hub id; by default told by the file.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.pass_context
def command(ctx: click.Context, file: Path, base: str | None, as_json: bool) -> None:
    """Show which keys of a LoRA file each program will use, and as what it will list it.

    Exits with 1 if some program would lose a part of it.
    """
    from sdlora.container import open_container
    from sdlora.errors import LoraFileError
    from sdlora.families import load_parts, resolve_base
    from sdlora.files.attach import looks_like
    from sdlora.files.convert import would_load
    from sdlora.files.kohya import read_lora
    from sdlora.files.loaders import certificate, layout_for, layout_of

    container = open_container(file)
    lora, notes, problem = None, (), None
    try:
        lora = read_lora(file)
        kind, notes = looks_like(lora), lora.notes
    except LoraFileError as error:
        kind, problem = _kind(container), error  # said at the end: what the programs make of it may tell more
    if base is not None:
        layout = layout_of(load_parts(resolve_base(base, lambda line: click.echo(line, err=True))))
    elif kind == "unknown":
        raise problem or LoraFileError(f"{file} does not tell what model it is for; name that with --base")
    else:
        layout = layout_for(kind)
    found = certificate(file, layout)
    found["notes"] += notes
    if lora is not None and found["losses"] and would_load(lora, layout):
        found["notes"].append(
            f"`sdlora lora convert {file} NEW.safetensors` makes a file of it that all of them load whole"
        )
    click.echo(json.dumps(found, indent=2) if as_json else plain(found))
    if problem is not None:
        raise problem
    ctx.exit(1 if found["losses"] else 0)


def _kind(container: Container) -> str:
    """Tells what a file is for that sdlora cannot read, by the names and widths that are there."""
    from sdlora.files.canonical import made_for
    from sdlora.files.formats import DOWN

    entries = container.entries
    return made_for({k.removesuffix(DOWN): e.shape for k, e in entries.items() if k.endswith(DOWN)}, container.metadata)


def plain(found: dict[str, Any]) -> str:
    """Returns a certificate as a table, and below it what is to be said of each program."""
    base = f"{found['base']['title']}, text width {found['base']['text_width']}"
    lines = [_safe(f"{found['file']}: {found['keys']} keys, held against {base}"), ""]
    rows = [("Program", "Version", "Used", "Left", "Listed as", "Verdict")]
    rows += [
        (
            p["program"],
            p["version"].split(" ")[0],
            str(p["consumed"]),
            str(len(p["left"])),
            p["class"] or "-",
            p["verdict"],
        )
        for p in found["programs"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for program in found["programs"]:
        lines += _details(program)
    if found["notes"]:
        lines += ["", "Notes", *(f"  {_safe(note)}" for note in found["notes"])]
    return "\n".join(lines)


def _details(program: dict[str, Any]) -> list[str]:
    lines = [f"  {_safe(note)}" for note in program["notes"]]
    for what, items in (
        ("no place for", program["left"]),
        ("does not fit", program["misfits"]),
        ("wrong strength", program["misscaled"]),
    ):
        lines += [f"  {what}: {_safe(item)}" for item in items[:SHOWN]]
        if len(items) > SHOWN:
            lines.append(f"  {what}: and {len(items) - SHOWN} more, which --json lists")
    return ["", program["program"], *lines] if lines else []


def _safe(text: str) -> str:
    from sdlora.files.webui import printable

    return printable(text)
