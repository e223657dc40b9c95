"""Questions with short answers about a scene, by kind. Each is asked only where its answer is certain."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from lyrics.world import vocabulary
from lyrics.world.scenes import RELATIONS, Scene, SceneObject
from lyrics.world.vocabulary import plural, with_article


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    kind: str
    text: str
    answer: str


def questions(scene: Scene, generator: np.random.Generator, count: int) -> list[Question]:
    """Up to `count` different questions: one of each kind in random order, then round again."""
    found: dict[str, Question] = {}
    kinds = list(MAKERS)
    for _ in range(3):
        for index in generator.permutation(len(kinds)):
            if len(found) == count:
                return list(found.values())
            made = MAKERS[kinds[index]](scene, generator)
            if made is not None:
                found.setdefault(made[0], Question(kind=kinds[index], text=made[0], answer=made[1]))
    return list(found.values())


def _unique(scene: Scene) -> list[SceneObject]:
    return [item for item in scene.objects if len(scene.find(kind=item.kind)) == 1]


T = TypeVar("T")


def _one(options: list[T] | tuple[T, ...], generator: np.random.Generator) -> T:
    return options[int(generator.integers(len(options)))]


def _color(scene: Scene, generator: np.random.Generator) -> tuple[str, str] | None:
    candidates = _unique(scene)
    if not candidates:
        return None
    item = _one(candidates, generator)
    return f"What color is the {item.kind}?", item.color


def _size(scene: Scene, generator: np.random.Generator) -> tuple[str, str] | None:
    candidates = _unique(scene)
    if not candidates:
        return None
    item = _one(candidates, generator)
    text = _one((f"What size is the {item.kind}?", f"Is the {item.kind} small or large?"), generator)
    return text, item.size


def _kind(scene: Scene, generator: np.random.Generator) -> tuple[str, str] | None:
    candidates = [item for item in scene.objects if len(scene.find(color=item.color)) == 1]
    if not candidates:
        return None
    item = _one(candidates, generator)
    return f"What is the {item.color} object?", item.kind


def _count(scene: Scene, generator: np.random.Generator) -> tuple[str, str]:
    """Of kinds (rarely an absent one), of colours, or of all objects."""
    form = generator.random()
    if form < 0.3:
        return "How many objects are there?", str(len(scene.objects))
    if form < 0.5:
        color = _one(scene.objects, generator).color
        return f"How many {color} objects are there?", str(len(scene.find(color=color)))
    repeated = [item for item in scene.objects if len(scene.find(kind=item.kind)) > 1]
    kind = _one(repeated or scene.objects, generator).kind
    if form > 0.9:
        kind = _one([k for k in vocabulary.KINDS if k not in scene.kinds], generator)
    return f"How many {plural(kind)} are there?", str(len(scene.find(kind=kind)))


def _exists(scene: Scene, generator: np.random.Generator) -> tuple[str, str]:
    """Half yes, half no. A colour is asked of a kind only where the split may show that pair, so no pair tells."""
    item = _one(scene.objects, generator)
    present = generator.random() < 0.5
    if generator.random() < 0.5:
        absent = [kind for kind in vocabulary.KINDS if kind not in scene.kinds]
        kind = item.kind if present else _one(absent, generator)
        where = _one(("", " in the image"), generator)
        return f"Is there {with_article(kind)}{where}?", "yes" if present else "no"
    color, kind = item.color, item.kind
    if not present:
        pairs = [(c, item.kind) for c in vocabulary.colors_of(item.kind, scene.ood)]
        pairs += [(item.color, k) for k in vocabulary.KINDS if item.color in vocabulary.colors_of(k, scene.ood)]
        color, kind = _one([pair for pair in pairs if not scene.find(color=pair[0], kind=pair[1])], generator)
    return f"Is there {with_article(f'{color} {kind}')}?", "yes" if present else "no"


def _position(scene: Scene, generator: np.random.Generator) -> tuple[str, str] | None:
    candidates = _unique(scene)
    if not candidates:
        return None
    middle = scene.image_size_px / 2
    item = _one(candidates, generator)
    offset = item.center[0] - middle
    if (len(candidates) == 1 or generator.random() < 0.3) and abs(offset) >= scene.margin_px:
        return f"Which side is the {item.kind} on?", "left" if offset < 0 else "right"
    if len(candidates) == 1:
        return None
    relation = _one(RELATIONS, generator)
    other = _one([c for c in candidates if c is not item], generator)
    verdict = scene.holds(item, relation, other)
    if verdict is None:
        return None
    return f"Is the {item.kind} {relation} the {other.kind}?", "yes" if verdict else "no"


def _relation(scene: Scene, generator: np.random.Generator) -> tuple[str, str] | None:
    options = []
    for landmark in _unique(scene):
        for relation in RELATIONS:
            verdicts = [(o, scene.holds(o, relation, landmark)) for o in scene.objects if o is not landmark]
            there = [o for o, verdict in verdicts if verdict]
            if len(there) == 1 and all(verdict is not None for _, verdict in verdicts):
                options.append((f"What is {relation} the {landmark.kind}?", there[0].kind))
    return _one(options, generator) if options else None


MAKERS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str] | None]] = {
    "colour": _color,
    "count": _count,
    "exists": _exists,
    "position": _position,
    "kind": _kind,
    "relation": _relation,
    "size": _size,
}
"""Kind of question (the slice it is scored in) → its maker, which returns None where nothing certain can be asked."""
