"""Lists of addresses with captions: which column is what, and which picture a row is about."""

import pytest
from small_files import divided

from lyrics.data.readers import url_lists
from lyrics.errors import InputError


@pytest.mark.parametrize(
    ("text", "named_by", "expected"),
    [
        ("a dog\thttp://x.org/p/1%20a.jpg?w=3\n", None, [("1 a.jpg", "a dog")]),  # Conceptual Captions
        ("http://x.org/1.jpg\ta dog\n", None, [("1.jpg", "a dog")]),  # Conceptual 12M
        ('url,caption\nhttp://x.org/1.jpg,"a, dog\nat night"\n', None, [("1.jpg", "a, dog\nat night")]),
        ("SAMPLE_ID,URL,TEXT\n17,http://x.org/1.jpg,a dog\n", None, [("17", "a dog")]),
        ("SAMPLE_ID,URL,TEXT\n17,http://x.org/1.jpg,a dog\n", "url", [("1.jpg", "a dog")]),
        ("url\tcaption\nhttp://x.org/a\tone\nhttp://x.org/b\ttwo\n", "row", [("0.jpg", "one"), ("1.jpg", "two")]),
        ("image,caption\n1000268201.jpg,A child .\n", None, [("1000268201.jpg", "A child .")]),
        ("img/1.png\ta dog\n", None, [("img/1.png", "a dog")]),
    ],
)
def test_columns_are_told_apart_by_title_or_content(tmp_path, text, named_by, expected):
    path = tmp_path / "list.txt"
    path.write_text(text)
    records, rejected = divided(url_lists.each(path, named_by))
    assert rejected == []
    assert [(record.images[0], record.samples[0].references[0]) for record in records] == expected


def test_columns_that_nothing_tells_apart_are_refused(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("one,two\n")
    with pytest.raises(InputError, match=r"list\.csv: nothing in the first row is an address"):
        list(url_lists.each(path, None))
    path.write_text("url,caption\n")
    with pytest.raises(InputError, match=r"list\.csv has no column to name pictures by key"):
        list(url_lists.each(path, "key"))


def test_two_addresses_that_end_alike_are_not_one_picture(tmp_path):
    path = tmp_path / "list.tsv"
    path.write_text("http://a/1.jpg\tone\nhttp://b/1.jpg\ttwo\nhttp://a/1.jpg\tthree\n")
    records, rejected = divided(url_lists.each(path, None))
    assert [record.place for record in records] == ["line 1", "line 3"]
    assert rejected == [("line 2", "ambiguous file name: another address ends in '1.jpg' too")]


def test_a_list_in_windows_1252_and_a_bad_row_between_good_ones(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b"url,caption\nhttp://a/1.jpg,caf\xe9\nhttp://a/2.jpg\nhttp://a/3.jpg,\xe2\x82\xac\n")
    records, rejected = divided(url_lists.each(path, "row"))
    assert [(r.images[0], r.samples[0].references[0]) for r in records] == [("0.jpg", "café"), ("2.jpg", "€")]
    assert rejected == [("line 3", "no caption: found None")]
