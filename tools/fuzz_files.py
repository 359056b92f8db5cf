"""Damages LoRA files and checkpoints at random, and proves that reading them ends well: in time, in little memory.

    python -m tools.fuzz_files --rounds 10000

Every file is a sound one that was cut, flipped, spliced, or whose header tells lies. Reading it may succeed or end with
an error for the user; anything else is a fault, and so is more than 2 seconds or a gigabyte of memory more.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sdlora.errors import LoraFileError, ModelError
from sdlora.families import FAMILIES
from sdlora.files.layers import layers_of
from tools.fuzz_damage import damaged, damaged_json
from tools.fuzz_sound import sound_files

SECONDS = 2.0
"""The longest that one file may take, of the processor's time: what else runs on the machine is no fault of a file."""
MEMORY = 2**30
"""The most memory in bytes that reading may add to the process."""
MESSAGE = 1000
"""The most letters that a message may have, beside the path."""


@dataclass
class Outcome:
    """What came of all files.

    Attributes:
        files: how many were read.
        results: how many were read, and how many refused with which kind of error.
        faults: what should not have happened, a line each.
        slowest: seconds of the slowest.
        memory: bytes by which the process grew at most.
    """

    files: int = 0
    results: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    memory: int = 0


def run(rounds: int, seed: int, folder: Path) -> Outcome:
    """Reads damaged files.

    Args:
        rounds: how many.
        seed: of the damage; equal seeds give equal files.
        folder: where each lies while it is read.
    """
    rng, outcome, files = random.Random(seed), Outcome(), sound_files()
    path = folder / "file.safetensors"
    for family in FAMILIES:  # kept from then on
        layers_of(family)
    for sound in files.values():
        for name, text in {path.name: sound.content, **sound.beside}.items():
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        sound.read(path)
    before = _peak()
    for number in range(rounds):
        kind = rng.choice(list(files))
        sound = files[kind]
        spared = bool(sound.beside) and rng.random() < 0.5  # then only what lies beside the file is damaged
        path.write_bytes(sound.content if spared else damaged(sound.content, rng))
        for name, text in sound.beside.items():
            (folder / name).write_text(damaged_json(text, rng) if spared else text, encoding="utf-8")
        began = time.process_time()
        try:
            sound.read(path)
            outcome.results[f"{kind}: read"] += 1
        except (LoraFileError, ModelError) as error:
            outcome.results[f"{kind}: {type(error).__name__}"] += 1
            outcome.faults += [f"file {number} ({kind}): {fault}" for fault in _faults(str(error))]
        except Exception as error:  # whatever else it is, is what is looked for
            outcome.faults.append(f"file {number} ({kind}): {type(error).__name__}: {str(error)[:200]}")
        took = time.process_time() - began
        outcome.slowest = max(outcome.slowest, took)
        if took > SECONDS:
            outcome.faults.append(f"file {number} ({kind}): took {took:.1f} s")
    outcome.files, outcome.memory = rounds, _peak() - before
    if outcome.memory > MEMORY:
        outcome.faults.append(f"memory grew by {outcome.memory / 2**20:.0f} MiB")
    return outcome


def _faults(message: str) -> list[str]:
    """Says what is wrong with a message for the terminal."""
    faults = []
    if not message.replace("\n", "").isprintable():
        faults.append(f"the message would reach the terminal as it is: {message[:200]!r}")
    if len(message) > MESSAGE or message.count("\n") > 3:
        faults.append(f"the message has {len(message)} letters: {message[:200]!r}")
    return faults


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Runs from the command line; returns 1 if something went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_files", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # for matrices this small, several wait for each other longer than they compute
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(options.rounds, options.seed, Path(folder))
    for result, count in sorted(outcome.results.items()):
        print(f"{count:7d}  {result}")
    print(f"{outcome.files} files, slowest {outcome.slowest:.3f} s, memory grew by {outcome.memory / 2**20:.0f} MiB")
    print("\n".join(outcome.faults[:20]) or "no faults")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
