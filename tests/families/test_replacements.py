"""A VAE and text encoders from elsewhere load bit by bit, from every form that people have, or are refused by name."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from families.tiny import make_tiny
from safetensors.torch import load_file, save_file

from sdlora.errors import ModelError
from sdlora.families import FAMILIES, Base, load_parts
from sdlora.families.components import load_text_encoders, load_vae_folder
from sdlora.families.latent_spaces import LATENT_SPACES, require_latents
from sdlora.families.layout import VAE
from sdlora.families.names import OLD_VAE_ATTENTION
from sdlora.families.replacements import replace_text_encoders, replace_vae
from sdlora.families.save_single import save_single

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def tiny(request):
    """A family, and a base of it."""
    return FAMILIES[request.param], request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def single(tmp_path):
    """The tensors of a base as a single file: single(base)."""

    def save(base):
        save_single(base, tmp_path / "single.safetensors")
        return load_file(tmp_path / "single.safetensors")

    return save


@pytest.fixture
def write(tmp_path):
    """Writes tensors and returns the path as the user would give it."""

    def to_file(tensors):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "given.safetensors")
        return str(tmp_path / "given.safetensors")

    return to_file


@pytest.fixture
def vae_copy(tiny_sd1, tmp_path):
    return shutil.copytree(tiny_sd1 / "vae", tmp_path / "my-vae")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def vae_of(tensors, prefix=""):
    return {prefix + key.removeprefix(VAE): tensor for key, tensor in tensors.items() if key.startswith(VAE)}


def assert_equal(module, expected):
    assert module.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in module.state_dict().items())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in module.parameters())


@pytest.mark.parametrize("place", ["", "vae"])
def test_a_vae_folder_is_the_folder_or_in_it(tiny, place, tmp_path):
    family, base = tiny
    shutil.copytree(base / "vae", tmp_path / "somewhere" / place)
    vae = replace_vae(str(tmp_path / "somewhere"), family)
    assert_equal(vae, load_vae_folder(base))
    assert vae.config.scaling_factor == family.vae_config["scaling_factor"]


@pytest.mark.parametrize("prefix", ["", VAE])
def test_a_vae_file_in_the_original_names_loads_bit_by_bit(tiny, prefix, single, write):
    family, base = tiny
    vae = replace_vae(write(vae_of(single(base), prefix)), family)
    assert_equal(vae, load_vae_folder(base))
    assert vae.config.scaling_factor == family.vae_config["scaling_factor"]
    assert vae.config.block_out_channels == (4, 8, 8, 8)


@pytest.mark.parametrize("dated", [False, True])
def test_a_vae_file_in_diffusers_names_loads_bit_by_bit(tiny, dated, write):
    family, base = tiny
    tensors = load_file(base / "vae" / WEIGHTS)
    for old, new in OLD_VAE_ATTENTION.items() if dated else ():
        tensors = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in tensors.items()}
    assert_equal(replace_vae(write(tensors), family), load_vae_folder(base))


def test_the_vae_of_a_whole_checkpoint_is_taken(tiny, tmp_path):
    family, base = tiny
    save_single(base, tmp_path / "checkpoint.safetensors")
    assert_equal(replace_vae(str(tmp_path / "checkpoint.safetensors"), family), load_vae_folder(base))


def test_half_precision_and_leftovers_of_training_do_not_matter(tiny_sd1, single, write):
    tensors = {key: tensor.half() for key, tensor in vae_of(single(tiny_sd1)).items()}
    extra = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(()), "loss.discriminator.w": torch.ones(2)}
    vae = replace_vae(write(tensors | extra), FAMILIES["sd1"])
    assert torch.equal(vae.quant_conv.weight, tensors["quant_conv.weight"].float())


def test_a_replaced_vae_takes_the_bases_place(tiny_sd1, vae_copy):
    tensors = load_file(vae_copy / WEIGHTS)
    save_file({key: 2 * tensor for key, tensor in tensors.items()}, vae_copy / WEIGHTS, {"format": "pt"})
    parts = load_parts(Base("x", tiny_sd1, ""), vae=str(vae_copy))
    assert torch.equal(parts.vae.quant_conv.weight, 2 * tensors["quant_conv.weight"])
    assert not any(p.requires_grad for p in parts.vae.parameters())


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_taesd_keeps_a_picture_in_every_family(request, name):
    parts = load_parts(Base("x", request.getfixturevalue(f"tiny_{name}"), ""), vae="taesd")
    ramp = torch.linspace(-1, 1, 128)
    picture = torch.stack([ramp.expand(128, 128), ramp.expand(128, 128).T, torch.zeros(128, 128)])[None]
    with torch.no_grad():
        mean, std = parts.family.encode_images(parts, picture)
        back = parts.family.decode_latents(parts, mean)
    assert (back - picture).square().mean().sqrt() < 0.15
    assert mean.shape == (1, 4, 16, 16)
    assert std is None
    assert 0.5 < mean.std() < 2  # scaled latents


def test_the_two_taesd_are_not_the_same():
    one, other = (space.load() for space in LATENT_SPACES.values())
    assert not torch.equal(one.decoder.layers[0].weight, other.decoder.layers[0].weight)


@pytest.mark.parametrize(("base", "given"), [("sd1", "sdxl"), ("sdxl", "sd1"), ("sdxl", "sd2")])
def test_the_folder_of_another_familys_vae_is_refused_by_both_names(request, base, given):
    folder = request.getfixturevalue(f"tiny_{given}")
    titles = {"sd1": "Stable Diffusion 1.x and 2.x", "sd2": "Stable Diffusion 1.x and 2.x", "sdxl": "Diffusion XL"}
    factors = {"sd1": "0.18215", "sd2": "0.18215", "sdxl": "0.13025"}
    with pytest.raises(ModelError) as caught:
        replace_vae(str(folder / "vae"), FAMILIES[base])
    assert all(table[name] in str(caught.value) for table in (titles, factors) for name in (base, given))


def test_a_folder_from_before_scaling_factors_were_named_is_stable_diffusion_1(vae_copy):
    config = json.loads((vae_copy / "config.json").read_text())
    del config["scaling_factor"]
    (vae_copy / "config.json").write_text(json.dumps(config))
    assert replace_vae(str(vae_copy), FAMILIES["sd2"]).config.scaling_factor == 0.18215
    with pytest.raises(ModelError, match=r"0\.18215, that of Stable Diffusion 1\.x"):
        replace_vae(str(vae_copy), FAMILIES["sdxl"])


def test_a_scaling_factor_of_nobody_is_refused(vae_copy, tmp_path):
    edit(vae_copy / "config.json", scaling_factor=0.5)
    with pytest.raises(ModelError, match=r"scaling factor 0\.5; the base .* needs 0\.18215"):
        replace_vae(str(vae_copy), FAMILIES["sd1"])
    tiny = shutil.copytree(LATENT_SPACES[0.18215].folder, tmp_path / "tiny")
    edit(tiny / "config.json", scaling_factor=0.18215)
    with pytest.raises(ModelError, match=r"needs 1\.0"):
        replace_vae(str(tiny), FAMILIES["sd1"])


@pytest.mark.parametrize(("base", "given"), [("sd1", "sdxl"), ("sdxl", "sd1"), ("sdxl", "sd2")])
def test_the_checkpoint_of_another_family_is_refused_by_both_names(request, tmp_path, base, given):
    save_single(request.getfixturevalue(f"tiny_{given}"), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"{FAMILIES[given].title}, whose VAE .* {FAMILIES[base].title}"):
        replace_vae(str(tmp_path / "x.safetensors"), FAMILIES[base])


@pytest.mark.parametrize(("base", "given"), [("sd1", 0.13025), ("sdxl", 0.18215)])
def test_another_familys_taesd_is_told_by_what_it_makes_of_a_picture(tmp_path, base, given):
    with pytest.raises(ModelError, match=f"is that of {LATENT_SPACES[given].title}, as its latents show"):
        replace_vae(str(LATENT_SPACES[given].folder), FAMILIES[base])
    LATENT_SPACES[FAMILIES[base].vae_config["scaling_factor"]].load().save_pretrained(tmp_path)
    assert_equal(replace_vae(str(tmp_path), FAMILIES[base]), replace_vae("taesd", FAMILIES[base]))


@pytest.mark.parametrize("space", LATENT_SPACES)
def test_another_familys_autoencoder_is_told_by_what_it_makes_of_a_picture(tmp_path, space):
    """Its latents are unscaled; here TAESD's are, which learned them."""
    taesd = LATENT_SPACES[space].load()
    posterior = lambda pixels: SimpleNamespace(mean=taesd.encode(pixels).latents / space)  # noqa: E731
    vae = SimpleNamespace(encode=lambda pixels: SimpleNamespace(latent_dist=posterior(pixels)))
    require_latents(tmp_path, vae, space)
    (other,) = LATENT_SPACES.keys() - {space}
    with pytest.raises(ModelError, match=f"that of {LATENT_SPACES[space].title}.*base is {LATENT_SPACES[other].title}"):
        require_latents(tmp_path, vae, other)


