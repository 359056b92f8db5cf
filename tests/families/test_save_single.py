"""A folder becomes the same file every time, or says why it cannot become one."""

import json
import shutil

import pytest
import torch
from families.tiny import make_tiny
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

from sdlora.errors import ModelError
from sdlora.families.save_single import save_single


def test_equal_folders_make_equal_files(pairs, tmp_path):
    folder, file = pairs["sd2"]
    save_single(folder, tmp_path / file.name)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("unet/config.json", {"attention_head_dim": 4}, "has attention_head_dim 4"),
        ("vae/config.json", {"scaling_factor": 1.5}, r"has scaling_factor 1\.5"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "has hidden_act gelu"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "has beta_schedule linear"),
    ],
)
def test_what_a_single_file_cannot_tell_is_not_written(tmp_path, part, changes, match):
    folder = make_tiny(tmp_path / "sd1", "sd1")
    config = json.loads((folder / part).read_text())
    (folder / part).write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=match):
        save_single(folder, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_in_diffusers_first_names_makes_the_same_file(pairs, tmp_path):
    folder, file = pairs["sd1"]
    old = shutil.copytree(folder, tmp_path / "old")
    weights = old / "vae" / "diffusion_pytorch_model.safetensors"
    first = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = read_tensors(weights)
    for now, then in first.items():
        tensors = {key.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): t for key, t in tensors.items()}
    save_file(tensors, weights)
    encoder = old / "text_encoder" / "model.safetensors"
    save_file(read_tensors(encoder) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, encoder)
    save_single(old, tmp_path / file.name)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
