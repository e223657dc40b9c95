"""Both stages, run as they are, give the loss curves of golden/ (to write them anew: python -m tests.train.golden)."""

from pathlib import Path

import golden
import pytest
import torch


@pytest.fixture(autouse=True)
def as_before():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("stage", list(golden.STAGES))
def test_the_loss_curves_are_as_written(stage: str, tmp_path: Path) -> None:
    found, expected = golden.train(stage, tmp_path), golden.read(stage)
    assert {key: len(curve) for key, curve in expected.items()} == dict.fromkeys(found, 20)
    far = {key: distance for key, distance in golden.distances(found, expected).items() if distance > golden.TOLERANCE}
    assert not far, "the mathematics changed; if that was meant: python -m tests.train.golden --write"


@pytest.mark.parametrize("stage", list(golden.STAGES))
def test_every_curve_falls(stage: str) -> None:
    for key, curve in golden.read(stage).items():
        assert curve[-1] < curve[0] - 0.1, key
