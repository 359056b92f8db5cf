"""Tensors kept between runs, named by the hash of everything they depend on, so that nothing stale can be found.

There is nothing to clear after a picture was edited or a setting changed: the name is another one. The folder is the
user's cache folder, never the one with the pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from sdlora.atomic import replacing
from sdlora.errors import ConfigError, TrainingError


class Cache:
    """A folder of small safetensors files.

    Args:
        folder: where; `None` takes the environment variable SDLORA_CACHE, else `sdlora` in the user's cache folder.

    Attributes:
        folder: where.
        problem: why nothing more is being kept, or `None`. Training goes on without, so this is for a warning.

    Raises:
        ConfigError: if no folder is given and the user has no home.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder.expanduser() if folder else default_folder()
        self.problem: str | None = None

    @staticmethod
    def key(*parts: Any) -> str:
        """Names what depends on `parts` (texts, numbers, lists of them): a SHA-256, in hex."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def path(self, key: str) -> Path:
        """Returns where an entry lies or would lie."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Returns an entry, on the CPU, or `None` if there is none or it is damaged."""
        try:
            content = self.path(key).read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            tensors = load(content)
            intact = header["__metadata__"]["content"] == content_hash(tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        return tensors if intact else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors. If that fails, `problem` says why, and nothing more is tried."""
        if self.problem:
            return
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(stored, {"content": content_hash(stored)})
        try:
            with replacing(self.path(key)) as temporary:
                temporary.write_bytes(content)
        except TrainingError as error:
            self.problem = f"latents and text states are not kept for the next run: {error}"


def default_folder() -> Path:
    """Returns the user's cache folder for sdlora.

    Raises:
        ConfigError: if the user has no home.
    """
    if own := os.environ.get("SDLORA_CACHE"):
        return Path(own).expanduser()
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    shared = Path(os.environ.get(variable, ""))
    try:
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "sdlora"
    except RuntimeError as error:
        raise ConfigError("there is no home folder to keep latents in; give --cache-dir FOLDER") from error


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns a SHA-256 over the names, number formats, shapes and bytes of tensors, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Returns a hash of a model's weights and of its configuration, as far as that does not say where it lies."""
    config: Any = getattr(module, "config", None)
    facts = dict(config.to_dict() if hasattr(config, "to_dict") else config or {})
    public = {name: str(value) for name, value in facts.items() if not name.startswith("_")}
    return Cache.key(content_hash(module.state_dict()), public)
