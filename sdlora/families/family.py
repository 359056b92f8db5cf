"""What a base model is: data first, a few plain functions second, no inheritance.

Legend: B batch, C latent channels, h w latent size, H W pixel size, L tokens, D width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.adapters import Adapter, Target
from sdlora.diffusion.schedule import Schedule
from sdlora.weights import moved

Conditioning = dict[str, Tensor]
"""What the denoiser is told besides the noisy latents, each tensor with the batch in front.

`states`, (B, L, D): the text encoders' hidden states. SDXL also has `pooled`, (B, P): the text as a whole, and `sizes`,
(B, 6): height and width of the picture before it was resized, top and left of the crop, height and width it trains at.
"""


@dataclass(frozen=True)
class PictureSize:
    """How a training picture came to its size, in pixels.

    Attributes:
        original: (height, width) of the file.
        crop: (top, left) of the place that was cut out of the resized picture.
        target: (height, width) of that place.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """One text encoder of a family.

    Attributes:
        component: its name in `Parts` and in a diffusers folder.
        lora_prefix: of its modules' names in kohya files.
        cls: transformers' class.
        config: configuration at full size.
        layer: which layer the denoiser sees, counted from the end, 1 is the last.
        normed: whether that layer goes through the final layer norm.
        pooled: whether it also gives `pooled`.
        pad: token behind the end of a short text.
        original: prefix of its keys in a single-file checkpoint.
        open_clip: whether the keys behind that prefix are OpenCLIP's, see `names.open_clip`.
    """

    component: str
    lora_prefix: str
    cls: type[nn.Module]
    config: Mapping[str, Any]
    layer: int = 1
    normed: bool = True
    pooled: bool = False
    pad: str
    original: str
    open_clip: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of base model.

    Attributes:
        name: `sd1`, `sd2` or `sdxl`.
        title: in words, e.g. Stable Diffusion 1.x.
        denoiser_config: of the denoiser at full size.
        vae_config: of the VAE at full size.
        scheduler_config: noise schedule of the original checkpoint.
        text_encoders: one or two; their states are put side by side in this order.
        plain_up: indices of the denoiser's up blocks that have no attention.
        targets: layers of the denoiser by the words of `lora.targets`.
        text_encoder_targets: layers of a text encoder.
        metadata: `ss_base_model_version` and the `modelspec.*` facts that loaders go by.
        v_metadata: what of it is different for v-prediction.
        encode_prompts: texts -> Conditioning, gradients flowing into the text encoders if they train.
        condition_sizes: what the denoiser is told of B pictures' sizes; empty where it is told nothing.
        denoise: what the denoiser predicts, (B, C, h, w).
        encode_images: pixels (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the scaled latents, each
            (B, C, h, w); the deviation is `None` where the VAE is deterministic.
        decode_latents: scaled latents -> pixels in [-1, 1].
        lora_key: (component, module path) -> module name in a kohya file.
    """

    name: str
    title: str
    denoiser_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    text_encoders: tuple[TextEncoder, ...]
    plain_up: tuple[int, ...]
    targets: Mapping[str, tuple[Target, ...]]
    text_encoder_targets: tuple[Target, ...]
    metadata: Mapping[str, str]
    v_metadata: Mapping[str, str]
    encode_prompts: Callable[..., Conditioning]
    condition_sizes: Callable[[Sequence[PictureSize]], Conditioning]
    denoise: Callable[[Parts, Tensor, Tensor, Conditioning], Tensor]
    encode_images: Callable[[Parts, Tensor], tuple[Tensor, Tensor | None]]
    decode_latents: Callable[[Parts, Tensor], Tensor]
    lora_key: Callable[[str, str], str]

    @property
    def denoiser_width(self) -> int:
        """Channels of the widest block of the denoiser at full size; scales the learning rate."""
        return max(self.denoiser_config["block_out_channels"])

    def facts(self, prediction: str) -> dict[str, str]:
        """Returns what loaders tell a file's kind by: the family's `ss_*` and `modelspec.*` facts.

        Args:
            prediction: "epsilon" or "v_prediction".
        """
        return {**self.metadata, **(self.v_metadata if prediction == "v_prediction" else {})}


@dataclass(kw_only=True)
class Parts:
    """The loaded modules of one base model.

    Attributes:
        family: the kind of model.
        name: what the user calls it: an alias, a hub id, or a path as it was written.
        denoiser: the UNet.
        vae: pictures <-> latents.
        text_encoders: by component name, e.g. `text_encoder`.
        tokenizers: by the same names.
        schedule: noise schedule and prediction type, read from the checkpoint.
        scheduler_config: the checkpoint's scheduler configuration, for samplers.
        resolution: side in pixels of the square pictures that it was trained on.
        vae_factor: pixels per latent, 8.
        notes: what the user should know of how it was read, a sentence each.
    """

    family: Family
    name: str
    denoiser: nn.Module
    vae: nn.Module
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    schedule: Schedule
    scheduler_config: dict[str, Any]
    resolution: int
    vae_factor: int = 8
    notes: list[str] = field(default_factory=list)

    @property
    def components(self) -> dict[str, nn.Module]:
        """The modules that can carry a LoRA, by component name; `denoiser` first."""
        return {"denoiser": self.denoiser, **self.text_encoders}

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's number format; factors of adapters have another."""
        frozen = (m for m in self.denoiser.modules() if not isinstance(m, Adapter))
        return next(p.dtype for module in frozen for p in module.parameters(recurse=False))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Parts:
        """Moves everything to a device. The VAE stays fp32: in fp16 some VAEs overflow to black pictures."""
        for module in self.components.values():
            moved(module, device, dtype)
        moved(self.vae, device, torch.float32)
        self.schedule = self.schedule.to(device)
        return self
