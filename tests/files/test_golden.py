"""At Stable Diffusion 1.5's real size we name and shape exactly the modules that kohya's trainer does."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.adapters import Lora, find_layers, inject
from sdlora.families.sd1 import SD1
from sdlora.files.kohya import module_names

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name: str) -> dict[str, tuple[int, ...]]:
    rows = [line.split("\t") for line in (GOLDEN / name).read_text().splitlines() if not line.startswith("#")]
    return {module: tuple(map(int, shape.split("x"))) for module, shape, *_ in rows}


@pytest.fixture(scope="module")
def adapted():
    """Both models without any memory behind them, and adapters in every layer that is ever trained."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    models = {"denoiser": unet, "text_encoder": text}
    rules = {"denoiser": SD1.targets["conv"], "text_encoder": SD1.text_encoder_targets}
    usual = set(find_layers(unet, SD1.targets["attention+ff"]))
    found = {c: inject(m, find_layers(m, rules[c]), lambda path, layer: Lora(layer, 4)) for c, m in models.items()}
    return found, {**found, "denoiser": {path: a for path, a in found["denoiser"].items() if path in usual}}


@pytest.mark.parametrize(
    ("which", "file", "count"),
    [(1, "sd15_modules.txt", 264), (0, "sd15_locon_modules.txt", 350)],
    ids=["lora", "locon"],
)
def test_names_and_shapes_are_kohyas(adapted, which, file, count):
    named = module_names(adapted[which], SD1)
    expected = golden(file)
    assert len(expected) == count
    assert set(named) == set(expected)
    for name, adapter in named.items():
        shape = expected[name]
        assert tuple(adapter.weight.shape) == shape
        assert tuple(adapter.down.shape) == (4, *shape[1:])
        assert tuple(adapter.up.shape) == (shape[0], 4, *[1 for _ in shape[2:]])


def test_the_number_of_parameters_is_kohyas(adapted):
    count = sum(a.down.numel() + a.up.numel() for by_path in adapted[1].values() for a in by_path.values())
    assert count == 2_359_296
