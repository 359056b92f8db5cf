"""A single file tells its family; what is no base says what it is instead, and nothing that is damaged gets through."""

import struct

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import ModelError
from sdlora.families import FAMILIES, identify
from sdlora.families.single import identify_file, load_file

UNET = "model.diffusion_model."


def ones(*shape):
    return torch.ones(shape)


CONTEXT = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "inpainting": ("sd1", {f"{UNET}input_blocks.0.0.weight": ones(8, 9, 3, 3)}, "an inpainting model"),
    "XL inpainting": ("sdxl", {f"{UNET}input_blocks.0.0.weight": ones(8, 9, 3, 3)}, "an inpainting model"),
    "pix2pix": ("sd1", {f"{UNET}input_blocks.0.0.weight": ones(8, 8, 3, 3)}, "pix2pix"),
    "depth": ("sd2", {f"{UNET}input_blocks.0.0.weight": ones(8, 5, 3, 3)}, "a depth model"),
    "unCLIP": ("sd2", {f"{UNET}label_emb.0.0.weight": ones(8, 8)}, "unCLIP"),
    "Playground": ("sdxl", {"edm_mean": ones(1)}, r"Playground v2\.5"),
    "CosXL": ("sdxl", {"edm_vpred.sigma_max": ones(1)}, "CosXL"),
    "video": ("sd2", {f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight": ones(1)}, "Stable Video Diffusion"),
    "scaled fp8": ("sdxl", {f"{UNET}out.2.scale_weight": ones(1)}, "quantised"),
}


@pytest.mark.parametrize(("name", "changes", "match"), OTHERS.values(), ids=OTHERS)
def test_what_is_made_for_another_purpose_is_refused_by_name(edited, name, changes, match):
    with pytest.raises(ModelError, match=match):
        identify_file(edited(name, lambda tensors: tensors | changes))


def test_the_refiner_and_cut_down_models_are_told_from_the_base(edited, tmp_path):
    def refiner(tensors):
        return {
            key.replace("embedders.1.model", "embedders.0.model"): t
            for key, t in tensors.items()
            if not key.startswith("conditioner.embedders.0.")
        }

    with pytest.raises(ModelError, match="refiner"):
        identify_file(edited("sdxl", refiner))

    def denoiser_of_the_refiner(tensors):
        return {k: ones(24, 1280) if k == CONTEXT else t for k, t in tensors.items() if k.startswith(UNET)}

    with pytest.raises(ModelError, match="refiner"):
        identify_file(edited("sdxl", denoiser_of_the_refiner))

    def without_middle(tensors):
        return {key: t for key, t in tensors.items() if "middle_block.1." not in key}

    with pytest.raises(ModelError, match="cut-down SDXL"):
        identify_file(edited("sdxl", without_middle))


NO_BASES = {
    "SD3": (f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", "is Stable Diffusion 3"),
    "SD3 without prefix": ("joint_blocks.0.x_block.attn.qkv.weight", "is Stable Diffusion 3"),
    "Flux": ("double_blocks.0.img_attn.qkv.weight", "is Flux"),
    "another": (f"{UNET}blocks.0.attn.weight", "diffusion model of another kind"),
    "kohya LoRA": ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "is a LoRA"),
    "PEFT LoRA": ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "is a LoRA"),
    "diffusers LoRA": ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora.up.weight", "is a LoRA"),
    "cloneofsimo LoRA": ("unet:9:up", "is a LoRA"),
    "LoHa": ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "is a LoRA"),
    "VAE": ("encoder.down.0.block.0.conv1.weight", "is a VAE"),
    "VAE with prefix": ("first_stage_model.decoder.mid.block_1.conv1.weight", "is a VAE"),
    "diffusers VAE": ("decoder.up_blocks.0.resnets.0.conv1.weight", "is a VAE"),
    "diffusers UNet": (
        "down_blocks.0.resnets.0.conv1.weight",
        r"give the whole folder, the one with model_index\.json",
    ),
    "CLIP": ("text_model.encoder.layers.0.mlp.fc1.weight", "holds text encoders and no denoiser"),
    "OpenCLIP": ("transformer.resblocks.0.mlp.c_fc.weight", "holds text encoders and no denoiser"),
    "T5": ("encoder.block.0.layer.0.SelfAttention.k.weight", "holds text encoders and no denoiser"),
    "ControlNet": ("control_model.input_hint_block.0.weight", "is a ControlNet"),
    "embedding": ("emb_params", "textual inversion"),
    "anything": ("zebra.weight", r"none of its 1 keys is known, the first is 'zebra\.weight'"),
}


@pytest.mark.parametrize(("key", "match"), NO_BASES.values(), ids=NO_BASES)
def test_what_is_no_base_says_what_it_is(tmp_path, key, match):
    save_file({key: ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=match):
        identify(tmp_path / "other.safetensors")


def test_an_empty_header_a_cut_file_and_a_pickle_are_refused(tmp_path, pairs):
    save_file({}, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(pairs["sd1"][1].read_bytes()[:-5])
    (tmp_path / "zip.safetensors").write_bytes(b"PK\x03\x04" + bytes(60))
    for name, match in [("none", "no tensors"), ("cut", "cut off"), ("zip", "pickle")]:
        with pytest.raises(ModelError, match=match):
            identify(tmp_path / f"{name}.safetensors")


def test_a_wrong_family_is_refused_with_both_names(pairs):
    with pytest.raises(ModelError, match=r"is Stable Diffusion XL \(sdxl\), not sd1"):
        identify(pairs["sdxl"][1], "sd1")


def test_forged_headers_are_refused_never_a_crash(tmp_path, pairs):
    data = pairs["sdxl"][1].read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    random = torch.Generator().manual_seed(0)
    family, refused = FAMILIES["sdxl"], 0
    for _ in range(60):
        forged = bytearray(data)
        for place in torch.randint(8, 8 + length, (3,), generator=random).tolist():
            forged[place] = int(torch.randint(32, 127, (), generator=random))
        (tmp_path / "forged.safetensors").write_bytes(forged)
        try:
            identify_file(tmp_path / "forged.safetensors")
            load_file(tmp_path / "forged.safetensors", family, {"vae", "text_encoder", "text_encoder_2"})
        except ModelError:
            refused += 1
    assert refused > 50
