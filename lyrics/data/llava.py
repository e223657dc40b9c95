"""LLaVA-Instruct dialogues (JSON list), and LLaVA's evaluation questions with answers (JSON lines)."""

from pathlib import Path, PurePosixPath
from typing import Any

from lyrics.data.files import load_json_lines
from lyrics.data.records import Rejected, Sample

_IMAGE = "<image>"


def read(path: Path) -> tuple[list[Sample], list[Rejected]]:
    """Dialogues; `image_id` is the name of the image file. Human and model must alternate, human first.

    Raises:
        InputError: if the file is missing or not JSON.
    """
    samples, rejected = [], []
    for position, record in enumerate(load_json_lines(path)):
        turns = _turns(record)
        if isinstance(turns, str):
            rejected.append(Rejected(source=str(path), record=f"[{position}]", reason=turns))
            continue
        samples.append(
            Sample(
                sample_id=f"chat-{record.get('id', position)}",
                image_id=PurePosixPath(record["image"]).name,
                task="chat",
                kind="chat",
                turns=turns,
            )
        )
    return samples, rejected


def _turns(record: Any) -> tuple[tuple[str, str], ...] | str:
    """The turns, or why there are none."""
    if not isinstance(record, dict) or not isinstance(record.get("image"), str) or not record["image"]:
        return "dialogue without image"
    spoken = record.get("conversations")
    if not isinstance(spoken, list) or not spoken or len(spoken) % 2:
        return "dialogue incomplete: expected pairs of human and gpt"
    turns = []
    for human, model in zip(spoken[::2], spoken[1::2], strict=True):
        if not _said(human, "human") or not _said(model, "gpt"):
            return "dialogue out of order: expected human and gpt in turn, each with text"
        turns.append((human["value"].replace(_IMAGE, "").strip(), model["value"].strip()))
    if not all(question and answer for question, answer in turns):
        return "dialogue incomplete: an empty turn"
    return tuple(turns)


def _said(message: Any, speaker: str) -> bool:
    return isinstance(message, dict) and message.get("from") == speaker and isinstance(message.get("value"), str)


def read_evaluation(questions_path: Path, answers_path: Path) -> tuple[list[Sample], list[Rejected]]:
    """Join question and answer lines by question id to dialogues of one turn; `kind` is the category.

    Raises:
        InputError: if a file is missing or not JSON lines.
    """
    answers = {str(line.get("question_id")): line.get("text") for line in _objects(answers_path)}
    samples, rejected = [], []
    for line in _objects(questions_path):
        number, text, image = line.get("question_id"), line.get("text") or "", line.get("image") or ""
        answer = answers.get(str(number)) or ""
        if not all(isinstance(value, str) and value for value in (text, image, answer)):
            reason = "question without text, image or answer"
            rejected.append(Rejected(source=str(questions_path), record=str(number), reason=reason))
            continue
        samples.append(
            Sample(
                sample_id=f"chat-{number}",
                image_id=PurePosixPath(image).name,
                task="chat",
                kind=str(line.get("category", "chat")),
                turns=((text.replace(_IMAGE, "").strip(), answer.strip()),),
            )
        )
    return samples, rejected


def _objects(path: Path) -> list[dict[str, Any]]:
    return [line if isinstance(line, dict) else {} for line in load_json_lines(path)]
