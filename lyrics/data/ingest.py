"""Ingest (pipeline stage): the embedded world, folders in COCO format, or data sets in public formats, as raw data.

web/00000.tar …   pairs as img2dataset writes them
SPLIT/            images/, captions.json, instances.json and, where the source has them, VQA, RefCOCO, POPE, LLaVA;
                  absent.txt alone where the pipeline reads a split that the source does not have
summary.json      counts;  rejected.parquet: what was set aside, and why;  web_truth.parquet: for scoring only
"""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lyrics import seeding
from lyrics.data import folders, pope, sets, vqa
from lyrics.data.formats import ABSENT, write_coco, write_document, write_json_lines
from lyrics.data.held_out import EVALUATED
from lyrics.data.ledger import Ledger
from lyrics.data.webdataset import WebPair, write_tar
from lyrics.io import write_json, write_text
from lyrics.world import datasets

if TYPE_CHECKING:
    from lyrics.config import Config
    from lyrics.stage import Tracker

# What dvc.yaml names inside data/raw: these folders are there even where a source has no such split.
NAMED = {
    "foundation": "Nothing is fitted on this source: the frozen parts come from elsewhere.",
    "web": "This source has no web pairs: there is nothing to clean.",
}


def run(config: "Config", work: Path, tracker: "Tracker") -> None:
    """Write data/raw. Unusable input is refused before anything is written."""
    if config.data.source == "world":
        datasets.check(config.world)
    building = work / "building"
    shutil.rmtree(building, ignore_errors=True)
    ledger = Ledger(building / "rejected.parquet", Path(config.data.folder or ""))
    if config.data.source == "world":
        counts = _ingest_world(config, building)
    elif config.data.source == "coco":
        counts = folders.ingest(config, building, ledger)
    else:
        counts = sets.ingest(config, building, ledger)
    ledger.close()
    for split, meaning in NAMED.items():
        if split not in counts:
            write_text(building / split / ABSENT, f"{meaning}\n")
    summary = {"source": config.data.source, "splits": counts, "rejected": dict(ledger.reasons)}
    write_json(building / "summary.json", summary)
    tracker.log_metrics(
        {f"ingest/{split}_{name}": float(n) for split, of_split in counts.items() for name, n in of_split.items()}
        | {"ingest/rejected": float(ledger.reasons.total())}
    )
    building.replace(work / "out")


def _ingest_world(config: "Config", folder: Path) -> dict[str, dict[str, int]]:
    counts = {"web": _write_web(config, folder)}
    for split in datasets.ANNOTATED:
        if getattr(config.world.scenes, split):
            counts[split] = _write_annotated(config, split, folder / split)
    return counts


def _write_web(config: "Config", folder: Path) -> dict[str, int]:
    items = tqdm(datasets.web_items(config.seed, config.world), "ingest web", config.world.scenes.web)
    truth = []
    for shard, group in itertools.groupby(items, key=lambda item: item.key[:5]):
        held = list(group)
        truth += [{"key": item.key, "dirt": item.dirt} for item in held]
        pairs = [
            WebPair(
                key=item.key,
                image_bytes=item.image_bytes,
                caption=item.caption,
                meta={"url": item.url, "width": item.width, "height": item.height},
            )
            for item in held
        ]
        write_tar(folder / "web" / f"{shard}.tar", pairs)
    schema = pa.schema([("key", pa.string()), ("dirt", pa.string())])
    pq.write_table(pa.Table.from_pylist(truth, schema=schema), folder / "web_truth.parquet")
    dirty = sum(row["dirt"] != "clean" for row in truth)
    return {"pairs": len(truth), "dirty": dirty}


def _write_annotated(config: "Config", split: str, folder: Path) -> dict[str, int]:
    world = config.world
    total = getattr(world.scenes, split)
    images_folder = folder / "images"
    images_folder.mkdir(parents=True)
    drawn = []
    for picture in tqdm(datasets.pictures(config.seed, split, world), f"ingest {split}", total):
        (images_folder / picture.file_name).write_bytes(picture.jpeg)
        drawn.append(dataclasses.replace(picture, jpeg=b""))  # all at once would not fit
    side = world.image_size_px
    images = [{"id": p.image_id, "file_name": p.file_name, "width": side, "height": side} for p in drawn]
    captions = [(p.image_id, text) for p in drawn for text in p.captions]
    annotations = [{"image_id": p.image_id, **a} for p in drawn for a in p.annotations]
    write_coco(folder, images, captions, annotations, list(datasets.CATEGORIES))
    counts = {"images": len(drawn), "captions": len(captions), "objects": len(annotations)}
    if split == "foundation":
        lines = list(datasets.corpus_lines(config.seed, world))
        write_text(folder / "corpus.txt", "".join(f"{line}\n" for line in lines))
        return {**counts, "documents": len(lines)}
    asked = [(p.image_id, q.kind, q.text, q.answer) for p in drawn for q in p.questions]
    counts["questions"] = vqa.write(folder, asked, split)
    expressions = [_shikra(p, e, side) for p in drawn for e in p.expressions]
    write_json_lines(folder / "refcoco.jsonl", expressions)
    counts["expressions"] = len(expressions)
    if split in EVALUATED or split == "instruct":
        presence = {p.file_name: sorted(p.scene.kinds) for p in drawn}
        names = [category["name"] for category in datasets.CATEGORIES]
        lines_pope = pope.sample(presence, names, seeding.rng(config.seed, "pope", split))
        write_json_lines(folder / "pope.json", lines_pope)
        counts["pope"] = len(lines_pope)
    if split not in EVALUATED:
        dialogues = [_llava(p.image_id, p.file_name, p.dialogue) for p in drawn]
        write_document(folder / "llava.json", dialogues)
        counts["dialogues"] = len(dialogues)
    return counts


def _shikra(picture: datasets.Picture, expression: Any, side: int) -> dict[str, Any]:
    return {
        "img_path": picture.file_name,
        "expression": expression.text,
        "bbox": list(expression.target.box_xyxy),
        "image_id": picture.image_id,
        "width": side,
        "height": side,
    }


def _llava(image_id: int, file_name: str, turns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        value = f"<image>\n{question}" if number == 0 else question
        conversation += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": f"{image_id:012d}", "image": file_name, "conversations": conversation}
