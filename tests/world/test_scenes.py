import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lyrics import seeding
from lyrics.world import scenes, vocabulary

ROOT = Path(__file__).parents[2]
SPLITS = st.sampled_from(["web", "instruct", "test", "test_ood"])


def a_scene(seed: int, split: str) -> scenes.Scene:
    return scenes.sample_scene(seeding.rng("test", seed), split)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), split=SPLITS)
def test_boxes_are_tight_around_visible_pixels_and_masks_do_not_overlap(seed, split):
    scene = a_scene(seed, split)
    masks = scenes.masks(scene)
    assert masks.sum(0).max() <= 1
    for item, mask in zip(scene.objects, masks, strict=True):
        ys, xs = np.nonzero(mask)
        assert item.box_xyxy == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), split=SPLITS)
def test_the_picture_shows_each_object_in_its_colour(seed, split):
    scene = a_scene(seed, split)
    pixels = np.asarray(scenes.render(scene)).astype(int)
    names = list(vocabulary.COLORS)
    palette = np.array(list(vocabulary.COLORS.values()))
    for item, mask in zip(scene.objects, scenes.masks(scene), strict=True):
        distance = np.abs(pixels[mask][:, None] - palette).sum(2)
        votes = np.bincount(distance.argmin(1)[distance.min(1) < 80], minlength=len(names))
        assert votes.sum() > 0.1 * mask.sum()
        assert names[int(votes.argmax())] == item.color


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), split=SPLITS)
def test_only_test_ood_shows_held_out_pairs_more_objects_and_other_grounds(seed, split):
    scene = a_scene(seed, split)
    held_out = {(item.color, item.kind) in vocabulary.HELD_OUT for item in scene.objects}
    if split == "test_ood":
        assert held_out == {True}
        assert scene.ground.texture in vocabulary.GROUNDS_OOD
    else:
        assert held_out == {False}
        assert scene.ground.texture in vocabulary.GROUNDS
        assert 1 <= len(scene.objects) <= 5


def test_each_kind_and_each_colour_is_seen_in_training_and_held_out_in_some_pair():
    for kind in vocabulary.KINDS:
        assert len(vocabulary.colors_of(kind, ood=True)) == 2
        assert len(vocabulary.colors_of(kind, ood=False)) == 6
    assert {color for color, _ in vocabulary.HELD_OUT} == set(vocabulary.COLORS)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), split=SPLITS)
def test_relations_mirror_each_other(seed, split):
    scene = a_scene(seed, split)
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for first, second in itertools.permutations(scene.objects, 2):
        for relation, opposite in mirrored.items():
            assert scene.holds(first, relation, second) == scene.holds(second, opposite, first)
    assert all(scene.holds(item, relation, item) is None for item in scene.objects for relation in mirrored)


def test_every_kind_has_a_glyph_of_its_own():
    """Shapes of two kinds, scaled to one square, differ in at least a tenth of their pixels; none is the empty box."""
    shapes = {
        kind: np.asarray(Image.fromarray(scenes.glyph(kind, 48)).resize((32, 32)), dtype=float) / 255
        for kind in vocabulary.KINDS
    }
    for (first, a), (second, b) in itertools.combinations(shapes.items(), 2):
        assert np.abs(a - b).mean() > 0.1, (first, second)


@pytest.mark.parametrize("kind", vocabulary.KINDS)
def test_a_glyph_has_the_size_it_is_named_for(kind):
    """Measured on its ink, so that `small` and `large` never meet."""
    assert all(abs(max(scenes.glyph(kind, side).shape) - side) <= 3 for side in range(24, 51))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_scenes_scale_with_the_image_size(size):
    scene = scenes.sample_scene(seeding.rng("scaled", size), "web", image_size_px=size)
    assert scenes.render(scene).size == (size, size)
    low, high = vocabulary.SIZES_PX["small"][0], vocabulary.SIZES_PX["large"][1]
    assert all(low * size / 128 - 1 <= item.side_px <= high * size / 128 + 1 for item in scene.objects)


def test_a_scene_depends_on_its_generator_alone():
    assert a_scene(3, "web") == a_scene(3, "web")
    assert a_scene(3, "web") != a_scene(4, "web")


def test_the_demo_writes_a_picture_and_prints_a_question_with_its_answer(tmp_path):
    out = tmp_path / "scene.png"
    command = [sys.executable, "-m", "lyrics.world", str(out), "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    question, _, answer = done.stdout.strip().partition("? ")
    assert question
    assert answer
    assert Image.open(out).size == (128, 128)
