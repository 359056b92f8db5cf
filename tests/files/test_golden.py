"""At their real sizes we name and shape exactly the modules that kohya's trainer does, in every family."""

from functools import cache
from pathlib import Path

import pytest

from sdlora.adapters import Lora, find_layers, inject
from sdlora.families import FAMILIES
from sdlora.families.full_size import full_size_models
from sdlora.files.kohya import module_names

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name: str) -> dict[str, tuple[int, ...]]:
    rows = [line.split("\t") for line in (GOLDEN / name).read_text().splitlines() if not line.startswith("#")]
    return {module: tuple(map(int, shape.split("x"))) for module, shape, *_ in rows}


@cache
def adapted(family_name: str, targets: str, encoders: bool):
    """Models without any memory behind them, and adapters in the layers that train."""
    family, found = FAMILIES[family_name], {}
    for component, model in full_size_models(family).items():
        if component == "denoiser" or encoders:
            rules = family.targets[targets] if component == "denoiser" else family.text_encoder_targets
            found[component] = inject(model, find_layers(model, rules), lambda path, layer: Lora(layer, 4))
    return found


@pytest.mark.parametrize("encoders", [True, False], ids=["with encoders", "denoiser only"])
@pytest.mark.parametrize(
    ("family", "targets", "file", "count"),
    [
        ("sd1", "attention+ff", "sd15_modules.txt", 264),
        ("sd1", "conv", "sd15_locon_modules.txt", 350),
        ("sd2", "attention+ff", "sd21_modules.txt", 330),
        ("sd2", "conv", "sd21_locon_modules.txt", 416),
        ("sdxl", "attention+ff", "sdxl_modules.txt", 986),
        ("sdxl", "conv", "sdxl_locon_modules.txt", 1052),
    ],
)
def test_names_and_shapes_are_kohyas(family, targets, file, count, encoders):
    named = module_names(adapted(family, targets, encoders), FAMILIES[family])
    expected = golden(file)
    assert len(expected) == count
    assert set(named) == {name for name in expected if encoders or name.startswith("lora_unet_")}
    for name, adapter in named.items():
        shape = expected[name]
        assert tuple(adapter.weight.shape) == shape
        assert tuple(adapter.down.shape) == (4, *shape[1:])
        assert tuple(adapter.up.shape) == (shape[0], 4, *[1 for _ in shape[2:]])


@pytest.mark.parametrize(("family", "count"), [("sd1", 2_359_296), ("sd2", 3_424_256), ("sdxl", 14_252_032)])
def test_the_number_of_parameters_is_kohyas(family, count):
    found = adapted(family, "attention+ff", True)
    assert sum(a.down.numel() + a.up.numel() for by_path in found.values() for a in by_path.values()) == count
