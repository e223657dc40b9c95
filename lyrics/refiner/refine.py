"""Refine (pipeline stage): run the frozen parts over every picture once, and keep what they saw.

SPLIT/         images.parquet, samples.parquet, shard-00000/ … (see `features`), for web and each annotated split
summary.json   counts, widths of the features, and agreement with the annotations where there are any

The pictures are planned into shards, which an engine's workers do; each is written whole under its final name in the
work folder, so that a killed run goes on with those that are absent. Then the driver puts them together, one at a time.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from lyrics import engine, io
from lyrics.config import DetectorPart, Refine, TaggerPart
from lyrics.data.records import Annotation, ImageRecord
from lyrics.model.vision import ImageEncoder, load_image_encoder
from lyrics.refiner import features, quality, shard_files, shards
from lyrics.refiner.ahead import ahead
from lyrics.refiner.features import RefinedImage, Tokens
from lyrics.refiner.online import open_refined
from lyrics.refiner.refiner import RefinedObjects, Refiner, load_refiner
from lyrics.refiner.shards import PlannedSplit, Shard
from lyrics.refiner.sources import read_sources

if TYPE_CHECKING:
    from lyrics.config import Config
    from lyrics.stage import Tracker

__all__ = ["RefinedObjects", "Refiner", "load_refiner", "run"]

FOUNDATION = Path("models/foundation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """The parts that look at a picture."""

    encoder: ImageEncoder
    refiner: Refiner
    device: torch.device


def run(config: "Config", work: Path, tracker: "Tracker") -> None:
    splits = shards.plan(read_sources, work, config.refine.images_per_shard)
    for split in splits:
        shards.forget_attempts(split)
    load = functools.partial(
        load_worker, FOUNDATION, config.refine, config.foundation.tagger, config.foundation.detector, config.device
    )
    every = [shard for split in splits for shard in split.shards]
    engine.run_shards(config.engine, load, every, done=_is_done, name="refine", tracker=tracker)
    out = work / "out"
    counts, agreement = {}, {}
    for split in splits:
        _publish(split, out / split.name)
        counts[split.name] = _counts(split, out / split.name)
        figures = quality.measure(_with_truth(split))
        if figures["box_recall"] is not None:  # there are annotations
            agreement[split.name] = figures
    summary = {
        "coordinate_format": config.refine.coordinate_format,
        "max_objects": config.refine.max_objects,
        "features": config.refine.features,
        "feature_dtype": config.refine.feature_dtype,
        **_widths(every[0].folder),
        "splits": counts,
        "quality": agreement,
    }
    io.write_json(out / "summary.json", summary)
    tracker.log_metrics(_metrics(summary))
    tracker.log_artifact(out / "summary.json")


def load_worker(
    foundation: Path, settings: Refine, tagger: TaggerPart, detector: DetectorPart, device: str
) -> Callable[[Shard], int]:
    """What each worker of an engine begins with: the frozen parts, in a function that does one shard."""
    chosen = _device(device)
    frozen = Frozen(
        encoder=load_image_encoder(foundation / "clip").to(chosen),
        refiner=load_refiner(foundation, settings, tagger, detector, chosen),
        device=chosen,
    )
    return functools.partial(do_shard, frozen)


def do_shard(frozen: Frozen, shard: Shard) -> int:
    """Refine the planned pictures of one shard; returns how many there were."""
    records = shard.records()
    write_shard(frozen, records, shard.number, shard.folder)
    return len(records)


def write_shard(frozen: Frozen, records: Sequence[ImageRecord], number: int, folder: Path) -> None:
    """Refine `records` into `folder`, which appears whole or not at all."""
    settings = frozen.refiner.settings
    with shards.attempt_at(folder) as own:
        features.write_shard(
            own,
            refine_shard(records, number, frozen),
            max_objects=settings.max_objects,
            feature_dtype=settings.feature_dtype,
            image_tokens=settings.features == "cached",
        )


def refine_shard(records: Sequence[ImageRecord], shard: int, frozen: Frozen) -> Iterator[tuple[RefinedImage, Tokens]]:
    """Row and features of each picture of one shard, in the order of `records`."""
    size = frozen.refiner.settings.batch_size
    batches = [records[start : start + size] for start in range(0, len(records), size)]
    row = 0
    for batch, images in zip(batches, ahead(batches, _decode), strict=True):
        with torch.inference_mode():
            image_tokens = frozen.encoder.look(images, frozen.device, size).float().cpu().numpy()
        found = frozen.refiner.refine(images, [record.annotations for record in batch])
        for record, image, image_tokens_PD, objects in zip(batch, images, image_tokens, found, strict=True):
            yield (
                _row(record, image, objects, shard, row),
                Tokens(
                    image_tokens_PD=image_tokens_PD,
                    detector_tokens_ND=objects.detector_tokens_ND,
                    segmenter_tokens_ND=objects.segmenter_tokens_ND,
                ),
            )
            row += 1


def _row(record: ImageRecord, image: Image.Image, objects: RefinedObjects, shard: int, row: int) -> RefinedImage:
    return RefinedImage(
        image_id=record.image_id,
        path=record.path,
        width=image.width,
        height=image.height,
        captions=record.captions,
        tags=objects.tags,
        boxes_xyxy=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in objects.boxes_xyxy),
        scores=tuple(map(float, objects.scores)),
        masks=objects.masks,
        spatial_text=objects.spatial_text,
        shard=shard,
        row=row,
    )


def _decode(batch: Sequence[ImageRecord]) -> list[Image.Image]:
    return [open_refined(record.path) for record in batch]


def _is_done(shard: Shard) -> bool:
    return shard.is_done


def _publish(split: PlannedSplit, destination: Path) -> None:
    """Put a finished split together; its shards stay in the work folder until the stage has ended."""
    destination.mkdir(parents=True, exist_ok=True)
    for shard in split.shards:
        shutil.copytree(
            shard.folder,
            destination / shard.folder.name,
            ignore=shutil.ignore_patterns(features.IMAGES_FILE),
            copy_function=lambda source, destination: io.link_or_copy(Path(source), Path(destination)),
        )
    features.write_images(destination / features.IMAGES_FILE, _images(split))
    io.link_or_copy(split.samples, destination / features.SAMPLES_FILE)


def _images(split: PlannedSplit) -> Iterator[RefinedImage]:
    """One shard after the other is held."""
    for shard in split.shards:
        yield from shard.images()


def _with_truth(split: PlannedSplit) -> Iterator[tuple[RefinedImage, Sequence[Annotation]]]:
    for shard in split.shards:
        truth = (record.annotations for record in shard.records())
        yield from zip(shard.images(), truth, strict=True)


def _counts(split: PlannedSplit, published: Path) -> dict[str, float]:
    objects = [len(image.tags) for image in _images(split)]
    return {
        "images": len(objects),
        "samples": features.count_rows(published / features.SAMPLES_FILE),
        "objects": sum(objects),
        "objects_per_image": round(sum(objects) / max(len(objects), 1), 4),
        "images_without_objects": objects.count(0),
    }


def _widths(shard: Path) -> dict[str, int]:
    """Widths of the features, as the first shard has them: the driver loads no model."""
    shapes = shard_files.read_manifest(shard).shapes
    return {
        "patches": shapes["image_tokens"][1],
        "image_width": shapes["image_tokens"][2],
        "detector_width": shapes["detector_tokens"][2],
        "segmenter_width": shapes["segmenter_tokens"][2],
    }


def _metrics(summary: dict[str, Any]) -> dict[str, float]:
    counted = {
        f"refine/{split}_{name}": counts[name]
        for split, counts in summary["splits"].items()
        for name in ("images", "objects_per_image")
    }
    agreement = {
        f"refine/{split}_{name}": value
        for split, figures in summary["quality"].items()
        for name, value in figures.items()
    }
    images = sum(counts["images"] for counts in summary["splits"].values())
    objects = sum(counts["objects"] for counts in summary["splits"].values())
    every = {**counted, **agreement, "refine/objects_per_image": objects / max(images, 1)}
    return {name: float(value) for name, value in every.items() if value is not None}


def _device(name: str) -> torch.device:
    from lyrics.foundation.training import pick_device

    return pick_device(name)
