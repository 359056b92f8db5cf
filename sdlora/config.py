"""Every setting, once: its name, default, range and what raising it does.

The command line flags, the TOML files, `sdlora defaults` and the metadata of a LoRA file are all derived from the
models in this file. Names are unique across sections, so that `rank` in `[lora]` is also the flag `--rank`.

Nothing derived is ever written back: `alpha = None` means "the rank" and is resolved where it is used, so the
configuration that a run stores is the one that the user gave.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo


def setting(default: Any, help: str, *, flag: str | None = None, common: bool = False, **limits: Any) -> Any:
    """Declares a setting.

    Args:
        default: the value when nothing is given; `None` means "derived", and the help says from what.
        help: one sentence; what it does, its unit, and what raising it does.
        flag: the command line flag where it differs from the name.
        common: whether `train --help` shows it; all others wait behind `--help-all`.
        **limits: pydantic bounds (`ge`, `gt`, `le`, `lt`).
    """
    return Field(default, description=help, json_schema_extra={"flag": flag, "common": common}, **limits)


def _level(value: Any) -> Any:
    return {"true": "all", "false": "none"}.get(str(value).lower(), value)


Switch = BeforeValidator(_level)
"""Marks a setting of several levels that was a switch once: true means all, false means none."""


def _require_size(text: str) -> str:
    if not re.fullmatch(r"auto|\d+(\.\d+)? ?[MG]B", text.strip(), re.IGNORECASE):
        raise ValueError("must be auto or a size such as 8GB or 7500MB")
    return text.strip()


class Section(BaseModel):
    """A frozen table of settings; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _no_null(cls, value: Any) -> Any:
        if isinstance(value, str | Path) and "\0" in str(value):  # no system has such names, and C ends there
            raise ValueError("must not hold the character U+0000")
        return value


class BaseSection(Section):
    """Which Stable Diffusion is trained."""

    model: str = setting(
        "auto",
        "the base model: auto, nano, sd15, sdxl, a .safetensors file, a diffusers folder or a hub id",
        flag="--base",
        common=True,
    )
    revision: str | None = setting(None, "branch, tag or commit of a base on the hub; default: its main branch")
    family: Literal["auto", "sd1", "sd2", "sdxl"] = setting(
        "auto", "what the base must be; auto reads it from the checkpoint, anything else is only checked against it"
    )
    vae: str | None = setting(
        None, "VAE to use instead of the base's: a .safetensors file, a diffusers folder, or taesd (small and fast)"
    )
    text_encoders: str | None = setting(
        None, "text encoders to use instead of the base's: a diffusers folder, or a single file that holds them"
    )
    allow_pickle: bool = setting(
        False, "convert a .ckpt base first; it is read without running its code, yet only use it for files you trust"
    )
    prediction: Literal["auto", "epsilon", "v_prediction"] = setting(
        "auto", "what the denoiser predicts; auto reads it from the checkpoint"
    )
    zero_snr: Literal["auto", "on", "off"] = setting(
        "auto", "whether the last timestep is pure noise (zero terminal SNR); auto reads it from the checkpoint"
    )
    max_tokens: int = setting(
        75,
        "tokens of a caption that are read, in pieces of 75: 75, 150, 225; more costs time at every step",
        ge=75,
        le=750,
        multiple_of=75,
    )
    clip_skip: int = setting(
        1, "text encoder layer to use, counted from the end; 2 is usual for anime models", ge=1, le=12
    )


class DataSection(Section):
    """The pictures, their captions and what happens to both."""

    images: Path | None = setting(None, "folder of pictures with captions beside them", common=True)
    trigger: str = setting("", "word put into every caption; typing it later calls the style", common=True)
    trigger_place: Literal["front", "end"] = setting(
        "front", 'where it stands: "mystyle, a castle" or, with --trigger "my style", "a castle, my style"'
    )
    resolution: int | None = setting(
        None,
        "side in pixels of a square picture; default: the base's own. Twice the side costs four times the time",
        ge=64,
        le=4096,
    )
    batch_size: int = setting(
        4, "pictures per step; more is smoother and needs more memory", common=True, ge=1, le=1024
    )
    caption_prefix: str = setting("", "text put in front of every caption, before a trigger word at its front")
    caption_suffix: str = setting("", "text put behind every caption, and behind a trigger word at its end")
    caption_dropout: float = setting(
        0.1,
        "share of samples trained without a caption; more makes the style appear without being asked for",
        ge=0,
        le=1,
    )
    shuffle_tags: bool = setting(False, "shuffle the comma-separated parts of a caption at every use")
    keep_tags: int = setting(0, "how many leading parts of a caption are never shuffled", ge=0, le=100)
    buckets: bool = setting(True, "keep each picture's aspect ratio; off: crop everything to a square")
    max_upscale: float = setting(
        2.0, "largest enlargement of a small picture; beyond it the picture trains at a smaller size", ge=1, le=16
    )
    crop: Literal["center", "random"] = setting("center", "where a picture that does not fit its bucket is cut")
    num_crops: int = setting(4, "how many random crops of each picture are cached (crop = random)", ge=1, le=64)
    flip: bool = setting(False, "train on mirrored pictures too; not for styles with writing")
    background: str = setting("white", "colour put behind transparent pictures: a name or #rrggbb")
    cache_dir: Path | None = setting(None, "where latents and text states are kept; default: the user's cache folder")


