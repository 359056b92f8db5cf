"""Our rules for diffusers and the installed library come to the same result, on whole files and on broken ones."""

import copy
import functools
import re
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.families import FAMILIES
from sdlora.files.loaders import Contents
from sdlora.files.loaders.diffusers_rules import read
from sdlora.files.loaders.layout import flat, layout_of_models

COMPONENTS = {"denoiser": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}


def denoiser(**settings):
    return UNet2DConditionModel(sample_size=8, layers_per_block=2, attention_head_dim=2, norm_num_groups=4, **settings)


def encoder(cls):
    return cls(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


@functools.cache
def sd1():
    unet = denoiser(block_out_channels=(8, 16, 24, 24), cross_attention_dim=16)
    nothing = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(
        unet=unet, text_encoder=encoder(CLIPTextModel), requires_safety_checker=False, **nothing
    )


@functools.cache
def sdxl():
    unet = denoiser(
        block_out_channels=(8, 16, 24),
        cross_attention_dim=32,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    nothing = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "scheduler"))
    encoders = {"text_encoder": encoder(CLIPTextModel), "text_encoder_2": encoder(CLIPTextModelWithProjection)}
    return StableDiffusionXLPipeline(unet=unet, **encoders, **nothing)


def layout_of_pipeline(pipe, family):
    models = {component: getattr(pipe, name, None) for component, name in COMPONENTS.items()}
    return layout_of_models(FAMILIES[family], {c: model for c, model in models.items() if model is not None})


def ours(layout, spelled=True):
    """Every layer's name in a file of ours, or by diffusers' paths, and its weight's shape."""
    family, named = layout.family, {}
    for component, layers in layout.components.items():
        for path, shape in layers.items():
            if path != "text_projection":
                own = family.lora_key(component, path)
                named[own if spelled or component != "denoiser" else f"lora_unet_{flat(path)}"] = shape
    return named


def tensors(named, alpha=1.0, rank=2):
    made = {}
    for name, shape in named.items():
        made[f"{name}.lora_down.weight"] = torch.zeros(rank, *shape[1:])
        made[f"{name}.lora_up.weight"] = torch.zeros(shape[0], rank, *[1 for _ in shape[2:]])
        made[f"{name}.alpha"] = torch.tensor(alpha)
    return dict(sorted(made.items()))


def renamed(old, new):
    return lambda layout: tensors({re.sub(old, new, name): shape for name, shape in ours(layout).items()})


def chosen(pattern):
    return lambda layout: tensors({name: shape for name, shape in ours(layout).items() if re.search(pattern, name)})


def added(key):
    return lambda layout: {**tensors(ours(layout)), key: torch.zeros(2, 2)}


def stray(name):
    return lambda layout: {**tensors(ours(layout)), **tensors({name: (4, 4)})}


def without(part):
    def make(layout):
        made = tensors(ours(layout))
        del made[next(key for key in made if key.endswith(part))]
        return made

    return make


def turned(layout):
    made = tensors(ours(layout))
    name = next(key for key in made if key.endswith("resnets_0_conv1.lora_down.weight"))
    made[name] = made[name].transpose(0, 1).contiguous()
    return made


def dotted(down, up, pattern, edit=lambda path: path):
    """A file in diffusers' or peft's own manner."""

    def make(layout):
        made = {}
        for component, layers in layout.components.items():
            level = "text_model." if component != "denoiser" else ""
            for path, shape in layers.items():
                if re.search(pattern, f"{component}.{path}"):
                    stem = f"{COMPONENTS[component]}.{level}{edit(path)}"
                    made[stem + down] = torch.zeros(2, *shape[1:])
                    made[stem + up] = torch.zeros(shape[0], 2, *[1 for _ in shape[2:]])
        return made

    return make


def processors(path):
    path = re.sub(r"(attn[12])", r"\1.processor", path).removesuffix(".0")
    return re.sub(r"\.([qkv]|out)_proj$", r".to_\1", path)


def alphas(pattern, value):
    def make(layout):
        made = tensors(ours(layout))
        for key in made:
            if key.endswith(".alpha") and re.search(pattern, key):
                made[key] = torch.tensor(value)
        return made

    return make


def no_alpha(pattern):
    return lambda layout: {
        key: t for key, t in tensors(ours(layout)).items() if not (key.endswith(".alpha") and re.search(pattern, key))
    }


def mixed(layout):
    own = tensors({n: s for n, s in ours(layout, spelled=False).items() if "attn1" not in n})
    return {**own, **tensors({n: s for n, s in ours(layout).items() if "attn1" in n})}


