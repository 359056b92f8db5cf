"""Settings in and out: defaults, TOML file, flags and `--set` become a configuration, and a configuration becomes TOML.

Everything that is wrong is said at once, each with the value seen and, for a misspelt name, the one that was meant.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdlora.config import Config, Switch, all_settings
from sdlora.errors import ConfigError


def load_config(
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: tuple[str, ...] = (),
) -> Config:
    """Builds the configuration: defaults, then the TOML file, then flags, then `--set`; the later wins.

    Args:
        file: a TOML file with a table per section, or `None`.
        flags: values by `section.key`; only what the user gave.
        assignments: texts `section.key=value`, the value written as in TOML (bare words are taken as text).

    Raises:
        ConfigError: naming every problem of the file, the flags and the assignments at once.
    """
    problems: list[str] = []
    values = _read_toml(file) if file else {}
    for path, value in (flags or {}).items():
        _assign(values, path, value)
    for one, other in (("steps", "epochs"), ("epochs", "steps")):  # a flag replaces the file's way of saying how long
        if f"train.{one}" in (flags or {}) and f"train.{other}" not in (flags or {}) and "train" in values:
            values["train"].pop(other, None)
    known = {s.path for s in all_settings()}
    texts = {s.path for s in all_settings() if s.field.annotation is str}
    for text in assignments:
        path, equals, raw = text.partition("=")
        path = path.strip()
        if not equals:
            problems.append(f"--set {text}: write it as section.key=value, e.g. --set lora.rank=8")
        elif path not in known:
            problems.append(_unknown(path, known, "--set"))
        else:
            value = _toml_value(raw.strip())
            _assign(values, path, raw.strip() if path in texts and not isinstance(value, str) else value)
    problems += _misfits(values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [_explain(e, known) for e in error.errors()]
        raise ConfigError(_report(problems, file)) from error
    problems += _contradictions(config)
    if problems:
        raise ConfigError(_report(problems, file))
    return config


def _misfits(values: dict[str, Any]) -> list[str]:
    """Takes out, and explains, what pydantic would let pass: true for a number, and an empty path for "here"."""
    problems = []
    for s in all_settings():
        table = values.get(s.section)
        value = table.get(s.key) if isinstance(table, dict) else None
        if isinstance(value, bool) and s.field.annotation is not bool and Switch not in s.field.metadata:
            problems.append(f"{s.path} must not be {str(value).lower()}; it is no switch")
        elif isinstance(value, str) and not value.strip() and "Path" in str(s.field.annotation):
            problems.append(f"{s.path} is empty; give a path, or leave it out")
        else:
            continue
        assert isinstance(table, dict)
        del table[s.key]
    return problems


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {file}; `sdlora defaults` prints one to start from") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {file}: {error}") from error


def _toml_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    section, _, key = path.partition(".")
    table = values.setdefault(section, {})
    if isinstance(table, dict):  # otherwise pydantic reports the section
        table[key] = value


def _unknown(path: str, known: set[str], where: str) -> str:
    key = path.rpartition(".")[2]
    by_key = {k.rpartition(".")[2]: k for k in known}
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    near = near or [by_key[k] for k in difflib.get_close_matches(key, by_key, n=1, cutoff=0.6)]
    hint = f"; did you mean {near[0]}?" if near else "; `sdlora defaults` lists all settings"
    return f"{where}: unknown setting {path}{hint}" if where else f"unknown setting {path}{hint}"


_PHRASES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "literal_error": "must be {expected}",
    "finite_number": "must be a finite number",
}


def _explain(error: Any, known: set[str]) -> str:
    path = ".".join(str(part) for part in error["loc"][:2])
    kind = error["type"]
    if kind == "extra_forbidden":
        if path in Config.model_fields or "." not in path:
            near = difflib.get_close_matches(path, [*Config.model_fields, *known], n=1)
            keys = [s.path for s in all_settings() if s.key == path]
            hint = f"; did you mean {(keys or near)[0]}?" if keys or near else ""
            return f"unknown setting {path}{hint}"
        return _unknown(path, known, "")
    if kind in _PHRASES:
        context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()}
        phrase = _PHRASES[kind].format(**context)
    else:
        phrase = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{path} {phrase}, got {_seen(error['input'])}"


def _seen(value: Any) -> str:
    # A flag's value arrives as text; "-1" in quotes would look as if the quotes were the problem.
    try:
        float(value)
    except (TypeError, ValueError):
        return repr(value)
    return str(value)


def _report(problems: list[str], file: Path | None) -> str:
    where = f" (file: {file})" if file else ""
    if len(problems) == 1:
        return problems[0] + where
    return f"{len(problems)} problems in the configuration{where}:\n" + "\n".join(f"  - {p}" for p in problems)


def _contradictions(config: Config) -> list[str]:
    problems = []
    if config.train.steps and config.train.epochs:
        problems.append("train.steps and train.epochs both say how long to train; give one of them")
    conv = config.lora.conv_rank is not None or config.lora.conv_alpha is not None
    if conv and config.lora.targets != "conv":
        problems.append(f'lora.conv_rank and lora.conv_alpha need lora.targets = "conv", got {config.lora.targets!r}')
    if config.data.num_crops != Config().data.num_crops and config.data.crop != "random":
        problems.append('data.num_crops has no effect unless data.crop = "random"')
    if config.data.keep_tags and not config.data.shuffle_tags:
        problems.append("data.keep_tags has no effect unless data.shuffle_tags is on")
    if config.data.trigger_place != "front" and not config.data.trigger.strip():
        problems.append("data.trigger_place has no effect without data.trigger")
    if config.optimizer.text_encoder_learning_rate and not config.lora.text_encoder:
        problems.append("optimizer.text_encoder_learning_rate has no effect unless lora.text_encoder is on")
    if config.lora.text_encoder_stop != 1 and not config.lora.text_encoder:
        problems.append("lora.text_encoder_stop has no effect unless lora.text_encoder is on")
    name = config.output.name
    if name is not None and (not name.strip() or any(c in name for c in '/\\:*?"<>|{') or name.startswith(".")):
        problems.append(f"output.name must be a plain file name without an ending, got {name!r}")
    return problems


def to_toml(config: Config, *, comments: bool = False) -> str:
    """Writes a configuration as TOML that `load_config` reads back to an equal one.

    Args:
        config: what to write.
        comments: whether each setting is preceded by its help; derived ones are then shown commented out.
    """
    lines: list[str] = []
    section = None
    for s in all_settings():
        if s.section != section:
            section = s.section
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        value = getattr(getattr(config, s.section), s.key)
        if comments:
            lines.append(f"# {s.field.description}")
        if value is not None:
            lines.append(f"{s.key} = {_toml(value)}")
        elif comments:
            lines.append(f"# {s.key} =")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text) + '"'
