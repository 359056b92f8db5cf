"""The whole line on small pictures: reproducible, resumable, exact, and honest about what goes wrong."""

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdlora.config import Config
from sdlora.config_io import load_config
from sdlora.errors import ConfigError, ModelError, SdloraError, TrainingError
from sdlora.training import room_on_disk
from sdlora.training import setup as building  # not "setup_module": pytest would call that
from sdlora.training.folder import reopen
from sdlora.training.progress import Reporter
from sdlora.training.train import train


class Notes(Reporter):
    """Remembers what is said."""

    def __init__(self, on_step=None):
        self.lines, self.steps, self.on_step, self.stage = [], 0, on_step, ""

    def say(self, text):
        self.lines.append(text)

    warn = say

    def begin(self, stage, total, done=0):
        self.stage = stage

    def advance(self, note="", units=1):
        if self.stage == "training":
            self.steps += units
            if self.on_step:
                self.on_step(self.steps)


@pytest.fixture
def settings(tiny_base, style_dir, tmp_path):
    """Builds the configuration of a short run, in a folder of its own."""

    def make(name: str = "run", **flags) -> Config:
        base = {
            "base.model": str(tiny_base),
            "data.images": style_dir,
            "data.batch_size": 2,
            "lora.rank": 2,
            "train.steps": 6,
            "output.output": tmp_path / name,
            "samples.sample_every": 0,
            "output.save_dtype": "fp32",
        }
        return load_config(None, base | {k.replace("__", "."): v for k, v in flags.items()})

    return make


def tensors(result) -> dict[str, torch.Tensor]:
    return load_file(result.lora)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def go_on(folder: Path, **flags):
    run, config = reopen(folder, {k.replace("__", "."): v for k, v in flags.items()}, ())
    return train(config, resume=run)


VARIED = {
    "lora__dropout": 0.2,
    "lora__text_encoder": True,
    "data__shuffle_tags": True,
    "data__crop": "random",
    "data__flip": True,
    "train__accumulation": 2,
    "train__noise_offset": 0.05,
    "optimizer__warmup": 0.5,
}


