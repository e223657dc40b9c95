"""Folders of the user, good and bad: what is wrong is set aside and counted, or refused in one sentence."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from lyrics.data import folders
from lyrics.data.annotated import read_split
from lyrics.data.webdataset import read_pairs
from lyrics.errors import InputError
from lyrics.io import sha256_tree

WEB = {"web": "train"}
TEST = {"test": "val"}


def rejected(raw):
    return {row["record"]: row["reason"] for row in pq.read_table(raw / "rejected.parquet").to_pylist()}


def test_a_good_folder_is_copied_byte_for_byte_and_nothing_is_rejected(tmp_path, make_split, ingest_folder):
    make_split(tmp_path / "in" / "train")
    make_split(tmp_path / "in" / "val", first_seed=10)
    raw = ingest_folder(tmp_path / "in", {"web": "train", "instruct": "train", "test": "val"})
    assert rejected(raw) == {}
    for name in "abc":
        source = (tmp_path / "in" / "train" / "images" / f"{name}.jpg").read_bytes()
        assert (raw / "instruct" / "images" / f"{name}.jpg").read_bytes() == source
    pairs = list(read_pairs(raw / "web" / "00000.tar"))
    assert [pair.caption for pair in pairs] == ["picture a.jpg", "picture b.jpg", "picture c.jpg"]
    found = read_split(raw / "test")
    assert found.rejected == []
    assert Counter(sample.task for sample in found.samples) == {"caption": 3, "vqa": 9, "pope": 18}
    for sample in found.samples:
        if "dog" in sample.question:
            assert sample.references[0] == ("1" if sample.kind == "count" else "yes")
        elif sample.task in ("vqa", "pope"):
            assert sample.references[0] == "no"
    again = ingest_folder(tmp_path / "in", {"web": "train", "instruct": "train", "test": "val"})
    assert sha256_tree(again) == sha256_tree(raw)


@pytest.mark.parametrize("missing", ["", "train", "train/images", "train/captions.json", "train/instances.json"])
def test_what_is_missing_is_named(tmp_path, make_split, ingest_folder, missing):
    make_split(tmp_path / "in" / "train")
    path = tmp_path / "in" / missing
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=str(path)):
        ingest_folder(tmp_path / "in", WEB)
    assert not list(tmp_path.glob("work*/**/*.*"))


def test_a_folder_without_permission_is_one_sentence(tmp_path, make_split, ingest_folder, monkeypatch):
    make_split(tmp_path / "in" / "train")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InputError, match=r"in/train/images/a\.jpg may not be read"):
        ingest_folder(tmp_path / "in", WEB)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "unusable image: not a picture"),
        (b"<html>404</html>", "unusable image: not a picture"),
        (None, "unusable image: broken picture: image file is truncated"),
    ],
)
def test_a_broken_or_truncated_jpeg_is_set_aside(tmp_path, make_split, ingest_folder, content, reason):
    make_split(tmp_path / "in" / "train")
    path = tmp_path / "in" / "train" / "images" / "b.jpg"
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    raw = ingest_folder(tmp_path / "in", {"web": "train", "instruct": "train"})
    assert list(rejected(raw)) == ["b.jpg"]
    assert rejected(raw)["b.jpg"].startswith(reason)
    assert json.loads((raw / "summary.json").read_text())["rejected"] == {"unusable image": 1}
    assert [image.path.rpartition("/")[2] for image in read_split(raw / "instruct").images] == ["a.jpg", "c.jpg"]


def test_a_caption_whose_image_is_missing_goes_with_it(tmp_path, make_split, ingest_folder):
    documents = make_split(tmp_path / "in" / "train")
    documents.captions["annotations"].append({"id": 9, "image_id": 77, "caption": "of nothing"})
    documents.save()
    (tmp_path / "in" / "train" / "images" / "c.jpg").unlink()
    raw = ingest_folder(tmp_path / "in", WEB)
    assert rejected(raw) == {
        "annotations[3]": "caption without image: 77 is not listed",
        "c.jpg": "missing image file: its captions and objects are set aside too",
    }
    assert len(list(read_pairs(raw / "web" / "00000.tar"))) == 2


def test_boxes_outside_are_rejected_and_boxes_over_the_edge_clipped(tmp_path, make_split, ingest_folder):
    documents = make_split(tmp_path / "in" / "val")
    boxes = [[-5, -5, 20, 20], [100, 100, 10, 10], [30, 20, 0, 5]]
    for record, box in zip(documents.instances["annotations"], boxes, strict=True):
        record["bbox"] = box
    documents.save()
    raw = ingest_folder(tmp_path / "in", TEST)
    assert [reason.partition(":")[0] for reason in rejected(raw).values()] == ["box outside image", "bad box"]
    boxes = [annotation.box_xyxy for image in read_split(raw / "test").images for annotation in image.annotations]
    assert boxes == [(0, 0, 15, 15)]
    assert json.loads((raw / "summary.json").read_text())["splits"]["test"]["clipped_boxes"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n "annotations": [}', r"captions\.json is not valid JSON: .* at line 2, column 18"),
        ("[1, 2]", r'captions\.json: expected a JSON object with a list "images", found list'),
        ('{"images": {}}', r'captions\.json: expected a JSON object with a list "images"'),
        ('{"images": [', r"captions\.json is not valid JSON: it ends in the middle at line 1, column 13"),
        ("[" * 100_000, r"captions\.json is not (usable|valid) JSON"),
    ],
)
def test_wrong_json_is_refused_with_file_and_place(tmp_path, make_split, ingest_folder, text, message):
    make_split(tmp_path / "in" / "train")
    (tmp_path / "in" / "train" / "captions.json").write_text(text)
    with pytest.raises(InputError, match=message):
        ingest_folder(tmp_path / "in", WEB)


def test_records_that_are_no_text_or_no_object_are_set_aside_alone(tmp_path, make_split, ingest_folder):
    make_split(tmp_path / "in" / "train")
    path = tmp_path / "in" / "train" / "captions.json"
    content = path.read_bytes().replace(b"picture a.jpg", b"picture \xff")
    path.write_bytes(content.replace(b'"annotations": [', b'"annotations": [3, '))
    raw = ingest_folder(tmp_path / "in", WEB)
    assert rejected(raw) == {
        "annotations[0]": "bad record: expected an object, found int",
        "annotations[1]": "not UTF-8 text: at byte 45 of the record",
    }
    path.write_bytes(content.decode("latin-1").encode("utf-16"))
    with pytest.raises(InputError, match=r"captions\.json is not UTF-8 text but UTF-16; save it as UTF-8"):
        ingest_folder(tmp_path / "in", WEB)


def test_an_empty_data_set_is_refused_before_anything_is_written(tmp_path, make_split, ingest_folder):
    make_split(tmp_path / "in" / "train")
    make_split(tmp_path / "in" / "val", names="")
    with pytest.raises(InputError, match="no usable image for test among 0 listed"):
        ingest_folder(tmp_path / "in", WEB | TEST)
    assert not list(tmp_path.glob("work*/**/*.*"))


def test_captions_all_empty_leave_no_pair(tmp_path, make_split, ingest_folder):
    documents = make_split(tmp_path / "in" / "train")
    for record in documents.captions["annotations"]:
        record["caption"] = "  "
    documents.save()
    with pytest.raises(InputError, match="no usable caption"):
        ingest_folder(tmp_path / "in", WEB)


@pytest.mark.parametrize("name", ["/etc/passwd", "../b.jpg", "x/../../b.jpg", "C:\\b.jpg", "", None, 7])
def test_names_that_leave_the_folder_are_rejected(tmp_path, make_split, ingest_folder, name):
    documents = make_split(tmp_path / "in" / "train")
    documents.captions["images"][1]["file_name"] = name
    documents.save()
    raw = ingest_folder(tmp_path / "in", {"instruct": "train"})
    assert rejected(raw)["images[1]"].startswith("unsafe file name")
    assert sorted(p.name for p in (raw / "instruct" / "images").iterdir()) == ["a.jpg", "c.jpg"]


def test_a_picture_in_two_splits_stays_in_the_one_that_measures(tmp_path, make_split, ingest_folder):
    make_split(tmp_path / "in" / "train")
    make_split(tmp_path / "in" / "val", names="d", first_seed=1)  # d.jpg has the pixels of train's b.jpg
    raw = ingest_folder(tmp_path / "in", {"web": "train", "instruct": "train", "test": "val"})
    reasons = pq.read_table(raw / "rejected.parquet").to_pylist()
    assert {row["record"] for row in reasons} == {"b.jpg"}
    assert {row["source"] for row in reasons} == {"train/images"}
    assert all(row["reason"].startswith("shared between splits: the same picture is in test") for row in reasons)
    assert [pair.caption for pair in read_pairs(raw / "web" / "00000.tar")] == ["picture a.jpg", "picture c.jpg"]


def test_a_listed_size_that_the_file_contradicts_is_set_aside(tmp_path, make_split, ingest_folder):
    documents = make_split(tmp_path / "in" / "train")
    documents.captions["images"][0].update(width=30, height=40)
    documents.save()
    raw = ingest_folder(tmp_path / "in", WEB)
    assert rejected(raw) == {"a.jpg": "wrong size: listed 30 x 40, stored 40 x 30"}


def test_exif_orientation_does_not_turn_what_boxes_refer_to(tmp_path, make_split, ingest_folder):
    make_split(tmp_path / "in" / "train")
    path = tmp_path / "in" / "train" / "images" / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.open(path).save(path, exif=exif, quality=95)
    raw = ingest_folder(tmp_path / "in", {"instruct": "train"})
    assert rejected(raw) == {}
    image = read_split(raw / "instruct").images[0]
    assert (image.width, image.height) == (40, 30)


@pytest.mark.parametrize("splits", [{}, {"train": "train"}])
def test_unknown_splits_are_refused(tmp_path, make_split, ingest_folder, splits):
    make_split(tmp_path / "in" / "train")
    with pytest.raises(InputError, match=r"data\.splits names .*; expected some of foundation, instruct"):
        ingest_folder(tmp_path / "in", splits)


def test_max_images_takes_the_first_usable_ones(tmp_path, make_split, ingest_folder):
    make_split(tmp_path / "in" / "train", names="abcd")
    (tmp_path / "in" / "train" / "images" / "a.jpg").write_bytes(b"")
    raw = ingest_folder(tmp_path / "in", {"instruct": "train"}, max_images=2)
    assert sorted(p.name for p in (raw / "instruct" / "images").iterdir()) == ["b.jpg", "c.jpg"]


def test_near_copies_of_held_out_pictures_are_not_trained_on(tmp_path, make_split, ingest_folder):
    """The same picture smaller and stored again: other pixels, which look the same."""
    make_split(tmp_path / "in" / "val", names="abc", first_seed=10)
    train = make_split(tmp_path / "in" / "train", names="defg")
    with Image.open(tmp_path / "in/val/images/b.jpg") as original:
        original.resize((36, 27)).save(tmp_path / "in/train/images/f.jpg", quality=70)
    train.captions["images"][2] |= {"width": 36, "height": 27}
    train.save()
    raw = ingest_folder(tmp_path / "in", {"web": "train", "instruct": "train", "val": "val"})
    assert rejected(raw) == {"f.jpg": "leaked: the picture looks like val/b.jpg"}
    assert [image.path.rpartition("/")[2] for image in read_split(raw / "instruct").images] == [
        "d.jpg",
        "e.jpg",
        "g.jpg",
    ]
    assert (
        len(list(read_pairs(raw / "web" / "00000.tar"))) == 4
    )  # of web pairs clean sets it aside, by its own parameter
    assert len(read_split(raw / "val").images) == 3


def test_folders_that_the_pipeline_names_are_there_without_such_a_split(tmp_path, make_split, ingest_folder):
    make_split(tmp_path / "in" / "train")
    raw = ingest_folder(tmp_path / "in", {"instruct": "train"})
    assert [path.name for path in (raw / "foundation").iterdir()] == ["absent.txt"]
    assert "nothing to clean" in (raw / "web" / "absent.txt").read_text()


def test_real_photographs(shared, ingest_folder):
    raw = ingest_folder(shared("photos"), {"web": "train", "instruct": "train", "test": "val"}, max_images=8)
    assert rejected(raw) == {}
    assert len(list(read_pairs(raw / "web" / "00000.tar"))) == 8
    found = read_split(raw / "test")
    assert len(found.images) == 8
    assert found.rejected == []
    answers = Counter((s.task, s.references[0]) for s in found.samples if s.task == "pope" or s.kind == "exists")
    assert answers["pope", "yes"] == answers["pope", "no"] > 0
    assert answers["vqa", "yes"] == answers["vqa", "no"] > 0
    for image in found.images:
        present = {annotation.category for annotation in image.annotations}
        for sample in found.samples:
            if sample.image_id == image.image_id and sample.task == "pope":
                name = sample.question.removesuffix(" in the image?").partition(" ")[2].removeprefix("there ")
                assert (name.partition(" ")[2] in present) == (sample.references == ("yes",)), sample


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dog", "dogs"), ("person", "people"), ("bus", "buses"), ("wine glass", "wine glasses"), ("knife", "knives")]
    + [("sheep", "sheep"), ("scissors", "scissors"), ("toothbrush", "toothbrushes"), ("couch", "couches")]
    + [("hot dog", "hot dogs"), ("cherry", "cherries"), ("toy", "toys"), ("mouse", "mice")],
)
def test_plurals(name, expected):
    assert folders.plural(name) == expected


def test_text_ids_and_names_with_folders_are_good_names(tmp_path, make_split, ingest_folder):
    documents = make_split(tmp_path / "in" / "val")
    images = tmp_path / "in" / "val" / "images"
    for letter, folder in (("a", "x"), ("b", "y")):  # one base name in two folders
        (images / folder).mkdir()
        (images / f"{letter}.jpg").rename(images / folder / "1.jpg")
    for image, name in zip(documents.captions["images"], ("x/1.jpg", "y/1.jpg", "c.jpg"), strict=True):
        image |= {"id": f"flickr_{image['id']}", "file_name": name}
    for one in documents.captions["annotations"] + documents.instances["annotations"]:
        one["image_id"] = f"flickr_{one['image_id']}"
    documents.save()
    raw = ingest_folder(tmp_path / "in", TEST)
    found = read_split(raw / "test")
    assert found.rejected == [] and rejected(raw) == {}
    assert Counter(sample.task for sample in found.samples) == {"caption": 3, "vqa": 9, "pope": 18}
    assert len({sample.sample_id for sample in found.samples}) == 30
    assert {sample.image_id for sample in found.samples} == {"flickr_1", "flickr_2", "flickr_3"}


def test_what_is_no_number_or_text_among_objects_does_not_stop_the_rest(tmp_path, make_split, ingest_folder):
    documents = make_split(tmp_path / "in" / "train")
    documents.instances["annotations"][0]["area"] = float("nan")
    documents.instances["categories"][0] |= {"name": " dog\ud83d ", "keypoints": ["nose"]}
    documents.save()
    raw = ingest_folder(tmp_path / "in", {"instruct": "train"})
    written = json.loads((raw / "instruct" / "instances.json").read_text())
    assert [one.get("area") for one in written["annotations"]] == [None, 100, 100]
    assert written["categories"][0] == {"id": 1, "name": "dog\ufffd"}
    objects = [item for image in read_split(raw / "instruct").images for item in image.annotations]
    assert {item.category for item in objects} == {"dog\ufffd"}
