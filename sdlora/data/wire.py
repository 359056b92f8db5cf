"""How the program and its decoding processes talk: a line of JSON, then the bytes of the arrays that it speaks of.

Nothing that is read can run code, which Python's own format for objects could. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

from sdlora.data.decoding import TASKS, Cut, Seen
from sdlora.errors import DatasetError


def send(stream: IO[bytes], message: Any) -> None:
    """Writes a message: lists, dicts, texts, numbers, paths, 8-bit arrays, `Seen`, `Cut` and `DatasetError`."""
    arrays: list[np.ndarray] = []

    def described(value: Any) -> dict[str, Any]:
        if isinstance(value, np.ndarray):
            arrays.append(value)
            return {"array": value.shape}
        if isinstance(value, Seen | Cut):
            return {type(value).__name__: vars(value)}
        if isinstance(value, Path | DatasetError):
            return {"path" if isinstance(value, Path) else "error": str(value)}
        raise TypeError(f"{type(value).__name__} does not go between processes")

    stream.write(json.dumps(message, default=described).encode() + b"\n")
    for array in arrays:
        stream.write(np.ascontiguousarray(array).data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Reads a message; sequences come as lists, those in `Seen` and `Cut` as the tuples that they were.

    Raises:
        EOFError: if the stream ends before the message does.
    """

    def meant(value: dict[str, Any]) -> Any:
        kind: str
        content: Any
        kind, content = next(iter(value.items())) if len(value) == 1 else ("", value)
        match kind:
            case "array":
                return np.frombuffer(_exactly(stream, math.prod(content)), np.uint8).reshape(content)
            case "Seen":
                return Seen(**_with_tuples(content))
            case "Cut":
                return Cut(**_with_tuples(content))
            case "path":
                return Path(content)
            case "error":
                return DatasetError(content)
        return value

    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line, object_hook=meant)


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _exactly(stream: IO[bytes], count: int) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        done += got
    return data


def serve() -> None:
    """Reads tasks from standard input and answers on standard output until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this one, which then ends it
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library may print must not get between the answers
    send(answers, "ready")
    while True:
        try:
            task, arguments = receive(tasks)
        except EOFError:
            return
        try:
            answer = TASKS[task](*arguments)
        except DatasetError as error:
            answer = error
        send(answers, answer)
