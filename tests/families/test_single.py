"""A single file is read back as the folder that it was made from, without a network; what is no base says what it is."""

import copy
import json
import shutil
import socket
import struct

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from families.tiny import SIZE, make_tiny
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

from sdlora.container import open_container
from sdlora.errors import ModelError
from sdlora.families import FAMILIES, Base, identify, load_parts, native_resolution
from sdlora.families.save_single import save_single
from sdlora.families.single import identify_file, load_file

UNET, VAE = "model.diffusion_model.", "first_stage_model."
NAMES = ["sd1", "sd2", "sdxl"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, tiny_sd1, tiny_sd2, tiny_sdxl):
    """Family -> (folder, the single file made from it)."""
    root = tmp_path_factory.mktemp("single")
    folders = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
    for name, folder in folders.items():
        save_single(folder, root / f"{name}.safetensors")
    return {name: (folder, root / f"{name}.safetensors") for name, folder in folders.items()}


@pytest.fixture(scope="session")
def references(pairs):
    """Family -> the folder, loaded."""
    return {name: parts_of(folder) for name, (folder, _) in pairs.items()}


@pytest.fixture(params=NAMES)
def pair(request, pairs):
    return pairs[request.param]


@pytest.fixture
def edited(pairs, tmp_path):
    """Writes a tiny single file with other tensors or metadata."""

    def write(name, edit=lambda tensors: None, **metadata):
        file = pairs[name][1]
        tensors = read_tensors(file)
        tensors = edit(tensors) or tensors
        with_metadata = dict(open_container(file).metadata) | metadata
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "m.safetensors", with_metadata)
        return tmp_path / "m.safetensors"

    return write


def parts_of(path):
    return load_parts(Base("base", path, "test"))


def states(parts):
    return {name: m.state_dict() for name, m in {**parts.components, "vae": parts.vae}.items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].keys() == right[name].keys()
        for key in left[name]:
            assert torch.equal(left[name][key], right[name][key]), f"{name} {key}"


def everything(parts):
    """What denoiser, VAE and text encoders make of fixed inputs.

    Copies are asked, for kernels round differently where tensors begin at odd addresses, as they do in a mapped file.
    """
    parts = copy.deepcopy(parts)
    pixels = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        conditioning = parts.family.encode_prompts(parts, ["a cat, in a hat"])
        latents, _ = parts.family.encode_images(parts, pixels)
        predicted = parts.family.denoise(parts, latents, torch.tensor([500]), conditioning)
        decoded = parts.family.decode_latents(parts, latents)
    return [*conditioning.values(), latents, predicted, decoded]


def test_a_file_made_from_a_folder_is_read_back_bit_by_bit_and_does_the_same(pair):
    folder, file = pair
    ours, theirs = parts_of(file), parts_of(folder)
    assert ours.family is theirs.family
    assert_equal(states(ours), states(theirs))
    for left, right in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(left, right)
    assert (ours.resolution, ours.schedule.prediction) == (theirs.resolution, theirs.schedule.prediction) == (64, "epsilon")
    assert native_resolution(file) == 64
    for name, tokenizer in theirs.tokenizers.items():
        assert ours.tokenizers[name]("a cat!", padding="max_length") == tokenizer("a cat!", padding="max_length")


def test_nothing_of_a_loaded_module_is_without_memory_or_trained(pair):
    parts = parts_of(pair[1])
    for module in (*parts.components.values(), parts.vae):
        assert not module.training
        tensors = [*module.parameters(), *module.buffers()]
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
        pointers = [parameter.data_ptr() for parameter in module.parameters()]
        assert len(set(pointers)) == len(pointers)  # the thirds of OpenCLIP's matrices are copies, which files need


