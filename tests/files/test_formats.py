"""Files of other formats are refused by their names, never read by guess."""

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import LoraFileError
from sdlora.files.kohya import read_lora

MODULE = "lora_unet_mid_block_attentions_0_proj_in"
FACTORS = {f"{MODULE}.lora_down.weight": torch.ones(1, 2), f"{MODULE}.lora_up.weight": torch.ones(2, 1)}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"{MODULE}.dora_scale", "a DoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_magnitude_vector", "a DoRA"),
        (f"{MODULE}.hada_w1_a", "a LoHa"),
        (f"{MODULE}.lokr_w1", "a LoKr"),
        (f"{MODULE}.lora_mid.weight", "a LoCon with a third, middle factor"),
        (f"{MODULE}.oft_blocks", "an OFT"),
        (f"{MODULE}.on_input", "an IA3"),
        (f"{MODULE}.b1.weight", "a GLoRA"),
        (f"{MODULE}.diff", "a file of full weight differences"),
        (f"{MODULE}.w_norm", "a file of full weight differences"),
        ("lora_controlnet", "a Control-LoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_B.bias", "a LoRA with biases"),
        ("base_model.model.embeddings.lora_embedding_A", "a peft LoRA of an embedding table"),
        ("base_model.model.conv_in.modules_to_save.weight", "a peft file with whole layers in it"),
        ("base_model.model.conv_in.bias", "a peft file with whole layers in it"),
    ],
)
def test_one_key_of_another_format_is_enough_to_name_it(tmp_path, key, name):
    path = tmp_path / "other.safetensors"
    save_file({**FACTORS, key: torch.ones(2)}, path)
    with pytest.raises(LoraFileError, match=f"{name}.*not a plain LoRA, and is not read"):
        read_lora(path)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("emb_params", "a textual inversion embedding"),
        ("<s1>", "a textual inversion embedding"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint"),
        ("down_blocks.0.resnets.0.conv1.weight", "a whole model"),
    ],
)
def test_a_file_that_is_no_lora_at_all_is_called_what_it_is(tmp_path, key, name):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.ones(2)}, path)
    with pytest.raises(LoraFileError, match=f"{name}.*not a plain LoRA"):
        read_lora(path)
    save_file({**FACTORS, key: torch.ones(2)}, path)
    with pytest.raises(LoraFileError, match="1 of its 3 keys belong to no layer"):
        read_lora(path)


@pytest.mark.parametrize(
    ("stem", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("transformer.single_transformer_blocks.3.attn.to_q", "Flux, Stable Diffusion 3"),
        ("lora_transformer_single_transformer_blocks_3_attn_to_q", "Flux, Stable Diffusion 3"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_k", "Flux, Stable Diffusion 3"),
        ("diffusion_model.blocks.0.cross_attn.k", "a video or transformer model"),
    ],
)
def test_a_lora_for_a_model_that_is_not_known_is_called_so(tmp_path, stem, model):
    path = tmp_path / "other.safetensors"
    save_file({f"{stem}.lora_down.weight": torch.ones(1, 2), f"{stem}.lora_up.weight": torch.ones(2, 1)}, path)
    with pytest.raises(LoraFileError, match=rf"a LoRA for {model}.*those for Stable Diffusion 1\.x, 2\.x and XL"):
        read_lora(path)


@pytest.mark.parametrize(
    "key",
    [
        f"{MODULE}.weight",
        f"{MODULE}.bias",
        f"{MODULE}.lora_down.weight\n",
        "lora_unet.mid.alpha",
        ".alpha",
        "position_ids",
        "unet.somewhere.to_k.lora_A.weight",
        "vae.encoder.conv_in.lora_A.weight",
        "text_encoder.down_blocks.0.attentions.0.proj_in.lora_A.weight",
        "unet.mid_block.attentions.0.proj_in.lora_C.weight",
    ],
)
def test_a_key_that_belongs_to_no_layer_is_refused_by_its_name(tmp_path, key):
    path = tmp_path / "surplus.safetensors"
    save_file({**FACTORS, key: torch.ones(1)}, path)
    with pytest.raises(LoraFileError, match="1 of its 3 keys belong to no layer") as refused:
        read_lora(path)
    assert key.strip() in str(refused.value)


def test_a_hostile_key_is_shown_without_its_control_characters(tmp_path):
    path = tmp_path / "hostile.safetensors"
    save_file({**FACTORS, "\x1b[2Junet.x" + "y" * 999: torch.ones(1)}, path)
    with pytest.raises(LoraFileError) as refused:
        read_lora(path)
    assert "\x1b" not in str(refused.value) and len(str(refused.value)) < 400
