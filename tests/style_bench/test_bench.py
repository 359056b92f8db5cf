import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.config import DataSection
from sdlora.data.cache import Cache
from sdlora.data.dataset import prepare
from sdlora.data.folder import scan
from sdlora.errors import ConfigError
from sdlora.families import Base
from tools.pretrain_nano.sources import BASE_STYLES, STYLES
from tools.style_bench import __main__ as bench
from tools.style_bench import draw, experiment, heldout, methods, options, protocol, references
from tools.style_bench.gates import Gates
from tools.style_bench.panel import Panel
from tools.style_bench.report import warning


@pytest.fixture
def emoji(tmp_path):
    """A data set of 18 concepts in some styles, each picture a blot of its own."""
    rows = []
    for i in range(18):
        split = "learn" if i < 9 else "prompts"
        rows.append({"code": f"{i:04x}", "label": f"thing {i}", "tags": [], "group": "objects", "base": f"thing {i}"})
        rows[-1]["split"] = split
    folder = tmp_path / "emoji"
    rng = np.random.default_rng(0)
    for style in ("fluent-3d", *BASE_STYLES):
        (folder / "pictures" / style).mkdir(parents=True)
        for row in rows:
            blot = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((128, 128), 0)
            blot.save(folder / "pictures" / style / f"{row['code']}.png", compress_level=1)
    (folder / "concepts.json").write_text(json.dumps(rows))
    (folder / "manifest.json").write_text("{}")
    return folder


REFERENCES = ("--full-steps", "2", "--oracle-steps", "2", "--full-rate", "1e-3", "--oracle-rate", "1e-3")
METHOD_CHOICE = {"methods": ("lora",), "references": ("words", "full", "oracle"), "subsets": 1}


class StubJudges:
    styles = (*(style.id for style in STYLES if style.role != "twin"), "none")

    def style_features(self, pictures):
        return torch.nn.functional.adaptive_avg_pool2d(pictures, 3).flatten(1)

    def style_logits(self, pictures):
        return self.style_features(pictures)[:, : len(self.styles)]

    concept_embeddings = style_features


class StubGallery:
    def __init__(self, style, embed):
        assert embed("noto", ["0009"]).shape == (1, 27)

    def ranks(self, embeddings, truth):
        return torch.arange(len(truth)) % 2 * 7


@pytest.fixture
def run(monkeypatch, tmp_path, emoji, tiny_base):
    """Runs the bench with a tiny base, stub judges and two steps of everything."""
    monkeypatch.setattr(options, "QUICK_SIZE", (3, 2))
    monkeypatch.setattr(draw, "STEPS", 2)
    monkeypatch.setattr(heldout, "LEVELS", 2)
    monkeypatch.setattr(protocol, "NUM_VALIDATION", 3)

    def panel(made, despite_gates):
        cache = Cache(made.work / "real")
        return Panel(StubJudges(), StubGallery, made.pictures, "judges", cache), ""

    monkeypatch.setattr(bench, "_panel", panel)

    def go(*more):
        places = ["--data", emoji, "--base", tiny_base, "--work", tmp_path / "work", "--out", tmp_path / "out"]
        size = ["--quick", "--images", "5", *REFERENCES, "--set", "lora.rank=2"]
        length = [] if "train.steps=3" in more else ["--set", "train.steps=2"]
        return bench.main([*map(str, places), *size, *length, *more])

    return SimpleNamespace(go=go, out=tmp_path / "out", work=tmp_path / "work")


def test_the_bench_reports_every_method_and_does_nothing_twice(run, capsys, monkeypatch):
    assert run.go("--references", "base,words,full,oracle") == 0
    report = json.loads((run.out / "quick.json").read_text())
    rows = report["styles"]["fluent-3d"]["methods"]
    assert list(rows) == ["lora", "base", "words", "own", "full", "oracle", "real"]
    for method in ("lora", "full", "oracle"):
        assert {"style", "retention", "joint", "copy", "diversity", "leak", "loss", "seconds"} <= set(rows[method])
    assert rows["base"]["loss"]["value"] == 1 and "leak" not in rows["base"]
    assert rows["lora"]["top1"]["value"] == 0.5  # what the stub gallery says
    assert (run.out / "quick-fluent-3d.png").is_file()
    assert "| LoRA |" in (run.out / "quick.md").read_text()
    assert not list(run.work.rglob("denoiser.safetensors")), "weights of the references are not kept"

    monkeypatch.setattr("tools.style_bench.methods.train_lora", None)
    monkeypatch.setattr("tools.style_bench.cells.load", None)
    assert run.go("--references", "base,words,full,oracle") == 0
    capsys.readouterr()


def test_other_settings_are_other_cells_and_a_report_draws_nothing(run, capsys):
    assert run.go("--references", "base") == 0
    before = set(run.work.iterdir())
    assert run.go("--references", "base", "--set", "train.steps=3", "--report") == 0
    assert set(run.work.iterdir()) == before
    rows = json.loads((run.out / "quick.json").read_text())["styles"]["fluent-3d"]["methods"]
    assert "lora" not in rows and "base" in rows
    assert run.go("--prompts", "final", "--report") == 2
    assert "nothing is drawn yet" in capsys.readouterr().err


