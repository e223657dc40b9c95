"""A small project folder as the stages leave it, with a model that answers from what it is given."""

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lyrics import io
from lyrics.compose import preview
from lyrics.config import Config, SceneCounts, parse
from lyrics.data import clean, ingest
from lyrics.data.annotated import read_split
from lyrics.model.inputs import SeenImage
from lyrics.refiner import features
from lyrics.refiner.spatial_text import format_objects, parse_objects
from lyrics.stage import NullTracker

ROOT = Path(__file__).parents[2]
WIDTH = 8


def make(folder: Path, scenes: dict[str, int], web: int = 0, config: Config | None = None) -> Config:
    """Fill `folder` (the current directory) with data/ and models/ of a run over `scenes` of the embedded world."""
    config = config or parse(preview(["~overrides", "preset=tiny", "data=world"], ROOT / "params/run.yaml"))
    counts = {field.name: 0 for field in dataclasses.fields(SceneCounts)} | {"web": web} | scenes
    config = dataclasses.replace(config, world=dataclasses.replace(config.world, scenes=SceneCounts(**counts)))
    work = folder / "work"
    ingest.run(config, work, NullTracker())
    (folder / "data").mkdir()
    (work / "out").rename(folder / "data/raw")
    for split in scenes:
        _refine(Path("data/raw") / split, Path("data/refined") / split, config)
    io.write_json(
        Path("data/refined/summary.json"), {"image_width": WIDTH, "test": {"images": 3, "objects_per_image": 2.5}}
    )
    if web:
        _clean(config, folder)
    for stage, losses in (("stage1", {"itc_loss": 4.16, "itm_loss": 0.6365}), ("stage2", {"lm_loss": 6.9})):
        _train(Path("models") / stage, stage, losses)
    part = {"name": "clip", "source": "fitted", "revision": None, "licence": "Apache-2.0", "parameters": 1_234_567}
    io.write_json(
        Path("models/foundation/clip/manifest.json"),
        {**part, "part": "clip", "quality": {"recall_at_1": 0.41}, "sha256": {}},
    )
    return config


def configured(config: Config, **values: object) -> Config:
    """The configuration with other values in its section `evaluate`."""
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **values))  # type: ignore[arg-type]


def _refine(raw: Path, folder: Path, config: Config) -> None:
    split = read_split(raw)
    images, tokens = [], []
    for row, record in enumerate(split.images):
        tags = tuple(item.category for item in record.annotations[:10])
        boxes = tuple(item.box_xyxy for item in record.annotations[:10])
        size = np.array([record.width, record.height, record.width, record.height])
        text = format_objects(tags, [np.array(box) / size for box in boxes], config.refine.coordinate_format)
        images.append(
            features.RefinedImage(
                image_id=record.image_id,
                path=record.path,
                width=record.width,
                height=record.height,
                captions=record.captions,
                tags=tags,
                boxes_xyxy=boxes,
                scores=tuple(0.9 for _ in tags),
                masks=tuple(item.rle["counts"] for item in record.annotations[:10] if item.rle),
                spatial_text=text,
                shard=0,
                row=row,
            )
        )
        numbers = np.full((len(tags), WIDTH), row, np.float32)
        tokens.append(
            features.Tokens(
                image_tokens_PD=np.full((2, WIDTH), row, np.float32),
                detector_tokens_ND=numbers,
                segmenter_tokens_ND=numbers,
            )
        )
    folder.mkdir(parents=True)
    features.write_shard(features.shard_folder(folder, 0), zip(images, tokens, strict=True), max_objects=10)
    features.write_images(folder / features.IMAGES_FILE, images)
    features.write_samples(folder / features.SAMPLES_FILE, split.samples)


def _clean(config: Config, folder: Path) -> None:
    from lyrics.data import clean_report

    work = folder / "clean-work"
    shards = sorted(Path("data/raw/web").glob("*.tar"))
    report = clean.clean(shards, config.clean, lambda: None, work, (), config.engine, NullTracker())
    report["score"] = clean_report.score(
        clean.ledger(shards, work), clean_report.read_truth(Path("data/raw/web_truth.parquet"))
    )
    io.write_json(Path("data/clean/report.json"), report)


def _train(folder: Path, stage: str, chance: dict[str, float]) -> None:
    draw = random.Random(stage)
    rows = [
        {"step": step, f"{stage}/lr": 1e-3}
        | {
            f"{stage}/{name}": top * (0.25 + 0.75 * math.exp(-step / 120)) + draw.gauss(0, 0.03 * top)
            for name, top in chance.items()
        }
        for step in range(10, 401, 10)
    ]
    io.write_text(folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    io.write_json(folder / "config.json", {"chance": {f"{stage}/{name}": value for name, value in chance.items()}})
    if stage == "stage1":
        io.write_json(folder / "quality.json", {"itc_recall_at_1": 0.34, "itm_accuracy": 0.81})


class FakeModel:
    """Answers a part rightly, some from the spatial text, the rest at random; each answer follows from its input."""

    def __init__(self, answers: dict[tuple[str, str], str] | None = None, hit_rate: float = 0.7) -> None:
        self.calls: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        self._answers = answers or {}
        self._hit_rate = hit_rate

    def answer_batch(
        self,
        questions: Sequence[str],
        seen: Sequence[SeenImage],
        spatial_texts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
    ) -> list[str]:
        read = list(spatial_texts) if spatial_texts is not None else [image.spatial_text for image in seen]
        self.calls.append((tuple(questions), tuple(read)))
        return [self._answer(*one) for one in zip(questions, seen, read, strict=True)]

    def _answer(self, question: str, image: SeenImage, text: str) -> str:
        key = f"{question} {image.image_tokens_PD[0, 0]} {text}"
        draw = random.Random(key)
        objects = parse_objects(text, "grid100")
        if (
            (question, image.spatial_text) in self._answers
            and image.spatial_text == text
            and draw.random() < self._hit_rate
        ):
            return self._answers[question, image.spatial_text]
        if question.startswith("Where is"):
            named = [t for t in text.split("; ") if any(word in question for word in t.split()[:1])]
            chosen = (named or text.split("; "))[0].strip(";").split()
            return " ".join(chosen[-4:]) if len(chosen) > 3 else "nowhere"
        if question.startswith("Describe"):
            tags = [tag for tag, _ in objects]
            colours = ["red", "blue", "green", "yellow"]
            return "A picture of " + " and ".join(f"a {draw.choice(colours)} {tag}" for tag in tags[:3]) + "."
        if question.startswith("Is there"):
            return "yes" if any(tag in question for tag, _ in objects) else "no"
        return draw.choice(["red", "blue", "green", "yes", "no", "two", "small", "left", "star"])
