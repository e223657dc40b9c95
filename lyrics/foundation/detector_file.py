"""A detector that the user names: an ultralytics file, YOLO or YOLO-World, turned into plain tensors once.

The file is a pickle and can run code when it is opened, so it is opened only if the configuration lists its sha256, and
only here: what is kept is yolo.safetensors, detector.json and, for YOLO-World, the text tower it was trained with.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lyrics.config import DetectorPart
from lyrics.errors import InputError
from lyrics.foundation import hub, yolo
from lyrics.foundation.manifest import Made
from lyrics.foundation.regions import MapReader
from lyrics.io import read_json, write_json

SETTINGS, WEIGHTS, TEXT = "detector.json", "yolo.safetensors", "text"
# YOLO-World compares its regions with texts in this model's space; the commit holds safetensors.
_TEXT_TOWER = ("openai/clip-vit-base-patch32", "c237dc49a33fc61debc9276459120b7eac67e7ef")


def fit(part: DetectorPart, out: Path) -> Made:
    """Convert the file.

    Raises:
        InputError: it is missing, its sha256 is not the listed one, or it holds no detector.
    """
    model = yolo.load_file(Path(part.name), part.sha256)
    kind = type(model).__name__
    if kind not in ("DetectionModel", "WorldModel"):
        raise InputError(f"{part.name} holds a {kind}; expected an ultralytics detector: YOLO or YOLO-World")
    world = kind == "WorldModel"
    names = [str(model.names[i]) for i in range(len(model.names))]
    settings = {
        "source": "file",
        "world": world,
        "yolo": {key: value for key, value in model.yaml.items() if key != "yaml_file"},
        "names": names,
        "image_size_px": part.image_size_px,
    }
    write_json(out / SETTINGS, settings)
    save_file({k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}, out / WEIGHTS)
    if world:
        tower = hub.fetch(*_TEXT_TOWER)
        shutil.copytree(
            tower.folder, out / TEXT, ignore=shutil.ignore_patterns("*.bin", "*.msgpack", "*.h5", "README*")
        )
    return Made(
        source="file",
        name=Path(part.name).name,
        parameters=sum(p.numel() for p in model.parameters()),
        licence="as its publisher states; ultralytics' own weights are under AGPL-3.0",
    )


class NamedDetector:
    """A converted detector: maps and scores for the tags that each picture is asked for."""

    def __init__(self, part: Path, device: str | torch.device = "cpu") -> None:
        settings = read_json(part / SETTINGS)
        self.size_px: int = settings["image_size_px"]
        self.names: list[str] = settings["names"]
        self.world: bool = settings["world"]
        self._device = torch.device(device)
        self._model = yolo.build_named(settings["yolo"], len(self.names), self.world)
        self._model.load_state_dict(load_file(part / WEIGHTS))
        head: Any = self._model.model[-1]
        if hasattr(head, "end2end"):  # YOLOv10 and YOLO26 have a head that needs no suppression, and the ordinary one
            head.end2end = False
        self._model = yolo.for_inference(self._model, self._device)
        self._read = MapReader(self._model, [head.f[0]])
        self.width: int = head.cv2[0][0].conv.in_channels
        self._texts = _TextTower(part / TEXT, self._device) if self.world else None

    @torch.inference_mode()
    def predict(self, pixels_B3SS: Tensor, tags_per_image: Sequence[Sequence[str]]) -> tuple[Tensor, list[Tensor]]:
        """Decoded predictions (B, 4 + T, anchors), boxes as centre and size, and the map to pool features from.

        T is the most tags of a picture, at least 1; rows past a picture's own are 0, as are those of tags that a
        detector with fixed classes has no class for.
        """
        pixels = pixels_B3SS.to(self._device)
        most = max(1, *map(len, tags_per_image))
        if self._texts is not None:
            # YOLO-World's neck looks at all texts of a picture; one that comes twice changes nothing there, so a
            # picture's own first tag fills its row up: what is found does not depend on the pictures beside it.
            filled = [[*tags, *[tags[0] if tags else ""] * (most - len(tags))] for tags in tags_per_image]
            texts_TE = self._texts.encode([tag for tags in filled for tag in tags])
            self._model.txt_feats = texts_TE.reshape(len(filled), most, -1)
            self._model.model[-1].nc = most
            predictions, maps = self._read(pixels)
            for prediction, tags in zip(predictions, tags_per_image, strict=True):
                prediction[4 + len(tags) :] = 0.0
            return predictions, maps
        predictions, maps = self._read(pixels)
        index = {name.casefold(): i for i, name in enumerate(self.names)}
        scores_BTA = predictions.new_zeros(len(predictions), most, predictions.shape[-1])
        for scores_TA, prediction, tags in zip(scores_BTA, predictions, tags_per_image, strict=True):
            for row, tag in enumerate(tags):
                if tag.casefold() in index:
                    scores_TA[row] = prediction[4 + index[tag.casefold()]]
        return torch.cat([predictions[:, :4], scores_BTA], dim=1), maps


class _TextTower(nn.Module):
    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        super().__init__()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tower: Any = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._tower = tower.to(device).eval()
        self._known: dict[str, Tensor] = {}

    def encode(self, tags: Sequence[str]) -> Tensor:
        """(T, E), unit length."""
        new = [tag for tag in dict.fromkeys(tags) if tag not in self._known]
        if new:
            tokens = self._tokenizer(new, padding=True, truncation=True, return_tensors="pt").to(self._tower.device)
            self._known.update(zip(new, F.normalize(self._tower(**tokens).text_embeds, dim=-1), strict=True))
        return torch.stack([self._known[tag] for tag in tags])
