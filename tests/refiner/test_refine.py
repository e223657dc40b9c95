import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_backends import FakeEncoder, fake_refiner
from PIL import Image
from pycocotools import mask as coco_mask

from lyrics import io
from lyrics.config import Engine
from lyrics.data.records import Annotation
from lyrics.data.webdataset import WebPair, open_image, write_tar
from lyrics.errors import InputError
from lyrics.foundation import masks
from lyrics.refiner import features, quality, refine
from lyrics.refiner.features import RefinedSplit
from lyrics.refiner.online import Looker
from lyrics.stage import NullTracker

ONE_WORKER = Engine(kind="local", address=None, workers=1, threads_per_worker=1, gpus_per_worker=0, retries=0)
SIZES = [(40, 20), (30, 30), (16, 64), (64, 48), (20, 20)]


def picture(index):
    """A bright rectangle for each of index % 3 channels, on black."""
    width, height = SIZES[index % len(SIZES)]
    pixels = np.zeros((height, width, 3), np.uint8)
    for channel in range(index % 3):
        left = channel * width // 2
        pixels[2:-2, left + 1 : left + width // 2 - 1, channel] = 255
    return Image.fromarray(pixels)


def png(image):
    import io as stdio

    buffer = stdio.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_split(folder, count):
    images = [{"id": n, "file_name": f"{n}.png", "width": w, "height": h} for n, (w, h) in enumerate(_sizes(count))]
    (folder / "images").mkdir(parents=True)
    for image in images:
        picture(image["id"]).save(folder / "images" / image["file_name"])
    texts = [{"id": n, "image_id": n, "caption": f"caption {n}"} for n in range(count)]
    annotations = []
    for n in range(count):
        for box, tag in _truth(n):
            annotations.append({"id": len(annotations), "image_id": n, "category_id": tag, "bbox": box, "iscrowd": 0})
            annotations[-1]["area"] = box[2] * box[3]
            x, y, w, h = box
            annotations[-1]["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    categories = [{"id": 0, "name": "red thing"}, {"id": 1, "name": "green thing"}]
    io.write_json(folder / "captions.json", {"images": images, "annotations": texts})
    io.write_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})


def _sizes(count):
    return [SIZES[n % len(SIZES)] for n in range(count)]


