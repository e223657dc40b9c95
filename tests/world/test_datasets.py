import dataclasses
import hashlib
import io
import json
import re
from collections import Counter, defaultdict

import imagehash
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lyrics.data.annotated import read_split
from lyrics.data.files import BadImageError, decode
from lyrics.data.webdataset import read_pairs
from lyrics.errors import InputError
from lyrics.io import sha256_tree
from lyrics.world import datasets, dirt, vocabulary


@pytest.fixture(scope="module")
def web(raw):
    return [pair for tar in sorted((raw / "web").glob("*.tar")) for pair in read_pairs(tar)]


@pytest.fixture(scope="module")
def truth(raw):
    return {row["key"]: row["dirt"] for row in pq.read_table(raw / "web_truth.parquet").to_pylist()}


def test_a_second_ingest_gives_the_same_bytes_and_another_seed_others(raw, world, run_ingest, tmp_path):
    assert sha256_tree(run_ingest(tmp_path / "again", world)) == sha256_tree(raw)
    assert sha256_tree(run_ingest(tmp_path / "other", world, seed=1)) != sha256_tree(raw)


def test_more_web_scenes_leave_the_annotated_splits_alone(raw, world, run_ingest, tmp_path):
    scenes = dataclasses.replace(world.scenes, web=20)
    other = run_ingest(tmp_path / "w", dataclasses.replace(world, scenes=scenes))
    assert sha256_tree(other / "test") == sha256_tree(raw / "test")


def test_dirt_has_the_configured_rates_and_every_pair_a_label(web, truth, world):
    assert [pair.key for pair in web] == list(truth)
    found = Counter(truth.values())
    for kind, rate in dataclasses.asdict(world.dirt).items():
        assert found[kind] == round(rate * len(web))


def test_dirt_is_what_its_label_says(web, truth):
    by_dirt = defaultdict(list)
    for pair in web:
        by_dirt[truth[pair.key]].append(pair)
    for pair in by_dirt["broken"]:
        with pytest.raises(BadImageError):
            decode(pair.image_bytes)
    assert all(max(decode(pair.image_bytes).size) < 48 for pair in by_dirt["tiny"])
    for pair in by_dirt["extreme"]:
        width, height = decode(pair.image_bytes).size
        assert max(width, height) / min(width, height) > 4
        assert min(width, height) >= 48
    sentences = {text for group in dirt.LANGUAGES.values() for text in group}
    assert all(pair.caption in sentences for pair in by_dirt["language"])
    for pair in by_dirt["clean"]:
        assert decode(pair.image_bytes).size == (128, 128)
        assert re.search("|".join(vocabulary.COLORS), pair.caption)


def test_a_duplicate_repeats_an_earlier_clean_picture_in_other_bytes(web, truth):
    earlier = []
    duplicates = 0
    for pair in web:
        if truth[pair.key] == "duplicate":
            value = imagehash.phash(decode(pair.image_bytes), hash_size=16)
            near = min(earlier, key=lambda known: known[0] - value)
            assert near[0] - value < 24, pair.key
            assert near[1] != pair.image_bytes
            duplicates += 1
        elif truth[pair.key] == "clean":
            earlier.append((imagehash.phash(decode(pair.image_bytes), hash_size=16), pair.image_bytes))
    assert duplicates


def test_a_mismatched_caption_names_no_kind_of_the_picture(world):
    kinds = "|".join(vocabulary.KINDS)
    checked = 0
    for index, item in enumerate(datasets.web_items(0, world)):
        shown = datasets.scene_of(0, "web", index, world).kinds
        said = set(re.findall(rf"\b({kinds})s?\b", item.caption))
        if item.dirt == "mismatched":
            assert said
            assert not said & shown
            checked += 1
        elif item.dirt in ("clean", "tiny", "extreme"):
            assert said == shown
    assert checked


def test_splits_share_no_picture(raw, web, truth):
    owner = {}
    for split in datasets.ANNOTATED:
        for path in (raw / split / "images").iterdir():
            digest = hashlib.sha256(Image.open(path).tobytes()).hexdigest()
            assert owner.setdefault(digest, split) == split
    for pair in web:
        if truth[pair.key] == "clean":
            assert hashlib.sha256(decode(pair.image_bytes).tobytes()).hexdigest() not in owner


