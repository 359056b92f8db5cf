"""Residual blocks of a diffusers denoiser without what Stable Diffusion never uses, above all a division by one.

The division is two operations in each block and two passes over its activations. What all blocks do to the time alike
is done once for all.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class PlainResnet(ResnetBlock2D):
    """What the residual blocks of Stable Diffusion 1.x, 2.x and XL compute.

    Attributes:
        time_is_activated: whether the time comes as the block would activate it first of all.

    Source: agrees to the last bit with diffusers' `ResnetBlock2D` where `is_plain`.
    """

    time_is_activated = False

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adds to the input, (B, i, h, w), what convolutions make of it and the time, (B, t); returns (B, o, h, w)."""
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        assert self.time_emb_proj is not None
        time = temb if self.time_is_activated else self.nonlinearity(temb)
        hidden = hidden + self.time_emb_proj(time)[:, :, None, None]
        hidden = self.conv2(self.nonlinearity(self.norm2(hidden)))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + hidden


def is_plain(block: ResnetBlock2D) -> bool:
    """Tells whether a residual block computes no more than `PlainResnet` does."""
    return (
        type(block) is ResnetBlock2D
        and block.upsample is None
        and block.downsample is None
        and block.time_emb_proj is not None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.output_scale_factor == 1.0
        and block.dropout.p == 0.0
    )


def simplify_resnets(denoiser: nn.Module) -> int:
    """Lets every plain residual block compute as `PlainResnet`, under its name; returns how many they are."""
    blocks = [module for module in denoiser.modules() if isinstance(module, ResnetBlock2D)]
    plain = [block for block in blocks if is_plain(block)]
    alike = len(plain) == len(blocks) and all(isinstance(block.nonlinearity, nn.SiLU) for block in blocks)
    shared = bool(plain) and alike and getattr(denoiser, "time_embed_act", 0) is None
    if shared:
        denoiser.time_embed_act = nn.SiLU()  # diffusers' place for what is done to the time
    for block in plain:
        block.__class__ = PlainResnet
        simple: Any = block
        simple.time_is_activated = shared
    return len(plain)
