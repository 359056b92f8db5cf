"""Pickled checkpoints (.ckpt, .pt, .bin): refused, or on request converted once, by a process of their own.

A pickle is a program. Torch's `weights_only` reader runs none of it: it knows a list of harmless operations and gives
up at all others. It still works in another process, with limits to its time and memory, so that a file that crashes it
or fills the memory takes nothing else along. What comes back are tensors in a safetensors file, and a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.atomic import explain, replacing
from sdlora.container import DTYPES, write_stream
from sdlora.errors import ModelError

_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")

_START_SECONDS = 180
_BYTES_PER_SECOND = 4_000_000
"""The slowest disk that is waited for."""

_SPARE_BYTES = 2 * 1024**3
"""Memory that the process may take besides three times the size of the file."""

_NESTS = ("state_dict", "module")
"""Keys behind which training programs put the weights."""


class _Inert:
    """Stands for an object of a training program that is of no use here; takes everything and does nothing."""

    def __new__(cls, *args: Any, **options: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
"""What lies beside the weights in Stability's own checkpoints and their descendants, read as `_Inert`.

Source: the names that AUTOMATIC1111's `modules/safe.py` lets pass.
"""


def is_pickle(path: Path) -> bool:
    """Tells whether a file is a pickle or a zip of pickles, by its first bytes, or by its name if those say nothing.

    Raises:
        ModelError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if start[8:] == b"{":  # safetensors, whatever its name
        return False
    protocol = start[:1] == b"\x80" and b"\x01" < start[1:2] < b"\x06"
    return start.startswith(_ZIP) or protocol or path.suffix.lower() in _SUFFIXES


def readable(path: Path, folder: Path | None, announce: Callable[[str], None] = print) -> Path:
    """Returns the safetensors file to read in place of a single file: itself, or what a pickle was converted into.

    Args:
        path: a file.
        folder: the user's cache folder, where pickles are converted to; `None` refuses them.
        announce: told about a conversion before it begins.

    Raises:
        ModelError: if it is a pickle and not allowed, or cannot be converted.
    """
    if not is_pickle(path):
        return path
    if folder is None:
        raise ModelError(
            f"{path} is a pickle, which can run code, so it is not opened; give the .safetensors version, or "
            "--allow-pickle to convert it first (its code is not run; still only do that with files you trust)"
        )
    return converted(path, folder, announce)


def converted(path: Path, folder: Path, announce: Callable[[str], None] = print) -> Path:
    """Converts a pickled checkpoint to safetensors in the user's cache, if that was not done before.

    The process that does it may take time in proportion to the file's size, and on Linux memory too. It is started
    afresh (`spawn`), so a script that calls this needs the usual `if __name__ == "__main__":`.

    Args:
        path: the checkpoint.
        folder: the user's cache folder; the file is named by the SHA-256 of the whole checkpoint.
        announce: told the size before it begins, and what was left out.

    Raises:
        ModelError: if it holds anything but weights and plain values, or is damaged.
        TrainingError: if the cache folder cannot be written.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    target = folder / "converted" / f"{digest}.safetensors"
    if target.is_file():
        return target
    announce(f"converting {path.name} to safetensors: {size / 1e9:.1f} GB, once; it is kept as {target}")
    with replacing(target) as temporary:
        answer = _apart(path, temporary, _START_SECONDS + size / _BYTES_PER_SECOND, _SPARE_BYTES + 3 * size)
        if "problem" in answer:
            raise ModelError(f"cannot convert {path}: {answer['problem']}")
    if answer.get("dropped"):
        announce(f"{answer['dropped']} entries of {path.name} are no weights and were left out")
    return target


def _apart(source: Path, target: Path, seconds: float, memory: int) -> dict[str, Any]:
    """Runs `_convert` in a new process and returns what it says. Texts only: objects would be pickles again."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, source, target, memory), daemon=True)
    try:
        process.start()
        sender.close()
        if not receiver.poll(seconds):
            return {"problem": f"it was not read within {seconds:.0f} seconds"}
        return json.loads(receiver.recv_bytes(10_000))
    except EOFError:
        process.join(10)
        return {"problem": f"the process that read it ended early, with exit code {process.exitcode}"}
    finally:
        receiver.close()
        if process.pid is not None:
            process.kill()
            process.join()


def _child(connection: Connection, source: Path, target: Path, memory: int) -> None:
    warnings.simplefilter("ignore")  # torch's, on old formats
    torch.set_num_threads(1)
    _limit_memory(memory)
    try:
        answer: dict[str, Any] = {"dropped": _convert(source, target)}
    except ModelError as error:
        answer = {"problem": str(error)}
    except MemoryError:
        answer = {"problem": f"it wants more than {memory / 1e9:.0f} GB of memory, more than a file of its size needs"}
    except OSError as error:
        answer = {"problem": explain(target, error)}
    except Exception as error:  # torch raises several kinds for what it refuses and for damaged files
        answer = {"problem": f"torch says {_reason(error)!r}"}
    connection.send_bytes(json.dumps(answer).encode())


def _limit_memory(more: int) -> None:
    """Lets this process take that many bytes more than it has. Only Linux keeps to such a limit."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _convert(source: Path, target: Path) -> int:
    """Writes the tensors of a pickle as safetensors and returns how many other entries it had.

    Raises:
        ModelError: if there are none, or some that cannot be kept.
        Exception: whatever torch raises for a file that it refuses.
    """
    with source.open("rb") as file, torch.serialization.safe_globals([(_Inert, name) for name in _INERT]):
        # Zips need not be read into memory. By a name in .safetensors, torch would not see what the file is.
        mapped = file.read(4) in _ZIP and source.suffix.lower() != ".safetensors"
        file.seek(0)
        loaded = torch.load(source if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    weights, dropped = _weights(loaded)
    _require_plain(weights, source.stat().st_size)
    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in weights.items()}
    write_stream(target, shapes, {"format": "pt"}, lambda key: weights[key].detach())
    return dropped


def _weights(loaded: Any) -> tuple[dict[str, Tensor], int]:
    """Finds the tensors under their names, and counts all entries on the way that are none."""
    dropped = 0
    for nest in (*_NESTS, *_NESTS):
        if isinstance(loaded, dict) and isinstance(loaded.get(nest), dict):
            dropped += len(loaded) - 1
            loaded = loaded[nest]
    if not isinstance(loaded, dict):
        raise ModelError(f"it holds a {type(loaded).__name__} and no weights by name")
    weights = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not weights:
        raise ModelError("it holds no weights by name")
    return weights, dropped + len(loaded) - len(weights)


def _require_plain(weights: dict[str, Tensor], file_bytes: int) -> None:
    """Refuses tensors that safetensors cannot hold, and such as are huge in the new file and nothing in the old."""
    total = 0
    for key, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ModelError(f"{key[:200]!r} is no plain tensor")
        if tensor.dtype not in DTYPES.values():
            known = ", ".join(str(dtype) for dtype in DTYPES.values())
            raise ModelError(f"{key[:200]!r} is stored as {tensor.dtype}; read are {known}")
        total += tensor.numel() * tensor.element_size()
    if total > 2 * file_bytes + 1_000_000:
        raise ModelError(f"its tensors would need {total / 1e9:.1f} GB, and the file has {file_bytes / 1e9:.1f} GB")


def _reason(error: Exception) -> str:
    """Returns the one line of torch's message that says what is wrong with the file."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(advice)]
    return (reasons or [type(error).__name__])[0].split(". Please use `torch")[0][:300]
