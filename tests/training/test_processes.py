"""Several processes learn what one learns, to the last bit, and end together, well or badly."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from families.tiny import make_tiny
from notes import Notes
from PIL import Image
from safetensors.torch import load_file

from sdlora.config_io import load_config, to_toml
from sdlora.data.dataset import Sample
from sdlora.errors import ConfigError, TrainingError
from sdlora.training.accumulate import accumulate, cut
from sdlora.training.folder import reopen
from sdlora.training.plan import make_plan
from sdlora.training.train import train
from sdlora.training.world import ProcessLost, World

STEPS = 20
SIZES = [(64, 64)] * 5 + [(96, 64)] * 4 + [(64, 96)] * 3
MARGIN = 60  # seconds for what takes few


def flags(folder: Path, name: str, batch: int, micro: int | None = None, **more) -> dict:
    """Settings of a run with several buckets, accumulation, shuffled captions and both kinds of dropout."""
    settings = {
        "base.model": str(folder / "base"),
        "data.images": folder / "pictures",
        "data.batch_size": batch,
        "data.shuffle_tags": True,
        "data.caption_dropout": 0.3,
        "data.cache_dir": folder / "cache",
        "lora.rank": 2,
        "lora.dropout": 0.1,
        "lora.targets": "attention",
        "train.steps": STEPS,
        "train.accumulation": 2,
        "train.micro_batch": micro,
        "output.output": folder / name,
        "output.name": "style",
        "samples.sample_every": 0,
    }
    return settings | {key.replace("__", "."): value for key, value in more.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def work(rank: int, jobs: list[dict], folder: Path) -> None:
    """Takes part, as one of several processes, in those jobs that need so many."""
    torch.set_num_threads(1)
    written: list[str] = []
    watched = {"open", "os.mkdir", "os.rename", "os.remove"}

    def watch(event, arguments):
        writes = event != "open" or (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        if event in watched and writes and any(f"/{job['run']}/" in f"{arguments[0]}/" for job in jobs):
            written.append(f"{event} {arguments[0]}")

    sys.addaudithook(watch)
    report = {"said": [], "written": written, "results": [], "error": None}
    for job in jobs:
        if rank >= job["size"]:
            continue
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["size"], "MASTER_PORT": job["port"]}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in world.items()}
        world, notes = World.join(), Notes()
        try:
            with world.one_voice():
                if job.get("fails") and rank == 1:
                    raise TrainingError("only here")
                changes = job["flags"]
                run, config = reopen(folder / job["run"], changes, ()) if job.get("resume") else (None, None)
                result = train(config or load_config(None, changes), resume=run, reporter=notes, world=world)
                report["results"].append([result.steps, result.loss_end])
            world.leave()
        except (TrainingError, SystemExit) as error:
            report["error"] = f"{type(error).__name__}: {error}"
        report["said"] += notes.lines
    (folder / f"report-{rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and pictures of three shapes, and `report-RANK.json` of what several processes did with them."""
    folder = tmp_path_factory.mktemp("processes")
    torch.set_num_threads(1)
    make_tiny(folder / "base", "sd1", unet={"layers_per_block": 1})
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = np.clip(rng.integers(0, 255, 3) + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:02d}.png")
        (folder / "pictures" / f"{i:02d}.txt").write_text(f"a thing, number {i}, red, blue")

    two_nodes(folder)  # the first seven steps of "chain"
    jobs = [
        {"run": "two", "size": 2, "flags": flags(folder, "two", 2)},
        {"run": "four", "size": 4, "flags": flags(folder, "four", 1)},
        {
            "run": "chain",
            "size": 4,
            "resume": True,
            "flags": {"data.batch_size": 1, "train.stop_at": 14},
        },
        {"run": "bad", "size": 2, "flags": flags(folder, "bad", 2), "fails": True},
    ]
    jobs = [job | {"port": free_port()} for job in jobs]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, jobs, folder)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for name, micro in (("one-by-two", 2), ("one-by-one", 1)):
        train(load_config(None, flags(folder, name, 4, micro)))
    for worker in workers:
        worker.join(10 * MARGIN)
        assert worker.exitcode == 0
    run, config = reopen(folder / "chain", {"data.batch_size": 4}, ())
    train(config, resume=run)
    return folder


def two_nodes(folder: Path) -> None:
    """Trains seven steps as two machines with one process each would, both being this one."""
    file = folder / "chain.toml"
    config = load_config(None, flags(folder, "chain", 2, 1, train__stop_at=7))
    file.write_text(to_toml(config), encoding="utf-8")
    port = free_port()
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *(f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"),
                *("-m", "sdlora", "train", "--config", str(file)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    first, second = (node.communicate(timeout=5 * MARGIN)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0]
    assert "Stopped at step 7 of 20" in first
    assert second == ""


@pytest.fixture(scope="module")
def reports(folder):
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(4)]


def learned(run: Path) -> dict[str, torch.Tensor]:
    """Everything that a run knows at its end: the LoRA, the optimizer's moments, and the loss of every step."""
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = {key: torch.tensor([line[key] for line in lines]) for key in ("loss", "gradient_norm")}
    files = [load_file(checkpoint / f"{name}.safetensors") for name in ("adapters", "optimizer")]
    return numbers | files[0] | files[1]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("several", "one"),
    [("two", "one-by-two"), ("four", "one-by-one"), ("chain", "one-by-one")],
    ids=["two", "four", "two nodes, then four processes, then one"],
)
def test_several_processes_equal_one_bit_for_bit(folder, several, one):
    assert equal(learned(folder / several), learned(folder / one))
    assert len(learned(folder / one)["loss"]) == STEPS


