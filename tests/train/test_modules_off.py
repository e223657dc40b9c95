"""Each module of the refiner switched off alone: real parts, real refine, and both real training stages after it."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_project
from PIL import Image, ImageDraw

from lyrics import io
from lyrics.foundation import fit
from lyrics.refiner import refine
from lyrics.refiner.features import RefinedSplit
from lyrics.stage import NullTracker
from lyrics.train import stage1, stage2

PARTS = ("clip", "tagger", "detector", "segmenter")
MODULES = ("tagger", "detector", "segmenter")
SIDE, PICTURES = 32, 24


def write_annotated(folder):
    """Pictures of two annotated rectangles with masks and captions; the last has none."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    images, annotations, captions = [], [], []
    for i in range(1, PICTURES + 1):
        picture = Image.new("RGB", (SIDE, SIDE + 8 * (i % 2)), "white")
        for column in range(2 if i < PICTURES else 0):
            x, y, kind = 2 + 15 * column, int(draw.integers(0, 18)), int(draw.integers(2))
            ImageDraw.Draw(picture).rectangle((x, y, x + 11, y + 11), fill=("red", "blue")[kind])
            one = {"id": 2 * i + column, "image_id": i, "category_id": kind + 1, "bbox": [x, y, 12, 12], "area": 144}
            corners = [x, y, x + 12, y, x + 12, y + 12, x, y + 12]
            annotations.append(one | {"iscrowd": 0, "segmentation": [corners]})
        picture.save(folder / f"images/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": picture.width, "height": picture.height})
        captions.append({"id": i, "image_id": i, "caption": f"There is a cup, a star and {i}."})
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "star"}]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(document))


def configuration(off):
    """The small project's, with a small CLIP of random weights and an oracle in every module but `off`."""
    config = small_project.configuration(steps=2)
    parts = config.foundation
    clip = dataclasses.replace(
        parts.clip, image_size_px=SIDE, patch_size_px=8, hidden_size=16, layers=2, heads=2, text_hidden_size=16,
        text_layers=1, projection_size=8, epochs=0,
    )  # fmt: skip
    modules = {
        name: dataclasses.replace(getattr(parts, name), source="none" if name == off else "annotations", name="oracle")
        for name in MODULES
    }
    return dataclasses.replace(config, foundation=dataclasses.replace(parts, clip=clip, **modules))


def run_everything(config, folder):
    """foundation, refine, pretrain, finetune; the refined pictures and both histories."""
    small_project.make(folder, config)
    write_annotated(folder / "data/raw/foundation")
    shutil.copytree(folder / "data/raw/foundation", folder / "data/raw/instruct")
    for part in PARTS:
        fit.run(part, config, folder / "work" / part, NullTracker())
        (folder / "work" / part / "out").rename(folder / "models/foundation" / part)
    shutil.rmtree("data/refined")
    refine.run(config, folder / "work/refine", NullTracker())
    (folder / "work/refine/out").rename(folder / "data/refined")
    histories = []
    for module, verb in ((stage1, "pretrain"), (stage2, "finetune")):
        work, out = folder / "work" / verb, folder / "models" / module.__name__.rsplit(".", 1)[1]
        (work / "out").mkdir(parents=True)
        module.run(config, work, NullTracker())
        shutil.rmtree(out, ignore_errors=True)
        (work / "out").rename(out)
        histories.append([json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()])
    return RefinedSplit(Path("data/refined/instruct")), histories


@pytest.mark.parametrize("off", MODULES)
def test_what_follows_a_module_that_is_off_still_runs(off, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refined, histories = run_everything(configuration(off), tmp_path)
    summary = io.read_json(Path("data/refined/summary.json"))
    width = 16
    assert (summary["detector_width"], summary["segmenter_width"]) == {
        "tagger": (width, width),
        "detector": (0, width),
        "segmenter": (width, 0),
    }[off]
    quality = summary["quality"]["instruct"]
    found = [image for image in refined.images.values() if image.tags]
    if off == "detector":
        assert not found and summary["splits"]["instruct"]["images_without_objects"] == PICTURES
        assert quality["recall"] == quality["box_ap"] == 0.0 and quality["mask_iou"] is None
    else:
        assert len(found) == PICTURES - 1 and quality["recall"] == quality["box_ap"] == pytest.approx(1.0)
    if off == "segmenter":
        assert {mask for image in found for mask in image.masks} == {""}
        assert quality["mask_iou"] is quality["mask_ap"] is None
    seen = refined.seen(refined.image_ids[0])
    count = len(refined.images[refined.image_ids[0]].tags)
    assert seen.detector_tokens_ND.shape == (count, summary["detector_width"])
    assert seen.segmenter_tokens_ND.shape == (count, summary["segmenter_width"])
    for history in histories:
        assert len(history) == 2
        losses = [value for row in history for name, value in row.items() if name.endswith("loss")]
        assert losses and all(math.isfinite(value) for value in losses)
