"""Both spellings of every weight agree with diffusers' converter and kohya's module lists, there and back."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from sdlora.families.names import diffusers_unet, open_clip, original_unet, original_vae

GOLDEN = Path(__file__).parent.parent / "golden"
SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


@pytest.mark.parametrize(
    ("widths", "blocks", "plain"),
    [((8, 16, 24, 24), {}, {0}), ((8, 16, 24), SDXL_BLOCKS, set())],
    ids=["sd1", "sdxl"],
)
def test_the_denoisers_names_are_those_of_diffusers_converter(widths, blocks, plain):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=widths, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2, **blocks
        )
    names = list(unet.state_dict())
    original = {name: original_unet(name, plain_up=plain) for name in names}
    assert None not in original.values() and len(set(original.values())) == len(names)
    assert [diffusers_unet(original[name]) for name in names] == names
    # their converter sorts the original names back into diffusers'
    checkpoint = {f"model.diffusion_model.{key}": name for name, key in original.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    assert all(value == key for key, value in converted.items()) and len(converted) == len(names)


def test_the_vaes_names_are_those_of_diffusers_converter():
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=2,
    )
    state = vae.state_dict()
    original = {name: original_vae(name) for name in state}
    assert None not in original.values() and len(set(original.values())) == len(state)
    checkpoint = {f"first_stage_model.{original[name]}": tensor for name, tensor in state.items()}
    converted = convert_ldm_vae_checkpoint(checkpoint, vae.config)
    assert all(converted[name].data_ptr() == state[name].data_ptr() for name in state) and len(converted) == len(state)


def test_the_names_of_lora_modules_are_kohyas():
    for line in (GOLDEN / "sdxl_locon_modules.txt").read_text().splitlines():
        name, source = line.split("\t")[0], line.split("\t")[-1]
        if source.startswith("unet:"):
            name, path = name.removeprefix("lora_unet_"), source.removeprefix("unet:")
            assert original_unet(path.replace(".", "_"), separator="_") == name
            assert original_unet(path) and original_unet(path).replace(".", "_") == name
            assert diffusers_unet(name, separator="_") == path.replace(".", "_")


def test_open_clips_names():
    assert open_clip("text_model.encoder.layers.3.self_attn.v_proj.bias") == (
        "transformer.resblocks.3.attn.in_proj_bias",
        2,
    )
    assert open_clip("encoder.layers.0.mlp.fc2.weight") == ("transformer.resblocks.0.mlp.c_proj.weight", None)
    assert open_clip("embeddings.position_embedding.weight") == ("positional_embedding", None)
    assert open_clip("final_layer_norm.bias") == ("ln_final.bias", None)
    assert open_clip("vision_model.embeddings.class_embedding") is None


@pytest.mark.parametrize(
    "name",
    ["", "down_blocks", "down_blocks.0.resnets.2.conv1", "down_blocks.0.resnets.0.conv9", "mid_block.resnets.5.x"],
)
def test_what_is_no_part_of_a_denoiser_has_no_name(name):
    assert original_unet(name) is None
    assert diffusers_unet(name) is None
