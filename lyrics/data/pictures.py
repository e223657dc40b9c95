"""Which picture a record is about, and which split it belongs to: by its content, whatever its names are."""

import dataclasses
import json
from pathlib import Path

from PIL import Image

from lyrics.data.disk_index import Index
from lyrics.data.files import MAX_IMAGE_BYTES, BadImageError, decode, is_safe_name, measure, pixel_hash
from lyrics.data.held_out import EVALUATED, HeldOut
from lyrics.data.raw_split import RawSplit
from lyrics.data.records import BadRecordError, Record


def content_of(record: Record, images: Path | None) -> bytes:
    """The stored bytes of a record's picture: its own, or those of the first file that has one of its names.

    Raises:
        BadRecordError: if there is none, or it is no file of a picture's size.
    """
    if record.content is not None:
        return record.content
    safe = [name for name in record.images if is_safe_name(name)]
    if not safe or images is None:
        raise BadRecordError(f"unsafe file name: {record.images[0][:80]!r} would leave the folder of images")
    for name in safe:
        path = images / name
        try:
            if not path.is_file():
                continue
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise BadRecordError(f"unusable image: {name!r} has {path.stat().st_size} bytes")
            return path.read_bytes()
        except OSError as error:  # a name too long for the file system, or no permission
            raise BadRecordError(f"unusable image: {error.strerror}") from None
    raise BadRecordError(f"missing image file: {safe[0]!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The picture of a record: its size in pixels and, once a split has it, its file name there.

    `content`, `suffix`, `digest` and `picture` are what a split needs to take it in, and empty for one that has it or
    has no room for it.
    """

    size: tuple[int, int]
    file_name: str = ""
    content: bytes = b""
    suffix: str = ""
    digest: str = ""
    picture: Image.Image | None = None


class Pictures:
    """Remembers on disk which split has which picture. Splits that measure must be read first: they keep it."""

    def __init__(self, held_out: HeldOut) -> None:
        self._index, self._held_out = Index(), held_out

    def find(self, record: Record, images: Path | None, split: str, *, full: bool = False) -> Found:
        """The picture that a record is about.

        Args:
            full: the split takes no further picture in, so that one it does not have need not be read again.

        Raises:
            BadRecordError: if it is missing or unusable, of another size than the record says, or in a split that
                `split` must not share it with.
        """
        known = self._index.get(*self._name(record, images, split))
        if known is None:
            found = self._read(record, images, split, full)
        else:
            file_name, width, height, reason = json.loads(known)
            if reason:
                raise BadRecordError(reason)
            found = Found(file_name=file_name, size=(width, height))
        check_size(record, found.size)
        return found

    def _read(self, record: Record, images: Path | None, split: str, full: bool) -> Found:
        try:
            content = content_of(record, images)
            suffix, width, height = measure(content)
            picture = decode(content)
            digest = pixel_hash(picture)
            owner = self._index.get("owner", digest) or split
            if owner != split and (owner in EVALUATED or split in EVALUATED):
                raise BadRecordError(_shared(owner, split))
            if fault := self._held_out.fault(split, picture):
                raise BadRecordError(fault)
        except (BadRecordError, BadImageError) as error:
            reason = f"unusable image: {error}" if isinstance(error, BadImageError) else str(error)
            self._index.add(*self._name(record, images, split), value=json.dumps(["", 0, 0, reason]))
            raise BadRecordError(reason) from None
        here = self._index.get("content", split, digest) or ""
        if here or full:  # the same picture under another name, or one that is left out
            self._index.add(*self._name(record, images, split), value=json.dumps([here, width, height, ""]))
            return Found(file_name=here, size=(width, height))
        return Found(size=(width, height), content=content, suffix=suffix, digest=digest, picture=picture)

    def keep(self, found: Found, record: Record, images: Path | None, split: RawSplit, source: str) -> str:
        """Put a picture that was found into a split, unless it is there; its file name."""
        if found.file_name:
            return found.file_name
        file_name = split.add_picture(found.content, found.suffix, found.size, name=record.images[0], source=source)
        known = json.dumps([file_name, *found.size, ""])
        self._index.add(*self._name(record, images, split.split), value=known)
        self._index.add("content", split.split, found.digest, value=file_name)
        self._index.add("owner", found.digest, value=split.split)
        self._index.add("size", *found.size)
        if found.picture is not None:
            self._held_out.add(split.split, record.images[0], found.picture)
        return file_name

    def _name(self, record: Record, images: Path | None, split: str) -> tuple[object, ...]:
        place = "" if record.content is None else record.place  # a tar may hold a name twice
        return "name", split, images or record.source, record.images[0], place

    def check_web(self, content: bytes) -> tuple[int, int] | None:
        """Width and height of a web pair's picture; None for what is no picture, which cleaning drops and counts.

        Only a picture of the size of one that is known is decoded and compared.

        Raises:
            BadRecordError: if it is in a split that measures.
        """
        try:
            _, width, height = measure(content)
            if self._index.get("size", width, height) is not None:
                owner = self._index.get("owner", pixel_hash(decode(content)))
                if owner in EVALUATED:
                    raise BadRecordError(_shared(owner, "web"))
        except BadImageError:
            return None
        return width, height

    def is_new(self, *key: object) -> bool:
        """Whether nobody asked so before."""
        return self._index.add("asked", *key)

    def close(self) -> None:
        self._index.close()


def check_size(record: Record, size: tuple[int, int]) -> None:
    """Raises: BadRecordError: if the record says that its picture has another size."""
    if record.size is not None and record.size != size:
        raise BadRecordError(f"wrong size: listed {record.size[0]} x {record.size[1]}, stored {size[0]} x {size[1]}")


def _shared(owner: str, split: str) -> str:
    return f"shared between splits: the same picture is in {owner}, so not in {split}"
