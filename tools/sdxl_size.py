"""Measures merging into, and extracting from, checkpoints of SDXL's real size: seconds, and memory at its peak.

`python -m tools.sdxl_size --work DIR` writes a random checkpoint (6.9 GB) and a random LoRA of rank 16, bakes the one
into the other and takes it out again, each in a process of its own, and deletes it all.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from sdlora.atomic import replacing
from sdlora.container import open_container, write_stream
from sdlora.diffusion.noise import generator
from sdlora.families import FAMILIES
from sdlora.families.full_size import full_size_models
from sdlora.families.layout import DENOISER, VAE, denoiser_sources, text_sources, vae_sources
from sdlora.files.kohya import ModuleWeights, read_lora, write_modules
from sdlora.files.layers import layers_of

FAMILY = FAMILIES["sdxl"]
RANK = 16
DRAWN = 1 << 24
"""How many random numbers are drawn; tensors are cut out of them, each elsewhere, for drawing all takes minutes."""

Shape = tuple[int, ...]

PROBE = """
import re, sys, time
from sdlora.cli.main import main
started = time.monotonic()
try:
    main(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    print(time.monotonic() - started, re.search(r"VmHWM:\\s*(\\d+)", status)[1])
"""
"""VmHWM and not `ru_maxrss`, which a process inherits from the one that starts it."""


def shapes() -> dict[str, Shape]:
    """Returns the shape of every tensor of an SDXL checkpoint in the original layout, by key."""
    found: dict[str, Shape] = {}
    for prefix, model, sources in _components():
        for path, tensor in model.state_dict().items():
            source = sources(path)
            if source is None:
                continue  # position_ids
            shape = tuple(tensor.shape)[:: -1 if source.transposed else 1]
            if prefix == VAE and ".mid.attn_1." in source.name and len(shape) == 2:
                shape = (*shape, 1, 1)  # the VAE's attention is of convolutions there
            found[prefix + source.name] = shape if source.third is None else (3 * shape[0], *shape[1:])
    return found


def _components() -> Iterator[tuple]:
    models = full_size_models(FAMILY)
    yield DENOISER, models["denoiser"], denoiser_sources(FAMILY.plain_up)
    with torch.device("meta"):
        vae = AutoencoderKL(**FAMILY.vae_config)
    yield VAE, vae, vae_sources(len(FAMILY.vae_config["block_out_channels"]))
    for spec in FAMILY.text_encoders:
        prefix = spec.original + ("" if spec.open_clip else "text_model.")
        yield prefix, models[spec.component], text_sources(spec)


def write_checkpoint(path: Path, table: dict[str, Shape]) -> None:
    """Writes a checkpoint of random weights in fp16."""
    pool = (torch.randn(DRAWN, generator=generator("pool")) * 0.03).half()

    def tensor(key: str) -> torch.Tensor:
        size = math.prod(table[key])
        start = int(torch.randint(max(1, DRAWN - size), (1,), generator=generator(key)))
        whole = pool if size <= DRAWN else pool.repeat(-(-size // DRAWN))
        return whole[start : start + size].reshape(table[key])

    write_stream(path, {key: (torch.float16, shape) for key, shape in table.items()}, {}, tensor)


def write_lora(path: Path) -> int:
    """Writes a LoRA for all layers of the denoiser that kohya's trainer targets; returns how many these are."""
    ends = ("_proj_in", "_proj_out")
    names = [n for n in layers_of("sdxl") if n.startswith("lora_unet_")]
    layers = {n: layers_of("sdxl")[n].shape for n in names if "_transformer_blocks_" in n or n.endswith(ends)}
    modules = {}
    for name, (outputs, inputs) in layers.items():
        rng = generator("lora", name)
        down = torch.randn(RANK, inputs, generator=rng) * 0.05
        modules[name] = ModuleWeights(down, torch.randn(outputs, RANK, generator=rng) * 0.05, float(RANK))
    write_modules(path, modules, FAMILY.metadata, torch.float16)
    return len(modules)


def measured(*arguments: str) -> str:
    """Runs an sdlora command in a fresh interpreter; returns its seconds and its peak of resident memory."""
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = map(float, done.stdout.strip().splitlines()[-1].split())
    return f"{seconds:.0f} s, {peak * 1024 / 1e6:.0f} MB of memory at the peak"


def copied(path: Path, to: Path) -> str:
    """Copies a file to the disk itself and deletes the copy; returns how long that takes, which no merge can beat."""
    started = time.monotonic()
    with replacing(to) as temporary:
        shutil.copyfile(path, temporary)
    seconds = time.monotonic() - started
    to.unlink()
    return f"{seconds:.0f} s"


def worst_difference(first: Path, second: Path) -> float:
    """Returns the largest relative difference of two LoRAs' changes, over their modules."""
    old, new = read_lora(first).modules, read_lora(second).modules
    assert old.keys() == new.keys()
    worst = 0.0
    for name, weights in old.items():
        change = weights.scale * weights.up.float() @ weights.down.float()
        found = new[name].scale * new[name].up.float() @ new[name].down.float()
        worst = max(worst, float(torch.linalg.vector_norm(found - change) / torch.linalg.vector_norm(change)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for some 14 GB, which are deleted at the end")
    work: Path = parser.parse_args().work
    table = shapes()
    total, largest = (2 * f(map(math.prod, table.values())) for f in (sum, max))
    work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(work).free < 2.2 * total:
        sys.exit(f"{work} has too little room: {2.2 * total / 1e9:.0f} GB are needed")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        base, lora, baked, found = (Path(folder) / f"{n}.safetensors" for n in ("base", "lora", "baked", "found"))
        started = time.monotonic()
        write_checkpoint(base, table)
        count = write_lora(lora)
        print(f"{len(open_container(base).entries)} tensors, {total / 1e9:.2f} GB, the largest {largest / 1e6:.0f} MB")
        print(f"LoRA: {count} modules, {lora.stat().st_size / 1e6:.0f} MB; made in {time.monotonic() - started:.0f} s")
        print("copy   ", copied(base, baked))
        print("info   ", measured("lora", "info", str(lora)))
        print("bake   ", measured("lora", "merge", f"{lora}:1", "--into", str(base), "-o", str(baked)))
        pair = ("--base", str(base), "--tuned", str(baked), "-o", str(found), "--rank", str(RANK))
        print("extract", measured("lora", "extract", *pair))
        print(f"largest relative difference of a change, found against baked: {worst_difference(lora, found):.1e}")


if __name__ == "__main__":
    main()
