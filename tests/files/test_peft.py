"""What we write for diffusers and peft, they load whole, and compute with it what we do."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from pipelines import their_pipeline

from sdlora.adapters import Lora, find_layers, inject
from sdlora.diffusion.noise import generator
from sdlora.errors import LoraFileError
from sdlora.families import Base, Parts, load_parts
from sdlora.files.attach import attach
from sdlora.files.kohya import ModuleWeights, adapter_modules, read_lora, write_modules
from sdlora.files.peft import write_diffusers, write_peft

PEFTS_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
"""That peft makes itself, with transformers of today."""

NAMES = {"denoiser": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}


@pytest.fixture(params=["tiny_sd1", "tiny_sd2", "tiny_sdxl"])
def base(request) -> Path:
    return request.getfixturevalue(request.param)


def load(base: Path) -> Parts:
    return load_parts(Base(str(base), base, "test"))


def modules_for(parts: Parts) -> dict[str, ModuleWeights]:
    """Random modules for every layer that is ever trained; ranks 1 to 3, alphas that are none of them."""
    adapters: dict[str, dict[str, Lora]] = {}
    for component, model in parts.components.items():
        rules = parts.family.targets["conv"] if component == "denoiser" else parts.family.text_encoder_targets
        found = find_layers(model, rules)
        number = {path: i for i, path in enumerate(found)}

        def make(path: str, layer: torch.nn.Module, number: dict[str, int] = number) -> Lora:
            i = number[path]
            adapter = Lora(layer, 1 + i % 3, (0.25, 1.5, 7.0, 1.5)[i % 4])
            rng = generator("values", path)
            with torch.no_grad():
                adapter.down.copy_(torch.randn(adapter.down.shape, generator=rng) * 0.3)
                adapter.up.copy_(torch.randn(adapter.up.shape, generator=rng) * 0.3)
            return adapter

        adapters[component] = inject(model, found, make)
    return adapter_modules(adapters, parts.family)


def outputs(parts: Parts) -> list[torch.Tensor]:
    """The text states and the denoiser's output on fixed input."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = parts.family.encode_prompts(parts, ["a castle", "a cat on a hill"], 1)
        return [conditioning["states"], parts.family.denoise(parts, latents, torch.tensor([10, 700]), conditioning)]


def require_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], bare: list[torch.Tensor]) -> None:
    for our, their, base in zip(ours, theirs, bare, strict=True):
        assert (our - their).abs().max() <= 2e-5 * their.abs().max()
        assert (our - base).abs().max() > 1e-3 * base.abs().max()  # the adapters do something


def loaded(model: torch.nn.Module) -> int:
    return sum(isinstance(module, LoraLayer) for module in model.modules())


def test_diffusers_loads_our_file_and_computes_what_we_do(tmp_path, base, complaints):
    parts, theirs, as_folder = load(base), load(base), base.name != "sd2"
    bare, modules = outputs(parts), modules_for(parts)
    target = tmp_path if as_folder else tmp_path / "style.safetensors"
    file = write_diffusers(target, modules, parts.family.name, {"ss_a": "b"}, torch.float32)
    assert file.name == ("pytorch_lora_weights.safetensors" if as_folder else "style.safetensors")
    pipe = their_pipeline(theirs, DDIMScheduler(steps_offset=1, clip_sample=False))
    pipe.load_lora_weights(target)
    assert sum(map(loaded, theirs.components.values())) == len(modules)
    assert complaints == []
    require_same(outputs(parts), outputs(theirs), bare)


@pytest.mark.filterwarnings(PEFTS_WARNING)
def test_peft_loads_our_folders_and_computes_what_we_do(tmp_path, base, complaints):
    parts, theirs = load(base), load(base)
    bare, modules = outputs(parts), modules_for(parts)
    written = write_peft(tmp_path, modules, parts.family.name, {}, torch.float32)
    assert {p.relative_to(tmp_path).parts[0] for p in written} == {NAMES[c] for c in parts.components}
    assert {p.name for p in written} == {"adapter_config.json", "adapter_model.safetensors"}
    for component, model in theirs.components.items():
        PeftModel.from_pretrained(model, tmp_path / NAMES[component])  # type: ignore[arg-type]
    assert sum(map(loaded, theirs.components.values())) == len(modules)
    assert complaints == []
    require_same(outputs(parts), outputs(theirs), bare)


@pytest.fixture
def trained(base) -> tuple[Parts, dict[str, PeftModel]]:
    """A base with a peft adapter in each component, of two ranks and two alphas, and peft's models around them."""
    parts, models = load(base), {}
    for component, model in parts.components.items():
        usual = {"r": 4, "lora_alpha": 2}
        if component == "denoiser":
            layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]
            usual |= {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn2.to_v": 7}}
        else:
            layers = ["v_proj", "fc1"]
            usual |= {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"1.mlp.fc1": 9}, "use_rslora": True}
        models[component] = PeftModel(model, LoraConfig(**usual, target_modules=layers))  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator("trained", name)) * 0.3)
        model.eval()
    return parts, models


