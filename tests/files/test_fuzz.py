"""Whatever is done to a file's bytes, reading it ends well; `tools/fuzz_files.py` does it ten thousand times."""

from tools.fuzz_files import run


def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path):
    outcome = run(300, seed=1, folder=tmp_path)
    assert outcome.faults == []
    assert {result.split(": ")[1] for result in outcome.results} == {"read", "LoraFileError", "ModelError"}
