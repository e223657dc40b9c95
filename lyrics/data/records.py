"""The record types that every reader of a public format returns, and what makes a record valid.

A reader is a function of files that yields, in file order and without holding the file, a `Record` for what can be used
and a `Rejected` for what cannot. Whoever writes raw data checks each record against its picture with `checked`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

Task = Literal["caption", "vqa", "refer", "pope", "chat"]
Box = tuple[float, float, float, float]

MAX_TEXT = 20_000
"""Characters of one text; what is longer is no caption, question or answer."""
MAX_NAME = 255
MAX_SIDE = 1_000_000
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class BadRecordError(ValueError):
    """The message is the reason, its part before the first colon the class that is counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
    """One annotated object: `box_xyxy` in pixels, `rle` a COCO run-length encoding (compressed counts as str).

    `crowd` and `area` are COCO's own: several objects that were not told apart; pixels, as annotated.
    """

    category: str
    box_xyxy: Box
    rle: dict | None = None
    crowd: bool = False
    area: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One picture. `path` is relative to the project root; a member of a tar reads `folder/00000.tar::key.jpg`."""

    image_id: str
    path: str
    width: int
    height: int
    captions: tuple[str, ...] = ()
    annotations: tuple[Annotation, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One instruction about one picture.

    Attributes:
        kind: the slice it is scored in: the question type for vqa (`colour`, `count` ...), the negative sampling for
            pope (`random`, `popular`, `adversarial`), otherwise the task's own name.
        question: the question; the referring expression for refer; empty for captions and chat.
        references: captions, ten VQA answers, ("yes",) or ("no",); empty for refer and chat.
        box_xyxy: target of refer, in pixels of the image.
        turns: (question, answer) pairs of a dialogue; chat only.
        source: the data set that it came from, where that is known.
    """

    sample_id: str
    image_id: str
    task: Task
    kind: str
    question: str = ""
    references: tuple[str, ...] = ()
    box_xyxy: Box | None = None
    turns: tuple[tuple[str, str], ...] = ()
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejected:
    """A record that a reader set aside, with the reason; never silently lost.

    `source` is its file, `record` where it lies in it: a line, an index, a byte; of a picture its name.
    """

    source: str
    record: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What one place of a file says about one picture.

    Attributes:
        images: the names that the picture's file may have, the likeliest first; relative to the folder of images.
        content: the picture itself, where its file holds it (a tar); `images` is then its name there.
        samples: instructions about the picture; a caption is a sample too. Their `image_id` is the first name.
        annotations: objects in the picture; `in_fractions`: their boxes are in fractions of its width and height.
        size: width and height in pixels, where the file says them.
        meta: what else is known of a web pair.
        source, place: file, and line, index or byte in it; the reader's loop fills them in.
    """

    images: tuple[str, ...]
    content: bytes | None = None
    samples: tuple[Sample, ...] = ()
    annotations: tuple[Annotation, ...] = ()
    in_fractions: bool = False
    size: tuple[int, int] | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""
    place: str = ""

    def rejected(self, reason: str) -> Rejected:
        return Rejected(source=self.source, record=self.place, reason=reason)

    def objects(self, size: tuple[int, int], reject: Callable[[Rejected], None]) -> list[Annotation]:
        """The annotations with their boxes in pixels and inside a picture of that size; the others are rejected."""
        valid = []
        scale = size if self.in_fractions else (1, 1)
        for item in self.annotations:
            x0, y0, x1, y1 = item.box_xyxy
            try:
                box = clipped((x0 * scale[0], y0 * scale[1], x1 * scale[0], y1 * scale[1]), *size)
            except BadRecordError as error:
                reject(self.rejected(str(error)))
            else:
                valid.append(dataclasses.replace(item, box_xyxy=box))
        return valid


def convert(
    path: Path, values: Iterable[tuple[str, Any]], one: Callable[[Any], Record | None]
) -> Iterator[Record | Rejected]:
    """`one` of each value, with its place; what it refuses, and what could not even be parsed, is rejected.

    Args:
        values: places with what is there; a `BadRecordError` stands for what could not be parsed.
        one: raises BadRecordError; None for a value that is not asked for (another part of the data set).
    """
    for place, value in values:
        try:
            if isinstance(value, BadRecordError):
                raise value
            record = one(value)
        except BadRecordError as error:
            yield Rejected(source=str(path), record=place, reason=str(error))
        else:
            if record is not None:
                yield dataclasses.replace(record, source=str(path), place=place)


def listed(found: Iterable[Record | Rejected]) -> tuple[list[Sample], list[Rejected]]:
    """All samples and all rejected records of a reader, for what is small enough to be held."""
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    for item in found:
        if isinstance(item, Rejected):
            rejected.append(item)
        else:
            samples += item.samples
    return samples, rejected


def text(value: object, what: str, limit: int = MAX_TEXT) -> str:
    """A text without the characters that no text has: NUL and other controls become spaces, lone surrogates U+FFFD.

    Raises:
        BadRecordError: if it is no text, is blank, or endless.
    """
    if not isinstance(value, str):
        raise BadRecordError(f"no {what}: found {brief(value)}")
    if len(value) > limit:
        raise BadRecordError(f"endless {what}: {len(value)} characters, at most {limit} are read")
    if _SURROGATE.search(value):
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    plain = _CONTROL.sub(" ", value).strip()
    if not plain:
        raise BadRecordError(f"no {what}: found an empty text")
    return plain


def one_line(value: object, what: str, limit: int = MAX_TEXT) -> str:
    """`text` with single spaces and no line breaks."""
    return " ".join(text(value, what, limit).split())


def name(value: object, what: str = "image") -> str:
    """The name or number of something, as a string.

    Raises:
        BadRecordError: if it is neither, is blank, or too long for a file name.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRecordError(f"no {what}: found {brief(value)}")
    if len(value) > MAX_NAME or _SURROGATE.search(value):
        raise BadRecordError(f"bad name of {what}: {value[:40]!r} is too long or no text")
    return value


