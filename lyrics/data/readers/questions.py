"""Questions with answers about pictures: A-OKVQA, GQA, VizWiz, TextVQA, VSR, ScienceQA.

VQAv2 and OK-VQA are `lyrics.data.vqa`. `part` names a split where one file holds several; records of others are passed
over. Records of test sets without answers are rejected.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lyrics.data.records import BadRecordError, Record, Rejected, Sample, convert, identifier, mapping, name, text
from lyrics.data.streams import elements, json_lines
from lyrics.data.vqa import answer_texts, image_names

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def aokvqa(path: Path, part: str | None = None) -> Iterator[Record | Rejected]:
    """Direct answers (ten); choices and rationales are not read."""

    def one(value: Any) -> Record | None:
        record = mapping(value)
        if part is not None and record.get("split") != part:
            return None
        image = record.get("image_id")
        answers = answer_texts(record.get("direct_answers"))
        return _asked(image_names(image), record.get("question_id"), record.get("question"), answers)

    return convert(path, elements(path), one)


def gqa(path: Path) -> Iterator[Record | Rejected]:
    """The short answer; the kind is the structural type of the question."""

    def one(value: Any) -> Record:
        number, record = value[0], mapping(value[1])
        types = record.get("types")
        kind = types.get("structural") if isinstance(types, dict) else None
        image = name(record.get("imageId"))
        answers = answer_texts([record.get("answer")])
        return _asked((f"{image}.jpg", image), number, record.get("question"), answers, kind)

    return convert(path, elements(path, kind="object"), one)


def vizwiz(path: Path) -> Iterator[Record | Rejected]:
    """Ten answers, "unanswerable" among them; the kind is the answer type."""
    count = itertools.count()

    def one(value: Any) -> Record:
        number, record = next(count), mapping(value)
        answers = answer_texts(record.get("answers"))
        return _asked((name(record.get("image")),), number, record.get("question"), answers, record.get("answer_type"))

    return convert(path, elements(path), one)


def textvqa(path: Path) -> Iterator[Record | Rejected]:
    """Ten answers. Text that a reader of text found in the picture lies in files of its own, which are not read."""

    def one(value: Any) -> Record:
        record = mapping(value)
        image = name(record.get("image_id"))
        answers = answer_texts(record.get("answers"))
        names = (f"{image}.jpg", f"{image}.png", image)
        return _asked(names, record.get("question_id"), record.get("question"), answers)

    return convert(path, elements(path, "data"), one)


def vsr(path: Path) -> Iterator[Record | Rejected]:
    """Statements about where things are, true or false: asked as questions for yes or no."""
    count = itertools.count(1)

    def one(value: Any) -> Record:
        number, record = next(count), mapping(value)
        label = record.get("label")
        if isinstance(label, bool) or label not in (0, 1):
            raise BadRecordError("bad answer: expected label 0 or 1")
        image = name(record.get("image"))
        sample = Sample(
            sample_id=f"vsr-{number}",
            image_id=image,
            task="pope",
            kind="spatial",
            question=f"Is this true? {text(record.get('caption'), 'statement')}",
            references=("yes" if label else "no",),
        )
        return Record(images=(image, *image_names(image.partition(".")[0].lstrip("0") or "0")), samples=(sample,))

    return convert(path, json_lines(path), one)


def scienceqa(path: Path, part: str | None = None) -> Iterator[Record | Rejected]:
    """Multiple choice: hint, question and lettered options are the question, the right option's text the answer.

    Questions without a picture are rejected; lectures and solutions are not read.
    """

    def one(value: Any) -> Record | None:
        number, record = value[0], mapping(value[1])
        split = record.get("split")
        if part is not None and split != part:
            return None
        if not record.get("image"):
            raise BadRecordError("question without image")
        file, number = name(record.get("image")), name(number)
        names = (f"{split}/{number}/{file}", f"{number}/{file}", f"{number}.png")
        question, answer = _choice(record)
        return _asked(names, number, question, (answer,), record.get("subject"))

    return convert(path, elements(path, kind="object"), one)


def _choice(record: dict[str, Any]) -> tuple[str, str]:
    options, right = record.get("choices"), record.get("answer")
    if not isinstance(options, list) or not 2 <= len(options) <= len(_LETTERS):
        raise BadRecordError(f"bad choices: expected 2 to {len(_LETTERS)}")
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
        raise BadRecordError("bad answer: expected the number of a choice")
    texts = [text(option, "choice") for option in options]
    listed = " ".join(f"({letter}) {option}" for letter, option in zip(_LETTERS, texts, strict=False))
    hint = record.get("hint")
    parts = [text(hint, "hint")] if isinstance(hint, str) and hint.strip() else []
    return "\n".join([*parts, text(record.get("question"), "question"), f"Options: {listed}"]), texts[right]


def _asked(images: tuple[str, ...], number: Any, question: Any, answers: tuple[str, ...], kind: Any = None) -> Record:
    if not answers:
        raise BadRecordError("question without answers")
    sample = Sample(
        sample_id=f"vqa-{identifier(number)}",
        image_id=images[0],
        task="vqa",
        kind=text(kind, "kind", 80) if isinstance(kind, str) and kind.strip() else "vqa",
        question=text(question, "question"),
        references=answers,
    )
    return Record(images=images, samples=(sample,))
