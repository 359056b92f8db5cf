"""A certificate is given to the file that was trained, and to no other; nothing in memory changes."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import LoraFileError
from sdlora.files.certify import certify, file_values
from sdlora.files.kohya import read_lora, write_lora

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def snapshot(adapters):
    return {
        (c, p): (a.down.detach().clone(), a.up.detach().clone(), a.alpha, a.training)
        for c, by_path in adapters.items()
        for p, a in by_path.items()
    }


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k][0], b[k][0]) and torch.equal(a[k][1], b[k][1]) and a[k][2:] == b[k][2:] for k in a
    )


@pytest.fixture
def written(tmp_path, tiny_parts, adapt):
    adapters = adapt(tiny_parts)
    path = tmp_path / "style.safetensors"
    write_lora(path, adapters, tiny_parts.family, {}, torch.float32)
    return path, adapters


@pytest.mark.parametrize(
    ("dtype", "word", "least", "most"),
    [(torch.float32, "fp32", 0, 0), (torch.float16, "fp16", 1e-5, 1e-3), (torch.bfloat16, "bf16", 1e-4, 1e-2)],
)
def test_what_was_trained_is_certified(tmp_path, tiny_parts, adapt, dtype, word, least, most):
    adapters = adapt(tiny_parts)
    path = tmp_path / "style.safetensors"
    write_lora(path, adapters, tiny_parts.family, {}, dtype)
    for model in tiny_parts.components.values():
        model.train()
    adapters["denoiser"]["mid_block.resnets.0.conv1"].dropout = 0.5
    before, state = snapshot(adapters), torch.get_rng_state()
    certificate = certify(path, adapters, tiny_parts)
    assert same(snapshot(adapters), before)
    assert all(module.training for model in tiny_parts.components.values() for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert (certificate.num_modules, certificate.num_keys) == (296, 888)
    assert (certificate.dtype, certificate.bytes) == (word, path.stat().st_size)
    assert certificate.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert least <= certificate.max_relative_difference <= most


@pytest.mark.parametrize("size", [0.0, 1e-8, 1e-6, 1e-3])
def test_small_values_lose_digits_in_fp16_and_are_certified_all_the_same(tmp_path, tiny_parts, adapt, size):
    # After a step or two the factors lie among fp16's subnormal numbers.
    adapters = adapt(tiny_parts, "attention", encoder=False, size=size)
    path = tmp_path / "style.safetensors"
    write_lora(path, adapters, tiny_parts.family, {}, torch.float16)
    certify(path, adapters, tiny_parts)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("lora_down.weight", lambda t: t.flip(0)),
        ("lora_up.weight", lambda t: t * 1.001),
        ("lora_up.weight", lambda t: -t),
        ("alpha", lambda t: t * 2),
        ("lora_down.weight", torch.zeros_like),
    ],
)
def test_a_file_with_one_wrong_tensor_is_refused_by_name(written, tiny_parts, key, change):
    path, adapters = written
    held = load_file(path)
    held[f"{MODULE}.{key}"] = change(held[f"{MODULE}.{key}"]).contiguous()
    save_file(held, path)
    with pytest.raises(LoraFileError, match=f"the change of {MODULE} differs from the trained one"):
        certify(path, adapters, tiny_parts)


def test_missing_surplus_and_misshapen_modules_are_refused(written, tiny_parts):
    path, adapters = written
    held = load_file(path)
    without = {key: t for key, t in held.items() if not key.startswith(MODULE)}
    save_file(without, path)
    with pytest.raises(LoraFileError, match=f"3 keys are missing and 0 are too many, the first is {MODULE}"):
        certify(path, adapters, tiny_parts)
    more = {key.replace("mid_block", "other"): t.clone() for key, t in held.items() if key.startswith(MODULE)}
    save_file({**held, **more}, path)
    with pytest.raises(LoraFileError, match="0 keys are missing and 3 are too many, the first is lora_unet_other"):
        certify(path, adapters, tiny_parts)
    save_file({key: t for key, t in held.items() if key != f"{MODULE}.alpha"}, path)
    with pytest.raises(LoraFileError, match="1 keys are missing"):
        certify(path, adapters, tiny_parts)
    wide = {f"{MODULE}.lora_down.weight": torch.ones(2, 24), f"{MODULE}.lora_up.weight": torch.ones(24, 2)}
    save_file({**held, **wide}, path)
    with pytest.raises(LoraFileError, match=rf"{MODULE} has down \[2, 24\]"):
        certify(path, adapters, tiny_parts)


def test_an_output_beyond_the_tolerance_is_refused(tmp_path, tiny_parts, adapt):
    adapters = adapt(tiny_parts)
    path = tmp_path / "style.safetensors"
    write_lora(path, adapters, tiny_parts.family, {}, torch.bfloat16)
    before = snapshot(adapters)
    with pytest.raises(LoraFileError, match=r'output differs by .* 1e-09 is allowed; use output.save_dtype = "fp32"'):
        certify(path, adapters, tiny_parts, tolerance=1e-9)
    assert same(snapshot(adapters), before)


def test_a_base_in_half_precision_is_certified(tmp_path, tiny_parts, adapt):
    tiny_parts.to("cpu", torch.bfloat16)
    adapters = adapt(tiny_parts)
    path = tmp_path / "style.safetensors"
    write_lora(path, adapters, tiny_parts.family, {}, torch.float16)
    assert certify(path, adapters, tiny_parts).dtype == "fp16"


def test_live_adapters_hold_a_files_values_and_then_their_own(written, tiny_parts):
    path, adapters = written
    lora = read_lora(path)
    with torch.no_grad():
        for by_path in adapters.values():
            for adapter in by_path.values():
                adapter.up.mul_(3)
                adapter.alpha = 7.0
    before = snapshot(adapters)
    adapter = adapters["denoiser"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    with pytest.raises(KeyError, match="stop"), file_values(adapters, lora, tiny_parts.family):
        assert adapter.alpha == 1.5 and torch.equal(adapter.up, lora.modules[MODULE].up)
        raise KeyError("stop")
    assert same(snapshot(adapters), before)
    del adapters["text_encoder"]
    refused = pytest.raises(LoraFileError, match="other modules than the adapters")
    with refused, file_values(adapters, lora, tiny_parts.family):
        pass
