"""Start MQ-Former from a BERT, or from the Q-Former of BLIP-2 or InstructBLIP (paper section 2).

All goes by the names of parameters: what a checkpoint calls them, and what MQ-Former does.
"""

import dataclasses
import logging
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lyrics.errors import InputError

log = logging.getLogger(__name__)

_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "word_embeddings.weight",
    "embeddings.position_embeddings.weight": "position_embeddings.weight",
}
_LAYER = {
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention.norm",
    "intermediate.dense": "text_feed_forward.inner",
    "output.dense": "text_feed_forward.outer",
    "output.LayerNorm": "text_feed_forward.norm",
}


@dataclasses.dataclass(frozen=True)
class _Names:
    """What one kind of checkpoint calls MQ-Former's parameters; `aside` are its own that MQ-Former has no use for."""

    kind: str
    whole: dict[str, str]
    layer: dict[str, str]
    aside: str

    def target(self, name: str) -> str | None:
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
        if match and match[2] in self.layer:
            return f"layers.{match[1]}.{self.layer[match[2]]}.{match[3]}"
        return self.whole.get(name)

    def targets(self, parameters: Iterable[str]) -> set[str]:
        """Those of MQ-Former's parameters for which such a checkpoint can have a value."""
        inside = re.compile(rf"layers\.\d+\.({'|'.join(map(re.escape, self.layer.values()))})\.(weight|bias)")
        return {name for name in parameters if name in self.whole.values() or inside.fullmatch(name)}


_BERT = _Names(
    "BERT",
    whole=_EMBEDDINGS
    | {
        "embeddings.LayerNorm.weight": "embedding_norm.weight",
        "embeddings.LayerNorm.bias": "embedding_norm.bias",
        "cls.predictions.transform.dense.weight": "text_head.dense.weight",
        "cls.predictions.transform.dense.bias": "text_head.dense.bias",
        "cls.predictions.transform.LayerNorm.weight": "text_head.norm.weight",
        "cls.predictions.transform.LayerNorm.bias": "text_head.norm.bias",
        "cls.predictions.bias": "text_head.bias",
    },
    layer=_LAYER
    | {
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
    },
    # The decoder is tied to the word embeddings; the token types go into the positions.
    aside=r"pooler\..+|cls\.seq_relationship\..+|cls\.predictions\.decoder\..+|"
    r"embeddings\.(token_type_embeddings\.weight|position_ids)",
)
_QFORMER = _Names(
    "Q-Former",
    whole=_EMBEDDINGS
    | {
        "embeddings.layernorm.weight": "embedding_norm.weight",
        "embeddings.layernorm.bias": "embedding_norm.bias",
        "layernorm.weight": "embedding_norm.weight",
        "layernorm.bias": "embedding_norm.bias",
        "query_tokens": "visual_queries",
        "vision_model.post_layernorm.weight": "image_norm.weight",
        "vision_model.post_layernorm.bias": "image_norm.bias",
        "vision_projection.weight": "image_projection.weight",
        "vision_projection.bias": "image_projection.bias",
        "text_projection.weight": "text_projection.weight",
        "text_projection.bias": "text_projection.bias",
        "itm_head.weight": "matching_head.weight",
        "itm_head.bias": "matching_head.bias",
    },
    layer=_LAYER
    | {
        "attention.attention.query": "attention.query",
        "attention.attention.key": "attention.key",
        "attention.attention.value": "attention.value",
        "crossattention.attention.query": "cross_attention.query",
        "crossattention.attention.key": "cross_attention.key.visual",
        "crossattention.attention.value": "cross_attention.value.visual",
        "crossattention.output.dense": "cross_attention.out",
        "crossattention.output.LayerNorm": "cross_attention.norm",
        "intermediate_query.dense": "query_feed_forward.inner",
        "output_query.dense": "query_feed_forward.outer",
        "output_query.LayerNorm": "query_feed_forward.norm",
    },
    # A whole BLIP-2 or InstructBLIP holds parts that are other parts of ours.
    aside=r"embeddings\.position_ids|(vision_model|language_model|language_projection)\..+",
)

