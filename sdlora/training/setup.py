"""Everything that a run needs before its first step, built in order; what is cheap and can go wrong comes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sdlora.adapters import FlatParameters, Lora, Target, find_layers, inject
from sdlora.allocator import return_freed_memory
from sdlora.attention.choose import Fastest
from sdlora.config import Config
from sdlora.data.cache import Cache, fingerprint
from sdlora.data.dataset import Dataset, bucket_counts, prepare
from sdlora.data.folder import MAX_REASONS, Scan, scan
from sdlora.diffusion.noise import generator
from sdlora.errors import ConfigError
from sdlora.families import (
    Base,
    Parts,
    identify,
    load_parts,
    native_cfg,
    native_resolution,
    native_width,
    resolve_base,
)
from sdlora.families.chunks import CHUNK
from sdlora.sampling.prompts import Prompt
from sdlora.training.accumulate import cut
from sdlora.training.board import Board, require_tensorboard
from sdlora.training.checkpoint import Checkpoint, latest_checkpoint
from sdlora.training.cuda import choose_memory_format, prepare_cuda, store_convolutions
from sdlora.training.device import choose_threads
from sdlora.training.engine import Engine
from sdlora.training.export import Exporter
from sdlora.training.folder import RunFolder, choose_folder, claim, require_space
from sdlora.training.graph import record_steps
from sdlora.training.kernels import choose_packing, install_attention, pack
from sdlora.training.optimizers import make_optimizer, resolve_learning_rates
from sdlora.training.plan import Plan, make_plan
from sdlora.training.precision import Precision, choose_attention, choose_device, choose_precision
from sdlora.training.previews import Previews, sample_prompts
from sdlora.training.progress import Reporter
from sdlora.training.resnet import simplify_resnets
from sdlora.training.room import leave_device, make_ladder
from sdlora.training.room_on_disk import reserve
from sdlora.training.session import Adapters, Session
from sdlora.training.texts import Texts
from sdlora.training.world import World

SHARE_FOR_DATA = 0.05
"""Of the free GPU memory, at most so much goes to latents, and as much to text states; else they stay outside."""


@dataclass(frozen=True)
class Groundwork:
    """What a run is to be, known before anything heavy is loaded.

    Attributes:
        cache: where what was computed is kept.
        pictures: the folder's pictures and captions.
        run: where the run's files go.
        device: on which it trains.
        base: where the base lies.
        precision: in which number format.
        attention: its kind, and why that.
        counts: pictures by size.
        plan: how many steps of what.
        prompts: for the sample pictures.
        checkpoint: with which the run goes on.
    """

    cache: Cache
    pictures: Scan
    run: RunFolder
    device: torch.device
    base: Base
    precision: Precision
    attention: tuple[str, str]
    counts: Mapping[tuple[int, int], int]
    plan: Plan
    prompts: list[Prompt]
    checkpoint: Checkpoint | None


def _lay_groundwork(config: Config, resume: RunFolder | None, reporter: Reporter, world: World) -> Groundwork:
    """Finds pictures, machine, base and length, before anything heavy is fetched or loaded."""
    if config.data.images is None:
        raise ConfigError("no pictures: give --images FOLDER")
    if config.output.tensorboard:
        require_tensorboard()
    cache = Cache(config.data.cache_dir)
    pictures = scan(config.data.images, config.data.trigger, config.data.background, cache=cache)
    reporter.say(pictures.summary())
    for name, reason in list(pictures.unreadable.items())[:MAX_REASONS]:
        reporter.warn(f"{name}: {reason}")
    if resume and resume.changes:
        reporter.say(f"Changed since this run was begun: {', '.join(resume.changes)}")
    run = resume or world.first(lambda: choose_folder(config))
    device = choose_device(world.device)
    prepare_cuda(config.train.deterministic)
    with world.first_then_others():
        base = _find_base(config, cache, reporter)
    precision = choose_precision(config.train.precision, device, native_width(base.path))
    attention = choose_attention(config.train.attention, device, precision.dtype)
    resolution = config.data.resolution or native_resolution(base.path)
    num_pictures, counts = bucket_counts(pictures.examples, config.data, resolution)
    plan = make_plan(config, num_pictures, counts.values(), world.size)
    reporter.say(plan.sentence())
    prompts = []
    if plan.sample_every:
        prompts = sample_prompts(config, pictures.examples, resolution, native_cfg(base.path))
    checkpoint = _newest(resume, plan, reporter, world) if resume else None
    return Groundwork(cache, pictures, run, device, base, precision, attention, counts, plan, prompts, checkpoint)


def _load_base(config: Config, ground: Groundwork, reporter: Reporter) -> tuple[Parts, Fastest | None]:
    """Loads the base and chooses its attention; returns what chooses among kernels too, if anything does."""
    precision = ground.precision
    parts = load_parts(ground.base, config.base, device=ground.device, dtype=precision.dtype)
    for note in parts.notes:
        reporter.say(note)
    choose_threads(parts, config.train.threads)
    with torch.no_grad():
        parts.family.encode_prompts(parts, [""], config.base.clip_skip)  # fails now if the encoder has fewer layers
    kernels, said = _install_attention(parts, config, ground.cache, *ground.attention)
    reporter.say(f"Precision: {precision.word} ({precision.reason}). Attention: {said}.")
    return parts, kernels


def _prepare_data(
    config: Config, ground: Groundwork, parts: Parts, reporter: Reporter, world: World
) -> tuple[Dataset, Texts]:
    """Encodes pictures and captions, or finds what was encoded before."""
    reporter.begin("caching latents", len(ground.pictures.examples))
    dataset = prepare(
        parts,
        ground.pictures,
        config.data,
        config.train.seed,
        ground.cache,
        lambda done, total: reporter.advance(),
        rank=world.rank,
        world_size=world.size,
        barrier=world.barrier,
    )
    reporter.end()
    texts = Texts(parts, config, ground.cache, ground.plan.total_steps)
    prompt_notes = [note for prompt in ground.prompts for note in prompt.notes]
    for note in (*dataset.notes, *_overlong(texts, dataset), *prompt_notes, *texts.notes):
        reporter.warn(note)
    return dataset, texts


def set_up(config: Config, resume: RunFolder | None, reporter: Reporter, world: World | None = None) -> Session:
    """Builds a session; what is cheap and can go wrong comes first.

    Args:
        config: the settings; `data.images` must be given.
        resume: the folder of a run to go on with.
        reporter: told what is found and chosen.
        world: the processes that train together; left out, this one alone.

    Raises:
        SdloraError: anything the user can fix.
    """
    world = world or World.single()
    ground = _lay_groundwork(config, resume, reporter, world)
    run, plan, precision, checkpoint = ground.run, ground.plan, ground.precision, ground.checkpoint
    parts, kernels = _load_base(config, ground, reporter)
    dataset, texts = _prepare_data(config, ground, parts, reporter, world)

    # What trains.
    prints = (fingerprint(parts.denoiser, ground.cache), texts.states.fingerprint, fingerprint(parts.vae, ground.cache))
    adapters = attach_adapters(parts, config)
    simplify_resnets(parts.denoiser)  # from here on, for targets name the layers by the class of their block
    flat = FlatParameters({c: by_path.values() for c, by_path in adapters.items()}, precision.dtype)
    rates = resolve_learning_rates(config, parts)
    optimizer = make_optimizer(flat, rates, config.optimizer)
    reporter.say(_describe(adapters, rates, config))
    previews = None
    if ground.prompts and world.is_first:
        vae = config.samples.sample_vae
        previews = Previews(parts, adapters, ground.prompts, run.samples, config.base.clip_skip, vae=vae)
        previews.encode()
    _place_data(dataset, texts, config, ground.device)
    if ground.device.type != "cpu":
        # Shuffled texts are new at every step; their encoders are needed where they are quick.
        leave_device(parts, parts.text_encoders if config.data.shuffle_tags else adapters, ground.device)
    ladder = make_ladder(
        parts,
        config,
        adapters=adapters["denoiser"],
        numbers=flat.values.numel(),
        batch=plan.share,
        size=max(ground.counts, key=lambda size: size[0] * size[1]),
        texts=texts,
        recorded=checkpoint.facts.get("memory") if checkpoint else None,
        reporter=reporter,
        world=world,
    )
    _pack(parts, config, ladder.room, reporter)
    session = Session(
        config=config,
        run=run,
        plan=plan,
        parts=parts,
        dataset=dataset,
        texts=texts,
        adapters=adapters,
        engine=Engine(parts, flat, optimizer, config.train),
        kernels=kernels,
        rates=rates,
        base_digest=" ".join(prints),
        exporter=Exporter(config, parts, adapters, dataset, plan, rates, precision.word),
        previews=previews,
        world=world,
        ladder=ladder,
        reporter=reporter,
    )
    if checkpoint:
        session.resume(checkpoint)
        reporter.say(f"Resumed at step {session.start} of {plan.total_steps}")
    _record(session, reporter)
    world.require_same(session.facts())
    world.first(lambda: _require_space(run, plan, config, flat.values.numel()))
    world.first(lambda: claim(run, config, base=ground.base.name, anew=resume is None))
    if world.is_first:
        reserve(run.root, flat.values.numel() * (4 if config.output.save_dtype == "fp32" else 2))
    if config.output.tensorboard and world.is_first:
        session.board = Board(run.root / "tensorboard")
    reporter.say(f"Run folder: {run.root}")
    return_freed_memory()
    return session


def _install_attention(
    parts: Parts, config: Config, cache: Cache, name: str, reason: str
) -> tuple[Fastest | None, str]:
    """Puts the attention that was chosen to work; returns what chooses among kernels, if any, and what to say."""
    denoiser: Any = parts.denoiser
    if name == "xformers":
        denoiser.enable_xformers_memory_efficient_attention()
        return None, f"{name} ({reason})"
    choose = config.train.attention == "auto" and (parts.device.type == "cpu" or not config.train.deterministic)
    kernels = install_attention(denoiser, parts.dtype, cache, choose=choose)
    if kernels:
        reason = f"for each size what is quickest here of {', '.join(kernels.candidates)}"
    return kernels, f"{name} ({reason})"


def _pack(parts: Parts, config: Config, room: int | None, reporter: Reporter) -> None:
    """Packs the denoiser's weights where that is wanted and fits, and says so."""
    wanted, device = config.train.pack_weights, parts.device
    packs, why = choose_packing(parts.denoiser, wanted, device, room)
    if packs:
        pack(parts.denoiser)
    if device.type == "cpu":
        reporter.say(f"Weights {'packed' if packs else 'not packed'} for oneDNN: {why}.")
    elif wanted == "on":
        reporter.warn(f"train.pack_weights has no effect on {device.type}; it is for CPUs")