def test_every_weight_is_what_diffusers_converter_makes_of_the_file(pair):
    folder, file = pair
    checkpoint, parts = read_tensors(file), parts_of(folder)
    converted = {
        "denoiser": convert_ldm_unet_checkpoint(dict(checkpoint), parts.denoiser.config),
        "vae": convert_ldm_vae_checkpoint(dict(checkpoint), parts.vae.config),
    }
    for spec in parts.family.text_encoders:
        encoder = parts.text_encoders[spec.component]
        if spec.open_clip:
            state = convert_open_clip_checkpoint(encoder, dict(checkpoint), prefix=spec.original)
        else:
            state = convert_ldm_clip_checkpoint(dict(checkpoint))
        flat = not hasattr(encoder, "text_model")
        converted[spec.component] = {k.removeprefix("text_model.") if flat else k: v for k, v in state.items()}
    assert_equal(converted, states(parts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_half_precision_files_are_read_in_fp32(pairs, tmp_path, dtype):
    folder = pairs["sdxl"][0]
    file = tmp_path / "half.safetensors"
    save_single(folder, file, dtype)
    assert {entry.dtype for entry in open_container(file).entries.values()} == {dtype}
    rounded = {n: {k: v.to(dtype).float() for k, v in s.items()} for n, s in states(references[name]).items()}
    assert_equal(states(parts_of(file)), rounded)


def test_a_file_without_vae_or_text_encoders_says_so_and_the_rest_is_the_same(pair, tmp_path):
    folder, file = pair
    family, whole = identify(file), parts_of(folder)
    bare = {key: t for key, t in read_tensors(file).items() if key.startswith(UNET)}
    save_file(bare, tmp_path / "bare.safetensors")
    assert identify(tmp_path / "bare.safetensors") is family
    found = load_file(tmp_path / "bare.safetensors", family, {"vae", *whole.text_encoders})
    assert found.vae is None and not found.text_encoders and not found.tokenizers
    assert_equal({"denoiser": found.denoiser.state_dict()}, {"denoiser": whole.denoiser.state_dict()})
    assert found.denoiser.config.addition_time_embed_dim == whole.denoiser.config.addition_time_embed_dim
    with pytest.raises(ModelError, match="holds no VAE; give one with --vae"):
        parts_of(tmp_path / "bare.safetensors")


def test_only_what_is_wanted_is_read(pair):
    folder, file = pair
    found = load_file(file, identify(file), {"text_encoder"})
    assert found.vae is None and list(found.text_encoders) == list(found.tokenizers) == ["text_encoder"]
    assert not any("left aside" in note for note in found.notes)


def test_a_denoiser_alone_under_bare_names_is_known(pair, tmp_path):
    folder, file = pair
    bare = {key.removeprefix(UNET): t for key, t in read_tensors(file).items() if key.startswith(UNET)}
    save_file(bare, tmp_path / "bare.safetensors")
    family = identify(tmp_path / "bare.safetensors")
    assert family is identify(folder)
    found = load_file(tmp_path / "bare.safetensors", family, set())
    assert_equal({"": found.denoiser.state_dict()}, {"": parts_of(folder).denoiser.state_dict()})


def test_old_names_of_the_text_encoder_are_known(edited, pairs):
    def without_level(tensors):
        return {key.replace("transformer.text_model.", "transformer."): t for key, t in tensors.items()}

    assert_equal(states(parts_of(edited("sd1", without_level))), states(references["sd1"]))


def test_a_final_projection_in_hugging_faces_way_is_not_turned(edited, pairs):
    name = "conditioner.embedders.1.model.text_projection"

    def turn(tensors):
        tensors[f"{name}.weight"] = tensors.pop(name).T

    assert_equal(states(parts_of(edited("sdxl", turn))), states(references["sdxl"]))


@pytest.mark.parametrize(("name", "shape"), [("sd2", (24, 24, 1, 1)), ("sd1", (24, 24))])
def test_projections_may_be_convolutions_or_linear(edited, pairs, name, shape):
    def reshape(tensors):
        for key in [key for key in tensors if key.endswith(("proj_in.weight", "proj_out.weight")) and UNET in key]:
            tensors[key] = tensors[key].reshape(*tensors[key].shape[:2], *shape[2:])

    file = edited(name, reshape)
    assert open_container(file).entries[f"{UNET}middle_block.1.proj_in.weight"].shape == shape
    assert identify(file).name == name
    assert_equal(states(parts_of(file)), states(references[name]))


def test_the_last_layer_of_sd2s_text_encoder_is_left_out_as_diffusers_does(tmp_path):
    folder = make_tiny(tmp_path / "sd2", "sd2", layers=23)
    save_single(folder, tmp_path / "short.safetensors")
    tensors = read_tensors(tmp_path / "short.safetensors")
    prefix = "cond_stage_model.model."
    for key in [key for key in tensors if "resblocks.22." in key]:
        tensors[key.replace("resblocks.22.", "resblocks.23.")] = torch.randn(tensors[key].shape)
    tensors |= {f"{prefix}text_projection": torch.randn(20, 20), f"{prefix}logit_scale": torch.tensor(4.6)}
    save_file(tensors, tmp_path / "whole.safetensors")
    whole, short = parts_of(tmp_path / "whole.safetensors"), parts_of(folder)
    assert whole.text_encoders["text_encoder"].config.num_hidden_layers == 23
    assert_equal(states(whole), states(short))
    assert not any("left aside" in note for note in whole.notes)
    converted = convert_open_clip_checkpoint(short.text_encoders["text_encoder"], tensors)
    assert len(converted) == len(short.text_encoders["text_encoder"].state_dict())


def averages(tensors):
    """The moving average that Stability's programs keep beside the denoiser, here twice its weights."""
    names = [key for key in tensors if key.startswith(UNET)]
    kept = {"model_ema." + key.removeprefix("model.").replace(".", ""): 2 * tensors[key] for key in names}
    return kept | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def test_averaged_weights_beside_the_plain_ones_are_left_aside_and_mentioned(edited, pairs):
    parts = parts_of(edited("sd1", lambda tensors: tensors | averages(tensors)))
    assert_equal(states(parts), states(references["sd1"]))
    assert [note for note in parts.notes if "EMA" in note] == [
        "m.safetensors holds averaged (EMA) weights too; they are left aside"
    ]
    assert not any("nothing is known" in note for note in parts.notes)


@pytest.mark.parametrize("name", NAMES)
def test_averaged_weights_are_used_if_there_are_no_others(edited, pairs, name):
    def only(tensors):
        return {k: t for k, t in tensors.items() if not k.startswith(UNET)} | averages(tensors)

    file = edited(name, only)
    assert identify(file).name == name
    parts, plain = parts_of(file), references[name]
    assert_equal({"": parts.denoiser.state_dict()}, {"": {k: 2 * t for k, t in plain.denoiser.state_dict().items()}})
    assert any("only; they are used" in note for note in parts.notes)


def test_keys_of_the_training_program_are_passed_over_and_unknown_ones_are_named(edited, pairs):
    useless = [
        "betas",
        "alphas_cumprod_prev",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "logvar",
        "scale_factor",
        "denoiser.sigmas",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.logit_scale",
        "first_stage_model.loss.discriminator.main.0.weight",
        "first_stage_model.loss.logvar",
    ]
    parts = parts_of(edited("sd1", lambda tensors: tensors | {key: torch.ones(1) for key in useless}))
    assert not any("left aside" in note for note in parts.notes)
    assert_equal(states(parts), states(references["sd1"]))
    strange = {"zebra.weight": torch.ones(1), f"{UNET}input_blocks.1.7.\x1b[31mweight": torch.ones(1)}
    notes = parts_of(edited("sd1", lambda tensors: tensors | strange)).notes
    assert any("has 2 keys that nothing is known of" in note and r"\x1b[31m" in note for note in notes)


def test_assumptions_about_unusual_widths_are_mentioned(pairs):
    assert any("unusual width" in note for note in parts_of(pairs["sd1"][1]).notes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", [False, True])
def test_v_prediction_and_zero_snr_are_told_again(tmp_path, name, zero):
    folder = make_tiny(tmp_path / name, name, prediction_type="v_prediction", rescale_betas_zero_snr=zero)
    save_single(folder, tmp_path / "v.safetensors")
    ours, theirs = parts_of(tmp_path / "v.safetensors"), parts_of(folder)
    assert ours.schedule.prediction == "v_prediction"
    assert torch.equal(ours.schedule.alphas_cumprod, theirs.schedule.alphas_cumprod)
    assert ours.scheduler_config.get("timestep_spacing") == ("trailing" if zero else None)
    container = open_container(tmp_path / "v.safetensors")
    assert [("v_pred" in container.entries), ("ztsnr" in container.entries)] == [True, zero]
    assert container.metadata["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize(
    ("name", "edit", "metadata", "expected", "sign"),
    [
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, "v_prediction", "metadata"),
        ("sdxl", {"v_pred": 0}, {"modelspec.prediction_type": "epsilon"}, "v_prediction", "key v_pred"),
        ("sdxl", {"ztsnr": 0}, {"modelspec.prediction_type": "nonsense"}, "epsilon", "pure noise"),
        ("sd2", {"spread": 1}, {"modelspec.prediction_type": ""}, "v_prediction", "spread of one of its biases"),
        ("sd2", {"spread": 0}, {"modelspec.prediction_type": ""}, "epsilon", None),
        ("sd2", {"spread": 1}, {"modelspec.prediction_type": "epsilon"}, "epsilon", None),
        ("sd1", {"spread": 1}, {"modelspec.prediction_type": ""}, "epsilon", None),
    ],
)
def test_the_prediction_type_is_told_by_the_surest_sign(edited, name, edit, metadata, expected, sign):
    def change(tensors):
        for key, value in edit.items():
            if key == "spread":
                bias = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
                tensors[bias] = torch.linspace(-1, 1, len(tensors[bias])) * (0.17 if value else 0.1)
            else:
                tensors[key] = torch.tensor([])

    parts = parts_of(edited(name, change, **metadata))
    assert parts.schedule.prediction == expected
    told = [note for note in parts.notes if "told by" in note]
    assert len(told) == (sign is not None) and all(sign in note for note in told)


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("sd1", {"modelspec.resolution": "768x768"}, 768),
        ("sd1", {"modelspec.resolution": "1024x768"}, 512),
        ("sd1", {"modelspec.resolution": "99999999x99999999"}, 512),
        ("sd2", {"modelspec.resolution": "", "modelspec.prediction_type": "v"}, 768),
        ("sd2", {"modelspec.resolution": "?", "modelspec.prediction_type": "epsilon"}, 512),
        ("sdxl", {"modelspec.resolution": "123x123"}, 1024),
    ],
)
def test_the_resolution_is_the_metadatas_or_the_familys(edited, name, metadata, expected):
    file = edited(name, **metadata)
    assert native_resolution(file) == expected
    assert parts_of(file).denoiser.config.sample_size == expected // 8


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sd1", f"{UNET}output_blocks.5.2.conv.weight"),
        ("sd1", f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias"),
        ("sdxl", "conditioner.embedders.1.model.text_projection"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"),
        ("sdxl", f"{VAE}decoder.mid.attn_1.q.weight"),
    ],
)
def test_a_missing_weight_is_named(edited, name, key):
    file = edited(name, lambda tensors: {k: t for k, t in tensors.items() if k != key})
    with pytest.raises(ModelError, match="incomplete") as caught:
        parts_of(file)
    assert key.replace("text_model.", "") in str(caught.value).replace("text_model.", "")


