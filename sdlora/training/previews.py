"""Pictures drawn while training: the same prompts and seeds without and with the LoRA, side by side.

The LoRA's pictures are drawn with the values of the exported file, not with those in memory, so that a preview shows
what the user's program will show. As in most programs, the LoRA is merged into the weights for that: it takes no time
then, and a picture differs by rounding from that of a program which keeps the LoRA beside them.

What is drawn on the way may be decoded by TAESD, for a quick look; what stays at the end is by the base's own VAE.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from sdlora import __version__
from sdlora.adapters import Lora, merged, strength
from sdlora.allocator import return_freed_memory
from sdlora.atomic import replacing
from sdlora.config import Config
from sdlora.data.captions import compose_for
from sdlora.data.folder import Example
from sdlora.diffusion.noise import generator
from sdlora.errors import DatasetError, DiskFullError, ModelError
from sdlora.families import Parts
from sdlora.files.certify import file_values
from sdlora.files.kohya import LoraFile, read_lora
from sdlora.sampling.decode import TAESD, decode, quick_vae
from sdlora.sampling.grid import grid
from sdlora.sampling.infotext import decoder_of, parameters, png_info, same_but_for_loras, stored_text
from sdlora.sampling.pipeline import draw_latents
from sdlora.sampling.prompts import Prompt, parse_prompt, read_prompts, resolve
from sdlora.sampling.room import room_for_merging
from sdlora.sampling.samplers import sampler_name
from sdlora.sampling.texts import EncodedTexts, encode_texts, prompt_chunks
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
        vae: what decodes all rounds but the last: `taesd`, where there is one for the base, or `full`.
        seconds: how long the last round took; goes into the estimate of the time left.
        stopped: asked before every step; once it says so, the round is given up.
    """

    parts: Parts
    adapters: Mapping[str, Mapping[str, Lora]]
    prompts: Sequence[Prompt]
    folder: Path
    clip_skip: int = 1
    vae: str = "full"
    seconds: float = 0.0
    stopped: Callable[[], bool] = bool  # bool() is False
    _texts: EncodedTexts = field(default_factory=dict)
    _quick: nn.Module | None = None
    _base: list[Image.Image] = field(default_factory=list)
    _base_latents: list[Tensor] = field(default_factory=list)
    _last: dict[str, list[Image.Image]] = field(default_factory=dict)

    def encode(self) -> None:
        """Encodes the prompts. After that the text encoders are not asked again, unless they carry adapters."""
        for prompt in self.prompts if self._texts_stay else ():
            chunks = prompt_chunks(self.parts, prompt)
            encode_texts(self.parts, [prompt.text, prompt.negative], self.clip_skip, chunks, self._texts)

    def without(self, reporter: Reporter) -> list[Image.Image]:
        """Returns the pictures of the base alone, drawn once a run."""
        if not self._base:
            quick = self._quick_vae(reporter)
            files = self._files("base")
            if self._shows_these_prompts(files) and all(decoder_of(stored_text(f)) == _name(quick) for f in files):
                self._base = [_open(file) for file in files]
            else:
                self._base = self._save("base", self._latents_without(reporter), quick)
        return self._base

    def with_lora(self, file: Path, epoch: int, reporter: Reporter, *, final: bool = False) -> list[Image.Image]:
        """Draws with an exported LoRA file and writes the grid `epoch-NNNNNN.png`: base, LoRA.

        Args:
            file: the LoRA file, as just exported from the adapters.
            epoch: epochs done.
            reporter: told about the progress.
            final: whether these are the pictures that stay, decoded by the base's own VAE.

        Returns:
            The pictures, none if the round was given up or did not fit into the memory.
        """
        try:
            base = self.without(reporter)
            started = time.monotonic()
            lora = read_lora(file)
            with file_values(self.adapters, lora, self.parts.family):
                latents = self._draw("samples", reporter)
            name, quick = f"epoch-{epoch:06d}", self._quick_vae(reporter)
            if final and quick is not None:
                # The overview compares epochs, so it shows this one as it shows the others.
                self._last = {name: decode(self.parts, latents, self.prompts, quick)}
                base, quick = self._save("base", self._latents_without(reporter), None), None
            images = self._save(name, latents, quick, (lora,))
            self._save_grid(self.grid_path(epoch), [base, images], ["base", f"LoRA, epoch {epoch}"])
        except _GivenUp:
            reporter.end()
            return []
        except torch.OutOfMemoryError:
            reporter.end()
            reporter.warn(f"no samples after epoch {epoch}: out of memory; prompts with smaller --w and --h need less")
            return []
        except DiskFullError as error:  # pictures can be drawn again, from the LoRA file of the epoch
            reporter.end()
            reporter.warn(f"no samples after epoch {epoch}: {error}")
            return []
        self.seconds = time.monotonic() - started
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
            files = self._files(place.name)
            if self._shows_these_prompts(files):
                again, decoder = self._last.get(place.name), decoder_of(stored_text(files[0]))
                columns.append(again or [_open(file) for file in files])
                other = "" if again or decoder == _name(self._quick) else f"\n{decoder or 'full VAE'}"
                labels.append(f"epoch {int(place.name.removeprefix('epoch-'))}{other}")
        return self._save_grid(self.folder / "overview.png", columns, labels)

    @property
    def _texts_stay(self) -> bool:
        """Whether texts mean the same all along: no text encoder is adapted."""
        return not self.adapters.keys() & self.parts.text_encoders.keys()

    def _latents_without(self, reporter: Reporter) -> list[Tensor]:
        if not self._base_latents:
            everything = {f"{c}.{p}": a for c, by_path in self.adapters.items() for p, a in by_path.items()}
            with strength(everything, 0.0):
                self._base_latents = self._draw("samples (base)", reporter)
        return self._base_latents

    def _draw(self, stage: str, reporter: Reporter) -> list[Tensor]:
        def look() -> None:
            if self.stopped():
                raise _GivenUp

        def drawn(count: int) -> None:
            reporter.advance(units=count)
            look()

        started = time.monotonic()
        reporter.begin(stage, len(self.prompts))
        texts = self._texts if self._texts_stay else {}
        with self._merged():
            latents = draw_latents(
                self.parts, self.prompts, clip_skip=self.clip_skip, texts=texts, on_step=look, on_image=drawn
            )
        reporter.end()
        self.seconds = time.monotonic() - started
        return latents

    @contextmanager
    def _merged(self) -> Iterator[None]:
        # A round of 4 pictures takes 0.79 of the time (nano, one core, 21 pairs). Nothing is lost by it: in bf16
        # latents are 0.13 of the LoRA's effect away from those in fp32, against 0.18 with adapters; in fp16 0.015 both.
        with ExitStack() as stack:
            for component in self.adapters:
                stack.enter_context(merged(self.parts.components[component], room_for_merging(self.parts.device)))
            yield

    def _quick_vae(self, reporter: Reporter) -> nn.Module | None:
        """Returns TAESD, if it is wanted and there is one for the base."""
        if self.vae == "taesd" and self._quick is None:
            try:
                self._quick = quick_vae(self.parts)
            except ModelError as error:
                reporter.warn(f"samples are decoded by the base's own VAE: {error}")
            if self._quick is None:
                self.vae = "full"
        return self._quick

    def _files(self, name: str) -> list[Path]:
        return [self.folder / name / f"{i:02d}.png" for i in range(len(self.prompts))]

    def _save(
        self, name: str, latents: Sequence[Tensor], vae: nn.Module | None, loras: Sequence[LoraFile] = ()
    ) -> list[Image.Image]:
        """Decodes a round and writes its pictures."""
        images = decode(self.parts, latents, self.prompts, vae)
        return_freed_memory()  # a VAE takes more than a step
        for file, prompt, image in zip(self._files(name), self.prompts, images, strict=True):
            with replacing(file) as path:
                image.save(path, pnginfo=png_info(self._text(prompt, loras, _name(vae))))
        return images

    def _text(self, prompt: Prompt, loras: Sequence[LoraFile] = (), decoder: str | None = None) -> str:
        return parameters(
            prompt,
            base_name=self.parts.name,
            base_hash=None,
            loras=[(lora.path.stem, 1.0, lora.metadata.get("sshs_model_hash", "")) for lora in loras],
            clip_skip=self.clip_skip,
            version=__version__,
            decoder=decoder,
        )

    def _shows_these_prompts(self, files: Sequence[Path]) -> bool:
        """Tells whether stored pictures, LoRA aside, are of the present prompts: a resumed run may have others."""
        return all(
            file.exists() and same_but_for_loras(stored_text(file), self._text(prompt))
            for file, prompt in zip(files, self.prompts, strict=True)
        )

    def _save_grid(self, target: Path, columns: Sequence[Sequence[Image.Image]], labels: Sequence[str]) -> Path:
        rows = [list(row) for row in zip(*columns, strict=True)]
        sheet = grid(rows, row_labels=[p.text for p in self.prompts], column_labels=labels)
        with replacing(target) as path:
            sheet.save(path)
        return target


def _name(vae: nn.Module | None) -> str | None:
    return None if vae is None else TAESD


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def sample_prompts(config: Config, examples: Sequence[Example], resolution: int, cfg: float) -> list[Prompt]:
    """Returns the prompts of a run: those given, else two captions and two general subjects with the trigger word.

    Args:
        config: the settings.
        examples: the pictures that are learned from.
        resolution: side of a sample in pixels, unless a prompt says another.
        cfg: the base's own CFG scale, for want of a setting.

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
        prompts = [Prompt(text=as_trained(text, config)) for text in chosen]
    if not prompts:
        raise DatasetError("samples.sample_prompts is an empty list; give prompts, or samples.sample_every = 0")
    defaults = Prompt(
        text="",
        negative=settings.negative_prompt,
        width=resolution,
        height=resolution,
        cfg=settings.sample_cfg or cfg,
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


def as_trained(text: str, config: Config) -> str:
    """Returns a prompt as the captions are composed, trigger word and all, in one line."""
    whole = compose_for(config.data, text, rng=generator("prompt"))
    return re.sub(r"\s+", " ", whole)
