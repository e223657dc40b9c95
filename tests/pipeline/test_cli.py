"""The command line: quick, and clear about mistakes."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lyrics import cli, dag, doctor
from lyrics.errors import InputError

ROOT = Path(__file__).parents[2]


def lyrics(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lyrics", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, lyrics.cli; print(*sys.modules)"
    modules = set(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split())
    assert not modules & {"torch", "mlflow", "transformers", "hydra", "prefect", "pandas", "numpy", "dvc"}
    fastest = 60.0
    for _ in range(3):
        started = time.perf_counter()
        assert lyrics("--help").returncode == 0
        fastest = min(fastest, time.perf_counter() - started)
    assert fastest < 3.0  # half a second where the machine is not busy


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_of_torch_soon_sleep_unless_the_user_chose(chosen: dict[str, str], spins: str) -> None:
    code = "import atexit, os, runpy, sys; sys.argv = ['lyrics', '--help']\n"
    code += "atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules))\n"
    code += "runpy.run_module('lyrics', run_name='__main__')"
    inherited = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, env=inherited | chosen)
    assert said.splitlines()[-1] == f"{spins} False"  # and nobody imports torch before it is set


def test_every_stage_has_its_verb() -> None:
    listed = lyrics("--help").stdout
    for stage in dag.read(ROOT / "dvc.yaml").values():
        assert stage.command.startswith("python -m lyrics ")
        assert f" {stage.command.split()[3]} " in listed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("foundation", "ears"), "no part 'ears'; choices: tokenizer, llm"),
        (("configure", "preset=huge"), "preset 'huge'"),
        (("configure", "stage2.stepz=1"), "stage2.stepz"),
        (("configure", "stage2.steps=-1"), "stage2.steps"),
        (("configure", "nonsense"), "'nonsense' is not of the form key=value"),
        (("configure", "evaluate.splits=[test"), "the value of evaluate.splits is not valid YAML: [test"),
        (("configure", "data=photos", "folder=/no/such"), "folder /no/such is missing"),
        (("ask", "/no/such.png", "what?"), "/no/such.png does not exist; give the path of a JPEG"),
        (("ask", "docs", "what?"), "docs is a folder; give the path of a JPEG"),
        (("ask", "Makefile", "what?"), "Makefile cannot be used: not a picture; give a JPEG"),
        (("ask", "docs/scene.png", " "), "The question is empty; ask something"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    ran = lyrics(*arguments)
    assert ran.returncode == 2
    assert ran.stderr.startswith("lyrics: ") and words in ran.stderr
    assert "Traceback" not in ran.stderr and ran.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("promote", "99"), "build/config.yaml does not exist; write it with: python -m lyrics compose"),
        (("register",), "build/config.yaml does not exist; write it with: python -m lyrics compose"),
        (("evaluate",), "stage evaluate reads data/raw, which does not exist"),
        (("evaluate-full",), "build/config.yaml does not exist; write it with: python -m lyrics compose"),
        (("foundation", "clip"), "stage foundation@clip reads data/raw/foundation, which does not exist"),
        (("ingest",), "build/config.yaml does not exist; write it again with: python -m lyrics compose"),
    ],
)
def test_a_verb_before_its_time_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    for name in ("params", "lyrics", "dvc.yaml", "requirements.lock"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    command = [sys.executable, "-m", "lyrics", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 2
    assert words in ran.stderr and ran.stderr.count("\n") == 1, ran.stderr


def test_a_device_that_is_not_there_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cli._check_device("cuda:0")
    with pytest.raises(InputError, match=r"device is cuda:3, but this machine has 1 devices of the kind cuda"):
        cli._check_device("cuda:3")


@pytest.mark.parametrize(
    ("processes", "device", "gpus", "says"),
    [
        (2, "cuda:0", 4, r"stage1.processes is 2 but device is cuda:0, one GPU; set device to auto or cuda"),
        (8, "auto", 4, r"stage1.processes is 8, but this machine has 4 GPUs; set it to 4 at most, or"),
        (8, "cuda", 4, r"stage1.processes is 8, but this machine has 4 GPUs"),
        (4, "auto", 4, None),
        (8, "auto", 0, None),
        (8, "cpu", 4, None),
    ],
)
def test_processes_share_no_gpu(
    monkeypatch: pytest.MonkeyPatch, processes: int, device: str, gpus: int, says: str | None
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
        cli._check_processes("stage1.processes", processes, device)


def test_doctor_names_each_lack_with_its_cure(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("no-such-package==1.0\n")
    lacks = [
        doctor.check_python((3, 9, 1)),
        doctor.check_packages(lock, is_locked=True),
        doctor.check_disk(1.0, 5, "tiny"),
        doctor.check_memory(1.0, 4, "tiny"),
    ]
    assert [lack.level for lack in lacks] == ["missing"] * 4
    assert all(lack.cure for lack in lacks)
    assert "no-such-package" in str(lacks[1])
    assert doctor.check_java(False).level == "note"
    assert doctor.check_java(True).level == "ok"
    elsewhere = doctor.check_packages(lock, is_locked=False)  # the lock has packages of Linux alone
    assert elsewhere.level == "note" and "1 of" in elsewhere.found and "make run" not in elsewhere.cure


def test_doctor_counts_choices_that_are_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor.examine() == 1
    said = capsys.readouterr().out
    assert "run.yaml does not exist" in said and "Nothing is missing" not in said
    (tmp_path / "params").mkdir()
    (tmp_path / "params/run.yaml").write_text("preset: huge\ndata: world\nfolder: lyrics/world\noverrides: {}\n")
    choices = [one for one in doctor.check_choices() if one.level == "missing"]
    assert [one.subject for one in choices] == ["choices"] and "huge" in choices[0].found


@pytest.mark.parametrize("manifest", ["{", "{}"])
def test_doctor_names_a_damaged_manifest(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/manifest.json").write_text(manifest)
    (found,) = doctor.check_weights(tmp_path)
    assert found.level == "missing" and "make the part with" in found.found


def test_doctor_does_not_wait_for_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 30)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert "does not answer" in doctor.check_gpu("tiny").found


def test_doctor_sees_changed_weights(tmp_path: Path) -> None:
    from lyrics import io

    part = tmp_path / "clip"
    io.write_text(part / "model.safetensors", "weights")
    manifest = {"part": "clip", "sha256": {"model.safetensors": "0" * 64}}
    io.write_json(part / "manifest.json", manifest)
    (found,) = doctor.check_weights(tmp_path)
    assert found.level == "missing" and "model.safetensors" in found.found


def test_doctor_notices_threads_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert "OMP_NUM_THREADS=1 on 4 processors" in doctor.check_threads().found


def test_doctor_says_which_products_precision_auto_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for native, said in ((True, "products in bf16"), (False, "the processor has no products in bf16")):
        monkeypatch.setattr("lyrics.numerics.has_native_bf16", lambda _, native=native: native)
        assert doctor.check_bf16().found == said
