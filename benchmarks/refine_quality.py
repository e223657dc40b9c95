"""How well a refiner agrees with annotations: that of models/foundation, and the oracle, on any annotated splits.

    make run until=refine && python -m benchmarks.refine_quality data/raw/val data/raw/test_ood --write docs/refiner.md

A split is a folder with images/ and instances.json, so a folder of photographs in COCO's format will do.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.table import write_table
from lyrics import config as schema
from lyrics.data.annotated import read_split
from lyrics.data.records import ImageRecord
from lyrics.data.webdataset import open_image
from lyrics.refiner import quality
from lyrics.refiner.ahead import ahead
from lyrics.refiner.detection import AnnotationDetector
from lyrics.refiner.features import RefinedImage
from lyrics.refiner.refiner import Refiner, load_refiner
from lyrics.refiner.segmentation import AnnotationSegmenter
from lyrics.refiner.tagging import AnnotationTagger

FOUNDATION = Path("models/foundation")
FIGURES = ("box_ap", "box_ap50", "box_ap75", "box_recall", "box_precision", "tag_accuracy", "mask_ap", "mask_iou")


def refiners(settings: schema.Config, max_objects: int) -> dict[str, Refiner]:
    """The fitted one, and one that reads the annotations; it keeps as many objects."""
    refine = dataclasses.replace(settings.refine, max_objects=max_objects)
    clip = FOUNDATION / "clip"
    oracle = Refiner(
        tagger=AnnotationTagger(()),
        detector=AnnotationDetector(clip),
        segmenter=AnnotationSegmenter(clip),
        settings=refine,
        score_threshold=0.0,
        nms_iou=None,
    )
    parts = settings.foundation
    return {"models/foundation": load_refiner(FOUNDATION, refine, parts.tagger, parts.detector), "annotations": oracle}


def figures(refiner: Refiner, records: Sequence[ImageRecord]) -> dict[str, float | None]:
    """Those that `refine` logs."""
    size = refiner.settings.batch_size
    batches = [records[start : start + size] for start in range(0, len(records), size)]
    found: list[RefinedImage] = []
    decoded = ahead(batches, lambda batch: [open_image(record.path) for record in batch])
    for batch, pictures in zip(tqdm(batches, desc="refine", unit="batch"), decoded, strict=True):
        for record, objects in zip(batch, refiner.refine(pictures, [r.annotations for r in batch]), strict=True):
            found.append(
                RefinedImage(
                    image_id=record.image_id,
                    path=record.path,
                    width=record.width,
                    height=record.height,
                    captions=(),
                    tags=objects.tags,
                    boxes_xyxy=tuple(map(tuple, objects.boxes_xyxy.tolist())),
                    scores=tuple(map(float, objects.scores)),
                    masks=objects.masks,
                    spatial_text=objects.spatial_text,
                    shard=0,
                    row=len(found),
                )
            )
    return quality.measure(zip(found, [record.annotations for record in records], strict=True))


def table(measured: Sequence[tuple[str, str, int, dict[str, float | None]]]) -> str:
    rows = [
        f"| pictures | refiner | n | {' | '.join(name.replace('_', ' ') for name in FIGURES)} |",
        f"| --- | --- | --: |{' --: |' * len(FIGURES)}",
    ]
    for split, name, count, found in measured:
        values = (found[figure] for figure in FIGURES)
        cells = " | ".join("–" if value is None else f"{value:.3f}" for value in values)
        rows.append(f"| {split} | {name} | {count} | {cells} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("splits", type=Path, nargs="+")
    parser.add_argument("--max-objects", type=int, default=100, help="of a picture; COCO scores 100 boxes of each")
    parser.add_argument("--write", type=Path, help="a document with the markers of refine-quality")
    chosen = parser.parse_args()
    programs = refiners(schema.load(), chosen.max_objects)
    measured = []
    for folder in chosen.splits:
        records = read_split(folder).images
        name = "/".join(folder.resolve().parts[-2:])
        measured += [(name, program, len(records), figures(refiner, records)) for program, refiner in programs.items()]
    text = table(measured)
    print(text)
    if chosen.write:
        write_table(chosen.write, "refine-quality", text)


if __name__ == "__main__":
    main()
