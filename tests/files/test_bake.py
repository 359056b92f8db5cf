"""A checkpoint with a LoRA baked in is the base with the LoRA attached, in every form that a base comes in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from files.random_lora import delta, random_lora, random_module, relative
from files.test_merge import outputs
from safetensors.torch import load_file, save_file

from sdlora.cli.main import main
from sdlora.container import open_container
from sdlora.errors import ConfigError, LoraFileError, ModelError, TrainingError
from sdlora.families import Base, load_parts
from sdlora.families.places import places
from sdlora.files.attach import attach
from sdlora.files.bake import bake
from sdlora.files.changes import matrix_of
from sdlora.files.kohya import LoraFile, write_modules
from sdlora.files.merge import Weighed

UNET = "unet/diffusion_pytorch_model.safetensors"
QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def rewritten(path, dtype=None, edit=lambda tensors: tensors, **metadata):
    """Changes a .safetensors file in place."""
    tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in load_file(path).items()}
    save_file(edit(tensors) or tensors, path, metadata or None)


def test_what_is_baked_draws_as_what_is_attached(base, tmp_path):
    one = random_lora(tmp_path / "one.safetensors", base)
    two = random_lora(tmp_path / "two.safetensors", base, list(one.modules)[::2], rank=2, seed=1)
    out = tmp_path / "baked.safetensors" if base.is_file() else tmp_path / "baked"
    bake(base, [Weighed(one, 0.7), Weighed(two, -0.4)], out)
    found, expected = (load_parts(Base("tiny", path, "test")) for path in (out, base))
    before = outputs(expected)
    attach(expected, one, 0.7)
    attach(expected, two, -0.4)
    for ours, theirs, old in zip(outputs(found), outputs(expected), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert relative(old, theirs) > 1e-2


def test_every_weight_is_changed_by_what_the_lora_says_and_nothing_else_is(base, tmp_path):
    lora = random_lora(tmp_path / "lora.safetensors", base)
    out = tmp_path / "baked.safetensors" if base.is_file() else tmp_path / "baked"
    bake(base, [Weighed(lora, 0.5)], out)
    _, before = places(base)
    _, after = places(out)
    assert before.keys() == after.keys() == lora.modules.keys()
    taken = set()
    for name, weights in lora.modules.items():
        old, new = (matrix_of(p, open_container(p.file).read(p.key)).double() for p in (before[name], after[name]))
        assert relative(new - old, 0.5 * delta(weights)) < 1e-5
        taken.add(before[name].key)
    files = [base] if base.is_file() else [path for path in base.rglob("*") if path.is_file()]
    for path in files:
        copy = out if base.is_file() else out / path.relative_to(base)
        if path.suffix != ".safetensors":
            assert path.read_bytes() == copy.read_bytes()
            continue
        old, new = load_file(path), load_file(copy)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old if key not in taken)
    if not base.is_file():
        copies = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
        assert copies == {path.relative_to(base) for path in files}
        assert not any((out / path).stat().st_nlink > 1 for path in copies)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
def test_a_sum_is_taken_in_fp32_and_rounded_once_to_the_format_that_was_there(single, tmp_path, dtype):
    rewritten(single, dtype)
    lora = random_lora(tmp_path / "lora.safetensors", single, size=0.05)
    bake(single, [Weighed(lora, 0.5), Weighed(lora, 0.25)], tmp_path / "baked.safetensors")
    old, new = load_file(single), load_file(tmp_path / "baked.safetensors")
    assert all(new[key].dtype == dtype for key in old)
    _, table = places(single)
    for name, weights in lora.modules.items():
        key = table[name].key
        exact = old[key].double().flatten(1) + 0.75 * delta(weights)
        step = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        error = (new[key].double().flatten(1) - exact).abs()
        assert (error <= 0.501 * step + 1e-6).all()


def test_the_file_says_what_was_merged_now_and_before(single, tmp_path, capsys):
    rewritten(single, modelspec_title="x", **{"modelspec.hash_sha256": "0x1", "sdlora_merged": '[{"file": "old"}]'})
    lora = random_lora(tmp_path / "lora.safetensors", single, [QUERY])
    out = tmp_path / "baked.safetensors"
    main(["lora", "merge", f"{lora.path}:0.5", "--into", str(single), "-o", str(out)])
    said = capsys.readouterr().out
    assert "(Stable Diffusion 1.x), 1 weights changed" in said and "lora.safetensors at strength 0.5" in said
    metadata = open_container(out).metadata
    merged = json.loads(metadata.pop("sdlora_merged"))
    assert merged == [
        {"file": "old"},
        {"file": "lora.safetensors", "strength": 0.5, "sshs_model_hash": lora.model_hash},
    ]
    assert metadata == {"modelspec_title": "x"}


def test_a_moving_average_stays_and_that_is_said(single, tmp_path):
    average = {"model_ema.decay": torch.ones(1)}
    rewritten(single, edit=lambda tensors: tensors | average)
    lora = random_lora(tmp_path / "lora.safetensors", single, [QUERY])
    [note] = bake(single, [Weighed(lora)], tmp_path / "baked.safetensors").notes
    assert "1 tensors of the moving average" in note


def shard(folder):
    """Splits the denoiser of a folder into two files, by an index."""
    tensors, unet = load_file(folder / UNET), folder / "unet"
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    table = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in tensors if table[key] == name}, unet / name)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / UNET).unlink()


def test_shards_keep_their_index(tiny_sd1, tmp_path):
    folder, out = tmp_path / "sharded", tmp_path / "baked"
    shutil.copytree(tiny_sd1, folder)
    shard(folder)
    lora = random_lora(tmp_path / "lora.safetensors", folder)
    assert bake(folder, [Weighed(lora)], out).notes == ()
    bake(tiny_sd1, [Weighed(lora)], tmp_path / "whole")
    found, expected = (load_parts(Base("tiny", path, "test")) for path in (out, tmp_path / "whole"))
    for ours, theirs in zip(outputs(found), outputs(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_copies_of_the_weights_that_would_be_stale_are_left_out_and_named(tiny_sd1, tmp_path):
    folder, out = tmp_path / "base", tmp_path / "baked"
    shutil.copytree(tiny_sd1, folder)
    stale = ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "model.ckpt"]
    index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    other = ["text_encoder/model.fp16.safetensors", "README.md"]
    for name in [*stale, *other, ".cache/x"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"weights")
    (folder / index).write_text(
        json.dumps({"weight_map": {"a": "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"}})
    )
    lora = random_lora(tmp_path / "lora.safetensors", tiny_sd1, [QUERY])
    notes = bake(folder, [Weighed(lora)], out).notes
    assert {note.split(" ")[0] for note in notes} == {*stale, index}
    copies = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert set(other) < copies and not copies & {*stale, index, ".cache/x"}
    assert UNET in copies


def refuses(base, sources, out, kind, match):
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(kind, match=match):
        bake(base, sources, out)
    assert sorted(out.parent.rglob("*")) == before


def test_a_lora_that_does_not_fit_is_refused_and_nothing_is_written(base, tmp_path):
    out = tmp_path / "out.safetensors" if base.is_file() else tmp_path / "out"
    lora = random_lora(tmp_path / "lora.safetensors", base)
    name = next(iter(lora.modules))

    def with_module(name, shape):
        modules = {**lora.modules, name: random_module(name, shape, 2, 1.0, 1, 0)}
        return [Weighed(LoraFile(lora.path, modules, {}, torch.float32))]

    lost = "1 of its .* modules match no layer, the first is lora_unet_nothing.*\n.*choose its base with --into"
    refuses(base, with_module("lora_unet_nothing", (8, 8)), out, LoraFileError, lost)
    refuses(base, with_module(name, (7, 9)), out, LoraFileError, rf"{name} changes a weight of shape \[7, 9\]")
    refuses(base, with_module(name, (7, 9, 3, 3)), out, LoraFileError, r"of shape \[7, 9, 3, 3\], and there it has")
    absent = r"change a part that it does not hold \(lora_te3_\*\)"
    refuses(base, with_module("lora_te3_text_model", (8, 8)), out, LoraFileError, absent)
    refuses(base, [Weighed(lora, 0.0)], out, LoraFileError, "at strength 0 adds nothing")


@pytest.mark.parametrize(
    ("dtype", "strength"),
    [(torch.float32, 1e39), (torch.float16, 1e7), (torch.float8_e4m3fn, 1e5), (torch.float8_e5m2, 1e7)],
)
def test_values_that_the_format_does_not_hold_are_refused_by_name(single, tmp_path, dtype, strength):
    lora = random_lora(tmp_path / "lora.safetensors", single, [QUERY])
    key = places(single)[1][QUERY].key
    out = tmp_path / "out.safetensors"
    rewritten(single, dtype)
    told = f"with the LoRA, {key} of .* would hold values that are too large for {str(dtype).removeprefix('torch.')}, "
    refuses(single, [Weighed(lora, strength)], out, ModelError, told)

    def spoil(tensors):
        tensors[key] = tensors[key].float()
        tensors[key][1, 2] = float("nan")

    rewritten(single, edit=spoil)
    refuses(single, [Weighed(lora)], out, ModelError, f"{key} of .*base.* holds .* download the base again")


def test_quantised_weights_are_refused(single, tmp_path):
    lora = random_lora(tmp_path / "lora.safetensors", single, [QUERY])
    key = places(single)[1][QUERY].key
    rewritten(single, edit=lambda tensors: tensors | {key: tensors[key].char()})
    refuses(single, [Weighed(lora)], tmp_path / "out.safetensors", ModelError, f"is quantised .{key} holds int8.")


def test_nothing_is_overwritten(single, tiny_sd1, tmp_path):
    lora = random_lora(tmp_path / "lora.safetensors", single, [QUERY])
    sources = [Weighed(lora)]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    refuses(single, sources, single, ConfigError, "would be written over")
    refuses(single, sources, lora.path, ConfigError, "would be written over")
    refuses(single, sources, tmp_path / "full", ConfigError, "is a folder")
    refuses(single, sources, tmp_path / "out.ckpt", ConfigError, "must end in .safetensors")
    refuses(tiny_sd1, sources, tmp_path / "full", ConfigError, "is not empty")
    refuses(tiny_sd1, sources, lora.path, ConfigError, "is a file")
    with pytest.raises(ConfigError, match="would be written over"):
        bake(tiny_sd1, sources, tiny_sd1 / "new")


def test_a_full_disk_is_said_before_the_work(base, tmp_path, monkeypatch):
    lora = random_lora(tmp_path / "lora.safetensors", base)
    out = tmp_path / "deep" / "out.safetensors" if base.is_file() else tmp_path / "deep" / "out"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TrainingError, match=r"0 MB free, and out(\.safetensors)? takes"):
        bake(base, [Weighed(lora)], out)
    assert not out.parent.exists()


def test_an_empty_folder_is_filled(tiny_sd1, tmp_path):
    lora = random_lora(tmp_path / "lora.safetensors", tiny_sd1, [QUERY])
    (tmp_path / "out").mkdir()
    bake(tiny_sd1, [Weighed(lora)], tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "lora.safetensors"}


PEAK = """
import re, sys, torch
from pathlib import Path
from sdlora.container import open_container
from sdlora.families.places import Place
from sdlora.families import FAMILIES
from sdlora.files import bake
from sdlora.files.kohya import read_lora
from sdlora.files.merge import Weighed

