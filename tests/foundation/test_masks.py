import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from lyrics.foundation import masks

sides = st.integers(1, 40)


@given(st.integers(0, 2**32 - 1), st.integers(0, 4), sides, sides)
@settings(max_examples=40, deadline=None)
def test_decoding_inverts_encoding(seed, count, height, width):
    drawn = np.random.default_rng(seed).random((count, height, width)) > 0.6
    counts = masks.encode(drawn)
    assert len(counts) == count
    for mask, one in zip(drawn, counts, strict=True):
        np.testing.assert_array_equal(masks.decode(one, height, width), mask)


def test_no_mask_decodes_to_nothing():
    assert masks.decode("", 3, 4).tolist() == [[False] * 4] * 3


@given(st.integers(0, 2**32 - 1), sides, sides, st.integers(1, 90), st.integers(1, 90), st.sampled_from([-1.5, 0, 1.5]))
@settings(max_examples=120, deadline=None)
def test_logits_become_the_masks_that_interpolation_gives(seed, rows, columns, height, width, shift):
    """Also where everything or nothing is inside, and to the same string that COCO itself would write."""
    logits = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed)) + shift
    logits[0, : rows // 2] = -1.0  # an empty half
    whole = F.interpolate(logits[:, None].double(), (height, width), mode="bilinear", align_corners=False)[:, 0]
    certain = whole.abs() > 1e-5  # next to 0 the order of additions decides
    for counts, expected, sure in zip(masks.from_logits(logits, height, width), whole > 0, certain, strict=True):
        found = masks.decode(counts, height, width)
        np.testing.assert_array_equal(found[sure.numpy()], expected[sure].numpy())
        assert counts == masks.encode(found[None])[0]
        assert coco_mask.area({"size": [height, width], "counts": counts}) == found.sum()


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_all_or_nothing(value):
    (counts,) = masks.from_logits(torch.full((1, 4, 4), value), 30, 20)
    assert masks.decode(counts, 30, 20).all() == (value > 0) and masks.decode(counts, 30, 20).any() == (value > 0)
    assert masks.from_logits(torch.zeros(0, 4, 4), 30, 20) == ()


def test_a_small_object_of_a_large_picture_takes_little_memory():
    """Eight thousand pixels squared would be 256 MB as floats."""
    import tracemalloc

    logits = torch.full((10, 256, 256), -1.0)
    logits[:, 100:104, 50:60] = 1.0
    tracemalloc.start()
    counts = masks.from_logits(logits, 8000, 8000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    area = coco_mask.area({"size": [8000, 8000], "counts": counts[0]})
    assert abs(area - 4 * 10 * (8000 / 256) ** 2) < 0.1 * area
