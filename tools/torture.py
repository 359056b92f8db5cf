"""Ends training in every bad way and checks that nothing is lost.

    python -m tools.torture kill --rounds 200      SIGKILL, at random moments and wherever something is written
    python -m tools.torture term --rounds 50       SIGTERM, likewise
    python -m tools.torture enospc --rounds 50     a disk that is full for a while, at every such place
    python -m tools.torture eio --rounds 50        a disk that fails once, at every such place
    python -m tools.torture tmpfs --rounds 50      a small disk that is really full (needs the right to mount one)

A short run on the embedded base is trained without trouble first; its LoRA is what all others must end with, to the
last bit. Then runs are disturbed, resumed and disturbed again until they end. A round is one disturbance. The exit code
is 0 if all runs ended as they should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from sdlora import faults
from sdlora.cli.main import main as sdlora
from sdlora.training import room_on_disk
from sdlora.training import train as _loaded_before_forking  # noqa: F401

ROOT = Path(__file__).parent.parent
PICTURES, STEPS = 4, 12
SETTINGS = {
    "data.batch_size": "1",
    "data.caption_dropout": "0.2",
    "data.flip": "true",
    "lora.rank": "2",
    "lora.text_encoder": "true",
    "train.accumulation": "1",
    "train.threads": "1",
    "output.save_every": "1",
    "output.keep_checkpoints": "2",
    "samples.sample_every": "1",
    "samples.sample_steps": "2",
    "samples.sample_prompts": '["a castle"]',
}
LONGEST = 120.0
"""Seconds after which a process counts as one that hangs."""
KILLED, STOPPED, REFUSED = -signal.SIGKILL, 130, 2


@dataclass
class Tally:
    """What happened in all rounds.

    Attributes:
        rounds: disturbances so far.
        hit: places where one struck -> how often.
        lost: steps that had to be done again, for each disturbance that ended a process.
        ended: runs that came to their end, all equal to the one without trouble.
    """

    rounds: int = 0
    hit: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    ended: int = 0


@dataclass(frozen=True)
class Way:
    """A way to disturb.

    Attributes:
        fault: what `faults` is told to do.
        codes: exit codes that a disturbed process may have, besides 0.
        moments: the signal that also comes at random moments, or 0.
        says: what a process prints that was disturbed and came to its end all the same.
    """

    fault: str
    codes: tuple[int, ...]
    moments: int = 0
    says: str = ""


WAYS = {
    "kill": Way("kill", (KILLED,), signal.SIGKILL),
    "term": Way("term", (STOPPED, -signal.SIGTERM), signal.SIGTERM),
    "enospc": Way("enospc*{times}", (REFUSED,), says="no space left on the disk"),
    "eio": Way("eio", (REFUSED,), says="Input/output error"),
}


@dataclass(frozen=True)
class Wish:
    """One disturbance.

    Attributes:
        where: in words.
        fault: what `faults` shall do.
        signal: seconds after which a signal is sent, and which.
    """

    where: str = ""
    fault: str = ""
    signal: tuple[float, int] | None = None


class Torture:
    """Runs and disturbs.

    Args:
        folder: for everything.
        seed: of the disturbances.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.tally = folder, random.Random(seed), Tally()
        self.images = folder / "images"
        self.images.mkdir()
        for picture in sorted((ROOT / "datasets_example").glob("*.png"))[:PICTURES]:
            for file in (picture, picture.with_suffix(".txt")):
                shutil.copy(file, self.images)
        started = time.monotonic()
        log = folder / "places.txt"
        code = self.train(folder / "straight", str(log))
        if code:
            sys.exit(f"the run without trouble ended with {code}:\n{self.said()}")
        self.seconds = time.monotonic() - started
        self.places = Counter(log.read_text().splitlines())
        self.expected = load_file(folder / "straight" / "images.safetensors")

    def said(self) -> str:
        """Returns what the last process printed."""
        return (self.folder / "said.txt").read_text(errors="replace")

    def train(self, run: Path, fault: str, after: tuple[float, int] | None = None) -> int:
        """Starts or resumes a run in a process of its own; returns its exit code, negative for a signal.

        Args:
            run: its folder.
            fault: what `faults` shall do.
            after: seconds after which a signal is sent, and which.
        """
        if (run / "config.toml").is_file() and (run / "config.toml").stat().st_size:
            words = ["train", "--resume", str(run)]
        else:  # stopped before it had begun
            shutil.rmtree(run, ignore_errors=True)
            words = ["train", "--base", "nano", "--images", str(self.images), "--steps", str(STEPS)]
            words += ["--output", str(run), "--set", f"data.cache_dir={run}-cache"]
            words += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
        process = os.fork()
        if not process:
            self._be(words, fault)
        return _wait(process, after)

    def _be(self, words: list[str], fault: str) -> None:
        """Is the process that trains."""
        code = 1
        try:
            said = os.open(self.folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            room_on_disk.POLL, room_on_disk.PATIENCE = 0.05, 2.0
            faults.arm(fault)
            sdlora(words)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def check(self, run: Path) -> None:
        """Compares the end of a run with that of the one without trouble."""
        found = load_file(run / "images.safetensors")
        odd = [key for key in self.expected if key not in found or not torch.equal(found[key], self.expected[key])]
        if odd or found.keys() != self.expected.keys():
            sys.exit(f"{run} ended with other tensors: {len(odd)}, first {odd[:1]}")
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        if steps != list(range(1, STEPS + 1)):
            sys.exit(f"{run} has logged the steps {steps}")
        left = [path for path in run.rglob(".*") if path.name not in (".lock",)]
        if left:
            sys.exit(f"{run} has left {left}")
        self.tally.ended += 1

    def disturb(self, way: Way, rounds: int) -> None:
        """Disturbs runs so many times, each until it ends."""
        wishes, number = self._wishes(way), 0
        while self.tally.rounds < rounds:
            run, code = self.folder / f"run{number}", 1
            number += 1
            while code:
                code = self._once(run, way, next(wishes) if self.tally.rounds < rounds else Wish())
            self.check(run)
            for path in (run, Path(f"{run}-cache")):
                shutil.rmtree(path)

    def _wishes(self, way: Way) -> Iterator[Wish]:
        """Yields disturbances: all places in turn, each at one of its first passes, and moments in between."""
        while True:
            for place in self.random.sample(sorted(self.places), len(self.places)):
                if way.moments and self.random.random() < 0.5:
                    yield Wish("a random moment", "", (self.random.uniform(0, self.seconds), way.moments))
                number, times = self.random.randint(1, min(3, self.places[place])), self.random.randint(1, 3)
                yield Wish(place, f"{place}@{number}={way.fault.format(times=times)}")

    def _once(self, run: Path, way: Way, wish: Wish) -> int:
        """Trains until the end or the disturbance; returns the exit code."""
        before = _checkpoint(run)
        code = self.train(run, wish.fault, wish.signal)
        if code == REFUSED and "is finished: " in self.said():
            return 0  # it was disturbed after all was done
        if code not in (0, *way.codes):
            sys.exit(f"after {wish} the process ended with {code}:\n{self.said()}")
        if code or (wish.fault and way.says and way.says in self.said()):
            self.count(wish.where, run, before)
        return code

    def count(self, where: str, run: Path, before: int) -> None:
        """Counts a disturbance, and the steps that it costs.

        Args:
            where: it struck.
            run: which run.
            before: step of its last checkpoint when the process was started.
        """
        self.tally.rounds += 1
        self.tally.hit[where] += 1
        self.tally.lost.append(max(0, _logged(run) - max(before, _checkpoint(run))))
        print(f"\r{self.tally.rounds} rounds, {len(self.tally.hit)} places", end="", flush=True)


def _wait(process: int, after: tuple[float, int] | None) -> int:
    started = time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if after and passed >= after[0]:
            with suppress(ProcessLookupError):
                os.kill(process, after[1])
            after = None
        if passed > LONGEST:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            sys.exit(f"a process did not end within {LONGEST:.0f} s")
        time.sleep(0.005)


def _checkpoint(run: Path) -> int:
    steps = [int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/state.json")]
    return max(steps, default=0)


def _logged(run: Path) -> int:
    with suppress(OSError):
        return (run / "metrics.jsonl").read_text().count("\n")
    return 0


def fill_disks(torture: Torture, rounds: int) -> None:
    """Trains on disks that are too small, until the run gives up; it goes on when they have grown."""
    needed = sum(_bytes(torture.folder / name) for name in ("straight", "straight-cache"))
    disk = torture.folder / "disk"
    disk.mkdir()
    while torture.tally.rounds < rounds:
        size = int(torture.random.uniform(0.2, 1.0) * needed)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        try:
            code = torture.train(disk / "run", "")
            if code not in (0, REFUSED) or (code and "free" not in torture.said()):
                sys.exit(f"on a disk of {size} bytes the process ended with {code}:\n{torture.said()}")
            subprocess.run(["mount", "-o", f"remount,size={4 * needed}", str(disk)], check=True)
            if code:
                torture.count("a full disk", disk / "run", 0)
                code = torture.train(disk / "run", "")
            if code:
                sys.exit(f"with room again the process ended with {code}:\n{torture.said()}")
            torture.check(disk / "run")
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def report(tally: Tally, torture: Torture, seconds: float) -> None:
    """Prints what happened."""
    missed = sorted(set(torture.places) - set(tally.hit))
    print(f"\n{tally.rounds} rounds in {seconds:.0f} s; {tally.ended} runs came to their end, all equal bit for bit")
    print(f"{len(tally.hit)} places: " + ", ".join(f"{place} {count}" for place, count in sorted(tally.hit.items())))
    if missed:
        print(f"{len(missed)} of {len(torture.places)} places not hit: {', '.join(missed)}")
    if tally.lost:
        print(f"steps done again: at most {max(tally.lost)}, {statistics.mean(tally.lost):.1f} on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=[*WAYS, "tmpfs"])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder), options.seed)
        if options.way == "tmpfs":
            fill_disks(torture, options.rounds)
        else:
            torture.disturb(WAYS[options.way], options.rounds)
        report(torture.tally, torture, time.monotonic() - started)


if __name__ == "__main__":
    main()