def _record(session: Session, reporter: Reporter) -> None:
    """On CUDA, chooses how convolutions lie and lets steps be recorded."""
    config, device = session.config, session.parts.device
    if device.type != "cuda":
        if config.train.cuda_graph == "on":
            raise ConfigError(f"train.cuda_graph is on, and this is {device.type}, not CUDA; use auto")
        return
    if not config.train.deterministic:
        _choose_layout(session, reporter)
    obstacles = ["the base waits in main memory"] if session.ladder.rung.offload else []
    recorded, why = record_steps(session.engine, config, reporter.warn, obstacles)
    reporter.say(f"CUDA graphs {'on' if recorded else 'off'}: {why}.")


def _choose_layout(session: Session, reporter: Reporter, **how: Any) -> None:
    """Tries on the first batch whether the denoiser is quicker channels-last; `how` as `choose_memory_format` takes."""
    rung, plan = session.ladder.rung, session.plan
    if rung.offload or rung.base_dtype != "auto":
        return  # such weights lie in ways of their own
    batches = session.dataset.batches(0, plan.batch_size)[:1]
    slot = cut(batches, share=plan.share, rank=session.world.rank, micro_batch=rung.micro_batch)[0]
    for component in session.parts.components.values():
        component.train()
    for piece in slot:
        session.engine.begin()
        try:
            better, why = choose_memory_format(session.engine, session.microbatch(0, piece), **how)
        except torch.OutOfMemoryError:  # then memory is dearer than time, and the first step will see to it
            store_convolutions(session.parts.denoiser, torch.contiguous_format)
            return
        reporter.say(f"Convolutions {'channels-last' if better else 'as they were'}: {why}.")


