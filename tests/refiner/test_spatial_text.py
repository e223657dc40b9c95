import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyrics.refiner.spatial_text import clean_tag, format_box, format_objects, object_pieces, parse_box, parse_objects

FORMATS = ("grid100", "decimal3")
STEP = {"grid100": 1 / 100, "decimal3": 1 / 1000}
fraction = st.floats(0.0, 1.0)
boxes = st.tuples(fraction, fraction, fraction, fraction).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3]))
)
tags = st.one_of(st.text(max_size=20), st.sampled_from(["traffic light", "no 5", "7 8 9 10", "a: [0.1, 0.2]; b", ""]))


def test_the_written_forms():
    objects = ["umbrella", "star"], [(0.123, 0.45, 0.781, 0.91), (0, 0, 0.2, 1)]
    assert format_objects(*objects, "grid100") == "umbrella 12 45 78 91; star 0 0 20 99;"
    assert (
        format_objects(*objects, "decimal3")
        == "umbrella: [0.123, 0.450, 0.781, 0.910]; star: [0.000, 0.000, 0.200, 1.000];"
    )
    assert format_objects([], [], "grid100") == ""


@pytest.mark.parametrize("coordinate_format", FORMATS)
@given(objects=st.lists(st.tuples(tags, boxes), max_size=12))
def test_parsing_inverts_writing_up_to_rounding(coordinate_format, objects):
    names, corners = [o[0] for o in objects], [o[1] for o in objects]
    text = format_objects(names, corners, coordinate_format)
    parsed = parse_objects(text, coordinate_format)
    assert [tag for tag, _ in parsed] == [clean_tag(name) for name in names]
    for (_, got), want in zip(parsed, corners, strict=True):
        assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= STEP[coordinate_format] / 2 + 2e-6
        assert parse_box(format_box(want, coordinate_format), coordinate_format) == got
    assert format_objects([t for t, _ in parsed], [b for _, b in parsed], coordinate_format) == text


@pytest.mark.parametrize("coordinate_format", FORMATS)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 300),
    size=st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
)
@settings(max_examples=20, deadline=None)
def test_hundreds_of_boxes_of_a_picture_of_any_shape_come_back_in_order(coordinate_format, seed, count, size):
    """As the refiner writes them: pixels of the picture, from a pixel to all of it."""
    draw = np.random.default_rng(seed)
    extent = np.array([*size, *size], np.float64)
    ends = np.sort(draw.uniform(0, 1, (count, 2, 2)) ** draw.choice([0.1, 1, 10], (count, 1, 1)), axis=1)
    boxes = (ends.reshape(count, 4) * extent).astype(np.float32)
    boxes[::7] = extent  # the last corner, and
    boxes[::11] = (0, 0, *size)  # the whole picture
    tags = [f"thing {n % 40}" if n % 3 else f"{n}" for n in range(count)]
    parsed = parse_objects(format_objects(tags, boxes / extent, coordinate_format), coordinate_format)
    assert [tag for tag, _ in parsed] == tags
    if count:
        assert np.abs(np.array([box for _, box in parsed]) - boxes / extent).max() <= STEP[coordinate_format] / 2 + 2e-6


@pytest.mark.parametrize("coordinate_format", FORMATS)
@given(text=st.text(alphabet="ab 0123456789.,;:[]-\n", max_size=60))
def test_junk_is_never_raised(coordinate_format, text):
    box = parse_box(text, coordinate_format)
    for found in [box] if box else []:
        assert 0 <= found[0] <= found[2] <= 1 and 0 <= found[1] <= found[3] <= 1
    parse_objects(text, coordinate_format)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is at 10 20 30 40.", (10, 20, 30, 40)),
        ("10, 20, 30, 40", (10, 20, 30, 40)),
        ("10 20 30 40 50 60", (10, 20, 30, 40)),
        ("100 20 30 40; star 1 2 3 4", (1, 2, 3, 4)),
        ("30 20 10 40", None),
        ("10 20 30", None),
        ("-10 20 30 40", None),
        ("0.1 0.2 0.3 0.4", None),
        ("", None),
    ],
)
def test_boxes_in_generated_text(text, expected):
    box = parse_box(text, "grid100")
    assert (box and tuple(int(value * 100) for value in box)) == expected


def test_decimals_with_spaces_and_objects_cut_short():
    assert parse_box("[ 0. 100, 0. 200, 0. 300, 1. 000 ]", "decimal3") == (0.1, 0.2, 0.3, 1.0)
    assert parse_box("[0.1, 0.2, 0.3, 1.5]", "decimal3") is None
    assert parse_objects("star: [0.1, 0.2, 0.3, 0.4]; moon: [0.1, 0.", "decimal3") == [("star", (0.1, 0.2, 0.3, 0.4))]
    assert [tag for tag, _ in parse_objects("star 1 2 3 4; moon 5 6", "grid100")] == ["star"]


def test_pieces_say_where_each_object_ends():
    assert object_pieces(["a; b"], [(0, 0, 1, 1)], "grid100") == [("a b", "0 0 99 99")]
