"""A LoRA file may choose between bases that are on this machine, and can do nothing else."""

from pathlib import Path

import pytest
import torch

from sdlora.errors import ConfigError
from sdlora.files.kohya import LoraFile
from sdlora.sampling.origin import named_bases, trained_base, trained_clip_skip


def origin(path: Path, metadata: dict[str, str] | None = None) -> LoraFile:
    """A LoRA file without modules: this room looks at its path and metadata only."""
    return LoraFile(path, {}, metadata or {}, torch.float32)


def test_our_own_word_comes_before_kohyas(tmp_path, tiny_base):
    lora = origin(tmp_path / "a.safetensors", {"ss_sd_model_name": "nano", "sdlora_base": str(tiny_base)})
    base, where = trained_base(lora)
    assert base.path == tiny_base and where == "sdlora_base in a.safetensors"


def test_what_is_not_here_is_passed_over(tmp_path):
    lora = origin(tmp_path / "a.safetensors", {"sdlora_base": "somewhere/else", "ss_sd_model_name": "nano"})
    assert trained_base(lora)[0].name == "nano"


def test_the_run_beside_the_file_is_asked_last(tmp_path):
    (tmp_path / "config.toml").write_text('[base]\nmodel = "nano"\n')
    lora = origin(tmp_path / "a.safetensors", {"ss_sd_model_name": "None"})
    base, where = trained_base(lora)
    assert base.name == "nano" and where.startswith("config.toml of the run")


def test_an_epochs_file_finds_its_run_and_strange_configurations_are_left_alone(tmp_path):
    (tmp_path / "config.toml").write_text('[base]\nmodel = "nano"\n')
    (tmp_path / "epochs").mkdir()
    (tmp_path / "other").mkdir()
    assert trained_base(origin(tmp_path / "epochs" / "a-000001.safetensors"))[0].name == "nano"
    assert named_bases(origin(tmp_path / "other" / "a.safetensors")) == []
    (tmp_path / "config.toml").write_text("[server]\nport = 1\n")
    assert named_bases(origin(tmp_path / "a.safetensors")) == []


def test_automatic_is_no_name(tmp_path):
    (tmp_path / "config.toml").write_text('[base]\nmodel = "auto"\n')
    assert named_bases(origin(tmp_path / "a.safetensors", {"sdlora_base": "auto"})) == []


@pytest.mark.parametrize(
    "name", ["somebody/some-model", "sd15", "/no/such/folder", "~nobody", "v1-5-pruned.safetensors", "x" * 5000]
)
def test_a_base_that_is_not_here_is_named_and_nothing_is_fetched(tmp_path, monkeypatch, name):
    from sdlora.families import hub

    monkeypatch.setattr(hub, "cached", lambda repository: None)
    monkeypatch.setattr(hub, "download", lambda *a: pytest.fail("a file from elsewhere started a download"))
    with pytest.raises(ConfigError, match=r"a.safetensors was trained on .*not on this machine;\npass --base"):
        trained_base(origin(tmp_path / "a.safetensors", {"sdlora_base": name}))


def test_a_pickled_base_is_named_and_not_opened_on_a_files_word(tmp_path):
    pickled = tmp_path / "base.ckpt"
    pickled.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ConfigError, match=r"base.ckpt, a pickle.*\npass --base .*base.ckpt --allow-pickle"):
        trained_base(origin(tmp_path / "a.safetensors", {"sdlora_base": str(pickled)}))


def test_a_file_that_names_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"does not say which base .*--base sd15"):
        trained_base(origin(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(("text", "skip"), [("2", 2), ("12", 12), ("None", 1), ("", 1), ("0", 1), ("99", 1), ("-2", 1)])
def test_clip_skip(tmp_path, text, skip):
    assert trained_clip_skip(origin(tmp_path / "a", {"ss_clip_skip": text})) == skip


def test_a_strangers_text_is_made_safe(tmp_path):
    with pytest.raises(ConfigError) as error:
        trained_base(origin(tmp_path / "a\x1b.safetensors", {"sdlora_base": "evil\x1b[31m\nbase" + "x" * 999}))
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 500
