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
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlora.atomic import replacing
from sdlora.diffusion.losses import squared_error
from sdlora.diffusion.schedule import Schedule
from tools.pretrain_nano import model, twin
from tools.pretrain_nano.batches import Batch, batch
from tools.pretrain_nano.captions import prompt
from tools.pretrain_nano.latents import Latents, load_latents, read_concepts
from tools.pretrain_nano.probe import probe
from tools.pretrain_nano.sources import BASE_STYLES, STYLES
from tools.pretrain_nano.text_warmup import warm_up
from tools.pretrain_nano.tokenizer import train_tokenizer
from tools.pretrain_nano.twin import Twin

GAMMA, FLOOR = 5.0, 0.2
LAST_PART = 0.2
"""Share of the samples during which the learning rate falls and the text encoder is frozen."""
EMA_POWER = 6.94
"""Exponent of the moving average; the average then reaches back over about a tenth of all steps so far.

Source: Karras et al. 2024, arXiv:2312.02696, equation 127 and section 3.1 (sigma_rel 0.10)."""


@dataclass(frozen=True)
class Settings:
    """What decides the result. Two runs with the same settings and data agree."""

    samples: int
    size: int = 24
    learning_rate: float = 1e-3
    text_learning_rate: float = 5e-4
    warm_up_steps: int = 500
    views: int = 1
    seed: int = 0

    @property
    def steps(self) -> int:
        """Number of steps in all."""
        return self.samples // self.size

    @property
    def turn(self) -> int:
        """First step of the last part."""
        return round(self.steps * (1 - LAST_PART))

    def pace(self, step: int) -> float:
        """Factor on the learning rates at a step, in [0, 1]."""
        if step < self.turn:
            return min(1.0, (step + 1) / self.warm_up_steps)
        return 1 - (step - self.turn) / (self.steps - self.turn)


def loss_weight(snr: Tensor) -> Tensor:
    """Returns the factor on each sample's squared error of the noise, (B,).

    Measured in the picture instead of the noise, an error counts min(max(snr, 0.2), 5) times. The cap is min-SNR's.
    The floor is what makes words count: what a picture shows is decided while the noise drowns it, and there a plain
    loss in the noise hardly weighs anything.

    Source: Hang et al. 2023, arXiv:2303.09556 (cap); Salimans and Ho 2022, arXiv:2202.00512, section 4 (floor).
    """
    return snr.clamp(FLOOR, GAMMA) / snr


class Base(nn.Module):
    """What is trained: the text encoder and the denoiser."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.text = model.new_text_encoder()
        self.denoiser = model.new_denoiser()
        self.schedule = Schedule.from_config(json.loads((model.NANO / "scheduler/scheduler_config.json").read_text()))
        self.working: Twin | None = None

    def losses(self, b: Batch, ids: Tensor, device: torch.device) -> Tensor:
        """Returns each sample's weighted loss, (B,)."""
        t = b.timesteps.to(device)
        clean, noise = b.latents.to(device), b.noise.to(device)
        schedule = self.schedule.to(device)
        seen = schedule.add_noise(clean, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.working is not None or device.type == "cuda"):
            states = self.text(ids.to(device)).last_hidden_state
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            guess = (self.working or self.denoiser)(seen, t, states, return_dict=False)[0]
        return squared_error(guess, noise) * loss_weight(schedule.snr(t))


