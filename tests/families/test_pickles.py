"""Pickled checkpoints become safetensors with the same tensors, and no code in them ever runs."""

import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from sdlora.container import open_container
from sdlora.errors import ModelError
from sdlora.families import pickles
from sdlora.families.pickles import converted, is_pickle, readable


class Canary:
    """Unpickled by a reader that runs code, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Lightning:
    """Pickled as if it were a class of the program that trained Stable Diffusion."""

    __module__ = "pytorch_lightning.callbacks.model_checkpoint"
    __qualname__ = __name__ = "ModelCheckpoint"


def weights():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 6, generator=generator)
    return {
        "fp32": whole,
        "same": whole,
        "view": whole[1:3, ::2],
        "turned": whole.T,
        "fp16": torch.randn(3, generator=generator).half(),
        "bf16": torch.randn(3, generator=generator).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def contents(path):
    container = open_container(path)
    return container.tensors(container.data())


def plain(path, value, protocol=2):
    path.write_bytes(pickle.dumps(value, protocol=protocol))


def legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def zipped(path, value):
    torch.save(value, path)


def nested(path, value):
    plain(path.with_suffix(".inner"), value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".inner"), "archive/data.pkl")
        archive.writestr("archive/version", "3\n")


def zip_in_zip(path, value):
    zipped(path.with_suffix(".inner"), value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".inner"), "archive/data.pkl")
        archive.writestr("archive/version", "3\n")


FORMS = [plain, legacy, zipped, nested, zip_in_zip]


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def test_the_canary_sings_where_code_runs(tmp_path, canary):
    """Otherwise the tests below would prove nothing."""
    zipped(tmp_path / "x.ckpt", {"state_dict": {"w": Canary(canary)}})
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert canary.is_dir()


@pytest.mark.parametrize("form", FORMS)
def test_no_code_of_a_pickle_runs_when_it_is_told_apart_or_refused(tmp_path, canary, form):
    for name in ("x.ckpt", "x.safetensors", "x"):
        form(tmp_path / name, {"state_dict": {"w": Canary(canary)}})
        assert is_pickle(tmp_path / name)
        with pytest.raises(ModelError, match="--allow-pickle"):
            readable(tmp_path / name, None)
    assert not canary.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_no_code_of_a_pickle_runs_when_it_is_read(tmp_path, canary, form, name):
    form(tmp_path / name, {"state_dict": {"w": torch.ones(1) if form is zip_in_zip else Canary(canary)}})
    with pytest.raises(Exception) as caught:  # torch has several kinds
        pickles._convert(tmp_path / name, tmp_path / "out.safetensors")
    assert form is zip_in_zip or "mkdir" in pickles._reason(caught.value)
    assert not canary.exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_protocol_of_a_pickle_runs_code(tmp_path, canary, protocol):
    plain(tmp_path / "x.ckpt", {"w": Canary(canary)}, protocol)
    assert is_pickle(tmp_path / "x.ckpt")
    with pytest.raises(Exception):  # noqa: B017
        pickles._convert(tmp_path / "x.ckpt", tmp_path / "out.safetensors")
    assert not canary.exists()


def test_a_refusal_from_the_other_process_is_one_line_and_leaves_nothing(tmp_path, canary):
    zipped(tmp_path / "x.safetensors", {"state_dict": {"w": Canary(canary)}})
    with pytest.raises(ModelError, match=r"x\.safetensors: torch says '.*mkdir whose module \w+ is blocked") as caught:
        readable(tmp_path / "x.safetensors", tmp_path / "cache", lambda text: None)
    assert "\n" not in str(caught.value)
    assert not canary.exists()
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_a_checkpoint_is_converted_once_by_another_process(tmp_path, monkeypatch):
    said, path = [], tmp_path / "x.ckpt"
    torch.save({"state_dict": weights(), "epoch": 3}, path)
    file = readable(path, tmp_path / "cache", said.append)
    assert len(file.stem) == 64 and file.parent.parent == tmp_path / "cache"
    torch.testing.assert_close(contents(file), {k: v.detach() for k, v in weights().items()}, rtol=0, atol=0)
    assert len(said) == 2 and "converting x.ckpt" in said[0] and said[1].startswith("1 entries")
    monkeypatch.setattr(pickles, "_apart", lambda *a: pytest.fail("converted again"))
    path.rename(tmp_path / "y.pt")
    os.utime(tmp_path / "y.pt", (0, 0))
    assert converted(tmp_path / "y.pt", tmp_path / "cache", said.append) == file
    assert len(said) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="only Linux keeps to a limit")
def test_a_file_that_fills_the_memory_is_stopped(tmp_path):
    class Bomb:
        def __reduce__(self):
            return bytearray, (8 * 1024**3,)

    plain(tmp_path / "x.ckpt", {"w": Bomb()})
    with pytest.raises(ModelError, match="wants more than 2 GB of memory"):
        converted(tmp_path / "x.ckpt", tmp_path / "cache", lambda text: None)


def test_a_process_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_START_SECONDS", 0.01)
    zipped(tmp_path / "x.ckpt", weights())
    with pytest.raises(ModelError, match="not read within 0 seconds"):
        converted(tmp_path / "x.ckpt", tmp_path / "cache", lambda text: None)
    assert not list((tmp_path / "cache" / "converted").iterdir())


@pytest.mark.parametrize("form", [legacy, zipped])
@pytest.mark.parametrize(
    ("wrap", "dropped"),
    [
        (lambda state: state, 0),
        (lambda state: OrderedDict(state, step=5, name="x"), 2),
        (lambda state: {"state_dict": state, "epoch": 1, "optimizer_states": [state]}, 2),
        (lambda state: {"module": state | {3: torch.ones(1)}}, 1),
        (lambda state: {"module": {"state_dict": state, "epoch": 1}}, 1),
    ],
)
def test_weights_are_found_wherever_programs_put_them(tmp_path, form, wrap, dropped):
    form(tmp_path / "x.ckpt", wrap(weights()))
    assert pickles._convert(tmp_path / "x.ckpt", tmp_path / "out.safetensors") == dropped
    expected = {k: v.detach() for k, v in weights().items()}
    torch.testing.assert_close(contents(tmp_path / "out.safetensors"), expected, rtol=0, atol=0)


def test_what_lightning_leaves_in_stabilitys_checkpoints_is_read_over(tmp_path, monkeypatch):
    import sys
    from types import ModuleType

    import numpy as np

    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", Lightning.__module__):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[Lightning.__module__], "ModelCheckpoint", Lightning, raising=False)
    callbacks = {Lightning: {"best": np.float64(0.5)}, "one": Lightning()}
    torch.save({"state_dict": weights(), "callbacks": callbacks}, tmp_path / "x.ckpt")
    assert pickles._convert(tmp_path / "x.ckpt", tmp_path / "out.safetensors") == 1
    assert contents(tmp_path / "out.safetensors").keys() == weights().keys()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"epoch": 1}, "no weights"),
        ({"state_dict": {}}, "no weights"),
        ({"w": torch.ones(3).to_sparse()}, "'w' is no plain tensor"),
        ({"w": torch.ones(3, dtype=torch.complex64)}, "'w' is stored as torch.complex64"),
        ({"w": torch.ones(1).expand(10_000_000)}, "would need 0.0 GB"),
    ],
)
def test_what_safetensors_cannot_hold_is_named(tmp_path, value, match):
    torch.save(value, tmp_path / "x.ckpt")
    with pytest.raises(ModelError, match=match):
        pickles._convert(tmp_path / "x.ckpt", tmp_path / "out.safetensors")


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    state = {"w": torch.ones(1)}
    state["module"] = state
    torch.save(state, tmp_path / "x.ckpt")
    pickles._convert(tmp_path / "x.ckpt", tmp_path / "out.safetensors")
    assert contents(tmp_path / "out.safetensors").keys() == {"w"}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x02cut", b"nonsense"])
def test_damaged_files_raise(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    assert is_pickle(tmp_path / "x.ckpt")
    with pytest.raises(Exception) as caught:
        pickles._convert(tmp_path / "x.ckpt", tmp_path / "out.safetensors")
    assert pickles._reason(caught.value)


def test_safetensors_are_no_pickles_whatever_their_name(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "x.ckpt")
    assert not is_pickle(tmp_path / "x.ckpt")
    assert readable(tmp_path / "x.ckpt", None) == tmp_path / "x.ckpt"
    header = b"{" + b" " * 0x0480
    (tmp_path / "y.safetensors").write_bytes(b"\x80\x04" + bytes(6) + header)  # a length that looks like a pickle
    assert not is_pickle(tmp_path / "y.safetensors")


def test_a_base_that_is_a_pickle_is_refused_or_converted(tiny_sd1, tmp_path):
    from safetensors.torch import load_file

    from sdlora.families import load_parts, resolve_base
    from sdlora.families.save_single import save_single

    save_single(tiny_sd1, tmp_path / "x.safetensors")
    torch.save({"state_dict": load_file(tmp_path / "x.safetensors")}, tmp_path / "x.ckpt")
    with pytest.raises(ModelError, match=r"x\.ckpt is a pickle.*--allow-pickle"):
        resolve_base(str(tmp_path / "x.ckpt"))
    said = []
    base = resolve_base(str(tmp_path / "x.ckpt"), said.append, allow_pickle=True, cache_dir=tmp_path / "cache")
    assert (base.name, base.reason) == (str(tmp_path / "x.ckpt"), "converted from a pickle")
    direct = load_parts(resolve_base(str(tmp_path / "x.safetensors")))
    parts = load_parts(base)
    assert parts.notes == [note.replace("x.safetensors", base.path.name) for note in direct.notes]
    for name, module in direct.components.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(parts.components[name].state_dict()[key], tensor)
