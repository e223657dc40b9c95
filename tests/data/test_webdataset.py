import hashlib
import io
import tarfile

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_files import bomb, encoded

from lyrics.data import webdataset
from lyrics.data.files import BadImageError, decode
from lyrics.data.webdataset import WebPair, read_pairs, write_tar
from lyrics.errors import InputError

pairs_of_any_kind = st.lists(
    st.builds(
        WebPair,
        key=st.text("0123456789abc_", min_size=1, max_size=12),
        image_bytes=st.one_of(st.none(), st.binary(max_size=64)),
        caption=st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=40)),
        meta=st.just({"url": "u", "width": 3, "height": 4}),
    ),
    unique_by=lambda pair: pair.key,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(pairs=pairs_of_any_kind)
def test_what_is_written_is_read_and_equal_pairs_give_equal_bytes(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "a.tar", pairs)
    write_tar(folder / "b.tar", pairs)
    for suffix in ("tar", "parquet"):
        assert (folder / f"a.{suffix}").read_bytes() == (folder / f"b.{suffix}").read_bytes()
    read = list(read_pairs(folder / "a.tar"))
    assert [(p.key, p.image_bytes, p.caption) for p in read] == [(p.key, p.image_bytes, p.caption) for p in pairs]
    assert all(p.meta["width"] == 3 and p.meta["key"] == p.key for p in read)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [WebPair(key="1", image_bytes=b"x", caption="c", meta={})])
    before = path.read_bytes()

    def breaks():
        yield WebPair(key="2", image_bytes=b"y", caption="d", meta={})
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_tar(path, breaks())
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "a.tar"]


def test_tars_of_pictures_alone(shared):
    pairs = list(read_pairs(shared("formats/webdataset/image1.tar")))
    assert [pair.key for pair in pairs] == ["123_456", "208_495", "321_421", "389_535"]
    assert {pair.caption for pair in pairs} == {None}
    assert decode(pairs[0].image_bytes).size == (123, 456)


def test_a_member_is_read_without_walking_the_tar(tmp_path):
    path = tmp_path / "00000.tar"
    write_tar(path, [WebPair(key=f"{i}", image_bytes=bytes([i]) * 700, caption="c", meta={}) for i in range(5)])
    assert webdataset.image_bytes(f"{path}::3.jpg") == bytes([3]) * 700
    with pytest.raises(InputError, match=r"00000\.tar has no member 9\.jpg"):
        webdataset.image_bytes(f"{path}::9.jpg")
    with pytest.raises(InputError, match="cannot be read"):
        webdataset.image_bytes(tmp_path / "absent.jpg")


def test_a_tar_that_changed_is_looked_up_again(tmp_path):
    path = tmp_path / "00000.tar"
    write_tar(path, [WebPair(key="a", image_bytes=b"old", caption="c", meta={})])
    assert webdataset.image_bytes(f"{path}::a.jpg") == b"old"
    write_tar(path, [WebPair(key="b", image_bytes=b"1", caption="c", meta={}), *read_pairs(path)])
    assert webdataset.image_bytes(f"{path}::a.jpg") == b"old"


@pytest.mark.parametrize("content", [b"no tar at all" * 100, b""])
def test_what_is_no_tar_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.tar is not a readable tar"):
        list(read_pairs(path))


def test_a_cut_tar_is_refused(tmp_path):
    path = tmp_path / "cut.tar"
    write_tar(path, [WebPair(key="1", image_bytes=b"x" * 5000, caption="c", meta={})])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cut\.tar is not a readable tar"):
        list(read_pairs(path))


def test_a_tar_with_strange_members_is_read_for_what_it_has(tmp_path):
    path = tmp_path / "strange.tar"
    with tarfile.open(path, "w") as opened:
        for name, content in [
            ("d/a.JPG", b"1"),
            ("d/a.txt", b"\xff caption"),
            ("d/a.json", b"{broken"),
            ("e/a.png", b"2"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("d/b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
    first, second = read_pairs(path)
    assert (first.key, first.image_bytes, first.meta) == ("d/a", b"1", {})
    assert first.caption == "� caption"
    assert (second.key, second.image_bytes, second.caption) == ("e/a", b"2", None)


@pytest.mark.parametrize("side", [9_000, 100_000])
def test_a_decompression_bomb_is_refused_undecoded(side):
    with pytest.raises(BadImageError, match="pixels"):
        decode(bomb(side))


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 0.95), junk=st.binary(max_size=40))
def test_damaged_bytes_never_raise_anything_else(cut, junk):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 10, 10)).save(buffer, "JPEG")
    content = buffer.getvalue()
    try:
        decode(content[: int(cut * len(content))] + junk)
    except BadImageError as error:
        assert str(error)


def test_modes_become_rgb():
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (4, 3)).save(buffer, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
        assert decode(buffer.getvalue()).mode == "RGB"


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_a_picture_is_stored_under_the_suffix_of_its_bytes(tmp_path, kind, suffix):
    write_tar(tmp_path / "a.tar", [WebPair(key="1", image_bytes=encoded(kind), caption="c", meta={})])
    assert webdataset.image_bytes(f"{tmp_path / 'a.tar'}::1.{suffix}") == encoded(kind)
    (pair,) = read_pairs(tmp_path / "a.tar")
    assert (pair.image_bytes, pair.suffix) == (encoded(kind), suffix)


def test_the_table_has_the_hash_of_each_picture(tmp_path):
    write_tar(tmp_path / "a.tar", [WebPair(key="1", image_bytes=b"x", caption="c", meta={"url": "u"})])
    (row,) = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert row["sha256"] == hashlib.sha256(b"x").hexdigest()
    assert (row["url"], row["caption"], row["status"]) == ("u", "c", "success")


def test_the_refiner_finds_a_picture_of_any_suffix(tmp_path, monkeypatch):
    from lyrics.refiner.sources import read_sources

    monkeypatch.chdir(tmp_path)
    kinds = {"a": "JPEG", "b": "PNG", "c": "WEBP"}
    pairs = [WebPair(key=key, image_bytes=encoded(kind), caption="c", meta={}) for key, kind in kinds.items()]
    write_tar(tmp_path / "data/clean/00000.tar", pairs)
    (source,) = read_sources()
    assert [webdataset.open_image(image.path).size for image in source.images] == [(8, 6)] * 3


def test_many_tars_read_in_turn_are_walked_once_each(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i:05d}.tar" for i in range(70)]
    for i, path in enumerate(paths):
        pairs = [WebPair(key=f"{key}", image_bytes=bytes([i]), caption="c", meta={}) for key in ("a", "bcd", "é")]
        write_tar(path, pairs)
    opened = []
    real = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    for key in ("a", "bcd", "é"):
        assert [webdataset.image_bytes(f"{path}::{key}.jpg") for path in paths] == [bytes([i]) for i in range(70)]
    assert len(opened) == 70
    with pytest.raises(InputError, match=r"no member a\.jpg\.longer than any"):
        webdataset.image_bytes(f"{paths[0]}::a.jpg.longer than any")
