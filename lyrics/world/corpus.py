"""Text of the foundation split: what a small language model must know before it is shown pictures.

Documents have the shape of the instruction prompt, so that looking up a word of the context is learned as text:
`umbrella blue 12 45 78 91; cup red 3 4 20 30; question: What color is the cup? answer: red`
(`answer:` only marks the place: the language model reads the answer right after the question).
What is asked can always be found in the document.
"""

import numpy as np

from lyrics.data import pope
from lyrics.world import language
from lyrics.world.questions import questions
from lyrics.world.scenes import Scene, SceneObject
from lyrics.world.vocabulary import KINDS

_GRID_MAX = 99
_LOOK_UP_SHARE = 0.8
_QUESTIONS = 10
_LOOK_UPS = 8
_EXPRESSIONS = 3
_PRESENT = 2


def documents(scene: Scene, generator: np.random.Generator, count: int) -> list[str]:
    """`count` documents about one scene: captions, captions to write, boxes to find, questions."""
    return [_document(scene, generator) for _ in range(count)]


def _document(scene: Scene, generator: np.random.Generator) -> str:
    spatial = spatial_text(scene, generator)
    if generator.random() < _LOOK_UP_SHARE:
        return _look_ups(scene, spatial, generator)
    form = generator.random()
    if form < 0.08:
        return language.captions(scene, generator, 1)[0]
    if form < 0.2:
        return _prompt(spatial, "Describe the image.", language.captions(scene, generator, 1)[0])
    if form < 0.4:
        return _referring(scene, spatial, generator)
    if form < 0.46:
        turns = language.dialogue(scene, generator)
        asked, answer = turns[int(generator.integers(len(turns)))]
        return _prompt(f"{spatial} {_everything(scene, generator, with_size=True)}", asked, answer)
    question = questions(scene, generator, 1)[0]
    if generator.random() < 0.3:
        spatial = f"{spatial} {_everything(scene, generator, with_size=question.kind == 'size')}"
    return _prompt(spatial, question.text, question.answer)


def _look_ups(scene: Scene, spatial: str, generator: np.random.Generator) -> str:
    """Several different questions about one scene, each answered by its spatial text.

    A small model learns to look up from many look-ups, and a document with one question holds few. None comes twice,
    or its answer would be copied from the first time.
    """
    asked = [("How many objects are there?", str(len(scene.objects)))]
    asked += [(q.text, q.answer) for q in questions(scene, generator, _QUESTIONS)]
    for item in scene.objects:
        if len(scene.find(kind=item.kind)) == 1:
            box = grid_box(item, scene.image_size_px)
            asked += [(f"Where is the {item.kind}?", box), (f"Where is the {item.color} {item.kind}?", box)]
    asked += _colours(scene)
    where = _where(scene)
    asked += [where[index] for index in generator.permutation(len(where))[:_EXPRESSIONS]]
    different = list(dict(asked + _presence(scene, generator)).items())
    chosen = [different[index] for index in generator.permutation(len(different))[:_LOOK_UPS]]
    return spatial + "".join(f" question: {q} answer: {a}" for q, a in chosen)


def _presence(scene: Scene, generator: np.random.Generator) -> list[tuple[str, str]]:
    """Whether kinds are in the image: as many that are as that are not."""
    present = sorted(scene.kinds)
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    count = min(_PRESENT, len(present))
    asked = [(present, "yes"), (absent, "no")]
    return [
        (pope.question(kinds[index]), answer)
        for kinds, answer in asked
        for index in generator.permutation(len(kinds))[:count]
    ]


def _colours(scene: Scene) -> list[tuple[str, str]]:
    """What colours tell that stand beside their kinds."""
    asked = [(f"What color is the {i.kind}?", i.color) for i in scene.objects if len(scene.find(kind=i.kind)) == 1]
    asked += [(f"What is the {i.color} object?", i.kind) for i in scene.objects if len(scene.find(color=i.color)) == 1]
    return asked


def _where(scene: Scene) -> list[tuple[str, str]]:
    """Referring expressions of every form, and the box of what they mean."""
    found = language.expressions(scene)
    return [(f"Where is {e.text}?", grid_box(e.target, scene.image_size_px)) for e in found]


def _referring(scene: Scene, spatial: str, generator: np.random.Generator) -> str:
    options = _where(scene)
    if not options:
        return _prompt(spatial, "Describe the image.", language.captions(scene, generator, 1)[0])
    return _prompt(spatial, *options[int(generator.integers(len(options)))])


def _prompt(context: str, question: str, answer: str) -> str:
    return f"{context} question: {question} answer: {answer}"


def _everything(scene: Scene, generator: np.random.Generator, with_size: bool = False) -> str:
    """A sentence that names every object with its colour, in random order."""
    order = [scene.objects[index] for index in generator.permutation(len(scene.objects))]
    return language.sentence(language.joined(language.list_objects(order, with_size=with_size)))


def spatial_text(scene: Scene, generator: np.random.Generator) -> str:
    """All objects with colours and boxes, in random order as scores would order them.

    The colour stands where the picture's token of the object will (`LyricsModel.shown`): what a token can tell is
    thus learned as a word first.
    """
    order = [scene.objects[index] for index in generator.permutation(len(scene.objects))]
    return " ".join(f"{item.kind} {item.color} {grid_box(item, scene.image_size_px)};" for item in order)


def grid_box(item: SceneObject, image_size_px: int) -> str:
    """Corners in 1/99 of the image, nearest step."""
    return " ".join(str(round(_GRID_MAX * value / image_size_px)) for value in item.box_xyxy)
