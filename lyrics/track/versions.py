"""Registered versions: which there are, what their aliases and audit trail say, and where their files lie."""

import contextlib
import dataclasses
import datetime
import getpass
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from lyrics.errors import InputError, RetryableError
from lyrics.track import server

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

NAME = "lyrics"
CANDIDATE = "candidate"
CHAMPION = "champion"
CONTENT_TAG = "content_sha256"
AUDIT_PREFIX = "audit/"
STAGE2 = Path("models/stage2")
FOUNDATION = Path("models/foundation")
RAW = Path("data/raw")
CACHE = Path("build/registry")
LOCK = Path("build/registry.lock")
LOCK_SECONDS = 60.0


class GoneError(InputError):
    """The registry knows a version whose files are no longer there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalModel:
    """Where a model's files lie on this machine. `label` says which model it is, for the user."""

    stage2: Path
    foundation: Path
    label: str


def by_alias(client: "MlflowClient", alias: str) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(NAME, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
            return None
        raise


def by_number(client: "MlflowClient", version: int) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(NAME, str(version))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        there = sorted(int(v.version) for v in client.search_model_versions(f"name = '{NAME}'"))
        known = ", ".join(map(str, there)) or "none; register one with: python -m lyrics register"
        raise InputError(f"{NAME} has no version {version}; registered versions: {known}") from None


def with_content(client: "MlflowClient", content: str) -> "ModelVersion | None":
    """The newest version with this content whose files are still there."""
    found = client.search_model_versions(f"name = '{NAME}' AND tags.{CONTENT_TAG} = '{content}'")
    for version in sorted(found, key=lambda v: -int(v.version)):
        folder = _local_folder(client, version)
        if folder is None or (folder / "MLmodel").exists():
            return version
    return None


def ensure_model(client: "MlflowClient") -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(NAME, description="Lyrics, a vision-language model with fine-grained grounding.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def record(client: "MlflowClient", action: str, **facts: Any) -> None:
    """Add one event to the audit trail: a tag of the registered model that nothing overwrites."""
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    event = {"action": action, "by": _user(), **facts}
    client.set_registered_model_tag(NAME, AUDIT_PREFIX + now, json.dumps(event, sort_keys=True))


def audit_trail(client: "MlflowClient") -> list[dict[str, Any]]:
    """All events, oldest first, each with its time as `at`."""
    tags = client.get_registered_model(NAME).tags
    return [
        {"at": key.removeprefix(AUDIT_PREFIX), **json.loads(value)}
        for key, value in sorted(tags.items())
        if key.startswith(AUDIT_PREFIX)
    ]


def last_champion(client: "MlflowClient") -> int | None:
    """Whom the audit trail has as champion."""
    events = [event for event in audit_trail(client) if "champion" in event]
    return events[-1]["champion"] if events else None


def set_tags(client: "MlflowClient", version: int, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(NAME, str(version), key, value)


def resolve(uri: str | Path) -> LocalModel:
    """The local folders behind a registry URI or a folder; copied only when the artifacts are elsewhere.

    Args:
        uri: `models:/lyrics@ALIAS`, `models:/lyrics/VERSION`, a project root (with models/), an MLflow model folder,
            or a folder with stage2/ and foundation/.

    Raises:
        InputError: there is no such version, or the folder holds no model.
        RetryableError: the registry is down.
    """
    text = str(uri)
    if not text.startswith("models:"):
        return _in_folder(Path(uri))
    path = text.removeprefix("models:").lstrip("/")
    name, _, alias = path.partition("@")
    name, _, number = name.partition("/")
    if name != NAME or bool(alias) == bool(number) or (number and not number.isdigit()):
        raise InputError(f"{text} names no version of {NAME}; expected models:/{NAME}@ALIAS or models:/{NAME}/NUMBER")
    client = server.connect()
    with server.reachable():
        version = by_alias(client, alias) if alias else by_number(client, int(number))
        if version is None:
            raise InputError(
                f"No version of {NAME} has the alias {alias}; register one with: python -m lyrics register"
            )
        return _fetched(client, version, f"{NAME} version {version.version}" + (f" ({alias})" if alias else ""))


def best_available() -> LocalModel:
    """The champion, else the candidate, else the model in models/: what `lyrics ask` answers from."""
    why = "no model is registered"
    if server.exists():
        try:
            client = server.connect()
            with server.reachable():
                for alias in (CHAMPION, CANDIDATE):
                    version = by_alias(client, alias)
                    if version is None:
                        continue
                    label = f"{NAME} version {version.version} ({alias})"
                    try:
                        return _fetched(client, version, label)
                    except GoneError:  # the folder was moved, or mlruns/ cleared
                        why = f"the files of {label} are gone"
        except RetryableError:
            why = "the registry does not answer"
    if not (STAGE2.is_dir() and FOUNDATION.is_dir()):
        raise InputError(f"There is no model: {why} and {STAGE2} does not exist; make one with: make run")
    return LocalModel(stage2=STAGE2, foundation=FOUNDATION, label=f"local model {STAGE2} ({why})")


def _in_folder(folder: Path) -> LocalModel:
    if (folder / "MLmodel").exists():
        return _in_mlflow_folder(folder, str(folder))
    for root in (folder, folder / "models"):
        if (root / "stage2").is_dir() and (root / "foundation").is_dir():
            return LocalModel(stage2=root / "stage2", foundation=root / "foundation", label=str(root))
    raise InputError(f"{folder} holds no model; expected stage2/ and foundation/ in it, or an MLflow model (MLmodel)")


def _in_mlflow_folder(folder: Path, label: str) -> LocalModel:
    described = yaml.safe_load((folder / "MLmodel").read_text())
    artifacts = described.get("flavors", {}).get("python_function", {}).get("artifacts", {})
    if not {"stage2", "foundation"} <= artifacts.keys():
        raise InputError(f"{folder} is an MLflow model, but not one of {NAME}: it has no stage2 and foundation")
    paths = {name: folder / artifacts[name]["path"] for name in ("stage2", "foundation")}
    return LocalModel(stage2=paths["stage2"], foundation=paths["foundation"], label=label)


def _fetched(client: "MlflowClient", version: "ModelVersion", label: str) -> LocalModel:
    folder = _local_folder(client, version)
    if folder is None:
        from mlflow.artifacts import download_artifacts

        folder = CACHE / version.tags.get(CONTENT_TAG, f"version-{version.version}")
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # another process may be fetching it: then wait for that
            if not (folder / "MLmodel").exists():
                uri, partial = server.tracking_uri(), folder.with_name(folder.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
                source = client.get_model_version_download_uri(NAME, version.version)
                download_artifacts(artifact_uri=source, dst_path=str(partial), tracking_uri=uri, registry_uri=uri)
                found = next(partial.rglob("MLmodel"), None)
                if found is None:
                    raise InputError(f"The files of {label} at {source} hold no model")
                found.parent.rename(folder)
                shutil.rmtree(partial, ignore_errors=True)
    elif not (folder / "MLmodel").exists():
        raise GoneError(f"The files of {label} are gone from {folder}; register it again: python -m lyrics register")
    return _in_mlflow_folder(folder, label)


def _local_folder(client: "MlflowClient", version: "ModelVersion") -> Path | None:
    """Where the version's files lie, if that is a folder of this machine."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    location = client.get_model_version_download_uri(NAME, version.version)
    if location.startswith("file:") or location.startswith("/"):
        return Path(local_file_uri_to_path(location))
    return None


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One process of this folder at a time changes the registry."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(LOCK, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise RetryableError(f"Another process has been changing the registry for {LOCK_SECONDS:.0f} s") from None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
