"""The served model: good and bad requests, in process and over HTTP."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
import weakref
from pathlib import Path

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from lyrics import serving
from lyrics.track import registry


def encoded(size: tuple[int, int] = (20, 10), form: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def served(monkeypatch):
    class Answers:
        @classmethod
        def from_folders(cls, stage2: Path, foundation: Path):
            assert (stage2, foundation) == (Path("a"), Path("b"))
            return cls()

        def answer(self, image, question):
            return f"{image.mode} {image.size} {question}"

    monkeypatch.setitem(sys.modules, "lyrics.inference", types.SimpleNamespace(Lyrics=Answers))
    model = serving.ServedLyrics()
    model.load_context(types.SimpleNamespace(artifacts={"stage2": "a", "foundation": "b"}))
    return lambda *rows: model.predict(None, pd.DataFrame(rows, columns=["image", "prompt"]))


def test_answers_each_row_in_order(served):
    answers = served([encoded(), "What?"], ["data:image/png;base64," + encoded((5, 6)), "Where?"])
    assert answers == ["RGB (20, 10) What?", "RGB (5, 6) Where?"]


def test_a_request_holds_one_decoded_picture_at_a_time(served, monkeypatch):
    decoded: list[weakref.ref] = []
    decode = serving.decode_image

    def one_at_a_time(content: bytes, row: int) -> Image.Image:
        assert not any(image() for image in decoded)
        image = decode(content, row)
        decoded.append(weakref.ref(image))
        return image

    monkeypatch.setattr(serving, "decode_image", one_at_a_time)
    assert len(served(*[[encoded(), "What?"]] * 5)) == len(decoded) == 5


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (["", "What?"], "row 0: image is empty"),
        ([None, "What?"], "row 0: image is empty"),
        (["@@@@", "What?"], "image is not base64"),
        ([base64.b64encode(b"hello").decode(), "What?"], "image cannot be read: not a picture"),
        ([encoded((64, 64), "JPEG")[:400], "What?"], "image cannot be read"),
        ([encoded(), "  "], "prompt is empty"),
        ([encoded(), None], "prompt is empty"),
        ([encoded(), "x" * 2001], "prompt has 2001 characters; at most 2000"),
        (["A" * (15 * 2**20), "What?"], "image is larger than 10 MiB"),
        ([encoded((9000, 9000)), "What?"], "9000 x 9000 pixels"),
    ],
)
def test_bad_request_is_the_callers_fault_and_says_why(served, row, says):
    with pytest.raises(MlflowException, match=says) as caught:
        served(row)
    assert caught.value.get_http_status_code() == 400


def test_a_bad_row_is_named_and_too_many_are_refused(served):
    with pytest.raises(MlflowException, match="row 1: prompt is empty"):
        served([encoded(), "What?"], [encoded(), ""])
    with pytest.raises(MlflowException, match="33 rows; at most 32"):
        served(*[[encoded(), "What?"]] * 33)


def test_a_fault_of_the_model_is_not_the_callers(served, monkeypatch, caplog):
    """MLflow would answer with 400 and the traceback."""

    def fail(content: bytes, row: int) -> Image.Image:
        raise RuntimeError("out of memory at /secret/path")

    monkeypatch.setattr(serving, "decode_image", fail)
    with pytest.raises(MlflowException, match="row 0: the model failed") as caught:
        served([encoded(), "What?"])
    assert caught.value.get_http_status_code() == 500
    assert "secret" not in caught.value.serialize_as_json() and "secret" in caplog.text


def test_rows_that_nobody_waits_for_any_more_are_not_answered(served, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(serving.time, "monotonic", lambda: now[0])
    decode = serving.decode_image

    def slow(content: bytes, row: int) -> Image.Image:
        now[0] += 40
        return decode(content, row)

    monkeypatch.setattr(serving, "decode_image", slow)
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "60")
    with pytest.raises(MlflowException, match="row 2 was not reached") as caught:
        served(*[[encoded(), "What?"]] * 3)
    assert caught.value.get_http_status_code() == 503
    assert len(served([encoded(), "What?"])) == 1  # the lock is free


def post(port: int, body: object, kind: str = "application/json") -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextlib.contextmanager
def mlflow_serves(uri: str):
    """`mlflow models serve` on a free loopback port, in a process group of its own, since it starts workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-p", str(port)]
    # The served code must come from the model, not from this tree.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with Path("serve.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                    break
                assert process.poll() is None and time.monotonic() < deadline, Path("serve.log").read_text()
                time.sleep(0.2)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_plain_mlflow_serves_the_candidate(sources, make_model):
    """The command of the README, from the project root, with nothing set."""
    make_model(0.7)
    registry.register({}, sources)
    with mlflow_serves("models:/lyrics@candidate") as port:
        row = {"image": encoded(), "prompt": "What is red?"}
        assert post(port, {"dataframe_records": [row]}) == (200, '{"predictions": ["0.7 RGB 20x10 What is red?"]}')
        assert post(port, {"inputs": {k: [v] for k, v in row.items()}})[0] == 200
        for body, says in [
            ({"dataframe_records": [{**row, "image": "@@"}]}, "image is not base64"),
            ({"dataframe_records": [{"image": encoded()}]}, "prompt"),
            ({"dataframe_records": [{"prompt": "What?"}]}, "image"),
            ({"rows": []}, "input"),
            (b"{", ""),
        ]:
            status, text = post(port, body)
            assert 400 <= status < 500 and says in text, (body, status, text)
            assert "Traceback" not in text
        assert post(port, {"dataframe_records": [row]})[0] == 200, "bad requests leave the server well"
