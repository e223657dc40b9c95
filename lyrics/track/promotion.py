"""Promotion in three steps (gates, alias, audit trail) and the way back."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyrics import config as configuration
from lyrics import io
from lyrics.errors import InputError
from lyrics.track import gates, server, versions
from lyrics.track.versions import CANDIDATE, CHAMPION, NAME, RAW

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

FORMER_TAG = "former_champion"
# Given a version, scores it on the test set that is here now; returns a folder laid out as reports/.
EvaluateAgain = Callable[[int], Path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gates say about `version`. `former` is the champion of now; `already` that it is `version` itself."""

    version: int
    former: int | None
    gates: tuple[gates.Gate, ...]
    already: bool = False

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def __str__(self) -> str:
        if self.already:
            return f"{NAME} version {self.version} is the champion already; nothing changed"
        before = f"in place of version {self.former}" if self.former else "the first"
        return "\n".join([*map(str, self.gates), f"{NAME} version {self.version} is champion, {before}"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback:
    restored: int
    replaced: int

    def __str__(self) -> str:
        return f"{NAME} version {self.restored} is champion again, in place of version {self.replaced}"


def promote(
    version: int | None = None,
    *,
    settings: configuration.Promote | None = None,
    evaluate_again: EvaluateAgain | None = None,
    reason: str = "",
) -> Verdict:
    """Make a version (the candidate, if None) the champion, if it passes every gate.

    Raises:
        InputError: a gate refused it (nothing was changed), or there is no such version.
    """
    verdict = check(version, settings=settings, evaluate_again=evaluate_again)
    move(verdict)
    write_audit(verdict, reason)
    return verdict


def check(
    version: int | None = None,
    *,
    settings: configuration.Promote | None = None,
    evaluate_again: EvaluateAgain | None = None,
) -> Verdict:
    """The gates, without changing anything.

    Raises:
        InputError: names every gate that refused the version, and by how much.
    """
    settings = settings or configuration.load().promote
    client = server.connect()
    with server.reachable():
        chosen = versions.by_alias(client, CANDIDATE) if version is None else versions.by_number(client, version)
        if chosen is None:
            raise InputError(f"{NAME} has no {CANDIDATE} to promote; register one with: python -m lyrics register")
        number, champion = int(chosen.version), versions.by_alias(client, CHAMPION)
        if champion is not None and int(champion.version) == number:
            return Verdict(version=number, former=number, gates=(), already=True)
        passed = gates.floors(_evaluation(client, chosen), settings.split, settings.minimum)
        if champion is not None:
            ours, theirs = _paired_scores(client, chosen, champion, settings.split, evaluate_again)
            passed += gates.no_worse(
                ours, theirs, bootstrap_samples=settings.bootstrap_samples, confidence=settings.confidence
            )
    verdict = Verdict(version=number, former=int(champion.version) if champion else None, gates=tuple(passed))
    if not verdict.passed:
        failed = "\n  ".join(f"{gate.name}: {gate.detail}" for gate in verdict.gates if not gate.passed)
        raise InputError(f"{NAME} version {number} was not promoted; nothing changed. It did not pass:\n  {failed}")
    return verdict


def move(verdict: Verdict) -> None:
    """Set the alias; the former champion is remembered first, so that a crash in between loses nothing."""
    if verdict.already:
        return
    client = server.connect()
    with versions.exclusive(), server.reachable():
        now = versions.by_alias(client, CHAMPION)
        if (int(now.version) if now else None) != verdict.former:
            raise InputError("The champion changed while the gates were checked; promote again")
        versions.set_tags(client, verdict.version, {FORMER_TAG: str(verdict.former or "")})
        client.set_registered_model_alias(NAME, CHAMPION, str(verdict.version))


def write_audit(verdict: Verdict, reason: str = "") -> None:
    """Say on both versions, and in the model's trail, what happened when and why."""
    if verdict.already:
        return
    reason = reason or "passed the gates: " + ("; ".join(gate.name for gate in verdict.gates) or "none configured")
    client = server.connect()
    with server.reachable():
        _audit(client, "promote", verdict.version, verdict.former, reason)


def rollback(reason: str = "") -> Rollback:
    """Make the former champion the champion again.

    Raises:
        InputError: there is no champion, or it had no predecessor.
    """
    client = server.connect()
    with versions.exclusive(), server.reachable():
        champion = versions.by_alias(client, CHAMPION)
        if champion is None:
            raise InputError(f"{NAME} has no champion, so there is nothing to roll back")
        former = champion.tags.get(FORMER_TAG, "")
        if not former:
            raise InputError(
                f"{NAME} version {champion.version} replaced no champion; there is nothing to roll back to"
            )
        restored = int(versions.by_number(client, int(former)).version)
        client.set_registered_model_alias(NAME, CHAMPION, str(restored))
        _audit(client, "rollback", restored, int(champion.version), reason or "rolled back")
    return Rollback(restored=restored, replaced=int(champion.version))


def _audit(client: "MlflowClient", action: str, champion: int, former: int | None, reason: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions.set_tags(client, champion, {"champion_since": now, "champion_reason": reason})
    if former is not None:
        versions.set_tags(
            client, former, {"champion_until": now, "replaced_by": str(champion), "replaced_reason": reason}
        )
    versions.record(client, action, champion=champion, former=former, reason=reason)


def _evaluation(client: "MlflowClient", version: "ModelVersion") -> Mapping[str, Any]:
    return io.read_json(_report(client, version, "evaluation.json"))


def _test_set(client: "MlflowClient", version: "ModelVersion", split: str) -> str | None:
    """The content hash of the split that a version was scored on."""
    return _evaluation(client, version).get("data", {}).get(split, {}).get("sha256")


def _report(client: "MlflowClient", version: "ModelVersion", name: str) -> Path:
    """One file of the reports that were logged with a version."""
    from mlflow.exceptions import MlflowException

    try:
        return Path(client.download_artifacts(str(version.run_id), f"reports/{name}"))
    except (MlflowException, OSError) as error:
        raise InputError(
            f"{NAME} version {version.version} has no reports/{name} in its run; register it again"
        ) from error


def _paired_scores(
    client: "MlflowClient",
    candidate: "ModelVersion",
    champion: "ModelVersion",
    split: str,
    evaluate_again: EvaluateAgain | None,
) -> tuple[list[gates.SampleScore], list[gates.SampleScore]]:
    """Per-sample scores of both on one test set: as logged where its hash is the same, else measured again here."""
    wanted = _test_set(client, candidate, split)
    if wanted is not None and wanted == _test_set(client, champion, split):
        logged = [gates.read_scores(_report(client, v, f"samples/{split}.parquet")) for v in (candidate, champion)]
        if {s.sample_id for s in logged[0]} == {s.sample_id for s in logged[1]}:
            return logged[0], logged[1]
    here = io.sha256_tree(RAW / split) if (RAW / split).is_dir() else None
    if evaluate_again is None:
        raise InputError(
            f"{NAME} version {champion.version} (the champion) was scored on another {split} set than version "
            f"{candidate.version}; it must be evaluated again, which `python -m lyrics promote` does"
        )
    again = {
        v.version: gates.read_scores(evaluate_again(int(v.version)) / "samples" / f"{split}.parquet")
        for v in ((champion,) if here == wanted else (candidate, champion))
    }
    ours = again.get(candidate.version) or gates.read_scores(_report(client, candidate, f"samples/{split}.parquet"))
    return ours, again[champion.version]
