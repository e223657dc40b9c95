"""VQAv2's official format: questions and annotations in two files, ten answers each."""

from pathlib import Path
from typing import Any

from lyrics.data.files import load_json, records
from lyrics.data.formats import write_document
from lyrics.data.records import Rejected, Sample

ANSWERS_PER_QUESTION = 10


def write(folder: Path, asked: list[tuple[int, str, str, str]], split: str) -> int:
    """Write (image id, kind, question, answer) tuples; ten equal answers each, `question_type` = kind.

    Returns:
        The number of questions.
    """
    questions, annotations = [], []
    numbers: dict[int, int] = {}
    for image_id, kind, text, answer in asked:
        number = numbers[image_id] = numbers.get(image_id, -1) + 1
        question_id = image_id * 1000 + number
        questions.append({"image_id": image_id, "question": text, "question_id": question_id})
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
    answered: dict[Any, dict[str, Any]] = {
        str(record.get("question_id")): record
        for record in records(annotations_path, load_json(annotations_path), "annotations")
    }
    samples, rejected = [], []
    for record in records(questions_path, load_json(questions_path), "questions"):
        question_id, text, image_id = record.get("question_id"), record.get("question"), record.get("image_id")
        annotation = answered.get(str(question_id))
        answers = _answers(annotation or {})
        if not isinstance(text, str) or not text.strip() or image_id is None:
            reason = "question without text or image id"
        elif annotation is None:
            reason = "question without annotation"
        elif not answers:
            reason = "question without answers"
        elif annotation.get("image_id") != image_id:
            reason = "question and annotation name different images"
        else:
            samples.append(
                Sample(
                    sample_id=f"vqa-{question_id}",
                    image_id=str(image_id),
                    task="vqa",
                    kind=str(annotation.get("question_type", "vqa")),
                    question=text.strip(),
                    references=answers,
                )
            )
            continue
        rejected.append(Rejected(source=str(questions_path), record=str(question_id), reason=reason))
    return samples, rejected


def _answers(annotation: dict[str, Any]) -> tuple[str, ...]:
    given = annotation.get("answers")
    texts = [item.get("answer") for item in given if isinstance(item, dict)] if isinstance(given, list) else []
    return tuple(text for text in texts if isinstance(text, str))
