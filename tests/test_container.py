"""The container: equal content gives equal bytes, the library reads it, and nothing damaged gets through."""

import json
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sdlora.container import DTYPES, legacy_hash, model_hash, open_container, serialize, write_stream
from sdlora.container_header import MAX_HEADER, MAX_KEYS
from sdlora.errors import LoraFileError, ModelError
from sdlora.files.kohya import read_lora

TENSORS = {
    "lora_unet_a.lora_down.weight": torch.arange(6.0).reshape(2, 3),
    "lora_unet_a.lora_up.weight": torch.ones(4, 2).half(),
    "lora_unet_a.alpha": torch.tensor(2.0),
}


def whole(metadata: dict[str, str] | None = None) -> bytes:
    return serialize(TENSORS, metadata or {})


def framed(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_without_metadata_the_bytes_are_the_librarys():
    assert whole() == safetensors.torch.save(TENSORS)


def test_metadata_is_sorted_and_the_library_reads_it(tmp_path):
    metadata = {f"key{i}": f'"quoted"\n{i} ü' for i in range(20)}
    backwards = dict(reversed(metadata.items()))
    assert whole(metadata) == whole(backwards)
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole(metadata))
    assert path.read_bytes()[8:10] == b'{"'  # the WebUI's test for a safetensors file
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        for key, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(key), tensor)
    container = open_container(path)
    assert container.metadata == metadata
    for key, tensor in container.tensors(container.data()).items():
        assert tensor.dtype == TENSORS[key].dtype and torch.equal(tensor, TENSORS[key])


def test_the_header_is_as_long_as_the_librarys():
    # the legacy hash depends on it
    metadata = {"ss_a": 'ü "x"\\ \x07\n\t\x7f', "ss_b": "{}"}
    assert len(whole(metadata)) == len(safetensors.torch.save(TENSORS, metadata))


