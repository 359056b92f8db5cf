"""A LoRA file is put onto a base whole, at the strength asked for, or not at all."""

from pathlib import Path

import pytest
import torch

from sdlora.adapters import Target, adapters_in, eject, find_layers
from sdlora.errors import LoraFileError
from sdlora.files.attach import attach, looks_like
from sdlora.files.kohya import LoraFile, ModuleWeights, read_lora, write_lora


def lora_file(modules: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], **metadata: str) -> LoraFile:
    weights = {n: ModuleWeights(torch.ones(d), torch.ones(u), 1.0) for n, (d, u) in modules.items()}
    return LoraFile(Path("style.safetensors"), weights, metadata, torch.float32)


def predicted(parts) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = parts.family.encode_prompts(parts, ["a castle"], 1)
        return parts.family.denoise(parts, latents, torch.tensor([500]), states)


@pytest.fixture
def written(tmp_path, tiny_parts, adapt):
    """A file, and what the denoiser returned with the adapters that it was written from."""
    adapters = adapt(tiny_parts)
    path = tmp_path / "style.safetensors"
    write_lora(path, adapters, tiny_parts.family, {}, torch.float32)
    return read_lora(path), predicted(tiny_parts)


def test_a_file_does_what_the_adapters_did(written, fresh):
    lora, live = written
    parts = fresh()
    base = predicted(parts)
    attached = attach(parts, lora)
    assert {c: len(by_path) for c, by_path in attached.items()} == {"denoiser": 278, "text_encoder": 18}
    torch.testing.assert_close(predicted(parts), live, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(live, base, rtol=1e-2, atol=1e-2)
    assert not any(p.requires_grad for model in parts.components.values() for p in model.parameters())
    for model in parts.components.values():
        eject(model)
    assert torch.equal(predicted(parts), base)


def test_strength_zero_is_the_base_and_two_halves_are_one(written, fresh):
    lora, live = written
    parts = fresh()
    base = predicted(parts)
    attach(parts, lora, 0.0)
    assert torch.equal(predicted(parts), base)
    attach(parts, lora, 0.5)
    attach(parts, lora, 0.5)
    torch.testing.assert_close(predicted(parts), live, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_trains(written, fresh):
    parts = fresh()
    attached = attach(parts, written[0], trainable=True)
    wanted = {id(p) for by_path in attached.values() for a in by_path.values() for p in (a.down, a.up)}
    assert {id(p) for m in parts.components.values() for p in m.parameters() if p.requires_grad} == wanted


def test_modules_that_match_no_layer_are_refused_and_nothing_changes(tiny_parts):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = lora_file(
        {
            name: ((1, 16), (24, 1)),
            "lora_unet_input_blocks_4_1_proj_in": ((1, 640), (640, 1)),
            "lora_te2_text_model_encoder_layers_31_mlp_fc1": ((1, 1280), (5120, 1)),
        },
        ss_sd_model_name="some\x1b[31mxl.safetensors",
    )
    with pytest.raises(LoraFileError) as refused:
        attach(tiny_parts, lora)
    message = str(refused.value)
    assert "2 of its 3 modules match no layer, the first is lora_unet_input_blocks_4_1_proj_in" in message
    assert "text width 16" in message
    assert "made for Stable Diffusion XL (some[31mxl.safetensors)" in message and "\x1b" not in message
    assert len(message.splitlines()) == 2
    assert not adapters_in(tiny_parts.denoiser)


def test_a_layer_of_another_size_is_refused_and_nothing_changes(nano_parts):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = lora_file({name: ((1, 768), (1280, 1))})
    with pytest.raises(LoraFileError) as refused:
        attach(nano_parts, lora)
    message = str(refused.value)
    assert "does not fit nano (sd1, text width 128)" in message
    assert "has down [1, 768], up [1280, 1], and the layer needs down [1, 128], up [112, 1]" in message
    assert "made for Stable Diffusion 1.x" in message
    assert not adapters_in(nano_parts.denoiser)


def test_a_1x1_convolution_may_be_written_as_a_matrix_and_back(tiny_parts):
    convolution = "lora_unet_mid_block_attentions_0_proj_in"
    linear = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = lora_file({convolution: ((1, 24), (24, 1)), linear: ((1, 24, 1, 1), (24, 1, 1, 1))})
    attached = attach(tiny_parts, lora)["denoiser"]
    shapes = {path.rpartition(".")[2]: tuple(a.down.shape) for path, a in attached.items()}
    assert shapes == {"proj_in": (1, 24, 1, 1), "to_q": (1, 24)}


def test_a_3x3_kernel_does_not_pass_for_another(tiny_parts):
    lora = lora_file({"lora_unet_mid_block_resnets_0_conv1": ((1, 24), (24, 1))})
    with pytest.raises(LoraFileError, match=r"the layer needs down \[1, 24, 3, 3\]"):
        attach(tiny_parts, lora)


def test_every_layer_can_be_named(nano_parts):
    layers = Target(layers=("Linear", "Conv2d"))
    names = [
        nano_parts.family.lora_key(component, path)
        for component, model in nano_parts.components.items()
        for path in find_layers(model, (layers,))
    ]
    assert len(set(names)) == len(names)


ATTENTION = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("name", "width", "metadata", "kind"),
    [
        (ATTENTION, 768, {}, "sd1"),
        (ATTENTION, 1024, {}, "sd2"),
        (ATTENTION, 2048, {}, "sdxl"),
        (ATTENTION, 128, {"ss_base_model_version": "sd_v1"}, "nano"),
        (ATTENTION, 16, {"ss_base_model_version": "sd_v1"}, "unknown"),
        (ATTENTION, 768, {"ss_base_model_version": "sdxl_base_v1-0"}, "sd1"),  # tensors do not lie
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_v", 768, {}, "sd1"),
        ("lora_unet_output_blocks_2_0_out_layers_3", 640, {}, "sdxl"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, {}, "sdxl"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, {"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, {}, "unknown"),
    ],
)
def test_the_tensors_tell_what_a_file_was_made_for(name, width, metadata, kind):
    assert looks_like(lora_file({name: ((1, width), (4, 1))}, **metadata)) == kind
