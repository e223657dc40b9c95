"""Visual Genome's region_descriptions.json: phrases with boxes, read as referring expressions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lyrics.data.records import BadRecordError, Record, Rejected, Sample, identifier, mapping, name, numbers, one_line
from lyrics.data.streams import elements


def each(path: Path) -> Iterator[Record | Rejected]:
    """A record for each image; a region that cannot be used is rejected alone.

    Raises:
        InputError: if the file is missing, damaged or no JSON list.
    """
    for place, value in elements(path):
        try:
            if isinstance(value, BadRecordError):
                raise value
            image = mapping(value)
            number = name(image.get("id", image.get("image_id")))
            regions = image.get("regions")
            if not isinstance(regions, list):
                raise BadRecordError("no regions: expected a list")
        except BadRecordError as error:
            yield Rejected(source=str(path), record=place, reason=str(error))
            continue
        samples = []
        for position, region in enumerate(regions):
            try:
                samples.append(_sample(number, region))
            except BadRecordError as error:
                yield Rejected(source=str(path), record=f"{place}.regions[{position}]", reason=str(error))
        names = (f"VG_100K/{number}.jpg", f"VG_100K_2/{number}.jpg", f"{number}.jpg")
        yield Record(images=names, samples=tuple(samples), source=str(path), place=place)


def _sample(image: str, value: Any) -> Sample:
    region = mapping(value)
    x, y, width, height = numbers([region.get(key) for key in ("x", "y", "width", "height")], 4, "box")
    return Sample(
        sample_id=f"refer-{identifier(region.get('region_id', region.get('id')))}",
        image_id=image,
        task="refer",
        kind="region",
        question=one_line(region.get("phrase"), "phrase"),
        box_xyxy=(x, y, x + width, y + height),
    )
