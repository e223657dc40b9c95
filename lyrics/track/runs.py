"""The one place that opens MLflow runs: a parent per flow, a child per stage that ran."""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lyrics import dag, io
from lyrics.track import server

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PARENT_VARIABLE = "LYRICS_PARENT_RUN_ID"
OUTPUT_TAG = "output_sha256"
STAGE_TAG = "stage"
FLUSH_SECONDS = 10.0
SAMPLE_SECONDS = 10.0


class RunTracker:
    """What a stage logs goes here; metrics are sent in batches, since a request a step would slow training.

    Args:
        client: of the store that holds the run.
        run_id: an open run.
    """

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.run_id = run_id
        self.client = client
        self._pending: list[Any] = []
        self._flushed_at = time.monotonic()

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._pending += [Metric(key, float(value), now_ms, step or 0) for key, value in values.items()]
        if len(self._pending) >= 500 or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def log_params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_key(name), str(value)) for name, value in flatten(values).items()]
        with server.reachable():
            for start in range(0, len(params), 100):
                self.client.log_batch(self.run_id, params=params[start : start + 100])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        with server.reachable():
            if Path(path).is_dir():
                self.client.log_artifacts(self.run_id, str(path), folder or Path(path).name)
            else:
                self.client.log_artifact(self.run_id, str(path), folder)

    def log_dataset(self, name: str, path: Path, sha256: str) -> None:
        """Record a data set that the run reads. MLflow's digest is short; the whole hash is in the source."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": Path(path).as_posix(), "sha256": sha256})
        dataset = Dataset(name=name, digest=sha256[:32], source_type="local", source=source)
        context = InputTag("mlflow.data.context", name.rpartition("/")[2])
        with server.reachable():
            self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags=[context])])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        with server.reachable():
            self.client.log_batch(self.run_id, tags=[RunTag(_key(k), str(v)) for k, v in tags.items()])

    def published(self, *outs: Path) -> str:
        """Tag the run with the hash of what it made, so that later runs that reuse it can point here."""
        sha256 = io.sha256_tree(*outs)
        self.set_tags({OUTPUT_TAG: sha256})
        return sha256

    def flush(self) -> None:
        """Send what is pending; after a failure it stays pending."""
        self._flushed_at = time.monotonic()
        with server.reachable():
            while self._pending:
                self.client.log_batch(self.run_id, metrics=self._pending[:500])
                del self._pending[:500]


class ParentTracker(RunTracker):
    """The run of a whole flow."""

    def reused(self, stage: str, *outs: Path) -> str | None:
        """Point to the earlier run that made `outs`; None where this store knows none (a clone, a cleaned store)."""
        run_id = find_run(self.client, stage, io.sha256_tree(*outs))
        self.set_tags({f"reused/{stage}": run_id or "made elsewhere"})
        return run_id


@contextlib.contextmanager
def stage_run(stage: str, config: Any) -> Iterator[RunTracker]:
    """A run for one stage, below the flow's run where there is one.

    Args:
        stage: a stage of dvc.yaml (`clean`, `foundation@clip`) or `register`.
        config: the configuration; the keys that dvc.yaml lists for the stage are logged.
    """
    with _run(RunTracker, stage, os.environ.get(PARENT_VARIABLE)) as tracker:
        tracker.log_params(keys_read(stage, flatten(config)))
        with _system_metrics(tracker):
            yield tracker


@contextlib.contextmanager
def continued(run_id: str) -> Iterator[RunTracker]:
    """Report to a run that another process of the same stage opened, and will close."""
    tracker = RunTracker(server.connect(), run_id)
    try:
        yield tracker
    except BaseException:
        with contextlib.suppress(Exception):  # the first failure is the one to report
            tracker.flush()
        raise
    tracker.flush()


@contextlib.contextmanager
def parent_run(name: str = "end_to_end", config: Any = None) -> Iterator[ParentTracker]:
    """The run of a flow; while it is open, LYRICS_PARENT_RUN_ID tells stages in subprocesses where they belong."""
    with _run(ParentTracker, name, None) as tracker:
        if config is not None:
            tracker.log_params(flatten(config))
        before = os.environ.get(PARENT_VARIABLE)
        os.environ[PARENT_VARIABLE] = tracker.run_id
        try:
            yield tracker
        finally:
            if before is None:
                del os.environ[PARENT_VARIABLE]
            else:
                os.environ[PARENT_VARIABLE] = before


@contextlib.contextmanager
def _run(kind: type, stage: str, parent: str | None) -> Iterator[Any]:
    client = server.connect()
    with server.reachable():
        experiment = server.experiment_id(client)
        close_stale(client, experiment)
        tags = {STAGE_TAG: stage, "mlflow.source.name": f"python -m lyrics {stage}", **_process_tags()}
        if parent:
            tags["mlflow.parentRunId"] = parent
        run_id = client.create_run(experiment, tags=tags, run_name=stage).info.run_id
    tracker = kind(client, run_id)
    try:
        yield tracker
        tracker.flush()
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        with contextlib.suppress(Exception):  # the first failure is the one to report
            tracker.flush()  # the last metrics before it are those that tell why
        with contextlib.suppress(Exception):
            tracker.set_tags({"failure": f"{type(error).__name__}: {error}"[:500]})
            client.set_terminated(run_id, "KILLED" if killed else "FAILED")
        raise
    with server.reachable():
        client.set_terminated(run_id, "FINISHED")


def find_run(client: "MlflowClient", stage: str, output_sha256: str) -> str | None:
    """The newest finished run of `stage` that made this output."""
    with server.reachable():
        found = client.search_runs(
            [server.experiment_id(client)],
            f"tags.{STAGE_TAG} = '{stage}' AND tags.{OUTPUT_TAG} = '{output_sha256}'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
    return found[0].info.run_id if found else None


def close_stale(client: "MlflowClient", experiment: str) -> list[str]:
    """End as KILLED the runs whose process is gone: nobody else can end what kill -9 left open.

    Runs of other machines and other folders are left alone: on a shared server they may well be at work.
    """
    mine = _process_tags()
    where = f"tags.host = '{mine['host']}' AND attributes.status = 'RUNNING'"
    closed = []
    for run in client.search_runs([experiment], where):
        tags = run.data.tags
        if tags.get("folder") == mine["folder"] and not _alive(tags.get("process", "")):
            client.set_tag(run.info.run_id, "failure", "its process was killed")
            client.set_terminated(run.info.run_id, "KILLED")
            closed.append(run.info.run_id)
    return closed


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings or dataclasses as one mapping with dotted keys."""
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = dataclasses.asdict(values)
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def keys_read(stage: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `flat` that dvc.yaml says the stage reads; all of them for what is not in dvc.yaml."""
    known = dag.read().get(stage) if dag.DVC_FILE.exists() else None
    if known is None:
        return dict(flat)
    listed = [key for keys in known.params.values() for key in keys]
    return {key: value for key, value in flat.items() if any(key == k or key.startswith(f"{k}.") for k in listed)}


@contextlib.contextmanager
def _system_metrics(tracker: RunTracker) -> Iterator[None]:
    """CPU, memory and GPU figures; a stage shorter than the sampling interval gets one sample at its end."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(tracker.run_id, SAMPLE_SECONDS, tracking_uri=server.tracking_uri())

    def finish() -> None:
        monitor.finish()
        monitor.collect_metrics()
        with server.reachable():
            monitor.publish_metrics(monitor.aggregate_metrics())
            monitor.mlflow_logger.flush()

    monitor.start()
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # a full disk fails here again; the first failure is the one to report
            finish()
        raise
    finish()


def _process_tags() -> dict[str, str]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "folder": str(Path.cwd()),
        "process": f"{process.pid}:{process.create_time():.2f}",
    }


def _alive(process: str) -> bool:
    pid, _, created = process.partition(":")
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == created
    except (psutil.Error, ValueError):
        return False


def _key(name: str) -> str:
    """MLflow allows letters, digits and - _ . / : and space in names."""
    return "".join(c if c.isalnum() or c in "-_./: " else "_" for c in name)[:250]
