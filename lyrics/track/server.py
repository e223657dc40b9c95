"""Where MLflow lives, and whether it is there: every client of this package comes from `connect`.

MLflow's own defaults hold, so that plain `mlflow ui` and `mlflow models serve` at the project root see the same store:
mlflow.db and mlruns/ there, or whatever MLFLOW_TRACKING_URI names.
"""

import contextlib
import logging
import os
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lyrics.errors import InputError, RetryableError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "lyrics"
ANSWER_SECONDS = 5.0
# MLflow alone would try for minutes. What the user has set stays.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
_SQLITE = "sqlite:///"


def quiet_environment() -> None:
    """Telemetry off and short time-outs; must come before the first import of mlflow in a process."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db in the working folder; local paths are made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return f"{_SQLITE}{Path('mlflow.db').absolute()}"
    if uri.startswith(_SQLITE):
        return f"{_SQLITE}{Path(urllib.parse.unquote(uri.removeprefix(_SQLITE))).absolute()}"
    if "://" not in uri and not uri.startswith(("file:", "databricks")):
        return Path(uri).absolute().as_uri()
    return uri


def exists() -> bool:
    """Whether there is anything to look into: asking a store that was never made would make it."""
    uri = tracking_uri()
    return not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists()


def connect() -> "MlflowClient":
    """A client of the tracking store and the registry.

    Raises:
        RetryableError: the server does not answer within seconds, or the database is locked.
        InputError: the file is no MLflow database, or its schema is of another MLflow version.
    """
    uri = tracking_uri()
    _check_reachable(uri)
    quiet_environment()
    with warnings.catch_warnings(), reachable():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        # They announce every migration of a new database and every step taken: pages that nobody asked for.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        for name in ("alembic", "urllib3", "mlflow.system_metrics"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # It logs the traceback of what it raises as well; `reachable` makes one sentence of that.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.get_experiment_by_name(EXPERIMENT)
    return client


def experiment_id(client: "MlflowClient") -> str:
    """The id of the experiment `lyrics`, made on first use."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(EXPERIMENT))
    except MlflowException:  # another process made it in between
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            raise
        return str(found.experiment_id)


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """Turn the many ways in which a store fails to answer into one clear sentence."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (RequestException, SQLAlchemyError) as error:
        raise _unreachable(tracking_uri(), str(error)) from error
    except MlflowException as error:
        if "out-of-date database schema" in error.message or "Can't locate revision" in error.message:
            raise InputError(
                f"{tracking_uri()} was written by another MLflow version: {_short(error.message)}"
            ) from error
        if error.error_code in ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED"):
            raise _unreachable(tracking_uri(), error.message) from error
        raise


def _check_reachable(uri: str) -> None:
    """A probe without MLflow, whose own retries last minutes and print every attempt."""
    if uri.startswith(_SQLITE):
        _check_sqlite(Path(uri.removeprefix(_SQLITE)))
    elif uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{_without_user(uri).rstrip('/')}/health", timeout=ANSWER_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise _unreachable(uri, f"HTTP {error.code}") from error
        except (OSError, ValueError) as error:
            raise _unreachable(uri, str(getattr(error, "reason", error))) from error


def _check_sqlite(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(
            f"The folder of the MLflow database {path} does not exist; make it or correct MLFLOW_TRACKING_URI"
        )
    if not path.exists():
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{path.parent} is not writable, so MLflow's database cannot be made there")
        return
    try:
        with contextlib.closing(sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode=rw", uri=True)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError as error:
        raise _unreachable(f"{_SQLITE}{path}", str(error)) from error
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} is not an MLflow database ({error}); move it away and run again") from error


def _unreachable(uri: str, why: str) -> RetryableError:
    if uri.startswith(_SQLITE):
        return RetryableError(
            f"The MLflow database {uri.removeprefix(_SQLITE)} did not answer ({_short(why)}). End what else uses it, "
            "look at the disk below it, or name another with MLFLOW_TRACKING_URI"
        )
    return RetryableError(
        f"The MLflow server at {_without_user(uri)} did not answer ({_short(why)}). Start it, correct "
        "MLFLOW_TRACKING_URI, or unset that variable to use mlflow.db in this folder"
    )


def _short(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else "no reason given"


def _without_user(uri: str) -> str:
    """The URI without user and password, which urllib cannot use and a message must not show."""
    parts = urllib.parse.urlsplit(uri)
    return uri.replace(f"{parts.netloc.rpartition('@')[0]}@", "", 1) if "@" in parts.netloc else uri
