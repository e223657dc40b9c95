"""Two processes train as one does: the same curves, sharded parameters, and checkpoints that fit both."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import small_project
import torch
from safetensors.torch import load_file

from lyrics import io
from lyrics.errors import InputError
from lyrics.train import devices
from lyrics.train.devices import Ranks

TOLERANCE = 1e-5
STAGES, STRATEGIES = ("stage1", "stage2"), ("ddp", "fsdp")
STEPS, EVERY = 10, 4


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages trained alone, by two processes in both ways, and on from each other's checkpoints."""
    folder = tmp_path_factory.mktemp("project")
    before = torch.are_deterministic_algorithms_enabled()
    with contextlib.chdir(folder):
        small_project.make(folder, small_project.configuration(steps=STEPS, checkpoint_every=EVERY))
        for stage in STAGES:
            ranks.train(stage, folder / stage / "alone")
            ranks.train(stage, folder / stage / "accumulated", accumulate=2)
            go_on(stage, "alone", "alone-then-fsdp")
        runs = [f"{stage}:{strategy}:{stage}/{strategy}" for stage in STAGES for strategy in STRATEGIES]
        run_together(folder, [*runs, *(f"{stage}:fsdp:{stage}/alone-then-fsdp" for stage in STAGES)])
        for stage in STAGES:
            for strategy in STRATEGIES:
                go_on(stage, strategy, f"{strategy}-then-alone")
                ranks.train(stage, folder / stage / f"{strategy}-then-alone")
    torch.use_deterministic_algorithms(before)
    return folder


def go_on(stage: str, before: str, after: str) -> None:
    """A run that finds the checkpoints of another and its history up to there, no more."""
    shutil.copytree(Path(stage, before, "checkpoints"), Path(stage, after, "checkpoints"))


def run_together(folder: Path, runs: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, ranks.__file__, str(port), *runs]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


def curves(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "out/history.jsonl").read_text().splitlines()]


def furthest(found: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    assert [row.keys() for row in found] == [row.keys() for row in expected] and len(found) == STEPS
    return max(abs(a[key] - b[key]) for a, b in zip(found, expected, strict=True) for key in b)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("run", ["ddp", "fsdp", "ddp-then-alone", "fsdp-then-alone", "alone-then-fsdp"])
def test_two_processes_follow_the_curve_of_one_on_the_joint_batch(project: Path, stage: str, run: str) -> None:
    assert furthest(curves(project / stage / run), curves(project / stage / "alone")) < TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("run", STRATEGIES)
def test_two_processes_end_with_the_weights_of_one(project: Path, stage: str, run: str) -> None:
    expected = load_file(project / stage / "alone/out/model.safetensors")
    found = load_file(project / stage / run / "out/model.safetensors")
    assert found.keys() == expected.keys()
    # A key's bias moves no softmax: its gradient is rounding, which Adam makes as large as any.
    for name in expected.keys() - {name for name in expected if ".key." in name and name.endswith("bias")}:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_fsdp_shards_every_parameter_and_ddp_none(project: Path, stage: str) -> None:
    for rank in range(2):
        held = io.read_json(project / stage / f"fsdp/held-{rank}.json")
        assert all(held["sharded"]) and held["local"] < 0.6 * held["whole"]
        held = io.read_json(project / stage / f"ddp/held-{rank}.json")
        assert not any(held["sharded"]) and held["local"] == held["whole"]


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_first_of_them_writes(project: Path, stage: str) -> None:
    for run in STRATEGIES:
        written = sorted(p.name[:8] for p in (project / stage / run / "checkpoints").iterdir())
        assert written == ["00000004", "00000008"]


def test_micro_batches_add_up_to_the_batch_where_negatives_play_no_part(project: Path) -> None:
    assert furthest(curves(project / "stage2/accumulated"), curves(project / "stage2/alone")) < TOLERANCE
    found, expected = (curves(project / "stage1" / run)[0] for run in ("accumulated", "alone"))
    for key in ("stage1/icg_loss", "stage1/msp_loss"):
        assert found[key] == pytest.approx(expected[key], abs=TOLERANCE)
    assert found["stage1/itc_loss"] < expected["stage1/itc_loss"] - 0.1  # ln 4 in place of ln 8


def test_alone_no_process_group_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init_process_group", "all_gather", "all_reduce", "barrier", "get_rank"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: pytest.fail("a process group was used"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with devices.joined(torch.device("cpu")) as alone:
        assert alone == Ranks(0, 1) and alone.own(6) == slice(0, 6)
        x = torch.ones(3)
        assert alone.gather(x) is x and alone.sum(x) is x
        with alone.first_before_others():
            net = torch.nn.Linear(2, 2)
        assert devices.prepare(net, [], alone, "fsdp", torch.device("cpu")) is net


def test_each_process_takes_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.pick_device("cuda") == torch.device("cuda", 3)
    assert devices.pick_device("cuda:1") == torch.device("cuda", 1)


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    Ranks(1, 2).check(12, 3, "stage1")
    with pytest.raises(InputError, match=r"stage1.batch_size is 8.* 2 processes × stage1.accumulate 3 .*multiple of 6"):
        Ranks(1, 2).check(8, 3, "stage1")
