"""Pictures drawn while training: the same prompts and seeds without and with the LoRA, side by side.

The LoRA's pictures are drawn with the values of the exported file, not with those in memory, so that a preview shows
what the user's program will show.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from sdlora import __version__
from sdlora.adapters import Lora, strength
from sdlora.atomic import replacing
from sdlora.config import Config
from sdlora.data.captions import compose
from sdlora.data.folder import Example
from sdlora.diffusion.noise import generator
from sdlora.errors import DatasetError
from sdlora.families import Parts
from sdlora.files.certify import file_values
from sdlora.files.kohya import LoraFile, read_lora
from sdlora.sampling.grid import grid
from sdlora.sampling.infotext import parameters, parse_parameters, png_info
from sdlora.sampling.pipeline import draw
from sdlora.sampling.prompts import Prompt, parse_prompt, read_prompts, resolve
from sdlora.sampling.samplers import sampler_name
from sdlora.training.progress import Reporter

GENERAL_SUBJECTS = ("a castle", "a cat")
"""Drawn by default besides two captions: a style is learned when it reaches what was not in the pictures."""
MAX_COLUMNS = 6
"""Columns of the overview."""


class _GivenUp(Exception):
    """The user asked to stop while samples were drawn."""


@dataclass
class Previews:
    """Draws and keeps the samples of a run.

    Attributes:
        parts: the base, adapters in place.
        adapters: component -> path -> adapter.
        prompts: what is drawn, every option resolved.
        folder: where the pictures go: `base/`, `epoch-NNNNNN/`, and a grid for each.
        clip_skip: as in training.
        seconds: how long the last round took; goes into the estimate of the time left.
        stopped: asked after every picture; once it says so, the round is given up.
    """

    parts: Parts
    adapters: Mapping[str, Mapping[str, Lora]]
    prompts: Sequence[Prompt]
    folder: Path
    clip_skip: int = 1
    seconds: float = 0.0
    stopped: Callable[[], bool] = bool  # bool() is False
    _base: list[Image.Image] = field(default_factory=list)

    def without(self, reporter: Reporter) -> list[Image.Image]:
        """Returns the pictures of the base alone, drawn once a run."""
        if not self._base:
            files = [self.folder / "base" / f"{i:02d}.png" for i in range(len(self.prompts))]
            if self._shows_these_prompts(files):
                self._base = [_open(file) for file in files]
            else:
                everything = {f"{c}.{p}": a for c, by_path in self.adapters.items() for p, a in by_path.items()}
                with strength(everything, 0.0):
                    self._base = self._draw("base", (), reporter)
        return self._base

    def with_lora(self, file: Path, epoch: int, reporter: Reporter) -> list[Image.Image]:
        """Draws with an exported LoRA file and writes the grid `epoch-NNNNNN.png`: base, LoRA.

        Args:
            file: the LoRA file, as just exported from the adapters.
            epoch: epochs done.
            reporter: told about the progress.

        Returns:
            The pictures, none if the round was given up.
        """
        base = self.without(reporter)
        lora = read_lora(file)
        name = f"epoch-{epoch:06d}"
        try:
            with file_values(self.adapters, lora, self.parts.family):
                images = self._draw(name, (lora,), reporter)
        except _GivenUp:
            reporter.end()
            return []
        self._save_grid(self.grid_path(epoch), [base, images], ["base", f"LoRA, epoch {epoch}"])
        return images

    def grid_path(self, epoch: int) -> Path:
        """Where the grid of an epoch lies."""
        return self.folder / f"epoch-{epoch:06d}.png"

    def overview(self) -> Path | None:
        """Writes `overview.png`, the prompts over the epochs; returns its path, or `None` without samples."""
        folders = sorted(p for p in self.folder.glob("epoch-*") if p.is_dir())
        if not folders:
            return None
        shown = [folders[round(i * (len(folders) - 1) / (MAX_COLUMNS - 2))] for i in range(MAX_COLUMNS - 1)]
        shown = list(dict.fromkeys(shown if len(folders) >= MAX_COLUMNS else folders))
        columns, labels = [self._base], ["base"]
        for place in shown:
            files = [place / f"{i:02d}.png" for i in range(len(self.prompts))]
            if self._shows_these_prompts(files):
                columns.append([_open(file) for file in files])
                labels.append(f"epoch {int(place.name.removeprefix('epoch-'))}")
        return self._save_grid(self.folder / "overview.png", columns, labels)

    def _draw(self, name: str, loras: Sequence[LoraFile], reporter: Reporter) -> list[Image.Image]:
        started = time.monotonic()
        reporter.begin("samples (base)" if not loras else "samples", len(self.prompts))

        def drawn(count: int) -> None:
            reporter.advance(units=count)
            if loras and self.stopped():
                raise _GivenUp

        images = draw(self.parts, self.prompts, clip_skip=self.clip_skip, on_image=drawn)
        reporter.end()
        for i, (prompt, image) in enumerate(zip(self.prompts, images, strict=True)):
            with replacing(self.folder / name / f"{i:02d}.png") as path:
                image.save(path, pnginfo=png_info(self._text(prompt, loras)))
        self.seconds = time.monotonic() - started
        return images

    def _text(self, prompt: Prompt, loras: Sequence[LoraFile] = ()) -> str:
        return parameters(
            prompt,
            base_name=self.parts.name,
            base_hash=None,
            loras=[(lora.path.stem, 1.0, lora.metadata.get("sshs_model_hash", "")) for lora in loras],
            clip_skip=self.clip_skip,
            version=__version__,
        )

    def _shows_these_prompts(self, files: Sequence[Path]) -> bool:
        """Tells whether stored pictures, LoRA aside, are of the present prompts: a resumed run may have others."""
        return all(
            file.exists() and _without_lora(_stored_text(file)) == _without_lora(self._text(prompt))
            for file, prompt in zip(files, self.prompts, strict=True)
        )

    def _save_grid(self, target: Path, columns: Sequence[Sequence[Image.Image]], labels: Sequence[str]) -> Path:
        rows = [list(row) for row in zip(*columns, strict=True)]
        sheet = grid(rows, row_labels=[p.text for p in self.prompts], column_labels=labels)
        with replacing(target) as path:
            sheet.save(path)
        return target


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _stored_text(path: Path) -> str:
    with Image.open(path) as image:
        return str(image.info.get("parameters", ""))


def _without_lora(text: str) -> tuple[str, str, dict[str, str]]:
    prompt, negative, fields = parse_parameters(text)
    return prompt.split(" <lora:")[0], negative, {k: v for k, v in fields.items() if k != "Lora hashes"}


def sample_prompts(config: Config, examples: Sequence[Example], resolution: int) -> list[Prompt]:
    """Returns the prompts of a run: those given, else two captions and two general subjects with the trigger word.

    Raises:
        ConfigError: for an option in a prompt that does not exist.
        DatasetError: if the list of prompts is empty.
    """
    settings = config.samples
    if isinstance(settings.sample_prompts, list):
        prompts = [parse_prompt(line) for line in settings.sample_prompts]
    elif settings.sample_prompts is not None:
        prompts = read_prompts(settings.sample_prompts)
    else:
        captions = [e.caption for e in examples if e.caption]
        chosen = dict.fromkeys([*captions[:1], *captions[len(captions) // 2 :][:1], *GENERAL_SUBJECTS])
        # Not through parse_prompt: a caption may hold " --".
        prompts = [Prompt(text=_as_trained(text, config)) for text in chosen]
    if not prompts:
        raise DatasetError("samples.sample_prompts is an empty list; give prompts, or samples.sample_every = 0")
    defaults = Prompt(
        text="",
        negative=settings.negative_prompt,
        width=resolution,
        height=resolution,
        cfg=settings.sample_cfg,
        steps=settings.sample_steps,
        sampler=settings.sampler,
    )
    resolved = [resolve(prompt, defaults) for prompt in prompts]
    for prompt in resolved:
        sampler_name(prompt.sampler or "")  # an unknown one is an error now, not after the first epoch
    return [
        prompt if prompt.seed is not None else replace(prompt, seed=settings.sample_seed + i)
        for i, prompt in enumerate(resolved)
    ]


def _as_trained(text: str, config: Config) -> str:
    data = config.data
    whole = compose(
        text, trigger=data.trigger, prefix=data.caption_prefix, suffix=data.caption_suffix, rng=generator("prompt")
    )
    return re.sub(r"\s+", " ", whole)
