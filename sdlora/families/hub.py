"""The Hugging Face hub: what is in the cache, and fetching what the user asked for.

A name on the hub is `owner/name`, a diffusers repository or one with a single checkpoint in it, or
`owner/name/file.safetensors`, one file of many. Configurations come first, so that a model that cannot be trained is
refused before its gigabytes are fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sdlora.errors import ModelError
from sdlora.families.components import identify_folder
from sdlora.families.folders import read_json, weights_variant

_WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_SMALL = (".json", ".txt", ".model")
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_CHECKPOINT_BYTES = 1_000_000_000
"""A root .safetensors below this is a LoRA, a VAE or an embedding; the smallest base in half precision has 1.7 GB."""


def looks_like_id(text: str) -> bool:
    """Tells whether a text has the form owner/name or owner/name/file.safetensors."""
    match = re.fullmatch(r"[\w.-]+/([\w.-]+)(/[^/\\:]+)*", text)
    if match is None or ".." in text or match[1].endswith(_FILES):
        return False
    return match[2] is None or text.endswith(".safetensors")


def _split(identifier: str) -> tuple[str, str | None]:
    owner, name, *file = identifier.split("/")
    return f"{owner}/{name}", "/".join(file) or None


def cached(identifier: str, revision: str | None = None) -> Path | None:
    """Returns what is in the local cache, if all of it is there; touches no network.

    A repository without model_index.json is never found under its bare name: whether it holds one checkpoint or
    several, only the hub knows.

    Args:
        identifier: owner/name or owner/name/file.safetensors.
        revision: branch, tag or commit.

    Returns:
        A diffusers folder, or the file that was named.
    """
    repository, file = _split(identifier)
    folder = _snapshot(repository, revision)
    if folder is None:
        return None
    if file is not None:
        return folder / file if (folder / file).is_file() else None
    return folder if _is_complete(folder) else None


def _snapshot(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception as error:  # not cached: the hub's library raises several kinds, by version
        # Newer ones call a snapshot incomplete that lacks any file of the repository, and we never fetch all of them.
        path = getattr(error, "snapshot_path", None)
        return Path(path) if path else None


def _is_complete(folder: Path) -> bool:
    try:
        components = _components(folder)
        weights = all(_has_weights(folder / name) for name in components)
    except ModelError:
        return False
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in components if name.startswith("text_encoder")]
    words = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    return (
        weights
        and (folder / "scheduler" / "scheduler_config.json").is_file()
        and all(any(all((folder / t / f).is_file() for f in files) for files in words) for t in tokenizers)
    )


def _components(folder: Path) -> list[str]:
    """Returns the parts with weights that a diffusers folder says it has."""
    index = read_json(folder / "model_index.json")
    return [name for name in _WITH_WEIGHTS if isinstance(kind := index.get(name), list) and kind and kind[0]]


def _has_weights(place: Path) -> bool:
    pieces = [read_json(index).get("weight_map", {}) for index in place.glob("*.safetensors.index*.json")]
    return (
        (place / "config.json").is_file()
        and weights_variant(place) is not None
        and all((place / piece).is_file() for table in pieces for piece in set(table.values()))
    )


def download(identifier: str, announce: Callable[[str], None], revision: str | None = None) -> Path:
    """Fetches a base: of a diffusers repository the configurations and one set of weights, else one checkpoint.

    Args:
        identifier: owner/name or owner/name/file.safetensors.
        announce: told the size before the weights are fetched.
        revision: branch, tag or commit.

    Returns:
        A diffusers folder, or a single file.

    Raises:
        ModelError: telling apart: the hub cannot be reached or is switched off; a login or a licence is needed; there
            is no such repository, revision or file; it holds nothing that can be trained, or pickles only.
    """
    from huggingface_hub import HfApi

    repository, file = _split(identifier)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ModelError(
            f"{identifier} is not in the hub cache and HF_HUB_OFFLINE is set; {_alternatives(repository, revision)}"
        )
    with _explained(identifier, repository, revision):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=20)
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
        if file is None and "model_index.json" in sizes:
            return _fetch_folder(repository, revision, sizes, announce)
        return _fetch_file(repository, revision, sizes, file or _only_checkpoint(repository, sizes), announce)


def _fetch_folder(
    repository: str, revision: str | None, sizes: Mapping[str, int], announce: Callable[[str], None]
) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=configurations(sizes)))
    identify_folder(folder)
    components = _components(folder)
    weights = weight_files(sizes, components)
    absent = [name for name in components if not any(file.startswith(f"{name}/") for file in weights)]
    if absent:
        pickles = [f for f in sizes if f.split("/")[0] in absent and f.endswith(_FILES[1:])]
        hint = f"; {pickles[0]} is a pickle, which can run code and is not fetched" if pickles else ""
        raise ModelError(
            f"{repository} holds no .safetensors weights of its {', '.join(absent)}{hint}. Choose another repository, "
            "or another --revision"
        )
    announce(f"downloading {repository}: {sum(sizes[f] for f in weights) / 1e9:.1f} GB, once")
    return Path(snapshot_download(repository, revision=revision, allow_patterns=weights))


def _fetch_file(
    repository: str, revision: str | None, sizes: Mapping[str, int], file: str, announce: Callable[[str], None]
) -> Path:
    from huggingface_hub import hf_hub_download

    if file not in sizes:
        raise ModelError(f"{repository} holds no {file}; {_choice(repository, sizes)}")
    found = cached(f"{repository}/{file}", revision)
    if found:
        return found
    announce(f"downloading {file} of {repository}: {sizes[file] / 1e9:.1f} GB, once")
    return Path(hf_hub_download(repository, file, revision=revision))


def _only_checkpoint(repository: str, sizes: Mapping[str, int]) -> str:
    found = _checkpoints(sizes)
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(f"{repository} holds {len(found)} checkpoints; {_choice(repository, sizes)}")
    pickles = [name for name in sizes if name.endswith(_FILES[1:])]
    if pickles:
        raise ModelError(
            f"{repository} holds pickles only ({pickles[0]}), which can run code and are not fetched; choose another "
            "repository, or fetch the file yourself and convert it with --allow-pickle"
        )
    raise ModelError(
        f"{repository} holds no base model: no model_index.json, and at its root no .safetensors file over "
        f"{_CHECKPOINT_BYTES / 1e9:.0f} GB; a LoRA or a VAE is no base"
    )


def _checkpoints(sizes: Mapping[str, int]) -> list[str]:
    return [f for f, size in sizes.items() if "/" not in f and f.endswith(".safetensors") and size > _CHECKPOINT_BYTES]


def _choice(repository: str, sizes: Mapping[str, int]) -> str:
    found = _checkpoints(sizes)
    if not found:
        return "it holds no checkpoint at its root"
    return "name one: " + ", ".join(f"--base {repository}/{file}" for file in found[:6])


@contextmanager
def _explained(identifier: str, repository: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's library raises into what the person at the terminal can do."""
    from huggingface_hub import errors as hub

    others = _alternatives(repository, revision)
    local = f". There is no file {identifier} on this machine either" if identifier != repository else ""
    try:
        yield
    except hub.GatedRepoError as error:
        page = f"https://huggingface.co/{repository}"
        raise ModelError(f"{repository} needs its licence accepted on {page}, and a login (`hf auth login`)") from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no branch, tag or commit {revision!r}; check --revision") from error
    except hub.RepositoryNotFoundError as error:
        if _status(error) == 401:  # the hub does not tell strangers which
            raise ModelError(
                f"the hub has no repository {repository}, or it is private; check the spelling, or log in "
                f"(`hf auth login`){local}"
            ) from error
        raise ModelError(f"the hub has no repository {repository}; check the spelling{local}") from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        raise ModelError(f"{identifier} is not in the hub cache and the hub is out of reach; {others}") from error
    except hub.HfHubHTTPError as error:
        advice = {401: "log in again (`hf auth login`)", 403: "your login may not read it; see what its token is for"}
        what = advice.get(_status(error) or 0, "try again later")
        raise ModelError(f"the hub answers {_status(error)} for {repository}; {what}") from error
    except OSError as error:
        raise ModelError(f"cannot fetch {identifier}: {error}; {others}") from error
    except Exception as error:  # the hub's HTTP library, which changes with its version, has its own connection errors
        kinds = " ".join(kind.__name__ for kind in type(error).__mro__).lower()
        if not any(word in kinds for word in ("connect", "timeout", "transport")):
            raise
        raise ModelError(f"cannot reach the hub to fetch {identifier} ({error}); {others}") from error


