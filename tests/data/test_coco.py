import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from lyrics.data import coco

finite = st.floats(-100, 200, allow_nan=False)


@given(x=finite, y=finite, w=finite, h=finite)
def test_a_clipped_box_lies_inside_and_within_the_original(x, y, w, h):
    try:
        x0, y0, x1, y1 = coco.clip_box([x, y, w, h], 40, 30)
    except ValueError as error:
        outside = x + w <= x or y + h <= y or x >= 40 or y >= 30 or x + w <= 0 or y + h <= 0
        assert outside, error
        return
    assert 0 <= x0 < x1 <= 40
    assert 0 <= y0 < y1 <= 30
    assert x0 >= x
    assert x1 <= x + w
    assert y0 >= y
    assert y1 <= y + h


@pytest.mark.parametrize(
    "bbox", [None, [1, 2, 3], [1, 2, float("nan"), 4], [1, 2, float("inf"), 4], ["1", 2, 3, 4], {}]
)
def test_what_is_no_box_is_refused(bbox):
    with pytest.raises(ValueError, match="bad box: expected 4 finite numbers"):
        coco.clip_box(bbox, 40, 30)


def a_mask() -> np.ndarray:
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[5:15, 8:20] = 1
    return mask


def test_polygons_lists_and_strings_give_the_same_mask():
    encoded = coco_mask.encode(np.asfortranarray(a_mask()))
    flat = a_mask().flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    forms = [
        [[8, 5, 20, 5, 20, 15, 8, 15]],
        {"size": [30, 40], "counts": runs},
        {"size": [30, 40], "counts": encoded["counts"].decode()},
    ]
    for segmentation in forms:
        rle = coco.to_rle(segmentation, 40, 30)
        assert isinstance(rle["counts"], str)
        assert np.array_equal(coco_mask.decode(rle), a_mask())
    assert coco.to_rle(None, 40, 30) is None
    assert coco.to_rle([], 40, 30) is None


@given(mask=st.binary(min_size=60, max_size=60))
def test_run_length_strings_of_any_mask_are_accepted(mask):
    pixels = (np.frombuffer(mask, dtype=np.uint8) % 2).reshape(6, 10)
    counts = coco_mask.encode(np.asfortranarray(pixels))["counts"].decode()
    assert np.array_equal(coco_mask.decode(coco.to_rle({"size": [6, 10], "counts": counts}, 10, 6)), pixels)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 2, 3, 4]], "at least three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "at least three points"),
        ([[1, 2, 3, 4, 5, 1e12]], "leaves its 40 x 30 image by far"),
        ([[1, 2, 3, 4, 5, float("nan")]], "leaves its 40 x 30 image by far"),
        ({"size": [40, 30], "counts": "abc"}, "not a segmentation of a 40 x 30 image"),
        ({"size": [30, 40], "counts": [100, 20]}, "do not add up"),
        ({"size": [30, 40], "counts": [1400, -200]}, "do not add up"),
        ({"size": [30, 40], "counts": "PPPP"}, "bad mask"),
        ({"size": [30, 40], "counts": "é"}, "bad mask"),
        ([[0, 0, *[80, 0, -80, 30] * 20]], "more edge than a 40 x 30 image has pixels"),
        ({"size": [30, 40]}, "bad mask"),
        ("polygon", "not a segmentation"),
    ],
)
def test_a_bad_mask_is_refused_with_its_reason(segmentation, reason):
    with pytest.raises(ValueError, match=reason):
        coco.to_rle(segmentation, 40, 30)


def test_published_boxes_of_real_annotations_enclose_their_masks(shared):
    """Polygons and RLE crowds of real photographs."""
    instances = coco.read_instances(shared("photos/train/instances.json"))
    assert instances.rejected == []
    assert len(instances.objects) == 1209
    assert any(item.crowd for item in instances.objects)
    for item in instances.objects:
        x, y, w, h = coco_mask.toBbox({**item.rle, "counts": item.rle["counts"].encode()})
        x0, y0, x1, y1 = item.box_xyxy
        assert x0 - 2 < x
        assert y0 - 2 < y
        assert x + w < x1 + 2
        assert y + h < y1 + 2
        area = item.source["area"]  # of the polygons, which may overlap
        assert abs(int(coco_mask.area({**item.rle, "counts": item.rle["counts"].encode()})) - area) <= 0.2 * area + 60


def test_captions_of_real_photographs(shared):
    captions = coco.read_captions(shared("photos/val/captions.json"))
    assert captions.rejected == []
    assert len(captions.images) == 50
    assert len(captions.texts) == 250


def test_an_endless_run_length_is_refused_at_once():
    """Each character adds to the same number; its product with the next took minutes."""
    with pytest.raises(ValueError, match="endless"):
        coco.to_rle({"size": [30, 40], "counts": "o" * 1_000_000}, 40, 30)
