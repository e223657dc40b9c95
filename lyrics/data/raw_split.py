"""Writes an annotated split of raw data in the formats that the pipeline reads, record by record.

Whatever the picture was called, its number in the split names it; ids of samples are numbers too. What came from where
stays in the keys `source` and `name`.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pycocotools import mask as coco_mask

from lyrics import io
from lyrics.data.records import Annotation, Sample
from lyrics.data.vqa import ANSWERS_PER_QUESTION, answer_type


class _List:
    """A JSON list, or JSON lines, in a temporary file."""

    def __init__(self, folder: Path, separator: str) -> None:
        self.count = 0
        self._separator = separator
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `RawSplit.close`

    def append(self, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self.file.write(f"{self._separator if self.count else ''}{text}".encode())
        self.count += 1


class RawSplit:
    """One folder of data/raw. `close` writes the files that have a record; images are written at once."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        (folder / "images").mkdir(parents=True)
        documents = ("images", "captions", "objects", "questions", "answers", "chat")
        self._lists = {name: _List(folder, ", ") for name in documents}
        self._lists |= {name: _List(folder, "\n") for name in ("refer", "pope")}
        self._categories: dict[str, int] = {}

    @property
    def pictures(self) -> int:
        return self._lists["images"].count

    def add_picture(self, content: bytes, suffix: str, size: tuple[int, int], *, name: str, source: str) -> str:
        """Keep a picture; its file name in the split."""
        number = self.pictures + 1
        file_name = f"{number:012d}.{suffix}"
        (self.folder / "images" / file_name).write_bytes(content)
        known = {"width": size[0], "height": size[1], "name": name, "source": source}
        self._lists["images"].append({"id": number, "file_name": file_name, **known})
        return file_name

    def add_object(self, file_name: str, item: Annotation) -> None:
        x0, y0, x1, y1 = item.box_xyxy
        objects = self._lists["objects"]
        area = float(coco_mask.area({**item.rle, "counts": item.rle["counts"].encode()})) if item.rle else None
        objects.append(
            {
                "id": objects.count + 1,
                "image_id": _number(file_name),
                "category_id": self._categories.setdefault(item.category, len(self._categories) + 1),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": item.rle or [],
                "area": (x1 - x0) * (y1 - y0) if area is None else area,
                "iscrowd": int(item.crowd),
            }
        )

    def add_sample(self, file_name: str, size: tuple[int, int], sample: Sample) -> None:
        """Write a valid sample about a picture of this split."""
        if sample.task == "caption":
            captions = self._lists["captions"]
            for text in sample.references:
                captions.append({"id": captions.count + 1, "image_id": _number(file_name), "caption": text})
        elif sample.task == "vqa":
            self._add_question(_number(file_name), sample)
        elif sample.task == "refer":
            known = {"img_path": file_name, "width": size[0], "height": size[1], "source": sample.source}
            box = list(sample.box_xyxy or ())
            self._lists["refer"].append({**known, "expression": sample.question, "bbox": box})
        elif sample.task == "pope":
            pope = self._lists["pope"]
            known = {"question_id": pope.count + 1, "image": file_name, "source": sample.source}
            label = sample.references[0]
            pope.append({**known, "text": sample.question, "label": label, "category": sample.kind})
        else:
            self._add_dialogue(file_name, sample)

    def _add_question(self, image_id: int, sample: Sample) -> None:
        """A single answer is written ten times: the score of VQA then is whether it was given."""
        number = self._lists["questions"].count + 1
        question = {"question_id": number, "image_id": image_id, "question": sample.question, "source": sample.source}
        answers = sample.references * (ANSWERS_PER_QUESTION if len(sample.references) == 1 else 1)
        self._lists["questions"].append(question)
        self._lists["answers"].append(
            {
                "question_id": number,
                "image_id": image_id,
                "question_type": sample.kind,
                "answer_type": answer_type(answers[0]),
                "multiple_choice_answer": max(answers, key=answers.count),
                "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(answers, start=1)],
            }
        )

    def _add_dialogue(self, file_name: str, sample: Sample) -> None:
        chat = self._lists["chat"]
        spoken = []
        for i, (question, answer) in enumerate(sample.turns):
            spoken.append({"from": "human", "value": question if i else f"<image>\n{question}"})
            spoken.append({"from": "gpt", "value": answer})
        known = {"id": f"{chat.count + 1:012d}", "image": file_name, "source": sample.source}
        chat.append({**known, "conversations": spoken})

    def close(self) -> dict[str, int]:
        """Put the files together; how many of each there are."""
        lists = self._lists
        categories = [{"id": number, "name": name} for name, number in self._categories.items()]
        self._document("captions.json", {"annotations": lists["captions"], "images": lists["images"]})
        described = {"annotations": lists["objects"], "categories": categories, "images": lists["images"]}
        self._document("instances.json", described)
        if lists["questions"].count:
            head = {"data_subtype": self.split, "data_type": "lyrics"}
            self._document("vqa_questions.json", {**head, "questions": lists["questions"], "task_type": "Open-Ended"})
            self._document("vqa_annotations.json", {"annotations": lists["answers"], **head})
        for name, file in (("refer", "refcoco.jsonl"), ("pope", "pope.json"), ("chat", "llava.json")):
            if lists[name].count:
                self._file(file, lists[name], *("[", "]\n") if name == "chat" else ("", "\n"))
        names = {"objects": "objects", "refer": "expressions", "pope": "pope", "chat": "dialogues"}
        counts = {"images": self.pictures, "captions": lists["captions"].count}
        counts |= {ours: lists[name].count for name, ours in {**names, "questions": "questions"}.items()}
        for one in lists.values():
            one.file.close()
        return counts

    def _document(self, name: str, values: Mapping[str, Any]) -> None:
        with io.atomic_path(self.folder / name) as temporary, temporary.open("wb") as out:
            for position, (key, value) in enumerate(values.items()):
                out.write(f"{', ' if position else '{'}{json.dumps(key)}: ".encode())
                if isinstance(value, _List):
                    _copy(value, out, "[", "]")
                else:
                    out.write(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
            out.write(b"}\n")

    def _file(self, name: str, content: _List, start: str, end: str) -> None:
        with io.atomic_path(self.folder / name) as temporary, temporary.open("wb") as out:
            _copy(content, out, start, end)


def _copy(content: _List, out: IO[bytes], start: str, end: str) -> None:
    out.write(start.encode())
    content.file.seek(0)
    shutil.copyfileobj(content.file, out)
    out.write(end.encode())


def _number(file_name: str) -> int:
    return int(file_name.partition(".")[0])
