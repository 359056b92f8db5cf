"""Out of two checkpoints comes what makes the one of the other: a LoRA that was baked in is found again."""

import json
import shutil

import pytest
import torch
from families.tiny import make_tiny
from files.random_lora import delta, random_lora, relative
from safetensors.torch import load_file, save_file

from sdlora.cli.main import main
from sdlora.errors import ModelError
from sdlora.families.places import places
from sdlora.families.save_single import save_single
from sdlora.files.bake import bake
from sdlora.files.difference import DENOISER, TEXT, is_rounding
from sdlora.files.extract import extract
from sdlora.files.kohya import read_lora
from sdlora.files.layers import layers_of
from sdlora.files.merge import Weighed
from sdlora.files.svd import by_energy, by_rank

UNET = "unet/diffusion_pytorch_model.safetensors"
QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def reached(base) -> list[str]:
    return [name for name in places(base)[1] if DENOISER.fullmatch(name) or TEXT.fullmatch(name)]


def baked(base, lora, out):
    out = out.with_suffix(".safetensors") if base.is_file() else out
    bake(base, [Weighed(lora)], out)
    return out


def copied(path, out, edit=lambda tensors: None, dtype=None):
    """Writes a single file with other tensors."""
    tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, out)
    return out


def test_a_baked_lora_is_found_again(base, tmp_path):
    names = reached(base)
    lora = random_lora(tmp_path / "lora.safetensors", base, names)
    tuned = baked(base, lora, tmp_path / "tuned")
    found = extract(base, tuned, by_rank(3), torch.float32, start=3, text_encoder=True)
    assert found.modules.keys() == set(names) and found.unchanged == 0 and found.notes == ()
    assert found.family is places(base)[0]
    for name, weights in lora.modules.items():
        assert relative(delta(found.modules[name]), delta(weights)) < 1e-3
        assert found.modules[name].down.shape[1:] == weights.down.shape[1:]
        assert found.modules[name].up.ndim == weights.up.ndim
        assert found.cuts[name].kept == pytest.approx(1, abs=1e-5)


def test_it_is_found_in_fp16_as_well_as_rounding_allows(single, tmp_path):
    base = copied(single, tmp_path / "half.safetensors", dtype=torch.float16)
    lora = random_lora(tmp_path / "lora.safetensors", base, reached(base))
    tuned = baked(base, lora, tmp_path / "tuned")
    found = extract(base, tuned, by_rank(3), torch.float32, text_encoder=True)
    assert all(relative(delta(found.modules[name]), delta(weights)) < 5e-3 for name, weights in lora.modules.items())


def test_the_layers_are_those_that_trainers_and_programs_know():
    counts = {"sd1": (278, 72), "sd2": (278, 138), "sdxl": (788, 264)}
    for family, (denoiser, text) in counts.items():
        names = layers_of(family)
        assert sum(bool(DENOISER.fullmatch(name)) for name in names) == denoiser
        assert sum(bool(TEXT.fullmatch(name)) for name in names) == text


def test_layers_without_a_difference_are_left_out_and_counted(single, tmp_path):
    names = reached(single)
    lora = random_lora(tmp_path / "lora.safetensors", single, names[::3])
    tuned = baked(single, lora, tmp_path / "tuned")
    found = extract(single, tuned, by_rank(3), torch.float32, text_encoder=True)
    assert found.modules.keys() == set(names[::3])
    assert found.unchanged == len(names) - len(names[::3])


def test_a_file_and_a_folder_are_compared(tiny_sd2, tmp_path):
    lora = random_lora(tmp_path / "lora.safetensors", tiny_sd2, reached(tiny_sd2))
    save_single(baked(tiny_sd2, lora, tmp_path / "tuned"), tmp_path / "tuned.safetensors")
    found = extract(tiny_sd2, tmp_path / "tuned.safetensors", by_rank(3), torch.float32, text_encoder=True)
    assert all(relative(delta(found.modules[name]), delta(weights)) < 1e-3 for name, weights in lora.modules.items())


def test_rounding_is_no_difference_and_one_step_more_is(single, tmp_path):
    half = copied(single, tmp_path / "half.safetensors", dtype=torch.float16)
    brain = copied(single, tmp_path / "brain.safetensors", dtype=torch.bfloat16)
    for first, second in ((single, half), (half, brain), (single, single)):
        with pytest.raises(ModelError, match="does not differ from"):
            extract(first, second, by_rank(1), torch.float32, text_encoder=True)
    key = places(single)[1][QUERY].key

    def nudge(tensors):
        tensors[key].view(torch.int16)[0, 0] += 2

    nudged = copied(half, tmp_path / "nudged.safetensors", nudge)
    assert extract(half, nudged, by_rank(1), torch.float32).modules.keys() == {QUERY}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_what_counts_as_rounding(dtype):
    exact = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 0, 40)
    rounded = exact.to(dtype)
    assert is_rounding(exact, rounded) and is_rounding(rounded, exact)
    moved = rounded.float()
    moved[3, 39] *= 1 + 2 * torch.finfo(dtype).eps
    assert not is_rounding(exact, moved.to(dtype))
    assert not is_rounding(rounded, moved.to(dtype))


def test_what_is_not_extracted_is_said(single, tmp_path):
    lora = random_lora(tmp_path / "lora.safetensors", single)  # both ends and the embeddings of time included
    tuned = baked(single, lora, tmp_path / "tuned")

    def shift(tensors):
        for key in ("model.diffusion_model.out.0.bias", "model.diffusion_model.middle_block.0.in_layers.0.weight"):
            tensors[key] += 1

    tuned = copied(tuned, tmp_path / "shifted.safetensors", shift)
    found = extract(single, tuned, by_rank(3), torch.float32)
    ends = sum(name.startswith("lora_unet_") for name in set(lora.modules) - set(reached(single)))
    assert found.notes == (
        "the text encoders differ too; --text-encoder extracts them",
        f"{ends + 2} other tensors differ too (biases, norms, embeddings, both ends); a LoRA holds none of them",
    )
    assert all(name.startswith("lora_unet_") for name in found.modules)


