"""Data sets in public formats, each named with its format, files and split, as raw data (`data: files`).

Records are read as streams, and what must be remembered of them waits on disk. Formats: docs/formats.md.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lyrics.data import llava, pope, refcoco, vqa
from lyrics.data.held_out import EVALUATED, HeldOut
from lyrics.data.ledger import Ledger
from lyrics.data.pictures import Pictures, check_size, content_of
from lyrics.data.raw_split import RawSplit
from lyrics.data.readers import coco_sets, flickr, llava_context, mme, questions, refer, tars, url_lists, visual_genome
from lyrics.data.records import Annotation, BadRecordError, Record, Rejected, Sample, checked
from lyrics.data.webdataset import WebPair, write_tar
from lyrics.errors import InputError

if TYPE_CHECKING:
    from lyrics.config import Config, FileSet

# An image that is in two splits stays in the one that measures.
SPLITS = (*EVALUATED, "foundation", "instruct", "web")
_PAIRS_PER_SHARD = 1_000
_BYTES_PER_SHARD = 256 << 20


@dataclasses.dataclass(frozen=True)
class _Files:
    """The files of one data set, found."""

    chosen: "FileSet"
    path: Path
    images: Path | None
    second: Path | None

    @property
    def label(self) -> str:
        return self.chosen.name or self.chosen.format

    def one_second(self) -> Path:
        assert self.second is not None, "checked before anything is read"
        return self.second


_Read = Callable[[_Files], Iterator[Record | Rejected]]
_READERS: dict[str, _Read] = {
    "webdataset": lambda files: tars.each(_tars(files.path)),
    "url_list": lambda files: url_lists.each(files.path, files.chosen.named_by),
    "coco": lambda files: coco_sets.each(files.path, files.second),
    "flickr": lambda files: flickr.each(files.path, files.second),
    "visual_genome": lambda files: visual_genome.each(files.path),
    "vqa": lambda files: vqa.each(files.path, files.one_second()),
    "aokvqa": lambda files: questions.aokvqa(files.path, files.chosen.part),
    "gqa": lambda files: questions.gqa(files.path),
    "vizwiz": lambda files: questions.vizwiz(files.path),
    "textvqa": lambda files: questions.textvqa(files.path),
    "vsr": lambda files: questions.vsr(files.path),
    "scienceqa": lambda files: questions.scienceqa(files.path, files.chosen.part),
    "refcoco_lines": lambda files: refcoco.each(files.path),
    "refer": lambda files: refer.each(files.path, files.one_second(), files.chosen.part),
    "llava": lambda files: llava.each(files.path),
    "llava_lines": lambda files: llava.each_evaluation(files.path, files.one_second()),
    "llava_context": lambda files: llava_context.each(files.path),
    "pope": lambda files: pope.each(files.path),
    "mme": lambda files: mme.each(files.path, files.second),
}
_NEED_SECOND = {"vqa": "the annotations", "refer": "instances.json", "llava_lines": "the answers"}


def ingest(config: "Config", destination: Path, ledger: Ledger) -> dict[str, dict[str, int]]:
    """Write every split that a data set is named for; counts by split.

    Raises:
        InputError: before anything is read, if a file or folder is missing; later, if one is unusable as a whole or
            nothing usable is left of a split.
    """
    sets = [_find(Path(config.data.folder or ""), chosen) for chosen in config.data.sets]
    if not sets:
        raise InputError("data.sets is empty; name your data sets in params/data/files.yaml, as docs/formats.md shows")
    counts = {}
    with contextlib.closing(Pictures(HeldOut(config.data.leak_hamming_bits))) as pictures:
        for split in SPLITS:
            chosen = [one for one in sets if one.chosen.split == split]
            if not chosen:
                continue
            if split == "web":
                counts[split] = _write_web(chosen, pictures, destination / split, config.data.max_images, ledger)
            else:
                raw = RawSplit(destination / split, split)
                _write_annotated(chosen, pictures, raw, config.data.max_images, ledger)
                counts[split] = raw.close()
            if not counts[split].get("pairs", counts[split].get("images")):
                reasons = ", ".join(f"{n} {reason}" for reason, n in ledger.reasons.most_common(3)) or "no record"
                raise InputError(f"nothing usable for the split {split} in {_names(chosen)}; set aside: {reasons}")
    return counts


def _find(root: Path, chosen: "FileSet") -> _Files:
    path = root / chosen.path
    if chosen.format in _NEED_SECOND and chosen.annotations is None:
        raise InputError(
            f"data.sets: {chosen.path} ({chosen.format}) needs {_NEED_SECOND[chosen.format]} as well; "
            "name the file in `annotations`"
        )
    if chosen.format == "webdataset":
        if not _tars(path):
            raise InputError(f"{path} holds no .tar and is none; name a tar, a folder of them, or a pattern (*.tar)")
        return _Files(chosen, path, None, None)
    images = root / (chosen.images or ".")
    second = root / chosen.annotations if chosen.annotations is not None else None
    if not images.is_dir():
        raise InputError(f"{images} is not a folder; expected the images of {chosen.path} there")
    for file in filter(None, (path, second)):
        if not file.exists():
            raise InputError(f"{file} does not exist; correct data.sets in params/data/files.yaml, or the folder")
    return _Files(chosen, path, images, second)


def _tars(path: Path) -> Sequence[Path]:
    if path.is_dir():
        return sorted(path.glob("*.tar*"))
    return [path] if path.is_file() else sorted(path.parent.glob(path.name))


def _names(sets: Sequence[_Files]) -> str:
    return ", ".join(one.chosen.path for one in sets)


def _records(files: _Files, ledger: Ledger) -> Iterator[Record]:
    """What the reader of a data set finds; what it rejects goes to the ledger."""
    found = _READERS[files.chosen.format](files)
    for item in tqdm(found, f"ingest {files.chosen.split}: {files.label}", unit=" records"):
        if isinstance(item, Rejected):
            ledger.add(item)
        else:
            yield item


def _write_annotated(
    sets: Sequence[_Files], pictures: Pictures, split: RawSplit, limit: int | None, ledger: Ledger
) -> None:
    """A picture is taken in with the first thing that can be learnt from it."""
    for files in sets:
        for record in _records(files, ledger):
            full = split.pictures == limit
            try:
                found = pictures.find(record, files.images, split.split, full=full)
            except BadRecordError as error:
                ledger.add(record.rejected(str(error)))
                continue
            objects = record.objects(found.size, ledger.add)
            samples = _samples(record, found.size, pictures, split.split, ledger)
            if not (objects or samples) or (full and not found.file_name):
                continue
            file_name = pictures.keep(found, record, files.images, split, files.label)
            for item in objects:
                split.add_object(file_name, item)
            for sample in samples:
                split.add_sample(file_name, found.size, dataclasses.replace(sample, source=files.label))


def _samples(record: Record, size: tuple[int, int], pictures: Pictures, split: str, ledger: Ledger) -> list[Sample]:
    """What is valid and was not said before: the same id with the same content is a repetition."""
    valid = []
    for sample in record.samples:
        try:
            one = checked(sample, *size)
            said = one.sample_id, one.image_id, one.question, one.references, one.box_xyxy, one.turns
            if not pictures.is_new(split, record.source, *said):
                raise BadRecordError(f"repeated record: {one.sample_id} says the same again")
        except BadRecordError as error:
            ledger.add(record.rejected(str(error)))
        else:
            valid.append(one)
    return valid


def _write_web(
    sets: Sequence[_Files], pictures: Pictures, folder: Path, limit: int | None, ledger: Ledger
) -> dict[str, int]:
    """Pairs under new keys: those of two data sets, or of two tars, may be the same."""
    count = shard = size = 0
    held: list[WebPair] = []
    for files in sets:
        for record in _records(files, ledger):
            if count == limit:
                break
            try:
                pair = _pair(record, files, pictures, f"{shard:05d}{len(held):04d}", ledger)
            except BadRecordError as error:
                ledger.add(record.rejected(str(error)))
                continue
            held.append(pair)
            count, size = count + 1, size + len(pair.image_bytes or b"")
            if len(held) == _PAIRS_PER_SHARD or size > _BYTES_PER_SHARD:
                write_tar(folder / f"{shard:05d}.tar", held)
                held, shard, size = [], shard + 1, 0
    if held:
        write_tar(folder / f"{shard:05d}.tar", held)
    return {"pairs": count}


def _pair(record: Record, files: _Files, pictures: Pictures, key: str, ledger: Ledger) -> WebPair:
    """The first caption of a picture is its pair: cleaning would drop the same picture again as a duplicate."""
    caption = next((s.references[0] for s in record.samples if s.task == "caption" and s.references), None)
    if caption is None:
        raise BadRecordError("no caption: web pairs need one")
    content = content_of(record, files.images)
    size = pictures.check_web(content)
    meta = {"name": record.images[0], "source": files.label, **record.meta}
    if size is not None:
        check_size(record, size)
        meta |= {"width": size[0], "height": size[1]}
    if record.content is None and not pictures.is_new("web", files.images, record.images[0]):
        raise BadRecordError(f"picture again: {record.images[0]!r} has its caption already")
    if size is not None and record.annotations:
        meta["annotations"] = [_web_object(item) for item in record.objects(size, ledger.add)]
    return WebPair(key=key, image_bytes=content, caption=caption, meta=meta)


def _web_object(item: Annotation) -> dict[str, Any]:
    """What the oracle refiner reads of a web pair."""
    x0, y0, x1, y1 = item.box_xyxy
    return {"category": item.category, "bbox": [x0, y0, x1 - x0, y1 - y0], "rle": item.rle}
