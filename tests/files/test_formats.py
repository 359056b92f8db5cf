"""Files of other formats are refused by their names, never read by guess."""

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import LoraFileError
from sdlora.files.kohya import read_lora

MODULE = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "a peft LoRA"),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_B.default.weight", "a peft LoRA"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora.down.weight", "an old diffusers"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight", "an old diffusers"),
        ("unet.mid_block.attentions.0.proj_in.lora.up.weight", "an old diffusers"),
        ("unet:9:up", "a cloneofsimo LoRA"),
        (f"{MODULE}.dora_scale", "a DoRA"),
        (f"{MODULE}.hada_w1_a", "a LoHa"),
        (f"{MODULE}.lokr_w1", "a LoKr"),
        (f"{MODULE}.lora_mid.weight", "a LoCon with a third, middle factor"),
        (f"{MODULE}.oft_blocks", "an OFT"),
        (f"{MODULE}.diff", "a file of full weight differences"),
        ("emb_params", "a textual inversion embedding"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint"),
        ("down_blocks.0.resnets.0.conv1.weight", "a whole model"),
    ],
)
def test_other_formats_are_named(tmp_path, key, name):
    path = tmp_path / "other.safetensors"
    usual = {f"{MODULE}.lora_down.weight": torch.ones(1, 2), f"{MODULE}.lora_up.weight": torch.ones(2, 1)}
    save_file({**usual, key: torch.ones(2)}, path)  # one such key among kohya's own is enough
    with pytest.raises(LoraFileError, match=f"{name}.*not read yet"):
        read_lora(path)


@pytest.mark.parametrize("key", [f"{MODULE}.weight", "lora_unet.mid.alpha", ".alpha", "position_ids", f"{MODULE}.bias"])
def test_a_key_that_belongs_to_no_module_is_refused(tmp_path, key):
    path = tmp_path / "surplus.safetensors"
    save_file({key: torch.ones(1)}, path)
    with pytest.raises(LoraFileError, match="no kohya LoRA: its key"):
        read_lora(path)
