"""One line of text says what to draw: kohya's prompt options, so that prompt files from there work here.

`a castle --w 512 --h 768 --d 7 --n blurry` is the line of sd-scripts' sample prompt files. What a line does not say
stays `None` until `resolve` fills it in, so that defaults are decided in one place, by the caller.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdlora.errors import ConfigError
from sdlora.sampling.samplers import sampler_name

_OPTIONS = {
    "w": "width in pixels",
    "h": "height in pixels",
    "d": "seed",
    "l": "CFG scale",
    "s": "steps",
    "n": "negative prompt",
    "ss": "sampler",
}
_LONG_NAMES = {
    "width": "w",
    "height": "h",
    "seed": "d",
    "cfg": "l",
    "scale": "l",
    "steps": "s",
    "negative": "n",
    "sampler": "ss",
}
_ELSEWHERE = {
    "g": "guidance of other model families",
    "cn": "a ControlNet picture",
    "ctr": "a ControlNet setting",
    "rcfg": "renormalised CFG of other model families",
    "fs": "flow shift of other model families",
}

_EDITING = re.compile(r"(?<!\\)\[[^\[\]]*(\||:\s*\d*\.?\d+\s*\])|\bAND\b")


@dataclass(frozen=True)
class Prompt:
    """What one picture shall show, and how it is drawn.

    Attributes:
        text: what it shows; may be empty.
        negative: what it should not show.
        width: in pixels, a multiple of 8.
        height: in pixels, a multiple of 8.
        seed: of the starting noise, 0 to 2**32 - 1.
        cfg: how strictly the text is followed, 1 to 50; 1 ignores the negative prompt.
        steps: denoising steps, 1 to 1000.
        sampler: a name of `samplers.SAMPLERS`.
        notes: what the user should be told about the line; no part of the prompt's identity.
    """

    text: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    cfg: float | None = None
    steps: int | None = None
    sampler: str | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)


def parse_prompt(line: str) -> Prompt:
    """Reads one prompt with kohya's options: --w --h --d (seed) --l (CFG) --s (steps) --n (negative) --ss (sampler).

    Sizes are rounded down to a multiple of 8, at least 64; when that changes them, `notes` says so.

    Raises:
        ConfigError: for an unknown option, a value out of range, or a `<lora:...>` tag, which would be drawn as words.

    Source: the option letters and ranges of sd-scripts' sample prompt files.
    """
    text, *options = (" " + line.strip()).split(" --")
    values: dict[str, str] = {}
    for option in options:
        key, _, value = option.strip().partition(" ")
        if key not in _OPTIONS:
            raise ConfigError(_unknown(key, line))
        if key in values:
            raise ConfigError(f"--{key} ({_OPTIONS[key]}) is given twice in the prompt {line.strip()!r}; keep one")
        values[key] = value.strip()
    text, negative = text.strip(), values.get("n", "")
    if "<lora:" in text or "<lora:" in negative:
        raise ConfigError(f"LoRA tags have no effect in the prompt {line.strip()!r}; name the file with --lora instead")
    if any("\ud800" <= c <= "\udfff" for c in text + negative):
        raise ConfigError(f"the prompt {line.strip()!r} holds bytes that are no text; type it again, in UTF-8")
    notes: list[str] = []
    if any(_EDITING.search(t) for t in (text, negative)):
        notes.append(f"prompt editing, as in [a:b:0.5] or [a|b], and AND are read as plain words here: {text!r}")
    return Prompt(
        text,
        negative,
        width=_side("w", values, line, notes),
        height=_side("h", values, line, notes),
        seed=_whole("d", values, line, 0, 2**32 - 1),
        cfg=_cfg(values, line),
        steps=_whole("s", values, line, 1, 1000),
        sampler=sampler_name(values["ss"]) if "ss" in values else None,
        notes=tuple(notes),
    )


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a UTF-8 file with one prompt a line; blank lines and lines that begin with # are skipped.

    Raises:
        ConfigError: if the file is missing, is no text, holds no prompt, or a line is wrong (with its number).
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"no prompt file {path}; make a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt file {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"cannot read the prompt file {path}: {error.strerror or error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            prompts.append(parse_prompt(line))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise ConfigError(f"the prompt file {path} holds no prompt; write one a line, # begins a comment")
    return prompts


def resolve(prompt: Prompt, defaults: Prompt) -> Prompt:
    """Fills what a prompt leaves open from `defaults`; an empty negative prompt counts as open.

    What the defaults leave open too stays `None`; `pipeline.draw` refuses such a prompt.
    """
    names = ("width", "height", "seed", "cfg", "steps", "sampler")
    values = {n: getattr(defaults, n) if getattr(prompt, n) is None else getattr(prompt, n) for n in names}
    return replace(prompt, negative=prompt.negative or defaults.negative, **values)


def parse_lora_spec(spec: str) -> tuple[Path, float]:
    """Splits `FILE[:STRENGTH]`, as in `style.safetensors:0.8`, into the file and the strength, 1 by default.

    The strength may be negative, which draws the opposite of the style. The colon of a Windows drive is left alone.

    Raises:
        ConfigError: if there is no file name, or the strength is no finite number.
    """
    file, colon, tail = spec.rpartition(":")
    try:
        strength = float(tail)
    except ValueError:
        if colon and (not tail or file.lower().endswith(".safetensors")):
            raise ConfigError(f"strength {tail!r} in --lora {spec} is no number; write it as FILE:0.8") from None
        file, strength = spec, 1.0
    else:
        if not colon:  # the whole text reads as a number, so it is a file's name
            file, strength = spec, 1.0
    if not math.isfinite(strength):
        raise ConfigError(f"strength {tail} in --lora {spec} is not finite; usual strengths lie between 0 and 1")
    if not file.strip():
        raise ConfigError(f"--lora {spec!r} names no file; write it as FILE or FILE:0.8")
    return Path(file), strength


def _unknown(key: str, line: str) -> str:
    where = f"unknown option --{key} in the prompt {line.strip()!r}"
    if key in _ELSEWHERE:
        return f"{where}: {_ELSEWHERE[key]} is not supported here; leave it out"
    near = difflib.get_close_matches(key, _LONG_NAMES, n=1, cutoff=0.7)
    if near:
        return f"{where}; the {_OPTIONS[_LONG_NAMES[near[0]]]} is --{_LONG_NAMES[near[0]]}"
    return f"{where}; known: " + ", ".join(f"--{k} ({meaning})" for k, meaning in _OPTIONS.items())


def _wrong(key: str, value: str, line: str, expected: str) -> ConfigError:
    return ConfigError(f"--{key} ({_OPTIONS[key]}) must be {expected}, got {value!r} in the prompt {line.strip()!r}")


def _whole(key: str, values: dict[str, str], line: str, low: int, high: int) -> int | None:
    if key not in values:
        return None
    value = values[key]
    if not re.fullmatch(r"\d{1,12}", value, re.ASCII) or not low <= int(value) <= high:
        raise _wrong(key, value, line, f"a whole number from {low} to {high}")
    return int(value)


def _side(key: str, values: dict[str, str], line: str, notes: list[str]) -> int | None:
    side = _whole(key, values, line, 1, 4096)
    if side is None:
        return None
    rounded = max(64, side // 8 * 8)
    if rounded != side:
        notes.append(f"--{key} {side} became {rounded}: sides are multiples of 8, at least 64")
    return rounded


def _cfg(values: dict[str, str], line: str) -> float | None:
    if "l" not in values:
        return None
    try:
        cfg = float(values["l"])
    except ValueError:
        cfg = math.nan
    if not 1 <= cfg <= 50:
        raise _wrong("l", values["l"], line, "a number from 1 to 50")
    return cfg
