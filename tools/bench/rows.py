"""What is measured: one entry a row of the table. The important rows come first, for a budget may end the run early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdlora.errors import ConfigError
from sdlora.families import FAMILIES
from sdlora.families.family import Family

NANO = "nano"
RANK = 16
TARGETS = "attention"
"""A word of `lora.targets`; the reference adapts the same layers."""
REFERENCE_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration.

    Attributes:
        name: what `--rows` calls it.
        group: `cpu` or `gpu`: the device that it is meant for.
        base: `nano`, or a family whose full-size denoiser gets random weights.
        side: of the square picture, pixels.
        batch: pictures a step.
        checkpointing: whether activations are computed again in the backward pass, on both sides.
        base_dtype: how sdlora holds the frozen weights: `auto` as the reference, which holds them in `precision`, or in
            fewer bits: fp8, int8 or nf4.
        precision: bf16 (the reference under autocast) or fp32 (without).
    """

    name: str
    group: str
    base: str
    side: int
    batch: int
    checkpointing: bool = False
    base_dtype: str = "auto"
    precision: str = "bf16"

    @property
    def family(self) -> Family:
        """The family of the base; `nano` is a Stable Diffusion 1.x."""
        return FAMILIES["sd1" if self.base == NANO else self.base]

    @property
    def title(self) -> str:
        """The row in words, e.g. `SD 1.5, 512², batch 4, checkpointing`."""
        names = {NANO: "nano", "sd1": "SD 1.5", "sdxl": "SDXL"}
        parts = [names[self.base], f"{self.side}²", f"batch {self.batch}"]
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [f"base in {self.base_dtype}"] if self.base_dtype != "auto" else []
        return ", ".join(parts + ([self.precision] if self.precision != "bf16" else []))


def _cpu(name: str, base: str, side: int, batch: int, **more: Any) -> Row:
    return Row(name=name, group="cpu", base=base, side=side, batch=batch, **more)


def _gpu(name: str, base: str, batch: int, **more: Any) -> Row:
    return Row(name=name, group="gpu", base=base, side={"sd1": 512, "sdxl": 1024}[base], batch=batch, **more)


_ALL = (
    _cpu("cpu-sd15-256-b1", "sd1", 256, 1),
    _cpu("cpu-sd15-512-b1", "sd1", 512, 1),
    _cpu("cpu-nano-b4", NANO, 128, 4),
    _cpu("cpu-nano-b1", NANO, 128, 1),
    _cpu("cpu-nano-b4-fp32", NANO, 128, 4, precision="fp32"),
    _cpu("cpu-sd15-256-b1-checkpointing", "sd1", 256, 1, checkpointing=True),
    _cpu("cpu-sd15-256-b1-int8", "sd1", 256, 1, base_dtype="int8"),
    _cpu("cpu-sd15-256-b1-nf4", "sd1", 256, 1, base_dtype="nf4"),
    _cpu("cpu-sd15-256-b1-fp8", "sd1", 256, 1, base_dtype="fp8"),
    _gpu("sd15-512-b1", "sd1", 1),
    _gpu("sdxl-1024-b1", "sdxl", 1),
    _gpu("sd15-512-b4", "sd1", 4),
    _gpu("sd15-512-b8", "sd1", 8),
    _gpu("sdxl-1024-b1-nf4-checkpointing", "sdxl", 1, base_dtype="nf4", checkpointing=True),
    _gpu("sd15-512-b1-checkpointing", "sd1", 1, checkpointing=True),
    _gpu("sdxl-1024-b4", "sdxl", 4),
    _gpu("sdxl-1024-b1-checkpointing", "sdxl", 1, checkpointing=True),
    _gpu("sd15-512-b2", "sd1", 2),
    _gpu("sd15-512-b4-checkpointing", "sd1", 4, checkpointing=True),
    _gpu("sdxl-1024-b4-checkpointing", "sdxl", 4, checkpointing=True),
    _gpu("sd15-512-b1-fp8", "sd1", 1, base_dtype="fp8"),
    _gpu("sd15-512-b1-int8", "sd1", 1, base_dtype="int8"),
    _gpu("sd15-512-b1-nf4", "sd1", 1, base_dtype="nf4"),
    _gpu("sdxl-1024-b1-fp8", "sdxl", 1, base_dtype="fp8"),
    _gpu("sdxl-1024-b1-int8", "sdxl", 1, base_dtype="int8"),
    _gpu("sdxl-1024-b1-nf4", "sdxl", 1, base_dtype="nf4"),
)

ROWS: Mapping[str, Row] = {row.name: row for row in _ALL}


def choose_rows(wanted: str) -> list[Row]:
    """Returns the rows that `--rows` asks for, in the order of the table.

    Args:
        wanted: `cpu`, `gpu`, or names of rows with commas between.

    Raises:
        ConfigError: for a name that is none.
    """
    names = {name.strip() for name in wanted.split(",")}
    groups = {row.group for row in _ALL}
    unknown = sorted(names - groups - set(ROWS))
    if unknown:
        raise ConfigError(f"no row is called {', '.join(unknown)}; there are cpu, gpu and {', '.join(ROWS)}")
    return [row for row in _ALL if row.name in names or row.group in names]
