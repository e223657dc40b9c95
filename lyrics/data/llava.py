"""LLaVA-Instruct dialogues (JSON list), and LLaVA's evaluation questions with answers (JSON lines)."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lyrics.data.disk_index import Index
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
    one_line,
    text,
)
from lyrics.data.streams import json_lines

_IMAGE = "<image>"


def read(path: Path) -> tuple[list[Sample], list[Rejected]]:
    """Dialogues; `image_id` is the name of the image file. Human and model must alternate, human first.

    Raises:
        InputError: if the file is missing or damaged.
    """
    return listed(each(path))


def each(path: Path) -> Iterator[Record | Rejected]:
    """`read` as a stream."""
    count = itertools.count()
    return convert(path, json_lines(path), lambda value: _dialogue(value, next(count)))


def _dialogue(value: Any, position: int) -> Record:
    record = mapping(value)
    if not isinstance(record.get("image"), str) or not record["image"]:
        raise BadRecordError("dialogue without image")
    return _record(
        name(record["image"]),
        sample_id=f"chat-{identifier(record.get('id', position))}",
        kind="chat",
        turns=_turns(record.get("conversations")),
        source=str(record.get("source", "")),
    )


def _record(image: str, **known: Any) -> Record:
    """The picture may lie in a folder of its own (`coco/train2017/1.jpg`), or all of them in one."""
    base = PurePosixPath(image).name
    return Record(images=(image, base), samples=(Sample(image_id=base, task="chat", **known),))


def _turns(spoken: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(spoken, list) or not spoken or len(spoken) % 2:
        raise BadRecordError("dialogue incomplete: expected pairs of human and gpt")
    turns = []
    for human, model in zip(spoken[::2], spoken[1::2], strict=True):
        if not _said(human, "human") or not _said(model, "gpt"):
            raise BadRecordError("dialogue out of order: expected human and gpt in turn, each with text")
        turns.append((_question(human["value"]), text(model["value"], "answer")))
    return tuple(turns)


def _question(value: Any) -> str:
    return text(value.replace(_IMAGE, "") if isinstance(value, str) else value, "question")


def _said(message: Any, speaker: str) -> bool:
    return isinstance(message, dict) and message.get("from") == speaker and isinstance(message.get("value"), str)


def read_evaluation(questions_path: Path, answers_path: Path) -> tuple[list[Sample], list[Rejected]]:
    """Join question and answer lines by question id to dialogues of one turn; `kind` is the category.

    Raises:
        InputError: if a file is missing or damaged.
    """
    return listed(each_evaluation(questions_path, answers_path))


def each_evaluation(questions_path: Path, answers_path: Path) -> Iterator[Record | Rejected]:
    """`read_evaluation` as a stream; the answers wait on disk."""
    with contextlib.closing(Index()) as answers:

        def keep(value: Any) -> None:
            answer = mapping(value)
            answers.add(identifier(answer.get("question_id")), value=text(answer.get("text"), "answer"))

        yield from convert(answers_path, json_lines(answers_path), keep)
        yield from convert(questions_path, json_lines(questions_path), lambda value: _evaluation(value, answers))


def _evaluation(value: Any, answers: Index) -> Record:
    line = mapping(value)
    number = identifier(line.get("question_id"))
    answer = answers.get(number)
    if answer is None:
        raise BadRecordError("question without answer")
    return _record(
        name(line.get("image")),
        sample_id=f"chat-{number}",
        kind=one_line(line.get("category", "chat"), "category"),
        turns=((_question(line.get("text")), answer),),
    )
