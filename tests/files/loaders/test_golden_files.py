"""A file in kohya's own spelling is taken whole by all five programs, for every base."""

import pytest

from sdlora.families import FAMILIES

KINDS = {"sd15": ("sd1", "SD1"), "sd21": ("sd2", "SD2"), "sdxl": ("sdxl", "SDXL")}


@pytest.mark.parametrize("locon", ["", "_locon"], ids=["lora", "locon"])
@pytest.mark.parametrize("architecture", KINDS)
def test_kohyas_names_are_consumed_by_every_program(architecture, locon, modules, file_of, verdicts):
    family, kind = KINDS[architecture]
    contents = file_of(modules(architecture + locon), FAMILIES[family].metadata)
    for program, report in verdicts(architecture, contents).items():
        assert (report.left, report.misfits, report.misscaled, report.refusal) == ((), (), (), None), program
        assert report.consumed == len(contents.shapes)
        assert report.loads and report.verdict == "loads whole"
        assert not list(report.losses())
    found = {program: report.kind for program, report in verdicts(architecture, contents).items()}
    expected = dict.fromkeys(("a1111", "invoke"), kind) | {"comfy": None, "diffusers": None}
    expected["forge"] = kind
    assert found == expected


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("part", ["lora_unet_", "lora_te"])
def test_a_file_for_one_part_alone_is_consumed(architecture, part, modules, file_of, verdicts):
    chosen = {name: shape for name, shape in modules(architecture).items() if name.startswith(part)}
    for report in verdicts(architecture, file_of(chosen)).values():
        assert report.verdict == "loads whole", report


def test_a_file_for_another_base_is_consumed_by_none(modules, file_of, verdicts):
    contents = file_of(modules("sd15"))
    reports = verdicts("sdxl", contents)
    assert all(list(report.losses()) for report in reports.values())
    assert reports["invoke"].refusal and "SD1" in reports["invoke"].refusal
    assert reports["forge"].refusal and "LoRA version mismatch" in reports["forge"].refusal


def test_a_base_that_no_webui_has_is_said(layouts, file_of, verdicts):
    from dataclasses import replace

    from sdlora.files.loaders import examine

    narrow = {path: shape for path, shape in layouts["sd15"].denoiser.items()}
    narrow = {path: ((64, 16) if "attn2.to_k" in path else shape) for path, shape in narrow.items()}
    layout = replace(layouts["sd15"], components={**layouts["sd15"].components, "denoiser": narrow})
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    for report in examine(layout, file_of({name: (64, 16)})):
        assert report.has_base == (report.program == "diffusers")
        assert not report.left and not list(report.losses())
        assert report.has_base or report.notes[-1].startswith("has no base of text width 16")