def test_styles_share_what_the_base_draws_in_its_own_styles(run, emoji):
    shutil.copytree(emoji / "pictures" / "fluent-3d", emoji / "pictures" / "openmoji")
    assert run.go("--style", "fluent-3d", "--style", "openmoji", "--references", "base") == 0
    kinds = Counter(
        next(kind for kind in ("own", "base", "lora", "real") if kind in f.name) for f in run.work.iterdir()
    )
    assert kinds == {"own": 1, "base": 2, "lora": 2, "real": 1}
    styles = json.loads((run.out / "quick.json").read_text())["styles"]
    assert all("own" in styles[style]["methods"] for style in ("fluent-3d", "openmoji"))


@pytest.mark.parametrize(("more", "message"), [("data.images=x", "images"), ("lora.rnk=2", "lora.rank")])
def test_settings_that_the_bench_cannot_use_are_refused(run, capsys, more, message):
    assert run.go("--set", more) == 2
    assert message in capsys.readouterr().err


def test_names_on_the_command_line_are_checked(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--data", ".", "--references", "bse"])
    assert "bse is none of lora, base" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options.parse(["--data", ".", "--full-rate", "3"])
    assert "a learning rate lies between 0 and 1, got 3" in capsys.readouterr().err
    assert options.parse(["--data", ".", "--quick"]).prompts == "tune"
    assert options.parse(["--data", "."]).prompts == "final"


def test_full_fine_tuning_that_breaks_down_is_no_reference(run, capsys, monkeypatch):
    loss = references._loss
    monkeypatch.setattr(references, "_loss", lambda *given: loss(*given) * (math.nan if given[-1] else 1.0))
    assert run.go("--references", "full") == 2
    assert "full fine-tuning at 0.001 broke down at step 2; give a lower rate" in capsys.readouterr().err
    assert not list(run.work.glob("*-full-*/learned.json"))


def test_the_key_knows_code_and_not_its_words():
    plain = experiment._meaning("def f(x):\n    return x + 1\n")
    assert experiment._meaning('def f(x):\n    """Adds."""\n    return x + 1  # one\n') == plain
    assert experiment._meaning("def f(x):\n    return x + 2\n") != plain
    assert len(experiment.code_digest()) == 64


def test_an_answer_of_the_gates_is_kept_for_what_was_asked(tmp_path):
    assert all((Path(bench.__file__).parent / name).is_file() for name in bench.EXAMINATION)
    (tmp_path / "gates.py").write_text("MOST = 100\n", encoding="utf-8")
    before = experiment.code_digest(tmp_path, ["gates.py"])
    (tmp_path / "gates.py").write_text("MOST = 3010\n", encoding="utf-8")
    assert experiment.code_digest(tmp_path, ["gates.py"]) != before


def test_changed_gates_are_asked_anew(tmp_path, monkeypatch):
    files = []
    panel = SimpleNamespace(digest="judges", judges=None)
    monkeypatch.setattr(bench.Panel, "open", lambda pictures, folder: panel)
    monkeypatch.setattr(bench, "_examine", lambda judges, pictures, file, despite_gates: files.append(file))
    for code in ("one", "other", "one"):
        monkeypatch.setattr(bench, "code_digest", lambda root, names, code=code: code)
        bench._panel(SimpleNamespace(pictures=None, work=tmp_path), despite_gates=False)
    assert files[0] != files[1] and files[0] == files[2]


def test_heldout_noise_is_antithetic_and_the_loss_repeats(tiny_parts, style_dir, tmp_path):
    drawn = heldout._noised(torch.zeros(1, 4, 2, 2), heldout.timesteps(1000), "digest")
    assert drawn.noise.sum(0).abs().max() < 1e-6
    assert drawn.t.tolist() == [62, 187, 312, 437, 562, 687, 812, 937] * 2
    dataset = prepare(tiny_parts, scan(style_dir), DataSection(), 0, Cache(tmp_path / "cache"))
    captions = [example.caption for example in dataset.examples]
    first = heldout.heldout_losses(tiny_parts, dataset, captions, 1)
    assert first == heldout.heldout_losses(tiny_parts, dataset, captions, 1)
    assert len(first) == len(dataset.examples) and all(0 < loss < 10 for loss in first)


def test_a_sweep_changes_one_setting_at_a_time(run, capsys):
    vary = ("--vary", "lora.rank=1, 3", "--vary", "data.caption_dropout=0.0")
    assert run.go(*vary) == 0
    report = json.loads((run.out / "sweep.json").read_text())
    names = ["lora.rank=1", "lora.rank=3", "data.caption_dropout=0.0"]
    assert list(report["variants"]) == ["unchanged", *names, "base", "own"]
    assert set(report["differences"]["style"]) == set(names)
    for name in names:
        change = report["differences"]["style"][name]
        styles = [report["variants"][row]["style"]["value"] for row in (name, "unchanged")]
        assert change["value"] == pytest.approx(styles[0] - styles[1])
        assert change["low"] <= change["value"] <= change["high"]
    assert len(list(run.work.glob("*-lora-*/learned.json"))) == 4, "one LoRA each, and one of nothing changed"
    table = (run.out / "sweep.md").read_text()
    assert "| lora.rank=3 |" in table and "| base alone |" in table
    assert run.go("--vary", "lora.rank=1,4", "--vary", "lora.dropout=0.5", "--report") == 2
    assert "not drawn yet: lora.rank=4, lora.dropout=0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "values", "rows", "wrong", "message"),
    [
        ("--strengths", "0.5,2", ["strength 0.5", "strength 2"], "0.5,1", "1 is always there"),
        ("--cfg", "1,4", ["CFG 1", "CFG 4"], "4,1.5", "1.5 is always there"),
        ("--cfg", "7", ["CFG 7"], "0.5", "from 1 to 50"),
    ],
)
def test_uses_share_what_was_learned(run, capsys, option, values, rows, wrong, message):
    assert run.go(option, values) == 0
    report = json.loads((run.out / "sweep.json").read_text())["variants"]
    assert list(report) == ["unchanged", *(f"unchanged, {row}" for row in rows), "base", "own"]
    drawn = {name: row["kernel"]["value"] for name, row in report.items() if name != "own"}
    assert len(set(drawn.values())) == len(rows) + 2, "each use draws other pictures"
    assert len(list(run.work.glob("*-lora-*/learned.json"))) == 1
    assert len(list(run.work.glob("*-lora-*/pictures.safetensors"))) == len(rows) + 1
    with pytest.raises(SystemExit):
        options.parse(["--data", ".", option, wrong])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["lora.rank"], "write it as"),
        (["lora.rank=,"], "write it as"),
        (["lora.rank=4", "lora.rank=4"], "twice"),
        (["lora.rnk=4"], "lora.rank"),
    ],
)
def test_what_cannot_be_varied_is_refused(run, capsys, vary, message):
    assert run.go(*(word for text in vary for word in ("--vary", text))) == 2
    assert message in capsys.readouterr().err


