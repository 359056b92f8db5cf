"""Shared fixtures: a tiny SD 1.x base with random weights, built here, and pictures drawn here. No network."""

import logging
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from families.tiny import make_tiny
from PIL import Image

from sdlora.families import Base, Parts, load_parts
from sdlora.families.loading import NANO


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and on a busy machine waiting for each other takes them seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """Keeps latents of tests out of the user's cache, and torch's global seed fixed."""
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path_factory.getbasetemp() / "sdlora-cache"))
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A diffusers folder in SD 1.5's block layout with an AutoencoderKL, random weights, 64 px pictures."""
    import json
    import shutil

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny-sd1")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 24, 24),
        layers_per_block=2,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=2048,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    shutil.copytree(NANO / "tokenizer", folder / "tokenizer")
    shutil.copytree(NANO / "scheduler", folder / "scheduler")
    index = json.loads((NANO / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory) -> Path:
    """A diffusers folder of Stable Diffusion 1.x with random weights."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "sd1", "sd1")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory) -> Path:
    """The same of Stable Diffusion 2.x."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "sd2", "sd2")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """The same of Stable Diffusion XL."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "sdxl", "sdxl")


@pytest.fixture
def tiny_parts(tiny_base) -> Parts:
    """The tiny base, loaded afresh, for a test may change it."""
    return load_parts(Base(str(tiny_base), tiny_base, "test"))


@pytest.fixture
def nano_parts() -> Parts:
    """The embedded base, loaded afresh."""
    return load_parts(Base("nano", NANO, "test"))


@pytest.fixture
def complaints():
    """What diffusers, peft and transformers log while the test runs: keys left over, keys missing."""
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        getattr(diffusers, name)  # importing them logs advice on torchvision
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    collector = Collector(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers")]
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_warning()
    for logger in loggers:
        logger.addHandler(collector)
    yield lines
    for logger in loggers:
        logger.removeHandler(collector)
    diffusers_logging.set_verbosity(before)


@pytest.fixture
def style_dir(tmp_path) -> Path:
    """Six small captioned pictures of different shapes."""
    folder = tmp_path / "style"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(64, 64), (96, 64), (64, 96), (80, 80), (64, 64), (128, 64)]):
        colour = rng.integers(0, 255, 3)
        pixels = np.clip(colour + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{i}.png")
        (folder / f"picture{i}.txt").write_text(f"a thing, number {i}\n")
    return folder
