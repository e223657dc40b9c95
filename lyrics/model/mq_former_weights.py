"""Start MQ-Former from a BERT checkpoint (paper section 2)."""

import dataclasses
import re

import torch
from torch import Tensor

from lyrics.errors import InputError
from lyrics.model.mq_former import MQFormer

_LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention.norm",
    "intermediate.dense": "text_feed_forward.inner",
    "output.dense": "text_feed_forward.outer",
    "output.LayerNorm": "text_feed_forward.norm",
}
_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "word_embeddings.weight",
    "embeddings.position_embeddings.weight": "position_embeddings.weight",
    "embeddings.LayerNorm.weight": "embedding_norm.weight",
    "embeddings.LayerNorm.bias": "embedding_norm.bias",
    "cls.predictions.transform.dense.weight": "text_head.dense.weight",
    "cls.predictions.transform.dense.bias": "text_head.dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "text_head.norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "text_head.norm.bias",
    "cls.predictions.bias": "text_head.bias",
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """How many tensors of MQ-Former were loaded, copied from the text side, or stay new."""

    loaded: int
    copied: int
    new: int


def _target(name: str) -> str | None:
    name = (
        name.removeprefix("bert.")
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias")
    )
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if match and match[2] in _LAYER:
        return f"layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    return None


@torch.no_grad()
def load_bert(mq_former: MQFormer, state: dict[str, Tensor]) -> Loaded:
    """Fill embeddings, self-attention and the text feed-forward; copy the latter to the queries' feed-forward.

    The rows of tokens that BERT does not know ([DEC]) start as the mean of all rows; positions take in
    token-type row 0 and are cut to MQ-Former's length.

    Raises:
        InputError: a size differs, or the checkpoint is not a BERT.
    """
    parameters = dict(mq_former.named_parameters())
    filled = set()
    for name, tensor in state.items():
        target = _target(name)
        if target is None or target not in parameters:
            continue
        parameter = parameters[target]
        if target == "position_embeddings.weight":
            token_type = state.get(
                "embeddings.token_type_embeddings.weight", state.get("bert.embeddings.token_type_embeddings.weight")
            )
            tensor = tensor[: len(parameter)] + (0 if token_type is None else token_type[0])
        if target in ("word_embeddings.weight", "text_head.bias"):
            known = min(len(tensor), len(parameter))
            extra = tensor.float().mean(0).expand(len(parameter) - known, *tensor.shape[1:])
            tensor = torch.cat([tensor[:known].float(), extra])
        if tensor.shape != parameter.shape:
            raise InputError(
                f"BERT's {name} has shape {tuple(tensor.shape)}, MQ-Former's {target} {tuple(parameter.shape)}; "
                "make mq_former.hidden_size, layers and intermediate_size those of the checkpoint"
            )
        parameter.copy_(tensor)
        filled.add(target)
    if "word_embeddings.weight" not in filled:
        raise InputError("The checkpoint has no embeddings.word_embeddings.weight; expected the weights of a BERT")
    copied = 0
    for name in list(filled):
        if ".text_feed_forward." in name:
            parameters[name.replace(".text_feed_forward.", ".query_feed_forward.")].copy_(parameters[name])
            copied += 1
    return Loaded(len(filled), copied, len(parameters) - len(filled) - copied)
