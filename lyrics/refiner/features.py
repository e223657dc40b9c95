"""What the frozen parts saw in a split, on disk: parquet tables and memory-mapped shards, read at random.

A split is a folder: images.parquet, samples.parquet, and shard-00000/ … with image_tokens.npy (n, patches, width),
detector_tokens.npy and segmenter_tokens.npy (n, max_objects, width; rows past an image's objects are zero), and
shard.json (see `shard_files`).
"""

import dataclasses
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lyrics import io
from lyrics.data.records import Sample
from lyrics.data.rows import write_rows
from lyrics.errors import InputError
from lyrics.model.inputs import SeenImage
from lyrics.refiner import shard_files
from lyrics.refiner.precision import FeatureDtype, Packed, pack, rounded

IMAGE_TOKENS, LOCAL_TOKENS = "image_tokens", ("detector_tokens", "segmenter_tokens")
IMAGES_FILE = "images.parquet"
SAMPLES_FILE = "samples.parquet"
_OPEN_SHARDS = 64  # each holds up to six file handles
_ROWS_PER_GROUP = 1000

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


Look: TypeAlias = Callable[[Sequence[str]], np.ndarray]
"""Image tokens (n, patches, width) of the pictures at `RefinedImage.path`, as `online.Looker` gives them."""


def write_shard(
    folder: Path,
    pictures: Iterable[tuple[RefinedImage, Tokens]],
    *,
    max_objects: int,
    feature_dtype: FeatureDtype = "fp16",
    image_tokens: bool = True,
) -> None:
    """Write one shard with its part of the image table; the folder appears whole or not at all.

    Args:
        pictures: taken one by one, so that none is held as it came.
        image_tokens: False does not keep them; whoever reads the shard computes them.
    """
    images: list[RefinedImage] = []
    arrays: dict[str, list[Packed]] = {name: [] for name in (IMAGE_TOKENS, *LOCAL_TOKENS)}
    for image, tokens in pictures:
        images.append(image)
        arrays[IMAGE_TOKENS].append(_pack(folder, IMAGE_TOKENS, tokens.image_tokens_PD, feature_dtype))
        for name in LOCAL_TOKENS:
            array_ND = getattr(tokens, f"{name}_ND")
            padded = np.zeros((max_objects, array_ND.shape[1]), np.float32)
            padded[: len(array_ND)] = array_ND
            arrays[name].append(_pack(folder, name, padded, feature_dtype))
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shard_files.write(scratch, arrays, feature_dtype, list(arrays) if image_tokens else LOCAL_TOKENS)
    write_images(scratch / IMAGES_FILE, images)
    io.publish(scratch, folder)


def _pack(folder: Path, name: str, array_XD: np.ndarray, feature_dtype: FeatureDtype) -> Packed:
    try:
        return pack(array_XD, feature_dtype)
    except ValueError as error:
        raise ValueError(f"{folder}: {name}: {error}") from None


def write_images(path: Path, images: Iterable[RefinedImage]) -> None:
    write_rows(path, map(vars, images), _IMAGE_SCHEMA, "zstd")


def read_images(path: Path) -> list[RefinedImage]:
    return list(stream_images(path))


def stream_images(path: Path) -> Iterator[RefinedImage]:
    """The rows in order; a group of them is held."""
    for row in _stream_table(path, _IMAGE_SCHEMA):
        row.update({key: tuple(row[key]) for key in ("captions", "tags", "scores", "masks")})
        row["boxes_xyxy"] = tuple(map(tuple, row["boxes_xyxy"]))
        yield RefinedImage(**row)


