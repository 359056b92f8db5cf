"""A cache gives back what was put in, or nothing."""

import copy
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.data.cache import Cache, content_hash, default_folder, fingerprint
from sdlora.families import Base, load_parts

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(True), "c": torch.ones(3, dtype=torch.bfloat16)}


def test_round_trip(tmp_path):
    cache = Cache(tmp_path)
    key = Cache.key("x", 1, [2, None], {"b": 1, "a": "ö"})
    assert cache.get(key) is None
    cache.put(key, TENSORS | {"t": TENSORS["a"].T})
    got = cache.get(key)
    assert got and content_hash(got) == content_hash(TENSORS | {"t": TENSORS["a"].T})
    assert cache.path(key).relative_to(tmp_path).parts == (key[:2], f"{key}.safetensors")


def test_keys_differ_where_anything_does_and_only_then():
    assert Cache.key({"a": 1, "b": 2}) == Cache.key({"b": 2, "a": 1})
    others = [("a", "b"), ("ab",), (["a", "b"],), ("a", "b", None), ("a", 1), ("a", "1"), ("a", 1.5), ("a", True)]
    assert len({Cache.key(*parts) for parts in others}) == len(others)


def test_a_damaged_entry_counts_as_absent_and_is_replaced(tmp_path):
    cache = Cache(tmp_path)
    cache.put("k" * 64, TENSORS)
    path = cache.path("k" * 64)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place])
        assert cache.get("k" * 64) is None
    flipped = bytearray(whole)
    flipped[-1] ^= 1  # a number, which safetensors itself would not notice
    path.write_bytes(flipped)
    assert cache.get("k" * 64) is None
    cache.put("k" * 64, TENSORS)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_says_so_once_and_goes_on(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "cache")
    cache.put("a" * 64, TENSORS)
    assert cache.problem and "not kept for the next run" in cache.problem
    first = cache.problem
    cache.put("b" * 64, TENSORS)
    assert cache.problem is first
    assert cache.get("a" * 64) is None


@pytest.mark.skipif(os.name == "nt", reason="another variable there")
def test_where_it_lies(monkeypatch, tmp_path):
    assert default_folder() == Path(os.environ["SDLORA_CACHE"])
    monkeypatch.setenv("SDLORA_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache(None).folder == tmp_path / "sdlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "sdlora"


def test_a_fingerprint_sees_names_formats_and_every_bit():
    def model(**changes):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, **changes))

    base, changed = model(), model()
    assert fingerprint(base) == fingerprint(model())
    with torch.no_grad():
        changed[1].bias.view(torch.int32)[0] ^= 1
    others = [changed, model(bias=False), model().half(), torch.nn.ModuleDict({"x": model()})]
    assert len({fingerprint(m) for m in (base, *others)}) == 5


@pytest.fixture
def base(tiny_base, tmp_path, monkeypatch):
    """A base whose files count as old."""
    soon = time.time() + 10
    monkeypatch.setattr("sdlora.file_identity.time.time", lambda: soon)
    return shutil.copytree(tiny_base, tmp_path / "base")


def loaded(folder, **options):
    return load_parts(Base("x", folder, ""), **options).denoiser


def weights_of(folder):
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def test_a_fingerprint_is_that_of_the_files_in_any_format_and_place(base, tmp_path):
    whole = fingerprint(loaded(base))
    assert fingerprint(loaded(base, dtype=torch.bfloat16)) == whole
    shutil.copytree(base, tmp_path / "elsewhere")
    assert fingerprint(loaded(tmp_path / "elsewhere")) == whole
    assert fingerprint(copy.deepcopy(loaded(base))) == whole  # of which no file is known; the files are fp32, too


def test_weights_are_hashed_once_as_long_as_their_file_is_not_touched(base, tmp_path, monkeypatch):
    cache = Cache(tmp_path / "cache")
    whole = fingerprint(loaded(base), cache)
    with monkeypatch.context() as patch:
        patch.setattr("sdlora.data.cache._weights_hash", lambda _: pytest.fail("hashed again"))
        assert fingerprint(loaded(base, dtype=torch.bfloat16), cache) == whole
    tensors = load_file(weights_of(base))
    tensors["conv_in.bias"][0] += 1
    before = weights_of(base).stat()
    save_file(tensors, weights_of(base), {"format": "pt"})
    os.utime(weights_of(base), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights_of(base).stat().st_size == before.st_size
    changed = fingerprint(loaded(base), cache)
    assert changed != whole and changed == fingerprint(loaded(base), Cache(tmp_path / "other"))


def test_a_file_that_is_replaced_after_loading_does_not_count(base, tmp_path):
    cache = Cache(tmp_path / "cache")
    module = loaded(base)
    before = fingerprint(module)
    tensors = {name: tensor + 1 for name, tensor in load_file(weights_of(base)).items()}
    save_file(tensors, weights_of(base), {"format": "pt"})
    assert fingerprint(module, cache) == before != fingerprint(loaded(base), cache)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.conv_in.bias.add_(1),
        lambda m: m.conv_in.bias.view(torch.int32)[0].bitwise_xor_(1),
        lambda m: setattr(m.conv_in, "bias", torch.nn.Parameter(m.conv_in.bias + 1)),
        lambda m: m.load_state_dict({n: t + 1 for n, t in m.state_dict().items()}),
    ],
)
def test_weights_that_were_changed_in_memory_have_another_fingerprint(base, tmp_path, change):
    cache = Cache(tmp_path / "cache")
    module = loaded(base)
    whole = fingerprint(module, cache)
    with torch.no_grad():
        change(module)
    assert fingerprint(module, cache) != whole


def test_weights_that_were_written_a_moment_ago_are_hashed_again(tiny_base, tmp_path):
    folder, cache = shutil.copytree(tiny_base, tmp_path / "base"), Cache(tmp_path / "cache")
    fingerprint(loaded(folder), cache)
    assert not cache.folder.exists()
