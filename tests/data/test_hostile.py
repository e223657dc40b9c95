"""Files that mean harm: each is set aside with its place, or refused in a sentence; time and memory stay bounded."""

import builtins
import gzip
import io
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_files import jpeg, save, save_lines
from small_sets import SETS

from lyrics.config import FileSet
from lyrics.data import coco, llava, pope, refcoco, sets, streams, vqa
from lyrics.data.files import BadImageError, decode
from lyrics.data.json_splitter import MalformedError, Splitter
from lyrics.data.ledger import Ledger
from lyrics.data.readers import flickr, pickles, tars, url_lists
from lyrics.data.records import BadRecordError, Record, Rejected
from lyrics.data.webdataset import WebPair, each, read_pairs
from lyrics.errors import InputError

MIB = 1 << 20


def peak_of(work) -> int:
    """The most bytes that Python objects took while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def least_peak_of(work) -> int:
    """Of three times: a table of the interpreter's own may grow by megabytes at any time, but not each time."""
    return min(peak_of(work) for _ in range(3))


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


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:30] + b"\0\0\0\0" + c[34:], lambda c: c[:5]])
def test_a_damaged_gzip_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(damage(gzip.compress(os.urandom(200) + b"a.jpg#0\tA dog .\n" * 50)))
    with pytest.raises(InputError, match=r"a\.txt\.gz cannot be read: "):
        list(flickr.each(path))


# Text