def test_what_decides_a_picture_is_in_its_key(emoji, tiny_base, monkeypatch):
    monkeypatch.setattr(protocol, "NUM_VALIDATION", 3)

    def made(*more):
        parsed = options.parse(["--data", str(emoji), "--base", str(tiny_base), "--quick", "--images", "5", *more])
        return bench._experiment(parsed)

    def keys(*more):
        one = made(*more)
        return {cell.method.id: cell.key for cell in bench._cells(one, "fluent-3d", SimpleNamespace(**METHOD_CHOICE))}

    plain, rank = keys(), keys("--set", "lora.rank=3")
    assert plain["lora"] != rank["lora"]
    assert plain["base"] == rank["base"] and plain["full"] == rank["full"]
    assert keys("--set", "train.threads=1") == plain
    trigger = keys("--set", "data.trigger=ohwx")
    assert trigger["base"] != plain["base"] and trigger["words"] == plain["words"]
    steps = keys("--full-steps", "3")
    assert steps["full"] != plain["full"] and steps["oracle"] == plain["oracle"]
    assert isinstance(made().base, Base)


def test_captions_are_of_the_form_that_the_base_has_learned(emoji, tiny_base):
    def asked(*more):
        parsed = options.parse(["--data", str(emoji), "--base", str(tiny_base), *more])
        return methods.with_trigger(bench._experiment(parsed), "castle")

    assert asked() == "castle, sks style"
    assert asked("--set", "data.trigger_place=front") == "sks style, castle"
    assert asked("--set", "data.trigger=ohwx") == "ohwx, castle"  # as `sdlora train` does with these settings
    assert asked("--set", "data.trigger=ohwx", "--set", "data.trigger_place=end") == "castle, ohwx"


def test_judges_are_asked_once_and_not_believed_if_they_fail(tmp_path, monkeypatch):
    asked = []

    def check(judges, pictures):
        asked.append(judges)
        return Gates(judges == "good", f"{judges} judges")

    monkeypatch.setitem(sys.modules, "tools.style_bench.gates", SimpleNamespace(check=check))
    for _ in range(2):
        with pytest.raises(ConfigError, match="failed their gates, so nothing that they say counts: bad judges"):
            bench._examine("bad", None, tmp_path / "bad.json")
        assert bench._examine("bad", None, tmp_path / "bad.json", despite_gates=True) == "bad judges"
        assert bench._examine("good", None, tmp_path / "good.json") == ""
    assert asked == ["bad", "good"]


def test_a_report_of_failed_judges_says_so_first():
    assert warning("") == []
    lines = warning("style 91 %\nFAIL")
    assert "failed their gates" in lines[0] and lines[2:-1] == ["```", "style 91 %", "FAIL", "```"]
