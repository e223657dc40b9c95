"""What is lost where features are rounded: relative errors, and scores of trained models that read them."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow.parquet as pq

from lyrics import config as schema
from lyrics import io
from lyrics.data.annotated import read_split
from lyrics.evaluate import evaluate
from lyrics.evaluate.evaluate import Answering
from lyrics.evaluate.tasks import HEADLINE
from lyrics.foundation.tokenizer import load_text_tokenizer
from lyrics.inference import Lyrics
from lyrics.model.inputs import TextTokenizer
from lyrics.model.vision import load_image_encoder
from lyrics.refiner.features import IMAGE_TOKENS, LOCAL_TOKENS, RefinedSplit, Tokens
from lyrics.refiner.precision import STORED, FeatureDtype, rounded
from lyrics.refiner.refine import Frozen, refine_shard
from lyrics.refiner.refiner import load_refiner
from lyrics.train.devices import pick_device
from lyrics.train.objectives import Objectives
from lyrics.train.stage1 import FOUNDATION, REFINED, STAGE1, load_mq_former
from lyrics.train.stage1_quality import measure

RAW, STAGE2 = Path("data/raw"), Path("models/stage2")
ARRAYS = {IMAGE_TOKENS: "image_tokens_PD", **{name: f"{name}_ND" for name in LOCAL_TOKENS}}
PICTURES = 128
Errors: TypeAlias = dict[str, float | None]
QUALITIES = ("image_to_text_recall_at_1", "text_to_image_recall_at_1", "itm_accuracy", "msp_accuracy")


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model's headline scores on a split; answer and score of each sample by its id."""

    metrics: dict[str, float]
    answers: dict[str, str]
    each: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Changed:
    """Of the samples: answers that are other ones, scores that are better, scores that are worse."""

    other: int
    better: int
    worse: int


def errors(settings: schema.Config, splits: Sequence[str]) -> dict[FeatureDtype, Errors]:
    """Relative errors of rounding what the frozen parts see in some pictures, by array."""
    device, parts = pick_device(settings.device), settings.foundation
    frozen = Frozen(
        encoder=load_image_encoder(FOUNDATION / "clip").to(device),
        refiner=load_refiner(FOUNDATION, settings.refine, parts.tagger, parts.detector, device),
        device=device,
    )
    records = [record for name in splits for record in read_split(RAW / name).images][:PICTURES]
    return relative_errors([tokens for _, tokens in refine_shard(records, 0, frozen)])


def relative_errors(seen: Sequence[Tokens]) -> dict[FeatureDtype, Errors]:
    """|rounded - x| / |x| over the tokens of all pictures together; None of an array in which there is nothing."""
    found: dict[FeatureDtype, Errors] = {}
    for dtype in STORED:
        found[dtype] = {}
        for name, attribute in ARRAYS.items():
            array_XD = np.concatenate([getattr(tokens, attribute) for tokens in seen])
            error_XD = rounded(array_XD, dtype).astype(np.float64) - array_XD
            size = np.linalg.norm(array_XD.astype(np.float64))
            found[dtype][name] = float(np.linalg.norm(error_XD) / size) if size else None
    return found


def scores(
    settings: schema.Config, copies: Mapping[FeatureDtype, Path], names: Sequence[str], samples: int | None
) -> dict[tuple[str, FeatureDtype], Scored]:
    """The model of models/stage2 on the same samples of some splits, in each copy of the project."""
    model = Lyrics.from_folders(STAGE2, FOUNDATION, settings.device)
    asked = dataclasses.replace(settings.evaluate, samples_per_split=samples)
    chosen = dataclasses.replace(settings, evaluate=asked)
    return {
        (name, dtype): score(chosen, name, RefinedSplit(copy / REFINED / name), model)
        for name in names
        for dtype, copy in copies.items()
    }


def score(settings: schema.Config, name: str, split: RefinedSplit, model: Answering) -> Scored:
    with tempfile.TemporaryDirectory() as folder:
        evaluate.run_alone(settings, Path(folder), name, split, model, STAGE2, FOUNDATION)
        out = Path(folder) / "out"
        metrics = io.read_json(out / "evaluation.json")["splits"][name]
        rows = pq.read_table(out / "samples" / f"{name}.parquet").to_pylist()
    return Scored(
        metrics={metric: metrics[metric]["model"] for metric in HEADLINE.values() if metric in metrics},
        answers={row["sample_id"]: row["prediction"] for row in rows},
        each={row["sample_id"]: row["score"] for row in rows},
    )


def compare(stored: Scored, other: Scored) -> Changed:
    """The answers of one model to the same samples, beside those on features as they are stored."""
    pairs = [(stored.each[i], other.each[i]) for i in stored.each]
    return Changed(
        other=sum(other.answers[i] != answer for i, answer in stored.answers.items()),
        better=sum(after > before for before, after in pairs),
        worse=sum(after < before for before, after in pairs),
    )


def alignment(settings: schema.Config, copies: Mapping[FeatureDtype, Path]) -> dict[FeatureDtype, dict[str, float]]:
    """What MQ-Former of models/stage1 retrieves, matches and fills in, in each copy of the project."""
    tokenizer = TextTokenizer(load_text_tokenizer(FOUNDATION / "tokenizer"))
    objectives = Objectives(
        load_mq_former(STAGE1).to(pick_device(settings.device)),
        tokenizer,
        itc_cross_query=settings.stage1.itc_cross_query,
        smoothing=settings.stage1.label_smoothing,
    ).eval()
    found = {}
    for dtype, copy in copies.items():
        with contextlib.chdir(copy):
            quality = measure(objectives, settings, tokenizer)
        found[dtype] = {name: quality[name] for name in QUALITIES if name in quality}
    return found
