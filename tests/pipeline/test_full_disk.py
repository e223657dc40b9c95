"""No room at each kind of write: one sentence, nothing under a final name; with room again, the same command ends well.

EFBIG comes from RLIMIT_FSIZE, ENOSPC from a file system of a few kilobytes in a mount namespace of its own.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import full_disk
import pytest

pytestmark = pytest.mark.timeout(900)  # every stage imports MLflow, which a busy machine makes slow
ROOT = Path(__file__).parents[2]
SCRIPT = Path(full_disk.__file__)
PROGRESS = re.compile(r"\d+%\|")
# Written in one go into `work/out`, which is published as a whole; the others go through a temporary name.
UNPUBLISHED = {"features_array", "pretrained_model", "tokenizer", "copied_tree", "safetensors", "picture"}


@functools.cache
def namespace() -> tuple[str, ...]:
    """The command that gives a process mounts of its own, as root or not; empty where this machine allows none."""
    for command in (("unshare", "-m"), ("unshare", "-Urm")):
        try:
            tried = subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
        except OSError:
            continue
        if tried.returncode == 0:
            return command
    return ()


def in_small_file_system(folder: Path, size: str, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with a new file system of `size` at `folder`, which is gone afterwards."""
    if not namespace():
        pytest.skip("this machine lets nobody mount a file system")
    command = [*namespace(), "sh", "-c", f'mount -t tmpfs -o size={size} none "$PLACE" && cd "$PLACE" && {script}']
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PLACE": str(folder), "PYTHON": sys.executable, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=840)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory):
    """What became of each write, by the kind of limit; each kind in one process, because imports take seconds."""
    root = tmp_path_factory.mktemp("full")
    (root / "source").mkdir()
    (root / "source" / "weights").write_bytes(full_disk.CONTENT)
    variables = {"SOURCE": str(root / "source"), "SCRIPT": str(SCRIPT)}

    @functools.cache
    def of(kind: str) -> dict[str, dict]:
        folder = root / kind
        folder.mkdir()
        if kind == "file size limit":
            environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
            environment.pop("MLFLOW_TRACKING_URI", None)
            command = [sys.executable, str(SCRIPT), str(folder), "20000"]
            ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=840)
        else:  # mlflow.db is made while there is room; then there is none
            make = "$PYTHON -c 'from lyrics.track import server; server.connect()'"
            shrink = 'mount -o remount,size=$(($(du -sk . | cut -f1) + 24))k "$PLACE"'
            write = 'MLFLOW_TRACKING_URI="sqlite:///$PLACE/mlflow.db" $PYTHON "$SCRIPT" "$PLACE"'
            ran = in_small_file_system(folder, "8m", f"{make} && {shrink} && {write}", **variables)
        assert ran.returncode == 0, ran.stderr
        assert "Traceback" not in ran.stderr, ran.stderr
        return {line["write"]: line for line in map(json.loads, ran.stdout.splitlines())}

    return of


@pytest.mark.parametrize("kind", ["file size limit", "file system"])
@pytest.mark.parametrize("write", [write.__name__ for write in full_disk.FILES])
def test_a_write_without_room_is_one_sentence(outcomes, write: str, kind: str) -> None:
    found = outcomes(kind)[write]
    assert (found["code"], found["full"]) == (1, True), found
    assert found["sentence"].startswith("the disk, a quota or a size limit is full (")
    assert "\n" not in found["sentence"] and "run the same command again" in found["sentence"]
    assert write in UNPUBLISHED or found["left"] == [], "half a file under its final name"


@pytest.mark.parametrize("write", [write.__name__ for write in full_disk.MLFLOW])
def test_a_registry_without_room_is_one_sentence(outcomes, write: str) -> None:
    found = outcomes("file system")[write]
    assert (found["code"], found["full"]) == (1, True), found
    assert "\n" not in found["sentence"]


def test_a_real_stage_ends_well_once_there_is_room(tmp_path: Path) -> None:
    """`ingest` of the embedded world, with room for more of its writes each time, then for all."""
    small = " ".join(
        f"world.scenes.{split}=8" for split in ("foundation", "web", "instruct", "val", "test", "test_ood")
    )
    rooms_kb = (16, 60, 150, 300, 4000)
    script = f"""
        cp -R "$ROOT/params" . && ln -s "$ROOT/lyrics" "$ROOT/dvc.yaml" "$ROOT/requirements.lock" . &&
        $PYTHON -m lyrics configure {small} world.corpus_documents=200 world.max_objects=3 >/dev/null &&
        $PYTHON -m lyrics compose && $PYTHON -c 'from lyrics.track import server; server.connect()' &&
        used=$(du -sk . | cut -f1) &&
        for room in {" ".join(map(str, rooms_kb))}; do
            mount -o remount,size=$((used + room))k "$PLACE"
            $PYTHON -m lyrics ingest 2>"$OUTSIDE/$room"; echo "$? $(ls -A data 2>/dev/null | tr '\\n' ' ')"
        done"""
    place = tmp_path / "place"
    place.mkdir()
    ran = in_small_file_system(place, "16m", script, ROOT=str(ROOT), OUTSIDE=str(tmp_path))
    *failed, last = zip(ran.stdout.splitlines(), ((tmp_path / str(room)).read_text() for room in rooms_kb), strict=True)
    assert last[0] == "0 raw " and "lyrics: " not in last[1], ran.stderr
    for outcome, said in failed:
        assert outcome == "1 ", "something was published"
        (sentence,) = [line for line in said.splitlines() if not PROGRESS.search(line) and line]
        assert sentence.startswith("lyrics: the disk, a quota or a size limit is full ("), said
