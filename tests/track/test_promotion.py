"""Promotion, refusal and rollback of versions of different quality, on a real registry."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lyrics import io
from lyrics.config import Promote
from lyrics.errors import InputError
from lyrics.track import gates, promotion, registry, server, versions

SETTINGS = Promote(split="test", minimum={"vqa_accuracy": 0.5}, bootstrap_samples=500, confidence=0.95)


def never(version: int, split: str) -> Path:
    raise AssertionError(f"version {version} was scored again, though nothing asks for it")


@pytest.fixture
def two_versions(sources, make_model):
    """Version 1 answers 70 % rightly, version 2 (the candidate) 90 %."""
    for quality in (0.7, 0.9):
        make_model(quality)
        registry.register({}, sources)


def promote(version=None, *, settings=SETTINGS, evaluate_again=never, reason=""):
    return registry.promote(version, settings=settings, evaluate_again=evaluate_again, reason=reason)


def champion() -> int | None:
    found = versions.by_alias(server.connect(), "champion")
    return int(found.version) if found else None


def registry_state():
    client = server.connect()
    found = client.get_registered_model("lyrics")
    return found.aliases, found.tags, {v.version: v.tags for v in client.search_model_versions("name = 'lyrics'")}


def test_promotes_remembers_and_rolls_back(two_versions):
    assert not promote(1, reason="the first").already
    verdict = promote()
    assert (verdict.version, verdict.former, champion()) == (2, 1, 2)
    assert "lyrics version 2 is champion, in place of version 1" in str(verdict)
    again = promote(2)
    assert again.already and "is the champion already" in str(again)

    client = server.connect()
    now, before = (client.get_model_version("lyrics", v).tags for v in ("2", "1"))
    assert now["former_champion"] == "1" and now["champion_since"] and "vqa" in now["champion_reason"]
    assert before["replaced_by"] == "2" and before["champion_until"] and before["champion_reason"] == "the first"

    with pytest.raises(InputError, match=r"would restore version 1, not version 2; nothing changed"):
        registry.rollback(version=2)
    back = registry.rollback("answers got slower")
    assert (back.restored, back.replaced, champion()) == (1, 2, 1)
    trail = versions.audit_trail(server.connect())
    assert [e["action"] for e in trail] == ["register", "register", "promote", "promote", "rollback"]
    assert trail[-1]["reason"] == "answers got slower" and trail[-1]["former"] == 2 and trail[-1]["by"]
    assert [e["at"] for e in trail] == sorted(e["at"] for e in trail)
    with pytest.raises(InputError, match="version 1 replaced no champion"):
        registry.rollback()


def test_a_promotion_that_was_interrupted_is_written_down_by_the_next(two_versions):
    promote(1)
    verdict = promotion.check(2, evaluate_again=never, settings=SETTINGS)
    promotion.move(verdict)  # and no more: the registry went down
    assert promote(2).already
    assert [event["champion"] for event in versions.audit_trail(server.connect()) if "champion" in event] == [1, 2]
    assert server.connect().get_model_version("lyrics", "1").tags["replaced_by"] == "2"
    promote(2)
    assert versions.last_champion(server.connect()) == 2
    assert sum("champion" in event for event in versions.audit_trail(server.connect())) == 2


def test_a_store_that_does_not_answer_is_no_lost_champion(two_versions, monkeypatch):
    promote(1)
    run_of_champion = server.connect().get_model_version("lyrics", "1").run_id
    download = MlflowClient.download_artifacts

    def failing(client: MlflowClient, run_id: str, *rest: str) -> str:
        if run_id == run_of_champion:
            raise MlflowException("the store does not answer")
        return download(client, run_id, *rest)

    monkeypatch.setattr(MlflowClient, "download_artifacts", failing)
    with pytest.raises(InputError, match=r"has no reports/evaluation\.json in its run"):
        promote(2)
    assert champion() == 1


def test_scores_by_other_code_are_not_compared(two_versions, make_model, sources, again):
    promote(1)
    io.write_json(Path("reports/evaluation.json"), io.read_json("reports/evaluation.json") | {"scoring_sha256": "new"})
    assert registry.register({}, sources).version == 3
    again.quality = {1: 0.7, 3: 0.9}
    assert sorted(promote(evaluate_again=again).scored_again) == [1, 3]


def test_reports_of_versions_do_not_stay_in_the_temporary_folder(two_versions, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    promote(1)
    promote(2)
    assert champion() == 2 and not list((tmp_path / "temporary").iterdir())


def test_significantly_worse_version_is_refused_and_nothing_changes(two_versions):
    promote(2)
    before = registry_state()
    with pytest.raises(
        InputError,
        match=r"version 1 was not promoted; nothing changed, version 2 stays(.|\n)*vqa no worse.*by at least",
    ):
        promote(1)
    assert registry_state() == before


def test_floor_says_by_how_much(two_versions):
    strict = Promote(split="test", minimum={"vqa_accuracy": 0.95, "cider": 1.0}, bootstrap_samples=10, confidence=0.95)
    before = registry_state()
    with pytest.raises(
        InputError, match=r"cider >= 1: not measured(.|\n)*vqa_accuracy >= 0\.95: 0\.9000, short by 0\.0500"
    ):
        promote(settings=strict)
    assert registry_state() == before and champion() is None


def test_a_metric_that_a_split_cannot_have_fails_with_the_reason():
    absent = {"test/vqa_accuracy": "the split has no vqa samples", "meteor": "no Java"}
    evaluation = {"splits": {"test": {}}, "absent": absent}
    found = gates.floors(evaluation, "test", {"meteor": 0.1, "vqa_accuracy": 0.5, "cider": 1.0})
    assert [gate.detail for gate in found] == [
        "not measured (not in reports/evaluation.json for split test)",
        "not measured (no Java)",
        "not measured (the split has no vqa samples)",
    ]


@pytest.fixture
def again(tmp_path, write_reports):
    """Scores a version on the present set as `again.quality` says; `again.asked` are the versions asked for."""

    def evaluate_again(version: int, split: str) -> Path:
        assert split == "test"
        evaluate_again.asked.append(version)
        return write_reports(tmp_path / "again" / str(version), evaluate_again.quality[version])

    evaluate_again.asked, evaluate_again.quality = [], {}
    return evaluate_again


def change_test_set(questions):
    io.write_text(Path("data/raw/test/captions.json"), questions)


def test_champion_is_evaluated_again_on_another_test_set(two_versions, sources, make_model, again):
    promote(2)
    change_test_set("harder questions")
    make_model(0.8)
    assert registry.register({}, sources).version == 3
    again.quality = {2: 0.6}
    verdict = promote(3, evaluate_again=again)
    assert verdict.former == 2 and verdict.scored_again == (2,)
    assert again.asked == [2], "the candidate was scored on the present set already"
    assert "vqa no worse than the champion: +0.2000" in str(verdict), "0.8 against 0.6, not against the logged 0.9"
    assert "version 2 scored again" in versions.audit_trail(server.connect())[-1]["reason"]


def test_a_champion_that_is_better_on_the_present_set_stays(two_versions, sources, make_model, again):
    promote(1)
    change_test_set("other questions")
    make_model(0.8)
    registry.register({}, sources)
    before = registry_state()
    again.quality = {1: 1.0}
    with pytest.raises(InputError) as refused:
        promote(3, evaluate_again=again)
    assert registry_state() == before
    said = str(refused.value)
    assert "version 1 stays champion. It passed 1 of 2 gates and failed:" in said
    assert "vqa no worse than the champion: -0.2000" in said and "worse than the champion by at least" in said
    assert "version 1 scored again on the test set that is here now" in said


def test_an_old_candidate_is_evaluated_again_too(two_versions, sources, make_model, again):
    """Version 3 was scored on another set than the champion, and neither set is the one that is here now."""
    promote(2)
    change_test_set("harder questions")
    make_model(0.8)
    registry.register({}, sources)
    change_test_set("the hardest questions")
    again.quality = {3: 0.45, 2: 0.3}
    with pytest.raises(InputError, match=r"vqa_accuracy >= 0\.5: 0\.4500, short by 0\.0500\n.*version 2 and version 3"):
        promote(3, evaluate_again=again)
    again.quality[3] = 0.9
    promote(3, evaluate_again=again)
    assert again.asked == [2, 3] * 2 and champion() == 3


def test_only_the_version_of_another_test_set_is_evaluated_again(two_versions, sources, make_model, again):
    """An old version is wanted back; the champion was scored on the present set."""
    change_test_set("other questions")
    make_model(0.8)
    registry.register({}, sources)
    promote(3)
    again.quality = {1: 0.85}
    assert promote(1, evaluate_again=again).scored_again == (1,)
    assert again.asked == [1] and champion() == 1


def test_another_choice_of_samples_is_another_test_set(two_versions, sources, make_model, again):
    """The data are the same, but the champion was scored on more samples than are chosen now."""
    promote(2)
    make_model(0.8, samples=100)
    registry.register({}, sources)
    again.quality = {2: 0.6, 3: 0.8}
    assert promote(3, evaluate_again=again).scored_again == (2, 3)


def test_a_test_set_that_changes_meanwhile_is_refused(two_versions, sources, make_model, again):
    promote(2)
    change_test_set("harder questions")
    make_model(0.8)
    registry.register({}, sources)
    again.quality = {2: 0.6, 3: 0.8}

    def restless(version: int, split: str) -> Path:
        change_test_set(f"questions while version {version} is scored")
        return again(version, split)

    with pytest.raises(InputError, match=r"versions 2 and 3 could not be scored on the same test set.*promote again"):
        promote(3, evaluate_again=restless)
    assert champion() == 2


def test_unknown_version_and_empty_registry(project):
    with pytest.raises(InputError, match="no candidate to promote; register one"):
        promote()
    with pytest.raises(InputError, match="no version 9"):
        promote(9)
    with pytest.raises(InputError, match="no champion"):
        registry.rollback()


def test_interval_covers_the_truth_as_often_as_it_says():
    """95 % intervals of correlated samples hold the true mean in 88 to 99 % of 200 draws."""
    draw, hits = np.random.default_rng(0), 0
    for _ in range(200):
        image_effect = draw.normal(0.1, 1.0, 60)
        pairs = [(f"i{i}", image_effect[i] + draw.normal(0, 0.3)) for i in range(60) for _ in range(3)]
        _, low, high = gates.paired_interval(pairs, bootstrap_samples=300, confidence=0.95)
        hits += low <= 0.1 <= high
    assert 176 <= hits <= 198


def test_equal_scores_pass_and_unpaired_ones_are_refused(project, tmp_path, write_reports):
    scores = gates.read_scores(write_reports(tmp_path, 0.5) / "samples" / "test.parquet")
    (gate,) = gates.no_worse(scores, scores, bootstrap_samples=100, confidence=0.95)
    assert gate.passed and gate.detail.startswith("+0.0000")
    with pytest.raises(InputError, match="scored on 199 samples and the champion on 200, of which 199 are the same"):
        gates.no_worse(scores[1:], scores, bootstrap_samples=100, confidence=0.95)
    with pytest.raises(InputError, match="scored on no sample"):
        gates.no_worse([], [], bootstrap_samples=100, confidence=0.95)


def test_scores_without_columns_are_refused(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="holds no per-sample scores"):
        gates.read_scores(tmp_path / "test.parquet")
