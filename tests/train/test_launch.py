"""A verb starts the processes that params/ asks for, and says in one sentence what went wrong in them."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small_project
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from lyrics import io
from lyrics.errors import InputError, RetryableError
from lyrics.stage import verdict
from lyrics.train import launch


def run_verb(folder: Path, **changes: object) -> subprocess.CompletedProcess:
    config = small_project.configuration(steps=4)
    with contextlib.chdir(folder):
        small_project.make(folder, dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, **changes)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lyrics", "pretrain"], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_batch_that_processes_cannot_divide_is_refused_before_they_start(tmp_path: Path) -> None:
    ran = run_verb(tmp_path, processes=2, batch_size=7)
    assert ran.returncode == 2, ran.stderr
    assert "lyrics: stage1.batch_size is 7, which 2 processes × stage1.accumulate 1 do not divide" in ran.stderr
    assert not (tmp_path / "models/stage1/history.jsonl").exists()  # what was there before stands
    assert not list(tmp_path.glob("build/work/pretrain/*/ranks"))


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_verb_in_two_processes_publishes_and_logs_once(tmp_path: Path, strategy: str) -> None:
    ran = run_verb(tmp_path, processes=2, strategy=strategy)
    assert ran.returncode == 0, ran.stderr
    assert len(io.read_json(tmp_path / "models/stage1/quality.json")) > 5
    assert load_file(tmp_path / "models/stage1/model.safetensors")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.stage = 'pretrain'")
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "stage1/itc_loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(("sent", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_that_ended_the_workers_ends_the_verb_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, raised: type[BaseException]
) -> None:
    def agent(*_: object) -> None:
        raise SignalException(f"got signal {sent}", sent)

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: agent)
    with pytest.raises(raised) as ended:
        launch.launch(2, "pretrain", tmp_path, "")
    assert raised is KeyboardInterrupt or ended.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("error", [RetryableError("MLflow did not answer"), InputError("no samples")])
def test_what_a_worker_says_of_its_failure_the_verb_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def agent(*_: object) -> None:
        launch.report_failure(tmp_path, *verdict(error))
        raise ChildFailedError("worker", {0: ProcessFailure(0, 0, 1, "")})

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: agent)
    with pytest.raises(type(error)) as raised:
        launch.launch(2, "pretrain", tmp_path, "")
    assert str(raised.value) == str(error)