def attach_adapters(parts: Parts, config: Config) -> Adapters:
    """Puts LoRA into the denoiser and, if asked, the text encoders; everything else is frozen.

    The start values of each layer are a function of (seed, its name), so they do not depend on which other layers are
    adapted.
    """
    lora = config.lora
    targets: dict[str, tuple[Target, ...]] = {"denoiser": parts.family.targets[lora.targets]}
    if lora.text_encoder:
        targets |= dict.fromkeys(parts.text_encoders, parts.family.text_encoder_targets)

    def make(component: str, path: str, layer: nn.Module) -> Lora:
        wide = isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) != (1, 1)
        rank = (lora.conv_rank or lora.rank) if wide else lora.rank
        alpha = (lora.conv_alpha if lora.conv_rank or lora.conv_alpha else lora.alpha) if wide else lora.alpha
        return Lora(layer, rank, alpha, lora.dropout, generator(config.train.seed, "init", component, path))

    for module in (parts.vae, *parts.components.values()):
        module.requires_grad_(False)
    adapters: Adapters = {}
    for component, rules in targets.items():
        model = parts.components[component]
        layers = find_layers(model, rules)
        adapters[component] = inject(model, layers, lambda path, layer, c=component: make(c, path, layer))
    return adapters


def _place_data(dataset: Dataset, texts: Texts, config: Config, device: torch.device) -> None:
    """Makes text states that are sure to be used, and puts the data on the device where they take little of it."""
    budget = 0.0
    if device.type == "cuda":
        budget = SHARE_FOR_DATA * torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        dataset.to_device(device, budget)
    if config.data.shuffle_tags or config.lora.text_encoder:
        return
    used = [*([""] if config.data.caption_dropout else []), *(texts.whole(example) for example in dataset.examples)]
    texts.states.preload(used)
    if device.type == "cuda":
        texts.states.to_device(used, device, budget)


