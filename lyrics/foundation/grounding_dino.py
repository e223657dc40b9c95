"""Grounding DINO (arXiv 2303.05499) from the hub, through transformers: boxes for tags of any words.

Files: detector.json, and model/ with the hub's own files (configuration, tokenizer, safetensors).

Shapes: B texts, Q object queries, T tags of a text, L tokens, D width of a query.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lyrics.config import DetectorPart
from lyrics.foundation import hub
from lyrics.foundation.manifest import Made, count_parameters
from lyrics.foundation.regions import batches
from lyrics.io import read_json, write_json
from lyrics.model.pictures import once

SETTINGS, MODEL = "detector.json", "model"
_LONGEST = 1333 / 800  # of the shortest side, as published


@dataclasses.dataclass(frozen=True)
class Queries:
    """What the decoder's queries say about one picture: corners in pixels (Q, 4), (Q, T), (Q, D)."""

    boxes_xyxy: Tensor
    scores_QT: Tensor
    features_QD: Tensor


def fit(part: DetectorPart, out: Path) -> Made:
    """Take the published files as they are.

    Raises:
        InputError: no commit is pinned, the files cannot be had, or they hold no safetensors.
    """
    fetched = hub.fetch(part.name, part.revision)
    (out / MODEL).mkdir()
    for pattern in ("*.json", "*.txt", "*.safetensors"):
        for file in sorted(fetched.folder.glob(pattern)):
            shutil.copyfile(file, out / MODEL / file.name)
    write_json(out / SETTINGS, {"source": part.source, "image_size_px": part.image_size_px})
    return Made(
        source=part.source,
        name=part.name,
        revision=part.revision,
        licence=fetched.licence,
        parameters=count_parameters(out / MODEL),
    )


class GroundingDino:
    """The tags of a picture are one text, "cat . traffic light ."; a query's score of a tag is its tokens' mean.

    Tags that do not fit into one text are asked for in several; the picture is then looked at for each.
    """

    def __init__(self, part: Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoTokenizer, GroundingDinoForObjectDetection, GroundingDinoImageProcessor

        folder, shortest = part / MODEL, read_json(part / SETTINGS)["image_size_px"]
        self._shortest: int = shortest
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._processor: Any = GroundingDinoImageProcessor.from_pretrained(
            folder, local_files_only=True, size={"shortest_edge": shortest, "longest_edge": round(shortest * _LONGEST)}
        )
        model: Any = GroundingDinoForObjectDetection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        self._model = model.to(device).eval()
        self._device = torch.device(device)
        self.width: int = model.config.d_model
        self._most_tokens: int = model.config.max_text_len
        ends: Any = self._tokenizer.convert_tokens_to_ids([".", "?"])
        self._separator, self._ends = ends[0], set(ends)  # what the model takes for the end of a phrase

    def texts(self, tags: Sequence[str]) -> list[list[tuple[int, list[int]]]]:
        """The tags divided among as few texts as hold them: (place of the tag, its token ids)."""
        found: list[list[tuple[int, list[int]]]] = []
        room = 0
        for place, tag in enumerate(tags):
            ids = self._tokenizer(tag.lower(), add_special_tokens=False, verbose=False)["input_ids"]
            ids = [one for one in ids if one not in self._ends][: self._most_tokens - 3]
            if not ids:
                continue
            if room < len(ids) + 1:
                found.append([])
                room = self._most_tokens - 2  # [CLS] and [SEP]
            found[-1].append((place, ids))
            room -= len(ids) + 1
        return found

    @torch.inference_mode()
    def predict(self, images: Sequence[Image.Image], tags_per_image: Sequence[Sequence[str]]) -> list[list[Queries]]:
        """For each picture the queries of each of its texts; none where there are no tags.

        A tag that is not in a text has the score 0 there.
        """
        jobs = [(i, text) for i, tags in enumerate(tags_per_image) for text in self.texts(tags)]
        found: list[list[Queries]] = [[] for _ in images]
        for batch in batches(len(jobs), max(1, len(images))):
            some = jobs[batch]
            for (i, text), (boxes, probability_QL, features_QD) in zip(some, self._look(images, some), strict=True):
                scores_QT = probability_QL.new_zeros(len(boxes), len(tags_per_image[i]))
                start = 1  # after [CLS]
                for place, ids in text:
                    scores_QT[:, place] = probability_QL[:, start : start + len(ids)].mean(dim=1)
                    start += len(ids) + 1
                found[i].append(Queries(boxes, scores_QT, features_QD))
        return found

    def _preprocess(self, images: Sequence[Image.Image]) -> Any:
        return self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")

    def _look(
        self, images: Sequence[Image.Image], jobs: Sequence[tuple[int, list[tuple[int, list[int]]]]]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        texts = [
            [
                self._tokenizer.cls_token_id,
                *(token for _, ids in text for token in (*ids, self._separator)),
                self._tokenizer.sep_token_id,
            ]
            for _, text in jobs
        ]
        padded = self._tokenizer.pad({"input_ids": texts}, return_tensors="pt").to(self._device)
        rows = [i for i, _ in jobs]
        pixels = once(images, ("grounding dino", self._shortest), self._preprocess, ahead=True)
        shown = {name: value[rows].to(self._device) for name, value in pixels.items()}
        output = self._model(**shown, input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
        probability_BQL = output.logits.float().sigmoid()
        sizes = torch.tensor([[*images[i].size, *images[i].size] for i in rows], device=self._device)
        centre, side = output.pred_boxes.float().split(2, dim=-1)
        boxes_BQ4 = torch.cat([centre - side / 2, centre + side / 2], dim=-1) * sizes[:, None]
        return list(zip(boxes_BQ4, probability_BQL, output.last_hidden_state.float(), strict=True))