def test_a_long_line_is_passed_over_without_being_held(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as opened:
        opened.write(SETS["pope"][1]["coco_pope_random.json"] + b'{"image": "')
        opened.seek(200 * MIB, io.SEEK_CUR)  # zeros that the file system does not hold
        opened.write(b'"}\n' + SETS["pope"][1]["coco_pope_random.json"])
    found: list = []
    assert peak_of(lambda: found.extend(pope.each(path))) < 12 * MIB
    assert [getattr(item, "place", item) for item in found[::2]] == ["line 1", "line 3"]
    assert found[1].record == "line 2"
    assert found[1].reason == f"line too long: {200 * MIB + 14} bytes, at most {4 * MIB} are read"


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("start", [b"", b"["])
def test_a_line_of_two_gigabytes(tmp_path, start):
    """Once for real: as a line, and as an element of a list."""
    path = tmp_path / "a.json"
    good, last = json.dumps(POPE).encode(), b"]" if start else b"\n"
    with path.open("wb") as opened:
        opened.write(start + good + (b"," if start else b"\n") + b'{"image": "')
        opened.seek(2 << 30, io.SEEK_CUR)
        opened.write(b'"}' + (b"," if start else b"\n") + good + last)
    found: list = []
    assert peak_of(lambda: found.extend(pope.each(path))) < 16 * MIB
    assert [type(item) for item in found] == [Record, Rejected, Record]
    assert found[1].record in ("line 2", "[1]")


POPE = {"question_id": 1, "image": "1.jpg", "text": "Is there a dog in the image?", "label": "yes"}


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize(
    "long", ['"' + "x" * 500 + '"', '"' + "\\" * 600 + '"', "[" + "1," * 300 + "1]", '{"a": ' * 90 + "1" + "}" * 90]
)
def test_a_long_element_is_passed_over_wherever_the_chunks_end(long, chunk):
    document = f'{{"info": "[", "data": [1, "a,]", {long}, {{"b": [2]}}]}}'.encode()
    splitter = Splitter("data", "list", limit=100)
    found = [item for i in range(0, len(document), chunk) for item in splitter.feed(document[i : i + chunk])]
    splitter.finish()
    assert [found[0], found[1], found[3]] == [b"1", b'"a,]"', b'{"b": [2]}']
    assert isinstance(found[2], BadRecordError)
    assert str(found[2]).startswith("record too long: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(json_values, max_size=6), json_values, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_elements_are_those_that_the_whole_document_has(expected, other, chunk, indent, ascii_only):
    text = json.dumps({"a": other, "wanted": expected, "z": other}, indent=indent, ensure_ascii=ascii_only)
    document = text.encode("utf-8", "surrogatepass")
    splitter = Splitter("wanted", "list", limit=1 << 20)
    found = [item for i in range(0, len(document), chunk) for item in splitter.feed(document[i : i + chunk])]
    splitter.finish()
    assert [json.loads(item) for item in found] == expected


@pytest.mark.parametrize(
    ("document", "message", "byte"),
    [
        (b"[1, {]", "unexpected ]", 5),
        (b"[1]]", "unexpected ]", 3),
        (b"[" * 300, "nested deeper than 200", 200),
        (b'[1, "a', "it ends in the middle", 6),
        (b"[[1, 2]", "it ends in the middle", 7),
    ],
)
def test_brackets_that_do_not_match_are_refused_with_their_byte(document, message, byte):
    splitter = Splitter(None, "list", limit=100)
    with pytest.raises(MalformedError, match=message) as caught:
        list(splitter.feed(document))
        splitter.finish()
    assert caught.value.byte == byte


def test_endless_texts_are_rejected_alone(tmp_path):
    endless = "word " * 10_000
    captions = [{"image_id": 1, "caption": text} for text in (endless, "a dog")]
    images = [{"id": 1, "file_name": "1.jpg", "width": 4, "height": 3}]
    save(tmp_path / "captions.json", {"images": images, "annotations": captions})
    read = coco.read_captions(tmp_path / "captions.json")
    assert read.texts == [(1, "a dog")]
    assert [r.reason for r in read.rejected] == ["endless caption: 50000 characters, at most 20000 are read"]
    (tmp_path / "list.tsv").write_text(f"http://x.org/1.jpg\t{endless}\nhttp://x.org/2.jpg\ta cat\n")
    rejected, record = url_lists.each(tmp_path / "list.tsv", None)
    assert (rejected.record, record.samples[0].references) == ("line 1", ("a cat",))
    save_lines(tmp_path / "pope.json", [{**POPE, "text": endless}, POPE])
    assert [type(item) for item in pope.each(tmp_path / "pope.json")] == [Rejected, Record]


def test_a_table_whose_texts_unfold_to_gigabytes(tmp_path):
    """One text of eight megabytes in the dictionary, and two thousand rows that name it."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 2000, pa.int32()), pa.array(["x" * 8 * MIB, "a dog"]))
    urls = [f"http://x.org/{i}.jpg" for i in range(4000)]
    pq.write_table(pa.table({"url": urls, "caption": texts, "odd": [[{"a": 1}]] * 4000}), tmp_path / "list.parquet")
    assert (tmp_path / "list.parquet").stat().st_size < MIB
    found: list = []
    assert peak_of(lambda: found.extend(url_lists.each(tmp_path / "list.parquet", None))) < 16 * MIB
    assert sum(isinstance(item, Record) for item in found) == 2000
    assert (found[0].record, found[0].reason) == ("row 0", f"endless text: {8 * MIB} bytes in a cell")


def test_sizes_and_numbers_that_no_picture_has(tmp_path):
    line = {"img_path": "1.jpg", "expression": "the dog", "bbox": [1, 2, 3, 4], "width": 40, "height": 30}
    odd = [{"width": 10**400}, {"height": True}, {"bbox": [1, 2, 3, 10**400]}, {"bbox": [1, 2, 1e999, 4]}]
    save_lines(tmp_path / "r.jsonl", [line, *(line | change for change in odd)])
    assert [type(item) for item in refcoco.each(tmp_path / "r.jsonl")] == [Record, *[Rejected] * 4]


def test_an_open_quotation_mark_costs_no_more_than_a_field(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text('url,caption\nhttp://x.org/1.jpg,"open\n' + "http://x.org/2.jpg,a cat\n" * 12_000)
    found: list = []
    assert peak_of(lambda: found.extend(url_lists.each(path, "url"))) < 24 * MIB
    assert found[0].reason == "not CSV: field larger than field limit (131072)"
    assert sum(isinstance(item, Record) for item in found) > 6_000


def test_nul_bytes_and_controls_do_not_reach_a_text(tmp_path):
    (tmp_path / "tokens.txt").write_bytes(b"a.jpg#0\tA\0 dog\x07 .\na\0.jpg#0\tA dog .\n")
    first, second = flickr.each(tmp_path / "tokens.txt")
    assert first.samples[0].references == ("A dog .",)
    assert second.images == ("a\0.jpg",)  # a name like this is not looked for
    save_lines(tmp_path / "p.json", [{**POPE, "text": "Is\u0000 it?\ud800", "category": "a\nb"}])
    (record,) = pope.each(tmp_path / "p.json")
    assert (record.samples[0].question, record.samples[0].kind) == ("Is  it?�", "a b")


# Names and pictures


def ingest(folder: Path, **entry: str) -> tuple[Ledger, list[tuple[str, str]]]:
    config = SimpleNamespace(data=SimpleNamespace(folder=str(folder), sets=(FileSet(**entry),), max_images=None))
    ledger = Ledger(folder / "out" / "rejected.parquet", folder)
    sets.ingest(config, folder / "out", ledger)
    ledger.close()
    rows = pq.read_table(folder / "out" / "rejected.parquet").to_pylist()
    return ledger, [(row["record"], row["reason"]) for row in rows]


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 10, 10)).save(buffer, kind)
    return buffer.getvalue()


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
    save_lines(tmp_path / "pope.json", [{**POPE, "question_id": name, "image": name} for name in kinds])
    _, rejected = ingest(tmp_path, format="pope", path="pope.json", images="images", split="test")
    assert rejected == [("line 4", "unusable image: not a picture"), ("line 5", "unusable image: not a picture")]
    written = sorted(path.suffix for path in (tmp_path / "out" / "test" / "images").iterdir())
    assert written[0] == ".gif" and set(written) <= {".gif", ".jpg", ".png", ".webp"}


def test_a_format_that_starts_a_program_is_never_opened():
    """Pillow gives EPS to Ghostscript."""
    with pytest.raises(BadImageError, match="not a picture"):
        decode(encoded("EPS"))


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


# Growth


def generated(folder: Path, count: int) -> dict[str, object]:
    """Files of `count` records for readers that are streams."""
    save_lines(folder / "pope.json", ({**POPE, "question_id": i} for i in range(count)))
    (folder / "tokens.txt").write_text("".join(f"{i}.jpg#0\tA dog number {i} .\n" for i in range(count)))
    (folder / "list.csv").write_text("url,caption\n" + "".join(f"http://x.org/{i}.jpg,dog {i}\n" for i in range(count)))
    table = pa.table({"url": [f"http://x.org/{i}.jpg" for i in range(count)], "caption": ["a dog"] * count})
    pq.write_table(table, folder / "list.parquet", row_group_size=100)
    questions = [{"question_id": i, "image_id": i, "question": f"Who is {i}?"} for i in range(count)]
    save(folder / "q.json", {"questions": questions})
    save(folder / "a.json", {"annotations": [{**q, "answers": [{"answer": "a dog"}] * 10} for q in questions]})
    talk = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A dog."}]
    save(folder / "chat.json", [{"id": i, "image": f"{i}.jpg", "conversations": talk} for i in range(count)])
    (folder / "bad.jsonl").write_text("{}\n[]\nnonsense\n" * count)
    return {
        "pope": lambda: pope.each(folder / "pope.json"),
        "flickr": lambda: flickr.each(folder / "tokens.txt"),
        "csv": lambda: url_lists.each(folder / "list.csv", None),
        "parquet": lambda: url_lists.each(folder / "list.parquet", None),
        "vqa": lambda: vqa.each(folder / "q.json", folder / "a.json"),
        "llava": lambda: llava.each(folder / "chat.json"),
        "rejected": lambda: pope.each(folder / "bad.jsonl"),
    }


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_CHUNK", 4096)
    monkeypatch.setattr("lyrics.data.ledger._ROWS_AT_ONCE", 100)
    peaks: dict[str, list[int]] = {}
    for count in (200, 1_200):
        (folder := tmp_path / f"{count}").mkdir()
        for name, read in generated(folder, count).items():
            ledger = Ledger(folder / f"{name}.parquet")

            def work(read=read, ledger=ledger) -> None:
                for item in read():
                    if isinstance(item, Rejected):
                        ledger.add(item)

            peaks.setdefault(name, []).append(least_peak_of(work))
    assert {name: large for name, (small, large) in peaks.items() if large > 1.1 * small + MIB // 8} == {}
