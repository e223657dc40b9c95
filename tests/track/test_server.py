"""A team's MLflow server in place of mlflow.db."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lyrics.config import Promote
from lyrics.track import registry, server


@contextlib.contextmanager
def mlflow_server(folder: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 90
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def never(version: int, split: str) -> Path:
    raise AssertionError("both were scored on the same test set")


@pytest.mark.soak
def test_registers_resolves_and_promotes_on_a_server(sources, make_model, tmp_path, monkeypatch):
    Path("mlflow.db").unlink()
    settings = Promote(split="test", minimum={"vqa_accuracy": 0.5}, bootstrap_samples=100, confidence=0.95)
    with mlflow_server(tmp_path / "elsewhere") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        make_model(0.7)
        assert registry.register({}, sources).version == 1
        assert registry.register({}, sources).reused
        make_model(0.9)
        registry.register({}, sources)
        assert registry.promote(1, settings=settings, evaluate_again=never).former is None
        assert registry.promote(settings=settings, evaluate_again=never).former == 1
        local = registry.resolve("models:/lyrics@champion")
        assert (local.stage2 / "config.json").exists() and (local.foundation / "clip").is_dir()
        before = (local.stage2 / "config.json").stat().st_mtime_ns
        again = registry.resolve("models:/lyrics/2")
        assert (again.stage2 / "config.json").stat().st_mtime_ns == before, "what was fetched is kept"
        assert registry.rollback().restored == 1
    assert server.exists()
    assert not Path("mlflow.db").exists() and not Path("mlruns").exists()
