"""EfficientNet-Lite weights under EfficientNet-PyTorch's names, brought to timm's."""

import re

from torch import Tensor

_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# The first block of the network has no expansion, so its layers are numbered one lower in timm.
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_REPEATS = (1, 2, 2, 3, 3, 4, 1)  # of B0 and Lite0: blocks are numbered through there, stage by stage in timm


def to_timm(state: dict[str, Tensor], repeats: tuple[int, ...] = _REPEATS) -> dict[str, Tensor]:
    """Every tensor renamed; a name that is not EfficientNet-PyTorch's is a KeyError."""
    places = [(stage, index) for stage, count in enumerate(repeats) for index in range(count)]
    renamed = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(.+)", name)
        if block is None:
            layer, _, rest = name.partition(".")
            renamed[f"{_TOP[layer]}.{rest}"] = tensor
        else:
            stage, index = places[int(block[1])]
            names = _FIRST_BLOCK if stage == 0 else _BLOCK
            renamed[f"blocks.{stage}.{index}.{names[block[2]]}.{block[3]}"] = tensor
    return renamed
