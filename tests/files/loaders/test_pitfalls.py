"""Each known way to write a file that some program loses a part of has the outcome that is known of it.

Source: `kohya-format.md`, sections 3 and 5; what diffusers does is also run, in `test_real_diffusers.py`.
"""

import re

import pytest

from sdlora.families import FAMILIES
from sdlora.files.loaders import Contents

WHOLE = "loads whole"
ALL = {"a1111", "forge", "comfy", "diffusers", "invoke"}


def whole(reports) -> set[str]:
    """The programs that load everything, in its place and at its strength."""
    return {program for program, report in reports.items() if report.verdict == WHOLE}


def keys(contents, *words) -> set[str]:
    return {key for key in contents.shapes if all(word in key for word in words)}


@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
def test_a_text_encoder_named_after_transformers_5_is_lost_but_in_diffusers(architecture, modules, file_of, verdicts):
    named = {name.replace("_text_model_", "_"): shape for name, shape in modules(architecture).items()}
    contents = file_of(named)
    reports = verdicts(architecture, contents)
    assert whole(reports) == {"diffusers"}  # which hides the fault from whoever tests with it alone
    for program in ("a1111", "comfy", "invoke"):
        assert set(reports[program].left) == keys(contents, "lora_te_")
    assert reports["forge"].refusal and not reports["forge"].loads


def test_the_second_encoders_names_without_text_model_are_lost_everywhere(modules, file_of, verdicts):
    named = {n.replace("te2_text_model_", "te2_"): shape for n, shape in modules("sdxl").items()}
    contents = file_of(named)
    reports = verdicts("sdxl", contents)
    assert whole(reports) == set()
    assert all(set(report.left) == keys(contents, "lora_te2_") for report in reports.values())
    assert "none of the layers for the text_encoder_2 is there" in reports["diffusers"].refusal


@pytest.mark.parametrize(
    ("part", "reason"),
    [("", "takes the file for SD1"), ("mlp", "does not recognise the prefix of lora_te_text_model")],
    ids=["whole", "mlp"],
)
def test_sdxls_first_encoder_needs_its_number_in_a1111_and_invokeai(part, reason, modules, file_of, verdicts):
    named = {
        name.replace("lora_te1_", "lora_te_"): shape
        for name, shape in modules("sdxl").items()
        if part in name or "lora_unet" in name
    }
    contents = file_of(named)
    reports = verdicts("sdxl", contents)
    assert whole(reports) == {"forge", "comfy", "diffusers"}
    assert set(reports["a1111"].left) == keys(contents, "lora_te_")
    assert reason in reports["invoke"].refusal


def test_sd1s_encoder_may_have_a_number_but_in_invokeai(modules, file_of, verdicts):
    named = {name.replace("lora_te_", "lora_te1_"): shape for name, shape in modules("sd15").items()}
    contents = file_of(named)
    reports = verdicts("sd15", contents)
    assert whole(reports) == ALL - {"invoke"}
    assert set(reports["invoke"].left) == keys(contents, "lora_te1_")


def test_sdxls_upsampler_in_diffusers_spelling_has_no_place_in_a1111(respelled, file_of, verdicts):
    contents = file_of(respelled("sdxl_locon"))
    reports = verdicts("sdxl", contents)
    assert whole(reports) == ALL - {"a1111"}
    assert set(reports["a1111"].left) == keys(contents, "lora_unet_up_blocks_0_upsamplers_0_conv.")


