"""The spatial representation: tags and boxes as text (section 3.1.1). One function writes it, one parses it.

    grid100   umbrella 12 45 78 91; star 3 4 20 30;
    decimal3  umbrella: [0.123, 0.450, 0.781, 0.910];

Boxes are corners (x1, y1, x2, y2) as fractions of width and height. grid100 writes the cell of a 100 × 100 grid and
parses to its middle, decimal3 rounds to thousandths; writing what was parsed gives the same text. What is parsed may
come from a language model: whatever is not well-formed is skipped, never raised.
"""

import math
import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

CoordinateFormat = Literal["grid100", "decimal3"]
Box: TypeAlias = tuple[float, float, float, float]
BoxLike: TypeAlias = Sequence[float] | np.ndarray

_CELLS = 100
_TOLERANCE = 1e-4  # in cells: 0.29 × 100 is 28.999… in binary and belongs to cell 29
_STRUCTURE = re.compile(r"[\s;:,\[\]]+")
_GRID_NUMBER = r"(?<![\d.\-])\d+(?!\.?\d)"
_GRID_RUN = re.compile(rf"{_GRID_NUMBER}(?:[\s,]+{_GRID_NUMBER}){{3,}}")
_GRID_TAIL = re.compile(rf"^(?P<tag>.*?)[\s,:]*(?P<box>{_GRID_NUMBER}(?:[\s,]+{_GRID_NUMBER}){{3}})[\s.,]*$", re.DOTALL)
# A language model's decoder may put spaces around the point: "0. 123".
_DECIMAL_NUMBER = r"(?<![\d.\-])[01](?:\s?\.\s?\d+)?(?![\d.])"
_DECIMAL_RUN = re.compile(rf"{_DECIMAL_NUMBER}(?:\s*,\s*{_DECIMAL_NUMBER}){{3,}}")
_DECIMAL_TAIL = re.compile(
    rf"^(?P<tag>.*?)[\s:]*\[\s*(?P<box>{_DECIMAL_NUMBER}(?:\s*,\s*{_DECIMAL_NUMBER}){{3}})\s*\]\s*$", re.DOTALL
)
_RUNS = {"grid100": _GRID_RUN, "decimal3": _DECIMAL_RUN}
_TAILS = {"grid100": _GRID_TAIL, "decimal3": _DECIMAL_TAIL}


def clean_tag(tag: str) -> str:
    """The tag as it is written: without the characters that structure the text, `object` if nothing is left."""
    return _STRUCTURE.sub(" ", tag).strip() or "object"


def format_box(box: BoxLike, coordinate_format: CoordinateFormat) -> str:
    """`12 45 78 91` or `[0.123, 0.450, 0.781, 0.910]`; corners outside [0, 1] are moved to the edge."""
    inside = [min(max(float(value), 0.0), 1.0) for value in box]
    if coordinate_format == "grid100":
        return " ".join(str(min(math.floor(value * _CELLS + _TOLERANCE), _CELLS - 1)) for value in inside)
    return "[" + ", ".join(f"{value:.3f}" for value in inside) + "]"


def object_pieces(
    tags: Sequence[str], boxes_xyxy: Sequence[BoxLike] | np.ndarray, coordinate_format: CoordinateFormat
) -> list[tuple[str, str]]:
    """The (tag, box) texts of each object, for callers that must know where one ends: `tag box;` or `tag: box;`."""
    pairs = zip(tags, boxes_xyxy, strict=True)
    return [(clean_tag(tag), format_box(box, coordinate_format)) for tag, box in pairs]


def format_objects(
    tags: Sequence[str], boxes_xyxy: Sequence[BoxLike] | np.ndarray, coordinate_format: CoordinateFormat
) -> str:
    """Objects in the given order; the empty string for no objects."""
    colon = "" if coordinate_format == "grid100" else ":"
    return " ".join(f"{tag}{colon} {box};" for tag, box in object_pieces(tags, boxes_xyxy, coordinate_format))


def parse_box(text: str, coordinate_format: CoordinateFormat) -> Box | None:
    """The first well-formed box anywhere in `text`; None if there is none."""
    for run in _RUNS[coordinate_format].finditer(text):
        box = _box(run.group(), coordinate_format)
        if box is not None:
            return box
    return None


def parse_objects(text: str, coordinate_format: CoordinateFormat) -> list[tuple[str, Box]]:
    """Every well-formed object in order; malformed ones (a model's output cut short) are left out."""
    objects = []
    for part in text.split(";"):
        found = _TAILS[coordinate_format].match(part.strip())
        box = found and _box(found["box"], coordinate_format)
        if found and box:
            objects.append((clean_tag(found["tag"]), box))
    return objects


def _box(numbers: str, coordinate_format: CoordinateFormat) -> Box | None:
    """First four numbers, if they are corners of a box inside the picture."""
    if coordinate_format == "grid100":
        values = [(int(number) + 0.5) / _CELLS for number in re.findall(r"\d+", numbers)[:4]]
    else:
        compact = re.sub(r"\s", "", numbers)
        values = [float(number) for number in compact.split(",")[:4]]
    x1, y1, x2, y2 = values
    inside = all(0.0 <= value <= 1.0 for value in values)
    return (x1, y1, x2, y2) if inside and x1 <= x2 and y1 <= y2 else None
