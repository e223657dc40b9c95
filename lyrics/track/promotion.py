"""Promotion in three steps (gates, alias, audit trail) and the way back."""

import contextlib
import dataclasses
import datetime
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_SCORED_BY = ("tokenizer", "max_new_tokens", "scoring_sha256")  # of evaluation.json
# Scores a version on the present data of a split; returns a folder laid out as reports/. Whoever promotes must bring
# it, because this package knows nothing of models: lyrics.evaluate.again has it.
EvaluateAgain = Callable[[int, str], Path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gates say about `version`.

    Attributes:
        former: the champion of now.
        already: it is `version` itself, so there was nothing to compare.
        scored_again: the versions whose logged scores were of another test set than those they were compared with.
        former_lost: its files are gone, so that only the floors were asked.
    """

    version: int
    former: int | None
    gates: tuple[gates.Gate, ...]
    already: bool = False
    scored_again: tuple[int, ...] = ()
    former_lost: bool = False

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def __str__(self) -> str:
        if self.already:
            return f"{NAME} version {self.version} is the champion already; nothing changed"
        before = f"in place of version {self.former}" if self.former else "the first"
        return "\n".join([*_notes(self), *map(str, self.gates), f"{NAME} version {self.version} is champion, {before}"])

    def refusal(self) -> str:
        """Which gates failed, by how much, and that everything stays as it was."""
        failed = [f"{gate.name}: {gate.detail}" for gate in self.gates if not gate.passed]
        stays = f"version {self.former} stays champion" if self.former else "there is still no champion"
        passed = len(self.gates) - len(failed)
        return "\n  ".join(
            [
                f"{NAME} version {self.version} was not promoted; nothing changed, {stays}. It passed {passed} of "
                f"{len(self.gates)} gates and failed:",
                *failed,
                *_notes(self),
            ]
        )


def _notes(verdict: Verdict) -> list[str]:
    again = " and ".join(f"version {number}" for number in verdict.scored_again)
    notes = [f"({again} scored again on the test set that is here now)"] if again else []
    if verdict.former_lost:
        notes.append(f"(the files of version {verdict.former} are gone: nothing to compare with)")
    return notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback:
    restored: int
    replaced: int

    def __str__(self) -> str:
        return f"{NAME} version {self.restored} is champion again, in place of version {self.replaced}"


def promote(
    version: int | None = None,
    *,
    evaluate_again: EvaluateAgain,
    settings: configuration.Promote | None = None,
    reason: str = "",
) -> Verdict:
    """Make a version (the candidate, if None) the champion, if it passes every gate.

    Raises:
        InputError: a gate refused it (nothing was changed), or there is no such version.
    """
    verdict = check(version, evaluate_again=evaluate_again, settings=settings)
    move(verdict)
    write_audit(verdict, reason)
    return verdict


def check(
    version: int | None = None,
    *,
    evaluate_again: EvaluateAgain,
    settings: configuration.Promote | None = None,
) -> Verdict:
    """The gates, without changing anything. All are asked of one and the same test set.

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
        again: tuple[int, ...] = ()
        lost = champion is not None and _is_lost(client, champion)
        if champion is None or lost:
            with _reports(client, chosen, "evaluation.json") as reports:
                evaluation = io.read_json(reports / "evaluation.json")
            passed = gates.floors(evaluation, settings.split, settings.minimum)
        else:
            ours, theirs, again = _on_one_test_set(client, chosen, champion, settings.split, evaluate_again)
            passed = gates.floors(ours.evaluation, settings.split, settings.minimum)
            passed += gates.no_worse(
                ours.samples,
                theirs.samples,
                bootstrap_samples=settings.bootstrap_samples,
                confidence=settings.confidence,
            )
    verdict = Verdict(
        version=number,
        former=int(champion.version) if champion else None,
        gates=tuple(passed),
        scored_again=again,
        former_lost=lost,
    )
    if not verdict.passed:
        raise InputError(verdict.refusal())
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
    """Say on both versions, and in the model's trail, what happened when and why.

    Where the champion stays, this makes up for an alias that was set and not written down.
    """
    client = server.connect()
    with server.reachable():
        former = verdict.former
        if verdict.already:
            if versions.last_champion(client) == verdict.version:
                return
            before = versions.by_number(client, verdict.version).tags.get(FORMER_TAG, "")
            former = int(before) if before else None
            reason = reason or "the alias was set before (an interrupted promotion, or by hand)"
        passed = "; ".join(gate.name for gate in verdict.gates) or "none configured"
        reason = reason or " ".join([f"passed the gates: {passed}", *_notes(verdict)])
        _audit(client, "promote", verdict.version, former, reason)


def rollback(reason: str = "", *, version: int | None = None) -> Rollback:
    """Make the former champion the champion again.

    Args:
        version: what the caller takes for the former champion, if one was named.

    Raises:
        InputError: there is no champion, or it had no predecessor, or that is not `version`.
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
        if version is not None and version != int(former):
            raise InputError(
                f"A rollback would restore version {former}, not version {version}; nothing changed. Leave the number "
                f"out, or leave --rollback out to have version {version} pass the gates"
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


def _is_lost(client: "MlflowClient", version: "ModelVersion") -> bool:
    """Asked of the store's list: a download that fails may do so because the store is down."""
    return "reports/evaluation.json" not in {
        file.path for file in client.list_artifacts(str(version.run_id), "reports")
    }


@contextlib.contextmanager
def _reports(client: "MlflowClient", version: "ModelVersion", *names: str) -> Iterator[Path]:
    """A folder with these files of the reports that were logged with a version; it is gone afterwards."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="lyrics-reports-") as temporary:
        folder = Path(temporary)
        for name in names:
            try:  # into a folder of its own, because MLflow drops the artifact's
                client.download_artifacts(str(version.run_id), f"reports/{name}", str((folder / name).parent))
            except (MlflowException, OSError) as error:
                raise InputError(
                    f"{NAME} version {version.version} has no reports/{name} in its run; register it again"
                ) from error
        yield folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scores:
    """What one version scored on the split of the gates; `sha256` is that of the split's raw data."""

    evaluation: Mapping[str, Any]
    samples: Sequence[gates.SampleScore]
    sha256: str | None

    @classmethod
    def read(cls, reports: Path, split: str) -> "_Scores":
        evaluation = io.read_json(reports / "evaluation.json")
        samples = gates.read_scores(reports / f"samples/{split}.parquet")
        sha256 = evaluation.get("data", {}).get(split, {}).get("sha256")
        return cls(evaluation=evaluation, samples=samples, sha256=sha256)

    def comparable(self, other: "_Scores") -> bool:
        """Of the same data, the same choice of samples, answers as long, and scored by the same code."""
        alike = all(self.evaluation.get(key) == other.evaluation.get(key) for key in _SCORED_BY)
        ids = [{sample.sample_id for sample in scores.samples} for scores in (self, other)]
        return alike and self.sha256 is not None and self.sha256 == other.sha256 and ids[0] == ids[1]


def _on_one_test_set(
    client: "MlflowClient",
    candidate: "ModelVersion",
    champion: "ModelVersion",
    split: str,
    evaluate_again: EvaluateAgain,
) -> tuple[_Scores, _Scores, tuple[int, ...]]:
    """Scores of candidate and champion, as logged where these can be compared, and which were measured again here."""
    scores = {}
    for version in (champion, candidate):
        with _reports(client, version, "evaluation.json", f"samples/{split}.parquet") as reports:
            scores[int(version.version)] = _Scores.read(reports, split)
    ours, theirs = int(candidate.version), int(champion.version)
    again = []
    if not scores[ours].comparable(scores[theirs]):
        here = io.sha256_tree(RAW / split) if (RAW / split).is_dir() else None
        # Whichever is of another test set than the one here comes first; often the other one's scores hold then.
        for number in sorted(scores, key=lambda number: scores[number].sha256 == here):
            scores[number] = _Scores.read(evaluate_again(number, split), split)
            again.append(number)
            if scores[ours].comparable(scores[theirs]):
                break
        else:
            raise InputError(
                f"{NAME} versions {theirs} and {ours} could not be scored on the same {split} set: {RAW / split} "
                "changed meanwhile; promote again"
            )
    return scores[ours], scores[theirs], tuple(again)