@pytest.mark.filterwarnings(PEFTS_WARNING)
def test_what_diffusers_saves_we_read_and_compute_what_it_does(tmp_path, base, trained):
    theirs, models = trained
    pipe = their_pipeline(theirs, DDIMScheduler(steps_offset=1, clip_sample=False))
    layers = {}
    for component, model in models.items():
        state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
        layers[f"{NAMES[component]}_lora_layers"] = state
        layers[f"{NAMES[component]}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, **layers)
    ours = load(base)
    bare, lora = outputs(ours), read_lora(tmp_path)
    attach(ours, lora)
    assert (lora.format, lora.notes) == ("diffusers", ())
    require_same(outputs(ours), outputs(theirs), bare)


@pytest.mark.filterwarnings(PEFTS_WARNING)
def test_what_peft_saves_we_read_and_compute_what_it_does(tmp_path, base, trained):
    theirs, models = trained
    for component, model in models.items():
        model.save_pretrained(tmp_path / NAMES[component])
    ours = load(base)
    bare, lora = outputs(ours), read_lora(tmp_path)
    attach(ours, lora)
    assert (lora.format, lora.notes) == ("peft", ())
    require_same(outputs(ours), outputs(theirs), bare)


@pytest.mark.parametrize("way", ["diffusers", "peft"])
def test_what_we_write_we_read_back_exactly(tmp_path, base, way):
    parts = load(base)
    modules = modules_for(parts)
    write = {"diffusers": write_diffusers, "peft": write_peft}[way]
    write(
        tmp_path,
        modules,
        parts.family.name,
        {"ss_base_model_version": parts.family.metadata["ss_base_model_version"]},
        torch.float32,
    )
    lora = read_lora(tmp_path)
    assert (lora.format, lora.notes, set(lora.modules)) == (way, (), set(modules))
    for name, weights in modules.items():
        found = lora.modules[name]
        assert torch.equal(found.down, weights.down) and torch.equal(found.up, weights.up)
        assert found.alpha == weights.alpha


def test_a_matrix_is_written_in_the_shape_of_its_layer(tmp_path):
    """SD 1.x has 1 x 1 convolutions where SD 2.x has matrices; files exist with either for both."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    for family, sides in (("sd1", 4), ("sd2", 2)):
        for ones in ((), (1, 1)):
            module = ModuleWeights(torch.ones(2, 1280, *ones), torch.ones(1280, 2, *ones), 1.0)
            write_diffusers(tmp_path, {name: module}, family, {}, torch.float32)
            (found,) = read_lora(tmp_path).modules.values()
            assert found.down.dim() == found.up.dim() == sides


def test_a_module_of_no_layer_is_refused(tmp_path):
    module = {"lora_unet_input_blocks_1_1_proj_in": ModuleWeights(torch.ones(1, 320), torch.ones(320, 1), 1.0)}
    for write in (write_diffusers, write_peft):
        with pytest.raises(LoraFileError, match="no layers of that base, the first is lora_unet_input_blocks_1_1"):
            write(tmp_path, module, "sd1", {}, torch.float32)
    assert not list(tmp_path.iterdir())


def test_equal_input_gives_equal_bytes(tmp_path, tiny_sd1):
    modules = modules_for(load(tiny_sd1))
    for name in ("a", "b"):
        write_diffusers(tmp_path / f"{name}.safetensors", modules, "sd1", {"x": "y"}, torch.float16)
        modules = dict(reversed(modules.items()))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_configuration_names_only_what_is_unusual(tmp_path):
    name = "lora_te_text_model_encoder_layers_{}_mlp_fc1"
    modules = {
        name.format(i): ModuleWeights(torch.ones(r, 768), torch.ones(3072, r), a)
        for i, (r, a) in enumerate([(4, 2.0), (4, 2.0), (2, 2.0), (4, 0.5)])
    }
    write_peft(tmp_path, modules, "sd1", {}, torch.float32)
    config = json.loads((tmp_path / "text_encoder" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    assert config["rank_pattern"] == {"encoder.layers.2.mlp.fc1": 2}
    assert config["alpha_pattern"] == {"encoder.layers.3.mlp.fc1": 0.5}
    assert config["peft_type"] == "LORA" and len(config["target_modules"]) == 4


def test_a_loras_way_through_all_formats_changes_nothing(tmp_path, tiny_sdxl):
    parts = load(tiny_sdxl)
    bare, modules = outputs(parts), modules_for(parts)
    live = outputs(parts)
    version = {"ss_base_model_version": "sdxl_base_v1-0"}
    write_diffusers(tmp_path / "a.safetensors", modules, "sdxl", version, torch.float32)
    write_peft(tmp_path / "b", read_lora(tmp_path / "a.safetensors").modules, "sdxl", version, torch.float32)
    write_modules(tmp_path / "c.safetensors", read_lora(tmp_path / "b").modules, version, torch.float32)
    fresh = load(tiny_sdxl)
    attach(fresh, read_lora(tmp_path / "c.safetensors"))
    require_same(live, outputs(fresh), bare)