def identifier(value: object) -> str:
    """An id as text.

    Raises:
        BadRecordError: if it is neither text nor number, or endless.
    """
    if not isinstance(value, str | int) or len(str(value)) > MAX_NAME or _SURROGATE.search(str(value)):
        raise BadRecordError(f"bad id: found {brief(value)}")
    return str(value)


def mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecordError(f"bad record: expected an object, found {type(value).__name__}")
    return value


def brief(value: object) -> str:
    """A short description for a reason; never walks through what a stranger nested."""
    value = value[:60] if isinstance(value, str) else value
    return repr(value)[:60] if isinstance(value, str | int | float | None) else type(value).__name__


def dimensions(width: object, height: object) -> tuple[int, int]:
    """Width and height of a picture in pixels.

    Raises:
        BadRecordError: if they are no such numbers.
    """
    for side in (width, height):
        if not isinstance(side, int) or isinstance(side, bool) or not 0 < side <= MAX_SIDE:
            raise BadRecordError(f"no width and height: expected pixels, found {brief(width)} and {brief(height)}")
    return width, height  # type: ignore[return-value]


def printable(value: object) -> str:
    """At most a thousand characters on one line: files, their names and libraries' messages may hold anything."""
    text = " ".join(str(value).encode("utf-8", "backslashreplace").decode()[:1000].split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def numbers(value: object, count: int, what: str) -> tuple[float, ...]:
    """A list of so many finite numbers.

    Raises:
        BadRecordError: if it is not.
    """
    good = isinstance(value, list | tuple) and len(value) == count
    if not good or not all(isinstance(v, int | float) and _is_finite(v) for v in value):  # type: ignore[attr-defined]
        raise BadRecordError(f"bad {what}: expected {count} finite numbers")
    return tuple(float(v) for v in value)  # type: ignore[attr-defined]


def _is_finite(value: float) -> bool:
    return abs(value) < 1e15 and math.isfinite(value)  # the first also keeps integers that no float holds away


def clipped(box: Box, width: int, height: int) -> Box:
    """The part of a box (corners in pixels) that lies in the picture.

    Raises:
        BadRecordError: if nothing does.
    """
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise BadRecordError("bad box: it has no area")
    inside = max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise BadRecordError(f"box outside image: {tuple(round(v, 2) for v in box)} in {width} x {height}")
    return inside


def checked(sample: Sample, width: int, height: int) -> Sample:
    """The sample as its picture allows it: its box clipped, something to ask and something to answer.

    Raises:
        BadRecordError: if one of them is missing.
    """
    if sample.task == "refer":
        if sample.box_xyxy is None or not sample.question:
            raise BadRecordError("nothing to learn: an expression needs a text and a box")
        return dataclasses.replace(sample, box_xyxy=clipped(sample.box_xyxy, width, height))
    if sample.task == "chat":
        if not sample.turns:
            raise BadRecordError("nothing to learn: a dialogue needs turns")
    elif not sample.references:
        raise BadRecordError(f"nothing to learn: no answer to the question ({sample.task})")
    if sample.task == "pope" and sample.references not in (("yes",), ("no",)):
        raise BadRecordError("bad answer: expected yes or no")
    return sample