def _alternatives(repository: str, revision: str | None) -> str:
    folder = _snapshot(repository, revision)
    files = sorted(path.name for path in folder.glob("*.safetensors")) if folder else []
    if files:
        return f"this file of it is there: --base {repository}/{files[0]}"
    return "use --base nano, or --base with a diffusers folder or a .safetensors file on this machine"


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def configurations(files: Iterable[str]) -> list[str]:
    """Picks what a diffusers repository says of itself: all small files except those that belong to weights."""
    return [
        file
        for file in files
        if file == "model_index.json"
        or (file.count("/") == 1 and file.endswith(_SMALL) and ".index." not in file and not _is_unused(file))
    ]


def _is_unused(file: str) -> bool:
    return file.startswith(("safety_checker/", "feature_extractor/"))


_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(\.fp16)?(?:-\d+-of-\d+)?(\.fp16)?\.safetensors(?:\.index(\.fp16)?\.json)?"
)


def weight_files(files: Collection[str], components: Collection[str]) -> list[str]:
    """Picks one set of weights for each component: fp16 if there is one, else the plain one; no pickles.

    Checkpoints at the root, exponential averages and other formats are left out.
    """
    wanted = []
    for component in components:
        halves: dict[bool, list[str]] = {True: [], False: []}
        for file in files:
            folder, _, name = file.rpartition("/")
            match = _WEIGHTS.fullmatch(name) if folder == component else None
            if match:
                halves[any(match.groups())].append(file)
        wanted += halves[True] or halves[False]
    return wanted
