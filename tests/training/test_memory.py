"""Less memory, the same training: checkpointing, fewer bits, offloading, and the ladder that chooses among them."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from notes import Notes

from sdlora.adapters import FlatParameters
from sdlora.config import Config
from sdlora.config_io import load_config, to_toml
from sdlora.errors import ConfigError, TrainingError
from sdlora.families import Base, load_parts
from sdlora.frozen.quantized import Quantized
from sdlora.training.folder import reopen
from sdlora.training.forecast import Activations, Forecast, measure_activations
from sdlora.training.memory import Ladder, first_that_fits, recorded_rung, rungs
from sdlora.training.progress import Reporter
from sdlora.training.room import Limit, leave_device, memory_limit, sentence
from sdlora.training.savings import CHECKPOINTING, Rung, is_kept, layers_of, put_to_work
from sdlora.training.setup import attach_adapters, set_up
from sdlora.training.train import step_gradients, train
from sdlora.training.world import World

CPU = torch.device("cpu")


@pytest.fixture
def settings(tiny_base, style_dir, tmp_path):
    """Builds the configuration of a short run, in a folder of its own."""

    def make(name: str = "run", **flags) -> Config:
        base = {
            "base.model": str(tiny_base),
            "data.images": style_dir,
            "data.batch_size": 4,
            "lora.rank": 2,
            "train.steps": 3,
            "train.pack_weights": "off",
            "output.output": tmp_path / name,
            "samples.sample_every": 0,
        }
        return load_config(None, base | {k.replace("__", "."): v for k, v in flags.items()})

    return make


def gradients(parts, config, *savings: Rung):
    """Returns the flat gradient of one pass with dropout seeds fixed, after the savings were put to work in turn."""
    flat = FlatParameters({c: x.values() for c, x in attach_adapters(parts, config).items()}, torch.float32)
    flat.values.add_(0.05 * torch.randn(flat.values.shape, generator=torch.Generator().manual_seed(1)))
    for rung in savings:
        put_to_work(parts.denoiser, rung, CPU, dropout=config.lora.dropout > 0)
    parts.denoiser.train()
    torch.manual_seed(2)
    told = {"states": torch.randn(2, 77, 16)}
    result = parts.family.denoise(parts, torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), told)
    result.square().mean().backward()
    return flat.gradients.clone()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("level", ["attention", "all"])
def test_checkpointing_changes_no_gradient_and_counts_none_twice(tiny_base, settings, level, dropout):
    results = []
    for one in ("none", level):
        parts = load_parts(Base("tiny", tiny_base, "test"))
        results.append(gradients(parts, settings(lora__dropout=dropout), Rung(2, one)))
    assert results[0].norm() > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


def test_each_level_recomputes_what_it_says(tiny_parts):
    counts = {}
    for level in CHECKPOINTING:
        put_to_work(tiny_parts.denoiser, Rung(1, level), CPU, dropout=False)
        on = [type(m).__name__ for m in tiny_parts.denoiser.modules() if getattr(m, "gradient_checkpointing", False)]
        counts[level] = set(on)
    assert counts["none"] == set()
    assert counts["attention"] == {"Transformer2DModel"}
    assert {"CrossAttnDownBlock2D", "UpBlock2D", "Transformer2DModel"} <= counts["all"]


# Cosine of the LoRA's gradient with that on the exact base. Measured here, on random weights 8 to 24 wide: 1.0000,
# 0.9999, 0.992, 0.868; on nano: 1.0000, 0.9995, 0.995, 0.946.
@pytest.mark.parametrize(("form", "least"), [("bf16", 0.9995), ("int8", 0.999), ("fp8", 0.99), ("nf4", 0.8)])
def test_a_quantised_base_gives_nearly_the_same_gradient(tiny_base, settings, form, least):
    exact, small = (load_parts(Base("tiny", tiny_base, "test")) for _ in range(2))
    expected = gradients(exact, settings())
    got = gradients(small, settings(), Rung(2, "none", form))
    assert float(F.cosine_similarity(got, expected, dim=0)) > least
    for path, layer in small.denoiser.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            assert isinstance(layer, Quantized) == (not is_kept(path))
    assert all(not isinstance(m, Quantized) for m in small.denoiser.conv_in.modules())


def test_offloading_changes_no_bit_and_goes_with_everything_else(tiny_base, settings):
    for rung in (Rung(2), Rung(2, "all", "int8"), Rung(2, "attention", "nf4")):
        here, away = (load_parts(Base("tiny", tiny_base, "test")) for _ in range(2))
        expected = gradients(here, settings(), rung)
        assert torch.equal(gradients(away, settings(), replace(rung, offload=True)), expected)
        assert all(layer.fetch for layer in layers_of(away.denoiser).values())


@pytest.mark.parametrize("flags", [{"train__base_dtype": f} for f in ("int8", "fp8", "nf4")], ids=str)
def test_a_run_on_a_quantised_base_ends_in_a_certified_file_and_previews(settings, flags):
    drawn = {"samples__sample_every": 3, "samples__sample_steps": 2, "samples__sample_prompts": ["a castle"]}
    notes = Notes()
    result = train(settings(**flags, **drawn, train__gradient_checkpointing="all"), reporter=notes)
    assert result.finished and result.certificate.num_modules > 100
    assert (result.folder / "samples" / "overview.png").exists()
    (line,) = [line for line in notes.lines if line.startswith("Base: ") and "layers in" in line]
    assert f"layers in {flags['train__base_dtype']}, " in line and " instead of " in line
    facts = json.loads((result.folder / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert facts["memory"]["base_dtype"] == flags["train__base_dtype"]


def test_a_run_on_offloaded_weights_learns_the_very_same_file(settings):
    files = [train(settings(x, train__offload=x, train__seed=3)).lora.parent / "metrics.jsonl" for x in ("off", "on")]
    losses = [[json.loads(line)["loss"] for line in file.read_text().splitlines()] for file in files]
    assert losses[0] == losses[1]


def test_with_the_memory_gone_the_step_is_done_again_one_rung_down_with_the_batch_as_large_as_before(settings):
    results, sessions = [], []
    for failures in (0, 4):
        notes = Notes()
        session = set_up(settings(f"run{failures}"), None, notes, World.single())
        left = [failures]

        def compute(*arguments, whole=session.engine.compute, left=left):
            loss = whole(*arguments)  # what it has added by then must be forgotten
            if left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("fake")
            return loss

        session.engine.compute = compute

        with torch.no_grad():
            session.engine.flat.values.add_(0.01)
        loss, *_ = session.ladder.run(partial(step_gradients, session, 0, False))
        results.append((loss, session.engine.flat.gradients.clone()))
        sessions.append((session, notes))
    assert sessions[0][0].ladder.rung == Rung(4)
    assert sessions[1][0].ladder.rung == Rung(1, "all")
    assert sessions[1][0].micro_batch == 1
    assert sum("out of memory" in line for line in sessions[1][1].lines) == 4
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    assert float(F.cosine_similarity(results[0][1], results[1][1], dim=0)) > 0.99999
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-6)


def test_on_the_last_rung_the_error_is_the_callers(tiny_parts):
    ladder = Ladder([Rung(1)], 0, tiny_parts.denoiser, CPU, batch=1, dropout=False, reporter=Reporter())

    def step():
        raise torch.OutOfMemoryError("fake")

    with pytest.raises(torch.OutOfMemoryError):
        ladder.run(step)
    assert not ladder.climb()


def test_the_ladder_goes_from_fast_to_small_and_leaves_what_the_user_set():
    config = load_config(None, {"train.memory": "8GB"})
    assert rungs(config.train, 3, CPU) == [
        Rung(3),
        Rung(3, "attention"),
        Rung(3, "all"),
        Rung(2, "all"),
        Rung(1, "all"),
        Rung(1, "all", "int8"),
        Rung(1, "all", "nf4"),
    ]
    assert rungs(config.train, 1, torch.device("cuda"))[-1] == Rung(1, "all", "nf4", True)
    assert rungs(Config().train, 1, CPU)[-1] == Rung(1, "all")  # weights may be packed there
    set_by_user = {"gradient_checkpointing": "none", "micro_batch": 2, "base_dtype": "fp8", "offload": "off"}
    fixed = load_config(None, {f"train.{k}": v for k, v in set_by_user.items()})
    assert rungs(fixed.train, 4, torch.device("cuda")) == [Rung(2, "none", "fp8")]


def small_forecast():
    return Forecast(
        weights={"auto": 1000, "int8": 500, "nf4": 280},
        blocks={"auto": 100, "int8": 50, "nf4": 28},
        kept_weights=10,
        largest_weight=20,
        fixed=100,
        activations=Activations(
            kept={"none": 900, "attention": 300, "all": 100}, again={"none": 0, "attention": 30, "all": 30}
        ),
    )


def test_the_fastest_rung_that_fits_is_taken_and_said():
    ladder = rungs(load_config(None, {"train.memory": "8GB"}).train, 4, CPU)
    foreseen = small_forecast()
    totals = [foreseen.total(rung) for rung in ladder]
    assert totals == sorted(totals, reverse=True)
    for limit in (10**6, 3000, 2000, 1300, 900, 700):
        at = first_that_fits(ladder, foreseen, limit)
        assert totals[at] <= limit and all(total > limit for total in totals[:at])
    at = first_that_fits(ladder, foreseen, 2000)
    said, fits = sentence(ladder[at], ladder[0], 4, foreseen, Limit(2000, True))
    assert fits and said == (
        "Memory: about 4.71 kB would be needed, and 2 kB allowed; so with gradient checkpointing of all blocks: "
        "about 1.63 kB."
    )
    said, fits = sentence(ladder[-1], ladder[0], 4, foreseen, Limit(100, False))
    assert not fits and said.endswith("which is still too much.")


def test_a_measured_step_corrects_the_forecast():
    foreseen, rung = small_forecast(), Rung(2, "attention")
    corrected = foreseen.corrected(rung, 5000)
    assert corrected.total(rung) == 5000
    assert corrected.resting(rung) == foreseen.resting(rung)
    assert corrected.total(Rung(1, "attention")) < 5000


@pytest.mark.parametrize("level", CHECKPOINTING)
def test_what_is_foreseen_is_what_autograd_keeps(tiny_parts, settings, level):
    adapters = attach_adapters(tiny_parts, settings())["denoiser"]
    found = measure_activations(tiny_parts, adapters, (64, 64), {"states": torch.empty(1, 77, 16)})
    denoiser = tiny_parts.denoiser
    put_to_work(denoiser, Rung(1, level), CPU, dropout=False)
    weights = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    kept = {}

    def count(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        told = {"states": torch.randn(1, 77, 16)}
        result = tiny_parts.family.denoise(tiny_parts, torch.randn(1, 4, 8, 8), torch.tensor([5]), told)
        result.sum()
    real = sum(x.nbytes() for pointer, x in kept.items() if pointer not in weights)
    # Entries of blocks are held by checkpointing itself, where no hook sees them; what a block and its neighbour both
    # keep is counted with the block.
    assert found.kept["none"] > found.kept["attention"] > found.kept["all"]
    if level == "none":
        assert real == pytest.approx(found.kept[level], rel=0.15)
    else:
        assert real < 1.1 * found.kept[level]


def test_a_limit_is_read_and_a_wrong_one_refused():
    assert memory_limit("8GB", CPU, None) == Limit(8_000_000_000, True)
    assert memory_limit("7500 mb", CPU, 3) == Limit(7_500_000_000, True)
    assert memory_limit("auto", CPU, 3) == Limit(3, False)
    assert memory_limit("auto", CPU, None) is None
    with pytest.raises(ConfigError, match=r"train.memory must be auto or a size such as 8GB or 7500MB, got 8"):
        load_config(None, {"train.memory": "8"})


@pytest.mark.parametrize(
    ("value", "level"), [(True, "all"), (False, "none"), ("true", "all"), ("attention", "attention")]
)
def test_the_old_switch_still_means_all_or_none(tmp_path, value, level):
    assert load_config(None, {"train.gradient_checkpointing": value}).train.gradient_checkpointing == level
    file = tmp_path / "old.toml"
    text = json.dumps(value)
    file.write_text(f"[train]\ngradient_checkpointing = {text}\n")
    config = load_config(file)
    assert config.train.gradient_checkpointing == level
    file.write_text(to_toml(config))
    assert load_config(file) == config


def test_a_small_limit_saves_and_a_resumed_run_stays_where_it_was(settings):
    notes = Notes()
    half = train(settings(train__memory="1MB", train__stop_at=2), reporter=notes)
    assert any("which is still too much" in line for line in notes.lines)
    facts = json.loads((half.folder / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert facts["memory"] == Rung(1, "all", "nf4").facts()
    run, config = reopen(half.folder, {"train.memory": "500GB", "train.stop_at": None}, ())
    session = set_up(config, run, Reporter(), World.single())
    assert session.ladder.rung == Rung(1, "all", "nf4")


def test_a_resumed_run_keeps_the_bases_number_format():
    ladder = rungs(load_config(None, {"train.base_dtype": "int8"}).train, 2, CPU)
    assert recorded_rung(ladder, None) == 0
    assert recorded_rung(ladder, Rung(2, "all", "int8").facts()) == 2
    assert recorded_rung(ladder, Rung(7, "all", "int8").facts()) == 0
    with pytest.raises(TrainingError, match="--base-dtype nf4"):
        recorded_rung(ladder, Rung(2, "all", "nf4").facts())


def test_what_does_not_train_leaves_a_gpu_and_nothing_leaves_a_cpu(tiny_parts):
    assert leave_device(tiny_parts, [], CPU) == []
    assert leave_device(tiny_parts, ["denoiser"], torch.device("cuda")) == ["vae", "text_encoder"]
    assert leave_device(tiny_parts, ["denoiser", "text_encoder"], torch.device("cuda")) == ["vae"]


def test_a_setting_that_saves_nothing_is_said(settings):
    notes = Notes()
    set_up(settings(train__offload="on"), None, notes, World.single())
    assert any("train.offload saves nothing on a cpu" in line for line in notes.lines)
