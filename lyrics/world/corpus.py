"""Text of the foundation split: what a small language model must know before it is shown pictures.

Documents have the shape of the instruction prompt, so that looking up a word of the context is learned as text:
`umbrella 12 45 78 91; cup 3 4 20 30; A red cup and a blue umbrella. question: What color is the cup? answer: red`
(`answer:` only marks the place: the language model reads the answer right after the question).
What is asked can always be found in the document.
"""

import numpy as np

from lyrics.data import pope
from lyrics.world import language
from lyrics.world.questions import Question, questions
from lyrics.world.scenes import Scene, SceneObject
from lyrics.world.vocabulary import COLORS, KINDS

_GRID_MAX = 99
_COLOUR_SHARE = 0.15
_LOOK_UP_SHARE = 0.65
_QUESTIONS = 10
_LOOK_UPS = 8
_EXPRESSIONS = 3


def documents(scene: Scene, generator: np.random.Generator, count: int) -> list[str]:
    """`count` documents about one scene: captions, captions to write, boxes to find, questions."""
    return [_document(scene, generator) for _ in range(count)]


def _document(scene: Scene, generator: np.random.Generator) -> str:
    spatial = spatial_text(scene, generator)
    form = generator.random()
    if form < _COLOUR_SHARE:
        return _colours(scene, spatial, generator)
    if form < _COLOUR_SHARE + _LOOK_UP_SHARE:
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
    if _asks_colour(question) or generator.random() < 0.3:
        spatial = f"{spatial} {_everything(scene, generator, with_size=question.kind == 'size')}"
    return _prompt(spatial, question.text, question.answer)


def _look_ups(scene: Scene, spatial: str, generator: np.random.Generator) -> str:
    """What boxes tell."""
    asked = [("How many objects are there?", str(len(scene.objects)))]
    asked += [(q.text, q.answer) for q in questions(scene, generator, _QUESTIONS) if not _asks_colour(q)]
    for item in scene.objects:
        if len(scene.find(kind=item.kind)) == 1:
            box = grid_box(item, scene.image_size_px)
            asked += [(f"Where is the {item.kind}?", box), (f"Where is the {item.color} {item.kind}?", box)]
    where = _where(scene)
    asked += [where[index] for index in generator.permutation(len(where))[:_EXPRESSIONS]]
    return _several(spatial, asked + _presence(scene, generator), generator)


def _colours(scene: Scene, spatial: str, generator: np.random.Generator) -> str:
    """What pairs (`cup red;` or `red cup;`) tell, placed before the boxes as a picture's tokens are in a prompt."""
    order = [scene.objects[index] for index in generator.permutation(len(scene.objects))]
    kind_first = generator.random() < 0.5
    pairs = " ".join(f"{item.kind} {item.color};" if kind_first else f"{item.color} {item.kind};" for item in order)
    first = order[0].color
    asked = [(f"How many {first} objects are there?", str(len(scene.find(color=first))))]
    asked += [(f"What color is the {i.kind}?", i.color) for i in order if len(scene.find(kind=i.kind)) == 1]
    asked += [(f"What is the {i.color} object?", i.kind) for i in order if len(scene.find(color=i.color)) == 1]
    asked += [(q.text, q.answer) for q in questions(scene, generator, _QUESTIONS) if _asks_colour(q)]
    return _several(f"{pairs} {spatial}", asked, generator)


def _several(context: str, asked: list[tuple[str, str]], generator: np.random.Generator) -> str:
    """Several different questions about one scene, each answered by its context.

    A small model learns to look up from many look-ups, and a document with one question holds few. None comes twice,
    or its answer would be copied from the first time.
    """
    different = list(dict(asked).items())
    chosen = [different[index] for index in generator.permutation(len(different))[:_LOOK_UPS]]
    return context + "".join(f" question: {q} answer: {a}" for q, a in chosen)


def _presence(scene: Scene, generator: np.random.Generator) -> list[tuple[str, str]]:
    """Whether a kind is in the image, once yes and once no."""
    present = sorted(scene.kinds)
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    return [
        (pope.question(kinds[int(generator.integers(len(kinds)))]), answer)
        for kinds, answer in ((present, "yes"), (absent, "no"))
    ]


def _where(scene: Scene) -> list[tuple[str, str]]:
    """Colour does not tell two objects of one kind apart in text, so such expressions are left to pictures."""
    return [
        (f"Where is {expression.text}?", grid_box(expression.target, scene.image_size_px))
        for expression in language.expressions(scene)
        if expression.form in ("kind", "size", "relation")
        or (expression.form == "color" and len(scene.find(kind=expression.target.kind)) == 1)
    ]


def _asks_colour(question: Question) -> bool:
    return question.kind in ("colour", "kind") or bool(set(COLORS) & set(question.text.split()))


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
    """All objects with their boxes, in random order as scores would order them."""
    order = [scene.objects[index] for index in generator.permutation(len(scene.objects))]
    return " ".join(f"{item.kind} {grid_box(item, scene.image_size_px)};" for item in order)


def grid_box(item: SceneObject, image_size_px: int) -> str:
    """Corners in 1/99 of the image, nearest step."""
    return " ".join(str(round(_GRID_MAX * value / image_size_px)) for value in item.box_xyxy)
