"""What the program never does, read off its source: run code from files, fetch code, start a shell."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sdlora"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "os.system"}
FORBIDDEN_MODULES = {"pickle", "dill", "shelve", "marshal", "subprocess"}
STARTS_PROCESSES = {("data", "workers.py"), ("cli", "processes.py")}
"""The files that may start programs, and then only Python itself with this package, and no shell."""
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "shell"}
WEIGHTS_ONLY = Path("families", "pickles.py")
"""The one file that may call `torch.load`, and only as the reader that runs none of a pickle's code."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_code_from_elsewhere_is_run(path):
    forbidden = FORBIDDEN_MODULES - ({"subprocess"} if path.parts[-2:] in STARTS_PROCESSES else set())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call == "torch.load" and Path(*path.parts[-2:]) == WEIGHTS_ONLY:
                assert "weights_only=True" in map(ast.unparse, node.keywords), ast.unparse(node)
            else:
                assert call not in FORBIDDEN_CALLS, ast.unparse(node)
            assert not {k.arg for k in node.keywords} & FORBIDDEN_ARGUMENTS, ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & forbidden
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in forbidden


def test_imports_point_one_way():
    """`cli → training → sampling → {files, data} → families → {adapters, diffusion} → {config, atomic, errors}`."""
    floors = [("cli",), ("training",), ("sampling",), ("files", "data"), ("families",), ("adapters", "diffusion")]
    floor_of = {room: number for number, rooms in enumerate(floors) for room in rooms}
    for path in SOURCES:
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdlora."):
                target = (node.module or "").split(".")[1]
                if room in floor_of and target in floor_of and target != room:
                    assert floor_of[target] > floor_of[room], f"{path.name} imports {node.module}"
