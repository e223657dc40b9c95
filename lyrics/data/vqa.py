"""VQAv2's official format: questions and annotations in two files, ten answers each."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lyrics.data.disk_index import Index
from lyrics.data.formats import write_document
from lyrics.data.records import (
    BadRecordError,
    Record,
    Rejected,
    Sample,
    convert,
    identifier,
    listed,
    mapping,
    name,
    text,
)
from lyrics.data.streams import elements

ANSWERS_PER_QUESTION = 10


def write(folder: Path, asked: list[tuple[int | str, str, str, str]], split: str) -> int:
    """Write (image id, kind, question, answer) tuples; ten equal answers each, `question_type` = kind.

    Returns:
        The number of questions.
    """
    questions, annotations = [], []
    numbers: dict[int | str, int] = {}
    for image_id, kind, question, answer in asked:
        number = numbers[image_id] = numbers.get(image_id, -1) + 1
        question_id = image_id * 1000 + number if isinstance(image_id, int) else f"{image_id}-{number}"
        questions.append({"image_id": image_id, "question": question, "question_id": question_id})
        annotations.append(
            {
                "image_id": image_id,
                "question_id": question_id,
                "question_type": kind,
                "answer_type": answer_type(answer),
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": i}
                    for i in range(1, ANSWERS_PER_QUESTION + 1)
                ],
            }
        )
    head = {"data_type": "lyrics", "data_subtype": split}
    write_document(folder / "vqa_questions.json", {**head, "task_type": "Open-Ended", "questions": questions})
    write_document(folder / "vqa_annotations.json", {**head, "annotations": annotations})
    return len(questions)


def answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


def read(questions_path: Path, annotations_path: Path) -> tuple[list[Sample], list[Rejected]]:
    """Join the two files by question id, in the order of the questions.

    Raises:
        InputError: if a file is missing or not in the format.
    """
    return listed(each(questions_path, annotations_path))


def each(questions_path: Path, annotations_path: Path) -> Iterator[Record | Rejected]:
    """`read` as a stream; what has to be joined waits on disk. OK-VQA has the same two files."""
    with contextlib.closing(Index()) as answered:

        def keep(value: Any) -> None:
            annotation = mapping(value)
            known = {key: annotation.get(key) for key in ("image_id", "question_type")}
            kept = json.dumps({**known, "answers": answer_texts(annotation.get("answers"))})
            answered.add(identifier(annotation.get("question_id")), value=kept)

        yield from convert(annotations_path, elements(annotations_path, "annotations"), keep)
        yield from convert(questions_path, elements(questions_path, "questions"), lambda q: _record(q, answered))


def _record(value: Any, answered: Index) -> Record:
    question = mapping(value)
    number, image = identifier(question.get("question_id")), question.get("image_id")
    if not isinstance(question.get("question"), str) or not question["question"].strip() or image is None:
        raise BadRecordError("question without text or image id")
    kept = answered.get(number)
    if kept is None:
        raise BadRecordError("question without annotation")
    annotation = json.loads(kept)
    if not annotation["answers"]:
        raise BadRecordError("question without answers")
    if annotation["image_id"] != image:
        raise BadRecordError("question and annotation name different images")
    sample = Sample(
        sample_id=f"vqa-{number}",
        image_id=name(image),
        task="vqa",
        kind=str(annotation["question_type"] or "vqa"),
        question=text(question["question"], "question"),
        references=tuple(annotation["answers"]),
        source=str(question.get("source", "")),
    )
    return Record(images=image_names(image), samples=(sample,))


def answer_texts(answers: Any) -> tuple[str, ...]:
    """Of a list of answers, each a text or an object with one at `answer`, those that are texts."""
    given = answers if isinstance(answers, list) else []
    texts = [item.get("answer") if isinstance(item, dict) else item for item in given]
    return tuple(text(answer, "answer") for answer in texts if isinstance(answer, str) and answer.strip())


_COCO_NAMES = ("COCO_train2014_{:012d}.jpg", "COCO_val2014_{:012d}.jpg", "COCO_test2015_{:012d}.jpg", "{:012d}.jpg")


def image_names(image: Any) -> tuple[str, ...]:
    """The names that a picture's file may have: of a number those of COCO's releases, then the number itself."""
    given = name(image)
    number = int(given) if given.isascii() and given.isdigit() and len(given) <= 12 else None
    coco = [] if number is None else [form.format(number) for form in _COCO_NAMES]
    return (given, *coco, *(f"{given}.{suffix}" for suffix in ("jpg", "png")))