@pytest.mark.parametrize("flags", [{}, VARIED], ids=["plain", "everything"])
def test_same_seed_same_tensors_and_resume_equals_uninterrupted(settings, flags):
    straight = train(settings("a", **flags))
    again = train(settings("b", **flags))
    assert equal(tensors(straight), tensors(again))

    half = train(settings("c", train__stop_at=3, **flags))
    assert (half.steps, half.finished, half.lora.name) == (3, False, "style-step00000003.safetensors")
    resumed = go_on(half.folder)
    assert equal(tensors(resumed), tensors(straight))
    assert not equal(tensors(half), tensors(straight))
    assert not equal(tensors(train(settings("d", train__seed=1, **flags))), tensors(straight))

    lines = [json.loads(line) for line in (half.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    reference = [json.loads(line) for line in (straight.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in reference]


def test_a_run_leaves_everything_it_promises(settings):
    notes = Notes()
    config = settings(
        train__steps=None,
        train__epochs=2,
        samples__sample_every=None,
        samples__sample_steps=2,
        samples__sample_prompts=["a castle", "a cat --w 64 --h 128"],
        data__trigger="tinystyle",
        output__name="mine",
        output__save_dtype="fp16",
    )
    result = train(config, reporter=notes)
    root = result.folder
    found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert found == {
        "config.toml",
        "metrics.jsonl",
        "heartbeat.json",
        ".lock",
        "certificate.json",
        "mine.safetensors",
        "mine.json",
        "mine.png",
        "epochs/mine-000001.safetensors",
        *(f"samples/{name}/{i:02d}.png" for name in ("base", "epoch-000001", "epoch-000002") for i in (0, 1)),
        "samples/epoch-000001.png",
        "samples/epoch-000002.png",
        "samples/overview.png",
        *(
            f"checkpoints/step-{step:08d}/{name}"
            for step in (result.total_steps // 2, result.total_steps)
            for name in ("adapters.safetensors", "optimizer.safetensors", "state.json")
        ),
    }
    assert json.loads((root / "mine.json").read_text())["activation text"] == "tinystyle"
    with safe_open(result.lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_output_name"] == "mine"
    assert metadata["ss_steps"] == str(result.total_steps)
    assert str(config.data.images) not in json.dumps(metadata)  # nobody's home folder goes into a shared file
    with Image.open(root / "samples" / "epoch-000002" / "01.png") as image:
        assert image.size == (64, 128)
        assert "<lora:mine:1" in image.info["parameters"]
    said = "\n".join(notes.lines)
    assert "found 12 files: 6 usable" in said
    assert "Plan: " in said
    assert "no such" not in said


def test_training_changes_the_adapters_only(settings, monkeypatch):
    def state_hash(module):
        digest = hashlib.sha256()
        for key, value in sorted(module.state_dict().items()):
            digest.update(key.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    seen = {}
    load = building.load_parts

    def spy(*arguments, **named):
        seen["parts"] = load(*arguments, **named)
        seen["before"] = [state_hash(m) for m in (*seen["parts"].components.values(), seen["parts"].vae)]
        return seen["parts"]

    monkeypatch.setattr(building, "load_parts", spy)
    train(settings(lora__text_encoder=True))
    from sdlora.adapters import eject

    parts = seen["parts"]
    assert eject(parts.denoiser) == 192
    assert eject(parts.text_encoders["text_encoder"]) == 18
    assert [state_hash(m) for m in (*parts.components.values(), parts.vae)] == seen["before"]


def test_the_loss_falls_when_one_picture_is_learned(settings, tmp_path):
    folder = tmp_path / "one" / "8_red"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    (folder / "red.txt").write_text("red")
    flags = {"data__images": folder.parent, "data__resolution": 64, "data__batch_size": 8, "data__caption_dropout": 0}
    result = train(settings(base__model="nano", train__steps=50, **flags))
    assert result.loss_end < 0.7 * result.loss_start


def test_v_prediction_is_read_from_the_checkpoint(settings, tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "v")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    v = train(settings("v-run", base__model=str(folder)))
    epsilon = train(settings("e-run"))
    assert not equal(tensors(v), tensors(epsilon))
    with safe_open(v.lora, "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize(
    ("flags", "count"),
    [({"lora__targets": "conv", "lora__conv_rank": 1}, 278), ({"train__gradient_checkpointing": True}, 192)],
)
def test_other_settings_run_and_export(settings, flags, count):
    assert train(settings(train__steps=2, **flags)).certificate.num_modules == count


def test_bf16_trains_fp32_masters(settings):
    result = train(settings(train__precision="bf16", train__steps=2))
    assert all(t.dtype == torch.float32 for t in tensors(result).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*")
def test_tensorboard_gets_every_step(settings):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(settings(output__tensorboard=True, train__steps=3))
    events = EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_tensorboard_is_refused_where_it_is_missing(settings, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sdlora\[tensorboard\]"):
        train(settings(output__tensorboard=True))


def test_ctrl_c_saves_and_the_run_goes_on(settings):
    assert threading.current_thread() is threading.main_thread()
    notes = Notes(on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None)
    stopped = train(settings("a"), reporter=notes)
    assert (stopped.steps, stopped.interrupted) == (2, True)
    assert equal(tensors(go_on(stopped.folder)), tensors(train(settings("b"))))


def test_a_second_ctrl_c_quits_at_once(settings):
    def twice(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(settings(), reporter=Notes(on_step=twice))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_can_be_prolonged(settings):
    done = train(settings(optimizer__schedule="constant", train__steps=3))
    with pytest.raises(ConfigError, match="is finished: 3 of 3"):
        go_on(done.folder)
    run, config = reopen(done.folder, {"train.steps": 6}, ())
    notes = Notes()
    longer = train(config, resume=run, reporter=notes)
    assert any("planned for 3 steps and now for 6, so this run" in line for line in notes.lines)
    assert equal(tensors(longer), tensors(train(settings("b", optimizer__schedule="constant"))))


def test_a_run_does_not_go_on_with_other_settings_or_pictures(settings, style_dir):
    half = train(settings(train__stop_at=2))
    with pytest.raises(ConfigError, match=r"lora\.rank \(was 2, now 8\)"):
        go_on(half.folder, lora__rank=8)
    (style_dir / "picture0.txt").write_text("another caption")
    with pytest.raises(TrainingError, match="pictures or captions"):
        go_on(half.folder)


def test_a_run_does_not_go_on_when_pictures_were_renamed(settings, style_dir):
    # Their order decides the batches, so the result would silently be another.
    half = train(settings(train__stop_at=2))
    (style_dir / "picture0.png").rename(style_dir / "z.png")
    (style_dir / "picture0.txt").rename(style_dir / "z.txt")
    with pytest.raises(TrainingError, match="or their names"):
        go_on(half.folder)


def test_a_run_does_not_go_on_with_another_base_or_precision(settings, tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    half = train(settings(train__stop_at=2, base__model=str(folder)))
    with pytest.raises(TrainingError, match="started in fp32 and would go on in bf16"):
        go_on(half.folder, train__precision="bf16")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value * 1.1 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="its weights differ"):
        go_on(half.folder)


def test_a_resumed_run_says_what_was_changed(settings):
    half = train(settings(train__stop_at=2))
    run, config = reopen(half.folder, {"train.steps": 7, "train.threads": 1}, ())
    notes = Notes()
    train(config, resume=run, reporter=notes)
    (line,) = [line for line in notes.lines if line.startswith("Changed since")]
    assert "train.steps (was 6, now 7)" in line and "train.threads (was None, now 1)" in line
    run, config = reopen(half.folder, {"train.steps": 8}, ())
    assert run.changes == ("train.steps (was 7, now 8)",)


def test_a_resumed_run_takes_new_prompts_and_a_new_name(settings):
    sampled = {"samples__sample_every": 1, "samples__sample_steps": 2, "data__batch_size": 3, "train__epochs": 3}
    config = settings(train__steps=None, train__stop_at=4, samples__sample_prompts=["a castle"], **sampled)
    half = train(config)
    done = go_on(half.folder, samples__sample_prompts=["a dog --d 9"], output__name="dogs")
    assert done.lora.name == "dogs.safetensors"
    for name in ("base", f"epoch-{3:06d}"):
        with Image.open(done.folder / "samples" / name / "00.png") as image:
            assert image.info["parameters"].startswith("a dog")
    with safe_open(half.lora, "pt") as before, safe_open(done.lora, "pt") as after:
        for key in ("ss_session_id", "ss_training_started_at"):
            assert before.metadata()[key] == after.metadata()[key]


def test_a_run_killed_after_its_last_step_still_gets_its_file(settings):
    done = train(settings())
    expected = tensors(done)
    for path in (done.lora, done.lora.with_suffix(".json")):
        path.unlink()
    assert equal(tensors(go_on(done.folder)), expected)
    with pytest.raises(ConfigError, match="is finished: 6 of 6"):
        go_on(done.folder)


def test_a_run_stopped_before_its_first_checkpoint_begins_again(settings):
    straight = train(settings("a"))
    half = train(settings("b", train__stop_at=2))
    shutil.rmtree(half.folder / "checkpoints")
    assert equal(tensors(go_on(half.folder)), tensors(straight))
    assert len((half.folder / "metrics.jsonl").read_text().splitlines()) == 6


def test_the_base_that_auto_chose_is_written_down(settings, monkeypatch):
    real = building.resolve_base
    monkeypatch.setattr(
        building, "resolve_base", lambda model, *rest, **more: real("nano" if model == "auto" else model)
    )
    half = train(settings(base__model="auto", train__stop_at=1, train__steps=2, data__resolution=64))
    assert load_config(half.folder / "config.toml").base.model == "nano"
    assert go_on(half.folder).finished


def test_moved_pictures_are_found_again(settings, style_dir):
    half = train(settings(train__stop_at=2))
    moved = style_dir.rename(style_dir.with_name("moved"))
    assert go_on(half.folder, data__images=moved).finished


def test_a_run_among_the_pictures_is_not_learned_from(settings, style_dir):
    sampled = {"samples__sample_every": 1, "samples__sample_steps": 2, "samples__sample_prompts": ["a castle"]}
    half = train(settings(output__output=style_dir / "run", train__stop_at=4, **sampled))
    assert list((style_dir / "run").rglob("*.png"))
    assert go_on(half.folder).finished


def test_of_two_runs_in_one_folder_the_second_is_refused(settings, monkeypatch):
    config = settings()
    real = building.choose_folder

    def slow(given):
        chosen = real(given)
        monkeypatch.setattr(building, "choose_folder", real)
        train(given)  # somebody else, between our look and our claim
        return chosen

    monkeypatch.setattr(building, "choose_folder", slow)
    with pytest.raises(ConfigError, match="taken by another run"):
        train(config)


def test_ctrl_c_while_samples_are_drawn_gives_the_round_up(settings):
    class Impatient(Notes):
        def advance(self, note="", units=1):
            if self.stage == "samples":
                os.kill(os.getpid(), signal.SIGINT)

    flags = {"samples__sample_every": 1, "samples__sample_steps": 2, "samples__sample_prompts": ["a", "b"]}
    stopped = train(settings(**flags), reporter=Impatient())
    assert stopped.interrupted
    assert not stopped.finished
    assert go_on(stopped.folder).finished


def test_a_clip_skip_deeper_than_the_encoder_is_refused_at_once(settings, tmp_path):
    with pytest.raises(ModelError, match="has 3 layers"):
        train(settings(base__clip_skip=4))
    assert not (tmp_path / "run").exists()


def test_a_folder_is_never_overwritten(settings, tmp_path):
    train(settings(train__steps=1))
    with pytest.raises(ConfigError, match="holds another run; continue it with"):
        train(settings(train__steps=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty"):
        train(settings("other"))
    with pytest.raises(ConfigError, match="no run there"):
        reopen(tmp_path / "nowhere", {}, ())


def test_a_diverging_run_stops_and_names_the_pictures(settings):
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row.*picture"):
        train(settings(optimizer__learning_rate=10, train__steps=60, train__max_grad_norm=0, optimizer__warmup=0))


def test_a_disk_that_fills_up_ends_the_run_with_a_word(settings, monkeypatch):
    half = train(settings(train__stop_at=2))
    open_file = Path.open

    def full(path, mode="r", **options):
        if mode == "ab":
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_file(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        patch.setattr(room_on_disk, "PATIENCE", 0.0)
        with pytest.raises(TrainingError, match="no space left on the disk"):
            go_on(half.folder)
    assert go_on(half.folder).finished


def test_no_space_is_noticed_before_the_work(settings, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(TrainingError, match="has 0 MB free"):
        train(settings())


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"data__images": None}, "give --images"),
        ({"data__images": Path("does-not-exist")}, "does-not-exist"),
        ({"base__model": "nonsense"}, "no base model 'nonsense'"),
        ({"samples__sample_prompts": ["a --zz 3"], "samples__sample_every": 1}, "zz"),
        ({"samples__sampler": "Magic", "samples__sample_every": 1}, "Magic"),
        ({"train__precision": "fp16"}, "fp16"),
        ({"train__attention": "xformers"}, "xformers"),
    ],
)
def test_bad_input_fails_before_anything_is_written(settings, tmp_path, flags, match):
    with pytest.raises(SdloraError, match=match):
        train(settings(**flags))
    assert not (tmp_path / "run").exists()
