"""What sdlora is for: thirty pictures move the base's drawings into their style, says a judge that knows both."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdlora.cli.demo import HELD_OUT, demo_config
from sdlora.training.progress import Reporter
from sdlora.training.train import train
from tools.style_bench.judges import Judges

STYLE = "fluent-3d"
"""The style of the example pictures. The base has never seen it."""
SUBJECTS = (
    *HELD_OUT,
    *("banana", "maple leaf", "hot dog", "crystal ball", "sun", "jeans", "snowman", "deciduous tree"),
)
"""Things that the base knows, and neither the judge nor the LoRA has seen."""
SEEDS = (4, 6)


def called(judges: Judges, folder: Path) -> list[str]:
    """Says in which style the judge finds each picture of a folder."""
    files = sorted(folder.glob("[0-9][0-9].png"))
    assert len(files) == len(SUBJECTS) * len(SEEDS)
    views = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    logits = judges.style_logits(torch.from_numpy(views).permute(0, 3, 1, 2) / 255)
    return [judges.styles[n] for n in logits.argmax(1).tolist()]


def test_a_lora_teaches_the_style_of_the_examples(tmp_path):
    config = demo_config(tmp_path / "run", 300)
    prompts = [f"{subject} --d {seed}" for subject in SUBJECTS for seed in SEEDS]
    samples = config.samples.model_copy(update={"sample_prompts": prompts})
    result = train(config.model_copy(update={"samples": samples}), reporter=Reporter())
    assert result.samples
    judges = Judges.load()
    before = called(judges, result.folder / "samples" / "base")
    after = called(judges, result.samples.with_suffix(""))
    assert before.count(STYLE) <= 4, before
    assert after.count(STYLE) >= 11, after
