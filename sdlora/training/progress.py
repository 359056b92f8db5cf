"""What a run says while it goes: a live bar on a terminal, plain lines in a log, nothing for a program."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn


class Reporter:
    """Says nothing. The other reporters override what they show.

    A stage is a countable piece of work, e.g. caching 30 pictures; stages do not overlap.
    """

    def say(self, text: str) -> None:
        """Tells a fact."""

    def warn(self, text: str) -> None:
        """Tells something the user may want to act on."""

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Starts a stage of `total` units, `done` of which are there already."""

    def advance(self, note: str = "", units: int = 1) -> None:
        """Completes units of the stage; the note is its present state, e.g. the loss."""

    def end(self) -> None:
        """Ends the stage."""


class PlainReporter(Reporter):
    """Lines for logs and pipes: a stage reports at its start, its end, and every few seconds between."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._stage, self._total, self._done, self._last, self._note = "", 0, 0, 0.0, ""

    def say(self, text: str) -> None:
        """Prints a line; when nobody reads any more, as in `| head`, training goes on in silence."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (stays open to the end)

    def warn(self, text: str) -> None:
        """Prints a line to the error stream."""
        print(f"Warning: {text}", file=sys.stderr, flush=True)

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Remembers the stage; its first line comes with the first unit."""
        self._stage, self._total, self._done, self._last, self._note = stage, total, done, time.monotonic(), ""

    def advance(self, note: str = "", units: int = 1) -> None:
        """Prints a line if the last one is old enough."""
        self._done += units
        self._note = note
        if time.monotonic() - self._last >= self.seconds and self._done < self._total:
            self._print()

    def end(self) -> None:
        """Prints the stage's last line, once."""
        if self._done:
            self._print()
        self._done = 0

    def _print(self) -> None:
        self._last = time.monotonic()
        note = f"  {self._note}" if self._note else ""
        self.say(f"{self._stage} {self._done}/{self._total}{note}")


class RichReporter(Reporter):
    """A live progress bar for a terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self._errors = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """Prints above the bar."""
        self.console.print(escape(text))

    def warn(self, text: str) -> None:
        """Prints above the bar, in yellow."""
        target = self.console if self._progress else self._errors
        target.print(f"[yellow]Warning:[/yellow] {escape(text)}")

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Shows the bar."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # so that the line fits into 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self._progress.start()
        self._task = self._progress.add_task(escape(stage), total=total, completed=done, note="")

    def advance(self, note: str = "", units: int = 1) -> None:
        """Moves the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=units, note=escape(note))

    def end(self) -> None:
        """Leaves the finished bar on the screen."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


def terminal_reporter() -> Reporter:
    """Returns the reporter that fits the standard output."""
    return RichReporter() if sys.stdout.isatty() else PlainReporter()


def duration(seconds: float) -> str:
    """Writes a time span as people say it: `42 s`, `3:05 min`, `1:02:03 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d} h"
