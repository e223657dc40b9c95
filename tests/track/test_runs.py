"""Runs: parents, stages, what they record, and how they end."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lyrics import io
from lyrics.errors import InputError, RetryableError
from lyrics.track import runs, server


def run_of(run_id: str):
    return server.connect().get_run(run_id)


def test_a_stage_records_everything_below_its_flow(project):
    Path("dvc.yaml").write_text(
        "stages:\n  clean:\n    cmd: x\n    params: [{build/config.yaml: [seed, clean]}]\n    outs: [data/clean]\n"
    )
    io.write_text(Path("data/clean/a.tar"), "pairs")
    config = {"seed": 7, "clean": {"min_words": 2}, "stage1": {"lr": 0.1}}
    with runs.parent_run("end_to_end", config) as parent, runs.stage_run("clean", config) as tracker:
        for step in range(3):
            tracker.log_metrics({"clean/kept": float(step)}, step)
        tracker.log_dataset("raw/web", Path("data/raw/web"), "ab" * 32)
        tracker.log_artifact(Path("data/clean/a.tar"))
        tracker.published(Path("data/clean"))
    run = run_of(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.params == {"seed": "7", "clean.min_words": "2"}, "only what dvc.yaml says the stage reads"
    assert [m.value for m in server.connect().get_metric_history(tracker.run_id, "clean/kept")] == [0.0, 1.0, 2.0]
    assert run.inputs.dataset_inputs[0].dataset.name == "raw/web"
    assert "ab" * 32 in run.inputs.dataset_inputs[0].dataset.source
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0, "even a stage of milliseconds has a sample"
    assert [f.path for f in server.connect().list_artifacts(tracker.run_id)] == ["a.tar"]
    assert os.environ.get(runs.PARENT_VARIABLE) is None

    with runs.parent_run() as later:
        assert later.reused("clean", Path("data/clean")) == tracker.run_id
        assert later.reused("refine", Path("data/clean")) is None
    assert run_of(later.run_id).data.tags["reused/clean"] == tracker.run_id


@pytest.mark.parametrize(("error", "status"), [(ValueError("bad"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_stage_that_fails_says_so(project, error, status):
    with pytest.raises(type(error)), runs.stage_run("clean", {}) as tracker:
        tracker.log_metrics({"a": 1.0})
        raise error
    run = run_of(tracker.run_id)
    assert run.info.status == status and type(error).__name__ in run.data.tags["failure"]
    assert run.data.metrics["a"] == 1.0


def test_a_killed_run_is_closed_by_the_next_but_not_one_at_work(project):
    script = (
        "import sys, time; from lyrics.track import runs\n"
        "with runs.stage_run('clean', {}) as t: print(t.run_id, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    killed = process.stdout.readline().strip()
    with runs.stage_run("clean", {}):
        assert run_of(killed).info.status == "RUNNING", "it is still at work"
    process.kill()
    process.wait()
    with runs.stage_run("refine", {}):
        pass
    assert run_of(killed).info.status == "KILLED"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_down_ends_in_one_sentence_at_once(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(
        RetryableError, match=r"MLflow server at http://127.* did not answer \(.*refused.*Start it"
    ) as caught:
        server.connect()
    assert time.monotonic() - started < 5 and "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up(project, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(server, "ANSWER_SECONDS", 0.5)
        with pytest.raises(RetryableError, match="timed out"):
            server.connect()


def test_a_registry_that_goes_down_during_a_stage(project, monkeypatch):
    """The metrics stay pending and the stage ends in one sentence, not in a traceback of the database."""
    with pytest.raises(RetryableError, match="did not answer"), runs.stage_run("clean", {}) as tracker:
        Path("mlflow.db").unlink()
        tracker.log_metrics({"a": 1.0})
        tracker.flush()


def test_the_first_failure_is_the_one_reported(project):
    """A full disk also stops what the run would still write; the user must hear of the disk."""
    with pytest.raises(OSError, match="No space left"), runs.stage_run("clean", {}):
        Path("mlflow.db").unlink()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_is_no_database(project):
    Path("mlflow.db").write_text("this is not a database" * 100)
    with pytest.raises(InputError, match=r"mlflow\.db is not an MLflow database.*move it away"):
        server.connect()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "sqlite:///{here}/mlflow.db"),
        ("sqlite:///team.db", "sqlite:///{here}/team.db"),
        ("http://tracking:5000", "http://tracking:5000"),
        ("mlruns", "file://{here}/mlruns"),
    ],
)
def test_tracking_uri_is_respected_and_absolute(project, monkeypatch, given, expected):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert server.tracking_uri() == expected.format(here=Path.cwd())


def test_many_stages_at_once_in_one_new_store(tmp_path, monkeypatch):
    """Two processes may make the database at the same time; here, two clients log into it at the same time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    failures = []

    def log(stage: str) -> None:
        try:
            with runs.stage_run(stage, {"seed": 1}) as tracker:
                tracker.log_metrics({"x": 1.0}, 1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=log, args=(f"stage{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_importing_track_leaves_mlflow_alone():
    script = "import sys, lyrics.track.registry, lyrics.track.runs; assert 'mlflow' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
