"""What a single file says of itself is believed in the right order, and survives the way through a file."""

import pytest
import torch
from families.compare import parts_of
from families.tiny import make_tiny

from sdlora.container import open_container
from sdlora.families import FAMILIES, native_resolution
from sdlora.families.save_single import save_single

UNET = "model.diffusion_model."


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("zero", [False, True])
def test_v_prediction_and_zero_snr_are_told_again(tmp_path, name, zero):
    folder = make_tiny(tmp_path / name, name, prediction_type="v_prediction", rescale_betas_zero_snr=zero)
    save_single(folder, tmp_path / "v.safetensors")
    ours, theirs = parts_of(tmp_path / "v.safetensors"), parts_of(folder)
    assert ours.schedule.prediction == "v_prediction"
    assert torch.equal(ours.schedule.alphas_cumprod, theirs.schedule.alphas_cumprod)
    assert ours.scheduler_config.get("timestep_spacing") == ("trailing" if zero else None)
    container = open_container(tmp_path / "v.safetensors")
    assert [("v_pred" in container.entries), ("ztsnr" in container.entries)] == [True, zero]
    assert container.metadata["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize(
    ("name", "edit", "metadata", "expected", "sign"),
    [
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, "v_prediction", "metadata"),
        ("sdxl", {"v_pred": 0}, {"modelspec.prediction_type": "epsilon"}, "v_prediction", "key v_pred"),
        ("sdxl", {"ztsnr": 0}, {"modelspec.prediction_type": "nonsense"}, "epsilon", "pure noise"),
        ("sd2", {"spread": 1}, {"modelspec.prediction_type": ""}, "v_prediction", "spread of one of its biases"),
        ("sd2", {"spread": 0}, {"modelspec.prediction_type": ""}, "epsilon", None),
        ("sd2", {"spread": 1}, {"modelspec.prediction_type": "epsilon"}, "epsilon", None),
        ("sd1", {"spread": 1}, {"modelspec.prediction_type": ""}, "epsilon", None),
    ],
)
def test_the_prediction_type_is_told_by_the_surest_sign(edited, name, edit, metadata, expected, sign):
    def change(tensors):
        for key, value in edit.items():
            if key == "spread":
                bias = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
                tensors[bias] = torch.linspace(-1, 1, len(tensors[bias])) * (0.17 if value else 0.1)
            else:
                tensors[key] = torch.tensor([])

    parts = parts_of(edited(name, change, **metadata))
    assert parts.schedule.prediction == expected
    told = [note for note in parts.notes if "told by" in note]
    assert len(told) == (sign is not None) and all(sign in note for note in told)


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("sd1", {"modelspec.resolution": "768x768"}, 768),
        ("sd1", {"modelspec.resolution": "1024x768"}, 512),
        ("sd1", {"modelspec.resolution": "99999999x99999999"}, 512),
        ("sd2", {"modelspec.resolution": "", "modelspec.prediction_type": "v"}, 768),
        ("sd2", {"modelspec.resolution": "?", "modelspec.prediction_type": "epsilon"}, 512),
        ("sdxl", {"modelspec.resolution": "123x123"}, 1024),
    ],
)
def test_the_resolution_is_the_metadatas_or_the_familys(edited, name, metadata, expected):
    file = edited(name, **metadata)
    assert native_resolution(file) == expected
    assert parts_of(file).denoiser.config.sample_size == expected // 8
