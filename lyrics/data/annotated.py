"""An annotated split: a folder with images/ and whichever public formats it has, read into records."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from lyrics.data import coco, llava, pope, refcoco, vqa
from lyrics.data.records import Annotation, ImageRecord, Rejected, Sample
from lyrics.errors import InputError

log = logging.getLogger(__name__)
_Reader = Callable[[Path], tuple[list[Sample], list[Rejected]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    images: list[ImageRecord]
    samples: list[Sample]
    rejected: list[Rejected]


def read_split(folder: Path) -> Split:
    """Images in the order of their list, and samples: a caption sample per image, then VQA, refer, POPE, dialogues.

    Records about images that the folder does not have are rejected, never silently lost.

    Raises:
        InputError: if the folder, or both captions.json and instances.json, are missing, or a file is malformed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected images/ with captions.json or instances.json there")
    captions_path, instances_path = folder / "captions.json", folder / "instances.json"
    if not captions_path.exists() and not instances_path.exists():
        raise InputError(f"{folder} has neither captions.json nor instances.json; write one of them in COCO's format")
    listed: dict[coco.ImageId, dict] = {}
    captions: dict[coco.ImageId, list[str]] = {}
    annotations: dict[coco.ImageId, list[Annotation]] = {}
    rejected: list[Rejected] = []
    if instances_path.exists():
        instances = coco.read_instances(instances_path)
        listed |= instances.images
        rejected += instances.rejected
        for item in instances.objects:
            annotations.setdefault(item.image_id, []).append(item.annotation())
    if captions_path.exists():
        captioned = coco.read_captions(captions_path)
        listed |= captioned.images
        rejected += captioned.rejected
        for image_id, text in captioned.texts:
            captions.setdefault(image_id, []).append(text)
    images = []
    sources = {str(image_id): image["source"] for image_id, image in listed.items()}
    for image_id, image in listed.items():
        path = folder / "images" / image["file_name"]
        if not path.is_file():
            rejected.append(Rejected(source=str(folder), record=str(image["file_name"]), reason="missing image file"))
            continue
        images.append(
            ImageRecord(
                image_id=str(image_id),
                path=path.as_posix(),
                width=image["width"],
                height=image["height"],
                captions=tuple(captions.get(image_id, ())),
                annotations=tuple(annotations.get(image_id, ())),
            )
        )
    samples = [
        Sample(
            sample_id=f"caption-{image.image_id}",
            image_id=image.image_id,
            task="caption",
            kind="caption",
            references=image.captions,
            source=str(sources.get(image.image_id, "")),
        )
        for image in images
        if image.captions
    ]
    other, set_aside = _read_tasks(folder, images)
    rejected += set_aside
    if rejected:
        first = rejected[0]
        log.warning("%d records of %s are not used, first %s: %s", len(rejected), folder, first.record, first.reason)
    return Split(images=images, samples=samples + other, rejected=rejected)


def _read_tasks(folder: Path, images: list[ImageRecord]) -> tuple[list[Sample], list[Rejected]]:
    """The task files that are there, with image file names replaced by image ids."""
    readers: dict[str, _Reader] = {
        "vqa_questions.json": lambda path: vqa.read(path, folder / "vqa_annotations.json"),
        "refcoco.jsonl": refcoco.read,
        "pope.json": pope.read,
        "llava.json": llava.read,
    }
    ids = {image.image_id: image.image_id for image in images}
    ids |= {Path(image.path).relative_to(folder / "images").as_posix(): image.image_id for image in images}
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    for name, reader in readers.items():
        path = folder / name
        if not path.exists():
            continue
        found, set_aside = reader(path)
        rejected += set_aside
        for sample in found:
            if sample.image_id in ids:
                samples.append(dataclasses.replace(sample, image_id=ids[sample.image_id]))
            else:
                reason = f"no such image: {sample.image_id}"
                rejected.append(Rejected(source=str(path), record=sample.sample_id, reason=reason))
    return samples, rejected
