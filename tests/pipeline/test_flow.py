"""The Prefect flow on the fake project: what ran, what was reused, and that no ending leaves anything behind."""

import importlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from fake_project import Project, wait_for
from test_full_disk import in_small_file_system

from flows import stages
from flows.stages import Output
from lyrics import stage

pytestmark = pytest.mark.timeout(1200)  # seconds each on two quiet cores; a starved machine needs the rest
FLOW = [sys.executable, "-m", "flows.end_to_end", "until=second"]


def outcomes(output: str) -> list[str]:
    """The results in the table that ends a run, in order."""
    rows = [line.split("│") for line in output.splitlines() if line.startswith("│")]
    return [f"{row[1].strip()} {row[2].strip()}" for row in rows]


@pytest.fixture
def served(project: Project, services: dict[str, str]) -> Project:
    project.environment |= services
    return project


def test_a_run_says_what_ran_and_what_was_reused(served: Project) -> None:
    assert outcomes(served.run(FLOW).stdout) == ["compose ran", "first ran", "second ran"]
    again = served.run(FLOW).stdout
    assert outcomes(again) == ["compose unchanged", "first unchanged", "second unchanged"]
    assert "Reused    compose, first, second" in again
    # A choice that only the second stage reads; then back, which the run cache knows.
    changed = served.run([*FLOW, "stage2.steps=7"]).stdout
    assert outcomes(changed) == ["compose ran", "first unchanged", "second ran"]
    served.choose()
    restored = "restored from the run cache"
    assert outcomes(served.run(FLOW).stdout) == [f"compose {restored}", "first unchanged", f"second {restored}"]
    assert served.run(served.dvc("status")).stdout.strip() == "Data and pipelines are up to date."


def test_a_failure_is_one_sentence_with_the_code_of_the_stage(served: Project) -> None:
    (served.root / "bad").touch()
    ran = served.run(FLOW, check=False)
    assert ran.returncode == 2
    assert ran.stderr.rstrip().splitlines()[-1].endswith("second: found a bad input; expected a good one")
    assert "Traceback" not in ran.stderr + ran.stdout
    assert served.result("data/first/result"), "what was finished is lost"


@pytest.fixture(scope="session")
def end_to_end() -> ModuleType:
    """Imported before a test captures what is written: Prefect logs for good to the stderr of its import."""
    return importlib.import_module("flows.end_to_end")


