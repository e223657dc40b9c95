"""For every format one small data set of the published schema: its entry in `data.sets`, and its files."""

import io
import json
import pickle
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from small_files import jpeg

SIZE = {"width": 40, "height": 30}
_ANSWERS = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
_TALK = [{"from": "human", "value": "<image>\nWho is there?"}, {"from": "gpt", "value": "A dog."}]
_COCO = [{"id": i, "file_name": f"{i:012d}.jpg", **SIZE} for i in (1, 2)]
_HEAD = {"images": _COCO, "categories": [{"id": 1, "name": "dog"}]}
_POLYGON, _COUNTS = [[1, 1, 9, 1, 9, 9]], {"size": [30, 40], "counts": [0, 30, 1170]}
_OBJECTS = [
    {"image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9], "segmentation": mask, "iscrowd": i - 1, "area": 40.0}
    for i, mask in ((1, _POLYGON), (2, _COUNTS))
]
_REGION = {"region_id": 1, "x": 1, "y": 2, "width": 5, "height": 6, "phrase": "a clock"}
_PART = {"category": "dog", "bbox": [0.1, 0.2, 0.5, 0.9]}
_CHOICE = {"question": "Which?", "choices": ["one", "two"], "answer": 1, "hint": "", "image": "a.png", "split": "val"}
_REF = {"ann_id": 0, "image_id": 1, "split": "val", "sentences": [{"sent_id": 3, "sent": "the dog", "raw": "Dog"}]}
_EXPRESSION = {"img_path": "1.jpg", "expression": "the dog", "bbox": [1, 2, 9.5, 12], **SIZE}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _lines(*values: Any) -> bytes:
    return b"".join(_json(value) + b"\n" for value in values)


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, content in (
            ("a.jpg", jpeg(1)),
            ("a.txt", b"a dog"),
            ("a.json", _json({"url": "http://x.org/a.jpg", "key": "a", "status": "success", "exif": "{}"})),
            ("b.png", jpeg(2)),
            ("b.json", _json({"caption": "a cat"})),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _table() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"URL": [f"http://x.org/{i}.jpg" for i in (1, 2)], "TEXT": ["a dog", "a cat"]}), buffer)
    return buffer.getvalue()


def _asked(direct: Any, **known: Any) -> dict[str, Any]:
    return {"question_id": 7, "image_id": 1, "question": "What colour?", "direct_answers": direct, **known}


_GQA = {"imageId": "1", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}}
_TEXT = {"image_id": "1", "question": "What does it say?", "answers": ["stop"] * 10, "question_id": 4}
_VSR = {"image": "000000000001.jpg", "caption": "The dog is left of the cat.", "label": 1, "relation": "left of"}
POPE = {"question_id": 1, "image": "1.jpg", "text": "Is there a dog in the image?", "label": "yes"}
_MME = {"question_id": "a/1.jpg", "image": "a/1.jpg", "text": "Is it red?\nAnswer the question.", "category": "a"}
_SEEN = {"image": "1.jpg", "question": "What is it?", "answers": _ANSWERS, "answer_type": "other"}

# format: the keys of its entry beside format, split and images; then its files by name
SETS: dict[str, tuple[dict[str, Any], dict[str, bytes]]] = {
    "webdataset": ({"path": "web.tar"}, {"web.tar": _tar()}),
    "url_list": (
        {"path": "list.csv"},
        {"list.csv": b'url,caption\nhttp://x.org/1.jpg,a dog\nhttp://x.org/2.jpg,"a, cat"\n'},
    ),
    "url_list parquet": ({"path": "list.parquet"}, {"list.parquet": _table()}),
    "coco": (
        {"path": "captions.json", "annotations": "instances.json"},
        {
            "captions.json": _json({"images": _COCO, "annotations": [{"image_id": 1, "id": 5, "caption": "a dog"}]}),
            "instances.json": _json({**_HEAD, "annotations": _OBJECTS}),
        },
    ),
    "flickr": (
        {"path": "tokens.txt", "annotations": "chosen.txt"},
        {"tokens.txt": b"1.jpg#0\tA dog .\n1.jpg#1\tOne dog .\n3.jpg#0\tA boat .\n", "chosen.txt": b"1.jpg\n2.jpg\n"},
    ),
    "visual_genome": ({"path": "r.json"}, {"r.json": _json([{"id": 1, "regions": [_REGION]}])}),
    "vqa": (
        {"path": "q.json", "annotations": "a.json"},
        {
            "q.json": _json({"questions": [_asked(None)]}),
            "a.json": _json({"annotations": [_asked(None, answers=_ANSWERS, question_type="what")]}),
        },
    ),
    "aokvqa": ({"path": "a.json", "part": "val"}, {"a.json": _json([_asked(["red"] * 10, split="val")])}),
    "gqa": ({"path": "g.json"}, {"g.json": _json({"02": _GQA})}),
    "vizwiz": ({"path": "v.json"}, {"v.json": _json([_SEEN])}),
    "textvqa": ({"path": "t.json"}, {"t.json": _json({"dataset_type": "val", "data": [_TEXT]})}),
    "vsr": ({"path": "v.jsonl"}, {"v.jsonl": _lines(_VSR, {**_VSR, "label": 0})}),
    "scienceqa": ({"path": "p.json", "part": "val"}, {"p.json": _json({"1": _CHOICE})}),
    "refcoco_lines": ({"path": "r.jsonl"}, {"r.jsonl": _lines(_EXPRESSION)}),
    "refer": (
        {"path": "refs.p", "annotations": "instances.json", "part": "val"},
        {
            "refs.p": pickle.dumps([_REF], 2),
            "instances.json": _json({**_HEAD, "annotations": [{**_OBJECTS[0], "id": 0}]}),
        },
    ),
    "llava": ({"path": "l.json"}, {"l.json": _json([{"id": "1", "image": "1.jpg", "conversations": _TALK}])}),
    "llava_lines": (
        {"path": "q.jsonl", "annotations": "a.jsonl"},
        {
            "q.jsonl": _lines({"question_id": 1, "image": "1.jpg", "text": "Who?", "category": "conv"}),
            "a.jsonl": _lines({"question_id": 1, "text": "A dog."}),
        },
    ),
    "llava_context": (
        {"path": "context.jsonl"},
        {"context.jsonl": _lines({"id": "1", "image": "1.jpg", "captions": ["a dog"], "instances": [_PART]})},
    ),
    "pope": ({"path": "coco_pope_random.json"}, {"coco_pope_random.json": _lines(POPE)}),
    "mme": (
        {"path": "m.jsonl", "annotations": "told"},
        {"m.jsonl": _lines(_MME), "told/a.txt": b"1.jpg\tIs it red? Answer the question.\tYes\n"},
    ),
}


def entry(name: str, split: str) -> dict[str, Any]:
    return {"format": name.partition(" ")[0], "split": split, "images": "images", **SETS[name][0]}


def pictures() -> dict[str, bytes]:
    """The folder of images that all of them share."""
    names = {"1.jpg": 1, "2.jpg": 2, "val/1/a.png": 3, "000000000001.jpg": 1, "000000000002.jpg": 2}
    return {f"images/{name}": jpeg(number) for name, number in names.items()}
