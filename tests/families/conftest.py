"""The tiny bases as single files, and ways to spoil them."""

import pytest
from families.compare import parts_of
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

from sdlora.container import open_container
from sdlora.families import FAMILIES
from sdlora.families.save_single import save_single


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, tiny_sd1, tiny_sd2, tiny_sdxl):
    """Family -> (folder, the single file made from it)."""
    root = tmp_path_factory.mktemp("single")
    folders = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
    for name, folder in folders.items():
        save_single(folder, root / f"{name}.safetensors")
    return {name: (folder, root / f"{name}.safetensors") for name, folder in folders.items()}


@pytest.fixture(scope="session")
def references(pairs):
    """Family -> the folder, loaded."""
    return {name: parts_of(folder) for name, (folder, _) in pairs.items()}


@pytest.fixture(params=list(FAMILIES))
def pair(request, references, pairs):
    """The folder, loaded, and the file."""
    return references[request.param], pairs[request.param][1]


@pytest.fixture
def edited(pairs, tmp_path):
    """Writes a tiny single file with other tensors or metadata."""

    def write(name, edit=lambda tensors: None, **metadata):
        file = pairs[name][1]
        tensors = read_tensors(file)
        tensors = edit(tensors) or tensors
        with_metadata = dict(open_container(file).metadata) | metadata
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "m.safetensors", with_metadata
        )
        return tmp_path / "m.safetensors"

    return write
