"""Backends that read their answers off the pixels, so that what comes out is known: no weights, no files."""

import numpy as np
import torch

from lyrics.config import Refine
from lyrics.foundation.masks import encode
from lyrics.refiner.detection import Detections
from lyrics.refiner.refiner import Refiner
from lyrics.refiner.segmentation import Segments

TAGS = ("red thing", "green thing", "blue thing")


class FakeTagger:
    vocabulary = TAGS

    def tag(self, images, annotations=None):
        """A tag for each channel that is bright somewhere."""
        return [[tag for tag, channel in zip(TAGS, _channels(image), strict=True) if channel.any()] for image in images]


class FakeDetector:
    width = 3

    def detect(self, images, tags_per_image, annotations=None):
        """One box around each bright channel; the score falls with the channel."""
        found = []
        for image, tags in zip(images, tags_per_image, strict=True):
            boxes = np.array([_box(_channels(image)[TAGS.index(tag)]) for tag in tags], np.float32).reshape(-1, 4)
            found.append(
                Detections(
                    boxes_xyxy=boxes,
                    tag_index=np.arange(len(tags)),
                    score=np.array([0.9 - 0.1 * TAGS.index(tag) for tag in tags], np.float32),
                    features=boxes[:, :3] / 7,
                )
            )
        return found


class FakeSegmenter:
    width = 2

    def segment(self, images, boxes_per_image, annotations=None):
        return [self._segments(image, boxes) for image, boxes in zip(images, boxes_per_image, strict=True)]

    def _segments(self, image, boxes):
        masks = np.zeros((len(boxes), image.height, image.width), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
            mask[y0:y1, x0:x1] = True
        return Segments(masks=encode(masks), features=masks.mean((1, 2))[:, None].repeat(2, 1))


class FakeEncoder:
    """Four tokens: the mean colour of each quarter."""

    patches, width = 4, 3

    def __init__(self):
        self.images = 0

    def to(self, device):
        return self

    def preprocess(self, images):
        squares = [np.asarray(image.resize((16, 16)), np.float32) for image in images]
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)

    def look(self, images, device, batch_size=None):
        return self(self.preprocess(images))

    def __call__(self, pixels_B3HW):
        self.images += len(pixels_B3HW)
        return torch.nn.functional.avg_pool2d(pixels_B3HW, 8).flatten(2).transpose(1, 2) / 255


def fake_refiner(**settings):
    chosen = {"coordinate_format": "grid100", "max_objects": 2, "images_per_shard": 3, "batch_size": 2}
    chosen |= {"features": "cached", "feature_dtype": "fp16", **settings}
    return Refiner(
        tagger=FakeTagger(),
        detector=FakeDetector(),
        segmenter=FakeSegmenter(),
        settings=Refine(**chosen),
        score_threshold=0.25,
        nms_iou=0.6,
    )


def _channels(image):
    return np.moveaxis(np.asarray(image) > 200, -1, 0)


def _box(channel):
    ys, xs = np.flatnonzero(channel.any(1)), np.flatnonzero(channel.any(0))
    return xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
