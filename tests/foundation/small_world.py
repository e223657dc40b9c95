"""A project folder whose foundation split is a handful of coloured squares and discs, with captions and a corpus."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

from lyrics.config import ClipPart, LlmPart, TaggerPart, TokenizerPart

SIDE = 32
COLORS = {"red": (220, 30, 30), "blue": (30, 60, 220)}
KINDS = ("disc", "square")
FITTED = {"source": "fitted", "revision": None}
TOKENIZER = TokenizerPart(**FITTED, name="wordpiece", vocabulary_size=200)
LLM = LlmPart(**FITTED, name="llama", hidden_size=32, layers=2, heads=2, steps=6, batch_size=4, lr=3e-3)
CLIP = ClipPart(
    **FITTED,
    name="clip",
    image_size_px=SIDE,
    patch_size_px=8,
    hidden_size=32,
    layers=2,
    heads=2,
    text_hidden_size=32,
    text_layers=1,
    projection_size=16,
    epochs=2,
    batch_size=8,
    lr=1e-3,
)
TAGGER = TaggerPart(
    source="fitted",
    name="clip-head",
    vocabulary=None,
    prompts=("a photo of a {}",),
    threshold=0.5,
    epochs=2,
    lr=1e-3,
)


def write_foundation(project: Path, count: int) -> None:
    folder = project / "data/raw/foundation"
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    images, annotations, captions, corpus = [], [], [], []
    for i in range(1, count + 1):
        picture = Image.new("RGB", (SIDE, SIDE), (235, 235, 235))
        names, boxes = [], []
        for column in range(2):
            kind, color = KINDS[int(generator.integers(2))], list(COLORS)[int(generator.integers(2))]
            x, y = 1 + 16 * column, int(generator.integers(1, 18))
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if kind == "disc" else draw.rectangle)((x, y, x + 12, y + 12), fill=COLORS[color])
            names.append(f"{color} {kind}")
            boxes.append(f"{kind} {x * 3} {y * 3} {x * 3 + 36} {y * 3 + 36};")
            annotation = {"id": 2 * i + column, "image_id": i, "category_id": KINDS.index(kind) + 1}
            annotations.append(annotation | {"bbox": [x, y, 12, 12], "area": 144, "iscrowd": 0})
        picture.save(folder / f"images/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE})
        caption = f"A {names[0]} and a {names[1]}."
        captions.append({"id": i, "image_id": i, "caption": caption})
        corpus.append(f"{' '.join(boxes)} question: What is left? answer: {names[0].split()[1]}")
        corpus.append(f"{' '.join(boxes)} question: Describe the image. answer: {caption}")
    categories = [{"id": i, "name": kind} for i, kind in enumerate(KINDS, start=1)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(document))
    (folder / "corpus.txt").write_text("\n".join(corpus) + "\n")


def configuration(**parts: object) -> SimpleNamespace:
    """As much of a `Config` as the fits read; `parts` replaces fields: `llm={"steps": 1}`."""
    made = {"tokenizer": TOKENIZER, "llm": LLM, "clip": CLIP, "tagger": TAGGER}
    for name, fields in parts.items():
        made[name] = dataclasses.replace(made[name], **fields)
    return SimpleNamespace(foundation=SimpleNamespace(**made), seed=0, device="cpu")
