"""The model as MLflow serves it (models from code): MLflow runs this file to get the model, so it imports little.

POST /invocations {"dataframe_records": [{"image": "<base64>", "prompt": "What colour is the umbrella?"}]}
-> {"predictions": ["red"]}
"""

import base64
import binascii
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import mlflow
import pandas as pd
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel
from PIL import Image

log = logging.getLogger(__name__)
MAX_ROWS = 32
MAX_IMAGE_BYTES = 10 * 2**20
MAX_PROMPT_CHARACTERS = 2000


class Answerer(Protocol):
    def answer(self, image: Image.Image, question: str) -> str: ...


class ServedLyrics(PythonModel):
    """Rows of (base64 image, prompt) to answers. What a caller did wrong is HTTP 400 with one sentence."""

    def load_context(self, context: Any) -> None:  # MLflow looks for an argument of exactly this name
        from lyrics.inference import Lyrics

        folders = {name: Path(path) for name, path in context.artifacts.items()}
        self.model: Answerer = Lyrics.from_folders(folders["stage2"], folders["foundation"])
        # The server answers each request in a thread; two at once would share cores and gain nothing.
        self.lock = threading.Lock()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        if len(model_input) > MAX_ROWS:
            raise _refused(f"{len(model_input)} rows; at most {MAX_ROWS} in a request")
        rows = [
            (image_bytes(image, row), check_prompt(prompt, row))
            for row, (image, prompt) in enumerate(zip(model_input["image"], model_input["prompt"], strict=True))
        ]
        given_up = time.monotonic() + MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get()
        with self.lock:
            return [self._answer(content, prompt, row, given_up) for row, (content, prompt) in enumerate(rows)]

    def _answer(self, content: bytes, prompt: str, row: int, given_up: float) -> str:
        """The picture is decoded only here: a small file may be one of hundreds of megabytes.

        Raises:
            MlflowException: HTTP 400 for what cannot be read, 500 where the model fails, 503 once the server has told
                the caller that it took too long: the next request waits for the lock.
        """
        if time.monotonic() > given_up:
            name = MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.name
            raise MlflowException(
                f"row {row} was not reached in the time of a request; send fewer rows, or start the server with a "
                f"greater {name}",
                error_code=TEMPORARILY_UNAVAILABLE,
            )
        try:
            return self.model.answer(decode_image(content, row), prompt)
        except MlflowException:
            raise
        except Exception:  # MLflow would take it for the caller's fault, and send the traceback
            log.exception("row %d was not answered", row)
            raise MlflowException(
                f"row {row}: the model failed; the server's log says why", error_code=INTERNAL_ERROR
            ) from None


def image_bytes(encoded: str, row: int = 0) -> bytes:
    """A file from base64 (a data URL will do) that begins as a picture does."""
    if not isinstance(encoded, str) or not encoded.strip():
        raise _refused(f"row {row}: image is empty; send a JPEG or PNG file in base64")
    text = encoded.partition(",")[2] if encoded.startswith("data:") else encoded
    if len(text) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise _refused(f"row {row}: image is larger than {MAX_IMAGE_BYTES // 2**20} MiB; send a smaller one")
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _refused(f"row {row}: image is not base64; send a JPEG or PNG file in base64") from None
    from lyrics.data.files import measure

    with _readable(row):
        measure(content)
    return content


def decode_image(content: bytes, row: int = 0) -> Image.Image:
    """An RGB picture, decoded as `lyrics ask` decodes a file."""
    from lyrics.data.files import decode

    with _readable(row):
        return decode(content)


@contextlib.contextmanager
def _readable(row: int) -> Iterator[None]:
    from lyrics.data.files import BadImageError

    try:
        yield
    except BadImageError as error:
        raise _refused(f"row {row}: image cannot be read: {error}; send a JPEG or PNG file in base64") from None


def check_prompt(prompt: str, row: int = 0) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise _refused(f"row {row}: prompt is empty; ask a question about the picture")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise _refused(f"row {row}: prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS}")
    return prompt


def _refused(message: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(message)


mlflow.models.set_model(ServedLyrics())
