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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lyrics.data.files import MAX_IMAGE_BYTES, decode, is_safe_name
from lyrics.data.records import Rejected, printable
from lyrics.data.streams import MAX_RECORD_BYTES, Unpacked, parse
from lyrics.errors import InputError
from lyrics.io import atomic_path

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_SUFFIX_LIMITS = {**dict.fromkeys(_IMAGE_SUFFIXES, MAX_IMAGE_BYTES), "txt": 1 << 20, "json": MAX_RECORD_BYTES}
_MEMBER = "::"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebPair:
    """One pair as stored; `None` for what its tar lacks. `offset`: the byte of its first header in the tar."""

    key: str
    image_bytes: bytes | None
    caption: str | None
    meta: dict[str, Any]
    offset: int = 0

    @property
    def suffix(self) -> str:
        """Of the picture's member in a tar of ours: what its bytes are, whatever they were called."""
        content = self.image_bytes or b""
        if content.startswith(b"\x89PNG"):
            return "png"
        return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else "jpg"


def read_pairs(tar: Path) -> Iterator[WebPair]:
    """The pairs in file order; neighbours with one key (the member name up to its first dot) are one pair.

    Raises:
        InputError: if the file is no readable tar.
    """
    return (item for item in each(tar) if isinstance(item, WebPair))


def each(tar: Path) -> Iterator[WebPair | Rejected]:
    """`read_pairs`, with the members that are set aside: their place is the byte of their header in the (unpacked) tar.

    Nothing is written anywhere, no link is followed, and no member is held that nobody asks for.

    Raises:
        InputError: if the file is no readable tar, after what could be read of it.
    """
    key, place = "", 0
    parts: dict[str, bytes] = {}
    damage: InputError | None = None
    for member, reason, content in _members(tar):
        if isinstance(member, InputError):
            damage = member
            break
        if content is not None:
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            name = f"{folder}/{stem}" if folder else stem
            if name != key:
                if parts:
                    yield _pair(key, parts, place)
                key, place, parts = name, member.offset, {}
            if suffix.lower() not in parts:
                parts[suffix.lower()] = content
                continue
            reason = f"repeated member: {member.name[:80]!r}"
        if reason is not None:
            yield Rejected(source=str(tar), record=f"byte {member.offset}", reason=reason)
    if parts:
        yield _pair(key, parts, place)
    if damage is not None:
        raise damage


class _Cautious(io.BufferedReader):
    """Refuses to hold what no member of ours needs: an extended header may claim gigabytes. `last` was read last."""

    last = b""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_IMAGE_BYTES + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = super().read(size)
        return self.last


def _members(tar: Path) -> Iterator[tuple[tarfile.TarInfo | InputError, str | None, bytes | None]]:
    """Headers, why they are set aside, the content of those that belong to a pair; last what is wrong with the tar."""
    last = -1
    try:
        with _Cautious(Unpacked(tar)) as stream, tarfile.open(fileobj=stream, mode="r:") as opened:
            while (member := opened.next()) is not None:
                opened.members = []  # type: ignore[attr-defined]  # it would keep every header
                if member.offset <= last:
                    raise tarfile.ReadError(f"the member at byte {last} points backwards")
                last = member.offset
                fault = _fault(member)
                extracted = opened.extractfile(member) if fault is None and _is_part(member) else None
                yield member, fault, None if extracted is None else extracted.read()
            if stream.last.strip(b"\0"):  # tarfile takes any block that is no header for the end
                raise tarfile.ReadError("no header where one should be")
    except InputError as error:
        yield error, None, None
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, IndexError, OverflowError, RecursionError) as e:
        reached = f" after byte {last}" if last >= 0 else ""
        damage = InputError(f"{tar} is not a readable tar{reached}: {printable(e)}; write or download it again")
        yield damage, None, None


