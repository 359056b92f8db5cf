"""The certificate tells what five programs make of a file on disk; a file that fares ill in it is not kept."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from sdlora.config import Config
from sdlora.container import open_container
from sdlora.errors import LoraFileError
from sdlora.files.kohya import write_lora
from sdlora.files.loaders import LOADERS, certificate, contents_of, layout_of, require_loadable, write_certificate
from sdlora.training.export import Exporter


@pytest.fixture
def written(tmp_path, tiny_parts, adapt):
    """A file that we wrote, the layout of its base, and the adapters that it was written from."""
    adapters = adapt(tiny_parts)
    path = tmp_path / "style.safetensors"
    write_lora(path, adapters, tiny_parts.family, tiny_parts.family.metadata, torch.float32)
    return path, layout_of(tiny_parts), adapters


def as_named_by_transformers_5(component, path):
    """The fault that the certificate is there for: names straight after the modules' paths."""
    return f"lora_{'unet' if component == 'denoiser' else 'te'}_{path.replace('.', '_')}"


def test_it_is_json_and_names_the_file(written):
    path, layout, _ = written
    found = certificate(path, layout)
    assert json.loads(json.dumps(found)) == found
    assert found["file"] == "style.safetensors"
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["keys"] == 888 and found["losses"] == []
    assert [p["program"] for p in found["programs"]] == list(LOADERS)
    for row in found["programs"]:
        assert row["version"] and row["consumed"] == 888
        assert row["left"] == row["misfits"] == row["misscaled"] == []
    assert {row["program"] for row in found["programs"] if row["loads"]} == {
        "diffusers"
    }  # others lack so narrow a base
    require_loadable(found)


def test_it_is_written_beside_the_file(written):
    path, layout, _ = written
    target = write_certificate(path, layout)
    assert target == path.parent / "certificate.json"
    assert json.loads(target.read_text()) == certificate(path, layout)


def test_names_that_only_diffusers_reads_are_refused_with_program_and_key(tmp_path, written):
    _, layout, adapters = written
    path = tmp_path / "bad.safetensors"
    write_lora(path, adapters, replace(layout.family, lora_key=as_named_by_transformers_5), {}, torch.float32)
    found = certificate(path, layout)
    assert len(found["losses"]) == 5  # A1111, Forge twice, ComfyUI, InvokeAI
    with pytest.raises(LoraFileError) as refused:
        require_loadable(found)
    assert "AUTOMATIC1111 leaves 54 of its 888 keys unused" in str(refused.value)
    assert "lora_te_encoder_layers_0_mlp_fc1.alpha (4 more such findings)" in str(refused.value)


def test_a_run_does_not_keep_a_file_that_a_program_would_lose_a_part_of(tmp_path, tiny_parts, adapt, monkeypatch):
    tiny_parts.family = replace(tiny_parts.family, lora_key=as_named_by_transformers_5)
    monkeypatch.setattr(Exporter, "_metadata", lambda self, name, step: {})
    nothing = dict.fromkeys(("dataset", "plan"))
    exporter = Exporter(Config(), tiny_parts, adapt(tiny_parts), rates={}, precision="fp32", **nothing)
    with pytest.raises(LoraFileError, match="AUTOMATIC1111 leaves 54 of its 888 keys unused; the first is lora_te_enc"):
        exporter.export(tmp_path / "style.safetensors", 1)
    assert not list(tmp_path.iterdir())


def test_values_and_order_are_read_from_the_file(written):
    path, _, _ = written
    contents = contents_of(open_container(path))
    assert list(contents.shapes) == sorted(contents.shapes)
    assert len(contents.alphas) == 296 and set(contents.alphas.values()) == {1.5}
    assert not contents.bf16


def test_bf16_is_read_by_all_five_and_still_mentioned(tmp_path, written):
    _, layout, adapters = written
    path = tmp_path / "bf16.safetensors"
    write_lora(path, adapters, layout.family, {}, torch.bfloat16)
    found = certificate(path, layout)
    assert found["losses"] == []
    assert found["notes"] == [
        "bf16 cannot be read by some older programs, those through numpy; fp16 can be read by all"
    ]
