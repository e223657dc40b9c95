"""What lies on disk: raw pairs, cached features, weights and checkpoints."""

import dataclasses

from lyrics.config import Config
from lyrics.plan.hardware import Assumptions
from lyrics.plan.memory import STAGES, StageCost
from lyrics.plan.parts import Parts, size
from lyrics.refiner.precision import token_bytes
from lyrics.refiner.sources import ANNOTATED

_LLM_BYTES, _WEIGHT_BYTES = 2, 4  # a language model is kept in bf16, all else in fp32


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    size_bytes: float
    how: str
    source: str


def picture_bytes(config: Config, parts: Parts) -> int:
    """Features of a picture: image tokens where they are cached, and `max_objects` rows of each local source."""
    sizes, refine = parts.mq_former.config, config.refine
    local = sum(token_bytes(width, refine.feature_dtype) for width in (sizes.detector_width, sizes.segmenter_width))
    patches = parts.encoder.patches if refine.features == "cached" else 0
    return patches * token_bytes(parts.encoder.width, refine.feature_dtype) + refine.max_objects * local


def pictures_of(config: Config, assumed: Assumptions, asked: int | None) -> tuple[int, int]:
    """Web pairs, and the pictures of the annotated splits where they are known: those of the embedded world."""
    if pairs := asked or assumed.pairs:
        return pairs, 0
    scenes = config.world.scenes
    return scenes.web, sum(getattr(scenes, split) for split in ANNOTATED)


def rows(
    config: Config, assumed: Assumptions, parts: Parts, stages: dict[str, StageCost], pairs: int, annotated: int
) -> list[Row]:
    each = picture_bytes(config, parts)
    without = "" if config.refine.features == "cached" else ", no image tokens"
    llm = sum(p.numel() for name, p in parts.llm.named_parameters() if ".lora_" not in name)
    others = size(parts.encoder.network) + assumed.detector_parameters
    others += size(parts.segmenter) if parts.segmenter is not None else 0
    weights = _LLM_BYTES * llm + _WEIGHT_BYTES * others
    kept = {verb: getattr(config, STAGES[verb]).checkpoints_kept for verb in stages}
    trained = sum((cost.gradients + cost.optimizer) * kept[verb] for verb, cost in stages.items())
    pictures = pairs + annotated
    numbers = " and ".join(map(str, sorted(set(kept.values()))))
    return [
        Row("raw pictures", pictures * assumed.raw_bytes_per_pair, f"{assumed.raw_bytes_per_pair:,} B each", "assumed"),
        Row(
            "cached features",
            pictures * each,
            f"{each:,} B a picture, {config.refine.feature_dtype}{without}",
            "computed",
        ),
        Row("weights of frozen parts", weights, "bf16 language model, fp32 others", "computed"),
        Row("checkpoints and models", trained, f"weights and optimizer, {numbers} kept", "computed"),
    ]
