import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from lyrics.refiner.detection import Detections
from lyrics.refiner.merge import merge

SIZE = (100, 60)


def detections(boxes, scores, tags=None):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return Detections(
        boxes_xyxy=boxes,
        tag_index=np.arange(len(boxes)) if tags is None else np.asarray(tags),
        score=np.asarray(scores, np.float32),
        features=boxes * 2,
    )


def merged(found, nms_iou=0.6, max_objects=10, score_threshold=0.25):
    return merge(found, SIZE, score_threshold=score_threshold, nms_iou=nms_iou, max_objects=max_objects)


def test_one_thing_under_two_names_is_one_object():
    found = detections([[0, 0, 20, 20], [1, 0, 21, 20], [50, 0, 70, 20]], [0.5, 0.8, 0.3], tags=[0, 1, 0])
    kept = merged(found)
    assert kept.tag_index.tolist() == [1, 0] and kept.score.tolist() == np.float32([0.8, 0.3]).tolist()
    np.testing.assert_array_equal(kept.features, found.features[[1, 2]])
    assert len(merged(found, nms_iou=None)) == 3


def test_boxes_are_clipped_and_useless_ones_go():
    boxes = [
        [-5, -5, 200, 30],
        [90, 50, 130, 90],
        [120, 0, 130, 20],
        [5, 5, 5.5, 40],
        [np.nan, 0, 9, 9],
        [0, 40, 9, 50],
    ]
    kept = merged(detections(boxes, [0.9, 0.8, 0.7, 0.6, 0.5, 0.1]))
    assert kept.boxes_xyxy.tolist() == [[0, 0, 100, 30], [90, 50, 100, 60]]


def test_equal_scores_put_the_larger_first_whatever_the_order_given():
    boxes = [[0, 0, 10, 10], [50, 0, 90, 40], [30, 0, 40, 10]]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        kept = merged(detections([boxes[i] for i in order], [1, 1, 1]))
        assert kept.boxes_xyxy.tolist() == [boxes[1], boxes[0], boxes[2]]


def test_no_detections():
    assert len(merged(detections([], []))) == 0


def slowly_merged(found, size, score_threshold, nms_iou, max_objects):
    """Boxes and tags that stay, one at a time, by the words of `merge`."""
    width, height = size
    rows = []
    for box, tag, score in zip(found.boxes_xyxy.tolist(), found.tag_index.tolist(), found.score.tolist(), strict=True):
        x0, x1 = (min(max(v, 0.0), width) for v in box[::2])
        y0, y1 = (min(max(v, 0.0), height) for v in box[1::2])
        if score >= np.float32(score_threshold) and x1 - x0 >= 1 and y1 - y0 >= 1:
            rows.append((-score, -(x1 - x0) * (y1 - y0), x0, y0, x1, y1, tag))
    kept = []
    for row in sorted(rows):
        _, area, x0, y0, x1, y1, _ = row
        for _, other, a0, b0, a1, b1, _ in kept:
            shared = max(0.0, min(x1, a1) - max(x0, a0)) * max(0.0, min(y1, b1) - max(y0, b0))
            if shared / (-area - other - shared) > nms_iou:
                break
        else:
            kept.append(row)
    return [(row[2:6], row[6]) for row in kept[:max_objects]]


@given(st.integers(0, 2**32 - 1), st.sampled_from([(640, 20), (20, 640), (4000, 3000), (1, 1), (99, 101)]))
@settings(max_examples=25, deadline=None)
def test_hundreds_of_objects_of_many_tags_in_pictures_of_any_shape(seed, size):
    """Tiny, huge and outlying boxes, in whole pixels; no overlap of such boxes lies at the threshold."""
    nms_iou = 0.6123456
    draw = np.random.default_rng(seed)
    count = int(draw.integers(0, 400))
    corners = draw.integers(-10, np.array([*size]) + 10, (count, 2))
    sides = (2 ** draw.uniform(-1, np.log2(max(size)) + 1, (count, 2))).astype(int)
    found = detections(
        np.concatenate([corners, corners + sides], 1), draw.integers(0, 10, count) / 10, draw.integers(0, 50, count)
    )
    kept = merge(found, size, score_threshold=0.25, nms_iou=nms_iou, max_objects=100)
    expected = slowly_merged(found, size, 0.25, nms_iou, 100)
    assert list(zip(map(tuple, kept.boxes_xyxy.tolist()), kept.tag_index.tolist(), strict=True)) == expected


@given(st.lists(st.tuples(*[st.integers(0, 60)] * 4, st.integers(0, 10)), max_size=12), st.integers(1, 6), st.randoms())
def test_what_is_kept(rows, max_objects, random):
    rows = [(min(a, c), min(b, d), max(a, c), max(b, d), s / 10) for a, b, c, d, s in rows]
    found = detections([r[:4] for r in rows], [r[4] for r in rows], tags=[0] * len(rows))
    kept = merged(found, max_objects=max_objects)
    assert len(kept) <= max_objects and (np.diff(kept.score) <= 0).all() and (kept.score >= 0.25).all()
    if len(kept) > 1:
        overlaps = box_iou(*[torch.from_numpy(kept.boxes_xyxy)] * 2).fill_diagonal_(0)
        assert overlaps.max() <= 0.6
    random.shuffle(rows)
    again = merged(
        detections([r[:4] for r in rows], [r[4] for r in rows], tags=[0] * len(rows)), max_objects=max_objects
    )
    np.testing.assert_array_equal(again.boxes_xyxy, kept.boxes_xyxy)
