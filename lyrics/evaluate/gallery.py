"""The report's gallery: right and wrong answers on pictures with the boxes and masks that the refiner found."""

import bisect
import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lyrics import seeding
from lyrics.evaluate import charts, pictures
from lyrics.evaluate.metrics import Box
from lyrics.evaluate.tasks import SYSTEMS, answered_box
from lyrics.refiner.features import IMAGES_FILE, RefinedImage, read_images
from lyrics.refiner.spatial_text import CoordinateFormat

_COLOURS = 8
_RIGHT_FROM = 0.5


@dataclasses.dataclass(frozen=True)
class Shape:
    """One object on a picture, in its pixels; `colour` numbers the template's palette."""

    label: str
    box: tuple[float, float, float, float]
    outline: str
    colour: int


@dataclasses.dataclass(frozen=True)
class Card:
    """One question with its picture. `target` and `answered` are boxes as (x, y, width, height), for refer alone."""

    split: str
    task: str
    kind: str
    verdict: str
    score: str
    question: str
    answer: str
    references: list[str]
    baselines: list[tuple[str, str]]
    picture: str
    description: str
    width: int
    height: int
    shapes: list[Shape]
    target: Box | None
    answered: Box | None


def cards(
    samples: Path, refined: Path, size: int, seed: int, coordinate_format: CoordinateFormat
) -> Iterator[tuple[str, list[Card]]]:
    """For every evaluated split its name and `size` cards, tasks, kinds and verdicts in turn."""
    for path in sorted(samples.glob("*.parquet"), key=lambda path: path.stem):
        rows = pq.read_table(path).to_pylist()
        images = {image.image_id: image for image in read_images(refined / path.stem / IMAGES_FILE)}
        chosen = choose(rows, size, seed, path.stem)
        yield path.stem, [_card(path.stem, row, images[row["image_id"]], coordinate_format) for row in chosen]


def choose(rows: Iterable[Mapping[str, Any]], size: int, *keys: object) -> list[Mapping[str, Any]]:
    """`size` rows, one from each (task, kind, verdict) in turn until there are enough; no picture twice if possible.

    Captions have no verdict: they are taken from the low, middle and high third of their scores.
    """
    rows = list(rows)
    caption_scores = sorted(row["score"] for row in rows if row["task"] == "caption")
    thirds = [caption_scores[len(caption_scores) * part // 3] for part in (1, 2)] if caption_scores else []
    strata: dict[tuple[str, ...], list[Mapping[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        third = str(bisect.bisect_right(thirds, row["score"])) if row["task"] == "caption" else ""
        strata[row["task"], row["kind"], verdict(row), third].append(row)
    queues = []
    for stratum in sorted(strata):
        order = seeding.rng("gallery", *keys, *stratum).permutation(len(strata[stratum]))
        queues.append([strata[stratum][place] for place in order])
    order = seeding.rng("gallery", *keys).permutation(len(queues))
    queues = [queues[place] for place in order]
    chosen: list[Mapping[str, Any]] = []
    shown: set[str] = set()
    while len(chosen) < size and any(queues):
        for queue in queues:
            if queue and len(chosen) < size:
                row = next((row for row in queue if row["image_id"] not in shown), queue[0])
                queue.remove(row)
                shown.add(row["image_id"])
                chosen.append(row)
    return sorted(chosen, key=lambda row: (row["task"], row["kind"], verdict(row), row["sample_id"]))


def verdict(row: Mapping[str, Any]) -> str:
    """`right` or `wrong`; captions, which are neither, are `scored`."""
    if row["task"] == "caption":
        return "scored"
    return "right" if row["score"] >= _RIGHT_FROM else "wrong"


def _card(split: str, row: Mapping[str, Any], image: RefinedImage, coordinate_format: CoordinateFormat) -> Card:
    is_refer = row["task"] == "refer"
    target = _corner_and_size(tuple(row["box_xyxy"])) if is_refer else None
    found = answered_box(row["prediction"], image, coordinate_format) if is_refer else None
    is_caption = row["task"] == "caption"
    return Card(
        split=split,
        task=row["task"],
        kind=row["kind"],
        verdict=verdict(row),
        score=f"CIDEr {row['score']:.2f}" if is_caption else verdict(row),
        question=row["question"],
        answer=row["prediction"],
        references=list(dict.fromkeys(row["references"])),
        baselines=[
            (charts.SYSTEM_NAMES[system], row[f"prediction_{system}"])
            for system in SYSTEMS[1:]
            if row[f"prediction_{system}"] is not None
        ],
        picture=pictures.data_uri(image.path),
        description=f"Picture {image.image_id}" + (f" with {', '.join(image.tags)}" if image.tags else ""),
        width=image.width,
        height=image.height,
        shapes=[
            Shape(tag, _corner_and_size(box), pictures.outline(counts, image.width, image.height), i % _COLOURS)
            for i, (tag, box, counts) in enumerate(zip(image.tags, image.boxes_xyxy, image.masks, strict=True))
        ],
        target=target,
        answered=None if found is None else _corner_and_size(found),
    )


def _corner_and_size(box: Box) -> Box:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]
