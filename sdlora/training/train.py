"""The loop: from settings to a certified LoRA file. `train` reads from top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdlora.atomic import sweep
from sdlora.config import Config
from sdlora.diffusion.noise import generator
from sdlora.errors import TrainingError
from sdlora.files.certify import Certificate
from sdlora.training.accumulate import Piece, accumulate, cut
from sdlora.training.checkpoint import latest_checkpoint
from sdlora.training.folder import RunFolder
from sdlora.training.interrupt import StopSignal
from sdlora.training.lock import Heartbeat, Lock
from sdlora.training.lr import learning_rate_factor
from sdlora.training.meter import Meter
from sdlora.training.progress import Reporter
from sdlora.training.room_on_disk import give_up_reserve
from sdlora.training.session import Session
from sdlora.training.setup import set_up
from sdlora.training.world import World

MAX_BAD_STEPS = 3
"""Steps in a row whose loss or gradient is not finite before the run stops."""


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        folder: the run's folder.
        lora: the LoRA file: the final one, or the one written when the run was stopped.
        steps: optimizer steps done.
        total_steps: optimizer steps planned.
        interrupted: whether the user stopped it.
        loss_start: mean loss over the first tenth of the steps.
        loss_end: mean loss over the last tenth of the steps.
        seconds: wall time of this session.
        samples: grid of the last samples, without and with the LoRA, or `None`.
        certificate: what was checked in the LoRA file.
    """

    folder: Path
    lora: Path
    steps: int
    total_steps: int
    interrupted: bool
    loss_start: float
    loss_end: float
    seconds: float
    samples: Path | None
    certificate: Certificate

    @property
    def finished(self) -> bool:
        """Whether all planned steps are done."""
        return self.steps == self.total_steps


def train(
    config: Config, *, resume: RunFolder | None = None, reporter: Reporter | None = None, world: World | None = None
) -> Result:
    """Trains a LoRA.

    Args:
        config: the settings; `data.images` must be given.
        resume: the folder of a run to go on with, opened by `sdlora.training.folder.reopen`.
        reporter: told what happens; silent if left out.
        world: the processes that train together, each of which calls this; left out, this one alone.

    Returns:
        What the run left behind, the same in all processes.

    Raises:
        SdloraError: anything the user can fix; what was learned up to the last checkpoint is kept.
    """
    started = time.monotonic()
    world = world or World.single()
    reporter = reporter if reporter and world.is_first else Reporter()
    threads = torch.get_num_threads()
    lock, heartbeat, step = Lock(), None, 0
    try:
        world.share_cores(config.train.threads)
        if resume:
            world.first(lambda: lock.take(resume.root))
            world.first(lambda: sweep(resume.root))
        session = set_up(config, resume, reporter, world)
        plan, run, previews = session.plan, session.run, session.previews
        if not resume:
            world.first(lambda: lock.take(run.root))
        step, saved = session.start, session.start
        if world.is_first:
            heartbeat = Heartbeat(run.root, plan.total_steps)
        if previews:
            previews.without(reporter)
        stop = StopSignal()
        session.listen_to(stop)
        watch = _Watch(session, Meter(plan), reporter, stop)
        with stop.listening():
            reporter.begin("training", plan.total_steps, step)
            while step < plan.total_steps and step != config.train.stop_at and not watch.stopping:
                # Gradients and update. The numbers are read one step later, so that a GPU never waits for Python.
                rate = set_learning_rates(session, step)
                loss, asked, names = session.ladder.run(partial(step_gradients, session, step, stop.requested))
                norm = session.engine.update(loss)
                step += 1
                halts = plan.saves_after(step - 1) or plan.samples_after(step - 1)
                try:
                    watch.note(_Numbers(step, rate, loss, norm, asked, names))
                    if halts or step == plan.total_steps:
                        watch.catch_up()
                except _NotFinite as trouble:
                    step = saved = _go_back(session, trouble, saved, reporter)
                    watch = _Watch(session, Meter(plan), reporter, stop)
                    reporter.begin("training", plan.total_steps, step)
                    continue
                if heartbeat:
                    heartbeat.beat(step)

                # Once in a while: LoRA file, checkpoint, samples. The last step's come below.
                if halts and step < plan.total_steps:
                    reporter.end()
                    saved = _halt(session, step, reporter) or saved
                    reporter.begin("training", plan.total_steps, step)
                    watch.meter.skip_pause()
            watch.catch_up()
            reporter.end()
            result = world.first(lambda: _finish(session, step, watch.stopping, started, reporter))
        if heartbeat:
            heartbeat.beat(step, "finished" if result.finished else "stopped")
            heartbeat = None
        return result
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory with batches of {config.data.batch_size}, although all was saved that the settings "
            "allow; leave --micro-batch, --base-dtype and --offload to sdlora, or try a smaller --resolution"
        ) from error
    finally:
        reporter.end()
        if heartbeat:
            heartbeat.beat(step, "failed")
        lock.release()
        torch.set_num_threads(threads)


