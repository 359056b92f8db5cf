"""diffusers loads our file whole, and computes with it what we do."""

import pytest
import torch
from diffusers import DDIMScheduler
from peft.tuners.lora import LoraLayer
from pipelines import their_pipeline

from sdlora.files.attach import attach
from sdlora.files.kohya import read_lora, write_lora


def outputs(parts) -> tuple[torch.Tensor, torch.Tensor]:
    """The text encoder's and the denoiser's output on fixed input."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = parts.family.encode_prompts(parts, ["a castle", "a cat on a hill"], 1)
        predicted = parts.family.denoise(parts, latents, torch.tensor([10, 700]), conditioning)
    return conditioning["states"], predicted


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("targets", ["attention+ff", "conv"])
def test_diffusers_computes_what_we_do(tmp_path, tiny_parts, fresh, adapt, complaints, targets):
    adapters = adapt(tiny_parts, targets)
    count = sum(map(len, adapters.values()))
    path = tmp_path / "style.safetensors"
    write_lora(path, adapters, tiny_parts.family, {"ss_network_dim": "3"}, torch.float32)

    theirs, bare = fresh(), outputs(fresh())
    pipe = their_pipeline(theirs, DDIMScheduler(steps_offset=1, clip_sample=False))
    pipe.load_lora_weights(path, adapter_name="style")
    loaded = [m for model in (pipe.unet, pipe.text_encoder) for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(loaded) == count
    assert complaints == []

    for strength in (0.5, 1.0):
        pipe.set_adapters("style", strength)
        ours = fresh()
        attach(ours, read_lora(path), strength)
        for our, their, base in zip(outputs(ours), outputs(theirs), bare, strict=True):
            assert relative(our, their) <= 1e-5
            assert relative(our, base) > 1e-2  # the adapters do something
    for live, their in zip(outputs(tiny_parts), outputs(theirs), strict=True):
        assert relative(live, their) <= 1e-5
