import pickle

import numpy as np
import pytest

from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.refiner import features
from lyrics.refiner.features import RefinedImage, RefinedSplit, Tokens, write_shard

MAX_OBJECTS = 3


def make_image(name, shard, row, objects):
    boxes = tuple((float(i), 2.0, 10.25 + i, 20.0) for i in range(objects))
    return RefinedImage(
        image_id=name,
        path=f"data/raw/test/images/{name}.jpg",
        width=40,
        height=20,
        captions=("a star", "one star"),
        tags=("star",) * objects,
        boxes_xyxy=boxes,
        scores=(0.5,) * objects,
        masks=("abc",) * objects,
        spatial_text="star 1 2 3 4;" * objects,
        shard=shard,
        row=row,
    )


def make_tokens(seed, objects):
    rng = np.random.default_rng(seed)
    return Tokens(
        image_tokens_PD=rng.normal(size=(5, 4)).astype(np.float32),
        detector_tokens_ND=rng.normal(size=(objects, 6)).astype(np.float32),
        segmenter_tokens_ND=rng.normal(size=(objects, 2)).astype(np.float32),
    )


def write(folder, images, tokens, **options):
    write_shard(folder, zip(images, tokens, strict=True), max_objects=MAX_OBJECTS, **options)


@pytest.fixture
def split(tmp_path):
    """Three images in two shards: two objects, none, all that fit."""
    counts = [2, 0, MAX_OBJECTS]
    images = [make_image(f"i{n}", n // 2, n % 2, count) for n, count in enumerate(counts)]
    tokens = [make_tokens(n, count) for n, count in enumerate(counts)]
    write(tmp_path / "shard-00000", images[:2], tokens[:2])
    write(tmp_path / "shard-00001", images[2:], tokens[2:])
    features.write_images(tmp_path / "images.parquet", images)
    samples = [
        Sample(sample_id="s0", image_id="i0", task="caption", kind="caption", references=("a", "b")),
        Sample(
            sample_id="s1", image_id="i0", task="refer", kind="refer", question="star", box_xyxy=(1.0, 2.0, 3.0, 4.5)
        ),
        Sample(sample_id="s2", image_id="i1", task="chat", kind="chat", turns=(("q", "a"), ("r", "b"))),
    ]
    features.write_samples(tmp_path / "samples.parquet", samples)
    return tmp_path, images, tokens, samples


def test_what_was_written_is_read(split):
    folder, images, tokens, samples = split
    read = RefinedSplit(folder)
    assert list(read.images.values()) == images and read.samples == samples and len(read) == 3
    for image, expected in zip(images, tokens, strict=True):
        seen = read.seen(image.image_id)
        for name in ("image_tokens_PD", "detector_tokens_ND", "segmenter_tokens_ND"):
            np.testing.assert_array_equal(getattr(seen, name), getattr(expected, name).astype(np.float16))
        assert seen.boxes_xyxy_N4.shape == (len(image.tags), 4)
        assert seen.tags == image.tags and seen.spatial_text == image.spatial_text
    np.testing.assert_allclose(read.seen("i0").boxes_xyxy_N4[1], [1 / 40, 0.1, 11.25 / 40, 1.0], rtol=1e-6)


def test_a_copy_in_another_process_reads_the_same(split):
    read = RefinedSplit(split[0])
    read.seen("i0")
    copy = pickle.loads(pickle.dumps(read))
    np.testing.assert_array_equal(copy.seen("i2").image_tokens_PD, read.seen("i2").image_tokens_PD)


def test_the_same_content_is_the_same_bytes(split, tmp_path_factory):
    folder, images, tokens, _ = split
    again = tmp_path_factory.mktemp("again") / "shard-00000"
    write(again, images[:2], tokens[:2])
    for file in sorted(again.iterdir()):
        assert file.read_bytes() == (folder / "shard-00000" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", ["image_tokens", "detector_tokens", "segmenter_tokens"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "junk", "other rows"])
def test_a_damaged_shard_is_refused_by_name(split, name, damage):
    file = split[0] / "shard-00000" / f"{name}.npy"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "other rows":
        np.save(file, np.load(file)[:1])
    else:
        file.write_bytes({"truncated": content[:-10], "empty": b"", "junk": b"junk" * 50}[damage])
    with pytest.raises(InputError, match=rf"shard-00000/{name}.npy.*python -m lyrics refine"):
        RefinedSplit(split[0]).seen("i1")


def test_a_damaged_table_is_refused_by_name(split):
    (split[0] / "samples.parquet").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"samples\.parquet"):
        RefinedSplit(split[0])


def test_values_too_large_for_float16_are_clipped_and_nan_is_refused(split, tmp_path):
    _, images, tokens, _ = split
    tokens[0].image_tokens_PD[0, 0] = 1e6
    write(tmp_path / "large", images[:1], tokens[:1])
    assert np.load(tmp_path / "large" / "image_tokens.npy").max() == np.finfo(np.float16).max
    tokens[0].image_tokens_PD[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        write(tmp_path / "nan", images[:1], tokens[:1])
    assert not (tmp_path / "nan").exists()
