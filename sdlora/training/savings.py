"""What memory can be saved in the denoiser, and how each saving is put to work: before a run, or in the midst of it.

Checkpointing keeps a block's input and computes the rest of its activations again on the way back. Fewer bits and
offloading make the frozen weights small, or bring them to the device only while they are at work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_later

from sdlora.allocator import return_freed_memory
from sdlora.frozen.offloaded import offload
from sdlora.frozen.quantized import FORMATS, Quantized, quantize

CHECKPOINTING: dict[str, Callable[[nn.Module], bool]] = {
    "none": lambda module: False,
    "attention": lambda module: type(module).__name__ == "Transformer2DModel",
    "all": lambda module: True,
}
"""By level: which of diffusers' modules compute their parts again. Those of a Transformer2DModel are attention blocks,
those of the others are residual blocks."""

KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding")
"""Parts of a denoiser whose weights stay as they are: the first and last layer, and what tells it the time and the
picture's size. They are small, and everything that it draws passes through them."""

_BLOCK = re.compile(r".*?\.(?:transformer_blocks|resnets|downsamplers|upsamplers)\.\d+(?=\.)")


@dataclass(frozen=True)
class Rung:
    """A set of savings.

    Attributes:
        micro_batch: pictures that pass the denoiser at once; a batch is cut into such parts.
        checkpointing: none, attention or all.
        base_dtype: number format of the frozen weights, a key of `FORMATS`; `auto` is that of the products.
        offload: whether the frozen weights wait in the CPU's memory.
    """

    micro_batch: int
    checkpointing: str = "none"
    base_dtype: str = "auto"
    offload: bool = False

    def facts(self) -> Mapping[str, Any]:
        """Returns it as JSON values, for a checkpoint; `Rung(**facts)` is the same again."""
        return asdict(self)

    def words(self, batch_size: int) -> str:
        """Names its savings for a person.

        Args:
            batch_size: pictures of a whole batch.
        """
        levels = {
            "attention": "gradient checkpointing of the attention blocks",
            "all": "gradient checkpointing of all blocks",
        }
        words = [levels[self.checkpointing]] if self.checkpointing in levels else []
        if self.micro_batch < batch_size:
            words.append(f"micro-batches of {self.micro_batch}")
        if self.base_dtype != "auto":
            words.append(f"the base's weights in {self.base_dtype}")
        if self.offload:
            words.append("the base's weights in main memory, fetched block by block")
        return ", ".join(words) or "no savings"


def put_to_work(denoiser: nn.Module, rung: Rung, device: torch.device, *, dropout: bool) -> str:
    """Brings a denoiser to a rung, from where it is or from any rung before that.

    Args:
        denoiser: changed in place, adapters and all.
        rung: what shall hold from now on; its `micro_batch` is left to the loop.
        device: where products are computed.
        dropout: whether a part computed again must draw the same random numbers.

    Returns:
        What was done to the weights, a sentence for the person at the terminal; empty if nothing.
    """
    checkpoint_blocks(denoiser, rung.checkpointing, dropout=dropout)
    said = []
    if rung.base_dtype != "auto":
        said.append(quantize_base(denoiser, rung.base_dtype))
        return_freed_memory()
    if rung.offload:
        said.append(offload_base(denoiser, device))
    return " ".join(filter(None, said))


def checkpoint_blocks(denoiser: nn.Module, level: str, *, dropout: bool) -> None:
    """Sets how much of a denoiser's activations is computed again on the way back.

    Args:
        denoiser: of diffusers.
        level: a key of `CHECKPOINTING`.
        dropout: whether the random numbers must be the same again; to remember them costs a little.
    """

    def later(module: nn.Module, *inputs: Any) -> Any:
        # Not reentrant: adapters sum their gradients on the way back, which happens once, whatever is computed twice.
        return recompute_later(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=dropout)

    for module in denoiser.modules():
        if hasattr(module, "gradient_checkpointing"):
            part: Any = module
            part._gradient_checkpointing_func = later
            part.gradient_checkpointing = CHECKPOINTING[level](module)


def is_kept(path: str) -> bool:
    """Tells whether the layer at a path of the denoiser keeps its weight as it is, where it is."""
    return path.partition(".")[0] in KEPT


def block_of(path: str) -> str | None:
    """Returns the block that a layer of the denoiser comes to the device with; `None` if it stays there."""
    if is_kept(path):
        return None
    found = _BLOCK.match(path)
    return found.group() if found else path.removesuffix(".base")


def quantize_base(denoiser: nn.Module, name: str) -> str:
    """Stores the denoiser's frozen weights in a format; says how many and what they take, or nothing if none change."""
    before = {path: held(layer) for path, layer in layers_of(denoiser).items()}
    changed = quantize(denoiser, FORMATS[name], is_kept)
    if not changed:
        return ""
    after = layers_of(denoiser)
    small, large = sum(held(after[path]) for path in changed), sum(before[path] for path in changed)
    return f"Base: {len(changed)} layers in {name}, {size_in_words(small)} instead of {size_in_words(large)}."


def layers_of(denoiser: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Returns the layers whose weights can be made smaller, or are so already, by path."""
    return {
        path: layer
        for path, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not is_kept(path)
    }


def held(layer: nn.Linear | nn.Conv2d) -> int:
    """Returns the bytes that a layer's weight takes."""
    tensors = layer.stored if isinstance(layer, Quantized) else (layer.weight,)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def offload_base(denoiser: nn.Module, device: torch.device) -> str:
    """Moves the denoiser's frozen weights to main memory; says how many blocks they are and what they take."""
    sizes = [block.home.numel() for block in offload(denoiser, device, block_of).blocks]
    if not sizes:
        return ""
    here = size_in_words(2 * max(sizes))
    return (
        f"Base: {len(sizes)} blocks wait in main memory, {size_in_words(sum(sizes))}; at most {here} visit at a time."
    )


def size_in_words(count: float) -> str:
    """Writes a number of bytes for a person."""
    for unit, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {word}"
    return f"{count:.0f} bytes"
