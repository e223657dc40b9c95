"""Web pairs in tars, in the layout that img2dataset writes: KEY.jpg, KEY.txt, KEY.json, and a parquet file beside."""

import dataclasses
import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lyrics.data.files import decode
from lyrics.errors import InputError
from lyrics.io import atomic_path

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_MEMBER = "::"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebPair:
    """One pair as stored; `None` for what its tar lacks."""

    key: str
    image_bytes: bytes | None
    caption: str | None
    meta: dict[str, Any]


def read_pairs(tar: Path) -> Iterator[WebPair]:
    """The pairs in file order; neighbours with one key (the member name up to its first dot) are one pair.

    Raises:
        InputError: if the file is no readable tar.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(tar) as opened:
            for member in opened:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if name != key:
                    if key is not None:
                        yield _pair(key, parts)
                    key, parts = name, {}
                extracted = opened.extractfile(member)
                assert extracted is not None
                parts[suffix.lower()] = extracted.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{tar} is not a readable tar: {error}; write or download it again") from None
    if key is not None:
        yield _pair(key, parts)


def _pair(key: str, parts: dict[str, bytes]) -> WebPair:
    image = next((parts[suffix] for suffix in _IMAGE_SUFFIXES if suffix in parts), None)
    text = parts["txt"].decode("utf-8", errors="replace") if "txt" in parts else None
    meta: Any = {}
    if "json" in parts:
        try:
            meta = json.loads(parts["json"])
        except ValueError:  # also a wrong encoding; the pair is usable without
            meta = {}
    return WebPair(key=key, image_bytes=image, caption=text, meta=meta if isinstance(meta, dict) else {})


def write_tar(path: Path, pairs: Iterable[WebPair]) -> None:
    """Write a tar and its parquet table. Equal pairs give equal bytes: no times, owners or modes of this machine."""
    rows = []
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as opened:
        for pair in pairs:
            meta = {**pair.meta, "key": pair.key}
            if pair.caption is not None:
                meta["caption"] = pair.caption
            members = {"jpg": pair.image_bytes, "txt": None if pair.caption is None else pair.caption.encode()}
            members["json"] = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
            for suffix, content in members.items():
                if content is not None:
                    _add(opened, f"{pair.key}.{suffix}", content)
            rows.append(_row(pair, meta))
    with atomic_path(path.with_suffix(".parquet")) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary)


_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("key", pa.string()),
        ("caption", pa.string()),
        ("status", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
    ]
)


def _row(pair: WebPair, meta: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(pair.image_bytes).hexdigest() if pair.image_bytes is not None else None
    known = {name: meta.get(name) for name in ("url", "width", "height")}
    return {**known, "key": pair.key, "caption": pair.caption, "status": "success", "sha256": digest}


def _add(opened: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    opened.addfile(member, io.BytesIO(content))


def image_bytes(path: str | Path) -> bytes:
    """The stored bytes of `ImageRecord.path`: a file, or `folder/00000.tar::member.jpg`.

    Raises:
        InputError: if there is no such file or member.
    """
    tar, separator, member = str(path).partition(_MEMBER)
    try:
        if not separator:
            return Path(path).read_bytes()
        offset, size = _offsets(tar, Path(tar).stat().st_mtime_ns)[member]
        with Path(tar).open("rb") as opened:
            opened.seek(offset)
            return opened.read(size)
    except KeyError:
        raise InputError(f"{tar} has no member {member}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


@functools.lru_cache(maxsize=64)
def _offsets(tar: str, mtime_ns: int) -> dict[str, tuple[int, int]]:
    """Where each member's bytes lie, so that one picture is read without walking the tar."""
    with tarfile.open(tar) as opened:
        return {member.name: (member.offset_data, member.size) for member in opened if member.isfile()}


def open_image(path: str | Path) -> Image.Image:
    """The decoded RGB picture of `ImageRecord.path`.

    Raises:
        BadImageError: if the bytes are not a whole picture.
    """
    return decode(image_bytes(path))
