"""The world as data sets: annotated pictures with what the public formats say about them, and web pairs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from lyrics import seeding
from lyrics.config import World
from lyrics.errors import InputError
from lyrics.world import corpus, dirt, language, scenes
from lyrics.world.questions import Question, questions
from lyrics.world.scenes import Scene
from lyrics.world.vocabulary import KINDS

SPLITS = ("foundation", "web", "instruct", "val", "test", "test_ood")
ANNOTATED = tuple(split for split in SPLITS if split != "web")
WEB_KEYS_PER_SHARD = 500
_DOCUMENTS_PER_SCENE = 4
_RANGES = {
    "image_size_px": (64, 1024),
    "max_objects": (1, 8),
    "questions_per_image": (1, 20),
    "corpus_documents": (0, 10**8),
}
_EXPRESSIONS_PER_IMAGE = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One annotated picture with everything that the formats say about it."""

    image_id: int
    file_name: str
    jpeg: bytes
    scene: Scene
    captions: tuple[str, ...]
    annotations: tuple[dict[str, Any], ...]
    questions: tuple[Question, ...]
    expressions: tuple[language.Expression, ...]
    dialogue: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebItem:
    """One crawled pair. `dirt` is the truth that only scoring may read."""

    key: str
    image_bytes: bytes
    caption: str
    url: str
    width: int
    height: int
    dirt: str


CATEGORIES: tuple[dict[str, Any], ...] = tuple({"id": i, "name": kind} for i, kind in enumerate(KINDS, start=1))
_CATEGORY_IDS = {category["name"]: category["id"] for category in CATEGORIES}


def check(world: World) -> None:
    """Refuse values from which no world can be made.

    Raises:
        InputError: naming the key.
    """
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(world, name) <= high:
            raise InputError(f"world.{name} is {getattr(world, name)}; give a value from {low} to {high}")
    rates = dataclasses.asdict(world.dirt)
    if sum(rates.values()) > 0.9:
        raise InputError(f"The rates in world.dirt add up to {sum(rates.values()):.2f}; their sum may be at most 0.9")


def scene_of(seed: int, split: str, index: int, world: World) -> Scene:
    """Scene number `index` of a split; it depends on nothing else that is drawn."""
    return scenes.sample_scene(seeding.rng(seed, "scene", split, index), split, world.image_size_px, world.max_objects)


def pictures(seed: int, split: str, world: World) -> Iterator[Picture]:
    """The annotated pictures of a split, in order."""
    for index in range(getattr(world.scenes, split)):
        scene = scene_of(seed, split, index, world)
        generator = seeding.rng(seed, "text", split, index)
        image_id = (SPLITS.index(split) + 1) * 1_000_000 + index
        yield Picture(
            image_id=image_id,
            file_name=f"{image_id:012d}.jpg",
            jpeg=dirt.encode_jpeg(scenes.render(scene)),
            scene=scene,
            captions=tuple(language.captions(scene, generator, int(generator.integers(3, 6)))),
            annotations=tuple(_annotations(scene)),
            questions=tuple(questions(scene, generator, world.questions_per_image)),
            expressions=tuple(language.sample_expressions(scene, generator, _EXPRESSIONS_PER_IMAGE)),
            dialogue=tuple(language.dialogue(scene, generator)),
        )


def _annotations(scene: Scene) -> Iterator[dict[str, Any]]:
    for item, mask in zip(scene.objects, scenes.masks(scene), strict=True):
        rle = coco_mask.encode(np.asfortranarray(mask))
        x0, y0, x1, y1 = item.box_xyxy
        yield {
            "category_id": _CATEGORY_IDS[item.kind],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": int(mask.sum()),
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
            "iscrowd": 0,
        }


def corpus_lines(seed: int, world: World) -> Iterator[str]:
    """`world.corpus_documents` lines about the foundation scenes and, beyond them, about scenes that nobody draws."""
    for start in range(0, world.corpus_documents, _DOCUMENTS_PER_SCENE):
        index = start // _DOCUMENTS_PER_SCENE
        scene = scene_of(seed, "foundation", index, world)
        count = min(_DOCUMENTS_PER_SCENE, world.corpus_documents - start)
        yield from corpus.documents(scene, seeding.rng(seed, "corpus", index), count)


def web_items(seed: int, world: World) -> Iterator[WebItem]:
    """The web pairs in file order, dirty at the configured rates (rounded to whole pairs)."""
    clean: list[int] = []
    for index, kind in enumerate(_assign_dirt(seed, world)):
        generator = seeding.rng(seed, "web", index)
        scene = scene_of(seed, "web", index, world)
        if kind == "clean":
            clean.append(index)
        elif kind == "duplicate":
            scene = scene_of(seed, "web", clean[int(generator.integers(len(clean)))], world)
        image = scenes.render(scene)
        caption = language.captions(scene, generator, 1)[0]
        if kind == "mismatched":
            caption = language.captions(_unlike(seed, scene, generator, world), generator, 1)[0]
        elif kind == "boilerplate":
            caption = dirt.boilerplate(generator)
        elif kind == "language":
            caption = dirt.other_language(generator)
        elif kind in ("tiny", "extreme"):
            image = (dirt.tiny if kind == "tiny" else dirt.extreme)(image, generator)
        elif kind == "duplicate":
            image = dirt.resized(image, generator)
        harder = {"quality": int(generator.integers(70, 90)), "subsampling": 2} if kind == "duplicate" else {}
        content = dirt.encode_jpeg(image, **harder)
        yield WebItem(
            key=f"{index // WEB_KEYS_PER_SHARD:05d}{index % WEB_KEYS_PER_SHARD:04d}",
            image_bytes=dirt.broken(content, generator) if kind == "broken" else content,
            caption=caption,
            url=f"https://pictures.example/{index:06d}.jpg",
            width=image.width,
            height=image.height,
            dirt=kind,
        )


def _assign_dirt(seed: int, world: World) -> list[str]:
    """One label per web pair. The first tenth has no duplicates, so that each finds an earlier original."""
    total = world.scenes.web
    labels = ["clean"] * total
    order = [int(i) for i in seeding.rng(seed, "web", "dirt").permutation(total)]
    late = [i for i in order if i >= total // 10 + 1]
    for index in late[: round(world.dirt.duplicate * total)]:
        labels[index] = "duplicate"
    free = [i for i in order if labels[i] == "clean" and i > 0]
    for kind in ("mismatched", "broken", "boilerplate", "language", "tiny", "extreme"):
        for _ in range(round(getattr(world.dirt, kind) * total)):
            labels[free.pop()] = kind
    return labels


def _unlike(seed: int, scene: Scene, generator: np.random.Generator, world: World) -> Scene:
    """Another scene without any kind of this one, so that its caption is surely wrong here."""
    while True:
        other = scene_of(seed, "web", int(generator.integers(world.scenes.web, 2 * world.scenes.web + 100)), world)
        if not other.kinds & scene.kinds:
            return other
