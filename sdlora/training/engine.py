"""The arithmetic of a step: forward, backward, clip, update. Nothing in it waits for the device.

Losses and norms stay tensors until the loop asks, and a step whose gradient is not finite is skipped by the optimizer's
own kernel, so a GPU can run ahead of Python, and the whole can be recorded as a graph (`graph.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sdlora.adapters import FlatParameters
from sdlora.config import TrainSection
from sdlora.diffusion.counter import Philox
from sdlora.families import Conditioning, Parts
from sdlora.training.step import Draw, Microbatch, draw, draw_counted, sample_losses

GROWTH_INTERVAL = 2000
"""Steps without overflow after which the loss scale doubles. Source: `torch.amp.GradScaler`."""

Inputs = dict[str, Tensor]
"""All that a forward and backward pass is told, as tensors: either `mean`, `places` and perhaps `std`, from which it
draws, or `latents`, `noise` and `t`; then `share`, a scalar; the rest is conditioning."""

_NOT_CONDITIONING = {"mean", "std", "places", "latents", "noise", "t", "share"}


class Steps(Protocol):
    """What computes the two parts of a step in place of `Engine.compute` and `Engine.apply`: graphs of them."""

    def compute(self, inputs: Inputs) -> Tensor:
        """See `Engine.compute`."""
        ...

    def apply(self, loss: Tensor) -> Tensor:
        """See `Engine.apply`."""
        ...


class Engine:
    """Computes steps.

    Args:
        parts: the base, adapters in place, on its device in the format of the products.
        flat: what trains.
        optimizer: over `flat.parts`, fused, so that it can skip a step on the device.
        settings: of the loop.

    Attributes:
        scale: loss scale, a tensor, where the products are fp16; else `None`.
        source: of random numbers on the device, for CUDA; `None` where generators on the CPU serve.
        graphs: the recorded steps, or `None`; see `graph.record_steps`.
    """

    def __init__(self, parts: Parts, flat: FlatParameters, optimizer: Any, settings: TrainSection) -> None:
        self.parts, self.flat, self.optimizer, self.settings = parts, flat, optimizer, settings
        self.device = flat.values.device
        scaled = parts.dtype == torch.float16
        self.scale = torch.full((), 2.0**16, device=self.device) if scaled else None
        self._calm = torch.zeros((), device=self.device)
        self.source = Philox.of(settings.seed, "sample", self.device) if self.device.type == "cuda" else None
        self.graphs: Steps | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What `apply` changes: values, gradients, the optimizer's state, the loss scale."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        scaling = [] if self.scale is None else [self.scale, self._calm]
        return [self.flat.values, self.flat.gradients, *(x for x in states if isinstance(x, Tensor)), *scaling]

    def begin(self) -> None:
        """Starts a step: no gradients, fresh copies of the factors."""
        self.flat.zero_gradients()
        self.flat.refresh()

    def add(self, batch: Microbatch, share: float) -> Tensor:
        """Draws for a batch and adds its gradients to those of the step.

        Args:
            batch: B pictures.
            share: what each picture's loss counts, 1 / pictures of the step.

        Returns:
            The batch's part of the step's loss, on the device, without its graph.
        """
        if self.source is None:
            drawn = draw(
                batch.mean,
                batch.std,
                num_timesteps=len(self.parts.schedule),
                seed=self.settings.seed,
                step=batch.step,
                positions=batch.positions,
                noise_offset=self.settings.noise_offset,
            )
            return self.forward_backward(drawn, batch.conditioning, share)
        return (self.graphs or self).compute(self.inputs(batch, share))

    def inputs(self, batch: Microbatch, share: float) -> Inputs:
        """Returns a batch as `compute` takes it where it draws on the device; what lies on the CPU is pinned there."""
        own = {"mean": batch.mean, "places": batch.places} | ({} if batch.std is None else {"std": batch.std})
        return self._inputs(own | batch.conditioning, share)

    def forward_backward(self, drawn: Draw, conditioning: Conditioning, share: float = 1.0) -> Tensor:
        """Adds the gradients of a batch that was drawn already; otherwise as `add`."""
        own = {"latents": drawn.latents, "noise": drawn.noise, "t": drawn.t}
        return (self.graphs or self).compute(self._inputs(own | conditioning, share))

    def _inputs(self, tensors: Inputs, share: float) -> Inputs:
        share_there = torch.full((), share, device=self.device)
        return {name: self._ready(x) for name, x in tensors.items()} | {"share": share_there}

    def _ready(self, x: Tensor) -> Tensor:
        # Only from pinned memory does a copy to a GPU not make Python wait.
        return x.pin_memory() if self.device.type == "cuda" and x.device.type == "cpu" else x

    def compute(self, inputs: Inputs) -> Tensor:
        """Adds the gradients of a batch to those of the step, kernel by kernel; returns as `add` does."""
        at = {name: x.to(self.device, non_blocking=True) for name, x in inputs.items()}
        conditioning = {name: x for name, x in at.items() if name not in _NOT_CONDITIONING}
        loss = sample_losses(self.parts, self._drawn(at), conditioning, self.settings).sum() * at["share"]
        (loss if self.scale is None else loss * self.scale).backward()
        self.flat.collect()
        return loss.detach()

    def _drawn(self, at: Inputs) -> Draw:
        if "noise" in at:
            return Draw(at["latents"], at["noise"], at["t"])
        assert self.source is not None
        return draw_counted(
            at["mean"],
            at.get("std"),
            at["places"],
            self.source,
            num_timesteps=len(self.parts.schedule),
            noise_offset=self.settings.noise_offset,
        )

    def update(self, loss: Tensor) -> Tensor:
        """Clips the gradient and steps the optimizer, unless loss or gradient are not finite.

        Args:
            loss: of the whole step, on the device.

        Returns:
            The gradient's norm before clipping, on the device.

        Source: clipping as `torch.nn.utils.clip_grad_norm_`; the loss scale as `torch.amp.GradScaler`.
        """
        return (self.graphs or self).apply(loss)

    def apply(self, loss: Tensor) -> Tensor:
        """Does what `update` promises, kernel by kernel."""
        gradients = self.flat.gradients
        if self.scale is not None:
            gradients.div_(self.scale)
        norm = gradients.norm()
        bad = ~torch.isfinite(norm + loss)
        limit = self.settings.max_grad_norm or math.inf
        if limit != math.inf:
            gradients.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.found_inf = bad.float()
        self.optimizer.grad_scale = None
        self.optimizer.step()
        if self.scale is not None:
            self._rescale(bad)
        return norm

    def _rescale(self, bad: Tensor) -> None:
        assert self.scale is not None
        calm = torch.where(bad, 0.0, self._calm + 1)
        grown = torch.where(calm >= GROWTH_INTERVAL, self.scale * 2, self.scale)
        self.scale.copy_(torch.where(bad, self.scale / 2, grown))
        self._calm.copy_(torch.where(calm >= GROWTH_INTERVAL, 0.0, calm))

    def state(self) -> Mapping[str, float] | None:
        """Returns the loss scale, for a checkpoint, or `None` where there is none."""
        return None if self.scale is None else {"scale": float(self.scale), "calm": float(self._calm)}

    def restore(self, state: Mapping[str, float] | None) -> None:
        """Takes up the loss scale of a checkpoint."""
        if self.scale is not None and state:
            self.scale.fill_(state["scale"])
            self._calm.fill_(state["calm"])
