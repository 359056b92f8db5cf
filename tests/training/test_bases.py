"""The whole line for every family, from every form that a base comes in: train, export, and load in diffusers."""

import json

import pytest
import torch
from diffusers import DDIMScheduler
from peft.tuners.lora import LoraLayer
from pipelines import their_pipeline
from safetensors import safe_open

from sdlora.config_io import load_config
from sdlora.errors import ConfigError, ModelError
from sdlora.families import Base, load_parts, resolve_base
from sdlora.families.save_single import save_single
from sdlora.files.attach import attach
from sdlora.files.kohya import read_lora
from sdlora.sampling.origin import trained_base
from sdlora.training.progress import Reporter
from sdlora.training.train import train

FAMILIES = ["sd1", "sd2", "sdxl"]


@pytest.fixture(scope="session")
def sources(tmp_path_factory, request):
    """Family -> form -> settings of a base in that form."""
    root = tmp_path_factory.mktemp("sources")
    made = {}
    for family in FAMILIES:
        folder = request.getfixturevalue(f"tiny_{family}")
        file = root / f"{family}.safetensors"
        save_single(folder, file)
        bare = root / f"{family}-denoiser.safetensors"
        _copy_denoiser(file, bare)
        made[family] = {
            "folder": {"base.model": str(folder)},
            "file": {"base.model": str(file)},
            "file without VAE and text encoders": {
                "base.model": str(bare),
                "base.vae": str(file),
                "base.text_encoders": str(folder),
            },
        }
    return made


def _copy_denoiser(file, target):
    from safetensors.torch import save_file

    with safe_open(file, "pt") as opened:
        keys = [key for key in opened.keys() if key.startswith("model.diffusion_model.")]  # noqa: SIM118
        save_file({key: opened.get_tensor(key) for key in keys}, target, opened.metadata())


def settings(style_dir, tmp_path, **flags):
    base = {
        "data.images": style_dir,
        "data.batch_size": 2,
        "data.resolution": 64,
        "lora.rank": 2,
        "lora.alpha": 1.0,
        "lora.targets": "conv",
        "lora.text_encoder": True,
        "optimizer.learning_rate": 0.1,
        "optimizer.warmup": 0.0,
        "train.steps": 3,
        "train.precision": "fp32",
        "output.output": tmp_path / "run",
        "output.name": "style",
        "output.save_dtype": "fp32",
        "samples.sample_every": 0,
    }
    return load_config(None, base | flags)


