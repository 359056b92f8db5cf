"""Several LoRAs in one file do what they do together, and the file says what they were."""

import json

import pytest
import torch
from files.random_lora import delta, random_lora, random_module, relative

from sdlora.cli.main import main
from sdlora.container import model_hash
from sdlora.errors import LoraFileError
from sdlora.families import Base, load_parts
from sdlora.families.places import places
from sdlora.files.attach import attach
from sdlora.files.derived import merged_metadata
from sdlora.files.kohya import LoraFile, ModuleWeights, read_lora, write_modules
from sdlora.files.merge import Weighed, common_dtype, merge

KEYS = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
XL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


def lora_of(path, modules: dict[str, tuple[int, ...]], **metadata: str) -> LoraFile:
    """Writes a LoRA of random modules for weights of some shapes."""
    weights = {name: random_module(name, shape, 2, 1.0, 0.2, 0) for name, shape in modules.items()}
    write_modules(path, weights, metadata, torch.float32)
    return read_lora(path)


def outputs(parts) -> list[torch.Tensor]:
    """What text encoders and denoiser return for fixed inputs."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        texts = parts.family.encode_prompts(parts, ["a castle"])
        return [*texts.values(), parts.family.denoise(parts, latents, torch.tensor([500]), texts)]


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def base(request):
    return request.getfixturevalue(f"tiny_{request.param}")


def test_a_merged_file_does_what_both_do_attached(tmp_path, base):
    _, table = places(base)
    names = list(table)
    one = random_lora(tmp_path / "one.safetensors", base, names[: len(names) * 2 // 3], size=0.1)
    two = random_lora(tmp_path / "two.safetensors", base, names[len(names) // 3 :], rank=2, alpha=8.0, size=0.1, seed=1)
    out = tmp_path / "both.safetensors"
    main(["lora", "merge", f"{one.path}:0.8", f"{two.path}:-0.5", "-o", str(out)])
    merged = read_lora(out)
    assert set(merged.modules) == set(names)
    ranks = {len({name} & one.modules.keys()) * 3 + len({name} & two.modules.keys()) * 2 for name in names}
    assert {w.rank for w in merged.modules.values()} == ranks == {2, 3, 5}
    assert all(w.alpha == w.rank for w in merged.modules.values())
    expected, found = (load_parts(Base("tiny", base, "test")) for _ in range(2))
    untouched = outputs(expected)
    attach(expected, one, 0.8)
    attach(expected, two, -0.5)
    attach(found, merged)
    for ours, theirs, before in zip(outputs(found), outputs(expected), untouched, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert relative(before, theirs) > 1e-2


def test_a_rank_cuts_the_sum(tmp_path, tiny_sd1, capsys):
    one = random_lora(tmp_path / "one.safetensors", tiny_sd1)
    two = random_lora(tmp_path / "two.safetensors", tiny_sd1, seed=1)
    out = tmp_path / "both.safetensors"
    main(["lora", "merge", str(one.path), f"{two.path}:0.5", "-o", str(out), "--rank", "2"])
    assert "rank 2; " in capsys.readouterr().out
    merged = read_lora(out)
    for name, weights in merged.modules.items():
        u, s, vt = torch.linalg.svd(delta(one.modules[name]) + 0.5 * delta(two.modules[name]), full_matrices=False)
        assert relative(delta(weights), (u[:, :2] * s[:2]) @ vt[:2]) < 1e-5


def test_a_1x1_convolution_and_a_matrix_of_one_layer_are_added(tmp_path):
    flat = lora_of(tmp_path / "flat.safetensors", {KEYS: (12, 8)})
    kernel = lora_of(tmp_path / "kernel.safetensors", {KEYS: (12, 8, 1, 1)})
    merged = merge([Weighed(flat), Weighed(kernel, 2.0)], torch.float32)[KEYS]
    assert (merged.down.shape, merged.up.shape) == ((4, 8), (12, 4))
    assert relative(delta(merged), delta(flat.modules[KEYS]) + 2 * delta(kernel.modules[KEYS])) < 1e-6


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.05, -3.0])
def test_small_scales_and_strengths_do_not_drown_in_fp16(tmp_path, strength):
    weights = random_module(KEYS, (64, 48), 16, 1 / 16, 1e-2, 0)
    write_modules(tmp_path / "one.safetensors", {KEYS: weights}, {}, torch.float16)
    one = read_lora(tmp_path / "one.safetensors")
    write_modules(tmp_path / "m.safetensors", merge([Weighed(one, strength)], torch.float16), {}, torch.float16)
    merged = read_lora(tmp_path / "m.safetensors").modules[KEYS]
    assert relative(delta(merged), strength * delta(one.modules[KEYS])) < 5e-4


def test_a_rank_that_bf16_does_not_hold_is_made_up_for(tmp_path):
    write_modules(
        tmp_path / "a.safetensors", {KEYS: random_module(KEYS, (300, 300), 257, 257.0, 0.1, 0)}, {}, torch.float32
    )
    one = read_lora(tmp_path / "a.safetensors")
    merged = merge([Weighed(one)], torch.bfloat16)[KEYS]
    assert merged.alpha == torch.tensor(merged.alpha).bfloat16().item() != merged.rank
    assert relative(delta(merged), delta(one.modules[KEYS])) < 1e-6


def test_the_number_format_holds_every_source(tmp_path):
    sources = {}
    for word, dtype in {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32}.items():
        write_modules(tmp_path / f"{word}.safetensors", {KEYS: random_module(KEYS, (4, 4), 1, 1.0, 1, 0)}, {}, dtype)
        sources[word] = read_lora(tmp_path / f"{word}.safetensors")
    assert common_dtype([sources["half"]]) == torch.float16
    assert common_dtype([sources["half"], sources["brain"]]) == torch.float32
    assert common_dtype([sources["brain"], sources["brain"]]) == torch.bfloat16
    assert common_dtype([sources["half"], sources["single"]]) == torch.float32


def test_metadata_keeps_what_is_true_of_all(tmp_path, tiny_sd1, monkeypatch):
    common = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_sd_model_name": "base", "ss_clip_skip": "2"}
    spec = {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.hash_sha256": "0x00",
        "sdlora_merged": "[]",
    }
    one = random_lora(
        tmp_path / "one.safetensors", tiny_sd1, **common, **spec, ss_steps="10", **{"modelspec.license": "A"}
    )
    others = {"modelspec.license": "B", "modelspec.trigger_phrase": "word"}
    two = random_lora(tmp_path / "two.safetensors", tiny_sd1, rank=5, **common, **spec, ss_steps="20", **others)
    out = tmp_path / "both.safetensors"
    main(["lora", "merge", f"{one.path}:0.25", str(two.path), "-o", str(out)])
    metadata = read_lora(out).metadata
    expected = {
        **common,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.license": "A, B",
        "modelspec.trigger_phrase": "word",
        "modelspec.merged_from": "one.safetensors, two.safetensors",
        "modelspec.title": "both",
        "ss_output_name": "both",
        "ss_network_dim": "8",
        "ss_network_alpha": "8.0",
        "ss_network_module": "networks.lora",
        "sshs_model_hash": model_hash(out.read_bytes()),
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert not {"ss_steps", "modelspec.hash_sha256"} & metadata.keys()
    assert json.loads(metadata["sdlora_merged"]) == [
        {"file": "one.safetensors", "strength": 0.25, "sshs_model_hash": one.model_hash},
        {"file": "two.safetensors", "strength": 1.0, "sshs_model_hash": two.model_hash},
    ]
    assert str(tmp_path) not in "".join(metadata.values())


def test_the_kind_is_the_familys_where_the_sources_do_not_agree(tmp_path):
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    silent = lora_of(tmp_path / "silent.safetensors", {name: (640, 2048)})
    older = lora_of(
        tmp_path / "older.safetensors", {name: (640, 2048)}, ss_base_model_version="sdxl_base_v0-9", ss_v2="False"
    )
    newer = lora_of(
        tmp_path / "newer.safetensors", {name: (640, 2048)}, ss_base_model_version="sdxl_base_v1-0", ss_v2="False"
    )
    for pair, version in (((silent, older), "sdxl_base_v0-9"), ((older, newer), "sdxl_base_v1-0")):
        metadata = merged_metadata([Weighed(lora) for lora in pair], pair[0].modules, "both")
        assert metadata["ss_base_model_version"] == version
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert metadata["ss_network_dim"] == "2"


def test_ranks_that_differ_are_called_dynamic_and_broken_texts_are_mended(tmp_path):
    one = lora_of(tmp_path / "one.safetensors", {KEYS: (8, 8)})
    one.metadata["note"] = "half a pair: \ud800"
    modules = {"a": ModuleWeights(torch.ones(1, 2), torch.ones(2, 1), 1.0), "b": one.modules[KEYS]}
    metadata = merged_metadata([Weighed(one)], modules, "{both")
    assert (metadata["ss_network_dim"], metadata["note"]) == ("Dynamic", "half a pair: ?")
    assert metadata["ss_output_name"] == "both"


def test_families_are_not_mixed(tmp_path):
    xl = lora_of(tmp_path / "xl.safetensors", {XL: (640, 2048)})
    old = lora_of(tmp_path / "old.safetensors", {KEYS: (1280, 768)})
    two = lora_of(tmp_path / "two.safetensors", {KEYS: (1280, 1024)})
    text = lora_of(tmp_path / "text.safetensors", {"lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768)})
    for first, second, told in (
        (xl, old, "xl.safetensors for Stable Diffusion XL, {}/old.safetensors for Stable Diffusion 1.x;"),
        (old, two, "old.safetensors for Stable Diffusion 1.x, {}/two.safetensors for Stable Diffusion 2.x;"),
        (text, xl, "text.safetensors for Stable Diffusion 1.x or 2.x, {}/xl.safetensors for Stable Diffusion XL;"),
    ):
        with pytest.raises(LoraFileError) as refused:
            merge([Weighed(first), Weighed(second)], torch.float32)
        assert told.format(tmp_path) in str(refused.value)
    assert len(merge([Weighed(old), Weighed(text)], torch.float32)) == 2


def test_layers_of_other_shapes_and_two_spellings_are_refused(tmp_path):
    other = KEYS.replace("mid_block_attentions_0", "middle_block_1")
    with pytest.raises(LoraFileError, match=f"in two ways .{KEYS}, {other}"):
        one, two = ((tmp_path / f"{name}.safetensors", {name: (8, 12)}) for name in (KEYS, other))
        merge([Weighed(lora_of(*one)), Weighed(lora_of(*two))], torch.float32)
    wide = lora_of(tmp_path / "wide.safetensors", {KEYS: (8, 16)})
    narrow = lora_of(tmp_path / "narrow.safetensors", {KEYS: (8, 12)})
    with pytest.raises(LoraFileError, match=r"of shape \[8, 16\] in .*wide.* and of \[8, 12\] in .*narrow"):
        merge([Weighed(wide), Weighed(narrow)], torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.safetensors:0", "two.safetensors", "-o", "out.safetensors"], "at strength 0 adds nothing"),
        (["one.safetensors", "-o", "out.safetensors"], "is already merged"),
        (["one.safetensors", "two.safetensors", "-o", "two.safetensors"], "would be written over"),
        (["one.safetensors", "two.safetensors", "-o", "out"], "must end in .safetensors"),
        (["one.safetensors", "two.safetensors"], "--output"),
        (["one.safetensors:much", "two.safetensors", "-o", "out.safetensors"], "is no number"),
        (["one.safetensors", "missing.safetensors", "-o", "out.safetensors"], "no LoRA file missing.safetensors"),
        (["one.safetensors:1e12", "two.safetensors", "-o", "out.safetensors", "--dtype", "fp16"], "out of its range"),
        (["one.safetensors", "--into", "nano", "--rank", "3", "-o", "out"], "--rank 3 has no effect with --into"),
        (["one.safetensors", "--into", "nano", "--dtype", "fp16", "-o", "out"], "--dtype fp16 has no effect"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        lora_of(tmp_path / f"{name}.safetensors", {KEYS: (8, 8)})
    with pytest.raises(SystemExit) as stop:
        main(["lora", "merge", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]
