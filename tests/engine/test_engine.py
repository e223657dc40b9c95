"""What every engine promises: all shards done once, failures tried again and named, a lost worker replaced."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chores
import psutil
import pytest
from chores import Chore

from lyrics import engine_processes
from lyrics.compose import preview
from lyrics.engine import run_shards
from lyrics.errors import InputError, RetryableError
from lyrics.stage import NullTracker, is_full_disk

PARAMS = Path(__file__).parents[2] / "params"
KINDS = [file.stem for file in (PARAMS / "engine").iterdir()]
COUNT = 6
one_or_two = pytest.mark.parametrize("workers", [1, 2])


class Recorder(NullTracker):
    def __init__(self):
        self.metrics, self.params = [], []

    def log_metrics(self, values, step=None):
        self.metrics.append((step, values))

    def log_params(self, values):
        self.params.append(values)


def run(root: Path, count: int = COUNT, tracker=None, seconds: float = 0.0, torch: bool = False, **settings) -> None:
    load = functools.partial(chores.load, root, seconds, torch)
    run_shards(
        chores.settings(**settings),
        load,
        chores.chores(root, count),
        done=chores.is_done,
        name="chore",
        tracker=tracker or NullTracker(),
    )


def results(root: Path) -> dict[int, int]:
    lines = [path.read_text().split() for path in (root / "results").iterdir()]
    return {int(line[0]): int(line[1]) for line in lines}


def fated(root: Path, what: str, times: int = 1) -> None:
    chores.chores(root, 0)
    (root / "fate" / what).write_text("once\n" * times)


@one_or_two
def test_every_shard_is_done_once(tmp_path, workers):
    run(tmp_path, workers=workers)
    assert results(tmp_path) == {n: n * n for n in range(COUNT)}
    assert sorted(chores.begun(tmp_path)) == list(range(COUNT))
    pids = set(chores.workers(tmp_path))
    assert pids == {os.getpid()} if workers == 1 else os.getpid() not in pids and len(pids) <= 2


@one_or_two
def test_what_is_done_is_not_done_again(tmp_path, workers):
    run(tmp_path, count=2)
    run(tmp_path, workers=workers)
    run(tmp_path, workers=workers)
    assert sorted(chores.begun(tmp_path)) == list(range(COUNT))


@one_or_two
def test_a_failure_is_tried_again(tmp_path, workers, capsys):
    fated(tmp_path, "fail-3", times=2)
    run(tmp_path, workers=workers, retries=2)
    assert chores.begun(tmp_path).count(3) == 3 and len(results(tmp_path)) == COUNT
    assert "shard chore-3 failed in attempt 2 of 3: ZeroDivisionError" in capsys.readouterr().out


@one_or_two
def test_what_fails_again_and_again_stops_the_run_with_its_name_and_error(tmp_path, workers):
    fated(tmp_path, "fail-3", times=9)
    with pytest.raises(
        RuntimeError, match=r"chore: shard chore-3 failed in attempt 3 of 3: .*3 divided by nothing"
    ) as caught:
        run(tmp_path, workers=workers, retries=2)
    assert "in _meet_fate" in str(caught.value), "the worker's traceback"
    assert chores.begun(tmp_path).count(3) == 3
    assert not multiprocessing.active_children()


@one_or_two
def test_bad_input_stops_it_at_once(tmp_path, workers):
    fated(tmp_path, "refuse-2", times=9)
    with pytest.raises(InputError, match=r"^2 is no good; mend it$"):
        run(tmp_path, workers=workers)
    assert chores.begun(tmp_path).count(2) == 1


@one_or_two
def test_a_full_disk_stops_it_at_once_and_is_seen_to_be_one(tmp_path, workers):
    fated(tmp_path, "full-2")
    with pytest.raises(OSError) as caught:
        run(tmp_path, workers=workers)
    assert is_full_disk(caught.value)


@one_or_two
def test_what_may_pass_by_itself_stays_so(tmp_path, workers):
    fated(tmp_path, "later-2", times=9)
    with pytest.raises(RetryableError, match=r"shard chore-2 failed in attempt 1 of 1: .*2 does not answer"):
        run(tmp_path, workers=workers, retries=0)


def test_bad_input_while_loading(tmp_path):
    fated(tmp_path, "refuse-load", times=2)
    with pytest.raises(InputError, match="load is no good"):
        run(tmp_path, workers=2)
    assert chores.begun(tmp_path) == []


def test_workers_that_die_while_loading(tmp_path):
    fated(tmp_path, "kill-load", times=99)
    with pytest.raises(
        RuntimeError, match=r"loading, before its first shard, failed in attempt 3 of 3: .*was ended by SIGKILL"
    ):
        run(tmp_path, workers=2)


def test_a_worker_killed_in_a_shard_is_replaced(tmp_path):
    fated(tmp_path, "kill-1")
    fated(tmp_path, "kill-5", times=2)
    run(tmp_path, workers=2)
    assert results(tmp_path) == {n: n * n for n in range(COUNT)}
    assert sorted(chores.begun(tmp_path)) == sorted([*range(COUNT), 1, 5, 5])


def test_a_worker_killed_from_outside(tmp_path):
    def kill() -> None:
        while not chores.begun(tmp_path):
            time.sleep(0.01)
        os.kill(chores.workers(tmp_path)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    (tmp_path / "log").touch()
    killer.start()
    run(tmp_path, workers=2, seconds=0.3)
    killer.join()
    assert results(tmp_path) == {n: n * n for n in range(COUNT)} and len(chores.begun(tmp_path)) == COUNT + 1


def test_a_shard_that_always_kills_its_worker_is_named(tmp_path):
    fated(tmp_path, "kill-4", times=99)
    with pytest.raises(
        RuntimeError, match=r"shard chore-4 failed in attempt 3 of 3: .*its process \d+ was ended by SIGKILL"
    ):
        run(tmp_path, workers=2)


DRIVER = """
import sys
from pathlib import Path
import test_engine
if __name__ == "__main__":
    test_engine.run(Path(sys.argv[1]), count=8, seconds=0.2, workers=int(sys.argv[2]))
