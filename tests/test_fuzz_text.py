"""Whatever is typed or written into a text file is read or refused; `tools/fuzz_text.py` tries five thousand each."""

import pytest

from tools.fuzz_text import SUBJECTS, run


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_text_ends_in_a_traceback(name, tmp_path, capsys):
    run(name, 100, tmp_path)
