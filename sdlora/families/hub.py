"""The Hugging Face hub: what is in the cache, and fetching what the user asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from sdlora.errors import ModelError
from sdlora.families.folders import weights_variant

_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "transformer")
_SMALL = (".json", ".txt", ".model")


def looks_like_id(text: str) -> bool:
    """Tells whether a text has the form owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and ".." not in text


def cached(repository: str) -> Path | None:
    """Returns the folder of a repository in the local cache if its weights are all there; touches no network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except Exception:  # not cached: the hub raises several kinds, by version
        return None
    needed = [name for name in _COMPONENTS[:3] if weights_variant(folder / name) is None]
    return None if needed or not (folder / "model_index.json").is_file() else folder


def download(repository: str, announce: Callable[[str], None]) -> Path:
    """Fetches a diffusers repository: configurations and one set of safetensors weights, fp16 where there is one.

    Raises:
        ModelError: telling apart: the hub cannot be reached, no such repository, one that needs a login.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ModelError(f"{repository} is not in the hub cache and HF_HUB_OFFLINE is set; {_ALTERNATIVES}")
    try:
        info = HfApi().model_info(repository, files_metadata=True, timeout=20)
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
        files = wanted_files(list(sizes))
        announce(f"downloading {repository}: {sum(sizes[f] for f in files) / 1e9:.1f} GB, once")
        return Path(snapshot_download(repository, allow_patterns=files))
    except GatedRepoError as error:
        raise ModelError(f"{repository} needs a licence accepted on the hub and a login (`hf auth login`)") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no public repository {repository}; check the spelling, or log in") from error
    except OfflineModeIsEnabled as error:
        raise ModelError(
            f"{repository} is not in the hub cache and the hub is switched off; {_ALTERNATIVES}"
        ) from error
    except OSError as error:
        raise ModelError(f"cannot fetch {repository}: {error}; {_ALTERNATIVES}") from error
    except Exception as error:  # the hub's HTTP library has its own connection errors
        if "connect" in type(error).__name__.lower() or "timeout" in type(error).__name__.lower():
            raise ModelError(f"cannot reach the hub to fetch {repository} ({error}); {_ALTERNATIVES}") from error
        raise


_ALTERNATIVES = "use --base nano, or --base with a diffusers folder on this machine"


def wanted_files(files: list[str]) -> list[str]:
    """Picks what to fetch from a repository's file list.

    All small files, and per component the fp16 weights if there are any, else the plain ones; no pickles, no other
    formats, no safety checker.
    """
    wanted = []
    for file in files:
        folder, _, name = file.rpartition("/")
        if file.startswith("safety_checker/") or folder.count("/"):
            continue
        if name.endswith(_SMALL) and (folder or name == "model_index.json"):
            wanted.append(file)
        elif name.endswith(".safetensors") and folder in _COMPONENTS and _stem(name) is not None:
            half = [f for f in files if f.startswith(f"{folder}/") and f.endswith(".safetensors") and ".fp16" in f]
            if (".fp16" in name) == bool(half):
                wanted.append(file)
    return wanted


def _stem(name: str) -> str | None:
    match = re.fullmatch(r"(diffusion_pytorch_model|model)(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors", name)
    return match[1] if match else None
