"""AdamW as published, or Muon on the matrices inside a network with AdamW on all else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes each update of a matrix orthogonal. Heads
that look words up form in a third of AdamW's steps, which is what lets two cores fit a small network in a minute.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

Algorithm = Literal["adamw", "muon"]


def build(
    network: nn.Module,
    *,
    algorithm: Algorithm,
    lr_of: Callable[[str], float],
    betas: tuple[float, float],
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """Optimisers that together own every trainable parameter of `network` once.

    Args:
        lr_of: learning rate by parameter name. It fits both algorithms: Muon's update is scaled to AdamW's size.
        weight_decay: of matrices; biases, norms and other vectors do not decay.
    """
    inner = _inner_matrices(network) if algorithm == "muon" else set()
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((id(parameter) in inner, lr_of(name), decay), []).append(parameter)
    of_muon, of_adamw = (
        [
            {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for (is_inner, lr, decay), parameters in groups.items()
            if is_inner == wanted
        ]
        for wanted in (True, False)
    )
    optimizers: list[torch.optim.Optimizer] = []
    if of_muon:
        optimizers.append(torch.optim.Muon(of_muon, adjust_lr_fn="match_rms_adamw"))
    if of_adamw:
        optimizers.append(torch.optim.AdamW(of_adamw, betas=betas, fused=True))
    return optimizers


def _inner_matrices(network: nn.Module) -> set[int]:
    """Ids of the weights of linear layers, but for those tied to an embedding and the two factors of a LoRA update."""
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    return {
        id(m.weight) for name, m in network.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in name
    } - embeddings


def scale_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` times its first value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
