"""Writing the public formats. Sorted keys and no times, so that equal data are equal bytes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lyrics.io import write_text

ABSENT = "absent.txt"  # in a folder that the pipeline names, where the source has no such split


def write_document(path: Path, value: Any) -> None:
    """A large JSON document on one line, as the public data sets have it (indented, it takes far longer to write)."""
    write_text(path, json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_coco(
    folder: Path,
    images: list[dict[str, Any]],
    captions: Iterable[tuple[int, str]],
    annotations: Iterable[dict[str, Any]],
    categories: list[dict[str, Any]],
) -> None:
    """captions.json and instances.json in COCO's format, annotations numbered in order."""
    texts = [{"id": i, "image_id": image_id, "caption": text} for i, (image_id, text) in enumerate(captions, start=1)]
    write_document(folder / "captions.json", {"images": images, "annotations": texts})
    numbered = [{**annotation, "id": i} for i, annotation in enumerate(annotations, start=1)]
    write_document(folder / "instances.json", {"images": images, "annotations": numbered, "categories": categories})


def write_json_lines(path: Path, values: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n" for value in values))
