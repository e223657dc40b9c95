"""`refine.features: online` trains to the very curve of `cached`: both stages, a real encoder, real pictures."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_project
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from lyrics import io
from lyrics.data.webdataset import open_image
from lyrics.model import pretrained
from lyrics.model.vision import PREPROCESSING, ImageEncoder, Preprocessing, _FlatMap, load_image_encoder, timm_network
from lyrics.refiner import features
from lyrics.refiner.online import Looker
from lyrics.stage import NullTracker
from lyrics.train import stage1, stage2

CPU = torch.device("cpu")
STEPS, BATCH = 6, 5  # a batch of refine that divides neither a shard nor a batch of training


@pytest.fixture(autouse=True)
def as_before():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def write_pictures(seed):
    """A picture at the path of each of the small project's images."""
    draw = np.random.default_rng(seed)
    for split, count in small_project.SPLITS.items():
        folder = Path("data/raw") / split
        folder.mkdir(parents=True)
        for row in range(count):
            coarse = Image.fromarray(draw.integers(0, 255, (5, 5, 3), np.uint8))
            coarse.resize((40 + row, 40)).save(folder / f"{row}.png")


def write_encoder(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": small_project.IMAGE_WIDTH, "intermediate_size": 48, "image_size": 30, "patch_size": 15}
    pretrained.write(CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=3, num_attention_heads=2)), folder)
    io.write_json(folder / PREPROCESSING, Preprocessing(30, (0.5,) * 3, (0.3,) * 3).as_dict())


def see_again(dtype, kept):
    """The small project's shards with what the encoder sees in the pictures, in batches as `refine` has them."""
    encoder = load_image_encoder(stage1.FOUNDATION / "clip")
    for split in small_project.SPLITS:
        read = features.RefinedSplit(stage1.REFINED / split)
        pictures = []
        for start in range(0, len(read), BATCH):
            images = list(read.images.values())[start : start + BATCH]
            looked = encoder.look([open_image(image.path) for image in images], CPU, BATCH).numpy()
            pictures += [(i, local(read.seen(i.image_id), a)) for i, a in zip(images, looked, strict=True)]
        place = features.shard_folder(read.folder, 0)
        options = {"feature_dtype": dtype, "image_tokens": kept}
        features.write_shard(place, pictures, max_objects=small_project.MAX_OBJECTS, **options)


def local(seen, image_tokens_PD):
    detector_ND, segmenter_ND = (a.astype(np.float32) for a in (seen.detector_tokens_ND, seen.segmenter_tokens_ND))
    return features.Tokens(
        image_tokens_PD=image_tokens_PD, detector_tokens_ND=detector_ND, segmenter_tokens_ND=segmenter_ND
    )


def curves(config, folder):
    """What both stages write of their losses, and of stage 1's quality on held-out pictures."""
    found = {}
    for name, stage in (("stage1", stage1), ("stage2", stage2)):
        shutil.rmtree(folder / name, ignore_errors=True)
        stage.run(config, folder / name, NullTracker())
        lines = (folder / name / "out/history.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    return found | {"quality": io.read_json(folder / "stage1/out/quality.json")}


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_online_trains_to_the_curve_of_cached(dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_project.configuration(steps=STEPS)
    small_project.make(tmp_path, config)
    write_pictures(0)
    write_encoder(stage1.FOUNDATION / "clip")
    found = {}
    for how in ("cached", "online"):
        refine = dataclasses.replace(config.refine, features=how, feature_dtype=dtype, batch_size=BATCH)
        see_again(dtype, how == "cached")
        found[how] = curves(dataclasses.replace(config, refine=refine), tmp_path)
    assert found["online"] == found["cached"]
    assert len(found["online"]["stage1"]) == len(found["online"]["stage2"]) == STEPS
    shutil.rmtree("data/raw")
    write_pictures(1)
    other = curves(dataclasses.replace(config, refine=refine), tmp_path)
    assert other["stage1"] != found["cached"]["stage1"], "online reads the pictures that are there"


def efficient_net():
    torch.manual_seed(0)
    network = timm_network("efficientnet_lite0")
    for name, buffer in network.named_buffers():  # of random weights, whose activations would die out
        if name.endswith("running_var"):
            buffer.fill_(0.01)
    return ImageEncoder(
        _FlatMap(network), Preprocessing(64, (0.5,) * 3, (0.3,) * 3), width=320, grid=(2, 2), prefix_tokens=0
    )


def clip():
    write_encoder(Path("clip"))
    return load_image_encoder(Path("clip"))


@pytest.mark.parametrize("make", [clip, efficient_net])
def test_a_picture_is_the_same_bits_whatever_others_come_with_it(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(0)
    paths = [str(path) for path in sorted(Path("data/raw/instruct").iterdir())]
    look = Looker(make(), CPU, batch_size=8)
    whole = look(paths)
    assert whole.std() > 0.01 and len(np.unique(whole[:, 0], axis=0)) == len(paths)
    for some in ([0], [3, 1], [*range(13, -1, -1)], [5, 2, 8, 11, 0, 1, 9]):
        np.testing.assert_array_equal(look([paths[i] for i in some]), whole[some])
    with torch.autocast("cpu", torch.bfloat16):  # as a training step may be
        np.testing.assert_array_equal(look(paths[:3]), whole[:3])
