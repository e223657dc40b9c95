"""Webdataset tars as img2dataset writes them, with or without captions, as records."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lyrics.data import webdataset
from lyrics.data.disk_index import Index
from lyrics.data.readers import tables
from lyrics.data.records import BadRecordError, Record, Rejected, Sample, text
from lyrics.errors import InputError


def each(tars: Sequence[Path]) -> Iterator[Record | Rejected]:
    """A record for each pair. A tar that ends in the middle is read as far as it goes, then rejected at that byte.

    The caption is that of the text, the metadata, or the table of the same name beside the tar, in this order.
    """
    for tar in tars:
        with contextlib.closing(_Table(_table_of(tar))) as table:
            last = 0
            try:
                for item in webdataset.each(tar):
                    if isinstance(item, Rejected):
                        yield item
                        continue
                    last = item.offset
                    yield _record(tar, item, table)
            except InputError as error:
                yield Rejected(source=str(tar), record=f"byte {last}", reason=f"damaged tar: {error}")


def _record(tar: Path, pair: webdataset.WebPair, table: "_Table") -> Record | Rejected:
    place = f"byte {pair.offset}"
    if pair.image_bytes is None:
        return Rejected(source=str(tar), record=place, reason=f"pair without picture: {pair.key[:80]!r}")
    try:
        caption = pair.caption if pair.caption is not None else table.caption(pair.key)
        captions = (text(caption, "caption"),) if caption is not None else ()
    except BadRecordError as error:
        return Rejected(source=str(tar), record=place, reason=str(error))
    name = pair.key
    sample = Sample(sample_id=f"caption-{name}", image_id=name, task="caption", kind="caption", references=captions)
    url = pair.meta.get("url")
    return Record(
        images=(name,),
        content=pair.image_bytes,
        samples=(sample,) if captions else (),
        meta={"url": text(url, "url")[:2048]} if isinstance(url, str) and url.strip() else {},
        source=str(tar),
        place=place,
    )


def _table_of(tar: Path) -> Path:
    """Of 00000.tar and 00000.tar.gz it is 00000.parquet."""
    return tar.with_name(f"{tar.name.removesuffix('.gz').removesuffix('.tar')}.parquet")


class _Table:
    """Captions by key of the table beside a tar, read when the first is asked for; an unreadable table has none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._captions: Index | None = None

    def caption(self, key: str) -> str | None:
        if self._captions is None:
            self._captions = Index()
            if self._path.is_file():
                self._read(self._captions)
        return self._captions.get(key)

    def _read(self, captions: Index) -> None:
        with contextlib.suppress(InputError):
            if {"key", "caption"} <= set(tables.columns(self._path)):
                for _, (key, caption) in tables.rows(self._path, ["key", "caption"]):
                    if isinstance(key, str) and isinstance(caption, str):
                        captions.add(key, value=caption)

    def close(self) -> None:
        if self._captions is not None:
            self._captions.close()