@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
def test_the_original_names_of_sd1_and_sd2_are_lost_in_diffusers_and_invokeai(
    architecture, layouts, modules, file_of, verdicts
):
    originals = layouts[architecture].originals
    named = {
        f"lora_unet_{originals[path].replace('.', '_')}": shape
        for path, shape in layouts[architecture].denoiser.items()
    }
    reports = verdicts(architecture, file_of(named))
    assert whole(reports) == {"a1111", "forge", "comfy"}
    assert len(reports["diffusers"].left) == len(reports["invoke"].left) == 278 * 3
    assert reports["diffusers"].refusal


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_block_numbers_off_by_one_are_noticed_by_looking_at_every_module(
    spelling, modules, respelled, file_of, verdicts
):
    named = modules("sdxl_locon") if spelling == "original" else respelled("sdxl_locon")
    shifted = {
        re.sub(r"((?:in|out)put|down|up)_blocks_(\d+)", lambda m: f"{m[1]}_blocks_{int(m[2]) + 1}", name): shape
        for name, shape in named.items()
    }
    reports = verdicts("sdxl", file_of(shifted))
    assert whole(reports) == set()
    for report in reports.values():
        assert report.consumed > 0 and report.left  # some of it matches, which is why it is not seen at once
    assert reports["comfy"].misfits and reports["a1111"].misfits


@pytest.mark.parametrize(("architecture", "lost"), [("sd15", False), ("sd21", True), ("sdxl", True)])
def test_a1111_needs_all_four_projections_of_openclips_attention(architecture, lost, modules, file_of, verdicts):
    encoder = "lora_te2" if architecture == "sdxl" else "lora_te"
    layer = f"{encoder}_text_model_encoder_layers_3_"
    named = modules(architecture)
    del named[f"{layer}self_attn_out_proj"]
    contents = file_of(named)
    reports = verdicts(architecture, contents)
    assert whole(reports) == (ALL - {"a1111"} if lost else ALL)
    assert set(reports["a1111"].left) == (keys(contents, f"{layer}self_attn_") if lost else set())
    if lost:
        assert len(reports["a1111"].left) == 9
        assert "q_proj, k_proj, v_proj and out_proj" in reports["a1111"].notes[0]


def test_an_openclip_encoder_without_any_attention_is_fine(modules, file_of, verdicts):
    named = {name: shape for name, shape in modules("sd21").items() if "self_attn" not in name}
    assert whole(verdicts("sd21", file_of(named))) == ALL


