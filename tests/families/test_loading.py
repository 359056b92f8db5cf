"""Finding, telling apart and loading base models, and every way in which that fails."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import ModelError
from sdlora.families import Base, identify, load_parts, native_cfg, native_resolution, native_width, resolve_base
from sdlora.families.loading import NANO


@pytest.fixture
def copy_of(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_auto_is_nano_without_gpu_and_cache_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr("sdlora.families.hub.cached", lambda repository: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = resolve_base("auto")
    assert base.name == "nano"
    assert "no GPU" in base.reason


def test_auto_takes_stable_diffusion_from_the_hub_cache(monkeypatch, tiny_base):
    monkeypatch.setattr("sdlora.families.hub.cached", lambda repository: tiny_base)
    base = resolve_base("auto")
    assert (base.name, base.path) == ("sd15", tiny_base)
    assert "hub cache" in base.reason


def test_auto_downloads_for_a_gpu(monkeypatch, tiny_base):
    asked = []
    monkeypatch.setattr("sdlora.families.hub.cached", lambda repository: None)
    monkeypatch.setattr("sdlora.families.hub.download", lambda repository, say: asked.append(repository) or tiny_base)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    assert "Test GPU" in resolve_base("auto").reason
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]


def test_a_folder_and_its_parts(tiny_base):
    base = resolve_base(str(tiny_base))
    parts = load_parts(base)
    assert identify(tiny_base).name == "sd1"
    assert (parts.resolution, parts.vae_factor, parts.schedule.prediction) == (64, 8, "epsilon")
    assert native_resolution(tiny_base) == 64
    assert not any(p.requires_grad for m in (*parts.components.values(), parts.vae) for p in m.parameters())


def test_prediction_type_is_the_checkpoints_and_can_be_overruled(copy_of):
    edit(copy_of / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    base = Base("x", copy_of, "")
    assert load_parts(base).schedule.prediction == "v_prediction"
    parts = load_parts(base, prediction="epsilon")
    assert parts.schedule.prediction == parts.scheduler_config["prediction_type"] == "epsilon"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copy_of, part):
    shutil.rmtree(copy_of / part)
    with pytest.raises(ModelError, match=part):
        load_parts(Base("x", copy_of, ""))


def test_damaged_weights_are_named(copy_of):
    file = copy_of / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="unet"):
        load_parts(Base("x", copy_of, ""))


def test_pickled_weights_are_not_read(copy_of):
    file = copy_of / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ModelError, match="pickle"):
        load_parts(Base("x", copy_of, ""))


def test_half_precision_variants_load(copy_of):
    file = copy_of / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load_parts(Base("x", copy_of, "")).dtype == torch.float32


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("model_index.json", {"transformer": ["diffusers", "SD3Transformer2DModel"]}, "is a StableDiffusionPipeline;"),
        ("unet/config.json", {"in_channels": 9}, "an inpainting model: its denoiser takes 9 channels"),
        ("unet/config.json", {"in_channels": 8}, "an image-editing model"),
        ("unet/config.json", {"in_channels": 5}, "a depth model"),
    ],
)
def test_what_cannot_be_trained_is_called_by_its_name(copy_of, file, changes, match):
    edit(copy_of / file, **changes)
    with pytest.raises(ModelError, match=match):
        identify(copy_of)


def test_the_refiner_is_refused(copy_of):
    edit(copy_of / "model_index.json", text_encoder=[None, None], text_encoder_2=["transformers", "X"])
    with pytest.raises(ModelError, match="refiner"):
        identify(copy_of)


@pytest.mark.parametrize(("part", "key"), [("unet", "conv_in.bias"), ("text_encoder", "final_layer_norm.bias")])
def test_weights_that_lack_a_tensor_are_not_made_up(copy_of, part, key):
    [file] = (copy_of / part).glob("*.safetensors")
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{part} is incomplete: its weights lack {key};"):
        load_parts(Base("x", copy_of, ""))


@pytest.mark.parametrize("model", ["auto", "nano"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(model):
    with pytest.raises(ModelError, match="--revision main has no effect"):
        resolve_base(model, revision="main")


def test_unknown_names_list_what_is_known():
    with pytest.raises(ModelError, match="nano, sd15"):
        resolve_base("nonsense")


def test_a_name_too_long_for_a_file_is_no_base():
    with pytest.raises(ModelError, match="no base model"):
        resolve_base("x" * 300 + ".safetensors")


def test_a_folder_that_is_no_base_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"without model_index\.json"):
        resolve_base(str(tmp_path))


def test_a_hub_id_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="--base nano"):
        resolve_base("nobody/nothing-here")


def test_what_is_embedded_is_as_small_as_it_is_said_to_be():
    weights = [f for f in NANO.parent.rglob("*.safetensors") if f.is_file()]
    assert {f.relative_to(NANO.parent).parts[0] for f in weights} == {"nano", "families"}  # with the TAESD of previews
    assert sum(f.stat().st_size for f in weights) <= 32e6


def test_the_width_is_read_without_weights(tiny_base, tmp_path):
    assert native_width(tiny_base) == load_parts(Base("tiny", tiny_base, "test")).denoiser.config.block_out_channels[0]


def test_a_miniature_is_guided_less(tiny_base):
    assert native_cfg(NANO) == native_cfg(tiny_base) == 1.5
