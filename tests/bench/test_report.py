import json
from dataclasses import asdict

import pytest

from sdlora.errors import ConfigError
from tools.bench import __main__ as bench
from tools.bench.measure import Spread
from tools.bench.report import BEGIN, END, HEADS, table, write_readme, write_report
from tools.bench.results import OURS, OUT_OF_MEMORY, REFERENCE, RowResult, complete
from tools.bench.rows import ROWS, choose_rows

MACHINE = {
    "environment": {
        "date": "2026-11-25",
        "processor": "A Processor",
        "threads": 2,
        "instructions": ["avx2", "avx512_bf16"],
        "packages": {"torch": "2.13.0", "diffusers": "0.42.1", "peft": "0.21.2"},
    },
    "flop_per_second": {"bf16": 1e12},
}


@pytest.fixture
def measured() -> dict:
    found = RowResult(ratio=Spread(2.0, 1.9, 2.1), rounds=9, checked=True)
    for name, seconds, operations in ((REFERENCE, 2.0, 4000), (OURS, 1.0, 1000)):
        side = found.sides[name]
        side.seconds, side.operations, side.worst_cosine = Spread(seconds, seconds, seconds), operations, 0.99951
        side.peak_bytes = int(seconds * 2e9)
    return complete(asdict(found), flop=250 * 10**9, rate=1e12)


def cells(text, title):
    line = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_measured_row(measured):
    text = table({**MACHINE, "rows": {"cpu-sd15-256-b1": measured}, "left_out": []})
    assert cells(text, "SD 1.5, 256², batch 1")[1:] == [
        "1", "0.5", "**2.00** [1.90, 2.10]", "25%", "2.00 GB (0.50×)", "4.00 GB", "1,000 (0.25×)", "4,000", "0.99951",
        "0.99951",
    ]  # fmt: skip
    assert "A Processor, 2 threads (avx512_bf16); torch 2.13.0, diffusers 0.42.1, peft 0.21.2; 2026-11-25." in text


def test_what_was_not_measured_is_said(measured):
    measured["sides"][REFERENCE] |= {"problem": OUT_OF_MEMORY, "seconds": None, "steps_per_second": None}
    measured |= {"ratio": None, "memory_ratio": None}
    alone = {**measured, "together": False}
    wrong = {**measured, "objection": "the loss is 9% off"}
    rows = {
        "sdxl-1024-b1": alone,
        "sdxl-1024-b4": measured,
        "sd15-512-b1": wrong,
        "sd15-512-b2": {"error": "stopped after 300 s"},
    }
    text = table({**MACHINE, "rows": rows, "left_out": ["sd15-512-b8"]})
    assert cells(text, "SDXL, 1024², batch 1")[3] == "–, one after the other"
    assert cells(text, "SDXL, 1024², batch 4")[2:4] == [OUT_OF_MEMORY, "–"]
    assert cells(text, "SD 1.5, 512², batch 1")[1] == "not timed: the loss is 9% off"
    assert cells(text, "SD 1.5, 512², batch 2")[1] == "stopped after 300 s"
    assert all(line.count("|") == len(HEADS) + 1 for line in text.splitlines() if line.startswith("|"))
    assert "Left out, for the time was used up: sd15-512-b8." in text


def test_the_report_is_read_back(measured, tmp_path):
    file = tmp_path / "speed" / "cpu.json"
    write_report(file, MACHINE, {"cpu-nano-b1": measured}, [])
    assert table(json.loads(file.read_text(encoding="utf-8"))) in file.with_suffix(".md").read_text(encoding="utf-8")


def test_the_readme_keeps_all_but_the_table(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    for _ in range(2):
        write_readme(readme, "| new \\1 |")
        assert readme.read_text(encoding="utf-8") == f"above\n{BEGIN}\n| new \\1 |\n{END}\nbelow\n"


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_the_marks_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="needs one"):
        write_readme(readme, "table")
    assert readme.read_text(encoding="utf-8") == text


def test_rows_are_chosen_by_kind_or_name_in_the_order_of_the_table():
    assert {row.group for row in choose_rows("cpu")} == {"cpu"}
    assert [row.name for row in choose_rows("sdxl-1024-b4, sd15-512-b1")] == ["sd15-512-b1", "sdxl-1024-b4"]
    with pytest.raises(ConfigError, match="no row is called sd15-512-b3"):
        choose_rows("sd15-512-b3")
    assert len({row.title for row in ROWS.values() if row.group == "gpu"}) == len(choose_rows("gpu"))


@pytest.fixture
def jobs(monkeypatch, measured):
    """Records what would be measured, and answers with ready numbers; each job takes a second."""
    done = []

    def run_job(job, **options):
        done.append((job, options.get("row")))
        answers = {"machine": MACHINE, "speed": json.loads(json.dumps(measured))}
        return answers[job]

    monkeypatch.setattr(bench, "run_job", run_job)
    monkeypatch.setattr(bench.time, "monotonic", lambda: float(len(done)))
    monkeypatch.setattr(bench, "count_flop", lambda row: 10**9)
    return done


def test_the_bench_measures_the_machine_and_then_each_row(jobs, tmp_path):
    out = tmp_path / "out.json"
    assert bench.main(["--rows", "cpu-nano-b1", "--out", str(out)]) == 0
    assert jobs == [("machine", None), ("speed", "cpu-nano-b1")]
    assert json.loads(out.read_text(encoding="utf-8"))["rows"]["cpu-nano-b1"]["memory_ratio"] == 0.5


def test_no_row_begins_when_the_time_is_used_up(jobs, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert bench.main(["--rows", "cpu-nano-b1,cpu-nano-b4", "--seconds", "1", "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["left_out"] == ["cpu-nano-b1"]
    assert "left out: cpu-nano-b1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "said"), [("nonsense", "no row is called"), ("cpu-nano-b1,sd15-512-b1", "separate reports")]
)
def test_what_cannot_be_measured_is_refused(rows, said, capsys):
    assert bench.main(["--rows", rows]) == 2
    assert said in capsys.readouterr().err
