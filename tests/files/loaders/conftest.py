"""Files as lists of keys with shapes, made from kohya's own module lists, and the layouts of the bases they are for."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sdlora.families import FAMILIES
from sdlora.files.loaders import Contents, Layout, Report, examine

GOLDEN = Path(__file__).parent.parent.parent / "golden"
ARCHITECTURES = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
_COMPONENTS = {"unet": "denoiser", "te1": "text_encoder", "te2": "text_encoder_2"}

Modules = dict[str, tuple[int, ...]]


def rows(name: str) -> list[tuple[str, tuple[int, ...], str, str]]:
    """Module, shape, component and path of a list."""
    found = []
    for line in (GOLDEN / f"{name}_modules.txt").read_text().splitlines():
        if not line.startswith("#"):
            module, shape, _, place = line.split("\t")
            component, path = place.split(":")
            found.append((module, tuple(map(int, shape.split("x"))), _COMPONENTS[component], path))
    return found


@pytest.fixture(scope="session")
def layouts() -> dict[str, Layout]:
    """A layout for sd15, sd21 and sdxl, of the layers that kohya trains."""
    made = {}
    for name, family in ARCHITECTURES.items():
        components: dict[str, Modules] = {}
        for _, shape, component, path in rows(f"{name}_locon"):
            components.setdefault(component, {})[path.removeprefix("text_model.")] = shape
        if name == "sdxl":
            components["text_encoder_2"]["text_projection"] = (1280, 1280)
        made[name] = Layout(FAMILIES[family], components)
    return made


@pytest.fixture(scope="session")
def modules() -> Callable[[str], Modules]:
    """The modules of a list, with the shapes of their layers."""
    return lambda name: {module: shape for module, shape, *_ in rows(name)}


@pytest.fixture(scope="session")
def respelled() -> Callable[[str], Modules]:
    """The modules of a list, the denoiser's named by diffusers' paths."""
    return lambda name: {
        f"lora_unet_{path.replace('.', '_')}" if component == "denoiser" else module: shape
        for module, shape, component, path in rows(name)
    }


@pytest.fixture(scope="session")
def file_of() -> Callable[..., Contents]:
    """Makes a file of rank 4 and alpha 4 with three tensors for each module."""

    def make(modules: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> Contents:
        shapes = {}
        for name, shape in modules.items():
            shapes[f"{name}.alpha"] = ()
            shapes[f"{name}.lora_down.weight"] = (4, *shape[1:])
            shapes[f"{name}.lora_up.weight"] = (shape[0], 4, *[1 for _ in shape[2:]])
        alphas = {key: 4.0 for key in shapes if key.endswith(".alpha")}
        return Contents(dict(sorted(shapes.items())), metadata or {"any": "thing"}, alphas)

    return make


@pytest.fixture(scope="session")
def verdicts(layouts) -> Callable[[str, Contents], dict[str, Report]]:
    """What the programs make of a file for an architecture, by a short name."""
    short = {
        "AUTOMATIC1111": "a1111",
        "Forge": "forge",
        "ComfyUI": "comfy",
        "diffusers": "diffusers",
        "InvokeAI": "invoke",
    }

    def ask(architecture: str, contents: Contents) -> dict[str, Report]:
        return {short[report.program]: report for report in examine(layouts[architecture], contents)}

    return ask
