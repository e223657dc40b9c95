"""Three baselines that say what a score is worth.

- most_frequent: the training split's most frequent answer of the same kind; what the question alone gives.
- other_image: the same model given another image's features and spatial text; what the model guesses.
- other_features: its own spatial text, another image's features; what the text of the refiner alone gives.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lyrics import seeding
from lyrics.data.records import Sample
from lyrics.evaluate.metrics import IOU_THRESHOLD, Box, pairwise_iou
from lyrics.refiner.features import RefinedImage
from lyrics.refiner.spatial_text import CoordinateFormat, format_box

_BOXES = 2000
_CAPTIONS = 4000


def other_images(image_ids: Iterable[str], *keys: object) -> dict[str, str] | None:
    """For each image another one: a derangement (one cycle) drawn by `keys`; None for fewer than two images."""
    names = sorted(set(image_ids))
    if len(names) < 2:
        return None
    cycle = [names[place] for place in seeding.rng("other_images", *keys).permutation(len(names))]
    return dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))


class MostFrequent:
    """The constant answer of each (task, kind), fitted on a training split.

    A kind that training lacks takes the constant of its whole task, and POPE without training samples that of the
    yes/no questions. For captions it is the commonest one, or the one nearest to all where none repeats; for boxes,
    the training box that overlaps (IoU > 0.5) most training boxes.
    """

    def __init__(
        self, samples: Iterable[Sample], images: Mapping[str, RefinedImage], coordinate_format: CoordinateFormat
    ) -> None:
        groups: dict[tuple[str, str | None], list[Sample]] = collections.defaultdict(list)
        for sample in samples:
            groups[sample.task, sample.kind].append(sample)
            groups[sample.task, None].append(sample)
        self._answers: dict[tuple[str, str | None], str] = {}
        for (task, kind), group in groups.items():
            if task == "caption":
                self._answers[task, kind] = consensus_caption([text for s in group for text in s.references])
            elif task == "refer":
                boxes = [_fractions(s.box_xyxy, images[s.image_id]) for s in group if s.box_xyxy]
                self._answers[task, kind] = format_box(commonest_box(boxes), coordinate_format)
            elif task in ("vqa", "pope"):
                self._answers[task, kind] = most_common([most_common(s.references) for s in group])
        yes_or_no = [
            text for s in groups.get(("vqa", None), []) if (text := most_common(s.references).lower()) in ("yes", "no")
        ]
        if ("pope", None) not in self._answers and yes_or_no:
            self._answers["pope", None] = most_common(yes_or_no)

    def answer(self, sample: Sample) -> str | None:
        """None where training has no sample of the task."""
        return self._answers.get((sample.task, sample.kind), self._answers.get((sample.task, None)))


def most_common(texts: Sequence[str]) -> str:
    """The most frequent text; of equally frequent ones the first in the alphabet."""
    counts = collections.Counter(texts)
    return min(counts, key=lambda text: (-counts[text], text))


def consensus_caption(captions: Sequence[str]) -> str:
    """The most frequent caption; where all differ, the one most like the mean of all (cosine of word counts)."""
    commonest = most_common(captions)
    if captions.count(commonest) > 1:
        return commonest
    distinct = sorted(set(captions))[:_CAPTIONS]
    bags = [collections.Counter(text.lower().replace(".", " ").replace(",", " ").split()) for text in distinct]
    words = {word: column for column, word in enumerate(sorted(set().union(*bags)))}
    counts = np.zeros((len(bags), len(words)), np.float32)
    for row, bag in zip(counts, bags, strict=True):
        for word, count in bag.items():
            row[words[word]] = count
    unit = counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)
    return distinct[int(np.argmax(unit @ unit.mean(axis=0)))]


def commonest_box(boxes: Sequence[Box]) -> Box:
    """Of at most 2,000 boxes, evenly taken, the one that overlaps most of them; ties go to the mean IoU."""
    step = -(-len(boxes) // _BOXES)
    boxes_N4 = np.asarray(boxes[::step], dtype=float)
    overlap_NN = pairwise_iou(boxes_N4, boxes_N4)
    value_N = (overlap_NN > IOU_THRESHOLD).sum(axis=1) + overlap_NN.mean(axis=1) / 2
    x1, y1, x2, y2 = boxes_N4[int(np.argmax(value_N))].tolist()
    return x1, y1, x2, y2


def _fractions(box: Box, image: RefinedImage) -> Box:
    return box[0] / image.width, box[1] / image.height, box[2] / image.width, box[3] / image.height
