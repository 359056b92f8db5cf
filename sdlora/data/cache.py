"""Tensors kept between runs, named by the hash of everything they depend on, so that nothing stale can be found.

There is nothing to clear after a picture was edited or a setting changed: the name is another one. The folder is the
user's cache folder, never the one with the pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sdlora.atomic import explain
from sdlora.container_header import DTYPES
from sdlora.errors import ConfigError
from sdlora.faults import place
from sdlora.file_identity import identity, is_settled
from sdlora.paths import expanded
from sdlora.weights import Origin, origin

_HASHERS = min(16, os.cpu_count() or 1)
"""Threads that hash a model's weights; hashing leaves the interpreter to others."""
_WEIGHTS_VERSION = 2  # raise it when weights are to be hashed differently


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
        self.folder = expanded(folder) if folder else default_folder()
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
            with open(self.path(key), "rb", buffering=0) as file:
                content = bytearray(os.fstat(file.fileno()).st_size)
                file.readinto(content)
            return _unpacked(content)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors. If that fails, `problem` says why, and nothing more is tried."""
        if self.problem:
            return
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(stored, {"content": content_hash(stored)})
        path = self.path(key)
        # Not flushed to the disk, which would take longer than to compute it: after a power cut its hash tells.
        temporary = path.with_name(f".{path.stem[:40]}-{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            place("cache written")
            os.replace(temporary, path)
            place("cache in place")
        except OSError as error:
            self.problem = f"latents and text states are not kept for the next run: {explain(path, error)}"
            with suppress(OSError):
                temporary.unlink()

    def facts(self, key: str) -> Any:
        """Returns what `keep_facts` has kept, or `None` if there is nothing or it is damaged."""
        stored = self.get(key)
        return json.loads(stored["facts"].numpy().tobytes()) if stored else None

    def keep_facts(self, key: str, facts: Any) -> None:
        """Keeps what JSON can hold, as `put` does."""
        content = json.dumps(facts, separators=(",", ":")).encode()
        self.put(key, {"facts": torch.frombuffer(bytearray(content), dtype=torch.uint8)})


def _unpacked(content: bytearray) -> dict[str, Tensor] | None:
    """Takes a file apart; returns `None`, or raises, if it is not as `put` has written it."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    whole = header.pop("__metadata__")["content"]
    digest, tensors = hashlib.sha256(), {}
    for name, entry in sorted(header.items()):
        start, end = (begin + offset for offset in entry["data_offsets"])
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        digest.update(repr((name, str(dtype), shape)).encode())
        digest.update(memoryview(content)[start:end])
        if start == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            tensors[name] = torch.frombuffer(content, dtype=dtype, count=math.prod(shape), offset=start).view(shape)
    return tensors if digest.hexdigest() == whole else None


def default_folder() -> Path:
    """Returns the user's cache folder for sdlora.

    Raises:
        ConfigError: if the user has no home.
    """
    if own := os.environ.get("SDLORA_CACHE"):
        return expanded(own)
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


def fingerprint(module: nn.Module, cache: Cache | None = None) -> str:
    """Returns a hash of a model's weights and of its configuration, as far as that does not say where it lies.

    Weights that came from files and were not changed since are hashed as they lie there, so the number format in which
    they are used makes no difference. With a cache that is done once: as long as none of the files is touched, their
    hash is looked up.
    """
    config: Any = getattr(module, "config", None)
    facts = dict(config.to_dict() if hasattr(config, "to_dict") else config or {})
    public = {name: str(value) for name, value in facts.items() if not name.startswith("_")}
    known = origin(module)
    if known is None or not _untouched(known):
        return Cache.key(_weights_hash(module.state_dict()), public)
    key = Cache.key("weights", _WEIGHTS_VERSION, _places(known))
    if cache and (stored := cache.facts(key)):
        return Cache.key(stored, public)
    whole = _weights_hash(known.stored())
    known.unmap()
    settled = all(is_settled(container.identity) for container in known.containers)
    if cache and settled and _untouched(known):
        cache.keep_facts(key, whole)
    return Cache.key(whole, public)


def _untouched(known: Origin) -> bool:
    try:
        return all(identity(container.path) == container.identity for container in known.containers)
    except OSError:
        return False


def _places(known: Origin) -> list[Any]:
    files = {container.path: number for number, container in enumerate(known.containers)}
    return [
        [(str(container.path.resolve()), container.identity) for container in known.containers],
        [
            (name, files[weight.container.path], weight.key, weight.third, weight.transposed, known.shapes[name])
            for name, weight in sorted(known.weights.items())
        ],
    ]


def _weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Returns a SHA-256 over the hashes of single tensors, which several cores compute."""
    with ThreadPoolExecutor(_HASHERS) as pool:
        each = pool.map(lambda name: content_hash({name: weights[name]}), sorted(weights))
        return hashlib.sha256("".join(each).encode()).hexdigest()
