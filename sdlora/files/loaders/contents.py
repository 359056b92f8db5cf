"""What a LoRA file holds, as the programs see it: raw keys with shapes, never put in order beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sdlora.container import Container
from sdlora.files.loaders.layout import Shape

PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
"""What the dialects write behind the name of a layer, for the factor next to its input and the one next to its output.

In order: kohya, peft, diffusers since 0.22, diffusers before, diffusers' text encoders.
"""

LYCORIS = (
    *(f".hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f".lokr_{part}" for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")),
    *(f".{part}.weight" for part in ("a1", "a2", "b1", "b2")),
    *(".w_norm", ".b_norm", ".diff", ".diff_b"),
)
"""Parts of LyCORIS modules other than plain LoRA: LoHa, LoKr, GLoRA, norms and full differences."""


@dataclass(frozen=True)
class Contents:
    """The keys of a file.

    Attributes:
        shapes: of all tensors by key, in the order in which they lie in the file.
        metadata: texts of the header.
        alphas: value by key, of the keys that end in `.alpha`.
        bf16: whether some tensor is stored as bf16.
    """

    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]
    alphas: Mapping[str, float]
    bf16: bool = False

    def modules(self) -> dict[str, dict[str, Shape]]:
        """Groups the tensors as kohya's files mean it: module name -> what stands behind its dot -> shape.

        A name ends at the FIRST dot, as AUTOMATIC1111 and InvokeAI read it.
        """
        grouped: dict[str, dict[str, Shape]] = {}
        for key, shape in self.shapes.items():
            name, _, part = key.partition(".")
            grouped.setdefault(name, {})[part] = shape
        return grouped


def key_of(name: str, part: str) -> str:
    """Joins what `Contents.modules` took apart."""
    return f"{name}.{part}" if part else name


def contents_of(container: Container) -> Contents:
    """Reads what the programs decide by: the header, and the values of alpha.

    Raises:
        SdloraError: if the file cannot be read.
    """
    entries = dict(sorted(container.entries.items(), key=lambda item: item[1].start))
    alphas = {key for key, entry in entries.items() if key.endswith(".alpha") and entry.shape in ((), (1,))}
    return Contents(
        shapes={key: entry.shape for key, entry in entries.items()},
        metadata=container.metadata,
        alphas={key: container.read(key).double().item() for key in entries if key in alphas},
        bf16=any(entry.dtype == torch.bfloat16 for entry in entries.values()),
    )