@pytest.fixture
def refused(
    project: Project, end_to_end: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """What FLOW says, in this process, of a choice that it refuses before it starts a server."""

    def started() -> None:
        raise AssertionError("a server was started")

    monkeypatch.chdir(project.root)
    monkeypatch.setattr(end_to_end, "_start_server", started)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended, stage.one_sentence():
            end_to_end.main([*FLOW[3:], *arguments])
        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (2, 1), said
        return said

    return run


def test_a_refusal_ends_the_process_before_anything_is_started(project: Project) -> None:
    ran = project.run([*FLOW, "nonsense"], check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert not (project.root / ".prefect/prefect.db").exists()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("nonsense", "'nonsense' is not of the form key=value"),
        ("preset=huge", "preset 'huge' in params/run.yaml is unknown; choices: laptop, paper, tiny"),
        ("stage2.stepz=3", "stage2.stepz in params/run.yaml names an unknown key"),
        ("until=nowhere", "dvc.yaml has no stage nowhere; choices: compose, first, second"),
        ("push=perhaps", "push=perhaps is unknown; choices: true, false"),
        ("push=true", "push=true, but DVC has no default remote; name one with: dvc remote add --default"),
        ("folder=/no/such", "data source world reads no folder, but folder is /no/such"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_is_started(
    project: Project, refused: Callable[..., str], argument: str, says: str
) -> None:
    before = project.result("params/run.yaml")
    assert says in refused(argument)
    assert project.result("params/run.yaml") == before


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("params/run.yaml", "preset: [tiny\n", "params/run.yaml is not valid YAML"),
        ("params/run.yaml", "preset: tiny\n", "params/run.yaml must hold exactly the keys"),
        ("dvc.yaml", "stages: [\n", "dvc.yaml is not valid YAML"),
        ("dvc.yaml", "", "dvc.yaml describes no stages"),
    ],
)
def test_a_broken_file_of_the_project_is_one_sentence(
    project: Project, refused: Callable[..., str], file: str, content: str, says: str
) -> None:
    (project.root / file).write_text(content)
    assert says in refused()


def test_a_registry_that_is_down_is_one_sentence_and_loses_nothing(served: Project) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        down = f"http://127.0.0.1:{closed.getsockname()[1]}"
        ran = served.run(FLOW, check=False, MLFLOW_TRACKING_URI=down, LYRICS_RETRY_SECONDS="0")
    assert ran.returncode == stage.EXIT_RETRY
    (said,) = [line for line in ran.stderr.splitlines() if line.startswith("lyrics: ")]
    assert f"The MLflow server at {down} did not answer" in said and "run the same command again" in said
    assert "Traceback" not in ran.stderr + ran.stdout
    assert outcomes(served.run(FLOW).stdout) == ["compose ran", "first ran", "second ran"]


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(served: Project, tmp_path: Path) -> None:
    """The verb has no room for its result, nor for the token that tells why it failed."""
    place = tmp_path / "place"
    place.mkdir()
    script = """
        cp -R "$PROJECT/." . && $PYTHON -m dvc repro -q compose && used=$(du -sk . | cut -f1) &&
        mount -o remount,size=$((used + 400))k "$PLACE"
        $PYTHON -m flows.end_to_end until=second; echo "$? $(ls -A data 2>/dev/null)"
        mount -o remount,size=64m "$PLACE"
        $PYTHON -m flows.end_to_end until=second; echo "$? $(ls -A data)"; sort log | uniq -d -w 2 | wc -l"""
    variables = {**served.environment, "PROJECT": str(served.root), "BYTES": "100000"}
    ran = in_small_file_system(place, "64m", script, **variables)
    assert "Traceback" not in ran.stderr, ran.stderr
    (said,) = [line for line in ran.stderr.splitlines() if line.startswith("lyrics: first: ")]
    assert "the disk, a quota or a size limit is full (" in said and "run the same command again" in said
    first, *_, last, again = [line for line in ran.stdout.splitlines() if line[:1].isdigit()]
    assert (first, last) == ("1 ", "0 first"), ran.stdout + ran.stderr
    assert outcomes(ran.stdout) == ["compose unchanged", "first ran", "second ran"]
    assert int(again) <= 1, "it began anew"


def test_dvc_without_room_is_told_as_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "token").touch()  # as a verb leaves it that ended well
    failure = stages._failure(
        "first", tmp_path / "token", ["ERROR: unexpected error - [Errno 28] No space left on device"]
    )
    assert "first: the disk, a quota or a size limit is full (unexpected error" in str(failure)


def without_privilege(command: list[str]) -> list[str]:
    """Root, too, may read only what its permission bits allow."""
    if os.geteuid():
        return command
    if shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and setpriv is absent")
    dropped = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", *command]


@pytest.mark.parametrize("forbidden", ["folder", "folder/a", "params"])
def test_what_may_not_be_read_or_written_is_one_sentence(served: Project, forbidden: str) -> None:
    (served.root / "folder").mkdir()
    (served.root / "folder" / "a").write_text("a")
    served.choose("preset: tiny\ndata: photos\nfolder: folder\noverrides: {}\n")
    path = served.root / forbidden
    before = path.stat().st_mode
    path.chmod(0o555 if forbidden == "params" else 0)
    try:
        ran = served.run(without_privilege([*FLOW, "seed=3"] if forbidden == "params" else FLOW), check=False)
    finally:
        path.chmod(before)
    assert ran.returncode in (1, 2)
    (said,) = [line for line in ran.stderr.splitlines() if line.startswith("lyrics: ")]
    assert "a file or folder may not be read or written (" in said and str(path) in said
    assert "Traceback" not in ran.stderr + ran.stdout, ran.stderr