def _find_base(config: Config, cache: Cache, reporter: Reporter) -> Base:
    """Finds the base, and says which it is; a wrong family is an error already here."""
    wanted = config.base
    base = resolve_base(
        wanted.model, reporter.say, wanted.revision, allow_pickle=wanted.allow_pickle, cache_dir=cache.folder
    )
    reporter.say(f"Base: {base.name} ({identify(base.path, wanted.family).title}; {base.reason})")
    return base


def _newest(run: RunFolder, plan: Plan, reporter: Reporter, world: World) -> Checkpoint | None:
    if not any(run.checkpoints.glob("step-*")):
        reporter.say("The run was stopped before its first checkpoint; it begins again at step 0.")
        if world.is_first:
            run.forget_after(0)
        return None
    checkpoint, skipped = latest_checkpoint(run.checkpoints)
    for line in skipped:
        reporter.warn(line)
    if checkpoint.step > plan.total_steps or (checkpoint.step == plan.total_steps and run.is_complete):
        raise ConfigError(
            f"{run.root} is finished: {checkpoint.step} of {plan.total_steps} steps are done; give more with --steps"
        )
    before = checkpoint.facts.get("total_steps")
    if before != plan.total_steps:
        reporter.warn(
            f"the learning rate's course was planned for {before} steps and now for {plan.total_steps}, so this run "
            "will differ from one planned so from the start; to split a run exactly, use --stop-at"
        )
    batch = checkpoint.facts.get("batch_size", plan.batch_size)
    if batch != plan.batch_size:
        reporter.warn(
            f"a batch had {batch} pictures and now has {plan.batch_size} ({plan.processes} x {plan.share}), so this "
            f"run will differ from one that goes on as it was; {_same_batch(batch, plan.processes)}"
        )
    return checkpoint


def _same_batch(batch: int, processes: int) -> str:
    if batch % processes:
        return f"{processes} processes cannot share {batch} pictures evenly"
    return f"--batch-size {batch // processes} keeps it"


def _overlong(texts: Texts, dataset: Dataset) -> list[str]:
    names = texts.overlong(dataset.examples)
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [
        f"captions longer than {texts.num_chunks * CHUNK} tokens, their end has no effect (--max-tokens reads more): "
        f"{', '.join(names[:3])}{more}"
    ]


def _describe(adapters: Adapters, rates: Mapping[str, float], config: Config) -> str:
    count = sum(a.down.numel() + a.up.numel() for by_path in adapters.values() for a in by_path.values())
    layers = ", ".join(f"{len(by_path)} layers of the {c.replace('_', ' ')}" for c, by_path in adapters.items())
    alpha = config.lora.alpha or config.lora.rank
    rate = " and ".join(f"{rate:.2g}" for rate in dict.fromkeys(rates.values()))
    return f"LoRA: rank {config.lora.rank}, alpha {alpha:g}, in {layers}; {count:,} numbers train, learning rate {rate}"


def _require_space(run: RunFolder, plan: Plan, config: Config, numbers: int) -> None:
    bytes_each = 4 if config.output.save_dtype == "fp32" else 2
    files = 2 + plan.num_epochs // plan.save_every + (plan.num_epochs // plan.sample_every if plan.sample_every else 0)
    checkpoints = config.output.keep_checkpoints + 1  # the new one is written before the oldest goes
    require_space(run.root, numbers * (bytes_each * files + 12 * checkpoints))
