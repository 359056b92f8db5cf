"""What is written is read back the same; what could act at a wrong strength is neither written nor read."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import nn

from sdlora.adapters import Lora
from sdlora.diffusion.noise import generator
from sdlora.errors import LoraFileError
from sdlora.files.kohya import adapter_modules, module_names, module_tensors, read_lora, update_norm, write_lora

MODULE = "lora_unet_mid_block_attentions_0_proj_in"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def one(rank: int = 2, alpha: float = 1.0, layer: nn.Module | None = None) -> Lora:
    adapter = Lora(layer or nn.Linear(5, 4), rank, alpha, generator=generator("one"))
    with torch.no_grad():
        adapter.up.copy_(torch.randn(adapter.up.shape, generator=generator("up")))
    return adapter


def tensors(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A sound module; `down`, `up` and `alpha` replaced, or left out where `None`."""
    usual = {"down": torch.randn(2, 5), "up": torch.randn(4, 2), "alpha": torch.tensor(1.0)}
    suffixes = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    return {f"{MODULE}.{suffixes[k]}": t for k, t in {**usual, **changed}.items() if t is not None}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_comes_back_rounded_once_and_otherwise_the_same(tmp_path, tiny_parts, adapt, dtype):
    adapters = adapt(tiny_parts)
    path = tmp_path / "style.safetensors"
    digest = write_lora(path, adapters, tiny_parts.family, {"ss_a": "b"}, dtype)
    lora = read_lora(path)
    named = module_names(adapters, tiny_parts.family)
    assert set(lora.modules) == set(named) and len(named) == 278 + 18
    for name, adapter in named.items():
        weights = lora.modules[name]
        assert weights.alpha == adapter.alpha == 1.5 and weights.rank == 3 and weights.scale == 0.5
        for file, memory in ((weights.down, adapter.down), (weights.up, adapter.up)):
            assert file.dtype == dtype and torch.equal(file, memory.detach().to(dtype))
    assert (lora.dtype, lora.notes, lora.model_hash) == (dtype, (), digest)
    assert lora.metadata["ss_a"] == "b"


def test_equal_input_gives_equal_bytes(tmp_path, tiny_parts, adapt):
    adapters = adapt(tiny_parts)
    metadata = {f"ss_{i}": str(i) for i in range(30)}
    for name in ("a", "b"):
        write_lora(tmp_path / f"{name}.safetensors", adapters, tiny_parts.family, metadata, torch.float16)
        metadata = dict(reversed(metadata.items()))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_every_module_is_three_tensors_of_one_dtype_and_nothing_else(tiny_parts, adapt):
    adapters = adapt(tiny_parts)
    written = module_tensors(adapter_modules(adapters, tiny_parts.family), torch.float16)
    assert len(written) == 3 * (278 + 18)
    assert {t.dtype for t in written.values()} == {torch.float16}
    assert all(t.shape == () for key, t in written.items() if key.endswith(".alpha"))
    assert all(key.count(".") == (1 if key.endswith(".alpha") else 2) for key in written)
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert written[f"{conv}.lora_down.weight"].shape == (3, 8, 3, 3)
    assert written[f"{conv}.lora_up.weight"].shape == (8, 3, 1, 1)


def test_hashes_are_kohyas(tmp_path, tiny_parts):
    """Recomputed from the bytes as sd-scripts does: the legacy hash of a file that holds the ss_ keys alone."""
    adapters = {"denoiser": {"mid_block.wide": one(64, 32.0, nn.Linear(3000, 2600))}}
    path = tmp_path / "big.safetensors"
    metadata = {"ss_seed": "42", "modelspec.title": "big", "sdlora_version": "0"}
    write_lora(path, adapters, tiny_parts.family, metadata, torch.float32)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    with safe_open(path, "pt") as file:
        stored, keys = file.metadata(), list(file.keys())
        held = {key: file.get_tensor(key) for key in keys}
    assert stored["sshs_model_hash"] == hashlib.sha256(content[8 + length :]).hexdigest()
    kohyas = save(held, {"ss_seed": "42"})
    assert len(kohyas) > 0x110000
    assert stored["sshs_legacy_hash"] == hashlib.sha256(kohyas[0x100000:0x110000]).hexdigest()[:8]
    assert set(stored) == {*metadata, "sshs_model_hash", "sshs_legacy_hash"}
    assert json.loads(content[8 : 8 + length])["__metadata__"] == stored