def test_energy_is_kept_in_every_layer(single, tmp_path):
    lora = random_lora(tmp_path / "lora.safetensors", single, reached(single))
    tuned = baked(single, lora, tmp_path / "tuned")
    found = extract(single, tuned, by_energy(0.8), torch.float32)
    assert {weights.rank for weights in found.modules.values()} == {1, 2, 3}
    assert all(cut.kept**2 >= 0.8 - 1e-6 for cut in found.cuts.values())


def test_other_predictions_are_noted_and_the_tuned_ones_is_written(tmp_path):
    base = make_tiny(tmp_path / "base", "sd2")
    tuned = make_tiny(tmp_path / "tuned", "sd2", seed=2, prediction_type="v_prediction")
    found = extract(base, tuned, by_rank(1), torch.float32)
    assert "predicts epsilon and" in found.notes[0]
    assert found.facts["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert (found.facts["modelspec.prediction_type"], found.facts["modelspec.resolution"]) == ("v", "64x64")


def test_the_command_writes_what_it_found_and_says_what_it_left(capsys, single, tmp_path):
    lora = random_lora(tmp_path / "lora.safetensors", single, reached(single)[::2])
    tuned = baked(single, lora, tmp_path / "tuned")
    outs = [tmp_path / name / "found.safetensors" for name in ("one", "two")]
    for seed, out in enumerate(outs):
        torch.manual_seed(seed)
        options = ["--rank", "3", "--text-encoder", "--dtype", "fp32"]
        main(["lora", "extract", "--base", str(single), "--tuned", str(tuned), "-o", str(out), *options])
    assert outs[0].read_bytes() == outs[1].read_bytes()
    said = capsys.readouterr().out
    count = len(lora.modules)
    assert f"Extracted by rank 3: {count} modules of Stable Diffusion 1.x, rank 3" in said
    assert f"Equal: {len(reached(single)) - count} layers differ by no more than rounding" in said
    assert "100.00% of the change's Frobenius norm kept" in said
    found = read_lora(outs[0])
    assert all(relative(delta(found.modules[name]), delta(weights)) < 1e-3 for name, weights in lora.modules.items())
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_dim": "3",
        "ss_network_alpha": "3.0",
        "ss_network_module": "networks.lora",
        "ss_output_name": "found",
        "ss_sd_model_name": "base.safetensors",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "found",
    }
    assert {key: found.metadata.get(key) for key in expected} == expected
    assert json.loads(found.metadata["sdlora_extracted"]) == {"base": "base.safetensors", "tuned": "tuned.safetensors"}
    assert str(tmp_path) not in "".join(found.metadata.values())


def test_checkpoints_that_do_not_belong_together_are_refused(tiny_sd1, tiny_sd2, tmp_path, single):
    rank = by_rank(1)
    with pytest.raises(ModelError, match=r"sd1 is Stable Diffusion 1.x and .*sd2 is Stable Diffusion 2.x"):
        extract(tiny_sd1, tiny_sd2, rank, torch.float32)
    bare = tmp_path / "bare.safetensors"
    save_file({k: t for k, t in load_file(single).items() if k.startswith("model.diffusion_model.")}, bare)
    with pytest.raises(ModelError, match=r"12 layers are missing in .*bare.*, the first is lora_te_text_model"):
        extract(single, bare, rank, torch.float32, text_encoder=True)
    with pytest.raises(ModelError, match="hold no text encoder"):
        extract(bare, bare, rank, torch.float32, text_encoder=True)
    with pytest.raises(ModelError, match="--text-encoder"):
        extract(bare, single, rank, torch.float32)
    wide = tmp_path / "wide"
    shutil.copytree(tiny_sd1, wide)
    tensors = load_file(wide / UNET)
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    save_file({**tensors, key: torch.zeros(24, 25)}, wide / UNET)
    with pytest.raises(ModelError, match=rf"{QUERY} has the shape \[24, 24\] in the first and \[24, 25\]"):
        extract(tiny_sd1, wide, rank, torch.float32)
    save_file({k: t for k, t in tensors.items() if k != key}, wide / UNET)
    with pytest.raises(ModelError, match=f"1 layers are missing in .*wide, the first is {QUERY}"):
        extract(tiny_sd1, wide, rank, torch.float32)
    save_file({**tensors, key: tensors[key].char()}, wide / UNET)
    with pytest.raises(ModelError, match=rf"is quantised \({key} holds int8\)"):
        extract(tiny_sd1, wide, rank, torch.float32)
    save_file({**tensors, key: tensors[key] / 0}, wide / UNET)
    with pytest.raises(ModelError, match=f"{QUERY} holds values that are infinite or not a number"):
        extract(tiny_sd1, wide, rank, torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "2", "--energy", "0.9", "-o", "out.safetensors"], "got rank and energy"),
        (["--rank", "0", "-o", "out.safetensors"], "--rank"),
        (["-o", "base.safetensors"], "would be written over"),
        (["-o", "out.bin"], "must end in .safetensors"),
        ([], "--output"),
        (["--tuned", "missing.safetensors", "-o", "out.safetensors"], "no base model 'missing.safetensors'"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(capsys, single, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = ["--base", "base.safetensors", "--tuned", "base.safetensors", *arguments]
    with pytest.raises(SystemExit) as stop:
        main(["lora", "extract", *given])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]
