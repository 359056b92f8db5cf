"""The metadata has every key that kohya writes, in its spelling, and tells nobody where the user keeps their files."""

import ast
import json
import re
import tomllib
from dataclasses import replace

import pytest

from sdlora.config import Config
from sdlora.config_io import load_config, to_toml
from sdlora.diffusion.schedule import Schedule
from sdlora.files.metadata import Progress, training_metadata
from sdlora.files.shareable import shareable
from sdlora.files.webui import a1111_version, forge_version

KEYS = """
session_id training_started_at training_finished_at output_name training_comment sd_scripts_commit_hash
steps epoch num_epochs max_train_steps num_batches_per_epoch num_train_images num_reg_images num_validation_images
learning_rate text_encoder_lr unet_lr lr_scheduler lr_warmup_steps optimizer max_grad_norm
network_module network_dim network_alpha network_dropout
v2 base_model_version sd_model_name sd_model_hash new_sd_model_hash vae_name vae_hash new_vae_hash clip_skip
max_token_length
mixed_precision full_fp16 fp8_base fp8_base_unet gradient_checkpointing gradient_accumulation_steps lowram cache_latents
seed noise_offset noise_offset_random_strength adaptive_noise_scale multires_noise_iterations multires_noise_discount
zero_terminal_snr min_snr_gamma debiased_estimation ip_noise_gamma ip_noise_gamma_random_strength loss_type
huber_schedule huber_scale huber_c scale_weight_norms
caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range prior_loss_weight
resize_interpolation
validation_seed validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps
batch_size_per_device total_batch_size resolution color_aug flip_aug random_crop shuffle_caption enable_bucket
bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens dataset_dirs reg_dataset_dirs tag_frequency bucket_info
"""
MODELSPEC = "sai_model_spec architecture implementation title resolution date prediction_type"
OURS = {"sdlora_version", "sdlora_base", "sdlora_config"}
PROGRESS = Progress(30, 120, 2, 6, 1_700_000_000.25, 1_700_000_100.5, 20, 40)


@pytest.fixture
def metadata(tiny_parts):
    def make(config: Config | None = None, **changed) -> dict[str, str]:
        facts = {
            "parts": tiny_parts,
            "progress": PROGRESS,
            "dataset_dirs": {"10_style": {"n_repeats": 10, "img_count": 4}},
            "tag_frequency": {"10_style": {"castle": 10, "a cät": 30}},
            "bucket_table": {(640, 448): 10, (512, 512): 30},
            "aspect_error": 0.0125,
            "learning_rates": {"denoiser": 1e-4},
            "output_name": "mine",
            "session_id": 123,
            "precision": "bf16",
        }
        return training_metadata(config or Config(), **{**facts, **changed})

    return make


def test_every_key_of_kohyas_is_there_and_every_value_is_text(metadata):
    found = metadata()
    assert (
        set(found) == {f"ss_{key}" for key in KEYS.split()} | {f"modelspec.{key}" for key in MODELSPEC.split()} | OURS
    )
    assert all(isinstance(value, str) for value in found.values())


def test_values_are_spelt_as_kohya_spells_them(metadata):
    config = load_config(flags={"lora.rank": "8", "lora.alpha": "4", "train.min_snr_gamma": "0"})
    found = metadata(config)
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_network_dropout": "None",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "0.0001",
        "ss_text_encoder_lr": "None",
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "6",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))",
        "ss_mixed_precision": "bf16",
        "ss_min_snr_gamma": "None",
        "ss_resolution": "(64, 64)",
        "ss_steps": "30",
        "ss_max_train_steps": "120",
        "ss_num_train_images": "40",
        "ss_training_started_at": "1700000000.25",
        "ss_cache_latents": "True",
        "ss_min_bucket_reso": "448",
        "ss_max_bucket_reso": "640",
        "ss_output_name": "mine",
        "modelspec.title": "mine",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.resolution": "64x64",
        "modelspec.date": "2023-11-14T22:15:00",
        "modelspec.prediction_type": "epsilon",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
    }
    assert {key: found[key] for key in expected} == expected


def test_what_is_json_has_kohyas_shape(metadata):
    found = metadata()
    assert json.loads(found["ss_dataset_dirs"]) == {"10_style": {"n_repeats": 10, "img_count": 4}}
    assert json.loads(found["ss_tag_frequency"]) == {"10_style": {"castle": 10, "a cät": 30}}
    assert json.loads(found["ss_reg_dataset_dirs"]) == {}
    buckets = json.loads(found["ss_bucket_info"])["buckets"]
    assert buckets == {"0": {"resolution": [512, 512], "count": 30}, "1": {"resolution": [640, 448], "count": 10}}


