"""Adapters with values in the tiny base, as if they had been trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.adapters import Lora, find_layers, inject
from sdlora.diffusion.noise import generator
from sdlora.families import Base, Parts, load_parts
from sdlora.families.save_single import save_single

Adapters = dict[str, dict[str, Lora]]


@pytest.fixture
def fresh(tiny_base) -> Callable[[], Parts]:
    """Loads the tiny base once more, untouched."""
    return lambda: load_parts(Base("tiny", Path(tiny_base), "test"))


@pytest.fixture
def adapt() -> Callable[..., Adapters]:
    """Puts random adapters of rank 3 and alpha 1.5 into parts; convolutions and text encoder included."""

    def put(parts: Parts, targets: str = "conv", encoder: bool = True, size: float = 0.2) -> Adapters:
        rules = {"denoiser": parts.family.targets[targets]}
        if encoder:
            rules["text_encoder"] = parts.family.text_encoder_targets
        adapters = {}
        for component, targets_ in rules.items():
            model = parts.components[component]
            adapters[component] = inject(model, find_layers(model, targets_), lambda path, layer: Lora(layer, 3, 1.5))
            for path, adapter in adapters[component].items():
                rng = generator("values", component, path)
                with torch.no_grad():
                    adapter.down.copy_(torch.randn(adapter.down.shape, generator=rng) * size)
                    adapter.up.copy_(torch.randn(adapter.up.shape, generator=rng) * size)
        return adapters

    return put


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def folder(request):
    """A tiny base of each family as a diffusers folder."""
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(params=["folder", "file"])
def base(request, folder, tmp_path):
    """A tiny base as a diffusers folder and as a single file in the original layout."""
    if request.param == "folder":
        return folder
    save_single(folder, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def single(tiny_sd1, tmp_path):
    """A tiny base of Stable Diffusion 1.x as a single file."""
    save_single(tiny_sd1, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"
