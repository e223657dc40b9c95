"""From raw image-text pairs to a registered model: every stage of dvc.yaml as a tracked task, then registration.

`python -m flows.end_to_end preset=tiny` runs it here; prefect.yaml deploys it. DVC alone decides what has to run.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flows  # noqa: F401  # settles Prefect's environment: before the import of prefect

# isort: split
import filelock
import psutil
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun

from flows import logs, stages, summary
from flows.stages import Outcome, StageError
from lyrics import compose, config, dag, io
from lyrics.errors import InputError, RetryableError
from lyrics.process import end_with_me
from lyrics.stage import one_sentence

LOCK = Path("build/flow.lock")
RETRY_SECONDS = [float(seconds) for seconds in os.environ.get("LYRICS_RETRY_SECONDS", "10,60").split(",")]


logs.without_tracebacks()


def _may_pass(_task: Any, _run: TaskRun, state: State) -> bool:
    try:
        state.result()
    except StageError as failure:
        return failure.retryable
    except RetryableError:
        return True
    except Exception:
        return False
    return False


@task(
    task_run_name="{name}",
    retries=2,
    retry_delay_seconds=RETRY_SECONDS,
    cache_policy=NO_CACHE,
    retry_condition_fn=_may_pass,
)
def run_stage(name: str, stale: bool, timeout_seconds: float) -> Outcome:
    """Bring one stage up to date; `stale` is what DVC said of it (or of something upstream) when the run began."""
    log = get_run_logger()
    if not stale:
        log.info("%s: unchanged", name)
        return Outcome(stage=name, how="unchanged", seconds=0.0)
    outcome = stages.reproduce(name, log.info, timeout_seconds)
    log.info("%s: %s, %.1f s", name, outcome.how, outcome.seconds)
    return outcome


@task(retries=2, retry_delay_seconds=RETRY_SECONDS, cache_policy=NO_CACHE, retry_condition_fn=_may_pass)
def register() -> str:
    """Register the finished model; the same content keeps its version."""
    from lyrics.track import registry

    return str(registry.register(config.load()))


@task(retries=2, retry_delay_seconds=RETRY_SECONDS, cache_policy=NO_CACHE)
def push() -> None:
    """Send data, models and the run cache to the DVC remote."""
    code = stages.stream(stages.dvc_command("push", "--run-cache"), get_run_logger().info, timeout_seconds=24 * 3600)
    if code:
        raise StageError("push", 1, "dvc push failed; its output above says why")


@flow(name="end-to-end")
def end_to_end(
    preset: str | None = None,
    data: str | None = None,
    folder: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    push_to_remote: bool = False,
    until: str | None = None,
    stage_timeout_hours: float = 24.0,
) -> list[Outcome]:
    """Run what has changed, register the result, report.

    Args:
        preset, data, folder, overrides: choices for params/run.yaml; what is left out stays as it is there.
        push_to_remote: `dvc push` at the end.
        until: stop after this stage, without registration.
        stage_timeout_hours: a stage that takes longer is stopped and fails.
    """
    LOCK.parent.mkdir(exist_ok=True)
    try:
        with filelock.FileLock(LOCK, blocking=False):
            _stop_server_with_me()
            settings = _settings(preset, data, folder, overrides)
            if settings:
                compose.configure(settings)
            return _run(until, stage_timeout_hours * 3600, push_to_remote)
    except filelock.Timeout:
        raise InputError("another run works in this folder; wait for it to end, or stop it") from None


def _run(until: str | None, timeout_seconds: float, push_to_remote: bool) -> list[Outcome]:
    from lyrics.track import runs

    if push_to_remote:
        stages.need_remote()
    pipeline = _pipeline(until)
    wanted = dag.with_upstream(until, pipeline) if until else pipeline
    stale = stages.stale()
    outcomes = []
    with runs.parent_run("end_to_end") as parent:
        for name in wanted:
            outcomes.append(run_stage(name, name in stale, timeout_seconds))
            if outcomes[-1].how != "ran":
                parent.reused(name, *map(Path, pipeline[name].outs))
        version = "not registered: stopped early as asked" if until else register()
    if push_to_remote:
        push()
    if summary.EVALUATION.exists() and not until:
        rows = summary.score_rows(io.read_json(summary.EVALUATION))
        create_table_artifact(
            rows,
            key="scores",
            description=f"{version}. Report: [{summary.REPORT}]({summary.REPORT.absolute().as_uri()})",
        )
    summary.report(outcomes, version)
    return outcomes


def _pipeline(until: str | None) -> dict[str, dag.Stage]:
    pipeline = dag.read()
    if until is not None and until not in pipeline:
        raise InputError(f"dvc.yaml has no stage {until}; choices: {', '.join(pipeline)}")
    return pipeline


def _settings(
    preset: str | None, data: str | None, folder: str | None, overrides: Mapping[str, Any] | None
) -> list[str]:
    """The choices as `configure` takes them."""
    named = {"preset": preset, "data": data, "folder": folder}
    settings = [f"{key}={value}" for key, value in named.items() if value]
    for key, value in (overrides or {}).items():
        settings.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    return settings


def _start_server() -> None:
    """Have Prefect start its temporary server, where it needs one, deaf to Ctrl-C.

    A terminal sends Ctrl-C to the server as well; without it the flow would go on asking it for minutes.
    """
    failed: list[BaseException] = []

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what this thread starts inherits it
        try:
            with get_client(sync_client=True):
                pass
        except BaseException as error:
            failed.append(error)

    starting = threading.Thread(target=start, daemon=True, name="start-server")
    starting.start()
    starting.join()  # here Ctrl-C is heard
    if failed:
        raise failed[0]


def _stop_server_with_me() -> None:
    """Prefect ends its temporary server when this process exits, but not when it is killed."""
    for child in psutil.Process().children():
        if "uvicorn" in " ".join(child.cmdline()):
            end_with_me(child)


def main(arguments: list[str]) -> None:
    """`key=value` arguments: parameters of the flow, and dotted keys of params/ as overrides."""
    parameters: dict[str, Any] = {"overrides": {}}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"{argument!r} is not of the form key=value")
        if key in ("preset", "data", "folder", "until"):
            parameters[key] = value
        elif key == "push":
            if value not in ("true", "false"):
                raise InputError(f"push={value} is unknown; choices: true, false")
            parameters["push_to_remote"] = value == "true"
        else:
            parameters["overrides"][key] = value
    # What is wrong with the choices is said before Prefect's temporary server is started, which takes seconds.
    preset, data, folder = (parameters.get(name) for name in ("preset", "data", "folder"))
    compose.edited(_settings(preset, data, folder, parameters["overrides"]))
    _pipeline(parameters.get("until"))
    if parameters.get("push_to_remote"):
        stages.need_remote()
    try:
        _start_server()
        end_to_end(**parameters)
    except StageError as failure:
        print(f"lyrics: {failure}", file=sys.stderr)
        raise SystemExit(failure.code) from None
    except RuntimeError as error:
        if "ephemeral Prefect API server" not in str(error):
            raise
        raise RetryableError("Prefect's temporary server did not start in time on this busy machine") from error


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
