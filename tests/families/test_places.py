"""Every weight that a LoRA can change is found where it lies, in folders and in single files, at full size too."""

import json
from pathlib import Path

import pytest
import torch
from families.sparse import make_full_size, write_sparse
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file
from torch import nn

from sdlora.container import open_container
from sdlora.errors import ModelError
from sdlora.families import FAMILIES, identify, native_cfg, native_resolution, native_width
from sdlora.families.layout import components
from sdlora.families.places import component_weights, places
from sdlora.families.save_single import save_single
from sdlora.families.shapes import denoiser_config, text_encoder_config, vae_config

GOLDEN = Path(__file__).parent.parent / "golden"
LISTS = {"sd1": ("sd15", 264, 350), "sd2": ("sd21", 330, 416), "sdxl": ("sdxl", 986, 1052)}


def weight_at(place, tensors):
    stored = tensors[place.file][place.key]
    weight = stored if place.third is None else stored.chunk(3)[place.third]
    assert tuple(weight.shape) == place.shape
    return weight.T if place.transposed else weight


@pytest.mark.parametrize("form", [0, 1], ids=["folder", "file"])
def test_every_layer_is_found_where_its_weight_lies(pairs, pair, form):
    parts = pair[0]
    family, found = places(pairs[parts.family.name][form])
    assert family is parts.family
    layers = {
        family.lora_key(component, path): layer.weight
        for component, module in parts.components.items()
        for path, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    assert found.keys() == layers.keys()
    tensors = {file: read_tensors(file) for file in {place.file for place in found.values()}}
    for name, weight in layers.items():
        assert torch.equal(weight_at(found[name], tensors).reshape(weight.shape), weight), name


@pytest.fixture(scope="module", params=list(FAMILIES))
def full_size(request, tmp_path_factory):
    """A family's folder and single file at full size; the files are holes."""
    root = tmp_path_factory.mktemp("full")
    folder = make_full_size(root / request.param, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdlora.families.save_single.write_stream", write_sparse)
        save_single(folder, root / f"{request.param}.safetensors")
    return folder, root / f"{request.param}.safetensors"


def test_at_full_size_the_places_are_those_of_kohyas_lists(full_size):
    for base in full_size:
        family, found = places(base)
        stem, *counts = LISTS[family.name]
        for ending, count in zip(["modules", "locon_modules"], counts, strict=True):
            lines = (GOLDEN / f"{stem}_{ending}.txt").read_text().splitlines()
            rows = [line.split("\t") for line in lines if not line.startswith("#")]
            shapes = {name: tuple(map(int, shape.split("x"))) for name, shape, *_ in rows}
            assert len(shapes) == count
            assert {name: found[name].shape for name in shapes} == shapes


def test_at_full_size_the_configurations_are_the_familys(full_size):
    folder, file = full_size
    family = identify(file)
    assert (family, family.name) == (identify(folder), folder.name)
    found = components(open_container(file), family)
    config = denoiser_config(found, family, native_resolution(file))
    assert native_width(file) == 320
    assert native_cfg(folder) == native_cfg(file) == 5
    layers = {"transformer_layers_per_block": (1, 1, 1, 1)}
    assert config == {**layers, **family.denoiser_config, "norm_num_groups": 32}
    assert vae_config(found["vae"], family) == {**family.vae_config, "norm_num_groups": 32}
    for spec in family.text_encoders:
        assert text_encoder_config(found[spec.component], spec) == spec.config


@pytest.mark.parametrize("kept", ["model.diffusion_model.", ""])
def test_at_full_size_the_denoiser_alone_tells_its_family(full_size, tmp_path, kept):
    folder, file = full_size
    entries = open_container(file).entries
    prefix = "model.diffusion_model."
    shapes = {kept + k.removeprefix(prefix): (None, e.shape) for k, e in entries.items() if k.startswith(prefix)}
    write_sparse(tmp_path / "bare.safetensors", shapes)
    family = identify(tmp_path / "bare.safetensors")
    assert family.name == folder.name
    found = components(open_container(tmp_path / "bare.safetensors"), family)
    layers = {"transformer_layers_per_block": (1, 1, 1, 1)}
    assert denoiser_config(found, family, native_resolution(file)) == {
        **layers,
        **family.denoiser_config,
        "norm_num_groups": 32,
    }


def test_the_layer_that_sd2_never_sees_is_no_place(edited):
    prefix = "cond_stage_model.model.transformer.resblocks."

    def lengthen(tensors):
        first = {k.removeprefix(f"{prefix}0."): t for k, t in tensors.items() if k.startswith(f"{prefix}0.")}
        return tensors | {f"{prefix}{i}.{name}": tensor.clone() for i in range(24) for name, tensor in first.items()}

    names = places(edited("sd2", lengthen))[1]
    assert sum("_layers_22_" in name for name in names) == 6
    assert not any("_layers_23_" in name for name in names)


def sharded(folder, index="model.safetensors.index.json"):
    """Cuts a file of weights in two, and returns the index."""
    tensors = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in (0, 1)}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    table = {"metadata": {}, "weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / index).write_text(json.dumps(table))
    return table


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "unet").mkdir()
    save_file({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(3, 3)}, tmp_path / "unet" / "model.safetensors")
    return tmp_path / "unet"


@pytest.mark.parametrize(
    "index",
    ["model.safetensors.index.json", "model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"],
)
def test_weights_in_several_files_are_found(weights, index):
    table = sharded(weights, index)
    found = component_weights(weights)
    assert {key: container.path.name for key, container in found.items()} == table["weight_map"]


def test_weights_in_half_precision_files_are_found(weights):
    (weights / "model.safetensors").rename(weights / "diffusion_pytorch_model.fp16.safetensors")
    assert sorted(component_weights(weights)) == ["a.weight", "b.weight"]


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"weight_map": {"a.weight": "../unet/model-00001-of-00002.safetensors"}}, "points outside its folder"),
        ({"weight_map": {"c.weight": "model-00001-of-00002.safetensors"}}, "'c.weight' is in model-00001"),
        ({"weight_map": {"a.weight": "model-00003-of-00003.safetensors"}}, "no weights"),
        ({"weight_map": ["a.weight"]}, "does not say"),
        ({}, "does not say"),
    ],
)
def test_an_index_that_is_wrong_is_refused(weights, table, match):
    sharded(weights)
    (weights / "model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(ModelError, match=match):
        component_weights(weights)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no"):
        component_weights(tmp_path)
