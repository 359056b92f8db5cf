"""`sdlora report` packs what helps, and no secret."""

import json
import zipfile
from pathlib import Path

import pytest

from sdlora.cli.main import main
from sdlora.cli.report import redacted


def test_a_report_holds_environment_settings_and_the_end_of_the_log_and_no_secret(tmp_path, monkeypatch, capsys):
    token, home = "hf_" + "AbCdEf0123456789", str(Path.home())
    monkeypatch.setenv("MY_SERVICE_TOKEN", "quite-a-secret")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(
        f'[base]\nmodel = "https://me:pass@example.org/x?{token}"\n[data]\nimages = "{home}/pictures/quite-a-secret"\n'
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(500)))
    (run / "heartbeat.json").write_text("{}")
    (run / "style.safetensors").write_bytes(b"weights")
    main(["report", str(run), "-o", str(tmp_path / "r.zip")])
    with zipfile.ZipFile(tmp_path / "r.zip") as packed:
        texts = {name: packed.read(name).decode() for name in packed.namelist()}
    assert set(texts) == {"environment.json", "config.toml", "heartbeat.json", "metrics.jsonl"}
    everything = "".join(texts.values())
    for secret in (token, "quite-a-secret", "me:pass", home + "/"):
        assert secret not in everything
    assert "~/pictures/[hidden]" in texts["config.toml"]
    assert [json.loads(line)["step"] for line in texts["metrics.jsonl"].splitlines()] == list(range(300, 500))
    assert "versions" in json.loads(texts["environment.json"])
    assert "r.zip" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["report", "nowhere"], ["report", "-o", "there.zip"]])
def test_what_cannot_be_reported_is_said(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.zip").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "Error: " in capsys.readouterr().err
    assert (tmp_path / "there.zip").read_bytes() == b""


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("token=hf_abcdefghijKLMNOP end", "token=[hidden] end"),
        ("ghp_0123456789abcdef", "[hidden]"),
        ("https://user:pw@host/x", "https://[hidden]@host/x"),
        ("shelf_abcdefghijkl and risk-taking are words", "shelf_abcdefghijkl and risk-taking are words"),
    ],
)
def test_tokens_are_hidden_and_words_are_not(text, left):
    assert redacted(text) == left
