"""Who optimises what: every trainable parameter once, inner matrices by Muon, all else by AdamW."""

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