class Course:
    """A run: the networks, their moving average, the optimizer, and where it stands."""

    def __init__(self, settings: Settings, work: Path, device: torch.device) -> None:
        self.settings, self.work, self.device = settings, work, device
        self.base = Base(settings.seed).to(device)
        self.average = {name: value.detach().clone() for name, value in self.base.named_parameters()}
        groups = [
            {"params": list(self.base.denoiser.parameters()), "top": settings.learning_rate},
            {"params": list(self.base.text.parameters()), "top": settings.text_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.step = 0
        self.seconds = 0.0

    def advance(self, data: Latents, tokenizer) -> float:
        """Takes one step; returns its mean loss."""
        settings = self.settings
        frozen = self.step >= settings.turn
        self.base.text.requires_grad_(not frozen)
        b = batch(data, self.step, settings.size, settings.seed)
        loss = self.base.losses(b, model.token_ids(tokenizer, b.captions), self.device).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.base.working:
            self.base.working.hand_over_gradients()
        nn.utils.clip_grad_norm_(self.base.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["top"] * settings.pace(self.step)
        self.optimizer.step()
        if self.base.working:
            self.base.working.follow()
        keep = (1 - 1 / (self.step + 1)) ** (EMA_POWER + 1)
        trained = list(self.base.parameters())
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in trained], 1 - keep)
        self.step += 1
        return loss.item()

    def save(self, name: str) -> None:
        """Writes everything that is needed to go on, in one piece."""
        tensors = {f"weights.{k}": v.detach() for k, v in self.base.named_parameters()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for k, p in self.base.named_parameters():
            for kind, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{kind}.{k}"] = value
        where = {"step": self.step, "seconds": self.seconds, "size": self.settings.size, "seed": self.settings.seed}
        with replacing(self.work / name) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, {"where": json.dumps(where)})

    def load(self, name: str) -> None:
        """Takes up a saved state.

        Raises:
            SystemExit: it belongs to another batch size or seed, whose steps are other steps.
        """
        with safe_open(self.work / name, "pt", device=str(self.device)) as file:
            where = json.loads(file.metadata()["where"])
            mine = {"size": self.settings.size, "seed": self.settings.seed}
            if {key: where[key] for key in mine} != mine:
                raise SystemExit(f"{self.work / name} was trained with {where}, not with {mine}; use another --work")
            self.step, self.seconds = where["step"], where["seconds"]
            with torch.no_grad():
                for k, p in self.base.named_parameters():
                    p.copy_(file.get_tensor(f"weights.{k}"))
                    self.average[k].copy_(file.get_tensor(f"average.{k}"))
                    kinds = ("step", "exp_avg", "exp_avg_sq")
                    if f"step.{k}" in file.keys():  # noqa: SIM118 - not a dict
                        self.optimizer.state[p] = {kind: file.get_tensor(f"{kind}.{k}") for kind in kinds}

    def averaged(self) -> Base:
        """Returns the moving average as networks of their own, for drawing and shipping."""
        copy = Base(self.settings.seed).to(self.device).eval().requires_grad_(False)
        copy.load_state_dict(self.average, strict=False)
        return copy


STATE, TURN = "state.safetensors", "turn.safetensors"


def take_up(course: Course) -> None:
    """Goes on from the newest state that the settings allow: past the turn only if the turn was at the same step."""
    for name in (STATE, TURN):
        if (course.work / name).is_file():
            course.load(name)
            settings_file = course.work / "samples.txt"
            same = settings_file.is_file() and settings_file.read_text() == str(course.settings.samples)
            if same or course.step <= course.settings.turn:
                return
    if course.step > course.settings.turn:
        raise SystemExit(f"{course.work} is past the turn of this course already; ask for more --samples")


def main() -> None:
    """Parses the arguments, trains, and writes the base."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_nano.train", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="data set, made by tools.pretrain_nano.build")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and the log; made, or gone on with")
    parser.add_argument("--out", type=Path, help="folder for the finished base; default: WORK/base")
    parser.add_argument("--samples", type=float, default=3e6, help="pictures to see in all")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument(
        "--views", type=int, default=1, help="how often a picture is encoded, at different sizes and places"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time; call again to go on")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(samples=int(arguments.samples), size=arguments.batch, views=arguments.views)
    arguments.work.mkdir(parents=True, exist_ok=True)
    run(settings, arguments.data, arguments.work, arguments.out or arguments.work / "base", device, arguments.minutes)


def run(settings: Settings, data: Path, work: Path, out: Path, device: torch.device, minutes: float) -> None:
    """Trains until the samples or the minutes are over, and writes the moving average as a base."""
    vae = model.load_autoencoder().to(device)
    latents = load_latents(data, vae, work / "latents.safetensors", views=settings.views)
    held_out = load_latents(data, vae, work / "validation.safetensors", splits=("validation",))
    tokenizer = train_tokenizer(sentences(data), work / "tokenizer")
    course = Course(settings, work, device)
    take_up(course)
    if course.step == 0:
        warm_up(course.base.text, tokenizer, latents, settings.seed)
        course.average = {name: value.detach().clone() for name, value in course.base.named_parameters()}
    (work / "samples.txt").write_text(str(settings.samples))
    if device.type == "cpu" and twin.supported():
        course.base.working = twin.Twin(course.base.denoiser, work)
    leave = Signal()
    started, before, losses = time.monotonic(), course.seconds, []
    saved = started
    while course.step < settings.steps and not leave.asked and time.monotonic() - started < 60 * minutes:
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
    average = course.averaged()
    model.save_base(out, tokenizer, average.text, average.denoiser)
    print(f"{course.step * settings.size:,} of {settings.samples:,} samples; {out}", flush=True)


LOG_EVERY = 500
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
    styles = [style for style in STYLES if style.id in BASE_STYLES]
    texts = []
    for concept in read_concepts(data):
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