"""


@one_or_two
def test_the_driver_killed_and_started_again(tmp_path, workers):
    """Its workers die with it, and only what was not finished is done by the next."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = [sys.executable, str(script), str(tmp_path), str(workers)]
    (tmp_path / "log").touch()
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}) as driver:
        while len(chores.begun(tmp_path)) < 4:
            assert driver.poll() is None
            time.sleep(0.01)
        driver.kill()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in chores.workers(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    finished = set(results(tmp_path))
    before = len(chores.begun(tmp_path))
    assert 0 < len(finished) < 8
    run(tmp_path, count=8, workers=workers)
    assert results(tmp_path) == {n: n * n for n in range(8)}
    assert sorted(chores.begun(tmp_path)[before:]) == sorted(set(range(8)) - finished)


@one_or_two
def test_torch_has_the_threads_that_are_asked_for(tmp_path, workers):
    import torch

    before = torch.get_num_threads()
    run(tmp_path, count=2, workers=workers, threads_per_worker=3, torch=True)
    assert {path.read_text().split()[2] for path in (tmp_path / "results").iterdir()} == {"3"}
    assert torch.get_num_threads() == before


def test_progress_is_a_bar_and_metrics(tmp_path, capsys):
    run(tmp_path, count=2)
    tracker = Recorder()
    run(tmp_path, tracker=tracker)
    step, last = tracker.metrics[-1]
    assert (step, last["chore/shards"], last["chore/shards_total"], last["chore/eta_s"]) == (COUNT, COUNT, COUNT, 0)
    assert last["chore/images_per_s"] > 0
    assert tracker.params[0]["engine"]["kind"] == "local"
    assert "6/6" in (said := capsys.readouterr().err) and "images/s" in said


def test_a_result_that_is_not_seen_here_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr("lyrics.engine._SEEN_SECONDS", 0.0)
    load = functools.partial(chores.load, tmp_path)
    with pytest.raises(InputError, match="wrote shard chore-0, but it is not here; all nodes"):
        run_shards(
            chores.settings(),
            load,
            chores.chores(tmp_path, 1),
            done=lambda chore: chore == Chore(7, tmp_path),
            name="chore",
            tracker=NullTracker(),
        )


@pytest.mark.parametrize(
    ("number", "per_worker", "expected"),
    [(3, 0, None), (1, 1, "5"), (1, 2, "6,7"), (1, 0.5, "4"), (2, 0.5, "5"), (7, 0.4, "7"), (2, 0.33, "4")],
)
def test_gpus_of_a_local_worker(monkeypatch, number, per_worker, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert engine_processes.gpus_of(number, per_worker) == expected


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InputError, match="ask for GPU number 2, but this machine has 1"):
        engine_processes.gpus_of(1, 1)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (["engine.address=a:1"], r"engine.address is a:1 but engine.kind is local; set engine=ray"),
        (["engine=ray", "engine.address=ray://a"], r"'ray://a' is not of the form HOST:PORT"),
        (["engine.gpus_per_worker=1.5"], "above 1 it must be a whole number"),
        (["engine.gpus_per_worker=1", "device=cpu"], "engine.gpus_per_worker is 1.0 but device is cpu"),
        (["engine=ray", "device=cuda"], "which hides the GPUs from Ray's workers; set it to 1"),
        (["engine.workers=0"], r"engine\.workers: Input should be greater than or equal to 1"),
        (["engine=spark"], "engine 'spark' in .* is unknown; choices: local, ray"),
    ],
)
def test_engines_that_contradict_themselves_are_refused(choices, said):
    with pytest.raises(InputError, match=said):
        preview(["~overrides", *choices], PARAMS / "run.yaml")


def test_both_engines_have_the_same_threads():
    """Else a choice of engine would change bytes, and run stages again."""
    threads = {
        preview(["~overrides", f"engine={kind}"], PARAMS / "run.yaml")["engine"]["threads_per_worker"] for kind in KINDS
    }
    assert len(KINDS) == 2 and len(threads) == 1
