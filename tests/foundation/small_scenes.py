"""A project folder with a handful of coloured squares and discs in COCO's format, and a CLIP made of a hash."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

SIDE = 64
TAGS = ("disc", "square")


class HashClip:
    """A unit vector for each text, always the same one."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        rows = [torch.randn(16, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def write_scenes(project: Path, count: int, masks: bool = True) -> None:
    folder = project / "data/raw/foundation"
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    images, annotations = [], []
    yy, xx = np.mgrid[:SIDE, :SIDE]
    for i in range(1, count + 1):
        pixels = np.full((SIDE, SIDE, 3), generator.integers(180, 255, 3), np.uint8)
        for column in range(2):
            x, y, side = 4 + 30 * column, int(generator.integers(2, 30)), int(generator.integers(14, 24))
            kind = int(generator.integers(2))
            shape = (xx >= x) & (xx < x + side) & (yy >= y) & (yy < y + side)
            if kind == 0:
                shape = (xx - x - side / 2 + 0.5) ** 2 + (yy - y - side / 2 + 0.5) ** 2 <= (side / 2) ** 2
            pixels[shape] = generator.integers(0, 120, 3)
            rle = coco_mask.encode(np.asfortranarray(shape.astype(np.uint8)))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": i,
                "category_id": kind + 1,
                "bbox": [x, y, side, side],
            }
            annotation |= {"area": int(shape.sum()), "iscrowd": 0}
            if masks:
                annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotations.append(annotation)
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE})
    categories = [{"id": i, "name": tag} for i, tag in enumerate(TAGS, start=1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(document))
