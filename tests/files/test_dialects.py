"""One set of modules, written in every program's spelling, is read as the same changes to the same layers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import LoraFileError
from sdlora.families.names import original_unet
from sdlora.files.attach import looks_like
from sdlora.files.kohya import ModuleWeights, read_lora, write_modules

GOLDEN = Path(__file__).parent.parent / "golden"
COMPONENTS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
COMFYUI = {
    "unet": "diffusion_model",
    "te1": "text_encoders.clip_l.transformer",
    "te2": "text_encoders.clip_g.transformer",
}
KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}
PROCESSORS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
ATTENTION = ("attn1", "attn2", "self_attn")

Rows = dict[str, tuple[tuple[int, ...], str, str]]
Tensors = dict[str, torch.Tensor]


def golden(file: str) -> Rows:
    """Shape, component and path by kohya's name, from lists that kohya's own program made."""
    lines = [line.split("\t") for line in (GOLDEN / file).read_text().splitlines() if not line.startswith("#")]
    return {n: (tuple(map(int, shape.split("x"))), *path.split(":")) for n, shape, _, path in lines}  # type: ignore[misc]


FILES = {"sd1": "sd15_locon_modules.txt", "sd2": "sd21_locon_modules.txt", "sdxl": "sdxl_locon_modules.txt"}


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def family(request) -> str:
    return request.param


@pytest.fixture
def rows(family) -> Rows:
    """Every 17th module, so that each kind of layer occurs and tensors stay few, and one that tells the family."""
    every = golden(FILES[family])
    chosen = {name: row for i, (name, row) in enumerate(every.items()) if i % 17 == 0}
    told = next(name for name in every if "attn2_to_k" in name)
    return {**chosen, told: every[told]}


def values(rows: Rows) -> dict[str, ModuleWeights]:
    """Random modules whose rank and alpha differ."""
    rng = torch.Generator().manual_seed(0)
    modules = {}
    for i, (name, (shape, *_)) in enumerate(rows.items()):
        rank = 1 + i % 3
        down = torch.randn(rank, *shape[1:], generator=rng)
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=rng)
        modules[name] = ModuleWeights(down, up, (0.5, 1.0, 3.0, 4.0)[i % 4])
    return modules


def applied(weights: ModuleWeights) -> torch.Tensor:
    """What the change to the layer's weight does to three random vectors, which tells it from any other."""
    down, up = weights.down.double().flatten(1), weights.up.double().flatten(1)
    vectors = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return weights.scale * (up @ (down @ vectors))


def dotted(rows: Rows, modules: dict[str, ModuleWeights], start: dict[str, str], down: str, up: str) -> Tensors:
    """Spells modules by their paths; the scale goes into the up factor, for there is no other place for it."""
    tensors = {}
    for name, weights in modules.items():
        _, component, path = rows[name]
        tensors[f"{start[component]}{path}{down}"] = weights.down
        tensors[f"{start[component]}{path}{up}"] = weights.up * weights.scale
    return tensors


def with_dots(names: dict[str, str]) -> dict[str, str]:
    return {component: f"{name}." for component, name in names.items()}


def kohya(modules: dict[str, ModuleWeights], down: str = "lora_down", up: str = "lora_up") -> Tensors:
    tensors = {}
    for name, weights in modules.items():
        tensors |= {f"{name}.{down}.weight": weights.down, f"{name}.{up}.weight": weights.up}
        tensors[f"{name}.alpha"] = torch.tensor(weights.alpha)
    return tensors


def config(modules: dict[str, ModuleWeights]) -> dict:
    """peft's settings, by paths; what no pattern names has rank 2 and alpha 1."""
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 1,
        "rank_pattern": {path: w.rank for path, w in modules.items() if w.rank != 2},
        "alpha_pattern": {path: w.alpha for path, w in modules.items() if w.alpha != 1},
        "use_rslora": False,
    }