base, lora, out = map(Path, sys.argv[1:])
entries = open_container(base).entries
table = {f"lora_unet_{key[:-7]}": Place(base, key, None, entry.shape) for key, entry in entries.items()}
bake.places = lambda path: (FAMILIES["sd1"], table)
read = read_lora(lora)

def peak():  # ru_maxrss would be the parent's, if that is larger
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
torch.ones(64, 64).addmm_(torch.ones(64, 64), torch.ones(64, 64))  # loads the kernels
start = peak()
bake.bake(base, [Weighed(read)], out)
print(start, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process so plainly")
def test_memory_is_needed_for_the_largest_tensor_only(tmp_path):
    base, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    tensors = {f"layer{i}.weight": torch.full((1024, 2048), i / 64).half() for i in range(60)}
    save_file(tensors, base)
    modules = {f"lora_unet_layer{i}": random_module("a", (1024, 2048), 1, 1.0, 0.01, i) for i in range(60)}
    write_modules(lora, modules, {}, torch.float32)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(base), str(lora), str(tmp_path / "out.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    start, peak = (int(word) * 1024 for word in done.stdout.split())
    assert base.stat().st_size > 250e6
    assert peak - start < 110e6  # a tensor has 4 MB, 8 in fp32; 60 to 75 MB were seen, and no more after 3 of them
    assert (tmp_path / "out.safetensors").stat().st_size == pytest.approx(base.stat().st_size, rel=1e-3)
