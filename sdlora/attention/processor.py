"""Attention of a diffusers denoiser with the kernel of our choice, and without what Stable Diffusion never uses.

Legend: B batch, n tokens, m text tokens, c channels, H heads, d head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query (B, H, n, d), key, value (B, H, m, d) -> (B, H, n, d)."""


class Processor:
    """What diffusers calls for each attention layer.

    Args:
        kernel: computes softmax(Q K^T / sqrt(d)) V.

    Source: agrees with diffusers' `AttnProcessor2_0` for the layers of Stable Diffusion 1.x, 2.x and XL.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attends from hidden_states, (B, n, c), to the text, (B, m, D), or to themselves."""
        if attention_mask is not None:
            raise ValueError("this attention takes no mask; Stable Diffusion trains without one")
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = layer.to_q(hidden_states), layer.to_k(source), layer.to_v(source)
        heads = query.shape[0], -1, layer.heads, query.shape[-1] // layer.heads
        mixed = self.kernel(*(x.view(heads).transpose(1, 2) for x in (query, key, value)))
        return layer.to_out[0](mixed.transpose(1, 2).flatten(2))


# diffusers asks for it at every call, and working it out anew takes 2 % of a step of nano.
Processor.__call__.__signature__ = inspect.signature(Processor.__call__)  # type: ignore[attr-defined]


def plain(layer: Any) -> bool:
    """Tells whether a diffusers attention layer computes no more than `Processor` does."""
    odd = (layer.spatial_norm, layer.group_norm, layer.norm_q, layer.norm_k, layer.norm_cross, layer.added_kv_proj_dim)
    return (
        all(x is None or x is False for x in odd)
        and not layer.residual_connection
        and layer.rescale_output_factor == 1.0
        and getattr(layer.to_out[1], "p", 0.0) == 0.0
    )


def attend_with(kernel: Kernel, denoiser: Any) -> None:
    """Lets every plain attention layer of a denoiser compute with a kernel."""
    processor = Processor(kernel)
    for module in denoiser.modules():
        if hasattr(module, "set_processor") and hasattr(module, "to_q") and plain(module):
            module.processor = processor
