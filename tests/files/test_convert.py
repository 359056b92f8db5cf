"""A converted LoRA does the same, and says of itself what the programs that will read it go by."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from sdlora.cli.lora_convert import command
from sdlora.errors import ConfigError, LoraFileError
from sdlora.families import FAMILIES
from sdlora.files.convert import WAYS, convert, true_metadata
from sdlora.files.kohya import LoraFile, ModuleWeights, read_lora
from sdlora.files.webui import a1111_version, forge_version

PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
KINDS = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}


def factors(width: int = 768, stem: str = PATH, rank: int = 2, dtype: torch.dtype = torch.float32):
    down, up = torch.randn(rank, width).to(dtype), torch.randn(1280, rank).to(dtype)
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def lora_file(metadata: dict[str, str], *sizes: tuple[int, float]) -> LoraFile:
    modules = {
        f"lora_unet_conv_in_{i}": ModuleWeights(torch.ones(rank, 4), torch.ones(4, rank), alpha)
        for i, (rank, alpha) in enumerate(sizes or ((2, 1.0),))
    }
    return LoraFile(None, modules, metadata, torch.float32)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(factors(), path, {"author": "somebody"})
    return path


@pytest.mark.parametrize("family", WIDTHS)
def test_webuis_class_the_result_by_its_base(tmp_path, family):
    path = tmp_path / "source.safetensors"
    save_file(factors(WIDTHS[family]), path)
    (written,) = convert(read_lora(path), tmp_path / "style.safetensors", "kohya")
    metadata = read_lora(written).metadata
    assert a1111_version(metadata) == forge_version(metadata) == KINDS[family]
    assert {key: metadata[key] for key in FAMILIES[family].metadata} == FAMILIES[family].metadata
    assert metadata["ss_output_name"] == "style"
    assert (metadata["ss_network_module"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (
        "networks.lora",
        "2",
        "2.0",
    )


def test_own_words_are_kept_and_only_false_ones_replaced():
    own = {"author": "somebody", "ss_base_model_version": "sd_v2_v", "ss_v2": "False", "ss_network_dim": "64"}
    own["modelspec.architecture"] = "stable-diffusion-v2-768-v/lora"
    kept = true_metadata(lora_file(own), FAMILIES["sd2"], "style")
    assert {**own, "ss_v2": "True"}.items() <= kept.items()
    false = true_metadata(lora_file({**own, "ss_base_model_version": "sd_v1"}), FAMILIES["sdxl"], "style")
    assert FAMILIES["sdxl"].metadata.items() <= false.items() and false["author"] == "somebody"


def test_what_described_the_old_layout_is_left_out():
    old = {"format": "pt", "lora_adapter_metadata": "{}", "unet": '["GEGLU"]', "unet:12:rank": "4", "<s1>": "<embed>"}
    kept = true_metadata(lora_file({**old, "word": "<embed>", "text_encoder": "[]"}), FAMILIES["sd1"], "style")
    assert not {*old, "word", "text_encoder"} & set(kept)


def test_ranks_that_differ_are_dynamic():
    kept = true_metadata(lora_file({}, (2, 1.0), (3, 1.0)), FAMILIES["sd1"], "{style")
    assert (kept["ss_network_dim"], kept["ss_network_alpha"]) == ("Dynamic", "1.0")
    assert kept["ss_output_name"] == "style"


def test_half_a_letter_in_a_strangers_metadata_does_not_stop_the_writing(tmp_path, source):
    lora = read_lora(source)
    lora.metadata["x\ud800"] = "\udfff"
    convert(lora, tmp_path / "style.safetensors", "kohya")
    assert "x?" in read_lora(tmp_path / "style.safetensors").metadata


def test_a_1x1_kernel_goes_where_the_layer_is_a_matrix(tmp_path):
    """diffusers refuses sd-scripts' convolutions in SD 2.x, where its own model has matrices."""
    path, stem = tmp_path / "source.safetensors", "lora_unet_mid_block_attentions_0_proj_in"
    kernels = {
        f"{stem}.lora_down.weight": torch.ones(2, 1280, 1, 1),
        f"{stem}.lora_up.weight": torch.ones(1280, 2, 1, 1),
    }
    save_file(kernels | factors(1024, PATH.replace(".", "_").replace("unet_", "lora_unet_", 1)), path)
    (written,) = convert(read_lora(path), tmp_path / "style.safetensors", "kohya")
    assert read_lora(written).modules[stem].down.shape == (2, 1280)


@pytest.mark.parametrize(
    ("name", "way", "message"),
    [
        ("style", "kohya", "must end in .safetensors"),
        ("style.safetensors", "peft", "must be a folder"),
        ("source.safetensors", "kohya", "would be written over"),
        ("source.safetensors", "diffusers", "would be written over"),
        ("notes.txt", "diffusers", "is a file; give a folder"),
    ],
)
def test_a_target_that_cannot_be_is_refused(tmp_path, source, name, way, message):
    (tmp_path / "notes.txt").write_text("mine")
    before = source.read_bytes()
    with pytest.raises((LoraFileError, ConfigError), match=message):
        convert(read_lora(source), tmp_path / name, way)
    assert source.read_bytes() == before


@pytest.mark.parametrize("way", ["diffusers", "peft"])
def test_a_folder_is_not_written_over_itself(tmp_path, source, way):
    folder = tmp_path / "folder"
    written = convert(read_lora(source), folder, way)
    before = [path.read_bytes() for path in written]
    for path in (folder, written[-1]):
        with pytest.raises(LoraFileError, match="never overwritten"):
            convert(read_lora(path), folder, way)
    assert [path.read_bytes() for path in written] == before


def test_an_unknown_base_is_not_guessed(tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(factors(stem="unet.mid_block.attentions.0.proj_in"), path)
    with pytest.raises(LoraFileError, match="tell which model it was made for"):
        convert(read_lora(path), tmp_path / "style.safetensors", "kohya")
    assert not (tmp_path / "style.safetensors").exists()


def test_the_number_format_is_that_of_the_source_or_as_asked(tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(factors(dtype=torch.bfloat16), path)
    (kept,) = convert(read_lora(path), tmp_path / "a.safetensors", "kohya")
    (asked,) = convert(read_lora(path), tmp_path / "b.safetensors", "kohya", torch.float32)
    assert (read_lora(kept).dtype, read_lora(asked).dtype) == (torch.bfloat16, torch.float32)


def test_the_command_says_what_it_read_and_what_it_wrote(tmp_path, source):
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    said = run(source, tmp_path / "a.safetensors")
    assert "Note: source.safetensors: 1 of 1 modules have no alpha" in said
    assert f"Read {source}: diffusers, 1 modules, for Stable Diffusion 1.x" in said
    assert f"Wrote {tmp_path / 'a.safetensors'} (kohya, " in said
    assert read_lora(tmp_path / "a.safetensors").metadata["author"] == "somebody"
    assert "pytorch_lora_weights.safetensors (diffusers, " in run(tmp_path / "a.safetensors", tmp_path / "b")
    said = run(tmp_path / "b", tmp_path / "c", "--to", "peft", "--dtype", "fp16")
    assert said.count("Wrote ") == 2 and "adapter_config.json (peft, " in said
    assert [read_lora(tmp_path / name).format for name in ("a.safetensors", "b", "c")] == ["kohya", "diffusers", "peft"]


def test_the_command_offers_every_format():
    option = next(p for p in command.params if p.name == "way")
    assert list(option.type.choices) == list(WAYS)  # type: ignore[attr-defined]
