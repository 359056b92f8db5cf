import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.bench.wheels import needed

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_bench.sh"


def test_all_is_carried_but_torch_and_what_only_torch_needs():
    found = needed("3.12")
    project = Path(__file__).parents[2] / "pyproject.toml"
    names = {Requirement(line.strip(' ",')).name for line in _dependencies(project.read_text(encoding="utf-8"))}
    assert names - {"torch"} <= found.keys()
    assert {"peft", "pydantic-core", "tokenizers", "psutil"} <= found.keys()
    assert needed("3.12", ["NumPy"]).keys() == found.keys() - {"numpy"}
    assert not {"torch", "sympy", "networkx", "jinja2", "sdlora"} & found.keys()


def _dependencies(project):
    return project.split("dependencies = [\n")[1].split("]")[0].strip().splitlines()


def test_the_script_says_how_it_is_called(tmp_path):
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    for arguments, said in (((), "--fill WHEELS"), ((tmp_path,), "no wheels in")):
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_versions_are_those_installed_here(python):
    from importlib.metadata import version

    assert all(version(name) == found for name, found in needed(python).items())
