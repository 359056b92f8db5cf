"""Builds the data set from nothing: fetches the packages, finds and renders the drawings, writes the manifest.

    python -m tools.pretrain_nano.build --out build/emoji            about ten minutes and 150 MB
    python -m tools.pretrain_nano.build --out build/emoji --check    compares with the manifest in the repository

The folder gets `pictures/<style>/<code>.png`, `concepts.json` and `manifest.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tools.pretrain_nano.concepts import SPLITS, Concept, read_concepts
from tools.pretrain_nano.drawings import Names, drawings
from tools.pretrain_nano.sources import SHA256, STYLES, WORDS, Style, fetch

MANIFEST = Path(__file__).parent / "manifest.json"
"""The manifest that a rebuilt data set must reproduce."""


def build(out: Path, packages: Path) -> dict:
    """Writes the data set into `out`; returns its manifest."""
    unpacked = fetch(packages)
    concepts = read_concepts(unpacked[WORDS])
    names = Names(unpacked)
    out.mkdir(parents=True, exist_ok=True)
    rows = json.dumps([asdict(concept) for concept in concepts], indent=0, ensure_ascii=False) + "\n"
    (out / "concepts.json").write_text(rows, encoding="utf-8", newline="\n")
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(_write_style, style, unpacked[style.package], concepts, names, out) for style in STYLES]
        styles = {style.id: job.result() for style, job in zip(STYLES, jobs, strict=True)}
    manifest = {
        "concepts": len(concepts),
        "concepts_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "base_concepts": len({concept.base for concept in concepts}),
        "splits": {split: _count(concepts, split) for split in SPLITS},
        "pictures": sum(row["pictures"] for row in styles.values()),
        "styles": styles,
        "archives_sha256": SHA256,
    }
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8", newline="\n")
    return manifest


def _count(concepts: list[Concept], split: str) -> dict[str, int]:
    mine = [concept for concept in concepts if concept.split == split]
    return {"base_concepts": len({concept.base for concept in mine}), "concepts": len(mine)}


def _write_style(style: Style, package: Path, concepts: list[Concept], names: Names, out: Path) -> dict:
    """Writes the pictures of one style; returns its row of the manifest."""
    folder = out / "pictures" / style.id
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    splits: Counter[str] = Counter()
    wanted = set()
    for concept, picture in drawings(style, package, concepts, names):
        file = folder / f"{concept.code}.png"
        picture.save(file, optimize=False, compress_level=6)
        wanted.add(file.name)
        splits[concept.split] += 1
        digest.update(f"{concept.code}\0".encode() + file.read_bytes())
    for stranger in [file for file in folder.iterdir() if file.name not in wanted]:
        stranger.unlink()
    print(f"{style.id}: {len(wanted)} pictures", flush=True)
    return {
        "package": style.package,
        "licence": style.licence,
        "author": style.author,
        "role": style.role,
        "pictures": len(wanted),
        "by_split": {split: splits[split] for split in SPLITS},
        "sha256": digest.hexdigest(),
    }


def main() -> None:
    """Builds, and says whether the result is the one in the repository."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_nano.build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--packages", type=Path, help="folder of the archives; default: OUT/packages")
    parser.add_argument("--check", action="store_true", help="end with an error unless every byte is as it should be")
    arguments = parser.parse_args()
    manifest = build(arguments.out, arguments.packages or arguments.out / "packages")
    print(f"{manifest['pictures']} pictures of {manifest['concepts']} concepts, sha256 {manifest['sha256']}")
    if arguments.check:
        expected = json.loads(MANIFEST.read_text(encoding="utf-8"))
        differ = [style for style, row in manifest["styles"].items() if row != expected["styles"][style]]
        if manifest["sha256"] != expected["sha256"]:
            sys.exit(
                f"not the data set of {MANIFEST}; styles that differ: {', '.join(differ) or 'none, but the words do'}"
            )
        print("byte for byte the data set of the manifest")


if __name__ == "__main__":
    main()
