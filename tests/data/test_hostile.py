"""Files that mean harm: each is set aside with its place, or refused in a sentence; time and memory stay bounded."""

import builtins
import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_files import MIB, bomb, encoded, jpeg, least_peak_of, peak_of, save, save_lines
from small_sets import POPE, SETS

from lyrics.config import FileSet
from lyrics.data import pope, sets, streams
from lyrics.data.files import BadImageError, decode
from lyrics.data.ledger import Ledger
from lyrics.data.readers import flickr, pickles, tars, url_lists
from lyrics.data.records import Record, Rejected
from lyrics.data.webdataset import WebPair, each, read_pairs
from lyrics.errors import InputError

# Tars


def member(name: str, content: bytes = b"", **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


HOSTILE = [
    (member("/etc/passwd.jpg", b"x"), "unsafe member name: '/etc/passwd.jpg'"),
    (member("../../up.jpg", b"x"), "unsafe member name: '../../up.jpg'"),
    (member("a/../../up.jpg", b"x"), "unsafe member name: 'a/../../up.jpg'"),
    (member("new\nline.jpg", b"x"), "unsafe member name: 'new\\nline.jpg'"),
    (member("l.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link: 'l.jpg' to '/etc/passwd'"),
    (member("h.jpg", type=tarfile.LNKTYPE, linkname="good.jpg"), "link: 'h.jpg' to 'good.jpg'"),
    (member("zero.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "device or pipe: 'zero.jpg'"),
    (member("disk.jpg", type=tarfile.BLKTYPE, devmajor=8, devminor=0), "device or pipe: 'disk.jpg'"),
    (member("pipe.jpg", type=tarfile.FIFOTYPE), "device or pipe: 'pipe.jpg'"),
    (member("long.txt", b"a" * (MIB + 1)), f"member too large: 'long.txt' has {MIB + 1} bytes, at most {MIB} are read"),
]


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as opened:
        for info, content in members:
            opened.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("bad", "reason"), HOSTILE, ids=[reason.partition(":")[0] + str(i) for i, (_, reason) in enumerate(HOSTILE)]
)
def test_a_hostile_member_is_set_aside_with_its_byte_and_the_rest_is_read(tmp_path, bad, reason):
    good = member("good.jpg", b"picture"), member("good.txt", b"a caption")
    path = write_tar(tmp_path / "a.tar", *good, bad, member("z.jpg", b"other"))
    found = list(each(path))
    assert [item.image_bytes for item in found if isinstance(item, WebPair)] == [b"picture", b"other"]
    assert [(r.source, r.record, r.reason) for r in found if isinstance(r, Rejected)] == [
        (str(path), "byte 2048", reason)
    ]
    assert [pair.caption for pair in read_pairs(path)] == ["a caption", None]
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.tar"]


def test_a_second_member_of_one_name_does_not_replace_the_first(tmp_path):
    path = write_tar(tmp_path / "a.tar", member("a.jpg", b"1"), member("a.jpg", b"2"))
    pair, repeated = sorted(each(path), key=lambda item: isinstance(item, Rejected))
    assert pair.image_bytes == b"1"
    assert (repeated.record, repeated.reason) == ("byte 1024", "repeated member: 'a.jpg'")


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    fields = name.ljust(100, b"\0") + b"0000644\0" * 3 + size.ljust(12, b"\0") + b"0" * 11 + b"\0"
    rest = kind + b"\0" * 100 + b"ustar\x0000"
    block = fields + b" " * 8 + rest
    total = sum(block)
    return (fields + f"{total:06o}\0 ".encode() + rest).ljust(512, b"\0")


def test_headers_that_claim_gigabytes_or_point_backwards_end_the_tar(tmp_path):
    path = tmp_path / "a.tar"
    first = header(b"a.jpg", b"00000000003") + b"abc".ljust(512, b"\0")
    for kind in (b"x", b"g", b"L", b"K"):  # extended headers, which tarfile reads into memory whole
        path.write_bytes(first + header(b"b", b"77777777777", kind))
        with path.open("ab") as opened:
            opened.truncate(4 << 30)  # a sparse file
        found: list = []
        assert peak_of(lambda found=found: found.extend(tars.each([path]))) < 4 * MIB
        assert [type(item) for item in found] == [Record, Rejected] or found[0].record == "byte 0"
        assert found[-1].reason.startswith("damaged tar: ")
    backwards = bytes([0xFF] * 4) + (-1024).to_bytes(8, "big", signed=True)
    path.write_bytes(first + header(b"b.jpg", backwards) + b"\0" * 1024)
    with pytest.raises(InputError, match=r"a\.tar is not a readable tar"):
        list(read_pairs(path))


def test_a_tar_that_is_cut_is_read_as_far_as_it_goes(tmp_path):
    path = write_tar(tmp_path / "a.tar", member("a.jpg", b"1"), member("b.jpg", b"x" * 5000))
    path.write_bytes(path.read_bytes()[:3000])
    record, rejected = tars.each([path])
    assert record.images == ("a",)
    assert (rejected.record, rejected.reason.partition(": ")[0]) == ("byte 0", "damaged tar")
    path.write_bytes(path.read_bytes().replace(b"b.jpg", b"b.jp\xff"))
    assert [type(item) for item in tars.each([path])] == [Record, Rejected]


def test_memory_does_not_grow_with_the_members_of_a_tar(tmp_path):
    few = write_tar(tmp_path / "few.tar", *(member(f"{i}.jpg", b"x") for i in range(200)))
    many = write_tar(tmp_path / "many.tar", *(member(f"{i}.jpg", b"x") for i in range(2000)))
    small, large = (least_peak_of(lambda path=path: [None for _ in read_pairs(path) if False]) for path in (few, many))
    assert large < small + MIB // 4


# Compressed


def gzip_bomb(path: Path, size: int) -> Path:
    with gzip.open(path, "wb", compresslevel=9) as opened:
        for _ in range(size // MIB):
            opened.write(b"\0" * MIB)
    return path


def test_a_packed_tar_is_read_and_a_bomb_in_one_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_FREE_BYTES", 8 * MIB)
    plain = write_tar(tmp_path / "a.tar", member("a.jpg", b"1"), member("b.npy", b"x" * MIB), member("c.jpg", b"3"))
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(each(packed)) == list(each(plain))
    path = write_tar(tmp_path / "b.tar", member("a.jpg", b"1"), member("b.npy", b"x" * 32 * MIB), member("c.jpg", b"3"))
    packed.write_bytes(gzip.compress(path.read_bytes()))
    found: list = []
    assert peak_of(lambda: found.extend(tars.each([packed]))) < 4 * MIB
    assert found[0].content == b"1"
    assert found[1].reason.startswith("damaged tar: ") and "unpacks to more than 200 times its size" in found[1].reason


def test_a_gzip_bomb_is_refused_as_it_unpacks(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_FREE_BYTES", 8 * MIB)
    path = gzip_bomb(tmp_path / "a.jsonl.gz", 64 * MIB)

    def refused() -> None:
        for read in (lambda: list(streams.json_lines(path)), lambda: list(streams.elements(path, "annotations"))):
            with pytest.raises(InputError, match=r"a\.jsonl\.gz unpacks to more than 200 times its size"):
                read()

    assert peak_of(refused) < 12 * MIB


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_gzip_bomb_of_four_gigabytes(tmp_path):
    """Once for real: a few megabytes, refused after the first gigabyte."""
    path = gzip_bomb(tmp_path / "a.jsonl.gz", 4 << 30)
    assert path.stat().st_size < 5 * MIB

    def refused() -> None:
        with pytest.raises(InputError, match="unpacks to more than 200 times its size"):
            list(pope.each(path))

    assert peak_of(refused) < 12 * MIB


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:30] + b"\0\0\0\0" + c[34:], lambda c: c[:5]])
def test_a_damaged_gzip_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(damage(gzip.compress(os.urandom(200) + b"a.jpg#0\tA dog .\n" * 50)))
    with pytest.raises(InputError, match=r"a\.txt\.gz cannot be read: "):
        list(flickr.each(path))


# Names and pictures


def ingest(folder: Path, **entry: str) -> tuple[Ledger, list[tuple[str, str]]]:
    config = SimpleNamespace(
        data=SimpleNamespace(folder=str(folder), sets=(FileSet(**entry),), max_images=None, leak_hamming_bits=24)
    )
    ledger = Ledger(folder / "out" / "rejected.parquet", folder)
    sets.ingest(config, folder / "out", ledger)
    ledger.close()
    rows = pq.read_table(folder / "out" / "rejected.parquet").to_pylist()
    return ledger, [(row["record"], row["reason"]) for row in rows]


def test_names_that_leave_or_break_their_folder_and_files_that_are_none(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.jpg").write_bytes(jpeg(1))
    (tmp_path / "images" / "new\nline.jpg").write_bytes(jpeg(2))
    (tmp_path / "secret.jpg").write_bytes(jpeg(3))
    os.mkfifo(tmp_path / "images" / "pipe.jpg")
    (tmp_path / "images" / "folder.jpg").mkdir()
    names = ["good.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "new\nline.jpg", "a\0.jpg", "pipe.jpg"]
    names += ["folder.jpg", "x" * 250 + ".jpg", "images\\good.jpg"]
    lines = [{**POPE, "question_id": number, "image": name} for number, name in enumerate(names)]
    save_lines(tmp_path / "pope.json", lines)
    _, rejected = ingest(tmp_path, format="pope", path="pope.json", images="images", split="test")
    assert [record for record, _ in rejected] == [f"line {number}" for number in range(2, 10)]
    unsafe = [record for record, reason in rejected if reason.startswith("unsafe file name: ")]
    assert unsafe == ["line 2", "line 3", "line 4", "line 5", "line 9"]
    assert len(list((tmp_path / "out" / "test" / "images").iterdir())) == 1


def test_pictures_whose_extension_lies_get_their_own(tmp_path):
    (tmp_path / "images").mkdir()
    kinds = {"a.jpg": "PNG", "b.png": "WEBP", "c.webp": "JPEG", "d.jpg": "EPS", "e.jpg": "PPM", "f.txt": "GIF"}
    for name, kind in kinds.items():
        content = encoded(kind).replace(b"\xc8\x0a\x0a", b"\xc8\x0a" + name[:1].encode())
        (tmp_path / "images" / name).write_bytes(content)
    (tmp_path / "images" / "g.jpg").write_bytes(bomb(60_000))
    (tmp_path / "images" / "h.jpg").write_bytes(jpeg(1))
    with (tmp_path / "images" / "h.jpg").open("ab") as opened:
        opened.truncate(65 * MIB)
    names = [*kinds, "g.jpg", "h.jpg"]
    save_lines(tmp_path / "pope.json", [{**POPE, "question_id": name, "image": name} for name in names])
    _, rejected = ingest(tmp_path, format="pope", path="pope.json", images="images", split="test")
    assert rejected == [
        ("line 4", "unusable image: not a picture"),
        ("line 5", "unusable image: not a picture"),
        ("line 7", "unusable image: more than 64000000 pixels"),
        ("line 8", f"unusable image: 'h.jpg' has {65 * MIB} bytes"),
    ]
    written = sorted(path.suffix for path in (tmp_path / "out" / "test" / "images").iterdir())
    assert written[0] == ".gif" and set(written) <= {".gif", ".jpg", ".png", ".webp"}


def test_a_format_that_starts_a_program_is_never_opened():
    """Pillow gives EPS to Ghostscript."""
    with pytest.raises(BadImageError, match="not a picture"):
        decode(encoded("EPS"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.tar", "refs.p"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    readers = {
        "a.txt": lambda: flickr.each(path),
        "a.jsonl": lambda: pope.each(path),
        "a.parquet": lambda: url_lists.each(path, None),
        "a.tar": lambda: each(path),
        "refs.p": lambda: pickles.load_plain(path) or (),
    }
    with pytest.raises(InputError, match=f"{name} (does not exist or is not a file|is not a readable)"):
        list(readers[name]())


# Pickles


class Evil:
    def __reduce__(self):
        return builtins.exec, ("import pathlib; pathlib.Path('owned').touch()",)


@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps([Evil()], protocol) for protocol in range(6)),
        b"cos\nsystem\n(S'touch owned'\ntR.",
        b"(S'touch owned'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch owned\x85R.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"P1\n.",  # something outside
        b"]r\xff\xff\xff\x7f.",  # room for two thousand million numbers
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",  # a byte array of an exabyte
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"(" * 1000,
        b"",
        b"\x80\xff.",
        b"0.",
    ],
)
def test_a_pickle_that_does_anything_is_refused_and_nothing_is_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "refs(unc).p"
    path.write_bytes(content)

    def refused() -> None:
        with pytest.raises(
            InputError, match=r"refs\(unc\)\.p is not a pickle of plain values: .*; nothing of it was run"
        ):
            pickles.load_plain(path)

    assert peak_of(refused) < 4 * MIB
    assert not (tmp_path / "owned").exists()


@given(st.binary(max_size=60))
def test_no_bytes_make_the_unpickler_do_more(content):
    path = Path(f"/proc/self/fd/{memory_file(content)}")
    try:
        pickles.load_plain(path)
    except InputError as error:
        assert "plain values" in str(error)
    finally:
        os.close(int(path.name))


def memory_file(content: bytes) -> int:
    number = os.memfd_create("pickle")
    os.write(number, content)
    return number


def test_a_pickle_that_unfolds_for_ever_is_only_looked_into(tmp_path):
    """Thirty levels of lists that hold the one below twice: a thousand million parts in a few hundred bytes."""
    value: list = ["x"]
    for _ in range(30):
        value = [value, value]
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([{"split": value, "ann_id": value, "image_id": value, "sentences": value}], 2))
    save(tmp_path / "instances.json", json.loads(SETS["refer"][1]["instances.json"]))
    from lyrics.data.readers import refer

    (rejected,) = refer.each(path, tmp_path / "instances.json")
    assert rejected.reason == "bad id: found list"