def test_sixteen_channels_are_refused(vae_copy, tiny_sd1, single, write):
    tensors = vae_of(single(tiny_sd1))
    tensors["decoder.conv_in.weight"] = torch.zeros(8, 16, 3, 3)
    with pytest.raises(ModelError, match="16 latent channels as in Stable Diffusion 3 and Flux"):
        replace_vae(write(tensors), FAMILIES["sd1"])
    edit(vae_copy / "config.json", latent_channels=16)
    with pytest.raises(ModelError, match="16 latent channels"):
        replace_vae(str(vae_copy), FAMILIES["sd1"])


def test_a_vae_that_shrinks_otherwise_is_refused(tmp_path):
    from diffusers import AutoencoderKL

    config = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, **config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="shrinks pictures 2 times"):
        replace_vae(str(tmp_path), FAMILIES["sd1"])


def test_what_is_no_vae_is_named(tmp_path, tiny_sd1, single, write):
    tensors = vae_of(single(tiny_sd1))
    with pytest.raises(ModelError, match="no VAE 'nonsense'"):
        replace_vae("nonsense", FAMILIES["sd1"])
    with pytest.raises(ModelError, match=r"neither config\.json nor vae/config\.json"):
        replace_vae(str(tmp_path), FAMILIES["sd1"])
    with pytest.raises(ModelError, match="holds no VAE"):
        replace_vae(write({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}), FAMILIES["sd1"])
    with pytest.raises(ModelError, match="--vae taesd"):
        replace_vae(write(load_file(LATENT_SPACES[0.18215].folder / WEIGHTS)), FAMILIES["sd1"])
    with pytest.raises(ModelError, match=r"1 keys that are not known, e\.g\. 'encoder\.extra\.weight'"):
        replace_vae(write(tensors | {"encoder.extra.weight": torch.ones(1)}), FAMILIES["sd1"])
    del tensors["encoder.mid.block_1.conv1.bias"]
    with pytest.raises(ModelError, match=r"incomplete: it has no encoder\.mid\.block_1\.conv1\.bias"):
        replace_vae(write(tensors), FAMILIES["sd1"])
    decoder = {key: tensor for key, tensor in tensors.items() if not key.startswith("encoder.")}
    with pytest.raises(ModelError, match="decoder of a VAE only"):
        replace_vae(write(decoder), FAMILIES["sd1"])