def set_learning_rates(session: Session, step: int) -> float:
    """Sets the optimizer's learning rates for a step; returns the denoiser's."""
    factor = learning_rate_factor(
        step,
        total_steps=session.plan.total_steps,
        warmup_steps=session.plan.warmup_steps,
        schedule=session.config.optimizer.schedule,
    )
    factor *= session.slowdown
    for group in session.engine.optimizer.param_groups:
        stopped = group["component"] != "denoiser" and step >= session.texts.stops
        group["lr"] = 0.0 if stopped else group["base_lr"] * factor
    return session.rates["denoiser"] * factor


def step_gradients(session: Session, step: int, stop: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Computes a step's gradients; returns loss and wish to stop, as `accumulate` does, and the pictures' names."""
    plan, world = session.plan, session.world
    session.engine.begin()
    for component in session.parts.components.values():
        if not component.training:  # after samples; to visit all modules takes milliseconds
            component.train()
    epoch, index = divmod(step, plan.steps_per_epoch)
    order = session.dataset.batches(epoch, plan.batch_size)
    batches = order[index * plan.accumulation : (index + 1) * plan.accumulation]
    names = [session.dataset.examples[sample.example].path.name for batch in batches for sample in batch]
    slots = cut(batches, share=plan.share, rank=world.rank, micro_batch=session.micro_batch)
    # Each picture counts the same, however the step is cut into batches.
    part = 1 / len(names)
    loss, asked = accumulate(
        slots, lambda piece: _compute(session, step, piece, part), session.engine.flat.gradients, world, stop
    )
    return loss, asked, names


def _compute(session: Session, step: int, piece: Piece, part: float) -> Tensor:
    """Adds the gradients of some pictures to those of the step; returns their part of its loss, on the device."""
    torch.manual_seed(generator(session.config.train.seed, "dropout", step, piece.positions[0]).initial_seed())
    return session.engine.add(session.microbatch(step, piece), part)


@dataclass(frozen=True)
class _Numbers:
    """What came of a step; loss and norm may still be under way on the device."""

    step: int
    rate: float
    loss: Tensor
    norm: Tensor
    asked: Tensor
    names: list[str]


class _NotFinite(TrainingError):
    """Several steps in a row had a loss or gradient that is not finite."""


class _Watch:
    """Reads a step's numbers once the next one is under way, shows them, and gives up after several bad ones.

    Attributes:
        meter: of the numbers shown.
    """

    def __init__(self, session: Session, meter: Meter, reporter: Reporter, stop: StopSignal) -> None:
        self.session, self.meter, self.reporter, self.stop = session, meter, reporter, stop
        self._asked = False
        self._waiting: _Numbers | None = None
        self._bad = 0

    @property
    def stopping(self) -> bool:
        """Whether to stop. Several processes stop together, by what came with a step's sums."""
        return self.stop.requested if self.session.world.size == 1 else self._asked

    def note(self, numbers: _Numbers) -> None:
        """Takes the numbers of a step, and reads those of the step before; on a CPU both."""
        self.catch_up()
        self._waiting = numbers
        if numbers.loss.device.type == "cpu":
            self.catch_up()

    def catch_up(self) -> None:
        """Reads what was not read yet.

        Raises:
            _NotFinite: after several bad steps in a row.
        """
        numbers, self._waiting = self._waiting, None
        if numbers is None:
            return
        step, loss, norm = numbers.step, float(numbers.loss), float(numbers.norm)
        self._asked = self._asked or bool(numbers.asked)
        self.meter.add(loss, len(numbers.names))
        self.session.log(
            {
                "step": step,
                "epoch": (step - 1) // self.session.plan.steps_per_epoch + 1,
                "loss": loss,
                "learning_rate": numbers.rate,
                "gradient_norm": norm,
                "images_per_second": round(self.meter.images_per_second, 2),
            }
        )
        previews = self.session.previews
        self.reporter.advance(self.meter.note(step, numbers.rate, previews.seconds if previews else 0.0))
        finite = math.isfinite(loss) and math.isfinite(norm)
        self._bad = 0 if finite else self._bad + 1
        if not finite:
            self._tell(step, ", ".join(numbers.names[:4]))

    def _tell(self, step: int, names: str) -> None:
        """Tells of a step that was skipped, and gives up after several in a row."""
        session = self.session
        scaled = session.engine.scale is not None  # then an overflow is usual, and lowers the scale
        if not scaled:
            self.reporter.warn(f"step {step} skipped: its loss or gradient is not finite (pictures: {names})")
        if self._bad >= (10 * MAX_BAD_STEPS if scaled else MAX_BAD_STEPS):
            rate = session.rates["denoiser"] * session.slowdown
            raise _NotFinite(
                f"loss or gradient not finite in {self._bad} steps in a row, last in step {step} ({names}); "
                f"lower the learning rate (now {rate:.2g}), use --precision fp32, or look at these pictures.\n"
                f"Everything up to the last checkpoint is kept in {session.run.root}"
            )


def _go_back(session: Session, trouble: _NotFinite, saved: int, reporter: Reporter) -> int:
    """Takes up the last checkpoint with half the learning rate, once in a run; returns its step.

    Raises:
        TrainingError: if that was done already, or there is no checkpoint.
    """
    reporter.end()
    if session.slowdown < 1 or not saved:
        raise trouble
    session.world.barrier()
    checkpoint, _ = latest_checkpoint(session.run.checkpoints)
    session.resume(checkpoint)
    session.slowdown = 0.5
    reporter.warn(
        f"{trouble}\nGoing back to step {checkpoint.step} with half the learning rate; next time the run ends"
    )
    return checkpoint.step


def _halt(session: Session, step: int, reporter: Reporter) -> int | None:
    """Writes what is due in between: LoRA file, checkpoint, samples; returns the step if it has a checkpoint now."""
    plan, saves = session.plan, session.plan.saves_after(step - 1)
    epoch = step // plan.steps_per_epoch
    file = session.run.epoch_lora(epoch)
    if session.world.is_first:
        session.write(lambda: session.exporter.export(file, step))
    if saves:
        session.save(step)
    if session.previews and plan.samples_after(step - 1):
        session.previews.with_lora(file, epoch, reporter)
    return step if saves else None


def _finish(session: Session, step: int, interrupted: bool, started: float, reporter: Reporter) -> Result:
    """Writes what a run leaves: checkpoint, certified LoRA file, side files, last samples and the overview."""
    plan, run, previews = session.plan, session.run, session.previews
    finished = step == plan.total_steps
    session.save(step)
    if session.board:
        session.board.close()
    file = run.lora if finished else run.root / f"{run.name}-step{step:08d}.safetensors"
    give_up_reserve(run.root)
    certificate = session.write(lambda: session.exporter.export(file, step))
    preview, samples = None, None
    if previews and finished:
        images = previews.with_lora(file, plan.num_epochs, reporter, final=True)
        if images:
            preview, samples = images[0], previews.grid_path(plan.num_epochs)
            previews.overview()
    session.write(lambda: session.exporter.sidecars(file, preview))
    losses = run.losses()
    tenth = max(1, len(losses) // 10)
    return Result(
        folder=run.root,
        lora=file,
        steps=step,
        total_steps=plan.total_steps,
        interrupted=interrupted,
        loss_start=_mean(losses[:tenth]),
        loss_end=_mean(losses[-tenth:]),
        seconds=time.monotonic() - started,
        samples=samples,
        certificate=certificate,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
