"""Flickr8k's and Flickr30k's token files: `NAME.jpg#NUMBER<TAB>caption`, with the official lists of the splits."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lyrics.data.disk_index import Index
from lyrics.data.records import BadRecordError, Record, Rejected, Sample, convert, name, one_line
from lyrics.data.streams import text_lines


def each(path: Path, split_list: Path | None = None) -> Iterator[Record | Rejected]:
    """A caption sample for each line; of the pictures in `split_list` alone, where there is one.

    Raises:
        InputError: if a file is missing or damaged.
    """
    with contextlib.closing(Index()) as chosen:
        if split_list is not None:
            for _, line in text_lines(split_list):
                if isinstance(line, str):
                    chosen.add(line.strip())
        yield from convert(path, text_lines(path), lambda line: _record(line, chosen if split_list else None))


def _record(line: Any, chosen: Index | None) -> Record | None:
    label, tab, caption = line.partition("\t")
    image, sign, number = label.rpartition("#")
    if not tab or not sign or not number.strip().isdigit():
        raise BadRecordError(f"bad line: expected NAME#NUMBER, a tab and a caption, found {line[:60]!r}")
    image = name(image.strip())
    if chosen is not None and image not in chosen:
        return None
    sample = Sample(
        sample_id=f"caption-{image}-{number.strip()}",
        image_id=image,
        task="caption",
        kind="caption",
        references=(one_line(caption, "caption"),),
    )
    return Record(images=(image,), samples=(sample,))
