"""How the pictures are cut into shards: a plan on disk, so that neither driver nor worker holds more than one shard.

plan/SPLIT/   00000.json … (the records of each shard), samples.parquet; plan/splits.json when all are written
"""

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pydantic import TypeAdapter

from lyrics import io
from lyrics.data.records import ImageRecord
from lyrics.refiner import features
from lyrics.refiner.sources import Source, caption_sample, no_pictures

_RECORDS = TypeAdapter(list[ImageRecord])
_ATTEMPT = ".attempt-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard of a split: its records lie in `plan`, its result belongs in `folder`."""

    split: str
    number: int
    plan: Path
    folder: Path

    def __str__(self) -> str:
        return f"{self.split}/{self.folder.name}"

    @property
    def is_done(self) -> bool:
        return self.folder.exists()

    def records(self) -> list[ImageRecord]:
        return _RECORDS.validate_json(self.plan.read_bytes())

    def images(self) -> list[features.RefinedImage]:
        """The rows of the finished shard."""
        return features.read_images(self.folder / features.IMAGES_FILE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedSplit:
    name: str
    shards: list[Shard]
    samples: Path


def plan(read: Callable[[], Iterable[Source]], work: Path, images_per_shard: int) -> list[PlannedSplit]:
    """The shards of all sources; written once, read again by a run that goes on in the same folder.

    Raises:
        InputError: the sources have no picture, or what reading them raises.
    """
    finished = work / "plan" / "splits.json"
    if not finished.exists():
        counts = {source.name: _write(source, finished.parent / source.name, images_per_shard) for source in read()}
        if not any(counts.values()):
            raise no_pictures()
        io.write_json(finished, list(counts.items()))
    return [_split(name, count, work) for name, count in io.read_json(finished)]


def _write(source: Source, folder: Path, images_per_shard: int) -> int:
    images = iter(source.images)
    count = 0
    while records := list(itertools.islice(images, images_per_shard)):
        io.write_bytes(_plan_file(folder, count), _RECORDS.dump_json(records))
        count += 1
    samples: Iterable = source.samples if source.samples is not None else _captions(folder, count)
    features.write_samples(folder / features.SAMPLES_FILE, samples)
    return count


def _captions(folder: Path, count: int) -> Iterator:
    for number in range(count):
        yield from map(caption_sample, _RECORDS.validate_json(_plan_file(folder, number).read_bytes()))


def _plan_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"


def _split(name: str, count: int, work: Path) -> PlannedSplit:
    folder = work / "plan" / name
    shards = [
        Shard(
            split=name,
            number=number,
            plan=_plan_file(folder, number),
            folder=features.shard_folder(work / "splits" / name, number),
        )
        for number in range(count)
    ]
    return PlannedSplit(name=name, shards=shards, samples=folder / features.SAMPLES_FILE)


@contextlib.contextmanager
def attempt_at(folder: Path) -> Iterator[Path]:
    """A place to write what belongs in `folder`; the first who is ready puts it there.

    A worker of a lost node may still be at work on the shard that another has been given since: each writes apart.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_ATTEMPT))
    try:
        yield own / folder.name
        try:
            (own / folder.name).rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)


def forget_attempts(split: PlannedSplit) -> None:
    """Remove what killed workers left behind."""
    for folder in {shard.folder.parent for shard in split.shards}:
        for left in folder.glob(f"{_ATTEMPT}*"):
            shutil.rmtree(left, ignore_errors=True)
