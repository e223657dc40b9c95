import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from benchmarks import refine
from lyrics import compose
from lyrics import config as schema
from lyrics.foundation import detector, sam, segmenter, yolo
from lyrics.foundation.regions import RegionHead, letterbox
from lyrics.io import write_json

ROOT = Path(__file__).parents[2]
SIDE = 64


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A detector and a segmenter of random weights, and noise of several sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lyrics.foundation.clip.load_clip", lambda *_: None)
    part = tmp_path / "models/foundation/detector"
    part.mkdir(parents=True)
    description = yaml.safe_load(Path(detector.__file__).with_name("yolo_small.yaml").read_text())
    model = yolo.build(description)
    torch.manual_seed(0)
    for head in model.model[-1].cv3:
        torch.nn.init.normal_(head[-1].weight, std=3.0)  # scores that differ
        torch.nn.init.zeros_(head[-1].bias)
    head = RegionHead(128, 32, 8)
    settings = {"yolo": description, "image_size_px": SIDE, "map_layers": [0, 2, 10], "map_channels": 128}
    write_json(part / "detector.json", {**settings, "hidden": 32, "width": 64, "vocabulary": ["star"]})
    save_file(model.state_dict(), part / "yolo.safetensors")
    save_file({**head.state_dict(), "vocabulary": torch.ones(1, 8)}, part / "regions.safetensors")
    part = part.with_name("segmenter")
    part.mkdir()
    size = segmenter.small(SIDE)
    write_json(part / "segmenter.json", {"source": "fitted", "size": dataclasses.asdict(size)})
    save_file(sam.BoxSam(size).state_dict(), part / "sam.safetensors")
    draw = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(64, 64), (64, 40), (32, 64), (64, 64), (50, 64)]):
        paths.append(tmp_path / f"{number}.png")
        coarse = Image.fromarray(draw.integers(0, 255, (height // 8, width // 8, 3), np.uint8))
        coarse.resize((width, height)).save(paths[-1])
    config = schema.parse(compose.preview(["~overrides", "preset=tiny", "data=world"], ROOT / "params/run.yaml"))
    pixels, _ = letterbox([Image.open(path) for path in paths], SIDE)
    threshold = float(model.eval()(pixels)[0][:, 4].detach().flatten().quantile(0.8))
    found = dataclasses.replace(config.foundation.detector, image_size_px=SIDE, score_threshold=threshold, nms_iou=0.6)
    foundation = dataclasses.replace(config.foundation, detector=found)
    few = dataclasses.replace(config.refine, batch_size=2)
    return dataclasses.replace(config, foundation=foundation, refine=few), paths


def test_both_programs_find_the_same_boxes(project):
    settings, paths = project
    square = [path for path in paths if Image.open(path).size == (SIDE, SIDE)]
    usual = refine.usual_loop(settings)(square)
    ours = refine.boxes_and_masks(settings)(square)
    assert all(0 < len(boxes) < 100 for boxes in usual), [len(boxes) for boxes in usual]
    assert refine.agreement(usual, ours) == 1.0
    threads = torch.get_num_threads()
    assert [len(boxes) for boxes in refine.boxes_and_masks(settings)(paths)][:1] == [len(ours[0])]
    assert torch.get_num_threads() == threads


def test_agreement_is_of_boxes_whatever_their_order():
    boxes = np.array([[0.0, 0, 10, 10], [5, 5, 20, 20]])
    none = np.zeros((0, 4))
    assert refine.agreement([boxes, none], [boxes[::-1] + 0.4, none]) == 1.0
    assert refine.agreement([boxes], [boxes + [0, 0, 0, 12]]) == 0.5
    assert refine.agreement([boxes], [boxes[:1]]) == 2 / 3
    assert refine.agreement([none], [boxes]) == refine.agreement([none], [none]) == 0.0


def test_the_table_compares_rounds():
    seconds = {refine.USUAL: [4.0, 8.0, 4.0], refine.OURS: [2.0, 2.0, 2.0], refine.WHOLE: [4.0, 4.0, 2.0]}
    memory = {name: [2**21, 2**20] for name in seconds}
    rows = refine.table({128: seconds}, {128: memory}, 8).splitlines()[2:]
    assert rows == [
        "| 128 px | the usual loop | 2.0 |  | 2 | 1 |",
        "| 128 px | ours, boxes and masks | 4.0 | 2.00 × | 2 | 1 |",
        "| 128 px | ours, all of refine | 2.0 | 2.00 × | 2 | 1 |",
    ]


def test_enlarged_pictures_are_whole_files(project, tmp_path):
    _, paths = project
    copies = refine.enlarged(paths[:2], 96, tmp_path / "copies")
    assert [Image.open(copy).size for copy in copies] == [(96, 96)] * 2
