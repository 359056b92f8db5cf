"""What sdlora is for: thirty pictures move the base's drawings into their style, says a judge that knows both."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdlora.cli.demo import HELD_OUT, demo_config, prompt
from sdlora.training.progress import Reporter
from sdlora.training.train import train
from tools.style_bench.judges import Judges
from tools.style_bench.verdict import style_hits

STYLE = "fluent-3d"
"""The style of the example pictures. The base has never seen it."""
SUBJECTS = (
    *HELD_OUT,
    *("banana", "maple leaf", "hot dog", "crystal ball", "sun", "jeans", "snowman", "deciduous tree"),
)
"""Things that the base knows, and neither the judge nor the LoRA has seen."""
SEEDS = (4, 6)


def in_style(judges: Judges, folder: Path) -> int:
    """Counts the pictures of a folder that the judge finds in the style."""
    files = sorted(folder.glob("[0-9][0-9].png"))
    assert len(files) == len(SUBJECTS) * len(SEEDS)
    views = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    logits = judges.style_logits(torch.from_numpy(views).permute(0, 3, 1, 2) / 255)
    hits, _ = style_hits(logits, judges.styles, [STYLE] * len(files))
    return int(hits.sum())


def test_a_lora_teaches_the_style_of_the_examples(tmp_path):
    config = demo_config(tmp_path / "run", 300)
    prompts = [prompt(subject, seed) for subject in SUBJECTS for seed in SEEDS]
    samples = config.samples.model_copy(update={"sample_prompts": prompts})
    result = train(config.model_copy(update={"samples": samples}), reporter=Reporter())
    assert result.samples
    judges = Judges.load()
    assert in_style(judges, result.folder / "samples" / "base") <= 4
    assert in_style(judges, result.samples.with_suffix("")) >= 11
