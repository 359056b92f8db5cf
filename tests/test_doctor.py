"""The doctor: one report, shown three ways, with advice that can be followed."""

import json
from io import StringIO

import pytest
from click.testing import CliRunner
from rich.console import Console

from sdlora.cli import doctor
from sdlora.training.survey import advice_on_room, advice_on_versions, survey


@pytest.fixture(scope="module")
def report():
    return survey()


def test_training_can_run_where_the_tests_run(report):
    assert report["can_train"]
    assert {row["name"] for row in report["versions"]} >= {"sdlora", "python", "torch", "diffusers", "transformers"}
    assert all(row["ok"] for row in report["versions"])
    assert {row["format"]: row["ok"] for row in report["precision"]}["fp32"]
    assert any(row["ok"] for row in report["attention"])
    assert report["devices"][-1]["device"] == "cpu"
    assert next(row["here"] for row in report["models"] if row["base"] == "nano")


def test_every_automatic_choice_has_a_reason(report):
    assert [row["what"] for row in report["auto"]] == ["base", "device", "precision", "attention"]
    assert all(row["choice"] and row["why"] for row in report["auto"])


def test_the_report_says_what_training_would_choose(report):
    from sdlora.training.precision import choose_device, choose_precision

    chosen = {row["what"]: row["choice"] for row in report["auto"]}
    assert chosen["device"] == str(choose_device())
    assert chosen["precision"] == choose_precision("auto", choose_device()).word


def test_json_is_one_object_and_the_exit_code_is_0():
    result = CliRunner().invoke(doctor.command, ["--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["can_train"] is True


def test_a_pipe_gets_plain_lines():
    result = CliRunner().invoke(doctor.command)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout and "─" not in result.stdout
    assert result.stdout.rstrip().endswith("Training can run here.")


def test_a_terminal_gets_the_same_facts_in_tables(report):
    out = StringIO()
    doctor.show_tables(report, Console(file=out, width=250))
    text = out.getvalue()
    for title, headings, rows in doctor.lay_out(report):
        assert title in text and all(heading in text for heading in headings)
        assert all(cell in text for row in rows for cell in row)


def test_text_in_brackets_is_shown_not_obeyed(report):
    out = StringIO()
    doctor.show_tables({**report, "advice": ["pip install 'sdlora[xformers]'"]}, Console(file=out, width=200))
    assert "sdlora[xformers]" in out.getvalue()


def test_a_report_without_torch_can_still_be_shown(report):
    empty = {"devices": [], "precision": [], "attention": [], "models": [], "auto": [], "folders": []}
    text = doctor.plain({**report, **empty, "advice": ["a library does not load"], "can_train": False})
    assert "Devices" not in text and "Training cannot run here yet." in text


def test_missing_and_unfit_libraries_get_a_line_that_can_be_pasted():
    rows = [
        {"name": "torch", "version": "2.4.0", "wants": ">=2.11, <2.14", "ok": False},
        {"name": "rich", "version": None, "wants": ">=14, <16", "ok": False},
        {"name": "numpy", "version": "2.4.6", "wants": ">=2.0, <3", "ok": True},
    ]
    assert advice_on_versions(rows) == [
        "torch 2.4.0 does not fit: pip install 'torch>=2.11,<2.14'",
        "rich is missing: pip install 'rich>=14,<16'",
    ]


def test_little_room_is_told(report):
    folders = [
        {"what": "runs", "folder": "runs", "free_gb": 0.5, "writable": True},
        {"what": "latents", "folder": "cache", "free_gb": 90.0, "writable": False},
    ]
    told = advice_on_room({**report, "folders": folders, "machine": {**report["machine"], "memory_gb": 2.0}})
    assert any("only 0.5 GB free for runs" in line for line in told)
    assert any("latents cannot be written" in line for line in told)
    assert any("only 2.0 GB of memory" in line for line in told)
