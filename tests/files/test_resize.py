"""A resized LoRA is the best approximation of the old one at its new rank, and at full rank the old one."""

import json

import pytest
import torch
from files.random_lora import delta, random_lora, random_module, relative

from sdlora.cli.main import main
from sdlora.container import model_hash
from sdlora.files.kohya import ModuleWeights, read_lora, write_modules
from sdlora.files.resize import resize, summary
from sdlora.files.svd import by_energy, by_rank, by_ratio

SHAPES = {"linear": (40, 24), "narrow": (3, 24), "point": (16, 24, 1, 1), "conv": (16, 8, 3, 3)}


@pytest.fixture
def modules():
    return {name: random_module(name, shape, 6, 2.0, 0.3, 0) for name, shape in SHAPES.items()}


def shapes_of(weights: ModuleWeights) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(weights.down.shape[1:]), (weights.up.shape[0], *weights.up.shape[2:])


def test_full_rank_loses_nothing(modules):
    for keep in (by_rank(6), by_rank(99), by_energy(1.0), by_ratio(1e12)):
        resized = resize(modules, keep, torch.float32)
        for name, weights in modules.items():
            assert relative(delta(resized.modules[name]), delta(weights)) < 1e-5
            assert resized.cuts[name].kept == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_smaller_rank_is_the_truncated_decomposition_of_the_change(modules, rank):
    resized = resize(modules, by_rank(rank), torch.float32)
    for name, weights in modules.items():
        u, s, vt = torch.linalg.svd(delta(weights), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        cut = resized.modules[name]
        assert relative(delta(cut), best) < 1e-5
        assert shapes_of(cut) == shapes_of(weights)
        if rank < len(s[s > 1e-9]):
            assert (cut.rank, cut.alpha) == (rank, rank)
            assert resized.cuts[name].kept == pytest.approx(float(s[:rank].norm() / s.norm()), rel=1e-6)


def test_modules_that_lose_nothing_are_left_alone(modules):
    modules["small"] = random_module("small", (40, 24), 2, 0.5, 0.3, 0)
    resized = resize(modules, by_rank(2), torch.float32)
    assert resized.modules["small"] is modules["small"]
    assert resized.modules["linear"] is not modules["linear"]
    assert (resized.cuts["linear"].before, resized.cuts["linear"].after) == (6, 2)
    assert "of conv" in summary(resized.cuts) or "of linear" in summary(resized.cuts)


def test_energy_and_ratio_choose_a_rank_for_each_module():
    u, v = (torch.linalg.qr(torch.randn(32, 4, generator=torch.Generator().manual_seed(i)))[0] for i in (0, 1))
    modules = {
        "steep": ModuleWeights(v.T, u * torch.tensor([10.0, 1.0, 0.1, 0.01]), 4.0),
        "flat": ModuleWeights(v.T, u, 4.0),
    }
    by_share = resize(modules, by_energy(0.95), torch.float32).modules
    assert {name: weights.rank for name, weights in by_share.items()} == {"steep": 1, "flat": 4}
    by_size = resize(modules, by_ratio(200), torch.float32).modules
    assert {name: weights.rank for name, weights in by_size.items()} == {"steep": 3, "flat": 4}


def test_a_module_of_zeros_and_a_scale_of_zero_stay_zero():
    weights = random_module("a", (8, 8), 4, 0.0, 0.3, 0)
    zeros = ModuleWeights(torch.zeros(4, 8), torch.zeros(8, 4), 4.0)
    resized = resize({"scale": weights, "zeros": zeros}, by_energy(0.9), torch.float32)
    for name, cut in resized.modules.items():
        assert cut.rank == 1 and not delta(cut).any()
        assert resized.cuts[name].kept == 1
    assert summary(resized.cuts).startswith("100.00%")


def test_factors_of_a_common_scale_stay_within_fp16(tmp_path):
    weights = random_module("lora_unet_a", (64, 64), 32, 1 / 32, 0.02, 0)  # a change of about 1e-6
    resized = resize({"lora_unet_a": weights}, by_rank(16), torch.float16)
    write_modules(tmp_path / "a.safetensors", resized.modules, {}, torch.float16)
    found = read_lora(tmp_path / "a.safetensors").modules["lora_unet_a"]
    assert relative(delta(found), delta(resized.modules["lora_unet_a"])) < 2e-3


def test_the_command_says_what_was_kept_and_the_file_says_what_it_is(capsys, tmp_path, tiny_sd1):
    source, out = tmp_path / "style.safetensors", tmp_path / "small.safetensors"
    facts = {"ss_network_dim": "3", "ss_network_args": '{"conv_dim": "3"}', "ss_steps": "30", "ss_v2": "False"}
    old = random_lora(
        source, tiny_sd1, dtype=torch.float16, **facts, lora_adapter_metadata="{}", ss_output_name="style"
    )
    main(["lora", "resize", str(source), str(out), "--rank", "2"])
    said = capsys.readouterr().out
    assert "Resized by rank 2: rank 3 -> 2;" in said and "of the change's Frobenius norm kept" in said
    assert f"Alpha: the new rank, in {len(old.modules)} modules" in said
    assert f"{source.stat().st_size / 1e6:.2f} MB -> {out.stat().st_size / 1e6:.2f} MB, fp16" in said
    new = read_lora(out)
    assert new.modules.keys() == old.modules.keys() and new.dtype == torch.float16
    assert {(weights.rank, weights.alpha) for weights in new.modules.values()} == {(2, 2.0)}
    expected = {
        "ss_network_dim": "2",
        "ss_network_alpha": "2.0",
        "ss_network_module": "networks.lora",
        "ss_steps": "30",
        "ss_output_name": "small",
        "modelspec.title": "small",
        "sshs_model_hash": model_hash(out.read_bytes()),
    }
    assert {key: new.metadata.get(key) for key in expected} == expected
    assert not {"ss_network_args", "lora_adapter_metadata"} & new.metadata.keys()
    origin = json.loads(new.metadata["sdlora_resized"])
    assert origin == {"file": "style.safetensors", "sshs_model_hash": old.model_hash, "kept": "rank 2"}


def test_a_rank_that_is_too_high_is_said_to_have_changed_nothing(capsys, tmp_path, tiny_sd1):
    source, out = tmp_path / "style.safetensors", tmp_path / "same.safetensors"
    old = random_lora(source, tiny_sd1)
    main(["lora", "resize", str(source), str(out), "--rank", "64"])
    count = len(old.modules)
    assert f"As it was: {count} of {count} modules" in capsys.readouterr().out
    assert read_lora(out).model_hash == old.model_hash


def test_equal_input_gives_an_equal_file(tmp_path, tiny_sd1):
    source = tmp_path / "style.safetensors"
    random_lora(source, tiny_sd1)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        main(["lora", "resize", str(source), str(tmp_path / folder / "small.safetensors"), "--energy", "0.9"])
    assert (tmp_path / "one" / "small.safetensors").read_bytes() == (
        tmp_path / "two" / "small.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["style.safetensors", "out.safetensors"], "give --rank or --energy or --ratio"),
        (["style.safetensors", "out.safetensors", "--rank", "2", "--energy", "0.9"], "got rank and energy"),
        (["style.safetensors", "out.safetensors", "--rank", "0"], "--rank"),
        (["style.safetensors", "out.safetensors", "--energy", "1.5"], "--energy"),
        (["style.safetensors", "style.safetensors", "--rank", "2"], "would be written over"),
        (["style.safetensors", "out.pt", "--rank", "2"], "must end in .safetensors"),
        (["style.safetensors", ".", "--rank", "2"], "is a folder"),
        (["missing.safetensors", "out.safetensors", "--rank", "2"], "no LoRA file missing.safetensors"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(capsys, tmp_path, tiny_sd1, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    random_lora(tmp_path / "style.safetensors", tiny_sd1)
    before = (tmp_path / "style.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["lora", "resize", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["style.safetensors"]
    assert (tmp_path / "style.safetensors").read_bytes() == before
