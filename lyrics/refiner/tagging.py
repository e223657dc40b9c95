"""Visual refiner, first module: picture → tags (paper section 1).

One interface for every tagger: a head on the CLIP tower (`fitted`), the CLIP compared with a vocabulary (`zero_shot`),
the ground truth (`annotations`), and `none`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch.nn import functional

from lyrics.config import TaggerPart
from lyrics.data.records import Annotation
from lyrics.foundation import manifest, tagger

Annotations = Sequence[Sequence[Annotation]]
_ANYTHING = "thing"  # what a tag must describe a picture better than


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
    if source == "none":
        return NoTagger(vocabulary)
    if source == "annotations":
        return AnnotationTagger(vocabulary)
    from lyrics.foundation.clip import load_clip

    clip = load_clip(foundation / "clip", str(device))
    if source == "zero_shot":
        own = tagger.load_thresholds(part)
        thresholds = [own.get(tag, config.threshold) for tag in vocabulary]
        return ZeroShotTagger(clip, vocabulary, config.prompts, thresholds)
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
        thresholds_V = torch.full((len(self.vocabulary),), self._threshold)
        return [above(row, self.vocabulary, thresholds_V) for row in probabilities_BV.cpu()]


class ZeroShotTagger:
    """CLIP without training: how surely a tag describes the picture rather than "thing" in the same sentences.

    Each tag is judged by itself, against a threshold of its own, as RAM's are (arXiv 2306.03514): the words beside it
    in the vocabulary do not count, so that many tags may be in a picture and a vocabulary may grow.
    """

    def __init__(
        self, clip: "tagger.Clip", vocabulary: tuple[str, ...], prompts: Sequence[str], thresholds: Sequence[float]
    ) -> None:
        self.vocabulary, self._clip = vocabulary, clip
        self._thresholds_V = torch.tensor(thresholds)
        texts_TE = self._in_sentences([*vocabulary, _ANYTHING], prompts)
        self._texts_VE, self._anything_E = texts_TE[:-1], texts_TE[-1]

    def _in_sentences(self, tags: Sequence[str], prompts: Sequence[str]) -> torch.Tensor:
        """(T, E): the mean text of each tag over the prompts, of length 1."""
        texts = [self._clip.encode_texts([prompt.replace("{}", tag) for tag in tags]) for prompt in prompts]
        return functional.normalize(torch.stack(texts).mean(0), dim=-1)

    @torch.inference_mode()
    def tag(self, images: Sequence[Image.Image], annotations: Annotations | None = None) -> list[list[str]]:
        if not images:
            return []
        image_BE = self._clip.encode_images(images)
        logits_BV = self._clip.scale * (image_BE @ self._texts_VE.T - (image_BE @ self._anything_E)[:, None])
        return [above(row, self.vocabulary, self._thresholds_V) for row in logits_BV.sigmoid()]


class NoTagger:
    """Switched off: every word of the vocabulary is looked for in every picture."""

    def __init__(self, vocabulary: tuple[str, ...]) -> None:
        self.vocabulary = vocabulary

    def tag(self, images: Sequence[Image.Image], annotations: Annotations | None = None) -> list[list[str]]:
        return [list(self.vocabulary) for _ in images]


class AnnotationTagger:
    """The oracle: the categories of a picture's annotations, in their order; none where there are no annotations."""

    def __init__(self, vocabulary: tuple[str, ...]) -> None:
        self.vocabulary = vocabulary

    def tag(self, images: Sequence[Image.Image], annotations: Annotations | None = None) -> list[list[str]]:
        truth = annotations if annotations is not None else [()] * len(images)
        return [list(dict.fromkeys(a.category for a in of_image)) for of_image in truth]


def above(scores_V: torch.Tensor, vocabulary: Sequence[str], thresholds_V: torch.Tensor) -> list[str]:
    """Names whose score is above their threshold, best first, ties in vocabulary order; the best one in any case."""
    order_V = torch.argsort(scores_V, descending=True, stable=True)
    said_V = (scores_V > thresholds_V)[order_V]
    said_V[0] = True
    return [vocabulary[i] for i in order_V[said_V].tolist()]
