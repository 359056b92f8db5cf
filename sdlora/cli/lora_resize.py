"""`sdlora lora resize`."""

from __future__ import annotations

from pathlib import Path

import click

from sdlora.cli.lora_files import chosen_dtype, dtype_option, megabytes, read_aloud, the_rule


@click.command("resize")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--rank", type=click.IntRange(1), help="The rank of every module that has a higher one.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="As few directions as carry this share of the squared norm, module by module, e.g. 0.95.",
)
@click.option(
    "--ratio",
    type=click.FloatRange(1),
    help="Directions whose singular value is above the module's largest divided by this, e.g. 10.",
)
@dtype_option("that of IN")
def command(
    source: Path, out: Path, rank: int | None, energy: float | None, ratio: float | None, dtype: str | None
) -> None:
    """Cut a LoRA down to a smaller rank.

    \b
    sdlora lora resize style.safetensors small.safetensors --rank 8
    sdlora lora resize style.safetensors small.safetensors --energy 0.95

    Each module keeps the directions that carry most of its change. Alpha becomes the new rank, and what it scaled
    before goes into the factors: strength 1 stays strength 1.
    """  # noqa: D301 - click needs the real \b
    from sdlora.files.derived import resized_metadata
    from sdlora.files.kohya import write_modules
    from sdlora.files.merge import common_dtype
    from sdlora.files.places import DTYPE_WORDS
    from sdlora.files.resize import resize, span, summary
    from sdlora.files.target import require_file_target

    keep, words = the_rule({"rank": rank, "energy": energy, "ratio": ratio})
    require_file_target(out, [source])
    lora = read_aloud(source)
    number_format = chosen_dtype(dtype) if dtype else common_dtype([lora])
    resized = resize(lora.modules, keep, number_format)
    write_modules(out, resized.modules, resized_metadata(lora, resized.modules, words, out.stem), number_format)
    cuts = resized.cuts.values()
    before, after = span([cut.before for cut in cuts]), span([cut.after for cut in cuts])
    click.echo(f"Resized by {words}: rank {before} -> {after}; {summary(resized.cuts)}")
    untouched = sum(weights is lora.modules[name] for name, weights in resized.modules.items())
    if untouched < len(cuts):
        click.echo(f"Alpha: the new rank, in {len(cuts) - untouched} modules; their scale went into the factors")
    if untouched:
        click.echo(f"As it was: {untouched} of {len(cuts)} modules, of which nothing would be dropped")
    sizes = f"{megabytes(lora.path)} -> {megabytes(out)}" if lora.path.is_file() else megabytes(out)
    click.echo(f"{out}  ({sizes}, {DTYPE_WORDS[number_format]})")
