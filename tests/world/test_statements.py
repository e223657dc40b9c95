"""What the published files say is checked against the published pictures and boxes, not against the scene graph."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from lyrics import seeding
from lyrics.world import language, scenes, vocabulary
from lyrics.world.vocabulary import COLORS

MARGIN = 12.8
PAIR = re.compile(r"\b(?:(two|three|four|five|six|an?) )?(?:(?:small|large) )?\b(" + "|".join(COLORS) + r") ([a-z]+)")
NUMBER = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


def seen_objects(folder):
    """image id → [(kind, colour, centre, longer side)], the colour measured in the JPEG under the mask."""
    document = json.loads((folder / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    files = {image["id"]: image["file_name"] for image in document["images"]}
    pixels = {key: np.asarray(Image.open(folder / "images" / name)).astype(float) for key, name in files.items()}
    palette = np.array(list(COLORS.values()), dtype=float)
    found = {key: [] for key in files}
    for annotation in document["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        nearest = np.abs(pixels[annotation["image_id"]][mask][:, None] - palette).sum(2)
        votes = Counter(nearest.argmin(1)[nearest.min(1) < 80].tolist())
        x, y, w, h = annotation["bbox"]
        color = list(COLORS)[votes.most_common(1)[0][0]]
        found[annotation["image_id"]].append(
            (names[annotation["category_id"]], color, (x + w / 2, y + h / 2), (x, y, x + w, y + h), max(w, h))
        )
    return found


def singular(noun):
    return noun if noun in vocabulary.KINDS else noun.removesuffix("s")


def one(objects, kind):
    alike = [item for item in objects if item[0] == kind]
    assert len(alike) == 1, f"{kind} is not unique"
    return alike[0]


def side_of(first, relation, second):
    axis = relation in ("above", "below")
    difference = first[2][axis] - second[2][axis]
    if abs(difference) < MARGIN:
        return None
    return (difference < 0) == (relation in ("left of", "above"))


def answer(question, objects):
    """The answer worked out from boxes and pixels."""
    if m := re.fullmatch(r"What color is the (\w+)\?", question):
        return one(objects, m[1])[1]
    if m := re.fullmatch(r"(?:What size is the (\w+)|Is the (\w+) small or large)\?", question):
        return "small" if one(objects, m[1] or m[2])[4] <= 33 else "large"
    if m := re.fullmatch(r"What is the (\w+) object\?", question):
        (item,) = [item for item in objects if item[1] == m[1]]
        return item[0]
    if question == "How many objects are there?":
        return str(len(objects))
    if m := re.fullmatch(r"How many (\w+) objects are there\?", question):
        return str(sum(item[1] == m[1] for item in objects))
    if m := re.fullmatch(r"How many (\w+) are there\?", question):
        return str(sum(item[0] == singular(m[1]) for item in objects))
    if m := re.fullmatch(r"Is there an? (?:(\w+) )?(\w+?)(?: in the image)?\?", question):
        return "yes" if any(item[0] == m[2] and m[1] in (None, item[1]) for item in objects) else "no"
    if m := re.fullmatch(r"Which side is the (\w+) on\?", question):
        return "left" if one(objects, m[1])[2][0] < 64 else "right"
    if m := re.fullmatch(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?", question):
        return {True: "yes", False: "no"}[side_of(one(objects, m[1]), m[2], one(objects, m[3]))]
    if m := re.fullmatch(r"What is (left of|right of|above|below) the (\w+)\?", question):
        landmark = one(objects, m[2])
        verdicts = [(item[0], side_of(item, m[1], landmark)) for item in objects if item is not landmark]
        assert None not in [verdict for _, verdict in verdicts]
        (kind,) = [kind for kind, verdict in verdicts if verdict]
        return kind
    raise AssertionError(f"no rule for: {question}")


@pytest.mark.parametrize("split", ["instruct", "test", "test_ood"])
def test_every_answer_follows_from_picture_and_boxes(raw, split):
    objects = seen_objects(raw / split)
    questions = json.loads((raw / split / "vqa_questions.json").read_text())["questions"]
    annotations = json.loads((raw / split / "vqa_annotations.json").read_text())["annotations"]
    kinds = Counter()
    for question, annotation in zip(questions, annotations, strict=True):
        assert question["question_id"] == annotation["question_id"]
        expected = answer(question["question"], objects[question["image_id"]])
        assert [a["answer"] for a in annotation["answers"]] == [expected] * 10, question
        kinds[annotation["question_type"]] += 1
    assert set(kinds) == {"colour", "count", "exists", "position", "kind", "relation", "size"}


@pytest.mark.parametrize("split", ["instruct", "test_ood"])
def test_captions_name_every_object_with_its_colour_and_nothing_else(raw, split):
    objects = seen_objects(raw / split)
    per_image = Counter()
    for record in json.loads((raw / split / "captions.json").read_text())["annotations"]:
        said = Counter()
        for number, color, noun in PAIR.findall(record["caption"].lower()):
            said[color, singular(noun)] += NUMBER[number]
        assert said == Counter((color, kind) for kind, color, *_ in objects[record["image_id"]]), record["caption"]
        per_image[record["image_id"]] += 1
    assert set(per_image) == set(objects)
    assert {3 <= n <= 5 for n in per_image.values()} == {True}


def test_each_referring_expression_fits_one_object_and_has_its_box(raw):
    for split in ("instruct", "test_ood"):
        objects = seen_objects(raw / split)
        for line in (raw / split / "refcoco.jsonl").read_text().splitlines():
            record = json.loads(line)
            candidates = objects[record["image_id"]]
            words = record["expression"].removeprefix("the ")
            if m := re.fullmatch(r"(\w+) (left of|right of|above|below) the (\w+)", words):
                landmark = one(candidates, m[3])
                fits = [item for item in candidates if item[0] == m[1] and side_of(item, m[2], landmark) is not False]
            else:
                first, _, last = words.rpartition(" ")
                fits = [item for item in candidates if last in (item[0], "object")]
                if first in ("small", "large"):
                    fits = [item for item in fits if (item[4] <= 33) == (first == "small")]
                elif first:
                    fits = [item for item in fits if item[1] == first]
            assert len(fits) == 1, record
            assert tuple(record["bbox"]) == fits[0][3]


def test_pope_is_balanced_true_and_ranks_its_negatives(raw):
    objects = seen_objects(raw / "test")
    files = {
        image["file_name"]: image["id"] for image in json.loads((raw / "test" / "captions.json").read_text())["images"]
    }
    lines = [json.loads(line) for line in (raw / "test" / "pope.json").read_text().splitlines()]
    frequency = Counter(kind for items in objects.values() for kind in {item[0] for item in items})
    mean = {}
    for category in ("random", "popular", "adversarial"):
        chosen = [line for line in lines if line["category"] == category]
        assert Counter(line["label"] for line in chosen)["yes"] * 2 == len(chosen) > 0
        asked = []
        for line in chosen:
            kind = re.fullmatch(r"Is there an? (\w+) in the image\?", line["text"])[1]
            present = {item[0] for item in objects[files[line["image"]]]}
            assert (kind in present) == (line["label"] == "yes")
            if line["label"] == "no":
                asked.append(frequency[kind])
        mean[category] = np.mean(asked)
    assert mean["popular"] > mean["random"]


def test_yes_and_no_are_even_and_no_pair_of_colour_and_kind_gives_the_answer_away(make_world):
    """Questions of training splits never ask about a held-out pair, those of test_ood about no other."""
    from lyrics.world.questions import MAKERS

    answers = Counter()
    for split in ("instruct", "test_ood"):
        for seed in range(400):
            generator = seeding.rng(split, seed)
            scene = scenes.sample_scene(generator, split)
            text, reply = MAKERS["exists"](scene, generator)
            answers[reply] += 1
            if (m := re.match(r"Is there an? (\w+) (\w+)[ ?]", text)) and m[1] in COLORS:
                assert ((m[1], m[2]) in vocabulary.HELD_OUT) == (split == "test_ood"), text
    assert 0.45 < answers["yes"] / 800 < 0.55


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_dialogues_alternate_and_speak_of_what_is_there(seed):
    generator = seeding.rng("dialogue", seed)
    scene = scenes.sample_scene(generator, "instruct")
    for question, reply in language.dialogue(scene, generator):
        assert question.endswith(("?", "."))
        for color, noun in re.findall(r"\b(" + "|".join(COLORS) + r") ([a-z]+)", reply):
            if singular(noun) in vocabulary.KINDS:
                assert scene.find(kind=singular(noun), color=color)
