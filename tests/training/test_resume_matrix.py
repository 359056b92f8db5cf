"""Uninterrupted equals resumed, at several places and twice in a row, for whatever a run can be made of; and differs
from a cold start that begins with the weights but without the rest."""

import hashlib
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.config_io import load_config
from sdlora.training.folder import reopen
from sdlora.training.lr import SCHEDULES
from sdlora.training.optimizers import OPTIMIZERS
from sdlora.training.train import train

STEPS = 8
MIXED = {"data.shuffle_tags": True, "data.flip": True, "data.caption_dropout": 0.3, "train.accumulation": 2}
TEXT = {"lora.text_encoder": True, "lora.text_encoder_stop": 0.5, "lora.dropout": 0.2}
KINDS = [
    *itertools.product(OPTIMIZERS, SCHEDULES, ["fp32"], [{}]),
    *itertools.product(OPTIMIZERS, ["cosine"], ["fp32", "bf16"], [MIXED | TEXT]),
]


def run_until(folder, stop, resume, flags):
    if not resume:
        return train(load_config(None, flags | {"output.output": folder, "train.stop_at": stop}))
    run, config = reopen(folder, {"train.stop_at": stop}, ())
    return train(config, resume=run)


def facts(result):
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(result.lora), [(line["loss"], line["learning_rate"], line["gradient_norm"]) for line in lines]


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][key], b[0][key]) for key in a[0])


@pytest.mark.parametrize(
    ("optimizer", "schedule", "precision", "more"),
    KINDS,
    ids=[f"{o}-{s}-{p}-{'everything' if m else 'plain'}" for o, s, p, m in KINDS],
)
def test_resumed_equals_uninterrupted(tiny_base, style_dir, tmp_path, optimizer, schedule, precision, more):
    flags = {"base.model": str(tiny_base), "data.images": style_dir, "data.batch_size": 2, "lora.rank": 2}
    flags |= {"train.steps": STEPS, "samples.sample_every": 0, "output.save_dtype": "fp32", "output.name": "x"}
    flags |= {"optimizer.optimizer": optimizer, "optimizer.schedule": schedule, "train.precision": precision}
    flags |= {"data.cache_dir": tmp_path / "cache"} | more
    straight = facts(run_until(tmp_path / "straight", None, False, flags))
    for stop in (1, 3, 6, None):
        result = run_until(tmp_path / "cut", stop, stop != 1, flags)
    assert same(facts(result), straight)
    # Without the optimizer's moments the same weights go elsewhere.
    cold = tmp_path / "cold"
    run_until(cold, 5, False, flags)
    state = cold / "checkpoints" / "step-00000005" / "state.json"
    known = json.loads(state.read_text())
    moments = state.parent / "optimizer.safetensors"
    save_file({key: torch.zeros_like(x) for key, x in load_file(moments).items()}, moments)
    known["files"][moments.name] = {
        "size": moments.stat().st_size,
        "sha256": hashlib.sha256(moments.read_bytes()).hexdigest(),
    }
    state.write_text(json.dumps(known))
    assert not same(facts(run_until(cold, None, True, flags)), straight)