def require_same(path: Path, expected: dict[str, ModuleWeights], family: str, word: str) -> None:
    """Reads a file, writes it as kohya's and reads that: the layers, and the changes to them, are those expected."""
    lora = read_lora(path)
    assert lora.format == word
    assert looks_like(lora) == family
    written = path.parent / "again.safetensors"
    write_modules(written, lora.modules, lora.metadata, torch.float32)
    again = read_lora(written)
    assert again.format == "kohya"
    assert set(again.modules) == set(expected)
    for name, weights in expected.items():
        exact = applied(weights)
        for found in (lora.modules[name], again.modules[name]):
            assert torch.linalg.norm(applied(found) - exact) <= 1e-6 * torch.linalg.norm(exact)
            assert found.down.shape == weights.down.shape


def test_kohyas_own_spelling(tmp_path, rows, family):
    modules = values(rows)
    save_file(kohya(modules), tmp_path / "a.safetensors")
    require_same(tmp_path / "a.safetensors", modules, family, "kohya")


def test_kohyas_names_with_pefts_factors(tmp_path, rows, family):
    modules = values(rows)
    save_file(kohya(modules, "lora_A", "lora_B"), tmp_path / "a.safetensors")
    require_same(tmp_path / "a.safetensors", modules, family, "kohya (lora_A, lora_B)")


def test_kohyas_names_in_the_other_spelling(tmp_path, rows, family):
    """SDXL by diffusers' paths, and its first text encoder as if it were the only one; the others by the original's."""
    modules = values(rows)
    other = {}
    for name, (_, component, path) in rows.items():
        if component == "unet":
            changed = path if family == "sdxl" else original_unet(path, plain_up=(0,))
            other[f"lora_unet_{changed.replace('.', '_')}"] = modules[name]
        else:
            other[name.replace("lora_te1_", "lora_te_").replace("_text_model_", "_")] = modules[name]
    assert len(other) == len(modules) and not set(other) & set(modules)
    save_file(kohya(other), tmp_path / "a.safetensors")
    word = "kohya (diffusers names)" if family == "sdxl" else "kohya (original names)"
    require_same(tmp_path / "a.safetensors", modules, family, word)


def test_diffusers_with_lora_down_and_lora_up(tmp_path, rows, family):
    modules = values(rows)
    tensors = dotted(rows, modules, with_dots(COMPONENTS), ".lora.down.weight", ".lora.up.weight")
    save_file(tensors, tmp_path / "a.safetensors")
    require_same(tmp_path / "a.safetensors", modules, family, "diffusers (lora.down, lora.up)")


def test_diffusers_attention_processors(tmp_path, family):
    """The oldest names, which only attention has; text encoders in both of the ways that they were written."""
    every = golden(FILES[family])
    rows = {n: row for n, row in every.items() if any(f".{part}." in row[2] for part in ATTENTION)}
    rows = {n: row for i, (n, row) in enumerate(rows.items()) if i % 9 in (0, 1) or "_1_attentions_1_" in n}
    modules, tensors = values(rows), {}
    for i, (name, weights) in enumerate(modules.items()):
        _, component, path = rows[name]
        front, _, layer = path.removesuffix(".0").rpartition(".")
        if component == "unet":
            start = "" if family == "sd1" else "unet."
            stem = f"{start}{front}.processor.{layer}_lora"
        elif i % 2:
            stem = f"{COMPONENTS[component]}.{front}.{PROCESSORS[layer]}_lora"
        else:
            stem = f"{COMPONENTS[component]}.{path}.lora_linear_layer"
        tensors |= {f"{stem}.down.weight": weights.down, f"{stem}.up.weight": weights.up}
        tensors[f"{stem}.alpha"] = torch.tensor(weights.alpha)
    assert {key.split(".")[-3] for key in tensors} >= {"to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora"}
    save_file(tensors, tmp_path / "a.safetensors")
    require_same(tmp_path / "a.safetensors", modules, family, "diffusers (attention processors)")


