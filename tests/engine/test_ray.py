"""Ray for real: a cluster of two nodes' processes on this machine, a worker killed, a node lost, the driver killed."""

import multiprocessing
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import chores
import psutil
import pytest
import small_pictures
import test_engine
from test_engine import fated, results, run

from lyrics import engine_ray
from lyrics.errors import InputError, RetryableError
from lyrics.refiner import refine
from lyrics.stage import NullTracker

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
# Ray is not imported here: it reads its environment when it is, and the cluster below makes that.
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is an extra: pip install -e '.[ray]'")
PATHS = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of one processor each, on the loopback interface, with a token of their own."""
    scratch = tempfile.mkdtemp(prefix="ray-test-")  # below pytest's own folder the path of a socket is too long
    own = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": scratch,
        "PYTHONPATH": PATHS,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=NODE)
        made.add_node(**NODE)
        yield made
        made.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)


def when_begun(root: Path, count: int, then) -> threading.Thread:
    """Calls `then` in the middle of a shard: as soon as `count` are begun."""
    chores.chores(root, 0)
    (root / "log").touch()

    def wait() -> None:
        while len(chores.begun(root)) < count:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@needs_ray
def test_shards_are_done_on_both_nodes_and_failures_are_tried_again(cluster, tmp_path):
    fated(tmp_path, "fail-3")
    fated(tmp_path, "kill-1")
    run(tmp_path, kind="ray", address=cluster.address, workers=2, seconds=0.1, torch=True, threads_per_worker=1)
    assert results(tmp_path) == {n: n * n for n in range(test_engine.COUNT)}
    assert {path.read_text().split()[2] for path in (tmp_path / "results").iterdir()} == {"1"}
    assert sorted(chores.begun(tmp_path)) == sorted([*range(test_engine.COUNT), 1, 3])
    nodes = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    assert len(nodes) == 2 and set(chores.parents(tmp_path)) == nodes


@needs_ray
def test_bad_input_and_a_shard_that_always_kills(cluster, tmp_path):
    fated(tmp_path, "refuse-2")
    with pytest.raises(InputError, match=r"^2 is no good; mend it$"):
        run(tmp_path, kind="ray", address=cluster.address, workers=1)
    fated(tmp_path, "kill-4", times=99)
    with pytest.raises(RuntimeError, match=r"shard chore-4 failed in attempt 2 of 2: WorkerLostError: ActorDiedError"):
        run(tmp_path, kind="ray", address=cluster.address, workers=1, retries=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A project, and what `refine` writes there in this process alone."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_pictures.make(folder)
        return folder, refined(folder / "alone", workers=1)


def refined(work: Path, **engine: object) -> dict[str, bytes]:
    """Every file that `refine` writes, by its name."""
    work.mkdir()
    refine.run(small_pictures.configuration(threads_per_worker=1, **engine), work, NullTracker())
    files = [path for path in sorted((work / "out").rglob("*")) if path.is_file()]
    return {path.relative_to(work / "out").as_posix(): path.read_bytes() for path in files}


def same_bytes(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    assert len(expected) == 6 * 4 + 2 * 4 + 2 * 2 + 1  # shards with their shard.json, tables, the summary
    return found.keys() == expected.keys() and all(found[name] == expected[name] for name in expected)


def test_processes_write_the_same_bytes(pictures, monkeypatch):
    folder, expected = pictures
    monkeypatch.chdir(folder)
    assert same_bytes(refined(folder / "processes", workers=2), expected)


@needs_ray
def test_ray_writes_the_same_bytes(cluster, pictures, monkeypatch):
    folder, expected = pictures
    monkeypatch.chdir(folder)
    assert same_bytes(refined(folder / "ray", kind="ray", address=cluster.address, workers=2), expected)


@pytest.mark.soak
def test_workers_killed_while_they_refine_leave_the_same_bytes(pictures, monkeypatch):
    """One after each shard that is finished, so that some die loading, some computing, some writing."""
    folder, expected = pictures
    monkeypatch.chdir(folder)
    stop, killed = threading.Event(), []

    def kill() -> None:
        seen = 0
        while not stop.is_set():
            finished = len(list((folder / "killed").glob("splits/*/shard-*")))
            children = multiprocessing.active_children()
            if finished > seen and children:
                seen = finished
                killed.append(children[0].pid)
                children[0].kill()
            time.sleep(0.001)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert same_bytes(refined(folder / "killed", workers=2, retries=20), expected)
    finally:
        stop.set()
        killer.join()
    assert len(set(killed)) >= 3


@needs_ray
@pytest.mark.soak
def test_a_node_lost_in_a_shard(cluster, tmp_path):
    extra = cluster.add_node(**NODE)
    lost = when_begun(tmp_path, 3, lambda: cluster.remove_node(extra, allow_graceful=False))
    run(tmp_path, count=12, kind="ray", address=cluster.address, workers=3, seconds=0.5)
    lost.join()
    assert results(tmp_path) == {n: n * n for n in range(12)}
    assert len(set(chores.workers(tmp_path))) == 3 and len(chores.begun(tmp_path)) == 13, "one shard was begun twice"


def driver(root: Path, code: str, **variables: str) -> subprocess.Popen:
    """A process that runs `code`; with `variables` it knows nothing of the cluster above."""
    script = root / "driver.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nimport test_engine\nif __name__ == '__main__':\n    {code}"
    )
    inherited = {name: value for name, value in os.environ.items() if not (variables and name.startswith("RAY_"))}
    environment = {**inherited, "PYTHONPATH": PATHS, **variables}
    return subprocess.Popen([sys.executable, str(script), str(root)], env=environment)


@needs_ray
@pytest.mark.soak
def test_all_nodes_with_room_are_lost_and_another_comes(cluster, tmp_path):
    """With nobody left to work the driver waits for a node."""
    room = {**NODE, "num_cpus": 2}
    lost = cluster.add_node(**room)
    chores.chores(tmp_path, 0)
    (tmp_path / "log").touch()
    settings = f"kind='ray', address='{cluster.address}', workers=1, threads_per_worker=2, seconds=0.5"
    with driver(tmp_path, f"test_engine.run(Path(sys.argv[1]), {settings})") as process:
        while len(chores.begun(tmp_path)) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        cluster.remove_node(lost, allow_graceful=False)
        time.sleep(3)
        assert process.poll() is None and len(results(tmp_path)) < test_engine.COUNT
        come = cluster.add_node(**room)
        assert process.wait(60) == 0
    cluster.remove_node(come)
    assert results(tmp_path) == {n: n * n for n in range(test_engine.COUNT)}


@needs_ray
@pytest.mark.soak
def test_the_driver_killed_and_started_again(cluster, tmp_path):
    chores.chores(tmp_path, 0)
    (tmp_path / "log").touch()
    settings = f"kind='ray', address='{cluster.address}', workers=2, count=10, seconds=0.5"
    with driver(tmp_path, f"test_engine.run(Path(sys.argv[1]), {settings})") as first:
        while len(chores.begun(tmp_path)) < 4:
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
    run(tmp_path, count=10, kind="ray", address=cluster.address, workers=2, seconds=0.1)
    assert results(tmp_path) == {n: n * n for n in range(10)}


@needs_ray
@pytest.mark.soak
@pytest.mark.parametrize("killed", [False, True])
def test_a_cluster_of_our_own_leaves_nothing_behind(tmp_path, killed):
    """It listens on the loopback interface only, and writes neither to the home folder nor, in the end, to /tmp."""
    home, temporary = tmp_path / "home", Path(tempfile.mkdtemp(prefix="r-"))
    home.mkdir()
    chores.chores(tmp_path, 0)
    (tmp_path / "log").touch()
    code = "test_engine.run(Path(sys.argv[1]), kind='ray', workers=2, seconds=1.0, count=8)"
    try:
        with driver(tmp_path, code, HOME=str(home), TMPDIR=str(temporary)) as process:
            while len(chores.begun(tmp_path)) < 3:
                assert process.poll() is None
                time.sleep(0.05)
            children = psutil.Process(process.pid).children(recursive=True)
            listening = [c.laddr.ip for p in children for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
            if killed:
                process.kill()
        assert listening and {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
        gone, alive = psutil.wait_procs(children, timeout=20)
        assert gone and not alive
        if killed:
            with driver(tmp_path, code, HOME=str(home), TMPDIR=str(temporary)) as process:
                assert process.wait() == 0
        assert results(tmp_path) == {n: n * n for n in range(8)}
        assert list(home.iterdir()) == [] and list(temporary.iterdir()) == []
    finally:
        shutil.rmtree(temporary)


def test_no_ray_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"the package ray is not installed here; pip install -e '\.\[ray\]'"):
        run(tmp_path, kind="ray")


@needs_ray
def test_an_address_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_ray, "_ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RetryableError, match=f"no Ray cluster answers at {address} .*refused.*ray start --head"):
        run(tmp_path, kind="ray", address=address)


@needs_ray
def test_a_cluster_without_room_for_a_worker_is_one_sentence(cluster, tmp_path):
    with pytest.raises(
        InputError, match=r"a worker needs 64 CPU and 0 GPU, but the nodes of the Ray cluster have 1 CPU"
    ):
        run(tmp_path, kind="ray", address=cluster.address, threads_per_worker=64)