@pytest.mark.parametrize(
    ("key", "tensor", "match"),
    [
        (f"{UNET}input_blocks.1.0.in_layers.2.weight", torch.ones(8, 9, 3, 3), r"in_layers\.2\.weight is \(8, 9, 3, 3\)"),
        (f"{UNET}input_blocks.1.0.out_layers.3.weight", torch.ones(0, 8, 3, 3), r"out_layers\.3\.weight has the shape"),
        (f"{UNET}input_blocks.0.0.weight", torch.ones(8), r"input_blocks\.0\.0\.weight has the shape \[8\]"),
        (f"{UNET}input_blocks.0.0.bias", torch.ones(8, dtype=torch.int8), r"as torch\.int8"),
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", torch.ones(2048, 12), "2048 tokens"),
        (f"{UNET}input_blocks.4.0.out_layers.3.weight", torch.ones(7, 16, 3, 3), "do not go together|is damaged"),
    ],
)
def test_weights_that_fit_nowhere_are_refused(edited, key, tensor, match):
    with pytest.raises(ModelError, match=match):
        parts_of(edited("sd1", lambda tensors: tensors | {key: tensor}))


def ones(*shape):
    return torch.ones(shape)


CONTEXT = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "inpainting": ("sd1", {f"{UNET}input_blocks.0.0.weight": ones(8, 9, 3, 3)}, "an inpainting model"),
    "XL inpainting": ("sdxl", {f"{UNET}input_blocks.0.0.weight": ones(8, 9, 3, 3)}, "an inpainting model"),
    "pix2pix": ("sd1", {f"{UNET}input_blocks.0.0.weight": ones(8, 8, 3, 3)}, "pix2pix"),
    "depth": ("sd2", {f"{UNET}input_blocks.0.0.weight": ones(8, 5, 3, 3)}, "a depth model"),
    "unCLIP": ("sd2", {f"{UNET}label_emb.0.0.weight": ones(8, 8)}, "unCLIP"),
    "Playground": ("sdxl", {"edm_mean": ones(1)}, r"Playground v2\.5"),
    "CosXL": ("sdxl", {"edm_vpred.sigma_max": ones(1)}, "CosXL"),
    "video": ("sd2", {f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight": ones(1)}, "Stable Video Diffusion"),
    "scaled fp8": ("sdxl", {f"{UNET}out.2.scale_weight": ones(1)}, "quantised"),
}


@pytest.mark.parametrize(("name", "changes", "match"), OTHERS.values(), ids=OTHERS)
def test_what_is_made_for_another_purpose_is_refused_by_name(edited, name, changes, match):
    with pytest.raises(ModelError, match=match):
        identify_file(edited(name, lambda tensors: tensors | changes))


def test_the_refiner_and_cut_down_models_are_told_from_the_base(edited, tmp_path):
    def refiner(tensors):
        return {
            key.replace("embedders.1.model", "embedders.0.model"): t
            for key, t in tensors.items()
            if not key.startswith("conditioner.embedders.0.")
        }

    with pytest.raises(ModelError, match="refiner"):
        identify_file(edited("sdxl", refiner))

    def denoiser_of_the_refiner(tensors):
        return {k: ones(24, 1280) if k == CONTEXT else t for k, t in tensors.items() if k.startswith(UNET)}

    with pytest.raises(ModelError, match="refiner"):
        identify_file(edited("sdxl", denoiser_of_the_refiner))

    def without_middle(tensors):
        return {key: t for key, t in tensors.items() if "middle_block.1." not in key}

    with pytest.raises(ModelError, match="cut-down SDXL"):
        identify_file(edited("sdxl", without_middle))


NO_BASES = {
    "SD3": (f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", "is Stable Diffusion 3"),
    "SD3 without prefix": ("joint_blocks.0.x_block.attn.qkv.weight", "is Stable Diffusion 3"),
    "Flux": ("double_blocks.0.img_attn.qkv.weight", "is Flux"),
    "another": (f"{UNET}blocks.0.attn.weight", "diffusion model of another kind"),
    "kohya LoRA": ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "is a LoRA"),
    "PEFT LoRA": ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "is a LoRA"),
    "diffusers LoRA": ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora.up.weight", "is a LoRA"),
    "cloneofsimo LoRA": ("unet:9:up", "is a LoRA"),
    "LoHa": ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "is a LoRA"),
    "VAE": ("encoder.down.0.block.0.conv1.weight", "is a VAE"),
    "VAE with prefix": ("first_stage_model.decoder.mid.block_1.conv1.weight", "is a VAE"),
    "diffusers VAE": ("decoder.up_blocks.0.resnets.0.conv1.weight", "is a VAE"),
    "diffusers UNet": ("down_blocks.0.resnets.0.conv1.weight", r"give the whole folder, the one with model_index\.json"),
    "CLIP": ("text_model.encoder.layers.0.mlp.fc1.weight", "holds text encoders and no denoiser"),
    "OpenCLIP": ("transformer.resblocks.0.mlp.c_fc.weight", "holds text encoders and no denoiser"),
    "T5": ("encoder.block.0.layer.0.SelfAttention.k.weight", "holds text encoders and no denoiser"),
    "ControlNet": ("control_model.input_hint_block.0.weight", "is a ControlNet"),
    "embedding": ("emb_params", "textual inversion"),
    "anything": ("zebra.weight", r"none of its 1 keys is known, the first is 'zebra\.weight'"),
}


