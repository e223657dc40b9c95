"""A trained model with everything in front of it: picture and question in, answer out."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

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
from lyrics.foundation import masks
from lyrics.model.inputs import SeenImage
from lyrics.model.language import GREEDY, Decoding
from lyrics.model.lyrics import LyricsModel, Read
from lyrics.model.mq_former import Memory
from lyrics.model.pictures import Pictures
from lyrics.model.vision import ImageEncoder, load_image_encoder
from lyrics.refiner.precision import FeatureDtype, rounded
from lyrics.refiner.refine import RefinedObjects, Refiner, load_refiner
from lyrics.train import stage2
from lyrics.train.devices import pick_device

PICTURES_KEPT = 4  # a picture's keys and values take about as much memory as a dialogue about it
_Value = TypeVar("_Value")


class Recent(Generic[_Value]):
    """The values used last, as many as `size`."""

    def __init__(self, size: int = PICTURES_KEPT) -> None:
        self.size = size
        self._values: collections.OrderedDict[str, _Value] = collections.OrderedDict()

    def get(self, key: str, make: Callable[[], _Value]) -> _Value:
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > self.size:
            self._values.popitem(last=False)
        return self._values[key]


@dataclasses.dataclass
class Known:
    """A picture that was looked at: what no question changes, and the dialogue about it so far."""

    seen: SeenImage
    memory: Memory
    read: Read


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
    _known: Recent[Known] = dataclasses.field(default_factory=Recent, init=False, repr=False, compare=False)

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
        refiner = load_refiner(Path(foundation), refine, parts.tagger, parts.detector, chosen)
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
        pictures = Pictures(images)
        tokens_BPD = self.encoder.look(pictures, self.model.device).float().cpu().numpy()
        found = self.refiner.refine(pictures, truth)
        kept_as = self.refiner.settings.feature_dtype
        return [_seen(*one, kept_as) for one in zip(images, tokens_BPD, found, strict=True)]

    def answer(
        self,
        image: Image.Image | str | Path,
        question: str,
        max_new_tokens: int = 64,
        decoding: Decoding = GREEDY,
        history: Sequence[tuple[str, str]] = (),
    ) -> str:
        """Answer to one question about one picture. The last few pictures are known again by their pixels.

        Args:
            history: questions and answers so far, in a dialogue about the picture.
        """
        picture = image.convert("RGB") if isinstance(image, Image.Image) else open_image(str(image))
        known = self._known.get(_content_hash(picture), lambda: self._know(self.see([picture])[0]))
        if not history:
            known.read = Read()
        return self.model.generate(
            [(*(asked for asked, _ in history), question)],
            [known.seen],
            None,
            max_new_tokens,
            decoding,
            said=[tuple(answer for _, answer in history)],
            memory=known.memory,
            read=known.read if decoding.num_beams == 1 else None,
        )[0]

    def answer_batch(
        self,
        questions: Sequence[str],
        seen: Sequence[SeenImage],
        spatial_texts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
        decoding: Decoding = GREEDY,
    ) -> list[str]:
        """Answers, each to a question of its own. A picture that comes several times in `seen` is looked at once.

        Args:
            spatial_texts: replaces what the language model reads of each picture's objects.
        """
        return self.model.generate(questions, seen, spatial_texts, max_new_tokens, decoding, memory=self._look(seen))

    @torch.inference_mode()
    def _know(self, seen: SeenImage) -> Known:
        return Known(seen, self.model.look([seen]), Read())

    @torch.inference_mode()
    def _look(self, seen: Sequence[SeenImage]) -> Memory:
        pictures = list({id(one): one for one in seen}.values())
        place = {id(one): index for index, one in enumerate(pictures)}
        if len(pictures) == 1:  # while it is kept, no other picture can have its id
            memory = self._known.get(f"id {id(seen[0])}", lambda: self._know(seen[0])).memory
        else:
            memory = self.model.look(pictures)
        if len(pictures) == len(seen):
            return memory
        return memory.index(torch.tensor([place[id(one)] for one in seen], device=self.model.device))


def _content_hash(image: Image.Image) -> str:
    """Of an RGB picture. (With a palette the same bytes would be other colours.)"""
    return hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()


def _seen(image: Image.Image, tokens_PD: np.ndarray, objects: RefinedObjects, kept_as: FeatureDtype) -> SeenImage:
    size = np.array([image.width, image.height, image.width, image.height], np.float32)
    boxes = np.asarray(objects.boxes_xyxy, np.float32).reshape(-1, 4)
    # Features are rounded as they are on disk, so that an answer does not depend on the way in.
    return SeenImage(
        image_tokens_PD=rounded(tokens_PD, kept_as),
        detector_tokens_ND=rounded(np.asarray(objects.detector_tokens_ND), kept_as),
        segmenter_tokens_ND=rounded(np.asarray(objects.segmenter_tokens_ND), kept_as),
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
    """Answers and which model gave them."""

    answers: list[str]
    source: str


def ask(
    image: Path,
    questions: Sequence[str],
    boxes: Path | None = None,
    max_new_tokens: int = 64,
    decoding: Decoding = GREEDY,
) -> Said:
    """Answer each question from the best model at hand; `boxes` receives the picture with what the refiner saw.

    Raises:
        InputError: a question is empty, the picture cannot be read, `boxes` cannot be written, or there is no model.
    """
    if not all(question.strip() for question in questions):
        raise InputError('The question is empty; ask something, e.g. "What color is the umbrella?"')
    picture = read_picture(image)
    if boxes is not None:
        check_output(boxes, "--boxes", "a PNG file", image)
    model = load()
    if boxes is not None:
        found = model.refine(picture)
        drawn = [masks.decode(counts, picture.height, picture.width) for counts in found.masks]
        with io.atomic_path(boxes) as temporary:
            draw_objects(picture, found.tags, found.boxes_xyxy, found.scores, drawn).save(temporary, format="PNG")
    return Said([model.answer(picture, question, max_new_tokens, decoding) for question in questions], model.label)


def read_picture(path: Path) -> Image.Image:
    """
    Raises:
        InputError: it cannot be read.
    """
    try:
        return open_image(str(path))
    except BadImageError as error:
        raise InputError(f"{path} cannot be used: {error}; give a JPEG, PNG or WebP picture") from None


def check_output(out: Path, option: str, kind: str, image: Path) -> None:
    """Before the work is done.

    Raises:
        InputError: `out` is a folder, or the picture that is asked about.
    """
    if out.is_dir() or (out.exists() and out.samefile(image)):
        found = "is a folder" if out.is_dir() else "is the picture itself"
        raise InputError(f"{option} {out} {found}; give the name of {kind} to write")