class LoraSection(Section):
    """The update that is learned."""

    rank: int = setting(
        16, "rank of the update; higher learns more, the file grows with it", common=True, ge=1, le=1024
    )
    alpha: float | None = setting(
        None, "the update is scaled by alpha / rank; default: the rank, a scale of 1", gt=0, le=4096
    )
    targets: Literal["attention", "attention+ff", "conv"] = setting(
        "attention+ff",
        "which layers learn: attention only, also feed-forward and projections, or also the convolutions",
    )
    conv_rank: int | None = setting(
        None, "rank in k x k convolutions (targets = conv); default: the rank", ge=1, le=1024
    )
    conv_alpha: float | None = setting(None, "alpha in k x k convolutions; default: conv_rank", gt=0, le=4096)
    dropout: float = setting(0.0, "share of a layer's inputs hidden from the update while training", ge=0, lt=1)
    text_encoder: bool = setting(
        False,
        "also train the text encoders; faster at first, forgets words sooner",
        flag="--train-text-encoder",
    )
    text_encoder_stop: float = setting(
        1.0, "share of the steps after which the text encoders stop learning; less keeps more words", gt=0, le=1
    )


class TrainSection(Section):
    """The loop."""

    epochs: int | None = setting(None, "passes over the pictures", common=True, ge=1)
    steps: int | None = setting(
        None, "optimizer steps; default: derived from the number of pictures", common=True, ge=1
    )
    seed: int = setting(42, "same seed, same machine: the same file, byte for byte", ge=0, lt=2**32)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "arithmetic of the base; the LoRA itself is always fp32. auto: bf16 where the hardware has it"
    )
    accumulation: int = setting(
        1, "batches summed into one step; acts like a larger batch without its memory", ge=1, le=1024
    )
    micro_batch: int | None = setting(
        None,
        "pictures computed at once; default: a whole batch. Less needs less memory and takes longer. On a CPU, N "
        "processes with batches of b give, bit for bit, what one gives with batches of N * b and micro_batch = b",
        ge=1,
    )
    max_grad_norm: float = setting(1.0, "gradients longer than this are shortened to it; 0 switches it off", ge=0)
    gradient_checkpointing: Annotated[Literal["auto", "none", "attention", "all"], Switch] = setting(
        "auto",
        "recompute activations of attention blocks, or of all blocks: much less memory, up to 30 % more time; auto: as "
        "the memory requires",
    )
    memory: Annotated[str, AfterValidator(_require_size)] = setting(
        "auto",
        "memory to stay within, e.g. 8GB; auto: what is free. Where it is too little, the fastest way of saving that "
        "suffices is taken",
    )
    base_dtype: Literal["auto", "bf16", "fp8", "int8", "nf4"] = setting(
        "auto",
        "number format in which the frozen base is kept; fewer bits need less memory, more time, and round the base. "
        "auto: that of the arithmetic, less where memory requires it",
    )
    offload: Literal["auto", "on", "off"] = setting(
        "auto",
        "on a GPU, keep the frozen base in main memory and fetch it block by block: least memory, slowest; auto: if "
        "nothing else is enough",
    )
    attention: Literal["auto", "sdpa", "xformers"] = setting(
        "auto", "attention implementation; sdpa: torch's own; auto: for each size the kernel that is quickest here"
    )
    cuda_graph: Literal["auto", "on", "off"] = setting(
        "auto",
        "on CUDA, record a step's kernels once for each kind of batch and start them together; auto: where that is "
        "possible and a recorded step computes the same",
    )
    deterministic: bool = setting(
        False,
        "on CUDA, take only kernels that sum in a fixed order, so that a run repeats, and a resumed one equals an "
        "uninterrupted one, bit for bit; slower. On a CPU that is always so",
    )
    pack_weights: Literal["auto", "on", "off"] = setting(
        "auto",
        "on a CPU, keep the base's weights in the order that they are multiplied in: faster, twice their memory more",
    )
    min_snr_gamma: float = setting(
        5.0, "caps the loss weight of nearly clean pictures (Hang et al. 2023); 0 switches it off", ge=0
    )
    noise_offset: float = setting(
        0.0, "adds brightness noise of this size per channel; 0.03 to 0.1 helps very dark or bright styles", ge=0, le=1
    )
    threads: int | None = setting(
        None, "CPU threads; default: one for the embedded base, whose operations are too small to share, else all", ge=1
    )
    stop_at: int | None = setting(None, "stop after this many steps as Ctrl-C would; --resume goes on from there", ge=1)


