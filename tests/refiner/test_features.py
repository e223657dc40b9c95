import pickle
import re
import shutil

import numpy as np
import pytest

from lyrics import io
from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.refiner import features, shard_files
from lyrics.refiner.features import RefinedImage, RefinedSplit, Tokens, see, write_shard
from lyrics.refiner.precision import rounded

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


NAMES = ("image_tokens", "detector_tokens", "segmenter_tokens")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "junk", "other rows"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_shard_is_refused_by_name(split, name, damage, verify):
    file = split[0] / "shard-00000" / f"{name}.npy"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "other rows":
        np.save(file, np.load(file)[:1])
    else:
        file.write_bytes({"truncated": content[:-10], "empty": b"", "junk": b"junk" * 50}[damage])
    with pytest.raises(InputError, match=rf"shard-00000/{name}.npy.*python -m lyrics refine"):
        RefinedSplit(split[0], verify=verify).seen("i1")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_a_shard_is_opened_without_parsing_headers(split, tmp_path_factory, dtype, monkeypatch):
    _, images, tokens, _ = split
    folder = tmp_path_factory.mktemp("again") / "shard-00000"
    write(folder, images[:2], tokens[:2], feature_dtype=dtype)
    expected = {name: np.load(folder / f"{name}.npy") for name in NAMES}
    monkeypatch.setattr(np, "load", None)
    opened = shard_files.open_shard(folder, 2)
    for name in NAMES:
        np.testing.assert_array_equal(opened.packed[name].values_XD, expected[name])
        assert not opened.packed[name].values_XD.flags.writeable


@pytest.mark.parametrize("other", [{"version": (2, 0)}, {"fortran": True}])
def test_a_file_with_another_header_is_read_by_it(split, other):
    file = split[0] / "shard-00000/image_tokens.npy"
    array = np.load(file)
    with file.open("wb") as written:
        kept = np.asfortranarray(array) if "fortran" in other else array
        np.lib.format.write_array(written, kept, version=other.get("version"))
    packed = shard_files.open_shard(file.parent, 2).packed["image_tokens"]
    np.testing.assert_array_equal(packed.values_XD, array)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("shard", [0, 1])
def test_one_flipped_bit_is_found_when_the_split_is_opened(split, dtype, shard):
    folder, images, tokens, _ = split
    kept = slice(0, 2) if shard == 0 else slice(2, 3)
    place = folder / f"shard-0000{shard}"
    write(place, images[kept], tokens[kept], feature_dtype=dtype)
    files = sorted(place.glob("*.npy"))
    assert len(files) == (3 if dtype == "fp16" else 6)
    for file in files:
        whole = file.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            expected = re.escape(f"{file} is damaged: its sha256 is {io.sha256_file(file)[:16]}…, expected ")
            with pytest.raises(InputError, match=expected + r"[0-9a-f]{16}… by shard.json; .*python -m lyrics refine"):
                RefinedSplit(folder)
        file.write_bytes(whole)
    size = sum(file.stat().st_size for file in folder.glob("*/*.npy"))
    whole = RefinedSplit(folder, verify=False)
    assert whole.verify() == size == sum(whole.verify(slice(rank, None, 2)) for rank in range(2))
    assert whole.verify(slice(5, None, 6)) == 0


@pytest.mark.parametrize("content", [None, b"junk", b"{}", b'{"feature_dtype": "fp8", "kept": []}'])
def test_a_shard_without_a_whole_manifest_is_refused_by_name(split, content):
    manifest = split[0] / "shard-00001/shard.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00001/shard\.json cannot be read .*python -m lyrics refine"):
        RefinedSplit(split[0])


def test_rows_that_a_manifest_does_not_know_are_refused(split):
    images = features.read_images(split[0] / "images.parquet")
    features.write_images(split[0] / "images.parquet", [*images, make_image("i3", 1, 1, 0)])
    with pytest.raises(InputError, match=r"shard-00001/shard\.json tells of 1 pictures, expected at least 2"):
        RefinedSplit(split[0]).seen("i3")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_each_kept_number_is_read_as_it_was_rounded_and_written_in_the_same_bytes(split, dtype, tmp_path):
    folder, images, tokens, _ = split
    for _ in range(2):
        write(tmp_path / "once/shard-00000", images[:2], tokens[:2], feature_dtype=dtype)
        write(tmp_path / "again/shard-00000", images[:2], tokens[:2], feature_dtype=dtype)
    assert io.sha256_tree(tmp_path / "once") == io.sha256_tree(tmp_path / "again")
    shutil.copytree(tmp_path / "once/shard-00000", folder / "shard-00000", dirs_exist_ok=True)
    read = RefinedSplit(folder)  # its other shard is fp16
    for image, expected in zip(images[:2], tokens, strict=False):
        seen = read.seen(image.image_id)
        for name in ("image_tokens_PD", "detector_tokens_ND", "segmenter_tokens_ND"):
            np.testing.assert_array_equal(getattr(seen, name), rounded(getattr(expected, name), dtype))


class Looking:
    """Gives what it is told of each path, and counts."""

    def __init__(self, tokens):
        self.tokens, self.calls = tokens, []

    def __call__(self, paths):
        self.calls.append(list(paths))
        return np.stack([self.tokens[path] for path in paths])


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_image_tokens_that_are_not_kept_are_looked_at_together_and_rounded_alike(split, dtype, tmp_path):
    folder, images, tokens, _ = split
    parts = {0: slice(0, 2), 1: slice(2, 3)}
    for number, part in parts.items():
        for where, kept in ((tmp_path / "kept", True), (tmp_path / "online", False)):
            place = where / f"shard-0000{number}"
            write(place, images[part], tokens[part], feature_dtype=dtype, image_tokens=kept)
    for where in ("kept", "online"):
        features.write_images(tmp_path / where / "images.parquet", images)
        shutil.copy(folder / "samples.parquet", tmp_path / where)
    assert not list((tmp_path / "online").glob("*/image_tokens*"))
    look = Looking({image.path: one.image_tokens_PD for image, one in zip(images, tokens, strict=True)})
    online, cached = RefinedSplit(tmp_path / "online", look), RefinedSplit(tmp_path / "kept")
    found = see([(online, "i2"), (cached, "i1"), (online, "i0"), (online, "i2")])
    assert look.calls == [[images[2].path, images[0].path]]
    assert found[0] is found[3]
    for seen, image_id in zip(found, ("i2", "i1", "i0"), strict=False):
        for name, value in vars(cached.seen(image_id)).items():
            np.testing.assert_array_equal(getattr(seen, name), value)
    manifests = [shard_files.read_manifest(tmp_path / where / "shard-00000") for where in ("kept", "online")]
    assert manifests[0].sha256 == manifests[1].sha256, "what is not kept is known by its checksum"
    assert (manifests[0].kept, manifests[1].kept) == (NAMES, NAMES[1:])
    with pytest.raises(InputError, match=r"holds no image tokens, and refine.features is not online"):
        RefinedSplit(tmp_path / "online").seen("i0")


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
