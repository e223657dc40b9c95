"""Data sets of several formats together, from their files to what the pipeline reads."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_files import jpeg, save, save_lines, tar_of

from lyrics.config import Data, FileSet
from lyrics.data import ingest, pictures
from lyrics.data.annotated import read_split
from lyrics.data.webdataset import read_pairs
from lyrics.errors import InputError
from lyrics.io import sha256_tree
from lyrics.stage import NullTracker


@pytest.fixture
def ingested(tmp_path):
    """Ingest data sets below tmp_path / in; returns data/raw."""

    def run(*sets: dict, max_images: int | None = None) -> Path:
        work = tmp_path / f"work{len(list(tmp_path.glob('work*')))}"
        work.mkdir()
        chosen = tuple(FileSet(**one) for one in sets)
        data = Data(
            source="files",
            folder=str(tmp_path / "in"),
            splits={},
            sets=chosen,
            max_images=max_images,
            leak_hamming_bits=24,
        )
        ingest.run(SimpleNamespace(seed=0, data=data), work, NullTracker())
        return work / "out"

    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "images").mkdir(parents=True)
    return tmp_path / "in"


def draw(folder: Path, name: str, seed: int) -> str:
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(seed))
    return name


def rejected(raw: Path) -> list[tuple[str, str, str]]:
    rows = pq.read_table(raw / "rejected.parquet").to_pylist()
    return [(row["source"], row["record"], row["reason"]) for row in rows]


def everything(folder: Path) -> list[dict]:
    """Eight data sets in as many formats; picture 5 is in training and in the test set, under two names."""
    for number in range(1, 8):
        draw(folder, f"COCO_train2014_{number:012d}.jpg", number)
    draw(folder, "flickr/dog.jpg", 20)
    draw(folder, "flickr/five.jpg", 5)
    draw(folder, "VG_100K/9.jpg", 9)
    tokens = [
        f"{name}#{i}\ta caption {i} of {name}\n" for name in ("dog.jpg", "five.jpg", "gone.jpg") for i in range(2)
    ]
    (folder / "tokens.txt").write_text("".join(tokens))
    questions = [{"question_id": i, "image_id": i, "question": f"Who is {i}?"} for i in (1, 2, 5, 99)]
    answers = [{"question_id": i, "image_id": i, "answers": [{"answer": str(i)}] * 10} for i in (1, 2, 5, 99)]
    first = "COCO_train2014_000000000001.jpg"
    dialogue = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A dog."}]
    expression = {"expression": "the dog", "width": 40, "height": 30}
    lines = [
        {**expression, "img_path": "COCO_train2014_000000000001.jpg", "bbox": [1, 2, 90, 20]},
        {**expression, "img_path": "COCO_train2014_000000000002.jpg", "bbox": [50, 2, 90, 20]},
        {**expression, "img_path": "COCO_train2014_000000000003.jpg", "bbox": [1, 2, 9, 20], "width": 41},
    ]
    region = {"x": 0, "y": 0, "width": 5, "height": 5, "phrase": "a clock"}
    regions = [{"id": 9, "regions": [region | {"region_id": 1}, region | {"region_id": 2, "x": 100}]}]
    asked = [{"image": "COCO_val2014_000000000004.jpg", "text": "Is there a dog?", "label": "no"}]
    images = [{"id": 6, "file_name": "COCO_train2014_000000000006.jpg", "width": 40, "height": 30}]
    described = [{"image_id": 6, "caption": "a cat"}, {"image_id": 6, "caption": "one cat"}]
    objects = [{"image_id": 6, "category_id": 3, "bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 6, 1, 6, 6]]}]
    shown = jpeg(30)
    tar_of(
        folder / "web.tar",
        ("000.jpg", shown),
        ("000.txt", b"a web picture"),
        ("001.jpg", jpeg(20)),
        ("001.txt", b"leaked"),
        ("002.jpg", b"no picture"),
        ("002.json", b'{"caption": "broken"}'),
        ("003.jpg", shown),
        ("../004.jpg", shown),
    )
    coco = {"images": images, "annotations": described}
    return [
        {"format": "webdataset", "path": "web.tar", "split": "web"},
        {
            "format": "coco",
            "path": save(folder / "captions.json", coco),
            "annotations": save(
                folder / "instances.json",
                {"images": images, "annotations": objects, "categories": [{"id": 3, "name": "cat"}]},
            ),
            "images": "images",
            "split": "web",
        },
        {
            "format": "vqa",
            "path": save(folder / "q.json", {"questions": questions}),
            "annotations": save(folder / "a.json", {"annotations": answers}),
            "images": "images",
            "split": "instruct",
        },
        {
            "format": "refcoco_lines",
            "path": save_lines(folder / "r.jsonl", lines),
            "images": "images",
            "split": "instruct",
        },
        {
            "format": "llava",
            "path": save(folder / "chat.json", [{"id": "a", "image": f"coco/{first}", "conversations": dialogue}]),
            "images": "images",
            "split": "instruct",
            "name": "talks",
        },
        {"format": "visual_genome", "path": save(folder / "vg.json", regions), "images": "images"}
        | {"split": "instruct"},
        {"format": "flickr", "path": "tokens.txt", "images": "images/flickr", "split": "test"},
        {
            "format": "pope",
            "path": save_lines(folder / "coco_pope_random.json", asked),
            "images": "images",
            "split": "test",
        },
    ]


def test_several_formats_together(folder, ingested):
    sets = everything(folder)
    raw = ingested(*sets)
    test, instruct = read_split(raw / "test"), read_split(raw / "instruct")
    assert test.rejected == instruct.rejected == []
    assert [(i.captions, i.width, i.height) for i in test.images] == [
        (("a caption 0 of dog.jpg", "a caption 1 of dog.jpg"), 40, 30),
        (("a caption 0 of five.jpg", "a caption 1 of five.jpg"), 40, 30),
    ]
    found = {(s.task, s.source, s.question or s.turns, s.references, s.box_xyxy) for s in instruct.samples}
    assert found == {
        ("vqa", "vqa", "Who is 1?", ("1",) * 10, None),
        ("vqa", "vqa", "Who is 2?", ("2",) * 10, None),
        ("refer", "refcoco_lines", "the dog", (), (1, 2, 40, 20)),
        ("refer", "visual_genome", "a clock", (), (0, 0, 5, 5)),
        ("chat", "talks", (("Who?", "A dog."),), (), None),
    }
    assert len({sample.sample_id for sample in instruct.samples}) == len(instruct.samples)
    assert len(instruct.images) == 3  # 1, 2 and 9; of 3 there is one record, which states another size
    pairs = [pair for tar in sorted((raw / "web").glob("*.tar")) for pair in read_pairs(tar)]
    assert [(pair.key, pair.caption, pair.meta["source"]) for pair in pairs] == [
        ("000000000", "a web picture", "webdataset"),
        ("000000001", "broken", "webdataset"),
        ("000000002", "a cat", "coco"),
    ]
    assert pairs[2].meta["annotations"][0]["category"] == "cat"
    assert pairs[2].meta["annotations"][0]["rle"]["size"] == [30, 40]
    shared = "shared between splits: the same picture is in test, so not in"
    assert rejected(raw) == [
        ("tokens.txt", "line 5", "missing image file: 'gone.jpg'"),
        ("tokens.txt", "line 6", "missing image file: 'gone.jpg'"),
        ("coco_pope_random.json", "line 1", "missing image file: 'COCO_val2014_000000000004.jpg'"),
        ("q.json", "questions[2]", f"{shared} instruct"),
        ("q.json", "questions[3]", "missing image file: '99'"),
        ("r.jsonl", "line 2", "box outside image: (50.0, 2.0, 90.0, 20.0) in 40 x 30"),
        ("r.jsonl", "line 3", "wrong size: listed 41 x 30, stored 40 x 30"),
        ("vg.json", "[0]", "box outside image: (100.0, 0.0, 105.0, 5.0) in 40 x 30"),
        ("web.tar", "byte 3072", f"{shared} web"),
        ("web.tar", "byte 10240", "unsafe member name: '../004.jpg'"),
        ("web.tar", "byte 8192", "no caption: web pairs need one"),
    ]
    summary = json.loads((raw / "summary.json").read_text())
    assert summary["rejected"]["missing image file"] == 4
    assert summary["splits"]["instruct"]["images"] == 3
    assert sha256_tree(ingested(*sets)) == sha256_tree(raw)


def test_flickr8k_with_22_of_its_photographs(shared, ingested, tmp_path):
    """The absent ones are counted, caption by caption; a list of names chooses the split."""
    (tmp_path / "in").symlink_to(shared("formats/flickr8k"))
    entry = {"format": "flickr", "path": "Flickr8k.token.txt.gz", "images": "Images"}
    raw = ingested(
        {**entry, "split": "instruct", "annotations": "Flickr_8k.trainImages.txt"},
        {**entry, "split": "val", "annotations": "Flickr_8k.devImages.txt"},
    )
    summary = json.loads((raw / "summary.json").read_text())
    assert summary["splits"]["instruct"]["images"] + summary["splits"]["val"]["images"] <= 22
    captions = sum(split["captions"] for split in summary["splits"].values())
    assert captions + summary["rejected"]["missing image file"] == 35_000
    assert {len(image.captions) for image in read_split(raw / "instruct").images} == {5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "gone.json"}, r"in/gone\.json does not exist; correct data\.sets"),
        ({"images": "gone"}, r"in/gone is not a folder; expected the images of pope\.json there"),
        ({"format": "vqa"}, r"data\.sets: pope\.json \(vqa\) needs the annotations as well"),
        ({"format": "webdataset", "path": "images"}, r"in/images holds no \.tar and is none"),
        ({}, r"nothing usable for the split test in pope\.json; set aside: 1 missing image file"),
    ],
)
def test_what_is_missing_or_unusable_is_named(folder, ingested, change, message):
    save_lines(folder / "pope.json", [{"image": "gone.jpg", "text": "Is there a dog?", "label": "no"}])
    entry = {"format": "pope", "path": "pope.json", "images": "images", "split": "test"}
    with pytest.raises(InputError, match=message):
        ingested({**entry, **change})
    with pytest.raises(InputError, match=r"data\.sets is empty; name your data sets in params/data/files\.yaml"):
        ingested()


def test_max_images_keeps_the_first_pictures_and_all_that_is_said_of_them(folder, ingested):
    lines = [
        {"question_id": 10 * i + j, "image": draw(folder, f"{i}.jpg", i), "text": f"Is there a {j}?", "label": "no"}
        for j in range(2)
        for i in range(4)
    ]
    entry = {"format": "pope", "path": save_lines(folder / "pope.json", lines), "images": "images", "split": "test"}
    web = {"format": "webdataset", "path": "w.tar", "split": "web"}
    tar_of(folder / "w.tar", *((f"{i}.{kind}", b"x") for i in range(5) for kind in ("jpg", "txt")))
    raw = ingested(entry, web, max_images=2)
    assert len(read_split(raw / "test").images) == 2
    assert len(read_split(raw / "test").samples) == 4
    assert len(list(read_pairs(raw / "web" / "00000.tar"))) == 2
    assert rejected(raw) == []


def test_the_same_record_twice_is_set_aside_and_the_same_id_for_another_is_not(folder, ingested):
    line = {"question_id": 1, "image": draw(folder, "1.jpg", 1), "text": "Is there a dog?", "label": "no"}
    path = save_lines(folder / "pope.json", [line, line, {**line, "text": "Is there a cat?"}])
    raw = ingested({"format": "pope", "path": path, "images": "images", "split": "test"})
    assert [sample.sample_id for sample in read_split(raw / "test").samples] == ["pope-1", "pope-2"]
    assert rejected(raw) == [("pope.json", "line 2", "repeated record: pope-1 says the same again")]


def test_one_picture_under_two_names_is_one_picture(folder, ingested):
    names = [draw(folder, name, 1) for name in ("a.jpg", "b.jpg")]
    lines = [{"question_id": i, "image": name, "text": "Is it?", "label": "no"} for i, name in enumerate(names)]
    path = save_lines(folder / "pope.json", lines)
    raw = ingested({"format": "pope", "path": path, "images": "images", "split": "test"})
    assert [len(read_split(raw / "test").images), len(read_split(raw / "test").samples)] == [1, 2]


def test_near_copies_of_held_out_pictures_are_not_trained_on(folder, ingested):
    """Stored again, smaller: other pixels, which look the same."""
    names = [draw(folder, name, seed) for name, seed in (("measured.jpg", 1), ("own.jpg", 2))]
    with Image.open(folder / "images" / names[0]) as original:
        original.resize((36, 27)).save(folder / "images" / "copy.jpg", quality=70)
    ask = {"text": "Is it?", "label": "no"}
    test = save_lines(folder / "test.json", [{"question_id": 1, "image": names[0], **ask}])
    lines = [{"question_id": n, "image": name, **ask} for n, name in enumerate(("copy.jpg", names[1]), start=2)]
    train = save_lines(folder / "train.json", lines)
    entry = {"format": "pope", "images": "images"}
    raw = ingested({**entry, "path": train, "split": "instruct"}, {**entry, "path": test, "split": "test"})
    assert rejected(raw) == [("train.json", "line 1", "leaked: the picture looks like test/measured.jpg")]
    assert len(read_split(raw / "instruct").images) == len(read_split(raw / "test").images) == 1


def test_a_picture_that_found_no_room_in_the_test_set_may_be_trained_on(folder, ingested, monkeypatch):
    """And it is decoded once, however many questions ask about it."""
    names = [draw(folder, name, seed) for seed, name in enumerate(("a.jpg", "b.jpg"))]
    asked = [{"image": name, "text": "Is there a dog?", "label": "no"} for name in names]
    asked += [{**asked[1], "text": f"Is there a cat {i}?"} for i in range(5)]
    test = {"format": "pope", "path": save_lines(folder / "pope.json", asked), "images": "images", "split": "test"}
    (folder / "captions.txt").write_text("b.jpg#0\ta picture\n")
    trained = {"format": "flickr", "path": "captions.txt", "images": "images", "split": "instruct"}
    decoded = []
    real = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda content: decoded.append(content) or real(content))
    raw = ingested(test, trained, max_images=1)
    assert rejected(raw) == []
    assert [image.captions for image in read_split(raw / "instruct").images] == [("a picture",)]
    assert len(decoded) == 3


def test_a_name_that_stands_twice_in_a_tar_is_two_pictures(folder, ingested):
    members = []
    for key, seed in (("0", 1), ("1", 2), ("0", 3)):  # as `tar --concatenate` leaves it
        members += [(f"{key}.jpg", jpeg(seed)), (f"{key}.txt", b"is %d" % seed)]
    tar_of(folder / "a.tar", *members)
    raw = ingested({"format": "webdataset", "path": "a.tar", "split": "val"})
    images = read_split(raw / "val").images
    assert [image.captions for image in images] == [("is 1",), ("is 2",), ("is 3",)]
    assert [Path(image.path).read_bytes() for image in images] == [jpeg(1), jpeg(2), jpeg(3)]


def test_a_packed_tar_has_its_table_beside_it_too(folder, ingested):
    tar_of(folder / "0.tar", ("a.jpg", jpeg(1)))
    (folder / "0.tar.gz").write_bytes(gzip.compress((folder / "0.tar").read_bytes()))
    (folder / "0.tar").unlink()
    pq.write_table(pa.table({"key": ["a"], "caption": ["from the table"]}), folder / "0.parquet")
    raw = ingested({"format": "webdataset", "path": "0.tar.gz", "split": "val"})
    assert [image.captions for image in read_split(raw / "val").images] == [("from the table",)]