BLOCKS = r"(?<=put_blocks_)(\d+)"
CASES = {
    "whole": (sd1, "sd1", chosen("")),
    "encoder as of transformers 5": (sd1, "sd1", renamed("te_text_model_", "te_")),
    "encoder numbered 1": (sd1, "sd1", renamed("lora_te_", "lora_te1_")),
    "encoder numbered 2": (sd1, "sd1", renamed("lora_te_", "lora_te2_")),
    "encoder numbered 3": (sd1, "sd1", renamed("lora_te_", "lora_te3_")),
    "original names": (
        sd1,
        "sd1",
        lambda layout: tensors({f"lora_unet_{flat(o)}": layout.denoiser[p] for p, o in layout.originals.items()}),
    ),
    "stray layer": (sd1, "sd1", stray("lora_unet_down_blocks_7_attentions_0_proj_in")),
    "stray text layer": (sd1, "sd1", stray("lora_te_text_model_encoder_layers_9_mlp_fc1")),
    "only stray layers": (sd1, "sd1", lambda layout: tensors({"lora_unet_nothing": (4, 4)})),
    "only stray text layers": (
        sd1,
        "sd1",
        lambda layout: tensors({"lora_te_text_model_encoder_layers_9_mlp_fc1": (4, 4)}),
    ),
    "stray tensor": (sd1, "sd1", added("lora_te_text_model_embeddings.position_ids")),
    "embedding": (sd1, "sd1", added("bundle_emb.word")),
    "LoHa": (sd1, "sd1", added("lora_unet_conv_in.hada_w1_a")),
    "DoRA": (sd1, "sd1", added("lora_unet_conv_in.dora_scale")),
    "Tucker": (sd1, "sd1", added("lora_unet_conv_in.lora_mid.weight")),
    "no up": (sd1, "sd1", without(".lora_up.weight")),
    "no down": (sd1, "sd1", without(".lora_down.weight")),
    "no alpha": (sd1, "sd1", no_alpha("")),
    "swapped axes": (sd1, "sd1", turned),
    "matrices": (
        sd1,
        "sd1",
        lambda layout: tensors({n: s[:2] if "proj_in" in n else s for n, s in ours(layout).items()}),
    ),
    "text encoder alone": (sd1, "sd1", chosen("lora_te_")),
    "MLP alone": (sd1, "sd1", chosen("mlp")),
    "queries of the text encoder alone": (sd1, "sd1", chosen("self_attn_q_proj")),
    "peft": (sd1, "sd1", dotted(".lora_A.weight", ".lora_B.weight", "")),
    "peft, fc2 alone": (sd1, "sd1", dotted(".lora_A.weight", ".lora_B.weight", "fc2")),
    "peft under kohya's names": (
        sd1,
        "sd1",
        lambda layout: {k.replace("_down", "_A").replace("_up", "_B"): t for k, t in chosen("")(layout).items()},
    ),
    "diffusers": (sd1, "sd1", dotted(".lora.down.weight", ".lora.up.weight", r"denoiser.*attn.*to_")),
    "old diffusers": (
        sd1,
        "sd1",
        dotted("_lora.down.weight", "_lora.up.weight", r"attn[12]\.to_|self_attn", processors),
    ),
    "diffusers' text encoder": (
        sd1,
        "sd1",
        dotted(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", "^text"),
    ),
    "alpha of attention": (sd1, "sd1", alphas("lora_unet.*attn1", 4.0)),
    "alpha of convolutions": (sd1, "sd1", alphas("lora_unet.*(conv|sampl)", 4.0)),
    "alpha of the MLP": (sd1, "sd1", alphas("lora_te.*mlp", 4.0)),
    "alpha here and there": (sd1, "sd1", no_alpha("attn1|mlp_fc1")),
    "SDXL": (sdxl, "sdxl", chosen("")),
    "SDXL in diffusers' names": (sdxl, "sdxl", lambda layout: tensors(ours(layout, spelled=False))),
    "SDXL, first encoder without number": (sdxl, "sdxl", renamed("lora_te1_", "lora_te_")),
    "SDXL, first encoder as of transformers 5": (sdxl, "sdxl", renamed("te1_text_model_", "te1_")),
    "SDXL, second encoder as of transformers 5": (sdxl, "sdxl", renamed("te2_text_model_", "te2_")),
    "SDXL, text projection": (
        sdxl,
        "sdxl",
        lambda layout: {**chosen("")(layout), **tensors({"lora_te2_text_projection": (16, 16)})},
    ),
    "SDXL, both spellings": (sdxl, "sdxl", mixed),
    "SDXL, off by one": (sdxl, "sdxl", renamed(BLOCKS, lambda m: str(int(m[1]) + 1))),
    "SDXL, attention off by one": (
        sdxl,
        "sdxl",
        lambda layout: {
            k: t for k, t in renamed("put_blocks_5", "put_blocks_4")(layout).items() if "input_blocks_4_1" in k
        },
    ),
    "SDXL, downsampler off by one": (sdxl, "sdxl", renamed("input_blocks_6_0_op", "input_blocks_4_0_op")),
    "SDXL, middle block 3": (sdxl, "sdxl", renamed("middle_block_2", "middle_block_3")),
    "SDXL, alpha of the second encoder's MLP": (sdxl, "sdxl", alphas("lora_te2.*mlp", 4.0)),
    "SDXL, alpha of the second encoder's queries": (sdxl, "sdxl", alphas("lora_te2.*q_proj", 4.0)),
}


def loaded(pipe):
    """Scale of every layer that got factors."""
    scales = {}
    for component, name in COMPONENTS.items():
        for path, module in getattr(pipe, name, torch.nn.Module()).named_modules():
            if isinstance(module, LoraLayer):
                (scales[component, path.removeprefix("text_model.")],) = module.scaling.values()
    return scales


@pytest.mark.parametrize(("make", "family", "file"), CASES.values(), ids=CASES)
def test_the_rules_say_what_the_library_does(make, family, file):
    pipe = copy.deepcopy(make())
    layout = layout_of_pipeline(pipe, family)
    made = file(layout)
    values = {key: tensor.item() for key, tensor in made.items() if key.endswith(".alpha")}
    report = read(layout, Contents({key: tuple(t.shape) for key, t in made.items()}, {}, values))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft, which says that alphas matched nothing
            pipe.load_lora_weights(made)
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
        assert report.refusal and not report.loads, error
        return
    assert report.refusal is None
    scales = loaded(pipe)
    full = [key for key in made if key not in report.left and not key.endswith(".alpha")]
    assert len(scales) == len(full) / 2
    assert report.loads == bool(scales)
    if set(made) <= set(tensors(ours(layout))):
        named = {layout.family.lora_key(*place): scale for place, scale in scales.items()}
        wrong = {name for name, scale in named.items() if scale != values.get(f"{name}.alpha", 2.0) / 2}
        assert wrong == {sentence.partition(":")[0] for sentence in report.misscaled}