def reshaped(contents, name, down, up):
    shapes = {**contents.shapes, f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return Contents(shapes, contents.metadata, contents.alphas)


def test_a_convolution_with_swapped_axes_fits_nowhere(modules, file_of, verdicts):
    name = "lora_unet_down_blocks_1_resnets_0_conv1"
    contents = reshaped(file_of(modules("sd15_locon")), name, (320, 4, 3, 3), (4, 640, 1, 1))
    reports = verdicts("sd15", contents)
    assert whole(reports) == set()
    for report in reports.values():
        assert len(report.misfits) == 1 and report.misfits[0].startswith(f"{name}: down [320, 4, 3, 3]")
    stopped = {program for program, report in reports.items() if report.refusal}
    assert stopped == {"diffusers", "invoke"}
    assert any("Networks with errors" in note for note in reports["a1111"].notes)
    assert any("draws without it" in note for note in reports["comfy"].notes)


def test_a_kernel_of_another_size_stops_a1111s_loading(modules, file_of, verdicts):
    name = "lora_unet_down_blocks_1_resnets_0_conv1"
    contents = reshaped(file_of(modules("sd15_locon")), name, (4, 320, 5, 5), (640, 4, 1, 1))
    assert "kernels of " + name in verdicts("sd15", contents)["a1111"].refusal


def test_a_kernel_turned_on_its_side_is_seen_by_nobody(modules, file_of, verdicts):
    """Only comparing with the live model can tell; `sdlora.files.certify` does."""
    contents = file_of(modules("sd15_locon"))
    assert whole(verdicts("sd15", contents)) == ALL


def test_sd2s_projections_as_convolutions_fit_everywhere_but_in_diffusers(modules, file_of, verdicts):
    named = {n: (*s, 1, 1) if n.endswith(("proj_in", "proj_out")) else s for n, s in modules("sd21").items()}
    reports = verdicts("sd21", file_of(named))
    assert whole(reports) == ALL - {"diffusers"}
    assert len(reports["diffusers"].misfits) == 32
    assert "size mismatch" in reports["diffusers"].refusal and not reports["diffusers"].loads


def test_sd1s_projections_as_matrices_fit_everywhere_but_in_diffusers(modules, file_of, verdicts):
    named = {name: shape[:2] for name, shape in modules("sd15").items()}
    reports = verdicts("sd15", file_of(named))
    assert whole(reports) == ALL - {"diffusers"}
    assert len(reports["diffusers"].misfits) == 32


def test_the_second_encoders_text_projection_has_no_place_in_a1111(modules, file_of, verdicts):
    contents = file_of({**modules("sdxl"), "lora_te2_text_projection": (1280, 1280)})
    reports = verdicts("sdxl", contents)
    assert whole(reports) == ALL - {"a1111"}
    assert set(reports["a1111"].left) == keys(contents, "text_projection")


def test_a_tensor_that_belongs_to_no_module_is_refused_by_two(modules, file_of, verdicts):
    contents = file_of(modules("sd15"))
    stray = "lora_te_text_model_embeddings.position_ids"
    reports = verdicts("sd15", Contents({**contents.shapes, stray: (1, 77)}, contents.metadata, contents.alphas))
    assert {p for p, report in reports.items() if stray in report.left} == ALL
    assert {p for p, report in reports.items() if report.refusal} == {"diffusers", "invoke"}
    assert "not loaded" in reports["comfy"].notes[0]


def test_two_spellings_in_one_file_are_dropped_by_diffusers_and_refused_by_invokeai(
    modules, respelled, file_of, verdicts
):
    attention = {name: shape for name, shape in modules("sdxl").items() if "_attn1_" in name}
    rest = {name: shape for name, shape in respelled("sdxl").items() if "_attn1_" not in name}
    contents = file_of({**attention, **rest})
    reports = verdicts("sdxl", contents)
    assert whole(reports) == {"a1111", "forge", "comfy"}
    assert set(reports["diffusers"].left) == keys(contents, "_attn1_")
    assert reports["diffusers"].refusal is None  # silently
    assert "both spellings" in reports["invoke"].refusal


@pytest.mark.parametrize(("count", "refused"), [(12, False), (13, True)])
def test_forge_refuses_more_than_twelve_strange_keys(count, refused, modules, file_of, verdicts):
    contents = file_of(modules("sd15"))
    shapes = {**contents.shapes, **{f"lora_unet_extra_{i}.lora_up.weight": (4, 4) for i in range(count)}}
    report = verdicts("sd15", Contents(shapes, contents.metadata, contents.alphas))["forge"]
    assert len(report.left) == count
    assert (report.refusal is not None) == refused
    assert report.loads != refused


def test_pefts_factors_under_kohyas_names(modules, file_of, verdicts):
    contents = file_of(modules("sd15"))
    shapes = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): s for k, s in contents.shapes.items()}
    reports = verdicts("sd15", Contents(shapes, contents.metadata, contents.alphas))
    assert whole(reports) == {"forge", "comfy"}
    assert len(reports["a1111"].left) == 264 and reports["a1111"].left[0].endswith(".alpha")
    assert "drops alpha of 264 modules" in reports["a1111"].notes[0]
    assert reports["diffusers"].refusal and reports["invoke"].refusal


def test_pefts_own_files_are_read_by_diffusers_alone(layouts, verdicts):
    shapes = {}
    for component, prefix in (("denoiser", "unet."), ("text_encoder", "text_encoder.text_model.")):
        for path, shape in layouts["sd15"].components[component].items():
            shapes[f"{prefix}{path}.lora_A.weight"] = (4, *shape[1:])
            shapes[f"{prefix}{path}.lora_B.weight"] = (shape[0], 4, *[1 for _ in shape[2:]])
    reports = verdicts("sd15", Contents(shapes, {}, {}))
    assert whole(reports) == {"diffusers"}
    assert reports["a1111"].consumed == 0 and not reports["a1111"].loads
    assert {key for key in reports["comfy"].left if ".to_" not in key} == set()  # it wants `processor.to_q`
    assert len(reports["comfy"].left) == 2 * 128
    assert reports["invoke"].refusal


