"""The record types that every reader of a public format returns."""

import dataclasses
from typing import Literal

Task = Literal["caption", "vqa", "refer", "pope", "chat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
    """One annotated object: `box_xyxy` in pixels, `rle` a COCO run-length encoding (compressed counts as str).

    `crowd` and `area` are COCO's own: several objects that were not told apart; pixels, as annotated.
    """

    category: str
    box_xyxy: tuple[float, float, float, float]
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
    """

    sample_id: str
    image_id: str
    task: Task
    kind: str
    question: str = ""
    references: tuple[str, ...] = ()
    box_xyxy: tuple[float, float, float, float] | None = None
    turns: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejected:
    """A record that a reader set aside, with the reason; never silently lost."""

    source: str
    record: str
    reason: str
