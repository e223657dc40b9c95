"""Damage to data sets: whatever a stranger's file holds, a reader yields records and reasons, or refuses the file.

`python -m pytest tests/data/test_fuzz.py -m soak` goes on for ten minutes; LYRICS_FUZZ_SECONDS is for more or less.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from small_sets import SETS, entry, pictures

from lyrics.config import FileSet
from lyrics.data import sets
from lyrics.data.annotated import read_split
from lyrics.data.ledger import Ledger
from lyrics.data.webdataset import read_pairs
from lyrics.errors import InputError

_TOKENS = [
    b'"',
    b"\\",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\t",
    b"\0",
    b"#0\t",
    b"\xff",
    b"\xed\xa0\x80",
]
_TOKENS += [
    b"../",
    b"/etc/passwd",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"\\ud800",
    b"9" * 400,
    b"[" * 300,
    b"\xef\xbb\xbf",
]
_LEAVES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1 << 70,
    1e308,
    float("nan"),
    "",
    " ",
    "\0",
    "\ud800",
    "../x",
    "x" * 30_000,
]


def _edit(content: bytes, edit: tuple[str, float, Any]) -> bytes:
    kind, where, what = edit
    at = int(where * len(content))
    if kind == "insert":
        return content[:at] + what + content[at:]
    if kind == "overwrite":
        return content[:at] + what + content[at + len(what) :]
    if kind == "delete":
        return content[:at] + content[at + what :]
    if kind == "cut":
        return content[:at]
    return content[:at] + content[at : at + what] * 3 + content[at + what :]


edits = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["insert", "overwrite"]), st.floats(0, 1), st.sampled_from(_TOKENS)),
        st.tuples(st.sampled_from(["insert", "overwrite"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
        st.tuples(st.sampled_from(["delete", "repeat"]), st.floats(0, 1), st.integers(1, 64)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.none()),
    ),
    max_size=4,
)
values = st.recursive(
    st.sampled_from(_LEAVES) | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in inside for place in _places(inner, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], new)
    return copy


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str, dict[str, bytes]]:
    """A format, a split, and the files of its small data set with one of them damaged, as bytes or as JSON."""
    name = draw(st.sampled_from(sorted(SETS)))
    files = SETS[name][1] | pictures()
    target = draw(st.sampled_from(sorted(files)))
    content = files[target]
    if target.endswith(("json", "jsonl")) and draw(st.booleans()):
        lines = [json.loads(line) for line in content.splitlines()]
        chosen = draw(st.integers(0, len(lines) - 1))
        place = draw(st.sampled_from(_places(lines[chosen])))
        lines[chosen] = _replaced(lines[chosen], place, draw(values))
        content = b"\n".join(json.dumps(line).encode() for line in lines)
    for edit in draw(edits):
        content = _edit(content, edit)
    return name, draw(st.sampled_from(["instruct", "web"])), {**files, target: content}


def ingest(folder: Path, name: str, split: str, files: dict[str, bytes]) -> Ledger | None:
    """Ingest a data set, and read what was written as the pipeline does; None where it was refused."""
    for file, content in files.items():
        path = folder / "in" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    chosen = FileSet(**entry(name, split))
    config: Any = SimpleNamespace(
        data=SimpleNamespace(folder=str(folder / "in"), sets=(chosen,), max_images=None, leak_hamming_bits=24)
    )
    ledger = Ledger(folder / "raw" / "rejected.parquet", folder / "in")
    try:
        sets.ingest(config, folder / "raw", ledger)
    except InputError as error:
        assert str(error).isprintable()
        return None
    finally:
        ledger.close()
    if split == "web":
        for pair in read_pairs(folder / "raw" / "web" / "00000.tar"):
            assert pair.image_bytes is not None and pair.caption
    else:
        read = read_split(folder / "raw" / split)
        assert read.rejected == []
        assert {sample.image_id for sample in read.samples} <= {image.image_id for image in read.images}
        assert len({sample.sample_id for sample in read.samples}) == len(read.samples)
    return ledger