def test_diffusers_with_the_configuration_in_the_metadata(tmp_path, rows, family):
    modules = values(rows)
    tensors, table = {}, {}
    for component, folder in COMPONENTS.items():
        own = {n: w for n, w in modules.items() if rows[n][1] == component}
        by_path = {f"^{rows[n][2]}" if component == "unet" else rows[n][2]: w for n, w in own.items()}
        table |= {f"{folder}.{key}": value for key, value in config(by_path).items()} if own else {}
        for name, weights in own.items():
            stem = f"{folder}.{rows[name][2]}"
            tensors |= {f"{stem}.lora_A.weight": weights.down, f"{stem}.lora_B.weight": weights.up}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(table)})
    require_same(tmp_path / "a.safetensors", modules, family, "diffusers")
    assert read_lora(tmp_path / "a.safetensors").notes == ()


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_peft_folders(tmp_path, rows, family, adapter):
    modules = values(rows)
    for component, folder in COMPONENTS.items():
        own = {rows[n][2]: w for n, w in modules.items() if rows[n][1] == component}
        if own:
            (tmp_path / folder).mkdir()
            tensors = {}
            for path, weights in own.items():
                flat = path if component == "unet" else path.removeprefix("text_model.")  # as transformers 5 saves
                stem = f"base_model.model.{flat}"
                tensors |= {f"{stem}.lora_A{adapter}.weight": weights.down}
                tensors |= {f"{stem}.lora_B{adapter}.weight": weights.up}
            save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
            (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config(own)))
    require_same(tmp_path, modules, family, "peft")
    unet = {n: w for n, w in modules.items() if rows[n][1] == "unet"}
    require_same(tmp_path / "unet", unet, family, "peft")
    require_same(tmp_path / "unet" / "adapter_model.safetensors", unet, family, "peft")


def test_comfyuis_generic_names(tmp_path, rows, family):
    modules, tensors = values(rows), {}
    for name, weights in modules.items():
        _, component, path = rows[name]
        path = original_unet(path, plain_up=() if family == "sdxl" else (0,)) if component == "unet" else path
        tensors |= kohya({f"{COMFYUI[component]}.{path}": weights})
    save_file(tensors, tmp_path / "a.safetensors")
    require_same(tmp_path / "a.safetensors", modules, family, "comfyui")


PATH = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
NAME = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
ORIGINAL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v"


def factors(stem: str, down: str = "lora_down", up: str = "lora_up", rank: int = 2, width: int = 768) -> Tensors:
    return {f"{stem}.{down}.weight": torch.ones(rank, width), f"{stem}.{up}.weight": torch.ones(640, rank)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors(NAME) | factors(ORIGINAL), rf"in two ways, {NAME}\..* and {ORIGINAL}\."),
        (factors(NAME, width=2048) | factors(ORIGINAL, width=2048), rf"in two ways, {NAME}\..* and {ORIGINAL}\."),
        (factors(NAME) | factors(PATH, "lora_A", "lora_B"), rf"holds {NAME} twice, as {NAME}\..* and as {PATH}\."),
        (
            factors(NAME) | factors("unet.conv_in", "lora_A", "lora_B"),
            rf"mixes the names of two programs, {NAME}\..* and unet\.conv_in\.",
        ),
        (
            factors(PATH, "lora_A", "lora_B") | factors(PATH, "lora.down", "lora.up"),
            rf"holds {NAME} twice, as {PATH}\.lora_?.* and as {PATH}\.lora",
        ),
        (
            factors("lora_te_text_model_encoder_layers_0_mlp_fc1") | factors("lora_te_encoder_layers_0_mlp_fc1"),
            "holds lora_te_text_model_encoder_layers_0_mlp_fc1 twice",
        ),
        (
            factors("lora_te_text_model_encoder_layers_0_mlp_fc1")
            | factors("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            "holds lora_te1_text_model_encoder_layers_0_mlp_fc1 twice",
        ),
        ({f"{PATH}.lora_A.weight": torch.ones(2, 768)}, rf"has {PATH}\.lora_A\.weight but no {PATH}\.lora_B\.weight"),
        ({f"{PATH}.lora.up.weight": torch.ones(9, 2)}, rf"has {PATH}\.lora\.up\.weight but no {PATH}\.lora\.down\."),
        ({f"{PATH}.alpha": torch.ones(())}, r"has .*alpha but no lora_(down|up)\.weight"),
        ({"unet:0:up": torch.ones(320, 1)}, r"has unet:0:up but no unet:0:down"),
    ],
)
def test_what_no_two_programs_would_read_alike_is_refused(tmp_path, tensors, message):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(LoraFileError, match=message):
        read_lora(path)


