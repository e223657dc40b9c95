"""A trained model with everything in front of it: picture and question in, answer out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError

from lyrics import io
from lyrics.config import Foundation, Refine
from lyrics.data.files import BadImageError
from lyrics.data.records import Annotation
from lyrics.data.webdataset import open_image
from lyrics.drawing import draw_objects
from lyrics.errors import InputError
from lyrics.model.inputs import SeenImage
from lyrics.model.lyrics import LyricsModel
from lyrics.model.vision import ImageEncoder, load_image_encoder
from lyrics.refiner.refine import RefinedObjects, Refiner, load_refiner
from lyrics.train import stage2
from lyrics.train.devices import pick_device


@dataclasses.dataclass(frozen=True)
class Lyrics:
    """Image encoder, visual refiner and language model, ready to answer.

    Example:
        lyrics.load("models:/lyrics@champion").answer("street.jpg", "How many people are there?")
    """

    model: LyricsModel
    encoder: ImageEncoder
    refiner: Refiner
    label: str

    @classmethod
    def from_folders(
        cls, stage2_folder: Path, foundation: Path, device: str = "auto", label: str = "local model"
    ) -> "Lyrics":
        """Load a trained model and the frozen parts it was trained with.

        Raises:
            InputError: a file is missing, a frozen part is another one, or the settings are those of other code.
        """
        chosen = pick_device(device)
        settings = io.read_json(Path(stage2_folder) / "config.json")
        try:
            refine, parts = Refine(**settings["refine"]), Foundation(**settings["foundation"])
            model = stage2.load(Path(stage2_folder), Path(foundation))
        except (KeyError, TypeError, ValidationError) as error:
            why = " ".join(str(error).split())
            raise InputError(
                f"{label} was trained by other code than this: its settings do not fit ({why:.300}); check out the "
                "commit it was made from (tag git_commit of its version), or train again with: make run"
            ) from error
        refiner = load_refiner(Path(foundation), refine, parts, chosen)
        return cls(
            model=model.to(chosen),
            encoder=load_image_encoder(Path(foundation) / "clip").to(chosen),
            refiner=refiner,
            label=label,
        )

    def refine(self, image: Image.Image, annotations: Sequence[Annotation] = ()) -> RefinedObjects:
        """Tags, boxes and masks of one picture, for drawing."""
        return self.refiner.refine([image], [tuple(annotations)])[0]

    @torch.inference_mode()
    def see(
        self, images: Sequence[Image.Image], annotations: Sequence[Sequence[Annotation]] | None = None
    ) -> list[SeenImage]:
        """Run the frozen parts. `annotations` feed the oracle refiner; the others ignore them."""
        truth = [tuple(a) for a in annotations] if annotations is not None else [() for _ in images]
        tokens_BPD = self.encoder(self.encoder.preprocess(list(images)).to(self.model.device)).float().cpu().numpy()
        found = self.refiner.refine(list(images), truth)
        return [_seen(image, tokens, objects) for image, tokens, objects in zip(images, tokens_BPD, found, strict=True)]

    def answer(self, image: Image.Image | str | Path, question: str, max_new_tokens: int = 64) -> str:
        """Greedy answer to one question about one picture."""
        picture = image if isinstance(image, Image.Image) else open_image(str(image))
        return self.answer_batch([question], self.see([picture]), max_new_tokens=max_new_tokens)[0]

    def answer_batch(
        self,
        questions: Sequence[str],
        seen: Sequence[SeenImage],
        spatial_texts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
    ) -> list[str]:
        """Greedy answers. `spatial_texts` replaces what the language model reads of each picture's objects."""
        return self.model.generate(questions, seen, spatial_texts, max_new_tokens)


def _seen(image: Image.Image, tokens_PD: np.ndarray, objects: RefinedObjects) -> SeenImage:
    size = np.array([image.width, image.height, image.width, image.height], np.float32)
    boxes = np.asarray(objects.boxes_xyxy, np.float32).reshape(-1, 4)
    # Features pass through float16 as they do on disk, so that an answer does not depend on the way in.
    return SeenImage(
        image_tokens_PD=tokens_PD.astype(np.float16),
        detector_tokens_ND=np.asarray(objects.detector_tokens_ND).astype(np.float16),
        segmenter_tokens_ND=np.asarray(objects.segmenter_tokens_ND).astype(np.float16),
        tags=tuple(objects.tags),
        boxes_xyxy_N4=np.clip(boxes / size, 0.0, 1.0),
        spatial_text=objects.spatial_text,
    )


def load(where: str | Path | None = None, device: str = "auto") -> Lyrics:
    """A model from the registry (`models:/lyrics@champion`) or a folder; `label` says which.

    Without `where`: the registry's champion, else its candidate, else the models in this folder.
    """
    from lyrics.track import registry

    found = registry.best_available() if where is None else registry.resolve(where)
    return Lyrics.from_folders(found.stage2, found.foundation, device, found.label)


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer and which model gave it."""

    answer: str
    source: str


def ask(image: Path, question: str, boxes: Path | None = None) -> Said:
    """Answer from the best model at hand; `boxes` receives the picture with what the refiner saw.

    Raises:
        InputError: the question is empty, the picture cannot be read, or there is no model.
    """
    if not question.strip():
        raise InputError('The question is empty; ask something, e.g. "What color is the umbrella?"')
    try:
        picture = open_image(str(image))
    except BadImageError as error:
        raise InputError(f"{image} cannot be used: {error}; give a JPEG, PNG or WebP picture") from None
    model = load()
    if boxes is not None:
        found = model.refine(picture)
        draw_objects(picture, found.tags, found.boxes_xyxy, found.scores, found.masks).save(boxes, format="PNG")
    return Said(model.answer(picture, question), model.label)
