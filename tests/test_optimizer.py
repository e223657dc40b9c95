"""Who optimises what: every trainable parameter once, inner matrices by Muon, all else by AdamW."""

import pytest
import torch
from torch import nn

from lyrics import optimizer


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 4)
        self.inner = nn.Linear(4, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 4)
        self.tied = nn.Linear(4, 11, bias=False)
        self.tied.weight = self.words.weight
        self.queries = nn.Parameter(torch.zeros(3, 4))


def build(network: nn.Module, algorithm: optimizer.Algorithm) -> list[torch.optim.Optimizer]:
    return optimizer.build(
        network,
        algorithm=algorithm,
        lr_of=lambda name: 0.1 if name.startswith("head") else 0.2,
        betas=(0.9, 0.99),
        weight_decay=0.5,
    )


def owned(network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[str, float, float]]:
    names = {id(p): name for name, p in network.named_parameters()}
    found = [
        (names[id(p)], (type(one).__name__, group["lr"], group["weight_decay"]))
        for one in optimizers
        for group in one.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(dict(found))
    return dict(found)


def test_muon_takes_the_inner_matrices_and_adamw_the_rest() -> None:
    network = Network()
    assert owned(network, build(network, "muon")) == {
        "inner.weight": ("Muon", 0.2, 0.5),
        "head.weight": ("Muon", 0.1, 0.5),
        "words.weight": ("AdamW", 0.2, 0.5),
        "queries": ("AdamW", 0.2, 0.5),
        "inner.bias": ("AdamW", 0.2, 0.0),
        "head.bias": ("AdamW", 0.1, 0.0),
    }


def test_adamw_takes_everything() -> None:
    network = Network()
    found = owned(network, build(network, "adamw"))
    assert {algorithm for algorithm, _, _ in found.values()} == {"AdamW"}
    assert set(found) == {name for name, p in network.named_parameters() if p.requires_grad}


def test_the_learning_rate_is_scaled_from_its_first_value() -> None:
    network = Network()
    optimizers = build(network, "muon")
    for factor in (0.5, 0.25):
        optimizer.scale_lr(optimizers, factor)
    lrs = {name: lr for name, (_, lr, _) in owned(network, optimizers).items()}
    assert lrs["inner.weight"] == 0.05 and lrs["head.weight"] == 0.025


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_without_products_in_bf16_is_torchs_but_for_rounding(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of each from the same weights and gradients, then each goes on from the other's state."""
    steps: dict[bool, list[torch.Tensor]] = {}
    states = {}
    for native in (True, False):
        monkeypatch.setattr(optimizer, "has_native_bf16", lambda _, native=native: native)
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(shape))
        muon = optimizer.Muon([weight], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        steps[native] = []
        for _ in range(3):
            weight.grad = torch.randn(shape)
            muon.step()
            steps[native].append(weight.detach().clone())
        states[native] = muon.state_dict()
    for ours, theirs in zip(steps[False], steps[True], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)  # of an update of 0.1
    torch.testing.assert_close(states[False]["state"], states[True]["state"])
    assert states[False]["param_groups"] == states[True]["param_groups"]


def test_a_parameter_without_a_gradient_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "has_native_bf16", lambda _: False)
    one, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    muon = optimizer.Muon([one, other], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    one.grad = torch.ones(2, 3)
    muon.step()
    assert torch.equal(other, torch.ones(2, 3)) and not torch.equal(one, torch.ones(2, 3))
