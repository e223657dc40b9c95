"""Which parameters a stage trains: patterns of their names in params/, all else is frozen."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lyrics.errors import InputError


def train_only(module: nn.Module, patterns: Sequence[str], key: str) -> dict[str, nn.Parameter]:
    """Freeze all parameters but those whose name matches a pattern (`layers.*`); returns these by name.

    Args:
        key: where the patterns stand in the configuration, for the error.

    Raises:
        InputError: a pattern matches no parameter.
    """
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in parameters))
            raise InputError(
                f"{key} has {pattern!r}, which matches no parameter; names there begin with {parts}. Correct it in "
                "params/"
            )
    for name, parameter in parameters.items():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