def test_a_pickled_vae_is_not_opened(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.vae.pt")
    with pytest.raises(ModelError, match="can run code"):
        replace_vae(str(tmp_path / "x.vae.pt"), FAMILIES["sd1"])


def test_text_encoders_of_a_folder_load_bit_by_bit(tiny):
    family, base = tiny
    encoders, tokenizers = replace_text_encoders(str(base), family)
    expected = load_text_encoders(base, family, [spec.component for spec in family.text_encoders])
    assert encoders.keys() == tokenizers.keys() == expected.keys()
    for name, (encoder, tokenizer) in expected.items():
        assert_equal(encoders[name], encoder)
        assert tokenizers[name]("a castle").input_ids == tokenizer("a castle").input_ids


@pytest.mark.parametrize("alone", [False, True])
def test_text_encoders_of_a_file_load_bit_by_bit(tiny, alone, single, write):
    family, base = tiny
    tensors = single(base)
    if alone:
        prefixes = tuple(spec.original for spec in family.text_encoders)
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(prefixes)}
    encoders, tokenizers = replace_text_encoders(write(tensors), family)
    expected = load_text_encoders(base, family, [spec.component for spec in family.text_encoders])
    assert encoders.keys() == tokenizers.keys() == expected.keys()
    for name, (encoder, tokenizer) in expected.items():
        assert_equal(encoders[name], encoder)
        options = {"padding": "max_length", "max_length": 77}
        assert tokenizers[name]("a castle", **options).input_ids == tokenizer("a castle", **options).input_ids


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_the_only_text_encoder_of_a_family_needs_no_prefix(request, name, single, write):
    base, family = request.getfixturevalue(f"tiny_{name}"), FAMILIES[name]
    prefix = family.text_encoders[0].original
    tensors = {k.removeprefix(prefix): t for k, t in single(base).items() if k.startswith(prefix)}
    encoders, _ = replace_text_encoders(write(tensors), family)
    expected = load_text_encoders(base, family, ["text_encoder"])
    assert_equal(encoders["text_encoder"], expected["text_encoder"][0])