def test_slots_change_no_more_than_rounding(folder):
    by_one, by_two = learned(folder / "one-by-one"), learned(folder / "one-by-two")
    # Dropout in the adapters is drawn for each slot, so only what comes before any learning can be compared.
    assert not equal(by_one, by_two)
    torch.testing.assert_close(by_one["loss"][0], by_two["loss"][0], rtol=1e-3, atol=0)


def test_only_the_first_process_writes_and_speaks(reports):
    assert any("batches of 4 (2 in each of 2 processes)" in line for line in reports[0]["said"])
    assert any("metrics.jsonl" in line for line in reports[0]["written"])
    for report in reports[1:]:
        assert (report["said"], report["written"]) == ([], [])


def test_every_process_returns_the_same(reports):
    assert reports[0]["results"] == reports[1]["results"]
    assert reports[0]["results"][1:] == reports[3]["results"]
    assert [steps for steps, _ in reports[0]["results"]] == [20, 20, 14]


def test_the_process_that_fails_tells_why_and_the_other_is_silent(reports, folder):
    assert reports[1]["error"] == "TrainingError: only here"
    assert reports[0]["error"] == "SystemExit: 2"
    assert not (folder / "bad").exists()


def started(folder: Path, name: str, *more: str) -> tuple[subprocess.Popen, Path]:
    """Starts a long run in two processes and waits for its first step."""
    file = folder / f"{name}.toml"
    file.write_text(to_toml(load_config(None, flags(folder, name, 2, train__steps=5000))), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "sdlora", "train", "--processes", "2", "--config", str(file), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = folder / name / "metrics.jsonl", time.monotonic() + 5 * MARGIN
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    return process, folder / name


def test_ctrl_c_stops_all_after_the_same_step(folder):
    process, run = started(folder, "stopped")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=5 * MARGIN)
    assert process.returncode == 130
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert output.count(f"Stopped at step {steps} of 5000; nothing is lost.") == 1
    assert errors.count("Stopping;") == 1
    assert (run / "checkpoints" / f"step-{steps:08d}" / "state.json").exists()


def test_when_one_process_is_killed_the_others_end_with_a_word(folder):
    process, _ = started(folder, "killed")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list a process's children")
    second = int(children.read_text().split()[1])
    os.kill(second, signal.SIGKILL)
    _, errors = process.communicate(timeout=5 * MARGIN)
    assert process.returncode == 2
    assert errors.count("another process has ended") == 1
    assert "process 1 of 2 was killed (SIGKILL)" in errors
    assert "Traceback" not in errors


def samples(count: int) -> list[Sample]:
    return [Sample(i, 0) for i in range(count)]


@pytest.mark.parametrize(("processes", "micro"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_every_picture_falls_to_one_process_at_its_own_position(processes, micro):
    batches = [samples(4), samples(1), samples(3)]
    slots = [cut(batches, share=4 // processes, rank=r, micro_batch=micro) for r in range(processes)]
    positions = [p for own in slots for slot in own for piece in slot for p in piece.positions]
    assert sorted(positions) == list(range(8))
    assert sum(len(own) for own in slots) == 4 // micro
    starts = (0, 4, 5)
    for own in slots:
        for piece in (piece for slot in own for piece in slot):
            start = max(s for s in starts if s <= piece.positions[0])
            assert [s.example for s in piece.samples] == [p - start for p in piece.positions]


def test_slots_are_summed_in_their_order():
    gradients, parts = torch.zeros(3), [torch.tensor([1e8, 1.0, 0.1]), torch.ones(3), torch.tensor([-1e8, 1.0, 0.2])]

    def compute(piece):
        gradients.add_(parts[piece.positions[0]])
        return torch.tensor(0.5)

    slots = cut([samples(3)], share=4, rank=0, micro_batch=1)
    loss, asked = accumulate(slots, compute, gradients, World.single(), stop=True)
    expected = ((parts[0] + parts[1]) + parts[2]) + 0.0
    assert torch.equal(gradients, expected)
    assert (float(loss), float(asked)) == (1.5, 1.0)


def test_a_plan_counts_the_pictures_of_all_processes():
    config = load_config(None, {"data.batch_size": 2})
    assert make_plan(config, 30, [30], 3) == make_plan(config, 30, [30], 3)
    together, alone = make_plan(config, 30, [30], 4), make_plan(load_config(None, {"data.batch_size": 8}), 30, [30])
    assert (together.total_steps, together.batch_size, together.share) == (alone.total_steps, 8, 2)


def test_one_process_waits_for_nobody():
    world = World.single()
    assert world.first(lambda: 3) == 3
    world.require_same({"a": "b"})
    world.leave()
    with pytest.raises(ProcessLost), world.one_voice():
        raise ProcessLost("x")


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a whole number, got 'many'"):
        World.join()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 processes on a machine with 1 GPU\(s\)"):
        World.join()


def test_processes_are_not_started_twice(folder, monkeypatch):
    from click.testing import CliRunner

    from sdlora.cli.train import command

    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(command, ["--images", str(folder / "pictures"), "--processes", "2"])
    assert result.exit_code == 2
    assert "leave --processes out" in result.output
