"""AdamW as published, or Muon on the matrices inside a network with AdamW on all else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes each update of a matrix orthogonal. Heads
that look words up form in a third of AdamW's steps, which is what lets two cores fit a small network in a minute.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lyrics.numerics import has_native_bf16

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
        optimizers.append(Muon(of_muon, adjust_lr_fn="match_rms_adamw"))
    if of_adamw:
        optimizers.append(torch.optim.AdamW(of_adamw, betas=betas, fused=True))
    return optimizers


class Muon(torch.optim.Muon):
    """torch's, which always iterates in bf16: in float32 where a processor has no products in bf16.

    There such a product is a loop: in a profile of stage 1 of `tiny` these products were 41 of 57 seconds.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if has_native_bf16(self.param_groups[0]["params"][0].device):
            return super().step(closure)
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return None

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """As in `torch.optim.Muon`, with its state under the same name: a run may go on on another processor."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        looked_ahead = torch.lerp(gradient, average, group["momentum"])
        size = 0.2 * max(parameter.shape) ** 0.5  # "match_rms_adamw"
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonal(looked_ahead.float(), group), alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """A matrix with its singular values brought near 1, by Newton and Schulz; `group` has Muon's coefficients."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


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
