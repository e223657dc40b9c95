"""The loop: resuming is exact, damage falls back, non-finite stops, batches cover every sample once an epoch."""

import contextlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lyrics import optimizer
from lyrics.stage import NullTracker
from lyrics.train import checkpoint, loop


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


def fit(
    work: Path,
    model: nn.Module,
    trainable: dict,
    optimizers: list,
    losses_at: Callable,
    not_finite_at: Callable = lambda _: [],
) -> list:
    return loop.fit(
        name="stage1",
        seed=0,
        steps=12,
        model=model,
        trainable=trainable,
        optimizers=optimizers,
        warmup_steps=3,
        grad_clip=1.0,
        losses_at=losses_at,
        not_finite_at=not_finite_at,
        work=work,
        checkpoint_every=4,
        checkpoints_kept=2,
        log_every=5,
        samples_per_step=4,
        tracker=NullTracker(),
    )


def train(
    work: Path,
    *,
    algorithm: optimizer.Algorithm = "adamw",
    kill_at: int | None = None,
    poison_at: int | None = None,
) -> tuple[dict, list]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1))
    trainable = dict(net.named_parameters())
    optimizers = optimizer.build(net, algorithm=algorithm, lr_of=lambda _: 0.01, betas=(0.9, 0.99), weight_decay=0.1)

    def losses_at(step: int) -> Iterator[loop.MicroBatch]:
        if step == kill_at:
            raise Killed
        inputs = torch.from_numpy(loop.batches(0, 7, 4, step)).float()[:, None].expand(-1, 3)
        loss = net(inputs).pow(2).mean()
        yield loop.MicroBatch(lambda: {"loss": loss * float("nan") if step == poison_at else loss}, ["sample-7"])

    history = fit(work, net, trainable, optimizers, losses_at)
    return {k: v.detach().clone() for k, v in net.state_dict().items()}, history


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
@pytest.mark.parametrize("kill_at", [1, 4, 6, 9, 11])
def test_a_killed_run_ends_bit_identical(tmp_path: Path, algorithm: optimizer.Algorithm, kill_at: int) -> None:
    expected, history = train(tmp_path / "whole", algorithm=algorithm)
    with pytest.raises(Killed):
        train(tmp_path / "killed", algorithm=algorithm, kill_at=kill_at)
    found, resumed_history = train(tmp_path / "killed", algorithm=algorithm)
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert json.dumps(history) == json.dumps(resumed_history)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected, _ = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", kill_at=9)
    newest = sorted((tmp_path / "killed/checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:200])
    found, _ = train(tmp_path / "killed")
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert newest.name in caplog.text and "damaged" in caplog.text


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, {"weights": torch.zeros(2)}, kept=3)
        kept = [int(path.name[:8]) for path in sorted(tmp_path.glob("*"))]
        assert kept == list(range(1, 6))[max(0, step - 3) : step]


@pytest.mark.parametrize("damage", ["a flipped bit", "half of it", "nothing left"])
def test_any_damage_is_noticed_and_then_cleared_away(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (4, 8):
        checkpoint.save(tmp_path, step, {"weights": torch.full((100_000,), float(step))}, kept=2)
    newest = sorted(tmp_path.glob("*"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of the tensor, where torch.load sees nothing
    newest.write_bytes(content[: {"a flipped bit": None, "half of it": len(content) // 2, "nothing left": 0}[damage]])
    assert checkpoint.load_newest(tmp_path)["step"] == 4
    assert newest.name in caplog.text and "falling back" in caplog.text
    checkpoint.save(tmp_path, 6, {"weights": torch.zeros(2)}, kept=2)
    assert [int(path.name[:8]) for path in sorted(tmp_path.glob("*"))] == [4, 6]


def test_without_a_whole_checkpoint_training_starts_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoint.load_newest(tmp_path) is None and not caplog.text
    checkpoint.save(tmp_path, 4, {"weights": torch.zeros(2)}, kept=2)
    next(tmp_path.glob("*.pt")).write_bytes(b"")
    assert checkpoint.load_newest(tmp_path) is None
    assert "starts anew" in caplog.text


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 4, {"weights": torch.zeros(2)}, kept=2)
    (tmp_path / checkpoint._UNFINISHED).write_bytes(b"half a checkpoint")
    assert checkpoint.load_newest(tmp_path)["step"] == 4
    assert len(list(tmp_path.iterdir())) == 1


def test_every_global_generator_follows_from_the_step(tmp_path: Path) -> None:
    """Draws outside of the keyed streams, as dropout makes them, are the same after a resume."""

    def draws(work: Path, kill_at: int | None) -> list[tuple[float, ...]]:
        drawn: list[tuple[float, ...]] = []
        weight = nn.Parameter(torch.zeros(1))

        def losses_at(step: int) -> Iterator[loop.MicroBatch]:
            if step == kill_at:
                raise Killed
            drawn.append((torch.rand(()).item(), float(np.random.rand()), random.random()))
            yield loop.MicroBatch(lambda: {"loss": weight.pow(2).sum()}, [])

        with contextlib.suppress(Killed):
            fit(
                work,
                nn.Identity(),
                {"weight": weight},
                [torch.optim.SGD([{"params": [weight], "initial_lr": 0.1}])],
                losses_at,
            )
        return drawn

    whole = draws(tmp_path / "whole", None)
    draws(tmp_path / "killed", 6)
    assert draws(tmp_path / "killed", None) == whole[4:]
    assert all(len(set(column)) == 12 for column in zip(*whole, strict=True))


def test_a_non_finite_loss_stops_before_the_step_and_names_samples(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"before step 6.*sample-7"):
        train(tmp_path, poison_at=6)
    assert checkpoint.load_newest(tmp_path / "checkpoints")["step"] == 4


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_who_is_at_fault(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([{"params": [weight], "initial_lr": 0.1}])

    def losses_at(_: int) -> Iterator[loop.MicroBatch]:
        slope_at_0 = (weight - weight.detach()).abs().sqrt().sum()  # infinite; the loss itself is 0
        yield loop.MicroBatch(lambda: {"loss": slope_at_0}, [f"sample-{number}" for number in range(20)])

    def stop(not_finite: list[str]) -> str:
        with pytest.raises(FloatingPointError, match=r"before step 0, with loss 0\.0") as stopped:
            fit(tmp_path, nn.Identity(), {"weight": weight}, [sgd], losses_at, lambda _: not_finite)
        assert weight.item() == 1.0
        return str(stopped.value)

    assert "all inputs are finite" in stop([]) and "sample-0, " in stop([]) and ", sample-19." in stop([])
    assert "the features of sample-4 are not finite" in stop(["sample-4"]) and "sample-5" not in stop(["sample-4"])


def test_batches_cover_each_sample_once_an_epoch() -> None:
    drawn = [i for step in range(7) for i in loop.batches(3, 28, 4, step)]
    assert sorted(drawn) == list(range(28))
    second = [i for step in range(7, 14) for i in loop.batches(3, 28, 4, step)]
    assert sorted(second) == list(range(28)) and second != drawn


def test_cosine_starts_at_a_share_of_the_peak_and_ends_at_zero() -> None:
    rates = [loop.cosine_with_warmup(step, warmup_steps=4, steps=20) for step in range(20)]
    assert rates[0] == 0.25 and rates[3] == rates[4] == 1.0 and 0 < rates[-1] < 0.02
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