def test_a_streamed_file_is_the_same_bytes_and_its_tensors_are_read_alone(tmp_path):
    tensors = {f"{word} {i}": torch.arange(3 * i).to(dtype) for word, dtype in DTYPES.items() for i in (0, 1, 2)}
    path = tmp_path / "a.safetensors"
    write_stream(path, {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, {"a": "b"}, tensors.__getitem__)
    assert path.read_bytes() == serialize(tensors, {"a": "b"})
    container = open_container(path)
    for key, tensor in tensors.items():
        assert torch.equal(container.read(key).view(torch.uint8), tensor.view(torch.uint8))
    with pytest.raises(ValueError, match="was announced"):
        write_stream(path, {"a": (torch.float32, (1,))}, {}, lambda key: torch.ones(2))


def test_the_kind_of_error_is_the_callers(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ModelError, match=r"no checkpoint .*a\.safetensors"):
        open_container(path, "checkpoint", ModelError)
    path.write_bytes(whole())
    container = open_container(path, "checkpoint", ModelError)
    path.write_bytes(whole()[:-1])
    with pytest.raises(ModelError, match="was changed"):
        container.data()


def test_the_model_hash_does_not_see_metadata():
    assert model_hash(whole()) == model_hash(whole({"ss_a": "x" * 99}))
    assert legacy_hash(whole()) == "e3b0c442"  # sha256 of nothing: the file is below 1 MiB


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    content, path = whole({"ss_a": "b"}), tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(LoraFileError, match=r"empty|cut off"):
            read_lora(path)


def test_a_changed_byte_in_the_header_never_gives_another_error(tmp_path):
    content, path = whole({"ss_a": "b"}), tmp_path / "changed.safetensors"
    end = 8 + struct.unpack("<Q", content[:8])[0]
    refused = 0
    for position in range(end):
        for flip in (0x01, 0x10, 0x80):
            path.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
            try:
                read_lora(path)  # a changed letter of the metadata or of a padding blank may be harmless
            except LoraFileError:
                refused += 1
    assert refused > end


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x10", "cut off after 1 bytes"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"\n <html><body>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a git-lfs pointer"),
        (b"PK\x03\x04rest of a torch archive", "pickle or zip archive"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "is a GGUF file"),
        (b"just some words in a text file", "is not a safetensors file"),
        (struct.pack("<Q", MAX_HEADER + 1) + b"{" + b" " * 99, "claims a header of 16777217 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "claims a header"),
        (framed(b"{not json}"), "is damaged: its header cannot be read"),
        (framed(b'{"a":' + b"[" * 100_000 + b"}"), "is damaged: its header cannot be read"),
        (framed(b'{"a":"\xff"}'), "is damaged: its header cannot be read"),
        (framed(b'{"a":1,"a":2}'), "a key occurs twice"),
        (framed({"__metadata__": {"a": 1}}), "metadata is not a map of texts"),
        (framed({"a": 5}), "nothing sensible of 'a'"),
        (framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 5]}}, b"12345"), "nothing sensible of 'a'"),
        (framed({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}), "nothing sensible of 'a'"),
        (framed({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"), "nothing sensible of 'a'"),
        (framed({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, b"1234"), "nothing sensible of 'a'"),
        (framed({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"), "1.0 is no whole number"),
        (framed({"\x1b[2J": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}, b"1"), r"x1b\[2J' is stored as"),
        (framed({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}, b"1"), "is stored as 'F4'"),
        (framed({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"123"), "1 bytes behind the last"),
        (framed({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"123"), "does not begin where"),
        (framed({}), "no tensors at all"),
    ],
)
def test_what_is_no_whole_container_is_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraFileError, match=message):
        read_lora(path)


def test_tensors_may_not_share_bytes(tmp_path):
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    path = tmp_path / "shared.safetensors"
    path.write_bytes(framed({"a": entry, "b": entry}, b"12"))
    with pytest.raises(LoraFileError, match="'b' does not begin where"):
        open_container(path)


def test_missing_files_and_folders_are_told_apart(tmp_path):
    with pytest.raises(LoraFileError, match=r"no LoRA file .*missing"):
        read_lora(tmp_path / "missing.safetensors")
    with pytest.raises(LoraFileError, match="is a folder"):
        read_lora(tmp_path)


def test_what_is_no_file_is_told_from_what_is_not_there(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(LoraFileError, match="is a pipe or a device"):
            read_lora(path)
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    for path in (loop, tmp_path / f"{'x' * 300}.safetensors"):
        with pytest.raises(LoraFileError, match="no LoRA file"):
            read_lora(path)


ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b",".join(b'"%x":%s' % (n, ENTRY) for n in range(MAX_KEYS + 1)), f"lists {MAX_KEYS + 1} tensors"),
        (b",".join(b'"%x":%s' % (n, ENTRY) for n in range(100_000)), "more than any model has"),
        (b'"__metadata__":{' + b",".join(b'"%x":""' % n for n in range(300_000)) + b"}", "more than any model has"),
        (b'"a":[' + b"[]," * 1_000_000 + b"0]", "more than any model has"),
        (b'"a":[' + b"9," * 1_000_000 + b"0]", "too many numbers"),
        (b'"a":{"shape":[' + b"4611686018427387903," * 300_000 + b'1],"dtype":"U8"}', "too many numbers"),
    ],
    ids=["one too many", "tensors", "texts", "lists", "numbers", "sides"],
)
def test_a_header_that_is_nothing_but_header_costs_little(tmp_path, header, message):
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(framed(b"{" + header + b"}"))
    tracemalloc.start()
    with pytest.raises(LoraFileError, match=message):
        open_container(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < max(5 * len(header), 50e6)


def test_as_many_tensors_as_are_read_are_read(tmp_path):
    path = tmp_path / "many.safetensors"
    path.write_bytes(framed(b"{" + b",".join(b'"%x":%s' % (n, ENTRY) for n in range(MAX_KEYS)) + b"}"))
    assert len(open_container(path).entries) == MAX_KEYS


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_renamed_pickle_is_refused_and_never_runs(tmp_path, protocol):
    trap = tmp_path / "it-ran"
    path = tmp_path / "lora.safetensors"
    path.write_bytes(pickle.dumps(Malicious(trap), protocol=protocol) + b"padding" * 9)
    with pytest.raises(LoraFileError, match=r"pickle|not a safetensors file"):
        read_lora(path)
    torch.save({"lora_unet_a.alpha": torch.ones(1)}, path)
    with pytest.raises(LoraFileError, match="pickle"):
        read_lora(path)
    assert not trap.exists()


def test_a_view_is_what_is_read_and_reading_gives_memory_of_ones_own(tmp_path):
    tensors = TENSORS | {"none": torch.empty(0, 3), "flag": torch.tensor([True, False]), "b": torch.ones(3).bfloat16()}
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialize(tensors, {}))
    container = open_container(path)
    for key, tensor in tensors.items():
        read = container.read(key)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor) and torch.equal(container.view(key), tensor)
        assert read.data_ptr() % 64 == 0
    kept = container.read("lora_unet_a.alpha")
    container.unmap()
    path.write_bytes(bytes(path.stat().st_size))
    assert kept == 2
    assert container.view("lora_unet_a.alpha") == 0  # mapped anew


def test_a_view_may_begin_anywhere(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    raw = json.dumps(header).encode()
    raw += b" " * (-(len(raw) + 8) % 4 + 3)  # numbers begin one byte before a multiple of four
    path = tmp_path / "odd.safetensors"
    path.write_bytes(framed(raw, struct.pack("<2f", 1.5, -2.0)))
    assert open_container(path).view("a").tolist() == [1.5, -2.0]


def test_a_file_that_was_cut_off_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole())
    container = open_container(path)
    path.write_bytes(whole()[:-1])
    for get in (container.read, container.view):
        with pytest.raises(LoraFileError, match=r"a\.safetensors"):
            get("lora_unet_a.alpha")


def test_the_identity_of_a_file_is_another_after_every_change(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole())
    seen = {open_container(path).identity}
    stamp = path.stat()
    for _ in range(3):
        time.sleep(0.02)  # a tick of the disk's clock
        path.write_bytes(whole())
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        seen.add(open_container(path).identity)
    assert len(seen) == 4
