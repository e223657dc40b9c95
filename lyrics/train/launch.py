"""Start the processes of a training stage on this machine (torchrun's agent, in this process)."""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lyrics import io
from lyrics.errors import InputError, RetryableError
from lyrics.stage import EXIT_INPUT, EXIT_RETRY, MAY_PASS

FAILURE = "failure"  # in the stage's work folder: the exit code and the sentence of the worker that failed first


def launch(processes: int, stage: str, work: Path, run_id: str) -> None:
    """Run `python -m lyrics worker STAGE WORK` in each of `processes` processes; all end when one fails.

    Raises:
        InputError: a worker refused its input.
        RetryableError: what it needs did not answer.
        RuntimeError: a worker failed otherwise; its output says more.
        KeyboardInterrupt: Ctrl-C; SystemExit: another signal. The agent has ended the workers.
    """
    failure = work / FAILURE
    failure.unlink(missing_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"{stage}-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        logs_specs=DefaultLogsSpecs(log_dir=str(work / "ranks")),  # else a folder in /tmp that nobody removes
    )
    worker = ("-m", "lyrics", "worker", stage, str(work), "--run-id", run_id)
    try:
        elastic_launch(settings, sys.executable)(*worker)
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError:
        code, _, sentence = (failure.read_text() if failure.exists() else "1 it left no message").partition(" ")
        if int(code) == EXIT_INPUT:
            raise InputError(sentence) from None
        if int(code) == EXIT_RETRY:
            raise RetryableError(sentence.removesuffix(MAY_PASS)) from None
        raise RuntimeError(f"a process of {stage} failed: {sentence}") from None


def report_failure(work: Path, code: int, sentence: str) -> None:
    """Called by a worker; the first to fail is heard, the others fail because of it."""
    if not (work / FAILURE).exists():
        io.write_text(work / FAILURE, f"{code} {sentence}")