def test_settings_reach_their_keys(metadata):
    flags = {
        "data.flip": "true",
        "data.crop": "random",
        "data.shuffle_tags": "true",
        "data.keep_tags": "2",
        "data.buckets": "false",
        "data.batch_size": "3",
        "data.trigger": "mystyle",
        "train.accumulation": "2",
        "train.noise_offset": "0.05",
        "base.clip_skip": "2",
        "optimizer.schedule": "constant",
    }
    found = metadata(
        load_config(flags=flags), learning_rates={"denoiser": 1e-4, "text_encoder": 5e-5}, precision="fp32"
    )
    expected = {
        "ss_flip_aug": "True",
        "ss_random_crop": "True",
        "ss_shuffle_caption": "True",
        "ss_keep_tokens": "2",
        "ss_enable_bucket": "False",
        "ss_min_bucket_reso": "None",
        "ss_batch_size_per_device": "3",
        "ss_total_batch_size": "6",
        "ss_noise_offset": "0.05",
        "ss_clip_skip": "2",
        "ss_text_encoder_lr": "5e-05",
        "ss_mixed_precision": "no",
        "ss_lr_scheduler": "constant_with_warmup",
        "modelspec.trigger_phrase": "mystyle",
        "modelspec.encoder_layer": "2",
    }
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("flags", "dim", "alpha"),
    [
        ({}, "16", "16.0"),
        ({"lora.alpha": "4"}, "16", "4.0"),
        ({"lora.conv_rank": "2"}, "2", "2.0"),
        ({"lora.conv_rank": "8", "lora.conv_alpha": "1", "lora.alpha": "4"}, "8", "1.0"),
    ],
)
def test_convolutions_are_described_as_they_are_trained(metadata, tiny_parts, flags, dim, alpha):
    from sdlora.training.setup import attach_adapters

    config = load_config(flags={"lora.targets": "conv", **flags})
    assert json.loads(metadata(config)["ss_network_args"]) == {"conv_dim": dim, "conv_alpha": alpha}
    adapter = attach_adapters(tiny_parts, config)["denoiser"]["mid_block.resnets.0.conv1"]
    assert (str(adapter.rank), str(adapter.alpha)) == (dim, alpha)


def test_v_prediction_is_said_in_both_places(metadata, tiny_parts):
    tiny_parts.schedule = Schedule.from_config(tiny_parts.scheduler_config, "v_prediction")
    found = metadata()
    assert (found["ss_base_model_version"], found["modelspec.prediction_type"]) == ("sd_v1_v", "v")


def test_webuis_can_read_it(metadata):
    """As AUTOMATIC1111 does it: texts that begin with a brace are JSON, times are numbers."""
    found = metadata(progress=replace(PROGRESS, finished_at=None), output_name='{"a": 1}')
    assert (a1111_version(found), forge_version(found)) == ("SD1", "SD1")
    assert not found["ss_output_name"].startswith("{")
    assert float(found["ss_training_started_at"]) and found["ss_training_finished_at"] == "None"
    assert ast.literal_eval(found["ss_resolution"]) == (64, 64)
    for key, value in found.items():
        if value.startswith("{"):
            assert isinstance(json.loads(value), dict), key
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", found["modelspec.date"])


def test_no_folder_of_the_user_is_written(metadata, tiny_parts, tmp_path):
    config = load_config(
        flags={
            "base.model": str(tmp_path / "secret" / "mybase"),
            "data.images": str(tmp_path / "secret" / "pictures"),
            "data.cache_dir": str(tmp_path / "secret" / "cache"),
            "samples.sample_prompts": str(tmp_path / "secret" / "prompts.txt"),
            "output.output": str(tmp_path / "secret" / "run"),
        }
    )
    tiny_parts.name = str(tmp_path / "secret" / "mybase")
    found = metadata(config)
    assert "secret" not in json.dumps(found) and str(tmp_path) not in json.dumps(found)
    assert (found["sdlora_base"], found["ss_sd_model_name"]) == ("mybase", "mybase")
    again = tomllib.loads(found["sdlora_config"])
    assert (again["data"]["images"], again["output"]["output"], again["base"]["model"]) == ("pictures", "run", "mybase")


def test_the_settings_can_be_read_back(metadata, tmp_path):
    config = load_config(flags={"lora.rank": "8", "data.trigger": 'a "b"\n', "samples.sample_prompts": ["x", "y"]})
    file = tmp_path / "config.toml"
    file.write_text(metadata(config)["sdlora_config"], encoding="utf-8")
    assert load_config(file) == config
    assert metadata(config)["sdlora_config"] == to_toml(config)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("nano", "nano"),
        ("sd15", "sd15"),
        ("somebody/some-model.v2", "somebody/some-model.v2"),
        ("/home/ann/models/mine", "mine"),
        ("/home/ann/models/mine/", "mine"),
        ("../models/mine", "mine"),
        ("./mine", "mine"),
        ("~/mine", "mine"),
        ("C:\\Users\\Ann\\mine", "mine"),
        ("a/b/c", "c"),
    ],
)
def test_names_stay_and_folders_go(name, shared):
    assert shareable(name) == shared


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "ann" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shareable("ann/mine") == "mine"


def test_names_that_are_no_text_do_not_break_the_header(metadata):
    name = b"m\xffine".decode("utf-8", "surrogateescape")
    metadata(output_name=name)["ss_output_name"].encode("utf-8")
    metadata(load_config(flags={"data.images": name}))["sdlora_config"].encode("utf-8")
