"""Registration of a finished model, by content; promotion and the way back to files are found here too."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyrics import config as configuration
from lyrics import io
from lyrics.errors import InputError
from lyrics.track import lineage, packaging, runs, server, versions
from lyrics.track.promotion import promote, rollback
from lyrics.track.versions import CANDIDATE, FOUNDATION, NAME, RAW, STAGE2, best_available, resolve

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

__all__ = ["best_available", "promote", "register", "resolve", "rollback"]

REPORTS = Path("reports")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """`reused`: a version with the same content was there already."""

    version: int
    alias: str
    reused: bool
    uri: str

    def __str__(self) -> str:
        return f"{NAME} version {self.version} ({self.alias}), {'same content as before' if self.reused else 'new'}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """What a version is made of."""

    stage2: Path = STAGE2
    foundation: Path = FOUNDATION
    reports: Path = REPORTS
    raw: Path = RAW
    code: Path = packaging.PACKAGE
    lock: Path = packaging.LOCK

    def content_sha256(self) -> str:
        return lineage.content_sha256(
            stage2=self.stage2,
            foundation=self.foundation,
            evaluation=self.reports / "evaluation.json",
            samples=self.reports / "samples",
        )


def register(config: configuration.Config | None = None, sources: Sources | None = None) -> RegisteredVersion:
    """Register the finished model as a new version of `lyrics`, or reuse the version with the same content.

    Raises:
        InputError: a part of the model is missing, or reports/ are of another one.
        RetryableError: the registry is down, or another process holds it.
    """
    sources = sources or Sources()
    for path in (sources.stage2, sources.foundation, sources.reports / "evaluation.json"):
        if not path.exists():
            raise InputError(
                f"{path} does not exist, so there is no finished model to register; make it with: dvc repro"
            )
    _check_evaluated(sources)
    if config is None and configuration.CONFIG_PATH.exists():
        config = configuration.load()
    content = sources.content_sha256()
    client = server.connect()
    with versions.exclusive(), server.reachable():
        found = versions.with_content(client, content)
        reused = found is not None
        version = int((found or _create(client, content, config, sources)).version)
        before = versions.by_alias(client, CANDIDATE)
        if before is None or int(before.version) != version:
            client.set_registered_model_alias(NAME, CANDIDATE, str(version))
            versions.record(client, "register", version=version, reused=reused)
    return RegisteredVersion(version=version, alias=CANDIDATE, reused=reused, uri=f"models:/{NAME}/{version}")


def _check_evaluated(sources: Sources) -> None:
    """Scores of another model would pass the gates for this one."""
    recorded = io.read_json(sources.reports / "evaluation.json").get("data", {})
    for name, found in lineage.model_sha256(sources.stage2, sources.foundation).items():
        if recorded.get(name, {}).get("sha256") != found:
            raise InputError(
                f"{sources.reports} holds scores of another model: its {name} is not the one in "
                f"{getattr(sources, name)}; evaluate this one with: dvc repro"
            )


def _create(client: "MlflowClient", content: str, config: Any, sources: Sources) -> "ModelVersion":
    evaluation = io.read_json(sources.reports / "evaluation.json")
    origin = lineage.collect(data=sources.raw)
    card = packaging.model_card(evaluation, origin, sources.foundation, sources.raw)
    origin_tags = {versions.CONTENT_TAG: content, **origin.tags()}
    with runs.stage_run("register", config or {}) as tracker, _package_folder() as folder:
        model = folder / "model"
        packaging.save(
            model,
            stage2=sources.stage2,
            foundation=sources.foundation,
            card=card,
            code=sources.code,
            lock=sources.lock,
        )
        tracker.set_tags(origin_tags)
        tracker.log_metrics(packaging.all_scores(evaluation))
        for name, sha256 in origin.data.items():
            tracker.log_dataset(f"raw/{name}", sources.raw / name, sha256)
        tracker.log_artifact(model / "model_card.md")
        tracker.log_artifact(sources.reports, "reports")
        experiment = server.experiment_id(client)
        logged = client.create_logged_model(experiment, name=NAME, source_run_id=tracker.run_id)
        client.log_model_artifacts(logged.model_id, str(model))
        client.finalize_logged_model(logged.model_id, "READY")
        versions.ensure_model(client)
        return client.create_model_version(
            NAME,
            source=f"models:/{logged.model_id}",
            run_id=tracker.run_id,
            tags={**origin_tags, **packaging.score_tags(evaluation), **packaging.parameter_tags(config)},
            description=card[:4900],
            model_id=logged.model_id,
        )


@contextlib.contextmanager
def _package_folder() -> Iterator[Path]:
    """An empty folder beside the lock that the caller holds; not in /tmp, which may be smaller than a model."""
    folder = versions.LOCK.parent / "package"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed registration left
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