def test_replaced_text_encoders_take_the_bases_place(tiny_sdxl, tmp_path):
    copy = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    file = copy / "text_encoder_2" / "model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    parts = load_parts(Base("x", tiny_sdxl, ""), text_encoders=str(copy))
    assert_equal(parts.text_encoders["text_encoder_2"], load_parts(Base("x", copy, "")).text_encoders["text_encoder_2"])


@pytest.mark.parametrize(("base", "given"), [("sd1", "sd2"), ("sd1", "sdxl"), ("sdxl", "sd1"), ("sd2", "sd1")])
def test_text_encoders_of_another_family_are_refused_by_name(request, base, given, single, write):
    folder = request.getfixturevalue(f"tiny_{given}")
    with pytest.raises(ModelError, match=f"{FAMILIES[given].title}, whose text encoders .* {FAMILIES[base].title}"):
        replace_text_encoders(str(folder), FAMILIES[base])
    with pytest.raises(ModelError, match=f"no text encoder .*holds those of {FAMILIES[given].title}"):
        replace_text_encoders(write(single(folder)), FAMILIES[base])


def test_missing_text_encoders_are_named(tiny_sdxl, tmp_path, single, write):
    with pytest.raises(ModelError, match="no text encoders 'nonsense'"):
        replace_text_encoders("nonsense", FAMILIES["sdxl"])
    copy = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(ModelError, match="no text_encoder_2/ folder"):
        replace_text_encoders(str(copy), FAMILIES["sdxl"])
    second = FAMILIES["sdxl"].text_encoders[1].original
    tensors = {key: tensor for key, tensor in single(tiny_sdxl).items() if not key.startswith(second)}
    with pytest.raises(ModelError, match=r"given\.safetensors holds no text encoder 2 of Stable Diffusion XL$"):
        replace_text_encoders(write(tensors), FAMILIES["sdxl"])


def test_text_encoders_from_elsewhere_tell_how_wide_the_pooled_text_is(tmp_path):
    changes = {"cross_attention_dim": 36, "projection_class_embeddings_input_dim": 72}
    folder = make_tiny(tmp_path / "odd", "sdxl", widths=(12, 24), unet=changes)
    file, bare = tmp_path / "odd.safetensors", tmp_path / "bare.safetensors"
    save_single(folder, file)
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if key.startswith("model.")}, bare)
    parts = load_parts(Base("bare", bare, "test"), vae=str(folder), text_encoders=str(folder))
    assert parts.denoiser.config.addition_time_embed_dim == 8
    with torch.no_grad():
        conditioning = parts.family.encode_prompts(parts, ["a cat"])
        assert parts.family.denoise(parts, torch.zeros(1, 4, 8, 8), torch.tensor([1]), conditioning).isfinite().all()


def test_a_pooled_text_of_another_width_is_refused(tiny_sdxl, tmp_path):
    # The states are as wide together, 12 and 20, but not the pooled text.
    other = make_tiny(tmp_path / "other", "sdxl", widths=(12, 20), projection=28)
    with pytest.raises(ModelError, match="a pooled text of 28 numbers and its denoiser takes 20"):
        load_parts(Base("tiny", tiny_sdxl, "test"), text_encoders=str(other))
