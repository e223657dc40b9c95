"""What people would say about a scene: captions, referring expressions, dialogues. Short sentences, few words."""

import dataclasses
from typing import Literal

import numpy as np

from lyrics.world.scenes import RELATIONS, Relation, Scene, SceneObject
from lyrics.world.vocabulary import number_word, plural, with_article

_LIST_PATTERNS = (
    "{list}",
    "there {be} {list}",
    "a picture of {list}",
    "the image shows {list}",
    "{list} on a {ground} ground",
    "here {be} {list}",
    "we see {list}",
    "a {ground} ground with {list}",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expression:
    """A phrase that fits exactly one object of its scene."""

    text: str
    form: Literal["kind", "color", "object", "size", "relation"]
    target: SceneObject


def joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def captions(scene: Scene, generator: np.random.Generator, count: int) -> list[str]:
    """`count` different captions. Each names every object with its colour; some add sizes, the ground or a relation."""
    found: list[str] = []
    for _ in range(20 * count):
        text = _caption(scene, generator)
        if text not in found:
            found.append(text)
        if len(found) == count:
            break
    return found


def _caption(scene: Scene, generator: np.random.Generator) -> str:
    style = generator.random()
    if style < 0.4:
        related = _related_pair(scene, generator)
        if related is not None:
            return _relation_caption(scene, *related)
    ordered = sorted(scene.objects, key=lambda item: item.center)
    parts = list_objects(ordered, with_size=style > 0.85)
    pattern = _LIST_PATTERNS[int(generator.integers(len(_LIST_PATTERNS)))]
    be = "is" if parts[0].startswith(("a ", "an ")) else "are"
    return sentence(pattern.format(list=joined(parts), be=be, ground=scene.ground.adjective))


def list_objects(objects: list[SceneObject], with_size: bool = False) -> list[str]:
    """`["two red stars", "a blue cup"]`: equal ones counted together, in the order of their first."""
    groups: dict[tuple[str, str], int] = {}
    for item in objects:
        color = f"{item.size} {item.color}" if with_size else item.color
        groups[(color, item.kind)] = groups.get((color, item.kind), 0) + 1
    return [
        with_article(f"{color} {kind}") if n == 1 else f"{number_word(n)} {color} {plural(kind)}"
        for (color, kind), n in groups.items()
    ]


def _related_pair(scene: Scene, generator: np.random.Generator) -> tuple[SceneObject, Relation, SceneObject] | None:
    """Two objects of different name, the relation between them clear."""
    pairs = [
        (first, relation, second)
        for first in scene.objects
        for second in scene.objects
        for relation in RELATIONS
        if (first.color, first.kind) != (second.color, second.kind) and scene.holds(first, relation, second)
    ]
    return pairs[int(generator.integers(len(pairs)))] if pairs else None


def _relation_caption(scene: Scene, first: SceneObject, relation: Relation, second: SceneObject) -> str:
    text = f"{with_article(f'{first.color} {first.kind}')} {relation} {with_article(f'{second.color} {second.kind}')}"
    rest = [item for item in scene.objects if item is not first and item is not second]
    if rest:
        text += f", with {joined(list_objects(sorted(rest, key=lambda item: item.center)))}"
    return sentence(text)


def expressions(scene: Scene) -> list[Expression]:
    """Every referring expression of our few forms that is unambiguous in this scene."""
    found: list[Expression] = []
    for item in scene.objects:
        alike = scene.find(kind=item.kind)
        if len(alike) == 1:
            found.append(Expression(text=f"the {item.kind}", form="kind", target=item))
        if len(scene.find(kind=item.kind, color=item.color)) == 1:
            found.append(Expression(text=f"the {item.color} {item.kind}", form="color", target=item))
        if len(scene.find(color=item.color)) == 1:
            found.append(Expression(text=f"the {item.color} object", form="object", target=item))
        if len(alike) > 1 and len(scene.find(kind=item.kind, size=item.size)) == 1:
            found.append(Expression(text=f"the {item.size} {item.kind}", form="size", target=item))
        for phrase in _relative_phrases(scene, item):
            found.append(Expression(text=f"the {item.kind} {phrase}", form="relation", target=item))
    return found


def sample_expressions(scene: Scene, generator: np.random.Generator, count: int) -> list[Expression]:
    """Up to `count` expressions, of different forms as far as there are any (most possible ones are relations)."""
    possible = expressions(scene)
    shuffled = [possible[index] for index in generator.permutation(len(possible))]
    forms = list(dict.fromkeys(expression.form for expression in shuffled))
    forms = [forms[index] for index in generator.permutation(len(forms))]
    first = [next(e for e in shuffled if e.form == form) for form in forms]
    return (first + [e for e in shuffled if e not in first])[:count]


def _relative_phrases(scene: Scene, item: SceneObject) -> list[str]:
    """`left of the anchor`, where one object of the kind is surely there and every other of it is surely not."""
    phrases = []
    for landmark in scene.objects:
        if landmark.kind == item.kind or len(scene.find(kind=landmark.kind)) != 1:
            continue
        for relation in RELATIONS:
            verdicts = [scene.holds(other, relation, landmark) for other in scene.find(kind=item.kind)]
            if scene.holds(item, relation, landmark) and None not in verdicts and sum(map(bool, verdicts)) == 1:
                phrases.append(f"{relation} the {landmark.kind}")
    return phrases


def dialogue(scene: Scene, generator: np.random.Generator) -> list[tuple[str, str]]:
    """Two or three turns in full sentences, worded unlike the VQA questions."""
    openers = ("What do you see?", "Tell me about this picture.", "What is in the picture?")
    ordered = sorted(scene.objects, key=lambda item: item.center)
    turns = [(_pick(openers, generator), f"I see {joined(list_objects(ordered))}.")]
    unique = [item for item in scene.objects if len(scene.find(kind=item.kind)) == 1]
    if unique:
        item = unique[int(generator.integers(len(unique)))]
        turns.append((f"Tell me about the {item.kind}.", f"It is {item.size} and {item.color}."))
    if len(unique) > 1:
        order = generator.permutation(len(unique))
        first, second = unique[order[0]], unique[order[1]]
        answer = f"The {first.kind} is {first.color} and the {second.kind} is {second.color}."
        for relation in RELATIONS:
            if scene.holds(first, relation, second):
                answer += f" The {first.kind} is {relation} the {second.kind}."
                break
        turns.append((f"Compare the {first.kind} with the {second.kind}.", answer))
    return turns


def _pick(options: tuple[str, ...], generator: np.random.Generator) -> str:
    return options[int(generator.integers(len(options)))]
