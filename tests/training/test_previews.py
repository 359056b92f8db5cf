"""Samples show the file's values, cost the run nothing but time, and those that stay are by the base's own VAE."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.adapters import adapters_in
from sdlora.config import Config, LoraSection, SamplesSection
from sdlora.errors import ModelError
from sdlora.files.kohya import write_lora
from sdlora.sampling import pipeline
from sdlora.sampling.infotext import decoder_of, stored_text
from sdlora.sampling.pipeline import draw
from sdlora.sampling.prompts import Prompt
from sdlora.training import previews as module
from sdlora.training.previews import Previews, sample_prompts
from sdlora.training.progress import Reporter
from sdlora.training.setup import attach_adapters

PROMPTS = [Prompt(text, "", 64, 64, seed, 4.0, 2, "Euler") for seed, text in enumerate(["a cat", "a hill"])]


class Notes(Reporter):
    """Remembers warnings and stages."""

    def __init__(self):
        self.warnings, self.stages = [], []

    def warn(self, text):
        self.warnings.append(text)

    def begin(self, stage, total, done=0):
        self.stages.append(stage)


def adapted(parts, text_encoder=False):
    adapters = attach_adapters(parts, Config(lora=LoraSection(rank=2, text_encoder=text_encoder)))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for by_path in adapters.values():
            for adapter in by_path.values():
                adapter.up.copy_(torch.randn(adapter.up.shape, generator=rng))
    return adapters


@pytest.fixture
def make(tiny_parts, tmp_path):
    """Builds previews of the tiny base with a LoRA, and the LoRA's file."""

    def build(text_encoder=False, **settings):
        if not adapters_in(tiny_parts.denoiser):
            made.append(adapted(tiny_parts, text_encoder))
            write_lora(file, made[0], tiny_parts.family, {}, torch.float32)
        settings = {"parts": tiny_parts, "folder": tmp_path / "samples"} | settings
        return Previews(adapters=made[0], prompts=PROMPTS, **settings), file

    file, made = tmp_path / "style.safetensors", []
    return build


def counting(parts):
    """Returns the same base, and a list of the texts that it encodes from now on."""
    texts = []

    def encode(parts, some, *arguments, **options):
        texts.extend(some)
        return family.encode_prompts(parts, some, *arguments, **options)

    family = parts.family
    return replace(parts, family=replace(family, encode_prompts=encode)), texts


def pixels(image):
    return np.asarray(image.convert("RGB"), np.int16)


def state(previews):
    parts = previews.parts
    return [(name, p, p.data_ptr(), p.clone()) for c in parts.components.values() for name, p in c.named_parameters()]


