"""Each reader on its real file where there is one beside the project, else on a small file of the published schema."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_files import divided

from lyrics.data import coco, pope, refcoco, vqa
from lyrics.data.files import decode
from lyrics.data.readers import coco_sets, flickr, llava_context, mme, questions, refer, tars, url_lists, visual_genome


def samples_of(found):
    records, rejected = divided(found)
    assert rejected == []
    return [sample for record in records for sample in record.samples]


def save(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


# Real files


def test_flickr8k_has_five_captions_for_each_of_8092_pictures(shared):
    folder = shared("formats/flickr8k")
    records, rejected = divided(flickr.each(folder / "Flickr8k.token.txt.gz"))
    assert rejected == []
    names = {record.images[0] for record in records}
    assert [name for name in names if not name.endswith(".jpg")] == ["2258277193_586949ec62.jpg.1"]  # no such picture
    assert len(records) == 40460
    assert len(names) - 1 == 8092
    assert records[0].images == ("1000268201_693b08cb0e.jpg",)
    assert records[0].samples[0].references == (
        "A child in a pink dress is climbing up a set of stairs in an entry way .",
    )
    sizes = {}
    for split in ("train", "dev", "test"):
        chosen = samples_of(flickr.each(folder / "Flickr8k.token.txt.gz", folder / f"Flickr_8k.{split}Images.txt"))
        sizes[split] = len(chosen)
    assert sizes == {"train": 30000, "dev": 5000, "test": 5000}


def test_laion_rows_as_parquet_and_as_text(shared):
    records, rejected = divided(url_lists.each(shared("formats/img2dataset/test_1000.parquet"), None))
    assert len(records) + len(rejected) == 1000
    reasons = Counter(reason.partition(":")[0] for _, reason in rejected)
    assert reasons == {"ambiguous file name": 26, "bad name of url": 2}
    assert records[0].images[0] == "170x170.jpg"
    assert records[0].meta["url"].startswith("http://direct.rhapsody.com/")
    assert records[0].samples[0].references[0].startswith("Classical Masterpieces: Xerses & More, Vol. 8")
    by_row, none = divided(url_lists.each(shared("formats/img2dataset/test_1000.parquet"), "row"))
    assert (len(by_row), none) == (1000, [])
    assert by_row[7].images[0] == "7.jpg" and "00000007.jpg" in by_row[7].images
    _, addresses = divided(url_lists.each(shared("formats/img2dataset/test_1000.txt"), None))
    assert len(addresses) == 1000 and {reason.partition(":")[0] for _, reason in addresses} == {"no caption"}


def test_a_parquet_list_whose_rows_have_one_address_and_one_text(shared):
    records, rejected = divided(url_lists.each(shared("formats/img2dataset/sample_image.parquet"), None))
    assert [record.images[0] for record in records] == ["original.png"] * 2
    assert rejected == []


def test_tars_without_captions_and_with_duplicates_between_them(shared):
    folder = shared("formats/webdataset")
    records, rejected = divided(tars.each([folder / f"image{i}.tar" for i in (1, 2, 3, 4)]))
    assert rejected == []
    assert Counter(record.images[0] for record in records) == {
        **dict.fromkeys(("123_456", "208_495", "321_421", "389_535"), 2),
        **dict.fromkeys(("416_264", "456_123", "524_316"), 1),
    }
    assert not any(record.samples for record in records)
    assert len({record.content for record in records}) == 7
    assert decode(records[0].content).size == (123, 456)
    assert [record.place for record in records[:2]] == ["byte 0", "byte 8192"]


def test_mme_lines(shared):
    samples = samples_of(mme.each(shared("formats/mme/llava_mme.jsonl")))
    assert len(samples) == 2368
    kinds = Counter(sample.kind for sample in samples)
    assert len(kinds) == 14 and kinds["existence"] == kinds["color"] == 60 and kinds["artwork"] == 400
    assert samples[0].question == "Is a python code shown in the picture?"
    assert not any(sample.references for sample in samples)


def test_coco_instances_an_image_at_a_time(shared):
    path = shared("formats/coco_detection_eval/instances_val2014_100.json")
    records, rejected = divided(coco_sets.each(path))
    together = coco.read_instances(path)
    assert rejected == [] == together.rejected
    assert len(records) == 100
    assert sum(len(record.annotations) for record in records) == len(together.objects) > 800
    assert sum(item.crowd for record in records for item in record.annotations) == sum(
        item.crowd for item in together.objects
    )


def test_coco_captions_with_instances(shared):
    folder = shared("photos/val")
    records, rejected = divided(coco_sets.each(folder / "captions.json", folder / "instances.json"))
    swapped, _ = divided(coco_sets.each(folder / "instances.json", folder / "captions.json"))
    assert rejected == []
    assert len(records) == len(swapped) == 50
    assert {len(record.samples) for record in records} <= {5, 6, 7}
    assert {r.images: len(r.annotations) for r in records} == {r.images: len(r.annotations) for r in swapped}


def test_what_llava_was_told_of_pictures(shared):
    records, rejected = divided(llava_context.each(shared("formats/llava/caps_boxes_coco2014_val_80.jsonl")))
    assert (len(records), rejected) == (80, [])
    assert {len(record.samples) for record in records} == {5, 6}
    assert "COCO_val2014_000000296284.jpg" in records[0].images
    objects = records[0].objects((1000, 500), pytest.fail)
    assert (objects[0].category, objects[0].box_xyxy) == ("donut", (370, 292, 504, 354.5))


@pytest.mark.parametrize(
    ("name", "count"), [("refcoco_unc_testA", 5657), ("refcoco+_unc_testA", 5726), ("refcocog_umd_val", 4896)]
)
def test_refcoco_lines_state_the_size_of_their_picture(shared, name, count):
    records, rejected = divided(refcoco.each(shared(f"formats/refcoco/REC_{name}.jsonl.gz")))
    assert (len(records), rejected) == (count, [])
    assert all(record.size and record.samples[0].box_xyxy[2] <= record.size[0] for record in records)


def test_numbers_of_coco_become_its_file_names(shared):
    folder = shared("formats/vqa_v2")
    records, _ = divided(vqa.each(folder / "vqa_questions_test.gzip", folder / "vqa_annotatons_test.gzip"))
    assert records[0].images[:3] == (
        "540769",
        "COCO_train2014_000000540769.jpg",
        "COCO_val2014_000000540769.jpg",
    )
    assert len(divided(pope.each(shared("formats/pope/coco_pope_random.json")))[0]) == 3000


# Published schemas


def test_ok_vqa_has_the_files_of_vqa(tmp_path):
    head = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    question = {"image_id": 297147, "question": "What sport can you use this for?", "question_id": 2971475}
    answers = [
        {"answer_id": i, "raw_answer": "racing", "answer_confidence": "yes", "answer": "race"} for i in range(1, 11)
    ]
    annotation = {"question_type": "four", "answer_type": "other", "confidence": 3, "answers": answers}
    annotation |= {key: question[key] for key in ("image_id", "question_id")}
    asked = save(tmp_path / "q.json", {**head, "task_type": "OpenEnded", "questions": [question]})
    answered = save(tmp_path / "a.json", {**head, "annotations": [annotation]})
    (sample,) = samples_of(vqa.each(asked, answered))
    assert (sample.sample_id, sample.kind, sample.references) == ("vqa-2971475", "four", ("race",) * 10)


def test_a_okvqa(tmp_path):
    record = {
        "split": "val",
        "image_id": 461751,
        "question_id": "22jbM6gDxdaMaunuzgrsBB",
        "question": "What is in the motorcyclist's mouth?",
        "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
        "correct_choice_idx": 3,
        "direct_answers": ["cigarette"] * 9 + ["smoke"],
        "difficult_direct_answer": False,
        "rationales": ["He's smoking while riding."],
    }
    hidden = {**record, "question_id": "x", "split": "test"}
    del hidden["direct_answers"]
    path = save(tmp_path / "aokvqa_v1p0_val.json", [record, hidden])
    (sample,) = samples_of(questions.aokvqa(path, "val"))
    assert sample.references == ("cigarette",) * 9 + ("smoke",)
    records, rejected = divided(questions.aokvqa(path))
    assert "COCO_val2014_000000461751.jpg" in records[0].images
    assert rejected == [("[1]", "question without answers")]


def test_gqa(tmp_path):
    record = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930159"],
        "equivalent": ["02930152"],
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "yes",
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    }
    path = save(tmp_path / "val_balanced_questions.json", {"02930152": record, "07333408": {"question": 3}})
    records, rejected = divided(questions.gqa(path))
    assert records[0].images[0] == "2354786.jpg"
    (sample,) = records[0].samples
    assert (sample.sample_id, sample.kind, sample.references) == ("vqa-02930152", "verify", ("yes",))
    assert rejected == [("[1]", "no image: found None")]


def test_vizwiz(tmp_path):
    answers = [{"answer_confidence": "yes", "answer": "basil leaves"}] * 6
    answers += [{"answer_confidence": "maybe", "answer": "unanswerable"}] * 4
    record = {"image": "VizWiz_val_00000001.jpg", "question": "Can you tell me what this can is?", "answers": answers}
    path = save(tmp_path / "val.json", [record | {"answer_type": "other", "answerable": 1}])
    records, _ = divided(questions.vizwiz(path))
    assert records[0].images == ("VizWiz_val_00000001.jpg",)
    assert records[0].samples[0].kind == "other"
    assert records[0].samples[0].references == ("basil leaves",) * 6 + ("unanswerable",) * 4


def test_textvqa(tmp_path):
    record = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck"],
        "flickr_original_url": "https://farm2.staticflickr.com/4/5566811_bc00d504a6_o.jpg",
        "image_width": 1024,
        "image_height": 664,
        "answers": ["dakota"] * 9 + ["nous les gosses"],
        "question_tokens": ["what", "is"],
        "question_id": 34602,
        "set_name": "val",
    }
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    records, _ = divided(questions.textvqa(save(tmp_path / "TextVQA_0.5.1_val.json", {**head, "data": [record]})))
    assert records[0].images[0] == "003a8ae2ef43b901.jpg"
    assert records[0].samples[0].references[-1] == "nous les gosses"


def test_vsr(tmp_path):
    line = {
        "image": "000000085637.jpg",
        "image_link": "http://images.cocodataset.org/train2017/000000085637.jpg",
        "caption": "The bed is touching the dog.",
        "label": 0,
        "relation": "touching",
        "annotator_id": 5,
        "vote_true_validator_id": [],
        "vote_false_validator_id": [2, 5],
    }
    path = tmp_path / "test.jsonl"
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line | {'label': 2})}\n")
    records, rejected = divided(questions.vsr(path))
    (sample,) = records[0].samples
    assert (sample.question, sample.references) == ("Is this true? The bed is touching the dog.", ("no",))
    assert "COCO_train2014_000000085637.jpg" in records[0].images
    assert rejected == [("line 2", "bad answer: expected label 0 or 1")]


def test_scienceqa(tmp_path):
    record = {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 0,
        "hint": "Look at the map.",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map: cardinal directions",
        "lecture": "Maps have four cardinal directions.",
        "solution": "To find the answer, look at the compass rose.",
        "split": "train",
    }
    problems = {
        "1": record,
        "2": record | {"image": None},
        "3": record | {"split": "test"},
        "4": record | {"answer": 4},
    }
    records, rejected = divided(questions.scienceqa(save(tmp_path / "problems.json", problems), "train"))
    assert [record.images[0] for record in records] == ["train/1/image.png"]
    (sample,) = records[0].samples
    assert sample.question.splitlines() == [
        "Look at the map.",
        "Which of these states is farthest north?",
        "Options: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma",
    ]
    assert sample.references == ("West Virginia",)
    assert rejected == [("[1]", "question without image"), ("[3]", "bad answer: expected the number of a choice")]


def test_visual_genome_regions(tmp_path):
    region = {"region_id": 1382, "width": 82, "height": 139, "image_id": 1, "phrase": "the clock is green", "y": 57}
    image = {"id": 1, "regions": [region | {"x": 421}, region | {"x": None}, "nonsense"]}
    records, rejected = divided(visual_genome.each(save(tmp_path / "region_descriptions.json", [image, {"id": 2}])))
    assert records[0].images == ("VG_100K/1.jpg", "VG_100K_2/1.jpg", "1.jpg")
    (sample,) = records[0].samples
    assert (sample.kind, sample.question, sample.box_xyxy) == ("region", "the clock is green", (421, 57, 503, 196))
    assert rejected == [
        ("[0].regions[1]", "bad box: expected 4 finite numbers"),
        ("[0].regions[2]", "bad record: expected an object, found str"),
        ("[1]", "no regions: expected a list"),
    ]


def test_mme_with_the_answers_of_its_folder(tmp_path):
    ask = "\nAnswer the question using a single word or phrase."
    lines = [
        {"question_id": "a/1.png", "image": "a/1.png", "text": f"Is there a cup?{ask}", "category": "a"},
        {"question_id": "a/1.png", "image": "a/1.png", "text": f"Is there a dog?{ask}", "category": "a"},
        {"question_id": "b/2.jpg", "image": "b/2.jpg", "text": f"Is it red?{ask}", "category": "b"},
    ]
    path = tmp_path / "llava_mme.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    answers = tmp_path / "answers"
    (answers / "b" / "questions_answers_YN").mkdir(parents=True)
    told = [
        f"1.png\tIs there a {what}? Please answer yes or no.\t{said}\n"
        for what, said in (("cup", "Yes"), ("dog", "No"))
    ]
    (answers / "a.txt").write_text("".join(told))
    (answers / "b" / "questions_answers_YN" / "2.txt").write_text("Is it red? Please answer yes or no.\tNo\n")
    samples = samples_of(mme.each(path, answers))
    assert [(s.question, s.references, s.kind) for s in samples] == [
        ("Is there a cup?", ("yes",), "a"),
        ("Is there a dog?", ("no",), "a"),
        ("Is it red?", ("no",), "b"),
    ]
    records, _ = divided(mme.each(path, answers))
    assert records[2].images == ("b/2.jpg", "b/images/2.jpg", "2.jpg")


REFS = [
    {
        "sent_ids": [0, 1],
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "ann_id": 1719310,
        "ref_id": 0,
        "image_id": 581857,
        "split": "train",
        "sentences": [
            {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady"},
            {"tokens": ["lady", "in", "back"], "raw": "lady in back", "sent_id": 1, "sent": "lady in back"},
        ],
        "category_id": 1,
    },
    {"ann_id": 5, "ref_id": 1, "image_id": 581857, "split": "train", "sentences": []},
    {"ann_id": 1719310, "ref_id": 2, "image_id": 581857, "split": "testA", "sentences": []},
]


@pytest.fixture
def instances(tmp_path):
    image = {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 640, "height": 427}
    annotation = {"id": 1719310, "image_id": 581857, "category_id": 1, "bbox": [10, 20, 30, 40.5]}
    document = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "person"}]}
    return save(tmp_path / "instances.json", document)


@pytest.mark.parametrize("protocol", range(6))
def test_refer(tmp_path, instances, protocol):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(REFS, protocol))
    records, rejected = divided(refer.each(path, instances, "train"))
    assert [(s.sample_id, s.question, s.box_xyxy) for s in records[0].samples] == [
        ("refer-0", "the lady", (10, 20, 40, 60.5)),
        ("refer-1", "lady in back", (10, 20, 40, 60.5)),
    ]
    assert records[0].images[0] == "COCO_train2014_000000581857.jpg"
    assert records[0].size == (640, 427)
    assert rejected == [("[1]", "expression without object: its ann_id or image_id is not in instances.json")]


def test_refer_as_python_2_pickled_it(tmp_path, instances):
    """Texts are byte strings there, written by the opcodes STRING (protocol 0) and SHORT_BINSTRING (protocol 2)."""
    old = b"(lp0\n(dp1\nS'ann_id'\nI1719310\nsS'image_id'\nI581857\nsS'split'\nS'val'\ns"
    old += b"S'sentences'\n(lp2\n(dp3\nS'sent_id'\nL7L\nsU\x04sentU\x04leftsasa."
    path = tmp_path / "refs(google).p"
    path.write_bytes(old)
    (sample,) = samples_of(refer.each(path, instances))
    assert (sample.sample_id, sample.question) == ("refer-7", "left")


def test_the_table_beside_a_tar_has_its_captions(tmp_path, shared):
    tar = tmp_path / "00000.tar"
    tar.write_bytes(shared("formats/webdataset/image3.tar").read_bytes())
    pq.write_table(pa.table({"key": ["123_456", "x"], "caption": ["a tower", "b"]}), tmp_path / "00000.parquet")
    first, second = divided(tars.each([tar]))[0]
    assert first.samples[0].references == ("a tower",)
    assert second.samples == ()