def test_a_denoiser_without_any_hint_keeps_its_names(tmp_path):
    """Level 1 is 640 wide in every family; guessing would give a wrong layer, keeping gives none."""
    path = tmp_path / "a.safetensors"
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k"
    save_file(factors(name, width=640), path)
    lora = read_lora(path)
    assert list(lora.modules) == [name] and looks_like(lora) == "unknown"
    save_file(factors(name, width=640), path, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert list(read_lora(path).modules) == ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"]


def test_structure_tells_sdxl_where_no_width_does(tmp_path):
    path = tmp_path / "a.safetensors"
    deep = "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn1_to_k"
    save_file(factors(deep, width=1280), path)
    assert list(read_lora(path).modules) == ["lora_unet_middle_block_1_transformer_blocks_9_attn1_to_k"]
    fourth = "lora_unet_output_blocks_11_0_in_layers_2"
    save_file(factors(fourth, width=640), path)
    assert list(read_lora(path).modules) == ["lora_unet_up_blocks_3_resnets_2_conv1"]


def test_a_text_projection_is_kept_under_its_name(tmp_path):
    path = tmp_path / "a.safetensors"
    for stem in ("lora_te2_text_projection", "text_encoder_2.text_projection"):
        save_file(factors(stem), path)
        assert list(read_lora(path).modules) == ["lora_te2_text_projection"]


def test_a_folder_is_searched_for_the_names_that_programs_give(tmp_path):
    with pytest.raises(LoraFileError, match=r"is a folder without adapter_model\.safetensors"):
        read_lora(tmp_path)
    save_file(factors(PATH, "lora_A", "lora_B"), tmp_path / "pytorch_lora_weights.safetensors")
    lora = read_lora(tmp_path)
    assert lora.path == tmp_path / "pytorch_lora_weights.safetensors" and list(lora.modules) == [NAME]


def test_embeddings_that_onetrainer_bundles_are_named_and_left_out(tmp_path):
    path = tmp_path / "a.safetensors"
    words = {f"bundle_emb.{word}.clip_l": torch.ones(2, 768) for word in ("castle", "moat")}
    save_file(factors(NAME) | words, path)
    lora = read_lora(path)
    assert list(lora.modules) == [NAME]
    assert any("embeddings of new words, castle, moat, which are no part of the LoRA" in note for note in lora.notes)
    save_file(words, path)
    with pytest.raises(LoraFileError, match="holds embeddings of new words and no LoRA"):
        read_lora(path)


@pytest.mark.parametrize(("width", "kind"), [(768, "sd1"), (1024, "sd2"), (1280, "unknown")])
def test_a_text_encoder_alone_tells_the_model_by_its_width_if_nothing_else_does(tmp_path, width, kind):
    path, name = tmp_path / "a.safetensors", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file(factors(name, width=width), path)
    assert looks_like(read_lora(path)) == kind
    save_file(factors(name, width=width), path, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert looks_like(read_lora(path)) == "sdxl"
