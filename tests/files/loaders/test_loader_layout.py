"""The layout of a base lists its layers with their shapes, wherever it was read from."""

import pytest

from sdlora.errors import LoraFileError
from sdlora.files.loaders import layout_for, layout_of
from sdlora.files.loaders.layout import same_product, same_shape


@pytest.mark.parametrize(("architecture", "family"), [("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl")])
def test_a_family_at_its_real_size_has_kohyas_layers(architecture, family, layouts):
    layout = layout_for(family)
    assert set(layout.components) == set(layouts[architecture].components)
    for component, layers in layouts[architecture].components.items():
        assert layers.items() <= layout.components[component].items()
    assert layout.kind == {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}[family]
    assert layout.originals.keys() == layout.denoiser.keys()


def test_the_embedded_base_has_a_layout_too():
    layout = layout_for("nano")
    assert (layout.text_width, layout.kind) == (128, None)
    assert ("encoder.layers.0.mlp.fc1" in layout.components["text_encoder"]) and layout.family.name == "sd1"


def test_there_is_no_layout_for_what_is_not_known():
    with pytest.raises(LoraFileError, match=r"no base is known for 'flux'; name one with --base"):
        layout_for("flux")


def test_adapters_in_place_change_nothing(tiny_parts, fresh, adapt):
    adapt(tiny_parts)
    adapt(tiny_parts)
    assert layout_of(tiny_parts) == layout_of(fresh())


@pytest.mark.parametrize(
    ("layer", "down", "up", "product", "shape"),
    [
        ((8, 6), (2, 6), (8, 2), True, True),
        ((8, 6), (2, 6, 1, 1), (8, 2, 1, 1), True, False),
        ((8, 6, 1, 1), (2, 6), (8, 2), True, False),
        ((8, 6, 3, 3), (2, 6, 3, 3), (8, 2, 1, 1), True, True),
        ((8, 6, 3, 3), (2, 6), (8, 2), False, False),
        ((8, 6, 3, 3), (6, 2, 3, 3), (2, 8, 1, 1), False, False),
        ((8, 8, 3, 3), (8, 2, 3, 3), (2, 8, 1, 1), False, False),
        ((8, 6), (2, 6), (8, 3), False, False),
        ((8, 6), (2, 8), (6, 2), False, False),
    ],
)
def test_which_factors_fit(layer, down, up, product, shape):
    assert same_product(layer, down, up) == product
    assert same_shape(layer, down, up) == shape