def test_a_module_without_alpha_is_no_loss(modules, file_of, verdicts):
    contents = file_of(modules("sdxl"))
    shapes = {key: shape for key, shape in contents.shapes.items() if not key.endswith(".alpha")}
    assert whole(verdicts("sdxl", Contents(shapes, contents.metadata, {}))) == ALL


@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight"])
def test_half_a_module_is_loaded_whole_by_none(part, modules, file_of, verdicts):
    contents = file_of(modules("sd15"))
    gone = f"lora_unet_mid_block_attentions_0_proj_in.{part}"
    shapes = {key: shape for key, shape in contents.shapes.items() if key != gone}
    assert whole(verdicts("sd15", Contents(shapes, contents.metadata, contents.alphas))) == set()


@pytest.mark.parametrize(
    ("architecture", "where", "misscaled"),
    [
        ("sd15", "_attn1_to_q", 16),
        ("sd15", "_ff_net_2", 0),
        ("sd15", "_mlp_fc1", 12),
        ("sd15", "_self_attn_q_proj", 12),
        ("sdxl", "lora_te1_text_model_encoder_layers_0_mlp", 2),
        ("sdxl", "lora_te2_text_model_encoder_layers_0_mlp", 0),
        ("sdxl", "lora_te2_text_model_encoder_layers_0_self_attn", 4),
    ],
)
def test_diffusers_gives_some_modules_the_alpha_that_most_have(
    architecture, where, misscaled, modules, file_of, verdicts
):
    contents = file_of(modules(architecture))
    alphas = {key: 1.0 if where in key else value for key, value in contents.alphas.items()}
    reports = verdicts(architecture, Contents(contents.shapes, contents.metadata, alphas))
    assert whole(reports) == (ALL - {"diffusers"} if misscaled else ALL)
    assert len(reports["diffusers"].misscaled) == misscaled
    if misscaled:
        assert reports["diffusers"].misscaled[0].endswith(": alpha 1, applied as 4")
        assert any("at another strength" in loss for loss in reports["diffusers"].losses())


@pytest.mark.parametrize(
    ("architecture", "metadata", "a1111", "forge", "notes"),
    [
        ("sd15", {"format": "pt"}, "SD1", "Unknown", {"forge"}),
        ("sd15", {}, "Unknown", "Unknown", {"a1111", "forge"}),
        ("sdxl", {"ss_network_dim": "4"}, "SD1", "Unknown", {"a1111", "forge"}),
        ("sdxl", {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SD1", "SDXL", {"a1111"}),
        ("sd21", {"ss_v2": "True"}, "SD2", "SD2", set()),
        ("sd21", {"ss_v2": "False"}, "SD1", "Unknown", {"a1111", "forge"}),
    ],
)
def test_metadata_decides_where_a_file_is_shown(
    architecture, metadata, a1111, forge, notes, modules, file_of, verdicts
):
    contents = file_of(modules(architecture))
    reports = verdicts(architecture, Contents(contents.shapes, metadata, contents.alphas))
    assert (reports["a1111"].kind, reports["forge"].kind) == (a1111, forge)
    assert {program for program, report in reports.items() if report.notes} == notes
    assert whole(reports) == ALL  # it still works when it is called by name


def test_a_file_that_invokeai_cannot_class_is_not_imported(modules, file_of, verdicts):
    """An SDXL file of shallow self attention looks like any other; its deep blocks or its text width would tell."""
    shallow = {n: s for n, s in modules("sdxl").items() if "input_blocks_4_1" in n and "_attn1_" in n}
    reports = verdicts("sdxl", file_of(shallow))
    assert whole(reports) == ALL - {"invoke"}
    assert "cannot tell what the file is for" in reports["invoke"].refusal


def test_our_own_metadata_is_classed_rightly_everywhere(modules, file_of, verdicts):
    for architecture, family in (("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl")):
        for metadata in (FAMILIES[family].metadata, {**FAMILIES[family].metadata, **FAMILIES[family].v_metadata}):
            reports = verdicts(architecture, file_of(modules(architecture), metadata))
            assert not any(report.notes for report in reports.values())