def count_rows(path: Path) -> int:
    """Of a table, without reading them.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    write_rows(path, map(vars, samples), _SAMPLE_SCHEMA, "zstd")


def read_samples(path: Path) -> list[Sample]:
    rows = list(_stream_table(path, _SAMPLE_SCHEMA))
    for row in rows:
        row["references"] = tuple(row["references"])
        row["box_xyxy"] = tuple(row["box_xyxy"]) if row["box_xyxy"] is not None else None
        row["turns"] = tuple(map(tuple, row["turns"]))
    return [Sample(**row) for row in rows]


class RefinedSplit:
    """A refined split, opened for reading: tables in memory, features memory-mapped.

    Args:
        look: computes image tokens, where the shards hold none.
        verify: compare every file of features with its checksum first.

    Raises:
        InputError: naming the file that is missing, damaged or of another run.
    """

    def __init__(self, folder: Path, look: Look | None = None, *, verify: bool = True) -> None:
        self.folder, self.look = Path(folder), look
        self.images = {image.image_id: image for image in read_images(self.folder / IMAGES_FILE)}
        self.image_ids = list(self.images)
        self.samples = read_samples(self.folder / SAMPLES_FILE)
        self._rows: dict[int, int] = {}
        for image in self.images.values():
            self._rows[image.shard] = max(self._rows.get(image.shard, 0), image.row + 1)
        self._shards: OrderedDict[int, shard_files.OpenShard] = OrderedDict()
        if verify:
            self.verify()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getstate__(self) -> dict:
        return {**vars(self), "_shards": OrderedDict()}  # a copy in another process opens its own files

    def verify(self, part: slice = slice(None)) -> int:
        """Read the shards (those of `part`) and compare them with their checksums, on all cores; returns their bytes.

        Raises:
            InputError: naming the first file that differs.
        """
        folders = [shard_folder(self.folder, number) for number in list(self._rows)[part]]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sizes = pool.map(shard_files.verify, folders)
            shown = tqdm(sizes, desc=f"verify {self.folder}", total=len(folders), unit="shard", delay=2, leave=False)
            return sum(shown)

    def seen(self, image_id: str) -> SeenImage:
        return self.see([image_id])[0]

    def see(self, image_ids: Sequence[str]) -> list[SeenImage]:
        """What the frozen parts saw; a picture that is asked for several times is one object."""
        return see([(self, image_id) for image_id in image_ids])

    def open_shard_of(self, image: RefinedImage) -> shard_files.OpenShard:
        """Kept open with those used last.

        Raises:
            InputError: a file of it is missing or not what its manifest says.
        """
        number = image.shard
        if number not in self._shards:
            self._shards[number] = shard_files.open_shard(shard_folder(self.folder, number), self._rows[number])
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number]


def see(wanted: Sequence[tuple[RefinedSplit, str]]) -> list[SeenImage]:
    """What the frozen parts saw in pictures of some splits. Image tokens that no shard holds are computed together.

    Raises:
        InputError: a shard is damaged, or image tokens are in no shard and a split has no `look`.
    """
    distinct = {(split.folder, image_id): (split, split.images[image_id]) for split, image_id in wanted}
    shards = {key: split.open_shard_of(image) for key, (split, image) in distinct.items()}
    tokens = {key: shards[key].read(IMAGE_TOKENS, image.row) for key, (_, image) in distinct.items()}
    absent = [key for key, found in tokens.items() if found is None]
    if absent:
        looked = _look([distinct[key] for key in absent])
        tokens |= {key: rounded(a, shards[key].manifest.feature_dtype) for key, a in zip(absent, looked, strict=True)}
    seen = {key: _seen(image, shards[key], tokens[key]) for key, (_, image) in distinct.items()}
    return [seen[split.folder, image_id] for split, image_id in wanted]


def _look(pictures: Sequence[tuple[RefinedSplit, RefinedImage]]) -> np.ndarray:
    for split, _ in pictures:
        if split.look is None:
            raise InputError(
                f"{split.folder} holds no image tokens, and refine.features is not online; run: python -m lyrics refine"
            )
    look = pictures[0][0].look
    assert look is not None
    return look([image.path for _, image in pictures])


def _seen(image: RefinedImage, shard: shard_files.OpenShard, image_tokens_PD: np.ndarray | None) -> SeenImage:
    detector_ND, segmenter_ND = (shard.read(name, image.row, len(image.tags)) for name in LOCAL_TOKENS)
    assert image_tokens_PD is not None and detector_ND is not None and segmenter_ND is not None
    boxes = np.asarray(image.boxes_xyxy, np.float32).reshape(-1, 4)
    size = np.asarray([image.width, image.height, image.width, image.height], np.float32)
    return SeenImage(
        image_tokens_PD=image_tokens_PD,
        detector_tokens_ND=detector_ND,
        segmenter_tokens_ND=segmenter_ND,
        tags=image.tags,
        boxes_xyxy_N4=np.clip(boxes / size, 0.0, 1.0),
        spatial_text=image.spatial_text,
    )


def shard_folder(split: Path, number: int) -> Path:
    return split / f"shard-{number:05d}"


def _stream_table(path: Path, schema: pa.Schema) -> Iterator[dict]:
    try:
        with pq.ParquetFile(path) as table:
            if missing := sorted(set(schema.names) - set(table.schema_arrow.names)):
                raise pa.ArrowInvalid(f"no column {', '.join(missing)}")
            for group in table.iter_batches(_ROWS_PER_GROUP, columns=schema.names):
                yield from pa.Table.from_batches([group]).cast(schema).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read ({error}); make it again with: python -m lyrics refine")
