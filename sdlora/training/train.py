"""The loop: from settings to a certified LoRA file. `train` reads from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sdlora.config import Config
from sdlora.data.dataset import Batch
from sdlora.diffusion.noise import generator
from sdlora.errors import TrainingError
from sdlora.files.certify import Certificate
from sdlora.training.folder import RunFolder
from sdlora.training.interrupt import StopSignal
from sdlora.training.lr import learning_rate_factor
from sdlora.training.meter import Meter
from sdlora.training.progress import Reporter
from sdlora.training.session import Session
from sdlora.training.setup import set_up
from sdlora.training.step import draw, sample_losses

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


def train(config: Config, *, resume: RunFolder | None = None, reporter: Reporter | None = None) -> Result:
    """Trains a LoRA.

    Args:
        config: the settings; `data.images` must be given.
        resume: the folder of a run to go on with, opened by `sdlora.training.folder.reopen`.
        reporter: told what happens; silent if left out.

    Raises:
        SdloraError: anything the user can fix; what was learned up to the last checkpoint is kept.
    """
    started = time.monotonic()
    reporter = reporter or Reporter()
    threads = torch.get_num_threads()
    try:
        session = set_up(config, resume, reporter)
        plan, run, previews = session.plan, session.run, session.previews
        if previews:
            previews.without(reporter)
        stop = StopSignal()
        if previews:
            previews.stopped = lambda: stop.requested
        meter = Meter(plan)
        step, saved, bad = session.start, session.start, 0
        with stop.listening():
            reporter.begin("training", plan.total_steps, step)
            while step < plan.total_steps and step != config.train.stop_at and not stop.requested:
                # Gradients and update.
                rate = _set_learning_rates(session, step)
                loss, samples, names = _accumulate(session, step)
                norm = _update(session, loss)
                finite = math.isfinite(loss) and math.isfinite(norm)
                bad = 0 if finite else bad + 1
                step += 1

                # What the user sees of it.
                meter.add(loss, samples)
                session.log(
                    {
                        "step": step,
                        "epoch": (step - 1) // plan.steps_per_epoch + 1,
                        "loss": loss,
                        "learning_rate": rate,
                        "gradient_norm": norm,
                        "images_per_second": round(meter.images_per_second, 2),
                    }
                )
                reporter.advance(meter.note(step, rate, previews.seconds if previews else 0.0))
                if not finite:
                    _report_bad_step(session, step, bad, names, saved, reporter)

                # Once in a while: LoRA file, checkpoint, samples. The last step's come below.
                if step < plan.total_steps and (plan.saves_after(step - 1) or plan.samples_after(step - 1)):
                    reporter.end()
                    epoch = step // plan.steps_per_epoch
                    file = run.epoch_lora(epoch)
                    session.exporter.export(file, step)
                    if plan.saves_after(step - 1):
                        session.save(step)
                        saved = step
                    if previews and plan.samples_after(step - 1):
                        previews.with_lora(file, epoch, reporter)
                    reporter.begin("training", plan.total_steps, step)
                    meter.skip_pause()
            reporter.end()
            return _finish(session, step, stop.requested, started, reporter)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory with batches of {config.data.batch_size}; in this order, try --gradient-checkpointing, "
            "a smaller --batch-size with --accumulation to make up for it, a smaller --resolution"
        ) from error
    finally:
        reporter.end()
        torch.set_num_threads(threads)


def _set_learning_rates(session: Session, step: int) -> float:
    factor = learning_rate_factor(
        step,
        total_steps=session.plan.total_steps,
        warmup_steps=session.plan.warmup_steps,
        schedule=session.config.optimizer.schedule,
    )
    for group in session.optimizer.param_groups:
        stopped = group["component"] != "denoiser" and step >= session.texts.stops
        group["lr"] = 0.0 if stopped else group["base_lr"] * factor
    return session.rates["denoiser"] * factor


def _accumulate(session: Session, step: int) -> tuple[float, int, list[str]]:
    """Adds up the gradients of a step's batches; returns its loss, number of samples and the pictures' names."""
    settings, parts = session.config.train, session.parts
    torch.manual_seed(generator(settings.seed, "dropout", step).initial_seed())
    for component in parts.components.values():
        component.train()
    loss, names = 0.0, []
    batches = list(_batches(session, step))
    total = sum(len(batch.examples) for batch in batches)
    for batch in batches:
        positions = range(len(names), len(names) + len(batch.examples))
        drawn = draw(
            batch.mean,
            batch.std,
            num_timesteps=len(parts.schedule),
            seed=settings.seed,
            step=step,
            positions=positions,
            noise_offset=settings.noise_offset,
        )
        with session.accelerator.autocast():
            conditioning = session.texts(batch.examples, step, positions) | parts.family.condition_sizes(batch.sizes)
            # Each picture counts the same, however the step is cut into batches.
            share = sample_losses(parts, drawn, conditioning, settings).sum() / total
        session.accelerator.backward(share)
        loss += share.item()
        names += [example.path.name for example in batch.examples]
    return loss, total, names


def _batches(session: Session, step: int) -> Iterator[Batch]:
    plan = session.plan
    epoch, index = divmod(step, plan.steps_per_epoch)
    order = session.dataset.batches(epoch, plan.batch_size)
    for samples in order[index * plan.accumulation : (index + 1) * plan.accumulation]:
        yield session.dataset.load(samples)


def _update(session: Session, loss: float) -> float:
    """Steps the optimizer, unless that would poison the weights; returns the gradient's norm before clipping."""
    limit = session.config.train.max_grad_norm or math.inf
    norm = session.accelerator.clip_grad_norm_(session.trainable, limit)
    norm = float(norm) if norm is not None else math.nan
    # With a loss scale an overflowing gradient is usual: the scaler then skips the step and lowers the scale.
    if session.accelerator.scaler is not None or (math.isfinite(loss) and math.isfinite(norm)):
        session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    return norm


def _report_bad_step(session: Session, step: int, bad: int, names: list[str], saved: int, reporter: Reporter) -> None:
    """Tells of a step that was skipped, and gives up after several in a row."""
    if session.accelerator.scaler is None:
        reporter.warn(f"step {step} skipped: its loss or gradient is not finite (pictures: {', '.join(names[:4])})")
    limit = MAX_BAD_STEPS if session.accelerator.scaler is None else 10 * MAX_BAD_STEPS
    if bad >= limit:
        raise TrainingError(
            f"loss or gradient not finite in {bad} steps in a row, last in step {step} ({', '.join(names[:4])}); "
            f"lower the learning rate (now {session.rates['denoiser']:.2g}) or use --precision fp32.\n"
            f"The state at step {saved} is kept in {session.run.root}"
        )


def _finish(session: Session, step: int, interrupted: bool, started: float, reporter: Reporter) -> Result:
    """Writes what a run leaves: checkpoint, certified LoRA file, side files, last samples and the overview."""
    plan, run, previews = session.plan, session.run, session.previews
    finished = step == plan.total_steps
    session.save(step)
    if session.board:
        session.board.close()
    file = run.lora if finished else run.root / f"{run.name}-step{step:08d}.safetensors"
    certificate = session.exporter.export(file, step)
    preview, samples = None, None
    if previews and finished:
        images = previews.with_lora(file, plan.num_epochs, reporter)
        if images:
            preview, samples = images[0], previews.grid_path(plan.num_epochs)
            previews.overview()
    session.exporter.sidecars(file, preview)
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