def test_only_failures_that_may_pass_are_tried_again(served: Project) -> None:
    (served.root / "fail").write_text("1")
    ran = served.run(FLOW, LYRICS_RETRY_SECONDS="0")
    assert outcomes(ran.stdout) == ["compose ran", "first ran", "second ran"]
    assert "the server does not answer" in ran.stderr
    assert "Retry 1/2" in ran.stderr


def test_a_killed_flow_leaves_nobody_behind_and_goes_on_when_run_again(project: Project) -> None:
    """With Prefect's own temporary server, which a killed flow cannot stop."""
    flow = project.start(FLOW, PAUSE="1")
    wait_for(lambda: len(project.log()) >= 3, seconds=600)
    assert any("uvicorn" in " ".join(process.cmdline()) for process in project.processes())
    flow.kill()
    flow.wait()
    wait_for(lambda: not project.processes(), seconds=60)
    assert not (project.root / "data/first").exists()
    assert outcomes(project.run(FLOW).stdout) == ["compose unchanged", "first ran", "second ran"]
    assert len(project.log()) <= 11, "it began anew"


@pytest.mark.parametrize("victim", ["fake.py", "lyrics.process"])
def test_a_killed_verb_or_dvc_is_told_and_goes_on_when_run_again(served: Project, victim: str) -> None:
    flow = served.start(FLOW, PAUSE="0.3")
    wait_for(lambda: len(served.log()) >= 3, seconds=600)
    next(process for process in served.processes() if victim in process.cmdline()).kill()
    output, _ = flow.communicate(timeout=300)
    assert flow.returncode == 1
    assert "first: its process was killed; what it had finished is kept: run the same command again" in output
    assert outcomes(served.run(FLOW).stdout) == ["compose unchanged", "first ran", "second ran"]
    assert len(served.log()) <= 11, "it began anew"


@pytest.mark.parametrize("server", ["another", "temporary"])
def test_ctrl_c_stops_everything_without_a_traceback(project: Project, services: dict[str, str], server: str) -> None:
    if server == "another":
        project.environment |= services
    flow = project.start(FLOW, PAUSE="1")
    wait_for(lambda: len(project.log()) >= 2, seconds=600)
    os.killpg(flow.pid, signal.SIGINT)  # as a terminal does, to Prefect's temporary server as well
    output, _ = flow.communicate(timeout=300)
    assert flow.returncode == 130
    assert "Traceback" not in output and "Error logging to API" not in output
    assert not project.processes()
    assert outcomes(project.run(FLOW).stdout)[1] == "first ran"
    assert len(project.log()) <= 11, "it began anew"


def test_a_second_flow_beside_the_first_ends_in_one_sentence(served: Project) -> None:
    flow = served.start(FLOW, PAUSE="2")
    wait_for(served.log, seconds=600)
    second = served.run(FLOW, check=False)
    assert second.returncode == 2
    said = "lyrics: another run works in this folder; wait for it to end, or stop it"
    assert said in second.stderr.splitlines()  # Prefect's own log may follow
    assert "Traceback" not in second.stderr
    assert flow.poll() is None
    os.killpg(flow.pid, signal.SIGKILL)
    flow.wait()


def test_a_stage_that_takes_too_long_is_stopped(served: Project) -> None:
    served.run([sys.executable, "-m", "flows.end_to_end", "until=compose"])  # which must not be the one too slow
    code = "from flows.end_to_end import end_to_end; end_to_end(until='first', stage_timeout_hours=4 / 3600)"
    ran = served.run([sys.executable, "-c", code], check=False, PAUSE="5")
    assert ran.returncode != 0
    assert "first: stopped after its time-out of 4 s" in ran.stderr
    assert not served.processes()


def test_progress_goes_to_the_terminal_and_lines_to_the_log(tmp_path: Path) -> None:
    lines: list[str] = []
    with (tmp_path / "terminal").open("w") as terminal:
        output = Output(lines.append, terminal)
        for piece in ("one\ntw", "o\n", "\r10%", "\r5", "0%\r100%\n", "caf", "\u00e9"):
            output.feed(piece.encode())
        output.close()
    assert lines == ["one", "two", "100%", "caf\u00e9"]
    shown = (tmp_path / "terminal").read_text()
    assert "10%" in shown
