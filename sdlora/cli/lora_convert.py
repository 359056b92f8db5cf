"""`sdlora lora convert`: a LoRA file of any program becomes one for any other."""

from __future__ import annotations

from pathlib import Path

import click

from sdlora.cli.lora_files import dtype_option, megabytes, read_aloud

WAYS = ("kohya", "diffusers", "peft")


@click.command("convert")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", "way", type=click.Choice(WAYS), help="Format. Default: kohya for a file, diffusers for a folder.")
@dtype_option("that of the LoRA")
def command(source: Path, out: Path, way: str | None, dtype: str | None) -> None:
    """Write a LoRA in the format of another program.

    \b
    IN   a file of kohya, diffusers, peft, cloneofsimo or ComfyUI, or a folder that diffusers or peft saved
    OUT  NAME.safetensors, or a folder; kohya has only files, peft only folders

    \b
    sdlora lora convert pytorch_lora_weights.safetensors style.safetensors   for WebUIs
    sdlora lora convert style.safetensors style                              for diffusers
    sdlora lora convert style.safetensors style --to peft                    for peft
    """  # noqa: D301 - click needs the real \b
    from sdlora.files.attach import NAMES, looks_like
    from sdlora.files.convert import convert
    from sdlora.files.webui import printable
    from sdlora.training.device import DTYPES

    lora = read_aloud(source)
    click.echo(
        f"Read {printable(str(lora.path))}: {lora.format}, {len(lora.modules)} modules, for {NAMES[looks_like(lora)]}"
    )
    way = way or ("kohya" if out.suffix.lower() == ".safetensors" else "diffusers")
    for path in convert(lora, out, way, DTYPES[dtype] if dtype else None):
        click.echo(f"Wrote {printable(str(path))} ({way}, {megabytes(path)})")
