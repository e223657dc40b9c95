"""What the frozen parts saw in a split, on disk: parquet tables and memory-mapped float16 shards, read at random.

A split is a folder: images.parquet, samples.parquet, and shard-00000/ … with image_tokens.npy (n, patches, width),
detector_tokens.npy and segmenter_tokens.npy (n, max_objects, width; rows past an image's objects are zero).
"""

import dataclasses
import itertools
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lyrics import io
from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.model.inputs import SeenImage

ARRAYS = ("image_tokens", "detector_tokens", "segmenter_tokens")
IMAGES_FILE = "images.parquet"
SAMPLES_FILE = "samples.parquet"
_OPEN_SHARDS = 64  # each holds three file handles
_ROWS_PER_GROUP = 1000
_FLOAT16_MAX = float(np.finfo(np.float16).max)

_IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("tags", pa.list_(pa.string())),
        ("boxes_xyxy", pa.list_(pa.list_(pa.float64()))),
        ("scores", pa.list_(pa.float64())),
        ("masks", pa.list_(pa.string())),
        ("spatial_text", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)
_SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("task", pa.string()),
        ("kind", pa.string()),
        ("question", pa.string()),
        ("references", pa.list_(pa.string())),
        ("box_xyxy", pa.list_(pa.float64())),
        ("turns", pa.list_(pa.list_(pa.string()))),
        ("source", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinedImage:
    """One picture's row. Boxes are pixels; `masks` are compressed COCO counts at the picture's size, one per box."""

    image_id: str
    path: str
    width: int
    height: int
    captions: tuple[str, ...]
    tags: tuple[str, ...]
    boxes_xyxy: tuple[tuple[float, float, float, float], ...]
    scores: tuple[float, ...]
    masks: tuple[str, ...]
    spatial_text: str
    shard: int
    row: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The features of one picture: (patches, width), (objects, width), (objects, width)."""

    image_tokens_PD: np.ndarray
    detector_tokens_ND: np.ndarray
    segmenter_tokens_ND: np.ndarray


def write_shard(folder: Path, images: Sequence[RefinedImage], tokens: Sequence[Tokens], max_objects: int) -> None:
    """Write one shard with its part of the image table; the folder appears whole or not at all."""
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _save(scratch, "image_tokens", np.stack([t.image_tokens_PD for t in tokens]))
    for name in ("detector_tokens", "segmenter_tokens"):
        local = [getattr(t, f"{name}_ND") for t in tokens]
        padded = np.zeros((len(local), max_objects, local[0].shape[1]), np.float32)
        for row, array in zip(padded, local, strict=True):
            row[: len(array)] = array
        _save(scratch, name, padded)
    write_images(scratch / IMAGES_FILE, images)
    io.publish(scratch, folder)


def _save(folder: Path, name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise ValueError(f"{folder}: {name} has a value that is not finite; check the frozen part that computes it")
    with (folder / f"{name}.npy").open("wb") as opened:
        np.save(opened, np.clip(array, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16), allow_pickle=False)
        opened.flush()
        os.fsync(opened.fileno())


def write_images(path: Path, images: Iterable[RefinedImage]) -> None:
    _write_table(path, (vars(image) for image in images), _IMAGE_SCHEMA)


def read_images(path: Path) -> list[RefinedImage]:
    return list(stream_images(path))


def stream_images(path: Path) -> Iterator[RefinedImage]:
    """The rows in order; a group of them is held."""
    for row in _stream_table(path, _IMAGE_SCHEMA):
        row.update({key: tuple(row[key]) for key in ("captions", "tags", "scores", "masks")})
        row["boxes_xyxy"] = tuple(map(tuple, row["boxes_xyxy"]))
        yield RefinedImage(**row)


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    _write_table(path, (vars(sample) for sample in samples), _SAMPLE_SCHEMA)


def read_samples(path: Path) -> list[Sample]:
    rows = list(_stream_table(path, _SAMPLE_SCHEMA))
    for row in rows:
        row["references"] = tuple(row["references"])
        row["box_xyxy"] = tuple(row["box_xyxy"]) if row["box_xyxy"] is not None else None
        row["turns"] = tuple(map(tuple, row["turns"]))
    return [Sample(**row) for row in rows]


class RefinedSplit:
    """A refined split, opened for reading: tables in memory, features memory-mapped.

    Raises:
        InputError: naming the file that is missing, corrupt or of another run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.images = {image.image_id: image for image in read_images(self.folder / IMAGES_FILE)}
        self.image_ids = list(self.images)
        self.samples = read_samples(self.folder / SAMPLES_FILE)
        self._rows: dict[int, int] = {}
        for image in self.images.values():
            self._rows[image.shard] = max(self._rows.get(image.shard, 0), image.row + 1)
        self._shards: OrderedDict[int, tuple[np.ndarray, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getstate__(self) -> dict:
        return {**vars(self), "_shards": OrderedDict()}  # a copy in another process opens its own files

    def seen(self, image_id: str) -> SeenImage:
        image = self.images[image_id]
        image_tokens, detector_tokens, segmenter_tokens = self._shard(image.shard)
        count = len(image.tags)
        boxes = np.asarray(image.boxes_xyxy, np.float32).reshape(-1, 4)
        size = np.asarray([image.width, image.height, image.width, image.height], np.float32)
        return SeenImage(
            image_tokens_PD=np.array(image_tokens[image.row]),
            detector_tokens_ND=np.array(detector_tokens[image.row, :count]),
            segmenter_tokens_ND=np.array(segmenter_tokens[image.row, :count]),
            tags=image.tags,
            boxes_xyxy_N4=np.clip(boxes / size, 0.0, 1.0),
            spatial_text=image.spatial_text,
        )

    def _shard(self, number: int) -> tuple[np.ndarray, ...]:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        arrays = tuple(_open_array(shard_folder(self.folder, number) / f"{n}.npy", self._rows[number]) for n in ARRAYS)
        self._shards[number] = arrays
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)
        return arrays


def shard_folder(split: Path, number: int) -> Path:
    return split / f"shard-{number:05d}"


def _open_array(path: Path, rows: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); make it again with: python -m lyrics refine") from None
    if array.ndim != 3 or array.dtype != np.float16 or len(array) < rows:
        raise InputError(
            f"{path} holds {array.dtype} {array.shape}, expected float16 with three axes and at least {rows} rows; "
            "make it again with: python -m lyrics refine"
        )
    return array


def _write_table(path: Path, rows: Iterable[dict], schema: pa.Schema) -> None:
    """In groups of rows, so that a table of any length is written without being held."""
    waiting = iter(rows)
    with io.atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        while group := list(itertools.islice(waiting, _ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _stream_table(path: Path, schema: pa.Schema) -> Iterator[dict]:
    try:
        with pq.ParquetFile(path) as table:
            if missing := sorted(set(schema.names) - set(table.schema_arrow.names)):
                raise pa.ArrowInvalid(f"no column {', '.join(missing)}")
            for group in table.iter_batches(_ROWS_PER_GROUP, columns=schema.names):
                yield from pa.Table.from_batches([group]).cast(schema).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read ({error}); make it again with: python -m lyrics refine") from None
