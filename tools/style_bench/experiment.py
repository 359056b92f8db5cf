"""What a bench run is made of, and the names under which finished work is found again."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sdlora
from sdlora.atomic import write_text
from sdlora.config import Config, DataSection
from sdlora.data.cache import Cache
from sdlora.families import Base
from tools.style_bench.pictures import EmojiPictures
from tools.style_bench.protocol import Task, make_task
from tools.style_bench.references import Tuning

VERSION = 1
"""Raise it when the bench itself draws or learns differently; finished cells are then not found any more."""
CODE = ("adapters", "diffusion", "families", "data/captions.py", "data/dataset.py", "data/buckets.py", "data/image.py")
CODE += tuple(f"training/{name}.py" for name in ("lr", "optimizers", "plan", "setup", "step", "texts", "train"))
CODE += ("sampling/pipeline.py", "sampling/samplers.py")
"""The parts of sdlora that decide what is learned and drawn."""


@dataclass(frozen=True)
class Experiment:
    """The settings of a bench run.

    Attributes:
        pictures: the data set.
        base: the base model.
        config: settings of the LoRA.
        images: N, pictures to learn from.
        half: which half of the prompts is drawn.
        num_prompts: at most so many prompts.
        num_seeds: pictures of each.
        full: how the full fine-tuning on the same pictures is done.
        oracle: how that on all pictures is done.
        work: folder of finished cells.
    """

    pictures: EmojiPictures
    base: Base
    config: Config
    images: int
    half: str
    num_prompts: int
    num_seeds: int
    full: Tuning
    oracle: Tuning
    work: Path

    def task(self, style: str, subset: int) -> Task:
        """Chooses prompts and pictures, see `make_task`."""
        return make_task(
            self.pictures.concepts,
            self.pictures.has,
            style,
            subset,
            images=self.images,
            half=self.half,
            prompts=self.num_prompts,
            seeds=self.num_seeds,
        )

    @cached_property
    def plain_config(self) -> Config:
        """The settings that the references and the held-out loss share with the LoRA: how captions are made."""
        data = self.config.data
        captions = ("trigger", "trigger_place", "caption_prefix", "caption_suffix", "caption_dropout")
        kept = (*captions, "resolution", "cache_dir")
        plain = DataSection(**{name: getattr(data, name) for name in kept})
        return Config(base=self.config.base, data=plain)

    def learning_settings(self) -> dict[str, Any]:
        """Returns the settings that decide what a LoRA learns: all but places, threads and samples."""
        values = self.config.model_dump(mode="json", exclude={"samples", "output"})
        del values["data"]["images"], values["data"]["cache_dir"], values["train"]["threads"]
        return {**values, "save_dtype": self.config.output.save_dtype}

    @cached_property
    def digest(self) -> str:
        """Hash of what every cell depends on: the base's files, the data set, sdlora's code, the bench's version."""
        base = Cache.key(self.config.base.model_dump(mode="json", exclude={"model"}), folder_digest(self.base.path))
        return Cache.key(VERSION, base, self.pictures.digest, code_digest())


def folder_digest(folder: Path) -> str:
    """Returns a hash of the names and contents of all files below a folder; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".txt")):
        digest.update(
            f"{file.relative_to(folder).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def code_digest(root: Path = Path(sdlora.__file__).parent, names: Sequence[str] = CODE) -> str:
    """Returns a hash of code, comments and docstrings left out: to reword them changes nothing.

    Args:
        root: folder.
        names: files and folders in it.
    """
    files = [file for name in names for file in (sorted((root / name).glob("*.py")) or [root / name])]
    return Cache.key([_meaning(file.read_text(encoding="utf-8")) for file in files])


def _meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def write_json(path: Path, values: Any) -> None:
    """Writes JSON in one piece; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(values), indent=1) + "\n")


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
