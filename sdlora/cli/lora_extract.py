"""`sdlora lora extract`."""

from __future__ import annotations

from pathlib import Path

import click

from sdlora.cli.lora_files import chosen_dtype, dtype_option, megabytes, the_rule

RANK = 32
"""Rank where none is given."""


@click.command("extract")
@click.option("--base", required=True, metavar="BASE", help="What the LoRA will be put on: a file or diffusers folder.")
@click.option("--tuned", required=True, metavar="TUNED", help="What was made of it: a file or a diffusers folder.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="The LoRA file to write.")
@click.option("--rank", type=click.IntRange(1), help=f"The rank of every module. Default: {RANK}.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Instead: as few directions as carry this share of the squared norm, module by module.",
)
@click.option("--text-encoder", is_flag=True, help="Take in what the text encoders learned.")
@dtype_option("fp16")
def command(
    base: str,
    tuned: str,
    out: Path,
    rank: int | None,
    energy: float | None,
    text_encoder: bool,
    dtype: str | None,
) -> None:
    """Take out of two checkpoints, as a LoRA, what one learned beyond the other.

    \b
    sdlora lora extract --base model.safetensors --tuned model-style.safetensors -o style.safetensors

    Layers are compared one by one, so the checkpoints may be larger than the memory. A layer that differs by no more
    than rounding is left out.
    """  # noqa: D301 - click needs the real \b
    from sdlora.families import resolve_base
    from sdlora.files.derived import extracted_metadata
    from sdlora.files.extract import extract
    from sdlora.files.kohya import write_modules
    from sdlora.files.resize import span, summary
    from sdlora.files.target import require_file_target
    from sdlora.files.webui import printable

    keep, words = the_rule({"rank": RANK if rank is None and energy is None else rank, "energy": energy})
    before, after = (resolve_base(model, announce=click.echo).path for model in (base, tuned))
    require_file_target(out, [before, after])
    number_format = chosen_dtype(dtype or "fp16")
    with click.progressbar(length=1, label="Comparing") as bar:

        def show(done: int, total: int) -> None:
            bar.length = total
            bar.update(1)

        start = rank or RANK
        found = extract(before, after, keep, number_format, start=start, text_encoder=text_encoder, progress=show)
    metadata = extracted_metadata(found.facts, before, after, found.modules, out.stem)
    write_modules(out, found.modules, metadata, number_format)
    ranks = span([weights.rank for weights in found.modules.values()])
    click.echo(f"Extracted by {words}: {len(found.modules)} modules of {found.family.title}, rank {ranks}")
    click.echo(f"Approximated: {summary(found.cuts)}")
    if found.unchanged:
        click.echo(f"Equal: {found.unchanged} layers differ by no more than rounding and are left out")
    for note in found.notes:
        click.echo(f"Note: {printable(note)}")
    click.echo(f"{out}  ({megabytes(out)}, {dtype or 'fp16'})")
