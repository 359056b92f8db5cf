"""What may stand in a file that is given to others: names, but no folders of the user.

A LoRA goes to people whom its maker has never met, and a path tells them a user name at the least.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sdlora.config import Config


def shareable(name: str) -> str:
    """Returns a base's name as it may stand in a file for others: of a path only its last part.

    Args:
        name: an alias or a hub id, which stay as they are, or a path.
    """
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".") and not Path(name).exists():
        return name
    return _last(name)


def repository(name: str) -> str:
    """Returns the hub id behind an alias, else what `shareable` makes of a base's name."""
    from sdlora.families.loading import ALIASES  # here, for it brings all of diffusers along

    return ALIASES.get(name, shareable(name))


def without_folders(config: Config) -> Config:
    """Keeps of every path its last part: a shared file tells nobody's user name."""
    named = {key: shareable(name) for key in ("model", "vae", "text_encoders") if (name := getattr(config.base, key))}
    sections: dict[str, Any] = {"base": config.base.model_copy(update=named)}
    for name in ("data", "samples", "output"):
        section = getattr(config, name)
        paths = {key: Path(_last(str(value))) for key, value in section if isinstance(value, Path)}
        sections[name] = section.model_copy(update=paths)
    return config.model_copy(update=sections)


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
