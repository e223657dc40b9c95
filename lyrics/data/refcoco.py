"""Referring expressions as JSON lines (Shikra's packaging of RefCOCO, RefCOCO+ and RefCOCOg)."""

import math
from pathlib import Path, PurePosixPath

from lyrics.data.files import load_json_lines
from lyrics.data.records import Rejected, Sample


def read(path: Path) -> tuple[list[Sample], list[Rejected]]:
    """Samples whose `image_id` is the name of the image file, without folders.

    Boxes are corners in pixels; they are clipped to the image, and rejected if nothing is left.

    Raises:
        InputError: if the file is missing or not JSON lines.
    """
    samples, rejected = [], []
    for number, record in enumerate(load_json_lines(path), start=1):
        reason = _fault(record)
        if reason is None:
            x0, y0, x1, y1 = (float(value) for value in record["bbox"])
            width, height = record["width"], record["height"]
            box = (max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1))
            if box[0] < box[2] and box[1] < box[3]:
                samples.append(
                    Sample(
                        sample_id=f"refer-{number}",
                        image_id=PurePosixPath(record["img_path"]).name,
                        task="refer",
                        kind="refer",
                        question=" ".join(record["expression"].split()),
                        box_xyxy=box,
                    )
                )
                continue
            reason = f"box outside image: {record['bbox']} in {width} x {height}"
        rejected.append(Rejected(source=str(path), record=f"line {number}", reason=reason))
    return samples, rejected


def _fault(record: object) -> str | None:
    if not isinstance(record, dict):
        return "bad line: expected an object"
    if not isinstance(record.get("img_path"), str) or not record["img_path"]:
        return "bad line: no img_path"
    if not isinstance(record.get("expression"), str) or not record["expression"].strip():
        return "bad line: no expression"
    if not all(isinstance(record.get(side), int) and record[side] > 0 for side in ("width", "height")):
        return "bad line: no width and height"
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        return "bad box: expected four numbers"
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in box):
        return "bad box: expected four finite numbers"
    return None
