"""Visual refiner, first module: picture → tags (paper section 1).

One interface for every tagger: a head on the CLIP tower (`fitted`), the CLIP compared with a vocabulary (`hub`), and
the ground truth (`annotations`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from lyrics.config import TaggerPart
from lyrics.data.records import Annotation
from lyrics.foundation import manifest, tagger

Annotations = Sequence[Sequence[Annotation]]
_PROMPT = "a photo of a {}"


class Tagger(Protocol):
    """`annotations` holds the ground truth of each picture; only the oracle reads it."""

    vocabulary: tuple[str, ...]

    def tag(self, images: Sequence[Image.Image], annotations: Annotations | None = None) -> list[list[str]]: ...


def load_tagger(foundation: Path, config: TaggerPart, device: str | torch.device = "cpu") -> Tagger:
    """The tagger in `foundation / "tagger"`; the threshold comes from `config`.

    Raises:
        InputError: the part, or the CLIP that it stands on, is missing.
    """
    part = foundation / "tagger"
    source = manifest.read(part)["source"]
    vocabulary = tagger.load_vocabulary(part)
    if source == "annotations":
        return AnnotationTagger(vocabulary)
    from lyrics.foundation.clip import load_clip

    clip = load_clip(foundation / "clip", str(device))
    if source == "hub":
        return ZeroShotTagger(clip, vocabulary, config.threshold)
    return HeadTagger(clip, tagger.load_head(part).to(device), vocabulary, config.threshold)


class HeadTagger:
    """Tags whose probability is above the threshold, the most probable first; at least one."""

    def __init__(
        self, clip: "tagger.Clip", head: "tagger.TagHead", vocabulary: tuple[str, ...], threshold: float
    ) -> None:
        self.vocabulary, self._clip, self._head, self._threshold = vocabulary, clip, head.eval(), threshold

    @torch.inference_mode()
    def tag(self, images: Sequence[Image.Image], annotations: Annotations | None = None) -> list[list[str]]:
        if not images:
            return []
        probabilities_BV = self._head(self._clip.patch_features(images)).sigmoid()
        return [above(row, self.vocabulary, self._threshold) for row in probabilities_BV.cpu()]


class ZeroShotTagger:
    """CLIP's softmax over the whole vocabulary; tags whose share is above the threshold, at least one."""

    def __init__(self, clip: "tagger.Clip", vocabulary: tuple[str, ...], threshold: float) -> None:
        self.vocabulary, self._clip, self._threshold = vocabulary, clip, threshold
        self._texts_VE = clip.encode_texts([_PROMPT.format(tag) for tag in vocabulary])

    @torch.inference_mode()
    def tag(self, images: Sequence[Image.Image], annotations: Annotations | None = None) -> list[list[str]]:
        if not images:
            return []
        shares_BV = (self._clip.scale * self._clip.encode_images(images) @ self._texts_VE.T).softmax(-1)
        return [above(row, self.vocabulary, self._threshold) for row in shares_BV]


class AnnotationTagger:
    """The oracle: the categories of a picture's annotations, in their order; none where there are no annotations."""

    def __init__(self, vocabulary: tuple[str, ...]) -> None:
        self.vocabulary = vocabulary

    def tag(self, images: Sequence[Image.Image], annotations: Annotations | None = None) -> list[list[str]]:
        truth = annotations if annotations is not None else [()] * len(images)
        return [list(dict.fromkeys(a.category for a in of_image)) for of_image in truth]


def above(scores_V: torch.Tensor, vocabulary: Sequence[str], threshold: float) -> list[str]:
    """Names whose score is above `threshold`, best first, ties in vocabulary order; the best one in any case."""
    order = torch.argsort(scores_V, descending=True, stable=True).tolist()
    return [vocabulary[i] for place, i in enumerate(order) if place == 0 or scores_V[i] > threshold]
