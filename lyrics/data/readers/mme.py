"""MME in LLaVA's packaging: question lines, joined with the answers of MME's own text files."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lyrics.data.disk_index import Index
from lyrics.data.records import Record, Rejected, Sample, convert, mapping, name, one_line
from lyrics.data.streams import json_lines, text_lines

_REQUESTS = re.compile(r"(answer the question using a single word or phrase|please answer yes or no)\.?", re.IGNORECASE)


def each(path: Path, answers: Path | None = None) -> Iterator[Record | Rejected]:
    """A yes/no question for each line; the kind is its category.

    Args:
        answers: MME's folder: CATEGORY.txt with image, question and answer separated by tabs, or
            CATEGORY/NAME.txt or CATEGORY/questions_answers_YN/NAME.txt with question and answer. Without it the
            questions have no answers.

    Raises:
        InputError: if a file is missing or damaged.
    """
    count = itertools.count(1)
    with contextlib.closing(Index()) as known:
        if answers is not None:
            for file in sorted(answers.rglob("*.txt")):
                yield from _remember(file, answers, known)
        yield from convert(path, json_lines(path), lambda value: _record(value, next(count), known))


def _remember(file: Path, root: Path, known: Index) -> Iterator[Record | Rejected]:
    def one(line: Any) -> None:
        cells = [cell.strip() for cell in line.split("\t")]
        category, image = file.relative_to(root).parts[0].removesuffix(".txt"), file.stem
        if len(cells) >= 3:
            image, cells = Path(cells[0]).stem, cells[1:]
        if len(cells) >= 2 and cells[1].lower() in ("yes", "no"):
            known.add(category, image, _bare(cells[0]), value=cells[1].lower())

    return convert(file, text_lines(file), one)


def _record(value: Any, number: int, known: Index) -> Record:
    line = mapping(value)
    image, category = name(line.get("image")), one_line(line.get("category"), "category", 80)
    question = _bare(one_line(line.get("text"), "question"))
    answer = known.get(category, Path(image).stem, question)
    sample = Sample(
        sample_id=f"mme-{number}",
        image_id=image,
        task="pope",
        kind=category,
        question=question,
        references=(answer,) if answer else (),
    )
    file = image.rpartition("/")[2]
    return Record(images=(image, f"{category}/images/{file}", file), samples=(sample,))


def _bare(question: str) -> str:
    """Without the request for a short answer, which each packaging words in its own way."""
    return " ".join(_REQUESTS.sub("", question).split())
