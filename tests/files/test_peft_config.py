"""peft's settings are read as strictly as the factors, for without them nobody knows how strong a LoRA is."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import LoraFileError
from sdlora.files.kohya import read_lora

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
PATH = f"unet.{LAYER}"
STEM = f"base_model.model.{LAYER}"


def factors(stem: str, width: int = 768) -> dict[str, torch.Tensor]:
    return {f"{stem}.lora_A.weight": torch.ones(2, width), f"{stem}.lora_B.weight": torch.ones(640, 2)}


def test_a_rank_stabilised_adapter_has_the_square_root_of_the_rank_in_its_scale(tmp_path):
    save_file(
        {
            "base_model.model.conv_in.lora_A.weight": torch.ones(9, 4, 3, 3),
            "base_model.model.conv_in.lora_B.weight": torch.ones(320, 9, 1, 1),
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 9, "lora_alpha": 6, "use_rslora": True}))
    assert read_lora(tmp_path).modules["lora_unet_conv_in"].scale == pytest.approx(6 / math.sqrt(9))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora: DoRA, not a plain LoRA"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save: whole layers"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"peft_type": "LOHA"}, "describes a LOHA"),
        ({"init_lora_weights": "pissa_niter_16"}, "also changed the base model"),
        ({"r": 4}, "says rank 4 for down_blocks.*, whose factors have rank 2"),
        ({"r": "2"}, "must be numbers"),
        ({"lora_alpha": float("nan")}, "must be numbers"),
        ({"alpha_pattern": {"to_k": "x"}}, "alpha_pattern must give a number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "a regular expression"),
        ({"rank_pattern": ["to_k"]}, "rank_pattern must give a number"),
    ],
)
def test_a_configuration_that_says_more_or_else_is_refused(tmp_path, config, message):
    save_file(factors(STEM), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, **config}))
    with pytest.raises(LoraFileError, match=message):
        read_lora(tmp_path)
    flat = {f"unet.{key}": value for key, value in {"r": 2, "lora_alpha": 2, **config}.items()}
    path = tmp_path / "diffusers.safetensors"
    save_file(factors(PATH), path, {"lora_adapter_metadata": json.dumps(flat)})
    with pytest.raises(LoraFileError, match=message):
        read_lora(path)


@pytest.mark.parametrize("text", ["", "[1]", '"r"', "[" * 100_000, "\x00"])
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path, text):
    save_file(factors(STEM), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(LoraFileError, match=r"cannot read .*adapter_config\.json"):
        read_lora(tmp_path)


@pytest.mark.parametrize("huge", ["1e999", "1" + "0" * 400, "1" * 5000, "true", "[2]"])
def test_a_number_that_is_none_is_refused(tmp_path, huge):
    path = tmp_path / "a.safetensors"
    table = f'{{"unet.r": 2, "unet.lora_alpha": {huge}}}'
    save_file(factors(PATH), path, {"lora_adapter_metadata": table})
    with pytest.raises(LoraFileError, match=r"both must be numbers|cannot read lora_adapter_metadata"):
        read_lora(path)


def test_a_changed_byte_in_the_header_never_gives_another_error(tmp_path):
    path = tmp_path / "a.safetensors"
    table = json.dumps({"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {"to_k": 1.5}})
    save_file(factors(PATH, width=3), path, {"lora_adapter_metadata": table})
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for position in range(end):
        for flip in (0x01, 0x10, 0x80):
            path.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
            try:
                read_lora(path)  # a changed letter of a name may be harmless
            except LoraFileError:
                refused += 1
    assert refused > end


def test_a_forged_file_takes_no_more_time_than_it_has_letters(tmp_path):
    """Ten thousand layers and as many patterns, and a key of a hundred thousand dots."""
    stems = [f"unet.mid_block.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in range(10_000)]
    tensors = {f"{s}.lora_{f}.weight": torch.ones(1, 1) for s in stems for f in "AB"}
    patterns = {f"x.{i}.attn1.to_q": 1 for i in range(10_000)}
    table = {"unet.r": 1, "unet.lora_alpha": 1, "unet.alpha_pattern": patterns}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(table)})
    started = time.process_time()
    assert len(read_lora(path).modules) == 10_000
    save_file({"unet.conv_in" + ".lora_A" * 100_000 + ".weight": torch.ones(1)}, path)
    with pytest.raises(LoraFileError, match="belong to no layer"):
        read_lora(path)
    assert time.process_time() - started < 30


def test_patterns_name_the_ends_of_paths(tmp_path):
    """As in peft: whole components, the first that fits; `^` ties one to the beginning."""
    tensors = {}
    for layer in ("attn2.to_k", "attn2.to_v", "attn1.to_k"):
        tensors |= factors(STEM.replace("attn2.to_k", layer))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    patterns = {"^to_k": 9, "ttn2.to_k": 9, "attn2.to_k": 4, "to_k": 6, "to_q": 9}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1, "alpha_pattern": patterns}))
    alphas = {name.partition("_0_attn")[2]: w.alpha for name, w in read_lora(tmp_path).modules.items()}
    assert alphas == {"2_to_k": 4, "2_to_v": 1, "1_to_k": 6}


def test_missing_alpha_is_rank_and_said(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(factors(PATH), path)
    lora = read_lora(path)
    assert [w.alpha for w in lora.modules.values()] == [2] and "1 of 1 modules have no alpha" in lora.notes[0]
    save_file(factors(STEM), path)
    first, second = read_lora(path).notes
    assert "no adapter_config.json beside a.safetensors" in first and "have no alpha" in second