def same(before, after):
    return all(
        a[0] == b[0] and a[1] is b[1] and a[2] == b[2] and torch.equal(a[3], b[3])
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_pictures_are_those_of_the_adapters_and_leave_no_trace(make, text_encoder):
    previews, file = make(text_encoder)
    beside = draw(previews.parts, PROMPTS)
    before = state(previews)
    base = previews.without(Reporter())
    pictures = previews.with_lora(file, 1, Reporter())
    assert same(before, state(previews))
    for ours, theirs, plain in zip(pictures, beside, base, strict=True):
        assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
        assert np.abs(pixels(ours) - pixels(plain)).max() > 5


def test_they_show_the_file_and_not_what_is_in_memory(make):
    previews, file = make()
    first = previews.with_lora(file, 1, Reporter())
    with torch.no_grad():
        for adapter in previews.adapters["denoiser"].values():
            adapter.up.zero_()
    again = previews.with_lora(file, 2, Reporter())
    assert [image.tobytes() for image in again] == [image.tobytes() for image in first]


def test_texts_are_encoded_once_a_run(make, tiny_parts):
    parts, texts = counting(tiny_parts)
    previews, file = make(parts=parts)
    previews.encode()
    assert sorted(texts) == ["", "a cat", "a hill"]
    previews.without(Reporter())
    for epoch in (1, 2):
        previews.with_lora(file, epoch, Reporter())
    assert len(texts) == 3


def test_an_adapted_text_encoder_is_asked_every_round(make, tiny_parts):
    parts, texts = counting(tiny_parts)
    previews, file = make(text_encoder=True, parts=parts)
    previews.encode()
    assert not texts
    for epoch in (1, 2):
        previews.with_lora(file, epoch, Reporter())
    assert len(texts) == 9  # the base, and two rounds


def test_the_base_is_drawn_once_a_run(make):
    previews, file = make()
    notes = Notes()
    for epoch in (1, 2):
        previews.with_lora(file, epoch, notes)
    make()[0].with_lora(file, 3, notes)  # resumed
    assert notes.stages == ["samples (base)", "samples", "samples", "samples"]


def test_taesd_decodes_on_the_way_and_the_own_vae_what_stays(make, tmp_path):
    full, file = make(folder=tmp_path / "full")
    expected = full.with_lora(file, 2, Reporter(), final=True)
    previews, _ = make(vae="taesd")
    quick = previews.with_lora(file, 1, Reporter())
    folder = previews.folder
    stored = lambda name: [decoder_of(stored_text(folder / name / f"{i:02d}.png")) for i in range(2)]  # noqa: E731
    assert stored("base") == stored("epoch-000001") == ["TAESD", "TAESD"]
    last = previews.with_lora(file, 2, Reporter(), final=True)
    assert stored("base") == stored("epoch-000002") == [None, None]
    assert stored("epoch-000001") == ["TAESD", "TAESD"]
    assert [image.tobytes() for image in last] == [image.tobytes() for image in expected]
    assert [image.tobytes() for image in quick] != [image.tobytes() for image in last]
    for name in ("epoch-000002.png", "base/00.png", "epoch-000002/01.png"):
        with Image.open(folder / name) as ours, Image.open(full.folder / name) as theirs:
            assert ours.tobytes() == theirs.tobytes()


def test_the_overview_compares_what_one_vae_decoded(make, monkeypatch):
    sheets = []
    grid = module.grid
    monkeypatch.setattr(module, "grid", lambda rows, **labels: sheets.append((rows, labels)) or grid(rows, **labels))
    previews, file = make(vae="taesd")
    previews.with_lora(file, 1, Reporter())
    previews.with_lora(file, 2, Reporter(), final=True)
    previews.overview()
    rows, labels = sheets[-1]
    assert labels["column_labels"] == ["base", "epoch 1", "epoch 2"]
    assert rows[0][1].tobytes() == rows[0][2].tobytes()  # one file, drawn twice
    # A finished run that goes on: what its last round left is named.
    later, _ = make(vae="taesd")
    later.with_lora(file, 3, Reporter(), final=True)
    later.overview()
    assert sheets[-1][1]["column_labels"] == ["base", "epoch 1", "epoch 2\nfull VAE", "epoch 3"]


def test_without_taesd_the_own_vae_is_used_and_said(make, monkeypatch):
    def missing(parts):
        raise ModelError("its file is gone")

    monkeypatch.setattr(module, "quick_vae", missing)
    previews, file = make(vae="taesd")
    notes = Notes()
    for epoch in (1, 2):
        assert previews.with_lora(file, epoch, notes)
    assert notes.warnings == ["samples are decoded by the base's own VAE: its file is gone"]
    assert decoder_of(stored_text(previews.folder / "epoch-000001" / "00.png")) is None


@pytest.mark.parametrize("when", [1, 3])
def test_who_stops_while_samples_are_drawn_gives_the_round_up_at_the_next_step(make, when):
    previews, file = make()
    previews.without(Reporter())
    before, asked = state(previews), []
    previews.stopped = lambda: asked.append(1) or len(asked) == when
    assert previews.with_lora(file, 1, Reporter()) == []
    assert len(asked) == when
    assert same(before, state(previews))
    assert not previews.grid_path(1).exists()


def test_samples_that_do_not_fit_into_the_memory_do_not_end_the_run(make, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError

    previews, file = make()
    previews.without(Reporter())
    before, notes = state(previews), Notes()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_denoise", full)
        assert previews.with_lora(file, 1, notes) == []
    assert "no samples after epoch 1: out of memory" in notes.warnings[0]
    assert same(before, state(previews))
    assert previews.with_lora(file, 2, notes)


@pytest.mark.parametrize(("wanted", "used"), [(None, 1.5), (5.0, 5.0)])
def test_samples_are_guided_as_the_base_wants_unless_it_is_set(wanted, used):
    config = Config(samples=SamplesSection(sample_prompts=["a cat", "a cat --l 3"], sample_cfg=wanted))
    assert [prompt.cfg for prompt in sample_prompts(config, [], 64, 1.5)] == [used, 3]
