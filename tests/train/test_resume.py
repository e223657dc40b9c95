"""Both real stages, ended by force at any point and run again, leave the same bytes as a run that nobody disturbed."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mortal
import psutil
import pytest
import small_project

from lyrics import io

ROOT = Path(__file__).parents[2]
OUTS = {"pretrain": "models/stage1", "finetune": "models/stage2"}
NAMES = {"pretrain": "stage1", "finetune": "stage2"}
STEPS, EVERY = 10, 3
verbs = pytest.mark.parametrize("verb", list(OUTS))


@dataclasses.dataclass(frozen=True)
class Life:
    """What became of a process: exit code (minus the signal that ended it), steps it took, what it said."""

    code: int
    steps: list[int]
    said: str


End = Callable[[int], Life]


@dataclasses.dataclass(frozen=True)
class Mortal:
    """A project in `folder` whose stage `verb` can be told to die."""

    folder: Path
    server: subprocess.Popen
    verb: str

    def __call__(self, at: int = 0, how: str = "die") -> Life:
        order = {"folder": str(self.folder), "verb": self.verb, "at": at, "how": how}
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return Life(**json.loads(self.server.stdout.readline()))

    def result(self) -> str:
        return io.sha256_tree(self.folder / OUTS[self.verb])

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob(f"build/work/{self.verb}/*/checkpoints/*"))

    def forget(self) -> None:
        """Remove what the stage could go on from, and where it ended before: the next life is the first."""
        shutil.rmtree(self.folder / "build/work", ignore_errors=True)
        shutil.rmtree(self.folder / OUTS[self.verb], ignore_errors=True)


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, mortal.__file__]
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment, text=True) as process:
        yield process
        process.kill()


def make(folder: Path) -> None:
    config = small_project.configuration(steps=STEPS, dropout=0.1, checkpoint_every=EVERY)
    with contextlib.chdir(folder):
        small_project.make(folder, config)


@pytest.fixture(scope="module", params=list(OUTS))
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server) -> tuple[Mortal, str]:
    """A project, and the hash of what its stage leaves where nobody disturbs it."""
    project = Mortal(tmp_path_factory.mktemp("project"), server, request.param)
    make(project.folder)
    life = project()
    assert (life.code, life.steps) == (0, list(range(1, STEPS + 1))), life.said
    return project, project.result()


@pytest.fixture
def project(undisturbed: tuple[Mortal, str]) -> Mortal:
    undisturbed[0].forget()
    return undisturbed[0]


@pytest.fixture
def ends_as_undisturbed(undisturbed: tuple[Mortal, str]) -> End:
    """Run the stage once more: it goes on after the step that is named, to the same bytes."""
    project, expected = undisturbed

    def run(after: int) -> Life:
        life = project()
        assert (life.code, life.steps) == (0, list(range(after + 1, STEPS + 1))), life.said
        assert project.result() == expected
        return life

    return run


@pytest.mark.parametrize("at", [1, 3, 10])
def test_killed_at_any_step(project: Mortal, ends_as_undisturbed: End, at: int) -> None:
    life = project(at)
    assert (life.code, life.steps[-1]) == (-signal.SIGKILL, at)
    ends_as_undisturbed(after=(at - 1) // EVERY * EVERY)


def test_killed_again_and_again(project: Mortal, ends_as_undisturbed: End) -> None:
    for at in (2, 4, 7, 8, 10):
        assert project(at).code == -signal.SIGKILL
    ends_as_undisturbed(after=9)


@pytest.mark.parametrize(
    ("how", "ended_by", "after"),
    [
        ("die_in_the_middle_of_a_write", signal.SIGXFSZ, 3),
        ("die_before_the_rename", signal.SIGKILL, 3),
        ("die_after_the_rename", signal.SIGKILL, 6),
    ],
)
def test_killed_while_a_checkpoint_is_written(
    project: Mortal, ends_as_undisturbed: End, how: str, ended_by: int, after: int
) -> None:
    assert project(6, how).code == -ended_by
    left = [path.name[:8] for path in project.checkpoints()]
    assert left == (["00000003", "00000006"] if after == 6 else ["00000003", "unfinish"])
    assert project(after + 1).code == -signal.SIGKILL
    assert not [path for path in project.checkpoints() if path.suffix != ".pt"]
    ends_as_undisturbed(after)


NEEDS_DEV_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is full")


@pytest.mark.parametrize("how", ["reach_a_size_limit", pytest.param("fill_the_disk", marks=NEEDS_DEV_FULL)])
def test_no_room_for_a_checkpoint_is_one_sentence(project: Mortal, ends_as_undisturbed: End, how: str) -> None:
    life = project(6, how)
    assert (life.code, life.steps[-1]) == (1, 6)
    (sentence,) = [line for line in life.said.splitlines() if "step/s" not in line and line]
    assert sentence.startswith("lyrics: the disk, a quota or a size limit is full (")
    assert [path.name[:8] for path in project.checkpoints()] == ["00000003"]
    ends_as_undisturbed(after=3)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(project: Mortal, ends_as_undisturbed: End) -> None:
    project(8)
    *_, newest = project.checkpoints()
    flip_a_bit(newest)
    life = ends_as_undisturbed(after=3)
    assert f"{newest.name} is damaged" in life.said and "falling back" in life.said


def test_without_a_whole_checkpoint_it_starts_anew_and_says_so(project: Mortal, ends_as_undisturbed: End) -> None:
    project(8)
    for path in project.checkpoints():
        flip_a_bit(path)
    life = ends_as_undisturbed(after=0)
    assert "training starts anew" in life.said


@verbs
def test_features_that_are_not_finite_stop_it_before_the_step(
    tmp_path: Path, server: subprocess.Popen, verb: str
) -> None:
    make(tmp_path)
    project = Mortal(tmp_path, server, verb)
    before = io.sha256_tree(tmp_path / OUTS["pretrain"])
    life = project(4, "poison")
    assert life.code == 1 and 4 <= life.steps[-1] < STEPS
    (sentence,) = [line for line in life.said.splitlines() if line.startswith("lyrics: FloatingPointError: ")]
    assert "Traceback" not in life.said
    assert sentence.startswith(
        f"lyrics: FloatingPointError: {NAMES[verb]} stopped before step {life.steps[-1]}, with loss nan"
    )
    named = sentence.partition("the features of ")[2].partition(" are not finite")[0].split(", ")
    assert named and all(name == "instruct-5" or name.startswith("instruct-5-") for name in named)
    assert project.checkpoints()[-1].name[:8] == f"{life.steps[-1] // EVERY * EVERY:08d}"
    assert io.sha256_tree(tmp_path / OUTS["pretrain"]) == before and not (tmp_path / OUTS["finetune"]).exists()


def test_stage_2_says_at_once_which_features_are_not_finite(tmp_path: Path, server: subprocess.Popen) -> None:
    make(tmp_path)
    with contextlib.chdir(tmp_path):
        mortal.Fate(0, "", Path(), Path())._poison()
        for path in Path("data/refined/instruct").glob("*/shard.json"):  # as if they had been written so
            found = {name: io.sha256_file(path.parent / name) for name in io.read_json(path)["sha256"]}
            io.write_json(path, io.read_json(path) | {"sha256": found})
    life = Mortal(tmp_path, server, "finetune")()
    assert (life.code, life.steps) == (2, [])
    assert life.said.startswith("lyrics: The features of instruct-5-") and "\n" not in life.said.strip()


@pytest.mark.soak  # each start of a verb imports MLflow
@verbs
def test_the_verb_itself_is_killed_and_run_again(tmp_path: Path, verb: str) -> None:
    outcomes = []
    for kills in (0, 3):
        folder = tmp_path / str(kills)
        folder.mkdir()
        make(folder)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        for life in range(kills + 1):
            process = psutil.Popen([sys.executable, "-m", "lyrics", verb], cwd=folder, env=environment)
            while life < kills and process.poll() is None:
                saved = list(folder.glob(f"build/work/{verb}/*/checkpoints/*.pt"))
                if saved and max(int(path.name[:8]) for path in saved) >= EVERY * (life + 1):
                    process.kill()
                time.sleep(0.002)
            assert process.wait() == (-signal.SIGKILL if life < kills else 0)
        outcomes.append(io.sha256_tree(folder / OUTS[verb]))
    assert outcomes[0] == outcomes[1]