def _truth(n):
    width, height = SIZES[n % len(SIZES)]
    return [([c * (width // 2) + 1, 2, width // 2 - 2, height - 4], c) for c in range(n % 3)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Seven web pairs in two tars and a test split of five, all of different sizes, some without an object."""
    monkeypatch.chdir(tmp_path)
    pairs = [WebPair(key=f"w{n}", image_bytes=png(picture(n)), caption=f" pair {n} ", meta={}) for n in range(7)]
    write_tar(Path("data/clean/00000.tar"), pairs[:4])
    write_tar(Path("data/clean/00001.tar"), pairs[4:])
    write_split(Path("data/raw/test"), 5)
    return tmp_path


NO_PARTS = SimpleNamespace(tagger=None, detector=None)


def run(work, monkeypatch, encoder=None, refiner=None):
    encoder, refiner = encoder or FakeEncoder(), refiner or fake_refiner()
    monkeypatch.setattr(refine, "load_image_encoder", lambda folder: encoder)
    monkeypatch.setattr(refine, "load_refiner", lambda *_: refiner)
    work.mkdir(parents=True, exist_ok=True)
    config = SimpleNamespace(refine=refiner.settings, foundation=NO_PARTS, device="cpu", engine=ONE_WORKER)
    refine.run(config, work, NullTracker())
    return work / "out"


def test_the_refiner_on_pictures_of_different_sizes():
    images = [picture(n) for n in range(6)]
    found = fake_refiner().refine(images)
    assert [len(objects.tags) for objects in found] == [n % 3 for n in range(6)]
    for image, objects in zip(images, found, strict=True):
        assert len(objects.masks) == len(objects.tags)
        assert all(masks.decode(counts, image.height, image.width).any() for counts in objects.masks)
        assert objects.detector_tokens_ND.shape == (len(objects.tags), 3)
        assert objects.segmenter_tokens_ND.shape == (len(objects.tags), 2)
    assert found[0].spatial_text == ""
    assert found[5].tags == ("red thing", "green thing")
    assert found[5].spatial_text == "red thing 2 10 47 90; green thing 52 10 97 90;"
    assert fake_refiner().refine([]) == []


def test_a_run_writes_what_the_refiner_saw(project, monkeypatch):
    out = run(project / "work", monkeypatch)
    web, test = RefinedSplit(out / "web"), RefinedSplit(out / "test")
    assert web.image_ids == [f"w{n}" for n in range(7)] and test.image_ids == [str(n) for n in range(5)]
    assert [sample.references for sample in web.samples] == [(f"pair {n}",) for n in range(7)]
    assert [sample.image_id for sample in test.samples if sample.task == "caption"] == test.image_ids
    for split in (web, test):
        for index, (image_id, image) in enumerate(split.images.items()):
            opened = open_image(image.path)
            expected = fake_refiner().refine([picture(index)])[0]
            assert opened.size == (image.width, image.height) == picture(index).size
            assert image.tags == expected.tags and image.spatial_text == expected.spatial_text
            for counts, mask in zip(image.masks, expected.masks, strict=True):
                decoded = coco_mask.decode({"size": [image.height, image.width], "counts": counts})
                np.testing.assert_array_equal(decoded.astype(bool), masks.decode(mask, image.height, image.width))
            seen = split.seen(image_id)
            tokens = FakeEncoder()(FakeEncoder().preprocess([opened]))[0].numpy().astype(np.float16)
            np.testing.assert_array_equal(seen.image_tokens_PD, tokens)
            np.testing.assert_array_equal(seen.detector_tokens_ND, expected.detector_tokens_ND.astype(np.float16))
    summary = io.read_json(out / "summary.json")
    assert (summary["image_width"], summary["detector_width"], summary["segmenter_width"]) == (3, 3, 2)
    assert summary["splits"]["web"]["images"] == 7 and summary["splits"]["web"]["objects"] == 6
    assert summary["splits"]["test"]["images_without_objects"] == 2
    figures = ["box_recall", "box_precision", "recall", "precision", "tag_accuracy", "mask_iou"]
    figures += ["box_ap", "box_ap50", "box_ap75", "box_ap_small", "mask_ap"]
    assert summary["quality"] == {
        "test": {**dict.fromkeys(figures, pytest.approx(1.0)), "box_ap_medium": None, "box_ap_large": None}
    }


def test_a_killed_run_keeps_its_shards_and_ends_with_the_same_bytes(project, monkeypatch):
    whole = run(project / "whole", monkeypatch)

    class Stopping(FakeEncoder):
        def __call__(self, pixels):
            if self.images >= 4:  # in the second shard
                raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        run(project / "work", monkeypatch, Stopping())
    encoder = FakeEncoder()
    again = run(project / "work", monkeypatch, encoder)
    assert encoder.images == 7 + 5 - 3  # the first shard of three was not computed again
    assert io.sha256_tree(again) == io.sha256_tree(whole)


def test_nothing_depends_on_how_shards_are_cut(project, monkeypatch):
    small = RefinedSplit(run(project / "small", monkeypatch) / "web")
    large = RefinedSplit(run(project / "large", monkeypatch, refiner=fake_refiner(images_per_shard=100)) / "web")
    assert (small.images["w6"].shard, large.images["w6"].shard) == (2, 0)
    for image_id in small.image_ids:
        np.testing.assert_array_equal(small.seen(image_id).image_tokens_PD, large.seen(image_id).image_tokens_PD)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_online_sees_what_cached_keeps(project, monkeypatch, dtype):
    outs = {
        how: run(project / how, monkeypatch, refiner=fake_refiner(features=how, feature_dtype=dtype))
        for how in ("cached", "online")
    }
    assert not list(outs["online"].rglob("image_tokens*")) and list(outs["cached"].rglob("image_tokens.npy"))
    for name in ("web", "test"):
        cached = RefinedSplit(outs["cached"] / name)
        online = RefinedSplit(outs["online"] / name, Looker(FakeEncoder(), torch.device("cpu"), batch_size=2))
        assert cached.images == online.images
        ids = [*reversed(cached.image_ids), cached.image_ids[0]]
        for one, other in zip(cached.see(ids), online.see(ids), strict=True):
            for key, value in vars(one).items():
                np.testing.assert_array_equal(value, getattr(other, key), err_msg=key)
    summaries = [io.read_json(out / "summary.json") for out in outs.values()]
    assert [summary.pop("features") for summary in summaries] == ["cached", "online"]
    assert summaries[0] == summaries[1] and summaries[0]["feature_dtype"] == dtype


def test_a_picture_that_online_cannot_open_is_refused_by_name(project):
    Path("data/raw/test/images/3.png").write_bytes(b"junk")
    look = Looker(FakeEncoder(), torch.device("cpu"), batch_size=2)
    with pytest.raises(InputError, match=r"images/3\.png cannot be used .*python -m lyrics ingest"):
        look(["data/raw/test/images/2.png", "data/raw/test/images/3.png"])
    with pytest.raises(InputError, match=r"images/9\.png cannot be read"):
        look(["data/raw/test/images/9.png"])


def test_the_oracle_reads_the_annotations_of_web_pairs(project, monkeypatch):
    rle = {"size": [30, 30], "counts": "abc"}
    meta = {"annotations": [{"category": "cat", "bbox": [1, 2, 3, 4], "rle": rle}]}
    write_tar(Path("data/clean/00000.tar"), [WebPair(key="a", image_bytes=png(picture(1)), caption="c", meta=meta)])
    records = list(next(refine.read_sources()).images)
    assert records[0].annotations == (Annotation(category="cat", box_xyxy=(1, 2, 4, 6), rle=rle),)
    assert records[1].annotations == ()


def test_bad_input_is_refused_by_name(project, monkeypatch):
    Path("data/raw/test/images/3.png").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"data/raw/test/images/3\.png cannot be used"):
        run(project / "work", monkeypatch)


def test_repeated_keys_are_refused(project):
    write_tar(Path("data/clean/00002.tar"), [WebPair(key="w0", image_bytes=png(picture(1)), caption="c", meta={})])
    with pytest.raises(InputError, match="1 keys more than once, first w0"):
        list(next(refine.read_sources()).images)


def test_no_input_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="python -m lyrics ingest"):
        next(refine.read_sources())


def test_quality_counts_each_annotation_once():
    image = features.RefinedImage(
        **dict.fromkeys(("captions",), ()),
        image_id="a",
        path="a",
        width=100,
        height=100,
        tags=("star", "star", "moon"),
        boxes_xyxy=((0, 0, 10, 10), (0, 0, 10, 9), (50, 50, 60, 60)),
        scores=(0.9, 0.8, 0.7),
        masks=masks.encode(np.zeros((3, 100, 100), bool)),
        spatial_text="",
        shard=0,
        row=0,
    )
    truth = (
        Annotation(category="star", box_xyxy=(0, 0, 10, 10)),
        Annotation(category="sun", box_xyxy=(50, 50, 60, 61)),
        Annotation(category="sun", box_xyxy=(80, 80, 90, 90)),
    )
    measured = quality.measure([(image, truth)])
    assert {name: value for name, value in measured.items() if "_ap" not in name} == {
        "box_recall": 2 / 3,
        "box_precision": 2 / 3,
        "recall": 1 / 3,
        "precision": 1 / 3,
        "tag_accuracy": 0.5,
        "mask_iou": None,
    }
    assert measured["box_ap"] == pytest.approx(0.5) and measured["mask_ap"] is None  # stars 1, suns 0
    empty = dataclasses.replace(image, tags=(), boxes_xyxy=(), scores=(), masks=())
    assert quality.measure([(empty, ())])["precision"] is None
