"""`sdlora lora merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdlora.cli.lora_files import chosen_dtype, dtype_option, megabytes, read_weighed
from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from sdlora.files.merge import Weighed


@click.command("merge")
@click.argument("loras", nargs=-1, required=True, metavar="LORA[:STRENGTH]...")
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="What to write: a file, or a folder."
)
@click.option("--into", "base", metavar="BASE", help="Put them into this checkpoint: a file or a diffusers folder.")
@click.option("--rank", type=click.IntRange(1), help="Cut the sum to this rank. Default: ranks add up.")
@dtype_option("that of the LoRAs")
def command(loras: tuple[str, ...], out: Path, base: str | None, rank: int | None, dtype: str | None) -> None:
    """Make one LoRA of several, or put LoRAs into a checkpoint for good.

    \b
    sdlora lora merge one.safetensors:0.8 two.safetensors:0.5 -o both.safetensors
    sdlora lora merge style.safetensors --into model.safetensors -o model-style.safetensors

    The result at strength 1 does what the LoRAs do together, each at its strength. A checkpoint is read and written
    tensor by tensor, so it may be larger than the memory; it keeps its number formats.
    """  # noqa: D301 - click needs the real \b
    for option, value in (("--rank", rank), ("--dtype", dtype)):
        if base is not None and value is not None:
            raise ConfigError(
                f"{option} {value} has no effect with --into, for a checkpoint stays as it is; leave it out"
            )
    sources = read_weighed(loras)
    if base is not None:
        _bake(sources, base, out)
    else:
        _merge(sources, out, rank, dtype)


def _merge(sources: Sequence[Weighed], out: Path, rank: int | None, dtype: str | None) -> None:
    from sdlora.files.derived import merged_metadata
    from sdlora.files.kohya import write_modules
    from sdlora.files.merge import common_dtype, merge
    from sdlora.files.places import DTYPE_WORDS
    from sdlora.files.resize import resize, span, summary
    from sdlora.files.svd import by_rank
    from sdlora.files.target import require_file_target
    from sdlora.files.webui import printable

    if len(sources) == 1 and sources[0].strength == 1 and rank is None:
        raise ConfigError("one LoRA at strength 1 is already merged; give several, or --into a checkpoint")
    require_file_target(out, [source.lora.path for source in sources])
    number_format = chosen_dtype(dtype) if dtype else common_dtype([source.lora for source in sources])
    modules = merge(sources, number_format)
    kept = "nothing is lost but rounding"
    if rank is not None:
        resized = resize(modules, by_rank(rank), number_format)
        modules, kept = resized.modules, summary(resized.cuts)
    write_modules(out, modules, merged_metadata(sources, modules, out.stem), number_format)
    for source in sources:
        click.echo(f"LoRA: {printable(str(source.lora.path))} at strength {source.strength:g}")
    ranks = span([weights.rank for weights in modules.values()])
    click.echo(f"Merged: {len(modules)} modules, rank {ranks}; {kept}")
    click.echo(f"{out}  ({megabytes(out)}, {DTYPE_WORDS[number_format]})")


def _bake(sources: Sequence[Weighed], base: str, out: Path) -> None:
    from sdlora.families import resolve_base
    from sdlora.files.bake import bake
    from sdlora.files.webui import printable

    found = resolve_base(base, announce=click.echo)
    baked = bake(found.path, sources, out)
    for source in sources:
        click.echo(f"LoRA: {printable(str(source.lora.path))} at strength {source.strength:g}")
    click.echo(f"Into: {printable(found.name)} ({baked.family.title}), {baked.num_weights} weights changed")
    for note in baked.notes:
        click.echo(f"Note: {printable(note)}")
    click.echo(f"{out}  ({baked.num_bytes / 1e6:.2f} MB)")
