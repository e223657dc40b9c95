"""Foundation part `detector`: a class-agnostic YOLO and a region head that puts its boxes into the CLIP's text space.

Files: detector.json (what to build), yolo.safetensors, regions.safetensors (head and the embeddings of the tags that
it was fitted on). `file` keeps a detector of the user's as yolo.safetensors, `annotations` keeps nothing.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lyrics import seeding
from lyrics.config import Config, DetectorPart
from lyrics.data.annotated import read_split
from lyrics.data.files import decode, is_turned
from lyrics.data.records import ImageRecord
from lyrics.errors import InputError
from lyrics.foundation import region_training, training, yolo
from lyrics.foundation.manifest import Made
from lyrics.foundation.regions import CELLS, MapReader, RegionHead, letterbox, pool
from lyrics.foundation.sam import fill_up
from lyrics.io import read_json, write_json
from lyrics.stage import Tracker

SETTINGS, YOLO, REGIONS = "detector.json", "yolo.safetensors", "regions.safetensors"
_MAP_LAYERS = (0, 2, 10)  # of yolo_small: strides 2 (colours), 4 (edges) and 8 (shapes)
_MAX_BOXES = 100
_READ_AS_STORED = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Proposals:
    """Boxes of one picture before they have tags: (N, 4) pixels, (N,), (N, width), (N, text width)."""

    boxes_xyxy: Tensor
    objectness: Tensor
    features: Tensor
    regions_NE: Tensor


class RegionDetector:
    """YOLO, region head and CLIP's text tower."""

    def __init__(
        self, model: torch.nn.Module, head: RegionHead, clip: Any, settings: dict[str, Any], vocabulary_TE: Tensor
    ) -> None:
        self._read = MapReader(model, settings["map_layers"])
        self._head, self._clip = head, clip
        self._size_px: int = settings["image_size_px"]
        self.vocabulary: tuple[str, ...] = tuple(settings["vocabulary"])
        self.width: int = settings["width"]
        self._texts = dict(zip(self.vocabulary, vocabulary_TE, strict=True))
        self._device = vocabulary_TE.device

    @torch.inference_mode()
    def propose(self, images: Sequence[Image.Image], *, score_threshold: float, nms_iou: float) -> list[Proposals]:
        """Boxes above the threshold with their features, highest objectness first."""
        pixels, scales = letterbox(images, self._size_px)
        predictions, maps = self._read(pixels.to(self._device))
        found = yolo.nms(predictions, score_threshold, nms_iou, _MAX_BOXES)
        boxes = [_inside(one[:, :4], image, scale) for one, image, scale in zip(found, images, scales, strict=True)]
        features, regions_RE = self.describe(maps, boxes)
        counts = [len(one) for one in found]
        return [
            Proposals(box / scale, one[:, 4], feature, region)
            for box, scale, one, feature, region in zip(
                boxes, scales, found, features.split(counts), regions_RE.split(counts), strict=True
            )
        ]

    def describe(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features (R, width) and places in the text space (R, E) of boxes in network pixels.

        A feature is the first map's mean and maximum inside the box, where colour is plain, beside the head's hidden
        layer, which tells shapes apart.
        """
        if not sum(map(len, boxes)):
            return maps[0].new_zeros(0, self.width), maps[0].new_zeros(0, self._head.project.out_features)
        pooled_RCSS = pool(maps[1:], boxes, self._size_px, CELLS)
        count = len(pooled_RCSS)
        hidden, regions_RE = (rows[:count] for rows in self._head(pooled_RCSS[fill_up(count).to(pooled_RCSS.device)]))
        early = pool(maps[:1], boxes, self._size_px, CELLS)
        return torch.cat([early.mean(dim=(2, 3)), early.amax(dim=(2, 3)), hidden], dim=1), regions_RE

    @torch.inference_mode()
    def tag_probabilities(self, proposal: Proposals, tags: Sequence[str]) -> Tensor:
        """(N, T): how each box divides among the tags."""
        new = [tag for tag in tags if tag not in self._texts]
        if new:
            self._texts.update(zip(new, encode_texts(self._clip, new, self._device), strict=True))
        texts_TE = torch.stack([self._texts[tag] for tag in tags])
        return self._head.similarity(proposal.regions_NE, texts_TE).softmax(dim=1)


def encode_texts(clip: Any, tags: Sequence[str], device: torch.device) -> Tensor:
    return F.normalize(torch.as_tensor(clip.encode_texts(list(tags))).to(device, torch.float32), dim=-1)


def _inside(boxes: Tensor, image: Image.Image, scale: float) -> Tensor:
    limit = torch.tensor([image.width, image.height] * 2, device=boxes.device) * scale
    return boxes.clamp(min=0).minimum(limit)


def load(part: Path, clip: Path, device: str | torch.device = "cpu") -> RegionDetector:
    """The fitted detector, built from its description: nothing is unpickled."""
    from lyrics.foundation.clip import load_clip

    settings = read_json(part / SETTINGS)
    model = load_yolo(part)
    state = load_file(part / REGIONS)
    vocabulary_TE = state.pop("vocabulary").to(device)
    head = RegionHead(settings["map_channels"], settings["hidden"], vocabulary_TE.shape[1])
    head.load_state_dict(state)
    model = yolo.for_inference(model, torch.device(device))
    return RegionDetector(model, head.to(device).eval(), load_clip(clip), settings, vocabulary_TE)


def load_yolo(part: Path) -> torch.nn.Module:
    """The fitted YOLO alone."""
    model = yolo.build(read_json(part / SETTINGS)["yolo"])
    model.load_state_dict(load_file(part / YOLO))
    return model.eval()


def fit(config: Config, work: Path, tracker: Tracker) -> Made:
    part, out = config.foundation.detector, work / "out"
    if part.source in ("annotations", "none"):
        write_json(out / SETTINGS, {"source": part.source})
        return Made(source=part.source, name=part.name, parameters=0, licence="none: it has no weights")
    if part.source == "grounding_dino":
        from lyrics.foundation import grounding_dino

        return grounding_dino.fit(part, out)
    if part.source == "file":
        from lyrics.foundation import detector_file

        return detector_file.fit(part, out)
    return _fit(config, work, tracker)


def _fit(config: Config, work: Path, tracker: Tracker) -> Made:
    from lyrics.foundation import quality
    from lyrics.foundation.clip import load_clip
    from lyrics.foundation.fit import FOUNDATION, SPLIT

    part, out = config.foundation.detector, work / "out"
    device = training.pick_device(config.device)
    annotated = [image for image in read_split(SPLIT).images if image.annotations]
    fitted, held_out = training.hold_out(annotated)
    description = _description(part.name)
    model = _fit_yolo(part, description, fitted, held_out, work, tracker, config.seed, device).to(device)
    clip = load_clip(FOUNDATION / "clip")
    vocabulary = sorted({a.category for image in annotated for a in image.annotations})
    vocabulary_TE = encode_texts(clip, vocabulary, device)
    read = MapReader(model, _MAP_LAYERS)
    head = region_training.fit(read, fitted, part.image_size_px, vocabulary, vocabulary_TE, config.seed, tracker)
    settings = {
        "source": part.source,
        "yolo": description,
        "image_size_px": part.image_size_px,
        "map_layers": list(_MAP_LAYERS),
        "map_channels": head.reduce.in_channels,
        "hidden": head.hidden.out_features,
        "width": 2 * _early_channels(model) + head.hidden.out_features,
        "vocabulary": vocabulary,
    }
    write_json(out / SETTINGS, settings)
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, out / YOLO)
    state = {k: v.cpu().contiguous() for k, v in head.state_dict().items()}
    save_file({**state, "vocabulary": vocabulary_TE.cpu().contiguous()}, out / REGIONS)
    whole = RegionDetector(model, head, clip, settings, vocabulary_TE)
    return Made(
        source=part.source,
        name=part.name,
        parameters=training.parameter_count(model) + training.parameter_count(head),
        quality=quality.of_detector(whole, held_out, part),
    )


def _early_channels(model: Any) -> int:
    return model.model[_MAP_LAYERS[0]].conv.out_channels


def _description(name: str) -> dict[str, Any]:
    own = Path(__file__).with_name(f"{name}.yaml")
    if not own.exists():
        known = sorted(path.stem for path in own.parent.glob("yolo_*.yaml"))
        raise InputError(f"foundation.detector.name {name!r} is no YOLO description; choices: {', '.join(known)}")
    return yaml.safe_load(own.read_text())


def _fit_yolo(
    part: DetectorPart,
    description: dict[str, Any],
    fitted: Sequence[ImageRecord],
    held_out: Sequence[ImageRecord],
    work: Path,
    tracker: Tracker,
    seed: int,
    device: torch.device,
) -> torch.nn.Module:
    """Write the pictures as ultralytics wants them, and train."""
    folder = work / "yolo"
    shutil.rmtree(folder, ignore_errors=True)
    images = {split: folder / "images" / split for split in ("train", "val")}
    for split, records in {"train": fitted, "val": held_out}.items():
        write_layout(records, images[split], folder / "labels" / split)
    steps = part.epochs * -(-len(fitted) // part.batch_size)
    with tqdm(total=steps, desc="fit detector", unit="step", mininterval=1.0) as bar:
        model = yolo.train(
            description,
            images,
            folder,
            image_size_px=part.image_size_px,
            epochs=part.epochs,
            batch_size=part.batch_size,
            lr=part.lr,
            seed=seeding.stable_seed(seed, "foundation", "detector") % 2**31,
            device=str(device),
            on_batch=lambda: bar.update(),
            on_epoch=lambda epoch, losses: tracker.log_metrics(
                {f"foundation/detector_{name}": value for name, value in losses.items()}, step=epoch
            ),
        )
    shutil.rmtree(folder)
    return model


def write_layout(records: Sequence[ImageRecord], images: Path, labels: Path) -> None:
    """Pictures and boxes as ultralytics reads them."""
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for index, record in enumerate(records):
        _lay_out(Path(record.path), images / f"{index:07d}")
        lines = []
        for annotation in record.annotations:
            x0, y0, x1, y1 = annotation.box_xyxy
            center = ((x0 + x1) / 2 / record.width, (y0 + y1) / 2 / record.height)
            lines.append(
                "0 " + " ".join(f"{v:.6f}" for v in (*center, (x1 - x0) / record.width, (y1 - y0) / record.height))
            )
        (labels / f"{index:07d}.txt").write_text("".join(f"{line}\n" for line in lines))


def _lay_out(picture: Path, stem: Path) -> None:
    """A copy, since ultralytics mends in place what it thinks is a broken JPEG.

    It turns pictures by their EXIF orientation, which boxes ignore, and passes over some formats: those become PNG.
    """
    if picture.suffix in _READ_AS_STORED and not is_turned(picture):
        shutil.copyfile(picture, stem.with_suffix(picture.suffix))
    else:
        decode(picture).save(stem.with_suffix(".png"))
