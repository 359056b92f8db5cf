"""Where every picture and every word of the data set comes from, under which licence, and who may learn from it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

WORDS = "emojibase-data@17.0.0"
"""English labels, tags and groups of all emoji; MIT."""
UNICODE_NAMES = "unicode-emoji-json@0.9.0"
"""Unicode's own names, by which older drawings are called; MIT."""


@dataclass(frozen=True)
class Style:
    """One set of drawings.

    Attributes:
        id: folder name and label of the style judge.
        words: how the style is called in a caption: "castle, {words} style".
        package: npm package with its version.
        licence: SPDX identifier.
        author: who must be named.
        role: "base": the shipped weights learn from it. "judged": only the judges do. "held out": the bench teaches it;
            share-alike, or kept back for this. "twin": drawn after a held-out style, so close that the base must not
            see it either.
        folder: folder of files named by code points inside the package; None means Iconify's `icons.json`.
    """

    id: str
    words: str
    package: str
    licence: str
    author: str
    role: str
    folder: str | None = None


STYLES: tuple[Style, ...] = (
    Style("noto", "noto", "@iconify-json/noto@1.2.9", "Apache-2.0", "Google Inc.", "base"),
    Style("noto-v1", "noto blob", "@iconify-json/noto-v1@1.2.5", "Apache-2.0", "Google Inc.", "judged"),
    Style("twemoji", "twemoji", "@iconify-json/twemoji@1.2.5", "CC-BY-4.0", "Twitter, Inc. and contributors", "base"),
    Style(
        "fluent-modern",
        "fluent modern",
        "@lobehub/fluent-emoji-modern@1.0.0",
        "MIT",
        "Microsoft Corporation",
        "twin",
        "assets",
    ),
    Style(
        "fluent-flat",
        "fluent flat",
        "@lobehub/fluent-emoji-flat@1.1.0",
        "MIT",
        "Microsoft Corporation",
        "base",
        "assets",
    ),
    Style(
        "fluent-high-contrast",
        "high contrast",
        "@iconify-json/fluent-emoji-high-contrast@1.2.6",
        "MIT",
        "Microsoft Corporation",
        "base",
    ),
    Style("fxemoji", "fxemoji", "@iconify-json/fxemoji@1.2.2", "Apache-2.0", "Mozilla", "judged"),
    Style("emojione-v2", "emojione", "@iconify-json/emojione@1.2.3", "CC-BY-4.0", "EmojiOne", "judged"),
    Style("emojione-mono", "monotone", "@iconify-json/emojione-monotone@1.2.1", "CC-BY-4.0", "EmojiOne", "base"),
    Style(
        "fluent-3d", "fluent 3d", "@lobehub/fluent-emoji-3d@1.1.0", "MIT", "Microsoft Corporation", "held out", "assets"
    ),
    Style("openmoji", "openmoji", "openmoji@17.0.0", "CC-BY-SA-4.0", "OpenMoji", "held out", "color/svg"),
    Style("openmoji-black", "openmoji black", "openmoji@17.0.0", "CC-BY-SA-4.0", "OpenMoji", "held out", "black/svg"),
    Style("emojione-v1", "emojione one", "@iconify-json/emojione-v1@1.2.3", "CC-BY-SA-4.0", "EmojiOne", "held out"),
)

STYLE_OF = {style.id: style for style in STYLES}
BASE_STYLES = tuple(style.id for style in STYLES if style.role == "base")
NAMED_STYLES = tuple(style.id for style in STYLES if style.role in ("base", "judged"))
"""Those whose names the tokenizer has learned."""
HELD_OUT_STYLES = tuple(style.id for style in STYLES if style.role == "held out")

# Of each archive as the registry serves it; a published version never changes.
# fmt: off
SHA256 = {
    "emojibase-data@17.0.0":
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "unicode-emoji-json@0.9.0":
        "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    "@iconify-json/noto@1.2.9":
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@iconify-json/noto-v1@1.2.5":
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    "@iconify-json/twemoji@1.2.5":
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    "@lobehub/fluent-emoji-modern@1.0.0":
        "080906de394ad8335c24f67e1b33f12a9ac1b6d99324d26ae63cad8d27359769",
    "@lobehub/fluent-emoji-flat@1.1.0":
        "8f9113c027c7c20eced0070354715a4093a459b8bef6332b91d45f38c9bdb147",
    "@iconify-json/fluent-emoji-high-contrast@1.2.6":
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    "@iconify-json/fxemoji@1.2.2":
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    "@iconify-json/emojione@1.2.3":
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    "@iconify-json/emojione-monotone@1.2.1":
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
    "@lobehub/fluent-emoji-3d@1.1.0":
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "openmoji@17.0.0":
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "@iconify-json/emojione-v1@1.2.3":
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
}
# fmt: on


def fetch(packages: Path) -> dict[str, Path]:
    """Returns the unpacked folder of every package, downloading with npm what `packages` does not hold yet.

    Args:
        packages: folder for the archives; nothing is fetched twice.

    Raises:
        SystemExit: npm is missing, or an archive is not the one this recipe was written for.
    """
    packages.mkdir(parents=True, exist_ok=True)
    return {package: unpacked(package, packages) for package in SHA256}


def unpacked(package: str, packages: Path) -> Path:
    """Returns the unpacked folder of one package; see `fetch`."""
    name, version = package.rsplit("@", 1)
    archive = packages / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.is_file():
        npm = shutil.which("npm") or sys.exit(f"npm is not installed, and {archive} is not there; it fetches {package}")
        print(f"fetching {package}", flush=True)
        subprocess.run([npm, "pack", package, "--silent"], cwd=packages, check=True, stdout=subprocess.DEVNULL)
    seen = hashlib.sha256(archive.read_bytes()).hexdigest()
    if seen != SHA256[package]:
        sys.exit(f"{archive} has sha256 {seen}, expected {SHA256[package]}; remove it and try again")
    folder = archive.with_suffix("")
    if not folder.is_dir():
        with tarfile.open(archive) as tar:
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            tar.extractall(partial, filter="data")
            partial.rename(folder)
    return folder / "package"