class OptimizerSection(Section):
    """How gradients become updates."""

    optimizer: Literal["adamw", "adamw8bit"] = setting(
        "adamw", "the optimizer; adamw8bit keeps moments of 8 bits, which saves little, for a LoRA has few numbers"
    )
    learning_rate: float | None = setting(
        None,
        "step size; default: 1e-4 at SD 1.5's width, more for narrower denoisers. Too high breaks the picture",
        gt=0,
        le=10,
    )
    text_encoder_learning_rate: float | None = setting(
        None, "step size of the text encoder's update; default: half the learning rate", gt=0, le=10
    )
    weight_decay: float = setting(0.01, "pulls the update towards zero", ge=0, le=1)
    beta1: float = setting(0.9, "memory of the mean gradient", ge=0, lt=1)
    beta2: float = setting(0.99, "memory of the gradient's size", ge=0, lt=1)
    schedule: Literal["cosine", "constant", "linear"] = setting(
        "cosine", "course of the learning rate after the warm-up"
    )
    warmup: float = setting(0.05, "share of all steps in which the learning rate climbs from zero", ge=0, le=1)


class SamplesSection(Section):
    """Pictures drawn while training, with and without the LoRA."""

    sample_prompts: list[str] | Path | None = setting(
        None, "prompts, or a file of them, one a line; default: two captions and two general subjects"
    )
    sample_every: int | None = setting(
        None, "epochs between samples, 0 for none; default: every epoch, but at most ten times a run", ge=0
    )
    sample_steps: int = setting(20, "denoising steps of a sample", ge=1, le=1000)
    sample_cfg: float | None = setting(
        None, "how strictly a sample follows its prompt (CFG scale); default: 5, with nano 1.5", ge=1, le=50
    )
    sampler: str = setting("DPM++ 2M", "sampler, named as in the WebUI")
    sample_seed: int = setting(1, "seed of the first sample; the next one takes the next number", ge=0, lt=2**32)
    negative_prompt: str = setting("", "what samples should not show")
    sample_vae: Literal["taesd", "full"] = setting(
        "taesd",
        "VAE of the samples drawn on the way: taesd, small and fast, or full, the base's own, which the last ones get "
        "anyway",
    )


class OutputSection(Section):
    """What is written, and where."""

    output: Path | None = setting(None, "folder of the run; default: runs/<images>-<time>", common=True)
    name: str | None = setting(None, "name of the LoRA file; default: the image folder's name")
    save_every: int | None = setting(
        None, "epochs between saved LoRA files and checkpoints; default: as often as samples are drawn", ge=1
    )
    keep_checkpoints: int = setting(2, "how many checkpoints (for --resume) are kept", ge=1)
    tensorboard: bool = setting(
        False, "also write TensorBoard events into the run's folder (needs sdlora[tensorboard])"
    )
    save_dtype: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16", "number format of the LoRA file; fp16 loads everywhere"
    )


class Config(Section):
    """A whole run. Immutable; build it with `sdlora.config_io.load_config`."""

    base: BaseSection = BaseSection()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    samples: SamplesSection = SamplesSection()
    output: OutputSection = OutputSection()


class Setting(BaseModel):
    """One row of the table of all settings.

    Attributes:
        section: table it stands in, e.g. `lora`.
        key: its name there, unique over all sections.
        flag: its command line flag.
        common: whether `train --help` shows it.
        field: pydantic's description of it.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    section: str
    key: str
    flag: str
    common: bool
    field: FieldInfo

    @property
    def path(self) -> str:
        """`section.key`, as `--set` and error messages spell it."""
        return f"{self.section}.{self.key}"


def all_settings() -> Iterator[Setting]:
    """Yields every setting in the order of this file."""
    for section, section_field in Config.model_fields.items():
        for key, field in _fields(section_field).items():
            extra: Any = field.json_schema_extra
            flag = extra["flag"] or "--" + key.replace("_", "-")
            yield Setting(section=section, key=key, flag=flag, common=extra["common"], field=field)


def _fields(section_field: FieldInfo) -> dict[str, FieldInfo]:
    annotation: Any = section_field.annotation
    return annotation.model_fields
