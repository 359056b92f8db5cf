"""Feeds invented text to all that reads what people type: it is read, or refused in a sentence, and nothing else.

    python -m tools.fuzz_text [--examples 5000]

Captions in every kind of file, metadata.jsonl, prompt files, prompts with brackets, TOML settings and `--set`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdlora.cli.main import main as command
from sdlora.config_io import load_config, to_toml
from sdlora.data.captions import compose
from sdlora.data.folder import scan
from sdlora.errors import SdloraError
from sdlora.families.emphasis import parse_emphasis
from sdlora.sampling.prompts import parse_lora_spec, read_prompts

_ODD = st.sampled_from(
    [
        *("\0", "\r", "\n", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\ud800", "🙂", "é", "名"),
        *("--w ", "--d -1", " --n ", "--", "[", "]]", "((", ":1.5)", "\\(", "BREAK", "<lora:x:1>", "AND", '"""'),
        *("'''", "[data]", "images = ", "= {", "nan", "1e999", "#", "../", "%s", "{}"),
    ]
)
TEXT = st.lists(st.one_of(_ODD, st.text(max_size=20)), max_size=12).map("".join)
BYTES = st.one_of(TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=200))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
ROW = st.one_of(
    BYTES,
    VALUE.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"file_name": st.one_of(st.just("a.png"), TEXT), "text": VALUE}).map(
        lambda row: json.dumps(row).encode()
    ),
)
_KEYS = [f"{section}.{key}" for section, values in load_config(None, {}) for key, _ in values]


def _refused_or_read(act: Callable[[], Any]) -> None:
    """Runs something that may raise what people are told, in words that a terminal can print; and nothing else."""
    try:
        act()
    except SdloraError as error:
        assert str(error).strip(), "an error without words"


def captions(folder: Path) -> Callable[..., None]:
    picture = folder / "a.png"
    Image.new("RGB", (8, 8)).save(picture)

    @given(st.sampled_from([".txt", ".caption", ".json", "/metadata.jsonl"]), st.lists(ROW, max_size=3), TEXT)
    def check(ending: str, rows: list[bytes], trigger: str) -> None:
        file = folder / "metadata.jsonl" if ending.startswith("/") else picture.with_suffix(ending)
        file.write_bytes(b"\n".join(rows))
        try:
            _refused_or_read(
                lambda: [_composed(example.caption, trigger) for example in scan(folder, trigger).examples]
            )
        finally:
            file.unlink()

    return check


def _composed(caption: str, trigger: str) -> str:
    rng = torch.Generator().manual_seed(0)
    front = compose(caption, trigger=trigger, prefix=trigger, shuffle=True, keep=1, dropout=0.5, rng=rng)
    return front + compose(caption, trigger=trigger, trigger_place="end", suffix=trigger, shuffle=True, rng=rng)


def prompts(folder: Path) -> Callable[..., None]:
    file = folder / "prompts.txt"

    @given(BYTES)
    def check(content: bytes) -> None:
        file.write_bytes(content)
        _refused_or_read(lambda: [parse_emphasis(prompt.text) for prompt in read_prompts(file)])
        _refused_or_read(lambda: parse_lora_spec(content.decode("utf-8", "surrogateescape")))

    return check


def toml(folder: Path) -> Callable[..., None]:
    file, again = folder / "style.toml", folder / "again.toml"

    def read() -> None:
        config = load_config(file)
        again.write_text(to_toml(config), encoding="utf-8")
        assert load_config(again) == config

    @given(st.one_of(BYTES, st.tuples(st.sampled_from(_KEYS), VALUE).map(_setting)))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        _refused_or_read(read)

    return check


def _setting(pair: tuple[str, Any]) -> bytes:
    (section, _, key), value = pair[0].partition("."), json.dumps(pair[1])
    return f"[{section}]\n{key} = {value}\n".encode("utf-8", "surrogatepass")


def assignments(folder: Path) -> Callable[..., None]:
    @given(st.one_of(TEXT, st.tuples(st.sampled_from(_KEYS), TEXT).map("=".join)))
    def check(text: str) -> None:
        _refused_or_read(lambda: load_config(None, {}, (text,)))

    return check


def commands(folder: Path) -> Callable[..., None]:
    """What stands on the command line of a program that trains nothing."""

    @given(st.lists(st.one_of(TEXT, st.sampled_from(["--set", "--steps", "--rank", "--images", "train"])), max_size=4))
    def check(words: list[str]) -> None:
        try:
            command(["train", "--images", str(folder / "nowhere"), *words])
        except SystemExit as end:
            assert end.code in (0, 2), end.code

    return check


SUBJECTS = {"captions": captions, "prompts": prompts, "toml": toml, "assignments": assignments, "commands": commands}


def run(name: str, examples: int, folder: Path) -> None:
    """Checks one subject; whatever it does wrong is raised, with the smallest text that shows it."""
    check = SUBJECTS[name](folder)
    phases = [phase for phase in Phase if phase is not Phase.explain]
    quiet = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
    settings(max_examples=examples, phases=phases, **quiet)(check)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5000)
    wanted = parser.parse_args()
    for name in SUBJECTS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            run(name, wanted.examples, Path(folder))
        print(f"{name}: {wanted.examples} examples, no traceback, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
