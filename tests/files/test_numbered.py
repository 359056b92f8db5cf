"""cloneofsimo's numbers are turned into the layers that they counted; the shapes are those of its published files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import LoraFileError
from sdlora.files.attach import looks_like
from sdlora.files.kohya import read_lora

WIDTHS = [320, 320, 640, 640, 1280, 1280, *[1280] * 3, *[640] * 3, *[320] * 3, 1280]
"""Of the 16 attention blocks in the order of `analog_svd_rank4.safetensors`: down, up, and the middle last."""

METADATA = {"unet": '["GEGLU", "CrossAttention", "Attention"]', "text_encoder": '["CLIPAttention"]'}
BLOCK = "transformer_blocks_0"


def block(width: int, context: int) -> list[tuple[int, int]]:
    """Weights of one attention block, (out, in), in the same file: self attention, GEGLU, cross attention."""
    own, other = (width, width), (width, context)
    return [own, own, own, own, (8 * width, width), own, other, other, own]


def numbered(shapes: dict[str, list[tuple[int, ...]]], rank: int = 1) -> dict[str, torch.Tensor]:
    """Every up factor holds its number, so that it can be found again."""
    tensors = {}
    for model, sizes in shapes.items():
        for i, (out, *inside) in enumerate(sizes):
            ones = (1,) * (len(inside) - 1)
            tensors[f"{model}:{i}:up"] = torch.full((out, rank, *ones), float(i))
            tensors[f"{model}:{i}:down"] = torch.ones(rank, *inside)
    return tensors


def usual(context: int = 768, layers: int = 12) -> dict[str, list[tuple[int, ...]]]:
    unet = [size for width in WIDTHS for size in block(width, context)]
    return {"unet": [*unet], "text_encoder": [(context, context)] * (4 * layers)}


def write(path, tensors, metadata=METADATA):
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("metadata", [METADATA, None], ids=["as written", "metadata lost"])
def test_numbers_become_names(path, metadata):
    lora = read_lora(write(path, numbered(usual()), metadata))
    assert (lora.format, looks_like(lora), len(lora.modules), lora.notes[1:]) == ("cloneofsimo", "sd1", 144 + 48, ())
    numbers = {name: int(weights.up[0, 0]) for name, weights in lora.modules.items()}
    first = f"lora_unet_down_blocks_0_attentions_0_{BLOCK}"
    assert [numbers[f"{first}_attn1_{layer}"] for layer in ("to_q", "to_k", "to_v", "to_out_0")] == [0, 1, 2, 3]
    assert numbers[f"{first}_ff_net_0_proj"] == 4
    assert [numbers[f"{first}_attn2_{layer}"] for layer in ("to_q", "to_k", "to_v", "to_out_0")] == [5, 6, 7, 8]
    assert numbers[f"lora_unet_down_blocks_2_attentions_1_{BLOCK}_attn2_to_out_0"] == 53
    assert numbers[f"lora_unet_up_blocks_1_attentions_0_{BLOCK}_attn1_to_q"] == 54
    assert numbers[f"lora_unet_mid_block_attentions_0_{BLOCK}_attn1_to_q"] == 135
    encoder = "lora_te_text_model_encoder_layers"
    attention = [numbers[f"{encoder}_11_self_attn_{layer}"] for layer in ("k_proj", "v_proj", "q_proj", "out_proj")]
    assert attention == [44, 45, 46, 47]


def test_the_scale_is_one(path):
    lora = read_lora(write(path, numbered(usual(), rank=3)))
    assert {(w.rank, w.alpha) for w in lora.modules.values()} == {(3, 3.0)}


def test_later_versions_of_diffusers_registered_the_feed_forward_last(path):
    shapes = usual()
    shapes["unet"] = [s for w in WIDTHS for s in [*block(w, 768)[:4], *block(w, 768)[5:], block(w, 768)[4]]]
    numbers = {name: int(w.up[0, 0]) for name, w in read_lora(write(path, numbered(shapes))).modules.items()}
    assert numbers[f"lora_unet_down_blocks_0_attentions_0_{BLOCK}_ff_net_0_proj"] == 8


def test_the_base_may_be_stable_diffusion_2(path):
    lora = read_lora(write(path, numbered(usual(context=1024, layers=23))))
    assert looks_like(lora) == "sd2" and len(lora.modules) == 144 + 92


def test_resnets_come_behind_the_attention_of_their_block(path):
    """With `use_extended_lora` the convolutions of residual blocks are numbered too."""
    kernel = (3, 3)
    resnet = [(320, 320, *kernel), (320, 1280), (320, 320, *kernel)]
    shapes = {"unet": [*block(320, 768), *block(320, 768), *resnet, *resnet]}
    with pytest.raises(LoraFileError, match="no model of Stable Diffusion has 24 such layers"):
        read_lora(write(path, numbered(shapes), {"unet": '["CrossAttention", "GEGLU", "ResnetBlock2D"]'}))
    names = {"unet": '["ResnetBlock2D"]'}
    linear = [(320, 1280)] * 2 + [(640, 1280)] * 2 + [(1280, 1280)] * 4
    linear += [(1280, 1280)] * 6 + [(640, 1280)] * 3 + [(320, 1280)] * 3 + [(1280, 1280)] * 2
    lora = read_lora(write(path, numbered({"unet": [*linear]}), names))
    numbers = {name: int(w.up[0, 0]) for name, w in lora.modules.items()}
    assert numbers["lora_unet_up_blocks_0_resnets_0_time_emb_proj"] == 8
    assert numbers["lora_unet_mid_block_resnets_1_time_emb_proj"] == 21


def test_new_words_are_told_of_not_dropped_in_silence(path):
    tokens = {"<s1>": torch.ones(768), "mystyle": torch.ones(768)}
    metadata = {**METADATA, "<s1>": "<embed>", "mystyle": "<embed>"}
    (note,) = (n for n in read_lora(write(path, numbered(usual()) | tokens, metadata)).notes if "zero" not in n)
    assert "embeddings of new words" in note and "<s1>" in note and "mystyle" in note
    with pytest.raises(LoraFileError, match="its key 'mystyle' belongs to none"):
        read_lora(write(path, numbered(usual()) | tokens))


def without(tensors: dict[str, torch.Tensor], *keys: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (without(numbered(usual()), "unet:9:up"), METADATA, "unet:9:down but no unet:9:up"),
        (without(numbered(usual()), "unet:9:up", "unet:9:down"), METADATA, "layer 9 of unet is missing"),
        (numbered({"unet": usual()["unet"][::-1]}), METADATA, r"layer \d+ of unet fits a weight of \[\d+, \d+\], and"),
        (numbered({"unet": usual()["unet"][:-1]}), METADATA, "has 143 such layers"),
        (numbered(usual()), {"unet": '["Transformer2DModel"]'}, "Transformer2DModel.* in unet were changed; known are"),
        (numbered(usual()), {"unet": "not json"}, "known are CrossAttention"),
        (numbered(usual()), {"unet": json.dumps([])}, "known are"),
        ({"unet:00:up": torch.ones(2, 1), "unet:0:up": torch.ones(2, 1)}, METADATA, "one layer twice"),
        ({"unet:0:up": torch.ones(2, 1), "unet:0:middle": torch.ones(1)}, METADATA, "unet:0:middle' belongs to none"),
    ],
)
def test_numbers_that_mean_nothing_certain_are_refused(path, tensors, metadata, message):
    with pytest.raises(LoraFileError, match=message):
        read_lora(write(path, tensors, metadata))
