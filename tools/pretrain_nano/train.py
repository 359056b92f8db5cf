"""Trains the embedded base, on one GPU or on the CPU, from the first picture to the folder that ships.

    python -m tools.pretrain_nano.train --data build/emoji --work build/nano --samples 3e6
    python -m tools.pretrain_nano.train --data build/emoji --work build/nano --samples 6e6     goes on, with more

It may be ended at any second: it goes on from the last checkpoint, and what it then computes depends on nothing but the
step. The learning rate is constant until the last fifth, where it falls to zero and the text encoder is frozen. More
samples than before go on from the state at which that fall began.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from tools.pretrain_nano import model
from tools.pretrain_nano.captions import prompt
from tools.pretrain_nano.concepts import load_concepts
from tools.pretrain_nano.course import Course, Settings
from tools.pretrain_nano.crew import Crew
from tools.pretrain_nano.latents import Latents, load_latents
from tools.pretrain_nano.probe import probe
from tools.pretrain_nano.sources import NAMED_STYLES, STYLE_OF
from tools.pretrain_nano.text_warmup import warm_up
from tools.pretrain_nano.tokenizer import train_tokenizer

STATE, TURN = "state.safetensors", "turn.safetensors"


def take_up(course: Course) -> None:
    """Goes on from the newest state that the settings allow.

    A state behind its own turn is of use only to a course of the same length: its learning rate has fallen already.

    Raises:
        SystemExit: every state lies behind the turn of this course.
    """
    settings = course.settings
    for name in (STATE, TURN):
        if (course.work / name).is_file():
            samples = course.load(name)
            fallen = name == STATE and course.step > replace(settings, samples=samples).turn
            if samples == settings.samples or (not fallen and course.step <= settings.turn):
                return
    if course.step:
        raise SystemExit(f"{course.work} is past the turn of this course already; ask for more --samples")


def main() -> None:
    """Parses the arguments, trains, and writes the base."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_nano.train", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="data set, made by tools.pretrain_nano.build")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and the log; made, or gone on with")
    parser.add_argument("--out", type=Path, help="folder for the finished base; default: WORK/base")
    parser.add_argument("--samples", type=float, default=3e6, help="pictures to see in all")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument(
        "--views", type=int, default=1, help="how often a picture is encoded, at different sizes and places"
    )
    parser.add_argument("--workers", type=int, default=1, help="CPU processes that share a batch; one per core")
    parser.add_argument("--start", type=Path, help="diffusers folder of the base to begin with, if WORK is still empty")
    parser.add_argument("--seen", type=float, default=0, help="samples that the base of --start has seen")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time; call again to go on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(samples=int(arguments.samples), size=arguments.batch, views=arguments.views)
    arguments.work.mkdir(parents=True, exist_ok=True)
    run(arguments, settings, device)


def run(arguments: argparse.Namespace, settings: Settings, device: torch.device) -> None:
    """Trains until the samples or the minutes are over, and writes the moving average as a base."""
    data, work, workers = arguments.data, arguments.work, arguments.workers
    out = arguments.out or work / "base"
    vae = model.load_autoencoder().to(device)
    latents = load_latents(data, vae, work / "latents.safetensors", views=settings.views)
    held_out = load_latents(data, vae, work / "validation.safetensors", splits=("validation",))
    tokenizer = take_tokenizer(arguments)
    course = Course(settings, work, device)
    take_up(course)
    if course.step == 0 and arguments.start:
        course.begin_with(arguments.start, int(arguments.seen))
    elif course.step == 0:
        warm_up(course.base.text, tokenizer, latents, settings.seed)
        course.average = {name: value.detach().clone() for name, value in course.base.named_parameters()}
    if device.type == "cpu":
        course.base.compute_in_bf16(work)
        if workers > 1:
            course.crew = Crew(course.base, workers, settings.size, work)
    leave = Signal()
    started, before, losses = time.monotonic(), course.seconds, []
    saved = started
    while course.step < settings.steps and not leave.asked and time.monotonic() - started < 60 * arguments.minutes:
        losses.append(course.advance(latents, tokenizer))
        course.seconds = before + time.monotonic() - started
        if course.step == settings.turn:
            course.save(TURN)
        if course.step % LOG_EVERY == 0:
            write_log(course, losses, tokenizer, {"train": latents, "held_out": held_out})
            losses.clear()
        if time.monotonic() - saved > SAVE_EVERY:
            course.save(STATE)
            saved = time.monotonic()
    course.save(STATE)
    if course.crew:
        course.crew.dismiss()
    average = course.averaged()
    model.save_base(out, tokenizer, average.text, average.denoiser)
    print(f"{course.step * settings.size:,} of {settings.samples:,} samples; {out}", flush=True)


def take_tokenizer(arguments: argparse.Namespace) -> CLIPTokenizer:
    """Returns the tokenizer that the weights have learned with, or learns one.

    It is never learned twice: pairs of letters that are equally frequent may swap their ids.
    """
    folder = arguments.work / "tokenizer"
    known = folder / "tokenizer.json"
    if not known.is_file() and arguments.start:
        shutil.copytree(arguments.start / "tokenizer", folder, dirs_exist_ok=True)
    if known.is_file():
        return CLIPTokenizer.from_pretrained(folder)
    return train_tokenizer(sentences(arguments.data), folder)


LOG_EVERY = 1000
"""Steps between two lines of the log; a probe takes as long as twenty steps or more."""
SAVE_EVERY = 240.0
"""Seconds between checkpoints."""


class Signal:
    """Notices that the process was asked to end, so that it ends with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def sentences(data: Path) -> list[str]:
    """Returns what the tokenizer learns from: every label with every style, and all tags."""
    styles = [STYLE_OF[style] for style in NAMED_STYLES]
    texts = []
    for concept in load_concepts(data):
        texts += [prompt(concept, style) for style in styles]
        texts += [concept.label] * 4 + list(concept.tags)
    return texts


def write_log(course: Course, losses: list[float], tokenizer, sets: dict[str, Latents]) -> None:
    """Adds a line to WORK/log.jsonl: samples, loss, and what `probe` finds for the moving average."""
    average = course.averaged()
    row: dict[str, object] = {
        "samples": course.step * course.settings.size,
        "loss": round(sum(losses) / len(losses), 5),
        "seconds": round(course.seconds),
    }
    for name, latents in sets.items():
        found = probe(average.text, average.denoiser, course.base.schedule, tokenizer, latents)
        row |= {f"{name}_{key}": round(value, 4) for key, value in found.items()}
    with open(course.work / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
