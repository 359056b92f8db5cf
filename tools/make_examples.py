"""Rebuilds `datasets_example/` from two npm packages: thirty pictures of one style, each with its caption.

The folder is in the repository, so nobody needs this to use sdlora. It is here so that anyone can see where every pixel
comes from. Packages and concepts are pinned, so the same pictures come out every time.

    python tools/make_examples.py                                        fetches both packages with `npm pack`
    python tools/make_examples.py --pictures DIR --words DIR             takes unpacked ones

Subjects that people like to type when they try a style (castle, dog, robot, ...) are missing on purpose: a style has
been learned only if it also reaches what it was not shown. `HELD_OUT` names them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
WORDS = "emojibase-data@17.0.0"
SIDE = 256

CONCEPTS: dict[str, str] = {
    # caption: Unicode label; they differ where the label is not what a person would type
    "cat face": "cat face",
    "bear": "bear",
    "elephant": "elephant",
    "penguin": "penguin",
    "owl": "owl",
    "turtle": "turtle",
    "frog": "frog",
    "red apple": "red apple",
    "strawberry": "strawberry",
    "pizza": "pizza",
    "hamburger": "hamburger",
    "doughnut": "doughnut",
    "key": "key",
    "guitar": "guitar",
    "camera": "camera",
    "light bulb": "light bulb",
    "backpack": "backpack",
    "teapot": "teapot",
    "grinning face": "grinning face",
    "crying face": "crying face",
    "smiling face with sunglasses": "smiling face with sunglasses",
    "house": "house",
    "classical building": "classical building",
    "sunflower": "sunflower",
    "cactus": "cactus",
    "evergreen tree": "evergreen tree",
    "car": "automobile",
    "rocket": "rocket",
    "bicycle": "bicycle",
    "sailboat": "sailboat",
}

HELD_OUT = frozenset(
    ["castle", "dog", "tiger", "mushroom", "airplane", "cake", "crown", "robot", "lion", "umbrella", "ghost", "clock"]
)


def codepoints(text: str) -> str:
    """Brings a name like `1F3E0-FE0F` to the form `1f3e0`: lower case, without the sign that asks for colour."""
    return "-".join(part.zfill(4) for part in text.lower().split("-") if part != "fe0f")


def find_pictures(pictures: Path, words: Path) -> dict[str, Path]:
    """Returns the source picture of every caption.

    Args:
        pictures: the unpacked picture package, with `assets/<codepoints>.webp`.
        words: the unpacked word package, with `en/data.json`.
    """
    labels = {
        entry["label"]: codepoints(entry["hexcode"])
        for entry in json.loads((words / "en" / "data.json").read_text(encoding="utf-8"))
    }
    files = {codepoints(file.stem): file for file in (pictures / "assets").glob("*.webp")}
    missing = [label for label in CONCEPTS.values() if labels.get(label) not in files]
    if missing:
        sys.exit(f"not in these packages: {', '.join(missing)}; are they {PICTURES} and {WORDS}?")
    return {caption: files[labels[label]] for caption, label in CONCEPTS.items()}


def on_white(file: Path) -> Image.Image:
    """Reads a transparent picture, and returns it in RGB on white, 256 x 256."""
    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def write_examples(sources: dict[str, Path], out: Path) -> int:
    """Writes a PNG and a caption per source; returns the size of all in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    slugs = {caption: caption.replace(" ", "-") for caption in sources}
    strangers = sorted(p.name for p in out.glob("*.*") if p.name != "LICENSE" and p.stem not in slugs.values())
    if strangers:
        sys.exit(f"{out} holds {', '.join(strangers[:5])}, which this recipe does not make; remove them first")
    for caption, slug in slugs.items():
        on_white(sources[caption]).save(out / f"{slug}.png", optimize=True)
        (out / f"{slug}.txt").write_text(caption + "\n", encoding="utf-8", newline="\n")
    return sum(file.stat().st_size for file in out.iterdir())


def fetch(package: str, into: Path) -> Path:
    """Downloads a package with npm, which checks its hash, and unpacks it."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is not installed; unpack both packages yourself and pass --pictures and --words")
    into.mkdir()
    subprocess.run([npm, "pack", package, "--silent"], cwd=into, check=True, stdout=subprocess.DEVNULL)
    [archive] = into.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")
    return into / "package"


def main() -> None:
    """Parses the arguments and rebuilds the folder."""
    parser = argparse.ArgumentParser(description="Rebuilds datasets_example/ from two npm packages.")
    parser.add_argument("--pictures", type=Path, help=f"unpacked {PICTURES}; default: npm fetches it")
    parser.add_argument("--words", type=Path, help=f"unpacked {WORDS}; default: npm fetches it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "datasets_example")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        pictures = arguments.pictures or fetch(PICTURES, Path(temporary) / "pictures")
        words = arguments.words or fetch(WORDS, Path(temporary) / "words")
        size = write_examples(find_pictures(pictures, words), arguments.out)
    print(f"{len(CONCEPTS)} pictures in {arguments.out}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
