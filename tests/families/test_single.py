"""A single file is read back as the folder that it was made from, bit by bit, without a network."""

import copy
import socket

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from families.compare import assert_equal, parts_of, states
from families.tiny import SIZE, make_tiny
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

from sdlora.container import open_container
from sdlora.errors import ModelError
from sdlora.families import FAMILIES, identify, native_resolution
from sdlora.families.save_single import save_single
from sdlora.families.single import load_file

UNET, VAE = "model.diffusion_model.", "first_stage_model."


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


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
    theirs, file = pair
    ours = parts_of(file)
    assert ours.family is theirs.family
    assert_equal(states(ours), states(theirs))
    for left, right in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(left, right)
    assert (
        (ours.resolution, ours.schedule.prediction)
        == (theirs.resolution, theirs.schedule.prediction)
        == (64, "epsilon")
    )
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
    parts, file = pair
    checkpoint = read_tensors(file)
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
def test_half_precision_files_are_read_in_fp32(pairs, references, tmp_path, dtype):
    file = tmp_path / "half.safetensors"
    save_single(pairs["sdxl"][0], file, dtype)
    assert {entry.dtype for entry in open_container(file).entries.values()} == {dtype}
    rounded = {n: {k: v.to(dtype).float() for k, v in s.items()} for n, s in states(references["sdxl"]).items()}
    assert_equal(states(parts_of(file)), rounded)


def test_a_file_without_vae_or_text_encoders_says_so_and_the_rest_is_the_same(pair, tmp_path):
    whole, file = pair
    family = whole.family
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
    whole, file = pair
    found = load_file(file, whole.family, {"text_encoder"})
    assert found.vae is None and list(found.text_encoders) == list(found.tokenizers) == ["text_encoder"]
    assert not any("left aside" in note for note in found.notes)


def test_a_denoiser_alone_under_bare_names_is_known(pair, tmp_path):
    whole, file = pair
    bare = {key.removeprefix(UNET): t for key, t in read_tensors(file).items() if key.startswith(UNET)}
    save_file(bare, tmp_path / "bare.safetensors")
    family = identify(tmp_path / "bare.safetensors")
    assert family is whole.family
    found = load_file(tmp_path / "bare.safetensors", family, set())
    assert_equal({"": found.denoiser.state_dict()}, {"": whole.denoiser.state_dict()})


def test_old_names_of_the_text_encoder_are_known(edited, references):
    def without_level(tensors):
        return {key.replace("transformer.text_model.", "transformer."): t for key, t in tensors.items()}

    assert_equal(states(parts_of(edited("sd1", without_level))), states(references["sd1"]))


def test_a_final_projection_in_hugging_faces_way_is_not_turned(edited, references):
    name = "conditioner.embedders.1.model.text_projection"

    def turn(tensors):
        tensors[f"{name}.weight"] = tensors.pop(name).T

    assert_equal(states(parts_of(edited("sdxl", turn))), states(references["sdxl"]))


@pytest.mark.parametrize(("name", "shape"), [("sd2", (24, 24, 1, 1)), ("sd1", (24, 24))])
def test_projections_may_be_convolutions_or_linear(edited, references, name, shape):
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


def test_averaged_weights_beside_the_plain_ones_are_left_aside_and_mentioned(edited, references):
    parts = parts_of(edited("sd1", lambda tensors: tensors | averages(tensors)))
    assert_equal(states(parts), states(references["sd1"]))
    assert [note for note in parts.notes if "EMA" in note] == [
        "m.safetensors holds averaged (EMA) weights too; they are left aside"
    ]
    assert not any("nothing is known" in note for note in parts.notes)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_averaged_weights_are_used_if_there_are_no_others(edited, references, name):
    def only(tensors):
        return {k: t for k, t in tensors.items() if not k.startswith(UNET)} | averages(tensors)

    file = edited(name, only)
    assert identify(file).name == name
    parts, plain = parts_of(file), references[name]
    assert_equal({"": parts.denoiser.state_dict()}, {"": {k: 2 * t for k, t in plain.denoiser.state_dict().items()}})
    assert any("only; they are used" in note for note in parts.notes)


def test_keys_of_the_training_program_are_passed_over_and_unknown_ones_are_named(edited, references):
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
        "cond_stage_model.attn_mask",
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
        (
            f"{UNET}input_blocks.1.0.in_layers.2.weight",
            torch.ones(8, 9, 3, 3),
            r"in_layers\.2\.weight is \(8, 9, 3, 3\)",
        ),
        (f"{UNET}input_blocks.1.0.out_layers.3.weight", torch.ones(0, 8, 3, 3), r"out_layers\.3\.weight has the shape"),
        (f"{UNET}input_blocks.0.0.weight", torch.ones(8), r"input_blocks\.0\.0\.weight has the shape \[8\]"),
        (f"{UNET}input_blocks.0.0.bias", torch.ones(8, dtype=torch.int8), r"as torch\.int8"),
        (
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            torch.ones(2048, 12),
            "2048 tokens",
        ),
        (f"{UNET}input_blocks.4.0.out_layers.3.weight", torch.ones(7, 16, 3, 3), "do not go together"),
    ],
)
def test_weights_that_fit_nowhere_are_refused(edited, key, tensor, match):
    with pytest.raises(ModelError, match=match):
        parts_of(edited("sd1", lambda tensors: tensors | {key: tensor}))


def test_query_key_and_value_that_are_no_thirds_are_refused(edited):
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    with pytest.raises(ModelError, match=r"in_proj_weight has the shape \[61, 20\]"):
        parts_of(edited("sd2", lambda tensors: tensors | {key: torch.ones(61, 20)}))
