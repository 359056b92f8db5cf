"""An adapter: one frozen layer and a trainable change to it, as a real module that takes the layer's place.

Nothing in this room knows about diffusion; it works in any torch model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """Takes the place of `base`, holds it frozen and adds a change to what it computes.

    Subclasses implement `forward` and `delta_weight` so that both agree:
    `forward(x) == base_with(weight + strength * delta_weight())(x)`.

    Attributes:
        base: the layer that was replaced; may be an adapter itself (several LoRAs on one layer).
        strength: factor on the whole change; 0 gives the base exactly, 1 what was trained.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.strength = 1.0

    def delta_weight(self) -> Tensor:
        """Returns the change to the layer's weight at strength 1: fp32, in the weight's own shape."""
        raise NotImplementedError

    @property
    def layer(self) -> nn.Module:
        """The innermost replaced layer, which is never an adapter."""
        return self.base.layer if isinstance(self.base, Adapter) else self.base

    # Code in diffusers and transformers reads these of the layers it calls, mostly for their dtype.
    @property
    def weight(self) -> Tensor:
        """The frozen weight of the replaced layer."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias of the replaced layer."""
        bias = self.layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Adds the change, at the present strength, to the replaced layer's weight and returns that layer.

        The sum is taken in fp32 and rounded once to the weight's dtype.
        """
        inner = self.base.merge() if isinstance(self.base, Adapter) else self.base
        weight = inner.weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() + self.strength * self.delta_weight().to(weight.device))
        return inner