def test_every_annotated_split_reads_without_rejections(raw, world):
    for split in datasets.ANNOTATED:
        found = read_split(raw / split)
        assert found.rejected == []
        assert len(found.images) == getattr(world.scenes, split)
        ids = {image.image_id for image in found.images}
        assert {sample.image_id for sample in found.samples} <= ids
        assert len({sample.sample_id for sample in found.samples}) == len(found.samples)
        assert all(Image.open(image.path).size == (image.width, image.height) for image in found.images[:3])


def test_corpus_has_the_shape_of_the_prompt_and_its_answers_stand_in_the_text(raw, world):
    lines = (raw / "foundation" / "corpus.txt").read_text().splitlines()
    assert len(lines) == world.corpus_documents
    prompt = re.compile(r"((?:\w+ \w+ \d+ \d+ \d+ \d+; )+)(?:([A-Z][^.]*\.) )?(question: .+[.?] answer: .+)")
    spoken = Counter()
    for line in lines:
        match = prompt.fullmatch(line)
        if match is None:
            assert ";" not in line
            continue
        spatial, _, turns = match.groups()
        asked = re.findall(r"question: (.+?[.?]) answer: (.+?)(?= question:|$)", turns)
        assert len({question for question, _ in asked}) == len(asked), "a second answer could be copied from the first"
        for question, answer in asked:
            if question.startswith("Where is"):
                assert f" {answer};" in spatial
            if question.startswith("What color"):
                kind = re.fullmatch(r"What color is the (\w+)\?", question)[1]
                assert f"{kind} {answer} " in spatial
            if present := re.fullmatch(r"Is there an? (\w+) in the image\?", question):
                assert (answer == "yes") == (present[1] in re.findall(r"(\w+) \w+ \d+ \d+ \d+ \d+;", spatial))
            spoken[question.split()[0]] += 1
    assert min(spoken[word] for word in ("Describe", "Where", "What", "How", "Is")) > 2
    assert max(int(n) for n in re.findall(r"\d+", " ".join(lines))) <= 99


def test_the_parquet_file_beside_a_tar_names_its_pairs(raw, web):
    table = pq.read_table(raw / "web" / "00000.parquet").to_pylist()
    assert [row["key"] for row in table] == [pair.key for pair in web]
    assert [row["caption"] for row in table] == [pair.caption for pair in web]
    assert table[0]["sha256"] == hashlib.sha256(web[0].image_bytes).hexdigest()
    assert all(pair.meta["key"] == pair.key and pair.meta["url"] for pair in web)


def test_rates_that_leave_nothing_clean_are_refused(make_world, all_dirty, run_ingest, tmp_path):
    with pytest.raises(InputError, match=r"world\.dirt add up to 1\.40"):
        run_ingest(tmp_path / "w", make_world(dirt=all_dirty))
    assert not (tmp_path / "w" / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_objects": 9}, r"world\.max_objects is 9; give a value from 1 to 8"),
        ({"image_size_px": 16}, r"world\.image_size_px is 16; give a value from 64"),
    ],
)
def test_values_without_a_world_are_refused(make_world, run_ingest, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run_ingest(tmp_path / "w", dataclasses.replace(make_world(), **change))
    assert not list((tmp_path / "w").iterdir())


def test_summary_counts_what_was_written(raw, web):
    summary = json.loads((raw / "summary.json").read_text())
    assert summary["splits"]["web"] == {"pairs": 100, "dirty": 24}
    assert summary["splits"]["test"]["images"] == len(list((raw / "test" / "images").iterdir())) == 20
    assert summary["rejected"] == {}
    assert pq.read_table(raw / "rejected.parquet").num_rows == 0


def test_jpeg_keeps_thin_coloured_strokes():
    """Full-resolution chroma: the drawn colour survives to within a few levels."""
    image = Image.new("RGB", (32, 32), (30, 30, 40))
    for x in range(32):
        image.putpixel((x, 16), (228, 38, 38))
    red = Image.open(io.BytesIO(dirt.encode_jpeg(image))).getpixel((10, 16))
    assert abs(red[0] - 228) < 30
    assert red[1] < 80
