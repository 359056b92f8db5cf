"""A cache gives back what was put in, or nothing."""

import os
from pathlib import Path

import pytest
import torch

from sdlora.data.cache import Cache, content_hash, default_folder, fingerprint

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
