"""`sdlora sample`: pictures from prompts and LoRA files. What can be wrong is checked before a model loads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdlora import __version__
from sdlora.cli.lora_files import read_weighed
from sdlora.cli.startup import import_models
from sdlora.config import SamplesSection
from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from sdlora.families import Base, Parts
    from sdlora.files.kohya import LoraFile
    from sdlora.files.merge import Weighed
    from sdlora.sampling.prompts import Prompt

_DEFAULTS = SamplesSection()
_SEEDS = 2**32


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:STRENGTH]", help="LoRA file, repeatable. None: the base alone."
)
@click.option(
    "--base",
    help="auto, nano, sd15, sdxl, a .safetensors file, a diffusers folder or a hub id. Default: what the LoRA was "
    "trained on.",
)
@click.option("--revision", help="Branch, tag or commit of a base on the hub.")
@click.option("--allow-pickle", is_flag=True, help="Convert a .ckpt base first; only for files that you trust.")
@click.option("--vae", help="VAE to use instead of the base's: a file, a folder, or taesd (small and fast).")
@click.option("--text-encoders", help="Text encoders to use instead of the base's: a folder, or a file with them.")
@click.option(
    "--prompts", "file", type=click.Path(path_type=Path), help="File of prompts, one a line; kohya's options."
)
@click.option("--negative", default=_DEFAULTS.negative_prompt, help="What the pictures should not show.")
@click.option("--width", type=click.IntRange(64, 4096), help="In pixels, a multiple of 8. Default: the base's own.")
@click.option("--height", type=click.IntRange(64, 4096), help="In pixels, a multiple of 8. Default: the base's own.")
@click.option(
    "--steps", type=click.IntRange(1, 1000), default=_DEFAULTS.sample_steps, show_default=True, help="Denoising steps."
)
@click.option(
    "--cfg",
    type=click.FloatRange(1, 50),
    help="CFG scale: how strictly the prompt is followed. Default: 5, with nano 1.5.",
)
@click.option("--sampler", default=_DEFAULTS.sampler, show_default=True, help="Sampler, named as in the WebUI.")
@click.option(
    "--seed",
    type=click.IntRange(-1, _SEEDS - 1),
    default=1,
    show_default=True,
    help="Seed of each prompt's first picture; -1: random.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Pictures for each prompt, seeds counting up.",
)
@click.option(
    "--batch-size", type=click.IntRange(1, 256), help="Pictures drawn at once, for more memory. Default: by their size."
)
@click.option(
    "--clip-skip",
    type=click.IntRange(1, 12),
    help="Text encoder layer, from the end. Default: as the LoRA was trained.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp16", "bf16", "fp32"]),
    default="auto",
    show_default=True,
    help="Arithmetic; the VAE is always fp32. fp32 helps where fp16 overflows.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("outputs"),
    show_default=True,
    help="Folder for the pictures.",
)
def command(
    prompts: tuple[str, ...],
    loras: tuple[str, ...],
    base: str | None,
    revision: str | None,
    allow_pickle: bool,
    vae: str | None,
    text_encoders: str | None,
    file: Path | None,
    negative: str,
    width: int | None,
    height: int | None,
    steps: int,
    cfg: float | None,
    sampler: str,
    seed: int,
    count: int,
    batch_size: int | None,
    clip_skip: int | None,
    precision: str,
    output: Path,
) -> None:
    """Draw pictures with one or several LoRAs.

    \b
    sdlora sample --lora style.safetensors "a castle"
    sdlora sample --lora style.safetensors:0.8 --count 4 "a castle --w 512 --h 768 --n blurry"

    A prompt may carry options of its own: --w --h (size), --d (seed), --l (CFG), --s (steps), --n (negative), --ss
    (sampler).
    """  # noqa: D301 - click needs the real \b
    import_models()
    from sdlora.families import native_cfg
    from sdlora.families.text import clip_skip_notes
    from sdlora.sampling.prompts import Prompt, parse_prompt, read_prompts, resolve
    from sdlora.sampling.samplers import sampler_name

    asked = [*map(parse_prompt, prompts), *(read_prompts(file) if file else [])]
    if not asked:
        raise ConfigError('nothing to draw; give a prompt, as in `sdlora sample "a castle"`, or --prompts FILE')
    for name, side in (("width", width), ("height", height)):
        if side is not None and side % 8:
            raise ConfigError(f"--{name} must be a multiple of 8, got {side}; {side // 8 * 8} would do")
    defaults = Prompt("", negative, width, height, _first_seed(seed), cfg, steps, sampler_name(sampler))
    used = read_weighed(loras)
    chosen = _choose_base(base, [u.lora for u in used], revision, allow_pickle)
    parts = _load(chosen, used, precision, {"vae": vae, "text_encoders": text_encoders})
    width, height = _size(parts, width, height)
    defaults = replace(defaults, width=width, height=height, cfg=cfg or native_cfg(chosen.path))
    wanted = [resolve(p, defaults) for p in asked]
    wanted = [replace(p, seed=((p.seed or 0) + i) % _SEEDS) for p in wanted for i in range(count)]
    skip = _clip_skip(clip_skip, used)
    for note in clip_skip_notes(parts, clip_skip or 1):  # a LoRA that was trained with it asks for nothing odd
        click.echo(f"Note: {note}")
    _print_notes(asked, used)
    pictures = _draw_and_save(parts, wanted, used, skip, batch_size, output)
    if len(pictures) > 1:
        path = _save_grid(pictures, wanted, count, output)
        click.echo(str(path))


def _first_seed(seed: int) -> int:
    import secrets

    return secrets.randbelow(_SEEDS) if seed == -1 else seed


def _size(parts: Parts, width: int | None, height: int | None) -> tuple[int, int]:
    from sdlora.sampling.pipeline import defaults_for

    own = defaults_for(parts)
    return width or own[0], height or own[1]


def _choose_base(wanted: str | None, loras: Sequence[LoraFile], revision: str | None, allow_pickle: bool) -> Base:
    """Finds the base: what the user says, else what the first LoRA was trained on. Prints which, and why."""
    from sdlora.data.cache import default_folder
    from sdlora.families import resolve_base
    from sdlora.files.webui import printable
    from sdlora.sampling.origin import named_bases, trained_base

    if not loras:
        click.echo("No --lora given: drawing with the base alone.")
    if wanted is None and (revision or allow_pickle):
        raise ConfigError("--revision and --allow-pickle say how --base is read, and no --base is given")
    if wanted is not None or not loras:
        base = resolve_base(
            wanted or "auto", click.echo, revision, allow_pickle=allow_pickle, cache_dir=default_folder()
        )
        reason = f"--base; {base.reason}" if wanted else base.reason
    else:
        base, where = trained_base(loras[0], announce=click.echo)
        reason = f"{where}; {base.reason}"
        others = {name for lora in loras[1:] for _, name in named_bases(lora)[:1]} - {base.name}
        if others:
            names = ", ".join(sorted(map(printable, others)))
            click.echo(f"Note: other LoRAs name another base ({names}); the first LoRA decides. --base overrides.")
    click.echo(f"Base: {printable(base.name)} ({reason})")
    return base


def _load(base: Base, used: Sequence[Weighed], precision: str, replaced: dict[str, str | None]) -> Parts:
    from sdlora.adapters import merge
    from sdlora.families import load_parts
    from sdlora.files.attach import attach
    from sdlora.files.webui import printable
    from sdlora.sampling.origin import trained_schedule
    from sdlora.training.device import choose_threads
    from sdlora.training.precision import choose_device, choose_precision, inference_dtype

    device = choose_device()
    dtype = inference_dtype(device) if precision == "auto" else choose_precision(precision, device).dtype
    forced: dict[str, Any] = next((found for u in used if (found := trained_schedule(u.lora))), {})
    for setting, value in forced.items():
        click.echo(f"{setting.replace('_', ' ').capitalize()}: {value} (training was told so)")
    parts = load_parts(base, **replaced, **forced)
    for note in parts.notes:
        click.echo(f"Note: {printable(note)}")
    parts.to(device, dtype)
    choose_threads(parts)
    for u in used:
        attach(parts, u.lora, u.strength)
        click.echo(f"LoRA: {printable(str(u.lora.path))} at strength {u.strength:g}")
    for component in parts.components.values():
        merge(component)  # so that LoRAs cost no time; they stay to the end
    return parts


def _clip_skip(wanted: int | None, used: Sequence[Weighed]) -> int:
    from sdlora.files.webui import printable
    from sdlora.sampling.origin import trained_clip_skip

    if wanted is not None or not used:
        return wanted or 1
    skip = trained_clip_skip(used[0].lora)
    if skip != 1:
        click.echo(f"Clip skip: {skip} ({printable(used[0].lora.path.name)} was trained with it)")
    others = [u.lora.path.name for u in used[1:] if trained_clip_skip(u.lora) != skip]
    if others:
        click.echo(
            f"Note: {printable(', '.join(others))} had another clip skip; the first LoRA decides, --clip-skip overrides"
        )
    return skip


def _print_notes(asked: Sequence[Prompt], used: Sequence[Weighed]) -> None:
    from sdlora.files.sidecars import activation_text
    from sdlora.files.webui import printable

    for note in dict.fromkeys(n for p in asked for n in p.notes):
        click.echo(f"Note: {note}")
    for u in used:
        word = activation_text(u.lora)
        lacking = [p for p in asked if word.lower() not in p.text.lower()]
        if word and lacking and u.strength:
            which = "the prompt lacks" if len(asked) == 1 else f"{len(lacking)} of {len(asked)} prompts lack"
            click.echo(f"Hint: {printable(u.lora.path.name)} is called by {printable(word)!r}, which {which}.")


def _draw_and_save(
    parts: Parts, prompts: Sequence[Prompt], used: Sequence[Weighed], skip: int, batch_size: int | None, folder: Path
) -> list[Image.Image]:
    """Draws batch after batch and saves each at once, so that an interruption loses little."""
    from sdlora.atomic import replacing
    from sdlora.sampling.infotext import parameters, png_info
    from sdlora.sampling.pipeline import draw
    from sdlora.sampling.room import pictures_at_once

    loras = [(u.lora.path.stem, u.strength, u.lora.metadata.get("sshs_model_hash") or u.lora.model_hash) for u in used]
    number = _last_number(folder, r"(\d{5,})-\d+\.png")
    pictures, texts = [], {}
    together = batch_size or max(pictures_at_once(parts, prompt) for prompt in prompts)
    for start in range(0, len(prompts), together):
        batch = prompts[start : start + together]
        drawn = draw(parts, batch, clip_skip=skip, batch_size=batch_size, texts=texts)
        for prompt, picture in zip(batch, drawn, strict=True):
            number += 1
            text = parameters(
                prompt, base_name=parts.name, base_hash=None, loras=loras, clip_skip=skip, version=__version__
            )
            path = folder / f"{number:05d}-{prompt.seed}.png"
            with replacing(path) as temporary:
                picture.save(temporary, pnginfo=png_info(text))
            click.echo(str(path))
            pictures.append(picture)
    return pictures


def _save_grid(pictures: Sequence[Image.Image], prompts: Sequence[Prompt], count: int, folder: Path) -> Path:
    from sdlora.atomic import replacing
    from sdlora.sampling.grid import grid

    rows = [list(pictures[i : i + count]) for i in range(0, len(pictures), count)]
    labels = [p.text for p in prompts[::count]]
    firsts = [p.seed for p in prompts[::count]]
    # Columns share a seed only if no prompt brought its own.
    columns = [f"seed {p.seed}" if len(set(firsts)) == 1 else "" for p in prompts[:count]]
    number = _last_number(folder, r"grid-(\d{5,})\.png") + 1
    path = folder / f"grid-{number:05d}.png"
    with replacing(path) as temporary:
        grid(rows, row_labels=labels, column_labels=columns).save(temporary)
    return path


def _last_number(folder: Path, pattern: str) -> int:
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return max((int(match[1]) for name in names if (match := re.fullmatch(pattern, name))), default=0)
