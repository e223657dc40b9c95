"""Text of strangers as streams: what is too long, too deep or damaged is passed over, and memory does not grow."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_files import MIB, least_peak_of, peak_of, save, save_lines
from small_sets import POPE, SETS

from lyrics.data import coco, llava, pope, refcoco, streams, vqa
from lyrics.data.json_splitter import MalformedError, Splitter
from lyrics.data.ledger import Ledger
from lyrics.data.readers import flickr, url_lists
from lyrics.data.records import BadRecordError, Record, Rejected, listed


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


def test_readers_unpack_gzip_whatever_its_name(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_bytes(gzip.compress(b"a.jpg#0\tA dog .\nno line at all\n"))
    samples, rejected = listed(flickr.each(path))
    assert [sample.references for sample in samples] == [("A dog .",)]
    assert rejected[0].record == "line 2"


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
