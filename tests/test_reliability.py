"""The contract in `docs/reliability.md` names tests for each of its sentences; they must be there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.findall(r"^`(tests/\S+\.py)::(\w+)`$", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_the_test_of_a_promise_exists(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("## Exit codes")[0]
    for paragraph in re.split(r"\n\n(?=\*\*)", text)[1:]:
        assert "\n`tests/" in paragraph, paragraph
    assert len(NAMED) > 20