_HEADS = r"visual_queries|image_norm\..+|image_projection\..+|text_projection\..+|matching_head\..+"
_TEXT_BRANCH = r"(word|position)_embeddings\.weight|layers\.\d+\.text_feed_forward\..+"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Names of MQ-Former's parameters and how many numbers each holds, by where they come from.

    `copied` are those of the query feed-forward that took the text's; `frozen` are of any origin.
    """

    loaded: dict[str, int]
    copied: dict[str, int]
    new: dict[str, int]
    frozen: dict[str, int]

    def __str__(self) -> str:
        return ", ".join(
            f"{kind} {len(sizes)} tensors ({sum(sizes.values()):,} parameters)"
            for kind, sizes in dataclasses.asdict(self).items()
        )


@torch.no_grad()
def load_bert(mq_former: nn.Module, state: dict[str, Tensor]) -> Loaded:
    """Fill embeddings, self-attention and the text feed-forward; copy the latter to the queries' feed-forward.

    The text head is filled where the checkpoint has BERT's. Rows of tokens that BERT does not know ([DEC]) start as the
    mean of all rows; positions take in token-type row 0 and are cut to MQ-Former's length.

    Raises:
        InputError: a size differs, a weight has no place, or one of BERT's is missing.
    """
    state = {_todays_name(name): tensor for name, tensor in state.items()}
    parameters = dict(mq_former.named_parameters())
    values = _place(_BERT, state, parameters)
    missing = _BERT.targets(parameters) - values.keys()
    _refuse_missing(_BERT, {name for name in missing if not name.startswith("text_head.")})
    positions = values["position_embeddings.weight"][: len(parameters["position_embeddings.weight"])]
    if (types := state.get("embeddings.token_type_embeddings.weight")) is not None:
        positions = positions + types[0]
    values["position_embeddings.weight"] = positions
    for name in ("word_embeddings.weight", "text_head.bias"):
        if name in values:
            values[name] = _with_new_tokens(values[name], len(parameters[name]))
    _fill(_BERT, parameters, values)
    copies = {name.replace(".text_", ".query_"): name for name in values if ".text_feed_forward." in name}
    for target, source in copies.items():
        parameters[target].copy_(parameters[source])
    return _report(_BERT, state, parameters, values, copies)


@torch.no_grad()
def load_qformer(mq_former: nn.Module, state: dict[str, Tensor], *, allow_new_text_branch: bool = False) -> Loaded:
    """Fill all that the Q-Former of InstructBLIP or BLIP-2 has; what serves grounding alone stays new.

    Args:
        state: of `InstructBlipQFormerModel`, of `Blip2QFormerModel` with its `embeddings`, or of a whole model that
            holds either (`qformer.`); queries, heads and the norm of the image tokens are taken where present.
        allow_new_text_branch: accept a checkpoint without text embeddings or without the text feed-forward.

    Raises:
        InputError: a size differs, a weight has no place, or one of the Q-Former's is missing.
    """
    state = {name.removeprefix("qformer."): tensor for name, tensor in state.items()}
    if "query_tokens" in state:
        state["query_tokens"] = state["query_tokens"].squeeze(0)
    parameters = dict(mq_former.named_parameters())
    values = _place(_QFORMER, state, parameters)
    missing = {n for n in _QFORMER.targets(parameters) - values.keys() if not re.fullmatch(_HEADS, n)}
    text = {name for name in missing if re.fullmatch(_TEXT_BRANCH, name)}
    _refuse_missing(_QFORMER, missing - text)
    if text and not allow_new_text_branch:
        raise InputError(
            f"The Q-Former lacks its text branch: {_summary(text)}; expected one that reads text (InstructBLIP's, or "
            "that of BLIP-2 for retrieval with its embeddings); to start these anew, pass allow_new_text_branch=True"
        )
    _fill(_QFORMER, parameters, values)
    return _report(_QFORMER, state, parameters, values, {})


def _todays_name(name: str) -> str:
    """Without the prefix of a whole model, and without TensorFlow's gamma and beta."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _place(names: _Names, state: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The checkpoint's tensors under MQ-Former's names."""
    values, homeless = {}, []
    for name, tensor in state.items():
        target = names.target(name)
        if target in parameters:
            values[target] = tensor
        elif not re.fullmatch(names.aside, name):
            homeless.append(name)
    if homeless:
        raise InputError(
            f"{len(homeless)} weights of the {names.kind} have no place in MQ-Former: {_summary(homeless)}; expected "
            "its layers, cross_attention_every and visual queries: make those of mq_former the checkpoint's"
        )
    return values


def _refuse_missing(names: _Names, missing: set[str]) -> None:
    if missing:
        raise InputError(
            f"The checkpoint lacks {len(missing)} weights that a {names.kind} has, in MQ-Former's names "
            f"{_summary(missing)}; expected a whole {names.kind} with the layers and cross_attention_every of mq_former"
        )


def _with_new_tokens(rows: Tensor, count: int) -> Tensor:
    if len(rows) >= count:
        return rows
    new = rows.float().mean(0).expand(count - len(rows), *rows.shape[1:])
    return torch.cat([rows.float(), new])


def _fill(names: _Names, parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if value.shape != parameters[name].shape:
            raise InputError(
                f"The {names.kind}'s weight for {name} has shape {tuple(value.shape)}, MQ-Former's has "
                f"{tuple(parameters[name].shape)}; make the sizes of mq_former, its vocabulary and the widths of what "
                "it looks at those of the checkpoint"
            )
    for name, value in values.items():
        parameters[name].copy_(value)


def _report(
    names: _Names,
    state: Iterable[str],
    parameters: dict[str, nn.Parameter],
    loaded: Iterable[str],
    copied: Iterable[str],
) -> Loaded:
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    new = sizes.keys() - set(loaded) - set(copied)
    frozen = (name for name, parameter in parameters.items() if not parameter.requires_grad)
    result = Loaded(*({name: sizes[name] for name in kind} for kind in (loaded, copied, sorted(new), frozen)))
    log.info("MQ-Former from a %s: %s", names.kind, result)
    log.info("new: %s; not used: %s", _summary(new), _summary(n for n in state if names.target(n) not in parameters))
    return result


def _summary(names: Iterable[str]) -> str:
    """Names of parameters, those of all layers in one."""
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})) or "none"
