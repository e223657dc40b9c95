"""Promotion, refusal and rollback of versions of different quality, on a real registry."""

from pathlib import Path

import numpy as np
import pytest

from lyrics import io
from lyrics.config import Promote
from lyrics.errors import InputError
from lyrics.track import gates, registry, server, versions

SETTINGS = Promote(split="test", minimum={"vqa_accuracy": 0.5}, bootstrap_samples=500, confidence=0.95)


@pytest.fixture
def two_versions(sources, make_model):
    """Version 1 answers 70 % rightly, version 2 (the candidate) 90 %."""
    for quality in (0.7, 0.9):
        make_model(quality)
        registry.register({}, sources)


def champion() -> int | None:
    found = versions.by_alias(server.connect(), "champion")
    return int(found.version) if found else None


def registry_state():
    client = server.connect()
    found = client.get_registered_model("lyrics")
    return found.aliases, found.tags, {v.version: v.tags for v in client.search_model_versions("name = 'lyrics'")}


def test_promotes_remembers_and_rolls_back(two_versions):
    assert not registry.promote(1, settings=SETTINGS, reason="the first").already
    verdict = registry.promote(settings=SETTINGS)
    assert (verdict.version, verdict.former, champion()) == (2, 1, 2)
    assert "lyrics version 2 is champion, in place of version 1" in str(verdict)
    again = registry.promote(2, settings=SETTINGS)
    assert again.already and "is the champion already" in str(again)

    client = server.connect()
    now, before = (client.get_model_version("lyrics", v).tags for v in ("2", "1"))
    assert now["former_champion"] == "1" and now["champion_since"] and "vqa" in now["champion_reason"]
    assert before["replaced_by"] == "2" and before["champion_until"] and before["champion_reason"] == "the first"

    back = registry.rollback("answers got slower")
    assert (back.restored, back.replaced, champion()) == (1, 2, 1)
    trail = versions.audit_trail(server.connect())
    assert [e["action"] for e in trail] == ["register", "register", "promote", "promote", "rollback"]
    assert trail[-1]["reason"] == "answers got slower" and trail[-1]["former"] == 2 and trail[-1]["by"]
    assert [e["at"] for e in trail] == sorted(e["at"] for e in trail)
    with pytest.raises(InputError, match="version 1 replaced no champion"):
        registry.rollback()


def test_significantly_worse_version_is_refused_and_nothing_changes(two_versions):
    registry.promote(2, settings=SETTINGS)
    before = registry_state()
    with pytest.raises(
        InputError, match=r"version 1 was not promoted; nothing changed(.|\n)*vqa no worse.*by at least"
    ):
        registry.promote(1, settings=SETTINGS)
    assert registry_state() == before


def test_floor_says_by_how_much(two_versions):
    strict = Promote(split="test", minimum={"vqa_accuracy": 0.95, "cider": 1.0}, bootstrap_samples=10, confidence=0.95)
    before = registry_state()
    with pytest.raises(
        InputError, match=r"cider >= 1: not measured(.|\n)*vqa_accuracy >= 0\.95: 0\.9000, short by 0\.0500"
    ):
        registry.promote(settings=strict)
    assert registry_state() == before and champion() is None


def test_champion_is_evaluated_again_on_another_test_set(two_versions, sources, make_model, tmp_path, write_reports):
    registry.promote(2, settings=SETTINGS)
    io.write_text(Path("data/raw/test/captions.json"), "harder questions")
    make_model(0.8)
    assert registry.register({}, sources).version == 3
    with pytest.raises(InputError, match=r"version 2 \(the champion\) was scored on another test set"):
        registry.promote(3, settings=SETTINGS)
    asked = []

    def evaluate_again(version: int) -> Path:
        asked.append(version)
        return write_reports(tmp_path / "again", 0.6)

    assert registry.promote(3, settings=SETTINGS, evaluate_again=evaluate_again).former == 2
    assert asked == [2], "the candidate was scored on the present set already"


def test_an_old_candidate_is_evaluated_again_too(two_versions, sources, make_model, tmp_path, write_reports):
    """Version 3 was scored on another set than the champion, and neither set is the one that is here now."""
    registry.promote(2, settings=SETTINGS)
    io.write_text(Path("data/raw/test/captions.json"), "harder questions")
    make_model(0.8)
    registry.register({}, sources)
    io.write_text(Path("data/raw/test/captions.json"), "the hardest questions")
    quality = {3: 0.9, 2: 0.6}
    asked = []

    def evaluate_again(version: int) -> Path:
        asked.append(version)
        return write_reports(tmp_path / str(version), quality[version])

    registry.promote(3, settings=SETTINGS, evaluate_again=evaluate_again)
    assert sorted(asked) == [2, 3] and champion() == 3


def test_unknown_version_and_empty_registry(project):
    with pytest.raises(InputError, match="no candidate to promote; register one"):
        registry.promote(settings=SETTINGS)
    with pytest.raises(InputError, match="no version 9"):
        registry.promote(9, settings=SETTINGS)
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


def test_scores_without_columns_are_refused(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="holds no per-sample scores"):
        gates.read_scores(tmp_path / "test.parquet")