@pytest.mark.parametrize(("key", "match"), NO_BASES.values(), ids=NO_BASES)
def test_what_is_no_base_says_what_it_is(tmp_path, key, match):
    save_file({key: ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=match):
        identify(tmp_path / "other.safetensors")


def test_an_empty_header_a_cut_file_and_a_pickle_are_refused(tmp_path, pairs):
    save_file({}, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(pairs["sd1"][1].read_bytes()[:-5])
    (tmp_path / "zip.safetensors").write_bytes(b"PK\x03\x04" + bytes(60))
    for name, match in [("none", "no tensors"), ("cut", "cut off"), ("zip", "pickle")]:
        with pytest.raises(ModelError, match=match):
            identify(tmp_path / f"{name}.safetensors")


def test_a_wrong_family_is_refused_with_both_names(pairs):
    with pytest.raises(ModelError, match=r"is Stable Diffusion XL \(sdxl\), not sd1"):
        identify(pairs["sdxl"][1], "sd1")


def test_forged_headers_are_refused_never_a_crash(tmp_path, pairs):
    data = pairs["sdxl"][1].read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    random = torch.Generator().manual_seed(0)
    family, refused = FAMILIES["sdxl"], 0
    for _ in range(60):
        forged = bytearray(data)
        for place in torch.randint(8, 8 + length, (3,), generator=random).tolist():
            forged[place] = int(torch.randint(32, 127, (), generator=random))
        (tmp_path / "forged.safetensors").write_bytes(forged)
        try:
            identify_file(tmp_path / "forged.safetensors")
            load_file(tmp_path / "forged.safetensors", family, {"vae", "text_encoder", "text_encoder_2"})
        except ModelError:
            refused += 1
    assert refused > 50


def test_equal_folders_make_equal_files(pairs, tmp_path):
    folder, file = pairs["sd2"]
    save_single(folder, tmp_path / file.name)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("unet/config.json", {"attention_head_dim": 4}, "has attention_head_dim 4"),
        ("vae/config.json", {"scaling_factor": 1.5}, r"has scaling_factor 1\.5"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "has hidden_act gelu"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "has beta_schedule linear"),
    ],
)
def test_what_a_single_file_cannot_tell_is_not_written(tmp_path, part, changes, match):
    folder = make_tiny(tmp_path / "sd1", "sd1")
    config = json.loads((folder / part).read_text())
    (folder / part).write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=match):
        save_single(folder, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_in_diffusers_first_names_makes_the_same_file(pairs, tmp_path):
    folder, file = pairs["sd1"]
    old = shutil.copytree(folder, tmp_path / "old")
    weights = old / "vae" / "diffusion_pytorch_model.safetensors"
    first = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = read_tensors(weights)
    for now, then in first.items():
        tensors = {key.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): t for key, t in tensors.items()}
    save_file(tensors, weights)
    encoder = old / "text_encoder" / "model.safetensors"
    save_file(read_tensors(encoder) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, encoder)
    save_single(old, tmp_path / file.name)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