def outputs(parts):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = parts.family.encode_prompts(parts, ["a castle", "a cat on a hill"])
        return conditioning["states"], parts.family.denoise(parts, latents, torch.tensor([10, 700]), conditioning)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("form", ["folder", "file", "file without VAE and text encoders"])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_from_every_form_load_whole_in_diffusers(sources, style_dir, tmp_path, complaints, family, form):
    config = settings(style_dir, tmp_path, **sources[family][form])
    result = train(config)
    complaints.clear()

    def fresh():
        return load_parts(resolve_base(config.base.model), config.base)

    theirs = fresh()
    pipe = their_pipeline(theirs, DDIMScheduler(steps_offset=1, clip_sample=False))
    pipe.load_lora_weights(result.lora, adapter_name="style")
    loaded = [m for model in theirs.components.values() for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(loaded) == result.certificate.num_modules
    assert complaints == []
    ours, bare = fresh(), outputs(fresh())
    attach(ours, read_lora(result.lora))
    for our, their, base in zip(outputs(ours), outputs(theirs), bare, strict=True):
        assert relative(our, their) <= 1e-5
        assert relative(our, base) > 1e-3  # it learned something
    with safe_open(result.lora, "pt") as file:
        names = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if family == "sdxl":
        assert any(name.startswith("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q") for name in names)
        assert not any("down_blocks" in name for name in names)
        assert {name.split("_")[1] for name in names} == {"unet", "te1", "te2"}
    assert metadata["ss_base_model_version"].startswith({"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_"}[family])
    assert metadata["ss_v2"] == str(family == "sd2")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_of_the_base_changes_nothing_of_the_course(sources, style_dir, tmp_path, family):
    losses = []
    for form in ("folder", "file"):
        flags = {"output.output": tmp_path / form, "optimizer.learning_rate": 1e-3}
        result = train(settings(style_dir, tmp_path, **sources[family][form], **flags))
        losses.append([json.loads(line)["loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_text_encoder_stops_when_it_was_told_to(sources, style_dir, tmp_path):
    def trained(name, **flags):
        flags |= {"output.output": tmp_path / name, "train.steps": 4, "lora.targets": "attention"}
        return read_lora(train(settings(style_dir, tmp_path, **sources["sd1"]["folder"], **flags)).lora).modules

    whole, half, two = (
        trained("whole"),
        trained("half", **{"lora.text_encoder_stop": 0.5}),
        trained("two", **{"train.stop_at": 2}),
    )
    encoder = [name for name in whole if name.startswith("lora_te_")]
    assert all(torch.equal(half[name].up, two[name].up) for name in encoder)
    assert not all(torch.equal(half[name].up, whole[name].up) for name in encoder)
    denoiser = [name for name in whole if name.startswith("lora_unet_")]
    assert not all(torch.equal(half[name].up, two[name].up) for name in denoiser)


def test_xl_draws_samples_with_its_text_encoders_trained_and_says_what_has_no_effect(sources, style_dir, tmp_path):
    warnings = []

    class Warnings(Reporter):
        def warn(self, text):
            warnings.append(text)

    flags = {"samples.sample_every": 1, "samples.sample_prompts": ["a cat"], "samples.sample_steps": 1}
    flags |= {"train.steps": 1, "lora.targets": "attention", "base.clip_skip": 2}
    result = train(settings(style_dir, tmp_path, **sources["sdxl"]["folder"], **flags), reporter=Warnings())
    assert result.samples is not None and result.samples.is_file()
    assert any("clip skip 2 has no effect" in line for line in warnings)


def test_a_stop_of_what_does_not_train_is_an_error(style_dir, tmp_path):
    with pytest.raises(ConfigError, match="text_encoder_stop has no effect"):
        settings(style_dir, tmp_path, **{"lora.text_encoder": False, "lora.text_encoder_stop": 0.5})


def test_a_wrong_family_is_an_error_before_anything_is_loaded(sources, style_dir, tmp_path):
    with pytest.raises(ModelError, match="not sdxl"):
        train(settings(style_dir, tmp_path, **sources["sd2"]["file"], **{"base.family": "sdxl"}))
    assert not (tmp_path / "run").exists()


def test_the_lora_finds_its_single_file_again(sources, style_dir, tmp_path):
    base = sources["sd1"]["file"]
    result = train(settings(style_dir, tmp_path, **base))
    found, where = trained_base(read_lora(result.lora))
    assert str(found.path) == base["base.model"] and "config.toml" in where


def test_long_captions_are_read_when_asked_for(sources, style_dir, tmp_path):
    (style_dir / "picture0.txt").write_text("a thing, " * 60)
    lines = []

    class Notes:
        def __getattr__(self, name):
            return lambda *a, **k: lines.append(str(a[0])) if name in ("say", "warn") else None

    base = sources["sd2"]["folder"] | {"lora.text_encoder": False, "lora.targets": "attention"}
    train(settings(style_dir, tmp_path, **base), reporter=Notes())
    assert any("captions longer than 75 tokens" in line for line in lines)
    lines.clear()
    result = train(
        settings(style_dir, tmp_path, **base, **{"base.max_tokens": 225, "output.output": tmp_path / "long"}),
        reporter=Notes(),
    )
    assert not any("captions longer" in line for line in lines)
    assert read_lora(result.lora).metadata["ss_max_token_length"] == "225"


def test_xl_is_told_the_true_crop_of_every_picture(sources, style_dir, tmp_path):
    from sdlora.config import DataSection
    from sdlora.data.cache import Cache
    from sdlora.data.dataset import prepare
    from sdlora.data.folder import scan

    parts = load_parts(Base("tiny", resolve_base(sources["sdxl"]["folder"]["base.model"]).path, "test"))
    data = DataSection(images=style_dir, resolution=64, buckets=False, flip=True)
    dataset = prepare(parts, scan(style_dir, "", "white"), data, 0, Cache(tmp_path / "cache"))
    wide = next(i for i, e in enumerate(dataset.examples) if (e.width, e.height) == (96, 64))
    from sdlora.data.dataset import Sample

    plain, mirrored = (dataset.load([Sample(wide, k)]).sizes[0] for k in (0, 1))
    fitted, cut = dataset.fits[wide], dataset.variants[wide]
    assert [v.flip for v in cut] == [False, True]
    assert plain.original == (64, 96) and plain.target == (64, 64)
    assert plain.crop == (cut[0].top, cut[0].left) == (0, 16)
    assert mirrored.crop == (0, fitted.scaled_width - 64 - cut[1].left)


def test_the_settings_of_a_run_name_the_base_that_was_used(sources, style_dir, tmp_path):
    result = train(settings(style_dir, tmp_path, **sources["sdxl"]["file without VAE and text encoders"]))
    metadata = read_lora(result.lora).metadata
    assert metadata["sdlora_base"] == "sdxl-denoiser.safetensors"
    assert str(tmp_path) not in json.dumps(metadata)
