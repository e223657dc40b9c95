import numpy as np
import torch
from hypothesis import given
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
