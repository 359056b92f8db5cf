"""sdlora's side: its engine, as a run sets it up, behind the few calls that both sides share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sdlora.adapters import FlatParameters
from sdlora.config import Config
from sdlora.config_io import load_config
from sdlora.families import Conditioning, Parts
from sdlora.frozen.quantized import Quantized
from sdlora.training.engine import Engine
from sdlora.training.graph import record_steps
from sdlora.training.kernels import choose_packing, install_attention, pack
from sdlora.training.optimizers import BASE_LEARNING_RATE, make_optimizer
from sdlora.training.resnet import simplify_resnets
from sdlora.training.savings import Rung, put_to_work
from sdlora.training.setup import attach_adapters
from sdlora.training.step import Draw
from tools.bench.inputs import Factors, gradient
from tools.bench.rows import RANK, TARGETS, Row


class Side(Protocol):
    """What a contender does."""

    @property
    def notes(self) -> Sequence[str]:
        """What it says of how it computes, a clause each."""
        ...

    def step(self, drawn: Draw, conditioning: Conditioning) -> object:
        """Does a whole optimizer step, in the fastest way that the side knows."""
        ...

    def forward_backward(self, drawn: Draw, conditioning: Conditioning) -> Tensor:
        """Adds the gradients of a batch's mean squared error; returns it, a scalar."""
        ...

    def update(self) -> None:
        """Clips the gradients, steps the optimizer and drops the gradients."""
        ...

    def set_factors(self, factors: Factors) -> None:
        """Gives every adapter its values."""
        ...

    def gradients(self) -> Factors:
        """Returns the gradients that `forward_backward` left, by path, fp32, on the CPU."""
        ...

    def frozen_weights(self) -> dict[str, Tensor]:
        """Returns the weights that the side computes with where they are not the base's own, by layer."""
        ...


class Ours:
    """sdlora's engine, put together in the order of `training/setup.py`.

    Args:
        parts: the base, in its precision, on its device.
        config: the settings of the run.
        savings: what memory is saved in the denoiser.
    """

    def __init__(self, parts: Parts, config: Config, savings: Rung) -> None:
        denoiser = parts.denoiser
        self.parts = parts
        self.kernels = install_attention(denoiser, parts.dtype)
        self.adapters = attach_adapters(parts, config)["denoiser"]
        simplify_resnets(denoiser)
        self.flat = FlatParameters({"denoiser": self.adapters.values()}, parts.dtype)
        optimizer = make_optimizer(self.flat, {"denoiser": BASE_LEARNING_RATE}, config.optimizer)
        self._said = [put_to_work(denoiser, savings, parts.device, dropout=False)]
        packs, why = choose_packing(denoiser, config.train.pack_weights, parts.device)
        if packs:
            pack(denoiser)
        self._said.append(f"weights {'packed' if packs else 'not packed'}: {why}")
        self.engine = Engine(parts, self.flat, optimizer, config.train)
        if parts.device.type == "cuda":
            recorded, why = record_steps(self.engine, config, self._said.append)
            self._said.append(f"CUDA graphs {'on' if recorded else 'off'}: {why}")
        self._graphs = self.engine.graphs
        self._loss = torch.zeros(())
        denoiser.train()

    @property
    def notes(self) -> Sequence[str]:
        """How frozen weights lie, whether steps are recorded, and which attention was found fastest."""
        chosen = sorted(set(self.kernels.chosen.values())) if self.kernels else []
        return [*filter(None, self._said), *([f"attention: {', '.join(chosen)}"] if chosen else [])]

    def forward_backward(self, drawn: Draw, conditioning: Conditioning) -> Tensor:
        """Starts a step with the gradients of a batch's mean squared error; returns it, a scalar."""
        self.engine.graphs = None
        return self._begin(drawn, conditioning)

    def _begin(self, drawn: Draw, conditioning: Conditioning) -> Tensor:
        self.engine.begin()
        self._loss = self.engine.forward_backward(drawn, conditioning, 1 / len(drawn.t))
        return self._loss

    def update(self) -> None:
        """Clips the gradients and steps the optimizer."""
        self.engine.graphs = None
        self.engine.update(self._loss)

    def step(self, drawn: Draw, conditioning: Conditioning) -> Tensor:
        """Does a whole optimizer step, through a graph where there is one."""
        self.engine.graphs = self._graphs
        loss = self._begin(drawn, conditioning)
        self.engine.update(loss)
        return loss

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Gives every adapter its values.

        Raises:
            ValueError: if the adapted layers are not those of `factors`.
        """
        if self.adapters.keys() != factors.keys():
            raise ValueError(f"sdlora adapts {len(self.adapters)} layers and {len(factors)} were given, or others")
        for path, (down, up) in factors.items():
            self.adapters[path].down.copy_(down)
            self.adapters[path].up.copy_(up)

    def gradients(self) -> Factors:
        """Returns the gradients that `forward_backward` left, by path, fp32, on the CPU."""
        return {path: (gradient(adapter.down), gradient(adapter.up)) for path, adapter in self.adapters.items()}

    def frozen_weights(self) -> dict[str, Tensor]:
        """Returns the weights that were stored in fewer bits, restored, by layer, on the CPU."""
        layers = self.parts.denoiser.named_modules()
        return {path.removesuffix(".base"): m.weight.cpu() for path, m in layers if isinstance(m, Quantized)}


def settings(row: Row) -> Config:
    """Returns the settings of a run that does the same work as the reference."""
    flags = {
        "lora.rank": RANK,
        "lora.targets": TARGETS,
        "train.precision": row.precision,
        "train.min_snr_gamma": 0.0,  # the example's loss has no weights
    }
    return load_config(None, flags)


def build_ours(row: Row, parts: Parts) -> Side:
    """Builds sdlora's step around a base."""
    savings = Rung(
        micro_batch=row.batch,
        checkpointing="all" if row.checkpointing else "none",
        base_dtype=row.base_dtype,
    )
    return Ours(parts, settings(row), savings)
