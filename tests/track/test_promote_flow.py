"""The Prefect flow: three tasks, a refusal that is a sentence, exit codes."""

import types

import pytest

from lyrics.config import Promote
from lyrics.errors import RetryableError
from lyrics.track import promotion, registry, server, versions

SETTINGS = Promote(split="test", minimum={"vqa_accuracy": 0.5}, bootstrap_samples=200, confidence=0.95)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(promotion.configuration, "load", lambda: types.SimpleNamespace(promote=SETTINGS))


def test_flow_promotes_refuses_and_rolls_back(sources, make_model, flow, capsys):
    for quality in (0.7, 0.4):
        make_model(quality)
        registry.register({}, sources)
    assert flow("--version", "1", "--reason", "first") == 0
    assert "lyrics version 1 is champion, the first" in capsys.readouterr().out
    assert flow() == 2, "the candidate, version 2, is below the floor"
    said = capsys.readouterr()
    assert "vqa_accuracy >= 0.5: 0.4000, short by 0.1000" in said.err and "Traceback" not in said.err
    champion = versions.by_alias(server.connect(), "champion")
    assert champion is not None and int(champion.version) == 1
    assert champion.tags["champion_reason"] == "first"
    assert flow("--rollback") == 2
    assert "replaced no champion" in capsys.readouterr().err


def test_a_registry_that_is_down_may_pass(project, flow, monkeypatch, capsys):
    def down(*_: object, **__: object) -> None:
        raise RetryableError("the registry does not answer")

    monkeypatch.setattr(promotion, "rollback", down)
    assert flow("--rollback") == 75
    assert "the registry does not answer (this may pass" in capsys.readouterr().err
