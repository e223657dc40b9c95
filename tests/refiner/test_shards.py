import shutil

import pytest

from lyrics.data.records import Annotation, ImageRecord, Sample
from lyrics.errors import InputError
from lyrics.refiner import features, shards
from lyrics.refiner.sources import Source

BOX = (0.1, 1 / 3, 30.0, 40.7)


def record(number):
    rle = {"size": [50, 60], "counts": "Zé01\\"}
    objects = (Annotation(category="cat ☂", box_xyxy=BOX, rle=rle), Annotation(category="dog", box_xyxy=BOX))
    return ImageRecord(
        image_id=f"i{number}",
        path=f"data/clean/0.tar::i{number}.jpg",
        width=60,
        height=50,
        captions=(f"caption {number}",),
        annotations=objects[: number % 3],
    )


def sources(read, web=7, test=3):
    def images():
        for number in range(web):
            read.append(number)
            yield record(number)

    yield Source(name="web", images=images(), samples=None)
    samples = [Sample(sample_id="s", image_id="i0", task="vqa", kind="count", question="How many?", references=("2",))]
    yield Source(name="test", images=[record(n) for n in range(test)], samples=samples)


def test_a_plan_holds_every_record_once_in_order(tmp_path):
    web, test = shards.plan(lambda: sources([]), tmp_path, 3)
    assert [str(shard) for shard in web.shards] == ["web/shard-00000", "web/shard-00001", "web/shard-00002"]
    assert [r for shard in web.shards for r in shard.records()] == [record(n) for n in range(7)]
    assert [len(shard.records()) for shard in web.shards] == [3, 3, 1] and [s.number for s in web.shards] == [0, 1, 2]
    captions = features.read_samples(web.samples)
    assert [(s.sample_id, s.image_id, s.references) for s in captions] == [
        (f"caption-i{n}", f"i{n}", (f"caption {n}",)) for n in range(7)
    ]
    assert [s.question for s in features.read_samples(test.samples)] == ["How many?"] and len(test.shards) == 1


def test_a_finished_plan_is_read_again_and_a_broken_off_one_is_made_anew(tmp_path):
    def stopping():
        yield from sources([])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.plan(stopping, tmp_path, 3)
    read = []
    first = shards.plan(lambda: sources(read), tmp_path, 3)
    assert shards.plan(lambda: sources(read), tmp_path, 3) == first and read == list(range(7))


def test_a_plan_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="python -m lyrics ingest"):
        shards.plan(lambda: sources([], web=0, test=0), tmp_path, 3)


def write(folder, text):
    folder.mkdir()
    (folder / "file").write_text(text)


def test_of_two_attempts_at_a_shard_the_first_to_be_ready_counts(tmp_path):
    folder = tmp_path / "splits" / "shard-00000"
    with shards.attempt_at(folder) as late:
        write(late, "late")
        with shards.attempt_at(folder) as early:
            write(early, "early")
        assert (folder / "file").read_text() == "early"
    assert (folder / "file").read_text() == "early"
    assert list(folder.parent.iterdir()) == [folder], "nothing else is left"


def test_a_failed_attempt_leaves_nothing(tmp_path):
    folder = tmp_path / "splits" / "shard-00000"
    with pytest.raises(ZeroDivisionError), shards.attempt_at(folder) as own:
        write(own, "half")
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), shards.attempt_at(folder):
        pass  # an attempt that wrote nothing is no result
    assert list(folder.parent.iterdir()) == []


def test_what_killed_workers_left_is_forgotten(tmp_path):
    web, _ = shards.plan(lambda: sources([]), tmp_path, 3)
    with shards.attempt_at(web.shards[0].folder) as own:
        write(own, "x")
        shutil.copytree(own.parent, own.parent.with_name(".attempt-of-a-killed-one"))
    shards.forget_attempts(web)
    assert list(web.shards[0].folder.parent.iterdir()) == [web.shards[0].folder]
