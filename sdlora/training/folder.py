"""The folder of a run: what lies where, how it is claimed, and the log of its steps."""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.atomic import explained, free_space, write_text
from sdlora.config import Config
from sdlora.config_io import load_config, to_toml
from sdlora.errors import ConfigError, TrainingError
from sdlora.faults import place
from sdlora.paths import expanded

MAY_CHANGE = {
    *("train.steps", "train.epochs", "train.stop_at", "train.threads", "train.precision"),
    *("train.memory", "train.offload", "train.gradient_checkpointing"),  # they do not change what is computed
    *("data.batch_size", "train.micro_batch"),  # with another number of processes they give the same steps
    *("data.images", "data.cache_dir"),  # the pictures may have moved; a checkpoint knows their contents
}
"""Settings that a resumed run may change, besides those that begin with `FREE`; a precision only to the one it had."""
FREE = ("samples.", "output.")


@dataclass(frozen=True)
class RunFolder:
    """Places in a run's folder.

    Attributes:
        root: the folder itself.
        name: stem of the LoRA files.
        changes: settings that a resumed run has otherwise than before, in words.
    """

    root: Path
    name: str
    changes: tuple[str, ...] = ()

    @property
    def lora(self) -> Path:
        """The final LoRA file."""
        return self.root / f"{self.name}.safetensors"

    def epoch_lora(self, epoch: int) -> Path:
        """The LoRA file after an epoch, counted from 1 and numbered as kohya numbers them."""
        return self.root / "epochs" / f"{self.name}-{epoch:06d}.safetensors"

    @property
    def is_complete(self) -> bool:
        """Whether the final LoRA file and its side file, which is written last, are there."""
        return self.lora.is_file() and self.lora.with_suffix(".json").is_file()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of the sample pictures."""
        return self.root / "samples"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, one line a step."""
        return self.root / "metrics.jsonl"

    def log(self, entry: Mapping[str, Any]) -> None:
        """Appends a line to the metrics; JSON has no NaN, so what is not finite becomes null.

        Raises:
            TrainingError: if it cannot be written, for example because the disk is full; no part of the line is left.
        """
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        try:
            with self.metrics.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    file.write(json.dumps(entry).encode() + b"\n")
                    place("metrics written")
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise explained(self.metrics, error) from error

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps beyond `step`, which a resumed run does again."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(self.metrics, "".join(line + "\n" for line in kept))

    def losses(self) -> list[float]:
        """Returns the loss of every step so far, without those that were not finite."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if entry["loss"] is not None]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off by a crash


def run_name(config: Config) -> str:
    """Returns the stem of the LoRA file: the setting, else the image folder's name."""
    if config.output.name:
        return config.output.name
    assert config.data.images is not None
    return re.sub(r"[^\w.-]+", "_", config.data.images.resolve().name).strip("._") or "style"


def choose_folder(config: Config) -> RunFolder:
    """Returns the folder of a new run; writes nothing yet.

    Raises:
        ConfigError: if the folder holds something already.
    """
    name = run_name(config)
    root = config.output.output or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if root.exists() and not root.is_dir():
        raise ConfigError(f"--output {root} is a file; give a folder")
    if root.is_dir() and any(root.iterdir()):
        if (root / "config.toml").is_file():
            raise ConfigError(
                f"--output {root} holds another run; continue it with "
                f"`sdlora train --resume {shlex.quote(str(root))}`, or give another folder"
            )
        raise ConfigError(f"--output {root} is not empty; give a new folder, so that nothing in it can be overwritten")
    return RunFolder(root, name)


def reopen(root: Path, flags: Mapping[str, Any], assignments: tuple[str, ...]) -> tuple[RunFolder, Config]:
    """Opens a run to resume it, with the settings it was started with.

    Args:
        root: its folder.
        flags: settings to change, by `section.key`.
        assignments: the same from `--set`.

    Raises:
        ConfigError: if there is no run, or a setting is to change that the weights learned so far depend on.
    """
    file = root / "config.toml"
    if not file.is_file():
        raise ConfigError(
            f"--resume {root}: no run there (no config.toml); give the folder that `sdlora train` printed"
        )
    old = load_config(file)
    new = load_config(file, flags, assignments)
    changed = {
        f"{section}.{key}": f"{section}.{key} (was {_shown(before)}, now {_shown(after)})"
        for section, values in old
        for key, before in values
        if (after := getattr(getattr(new, section), key)) != before
    }
    fixed = [told for name, told in changed.items() if not name.startswith(FREE) and name not in MAY_CHANGE]
    if fixed:
        raise ConfigError(
            f"--resume {root}: these settings cannot change within a run: {', '.join(fixed)}; start a new one"
        )
    if new.output.output not in (None, old.output.output, root):
        raise ConfigError(f"--resume {root} goes on in that folder; leave --output {new.output.output} out")
    if not any("stop_at" in given for given in (*flags, *assignments)):
        new = _with(new, "train", stop_at=None)  # it said where the earlier session stops
    return RunFolder(root, run_name(new), tuple(changed.values())), new


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Path) else repr(value)


def claim(run: RunFolder, config: Config, *, base: str, anew: bool) -> None:
    """Makes the folder of a run and writes its settings there, with whole paths: it may be resumed from elsewhere.

    Args:
        run: where.
        config: the settings.
        base: the base that was chosen; `auto` might choose another one next time.
        anew: whether the run is new; then nobody else may have claimed the folder in the meantime.

    Raises:
        ConfigError: if another run was faster.
        TrainingError: if it cannot be written.
    """
    assert config.data.images is not None
    try:
        if anew:
            run.root.mkdir(parents=True, exist_ok=True)
            run.config.touch(exist_ok=False)
    except FileExistsError:
        raise ConfigError(f"{run.root} was taken by another run in the meantime; give another --output") from None
    except OSError as error:
        raise explained(run.config, error) from error
    config = _with(config, "data", images=config.data.images.resolve())
    if config.data.cache_dir:
        config = _with(config, "data", cache_dir=config.data.cache_dir.resolve())
    if isinstance(config.samples.sample_prompts, Path):
        config = _with(config, "samples", sample_prompts=config.samples.sample_prompts.resolve())
    folder = expanded(base)
    config = _with(config, "base", model=str(folder.resolve()) if folder.is_dir() else base)
    write_text(run.config, to_toml(config))


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def require_space(root: Path, needed: int) -> None:
    """Checks the free disk space before hours of work.

    Raises:
        TrainingError: if fewer than `needed` bytes are free where `root` lies, or will lie.
    """
    _, free = free_space(root)
    if free < needed:
        raise TrainingError(
            f"{root} has {free / 1e6:.0f} MB free, and this run writes up to {needed / 1e6:.0f} MB; free some, "
            "raise output.save_every, or give another --output"
        )