def test_the_norm_is_that_of_the_product():
    for layer in (nn.Linear(7, 5), nn.Conv2d(3, 6, 3), nn.Conv2d(4, 2, 1)):
        adapter = one(2, 3.0, layer)
        exact = torch.linalg.vector_norm(adapter.delta_weight()).item()
        assert update_norm(adapter.down.detach(), adapter.up.detach(), adapter.scale) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_never_written(tmp_path, tiny_parts, bad):
    adapter = one()
    with torch.no_grad():
        adapter.up[1, 1] = bad
    path = tmp_path / "a.safetensors"
    with pytest.raises(LoraFileError, match=r"lora_unet_layer\.lora_up\.weight.*training has broken down"):
        write_lora(path, {"denoiser": {"layer": adapter}}, tiny_parts.family, {}, torch.float32)
    assert not path.exists()


def test_what_overflows_in_fp16_is_refused_and_fits_into_bf16(tmp_path, tiny_parts):
    adapter = one()
    with torch.no_grad():
        adapter.down[0, 0] = 70_000
    adapters, path = {"denoiser": {"layer": adapter}}, tmp_path / "a.safetensors"
    with pytest.raises(LoraFileError, match=r'lora_unet_layer.*as fp16: 7e\+04 .*"bf16" or "fp32"'):
        write_lora(path, adapters, tiny_parts.family, {}, torch.float16)
    write_lora(path, adapters, tiny_parts.family, {}, torch.bfloat16)


def test_an_alpha_that_would_vanish_is_refused(tiny_parts):
    adapters = {"denoiser": {"layer": one(alpha=1e-9)}}
    with pytest.raises(LoraFileError, match=r"layer\.alpha as fp16"):
        module_tensors(adapter_modules(adapters, tiny_parts.family), torch.float16)


def test_two_layers_of_one_name_are_refused(tiny_parts):
    with pytest.raises(LoraFileError, match=r"lora_unet_a_b .*is the name of two layers"):
        module_names({"denoiser": {"a.b": one(), "a_b": one()}}, tiny_parts.family)


def test_nothing_to_write_is_refused(tmp_path, tiny_parts):
    with pytest.raises(LoraFileError, match="there are no adapters"):
        write_lora(tmp_path / "a.safetensors", {"denoiser": {}}, tiny_parts.family, {}, torch.float32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"up": None}, "has lora_down.weight but no lora_up.weight"),
        ({"down": None}, "has lora_up.weight but no lora_down.weight"),
        ({"up": None, "down": None}, "has alpha but no lora_(up|down).weight"),
        ({"up": torch.ones(4, 3)}, r"do not fit together: down \[2, 5\], up \[4, 3\]"),
        ({"up": torch.ones(2, 4)}, "do not fit together"),
        ({"up": torch.ones(4, 2, 1, 1)}, "do not fit together"),
        ({"down": torch.ones(2, 5, 3, 3), "up": torch.ones(4, 2, 3, 3)}, "do not fit together"),
        ({"down": torch.ones(5), "up": torch.ones(4)}, "do not fit together"),
        ({"down": torch.ones(0, 5), "up": torch.ones(4, 0)}, "do not fit together"),
        ({"down": torch.ones(2, 5, dtype=torch.int32)}, "is stored as int32; LoRA factors are read as fp16"),
        ({"alpha": torch.ones(2)}, r"alpha of .* has shape \[2\]"),
        ({"alpha": torch.tensor(float("nan"))}, "alpha of .* is nan"),
        ({"down": torch.full((2, 5), float("nan"))}, "lora_down.weight holds 10 values"),
        ({"up": torch.full((4, 2), float("inf"))}, "lora_up.weight holds 8 values"),
    ],
)
def test_a_module_that_is_not_sound_is_refused(tmp_path, changed, message):
    path = tmp_path / "a.safetensors"
    save_file(tensors(**changed), path)
    with pytest.raises(LoraFileError, match=message) as refused:
        read_lora(path)
    assert MODULE in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "alpha", "note"),
    [
        ({"alpha": None}, 2.0, "1 of 1 modules have no alpha"),
        ({"alpha": torch.tensor([4])}, 4.0, None),  # some programs write whole numbers, in a vector of one
        ({"alpha": torch.tensor(0.5).half()}, 0.5, None),
        ({"up": torch.zeros(4, 2)}, 1.0, "every module is zero and changes nothing"),
        ({"up": torch.ones(4, 2).half()}, 1.0, "several number formats: fp16, fp32"),
    ],
)
def test_what_is_unusual_is_read_and_noted(tmp_path, changed, alpha, note):
    path = tmp_path / "a.safetensors"
    save_file(tensors(**changed), path)
    lora = read_lora(path)
    assert lora.modules[MODULE].alpha == alpha
    assert [note in n for n in lora.notes] == [True] if note else lora.notes == ()
