"""A folder that `refine` runs in: drawn pictures in tars and a COCO split, a small CLIP, oracles for the rest."""

import dataclasses
import io as stdio
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lyrics.compose import preview
from lyrics.config import Config, parse
from lyrics.data.webdataset import WebPair, write_tar
from lyrics.foundation import fit
from lyrics.stage import NullTracker

ROOT = Path(__file__).parents[2]
SIDE, PAIRS, PICTURES = 32, 26, 9
PARTS = ("clip", "tagger", "detector", "segmenter")


def configuration(**engine: object) -> Config:
    """`tiny` with a CLIP of random weights, 5 pictures a shard and 2 a batch."""
    config = parse(preview(["~overrides", "preset=tiny", "data=world"], ROOT / "params/run.yaml"))
    clip = dataclasses.replace(
        config.foundation.clip, image_size_px=SIDE, patch_size_px=8, hidden_size=64, layers=2, heads=4,
        text_hidden_size=16, text_layers=1, projection_size=8, epochs=0,
    )  # fmt: skip
    oracles = {
        name: dataclasses.replace(getattr(config.foundation, name), source="annotations", name="oracle")
        for name in PARTS[1:]
    }
    return dataclasses.replace(
        config,
        device="cpu",
        foundation=dataclasses.replace(config.foundation, clip=clip, **oracles),
        refine=dataclasses.replace(config.refine, images_per_shard=5, batch_size=2),
        engine=dataclasses.replace(config.engine, **engine),
    )


def make(folder: Path) -> None:
    """Fill `folder`, which must be the current directory."""
    _write_coco(folder / "data/raw/foundation", 12)
    _write_coco(folder / "data/raw/test", PICTURES)
    (folder / "data/raw/foundation/corpus.txt").write_text("a cup and a star\n" * 20)
    pairs = [_pair(number) for number in range(PAIRS)]
    write_tar(folder / "data/clean/00000.tar", pairs[:11])
    write_tar(folder / "data/clean/00001.tar", pairs[11:])
    config = configuration()
    tokenizer = dataclasses.replace(config.foundation.tokenizer, vocabulary_size=200)
    config = dataclasses.replace(config, foundation=dataclasses.replace(config.foundation, tokenizer=tokenizer))
    for part in ("tokenizer", *PARTS):
        work = folder / "work" / part
        work.mkdir(parents=True)
        fit.run(part, config, work, NullTracker())
        (folder / "models/foundation").mkdir(parents=True, exist_ok=True)
        (work / "out").rename(folder / "models/foundation" / part)


def _draw(number: int) -> tuple[Image.Image, list[tuple[str, tuple[int, int, int, int]]]]:
    """A picture of up to two rectangles on noise, and what they are: category, and box as x, y, width, height."""
    draw = np.random.default_rng(number)
    width, height = 40 + number % 3 * 9, 33 + number % 4 * 7
    image = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
    objects = []
    for column in range(number % 3):
        x, y, kind = 2 + 18 * column, int(draw.integers(0, 20)), int(draw.integers(2))
        ImageDraw.Draw(image).rectangle((x, y, x + 11, y + 11), fill=("red", "blue")[kind])
        objects.append((("cup", "star")[kind], (x, y, 12, 12)))
    return image, objects


def _pair(number: int) -> WebPair:
    image, objects = _draw(number)
    written = stdio.BytesIO()
    image.save(written, "JPEG")
    meta = {"annotations": [{"category": name, "bbox": box} for name, box in objects]}
    return WebPair(key=f"{number:09d}", image_bytes=written.getvalue(), caption=f"a cup or a star {number}", meta=meta)


def _write_coco(folder: Path, count: int) -> None:
    (folder / "images").mkdir(parents=True)
    images, annotations, captions = [], [], []
    for number in range(1, count + 1):
        image, objects = _draw(number)
        image.save(folder / f"images/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": image.width, "height": image.height})
        captions.append({"id": number, "image_id": number, "caption": f"a cup or a star {number}"})
        for name, (x, y, w, h) in objects:
            corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            one = {"id": len(annotations), "image_id": number, "category_id": ("cup", "star").index(name) + 1}
            one |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": corners}
            annotations.append(one)
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "star"}]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(document))
