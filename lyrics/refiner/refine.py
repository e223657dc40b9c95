"""Refine (pipeline stage): run the frozen parts over every picture once, and keep what they saw.

SPLIT/         images.parquet, samples.parquet, shard-00000/ … (see `features`), for web and each annotated split
summary.json   counts, widths of the features, and agreement with the annotations where there are any

A shard is written whole under its final name in the work folder, so that a killed run goes on after its last shard.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lyrics import io
from lyrics.data.files import BadImageError
from lyrics.data.records import ImageRecord
from lyrics.data.webdataset import open_image
from lyrics.errors import InputError
from lyrics.model.vision import ImageEncoder, load_image_encoder
from lyrics.refiner import features, quality
from lyrics.refiner.ahead import ahead
from lyrics.refiner.features import RefinedImage, Tokens
from lyrics.refiner.refiner import RefinedObjects, Refiner, load_refiner
from lyrics.refiner.sources import Source, read_sources

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
    sources = read_sources()
    device = _device(config.device)
    frozen = Frozen(
        encoder=load_image_encoder(FOUNDATION / "clip").to(device),
        refiner=load_refiner(FOUNDATION, config.refine, config.foundation, device),
        device=device,
    )
    started, computed = time.perf_counter(), 0
    with tqdm(total=sum(len(s.images) for s in sources), desc="refine", unit="image") as progress:
        for source in sources:
            computed += refine_split(source, frozen, work / "splits" / source.name, progress)
    seconds = time.perf_counter() - started
    out = work / "out"
    counts, agreement = {}, {}
    for source in sources:
        shards = math.ceil(len(source.images) / config.refine.images_per_shard)
        refined = _publish(source, work / "splits" / source.name, shards, out)
        counts[source.name] = _counts(refined, len(source.samples))
        if any(image.annotations for image in source.images):
            truth = (image.annotations for image in source.images)
            agreement[source.name] = quality.measure(zip(refined, truth, strict=True))
    summary = {
        "coordinate_format": config.refine.coordinate_format,
        "max_objects": config.refine.max_objects,
        "patches": frozen.encoder.patches,
        "image_width": frozen.encoder.width,
        "detector_width": frozen.refiner.detector.width,
        "segmenter_width": frozen.refiner.segmenter.width,
        "splits": counts,
        "quality": agreement,
    }
    io.write_json(out / "summary.json", summary)
    tracker.log_metrics(_metrics(summary))
    if computed:
        tracker.log_metrics({"refine/images_per_s": computed / seconds})
    tracker.log_artifact(out / "summary.json")


def refine_split(source: Source, frozen: Frozen, folder: Path, progress: tqdm) -> int:
    """Write the shards of one split that are not there yet.

    Returns:
        The number of pictures that were computed now.
    """
    settings = frozen.refiner.settings
    computed = 0
    for number, start in enumerate(range(0, len(source.images), settings.images_per_shard)):
        records = source.images[start : start + settings.images_per_shard]
        shard = features.shard_folder(folder, number)
        if not shard.exists():
            refined, tokens = refine_shard(records, number, frozen, progress)
            features.write_shard(shard, refined, tokens, settings.max_objects)
            computed += len(records)
        else:
            progress.update(len(records))
    return computed


def refine_shard(
    records: Sequence[ImageRecord], shard: int, frozen: Frozen, progress: tqdm
) -> tuple[list[RefinedImage], list[Tokens]]:
    """Rows and features of one shard, in the order of `records`."""
    size = frozen.refiner.settings.batch_size
    batches = [records[start : start + size] for start in range(0, len(records), size)]
    refined: list[RefinedImage] = []
    tokens: list[Tokens] = []
    for batch, images in zip(batches, ahead(batches, _decode), strict=True):
        with torch.inference_mode():
            image_tokens = frozen.encoder.look(images, frozen.device).float().cpu().numpy()
        found = frozen.refiner.refine(images, [record.annotations for record in batch])
        for record, image, image_tokens_PD, objects in zip(batch, images, image_tokens, found, strict=True):
            refined.append(_row(record, image, objects, shard, len(refined)))
            tokens.append(
                Tokens(
                    image_tokens_PD=image_tokens_PD.astype(np.float16),
                    detector_tokens_ND=objects.detector_tokens_ND,
                    segmenter_tokens_ND=objects.segmenter_tokens_ND,
                )
            )
        progress.update(len(batch))
    return refined, tokens


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
    images = []
    for record in batch:
        try:
            images.append(open_image(record.path))
        except BadImageError as error:
            raise InputError(
                f"{record.path} cannot be used ({error}); ingest sets such pictures aside: run python -m lyrics ingest"
            ) from None
    return images


def _publish(source: Source, folder: Path, shards: int, out: Path) -> list[RefinedImage]:
    """Put a finished split together in `out`; the shards stay in the work folder until the stage has ended."""
    images: list[RefinedImage] = []
    destination = out / source.name
    destination.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        shard = features.shard_folder(folder, number)
        images += features.read_images(shard / features.IMAGES_FILE)
        shutil.copytree(
            shard,
            destination / shard.name,
            ignore=shutil.ignore_patterns(features.IMAGES_FILE),
            copy_function=lambda source, destination: io.link_or_copy(Path(source), Path(destination)),
        )
    features.write_images(destination / features.IMAGES_FILE, images)
    features.write_samples(destination / features.SAMPLES_FILE, source.samples)
    return images


def _counts(images: Sequence[RefinedImage], samples: int) -> dict[str, float]:
    objects = sum(len(image.tags) for image in images)
    return {
        "images": len(images),
        "samples": samples,
        "objects": objects,
        "objects_per_image": round(objects / max(len(images), 1), 4),
        "images_without_objects": sum(not image.tags for image in images),
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
