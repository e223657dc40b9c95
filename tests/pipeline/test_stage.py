"""What happens to a stage that is killed, interrupted, doubled, or that runs out of disk."""

import errno
import os
import signal
import sys

import pytest
from fake_project import FOLDER, Project, wait_for

from lyrics import stage
from lyrics.errors import InputError, RetryableError

COMPLETE = "x" * 100


@pytest.fixture
def composed(project: Project) -> Project:
    project.run(project.verb("compose"))
    return project


def test_a_killed_verb_resumes_where_it_was(composed: Project) -> None:
    first = composed.start(composed.verb("first"), PAUSE="0.1")
    wait_for(lambda: len(composed.log()) >= 4)
    first.kill()
    first.wait()
    assert not (composed.root / "data/first").exists()
    composed.run(composed.verb("first"))
    assert composed.result("data/first/result") == COMPLETE
    parts = [part for part, _ in composed.log()]
    assert sorted(set(parts)) == list(range(10)) and len(parts) <= 11


def test_other_inputs_start_afresh_and_clear_the_old_work(composed: Project) -> None:
    first = composed.start(composed.verb("first"), PAUSE="0.1")
    wait_for(lambda: len(composed.log()) >= 4)
    first.kill()
    first.wait()
    (composed.root / FOLDER / "a").write_text("another")
    (composed.root / "log").unlink()
    composed.run(composed.verb("first"))
    assert len(composed.log()) == 10
    assert len(list((composed.root / "build/work/first").iterdir())) == 1


def test_killing_dvc_stops_the_verb_and_the_same_command_goes_on(composed: Project) -> None:
    dvc = composed.start(composed.dvc("repro", "first"), PAUSE="1")
    wait_for(lambda: len(composed.log()) >= 3)
    dvc.kill()
    dvc.wait()
    wait_for(lambda: not composed.processes(), seconds=30)
    done = len(composed.log())
    assert done < 10 and not (composed.root / "data/first").exists(), "it went on without DVC"
    composed.run(composed.dvc("repro", "first"))
    assert composed.result("data/first/result") == COMPLETE
    assert len(composed.log()) <= 10 + 1 and done >= 3


def test_a_finished_result_survives_dvc_killed_before_it_recorded_it(composed: Project) -> None:
    composed.run(composed.verb("first"))  # as under a DVC that dies before it writes dvc.lock
    composed.run(["rm", "-r", "data/first"])  # as the next DVC does before it runs the command
    composed.run(composed.verb("first"))
    assert composed.result("data/first/result") == COMPLETE
    assert len(composed.log()) == 10


def test_a_forced_run_of_a_recorded_stage_does_the_work_again(composed: Project) -> None:
    composed.run(composed.dvc("repro", "first"))
    before = composed.result("dvc.lock")
    for runs in (2, 3):
        composed.run(composed.dvc("repro", "--force", "--single-item", "first"))
        assert len(composed.log()) == 10 * runs
    assert composed.result("dvc.lock") == before


def test_ctrl_c_ends_quietly_with_130(composed: Project) -> None:
    first = composed.start(composed.verb("first"), PAUSE="0.1")
    wait_for(lambda: len(composed.log()) >= 2)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == stage.EXIT_INTERRUPTED
    assert output == ""


def test_a_second_run_beside_the_first_ends_in_one_sentence(composed: Project) -> None:
    first = composed.start(composed.verb("first"), PAUSE="0.3")
    wait_for(composed.log)
    second = composed.run(composed.verb("first"), check=False)
    assert second.returncode == stage.EXIT_INPUT
    assert second.stderr == ("lyrics: stage first is already running in this folder; wait for it to end, or stop it\n")
    assert first.poll() is None
    first.kill()
    first.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit there")
def test_a_file_size_limit_ends_in_one_sentence_and_publishes_nothing(composed: Project) -> None:
    limited = (
        "import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        f"os.execv({sys.executable!r}, ['python', 'fake.py', 'first'])"
    )
    ran = composed.run([sys.executable, "-c", limited], check=False, BYTES="30000", PYTHONDONTWRITEBYTECODE="1")
    assert ran.returncode == 1
    assert "limit is full" in ran.stderr and ran.stderr.count("\n") == 1
    assert not (composed.root / "data/first").exists()
    composed.run(composed.verb("first"))
    assert composed.result("data/first/result")


def test_a_bad_input_is_one_sentence_and_debug_shows_the_traceback(composed: Project) -> None:
    composed.run(composed.verb("first"))
    (composed.root / "bad").touch()
    ran = composed.run(composed.verb("second"), check=False)
    assert (ran.returncode, ran.stderr) == (2, "lyrics: found a bad input; expected a good one\n")
    assert composed.result("build/tokens/second") == "2 found a bad input; expected a good one"
    ran = composed.run(composed.verb("second"), check=False, LYRICS_DEBUG="1")
    assert ran.returncode == 2 and "Traceback" in ran.stderr


def test_an_input_that_is_absent_is_named(composed: Project) -> None:
    ran = composed.run(composed.verb("second"), check=False)
    assert ran.returncode == 2
    assert "stage second reads data/first, which does not exist" in ran.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad"), 2),
        (RetryableError("down"), 75),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 1),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/a.jpg"), 2),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/a.jpg"), 2),
        (OSError("12000 requested and 9936 written"), 1),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1),
        (FloatingPointError("stage1 stopped before step 7"), 1),
    ],
)
def test_failures_that_users_can_mend_show_no_traceback(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, stage.one_sentence():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_behind_another_error_is_recognised() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "no room")
        except OSError as error:
            raise ValueError("could not write the table") from error
    except ValueError as error:
        assert stage.is_full_disk(error)
    assert not stage.is_full_disk(OSError(errno.ENOENT, "absent"))


def test_a_programming_error_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, stage.one_sentence():
        raise ZeroDivisionError("oops")
    assert ended.value.code == 1
    assert "ZeroDivisionError: oops" in capsys.readouterr().err