def _is_part(member: tarfile.TarInfo) -> bool:
    return member.isreg() and member.name.rpartition("/")[2].partition(".")[2].lower() in _SUFFIX_LIMITS


def _fault(member: tarfile.TarInfo) -> str | None:
    """Why a member is set aside. Folders and files of other kinds are no fault."""
    if not is_safe_name(member.name):
        return f"unsafe member name: {member.name[:80]!r}"
    if member.issym() or member.islnk():
        return f"link: {member.name[:80]!r} to {member.linkname[:80]!r}"
    if member.isdev():
        return f"device or pipe: {member.name[:80]!r}"
    if member.issparse():
        return f"sparse member: {member.name[:80]!r}"
    if _is_part(member) and member.size > (limit := _SUFFIX_LIMITS[member.name.rpartition(".")[2].lower()]):
        return f"member too large: {member.name[:80]!r} has {member.size} bytes, at most {limit} are read"
    return None


def _pair(key: str, parts: dict[str, bytes], place: int) -> WebPair:
    """The caption is that of the text, else that of the metadata."""
    image = next((parts[suffix] for suffix in _IMAGE_SUFFIXES if suffix in parts), None)
    text = parts["txt"].decode("utf-8", errors="replace") if "txt" in parts else None
    meta = parse(parts["json"]) if "json" in parts else {}  # the pair is usable without
    meta = meta if isinstance(meta, dict) else {}
    if text is None and isinstance(meta.get("caption"), str):
        text = meta["caption"]
    return WebPair(key=key, image_bytes=image, caption=text, meta=meta, offset=place)


def write_tar(path: Path, pairs: Iterable[WebPair]) -> int:
    """Write a tar and its parquet table. Equal pairs give equal bytes: no times, owners or modes of this machine.

    Returns:
        The number of pairs.
    """
    rows = []
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as opened:
        for pair in pairs:
            meta = {**pair.meta, "key": pair.key}
            if pair.caption is not None:
                meta["caption"] = pair.caption
            members = {pair.suffix: pair.image_bytes, "txt": None if pair.caption is None else pair.caption.encode()}
            members["json"] = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
            for suffix, content in members.items():
                if content is not None:
                    _add(opened, f"{pair.key}.{suffix}", content)
            rows.append(_row(pair, meta))
    with atomic_path(path.with_suffix(".parquet")) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary)
    return len(rows)


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
        offset, size = _places(tar, Path(tar).stat().st_mtime_ns).find(member)
        with Path(tar).open("rb") as opened:
            opened.seek(offset)
            return opened.read(size)
    except KeyError:
        raise InputError(f"{tar} has no member {member}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


class _Places:
    """Where the bytes of a tar's members lie, so that one picture is read without walking the tar.

    In arrays, of some 40 bytes a member: of a million pictures that are read in random order none is forgotten.
    """

    def __init__(self, tar: str) -> None:
        with tarfile.open(tar) as opened:
            found = {m.name.encode(errors="surrogateescape"): (m.offset_data, m.size) for m in opened if m.isfile()}
        names = sorted(found)
        self.names = np.array(names, dtype=np.bytes_)
        self.places_N2 = np.array([found[name] for name in names], dtype=np.int64).reshape(-1, 2)

    def find(self, name: str) -> tuple[int, int]:
        """Offset and size in bytes.

        Raises:
            KeyError: there is no such member.
        """
        sought = np.bytes_(name.encode(errors="surrogateescape"))
        index = int(np.searchsorted(self.names, sought))
        if index == len(self.names) or self.names[index] != sought:
            raise KeyError(name)
        offset, size = self.places_N2[index].tolist()
        return offset, size


@functools.cache
def _places(tar: str, mtime_ns: int) -> _Places:
    return _Places(tar)


def open_image(path: str | Path) -> Image.Image:
    """The decoded RGB picture of `ImageRecord.path`.

    Raises:
        BadImageError: if the bytes are not a whole picture.
    """
    return decode(image_bytes(path))
